//! The status page in a browser, with a daemon behind it that has something to do.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{
    Daemon, FaultProxy, KIB, MIB, Nbd, Ran, Site, Tool, free_port, in_memory, tool,
};
use tempfile::tempdir;

/// How long a browser may take in all.
const PATIENCE: Duration = Duration::from_secs(120);
/// The time that the page sees pass before it is looked at: some answers.
const PAGE_TIME_MS: &str = "9000";

/// Runs the browser on `url`, and answers with what it prints.
fn browse(chromium: &Tool, home: &Path, arguments: &[&str], url: &str) -> Result<String> {
    let mut command = chromium.command();
    command
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ])
        .args([
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
        ])
        // So that nothing is looked up anywhere else.
        .arg("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1")
        .arg(format!("--user-data-dir={}", home.display()))
        .arg(format!("--virtual-time-budget={PAGE_TIME_MS}"))
        .args(arguments)
        .arg(url)
        .stdin(Stdio::null());
    finish(command)
}

/// Waits for a program, but not for ever.
fn finish(mut command: Command) -> Result<String> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{command:?}"))?;
    let mut out = child.stdout.take().context("a pipe")?;
    let reader = thread::spawn(move || std::io::read_to_string(&mut out));
    let begun = Instant::now();
    while child.try_wait()?.is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("the browser did not end: {command:?}");
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(reader.join().expect("reading a pipe does not panic")?)
}

/// What stands in the element of this id, without tags.
fn text_of(dom: &str, id: &str) -> Result<String> {
    let (_, rest) = dom
        .split_once(&format!(" id=\"{id}\""))
        .with_context(|| format!("no {id} in {dom}"))?;
    let (_, rest) = rest.split_once('>').context("a tag ends")?;
    let text = rest.split_once("</").map_or(rest, |(text, _)| text);
    Ok(text.to_owned())
}

/// The rows of the table of volumes, tags and all.
fn rows(dom: &str) -> Result<Vec<&str>> {
    let (_, rest) = dom
        .split_once("id=\"rows\">")
        .with_context(|| format!("no table in {dom}"))?;
    let (body, _) = rest.split_once("</tbody>").context("the table ends")?;
    Ok(body.split("<tr>").skip(1).collect())
}

/// Whether the element of this id is hidden.
fn is_hidden(dom: &str, id: &str) -> Result<bool> {
    let (_, rest) = dom
        .split_once(&format!(" id=\"{id}\""))
        .with_context(|| format!("no {id}"))?;
    let (tag, _) = rest.split_once('>').context("a tag ends")?;
    Ok(tag.contains("hidden"))
}

/// Writes and reads until it is told to stop.
fn load(mut disk: Nbd, stop: &AtomicBool) -> Result<()> {
    let mut block = vec![7; in_memory(4 * KIB)];
    let mut at = 0;
    while !stop.load(Ordering::Relaxed) {
        disk.write(at, &block, false)?;
        disk.read(at, &mut block)?;
        at = (at + 4 * KIB) % (8 * MIB);
    }
    disk.flush()?;
    Ok(())
}

/// Does `look` while `disk` is written to and read.
fn under_load<T>(disk: Nbd, look: impl FnOnce() -> Result<T>) -> Result<T> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| load(disk, &stop));
        let seen = look();
        stop.store(true, Ordering::Relaxed);
        load.join().expect("the load does not panic")?;
        seen
    })
}

fn site(root: &Path, api: u16) -> Result<Site> {
    let settings = format!("[access]\nlisten = \"127.0.0.1:{api}\"\ninsecure = true\n");
    Ok(Site::with_folder(root, "a")?.settings(&settings))
}

/// A daemon with volumes of two tenants; `acme/db` is attached and connected.
fn daemon(site: &Site) -> Result<(Daemon, Nbd)> {
    let daemon = site.start()?;
    let disk = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    daemon.fresh_volume("zebra/stripes", 64 * MIB, &[])?;
    Ok((daemon, disk))
}

#[test]
fn status_page_of_a_busy_daemon_shows_its_volumes_and_what_they_do() -> Result<()> {
    let Some(chromium) = tool("chromium") else {
        return Ok(());
    };
    let dir = tempdir()?;
    let site = site(dir.path(), free_port())?;
    let (_daemon, disk) = daemon(&site)?;
    // The page's time runs ahead while it waits for nothing, so that what it asks is answered late: there is something to
    // see between two answers.
    let proxy = FaultProxy::start(site.listen())?;
    proxy.delay(Duration::from_millis(100));
    let url = format!("http://{}/", proxy.address());
    let home = dir.path().join("browser");
    let picture = dir.path().join("page.png");
    let dom = under_load(disk, || {
        let shot = format!("--screenshot={}", picture.display());
        browse(&chromium, &home, &[&shot, "--window-size=1280,900"], &url)?;
        browse(&chromium, &home, &["--dump-dom"], &url)
    })?;
    ensure!(fs::read(&picture)?.starts_with(b"\x89PNG"), "no picture");
    ensure!(
        is_hidden(&dom, "ask")? && is_hidden(&dom, "trouble")?,
        "{dom}"
    );
    ensure!(
        !is_hidden(&dom, "main")? && !is_hidden(&dom, "cache")?,
        "{dom}"
    );
    let rows = rows(&dom)?;
    ensure!(rows.len() == 2, "{rows:?}");
    ensure!(
        rows[0].contains("acme/db") && rows[1].contains("zebra/stripes"),
        "{rows:?}"
    );
    ensure!(rows[0].contains("attached by nbd"), "{}", rows[0]);
    // The rates are of two answers, so of what the page itself saw.
    let busy = text_of(&dom, "iops")?;
    let rate: f64 = busy.trim_end_matches(" /s").replace(',', "").parse()?;
    ensure!(rate > 1.0, "{busy}");
    ensure!(text_of(&dom, "bytes")?.ends_with("iB/s"), "{dom}");
    ensure!(text_of(&dom, "latency")?.ends_with('s'), "{dom}");
    ensure!(
        text_of(&dom, "about")?.contains("2 volumes attached"),
        "{dom}"
    );
    ensure!(text_of(&dom, "storestate")? == "answers", "{dom}");
    let cell = |row: &str, label: &str| {
        let (_, rest) = row.split_once(&format!("data-label=\"{label}\">"))?;
        rest.split_once('<').map(|(text, _)| text.to_owned())
    };
    ensure!(
        cell(rows[0], "Writes/s").as_deref() != Some("0"),
        "{}",
        rows[0]
    );
    ensure!(
        cell(rows[1], "Writes/s").as_deref() == Some("0"),
        "{}",
        rows[1]
    );
    ensure!(
        cell(rows[0], "Size").as_deref() == Some("64 MiB"),
        "{}",
        rows[0]
    );
    let map = dom
        .split_once("aria-label=\"segments: ")
        .context("a map")?
        .1;
    for kind in ["dirty ", "filling ", "clean ", "free "] {
        ensure!(map.contains(kind), "{dom}");
    }
    Ok(())
}

#[test]
fn status_page_on_the_network_has_no_data_without_a_token() -> Result<()> {
    let (Some(chromium), Some(curl)) = (tool("chromium"), tool("curl")) else {
        return Ok(());
    };
    let dir = tempdir()?;
    let api = free_port();
    let site = site(dir.path(), api)?;
    let (daemon, disk) = daemon(&site)?;
    drop(disk);
    let url = format!("http://127.0.0.1:{api}/");
    let dom = browse(
        &chromium,
        &dir.path().join("browser"),
        &["--dump-dom"],
        &url,
    )?;
    ensure!(
        !is_hidden(&dom, "ask")? && is_hidden(&dom, "main")?,
        "{dom}"
    );
    for name in ["acme", "stripes", site.root().to_str().context("a path")?] {
        ensure!(!dom.contains(name), "{name} in {dom}");
    }
    let get = |url: &str, headers: &[&str]| -> Result<Ran> {
        let mut command = curl.command();
        command.args(["--silent", "--include", "--max-time", "30"]);
        for header in headers {
            command.args(["--header", header]);
        }
        Ran::run(command.arg(url))
    };
    let page = get(&url, &[])?.stdout;
    ensure!(
        page.contains("content-security-policy: default-src 'none'"),
        "{page}"
    );
    let activity = format!("{url}v1/activity");
    ensure!(
        get(&activity, &[])?.stdout.starts_with("HTTP/1.1 401"),
        "no token"
    );
    let made = daemon.json(&["token", "create", "--tenant", "acme", "--role", "read"])?;
    let token = made["token"].as_str().context("a token")?;
    let told = get(&activity, &[&format!("Authorization: Bearer {token}")])?.stdout;
    ensure!(told.contains("acme/db"), "{told}");
    for theirs in [
        "stripes",
        "zebra",
        "\"daemon\"",
        site.root().to_str().context("a path")?,
    ] {
        ensure!(!told.contains(theirs), "{theirs} in {told}");
    }
    // Where no token is asked for, only this host is answered, and no page of another site.
    let near = format!("http://{}/v1/activity", site.listen());
    let foreign = get(&near, &["Host: other.example"])?.stdout;
    ensure!(
        foreign.starts_with("HTTP/1.1 403") && !foreign.contains("acme"),
        "{foreign}"
    );
    let volumes = format!("http://{}/v1/volumes", site.listen());
    ensure!(
        get(&volumes, &[])?.stdout.starts_with("HTTP/1.1 404"),
        "the API without a token"
    );
    Ok(())
}
