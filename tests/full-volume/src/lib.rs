//! A volume all of whose extents lie in random places of the store, as years of random writes would leave it: its map,
//! its head, and what any part of its chunks says. The data are zeroes, which a store can make up when they are asked for.
//!
//! Owns: nothing; all of it follows from the number of extents. Does not own: a store.

#![forbid(unsafe_code)]

use std::ops::Range;

use quarry_objfmt::map::{
    Basis, ChunkUse, Manifest, MapObjectBuilder, MapObjectId, TableRef, Usage,
};
use quarry_objfmt::{
    ChunkId, ChunkSeq, DataLoc, Epoch, Head, KeyGeneration, Lba, Location, LogRange, MapEntry,
    MapSeq, RootRef, VolumeId, WriteSeq,
};

/// Sectors of a frame, as volumes have it if nobody says otherwise.
pub const FRAME_SECTORS: u32 = 128;
/// A frame as it is stored: nothing is compressed.
const FRAME_BYTES: usize = FRAME_SECTORS as usize * 512 + FRAME_HEADER_LEN;
const FRAME_HEADER_LEN: usize = 16;
/// Sectors of a chunk that the volume needs.
const CHUNK_SECTORS: u32 = (8 << 20) / 512;
/// Where the first frame of a chunk begins.
pub const HEADER_BYTES: u64 = 16 << 10;
/// Length of a chunk without dead sectors.
pub const CHUNK_BYTES: u64 =
    HEADER_BYTES + (CHUNK_SECTORS / FRAME_SECTORS) as u64 * FRAME_BYTES as u64;
/// In which all of it was written.
pub const EPOCH: Epoch = Epoch::new(1);
/// As checkpoints cut them.
const TABLE_BYTES: usize = 8 << 20;

/// Such a volume, written in its first epoch.
#[derive(Clone, Copy, Debug)]
pub struct FullVolume {
    pub id: VolumeId,
    /// How many; a power of two, and as many as a chunk has at least.
    pub extents: u64,
    /// Sectors of each; a power of two, a frame's at most.
    pub extent_sectors: u32,
    /// Sectors of a chunk that nobody needs any more.
    pub dead_sectors: u32,
}

impl FullVolume {
    /// How many extents a chunk has.
    #[must_use]
    pub const fn chunk_extents(&self) -> u64 {
        (CHUNK_SECTORS / self.extent_sectors) as u64
    }

    /// How many chunks there are: numbers from 0 on.
    #[must_use]
    pub const fn chunks(&self) -> u64 {
        self.extents / self.chunk_extents()
    }

    /// The sectors of the volume.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.extents * self.extent_sectors as u64
    }

    const fn chunk(&self, seq: u64) -> ChunkId {
        ChunkId {
            volume: self.id,
            epoch: EPOCH,
            seq: ChunkSeq::new(seq),
        }
    }

    /// Which chunk the n-th extent is in, and where: each chunk has one of every so many neighbours, in an order that looks
    /// random.
    fn place(&self, n: u64) -> (u64, u32) {
        let chunks = self.chunks();
        let slot = n / chunks;
        let mask = chunks - 1;
        let mut at = (n ^ slot.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) & mask;
        for round in [0xb55a_4f09_u64, 0x2c1b_3c6d, 0x297a_2d39] {
            at = (at ^ at >> 5).wrapping_mul(round | 1) & mask;
        }
        (at, u32::try_from(slot).expect("a chunk has few extents"))
    }

    fn entry(&self, n: u64) -> MapEntry {
        let (chunk, slot) = self.place(n);
        let raw = slot * self.extent_sectors;
        let small = |bytes| u32::try_from(bytes).expect("a chunk is small");
        let frame_bytes = small(FRAME_BYTES as u64);
        MapEntry {
            start: Lba::new(n * u64::from(self.extent_sectors)),
            len: self.extent_sectors,
            location: Location::Data(DataLoc {
                chunk: self.chunk(chunk),
                raw,
                stored_offset: small(HEADER_BYTES) + raw / FRAME_SECTORS * frame_bytes,
                stored_len: frame_bytes,
            }),
        }
    }

    /// Its map and its head, made of a head of a volume without a map. Each map object goes to `put` with its number.
    ///
    /// # Errors
    /// What `put` says.
    ///
    /// # Panics
    /// If the numbers of the volume are not as their fields say.
    pub async fn build<E>(
        &self,
        mut head: Head,
        put: impl AsyncFn(MapSeq, Vec<u8>) -> Result<(), E>,
    ) -> Result<Head, E> {
        let is_right = |n: u64| n.is_power_of_two() && n >= self.chunk_extents();
        assert!(is_right(self.extents), "{} extents", self.extents);
        let epoch = EPOCH;
        let (mut tables, mut seq) = (Vec::<TableRef>::new(), MapSeq::ZERO);
        let new = |seq| {
            MapObjectBuilder::new(MapObjectId {
                volume: self.id,
                epoch,
                seq,
            })
        };
        let mut builder = new(seq);
        for n in 0..self.extents {
            builder.push(self.entry(n)).expect("entries go up");
            if builder.table_bytes() >= TABLE_BYTES {
                tables.extend(builder.finish_table().expect("it has entries"));
                let full = std::mem::replace(&mut builder, new(seq.next()));
                put(seq, full.into_bytes()).await?;
                seq = seq.next();
            }
        }
        tables.extend(builder.finish_table().expect("it has entries"));
        let chunks = self.chunks();
        head.epoch = epoch;
        head.root_write = WriteSeq::new(self.extents);
        let data_sectors = CHUNK_SECTORS + self.dead_sectors;
        let used = |n| ChunkUse {
            epoch,
            seq: ChunkSeq::new(n),
            born: MapSeq::ZERO,
            data_sectors,
            needed_sectors: CHUNK_SECTORS,
            stored_bytes: data_sectors * 512,
            generation: KeyGeneration::FIRST,
        };
        let usage = Usage {
            basis: Basis {
                log_end: ChunkSeq::new(chunks),
                ..Basis::of(&head)
            },
            chunks: (0..chunks).map(used).collect(),
            dead: Vec::new(),
        };
        let usage = builder.finish_usage(&usage).expect("a usage list");
        let runs = vec![tables];
        let manifest = builder.finish_manifest(&Manifest { runs });
        let (offset, len) = manifest.expect("a manifest");
        put(seq, builder.into_bytes()).await?;
        head.root = Some(RootRef {
            epoch,
            seq,
            offset,
            len,
            usage: Some(usage),
        });
        head.next_map = seq.next();
        head.log = vec![LogRange {
            epoch,
            first: ChunkSeq::new(chunks),
            end: Some(ChunkSeq::new(chunks)),
        }];
        Ok(head)
    }
}

/// The chunk that a key of a store names.
#[must_use]
pub fn chunk_of_key(key: &str) -> Option<ChunkId> {
    let (before, place) = key.split_once("/chunk/")?;
    let (_, volume) = before.rsplit_once('/')?;
    let (epoch, seq) = place.split_once('/')?;
    Some(ChunkId {
        volume: VolumeId::parse(volume).ok()?,
        epoch: Epoch::new(u32::from_str_radix(epoch, 16).ok()?),
        seq: ChunkSeq::new(u64::from_str_radix(seq, 16).ok()?),
    })
}

/// What a range of a chunk's bytes says, whose frames, all of zeroes, lie from `header` to `end`; `None` if it begins
/// before them.
///
/// # Panics
/// If the range is no part of a chunk.
#[must_use]
pub fn read_frames(chunk: ChunkId, range: Range<u64>, header: u64, end: u64) -> Option<Vec<u8>> {
    let from = usize::try_from(range.start.checked_sub(header)?).expect("a chunk is small");
    let len = usize::try_from(range.end - range.start).expect("a chunk is small");
    let (first, skip) = (from / FRAME_BYTES, from % FRAME_BYTES);
    let needed = (skip + len).div_ceil(FRAME_BYTES);
    let mut bytes = Vec::with_capacity(needed * FRAME_BYTES);
    for index in first..first + needed {
        let left = end - header - (index * FRAME_BYTES) as u64;
        let len = usize::try_from(left).map_or(FRAME_BYTES, |left| left.min(FRAME_BYTES));
        let index = u32::try_from(index).expect("a chunk has few frames");
        push_frame(&mut bytes, chunk, index, len);
    }
    bytes.truncate(skip + len);
    bytes.drain(..skip);
    Some(bytes)
}

/// Frame `index` of a chunk, of so many bytes, all zeroes, as FORMAT.md says.
fn push_frame(out: &mut Vec<u8>, chunk: ChunkId, index: u32, bytes: usize) {
    let content = u32::try_from(bytes - FRAME_HEADER_LEN).expect("a frame is small");
    let begin = out.len();
    out.resize(begin + bytes, 0);
    let frame = &mut out[begin..];
    frame[..4].copy_from_slice(b"QF\x01\0");
    frame[4..8].copy_from_slice(&(content / 512).to_le_bytes());
    frame[8..12].copy_from_slice(&content.to_le_bytes());
    let mut identity = chunk.volume.to_bytes().to_vec();
    identity.extend(chunk.epoch.get().to_le_bytes());
    identity.extend(chunk.seq.get().to_le_bytes());
    identity.extend(index.to_le_bytes());
    let crc = crc32c::crc32c(&identity);
    let crc = crc32c::crc32c_append(crc, &frame[..12]);
    let crc = crc32c::crc32c_append(crc, &frame[FRAME_HEADER_LEN..]);
    frame[12..16].copy_from_slice(&crc.to_le_bytes());
}
