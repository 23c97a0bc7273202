//! The way to a store: bounded concurrency, a time limit an attempt, and retries until it works.
//!
//! Everything but provisioning goes through a lane, one for each store; those of one server share its places, which
//! tenants get in weighted turn ([`Gate`]). Handles to a lane are cheap and differ in how urgent they are
//! ([`Priority`]), for whom they ask, where that is counted, and whether they wait for ever (the default: what I/O
//! needs) or have a deadline ([`Lane::with_deadline`]: what a control call needs).
//!
//! **Invariants.**
//! - A handle without a deadline never gives up on [`StoreError::Unavailable`] and
//!   [`StoreError::Denied`]: it waits, and [`StoreHealth`] says so. After [`Lane::stop`] it never
//!   answers them either: it just waits, to be dropped with its runtime.
//! - No place is held while waiting to try again.
//! - A call that nobody polls keeps its place. So who has several under way drops them, or has them answered, before
//!   asking for anything else: with enough of such callers none would ever have the place that it waits for.
//! - Requests of the background never fill the lane: some are the foreground's alone.
//! - A tenant whose requests hang leaves the others the places.

use std::fmt;
use std::future::{self, Future};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use uuid::Uuid;

use super::backoff::Jitter;
use super::stats::{Accounts, Attempt};
use super::{Operation, Outcome, Store, StoreError, StoreHealth, StoreStats, Tag};
use crate::fair::{Gate, Place, Share, plain_share};
use crate::reactor::errand;
use crate::trace::{self, Open, Step, notes};

/// How long an attempt may take, besides the time for its bytes.
const ATTEMPT_TIME_MAX: Duration = Duration::from_secs(15);
/// The slowest transfer that is waited for, in bytes a second. It makes 32 s for a chunk of 8 MiB.
const RATE_BYTES_MIN: u64 = 256 << 10;
/// How long a listing may take, all its pages together.
const LIST_TIME_MAX: Duration = Duration::from_secs(300);
/// Attempts at a range read that gets a wrong length, before that is taken for the truth. An object
/// never changes, so a second answer differs only if the first was damaged on its way.
const WRONG_LENGTH_ATTEMPTS_MAX: u32 = 3;

/// How urgent a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Priority {
    /// Somebody waits: reads of data, control calls.
    #[default]
    Foreground,
    /// Uploads, checkpoints, readahead, reclaim.
    Background,
}

/// Limits of a lane.
#[derive(Clone, Debug)]
pub struct LaneSettings {
    /// Requests under way at once.
    pub requests_max: usize,
    /// How many of them are the foreground's alone; fewer than `requests_max`.
    pub foreground_min: usize,
    /// The longest that an attempt may take besides the time for its bytes.
    pub attempt_time_max: Duration,
    /// Seed of the waiting times; none: a different one each time.
    pub seed: Option<u64>,
}

impl Default for LaneSettings {
    fn default() -> Self {
        Self {
            requests_max: 64,
            foreground_min: 16,
            attempt_time_max: ATTEMPT_TIME_MAX,
            seed: None,
        }
    }
}

/// A handle to a lane, which is itself a [`Store`].
#[derive(Clone)]
pub struct Lane {
    shared: Arc<Shared>,
    priority: Priority,
    deadline: Option<Duration>,
    accounts: Accounts,
    share: Arc<Share>,
}

/// The places of one server.
#[derive(Clone, Debug)]
struct Places {
    /// One for each request under way.
    all: Gate,
    /// One for each request of the background under way or waiting for one of `all`.
    background: Gate,
}

struct Shared {
    store: Arc<dyn Store>,
    places: Places,
    attempt_time_max: Duration,
    jitter: Jitter,
    health: Arc<StoreHealth>,
    stop: watch::Sender<bool>,
}

impl Lane {
    /// A lane to `store`; the handle is for the foreground and waits for ever.
    ///
    /// # Panics
    /// If the limits leave the background no place.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, settings: &LaneSettings) -> Self {
        assert!(
            settings.foreground_min < settings.requests_max,
            "the background needs a place too"
        );
        let places = Places {
            all: Gate::new(settings.requests_max),
            background: Gate::new(settings.requests_max - settings.foreground_min),
        };
        Self::over(store, places, settings)
    }

    /// For tests: a lane with fewer places than anything that is looked at side by side would take. Who waits for one
    /// while it holds the others waits for ever.
    #[cfg(test)]
    pub(crate) fn narrow(store: Arc<dyn Store>) -> Self {
        let settings = LaneSettings {
            requests_max: 2,
            foreground_min: 1,
            ..LaneSettings::default()
        };
        Self::new(store, &settings)
    }

    /// A lane to another store of the same server.
    #[must_use]
    pub fn beside(&self, store: Arc<dyn Store>, settings: &LaneSettings) -> Self {
        Self::over(store, self.shared.places.clone(), settings)
    }

    fn over(store: Arc<dyn Store>, places: Places, settings: &LaneSettings) -> Self {
        let seed = settings
            .seed
            .unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0);
        let shared = Shared {
            store,
            places,
            attempt_time_max: settings.attempt_time_max,
            jitter: Jitter::new(seed),
            health: Arc::default(),
            stop: watch::Sender::new(false),
        };
        Self {
            shared: Arc::new(shared),
            priority: Priority::Foreground,
            deadline: None,
            accounts: Accounts::new(),
            share: plain_share(),
        }
    }

    /// The same lane for work that nobody waits for.
    #[must_use]
    pub fn background(&self) -> Self {
        Self {
            priority: Priority::Background,
            ..self.clone()
        }
    }

    /// The same lane, each of whose calls ends after `limit` with the newest error, and ends at
    /// once if the store refuses our keys.
    #[must_use]
    pub fn with_deadline(&self, limit: Duration) -> Self {
        Self {
            deadline: Some(limit),
            ..self.clone()
        }
    }

    /// The same lane for requests that are counted in `account` too.
    #[must_use]
    pub fn counted_in(&self, account: Arc<StoreStats>) -> Self {
        Self {
            accounts: self.accounts.and(account),
            ..self.clone()
        }
    }

    /// The same lane for requests of a tenant.
    #[must_use]
    pub fn of(&self, share: &Arc<Share>) -> Self {
        Self {
            share: Arc::clone(share),
            ..self.clone()
        }
    }

    /// Whether the store answers; shared by all handles.
    #[must_use]
    pub fn health(&self) -> Arc<StoreHealth> {
        Arc::clone(&self.shared.health)
    }

    /// The counters, shared by all handles.
    #[must_use]
    pub fn stats(&self) -> Arc<StoreStats> {
        Arc::clone(self.accounts.own())
    }

    /// Ends the lane, for all handles: calls with a deadline answer [`StoreError::Unavailable`] at
    /// once, calls without one never return. To be called when nothing is to be brought to an end
    /// any more.
    pub fn stop(&self) {
        self.shared.stop.send_replace(true);
    }

    /// Runs `attempt`, which is about so many bytes, as far as that is known, until it has an answer.
    async fn run<T, F>(
        &self,
        operation: Operation,
        key: &str,
        bytes: Option<u64>,
        limit: Duration,
        attempt: impl Fn() -> F + Send + Sync,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>> + Send,
        T: Send,
    {
        let mut progress = Progress {
            span: trace::open(Step::Call(operation), None),
            ..Progress::default()
        };
        progress.span.text(notes::OBJECT, key);
        if let Some(bytes) = bytes {
            progress.span.count(notes::BYTES, bytes);
        }
        let mut stop = self.shared.stop.subscribe();
        let due = self.deadline.map(|limit| Instant::now() + limit);
        let answer = tokio::select! {
            biased;
            // Its sender lives in `self`, so it cannot end otherwise.
            _ = stop.wait_for(|stop| *stop) => None,
            () = sleep_until_some(due) => None,
            answer = self.persist(operation, key, limit, &attempt, &mut progress) => Some(answer),
        };
        if let Some(answer) = answer {
            progress.end(&answer);
            return answer;
        }
        let Some(limit) = self.deadline else {
            return future::pending().await;
        };
        let stopped = *stop.borrow();
        if let Some(error) = progress.last_error.filter(|_| !stopped) {
            return Err(error);
        }
        let reason = if stopped {
            "the daemon is stopping".to_owned()
        } else {
            format!("no answer within {limit:?}")
        };
        let error = StoreError::unavailable(operation, key, reason);
        if progress.is_under_way && !stopped {
            self.shared.health.failed(&error);
        }
        Err(error)
    }

    async fn persist<T, F>(
        &self,
        operation: Operation,
        key: &str,
        limit: Duration,
        attempt: &(impl Fn() -> F + Send + Sync),
        progress: &mut Progress,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>> + Send,
        T: Send,
    {
        let shared = &*self.shared;
        let (mut failures, mut wrong_lengths) = (0, 0);
        loop {
            let tried = self.attempt(operation, key, limit, attempt, progress).await;
            let mut error = match tried {
                Ok(value) => {
                    if !shared.health.is_healthy() {
                        // That it is again is told.
                        errand::elsewhere().await;
                    }
                    shared.health.answered();
                    return Ok(value);
                }
                Err(error) => error,
            };
            match &mut error {
                StoreError::Unavailable { .. } => {
                    progress.is_uncertain = true;
                    shared.health.failed(&error);
                }
                StoreError::Denied { .. } => {
                    shared.health.failed(&error);
                    if self.deadline.is_some() {
                        return Err(error);
                    }
                }
                StoreError::WrongLength { .. } => {
                    shared.health.answered();
                    wrong_lengths += 1;
                    if wrong_lengths == WRONG_LENGTH_ATTEMPTS_MAX {
                        return Err(error);
                    }
                }
                StoreError::Exists { after_retry, .. }
                | StoreError::Changed { after_retry, .. } => {
                    shared.health.answered();
                    *after_retry |= progress.is_uncertain;
                    return Err(error);
                }
                StoreError::NotFound { .. } => {
                    shared.health.answered();
                    return Err(error);
                }
                StoreError::Invalid { .. } => return Err(error),
            }
            progress.last_error = Some(error);
            failures += 1;
            sleep(shared.jitter.wait(failures)).await;
            self.accounts.retried();
        }
    }

    /// One attempt, from the wait for a place on.
    async fn attempt<T, F>(
        &self,
        operation: Operation,
        key: &str,
        limit: Duration,
        attempt: &(impl Fn() -> F + Send + Sync),
        progress: &mut Progress,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>> + Send,
        T: Send,
    {
        let waiting = trace::open(Step::Place, Some(&progress.span));
        let place = self.place(operation).await;
        drop(waiting);
        progress.attempts += 1;
        let span = trace::open(Step::Attempt, Some(&progress.span));
        progress.is_under_way = true;
        let ended = timeout(limit, attempt()).await;
        progress.is_under_way = false;
        let (result, outcome) = match ended {
            Ok(result) => {
                let outcome = Outcome::of(&result);
                (result, outcome)
            }
            Err(_) => {
                let reason = format!("no answer within {limit:?}");
                let error = StoreError::unavailable(operation, key, reason);
                (Err(error), Outcome::GivenUp)
            }
        };
        place.end(outcome);
        note_outcome(&span, outcome);
        if let Err(error) = &result
            && span.is_recorded()
        {
            span.text(notes::REASON, &error.to_string());
        }
        result
    }

    /// Waits for a place. What is done in it is counted as an attempt.
    pub(super) async fn place(&self, operation: Operation) -> LanePlace<'_> {
        let places = &self.shared.places;
        let waiting = self.accounts.wait();
        // In this order: the background waits for its own share before it stands in the common line.
        let background = match self.priority {
            Priority::Foreground => None,
            Priority::Background => Some(places.background.enter(&self.share).await),
        };
        let all = places.all.enter(&self.share).await;
        drop(waiting);
        LanePlace {
            counted: self.accounts.attempt(operation),
            lane: self,
            _places: (background, all),
        }
    }

    /// How long an attempt may take that moves `bytes`.
    fn limit(&self, bytes: u64) -> Duration {
        self.shared.attempt_time_max + transfer_time_max(bytes)
    }
}

/// How long `bytes` may be on their way.
pub(super) fn transfer_time_max(bytes: u64) -> Duration {
    Duration::from_millis(bytes.saturating_mul(1000) / RATE_BYTES_MIN)
}

/// A place in a lane, for one attempt; given up if dropped without an outcome.
pub(super) struct LanePlace<'a> {
    counted: Attempt<'a>,
    lane: &'a Lane,
    _places: (Option<Place>, Place),
}

impl LanePlace<'_> {
    /// The attempt has ended.
    pub(super) fn end(self, outcome: Outcome) {
        self.counted.end(outcome);
    }

    /// The attempt has brought `bytes`.
    pub(super) fn received(self, bytes: usize) {
        self.lane.shared.health.answered();
        self.lane.accounts.read(bytes);
        self.end(Outcome::Ok);
    }
}

/// What is known of a call that goes on.
#[derive(Default)]
struct Progress {
    span: Open,
    attempts: u64,
    last_error: Option<StoreError>,
    /// An attempt ended without an answer, and may have had its effect.
    is_uncertain: bool,
    /// The store was asked and has not answered yet.
    is_under_way: bool,
}

impl Progress {
    /// The call has this answer.
    fn end<T>(&self, answer: &Result<T, StoreError>) {
        note_outcome(&self.span, Outcome::of(answer));
        self.span.count(notes::ATTEMPTS, self.attempts);
    }
}

fn note_outcome(span: &Open, outcome: Outcome) {
    span.word(notes::OUTCOME, outcome.as_str());
    if outcome != Outcome::Ok {
        span.fail(outcome.as_str());
    }
}

async fn sleep_until_some(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => future::pending().await,
    }
}

#[async_trait]
impl Store for Lane {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        let limit = self.limit(8 << 20);
        let store = &self.shared.store;
        let got = self
            .run(Operation::Get, key, None, limit, || store.get(key))
            .await?;
        self.accounts.read(got.0.len());
        Ok(got)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let bytes = range.end.saturating_sub(range.start);
        let limit = self.limit(bytes);
        let store = &self.shared.store;
        let read = || store.get_range(key, range.clone());
        let got = self
            .run(Operation::GetRange, key, Some(bytes), limit, read)
            .await?;
        self.accounts.read(got.len());
        Ok(got)
    }

    fn has_plain_reads(&self) -> bool {
        self.shared.store.has_plain_reads()
    }

    async fn get_parts(
        &self,
        key: &str,
        offset: u64,
        lens: &[usize],
        lead: usize,
    ) -> Result<Vec<Bytes>, StoreError> {
        let bytes = lens.iter().sum::<usize>();
        let limit = self.limit(bytes as u64);
        let store = &self.shared.store;
        let read = || store.get_parts(key, offset, lens, lead);
        let got = self
            .run(Operation::GetRange, key, Some(bytes as u64), limit, read)
            .await?;
        self.accounts.read(bytes);
        Ok(got)
    }

    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        let limit = self.limit(len);
        let store = &self.shared.store;
        let read = || store.get_prefix(key, len);
        let got = self
            .run(Operation::GetRange, key, Some(len), limit, read)
            .await?;
        self.accounts.read(got.len());
        Ok(got)
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        let bytes = body.len() as u64;
        let limit = self.limit(bytes);
        let store = &self.shared.store;
        let write = || store.create(key, body.clone());
        let tag = self
            .run(Operation::Create, key, Some(bytes), limit, write)
            .await?;
        self.accounts.written(body.len());
        Ok(tag)
    }

    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        let bytes = body.len() as u64;
        let limit = self.limit(bytes);
        let store = &self.shared.store;
        let write = || store.replace(key, body.clone(), seen);
        let tag = self
            .run(Operation::Replace, key, Some(bytes), limit, write)
            .await?;
        self.accounts.written(body.len());
        Ok(tag)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let store = &self.shared.store;
        let limit = self.limit(0);
        self.run(Operation::Delete, key, None, limit, || store.delete(key))
            .await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let store = &self.shared.store;
        self.run(Operation::List, prefix, None, LIST_TIME_MAX, || {
            store.list(prefix)
        })
        .await
    }

    async fn list_some(&self, prefix: &str, max: usize) -> Result<Vec<String>, StoreError> {
        let store = &self.shared.store;
        self.run(Operation::List, prefix, None, LIST_TIME_MAX, || {
            store.list_some(prefix, max)
        })
        .await
    }

    async fn list_after(
        &self,
        prefix: &str,
        after: &str,
        max: usize,
    ) -> Result<Vec<String>, StoreError> {
        let store = &self.shared.store;
        self.run(Operation::List, prefix, None, LIST_TIME_MAX, || {
            store.list_after(prefix, after, max)
        })
        .await
    }

    fn describe(&self) -> String {
        self.shared.store.describe()
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane")
            .field("store", &self.shared.store)
            .field("priority", &self.priority)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
