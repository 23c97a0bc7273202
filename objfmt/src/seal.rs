//! Seals: what an attach puts where a chunk would come next, to end a log range for ever.
//!
//! A seal is stored create-only under the key of the chunk that was not written. A stalled writer
//! of the old epoch then cannot create that chunk, and learns that it is fenced.

use crate::chunk::{CHUNK_MAGIC, read_id};
use crate::error::{FormatError, Result};
use crate::prologue::{Format, put_str, read_str};
use crate::types::{ChunkId, Epoch};
use crate::wire::{Reader, put_u32, put_u64};

/// Magic of a seal.
pub const SEAL_MAGIC: [u8; 4] = *b"QYSL";

const FORMAT: Format = Format {
    magic: SEAL_MAGIC,
    version: 1,
    what: "seal",
    len_max: 1024,
};

/// The end of a log range.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seal {
    /// The key it lies under: the range's epoch, and the first seq that does not exist in it.
    pub id: ChunkId,
    /// The epoch of the attach that put it there.
    pub by: Epoch,
    /// The host of that attach, for the operator.
    pub by_host: String,
}

impl Seal {
    /// Its bytes. A host name longer than 255 bytes is cut.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode_seal(self.id, self.by, &self.by_host)
    }

    /// The seal under the key of `expect`.
    ///
    /// # Errors
    /// If the bytes are no seal of that place.
    pub fn decode(bytes: &[u8], expect: ChunkId) -> Result<Self> {
        let (_, mut reader) = FORMAT.open(bytes)?;
        let id = read_id(&mut reader, expect)?;
        let by = Epoch::new(reader.u32()?);
        let by_host = read_str(&mut reader)?;
        reader.finish()?;
        if by <= id.epoch {
            return Err(FormatError::invalid(
                FORMAT.what,
                "it was put there by no later epoch",
            ));
        }
        Ok(Self { id, by, by_host })
    }
}

/// A seal's bytes. A host name longer than 255 bytes is cut.
///
/// # Panics
/// If `by` is not later than the epoch it ends.
#[must_use]
pub fn encode_seal(id: ChunkId, by: Epoch, by_host: &str) -> Vec<u8> {
    assert!(by > id.epoch, "only a later epoch seals");
    let mut out = FORMAT.begin();
    out.extend_from_slice(&id.volume.to_bytes());
    put_u32(&mut out, id.epoch.get());
    put_u64(&mut out, id.seq.get());
    put_u32(&mut out, by.get());
    put_str(&mut out, by_host);
    FORMAT.seal(&mut out);
    out
}

/// What can lie under a chunk's key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LogObject {
    /// A chunk.
    Chunk,
    /// The end of the log range.
    Seal,
}

/// Tells chunk and seal apart, by the first 4 bytes or more. Says nothing of their soundness.
///
/// # Errors
/// If they are neither's, or fewer.
pub fn classify(prefix: &[u8]) -> Result<LogObject> {
    const WHAT: &str = "chunk or seal";
    match Reader::new(prefix, WHAT).array()? {
        CHUNK_MAGIC => Ok(LogObject::Chunk),
        SEAL_MAGIC => Ok(LogObject::Seal),
        found => Err(FormatError::Magic { what: WHAT, found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ChunkSeq, VolumeId};

    fn id() -> ChunkId {
        let volume = VolumeId::from_bytes([1; 16]);
        ChunkId {
            volume,
            epoch: Epoch::new(4),
            seq: ChunkSeq::new(9),
        }
    }

    #[test]
    fn seal_round_trips_and_is_told_from_a_chunk() {
        let bytes = encode_seal(id(), Epoch::new(5), "host-a");
        let seal = Seal {
            id: id(),
            by: Epoch::new(5),
            by_host: "host-a".to_owned(),
        };
        assert_eq!(Seal::decode(&bytes, id()), Ok(seal));
        assert_eq!(classify(&bytes), Ok(LogObject::Seal));
        assert_eq!(classify(b"QYCK..."), Ok(LogObject::Chunk));
        assert!(classify(b"QYC").is_err());
        assert!(classify(b"<?xml").is_err());
    }

    #[test]
    fn seal_of_another_place_is_refused() {
        let bytes = encode_seal(id(), Epoch::new(5), "host-a");
        let elsewhere = ChunkId {
            seq: ChunkSeq::new(10),
            ..id()
        };
        assert!(matches!(
            Seal::decode(&bytes, elsewhere),
            Err(FormatError::Misplaced { .. })
        ));
    }

    #[test]
    fn seal_any_flip_or_cut_is_an_error() {
        let bytes = encode_seal(id(), Epoch::new(5), "host-a");
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Seal::decode(&bad, id()).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Seal::decode(&bytes[..len], id()).is_err(), "cut to {len}");
        }
    }
}
