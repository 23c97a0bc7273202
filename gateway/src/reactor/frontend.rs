//! The seam between a reactor and what brings it requests: an NBD connection, a queue of a ublk
//! device.
//!
//! A front end lives on its reactor's thread, belongs to one volume, and shares the reactor's ring.
//! It is called, never calls: each call gets a [`Port`], through which it pushes its own ring
//! operations, makes requests of the volume, and takes entries of the registered buffer table.
//!
//! Life: [`FrontEnd::start`] once; then [`FrontEnd::op_done`] for each completion of its own
//! operations, [`FrontEnd::request_done`] exactly once for each request it made,
//! [`FrontEnd::end_batch`] once at the end of each batch in which it was called (the place to push what
//! was gathered: the batch is submitted right after it), [`FrontEnd::tick`] about ten times a
//! second if it wants that; [`FrontEnd::stop`] when the volume is taken away. It is dropped as soon as
//! [`FrontEnd::is_finished`] holds *and* none of its operations and requests are under way: the
//! reactor counts both. So memory that operations or requests point into may be owned by the front
//! end itself and is freed by its drop.
//!
//! Invariants:
//! - No call blocks.
//! - A buffer given with a request belongs to the volume until `request_done`.
//! - `request_done` may come from inside [`Port::request`]'s batch, but never from inside the call.

use std::os::fd::RawFd;
use std::ptr::NonNull;

use bytes::Bytes;
use io_uring::squeue;
use quarry_objfmt::{LbaRange, Sectors};
use quarry_volume::{Event, IoError, Op, Request, RequestId, StatusRun};
use slab::Slab;

use super::ring::Ring;
use super::token::Token;
use super::trails::RequestTrail;
use crate::latency::Timed;

/// What brings requests. See the module's text for the order of the calls.
pub trait FrontEnd: Send {
    /// The first call: push the first operations. The ring is the one on which all others run.
    fn start(&mut self, port: &mut Port<'_>);

    /// One of its own operations has a completion: `tag` as given to [`Port::push`], `result` and
    /// `flags` as in the CQE (a negative result is an errno). Every pushed entry has exactly one
    /// final completion; a multishot one has others before, with `IORING_CQE_F_MORE` in `flags`.
    fn op_done(&mut self, tag: u32, result: i32, flags: u32, port: &mut Port<'_>);

    /// A request it made is done; `tag` as given to [`Port::request`]. Its buffer is its own again.
    fn request_done(&mut self, tag: u32, result: Result<(), IoError>, port: &mut Port<'_>);

    /// The memory of a write of its that was carried out, for others to read from now on; asked right before it is done, which
    /// the memory is then no part of any more. `None` from front ends whose data are not in memory of their own.
    fn give_away(&mut self, _tag: u32) -> Option<Bytes> {
        None
    }

    /// What a request for the status of a range is answered with, right before it is done. Only for
    /// front ends that make such requests.
    fn status_told(&mut self, _tag: u32, _runs: &[StatusRun]) {}

    /// The batch is about to be submitted: push what was gathered in it.
    fn end_batch(&mut self, _port: &mut Port<'_>) {}

    /// Time has passed; [`Port::now_ms`] tells how much. Called while [`FrontEnd::wants_tick`] holds.
    fn tick(&mut self, _port: &mut Port<'_>) {}

    /// Whether it waits for time to pass. Asked at each tick; there is one after every call.
    fn wants_tick(&self) -> bool {
        false
    }

    /// Bring no new requests, and come to an end once those under way are done. May be called more
    /// than once. A front end that cannot end by itself (a ublk queue, whose commands only the
    /// kernel gives back when the device is stopped) does nothing here.
    fn stop(&mut self, port: &mut Port<'_>);

    /// What it is, in a word, for traces.
    fn name(&self) -> &'static str {
        "other"
    }

    /// Whether it comes to an end after [`FrontEnd::stop`] without anybody's help.
    fn ends_by_itself(&self) -> bool {
        true
    }

    /// Whether its client is gone: what a suspension holds of its requests is refused then, so that it comes to its end.
    fn is_gone(&self) -> bool {
        false
    }

    /// Whether it wants nothing more, ever. Asked after each call.
    fn is_finished(&self) -> bool;
}

/// The memory of a request: where a read is put and a write is taken from.
#[derive(Clone, Copy, Debug)]
pub struct Buffer(pub(super) BufferKind);

#[derive(Clone, Copy, Debug)]
pub(super) enum BufferKind {
    /// No data (flush, discard, write zeroes).
    None,
    /// Memory of this process.
    User { ptr: NonNull<u8>, len: u32 },
    /// The request's own pages, registered in the ring's buffer table.
    Registered {
        buf_index: u16,
        len: u32,
        char_fd: RawFd,
        user_copy_base: u64,
    },
}

// SAFETY: the pointer is an address handed on to the kernel; whoever made the buffer vouched
// (`Buffer::user`) that the memory outlives the request, and requests never leave their thread.
unsafe impl Send for Buffer {}

impl Buffer {
    /// No data: for flush, discard and write zeroes.
    pub const NONE: Self = Self(BufferKind::None);

    /// `len` bytes of this process' memory. For direct I/O on the cache device `ptr` must be
    /// aligned to 4096.
    ///
    /// # Safety
    /// From [`Port::request`] to [`FrontEnd::request_done`] the memory must stay allocated, and
    /// nobody else may touch it: the kernel reads or writes it.
    #[must_use]
    pub const unsafe fn user(ptr: NonNull<u8>, len: u32) -> Self {
        Self(BufferKind::User { ptr, len })
    }

    /// The request's pages at `buf_index` of the reactor's registered buffer table, `len` bytes.
    /// Addresses inside are byte offsets from the request's start. `char_fd` is the ublk character
    /// device, at whose offset `user_copy_base` (`UBLKSRV_IO_BUF_OFFSET + (queue << 41) +
    /// (tag << 25)`) a write reaches the same pages. The front end keeps `char_fd` open until all
    /// its requests are done.
    #[must_use]
    pub const fn registered(buf_index: u16, len: u32, char_fd: RawFd, user_copy_base: u64) -> Self {
        Self(BufferKind::Registered {
            buf_index,
            len,
            char_fd,
            user_copy_base,
        })
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn len(&self) -> u32 {
        match self.0 {
            BufferKind::None => 0,
            BufferKind::User { len, .. } | BufferKind::Registered { len, .. } => len,
        }
    }

    /// Whether it has no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The shape of a volume, as its front ends must know it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Its size.
    pub size: Sectors,
    /// Bytes of a logical block: 512 or 4096.
    pub sector_size: u32,
    /// Whether it takes no writes.
    pub read_only: bool,
}

/// A request that the volume works on.
#[derive(Debug)]
pub(super) struct InFlight {
    /// Index of the front end that made it.
    pub(super) front_end: u32,
    /// The front end's own name for it.
    pub(super) tag: u32,
    /// Its memory.
    pub(super) buffer: Buffer,
    /// Ring operations that use the memory right now.
    pub(super) ops: u32,
    /// The volume's answer, kept back while `ops` is not zero.
    pub(super) answer: Option<Result<(), IoError>>,
    /// As what its time counts, if it does.
    pub(super) timed: Option<Timed>,
    /// The batch in which it came, or was let through: nanoseconds of [`now_ns`](crate::clock::now_ns).
    pub(super) since_ns: u64,
    /// What was asked for.
    pub(super) op: Op,
    pub(super) range: LbaRange,
    /// Where on the cache device its data are, if they are to be kept in memory too.
    pub(super) placed: Option<u64>,
    /// Where its time went, once it has left the fast path and is traced.
    pub(super) trail: Option<Box<RequestTrail>>,
}

/// What a volume is asked and told in the batch at hand, and the requests it works on.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) geometry: Geometry,
    pub(super) requests: Slab<InFlight>,
    pub(super) events: Vec<Event>,
}

/// How much of a front end is under way.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Pending {
    pub(super) ops: u32,
    pub(super) requests: u32,
}

/// What a front end can do, for the time of one call.
pub struct Port<'a> {
    pub(super) ring: &'a mut Ring,
    pub(super) inbox: &'a mut Inbox,
    pub(super) front_end: u32,
    pub(super) pending: &'a mut Pending,
    pub(super) now_ms: u64,
    /// When the batch began.
    pub(super) batch_ns: u64,
}

impl Port<'_> {
    /// Pushes an operation of the front end's own; `tag` comes back in [`FrontEnd::op_done`]. The
    /// entry's user data is overwritten. Never fails: what the submission queue cannot hold waits.
    ///
    /// # Safety
    /// All that the entry points to (buffers, `msghdr`s, file descriptors) must stay valid and
    /// untouched until its final completion. What the front end owns stays so until its drop.
    pub unsafe fn push(&mut self, entry: squeue::Entry, tag: u32) {
        self.pending.ops += 1;
        let entry = entry.user_data(
            Token::FrontEnd {
                index: self.front_end,
                tag,
            }
            .pack(),
        );
        // SAFETY: the caller's promise, word for word.
        unsafe { self.ring.push(entry) };
    }

    /// Makes a request of the volume; `tag` comes back in [`FrontEnd::request_done`], exactly once.
    /// A range outside the volume or off its logical blocks comes back with an error like any other.
    /// The request is looked at after the call returned.
    ///
    /// # Panics
    /// If a read's or write's buffer is not as long as its range.
    pub fn request(&mut self, op: Op, range: LbaRange, buffer: Buffer, tag: u32) -> RequestId {
        assert_eq!(
            op.data_bytes(range),
            u64::from(buffer.len()),
            "a request's buffer is as long as its range"
        );
        self.pending.requests += 1;
        let key = self.inbox.requests.insert(InFlight {
            front_end: self.front_end,
            tag,
            buffer,
            ops: 0,
            answer: None,
            timed: Timed::of(op),
            since_ns: self.batch_ns,
            op,
            range,
            placed: None,
            trail: None,
        });
        let id = RequestId(key as u64);
        self.inbox
            .events
            .push(Event::Request(Request { id, op, range }));
        id
    }

    /// The volume's shape.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.inbox.geometry
    }

    /// Takes `count` neighbouring entries of the ring's (sparse) registered buffer table and gives
    /// the first one's index; `None` if there are not so many left.
    pub fn take_buffer_entries(&mut self, count: u16) -> Option<u16> {
        self.ring.take_buffer_entries(count)
    }

    /// Gives back entries taken with [`Port::take_buffer_entries`]; they must be unregistered.
    pub fn give_buffer_entries(&mut self, first: u16, count: u16) {
        self.ring.give_buffer_entries(first, count);
    }

    /// Whether the ring has a table of registered buffers at all.
    #[must_use]
    pub fn has_buffer_table(&self) -> bool {
        self.ring.has_buffer_table()
    }

    /// Takes an entry of the buffer table for the time of one request; `None` if all are taken.
    pub fn take_loose_entry(&mut self) -> Option<u16> {
        self.ring.take_loose_entry()
    }

    /// Gives back an entry taken with [`Port::take_loose_entry`]; it must be unregistered.
    pub fn give_loose_entry(&mut self, entry: u16) {
        self.ring.give_loose_entry(entry);
    }

    /// Milliseconds since the reactor started, as of the last tick or message.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }
}
