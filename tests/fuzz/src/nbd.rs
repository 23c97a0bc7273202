//! What an NBD client sends: the handshake, single requests, and a whole connection on a reactor.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use quarry_gateway::nbd::negotiate::{Replies, negotiate};
use quarry_gateway::nbd::wire::{
    self, Command, InfoRequest, OPTION_BYTES_MAX, REQUEST_LEN, Reader, RequestHeader, command,
    decode_meta_query,
};
use quarry_gateway::nbd::{Connection, Export, ExportDirectory};
use quarry_gateway::reactor::{
    BackendSink, Geometry, Machine, Message, Reactor, ReactorConfig, VolumeKey,
};
use quarry_objfmt::{SECTOR_SIZE, Sectors, VOLUME_SECTORS_MAX};
use quarry_volume::{Action, Event, IoId, Op, RequestId, StatusRun};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::mend::padded;

/// The volume that connections are to: small, for requests name its size again and again.
const SMALL: Geometry = Geometry {
    size: Sectors::new(128),
    sector_size: 512,
    read_only: false,
};
const READ_ONLY: Geometry = Geometry {
    read_only: true,
    ..SMALL
};
const LARGEST: Geometry = Geometry {
    size: Sectors::new(VOLUME_SECTORS_MAX),
    sector_size: 4096,
    read_only: false,
};

/// Longer than any connection of a short input takes.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

/// Bytes of all that an option is answered with, of our few short exports.
const ANSWER_BYTES_MAX: usize = 256;

/// A volume that reads as zeroes and forgets what is written.
struct Zeroes {
    geometry: Geometry,
    reads: HashMap<IoId, RequestId>,
    next: u64,
}

impl Machine for Zeroes {
    fn apply(&mut self, event: Event, out: &mut Vec<Action>) {
        let (request, result) = match event {
            Event::Request(request) if request.op == Op::Read => {
                self.next += 1;
                let io = IoId(self.next);
                self.reads.insert(io, request.id);
                return out.push(Action::ZeroFill {
                    io,
                    request: request.id,
                    buffer_offset: 0,
                    len: u32::try_from(request.range.len().bytes()).expect("at most the volume"),
                });
            }
            Event::Request(request) => {
                let outside = request.range.end.get() > self.geometry.size.get();
                assert!(!outside, "{request:?} is outside the volume");
                if request.op == Op::Status {
                    let run = StatusRun {
                        len: request.range.len(),
                        zero: true,
                    };
                    out.push(Action::Status {
                        request: request.id,
                        runs: vec![run],
                    });
                }
                (request.id, Ok(()))
            }
            Event::IoDone { io, result } => {
                let request = self.reads.remove(&io).expect("of a read");
                (request, result.map_err(|_| quarry_volume::IoError::Io))
            }
            _ => return,
        };
        out.push(Action::Complete { request, result });
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }
}

struct NoBackend;

impl BackendSink for NoBackend {
    fn submit(&self, action: Action) {
        panic!("a volume of zeroes asks for {action:?}");
    }
}

/// A reactor with the volumes.
struct Bench {
    reactor: Reactor,
    small: VolumeKey,
    read_only: VolumeKey,
}

impl Bench {
    fn get() -> &'static Self {
        static BENCH: OnceLock<Bench> = OnceLock::new();
        BENCH.get_or_init(|| {
            let config = ReactorConfig {
                index: 0,
                page_cache: None,
                cache: Arc::new(tempfile::tempfile().expect("a temporary file")),
                kept_writes: Default::default(),
                sync_failure: Default::default(),
                buffer_entries: 0,
                cipher: None,
            };
            let reactor = Reactor::spawn(config).expect("a reactor");
            let add = |geometry| {
                let key = reactor.handle().new_key();
                let machine = Zeroes {
                    geometry,
                    reads: HashMap::new(),
                    next: 0,
                };
                let message = Message::AddVolume {
                    key,
                    machine: Box::new(machine),
                    backend: Box::new(NoBackend),
                };
                reactor.handle().send_blocking(message).expect("it runs");
                key
            };
            let (small, read_only) = (add(SMALL), add(READ_ONLY));
            Self {
                reactor,
                small,
                read_only,
            }
        })
    }

    fn export(&self, geometry: Geometry) -> Export {
        Export {
            reactor: self.reactor.handle(),
            volume: self.small,
            geometry,
            group: 0,
        }
    }
}

impl ExportDirectory for Bench {
    fn lookup(&self, name: &str) -> Option<Export> {
        match name {
            "a/b" => Some(self.export(SMALL)),
            "a/ro" => Some(self.export(READ_ONLY)),
            "a/large" => Some(self.export(LARGEST)),
            _ => None,
        }
    }

    fn list(&self) -> Vec<String> {
        ["a/b", "a/ro", "a/large"].map(str::to_owned).into()
    }
}

/// A client that has sent all its bytes and takes what comes.
struct Client<'a> {
    sent: &'a [u8],
    got: Vec<u8>,
}

impl AsyncRead for Client<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (now, rest) = self.sent.split_at(self.sent.len().min(into.remaining()));
        into.put_slice(now);
        self.sent = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.got.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A handshake ends; one that comes to an export has taken its own bytes and none of what follows;
/// each of its options had an answer that names it.
pub(crate) fn nbd_handshake(input: &[u8]) {
    // The payloads by themselves, where the fuzzer need not find the magic first.
    if let Some(request) = InfoRequest::decode(input) {
        assert!(request.name.len() <= input.len());
    }
    let _ = decode_meta_query(input);

    let mut client = Client {
        sent: input,
        got: Vec::new(),
    };
    let outcome = {
        let negotiation = pin!(negotiate(&mut client, Bench::get()));
        match negotiation.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => outcome,
            Poll::Pending => panic!("it waits for a client that hides nothing"),
        }
    };
    let taken = input.len() - client.sent.len();
    let mut sent = Reader::new(&input[..taken]);
    let mut got = Reader::new(&client.got);
    assert_eq!(
        got.bytes(18).map(|greeting| &greeting[..8]),
        Some(&b"NBDMAGIC"[..])
    );
    let _flags = sent.u32();
    let mut options = 0;
    // The answers are in the order of the options; some options have several.
    let mut asked = None;
    while let (Some(wire::OPTION_REPLY_MAGIC), Some(option), Some(kind), Some(len)) = (
        got.clone().u64(),
        skip(&got, 8).u32(),
        skip(&got, 12).u32(),
        skip(&got, 16).u32(),
    ) {
        let payload = got.bytes(20).and_then(|_| got.bytes(len as usize));
        assert!(payload.is_some_and(|payload| payload.len() < ANSWER_BYTES_MAX));
        if asked.is_none() {
            options += 1;
            asked = next_option(&mut sent);
        }
        assert_eq!(asked, Some(option), "an answer to another option");
        if kind == wire::reply::ACK || kind & wire::reply::ERROR != 0 {
            asked = None;
        }
    }
    assert!(options <= 64 && asked.is_none());
    if outcome.is_ok_and(|negotiated| negotiated.is_some()) {
        // The old way to take an export has an answer of another form.
        if !sent.is_empty() {
            assert_eq!(next_option(&mut sent), Some(wire::option::EXPORT_NAME));
            assert!(got.bytes(10).is_some());
            assert!(got.is_empty() || got.bytes(wire::EXPORT_NAME_ZEROES).is_some());
        }
        assert!(sent.is_empty(), "it took what is not its own");
        assert!(got.is_empty());
    }
}

fn skip<'a>(reader: &Reader<'a>, bytes: usize) -> Reader<'a> {
    let mut reader = reader.clone();
    let _ = reader.bytes(bytes);
    reader
}

fn next_option(sent: &mut Reader<'_>) -> Option<u32> {
    assert_eq!(sent.u64(), Some(wire::OPTION_MAGIC));
    let option = sent.u32();
    let len = sent.u32().filter(|len| *len <= OPTION_BYTES_MAX)?;
    sent.bytes(len as usize)?;
    option
}

/// A request that is served lies inside its export, on whole blocks, by arithmetic that cannot
/// overflow; one that is not keeps the stream in step.
pub(crate) fn nbd_request(input: &[u8]) {
    let bytes: [u8; REQUEST_LEN] = padded(input);
    let mut right = bytes;
    right[..4].copy_from_slice(&[0x25, 0x60, 0x95, 0x13]);
    for bytes in [bytes, right] {
        let Ok(header) = RequestHeader::decode(&bytes) else {
            continue;
        };
        assert_eq!(header.encode(), bytes);
        for geometry in [SMALL, READ_ONLY, LARGEST] {
            judge(&header, &geometry);
        }
    }
}

fn judge(header: &RequestHeader, geometry: &Geometry) {
    let (offset, len) = (u128::from(header.offset), u128::from(header.len));
    let (size, block) = (
        u128::from(geometry.size.bytes()),
        u128::from(geometry.sector_size),
    );
    let is_whole = len > 0 && offset % block == 0 && len % block == 0 && offset + len <= size;
    match wire::check(header, geometry) {
        Ok(Command::Flush) => assert_eq!((header.command, offset, len), (command::FLUSH, 0, 0)),
        Ok(Command::Disconnect) => assert_eq!(header.command, command::DISC),
        Ok(found) => {
            assert!(is_whole, "{header:?}");
            let (code, range) = match found {
                Command::Read { range } => (command::READ, range),
                Command::Write { range, .. } => (command::WRITE, range),
                Command::Trim { range, .. } => (command::TRIM, range),
                Command::WriteZeroes { range, .. } => (command::WRITE_ZEROES, range),
                Command::Status { range, .. } => (command::BLOCK_STATUS, range),
                Command::Flush | Command::Disconnect => unreachable!("matched before"),
            };
            assert_eq!(code, header.command);
            let reads = matches!(code, command::READ | command::BLOCK_STATUS);
            assert!(reads || !geometry.read_only);
            let sector = u128::from(SECTOR_SIZE);
            assert_eq!(u128::from(range.start.get()) * sector, offset);
            assert_eq!(u128::from(range.end.get()) * sector, offset + len);
        }
        Err(rejected) => {
            assert_ne!(rejected.errno, 0);
            let follows = if header.command == command::WRITE {
                header.len
            } else {
                0
            };
            assert_eq!(rejected.payload, follows);
            let plain = header.flags == 0 && header.len <= wire::PAYLOAD_BYTES_MAX;
            let reads = header.command == command::READ && plain;
            assert!(!(reads && is_whole), "{header:?} could be served");
        }
    }
}

/// What a client's request must be answered with.
#[derive(Debug, PartialEq, Eq)]
struct Due {
    errno: u32,
    /// Bytes of zeroes behind the reply.
    data: usize,
    command: u16,
    /// Bytes that it was about.
    asked: u32,
}

/// Each whole request has exactly one reply, the right one; reads are zeroes to the last byte; and
/// the connection comes to its end. The first byte of the input chooses the export and the kind of
/// replies, the rest is what the client sends before it hangs up.
pub(crate) fn nbd_connection(input: &[u8]) {
    let Some((&choice, stream)) = input.split_first() else {
        Bench::get();
        return;
    };
    let (structured, bench) = (choice & 1 != 0, Bench::get());
    let replies = Replies {
        structured,
        status: structured && choice & 4 != 0,
    };
    let (volume, geometry) = if choice & 2 == 0 {
        (bench.small, SMALL)
    } else {
        (bench.read_only, READ_ONLY)
    };
    let mut stream = stream.to_vec();
    let (due, is_sound) = expected(&mut stream, &geometry, replies.status);

    let (mut ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    ours.set_read_timeout(Some(ANSWER_TIME_MAX)).expect("ours");
    let message = Message::AddFrontEnd {
        key: volume,
        front_end: Box::new(Connection::new(theirs.into(), replies)),
    };
    bench
        .reactor
        .handle()
        .send_blocking(message)
        .expect("it runs");
    // The server hangs up on what is not NBD, maybe before it is all sent.
    let sent = ours
        .write_all(&stream)
        .and_then(|()| ours.shutdown(Shutdown::Write));
    assert!(sent.is_ok() || !is_sound, "{sent:?}");
    let mut got = Vec::new();
    match ours.read_to_end(&mut got) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => assert!(!is_sound),
        Err(error) => panic!("the connection does not end: {error}"),
    }
    settle(&got, due, structured, is_sound);
}

/// The replies due, by cookie; each request is given its number for a cookie. False if the stream
/// turns into something else than NBD.
fn expected(stream: &mut [u8], geometry: &Geometry, status: bool) -> (HashMap<u64, Due>, bool) {
    let mut due = HashMap::new();
    let mut at = 0;
    for cookie in 0.. {
        let Some(bytes) = stream.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) else {
            break;
        };
        let Ok(mut header) = RequestHeader::decode(bytes) else {
            return (due, false);
        };
        header.cookie = cookie;
        *bytes = header.encode();
        at += REQUEST_LEN;
        let mut reply = Due {
            errno: 0,
            data: 0,
            command: header.command,
            asked: header.len,
        };
        match wire::check(&header, geometry) {
            Ok(Command::Disconnect) => break,
            Ok(Command::Read { .. }) => reply.data = header.len as usize,
            Ok(Command::Status { .. }) if !status => reply.errno = wire::errno::EINVAL,
            Ok(Command::Write { .. }) => {
                at += header.len as usize;
                if at > stream.len() {
                    break;
                }
            }
            Ok(_) => {}
            Err(rejected) => {
                reply.errno = rejected.errno;
                at += rejected.payload as usize;
            }
        }
        due.insert(cookie, reply);
    }
    (due, true)
}

/// Holds what came to what was due. To a client that broke the protocol less may have come.
fn settle(got: &[u8], mut due: HashMap<u64, Due>, structured: bool, is_sound: bool) {
    let mut got = Reader::new(got);
    while let Some(magic) = got.u32() {
        let is_chunk = magic == wire::STRUCTURED_REPLY_MAGIC;
        assert!(is_chunk || magic == wire::SIMPLE_REPLY_MAGIC, "{magic:#x}");
        let word = got.u32();
        let (Some(word), Some(cookie)) = (word, got.u64()) else {
            assert!(!is_sound, "a reply is cut off");
            return;
        };
        let reply = due.remove(&cookie).expect("one reply for each request");
        assert_eq!(
            is_chunk,
            structured && matches!(reply.command, command::READ | command::BLOCK_STATUS)
        );
        if is_chunk {
            let len = got.u32().unwrap_or(0) as usize;
            if reply.errno == 0 && reply.command == command::BLOCK_STATUS {
                assert_eq!((word, len), (1 << 16 | 5, 12));
                assert_eq!(got.u32(), Some(wire::allocation::ID));
                assert_eq!((got.u32(), got.u32()), (Some(reply.asked), Some(3)));
            } else if reply.errno == 0 {
                assert_eq!((word, len), (1 << 16 | 1, 8 + reply.data));
                let _offset = got.u64();
            } else {
                assert_eq!((word, len), (1 << 16 | 1 << 15 | 1, 6));
                assert_eq!(got.u32(), Some(reply.errno));
                assert_eq!(got.u16(), Some(0));
            }
        } else {
            assert_eq!(word, reply.errno);
        }
        match got.bytes(reply.data) {
            Some(data) => assert!(data.iter().all(|byte| *byte == 0), "another's bytes"),
            None => return assert!(!is_sound, "a reply is cut off"),
        }
    }
    assert!(due.is_empty() || !is_sound, "without a reply: {due:?}");
}
