//! A fixed number of operations of the codecs, for counting instructions under callgrind:
//! `tests/bench/instructions`.
//!
//! usage: `formats WORK COUNT`; without arguments, the works and a count for each. All that is random repeats.

#![allow(
    clippy::cast_possible_truncation,
    reason = "the world of this bench is small"
)]

use std::hint::black_box;

use quarry_objfmt::map::{MapObjectBuilder, MapObjectId};
use quarry_objfmt::{
    CacheId, ChunkExtent, ChunkHeader, ChunkId, ChunkParams, ChunkSeq, Compression, DataKey,
    DataKeys, DataLoc, Epoch, ExtentBody, Generation, JournalHeader, Lba, Location, MapEntry,
    MapSeq, RECORDS_PER_PAGE, Record, RecordBody, RecordPage, SegmentId, VolumeId, WriteSeq,
    decode_frame, encode_chunk,
};

/// Bytes of a block, the unit of all writes here.
const BLOCK: usize = 4096;

/// Blocks of a frame.
const FRAME_BLOCKS: u64 = 16;

/// Blocks of a chunk: 8 MiB.
const CHUNK_BLOCKS: u64 = 2048;

const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
const CACHE: CacheId = CacheId::from_bytes([8; 16]);
const CHUNK: ChunkId = ChunkId {
    volume: VOLUME,
    epoch: Epoch::new(1),
    seq: ChunkSeq::new(5),
};

/// Its name, how many operations make a measure, and the work.
type Work = (&'static str, u64, fn(u64));

const WORKS: [Work; 12] = [
    ("journal entry, encode", 20_480, journal_encode),
    ("record page, encode, a record", 20_200, records_encode),
    ("chunk, encode, plain, a 4 KiB extent", 4_096, |count| {
        chunk_encode(Compression::None, None, count);
    }),
    ("chunk, encode, lz4, a 4 KiB extent", 4_096, |count| {
        chunk_encode(Compression::Lz4, None, count);
    }),
    (
        "chunk, encode, lz4 + AES-256-GCM, a 4 KiB extent",
        4_096,
        |count| {
            chunk_encode(Compression::Lz4, Some(&key()), count);
        },
    ),
    ("chunk header, decode, an extent", 20_480, header_decode),
    (
        "chunk header, to map entries, an extent",
        20_480,
        header_entries,
    ),
    ("frame, decode, plain, 64 KiB", 100, |count| {
        frame_decode(Compression::None, None, count);
    }),
    ("frame, decode, lz4, 64 KiB", 100, |count| {
        frame_decode(Compression::Lz4, None, count);
    }),
    ("frame, decode, lz4 + AES-256-GCM, 64 KiB", 100, |count| {
        frame_decode(Compression::Lz4, Some(&key()), count);
    }),
    ("CRC-32C of 64 KiB", 100, crc),
    ("map, encode, an entry", 20_480, map_encode),
];

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let Some(name) = args.next() else {
        WORKS
            .iter()
            .for_each(|(name, count, _)| println!("{count} {name}"));
        return;
    };
    let count = args.next().expect("a count").parse().expect("a number");
    let work = WORKS.iter().find(|(known, ..)| *known == name);
    work.expect("one of the works").2(count);
}

fn key() -> DataKey {
    DataKey::new([42; 32])
}

/// Spreads numbers over `limit`, a power of two.
fn scattered(number: u64, limit: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b1) & (limit - 1)
}

/// A block that compresses to about a half: noise, then zeroes.
fn data(blocks: u64) -> Vec<u8> {
    let mut raw = vec![0; blocks as usize * BLOCK];
    let mut state = 1_u64;
    for block in raw.chunks_mut(BLOCK) {
        for byte in &mut block[..BLOCK / 2] {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
    }
    raw
}

fn record(nth: u64) -> Record {
    Record {
        seq: WriteSeq::new(nth + 1),
        start: Lba::new(scattered(nth, 1 << 20) * 8),
        len: 8,
        body: RecordBody::Data {
            offset: (nth % CHUNK_BLOCKS * 8) as u32,
        },
    }
}

fn journal_encode(count: u64) {
    let header = JournalHeader {
        entries: 8192,
        boot: [1; 16],
        volume: VOLUME,
        attachment: [2; 16],
        epoch: Epoch::new(1),
    };
    for nth in 0..count {
        black_box(header.encode_entry(SegmentId::new(3), Generation::new(4), &record(nth)));
    }
}

fn records_encode(count: u64) {
    let mut nth = 0;
    while nth < count {
        let page = RecordPage {
            segment: SegmentId::new(3),
            generation: Generation::new(4),
            volume: VOLUME,
            epoch: Epoch::new(1),
            page: 1,
            durable: Some(WriteSeq::new(nth)),
            records: (nth..nth + RECORDS_PER_PAGE as u64).map(record).collect(),
        };
        nth += RECORDS_PER_PAGE as u64;
        black_box(page.encode(CACHE));
    }
}

/// As many blocks as given, written at random.
fn extents(blocks: u64) -> Vec<ChunkExtent> {
    let extent = |nth: u64| ChunkExtent {
        start: Lba::new(scattered(nth, 1 << 20) * 8),
        len: 8,
        body: ExtentBody::Data {
            raw: (nth * 8) as u32,
        },
    };
    (0..blocks).map(extent).collect()
}

const fn params(compression: Compression, key: Option<&DataKey>) -> ChunkParams<'_> {
    ChunkParams {
        id: CHUNK,
        first_write: WriteSeq::new(1),
        last_write: WriteSeq::new(CHUNK_BLOCKS),
        cut_ms: 1_700_000_000_000,
        frame_sectors: 128,
        compression,
        key,
    }
}

fn chunk_encode(compression: Compression, key: Option<&DataKey>, count: u64) {
    let (extents, raw) = (extents(CHUNK_BLOCKS), data(CHUNK_BLOCKS));
    let mut nth = 0;
    while nth < count {
        black_box(encode_chunk(&params(compression, key), &extents, &raw));
        nth += CHUNK_BLOCKS;
    }
}

fn header_decode(count: u64) {
    let (extents, raw) = (extents(CHUNK_BLOCKS), data(CHUNK_BLOCKS));
    let chunk = encode_chunk(&params(Compression::None, None), &extents, &raw);
    let mut nth = 0;
    while nth < count {
        black_box(ChunkHeader::decode(&chunk.bytes, CHUNK).expect("just made"));
        nth += CHUNK_BLOCKS;
    }
}

fn header_entries(count: u64) {
    let (extents, raw) = (extents(CHUNK_BLOCKS), data(CHUNK_BLOCKS));
    let chunk = encode_chunk(&params(Compression::None, None), &extents, &raw);
    let mut nth = 0;
    while nth < count {
        black_box(chunk.header.map_entries());
        nth += CHUNK_BLOCKS;
    }
}

fn frame_decode(compression: Compression, key: Option<&DataKey>, count: u64) {
    let (extents, raw) = (extents(FRAME_BLOCKS), data(FRAME_BLOCKS));
    let chunk = encode_chunk(&params(compression, key), &extents, &raw);
    let frame = chunk.header.frames[0];
    let stored = &chunk.bytes[frame.stored_offset as usize..][..frame.stored_len as usize];
    let keys = key.map(|key| DataKeys::one(CHUNK.volume, key.clone()));
    for _ in 0..count {
        black_box(decode_frame(stored, CHUNK, 0, 128, keys.as_ref()).expect("just made"));
    }
}

fn crc(count: u64) {
    let raw = data(FRAME_BLOCKS);
    for _ in 0..count {
        black_box(crc32c::crc32c(black_box(&raw)));
    }
}

fn map_encode(count: u64) {
    let object = MapObjectId {
        volume: VOLUME,
        epoch: Epoch::new(1),
        seq: MapSeq::new(1),
    };
    let mut builder = MapObjectBuilder::new(object);
    for number in 0..count {
        let nth = scattered(number, 1 << 20);
        let raw = (nth % CHUNK_BLOCKS * 8) as u32;
        let entry = MapEntry {
            start: Lba::new(number * 8),
            len: 8,
            location: Location::Data(DataLoc {
                chunk: ChunkId {
                    seq: ChunkSeq::new(nth / CHUNK_BLOCKS),
                    ..CHUNK
                },
                raw,
                stored_offset: 512 + raw / 128 * 65_568,
                stored_len: 65_568,
            }),
        };
        builder.push(entry).expect("in order");
    }
    black_box(builder.finish_table().expect("small"));
}
