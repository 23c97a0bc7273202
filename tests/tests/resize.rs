//! Volumes that grow, attached and in use or not: the size is everywhere, no byte is lost, and what cannot be
//! is refused with words.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    Daemon, FaultProxy, MIB, Nbd, NbdError, Refusal, SECTOR, SeaweedFs, Site, Stamps, metric_sum,
    same_bytes, seeded,
};
use rand::RngExt as _;
use tempfile::tempdir;

const VOLUME: &str = "acme/grows";
/// NBD's errno of a write behind the end.
const ENOSPC: u32 = 28;

fn resize(daemon: &Daemon, size: u64) -> Result<()> {
    daemon.quarry(&["volume", "resize", VOLUME, &format!("{size}B")])
}

fn refusal(site: &Site, volume: &str, size: &str) -> Result<Refusal> {
    site.quarry_json(&["volume", "resize", volume, size])?
        .refusal()
}

fn size_shown(daemon: &Daemon) -> Result<u64> {
    let shown = daemon.show(VOLUME)?;
    let size = shown["size_bytes"].as_u64().context("no size")?;
    if let Some(attached) = shown["attached"].as_object() {
        ensure!(attached["size_bytes"] == size, "{shown}");
    }
    Ok(size)
}

/// Writes all of a volume's first `size` bytes in order, again and again, until `enough`; answers with the image.
fn rewrite(mut nbd: Nbd, stamps: Stamps, size: u64, enough: &AtomicBool) -> Result<Vec<u8>> {
    let mut image = Vec::new();
    for round in 1.. {
        image.clear();
        for first in (0..size / SECTOR).step_by(128) {
            let data = stamps.fill(first, 128, round);
            nbd.write(first * SECTOR, &data, first % 4096 == 0)?;
            image.extend(data);
        }
        if enough.load(Ordering::SeqCst) {
            break;
        }
    }
    Ok(image)
}

#[test]
fn volume_grown_under_writes_keeps_every_byte_and_reads_zeroes_behind() -> Result<()> {
    const OLD: u64 = 16 * MIB;
    const NEW: u64 = 48 * MIB;
    let (_, seed) = seeded("grown under writes");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.settings("[writeback]\ndelay = \"100ms\"\n");
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, OLD, &["--sector-size", "4096"])?;
    let behind = nbd.write(OLD, &[1; 4096], false).unwrap_err();
    ensure!(behind.errno() == Some(ENOSPC), "{behind}");

    let (enough, writer) = (AtomicBool::new(false), daemon.connect(VOLUME)?);
    let mut image = thread::scope(|scope| -> Result<_> {
        let writer = scope.spawn(|| rewrite(writer, stamps, OLD, &enough));
        // Step by step, each used at once by a client that was connected before.
        let mut grow = || -> Result<()> {
            for size in [OLD + 4096, 24 * MIB, NEW] {
                resize(&daemon, size)?;
                ensure!(size_shown(&daemon)? == size);
                ensure!(daemon.connect(VOLUME)?.size() == size);
                ensure!(nbd.read_vec(size - 4096, 4096)? == [0; 4096]);
                nbd.write(size - 4096, &[7; 4096], true)?;
                let behind = nbd.write(size, &[1; 4096], false).unwrap_err();
                ensure!(behind.errno() == Some(ENOSPC), "{behind}");
            }
            Ok(())
        };
        let grown = grow();
        enough.store(true, Ordering::SeqCst);
        let image = writer.join().expect("the writer does not panic")?;
        grown.map(|()| image)
    })?;
    let metric = metric_sum(&daemon.metrics()?, "quarry_volume_size_bytes", "grows");
    let new = f64::from(u32::try_from(NEW)?);
    ensure!(metric == Some(new), "{metric:?}");
    // A discard over the old end.
    nbd.trim(24 * MIB - 8192, 16384)?;
    image.resize(usize::try_from(NEW)?, 0);
    for end in [OLD + 4096, NEW] {
        let end = usize::try_from(end)?;
        image[end - 4096..end].fill(7);
    }
    same_bytes("attached", &nbd.read_vec(0, NEW)?, &image)?;
    drop(nbd);

    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.stop()?;
    site.lose_host()?;
    let daemon = site.start()?;
    let mut nbd = daemon.attach(VOLUME, &[])?;
    ensure!(nbd.size() == NEW);
    same_bytes("from the store", &nbd.read_vec(0, NEW)?, &image)?;
    daemon.stop()
}

#[test]
fn daemon_killed_right_after_the_answer_has_the_size_and_every_write() -> Result<()> {
    let (mut random, seed) = seeded("killed after a resize");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.cache_size("64MiB");
    let mut daemon = site.start()?;
    let mut size = MIB;
    let mut nbd = daemon.fresh_volume(VOLUME, size, &[])?;
    let mut image = Vec::new();
    for round in 1..=6 {
        // Across the end that was, acknowledged and not flushed.
        let first = image.len() as u64 / SECTOR;
        let data = stamps.fill(first, size / SECTOR - first, round);
        nbd.write(first * SECTOR, &data, false)?;
        image.extend(data);
        size += SECTOR * random.random_range(1..8192);
        resize(&daemon, size)?;
        daemon.kill()?;
        daemon = site.start()?;
        nbd = daemon.connect(VOLUME)?;
        ensure!(nbd.size() == size && size_shown(&daemon)? == size);
        let mut expected = image.clone();
        expected.resize(usize::try_from(size)?, 0);
        same_bytes(&format!("kill {round}"), &nbd.read_vec(0, size)?, &expected)?;
    }
    daemon.sync(VOLUME)?;
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    let found = daemon
        .attach(VOLUME, &["--force"])?
        .read_vec(0, image.len() as u64)?;
    same_bytes("the image in the store", &found, &image)?;
    daemon.stop()
}

#[test]
fn resize_that_cannot_be_is_refused_with_words() -> Result<()> {
    let dir = tempdir()?;
    let (here, there) = (
        Site::with_folder(dir.path(), "here")?,
        Site::with_folder(dir.path(), "there")?,
    );
    let (daemon, other) = (here.start()?, there.start()?);
    daemon.create(VOLUME, 64 * MIB, &["--sector-size", "4096"])?;
    let wrong = |words: &[&str], size: &str| -> Result<()> {
        let refusal = refusal(&here, VOLUME, size)?;
        for word in words {
            ensure!(refusal.mentions(word), "{word}: {refusal:?}");
        }
        ensure!(!refusal.remedy.is_empty(), "{refusal:?}");
        ensure!(size_shown(&daemon)? == 64 * MIB, "{size} had an effect");
        Ok(())
    };
    let all_wrong = || -> Result<()> {
        wrong(&["64MiB", "32MiB", "shrink", "larger"], "32MiB")?;
        wrong(&["67109376 bytes", "multiple"], "67109376B")?;
        wrong(&["1EiB"], "2EiB")?;
        wrong(&["0 bytes"], "0B")?;
        // The same size is no mistake, and changes nothing.
        resize(&daemon, 64 * MIB)?;
        ensure!(size_shown(&daemon)? == 64 * MIB);
        Ok(())
    };
    all_wrong()?;
    drop(daemon.attach(VOLUME, &[])?);
    all_wrong()?;
    let unknown = refusal(&here, "acme/other", "1GiB")?;
    ensure!(unknown.kind == "not_found", "{unknown:?}");

    // Who has it not is told who has.
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy().into_owned();
    let elsewhere = refusal(&there, VOLUME, "1GiB")?;
    ensure!(
        elsewhere.mentions(&host) && elsewhere.mentions("resize it there"),
        "{elsewhere:?}"
    );
    // Who only looks on sees the size that it found.
    let looking = other.attach(VOLUME, &["--read-only", "--force"])?;
    let refused = refusal(&there, VOLUME, "1GiB")?;
    ensure!(refused.mentions("reading only"), "{refused:?}");
    resize(&daemon, 128 * MIB)?;
    ensure!(looking.size() == 64 * MIB && size_shown(&other)? == 64 * MIB);
    ensure!(other.connect(VOLUME)?.size() == 64 * MIB);
    drop(looking);
    other.quarry(&["volume", "detach", VOLUME])?;

    // Who has lost it is told so, and from the resize at the latest.
    drop(other.attach(VOLUME, &["--force"])?);
    let fenced = refusal(&here, VOLUME, "1GiB")?;
    ensure!(fenced.mentions(&host), "{fenced:?}");
    let again = refusal(&here, VOLUME, "1GiB")?;
    ensure!(again.mentions("fenced"), "{again:?}");
    ensure!(size_shown(&other)? == 128 * MIB);
    resize(&other, 256 * MIB)?;
    daemon.stop()?;
    other.stop()
}

#[test]
fn volume_attached_and_resized_at_the_same_moment_has_one_size() -> Result<()> {
    let dir = tempdir()?;
    let (here, there) = (
        Site::with_folder(dir.path(), "here")?,
        Site::with_folder(dir.path(), "there")?,
    );
    let (daemon, other) = (here.start()?, there.start()?);
    let mut size = MIB;
    daemon.create(VOLUME, size, &[])?;
    let (mut resized, mut attached) = (0, 0);
    for round in 0..20 {
        let wanted = size + MIB;
        // One begins after the other, in turn, and later and later: both win in the end.
        let later = Duration::from_millis((1_u64 << (round / 2)) - 1);
        let (resize_waits, attach_waits) = if round % 2 == 0 {
            (later, Duration::ZERO)
        } else {
            (Duration::ZERO, later)
        };
        let (grown, opened) = thread::scope(|scope| {
            let grown = scope.spawn(|| {
                thread::sleep(resize_waits);
                refusal(&here, VOLUME, &format!("{wanted}B"))
            });
            thread::sleep(attach_waits);
            let opened = other.attach(VOLUME, &[]);
            (grown.join().expect("no panic"), opened)
        });
        let was_refused = grown.is_ok();
        if let Ok(refused) = &grown {
            ensure!(refused.kind == "conflict", "{refused:?}");
        } else {
            size = wanted;
            resized += 1;
        }
        ensure!(size_shown(&daemon)? == size);
        match opened {
            Ok(mut nbd) => {
                attached += u32::from(was_refused);
                ensure!(nbd.size() == size, "{} is not {size}", nbd.size());
                nbd.write(size - 4096, &[7; 4096], true)?;
                drop(nbd);
                other.quarry(&["volume", "detach", VOLUME])?;
            }
            Err(error) => ensure!(
                format!("{error:#}").contains("at the same moment"),
                "{error:#}"
            ),
        }
    }
    println!("of 20 rounds the resize won {resized}, the attach {attached}");
    ensure!(
        resized > 0 && attached > 0,
        "the resize won {resized} rounds, the attach {attached}"
    );
    daemon.stop()?;
    other.stop()
}

#[test]
fn resize_with_the_store_away_ends_and_is_done_when_tried_again() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let proxy = FaultProxy::start(server.address())?;
    let site = Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 8 * MIB, &[])?;
    proxy.cut();
    let away = refusal(&site, VOLUME, "16MiB")?;
    ensure!(
        away.kind == "unavailable" && away.mentions("try again"),
        "{away:?}"
    );
    ensure!(matches!(
        nbd.write(8 * MIB, &[1; 512], false),
        Err(NbdError::Errno(ENOSPC))
    ));
    proxy.heal();
    resize(&daemon, 16 * MIB)?;
    nbd.write(8 * MIB, &[1; 512], true)?;
    // The right to write is still ours, and so are checkpoints.
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    let mut nbd = daemon.attach(VOLUME, &[])?;
    ensure!(nbd.size() == 16 * MIB && nbd.read_vec(8 * MIB, 512)? == [1; 512]);
    daemon.stop()
}
