//! Volumes that shrink: what was cut off never comes back, whatever dies in between, and snapshots keep all of it.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use quarry_tests::{Daemon, MIB, Refusal, SECTOR, Site, Stamps, StoreDir, same_bytes, seeded};
use rand::RngExt as _;
use tempfile::tempdir;

const VOLUME: &str = "acme/db";
const LARGE: u64 = 32 * MIB;
const SMALL: u64 = 10 * MIB;

fn refused(site: &Site, arguments: &[&str]) -> Result<Refusal> {
    site.quarry_json(arguments)?.refusal()
}

fn shrink(daemon: &Daemon, size: u64) -> Result<()> {
    daemon.quarry(&["volume", "resize", VOLUME, &format!("{size}B"), "--force"])
}

fn grow(daemon: &Daemon, size: u64) -> Result<()> {
    daemon.quarry(&["volume", "resize", VOLUME, &format!("{size}B")])
}

/// All that an image reads as, and as large as it is; it is attached for that.
fn image_of(daemon: &Daemon, image: &str) -> Result<Vec<u8>> {
    let mut nbd = daemon.attach(image, &[])?;
    let bytes = nbd.read_vec(0, nbd.size())?;
    nbd.disconnect()?;
    daemon.quarry(&["volume", "detach", image])?;
    Ok(bytes)
}

fn verify(daemon: &Daemon) -> Result<()> {
    daemon.quarry(&["volume", "verify", VOLUME, "--deep", "--snapshots"])
}

/// The first `kept` bytes of an image, and zeroes up to `size`.
fn cut(image: &[u8], kept: u64, size: u64) -> Result<Vec<u8>> {
    let mut cut = image[..usize::try_from(kept)?].to_vec();
    cut.resize(usize::try_from(size)?, 0);
    Ok(cut)
}

#[test]
fn volume_shrunk_and_grown_has_zeroes_behind_and_its_snapshot_all_as_before() -> Result<()> {
    let (_, seed) = seeded("shrunk and grown");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?
        .settings("[writeback]\nchunk_size = \"1MiB\"\n[reclaim]\nhorizon = \"1s\"\n");
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, LARGE, &[])?;
    for (number, part) in (0..LARGE / MIB).enumerate() {
        let first = part * MIB / SECTOR;
        let data = stamps.fill(first, MIB / SECTOR, number as u64 + 1);
        nbd.write(part * MIB, &data, false)?;
    }
    daemon.quarry(&["snapshot", "create", "acme/db@all"])?;
    let all = nbd.read_vec(0, LARGE)?;
    nbd.write(SMALL - SECTOR, &[7; 1024], true)?;
    let mut image = all.clone();
    let at = usize::try_from(SMALL - SECTOR)?;
    image[at..at + 1024].fill(7);

    // While it is attached, not even by force; without force, with what it would cost.
    let small = format!("{SMALL}B");
    let attached = refused(&site, &["volume", "resize", VOLUME, &small, "--force"])?;
    ensure!(
        attached.kind == "conflict" && attached.mentions("detach"),
        "{attached:?}"
    );
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    let unasked = refused(&site, &["volume", "resize", VOLUME, &small])?;
    for word in ["32MiB", "10MiB", "cuts off its last 22MiB", "--force"] {
        ensure!(unasked.mentions(word), "{word}: {unasked:?}");
    }
    same_bytes("refused", &image_of(&daemon, VOLUME)?, &image)?;

    shrink(&daemon, SMALL)?;
    let shown = daemon.show(VOLUME)?;
    ensure!(
        shown["size_bytes"] == SMALL && shown["state"] == "detached" && shown["owner"].is_null(),
        "{shown}"
    );
    same_bytes(
        "shrunk",
        &image_of(&daemon, VOLUME)?,
        &cut(&image, SMALL, SMALL)?,
    )?;
    verify(&daemon)?;
    daemon.quarry(&["snapshot", "create", "acme/db@small"])?;
    daemon.quarry(&["volume", "clone", "acme/db@small", "acme/copy"])?;

    // A lost head is made anew as small as it was.
    let store = StoreDir::of(dir.path());
    let id = shown["id"].as_str().unwrap_or_default().to_owned();
    for head in store.objects("head")? {
        if head.to_string_lossy().contains(&id) {
            fs::remove_file(head)?;
        }
    }
    let rescued = daemon.json(&["volume", "rescue", VOLUME, "--apply"])?;
    ensure!(rescued["applied"] == true, "{rescued}");
    ensure!(daemon.show(VOLUME)?["size_bytes"] == SMALL);

    // On another host.
    daemon.stop()?;
    site.lose_host()?;
    let daemon = site.start()?;
    for size in [SMALL + 4096, LARGE] {
        grow(&daemon, size)?;
        same_bytes(
            "grown",
            &image_of(&daemon, VOLUME)?,
            &cut(&image, SMALL, size)?,
        )?;
    }
    verify(&daemon)?;
    same_bytes("the snapshot", &image_of(&daemon, "acme/db@all")?, &all)?;
    let small = cut(&image, SMALL, SMALL)?;
    same_bytes(
        "the later one",
        &image_of(&daemon, "acme/db@small")?,
        &small,
    )?;
    same_bytes("its clone", &image_of(&daemon, "acme/copy")?, &small)?;

    // Back to when it was larger, and to when it was smaller.
    shrink(&daemon, SMALL)?;
    daemon.quarry(&["volume", "rollback", "acme/db@all"])?;
    same_bytes("back", &image_of(&daemon, VOLUME)?, &all)?;
    daemon.quarry(&["volume", "rollback", "acme/db@small"])?;
    let expected = cut(&image, SMALL, LARGE)?;
    same_bytes("back to the later", &image_of(&daemon, VOLUME)?, &expected)?;
    verify(&daemon)?;
    daemon.stop()
}

#[test]
fn daemon_killed_while_a_volume_shrinks_leaves_it_whole_or_zeroes_and_trying_again_ends_it()
-> Result<()> {
    let (mut random, seed) = seeded("killed while shrinking");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let (here, there) = (
        Site::with_folder(dir.path(), "here")?,
        Site::with_folder(dir.path(), "there")?,
    );
    let store = StoreDir::of(dir.path());
    let chunks = || store.objects("chunk").map_or(0, |found| found.len());
    let mut daemon = here.start()?;
    daemon.create(VOLUME, SMALL, &[])?;
    let (mut before, mut after) = (0, 0);
    for round in 1..=12 {
        let small = SECTOR * random.random_range(1..SMALL / SECTOR);
        if daemon.show(VOLUME)?["size_bytes"] != SMALL {
            grow(&daemon, SMALL)?;
        }
        let mut nbd = daemon.attach(VOLUME, &[])?;
        let image = stamps.fill(0, SMALL / SECTOR, round);
        for (part, data) in image.chunks(1 << 20).enumerate() {
            nbd.write(part as u64 * MIB, data, false)?;
        }
        drop(nbd);
        daemon.quarry(&["volume", "detach", VOLUME])?;

        // Every other time when something of it is in the store, and from then on later and later, in the end after all of it;
        // else before it at first, and then at any moment.
        let is_awaited = round % 2 == 1;
        let delay = Duration::from_millis(match round {
            2 => 0,
            _ if is_awaited => 1_u64 << round,
            _ => random.random_range(0..120),
        });
        let had = chunks();
        let (answered, killed) = thread::scope(|scope| {
            let shrinking = scope.spawn(|| shrink(&daemon, small).is_ok());
            while is_awaited && chunks() <= had && !shrinking.is_finished() {
                thread::sleep(Duration::from_millis(1));
            }
            let killed = daemon.kill_after(delay);
            let answered = shrinking.join().expect("the caller does not panic");
            (answered, killed)
        });
        killed.join().expect("the killer does not panic")?;
        daemon.reap()?;
        // Every third time the host is lost too.
        let lost = round % 3 == 0;
        if lost {
            here.lose_host()?;
        }
        daemon = here.start()?;
        let size = daemon.show(VOLUME)?["size_bytes"].as_u64();
        ensure!(size == Some(SMALL) || size == Some(small), "{size:?}");
        ensure!(!answered || size == Some(small), "answered, and not done");
        if size == Some(SMALL) {
            before += 1;
            let options: &[&str] = if lost { &["--force"] } else { &[] };
            let mut nbd = daemon.attach(VOLUME, options)?;
            let found = nbd.read_vec(0, SMALL)?;
            let kept = usize::try_from(small)?;
            same_bytes("what is kept", &found[..kept], &image[..kept])?;
            let tail = &found[kept..];
            ensure!(
                tail == &image[kept..] || tail.iter().all(|byte| *byte == 0),
                "round {round}: the tail is neither whole nor gone"
            );
            drop(nbd);
            daemon.quarry(&["volume", "detach", VOLUME])?;
        } else {
            after += 1;
        }
        if lost && daemon.show(VOLUME)?["owner"].is_object() {
            daemon.attach(VOLUME, &["--force"])?.disconnect()?;
            daemon.quarry(&["volume", "detach", VOLUME])?;
        }
        shrink(&daemon, small)?;
        daemon.stop()?;
        // Whoever makes it larger, here or elsewhere.
        daemon = if round % 2 == 0 { &here } else { &there }.start()?;
        grow(&daemon, SMALL)?;
        same_bytes(
            "grown",
            &image_of(&daemon, VOLUME)?,
            &cut(&image, small, SMALL)?,
        )?;
        verify(&daemon)?;
        daemon.stop()?;
        daemon = here.start()?;
    }
    println!("killed before the new size {before} times, after it {after} times");
    ensure!(
        before > 0 && after > 0,
        "killed before the new size {before} times, after it {after} times"
    );
    daemon.stop()
}
