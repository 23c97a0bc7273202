//! Errands: a backend's short way to the store, gone by the reactor that waits for it.
//!
//! A read that misses is otherwise handed to a thread of the runtime and its answer handed back: two threads to be woken,
//! which takes longer than what they do. An errand is the same piece of work, polled on the reactor's thread, whose ring
//! waits for its socket ([`readable`]).
//!
//! Owns: the errand under way, and the entry that waits for it. Does not own: what is done on it.
//!
//! Invariants:
//! - A reactor goes on one errand at a time, and begins none after one that it had to hand over in the same batch, so that
//!   it takes no more of its time than a request: the others' are done by the runtime's threads, which then have time for them.
//! - What waits for anything but its socket, or for long ([`ERRAND_TIME_MAX_NS`]), is handed over to the runtime: nothing
//!   else would wake it here.
//! - What may take long, or block (decoding, connecting, asking for keys, telling of a failure), says so ([`elsewhere`])
//!   before it does. Locks of what is fetched, and of the way to the store, are taken here, each for moments.
//! - A panic on it ends the errand and not the reactor, as it would end a task of the runtime.

use std::cell::Cell;
use std::fmt;
use std::future::poll_fn;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use io_uring::{opcode, types};
use quarry_volume::Action;
use tokio::runtime::Handle;

use super::core::Core;
use super::token::Token;
use super::{Message, ReactorHandle};

/// How long an errand is waited for here: longer than a store that is near takes. Looked at with each tick, so it may be as
/// long again.
pub(super) const ERRAND_TIME_MAX_NS: u64 = 100_000_000;

/// A piece of work whose end is a message to the reactor that goes on it.
pub struct Errand {
    work: Pin<Box<dyn Future<Output = Message> + Send>>,
    runtime: Handle,
    reactor: ReactorHandle,
}

/// How far it came.
enum Polled {
    Done(Message),
    /// It waits for this socket, which lives as long as it does.
    Waits(RawFd),
    /// It waits for something else.
    Stuck,
    Panicked,
}

#[derive(Clone, Copy)]
enum Polling {
    /// Not by a reactor.
    Nothing,
    Errand {
        waits_for: Option<RawFd>,
    },
}

thread_local! {
    static POLLING: Cell<Polling> = const { Cell::new(Polling::Nothing) };
}

/// Whether who polls is a reactor on an errand.
pub(crate) fn is_here() -> bool {
    matches!(POLLING.get(), Polling::Errand { .. })
}

/// On an errand: has the runtime go on. For what takes long.
pub(crate) async fn elsewhere() {
    poll_fn(|_| match is_here() {
        true => Poll::Pending,
        false => Poll::Ready(()),
    })
    .await;
}

/// On an errand: waits until there may be something to receive from the socket `fd`.
pub(crate) async fn readable(fd: RawFd) {
    let mut has_waited = false;
    poll_fn(|_| {
        // Handed over meanwhile: who polls now looks, and waits in its own way.
        if has_waited || !is_here() {
            return Poll::Ready(());
        }
        has_waited = true;
        let waits_for = Some(fd);
        POLLING.set(Polling::Errand { waits_for });
        Poll::Pending
    })
    .await;
}

impl Errand {
    /// The work, for `reactor` or else for `runtime`.
    pub(crate) fn new(
        work: impl Future<Output = Message> + Send + 'static,
        runtime: Handle,
        reactor: ReactorHandle,
    ) -> Self {
        Self {
            work: Box::pin(work),
            runtime,
            reactor,
        }
    }

    fn poll(&mut self) -> Polled {
        let _runtime = self.runtime.enter();
        POLLING.set(Polling::Errand { waits_for: None });
        let mut context = Context::from_waker(Waker::noop());
        let polled = catch_unwind(AssertUnwindSafe(|| self.work.as_mut().poll(&mut context)));
        match (polled, POLLING.replace(Polling::Nothing)) {
            (Ok(Poll::Ready(message)), _) => Polled::Done(message),
            (
                Ok(Poll::Pending),
                Polling::Errand {
                    waits_for: Some(fd),
                },
            ) => Polled::Waits(fd),
            (Ok(Poll::Pending), _) => Polled::Stuck,
            (Err(_), _) => Polled::Panicked,
        }
    }

    /// Has the runtime go on with it.
    pub(super) fn hand_over(self) {
        let Self {
            work,
            runtime,
            reactor,
        } = self;
        runtime.spawn(async move {
            // The reactor is gone only when the daemon ends.
            let _ = reactor.send(work.await).await;
        });
    }
}

impl fmt::Debug for Errand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Errand").finish_non_exhaustive()
    }
}

/// The errand of a reactor, if it is on one.
#[derive(Default)]
pub(super) struct Errands {
    /// With the time since which it is.
    under_way: Option<(Errand, u64)>,
    /// The beginning of the last batch in which one waited for something else than a socket.
    stuck_ns: u64,
    /// The ring waits for a socket: that of the errand, or of one that was handed over.
    is_awaited: bool,
}

impl Errands {
    const fn may_begin(&self, batch_ns: u64) -> bool {
        self.under_way.is_none() && !self.is_awaited && self.stuck_ns != batch_ns
    }

    /// Whether one is under way.
    pub(super) const fn is_on(&self) -> bool {
        self.under_way.is_some()
    }
}

impl Core {
    /// Whether an errand may be begun.
    pub(super) fn may_go(&self) -> bool {
        self.errands.may_begin(self.batch_ns) && !self.is_ending()
    }

    /// Has the volume's backend fetch, or goes by itself.
    pub(super) fn go(&mut self, volume: u32, action: Action) {
        let backend = &self.volumes[volume as usize].backend;
        if let Some(errand) = backend.begin(action) {
            self.stats.errands.fetch_add(1, Ordering::Relaxed);
            self.go_on(errand, self.batch_ns);
        }
    }

    /// Goes on this errand, of which there is no other, as far as it comes.
    fn go_on(&mut self, mut errand: Errand, since_ns: u64) {
        match errand.poll() {
            Polled::Done(message) => self.hear(message),
            Polled::Waits(fd) => {
                self.errands.under_way = Some((errand, since_ns));
                self.errands.is_awaited = true;
                let events = u32::from(libc::POLLIN.cast_unsigned());
                let entry = opcode::PollAdd::new(types::Fd(fd), events).build();
                // SAFETY: it points to nothing.
                unsafe { self.ring.push(entry.user_data(Token::Errand.pack())) };
            }
            Polled::Stuck => {
                self.errands.stuck_ns = self.batch_ns;
                self.hand_over(errand);
            }
            Polled::Panicked => tracing::error!("what was to be fetched is not: a panic"),
        }
    }

    /// There is something on the errand's socket, or it was given up.
    pub(super) fn errand_woken(&mut self) {
        self.errands.is_awaited = false;
        if let Some((errand, since_ns)) = self.errands.under_way.take() {
            self.go_on(errand, since_ns);
        }
    }

    fn hand_over(&self, errand: Errand) {
        let count = &self.stats.errands_handed_over;
        count.fetch_add(1, Ordering::Relaxed);
        errand.hand_over();
    }

    /// Hands over an errand that is so old.
    pub(super) fn hand_over_errand(&mut self, age_ns: u64) {
        let is_due =
            |(_, since_ns): &mut (Errand, u64)| self.batch_ns.saturating_sub(*since_ns) >= age_ns;
        if let Some((errand, _)) = self.errands.under_way.take_if(is_due) {
            self.hand_over(errand);
            // Not `PollRemove`: it leaves alone one that is just being woken, which then may not end.
            let entry = opcode::AsyncCancel::new(Token::Errand.pack()).build();
            // SAFETY: it points to nothing.
            unsafe { self.ring.push(entry.user_data(Token::GivenUp.pack())) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use bytes::Bytes;

    use super::super::testing::Goer;
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let builder = builder.worker_threads(1).thread_name("runtime");
        builder.enable_all().build().unwrap()
    }

    /// Where it is done.
    fn thread() -> Bytes {
        let thread = std::thread::current();
        Bytes::from(thread.name().unwrap_or_default().to_owned())
    }

    /// Has errands brought one after another, each by this thread.
    fn assert_brought_by(goer: Goer, thread: &str) {
        for _ in 0..3 {
            goer.send();
            assert_eq!(goer.wait(LIMIT).unwrap(), thread);
        }
        goer.shutdown();
    }

    #[test]
    fn errand_that_waits_for_nothing_is_done_at_once_and_here() {
        let goer = Goer::new(runtime(), || async { thread() });
        assert_brought_by(goer, "reactor-0");
    }

    #[test]
    fn errand_that_waits_for_something_else_is_handed_over() {
        let goer = Goer::new(runtime(), || async {
            assert!(is_here());
            tokio::time::sleep(Duration::from_millis(5)).await;
            assert!(!is_here());
            elsewhere().await;
            thread()
        });
        assert_brought_by(goer, "runtime");
    }

    #[test]
    fn what_takes_long_is_gone_on_with_elsewhere() {
        let goer = Goer::new(runtime(), || async {
            elsewhere().await;
            thread()
        });
        assert_brought_by(goer, "runtime");
    }

    #[test]
    fn none_is_begun_behind_one_that_was_handed_over_in_the_same_batch() {
        let goer = Goer::new(runtime(), || async {
            let here = is_here();
            elsewhere().await;
            Bytes::from(here.to_string())
        });
        for _ in 0..3 {
            goer.send_twice();
            let mut here = [(); 2].map(|()| goer.wait(LIMIT).unwrap());
            here.sort_unstable();
            assert_eq!(here, ["false", "true"]);
        }
        goer.shutdown();
    }

    #[test]
    fn panic_ends_the_errand_and_not_the_reactor() {
        let count = Arc::new(AtomicUsize::new(0));
        let goer = Goer::new(runtime(), move || {
            let first = count.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                assert!(!first, "to be seen in the test's output");
                thread()
            }
        });
        goer.send();
        goer.send();
        assert_eq!(goer.wait(LIMIT).unwrap(), "reactor-0");
        assert!(!is_here());
        goer.shutdown();
    }
}
