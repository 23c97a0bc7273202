//! The volume against a byte array: random requests, their I/O completed in random order, with
//! crashes that keep the cache device, crashes that lose it, deaths of the daemon alone, and clean
//! reopenings in between.
//!
//! The world here is small and honest: a cache device with a volatile layer that a crash throws
//! away in any subset of its writes, and a store of real encoded chunks and map objects.

#![allow(
    clippy::cast_possible_truncation,
    reason = "the world of this test is small"
)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use quarry_cache::{Cache, Geometry};
use quarry_objfmt::chunk::{ChunkExtent, ChunkParams, ExtentBody, decode_frame, encode_chunk};
use quarry_objfmt::codec::Compression;
use quarry_objfmt::frame::FRAME_HEADER_LEN;
use quarry_objfmt::head::Durability;
use quarry_objfmt::map::{MapObjectBuilder, MapObjectId};
use quarry_objfmt::page::{Record, RecordBody, RecordPage, SegmentHeader, SegmentKind};
use quarry_objfmt::{
    CacheId, ChunkId, ChunkSeq, Epoch, Generation, Lba, LbaRange, Location, MapEntry, MapSeq,
    Sectors, SegmentId, TenantName, VolumeId, WriteSeq,
};
use quarry_volume::map::{MapRoot, Node, NodeCache};
use quarry_volume::{
    Action, DataError, Event, ExtentSource, IoError, IoId, KeptFrames, Op, Opened, Report, Request,
    RequestId, STATUS_RUNS_MAX, Shared, StatusRun, Tuning, Volume, VolumeParams, VolumeState,
    WarmEnd, WriteWait,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);
const CACHE: CacheId = CacheId::from_bytes([8; 16]);
const GEOMETRY: Geometry = Geometry {
    data_start: 4096,
    segment_size: 128 << 10,
    segments: 24,
};
const FRAME_SECTORS: u32 = 32;
const JOURNAL_ENTRIES: u32 = 24;
/// Sectors of a volume at first.
const SIZE: u64 = 4096;

fn range(start: u64, len: u64) -> LbaRange {
    LbaRange::new(Lba::new(start), Sectors::new(len)).unwrap()
}

/// A cache device: what is stable, and what was written since the last sync.
struct Device {
    stable: Vec<u8>,
    volatile: Vec<(u64, Vec<u8>)>,
}

impl Device {
    fn new() -> Self {
        let size =
            GEOMETRY.data_start + u64::from(GEOMETRY.segments) * u64::from(GEOMETRY.segment_size);
        Self {
            stable: vec![0; size as usize],
            volatile: Vec::new(),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8], durable: bool) {
        if durable {
            // What lies in the volatile layer under it is older.
            self.stable[offset as usize..offset as usize + data.len()].copy_from_slice(data);
            self.volatile.retain(|(at, old)| {
                *at + old.len() as u64 <= offset || *at >= offset + data.len() as u64
            });
        } else {
            self.volatile.push((offset, data.to_vec()));
        }
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = self.stable[offset as usize..offset as usize + len].to_vec();
        for (at, data) in &self.volatile {
            let from = offset.max(*at);
            let to = (offset + len as u64).min(at + data.len() as u64);
            if from < to {
                out[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&data[(from - at) as usize..(to - at) as usize]);
            }
        }
        out
    }

    fn sync(&mut self) {
        for (offset, data) in std::mem::take(&mut self.volatile) {
            self.stable[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        }
    }

    /// Power off: each sector written since the sync is there or not.
    fn crash(&mut self, rng: &mut SmallRng) {
        for (offset, data) in std::mem::take(&mut self.volatile) {
            for (n, sector) in data.chunks(512).enumerate() {
                if rng.random_bool(0.5) {
                    let at = offset as usize + n * 512;
                    self.stable[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
    }
}

#[derive(Default)]
struct Store {
    chunks: BTreeMap<u64, (ChunkId, Bytes, WriteSeq, Vec<MapEntry>)>,
    maps: HashMap<MapObjectId, Vec<u8>>,
    root: Arc<MapRoot>,
    root_chunk: ChunkSeq,
    root_write: WriteSeq,
    next_map: u64,
}

/// A request of the test's: what it did to the model.
struct Asked {
    op: Op,
    range: LbaRange,
    data: Vec<u8>,
    /// The volume said that it waits for the store.
    missed: bool,
}

/// A write, and when it was made and acknowledged.
struct Recent {
    request: u64,
    range: LbaRange,
    stamp: u64,
    made: u64,
    acknowledged: Option<u64>,
}

struct World {
    rng: SmallRng,
    device: Device,
    store: Store,
    epoch: u32,
    volume: Volume,
    shared: Shared,
    due: Vec<Action>,
    asked: HashMap<u64, Asked>,
    next_request: u64,
    now_ms: u64,
    /// For each sector every stamp that it may read as: the last is the newest acknowledged.
    sectors: Vec<Vec<u64>>,
    /// Stamps by number of the write, for the prefix check: (range, stamp or 0).
    history: Vec<(LbaRange, u64)>,
    next_stamp: u64,
    durability: Durability,
    drains: usize,
    /// The writes since everything was read last.
    recent: Vec<Recent>,
    /// Counts requests made and completed: tells before from after.
    clock: u64,
    /// The journal: by slot, the segment, its generation, and the record.
    journal: BTreeMap<u64, (SegmentId, Generation, Record)>,
    /// What the read that completed last has read.
    last_read: Vec<u8>,
    /// Whether that one waited for the store.
    last_missed: bool,
    /// What writes wait for, as the volume told last.
    writes_wait: Option<WriteWait>,
    /// Sectors of which the last status told.
    last_told: u64,
    /// Frames that were asked of the store.
    frames_fetched: u64,
    /// Warming steps asked for and not answered, and what the last one said.
    warming: (u64, Option<(u64, WarmEnd)>),
    /// Whether misses may go around the daemon's memory; then nothing is compressed.
    direct: bool,
    /// Whether the cache device fails its reads.
    unreadable: bool,
    /// A frame that is damaged in the store, and the requests that failed for it.
    damaged: Option<(ChunkId, u32)>,
    hurt: Vec<u64>,
    /// How often the volume said that something in the store is damaged.
    damage_told: usize,
}

fn params(epoch: u32, size: u64, durability: Durability) -> VolumeParams {
    VolumeParams {
        id: VOLUME,
        tenant: TenantName::new("acme").unwrap(),
        size: Sectors::new(size),
        sector_size: 512,
        frame_sectors: FRAME_SECTORS,
        epoch: Epoch::new(epoch),
        durability,
        read_only: false,
        group: 0,
        tuning: Tuning {
            writeback_delay_ms: 50,
            chunk_sectors_max: 256,
            chunk_writes_max: 64,
            uploads_max: 4,
            checkpoint_entries: 400,
            log_entries_max: 1000,
            log_replay_max: 40_000,
            checkpoint_sectors: 2048,
            checkpoint_chunks: 12,
            readahead_sectors_max: 256,
            journal_entries: JOURNAL_ENTRIES,
        },
    }
}

impl World {
    fn new(seed: u64, durability: Durability) -> Self {
        let mut shared = fresh_shared(&[], Generation::new(1));
        let mut due = Vec::new();
        let opened = Opened {
            root: Arc::default(),
            log: Vec::new(),
            next_chunk: ChunkSeq::new(1),
            stored_write: WriteSeq::ZERO,
            unsent: Vec::new(),
            kept_segments: Vec::new(),
        };
        let mut world = Self {
            rng: SmallRng::seed_from_u64(seed),
            device: Device::new(),
            store: Store {
                root_chunk: ChunkSeq::ZERO,
                ..Store::default()
            },
            epoch: 1,
            volume: Volume::new(params(1, SIZE, durability), opened, &mut shared, &mut due),
            shared,
            due,
            asked: HashMap::new(),
            next_request: 0,
            now_ms: 0,
            sectors: vec![vec![0]; SIZE as usize],
            history: Vec::new(),
            next_stamp: 1,
            durability,
            drains: 0,
            recent: Vec::new(),
            clock: 0,
            journal: BTreeMap::new(),
            last_read: Vec::new(),
            last_told: 0,
            last_missed: false,
            writes_wait: None,
            frames_fetched: 0,
            warming: (0, None),
            direct: seed % 2 == 1,
            unreadable: false,
            damaged: None,
            hurt: Vec::new(),
            damage_told: 0,
        };
        world.feed(Event::DirectReads(world.direct));
        world
    }

    /// Its size in sectors, as `head` has it.
    fn size(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// As an engine grows it: durably in `head` first, then here.
    fn grow(&mut self, sectors: u64) {
        let size = self.sectors.len() + sectors as usize;
        self.sectors.resize(size, vec![0]);
        let size = Sectors::new(size as u64);
        self.feed(Event::Grown { size });
    }

    fn feed(&mut self, event: Event) {
        let before = self.due.len();
        self.volume.apply(event, &mut self.shared, &mut self.due);
        for action in self.due.split_off(before) {
            match action {
                Action::Status { request, runs } => self.told(request.0, &runs),
                Action::Missed { request } => {
                    let asked = self.asked.get_mut(&request.0);
                    let asked = asked.expect("only what waits can miss");
                    assert_eq!(asked.op, Op::Read);
                    asked.missed = true;
                }
                Action::Waited { request, io } => {
                    let asked = self.asked.get(&request.0);
                    let asked = asked.expect("only what waits has waited");
                    let is_told = asked.missed || asked.op == Op::Status;
                    assert!(is_told, "waited for {io:?}, unsaid");
                }
                Action::WritesWait(waits) => {
                    assert_ne!(self.writes_wait, waits, "told twice");
                    self.writes_wait = waits;
                }
                action => self.due.push(action),
            }
        }
    }

    fn ask(&mut self, op: Op, range: LbaRange) {
        let id = self.next_request;
        self.next_request += 1;
        let mut data = vec![
            0;
            if matches!(op, Op::Flush | Op::Status) {
                0
            } else {
                range.len().bytes() as usize
            }
        ];
        match op {
            Op::Write { .. } => {
                let stamp = self.next_stamp;
                self.next_stamp += 1;
                for (n, sector) in data.chunks_mut(512).enumerate() {
                    fill(sector, stamp, range.start.get() + n as u64);
                }
                self.may_read_as(id, range, stamp);
            }
            Op::Discard | Op::WriteZeroes { .. } => self.may_read_as(id, range, 0),
            Op::Read | Op::Flush | Op::Status => {}
        }
        let missed = false;
        let asked = Asked {
            op,
            range,
            data,
            missed,
        };
        self.asked.insert(id, asked);
        self.feed(Event::Request(Request {
            id: RequestId(id),
            op,
            range,
        }));
    }

    fn warm(&mut self, range: LbaRange) {
        self.warming.0 += 1;
        let io = IoId(self.warming.0);
        self.feed(Event::Warm { io, range });
    }

    fn may_read_as(&mut self, request: u64, range: LbaRange, stamp: u64) {
        self.clock += 1;
        self.recent.push(Recent {
            request,
            range,
            stamp,
            made: self.clock,
            acknowledged: None,
        });
        for sector in range.start.get()..range.end.get() {
            self.sectors[sector as usize].push(stamp);
        }
    }

    /// Puts the records that are due into the journal: a driver does that before anything that was
    /// asked for after them.
    fn write_journal(&mut self) {
        let journal = &mut self.journal;
        self.due.retain(|action| {
            let Action::Journal {
                segment,
                generation,
                record,
            } = action
            else {
                return true;
            };
            let slot = record.seq.get() % u64::from(JOURNAL_ENTRIES);
            journal.insert(slot, (*segment, *generation, *record));
            false
        });
    }

    /// Carries out one of the actions that are due, any one.
    fn step(&mut self) -> bool {
        self.write_journal();
        if self.due.is_empty() {
            return false;
        }
        let pick = self.rng.random_range(0..self.due.len());
        let action = self.due.swap_remove(pick);
        match action {
            Action::CacheRead {
                io,
                request,
                buffer_offset,
                offset,
                len,
            } => {
                if self.unreadable {
                    return self.failed(io);
                }
                let data = self.device.read(offset, len as usize);
                self.put(request, buffer_offset, &data);
                self.done(io);
            }
            Action::CacheWrite {
                io,
                request,
                buffer_offset,
                offset,
                len,
            } => {
                let from = buffer_offset as usize;
                let data = self.asked[&request.0].data[from..from + len as usize].to_vec();
                self.device.write(offset, &data, false);
                self.done(io);
            }
            Action::ZeroFill {
                io,
                request,
                buffer_offset,
                len,
            } => {
                self.put(request, buffer_offset, &vec![0; len as usize]);
                self.done(io);
            }
            Action::CopyToRequest {
                io,
                request,
                buffer_offset,
                data,
            } => {
                self.put(request, buffer_offset, &data);
                self.done(io);
            }
            Action::WritePage {
                io,
                offset,
                page,
                durable,
            } => {
                self.device.write(offset, &page[..], durable);
                self.done(io);
            }
            Action::FillWrite { io, offset, data } => {
                self.device.write(offset, &data, false);
                self.done(io);
            }
            Action::Sync { io } => {
                self.device.sync();
                self.done(io);
            }
            Action::Fetch { io, fetch, .. } => {
                self.frames_fetched += fetch.frames.len() as u64;
                let bytes = &self.store.chunks[&fetch.chunk.seq.get()].1;
                let frames = fetch.frames.iter().map(|f| {
                    if self.damaged == Some((fetch.chunk, f.index)) {
                        return Err(DataError {
                            object: fetch.chunk.seq.to_string(),
                            reason: "checksum".to_owned(),
                        });
                    }
                    let stored =
                        &bytes[f.stored_offset as usize..(f.stored_offset + f.stored_len) as usize];
                    Ok(decode_frame(stored, fetch.chunk, f.index, FRAME_SECTORS, None).unwrap())
                });
                let frames = frames.collect();
                self.feed(Event::Fetched { io, frames });
            }
            Action::FetchDirect {
                io,
                request,
                buffer_offset,
                chunk,
                object_offset,
                len,
            } => {
                assert!(self.direct, "a direct read that nobody allowed");
                assert!(self.asked[&request.0].missed, "from the store, unsaid");
                let (from, len) = (object_offset as usize, len as usize);
                let data = self.store.chunks[&chunk.seq.get()].1[from..from + len].to_vec();
                match self.rng.random_range(0..4) {
                    0 => {}
                    // Broken off, and wrong as far as it came.
                    1 => {
                        let part = self.rng.random_range(0..len);
                        self.put(request, buffer_offset, &vec![0xaa; part]);
                    }
                    _ => {
                        self.put(request, buffer_offset, &data);
                        self.done(io);
                        return true;
                    }
                }
                let result = Err(32);
                self.feed(Event::IoDone { io, result });
            }
            Action::LoadNodes { io, nodes, .. } => {
                let nodes = nodes.into_iter().map(|place| {
                    let bytes = &self.store.maps[&place.object]
                        [place.offset as usize..(place.offset + place.len) as usize];
                    (place, Arc::new(Node::decode(&place, bytes).unwrap()))
                });
                let result = Ok(nodes.collect());
                self.feed(Event::NodesLoaded { io, result });
            }
            Action::Upload(plan) => {
                let (mut extents, mut raw) = (Vec::new(), Vec::new());
                for extent in &plan.extents {
                    let body = match extent.source {
                        ExtentSource::Cache { offset } => {
                            let at = (raw.len() / 512) as u32;
                            raw.extend(
                                self.device
                                    .read(offset, extent.range.len().bytes() as usize),
                            );
                            ExtentBody::Data { raw: at }
                        }
                        ExtentSource::Zero => ExtentBody::Zero,
                        ExtentSource::Discard => ExtentBody::Discard,
                    };
                    extents.push(ChunkExtent {
                        start: extent.range.start,
                        len: extent.range.len().get() as u32,
                        body,
                    });
                }
                let chunk = encode_chunk(
                    &ChunkParams {
                        id: plan.id,
                        first_write: plan.first_write,
                        last_write: plan.last_write,
                        cut_ms: 1,
                        frame_sectors: FRAME_SECTORS,
                        compression: if self.direct {
                            Compression::None
                        } else {
                            Compression::Lz4
                        },
                        key: None,
                    },
                    &extents,
                    &raw,
                );
                let entries = chunk.header.map_entries();
                let stored_bytes = chunk.bytes.len() as u64;
                let kept = (plan.id, chunk.bytes, plan.last_write, entries.clone());
                assert!(
                    self.store.chunks.insert(plan.id.seq.get(), kept).is_none(),
                    "chunks are written once"
                );
                self.feed(Event::Uploaded {
                    seq: plan.id.seq,
                    entries,
                    stored_bytes,
                });
            }
            Action::Checkpoint(plan) => {
                let id = MapObjectId {
                    volume: VOLUME,
                    epoch: Epoch::new(self.epoch),
                    seq: MapSeq::new(self.store.next_map),
                };
                self.store.next_map += 1;
                let mut builder = MapObjectBuilder::new(id);
                for entry in plan.log.entries() {
                    builder.push(entry).unwrap();
                }
                let table = builder.finish_table().unwrap();
                self.store.maps.insert(id, builder.into_bytes());
                self.store.root =
                    Arc::new(self.store.root.with_new_run(0, table.into_iter().collect()));
                self.store.root_chunk = plan.upto;
                self.store.root_write = plan.last_write;
                let root = Arc::clone(&self.store.root);
                self.feed(Event::Checkpointed {
                    root,
                    upto: plan.upto,
                });
            }
            Action::Complete { request, result } => self.complete(request.0, result),
            Action::Drained { complete, .. } => {
                assert!(complete);
                self.drains += 1;
            }
            Action::Warmed { bytes, end, .. } => {
                self.warming.0 -= 1;
                self.warming.1 = Some((bytes, end));
            }
            Action::Report(report) => {
                self.damage_told += usize::from(matches!(report, Report::Damaged { .. }));
            }
            Action::Folded(_) => {}
            Action::Journal { .. }
            | Action::Status { .. }
            | Action::Missed { .. }
            | Action::Waited { .. }
            | Action::WritesWait(_) => {
                unreachable!("done before")
            }
        }
        true
    }

    fn done(&mut self, io: IoId) {
        self.feed(Event::IoDone { io, result: Ok(()) });
    }

    fn failed(&mut self, io: IoId) -> bool {
        let result = Err(5);
        self.feed(Event::IoDone { io, result });
        true
    }

    fn put(&mut self, request: RequestId, at: u32, data: &[u8]) {
        let asked = self
            .asked
            .get_mut(&request.0)
            .expect("the request is in flight");
        assert_eq!(asked.op, Op::Read);
        asked.data[at as usize..at as usize + data.len()].copy_from_slice(data);
    }

    /// From here on no sector may read as a write that was acknowledged before another was made
    /// that was acknowledged too.
    fn forget_what_was_overwritten(&mut self) {
        for sector in 0..self.size() {
            let here = Lba::new(sector);
            let of_sector = self.recent.iter();
            let of_sector: Vec<&Recent> = of_sector
                .filter(|w| w.range.start <= here && here < w.range.end)
                .collect();
            let is_over = |acknowledged: u64| {
                let mut later = of_sector.iter().filter(|w| w.made > acknowledged);
                later.any(|w| w.acknowledged.is_some())
            };
            let options = &mut self.sectors[sector as usize];
            let settled = options[0];
            options.clear();
            if !is_over(0) {
                options.push(settled);
            }
            let open = of_sector
                .iter()
                .filter(|w| !w.acknowledged.is_some_and(is_over));
            options.extend(open.map(|w| w.stamp));
        }
    }

    fn complete(&mut self, id: u64, result: Result<(), IoError>) {
        self.clock += 1;
        if let Some(write) = self.recent.iter_mut().find(|w| w.request == id) {
            write.acknowledged = Some(self.clock);
        }
        let asked = self.asked.remove(&id).expect("completed once");
        if self.damaged.is_some() && result == Err(IoError::Io) {
            return self.hurt.push(id);
        }
        result.unwrap();
        if asked.op == Op::Read {
            for (n, sector) in asked.data.chunks(512).enumerate() {
                let lba = asked.range.start.get() + n as u64;
                let stamp = stamp_of(sector, lba);
                assert!(
                    self.sectors[lba as usize].contains(&stamp),
                    "sector {lba} reads as write {stamp}, may be {:?}",
                    self.sectors[lba as usize]
                );
            }
            self.last_read = asked.data;
            self.last_missed = asked.missed;
        }
    }

    /// A run told to be zeroes may read as zeroes, and one told to have data was written some time.
    fn told(&mut self, id: u64, runs: &[StatusRun]) {
        let asked = &self.asked[&id];
        assert_eq!(asked.op, Op::Status);
        assert!(!runs.is_empty() && runs.len() <= STATUS_RUNS_MAX);
        let mut lba = asked.range.start.get();
        for run in runs {
            for sector in lba..lba + run.len.get() {
                let may = &self.sectors[sector as usize];
                let fits = |stamp: &u64| (*stamp == 0) == run.zero;
                assert!(
                    may.iter().any(fits),
                    "sector {sector} is {run:?}, may be {may:?}"
                );
            }
            lba += run.len.get();
        }
        assert!(lba <= asked.range.end.get());
        self.last_told = lba - asked.range.start.get();
    }

    fn settle(&mut self) {
        while self.step() || !self.asked.is_empty() {
            if self.due.is_empty() {
                self.now_ms += 100;
                let now_ms = self.now_ms;
                self.feed(Event::Tick { now_ms });
            }
        }
    }

    /// Reads all: each sector now has one value only, the one it read as.
    fn read_all(&mut self) {
        self.settle();
        for start in (0..self.size()).step_by(256) {
            let id = self.next_request;
            self.ask(Op::Read, range(start, 256));
            while self.asked.contains_key(&id) {
                assert!(self.step(), "a read of everything is stuck");
            }
            let read = std::mem::take(&mut self.last_read);
            for (n, sector) in read.chunks(512).enumerate() {
                let lba = start + n as u64;
                self.sectors[lba as usize] = vec![stamp_of(sector, lba)];
            }
        }
        self.recent.clear();
    }

    /// Everything acknowledged is durable from here on.
    fn flush(&mut self) {
        self.ask(Op::Flush, range(0, 0));
        self.settle();
    }

    fn reopen(&mut self, end: End) {
        self.write_journal();
        self.asked.clear();
        self.due.clear();
        self.warming.0 = 0;
        self.epoch += 1;
        // The end of the log: the first missing chunk.
        let mut next = self.store.root_chunk.next();
        let mut log = Vec::new();
        let mut stored_write = self.store.root_write;
        while let Some((_, _, last, entries)) = self.store.chunks.get(&next.get()) {
            log.push(entries.clone());
            stored_write = *last;
            next = next.next();
        }
        let log_end = next.get();
        self.store.chunks.retain(|seq, _| *seq < log_end);
        match end {
            End::Killed => {}
            End::PowerCut => {
                self.device.crash(&mut self.rng);
                self.journal.clear();
            }
            End::CacheLost => {
                self.device = Device::new();
                self.journal.clear();
            }
        }
        let (mut found, next_generation, durable) = scan(&self.device, stored_write);
        self.device.sync();
        add_journal(&mut self.device, &mut found, &self.journal, stored_write);
        self.journal.clear();
        let mut unsent: Vec<(SegmentId, Record)> = found
            .iter()
            .flat_map(|(s, _, rs)| rs.iter().map(|r| (*s, *r)))
            .collect();
        unsent.sort_by_key(|(_, r)| r.seq);
        let mut last = stored_write;
        unsent.retain(|(_, r)| {
            let next = r.seq == last.next();
            if next {
                last = r.seq;
            }
            next
        });
        assert!(last >= durable, "{last} is there of {durable}");
        // As `Recovered::cut`: what is behind a gap is gone from the device too.
        for (segment, generation, ..) in &found {
            rewrite(&mut self.device, *segment, *generation, last);
        }
        let dirty: Vec<(SegmentId, Generation)> = found.iter().map(|(s, g, _)| (*s, *g)).collect();
        self.shared = fresh_shared(&dirty, next_generation);
        let opened = Opened {
            root: Arc::clone(&self.store.root),
            log,
            next_chunk: next,
            stored_write,
            unsent,
            kept_segments: dirty.iter().map(|(s, _)| *s).collect(),
        };
        self.writes_wait = None;
        self.volume = Volume::new(
            params(self.epoch, self.size(), self.durability),
            opened,
            &mut self.shared,
            &mut self.due,
        );
        self.feed(Event::DirectReads(self.direct));
    }
}

fn fresh_shared(dirty: &[(SegmentId, Generation)], next: Generation) -> Shared {
    Shared {
        cache: Cache::new(CACHE, GEOMETRY, 12, next, dirty),
        nodes: NodeCache::new(64 << 10),
        kept: KeptFrames::new(6 * (16 << 10)),
    }
}

fn fill(sector: &mut [u8], stamp: u64, lba: u64) {
    for word in sector.chunks_mut(16) {
        word[..8].copy_from_slice(&stamp.to_le_bytes());
        word[8..].copy_from_slice(&lba.to_le_bytes());
    }
}

fn stamp_of(sector: &[u8], lba: u64) -> u64 {
    if sector.iter().all(|b| *b == 0) {
        return 0;
    }
    let stamp = u64::from_le_bytes(sector[..8].try_into().unwrap());
    let mut right = vec![0; 512];
    fill(&mut right, stamp, lba);
    assert!(sector == right, "sector {lba} is torn or another's");
    stamp
}

/// How a daemon's life ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// The daemon alone: the device has all that it took, the journal all that was acknowledged.
    Killed,
    PowerCut,
    CacheLost,
}

type Found = Vec<(SegmentId, Generation, Vec<Record>)>;

/// As `Recovered::cut` does first: the journal's records that no page holds get pages.
fn add_journal(
    device: &mut Device,
    found: &mut Found,
    journal: &BTreeMap<u64, (SegmentId, Generation, Record)>,
    stored: WriteSeq,
) {
    for (segment, generation, records) in found {
        let mut missing: Vec<Record> = journal
            .values()
            .filter(|(id, of, r)| id == segment && of == generation && r.seq > stored)
            .map(|(_, _, r)| *r)
            .filter(|r| !records.contains(r))
            .collect();
        missing.sort_by_key(|r| r.seq);
        let used = |index: u32| {
            let page = device.read(GEOMETRY.page_byte(*segment, index), 4096);
            RecordPage::decode(&page, CACHE)
                .is_ok_and(|p| p.generation == *generation && p.page == index)
        };
        let free = (1..GEOMETRY.segment_size / 4096).find(|index| !used(*index));
        let Some(index) = free.filter(|_| !missing.is_empty()) else {
            continue;
        };
        let page = RecordPage {
            segment: *segment,
            generation: *generation,
            volume: VOLUME,
            epoch: Epoch::ZERO,
            page: index,
            durable: None,
            records: missing.clone(),
        };
        let at = GEOMETRY.page_byte(*segment, index);
        let ends = |r: &Record| match r.body {
            RecordBody::Data { offset } => Some(offset + r.len),
            RecordBody::Zero | RecordBody::Discard => None,
        };
        let data_end = records.iter().chain(&missing).filter_map(ends).max();
        let data_end = GEOMETRY.data_start
            + u64::from(segment.get()) * u64::from(GEOMETRY.segment_size)
            + u64::from(data_end.unwrap_or(0)) * 512;
        assert!(at >= data_end, "no room was left for the journal's records");
        device.write(at, &page.encode(CACHE)[..], true);
        records.append(&mut missing);
    }
}

/// Also the next generation, and what was durable by what the device says itself.
fn scan(device: &Device, stored: WriteSeq) -> (Found, Generation, WriteSeq) {
    let mut found = Vec::new();
    let mut next = Generation::new(1);
    let mut durable = None;
    for id in (0..GEOMETRY.segments).map(SegmentId::new) {
        let Ok(header) =
            SegmentHeader::decode(&device.read(GEOMETRY.page_byte(id, 0), 4096), CACHE)
        else {
            continue;
        };
        next = next.max(header.generation.next());
        if header.kind != SegmentKind::Write {
            continue;
        }
        durable = durable.max(header.durable);
        let mut records = Vec::new();
        for index in 1..GEOMETRY.segment_size / 4096 {
            let Ok(page) =
                RecordPage::decode(&device.read(GEOMETRY.page_byte(id, index), 4096), CACHE)
            else {
                continue;
            };
            if page.generation == header.generation && page.page == index {
                durable = durable.max(page.durable);
                records.extend(page.records.into_iter().filter(|r| r.seq > stored));
            }
        }
        found.push((id, header.generation, records));
    }
    (found, next, durable.unwrap_or_default())
}

fn rewrite(device: &mut Device, id: SegmentId, generation: Generation, last: WriteSeq) {
    for index in 1..GEOMETRY.segment_size / 4096 {
        let at = GEOMETRY.page_byte(id, index);
        let Ok(mut page) = RecordPage::decode(&device.read(at, 4096), CACHE) else {
            continue;
        };
        if page.generation == generation && page.page == index {
            page.records.retain(|r| r.seq <= last);
            device.write(at, &page.encode(CACHE)[..], true);
        }
    }
}

fn random_request(world: &mut World) {
    let size = world.size();
    let start = world.rng.random_range(0..size - 1);
    let len = world.rng.random_range(1..=200u64).min(size - start);
    match world.rng.random_range(0..60) {
        0..3 => world.warm(range(start, 4 * len)),
        3 => drop(world.shared.cache.evict(0, VOLUME)),
        _ => {}
    }
    let op = match world.rng.random_range(0..20) {
        0..7 => Op::Read,
        7..15 => Op::Write {
            fua: world.rng.random_bool(0.1),
        },
        15 => Op::Discard,
        16 => Op::WriteZeroes { fua: false },
        17 => Op::Status,
        _ => Op::Flush,
    };
    world.ask(
        op,
        if op == Op::Flush {
            range(0, 0)
        } else {
            range(start, len)
        },
    );
}

/// Random requests, several in flight, completed in any order; every read is checked.
fn run(
    seed: u64,
    durability: Durability,
    rounds: usize,
    mut between: impl FnMut(&mut World, usize),
) {
    let mut world = World::new(seed, durability);
    for round in 0..rounds {
        for _ in 0..60 {
            random_request(&mut world);
            for _ in 0..world.rng.random_range(0..12) {
                world.step();
            }
        }
        between(&mut world, round);
    }
    world.settle();
    assert_eq!(world.warming.0, 0, "each step is answered");
}

#[test]
fn random_requests_read_back_what_was_written() {
    for seed in 0..6 {
        run(seed, Durability::Local, 6, |world, _| world.read_all());
    }
}

#[test]
fn crash_with_the_cache_keeps_every_flushed_write() {
    for seed in 100..112 {
        run(seed, Durability::Local, 6, |world, _| {
            world.read_all();
            world.flush();
            // Unflushed ones on top: old or new, nothing else.
            for _ in 0..30 {
                random_request(world);
                world.step();
            }
            world.reopen(End::PowerCut);
            world.read_all();
        });
    }
}

#[test]
fn daemon_killed_keeps_every_acknowledged_write() {
    for seed in 500..520 {
        run(seed, Durability::Local, 6, |world, _| {
            world.read_all();
            for _ in 0..60 {
                random_request(world);
                for _ in 0..world.rng.random_range(0..6) {
                    world.step();
                }
            }
            // Those that were acknowledged by now must be there; the others may be.
            world.forget_what_was_overwritten();
            world.reopen(End::Killed);
            world.read_all();
        });
    }
}

#[test]
fn crash_without_the_cache_keeps_every_write_flushed_to_the_store() {
    for seed in 200..208 {
        run(seed, Durability::Object, 5, |world, _| {
            world.read_all();
            world.flush();
            for _ in 0..30 {
                random_request(world);
                world.step();
            }
            world.reopen(End::CacheLost);
            world.read_all();
        });
    }
}

/// A volume with data all over its first 1024 sectors, a part of them in the log, on an empty cache.
fn stored_and_cold() -> World {
    let mut world = World::new(2, Durability::Object);
    for start in (0..1024).step_by(64) {
        world.ask(Op::Write { fua: false }, range(start, 64));
    }
    // A drain is of what was acknowledged before it.
    world.settle();
    let (io, checkpoint) = (IoId(1), true);
    world.feed(Event::Drain { io, checkpoint });
    world.settle();
    world.ask(Op::Write { fua: true }, range(512, 100));
    world.settle();
    world.read_all();
    world.reopen(End::CacheLost);
    world
}

#[test]
fn warmed_range_is_read_from_the_cache_alone_and_once_only() {
    let mut world = stored_and_cold();
    world.warm(range(200, 600));
    assert!(
        world.due.iter().all(|a| !matches!(
            a,
            Action::Fetch {
                foreground: true,
                ..
            }
        )),
        "nobody waits for it"
    );
    // One at a time.
    world.warm(range(0, 8));
    world.settle();
    let (bytes, end) = world.warming.1.unwrap();
    assert!(end == WarmEnd::Done && bytes > 0, "{end:?} {bytes}");
    assert_eq!(world.volume.stats().warmed_bytes, bytes);
    for start in (200..800).step_by(50) {
        world.ask(Op::Read, range(start, 50));
    }
    world.settle();
    let stats = world.volume.stats();
    assert_eq!((stats.miss_bytes, stats.hit_bytes), (0, 600 * 512));
    // What is there is not fetched again, and what is not there is nothing.
    world.warm(range(200, 600));
    world.settle();
    assert_eq!(world.warming.1, Some((0, WarmEnd::Done)));
    world.warm(range(SIZE - 8, 1 << 40));
    world.warm(range(1 << 40, 8));
    world.settle();
    assert_eq!(world.warming, (0, Some((0, WarmEnd::Done))));
    // Dropped, it is had from the store again.
    assert!(world.shared.cache.evict(0, VOLUME) > 0);
    world.ask(Op::Read, range(300, 8));
    world.settle();
    assert_eq!(world.volume.stats().miss_bytes, 8 * 512);
    let mut hot = world.volume.hottest(9);
    assert_eq!(hot[0], range(256, 256), "what was read twice as often");
    hot.sort_unstable_by_key(|range| range.start);
    let ends = |hot: &[LbaRange]| (hot[0].start, hot[hot.len() - 1].end);
    assert_eq!(ends(&hot), (Lba::new(128), Lba::new(896)));
}

#[test]
fn warming_of_a_volume_that_stops_is_answered() {
    let mut world = stored_and_cold();
    world.warm(range(0, 1024));
    world.feed(Event::Stop);
    world.warm(range(0, 8));
    world.settle();
    assert_eq!(world.warming.0, 0);
    world.warm(range(0, 8));
    world.settle();
    assert_eq!(world.warming, (0, Some((0, WarmEnd::Stopping))));
}

#[test]
fn direct_reads_that_work_or_fail_read_back_what_was_written() {
    let mut counted = (0, 0);
    for seed in (601..613).step_by(2) {
        run(seed, Durability::Object, 4, |world, _| {
            world.read_all();
            world.flush();
            world.reopen(End::CacheLost);
            for _ in 0..60 {
                let start = world.rng.random_range(0..SIZE - 32);
                let len = world.rng.random_range(1..=32);
                world.ask(Op::Read, range(start, len));
                // Writes beside them: what is read is old or new.
                if world.rng.random_bool(0.2) {
                    random_request(world);
                }
                for _ in 0..world.rng.random_range(0..6) {
                    world.step();
                }
            }
            world.settle();
            let stats = world.volume.stats();
            counted.0 += stats.direct_reads;
            counted.1 += stats.direct_fallbacks;
            assert!(stats.direct_bytes >= stats.direct_reads * 512);
        });
    }
    assert!(
        counted.0 > 100 && counted.1 > 50,
        "direct reads that worked and that failed: {counted:?}"
    );
}

#[test]
fn damaged_frame_fails_who_reads_it_and_nobody_who_waits_for_its_neighbours() {
    let mut world = stored_and_cold();
    // The map first, so that all wait for one fetch.
    world.ask(Op::Read, range(0, 8));
    world.settle();
    let long = world.next_request;
    world.ask(Op::Read, range(256, 64));
    let fetch = world.due.iter().find_map(|action| match action {
        Action::Fetch { fetch, .. } => Some(fetch.clone()),
        _ => None,
    });
    let fetch = fetch.unwrap();
    let [_, second] = fetch.frames[..] else {
        panic!("two frames are fetched at once")
    };
    world.damaged = Some((fetch.chunk, second.index));
    for start in [256, 288, 312] {
        world.ask(Op::Read, range(start, 8));
    }
    world.settle();
    world.hurt.sort_unstable();
    assert_eq!(world.hurt, [long, long + 2, long + 3]);
    // The others' are on the cache device now; the damaged one is asked for anew, and was mended.
    world.damaged = None;
    let missed = world.volume.stats().miss_bytes;
    world.ask(Op::Read, range(256, 64));
    world.settle();
    assert_eq!(world.volume.stats().miss_bytes - missed, 32 * 512);
}

/// As when the store was away for longer than it keeps what a map needed after a newer one.
#[test]
fn read_whose_object_is_gone_since_its_look_up_is_made_again_by_the_newest_map() {
    let gone = || DataError {
        object: "gone".to_owned(),
        reason: "not found".to_owned(),
    };
    // How often the map changed, for which read; whether a node or a frame is what is gone.
    for (maps, is_node) in [(0, false), (0, true), (1, false), (1, true), (2, false)] {
        let mut world = stored_and_cold();
        if !is_node {
            // The map's nodes.
            world.ask(Op::Read, range(0, 8));
            world.settle();
        }
        world.ask(Op::Read, range(256, 8));
        let is_waited_for = |action: &Action| match action {
            Action::Fetch { foreground, .. } => !is_node && *foreground,
            Action::LoadNodes { foreground, .. } => is_node && *foreground,
            _ => false,
        };
        for _ in 0..maps {
            let root = Arc::clone(&world.store.root);
            world.feed(Event::Remapped { root });
        }
        let place = world.due.iter().position(is_waited_for).unwrap();
        let answer = match world.due.swap_remove(place) {
            Action::Fetch { io, fetch, .. } => Event::Fetched {
                io,
                frames: fetch.frames.iter().map(|_| Err(gone())).collect(),
            },
            Action::LoadNodes { io, .. } => Event::NodesLoaded {
                io,
                result: Err(gone()),
            },
            other => panic!("{other:?}"),
        };
        // What fails then is counted, not a failure of the test.
        world.damaged = (maps == 0).then_some((
            ChunkId {
                volume: VOLUME,
                epoch: Epoch::ZERO,
                seq: ChunkSeq::ZERO,
            },
            0,
        ));
        world.feed(answer);
        world.settle();
        let failed = usize::from(maps == 0);
        assert_eq!((world.hurt.len(), world.damage_told), (failed, failed));
    }
}

#[test]
fn cache_that_cannot_be_read_costs_no_read_of_what_the_store_has() {
    for seed in 700..706 {
        run(seed, Durability::Object, 4, |world, _| {
            world.read_all();
            world.flush();
            world.unreadable = true;
            // Readers in turn, so that readahead makes copies on the device of what they read next.
            for reader in 0..3 {
                for start in (0..SIZE - 64).step_by(64) {
                    world.ask(Op::Read, range(start + reader, 64));
                    for _ in 0..world.rng.random_range(0..12) {
                        world.step();
                    }
                }
            }
            world.settle();
            world.unreadable = false;
        });
    }
}

#[test]
fn direct_reads_are_for_few_runs_of_readers_who_jump() {
    let mut world = World::new(1, Durability::Object);
    for start in (0..1024).step_by(128) {
        world.ask(Op::Write { fua: false }, range(start, 128));
    }
    world.flush();
    world.reopen(End::CacheLost);
    let mut asked = |start, len| {
        let id = world.next_request;
        world.ask(Op::Read, range(start, len));
        let direct = |action: &&Action| matches!(action, Action::FetchDirect { .. });
        let count = world.due.iter().filter(direct).count();
        let fetch = |action: &&Action| matches!(action, Action::Fetch { .. });
        let fetches = world.due.iter().filter(fetch).count();
        while world.asked.contains_key(&id) {
            world.step();
        }
        (count, fetches)
    };
    assert_eq!(asked(512, 32), (1, 0), "one frame");
    assert_eq!(asked(600, 32), (2, 0), "over a frame's end");
    assert_eq!(asked(256, 96), (0, 1), "three frames: one GET");
    let (direct, fetches) = asked(352, 8);
    assert_eq!(direct, 0, "it goes on where the last one stopped");
    assert!(fetches > 0, "and is read ahead of");
    world.feed(Event::DirectReads(false));
    let id = world.next_request;
    world.ask(Op::Read, range(900, 8));
    assert!(
        !world
            .due
            .iter()
            .any(|a| matches!(a, Action::FetchDirect { .. }))
    );
    while world.asked.contains_key(&id) {
        world.step();
    }
}

#[test]
fn volume_with_nothing_unsent_is_folded_and_let_go_though_the_cache_is_in_doubt() {
    let mut world = World::new(3, Durability::Object);
    world.ask(Op::Write { fua: false }, range(512, 8));
    world.settle();
    world.flush();
    world.shared.cache.put_in_doubt(5);
    let (drains, io) = (world.drains, IoId(1 << 40));
    let checkpoint = true;
    world.feed(Event::Drain { io, checkpoint });
    world.settle();
    // Completely.
    assert_eq!(world.drains, drains + 1);
    assert!(matches!(world.volume.state(), VolumeState::Failed { .. }));
}

/// A rescue can give a volume whose frames are compressed a head by which they are not.
#[test]
fn frame_that_may_be_compressed_is_not_read_directly() {
    for (stored_sectors, direct) in [
        (FRAME_SECTORS, true),
        (FRAME_SECTORS - 1, false),
        (2, false),
    ] {
        let mut world = World::new(1, Durability::Object);
        let frame = u64::from(FRAME_SECTORS);
        world.ask(Op::Write { fua: false }, range(512, frame));
        world.settle();
        world.flush();
        for (_, _, _, entries) in world.store.chunks.values_mut() {
            for entry in entries {
                let Location::Data(data) = &mut entry.location else {
                    panic!("all of it is data");
                };
                data.stored_len = FRAME_HEADER_LEN as u32 + stored_sectors * 512;
            }
        }
        world.reopen(End::CacheLost);
        world.ask(Op::Read, range(513, 1));
        let is_direct = |a: &Action| matches!(a, Action::FetchDirect { .. });
        assert_eq!(world.due.iter().any(is_direct), direct, "{stored_sectors}");
    }
}

#[test]
fn lost_cache_leaves_a_prefix_of_the_writes() {
    for seed in 300..340 {
        let mut world = World::new(seed, Durability::Local);
        // One write at a time, so that their order is known.
        for _ in 0..150 {
            let start = world.rng.random_range(0..SIZE - 1);
            let len = world.rng.random_range(1..=64u64).min(SIZE - start);
            let (op, stamp) = if world.rng.random_bool(0.9) {
                (Op::Write { fua: false }, world.next_stamp)
            } else {
                (Op::WriteZeroes { fua: false }, 0)
            };
            let id = world.next_request;
            world.ask(op, range(start, len));
            world.history.push((range(start, len), stamp));
            while world.asked.contains_key(&id) {
                if !world.step() {
                    world.now_ms += 60;
                    let now_ms = world.now_ms;
                    world.feed(Event::Tick { now_ms });
                }
            }
            // Some uploads happen meanwhile, in any order.
            for _ in 0..world.rng.random_range(0..3) {
                world.step();
            }
        }
        world.reopen(End::CacheLost);
        world.read_all();
        let image: Vec<u64> = world.sectors.iter().map(|options| options[0]).collect();
        let mut state = vec![0; SIZE as usize];
        let mut matches = image == state;
        for (range, stamp) in &world.history {
            state[range.start.get() as usize..range.end.get() as usize].fill(*stamp);
            matches |= image == state;
        }
        assert!(matches, "seed {seed}: the image is no prefix of the writes");
    }
}

#[test]
fn drained_volume_holds_nothing_dirty_and_reopens_the_same() {
    for seed in 400..406 {
        run(seed, Durability::Local, 3, |world, _| {
            world.read_all();
            world.feed(Event::Drain {
                io: IoId(1),
                checkpoint: true,
            });
            let drains = world.drains;
            while world.drains == drains {
                if !world.step() {
                    world.now_ms += 60;
                    let now_ms = world.now_ms;
                    world.feed(Event::Tick { now_ms });
                }
            }
            let stats = world.volume.stats();
            assert_eq!(
                (stats.dirty_bytes, stats.dirty_entries, stats.log_entries),
                (0, 0, 0)
            );
            for _ in 0..3 {
                world.now_ms += 3_000;
                let now_ms = world.now_ms;
                world.feed(Event::Tick { now_ms });
                world.settle();
            }
            assert_eq!(
                world.shared.cache.counts().dirty,
                0,
                "an idle, drained volume holds no segment"
            );
            world.reopen(End::CacheLost);
            world.read_all();
        });
    }
}

#[test]
fn volume_grown_under_requests_is_zeroes_there_and_keeps_what_is_written() {
    for seed in 600..612 {
        run(seed, Durability::Object, 6, |world, round| {
            // With requests under way.
            world.grow(512);
            for _ in 0..30 {
                random_request(world);
                world.step();
            }
            world.read_all();
            world.flush();
            let end = match round % 3 {
                0 => End::Killed,
                1 => End::PowerCut,
                _ => End::CacheLost,
            };
            world.reopen(end);
            world.read_all();
        });
    }
}

#[test]
fn volume_behind_its_end_is_refused_until_it_has_grown() {
    let mut world = World::new(1, Durability::Local);
    let ops = [
        Op::Read,
        Op::Status,
        Op::Write { fua: false },
        Op::Discard,
        Op::WriteZeroes { fua: false },
    ];
    let refused = |world: &mut World, op, range| {
        let (mut out, id) = (Vec::new(), RequestId(u64::MAX));
        let request = Request { id, op, range };
        let event = Event::Request(request);
        world.volume.apply(event, &mut world.shared, &mut out);
        let answer = out.into_iter().find_map(|action| match action {
            Action::Complete { request, result } if request == id => Some(result),
            _ => None,
        });
        answer == Some(Err(IoError::Invalid))
    };
    for op in ops {
        assert!(refused(&mut world, op, range(SIZE, 8)), "{op:?}");
        assert!(refused(&mut world, op, range(SIZE - 8, 16)), "{op:?}");
    }
    world.grow(8);
    for (op, changed) in [
        (Op::Write { fua: true }, range(SIZE - 8, 16)),
        (Op::Discard, range(SIZE, 8)),
    ] {
        world.ask(op, changed);
        world.settle();
        // It reads as that, and as nothing older.
        world.forget_what_was_overwritten();
        world.ask(Op::Read, range(SIZE - 8, 16));
        world.settle();
    }
    for op in ops {
        assert!(refused(&mut world, op, range(SIZE + 8, 8)), "{op:?}");
    }
    // A size that is not larger is none.
    let size = Sectors::new(SIZE);
    world.feed(Event::Grown { size });
    assert_eq!(world.volume.size(), Sectors::new(SIZE + 8));
}

#[test]
fn same_seed_takes_the_same_steps() {
    let trace = |seed| {
        let mut world = World::new(seed, Durability::Local);
        for _ in 0..300 {
            random_request(&mut world);
            for _ in 0..5 {
                world.step();
            }
        }
        world.settle();
        format!(
            "{:?} {:?}",
            world.volume.stats(),
            world.shared.cache.counts()
        )
    };
    assert_eq!(trace(5), trace(5));
}

#[test]
fn drain_beside_a_writer_who_never_stops_ends_when_what_was_before_it_is_in_the_map() {
    let mut wrote_on = 0;
    for seed in 700..706 {
        let mut world = World::new(seed, Durability::Object);
        // A few forced writes are always under way, so that the log never is empty.
        let write = |world: &mut World| {
            while world.asked.len() < 6 {
                let start = world.rng.random_range(0..SIZE - 64);
                world.ask(Op::Write { fua: true }, range(start, 64));
            }
        };
        for _ in 0..500 {
            write(&mut world);
            world.step();
        }
        let before = world.volume.last_acknowledged();
        world.feed(Event::Drain {
            io: IoId(1),
            checkpoint: true,
        });
        let (mut steps, patience) = (0, 2_000);
        while world.drains == 0 && steps < patience {
            write(&mut world);
            world.step();
            steps += 1;
        }
        assert!(steps < patience, "seed {seed}: the drain does not end");
        assert!(before > WriteSeq::ZERO);
        wrote_on += usize::from(world.volume.last_acknowledged() > before);
        world.settle();
        world.read_all();
    }
    // One may find all of it in the map already.
    assert!(wrote_on >= 4, "{wrote_on}");
}

/// A world whose log is as long as it may be by writes to these sectors, with one that waits for the checkpoint that is held back.
fn with_a_long_log(written: impl Iterator<Item = u64>) -> (World, Action) {
    let mut world = World::new(707, Durability::Local);
    let mut held = None;
    let mut go_on = |world: &mut World| loop {
        for action in std::mem::take(&mut world.due) {
            match action {
                Action::Checkpoint(_) => assert!(held.replace(action).is_none()),
                other => world.due.push(other),
            }
        }
        if !world.step() {
            break;
        }
    };
    for lba in written {
        world.ask(Op::WriteZeroes { fua: true }, range(lba, 1));
        go_on(&mut world);
        world.now_ms += 60;
        let now_ms = world.now_ms;
        world.feed(Event::Tick { now_ms });
        go_on(&mut world);
        if world.writes_wait.is_some() {
            break;
        }
    }
    assert_eq!(world.writes_wait, Some(WriteWait::Log));
    assert!(world.volume.stats().stalled && world.asked.len() == 1);
    (world, held.unwrap())
}

/// Each a run of its own.
fn with_a_log_of_runs() -> (World, Action) {
    let (world, checkpoint) = with_a_long_log((0..SIZE).step_by(2));
    assert_eq!(world.volume.stats().log_entries, 1000);
    (world, checkpoint)
}

/// Who wrote to the same place for ever had a log without end beside a map that could not be written.
#[test]
fn write_beside_a_log_of_one_sector_over_and_over_waits_for_the_map() {
    let (mut world, checkpoint) = with_a_long_log(std::iter::repeat_n(0, 4000));
    assert!(world.volume.stats().log_entries <= 2);
    world.due.push(checkpoint);
    world.settle();
    assert!(world.asked.is_empty() && world.writes_wait.is_none() && world.hurt.is_empty());
    world.read_all();
}

#[test]
fn write_beside_a_long_log_waits_for_the_map() {
    let (mut world, checkpoint) = with_a_log_of_runs();
    world.due.push(checkpoint);
    world.settle();
    assert!(world.asked.is_empty() && world.writes_wait.is_none() && world.hurt.is_empty());
    world.read_all();
}

#[test]
fn write_beside_a_long_log_is_refused_when_the_map_is_damaged() {
    let (mut world, _) = with_a_log_of_runs();
    // What it says of itself: nothing of it is read here.
    let map = ChunkId {
        volume: VOLUME,
        epoch: Epoch::new(1),
        seq: ChunkSeq::ZERO,
    };
    world.damaged = Some((map, 0));
    world.feed(Event::CheckpointFailed { for_good: true });
    world.settle();
    assert!(world.asked.is_empty() && world.writes_wait.is_none());
    assert_eq!(world.hurt.len(), 1);
    // Nobody waits for it when the volume is detached.
    world.feed(Event::Drain {
        io: IoId(1),
        checkpoint: true,
    });
    world.settle();
    assert_eq!(world.drains, 1);
}

/// Does all that is due but checkpoints; answers how many of those there were.
fn hold_checkpoints_back(world: &mut World) -> usize {
    let mut held = 0;
    loop {
        let before = world.due.len();
        world
            .due
            .retain(|action| !matches!(action, Action::Checkpoint(_)));
        held += before - world.due.len();
        if !world.step() {
            return held;
        }
    }
}

#[test]
fn checkpoint_that_the_store_refuses_is_made_later_and_keeps_no_drain_waiting() {
    let (mut world, _) = with_a_log_of_runs();
    let refused = || Event::CheckpointFailed { for_good: false };
    world.feed(refused());
    assert_eq!(hold_checkpoints_back(&mut world), 0);
    assert_eq!(world.writes_wait, Some(WriteWait::Log));
    assert!(world.asked.len() == 1 && world.hurt.is_empty());
    // Who asks for it has it tried at once, and goes when that is refused.
    world.feed(Event::Drain {
        io: IoId(1),
        checkpoint: true,
    });
    assert_eq!(hold_checkpoints_back(&mut world), 1);
    assert_eq!(world.drains, 0);
    world.feed(refused());
    assert_eq!(hold_checkpoints_back(&mut world), 0);
    assert_eq!(world.drains, 1);
    for (ms, tried) in [(9_999, 0), (1, 1)] {
        world.now_ms += ms;
        let now_ms = world.now_ms;
        world.feed(Event::Tick { now_ms });
        let due = world.due.iter();
        let is_tried = |action: &&Action| matches!(action, Action::Checkpoint(_));
        assert_eq!(due.filter(is_tried).count(), tried);
    }
    world.settle();
    assert!(world.asked.is_empty() && world.writes_wait.is_none() && world.hurt.is_empty());
    world.read_all();
}

#[test]
fn volume_that_only_reads_takes_nobodys_place_in_the_line() {
    let mut shared = fresh_shared(&[], Generation::new(1));
    while shared.cache.open_for_writes(VOLUME, 0).is_ok() {}
    assert!(shared.cache.has_line());
    let opened = Opened {
        root: Arc::new(MapRoot::empty()),
        log: Vec::new(),
        next_chunk: ChunkSeq::new(1),
        stored_write: WriteSeq::ZERO,
        unsent: Vec::new(),
        kept_segments: Vec::new(),
    };
    let params = VolumeParams {
        read_only: true,
        ..params(1, SIZE, Durability::Local)
    };
    // As a snapshot of the volume that stands there.
    let mut due = Vec::new();
    let mut volume = Volume::new(params, opened, &mut shared, &mut due);
    volume.apply(Event::Tick { now_ms: 1 }, &mut shared, &mut due);
    assert!(shared.cache.has_line());
    assert!(volume.close(&mut shared).is_empty());
    assert!(shared.cache.has_line());
}

/// Asks for the status of all, as often as answers fall short, and gives how often.
fn status_of_all(world: &mut World) -> usize {
    let (mut at, mut asked) = (0, 0);
    while at < world.size() {
        world.ask(Op::Status, range(at, world.size() - at));
        world.settle();
        at += world.last_told;
        asked += 1;
    }
    asked
}

#[test]
fn status_of_a_long_fragmented_range_is_told_in_bounded_answers_from_every_layer() {
    let mut world = World::new(2, Durability::Object);
    // Some steps of the walk long.
    world.grow(160 << 11);
    let end = world.size();
    for place in [0, 8, (16 << 11) - 8, 16 << 11, (100 << 11) + 3, end - 8] {
        world.ask(Op::Write { fua: false }, range(place, 8));
        world.settle();
    }
    world.forget_what_was_overwritten();
    assert!(status_of_all(&mut world) <= 2, "few runs are told at once");
    // Nothing of it in memory: map nodes are loaded, in the middle of the range too.
    world.flush();
    world.reopen(End::CacheLost);
    assert!(
        status_of_all(&mut world) <= 12,
        "no more answers than steps"
    );
    for n in 0..u64::try_from(STATUS_RUNS_MAX).unwrap() {
        world.ask(Op::Write { fua: false }, range((40 << 11) + 2 * n, 1));
        world.settle();
    }
    assert!(
        status_of_all(&mut world) > 2,
        "many runs are more than one answer"
    );
}

/// A volume with data all over, on an empty cache.
fn all_stored_and_cold() -> World {
    let mut world = World::new(2, Durability::Object);
    for start in (0..SIZE).step_by(64) {
        world.ask(Op::Write { fua: false }, range(start, 64));
    }
    let (io, checkpoint) = (IoId(1), true);
    world.feed(Event::Drain { io, checkpoint });
    world.settle();
    world.reopen(End::CacheLost);
    world
}

#[test]
fn reader_in_equal_steps_misses_four_times_however_many_read_in_turn() {
    let (len, step) = (16, 96);
    let there = |n: u64| 8 + n * step;
    let back = |n: u64| SIZE - 24 - n * step;
    let readers: [&[&dyn Fn(u64) -> u64]; 3] = [&[&there], &[&back], &[&there, &back]];
    for (case, readers) in readers.into_iter().enumerate() {
        let mut world = all_stored_and_cold();
        let reads = 20;
        for n in 0..reads {
            for reader in readers {
                world.ask(Op::Read, range(reader(n), len));
                world.settle();
            }
        }
        let stats = world.volume.stats();
        let count = readers.len() as u64;
        assert_eq!(stats.miss_bytes, count * 4 * len * 512, "case {case}");
        assert_eq!(
            stats.hit_bytes,
            count * (reads - 4) * len * 512,
            "case {case}"
        );
        // The frames between are left out, and nothing is read far past where they stopped: a frame takes 16 KiB.
        let frames = world.frames_fetched;
        assert!(
            frames <= count * (reads + 8) * 2 && stats.readahead_bytes > 0,
            "case {case}: {frames}"
        );
    }
}

#[test]
fn reader_who_jumps_or_stops_stepping_is_not_read_ahead_of() {
    let mut world = all_stored_and_cold();
    for _ in 0..1000 {
        let at = world.rng.random_range(0..SIZE / 32) * 32 + 8;
        world.ask(Op::Read, range(at, 8));
        world.settle();
    }
    let stats = world.volume.stats();
    assert_eq!(stats.readahead_bytes, 0);
    assert!(stats.miss_bytes > 0);

    let mut world = all_stored_and_cold();
    for n in 0..4 {
        world.ask(Op::Read, range(n * 96, 16));
        world.settle();
    }
    let ahead = world.volume.stats().readahead_bytes;
    assert!(ahead > 0);
    for at in [3000, 2000, 2500, 3500, 1900, 2704] {
        world.ask(Op::Read, range(at, 16));
        world.settle();
    }
    assert_eq!(world.volume.stats().readahead_bytes, ahead);
}

#[test]
fn read_is_a_miss_until_the_cache_has_it_and_then_none() {
    let mut world = all_stored_and_cold();
    let mut missed = |at| {
        world.ask(Op::Read, range(at, 8));
        world.settle();
        world.last_missed
    };
    assert!(missed(0));
    assert!(!missed(0));
    // The map's nodes are there by now, but not the data.
    assert!(missed(SIZE - 8));
}
