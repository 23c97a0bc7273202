//! `quarry volume verify`: what is wrong with a volume in the store; a failure if anything is.

use super::Failure;
use super::output::Console;
use super::progress::verifying;
use super::table::{bytes, fields, table};
use crate::control::{ByteRange, Client, Finding, ImageRef, VerifyReport, VerifySpec};

/// Ranges printed with a finding; JSON has more.
const RANGES_SHOWN: usize = 4;

pub(super) async fn run(
    client: &Client,
    volume: &ImageRef,
    spec: VerifySpec,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let report = verifying(client, volume, client.verify(volume, &spec)).await?;
    let all = || std::iter::once(&report).chain(&report.snapshots);
    let count: u64 = all()
        .map(|r| r.findings.len() as u64 + r.findings_left_out)
        .sum();
    if count == 0 {
        return console.show(&report, text);
    }
    let unreadable: u64 = all().map(|r| r.unreadable_bytes).sum();
    let hit = match unreadable {
        _ if is_headless(&report) => "nothing can be read until its head is made anew".to_owned(),
        0 => "all of its data can be read".to_owned(),
        hit => format!("{} of its data cannot be read", bytes(hit)),
    };
    let remedy = match (unreadable, spec.deep) {
        _ if is_headless(&report) => {
            let volume = &volume.volume;
            format!("make it anew with `quarry volume rescue {volume}`, and verify it again")
        }
        (0, false) => "restore the objects from a copy, and verify it with --deep".to_owned(),
        _ => "restore the objects from a copy, or the data from a backup".to_owned(),
    };
    let message = format!("{volume} is damaged in the store: {count} findings, {hit}");
    let failure = Failure::new("damaged", message, remedy);
    console.show_failed(&report, text, failure)
}

/// Whether there is no head that can be read, by which alone the rest is found.
fn is_headless(report: &VerifyReport) -> bool {
    report.epoch.is_none() && !report.findings.is_empty()
}

fn text(report: &VerifyReport) -> String {
    let all = std::iter::once(report).chain(&report.snapshots);
    let texts: Vec<_> = all.map(text_of_one).collect();
    texts.join("\n")
}

fn text_of_one(report: &VerifyReport) -> String {
    let is_snapshot = report.volume.contains('@');
    let checked = &report.checked;
    let read = if report.deep {
        format!("{} frames of ", checked.frames)
    } else {
        String::new()
    };
    let what = fields(&[
        ("volume", Some(report.volume.clone())),
        ("id", Some(report.id.clone())),
        ("epoch", report.epoch.map(|epoch| epoch.to_string())),
        (
            "up to",
            report.epoch.map(|_| match is_snapshot {
                true => format!("write {}", report.last_write),
                false => format!(
                    "write {}, before chunk {}",
                    report.last_write, report.next_chunk
                ),
            }),
        ),
        (
            "not looked at",
            (report.snapshots_left_out > 0).then(|| {
                let count = report.snapshots_left_out;
                format!("{count} snapshots, which --snapshots checks too")
            }),
        ),
        (
            "checked",
            // What was checked of its snapshots is counted with the volume.
            (report.checked.nodes + report.checked.chunks > 0 || !is_snapshot).then(|| {
                format!(
                    "{} nodes of the map, {read}{} chunks; {} read",
                    checked.nodes,
                    checked.chunks,
                    bytes(checked.read_bytes)
                )
            }),
        ),
        (
            "unreadable",
            Some(match report.unreadable_bytes {
                0 if report.findings.is_empty() => "nothing, and nothing is wrong".to_owned(),
                0 if is_headless(report) => "all, until its head is made anew".to_owned(),
                0 => "nothing".to_owned(),
                hit => bytes(hit),
            }),
        ),
    ]);
    if report.findings.is_empty() {
        return what;
    }
    let row = |finding: &Finding| {
        vec![
            finding.object.clone(),
            ranges(&finding.ranges, finding.ranges_left_out),
            finding.problem.clone(),
        ]
    };
    let rows: Vec<_> = report.findings.iter().map(row).collect();
    let more = match report.findings_left_out {
        0 => String::new(),
        more => format!("and {more} more\n"),
    };
    let found = table(&["OBJECT", "BYTES OF THE VOLUME", "PROBLEM"], &rows);
    format!("{what}\n{found}{more}")
}

fn ranges(ranges: &[ByteRange], left_out: u64) -> String {
    if ranges.is_empty() {
        return "-".to_owned();
    }
    let shown = ranges.iter().take(RANGES_SHOWN);
    let shown: Vec<_> = shown.map(|r| format!("{}..{}", r.start, r.end)).collect();
    let more = (ranges.len() - shown.len()) as u64 + left_out;
    let more = match more {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}", shown.join(" "))
}
