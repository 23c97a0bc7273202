//! Objects that nothing names: those that a crash, a compaction given up or a fenced writer left are deleted, and
//! nothing else is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Nbd, Site, Stamps, StoreDir, metric_sum, same_bytes, seeded};
use rand::RngExt as _;
use rand::rngs::StdRng;
use tempfile::tempdir;

const VOLUME: &str = "acme/db";
const SIZE: u64 = 8 * MIB;
const SETTINGS: &str = "[writeback]\nchunk_size = \"256KiB\"\ndelay = \"100ms\"\n\
    [reclaim]\nhorizon = \"2s\"\ndebt_min = \"256KiB\"\norphan_interval = \"1s\"\n";
const PATIENCE: Duration = Duration::from_secs(60);

fn scribble(nbd: &mut Nbd, random: &mut StdRng, stamps: Stamps, number: u64) -> Result<()> {
    for run in 0..64 {
        let first = random.random_range(0..SIZE / 4096 - 8) * 8;
        let data = stamps.fill(first, 64, number * 100 + run);
        nbd.write(first * 512, &data, false)?;
    }
    Ok(nbd.flush()?)
}

/// `part/EPOCH/NUMBER` of a volume.
fn place(volume: &Path, part: &str, epoch: u32, number: u64) -> PathBuf {
    volume.join(format!("{part}/{epoch:08x}/{number:016x}"))
}

fn put(path: &Path, like: &Path) -> Result<()> {
    fs::create_dir_all(path.parent().context("a key has parts")?)?;
    fs::copy(like, path)?;
    Ok(())
}

fn until_gone(paths: &BTreeSet<PathBuf>) -> Result<()> {
    let begun = Instant::now();
    while let Some(there) = paths.iter().find(|path| path.exists()) {
        ensure!(begun.elapsed() < PATIENCE, "{} stays", there.display());
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn swept(daemon: &Daemon) -> Result<Option<f64>> {
    let metrics = daemon.metrics()?;
    Ok(metric_sum(
        &metrics,
        "quarry_volume_orphans_deleted_total",
        "db",
    ))
}

/// They are counted when they are gone.
fn until_swept(daemon: &Daemon, least: f64) -> Result<()> {
    let begun = Instant::now();
    while swept(daemon)?.unwrap_or_default() < least {
        ensure!(begun.elapsed() < PATIENCE, "{:?}", swept(daemon)?);
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn orphans_of_every_kind_are_swept_and_nothing_that_is_needed() -> Result<()> {
    let (mut random, seed) = seeded("orphans of every kind");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let (here, there) = (
        Site::with_folder(dir.path(), "here")?.settings(SETTINGS),
        Site::with_folder(dir.path(), "there")?.settings(SETTINGS),
    );
    let (daemon, other) = (here.start()?, there.start()?);
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    let id = daemon.show(VOLUME)?["id"]
        .as_str()
        .context("an id")?
        .to_owned();
    scribble(&mut nbd, &mut random, stamps, 1)?;
    daemon.quarry(&["snapshot", "create", "acme/db@one"])?;
    let one = nbd.read_vec(0, SIZE)?;
    daemon.quarry(&["volume", "clone", "acme/db@one", "acme/copy"])?;
    scribble(&mut nbd, &mut random, stamps, 2)?;
    daemon.sync(VOLUME)?;
    // Taken over by another host, so that the first epoch ends with a seal, and back.
    drop(nbd);
    let mut nbd = other.attach(VOLUME, &["--force"])?;
    scribble(&mut nbd, &mut random, stamps, 3)?;
    drop(nbd);
    other.quarry(&["volume", "detach", VOLUME])?;
    daemon.stop()?;
    here.lose_host()?;
    let daemon = here.start()?;
    let mut nbd = daemon.attach(VOLUME, &[])?;
    let mut of_copy = daemon.attach("acme/copy", &[])?;
    scribble(&mut nbd, &mut random, stamps, 4)?;
    scribble(&mut of_copy, &mut random, stamps, 5)?;
    let (image, copy) = (nbd.read_vec(0, SIZE)?, of_copy.read_vec(0, SIZE)?);
    daemon.sync(VOLUME)?;

    let own = |part| -> Result<Vec<PathBuf>> {
        let of_volume = |path: &PathBuf| path.to_string_lossy().contains(&id);
        Ok(store.objects(part)?.into_iter().filter(of_volume).collect())
    };
    let is_seal = |path: &PathBuf| fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"QYSL"));
    let seals: Vec<_> = own("chunk")?.into_iter().filter(is_seal).collect();
    ensure!(!seals.is_empty(), "an epoch ended");
    let chunks: Vec<_> = own("chunk")?.into_iter().filter(|p| !is_seal(p)).collect();
    let (chunk, map) = (chunks[0].clone(), own("map")?[0].clone());
    let head = own("head")?[0].clone();
    let volume = head.parent().context("a volume's folder")?;
    let number = seals[0].file_name().context("a number")?.to_string_lossy();
    let sealed = u64::from_str_radix(&number, 16)?;

    let mut planted = BTreeSet::new();
    for (part, epoch, number) in [
        // A compaction's, given up; uploads under way behind the end of a fenced writer's log; a checkpoint's tables.
        ("chunk", 1, (1 << 63) + 500),
        ("chunk", 1, sealed + 1),
        ("chunk", 1, sealed + 3),
        ("map", 1, 1 << 40),
        ("map", 2, (1 << 40) + 1),
    ] {
        let path = place(volume, part, epoch, number);
        put(&path, if part == "map" { &map } else { &chunk })?;
        planted.insert(path);
    }
    let kept = [
        // A successor's, and what is no key of ours; both beside what must be looked at.
        place(volume, "chunk", 99, 7),
        place(volume, "chunk", 99, (1 << 63) + 1),
        place(volume, "map", 99, 1 << 40),
        volume.join("chunk/00000001/00000000000000FF"),
        volume.join("map/00000001/more"),
    ];
    for path in &kept {
        put(path, &chunk)?;
    }
    until_gone(&planted)?;
    // On a busy machine a host that was taken over has left one of its own.
    until_swept(&daemon, 5.0)?;
    let before = swept(&daemon)?.unwrap_or_default();
    // What a writer of old puts there late.
    let late = place(volume, "chunk", 1, sealed + 2);
    put(&late, &chunk)?;
    until_gone(&BTreeSet::from([late]))?;
    until_swept(&daemon, before + 1.0)?;

    for path in kept.iter().chain(&seals) {
        ensure!(path.exists(), "{} is gone", path.display());
    }
    for path in &kept {
        fs::remove_file(path)?;
    }
    same_bytes("the volume", &nbd.read_vec(0, SIZE)?, &image)?;
    drop((nbd, of_copy));
    for name in [VOLUME, "acme/copy"] {
        daemon.quarry(&["volume", "detach", name])?;
        daemon.quarry(&["volume", "verify", name, "--deep", "--snapshots"])?;
    }
    // A rescue finds all that it needs.
    fs::remove_file(head)?;
    daemon.quarry(&["volume", "rescue", VOLUME, "--apply"])?;
    for (name, bytes) in [
        (VOLUME, &image),
        ("acme/db@one", &one),
        ("acme/copy", &copy),
    ] {
        let mut nbd = daemon.attach(name, &[])?;
        same_bytes(name, &nbd.read_vec(0, SIZE)?, bytes)?;
    }
    other.stop()?;
    daemon.stop()
}

#[test]
fn volume_whose_host_dies_again_and_again_is_swept_of_what_that_left_and_whole() -> Result<()> {
    let (mut random, seed) = seeded("dies again and again");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.settings(SETTINGS);
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    let heads = StoreDir::of(dir.path()).objects("head")?;
    let volume = heads[0].parent().context("a volume's folder")?;
    for round in 0..10 {
        for number in 0..4 {
            scribble(&mut nbd, &mut random, stamps, round * 10 + number)?;
        }
        if round == 4 {
            daemon.quarry(&["snapshot", "create", "acme/db@mid"])?;
        }
        thread::sleep(Duration::from_millis(random.random_range(0..400)));
        let image = nbd.read_vec(0, SIZE)?;
        daemon.kill()?;
        daemon = site.start()?;
        nbd = daemon.connect(VOLUME)?;
        same_bytes(&format!("kill {round}"), &nbd.read_vec(0, SIZE)?, &image)?;
        // Now and then for long enough that both looks are had: one orphan at least is there to be found.
        if round % 3 == 2 {
            let left = place(volume, "chunk", 1, (1_u64 << 63) + 5000 + round);
            fs::create_dir_all(left.parent().context("a key has parts")?)?;
            fs::write(&left, "of a compaction that was given up")?;
            until_gone(&BTreeSet::from([left]))?;
            until_swept(&daemon, 1.0)?;
            println!("kill {round}: {:?} orphans were swept", swept(&daemon)?);
        }
    }
    let image = nbd.read_vec(0, SIZE)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])?;
    daemon.stop()?;
    site.lose_host()?;
    let daemon = site.start()?;
    let found = daemon.attach(VOLUME, &[])?.read_vec(0, SIZE)?;
    same_bytes("from the store", &found, &image)?;
    daemon.stop()
}
