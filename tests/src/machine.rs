//! A machine in QEMU, booted from a volume by the options that docs/QEMU.md tells, and talked to by its serial port.
//!
//! Owns: QEMU's process, the console. Does not own: the disk, which `tests/vm/build-qemu.sh` makes, nor what the machine is
//! used for.

use std::env;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{skip, target_dir};

/// How long a machine may take to boot, or to carry out a command: every instruction is emulated.
const PATIENCE: Duration = Duration::from_secs(180);
/// What the guest says when it takes commands, and when it has carried one out.
const UP: &str = "guest: up, with ";
const STATUS: &str = "guest: status ";

/// QEMU, and the image of a disk that boots.
#[derive(Clone, Debug)]
pub struct Qemu {
    place: PathBuf,
}

impl Qemu {
    /// What `tests/vm/build-qemu.sh` has made; without it the test is skipped.
    #[must_use]
    pub fn find() -> Option<Self> {
        let place = env::var_os("QUARRY_QEMU_CACHE")
            .map_or_else(|| target_dir().join("qemu"), PathBuf::from);
        if place.join("made-by").is_file() {
            return Some(Self { place });
        }
        skip(&format!(
            "no QEMU at {} (tests/vm/build-qemu.sh gets it)",
            place.display()
        ));
        None
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        self.place.join("qemu-system-x86_64")
    }

    /// The image of a disk: one partition from 1 MiB on, an ext4 that the machine boots from.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.place.join("boot.img")
    }

    /// The options of the command line in the block ` ```NAME ` of docs/QEMU.md, with each text of `changes` replaced, which
    /// must be in it.
    ///
    /// # Errors
    /// If there is no such block, or a text is not in it.
    pub fn options(name: &str, changes: &[(&str, &str)]) -> Result<Vec<String>> {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/QEMU.md");
        let page = fs::read_to_string(page)?;
        let (_, block) = page
            .split_once(&format!("\n```{name}\n"))
            .with_context(|| format!("no block {name} in docs/QEMU.md"))?;
        let (block, _) = block.split_once("\n```").context("a block ends")?;
        let mut line = block.replace("\\\n", " ");
        for (from, to) in changes {
            ensure!(line.contains(from), "no {from} in: {line}");
            line = line.replace(from, to);
        }
        let mut words = line.split_whitespace().map(str::to_owned);
        let program = words.next();
        ensure!(program.as_deref() == Some("qemu-system-x86_64"), "{line}");
        Ok(words.collect())
    }

    /// Starts a machine and waits until it takes commands; its monitor is at `monitor`.
    ///
    /// # Errors
    /// With its console, if it does not boot.
    pub fn boot(&self, options: &[String], monitor: &Path) -> Result<Machine> {
        let socket = format!("unix:{},server=on,wait=off", monitor.display());
        let mut command = Command::new(self.program());
        command
            .args(options)
            // No hardware of this host's, so that it is the same everywhere.
            .args(["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "1"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-serial", "stdio", "-monitor", &socket])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
        let input = child.stdin.take().context("a pipe")?;
        let output = child.stdout.take().context("a pipe")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else { return };
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut machine = Machine {
            child,
            input,
            lines,
            monitor: monitor.to_path_buf(),
            root: String::new(),
        };
        let (_, root) = machine.until(UP).context("it does not boot")?;
        machine.root = root;
        Ok(machine)
    }
}

/// A machine that was up once; killed with the test.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    monitor: PathBuf,
    root: String,
}

impl Machine {
    /// The guest's own line about its root file system.
    #[must_use]
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The lines up to one that begins so, and the rest of that.
    fn until(&mut self, wanted: &str) -> Result<(Vec<String>, String)> {
        let begun = Instant::now();
        let mut seen = Vec::new();
        loop {
            let left = PATIENCE.saturating_sub(begun.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(rest) = line.strip_prefix(wanted) {
                        return Ok((seen, rest.to_owned()));
                    }
                    seen.push(line);
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no {wanted:?} in {PATIENCE:?}:\n{}", seen.join("\n"))
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("QEMU ended:\n{}", seen.join("\n"))
                }
            }
        }
    }

    /// Gives the guest's shell a command; [`Machine::done`] waits for its end.
    ///
    /// # Errors
    /// If QEMU has ended.
    pub fn send(&mut self, command: &str) -> Result<()> {
        Ok(writeln!(self.input, "{command}")?)
    }

    /// What the command printed that was sent, when it has ended well.
    ///
    /// # Errors
    /// If it failed.
    pub fn done(&mut self) -> Result<String> {
        let (seen, status) = self.until(STATUS)?;
        let seen = seen.join("\n");
        ensure!(status == "0", "status {status}: {seen}");
        Ok(seen)
    }

    /// Has the guest's shell carry out a command, and gives what it printed.
    ///
    /// # Errors
    /// If it failed.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        self.done().with_context(|| command.to_owned())
    }

    /// Whether a command that was sent has ended within `time`; its end is then taken.
    ///
    /// # Errors
    /// If QEMU has ended.
    pub fn ends_within(&mut self, time: Duration) -> Result<bool> {
        let begun = Instant::now();
        loop {
            let left = time.saturating_sub(begun.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.starts_with(STATUS) => return Ok(true),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(false),
                Err(RecvTimeoutError::Disconnected) => bail!("QEMU ended"),
            }
        }
    }

    /// Gives QEMU's monitor a command, and gives its answer.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn monitor(&self, command: &str) -> Result<String> {
        const PROMPT: &[u8] = b"(qemu) ";
        let mut stream = UnixStream::connect(&self.monitor)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut answer = Vec::new();
        let mut until_prompt = |stream: &mut UnixStream| -> Result<String> {
            answer.clear();
            let mut byte = [0];
            while !answer.ends_with(PROMPT) {
                stream.read_exact(&mut byte)?;
                answer.extend(byte);
            }
            Ok(String::from_utf8_lossy(&answer).into_owned())
        };
        until_prompt(&mut stream)?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        until_prompt(&mut stream)
    }

    /// Waits until QEMU's `info status` has `wanted` in it.
    ///
    /// # Errors
    /// If it never has.
    pub fn await_status(&self, wanted: &str) -> Result<()> {
        let begun = Instant::now();
        loop {
            let status = self.monitor("info status")?;
            if status.contains(wanted) {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "no {wanted:?}: {status}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Has the guest switch itself off, and waits for QEMU's end.
    ///
    /// # Errors
    /// If it ended badly, or not at all.
    pub fn power_off(mut self) -> Result<()> {
        self.send("busybox poweroff -f")?;
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "QEMU ended with {status}");
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("the machine did not switch itself off in {PATIENCE:?}")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
