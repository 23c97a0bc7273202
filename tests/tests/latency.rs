//! How long requests take, as the daemon's histograms tell.

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Site, metric_sum};
use tempfile::tempdir;

const VOLUME: &str = "acme/db";

fn requests(daemon: &Daemon, op: &str) -> Result<u64> {
    let name = "quarry_volume_request_duration_seconds_count";
    let found = metric_sum(&daemon.metrics()?, name, &format!("op=\"{op}\""));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "what is counted is whole and not negative"
    )]
    Ok(found.unwrap_or_default() as u64)
}

#[test]
fn reads_are_timed_as_hits_or_misses_and_every_request_once() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    for n in 0..7 {
        nbd.write(n * MIB, &[1; 4096], false)?;
    }
    nbd.flush()?;
    for n in 0..5 {
        nbd.read_vec(n * MIB, 4096)?;
    }
    // A hole is no miss.
    nbd.read_vec(32 * MIB, 4096)?;
    ensure!(requests(&daemon, "write")? == 7);
    ensure!(requests(&daemon, "flush")? == 1);
    ensure!(requests(&daemon, "read_hit")? == 6);
    ensure!(requests(&daemon, "read_miss")? == 0);
    daemon.sync(VOLUME)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    let mut nbd = daemon.attach(VOLUME, &[])?;
    daemon.quarry(&["volume", "evict", VOLUME])?;
    nbd.read_vec(0, 4096)?;
    ensure!(requests(&daemon, "read_miss")? == 1);
    // What failed has no time.
    nbd.read_vec(64 * MIB, 4096).unwrap_err();
    let reads = requests(&daemon, "read_hit")? + requests(&daemon, "read_miss")?;
    ensure!(reads == 1, "{reads}");
    daemon.stop()
}

#[test]
fn waiting_for_a_limit_is_told_apart_from_the_requests_own_time() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    daemon.quarry(&["volume", "limit", VOLUME, "--iops", "20"])?;
    // At once: the last one waits for about two seconds, so all together wait for about forty.
    let sent: Result<Vec<u64>, _> = (0..40)
        .map(|n| nbd.send_write(n * MIB, &[1; 4096], false))
        .collect();
    for cookie in sent? {
        nbd.wait(cookie)?;
    }
    let text = daemon.metrics()?;
    let seconds = |name: &str| metric_sum(&text, name, "").context("no such metric");
    let held = seconds("quarry_volume_held_duration_seconds_sum")?;
    let own = seconds("quarry_volume_request_duration_seconds_sum")?;
    let count = seconds("quarry_volume_held_duration_seconds_count")?;
    ensure!(held > 10.0 && count > 10.0, "{held} s of {count}");
    ensure!(own < held / 2.0, "{own} s, beside {held} s of waiting");
    let total = seconds("quarry_volume_held_seconds_total")?;
    ensure!((held - total).abs() < 0.1, "{held} and {total}");
    daemon.stop()
}
