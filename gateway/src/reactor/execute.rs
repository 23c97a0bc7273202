//! Actions become ring operations, or are done at once where they are a matter of memory only.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use io_uring::{opcode, types};
use quarry_cache::Geometry as CacheGeometry;
use quarry_volume::{Action, Event, IoId, Op, RequestId};

use super::core::{Core, index_of};
use super::frontend::BufferKind;
use super::memory::{ALIGNMENT, AlignedBuf, POOLED_BYTES_MAX, Pool};
use super::op::{CacheOp, Code, Hold, Move};
use super::ring::File;
use super::runs::Runs;
use super::token::Token;
use crate::clock::now_ns;
use crate::latency::Timed;
use crate::trace::Step;

/// Most bytes of aligned copies of fills under way; fills past it wait their turn.
pub(super) const FILL_BYTES_MAX: usize = 32 << 20;

/// Buffers of encrypted writes kept for reuse, in bytes.
pub(super) const SEALED_KEPT_BYTES: usize = 2 << 20;

/// Aligned copies kept for reuse, in bytes.
const FILL_KEPT_BYTES: usize = 2 << 20;

/// A fill that waits for memory.
struct WaitingFill {
    volume: u32,
    io: IoId,
    offset: u64,
    data: Bytes,
}

/// The memory of fills, and those that wait for it, in order.
pub(super) struct WaitingFills {
    pool: Pool,
    waiting: VecDeque<WaitingFill>,
}

impl WaitingFills {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            pool: Pool::new(bytes_max, FILL_KEPT_BYTES),
            waiting: VecDeque::new(),
        }
    }
}

/// What an operation does with a part of a request's buffer.
enum Transfer {
    FromCache { offset: u64 },
    ToCache { offset: u64 },
    Zeroes,
    Copy(Bytes),
}

impl Core {
    /// Carries out an action of the volume at `volume`, or starts to.
    pub(super) fn execute(&mut self, volume: u32, action: Action) {
        match action {
            Action::CacheRead {
                io,
                request,
                buffer_offset,
                offset,
                len,
            } => {
                self.transfer(
                    volume,
                    io,
                    request,
                    buffer_offset,
                    len,
                    Transfer::FromCache { offset },
                );
            }
            Action::CacheWrite {
                io,
                request,
                buffer_offset,
                offset,
                len,
            } => {
                let slot = &mut self.volumes[volume as usize];
                let in_flight = &mut slot.inbox.requests[request_key(request)];
                if in_flight.since_ns != self.batch_ns {
                    slot.trails.placed_late(in_flight, self.batch_ns);
                }
                self.transfer(
                    volume,
                    io,
                    request,
                    buffer_offset,
                    len,
                    Transfer::ToCache { offset },
                );
            }
            Action::ZeroFill {
                io,
                request,
                buffer_offset,
                len,
            } => {
                self.transfer(volume, io, request, buffer_offset, len, Transfer::Zeroes);
            }
            Action::CopyToRequest {
                io,
                request,
                buffer_offset,
                data,
            } => {
                let len = u32::try_from(data.len()).expect("a copy is not longer than its request");
                self.transfer(
                    volume,
                    io,
                    request,
                    buffer_offset,
                    len,
                    Transfer::Copy(data),
                );
            }
            Action::WritePage {
                io,
                offset,
                page,
                durable,
            } => {
                // A header that is durable begins the segment's writes (record pages are durable too, and no header);
                // another only tells that they are in the store, and the segment is read on.
                if durable {
                    self.forget_pages(|geometry| geometry.segment_of_header(offset));
                    self.kept_writes.begin(offset);
                }
                let mut copy = self
                    .pages
                    .take(page.len())
                    .expect("the pool of pages has no cap");
                copy.copy_in(0, &page[..]);
                let address = copy.ptr().as_ptr() as u64;
                let code = Code::Write { durable };
                let len = u32::try_from(page.len()).unwrap_or(u32::MAX);
                let page = Move::new(code, File::Cache, offset, address, len);
                self.start(volume, io, None, page.holding(Hold::Page(copy)));
            }
            Action::Journal {
                segment,
                generation,
                record,
            } => {
                let machine = &mut self.volumes[volume as usize].machine;
                machine.journal(segment, generation, &record);
            }
            Action::Sync { io } => {
                let slot = &mut self.volumes[volume as usize];
                slot.ops += 1;
                slot.trails.sync_asked(self.batch_ns);
                self.syncs.ask((volume, io));
                self.start_sync();
            }
            Action::FillWrite { io, offset, data } => {
                self.volumes[volume as usize].ops += 1;
                self.fills.waiting.push_back(WaitingFill {
                    volume,
                    io,
                    offset,
                    data,
                });
                self.start_fills();
            }
            Action::Status { request, runs } => {
                self.status_told(volume, request_key(request), &runs);
            }
            Action::Missed { request } => {
                let slot = &mut self.volumes[volume as usize];
                let in_flight = &mut slot.inbox.requests[request_key(request)];
                in_flight.timed = Some(Timed::ReadMiss);
                slot.trails.missed(in_flight);
            }
            Action::Waited { request, io } => {
                let slot = &mut self.volumes[volume as usize];
                let in_flight = &mut slot.inbox.requests[request_key(request)];
                slot.trails.waited(in_flight, io);
            }
            Action::WritesWait(waits) => {
                let trails = &mut self.volumes[volume as usize].trails;
                trails.writes_wait(waits, self.batch_ns);
            }
            Action::Complete { request, result } => {
                self.request_done(volume, request_key(request), result)
            }
            action @ Action::FetchDirect { .. } => self.ask_direct(volume, action),
            // Of one frame alone: a set of futures polls again only those that were woken, and here nothing wakes.
            Action::Fetch {
                ref fetch,
                foreground: true,
                ..
            } if fetch.frames.len() == 1 && self.may_go() => self.go(volume, action),
            action @ (Action::Fetch { .. }
            | Action::LoadNodes { .. }
            | Action::Upload(_)
            | Action::Checkpoint(_)
            | Action::Folded(_)
            | Action::Drained { .. }
            | Action::Warmed { .. }
            | Action::Report(_)) => self.volumes[volume as usize].backend.submit(action),
        }
    }

    /// Moves bytes into or out of a request's buffer.
    fn transfer(
        &mut self,
        volume: u32,
        io: IoId,
        request: RequestId,
        at: u32,
        len: u32,
        what: Transfer,
    ) {
        let request = request_key(request);
        let buffer = self.volumes[volume as usize].inbox.requests[request].buffer;
        assert!(
            at <= buffer.len() && len <= buffer.len() - at,
            "a volume asks for bytes outside of a request's buffer"
        );
        let moving = match buffer.0 {
            _ if len == 0 => None,
            BufferKind::None => unreachable!("its length is 0"),
            BufferKind::User { ptr, .. } => {
                // SAFETY: `at` is inside the buffer by the assertion, and whoever made the buffer
                // vouched for its memory (`Buffer::user`).
                let ptr = unsafe { ptr.add(at as usize) };
                // SAFETY: so are `len` bytes from `at` on.
                unsafe { self.by_memory(volume, request, ptr, len, what) }
            }
            BufferKind::Registered {
                buf_index,
                char_fd,
                user_copy_base,
                ..
            } => Some(match what {
                Transfer::Copy(data) => {
                    let offset = user_copy_base + u64::from(at);
                    self.copy_to_pages(volume, char_fd, offset, data)
                }
                what => self.by_pages(volume, buf_index, at, len, &what),
            }),
        };
        match moving {
            Some(moving) => {
                self.volumes[volume as usize].inbox.requests[request].ops += 1;
                self.start(volume, io, Some(request), moving);
            }
            None => self.feed(volume, Event::IoDone { io, result: Ok(()) }),
        }
    }

    /// What the kernel is to move for a buffer in memory, of which these are `len` bytes; none if it is done.
    ///
    /// # Safety
    /// They are inside the buffer of this request.
    unsafe fn by_memory(
        &mut self,
        volume: u32,
        request: usize,
        ptr: NonNull<u8>,
        len: u32,
        what: Transfer,
    ) -> Option<Move> {
        let slot = &mut self.volumes[volume as usize];
        slot.machine.copied(len.into());
        let address = ptr.as_ptr() as u64;
        match what {
            Transfer::FromCache { offset } => {
                let file = match self.page_cache {
                    Some(_) => File::CachePages,
                    None => File::Cache,
                };
                Some(Move::new(Code::Read, file, offset, address, len))
            }
            Transfer::ToCache { offset } => {
                // One in several pieces may have a piece in the store, and its segment begun anew, when the last is
                // there and it is answered; and one with FUA is answered when its chunk is made, or will be at once.
                let in_flight = &mut slot.inbox.requests[request];
                if in_flight.op == (Op::Write { fua: false })
                    && len == in_flight.buffer.len()
                    && self.kept_writes.wants(len)
                {
                    in_flight.placed = Some(offset);
                }
                // SAFETY: they are the buffer's, and its owner does not change them before the request is completed.
                let plain = unsafe { std::slice::from_raw_parts(ptr.as_ptr(), len as usize) };
                let code = Code::Write { durable: false };
                Some(match self.sealed(offset, plain) {
                    Some(sealed) => {
                        let address = sealed.ptr().as_ptr() as u64;
                        Move::new(code, File::Cache, offset, address, len)
                            .holding(Hold::Sealed(sealed))
                    }
                    None => Move::new(code, File::Cache, offset, address, len),
                })
            }
            Transfer::Zeroes => {
                // SAFETY: they are the buffer's.
                unsafe { ptr.write_bytes(0, len as usize) };
                None
            }
            Transfer::Copy(data) => {
                let in_flight = &mut slot.inbox.requests[request];
                let since_ns = in_flight.trail.as_ref().map(|_| now_ns());
                // SAFETY: they are the buffer's; `data` holds `len` bytes and is memory of its own.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), ptr.as_ptr(), data.len()) };
                if let Some(since_ns) = since_ns {
                    let trails = &mut slot.trails;
                    trails.part_done(in_flight, Step::Copy, since_ns, now_ns(), len);
                }
                None
            }
        }
    }

    /// What the kernel is to move for `len` bytes from `at` on of a buffer of registered pages, which no byte of ours is for.
    fn by_pages(
        &mut self,
        volume: u32,
        buf_index: u16,
        at: u32,
        len: u32,
        what: &Transfer,
    ) -> Move {
        let (code, file, offset) = match what {
            // The kernel would put on the device what nobody has encrypted.
            Transfer::FromCache { .. } | Transfer::ToCache { .. } if self.cipher.is_some() => {
                panic!("a request with registered pages, and an encrypted cache")
            }
            Transfer::FromCache { offset } => (Code::ReadFixed { buf_index }, File::Cache, *offset),
            Transfer::ToCache { offset } => (Code::WriteFixed { buf_index }, File::Cache, *offset),
            Transfer::Zeroes => {
                let zeroes = File::Fd(self.zeroes.as_raw_fd());
                (Code::ReadFixed { buf_index }, zeroes, 0)
            }
            Transfer::Copy(_) => unreachable!("they are not written to so"),
        };
        if file == File::Cache {
            let machine = &mut self.volumes[volume as usize].machine;
            machine.moved_in_place(len.into());
        }
        Move::new(code, file, offset, at.into(), len)
    }

    /// What the kernel is to move for data of ours that go into a request's pages, by `offset` of its device's file.
    fn copy_to_pages(&mut self, volume: u32, char_fd: RawFd, offset: u64, data: Bytes) -> Move {
        let len = u32::try_from(data.len()).expect("a copy is not longer than its request");
        let machine = &mut self.volumes[volume as usize].machine;
        machine.copied(len.into());
        let (code, address) = (Code::Write { durable: false }, data.as_ptr() as u64);
        Move::new(code, File::Fd(char_fd), offset, address, len).holding(Hold::Bytes(data))
    }

    /// Begins to move, for the volume's I/O of this name.
    pub(super) fn start(&mut self, volume: u32, io: IoId, request: Option<usize>, moving: Move) {
        self.volumes[volume as usize].ops += 1;
        let op = CacheOp {
            volume,
            io,
            request,
            moving,
            done: 0,
            tries: 0,
            since_ns: self.batch_ns,
        };
        let may_go_along = Runs::may_take(&op);
        let is_durable = matches!(op.moving.code, Code::Write { durable: true });
        let index = index_of(self.ops.insert(op));
        if is_durable {
            self.syncs.begin_write(index);
        }
        if may_go_along {
            self.join_run(index);
        } else {
            self.submit_op(index);
        }
    }

    /// Pushes the entry for what is left of an operation.
    pub(super) fn submit_op(&mut self, index: u32) {
        let entry = self.ops[index as usize]
            .entry(&self.ring)
            .user_data(Token::Op { index }.pack());
        // SAFETY: the entry points into memory that the operation holds until its completion is
        // taken (`Hold`), or into a request's buffer, which is not given back while the request's
        // count of operations is not zero; its files live as long as the reactor or, the ublk
        // character device, as its request, or are held like the memory (a socket).
        unsafe { self.ring.push(entry) };
    }

    /// The segment that begins where `begin` says, if it says so, is to be written anew: what the kernel keeps of it in its
    /// page cache is of no use any more, and would make it wait at each write there. A hint, whose outcome nobody asks for.
    fn forget_pages(&mut self, begin: impl FnOnce(&CacheGeometry) -> Option<u64>) {
        let Some(pages) = &self.page_cache else {
            return;
        };
        let Some(begin) = begin(&pages.geometry) else {
            return;
        };
        let (len, advice) = (pages.geometry.segment_size, libc::POSIX_FADV_DONTNEED);
        let entry = self.ring.entry_for(File::CachePages, |fd| {
            let forget = opcode::Fadvise::new(fd, len.into(), advice);
            forget.offset(begin).build()
        });
        // SAFETY: advice points to nothing, and the cache device is open as long as the reactor.
        unsafe { self.ring.push(entry.user_data(Token::Advice.pack())) };
    }

    fn start_sync(&mut self) {
        if !self.syncs.start() {
            return;
        }
        let flags = types::FsyncFlags::DATASYNC;
        let entry = self.ring.entry_for(File::Cache, |fd| {
            opcode::Fsync::new(fd).flags(flags).build()
        });
        // SAFETY: a sync points to nothing, and the cache device is open as long as the reactor.
        unsafe { self.ring.push(entry.user_data(Token::Sync.pack())) };
    }

    /// The sync under way has ended. It is never repeated, whatever it says.
    pub(super) fn synced(&mut self, result: i32) {
        self.syncs.end(result);
        self.answer_sync();
    }

    /// Answers those for whom a sync was that has ended, unless it is to wait for others.
    pub(super) fn answer_sync(&mut self) {
        let doorbell = Arc::clone(&self.doorbell);
        let Some((waiters, result)) = self.syncs.answer(move || doorbell.ring()) else {
            return;
        };
        for (volume, io) in waiters {
            let slot = &mut self.volumes[volume as usize];
            slot.trails.synced(self.batch_ns);
            self.io_done(volume, io, result);
        }
        self.start_sync();
    }

    /// Answers those whose durable writes have ended, but for those that are to wait for others. Once a batch: what ended
    /// together need not wait for each other.
    pub(super) fn answer_writes(&mut self) {
        loop {
            let doorbell = &self.doorbell;
            let answer = self.syncs.answer_write(|| {
                let doorbell = Arc::clone(doorbell);
                move || doorbell.ring()
            });
            let Some(((volume, io), result)) = answer else {
                return;
            };
            self.io_done(volume, io, result);
        }
    }

    /// What is to lie at `offset` of the cache device in place of `plain`, if that is encrypted: a copy, for whoever
    /// writes may read what it writes.
    fn sealed(&mut self, offset: u64, plain: &[u8]) -> Option<AlignedBuf> {
        let cipher = self.cipher.as_ref()?;
        let buffer = self.sealed.take(plain.len());
        let mut buffer = buffer.expect("the pool of encrypted writes has no cap");
        buffer.copy_in(0, plain);
        cipher.encrypt(offset, buffer.bytes_mut(plain.len()));
        Some(buffer)
    }

    /// Decrypts what a request read from the cache device, where it is.
    pub(super) fn decrypt(&self, op: &CacheOp) {
        let read = &op.moving;
        let (Some(cipher), Code::Read, File::Cache | File::CachePages) =
            (&self.cipher, read.code, read.file)
        else {
            return;
        };
        let address = read.address as *mut u8;
        // SAFETY: it lies in its request's buffer, by `by_memory`, which is given back after this; and the kernel is
        // done with it.
        let data = unsafe { std::slice::from_raw_parts_mut(address, read.len as usize) };
        cipher.decrypt(read.offset, data);
    }

    /// Takes back the memory of an operation that is done.
    pub(super) fn release(&mut self, hold: Hold) {
        match hold {
            Hold::Nothing | Hold::Bytes(_) | Hold::Body(_) => {}
            Hold::Page(page) => self.pages.give(page),
            Hold::Sealed(sealed) => self.sealed.give(sealed),
            Hold::Fill(copy) => {
                self.fills.pool.give(copy);
                self.start_fills();
            }
        }
    }

    /// Starts the fills that there is memory for.
    fn start_fills(&mut self) {
        while let Some(fill) = self.fills.waiting.front() {
            let len = fill.data.len();
            let aligned = (fill.data.as_ptr() as usize).is_multiple_of(ALIGNMENT);
            let copy = if len > POOLED_BYTES_MAX || (aligned && self.cipher.is_none()) {
                None
            } else {
                match self.fills.pool.take(len) {
                    Some(mut copy) => {
                        copy.copy_in(0, &fill.data);
                        if let Some(cipher) = &self.cipher {
                            cipher.encrypt(fill.offset, copy.bytes_mut(len));
                        }
                        Some(copy)
                    }
                    None => return,
                }
            };
            let Some(fill) = self.fills.waiting.pop_front() else {
                return;
            };
            let offset = fill.offset;
            self.forget_pages(|geometry| geometry.begins_segment(offset).then_some(offset));
            // Counted when it came, and again by `start`.
            self.volumes[fill.volume as usize].ops -= 1;
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            if len == 0 {
                self.feed(
                    fill.volume,
                    Event::IoDone {
                        io: fill.io,
                        result: Ok(()),
                    },
                );
                continue;
            }
            assert!(
                copy.is_some() || self.cipher.is_none(),
                "a fill longer than any chunk's data"
            );
            let (address, hold) = match copy {
                Some(copy) => (copy.ptr().as_ptr() as u64, Hold::Fill(copy)),
                None => (fill.data.as_ptr() as u64, Hold::Bytes(fill.data)),
            };
            let code = Code::Write { durable: false };
            let moving = Move::new(code, File::Cache, fill.offset, address, len).holding(hold);
            self.start(fill.volume, fill.io, None, moving);
        }
    }
}

pub(super) fn request_key(request: RequestId) -> usize {
    usize::try_from(request.0).expect("a request id that this reactor gave out")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;
    use std::sync::mpsc;
    use std::time::Duration;

    use quarry_cache::SyncFailure;
    use quarry_objfmt::{ChunkId, ChunkSeq, Epoch, Lba, LbaRange, Sectors, VolumeId};
    use quarry_volume::{Fetch, IoError};

    use super::super::memory::AlignedBuf;
    use super::super::testing::{geometry, reactor};
    use super::super::{
        BackendSink, Buffer, FrontEnd, Geometry, Machine, Message, Port, ReactorHandle,
    };
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A machine that says what it is told to, and tells what it hears.
    struct Script {
        on_drain: Vec<Action>,
        on_request: fn(RequestId) -> Vec<Action>,
        heard: mpsc::Sender<Event>,
    }

    impl Machine for Script {
        fn apply(&mut self, event: Event, out: &mut Vec<Action>) {
            match event {
                Event::Drain { .. } => out.append(&mut self.on_drain),
                Event::Request(request) => out.extend((self.on_request)(request.id)),
                Event::Tick { .. } => {}
                event => {
                    // Nobody may listen any more.
                    let _ = self.heard.send(event);
                }
            }
        }

        fn geometry(&self) -> Geometry {
            geometry(1 << 20, 512)
        }
    }

    struct Sink(mpsc::Sender<Action>);

    impl BackendSink for Sink {
        fn submit(&self, action: Action) {
            self.0.send(action).unwrap();
        }
    }

    fn add(
        handle: &ReactorHandle,
        on_drain: Vec<Action>,
        on_request: fn(RequestId) -> Vec<Action>,
    ) -> (
        super::super::VolumeKey,
        mpsc::Receiver<Event>,
        mpsc::Receiver<Action>,
    ) {
        let (heard, events) = mpsc::channel();
        let (asked, actions) = mpsc::channel();
        let key = handle.new_key();
        let machine = Box::new(Script {
            on_drain,
            on_request,
            heard,
        });
        handle
            .send_blocking(Message::AddVolume {
                key,
                machine,
                backend: Box::new(Sink(asked)),
            })
            .unwrap();
        (key, events, actions)
    }

    fn drain(handle: &ReactorHandle, key: super::super::VolumeKey) {
        let event = Event::Drain {
            io: IoId(0),
            checkpoint: false,
        };
        handle
            .send_blocking(Message::VolumeEvent { key, event })
            .unwrap();
    }

    #[test]
    fn pages_fills_and_syncs_reach_the_cache_file_and_answer_once_each() {
        let (reactor, cache) = reactor(64 << 20);
        let mut actions = vec![
            Action::WritePage {
                io: IoId(1),
                offset: 8192,
                page: Box::new([1; 4096]),
                durable: true,
            },
            Action::WritePage {
                io: IoId(2),
                offset: 12288,
                page: Box::new([2; 4096]),
                durable: false,
            },
            Action::Sync { io: IoId(3) },
            Action::FillWrite {
                io: IoId(4),
                offset: 16384,
                data: Bytes::new(),
            },
        ];
        // Twice as much as there is memory for at once, from odd addresses.
        let fills = 2 * FILL_BYTES_MAX as u64 / (1 << 20);
        let data = Bytes::from(vec![7; (1 << 20) + 1]).slice(1..);
        for n in 0..fills {
            actions.push(Action::FillWrite {
                io: IoId(10 + n),
                offset: 1 << 20,
                data: data.clone(),
            });
        }
        let (key, events, _) = add(&reactor.handle(), actions, |_| Vec::new());
        drain(&reactor.handle(), key);
        let mut heard: Vec<u64> = (0..4 + fills)
            .map(|_| match events.recv_timeout(LIMIT).unwrap() {
                Event::IoDone { io, result: Ok(()) } => io.0,
                event => panic!("{event:?}"),
            })
            .collect();
        heard.sort_unstable();
        assert!(heard.into_iter().eq((1..=4).chain(10..10 + fills)));
        let mut page = [0; 4096];
        for (offset, byte) in [(8192, 1), (12288, 2), (1 << 20, 7), ((2 << 20) - 4096, 7)] {
            cache.read_exact_at(&mut page, offset).unwrap();
            assert_eq!(page, [byte; 4096]);
        }
        reactor.shutdown();
    }

    #[test]
    fn store_actions_go_to_the_backend_and_answers_come_back() {
        let (reactor, _cache) = reactor(1 << 20);
        let chunk = ChunkId {
            volume: VolumeId::from_bytes([1; 16]),
            epoch: Epoch::ZERO,
            seq: ChunkSeq::ZERO,
        };
        let fetch = Action::Fetch {
            io: IoId(5),
            fetch: Fetch {
                chunk,
                frames: Vec::new(),
            },
            foreground: true,
        };
        let (key, events, actions) = add(&reactor.handle(), vec![fetch], |_| Vec::new());
        drain(&reactor.handle(), key);
        assert!(matches!(
            actions.recv_timeout(LIMIT).unwrap(),
            Action::Fetch { io: IoId(5), .. }
        ));
        let event = Event::Fetched {
            io: IoId(5),
            frames: Vec::new(),
        };
        reactor
            .handle()
            .send_blocking(Message::VolumeEvent { key, event })
            .unwrap();
        assert!(matches!(
            events.recv_timeout(LIMIT).unwrap(),
            Event::Fetched { io: IoId(5), .. }
        ));
        reactor.shutdown();
        assert!(matches!(events.recv_timeout(LIMIT).unwrap(), Event::Stop));
    }

    /// Its cache device is open for reading alone.
    fn reactor_that_cannot_write() -> super::super::Reactor {
        let cache = std::fs::File::open("/dev/null").unwrap();
        reactor_with(cache, SyncFailure::default())
    }

    fn reactor_with(cache: std::fs::File, sync_failure: SyncFailure) -> super::super::Reactor {
        let config = super::super::ReactorConfig {
            index: 7,
            page_cache: None,
            cache: Arc::new(cache),
            kept_writes: Default::default(),
            sync_failure,
            buffer_entries: 0,
            cipher: None,
        };
        super::super::Reactor::spawn(config).unwrap()
    }

    fn durable_page() -> Action {
        Action::WritePage {
            io: IoId(1),
            offset: 0,
            page: Box::new([1; 4096]),
            durable: true,
        }
    }

    #[test]
    fn cache_write_that_fails_says_its_errno() {
        let reactor = reactor_that_cannot_write();
        let (key, events, _) = add(&reactor.handle(), vec![durable_page()], |_| Vec::new());
        drain(&reactor.handle(), key);
        let event = events.recv_timeout(LIMIT).unwrap();
        assert!(
            matches!(
                event,
                Event::IoDone {
                    io: IoId(1),
                    result: Err(libc::EBADF)
                }
            ),
            "{event:?}"
        );
        reactor.shutdown();
    }

    #[test]
    fn durable_write_keeps_its_volume_until_the_syncs_beside_it_have_ended() {
        let sync_failure = SyncFailure::default();
        let reactor = reactor_with(tempfile::tempfile().unwrap(), sync_failure.clone());
        // Another reactor's.
        let sync = sync_failure.begin();
        let (key, events, _) = add(&reactor.handle(), vec![durable_page()], |_| Vec::new());
        drain(&reactor.handle(), key);
        let (done, gone) = tokio::sync::oneshot::channel();
        let remove = Message::RemoveVolume { key, done };
        reactor.handle().send_blocking(remove).unwrap();
        assert!(matches!(events.recv_timeout(LIMIT).unwrap(), Event::Stop));
        assert!(events.recv_timeout(Duration::from_millis(100)).is_err());
        let _ = sync.end(None);
        assert!(matches!(
            events.recv_timeout(LIMIT).unwrap(),
            Event::IoDone {
                io: IoId(1),
                result: Ok(())
            }
        ));
        assert!(gone.blocking_recv().unwrap().is_some());
        reactor.shutdown();
    }

    /// A machine that waits for time until it was told some.
    struct Patient {
        waits: bool,
        heard: mpsc::Sender<Event>,
    }

    impl Machine for Patient {
        fn apply(&mut self, event: Event, _: &mut Vec<Action>) {
            self.waits = matches!(event, Event::Drain { .. });
            let _ = self.heard.send(event);
        }

        fn geometry(&self) -> Geometry {
            geometry(1 << 20, 512)
        }

        fn wants_tick(&self) -> bool {
            self.waits
        }
    }

    #[test]
    fn reactor_without_anybody_who_waits_for_time_sleeps_until_told_something() {
        let (reactor, _cache) = reactor(1 << 20);
        let handle = reactor.handle();
        let (heard, events) = mpsc::channel();
        let key = handle.new_key();
        handle
            .send_blocking(Message::AddVolume {
                key,
                machine: Box::new(Patient {
                    waits: false,
                    heard,
                }),
                backend: Box::new(Sink(mpsc::channel().0)),
            })
            .unwrap();
        std::thread::sleep(Duration::from_millis(1500));
        // The message, and the tick that found nobody.
        let slept = handle.stats().batches.load(Ordering::Relaxed);
        assert!(slept <= 4, "{slept} batches");
        drain(&handle, key);
        assert!(matches!(
            events.recv_timeout(LIMIT).unwrap(),
            Event::Drain { .. }
        ));
        let Event::Tick { now_ms } = events.recv_timeout(LIMIT).unwrap() else {
            panic!("a tick is due");
        };
        assert!(now_ms >= 1500, "{now_ms}");
        reactor.shutdown();
    }

    /// A machine that panics when it is told anything, and whose end can be seen.
    struct Panics;

    impl Machine for Panics {
        fn apply(&mut self, _: Event, _: &mut Vec<Action>) {
            panic!("as it was to");
        }

        fn geometry(&self) -> Geometry {
            geometry(1 << 20, 512)
        }
    }

    impl Drop for Panics {
        fn drop(&mut self) {
            eprintln!("memory is freed");
        }
    }

    #[test]
    fn panic_on_a_reactor_ends_the_process_before_anything_of_it_is_freed() {
        use std::os::unix::process::ExitStatusExt as _;
        const IS_CHILD: &str = "QUARRY_TEST_REACTOR_PANICS";
        if std::env::var_os(IS_CHILD).is_some() {
            let (reactor, _cache) = reactor(1 << 20);
            let handle = reactor.handle();
            let key = handle.new_key();
            let (machine, backend) = (Box::new(Panics), Box::new(Sink(mpsc::channel().0)));
            let add = Message::AddVolume {
                key,
                machine,
                backend,
            };
            handle.send_blocking(add).unwrap();
            drain(&handle, key);
            std::thread::sleep(LIMIT);
            return;
        }
        let name = std::thread::current().name().unwrap().to_owned();
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([&name, "--exact", "--nocapture"])
            .env(IS_CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stderr);
        assert_eq!(child.status.signal(), Some(libc::SIGABRT), "{said}");
        assert!(
            said.contains("as it was to") && !said.contains("memory is freed"),
            "{said}"
        );
    }

    /// A front end that makes one request, and looks at its buffer afterwards.
    struct OneRequest {
        op: Op,
        buf: AlignedBuf,
        found: mpsc::Sender<(Result<(), IoError>, u8)>,
        done: bool,
    }

    impl FrontEnd for OneRequest {
        fn start(&mut self, port: &mut Port<'_>) {
            // SAFETY: the buffer is ours until our drop, which comes after the request's end.
            let buffer = unsafe { Buffer::user(self.buf.ptr(), 65536) };
            let range = LbaRange::new(Lba::ZERO, Sectors::new(128)).unwrap();
            port.request(self.op, range, buffer, 3);
        }

        fn op_done(&mut self, _: u32, _: i32, _: u32, _: &mut Port<'_>) {}

        fn request_done(&mut self, tag: u32, result: Result<(), IoError>, _: &mut Port<'_>) {
            assert_eq!(tag, 3);
            self.done = true;
            self.found
                .send((result, self.buf.bytes(65536)[65535]))
                .unwrap();
        }

        fn stop(&mut self, _: &mut Port<'_>) {}

        fn is_finished(&self) -> bool {
            self.done
        }
    }

    #[test]
    fn request_completed_before_its_io_keeps_its_buffer_until_the_io_is_done() {
        let (reactor, cache) = reactor(1 << 20);
        cache.write_all_at(&[9; 65536], 0).unwrap();
        let (key, events, _) = add(&reactor.handle(), Vec::new(), |request| {
            vec![
                Action::CacheRead {
                    io: IoId(1),
                    request,
                    buffer_offset: 0,
                    offset: 0,
                    len: 65536,
                },
                Action::Complete {
                    request,
                    result: Err(IoError::Io),
                },
            ]
        });
        let (found, answers) = mpsc::channel();
        let front_end = Box::new(OneRequest {
            op: Op::Read,
            buf: AlignedBuf::zeroed(65536),
            found,
            done: false,
        });
        reactor
            .handle()
            .send_blocking(Message::AddFrontEnd { key, front_end })
            .unwrap();
        assert_eq!(answers.recv_timeout(LIMIT).unwrap(), (Err(IoError::Io), 9));
        assert!(matches!(
            events.recv_timeout(LIMIT).unwrap(),
            Event::IoDone {
                io: IoId(1),
                result: Ok(())
            }
        ));
        reactor.shutdown();
    }

    /// 16 writes of a request, of 4 KiB each, to one place after the other but for a gap behind the fifth.
    fn write_in_16(request: RequestId) -> Vec<Action> {
        let write = |n: u32| Action::CacheWrite {
            io: IoId(n.into()),
            request,
            buffer_offset: n * 4096,
            offset: u64::from(n + u32::from(n >= 5)) * 4096,
            len: 4096,
        };
        let done = Action::Complete {
            request,
            result: Ok(()),
        };
        (0..16).map(write).chain([done]).collect()
    }

    /// Makes that request, and answers how each of its writes ended and how many completions there were.
    fn written_in_16(reactor: &super::super::Reactor) -> (Vec<Result<(), i32>>, u64) {
        let handle = reactor.handle();
        let (key, events, _) = add(&handle, Vec::new(), write_in_16);
        let mut buf = AlignedBuf::zeroed(65536);
        for n in 0..16 {
            buf.copy_in(usize::from(n) * 4096, &[n + 1; 4096]);
        }
        let before = handle.stats().completions.load(Ordering::Relaxed);
        let (found, answers) = mpsc::channel();
        let front_end = Box::new(OneRequest {
            op: Op::Write { fua: false },
            buf,
            found,
            done: false,
        });
        handle
            .send_blocking(Message::AddFrontEnd { key, front_end })
            .unwrap();
        assert_eq!(answers.recv_timeout(LIMIT).unwrap(), (Ok(()), 16));
        let mut ends: Vec<_> = (0..16)
            .map(|_| match events.recv_timeout(LIMIT).unwrap() {
                Event::IoDone { io, result } => (io.0, result),
                event => panic!("{event:?}"),
            })
            .collect();
        ends.sort_unstable();
        assert!(ends.iter().map(|(io, _)| *io).eq(0..16));
        let completions = handle.stats().completions.load(Ordering::Relaxed) - before;
        (
            ends.into_iter().map(|(_, result)| result).collect(),
            completions,
        )
    }

    #[test]
    fn small_writes_that_follow_each_other_go_to_the_device_together() {
        let (reactor, cache) = reactor(1 << 20);
        let (ends, completions) = written_in_16(&reactor);
        assert_eq!(ends, [Ok(()); 16]);
        let mut page = [0; 4096];
        for n in 0..16_u8 {
            let place = u64::from(n) + u64::from(n >= 5);
            cache.read_exact_at(&mut page, place * 4096).unwrap();
            assert_eq!(page, [n + 1; 4096], "write {n}");
        }
        cache.read_exact_at(&mut page, 5 * 4096).unwrap();
        assert_eq!(page, [0; 4096], "the gap");
        // Of 5, 8 and 3 writes; one or two more wake the reactor.
        assert!((3..=6).contains(&completions), "{completions}");
        reactor.shutdown();
    }

    #[test]
    fn writes_that_fail_together_each_have_their_own_end() {
        let reactor = reactor_that_cannot_write();
        let (ends, completions) = written_in_16(&reactor);
        assert_eq!(ends, [Err(libc::EBADF); 16]);
        assert!(completions >= 16 + 3, "{completions}");
        reactor.shutdown();
    }
}
