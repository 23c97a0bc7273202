//! Snapshots of a volume that fio writes to and verifies: what they hold never changes, whatever becomes of the volume
//! and of the host, and fio finds what it wrote.

use std::hash::{DefaultHasher, Hasher as _};
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Ran, Site, Tool, skip, test_number, tool};
use tempfile::tempdir;

const VOLUME: &str = "acme/db";
const NAMES: [&str; 3] = ["one", "two", "three"];
/// What is not needed goes soon, and what is left of chunks is moved early.
const SETTINGS: &str =
    "[writeback]\nchunk_size = \"256KiB\"\n[reclaim]\nhorizon = \"1s\"\ndebt_min = \"1MiB\"\n";
/// Longest wait for the load, or for what is not needed to be gone.
const PATIENCE: Duration = Duration::from_secs(120);

/// fio on the volume: random writes all over it, `loops` times, each time read back and verified.
struct Load {
    fio: Tool,
    uri: String,
    size: u64,
}

impl Load {
    fn command(&self, dir: &Path, seed: u64, loops: u64) -> Command {
        let mut fio = self.fio.command();
        fio.current_dir(dir)
            .args(["--name=load", "--ioengine=nbd", "--rw=randwrite"])
            .arg(format!("--uri={}", self.uri))
            .arg(format!("--size={}", self.size))
            .arg(format!("--randseed={seed}"))
            .arg(format!("--loops={loops}"))
            .args(["--bsrange=4k-64k", "--iodepth=16", "--verify=crc32c"])
            .args(["--verify_fatal=1", "--end_fsync=1", "--minimal"]);
        fio
    }
}

fn metric(daemon: &Daemon, name: &str) -> Result<u64> {
    daemon.count(name, "volume=\"db\"")
}

/// Waits until `holds`.
fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !holds()? {
        ensure!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn snapshot(name: &str) -> String {
    format!("{VOLUME}@{name}")
}

/// A hash of all that a snapshot reads as, attached for that.
fn hash(daemon: &Daemon, name: &str, size: u64) -> Result<u64> {
    let image = snapshot(name);
    let mut nbd = daemon.attach(&image, &[])?;
    ensure!(nbd.flags().read_only(), "{image} can be written to");
    let mut hasher = DefaultHasher::new();
    for part in 0..size / MIB {
        hasher.write(&nbd.read_vec(part * MIB, MIB)?);
    }
    nbd.disconnect()?;
    daemon.quarry(&["volume", "detach", &image])?;
    Ok(hasher.finish())
}

fn same_hashes(when: &str, daemon: &Daemon, taken: &[(&str, u64)], size: u64) -> Result<()> {
    for (name, expected) in taken {
        let found = hash(daemon, name, size)?;
        ensure!(found == *expected, "{name} has changed {when}");
    }
    Ok(())
}

/// Ended with the test that started it.
struct Running(Child);

impl Running {
    fn is_running(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended, unless the test failed.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn snapshots_under_a_verifying_load_never_change_and_the_load_finds_what_it_wrote() -> Result<()> {
    let Some(fio) = tool("fio") else {
        return Ok(());
    };
    let engines = Ran::run(fio.command().arg("--enghelp"))?;
    if !engines.stdout.contains("nbd") {
        skip("this fio has no nbd engine");
        return Ok(());
    }
    let size = test_number("QUARRY_TEST_LOAD_MIB", 32) * MIB;
    let loops = test_number("QUARRY_TEST_LOAD_LOOPS", 24);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.settings(SETTINGS);
    let daemon = site.start()?;
    drop(daemon.fresh_volume(VOLUME, size, &["--compression", "none"])?);
    let uri = daemon.uri(VOLUME)?;
    let mut load = Load { fio, uri, size };

    let mut running = Running(load.command(dir.path(), 1, loops).spawn()?);
    let mut taken = Vec::new();
    let mut written = 0;
    for name in NAMES {
        until("fio writes on", || {
            let now = metric(&daemon, "quarry_volume_write_bytes_total")?;
            ensure!(running.is_running()?, "fio has ended: give it more loops");
            Ok(now >= written + size / 2)
        })?;
        daemon.quarry(&["snapshot", "create", &snapshot(name)])?;
        written = metric(&daemon, "quarry_volume_write_bytes_total")?;
        taken.push((name, hash(&daemon, name, size)?));
    }
    let hashes: std::collections::BTreeSet<u64> = taken.iter().map(|(_, hash)| *hash).collect();
    ensure!(hashes.len() == NAMES.len(), "fio wrote nothing in between");
    let ended = running.0.wait()?;
    ensure!(ended.success(), "fio: {ended}\n{}", daemon.log());
    same_hashes("under the load", &daemon, &taken, size)?;

    // More of it, all over what the snapshots hold, and what only the volume needed is moved and deleted.
    Ran::run(&mut load.command(dir.path(), 2, 2))?.ok()?;
    daemon.sync(VOLUME)?;
    until("data are moved, and the dead are gone", || {
        let moved = metric(&daemon, "quarry_volume_compacted_bytes_total")?;
        let gone = metric(&daemon, "quarry_volume_deleted_objects_total")?;
        Ok(moved > 0 && gone > 0 && metric(&daemon, "quarry_volume_dead_bytes")? == 0)
    })?;
    ensure!(metric(&daemon, "quarry_volume_pinned_bytes")? >= size);
    // From the store, not from what the cache kept.
    daemon.quarry(&["volume", "evict", VOLUME])?;
    same_hashes("by reclaim", &daemon, &taken, size)?;
    daemon.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])?;

    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    drop(daemon.attach(VOLUME, &["--force"])?);
    load.uri = daemon.uri(VOLUME)?;
    same_hashes("with its host", &daemon, &taken, size)?;
    let mut verify = load.command(dir.path(), 2, 1);
    Ran::run(verify.arg("--verify_only"))?.ok()?;

    // One less: what it alone held goes, the others stay.
    let (one, left) = taken.split_first().context("three were taken")?;
    let before = metric(&daemon, "quarry_volume_deleted_objects_total")?;
    daemon.quarry(&["snapshot", "delete", &snapshot(one.0)])?;
    Ran::run(&mut load.command(dir.path(), 3, 1))?.ok()?;
    daemon.sync(VOLUME)?;
    until("what the snapshot held is gone", || {
        let gone = metric(&daemon, "quarry_volume_deleted_objects_total")?;
        Ok(gone > before && metric(&daemon, "quarry_volume_dead_bytes")? == 0)
    })?;
    daemon.quarry(&["volume", "evict", VOLUME])?;
    same_hashes("by another's end", &daemon, left, size)?;
    daemon.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])?;
    daemon.stop()
}
