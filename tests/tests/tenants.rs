//! What tenants may have, where their volumes are, and that one's trouble is not another's.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, FaultProxy, MIB, Nanio, SeaweedFs, Site, StoreDir, in_time};
use tempfile::tempdir;

/// Longest time that a call takes for a tenant whose store is sound, on a busy machine too.
const CALL_TIME_MAX: Duration = Duration::from_secs(15);
/// And until what it has is there again after a start.
const START_TIME_MAX: Duration = Duration::from_secs(20);

/// Refused for a quota: with all of these words.
fn ensure_refused(daemon: &Daemon, arguments: &[&str], words: &[&str]) -> Result<()> {
    let refusal = daemon.site().quarry_json(arguments)?.refusal()?;
    ensure!(refusal.kind == "conflict", "{refusal:?}");
    for word in words {
        ensure!(refusal.mentions(word), "no {word} in {refusal:?}");
    }
    Ok(())
}

#[test]
fn quotas_are_refused_with_figure_and_limit_and_raised_at_once() -> Result<()> {
    let dir = tempdir()?;
    let daemon = Site::with_folder(dir.path(), "a")?.start()?;
    let made = [
        "tenant",
        "create",
        "acme",
        "--max-bytes",
        "128MiB",
        "--max-volumes",
        "3",
        "--max-snapshots",
        "1",
    ];
    daemon.quarry(&made)?;
    let create = |name: &str, size: &str| {
        let volume = format!("acme/{name}");
        daemon
            .site()
            .quarry_json(&["volume", "create", &volume, "--size", size])
    };
    create("one", "64MiB")?.ok()?;
    ensure_refused(
        &daemon,
        &["volume", "create", "acme/two", "--size", "65MiB"],
        &[
            "provisioned bytes",
            "129MiB of 128MiB",
            "quarry tenant update",
        ],
    )?;
    create("two", "64MiB")?.ok()?;
    ensure_refused(
        &daemon,
        &["volume", "resize", "acme/one", "65MiB"],
        &["provisioned", "129MiB of 128MiB"],
    )?;
    drop(daemon.attach("acme/one", &[])?);
    ensure_refused(
        &daemon,
        &["volume", "resize", "acme/one", "65MiB"],
        &["provisioned", "129MiB of 128MiB"],
    )?;
    daemon.quarry(&["tenant", "update", "acme", "--max-bytes", "200MiB"])?;
    daemon.quarry(&["volume", "resize", "acme/one", "65MiB"])?;

    daemon.quarry(&["snapshot", "create", "acme/one@a"])?;
    ensure_refused(
        &daemon,
        &["snapshot", "create", "acme/one@b"],
        &["snapshots", "1"],
    )?;
    daemon.quarry(&["volume", "clone", "acme/one@a", "acme/three"])?;
    ensure_refused(
        &daemon,
        &["volume", "clone", "acme/one@a", "acme/four"],
        &["3 volumes", "4 of 3"],
    )?;

    // One in the trash is none; brought back it is one.
    daemon.quarry(&["volume", "delete", "acme/two"])?;
    create("four", "1MiB")?.ok()?;
    ensure_refused(&daemon, &["volume", "restore", "acme/two"], &["volumes"])?;
    let shown = daemon.json(&["tenant", "show", "acme"])?;
    let usage = &shown["usage"];
    ensure!(usage["volumes"] == 3 && usage["snapshots"] == 1, "{shown}");
    ensure!(usage["provisioned_bytes"] == 131 * MIB, "{shown}");
    daemon.quarry(&["tenant", "update", "acme", "--max-volumes", "none"])?;
    daemon.quarry(&["volume", "restore", "acme/two"])?;

    daemon.quarry(&["tenant", "update", "acme", "--max-stored-bytes", "1B"])?;
    daemon.quarry(&["volume", "sync", "acme/one"])?;
    let mut nbd = daemon.connect("acme/one")?;
    nbd.write(0, &[7; 4096], true)?;
    daemon.sync("acme/one")?;
    ensure_refused(
        &daemon,
        &["volume", "create", "acme/five", "--size", "1MiB"],
        &["in the store"],
    )?;
    // Only making is refused: what is there is written to.
    nbd.write(4096, &[8; 4096], true)?;
    drop(nbd);
    daemon.stop()
}

#[test]
fn quota_holds_when_two_hosts_make_volumes_at_once() -> Result<()> {
    const MAX: usize = 6;
    let dir = tempdir()?;
    let sites = [
        Site::with_folder(dir.path(), "a")?,
        Site::with_folder(dir.path(), "b")?,
    ];
    let daemons = [sites[0].start()?, sites[1].start()?];
    daemons[0].quarry(&[
        "tenant",
        "create",
        "acme",
        "--max-volumes",
        &MAX.to_string(),
    ])?;
    let makers: Vec<_> = (0..MAX * 2)
        .map(|number| {
            let site = sites[number % 2].clone();
            thread::spawn(move || -> Result<bool> {
                let volume = format!("acme/v{number}");
                let begun = Instant::now();
                loop {
                    let call = ["volume", "create", &volume, "--size", "1MiB"];
                    let ran = site.quarry_json(&call)?;
                    if ran.code == Some(0) {
                        return Ok(true);
                    }
                    let refusal = ran.refusal()?;
                    ensure!(refusal.kind == "conflict", "{refusal:?}");
                    if !refusal.mentions("try again") {
                        return Ok(false);
                    }
                    ensure!(begun.elapsed() < Duration::from_secs(60), "{refusal:?}");
                    thread::sleep(Duration::from_millis(20));
                }
            })
        })
        .collect();
    let mut made = 0;
    for maker in makers {
        made += usize::from(maker.join().expect("a maker does not panic")?);
    }
    ensure!(made == MAX, "{made} of {MAX} were made");
    let listed = daemons[1].json(&["volume", "list", "--tenant", "acme"])?;
    let listed = listed["volumes"].as_array().context("a list")?.len();
    ensure!(listed == MAX, "{listed} are listed");
    // Nothing that was reserved is left.
    for daemon in daemons {
        daemon.stop()?;
    }
    let record = fs::read(dir.path().join("store/tenants/acme"))?;
    ensure!(!String::from_utf8_lossy(&record).contains("reservations"));
    Ok(())
}

#[test]
fn tenant_with_a_store_of_its_own_has_nothing_in_the_daemons() -> Result<()> {
    let dir = tempdir()?;
    let own = dir.path().join("own");
    let url = format!("file://{}/store", own.display());
    fs::create_dir_all(&own)?;
    let sites = [
        Site::with_folder(dir.path(), "a")?,
        Site::with_folder(dir.path(), "b")?,
    ];
    let daemon = sites[0].start()?;
    daemon.quarry(&["tenant", "create", "acme", "--store", &url])?;
    let mut nbd = daemon.fresh_volume("acme/db", 16 * MIB, &[])?;
    nbd.write(0, &[7; 4096], true)?;
    daemon.sync("acme/db")?;
    daemon.quarry(&["snapshot", "create", "acme/db@a"])?;
    let home = StoreDir::of(dir.path());
    ensure!(home.objects("t")?.is_empty(), "in the daemon's store");
    ensure!(
        !StoreDir::of(&own).objects("chunk")?.is_empty(),
        "not in its own"
    );
    let moved = daemon
        .site()
        .quarry_json(&["tenant", "update", "acme", "--store", "none"])?;
    let refusal = moved.refusal()?;
    ensure!(refusal.mentions("nothing in it"), "{refusal:?}");
    drop(nbd);
    daemon.stop()?;

    // The same host again, and another.
    let daemon = sites[0].start()?;
    ensure!(daemon.connect("acme/db")?.read_vec(0, 4096)? == [7; 4096]);
    daemon.quarry(&["volume", "detach", "acme/db"])?;
    daemon.stop()?;
    let other = sites[1].start()?;
    ensure!(other.attach("acme/db", &[])?.read_vec(0, 4096)? == [7; 4096]);
    other.quarry(&["volume", "detach", "acme/db"])?;
    other.quarry(&["snapshot", "delete", "acme/db@a"])?;
    other.quarry(&["volume", "delete", "acme/db"])?;
    other.quarry(&["tenant", "delete", "acme", "--purge"])?;
    ensure!(
        StoreDir::of(&own).objects("t")?.is_empty(),
        "something is left"
    );
    other.stop()
}

#[test]
fn tenant_in_a_bucket_of_its_own_uses_the_keys_of_its_profile() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let environment = server.client_environment(server.address());
    let of = |name: &str| {
        let mut all = environment.iter();
        all.find(|(n, _)| n == name)
            .map(|(_, v)| v.clone())
            .unwrap_or_default()
    };
    let profiles = dir.path().join("credentials");
    let profile = format!(
        "[acme]\naws_access_key_id = {}\naws_secret_access_key = {}\n\n[wrong]\naws_access_key_id = nobody\naws_secret_access_key = hunter2\n",
        of("AWS_ACCESS_KEY_ID"),
        of("AWS_SECRET_ACCESS_KEY")
    );
    fs::write(&profiles, profile)?;
    // The daemon's own store is a folder: no keys but those of the profile.
    let site = Site::with_folder(dir.path(), "a")?.settings(&format!(
        "[store]\ncredentials_file = {profiles:?}\n[prices]\nput = 5.0\n"
    ));
    let daemon = site.start()?;
    let endpoint = of("AWS_ENDPOINT_URL");
    let create = |name: &str, credentials: &str| {
        daemon.site().quarry_json(&[
            "tenant",
            "create",
            name,
            "--store",
            "s3://acme-volumes/q",
            "--endpoint",
            &endpoint,
            "--region",
            "us-east-1",
            "--credentials",
            credentials,
        ])
    };
    for (credentials, word) in [
        ("profile:wrong", "acme-volumes"),
        ("profile:nobody", "profile:nobody"),
        ("AKIA", "profile:NAME"),
    ] {
        let refusal = create("acme", credentials)?.refusal()?;
        ensure!(refusal.mentions(word), "{refusal:?}");
        ensure!(!refusal.mentions("hunter2"), "{refusal:?}");
    }
    ensure!(daemon.json(&["tenant", "list"])?["tenants"] == serde_json::json!([]));
    create("acme", "profile:acme")?.ok()?;
    let mut nbd = daemon.fresh_volume("acme/db", 16 * MIB, &[])?;
    nbd.write(0, &[7; 4096], true)?;
    daemon.sync("acme/db")?;
    let objects = server.objects("acme-volumes")?;
    ensure!(
        objects.keys().any(|key| key.starts_with("q/t/acme/v/")),
        "{objects:?}"
    );

    // What it asked for is told, and what that costs: 5 for 1,000 objects written.
    let shown = daemon.json(&["tenant", "show", "acme"])?;
    let requests = &shown["requests"];
    let puts = requests["puts"].as_f64().context("puts")?;
    let cost = requests["cost"].as_f64().context("a cost")?;
    ensure!(puts > 3.0 && (cost - puts * 0.005).abs() < 1e-6, "{shown}");
    let volume = daemon.show("acme/db")?;
    ensure!(
        volume["requests"]["puts"].as_f64().context("puts")? >= 1.0,
        "{volume}"
    );
    let requests = |operation| daemon.count("quarry_tenant_store_requests_total", operation);
    let written = requests("operation=\"create\"")? + requests("operation=\"replace\"")?;
    ensure!(written as f64 >= puts, "{written}");
    drop(nbd);
    daemon.quarry(&["volume", "detach", "acme/db"])?;

    // Another way to the same server is taken, another server is not: what it has is not there.
    let proxy = FaultProxy::start(server.address())?;
    let way = |address| format!("http://{address}");
    let update = |endpoint: &str| {
        let update = ["tenant", "update", "acme", "--endpoint", endpoint];
        daemon.site().quarry_json(&update)
    };
    update(&way(proxy.address()))?.ok()?;
    let mut nbd = daemon.attach("acme/db", &[])?;
    ensure!(nbd.read_vec(0, 4096)? == [7; 4096]);
    let elsewhere = tempdir()?;
    if let Some(other) = SeaweedFs::start(elsewhere.path())? {
        let refusal = update(&way(other.address()))?.refusal()?;
        ensure!(
            refusal.kind == "conflict" && refusal.mentions("acme/db is not in the store"),
            "{refusal:?}"
        );
    }
    drop(nbd);
    daemon.stop()
}

#[test]
fn store_that_ignores_conditions_is_refused_for_a_tenant() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = Nanio::start(dir.path())? else {
        return Ok(());
    };
    let environment = server.client_environment();
    let endpoint = environment
        .iter()
        .find(|(name, _)| name == "AWS_ENDPOINT_URL")
        .map(|(_, url)| url.clone())
        .context("an endpoint")?;
    let mut site = Site::with_folder(dir.path(), "a")?;
    for (name, value) in environment
        .iter()
        .filter(|(name, _)| name != "AWS_ENDPOINT_URL")
    {
        site = site.env(name, value);
    }
    let daemon = site.start()?;
    let create = [
        "tenant",
        "create",
        "acme",
        "--store",
        "s3://volumes/q",
        "--endpoint",
        &endpoint,
    ];
    let refusal = daemon.site().quarry_json(&create)?.refusal()?;
    ensure!(refusal.kind == "unsupported", "{refusal:?}");
    ensure!(
        refusal.mentions("If-None-Match") && refusal.mentions("destroy"),
        "{refusal:?}"
    );
    ensure!(daemon.json(&["tenant", "list"])?["tenants"] == serde_json::json!([]));
    daemon.stop()
}

#[test]
fn tenant_whose_store_is_away_hides_and_holds_up_no_other() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let proxy = FaultProxy::start(server.address())?;
    let mut site = Site::with_folder(dir.path(), "a")?;
    for (name, value) in server.client_environment(proxy.address()) {
        site = site.env(&name, &value);
    }
    let daemon = site.start()?;
    daemon.quarry(&["tenant", "create", "far", "--store", "s3://far/q"])?;
    let mut far = daemon.fresh_volume("far/db", 16 * MIB, &[])?;
    far.write(0, &[7; 4096], true)?;
    daemon.sync("far/db")?;
    proxy.cut();
    let mut near = in_time("create and attach", CALL_TIME_MAX, || {
        daemon.fresh_volume("near/db", 16 * MIB, &[])
    })?;
    in_time("write", CALL_TIME_MAX, || {
        Ok(near.write(0, &[8; 4096], true)?)
    })?;
    in_time("sync", CALL_TIME_MAX, || daemon.sync("near/db"))?;
    // What is attached is known without its store.
    let listed = daemon.json(&["volume", "list"])?.to_string();
    ensure!(
        listed.contains("\"near\"") && listed.contains("\"far\""),
        "{listed}"
    );
    ensure!(far.read_vec(0, 4096)? == [7; 4096]);
    far.write(4096, &[9; 4096], true)?;
    in_time("detach", CALL_TIME_MAX, || {
        daemon.quarry(&["volume", "detach", "near/db"])
    })?;
    proxy.heal();
    daemon.sync("far/db")?;
    drop((far, near));
    daemon.stop()
}

#[test]
fn tenant_whose_store_is_away_at_a_start_holds_up_no_other() -> Result<()> {
    /// More than are attached again at once.
    const VOLUMES: usize = 10;
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let proxy = FaultProxy::start(server.address())?;
    let mut site = Site::with_folder(dir.path(), "a")?;
    for (name, value) in server.client_environment(proxy.address()) {
        site = site.env(&name, &value);
    }
    let daemon = site.start()?;
    // By its name it comes first.
    daemon.quarry(&["tenant", "create", "afar", "--store", "s3://afar/q"])?;
    for number in 0..VOLUMES {
        drop(daemon.fresh_volume(&format!("afar/v{number}"), 16 * MIB, &[])?);
    }
    daemon
        .fresh_volume("near/db", 16 * MIB, &[])?
        .write(0, &[8; 4096], true)?;
    daemon.stop()?;
    proxy.cut();
    // Ready, though they are not back.
    let (daemon, mut near) = in_time("start", START_TIME_MAX, || {
        let daemon = site.start()?;
        let near = daemon.connect("near/db")?;
        Ok((daemon, near))
    })?;
    ensure!(near.read_vec(0, 4096)? == [8; 4096]);
    drop(near);
    let doctor = site.quarry(&["doctor"])?;
    ensure!(doctor.code == Some(1), "{doctor}");
    ensure!(
        doctor.stdout.contains("afar") && doctor.stdout.contains("FAILED"),
        "{doctor}"
    );
    proxy.heal();
    let begun = Instant::now();
    while daemon.connect("afar/v9").is_err() {
        ensure!(
            begun.elapsed() < Duration::from_secs(90),
            "{}",
            daemon.log()
        );
        thread::sleep(Duration::from_millis(200));
    }
    // What else waited is attached again by and by.
    while let Err(error) = site.quarry(&["doctor"])?.ok() {
        ensure!(begun.elapsed() < Duration::from_secs(120), "{error}");
        thread::sleep(Duration::from_millis(200));
    }
    daemon.stop()
}

#[test]
fn rollback_to_a_larger_size_is_held_to_the_quota() -> Result<()> {
    let dir = tempdir()?;
    let daemon = Site::with_folder(dir.path(), "a")?.start()?;
    daemon.quarry(&["tenant", "create", "acme", "--max-bytes", "64MiB"])?;
    daemon.create("acme/db", 64 * MIB, &[])?;
    daemon.quarry(&["snapshot", "create", "acme/db@large"])?;
    daemon.quarry(&["volume", "resize", "acme/db", "1MiB", "--force"])?;
    daemon.create("acme/two", 60 * MIB, &[])?;
    ensure_refused(
        &daemon,
        &["volume", "rollback", "acme/db@large"],
        &["provisioned bytes"],
    )?;
    daemon.quarry(&["volume", "delete", "acme/two"])?;
    daemon.quarry(&["volume", "rollback", "acme/db@large"])?;
    daemon.stop()
}

#[test]
fn tenants_record_damaged_is_named_and_made_anew() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    drop(daemon.fresh_volume("acme/db", 16 * MIB, &[])?);
    daemon.quarry(&["volume", "detach", "acme/db"])?;
    daemon.stop()?;
    let record = dir.path().join("store/tenants/acme");
    let mut bytes = fs::read(&record)?;
    *bytes.last_mut().context("a byte")? ^= 1;
    fs::write(&record, bytes)?;
    let daemon = site.start()?;
    let refusal = daemon
        .site()
        .quarry_json(&["volume", "show", "acme/db"])?
        .refusal()?;
    ensure!(
        refusal.kind == "damaged" && refusal.mentions("tenants/acme"),
        "{refusal:?}"
    );
    ensure!(refusal.mentions("quarry tenant create"), "{refusal:?}");
    daemon.quarry(&["tenant", "create", "acme"])?;
    ensure!(daemon.show("acme/db")?["state"] == "detached");
    daemon.stop()
}

/// It stayed, and would have been the next tenant's of that name.
#[test]
fn volume_made_while_nobody_can_tell_whether_its_tenant_is_there_is_taken_back() -> Result<()> {
    let dir = tempdir()?;
    let daemon = Site::with_folder(dir.path(), "a")?.start()?;
    daemon.quarry(&["tenant", "create", "acme"])?;
    let record = dir.path().join("store/tenants/acme");
    let sound = fs::read(&record)?;
    let mut damaged = sound.clone();
    *damaged.last_mut().context("a byte")? ^= 1;
    fs::write(&record, damaged)?;
    let create = ["volume", "create", "acme/db", "--size", "1MiB"];
    let refusal = daemon.site().quarry_json(&create)?.refusal()?;
    ensure!(
        refusal.kind == "unavailable" && refusal.mentions("tenants/acme"),
        "{refusal:?}"
    );
    let left = StoreDir::of(dir.path()).objects("t")?;
    ensure!(left.is_empty(), "{left:?} is left");
    fs::write(&record, sound)?;
    daemon.create("acme/db", MIB, &[])?;
    daemon.stop()
}

#[test]
fn settings_of_a_tenant_are_checked_and_kept() -> Result<()> {
    let dir = tempdir()?;
    let daemon = Site::with_folder(dir.path(), "a")?.start()?;
    daemon.quarry(&[
        "tenant",
        "create",
        "acme",
        "--iops",
        "20000",
        "--bandwidth",
        "500MiB/s",
        "--cache-reserve",
        "10GiB",
        "--cache-max",
        "40GiB",
    ])?;
    let again = daemon
        .site()
        .quarry_json(&["tenant", "create", "acme", "--iops", "5"])?;
    ensure!(again.refusal()?.kind == "exists");
    let reserve = ["tenant", "update", "acme", "--cache-reserve", "41GiB"];
    let refusal = daemon.site().quarry_json(&reserve)?.refusal()?;
    ensure!(refusal.kind == "invalid", "{refusal:?}");
    daemon.quarry(&[
        "tenant", "update", "acme", "--iops", "none", "--weight", "200",
    ])?;
    let shown = daemon.json(&["tenant", "show", "acme"])?;
    let wanted = serde_json::json!({
        "rates": {"bandwidth_bytes": 500 * MIB}, "weight": 200,
        "cache_reserve_bytes": 10u64 << 30, "cache_bytes_max": 40u64 << 30,
    });
    ensure!(shown["settings"] == wanted, "{shown}");
    daemon.quarry(&["tenant", "suspend", "acme"])?;
    ensure_refused(
        &daemon,
        &["volume", "create", "acme/db", "--size", "1MiB"],
        &["suspended", "resume"],
    )?;
    daemon.quarry(&["tenant", "resume", "acme"])?;
    daemon.create("acme/db", MIB, &[])?;
    daemon.stop()
}

/// What is told of a suspension of `acme`, and not of `globex`: `how`, if there is one.
fn ensure_suspended(daemon: &Daemon, how: Option<&str>) -> Result<()> {
    let list = daemon.json(&["volume", "list"])?;
    let listed = list["volumes"].as_array().context("no list")?;
    ensure!(listed.len() == 2, "{list}");
    for info in listed {
        let problem = info["problem"].as_str().unwrap_or_default();
        let told = problem.contains("its tenant is suspended");
        ensure!(
            told == (how.is_some() && info["tenant"] == "acme"),
            "{list}"
        );
    }
    let doctor = daemon.site().quarry(&["doctor"])?;
    ensure!(doctor.code == Some(0), "{doctor}");
    let line = doctor
        .stdout
        .lines()
        .find(|line| line.contains("tenant acme"));
    ensure!(line.is_some() == how.is_some(), "{doctor}");
    if let (Some(line), Some(how)) = (line, how) {
        ensure!(line.contains("warning") && line.contains(how), "{doctor}");
    }
    for (tenant, wanted) in [("acme", u64::from(how.is_some())), ("globex", 0)] {
        let label = format!("tenant=\"{tenant}\"");
        let told = daemon.count("quarry_tenant_suspended", &label)?;
        ensure!(told == wanted, "{tenant}: {told}");
    }
    Ok(())
}

#[test]
fn tenant_suspended_reads_only_or_waits_and_goes_on_where_it_was() -> Result<()> {
    let dir = tempdir()?;
    let sites = [
        Site::with_folder(dir.path(), "a")?,
        Site::with_folder(dir.path(), "b")?,
    ];
    let daemon = sites[0].start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 16 * MIB, &[])?;
    let mut other = daemon.fresh_volume("globex/db", 16 * MIB, &[])?;
    nbd.write(0, &[7; 4096], true)?;

    ensure_suspended(&daemon, None)?;
    daemon.quarry(&["tenant", "suspend", "acme"])?;
    let refused = nbd.write(4096, &[8; 4096], false);
    ensure!(refused.is_err(), "a write passed");
    ensure_suspended(&daemon, Some("take no writes"))?;
    ensure!(nbd.read_vec(0, 8192)? == [[7; 4096], [0; 4096]].concat());
    other.write(0, &[9; 4096], true)?;

    daemon.quarry(&["tenant", "suspend", "acme", "--how", "stall"])?;
    let waiting = thread::spawn(move || {
        let read = nbd.read_vec(0, 4096);
        (nbd, read)
    });
    thread::sleep(Duration::from_secs(1));
    ensure!(!waiting.is_finished(), "a request passed");
    ensure_suspended(&daemon, Some("wait"))?;
    let shown = daemon.show("acme/db")?;
    let oldest_held_ms = shown["limits"]["oldest_held_ms"].as_u64();
    ensure!(oldest_held_ms >= Some(500), "{shown}");
    ensure!(other.read_vec(0, 4096)? == [9; 4096]);
    daemon.quarry(&["tenant", "resume", "acme"])?;
    let (mut nbd, read) = waiting.join().expect("a reader does not panic");
    ensure!(read? == [7; 4096]);
    nbd.write(4096, &[8; 4096], true)?;
    ensure_suspended(&daemon, None)?;

    // Said on another host, it is seen here.
    let far = sites[1].start()?;
    far.quarry(&["tenant", "suspend", "acme"])?;
    let begun = Instant::now();
    while nbd.write(8192, &[1; 4096], false).is_ok() {
        ensure!(begun.elapsed() < Duration::from_secs(60), "not seen");
        thread::sleep(Duration::from_millis(500));
    }
    far.stop()?;
    drop((nbd, other));
    daemon.stop()
}
