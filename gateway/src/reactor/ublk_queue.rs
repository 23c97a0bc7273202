//! A queue of a ublk device on a reactor's ring.
//!
//! Each tag always has one command with the kernel: FETCH at first, then COMMIT_AND_FETCH with the
//! result of the request before. A command's completion is a request, described in memory shared
//! with the kernel ([`descriptor`]). How its data are reached is the device's [`Mode`]:
//! - zero copy: the kernel has put the request's pages into the ring's buffer table by then, at the
//!   tag's own entry. Where it could not, and by hand, a REGISTER command puts them at an entry
//!   taken for the time of the request.
//! - user copy, and where registration failed: by a bounce buffer of ours, `pread` and `pwrite`.
//! - plain: by a bounce buffer, which the kernel fills when it is asked to (NEED_GET_DATA) and
//!   empties at the commit.
//!
//! Owns: the character device's descriptor, the shared memory, the tags and the bounce buffers.
//! Does not own: the device ([`crate::ublk`]): a queue ends when the kernel gives all tags back,
//! which it does when the device is stopped.
//!
//! Invariants:
//! - A tag is committed exactly once for each request, always with the whole length or an errno: a
//!   short result would complete the rest unfilled.
//! - A tag is fetched and committed on the ring and thread that the queue was started on.
//! - A request that waits for memory is not overtaken by later ones that need memory too.

mod descriptor;
mod operation;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use io_uring::{opcode, types};
use libublk::sys;
use quarry_volume::{IoError, Op};

use self::descriptor::Descriptors;
pub use self::descriptor::{Data, IoRequest};
use self::operation::Operation;
use super::frontend::{Buffer, FrontEnd, Port};
use super::memory::{AlignedBuf, Pool};
use crate::ublk::Mode;

/// Bounce buffers in use at most, in bytes: what needs one beyond it waits for one.
const BOUNCE_BYTES_MAX: usize = 16 << 20;

/// Bounce buffers kept for reuse, in bytes.
const BOUNCE_KEPT_BYTES_MAX: usize = 4 << 20;

/// A buffer index that no table has: registration there fails, and the request is served without.
const NO_BUFFER: u16 = u16::MAX;

/// An address for the commit of a read that failed: the kernel insists on one, and does not use it.
const UNUSED_ADDRESS: u64 = 1;

/// What a queue tells when its commands are with the kernel, or why they are not.
pub(crate) type Started = Result<Running, io::Error>;

/// A queue that runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    /// The thread of its reactor.
    pub(crate) tid: i32,
    /// How its data travel: a worse way than its device's if the reactor's buffer table is full.
    pub(crate) mode: Mode,
}

/// A queue of a ublk device: a front end.
pub struct UblkQueue {
    device: u32,
    /// Its number among the device's queues.
    queue: u16,
    cdev: OwnedFd,
    descriptors: Descriptors,
    mode: Mode,
    tags: Vec<Tag>,
    /// The tags' own entries of the ring's buffer table: the first one's index.
    entries: Option<u16>,
    bounce: Pool,
    /// Tags with a request that waits for a bounce buffer, oldest first.
    waiting: VecDeque<u16>,
    /// Buffers of reads whose commits the kernel has not seen yet, oldest first.
    lent: VecDeque<AlignedBuf>,
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
    /// The kernel puts its request's pages into the buffer table, at this entry.
    Registering { entry: u16, request: IoRequest },
    /// The kernel copies its write's data into the bounce buffer.
    Copying(AlignedBuf),
    /// The volume works on its request.
    Busy {
        op: Op,
        /// The result to commit if it goes well.
        bytes: i32,
        memory: Memory,
    },
    /// Given back.
    Gone,
}

/// By what a request's data are reached.
enum Memory {
    /// It has none, or its pages are at the tag's own entry.
    Own,
    /// Its pages are at this entry.
    Entry(u16),
    /// A bounce buffer.
    Bounce(AlignedBuf),
}

impl UblkQueue {
    /// Queue number `queue`, of `depth` tags, of device number `device`, open at `cdev`. The receiver
    /// gets one answer once the queue runs on a reactor; it is disconnected if it never will.
    ///
    /// # Errors
    /// If the descriptors cannot be mapped.
    pub(crate) fn open(
        device: u32,
        queue: u16,
        cdev: OwnedFd,
        depth: u16,
        mode: Mode,
    ) -> io::Result<(Self, Receiver<Started>)> {
        let descriptors = Descriptors::map(&cdev, queue, depth)?;
        let (started, answer) = sync_channel(1);
        let queue = Self {
            device,
            queue,
            cdev,
            descriptors,
            mode,
            tags: (0..depth).map(|_| Tag::Idle).collect(),
            entries: None,
            bounce: Pool::new(BOUNCE_BYTES_MAX, BOUNCE_KEPT_BYTES_MAX),
            waiting: VecDeque::new(),
            lent: VecDeque::new(),
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

    fn registers(&self) -> bool {
        self.mode <= Mode::ZeroCopyByHand
    }

    /// Gives the kernel a command: `result` is the last request's, `address` as in
    /// [`descriptor::io_command`].
    fn command(
        &self,
        operation: Operation,
        code: u32,
        tag: u16,
        result: i32,
        address: u64,
        port: &mut Port<'_>,
    ) {
        let own = match self.mode {
            Mode::ZeroCopy => {
                let index = self.entries.map_or(NO_BUFFER, |first| first + tag);
                u64::from(index) | u64::from(sys::UBLK_AUTO_BUF_REG_FALLBACK) << 16
            }
            _ => 0,
        };
        let entry = opcode::UringCmd16::new(types::Fd(self.cdev.as_raw_fd()), code)
            .cmd(descriptor::io_command(self.queue, tag, result, address))
            .addr(Some(own))
            .build();
        // SAFETY: the command holds all its data but the buffer at `address`, if it is one, which the
        // tag owns until the command's completion (`Tag::Copying`) or until the kernel has seen it
        // (`lent`); the descriptor lives as long as the queue, which is dropped only when none of
        // its operations is under way.
        unsafe { port.push(entry, operation.pack()) };
    }

    /// Ends a request and asks for the next one.
    fn commit(&self, tag: u16, result: i32, address: u64, port: &mut Port<'_>) {
        let code = sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ;
        self.command(Operation::Fetch(tag), code, tag, result, address, port);
    }

    /// Ends a request that never came to the volume.
    fn refuse(&self, tag: u16, errno: i32, port: &mut Port<'_>) {
        let plain = self.mode == Mode::Plain;
        let address = if plain { UNUSED_ADDRESS } else { 0 };
        self.commit(tag, -errno, address, port);
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
        let state = std::mem::replace(&mut self.tags[usize::from(tag)], Tag::Gone);
        if let Tag::Copying(buffer) = state {
            self.bounce.give(buffer);
        }
        self.alive -= 1;
        if self.alive == 0
            && let Some(first) = self.entries.take()
        {
            port.give_buffer_entries(first, self.depth());
        }
    }

    /// The kernel has a request: serves it, or lets it wait. `copied` holds a write's data, if the
    /// kernel was asked for them.
    fn arrived(&mut self, tag: u16, copied: Option<AlignedBuf>, port: &mut Port<'_>) {
        match copied {
            Some(buffer) if self.stopped => self.bounce.give(buffer),
            Some(buffer) => return self.serve_copied(tag, buffer, port),
            None => {}
        }
        // Those that wait are older.
        if self.stopped || !self.waiting.is_empty() || !self.serve(tag, port) {
            self.waiting.push_back(tag);
        }
    }

    /// Makes a request of what the tag's descriptor says, or takes the next step towards it. False if
    /// it waits for a bounce buffer.
    fn serve(&mut self, tag: u16, port: &mut Port<'_>) -> bool {
        let request = match IoRequest::parse(&self.descriptors.read(tag)) {
            Ok(request) => request,
            Err(errno) => {
                self.refuse(tag, errno, port);
                return true;
            }
        };
        match (request.data, self.entries) {
            (Data::None, _) => self.make(tag, request, Buffer::NONE, Memory::Own, port),
            (
                Data::Bytes {
                    registered: true, ..
                },
                Some(first),
            ) => {
                let buffer = self.registered(tag, &request, first + tag);
                self.make(tag, request, buffer, Memory::Own, port);
            }
            _ if self.registers()
                && let Some(entry) = port.take_loose_entry() =>
            {
                self.tags[usize::from(tag)] = Tag::Registering { entry, request };
                let (operation, code) = (Operation::Register(tag), sys::UBLK_U_IO_REGISTER_IO_BUF);
                self.command(operation, code, tag, 0, entry.into(), port);
            }
            _ => return self.bounce(tag, request, port),
        }
        true
    }

    /// The request's pages at an entry of the buffer table.
    fn registered(&self, tag: u16, request: &IoRequest, entry: u16) -> Buffer {
        let len = request.result().unsigned_abs();
        let base = descriptor::user_copy_offset(self.queue, tag);
        Buffer::registered(entry, len, self.cdev.as_raw_fd(), base)
    }

    /// Serves a request by a bounce buffer. False if there is none.
    fn bounce(&mut self, tag: u16, request: IoRequest, port: &mut Port<'_>) -> bool {
        let len = request.result().unsigned_abs() as usize;
        let Some(mut buffer) = self.bounce.take(len) else {
            return false;
        };
        let write = matches!(request.op, Op::Write { .. });
        if write && self.mode == Mode::Plain {
            let (operation, code) = (Operation::Fetch(tag), sys::UBLK_U_IO_NEED_GET_DATA);
            let address = buffer.ptr().as_ptr() as u64;
            self.tags[usize::from(tag)] = Tag::Copying(buffer);
            self.command(operation, code, tag, 0, address, port);
            return true;
        }
        let offset = descriptor::user_copy_offset(self.queue, tag);
        if write && let Err(error) = descriptor::copy_out(&self.cdev, offset, &mut buffer, len) {
            self.bounce.give(buffer);
            self.refuse(tag, error.raw_os_error().unwrap_or(libc::EIO), port);
            return true;
        }
        self.make_bounced(tag, request, buffer, port);
        true
    }

    /// Makes a request of a write whose data the kernel has copied.
    fn serve_copied(&mut self, tag: u16, buffer: AlignedBuf, port: &mut Port<'_>) {
        match IoRequest::parse(&self.descriptors.read(tag)) {
            Ok(request)
                if matches!(request.op, Op::Write { .. })
                    && request.result().unsigned_abs() as usize <= buffer.capacity() =>
            {
                self.make_bounced(tag, request, buffer, port);
            }
            _ => self.given_up(tag, buffer, port),
        }
    }

    /// The kernel had to give a write up whose data it was asked for, and came with another request.
    fn given_up(&mut self, tag: u16, buffer: AlignedBuf, port: &mut Port<'_>) {
        self.bounce.give(buffer);
        self.arrived(tag, None, port);
        // There may be no other buffer that comes back for those that wait.
        self.serve_waiting(port);
    }

    fn make_bounced(
        &mut self,
        tag: u16,
        request: IoRequest,
        memory: AlignedBuf,
        port: &mut Port<'_>,
    ) {
        // SAFETY: the tag owns the memory until `request_done`, and nobody looks at it before; moving
        // its owner does not move it.
        let buffer = unsafe { Buffer::user(memory.ptr(), request.result().unsigned_abs()) };
        self.make(tag, request, buffer, Memory::Bounce(memory), port);
    }

    fn make(
        &mut self,
        tag: u16,
        request: IoRequest,
        buffer: Buffer,
        memory: Memory,
        port: &mut Port<'_>,
    ) {
        let (op, bytes) = (request.op, request.result());
        self.tags[usize::from(tag)] = Tag::Busy { op, bytes, memory };
        port.request(op, request.range, buffer, u32::from(tag));
    }

    /// The kernel has put a request's pages into the buffer table, or could not.
    fn registered_by_hand(&mut self, tag: u16, result: i32, port: &mut Port<'_>) {
        let state = std::mem::replace(&mut self.tags[usize::from(tag)], Tag::Idle);
        let Tag::Registering { entry, request } = state else {
            panic!("a registration that nobody asked for")
        };
        if self.stopped {
            // Not given to the volume, which would refuse it. The ring's end unregisters the pages.
            self.waiting.push_back(tag);
            return;
        }
        if result == 0 {
            let buffer = self.registered(tag, &request, entry);
            return self.make(tag, request, buffer, Memory::Entry(entry), port);
        }
        port.give_loose_entry(entry);
        if !std::mem::replace(&mut self.warned, true) {
            let error = io::Error::from_raw_os_error(-result);
            tracing::warn!(device = self.device, %error, "the kernel could not register a request's pages: its data are copied");
        }
        if !self.bounce(tag, request, port) {
            self.waiting.push_back(tag);
        }
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
    fn report_started(&mut self, port: &Port<'_>) {
        let Some(started) = self.started.take() else {
            return;
        };
        let answer = match self.refused.take() {
            Some(error) => Err(error),
            None => {
                let mode = match self.mode {
                    Mode::ZeroCopy | Mode::ZeroCopyByHand if !port.has_buffer_table() => {
                        Mode::UserCopy
                    }
                    Mode::ZeroCopy if self.entries.is_none() => Mode::ZeroCopyByHand,
                    mode => mode,
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
    fn name(&self) -> &'static str {
        "ublk"
    }

    fn start(&mut self, port: &mut Port<'_>) {
        self.begun = true;
        if self.mode == Mode::ZeroCopy {
            self.entries = port.take_buffer_entries(self.depth());
            if self.entries.is_none() {
                tracing::warn!(
                    device = self.device,
                    "the reactor's buffer table is full: the device's requests are registered one by one"
                );
            }
        }
        for tag in 0..self.depth() {
            let (operation, code) = (Operation::Fetch(tag), sys::UBLK_U_IO_FETCH_REQ);
            self.command(operation, code, tag, 0, 0, port);
        }
        // A FETCH that is refused completes at once, so before this one.
        // SAFETY: a no-op points to nothing.
        unsafe { port.push(opcode::Nop::new().build(), Operation::Fence.pack()) };
    }

    fn op_done(&mut self, tag: u32, result: i32, _flags: u32, port: &mut Port<'_>) {
        match Operation::unpack(tag) {
            Operation::Fence => self.report_started(port),
            Operation::Fetch(tag) => {
                const OK: i32 = sys::UBLK_IO_RES_OK.cast_signed();
                const NEED_GET_DATA: i32 = sys::UBLK_IO_RES_NEED_GET_DATA.cast_signed();
                if !matches!(result, OK | NEED_GET_DATA) {
                    return self.retire(tag, result, port);
                }
                let state = std::mem::replace(&mut self.tags[usize::from(tag)], Tag::Idle);
                let copied = match state {
                    Tag::Copying(buffer) if result == OK => Some(buffer),
                    Tag::Copying(buffer) => return self.given_up(tag, buffer, port),
                    _ => None,
                };
                self.arrived(tag, copied, port);
            }
            Operation::Register(tag) => self.registered_by_hand(tag, result, port),
            Operation::Unregister(entry) if result == 0 => port.give_loose_entry(entry),
            Operation::Unregister(entry) => {
                let error = io::Error::from_raw_os_error(-result);
                tracing::error!(device = self.device, entry, %error, "an entry of the buffer table is lost");
            }
            Operation::Lent => {
                let buffer = self.lent.pop_front();
                self.bounce
                    .give(buffer.expect("one for each such operation"));
                self.serve_waiting(port);
            }
        }
    }

    fn request_done(&mut self, tag: u32, result: Result<(), IoError>, port: &mut Port<'_>) {
        let tag = u16::try_from(tag).expect("tags are given by us");
        let state = std::mem::replace(&mut self.tags[usize::from(tag)], Tag::Idle);
        let Tag::Busy { op, bytes, memory } = state else {
            panic!("a request is done that was not made")
        };
        let mut answer = result.map_or_else(|error| -error.errno(), |()| bytes);
        match memory {
            Memory::Own => self.commit(tag, answer, 0, port),
            Memory::Entry(entry) => {
                let (operation, code) = (
                    Operation::Unregister(entry),
                    sys::UBLK_U_IO_UNREGISTER_IO_BUF,
                );
                self.command(operation, code, tag, 0, entry.into(), port);
                self.commit(tag, answer, 0, port);
            }
            Memory::Bounce(buffer) if self.mode == Mode::Plain && op == Op::Read => {
                self.commit(tag, answer, buffer.ptr().as_ptr() as u64, port);
                self.lent.push_back(buffer);
                // The kernel looks at entries in their order: when it is at this one, it has copied.
                // SAFETY: a no-op points to nothing.
                unsafe { port.push(opcode::Nop::new().build(), Operation::Lent.pack()) };
            }
            Memory::Bounce(buffer) => {
                let offset = descriptor::user_copy_offset(self.queue, tag);
                if op == Op::Read
                    && answer >= 0
                    && let Err(error) = descriptor::copy_in(
                        &self.cdev,
                        offset,
                        &buffer,
                        bytes.unsigned_abs() as usize,
                    )
                {
                    answer = -error.raw_os_error().unwrap_or(libc::EIO);
                }
                self.bounce.give(buffer);
                self.commit(tag, answer, 0, port);
                self.serve_waiting(port);
            }
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

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};
    use slab::Slab;

    use super::super::frontend::{Geometry, Inbox, Pending};
    use super::super::ring::Ring;
    use super::*;

    /// Behind the descriptors' place, of which the kernel has a page for each queue.
    const SHARED_BYTES: u64 = sys::UBLKSRV_CMD_BUF_OFFSET as u64 + 4096;

    /// What the kernel shares: a queue's descriptors.
    fn shared(descriptors: &[sys::ublksrv_io_desc]) -> io::Result<OwnedFd> {
        let shared = memfd_create("descriptors", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&shared, SHARED_BYTES)?;
        for (tag, descriptor) in (0..).zip(descriptors) {
            describe(&shared, tag, *descriptor)?;
        }
        Ok(shared)
    }

    /// A request comes at a tag.
    fn describe(shared: &OwnedFd, tag: u16, descriptor: sys::ublksrv_io_desc) -> io::Result<()> {
        // SAFETY: a plain structure, of which each byte is one.
        let bytes: [u8; 24] = unsafe { std::mem::transmute(descriptor) };
        let at = u64::from(sys::UBLKSRV_CMD_BUF_OFFSET) + u64::from(tag) * 24;
        rustix::io::pwrite(shared, &bytes, at)?;
        Ok(())
    }

    fn inbox() -> Inbox {
        Inbox {
            geometry: Geometry {
                size: quarry_objfmt::Sectors::new(8),
                sector_size: 512,
                read_only: false,
            },
            requests: Slab::new(),
            events: Vec::new(),
        }
    }

    fn port<'a>(ring: &'a mut Ring, inbox: &'a mut Inbox, pending: &'a mut Pending) -> Port<'a> {
        Port {
            ring,
            inbox,
            front_end: 0,
            pending,
            now_ms: 0,
            batch_ns: 0,
        }
    }

    /// A stopped queue answers nothing: what comes late stays with the kernel, for the next daemon. It
    /// once asked the volume for a read whose pages were registered only after the stop, and failed it.
    #[test]
    fn request_whose_pages_are_registered_after_the_stop_is_kept_unanswered() -> io::Result<()> {
        let shared = shared(&[sys::ublksrv_io_desc {
            op_flags: sys::UBLK_IO_OP_READ,
            nr_sectors: 8,
            ..Default::default()
        }])?;
        let mut ring = Ring::new(shared.as_raw_fd(), None, 8)?;
        let mut inbox = inbox();
        let mut pending = Pending::default();
        let mut port = port(&mut ring, &mut inbox, &mut pending);
        for (result, stopped) in [(0, false), (0, true), (-libc::EINVAL, true)] {
            let cdev = shared.try_clone()?;
            let (mut queue, _started) = UblkQueue::open(0, 0, cdev, 1, Mode::ZeroCopyByHand)?;
            queue.op_done(Operation::Fetch(0).pack(), 0, 0, &mut port);
            assert!(matches!(queue.tags[0], Tag::Registering { .. }));
            if stopped {
                queue.stop(&mut port);
            }
            queue.op_done(Operation::Register(0).pack(), result, 0, &mut port);
            let asked = port.inbox.events.drain(..).count();
            assert_eq!(asked, usize::from(!stopped), "{result}");
            queue.serve_waiting(&mut port);
            assert!(port.inbox.events.is_empty(), "{result}");
        }
        Ok(())
    }

    /// The kernel may give up all writes whose data it was asked for, and come with other requests at their tags: all
    /// buffers are back then, and no request's end wakes those that wait.
    #[test]
    fn writes_that_wait_for_buffers_are_served_when_the_kernel_gives_up_all_that_have_them()
    -> io::Result<()> {
        const NEED_GET_DATA: i32 = sys::UBLK_IO_RES_NEED_GET_DATA.cast_signed();
        const HELD: u16 = 16;
        let of = |op_flags, nr_sectors| sys::ublksrv_io_desc {
            op_flags,
            nr_sectors,
            ..Default::default()
        };
        // A buffer for each but the last.
        let write = of(sys::UBLK_IO_OP_WRITE, (1 << 20) / 512);
        let shared = shared(&[write; 17])?;
        let mut ring = Ring::new(shared.as_raw_fd(), None, 8)?;
        let mut inbox = inbox();
        let mut pending = Pending::default();
        let mut port = port(&mut ring, &mut inbox, &mut pending);
        let copying = |queue: &UblkQueue| {
            let tags = queue.tags.iter();
            tags.filter(|tag| matches!(tag, Tag::Copying(_))).count()
        };
        let full = |port: &mut Port<'_>| -> io::Result<UblkQueue> {
            let (mut queue, _started) =
                UblkQueue::open(0, 0, shared.try_clone()?, HELD + 1, Mode::Plain)?;
            for tag in 0..=HELD {
                queue.op_done(Operation::Fetch(tag).pack(), NEED_GET_DATA, 0, port);
            }
            assert_eq!((copying(&queue), queue.waiting.len()), (16, 1));
            Ok(queue)
        };

        // With other writes.
        let mut queue = full(&mut port)?;
        for tag in 0..HELD {
            queue.op_done(Operation::Fetch(tag).pack(), NEED_GET_DATA, 0, &mut port);
        }
        assert_eq!((copying(&queue), queue.waiting.len()), (16, 1));
        drop(queue);

        // With flushes.
        let mut queue = full(&mut port)?;
        let flush = of(sys::UBLK_IO_OP_FLUSH, 0);
        for tag in 0..HELD {
            describe(&shared, tag, flush)?;
            queue.op_done(Operation::Fetch(tag).pack(), 0, 0, &mut port);
        }
        assert_eq!((copying(&queue), queue.waiting.len()), (1, 0));
        assert_eq!(port.inbox.events.len(), usize::from(HELD));
        Ok(())
    }
}
