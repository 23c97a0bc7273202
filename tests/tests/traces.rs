//! Traces of slow requests, as a collector gets them.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Collector, Daemon, FaultProxy, MIB, SeaweedFs, Site, Span, Trace, metric_sum};
use tempfile::tempdir;

const VOLUME: &str = "acme/db";

/// How far the store is away, when it is slow: much more than what requests take otherwise, however busy the machine is.
const DELAY: Duration = Duration::from_millis(700);

/// From how long on a request is slow.
const SLOW: &str = "400ms";

/// How long a trace may be on its way: it is gathered for a second.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a trace must explain of its request's time.
const EXPLAINED_MIN: f64 = 0.9;

fn settings(collector: &Collector, more: &str) -> String {
    let endpoint = collector.endpoint();
    format!("[tracing]\nendpoint = \"{endpoint}\"\nslow = \"{SLOW}\"\n{more}\n")
}

/// The one trace that there is to be, whose root is of this kind; all that holds of every trace is looked at.
fn only(traces: &[Trace], kind: &str) -> Result<Trace> {
    let of_kind = |trace: &&Trace| {
        let root = trace.root();
        root.is_ok_and(|root| {
            root.attributes
                .get("quarry.operation")
                .is_some_and(|k| k == kind)
        })
    };
    let mut found = traces.iter().filter(of_kind);
    let trace = found
        .next()
        .with_context(|| format!("no {kind} in {traces:#?}"))?;
    ensure!(found.next().is_none(), "more than one {kind}: {traces:#?}");
    let root = trace.root()?;
    for (name, value) in [
        ("quarry.tenant", "acme"),
        ("quarry.volume", "db"),
        ("quarry.front_end", "nbd"),
    ] {
        ensure!(
            root.attributes.get(name).is_some_and(|v| v == value),
            "{root:?}"
        );
    }
    ensure!(
        trace
            .resource
            .get("service.name")
            .is_some_and(|v| v == "quarry")
    );
    ensure!(trace.resource.contains_key("host.name"));
    let explained = trace.explained()?;
    ensure!(explained >= EXPLAINED_MIN, "{explained} of {trace:#?}");
    Ok(trace.clone())
}

fn attribute<'a>(span: &'a Span, name: &str) -> &'a str {
    span.attributes.get(name).map_or("", String::as_str)
}

#[test]
fn slow_store_is_seen_in_one_trace_a_request_and_fast_requests_in_none() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let (proxy, collector) = (FaultProxy::start(server.address())?, Collector::start()?);
    let site = Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?
        // What was hot would bring the map's nodes before they are asked for.
        .settings(&settings(&collector, "[cache]\nhot_set = false"));
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &["--durability", "object"])?;
    for n in 0..4 {
        nbd.write(n * MIB, &[7; 65536], false)?;
    }
    nbd.flush()?;
    for n in 0..4 {
        nbd.read_vec(n * MIB, 4096)?;
    }
    drop(nbd);
    // Into the map, so that a read asks for its nodes too.
    daemon.quarry(&["volume", "detach", VOLUME])?;
    let mut nbd = daemon.attach(VOLUME, &[])?;
    daemon.quarry(&["volume", "evict", VOLUME])?;

    proxy.delay(DELAY);
    ensure!(nbd.read_vec(MIB, 4096)? == [7; 4096]);
    nbd.write(8 * MIB, &[8; 4096], false)?;
    nbd.flush()?;
    proxy.delay(Duration::ZERO);
    let traces = collector.await_traces(2, PATIENCE)?;
    // What was fast comes with the rest, if it does.
    drop(nbd);
    daemon.stop()?;
    ensure!(collector.traces().len() == 2, "{traces:#?}");

    let read = only(&traces, "read_miss")?;
    let root = read.root()?;
    ensure!(root.name == "read" && attribute(root, "quarry.length") == "4096");
    ensure!(attribute(root, "quarry.offset") == MIB.to_string());
    let gets = read.named("store get_range");
    let of_chunks: Vec<_> = gets
        .iter()
        .filter(|get| attribute(get, "quarry.store.object").contains("/chunk/"))
        .collect();
    ensure!(of_chunks.len() == 1, "{read:#?}");
    ensure!(attribute(of_chunks[0], "quarry.store.attempts") == "1");
    ensure!(attribute(of_chunks[0], "quarry.store.outcome") == "ok");
    let took = Duration::from_nanos(of_chunks[0].end - of_chunks[0].begin);
    ensure!(took >= DELAY, "{took:?}");
    for name in ["map nodes", "fetch", "attempt", "decode", "copy"] {
        ensure!(!read.named(name).is_empty(), "no {name} in {read:#?}");
    }

    let flush = only(&traces, "flush")?;
    for name in ["upload", "encode", "store create", "attempt"] {
        ensure!(!flush.named(name).is_empty(), "no {name} in {flush:#?}");
    }
    let create = flush.named("store create")[0];
    ensure!(
        attribute(create, "quarry.store.object").contains("/chunk/"),
        "{create:?}"
    );
    Ok(())
}

#[test]
fn write_that_waits_for_dirty_space_says_so() -> Result<()> {
    let dir = tempdir()?;
    let Some(server) = SeaweedFs::start(dir.path())? else {
        return Ok(());
    };
    let (proxy, collector) = (FaultProxy::start(server.address())?, Collector::start()?);
    let site = Site::with_s3(dir.path(), "a", &server, proxy.address(), "quarry")?
        .cache_size("96MiB")
        .settings(&settings(&collector, "[cache]\ndirty_max = \"24MiB\""));
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 128 * MIB, &[])?;
    proxy.hang(Some("/chunk/"));
    // Of a megabyte each, more than there is room for; all at once, and the first that wait are the oldest.
    let sent: Vec<u64> = (0..32)
        .map(|n| nbd.send_write(n * MIB, &vec![9; 1 << 20], false))
        .collect::<Result<_, _>>()?;
    let begun = Instant::now();
    while daemon.show(VOLUME)?["stalled"] != true {
        ensure!(begun.elapsed() < PATIENCE, "the writes do not stall");
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(2 * DELAY);
    proxy.hang(None);
    for cookie in sent {
        nbd.wait(cookie)?;
    }
    let waits = |trace: &Trace| {
        let rooms = trace.named("wait for room");
        rooms
            .iter()
            .any(|room| attribute(room, "quarry.waits_for") == "space")
    };
    let begun = Instant::now();
    let trace = loop {
        if let Some(trace) = collector.traces().into_iter().find(waits) {
            break trace;
        }
        ensure!(begun.elapsed() < PATIENCE, "{:#?}", collector.traces());
        thread::sleep(Duration::from_millis(20));
    };
    let explained = trace.explained()?;
    ensure!(explained >= EXPLAINED_MIN, "{explained} of {trace:#?}");
    ensure!(trace.root()?.name == "write");
    ensure!(
        !trace.named("upload").is_empty(),
        "nothing was sent meanwhile: {trace:#?}"
    );
    daemon.stop()
}

/// Has 40 writes wait for a rate, for about two seconds, and then looks.
fn held_writes(site: &Site, then: impl FnOnce(&Daemon) -> Result<()>) -> Result<()> {
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    daemon.quarry(&["volume", "limit", VOLUME, "--iops", "20"])?;
    let sent: Vec<u64> = (0..40)
        .map(|n| nbd.send_write(n * MIB, &[1; 4096], false))
        .collect::<Result<_, _>>()?;
    for cookie in sent {
        nbd.wait(cookie)?;
    }
    then(&daemon)?;
    drop(nbd);
    daemon.stop()
}

#[test]
fn requests_held_by_a_rate_are_traced_with_the_headers_that_were_asked_for() -> Result<()> {
    let dir = tempdir()?;
    let collector = Collector::start()?;
    let headers = dir.path().join("headers");
    std::fs::write(&headers, "Authorization: Bearer hunter2\n")?;
    let more = format!("headers_file = {headers:?}");
    let site = Site::with_folder(dir.path(), "a")?
        .env("OTEL_RESOURCE_ATTRIBUTES", "rack=7")
        .settings(&settings(&collector, &more));
    held_writes(&site, |_| Ok(()))?;
    let traces = collector.traces();
    ensure!(traces.len() >= 20, "{} traces", traces.len());
    for trace in &traces {
        ensure!(trace.resource.get("rack").is_some_and(|v| v == "7"));
        ensure!(!trace.named("wait for rate").is_empty(), "{trace:#?}");
        let explained = trace.explained()?;
        ensure!(explained >= EXPLAINED_MIN, "{explained} of {trace:#?}");
    }
    let sent = "authorization: bearer hunter2";
    ensure!(collector.heads().iter().all(|head| head.contains(sent)));
    let log = std::fs::read_to_string(site.log())?;
    ensure!(!log.contains("hunter2"), "{log}");
    Ok(())
}

fn dropped(metrics: &str) -> f64 {
    metric_sum(metrics, "quarry_traces_dropped_total", "").unwrap_or_default()
}

#[test]
fn collector_that_hangs_holds_up_no_request_and_is_counted() -> Result<()> {
    let dir = tempdir()?;
    let collector = Collector::start()?;
    collector.hang();
    // A batch of its own for the collector to hang on, and more than wait for it.
    let site = Site::with_folder(dir.path(), "a")?
        .settings(&settings(&collector, "").replace(SLOW, "1ms"));
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 64 * MIB, &[])?;
    daemon.quarry(&["volume", "limit", VOLUME, "--iops", "500"])?;
    let begun = Instant::now();
    for _ in 0..30 {
        let sent: Vec<u64> = (0..60)
            .map(|n| nbd.send_write(n * MIB, &[1; 4096], false))
            .collect::<Result<_, _>>()?;
        for cookie in sent {
            nbd.wait(cookie)?;
        }
    }
    let took = begun.elapsed();
    // 1,800 at 500 a second; the collector's first call is not given up yet.
    ensure!(took < Duration::from_secs(9), "{took:?}");
    let metrics = daemon.metrics()?;
    ensure!(dropped(&metrics) > 0.0, "{metrics}");
    ensure!(metric_sum(&metrics, "quarry_traces_exported_total", "") == Some(0.0));
    drop(nbd);
    daemon.stop()
}

#[test]
fn collector_that_is_away_is_told_once_and_counted() -> Result<()> {
    let dir = tempdir()?;
    let collector = Collector::start()?;
    let site = Site::with_folder(dir.path(), "a")?.settings(&settings(&collector, ""));
    drop(collector);
    held_writes(&site, |daemon| {
        let begun = Instant::now();
        // Three calls, one and two seconds apart.
        while dropped(&daemon.metrics()?) == 0.0 {
            ensure!(begun.elapsed() < PATIENCE, "{}", daemon.metrics()?);
            thread::sleep(Duration::from_millis(50));
        }
        let failures = metric_sum(&daemon.metrics()?, "quarry_trace_export_failures_total", "");
        ensure!(failures >= Some(3.0), "{failures:?}");
        Ok(())
    })?;
    let log = std::fs::read_to_string(site.log())?;
    ensure!(log.matches("traces are dropped").count() == 1, "{log}");
    Ok(())
}

fn refused(root: &Path, tracing: &str) -> Result<String> {
    let site = Site::with_folder(root, "a")?.settings(&format!("[tracing]\n{tracing}\n"));
    Ok(site.serve_refused()?.to_string())
}

#[test]
fn settings_that_cannot_be_used_are_refused_by_name() -> Result<()> {
    let dir = tempdir()?;
    for (tracing, hint) in [
        ("endpoint = \"grpc://127.0.0.1:4317\"", "tracing.endpoint"),
        (
            "endpoint = \"http://127.0.0.1:4318\"\nslow = \"0s\"",
            "tracing.slow",
        ),
        (
            "endpoint = \"http://127.0.0.1:4318\"\nheaders_file = \"/nowhere/h\"",
            "/nowhere/h",
        ),
    ] {
        let told = refused(dir.path(), tracing)?;
        ensure!(told.contains(hint), "{told}");
    }
    Ok(())
}
