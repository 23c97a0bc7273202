//! A small NBD client over a unix socket, for images, the demo and tests. Blocking.
//!
//! Several requests may be under way: [`Client::submit`] sends one, [`Client::reap`] takes the next
//! answer, whichever it is. The calls for one request ([`Client::read_at`] and so on) and the copies
//! ([`Client::copy_in`], [`Client::copy_out`]) are made of them, and want nothing else under way.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::wire::{
    self, Put, Reader, RequestHeader, allocation, chunk, command, info, option, reply, transmission,
};

/// Requests that a copy keeps under way.
const COPY_DEPTH: usize = 16;

/// Bytes of a request of a copy.
const COPY_BYTES: u32 = 1 << 20;

/// Longest answer to an option that is read, in bytes.
const ANSWER_BYTES_MAX: u32 = 64 << 10;

/// Longest wait for the socket.
const SOCKET_TIME_MAX: Duration = Duration::from_secs(300);

/// Why a call of the client failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed.
    #[error("the NBD connection failed")]
    Io(#[from] io::Error),
    /// The server refused the export, in its own words.
    #[error("the server refuses the export {export}: {reason}")]
    Refused {
        /// The export.
        export: String,
        /// Why.
        reason: String,
    },
    /// What is read cannot be written to where it is to go.
    #[error("the output cannot be written")]
    Output(#[source] io::Error),
    /// A request failed.
    #[error("the request failed with NBD error {errno}: {}", in_words(*errno))]
    Request {
        /// The protocol's errno.
        errno: u32,
    },
    /// The server broke the protocol.
    #[error("the server does not speak NBD as it should: {0}")]
    Protocol(&'static str),
}

/// The protocol's errors have the numbers of Linux.
fn in_words(errno: u32) -> io::Error {
    io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(0))
}

/// What to ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask<'a> {
    /// Read this many bytes.
    Read(u32),
    /// Write these bytes; with the flag, durable before the answer.
    Write(&'a [u8], bool),
    /// Flush.
    Flush,
    /// Discard this many bytes.
    Trim(u32),
    /// Write this many zeroes.
    WriteZeroes(u32),
    /// Tell which runs of this many bytes read as zeroes.
    Status(u32),
}

/// A run of an export, as a block status tells of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Bytes.
    pub len: u64,
    /// Whether it is known to read as zeroes.
    pub zero: bool,
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// As [`Client::submit`] gave it.
    pub cookie: u64,
    /// The protocol's errno; 0 is success.
    pub errno: u32,
    /// What was read; empty for all others.
    pub data: Vec<u8>,
    /// The status of what was asked for, from its start on; empty for all others.
    pub runs: Vec<Run>,
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Asked {
    cookie: u64,
    command: u16,
    offset: u64,
    len: u32,
}

/// A connection to an export.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    size: u64,
    flags: u16,
    block_size: u32,
    /// Whether reads get structured replies.
    structured: bool,
    /// The number of the context `base:allocation`, if it was set.
    allocation: Option<u32>,
    next_cookie: u64,
    under_way: Vec<Asked>,
}

impl Client {
    /// Connects to the export of this name.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(socket: &Path, export: &str) -> Result<Self, ClientError> {
        let mut client = Self::over(UnixStream::connect(socket)?)?;
        client.stream.set_read_timeout(Some(SOCKET_TIME_MAX))?;
        client.stream.set_write_timeout(Some(SOCKET_TIME_MAX))?;
        client.choose(export)?;
        Ok(client)
    }

    /// Connects to the export of this name, and agrees on block status if the server knows it. For work
    /// that takes as long as it takes: answers are waited for without end.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect_mapped(socket: &Path, export: &str) -> Result<Self, ClientError> {
        let mut client = Self::over(UnixStream::connect(socket)?)?;
        client.agree_on_status(export)?;
        client.choose(export)?;
        Ok(client)
    }

    /// Takes the server's greeting.
    fn over(stream: UnixStream) -> Result<Self, ClientError> {
        let mut client = Self {
            stream,
            size: 0,
            flags: 0,
            block_size: 1,
            structured: false,
            allocation: None,
            next_cookie: 1,
            under_way: Vec::new(),
        };
        client.greet()?;
        Ok(client)
    }

    fn greet(&mut self) -> Result<(), ClientError> {
        let greeting: [u8; 18] = self.receive()?;
        let mut reader = Reader::new(&greeting);
        if reader.u64() != Some(wire::GREETING_MAGIC) || reader.u64() != Some(wire::OPTION_MAGIC) {
            return Err(ClientError::Protocol("its greeting has not the magic"));
        }
        let offered = reader.u16().unwrap_or(0);
        if offered & wire::FLAG_FIXED_NEWSTYLE == 0 {
            return Err(ClientError::Protocol(
                "it is too old for the fixed newstyle handshake",
            ));
        }
        let mut out = Vec::new();
        out.put_u32(u32::from(
            offered & (wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES),
        ));
        self.stream.write_all(&out)?;
        Ok(())
    }

    /// Asks for structured replies and `base:allocation`; a server that has them not is asked no more.
    fn agree_on_status(&mut self, export: &str) -> Result<(), ClientError> {
        self.send_option(option::STRUCTURED_REPLY, &[])?;
        let (kind, _) = self.receive_option_reply(option::STRUCTURED_REPLY)?;
        self.structured = kind == reply::ACK;
        if !self.structured {
            return Ok(());
        }
        let mut payload = Vec::new();
        put_name(&mut payload, export)?;
        payload.put_u32(1);
        put_name(&mut payload, allocation::NAME)?;
        self.send_option(option::SET_META_CONTEXT, &payload)?;
        loop {
            let (kind, payload) = self.receive_option_reply(option::SET_META_CONTEXT)?;
            let mut reader = Reader::new(&payload);
            match kind {
                reply::META_CONTEXT => self.allocation = reader.u32(),
                reply::ACK => return Ok(()),
                kind if kind & reply::ERROR != 0 => return Ok(()),
                _ => return Err(ClientError::Protocol("an answer of an unknown kind")),
            }
        }
    }

    /// Takes the export.
    fn choose(&mut self, export: &str) -> Result<(), ClientError> {
        let mut payload = Vec::new();
        put_name(&mut payload, export)?;
        payload.put_u16(1);
        payload.put_u16(info::BLOCK_SIZE);
        self.send_option(option::GO, &payload)?;
        loop {
            let (kind, payload) = self.receive_option_reply(option::GO)?;
            let mut reader = Reader::new(&payload);
            match kind {
                reply::ACK => return Ok(()),
                reply::INFO => match reader.u16() {
                    Some(info::EXPORT) => {
                        let (Some(size), Some(flags)) = (reader.u64(), reader.u16()) else {
                            return Err(ClientError::Protocol("its answer is cut off"));
                        };
                        (self.size, self.flags) = (size, flags);
                    }
                    Some(info::BLOCK_SIZE) => self.block_size = reader.u32().unwrap_or(1),
                    _ => {}
                },
                kind if kind & reply::ERROR != 0 => {
                    let reason = String::from_utf8_lossy(&payload).into_owned();
                    return Err(ClientError::Refused {
                        export: export.to_owned(),
                        reason,
                    });
                }
                _ => return Err(ClientError::Protocol("an answer of an unknown kind")),
            }
        }
    }

    fn send_option(&mut self, option: u32, payload: &[u8]) -> Result<(), ClientError> {
        let mut out = Vec::new();
        wire::put_option(&mut out, option, payload);
        self.stream.write_all(&out)?;
        Ok(())
    }

    fn receive_option_reply(&mut self, option: u32) -> Result<(u32, Vec<u8>), ClientError> {
        let head: [u8; wire::OPTION_REPLY_LEN] = self.receive()?;
        let mut reader = Reader::new(&head);
        if reader.u64() != Some(wire::OPTION_REPLY_MAGIC) || reader.u32() != Some(option) {
            return Err(ClientError::Protocol("an answer has not the magic"));
        }
        let (kind, len) = (reader.u32().unwrap_or(0), reader.u32().unwrap_or(0));
        if len > ANSWER_BYTES_MAX {
            return Err(ClientError::Protocol("an answer is too long"));
        }
        let mut payload = vec![0; len as usize];
        self.stream.read_exact(&mut payload)?;
        Ok((kind, payload))
    }

    fn receive<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn receive_u32(&mut self) -> io::Result<u32> {
        let bytes: [u8; 4] = self.receive()?;
        Ok(Reader::new(&bytes).u32().unwrap_or(0))
    }

    fn receive_u64(&mut self) -> io::Result<u64> {
        let bytes: [u8; 8] = self.receive()?;
        Ok(Reader::new(&bytes).u64().unwrap_or(0))
    }

    /// The export's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The smallest block that it serves, in bytes.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether it takes no writes.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.flags & transmission::READ_ONLY != 0
    }

    /// Sends a request and gives its name. Take answers often enough that the server never waits
    /// for this side to read: with no more than a few MiB of reads under way.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn submit(&mut self, ask: Ask<'_>, offset: u64) -> Result<u64, ClientError> {
        let too_long = |_| ClientError::Protocol("a write of 4 GiB");
        let (command, flags, offset, len) = match ask {
            Ask::Read(len) => (command::READ, 0, offset, len),
            Ask::Write(data, fua) => {
                let flags = if fua { command::FLAG_FUA } else { 0 };
                (
                    command::WRITE,
                    flags,
                    offset,
                    u32::try_from(data.len()).map_err(too_long)?,
                )
            }
            Ask::Flush => (command::FLUSH, 0, 0, 0),
            Ask::Trim(len) => (command::TRIM, 0, offset, len),
            Ask::WriteZeroes(len) => (command::WRITE_ZEROES, 0, offset, len),
            Ask::Status(_) if self.allocation.is_none() => {
                return Err(ClientError::Protocol("it has no block status"));
            }
            Ask::Status(len) => (command::BLOCK_STATUS, 0, offset, len),
        };
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let header = RequestHeader {
            flags,
            command,
            cookie,
            offset,
            len,
        };
        self.stream.write_all(&header.encode())?;
        if let Ask::Write(data, _) = ask {
            self.stream.write_all(data)?;
        }
        self.under_way.push(Asked {
            cookie,
            command,
            offset,
            len,
        });
        Ok(cookie)
    }

    /// Waits for the next answer.
    ///
    /// # Errors
    /// If the socket fails or the server breaks the protocol. A request's own failure is in the
    /// answer.
    pub fn reap(&mut self) -> Result<Answer, ClientError> {
        // Both kinds of reply begin with as many bytes, and have the cookie in the same place.
        let head: [u8; wire::SIMPLE_REPLY_LEN] = self.receive()?;
        let mut reader = Reader::new(&head);
        let (magic, word) = (reader.u32().unwrap_or(0), reader.u32().unwrap_or(0));
        let cookie = reader.u64().unwrap_or(0);
        let place = self.under_way.iter().position(|a| a.cookie == cookie);
        let Some(place) = place else {
            return Err(ClientError::Protocol("a reply to no request"));
        };
        let asked = self.under_way.swap_remove(place);
        let is_read = asked.command == command::READ;
        let mut answer = Answer {
            cookie,
            errno: 0,
            data: vec![0; if is_read { asked.len as usize } else { 0 }],
            runs: Vec::new(),
        };
        match magic {
            wire::SIMPLE_REPLY_MAGIC => {
                answer.errno = word;
                if word == 0 {
                    self.stream.read_exact(&mut answer.data)?;
                }
            }
            wire::STRUCTURED_REPLY_MAGIC if self.structured => {
                self.receive_chunks(word, &asked, &mut answer)?;
            }
            _ => return Err(ClientError::Protocol("a reply has not the magic")),
        }
        if answer.errno != 0 {
            answer.data.clear();
            answer.runs.clear();
        }
        Ok(answer)
    }

    /// Takes the chunks of a structured reply, of whose first the head up to the cookie is read.
    fn receive_chunks(
        &mut self,
        mut word: u32,
        asked: &Asked,
        answer: &mut Answer,
    ) -> Result<(), ClientError> {
        let broken = ClientError::Protocol;
        // Bytes of the answer's data that have come; chunks do not overlap.
        let mut covered = 0_u64;
        loop {
            let half = |word: u32| u16::try_from(word & 0xffff).unwrap_or(0);
            let (flags, kind) = (half(word >> 16), half(word));
            let len = self.receive_u32()?;
            match kind {
                chunk::OFFSET_DATA if asked.command == command::READ && len > 8 => {
                    let offset = self.receive_u64()?;
                    let part = part_of(answer, asked, offset, u64::from(len - 8))?;
                    self.stream.read_exact(part)?;
                    covered += u64::from(len - 8);
                }
                chunk::OFFSET_HOLE if asked.command == command::READ && len == 12 => {
                    let offset = self.receive_u64()?;
                    let hole = self.receive_u32()?;
                    part_of(answer, asked, offset, u64::from(hole))?.fill(0);
                    covered += u64::from(hole);
                }
                _ => {
                    if len > ANSWER_BYTES_MAX {
                        return Err(broken("a chunk is too long"));
                    }
                    let mut payload = vec![0; len as usize];
                    self.stream.read_exact(&mut payload)?;
                    let mut reader = Reader::new(&payload);
                    match kind {
                        chunk::NONE => {}
                        chunk::BLOCK_STATUS if asked.command == command::BLOCK_STATUS => {
                            if reader.u32() != self.allocation {
                                return Err(broken("the status of another context"));
                            }
                            while let (Some(len), Some(flags)) = (reader.u32(), reader.u32()) {
                                answer.runs.push(Run {
                                    len: u64::from(len),
                                    zero: flags & allocation::ZERO != 0,
                                });
                            }
                        }
                        kind if kind & chunk::ERROR != 0 => {
                            let errno = reader.u32().filter(|errno| *errno != 0);
                            answer.errno = errno.unwrap_or(wire::errno::EIO);
                        }
                        _ => return Err(broken("a chunk of an unknown kind")),
                    }
                }
            }
            if flags & chunk::DONE != 0 {
                break;
            }
            let head: [u8; wire::SIMPLE_REPLY_LEN] = self.receive()?;
            let mut reader = Reader::new(&head);
            let magic = reader.u32();
            word = reader.u32().unwrap_or(0);
            if magic != Some(wire::STRUCTURED_REPLY_MAGIC) || reader.u64() != Some(asked.cookie) {
                return Err(broken("chunks of several replies are mixed"));
            }
        }
        if answer.errno == 0 && covered != answer.data.len() as u64 {
            return Err(broken("a read's answer has gaps"));
        }
        Ok(())
    }

    /// Requests under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    fn one(&mut self, ask: Ask<'_>, offset: u64) -> Result<Answer, ClientError> {
        let cookie = self.submit(ask, offset)?;
        let answer = self.reap()?;
        match answer {
            Answer { errno: 0, .. } if answer.cookie == cookie => Ok(answer),
            Answer { errno: 0, .. } => Err(ClientError::Protocol("another request was under way")),
            Answer { errno, .. } => Err(ClientError::Request { errno }),
        }
    }

    /// Reads `len` bytes at `offset`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn read_at(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, ClientError> {
        self.one(Ask::Read(len), offset).map(|answer| answer.data)
    }

    /// Whether the server tells which runs read as zeroes.
    #[must_use]
    pub fn has_status(&self) -> bool {
        self.allocation.is_some()
    }

    /// Which runs read as zeroes, of at most `len` bytes from `offset` on: together at least a byte, maybe
    /// less than asked for.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn status_at(&mut self, offset: u64, len: u32) -> Result<Vec<Run>, ClientError> {
        let runs = self.one(Ask::Status(len), offset)?.runs;
        if runs.is_empty() || runs.iter().any(|run| run.len == 0) {
            return Err(ClientError::Protocol("a block status without a run"));
        }
        Ok(runs)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.one(Ask::Write(data, false), offset).map(drop)
    }

    /// Writes `data` at `offset`, durably.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn write_at_durably(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.one(Ask::Write(data, true), offset).map(drop)
    }

    /// Makes all that was answered durable.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.one(Ask::Flush, 0).map(drop)
    }

    /// Discards `len` bytes at `offset`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn trim(&mut self, offset: u64, len: u32) -> Result<(), ClientError> {
        self.one(Ask::Trim(len), offset).map(drop)
    }

    /// Writes `len` zeroes at `offset`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn write_zeroes(&mut self, offset: u64, len: u32) -> Result<(), ClientError> {
        self.one(Ask::WriteZeroes(len), offset).map(drop)
    }

    /// Writes all that `source` gives from `offset` on, several requests at a time; the last block
    /// is filled up with zeroes. `progress` is told the bytes written so far. Gives the length of
    /// what was read.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn copy_in(
        &mut self,
        source: &mut impl Read,
        offset: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<u64, ClientError> {
        let mut total = 0;
        let mut done = 0;
        let mut sizes = VecDeque::new();
        let mut block = vec![0; COPY_BYTES as usize];
        loop {
            let n = read_full(source, &mut block)?;
            if n > 0 {
                let whole = n
                    .next_multiple_of(self.block_size.max(1) as usize)
                    .min(block.len());
                block[n..whole].fill(0);
                self.submit(Ask::Write(&block[..whole], false), offset + total)?;
                sizes.push_back(n as u64);
                total += n as u64;
            }
            while self.under_way() >= COPY_DEPTH || (n == 0 && self.under_way() > 0) {
                let answer = self.reap()?;
                if answer.errno != 0 {
                    return Err(ClientError::Request {
                        errno: answer.errno,
                    });
                }
                done += sizes.pop_front().unwrap_or(0);
                progress(done);
            }
            if n == 0 {
                return Ok(total);
            }
        }
    }

    /// Reads `len` bytes from `offset` on into `sink`, several requests at a time, in order.
    /// `progress` is told the bytes read so far. Both must be multiples of the block size.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn copy_out(
        &mut self,
        sink: &mut impl Write,
        offset: u64,
        len: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), ClientError> {
        let mut asked = 0;
        let mut done = 0;
        // What is under way, in order, and what of it has come.
        let mut order: VecDeque<(u64, Option<Vec<u8>>)> = VecDeque::new();
        while done < len {
            while asked < len && order.len() < COPY_DEPTH {
                let n = u32::try_from(len - asked)
                    .unwrap_or(COPY_BYTES)
                    .min(COPY_BYTES);
                let cookie = self.submit(Ask::Read(n), offset + asked)?;
                order.push_back((cookie, None));
                asked += u64::from(n);
            }
            let answer = self.reap()?;
            if answer.errno != 0 {
                return Err(ClientError::Request {
                    errno: answer.errno,
                });
            }
            if let Some(entry) = order.iter_mut().find(|entry| entry.0 == answer.cookie) {
                entry.1 = Some(answer.data);
            }
            while let Some((_, data @ Some(_))) = order.front_mut() {
                let data = data.take().unwrap_or_default();
                sink.write_all(&data).map_err(ClientError::Output)?;
                done += data.len() as u64;
                progress(done);
                order.pop_front();
            }
        }
        Ok(())
    }

    /// Says goodbye; without it the server finds out by itself.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn disconnect(mut self) -> Result<(), ClientError> {
        let header = RequestHeader {
            flags: 0,
            command: command::DISC,
            cookie: 0,
            offset: 0,
            len: 0,
        };
        self.stream.write_all(&header.encode())?;
        Ok(())
    }
}

/// Adds a name with its length before it.
fn put_name(out: &mut Vec<u8>, name: &str) -> Result<(), ClientError> {
    let len = u32::try_from(name.len()).map_err(|_| ClientError::Protocol("a name of 4 GiB"))?;
    out.put_u32(len);
    out.extend_from_slice(name.as_bytes());
    Ok(())
}

/// The part of a read's answer that is `len` bytes at `offset` of the export.
fn part_of<'a>(
    answer: &'a mut Answer,
    asked: &Asked,
    offset: u64,
    len: u64,
) -> Result<&'a mut [u8], ClientError> {
    let start = offset.checked_sub(asked.offset);
    let end = start.and_then(|start| start.checked_add(len));
    let range = start
        .zip(end)
        .and_then(|(start, end)| Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?));
    range
        .and_then(|range| answer.data.get_mut(range))
        .ok_or(ClientError::Protocol("data that were not asked for"))
}

/// Reads until `buf` is full or the source is at its end.
pub(crate) fn read_full(source: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match source.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
