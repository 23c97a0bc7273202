//! `quarry volume compact` and `quarry volume flatten`: data are where they are read best, and no longer where
//! another volume's life decides on them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    Daemon, FaultProxy, MIB, Nbd, SeaweedFs, Site, Stamps, StoreDir, same_bytes, seeded,
    test_number,
};
use rand::RngExt as _;
use rand::seq::SliceRandom as _;
use tempfile::tempdir;

const PAGE: u64 = 4096;
/// What is read at once, and how many of that are asked for ahead.
const READ: u32 = 128 << 10;
const DEPTH: usize = 4;
/// Cold reads of each volume; the medians count.
const ROUNDS: usize = 3;

/// Writes all pages in this order, the number of a page's write being 1.
fn fill(nbd: &mut Nbd, stamps: Stamps, pages: &[u64]) -> Result<()> {
    for some in pages.chunks(32) {
        let sent: Result<Vec<u64>, _> = some
            .iter()
            .map(|page| nbd.send_write(page * PAGE, &stamps.fill(page * 8, 8, 1), false))
            .collect();
        for cookie in sent? {
            nbd.wait(cookie)?;
        }
    }
    Ok(nbd.flush()?)
}

/// Reads the whole volume once from first to last, with nothing of it in the cache; answers how long it took.
fn cold_read(daemon: &Daemon, volume: &str, stamps: Stamps, size: u64) -> Result<Duration> {
    let mut nbd = daemon.connect(volume)?;
    daemon.quarry(&["volume", "evict", volume])?;
    let mut under_way = std::collections::VecDeque::new();
    let mut places = (0..size).step_by(128 << 10);
    let begun = Instant::now();
    let mut found = Vec::new();
    loop {
        while under_way.len() < DEPTH
            && let Some(at) = places.next()
        {
            under_way.push_back((at, nbd.send_read(at, READ)?));
        }
        let Some((at, cookie)) = under_way.pop_front() else {
            break;
        };
        found.push((at, nbd.wait(cookie)?));
    }
    let took = begun.elapsed();
    for (at, bytes) in found {
        ensure!(
            bytes == stamps.fill(at / 512, u64::from(READ) / 512, 1),
            "wrong at {at}"
        );
    }
    nbd.disconnect()?;
    Ok(took)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn volume_filled_at_random_reads_nearly_as_fast_as_one_filled_in_order_once_compacted() -> Result<()>
{
    let size = test_number("QUARRY_TEST_COMPACT_MIB", 64) * MIB;
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let (mut random, seed) = seeded("compact");
    let stamps = Stamps::new(seed);
    let proxy = FaultProxy::start(server.address())?;
    let site = Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?;
    let daemon = site.start()?;
    let mut pages: Vec<u64> = (0..size / PAGE).collect();
    let mut in_order = daemon.fresh_volume("acme/ordered", size, &[])?;
    fill(&mut in_order, stamps, &pages)?;
    pages.shuffle(&mut random);
    let mut at_random = daemon.fresh_volume("acme/random", size, &[])?;
    fill(&mut at_random, stamps, &pages)?;
    for volume in ["acme/ordered", "acme/random"] {
        daemon.sync(volume)?;
        daemon.quarry(&["volume", "detach", volume])?;
    }
    drop((in_order, at_random));
    // Once more, so that nothing of it is in the log: what a checkpoint folds is what is compacted.
    for volume in ["acme/ordered", "acme/random"] {
        daemon.attach(volume, &[])?.disconnect()?;
    }
    proxy.delay(Duration::from_millis(10));
    let before = cold_read(&daemon, "acme/random", stamps, size)?;
    let report = daemon.json(&["volume", "compact", "acme/random"])?;
    ensure!(report["moved_bytes"] == size, "{report}");
    let again = daemon.json(&["volume", "compact", "acme/random"])?;
    ensure!(
        again["moved_bytes"] == 0,
        "in order, and moved again: {again}"
    );
    let (mut ordered, mut compacted) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ordered.push(cold_read(&daemon, "acme/ordered", stamps, size)?);
        compacted.push(cold_read(&daemon, "acme/random", stamps, size)?);
    }
    let (ordered, compacted) = (median(ordered), median(compacted));
    let share = ordered.as_secs_f64() / compacted.as_secs_f64();
    println!(
        "{} MiB read cold: filled in order {ordered:.2?}, at random {before:.2?}, then compacted {compacted:.2?}: {share:.2} of the speed",
        size / MIB
    );
    ensure!(share >= 0.7, "{share:.2} of the speed after compaction");
    daemon.quarry(&["volume", "verify", "acme/random", "--deep"])?;
    daemon.stop()
}

const SIZE: u64 = 16 * MIB;

/// Random runs of sectors, written to a volume and into what it is to read as.
fn scribble(nbd: &mut Nbd, image: &mut [u8], stamps: Stamps, number: u64) -> Result<()> {
    let (mut random, _) = seeded("scribble");
    for run in 0..32 {
        let sectors = random.random_range(1..=256);
        let first = random.random_range(0..SIZE / 512 - sectors);
        let data = stamps.fill(first, sectors, number + run);
        nbd.write(first * 512, &data, false)?;
        let at = usize::try_from(first * 512)?;
        image[at..at + data.len()].copy_from_slice(&data);
    }
    Ok(nbd.flush()?)
}

/// A parent, detached, with a snapshot `golden`, and what that is.
fn parent(root: &Path, stamps: Stamps) -> Result<(Site, Daemon, Vec<u8>)> {
    let site = Site::with_folder(root, "a")?.settings(
        "[writeback]\nchunk_size = \"256KiB\"\n[reclaim]\nhorizon = \"1s\"\nshare = \"10%\"\n",
    );
    let daemon = site.start()?;
    let mut golden = vec![0; usize::try_from(SIZE)?];
    let mut nbd = daemon.fresh_volume("acme/parent", SIZE, &[])?;
    scribble(&mut nbd, &mut golden, stamps, 1000)?;
    daemon.quarry(&["snapshot", "create", "acme/parent@golden"])?;
    scribble(&mut nbd, &mut golden.clone(), stamps, 2000)?;
    nbd.disconnect()?;
    daemon.quarry(&["volume", "detach", "acme/parent"])?;
    Ok((site, daemon, golden))
}

/// Makes an attached clone of it with writes of its own, and answers its image.
fn child(daemon: &Daemon, name: &str, golden: &[u8], stamps: Stamps) -> Result<Vec<u8>> {
    daemon.quarry(&["volume", "clone", "acme/parent@golden", name])?;
    let mut image = golden.to_vec();
    let mut nbd = daemon.attach(name, &[])?;
    scribble(&mut nbd, &mut image, stamps, 3000)?;
    nbd.disconnect()?;
    Ok(image)
}

fn assert_child(daemon: &Daemon, name: &str, image: &[u8]) -> Result<()> {
    daemon.quarry(&["volume", "evict", name])?;
    let mut nbd = daemon.connect(name)?;
    same_bytes(name, &nbd.read_vec(0, SIZE)?, image)?;
    nbd.disconnect()?;
    daemon.quarry(&["volume", "verify", name, "--deep"])
}

#[test]
fn flattened_clone_needs_nothing_of_its_parent() -> Result<()> {
    let (_, seed) = seeded("flatten");
    let (dir, stamps) = (tempdir()?, Stamps::new(seed));
    let (site, daemon, golden) = parent(dir.path(), stamps)?;
    let image = child(&daemon, "acme/child", &golden, stamps)?;
    let refused = |line: &[&str]| site.quarry_json(line)?.refusal();
    ensure!(refused(&["snapshot", "delete", "acme/parent@golden"])?.mentions("acme/child"));
    daemon.quarry(&["snapshot", "create", "acme/child@mine"])?;
    let with_snapshot = refused(&["volume", "flatten", "acme/child"])?;
    ensure!(with_snapshot.mentions("mine"), "{with_snapshot:?}");
    daemon.quarry(&["snapshot", "delete", "acme/child@mine"])?;

    let report = daemon.json(&["volume", "flatten", "acme/child"])?;
    ensure!(report["moved_bytes"].as_u64() > Some(0), "{report}");
    assert_child(&daemon, "acme/child", &image)?;
    let again = refused(&["volume", "flatten", "acme/child"])?;
    ensure!(again.mentions("no parent"), "{again:?}");

    daemon.quarry(&["snapshot", "delete", "acme/parent@golden"])?;
    let parent = daemon.show("acme/parent")?["id"].clone();
    let parent = parent.as_str().context("no id")?;
    daemon.quarry(&["volume", "delete", "acme/parent"])?;
    daemon.quarry(&["trash", "purge", parent])?;
    let store = StoreDir::of(dir.path());
    let objects = store.objects("")?;
    let keys = objects.iter().map(|object| store.key(object));
    let left: Vec<String> = keys.filter(|key| key.contains(parent)).collect();
    ensure!(left.is_empty(), "{left:?}");
    assert_child(&daemon, "acme/child", &image)?;
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    daemon.attach("acme/child", &["--force"])?.disconnect()?;
    assert_child(&daemon, "acme/child", &image)?;
    daemon.stop()
}

#[test]
fn flattening_cut_off_anywhere_ends_when_asked_once_more() -> Result<()> {
    let (mut random, seed) = seeded("flatten cut off");
    let (dir, stamps) = (tempdir()?, Stamps::new(seed));
    let (site, mut daemon, golden) = parent(dir.path(), stamps)?;
    for round in 0..5 {
        let name = format!("acme/child{round}");
        let image = child(&daemon, &name, &golden, stamps)?;
        let flatten = ["volume", "flatten", &name];
        let mut client = site.command(&flatten).spawn()?;
        let after = Duration::from_millis(random.random_range(0..400));
        daemon.kill_after(after).join().expect("does not panic")?;
        daemon.reap()?;
        client.wait()?;
        daemon = site.start()?;
        assert_child(&daemon, &name, &image)?;
        let last = site.quarry_json(&flatten)?;
        let was_done = last.code != Some(0);
        println!("killed after {after:?}, done by then: {was_done}");
        ensure!(!was_done || last.refusal()?.mentions("no parent"));
        assert_child(&daemon, &name, &image)?;
    }
    // A record that was left at the parent counts for nothing.
    daemon.quarry(&["snapshot", "delete", "acme/parent@golden"])?;
    for round in 0..5 {
        daemon.quarry(&["volume", "verify", &format!("acme/child{round}"), "--deep"])?;
    }
    daemon.stop()
}

#[test]
fn more_chunks_than_are_read_side_by_side_are_put_in_order_in_passes() -> Result<()> {
    let (mut random, seed) = seeded("passes");
    let (dir, stamps) = (tempdir()?, Stamps::new(seed));
    // 64 rows side by side, and sixteen times as many chunks; and more stages than a map may have runs.
    let site = Site::with_folder(dir.path(), "a")?
        .settings("[writeback]\nchunk_size = \"64KiB\"\n[cache]\nram = \"16MiB\"\n");
    let daemon = site.start()?;
    let size = 64 * MIB;
    let mut pages: Vec<u64> = (0..size / PAGE).collect();
    pages.shuffle(&mut random);
    let mut nbd = daemon.fresh_volume("acme/random", size, &[])?;
    fill(&mut nbd, stamps, &pages)?;
    daemon.quarry(&["snapshot", "create", "acme/random@scattered"])?;
    let report = daemon.json(&["volume", "compact", "acme/random"])?;
    ensure!(report["moved_bytes"] == 0, "a snapshot needs all: {report}");
    let report = daemon.json(&["volume", "compact", "acme/random", "--held"])?;
    println!("{report}");
    ensure!(report["passes"] == 2, "{report}");
    ensure!(report["moved_bytes"] == 2 * size, "{report}");
    cold_read(&daemon, "acme/random", stamps, size)?;
    let verify = ["volume", "verify", "acme/random", "--deep", "--snapshots"];
    daemon.quarry(&verify)?;
    daemon.stop()
}
