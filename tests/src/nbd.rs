//! A small blocking NBD client over a unix socket: fixed newstyle negotiation, simple replies.
//!
//! It shares no code with the daemon's own client or server. Several requests may be under way at once
//! through [`Nbd::send_read`] and its like; their replies are taken in any order by [`Nbd::wait`].
//!
//! **Invariant:** a reply's cookie names a request that is under way, or the connection is given up.

#![expect(clippy::big_endian_bytes, reason = "NBD is big-endian on the wire")]

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::in_memory;

const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
/// More than any option reply of an honest server.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_TRIM: u16 = 4;
const COMMAND_WRITE_ZEROES: u16 = 6;
const COMMAND_FLAG_FUA: u16 = 1;

/// Longer than any request may take, outages included: a test that hangs should say where.
const PATIENCE: Duration = Duration::from_secs(240);

/// Why a request or the connection failed.
#[derive(Debug)]
pub enum NbdError {
    /// The connection broke.
    Io(io::Error),
    /// The server refused the export, in its own words.
    Refused(String),
    /// The server failed the request with this NBD errno; the connection goes on.
    Errno(u32),
    /// The server broke the protocol.
    Protocol(&'static str),
}

impl NbdError {
    /// The errno that the server failed the request with, if that is what happened.
    #[must_use]
    pub const fn errno(&self) -> Option<u32> {
        match self {
            Self::Errno(errno) => Some(*errno),
            _ => None,
        }
    }
}

impl std::fmt::Display for NbdError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) => write!(f, "NBD connection: {error}"),
            Self::Refused(words) => write!(f, "NBD export refused: {words}"),
            Self::Errno(errno) => write!(f, "NBD request failed with errno {errno}"),
            Self::Protocol(what) => write!(f, "NBD protocol broken by the server: {what}"),
        }
    }
}

impl std::error::Error for NbdError {}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What the server says that it can do (transmission flags).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NbdFlags(u16);

impl NbdFlags {
    /// Writes are refused.
    #[must_use]
    pub const fn read_only(self) -> bool {
        self.0 & (1 << 1) != 0
    }

    /// Flush, FUA, trim and write zeroes are all offered.
    #[must_use]
    pub const fn all_commands(self) -> bool {
        const WANTED: u16 = (1 << 2) | (1 << 3) | (1 << 5) | (1 << 6);
        self.0 & WANTED == WANTED
    }

    /// A flush on one connection covers what another was told is done.
    #[must_use]
    pub const fn multi_conn(self) -> bool {
        self.0 & (1 << 8) != 0
    }
}

/// The server's block sizes in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockSizes {
    /// Everything must be a multiple of it.
    pub minimum: u32,
    /// What the server likes best.
    pub preferred: u32,
    /// The longest read or write.
    pub maximum: u32,
}

/// A connection to one export.
#[derive(Debug)]
pub struct Nbd {
    stream: UnixStream,
    size: u64,
    flags: NbdFlags,
    blocks: Option<BlockSizes>,
    next_cookie: u64,
    /// Requests without a reply yet, and how many bytes it will carry.
    under_way: HashMap<u64, usize>,
    /// Replies that came while another was waited for.
    early: HashMap<u64, Result<Vec<u8>, u32>>,
}

impl Nbd {
    /// Connects to the export `export` of the server on the unix socket `socket`.
    ///
    /// # Errors
    /// [`NbdError::Refused`] if there is no such export, others if there is no sane server.
    pub fn connect(socket: &Path, export: &str) -> Result<Self, NbdError> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        if read_u64(&mut stream)? != MAGIC || read_u64(&mut stream)? != OPTION_MAGIC {
            return Err(NbdError::Protocol("greeting magic"));
        }
        let server = read_u16(&mut stream)?;
        if server & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(NbdError::Protocol("not fixed newstyle"));
        }
        let client = u32::from(FLAG_FIXED_NEWSTYLE | (server & FLAG_NO_ZEROES));
        stream.write_all(&client.to_be_bytes())?;
        send_go(&mut stream, export)?;
        let mut nbd = Self {
            stream,
            size: 0,
            flags: NbdFlags(0),
            blocks: None,
            next_cookie: 1,
            under_way: HashMap::new(),
            early: HashMap::new(),
        };
        while !nbd.option_reply()? {}
        Ok(nbd)
    }

    /// Takes one reply to the option; true once it was the last.
    fn option_reply(&mut self) -> Result<bool, NbdError> {
        let stream = &mut self.stream;
        if read_u64(stream)? != OPTION_REPLY_MAGIC || read_u32(stream)? != OPTION_GO {
            return Err(NbdError::Protocol("option reply"));
        }
        let kind = read_u32(stream)?;
        let len = read_u32(stream)?;
        if len > OPTION_REPLY_BYTES_MAX {
            return Err(NbdError::Protocol("endless option reply"));
        }
        let mut body = vec![0; in_memory(u64::from(len))];
        stream.read_exact(&mut body)?;
        match kind {
            REPLY_ACK => Ok(true),
            REPLY_INFO => self.information(&body).map(|()| false),
            error if error & REPLY_ERROR != 0 => {
                let words = String::from_utf8_lossy(&body);
                Err(NbdError::Refused(format!("{words} (reply {error:#x})")))
            }
            _ => Err(NbdError::Protocol("kind of option reply")),
        }
    }

    fn information(&mut self, mut body: &[u8]) -> Result<(), NbdError> {
        match read_u16(&mut body)? {
            INFO_EXPORT => {
                self.size = read_u64(&mut body)?;
                self.flags = NbdFlags(read_u16(&mut body)?);
            }
            INFO_BLOCK_SIZE => {
                self.blocks = Some(BlockSizes {
                    minimum: read_u32(&mut body)?,
                    preferred: read_u32(&mut body)?,
                    maximum: read_u32(&mut body)?,
                });
            }
            _ => {}
        }
        Ok(())
    }

    /// The export's size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// What the server offers.
    #[must_use]
    pub const fn flags(&self) -> NbdFlags {
        self.flags
    }

    /// The server's block sizes, if it told them.
    #[must_use]
    pub const fn blocks(&self) -> Option<BlockSizes> {
        self.blocks
    }

    /// Sends a read of `len` bytes at `offset`; [`Nbd::wait`] brings the bytes.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn send_read(&mut self, offset: u64, len: u32) -> Result<u64, NbdError> {
        self.send(COMMAND_READ, 0, offset, len, &[])
    }

    /// Sends a write of `data` at `offset`.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn send_write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<u64, NbdError> {
        let len = u32::try_from(data.len()).expect("a write is shorter than 4 GiB");
        self.send(COMMAND_WRITE, fua_flag(fua), offset, len, data)
    }

    /// Sends a trim of `len` bytes at `offset`.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn send_trim(&mut self, offset: u64, len: u32) -> Result<u64, NbdError> {
        self.send(COMMAND_TRIM, 0, offset, len, &[])
    }

    /// Waits for the reply to the request of this cookie: a read's bytes, or none.
    ///
    /// # Errors
    /// [`NbdError::Errno`] if the server failed it; others if the connection broke.
    ///
    /// # Panics
    /// If no such request is under way.
    pub fn wait(&mut self, cookie: u64) -> Result<Vec<u8>, NbdError> {
        loop {
            if let Some(reply) = self.early.remove(&cookie) {
                return reply.map_err(NbdError::Errno);
            }
            assert!(
                self.under_way.contains_key(&cookie),
                "no request {cookie} is under way"
            );
            let (of, reply) = self.receive()?;
            self.early.insert(of, reply);
        }
    }

    /// Reads into `into` from `offset`.
    ///
    /// # Errors
    /// As of [`Nbd::wait`].
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), NbdError> {
        let len = u32::try_from(into.len()).expect("a read is shorter than 4 GiB");
        let cookie = self.send_read(offset, len)?;
        into.copy_from_slice(&self.wait(cookie)?);
        Ok(())
    }

    /// Reads `len` bytes from `offset`.
    ///
    /// # Errors
    /// As of [`Nbd::wait`].
    pub fn read_vec(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, NbdError> {
        let mut bytes = vec![0; in_memory(len)];
        // Stays below the 32 MiB that every server takes.
        for (index, piece) in bytes.chunks_mut(8 << 20).enumerate() {
            self.read(offset + ((index as u64) << 23), piece)?;
        }
        Ok(bytes)
    }

    /// Writes `data` at `offset`; with `fua`, durably so before it returns.
    ///
    /// # Errors
    /// As of [`Nbd::wait`].
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), NbdError> {
        let cookie = self.send_write(offset, data, fua)?;
        self.wait(cookie).map(drop)
    }

    /// Makes everything that was acknowledged durable.
    ///
    /// # Errors
    /// As of [`Nbd::wait`].
    pub fn flush(&mut self) -> Result<(), NbdError> {
        let cookie = self.send(COMMAND_FLUSH, 0, 0, 0, &[])?;
        self.wait(cookie).map(drop)
    }

    /// Discards `len` bytes at `offset`.
    ///
    /// # Errors
    /// As of [`Nbd::wait`].
    pub fn trim(&mut self, offset: u64, len: u32) -> Result<(), NbdError> {
        let cookie = self.send_trim(offset, len)?;
        self.wait(cookie).map(drop)
    }

    /// Makes `len` bytes at `offset` read as zeroes; with `fua`, durably so before it returns.
    ///
    /// # Errors
    /// As of [`Nbd::wait`].
    pub fn write_zeroes(&mut self, offset: u64, len: u32, fua: bool) -> Result<(), NbdError> {
        let cookie = self.send(COMMAND_WRITE_ZEROES, fua_flag(fua), offset, len, &[])?;
        self.wait(cookie).map(drop)
    }

    /// Says goodbye and closes.
    ///
    /// # Errors
    /// If the connection was broken already.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        self.send(COMMAND_DISCONNECT, 0, 0, 0, &[]).map(drop)
    }

    fn send(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> Result<u64, NbdError> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut header = Vec::with_capacity(28);
        header.extend(REQUEST_MAGIC.to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend(command.to_be_bytes());
        header.extend(cookie.to_be_bytes());
        header.extend(offset.to_be_bytes());
        header.extend(len.to_be_bytes());
        let carries = if command == COMMAND_READ { len } else { 0 };
        self.under_way.insert(cookie, in_memory(u64::from(carries)));
        self.stream.write_all(&header)?;
        self.stream.write_all(data)?;
        Ok(cookie)
    }

    fn receive(&mut self) -> Result<(u64, Result<Vec<u8>, u32>), NbdError> {
        if read_u32(&mut self.stream)? != SIMPLE_REPLY_MAGIC {
            return Err(NbdError::Protocol("reply magic"));
        }
        let errno = read_u32(&mut self.stream)?;
        let cookie = read_u64(&mut self.stream)?;
        let Some(len) = self.under_way.remove(&cookie) else {
            return Err(NbdError::Protocol("reply to no request"));
        };
        if errno != 0 {
            return Ok((cookie, Err(errno)));
        }
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok((cookie, Ok(data)))
    }
}

const fn fua_flag(fua: bool) -> u16 {
    if fua { COMMAND_FLAG_FUA } else { 0 }
}

fn send_go(stream: &mut UnixStream, export: &str) -> io::Result<()> {
    let name_len = u32::try_from(export.len()).expect("an export's name is short");
    let mut option = Vec::new();
    option.extend(OPTION_MAGIC.to_be_bytes());
    option.extend(OPTION_GO.to_be_bytes());
    option.extend((4 + name_len + 2 + 2).to_be_bytes());
    option.extend(name_len.to_be_bytes());
    option.extend(export.as_bytes());
    option.extend(1_u16.to_be_bytes());
    option.extend(INFO_BLOCK_SIZE.to_be_bytes());
    stream.write_all(&option)
}

fn read_array<const N: usize>(from: &mut impl io::Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_u16(from: &mut impl io::Read) -> io::Result<u16> {
    Ok(u16::from_be_bytes(read_array(from)?))
}

fn read_u32(from: &mut impl io::Read) -> io::Result<u32> {
    Ok(u32::from_be_bytes(read_array(from)?))
}

fn read_u64(from: &mut impl io::Read) -> io::Result<u64> {
    Ok(u64::from_be_bytes(read_array(from)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;
    use std::thread;

    #[test]
    fn client_against_qemu_nbd_reads_what_it_wrote() {
        let Some(server) = crate::tool("qemu-nbd") else {
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let (image, socket) = (dir.path().join("image"), dir.path().join("sock"));
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(16 << 20).unwrap();
        let mut child = server
            .command()
            .args([
                "--format=raw",
                "--discard=unmap",
                "--export-name=some/volume",
                "--socket",
            ])
            .args([&socket, &image])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        // Its socket is there a moment before it listens.
        let mut nbd = loop {
            match Nbd::connect(&socket, "some/volume") {
                Err(NbdError::Io(_)) if child.try_wait().unwrap().is_none() => {
                    thread::sleep(Duration::from_millis(10));
                }
                connected => break connected.unwrap(),
            }
        };
        assert_eq!(nbd.size(), 16 << 20);
        assert!(nbd.flags().all_commands() && !nbd.flags().read_only());
        nbd.write(4096, &[7; 8192], true).unwrap();
        nbd.write_zeroes(4096, 512, false).unwrap();
        nbd.trim(8192, 4096).unwrap();
        nbd.flush().unwrap();
        let expected = [[0; 512].as_slice(), &[7; 3584], &[0; 4096]].concat();
        assert!(nbd.read_vec(4096, 8192).unwrap() == expected);
        let first = nbd.send_read(4096, 512).unwrap();
        let second = nbd.send_read(4608, 512).unwrap();
        assert_eq!(nbd.wait(second).unwrap(), [7; 512]);
        assert_eq!(nbd.wait(first).unwrap(), [0; 512]);
        let outside = nbd.read(16 << 20, &mut [0; 512]).unwrap_err();
        assert!(outside.errno().is_some(), "{outside}");
        nbd.disconnect().unwrap();
        child.wait().unwrap();
    }
}
