//! A small NBD client over a unix socket, for the demo and for tests. Blocking.
//!
//! Several requests may be under way: [`Client::submit`] sends one, [`Client::reap`] takes the next
//! answer, whichever it is. The calls for one request ([`Client::read_at`] and so on) and the copies
//! ([`Client::copy_in`], [`Client::copy_out`]) are made of them, and want nothing else under way.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::wire::{self, Put, Reader, RequestHeader, command, info, option, reply, transmission};

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
    /// A request failed.
    #[error("the request failed with NBD error {errno}")]
    Request {
        /// The protocol's errno.
        errno: u32,
    },
    /// The server broke the protocol.
    #[error("the server does not speak NBD as it should: {0}")]
    Protocol(&'static str),
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
}

/// A connection to an export.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    size: u64,
    flags: u16,
    block_size: u32,
    next_cookie: u64,
    /// The requests under way, and how many bytes each brings back.
    under_way: Vec<(u64, u32)>,
}

impl Client {
    /// Connects to the export of this name.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(socket: &Path, export: &str) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(SOCKET_TIME_MAX))?;
        stream.set_write_timeout(Some(SOCKET_TIME_MAX))?;
        let mut client = Self {
            stream,
            size: 0,
            flags: 0,
            block_size: 1,
            next_cookie: 1,
            under_way: Vec::new(),
        };
        client.negotiate(export)?;
        Ok(client)
    }

    fn negotiate(&mut self, export: &str) -> Result<(), ClientError> {
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
        let mut payload = Vec::new();
        payload.put_u32(
            u32::try_from(export.len()).map_err(|_| ClientError::Protocol("a name of 4 GiB"))?,
        );
        payload.extend_from_slice(export.as_bytes());
        payload.put_u16(1);
        payload.put_u16(info::BLOCK_SIZE);
        let mut out = Vec::new();
        out.put_u32(u32::from(
            offered & (wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES),
        ));
        wire::put_option(&mut out, option::GO, &payload);
        self.stream.write_all(&out)?;
        loop {
            let (kind, payload) = self.receive_option_reply()?;
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

    fn receive_option_reply(&mut self) -> Result<(u32, Vec<u8>), ClientError> {
        let head: [u8; wire::OPTION_REPLY_LEN] = self.receive()?;
        let mut reader = Reader::new(&head);
        if reader.u64() != Some(wire::OPTION_REPLY_MAGIC) || reader.u32() != Some(option::GO) {
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
        self.under_way
            .push((cookie, if command == command::READ { len } else { 0 }));
        Ok(cookie)
    }

    /// Waits for the next answer.
    ///
    /// # Errors
    /// If the socket fails or the server breaks the protocol. A request's own failure is in the
    /// answer.
    pub fn reap(&mut self) -> Result<Answer, ClientError> {
        let head: [u8; wire::SIMPLE_REPLY_LEN] = self.receive()?;
        let mut reader = Reader::new(&head);
        if reader.u32() != Some(wire::SIMPLE_REPLY_MAGIC) {
            return Err(ClientError::Protocol("a reply has not the magic"));
        }
        let (errno, cookie) = (reader.u32().unwrap_or(0), reader.u64().unwrap_or(0));
        let Some(at) = self.under_way.iter().position(|(name, _)| *name == cookie) else {
            return Err(ClientError::Protocol("a reply to no request"));
        };
        let (_, len) = self.under_way.swap_remove(at);
        let mut data = vec![0; if errno == 0 { len as usize } else { 0 }];
        self.stream.read_exact(&mut data)?;
        Ok(Answer {
            cookie,
            errno,
            data,
        })
    }

    /// Requests under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    fn one(&mut self, ask: Ask<'_>, offset: u64) -> Result<Vec<u8>, ClientError> {
        let cookie = self.submit(ask, offset)?;
        let answer = self.reap()?;
        match answer {
            Answer {
                errno: 0,
                cookie: own,
                data,
            } if own == cookie => Ok(data),
            Answer { errno: 0, .. } => Err(ClientError::Protocol("another request was under way")),
            Answer { errno, .. } => Err(ClientError::Request { errno }),
        }
    }

    /// Reads `len` bytes at `offset`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn read_at(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, ClientError> {
        self.one(Ask::Read(len), offset)
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
                sink.write_all(&data)?;
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

/// Reads until `buf` is full or the source is at its end.
fn read_full(source: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
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
