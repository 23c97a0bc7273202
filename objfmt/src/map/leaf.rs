//! A leaf: up to [`LEAF_ENTRIES_MAX`] entries, coded against the entry before.
//!
//! A leaf has its own dictionary: the (volume, epoch) pairs, then the chunks under each pair, then
//! entries that name a chunk by its number. In RAM an entry takes 24 bytes and a chunk 16, so that
//! even a leaf whose entries are all of different chunks takes 40 bytes an entry.

use crate::error::{FormatError, Result, check_up_to};
use crate::frame::FRAME_STORED_MAX;
use crate::types::{
    ChunkId, ChunkSeq, DataLoc, Epoch, Lba, Location, MapEntry, Sectors, VOLUME_SECTORS_MAX,
    VolumeId,
};
use crate::wire::{Reader, put_u8, put_u32, put_varint, unzigzag, zigzag};

/// Most entries in a leaf.
pub const LEAF_ENTRIES_MAX: usize = 1024;

/// Most bytes of a leaf with its header: a dictionary of as many origins and chunks as it has entries (31 bytes each), and an entry's first
/// byte and six numbers at their longest.
pub(super) const LEAF_BYTES_MAX: usize = 128 << 10;

const WHAT: &str = "map leaf";

/// Bytes of one volume and epoch in the dictionary, and of the count of chunks under it.
const ORIGIN_LEN_MIN: usize = 21;

// Bits of an entry's first byte. An entry without `DATA` has none of those below it.
const ADJACENT: u8 = 1 << 0;
const SAME_LEN: u8 = 1 << 1;
const DATA: u8 = 1 << 2;
const SAME_CHUNK: u8 = 1 << 3;
const RAW_FOLLOWS: u8 = 1 << 4;
const SAME_FRAME: u8 = 1 << 5;
const NEXT_FRAME: u8 = 1 << 6;
const RESERVED: u8 = 1 << 7;
const NEED_SAME_CHUNK: u8 = RAW_FOLLOWS | SAME_FRAME | NEXT_FRAME;

/// Bits of a packed entry's key that name its chunk; the start has the rest.
const CHUNK_BITS: u32 = 13;
const CHUNK_MASK: u64 = (1 << CHUNK_BITS) - 1;
/// Stands for "zeroes" in place of a chunk's number.
const ZERO: u64 = CHUNK_MASK;

const _: () = assert!(VOLUME_SECTORS_MAX << CHUNK_BITS == 0 && VOLUME_SECTORS_MAX >> 51 == 1);
const _: () = assert!((LEAF_ENTRIES_MAX as u64) < ZERO);
const _: () = assert!(size_of::<PackedBody>() == 16 && size_of::<PackedChunk>() == 16);

/// All of an entry but its key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PackedBody {
    len: u32,
    raw: u32,
    stored_offset: u32,
    stored_len: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PackedChunk {
    seq: ChunkSeq,
    origin: u32,
}

/// A decoded leaf: at least one entry, sorted and disjoint.
///
/// Keys lie apart from the rest, and a search starts where the entry would be if all were evenly
/// spread: a lookup touches few cache lines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// An entry's start with its chunk's number below it, so that keys sort as starts do.
    keys: Box<[u64]>,
    bodies: Box<[PackedBody]>,
    chunks: Box<[PackedChunk]>,
    origins: Box<[(VolumeId, Epoch)]>,
}

impl Leaf {
    /// How many entries it has.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a leaf is never empty")]
    pub const fn len(&self) -> usize {
        self.keys.len()
    }

    /// The entry of this number.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<MapEntry> {
        let key = self.keys.get(index)?;
        Some(self.unpack(*key, self.bodies.get(index)?))
    }

    /// The start of the entry of this number.
    #[must_use]
    pub fn start(&self, index: usize) -> Option<Lba> {
        self.keys.get(index).map(|key| Lba::new(key >> CHUNK_BITS))
    }

    /// The number of the first entry that ends behind `lba`; the count of entries if none does.
    #[must_use]
    pub fn find(&self, lba: Lba) -> usize {
        let lba = lba.get();
        if lba >= VOLUME_SECTORS_MAX {
            return self.len();
        }
        let behind = count_up_to(&self.keys, (lba << CHUNK_BITS) | CHUNK_MASK);
        // The last entry that starts at or before `lba`, if it reaches beyond.
        match behind.checked_sub(1) {
            Some(last) if self.end(last) > lba => last,
            _ => behind,
        }
    }

    fn end(&self, index: usize) -> u64 {
        (self.keys[index] >> CHUNK_BITS) + u64::from(self.bodies[index].len)
    }

    /// Its entries, by address.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = MapEntry> + '_ {
        let entries = self.keys.iter().zip(&self.bodies);
        entries.map(|(key, body)| self.unpack(*key, body))
    }

    /// Bytes it takes in RAM.
    #[must_use]
    pub fn ram_bytes(&self) -> usize {
        size_of::<Self>()
            + size_of_val(&*self.keys)
            + size_of_val(&*self.bodies)
            + size_of_val(&*self.chunks)
            + size_of_val(&*self.origins)
    }

    fn unpack(&self, key: u64, body: &PackedBody) -> MapEntry {
        let location = match key & CHUNK_MASK {
            ZERO => Location::Zero,
            number => {
                // The decoder made the number and the origin, both in range.
                let chunk = self.chunks[usize::try_from(number).unwrap_or(usize::MAX)];
                let (volume, epoch) = self.origins[chunk.origin as usize];
                Location::Data(DataLoc {
                    chunk: ChunkId {
                        volume,
                        epoch,
                        seq: chunk.seq,
                    },
                    raw: body.raw,
                    stored_offset: body.stored_offset,
                    stored_len: body.stored_len,
                })
            }
        };
        MapEntry {
            start: Lba::new(key >> CHUNK_BITS),
            len: body.len,
            location,
        }
    }

    /// Decodes the payload of a leaf.
    ///
    /// # Errors
    /// If the bytes are not exactly one sound leaf.
    pub fn decode(payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(payload, WHAT);
        let (origins, chunks) = decode_dictionary(&mut reader)?;
        let count = limited(
            reader.count(1)?,
            "count of entries",
            LEAF_ENTRIES_MAX as u64,
        )?;
        if count == 0 {
            return Err(FormatError::invalid(WHAT, "it has no entry"));
        }
        let mut keys = Vec::with_capacity(count);
        let mut bodies = Vec::with_capacity(count);
        let mut before = Before::default();
        for _ in 0..count {
            let (key, body) = decode_entry(&mut reader, &mut before, chunks.len())?;
            keys.push(key);
            bodies.push(body);
        }
        reader.finish()?;
        Ok(Self {
            keys: keys.into_boxed_slice(),
            bodies: bodies.into_boxed_slice(),
            chunks: chunks.into_boxed_slice(),
            origins: origins.into_boxed_slice(),
        })
    }
}

/// How many of the sorted `keys` are at most `target`: a guess by proportion, then steps away from
/// it that double, then a search of the last step. At worst twice the steps of a plain search.
fn count_up_to(keys: &[u64], target: u64) -> usize {
    let (Some(&first), Some(&last)) = (keys.first(), keys.last()) else {
        return 0;
    };
    if target < first {
        return 0;
    }
    if target >= last {
        return keys.len();
    }
    // Starts without the chunk's bits: 51 bits and 10 of the count do not overflow.
    let part = ((target - first) >> CHUNK_BITS) * keys.len() as u64;
    let guess = part / (((last - first) >> CHUNK_BITS) + 1);
    let guess = usize::try_from(guess).unwrap_or(0).min(keys.len() - 1);
    let mut step = 4;
    // In both cases `low` of the keys are surely counted, and those from `high` on surely not.
    let (low, high) = if keys[guess] <= target {
        let mut low = guess + 1;
        while let Some(&key) = keys.get(low + step)
            && key <= target
        {
            low += step + 1;
            step *= 2;
        }
        (low, keys.len().min(low + step))
    } else {
        let mut high = guess;
        while high > step && keys[high - step] > target {
            high -= step;
            step *= 2;
        }
        (high.saturating_sub(step), high)
    };
    low + keys[low..high].partition_point(|key| *key <= target)
}

fn limited(value: usize, field: &'static str, limit: u64) -> Result<usize> {
    check_up_to(WHAT, field, value as u64, limit)?;
    Ok(value)
}

type Dictionary = (Vec<(VolumeId, Epoch)>, Vec<PackedChunk>);

fn decode_dictionary(reader: &mut Reader<'_>) -> Result<Dictionary> {
    let count = limited(
        reader.count(ORIGIN_LEN_MIN)?,
        "count of origins",
        LEAF_ENTRIES_MAX as u64,
    )?;
    let mut origins = Vec::with_capacity(count);
    let mut chunks = Vec::new();
    for origin in (0u32..).take(count) {
        let volume = VolumeId::from_bytes(reader.array()?);
        let epoch = Epoch::new(reader.u32()?);
        origins.push((volume, epoch));
        let under = reader.count(1)?;
        limited(
            chunks.len().saturating_add(under),
            "count of chunks",
            LEAF_ENTRIES_MAX as u64,
        )?;
        chunks.reserve(under);
        let mut seq: Option<u64> = None;
        for _ in 0..under {
            let step = reader.varint()?;
            let next = match seq {
                None => Some(step),
                Some(last) => step.checked_add(1).and_then(|step| last.checked_add(step)),
            };
            let next =
                next.ok_or_else(|| FormatError::invalid(WHAT, "a chunk's number overflows"))?;
            chunks.push(PackedChunk {
                seq: ChunkSeq::new(next),
                origin,
            });
            seq = Some(next);
        }
    }
    Ok((origins, chunks))
}

/// What an entry is coded against.
#[derive(Clone, Copy, Default)]
struct Before {
    /// End of the entry before.
    end: u64,
    /// Length of the entry before.
    len: u32,
    /// The data entry before, if there is one.
    data: Option<BeforeData>,
}

#[derive(Clone, Copy)]
struct BeforeData {
    chunk: u32,
    /// Where it ends in the chunk's raw space.
    raw_end: u32,
    stored_offset: u32,
    stored_len: u32,
}

fn decode_entry(
    reader: &mut Reader<'_>,
    before: &mut Before,
    chunks: usize,
) -> Result<(u64, PackedBody)> {
    let flags = reader.u8()?;
    if flags & RESERVED != 0 {
        return Err(FormatError::invalid(
            WHAT,
            "an entry has a flag that is not defined",
        ));
    }
    let gap = if flags & ADJACENT != 0 {
        0
    } else {
        reader.varint()?
    };
    let len = if flags & SAME_LEN != 0 {
        before.len
    } else {
        reader.varint_u32()?
    };
    let start = before.end.checked_add(gap);
    let end = start.and_then(|start| start.checked_add(u64::from(len)));
    let (Some(start), Some(end)) = (start, end.filter(|&end| end <= VOLUME_SECTORS_MAX)) else {
        return Err(FormatError::invalid(
            WHAT,
            "an entry ends past the largest volume",
        ));
    };
    if len == 0 {
        return Err(FormatError::invalid(WHAT, "an entry is empty"));
    }
    before.end = end;
    before.len = len;
    if flags & DATA == 0 {
        if flags & (SAME_CHUNK | NEED_SAME_CHUNK) != 0 {
            return Err(FormatError::invalid(
                WHAT,
                "an entry of zeroes has a data flag",
            ));
        }
        let body = PackedBody {
            len,
            raw: 0,
            stored_offset: 0,
            stored_len: 0,
        };
        return Ok(((start << CHUNK_BITS) | ZERO, body));
    }
    let (data, raw) = decode_data(reader, flags, before.data, len)?;
    if data.chunk as usize >= chunks {
        return Err(FormatError::invalid(
            WHAT,
            "an entry names a chunk that is not listed",
        ));
    }
    before.data = Some(data);
    let body = PackedBody {
        len,
        raw,
        stored_offset: data.stored_offset,
        stored_len: data.stored_len,
    };
    Ok(((start << CHUNK_BITS) | u64::from(data.chunk), body))
}

/// Reads the data part of an entry; returns it and its start in the raw space.
fn decode_data(
    reader: &mut Reader<'_>,
    flags: u8,
    before: Option<BeforeData>,
    len: u32,
) -> Result<(BeforeData, u32)> {
    let invalid = |why| FormatError::invalid(WHAT, why);
    let same = if flags & SAME_CHUNK != 0 {
        Some(before.ok_or_else(|| invalid("the first data entry refers to one before it"))?)
    } else if flags & NEED_SAME_CHUNK != 0 {
        return Err(invalid(
            "an entry of another chunk refers to the one before it",
        ));
    } else {
        None
    };
    let chunk = match same {
        Some(data) => data.chunk,
        None => reader.varint_u32()?,
    };
    let raw = match same {
        Some(data) if flags & RAW_FOLLOWS != 0 => data.raw_end,
        _ => reader.varint_u32()?,
    };
    let raw_end = raw
        .checked_add(len)
        .ok_or_else(|| invalid("an entry ends past its chunk's raw space"))?;
    let (stored_offset, stored_len) = match same {
        Some(data) if flags & SAME_FRAME != 0 => {
            if flags & NEXT_FRAME != 0 {
                return Err(invalid("an entry is in the same frame and in the next"));
            }
            (data.stored_offset, data.stored_len)
        }
        _ => {
            let offset = match same {
                Some(data) if flags & NEXT_FRAME != 0 => data
                    .stored_offset
                    .checked_add(data.stored_len)
                    .ok_or_else(|| invalid("a frame ends past 32-bit offsets"))?,
                _ => reader.varint_u32()?,
            };
            let last = before.map_or(0, |data| i64::from(data.stored_len));
            let stored_len = last
                .checked_add(unzigzag(reader.varint()?))
                .and_then(|len| u32::try_from(len).ok())
                .filter(|&len| len > 0 && len as usize <= FRAME_STORED_MAX)
                .filter(|&len| offset.checked_add(len).is_some())
                .ok_or_else(|| invalid("a frame's length is impossible"))?;
            (offset, stored_len)
        }
    };
    let data = BeforeData {
        chunk,
        raw_end,
        stored_offset,
        stored_len,
    };
    Ok((data, raw))
}

/// Checks that `entry` may follow what ends at `after`.
pub(super) fn check_entry(entry: &MapEntry, after: Lba) -> Result<()> {
    let why = if entry.len == 0 {
        "an entry is empty"
    } else if entry.start < after {
        "entries are not sorted and disjoint"
    } else if entry
        .start
        .checked_add(Sectors::new(u64::from(entry.len)))
        .is_none_or(|end| end.get() > VOLUME_SECTORS_MAX)
    {
        "an entry ends past the largest volume"
    } else if let Location::Data(data) = entry.location {
        if data.raw.checked_add(entry.len).is_none() {
            "an entry ends past its chunk's raw space"
        } else if data.stored_len == 0
            || data.stored_len as usize > FRAME_STORED_MAX
            || data.stored_offset.checked_add(data.stored_len).is_none()
        {
            "a frame's length is impossible"
        } else {
            return Ok(());
        }
    } else {
        return Ok(());
    };
    Err(FormatError::invalid(WHAT, why))
}

/// Appends the payload of a leaf: 1 to [`LEAF_ENTRIES_MAX`] entries that passed [`check_entry`].
pub(super) fn encode_leaf(entries: &[MapEntry], out: &mut Vec<u8>) {
    assert!(
        (1..=LEAF_ENTRIES_MAX).contains(&entries.len()),
        "the builder cuts leaves"
    );
    let chunks = encode_dictionary(entries, out);
    put_varint(out, entries.len() as u64);
    let mut before = Before::default();
    for entry in entries {
        encode_entry(entry, &chunks, &mut before, out);
    }
}

/// Appends the dictionary; returns the chunks in the order of their numbers.
fn encode_dictionary(entries: &[MapEntry], out: &mut Vec<u8>) -> Vec<ChunkId> {
    let mut chunks: Vec<ChunkId> = Vec::new();
    for entry in entries {
        if let Location::Data(data) = entry.location
            && chunks.last() != Some(&data.chunk)
        {
            chunks.push(data.chunk);
        }
    }
    chunks.sort_unstable();
    chunks.dedup();
    let origins = || chunks.chunk_by(|a, b| (a.volume, a.epoch) == (b.volume, b.epoch));
    put_varint(out, origins().count() as u64);
    for under in origins() {
        out.extend_from_slice(&under[0].volume.to_bytes());
        put_u32(out, under[0].epoch.get());
        put_varint(out, under.len() as u64);
        put_varint(out, under[0].seq.get());
        for pair in under.windows(2) {
            put_varint(out, pair[1].seq.get() - pair[0].seq.get() - 1);
        }
    }
    chunks
}

fn encode_entry(entry: &MapEntry, chunks: &[ChunkId], before: &mut Before, out: &mut Vec<u8>) {
    let mut flags = 0;
    let start = entry.start.get();
    if start == before.end {
        flags |= ADJACENT;
    }
    if entry.len == before.len {
        flags |= SAME_LEN;
    }
    let mut data = None;
    if let Location::Data(loc) = entry.location {
        flags |= DATA;
        let chunk = chunks
            .binary_search(&loc.chunk)
            .expect("the dictionary was made of these entries");
        let chunk = u32::try_from(chunk).expect("a leaf lists at most 1024 chunks");
        if let Some(last) = before.data.filter(|last| last.chunk == chunk) {
            flags |= SAME_CHUNK;
            if loc.raw == last.raw_end {
                flags |= RAW_FOLLOWS;
            }
            if (loc.stored_offset, loc.stored_len) == (last.stored_offset, last.stored_len) {
                flags |= SAME_FRAME;
            } else if loc.stored_offset == last.stored_offset + last.stored_len {
                flags |= NEXT_FRAME;
            }
        }
        data = Some((chunk, loc));
    }
    put_u8(out, flags);
    if flags & ADJACENT == 0 {
        put_varint(out, start - before.end);
    }
    if flags & SAME_LEN == 0 {
        put_varint(out, u64::from(entry.len));
    }
    before.end = start + u64::from(entry.len);
    before.len = entry.len;
    let Some((chunk, loc)) = data else { return };
    if flags & SAME_CHUNK == 0 {
        put_varint(out, u64::from(chunk));
    }
    if flags & RAW_FOLLOWS == 0 {
        put_varint(out, u64::from(loc.raw));
    }
    if flags & SAME_FRAME == 0 {
        if flags & NEXT_FRAME == 0 {
            put_varint(out, u64::from(loc.stored_offset));
        }
        let last = before.data.map_or(0, |data| i64::from(data.stored_len));
        put_varint(out, zigzag(i64::from(loc.stored_len) - last));
    }
    before.data = Some(BeforeData {
        chunk,
        raw_end: loc.raw + entry.len,
        stored_offset: loc.stored_offset,
        stored_len: loc.stored_len,
    });
}
