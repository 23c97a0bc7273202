//! Detaching and stopping where something is in the way: they end, and say what is left.

use std::fs;
use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    Daemon, FaultProxy, MIB, NbdError, SeaweedFs, Site, Stamps, StoreDir, free_port, seeded,
};
use serde_json::Value;
use tempfile::tempdir;

const VOLUME: &str = "acme/left";

/// What the daemon's log says of writes that somebody gave up.
const GIVEN_UP: &str = "given up: writes that the cache kept";

/// A volume that `old` had, wrote to in ignorance of its new owner, and detached, which says so; `new` has detached it
/// too. One page of what `old` keeps was never sent.
fn fenced_and_detached(old: &Site, new: &Site) -> Result<[Daemon; 2]> {
    let (first, second) = (old.start()?, new.start()?);
    let mut nbd = first.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    first.sync(VOLUME)?;
    drop(second.attach(VOLUME, &["--force"])?);
    let log = second.log();
    ensure!(
        log.contains("taken over by force") && log.contains(VOLUME),
        "{log}"
    );
    nbd.write(MIB, &[2; 4096], false)?;
    let begun = Instant::now();
    while first.show(VOLUME)?["state"] != "fenced" {
        ensure!(begun.elapsed() < Duration::from_secs(60), "never fenced");
        thread::sleep(Duration::from_millis(100));
    }
    drop(nbd);
    let detached = first.json(&["volume", "detach", VOLUME])?;
    ensure!(detached["unsent_bytes"] == 4096, "{detached}");
    let detached = second.json(&["volume", "detach", VOLUME])?;
    ensure!(detached["unsent_bytes"].is_null(), "{detached}");
    Ok([first, second])
}

/// Attaching is refused for the sake of unsent writes.
fn refuses_to_attach(site: &Site) -> Result<()> {
    let again = site.quarry_json(&["volume", "attach", VOLUME, "--via", "nbd"])?;
    let refusal = again.refusal()?;
    ensure!(refusal.mentions("--discard-unsent"), "{refusal:?}");
    Ok(())
}

#[test]
fn fenced_volume_is_detached_and_its_unsent_writes_are_remembered() -> Result<()> {
    let dir = tempdir()?;
    let old = Site::with_folder(dir.path(), "old")?;
    let new = Site::with_folder(dir.path(), "new")?;
    let [first, second] = fenced_and_detached(&old, &new)?;
    refuses_to_attach(&old)?;
    // To look at what the store has gives nothing up.
    let mut nbd = first.attach(VOLUME, &["--read-only", "--discard-unsent"])?;
    ensure!(nbd.read_vec(0, 4096)? == [1; 4096]);
    drop(nbd);
    first.quarry(&["volume", "detach", VOLUME])?;
    let again = old.quarry_json(&["volume", "detach", VOLUME])?.refusal()?;
    ensure!(
        again.kind == "conflict" && again.mentions("nothing to detach"),
        "{again:?}"
    );
    refuses_to_attach(&old)?;

    ensure!(!first.log().contains(GIVEN_UP), "{}", first.log());
    let mut nbd = first.attach(VOLUME, &["--discard-unsent"])?;
    ensure!(first.log().contains(GIVEN_UP), "{}", first.log());
    ensure!(nbd.read_vec(0, 4096)? == [1; 4096]);
    ensure!(nbd.read_vec(MIB, 4096)? == [0; 4096]);
    drop(nbd);
    first.quarry(&["volume", "detach", VOLUME])?;
    drop(first.attach(VOLUME, &[])?);
    first.stop()?;
    second.stop()
}

#[test]
fn volume_attached_on_the_host_that_is_asked_is_not_released_and_goes_on() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    let status = daemon.json(&["status"])?;
    let cache = status["cache"]["id"].as_str().unwrap_or_default();
    let release = ["volume", "release", VOLUME, "--from", cache];
    let refusal = site.quarry_json(&release)?.refusal()?;
    ensure!(refusal.mentions("quarry volume detach"), "{refusal:?}");
    nbd.write(0, &[1; 4096], true)?;
    daemon.sync(VOLUME)?;
    drop(nbd);
    daemon.stop()
}

#[test]
fn volume_deleted_gives_back_what_the_cache_kept_of_it() -> Result<()> {
    let dir = tempdir()?;
    let old = Site::with_folder(dir.path(), "old")?;
    let new = Site::with_folder(dir.path(), "new")?;
    let [first, second] = fenced_and_detached(&old, &new)?;
    ensure!(first.json(&["status"])?["cache"]["dirty_bytes"].as_u64() > Some(0));
    let refused = old.quarry_json(&["volume", "delete", VOLUME])?.refusal()?;
    ensure!(refused.mentions("--discard-unsent"), "{refused:?}");
    first.quarry(&["volume", "delete", VOLUME, "--discard-unsent"])?;
    ensure!(first.log().contains(GIVEN_UP), "{}", first.log());
    let status = first.json(&["status"])?;
    ensure!(status["cache"]["dirty_bytes"] == 0, "{status}");
    first.stop()?;
    let first = old.start()?;
    let status = first.json(&["status"])?;
    ensure!(status["cache"]["dirty_bytes"] == 0, "{status}");
    first.stop()?;
    second.stop()
}

#[test]
fn volume_attached_and_detached_many_times_leaves_the_cache_free() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.cache_size("64MiB");
    let daemon = site.start()?;
    daemon.create(VOLUME, 64 * MIB, &[])?;
    // More often than the cache has segments.
    for turn in 0..100_u64 {
        let mut nbd = daemon.attach(VOLUME, &[])?;
        nbd.write(turn * 4096, &[7; 4096], turn % 2 == 0)?;
        drop(nbd);
        daemon.quarry(&["volume", "detach", VOLUME])?;
    }
    let status = daemon.json(&["status"])?;
    ensure!(status["cache"]["dirty_bytes"] == 0, "{status}");
    daemon.stop()?;
    // Nor does the next daemon find anything that would have to be sent.
    let daemon = site.start()?;
    let status = daemon.json(&["status"])?;
    ensure!(status["cache"]["dirty_bytes"] == 0, "{status}");
    let mut nbd = daemon.attach(VOLUME, &[])?;
    ensure!(nbd.read_vec(0, 100 * 4096)?.iter().all(|byte| *byte == 7));
    daemon.stop()
}

#[test]
fn volume_with_a_damaged_map_is_detached_with_all_its_writes_sent() -> Result<()> {
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    daemon.create(VOLUME, 64 * MIB, &[])?;
    for turn in 0..2_u8 {
        let mut nbd = daemon.attach(VOLUME, &[])?;
        nbd.write(u64::from(turn) * MIB, &[turn + 1; 4096], false)?;
        drop(nbd);
        daemon.quarry(&["volume", "detach", VOLUME])?;
    }
    let mut nbd = daemon.attach(VOLUME, &[])?;
    // Its index is read with the attach; its leaves are not, until they are merged.
    for map in store.objects("map")? {
        let bytes = fs::read(&map)?;
        let hurt: Vec<u8> = bytes
            .iter()
            .enumerate()
            .map(|(at, byte)| if at < 32 { byte ^ 0x55 } else { *byte })
            .collect();
        fs::write(&map, hurt)?;
    }
    nbd.write(8 * MIB, &[9; 4096], false)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    let mut nbd = daemon.attach(VOLUME, &[])?;
    ensure!(nbd.read_vec(8 * MIB, 4096)? == [9; 4096]);
    daemon.stop()
}

#[test]
fn daemon_told_to_stop_with_the_store_away_ends_and_loses_nothing() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let (_, seed) = seeded("stop without a store");
    let stamps = Stamps::new(seed);
    let proxy = FaultProxy::start(server.address())?;
    let site = Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?
        .cache_size("64MiB")
        .settings("[daemon]\nstop_time_max = \"2s\"\n");
    let daemon = site.start()?;
    let nbd = daemon.fresh_volume(VOLUME, 256 * MIB, &[])?;
    proxy.cut();
    // Until the cache is full, and one write waits.
    let writer = thread::spawn(move || {
        let mut nbd = nbd;
        let mut acknowledged = 0;
        for at in (0..256 * MIB).step_by(1 << 18) {
            match nbd.write(at, &stamps.fill(at / 512, 512, 1), false) {
                Ok(()) => acknowledged = at + (1 << 18),
                Err(NbdError::Io(_)) => return acknowledged,
                Err(error) => panic!("a write failed before the end: {error}"),
            }
        }
        panic!("all of it was acknowledged without a store")
    });
    let begun = Instant::now();
    while daemon.show(VOLUME)?["stalled"] != true {
        ensure!(begun.elapsed() < Duration::from_secs(60), "never stalled");
        thread::sleep(Duration::from_millis(100));
    }
    let begun = Instant::now();
    daemon.stop()?;
    println!("the stop took {:?}", begun.elapsed());
    ensure!(begun.elapsed() < Duration::from_secs(20), "the stop hangs");
    let acknowledged = writer.join().expect("the writer does not panic");
    ensure!(acknowledged > 0);

    proxy.heal();
    let daemon = site.start()?;
    let mut nbd = daemon.connect(VOLUME)?;
    for at in (0..acknowledged).step_by(1 << 18) {
        let right = stamps.fill(at / 512, 512, 1);
        ensure!(nbd.read_vec(at, 1 << 18)? == right, "lost at {at}");
    }
    daemon.stop()
}

#[test]
fn start_with_another_cache_takes_nothing_off_the_list_of_the_right_one() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(0, &[3; 4096], true)?;
    drop(nbd);
    daemon.kill()?;
    // As if the file system that the cache is on were not mounted.
    let aside = site.root().join("aside");
    fs::rename(site.cache(), &aside)?;
    let daemon = site.start()?;
    let shown = daemon.show(VOLUME)?;
    let problem = shown["problem"].as_str().unwrap_or_default();
    ensure!(problem.contains("which is not this daemon's"), "{shown}");
    let doctor = site.quarry(&["doctor"])?;
    ensure!(
        doctor.code == Some(1) && doctor.stdout.contains("which is not this daemon's"),
        "{doctor}"
    );
    daemon.stop()?;
    fs::rename(aside, site.cache())?;
    let daemon = site.start()?;
    ensure!(daemon.connect(VOLUME)?.read_vec(0, 4096)? == [3; 4096]);
    daemon.stop()
}

#[test]
fn volume_that_another_cache_has_is_given_up_with_the_word_that_it_still_does() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    drop(daemon.fresh_volume(VOLUME, 64 * MIB, &[])?);
    let owner = daemon.show(VOLUME)?["owner"]["cache"].clone();
    let cache = owner.as_str().context("nobody has it")?;
    daemon.kill()?;
    fs::rename(site.cache(), site.root().join("aside"))?;
    let daemon = site.start()?;
    let shown = daemon.show(VOLUME)?;
    ensure!(shown["problem"].is_string(), "{shown}");
    let told = site.quarry_json(&["volume", "detach", VOLUME])?.refusal()?;
    for words in ["given up here", "nothing of it was sent", cache] {
        ensure!(told.mentions(words), "no {words}: {told:?}");
    }
    let shown = daemon.show(VOLUME)?;
    ensure!(shown["state"] == "attached elsewhere", "{shown}");
    ensure!(shown["owner"]["cache"] == owner, "{shown}");
    daemon.stop()
}

#[test]
fn daemon_that_cannot_serve_does_not_end_the_one_that_does() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let mut daemon = site.start()?;
    drop(daemon.fresh_volume(VOLUME, 64 * MIB, &[])?);
    let nobody = site
        .clone()
        .settings("[access]\noperators = [\"nobody-has-this-name\"]\n");
    let refused = nobody.replace_refused()?;
    ensure!(refused.stderr.contains("nobody-has-this-name"), "{refused}");
    let other = site
        .clone()
        .settings("[access]\naudit_required = true\naudit_log = \"/proc/none/audit\"\n");
    let refused = other.replace_refused()?;
    ensure!(refused.stderr.contains("audit"), "{refused}");
    daemon.assert_alive()?;
    ensure!(daemon.connect(VOLUME)?.read_vec(0, 4096)? == [0; 4096]);
    daemon.stop()
}

/// What is wrong shows before the one that serves is told to stop.
#[test]
fn reload_with_a_cache_an_address_or_a_socket_that_cannot_be_had_leaves_the_daemon_serving()
-> Result<()> {
    let dir = tempdir()?;
    let neighbour = Site::with_folder(dir.path(), "b")?;
    let beside = neighbour.start()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(0, &[5; 4096], true)?;

    let at = |name: &str| dir.path().join(name);
    fs::write(at("foreign"), [b'x'; 8192])?;
    fs::create_dir(at("folder"))?;
    let mut start = vec![0; 2 << 20];
    fs::File::open(site.cache())?.read_exact(&mut start)?;
    fs::write(at("shortened"), start)?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?;
    let daemon_with = |setting: String| site.clone().settings(&format!("[daemon]\n{setting}\n"));
    let socket = |path: &Path| daemon_with(format!("nbd_socket = \"{}\"", path.display()));
    let cache = |path: &Path| site.clone().cache_at(path);
    let mistakes = [
        (cache(&at("foreign")), "not a Quarry cache"),
        (cache(&at("folder")), "cannot open the cache"),
        (cache(&at("shortened")), "cut short"),
        (cache(&at("none/cache")), "make its folder"),
        (
            cache(&at("new")).cache_size("1000000GiB"),
            "cannot allocate",
        ),
        (cache(&neighbour.cache()), "in use by another daemon"),
        (site.clone().listen_at(address), "cannot listen on"),
        (
            daemon_with(format!("nbd_listen = \"{address}\"")),
            "cannot listen on",
        ),
        (socket(&at("none/nbd.sock")), "the socket cannot be opened"),
        (socket(&at("foreign")), "a file that is not a socket"),
        (
            socket(&neighbour.root().join("q-nbd.sock")),
            "another daemon is listening",
        ),
    ];
    for (wrong, words) in mistakes {
        let refused = wrong.reload_refused()?;
        ensure!(refused.stderr.contains(words), "{words}: {refused}");
        ensure!(refused.stderr.contains("serves on"), "{refused}");
        daemon.assert_alive()?;
        ensure!(nbd.read_vec(0, 4096)? == [5; 4096]);
    }
    ensure!(!at("new").exists(), "a cache was made");
    drop((nbd, taken));
    beside.stop()?;
    daemon.stop()
}

/// As if the file system that the cache is on had been mounted elsewhere, while the daemon serves.
#[test]
fn daemon_with_another_cache_does_not_end_the_one_that_serves() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(0, &[5; 4096], true)?;
    let status = daemon.json(&["status"])?;
    let id = status["cache"]["id"].as_str().unwrap_or_default();
    let elsewhere = Site::with_folder(dir.path(), "b")?;
    elsewhere.start()?.stop()?;
    let new = site.clone().cache_at(&dir.path().join("new"));
    for wrong in [&new, &site.clone().cache_at(&elsewhere.cache())] {
        let refused = wrong.replace_refused()?;
        ensure!(refused.code == Some(78), "{refused}");
        for words in [VOLUME, "cache.path", id] {
            ensure!(refused.stderr.contains(words), "{words}: {refused}");
        }
        daemon.assert_alive()?;
        ensure!(nbd.read_vec(0, 4096)? == [5; 4096]);
    }
    ensure!(!new.cache().exists(), "a cache was made");
    drop(nbd);

    // With nothing to attach again any cache will do.
    daemon.quarry(&["volume", "detach", VOLUME])?;
    let daemon = daemon.replaced_by(&new)?;
    ensure!(daemon.attach(VOLUME, &[])?.read_vec(0, 4096)? == [5; 4096]);
    daemon.stop()
}

#[test]
fn daemon_with_the_data_folder_of_another_is_refused_until_that_ends() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(0, &[5; 4096], true)?;
    let beside = Site::with_folder(dir.path(), "b")?;
    let intruder = beside.clone().data_at(&site.data());
    let serves = beside.start()?;
    let refused = intruder.replace_refused()?;
    ensure!(refused.stderr.contains("--data-dir"), "{refused}");
    serves.quarry(&["status"])?;
    serves.stop()?;
    let refused = intruder.serve_refused()?;
    ensure!(refused.stderr.contains("--data-dir"), "{refused}");
    daemon.assert_alive()?;
    ensure!(nbd.read_vec(0, 4096)? == [5; 4096]);
    drop(nbd);

    let daemon = daemon.replaced_by(&site)?;
    ensure!(daemon.connect(VOLUME)?.read_vec(0, 4096)? == [5; 4096]);
    daemon.kill()?;
    let daemon = site.start()?;
    ensure!(daemon.connect(VOLUME)?.read_vec(0, 4096)? == [5; 4096]);
    daemon.stop()
}

#[test]
fn daemon_replaced_hands_over_its_cache_its_addresses_and_its_sockets() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let nbd_listen = format!("127.0.0.1:{}", free_port());
    let site = site.settings(&format!("[daemon]\nnbd_listen = \"{nbd_listen}\"\n"));
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(0, &[5; 4096], true)?;
    drop(nbd);
    let daemon = daemon.replaced_by(&site)?;
    ensure!(daemon.connect(VOLUME)?.read_vec(0, 4096)? == [5; 4096]);
    drop(TcpStream::connect(&nbd_listen)?);
    daemon.stop()
}

#[test]
fn daemon_with_another_store_neither_starts_nor_ends_the_one_that_serves() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let mut daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(0, &[5; 4096], true)?;
    let there = dir.path().join("another");
    let misspelt = site.clone().store(&format!("file://{}", there.display()));
    let refused = misspelt.replace_refused()?;
    // It may be there later.
    ensure!(refused.code == Some(1), "{refused}");
    ensure!(refused.stderr.contains(VOLUME), "{refused}");
    ensure!(!there.exists(), "the other store was made");
    let elsewhere =
        Site::with_folder(dir.path(), "b")?.store(&format!("file://{}", there.display()));
    elsewhere.start()?.stop()?;
    let refused = misspelt.replace_refused()?;
    ensure!(refused.code == Some(78), "{refused}");
    ensure!(refused.stderr.contains(VOLUME), "{refused}");
    daemon.assert_alive()?;
    ensure!(nbd.read_vec(0, 4096)? == [5; 4096]);
    drop(nbd);
    daemon.stop()?;
    let refused = misspelt.serve_refused()?;
    ensure!(refused.code == Some(78), "{refused}");

    // The store itself, moved there.
    fs::remove_dir_all(&there)?;
    fs::rename(dir.path().join("store"), &there)?;
    let daemon = misspelt.start()?;
    ensure!(daemon.connect(VOLUME)?.read_vec(0, 4096)? == [5; 4096]);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.stop()?;
    // With nothing to attach again any store will do.
    site.start()?.stop()
}

/// The list of an older daemon, and a wrong letter at the first start of this one.
#[test]
fn volume_of_a_list_that_names_no_store_comes_back_from_its_own_after_a_start_over_another()
-> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    nbd.write(0, &[5; 4096], true)?;
    drop(nbd);
    daemon.stop()?;
    let path = site.root().join("data/attached.json");
    let mut list: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let fields = list.as_object_mut().context("the list is no object")?;
    ensure!(fields.remove("store").is_some(), "it names no store");
    fs::write(&path, serde_json::to_vec(&list)?)?;
    let there = dir.path().join("another");
    let misspelt = site.clone().store(&format!("file://{}", there.display()));
    misspelt.start()?.stop()?;
    let daemon = site.start()?;
    ensure!(daemon.connect(VOLUME)?.read_vec(0, 4096)? == [5; 4096]);
    daemon.stop()?;
    // That it is there is noted.
    let refused = misspelt.serve_refused()?;
    ensure!(refused.code == Some(78), "{refused}");
    ensure!(refused.stderr.contains(VOLUME), "{refused}");
    Ok(())
}

#[test]
fn looking_at_a_volume_does_not_wait_for_a_change_of_it_that_hangs() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let proxy = FaultProxy::start(server.address())?;
    let site = Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?;
    let daemon = site.start()?;
    let nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    proxy.hang(Some("/head"));
    let resize = ["volume", "resize", VOLUME, "128MiB"];
    let mut resizing = site.command(&resize).spawn()?;
    thread::sleep(Duration::from_millis(500));
    for look in [
        &["status"][..],
        &["volume", "show", VOLUME],
        &["volume", "list"],
    ] {
        let begun = Instant::now();
        daemon.quarry(look)?;
        let took = begun.elapsed();
        ensure!(took < Duration::from_secs(3), "{look:?} took {took:?}");
    }
    ensure!(resizing.try_wait()?.is_none(), "the change did not hang");
    proxy.hang(None);
    // Done or given up in the end, after the time of a control call.
    let grown = resizing.wait()?.success();
    let size = daemon.show(VOLUME)?["size_bytes"].as_u64();
    ensure!(!grown || size == Some(128 * MIB), "{size:?}");
    drop(nbd);
    daemon.stop()
}
