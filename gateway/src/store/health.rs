//! Whether the store answers, for operators and for `readyz`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::StoreError;

/// The shared state of a lane's store. Any answer of the store makes it healthy, a refusal of our
/// keys or no answer makes it failing.
#[derive(Debug, Default)]
pub struct StoreHealth {
    /// Whether `failing` holds something, so that a healthy request takes no lock.
    is_failing: AtomicBool,
    failing: Mutex<Option<Failing>>,
}

#[derive(Debug)]
struct Failing {
    since: Instant,
    attempts: u64,
    last_error: StoreError,
}

/// See [`StoreHealth::state`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreState {
    /// The store answers.
    Healthy,
    /// It has not answered since.
    Failing {
        /// For how long.
        lasting: Duration,
        /// Attempts that failed in that time.
        attempts: u64,
        /// The newest failure.
        last_error: StoreError,
    },
}

impl StoreHealth {
    /// Whether the newest attempt was answered.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        !self.is_failing.load(Ordering::Acquire)
    }

    /// The state, with what is known of a failure.
    #[must_use]
    pub fn state(&self) -> StoreState {
        match &*self.failing.lock() {
            None => StoreState::Healthy,
            Some(failing) => StoreState::Failing {
                lasting: failing.since.elapsed(),
                attempts: failing.attempts,
                last_error: failing.last_error.clone(),
            },
        }
    }

    pub(super) fn answered(&self) {
        if self.is_healthy() {
            return;
        }
        let Some(was) = self.failing.lock().take() else {
            return;
        };
        self.is_failing.store(false, Ordering::Release);
        tracing::info!(
            after = ?was.since.elapsed(),
            attempts = was.attempts,
            "the object store answers again"
        );
    }

    pub(super) fn failed(&self, error: &StoreError) {
        let mut failing = self.failing.lock();
        match &mut *failing {
            Some(failing) => {
                failing.attempts += 1;
                failing.last_error = error.clone();
            }
            None => {
                tracing::warn!(%error, "the object store fails; requests wait for it");
                *failing = Some(Failing {
                    since: Instant::now(),
                    attempts: 1,
                    last_error: error.clone(),
                });
                self.is_failing.store(true, Ordering::Release);
            }
        }
    }
}
