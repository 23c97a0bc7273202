//! Dashboards, rules and alerts against a real Prometheus that scrapes a real daemon under load.
//!
//! With `QUARRY_WRITE_PICTURES=1` the load lasts some minutes and changes, and the pictures of the book are drawn of it.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    Daemon, FaultProxy, KIB, MIB, Nbd, Prometheus, Ran, SeaweedFs, Site, Window, free_port,
    in_memory, picture, seeded, tool,
};
use rand::RngExt as _;
use serde_json::Value;
use tempfile::tempdir;

/// How long every expression may take to have data.
const FILLS: Duration = Duration::from_secs(60);

/// How long an alert may take to fire, and to clear: it is about writes of a minute ago.
const FIRES: Duration = Duration::from_secs(90);
const CLEARS: Duration = Duration::from_secs(60);

/// What a picture's file may have, so that the book stays small.
const PICTURE_BYTES_MAX: usize = 150 << 10;
/// Samples of a series in a picture, at most: more could not be told apart.
const PICTURE_SAMPLES: u64 = 90;

/// So that requests cost something, and a minute shows what is deleted after a while.
const SETTINGS: &str = "[prices]\nput = 0.005\nget = 0.0004\n\
    [reclaim]\nhorizon = \"30s\"\ndebt_min = \"4MiB\"\n[trash]\ngrace = \"30s\"\n";

fn dashboards() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.join("../dashboards")
}

fn rules() -> [PathBuf; 2] {
    ["recording.yaml", "alerts.yaml"].map(|file| dashboards().join("rules").join(file))
}

fn with_extension(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let files = fs::read_dir(dir)?.map(|entry| Ok(entry?.path()));
    let files: Vec<PathBuf> = files.collect::<Result<_>>()?;
    let wanted = |file: &PathBuf| file.extension().is_some_and(|e| e == extension);
    Ok(files.into_iter().filter(wanted).collect())
}

/// A panel's or a variable's expression, as Grafana would send it with everything chosen.
fn chosen(expression: &str) -> String {
    let all = ["$tenant", "$volume", "$instance"];
    let text = all.iter().fold(expression.to_owned(), |text, name| {
        text.replace(&format!("\"{name}\""), "\".*\"")
    });
    text.replace("$__rate_interval", "15s")
}

/// All expressions of all panels, each with where it stands.
fn expressions() -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for file in with_extension(&dashboards(), "json")? {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        let dashboard: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
        for panel in dashboard["panels"].as_array().context("panels")? {
            let title = panel["title"].as_str().context("a title")?;
            let targets = panel["targets"].as_array();
            for target in targets.into_iter().flatten() {
                let expression = target["expr"].as_str().context("an expression")?;
                found.push((format!("{name}: {title}"), chosen(expression)));
            }
        }
        for variable in dashboard["templating"]["list"]
            .as_array()
            .context("variables")?
        {
            let query = variable["query"].as_str().unwrap_or_default();
            if let Some(inner) = query.strip_prefix("label_values(") {
                let (metric, label) = inner.rsplit_once(", ").context("a label")?;
                let label = label.trim_end_matches(')');
                let query = format!("count by ({label}) ({metric})");
                found.push((format!("{name}: ${}", variable["name"]), chosen(&query)));
            }
        }
    }
    Ok(found)
}

/// The metrics that an expression asks for.
fn metrics_of(expression: &str) -> BTreeSet<&str> {
    expression
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .filter(|word| {
            let recorded = word.contains(":quarry_");
            recorded || word.starts_with("quarry_") || word.starts_with("process_")
        })
        .collect()
}

/// Tenants with limits and quotas, and a volume of each that has all kinds of requests.
fn set_up(daemon: &Daemon) -> Result<Vec<(&'static str, Nbd)>> {
    let quotas = [
        "--max-volumes",
        "9",
        "--max-snapshots",
        "9",
        "--max-bytes",
        "1GiB",
        "--max-stored-bytes",
        "1GiB",
    ];
    let mut volumes = Vec::new();
    for (tenant, volume) in [("acme", "acme/db"), ("beta", "beta/logs")] {
        daemon.quarry(&[&["tenant", "create", tenant], &quotas[..]].concat())?;
        volumes.push((volume, daemon.fresh_volume(volume, 64 * MIB, &[])?));
    }
    // Less than the slowest machine would ask for.
    daemon.quarry(&["volume", "limit", "acme/db", "--iops", "20"])?;
    Ok(volumes)
}

/// Makes a certificate, and the settings with which the daemon uses it.
fn certificate(dir: &Path) -> Result<Option<String>> {
    let Some(openssl) = tool("openssl") else {
        return Ok(None);
    };
    let make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=localhost \
                -addext subjectAltName=DNS:localhost -keyout server.key -out server.pem";
    let mut command = openssl.command();
    Ran::run(command.current_dir(dir).args(make.split_whitespace()))?.ok()?;
    let at = |name: &str| dir.join(name).display().to_string();
    Ok(Some(format!(
        "[access]\nlisten = \"127.0.0.1:{}\"\ntls_cert = \"{}\"\ntls_key = \"{}\"\n",
        free_port(),
        at("server.pem"),
        at("server.key"),
    )))
}

/// Writes, hits, misses, flushes and discards, until told to stop.
fn load(daemon: &Daemon, volume: &str, mut nbd: Nbd, stop: &AtomicBool) -> Result<()> {
    const BLOCK: u64 = 16 * KIB;
    let (mut random, _) = seeded(volume);
    let mut noise = vec![0; in_memory(MIB)];
    random.fill(&mut noise[..]);
    // A picture shows what comes of use, and no saw of evictions.
    let (settled_every, rest) = if writes_pictures() { (32, 150) } else { (1, 0) };
    for round in 1.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let mut at = 0;
        for n in 0..24 {
            at = random.random_range(0..16 * MIB / BLOCK) * BLOCK;
            let from = random.random_range(0..noise.len() / 2);
            nbd.write(at, &noise[from..][..in_memory(BLOCK)], n % 8 == 0)?;
        }
        nbd.flush()?;
        nbd.read_vec(at, BLOCK)?;
        nbd.trim(60 * MIB, 1 << 20)?;
        if round % settled_every == 0 {
            daemon.sync(volume)?;
            daemon.quarry(&["volume", "evict", volume])?;
        }
        for _ in 0..24 {
            nbd.read_vec(random.random_range(0..16 * MIB / BLOCK) * BLOCK, BLOCK)?;
        }
        thread::sleep(Duration::from_millis(rest));
    }
    Ok(())
}

fn writes_pictures() -> bool {
    env::var_os("QUARRY_WRITE_PICTURES").is_some()
}

/// What happens beside the load, so that pictures show more than level lines.
fn changes(daemon: &Daemon, store: &FaultProxy) -> Result<()> {
    let wait = |seconds| thread::sleep(Duration::from_secs(seconds));
    wait(30);
    daemon.quarry(&["volume", "limit", "acme/db", "--iops", "200"])?;
    daemon.quarry(&["snapshot", "create", "beta/logs@before"])?;
    wait(40);
    store.delay(Duration::from_millis(100));
    wait(30);
    store.delay(Duration::ZERO);
    daemon.create("beta/old", 64 * MIB, &[])?;
    daemon.quarry(&["volume", "delete", "beta/old"])?;
    wait(40);
    daemon.quarry(&["volume", "limit", "acme/db", "--iops", "50"])?;
    daemon.quarry(&["tenant", "update", "beta", "--iops", "150"])?;
    wait(30);
    Ok(())
}

fn picture_of(dashboard: &Path) -> Result<PathBuf> {
    let name = dashboard.file_stem().context("a name")?.to_string_lossy();
    let pictures = dashboards().join("../docs/pictures");
    Ok(pictures.join(format!("dashboards-{name}.svg")))
}

/// Draws all dashboards with what there was since `from`.
fn draw(prometheus: &Prometheus, from: u64) -> Result<()> {
    for file in with_extension(&dashboards(), "json")? {
        let name = file.display();
        let json = serde_json::from_str(&fs::read_to_string(&file)?)?;
        let begun = Instant::now();
        let picture = loop {
            let to = now()?;
            let step = (to - from).div_ceil(PICTURE_SAMPLES).max(1);
            let window = Window { from, to, step };
            let ask = |expression: &str, window| prometheus.range(&chosen(expression), window);
            let picture = picture::dashboard(&json, window, ask)?;
            if !picture.contains("No data") {
                break picture;
            }
            // What an expression had an answer for a moment ago may lie behind the window's last whole step.
            ensure!(begun.elapsed() < FILLS, "{name}: a panel has no data");
            thread::sleep(Duration::from_secs(1));
        };
        ensure!(
            picture.len() <= PICTURE_BYTES_MAX,
            "{name}: {} bytes",
            picture.len()
        );
        if writes_pictures() {
            fs::write(picture_of(&file)?, picture)?;
        }
    }
    Ok(())
}

/// Seconds since 1970.
fn now() -> Result<u64> {
    Ok(SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)?
        .as_secs())
}

#[test]
fn every_expression_has_data_of_a_daemon_under_load() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let store = FaultProxy::start(server.address())?;
    let site = Site::with_s3(dir.path(), "a", &server, store.address(), "volumes")?;
    let Some(access) = certificate(dir.path())? else {
        return Ok(());
    };
    let site = site.settings(&format!("{SETTINGS}{access}"));
    let daemon = site.start()?;
    let prometheus = Prometheus::start(&dir.path().join("prom"), site.listen(), &rules())?;
    let Some(prometheus) = prometheus else {
        return Ok(());
    };
    let volumes = set_up(&daemon)?;
    let begun = now()?;
    let stop = &AtomicBool::new(false);
    let daemon = &daemon;
    thread::scope(|scope| {
        let mut loads = Vec::new();
        for (volume, nbd) in volumes {
            loads.push(scope.spawn(move || load(daemon, volume, nbd, stop)));
        }
        let seen = all_have_data(&prometheus).and_then(|()| {
            let mut from = begun;
            if writes_pictures() {
                from = now()?;
                changes(daemon, &store)?;
            }
            draw(&prometheus, from)
        });
        stop.store(true, Ordering::SeqCst);
        for load in loads {
            load.join().expect("a load does not panic")?;
        }
        seen
    })
}

#[test]
fn pictures_of_the_book_show_every_panel_and_their_page_every_picture() -> Result<()> {
    let page = fs::read_to_string(dashboards().join("../docs/DASHBOARDS.md"))?;
    for file in with_extension(&dashboards(), "json")? {
        let path = picture_of(&file)?;
        let name = path.file_name().context("a name")?.to_string_lossy();
        let picture =
            fs::read_to_string(&path).context("run these tests with QUARRY_WRITE_PICTURES=1")?;
        ensure!(
            picture.len() <= PICTURE_BYTES_MAX,
            "{name}: {} bytes",
            picture.len()
        );
        ensure!(
            page.contains(&format!("](pictures/{name})")),
            "{name} is not shown"
        );
        let json: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
        let panels = json["panels"].as_array().context("panels")?;
        for title in panels
            .iter()
            .map(|panel| &panel["title"])
            .chain([&json["title"]])
        {
            let title = picture::escaped(title.as_str().context("a title")?);
            let is_there = picture.contains(&format!(">{title}</text>"));
            ensure!(
                is_there,
                "{name} lacks {title}: run these tests with QUARRY_WRITE_PICTURES=1"
            );
        }
    }
    Ok(())
}

fn all_have_data(prometheus: &Prometheus) -> Result<()> {
    let mut wanted = expressions()?;
    ensure!(wanted.len() > 100, "only {} expressions", wanted.len());
    let rules = prometheus.rules()?;
    ensure!(rules.len() > 20, "only {} rules", rules.len());
    let mut asked = BTreeSet::new();
    for rule in &rules {
        let (name, query) = (rule["name"].as_str(), rule["query"].as_str());
        let (name, query) = name.zip(query).context("a rule")?;
        asked.extend(metrics_of(query).into_iter().map(str::to_owned));
        if rule["type"] == "recording" {
            wanted.push((name.to_owned(), query.to_owned()));
        }
    }
    // An alert is silent; what it asks for must be there all the same.
    wanted.extend(asked.into_iter().map(|m| ("an alert".to_owned(), m)));
    let begun = Instant::now();
    loop {
        let mut empty = Vec::new();
        for (place, expression) in &wanted {
            let values = prometheus.query(expression)?;
            if !values.iter().any(|value| value.is_finite()) {
                empty.push(format!("{place}: {expression}"));
            }
        }
        if empty.is_empty() {
            break;
        }
        ensure!(
            begun.elapsed() < FILLS,
            "{} of {} have no data:\n{}",
            empty.len(),
            wanted.len(),
            empty.join("\n")
        );
        wanted.retain(|(place, expression)| empty.contains(&format!("{place}: {expression}")));
        thread::sleep(Duration::from_secs(1));
    }
    for rule in prometheus.rules()? {
        ensure!(rule["health"] == "ok", "{rule}");
    }
    Ok(())
}

#[test]
fn alert_for_unsent_writes_of_a_minute_fires_when_the_store_is_cut_and_clears() -> Result<()> {
    const ALERT: &str = "QuarryRpoHigh";
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let proxy = FaultProxy::start(server.address())?;
    let site = Site::with_s3(dir.path(), "a", &server, proxy.address(), "volumes")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    let prometheus = Prometheus::start(&dir.path().join("prom"), site.listen(), &rules())?;
    let Some(prometheus) = prometheus else {
        return Ok(());
    };
    nbd.write(0, &[1; 4096], true)?;
    daemon.sync("acme/db")?;
    proxy.cut();
    nbd.write(0, &[2; 4096], true)?;
    let begun = Instant::now();
    let fires = |name: &str| -> Result<bool> {
        thread::sleep(Duration::from_millis(500));
        Ok(prometheus.firing()?.iter().any(|alert| alert == name))
    };
    while !fires(ALERT)? {
        ensure!(begun.elapsed() < FIRES, "{ALERT} does not fire");
    }
    let fired = begun.elapsed();
    ensure!(fired > Duration::from_secs(60), "after {fired:?} already");
    ensure!(fires("QuarryStoreUnreachable")?, "the store is away");
    proxy.heal();
    let begun = Instant::now();
    while fires(ALERT)? || fires("QuarryStoreUnreachable")? {
        ensure!(begun.elapsed() < CLEARS, "the alerts do not clear");
    }
    println!("fired after {fired:?}, cleared after {:?}", begun.elapsed());
    daemon.stop()
}

#[test]
fn rules_are_sound_by_promtool_and_do_what_their_tests_say() -> Result<()> {
    let Some(promtool) = tool("promtool") else {
        return Ok(());
    };
    let promtool = |arguments: &[&str]| {
        let mut command = promtool.command();
        Ran::run(
            command
                .args(arguments)
                .current_dir(dashboards().join("rules")),
        )?
        .ok()
    };
    promtool(&["check", "rules", "recording.yaml", "alerts.yaml"])?;
    promtool(&["test", "rules", "tests.yaml"])?;
    Ok(())
}

#[test]
fn scrape_is_sound_by_promtool() -> Result<()> {
    let Some(promtool) = tool("promtool") else {
        return Ok(());
    };
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    let text = dir.path().join("metrics");
    fs::write(&text, daemon.metrics()?)?;
    let mut check = promtool.command();
    check
        .args(["check", "metrics"])
        .stdin(fs::File::open(&text)?);
    Ran::run(&mut check)?.ok()?;
    daemon.stop()
}
