//! What users of volumes do, in the shapes that are told of open traces and benchmarks.
//!
//! A shape is not a trace: it has a trace's rates, sizes, shares of writes and skew, as published, and a seed.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::model::BLOCK;

/// What a user asks for, in blocks of [`BLOCK`] bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Write { first: u64, count: u64 },
    Read { first: u64, count: u64 },
    Flush,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// A machine that does nothing: a file system's journal, some logs.
    Idle,
    /// Alibaba's block traces of 2020: 1,000 volumes, 20 billion requests in 31 days, three writes to a read, small,
    /// most to few places, and rates that differ by orders of magnitude.
    Alibaba,
    /// MSR Cambridge's traces of 2007: 36 volumes of servers, 434 million requests in a week, in bursts, with runs.
    Msr,
    /// YCSB A on a database: pages by zipf 0.99, half of it updates, each with a record in a log that is flushed.
    Ycsb,
    /// fio's `random_distribution=zipf:1.2`, writes of a block.
    FioZipf,
    /// Backups, or a log that is rewritten in a circle.
    Append,
    /// Writes of a block anywhere: nothing is worse.
    Uniform,
}

impl Shape {
    pub const ALL: [Self; 7] = [
        Self::Idle,
        Self::Alibaba,
        Self::Msr,
        Self::Ycsb,
        Self::FioZipf,
        Self::Append,
        Self::Uniform,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Alibaba => "alibaba",
            Self::Msr => "msr",
            Self::Ycsb => "ycsb-a",
            Self::FioZipf => "fio zipf",
            Self::Append => "append",
            Self::Uniform => "uniform",
        }
    }

    /// Requests a second of a volume, in the mean over time and over volumes.
    pub const fn rate(self) -> f64 {
        match self {
            Self::Idle => 0.5,
            Self::Alibaba => 7.5,
            Self::Msr => 20.0,
            Self::Ycsb => 50.0,
            Self::FioZipf => 20.0,
            Self::Append => 1.0,
            Self::Uniform => 20.0,
        }
    }

    /// Of a hundred volumes of the fleet.
    pub const fn share(self) -> u64 {
        match self {
            Self::Idle => 50,
            Self::Alibaba => 30,
            Self::Msr => 8,
            Self::Ycsb => 6,
            Self::FioZipf => 2,
            Self::Append => 3,
            Self::Uniform => 1,
        }
    }
}

/// Numbers below `n`, few of them often: Gray's method, as YCSB has it.
struct Zipf {
    n: f64,
    theta: f64,
    alpha: f64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    fn new(n: u64, theta: f64) -> Self {
        let sum = |n: u64| (1..=n).map(|i| 1.0 / (i as f64).powf(theta)).sum::<f64>();
        // Past a million terms the sum is its integral.
        let exact = n.min(1 << 20);
        let mut zeta = sum(exact);
        if n > exact {
            let part = |x: f64| x.powf(1.0 - theta) / (1.0 - theta);
            zeta += part(n as f64) - part(exact as f64);
        }
        Self {
            n: n as f64,
            theta,
            alpha: 1.0 / (1.0 - theta),
            zeta,
            eta: (1.0 - (2.0 / n as f64).powf(1.0 - theta)) / (1.0 - sum(2) / zeta),
        }
    }

    fn next(&self, random: &mut StdRng) -> u64 {
        let u: f64 = random.random();
        let uz = u * self.zeta;
        if uz < 1.0 {
            return 0;
        }
        if uz < 1.0 + 0.5_f64.powf(self.theta) {
            return 1;
        }
        let rank = self.n * (self.eta * u - self.eta + 1.0).powf(self.alpha);
        whole(rank.min(self.n - 1.0))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "of a number that is not negative and far below 2^53"
)]
const fn whole(number: f64) -> u64 {
    number.max(0.0) as u64
}

/// A user of one volume.
pub struct User {
    shape: Shape,
    random: StdRng,
    blocks: u64,
    zipf: Zipf,
    /// Requests a second.
    rate: f64,
    now_ms: f64,
    /// Where a run goes on, and how long it still is.
    run: (u64, u64),
    /// Where the log is.
    log: u64,
    /// What comes with the request before it.
    next: Vec<Op>,
}

impl User {
    /// Of a volume of so many blocks, with `times` the shape's rate.
    pub fn new(shape: Shape, blocks: u64, times: f64, seed: u64) -> Self {
        let (grain, theta) = match shape {
            Shape::FioZipf => (1, 1.2),
            Shape::Ycsb => (2, 0.99),
            _ => (1, 0.9),
        };
        Self {
            shape,
            random: StdRng::seed_from_u64(seed),
            blocks,
            zipf: Zipf::new(blocks / grain, theta),
            rate: shape.rate() * times,
            now_ms: 0.0,
            run: (0, 0),
            log: 0,
            next: Vec::new(),
        }
    }

    /// What is asked for next, and when, in milliseconds since the start.
    pub fn next(&mut self) -> (u64, Op) {
        if let Some(op) = self.next.pop() {
            return (whole(self.now_ms), op);
        }
        self.wait();
        let op = match self.shape {
            Shape::Idle => self.idle(),
            Shape::Alibaba => self.skewed(0.75, &[1, 1, 1, 2, 4, 16]),
            Shape::Msr => self.msr(),
            Shape::Ycsb => self.ycsb(),
            Shape::FioZipf => self.skewed(1.0, &[1]),
            Shape::Append => self.append(),
            Shape::Uniform => Op::Write {
                first: self.random.random_range(0..self.blocks),
                count: 1,
            },
        };
        (whole(self.now_ms), op)
    }

    /// Until the next request: at random, with the day; MSR's in bursts of a hundred.
    fn wait(&mut self) {
        let day = (self.now_ms / 86_400_000.0 * std::f64::consts::TAU).sin();
        let rate = self.rate * (1.0 + 0.6 * day);
        let u: f64 = self.random.random_range(1e-9..1.0);
        let mean_ms = 1000.0 / rate;
        self.now_ms += match self.shape {
            Shape::Msr if self.random.random_range(0..100) > 0 => -u.ln(),
            Shape::Msr => -u.ln() * mean_ms * 100.0,
            _ => -u.ln() * mean_ms,
        };
    }

    /// A popular place: a rank spread over the volume, in pieces of 1 MiB that stay together.
    fn popular(&mut self) -> u64 {
        let rank = self.zipf.next(&mut self.random);
        let (piece, rest) = (rank / 256, rank % 256);
        let pieces = (self.blocks / 256).max(1);
        let spread = piece.wrapping_mul(0x9E37_79B9_7F4A_7C15) % pieces;
        (spread * 256 + rest) % self.blocks
    }

    fn some_of(&mut self, counts: &[u64]) -> u64 {
        counts[self.random.random_range(0..counts.len())]
    }

    fn skewed(&mut self, writes: f64, counts: &[u64]) -> Op {
        let count = self.some_of(counts);
        let first = self.popular().min(self.blocks - count);
        match self.random.random::<f64>() < writes {
            true => Op::Write { first, count },
            false => Op::Read { first, count },
        }
    }

    /// Seven in ten are writes; six in ten go on where the one before them ended.
    fn msr(&mut self) -> Op {
        if self.run.1 == 0 || self.random.random_range(0..10) >= 6 {
            self.run = (self.popular(), 32);
        }
        let count = self.some_of(&[1, 2, 4, 16]);
        let first = self.run.0.min(self.blocks - count);
        self.run = (first + count, self.run.1 - 1);
        match self.random.random_range(0..10) < 7 {
            true => Op::Write { first, count },
            false => Op::Read { first, count },
        }
    }

    /// A journal's commit: some blocks in a row in the first 64 MiB, a popular place, a flush.
    fn idle(&mut self) -> Op {
        let count = self.some_of(&[2, 3, 4, 8]);
        let journal = (self.blocks / 2).clamp(16, 16_384);
        self.log = if self.log + count >= journal {
            0
        } else {
            self.log + count
        };
        let first = self.popular();
        self.next = vec![Op::Flush, Op::Write { first, count: 1 }];
        Op::Write {
            first: self.log,
            count,
        }
    }

    /// Pages of 8 KiB; a log of 256 MiB at most, written in a circle.
    fn ycsb(&mut self) -> Op {
        let log = (self.blocks / 8).min(65_536);
        let pages = (self.blocks - log) / 2;
        let page = self
            .zipf
            .next(&mut self.random)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            % pages;
        let (first, count) = (log + page * 2, 2);
        if self.random.random() {
            return Op::Read { first, count };
        }
        self.log = (self.log + 1) % log;
        self.next = vec![Op::Write { first, count }, Op::Flush];
        Op::Write {
            first: self.log,
            count: 1,
        }
    }

    fn append(&mut self) -> Op {
        let count = ((1 << 20) / BLOCK).min(self.blocks);
        if self.log + count > self.blocks {
            self.log = 0;
        }
        let first = self.log;
        self.log += count;
        Op::Write { first, count }
    }
}
