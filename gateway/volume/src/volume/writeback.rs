//! Writeback: cutting the order of writes into chunks, committing them in order, and folding the
//! log into the map.
//!
//! A chunk is everything from the write after the last cut up to some write: so the store always
//! holds a prefix. Chunks are uploaded several at once and committed strictly in order, for replay
//! reads the log up to its first gap. *Crash with chunks 7 and 9 stored: 9 is behind the gap, an
//! orphan that nobody sees; its writes are still on the cache device.*

use std::sync::Arc;

use quarry_cache::{Branch, CacheLoc, Carried, CleanRun, ExtentMap, Mutation};
use quarry_objfmt::page::{Record, RecordBody};
use quarry_objfmt::{ChunkId, ChunkSeq, LbaRange, MapEntry, Sectors, WriteSeq};

use super::write::record_range;
use super::{Cx, Queue, Volume, VolumeState, entry_range, sectors_u32};
use crate::event::{Action, CheckpointPlan, ChunkPlan, ExtentSource, IoId, PlannedExtent};
use crate::log::{Committed, FrozenLog};
use crate::map::MapRoot;

/// A chunk on its way to the store.
#[derive(Debug)]
struct Planned {
    seq: ChunkSeq,
    last_write: WriteSeq,
    writes: usize,
    /// When its oldest write was acknowledged.
    since_ms: u64,
    /// The runs that its writes come to.
    ranges: Vec<LbaRange>,
    /// Where its data lie on the cache device: (first raw sector, length, place).
    resident: Vec<(u32, u32, CacheLoc)>,
    /// Its entries and size, once stored.
    stored: Option<(Vec<MapEntry>, u64)>,
}

/// A log that covers as much as the volume divided by this starts a checkpoint before it is long: until it is folded
/// nobody knows what of the map it has made useless.
pub const CHECKPOINT_SHARE: u64 = 16;

/// Fewer chunks of the log than this start none: each costs two PUTs.
pub const CHECKPOINT_CHUNKS_MIN: u64 = 8;

/// Between tries to make a checkpoint that the store refuses.
const CHECKPOINT_RETRY_MS: u64 = 10_000;

/// What a chunk of the log counts as beside its entries, in such: its header, and what is kept of it.
pub const LOG_CHUNK_ENTRIES: u64 = 32;

/// How much a log is.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct LogLength {
    pub(super) chunks: u64,
    /// Of all of them, also those that later ones hide.
    pub(super) entries: u64,
    /// What they cover, each for itself.
    pub(super) sectors: u64,
}

impl LogLength {
    /// What reading it again takes, in entries.
    const fn replay(self) -> u64 {
        self.entries + self.chunks * LOG_CHUNK_ENTRIES
    }
}

#[derive(Debug)]
struct Drain {
    io: IoId,
    target: WriteSeq,
    checkpoint: bool,
}

/// The writeback side of a volume.
#[derive(Debug)]
pub(super) struct Writeback {
    next_chunk: ChunkSeq,
    planned: Queue<Planned>,
    /// Every write up to this one is in a committed chunk.
    committed: WriteSeq,
    /// Every write up to this one is in the map.
    folded: WriteSeq,
    /// Every write up to this one is in a chunk that is planned or committed.
    cut: WriteSeq,
    uncut_sectors: u64,
    uncut_writes: usize,
    uncut_since: Option<u64>,
    /// Cut up to here at once: someone waits for it.
    wanted: WriteSeq,
    /// What was committed since the last checkpoint.
    log: LogLength,
    last_chunk: Option<ChunkSeq>,
    checkpoint_upto: Option<ChunkSeq>,
    /// The newest write that the checkpoint under way folds.
    checkpoint_write: WriteSeq,
    /// What the checkpoint under way folds.
    checkpoint_log: LogLength,
    /// The map cannot be read, so that nothing can be folded into it.
    pub(super) map_damaged: bool,
    /// The store has refused a checkpoint: until then no other is tried, unless a drain asks for it.
    pub(super) refused_until: Option<u64>,
    drains: Vec<Drain>,
}

impl Writeback {
    /// What reading the log again takes, in entries; what a checkpoint folds just now is still in it.
    pub(super) fn log_replay(&self) -> u64 {
        let folding = self
            .checkpoint_upto
            .map_or(0, |_| self.checkpoint_log.replay());
        self.log.replay() + folding
    }

    /// `log`: what is in the log already.
    pub(super) fn new(next_chunk: ChunkSeq, stored: WriteSeq, log: LogLength) -> Self {
        Self {
            next_chunk,
            planned: Queue::new(),
            committed: stored,
            // Where the map ends inside a log is not asked for: a drain folds it all.
            folded: match log.chunks {
                0 => stored,
                _ => WriteSeq::ZERO,
            },
            cut: stored,
            uncut_sectors: 0,
            uncut_writes: 0,
            uncut_since: None,
            wanted: WriteSeq::ZERO,
            log,
            last_chunk: next_chunk
                .get()
                .checked_sub(1)
                .filter(|_| log.chunks > 0)
                .map(ChunkSeq::new),
            checkpoint_upto: None,
            checkpoint_write: WriteSeq::ZERO,
            checkpoint_log: LogLength::default(),
            map_damaged: false,
            refused_until: None,
            drains: Vec::new(),
        }
    }

    pub(super) const fn committed(&self) -> WriteSeq {
        self.committed
    }

    pub(super) fn pending(&self) -> bool {
        self.uncut_writes > 0 || !self.planned.is_empty() || !self.drains.is_empty()
    }

    /// When the oldest write that the store lacks was acknowledged.
    pub(super) fn oldest_ms(&self) -> Option<u64> {
        self.planned
            .front()
            .map(|p| p.since_ms)
            .or(self.uncut_since)
    }

    /// What is uncut up to here is to be cut as soon as there is a place.
    pub(super) fn cut_up_to(&mut self, target: WriteSeq) {
        self.wanted = self.wanted.max(target);
    }

    pub(super) fn note(&mut self, now_ms: u64, record: &Record) {
        if let RecordBody::Data { .. } = record.body {
            self.uncut_sectors += u64::from(record.len);
        }
        self.uncut_writes += 1;
        self.uncut_since.get_or_insert(now_ms);
    }
}

/// What a planned run reads as.
#[derive(Clone, Copy)]
enum Content {
    Data(CacheLoc),
    Zero,
    Discard,
}

impl Carried for Content {
    fn skip(self, n: Sectors) -> Self {
        match self {
            Self::Data(at) => Self::Data(at.skip(sectors_u32(n))),
            same => same,
        }
    }
}

impl Volume {
    /// Starts what uploads and checkpoints are due.
    pub(super) fn pump_writeback(&mut self, cx: &mut Cx<'_>) {
        while self.cut_is_due() {
            self.cut(cx);
        }
        self.pump_checkpoint(cx);
        self.finish_drains(cx);
    }

    fn cut_is_due(&self) -> bool {
        let wb = &self.writeback;
        let serving = self.state == VolumeState::Serving;
        if !serving || wb.uncut_writes == 0 {
            return false;
        }
        if wb.planned.len() >= self.params.tuning.uploads_max {
            Branch::UploadsFull.taken();
            return false;
        }
        let tuning = &self.params.tuning;
        let age = wb
            .uncut_since
            .map_or(0, |since| self.now_ms.saturating_sub(since));
        let why = if wb.uncut_sectors >= u64::from(tuning.chunk_sectors_max) {
            Branch::CutBySectors
        } else if wb.uncut_writes >= tuning.chunk_writes_max {
            Branch::CutByWrites
        } else if age >= tuning.writeback_delay_ms {
            Branch::CutByAge
        } else if wb.wanted > wb.cut {
            Branch::CutWanted
        } else if self.writes.starved() {
            Branch::CutStarved
        } else {
            return false;
        };
        why.taken();
        true
    }

    /// Everything up to `target` is to be committed as soon as can be.
    pub(super) fn upload_up_to(&mut self, target: WriteSeq, cx: &mut Cx<'_>) {
        self.writeback.cut_up_to(target);
        self.pump_writeback(cx);
    }

    /// Makes one chunk of the oldest writes that are in none. Data that a later write of the same
    /// chunk covers are left out: the chunk appears whole or not at all.
    fn cut(&mut self, cx: &mut Cx<'_>) {
        let tuning = self.params.tuning;
        let already: usize = self.writeback.planned.iter().map(|p| p.writes).sum();
        let mut contents = ExtentMap::default();
        let (mut sectors, mut writes) = (0, 0);
        let (mut first, mut last) = (None, self.writeback.cut);
        for unsent in self
            .writes
            .unsent()
            .iter()
            .skip(already)
            .take(tuning.chunk_writes_max)
        {
            let record = &unsent.record;
            let content = match record.body {
                RecordBody::Data { offset } => {
                    if writes > 0 && sectors + record.len > tuning.chunk_sectors_max {
                        break;
                    }
                    sectors += record.len;
                    Content::Data(CacheLoc {
                        segment: unsent.segment,
                        offset,
                    })
                }
                RecordBody::Zero => Content::Zero,
                RecordBody::Discard => Content::Discard,
            };
            contents.insert(record_range(record), content);
            first.get_or_insert(record.seq);
            last = record.seq;
            writes += 1;
        }
        if Mutation::FreeBeforeCommit.is_on() {
            let cut = self.writes.unsent().iter().skip(already).take(writes);
            let segments: Vec<_> = cut.map(|unsent| unsent.segment).collect();
            segments.into_iter().for_each(|id| self.release(id, cx));
        }
        let Some(first_write) = first else {
            panic!("uncut writes that are not in the list of unsent ones")
        };

        let uncut_since = self
            .writes
            .unsent()
            .get(already + writes)
            .map(|unsent| unsent.at_ms);
        let wb = &mut self.writeback;
        let since_ms = wb.uncut_since.unwrap_or(self.now_ms);
        wb.uncut_sectors -= u64::from(sectors);
        wb.uncut_writes -= writes;
        wb.uncut_since = uncut_since;
        wb.cut = last;
        let seq = wb.next_chunk;
        wb.next_chunk = seq.next();

        let (extents, resident) = lay_out(&contents, cx);
        wb.planned.push_back(Planned {
            seq,
            last_write: last,
            writes,
            since_ms,
            ranges: extents.iter().map(|extent| extent.range).collect(),
            resident,
            stored: None,
        });
        let id = ChunkId {
            volume: self.params.id,
            epoch: self.params.epoch,
            seq,
        };
        cx.out.push(Action::Upload(ChunkPlan {
            id,
            first_write,
            last_write: last,
            extents,
        }));
    }

    pub(super) fn uploaded(
        &mut self,
        seq: ChunkSeq,
        entries: Vec<MapEntry>,
        stored_bytes: u64,
        cx: &mut Cx<'_>,
    ) {
        let planned = self.writeback.planned.iter_mut().find(|p| p.seq == seq);
        planned.expect("an upload is answered once").stored = Some((entries, stored_bytes));
        if Mutation::CommitOutOfOrder.is_on() {
            let planned = &mut self.writeback.planned;
            let stored = planned.iter().position(|p| p.stored.is_some());
            planned.swap(0, stored.expect("just stored"));
        }
        let mut committed = 0;
        while self
            .writeback
            .planned
            .front()
            .is_some_and(|p| p.stored.is_some())
        {
            let planned = self.writeback.planned.pop_front().expect("just seen");
            self.commit(planned, cx);
            committed += 1;
        }
        match committed {
            0 => Branch::StoredEarly.taken(),
            1 => {}
            _ => Branch::CommittedSeveral.taken(),
        }
        self.pump_writes(cx);
        self.pump_flush(cx);
        self.pump_writeback(cx);
    }

    /// The chunk and all before it are in the store: its writes leave the dirty layer for the log.
    fn commit(&mut self, planned: Planned, cx: &mut Cx<'_>) {
        let (entries, stored_bytes) = planned.stored.expect("only stored chunks are committed");
        let chunk = ChunkId {
            volume: self.params.id,
            epoch: self.params.epoch,
            seq: planned.seq,
        };
        for entry in &entries {
            let range = entry_range(entry);
            self.writeback.log.sectors += range.len().get();
            self.tail.insert(range, Committed(entry.location));
        }
        for (raw, len, at) in planned.resident {
            cx.cache.add_clean(chunk, CleanRun { raw, len, at });
        }
        self.writeback.committed = planned.last_write;
        self.writeback.log.chunks += 1;
        self.writeback.log.entries += entries.len() as u64;
        self.writeback.last_chunk = Some(planned.seq);
        self.stats.uploaded_chunks += 1;
        self.stats.uploaded_bytes += stored_bytes;
        // By the plan, whatever the store says of the chunk: what stayed would name a segment that is another's next.
        self.forget_unsent(planned.writes, &planned.ranges, cx);
    }

    fn pump_checkpoint(&mut self, cx: &mut Cx<'_>) {
        let now_ms = self.now_ms;
        let until = &mut self.writeback.refused_until;
        *until = until.filter(|until| now_ms < *until);
        let wb = &self.writeback;
        let tuning = &self.params.tuning;
        let serving = self.state == VolumeState::Serving;
        let asked = wb
            .drains
            .iter()
            .any(|d| d.checkpoint && d.target <= wb.committed && d.target > wb.folded);
        // What is in the store can be folded whatever the cache device does: who leaves is to be let go.
        let may = serving || (asked && matches!(self.state, VolumeState::Failed { .. }));
        let is_long = wb.log.chunks >= tuning.checkpoint_chunks
            || self.log_is_much()
            || self.tail.len() >= tuning.checkpoint_entries;
        let due = asked || (is_long && wb.refused_until.is_none());
        let (Some(upto), true) = (
            wb.last_chunk,
            due && may && !wb.map_damaged && wb.log.chunks > 0 && self.frozen.is_none(),
        ) else {
            return;
        };
        let why = if wb.log.chunks >= tuning.checkpoint_chunks {
            Branch::CheckpointByChunks
        } else if asked {
            Branch::CheckpointAsked
        } else {
            Branch::CheckpointByEntries
        };
        why.taken();
        let log = FrozenLog::new(std::mem::take(&mut self.tail));
        self.frozen = Some(log.clone());
        self.writeback.checkpoint_log = std::mem::take(&mut self.writeback.log);
        self.writeback.checkpoint_upto = Some(upto);
        let last_write = self.writeback.committed;
        self.writeback.checkpoint_write = last_write;
        cx.out.push(Action::Checkpoint(CheckpointPlan {
            upto,
            last_write,
            log,
        }));
    }

    /// Whether the log covers so much of the volume that it is to be folded before it is long.
    fn log_is_much(&self) -> bool {
        let log = self.writeback.log;
        let much = self.params.size.get() / CHECKPOINT_SHARE;
        log.chunks >= CHECKPOINT_CHUNKS_MIN
            && log.sectors >= much.min(self.params.tuning.checkpoint_sectors)
    }

    pub(super) fn checkpointed(&mut self, root: Arc<MapRoot>, upto: ChunkSeq, cx: &mut Cx<'_>) {
        assert_eq!(
            self.writeback.checkpoint_upto.take(),
            Some(upto),
            "one checkpoint at a time"
        );
        self.use_map(root);
        cx.out.extend(self.frozen.take().map(Action::Folded));
        self.writeback.folded = self.writeback.checkpoint_write;
        self.stats.checkpoints += 1;
        if self.writes.anybody_waits() {
            // The log has room again.
            self.pump_writes(cx);
        } else {
            self.pump_writeback(cx);
        }
    }

    /// The log goes on, longer; what was to be folded lies under what came since.
    pub(super) fn checkpoint_failed(&mut self, for_good: bool, cx: &mut Cx<'_>) {
        let frozen = self.frozen.take().expect("a checkpoint was under way");
        let newer = std::mem::replace(&mut self.tail, frozen.thaw());
        for (range, found) in newer.iter() {
            self.tail.insert(range, found);
        }
        let wb = &mut self.writeback;
        wb.checkpoint_upto = None;
        let back = std::mem::take(&mut wb.checkpoint_log);
        wb.log.chunks += back.chunks;
        wb.log.entries += back.entries;
        wb.log.sectors += back.sectors;
        if for_good {
            wb.map_damaged = true;
        } else {
            wb.refused_until = Some(self.now_ms + CHECKPOINT_RETRY_MS);
            // Who leaves is to be let go: what is in the log is in the store. Who came later asks once.
            for drain in &mut wb.drains {
                drain.checkpoint &= drain.target > wb.checkpoint_write;
            }
        }
        self.finish_drains(cx);
        if self.writes.anybody_waits() {
            // Not for the log any more.
            self.pump_writes(cx);
        }
    }

    pub(super) fn drain(&mut self, io: IoId, checkpoint: bool, cx: &mut Cx<'_>) {
        let target = self.writes.last_acknowledged();
        self.writeback.drains.push(Drain {
            io,
            target,
            checkpoint,
        });
        self.upload_up_to(target, cx);
    }

    pub(super) fn finish_drains(&mut self, cx: &mut Cx<'_>) {
        if self.writeback.drains.is_empty() {
            return;
        }
        let fenced = matches!(self.state, VolumeState::Fenced { .. });
        let failed = matches!(self.state, VolumeState::Failed { .. });
        let wb = &self.writeback;
        let (damaged, folded) = (wb.map_damaged, wb.folded);
        let committed = wb.committed;
        let mut all_sent = false;
        self.writeback.drains.retain(|drain| {
            // What was written since need not be in the map: with a busy writer there is always more.
            let in_map = damaged || drain.target <= folded;
            let complete = drain.target <= committed && (in_map || !drain.checkpoint);
            all_sent |= complete;
            let stuck = fenced || (failed && drain.target > committed);
            if stuck && !complete {
                Branch::DrainStuck.taken();
            }
            if complete || stuck {
                cx.out.push(Action::Drained {
                    io: drain.io,
                    complete,
                });
            }
            !(complete || stuck)
        });
        if all_sent && self.stopping {
            self.give_up_segments(cx);
        }
    }
}

/// The extents of a chunk, data in the order of their places on the cache device: that is the
/// order of arrival, so a sequential write stays one run, and reading it for the upload is too.
fn lay_out(
    contents: &ExtentMap<Content>,
    cx: &Cx<'_>,
) -> (Vec<PlannedExtent>, Vec<(u32, u32, CacheLoc)>) {
    let mut data: Vec<(CacheLoc, LbaRange)> = Vec::new();
    let mut extents = Vec::new();
    for (range, content) in contents.iter() {
        match content {
            Content::Data(at) => data.push((at, range)),
            Content::Zero => extents.push(PlannedExtent {
                range,
                source: ExtentSource::Zero,
            }),
            Content::Discard => extents.push(PlannedExtent {
                range,
                source: ExtentSource::Discard,
            }),
        }
    }
    data.sort_unstable_by_key(|(at, _)| *at);
    let mut resident: Vec<(u32, u32, CacheLoc)> = Vec::new();
    let mut raw = 0;
    let mut out: Vec<PlannedExtent> = Vec::with_capacity(data.len() + extents.len());
    for (at, range) in data {
        let len = sectors_u32(range.len());
        match resident.last_mut() {
            Some((_, run, start)) if start.skip(*run) == at => *run += len,
            _ => resident.push((raw, len, at)),
        }
        let offset = cx.cache.geometry().byte_of(at);
        match out.last_mut() {
            Some(PlannedExtent {
                range: last,
                source: ExtentSource::Cache { offset: from },
            }) if last.end == range.start && *from + last.len().bytes() == offset => {
                last.end = range.end;
            }
            _ => out.push(PlannedExtent {
                range,
                source: ExtentSource::Cache { offset },
            }),
        }
        raw += len;
    }
    out.append(&mut extents);
    (out, resident)
}
