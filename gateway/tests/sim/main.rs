//! The simulation: real volumes, cache, journal, recovery, backends, lane and S3 adapter, on
//! simulated devices, bucket and clock, under a seeded scheduler.
//!
//! Each seed is run twice and must take the same steps. `QUARRY_SIM_SEED` runs that seed alone;
//! `QUARRY_SIM_SECONDS` says how long fresh ones are tried. `just sim` sets them.

mod device;
mod host;
#[cfg(debug_assertions)]
mod mutations;
mod oracle;
mod panics;
mod plan;
mod scenarios;
mod session;
mod store;
mod world;

use std::ops::Range;
use std::time::{Duration, Instant};

use plan::Plan;
use quarry_tests::test_number;
use world::{Outcome, run};

/// How long fresh seeds are tried if nothing else is said.
const FRESH_SECONDS: u64 = 20;

/// Says how to repeat a run that does not end well.
struct Replay(Plan);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{:?}", self.0);
            println!("to repeat it: just sim --seed {}", self.0.seed);
        }
    }
}

fn hold_and_repeat(plan: Plan) -> Outcome {
    let replay = Replay(plan);
    let first = run(plan);
    assert_eq!(first, run(plan), "the same seed takes other steps");
    drop(replay);
    first
}

fn seeds_hold(seeds: Range<u64>) {
    let mut sum = Outcome::default();
    for seed in seeds.clone() {
        sum.add(&hold_and_repeat(Plan::of(seed)));
    }
    println!("seeds {seeds:?}, each twice: {sum}");
}

/// In parts, which run side by side.
macro_rules! fixed_seeds {
    ($($name:ident: $seeds:expr,)*) => {
        $(
            #[test]
            fn $name() {
                seeds_hold($seeds);
            }
        )*
    };
}

// 2,000 runs.
fixed_seeds! {
    seeds_below_125_hold_and_repeat: 0..125,
    seeds_below_250_hold_and_repeat: 125..250,
    seeds_below_375_hold_and_repeat: 250..375,
    seeds_below_500_hold_and_repeat: 375..500,
    seeds_below_625_hold_and_repeat: 500..625,
    seeds_below_750_hold_and_repeat: 625..750,
    seeds_below_875_hold_and_repeat: 750..875,
    seeds_below_1000_hold_and_repeat: 875..1_000,
}

#[test]
fn fresh_seeds_hold_and_repeat() {
    if let Ok(seed) = std::env::var("QUARRY_SIM_SEED") {
        let plan = Plan::of(seed.parse().expect("QUARRY_SIM_SEED is a number"));
        println!("{plan:?}\n{:?}", hold_and_repeat(plan));
        return;
    }
    let first = u64::from(rand::random::<u32>()) << 16;
    let until =
        Instant::now() + Duration::from_secs(test_number("QUARRY_SIM_SECONDS", FRESH_SECONDS));
    println!("fresh seeds from {first} on");
    let (mut sum, mut seed) = (Outcome::default(), first);
    while Instant::now() < until {
        sum.add(&hold_and_repeat(Plan::of(seed)));
        seed += 1;
    }
    println!("seeds {:?}, each twice: {sum}", first..seed);
}
