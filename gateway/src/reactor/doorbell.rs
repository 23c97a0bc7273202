//! How other threads wake a reactor: an eventfd, on which its ring keeps a read pending.
//!
//! Invariant: whoever has left something for the reactor and then rings is heard. Either the ring
//! writes to the eventfd, or the reactor has yet to answer an earlier ring; its answer then reads
//! what this ring wrote into the flag, so that what was left before it is seen after the answer. For
//! that the answer must be a swap: a store reads nothing, and orders nothing before it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// The doorbell of one reactor.
#[derive(Debug)]
pub(super) struct Doorbell {
    fd: OwnedFd,
    flags: Flags<AtomicBool>,
}

impl Doorbell {
    pub(super) fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self {
            fd,
            flags: Flags {
                rung: AtomicBool::new(false),
                stop: AtomicBool::new(false),
            },
        })
    }

    /// Wakes the reactor. Rings that it has not answered yet are one.
    pub(super) fn ring(&self) {
        if self.flags.ring() {
            self.write();
        }
    }

    /// The reactor has heard it, and looks for messages after this call.
    pub(super) fn answer(&self) {
        self.flags.answer();
    }

    /// Tells the reactor to come to an end.
    pub(super) fn stop(&self) {
        if self.flags.stop() {
            self.write();
        }
    }

    /// Whether it was told to come to an end.
    pub(super) fn stopped(&self) -> bool {
        self.flags.stopped()
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn write(&self) {
        // Cannot block, for the counter is at most 1; cannot fail on an eventfd of our own.
        let one = 1_u64;
        if let Err(error) = rustix::io::write(&self.fd, &one.to_le_bytes()) {
            tracing::error!(%error, "the reactor's doorbell does not ring");
        }
    }
}

/// What is between the threads, but for the eventfd.
#[derive(Debug)]
struct Flags<F> {
    rung: F,
    stop: F,
}

/// An atomic flag: the machine's, or that of the test that tries all orders.
trait Flag {
    fn swap(&self, value: bool, ordering: Ordering) -> bool;
    fn load(&self, ordering: Ordering) -> bool;
    fn store(&self, value: bool, ordering: Ordering);
}

macro_rules! flag {
    ($($flag:ty),*) => {$(
        impl Flag for $flag {
            fn swap(&self, value: bool, ordering: Ordering) -> bool {
                <$flag>::swap(self, value, ordering)
            }

            fn load(&self, ordering: Ordering) -> bool {
                <$flag>::load(self, ordering)
            }

            fn store(&self, value: bool, ordering: Ordering) {
                <$flag>::store(self, value, ordering);
            }
        }
    )*};
}

flag!(AtomicBool);
#[cfg(test)]
flag!(loom::sync::atomic::AtomicBool);

impl<F: Flag> Flags<F> {
    /// Whether the eventfd must be written.
    #[must_use]
    fn ring(&self) -> bool {
        !self.rung.swap(true, Ordering::AcqRel)
    }

    fn answer(&self) {
        self.rung.swap(false, Ordering::AcqRel);
    }

    /// As [`Flags::ring`].
    #[must_use]
    fn stop(&self) -> bool {
        self.stop.store(true, Ordering::Release);
        self.ring()
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use loom::sync::atomic::{AtomicBool, AtomicUsize};
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    use super::*;

    /// A doorbell whose eventfd and mailbox are the model's.
    struct Bell {
        flags: Flags<AtomicBool>,
        eventfd: Mutex<u64>,
        is_rung: Condvar,
        /// Messages left, as tokio's channel leaves them: released, and acquired by whoever looks.
        messages: AtomicUsize,
    }

    impl Bell {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                flags: Flags {
                    rung: AtomicBool::new(false),
                    stop: AtomicBool::new(false),
                },
                eventfd: Mutex::new(0),
                is_rung: Condvar::new(),
                messages: AtomicUsize::new(0),
            })
        }

        fn write(&self, must: bool) {
            if must {
                let mut count = self.eventfd.lock().unwrap();
                *count += 1;
                assert_eq!(*count, 1, "a write that could block");
                self.is_rung.notify_one();
            }
        }

        fn send(&self) {
            self.messages.fetch_add(1, Ordering::Release);
            self.write(self.flags.ring());
        }

        fn stop(&self) {
            self.write(self.flags.stop());
        }

        /// What the reactor does when its read of the eventfd completes, and before.
        fn hear(&self) -> (usize, bool) {
            let mut count = self.eventfd.lock().unwrap();
            while *count == 0 {
                count = self.is_rung.wait(count).unwrap();
            }
            *count = 0;
            drop(count);
            self.flags.answer();
            let stopped = self.flags.stopped();
            (self.messages.load(Ordering::Acquire), stopped)
        }
    }

    /// Every order in which no more than this many threads are cut short: with a store for an answer,
    /// one is enough to lose a message.
    const PREEMPTIONS_MAX: usize = 3;

    fn in_every_order(test: impl Fn() + Send + Sync + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(PREEMPTIONS_MAX);
        model.check(test);
    }

    #[test]
    fn message_left_before_a_ring_is_heard_in_every_order() {
        in_every_order(|| {
            let bell = Bell::new();
            for _ in 0..2 {
                let bell = Arc::clone(&bell);
                thread::spawn(move || bell.send());
            }
            // Waits for ever, which the model reports, if one is lost.
            while bell.hear().0 < 2 {}
        });
    }

    #[test]
    fn end_told_beside_a_message_is_heard_in_every_order() {
        in_every_order(|| {
            let bell = Bell::new();
            let other = Arc::clone(&bell);
            thread::spawn(move || other.send());
            let other = Arc::clone(&bell);
            thread::spawn(move || other.stop());
            let (mut messages, mut stopped) = (0, false);
            while messages == 0 || !stopped {
                let heard = bell.hear();
                messages = heard.0;
                stopped |= heard.1;
            }
        });
    }
}
