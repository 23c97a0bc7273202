//! The cache on somebody's word: filled, emptied, and hot again where a volume is attached next.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Nbd, Site, Stamps, same_bytes, seeded};
use rand::RngExt as _;
use tempfile::tempdir;

const VOLUME: &str = "acme/db";
const SIZE: u64 = 128 * MIB;
const READ: u64 = 4096;

/// Longest wait for what is fetched in the background.
const PATIENCE: Duration = Duration::from_secs(60);

fn counter(daemon: &Daemon, name: &str) -> Result<u64> {
    daemon.show(VOLUME)?[name].as_u64().context("no counter")
}

/// Writes all of the volume, and answers its image.
fn written(daemon: &Daemon, nbd: &mut Nbd, seed: u64) -> Result<Vec<u8>> {
    let stamps = Stamps::new(seed);
    let mut image = Vec::new();
    for part in 0..SIZE / MIB {
        let data = stamps.fill(part * 2048, 2048, part + 1);
        nbd.write(part * MIB, &data, false)?;
        image.extend(data);
    }
    daemon.sync(VOLUME)?;
    Ok(image)
}

/// Reads of a working set: 4 KiB each, all over an eighth of the volume.
fn working_set() -> (Vec<u64>, u64) {
    let (mut random, seed) = seeded("working set");
    let places = (0..400).map(|_| {
        let part = random.random_range(0..8_u64) * (SIZE / 8);
        part + random.random_range(0..SIZE / 64 / READ) * READ
    });
    (places.collect(), seed)
}

fn read(nbd: &mut Nbd, places: &[u64], image: &[u8]) -> Result<()> {
    for place in places {
        let at = usize::try_from(*place)?;
        let found = nbd.read_vec(*place, READ)?;
        same_bytes("a read", &found, &image[at..at + found.len()])?;
    }
    Ok(())
}

/// Waits until nothing more is fetched into the cache in the background.
fn await_warm(daemon: &Daemon) -> Result<u64> {
    let begun = Instant::now();
    let mut last = 0;
    loop {
        thread::sleep(Duration::from_millis(700));
        let now = counter(daemon, "cached_bytes")?;
        if now > 0 && now == last {
            return Ok(now);
        }
        last = now;
        ensure!(begun.elapsed() < PATIENCE, "{}", daemon.log());
    }
}

/// Bytes of the working set that were hits, of those read, where the volume is attached next.
fn hits_after_a_move(hot_set: bool) -> Result<(u64, u64)> {
    let dir = tempdir()?;
    let settings = format!("[cache]\nhot_set = {hot_set}\n");
    let site = |name| -> Result<Site> {
        let site = Site::with_folder(dir.path(), name)?.cache_size("256MiB");
        Ok(site.settings(&settings))
    };
    let (places, seed) = working_set();
    let first = site("first")?.start()?;
    let mut nbd = first.fresh_volume(VOLUME, SIZE, &[])?;
    let image = written(&first, &mut nbd, seed)?;
    read(&mut nbd, &places, &image)?;
    drop(nbd);
    first.quarry(&["volume", "detach", VOLUME])?;

    let second = site("second")?.start()?;
    let mut nbd = second.attach(VOLUME, &[])?;
    if hot_set {
        let cached = await_warm(&second)?;
        ensure!(
            cached < SIZE / 2,
            "{cached} bytes were fetched, not only what was hot"
        );
    }
    read(&mut nbd, &places, &image)?;
    let hits = counter(&second, "hit_bytes")?;
    let misses = counter(&second, "miss_bytes")?;
    ensure!(hits + misses == places.len() as u64 * READ);
    drop(nbd);
    first.stop()?;
    second.stop()?;
    Ok((hits, hits + misses))
}

#[test]
fn volume_moved_to_an_empty_cache_has_what_was_hot_in_it() -> Result<()> {
    let (cold, read) = hits_after_a_move(false)?;
    let (warm, _) = hits_after_a_move(true)?;
    println!("of {read} bytes read again, hits without the hot set: {cold}, with it: {warm}");
    ensure!(warm == read, "{warm} of {read} bytes were hits");
    ensure!(
        cold < read * 9 / 10,
        "{cold} of {read} bytes were hits without it"
    );
    Ok(())
}

#[test]
fn volume_warmed_reads_from_the_cache_and_evicted_from_the_store() -> Result<()> {
    let dir = tempdir()?;
    let site = |name| -> Result<Site> {
        let site = Site::with_folder(dir.path(), name)?.cache_size("512MiB");
        Ok(site.settings("[cache]\nhot_set = false\n"))
    };
    let first = site("first")?.start()?;
    let mut nbd = first.fresh_volume(VOLUME, SIZE, &[])?;
    let image = written(&first, &mut nbd, 1)?;
    drop(nbd);
    first.quarry(&["volume", "detach", VOLUME])?;
    first.stop()?;

    let site = site("second")?;
    let daemon = site.start()?;
    let refused = site.quarry_json(&["volume", "warm", VOLUME])?.refusal()?;
    ensure!(refused.mentions("attach"), "{refused:?}");
    let mut nbd = daemon.attach(VOLUME, &[])?;
    let part = daemon.json(&["volume", "warm", VOLUME, "--range", "32MiB-64MiB"])?;
    ensure!(
        part["looked_bytes"] == 32 * MIB && part["limited"] == false,
        "{part}"
    );
    for place in [32 * MIB, 48 * MIB, 64 * MIB - READ] {
        read(&mut nbd, &[place], &image)?;
    }
    ensure!(counter(&daemon, "miss_bytes")? == 0);
    read(&mut nbd, &[0], &image)?;
    ensure!(counter(&daemon, "miss_bytes")? == READ);
    let limited = daemon.json(&["volume", "warm", VOLUME, "--limit", "1MiB"])?;
    ensure!(limited["limited"] == true, "{limited}");
    let all = daemon.json(&["volume", "warm", VOLUME])?;
    ensure!(
        all["looked_bytes"] == SIZE && all["limited"] == false,
        "{all}"
    );
    await_warm(&daemon)?;
    let again = daemon.json(&["volume", "warm", VOLUME])?;
    ensure!(again["fetched_bytes"] == 0, "{again}");
    same_bytes("the image", &nbd.read_vec(0, SIZE)?, &image)?;
    ensure!(counter(&daemon, "miss_bytes")? == READ);

    // A write that the store lacks outlives the eviction of all else.
    nbd.write(0, &[7; 4096], false)?;
    let evicted = daemon.json(&["volume", "evict", VOLUME])?;
    ensure!(evicted["cache_bytes"].as_u64() >= Some(SIZE), "{evicted}");
    ensure!(evicted["ram_bytes"].as_u64() > Some(0), "{evicted}");
    ensure!(counter(&daemon, "cached_bytes")? < 64 << 10);
    let clean = daemon.json(&["status"])?["cache"]["clean_bytes"].clone();
    ensure!(clean.as_u64() <= Some(16 * MIB), "{clean}");
    let hits = counter(&daemon, "hit_bytes")?;
    ensure!(nbd.read_vec(0, READ)? == [7; 4096]);
    ensure!(counter(&daemon, "hit_bytes")? == hits + READ);
    let misses = counter(&daemon, "miss_bytes")?;
    read(&mut nbd, &[100 * MIB], &image)?;
    ensure!(counter(&daemon, "miss_bytes")? == misses + READ);
    daemon.stop()
}
