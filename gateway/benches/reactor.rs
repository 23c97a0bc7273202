//! A fixed number of 4 KiB requests through a whole reactor, for counting instructions under
//! callgrind (`tests/bench/instructions`) and ring submissions: front end, volume, operation on the
//! ring, completion, answer. The cache device is memory, so that operations end where they start.
//!
//! usage: `reactor WORK COUNT`; without arguments, the works and a count for each.

#![allow(
    clippy::cast_possible_truncation,
    reason = "the world of this bench is small"
)]

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use quarry_cache::{Cache, Journal, Journals};
use quarry_gateway::latency::{Latencies, Timed};
use quarry_gateway::reactor::{
    BackendSink, Buffer, FrontEnd, Geometry, Machine, Message, Port, Reactor, ReactorConfig,
    ReactorHandle,
};
use quarry_objfmt::{
    CacheId, ChunkSeq, Durability, Epoch, Generation, Lba, LbaRange, Record, RecordBody, Sectors,
    SegmentId, TenantName, VolumeId, WriteSeq,
};
use quarry_volume::map::NodeCache;
use quarry_volume::{
    Action, Event, IoError, KeptFrames, Op, Opened, Shared, Tuning, Volume, VolumeParams,
};

/// Sectors of a block, the unit of all requests: 4 KiB.
const BLOCK: u64 = 8;

/// Blocks of the volume; each was written once.
const BLOCKS: u64 = 64 << 10;

/// Blocks written to a segment before the start.
const SEGMENT_BLOCKS: u64 = 2048;

const GEOMETRY: quarry_cache::Geometry = quarry_cache::Geometry {
    data_start: 4096,
    segment_size: 16 << 20,
    segments: 512,
};

const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
const CACHE: CacheId = CacheId::from_bytes([8; 16]);

/// Its name, how many operations make a measure, what is asked for, and how many requests at once.
type Work = (&'static str, u64, Op, usize);

const WRITE: Op = Op::Write { fua: false };

const WORKS: [Work; 4] = [
    ("reactor, read hit 4 KiB, depth 1", 20_000, Op::Read, 1),
    ("reactor, read hit 4 KiB, depth 32", 20_000, Op::Read, 32),
    ("reactor, write 4 KiB, depth 1", 20_000, WRITE, 1),
    ("reactor, write 4 KiB, depth 32", 20_000, WRITE, 32),
];

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let Some(name) = args.next() else {
        WORKS
            .iter()
            .for_each(|(name, count, ..)| println!("{count} {name}"));
        return;
    };
    let count: u64 = args.next().expect("a count").parse().expect("a number");
    let work = WORKS.iter().find(|(known, ..)| *known == name);
    let &(_, _, op, depth) = work.expect("one of the works");

    let memory = rustix::fs::memfd_create("cache", rustix::fs::MemfdFlags::CLOEXEC);
    let cache = File::from(memory.expect("a file in memory"));
    let size = u64::from(GEOMETRY.segments) * u64::from(GEOMETRY.segment_size);
    cache.set_len(GEOMETRY.data_start + size).expect("a size");
    let config = ReactorConfig {
        index: 0,
        page_cache: None,
        cache: Arc::new(cache),
        kept_writes: Default::default(),
        sync_failure: Default::default(),
        buffer_entries: 0,
        cipher: None,
    };
    let journals = tempfile::tempdir().expect("a folder");
    let volume = Box::new(Served::open(&journals));
    let start = |handle: ReactorHandle| {
        let key = handle.new_key();
        let front_end = Box::new(Load {
            op,
            left: count,
            under_way: 0,
            numbers: 1,
            buffers: vec![vec![0; 4096]; depth],
            reactor: handle.clone(),
            journals,
        });
        let backend = Box::new(NoStore);
        let add = |message| handle.send_blocking(message).expect("it runs");
        add(Message::AddVolume {
            key,
            machine: volume,
            backend,
        });
        add(Message::AddFrontEnd { key, front_end });
    };
    Reactor::run_here(&config, start).expect("a reactor");
}

/// A volume as the daemon serves it: behind the lock, with a journal.
struct Served {
    volume: Volume,
    shared: Arc<Mutex<Shared>>,
    journal: Journal,
    latencies: Latencies,
}

impl Served {
    fn open(journals: &tempfile::TempDir) -> Self {
        let tuning = Tuning {
            writeback_delay_ms: u64::MAX,
            chunk_sectors_max: u32::MAX,
            chunk_writes_max: usize::MAX,
            ..Tuning::default()
        };
        let params = VolumeParams {
            id: VOLUME,
            tenant: TenantName::new("acme").unwrap(),
            size: Sectors::new(BLOCKS * BLOCK),
            sector_size: 4096,
            frame_sectors: 128,
            epoch: Epoch::new(1),
            durability: Durability::Local,
            read_only: false,
            group: 0,
            tuning,
        };
        let segments = (0..BLOCKS / SEGMENT_BLOCKS).map(|n| SegmentId::new(n as u32));
        let records = (0..BLOCKS).map(|nth| {
            let record = Record {
                seq: WriteSeq::new(nth + 1),
                start: Lba::new((nth.wrapping_mul(0x9e37_79b1) & (BLOCKS - 1)) * BLOCK),
                len: BLOCK as u32,
                body: RecordBody::Data {
                    offset: (nth % SEGMENT_BLOCKS * BLOCK) as u32,
                },
            };
            (SegmentId::new((nth / SEGMENT_BLOCKS) as u32), record)
        });
        let opened = Opened {
            root: Arc::default(),
            log: Vec::new(),
            next_chunk: ChunkSeq::new(1),
            stored_write: WriteSeq::ZERO,
            unsent: records.collect(),
            kept_segments: segments.clone().collect(),
        };
        let dirty: Vec<_> = segments.map(|id| (id, Generation::new(1))).collect();
        let most = GEOMETRY.segments;
        let mut shared = Shared {
            cache: Cache::new(CACHE, GEOMETRY, most, Generation::new(2), &dirty),
            nodes: NodeCache::new(0),
            kept: KeptFrames::new(1 << 20),
        };
        let volume = Volume::new(params, opened, &mut shared, &mut Vec::new());
        let journals = Journals::open(journals.path(), CACHE).expect("a folder of ours");
        let journal = journals.create(VOLUME, Epoch::new(1), [1; 16], tuning.journal_entries);
        Self {
            volume,
            shared: Arc::new(Mutex::new(shared)),
            journal: journal.expect("there is room"),
            latencies: Latencies::default(),
        }
    }
}

impl Machine for Served {
    fn apply(&mut self, event: Event, out: &mut Vec<Action>) {
        self.volume.apply(event, &mut self.shared.lock(), out);
    }

    fn took(&mut self, what: Timed, ns: u64) {
        self.latencies.record(what, ns);
    }

    fn apply_all(&mut self, now_ms: u64, events: &mut Vec<Event>, out: &mut Vec<Action>) {
        self.volume.set_now(now_ms);
        let mut shared = self.shared.lock();
        for event in events.drain(..) {
            self.volume.apply(event, &mut shared, out);
        }
    }

    fn journal(&mut self, segment: SegmentId, generation: Generation, record: &Record) {
        self.journal.put(segment, generation, record);
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.volume.size(),
            sector_size: self.volume.sector_size(),
            read_only: false,
        }
    }
}

struct NoStore;

impl BackendSink for NoStore {
    fn submit(&self, action: Action) {
        panic!("not of these works: {action:?}");
    }
}

/// A front end that keeps `buffers.len()` requests under way until it has made all.
struct Load {
    op: Op,
    /// Requests not made yet.
    left: u64,
    under_way: u64,
    /// The state of a sequence that looks random and repeats.
    numbers: u64,
    buffers: Vec<Vec<u8>>,
    reactor: ReactorHandle,
    journals: tempfile::TempDir,
}

impl Load {
    fn ask(&mut self, tag: u32, port: &mut Port<'_>) {
        if self.left == 0 {
            return;
        }
        self.left -= 1;
        self.under_way += 1;
        self.numbers = self
            .numbers
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(1);
        let start = Lba::new((self.numbers >> 33) % BLOCKS * BLOCK);
        let range = LbaRange::new(start, Sectors::new(BLOCK)).expect("inside the volume");
        let ptr = NonNull::from(&mut self.buffers[tag as usize][0]);
        // SAFETY: the buffer is the front end's own until its drop, one for each request under way,
        // and nobody looks at it.
        let buffer = unsafe { Buffer::user(ptr, 4096) };
        port.request(self.op, range, buffer, tag);
    }

    /// Says what it took, and ends the process.
    fn end(&mut self) -> ! {
        let stats = self.reactor.stats();
        println!(
            "{} requests, {} completions, {} batches",
            stats.requests.load(Ordering::Relaxed),
            stats.completions.load(Ordering::Relaxed),
            stats.batches.load(Ordering::Relaxed)
        );
        // An exit runs no drops.
        std::fs::remove_dir_all(self.journals.path()).expect("a folder of ours");
        std::process::exit(0)
    }
}

impl FrontEnd for Load {
    fn start(&mut self, port: &mut Port<'_>) {
        for tag in 0..self.buffers.len() as u32 {
            self.ask(tag, port);
        }
    }

    fn op_done(&mut self, _: u32, _: i32, _: u32, _: &mut Port<'_>) {}

    fn request_done(&mut self, tag: u32, result: Result<(), IoError>, port: &mut Port<'_>) {
        result.expect("all that is asked for is there");
        self.under_way -= 1;
        self.ask(tag, port);
        if self.under_way == 0 {
            self.end();
        }
    }

    fn stop(&mut self, _: &mut Port<'_>) {
        self.left = 0;
    }

    fn is_finished(&self) -> bool {
        false
    }
}
