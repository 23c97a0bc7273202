//! Counters of a lane.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::{Operation, StoreError};

const OPERATIONS: usize = Operation::ALL.len();
const OUTCOMES: usize = Outcome::ALL.len();

/// The largest time of each bucket but the last, in milliseconds.
pub const STORE_BOUNDS_MS: [u64; 14] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 15_000, 60_000,
];

/// One more than there are bounds.
const BUCKETS: usize = STORE_BOUNDS_MS.len() + 1;

/// How long attempts took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreTimes {
    counts: [u64; BUCKETS],
    sum_ns: u64,
}

impl StoreTimes {
    /// Those of one attempt.
    #[cfg(test)]
    pub(crate) fn of_one(time: Duration) -> Self {
        let mut times = Self::default();
        times.counts[bucket_of(time)] = 1;
        times.sum_ns = u64::try_from(time.as_nanos()).unwrap();
        times
    }

    /// How many took no longer than each of [`STORE_BOUNDS_MS`].
    #[must_use]
    pub fn cumulative(&self) -> [u64; STORE_BOUNDS_MS.len()] {
        let (mut n, mut sum) = (0, 0);
        STORE_BOUNDS_MS.map(|_| {
            sum += self.counts[n];
            n += 1;
            sum
        })
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How long all took together.
    #[must_use]
    pub const fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns)
    }

    /// Adds what another counted.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        self.sum_ns += other.sum_ns;
    }
}

/// The bucket of a time: its largest one is in it.
fn bucket_of(time: Duration) -> usize {
    STORE_BOUNDS_MS.partition_point(|ms| Duration::from_millis(*ms) < time)
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// As asked for.
    Ok,
    /// There is no such object.
    NotFound,
    /// The precondition did not hold: [`StoreError::Exists`] or [`StoreError::Changed`].
    Refused,
    /// [`StoreError::Denied`]
    Denied,
    /// [`StoreError::Unavailable`]
    Unavailable,
    /// [`StoreError::WrongLength`]
    WrongLength,
    /// [`StoreError::Invalid`]
    Invalid,
    /// The lane, or its caller, waited no longer.
    GivenUp,
}

impl Outcome {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 8] = [
        Self::Ok,
        Self::NotFound,
        Self::Refused,
        Self::Denied,
        Self::Unavailable,
        Self::WrongLength,
        Self::Invalid,
        Self::GivenUp,
    ];

    /// Its name, as in a metric's label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::NotFound => "not_found",
            Self::Refused => "refused",
            Self::Denied => "denied",
            Self::Unavailable => "unavailable",
            Self::WrongLength => "wrong_length",
            Self::Invalid => "invalid",
            Self::GivenUp => "given_up",
        }
    }

    pub(super) fn of<T>(result: &Result<T, StoreError>) -> Self {
        match result {
            Ok(_) => Self::Ok,
            Err(StoreError::NotFound { .. }) => Self::NotFound,
            Err(StoreError::Exists { .. } | StoreError::Changed { .. }) => Self::Refused,
            Err(StoreError::Denied { .. }) => Self::Denied,
            Err(StoreError::Unavailable { .. }) => Self::Unavailable,
            Err(StoreError::WrongLength { .. }) => Self::WrongLength,
            Err(StoreError::Invalid { .. }) => Self::Invalid,
        }
    }
}

/// The counters; they only grow, but for the two gauges.
#[derive(Debug, Default)]
pub struct StoreStats {
    attempts: [[AtomicU64; OUTCOMES]; OPERATIONS],
    times: [[AtomicU64; BUCKETS]; OPERATIONS],
    busy_nanos: [AtomicU64; OPERATIONS],
    retries: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    waiting: AtomicU64,
    in_flight: AtomicU64,
}

/// The counters at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreSnapshot {
    attempts: [[u64; OUTCOMES]; OPERATIONS],
    times: [StoreTimes; OPERATIONS],
    /// Attempts after a call's first.
    pub retries: u64,
    /// Bytes of objects received.
    pub bytes_read: u64,
    /// Bytes of objects sent in attempts that succeeded.
    pub bytes_written: u64,
    /// Attempts that wait for a place, now.
    pub waiting: u64,
    /// Attempts under way, now.
    pub in_flight: u64,
}

impl StoreSnapshot {
    /// Attempts of `operation` that ended with `outcome`.
    #[must_use]
    pub const fn attempts(&self, operation: Operation, outcome: Outcome) -> u64 {
        self.attempts[operation as usize][outcome as usize]
    }

    /// Adds what another counted.
    pub fn add(&mut self, other: &Self) {
        for operation in Operation::ALL {
            let of = operation as usize;
            for outcome in Outcome::ALL {
                self.attempts[of][outcome as usize] += other.attempts[of][outcome as usize];
            }
            self.times[of].add(&other.times[of]);
        }
        self.retries += other.retries;
        self.bytes_read += other.bytes_read;
        self.bytes_written += other.bytes_written;
        self.waiting += other.waiting;
        self.in_flight += other.in_flight;
    }

    /// How long attempts of `operation` were under way.
    #[must_use]
    pub const fn times(&self, operation: Operation) -> &StoreTimes {
        &self.times[operation as usize]
    }

    /// How long all attempts were under way.
    #[must_use]
    pub fn all_times(&self) -> StoreTimes {
        let mut all = StoreTimes::default();
        self.times.iter().for_each(|times| all.add(times));
        all
    }
}

impl StoreStats {
    /// What they are now.
    #[must_use]
    pub fn snapshot(&self) -> StoreSnapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StoreSnapshot {
            attempts: self.attempts.each_ref().map(|row| row.each_ref().map(read)),
            times: Operation::ALL.map(|operation| StoreTimes {
                counts: self.times[operation as usize].each_ref().map(read),
                sum_ns: read(&self.busy_nanos[operation as usize]),
            }),
            retries: read(&self.retries),
            bytes_read: read(&self.bytes_read),
            bytes_written: read(&self.bytes_written),
            waiting: read(&self.waiting),
            in_flight: read(&self.in_flight),
        }
    }
}

/// Where a handle of a lane counts: in the lane's own counters, and in those of whom its requests are for.
#[derive(Clone, Debug)]
pub(super) struct Accounts(Arc<[Arc<StoreStats>]>);

impl Accounts {
    /// A new lane's.
    pub(super) fn new() -> Self {
        Self(Arc::new([Arc::default()]))
    }

    /// These, and one more.
    pub(super) fn and(&self, account: Arc<StoreStats>) -> Self {
        Self(self.0.iter().cloned().chain([account]).collect())
    }

    /// The lane's own.
    pub(super) fn own(&self) -> &Arc<StoreStats> {
        &self.0[0]
    }

    pub(super) fn retried(&self) {
        for stats in &*self.0 {
            stats.retries.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn read(&self, bytes: usize) {
        for stats in &*self.0 {
            stats.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn written(&self, bytes: usize) {
        for stats in &*self.0 {
            let count = &stats.bytes_written;
            count.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// Counts one more that waits for a place in the lane, until the answer is dropped.
    pub(super) fn wait(&self) -> Gauge<'_> {
        Gauge::up(&self.own().waiting)
    }

    /// Counts an attempt, which ends when the answer is dropped.
    pub(super) fn attempt(&self, operation: Operation) -> Attempt<'_> {
        Attempt {
            _in_flight: Gauge::up(&self.own().in_flight),
            accounts: self,
            operation,
            outcome: Outcome::GivenUp,
            begun: Instant::now(),
        }
    }
}

/// Keeps a gauge one higher while it lives.
pub(super) struct Gauge<'a>(&'a AtomicU64);

impl<'a> Gauge<'a> {
    fn up(gauge: &'a AtomicU64) -> Self {
        gauge.fetch_add(1, Ordering::Relaxed);
        Self(gauge)
    }
}

impl Drop for Gauge<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An attempt under way; given up if dropped before it has an outcome.
pub(super) struct Attempt<'a> {
    _in_flight: Gauge<'a>,
    accounts: &'a Accounts,
    operation: Operation,
    outcome: Outcome,
    begun: Instant,
}

impl Attempt<'_> {
    pub(super) fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let operation = self.operation as usize;
        let time = self.begun.elapsed();
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bucket = bucket_of(time);
        for stats in &*self.accounts.0 {
            stats.times[operation][bucket].fetch_add(1, Ordering::Relaxed);
            stats.busy_nanos[operation].fetch_add(nanos, Ordering::Relaxed);
            stats.attempts[operation][self.outcome as usize].fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_in_the_order_of_declaration() {
        assert!(
            Operation::ALL
                .iter()
                .enumerate()
                .all(|(i, o)| *o as usize == i)
        );
        assert!(
            Outcome::ALL
                .iter()
                .enumerate()
                .all(|(i, o)| *o as usize == i)
        );
    }

    #[test]
    fn time_counts_below_its_own_bound_and_not_a_nanosecond_later() {
        for (n, ms) in STORE_BOUNDS_MS.into_iter().enumerate() {
            let bound = Duration::from_millis(ms);
            assert_eq!(bucket_of(bound), n);
            assert_eq!(bucket_of(bound + Duration::from_nanos(1)), n + 1);
        }
        assert_eq!(bucket_of(Duration::ZERO), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn times_of_attempts_are_counted_by_operation_and_add_up() {
        let lane = Accounts::new();
        for (operation, ms) in [
            (Operation::Get, 3),
            (Operation::Get, 90_000),
            (Operation::List, 1),
        ] {
            let attempt = lane.attempt(operation);
            tokio::time::advance(Duration::from_millis(ms)).await;
            attempt.end(Outcome::Ok);
        }
        let now = lane.own().snapshot();
        let get = now.times(Operation::Get);
        assert_eq!((get.count(), get.sum()), (2, Duration::from_millis(90_003)));
        assert_eq!(get.cumulative()[1..4], [0, 1, 1]);
        assert_eq!(get.cumulative()[13], 1);
        let mut twice = now.clone();
        twice.add(&now);
        assert_eq!(twice.all_times().count(), 6);
    }

    #[tokio::test]
    async fn attempt_dropped_counts_as_given_up() {
        let (lane, tenants) = (Accounts::new(), Arc::new(StoreStats::default()));
        let both = lane.and(Arc::clone(&tenants));
        let attempt = both.attempt(Operation::Get);
        assert_eq!(lane.own().snapshot().in_flight, 1);
        drop(attempt);
        lane.attempt(Operation::Get).end(Outcome::Ok);
        assert_eq!(tenants.snapshot().attempts(Operation::Get, Outcome::Ok), 0);
        both.attempt(Operation::Get).end(Outcome::Ok);
        let now = tenants.snapshot();
        assert_eq!(
            lane.own().snapshot().attempts(Operation::Get, Outcome::Ok),
            2
        );
        assert_eq!(lane.own().snapshot().in_flight, 0);
        assert_eq!(now.attempts(Operation::Get, Outcome::GivenUp), 1);
        assert_eq!(now.attempts(Operation::Get, Outcome::Ok), 1);
    }
}
