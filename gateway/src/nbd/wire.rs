//! The NBD protocol as bytes: what goes over the socket, and what a request must look like to be
//! served. No I/O.
//!
//! Source: the NetworkBlockDevice project's `proto.md`. All integers are big-endian there; this is
//! the only module that knows.
#![expect(clippy::big_endian_bytes, reason = "NBD is a big-endian protocol")]

use quarry_objfmt::{Lba, LbaRange, SECTOR_SIZE, Sectors};
use quarry_volume::{IoError, STATUS_RUNS_MAX, StatusRun};

use crate::reactor::Geometry;

/// First word of the server's greeting (`NBDMAGIC`).
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting, and first of each option (`IHAVEOPT`).
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of an answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: no 124 zeroes after `EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// Zeroes after the answer to `EXPORT_NAME` otherwise.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// Bytes of a request's header.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of an answer to an option before its payload.
pub const OPTION_REPLY_LEN: usize = 20;

/// Largest payload of a read or a write, in bytes; advertised as the maximum block size.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest export name, in bytes: the protocol's own limit of strings.
pub const NAME_BYTES_MAX: usize = 4096;
/// Longest option that is read; a longer one ends the connection.
pub const OPTION_BYTES_MAX: u32 = 16 << 10;
/// The block size that serves best, in bytes.
pub const PREFERRED_BLOCK: u32 = 4096;

/// What a client asks for in the handshake.
pub mod option {
    /// Take this export, without an answer for errors.
    pub const EXPORT_NAME: u32 = 1;
    /// End the connection.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Go on with TLS.
    pub const STARTTLS: u32 = 5;
    /// Tell about an export.
    pub const INFO: u32 = 6;
    /// Take this export.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// How an option is answered.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information.
    pub const INFO: u32 = 3;
    /// One metadata context, and the number that stands for it.
    pub const META_CONTEXT: u32 = 4;
    /// Bit of all errors.
    pub const ERROR: u32 = 1 << 31;
    /// The option is unknown.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// The option is refused.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// The option makes no sense.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// TLS comes first.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
}

/// What kinds of information `INFO` and `GO` give.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Takes no writes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Knows `FLUSH`.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// Knows the flag `FUA`.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Knows `TRIM`.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// Knows `WRITE_ZEROES`.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Knows the flag `DF`; with structured replies only.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers the writes of all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// What a request asks for.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the payload follows.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Tell the status of a range in the contexts that were set.
    pub const BLOCK_STATUS: u16 = 7;
    /// Flag of all: durable before the reply.
    pub const FLAG_FUA: u16 = 1 << 0;
    /// Flag of `WRITE_ZEROES`: keep the space.
    pub const FLAG_NO_HOLE: u16 = 1 << 1;
    /// Flag of `READ`: do not cut the reply into chunks.
    pub const FLAG_DF: u16 = 1 << 2;
    /// Flag of `BLOCK_STATUS`: tell of one run only.
    pub const FLAG_REQ_ONE: u16 = 1 << 3;
}

/// The kinds of chunks of a structured reply.
pub mod chunk {
    /// Flag: the reply's last.
    pub const DONE: u16 = 1;
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Data and their offset.
    pub const OFFSET_DATA: u16 = 1;
    /// A run of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// The status of runs in one context.
    pub const BLOCK_STATUS: u16 = 5;
    /// Bit of all errors.
    pub const ERROR: u16 = 1 << 15;
}

/// The metadata context `base:allocation`, the only one that there is.
pub mod allocation {
    /// Its name.
    pub const NAME: &str = "base:allocation";
    /// What a client asks for that wants to know all contexts of its kind.
    pub const NAMESPACE: &str = "base:";
    /// The number that stands for it.
    pub const ID: u32 = 1;
    /// Flag of a run: it takes no space.
    pub const HOLE: u32 = 1 << 0;
    /// Flag of a run: it reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Bytes of a run of a block status: its length and its flags.
pub const STATUS_RUN_LEN: usize = 8;
/// Longest answer to a block status, in bytes.
pub const STATUS_BYTES_MAX: usize = STATUS_RUNS_MAX * STATUS_RUN_LEN;

/// The errors that the protocol knows.
pub mod errno {
    /// Not permitted.
    pub const EPERM: u32 = 1;
    /// I/O error.
    pub const EIO: u32 = 5;
    /// Invalid.
    pub const EINVAL: u32 = 22;
    /// Behind the end.
    pub const ENOSPC: u32 = 28;
    /// The server goes away.
    pub const ESHUTDOWN: u32 = 108;
}

/// The protocol's error for a volume's.
#[must_use]
pub const fn errno_of(error: IoError) -> u32 {
    match error {
        IoError::Invalid => errno::EINVAL,
        IoError::ReadOnly => errno::EPERM,
        IoError::Io => errno::EIO,
        IoError::ShuttingDown => errno::ESHUTDOWN,
    }
}

/// What an export of this shape can do.
#[must_use]
pub const fn export_flags(geometry: &Geometry, structured: bool) -> u16 {
    let mut flags = transmission::HAS_FLAGS
        | transmission::SEND_FLUSH
        | transmission::SEND_FUA
        | transmission::SEND_TRIM
        | transmission::SEND_WRITE_ZEROES
        | transmission::CAN_MULTI_CONN;
    if geometry.read_only {
        flags |= transmission::READ_ONLY;
    }
    if structured {
        flags |= transmission::SEND_DF;
    }
    flags
}

/// A request as it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: u16,
    /// Command.
    pub command: u16,
    /// The client's name for it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// The peer does not speak NBD; nothing behind this point can be made sense of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a request starts with 0x{found:08x}, not with NBD's magic")]
pub struct BadMagic {
    /// What was there.
    pub found: u32,
}

impl RequestHeader {
    /// From its bytes.
    ///
    /// # Errors
    /// If they do not start with the magic.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, BadMagic> {
        let mut reader = Reader::new(bytes);
        let (magic, flags, command) = (reader.u32(), reader.u16(), reader.u16());
        let (cookie, offset, len) = (reader.u64(), reader.u64(), reader.u32());
        match (magic, flags, command, cookie, offset, len) {
            (
                Some(REQUEST_MAGIC),
                Some(flags),
                Some(command),
                Some(cookie),
                Some(offset),
                Some(len),
            ) => Ok(Self {
                flags,
                command,
                cookie,
                offset,
                len,
            }),
            (magic, ..) => Err(BadMagic {
                found: magic.unwrap_or(0),
            }),
        }
    }

    /// To its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// A request that can be served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Read.
    Read {
        /// What.
        range: LbaRange,
    },
    /// Write; the payload follows.
    Write {
        /// What.
        range: LbaRange,
        /// Durable before the reply.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Discard.
    Trim {
        /// What.
        range: LbaRange,
        /// Durable before the reply.
        fua: bool,
    },
    /// Write zeroes.
    WriteZeroes {
        /// What.
        range: LbaRange,
        /// Durable before the reply.
        fua: bool,
    },
    /// Tell which runs read as zeroes.
    Status {
        /// What.
        range: LbaRange,
        /// Of one run only.
        one: bool,
    },
    /// The client goes.
    Disconnect,
}

/// A request that gets an error, and how much of the stream belongs to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rejected {
    /// The protocol's errno.
    pub errno: u32,
    /// Bytes of payload that follow and must be skipped.
    pub payload: u32,
}

/// Whether a request can be served by an export of this shape, and as what.
///
/// # Errors
/// [`Rejected`] if not.
pub fn check(header: &RequestHeader, geometry: &Geometry) -> Result<Command, Rejected> {
    let payload = if header.command == command::WRITE {
        header.len
    } else {
        0
    };
    let reject = |errno| Err(Rejected { errno, payload });
    let allowed = match header.command {
        command::READ => command::FLAG_FUA | command::FLAG_DF,
        command::WRITE_ZEROES => command::FLAG_FUA | command::FLAG_NO_HOLE,
        command::BLOCK_STATUS => command::FLAG_FUA | command::FLAG_REQ_ONE,
        _ => command::FLAG_FUA,
    };
    let fua = header.flags & command::FLAG_FUA != 0;
    let writes = match header.command {
        command::DISC => return Ok(Command::Disconnect),
        _ if header.flags & !allowed != 0 => return reject(errno::EINVAL),
        command::FLUSH if header.offset == 0 && header.len == 0 => return Ok(Command::Flush),
        command::READ | command::BLOCK_STATUS => false,
        command::WRITE | command::TRIM | command::WRITE_ZEROES => true,
        _ => return reject(errno::EINVAL),
    };
    if writes && geometry.read_only {
        return reject(errno::EPERM);
    }
    let carries_data = matches!(header.command, command::READ | command::WRITE);
    if header.len == 0 || (carries_data && header.len > PAYLOAD_BYTES_MAX) {
        return reject(errno::EINVAL);
    }
    let fits = header
        .offset
        .checked_add(u64::from(header.len))
        .is_some_and(|end| end.div_ceil(u64::from(SECTOR_SIZE)) <= geometry.size.get());
    if !fits {
        return reject(if writes && header.command != command::TRIM {
            errno::ENOSPC
        } else {
            errno::EINVAL
        });
    }
    let block = u64::from(geometry.sector_size);
    if !header.offset.is_multiple_of(block) || !u64::from(header.len).is_multiple_of(block) {
        return reject(errno::EINVAL);
    }
    let sector = u64::from(SECTOR_SIZE);
    let sectors = Sectors::new(u64::from(header.len) / sector);
    let Some(range) = LbaRange::new(Lba::new(header.offset / sector), sectors) else {
        return reject(errno::EINVAL);
    };
    Ok(match header.command {
        command::READ => Command::Read { range },
        command::WRITE => Command::Write { range, fua },
        command::TRIM => Command::Trim { range, fua },
        command::BLOCK_STATUS => Command::Status {
            range,
            one: header.flags & command::FLAG_REQ_ONE != 0,
        },
        _ => Command::WriteZeroes { range, fua },
    })
}

/// The bytes of a reply before its data: no more than 28.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplyHead {
    bytes: [u8; Self::LEN_MAX],
    len: usize,
}

impl ReplyHead {
    /// Longest head: a structured chunk's header with the data's offset.
    pub const LEN_MAX: usize = 28;

    /// A simple reply; `errno` 0 is success.
    #[must_use]
    pub fn simple(cookie: u64, errno: u32) -> Self {
        let mut bytes = [0; Self::LEN_MAX];
        bytes[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&errno.to_be_bytes());
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        Self {
            bytes,
            len: SIMPLE_REPLY_LEN,
        }
    }

    /// The only chunk of a read's structured reply; `len` bytes of data follow.
    #[must_use]
    pub fn data(cookie: u64, offset: u64, len: u32) -> Self {
        let mut head = Self::chunk(cookie, chunk::OFFSET_DATA, 8 + len);
        head.bytes[20..28].copy_from_slice(&offset.to_be_bytes());
        head.len = 28;
        head
    }

    /// The only chunk of a block status' reply; `len` bytes of runs follow.
    #[must_use]
    pub fn status(cookie: u64, len: u32) -> Self {
        let mut head = Self::chunk(cookie, chunk::BLOCK_STATUS, 4 + len);
        head.bytes[20..24].copy_from_slice(&allocation::ID.to_be_bytes());
        head.len = 24;
        head
    }

    /// The only chunk of a structured reply that says an error, without words.
    #[must_use]
    pub fn error(cookie: u64, errno: u32) -> Self {
        let mut head = Self::chunk(cookie, chunk::ERROR | 1, 6);
        head.bytes[20..24].copy_from_slice(&errno.to_be_bytes());
        head.len = 26;
        head
    }

    fn chunk(cookie: u64, kind: u16, len: u32) -> Self {
        let mut bytes = [0; Self::LEN_MAX];
        bytes[0..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&chunk::DONE.to_be_bytes());
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        bytes[16..20].copy_from_slice(&len.to_be_bytes());
        Self { bytes, len: 20 }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The runs of a block status as they are sent, [`STATUS_RUN_LEN`] bytes each. None reaches over what was
/// asked for, of which a request cannot name more than 32 bits.
#[must_use]
pub fn encode_status(runs: &[StatusRun]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(runs.len() * STATUS_RUN_LEN);
    for run in runs {
        bytes.put_u32(u32::try_from(run.len.bytes()).unwrap_or(u32::MAX));
        let zero = allocation::HOLE | allocation::ZERO;
        bytes.put_u32(if run.zero { zero } else { 0 });
    }
    bytes
}

/// Reads big-endian integers off the front of bytes; each `None` at their end.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Over these bytes.
    #[must_use]
    pub const fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }

    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(n)?;
        self.rest = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*taken)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length in four bytes, then so many bytes of UTF-8; `None` also if longer than `max`.
    pub fn string(&mut self, max: usize) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok()?;
        if len > max {
            return None;
        }
        std::str::from_utf8(self.bytes(len)?).ok()
    }

    /// Whether nothing is left.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

/// Writes big-endian integers to the end of a vector.
pub trait Put {
    /// Two bytes.
    fn put_u16(&mut self, value: u16);
    /// Four bytes.
    fn put_u32(&mut self, value: u32);
    /// Eight bytes.
    fn put_u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }
}

/// Adds an answer to an option.
///
/// # Panics
/// If the payload is 4 GiB long.
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(u32::try_from(payload.len()).expect("an answer is short"));
    out.extend_from_slice(payload);
}

/// Adds an option.
///
/// # Panics
/// If the payload is 4 GiB long.
pub fn put_option(out: &mut Vec<u8>, option: u32, payload: &[u8]) {
    out.put_u64(OPTION_MAGIC);
    out.put_u32(option);
    out.put_u32(u32::try_from(payload.len()).expect("an option is short"));
    out.extend_from_slice(payload);
}

/// The payload of `INFO` and `GO`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InfoRequest<'a> {
    /// The export.
    pub name: &'a str,
}

impl<'a> InfoRequest<'a> {
    /// From the option's payload; `None` if it is not well formed. What kinds of information are
    /// asked for makes no difference: all that matters is always told.
    #[must_use]
    pub fn decode(payload: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(payload);
        let name = reader.string(NAME_BYTES_MAX)?;
        let count = reader.u16()?;
        reader.bytes(2 * usize::from(count))?;
        reader.is_empty().then_some(Self { name })
    }
}

/// The payload of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetaQuery<'a> {
    /// The export.
    pub name: &'a str,
    /// How many contexts were asked for.
    pub queries: u32,
    /// Whether `base:allocation` was, by its whole name.
    pub allocation: bool,
    /// Whether all of its kind were.
    pub namespace: bool,
}

/// From the option's payload; `None` if it is not well formed.
#[must_use]
pub fn decode_meta_query(payload: &[u8]) -> Option<MetaQuery<'_>> {
    let mut reader = Reader::new(payload);
    let name = reader.string(NAME_BYTES_MAX)?;
    let queries = reader.u32()?;
    let (mut allocation, mut namespace) = (false, false);
    for _ in 0..queries {
        let query = reader.string(NAME_BYTES_MAX)?;
        allocation |= query == self::allocation::NAME;
        namespace |= query == self::allocation::NAMESPACE;
    }
    reader.is_empty().then_some(MetaQuery {
        name,
        queries,
        allocation,
        namespace,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GEOMETRY: Geometry = Geometry {
        size: Sectors::new(2048),
        sector_size: 4096,
        read_only: false,
    };
    const BYTES: u64 = 2048 * 512;

    fn header(command: u16, flags: u16, offset: u64, len: u32) -> RequestHeader {
        RequestHeader {
            flags,
            command,
            cookie: 7,
            offset,
            len,
        }
    }

    fn errno_for(command: u16, flags: u16, offset: u64, len: u32) -> u32 {
        check(&header(command, flags, offset, len), &GEOMETRY)
            .unwrap_err()
            .errno
    }

    #[test]
    fn request_encoded_and_decoded_is_the_same() {
        let header = RequestHeader {
            flags: 1,
            command: 6,
            cookie: u64::MAX - 3,
            offset: 1 << 40,
            len: 4096,
        };
        assert_eq!(RequestHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn request_of_another_magic_is_refused() {
        let mut bytes = header(0, 0, 0, 0).encode();
        bytes[0] ^= 1;
        assert_eq!(
            RequestHeader::decode(&bytes),
            Err(BadMagic {
                found: REQUEST_MAGIC ^ 1 << 24
            })
        );
    }

    #[test]
    fn read_at_the_very_end_is_served_and_one_block_further_not() {
        assert!(check(&header(command::READ, 0, BYTES - 4096, 4096), &GEOMETRY).is_ok());
        assert_eq!(errno_for(command::READ, 0, BYTES, 4096), errno::EINVAL);
        assert_eq!(
            errno_for(command::READ, 0, u64::MAX - 4095, 4096),
            errno::EINVAL
        );
    }

    #[test]
    fn write_past_the_end_is_enospc_and_its_payload_skipped() {
        for offset in [BYTES, BYTES - 4096, u64::MAX - 4095] {
            let rejected = check(&header(command::WRITE, 0, offset, 8192), &GEOMETRY).unwrap_err();
            assert_eq!(
                rejected,
                Rejected {
                    errno: errno::ENOSPC,
                    payload: 8192
                }
            );
        }
        assert_eq!(errno_for(command::TRIM, 0, BYTES, 4096), errno::EINVAL);
    }

    #[test]
    fn request_off_the_block_size_is_invalid() {
        assert_eq!(errno_for(command::READ, 0, 512, 4096), errno::EINVAL);
        assert_eq!(errno_for(command::READ, 0, 0, 512), errno::EINVAL);
        assert_eq!(errno_for(command::READ, 0, 0, 0), errno::EINVAL);
    }

    #[test]
    fn request_larger_than_the_payload_limit_is_invalid_and_skipped() {
        let big = Geometry {
            size: Sectors::new(1 << 40),
            ..GEOMETRY
        };
        let rejected = check(
            &header(command::WRITE, 0, 0, PAYLOAD_BYTES_MAX + 4096),
            &big,
        )
        .unwrap_err();
        assert_eq!(
            rejected,
            Rejected {
                errno: errno::EINVAL,
                payload: PAYLOAD_BYTES_MAX + 4096
            }
        );
        assert!(check(&header(command::TRIM, 0, 0, u32::MAX - 4095), &big).is_ok());
    }

    #[test]
    fn request_with_unknown_flag_or_command_is_invalid() {
        assert_eq!(errno_for(command::READ, 1 << 4, 0, 4096), errno::EINVAL);
        assert_eq!(
            errno_for(command::WRITE_ZEROES, 1 << 4, 0, 4096),
            errno::EINVAL
        );
        assert_eq!(
            errno_for(command::WRITE, command::FLAG_DF, 0, 4096),
            errno::EINVAL
        );
        assert_eq!(errno_for(5, 0, 0, 4096), errno::EINVAL);
        assert_eq!(errno_for(8, 0, 0, 4096), errno::EINVAL);
        assert_eq!(
            errno_for(command::BLOCK_STATUS, command::FLAG_DF, 0, 4096),
            errno::EINVAL
        );
        assert_eq!(errno_for(command::FLUSH, 0, 4096, 0), errno::EINVAL);
    }

    #[test]
    fn write_to_a_read_only_export_is_eperm() {
        let geometry = Geometry {
            read_only: true,
            ..GEOMETRY
        };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(
                check(&header(command, 0, 0, 4096), &geometry)
                    .unwrap_err()
                    .errno,
                errno::EPERM
            );
        }
        assert!(check(&header(command::READ, 0, 0, 4096), &geometry).is_ok());
        assert!(check(&header(command::FLUSH, 0, 0, 0), &geometry).is_ok());
    }

    #[test]
    fn info_request_of_wrong_lengths_is_refused() {
        let mut payload = Vec::new();
        payload.put_u32(3);
        payload.extend_from_slice(b"a/b");
        payload.put_u16(1);
        payload.put_u16(3);
        assert_eq!(
            InfoRequest::decode(&payload),
            Some(InfoRequest { name: "a/b" })
        );
        for len in 0..payload.len() {
            assert_eq!(InfoRequest::decode(&payload[..len]), None);
        }
        payload.push(0);
        assert_eq!(InfoRequest::decode(&payload), None);
        assert_eq!(InfoRequest::decode(&[0xff; 8]), None);
        assert_eq!(
            decode_meta_query(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
            None
        );
    }

    #[test]
    fn reply_heads_have_the_lengths_of_the_protocol() {
        assert_eq!(ReplyHead::simple(1, 0).bytes().len(), 16);
        assert_eq!(ReplyHead::data(1, 2, 3).bytes().len(), 28);
        assert_eq!(ReplyHead::error(1, 5).bytes().len(), 26);
        assert_eq!(
            &ReplyHead::data(1, 2, 4096).bytes()[16..20],
            &[0, 0, 0x10, 0x08]
        );
    }

    proptest! {
        #[test]
        fn any_request_is_refused_or_inside_the_export(
            flags: u16, command in 0_u16..9, offset: u64, len: u32, small: bool,
        ) {
            let offset = if small { offset % (2 * BYTES) / 4096 * 4096 } else { offset };
            let len = if small { len % 65536 / 4096 * 4096 } else { len };
            match check(&header(command, flags & 15, offset, len), &GEOMETRY) {
                Ok(Command::Read { range } | Command::Write { range, .. } | Command::Trim { range, .. }
                    | Command::WriteZeroes { range, .. } | Command::Status { range, .. }) => {
                    prop_assert!(!range.is_empty());
                    prop_assert!(range.end.get() <= GEOMETRY.size.get());
                    prop_assert_eq!(range.start.get() * 512, offset);
                    prop_assert_eq!(range.len().bytes(), u64::from(len));
                }
                Ok(Command::Flush | Command::Disconnect) => {}
                Err(rejected) => prop_assert_eq!(rejected.payload, if command == 1 { len } else { 0 }),
            }
        }

        #[test]
        fn any_bytes_as_option_payload_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = InfoRequest::decode(&bytes);
            let _ = decode_meta_query(&bytes);
        }
    }
}
