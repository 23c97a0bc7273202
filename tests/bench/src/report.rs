//! Figures by work, target and round; the ratios that Quarry promises; a table, a plot, and all of it as JSON.
//!
//! A ratio is formed within a round, and its median told with the least and the most of all rounds.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::ceiling::{DISK, STORE};
use crate::lab::Lab;

/// What is measured, in the order of the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Work {
    WarmRead,
    RandomWrite,
    FlushRounds,
    Flush,
    FlushRoundsObject,
    PutsAFlush,
    SequentialWrite,
    CheckedWrite,
    ColdSequentialRead,
    ColdRead,
    ColdReadP99,
    Amplification,
    WriteCpu,
    ReadCpu,
    Memory,
}

use Work::{
    Amplification, CheckedWrite, ColdRead, ColdReadP99, ColdSequentialRead, Flush, FlushRounds,
    FlushRoundsObject, Memory, PutsAFlush, RandomWrite, ReadCpu, SequentialWrite, WarmRead,
    WriteCpu,
};

impl Work {
    const fn says(self) -> (&'static str, &'static str) {
        match self {
            WarmRead => ("4 KiB random read, warm, depth 32", "IOPS"),
            RandomWrite => ("4 KiB random write, depth 32, final flush in", "IOPS"),
            FlushRounds => ("32 writes of 4 KiB, then a flush", "writes/s"),
            Flush => ("mean of those flushes", "ms"),
            FlushRoundsObject => ("the same, each flush to the store", "writes/s"),
            PutsAFlush => ("PUTs of such a flush", ""),
            SequentialWrite => ("1 MiB sequential write, until all is in the store", "MiB/s"),
            CheckedWrite => ("the same, by CRC-64, not signed", "MiB/s"),
            ColdSequentialRead => ("1 MiB sequential read, cold", "MiB/s"),
            ColdRead => ("4 KiB random read, cold, depth 1, median", "us"),
            ColdReadP99 => ("the same, 99th percentile", "us"),
            Amplification => ("bytes uploaded a byte written, a flush each 32", ""),
            WriteCpu => (
                "server CPU a 4 KiB random write, through to the store",
                "us",
            ),
            ReadCpu => ("server CPU a 4 KiB warm read", "us"),
            Memory => ("most memory of the server", "MiB"),
        }
    }
}

impl Work {
    /// Whether less of it is better.
    const fn is_cost(self) -> bool {
        matches!(
            self,
            Flush
                | PutsAFlush
                | ColdRead
                | ColdReadP99
                | Amplification
                | WriteCpu
                | ReadCpu
                | Memory
        )
    }
}

/// How Quarry is to stand beside another.
enum Wanted {
    /// At least so many times as much.
    AtLeast(f64),
    /// At most so many times as much.
    AtMost(f64),
}

/// What is promised: for a work, beside whom, and how.
const PROMISES: &[(Work, &str, Wanted)] = &[
    (WarmRead, "nbdkit", Wanted::AtLeast(0.9)),
    (WarmRead, "zerofs", Wanted::AtLeast(25.0)),
    (RandomWrite, "qemu-nbd", Wanted::AtLeast(1.5)),
    (RandomWrite, "s3backer", Wanted::AtLeast(5.0)),
    (RandomWrite, "zerofs", Wanted::AtLeast(20.0)),
    (FlushRounds, "qemu-nbd", Wanted::AtLeast(0.9)),
    (FlushRounds, "s3backer", Wanted::AtLeast(15.0)),
    (FlushRounds, "zerofs", Wanted::AtLeast(15.0)),
    (FlushRoundsObject, "zerofs", Wanted::AtLeast(2.0)),
    (FlushRoundsObject, "s3backer", Wanted::AtLeast(1.0)),
    (SequentialWrite, STORE, Wanted::AtLeast(0.8)),
    (SequentialWrite, "s3backer", Wanted::AtLeast(2.0)),
    (ColdSequentialRead, STORE, Wanted::AtLeast(0.8)),
    (ColdSequentialRead, "s3backer", Wanted::AtLeast(3.0)),
    (ColdRead, STORE, Wanted::AtMost(1.15)),
    (WriteCpu, "s3backer", Wanted::AtMost(0.5)),
    (WriteCpu, "zerofs", Wanted::AtMost(0.1)),
];
/// The same for what Quarry promises of itself.
const LIMITS: &[(Work, f64)] = &[(PutsAFlush, 1.0), (Amplification, 1.2)];

const SELF: &str = "quarry";
/// The columns.
const TARGETS: [&str; 7] = [
    SELF, "qemu-nbd", "nbdkit", "s3backer", "zerofs", STORE, DISK,
];

type Round = BTreeMap<(Work, &'static str), f64>;

/// All figures.
#[derive(Default)]
pub struct Report {
    rounds: Vec<Round>,
    left_out: BTreeSet<String>,
}

impl Report {
    pub fn begin_round(&mut self) {
        self.rounds.push(Round::new());
    }

    pub fn add(&mut self, work: Work, target: &'static str, figure: f64) {
        let (name, unit) = work.says();
        eprintln!("  {target}: {name}: {} {unit}", shown(figure));
        let round = self.rounds.last_mut();
        round
            .expect("a round has begun")
            .insert((work, target), figure);
    }

    /// Of `target`, for want of `program`.
    pub fn leave_out(&mut self, target: &str, program: &str) {
        let said = format!("{target} was left out: no {program} here");
        eprintln!("  {said}");
        self.left_out.insert(said);
    }

    fn figures(&self, work: Work, target: &'static str) -> Vec<f64> {
        let of_round = |round: &Round| round.get(&(work, target)).copied();
        self.rounds.iter().filter_map(of_round).collect()
    }

    fn works(&self) -> BTreeSet<Work> {
        let works = self.rounds.iter().flat_map(Round::keys);
        works.map(|(work, _)| *work).collect()
    }

    /// The two tables, in Markdown: medians of all, and what was promised beside what was found.
    pub fn tables(&self) -> String {
        let mut text = format!("| work | {} |\n|---|", TARGETS.join(" | "));
        text.push_str(&"---|".repeat(TARGETS.len()));
        for work in self.works() {
            let (name, unit) = work.says();
            let unit = if unit.is_empty() {
                String::new()
            } else {
                format!(", {unit}")
            };
            write!(text, "\n| {name}{unit} |").expect("text takes all");
            for target in TARGETS {
                let cell = median(self.figures(work, target)).map_or_else(String::new, shown);
                write!(text, " {cell} |").expect("text takes all");
            }
        }
        text.push_str("\n\n| work | beside | wanted | found, median (least, most) | |\n|---|---|---|---|---|\n");
        for (work, other, wanted) in PROMISES {
            let ratio = |round: &Round| {
                let (mine, theirs) = (round.get(&(*work, SELF))?, round.get(&(*work, *other))?);
                Some(mine / theirs)
            };
            let ratios = self.rounds.iter().filter_map(ratio).collect();
            let (said, limit) = match wanted {
                Wanted::AtLeast(limit) => ("at least", *limit),
                Wanted::AtMost(limit) => ("at most", *limit),
            };
            let is_met = |found: f64| match wanted {
                Wanted::AtLeast(limit) => found >= *limit,
                Wanted::AtMost(limit) => found <= *limit,
            };
            promise_row(&mut text, *work, other, (said, limit), ratios, is_met);
        }
        for (work, limit) in LIMITS {
            let figures = self.figures(*work, SELF);
            let is_met = |found: f64| found <= *limit;
            promise_row(&mut text, *work, "", ("at most", *limit), figures, is_met);
        }
        for said in &self.left_out {
            writeln!(text, "\n{said}.").expect("text takes all");
        }
        text
    }

    fn json(&self, lab: &Lab) -> Value {
        let of_round = |round: &Round| {
            let mut works = Map::new();
            for ((work, target), figure) in round {
                let (name, unit) = work.says();
                let entry = works.entry(name).or_insert_with(|| json!({"unit": unit}));
                entry[*target] = json!(figure);
            }
            Value::Object(works)
        };
        json!({
            "volume_bytes": lab.size,
            "seconds": lab.time.as_secs(),
            "store_delay_ms": lab.delay.as_secs_f64() * 1e3,
            "rounds": self.rounds.iter().map(of_round).collect::<Vec<_>>(),
        })
    }

    /// Bars for each work, each target's median beside the best by its logarithm: longer is better, whatever the unit.
    fn plot(&self) -> String {
        const ROW: usize = 16;
        /// A bar of no length is so many powers of ten worse than the best.
        const DECADES: f64 = 3.0;
        let mut body = String::from(
            r#"<text x="8" y="14">Longer is better; a third of the length is a factor of ten.</text>"#,
        );
        let mut y = 18;
        for work in self.works() {
            let (name, unit) = work.says();
            let found = TARGETS.map(|target| (target, median(self.figures(work, target))));
            let found: Vec<_> = found
                .into_iter()
                .filter_map(|(target, figure)| Some((target, figure?)))
                .collect();
            // What is better: figures, or their inverses.
            let merit = |figure: f64| if work.is_cost() { 1.0 / figure } else { figure };
            let best = found.iter().map(|(_, figure)| merit(*figure));
            let best = best.fold(0.0, f64::max);
            y += 22;
            writeln!(
                body,
                r#"<text x="8" y="{y}" class="w">{name}{}</text>"#,
                if unit.is_empty() {
                    String::new()
                } else {
                    format!(", {unit}")
                }
            )
            .expect("text takes all");
            for (target, figure) in found {
                y += ROW;
                // None at all of a cost is the best that there is.
                let part = if merit(figure) == best {
                    1.0
                } else {
                    1.0 + (merit(figure) / best).log10() / DECADES
                };
                let width = 460.0 * part.clamp(0.01, 1.0);
                let class = if target == SELF { "q" } else { "o" };
                writeln!(
                    body,
                    r#"<text x="88" y="{y}" class="t">{target}</text><rect x="96" y="{}" width="{width:.0}" height="11" class="{class}"/><text x="{:.0}" y="{y}">{}</text>"#,
                    y - 10,
                    102.0 + width,
                    shown(figure)
                )
                .expect("text takes all");
            }
        }
        let height = y + 16;
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="660" height="{height}" viewBox="0 0 660 {height}" font-family="sans-serif" font-size="11">
<style>text{{fill:#333}}.w{{font-weight:bold}}.t{{text-anchor:end}}.q{{fill:#0b6e4f}}.o{{fill:#b8bfc6}}@media(prefers-color-scheme:dark){{text{{fill:#ddd}}.q{{fill:#3ddc97}}.o{{fill:#596168}}}}</style>
{body}</svg>
"##
        )
    }

    /// Writes the page's tables between its marks, the figures and the plot.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, dir: &Path, lab: &Lab) -> Result<()> {
        write_between_marks(&dir.join("BENCHMARKS.md"), "figures", &self.tables())?;
        fs::create_dir_all(dir.join("pictures"))?;
        fs::write(dir.join("pictures/benchmarks.svg"), self.plot())?;
        let json = serde_json::to_string_pretty(&self.json(lab))?;
        fs::write(dir.join("benchmarks.json"), json + "\n")?;
        Ok(())
    }
}

/// Puts a text into a page between the marks of `what`, in place of the one of before.
///
/// # Errors
/// If the page has no place for them, or cannot be written.
pub fn write_between_marks(page: &Path, what: &str, found: &str) -> Result<()> {
    let text = fs::read_to_string(page).with_context(|| page.display().to_string())?;
    let (begin, end) = (
        format!("<!-- {what} -->\n"),
        format!("<!-- end of {what} -->"),
    );
    let missing = |mark: &str| format!("{} has no line {mark:?}", page.display());
    let (head, rest) = text.split_once(&begin).with_context(|| missing(&begin))?;
    let (_, tail) = rest.split_once(&end).with_context(|| missing(&end))?;
    Ok(fs::write(
        page,
        format!("{head}{begin}{found}\n{end}{tail}"),
    )?)
}

fn promise_row(
    text: &mut String,
    work: Work,
    other: &str,
    (said, limit): (&str, f64),
    ratios: Vec<f64>,
    is_met: impl Fn(f64) -> bool,
) {
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    let (found, verdict) = match median(ratios) {
        None => (String::new(), "not measured"),
        Some(found) => (
            format!("{found:.2} ({least:.2}, {most:.2})"),
            if is_met(found) { "met" } else { "**not met**" },
        ),
    };
    let name = work.says().0;
    writeln!(
        text,
        "| {name} | {other} | {said} {limit} | {found} | {verdict} |"
    )
    .expect("text takes all");
}

fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}

/// With three digits, as far as they say something.
fn shown(figure: f64) -> String {
    match figure {
        ..10.0 => format!("{figure:.2}"),
        10.0..100.0 => format!("{figure:.1}"),
        _ => format!("{figure:.0}"),
    }
}
