//! Deleted volumes: they come back whole, or go without a trace, and leave the others alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, SeaweedFs, Site, Stamps, StoreDir, metric_sum, same_bytes};
use serde_json::Value;
use tempfile::tempdir;

const SIZE: u64 = 32 * MIB;

/// Longest wait for what is due to be purged.
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes a volume of several chunks and checkpoints, and detaches it; answers its image.
fn written(daemon: &Daemon, volume: &str, seed: u64) -> Result<Vec<u8>> {
    let stamps = Stamps::new(seed);
    let mut nbd = daemon.fresh_volume(volume, SIZE, &[])?;
    for part in 0..4 {
        let data = stamps.fill(part * 4096, 4096, part + 1);
        nbd.write(part * 4096 * 512, &data, false)?;
        daemon.sync(volume)?;
    }
    let image = nbd.read_vec(0, SIZE)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", volume])?;
    Ok(image)
}

fn assert_whole(daemon: &Daemon, volume: &str, image: &[u8]) -> Result<()> {
    let mut nbd = daemon.attach(volume, &[])?;
    same_bytes(volume, &nbd.read_vec(0, SIZE)?, image)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", volume])?;
    daemon.quarry(&["volume", "verify", volume, "--deep"])
}

fn id(daemon: &Daemon, volume: &str) -> Result<String> {
    let shown = daemon.show(volume)?;
    Ok(shown["id"].as_str().context("no id")?.to_owned())
}

fn trash(daemon: &Daemon) -> Result<Vec<Value>> {
    let list = daemon.json(&["trash", "list"])?;
    Ok(list["trash"].as_array().context("no list")?.clone())
}

fn metric(daemon: &Daemon, name: &str) -> Result<f64> {
    metric_sum(&daemon.metrics()?, name, "").context("no such metric")
}

fn requests(daemon: &Daemon) -> Result<f64> {
    metric(daemon, "quarry_store_requests_total")
}

fn await_purged(daemons: &[&Daemon]) -> Result<()> {
    let begun = Instant::now();
    while !trash(daemons[0])?.is_empty() {
        ensure!(begun.elapsed() < PATIENCE, "{}", daemons[0].log());
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// What is in a bucket, by a client that knows nothing of Quarry: the files of a folder, or the filer's
/// own list.
trait Bucket {
    fn keys(&self) -> Result<BTreeMap<String, u64>>;
}

impl Bucket for StoreDir {
    fn keys(&self) -> Result<BTreeMap<String, u64>> {
        let mut keys = BTreeMap::new();
        for part in ["t", "tenants"] {
            for object in self.objects(part)? {
                keys.insert(self.key(&object), fs::metadata(&object)?.len());
            }
        }
        Ok(keys)
    }
}

impl Bucket for (&SeaweedFs, &str) {
    fn keys(&self) -> Result<BTreeMap<String, u64>> {
        self.0.objects(self.1)
    }
}

/// One of three volumes is deleted and purged: all objects of it are gone, and all others as they were.
fn purged_without_a_trace(site: &Site, bucket: &dyn Bucket) -> Result<()> {
    let daemon = site.start()?;
    let kept = [("acme/kept", 2), ("acme2/db", 3)];
    let mut images = Vec::new();
    for (volume, seed) in kept {
        images.push((volume, written(&daemon, volume, seed)?));
    }
    let before = bucket.keys()?;
    let image = written(&daemon, "acme/db", 1)?;
    let gone = id(&daemon, "acme/db")?;
    let of_it = |keys: &BTreeMap<String, u64>| keys.keys().filter(|k| k.contains(&gone)).count();
    let objects = of_it(&bucket.keys()?);
    ensure!(objects >= 6, "{objects}");

    // Into the trash, and out of it.
    let asked = requests(&daemon)?;
    daemon.quarry(&["volume", "delete", "acme/db"])?;
    let asked = requests(&daemon)? - asked;
    ensure!(asked < 30.0, "deleting took {asked} requests");
    ensure!(of_it(&bucket.keys()?) == objects + 1, "with its record");
    for call in ["attach", "show", "resize"] {
        let mut line = vec!["volume", call, "acme/db"];
        line.extend((call == "resize").then_some("64MiB"));
        ensure!(site.quarry_json(&line)?.refusal()?.kind == "not_found");
    }
    let listed = trash(&daemon)?;
    ensure!(listed.len() == 1 && listed[0]["id"] == gone, "{listed:?}");
    ensure!(listed[0]["size_bytes"] == SIZE, "{listed:?}");
    daemon.quarry(&["volume", "restore", "acme/db"])?;
    ensure!(trash(&daemon)?.is_empty());
    assert_whole(&daemon, "acme/db", &image)?;
    daemon.quarry(&["volume", "delete", "acme/db"])?;
    daemon.quarry(&["volume", "restore", &gone, "--as", "again"])?;
    assert_whole(&daemon, "acme/again", &image)?;
    daemon.quarry(&["volume", "delete", "acme/again"])?;

    let purged = daemon.json(&["trash", "purge", &gone])?;
    ensure!(
        purged["objects"].as_u64() >= Some(objects as u64),
        "{purged}"
    );
    let refused = site.quarry_json(&["volume", "restore", &gone])?.refusal()?;
    ensure!(refused.kind == "not_found", "{refused:?}");
    ensure!(bucket.keys()? == before);
    for (volume, image) in images {
        assert_whole(&daemon, volume, &image)?;
    }
    daemon.stop()
}

#[test]
fn volume_deleted_elsewhere_is_listed_with_that_where_it_is_attached() -> Result<()> {
    let dir = tempdir()?;
    let reading = Site::with_folder(dir.path(), "reading")?.start()?;
    let deleting = Site::with_folder(dir.path(), "deleting")?.start()?;
    written(&deleting, "acme/db", 1)?;
    let nbd = reading.attach("acme/db", &["--read-only"])?;
    let listed = || -> Result<Vec<Value>> {
        let list = reading.json(&["volume", "list"])?;
        Ok(list["volumes"].as_array().context("no list")?.clone())
    };
    let before = listed()?;
    ensure!(
        before.len() == 1 && before[0]["problem"].is_null(),
        "{before:?}"
    );

    deleting.quarry(&["volume", "delete", "acme/db"])?;
    let after = listed()?;
    ensure!(after.len() == 1, "{after:?}");
    for shown in [&after[0], &reading.show("acme/db")?] {
        ensure!(shown["state"] == "attached", "{shown}");
        let problem = shown["problem"].as_str().unwrap_or_default();
        ensure!(problem.contains("deleted elsewhere"), "{shown}");
    }
    drop(nbd);
    reading.stop()?;
    deleting.stop()
}

#[test]
fn volume_purged_leaves_no_object_in_a_folder_and_all_of_the_others() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    purged_without_a_trace(&site, &StoreDir::of(dir.path()))
}

#[test]
fn volume_purged_leaves_no_object_on_a_real_s3_server_and_all_of_the_others() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let site = Site::with_s3(dir.path(), "a", &server, server.address(), "trash")?;
    purged_without_a_trace(&site, &(&server, "trash"))
}

fn site(root: &Path, name: &str, grace: &str) -> Result<Site> {
    Ok(Site::with_folder(root, name)?.settings(&format!("[trash]\ngrace = \"{grace}\"\n")))
}

#[test]
fn volume_is_purged_after_its_time_by_whichever_daemons_run() -> Result<()> {
    const GRACE: Duration = Duration::from_secs(3);
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let grace = format!("{}s", GRACE.as_secs());
    let (a, b) = (
        site(dir.path(), "a", &grace)?,
        site(dir.path(), "b", &grace)?,
    );
    let (first, second) = (a.start()?, b.start()?);
    let image = written(&first, "acme/kept", 2)?;
    let before = store.keys()?;
    written(&first, "acme/db", 1)?;
    let begun = Instant::now();
    first.quarry(&["volume", "delete", "acme/db"])?;
    await_purged(&[&first, &second])?;
    let took = begun.elapsed();
    ensure!(took >= GRACE, "it had {took:?} instead of {GRACE:?}");
    ensure!(store.keys()? == before);
    let purged = |daemon: &Daemon| metric(daemon, "quarry_trash_purged_volumes_total");
    ensure!(purged(&first)? + purged(&second)? > 0.0);
    // The daemon that deleted it is killed, and another one goes on.
    written(&first, "acme/db", 1)?;
    first.quarry(&["volume", "delete", "acme/db"])?;
    first.kill()?;
    second.stop()?;
    let second = b.start()?;
    await_purged(&[&second])?;
    ensure!(store.keys()? == before);
    assert_whole(&second, "acme/kept", &image)?;
    second.stop()
}

#[test]
fn volume_deleted_without_a_grace_period_is_purged_at_once() -> Result<()> {
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let daemon = site(dir.path(), "a", "0s")?.start()?;
    daemon.create("acme/db", SIZE, &[])?;
    daemon.quarry(&["volume", "delete", "acme/db"])?;
    await_purged(&[&daemon])?;
    ensure!(store.objects("v")?.is_empty() && store.objects("trash")?.is_empty());
    daemon.quarry(&["tenant", "delete", "acme"])?;
    daemon.stop()
}

#[test]
fn volume_whose_head_was_lost_is_rescued_from_the_trash() -> Result<()> {
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let image = written(&daemon, "acme/db", 1)?;
    let id = id(&daemon, "acme/db")?;
    fs::remove_file(&store.objects("head")?[0])?;
    daemon.quarry(&["volume", "delete", "acme/db"])?;
    let listed = trash(&daemon)?;
    ensure!(
        listed.len() == 1 && listed[0]["problem"].is_string(),
        "{listed:?}"
    );
    let refused = site
        .quarry_json(&["volume", "restore", "acme/db"])?
        .refusal()?;
    ensure!(refused.mentions("rescue NAME --id"), "{refused:?}");
    let line =
        "volume rescue acme/db --size 32MiB --sector-size 512 --durability local --compression lz4";
    let mut line: Vec<_> = line.split(' ').collect();
    line.extend(["--apply", "--id", &id]);
    daemon.quarry(&line)?;
    // What is left of it in the trash harms it no more.
    let purged = daemon.json(&["trash", "purge", "--older-than", "0s"])?;
    ensure!(purged["objects"] == 0, "{purged}");
    ensure!(trash(&daemon)?.is_empty());
    assert_whole(&daemon, "acme/db", &image)?;
    daemon.stop()
}
