//! Counters of a lane.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::{Operation, StoreError};

const OPERATIONS: usize = Operation::ALL.len();
const OUTCOMES: usize = Outcome::ALL.len();

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
    busy: [Duration; OPERATIONS],
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
            self.busy[of] += other.busy[of];
        }
        self.retries += other.retries;
        self.bytes_read += other.bytes_read;
        self.bytes_written += other.bytes_written;
        self.waiting += other.waiting;
        self.in_flight += other.in_flight;
    }

    /// Time that attempts of `operation` were under way, all together.
    #[must_use]
    pub const fn busy(&self, operation: Operation) -> Duration {
        self.busy[operation as usize]
    }
}

impl StoreStats {
    /// What they are now.
    #[must_use]
    pub fn snapshot(&self) -> StoreSnapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StoreSnapshot {
            attempts: self.attempts.each_ref().map(|row| row.each_ref().map(read)),
            busy: self
                .busy_nanos
                .each_ref()
                .map(|n| Duration::from_nanos(read(n))),
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
        let nanos = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        for stats in &*self.accounts.0 {
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
