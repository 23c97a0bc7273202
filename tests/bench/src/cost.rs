//! What Quarry costs past what a machine can run: objects, map, requests and money of a fleet of volumes.
//!
//! A few volumes of each shape are lived through, block by block, and counted for all of that shape.

pub mod model;
pub mod shape;

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use quarry_volume::Tuning;

use self::model::{BLOCK, Bill, Settings, Stock, Volume};
use self::shape::{Op, Shape, User};
use crate::report::write_between_marks;

const DAY_MS: u64 = 86_400_000;
const GIB: f64 = (1_u64 << 30) as f64;
const DAYS_A_MONTH: f64 = 30.0;
/// How much busier and how much less busy volumes of one shape are than their mean: quantiles of a log-normal
/// distribution with sigma 1.5, scaled to a mean of 1.
const TIMES: [f64; 6] = [0.027, 0.10, 0.25, 0.53, 1.18, 3.91];

/// What a fleet of volumes costs.
#[derive(Args)]
pub struct Arguments {
    /// Volumes of the fleet.
    #[arg(long, default_value_t = 10_000)]
    volumes: u64,
    /// Size of each, in GiB.
    #[arg(long, default_value_t = 10.24)]
    gib: f64,
    /// How much of each is written before the time begins, in percent.
    #[arg(long, default_value_t = 60)]
    filled: u64,
    /// Days that are lived through; the first third is not counted.
    #[arg(long, default_value_t = 3)]
    days: u64,
    /// How much of each its host's cache holds, in percent.
    #[arg(long, default_value_t = 20)]
    cached: u64,
    /// The daemons' `writeback.delay`, in seconds, of each table.
    #[arg(long, value_delimiter = ',', default_value = "5,30")]
    delay: Vec<u64>,
    /// Stored bytes of a hundred.
    #[arg(long, default_value_t = 60)]
    compression: u64,
    /// For 1,000 PUTs.
    #[arg(long, default_value_t = 0.005)]
    put: f64,
    /// For 1,000 GETs.
    #[arg(long, default_value_t = 0.0004)]
    get: f64,
    /// For a GiB kept for a month.
    #[arg(long, default_value_t = 0.023)]
    gib_month: f64,
    /// The page whose table is written anew.
    #[arg(long)]
    write: Option<PathBuf>,
}

/// What the volumes of a shape came to.
struct Found {
    name: String,
    volumes: f64,
    /// A day.
    bill: Bill,
    stock: Stock,
    days: f64,
    lived: f64,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        arguments.days > 0 && arguments.gib > 0.01,
        "nothing to live through"
    );
    let mut text = String::new();
    for delay in &arguments.delay {
        let mut rows = Vec::new();
        for shape in Shape::ALL {
            eprintln!("{delay} s, {}", shape.name());
            rows.push(live(arguments, shape, *delay, false)?);
        }
        rows.push(live(arguments, Shape::Ycsb, *delay, true)?);
        writeln!(
            text,
            "### Uploaded after {delay} s\n\n{}",
            table(arguments, &rows)
        )?;
    }
    print!("{text}");
    match &arguments.write {
        Some(page) => write_between_marks(page, "figures", &text),
        None => Ok(()),
    }
}

fn live(arguments: &Arguments, shape: Shape, delay: u64, flush_to_store: bool) -> Result<Found> {
    let size = blocks_of(arguments.gib) * BLOCK;
    let settings = Settings {
        cache_blocks: size / BLOCK * arguments.cached / 100,
        compression_percent: arguments.compression,
        flush_to_store,
        tuning: Tuning {
            writeback_delay_ms: delay * 1000,
            ..Tuning::default()
        },
        ..Settings::default()
    };
    let (mut bill, mut stock) = (Bill::default(), Stock::default());
    for (seed, times) in (0..).zip(TIMES) {
        let mut volume = Volume::new(size, settings);
        for first in (0..size / BLOCK * arguments.filled / 100).step_by(256) {
            volume.write(first, 256.min(size / BLOCK - first));
        }
        volume.drain();
        let mut user = User::new(shape, size / BLOCK, times, seed);
        let (begin, end) = (arguments.days * DAY_MS / 3, arguments.days * DAY_MS);
        let mut is_counted = false;
        loop {
            let (now_ms, op) = user.next();
            volume.at(now_ms.min(end));
            if now_ms >= begin && !is_counted {
                // What came before is not.
                volume.take_bill();
                is_counted = true;
            }
            if now_ms >= end {
                break;
            }
            match op {
                Op::Write { first, count } => volume.write(first, count),
                Op::Read { first, count } => volume.read(first, count),
                Op::Flush => volume.flush(),
            }
        }
        bill += &volume.take_bill();
        stock += &volume.stock();
    }
    Ok(Found {
        name: match flush_to_store {
            true => format!("{}, flushes to the store", shape.name()),
            false => shape.name().to_owned(),
        },
        volumes: match flush_to_store {
            true => 0.0,
            false => (arguments.volumes * shape.share()) as f64 / 100.0,
        },
        bill,
        stock,
        days: arguments.days as f64 * 2.0 / 3.0,
        lived: TIMES.len() as f64,
    })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a size that was looked at"
)]
fn blocks_of(gib: f64) -> u64 {
    (gib * GIB / BLOCK as f64) as u64
}

/// What a table's row says of the volumes it is about.
#[derive(Default)]
struct Row {
    puts: f64,
    gets: f64,
    requests_dollars: f64,
    storage_dollars: f64,
    objects: f64,
    stored_gib: f64,
    map_gib: f64,
    block_puts: f64,
}

impl Row {
    fn of(arguments: &Arguments, found: &Found, volumes: f64) -> Self {
        let a_day = |count: u64| count as f64 / found.days / found.lived * volumes;
        let now = |count: u64| count as f64 / found.lived * volumes;
        let (puts, gets) = (a_day(found.bill.puts), a_day(found.bill.gets));
        let money = puts * arguments.put / 1000.0 + gets * arguments.get / 1000.0;
        let stored_gib = now(found.stock.bytes) / GIB;
        Self {
            puts,
            gets,
            requests_dollars: money * DAYS_A_MONTH,
            storage_dollars: stored_gib * arguments.gib_month,
            objects: now(found.stock.objects),
            stored_gib,
            map_gib: now(found.stock.map_bytes) / GIB,
            block_puts: a_day(found.bill.block_puts),
        }
    }

    fn add(&mut self, other: &Self) {
        self.puts += other.puts;
        self.gets += other.gets;
        self.requests_dollars += other.requests_dollars;
        self.storage_dollars += other.storage_dollars;
        self.objects += other.objects;
        self.stored_gib += other.stored_gib;
        self.map_gib += other.map_gib;
        self.block_puts += other.block_puts;
    }
}

fn table(arguments: &Arguments, rows: &[Found]) -> String {
    let mut text = String::from(
        "| a volume | writes a day | PUTs a day | GETs a day | bytes uploaded a byte written | of them map, compaction | stored a byte needed | objects | map, MiB | requests, $ a month | storage, $ a month | PUTs as 256 KiB blocks, times |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut fleet = Row::default();
    for found in rows {
        let one = Row::of(arguments, found, 1.0);
        let written = found.bill.written_bytes.max(1) as f64;
        let part = |bytes: u64| bytes as f64 / written;
        let needed = (found.stock.live_bytes * arguments.compression / 100).max(1) as f64;
        writeln!(
            text,
            "| {} | {:.0} | {:.0} | {:.0} | {:.2} | {:.2}, {:.2} | {:.2} | {:.0} | {:.1} | {:.3} | {:.3} | {:.1} |",
            found.name,
            found.bill.writes as f64 / found.days / found.lived,
            one.puts,
            one.gets,
            part(found.bill.put_bytes),
            part(found.bill.map_bytes),
            part(found.bill.moved_bytes),
            found.stock.bytes as f64 / needed,
            one.objects,
            one.map_gib * 1024.0,
            one.requests_dollars,
            one.storage_dollars,
            one.block_puts / one.puts.max(1.0),
        )
        .expect("text takes all");
        fleet.add(&Row::of(arguments, found, found.volumes));
    }
    writeln!(
        text,
        "\nThe fleet, {} volumes of {} GiB: {:.1} million objects, {:.1} TiB stored, of which {:.1} GiB are maps; {:.0} PUTs and {:.0} GETs a second; \
         ${:.0} a month for requests, ${:.0} for storage. As blocks of 256 KiB, each an object, written in the same batches: {:.0} PUTs a second, ${:.0} a month.",
        arguments.volumes,
        arguments.gib,
        fleet.objects / 1e6,
        fleet.stored_gib / 1024.0,
        fleet.map_gib,
        fleet.puts / 86_400.0,
        fleet.gets / 86_400.0,
        fleet.requests_dollars,
        fleet.storage_dollars,
        fleet.block_puts / 86_400.0,
        fleet.block_puts * arguments.put / 1000.0 * DAYS_A_MONTH,
    )
    .expect("text takes all");
    text
}
