//! How long the users of ublk devices wait while one daemon follows another: the last one leaves the
//! time at which it took no more requests, the next one says how long ago that was.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the kernel tells the time since the boot, in hundredths of a second.
const UPTIME: &str = "/proc/uptime";

/// Time since the boot, which goes on over a daemon's death and is not set back.
fn now() -> Option<Duration> {
    let text = fs::read_to_string(UPTIME).ok()?;
    let seconds: f64 = text.split_whitespace().next()?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("stopped-at")
}

/// Notes that from now on no requests are taken. Only a figure for a log: nobody relies on it.
pub(super) fn leave(data_dir: &Path) {
    let Some(now) = now() else { return };
    if let Err(error) = fs::write(path(data_dir), format!("{}\n", now.as_millis())) {
        tracing::debug!(%error, "the time of the stop could not be noted");
    }
}

/// Since when requests have been waiting; `None` if the last daemon did not say, or died later.
pub(super) fn take(data_dir: &Path) -> Option<Since> {
    let text = fs::read_to_string(path(data_dir)).ok()?;
    // A later daemon that dies without a word must not be taken for this one.
    fs::remove_file(path(data_dir)).ok()?;
    let at = Duration::from_millis(text.trim().parse().ok()?);
    // After a reboot the clock has started anew.
    (at <= now()?).then_some(Since(at))
}

/// A moment of this boot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Since(Duration);

impl Since {
    pub(super) fn elapsed(self) -> Duration {
        now().unwrap_or_default().saturating_sub(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_is_told_to_one_successor_only() {
        let dir = tempfile::tempdir().unwrap();
        assert!(take(dir.path()).is_none());
        leave(dir.path());
        let since = take(dir.path()).unwrap();
        assert!(since.elapsed() < Duration::from_secs(60));
        assert!(take(dir.path()).is_none());
    }

    #[test]
    fn stop_of_another_boot_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let later = now().unwrap() + Duration::from_secs(1000);
        fs::write(path(dir.path()), later.as_millis().to_string()).unwrap();
        assert!(take(dir.path()).is_none());
    }
}
