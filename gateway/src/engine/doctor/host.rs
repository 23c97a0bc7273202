//! What the daemon writes on its host beside the cache: whether it can go on with that.

use std::path::Path;

use crate::control::{Check, Verdict};

/// Bytes that a folder should have left.
const ROOM_MIN: u64 = 64 << 20;

/// With less than this, attaching a volume may fail.
const ROOM_NEEDED: u64 = 1 << 20;

/// How much room a folder has; `used` says for what.
pub(super) fn examine_room(dir: &Path, used: &str) -> Check {
    let what = format!("room in {}", dir.display());
    match rustix::fs::statvfs(dir) {
        // In memory, without a limit.
        Ok(found) if found.f_blocks == 0 => Check::ok(what, "its size is not told"),
        Ok(found) => {
            // Some is kept for root.
            let blocks = match rustix::process::geteuid().is_root() {
                true => found.f_bfree,
                false => found.f_bavail,
            };
            judge_room(what, blocks.saturating_mul(found.f_frsize), used)
        }
        Err(errno) => Check::new(
            what,
            Verdict::Failed,
            std::io::Error::from(errno).to_string(),
            "make the folder, and start the daemon anew",
        ),
    }
}

fn judge_room(what: String, free: u64, used: &str) -> Check {
    let left = format!("{} MiB are left", free >> 20);
    let verdict = match free {
        0..ROOM_NEEDED => Verdict::Failed,
        ROOM_NEEDED..ROOM_MIN => Verdict::Warning,
        ROOM_MIN.. => return Check::ok(what, left),
    };
    let remedy = format!("free some until there are {} MiB", ROOM_MIN >> 20);
    Check::new(what, verdict, format!("{left}, and {used}"), remedy)
}

/// Whether what was to be written to the audit log last is there.
pub(super) fn examine_audit(problem: Option<String>) -> Check {
    let what = "audit log";
    match problem {
        None => Check::ok(what, "it can be written"),
        Some(problem) => Check::new(
            what,
            Verdict::Failed,
            problem,
            "make room there, or set access.audit_log to a file that the daemon may write",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_that_is_almost_full_is_warned_of_and_one_that_is_full_has_failed() {
        for (free, verdict) in [
            (0, Verdict::Failed),
            (ROOM_NEEDED - 1, Verdict::Failed),
            (ROOM_NEEDED, Verdict::Warning),
            (ROOM_MIN - 1, Verdict::Warning),
            (ROOM_MIN, Verdict::Ok),
            (u64::MAX, Verdict::Ok),
        ] {
            let check = judge_room("room".to_owned(), free, "it is needed");
            assert_eq!(check.verdict, verdict, "{free}");
            assert_eq!(check.remedy.is_empty(), verdict == Verdict::Ok, "{check:?}");
        }
    }

    #[test]
    fn folder_that_is_gone_has_failed() {
        let dir = tempfile::tempdir().unwrap();
        let gone = examine_room(&dir.path().join("gone"), "it is needed");
        assert_eq!(gone.verdict, Verdict::Failed);
        assert!(gone.finding.contains("No such file"), "{gone:?}");
    }
}
