//! A token bucket that any number of threads share without a lock.
//!
//! It is kept as one number (the generic cell rate algorithm): the time at which all that was let through would have
//! been paid for at the bucket's rate. Whoever asks adds the time that its own costs, and is told when it may go. So
//! requests pass in the order in which they asked, whichever thread they ask on.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const NS_IN_SECOND: u64 = 1_000_000_000;

/// How late a timer may be, in nanoseconds, without a loss of rate: so much more than its burst a bucket lets through at
/// once.
pub(crate) const LATENESS_NS: u64 = 5_000_000;

/// The part of a second whose units make the burst of who named none.
const BURST_SHARE: u64 = 10;

/// A rate of units (requests, bytes) with a burst; or none.
#[derive(Debug, Default)]
pub(crate) struct Bucket {
    /// What a unit costs, in 2^-32 nanoseconds; 0: nothing.
    unit: AtomicU64,
    /// What the burst costs, in nanoseconds.
    burst_ns: AtomicU64,
    /// When all is paid for.
    paid_ns: AtomicU64,
    /// How often it was changed.
    changes: AtomicU32,
}

impl Bucket {
    /// Gives it a rate, in units a second, and a burst in units; what was not paid for yet is forgiven. Nothing happens
    /// if it has these.
    pub(crate) fn set(&self, rate: Option<u64>, burst: Option<u64>) {
        let (mut unit, mut burst_ns) = (0, 0);
        if let Some(rate) = rate {
            let rate = rate.max(1);
            // At least 1: a rate beyond all that machines do is still a rate.
            unit = ((NS_IN_SECOND << 32) / rate).max(1);
            burst_ns = match burst {
                Some(burst) => cost_ns(unit, burst),
                None => NS_IN_SECOND / BURST_SHARE,
            };
        }
        let before = self.unit.swap(unit, Ordering::Relaxed);
        let burst_before = self.burst_ns.swap(burst_ns, Ordering::Relaxed);
        if (before, burst_before) != (unit, burst_ns) {
            self.paid_ns.store(0, Ordering::Relaxed);
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_limited(&self) -> bool {
        self.unit.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn changes(&self) -> u32 {
        self.changes.load(Ordering::Relaxed)
    }

    /// What so many units cost, in nanoseconds.
    pub(crate) fn cost_ns(&self, units: u64) -> u64 {
        cost_ns(self.unit.load(Ordering::Relaxed), units)
    }

    /// Takes so many units, and answers when they may pass; never before those that were taken earlier. More than
    /// the burst pass when nothing is owed, and are paid for afterwards.
    pub(crate) fn take(&self, now_ns: u64, units: u64) -> u64 {
        let cost = self.cost_ns(units);
        if cost == 0 {
            return 0;
        }
        let burst = self.burst_ns.load(Ordering::Relaxed);
        let add = |paid: u64| Some(paid.max(now_ns).saturating_add(cost));
        let paid = self
            .paid_ns
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        let paid = paid.unwrap_or_else(|paid| paid).max(now_ns);
        (paid + cost.min(burst)).saturating_sub(burst + LATENESS_NS)
    }
}

fn cost_ns(unit: u64, units: u64) -> u64 {
    let cost = (u128::from(unit) * u128::from(units) + (1 << 31)) >> 32;
    // Far from the end of what a time can be, which is added to it.
    u64::try_from(cost).unwrap_or(u64::MAX).min(u64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = NS_IN_SECOND;

    /// How many of one unit each pass within `time_ns`, of somebody who always has one.
    fn passed(bucket: &Bucket, from_ns: u64, time_ns: u64, units: u64) -> u64 {
        let (mut now, mut count) = (from_ns, 0);
        loop {
            now = now.max(bucket.take(now, units));
            if now >= from_ns + time_ns {
                return count;
            }
            count += 1;
        }
    }

    #[test]
    fn rate_holds_over_ten_seconds() {
        for rate in [1, 100, 1000, 10_000, 99_999, 1_000_000] {
            let bucket = Bucket::default();
            bucket.set(Some(rate), None);
            let count = passed(&bucket, 7 * SECOND, 10 * SECOND, 1);
            let most = rate * 10 + rate * 106 / 1000 + 1;
            assert!((rate * 10..=most).contains(&count), "{rate}: {count}");
        }
    }

    #[test]
    fn rate_of_bytes_holds_for_requests_of_any_size() {
        for (rate, size, seconds) in [
            (1 << 20, 1 << 20, 100),
            (200 << 20, 4096, 10),
            (1 << 30, 512, 1),
            (1 << 20, 4 << 20, 100),
        ] {
            let bucket = Bucket::default();
            bucket.set(Some(rate), None);
            // Of what comes at once after a rest, nothing is left.
            bucket.take(SECOND, rate * 105 / 1000);
            let bytes = passed(&bucket, SECOND, seconds * SECOND, size) * size;
            let (due, slack) = (rate * seconds, rate * seconds / 100 + size);
            assert!(bytes.abs_diff(due) <= slack, "{rate} {size}: {bytes}");
        }
    }

    #[test]
    fn burst_passes_at_once_after_a_rest_and_no_more() {
        let bucket = Bucket::default();
        bucket.set(Some(1000), Some(50));
        let now = 3 * SECOND;
        let at_once = (0..200).filter(|_| bucket.take(now, 1) <= now).count();
        // Those of the lateness too.
        assert_eq!(at_once, 55);
        let much_later = 9 * SECOND;
        let at_once = (0..200)
            .filter(|_| bucket.take(much_later, 1) <= much_later)
            .count();
        assert_eq!(at_once, 55);
    }

    #[test]
    fn request_larger_than_the_burst_passes_and_is_paid_for_afterwards() {
        let bucket = Bucket::default();
        bucket.set(Some(1 << 20), Some(4096));
        let now = SECOND;
        assert!(bucket.take(now, 8 << 20) <= now);
        let next = bucket.take(now, 1);
        assert!((8 * SECOND..=9 * SECOND).contains(&next), "{next}");
    }

    #[test]
    fn change_forgives_what_is_owed_and_no_change_does_not() {
        let bucket = Bucket::default();
        bucket.set(Some(1), None);
        bucket.take(SECOND, 100);
        bucket.set(Some(1), None);
        assert!(bucket.take(SECOND, 1) > 50 * SECOND);
        bucket.set(Some(2), None);
        assert!(bucket.take(SECOND, 1) <= SECOND);
        bucket.set(None, None);
        assert_eq!(
            (bucket.take(SECOND, u64::MAX), bucket.is_limited()),
            (0, false)
        );
    }

    #[test]
    fn threads_that_share_a_bucket_get_its_rate_together() {
        let bucket = Bucket::default();
        bucket.set(Some(100_000), None);
        let last = std::thread::scope(|scope| {
            let taking =
                (0..4).map(|_| scope.spawn(|| (0..25_000).map(|_| bucket.take(SECOND, 1)).max()));
            let taking: Vec<_> = taking.collect();
            taking
                .into_iter()
                .map(|t| t.join().unwrap().unwrap())
                .max()
                .unwrap()
        });
        assert!((SECOND * 189 / 100..=2 * SECOND).contains(&last), "{last}");
    }

    #[test]
    fn extremes_neither_overflow_nor_pass_for_nothing() {
        let bucket = Bucket::default();
        bucket.set(Some(u64::MAX), Some(u64::MAX));
        assert!(bucket.is_limited());
        bucket.take(u64::MAX / 2, u64::MAX);
        bucket.set(Some(0), Some(0));
        for _ in 0..8 {
            bucket.take(u64::MAX / 2, u64::MAX);
        }
    }
}
