//! `quarry volume rescue`: a volume whose head or name is lost comes back with every byte that was synced.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Site, Stamps, StoreDir, same_bytes, seeded};
use rand::RngExt as _;
use serde_json::Value;
use tempfile::{TempDir, tempdir};

const VOLUME: &str = "acme/lost";
const SIZE: u64 = 8 * MIB;
const FLAGS: &[&str] = &[
    "--size",
    "8MiB",
    "--sector-size",
    "512",
    "--durability",
    "local",
    "--compression",
    "lz4",
];

fn rescue(daemon: &Daemon, flags: &[&str]) -> Result<Value> {
    daemon.json(&[&["volume", "rescue", VOLUME], flags].concat())
}

fn apply(daemon: &Daemon, flags: &[&str]) -> Result<Value> {
    let report = rescue(daemon, &[&["--apply"], flags].concat())?;
    ensure!(report["applied"] == true, "{report}");
    daemon.quarry(&["volume", "verify", VOLUME, "--deep"])?;
    Ok(report)
}

/// A detached volume, written by two hosts in turn, so that its log has seals in it; and its image.
fn written(seed: u64) -> Result<(TempDir, StoreDir, Vec<u8>)> {
    let (mut random, stamps) = (seeded("places").0, Stamps::new(seed));
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let mut image = vec![0; usize::try_from(SIZE)?];
    for (host, round) in [("a", 1), ("b", 2), ("a", 3)] {
        let site = Site::with_folder(dir.path(), host)?;
        let daemon = site.start()?;
        let mut nbd = match round {
            1 => daemon.fresh_volume(VOLUME, SIZE, &[])?,
            _ => daemon.attach(VOLUME, &[])?,
        };
        for number in 0..12 {
            let first = random.random_range(0..SIZE / 512 - 256);
            let data = stamps.fill(first, 256, round * 100 + number);
            nbd.write(first * 512, &data, false)?;
            let at = usize::try_from(first * 512)?;
            image[at..at + data.len()].copy_from_slice(&data);
            if number % 4 == 0 {
                daemon.sync(VOLUME)?;
            }
        }
        drop(nbd);
        daemon.quarry(&["volume", "detach", VOLUME])?;
        daemon.stop()?;
    }
    Ok((dir, store, image))
}

fn assert_image(daemon: &Daemon, image: &[u8]) -> Result<()> {
    let mut nbd = daemon.attach(VOLUME, &[])?;
    let found = nbd.read_vec(0, SIZE)?;
    same_bytes("the image", &found, image)?;
    // And it is a volume like others.
    nbd.write(4096, &[7; 4096], true)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.quarry(&["volume", "verify", VOLUME, "--deep"])
}

fn flip(path: &Path, at: usize) -> Result<()> {
    let mut bytes = fs::read(path)?;
    bytes[at] ^= 1;
    Ok(fs::write(path, bytes)?)
}

#[test]
fn volume_without_its_head_or_its_newest_maps_comes_back_whole() -> Result<()> {
    let (_, seed) = seeded("rescue");
    let (dir, store, image) = written(seed)?;
    let maps = store.objects("map")?.len();
    for (way, damaged_maps) in [
        ("deleted", 0),
        ("flipped", 0),
        ("deleted", 1),
        ("deleted", maps),
    ] {
        println!("head {way}, {damaged_maps} of {maps} maps damaged");
        let scratch = tempdir()?;
        let copy = store.copy_to(scratch.path())?;
        let head = &copy.objects("head")?[0];
        match way {
            "deleted" => fs::remove_file(head)?,
            _ => flip(head, 60)?,
        }
        for map in copy.objects("map")?.iter().rev().take(damaged_maps) {
            flip(map, fs::read(map)?.len() - 1)?;
        }
        let site = Site::with_folder(scratch.path(), "c")?;
        let daemon = site.start()?;
        let refused = site.quarry_json(&["volume", "attach", VOLUME, "--via", "nbd"])?;
        let refused = refused.refusal()?;
        ensure!(refused.mentions("head"), "{refused:?}");
        let remedy = format!("quarry volume rescue {VOLUME}");
        ensure!(refused.mentions(&remedy), "{refused:?}");
        let looked = rescue(&daemon, &[])?;
        let no_map = damaged_maps == maps;
        ensure!(looked["map"].is_null() == no_map, "{looked}");
        // What a map does not say, the flags must.
        let needs = looked["needs"].as_array().map(Vec::len);
        ensure!(needs == Some(if no_map { 4 } else { 0 }), "{looked}");
        if no_map {
            let refused = [&["volume", "rescue", VOLUME, "--apply"], &FLAGS[..4]].concat();
            let refused = site.quarry_json(&refused)?.refusal()?;
            ensure!(refused.mentions("--durability") && !refused.message.contains("--size"));
        }
        let written = apply(&daemon, if no_map { FLAGS } else { &[] })?;
        ensure!(written["last_write"] == looked["last_write"], "{written}");
        ensure!(written["left_behind"] == 0, "{written}");
        assert_image(&daemon, &image)?;
        daemon.stop()?;
    }
    ensure!(dir.path().exists());
    Ok(())
}

#[test]
fn volume_that_lost_its_name_too_comes_back_by_its_id() -> Result<()> {
    let (_, seed) = seeded("rescue by id");
    let (dir, store, image) = written(seed)?;
    let head = &store.objects("head")?[0];
    let id = head.parent().and_then(Path::file_name).context("no id")?;
    let id = id.to_str().context("an id is text")?;
    fs::remove_file(head)?;
    fs::remove_file(&store.objects("names")?[0])?;
    let site = Site::with_folder(dir.path(), "c")?;
    let daemon = site.start()?;
    let refused = site.quarry_json(&["volume", "rescue", VOLUME])?.refusal()?;
    ensure!(refused.mentions("--id"), "{refused:?}");
    apply(&daemon, &["--id", id])?;
    assert_image(&daemon, &image)?;
    // The name alone.
    fs::remove_file(&store.objects("names")?[0])?;
    apply(&daemon, &["--id", id])?;
    daemon.quarry(&["volume", "show", VOLUME])?;
    // An id that is another's.
    let none = "00000000-0000-4000-8000-000000000000";
    let refused = site.quarry_json(&["volume", "rescue", VOLUME, "--id", none])?;
    ensure!(refused.refusal()?.kind == "conflict");
    daemon.stop()
}

#[test]
fn volume_without_a_head_that_is_deleted_comes_back_as_the_answer_says() -> Result<()> {
    let (_, seed) = seeded("rescue from the trash");
    let (dir, store, image) = written(seed)?;
    fs::write(&store.objects("head")?[0], b"junk")?;
    let site = Site::with_folder(dir.path(), "c")?;
    let daemon = site.start()?;
    let told = site.quarry(&["volume", "delete", VOLUME])?;
    ensure!(told.code == Some(0), "{told}");
    ensure!(!told.stdout.contains("volume restore"), "{told}");
    let (_, line) = told.stdout.split_once("`quarry ").context("no command")?;
    let (line, _) = line.split_once('`').context("no end of it")?;
    let line: Vec<&str> = line.split(' ').collect();
    ensure!(line.contains(&"rescue"), "{told}");
    daemon.quarry(&line)?;
    assert_image(&daemon, &image)?;
    daemon.stop()
}

#[test]
fn volume_that_is_sound_or_attached_is_not_rescued() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    daemon.sync(VOLUME)?;
    let line = [&["volume", "rescue", VOLUME, "--apply"], FLAGS].concat();
    let refused = site.quarry_json(&line)?.refusal()?;
    ensure!(
        refused.kind == "conflict" && refused.mentions("detach"),
        "{refused:?}"
    );
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    let heads = StoreDir::of(dir.path()).objects("head")?;
    let before = fs::read(&heads[0])?;
    let refused = site.quarry_json(&line)?.refusal()?;
    ensure!(
        refused.kind == "conflict" && refused.mentions("sound"),
        "{refused:?}"
    );
    ensure!(fs::read(&heads[0])? == before);
    daemon.stop()
}

/// Clones whose first epoch has no log: one that was never attached, and one whose host is lost before its first
/// checkpoint.
#[test]
fn clone_without_its_head_comes_back_with_what_was_synced() -> Result<()> {
    let (_, seed) = seeded("rescued clone");
    let stamps = Stamps::new(seed);
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut image = stamps.fill(0, 2048, 1);
    image.resize(usize::try_from(SIZE)?, 0);
    let mut nbd = daemon.fresh_volume("acme/parent", SIZE, &[])?;
    nbd.write(0, &image[..1 << 20], false)?;
    daemon.quarry(&["snapshot", "create", "acme/parent@golden"])?;
    drop(nbd);
    for (name, written) in [("acme/idle", false), (VOLUME, true)] {
        daemon.quarry(&["volume", "clone", "acme/parent@golden", name])?;
        if !written {
            continue;
        }
        let mut nbd = daemon.attach(name, &[])?;
        for part in 0..3 {
            let data = stamps.fill(1024 + part * 256, 512, 2 + part);
            let at = (1024 + part * 256) * 512;
            nbd.write(at, &data, false)?;
            let at = usize::try_from(at)?;
            image[at..at + data.len()].copy_from_slice(&data);
            daemon.sync(name)?;
        }
    }
    let golden = stamps.fill(0, 2048, 1);
    let heads = ["acme/idle", VOLUME].map(|name| -> Result<_> {
        let id = daemon.show(name)?["id"].clone();
        Ok(id.as_str().context("no id")?.to_owned())
    });
    daemon.kill()?;
    site.lose_host()?;
    let daemon = site.start()?;
    for id in heads {
        let id = id?;
        let head = store.objects("head")?;
        let head = head.iter().find(|head| store.key(head).contains(&id));
        fs::remove_file(head.context("no head")?)?;
    }
    for (name, expected) in [("acme/idle", &golden[..]), (VOLUME, &image[..])] {
        let report = daemon.json(&["volume", "rescue", name, "--apply"])?;
        ensure!(
            report["applied"] == true && report["left_behind"] == 0,
            "{report}"
        );
        let mut nbd = daemon.attach(name, &[])?;
        let found = nbd.read_vec(0, SIZE)?;
        same_bytes(name, &found[..expected.len()], expected)?;
        drop(nbd);
        daemon.quarry(&["volume", "verify", name, "--deep"])?;
    }
    daemon.stop()
}
