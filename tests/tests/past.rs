//! A volume as it was at a time: opened beside its writer and on another host, as long as that is kept.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Nbd, Refusal, Site, Stamps, seeded};
use rand::RngExt as _;
use rand::rngs::StdRng;
use tempfile::tempdir;

const VOLUME: &str = "acme/db";
const SIZE: u64 = 8 * MIB;
const SECTORS: u64 = SIZE / 512;
/// Small chunks, taken apart early, for a volume that is as much smaller than real ones.
const SETTINGS: &str =
    "[writeback]\nchunk_size = \"256KiB\"\n[reclaim]\nhorizon = \"1s\"\ndebt_min = \"64KiB\"\n";
/// Past states and snapshots that a tenant may have attached on a host.
const PAST_MAX: u64 = 64;
/// By then what is not kept must be gone.
const SETTLE_MAX: Duration = Duration::from_secs(60);

fn now_ms() -> Result<u64> {
    Ok(u64::try_from(
        SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis(),
    )?)
}

/// A moment of a volume, and what it was then.
struct Moment {
    ms: u64,
    bytes: Vec<u8>,
}

impl Moment {
    /// As it is written behind the volume's name.
    fn text(&self) -> String {
        let at = UNIX_EPOCH + Duration::from_millis(self.ms);
        humantime::format_rfc3339_millis(at).to_string()
    }
}

/// Overwrites parts of the volume, and brings that into the store.
fn overwrite(
    daemon: &Daemon,
    nbd: &mut Nbd,
    (random, stamps, number): (&mut StdRng, Stamps, u64),
    bytes: &mut [u8],
) -> Result<Moment> {
    for run in 0..12 {
        let sectors = random.random_range(1..=512);
        let first = random.random_range(0..SECTORS - sectors);
        let data = stamps.fill(first, sectors, number * 100 + run);
        nbd.write(first * 512, &data, false)?;
        let at = usize::try_from(first * 512)?;
        bytes[at..at + data.len()].copy_from_slice(&data);
    }
    nbd.flush()?;
    daemon.sync(VOLUME)?;
    let moment = Moment {
        ms: now_ms()?,
        bytes: bytes.to_vec(),
    };
    // What comes next is of a later millisecond.
    thread::sleep(Duration::from_millis(3));
    Ok(moment)
}

/// The name that an image of the past has from its attach on.
fn attach_at(daemon: &Daemon, at: &str) -> Result<String> {
    let call = ["volume", "attach", VOLUME, "--read-only", "--via", "nbd"];
    let answer = daemon.json(&[&call[..], &["--at", at]].concat())?;
    let name = answer["volume"].as_str().context("no name")?;
    Ok(name.to_owned())
}

fn refused_at(site: &Site, at: &str) -> Result<Refusal> {
    let call = ["volume", "attach", VOLUME, "--via", "nbd", "--at", at];
    site.quarry_json(&call)?.refusal()
}

fn assert_reads(daemon: &Daemon, image: &str, moment: &Moment) -> Result<()> {
    let mut nbd = daemon.connect(image)?;
    let found = nbd.read_vec(0, SIZE)?;
    nbd.disconnect()?;
    ensure!(found == moment.bytes, "{image} is not what it was");
    Ok(())
}

#[test]
fn volume_is_opened_as_it_was_beside_its_writer_and_on_another_host() -> Result<()> {
    let (mut random, seed) = seeded("volume as it was");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.settings(SETTINGS);
    let daemon = site.start()?;
    let other = Site::with_folder(dir.path(), "b")?;
    let reader = other.start()?;
    let before = now_ms()?;
    thread::sleep(Duration::from_millis(3));
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &["--retain", "1h"])?;
    ensure!(daemon.show(VOLUME)?["retain_ms"] == 3_600_000);
    let mut bytes = vec![0; usize::try_from(SIZE)?];
    let mut moments = vec![Moment {
        ms: now_ms()?,
        bytes: bytes.clone(),
    }];
    thread::sleep(Duration::from_millis(3));
    for number in 1..=16 {
        let how = (&mut random, stamps, number);
        moments.push(overwrite(&daemon, &mut nbd, how, &mut bytes)?);
        if number % 3 == 0 {
            // Folds the log into the map.
            nbd.disconnect()?;
            daemon.quarry(&["volume", "detach", VOLUME])?;
            nbd = daemon.attach(VOLUME, &[])?;
        }
    }
    let shown = daemon.show(VOLUME)?;
    ensure!(shown["deleted_bytes"] == 0, "{shown}");

    for moment in &moments {
        for daemon in [&daemon, &reader] {
            let image = attach_at(daemon, &moment.text())?;
            ensure!(image == format!("{VOLUME}@{}", moment.text()), "{image}");
            assert_reads(daemon, &image, moment)?;
            daemon.quarry(&["volume", "detach", &image])?;
        }
    }
    // By the name alone, by milliseconds, and all at once, over a restart.
    let image = format!("{VOLUME}@{}", moments[3].text());
    reader.attach(&image, &[])?.disconnect()?;
    let second = attach_at(&reader, &moments[7].ms.to_string())?;
    ensure!(reader.show(&second)?["attached"]["read_only"] == true);
    let listed = reader.json(&["volume", "list"])?.to_string();
    ensure!(listed.contains(&moments[7].text()), "{listed}");
    reader.stop()?;
    let reader = other.start()?;
    let begun = Instant::now();
    while reader.show(&second)?["attached"].is_null() || reader.show(&image)?["attached"].is_null()
    {
        ensure!(begun.elapsed() < SETTLE_MAX, "not attached again");
        thread::sleep(Duration::from_millis(50));
    }
    assert_reads(&reader, &image, &moments[3])?;
    assert_reads(&reader, &second, &moments[7])?;

    // As an image, beside its writer.
    let file = dir.path().join("past.img");
    let path = file.to_str().context("not UTF-8")?;
    let at = moments[5].text();
    daemon.quarry(&["volume", "export", VOLUME, path, "--at", &at])?;
    ensure!(std::fs::read(&file)? == moments[5].bytes, "another image");
    let listed = daemon.json(&["volume", "list"])?.to_string();
    ensure!(!listed.contains(&at), "it is still attached: {listed}");

    let early = refused_at(&other, &before.to_string())?;
    ensure!(early.mentions("the volume was made later"), "{early:?}");
    let future = refused_at(&other, "2999-01-01T00:00:00Z")?;
    ensure!(future.mentions("in the future"), "{future:?}");
    // Another host's to set.
    let owned = other
        .quarry_json(&["volume", "retain", VOLUME, "2h"])?
        .refusal()?;
    ensure!(
        owned.kind == "conflict" && owned.mentions("attached by host"),
        "{owned:?}"
    );
    nbd.disconnect()?;
    daemon.stop()
}

#[test]
fn past_that_is_kept_no_longer_is_refused_and_fails_its_readers() -> Result<()> {
    let (mut random, seed) = seeded("past kept no longer");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.settings(SETTINGS);
    let daemon = site.start()?;
    let other = Site::with_folder(dir.path(), "b")?;
    let reader = other.start()?;
    daemon.create(VOLUME, SIZE, &[])?;
    // Of a volume that nobody has.
    reader.quarry(&["volume", "retain", VOLUME, "1h"])?;
    let mut nbd = daemon.attach(VOLUME, &[])?;
    let mut bytes = vec![0; usize::try_from(SIZE)?];
    let mut moments = Vec::new();
    for number in 1..=8 {
        let how = (&mut random, stamps, number);
        moments.push(overwrite(&daemon, &mut nbd, how, &mut bytes)?);
        // Folds the log into the map.
        let snapshot = format!("{VOLUME}@n{number}");
        daemon.quarry(&["snapshot", "create", &snapshot])?;
        daemon.quarry(&["snapshot", "delete", &snapshot])?;
    }
    let old = &moments[0];
    let image = attach_at(&reader, &old.text())?;
    ensure!(reader.show(&image)?["retain_ms"] == 3_600_000);

    daemon.quarry(&["volume", "retain", VOLUME, "0s"])?;
    ensure!(daemon.show(VOLUME)?["retain_ms"] == 0);
    let begun = Instant::now();
    let refused = loop {
        let call = [
            "volume",
            "attach",
            VOLUME,
            "--via",
            "nbd",
            "--at",
            &old.text(),
        ];
        let ran = site.quarry_json(&call)?;
        if ran.code != Some(0) {
            break ran.refusal()?;
        }
        daemon.quarry(&["volume", "detach", &format!("{VOLUME}@{}", old.text())])?;
        ensure!(begun.elapsed() < SETTLE_MAX, "it is still kept");
        thread::sleep(Duration::from_millis(100));
    };
    ensure!(refused.kind == "not_found", "{refused:?}");
    ensure!(refused.mentions("is not kept"), "{refused:?}");
    ensure!(
        refused.mentions("the oldest state that is kept is of"),
        "{refused:?}"
    );
    // Whoever had it open is told what is missing, and never reads anything else.
    let mut late = reader.connect(&image)?;
    let read = late.read_vec(0, SIZE);
    ensure!(read.is_err(), "what is gone was read");
    let problem = reader.show(&image)?["problem"].to_string();
    ensure!(
        problem.contains("chunk/") || problem.contains("map/"),
        "{problem}"
    );
    // The volume itself is whole.
    let found = nbd.read_vec(0, SIZE)?;
    ensure!(found == bytes, "the volume is not what was written");
    nbd.disconnect()?;
    daemon.stop()?;
    reader.stop()
}

#[test]
fn past_states_that_a_tenant_attaches_are_bounded_and_refused_with_what_to_do() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let retain = ["--retain", "1h"];
    daemon.fresh_volume(VOLUME, SIZE, &retain)?.disconnect()?;
    let snapshot = format!("{VOLUME}@s");
    daemon.quarry(&["snapshot", "create", &snapshot])?;
    let first = now_ms()?;
    // None of them is in the future.
    thread::sleep(Duration::from_millis(PAST_MAX + 10));
    let oldest = attach_at(&daemon, &first.to_string())?;
    for ms in first + 1..first + PAST_MAX {
        attach_at(&daemon, &ms.to_string())?;
    }
    let one_more = refused_at(&site, &(first + PAST_MAX).to_string())?;
    let attach = ["volume", "attach", &snapshot, "--via", "nbd"];
    let of_snapshot = site.quarry_json(&attach)?.refusal()?;
    for refused in [one_more, of_snapshot] {
        ensure!(
            refused.kind == "conflict" && refused.mentions("has 64 snapshots and past states"),
            "{refused:?}"
        );
    }
    daemon.quarry(&["volume", "detach", &oldest])?;
    daemon.attach(&snapshot, &[])?.disconnect()?;
    daemon.stop()
}
