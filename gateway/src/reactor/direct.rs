//! Direct reads: the kernel receives a body from the store's socket into a request's own pages.
//!
//! The backend asks the store and reads the answer's head; then it hands over the connection, whose
//! next bytes are the body ([`Body`]), and the ring receives them. Whoever made the body hears how
//! it went, and has the connection back.
//!
//! Owns: which direct reads a volume waits for, and the entry that receives. Does not own: the
//! connection's deadline; who has it shuts the socket down, which ends the receiving.
//!
//! Invariants:
//! - A request's buffer is not given back while a direct read into it is expected or under way: it
//!   counts as an operation from the moment it is asked for.
//! - What cannot be received so ends as an error to the volume, which then fetches it.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use quarry_volume::{Action, Event, IoId};
use rustix::net::{Shutdown, shutdown};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::VolumeKey;
use super::core::Core;
use super::execute::request_key;
use super::frontend::BufferKind;
use super::memory::{ALIGNMENT, AlignedBuf};
use super::op::{Code, Hold, Move};
use super::ring::File;
use crate::trace::Step;

/// From `linux/io_uring.h`: a receive or send is of a registered buffer, `buf_index`.
const RECVSEND_FIXED_BUF: u16 = 1 << 2;

/// A connection whose next bytes are the body that was asked for.
#[derive(Debug)]
pub struct Body {
    socket: Arc<TcpStream>,
    whole: oneshot::Sender<bool>,
}

impl Body {
    /// The body on `socket`. The receiver hears whether all of it, and nothing else, was taken; it is
    /// closed if nobody took it. By then nobody else has the socket.
    #[must_use]
    pub fn new(socket: Arc<TcpStream>) -> (Self, oneshot::Receiver<bool>) {
        let (whole, heard) = oneshot::channel();
        (Self { socket, whole }, heard)
    }

    #[cfg(test)]
    pub(crate) fn socket(&self) -> Arc<TcpStream> {
        Arc::clone(&self.socket)
    }

    pub(super) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Ends what receives from it.
    fn cut(&self) {
        // Not connected any more: then it has ended.
        let _ = shutdown(&*self.socket, Shutdown::Both);
    }

    /// No operation uses it any more.
    pub(crate) fn end(self, whole: bool) {
        drop(self.socket);
        // Nobody may wait any more.
        let _ = self.whole.send(whole);
    }
}

/// A direct read that the backend is to answer.
struct Awaited {
    request: usize,
    since_ns: u64,
    at: u32,
    len: u32,
    buf_index: u16,
}

/// The direct reads that a volume waits for.
#[derive(Default)]
pub(super) struct DirectReads(HashMap<IoId, Awaited>);

impl Core {
    /// Has the backend ask for the body, if it can be received into the request's pages.
    pub(super) fn ask_direct(&mut self, volume: u32, action: Action) {
        let Action::FetchDirect {
            io,
            request,
            buffer_offset: at,
            len,
            ..
        } = action
        else {
            unreachable!("it was just matched")
        };
        let slot = &mut self.volumes[volume as usize];
        let request = request_key(request);
        let in_flight = &mut slot.inbox.requests[request];
        let buffer = in_flight.buffer;
        assert!(
            at <= buffer.len() && len <= buffer.len() - at,
            "a volume asks for bytes outside of a request's buffer"
        );
        let BufferKind::Registered { buf_index, .. } = buffer.0 else {
            let result = Err(libc::EOPNOTSUPP);
            return self.feed(volume, Event::IoDone { io, result });
        };
        in_flight.ops += 1;
        let awaited = Awaited {
            request,
            since_ns: self.batch_ns,
            at,
            len,
            buf_index,
        };
        slot.direct.0.insert(io, awaited);
        slot.backend.submit(action);
    }

    /// The backend's answer to [`Core::ask_direct`]; `None` if there is no body.
    pub(super) fn receive_direct(&mut self, key: VolumeKey, io: IoId, body: Option<Body>) {
        let Some(volume) = self.index_of_volume(key) else {
            return;
        };
        let Some(awaited) = self.volumes[volume as usize].direct.0.remove(&io) else {
            return;
        };
        let (now_ns, slot) = (self.batch_ns, &mut self.volumes[volume as usize]);
        let in_flight = &mut slot.inbox.requests[awaited.request];
        let (since_ns, len) = (awaited.since_ns, awaited.len);
        slot.trails
            .part_done(in_flight, Step::Ask, since_ns, now_ns, len);
        // One that ends leaves the request to the next daemon, or to the ordinary way.
        match body.filter(|_| !self.is_ending()) {
            Some(body) => {
                let code = Code::ReceiveFixed {
                    buf_index: awaited.buf_index,
                };
                let fd = File::Fd(body.fd());
                let moving = Move::new(code, fd, 0, awaited.at.into(), awaited.len);
                let moving = moving.holding(Hold::Body(body));
                self.start(volume, io, Some(awaited.request), moving);
            }
            None => {
                self.buffer_released(volume, awaited.request);
                let result = Err(libc::ECONNABORTED);
                self.feed(volume, Event::IoDone { io, result });
            }
        }
    }

    /// Ends all direct reads under way.
    pub(super) fn cut_direct(&self) {
        for (_, op) in &self.ops {
            if let Hold::Body(body) = &op.moving.hold {
                body.cut();
            }
        }
    }
}

/// The entry that receives exactly `len` bytes, or as many as come before the end, into the
/// registered buffer `buf_index`: to `address` of a buffer of memory, to byte `address` of a
/// request's pages.
pub(super) fn receive_fixed(
    fd: RawFd,
    buf_index: u16,
    address: *mut u8,
    len: u32,
) -> squeue::Entry {
    opcode::Recv::new(types::Fd(fd), address, len)
        .flags(libc::MSG_WAITALL)
        .ioprio(RECVSEND_FIXED_BUF)
        // The same field of the entry: without `BUFFER_SELECT` it is no group.
        .buf_group(buf_index)
        .build()
}

/// Tries whether this kernel receives into registered buffers (Linux 7.2 is the first).
///
/// # Errors
/// If it does not, with the kernel's answer.
pub fn probe() -> io::Result<()> {
    const SENT: &[u8; 8] = b"received";
    let memory = AlignedBuf::zeroed(ALIGNMENT);
    let mut ring = IoUring::new(2)?;
    let iovec = libc::iovec {
        iov_base: memory.ptr().as_ptr().cast(),
        iov_len: memory.capacity(),
    };
    // SAFETY: the memory was declared before the ring and so is freed after it.
    unsafe { ring.submitter().register_buffers(&[iovec]) }?;
    let (mut here, there) = UnixStream::pair()?;
    here.write_all(SENT)?;
    let entry = receive_fixed(there.as_raw_fd(), 0, memory.ptr().as_ptr(), 8);
    // SAFETY: what it is to receive is there, so it is done when it has been submitted; buffer and
    // socket live longer.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let completion = ring.completion().next();
    let result = completion.map_or(-libc::EIO, |c| c.result());
    match result {
        8 if memory.bytes(8) == SENT => Ok(()),
        0.. => Err(io::Error::other("it received something else")),
        _ => Err(io::Error::from_raw_os_error(-result)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use quarry_objfmt::{ChunkId, ChunkSeq, Epoch, Lba, LbaRange, Sectors, VolumeId};
    use quarry_volume::{IoError, Op};
    use tokio::net::TcpListener;

    use super::super::ring::tests::bytes;
    use super::super::testing::{geometry, reactor};
    use super::super::{BackendSink, Buffer, FrontEnd, Geometry, Machine, Message, Port, Reactor};
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);
    const LEN: u32 = 4096;

    /// A machine whose reads are all direct.
    struct Direct;

    impl Machine for Direct {
        fn apply(&mut self, event: Event, out: &mut Vec<Action>) {
            match event {
                Event::Request(request) => out.push(Action::FetchDirect {
                    io: IoId(request.id.0),
                    request: request.id,
                    buffer_offset: 0,
                    chunk: ChunkId {
                        volume: VolumeId::from_bytes([1; 16]),
                        epoch: Epoch::ZERO,
                        seq: ChunkSeq::ZERO,
                    },
                    object_offset: 16,
                    len: LEN,
                }),
                Event::IoDone { io, result } => out.push(Action::Complete {
                    request: quarry_volume::RequestId(io.0),
                    result: result.map_err(|_| IoError::Io),
                }),
                _ => {}
            }
        }

        fn geometry(&self) -> Geometry {
            geometry(1 << 20, 512)
        }
    }

    struct Sink(mpsc::Sender<IoId>);

    impl BackendSink for Sink {
        fn submit(&self, action: Action) {
            let Action::FetchDirect { io, .. } = action else {
                panic!("{action:?}")
            };
            self.0.send(io).unwrap();
        }
    }

    /// A front end that makes one read.
    struct One {
        buffer: Buffer,
        _memory: AlignedBuf,
        found: mpsc::Sender<Result<(), IoError>>,
        done: bool,
    }

    impl FrontEnd for One {
        fn start(&mut self, port: &mut Port<'_>) {
            let range = LbaRange::new(Lba::ZERO, Sectors::new(u64::from(LEN / 512))).unwrap();
            port.request(Op::Read, range, self.buffer, 0);
        }

        fn op_done(&mut self, _: u32, _: i32, _: u32, _: &mut Port<'_>) {}

        fn request_done(&mut self, _: u32, result: Result<(), IoError>, _: &mut Port<'_>) {
            self.done = true;
            self.found.send(result).unwrap();
        }

        fn stop(&mut self, _: &mut Port<'_>) {}

        fn is_finished(&self) -> bool {
            self.done
        }
    }

    /// One read into `buffer`: the volume's name, what the backend is asked, how the read ends.
    fn read(
        reactor: &Reactor,
        buffer: impl FnOnce(&AlignedBuf) -> Buffer,
    ) -> (
        VolumeKey,
        mpsc::Receiver<IoId>,
        mpsc::Receiver<Result<(), IoError>>,
    ) {
        let handle = reactor.handle();
        let (asked, backend) = mpsc::channel();
        let (found, answers) = mpsc::channel();
        let key = handle.new_key();
        let add = Message::AddVolume {
            key,
            machine: Box::new(Direct),
            backend: Box::new(Sink(asked)),
        };
        handle.send_blocking(add).unwrap();
        let memory = AlignedBuf::zeroed(LEN as usize);
        let front_end = Box::new(One {
            buffer: buffer(&memory),
            _memory: memory,
            found,
            done: false,
        });
        let add = Message::AddFrontEnd { key, front_end };
        handle.send_blocking(add).unwrap();
        (key, backend, answers)
    }

    #[test]
    fn read_into_memory_of_ours_fails_at_once_and_asks_nobody() {
        let (reactor, _cache) = reactor(1 << 20);
        let (_, backend, answers) = read(&reactor, |memory| {
            // SAFETY: the front end owns the memory until its drop, after the request's end.
            unsafe { Buffer::user(memory.ptr(), LEN) }
        });
        assert_eq!(answers.recv_timeout(LIMIT).unwrap(), Err(IoError::Io));
        assert!(backend.try_recv().is_err());
        reactor.shutdown();
    }

    #[test]
    fn read_that_the_backend_has_no_body_for_fails() {
        let (reactor, _cache) = reactor(1 << 20);
        let (key, backend, answers) = read(&reactor, |_| Buffer::registered(0, LEN, -1, 0));
        let io = backend.recv_timeout(LIMIT).unwrap();
        assert!(answers.try_recv().is_err(), "it waits for the backend");
        for _ in 0..2 {
            // The second is of a read that nobody waits for any more.
            let answer = Message::Direct {
                key,
                io,
                body: None,
            };
            reactor.handle().send_blocking(answer).unwrap();
        }
        assert_eq!(answers.recv_timeout(LIMIT).unwrap(), Err(IoError::Io));
        reactor.shutdown();
    }

    /// The table's entry is empty here, as no pages of a request were registered.
    #[test]
    fn body_that_the_kernel_does_not_receive_is_not_whole() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let connect = TcpStream::connect(listener.local_addr().unwrap());
        let socket = Arc::new(runtime.block_on(connect).unwrap());
        let (reactor, _cache) = reactor(1 << 20);
        let (key, backend, answers) = read(&reactor, |_| Buffer::registered(0, LEN, -1, 0));
        let io = backend.recv_timeout(LIMIT).unwrap();
        let (body, whole) = Body::new(Arc::clone(&socket));
        let body = Some(body);
        let answer = Message::Direct { key, io, body };
        reactor.handle().send_blocking(answer).unwrap();
        assert_eq!(whole.blocking_recv(), Ok(false));
        assert_eq!(answers.recv_timeout(LIMIT).unwrap(), Err(IoError::Io));
        assert!(Arc::into_inner(socket).is_some(), "nobody else has it");
        reactor.shutdown();
    }

    #[test]
    fn probe_receives_or_names_the_kernels_refusal() {
        match probe() {
            Ok(()) => {}
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}"),
        }
    }

    #[test]
    fn entry_is_that_of_a_send_from_a_registered_buffer_but_for_its_code() {
        let address = std::ptr::without_provenance_mut::<u8>(0x4200);
        let mut receive = bytes(receive_fixed(3, 0x1234, address, 8));
        let send = opcode::SendZc::new(types::Fd(3), address, 8)
            .flags(libc::MSG_WAITALL)
            .buf_index(Some(0x1234));
        assert_eq!(std::mem::replace(&mut receive[0], opcode::SendZc::CODE), 27);
        assert_eq!(receive, bytes(send.build()));
    }
}
