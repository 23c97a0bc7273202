//! The index log and what belongs to it: which chunks' sectors lie clean on a cache device, told by one daemon to the next.
//!
//! Byte tables are in `FORMAT.md`. Does not own: where these are kept, in which order they are written, and when they are
//! believed.

use crate::error::{FormatError, Result};
use crate::page::{Kind, Page, Writer, finish, open};
use crate::prologue::{Format, PROLOGUE_LEN};
use crate::types::{CacheId, ChunkId, ChunkSeq, Epoch, Generation, SegmentId, VolumeId};
use crate::wire::{Reader, put_u16, put_u32, put_u64};

/// Bytes that a record of the index log begins with, which tell its length.
pub const INDEX_PREFIX_LEN: usize = PROLOGUE_LEN;
/// Longest owner of a record, in bytes.
pub const INDEX_OWNER_LEN_MAX: usize = 4096;
/// Most runs of a record: a segment's sectors, and more than any has.
pub const INDEX_RUNS_MAX: usize = 1 << 16;

const RUN_LEN: usize = 16 + 4 + 8 + 4 + 4 + 4;
const PLACE_LEN: usize = 4 + 8;

const SESSION: Kind = Kind {
    magic: *b"QYSS",
    what: "session page",
    version: 1,
};
const TABLE: Kind = Kind {
    magic: *b"QYIT",
    what: "index table",
    version: 1,
};
const RECORD: Format = Format {
    magic: *b"QYIR",
    version: 1,
    what: "index record",
    len_max: 4 << 20,
};
const END: Format = Format {
    magic: *b"QYIE",
    version: 1,
    what: "end of an index log",
    len_max: 64 << 20,
};

/// One daemon's time on a cache device, named at random.
pub type Session = [u8; 16];

/// Who has a cache device, or had it last: the page behind its superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionPage {
    /// Which session.
    pub session: Session,
}

impl SessionPage {
    /// Its page on the cache device `cache`.
    #[must_use]
    pub fn encode(&self, cache: CacheId) -> Page {
        let mut page = Writer::new(&SESSION, 0);
        page.put(&[0; 4]);
        page.put(&self.session);
        page.seal(cache)
    }

    /// The session page that `bytes` are, on the cache device `cache`.
    ///
    /// # Errors
    /// If they are none, damaged, or of another cache device.
    pub fn decode(bytes: &[u8], cache: CacheId) -> Result<Self> {
        let (mut reader, reserved) = open(&SESSION, bytes, cache)?;
        check_reserved(SESSION.what, u32::from(reserved) | reader.u32()?)?;
        let session = reader.array()?;
        finish(reader)?;
        Ok(Self { session })
    }
}

/// The first page of an index table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexTableHeader {
    /// How many segments the cache device has.
    pub segments: u32,
    /// The boot of the host in which it was made.
    pub boot: [u8; 16],
    /// The session in which it was made.
    pub session: Session,
}

impl IndexTableHeader {
    /// Its page, for the cache device `cache`.
    #[must_use]
    pub fn encode(&self, cache: CacheId) -> Page {
        let mut page = Writer::new(&TABLE, 0);
        page.put(&self.segments.to_le_bytes());
        page.put(&self.boot);
        page.put(&self.session);
        page.seal(cache)
    }

    /// The header that `bytes` are, for the cache device `cache`.
    ///
    /// # Errors
    /// If they are none, damaged, or of another cache device.
    pub fn decode(bytes: &[u8], cache: CacheId) -> Result<Self> {
        let (mut reader, reserved) = open(&TABLE, bytes, cache)?;
        check_reserved(TABLE.what, reserved.into())?;
        let header = Self {
            segments: reader.u32()?,
            boot: reader.array()?,
            session: reader.array()?,
        };
        finish(reader)?;
        Ok(header)
    }
}

/// A part of a chunk that lies in a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexRun {
    /// The chunk.
    pub chunk: ChunkId,
    /// First sector in the chunk's raw space.
    pub raw: u32,
    /// Sectors; never 0.
    pub len: u32,
    /// Where the first one lies, in sectors from the segment's start.
    pub offset: u32,
}

/// What a segment holds of the store: a record of the index log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IndexRecord {
    /// The cache device.
    pub cache: CacheId,
    /// The segment.
    pub segment: SegmentId,
    /// Which opening of it.
    pub generation: Generation,
    /// In whose store the chunks have their names; at most [`INDEX_OWNER_LEN_MAX`] bytes.
    pub owner: String,
    /// At most [`INDEX_RUNS_MAX`].
    pub runs: Vec<IndexRun>,
}

impl IndexRecord {
    /// Its bytes.
    ///
    /// # Panics
    /// If its owner is too long, or there are too many runs.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = RECORD.begin();
        out.extend_from_slice(&self.cache.to_bytes());
        put_u32(&mut out, self.segment.get());
        put_u64(&mut out, self.generation.get());
        assert!(self.owner.len() <= INDEX_OWNER_LEN_MAX, "a long owner");
        put_u16(
            &mut out,
            u16::try_from(self.owner.len()).expect("4096 at most"),
        );
        out.extend_from_slice(self.owner.as_bytes());
        assert!(self.runs.len() <= INDEX_RUNS_MAX, "too many runs");
        put_u32(
            &mut out,
            u32::try_from(self.runs.len()).expect("65536 at most"),
        );
        for run in &self.runs {
            out.extend_from_slice(&run.chunk.volume.to_bytes());
            put_u32(&mut out, run.chunk.epoch.get());
            put_u64(&mut out, run.chunk.seq.get());
            put_u32(&mut out, run.raw);
            put_u32(&mut out, run.len);
            put_u32(&mut out, run.offset);
        }
        RECORD.seal(&mut out);
        out
    }

    /// The length of the record that begins with these [`INDEX_PREFIX_LEN`] bytes.
    ///
    /// # Errors
    /// If none begins so.
    pub fn encoded_len(prefix: &[u8]) -> Result<usize> {
        RECORD.encoded_len(prefix)
    }

    /// The record that `bytes` are.
    ///
    /// # Errors
    /// If they are none, or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (_, mut reader) = RECORD.open(bytes)?;
        let cache = CacheId::from_bytes(reader.array()?);
        let segment = SegmentId::new(reader.u32()?);
        let generation = Generation::new(reader.u64()?);
        let owner = usize::from(reader.u16()?);
        if owner > INDEX_OWNER_LEN_MAX {
            return Err(FormatError::invalid(RECORD.what, "its owner is too long"));
        }
        let owner = std::str::from_utf8(reader.bytes(owner)?)
            .map_err(|_| FormatError::invalid(RECORD.what, "its owner is no text"))?
            .to_owned();
        let count = count(&mut reader, RUN_LEN)?;
        if count > INDEX_RUNS_MAX {
            return Err(FormatError::invalid(RECORD.what, "it has too many runs"));
        }
        let runs = (0..count).map(|_| read_run(&mut reader));
        let runs = runs.collect::<Result<Vec<_>>>()?;
        reader.finish()?;
        Ok(Self {
            cache,
            segment,
            generation,
            owner,
            runs,
        })
    }
}

fn read_run(reader: &mut Reader<'_>) -> Result<IndexRun> {
    let run = IndexRun {
        chunk: ChunkId {
            volume: VolumeId::from_bytes(reader.array()?),
            epoch: Epoch::new(reader.u32()?),
            seq: ChunkSeq::new(reader.u64()?),
        },
        raw: reader.u32()?,
        len: reader.u32()?,
        offset: reader.u32()?,
    };
    let ends = [run.raw, run.offset].map(|first| first.checked_add(run.len));
    if run.len == 0 || ends.contains(&None) {
        return Err(FormatError::invalid(
            RECORD.what,
            "a run is empty, or ends nowhere",
        ));
    }
    Ok(run)
}

/// Which records of an index log were true when its daemon had ended, all that they name being stable.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IndexEnd {
    /// The cache device.
    pub cache: CacheId,
    /// The session that has ended.
    pub session: Session,
    /// By segment.
    pub segments: Vec<(SegmentId, Generation)>,
}

impl IndexEnd {
    /// Most segments of an end.
    pub const SEGMENTS_MAX: usize = (END.len_max - PROLOGUE_LEN - 36) / PLACE_LEN;

    /// Its bytes.
    ///
    /// # Panics
    /// If it has more than [`Self::SEGMENTS_MAX`] segments.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = END.begin();
        out.extend_from_slice(&self.cache.to_bytes());
        out.extend_from_slice(&self.session);
        put_u32(
            &mut out,
            u32::try_from(self.segments.len()).expect("SEGMENTS_MAX"),
        );
        for (segment, generation) in &self.segments {
            put_u32(&mut out, segment.get());
            put_u64(&mut out, generation.get());
        }
        END.seal(&mut out);
        out
    }

    /// The end that `bytes` are.
    ///
    /// # Errors
    /// If they are none, or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (_, mut reader) = END.open(bytes)?;
        let cache = CacheId::from_bytes(reader.array()?);
        let session = reader.array()?;
        let count = count(&mut reader, PLACE_LEN)?;
        let segments = (0..count).map(|_| {
            let segment = SegmentId::new(reader.u32()?);
            Ok((segment, Generation::new(reader.u64()?)))
        });
        let segments = segments.collect::<Result<Vec<_>>>()?;
        reader.finish()?;
        Ok(Self {
            cache,
            session,
            segments,
        })
    }
}

/// A count of items of `len` bytes each, no more than are left.
fn count(reader: &mut Reader<'_>, len: usize) -> Result<usize> {
    let (what, have) = (reader.what(), reader.remaining() as u64);
    let need = |count: u32| u64::from(count) * len as u64;
    match reader.u32()? {
        count if need(count) + 4 > have => Err(FormatError::Truncated {
            what,
            need: need(count),
            have,
        }),
        count => Ok(count as usize),
    }
}

fn check_reserved(what: &'static str, reserved: u32) -> Result<()> {
    match reserved {
        0 => Ok(()),
        _ => Err(FormatError::invalid(what, "a reserved field is not 0")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CACHE: CacheId = CacheId::from_bytes([3; 16]);

    fn record() -> IndexRecord {
        let run = |seq| IndexRun {
            chunk: ChunkId {
                volume: VolumeId::from_bytes([9; 16]),
                epoch: Epoch::new(4),
                seq: ChunkSeq::new(seq),
            },
            raw: 128,
            len: 128,
            offset: 256,
        };
        IndexRecord {
            cache: CACHE,
            segment: SegmentId::new(5),
            generation: Generation::new(77),
            owner: "acme".to_owned(),
            runs: vec![run(1), run(2)],
        }
    }

    fn end() -> IndexEnd {
        IndexEnd {
            cache: CACHE,
            session: [7; 16],
            segments: vec![(SegmentId::new(5), Generation::new(77))],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = record().encode();
        assert_eq!(
            IndexRecord::encoded_len(&bytes[..INDEX_PREFIX_LEN]),
            Ok(bytes.len())
        );
        assert_eq!(IndexRecord::decode(&bytes), Ok(record()));
        assert_eq!(IndexEnd::decode(&end().encode()), Ok(end()));
        let page = SessionPage { session: [7; 16] };
        assert_eq!(
            SessionPage::decode(&page.encode(CACHE)[..], CACHE),
            Ok(page)
        );
        let header = IndexTableHeader {
            segments: 64,
            boot: [1; 16],
            session: [7; 16],
        };
        assert_eq!(
            IndexTableHeader::decode(&header.encode(CACHE)[..], CACHE),
            Ok(header)
        );
        let other = CacheId::from_bytes([4; 16]);
        assert!(SessionPage::decode(&page.encode(CACHE)[..], other).is_err());
        assert!(IndexTableHeader::decode(&header.encode(CACHE)[..], other).is_err());
    }

    #[test]
    fn run_that_ends_nowhere_is_refused() {
        for change in [
            |run: &mut IndexRun| run.len = 0,
            |run: &mut IndexRun| run.raw = u32::MAX,
            |run: &mut IndexRun| run.offset = u32::MAX - 100,
        ] {
            let mut record = record();
            change(&mut record.runs[1]);
            assert!(IndexRecord::decode(&record.encode()).is_err());
        }
    }

    proptest! {
        #[test]
        fn what_is_cut_off_or_changed_is_refused(at in 0usize..180, bit in 0u8..8) {
            for (whole, is_read) in [
                (record().encode(), (|b: &[u8]| IndexRecord::decode(b).is_ok()) as fn(&[u8]) -> bool),
                (end().encode(), |b| IndexEnd::decode(b).is_ok()),
            ] {
                let at = at % whole.len();
                prop_assert!(!is_read(&whole[..at]));
                let mut changed = whole;
                changed[at] ^= 1 << bit;
                prop_assert!(!is_read(&changed));
            }
        }
    }
}
