//! Limits on how fast a volume may be used: they hold, they change while it is used, and they last.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Nbd, Site};
use tempfile::tempdir;

const VOLUME: &str = "acme/db";

/// Bytes a second, or requests a second of 4 KiB, of somebody who keeps so many reads of `len` bytes under way.
fn reads_a_second(nbd: &mut Nbd, len: u32, depth: usize, time: Duration) -> Result<f64> {
    let mut under_way = std::collections::VecDeque::new();
    let (mut done, mut at) = (0_u32, 0);
    // What came at once after a rest is not counted.
    let from = Instant::now() + Duration::from_millis(400);
    let end = from + time;
    while Instant::now() < end {
        while under_way.len() < depth {
            under_way.push_back(nbd.send_read(at % (32 * MIB), len)?);
            at += u64::from(len);
        }
        let oldest = under_way.pop_front().context("some are under way")?;
        nbd.wait(oldest)?;
        done += u32::from(Instant::now() >= from);
    }
    for cookie in under_way {
        nbd.wait(cookie)?;
    }
    Ok(f64::from(done) / time.as_secs_f64())
}

fn is_near(what: &str, found: f64, wanted: f64) -> Result<()> {
    let percent = (found / wanted - 1.0) * 100.0;
    println!("{what}: {found:.1} of {wanted} a second, {percent:+.2} %");
    ensure!(
        percent.abs() < 5.0,
        "{what}: {found:.1} of {wanted} a second"
    );
    Ok(())
}

fn limit(daemon: &Daemon, flags: &[&str]) -> Result<()> {
    daemon.quarry(&[&["volume", "limit", VOLUME], flags].concat())
}

#[test]
fn limits_hold_and_change_while_a_volume_is_used() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &["--iops", "100"])?;
    let time = Duration::from_secs(3);
    is_near("100 IOPS", reads_a_second(&mut nbd, 4096, 32, time)?, 100.0)?;
    for iops in [1000_u16, 10_000] {
        limit(&daemon, &["--iops", &iops.to_string()])?;
        let found = reads_a_second(&mut nbd, 4096, 128, time)?;
        is_near(&format!("{iops} IOPS"), found, iops.into())?;
    }
    limit(&daemon, &["--bandwidth", "16MiB/s"])?;
    let found = reads_a_second(&mut nbd, 64 << 10, 16, time)? / 16.0;
    is_near("16 MiB/s", found, 16.0)?;
    let shown = daemon.show(VOLUME)?;
    ensure!(shown["rates"]["bandwidth_bytes"] == 16 * MIB, "{shown}");
    ensure!(shown["rates"]["iops"].is_null(), "{shown}");
    ensure!(
        shown["limits"]["held_total"].as_u64() > Some(100),
        "{shown}"
    );
    ensure!(shown["limits"]["held_ms"].as_u64() > Some(1000), "{shown}");
    ensure!(daemon.count("quarry_volume_held_requests_total", "db")? > 100);
    let before = shown["limits"]["held_total"].as_u64();
    limit(&daemon, &["--none"])?;
    let free = reads_a_second(&mut nbd, 64 << 10, 16, Duration::from_secs(1))?;
    ensure!(free > 16.0 * 16.0 * 1.5, "{free} a second without a limit");
    ensure!(daemon.show(VOLUME)?["limits"]["held_total"].as_u64() <= before.map(|n| n + 32));
    daemon.stop()
}

#[test]
fn limits_stay_over_restart_and_trash_and_hold_up_no_detach() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    drop(daemon.fresh_volume(VOLUME, 64 * MIB, &[])?);
    limit(&daemon, &["--iops", "1", "--iops-burst", "2"])?;
    daemon.stop()?;
    let daemon = site.start()?;
    let mut nbd = daemon.connect(VOLUME)?;
    ensure!(daemon.show(VOLUME)?["rates"]["iops_burst"] == 2);
    let begun = Instant::now();
    let reads: Vec<u64> = (0..20)
        .map(|n| nbd.send_read(n * 4096, 4096))
        .collect::<Result<_, _>>()?;
    for cookie in &reads[..4] {
        nbd.wait(*cookie)?;
    }
    ensure!(
        begun.elapsed() > Duration::from_millis(1500),
        "{:?}",
        begun.elapsed()
    );
    ensure!(daemon.show(VOLUME)?["limits"]["held"].as_u64() >= Some(14));
    // Sixteen seconds' worth.
    let begun = Instant::now();
    daemon.quarry(&["volume", "detach", VOLUME])?;
    ensure!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    for cookie in &reads[4..] {
        nbd.wait(*cookie)?;
    }
    daemon.quarry(&["volume", "delete", VOLUME])?;
    daemon.quarry(&["volume", "restore", VOLUME])?;
    let shown = daemon.show(VOLUME)?;
    ensure!(shown["rates"]["iops"] == 1, "{shown}");
    let refused = site
        .quarry_json(&["volume", "limit", "acme/none", "--iops", "5"])?
        .refusal()?;
    ensure!(refused.mentions("acme/none"), "{refused:?}");
    daemon.stop()
}
