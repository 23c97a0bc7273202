//! What a run is like: every seed has a plan of its own, with some kinds of trouble and not others.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::device::DeviceFaults;
use super::store::Weather;

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    pub steps: u32,
    pub hosts: usize,
    pub volumes: usize,
    /// That a crash damages a record page too.
    pub flip: f64,
    /// Chances in one step.
    pub crash: f64,
    pub lose_cache: f64,
    pub fight: f64,
    pub detach: f64,
    pub read_elsewhere: f64,
    pub outage: f64,
    pub outage_max: Duration,
    /// The longest time in which nothing is asked for.
    pub nap_max: Duration,
    pub device: DeviceFaults,
    pub weather: Weather,
    /// How long a write waits for its upload.
    pub writeback_delay_ms: u64,
    /// Most sectors of a chunk.
    pub chunk_sectors_max: u32,
    /// How long an I/O of the cache device takes at most.
    pub io_ms_max: u64,
}

impl Plan {
    /// A plan without trouble.
    pub fn calm(seed: u64) -> Self {
        Self {
            seed,
            steps: 400,
            hosts: 1,
            volumes: 2,
            flip: 0.0,
            crash: 0.0,
            lose_cache: 0.0,
            fight: 0.0,
            detach: 0.01,
            read_elsewhere: 0.0,
            outage: 0.0,
            outage_max: Duration::ZERO,
            nap_max: Duration::from_secs(1),
            device: DeviceFaults::default(),
            weather: Weather::default(),
            writeback_delay_ms: 20,
            chunk_sectors_max: 256,
            io_ms_max: 3,
        }
    }

    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed ^ 0x706c_616e);
        let rng = &mut rng;
        let device = DeviceFaults {
            write: some(rng, 0.2, 0.002),
            read: some(rng, 0.2, 0.01),
            fill: some(rng, 0.3, 0.5),
            sync: some(rng, 0.2, 0.02),
        };
        let weather = Weather {
            error_before: some(rng, 0.5, 0.3),
            error_after: some(rng, 0.5, 0.2),
            lost_before: some(rng, 0.4, 0.05),
            lost_after: some(rng, 0.4, 0.05),
            short: some(rng, 0.4, 0.2),
            wrong: some(rng, 0.3, 0.2),
            slow: some(rng, 0.4, 0.3),
        };
        let long = rng.random_bool(0.05);
        let plan = Self {
            seed,
            steps: rng.random_range(300..900),
            hosts: rng.random_range(1..=3),
            volumes: rng.random_range(1..=3),
            crash: some(rng, 0.9, 0.015),
            lose_cache: some(rng, 0.3, 0.002),
            flip: some(rng, 0.3, 0.5),
            fight: some(rng, 0.4, 0.004),
            detach: some(rng, 0.4, 0.002),
            read_elsewhere: some(rng, 0.5, 0.01),
            outage: some(rng, 0.5, 0.01),
            outage_max: Duration::from_secs(if long { 7_200 } else { 3 }),
            nap_max: Duration::from_secs(if long { 600 } else { 1 }),
            device,
            weather,
            writeback_delay_ms: [20, 300, 3_000][rng.random_range(0..3)],
            chunk_sectors_max: 256,
            io_ms_max: if rng.random_bool(0.2) { 400 } else { 3 },
        };
        if rng.random_bool(0.85) {
            return plan;
        }
        // One host that dies again before it has sent what it came back with.
        Self {
            steps: 1_500,
            hosts: 1,
            volumes: 1,
            flip: 0.7,
            crash: 0.015,
            lose_cache: 0.0,
            detach: 0.0,
            weather: Weather::default(),
            writeback_delay_ms: 3_000,
            chunk_sectors_max: 4_096,
            ..plan
        }
    }
}

/// Nothing, or with chance `chance` something up to `max`.
fn some(rng: &mut SmallRng, chance: f64, max: f64) -> f64 {
    if rng.random_bool(chance) {
        rng.random_range(0.0..max)
    } else {
        0.0
    }
}
