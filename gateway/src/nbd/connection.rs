//! A connection in transmission: requests off the socket, replies back, on the reactor's ring.
//!
//! One receive and one send are under way at most. A receive fills the input buffer with as many
//! requests as have come; the payload of a write that is not all there yet is received straight into
//! the request's memory. All replies of a batch go out in one `sendmsg`.
//!
//! Invariants:
//! - A request's memory is freed after its reply was sent or given up, and never while the volume
//!   or the kernel has it.
//! - Memory and number of requests, replies included, are bounded: at a bound the connection stops
//!   reading its socket, and goes on when a reply is out; at that of all its tenant's connections, when there is some again,
//!   which it looks for from time to time.
//! - The input buffer is moved and parsed only while no receive is under way.

use std::any::Any;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use bytes::Bytes;
use io_uring::{opcode, types};
use quarry_objfmt::{Lba, LbaRange, SECTOR_SIZE, Sectors};
use quarry_volume::{IoError, Op, StatusRun};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;
use slab::Slab;

use super::negotiate::Replies;
use super::wire::{self, Command, REQUEST_LEN, Rejected, ReplyHead, RequestHeader};
use crate::reactor::memory::{AlignedBuf, Budget, Pool};
use crate::reactor::{Buffer, FrontEnd, Port};

/// Bytes received at once: about 31 requests of 4 KiB with their payloads. More would only mean
/// more copying of large payloads.
const INPUT_BYTES: usize = 128 << 10;

/// Most memory of a connection's requests and replies, in bytes: two of the largest.
const BUFFER_BYTES_MAX: usize = 64 << 20;

/// Memory kept for reuse, in bytes: 256 requests of 4 KiB and more.
const BUFFER_KEPT_BYTES: usize = 4 << 20;

/// The same as long as there are requests: 16 of 1 MiB, whose pages would else come from the kernel each time, zeroed.
const BUFFER_KEPT_BUSY_BYTES: usize = 16 << 20;

/// Most requests of a connection under way, replies not sent yet included. Keeps a send below the
/// kernel's limit of 1024 parts.
const REQUESTS_MAX: usize = 256;

/// Most block statuses among them: each may look at thousands of extents at once, while other volumes wait.
const STATUSES_MAX: usize = 4;

/// A longer read is made as several requests of the volume, in bytes: each may be of as many pieces as it has sectors, looked up while
/// other volumes wait. As long as ublk's longest.
const READ_PART_BYTES: u32 = 1 << 20;

/// How long a connection that ends waits for a client that takes nothing of its replies.
const END_GRACE_MS: u64 = 5_000;

const TAG_RECEIVE: u32 = 0;
const TAG_SEND: u32 = 1;

/// What a request was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read {
        offset: u64,
    },
    Write {
        range: LbaRange,
        fua: bool,
    },
    Status {
        one: bool,
    },
    /// A discard that must be durable: a flush follows it.
    TrimThenFlush,
    Other,
}

/// A request under way.
struct Pending {
    cookie: u64,
    kind: Kind,
    buf: Option<AlignedBuf>,
    len: u32,
    /// Requests of the volume that are not done, and the first error of those that are.
    left: u32,
    failed: Option<IoError>,
}

/// A reply to be sent.
struct Reply {
    head: ReplyHead,
    data: Option<(AlignedBuf, u32)>,
}

/// What the next bytes of the stream are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    Header,
    /// The rest of a write's payload.
    Payload {
        key: usize,
        filled: u32,
    },
    /// The rest of a refused write's payload.
    Skip {
        left: u32,
    },
}

/// Where a receive puts its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Receiving {
    Idle,
    Input,
    Payload,
}

/// The replies of one send, as the kernel sees them.
struct Outgoing {
    message: Box<libc::msghdr>,
    parts: Vec<libc::iovec>,
    /// The first part that is not all sent.
    first: usize,
    heads: Vec<u8>,
    replies: Vec<Reply>,
    under_way: bool,
}

// SAFETY: the pointers in `message` and `parts` lead into `parts`, `heads` and `replies`, which move
// with it and whose memory is on the heap.
unsafe impl Send for Outgoing {}

/// A client of one volume, in transmission.
pub struct Connection {
    fd: OwnedFd,
    replies: Replies,
    input: AlignedBuf,
    /// The bytes of `input` that were received and not parsed.
    input_start: usize,
    input_end: usize,
    expect: Expect,
    receiving: Receiving,
    /// A bound was reached with a whole header in the input.
    stalled: bool,
    pool: Pool,
    requests: Slab<Pending>,
    outbox: Vec<Reply>,
    outgoing: Outgoing,
    /// When it was decided to read no more.
    ending_since: Option<u64>,
    /// When something was sent last, or began to be.
    sent_ms: u64,
    /// The socket is of no more use; replies are dropped.
    dead: bool,
    _guard: Option<Box<dyn Any + Send>>,
}

impl Connection {
    /// Serves a socket that is through its handshake, in blocking mode.
    #[must_use]
    pub fn new(fd: OwnedFd, replies: Replies) -> Self {
        // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
        let message = Box::new(unsafe { mem::zeroed::<libc::msghdr>() });
        Self {
            fd,
            replies,
            input: AlignedBuf::zeroed(INPUT_BYTES),
            input_start: 0,
            input_end: 0,
            expect: Expect::Header,
            receiving: Receiving::Idle,
            stalled: false,
            pool: Pool::new(BUFFER_BYTES_MAX, BUFFER_KEPT_BYTES)
                .keeping_while_busy(BUFFER_KEPT_BUSY_BYTES),
            requests: Slab::with_capacity(REQUESTS_MAX),
            outbox: Vec::with_capacity(REQUESTS_MAX),
            outgoing: Outgoing {
                message,
                parts: Vec::with_capacity(2 * REQUESTS_MAX),
                first: 0,
                heads: Vec::with_capacity(REQUESTS_MAX * ReplyHead::LEN_MAX),
                replies: Vec::with_capacity(REQUESTS_MAX),
                under_way: false,
            },
            ending_since: None,
            sent_ms: 0,
            dead: false,
            _guard: None,
        }
    }

    /// The memory of its requests and replies is of this budget.
    #[must_use]
    pub(crate) fn within(mut self, budget: Arc<Budget>) -> Self {
        self.pool = self.pool.within(budget);
        self
    }

    /// Keeps `guard` as long as the connection lives.
    #[must_use]
    pub fn with_guard(mut self, guard: Box<dyn Any + Send>) -> Self {
        self._guard = Some(guard);
        self
    }

    /// Whether it waits for memory that others have: no reply of its own will bring any.
    fn waits_for_others(&self) -> bool {
        self.stalled && self.load() == 0
    }

    /// Requests under way, replies not sent yet included.
    fn load(&self) -> usize {
        self.requests.len() + self.outbox.len() + self.outgoing.replies.len()
    }

    /// Reads no more requests; those under way are answered.
    fn end(&mut self, now_ms: u64) {
        if self.ending_since.is_none() {
            self.ending_since = Some(now_ms);
        }
        // A write whose payload will never be whole was not made a request yet.
        if let Expect::Payload { key, .. } = self.expect
            && self.receiving != Receiving::Payload
        {
            self.expect = Expect::Header;
            let pending = self.requests.remove(key);
            if let Some(buf) = pending.buf {
                self.pool.give(buf);
            }
        }
    }

    /// The socket is of no more use.
    fn fail(&mut self, now_ms: u64) {
        self.dead = true;
        // Wakes what is under way; that the peer has gone already is no matter.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
        self.end(now_ms);
    }

    /// Makes requests of what has come, as far as the bounds allow, then receives more.
    fn parse(&mut self, port: &mut Port<'_>) {
        debug_assert_eq!(self.receiving, Receiving::Idle);
        self.stalled = false;
        while self.ending_since.is_none() {
            let available = self.input_end - self.input_start;
            match self.expect {
                Expect::Header => {
                    if available < REQUEST_LEN || !self.parse_request(port) {
                        break;
                    }
                }
                Expect::Payload { key, filled } => {
                    let pending = &mut self.requests[key];
                    let n = available.min((pending.len - filled) as usize);
                    if n == 0 {
                        break;
                    }
                    if let Some(buf) = &mut pending.buf {
                        let input = &self.input.bytes(self.input_end)[self.input_start..];
                        buf.copy_in(filled as usize, &input[..n]);
                    }
                    self.input_start += n;
                    self.payload_came(key, filled, n, port);
                }
                Expect::Skip { left } => {
                    let n = available.min(left as usize);
                    if n == 0 {
                        break;
                    }
                    self.input_start += n;
                    let left = left - u32::try_from(n).unwrap_or(left);
                    self.expect = if left == 0 {
                        Expect::Header
                    } else {
                        Expect::Skip { left }
                    };
                }
            }
        }
        self.receive(port);
    }

    fn statuses(&self) -> usize {
        let is_status = |pending: &Pending| matches!(pending.kind, Kind::Status { .. });
        let of_all = self.requests.iter();
        of_all.filter(|(_, pending)| is_status(pending)).count()
    }

    /// Takes the request at the front of the input; false if a bound keeps it there.
    fn parse_request(&mut self, port: &mut Port<'_>) -> bool {
        if self.load() >= REQUESTS_MAX {
            self.stalled = true;
            return false;
        }
        let input = &self.input.bytes(self.input_end)[self.input_start..];
        let Some(bytes) = input.first_chunk::<REQUEST_LEN>() else {
            return false;
        };
        let header = match RequestHeader::decode(bytes) {
            Ok(header) => header,
            Err(error) => {
                tracing::debug!(%error, "an NBD connection is closed");
                self.fail(port.now_ms());
                return false;
            }
        };
        let command = match self.check(&header, port) {
            Ok(command) => command,
            Err(rejected) => {
                self.input_start += REQUEST_LEN;
                let chunked = matches!(
                    header.command,
                    wire::command::READ | wire::command::BLOCK_STATUS
                );
                self.reply_error(header.cookie, chunked, rejected.errno);
                if rejected.payload > 0 {
                    self.expect = Expect::Skip {
                        left: rejected.payload,
                    };
                }
                return true;
            }
        };
        if matches!(command, Command::Status { .. }) && self.statuses() == STATUSES_MAX {
            self.stalled = true;
            return false;
        }
        let room = match command {
            Command::Read { .. } | Command::Write { .. } => header.len as usize,
            Command::Status { .. } => wire::STATUS_BYTES_MAX,
            _ => 0,
        };
        let buf = match room {
            0 => None,
            room => match self.pool.take(room) {
                Some(buf) => Some(buf),
                None => {
                    self.stalled = true;
                    return false;
                }
            },
        };
        self.input_start += REQUEST_LEN;
        let kind = match command {
            Command::Disconnect => {
                self.end(port.now_ms());
                return false;
            }
            Command::Read { .. } => Kind::Read {
                offset: header.offset,
            },
            Command::Write { range, fua } => Kind::Write { range, fua },
            Command::Status { one, .. } => Kind::Status { one },
            Command::Trim { fua: true, .. } => Kind::TrimThenFlush,
            Command::Flush | Command::Trim { .. } | Command::WriteZeroes { .. } => Kind::Other,
        };
        let key = self.requests.insert(Pending {
            cookie: header.cookie,
            kind,
            buf,
            len: header.len,
            left: 0,
            failed: None,
        });
        match command {
            Command::Read { range } => self.read(key, range, port),
            Command::Status { range, .. } => self.request(key, Op::Status, range, port),
            Command::Write { .. } => self.expect = Expect::Payload { key, filled: 0 },
            Command::Flush => self.request(key, Op::Flush, nothing(), port),
            Command::Trim { range, .. } => self.request(key, Op::Discard, range, port),
            Command::WriteZeroes { range, fua } => {
                self.request(key, Op::WriteZeroes { fua }, range, port)
            }
            Command::Disconnect => {}
        }
        true
    }

    /// Whether a request can be served on this connection, and as what.
    fn check(&self, header: &RequestHeader, port: &Port<'_>) -> Result<Command, Rejected> {
        match wire::check(header, &port.geometry())? {
            Command::Status { .. } if !self.replies.status => Err(Rejected {
                errno: wire::errno::EINVAL,
                payload: 0,
            }),
            command => Ok(command),
        }
    }

    fn read(&mut self, key: usize, range: LbaRange, port: &mut Port<'_>) {
        let part = Sectors::new(u64::from(READ_PART_BYTES / SECTOR_SIZE));
        let mut start = range.start;
        while start < range.end {
            let end = start.add(part).min(range.end);
            self.request_part(key, Op::Read, LbaRange { start, end }, range.start, port);
            start = end;
        }
    }

    fn request(&mut self, key: usize, op: Op, range: LbaRange, port: &mut Port<'_>) {
        self.request_part(key, op, range, range.start, port);
    }

    /// Makes a request of `range`, whose data are as far behind the buffer's start as it is behind `base`.
    fn request_part(
        &mut self,
        key: usize,
        op: Op,
        range: LbaRange,
        base: Lba,
        port: &mut Port<'_>,
    ) {
        let pending = &mut self.requests[key];
        pending.left += 1;
        let buffer = match (&pending.buf, op) {
            (Some(buf), Op::Read | Op::Write { .. }) => {
                let bytes = |sectors: u64| {
                    u32::try_from(sectors * u64::from(SECTOR_SIZE)).expect("within the buffer")
                };
                let at = bytes(range.start.get() - base.get());
                let len = bytes(range.len().get());
                assert!(at + len <= pending.len, "a part is within the buffer");
                // SAFETY: the buffer stays in `requests` until the last `request_done` and then goes back to the
                // pool or with the reply; nobody touches it before.
                unsafe { Buffer::user(buf.ptr_at(at as usize), len) }
            }
            _ => Buffer::NONE,
        };
        let tag = u32::try_from(key).expect("fewer than REQUESTS_MAX");
        port.request(op, range, buffer, tag);
    }

    /// `n` more bytes of a write's payload are in its buffer.
    fn payload_came(&mut self, key: usize, filled: u32, n: usize, port: &mut Port<'_>) {
        let pending = &self.requests[key];
        let filled = filled + u32::try_from(n).expect("no more than was missing");
        if filled < pending.len {
            self.expect = Expect::Payload { key, filled };
            return;
        }
        self.expect = Expect::Header;
        if let Kind::Write { range, fua } = pending.kind {
            self.request(key, Op::Write { fua }, range, port);
        }
    }

    /// Receives more, if there is nothing to wait for first.
    fn receive(&mut self, port: &mut Port<'_>) {
        if self.receiving != Receiving::Idle || self.stalled || self.ending_since.is_some() {
            return;
        }
        let (address, len) = match self.expect {
            Expect::Payload { key, filled } if self.input_start == self.input_end => {
                let pending = &self.requests[key];
                let Some(buf) = &pending.buf else { return };
                self.receiving = Receiving::Payload;
                (buf.ptr_at(filled as usize), pending.len - filled)
            }
            _ => {
                self.make_room();
                self.receiving = Receiving::Input;
                let room = u32::try_from(INPUT_BYTES - self.input_end).unwrap_or(u32::MAX);
                (self.input.ptr_at(self.input_end), room)
            }
        };
        let entry =
            opcode::Recv::new(types::Fd(self.fd.as_raw_fd()), address.as_ptr(), len).build();
        // SAFETY: the memory is the input's or a buffer's in `requests`; neither is given away,
        // moved or touched while `receiving` is not idle; the socket is ours until the drop.
        unsafe { port.push(entry, TAG_RECEIVE) };
    }

    /// Moves what was not parsed to the front of the input: less than a header.
    fn make_room(&mut self) {
        if self.input_start == 0 {
            return;
        }
        let left = self.input_end - self.input_start;
        let mut rest = [0; REQUEST_LEN];
        let rest = &mut rest[..left];
        rest.copy_from_slice(&self.input.bytes(self.input_end)[self.input_start..]);
        self.input.copy_in(0, rest);
        (self.input_start, self.input_end) = (0, left);
    }

    fn received(&mut self, result: i32, port: &mut Port<'_>) {
        let target = mem::replace(&mut self.receiving, Receiving::Idle);
        let n = match usize::try_from(result) {
            // The client has gone; what it asked for is done nevertheless, but for what a suspension holds.
            Ok(0) => return self.end(port.now_ms()),
            Ok(n) => n,
            Err(_) if result == -libc::EINTR || result == -libc::EAGAIN => 0,
            Err(_) => {
                tracing::debug!(error = %io::Error::from_raw_os_error(-result), "an NBD socket fails");
                return self.fail(port.now_ms());
            }
        };
        if self.ending_since.is_some() {
            return self.end(port.now_ms());
        }
        match (target, self.expect) {
            (Receiving::Payload, Expect::Payload { key, filled }) => {
                self.payload_came(key, filled, n, port)
            }
            _ => self.input_end += n,
        }
        self.parse(port);
    }

    /// Says an error; in a chunk, to what is answered in chunks where they were agreed on.
    fn reply_error(&mut self, cookie: u64, chunked: bool, errno: u32) {
        let head = if chunked && self.replies.structured {
            ReplyHead::error(cookie, errno)
        } else {
            ReplyHead::simple(cookie, errno)
        };
        self.outbox.push(Reply { head, data: None });
    }

    /// Sends the replies that have gathered, if none are being sent.
    fn send(&mut self, port: &mut Port<'_>) {
        if self.dead {
            for reply in self.outbox.drain(..) {
                if let Some((buf, _)) = reply.data {
                    self.pool.give(buf);
                }
            }
        }
        if self.outgoing.under_way || self.outbox.is_empty() {
            return;
        }
        mem::swap(&mut self.outbox, &mut self.outgoing.replies);
        self.outgoing.prepare();
        self.push_send(port);
    }

    fn push_send(&mut self, port: &mut Port<'_>) {
        let message = self.outgoing.message();
        // At the end what the client takes is to be seen, not only that it has taken all.
        let whole = match self.ending_since {
            None => libc::MSG_WAITALL,
            Some(_) => 0,
        };
        let flags = (libc::MSG_NOSIGNAL | whole).cast_unsigned();
        self.sent_ms = port.now_ms();
        let entry = opcode::SendMsg::new(types::Fd(self.fd.as_raw_fd()), message)
            .flags(flags)
            .build();
        self.outgoing.under_way = true;
        // SAFETY: the message, its parts and what they lead to are owned by `outgoing` and not
        // touched while `under_way`.
        unsafe { port.push(entry, TAG_SEND) };
    }

    fn sent(&mut self, result: i32, port: &mut Port<'_>) {
        self.outgoing.under_way = false;
        let n = match usize::try_from(result) {
            Ok(n) => n,
            Err(_) if result == -libc::EINTR || result == -libc::EAGAIN => 0,
            Err(_) => {
                self.fail(port.now_ms());
                0
            }
        };
        if !self.dead && !self.outgoing.advance(n) {
            self.push_send(port);
            return;
        }
        for reply in self.outgoing.replies.drain(..) {
            if let Some((buf, _)) = reply.data {
                self.pool.give(buf);
            }
        }
    }
}

impl Outgoing {
    /// Lays out the replies as parts of a message: heads that follow each other are one part.
    fn prepare(&mut self) {
        self.heads.clear();
        for reply in &self.replies {
            self.heads.extend_from_slice(reply.head.bytes());
        }
        self.parts.clear();
        self.first = 0;
        let heads = self.heads.as_mut_ptr();
        let (mut start, mut end) = (0, 0);
        for reply in &self.replies {
            end += reply.head.bytes().len();
            if let Some((buf, len)) = &reply.data {
                // SAFETY: `start` is inside of `heads`.
                let iov_base = unsafe { heads.add(start) }.cast();
                self.parts.push(libc::iovec {
                    iov_base,
                    iov_len: end - start,
                });
                self.parts.push(libc::iovec {
                    iov_base: buf.ptr().as_ptr().cast(),
                    iov_len: *len as usize,
                });
                start = end;
            }
        }
        if end > start {
            // SAFETY: as above.
            let iov_base = unsafe { heads.add(start) }.cast();
            self.parts.push(libc::iovec {
                iov_base,
                iov_len: end - start,
            });
        }
    }

    /// The message for what is not sent yet.
    fn message(&mut self) -> *const libc::msghdr {
        let rest = &mut self.parts[self.first..];
        self.message.msg_iov = rest.as_mut_ptr();
        self.message.msg_iovlen = rest.len();
        &raw const *self.message
    }

    /// `n` more bytes are sent; whether that was all.
    fn advance(&mut self, mut n: usize) -> bool {
        while let Some(part) = self.parts.get_mut(self.first) {
            if n < part.iov_len {
                // SAFETY: still inside of the part.
                part.iov_base = unsafe { part.iov_base.cast::<u8>().add(n) }.cast();
                part.iov_len -= n;
                return false;
            }
            n -= part.iov_len;
            self.first += 1;
        }
        true
    }
}

impl FrontEnd for Connection {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn start(&mut self, port: &mut Port<'_>) {
        self.receive(port);
    }

    fn op_done(&mut self, tag: u32, result: i32, _flags: u32, port: &mut Port<'_>) {
        if tag == TAG_RECEIVE {
            self.received(result, port);
        } else {
            self.sent(result, port);
        }
    }

    fn status_told(&mut self, tag: u32, runs: &[StatusRun]) {
        let pending = &mut self.requests[tag as usize];
        let Kind::Status { one } = pending.kind else {
            panic!("a status for another request");
        };
        let bytes = wire::encode_status(if one { &runs[..1] } else { runs });
        pending.len = u32::try_from(bytes.len()).expect("at most STATUS_BYTES_MAX");
        if let Some(buf) = &mut pending.buf {
            buf.copy_in(0, &bytes);
        }
    }

    fn give_away(&mut self, tag: u32) -> Option<Bytes> {
        let pending = &mut self.requests[tag as usize];
        let buf = pending.buf.take()?;
        Some(self.pool.lend(buf, pending.len as usize))
    }

    fn request_done(&mut self, tag: u32, result: Result<(), IoError>, port: &mut Port<'_>) {
        let key = tag as usize;
        let pending = &mut self.requests[key];
        pending.left -= 1;
        pending.failed = pending.failed.or(result.err());
        if pending.left > 0 {
            return;
        }
        let result = pending.failed.map_or(Ok(()), Err);
        if pending.kind == Kind::TrimThenFlush && result.is_ok() {
            pending.kind = Kind::Other;
            self.request(key, Op::Flush, nothing(), port);
            return;
        }
        let pending = self.requests.remove(key);
        match (result, pending.kind, pending.buf) {
            (Ok(()), Kind::Status { .. }, Some(buf)) => self.outbox.push(Reply {
                head: ReplyHead::status(pending.cookie, pending.len),
                data: Some((buf, pending.len)),
            }),
            (Ok(()), Kind::Read { offset }, Some(buf)) => {
                let head = if self.replies.structured {
                    ReplyHead::data(pending.cookie, offset, pending.len)
                } else {
                    ReplyHead::simple(pending.cookie, 0)
                };
                self.outbox.push(Reply {
                    head,
                    data: Some((buf, pending.len)),
                });
            }
            (result, kind, buf) => {
                if let Some(buf) = buf {
                    self.pool.give(buf);
                }
                match result {
                    Ok(()) => self.outbox.push(Reply {
                        head: ReplyHead::simple(pending.cookie, 0),
                        data: None,
                    }),
                    Err(error) => {
                        let chunked = matches!(kind, Kind::Read { .. } | Kind::Status { .. });
                        self.reply_error(pending.cookie, chunked, wire::errno_of(error));
                    }
                }
            }
        }
    }

    fn end_batch(&mut self, port: &mut Port<'_>) {
        self.send(port);
        if self.stalled {
            self.parse(port);
            // Refusals are replies that no request will bring along.
            self.send(port);
        }
    }

    fn wants_tick(&self) -> bool {
        self.ending_since.is_some() || self.waits_for_others()
    }

    fn tick(&mut self, port: &mut Port<'_>) {
        let waits = self.outgoing.under_way || !self.outbox.is_empty();
        if let Some(since) = self.ending_since
            && waits
            && !self.dead
            && port.now_ms().saturating_sub(since.max(self.sent_ms)) > END_GRACE_MS
        {
            self.fail(port.now_ms());
        }
        if self.waits_for_others() {
            self.parse(port);
            self.send(port);
        }
    }

    fn stop(&mut self, port: &mut Port<'_>) {
        self.end(port.now_ms());
        // Ends the receive under way; that the peer has gone already is no matter.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Read);
    }

    fn is_gone(&self) -> bool {
        // At a bound nothing is received that would tell.
        self.ending_since.is_some() || self.stalled && is_closed(&self.fd)
    }

    fn is_finished(&self) -> bool {
        self.ending_since.is_some()
            && self.requests.is_empty()
            && self.outbox.is_empty()
            && !self.outgoing.under_way
            && self.receiving == Receiving::Idle
    }
}

/// Whether the other end sends no more. Does not wait.
fn is_closed(socket: &OwnedFd) -> bool {
    let mut end = [PollFd::new(socket, PollFlags::RDHUP)];
    let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    poll(&mut end, Some(&Timespec::default())).is_ok() && end[0].revents().intersects(closed)
}

/// The range of a flush.
fn nothing() -> LbaRange {
    LbaRange {
        start: Lba::ZERO,
        end: Lba::ZERO,
    }
}

const _: () = assert!(wire::STATUS_BYTES_MAX <= crate::reactor::memory::POOLED_BYTES_MAX);
const _: () = assert!(wire::PAYLOAD_BYTES_MAX as usize <= crate::reactor::memory::POOLED_BYTES_MAX);
const _: () = assert!(wire::PAYLOAD_BYTES_MAX.is_multiple_of(SECTOR_SIZE));
