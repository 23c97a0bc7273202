//! Syncs of a cache device: a failure is known to all who sync it, for ever, and before any later success is acted on.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock, mpsc};

use parking_lot::Mutex;

/// The first sync of a cache device that failed, if one did. Shared by the device and all rings on it.
///
/// The kernel tells of a write that it lost once for each open file, to whoever syncs next; that one
/// need not be whose write it was, and a sync that succeeds later proves nothing. Of a device's own cache that could not be
/// written out it tells only who had asked: so a sync that succeeds is acted on when all that were under way beside it have
/// ended, and none of them failed ([`Ended`]).
#[derive(Clone, Default)]
pub struct SyncFailure(Arc<Inner>);

#[derive(Default)]
struct Inner {
    errno: AtomicI32,
    then: OnceLock<Box<dyn Fn(i32) + Send + Sync>>,
    order: Mutex<Order>,
}

#[derive(Default)]
struct Order {
    /// How many have begun, ever.
    begun: u64,
    /// Which of them have not ended.
    under_way: BTreeSet<u64>,
    /// Who is to be called when the first so many have ended.
    waiting: Vec<(u64, Wake)>,
}

type Wake = Box<dyn FnOnce() + Send>;

impl Order {
    /// Whether the first `count` have ended.
    fn have_ended(&self, count: u64) -> bool {
        self.under_way.first().is_none_or(|first| *first >= count)
    }
}

impl SyncFailure {
    /// What is to be done at the first failure, by whoever notes it, with its errno. Set once.
    pub fn then(&self, then: impl Fn(i32) + Send + Sync + 'static) {
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
                then(errno);
            }
        }
    }

    /// A sync begins, or a write that is one.
    #[must_use]
    pub fn begin(&self) -> UnderWay {
        let mut order = self.0.order.lock();
        let number = order.begun;
        order.begun += 1;
        order.under_way.insert(number);
        UnderWay {
            failure: self.clone(),
            number,
        }
    }
}

/// A sync that is under way. Dropped, it counts as ended, and nobody knows how.
pub struct UnderWay {
    failure: SyncFailure,
    number: u64,
}

impl UnderWay {
    /// It has ended, by an errno if it failed.
    #[must_use]
    pub fn end(self, errno: Option<i32>) -> Ended {
        let failure = self.failure.clone();
        if let Some(errno) = errno {
            // Before others can take it for ended.
            failure.note(errno);
        }
        let order = failure.0.order.lock();
        // One that is alone waits for nobody.
        let others = match order.under_way.len() {
            1 => 0,
            _ => order.begun,
        };
        drop(order);
        drop(self);
        Ended {
            failure,
            others,
            is_waiting: false,
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut order = self.failure.0.order.lock();
        order.under_way.remove(&self.number);
        let waiting = std::mem::take(&mut order.waiting);
        let (due, waiting): (Vec<_>, Vec<_>) = waiting
            .into_iter()
            .partition(|(count, _)| order.have_ended(*count));
        order.waiting = waiting;
        drop(order);
        due.into_iter().for_each(|(_, wake)| wake());
    }
}

/// A sync that has ended.
pub struct Ended {
    failure: SyncFailure,
    /// How many had begun by then, and are to have ended too; 0 if they had.
    others: u64,
    is_waiting: bool,
}

impl Ended {
    /// How it went. `None` while one is under way that had begun before it ended: `wake` is called once when there is none
    /// any more.
    pub fn how(&mut self, wake: impl FnOnce() + Send + 'static) -> Option<Result<(), i32>> {
        let how = self.failure.get();
        if self.others == 0 {
            return Some(how);
        }
        let mut order = self.failure.0.order.lock();
        if how.is_err() || order.have_ended(self.others) {
            drop(order);
            // One that ended meanwhile may have noted what was not there a moment ago.
            return Some(self.failure.get());
        }
        if !std::mem::replace(&mut self.is_waiting, true) {
            order.waiting.push((self.others, Box::new(wake)));
        }
        None
    }

    /// The same, once all others have ended.
    ///
    /// # Errors
    /// With the errno of the first that failed.
    pub fn wait(mut self) -> Result<(), i32> {
        let (ended, have_ended) = mpsc::sync_channel(1);
        let wake = move || {
            let _ = ended.send(());
        };
        match self.how(wake) {
            Some(how) => how,
            None => {
                let _ = have_ended.recv();
                self.failure.get()
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
        failure.then(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let other = failure.clone();
        assert_eq!(failure.get(), Ok(()));
        other.note(5);
        failure.note(28);
        assert_eq!((failure.get(), other.get()), (Err(5), Err(5)));
        assert_eq!(times.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn sync_that_succeeds_beside_others_is_acted_on_when_they_have_ended_and_not_if_one_failed() {
        for (errno, how) in [(None, Ok(())), (Some(5), Err(5))] {
            let failure = SyncFailure::default();
            let (first, second) = (failure.begin(), failure.begin());
            let mut ended = second.end(None);
            let woken = Arc::new(AtomicI32::new(0));
            let wake = || {
                let woken = Arc::clone(&woken);
                move || {
                    woken.fetch_add(1, Ordering::SeqCst);
                }
            };
            assert_eq!(ended.how(wake()), None);
            assert_eq!(ended.how(wake()), None);
            // One that began later says nothing of what was before.
            let _later = failure.begin();
            assert_eq!(woken.load(Ordering::SeqCst), 0);
            let mut first = first.end(errno);
            assert_eq!(woken.load(Ordering::SeqCst), 1);
            assert_eq!(ended.how(wake()), Some(how));
            // It ended while the later one was under way, unless it is known to have failed.
            assert_eq!(first.how(wake()), how.err().map(Err));
        }
    }

    #[test]
    fn sync_that_was_alone_waits_for_none_that_began_later() {
        for (errno, how) in [(None, Ok(())), (Some(5), Err(5))] {
            let failure = SyncFailure::default();
            let mut ended = failure.begin().end(errno);
            let _later = failure.begin();
            assert_eq!(ended.how(|| {}), Some(how));
        }
    }

    #[test]
    fn sync_given_up_keeps_nobody_waiting() {
        let failure = SyncFailure::default();
        let given_up = failure.begin();
        let ended = failure.begin().end(None);
        let waiting = std::thread::spawn(move || ended.wait());
        drop(given_up);
        assert_eq!(waiting.join().unwrap(), Ok(()));
    }
}
