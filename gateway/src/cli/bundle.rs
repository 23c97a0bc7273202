//! `quarry support-bundle`: what somebody who helps needs to know of this daemon and its host, in one archive.
//!
//! Invariants:
//! - no secret is in it: what is put in has none by its nature, and all of it goes through the [`Scrubber`];
//! - it changes nothing, and waits for nobody for long: what cannot be had is named in the archive, with why.

mod scrub;
mod tar;

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use quarry_config::Config;
use serde::Serialize;
use serde_json::Value;
use tokio::time::timeout;

use self::scrub::{LEFT_OUT, Scrubber};
use self::tar::Tar;
use super::Failure;
use super::output::Console;
use super::table::time_ms;
use crate::control::{ApiResult, Client};
use crate::engine::now_ms;

/// How long one answer of the daemon may take; doctor's asks each store several times.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
/// How much of the end of a log is taken.
const LOG_BYTES_MAX: u64 = 4 << 20;
/// How much of a file of secrets is looked at, to know them.
const SECRETS_BYTES_MAX: u64 = 1 << 20;
/// Where the configuration is, if that is not said.
const CONFIG_FILE: &str = "/etc/quarry/quarry.toml";
/// Variables whose values are secrets.
const SECRET_VARIABLES: [&str; 4] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
];
/// What the kernel tells of itself.
const KERNEL_FILES: [&str; 8] = [
    "/proc/version",
    "/proc/sys/kernel/io_uring_disabled",
    "/proc/sys/kernel/io_uring_group",
    "/sys/module/ublk_drv/version",
    "/sys/module/ublk_drv/parameters/ublks_max",
    "/proc/meminfo",
    "/proc/loadavg",
    "/etc/os-release",
];

/// Flags of `quarry support-bundle`.
#[derive(Debug, Args)]
pub struct BundleFlags {
    /// The archive to make; by default a name with the time, in this folder.
    #[arg(value_name = "FILE")]
    pub archive: Option<PathBuf>,
    /// The daemon's configuration file.
    #[arg(long, value_name = "FILE", default_value = CONFIG_FILE)]
    pub config: PathBuf,
    /// A file with the daemon's log, whose end is taken.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
}

/// What was made.
#[derive(Serialize)]
struct Made {
    archive: String,
    bytes: u64,
    files: Vec<String>,
    missing: Vec<Missing>,
}

/// What could not be had.
#[derive(Serialize)]
struct Missing {
    file: String,
    why: String,
}

/// A file of the archive: what it is, and its text or why there is none.
struct Part {
    name: &'static str,
    about: &'static str,
    text: Result<String, String>,
}

pub(super) async fn run(
    client: &Client,
    flags: BundleFlags,
    secrets: &[&Path],
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let now = now_ms();
    let stamp = time_ms(now).unwrap_or_default().replace(':', "");
    let folder = format!("quarry-support-{stamp}");
    let config = Config::load(&flags.config);
    let mut scrubber = what_is_secret(config.as_ref().ok(), secrets);
    let (mut parts, pid) = of_the_daemon(client).await;
    know_variables(&mut scrubber, &environment_of(pid));
    parts.extend(of_the_host(&flags, config));

    let mut tar = Tar::default();
    let (mut files, mut missing) = (Vec::new(), Vec::new());
    let mut contents = format!(
        "What Quarry's `support-bundle` gathered at {}.\n\
         Secrets are left out (keys, tokens, passwords); names of tenants and volumes, addresses and paths are not.\n\n",
        time_ms(now).unwrap_or_default()
    );
    let mut texts = Vec::new();
    for Part { name, about, text } in parts {
        match text {
            Ok(text) => {
                contents.push_str(&format!("{name}: {about}\n"));
                files.push(name.to_owned());
                texts.push((name, scrubber.clean(&text)));
            }
            Err(why) => {
                let why = scrubber.clean(&why);
                contents.push_str(&format!("{name}: {about}; MISSING: {why}\n"));
                let file = name.to_owned();
                missing.push(Missing { file, why });
            }
        }
    }
    files.insert(0, "README.txt".to_owned());
    texts.insert(0, ("README.txt", contents));
    for (name, text) in texts {
        tar.add(&format!("{folder}/{name}"), text.as_bytes(), now / 1000);
    }
    let tar = tar.finish();
    let archive = flags
        .archive
        .unwrap_or_else(|| PathBuf::from(format!("{folder}.tar")));
    write(&archive, &tar)?;
    let made = Made {
        archive: archive.display().to_string(),
        bytes: tar.len() as u64,
        files,
        missing,
    };
    console.show(&made, text)
}

fn text(made: &Made) -> String {
    let mut text = format!(
        "{}: {} files, {} bytes\n",
        made.archive,
        made.files.len(),
        made.bytes
    );
    for Missing { file, why } in &made.missing {
        text.push_str(&format!("without {file}: {why}\n"));
    }
    text.push_str("look at it before you give it away: names, addresses and paths are in it\n");
    text
}

/// Written at once, for its owner alone, and never over another file.
fn write(archive: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let made = options.open(archive).and_then(|mut file| {
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        if written.is_err() {
            // A part of an archive helps nobody; the failure is told.
            let _ = std::fs::remove_file(archive);
        }
        written
    });
    made.map_err(|error| {
        let message = format!("{} cannot be written: {error}", archive.display());
        Failure::new("failed", message, "name another file")
    })
}

/// The secrets that this host's files and variables tell of.
fn what_is_secret(config: Option<&Config>, files: &[&Path]) -> Scrubber {
    let mut scrubber = Scrubber::default();
    know_variables(
        &mut scrubber,
        &environment_of(Some(std::process::id().into())),
    );
    for file in files {
        let token = start_of(file);
        scrubber.know(&token);
        scrubber.know(token.rsplit('_').next().unwrap_or_default());
    }
    let Some(config) = config else {
        return scrubber;
    };
    let store = &config.store;
    for secret in [&store.secret_key, &store.session_token]
        .into_iter()
        .flatten()
    {
        scrubber.know(secret.expose());
    }
    if let Some(id) = &store.access_key {
        scrubber.know(id);
    }
    if let Some(file) = &store.secret_key_file {
        scrubber.know(&start_of(file));
    }
    for file in [&store.credentials_file, &config.keys.keyring]
        .into_iter()
        .flatten()
    {
        scrubber.know_values(&start_of(file));
    }
    if let Some(file) = &config.access.tls_key {
        let text = start_of(file);
        text.lines()
            .filter(|line| !line.starts_with("---"))
            .for_each(|line| scrubber.know(line));
    }
    scrubber
}

/// A process's environment, as far as whoever asks may see it: the daemon's may have the store's keys.
fn environment_of(pid: Option<u64>) -> String {
    pid.map_or_else(String::new, |pid| {
        start_of(Path::new(&format!("/proc/{pid}/environ")))
    })
}

fn know_variables(scrubber: &mut Scrubber, environment: &str) {
    for (name, value) in environment
        .split('\0')
        .filter_map(|variable| variable.split_once('='))
    {
        if SECRET_VARIABLES.contains(&name) {
            scrubber.know(value);
        }
    }
}

/// What a small file begins with; nothing, if it cannot be read: what nobody here can read did not get here either.
fn start_of(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(SECRETS_BYTES_MAX).read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}

/// What the daemon answers, and its process.
async fn of_the_daemon(client: &Client) -> (Vec<Part>, Option<u64>) {
    // Side by side, so that a daemon that does not answer is waited for once.
    let (status, activity, volumes, tenants, doctor, metrics) = tokio::join!(
        json(client.status()),
        json(client.activity()),
        json(client.list_volumes(None)),
        json(client.list_tenants()),
        json(client.doctor()),
        asked(client.metrics_text()),
    );
    let pid = status
        .as_ref()
        .ok()
        .and_then(|status| status["pid"].as_u64());
    let pretty = |value: Result<Value, String>| value.map(|value| format!("{value:#}\n"));
    let without_credentials = tenants.map(|mut value| {
        leave_out(&mut value);
        value
    });
    let part = |name, about, text| Part { name, about, text };
    let parts = vec![
        part(
            "status.json",
            "how the daemon does: `quarry status`",
            pretty(status),
        ),
        part(
            "activity.json",
            "counters of what is attached: `quarry top`",
            pretty(activity),
        ),
        part(
            "volumes.json",
            "all volumes: `quarry volume list`",
            pretty(volumes),
        ),
        part(
            "tenants.json",
            "all tenants, without what says who gives their stores' keys",
            pretty(without_credentials),
        ),
        part(
            "doctor.json",
            "what is not as it should be: `quarry doctor`",
            pretty(doctor),
        ),
        part(
            "metrics.txt",
            "all metrics, in Prometheus' text format",
            metrics,
        ),
    ];
    (parts, pid)
}

/// An answer of the daemon, or why there is none.
async fn asked<T>(call: impl Future<Output = ApiResult<T>>) -> Result<T, String> {
    match timeout(ANSWER_TIME_MAX, call).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!(
            "the daemon did not answer within {ANSWER_TIME_MAX:?}"
        )),
    }
}

async fn json<T: Serialize>(call: impl Future<Output = ApiResult<T>>) -> Result<Value, String> {
    let answer = asked(call).await?;
    serde_json::to_value(answer).map_err(|error| error.to_string())
}

/// Takes out who gives the keys, wherever that stands.
fn leave_out(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(leave_out),
        Value::Object(fields) => {
            for (name, value) in fields {
                match name.as_str() {
                    "credentials" | "external_id" => *value = LEFT_OUT.into(),
                    _ => leave_out(value),
                }
            }
        }
        _ => {}
    }
}

fn of_the_host(
    flags: &BundleFlags,
    config: Result<Config, quarry_config::ConfigError>,
) -> Vec<Part> {
    let part = |name, about, text| Part { name, about, text };
    let audit = match &config {
        Ok(config) => count_audit(&audit_log(config)),
        Err(_) => Err("without the configuration it is not known where it is".to_owned()),
    };
    let log = match &flags.log {
        Some(path) => tail(path).map_err(|error| format!("{}: {error}", path.display())),
        None => {
            Err("name it with --log; of a unit, `journalctl -u quarry > FILE` makes one".to_owned())
        }
    };
    // Its `Debug` hides secrets, as its errors do.
    let config = config.map(|config| format!("{config:#?}\n"));
    vec![
        part(
            "version.txt",
            "this program's version",
            Ok(format!("quarry {}\n", env!("CARGO_PKG_VERSION"))),
        ),
        part(
            "config.txt",
            "the configuration file as it is understood; flags and variables are not in it",
            config.map_err(|error| error.to_string()),
        ),
        part(
            "kernel.txt",
            "the kernel, its io_uring and its ublk; what that can do is in status.json",
            Ok(kernel()),
        ),
        part(
            "audit.txt",
            "how long the audit log is; nothing of what is in it",
            audit,
        ),
        part("log.txt", "the end of the daemon's log", log),
    ]
}

fn kernel() -> String {
    let uname = rustix::system::uname();
    let words = [
        uname.sysname(),
        uname.release(),
        uname.version(),
        uname.machine(),
    ];
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    let mut text = format!("{}\n", words.join(" "));
    for path in KERNEL_FILES {
        // Where one is not there, that is said.
        let found = std::fs::read_to_string(path).unwrap_or_else(|error| format!("{error}\n"));
        text.push_str(&format!("\n{path}:\n{found}"));
    }
    for path in [
        "/dev/ublk-control",
        "/sys/module/ublk_drv",
        "/sys/module/nbd",
    ] {
        let there = if Path::new(path).exists() {
            "is there"
        } else {
            "is not there"
        };
        text.push_str(&format!("\n{path} {there}"));
    }
    text.push('\n');
    text
}

fn audit_log(config: &Config) -> PathBuf {
    let path = config.access.audit_log.clone();
    path.unwrap_or_else(|| config.daemon.data_dir.join("audit.jsonl"))
}

fn count_audit(path: &Path) -> Result<String, String> {
    let count = || -> io::Result<(u64, u64)> {
        let file = File::open(path)?;
        let bytes = file.metadata()?.len();
        let (mut reader, mut lines) = (BufReader::new(file), 0);
        loop {
            let found = reader.fill_buf()?;
            if found.is_empty() {
                return Ok((lines, bytes));
            }
            lines += found.iter().filter(|byte| **byte == b'\n').count() as u64;
            let read = found.len();
            reader.consume(read);
        }
    };
    let (lines, bytes) = count().map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(format!(
        "{}: {lines} lines, {bytes} bytes\n",
        path.display()
    ))
}

/// The end of a file, from the beginning of a line on.
fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let from = file.metadata()?.len().saturating_sub(LOG_BYTES_MAX);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let whole = match text.split_once('\n') {
        // Half a line may be half a secret.
        Some((_, rest)) if from > 0 => rest,
        None if from > 0 => "",
        _ => &text,
    };
    Ok(whole.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_that_is_too_long_begins_with_a_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let line = format!("{}\n", "x".repeat(999));
        std::fs::write(&path, format!("first\n{}", line.repeat(5000))).unwrap();
        let text = tail(&path).unwrap();
        assert!(text.len() as u64 <= LOG_BYTES_MAX && text.starts_with(&line));
        std::fs::write(&path, "first\nsecond\n").unwrap();
        assert_eq!(tail(&path).unwrap(), "first\nsecond\n");
    }

    #[test]
    fn who_gives_keys_is_left_out_of_tenants() {
        let mut value = serde_json::json!({"tenants": [{"settings": {"store": {"credentials": "profile:x", "url": "s3://b"}}}]});
        leave_out(&mut value);
        assert_eq!(
            value["tenants"][0]["settings"]["store"]["credentials"],
            LEFT_OUT
        );
        assert_eq!(value["tenants"][0]["settings"]["store"]["url"], "s3://b");
    }
}
