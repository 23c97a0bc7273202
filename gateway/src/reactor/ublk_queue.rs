//! A queue of a ublk device on a reactor's ring.
//!
//! Each tag always has one command with the kernel: FETCH at first, then COMMIT_AND_FETCH with the
//! result of the request before. A command's completion is a request, described in memory shared
//! with the kernel ([`descriptor`]). With [`Mode::ZeroCopy`] the kernel has put the request's pages
//! into the ring's buffer table by then, at the tag's own entry; where it could not, and with
//! [`Mode::UserCopy`], the data go through a bounce buffer of ours.
//!
//! Owns: the character device's descriptor, the shared memory, the tags and the bounce buffers.
//! Does not own: the device ([`crate::ublk`]): a queue ends when the kernel gives all tags back,
//! which it does when the device is stopped.
//!
//! Invariants:
//! - A tag is committed exactly once for each request, always with the whole length or an errno: a
//!   short result would complete the rest unfilled.
//! - A tag is fetched and committed on the ring and thread that the queue was started on.

mod descriptor;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use io_uring::{opcode, types};
use libublk::sys;
use quarry_volume::{IoError, Op};

use self::descriptor::{Data, Descriptors, IoRequest};
use super::frontend::{Buffer, FrontEnd, Port};
use super::memory::{AlignedBuf, Pool};
use crate::ublk::Mode;

/// Bounce buffers in use at most, in bytes: what needs one beyond it waits for one.
const BOUNCE_BYTES_MAX: usize = 16 << 20;

/// Bounce buffers kept for reuse, in bytes.
const BOUNCE_KEPT_BYTES_MAX: usize = 4 << 20;

/// A buffer index that no table has: registration there fails, and the request is bounced.
const NO_BUFFER: u16 = u16::MAX;

/// Name of the operation that follows the first FETCHes; tags are 16 bits.
const FENCE: u32 = u32::MAX;

/// What a queue tells when its commands are with the kernel, or why they are not.
pub(crate) type Started = Result<Running, io::Error>;

/// A queue that runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    /// The thread of its reactor.
    pub(crate) tid: i32,
    /// How its data travel: without zero copy if the reactor's buffer table was full.
    pub(crate) mode: Mode,
}

/// The one queue of a ublk device: a front end.
pub struct UblkQueue {
    device: u32,
    cdev: OwnedFd,
    descriptors: Descriptors,
    mode: Mode,
    tags: Vec<Tag>,
    /// The tags' entries of the ring's buffer table: the first one's index.
    buffers: Option<u16>,
    bounce: Pool,
    /// Tags with a request that waits for a bounce buffer, oldest first.
    waiting: VecDeque<u16>,
    /// Tags that the kernel did not give back.
    alive: u16,
    started: Option<SyncSender<Started>>,
    /// Why the first FETCH that failed did.
    refused: Option<io::Error>,
    begun: bool,
    /// Whether it was said that a registration failed.
    warned: bool,
    /// Takes no requests any more: see [`FrontEnd::stop`].
    stopped: bool,
}

/// Where a tag is.
enum Tag {
    /// With the kernel, or waiting for a bounce buffer.
    Idle,
    /// The volume works on its request.
    Busy {
        /// The result to commit if it goes well.
        bytes: i32,
        /// The bounce buffer, with where it belongs.
        bounce: Option<Bounce>,
    },
    /// Given back.
    Gone,
}

/// The memory of a request whose pages are out of reach.
struct Bounce {
    buffer: AlignedBuf,
    len: usize,
    /// Whether it goes into the request's pages at the end.
    read: bool,
}

impl UblkQueue {
    /// The queue 0, of `depth` tags, of device number `device`, open at `cdev`. The receiver gets
    /// one answer once the queue runs on a reactor; it is disconnected if it never will.
    ///
    /// # Errors
    /// If the descriptors cannot be mapped.
    pub(crate) fn open(
        device: u32,
        cdev: OwnedFd,
        depth: u16,
        mode: Mode,
    ) -> io::Result<(Self, Receiver<Started>)> {
        let descriptors = Descriptors::map(&cdev, 0, depth)?;
        let (started, answer) = sync_channel(1);
        let queue = Self {
            device,
            cdev,
            descriptors,
            mode,
            tags: (0..depth).map(|_| Tag::Idle).collect(),
            buffers: None,
            bounce: Pool::new(BOUNCE_BYTES_MAX, BOUNCE_KEPT_BYTES_MAX),
            waiting: VecDeque::new(),
            alive: depth,
            started: Some(started),
            refused: None,
            begun: false,
            warned: false,
            stopped: false,
        };
        Ok((queue, answer))
    }

    fn depth(&self) -> u16 {
        self.descriptors.depth()
    }

    /// Gives the kernel the tag's next command; `result` is the last request's.
    fn command(&self, tag: u16, operation: u32, result: i32, port: &mut Port<'_>) {
        let index = self.buffers.map_or(NO_BUFFER, |first| first + tag);
        let auto = match self.mode {
            Mode::ZeroCopy => u64::from(index) | u64::from(sys::UBLK_AUTO_BUF_REG_FALLBACK) << 16,
            Mode::UserCopy => 0,
        };
        let entry = opcode::UringCmd16::new(types::Fd(self.cdev.as_raw_fd()), operation)
            .cmd(descriptor::io_command(0, tag, result))
            .addr(Some(auto))
            .build();
        // SAFETY: the command holds all its data; the descriptor lives as long as the queue, which
        // is dropped only when none of its operations is under way.
        unsafe { port.push(entry, u32::from(tag)) };
    }

    fn commit(&self, tag: u16, result: i32, port: &mut Port<'_>) {
        self.command(tag, sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, result, port);
    }

    /// The kernel keeps the tag.
    fn retire(&mut self, tag: u16, result: i32, port: &mut Port<'_>) {
        if result != sys::UBLK_IO_RES_ABORT {
            let error = io::Error::from_raw_os_error(-result);
            tracing::error!(device = self.device, tag, %error, "the kernel refused a ublk command");
            if self.started.is_some() {
                self.refused.get_or_insert(error);
            }
        }
        self.tags[usize::from(tag)] = Tag::Gone;
        self.alive -= 1;
        if self.alive == 0
            && let Some(first) = self.buffers.take()
        {
            port.give_buffer_entries(first, self.depth());
        }
    }

    /// Makes a request of what the tag's descriptor says. False if it waits for a bounce buffer.
    fn serve(&mut self, tag: u16, port: &mut Port<'_>) -> bool {
        let request = match IoRequest::parse(&self.descriptors.read(tag)) {
            Ok(request) => request,
            Err(errno) => {
                self.commit(tag, -errno, port);
                return true;
            }
        };
        let bytes = request.result();
        let IoRequest { op, range, data } = request;
        let (buffer, bounce) = match (data, self.buffers) {
            (Data::None, _) => (Buffer::NONE, None),
            (Data::Registered { len }, Some(first)) if self.mode == Mode::ZeroCopy => {
                let base = descriptor::user_copy_offset(0, tag);
                (
                    Buffer::registered(first + tag, len, self.cdev.as_raw_fd(), base),
                    None,
                )
            }
            (Data::Registered { len } | Data::Unregistered { len }, _) => {
                let len = len as usize;
                if self.buffers.is_some() && !std::mem::replace(&mut self.warned, true) {
                    tracing::warn!(
                        device = self.device,
                        "the kernel could not register a request's pages: its data are copied"
                    );
                }
                let Some(mut buffer) = self.bounce.take(len) else {
                    return false;
                };
                if matches!(op, Op::Write { .. })
                    && let Err(error) = descriptor::copy_out(&self.cdev, tag, &mut buffer, len)
                {
                    self.bounce.give(buffer);
                    self.commit(tag, -error.raw_os_error().unwrap_or(libc::EIO), port);
                    return true;
                }
                let bounce = Bounce {
                    buffer,
                    len,
                    read: op == Op::Read,
                };
                // SAFETY: the tag owns the memory until `request_done`, and nobody looks at it
                // before; moving its owner does not move it.
                let buffer = unsafe { Buffer::user(bounce.buffer.ptr(), bytes.unsigned_abs()) };
                (buffer, Some(bounce))
            }
        };
        self.tags[usize::from(tag)] = Tag::Busy { bytes, bounce };
        port.request(op, range, buffer, u32::from(tag));
        true
    }

    /// Serves those that wait for bounce buffers, as far as these go.
    fn serve_waiting(&mut self, port: &mut Port<'_>) {
        while !self.stopped
            && let Some(tag) = self.waiting.front().copied()
        {
            if !self.serve(tag, port) {
                break;
            }
            self.waiting.pop_front();
        }
    }

    /// Tells whoever waits for it that all first FETCHes are with the kernel, or that they are not.
    fn report_started(&mut self) {
        let Some(started) = self.started.take() else {
            return;
        };
        let answer = match self.refused.take() {
            Some(error) => Err(error),
            None => {
                let mode = if self.buffers.is_some() {
                    self.mode
                } else {
                    Mode::UserCopy
                };
                Ok(Running {
                    tid: rustix::thread::gettid().as_raw_pid(),
                    mode,
                })
            }
        };
        // Nobody waits any more if the command was given up meanwhile: the device is then stopped.
        let _ = started.try_send(answer);
    }
}

impl FrontEnd for UblkQueue {
    fn start(&mut self, port: &mut Port<'_>) {
        self.begun = true;
        if self.mode == Mode::ZeroCopy {
            self.buffers = port.take_buffer_entries(self.depth());
            if self.buffers.is_none() {
                tracing::warn!(
                    device = self.device,
                    "the reactor's buffer table is full: the device copies its data"
                );
            }
        }
        for tag in 0..self.depth() {
            self.command(tag, sys::UBLK_U_IO_FETCH_REQ, 0, port);
        }
        // A FETCH that is refused completes at once, so before this one.
        // SAFETY: a no-op points to nothing.
        unsafe { port.push(opcode::Nop::new().build(), FENCE) };
    }

    fn op_done(&mut self, tag: u32, result: i32, _flags: u32, port: &mut Port<'_>) {
        if tag == FENCE {
            self.report_started();
            return;
        }
        let tag = u16::try_from(tag).expect("tags are given by us");
        if result != i32::try_from(sys::UBLK_IO_RES_OK).expect("it is 0") {
            self.retire(tag, result, port);
            return;
        }
        // Those that wait are older.
        if self.stopped || !self.waiting.is_empty() || !self.serve(tag, port) {
            self.waiting.push_back(tag);
        }
    }

    fn request_done(&mut self, tag: u32, result: Result<(), IoError>, port: &mut Port<'_>) {
        let tag = u16::try_from(tag).expect("tags are given by us");
        let state = std::mem::replace(&mut self.tags[usize::from(tag)], Tag::Idle);
        let Tag::Busy { bytes, bounce } = state else {
            panic!("a request is done that was not made")
        };
        let mut answer = result.map_or_else(|error| -error.errno(), |()| bytes);
        let bounced = bounce.is_some();
        if let Some(Bounce { buffer, len, read }) = bounce {
            if read
                && answer >= 0
                && let Err(error) = descriptor::copy_in(&self.cdev, tag, &buffer, len)
            {
                answer = -error.raw_os_error().unwrap_or(libc::EIO);
            }
            self.bounce.give(buffer);
        }
        self.commit(tag, answer, port);
        if bounced {
            self.serve_waiting(port);
        }
    }

    /// Only the kernel ends a queue, when its device is stopped: for a detach this comes after that,
    /// and finds nothing to do. With a device that is to outlive the daemon, requests that come from
    /// now on are kept unanswered: the kernel gives them to the daemon that recovers the device.
    fn stop(&mut self, _port: &mut Port<'_>) {
        self.stopped = true;
    }

    fn ends_by_itself(&self) -> bool {
        false
    }

    fn is_finished(&self) -> bool {
        self.begun && self.alive == 0
    }
}
