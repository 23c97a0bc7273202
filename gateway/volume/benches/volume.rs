//! A fixed number of operations on a volume's hot paths, for counting instructions under callgrind:
//! `tests/bench/instructions`.
//!
//! usage: `volume WORK COUNT`; without arguments, the works and a count for each. All that is random repeats.

#![allow(
    clippy::cast_possible_truncation,
    reason = "the world of this bench is small"
)]

use std::hint::black_box;
use std::sync::Arc;

use quarry_cache::{Cache, CacheLoc, Carried, CleanRun, ExtentMap, Geometry};
use quarry_objfmt::map::{MapObjectBuilder, MapObjectId};
use quarry_objfmt::{
    CacheId, ChunkId, ChunkSeq, DataLoc, Durability, Epoch, Generation, JOURNAL_ENTRY_LEN,
    JournalHeader, Lba, LbaRange, Location, MapEntry, MapSeq, Record, RecordBody, Sectors,
    SegmentId, TenantName, VolumeId, WriteSeq,
};
use quarry_volume::map::{MapRoot, Merger, Node, NodeCache, RunCursor, Step};
use quarry_volume::{
    Action, ChunkPlan, Event, ExtentSource, KeptFrames, Op, Opened, Request, RequestId, Shared,
    Tuning, Volume, VolumeParams,
};

/// Sectors of a block, the unit of all requests: 4 KiB.
const BLOCK: u64 = 8;

/// Blocks whose writes are unsent or in the log, in the works that read those.
const BLOCKS_YOUNG: u64 = 64 << 10;

/// Blocks in the map: a million entries.
const BLOCKS_MAP: u64 = 1 << 20;

/// Blocks of a chunk: 8 MiB.
const CHUNK_BLOCKS: u64 = 2048;

/// Segments larger than chunks, so that one holds one.
const GEOMETRY: Geometry = Geometry {
    data_start: 4096,
    segment_size: 16 << 20,
    segments: 1024,
};

const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
const CACHE: CacheId = CacheId::from_bytes([8; 16]);

/// Its name, how many operations make a measure, and the work.
type Work = (&'static str, u64, fn(u64));

const WORKS: [Work; 10] = [
    ("read hit 4 KiB, unsent (of 64 Ki)", 20_000, |count| {
        World::unsent().read(BLOCKS_YOUNG, count);
    }),
    ("read hit 4 KiB, log (of 64 Ki)", 20_000, |count| {
        World::log().read(BLOCKS_YOUNG, count);
    }),
    ("read hit 4 KiB, map (of 1 Mi)", 20_000, |count| {
        World::map().read(BLOCKS_MAP, count);
    }),
    ("write 4 KiB, journal and record pages", 20_000, |count| {
        World::empty(u32::MAX).write(BLOCKS_MAP, count);
    }),
    ("write 4 KiB, cut and committed too", 20_000, |count| {
        World::empty(16 << 10).write(BLOCKS_MAP, count);
    }),
    ("extent map, look up (of 64 Ki)", 20_000, extent_lookup),
    ("extent map, insert (into 64 Ki)", 20_000, extent_insert),
    ("map, look up (of 1 Mi)", 20_000, map_lookup),
    ("map, read of a run, an entry", 100_000, map_read),
    ("map, merge of two runs, an entry", 100_000, map_merge),
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

/// A sequence that looks random and repeats.
struct Blocks(u64);

impl Blocks {
    fn next_below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        ((self.0 >> 33) * limit) >> 31
    }
}

fn block(number: u64) -> LbaRange {
    LbaRange::new(Lba::new(number * BLOCK), Sectors::new(BLOCK)).expect("inside the volume")
}

/// Spreads the blocks over all chunks, as writes at random do. `blocks` is a power of two.
fn scattered(number: u64, blocks: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b1) & (blocks - 1)
}

fn chunk(seq: u64) -> ChunkId {
    ChunkId {
        volume: VOLUME,
        epoch: Epoch::new(1),
        seq: ChunkSeq::new(seq),
    }
}

/// Where a block lies that was the `nth` to be written.
fn entry(number: u64, nth: u64) -> MapEntry {
    let raw = (nth % CHUNK_BLOCKS * BLOCK) as u32;
    MapEntry {
        start: Lba::new(number * BLOCK),
        len: BLOCK as u32,
        location: Location::Data(DataLoc {
            chunk: chunk(nth / CHUNK_BLOCKS),
            raw,
            stored_offset: 512 + raw / 128 * 65_568,
            stored_len: 65_568,
        }),
    }
}

struct World {
    volume: Volume,
    shared: Shared,
    out: Vec<Action>,
    journal: JournalHeader,
    journal_entries: Vec<u8>,
}

impl World {
    fn open(shared: Shared, opened: Opened, chunk_sectors_max: u32) -> Self {
        let tuning = Tuning::default();
        let tuning = Tuning {
            chunk_sectors_max,
            chunk_writes_max: if chunk_sectors_max == u32::MAX {
                usize::MAX
            } else {
                tuning.chunk_writes_max
            },
            ..tuning
        };
        let params = VolumeParams {
            id: VOLUME,
            tenant: TenantName::new("acme").unwrap(),
            size: Sectors::new(BLOCKS_MAP * BLOCK),
            sector_size: 4096,
            frame_sectors: 128,
            epoch: Epoch::new(1),
            durability: Durability::Local,
            read_only: false,
            group: 0,
            tuning,
        };
        let (mut shared, mut out) = (shared, Vec::new());
        Self {
            volume: Volume::new(params, opened, &mut shared, &mut out),
            shared,
            out,
            journal: JournalHeader {
                entries: tuning.journal_entries,
                boot: [1; 16],
                volume: VOLUME,
                attachment: [2; 16],
                epoch: Epoch::new(1),
            },
            journal_entries: vec![0; tuning.journal_entries as usize * JOURNAL_ENTRY_LEN],
        }
    }

    /// Nothing written; chunks of at most so many sectors, or none at all.
    fn empty(chunk_sectors_max: u32) -> Self {
        Self::open(shared(&[]), opened(Arc::default()), chunk_sectors_max)
    }

    /// Every block written once, unsent.
    fn unsent() -> Self {
        let records = (0..BLOCKS_YOUNG).map(|nth| {
            let record = Record {
                seq: WriteSeq::new(nth + 1),
                start: block(scattered(nth, BLOCKS_YOUNG)).start,
                len: BLOCK as u32,
                body: RecordBody::Data {
                    offset: (nth % CHUNK_BLOCKS * BLOCK) as u32,
                },
            };
            (SegmentId::new((nth / CHUNK_BLOCKS) as u32), record)
        });
        let segments: Vec<SegmentId> = (0..BLOCKS_YOUNG / CHUNK_BLOCKS)
            .map(|n| SegmentId::new(n as u32))
            .collect();
        let dirty: Vec<_> = segments
            .iter()
            .map(|id| (*id, Generation::new(1)))
            .collect();
        let unsent = Opened {
            unsent: records.collect(),
            kept_segments: segments,
            ..opened(Arc::default())
        };
        Self::open(shared(&dirty), unsent, u32::MAX)
    }

    /// Every block written once and in the log.
    fn log() -> Self {
        let mut shared = shared(&[]);
        keep_chunks(&mut shared.cache, BLOCKS_YOUNG);
        let log = (0..BLOCKS_YOUNG).map(|nth| entry(scattered(nth, BLOCKS_YOUNG), nth));
        let opened = Opened {
            log: vec![log.collect()],
            ..opened(Arc::default())
        };
        Self::open(shared, opened, u32::MAX)
    }

    /// Every block written once and in the map.
    fn map() -> Self {
        let mut shared = shared(&[]);
        keep_chunks(&mut shared.cache, BLOCKS_MAP);
        let root = map(&mut shared.nodes);
        Self::open(shared, opened(Arc::new(root)), u32::MAX)
    }

    fn read(&mut self, blocks: u64, count: u64) {
        self.ask(Op::Read, blocks, count);
    }

    fn write(&mut self, blocks: u64, count: u64) {
        self.ask(Op::Write { fua: false }, blocks, count);
    }

    /// Requests one by one, each with all that follows from it.
    fn ask(&mut self, op: Op, blocks: u64, count: u64) {
        let mut numbers = Blocks(1);
        let mut due = Vec::new();
        for _ in 0..count {
            let request = Request {
                id: RequestId(0),
                op,
                range: block(numbers.next_below(blocks)),
            };
            self.feed(Event::Request(request));
            while !self.out.is_empty() {
                std::mem::swap(&mut due, &mut self.out);
                for action in due.drain(..) {
                    self.carry_out(action);
                }
            }
        }
    }

    fn feed(&mut self, event: Event) {
        self.volume.apply(event, &mut self.shared, &mut self.out);
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::CacheRead { io, .. }
            | Action::CacheWrite { io, .. }
            | Action::WritePage { io, .. }
            | Action::Sync { io } => self.feed(Event::IoDone { io, result: Ok(()) }),
            Action::Journal {
                segment,
                generation,
                record,
            } => {
                let entry = self.journal.encode_entry(segment, generation, &record);
                let at = self.journal.slot(record.seq) * JOURNAL_ENTRY_LEN;
                self.journal_entries[at..][..JOURNAL_ENTRY_LEN].copy_from_slice(&entry);
            }
            Action::Upload(plan) => self.feed(Event::Uploaded {
                seq: plan.id.seq,
                entries: entries_of(&plan),
                stored_bytes: 8 << 20,
            }),
            Action::Missed { .. } | Action::Waited { .. } | Action::WritesWait(_) => {}
            Action::Complete { result, .. } => result.expect("all that is asked for is there"),
            other => panic!("not of these works: {other:?}"),
        }
    }
}

fn opened(root: Arc<MapRoot>) -> Opened {
    Opened {
        root,
        log: Vec::new(),
        next_chunk: ChunkSeq::new(1000),
        stored_write: WriteSeq::ZERO,
        unsent: Vec::new(),
        kept_segments: Vec::new(),
    }
}

fn shared(dirty: &[(SegmentId, Generation)]) -> Shared {
    Shared {
        cache: Cache::new(
            CACHE,
            GEOMETRY,
            GEOMETRY.segments,
            Generation::new(2),
            dirty,
        ),
        nodes: NodeCache::new(1 << 30),
        kept: KeptFrames::new(1 << 20),
    }
}

/// The chunks of the first `blocks` written are on the cache device, each in one piece.
fn keep_chunks(cache: &mut Cache, blocks: u64) {
    let len = (CHUNK_BLOCKS * BLOCK) as u32;
    for seq in 0..blocks / CHUNK_BLOCKS {
        let at = cache
            .reserve_fill(0, chunk(seq), 0, len)
            .expect("there is room");
        let run = CleanRun { raw: 0, len, at };
        cache.finish_fill(chunk(seq), run, true);
    }
}

/// A map of one run of [`BLOCKS_MAP`] entries, all of its nodes in RAM.
fn map(nodes: &mut NodeCache) -> MapRoot {
    let object = MapObjectId {
        volume: VOLUME,
        epoch: Epoch::new(1),
        seq: MapSeq::new(1),
    };
    let mut builder = MapObjectBuilder::new(object);
    for number in 0..BLOCKS_MAP {
        let entry = entry(number, scattered(number, BLOCKS_MAP));
        builder.push(entry).expect("in order");
    }
    let table = builder.finish_table().expect("small").expect("not empty");
    let bytes = builder.into_bytes();
    let root = MapRoot::empty().with_new_run(0, vec![table]);
    let mut cursor = RunCursor::new(&root.runs()[0]);
    while let Some(place) = cursor.next_node(Lba::ZERO) {
        let stored = &bytes[place.offset as usize..][..place.len as usize];
        let node = Arc::new(Node::decode(&place, stored).expect("just made"));
        cursor.accept(&node).expect("just made");
        nodes.of(0).insert(place, node);
    }
    root
}

fn entries_of(plan: &ChunkPlan) -> Vec<MapEntry> {
    let mut raw = 0;
    let entry = |extent: &quarry_volume::PlannedExtent| {
        assert!(matches!(extent.source, ExtentSource::Cache { .. }));
        let len = extent.range.len().get() as u32;
        let location = Location::Data(DataLoc {
            chunk: plan.id,
            raw,
            stored_offset: 512 + raw / 128 * 65_568,
            stored_len: 65_568,
        });
        raw += len;
        MapEntry {
            start: extent.range.start,
            len,
            location,
        }
    };
    let mut entries: Vec<MapEntry> = plan.extents.iter().map(entry).collect();
    entries.sort_unstable_by_key(|entry| entry.start);
    entries
}

#[derive(Clone, Copy)]
struct At(CacheLoc);

impl Carried for At {
    fn skip(self, n: Sectors) -> Self {
        Self(self.0.skip(n.get() as u32))
    }
}

fn extents() -> ExtentMap<At> {
    let mut extents = ExtentMap::default();
    for number in 0..BLOCKS_YOUNG {
        insert(&mut extents, scattered(number, BLOCKS_YOUNG));
    }
    extents
}

fn insert(extents: &mut ExtentMap<At>, number: u64) {
    let at = CacheLoc {
        segment: SegmentId::new(0),
        offset: (number % CHUNK_BLOCKS * BLOCK) as u32,
    };
    extents.insert(block(number), At(at));
}

fn extent_lookup(count: u64) {
    let extents = extents();
    let mut numbers = Blocks(1);
    for _ in 0..count {
        let range = block(numbers.next_below(BLOCKS_YOUNG));
        extents.visit(range, |_, found| {
            black_box(found.map(|At(at)| at));
        });
    }
}

fn extent_insert(count: u64) {
    let mut extents = extents();
    let mut numbers = Blocks(1);
    for _ in 0..count {
        insert(&mut extents, numbers.next_below(BLOCKS_YOUNG));
    }
}

fn map_lookup(count: u64) {
    let mut nodes = NodeCache::new(1 << 30);
    let root = map(&mut nodes);
    let mut numbers = Blocks(1);
    let mut found = Vec::new();
    for _ in 0..count {
        found.clear();
        let range = block(numbers.next_below(BLOCKS_MAP));
        let known = root.lookup_into(range, &mut nodes.of(0), &mut found);
        known.expect("all nodes are in RAM");
        black_box(&found);
    }
}

/// Reads a table of `count` entries as a merge does: node, checksum, entries.
fn map_read(count: u64) {
    let object = MapObjectId {
        volume: VOLUME,
        epoch: Epoch::new(1),
        seq: MapSeq::new(1),
    };
    let mut builder = MapObjectBuilder::new(object);
    for number in 0..BLOCKS_MAP / 8 {
        let entry = entry(number, scattered(number, BLOCKS_MAP));
        builder.push(entry).expect("in order");
    }
    let table = builder.finish_table().expect("small").expect("not empty");
    let bytes = builder.into_bytes();
    let mut read = 0;
    while read < count {
        let mut cursor = RunCursor::new(&[table]);
        while read < count
            && let Some(place) = cursor.next_node(Lba::ZERO)
        {
            let stored = &bytes[place.offset as usize..][..place.len as usize];
            let node = Node::decode(&place, stored).expect("just made");
            read += cursor
                .accept(&node)
                .expect("just made")
                .map_or(0, |entries| entries.len() as u64);
        }
    }
}

/// Merges a run of every 16th block into one of all blocks; `count` entries come out.
fn map_merge(count: u64) {
    let mut merger = Merger::new(2);
    let old = (0..count).map(|number| entry(number, scattered(number, BLOCKS_MAP)));
    let new = (0..count)
        .step_by(16)
        .map(|number| entry(number, BLOCKS_MAP + number / 16));
    let mut runs = [Some(new.collect::<Vec<_>>()), Some(old.collect())];
    loop {
        match merger.step() {
            Step::Need(source) => {
                let entries = runs[source].take();
                merger.feed(source, entries).expect("sorted");
            }
            Step::Entry(entry) => {
                black_box(entry);
            }
            Step::Done => return,
        }
    }
}
