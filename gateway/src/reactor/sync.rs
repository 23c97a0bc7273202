//! Syncs of the cache device: one at a time a reactor, shared by all volumes that wait for one.
//!
//! Invariants:
//! - A volume is answered by a sync that was started after it asked.
//! - A failure is everybody's, and for ever: the kernel tells of a write that it lost once for each
//!   open file, to whoever syncs next, and that one need not be whose write it was. So a sync that
//!   failed on any reactor fails all that end after it.

use quarry_cache::SyncFailure;
use quarry_volume::IoId;

/// Who waits for a sync: the volume's index, and its name for the I/O.
pub(super) type Waiter = (u32, IoId);

/// The syncs of one reactor.
pub(super) struct Syncs {
    failure: SyncFailure,
    /// Those that the sync under way answers; none: none is under way.
    running: Vec<Waiter>,
    waiting: Vec<Waiter>,
}

impl Syncs {
    pub(super) fn new(failure: SyncFailure) -> Self {
        Self {
            failure,
            running: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// How a durable write went, which was a sync too.
    pub(super) fn of_write(&self, result: Result<(), i32>) -> Result<(), i32> {
        if let Err(errno) = result {
            self.failure.note(errno);
        }
        self.failure.get()
    }

    /// One more waits.
    pub(super) fn ask(&mut self, waiter: Waiter) {
        self.waiting.push(waiter);
    }

    /// Whether a sync is to be submitted now.
    pub(super) fn start(&mut self) -> bool {
        if !self.running.is_empty() || self.waiting.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.running, &mut self.waiting);
        true
    }

    /// The sync under way has ended; answers whom it was for, and how it went.
    pub(super) fn end(&mut self, result: i32) -> (Vec<Waiter>, Result<(), i32>) {
        if result < 0 {
            self.failure.note(-result);
        }
        (std::mem::take(&mut self.running), self.failure.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sync_answers_those_that_asked_before_it_and_no_others() {
        let mut syncs = Syncs::new(SyncFailure::default());
        assert!(!syncs.start());
        syncs.ask((1, IoId(1)));
        assert!(syncs.start());
        syncs.ask((2, IoId(2)));
        syncs.ask((3, IoId(3)));
        assert!(!syncs.start());
        assert_eq!(syncs.end(0), (vec![(1, IoId(1))], Ok(())));
        assert!(syncs.start());
        assert_eq!(syncs.end(0), (vec![(2, IoId(2)), (3, IoId(3))], Ok(())));
        assert!(!syncs.start());
    }

    #[test]
    fn sync_that_failed_on_one_reactor_fails_all_later_ones_everywhere() {
        let failure = SyncFailure::default();
        let (mut one, mut other) = (Syncs::new(failure.clone()), Syncs::new(failure));
        other.ask((7, IoId(7)));
        assert!(other.start());
        one.ask((1, IoId(1)));
        assert!(one.start());
        assert_eq!(one.end(-libc::EIO).1, Err(libc::EIO));
        // The kernel had nothing to tell this one.
        assert_eq!(other.end(0).1, Err(libc::EIO));
        one.ask((1, IoId(2)));
        assert!(one.start());
        assert_eq!(one.end(0).1, Err(libc::EIO));
        // Nor is a record page that arrived of any use: its data may not have.
        assert_eq!(other.of_write(Ok(())), Err(libc::EIO));
    }
}
