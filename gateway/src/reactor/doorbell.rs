//! How other threads wake a reactor: an eventfd, on which its ring keeps a read pending.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// The doorbell of one reactor.
#[derive(Debug)]
pub(super) struct Doorbell {
    fd: OwnedFd,
    rung: AtomicBool,
    stop: AtomicBool,
}

impl Doorbell {
    pub(super) fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self {
            fd,
            rung: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        })
    }

    /// Wakes the reactor. Rings that it has not answered yet are one.
    pub(super) fn ring(&self) {
        if self.rung.swap(true, Ordering::SeqCst) {
            return;
        }
        // Cannot block, for the counter is at most 1; cannot fail on an eventfd of our own.
        let one = 1_u64;
        if let Err(error) = rustix::io::write(&self.fd, &one.to_le_bytes()) {
            tracing::error!(%error, "the reactor's doorbell does not ring");
        }
    }

    /// The reactor has heard it, and looks for messages after this call.
    pub(super) fn answer(&self) {
        self.rung.store(false, Ordering::SeqCst);
    }

    /// Tells the reactor to come to an end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// Whether it was told to come to an end.
    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
