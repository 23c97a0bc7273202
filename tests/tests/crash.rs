//! The two durability contracts: what a flush promises where the cache survives, and the prefix that is left
//! where it does not.

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    Daemon, History, MIB, Nbd, NbdError, Ran, SECTOR, SeaweedFs, Site, Stamps, in_memory,
    same_bytes, seeded, test_number, tool,
};
use rand::RngExt as _;
use rand::rngs::StdRng;
use tempfile::tempdir;

const VOLUME: &str = "acme/crash";
const SIZE: u64 = 32 * MIB;
const SECTORS: u64 = SIZE / SECTOR;
/// Uploads begin soon after a write, so that a crash finds them at every stage.
const EAGER: &str = "[writeback]\ndelay = \"100ms\"\n";

/// Random stamped writes, zeroes and flushes, one at a time, until the daemon dies.
fn write_until_killed(
    nbd: &mut Nbd,
    random: &mut StdRng,
    history: &mut History,
    stamps: Stamps,
) -> Result<()> {
    loop {
        match one_write(nbd, random, history, stamps) {
            Ok(()) => {}
            Err(NbdError::Io(_)) => return Ok(()),
            Err(other) => return Err(other).context("a request failed before the crash"),
        }
    }
}

fn one_write(
    nbd: &mut Nbd,
    random: &mut StdRng,
    history: &mut History,
    stamps: Stamps,
) -> Result<(), NbdError> {
    let shift = random.random_range(0..8);
    let len = random.random_range(1..=128_u32 >> shift);
    let len = u64::from(len);
    // Much overwriting, so that a state mixed of two moments shows.
    let reach = if random.random() { 2048 } else { SECTORS };
    let first = random.random_range(0..reach - len);
    let bytes = u32::try_from(len * SECTOR).expect("64 KiB at most");
    match random.random_range(0..40) {
        0 => {
            history.zero(first, len);
            nbd.trim(first * SECTOR, bytes)
        }
        1 => {
            let number = history.zero(first, len);
            nbd.write_zeroes(first * SECTOR, bytes, true)?;
            history.forced(first, len, number);
            Ok(())
        }
        2 => {
            nbd.flush()?;
            history.flushed();
            Ok(())
        }
        3 => {
            let number = history.write(first, len);
            nbd.write(first * SECTOR, &stamps.fill(first, len, number), true)?;
            history.forced(first, len, number);
            Ok(())
        }
        _ => {
            let number = history.write(first, len);
            nbd.write(first * SECTOR, &stamps.fill(first, len, number), false)
        }
    }
}

/// Writes until a kill at a random moment within `most`.
fn crash(
    daemon: Daemon,
    mut nbd: Nbd,
    random: &mut StdRng,
    history: &mut History,
    stamps: Stamps,
    most: Duration,
) -> Result<()> {
    let delay = most.mul_f64(random.random_range(0.01..1.0));
    let killer = daemon.kill_after(delay);
    write_until_killed(&mut nbd, random, history, stamps)?;
    killer.join().expect("the killer does not panic")?;
    daemon.reap()
}

#[test]
fn daemon_killed_with_cache_kept_loses_no_flushed_write() -> Result<()> {
    let (mut random, seed) = seeded("crash, cache kept");
    let stamps = Stamps::new(seed);
    let mut history = History::default();
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?
        .cache_size("64MiB")
        .settings(EAGER);
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    for round in 1..=test_number("QUARRY_TEST_CRASHES", 10) {
        let most = Duration::from_millis(1500);
        crash(daemon, nbd, &mut random, &mut history, stamps, most)?;
        daemon = site.start()?;
        nbd = daemon.connect(VOLUME)?;
        let image = nbd.read_vec(0, SIZE)?;
        println!("crash {round}: {} writes so far", history.writes());
        history
            .check_flushed(stamps, &image)
            .with_context(|| format!("crash {round}"))?;
        history.settle(stamps, &image)?;
    }
    // What recovery made of it is also what reaches the store.
    let image = nbd.read_vec(0, SIZE)?;
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    let found = daemon.attach(VOLUME, &["--force"])?.read_vec(0, SIZE)?;
    same_bytes("the image in the store", &found, &image)?;
    daemon.stop()
}

#[test]
fn daemon_killed_loses_no_acknowledged_write_flushed_or_not() -> Result<()> {
    let (mut random, seed) = seeded("killed, nothing flushed");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.cache_size("64MiB");
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    let mut expected = vec![0; in_memory(SIZE)];
    for round in 1..=4 {
        // More than the journal has room for, so that record pages are written unasked.
        for number in 0..random.random_range(1..6000) {
            let first = random.random_range(0..SECTORS / 8) * 8;
            let place = in_memory(first * SECTOR)..in_memory((first + 8) * SECTOR);
            if number % 50 == 49 {
                nbd.trim(first * SECTOR, 4096)?;
                expected[place].fill(0);
            } else {
                let data = stamps.fill(first, 8, round * 10_000 + number);
                nbd.write(first * SECTOR, &data, false)?;
                expected[place].copy_from_slice(&data);
            }
        }
        daemon.kill()?;
        daemon = site.start()?;
        nbd = daemon.connect(VOLUME)?;
        same_bytes(&format!("kill {round}"), &nbd.read_vec(0, SIZE)?, &expected)?;
    }
    daemon.stop()
}

/// Crashes that take the cache along: what is left is the exact state after some prefix of the writes.
fn lose_hosts(site: &Site, name: &str, crashes: u64) -> Result<()> {
    let (mut random, seed) = seeded(name);
    let stamps = Stamps::new(seed);
    let mut history = History::default();
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    let mut advanced = 0;
    for round in 1..=crashes {
        let synced = if random.random() {
            for _ in 0..50 {
                one_write(&mut nbd, &mut random, &mut history, stamps)?;
            }
            daemon.sync(VOLUME)?;
            history.writes()
        } else {
            0
        };
        let begun = history.writes();
        let most = Duration::from_millis(2500);
        crash(daemon, nbd, &mut random, &mut history, stamps, most)?;
        site.lose_host()?;
        daemon = site.start()?;
        nbd = daemon.attach(VOLUME, &["--force"])?;
        let image = nbd.read_vec(0, SIZE)?;
        let (shortest, longest) = history
            .prefix(stamps, &image)
            .with_context(|| format!("crash {round}"))?;
        println!(
            "crash {round}: {shortest}..={longest} of {} writes are left, {synced} were synced",
            history.writes()
        );
        ensure!(longest >= synced, "crash {round}: a synced write is lost");
        advanced += u64::from(longest > begun);
        history.truncate(longest);
    }
    ensure!(
        advanced > 0,
        "no write ever reached the store by itself: nothing was tested"
    );
    daemon.stop()
}

#[test]
fn host_lost_over_a_folder_leaves_an_exact_prefix() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?
        .cache_size("64MiB")
        .settings(EAGER);
    let crashes = test_number("QUARRY_TEST_CRASHES", 8);
    lose_hosts(&site, "host lost, folder", crashes)
}

#[test]
fn host_lost_over_s3_leaves_an_exact_prefix() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let site = Site::with_s3(dir.path(), "a", &server, server.address(), "quarry")?
        .cache_size("64MiB")
        .settings(EAGER);
    let crashes = test_number("QUARRY_TEST_CRASHES", 4);
    lose_hosts(&site, "host lost, S3", crashes)
}

#[test]
fn host_lost_after_flush_with_object_durability_loses_nothing_flushed() -> Result<()> {
    let (mut random, seed) = seeded("host lost, object durability");
    let stamps = Stamps::new(seed);
    let mut history = History::default();
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.cache_size("64MiB");
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &["--durability", "object"])?;
    for round in 1..=5 {
        for _ in 0..random.random_range(1..60) {
            one_write(&mut nbd, &mut random, &mut history, stamps)?;
        }
        nbd.flush()?;
        let flushed = history.writes();
        // These are not promised.
        for _ in 0..random.random_range(0..10) {
            one_write(&mut nbd, &mut random, &mut history, stamps)?;
        }
        daemon.kill()?;
        site.lose_host()?;
        daemon = site.start()?;
        nbd = daemon.attach(VOLUME, &["--force"])?;
        let image = nbd.read_vec(0, SIZE)?;
        let (_, longest) = history.prefix(stamps, &image)?;
        ensure!(
            longest >= flushed,
            "round {round}: {longest} writes are left, but {flushed} were flushed to the store"
        );
        history.truncate(longest);
    }
    daemon.stop()
}

#[test]
fn ext4_image_synced_and_host_lost_checks_clean_with_all_files() -> Result<()> {
    let (Some(mkfs), Some(e2fsck), Some(debugfs), Some(nbdcopy)) = (
        tool("mkfs.ext4"),
        tool("e2fsck"),
        tool("debugfs"),
        tool("nbdcopy"),
    ) else {
        return Ok(());
    };
    let (mut random, _) = seeded("ext4 image");
    let dir = tempdir()?;
    let tree = dir.path().join("tree/below");
    fs::create_dir_all(&tree)?;
    let mut contents = Vec::new();
    for number in 0..40 {
        let mut bytes = vec![0_u8; random.random_range(0..300_000)];
        random.fill(&mut bytes[..]);
        fs::File::create(tree.join(format!("file{number}")))?.write_all(&bytes)?;
        contents.push(bytes);
    }
    let image = dir.path().join("image");
    fs::File::create(&image)?.set_len(SIZE)?;
    let mut make = mkfs.command();
    make.args(["-q", "-F", "-d"]).arg(dir.path().join("tree"));
    Ran::run(make.arg(&image))?.ok()?;

    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    drop(daemon.fresh_volume(VOLUME, SIZE, &[])?);
    let uri = daemon.uri(VOLUME)?;
    Ran::run(nbdcopy.command().arg("--flush").arg(&image).arg(&uri))?.ok()?;
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;

    let daemon = site.start()?;
    let mut nbd = daemon.attach(VOLUME, &["--force"])?;
    let found = nbd.read_vec(0, SIZE)?;
    same_bytes("the file system", &found, &fs::read(&image)?)?;
    let back = dir.path().join("back");
    let uri = daemon.uri(VOLUME)?;
    Ran::run(nbdcopy.command().arg(&uri).arg(&back))?.ok()?;
    Ran::run(e2fsck.command().args(["-f", "-n"]).arg(&back))?.ok()?;
    for (number, bytes) in contents.iter().enumerate() {
        let out = dir.path().join("out");
        let dump = format!("dump /below/file{number} {}", out.display());
        Ran::run(debugfs.command().args(["-R", &dump]).arg(&back))?.ok()?;
        same_bytes(&dump, &fs::read(&out)?, bytes)?;
    }
    assert_eq!(found.len(), in_memory(SIZE));
    daemon.stop()
}

/// The places of the record pages in a cache file, by the first write that each names.
fn record_pages(cache: &[u8]) -> Vec<usize> {
    let base = |page: &[u8]| u64::from_le_bytes(page[48..56].try_into().expect("8 bytes"));
    let mut pages: Vec<(u64, usize)> = cache
        .chunks_exact(4096)
        .enumerate()
        .filter(|(_, page)| page.starts_with(b"QYRP"))
        .map(|(n, page)| (base(page), n * 4096))
        .collect();
    pages.sort_unstable();
    pages.into_iter().map(|(_, at)| at).collect()
}

#[test]
fn flushed_writes_that_the_cache_device_lost_are_missed_until_they_are_given_up() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.settings("[writeback]\ndelay = \"1h\"\n");
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    for n in 0..6_u8 {
        nbd.write(u64::from(n) * MIB, &[n + 1; 4096], false)?;
        nbd.flush()?;
    }
    drop(nbd);
    daemon.kill()?;
    // As after a power cut: what is in the host's memory is gone, too.
    fs::remove_dir_all(dir.path().join("a/journal"))?;
    let mut cache = fs::read(site.cache())?;
    let pages = record_pages(&cache);
    ensure!(pages.len() == 6, "record pages at {pages:?}");
    cache[pages[3] + 100] ^= 4;
    fs::write(site.cache(), &cache)?;

    // Neither at the start nor when asked.
    let daemon = site.start()?;
    for _ in 0..2 {
        let refusal = site.quarry_json(&["volume", "attach", VOLUME, "--via", "nbd"])?;
        let refusal = refusal.refusal()?;
        ensure!(
            refusal.mentions("write 4 of this volume is missing"),
            "{refusal:?}"
        );
        ensure!(refusal.mentions("all up to 5 were flushed"), "{refusal:?}");
        ensure!(refusal.mentions("--discard-lost"), "{refusal:?}");
    }
    let mut nbd = daemon.attach(VOLUME, &["--discard-lost"])?;
    for n in 0..6_u8 {
        let left = if n < 3 { n + 1 } else { 0 };
        ensure!(
            nbd.read_vec(u64::from(n) * MIB, 4096)? == [left; 4096],
            "{n}"
        );
    }
    nbd.write(0, &[9; 4096], true)?;
    drop(nbd);
    // It is not missed twice.
    daemon.kill()?;
    fs::remove_dir_all(dir.path().join("a/journal"))?;
    let daemon = site.start()?;
    ensure!(daemon.connect(VOLUME)?.read_vec(0, 4096)? == [9; 4096]);
    daemon.stop()
}
