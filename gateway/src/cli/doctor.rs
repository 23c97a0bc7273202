//! `quarry doctor`: what is not as it should be, and what to change; a failure if something does not work.

use super::Failure;
use super::output::Console;
use super::table::table;
use crate::control::{Check, Client, DoctorReport, Verdict};

pub(super) async fn run(client: &Client, console: &mut Console<'_>) -> Result<(), Failure> {
    let report = client.doctor().await?;
    let failed = |check: &&Check| check.verdict == Verdict::Failed;
    let failed = report.checks.iter().filter(failed).count();
    if failed == 0 {
        return console.show(&report, text);
    }
    let message = format!("{failed} of {} checks failed", report.checks.len());
    let failure = Failure::new("failed", message, "change what is said beside them");
    console.show_failed(&report, text, failure)
}

fn text(report: &DoctorReport) -> String {
    let row = |check: &Check| {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failed => "FAILED",
        };
        let mut found = check.finding.clone();
        if !check.remedy.is_empty() {
            found.push_str(": ");
            found.push_str(&check.remedy);
        }
        vec![verdict.to_owned(), check.what.clone(), found]
    };
    let rows: Vec<Vec<String>> = report.checks.iter().map(row).collect();
    table(&["", "WHAT", "FOUND"], &rows)
}
