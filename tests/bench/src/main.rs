//! Quarry beside those whom a user would pick instead, and beside the limits of the machine, in one run on one S3 server.
//!
//! Everything is measured in rounds, each of which has all targets in turn: what the machine does beside falls on all,
//! and ratios are formed within a round. `tests/bench/README.md` says what each work is and what it needs.

mod ceiling;
mod cost;
mod extreme;
mod lab;
mod report;
mod store;
mod target;
mod work;

use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand};

use self::lab::Lab;
use self::report::Report;

/// Measures Quarry and its peers, and writes a table, a plot and the figures.
#[derive(Parser)]
#[command(name = "quarry-bench")]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Rounds of everything.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds for each work that takes a time, not an amount.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Size of the volumes, in MiB.
    #[arg(long, default_value_t = 2048)]
    mib: u64,
    /// Before each answer of the S3 server, in milliseconds.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// These targets only: quarry, qemu-nbd, nbdkit, s3backer, zerofs.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Where files are: caches, and what peers serve. A real disk says most.
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// Where `BENCHMARKS.md`, `benchmarks.json` and `pictures/benchmarks.svg` go; without it the table is only printed.
    #[arg(long)]
    write: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// What a fleet of volumes costs, by shapes of what their users do.
    Cost(cost::Arguments),
    /// A volume of 1 TiB in scattered pieces, and a host that dies with 10 GiB unsent.
    Extremes(extreme::Arguments),
    /// The S3 server: prints its address, and its counts for each line that it reads, until there is none.
    #[command(hide = true)]
    Store {
        #[arg(long)]
        delay_ms: u64,
        /// Chunks that are not there are made up, of zeroes.
        #[arg(long)]
        making_up: bool,
        /// Memory for objects that is there at the start, in MiB.
        #[arg(long, default_value_t = 4096)]
        memory_mib: u64,
    },
    /// A bare client of such a server: prints the MiB/s of whole objects, and the median and the 99th percentile of ranges
    /// of 4 KiB in microseconds.
    #[command(hide = true)]
    Bare {
        address: SocketAddr,
        /// What it writes first, and reads.
        #[arg(long)]
        mib: u64,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match &arguments.command {
        Some(Command::Store {
            delay_ms,
            making_up,
            memory_mib,
        }) => {
            store::page_in(*memory_mib);
            return serve(Duration::from_millis(*delay_ms), *making_up);
        }
        Some(Command::Cost(arguments)) => return cost::run(arguments),
        Some(Command::Bare { .. } | Command::Extremes(_)) | None => {}
    }
    let provider = rustls::crypto::ring::default_provider().install_default();
    ensure!(
        provider.is_ok(),
        "another provider of cryptography is installed"
    );
    if let Some(Command::Bare { address, mib }) = arguments.command {
        return bare(address, mib);
    }
    ensure!(
        std::env::var_os("QUARRY_BIN").is_some(),
        "QUARRY_BIN is to name the program, of a release build: `tests/bench/run` sees to it"
    );
    ensure!(arguments.rounds > 0, "no rounds, no figures");
    std::fs::create_dir_all(&arguments.dir)?;
    let dir = tempfile::Builder::new()
        .prefix("bench.")
        .tempdir_in(&arguments.dir)
        .with_context(|| arguments.dir.display().to_string())?;
    let lab = Lab {
        dir: dir.path().canonicalize()?,
        size: arguments.mib << 20,
        time: Duration::from_secs(arguments.seconds),
        delay: Duration::from_millis(arguments.delay_ms),
    };
    if let Some(Command::Extremes(arguments)) = &arguments.command {
        return extreme::run(arguments, &lab);
    }
    let names: Vec<_> = target::all(&lab).iter().map(|t| t.name()).collect();
    let unknown = arguments
        .only
        .iter()
        .find(|only| !names.contains(&only.as_str()));
    if let Some(unknown) = unknown {
        bail!("there is no target {unknown}, but {}", names.join(", "));
    }
    let mut report = Report::default();
    for round in 0..arguments.rounds {
        eprintln!("round {} of {}", round + 1, arguments.rounds);
        report.begin_round();
        ceiling::measure(&lab, &mut report)?;
        for mut target in target::all(&lab) {
            let name = target.name();
            if !arguments.only.is_empty() && !arguments.only.iter().any(|only| only == name) {
                continue;
            }
            match target.missing() {
                Some(program) => report.leave_out(name, &program),
                None => work::measure(&lab, &mut *target, &mut report)
                    .with_context(|| format!("{name}, round {}", round + 1))?,
            }
        }
    }
    print!("{}", report.tables());
    match arguments.write {
        Some(dir) => report.write(&dir, &lab),
        None => Ok(()),
    }
}

fn bare(address: SocketAddr, mib: u64) -> Result<()> {
    let reads = ceiling::reads(address, mib << 20)?;
    let [median, p99] = [reads.median, reads.p99].map(|time| time.as_micros());
    println!("{:.0} {median} {p99}", reads.mib_a_second);
    Ok(())
}

fn serve(delay: Duration, making_up: bool) -> Result<()> {
    let memory = store::Memory::new(delay, making_up);
    let counted = memory.clone();
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.spawn(store::serve(memory, |address| println!("{address}")));
    // Whoever started it holds the other end, and with that its life.
    for line in std::io::stdin().lock().lines() {
        line?;
        let counts = counted.counted().map(|count| count.to_string());
        println!("{}", counts.join(" "));
        std::io::stdout().flush()?;
    }
    Ok(())
}
