//! The volume: its state, and the way of every event through it.
//!
//! What a sector reads as is decided by four layers, newest first: `dirty` (acknowledged, not yet
//! committed to the store), `tail` (committed since the last checkpoint), `frozen` (being folded
//! into the map by the checkpoint under way), and the map at `root`.
//!
//! Invariants:
//! - A write gets its number ([`WriteSeq`]) when its data have arrived on the cache device, and in
//!   the same step enters the index, the list of unsent writes and its segment's pending records:
//!   so the orders of completion, of records, of the index and of the log are one order.
//! - A chunk is a cut of that order; chunks are committed in order. So the store holds a prefix.
//! - A segment is held by each of its writes until the chunk with that write is committed.
//! - A write is in the journal before it is acknowledged, and stays there until its record page is
//!   durable or its chunk committed. *Process killed: the journal and the device say all that was
//!   acknowledged. Power lost: the journal is void, and recovery goes by the record pages.*

mod direct;
mod flush;
mod heat;
mod read;
mod status;
mod stride;
mod warm;
mod write;
mod writeback;

pub use warm::WARM_SECTORS_MAX;
pub use writeback::{CHECKPOINT_CHUNKS_MIN, CHECKPOINT_SHARE, LOG_CHUNK_ENTRIES};

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

pub use status::STATUS_RUNS_MAX;

use quarry_cache::{Branch, Cache, CacheLoc, Carried, ExtentMap, Mutation};
use quarry_objfmt::head::Durability;
use quarry_objfmt::page::{Record, SegmentKind};
use quarry_objfmt::{
    ChunkId, ChunkSeq, Epoch, Generation, Lba, LbaRange, MapEntry, Sectors, SegmentId, TenantName,
    VolumeId, WriteSeq,
};
use slab::Slab;

use crate::event::{Action, Event, IoError, IoId, Op, Report, Request};
use crate::kept::KeptFrames;
use crate::log::{Committed, FrozenLog};
use crate::map::{MapRoot, Node, NodeCache, NodeRef, Nodes};

/// What all volumes of a daemon share. The driver locks it once for a batch of events.
#[derive(Debug)]
pub struct Shared {
    /// The cache device's bookkeeping.
    pub cache: Cache,
    /// Decoded map nodes.
    pub nodes: NodeCache,
    /// What was read ahead.
    pub kept: KeptFrames,
}

impl Shared {
    /// Forgets the copies that are held for `group` of what `volume` has in the store. Answers how many bytes they are, on
    /// the cache device and in memory.
    pub fn evict(&mut self, group: u32, volume: VolumeId) -> (u64, u64) {
        let kept = self.kept.evict(group, volume);
        (self.cache.evict(group, volume), kept)
    }
}

/// [`Tuning::log_replay_max`], if nothing else is said: far more than starts a checkpoint, for an entry covers a sector at least, and
/// [`Tuning::checkpoint_sectors`] are fewer.
pub const LOG_REPLAY_MAX: u64 = 16 << 20;

/// The limits of a volume, each with its reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// Longest time an acknowledged write waits before its upload starts, in milliseconds: with
    /// the upload's own time it is the RPO of a volume that is not busy.
    pub writeback_delay_ms: u64,
    /// Most sectors of data in a chunk: its upload's memory, and the grain of parallel uploads.
    pub chunk_sectors_max: u32,
    /// Most writes in a chunk: bounds its header, for discards carry no data.
    pub chunk_writes_max: usize,
    /// Most chunks being uploaded at once: bounds memory, and what a crash leaves as orphans.
    pub uploads_max: usize,
    /// Entries of the log that start a checkpoint.
    pub checkpoint_entries: usize,
    /// Entries of the log, those that a checkpoint folds just now among them, with which no write is placed until there are fewer: bounds
    /// the memory they take, about 200 bytes each, beside a map that cannot be written.
    pub log_entries_max: usize,
    /// The same for all that its chunks have, written over or not, each counted as [`LOG_CHUNK_ENTRIES`] more: bounds what it takes
    /// to read it again.
    pub log_replay_max: u64,
    /// Sectors that chunks of the log cover, which start a checkpoint: bounds what nobody knows to be useless.
    pub checkpoint_sectors: u64,
    /// Chunks of the log that start a checkpoint, however small: bounds the time to replay them.
    pub checkpoint_chunks: u64,
    /// Most sectors that readahead runs before a sequential reader: bounds memory, and what is fetched for nothing when it stops.
    pub readahead_sectors_max: u64,
    /// Entries of the journal: so many writes at most lack a durable record page. At half of them
    /// a round of record pages is started, whether or not anybody flushes.
    pub journal_entries: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            writeback_delay_ms: 5_000,
            chunk_sectors_max: (8 << 20) / 512,
            chunk_writes_max: 16_384,
            uploads_max: 8,
            checkpoint_entries: 256 << 10,
            log_entries_max: 4 << 20,
            log_replay_max: LOG_REPLAY_MAX,
            checkpoint_sectors: (1 << 30) / 512,
            checkpoint_chunks: 1024,
            readahead_sectors_max: (64 << 20) / 512,
            journal_entries: 8 << 10,
        }
    }
}

/// What a volume is, from its `head`.
#[derive(Clone, Debug)]
pub struct VolumeParams {
    /// Its name for ever.
    pub id: VolumeId,
    /// Whose it is.
    pub tenant: TenantName,
    /// Its size.
    pub size: Sectors,
    /// Bytes of a logical block: 512 or 4096.
    pub sector_size: u32,
    /// Sectors of a frame.
    pub frame_sectors: u32,
    /// The epoch in which we write.
    pub epoch: Epoch,
    /// What a flush promises.
    pub durability: Durability,
    /// Whether it takes writes.
    pub read_only: bool,
    /// Whose part of the cache it writes to, and who shares with it what is known of the store.
    pub group: u32,
    /// Limits.
    pub tuning: Tuning,
}

/// The state in which a volume starts: what its store and its cache device hold.
#[derive(Debug)]
pub struct Opened {
    /// The map at the last checkpoint.
    pub root: Arc<MapRoot>,
    /// The entries of the chunks after it, in the order of the log.
    pub log: Vec<Vec<MapEntry>>,
    /// The number of the next chunk.
    pub next_chunk: ChunkSeq,
    /// The newest write in the store.
    pub stored_write: WriteSeq,
    /// Writes on the cache device that the store lacks: consecutive from `stored_write` on.
    pub unsent: Vec<(SegmentId, Record)>,
    /// Segments that the cache kept for this volume since the crash, each held once for it.
    pub kept_segments: Vec<SegmentId>,
}

/// Whether a volume serves, and if not fully, why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumeState {
    /// Reads and writes.
    Serving,
    /// Reads only, as asked for.
    ReadOnly,
    /// Reads only: a newer writer owns the volume. What was unsent stays in the cache.
    Fenced {
        /// Who.
        by: String,
    },
    /// Reads only: the cache device failed a sync or a record. Never tried again.
    Failed {
        /// The errno.
        errno: i32,
        /// What was being done.
        doing: &'static str,
    },
}

/// Counters and gauges of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct VolumeStats {
    /// Read requests.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flush requests, and writes with FUA.
    pub flushes: u64,
    /// Rounds of sync, record pages, sync that served them.
    pub flush_rounds: u64,
    /// Discard and write-zeroes requests.
    pub discards: u64,
    /// Bytes read from the cache device.
    pub hit_bytes: u64,
    /// Bytes read that had to be fetched.
    pub miss_bytes: u64,
    /// Bytes read as zeroes, from nowhere.
    pub zero_bytes: u64,
    /// Stored bytes asked for by readahead.
    pub readahead_bytes: u64,
    /// Stored bytes asked for by warming.
    pub warmed_bytes: u64,
    /// Runs that were received straight into a request's buffer.
    pub direct_reads: u64,
    /// Their bytes, which are among the missed.
    pub direct_bytes: u64,
    /// Runs that were to be received so, and were then fetched the ordinary way.
    pub direct_fallbacks: u64,
    /// Chunks committed.
    pub uploaded_chunks: u64,
    /// Their bytes.
    pub uploaded_bytes: u64,
    /// Checkpoints made.
    pub checkpoints: u64,
    /// Bytes acknowledged that the store lacks.
    pub dirty_bytes: u64,
    /// Age of the oldest write that the store lacks, in milliseconds.
    pub rpo_ms: u64,
    /// Requests in flight.
    pub in_flight: u64,
    /// Whether writes wait for cache space.
    pub stalled: bool,
    /// Requests that failed.
    pub errors: u64,
    /// Entries in the index of unsent writes.
    pub dirty_entries: u64,
    /// Entries of the log since the last checkpoint.
    pub log_entries: u64,
    /// Segments of the cache device that it writes to, or is about to.
    pub open_segments: u64,
}

/// What a dirty run reads as.
#[derive(Clone, Copy, Debug)]
struct Dirty {
    seq: WriteSeq,
    /// `None`: zeroes.
    at: Option<CacheLoc>,
}

impl Carried for Dirty {
    fn skip(self, n: Sectors) -> Self {
        Self {
            at: self.at.map(|at| at.skip(sectors_u32(n))),
            ..self
        }
    }
}

/// A request in flight.
#[derive(Debug)]
struct Active {
    request: Request,
    /// Pieces not yet done; while a request is being cut up, one more.
    left: u32,
    failed: Option<IoError>,
    /// Sectors that have been given their place (writes).
    placed: Sectors,
    /// The newest write it made, to be made durable before completion (FUA).
    last_write: WriteSeq,
    /// A clean read failed: it is resolved anew, and what the cache has of what the store has is not read.
    again: bool,
    distrusts: bool,
    /// It was resolved when the cache device was in doubt.
    doubts: bool,
    /// A fetch failed by a map that is the newest no more: it is resolved anew, once.
    behind: bool,
    renewed: bool,
    /// Which of the volume's maps it was resolved by.
    map: u64,
    /// Map nodes loaded for it so far: other lookups cannot push them out before it is resolved.
    held: Vec<(NodeRef, Arc<Node>)>,
}

/// What an I/O of ours is for.
#[derive(Debug)]
enum Io {
    Read {
        slot: usize,
        segment: SegmentId,
        clean: bool,
    },
    Buffer {
        slot: usize,
    },
    Write {
        slot: usize,
        at: CacheLoc,
        range: LbaRange,
    },
    Header {
        segment: SegmentId,
    },
    CleanMark {
        segment: SegmentId,
    },
    Sync,
    RecordPage {
        segment: SegmentId,
    },
    Fetch {
        chunk: ChunkId,
        frames: Vec<crate::event::FrameRef>,
        why: read::Why,
        /// Which of the volume's maps was the newest then.
        map: u64,
    },
    Direct {
        slot: usize,
        piece: read::Piece,
    },
    /// Without a slot: for readahead.
    Nodes {
        slot: Option<usize>,
        map: u64,
    },
    WarmNodes {
        map: u64,
    },
    Fill {
        chunk: ChunkId,
        run: quarry_cache::CleanRun,
        why: read::Why,
    },
}

/// The driver's side of one step.
struct Cx<'a> {
    cache: &'a mut Cache,
    nodes: Nodes<'a>,
    kept: &'a mut KeptFrames,
    out: &'a mut Vec<Action>,
}

/// A volume, attached here.
#[derive(Debug)]
pub struct Volume {
    params: VolumeParams,
    state: VolumeState,
    /// Being detached: nothing new is taken.
    stopping: bool,
    now_ms: u64,
    /// The driver's clock when it was told first: what was taken up from before is counted from there.
    first_ms: Option<u64>,
    active: Slab<Active>,
    ios: Slab<Io>,
    stats: VolumeStats,

    dirty: ExtentMap<Dirty>,
    tail: ExtentMap<Committed>,
    frozen: Option<FrozenLog>,
    root: Arc<MapRoot>,
    /// How many were here before it.
    maps: u64,

    reads: read::Reads,
    writes: write::Writes,
    flush: flush::Flush,
    writeback: writeback::Writeback,
}

impl Volume {
    /// A volume that serves from `opened`; its unsent writes are dirty again.
    #[must_use]
    pub fn new(
        params: VolumeParams,
        opened: Opened,
        shared: &mut Shared,
        out: &mut Vec<Action>,
    ) -> Self {
        Self::prepare(params, opened).join(shared, out)
    }

    /// All of [`Volume::new`] that takes long and needs nothing of what volumes share.
    #[must_use]
    pub fn prepare(params: VolumeParams, opened: Opened) -> Prepared {
        let mut tail = ExtentMap::default();
        let mut log = writeback::LogLength {
            chunks: opened.log.len() as u64,
            entries: opened.log.iter().map(|chunk| chunk.len() as u64).sum(),
            sectors: 0,
        };
        for entry in opened.log.iter().flatten() {
            let range = entry_range(entry);
            log.sectors += range.len().get();
            tail.insert(range, Committed(entry.location));
        }
        let mut volume = Self {
            state: if params.read_only {
                VolumeState::ReadOnly
            } else {
                VolumeState::Serving
            },
            stopping: false,
            now_ms: 0,
            first_ms: None,
            active: Slab::new(),
            ios: Slab::new(),
            stats: VolumeStats::default(),
            dirty: ExtentMap::default(),
            tail,
            frozen: None,
            root: opened.root,
            maps: 0,
            reads: read::Reads::default(),
            writes: write::Writes::new(opened.stored_write),
            flush: flush::Flush::new(opened.stored_write),
            writeback: writeback::Writeback::new(opened.next_chunk, opened.stored_write, log),
            params,
        };
        let mut holds = BTreeMap::new();
        for (segment, record) in &opened.unsent {
            *holds.entry(*segment).or_default() += 1;
            volume.adopt_record(*segment, record);
        }
        // They were durable before the crash, and still are; and they have waited long enough for the store.
        let last = volume.writes.last_acknowledged();
        volume.flush.durable_up_to(last);
        volume.writeback.cut_up_to(last);
        Prepared {
            volume,
            holds,
            kept: opened.kept_segments,
        }
    }

    /// Tells the volume what time it is, in milliseconds from any fixed point; it never goes back.
    pub fn set_now(&mut self, now_ms: u64) {
        let first_ms = *self.first_ms.get_or_insert(now_ms);
        let since = now_ms.saturating_sub(first_ms);
        self.now_ms = self.now_ms.max(since);
    }

    /// One step. Feeds one event, appends what is to be done to `out`.
    pub fn apply(&mut self, event: Event, shared: &mut Shared, out: &mut Vec<Action>) {
        shared.nodes.leave(shared.cache.index_bytes());
        let mut cx = Cx {
            cache: &mut shared.cache,
            nodes: shared.nodes.of(self.params.group),
            kept: &mut shared.kept,
            out,
        };
        let cx = &mut cx;
        let before = cx.out.len();
        if let Some(errno) = cx.cache.in_doubt() {
            self.doubt(errno, cx);
        }
        match event {
            Event::Request(request) => self.request(request, cx),
            Event::IoDone { io, result } => self.io_done(io, result, cx),
            Event::Fetched { io, frames } => self.fetched(io, frames, cx),
            Event::NodesLoaded { io, result } => self.nodes_loaded(io, result, cx),
            Event::Uploaded {
                seq,
                entries,
                stored_bytes,
            } => self.uploaded(seq, entries, stored_bytes, cx),
            Event::Checkpointed { root, upto } => self.checkpointed(root, upto, cx),
            Event::Fenced { by } => self.fenced(by, cx),
            Event::Tick { now_ms } => self.tick(now_ms, cx),
            Event::Drain { io, checkpoint } => self.drain(io, checkpoint, cx),
            Event::Remapped { root } => self.use_map(root),
            Event::Warm { io, range } => self.warm(io, range, cx),
            Event::CheckpointFailed { for_good } => self.checkpoint_failed(for_good, cx),
            Event::CacheFailed { errno } => {
                self.fail(errno, "syncing, or reading what is unsent", cx)
            }
            Event::Grown { size } => self.params.size = self.params.size.max(size),
            Event::DirectReads(on) => self.reads.direct = on,
            Event::Stop => self.stopping = true,
        }
        if Mutation::JournalAfterAcknowledgement.is_on() {
            cx.out[before..].sort_by_key(|action| matches!(action, Action::Journal { .. }));
        }
    }

    /// The end, with no I/O under way: gives up what the volume holds of the cache. Segments with
    /// writes that the store lacks stay, held once, as recovery would find them.
    ///
    /// Answers with those segments.
    pub fn close(self, shared: &mut Shared) -> Vec<(SegmentId, Generation)> {
        let cache = &mut shared.cache;
        self.leave_line(cache);
        cache.forget_unsent(self.params.group, self.writes.unsent().len());
        cache.leave_group(self.params.group, !self.params.read_only);
        let mut kept = Vec::new();
        for (segment, unsent) in self.into_segments() {
            cache.part_with(segment, unsent);
            if unsent {
                kept.push((segment, cache.generation(segment)));
            }
        }
        kept
    }

    /// Wants no segment any more. One that takes no writes never stands in the line, but the volume whose
    /// snapshot it is may, under the same name.
    fn leave_line(&self, cache: &mut Cache) {
        if !self.params.read_only {
            cache.leave_line(self.params.id);
        }
    }

    /// Its name for ever.
    #[must_use]
    pub const fn id(&self) -> VolumeId {
        self.params.id
    }

    /// The newest write that was acknowledged.
    #[must_use]
    pub const fn last_acknowledged(&self) -> WriteSeq {
        self.writes.last_acknowledged()
    }

    /// Its size.
    #[must_use]
    pub const fn size(&self) -> Sectors {
        self.params.size
    }

    /// Bytes of a logical block.
    #[must_use]
    pub const fn sector_size(&self) -> u32 {
        self.params.sector_size
    }

    /// Whether it was attached for reading only.
    #[must_use]
    pub const fn read_only(&self) -> bool {
        self.params.read_only
    }

    /// Whether it serves.
    #[must_use]
    pub const fn state(&self) -> &VolumeState {
        &self.state
    }

    /// Whether ticks matter to it: something waits for time or space.
    #[must_use]
    pub fn wants_ticks(&self) -> bool {
        !self.active.is_empty()
            || self.writes.holds_segments()
            || self.writeback.pending()
            || self.writeback.refused_until.is_some()
    }

    /// What was read most since the attach, hottest first, in at most `ranges_max` ranges.
    #[must_use]
    pub fn hottest(&self, ranges_max: usize) -> Vec<LbaRange> {
        let end = Lba::new(self.params.size.get());
        self.reads.heat.hottest(end, ranges_max)
    }

    /// Counters and gauges.
    #[must_use]
    pub fn stats(&self) -> VolumeStats {
        VolumeStats {
            dirty_bytes: self.writes.unsent_bytes(),
            rpo_ms: self
                .writeback
                .oldest_ms()
                .map_or(0, |since| self.now_ms.saturating_sub(since)),
            in_flight: self.active.len() as u64,
            stalled: self.writes.starved(),
            dirty_entries: self.dirty.len() as u64,
            open_segments: self.writes.open_segments(),
            log_entries: self.log_entries() as u64,
            ..self.stats
        }
    }

    /// What is in the store and not in the map.
    fn log_entries(&self) -> usize {
        self.tail.len() + self.frozen.as_ref().map_or(0, |log| log.runs().len())
    }

    fn request(&mut self, request: Request, cx: &mut Cx<'_>) {
        if let Err(error) = self.admit(&request) {
            self.stats.errors += 1;
            cx.out.push(Action::Complete {
                request: request.id,
                result: Err(error),
            });
            return;
        }
        let slot = self.active.insert(Active {
            request,
            left: 0,
            failed: None,
            placed: Sectors::ZERO,
            last_write: WriteSeq::ZERO,
            again: false,
            distrusts: false,
            doubts: false,
            behind: false,
            renewed: false,
            map: self.maps,
            held: Vec::new(),
        });
        let bytes = request.range.len().bytes();
        match request.op {
            Op::Read => {
                self.stats.reads += 1;
                self.stats.read_bytes += bytes;
                self.start_read(slot, cx);
            }
            Op::Write { fua } => {
                self.stats.writes += 1;
                self.stats.write_bytes += bytes;
                self.stats.flushes += u64::from(fua);
                self.queue_write(slot, cx);
            }
            Op::Discard | Op::WriteZeroes { .. } => {
                self.stats.discards += 1;
                self.queue_write(slot, cx);
            }
            Op::Flush => {
                self.stats.flushes += 1;
                self.start_flush(slot, cx);
            }
            Op::Status => self.start_status(slot, cx),
        }
    }

    /// The checks that every request passes before anything of it is done.
    fn admit(&self, request: &Request) -> Result<(), IoError> {
        if self.stopping {
            return Err(IoError::ShuttingDown);
        }
        let block = u64::from(self.params.sector_size / quarry_objfmt::SECTOR_SIZE);
        if request.op != Op::Flush {
            let range = request.range;
            let inside = range.start < range.end && range.end.get() <= self.params.size.get();
            if !inside
                || !range.start.get().is_multiple_of(block)
                || !range.end.get().is_multiple_of(block)
            {
                return Err(IoError::Invalid);
            }
        }
        match (request.op, &self.state) {
            (Op::Read | Op::Status, _)
            | (_, VolumeState::Serving)
            | (Op::Flush, VolumeState::ReadOnly) => Ok(()),
            (_, VolumeState::Failed { .. }) => Err(IoError::Io),
            _ => Err(IoError::ReadOnly),
        }
    }

    fn io_done(&mut self, io: IoId, result: Result<(), i32>, cx: &mut Cx<'_>) {
        match self.ios.remove(io_key(io)) {
            Io::Read {
                slot,
                segment,
                clean,
            } => self.read_done(slot, segment, clean, result, cx),
            Io::Buffer { slot } => self.piece_done(slot, result.map_err(|_| IoError::Io), cx),
            Io::Direct { slot, piece } => self.direct_done(slot, piece, result, cx),
            Io::Write { slot, at, range } => self.write_done(slot, at, range, result, cx),
            Io::Header { segment } => self.header_done(segment, result, cx),
            Io::CleanMark { segment } => cx.cache.unpin(segment),
            Io::Sync => self.synced(result, cx),
            Io::RecordPage { segment } => self.record_page_done(segment, result, cx),
            Io::Fill { chunk, run, why } => {
                let trusted = result.is_ok() || Mutation::TrustFailedFill.is_on();
                cx.cache.finish_fill(chunk, run, trusted);
                if why == read::Why::Warming {
                    self.warm_fetched(1, false, cx);
                }
            }
            other @ (Io::Fetch { .. } | Io::Nodes { .. } | Io::WarmNodes { .. }) => {
                panic!("{other:?} completes by an event of its own")
            }
        }
    }

    fn use_map(&mut self, root: Arc<MapRoot>) {
        self.root = root;
        self.maps += 1;
    }

    /// A map that is newer than the request's look-up may name other objects: what failed is looked up once more. The store
    /// keeps what a map needed for some time after it, but one that was away may answer later than that.
    fn is_behind(&self, slot: usize) -> bool {
        let active = &self.active[slot];
        active.map < self.maps && !active.renewed
    }

    fn io(&mut self, io: Io) -> IoId {
        IoId(self.ios.insert(io) as u64)
    }

    /// One piece of a request is done.
    fn piece_done(&mut self, slot: usize, result: Result<(), IoError>, cx: &mut Cx<'_>) {
        let active = &mut self.active[slot];
        active.left -= 1;
        if let Err(error) = result {
            active.failed.get_or_insert(error);
        }
        if active.left > 0 {
            return;
        }
        if active.again || active.behind {
            Branch::ReadAgain.taken();
            active.again = false;
            active.renewed |= std::mem::take(&mut active.behind);
            active.failed = None;
            self.start_read(slot, cx);
            return;
        }
        let fua = matches!(
            active.request.op,
            Op::Write { fua: true } | Op::WriteZeroes { fua: true }
        );
        if fua && active.failed.is_none() && !Mutation::FuaAsPlainWrite.is_on() {
            Branch::FuaWaits.taken();
            let target = active.last_write;
            self.await_durable(slot, target, cx);
            return;
        }
        self.complete(slot, cx);
    }

    fn complete(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let active = self.active.remove(slot);
        self.stats.errors += u64::from(active.failed.is_some());
        let result = active.failed.map_or(Ok(()), Err);
        cx.out.push(Action::Complete {
            request: active.request.id,
            result,
        });
    }

    fn complete_with(&mut self, slot: usize, error: IoError, cx: &mut Cx<'_>) {
        self.active[slot].failed = Some(error);
        self.complete(slot, cx);
    }

    /// A newer writer owns the volume. From here on nothing is acknowledged; reads go on, from
    /// what we have, and the unsent segments stay held for the operator to decide upon.
    fn fenced(&mut self, by: String, cx: &mut Cx<'_>) {
        if matches!(self.state, VolumeState::Fenced { .. }) {
            return;
        }
        let unsent_bytes = self.writes.unsent_bytes();
        cx.out.push(Action::Report(Report::Fenced {
            by: by.clone(),
            unsent_bytes,
        }));
        self.state = VolumeState::Fenced { by };
        self.refuse_waiting(IoError::ReadOnly, cx);
    }

    /// The cache device broke a promise that durability rests on. Sticky: a sync that succeeds
    /// after one that failed proves nothing of the data in between.
    fn fail(&mut self, errno: i32, doing: &'static str, cx: &mut Cx<'_>) {
        if matches!(self.state, VolumeState::Failed { .. }) {
            return;
        }
        cx.out
            .push(Action::Report(Report::CacheFailed { errno, doing }));
        self.state = VolumeState::Failed { errno, doing };
        self.refuse_waiting(IoError::Io, cx);
    }

    /// A sync of the cache device failed, whoever's it was: no more writes are taken, which nobody could make durable.
    fn doubt(&mut self, errno: i32, cx: &mut Cx<'_>) {
        if matches!(self.state, VolumeState::Serving) {
            self.fail(errno, "syncing, for this volume or another", cx);
        }
    }

    /// Fails what waits for durability or space that will not come.
    fn refuse_waiting(&mut self, error: IoError, cx: &mut Cx<'_>) {
        for slot in self.flush.take_waiters() {
            self.complete_with(slot, error, cx);
        }
        for slot in self.writes.take_waiting() {
            self.piece_done(slot, Err(error), cx);
        }
        self.leave_line(cx.cache);
        self.finish_drains(cx);
    }

    fn tick(&mut self, now_ms: u64, cx: &mut Cx<'_>) {
        self.set_now(now_ms);
        self.pump_writes(cx);
        self.close_idle(cx);
        self.pump_writeback(cx);
    }

    /// One reason less to keep a segment; the last one makes it clean, which is noted on the
    /// device so that the next start need not ask the store. The note need not be durable: without
    /// it, recovery finds writes that the store has already.
    fn release(&mut self, segment: SegmentId, cx: &mut Cx<'_>) {
        if !cx.cache.release(segment) {
            return;
        }
        self.writes.forget_segment(segment);
        let generation = cx.cache.generation(segment);
        cx.cache.pin(segment);
        let io = self.io(Io::CleanMark { segment });
        self.write_header(io, segment, generation, SegmentKind::Fill, cx);
    }
}

/// A volume that has taken up what the cache kept of it over a crash, and is not yet among those that share the cache.
#[derive(Debug)]
pub struct Prepared {
    volume: Volume,
    /// How many unsent writes each segment holds.
    holds: SegmentTable<u64>,
    /// Segments that are held once for it.
    kept: Vec<SegmentId>,
}

impl Prepared {
    /// The volume, which has its part of what volumes share from now on.
    #[must_use]
    pub fn join(self, shared: &mut Shared, out: &mut Vec<Action>) -> Volume {
        let Self {
            mut volume,
            holds,
            kept,
        } = self;
        let group = volume.params.group;
        let mut cx = Cx {
            cache: &mut shared.cache,
            nodes: shared.nodes.of(group),
            kept: &mut shared.kept,
            out,
        };
        cx.cache.join_group(group, !volume.params.read_only);
        let VolumeParams { id, epoch, .. } = volume.params;
        cx.cache
            .begin_term(group, id, epoch, !volume.params.read_only);
        cx.cache.note_unsent(group, volume.writes.unsent().len());
        for (segment, writes) in holds {
            (0..writes).for_each(|_| cx.cache.hold(segment));
        }
        for segment in kept {
            cx.cache.assign(segment, group);
            volume.release(segment, &mut cx);
        }
        volume
    }
}

fn io_key(io: IoId) -> usize {
    usize::try_from(io.0).expect("I/O names are slab keys")
}

pub(crate) fn sectors_u32(n: Sectors) -> u32 {
    u32::try_from(n.get()).expect("a run inside a segment or a frame is short")
}

pub(crate) fn entry_range(entry: &MapEntry) -> LbaRange {
    LbaRange::new(entry.start, Sectors::new(u64::from(entry.len)))
        .expect("entries were checked when decoded")
}

type SegmentTable<T> = BTreeMap<SegmentId, T>;
type Queue<T> = VecDeque<T>;
