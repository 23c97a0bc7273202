//! A running `quarry serve`: a child of the test, ended with it.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{Nbd, Site, http_get, metric_sum};

/// How long a daemon may take until it is ready.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long a daemon may take to end when asked to.
const STOP_PATIENCE: Duration = Duration::from_secs(90);
/// How much of a daemon's log a failed test shows.
const LOG_LINES_SHOWN: usize = 60;

/// A daemon that was ready once.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    site: Site,
}

impl Daemon {
    pub(crate) fn start(site: Site) -> Result<Self> {
        let mut daemon = Self::spawn(site, &[])?;
        daemon.await_ready()?;
        Ok(daemon)
    }

    /// Has a daemon of `site` replace it, and waits until that one is ready.
    ///
    /// # Errors
    /// If this one ends badly or not at all, or the other does not come up.
    pub fn replaced_by(mut self, site: &Site) -> Result<Self> {
        let mut next = Self::spawn(site.clone(), &["--replace"])?;
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "quarry serve ended with {status}");
                break;
            }
            next.assert_alive()?;
            ensure!(
                begun.elapsed() < STOP_PATIENCE,
                "quarry serve was not replaced in {STOP_PATIENCE:?}"
            );
            thread::sleep(Duration::from_millis(10));
        }
        next.await_ready()?;
        Ok(next)
    }

    fn spawn(site: Site, flags: &[&str]) -> Result<Self> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(site.log())?;
        let mut command = site.server()?;
        command
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        Ok(Self { child, site })
    }

    fn await_ready(&mut self) -> Result<()> {
        let begun = Instant::now();
        while !self.is_ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("quarry serve ended at once ({status})\n{}", self.log());
            }
            ensure!(
                begun.elapsed() < START_PATIENCE,
                "quarry serve is not ready after {START_PATIENCE:?}\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn is_ready(&self) -> bool {
        http_get(&self.site.socket(), "/readyz").is_ok_and(|answer| answer.status == 200)
    }

    /// Where it lives.
    #[must_use]
    pub const fn site(&self) -> &Site {
        &self.site
    }

    /// Asks it to end, and waits.
    ///
    /// # Errors
    /// If it ended badly, or not at all in [`STOP_PATIENCE`] (it is killed then).
    pub fn stop(mut self) -> Result<()> {
        kill_process(self.pid(), Signal::TERM)?;
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "quarry serve ended with {status}");
                return Ok(());
            }
            ensure!(
                begun.elapsed() < STOP_PATIENCE,
                "quarry serve did not end in {STOP_PATIENCE:?}"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it as `kill -9` does.
    ///
    /// # Errors
    /// If it had ended by itself before.
    pub fn kill(mut self) -> Result<()> {
        ensure!(
            self.child.try_wait()?.is_none(),
            "quarry serve ended before it was killed\n{}",
            self.log()
        );
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Kills it after `delay`, from another thread; join that before [`Daemon::reap`].
    #[must_use]
    pub fn kill_after(&self, delay: Duration) -> thread::JoinHandle<io::Result<()>> {
        let pid = self.pid();
        thread::spawn(move || {
            thread::sleep(delay);
            // Nobody has waited for the child yet, so the number is still its own.
            Ok(kill_process(pid, Signal::KILL)?)
        })
    }

    /// Waits for a daemon that was killed.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn reap(mut self) -> Result<()> {
        self.child.wait()?;
        Ok(())
    }

    /// Fails unless it is still running.
    ///
    /// # Errors
    /// With the end of its log.
    pub fn assert_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("quarry serve ended ({status})\n{}", self.log());
        }
        Ok(())
    }

    /// Its process.
    #[must_use]
    pub fn process_id(&self) -> u32 {
        self.child.id()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Its resident memory in bytes.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .context("no VmRSS line")?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kib << 10)
    }

    /// The last lines that it printed.
    #[must_use]
    pub fn log(&self) -> String {
        let text = fs::read(self.site.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        let shown = lines.len().saturating_sub(LOG_LINES_SHOWN);
        lines[shown..].join("\n")
    }

    /// The answer of `quarry ARGUMENTS --output json`.
    ///
    /// # Errors
    /// If it fails.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        self.site.quarry_json(arguments)?.json()
    }

    /// Calls `quarry ARGUMENTS`, which must succeed.
    ///
    /// # Errors
    /// If it does not.
    pub fn quarry(&self, arguments: &[&str]) -> Result<()> {
        self.site.quarry(arguments)?.ok().map(drop)
    }

    /// Makes the tenant of `volume` (`tenant/name`) unless it is there, and the volume.
    ///
    /// # Errors
    /// If it is there already.
    pub fn create(&self, volume: &str, size: u64, options: &[&str]) -> Result<()> {
        let (tenant, _) = volume.split_once('/').context("a volume is tenant/name")?;
        let made = self.site.quarry_json(&["tenant", "create", tenant])?;
        if made.code != Some(0) {
            let known = self.json(&["tenant", "list"])?.to_string();
            ensure!(known.contains(&format!("\"{tenant}\"")), "{made}");
        }
        let size = format!("{size}B");
        let call = ["volume", "create", volume, "--size", &size];
        self.quarry(&[&call, options].concat())
    }

    /// Attaches `volume` by NBD and connects to it.
    ///
    /// # Errors
    /// If it cannot be attached.
    pub fn attach(&self, volume: &str, options: &[&str]) -> Result<Nbd> {
        let call = ["volume", "attach", volume, "--via", "nbd"];
        self.json(&[&call, options].concat())?;
        self.connect(volume)
    }

    /// Makes, attaches and connects to a volume.
    ///
    /// # Errors
    /// If any of these fails.
    pub fn fresh_volume(&self, volume: &str, size: u64, options: &[&str]) -> Result<Nbd> {
        self.create(volume, size, options)?;
        self.attach(volume, &[])
    }

    /// Connects to a volume that is attached by NBD.
    ///
    /// # Errors
    /// If it is not attached.
    pub fn connect(&self, volume: &str) -> Result<Nbd> {
        let (socket, export) = nbd_place(&self.uri(volume)?)?;
        Ok(Nbd::connect(&socket, &export)?)
    }

    /// The NBD address of an attached volume, as other programs take it.
    ///
    /// # Errors
    /// If it is not attached by NBD.
    pub fn uri(&self, volume: &str) -> Result<String> {
        let shown = self.show(volume)?;
        find_uri(&shown)
            .map(str::to_owned)
            .with_context(|| format!("no NBD address in {shown}"))
    }

    /// The answer of `volume show`.
    ///
    /// # Errors
    /// If there is no such volume.
    pub fn show(&self, volume: &str) -> Result<Value> {
        self.json(&["volume", "show", volume])
    }

    /// Waits until everything acknowledged so far is in the object store.
    ///
    /// # Errors
    /// If that cannot be.
    pub fn sync(&self, volume: &str) -> Result<()> {
        self.quarry(&["volume", "sync", volume])
    }

    /// Its metrics.
    ///
    /// # Errors
    /// If they cannot be had.
    pub fn metrics(&self) -> Result<String> {
        let answer = http_get(&self.site.socket(), "/metrics")?;
        ensure!(answer.status == 200, "/metrics answers {}", answer.status);
        Ok(answer.body)
    }

    /// What the samples of a metric that counts come to, whose labels contain `label` (`""`: all).
    ///
    /// # Errors
    /// If there are none.
    pub fn count(&self, name: &str, label: &str) -> Result<u64> {
        let found = metric_sum(&self.metrics()?, name, label);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "what is counted is whole and not negative"
        )]
        let count = found.map(|value| value as u64);
        count.with_context(|| format!("no {name} metric"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("-- the end of {}", self.site.log().display());
            eprintln!("{}", self.log());
        }
        // It may have ended already, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The first NBD address anywhere in a JSON answer.
fn find_uri(answer: &Value) -> Option<&str> {
    match answer {
        Value::String(text) => text.starts_with("nbd+unix://").then_some(text),
        Value::Array(items) => items.iter().find_map(find_uri),
        Value::Object(fields) => fields.values().find_map(find_uri),
        _ => None,
    }
}

/// Socket and export of `nbd+unix:///EXPORT?socket=PATH`.
fn nbd_place(uri: &str) -> Result<(PathBuf, String)> {
    let rest = uri.strip_prefix("nbd+unix:///").context("not nbd+unix")?;
    let (export, socket) = rest.split_once("?socket=").context("no socket")?;
    let plain = |text: &str| !text.contains('%');
    ensure!(plain(export) && plain(socket), "escapes in {uri}");
    Ok((PathBuf::from(socket), export.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nbd_place_of_uri_is_socket_and_export() {
        let (socket, export) = nbd_place("nbd+unix:///acme/db?socket=/run/q.sock").unwrap();
        assert_eq!(socket, PathBuf::from("/run/q.sock"));
        assert_eq!(export, "acme/db");
        assert!(nbd_place("nbd://host/x").is_err());
    }

    #[test]
    fn uri_is_found_deep_in_an_answer() {
        let answer = serde_json::json!({"a": 1, "attached": {"uri": "nbd+unix:///t/v?socket=/s"}});
        assert_eq!(find_uri(&answer), Some("nbd+unix:///t/v?socket=/s"));
        assert_eq!(find_uri(&Value::Null), None);
    }
}
