//! The store away or slow: no I/O error, no loss, and it goes on by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use quarry_tests::{
    Daemon, FaultProxy, MIB, Nbd, NbdError, SeaweedFs, Site, Stamps, seeded, test_number,
};
use tempfile::tempdir;

const VOLUME: &str = "acme/outage";
/// Twice what the cache can hold.
const WRITTEN: u64 = 192 * MIB;
const CACHE: &str = "96MiB";
/// Writes must go on for at least so long without a store.
const GOES_ON: u64 = 16 * MIB;
/// No progress for so long is a stall.
const STALL: Duration = Duration::from_secs(3);

/// Writes everything, counting what was acknowledged.
fn write_all(mut nbd: Nbd, stamps: Stamps, done: &AtomicU64) -> Result<(), NbdError> {
    for at in (0..WRITTEN).step_by(256 << 10) {
        nbd.write(at, &stamps.fill(at / 512, 512, 1), false)?;
        done.fetch_add(256 << 10, Ordering::SeqCst);
    }
    nbd.flush()
}

/// Waits until the writer made no progress for [`STALL`], and answers how far it came.
fn await_stall(done: &AtomicU64, limit: Duration) -> Result<u64> {
    let begun = Instant::now();
    let (mut seen, mut since) = (done.load(Ordering::SeqCst), Instant::now());
    loop {
        thread::sleep(Duration::from_millis(50));
        let now = done.load(Ordering::SeqCst);
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        if since.elapsed() >= STALL {
            return Ok(seen);
        }
        ensure!(
            now < WRITTEN,
            "all of it was acknowledged without a store, more than the cache holds"
        );
        ensure!(begun.elapsed() < limit, "neither stalled nor done: {seen}");
    }
}

fn check(daemon: &Daemon, stamps: Stamps) -> Result<()> {
    let mut nbd = daemon.attach(VOLUME, &["--force"])?;
    for at in (0..WRITTEN).step_by(1 << 20) {
        let found = nbd.read_vec(at, MIB)?;
        ensure!(
            found == stamps.fill(at / 512, 2048, 1),
            "wrong bytes at {at}"
        );
    }
    Ok(())
}

#[test]
fn store_cut_off_under_load_costs_no_error_and_no_byte() -> Result<()> {
    let outage = Duration::from_secs(test_number("QUARRY_TEST_OUTAGE_SECONDS", 10));
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let (_, seed) = seeded("outage");
    let stamps = Stamps::new(seed);
    let proxy = FaultProxy::start(server.address())?;
    let site =
        Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?.cache_size(CACHE);
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 2 * WRITTEN, &[])?;
    // Something that lies in the cache, to be read meanwhile.
    nbd.write(WRITTEN, &[7; 65536], true)?;

    proxy.cut();
    let begun = Instant::now();
    let done = Arc::new(AtomicU64::new(0));
    let (writer_nbd, count) = (daemon.connect(VOLUME)?, Arc::clone(&done));
    let writer = thread::spawn(move || write_all(writer_nbd, stamps, &count));
    let acknowledged = await_stall(&done, Duration::from_secs(120))?;
    println!("stalled after {acknowledged} bytes");
    ensure!(
        acknowledged >= GOES_ON,
        "writes stopped after {acknowledged} bytes, long before the cache was full"
    );
    let shown = daemon.show(VOLUME)?;
    ensure!(shown["stalled"] == true, "the stall is not shown: {shown}");
    ensure!(shown["dirty_bytes"].as_u64() >= Some(acknowledged / 2));
    ensure!(shown["rpo_ms"].as_u64() >= Some(1000), "{shown}");
    ensure!(nbd.read_vec(WRITTEN, 65536)? == [7; 65536], "cached data");
    // Without the store only what is here is known.
    let listed = site.quarry(&["volume", "list", "--output", "json"])?;
    let list: serde_json::Value = serde_json::from_str(&listed.stdout)?;
    ensure!(
        listed.code == Some(1)
            && list["incomplete"].is_string()
            && list["volumes"][0]["name"] == "outage",
        "{listed}"
    );
    let doctor = site.quarry(&["doctor"])?;
    ensure!(
        doctor.code == Some(1)
            && doctor.stdout.contains("they have been failing for")
            && doctor.stdout.contains("its writes wait for the store"),
        "{doctor}"
    );
    thread::sleep(outage.saturating_sub(begun.elapsed()));
    daemon.assert_alive()?;
    ensure!(
        !writer.is_finished(),
        "the writer gave up during the outage"
    );

    proxy.heal();
    writer.join().expect("the writer does not panic")?;
    daemon.sync(VOLUME)?;
    ensure!(daemon.show(VOLUME)?["stalled"] == false);
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    check(&daemon, stamps)?;
    daemon.stop()
}

#[test]
fn connections_broken_again_and_again_cost_nothing_but_time() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let (_, seed) = seeded("flapping store");
    let stamps = Stamps::new(seed);
    let proxy = FaultProxy::start(server.address())?;
    let site =
        Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?.cache_size(CACHE);
    let daemon = site.start()?;
    let nbd = daemon.fresh_volume(VOLUME, 2 * WRITTEN, &[])?;
    proxy.delay(Duration::from_millis(1));
    let done = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&done);
    let writer = thread::spawn(move || write_all(nbd, stamps, &count));
    // A cut may come between a request's effect and its answer: those are the hard ones.
    while !writer.is_finished() {
        proxy.cut();
        thread::sleep(Duration::from_millis(30));
        proxy.heal();
        thread::sleep(Duration::from_millis(400));
    }
    writer.join().expect("the writer does not panic")?;
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    check(&daemon, stamps)?;
    daemon.stop()
}
