//! Snapshots, clones and rollback, as a user has them: what a snapshot holds never changes, what is done to a
//! clone is the clone's alone, and nothing that another needs can be deleted.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    Daemon, History, MIB, Nbd, Refusal, Site, Stamps, StoreDir, same_bytes, seeded,
};
use rand::RngExt as _;
use rand::rngs::StdRng;
use tempfile::tempdir;

const VOLUME: &str = "acme/db";
const SIZE: u64 = 16 * MIB;
const SECTORS: u64 = SIZE / 512;

fn refused(site: &Site, arguments: &[&str]) -> Result<Refusal> {
    site.quarry_json(arguments)?.refusal()
}

fn detach(daemon: &Daemon, image: &str) -> Result<()> {
    daemon.quarry(&["volume", "detach", image])
}

/// What an image reads as from its first byte to its last; attached for that, if it is not.
fn image_of(daemon: &Daemon, image: &str) -> Result<Vec<u8>> {
    let attached = !daemon.show(image)?["attached"].is_null();
    let mut nbd = match attached {
        true => daemon.connect(image)?,
        false => daemon.attach(image, &[])?,
    };
    let bytes = nbd.read_vec(0, SIZE)?;
    nbd.disconnect()?;
    if !attached {
        detach(daemon, image)?;
    }
    Ok(bytes)
}

/// Writes some stamped runs to a volume and into `image`, what it is to read as.
fn scribble(
    nbd: &mut Nbd,
    image: &mut [u8],
    (random, stamps): (&mut StdRng, Stamps),
    number: u64,
) -> Result<()> {
    for run in 0..8 {
        let sectors = random.random_range(1..=256);
        let first = random.random_range(0..SECTORS - sectors);
        let data = stamps.fill(first, sectors, number * 100 + run);
        nbd.write(first * 512, &data, false)?;
        let at = usize::try_from(first * 512)?;
        image[at..at + data.len()].copy_from_slice(&data);
    }
    Ok(nbd.flush()?)
}

/// Somebody who writes all the time.
struct Writer {
    history: Arc<Mutex<History>>,
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Writer {
    fn start(mut nbd: Nbd, mut random: StdRng, stamps: Stamps) -> Self {
        let (history, acknowledged, stop) = (
            Arc::<Mutex<History>>::default(),
            Arc::<AtomicU64>::default(),
            Arc::<AtomicBool>::default(),
        );
        let (noted, done, ended) = (history.clone(), acknowledged.clone(), stop.clone());
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                let sectors = random.random_range(1..=128);
                let first = random.random_range(0..SECTORS - sectors);
                let number = noted.lock().unwrap().write(first, sectors);
                let data = stamps.fill(first, sectors, number);
                nbd.write(first * 512, &data, false)?;
                done.store(number, Ordering::SeqCst);
                if number % 64 == 0 {
                    nbd.flush()?;
                }
            }
            Ok(())
        });
        Self {
            history,
            acknowledged,
            stop,
            thread,
        }
    }

    fn wait_for(&self, writes: u64) {
        let until = self.acknowledged.load(Ordering::SeqCst) + writes;
        while self.acknowledged.load(Ordering::SeqCst) < until && !self.thread.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn issued(&self) -> u64 {
        self.history.lock().unwrap().writes()
    }

    fn stop(self) -> Result<History> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("the writer does not panic")?;
        let history = self.history.lock().unwrap().clone();
        Ok(history)
    }
}

#[test]
fn snapshots_under_load_are_the_state_at_the_call_and_never_change() -> Result<()> {
    let (random, seed) = seeded("snapshots under load");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let writer = Writer::start(daemon.fresh_volume(VOLUME, SIZE, &[])?, random, stamps);
    let mut taken = Vec::new();
    for name in ["one", "two", "three"] {
        writer.wait_for(300);
        let snapshot = format!("{VOLUME}@{name}");
        let before = writer.acknowledged.load(Ordering::SeqCst);
        let begun = Instant::now();
        daemon.quarry(&["snapshot", "create", &snapshot])?;
        println!("{snapshot} took {:?}", begun.elapsed());
        let after = writer.issued();
        // Read at once, while the writer goes on, and again in the end.
        taken.push((image_of(&daemon, &snapshot)?, snapshot, before, after));
    }
    writer.wait_for(300);
    daemon.sync(VOLUME)?;
    let history = writer.stop()?;
    for (image, snapshot, before, after) in &taken {
        let (shortest, longest) = history.prefix(stamps, image)?;
        println!("{snapshot}: writes up to {shortest}..={longest}, called at {before}..={after}");
        ensure!(longest >= *before, "an acknowledged write is not in it");
        ensure!(shortest <= *after, "it has a write from after the call");
    }
    // All at once, beside the volume that is attached; and after the daemon was killed, too.
    daemon.kill()?;
    let daemon = site.start()?;
    let attached: Vec<Nbd> = taken
        .iter()
        .map(|(_, snapshot, ..)| daemon.attach(snapshot, &[]))
        .collect::<Result<_>>()?;
    for (mut nbd, (image, snapshot, ..)) in attached.into_iter().zip(&taken) {
        same_bytes(snapshot, &nbd.read_vec(0, SIZE)?, image)?;
        ensure!(
            nbd.write(0, &[1; 512], false).is_err(),
            "{snapshot} took a write"
        );
    }
    let now = image_of(&daemon, VOLUME)?;
    ensure!(history.prefix(stamps, &now)?.1 == history.writes());
    daemon.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])?;
    // What was attached is attached again, each as what it was.
    daemon.stop()?;
    let daemon = site.start()?;
    for (image, snapshot, ..) in &taken {
        let shown = daemon.show(snapshot)?;
        ensure!(shown["attached"]["read_only"] == true, "{shown}");
        same_bytes(snapshot, &image_of(&daemon, snapshot)?, image)?;
    }
    let metrics = daemon.metrics()?;
    ensure!(metrics.contains("volume=\"db@one\""), "{metrics}");
    same_bytes(VOLUME, &image_of(&daemon, VOLUME)?, &now)?;
    let listed = daemon.json(&["snapshot", "list", VOLUME])?;
    ensure!(
        listed["snapshots"].as_array().map(Vec::len) == Some(3),
        "{listed}"
    );
    let held = refused(&site, &["snapshot", "delete", "acme/db@two"])?;
    ensure!(held.mentions("detach"), "{held:?}");
    detach(&daemon, "acme/db@two")?;
    daemon.quarry(&["snapshot", "delete", "acme/db@two"])?;
    let gone = refused(&site, &["volume", "attach", "acme/db@two", "--via", "nbd"])?;
    ensure!(gone.kind == "not_found", "{gone:?}");
    let (image, snapshot, ..) = &taken[2];
    same_bytes(snapshot, &image_of(&daemon, snapshot)?, image)?;
    daemon.stop()
}

#[test]
fn clones_differ_from_their_parents_by_their_own_writes_alone() -> Result<()> {
    let (mut random, seed) = seeded("clones");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut image = vec![0; usize::try_from(SIZE)?];
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &["--sector-size", "4096"])?;
    for round in 0..4 {
        // Pages of 4 KiB: what the volume takes.
        let first = random.random_range(0..SECTORS / 8 - 32) * 8;
        let data = stamps.fill(first, 256, round);
        nbd.write(first * 512, &data, true)?;
        let at = usize::try_from(first * 512)?;
        image[at..at + data.len()].copy_from_slice(&data);
    }
    daemon.quarry(&["snapshot", "create", "acme/db@golden"])?;
    // The parent goes on, and is attached, while clones are made of clones.
    let mut images = vec![(VOLUME.to_owned(), nbd, image.clone())];
    let mut parent = "acme/db@golden".to_owned();
    for generation in 1..=3_u64 {
        let clone = format!("acme/gen{generation}");
        daemon.quarry(&["volume", "clone", &parent, &clone])?;
        let shown = daemon.show(&clone)?;
        let (volume, snapshot) = parent.split_once('@').context("a snapshot")?;
        ensure!(shown["parent"]["volume"] == volume, "{shown}");
        ensure!(shown["parent"]["snapshot"] == snapshot, "{shown}");
        ensure!(
            shown["sector_size"] == 4096 && shown["size_bytes"] == SIZE,
            "{shown}"
        );
        let mut nbd = daemon.attach(&clone, &[])?;
        same_bytes(&clone, &nbd.read_vec(0, SIZE)?, &image)?;
        for round in 0..4 {
            let first = random.random_range(0..SECTORS / 8 - 32) * 8;
            let data = stamps.fill(first, 256, generation * 10 + round);
            nbd.write(first * 512, &data, true)?;
            let at = usize::try_from(first * 512)?;
            image[at..at + data.len()].copy_from_slice(&data);
        }
        parent = format!("{clone}@next");
        daemon.quarry(&["snapshot", "create", &parent])?;
        images.push((clone, nbd, image.clone()));
    }
    for (volume, nbd, image) in &mut images {
        same_bytes(volume, &nbd.read_vec(0, SIZE)?, image)?;
    }
    // What a clone writes over and throws away is its own affair.
    let (_, nbd, image) = &mut images[1];
    nbd.trim(0, u32::try_from(SIZE / 2)?)?;
    image[..usize::try_from(SIZE / 2)?].fill(0);
    nbd.flush()?;
    for (volume, _, _) in &images {
        detach(&daemon, volume)?;
    }
    // As another host finds them, which has nothing in its cache.
    daemon.stop()?;
    let other = Site::with_folder(dir.path(), "b")?;
    let daemon = other.start()?;
    for (volume, _, image) in &images {
        same_bytes(volume, &image_of(&daemon, volume)?, image)?;
        daemon.quarry(&["volume", "verify", volume, "--deep", "--snapshots"])?;
    }
    // Nothing that somebody needs can be deleted, and who needs it is named.
    let kept = refused(&other, &["snapshot", "delete", "acme/db@golden"])?;
    ensure!(
        kept.kind == "conflict" && kept.mentions("volume flatten acme/gen1"),
        "{kept:?}"
    );
    let kept = refused(&other, &["volume", "delete", "acme/gen1"])?;
    ensure!(
        kept.kind == "conflict" && kept.mentions("acme/gen2"),
        "{kept:?}"
    );
    same_bytes("acme/gen3", &image_of(&daemon, "acme/gen3")?, &images[3].2)?;
    same_bytes("acme/gen1", &image_of(&daemon, "acme/gen1")?, &images[1].2)?;
    daemon.quarry(&["volume", "clone", "acme/db@golden", "acme/late"])?;
    let shown = daemon.json(&["snapshot", "show", "acme/db@golden"])?;
    let clones = shown["clones"].to_string();
    ensure!(
        clones.contains("acme/gen1") && clones.contains("acme/late"),
        "{shown}"
    );
    // From the youngest on, everything can, once it is out of the trash too.
    for volume in ["acme/late", "acme/gen3", "acme/gen2"] {
        daemon.quarry(&["volume", "delete", volume])?;
        daemon.quarry(&["trash", "purge", "--all"])?;
    }
    daemon.quarry(&["volume", "delete", "acme/gen1"])?;
    let kept = refused(&other, &["snapshot", "delete", "acme/db@golden"])?;
    ensure!(
        kept.kind == "conflict" && kept.mentions("acme/gen1 (in the trash)"),
        "{kept:?}"
    );
    daemon.quarry(&["trash", "purge", "--all"])?;
    daemon.quarry(&["snapshot", "delete", "acme/db@golden"])?;
    same_bytes(VOLUME, &image_of(&daemon, VOLUME)?, &images[0].2)?;
    daemon.quarry(&["volume", "verify", VOLUME, "--deep"])?;
    daemon.quarry(&["volume", "delete", VOLUME])?;
    daemon.quarry(&["trash", "purge", "--all"])?;
    ensure!(
        StoreDir::of(dir.path()).objects("v")?.is_empty(),
        "something is left"
    );
    daemon.stop()
}

#[test]
fn hundred_clones_of_one_image_cost_four_small_objects_each() -> Result<()> {
    let (mut random, seed) = seeded("hundred clones");
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut image = vec![0; usize::try_from(SIZE)?];
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    scribble(&mut nbd, &mut image, (&mut random, Stamps::new(seed)), 1)?;
    daemon.quarry(&["snapshot", "create", "acme/db@golden"])?;
    let (objects, bytes) = (store.objects("t")?.len(), store.volume_bytes()?);
    let begun = Instant::now();
    for number in 0..100 {
        let clone = format!("acme/clone{number}");
        daemon.quarry(&["volume", "clone", "acme/db@golden", &clone])?;
    }
    let took = begun.elapsed();
    let made = store.objects("t")?.len() - objects;
    let more = (store.volume_bytes()? - bytes) / 100;
    println!("100 clones: {took:?} with a process each, {made} objects, {more} bytes each");
    ensure!(made == 400, "{made} objects");
    ensure!(more < 4096, "{more} bytes a clone");
    ensure!(took < Duration::from_secs(60), "{took:?}");
    for number in [0, 57, 99] {
        let clone = format!("acme/clone{number}");
        same_bytes(&clone, &image_of(&daemon, &clone)?, &image)?;
    }
    let shown = daemon.json(&["snapshot", "show", "acme/db@golden"])?;
    ensure!(
        shown["clones"].as_array().map(Vec::len) == Some(100),
        "{shown}"
    );
    let again = refused(&site, &["volume", "clone", "acme/db@golden", "acme/clone5"])?;
    ensure!(again.kind == "exists", "{again:?}");
    daemon.stop()
}

#[test]
fn rollback_brings_back_what_the_snapshot_is_and_keeps_the_younger_ones() -> Result<()> {
    let (mut random, seed) = seeded("rollback");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut image = vec![0; usize::try_from(SIZE)?];
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    daemon.quarry(&["snapshot", "create", "acme/db@empty"])?;
    let empty = image.clone();
    scribble(&mut nbd, &mut image, (&mut random, stamps), 1)?;
    daemon.quarry(&["snapshot", "create", "acme/db@old"])?;
    let old = image.clone();
    scribble(&mut nbd, &mut image, (&mut random, stamps), 2)?;
    let attached = refused(&site, &["volume", "rollback", "acme/db@old"])?;
    ensure!(
        attached.kind == "conflict" && attached.mentions("detach"),
        "{attached:?}"
    );
    drop(nbd);
    detach(&daemon, VOLUME)?;
    // Of a detached volume, too.
    daemon.quarry(&["snapshot", "create", "acme/db@young"])?;
    let young = image.clone();
    ensure!(daemon.show(VOLUME)?["state"] == "detached");
    let missing = refused(&site, &["volume", "rollback", "acme/db@none"])?;
    ensure!(missing.kind == "not_found", "{missing:?}");
    let mut number = 3;
    let mut write_on = |image: &mut Vec<u8>| -> Result<()> {
        let mut nbd = daemon.attach(VOLUME, &[])?;
        same_bytes("before", &nbd.read_vec(0, SIZE)?, image)?;
        scribble(&mut nbd, image, (&mut random, stamps), number)?;
        number += 1;
        drop(nbd);
        detach(&daemon, VOLUME)
    };
    for (snapshot, then) in [
        ("acme/db@old", &old),
        ("acme/db@young", &young),
        ("acme/db@empty", &empty),
        ("acme/db@old", &old),
    ] {
        daemon.quarry(&["volume", "rollback", snapshot])?;
        let mut image = then.clone();
        write_on(&mut image)?;
        write_on(&mut image)?;
        for (other, image) in [("empty", &empty), ("old", &old), ("young", &young)] {
            let other = format!("{VOLUME}@{other}");
            same_bytes(&other, &image_of(&daemon, &other)?, image)?;
        }
        daemon.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])?;
    }
    daemon.quarry(&["snapshot", "create", "acme/db@last"])?;
    daemon.stop()?;
    let daemon = site.start()?;
    let last = image_of(&daemon, "acme/db@last")?;
    same_bytes(VOLUME, &image_of(&daemon, VOLUME)?, &last)?;
    daemon.stop()
}

#[test]
fn snapshots_of_a_volume_whose_host_is_lost_are_there_on_the_next() -> Result<()> {
    let (mut random, seed) = seeded("lost host");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let lost = Site::with_folder(dir.path(), "a")?;
    let next = Site::with_folder(dir.path(), "b")?;
    let (first, second) = (lost.start()?, next.start()?);
    let mut image = vec![0; usize::try_from(SIZE)?];
    let mut nbd = first.fresh_volume(VOLUME, SIZE, &[])?;
    scribble(&mut nbd, &mut image, (&mut random, stamps), 1)?;
    first.quarry(&["snapshot", "create", "acme/db@kept"])?;
    let kept = image.clone();
    scribble(&mut nbd, &mut image, (&mut random, stamps), 2)?;
    // Another host's: who it is is said, and nothing is done; but to read and to clone takes nothing away.
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy();
    for arguments in [
        ["snapshot", "create", "acme/db@more"],
        ["snapshot", "delete", "acme/db@kept"],
        ["volume", "rollback", "acme/db@kept"],
    ] {
        let theirs = refused(&next, &arguments)?;
        ensure!(
            theirs.kind == "conflict" && theirs.mentions(&host),
            "{theirs:?}"
        );
    }
    same_bytes("kept", &image_of(&second, "acme/db@kept")?, &kept)?;
    second.quarry(&["volume", "clone", "acme/db@kept", "acme/copy"])?;
    same_bytes("copy", &image_of(&second, "acme/copy")?, &kept)?;
    drop(nbd);
    first.kill()?;
    lost.lose_host()?;
    let mut nbd = second.attach(VOLUME, &["--force"])?;
    same_bytes("kept", &image_of(&second, "acme/db@kept")?, &kept)?;
    second.quarry(&["snapshot", "create", "acme/db@more"])?;
    let more = nbd.read_vec(0, SIZE)?;
    nbd.write(0, &[7; 4096], true)?;
    same_bytes("more", &image_of(&second, "acme/db@more")?, &more)?;
    second.quarry(&["volume", "delete", "acme/copy"])?;
    second.quarry(&["trash", "purge", "--all"])?;
    second.quarry(&["snapshot", "delete", "acme/db@kept"])?;
    second.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])?;
    second.stop()
}

#[test]
fn snapshot_of_a_volume_that_its_host_left_dirty_holds_what_was_unsent() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    nbd.write(0, &[1; 4096], false)?;
    daemon.kill()?;
    // It is not to be attached again: as if it had been forgotten.
    fs::remove_file(site.root().join("data/attached.json"))?;
    let daemon = site.start()?;
    daemon.quarry(&["snapshot", "create", "acme/db@left"])?;
    let image = image_of(&daemon, "acme/db@left")?;
    ensure!(image[..4096] == [1; 4096] && image[4096] == 0);
    // Gone back over unsent writes, they are given up only by the operator's word.
    let mut nbd = daemon.attach(VOLUME, &[])?;
    nbd.write(0, &[2; 4096], true)?;
    daemon.kill()?;
    fs::remove_file(site.root().join("data/attached.json"))?;
    let daemon = site.start()?;
    daemon.quarry(&["volume", "rollback", "acme/db@left"])?;
    let stale = refused(&site, &["volume", "attach", VOLUME, "--via", "nbd"])?;
    ensure!(stale.mentions("--discard-unsent"), "{stale:?}");
    let mut nbd = daemon.attach(VOLUME, &["--discard-unsent"])?;
    ensure!(nbd.read_vec(0, 8192)? == [[1; 4096], [0; 4096]].concat());
    nbd.write(4096, &[3; 4096], true)?;
    drop(nbd);
    detach(&daemon, VOLUME)?;
    daemon.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])?;
    daemon.stop()
}

#[test]
fn volume_rescued_after_a_rollback_is_what_was_written_since() -> Result<()> {
    let (mut random, seed) = seeded("rescued rollback");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut image = vec![0; usize::try_from(SIZE)?];
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    scribble(&mut nbd, &mut image, (&mut random, stamps), 1)?;
    daemon.quarry(&["snapshot", "create", "acme/db@then"])?;
    let mut then = image.clone();
    for number in 2..6 {
        scribble(&mut nbd, &mut image, (&mut random, stamps), number)?;
        daemon.sync(VOLUME)?;
    }
    drop(nbd);
    detach(&daemon, VOLUME)?;
    daemon.quarry(&["volume", "rollback", "acme/db@then"])?;
    let flags = "--size 16MiB --sector-size 512 --durability local --compression lz4 --apply";
    let flags: Vec<&str> = flags.split(' ').collect();
    // At once, when nothing was written since, and after writes.
    for number in [10, 11] {
        fs::remove_file(&store.objects("head")?[0])?;
        let report = daemon.json(&[&["volume", "rescue", VOLUME], &flags[..]].concat())?;
        ensure!(report["applied"] == true, "{report}");
        let mut nbd = daemon.attach(VOLUME, &[])?;
        same_bytes("rescued", &nbd.read_vec(0, SIZE)?, &then)?;
        scribble(&mut nbd, &mut then, (&mut random, stamps), number)?;
        drop(nbd);
        detach(&daemon, VOLUME)?;
    }
    same_bytes("in the end", &image_of(&daemon, VOLUME)?, &then)?;
    daemon.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])?;
    daemon.stop()
}

#[test]
fn rescued_volume_has_its_snapshots_and_a_rescued_clone_its_parent() -> Result<()> {
    let (mut random, seed) = seeded("rescued snapshots");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut image = vec![0; usize::try_from(SIZE)?];
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    scribble(&mut nbd, &mut image, (&mut random, stamps), 1)?;
    daemon.quarry(&["snapshot", "create", "acme/db@one"])?;
    let one = image.clone();
    scribble(&mut nbd, &mut image, (&mut random, stamps), 2)?;
    daemon.quarry(&["snapshot", "create", "acme/db@two"])?;
    daemon.quarry(&["volume", "clone", "acme/db@one", "acme/copy"])?;
    let mut copy = one.clone();
    let mut of_copy = daemon.attach("acme/copy", &[])?;
    scribble(&mut of_copy, &mut copy, (&mut random, stamps), 3)?;
    drop((nbd, of_copy));
    detach(&daemon, VOLUME)?;
    detach(&daemon, "acme/copy")?;
    for head in store.objects("head")? {
        fs::remove_file(head)?;
    }
    let flags = "--size 16MiB --sector-size 512 --durability local --compression lz4 --apply";
    let flags: Vec<&str> = flags.split(' ').collect();
    for volume in [VOLUME, "acme/copy"] {
        let report = daemon.json(&[&["volume", "rescue", volume], &flags[..]].concat())?;
        println!("{report}");
        ensure!(report["applied"] == true, "{report}");
    }
    for (name, image) in [
        (VOLUME, &image),
        ("acme/db@one", &one),
        ("acme/copy", &copy),
    ] {
        same_bytes(name, &image_of(&daemon, name)?, image)?;
    }
    ensure!(daemon.show("acme/copy")?["parent"]["snapshot"] == "one");
    let kept = refused(&site, &["snapshot", "delete", "acme/db@one"])?;
    ensure!(kept.mentions("acme/copy"), "{kept:?}");
    for volume in [VOLUME, "acme/copy"] {
        daemon.quarry(&["volume", "verify", volume, "--deep", "--snapshots"])?;
    }
    daemon.stop()
}

/// The stored bytes that each snapshot of the volume keeps alone.
fn unique(daemon: &Daemon, name: &str) -> Result<u64> {
    let image = format!("{VOLUME}@{name}");
    let shown = daemon.json(&["snapshot", "show", &image])?;
    let listed = daemon.json(&["snapshot", "list", VOLUME])?;
    let mut all = listed["snapshots"].as_array().context("a list")?.iter();
    let of_list = all.find(|s| s["name"] == name).context("it is listed")?;
    ensure!(of_list["unique_bytes"] == shown["unique_bytes"], "{listed}");
    shown["unique_bytes"].as_u64().context("it is known")
}

#[test]
fn unique_bytes_of_a_snapshot_are_what_the_store_gets_back_when_it_is_deleted() -> Result<()> {
    let (_, seed) = seeded("unique bytes");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let settings = "[writeback]\nchunk_size = \"1MiB\"\n[reclaim]\nhorizon = \"1s\"\n";
    let site = Site::with_folder(dir.path(), "a")?.settings(settings);
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &["--compression", "none"])?;
    let write_all = |nbd: &mut Nbd, number| -> Result<()> {
        for part in 0..SIZE / MIB {
            let data = stamps.fill(part * MIB / 512, MIB / 512, number);
            nbd.write(part * MIB, &data, false)?;
        }
        Ok(())
    };
    let becomes = |name: &str, enough: fn(u64) -> bool| -> Result<u64> {
        let begun = Instant::now();
        loop {
            let bytes = unique(&daemon, name)?;
            if enough(bytes) {
                return Ok(bytes);
            }
            ensure!(begun.elapsed() < Duration::from_secs(60), "{name}: {bytes}");
            thread::sleep(Duration::from_millis(50));
        }
    };
    let snapshot = |name: &str| daemon.quarry(&["snapshot", "create", &format!("{VOLUME}@{name}")]);
    write_all(&mut nbd, 1)?;
    snapshot("one")?;
    ensure!(unique(&daemon, "one")? == 0, "the volume needs all of it");
    write_all(&mut nbd, 2)?;
    // Two of one map: neither keeps anything alone.
    snapshot("two")?;
    snapshot("twin")?;
    becomes("one", |bytes| bytes >= SIZE)?;
    write_all(&mut nbd, 3)?;
    snapshot("three")?;
    let pinned =
        |daemon: &Daemon| Ok::<_, anyhow::Error>(daemon.show(VOLUME)?["pinned_bytes"].as_u64());
    let begun = Instant::now();
    while pinned(&daemon)? < Some(2 * SIZE) {
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "{:?}",
            pinned(&daemon)?
        );
        thread::sleep(Duration::from_millis(50));
    }
    ensure!(unique(&daemon, "two")? == 0 && unique(&daemon, "twin")? == 0);
    daemon.quarry(&["snapshot", "delete", "acme/db@twin"])?;
    let of_two = becomes("two", |bytes| bytes >= SIZE)?;
    ensure!(of_two < SIZE + MIB, "{of_two}");

    // As another host sees it, and with nobody attached: by the newest map in the store.
    nbd.write(0, &[1; 4096], true)?;
    snapshot("last")?;
    let (one, two) = (unique(&daemon, "one")?, unique(&daemon, "two")?);
    let there = Site::with_folder(dir.path(), "b")?;
    let other = there.start()?;
    ensure!((unique(&other, "one")?, unique(&other, "two")?) == (one, two));
    drop(nbd);
    detach(&daemon, VOLUME)?;
    ensure!((unique(&daemon, "one")?, unique(&daemon, "two")?) == (one, two));

    // And so much is gone when it is deleted.
    let mut nbd = daemon.attach(VOLUME, &[])?;
    let before = store.volume_bytes()?;
    daemon.quarry(&["snapshot", "delete", "acme/db@two"])?;
    // A checkpoint has the next look at what is dead made soon.
    nbd.write(0, &[2; 4096], true)?;
    snapshot("soon")?;
    let begun = Instant::now();
    while store.volume_bytes()? + two > before + MIB / 4 {
        ensure!(
            begun.elapsed() < Duration::from_secs(120),
            "{before} less {two}"
        );
        thread::sleep(Duration::from_millis(200));
    }
    daemon.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])?;
    other.stop()?;
    daemon.stop()
}
