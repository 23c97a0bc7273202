//! Chunks: a header that names extents, then the frames that hold their data.
//!
//! Owns: the header's layout and rules, and how a chunk is made. Does not own: what a frame looks
//! like ([`crate::frame`]), when a chunk is cut or stored. Byte tables are in `FORMAT.md`.
//!
//! Invariants of every header that was decoded or made here: extents are disjoint and inside the
//! largest volume; the data extents, in order, fill the raw space from 0 without a gap; frame
//! number `i` holds raw sectors `i * frame_sectors ..` of it, and frames lie end to end from the
//! header's end to the object's.

use bytes::Bytes;

use crate::codec::{Compression, Compressor, DataKey, KeyGeneration};
use crate::error::{FormatError, Result, check_up_to};
use crate::frame::{FRAME_HEADER_LEN, FRAME_OVERHEAD_MAX, encode_frame, frame_sectors_valid};
use crate::prologue::{Format, PROLOGUE_LEN};
use crate::types::{
    ChunkId, ChunkSeq, DataLoc, Epoch, Lba, Location, MapEntry, SECTOR_SIZE, Sectors,
    VOLUME_SECTORS_MAX, VolumeId, WriteSeq,
};
use crate::wire::{Reader, put_u8, put_u32, put_u64, put_varint, unzigzag, zigzag};

pub use crate::frame::{decode_frame, is_encrypted, open_frame};
pub use crate::seal::{LogObject, Seal, classify, encode_seal};

/// Bytes from which [`ChunkHeader::encoded_len`] tells the header's length.
pub const CHUNK_PREFIX_LEN: usize = PROLOGUE_LEN;
/// Sectors in the raw space of the largest chunk: 64 MiB.
pub const CHUNK_SECTORS_MAX: u32 = 1 << 17;
/// Extents in the largest chunk.
pub const CHUNK_EXTENTS_MAX: usize = 1 << 18;
/// Bytes of the longest header.
pub const CHUNK_HEADER_LEN_MAX: usize = 8 << 20;

/// Magic of a chunk.
pub const CHUNK_MAGIC: [u8; 4] = *b"QYCK";

/// Id, first and last write, frame length, unit, time, generation and number of extents at their longest.
const FIXED_LEN_MAX: usize = PROLOGUE_LEN + 28 + 1 + 1 + 10 + 10 + 10 + 3 + 5;
/// An extent at its longest: start difference (52 bits) and length with kind (34 bits).
const EXTENT_LEN_MAX: usize = 8 + 5;
/// A frame's length at its longest (21 bits).
const FRAME_ENTRY_LEN_MAX: usize = 3;

const _: () = assert!(CHUNK_PREFIX_LEN == 16);
const _: () = assert!(
    FIXED_LEN_MAX
        + CHUNK_EXTENTS_MAX * EXTENT_LEN_MAX
        + CHUNK_SECTORS_MAX as usize * FRAME_ENTRY_LEN_MAX
        <= CHUNK_HEADER_LEN_MAX
);
// The whole object is addressed by 32 bits.
const _: () = assert!(
    CHUNK_HEADER_LEN_MAX as u64
        + CHUNK_SECTORS_MAX as u64 * (SECTOR_SIZE as u64 + FRAME_OVERHEAD_MAX as u64)
        < u32::MAX as u64
);

const WHAT: &str = "chunk header";
const FORMAT: Format = Format {
    magic: CHUNK_MAGIC,
    version: 3,
    what: WHAT,
    len_max: CHUNK_HEADER_LEN_MAX,
};
/// Of a chunk that no later key than its volume's first encrypts.
const FORMAT_KEYLESS: Format = Format {
    version: 2,
    ..FORMAT
};
/// Of one that does not say when it was cut, either.
const FORMAT_TIMELESS: Format = Format {
    version: 1,
    ..FORMAT
};

/// What an extent gives its sectors.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ExtentBody {
    /// Data, from this sector of the chunk's raw space on.
    Data {
        /// The first sector.
        raw: u32,
    },
    /// Zeroes, written.
    Zero,
    /// Zeroes, discarded.
    Discard,
}

/// A run of sectors to which a chunk gives a new content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ChunkExtent {
    /// Its first sector.
    pub start: Lba,
    /// How many; never 0.
    pub len: u32,
    /// The content.
    pub body: ExtentBody,
}

impl ChunkExtent {
    /// The first sector behind it.
    ///
    /// # Panics
    /// On overflow: what is read is checked to end inside a volume, so it is our own mistake.
    #[must_use]
    pub const fn end(&self) -> Lba {
        self.start.add(Sectors::new(self.len as u64))
    }
}

/// Where a frame lies in its chunk's object.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FrameEntry {
    /// Its first byte.
    pub stored_offset: u32,
    /// Its bytes, header and payload.
    pub stored_len: u32,
}

/// All that a chunk says about itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChunkHeader {
    /// Its name.
    pub id: ChunkId,
    /// The oldest write in it.
    pub first_write: WriteSeq,
    /// The newest write in it.
    pub last_write: WriteSeq,
    /// When it was cut, in milliseconds since 1970, and never before the chunk before it in the log; 0 if
    /// it does not say, as in version 1.
    pub cut_ms: u64,
    /// Of the key that encrypts all of its frames; the first, if none does.
    pub generation: KeyGeneration,
    /// Sectors of raw space in each frame but the last, which may hold fewer.
    pub frame_sectors: u32,
    /// Disjoint; data in the order of the raw space.
    pub extents: Vec<ChunkExtent>,
    /// End to end.
    pub frames: Vec<FrameEntry>,
}

/// How to make a chunk.
#[derive(Clone, Copy, Debug)]
pub struct ChunkParams<'a> {
    /// Its name.
    pub id: ChunkId,
    /// The oldest write in it.
    pub first_write: WriteSeq,
    /// The newest write in it.
    pub last_write: WriteSeq,
    /// When it was cut, in milliseconds since 1970; 0 leaves it out.
    pub cut_ms: u64,
    /// Sectors in a frame: a power of two up to [`crate::frame::FRAME_SECTORS_MAX`].
    pub frame_sectors: u32,
    /// Tried for each frame.
    pub compression: Compression,
    /// Encrypts each frame.
    pub key: Option<&'a DataKey>,
}

/// A chunk ready to be stored.
#[derive(Clone, Debug)]
pub struct EncodedChunk {
    /// The whole object.
    pub bytes: Bytes,
    /// What its header says.
    pub header: ChunkHeader,
}

/// Makes a chunk of `extents`, whose data are `raw`, end to end.
///
/// # Panics
/// If the extents break the rules of the module, do not add up to `raw`, or exceed a limit: all
/// of it the plan's own mistake.
#[must_use]
pub fn encode_chunk(params: &ChunkParams<'_>, extents: &[ChunkExtent], raw: &[u8]) -> EncodedChunk {
    let (out, start, header) = encode_chunk_in(Vec::new(), params, extents, &[raw]);
    EncodedChunk {
        bytes: Bytes::from(out).slice(start..),
        header,
    }
}

/// As [`encode_chunk`], in the memory of `out`, whatever was in it, of data in pieces of any length. Answers it, where in it
/// the object begins, which ends where it ends, and what its header says.
///
/// # Panics
/// As [`encode_chunk`].
#[must_use]
pub fn encode_chunk_in(
    mut out: Vec<u8>,
    params: &ChunkParams<'_>,
    extents: &[ChunkExtent],
    raw: &[&[u8]],
) -> (Vec<u8>, usize, ChunkHeader) {
    assert!(
        frame_sectors_valid(params.frame_sectors),
        "{} sectors a frame",
        params.frame_sectors
    );
    assert!(
        params.first_write <= params.last_write,
        "the writes are in the wrong order"
    );
    let raw_sectors = check_extents(extents).unwrap_or_else(|error| panic!("{error}"));
    let raw_len: usize = raw.iter().map(|piece| piece.len()).sum();
    assert_eq!(
        raw_sectors as usize * SECTOR_SIZE as usize,
        raw_len,
        "the data are not the extents'"
    );

    // Frames are made behind a gap that holds the longest header, the header is then put right in
    // front of them: nothing is copied twice.
    let frame_len = params.frame_sectors as usize * SECTOR_SIZE as usize;
    let frame_count = raw_len.div_ceil(frame_len);
    let gap = FIXED_LEN_MAX + extents.len() * EXTENT_LEN_MAX + frame_count * FRAME_ENTRY_LEN_MAX;
    out.clear();
    out.reserve(gap + raw_len + frame_count * FRAME_OVERHEAD_MAX);
    out.resize(gap, 0);
    let mut compressor = Compressor::new(params.compression);
    let sealer = params.key.map(|key| key.sealer(params.id));
    let mut frames = Vec::with_capacity(frame_count);
    let mut contents = Contents::new(raw);
    for index in 0..u32::try_from(frame_count).expect("a chunk is below 4 GiB") {
        let content = contents.next(frame_len);
        let stored_offset = u32::try_from(out.len() - gap).expect("a chunk is below 4 GiB");
        let stored_len = encode_frame(
            &mut out,
            params.id,
            index,
            content,
            &mut compressor,
            sealer.as_ref(),
        );
        frames.push(FrameEntry {
            stored_offset,
            stored_len,
        });
    }

    let mut header = ChunkHeader {
        id: params.id,
        first_write: params.first_write,
        last_write: params.last_write,
        cut_ms: params.cut_ms,
        generation: params.key.map_or(KeyGeneration::FIRST, DataKey::generation),
        frame_sectors: params.frame_sectors,
        extents: extents.to_vec(),
        frames,
    };
    let encoded = header.encode();
    let start = gap
        .checked_sub(encoded.len())
        .expect("the gap holds the longest header");
    out[start..gap].copy_from_slice(&encoded);
    let header_len = u32::try_from(encoded.len()).expect("a header is at most 8 MiB");
    for frame in &mut header.frames {
        frame.stored_offset += header_len;
    }
    (out, start, header)
}

/// Data in pieces, taken out by the length of a frame.
struct Contents<'a> {
    piece: &'a [u8],
    behind: std::slice::Iter<'a, &'a [u8]>,
    /// A frame's content that lies in several pieces, put together.
    whole: Vec<u8>,
}

impl<'a> Contents<'a> {
    fn new(pieces: &'a [&'a [u8]]) -> Self {
        Self {
            piece: &[],
            behind: pieces.iter(),
            whole: Vec::new(),
        }
    }

    /// The next `len` bytes, or as many as there are.
    fn next(&mut self, len: usize) -> &[u8] {
        self.whole.clear();
        loop {
            let missing = len - self.whole.len();
            let is_last = self.behind.as_slice().is_empty();
            let (part, rest) = self.piece.split_at(self.piece.len().min(missing));
            self.piece = rest;
            let is_all = part.len() == missing || is_last;
            if is_all && self.whole.is_empty() {
                return part;
            }
            self.whole.extend_from_slice(part);
            if is_all {
                return &self.whole;
            }
            self.piece = self.behind.next().copied().unwrap_or_default();
        }
    }
}

impl ChunkHeader {
    /// How many bytes the header has, by the object's first [`CHUNK_PREFIX_LEN`].
    ///
    /// # Errors
    /// If they are no chunk's, or fewer.
    pub fn encoded_len(prefix: &[u8]) -> Result<usize> {
        FORMAT.encoded_len(prefix)
    }

    /// Sectors in the raw space.
    #[must_use]
    pub fn raw_len(&self) -> Sectors {
        let data = self
            .extents
            .iter()
            .filter(|extent| matches!(extent.body, ExtentBody::Data { .. }));
        Sectors::new(data.map(|extent| u64::from(extent.len)).sum())
    }

    /// Bytes in the whole object.
    #[must_use]
    pub fn object_len(&self) -> u64 {
        match self.frames.last() {
            Some(last) => u64::from(last.stored_offset) + u64::from(last.stored_len),
            None => self.encode().len() as u64,
        }
    }

    /// The extents as entries of the map, in their order: data cut at the frames' boundaries,
    /// zeroes and discards both as [`Location::Zero`].
    ///
    /// # Panics
    /// If the header was put together by hand and breaks the rules of the module.
    #[must_use]
    pub fn map_entries(&self) -> Vec<MapEntry> {
        let mut entries = Vec::with_capacity(self.extents.len() + self.frames.len());
        for extent in &self.extents {
            let ExtentBody::Data { mut raw } = extent.body else {
                let (start, len) = (extent.start, extent.len);
                entries.push(MapEntry {
                    start,
                    len,
                    location: Location::Zero,
                });
                continue;
            };
            let mut start = extent.start;
            let mut left = extent.len;
            while left > 0 {
                let len = left.min(self.frame_sectors - raw % self.frame_sectors);
                let FrameEntry {
                    stored_offset,
                    stored_len,
                } = self.frames[(raw / self.frame_sectors) as usize];
                let data = DataLoc {
                    chunk: self.id,
                    raw,
                    stored_offset,
                    stored_len,
                };
                entries.push(MapEntry {
                    start,
                    len,
                    location: Location::Data(data),
                });
                start = start.add(Sectors::new(len.into()));
                raw += len;
                left -= len;
            }
        }
        entries
    }

    /// The bytes of the header, with the prologue. Offsets of frames are not written: they follow.
    ///
    /// # Panics
    /// If the header was put together by hand and breaks the rules of the module.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let keyed = self.generation > KeyGeneration::FIRST;
        let format = match self.cut_ms {
            _ if keyed => &FORMAT,
            0 => &FORMAT_TIMELESS,
            _ => &FORMAT_KEYLESS,
        };
        let mut out = format.begin();
        out.extend_from_slice(&self.id.volume.to_bytes());
        put_u32(&mut out, self.id.epoch.get());
        put_u64(&mut out, self.id.seq.get());
        put_u8(&mut out, log2(self.frame_sectors));
        let shift = common_shift(&self.extents);
        put_u8(&mut out, shift);
        put_varint(&mut out, self.first_write.get());
        put_varint(&mut out, self.last_write.get() - self.first_write.get());
        if self.cut_ms > 0 || keyed {
            put_varint(&mut out, self.cut_ms);
        }
        if keyed {
            put_varint(&mut out, self.generation.get().into());
        }
        put_varint(&mut out, self.extents.len() as u64);
        let mut expected = 0;
        for extent in &self.extents {
            let start = extent.start.get() >> shift;
            let len = u64::from(extent.len >> shift);
            put_varint(&mut out, zigzag(start.cast_signed() - expected));
            put_varint(&mut out, len << 2 | kind(extent.body));
            expected = (start + len).cast_signed();
        }
        for frame in &self.frames {
            put_varint(&mut out, frame.stored_len.into());
        }
        format.seal(&mut out);
        out
    }

    /// The header that the chunk `expect` begins with; bytes behind the header are ignored.
    ///
    /// # Errors
    /// If it is damaged, cut short, or another chunk's.
    pub fn decode(bytes: &[u8], expect: ChunkId) -> Result<Self> {
        let (version, mut reader) = FORMAT.open_leading(bytes)?;
        let header_len = FORMAT.encoded_len(bytes)?;
        let id = read_id(&mut reader, expect)?;
        let frame_shift = reader.u8()?;
        let frame_sectors = 1u32.checked_shl(frame_shift.into()).unwrap_or(0);
        if !frame_sectors_valid(frame_sectors) {
            return Err(FormatError::invalid(
                WHAT,
                "the frame length is out of range",
            ));
        }
        let shift = reader.u8()?;
        let first = reader.varint()?;
        let last = first.checked_add(reader.varint()?);
        let last = last.ok_or(FormatError::invalid(
            WHAT,
            "a write's number does not fit 64 bits",
        ))?;
        WriteSeq::new(last).check(WHAT)?;
        let cut_ms = match version {
            1 => 0,
            _ => reader.varint()?,
        };
        if version == 2 && cut_ms == 0 {
            return Err(FormatError::invalid(WHAT, "it says no time"));
        }
        let generation = match version {
            1 | 2 => KeyGeneration::FIRST,
            _ => KeyGeneration::read_later(&mut reader)?,
        };
        let extents = read_extents(&mut reader, shift)?;
        let raw_sectors = check_extents(&extents)?;
        let frames = read_frames(&mut reader, header_len, raw_sectors, frame_sectors)?;
        reader.finish()?;
        let (first_write, last_write) = (WriteSeq::new(first), WriteSeq::new(last));
        Ok(Self {
            id,
            first_write,
            last_write,
            cut_ms,
            generation,
            frame_sectors,
            extents,
            frames,
        })
    }
}

/// Reads a chunk's name, which must be `expect`.
pub(crate) fn read_id(reader: &mut Reader<'_>, expect: ChunkId) -> Result<ChunkId> {
    let what = reader.what();
    let volume = VolumeId::from_bytes(reader.array()?);
    let epoch = Epoch::new(reader.u32()?);
    let seq = ChunkSeq::new(reader.u64()?);
    if volume != expect.volume {
        return Err(FormatError::Misplaced {
            what,
            field: "volume",
        });
    }
    if epoch != expect.epoch {
        return Err(FormatError::Misplaced {
            what,
            field: "epoch",
        });
    }
    if seq != expect.seq {
        return Err(FormatError::Misplaced {
            what,
            field: "place in the log",
        });
    }
    Ok(expect)
}

fn read_extents(reader: &mut Reader<'_>, shift: u8) -> Result<Vec<ChunkExtent>> {
    const OUTSIDE: FormatError = FormatError::invalid(WHAT, "an extent lies outside any volume");
    if shift > 31 {
        return Err(FormatError::invalid(
            WHAT,
            "the unit of extents is out of range",
        ));
    }
    // An extent takes two bytes or more, so the count is bounded by what is there.
    let count = reader.count(2)?;
    let limit = CHUNK_EXTENTS_MAX as u64;
    check_up_to(WHAT, "number of extents", count as u64, limit)?;
    let mut extents = Vec::with_capacity(count);
    let mut expected = 0i64;
    let mut raw = 0u32;
    for _ in 0..count {
        let difference = unzigzag(reader.varint()?);
        let coded = reader.varint()?;
        let start = expected
            .checked_add(difference)
            .and_then(|start| u64::try_from(start).ok());
        let start = start
            .filter(|start| *start <= VOLUME_SECTORS_MAX >> shift)
            .ok_or(OUTSIDE)?;
        let len = coded >> 2;
        if len > u64::from(u32::MAX >> shift) {
            return Err(OUTSIDE);
        }
        expected = (start + len).cast_signed();
        let Ok(sectors) = u32::try_from(len << shift) else {
            return Err(OUTSIDE);
        };
        let body = match coded & 3 {
            0 => {
                let body = ExtentBody::Data { raw };
                raw = raw.saturating_add(sectors);
                body
            }
            1 => ExtentBody::Zero,
            2 => ExtentBody::Discard,
            found => {
                return Err(FormatError::Unknown {
                    what: WHAT,
                    field: "kind of extent",
                    found,
                });
            }
        };
        extents.push(ChunkExtent {
            start: Lba::new(start << shift),
            len: sectors,
            body,
        });
    }
    Ok(extents)
}

fn read_frames(
    reader: &mut Reader<'_>,
    header_len: usize,
    raw_sectors: u32,
    frame_sectors: u32,
) -> Result<Vec<FrameEntry>> {
    const TOO_LONG: FormatError = FormatError::invalid(WHAT, "the object is longer than 4 GiB");
    let count = raw_sectors.div_ceil(frame_sectors) as usize;
    if count > reader.remaining() {
        let (need, have) = (count as u64, reader.remaining() as u64);
        return Err(FormatError::Truncated {
            what: WHAT,
            need,
            have,
        });
    }
    let longest = frame_sectors as usize * SECTOR_SIZE as usize + FRAME_OVERHEAD_MAX;
    let mut frames = Vec::with_capacity(count);
    let mut stored_offset = u32::try_from(header_len).map_err(|_| TOO_LONG)?;
    for _ in 0..count {
        let stored_len = reader.varint_u32()?;
        if stored_len as usize <= FRAME_HEADER_LEN || stored_len as usize > longest {
            return Err(FormatError::invalid(
                WHAT,
                "a frame's length is out of range",
            ));
        }
        frames.push(FrameEntry {
            stored_offset,
            stored_len,
        });
        stored_offset = stored_offset.checked_add(stored_len).ok_or(TOO_LONG)?;
    }
    Ok(frames)
}

/// Checks all rules that extents obey, and answers the sectors of raw space they fill.
fn check_extents(extents: &[ChunkExtent]) -> Result<u32> {
    let limit = CHUNK_EXTENTS_MAX as u64;
    check_up_to(WHAT, "number of extents", extents.len() as u64, limit)?;
    let mut raw_sectors = 0u32;
    let mut runs = Vec::with_capacity(extents.len());
    for extent in extents {
        let start = extent.start.get();
        let end = start
            .checked_add(extent.len.into())
            .filter(|end| *end <= VOLUME_SECTORS_MAX);
        let Some(end) = end else {
            return Err(FormatError::invalid(
                WHAT,
                "an extent lies outside any volume",
            ));
        };
        if extent.len == 0 {
            return Err(FormatError::invalid(WHAT, "an extent is empty"));
        }
        if let ExtentBody::Data { raw } = extent.body {
            if raw != raw_sectors {
                return Err(FormatError::invalid(WHAT, "the data are not end to end"));
            }
            raw_sectors = raw_sectors.saturating_add(extent.len);
            let limit = CHUNK_SECTORS_MAX.into();
            check_up_to(WHAT, "raw length", raw_sectors.into(), limit)?;
        }
        runs.push((start, end));
    }
    runs.sort_unstable();
    if runs.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(FormatError::invalid(WHAT, "two extents overlap"));
    }
    Ok(raw_sectors)
}

/// The largest power of two that all starts and lengths are multiples of, as its exponent.
fn common_shift(extents: &[ChunkExtent]) -> u8 {
    let bits = extents
        .iter()
        .fold(1 << 31, |bits, e| bits | e.start.get() | u64::from(e.len));
    u8::try_from(bits.trailing_zeros()).expect("at most 31")
}

fn log2(power: u32) -> u8 {
    u8::try_from(power.trailing_zeros()).expect("at most 32")
}

const fn kind(body: ExtentBody) -> u64 {
    match body {
        ExtentBody::Data { .. } => 0,
        ExtentBody::Zero => 1,
        ExtentBody::Discard => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::DataKeys;
    use proptest::prelude::*;

    fn id() -> ChunkId {
        let volume = VolumeId::from_bytes([6; 16]);
        ChunkId {
            volume,
            epoch: Epoch::new(1),
            seq: ChunkSeq::new(2),
        }
    }

    fn params(frame_sectors: u32) -> ChunkParams<'static> {
        ChunkParams {
            id: id(),
            first_write: WriteSeq::new(100),
            last_write: WriteSeq::new(163),
            cut_ms: 1_700_000_000_000,
            frame_sectors,
            compression: Compression::Lz4,
            key: None,
        }
    }

    fn data(start: u64, len: u32, raw: u32) -> ChunkExtent {
        ChunkExtent {
            start: Lba::new(start),
            len,
            body: ExtentBody::Data { raw },
        }
    }

    fn zero(start: u64, len: u32) -> ChunkExtent {
        ChunkExtent {
            start: Lba::new(start),
            len,
            body: ExtentBody::Zero,
        }
    }

    /// Disjoint extents in any order, aligned to some power of two.
    fn any_extents() -> impl Strategy<Value = Vec<ChunkExtent>> {
        let runs = prop::collection::vec((0u64..1 << 20, 1u32..12, 0u8..4), 0..24);
        (runs, 0u32..5).prop_flat_map(|(runs, shift)| {
            let mut at = 0;
            let mut placed = Vec::new();
            for (gap, len, kind) in runs {
                at += gap << shift;
                placed.push((at, len << shift, kind));
                at += u64::from(len << shift);
            }
            Just(placed).prop_shuffle().prop_map(|placed| {
                let mut next = 0;
                let extent = |(start, len, kind)| {
                    let body = match kind {
                        0 => ExtentBody::Zero,
                        1 => ExtentBody::Discard,
                        _ => {
                            next += len;
                            ExtentBody::Data { raw: next - len }
                        }
                    };
                    ChunkExtent {
                        start: Lba::new(start),
                        len,
                        body,
                    }
                };
                placed.into_iter().map(extent).collect()
            })
        })
    }

    /// Different content for each sector.
    fn content(extents: &[ChunkExtent]) -> Vec<u8> {
        let sectors = check_extents(extents).unwrap();
        let mut raw = vec![0x5a; sectors as usize * 512];
        for (sector, content) in (0u32..).zip(raw.chunks_exact_mut(512)) {
            content[..4].copy_from_slice(&sector.to_le_bytes());
        }
        raw
    }

    proptest! {
        #[test]
        fn chunk_any_extents_round_trip_and_every_entry_leads_to_its_data(
            extents in any_extents(),
            frame_shift in 0u32..8,
            generation in prop_oneof![0u16..3, any::<u16>()],
            cut_ms in prop_oneof![Just(0), any::<u64>()],
        ) {
            let key = KeyGeneration::new(generation).map(|g| DataKey::of_generation([1; 32], g));
            let keys = key.as_ref().map(|key| DataKeys::one(id().volume, key.clone()));
            let raw = content(&extents);
            let params = ChunkParams { key: key.as_ref(), cut_ms, ..params(1 << frame_shift) };
            let chunk = encode_chunk(&params, &extents, &raw);
            let len = ChunkHeader::encoded_len(&chunk.bytes[..CHUNK_PREFIX_LEN]).unwrap();
            let header = ChunkHeader::decode(&chunk.bytes[..len], id()).unwrap();
            prop_assert_eq!(&header, &chunk.header);
            prop_assert_eq!(&header.extents, &extents);
            prop_assert_eq!(header.object_len(), chunk.bytes.len() as u64);
            prop_assert_eq!(header.raw_len().bytes(), raw.len() as u64);

            let mut entries = header.map_entries().into_iter();
            for extent in &extents {
                let mut at = extent.start;
                while at < extent.end() {
                    let entry = entries.next().unwrap();
                    prop_assert_eq!(entry.start, at);
                    let ExtentBody::Data { raw: first } = extent.body else {
                        prop_assert_eq!(entry.location, Location::Zero);
                        prop_assert_eq!(entry.len, extent.len);
                        break;
                    };
                    let Location::Data(loc) = entry.location else { panic!("no data") };
                    prop_assert_eq!(u64::from(loc.raw - first), at.since(extent.start).get());
                    let stored = &chunk.bytes[loc.stored_offset as usize..][..loc.stored_len as usize];
                    let index = loc.raw / params.frame_sectors;
                    let frame = decode_frame(stored, loc.chunk, index, params.frame_sectors, keys.as_ref());
                    let frame = frame.unwrap();
                    let skip = (loc.raw % params.frame_sectors) as usize * 512;
                    let len = entry.len as usize * 512;
                    prop_assert_eq!(&frame[skip..skip + len], &raw[loc.raw as usize * 512..][..len]);
                    at = at.add(Sectors::new(entry.len.into()));
                }
            }
            prop_assert!(entries.next().is_none());
        }

        #[test]
        fn header_any_flip_or_cut_is_an_error(
            extents in any_extents(),
            at: prop::sample::Index,
            bit in 0u8..8,
        ) {
            let chunk = encode_chunk(&params(8), &extents, &content(&extents));
            let len = ChunkHeader::encoded_len(&chunk.bytes).unwrap();
            let at = at.index(len);
            let mut bad = chunk.bytes[..len].to_vec();
            bad[at] ^= 1 << bit;
            prop_assert!(ChunkHeader::decode(&bad, id()).is_err());
            prop_assert!(ChunkHeader::decode(&chunk.bytes[..at], id()).is_err());
        }

        #[test]
        fn header_any_bytes_under_a_right_checksum_never_panic(
            extents in any_extents(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let chunk = encode_chunk(&params(8), &extents, &content(&extents));
            let len = ChunkHeader::encoded_len(&chunk.bytes).unwrap();
            let mut bad = chunk.bytes[..len].to_vec();
            // Behind the prologue and the id, which would only be refused.
            for (at, value) in changes {
                let at = 44 + at.index(len - 44);
                bad[at] = value;
            }
            FORMAT.seal(&mut bad);
            if let Ok(header) = ChunkHeader::decode(&bad, id()) {
                prop_assert!(header.map_entries().len() >= header.extents.len());
            }
        }

        #[test]
        fn header_random_tail_under_a_right_checksum_never_panics(tail: Vec<u8>) {
            let mut bad = FORMAT.begin();
            bad.extend_from_slice(&id().volume.to_bytes());
            put_u32(&mut bad, id().epoch.get());
            put_u64(&mut bad, id().seq.get());
            bad.extend_from_slice(&tail);
            FORMAT.seal(&mut bad);
            let _ = ChunkHeader::decode(&bad, id());
        }
    }

    #[test]
    fn chunk_is_the_same_in_whatever_pieces_its_data_are() {
        let extents = [data(0, 100, 0), data(200, 33, 100)];
        let raw = content(&extents);
        for compression in [Compression::None, Compression::Lz4] {
            let params = ChunkParams {
                compression,
                ..params(8)
            };
            let whole = encode_chunk(&params, &extents, &raw);
            for len in [1, 512, 4096, 5000, 100 * 512, raw.len()] {
                let mut pieces: Vec<&[u8]> = raw.chunks(len).collect();
                pieces.insert(pieces.len() / 2, &[]);
                let (out, start, header) = encode_chunk_in(vec![9; 77], &params, &extents, &pieces);
                assert_eq!(&out[start..], &whole.bytes[..], "pieces of {len}");
                assert_eq!(header, whole.header);
            }
        }
    }

    #[test]
    fn header_of_random_4k_extents_takes_at_most_ten_bytes_each() {
        // 1024 blocks strewn over 1 EiB: the worst that 4 KiB writes can do.
        let mut seed = 1u64;
        let mut starts = std::collections::BTreeSet::new();
        while starts.len() < 1024 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            starts.insert((seed >> 16) << 3);
        }
        let mut starts: Vec<u64> = starts.into_iter().collect();
        starts.sort_by_key(|start| start.reverse_bits());
        let extents: Vec<_> = (0u32..)
            .zip(starts)
            .map(|(i, at)| data(at, 8, i * 8))
            .collect();
        let chunk = encode_chunk(&params(128), &extents, &content(&extents));
        let len = ChunkHeader::encoded_len(&chunk.bytes).unwrap();
        let frames = chunk.header.frames.len() * 3;
        let each = (len - FIXED_LEN_MAX - frames) as f64 / 1024.0;
        assert!(each <= 10.0, "{each} bytes");
    }

    #[test]
    fn header_without_its_time_is_of_version_1_and_one_that_says_none_is_refused() {
        let timeless = ChunkParams {
            cut_ms: 0,
            ..params(128)
        };
        let old = encode_chunk(&timeless, &[zero(0, 8)], &[]).bytes;
        assert_eq!(old[4], 1);
        assert_eq!(ChunkHeader::decode(&old, id()).unwrap().cut_ms, 0);
        let new = encode_chunk(&params(128), &[zero(0, 8)], &[]).bytes;
        assert_eq!((new[4], new.len()), (2, old.len() + 6));
        // The time lies behind the two numbers of writes.
        let mut none = old[..48].to_vec();
        none.push(0);
        none.extend_from_slice(&old[48..]);
        none[4] = 2;
        FORMAT.seal(&mut none);
        let refused = ChunkHeader::decode(&none, id()).unwrap_err().to_string();
        assert!(refused.contains("no time"), "{refused}");
    }

    #[test]
    fn chunk_without_data_is_its_header_alone() {
        let extents = [zero(0, u32::MAX), zero(1 << 40, 8)];
        let chunk = encode_chunk(&params(128), &extents, &[]);
        assert_eq!(
            ChunkHeader::encoded_len(&chunk.bytes),
            Ok(chunk.bytes.len())
        );
        assert_eq!(chunk.header.object_len(), chunk.bytes.len() as u64);
        assert_eq!(ChunkHeader::decode(&chunk.bytes, id()), Ok(chunk.header));
    }

    #[test]
    fn chunk_extent_at_the_end_of_the_largest_volume_round_trips() {
        let extents = [data(VOLUME_SECTORS_MAX - 1, 1, 0), data(0, 1, 1)];
        let chunk = encode_chunk(&params(128), &extents, &content(&extents));
        assert_eq!(ChunkHeader::decode(&chunk.bytes, id()), Ok(chunk.header));
    }

    #[test]
    fn header_of_another_chunk_is_refused() {
        let chunk = encode_chunk(&params(128), &[zero(0, 8)], &[]);
        let other = ChunkId {
            seq: ChunkSeq::new(3),
            ..id()
        };
        let refused = ChunkHeader::decode(&chunk.bytes, other);
        let field = "place in the log";
        assert_eq!(
            refused,
            Err(FormatError::Misplaced {
                what: "chunk header",
                field
            })
        );
    }

    #[test]
    fn extents_that_break_a_rule_are_refused() {
        let cases: [(&[ChunkExtent], &str); 6] = [
            (&[zero(0, 9), zero(8, 1)], "overlap"),
            (&[zero(8, 1), data(0, 9, 0)], "overlap"),
            (&[zero(8, 0)], "empty"),
            (&[data(0, 1, 1)], "end to end"),
            (&[zero(VOLUME_SECTORS_MAX, 1)], "outside"),
            (&[data(0, CHUNK_SECTORS_MAX + 1, 0)], "limit"),
        ];
        for (extents, word) in cases {
            let error = check_extents(extents).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    #[should_panic(expected = "not the extents'")]
    fn chunk_of_data_that_do_not_add_up_panics() {
        let _ = encode_chunk(&params(128), &[data(0, 2, 0)], &[0; 512]);
    }
}
