//! What readers who jump in equal steps wait for, of a store that is far away.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{FaultProxy, MIB, SeaweedFs, Site, Stamps, metric_sum, same_bytes, seeded};
use rand::seq::SliceRandom as _;
use tempfile::tempdir;

const VOLUME: &str = "acme/far";
const READS: u64 = 96;
const LEN: u64 = 64 << 10;
const AWAY: Duration = Duration::from_millis(10);

#[test]
fn reader_in_equal_steps_hits_what_was_read_ahead_and_costs_no_more() -> Result<()> {
    let (mut random, seed) = seeded("equal steps");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let proxy = FaultProxy::start(server.address())?;
    let site = Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?
        .settings("[cache]\nhot_set = false\n");
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, READS * MIB, &["--compression", "none"])?;
    for part in 0..READS {
        let data = stamps.fill(part * MIB / 512, MIB / 512, part + 1);
        nbd.write(part * MIB, &data, false)?;
    }
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;

    let forwards: Vec<u64> = (0..READS).collect();
    let backwards: Vec<u64> = (0..READS).rev().collect();
    let mut shuffled = forwards.clone();
    shuffled.shuffle(&mut random);
    let mut took = Vec::new();
    for (how, order) in [
        ("forwards", forwards),
        ("backwards", backwards),
        ("in any order", shuffled),
    ] {
        daemon.stop()?;
        site.lose_host()?;
        daemon = site.start()?;
        let mut nbd = daemon.attach(VOLUME, &[])?;
        proxy.delay(AWAY);
        let begun = Instant::now();
        let mut found = Vec::new();
        for part in &order {
            found.push(nbd.read_vec(part * MIB, LEN)?);
        }
        let time = begun.elapsed();
        proxy.delay(Duration::ZERO);
        for (part, found) in order.iter().zip(found) {
            let data = stamps.fill(part * MIB / 512, LEN / 512, part + 1);
            same_bytes(&format!("{how}, part {part}"), &found, &data)?;
        }
        let metrics = daemon.metrics()?;
        let fetched = metric_sum(&metrics, "quarry_volume_fetched_bytes_total", "far");
        let fetched = fetched.context("it is counted")?;
        let hits = daemon.show(VOLUME)?["hit_bytes"].as_u64();
        let hits = hits.context("it is counted")? / LEN;
        println!(
            "{how}: {READS} reads of 64 KiB, one at a time: {time:?}, {hits} hits, {fetched} bytes fetched"
        );
        took.push((hits, fetched));
        drop(nbd);
        daemon.quarry(&["volume", "detach", VOLUME])?;
    }
    let (hits_jumping, fetched_jumping) = took.pop().context("three")?;
    for (hits, fetched) in took {
        ensure!(hits > READS / 2 && hits > 4 * hits_jumping, "{hits} hits");
        // It ends where the volume does, so that nothing is fetched that is not read; but a frame on its way to the cache
        // may be asked for once more, of memory, which counts too.
        ensure!(
            fetched <= fetched_jumping * 1.1,
            "{fetched}, {fetched_jumping}"
        );
    }
    daemon.stop()
}
