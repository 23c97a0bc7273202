//! The simulation: real volumes, cache, journal, recovery, backends, lane and S3 adapter, on
//! simulated devices, bucket and clock, under a seeded scheduler.
//!
//! A seed that is run twice must take the same steps: of the fixed ones every fifth is, of the fresh ones each unless
//! so many histories are wanted. `QUARRY_SIM_SEED` runs that seed alone;
//! `QUARRY_SIM_SECONDS` says how long fresh ones are tried, or `QUARRY_SIM_HISTORIES` for how many
//! crashes that were recovered from, on `QUARRY_SIM_THREADS` threads, from `QUARRY_SIM_FIRST` on.
//! `just sim` sets them.

mod campaign;
mod counts;
mod coverage;
mod device;
mod faults;
mod host;
mod life;
#[cfg(debug_assertions)]
mod mutations;
mod oracle;
mod outcome;
mod panics;
mod plan;
mod scenarios;
mod secrets;
mod session;
mod store;
mod world;

use std::ops::Range;
use std::time::Duration;

use campaign::{Campaign, Goal};
use outcome::Outcome;
use plan::Plan;
use quarry_tests::test_number;
use world::run;

/// How long fresh seeds are tried if nothing else is said.
const FRESH_SECONDS: u64 = 20;

/// Of seeds that are run for the number of histories, one in so many is run twice.
const REPEAT_EVERY: u64 = 16;

/// Of the fixed seeds, one in so many is run twice: of families as of others, which come every fourth.
const REPEAT_FIXED_EVERY: u64 = 5;

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

fn hold(plan: Plan) -> Outcome {
    let replay = Replay(plan);
    let outcome = run(plan);
    drop(replay);
    outcome
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
        let plan = Plan::of(seed);
        sum.add(&if seed % REPEAT_FIXED_EVERY == 0 {
            hold_and_repeat(plan)
        } else {
            hold(plan)
        });
    }
    println!(
        "seeds {seeds:?}, one in {REPEAT_FIXED_EVERY} twice: {}",
        sum.table()
    );
    sum.coverage.check(false);
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

// 480 seeds, a quarter of them of families, half of the rest storms; one in five is run twice and repeats its steps.
fixed_seeds! {
    seeds_below_60_hold: 0..60,
    seeds_below_120_hold: 60..120,
    seeds_below_180_hold: 120..180,
    seeds_below_240_hold: 180..240,
    seeds_below_300_hold: 240..300,
    seeds_below_360_hold: 300..360,
    seeds_below_420_hold: 360..420,
    seeds_below_480_hold: 420..480,
}

#[test]
fn fresh_seeds_hold_and_repeat() {
    if let Ok(seed) = std::env::var("QUARRY_SIM_SEED") {
        let plan = Plan::of(seed.parse().expect("QUARRY_SIM_SEED is a number"));
        println!("{plan:?}\n{}", hold_and_repeat(plan).table());
        return;
    }
    let seconds = test_number("QUARRY_SIM_SECONDS", FRESH_SECONDS);
    let (goal, repeat_every) = match test_number("QUARRY_SIM_HISTORIES", 0) {
        0 => (Goal::Time(Duration::from_secs(seconds)), 1),
        histories => (Goal::Histories(histories), REPEAT_EVERY),
    };
    Campaign {
        first: test_number("QUARRY_SIM_FIRST", u64::from(rand::random::<u32>()) << 16),
        goal,
        threads: test_number("QUARRY_SIM_THREADS", 1),
        repeat_every,
    }
    .run();
}
