//! What a person sees: every step of a volume's life, and every refusal with its words.

use std::fs;
use std::path::Path;

use anyhow::Result;
use quarry_tests::{Daemon, MIB, Nbd, NbdError, Site, http_get, skip};
use serde_json::Value;
use tempfile::tempdir;

/// Whether a list answers with something of this name.
fn lists(answer: &Value, name: &str) -> bool {
    answer.to_string().contains(&format!("\"{name}\""))
}

#[test]
fn volume_life_from_create_to_delete_answers_each_step() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let log = daemon.log();
    assert!(log.contains("starting") && log.contains("file://"), "{log}");
    daemon.quarry(&["status"])?;
    daemon.quarry(&["tenant", "create", "acme"])?;
    assert!(lists(&daemon.json(&["tenant", "list"])?, "acme"));

    daemon.quarry(&["volume", "create", "acme/db", "--size", "64MiB"])?;
    let shown = daemon.show("acme/db")?;
    assert_eq!(shown["state"], "detached", "{shown}");
    assert_eq!(shown["size_bytes"], 64 * MIB, "{shown}");

    let attached = daemon.json(&["volume", "attach", "acme/db", "--via", "nbd"])?;
    assert_eq!(attached["volume"], "acme/db");
    assert_eq!(attached["via"], "nbd");
    let uri = attached["uri"].as_str().unwrap_or_default();
    assert!(uri.starts_with("nbd+unix:///acme/db?socket=/"), "{uri}");
    assert_eq!(daemon.show("acme/db")?["state"], "attached");

    let mut nbd = daemon.connect("acme/db")?;
    assert_eq!(nbd.size(), 64 * MIB);
    assert!(nbd.flags().all_commands() && nbd.flags().multi_conn());
    nbd.write(4096, &[1; 4096], false)?;
    nbd.flush()?;
    assert!(daemon.show("acme/db")?["dirty_bytes"].as_u64() >= Some(4096));
    daemon.sync("acme/db")?;
    assert_eq!(daemon.show("acme/db")?["dirty_bytes"], 0);
    nbd.disconnect()?;

    daemon.quarry(&["volume", "detach", "acme/db"])?;
    assert_eq!(daemon.show("acme/db")?["state"], "detached");
    daemon.quarry(&["volume", "delete", "acme/db"])?;
    let left = daemon.json(&["volume", "list"])?;
    assert!(!left.to_string().contains("db"), "{left}");
    let refused = site.quarry_json(&["tenant", "delete", "acme"])?.refusal()?;
    assert!(refused.mentions("--purge"), "{refused:?}");
    daemon.quarry(&["tenant", "delete", "acme", "--purge"])?;
    daemon.stop()
}

#[test]
fn direct_reads_that_cannot_be_are_told_of_and_keep_no_volume_from_being_attached() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    daemon.create("acme/db", 64 * MIB, &["--compression", "none"])?;
    let attach = [
        "volume",
        "attach",
        "acme/db",
        "--via",
        "nbd",
        "--direct-reads",
    ];
    let why = "NBD passes its data through the daemon";
    let attached = daemon.json(&attach)?;
    assert_eq!(attached["warning"], format!("no direct reads: {why}"));
    let mut nbd = daemon.connect("acme/db")?;
    nbd.write(0, &[7; 4096], true)?;
    nbd.disconnect()?;
    daemon.stop()?;
    let daemon = site.start()?;
    let shown = daemon.show("acme/db")?;
    assert_eq!(shown["attached"]["direct_reads"], false, "{shown}");
    assert_eq!(shown["attached"]["direct_reads_refused"], why, "{shown}");
    assert_eq!(daemon.connect("acme/db")?.read_vec(0, 4096)?, [7; 4096]);
    daemon.stop()
}

#[test]
fn volume_detached_and_attached_again_keeps_its_data() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    nbd.write(MIB, &[9; 8192], false)?;
    nbd.disconnect()?;
    daemon.quarry(&["volume", "detach", "acme/db"])?;
    let mut nbd = daemon.attach("acme/db", &[])?;
    assert!(nbd.read_vec(MIB, 8192)? == [9; 8192]);
    daemon.stop()
}

#[test]
fn daemon_restarted_attaches_what_it_had_attached() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut one = daemon.fresh_volume("acme/one", 64 * MIB, &[])?;
    let mut two = daemon.fresh_volume("acme/two", 64 * MIB, &["--compression", "zstd"])?;
    daemon.create("acme/idle", 64 * MIB, &[])?;
    one.write(0, &[1; 4096], true)?;
    two.write(0, &[2; 4096], true)?;
    daemon.stop()?;

    let daemon = site.start()?;
    assert!(daemon.connect("acme/one")?.read_vec(0, 4096)? == [1; 4096]);
    assert!(daemon.connect("acme/two")?.read_vec(0, 4096)? == [2; 4096]);
    assert_eq!(daemon.show("acme/idle")?["state"], "detached");
    daemon.stop()
}

/// The daemon dies, and the next is to attach as a block device what was attached by NBD.
fn restarted_to_attach_by_ublk(site: &Site, daemon: Daemon) -> Result<Daemon> {
    daemon.kill()?;
    let list = site.root().join("data/attached.json");
    let by_nbd = fs::read_to_string(&list)?;
    assert!(by_nbd.contains(r#""via":"nbd""#), "{by_nbd}");
    fs::write(&list, by_nbd.replace("nbd", "ublk"))?;
    site.start()
}

/// As one whose device cannot be had after a start: here because the kernel has none at all.
#[test]
fn volume_that_waits_to_be_attached_again_is_nobody_elses_until_it_is_detached() -> Result<()> {
    if Path::new("/dev/ublk-control").exists() {
        skip("this kernel has ublk");
        return Ok(());
    }
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    drop(nbd);
    let daemon = restarted_to_attach_by_ublk(&site, daemon)?;
    let shown = daemon.show("acme/db")?;
    assert_eq!(shown["state"], "attaching", "{shown}");
    assert!(shown["problem"].as_str().is_some(), "{shown}");
    let owner = shown["owner"]["cache"].clone();
    assert!(owner.is_string(), "{shown}");
    for (command, word) in [
        (
            ["volume", "delete", "acme/db"].as_slice(),
            "detach it first",
        ),
        (
            &["volume", "attach", "acme/db", "--via", "nbd"],
            "block device",
        ),
    ] {
        let refusal = site.quarry_json(command)?.refusal()?;
        assert!(
            refusal.kind == "conflict" && refusal.mentions(word),
            "{refusal:?}"
        );
    }
    // A snapshot has what the cache kept, and leaves the volume to this host.
    daemon.quarry(&["snapshot", "create", "acme/db@now"])?;
    let shown = daemon.show("acme/db")?;
    assert_eq!(shown["owner"]["cache"], owner, "{shown}");
    assert_eq!(shown["state"], "attaching", "{shown}");
    let mut now = daemon.attach("acme/db@now", &["--read-only"])?;
    assert_eq!(now.read_vec(0, 4096)?, [1; 4096]);
    now.disconnect()?;

    daemon.quarry(&["volume", "detach", "acme/db"])?;
    assert_eq!(daemon.show("acme/db")?["state"], "detached");
    let mut nbd = daemon.attach("acme/db", &[])?;
    assert_eq!(nbd.read_vec(0, 4096)?, [1; 4096]);
    drop(nbd);
    daemon.stop()
}

#[test]
fn waiting_volume_that_is_detached_says_what_stays_in_the_cache() -> Result<()> {
    if Path::new("/dev/ublk-control").exists() {
        skip("this kernel has ublk");
        return Ok(());
    }
    let dir = tempdir()?;
    // Nothing is uploaded by itself so soon.
    let site = Site::with_folder(dir.path(), "a")?.settings("[writeback]\ndelay = \"1h\"\n");
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    drop(nbd);
    let daemon = restarted_to_attach_by_ublk(&site, daemon)?;
    let refusal = site
        .quarry_json(&["volume", "detach", "acme/db"])?
        .refusal()?;
    assert!(refusal.mentions("never sent"), "{refusal:?}");
    assert_eq!(daemon.show("acme/db")?["state"], "detached");
    let mut nbd = daemon.attach("acme/db", &[])?;
    assert_eq!(nbd.read_vec(0, 4096)?, [1; 4096]);
    nbd.disconnect()?;
    daemon.quarry(&["volume", "detach", "acme/db"])?;
    daemon.stop()
}

#[test]
fn command_without_daemon_says_where_it_looked_and_what_to_do() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    for command in [["status"].as_slice(), &["volume", "list"]] {
        let refusal = site.quarry_json(command)?.refusal()?;
        assert!(refusal.mentions("q.sock"), "{refusal:?}");
        assert!(refusal.mentions("quarry serve"), "{refusal:?}");
        assert_eq!(refusal.stderr.lines().count(), 1, "{refusal:?}");
    }
    Ok(())
}

#[test]
fn command_on_wrong_thing_is_refused_by_its_name() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    daemon.create("acme/db", 64 * MIB, &[])?;
    let long = "x".repeat(64);
    let long = format!("acme/{long}");
    let refusals: &[(&[&str], &str)] = &[
        (
            &["volume", "attach", "acme/none", "--via", "nbd"],
            "acme/none",
        ),
        (
            &["volume", "attach", "acme/db", "--owner", "nobody-here"],
            "nobody-here",
        ),
        (
            &["volume", "attach", "acme/db", "--via=nbd", "--mode=0640"],
            "--via ublk",
        ),
        (&["volume", "show", "acme/none"], "acme/none"),
        (&["volume", "delete", "acme/none"], "acme/none"),
        (
            &["volume", "create", "acme/db", "--size", "1GiB"],
            "acme/db",
        ),
        (
            &["volume", "create", "nobody/db", "--size", "1GiB"],
            "nobody",
        ),
        (&["volume", "create", &long, "--size", "1GiB"], "63"),
        (&["volume", "create", "acme/Big", "--size", "1GiB"], "Big"),
        (&["volume", "create", "acme/odd", "--size", "1000B"], "512"),
        (&["volume", "create", "acme/nil", "--size", "0B"], "size"),
        (&["volume", "detach", "acme/db"], "acme/db"),
        (&["volume", "sync", "acme/db"], "acme/db"),
        (&["tenant", "create", "acme"], "acme"),
        (&["tenant", "delete", "acme"], "acme"),
        (&["tenant", "delete", "nobody"], "nobody"),
    ];
    for (command, word) in refusals {
        let refusal = site.quarry_json(command)?.refusal()?;
        assert!(refusal.mentions(word), "{command:?}: {refusal:?}");
    }
    assert_eq!(daemon.show("acme/db")?["state"], "detached");
    daemon.stop()
}

#[test]
fn attached_volume_cannot_be_attached_twice_or_deleted() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    let deleted = site.quarry_json(&["volume", "delete", "acme/db"])?;
    assert!(deleted.refusal()?.mentions("detach"));
    let again = site.quarry_json(&["volume", "attach", "acme/db", "--via", "nbd"])?;
    // Either the same answer again or a refusal that says so; never a second owner.
    if again.code != Some(0) {
        assert!(again.refusal()?.mentions("attached"));
    }
    nbd.write(0, &[3; 512], true)?;
    assert!(nbd.read_vec(0, 512)? == [3; 512]);
    daemon.stop()
}

#[test]
fn unknown_export_is_refused_by_name() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    drop(daemon.fresh_volume("acme/db", 64 * MIB, &[])?);
    let uri = daemon.uri("acme/db")?;
    let (_, socket) = uri.split_once("?socket=").unwrap_or_default();
    let refused = Nbd::connect(socket.as_ref(), "acme/other");
    assert!(matches!(refused, Err(NbdError::Refused(_))), "{refused:?}");
    daemon.stop()
}

#[test]
fn request_outside_or_off_the_blocks_is_refused_and_harmless() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &["--sector-size", "4096"])?;
    let size = nbd.size();
    assert_eq!(nbd.blocks().map(|blocks| blocks.minimum), Some(4096));
    assert!(nbd.write(size, &[1; 4096], false).is_err());
    assert!(nbd.write(size - 4096, &[1; 8192], false).is_err());
    assert!(nbd.write(512, &[1; 4096], false).is_err());
    assert!(nbd.write(0, &[1; 512], false).is_err());
    assert!(nbd.read(u64::MAX - 4095, &mut [0; 4096]).is_err());
    assert!(nbd.trim(size - 4096, 8192).is_err());
    assert!(nbd.write_zeroes(!4095, 4096, true).is_err());
    assert!(nbd.read_vec(0, size)?.iter().all(|byte| *byte == 0));
    daemon.stop()
}

#[test]
fn read_only_attachment_refuses_writes() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    nbd.write(0, &[5; 4096], false)?;
    nbd.disconnect()?;
    daemon.quarry(&["volume", "detach", "acme/db"])?;
    let mut nbd = daemon.attach("acme/db", &["--read-only"])?;
    assert!(nbd.flags().read_only());
    assert!(nbd.write(0, &[6; 4096], false).is_err());
    assert!(nbd.trim(0, 4096).is_err());
    assert!(nbd.read_vec(0, 4096)? == [5; 4096]);
    daemon.stop()
}

#[test]
fn sync_where_a_volume_is_only_read_is_refused_with_the_host_that_writes() -> Result<()> {
    let dir = tempdir()?;
    let (site, other) = (
        Site::with_folder(dir.path(), "a")?,
        Site::with_folder(dir.path(), "b")?,
    );
    let (writer, reader) = (site.start()?, other.start()?);
    let mut nbd = writer.fresh_volume("acme/db", 64 * MIB, &[])?;
    nbd.write(0, &[5; 4096], false)?;
    drop(reader.attach("acme/db", &["--read-only", "--force"])?);
    let refusal = other
        .quarry_json(&["volume", "sync", "acme/db"])?
        .refusal()?;
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy();
    assert_eq!(refusal.kind, "conflict", "{refusal:?}");
    assert!(refusal.mentions("reading only"), "{refusal:?}");
    assert!(refusal.mentions(&host), "{refusal:?}");
    writer.sync("acme/db")?;
    drop(nbd);
    reader.stop()?;
    writer.stop()
}

#[test]
fn what_a_daemon_keeps_on_its_host_is_its_users_alone() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    for (path, wanted) in [(site.root().join("data"), 0o700), (site.cache(), 0o600)] {
        let mode = fs::metadata(&path)?.permissions().mode() & 0o7777;
        assert_eq!(mode, wanted, "{}", path.display());
    }
    daemon.stop()
}

#[test]
fn cache_of_another_size_than_is_configured_is_told_of() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?.cache_size("64MiB");
    site.start()?.stop()?;
    let told = "cache.size is 96MiB";
    for (site, wanted) in [(site.clone(), false), (site.cache_size("96MiB"), true)] {
        let daemon = site.start()?;
        let doctor = site.quarry(&["doctor"])?;
        assert_eq!(doctor.stdout.contains(told), wanted, "{doctor}");
        let log = fs::read_to_string(site.log())?;
        assert_eq!(log.contains(told), wanted, "{log}");
        daemon.stop()?;
    }
    Ok(())
}

#[test]
fn doctor_fails_where_the_audit_log_cannot_be_written() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?
        .settings("[access]\naudit_log = \"/proc/none/audit\"\n");
    let daemon = site.start()?;
    let doctor = site.quarry(&["doctor"])?;
    assert_eq!(doctor.code, Some(1), "{doctor}");
    assert!(doctor.stdout.contains("/proc/none/audit"), "{doctor}");
    let data = site.root().join("data").display().to_string();
    assert!(
        doctor.stdout.contains(&format!("room in {data}")),
        "{doctor}"
    );
    daemon.stop()
}

/// 78 (`EX_CONFIG`): service managers do not try again.
#[test]
fn daemon_with_a_wrong_value_ends_with_the_code_of_the_configuration() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let refused = site.store("s3://bucket").serve_refused()?;
    assert_eq!(refused.code, Some(78), "{refused}");
    assert!(refused.stderr.contains("AWS_REGION"), "{refused}");
    Ok(())
}

#[test]
fn data_folder_that_cannot_be_is_named_with_its_key() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let file = dir.path().join("file");
    fs::write(&file, "")?;
    for path in [file.as_path(), Path::new("/proc/none")] {
        let refused = site.clone().data_at(path).serve_refused()?;
        let named = format!("the data folder {} cannot be used", path.display());
        assert!(refused.stderr.contains(&named), "{refused}");
        assert!(refused.stderr.contains("daemon.data_dir"), "{refused}");
    }
    Ok(())
}

#[test]
fn second_daemon_on_the_same_socket_is_refused() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let second = site.serve_refused()?;
    assert!(second.stderr.contains("q.sock"), "{second}");
    assert!(!second.stderr.contains("panicked"), "{second}");
    daemon.quarry(&["status"])?;
    daemon.stop()
}

#[test]
fn metrics_and_health_are_served_on_the_socket() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    drop(daemon.fresh_volume("acme/db", 64 * MIB, &[])?);
    assert_eq!(http_get(&site.socket(), "/healthz")?.status, 200);
    assert_eq!(http_get(&site.socket(), "/readyz")?.status, 200);
    assert_eq!(http_get(&site.socket(), "/nothing-here")?.status, 404);
    let metrics = daemon.metrics()?;
    let samples = metrics.lines().filter(|line| line.starts_with("quarry_"));
    assert!(samples.count() > 5, "{metrics}");
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let value = line.rsplit(' ').next().map(str::parse::<f64>);
        assert!(matches!(value, Some(Ok(_))), "not a sample: {line}");
    }
    daemon.stop()
}
