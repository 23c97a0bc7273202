//! Syncs of the cache device: one at a time a reactor, shared by all volumes that wait for one.
//!
//! Invariants:
//! - A volume is answered by a sync that was started after it asked.
//! - A failure is everybody's, and for ever: the kernel tells of a write that it lost once for each
//!   open file, to whoever syncs next, and that one need not be whose write it was. So a sync that
//!   failed on any reactor fails all that end after it, and one that ended well is answered when all that were under way
//!   beside it have ended. A durable write is a sync, too: to most devices it is a write and a flush.

use quarry_cache::{Ended, SyncFailure, UnderWay};
use quarry_volume::IoId;

/// Who waits for a sync: the volume's index, and its name for the I/O.
pub(super) type Waiter = (u32, IoId);

/// The syncs of one reactor.
pub(super) struct Syncs {
    failure: SyncFailure,
    stage: Stage,
    /// Those that the sync answers that is not idle.
    running: Vec<Waiter>,
    waiting: Vec<Waiter>,
    /// Durable writes, by their operation.
    writes: Vec<(u32, UnderWay)>,
    /// Those that have ended and are not answered, and who waits for each.
    written: Vec<(Waiter, Ended)>,
}

enum Stage {
    Idle,
    UnderWay(UnderWay),
    /// But others are under way.
    Ended(Ended),
}

impl Syncs {
    pub(super) fn new(failure: SyncFailure) -> Self {
        Self {
            failure,
            stage: Stage::Idle,
            running: Vec::new(),
            waiting: Vec::new(),
            writes: Vec::new(),
            written: Vec::new(),
        }
    }

    /// A durable write begins, which is a sync too.
    pub(super) fn begin_write(&mut self, op: u32) {
        self.writes.push((op, self.failure.begin()));
    }

    /// A durable write has ended; [`Self::answer_write`] has the answer.
    pub(super) fn end_write(&mut self, op: u32, waiter: Waiter, result: Result<(), i32>) {
        let place = self.writes.iter().position(|(of, _)| *of == op);
        let (_, write) = self.writes.swap_remove(place.expect("it has begun"));
        self.written.push((waiter, write.end(result.err())));
    }

    /// Whom a durable write that has ended was for, and how it went; `None` if there is none for which nothing is to be
    /// waited for. What `wake` makes is called when it is to be asked again.
    pub(super) fn answer_write<W: FnOnce() + Send + 'static>(
        &mut self,
        wake: impl Fn() -> W,
    ) -> Option<(Waiter, Result<(), i32>)> {
        let mut written = self.written.iter_mut().enumerate();
        let (place, how) =
            written.find_map(|(place, (_, ended))| Some((place, ended.how(wake())?)))?;
        let (waiter, _) = self.written.remove(place);
        Some((waiter, how))
    }

    /// One more waits.
    pub(super) fn ask(&mut self, waiter: Waiter) {
        self.waiting.push(waiter);
    }

    /// Whether a sync is to be submitted now.
    pub(super) fn start(&mut self) -> bool {
        if !matches!(self.stage, Stage::Idle) || self.waiting.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.running, &mut self.waiting);
        self.stage = Stage::UnderWay(self.failure.begin());
        true
    }

    /// The sync under way has ended.
    pub(super) fn end(&mut self, result: i32) {
        let Stage::UnderWay(sync) = std::mem::replace(&mut self.stage, Stage::Idle) else {
            panic!("a sync ends that did not begin");
        };
        self.stage = Stage::Ended(sync.end((result < 0).then_some(-result)));
    }

    /// Whom the sync that has ended was for, and how it went; `None` if none has, or while others are under way: then `wake`
    /// is called when it is to be asked again.
    pub(super) fn answer(
        &mut self,
        wake: impl FnOnce() + Send + 'static,
    ) -> Option<(Vec<Waiter>, Result<(), i32>)> {
        let Stage::Ended(ended) = &mut self.stage else {
            return None;
        };
        let how = ended.how(wake)?;
        self.stage = Stage::Idle;
        Some((std::mem::take(&mut self.running), how))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn end(syncs: &mut Syncs, result: i32) -> Option<(Vec<Waiter>, Result<(), i32>)> {
        syncs.end(result);
        syncs.answer(|| {})
    }

    #[test]
    fn sync_answers_those_that_asked_before_it_and_no_others() {
        let mut syncs = Syncs::new(SyncFailure::default());
        assert!(!syncs.start());
        syncs.ask((1, IoId(1)));
        assert!(syncs.start());
        syncs.ask((2, IoId(2)));
        syncs.ask((3, IoId(3)));
        assert!(!syncs.start());
        assert_eq!(end(&mut syncs, 0), Some((vec![(1, IoId(1))], Ok(()))));
        assert!(syncs.start());
        let both = vec![(2, IoId(2)), (3, IoId(3))];
        assert_eq!(end(&mut syncs, 0), Some((both, Ok(()))));
        assert!(!syncs.start());
    }

    #[test]
    fn sync_that_failed_on_one_reactor_fails_all_later_ones_everywhere() {
        let failure = SyncFailure::default();
        let (mut one, mut other) = (Syncs::new(failure.clone()), Syncs::new(failure));
        let how = |answer: Option<(Vec<Waiter>, _)>| answer.map(|(_, how)| how);
        other.ask((7, IoId(7)));
        assert!(other.start());
        one.ask((1, IoId(1)));
        assert!(one.start());
        other.begin_write(3);
        // The kernel had nothing to tell this one, and nobody has heard yet what it told the other.
        assert_eq!(end(&mut other, 0), None);
        assert!(!other.start());
        assert_eq!(how(end(&mut one, -libc::EIO)), Some(Err(libc::EIO)));
        assert_eq!(how(other.answer(|| {})), Some(Err(libc::EIO)));
        one.ask((1, IoId(2)));
        assert!(one.start());
        assert_eq!(how(end(&mut one, 0)), Some(Err(libc::EIO)));
        // Nor is a record page that arrived of any use: its data may not have.
        other.end_write(3, (7, IoId(8)), Ok(()));
        let answer = other.answer_write(|| || {});
        assert_eq!(answer, Some(((7, IoId(8)), Err(libc::EIO))));
    }

    #[test]
    fn durable_write_is_answered_when_the_syncs_beside_it_have_ended_and_well_if_they_did() {
        for (result, how) in [(0, Ok(())), (-libc::EIO, Err(libc::EIO))] {
            let failure = SyncFailure::default();
            let (mut one, mut other) = (Syncs::new(failure.clone()), Syncs::new(failure));
            one.ask((1, IoId(1)));
            assert!(one.start());
            other.begin_write(3);
            other.end_write(3, (7, IoId(7)), Ok(()));
            let woken = Arc::new(AtomicU32::new(0));
            let wake = || {
                let woken = Arc::clone(&woken);
                move || {
                    woken.fetch_add(1, Ordering::Relaxed);
                }
            };
            // Of what the device lost it may have told the other alone.
            assert_eq!(other.answer_write(wake), None);
            assert_eq!(woken.load(Ordering::Relaxed), 0);
            one.end(result);
            assert_eq!(woken.load(Ordering::Relaxed), 1);
            assert_eq!(other.answer_write(wake), Some(((7, IoId(7)), how)));
            assert_eq!(other.answer_write(wake), None);
        }
    }

    #[test]
    fn sync_waits_for_the_durable_writes_beside_it() {
        let failure = SyncFailure::default();
        let (mut one, mut other) = (Syncs::new(failure.clone()), Syncs::new(failure));
        for op in [4, 9] {
            one.begin_write(op);
        }
        other.ask((7, IoId(7)));
        assert!(other.start());
        assert_eq!(end(&mut other, 0), None);
        one.end_write(9, (1, IoId(9)), Ok(()));
        assert_eq!(one.answer_write(|| || {}), None);
        assert_eq!(other.answer(|| {}), None);
        // The reactor ends, with I/O under way.
        drop(one);
        assert_eq!(other.answer(|| {}), Some((vec![(7, IoId(7))], Ok(()))));
    }
}
