//! A sync of the cache device that failed: known to all who sync it, and for ever.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

/// The first sync of a cache device that failed, if one did. Shared by the device and all rings on it.
///
/// The kernel tells of a write that it lost once for each open file, to whoever syncs next; that one
/// need not be whose write it was, and a sync that succeeds later proves nothing.
#[derive(Clone, Default)]
pub struct SyncFailure(Arc<Inner>);

#[derive(Default)]
struct Inner {
    errno: AtomicI32,
    then: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl SyncFailure {
    /// What is to be done at the first failure, by whoever notes it. Set once.
    pub fn then(&self, then: impl Fn() + Send + Sync + 'static) {
        let set = self.0.then.set(Box::new(then));
        assert!(set.is_ok(), "what follows a failure is set once");
    }

    /// The failure.
    ///
    /// # Errors
    /// With its errno, if there was one.
    pub fn get(&self) -> Result<(), i32> {
        match self.0.errno.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(errno),
        }
    }

    /// Notes a failure, unless there was one before.
    pub fn note(&self, errno: i32) {
        let inner = &*self.0;
        let first = inner
            .errno
            .compare_exchange(0, errno, Ordering::SeqCst, Ordering::SeqCst);
        if first.is_ok() {
            let error = io::Error::from_raw_os_error(errno);
            tracing::error!(%error, "the cache device failed a sync: no flush is acknowledged until the daemon is started anew");
            if let Some(then) = inner.then.get() {
                then();
            }
        }
    }
}

impl std::fmt::Debug for SyncFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SyncFailure({:?})", self.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_noted_is_the_first_for_ever_and_is_followed_once() {
        let failure = SyncFailure::default();
        let times = Arc::new(AtomicI32::new(0));
        let count = Arc::clone(&times);
        failure.then(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let other = failure.clone();
        assert_eq!(failure.get(), Ok(()));
        other.note(5);
        failure.note(28);
        assert_eq!((failure.get(), other.get()), (Err(5), Err(5)));
        assert_eq!(times.load(Ordering::SeqCst), 1);
    }
}
