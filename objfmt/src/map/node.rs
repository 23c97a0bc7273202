//! The header every node starts with, and the checksum that binds a node to its place.

use crate::error::{FormatError, Result};
use crate::map::MapObjectId;
use crate::wire::{Reader, put_u8, put_u16, put_u32};

/// First bytes of every node.
pub const NODE_MAGIC: [u8; 4] = *b"QMAP";

/// The version this build writes, and the newest it reads.
pub const NODE_VERSION: u16 = 1;

/// Bytes of a node before its payload.
pub const NODE_HEADER_LEN: usize = 24;

/// Bytes of the header that the checksum covers: all but the checksum itself.
const CHECKED_LEN: usize = NODE_HEADER_LEN - 4;

/// Codec and encryption bytes of a payload stored as it is; no others are defined in version 1.
const PLAIN: u8 = 0;

const WHAT: &str = "map node";

/// What a node's payload is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum NodeKind {
    /// The leaves of one table.
    Index = 1,
    /// Entries.
    Leaf = 2,
    /// The runs of a map.
    Manifest = 3,
    /// Which objects a map needs.
    Usage = 4,
}

impl NodeKind {
    fn from_code(code: u8) -> Result<Self> {
        match code {
            1 => Ok(Self::Index),
            2 => Ok(Self::Leaf),
            3 => Ok(Self::Manifest),
            4 => Ok(Self::Usage),
            _ => Err(FormatError::Unknown {
                what: WHAT,
                field: "kind",
                found: u64::from(code),
            }),
        }
    }

    /// Its name in errors.
    #[must_use]
    pub const fn what(self) -> &'static str {
        match self {
            Self::Index => "map index node",
            Self::Leaf => "map leaf",
            Self::Manifest => "map manifest",
            Self::Usage => "map usage",
        }
    }
}

/// CRC-32C over the node's place, its header up to the checksum, and its stored payload.
fn checksum(id: MapObjectId, offset: u32, header: &[u8], payload: &[u8]) -> u32 {
    let mut place = [0u8; 32];
    place[..16].copy_from_slice(&id.volume.to_bytes());
    place[16..20].copy_from_slice(&id.epoch.get().to_le_bytes());
    place[20..28].copy_from_slice(&id.seq.get().to_le_bytes());
    place[28..].copy_from_slice(&offset.to_le_bytes());
    let crc = crc32c::crc32c(&place);
    let crc = crc32c::crc32c_append(crc, header);
    crc32c::crc32c_append(crc, payload)
}

/// Appends a node to the object `out`; returns its offset and length there.
///
/// # Errors
/// If the object would outgrow 32-bit offsets.
pub(super) fn put_node(
    out: &mut Vec<u8>,
    kind: NodeKind,
    id: MapObjectId,
    payload: &[u8],
) -> Result<(u32, u32)> {
    let too_large = |value: usize| FormatError::TooLarge {
        what: "map object",
        field: "length",
        value: value as u64,
        limit: u64::from(u32::MAX),
    };
    let end = out.len() + NODE_HEADER_LEN + payload.len();
    u32::try_from(end).map_err(|_| too_large(end))?;
    let start = out.len();
    let offset = u32::try_from(start).map_err(|_| too_large(end))?;
    let len = u32::try_from(end - start).map_err(|_| too_large(end))?;
    let payload_len = u32::try_from(payload.len()).map_err(|_| too_large(end))?;

    out.extend_from_slice(&NODE_MAGIC);
    put_u16(out, NODE_VERSION);
    put_u8(out, kind as u8);
    put_u8(out, PLAIN);
    put_u8(out, PLAIN);
    out.extend_from_slice(&[0; 3]);
    put_u32(out, payload_len);
    put_u32(out, payload_len);
    let crc = checksum(id, offset, &out[start..], payload);
    put_u32(out, crc);
    out.extend_from_slice(payload);
    Ok((offset, len))
}

/// Checks that `bytes` are exactly the node stored at `offset` of object `id`; returns what it is
/// and its payload, which no one but this function vouches for.
///
/// # Errors
/// If the bytes are cut short, too many, damaged, of another place or of a newer format.
pub fn open_node(id: MapObjectId, offset: u32, bytes: &[u8]) -> Result<(NodeKind, &[u8])> {
    let mut reader = Reader::new(bytes, WHAT);
    let magic = reader.array::<4>()?;
    if magic != NODE_MAGIC {
        return Err(FormatError::Magic {
            what: WHAT,
            found: magic,
        });
    }
    let version = reader.u16()?;
    if version != NODE_VERSION {
        return Err(FormatError::Version {
            what: WHAT,
            found: version,
            supported: NODE_VERSION,
        });
    }
    let kind = reader.u8()?;
    let codec = reader.u8()?;
    let encryption = reader.u8()?;
    let reserved = reader.array::<3>()?;
    let raw_len = reader.u32()?;
    let stored_len = reader.u32()?;
    let crc = reader.u32()?;
    let payload = reader.bytes(stored_len as usize)?;
    reader.finish()?;
    if checksum(id, offset, &bytes[..CHECKED_LEN], payload) != crc {
        return Err(FormatError::Checksum { what: WHAT });
    }
    let kind = NodeKind::from_code(kind)?;
    let unknown = |field, found: u8| FormatError::Unknown {
        what: kind.what(),
        field,
        found: u64::from(found),
    };
    if codec != PLAIN {
        return Err(unknown("codec", codec));
    }
    if encryption != PLAIN {
        return Err(unknown("encryption", encryption));
    }
    if reserved != [0; 3] {
        return Err(FormatError::invalid(
            kind.what(),
            "a reserved byte is not zero",
        ));
    }
    if raw_len != stored_len {
        return Err(FormatError::invalid(
            kind.what(),
            "the two lengths of a plain payload differ",
        ));
    }
    Ok((kind, payload))
}
