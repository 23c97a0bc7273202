//! What a run is like: every seed has a plan of its own, with some kinds of trouble and not others.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::device::DeviceFaults;
use super::store::{BAD_BODIES_BORNE, Weather};

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    pub steps: u32,
    pub hosts: usize,
    pub volumes: usize,
    pub volume_sectors: u64,
    /// That a crash damages a record page too.
    pub flip: f64,
    /// Chances in one step.
    pub crash: f64,
    /// That one dies although it has not read all of what it came back with.
    pub hasty: f64,
    /// That a dead host comes back.
    pub start: f64,
    /// That a volume which nobody serves is attached, by a host that could.
    pub attach: f64,
    /// That a recovery is cut short by its host's death.
    pub cut_short: f64,
    pub lose_cache: f64,
    pub fight: f64,
    pub detach: f64,
    pub read_elsewhere: f64,
    pub drain: f64,
    pub grow: f64,
    pub outage: f64,
    pub outage_max: Duration,
    /// Most actions between the decision that a host dies and its death.
    pub fuse_max: u32,
    /// Most I/Os of a session in one step.
    pub ios_max: u32,
    /// The longest way to the store.
    pub way_max: Duration,
    /// That a direct read fails; none: there are no direct reads.
    pub direct: Option<f64>,
    /// The longest time in which nothing is asked for.
    pub nap_max: Duration,
    pub device: DeviceFaults,
    pub weather: Weather,
    /// How long a write waits for its upload.
    pub writeback_delay_ms: u64,
    /// Most sectors of a chunk.
    pub chunk_sectors_max: u32,
    /// Entries of the log that start a checkpoint.
    pub checkpoint_entries: usize,
    /// How long an I/O of the cache device takes at most.
    pub io_ms_max: u64,
    /// That a volume is encrypted, and that one which is gets a new data key in one step.
    pub encrypted: f64,
    pub rotate: f64,
    /// What becomes of volumes beside their writes; none: nothing.
    pub family: Option<Family>,
}

/// Chances, in one step, that something is asked for of a volume: see [`crate::host::Ask`].
#[derive(Clone, Copy, Debug)]
pub struct Family {
    pub snapshot: f64,
    pub unmake: f64,
    pub clone: f64,
    pub roll_back: f64,
    pub delete: f64,
    pub restore: f64,
    pub purge: f64,
    pub read_snapshot: f64,
    pub warm: f64,
    pub evict: f64,
    pub compact: f64,
    pub flatten: f64,
}

/// The share of seeds that have encrypted volumes.
const ENCRYPTED: f64 = 0.4;

/// One seed in so many is one of a family.
const FAMILY_EVERY: u64 = 4;

impl Plan {
    /// A plan without trouble.
    pub fn calm(seed: u64) -> Self {
        Self {
            seed,
            steps: 400,
            hosts: 1,
            volumes: 2,
            volume_sectors: 3_072,
            flip: 0.0,
            crash: 0.0,
            hasty: 1.0,
            start: 0.1,
            attach: 0.2,
            cut_short: 0.0,
            lose_cache: 0.0,
            fight: 0.0,
            detach: 0.01,
            read_elsewhere: 0.0,
            drain: 0.0,
            grow: 0.0,
            outage: 0.0,
            outage_max: Duration::ZERO,
            fuse_max: 60,
            ios_max: 16,
            way_max: WAY_MAX,
            direct: None,
            nap_max: Duration::from_secs(1),
            device: DeviceFaults::default(),
            weather: Weather::default(),
            writeback_delay_ms: 20,
            chunk_sectors_max: 256,
            checkpoint_entries: 120,
            io_ms_max: 3,
            encrypted: 0.0,
            rotate: 0.0,
            family: None,
        }
    }

    /// Whether the seed is one of a family of volumes.
    pub const fn is_family(seed: u64) -> bool {
        seed % FAMILY_EVERY == FAMILY_EVERY - 1
    }

    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed ^ 0x706c_616e);
        let rng = &mut rng;
        let device = DeviceFaults {
            write: some(rng, 0.2, 0.01),
            read: some(rng, 0.2, 0.01),
            fill: some(rng, 0.3, 0.5),
            sync: some(rng, 0.2, 0.02),
        };
        // Some readers get more bad bodies than they bear.
        let rough = rng.random_bool(0.1);
        let weather = Weather {
            error_before: some(rng, 0.5, 0.3),
            error_after: some(rng, 0.5, 0.2),
            lost_before: some(rng, 0.4, 0.05),
            lost_after: some(rng, 0.4, 0.05),
            short: some(rng, 0.4, 0.2),
            wrong: if rough {
                rng.random_range(0.3..0.8)
            } else {
                some(rng, 0.3, 0.2)
            },
            slow: some(rng, 0.4, 0.3),
            bad_bodies_max: if rough { 20 } else { BAD_BODIES_BORNE },
        };
        let long = rng.random_bool(0.05);
        let crash = some(rng, 0.9, 0.015);
        let plan = Self {
            seed,
            steps: rng.random_range(300..900),
            hosts: rng.random_range(1..=3),
            volumes: rng.random_range(1..=3),
            volume_sectors: 3_072,
            crash,
            hasty: 1.0,
            start: 0.1,
            attach: 0.2,
            cut_short: crash * 10.0,
            lose_cache: some(rng, 0.3, 0.002),
            flip: some(rng, 0.3, 0.5),
            fight: some(rng, 0.4, 0.004),
            detach: some(rng, 0.4, 0.002),
            read_elsewhere: some(rng, 0.5, 0.01),
            drain: some(rng, 0.3, 0.01),
            grow: some(rng, 0.2, 0.01),
            outage: some(rng, 0.5, 0.01),
            outage_max: Duration::from_secs(if long { 7_200 } else { 3 }),
            fuse_max: 60,
            ios_max: 16,
            way_max: WAY_MAX,
            direct: rng.random_bool(0.3).then(|| rng.random_range(0.0..0.5)),
            nap_max: Duration::from_secs(if long { 600 } else { 1 }),
            device,
            weather,
            writeback_delay_ms: [20, 300, 3_000][rng.random_range(0..3)],
            chunk_sectors_max: 256,
            checkpoint_entries: 120,
            io_ms_max: if rng.random_bool(0.2) { 400 } else { 3 },
            encrypted: 0.0,
            rotate: 0.0,
            family: None,
        }
        .keyed();
        if Self::is_family(seed) {
            return plan.family(rng);
        }
        match rng.random_range(0..20) {
            0..7 => plan,
            7..10 => plan.relapse(),
            _ => plan.storm(rng),
        }
    }

    /// Some seeds have encrypted volumes, by numbers of their own: all else of a seed is the same with them and without.
    fn keyed(self) -> Self {
        let rng = &mut SmallRng::seed_from_u64(self.seed ^ 0x6b65_7965);
        let encrypted = rng.random_bool(ENCRYPTED);
        Self {
            encrypted: if encrypted {
                rng.random_range(0.3..1.0)
            } else {
                0.0
            },
            rotate: if encrypted { some(rng, 0.8, 0.02) } else { 0.0 },
            ..self
        }
    }

    /// One host that dies again before it has sent what it came back with, or written as much anew as it
    /// lost.
    fn relapse(self) -> Self {
        Self {
            steps: 1_500,
            hosts: 1,
            volumes: 1,
            volume_sectors: 512,
            flip: 0.7,
            crash: 0.1,
            hasty: 0.1,
            start: 0.8,
            attach: 0.8,
            cut_short: 0.15,
            lose_cache: 0.0,
            detach: 0.0,
            weather: Weather::default(),
            fuse_max: 100,
            way_max: Duration::from_millis(2),
            nap_max: Duration::from_millis(20),
            writeback_delay_ms: 3_000,
            chunk_sectors_max: 4_096,
            checkpoint_entries: 24,
            ..self
        }
    }

    /// Volumes of two tenants, of which snapshots and clones are made, which are rolled back and deleted.
    fn family(self, rng: &mut SmallRng) -> Self {
        let family = Family {
            snapshot: rng.random_range(0.01..0.1),
            unmake: some(rng, 0.8, 0.06),
            clone: some(rng, 0.9, 0.06),
            roll_back: some(rng, 0.6, 0.1),
            delete: some(rng, 0.8, 0.1),
            restore: some(rng, 0.6, 0.1),
            purge: some(rng, 0.8, 0.1),
            read_snapshot: some(rng, 0.7, 0.03),
            warm: some(rng, 0.5, 0.05),
            evict: some(rng, 0.5, 0.05),
            compact: some(rng, 0.5, 0.05),
            flatten: some(rng, 0.6, 0.1),
        };
        Self {
            steps: rng.random_range(600..1_800),
            hosts: rng.random_range(1..=3),
            volumes: rng.random_range(1..=2),
            volume_sectors: 256,
            crash: some(rng, 0.6, 0.03),
            start: 0.5,
            attach: 0.5,
            lose_cache: some(rng, 0.3, 0.002),
            fight: some(rng, 0.5, 0.01),
            detach: rng.random_range(0.02..0.2),
            outage: some(rng, 0.3, 0.002),
            outage_max: Duration::from_secs(3),
            nap_max: Duration::from_secs(if rng.random_bool(0.7) { 300 } else { 1 }),
            chunk_sectors_max: 64,
            checkpoint_entries: 24,
            io_ms_max: 1,
            weather: if rng.random_bool(0.5) {
                self.weather.milder()
            } else {
                self.weather
            },
            family: Some(family),
            ..self
        }
    }

    /// Small volumes, a store nearby, and hosts that die as soon as they have come back.
    fn storm(self, rng: &mut SmallRng) -> Self {
        Self {
            steps: rng.random_range(1_000..4_000),
            hosts: rng.random_range(1..=2),
            volumes: rng.random_range(1..=2),
            volume_sectors: 512,
            crash: rng.random_range(0.05..0.5),
            hasty: some(rng, 0.5, 0.2),
            start: 0.8,
            attach: 0.8,
            cut_short: some(rng, 0.5, 0.2),
            lose_cache: some(rng, 0.5, 0.01),
            fight: some(rng, 0.5, 0.02),
            outage: some(rng, 0.3, 0.002),
            fuse_max: 200,
            way_max: Duration::from_millis(2),
            nap_max: Duration::from_millis(20),
            io_ms_max: 1,
            weather: self.weather.milder(),
            ..self
        }
    }
}

/// The longest way to a store that is not nearby.
const WAY_MAX: Duration = Duration::from_millis(20);

/// Nothing, or with chance `chance` something up to `max`.
fn some(rng: &mut SmallRng, chance: f64, max: f64) -> f64 {
    if rng.random_bool(chance) {
        rng.random_range(0.0..max)
    } else {
        0.0
    }
}
