//! What the store is made to carry for a byte of the volume.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, ensure};
use quarry_tests::{
    Daemon, FaultProxy, MIB, SeaweedFs, Site, Stamps, StoreDir, http_get, metric_sum, seeded,
    test_number,
};
use rand::seq::SliceRandom as _;
use tempfile::tempdir;

const VOLUME: &str = "acme/bytes";
const PAGE: u64 = 4096;
/// The writes of one run.
const WRITTEN: u64 = 64 * MIB;

/// A share as a fraction, for messages and bounds.
fn share(bytes: u64, of: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a share needs three digits")]
    let share = bytes as f64 / of as f64;
    share
}

/// Writes pages in the given order, syncs, and answers bytes uploaded a byte written: by the daemon's own
/// count, and by the weight of the objects.
fn upload_share(order: &[u64], volume_size: u64, seed: u64) -> Result<(f64, f64)> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.cache_size("256MiB");
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, volume_size, &["--compression", "none"])?;
    let store = StoreDir::of(dir.path());
    let weight_before = store.volume_bytes()?;
    let count_before = uploaded(&daemon)?;
    let stamps = Stamps::new(seed);
    let mut under_way = Vec::new();
    for page in order {
        let data = stamps.fill(page * 8, 8, 1);
        under_way.push(nbd.send_write(page * PAGE, &data, false)?);
        if under_way.len() == 32 {
            for cookie in under_way.drain(..) {
                nbd.wait(cookie)?;
            }
        }
    }
    for cookie in under_way.drain(..) {
        nbd.wait(cookie)?;
    }
    nbd.flush()?;
    daemon.sync(VOLUME)?;
    let weight = store.volume_bytes()? - weight_before;
    let count = uploaded(&daemon)? - count_before;
    daemon.stop()?;
    Ok((share(count, WRITTEN), share(weight, WRITTEN)))
}

/// Bytes that the daemon says it sent to the store.
fn uploaded(daemon: &Daemon) -> Result<u64> {
    daemon.count("quarry_store_write_bytes_total", "")
}

fn judge(what: &str, (count, weight): (f64, f64), limit: f64) -> Result<()> {
    println!("{what}: {count:.4} bytes uploaded a byte, {weight:.4} kept");
    ensure!(count >= 0.99, "{what}: the daemon's count misses uploads");
    ensure!(count <= limit && weight <= limit, "{what}: over {limit}");
    Ok(())
}

/// Watches how many requests to the store are under way.
struct Watch {
    stop: Arc<AtomicBool>,
    watcher: JoinHandle<f64>,
}

fn most_at_once(socket: PathBuf) -> Watch {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let watcher = thread::spawn(move || {
        let mut most: f64 = 0.0;
        while !stopped.load(Ordering::SeqCst) {
            let now = http_get(&socket, "/metrics").ok();
            let now = now.and_then(|a| metric_sum(&a.body, "quarry_store_in_flight", ""));
            most = most.max(now.unwrap_or_default());
            thread::sleep(Duration::from_millis(5));
        }
        most
    });
    Watch { stop, watcher }
}

impl Watch {
    fn end(self) -> f64 {
        self.stop.store(true, Ordering::SeqCst);
        self.watcher.join().expect("the watcher does not panic")
    }
}

#[test]
fn random_pages_upload_little_more_than_themselves() -> Result<()> {
    let (mut random, seed) = seeded("random pages");
    let mut order: Vec<u64> = (0..16 * WRITTEN / PAGE).collect();
    order.shuffle(&mut random);
    order.truncate(usize::try_from(WRITTEN / PAGE)?);
    let shares = upload_share(&order, 16 * WRITTEN, seed)?;
    judge("random 4 KiB", shares, 1.15)
}

#[test]
fn sequential_pages_upload_hardly_more_than_themselves() -> Result<()> {
    let (_, seed) = seeded("sequential pages");
    let order: Vec<u64> = (0..WRITTEN / PAGE).collect();
    let shares = upload_share(&order, 2 * WRITTEN, seed)?;
    judge("sequential 4 KiB", shares, 1.03)
}

#[test]
fn cold_sequential_read_fetches_each_byte_about_once() -> Result<()> {
    let size = test_number("QUARRY_TEST_COLD_MIB", 256) * MIB;
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let (_, seed) = seeded("cold read");
    let stamps = Stamps::new(seed);
    let proxy = FaultProxy::start(server.address())?;
    // The cache is smaller than the volume, so reclaim is at work too.
    let site =
        Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?.cache_size("128MiB");
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, size, &["--compression", "none"])?;
    for at in (0..size).step_by(1 << 20) {
        nbd.write(at, &stamps.fill(at / 512, MIB / 512, 1), false)?;
    }
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;

    let daemon = site.start()?;
    let mut nbd = daemon.attach(VOLUME, &["--force"])?;
    // A store at some distance, so that what is under way at once shows.
    proxy.delay(Duration::from_millis(10));
    let before = proxy.downstream_bytes();
    let gets = most_at_once(site.socket());
    for at in (0..size).step_by(128 << 10) {
        let found = nbd.read_vec(at, 128 << 10)?;
        ensure!(
            found == stamps.fill(at / 512, 256, 1),
            "wrong bytes at {at}"
        );
    }
    let fetched = share(proxy.downstream_bytes() - before, size);
    let at_once = gets.end();
    println!(
        "cold sequential read: {fetched:.4} bytes fetched a byte, up to {at_once} GETs at once"
    );
    ensure!(at_once >= 4.0, "never more than {at_once} GETs at once");
    ensure!(fetched <= 1.1, "{fetched} bytes fetched for each byte read");
    daemon.stop()
}
