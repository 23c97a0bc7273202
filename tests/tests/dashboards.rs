//! Dashboards, rules and alerts against a real Prometheus that scrapes a real daemon under load.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    Daemon, FaultProxy, KIB, MIB, Nbd, Prometheus, Ran, SeaweedFs, Site, free_port, tool,
};
use serde_json::Value;
use tempfile::tempdir;

/// How long every expression may take to have data.
const FILLS: Duration = Duration::from_secs(60);

/// How long an alert may take to fire, and to clear: it is about writes of a minute ago.
const FIRES: Duration = Duration::from_secs(90);
const CLEARS: Duration = Duration::from_secs(60);

const PRICES: &str = "[prices]\nput = 5.0\nget = 0.4\n";

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
        "1TiB",
        "--max-stored-bytes",
        "1TiB",
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
    let mut round = 0;
    while !stop.load(Ordering::SeqCst) {
        for n in 0..24 {
            let at = (n + round) % 256 * 64 * KIB;
            nbd.write(at, &[u8::try_from(n)?; 64 << 10], n % 8 == 0)?;
        }
        nbd.flush()?;
        nbd.read_vec(0, 64 * KIB)?;
        nbd.trim(60 * MIB, 1 << 20)?;
        daemon.sync(volume)?;
        daemon.quarry(&["volume", "evict", volume])?;
        for n in 0..24 {
            nbd.read_vec(n * 64 * KIB, 64 * KIB)?;
        }
        round += 1;
    }
    Ok(())
}

#[test]
fn every_expression_has_data_of_a_daemon_under_load() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let site = Site::with_s3(dir.path(), "a", &server, server.address(), "volumes")?;
    let Some(access) = certificate(dir.path())? else {
        return Ok(());
    };
    let site = site.settings(&format!("{PRICES}{access}"));
    let daemon = site.start()?;
    let prometheus = Prometheus::start(&dir.path().join("prom"), site.listen(), &rules())?;
    let Some(prometheus) = prometheus else {
        return Ok(());
    };
    let volumes = set_up(&daemon)?;
    let stop = &AtomicBool::new(false);
    let daemon = &daemon;
    thread::scope(|scope| {
        let mut loads = Vec::new();
        for (volume, nbd) in volumes {
            loads.push(scope.spawn(move || load(daemon, volume, nbd, stop)));
        }
        let seen = all_have_data(&prometheus);
        stop.store(true, Ordering::SeqCst);
        for load in loads {
            load.join().expect("a load does not panic")?;
        }
        seen
    })
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
