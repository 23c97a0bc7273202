//! How long to wait before trying again: exponential, with full jitter.
//!
//! Full jitter (any time up to the bound, evenly) spreads the requests that failed together.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The bound before the first retry; it doubles with each further one.
pub(super) const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// The largest bound: how long after an outage the last request is at most tried again.
pub(super) const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// The shortest wait.
const BACKOFF_MIN: Duration = Duration::from_millis(10);

/// A source of waiting times, shared by all requests of a lane.
#[derive(Debug)]
pub(super) struct Jitter(AtomicU64);

impl Jitter {
    /// The same seed gives the same sequence.
    pub(super) const fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// How long to wait after the `failures`th failure in a row (from 1).
    pub(super) fn wait(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(16);
        let bound = BACKOFF_FIRST
            .saturating_mul(1 << doublings)
            .min(BACKOFF_MAX);
        // 32 random bits, as a share of the bound.
        let share = (self.next() >> 32) as f64 / f64::from(u32::MAX);
        bound.mul_f64(share).max(BACKOFF_MIN)
    }

    /// SplitMix64.
    fn next(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_grows_to_its_bound_and_is_spread() {
        let jitter = Jitter::new(7);
        let longest = |failures| (0..1000).map(|_| jitter.wait(failures)).max().unwrap();
        let shortest = |failures| (0..1000).map(|_| jitter.wait(failures)).min().unwrap();
        assert!(longest(1) <= BACKOFF_FIRST && longest(1) > BACKOFF_FIRST.mul_f64(0.9));
        assert!(longest(3) <= BACKOFF_FIRST * 4 && longest(3) > BACKOFF_FIRST * 3);
        assert!(longest(u32::MAX) <= BACKOFF_MAX && longest(u32::MAX) > BACKOFF_MAX.mul_f64(0.9));
        assert!(shortest(u32::MAX) >= BACKOFF_MIN && shortest(40) < BACKOFF_MAX.mul_f64(0.1));
    }

    #[test]
    fn wait_with_the_same_seed_is_the_same() {
        let (a, b) = (Jitter::new(1), Jitter::new(1));
        assert!((1..20).all(|n| a.wait(n) == b.wait(n)));
    }
}
