//! `quarry volume verify`: nothing is found in a sound volume, whatever happens to it meanwhile, and of a damaged
//! one exactly what cannot be read.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Nbd, Ran, Site, Stamps, StoreDir, seeded};
use rand::RngExt as _;
use serde_json::Value;
use tempfile::{TempDir, tempdir};

const VOLUME: &str = "acme/verified";
const SIZE: u64 = 16 * MIB;
/// Regions that are each synced on their own, and so lie in chunks of their own.
const REGIONS: u64 = 6;
const REGION: u64 = 256 << 10;
const BLOCK: u64 = 4096;
/// Chunks made under a check: more than a log has before it is folded into the map.
const CHUNKS: u64 = 140;
/// The errno of an I/O error, in NBD and in Linux.
const EIO: u32 = 5;

fn verify(site: &Site, deep: bool) -> Result<Ran> {
    let flag: &[&str] = if deep { &["--deep"] } else { &[] };
    site.quarry_json(&[&["volume", "verify", VOLUME], flag].concat())
}

fn assert_clean(site: &Site, deep: bool) -> Result<Value> {
    let report = verify(site, deep)?.json()?;
    ensure!(report["findings"] == serde_json::json!([]), "{report}");
    ensure!(report["unreadable_bytes"] == 0, "{report}");
    Ok(report)
}

/// What a check of a damaged volume said.
struct Report {
    objects: BTreeSet<String>,
    /// Numbers of the blocks that cannot be read.
    blocks: BTreeSet<u64>,
}

fn damaged(site: &Site, deep: bool) -> Result<Report> {
    let ran = verify(site, deep)?;
    ensure!(ran.code == Some(1), "{ran}");
    ensure!(ran.stderr.contains("is damaged in the store"), "{ran}");
    let report: Value = serde_json::from_str(&ran.stdout).with_context(|| ran.to_string())?;
    ensure!(report["error"]["kind"] == "damaged", "{report}");
    let list = |key: &str| report[key].as_array().cloned().context("no list");
    let objects = list("findings")?;
    let objects = objects
        .iter()
        .filter_map(|f| f["object"].as_str())
        .map(str::to_owned)
        .collect();
    let mut blocks = BTreeSet::new();
    for range in list("unreadable")? {
        let at = |key: &str| range[key].as_u64().context("no number");
        let (start, end) = (at("start")?, at("end")?);
        ensure!(start % BLOCK == 0 && end % BLOCK == 0, "{report}");
        blocks.extend(start / BLOCK..end / BLOCK);
    }
    Ok(Report { objects, blocks })
}

/// A detached volume of some regions in a folder store, one of them written over in part, and its host gone.
struct Sound {
    dir: TempDir,
    store: StoreDir,
    chunks: Vec<PathBuf>,
}

fn sound(seed: u64) -> Result<Sound> {
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let stamps = Stamps::new(seed);
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    for region in 0..REGIONS {
        write(&mut nbd, stamps, region * REGION, REGION, region + 1)?;
        daemon.sync(VOLUME)?;
    }
    // Half of the first frame of region 1, and a hole in the second: newer data hide what lies below.
    write(&mut nbd, stamps, REGION, 32 << 10, 99)?;
    nbd.trim(REGION + (64 << 10), 16 << 10)?;
    daemon.sync(VOLUME)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    assert_clean(&site, false)?;
    let report = assert_clean(&site, true)?;
    ensure!(report["checked"]["chunks"] == REGIONS + 1, "{report}");
    daemon.stop()?;
    let chunks = store.objects("chunk")?;
    Ok(Sound { dir, store, chunks })
}

fn write(nbd: &mut Nbd, stamps: Stamps, at: u64, len: u64, number: u64) -> Result<()> {
    let data = stamps.fill(at / 512, len / 512, number);
    Ok(nbd.write(at, &data, false)?)
}

/// The numbers of the blocks that reads fail for, each read alone, from the last on so that none is read ahead.
fn failing(daemon: &Daemon) -> Result<BTreeSet<u64>> {
    let mut nbd = daemon.connect(VOLUME)?;
    let mut failing = BTreeSet::new();
    for block in (0..SIZE / BLOCK).rev() {
        match nbd.read_vec(block * BLOCK, BLOCK) {
            Ok(_) => {}
            Err(error) if error.errno() == Some(EIO) => {
                failing.insert(block);
            }
            Err(error) => return Err(error).context("neither data nor an I/O error"),
        }
    }
    Ok(failing)
}

fn flip(path: &Path, at: u64) -> Result<()> {
    let mut bytes = fs::read(path)?;
    bytes[usize::try_from(at)?] ^= 4;
    Ok(fs::write(path, bytes)?)
}

impl Sound {
    /// Damages a copy of the store, and compares what `verify` says with what reads say.
    fn after(
        &self,
        what: &str,
        object: &Path,
        damage: impl Fn(&Path) -> Result<()>,
    ) -> Result<Report> {
        let dir = tempdir()?;
        let copy = self.store.copy_to(dir.path())?;
        let key = self.store.key(object);
        let twin = copy.objects("t")?.into_iter().find(|p| copy.key(p) == key);
        damage(&twin.context("a copy of each object")?)?;
        let site = Site::with_folder(dir.path(), "b")?;
        let daemon = site.start()?;
        let report = damaged(&site, true)?;
        println!(
            "{what}: {} blocks of {:?}",
            report.blocks.len(),
            report.objects
        );
        ensure!(
            report.objects == BTreeSet::from([key]),
            "{what}: {:?}",
            report.objects
        );
        let attached = site.quarry_json(&["volume", "attach", VOLUME, "--via", "nbd"])?;
        let failing = if attached.code == Some(0) {
            failing(&daemon)?
        } else {
            (0..SIZE / BLOCK).collect()
        };
        ensure!(
            report.blocks == failing,
            "{what}: verify names {:?}, reads fail for {failing:?}",
            report.blocks
        );
        daemon.stop()?;
        Ok(report)
    }
}

#[test]
fn volume_in_use_verifies_clean_under_writes_and_when_detached() -> Result<()> {
    let (mut random, seed) = seeded("verified under writes");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?
        .settings("[writeback]\ndelay = \"10ms\"\nchunk_size = \"256KiB\"");
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    let enough = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let writes = scope.spawn(|| -> Result<Nbd> {
            for number in 1.. {
                let at = random.random_range(0..SIZE / BLOCK - 64) * BLOCK;
                let len = random.random_range(1..64) * BLOCK;
                write(&mut nbd, stamps, at, len, number)?;
                if enough.load(Ordering::SeqCst) {
                    break;
                }
            }
            Ok(nbd)
        });
        // Until a checkpoint has moved the head under a check.
        let look = || -> Result<()> {
            let (mut checks, mut next, mut epochs) = (0, 0, BTreeSet::new());
            while next < CHUNKS && !writes.is_finished() {
                let report = assert_clean(&site, checks % 4 == 0)?;
                next = report["next_chunk"].as_u64().context("no number")?;
                epochs.insert(report["epoch"].as_u64());
                checks += 1;
            }
            ensure!(epochs.len() == 1, "{epochs:?}");
            println!("{checks} checks while {next} chunks were made");
            Ok(())
        };
        let seen = look();
        enough.store(true, Ordering::SeqCst);
        drop(writes.join().expect("the writer does not panic")?);
        seen
    })?;
    daemon.sync(VOLUME)?;
    assert_clean(&site, true)?;
    daemon.quarry(&["volume", "detach", VOLUME])?;
    let report = assert_clean(&site, true)?;
    ensure!(report["checked"]["frames"].as_u64() > Some(100), "{report}");
    daemon.stop()
}

#[test]
fn ranges_named_are_those_whose_reads_fail() -> Result<()> {
    let (mut random, seed) = seeded("ranges named");
    let sound = sound(seed)?;
    let payload = |object: &Path| -> Result<u64> {
        let len = fs::metadata(object)?.len();
        Ok(len / 8)
    };
    // The chunk of region 1, parts of which are hidden, and another.
    for index in [1, random.random_range(2..6)] {
        let chunk = &sound.chunks[index];
        let first = payload(chunk)?;
        let len = fs::metadata(chunk)?.len();
        let at = random.random_range(first..len);
        let report = sound.after("flipped", chunk, |path| flip(path, at))?;
        ensure!(
            !report.blocks.is_empty() && report.blocks.len() <= 16,
            "one frame"
        );
        let cut = random.random_range(first..len);
        sound.after("cut off", chunk, |path| {
            let file = fs::OpenOptions::new().write(true).open(path)?;
            Ok(file.set_len(cut)?)
        })?;
        sound.after("deleted", chunk, |path| Ok(fs::remove_file(path)?))?;
    }
    let maps = sound.store.objects("map")?;
    let newest = maps.last().context("a detach leaves a map")?;
    sound.after("a leaf", newest, |path| flip(path, 30))?;
    sound.after("the manifest", newest, |path| {
        flip(path, fs::metadata(path)?.len() - 1)
    })?;
    sound.after("the map", newest, |path| Ok(fs::remove_file(path)?))?;
    ensure!(sound.dir.path().exists());
    Ok(())
}

#[test]
fn check_without_deep_finds_what_is_missing_and_not_what_is_flipped() -> Result<()> {
    let (_, seed) = seeded("without deep");
    let sound = sound(seed)?;
    let site = Site::with_folder(sound.dir.path(), "c")?;
    let daemon = site.start()?;
    let chunk = &sound.chunks[3];
    let len = fs::metadata(chunk)?.len();
    flip(chunk, len - 1)?;
    assert_clean(&site, false)?;
    damaged(&site, true)?;
    fs::OpenOptions::new()
        .write(true)
        .open(chunk)?
        .set_len(len - 1)?;
    let report = damaged(&site, false)?;
    let last_frame = (3 * REGION + REGION - (64 << 10)) / BLOCK..4 * REGION / BLOCK;
    ensure!(report.blocks == last_frame.collect(), "{:?}", report.blocks);
    fs::remove_file(chunk)?;
    let report = damaged(&site, false)?;
    ensure!(report.blocks.len() as u64 == REGION / BLOCK);
    // A person gets a table.
    let ran = site.quarry(&["volume", "verify", VOLUME])?;
    ensure!(ran.code == Some(1), "{ran}");
    for words in [
        &sound.store.key(chunk)[..],
        "786432..1048576",
        "it is missing",
    ] {
        ensure!(ran.stdout.contains(words), "no {words}: {ran}");
    }
    let heads = sound.store.objects("head")?;
    fs::remove_file(&heads[0])?;
    let report = damaged(&site, true)?;
    ensure!(report.objects == BTreeSet::from([sound.store.key(&heads[0])]));
    let ran = site.quarry(&["volume", "verify", VOLUME])?;
    for words in [
        "nothing can be read until its head is made anew".to_owned(),
        format!("quarry volume rescue {VOLUME}"),
    ] {
        ensure!(ran.stderr.contains(&words), "no {words}: {ran}");
    }
    ensure!(ran.stdout.contains("all, until its head"), "{ran}");
    let refused = site.quarry_json(&["volume", "verify", "acme/none"])?;
    ensure!(refused.refusal()?.kind == "not_found");
    daemon.stop()
}
