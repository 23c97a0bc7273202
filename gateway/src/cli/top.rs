//! `quarry top`: what the volumes on a host do, again and again: what the status page shows, in a terminal.
//!
//! On a terminal the table has a screen of its own, which is given back however this ends, and a daemon that does not
//! answer is asked again. Elsewhere tables follow each other, one only unless it is said how many.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use clap::{Args, ValueEnum};
use quarry_objfmt::printable;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use super::Failure;
use super::output::Console;
use super::table::{bytes, span_ms, table};
use crate::control::{Activity, Client, StatusInfo, VolumeActivity};

/// The least time between two looks.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// A screen of its own, and no cursor.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l";
/// The screen and the cursor that were there before.
const LEAVE: &[u8] = b"\x1b[?25h\x1b[?1049l";
/// Back to the corner.
const HOME: &str = "\x1b[H";
/// What is left of a line, and of the screen, is cleared.
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_REST: &str = "\x1b[J";

/// Flags of `quarry top`.
#[derive(Debug, Args)]
pub struct TopFlags {
    /// Time between two looks.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = interval)]
    pub interval: Duration,
    /// How many tables to show; by default one, or on a terminal as many as are waited for.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Show one table, and leave the terminal as it is.
    #[arg(long, conflicts_with = "count")]
    pub once: bool,
    /// What comes first: the most of it, or the first name.
    #[arg(long, value_enum, default_value = "requests", value_name = "COLUMN")]
    pub sort: Column,
}

/// A column to sort by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Column {
    /// By name.
    Volume,
    /// Requests a second.
    Requests,
    /// Bytes read a second.
    Read,
    /// Bytes written a second.
    Written,
    /// Mean time of a request.
    Latency,
    /// What the store does not have yet.
    Unsent,
    /// Age of the oldest of that.
    Age,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match interval < INTERVAL_MIN {
        true => Err(format!("wait {INTERVAL_MIN:?} at least")),
        false => Ok(interval),
    }
}

/// What a volume did between two looks.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
struct Rates {
    reads: f64,
    writes: f64,
    read_bytes: f64,
    write_bytes: f64,
    /// Share of bytes read that the cache had; none: nothing was read that it could have had.
    hit_ratio: Option<f64>,
    /// Mean times, in microseconds; none: there was no such request.
    read_us: Option<f64>,
    write_us: Option<f64>,
    request_us: Option<f64>,
}

/// A volume, and what it did.
#[derive(Clone, PartialEq, Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    now: VolumeActivity,
    per_second: Rates,
}

/// One table.
#[derive(Serialize)]
struct Seen {
    at_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    daemon: Option<StatusInfo>,
    volumes: Vec<Row>,
    volumes_left_out: u64,
    waits: Vec<String>,
}

impl Seen {
    fn between(before: &Activity, now: Activity, sort: Column) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "numbers for people")]
        let seconds = (now.at_ms.saturating_sub(before.at_ms).max(1)) as f64 / 1000.0;
        let row = |now: VolumeActivity| {
            let same = |v: &&VolumeActivity| v.volume == now.volume && v.since_ms == now.since_ms;
            let per_second = match before.volumes.iter().find(same) {
                Some(before) => rates(before, &now, seconds),
                // Nobody knows what it did in the time.
                None => Rates::default(),
            };
            Row { now, per_second }
        };
        let mut volumes: Vec<Row> = now.volumes.into_iter().map(row).collect();
        // By name they are already, and stay so among equals.
        volumes.sort_by(|a, b| sort.key(b).total_cmp(&sort.key(a)));
        Self {
            at_ms: now.at_ms,
            daemon: now.daemon,
            volumes,
            volumes_left_out: now.volumes_left_out,
            waits: now.waits,
        }
    }
}

impl Column {
    #[allow(clippy::cast_precision_loss, reason = "an order for people")]
    fn key(self, row: &Row) -> f64 {
        match self {
            Self::Volume => 0.0,
            Self::Requests => row.per_second.reads + row.per_second.writes,
            Self::Read => row.per_second.read_bytes,
            Self::Written => row.per_second.write_bytes,
            Self::Latency => row.per_second.request_us.unwrap_or(0.0),
            Self::Unsent => row.now.dirty_bytes as f64,
            Self::Age => row.now.rpo_ms as f64,
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "numbers for people")]
fn rates(before: &VolumeActivity, now: &VolumeActivity, seconds: f64) -> Rates {
    let since = |of: fn(&VolumeActivity) -> u64| of(now).saturating_sub(of(before)) as f64;
    let rate = |of: fn(&VolumeActivity) -> u64| since(of) / seconds;
    let took = |ops: &[&str]| {
        let sum = |of: &VolumeActivity| {
            let asked = of.times.iter().filter(|t| ops.contains(&t.op.as_str()));
            asked.fold((0, 0), |(n, us), t| (n + t.count, us + t.sum_us))
        };
        let ((n, us), (n_before, us_before)) = (sum(now), sum(before));
        let n = n.saturating_sub(n_before);
        (n > 0).then(|| us.saturating_sub(us_before) as f64 / n as f64)
    };
    let (hit, miss) = (since(|v| v.hit_bytes), since(|v| v.miss_bytes));
    Rates {
        reads: rate(|v| v.reads),
        writes: rate(|v| v.writes),
        read_bytes: rate(|v| v.read_bytes),
        write_bytes: rate(|v| v.write_bytes),
        hit_ratio: (hit + miss > 0.0).then(|| hit / (hit + miss)),
        read_us: took(&["read_hit", "read_miss"]),
        write_us: took(&["write"]),
        request_us: took(&["read_hit", "read_miss", "write"]),
    }
}

/// Gives the terminal back.
struct Screen;

impl Screen {
    fn enter(console: &mut Console<'_>) -> Result<Self, Failure> {
        console.raw(ENTER)?;
        Ok(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nobody is left to tell when this cannot be written.
        let _ = io::Write::write_all(&mut io::stdout(), LEAVE);
        let _ = io::Write::flush(&mut io::stdout());
    }
}

pub(super) async fn run(
    client: &Client,
    flags: TopFlags,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let on_terminal = io::stdout().is_terminal() && !flags.once && !console.is_json();
    let count = match (flags.count, on_terminal) {
        (Some(count), _) => Some(count),
        (None, true) => None,
        (None, false) => Some(1),
    };
    let mut before = client.activity().await?;
    // Before the screen is taken, so that no signal ends this without giving it back.
    let (mut stopped, mut ended) = (
        stop(SignalKind::interrupt())?,
        stop(SignalKind::terminate())?,
    );
    // After the first answer: a daemon that is not there is told of where it is seen.
    let screen = match on_terminal {
        true => Some(Screen::enter(console)?),
        false => None,
    };
    let mut shown = 0;
    while count.is_none_or(|count| shown < count) {
        if screen.is_some() && shown == 0 {
            console.raw(format!("{HOME}{CLEAR_REST}looking\r\n").as_bytes())?;
        }
        let look = async {
            sleep(flags.interval).await;
            client.activity().await
        };
        let now = tokio::select! {
            now = look => now,
            _ = stopped.recv() => break,
            _ = ended.recv() => break,
        };
        let now = match now {
            Ok(now) => now,
            // It may be replaced by a newer one just now; who looks on ends this.
            Err(error) if screen.is_some() => {
                let why = printable(&error.to_string());
                console.raw(on_screen(&format!("no answer: {why}")).as_bytes())?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let seen = Seen::between(&before, now.clone(), flags.sort);
        before = now;
        shown += 1;
        match &screen {
            Some(_) => console.raw(on_screen(&text(&seen)).as_bytes())?,
            None => console.show(&seen, text)?,
        }
    }
    Ok(())
}

fn stop(kind: SignalKind) -> Result<tokio::signal::unix::Signal, Failure> {
    signal(kind).map_err(|error| {
        let message = format!("cannot wait for signals: {error}");
        Failure::new("internal", message, "raise the limits of this process")
    })
}

/// A text that replaces what is on the screen, cut to its size: a line that wraps would move the rest.
fn on_screen(text: &str) -> String {
    let size = screen_size();
    let mut out = HOME.to_owned();
    for (n, line) in text.lines().take(size.0).enumerate() {
        if n > 0 {
            out.push_str("\r\n");
        }
        // First: behind a line that fills it, the cursor is still on its last place.
        out.push_str(CLEAR_LINE);
        out.extend(line.chars().take(size.1));
    }
    out.push_str(CLEAR_REST);
    out
}

/// Lines and columns of the terminal.
fn screen_size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row.into(), size.ws_col.into()),
        _ => (24, 80),
    }
}

fn text(seen: &Seen) -> String {
    let mut out = seen.daemon.as_ref().map(head).unwrap_or_default();
    for wait in &seen.waits {
        // It may quote what others said.
        out.push_str(&format!("waits: {}\n", printable(wait)));
    }
    if !out.is_empty() {
        out.push('\n');
    }
    let rows: Vec<Vec<String>> = seen.volumes.iter().map(cells).collect();
    out.push_str(&table(
        &[
            "VOLUME",
            "STATE",
            "R/S",
            "W/S",
            "READ/S",
            "WRITTEN/S",
            "R-TIME",
            "W-TIME",
            "HITS",
            "NOW",
            "UNSENT",
            "AGE",
        ],
        &rows,
    ));
    if seen.volumes_left_out > 0 {
        out.push_str(&format!("and {} more\n", seen.volumes_left_out));
    }
    out
}

fn head(status: &StatusInfo) -> String {
    let StatusInfo { cache, store, .. } = status;
    let segments = cache.segments;
    let state = if store.healthy {
        "answers"
    } else {
        "does not answer"
    };
    format!(
        "quarry {} on {}: {} attached, {} to be; store {state}, {} calls, {} uploads\n\
         cache: {} of {} dirty (at most {}); segments: {} free, {} dirty, {} filling, {} clean\n",
        status.version,
        status.host,
        status.volumes_attached,
        status.volumes_waiting,
        status.store_calls,
        status.uploads,
        bytes(cache.dirty_bytes),
        bytes(cache.size_bytes),
        bytes(cache.dirty_max_bytes),
        segments.free,
        segments.dirty,
        segments.filling,
        segments.clean,
    )
}

fn cells(row: &Row) -> Vec<String> {
    let (now, did) = (&row.now, &row.per_second);
    let mut state = now.state.as_str().to_owned();
    for (is_so, word) in [
        (now.held > 0, "held"),
        (now.stalled, "stalled"),
        (now.errors > 0, "errors"),
        (now.problem.is_some(), "problem"),
    ] {
        if is_so {
            state.push_str(", ");
            state.push_str(word);
        }
    }
    let none = || "-".to_owned();
    let unsent = now.dirty_bytes > 0;
    vec![
        now.volume.clone(),
        state,
        format!("{:.0}", did.reads),
        format!("{:.0}", did.writes),
        human(did.read_bytes),
        human(did.write_bytes),
        did.read_us.map_or_else(none, time_us),
        did.write_us.map_or_else(none, time_us),
        did.hit_ratio
            .map_or_else(none, |share| format!("{:.0}%", share * 100.0)),
        now.in_flight.to_string(),
        bytes(now.dirty_bytes),
        if unsent { span_ms(now.rpo_ms) } else { none() },
    ]
}

/// A rate in bytes.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate is not negative"
)]
fn human(rate: f64) -> String {
    bytes(rate as u64)
}

/// A time in microseconds, for people.
fn time_us(us: f64) -> String {
    match us {
        us if us < 1000.0 => format!("{us:.0}us"),
        us if us < 1_000_000.0 => format!("{:.1}ms", us / 1000.0),
        us => format!("{:.1}s", us / 1_000_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{State, TimesInfo};

    fn volume(name: &str, writes: u64, sum_us: u64) -> VolumeActivity {
        VolumeActivity {
            volume: name.to_owned(),
            state: State::Attached,
            since_ms: 7,
            writes,
            write_bytes: writes * 4096,
            times: vec![TimesInfo {
                op: "write".to_owned(),
                count: writes,
                sum_us,
                below: Vec::new(),
            }],
            ..VolumeActivity::default()
        }
    }

    fn activity(at_ms: u64, volumes: Vec<VolumeActivity>) -> Activity {
        Activity {
            at_ms,
            volumes,
            ..Activity::default()
        }
    }

    #[test]
    fn rates_are_of_the_time_between_and_of_the_same_attachment() {
        let mut again = volume("a/again", 500, 0);
        again.since_ms = 8;
        let before = activity(
            1000,
            vec![volume("a/again", 1, 0), volume("a/db", 100, 1000)],
        );
        let now = activity(3000, vec![again, volume("a/db", 300, 401_000)]);
        let seen = Seen::between(&before, now.clone(), Column::Requests);
        let names: Vec<&str> = seen.volumes.iter().map(|r| r.now.volume.as_str()).collect();
        assert_eq!(names, ["a/db", "a/again"]);
        let did = &seen.volumes[0].per_second;
        assert_eq!((did.writes, did.write_bytes), (100.0, 409_600.0));
        assert_eq!((did.write_us, did.read_us), (Some(2000.0), None));
        assert_eq!(seen.volumes[1].per_second, Rates::default());
        let shown = text(&seen);
        let line = shown.lines().find(|l| l.starts_with("a/db")).unwrap();
        assert!(
            line.contains("100") && line.contains("400KiB") && line.contains("2.0ms"),
            "{line}"
        );
        let by_name = Seen::between(&before, now, Column::Volume);
        assert_eq!(by_name.volumes[0].now.volume, "a/again");
    }

    #[test]
    fn words_of_others_do_nothing_to_the_terminal() {
        let mut seen = Seen::between(&activity(0, vec![]), activity(1, vec![]), Column::Volume);
        seen.waits = vec!["the store says \x1b[2J\r\nboo".to_owned()];
        assert!(!text(&seen).contains(['\x1b', '\r']));
        assert_eq!(text(&seen).matches("boo").count(), 1);
    }

    #[test]
    fn screen_is_filled_line_by_line_and_cleared_behind() {
        let out = on_screen("one\ntwo\n");
        assert_eq!(out, "\x1b[H\x1b[Kone\r\n\x1b[Ktwo\x1b[J");
    }
}
