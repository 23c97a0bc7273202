//! Where a run takes place: the directory, the sizes, the S3 server's process, and what the kernel counts of others.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::store::{self, ACCESS_KEY, SECRET_KEY};

/// What all targets have in common.
pub struct Lab {
    pub dir: PathBuf,
    /// Bytes of a volume.
    pub size: u64,
    /// For each work that takes a time.
    pub time: Duration,
    /// Before each answer of the store.
    pub delay: Duration,
}

/// What clients of the store did since it started.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    pub puts: u64,
    pub put_bytes: u64,
}

/// An S3 server in memory, in a process of its own; it ends when dropped.
pub struct Store {
    child: Child,
    ask: ChildStdin,
    answer: BufReader<ChildStdout>,
    address: SocketAddr,
}

impl Store {
    pub fn start(lab: &Lab) -> Result<Self> {
        Self::start_with(lab, &[])
    }

    /// One that makes up what chunks say that it lacks, of zeroes.
    pub fn start_making_up(lab: &Lab) -> Result<Self> {
        Self::start_with(lab, &["--making-up"])
    }

    fn start_with(lab: &Lab, flags: &[&str]) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["store", "--delay-ms", &lab.delay.as_millis().to_string()])
            .args(flags)
            .envs(store::MALLOC)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let ask = child.stdin.take().context("its input")?;
        let mut answer = BufReader::new(child.stdout.take().context("its output")?);
        let mut line = String::new();
        answer.read_line(&mut line)?;
        let address = line
            .trim()
            .parse()
            .with_context(|| format!("address {line:?}"))?;
        Ok(Self {
            child,
            ask,
            answer,
            address,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn counts(&mut self) -> Result<Counts> {
        self.ask.write_all(b"\n")?;
        let mut line = String::new();
        self.answer.read_line(&mut line)?;
        let numbers: Vec<u64> = line
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        ensure!(numbers.len() == 5, "the store's counts: {line:?}");
        Ok(Counts {
            puts: numbers[0],
            put_bytes: numbers[3],
        })
    }

    /// The variables with which programs reach it.
    pub fn environment(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://{}", self.address);
        let pairs = [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_ENDPOINT", &endpoint),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
            ("AWS_REGION", "us-east-1"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ];
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        pairs.into_iter().map(owned).collect()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // It may have ended, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Processor time that a process took so far, its ended threads' too.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may have spaces.
    let (_, fields) = stat.rsplit_once(')').context("no name")?;
    let ticks = |n: usize| -> Result<u64> {
        let field = fields.split_whitespace().nth(n).context("too short")?;
        Ok(field.parse()?)
    };
    let ticks = ticks(11)? + ticks(12)?;
    Ok(Duration::from_millis(
        ticks * 1000 / rustix::param::clock_ticks_per_second(),
    ))
}

/// The most memory that a process had so far, in bytes.
pub fn peak_memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line
        .context("no VmHWM")?
        .trim()
        .trim_end_matches("kB")
        .trim();
    Ok(kib.parse::<u64>()? << 10)
}
