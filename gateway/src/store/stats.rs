//! Counters of a lane.

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

    pub(super) fn retried(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn written(&self, bytes: usize) {
        self.bytes_written
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts one more that waits, until the answer is dropped.
    pub(super) fn wait(&self) -> Gauge<'_> {
        Gauge::up(&self.waiting)
    }

    /// Counts an attempt, which ends when the answer is dropped.
    pub(super) fn attempt(&self, operation: Operation) -> Attempt<'_> {
        Attempt {
            _in_flight: Gauge::up(&self.in_flight),
            stats: self,
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
    stats: &'a StoreStats,
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
        self.stats.busy_nanos[operation].fetch_add(nanos, Ordering::Relaxed);
        self.stats.attempts[operation][self.outcome as usize].fetch_add(1, Ordering::Relaxed);
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
        let stats = StoreStats::default();
        let attempt = stats.attempt(Operation::Get);
        assert_eq!(stats.snapshot().in_flight, 1);
        drop(attempt);
        stats.attempt(Operation::Get).end(Outcome::Ok);
        let now = stats.snapshot();
        assert_eq!(now.in_flight, 0);
        assert_eq!(now.attempts(Operation::Get, Outcome::GivenUp), 1);
        assert_eq!(now.attempts(Operation::Get, Outcome::Ok), 1);
    }
}
