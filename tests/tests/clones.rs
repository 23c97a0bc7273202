//! Many clones of one image on one host: what they read of it comes from the store once, not once a clone.

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    Daemon, FaultProxy, GIB, KIB, MIB, Nbd, SeaweedFs, Site, Stamps, same_bytes, seeded,
    test_number,
};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use tempfile::tempdir;

const IMAGE: &str = "acme/image";
const SNAPSHOT: &str = "acme/image@golden";
const SIZE: u64 = 2 * GIB;

/// What belongs together in the image, as a file does.
const FILE: u64 = 256 * KIB;

/// Requests that a clone has under way.
const DEPTH: usize = 4;

/// How far apart the clones begin, at most.
const STAGGER_MS: u64 = 50;

/// How far the store is, so that clones meet at what is under way.
const STORE_DELAY: Duration = Duration::from_millis(5);

/// How long a clone waits for what another fetches, nearly (`JOIN_TIME_MAX` in the daemon).
const WAITS_MAX: Duration = Duration::from_millis(1500);

/// An image of files scattered over its first half, and what a boot reads of it, in order.
struct Image {
    /// Contents by place.
    files: BTreeMap<u64, Vec<u8>>,
    /// Place and length.
    reads: Vec<(u64, u64)>,
}

impl Image {
    /// Files of `bytes` in all, each read whole by a boot: half of them from front to back, half of them here and
    /// there, in pieces of 4 to 64 KiB.
    fn new(random: &mut StdRng, seed: u64, bytes: u64) -> Self {
        let count = bytes / FILE;
        let stride = SIZE / 2 / count / FILE * FILE;
        let mut files: Vec<u64> = (0..count).map(|file| file * stride).collect();
        files.shuffle(random);
        let mut reads = Vec::new();
        for (number, file) in files.iter().enumerate() {
            let mut pieces = Vec::new();
            let mut at = 0;
            while at < FILE {
                let len = (4 * KIB * random.random_range(1..=16)).min(FILE - at);
                pieces.push((file + at, len));
                at += len;
            }
            if number % 2 == 1 {
                pieces.shuffle(random);
            }
            reads.extend(pieces);
        }
        let contents = |at: u64| (at, Stamps::new(seed).fill(at / 512, FILE / 512, 1));
        Self {
            files: files.into_iter().map(contents).collect(),
            reads,
        }
    }

    fn bytes(&self) -> u64 {
        self.files.len() as u64 * FILE
    }

    /// Makes the volume, with a half that no boot reads, and its snapshot, and leaves it.
    fn make(&self, daemon: &Daemon) -> Result<()> {
        let mut nbd = daemon.fresh_volume(IMAGE, SIZE, &["--compression", "none"])?;
        for (at, contents) in &self.files {
            nbd.write(*at, contents, false)?;
            nbd.write(SIZE / 2 + at, contents, false)?;
        }
        daemon.quarry(&["snapshot", "create", SNAPSHOT])?;
        drop(nbd);
        daemon.quarry(&["volume", "detach", IMAGE])
    }

    /// What a read within a file answers.
    fn expected(&self, at: u64, len: u64) -> Result<&[u8]> {
        let file = at / FILE * FILE;
        let contents = self.files.get(&file).context("no file is there")?;
        let from = usize::try_from(at - file)?;
        Ok(&contents[from..from + usize::try_from(len)?])
    }

    /// Reads what a boot reads, pausing now and then as `pace` says, and checks it.
    fn boot(&self, nbd: &mut Nbd, mut pace: StdRng) -> Result<()> {
        thread::sleep(Duration::from_millis(pace.random_range(0..STAGGER_MS)));
        for reads in self.reads.chunks(DEPTH) {
            let mut under_way = Vec::new();
            for (at, len) in reads {
                under_way.push(nbd.send_read(*at, u32::try_from(*len)?)?);
            }
            for (cookie, (at, len)) in under_way.into_iter().zip(reads) {
                let found = nbd.wait(cookie)?;
                same_bytes("a clone", &found, self.expected(*at, *len)?)?;
            }
            if pace.random_ratio(1, 50) {
                thread::sleep(Duration::from_millis(pace.random_range(0..5)));
            }
        }
        Ok(())
    }
}

fn metric(daemon: &Daemon, name: &str) -> Result<u64> {
    daemon.count(name, "")
}

/// Makes and attaches clones `NAME-0` and so on.
fn clones(daemon: &Daemon, name: &str, count: u64) -> Result<Vec<Nbd>> {
    let one = |number| {
        let clone = format!("acme/{name}-{number}");
        daemon.quarry(&["volume", "clone", SNAPSHOT, &clone])?;
        daemon.attach(&clone, &[])
    };
    (0..count).map(one).collect()
}

/// Fails unless the store served what a boot reads once, and the daemon says so too.
fn served_once(
    what: &str,
    (proxy, before): (&FaultProxy, (u64, u64)),
    daemon: &Daemon,
    (image, count): (&Image, u64),
) -> Result<()> {
    let (gets, bytes) = proxy.chunk_reads();
    let (gets, bytes) = (gets - before.0, bytes - before.1);
    let read = image.bytes();
    println!(
        "{what}: {count} clones read {read} bytes each; the store served {bytes} in {gets} reads ({}.{:02} times)",
        bytes / read,
        bytes * 100 / read % 100,
    );
    // Each frame once, and its header. Nothing lies behind a file that readahead could bring for nobody.
    ensure!(
        bytes >= read && bytes * 100 <= read * 110,
        "{what}: the store served {bytes} bytes of chunks for {read} bytes that each of {count} clones read"
    );
    let volumes = |name: &str| metric(daemon, &format!("quarry_volume_{name}_total"));
    let (fetched, fetches) = (volumes("fetched_bytes")?, volumes("fetches")?);
    println!(
        "{what}: shared {}, readahead asked for {}, hits {}; resident {} MiB",
        volumes("shared_bytes")?,
        volumes("readahead_bytes")?,
        volumes("hit_bytes")?,
        daemon.resident_bytes()? / MIB,
    );
    ensure!(
        (fetched, fetches) == (bytes, gets),
        "{what}: the daemon counts {fetched} bytes and {fetches} reads, the store {bytes} and {gets}"
    );
    Ok(())
}

#[test]
fn clones_of_an_image_read_it_from_the_store_once_a_host() -> Result<()> {
    let (mut random, seed) = seeded("clones of an image");
    let count = test_number("QUARRY_TEST_CLONES", 20);
    let bytes = test_number("QUARRY_TEST_CLONES_MIB", 40) * MIB;
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let proxy = FaultProxy::start(server.address())?;
    let site = |name: &str| -> Result<Site> {
        let site = Site::with_s3(dir.path(), name, &server, proxy.address(), "quarry")?;
        Ok(site.cache_size("1GiB"))
    };
    let image = Image::new(&mut random, seed, bytes);
    let maker = site("maker")?.start()?;
    image.make(&maker)?;
    maker.stop()?;
    proxy.delay(STORE_DELAY);

    let daemon = site("in-turn")?.start()?;
    let mut booting = clones(&daemon, "in-turn", count)?;
    let before = proxy.chunk_reads();
    for nbd in &mut booting {
        image.boot(nbd, StdRng::seed_from_u64(seed))?;
    }
    served_once("in turn", (&proxy, before), &daemon, (&image, count))?;
    drop(booting);
    daemon.stop()?;

    let daemon = site("at-once")?.start()?;
    let booting = clones(&daemon, "at-once", count)?;
    let before = proxy.chunk_reads();
    let image = Arc::new(image);
    let start = Arc::new(Barrier::new(booting.len()));
    let begun = Instant::now();
    let threads: Vec<_> = (seed..)
        .zip(booting)
        .map(|(seed, mut nbd)| {
            let (image, start) = (Arc::clone(&image), Arc::clone(&start));
            thread::spawn(move || {
                start.wait();
                image.boot(&mut nbd, StdRng::seed_from_u64(seed))
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("a reader does not panic")?;
    }
    println!("at once: all have read after {:?}", begun.elapsed());
    served_once("at once", (&proxy, before), &daemon, (&image, count))?;
    // What was written to the cache device is one copy: clones that fill it each for themselves would push out others.
    let used = metric(&daemon, "quarry_cache_clean_bytes")?;
    ensure!(
        used <= image.bytes() * 5 / 4 + 32 * MIB,
        "{used} bytes of the cache hold {}",
        image.bytes()
    );
    daemon.stop()
}

/// Sends a read of the first `len` bytes.
fn ask(nbd: &mut Nbd, len: u64) -> Result<u64> {
    Ok(nbd.send_read(0, u32::try_from(len)?)?)
}

#[test]
fn clone_that_waits_for_what_another_fetches_has_it_when_that_one_is_gone() -> Result<()> {
    let (mut random, seed) = seeded("clone that waits");
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let proxy = FaultProxy::start(server.address())?;
    let site = |name: &str, address| Site::with_s3(dir.path(), name, &server, address, "quarry");
    let elsewhere = site("elsewhere", server.address())?.start()?;
    let image = Image::new(&mut random, seed, 2 * MIB);
    image.make(&elsewhere)?;
    let daemon = site("here", proxy.address())?.start()?;
    let booting = clones(&daemon, "copy", 3)?;
    let [mut gone, mut fenced, mut stays] = <[Nbd; 3]>::try_from(booting).expect("three were made");
    let expected = image.expected(0, FILE)?;
    // The map first, so that what is waited for below are frames.
    let last = *image.files.keys().last().context("files")?;
    for nbd in [&mut gone, &mut fenced, &mut stays] {
        let found = nbd.read_vec(last, FILE)?;
        same_bytes("another file", &found, image.expected(last, FILE)?)?;
    }
    let before = proxy.chunk_reads();
    // Until one is being detached and the other has lost its volume, however long that takes.
    proxy.hang(Some("/chunk/"));
    let begun = Instant::now();
    ask(&mut gone, FILE)?;
    thread::sleep(Duration::from_millis(200));
    ask(&mut fenced, FILE)?;
    let cookie = ask(&mut stays, FILE)?;
    // The one that fetches loses its user and goes; another is taken over while it waits.
    gone.disconnect()?;
    let detach = ["volume", "detach", "acme/copy-0"];
    let mut detach = daemon.site().command(&detach).spawn()?;
    let take = ["volume", "attach", "acme/copy-1", "--via", "nbd", "--force"];
    elsewhere.quarry(&take)?;
    let held = begun.elapsed();
    proxy.hang(None);
    same_bytes("who waits", &stays.wait(cookie)?, expected)?;
    ensure!(detach.wait()?.success(), "{}", daemon.log());
    same_bytes("again", &stays.read_vec(0, FILE)?, expected)?;
    let (gets, bytes) = proxy.chunk_reads();
    let (gets, bytes) = (gets - before.0, bytes - before.1);
    println!("the store was held for {held:?} and asked for {bytes} bytes in {gets} reads");
    // Who has waited longer for another asks for itself too.
    ensure!(
        bytes < 2 * FILE || held >= WAITS_MAX,
        "the store served {bytes} bytes in {gets} reads for {FILE} that three clones read"
    );
    elsewhere.stop()?;
    daemon.stop()
}
