//! A tenant whose own store says that it has another's volume: it learns and spoils nothing of what this host has.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Site, StoreDir};
use tempfile::tempdir;

/// Copies of `acme/db` all that names its data, but not the data, into the store in `own`, where it is `globex/db`.
fn forge(home: &StoreDir, own: &Path) -> Result<()> {
    for object in home.objects("acme")? {
        let key = home.key(&object);
        if key.contains("/chunk/") {
            continue;
        }
        for key in [key.replace("acme", "globex"), key] {
            let to = own.join("store").join(key);
            fs::create_dir_all(to.parent().context("a key has parts")?)?;
            fs::copy(&object, &to)?;
        }
    }
    Ok(())
}

fn with_a_stranger(daemon: &Daemon, own: &Path) -> Result<()> {
    fs::create_dir_all(own)?;
    let url = format!("file://{}/store", own.display());
    daemon.quarry(&["tenant", "create", "globex", "--store", &url])
}

#[test]
fn tenant_that_names_anothers_chunks_gets_nothing_that_the_cache_has_of_them() -> Result<()> {
    let dir = tempdir()?;
    let own = dir.path().join("own");
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 16 * MIB, &[])?;
    nbd.write(0, &[7; 65536], true)?;
    // What was written is on the device, and what comes after is fetched, into memory too.
    daemon.sync("acme/db")?;
    daemon.quarry(&["volume", "evict", "acme/db"])?;
    ensure!(nbd.read_vec(0, 65536)? == [7; 65536]);
    nbd.write(1 << 20, &[8; 65536], true)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", "acme/db"])?;

    with_a_stranger(&daemon, &own)?;
    forge(&StoreDir::of(dir.path()), &own)?;
    let mut theirs = daemon.attach("globex/db", &[])?;
    for at in [0, 1 << 20] {
        ensure!(theirs.read_vec(at, 4096).is_err(), "read at {at}");
    }
    // Their volume is here, so that of the same id is not let in beside it; and then again.
    let both = site.quarry_json(&["volume", "attach", "acme/db"])?;
    let refusal = both.refusal()?;
    ensure!(refusal.mentions("another tenant"), "{refusal:?}");
    drop(theirs);
    daemon.quarry(&["volume", "detach", "globex/db"])?;
    let mut nbd = daemon.attach("acme/db", &[])?;
    ensure!(nbd.read_vec(0, 65536)? == [7; 65536]);
    ensure!(nbd.read_vec(1 << 20, 65536)? == [8; 65536]);
    drop(nbd);
    daemon.stop()
}

#[test]
fn tenant_that_names_anothers_volume_neither_takes_nor_drops_its_unsent_writes() -> Result<()> {
    let dir = tempdir()?;
    let own = dir.path().join("own");
    let site = Site::with_folder(dir.path(), "a")?;
    let home = StoreDir::of(dir.path());
    let daemon = site.start()?;
    with_a_stranger(&daemon, &own)?;
    let mut nbd = daemon.fresh_volume("acme/db", 16 * MIB, &[])?;
    nbd.write(0, &[7; 65536], true)?;
    daemon.sync("acme/db")?;
    forge(&home, &own)?;
    // Known to this host alone, and it is not served when the daemon is back: its name cannot be read.
    let name = home.objects("acme")?.into_iter();
    let mut name = name.filter(|object| home.key(object).ends_with("/db"));
    let name = name.next().context("the volume has a name")?;
    nbd.write(4096, &[9; 4096], true)?;
    daemon.kill()?;
    let sound = fs::read(&name)?;
    fs::write(&name, b"damaged")?;

    let daemon = site.start()?;
    for refused in [
        site.quarry_json(&["volume", "attach", "globex/db"])?,
        site.quarry_json(&["volume", "attach", "globex/db", "--discard-unsent"])?,
    ] {
        let refusal = refused.refusal()?;
        ensure!(refusal.mentions("another tenant"), "{refusal:?}");
    }
    daemon.quarry(&["volume", "delete", "globex/db", "--discard-unsent"])?;
    daemon.quarry(&["trash", "purge", "--all"])?;
    fs::write(&name, sound)?;
    let mut nbd = daemon.attach("acme/db", &[])?;
    ensure!(
        nbd.read_vec(4096, 4096)? == [9; 4096],
        "its writes are gone"
    );
    ensure!(nbd.read_vec(0, 4096)? == [7; 4096]);
    drop(nbd);
    daemon.stop()
}
