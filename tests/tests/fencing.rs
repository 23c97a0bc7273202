//! Two daemons and one volume: never two writers, and nobody loses anything without being told.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use quarry_tests::{Daemon, MIB, Nbd, SeaweedFs, Site};
use tempfile::tempdir;

const VOLUME: &str = "acme/fence";
/// By then a writer that lost its volume must know.
const NOTICES: Duration = Duration::from_secs(60);

/// Writes and flushes until an error comes; answers how many pages were acknowledged.
fn write_until_refused(nbd: &mut Nbd) -> Result<u64> {
    let begun = Instant::now();
    for page in 0.. {
        let at = 8 * MIB + page % 1024 * 4096;
        if nbd.write(at, &[0xaa; 4096], false).is_err() || nbd.flush().is_err() {
            return Ok(page);
        }
        ensure!(
            begun.elapsed() < NOTICES,
            "a fenced writer still acknowledges writes after {NOTICES:?}"
        );
        thread::sleep(Duration::from_millis(20));
    }
    bail!("unreachable: the loop has no end")
}

fn take_over(old: &Site, new: &Site) -> Result<()> {
    let first = old.start()?;
    let second = new.start()?;
    let mut old_nbd = first.fresh_volume(VOLUME, 64 * MIB, &[])?;
    old_nbd.write(0, &[1; 4096], true)?;
    first.sync(VOLUME)?;

    // Without force: refused, with the owner's name and the way out.
    let refused = new.quarry_json(&["volume", "attach", VOLUME, "--via", "nbd"])?;
    let refusal = refused.refusal()?;
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy();
    ensure!(refusal.mentions(&host), "no owner's name: {refusal:?}");
    ensure!(refusal.mentions("--force"), "no way out: {refusal:?}");
    old_nbd.write(4096, &[2; 4096], true)?;
    first.sync(VOLUME)?;

    // With force: the new one has it, with all that was in the store.
    let mut new_nbd = second.attach(VOLUME, &["--force"])?;
    ensure!(new_nbd.read_vec(0, 8192)? == [[1; 4096], [2; 4096]].concat());
    new_nbd.write(4096, &[3; 4096], true)?;
    second.sync(VOLUME)?;

    let acknowledged = write_until_refused(&mut old_nbd)?;
    println!("the fenced writer acknowledged {acknowledged} more pages before it knew");
    let shown = first.show(VOLUME)?;
    let problem = shown["problem"].as_str().unwrap_or_default();
    ensure!(!problem.is_empty(), "the fence is not explained: {shown}");
    ensure!(shown["state"] == "fenced", "{shown}");
    let refused = old.quarry_json(&["volume", "compact", VOLUME])?;
    let refusal = refused.refusal()?;
    ensure!(refusal.mentions("fenced"), "{refusal:?}");
    if acknowledged > 0 {
        ensure!(shown["dirty_bytes"].as_u64() > Some(0), "unsent: {shown}");
    }
    ensure!(old_nbd.write(0, &[9; 4096], false).is_err());

    // None of the old one's writes is ever seen by the new one.
    second.sync(VOLUME)?;
    ensure!(
        new_nbd
            .read_vec(8 * MIB, 4 * MIB)?
            .iter()
            .all(|byte| *byte == 0)
    );
    ensure!(new_nbd.read_vec(4096, 4096)? == [3; 4096]);
    drop(new_nbd);
    second.quarry(&["volume", "detach", VOLUME])?;
    come_back(old, first, acknowledged > 0)?;
    second.stop()
}

/// The fenced daemon attaches again: not without a word about what it could not send.
fn come_back(old: &Site, first: Daemon, unsent: bool) -> Result<()> {
    // A restart must not forget the unsent data either.
    first.kill()?;
    let first = old.start()?;
    if unsent {
        let again = old.quarry_json(&["volume", "attach", VOLUME, "--via", "nbd"])?;
        let refusal = again.refusal()?;
        ensure!(refusal.mentions("--discard-unsent"), "{refusal:?}");
    }
    let mut nbd = first.attach(VOLUME, &["--discard-unsent"])?;
    ensure!(nbd.read_vec(0, 8192)? == [[1; 4096], [3; 4096]].concat());
    ensure!(
        nbd.read_vec(8 * MIB, 4 * MIB)?
            .iter()
            .all(|byte| *byte == 0)
    );
    nbd.write(0, &[4; 4096], true)?;
    drop(nbd);
    first.stop()
}

#[test]
fn volume_taken_over_on_a_folder_has_one_writer() -> Result<()> {
    let dir = tempdir()?;
    let old = Site::with_folder(dir.path(), "old")?;
    let new = Site::with_folder(dir.path(), "new")?;
    take_over(&old, &new)
}

#[test]
fn volume_taken_over_on_s3_has_one_writer() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let at = server.address();
    let old = Site::with_s3(dir.path(), "old", &server, at, "quarry")?;
    // What vouches for uploads on their way makes no difference.
    let new = Site::with_s3(dir.path(), "new", &server, at, "quarry")?
        .settings("[store]\nupload_check = \"none\"\n");
    take_over(&old, &new)
}

#[test]
fn volume_that_went_on_elsewhere_and_is_free_again_is_not_taken_back_at_a_start() -> Result<()> {
    let dir = tempdir()?;
    let old = Site::with_folder(dir.path(), "old")?;
    let new = Site::with_folder(dir.path(), "new")?;
    let first = old.start()?;
    let mut nbd = first.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    first.sync(VOLUME)?;
    first.kill()?;

    let second = new.start()?;
    let mut nbd = second.attach(VOLUME, &["--force"])?;
    nbd.write(0, &[2; 4096], true)?;
    drop(nbd);
    second.quarry(&["volume", "detach", VOLUME])?;

    // A device that it had would be under a file system that knows nothing of the other's writes.
    let first = old.start()?;
    let shown = first.show(VOLUME)?;
    ensure!(
        shown["state"] == "detached" && shown["owner"].is_null(),
        "{shown}"
    );
    ensure!(
        first.log().contains("was taken from this host"),
        "{}",
        first.log()
    );
    let mut nbd = second.attach(VOLUME, &[])?;
    ensure!(nbd.read_vec(0, 4096)? == [2; 4096]);
    drop(nbd);
    second.stop()?;
    first.stop()
}

#[test]
fn fenced_volume_is_exported_with_what_was_not_sent_and_what_stays_is_told() -> Result<()> {
    let dir = tempdir()?;
    let old = Site::with_folder(dir.path(), "old")?;
    let new = Site::with_folder(dir.path(), "new")?;
    let (first, second) = (old.start()?, new.start()?);
    let mut nbd = first.fresh_volume(VOLUME, 16 * MIB, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    first.sync(VOLUME)?;
    drop(second.attach(VOLUME, &["--force"])?);
    nbd.write(MIB, &[2; 4096], false)?;
    let begun = Instant::now();
    while first.show(VOLUME)?["state"] != "fenced" {
        ensure!(begun.elapsed() < NOTICES, "never fenced");
        thread::sleep(Duration::from_millis(100));
    }
    drop(nbd);
    let image = dir.path().join("saved.img");
    let name = image.to_string_lossy().into_owned();
    first.quarry(&["volume", "export", VOLUME, &name])?;
    let saved = fs::read(&image)?;
    ensure!(saved.len() as u64 == 16 * MIB);
    ensure!(saved[..4096] == [1; 4096], "what was sent is not in it");
    let (_, unsent) = saved.split_at(1 << 20);
    ensure!(
        unsent[..4096] == [2; 4096],
        "what was not sent is not in it"
    );
    ensure!(first.show(VOLUME)?["state"] == "fenced");

    first.quarry(&["volume", "detach", VOLUME])?;
    let shown = first.show(VOLUME)?;
    ensure!(shown["kept_bytes"].as_u64() >= Some(4096), "{shown}");
    let doctor = old.quarry(&["doctor"])?;
    let told = |line: &str| line.starts_with("warning") && line.contains(VOLUME);
    ensure!(doctor.stdout.lines().any(told), "{doctor}");
    drop(first.attach(VOLUME, &["--force", "--discard-unsent"])?);
    ensure!(first.show(VOLUME)?["kept_bytes"].is_null());
    first.stop()?;
    second.stop()
}

#[test]
fn volume_attached_by_both_in_turn_carries_everything_over() -> Result<()> {
    let dir = tempdir()?;
    let sites = [
        Site::with_folder(dir.path(), "one")?,
        Site::with_folder(dir.path(), "two")?,
    ];
    let daemons = [sites[0].start()?, sites[1].start()?];
    daemons[0].create(VOLUME, 64 * MIB, &[])?;
    for turn in 0_u8..6 {
        let daemon = &daemons[usize::from(turn % 2)];
        let mut nbd = daemon.attach(VOLUME, &[])?;
        for before in 0..turn {
            let found = nbd.read_vec(u64::from(before) * MIB, 4096)?;
            ensure!(found == [before + 1; 4096], "turn {turn} misses {before}");
        }
        nbd.write(u64::from(turn) * MIB, &[turn + 1; 4096], false)?;
        drop(nbd);
        daemon.quarry(&["volume", "detach", VOLUME])?;
    }
    for daemon in daemons {
        daemon.stop()?;
    }
    Ok(())
}
