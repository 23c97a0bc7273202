//! What the cache has of the store is known again after a restart, of whichever kind, and nothing else is.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use quarry_tests::{Daemon, MIB, Nbd, Site, Stamps, StoreDir, same_bytes};
use tempfile::tempdir;

const VOLUME: &str = "acme/db";
const SIZE: u64 = 96 * MIB;
/// Of the cache's segments.
const SEGMENT: u64 = 8 * MIB;
const PATIENCE: Duration = Duration::from_secs(30);

fn site(dir: &Path, name: &str, settings: &str) -> Result<Site> {
    let site = Site::with_folder(dir, name)?.cache_size("512MiB");
    Ok(site.settings(&format!("[cache]\nhot_set = false\n{settings}")))
}

/// Writes all of the volume, and answers its image.
fn write(nbd: &mut Nbd, seed: u64) -> Result<Vec<u8>> {
    let stamps = Stamps::new(seed);
    let mut image = Vec::new();
    for part in 0..SIZE / MIB {
        let data = stamps.fill(part * 2048, 2048, part + 1);
        nbd.write(part * MIB, &data, false)?;
        image.extend(data);
    }
    Ok(image)
}

/// Reads all of it, and answers how many bytes the store was asked for.
fn fetched(daemon: &Daemon, nbd: &mut Nbd, image: &[u8]) -> Result<u64> {
    let count = || daemon.count("quarry_volume_fetched_bytes_total", "");
    let before = count()?;
    for part in 0..SIZE / MIB {
        let found = nbd.read_vec(part * MIB, MIB)?;
        let at = usize::try_from(part * MIB)?;
        same_bytes("a read", &found, &image[at..at + found.len()])?;
    }
    Ok(count()? - before)
}

/// Starts a daemon, and waits until it has looked for what was cached before. Answers how many bytes that were.
fn start(site: &Site) -> Result<(Daemon, u64)> {
    let starts = fs::read_to_string(site.log()).map_or(0, |log| finds(&log));
    await_found(site.start()?, site, starts)
}

fn finds(log: &str) -> usize {
    log.matches("is known again").count()
}

fn await_found(daemon: Daemon, site: &Site, starts: usize) -> Result<(Daemon, u64)> {
    let begun = Instant::now();
    while finds(&fs::read_to_string(site.log())?) == starts {
        ensure!(begun.elapsed() < PATIENCE, "{}", daemon.log());
        thread::sleep(Duration::from_millis(20));
    }
    let found = daemon.count("quarry_cache_found_bytes", "")?;
    Ok((daemon, found))
}

/// Waits until the index log has so much more of a segment each than it had.
fn await_described(site: &Site, segments: u64) -> Result<()> {
    let begun = Instant::now();
    loop {
        let files = fs::read_dir(site.data())?.filter_map(Result::ok);
        let log = files
            .map(|file| file.path())
            .find(|path| path.extension().is_some_and(|end| end == "log"));
        // A record of a whole segment of frames, at least.
        let len = log.map_or(Ok(0), |log| fs::metadata(log).map(|log| log.len()))?;
        if len >= segments * 100 {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "the index log has {len} bytes");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_was_fetched_is_hits_after_a_kill_a_restart_and_a_replacement() -> Result<()> {
    let dir = tempdir()?;
    let first = site(dir.path(), "first", "")?.start()?;
    let mut nbd = first.fresh_volume(VOLUME, SIZE, &["--compression", "none"])?;
    let image = write(&mut nbd, 1)?;
    drop(nbd);
    first.quarry(&["volume", "detach", VOLUME])?;
    first.stop()?;

    let site = site(dir.path(), "second", "")?;
    let (daemon, found) = start(&site)?;
    ensure!(found == 0, "{found} bytes");
    let mut nbd = daemon.attach(VOLUME, &[])?;
    ensure!(fetched(&daemon, &mut nbd, &image)? >= SIZE);
    ensure!(fetched(&daemon, &mut nbd, &image)? == 0);
    // The segment that is being filled when the daemon is killed is not known again.
    await_described(&site, SIZE / SEGMENT - 1)?;
    daemon.kill()?;

    let (daemon, found) = start(&site)?;
    ensure!((SIZE - 2 * SEGMENT..SIZE).contains(&found), "{found} bytes");
    let mut nbd = daemon.connect(VOLUME)?;
    let again = fetched(&daemon, &mut nbd, &image)?;
    let missing = SIZE - found;
    ensure!(
        (missing..missing + MIB).contains(&again),
        "{again} bytes were fetched of {SIZE}, {found} of which were found"
    );
    drop(nbd);
    daemon.stop()?;

    let (daemon, found) = start(&site)?;
    ensure!(found == SIZE, "{found} bytes");
    let mut nbd = daemon.connect(VOLUME)?;
    ensure!(fetched(&daemon, &mut nbd, &image)? == 0);
    drop(nbd);

    let starts = finds(&fs::read_to_string(site.log())?);
    let (daemon, found) = await_found(daemon.replaced_by(&site)?, &site, starts)?;
    ensure!(found == SIZE, "{found} bytes");
    let mut nbd = daemon.connect(VOLUME)?;
    ensure!(fetched(&daemon, &mut nbd, &image)? == 0);
    // What is evicted stays so.
    daemon.quarry(&["volume", "evict", VOLUME])?;
    drop(nbd);
    daemon.kill()?;
    let (daemon, found) = start(&site)?;
    ensure!(found == 0, "{found} bytes");
    let mut nbd = daemon.connect(VOLUME)?;
    ensure!(fetched(&daemon, &mut nbd, &image)? >= SIZE);
    drop(nbd);
    daemon.stop()
}

#[test]
fn what_was_written_is_hits_after_a_restart_unless_the_index_is_not_kept() -> Result<()> {
    let dir = tempdir()?;
    let kept = site(dir.path(), "host", "")?;
    let daemon = kept.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &["--compression", "none"])?;
    let image = write(&mut nbd, 2)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.stop()?;
    let (daemon, found) = start(&kept)?;
    ensure!(found == SIZE, "{found} bytes");
    let mut nbd = daemon.attach(VOLUME, &[])?;
    ensure!(fetched(&daemon, &mut nbd, &image)? == 0);
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.stop()?;

    let forgotten = site(dir.path(), "host", "keep_index = false\n")?;
    let daemon = forgotten.start()?;
    let mut nbd = daemon.attach(VOLUME, &[])?;
    ensure!(fetched(&daemon, &mut nbd, &image)? >= SIZE);
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.stop()?;
    // And what was known before is not believed once it is kept again.
    let (daemon, found) = start(&kept)?;
    ensure!(found == 0, "{found} bytes");
    daemon.stop()
}

/// The names of chunks come again: those of a term that is written anew.
#[test]
fn store_put_back_to_an_earlier_state_is_not_read_from_the_cache_of_a_later_one() -> Result<()> {
    let dir = tempdir()?;
    let site = site(dir.path(), "host", "")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &["--compression", "none"])?;
    write(&mut nbd, 3)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.stop()?;
    let aside = tempdir()?;
    let copy = StoreDir::of(dir.path()).copy_to(aside.path())?;

    let session = |seed| -> Result<Vec<u8>> {
        let (daemon, _) = start(&site)?;
        let mut nbd = daemon.attach(VOLUME, &[])?;
        let image = write(&mut nbd, seed)?;
        daemon.sync(VOLUME)?;
        fetched(&daemon, &mut nbd, &image)?;
        drop(nbd);
        daemon.quarry(&["volume", "detach", VOLUME])?;
        daemon.stop()?;
        Ok(image)
    };
    session(4)?;
    fs::remove_dir_all(dir.path().join("store"))?;
    copy.copy_to(dir.path())?;
    let image = session(5)?;
    let (daemon, _) = start(&site)?;
    let mut nbd = daemon.attach(VOLUME, &[])?;
    fetched(&daemon, &mut nbd, &image)?;
    drop(nbd);
    daemon.stop()
}
