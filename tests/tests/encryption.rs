//! Encrypted volumes: nothing that was written is to be found in the store, nobody reads it without its key, and
//! what is put in another place is refused. Encrypted caches: nor is it to be found on the cache device.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Nbd, Site, StoreDir, in_memory, same_bytes};
use tempfile::tempdir;

const SIZE: u64 = 4 * MIB;

/// In every sector; and never in a file of the store by chance.
const MARK: &[u8] = b"marked plaintext of sector";

/// NBD's errno of data that cannot be had.
const EIO: u32 = 5;

/// Compressed data would hide the mark.
const SHAPE: &[&str] = &["--compression", "none"];

fn marked(first_sector: u64, sectors: u64, round: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity(in_memory(sectors * 512));
    for sector in first_sector..first_sector + sectors {
        let mut line = MARK.to_vec();
        line.extend_from_slice(format!(" {sector} in round {round}.").as_bytes());
        data.extend(line.iter().copied().cycle().take(512));
    }
    data
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// The files below `dir` with the mark in them.
fn with_mark(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    files(dir, &mut all)?;
    let mut found = Vec::new();
    for path in all {
        let bytes = fs::read(&path)?;
        if bytes.windows(MARK.len()).any(|window| window == MARK) {
            found.push(path);
        }
    }
    Ok(found)
}

fn assert_no_mark(root: &Path, when: &str) -> Result<()> {
    let found = with_mark(&root.join("store"))?;
    ensure!(found.is_empty(), "{when}: plaintext in {found:?}");
    Ok(())
}

/// A line for a keyring, as `quarry key generate` makes it.
fn key(site: &Site, name: &str) -> Result<String> {
    let made = site.quarry(&["key", "generate", name])?;
    ensure!(made.code == Some(0), "{made}");
    Ok(made.stdout)
}

fn keyring(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o600),
    )?)
}

/// A site with a keyring of its own.
fn site(root: &Path, name: &str, keys: &str) -> Result<(Site, PathBuf)> {
    site_with(root, name, keys, "")
}

fn site_with(root: &Path, name: &str, keys: &str, settings: &str) -> Result<(Site, PathBuf)> {
    let site = Site::with_folder(root, name)?;
    let path = site.root().join("keyring");
    keyring(&path, keys)?;
    let settings = format!("[keys]\nkeyring = \"{}\"\n{settings}", path.display());
    Ok((site.settings(&settings), path))
}

fn read_all(nbd: &mut Nbd) -> Result<Vec<u8>> {
    Ok(nbd.read_vec(0, SIZE)?)
}

fn detach(daemon: &Daemon, volume: &str) -> Result<()> {
    daemon.quarry(&["volume", "detach", volume])
}

#[test]
fn doctor_fails_where_the_keyring_lacks_what_is_in_use() -> Result<()> {
    let dir = tempdir()?;
    let root = dir.path();
    let bare = Site::with_folder(root, "a")?;
    let (acme, other) = (key(&bare, "acme")?, key(&bare, "other")?);
    let (site_a, ring) = site(root, "a", &acme)?;
    let daemon = site_a.start()?;
    drop(daemon.fresh_volume("acme/db", SIZE, &["--key", "acme"])?);
    let well = site_a.quarry(&["doctor"])?;
    ensure!(
        well.code == Some(0) && well.stdout.contains("opens all that is encrypted"),
        "{well}"
    );
    let told = |words: &str| -> Result<()> {
        let doctor = site_a.quarry(&["doctor"])?;
        ensure!(
            doctor.code == Some(1) && doctor.stdout.contains(words),
            "{words}: {doctor}"
        );
        Ok(())
    };
    keyring(&ring, &other)?;
    told("has no key acme")?;
    // Another of the same name.
    keyring(&ring, &key(&bare, "acme")?)?;
    told("is not opened by key acme")?;
    fs::set_permissions(&ring, fs::Permissions::from_mode(0o640))?;
    told("chmod 600")?;
    fs::remove_file(&ring)?;
    told("cannot be read")?;
    daemon.stop()
}

#[test]
fn volume_encrypted_leaves_no_plaintext_in_the_store_whatever_is_done_with_it() -> Result<()> {
    let dir = tempdir()?;
    let root = dir.path();
    let keys = key(&Site::with_folder(root, "a")?, "acme")?;
    let (site_a, ring) = site(root, "a", &keys)?;
    let daemon = site_a.start()?;
    let encrypted = [SHAPE, &["--key", "acme"]].concat();

    // What is looked for is found where it is not encrypted.
    let mut nbd = daemon.fresh_volume("acme/plain", SIZE, SHAPE)?;
    nbd.write(0, &marked(0, 64, 0), true)?;
    drop(nbd);
    detach(&daemon, "acme/plain")?;
    ensure!(!with_mark(&root.join("store"))?.is_empty());
    daemon.quarry(&["volume", "delete", "acme/plain"])?;
    daemon.quarry(&["trash", "purge", "--all"])?;
    assert_no_mark(root, "before")?;

    let mut nbd = daemon.fresh_volume("acme/db", SIZE, &encrypted)?;
    let mut image = marked(0, SIZE / 512, 1);
    nbd.write(0, &image, true)?;
    daemon.sync("acme/db")?;
    assert_no_mark(root, "written")?;
    let shown = daemon.show("acme/db")?;
    ensure!(
        shown["encryption"] == "aes-256-gcm" && shown["key"] == "acme",
        "{shown}"
    );

    daemon.quarry(&["snapshot", "create", "acme/db@one"])?;
    let before = image.clone();
    for part in (0..SIZE / 512).step_by(16) {
        let new = marked(part, 4, 2);
        nbd.write(part * 512, &new, false)?;
        let at = in_memory(part * 512);
        image[at..at + new.len()].copy_from_slice(&new);
        if part % 1024 == 0 {
            daemon.sync("acme/db")?;
        }
    }
    daemon.quarry(&["volume", "compact", "acme/db", "--held"])?;
    assert_no_mark(root, "compacted")?;
    daemon.quarry(&["volume", "verify", "acme/db", "--deep"])?;

    // A clone reads its parent's chunks with its parent's key, and writes with its own.
    daemon.quarry(&["volume", "clone", "acme/db@one", "acme/copy"])?;
    let mut copy = daemon.attach("acme/copy", &[])?;
    same_bytes("the clone", &read_all(&mut copy)?, &before)?;
    copy.write(0, &marked(0, 64, 3), true)?;
    daemon.sync("acme/copy")?;
    let mut copied = before.clone();
    copied[..64 * 512].copy_from_slice(&marked(0, 64, 3));
    assert_no_mark(root, "cloned")?;

    // Another key, while both are in use.
    fs::write(&ring, format!("{keys}\n{}", key(&site_a, "next")?))?;
    for volume in ["acme/db", "acme/copy"] {
        let done = daemon.json(&["volume", "rekey", volume, "--key", "next"])?;
        ensure!(
            done["keys"] == if volume == "acme/db" { 1 } else { 2 },
            "{done}"
        );
        ensure!(daemon.show(volume)?["key"] == "next");
        daemon.quarry(&["volume", "verify", volume, "--deep"])?;
    }
    assert_no_mark(root, "rekeyed")?;
    // One copy of the keys each.
    ensure!(StoreDir::of(root).objects("keys")?.len() == 2);
    drop((nbd, copy));
    for volume in ["acme/db", "acme/copy"] {
        detach(&daemon, volume)?;
    }
    daemon.stop()?;

    // On another host, with the new key alone.
    let all = fs::read_to_string(&ring)?;
    let new: String = all
        .lines()
        .filter(|line| line.starts_with("next"))
        .collect();
    let (site_b, _) = site(root, "b", &new)?;
    let daemon = site_b.start()?;
    for (volume, expected) in [("acme/db", &image), ("acme/copy", &copied)] {
        same_bytes(
            volume,
            &read_all(&mut daemon.attach(volume, &[])?)?,
            expected,
        )?;
        daemon.quarry(&["volume", "verify", volume, "--deep", "--snapshots"])?;
    }
    daemon.quarry(&["volume", "flatten", "acme/copy"])?;
    detach(&daemon, "acme/db")?;
    daemon.quarry(&["volume", "rollback", "acme/db@one"])?;
    let mut nbd = daemon.attach("acme/db", &[])?;
    same_bytes("rolled back", &read_all(&mut nbd)?, &before)?;
    assert_no_mark(root, "in the end")?;

    // Its head is lost: the keys come back from their copy, and what is written then is encrypted too.
    drop(nbd);
    detach(&daemon, "acme/db")?;
    let id = daemon.show("acme/db")?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    lose_head_and_rescue(&daemon, root, &id)?;
    let mut nbd = daemon.attach("acme/db", &["--discard-unsent"])?;
    same_bytes("rescued", &read_all(&mut nbd)?, &before)?;
    nbd.write(0, &marked(0, 64, 4), true)?;
    daemon.sync("acme/db")?;
    daemon.quarry(&["volume", "verify", "acme/db", "--deep"])?;
    assert_no_mark(root, "rescued")
}

/// Small chunks, which are deleted soon.
const SOON: &str = "[writeback]\nchunk_size = \"256KiB\"\n[reclaim]\nhorizon = \"1s\"\n";

/// How long a step of a rotation may take.
const ROTATION_MAX: Duration = Duration::from_secs(150);

/// A volume's data keys, by generation, with the snapshots that need what each encrypts.
fn data_keys(daemon: &Daemon, volume: &str) -> Result<Vec<(u64, Vec<String>)>> {
    let shown = daemon.show(volume)?;
    let keys = shown["data_keys"].as_array().context("no data keys")?;
    let key = |key: &serde_json::Value| {
        let named = key["snapshots"].as_array().into_iter().flatten();
        let named = named.filter_map(|name| Some(name.as_str()?.to_owned()));
        Some((key["generation"].as_u64()?, named.collect()))
    };
    keys.iter().map(|k| key(k).context("a data key")).collect()
}

/// Bytes in the store of what the earliest of them encrypts.
fn earliest_bytes(daemon: &Daemon, volume: &str) -> Result<Option<u64>> {
    Ok(daemon.show(volume)?["data_keys"][0]["stored_bytes"].as_u64())
}

fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !done()? {
        ensure!(
            begun.elapsed() < ROTATION_MAX,
            "{what}: not in {ROTATION_MAX:?}"
        );
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// The only copy of a volume's keys: its first wrapped key, where each is wrapped by one of a name of four characters.
fn first_wrapped(root: &Path, id: &str) -> Result<Vec<u8>> {
    let copies = StoreDir::of(root).objects("keys")?;
    let mut own = copies
        .iter()
        .filter(|copy| copy.to_string_lossy().contains(id));
    let copy = fs::read(own.next().context("no copy of the keys")?)?;
    ensure!(own.next().is_none(), "more than one copy of the keys");
    // Prologue, volume, revision, number; volume, generation, name, length.
    let at = 16 + 16 + 4 + 4 + 16 + 2 + 1 + 4 + 2;
    Ok(copy.get(at..at + 60).context("cut off")?.to_vec())
}

/// Objects of the store with these bytes in them.
fn with_bytes(root: &Path, wanted: &[u8]) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    files(&root.join("store"), &mut all)?;
    all.retain(|path| {
        let bytes = fs::read(path).unwrap_or_default();
        bytes.windows(wanted.len()).any(|window| window == wanted)
    });
    Ok(all)
}

#[test]
fn data_key_rotated_under_writes_is_dropped_when_nothing_is_encrypted_with_it() -> Result<()> {
    let dir = tempdir()?;
    let root = dir.path();
    let keys = key(&Site::with_folder(root, "a")?, "acme")?;
    let (site_a, _) = site_with(root, "a", &keys, SOON)?;
    let daemon = site_a.start()?;
    let encrypted = [SHAPE, &["--key", "acme"]].concat();
    let mut nbd = daemon.fresh_volume("acme/db", SIZE, &encrypted)?;
    let id = daemon.show("acme/db")?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    let mut image = marked(0, SIZE / 512, 1);
    nbd.write(0, &image, true)?;
    daemon.sync("acme/db")?;
    daemon.quarry(&["snapshot", "create", "acme/db@one"])?;
    let before = image.clone();
    daemon.quarry(&["volume", "clone", "acme/db@one", "acme/copy"])?;

    // Written on both sides of the rotation and while it is made.
    let writer = thread::spawn(move || -> Result<(Nbd, Vec<u8>)> {
        for round in 2..40 {
            for sector in (round..SIZE / 512).step_by(641) {
                let new = marked(sector, 3.min(SIZE / 512 - sector), round);
                nbd.write(sector * 512, &new, false)?;
                let at = in_memory(sector * 512);
                image[at..at + new.len()].copy_from_slice(&new);
            }
            nbd.flush()?;
        }
        Ok((nbd, image))
    });
    let done = daemon.json(&["volume", "rekey", "acme/db", "--data"])?;
    ensure!(done["keys"] == 2 && done["key"] == "acme", "{done}");
    ensure!(done["data_keys"][1]["generation"] == 2, "{done}");
    let wrapped = first_wrapped(root, &id)?;
    ensure!(
        with_bytes(root, &wrapped)?.len() == 2,
        "in the head and its copy"
    );
    let (nbd, image) = writer.join().expect("the thread does not panic")?;
    daemon.quarry(&["volume", "verify", "acme/db", "--deep", "--snapshots"])?;

    // It goes on where the daemon died; what the snapshot needs stays, and its key.
    drop(nbd);
    daemon.kill()?;
    let daemon = site_a.start()?;
    let mut nbd = daemon.connect("acme/db")?;
    same_bytes("after the crash", &read_all(&mut nbd)?, &image)?;
    daemon.sync("acme/db")?;
    let mut last = None;
    until("all is encrypted anew but for the snapshot", || {
        thread::sleep(Duration::from_secs(3));
        let now = earliest_bytes(&daemon, "acme/db")?;
        let settled = now == last && daemon.show("acme/db")?["dead_bytes"] == 0;
        last = now;
        Ok(settled && now.is_some())
    })?;
    let expected = [(1, vec!["one".to_owned()]), (2, Vec::new())];
    ensure!(data_keys(&daemon, "acme/db")? == expected);
    daemon.quarry(&["volume", "verify", "acme/db", "--deep", "--snapshots"])?;
    let mut old = daemon.attach("acme/db@one", &[])?;
    same_bytes("the snapshot", &read_all(&mut old)?, &before)?;
    drop(old);
    detach(&daemon, "acme/db@one")?;

    // A clone made before has the key that it needs, and needs it until it is flattened.
    let mut copy = daemon.attach("acme/copy", &[])?;
    same_bytes("the clone", &read_all(&mut copy)?, &before)?;
    let done = daemon.json(&["volume", "rekey", "acme/copy", "--data"])?;
    ensure!(done["keys"] == 3, "{done}");
    until("the clone's own first key is dropped", || {
        Ok(data_keys(&daemon, "acme/copy")? == [(2, Vec::new())])
    })?;
    daemon.quarry(&["volume", "flatten", "acme/copy"])?;
    let of_parent = uuid_bytes(&id)?;
    until("its parent's key is dropped", || {
        let named = with_bytes(root, &of_parent)?;
        let named = named
            .iter()
            .filter(|path| !path.to_string_lossy().contains(&id));
        Ok(!named.into_iter().any(|path| path.ends_with("head")))
    })?;

    daemon.quarry(&["snapshot", "delete", "acme/db@one"])?;
    until("the first key is dropped", || {
        Ok(data_keys(&daemon, "acme/db")? == [(2, Vec::new())])
    })?;
    until("its wrapped form is nowhere", || {
        Ok(with_bytes(root, &wrapped)?.is_empty())
    })?;
    ensure!(StoreDir::of(root).objects("keys")?.len() == 2);
    let left = daemon.json(&["volume", "rekey", "acme/copy", "--key", "acme"])?;
    ensure!(left["keys"] == 1, "{left}");
    assert_no_mark(root, "rotated")?;
    drop((nbd, copy));
    for volume in ["acme/db", "acme/copy"] {
        daemon.quarry(&["volume", "verify", volume, "--deep"])?;
        detach(&daemon, volume)?;
    }
    daemon.stop()?;

    // What is there is all that another host needs; and without a head, what is in the copy.
    let (site_b, _) = site(root, "b", &keys)?;
    let daemon = site_b.start()?;
    let images = [("acme/db", &image), ("acme/copy", &before)];
    for (volume, expected) in images {
        let mut nbd = daemon.attach(volume, &[])?;
        same_bytes(volume, &read_all(&mut nbd)?, expected)?;
        drop(nbd);
        detach(&daemon, volume)?;
    }
    lose_head_and_rescue(&daemon, root, &id)?;
    let mut nbd = daemon.attach("acme/db", &["--discard-unsent"])?;
    same_bytes("rescued", &read_all(&mut nbd)?, &image)?;
    ensure!(data_keys(&daemon, "acme/db")? == [(2, Vec::new())]);
    daemon.quarry(&["volume", "verify", "acme/db", "--deep"])
}

/// `acme/db`, whose id this is, loses its head, and comes back with the keys of their copy.
fn lose_head_and_rescue(daemon: &Daemon, root: &Path, id: &str) -> Result<()> {
    let heads = StoreDir::of(root).objects("head")?;
    let mut heads = heads.iter();
    let head = heads.find(|head| head.to_string_lossy().contains(id));
    fs::remove_file(head.context("no head")?)?;
    let report = daemon.json(&["volume", "rescue", "acme/db", "--apply"])?;
    ensure!(report["keys"] == 1, "{report}");
    Ok(())
}

/// An id as it stands in the formats.
fn uuid_bytes(id: &str) -> Result<Vec<u8>> {
    let digits = id.replace('-', "");
    let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16);
    Ok((0..32).step_by(2).map(byte).collect::<Result<_, _>>()?)
}

#[test]
fn volume_without_its_key_is_not_attached_and_its_writer_not_disturbed() -> Result<()> {
    let dir = tempdir()?;
    let root = dir.path();
    let keys = key(&Site::with_folder(root, "a")?, "acme")?;
    let (site_a, ring) = site(root, "a", &keys)?;
    let writer = site_a.start()?;
    let mut nbd = writer.fresh_volume("acme/db", SIZE, &["--key", "acme"])?;
    nbd.write(0, &marked(0, 8, 1), true)?;

    let other = key(&site_a, "acme")?;
    let none = key(&site_a, "another")?;
    let (site_b, ring_b) = site(root, "b", &other)?;
    let daemon = site_b.start()?;
    let refused = |words: &[&str]| -> Result<()> {
        for way in [&["--force"][..], &["--read-only", "--force"]] {
            let call = ["volume", "attach", "acme/db", "--via", "nbd"];
            let ran = site_b.quarry_json(&[&call[..], way].concat())?;
            let refusal = ran.refusal()?;
            for word in words {
                ensure!(refusal.mentions(word), "{refusal:?} without {word}");
            }
        }
        Ok(())
    };
    refused(&["key acme", "another key of this name"])?;
    keyring(&ring_b, &none)?;
    refused(&["has no key acme", "keyring"])?;
    keyring(&ring_b, &keys)?;
    fs::set_permissions(&ring_b, fs::Permissions::from_mode(0o644))?;
    refused(&["0644", "chmod 600"])?;
    let create = [
        "volume", "create", "acme/x", "--size", "4MiB", "--key", "acme",
    ];
    ensure!(
        site_b
            .quarry_json(&create)?
            .refusal()?
            .mentions("chmod 600")
    );

    // Nobody has taken it from its writer.
    nbd.write(4096, &marked(8, 8, 1), true)?;
    writer.sync("acme/db")?;
    ensure!(writer.show("acme/db")?["problem"].is_null());
    // With a lost keyring what is attached goes on; nothing is attached anew.
    fs::remove_file(&ring)?;
    nbd.write(8192, &marked(16, 8, 1), true)?;
    writer.sync("acme/db")?;
    drop(nbd);
    detach(&writer, "acme/db")?;
    let ran = site_a.quarry_json(&["volume", "attach", "acme/db", "--via", "nbd"])?;
    ensure!(ran.refusal()?.mentions("cannot be read"));
    keyring(&ring, &keys)?;
    let mut nbd = writer.attach("acme/db", &[])?;
    let found = nbd.read_vec(0, 3 * 4096)?;
    same_bytes("with its key again", &found, &marked(0, 24, 1))?;
    daemon.stop()
}

#[test]
fn volume_of_a_tenant_with_a_key_is_encrypted_unless_it_is_told_not_to_be() -> Result<()> {
    let dir = tempdir()?;
    let keys = key(&Site::with_folder(dir.path(), "a")?, "acme")?;
    let (site, _) = site(dir.path(), "a", &keys)?;
    let daemon = site.start()?;
    daemon.quarry(&["tenant", "create", "acme", "--key", "acme"])?;
    daemon.create("acme/db", SIZE, &[])?;
    daemon.create("acme/open", SIZE, &["--no-encryption"])?;
    ensure!(daemon.show("acme/db")?["key"] == "acme");
    let open = daemon.show("acme/open")?;
    ensure!(
        open["encryption"] == "none" && open["key"].is_null(),
        "{open}"
    );
    // By the tenant's key, when none is named; what is not encrypted has none.
    daemon.quarry(&["volume", "rekey", "acme/db"])?;
    let refused = site.quarry_json(&["volume", "rekey", "acme/open"])?;
    ensure!(refused.refusal()?.mentions("not encrypted"));
    Ok(())
}

#[test]
fn service_of_keys_that_is_away_at_a_start_is_waited_for() -> Result<()> {
    let dir = tempdir()?;
    let root = dir.path();
    let (program, away) = (root.join("kms"), root.join("away"));
    let script = format!(
        "#!/bin/sh\n[ -e {} ] && {{ echo gone for lunch >&2; exit 1; }}\nexec tr '\\000-\\377' '\\200-\\377\\000-\\177'\n",
        away.display()
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700))?;
    let settings = format!("[keys]\ncommand = \"{}\"\n", program.display());
    let site = Site::with_folder(root, "a")?.settings(&settings);
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", SIZE, &["--key", "acme"])?;
    nbd.write(0, &marked(0, 8, 1), true)?;
    daemon.kill()?;
    fs::write(&away, "")?;
    let begun = Instant::now();
    let back = thread::spawn({
        let away = away.clone();
        move || {
            thread::sleep(Duration::from_secs(2));
            fs::remove_file(away)
        }
    });
    // Ready means that it is attached again, or cannot be.
    let daemon = site.start()?;
    back.join().expect("the thread does not panic")?;
    ensure!(begun.elapsed() > Duration::from_secs(2));
    let found = daemon.connect("acme/db")?.read_vec(0, 4096)?;
    same_bytes("after the restart", &found, &marked(0, 8, 1))?;
    ensure!(daemon.log().contains("gone for lunch"));
    Ok(())
}

/// Whether the mark is in the cache's file.
fn mark_in_cache(site: &Site) -> Result<bool> {
    let bytes = fs::read(site.cache())?;
    Ok(bytes.windows(MARK.len()).any(|window| window == MARK))
}

#[test]
fn cache_encrypted_holds_no_plaintext_and_what_was_flushed_survives_the_daemon() -> Result<()> {
    let dir = tempdir()?;
    let root = dir.path();
    let plain = Site::with_folder(root, "a")?.cache_size("64MiB");
    let keys = key(&plain, "host")?;
    let (site_b, ring) = site(root, "b", &keys)?;
    let settings = |encrypt: bool, name: &str| {
        format!(
            "[keys]\nkeyring = \"{}\"\n[cache]\nencrypt = {encrypt}\nkey = \"{name}\"\n\
             [writeback]\ndelay = \"1h\"\n",
            ring.display()
        )
    };
    let encrypted = site_b.cache_size("64MiB").settings(&settings(true, "host"));

    // What is looked for is found where it is not encrypted.
    let daemon = plain.start()?;
    let mut nbd = daemon.fresh_volume("acme/plain", SIZE, &[])?;
    nbd.write(0, &marked(0, 64, 0), true)?;
    ensure!(mark_in_cache(&plain)?);
    drop(nbd);
    detach(&daemon, "acme/plain")?;
    daemon.stop()?;

    let daemon = encrypted.start()?;
    ensure!(daemon.json(&["status"])?["cache"]["encrypted"] == true);
    let mut nbd = daemon.fresh_volume("acme/db", SIZE, &[])?;
    let shown = daemon.show("acme/db")?;
    let mode = shown["attached"]["mode"].as_str().context("no mode")?;
    ensure!(mode.contains("encrypted cache"), "{shown}");
    let mut image = marked(0, SIZE / 512, 1);
    nbd.write(0, &image, true)?;
    // Small, unaligned to pages, over what is there.
    for sector in (3..SIZE / 512).step_by(701) {
        let new = marked(sector, 3, 2);
        nbd.write(sector * 512, &new, false)?;
        let at = in_memory(sector * 512);
        let len = new.len().min(image.len() - at);
        image[at..at + len].copy_from_slice(&new[..len]);
    }
    nbd.flush()?;
    same_bytes("hits", &read_all(&mut nbd)?, &image)?;
    ensure!(!mark_in_cache(&encrypted)?, "plaintext of what was written");
    daemon.kill()?;
    ensure!(!mark_in_cache(&encrypted)?, "plaintext after a crash");

    // Without the key, with another, and by a daemon that is told nothing of it: refused, and nothing is lost.
    keyring(&ring, &key(&plain, "other")?)?;
    let refused = encrypted.serve_refused()?;
    ensure!(refused.stderr.contains("has no key host"), "{refused}");
    keyring(&ring, &key(&plain, "host")?)?;
    let refused = encrypted.serve_refused()?;
    ensure!(
        refused.stderr.contains("is not opened by key host"),
        "{refused}"
    );
    keyring(&ring, &keys)?;
    let refused = encrypted
        .clone()
        .settings(&settings(false, "host"))
        .serve_refused()?;
    ensure!(refused.stderr.contains("is encrypted"), "{refused}");
    let refused = plain.settings(&settings(true, "host")).serve_refused()?;
    ensure!(refused.stderr.contains("without encryption"), "{refused}");

    // It goes on with the key that it was made with, whatever cache.key says now.
    fs::write(&ring, format!("{keys}\n{}", key(&encrypted, "later")?))?;
    let daemon = encrypted.settings(&settings(true, "later")).start()?;
    let mut nbd = daemon.connect("acme/db")?;
    same_bytes("after the crash", &read_all(&mut nbd)?, &image)?;
    // What is uploaded is read from the cache: it is decrypted there, or the store would have noise.
    daemon.sync("acme/db")?;
    daemon.quarry(&["volume", "evict", "acme/db"])?;
    same_bytes("from the store", &read_all(&mut nbd)?, &image)?;
    // And fetched data are in the cache.
    daemon.quarry(&["volume", "warm", "acme/db"])?;
    let hits = daemon.show("acme/db")?["hit_bytes"]
        .as_u64()
        .context("hits")?;
    same_bytes("from the cache again", &read_all(&mut nbd)?, &image)?;
    let shown = daemon.show("acme/db")?;
    ensure!(
        shown["hit_bytes"].as_u64().context("hits")? >= hits + SIZE,
        "{shown}"
    );
    ensure!(
        !mark_in_cache(daemon.site())?,
        "plaintext of what was fetched"
    );
    Ok(())
}

/// A chunk of the log: its object, and its first frame in it.
struct Chunk {
    object: PathBuf,
    bytes: Vec<u8>,
    frame: std::ops::Range<usize>,
}

impl Chunk {
    fn read(object: &Path) -> Result<Self> {
        let bytes = fs::read(object)?;
        let u32_at = |at: usize| -> Result<usize> {
            let field = bytes.get(at..at + 4).context("cut off")?;
            Ok(usize::try_from(u32::from_le_bytes(field.try_into()?))?)
        };
        let start = u32_at(8)?;
        let end = start + 16 + u32_at(start + 8)?;
        ensure!(&bytes[start..start + 2] == b"QF" && end <= bytes.len());
        Ok(Self {
            object: object.to_owned(),
            frame: start..end,
            bytes,
        })
    }

    /// Volume, epoch, seq and frame index: what the frame's checksum begins with.
    fn identity(&self) -> [u8; 32] {
        let mut identity = [0; 32];
        // The header has the first three, in the same form.
        identity[..28].copy_from_slice(&self.bytes[16..44]);
        identity
    }

    /// Puts the other's first frame in the place of this one's, with a checksum that is right there.
    fn take_frame_of(&self, other: &Self) -> Result<()> {
        let mut frame = other.bytes[other.frame.clone()].to_vec();
        ensure!(frame.len() == self.frame.len(), "frames of other lengths");
        let covered = [&self.identity()[..], &frame[..12], &frame[16..]].concat();
        frame[12..16].copy_from_slice(&crc32c(&covered).to_le_bytes());
        let mut bytes = self.bytes.clone();
        bytes[self.frame.clone()].copy_from_slice(&frame);
        fs::set_permissions(&self.object, fs::Permissions::from_mode(0o600))?;
        Ok(fs::write(&self.object, bytes)?)
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1))
        })
    })
}

/// Two volumes of a chunk each, of one or two tenants, and one of two chunks.
const PLACES: [(&str, u64); 4] = [
    ("acme/db", 0),
    ("acme/db", 1),
    ("acme/other", 0),
    ("rival/db", 0),
];

#[test]
fn frame_moved_to_another_chunk_volume_or_tenant_is_refused_and_named() -> Result<()> {
    // The mover makes all checksums right: without encryption nobody notices.
    for encrypted in [false, true] {
        let dir = tempdir()?;
        let root = dir.path();
        let keys = key(&Site::with_folder(root, "a")?, "one")?;
        let (site_a, _) = site(root, "a", &keys)?;
        let daemon = site_a.start()?;
        let shape: Vec<&str> = match encrypted {
            true => [SHAPE, &["--key", "one"]].concat(),
            false => SHAPE.to_vec(),
        };
        let store = StoreDir::of(root);
        let mut chunks: Vec<Chunk> = Vec::new();
        for (number, (volume, place)) in (0..).zip(PLACES) {
            let known = store.objects("chunk")?;
            let mut nbd = match place {
                0 => daemon.fresh_volume(volume, SIZE, &shape)?,
                _ => daemon.connect(volume)?,
            };
            nbd.write(place * MIB, &marked(0, 8, number), true)?;
            daemon.sync(volume)?;
            let now = store.objects("chunk")?;
            let mut new = now.iter().filter(|object| !known.contains(object));
            chunks.push(Chunk::read(new.next().context("no new chunk")?)?);
        }
        for volume in ["acme/db", "acme/other", "rival/db"] {
            detach(&daemon, volume)?;
        }
        daemon.stop()?;
        for (from, to) in [(1, 0), (2, 0), (3, 0), (0, 3)] {
            let scratch = tempdir()?;
            store.copy_to(scratch.path())?;
            let copy = |chunk: &Chunk| Chunk {
                object: scratch.path().join("store").join(store.key(&chunk.object)),
                bytes: chunk.bytes.clone(),
                frame: chunk.frame.clone(),
            };
            copy(&chunks[to]).take_frame_of(&copy(&chunks[from]))?;
            let (site_b, _) = site(scratch.path(), "b", &keys)?;
            let daemon = site_b.start()?;
            let (volume, place) = PLACES[to];
            let mut nbd = daemon.attach(volume, &[])?;
            let found = nbd.read_vec(place * MIB, 4096);
            if encrypted {
                let error = found.expect_err("a moved frame was read");
                ensure!(error.errno() == Some(EIO), "{error}");
                let shown = daemon.show(volume)?;
                let problem = shown["problem"].as_str().context("no problem told")?;
                ensure!(
                    problem.contains(&store.key(&chunks[to].object)),
                    "{problem}"
                );
                ensure!(problem.contains("does not authenticate"), "{problem}");
                let verified = site_b.quarry(&["volume", "verify", volume, "--deep"])?;
                ensure!(verified.code == Some(1), "{verified}");
            } else {
                let moved = u64::try_from(from)?;
                same_bytes("the mover's", &found?, &marked(0, 8, moved))?;
            }
        }
    }
    Ok(())
}
