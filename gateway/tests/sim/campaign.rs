//! Fresh seeds on several threads, each run on one of them, until enough was seen.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::outcome::Outcome;
use super::plan::Plan;
use super::{hold, hold_and_repeat};

/// When to stop.
#[derive(Clone, Copy)]
pub enum Goal {
    Time(Duration),
    Histories(u64),
}

/// Histories that reach what can be reached.
const MANY: u64 = 50_000;

pub struct Campaign {
    /// The seeds are this one and those after it.
    pub first: u64,
    pub goal: Goal,
    pub threads: u64,
    /// Every so many seeds, one is run twice and must take the same steps.
    pub repeat_every: u64,
}

/// Stops all threads when one has found something.
struct StopAll<'a>(&'a AtomicBool);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

impl Campaign {
    /// Runs it, and says what came of it.
    pub fn run(&self) {
        let begun = Instant::now();
        let (next, stop) = (AtomicU64::new(self.first), AtomicBool::new(false));
        let sum = Mutex::new(Outcome::default());
        println!("fresh seeds from {} on", self.first);
        std::thread::scope(|scope| {
            for _ in 0..self.threads {
                scope.spawn(|| {
                    let _stop_all = StopAll(&stop);
                    while !stop.load(Ordering::Relaxed) {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        let plan = Plan::of(seed);
                        let outcome = if seed % self.repeat_every == 0 {
                            hold_and_repeat(plan)
                        } else {
                            hold(plan)
                        };
                        let mut sum = sum.lock();
                        sum.add(&outcome);
                        let enough = match self.goal {
                            Goal::Time(time) => begun.elapsed() >= time,
                            Goal::Histories(histories) => sum.histories.sum() >= histories,
                        };
                        stop.fetch_or(enough, Ordering::Relaxed);
                    }
                });
            }
        });
        let sum = sum.into_inner();
        println!(
            "seeds {:?}, one in {} run twice, {} threads, {} s, no violation\n{}",
            self.first..next.into_inner(),
            self.repeat_every,
            self.threads,
            begun.elapsed().as_secs(),
            sum.table()
        );
        if sum.histories.sum() >= MANY {
            sum.coverage.check(true);
        }
    }
}
