//! `quarry volume rescue`: what a lost head would be made to, and making it so.

use super::Failure;
use super::args::RescueFlags;
use super::output::Console;
use super::progress::shown;
use super::table::{bytes, fields};
use crate::control::{Client, RescueReport, RescueSpec};

pub(super) async fn run(
    client: &Client,
    flags: RescueFlags,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let RescueFlags {
        volume,
        id,
        apply,
        size,
        sector_size,
        durability,
        compression,
    } = flags;
    let spec = RescueSpec {
        id,
        apply,
        size_bytes: size.map(quarry_config::Size::bytes),
        sector_size,
        durability,
        compression,
    };
    let report = shown("rescuing", &volume, client.rescue(&volume, &spec)).await?;
    console.show(&report, text)
}

fn text(report: &RescueReport) -> String {
    let there = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let log: Vec<_> = report
        .log
        .iter()
        .map(|r| format!("{}..{} of epoch {}", r.first, r.end, r.epoch))
        .collect();
    let passed_over = report.passed_over.iter();
    let passed_over: Vec<_> = passed_over
        .map(|f| format!("{} ({})", f.object, f.problem))
        .collect();
    let left = match report.left_behind {
        0 => None,
        left => Some(format!(
            "{left} objects of the log behind its end; what they held is given up"
        )),
    };
    let found = fields(&[
        ("volume", Some(report.volume.clone())),
        ("id", Some(report.id.clone())),
        ("head", Some(report.lost.clone())),
        (
            "map",
            Some(report.map.clone().unwrap_or_else(|| "none".to_owned())),
        ),
        ("passed over", there(&passed_over.join(", "))),
        ("cloned from", report.parent.clone()),
        ("snapshots", there(&report.snapshots.join(", "))),
        ("keys", (report.keys > 0).then(|| report.keys.to_string())),
        ("chunks", there(&log.join(", "))),
        ("log ends", there(&report.log_ends)),
        ("left behind", left),
        ("last write", Some(report.last_write.to_string())),
        (
            "size",
            Some(format!("{} at least", bytes(report.size_min_bytes))),
        ),
        ("epoch", Some(report.epoch.to_string())),
    ]);
    let next = match (report.applied, report.needs.is_empty()) {
        (true, _) => format!(
            "It is written; check it with `quarry volume verify {} --deep`.",
            report.volume
        ),
        (false, true) => "Nothing was written; with --apply it is.".to_owned(),
        (false, false) => format!(
            "Nothing was written; to write it, give {} and --apply: no object but the lost head says these.",
            report.needs.join(", ")
        ),
    };
    format!("{found}\n{next}")
}
