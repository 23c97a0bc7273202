//! Actions become ring operations, or are done at once where they are a matter of memory only.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;

use bytes::Bytes;
use quarry_volume::{Action, Event, IoId, RequestId};

use super::core::{Core, index_of};
use super::frontend::BufferKind;
use super::memory::{ALIGNMENT, POOLED_BYTES_MAX, Pool};
use super::op::{CacheOp, Code, Hold};
use super::ring::File;
use super::token::Token;

/// Most bytes of aligned copies of fills under way; fills past it wait their turn.
pub(super) const FILL_BYTES_MAX: usize = 32 << 20;

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
                let mut copy = self
                    .pages
                    .take(page.len())
                    .expect("the pool of pages has no cap");
                copy.copy_in(0, &page[..]);
                let address = copy.ptr().as_ptr() as u64;
                let code = Code::Write { durable };
                let len = u32::try_from(page.len()).unwrap_or(u32::MAX);
                self.start(
                    volume,
                    io,
                    None,
                    code,
                    File::Cache,
                    offset,
                    address,
                    len,
                    Hold::Page(copy),
                );
            }
            Action::Sync { io } => {
                self.start(
                    volume,
                    io,
                    None,
                    Code::Sync,
                    File::Cache,
                    0,
                    0,
                    0,
                    Hold::Nothing,
                );
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
            Action::Complete { request, result } => {
                self.request_done(volume, request_key(request), result)
            }
            action @ (Action::Fetch { .. }
            | Action::LoadNodes { .. }
            | Action::Upload(_)
            | Action::Checkpoint(_)
            | Action::Drained { .. }
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
        let key = request_key(request);
        let in_flight = &mut self.volumes[volume as usize].inbox.requests[key];
        let buffer = in_flight.buffer;
        assert!(
            at <= buffer.len() && len <= buffer.len() - at,
            "a volume asks for bytes outside of a request's buffer"
        );
        if len == 0 {
            self.feed(volume, Event::IoDone { io, result: Ok(()) });
            return;
        }
        let (code, file, offset, address, hold) = match (buffer.0, what) {
            (BufferKind::None, _) => unreachable!("its length is 0"),
            (BufferKind::User { ptr, .. }, what) => {
                // SAFETY: `at` is inside the buffer by the assertion, and whoever made the buffer
                // vouched for its memory (`Buffer::user`).
                let ptr = unsafe { ptr.add(at as usize) };
                let address = ptr.as_ptr() as u64;
                match what {
                    Transfer::FromCache { offset } => {
                        (Code::Read, File::Cache, offset, address, Hold::Nothing)
                    }
                    Transfer::ToCache { offset } => (
                        Code::Write { durable: false },
                        File::Cache,
                        offset,
                        address,
                        Hold::Nothing,
                    ),
                    Transfer::Zeroes => {
                        // SAFETY: as above, and `len` bytes from `at` on are inside the buffer.
                        unsafe { ptr.write_bytes(0, len as usize) };
                        self.feed(volume, Event::IoDone { io, result: Ok(()) });
                        return;
                    }
                    Transfer::Copy(data) => {
                        // SAFETY: as above; `data` holds `len` bytes and is memory of its own.
                        unsafe {
                            std::ptr::copy_nonoverlapping(data.as_ptr(), ptr.as_ptr(), data.len())
                        };
                        self.feed(volume, Event::IoDone { io, result: Ok(()) });
                        return;
                    }
                }
            }
            (
                BufferKind::Registered {
                    buf_index,
                    char_fd,
                    user_copy_base,
                    ..
                },
                what,
            ) => match what {
                Transfer::FromCache { offset } => (
                    Code::ReadFixed { buf_index },
                    File::Cache,
                    offset,
                    u64::from(at),
                    Hold::Nothing,
                ),
                Transfer::ToCache { offset } => (
                    Code::WriteFixed { buf_index },
                    File::Cache,
                    offset,
                    u64::from(at),
                    Hold::Nothing,
                ),
                Transfer::Zeroes => {
                    let zeroes = File::Fd(self.zeroes.as_raw_fd());
                    (
                        Code::ReadFixed { buf_index },
                        zeroes,
                        0,
                        u64::from(at),
                        Hold::Nothing,
                    )
                }
                Transfer::Copy(data) => {
                    let address = data.as_ptr() as u64;
                    let offset = user_copy_base + u64::from(at);
                    (
                        Code::Write { durable: false },
                        File::Fd(char_fd),
                        offset,
                        address,
                        Hold::Bytes(data),
                    )
                }
            },
        };
        self.volumes[volume as usize].inbox.requests[key].ops += 1;
        self.start(
            volume,
            io,
            Some(key),
            code,
            file,
            offset,
            address,
            len,
            hold,
        );
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of one operation, named at each call"
    )]
    fn start(
        &mut self,
        volume: u32,
        io: IoId,
        request: Option<usize>,
        code: Code,
        file: File,
        offset: u64,
        address: u64,
        len: u32,
        hold: Hold,
    ) {
        self.volumes[volume as usize].ops += 1;
        let op = CacheOp {
            volume,
            io,
            request,
            code,
            file,
            offset,
            address,
            len,
            done: 0,
            tries: 0,
            hold,
        };
        let index = index_of(self.ops.insert(op));
        self.submit_op(index);
    }

    /// Pushes the entry for what is left of an operation.
    pub(super) fn submit_op(&mut self, index: u32) {
        let entry = self.ops[index as usize]
            .entry(&self.ring)
            .user_data(Token::Op { index }.pack());
        // SAFETY: the entry points into memory that the operation holds until its completion is
        // taken (`Hold`), or into a request's buffer, which is not given back while the request's
        // count of operations is not zero; its files live as long as the reactor or, the ublk
        // character device, as its request.
        unsafe { self.ring.push(entry) };
    }

    /// Takes back the memory of an operation that is done.
    pub(super) fn release(&mut self, hold: Hold) {
        match hold {
            Hold::Nothing | Hold::Bytes(_) => {}
            Hold::Page(page) => self.pages.give(page),
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
            let copy = if aligned || len > POOLED_BYTES_MAX {
                None
            } else {
                match self.fills.pool.take(len) {
                    Some(mut copy) => {
                        copy.copy_in(0, &fill.data);
                        Some(copy)
                    }
                    None => return,
                }
            };
            let Some(fill) = self.fills.waiting.pop_front() else {
                return;
            };
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
            let (address, hold) = match copy {
                Some(copy) => (copy.ptr().as_ptr() as u64, Hold::Fill(copy)),
                None => (fill.data.as_ptr() as u64, Hold::Bytes(fill.data)),
            };
            let code = Code::Write { durable: false };
            self.start(
                fill.volume,
                fill.io,
                None,
                code,
                File::Cache,
                fill.offset,
                address,
                len,
                hold,
            );
        }
    }
}

fn request_key(request: RequestId) -> usize {
    usize::try_from(request.0).expect("a request id that this reactor gave out")
}
