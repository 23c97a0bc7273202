//! Writes: a place on the cache device, the data, then number, record and index in one step.
//!
//! A write is cut into pieces that fit the open segment. Each piece goes straight from the
//! request's pages to its place; when it has arrived it gets the next [`WriteSeq`] and enters the
//! index. Discards and zeroes have no data: they are a record alone. Room for the record pages of
//! all that is in flight is set aside before a piece is placed, so a flush never lacks room.

use std::collections::BTreeSet;

use quarry_cache::{Branch, CacheLoc, Mutation, NoSpace};
use quarry_objfmt::page::{RECORDS_PER_PAGE, Record, RecordBody, SegmentHeader, SegmentKind};
use quarry_objfmt::{Generation, Lba, LbaRange, Sectors, SegmentId, WriteSeq};

use super::{Cx, Dirty, Io, Queue, SegmentTable, Volume, VolumeState};
use crate::event::{Action, IoError, IoId, Op, Report, WriteWait};

/// Most sectors of one piece: keeps chunks close to their aimed size.
const PIECE_SECTORS_MAX: u32 = (1 << 20) / 512;

/// A write of at most so many sectors stays one piece, and so appears in the store whole or not at
/// all: what is left of a segment too small for it is given up. Longer ones are several writes.
const WHOLE_SECTORS_MAX: u64 = (128 << 10) / 512;

/// Most sectors of one discard record; the record's length is 32 bits.
const ZERO_SECTORS_MAX: u64 = 1 << 31;

/// Sectors of a page.
const PAGE_SECTORS: u32 = 8;

/// Most writes that the store may lack: bounds the memory that they take here, about 200 bytes each,
/// for small ones and discards fill it long before they fill the cache.
const UNSENT_WRITES_MAX: u64 = 1 << 20;

/// The same of all volumes of a group together: of its many volumes each may be behind a store that takes nothing.
const GROUP_UNSENT_WRITES_MAX: usize = 4 << 20;

/// How long an open segment without unsent data is kept for the next write, in milliseconds:
/// hundreds of quiet volumes must not hold a segment each.
const IDLE_SEGMENT_MS: u64 = 2_000;

/// A write that the store lacks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unsent {
    pub(super) record: Record,
    /// The segment that holds its data, or of a discard its record.
    pub(super) segment: SegmentId,
    /// When it was acknowledged.
    pub(super) at_ms: u64,
}

#[derive(Debug, Default)]
struct WriteSegment {
    /// First free sector.
    data_end: u32,
    /// Pages in use from the back, the header among them.
    pages: u32,
    /// Pieces placed and not yet arrived.
    in_flight: u32,
    /// Records not yet in a page, in order.
    pending: Vec<Record>,
}

impl WriteSegment {
    /// Sectors free for data, if one more record is to find room too. In the worst case that one
    /// and each piece in flight end up in pages of their own, for a flush may come between any two.
    fn room(&self, segment_sectors: u32) -> Option<u32> {
        let pages = self.pages + pages_for(self.pending.len()) + self.in_flight + 1;
        (segment_sectors / PAGE_SECTORS)
            .checked_sub(pages)
            .and_then(|free| (free * PAGE_SECTORS).checked_sub(self.data_end))
    }
}

fn pages_for(records: usize) -> u32 {
    u32::try_from(records.div_ceil(RECORDS_PER_PAGE)).expect("a segment has few pages")
}

/// The write side of a volume.
#[derive(Debug)]
pub(super) struct Writes {
    last: WriteSeq,
    unsent: Queue<Unsent>,
    unsent_sectors: u64,
    segments: SegmentTable<WriteSegment>,
    open: Option<SegmentId>,
    /// A segment whose header is durable, waiting to be the open one.
    ready: Option<SegmentId>,
    preparing: Option<SegmentId>,
    /// Requests that wait for room, in order of arrival.
    waiting: Queue<usize>,
    /// For what, as was told last.
    waits: Option<WriteWait>,
    starved: bool,
    /// Pieces placed and not yet arrived, of all segments.
    in_flight: u64,
    idle_since: Option<u64>,
}

impl Writes {
    pub(super) fn new(stored: WriteSeq) -> Self {
        Self {
            last: stored,
            unsent: Queue::new(),
            unsent_sectors: 0,
            segments: SegmentTable::new(),
            open: None,
            ready: None,
            preparing: None,
            waiting: Queue::new(),
            waits: None,
            starved: false,
            in_flight: 0,
            idle_since: None,
        }
    }

    pub(super) const fn last_acknowledged(&self) -> WriteSeq {
        self.last
    }

    pub(super) const fn starved(&self) -> bool {
        self.starved
    }

    pub(super) const fn unsent_bytes(&self) -> u64 {
        self.unsent_sectors * 512
    }

    pub(super) fn unsent(&self) -> &Queue<Unsent> {
        &self.unsent
    }

    pub(super) const fn holds_segments(&self) -> bool {
        self.open.is_some() || self.ready.is_some()
    }

    pub(super) fn open_segments(&self) -> u64 {
        let open = [self.open, self.ready, self.preparing];
        open.iter().flatten().count() as u64
    }

    pub(super) fn anybody_waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn take_waiting(&mut self) -> Vec<usize> {
        self.waiting.drain(..).collect()
    }

    pub(super) fn forget_segment(&mut self, segment: SegmentId) {
        if let Some(segment) = self.segments.remove(&segment) {
            assert!(
                segment.in_flight == 0 && segment.pending.is_empty(),
                "a clean segment has no writes"
            );
        }
    }

    /// Hands over all records that are in no page yet, and gives them the next pages.
    pub(super) fn take_pending(&mut self, mut each: impl FnMut(SegmentId, u32, Vec<Record>)) {
        for (&id, segment) in &mut self.segments {
            if segment.pending.is_empty() {
                continue;
            }
            let first = segment.pages;
            segment.pages += pages_for(segment.pending.len());
            each(id, first, std::mem::take(&mut segment.pending));
        }
    }

    fn note(&mut self, segment: SegmentId, record: Record, at_ms: u64) {
        self.last = record.seq;
        if let RecordBody::Data { .. } = record.body {
            self.unsent_sectors += u64::from(record.len);
        }
        self.unsent.push_back(Unsent {
            record,
            segment,
            at_ms,
        });
        self.idle_since = None;
    }
}

impl Volume {
    /// Writes go in the order of arrival: behind those that wait already.
    pub(super) fn queue_write(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let request = self.active[slot].request;
        if request.op == Op::Discard && self.reads_as_hole(request.range) {
            Branch::HoleDiscarded.taken();
            self.complete(slot, cx);
            return;
        }
        // One for the placing itself, so that early arrivals do not complete the request.
        self.active[slot].left = 1;
        self.writes.waiting.push_back(slot);
        if self.writes.waiting.len() == 1 {
            self.pump_writes(cx);
        }
    }

    /// Places what waits, as far as there is room.
    pub(super) fn pump_writes(&mut self, cx: &mut Cx<'_>) {
        let mut waits = None;
        while let Some(&slot) = self.writes.waiting.front() {
            if let Err(wait) = self.place(slot, cx) {
                waits = Some(wait);
                break;
            }
            self.writes.waiting.pop_front();
            self.piece_done(slot, Ok(()), cx);
        }
        if waits == Some(WriteWait::Log) && self.writeback.map_damaged {
            // It would be for ever, and a detach waits for requests.
            waits = None;
            for slot in self.writes.take_waiting() {
                self.piece_done(slot, Err(IoError::Io), cx);
            }
        }
        if self.writes.waits != waits {
            self.writes.waits = waits;
            cx.out.push(Action::WritesWait(waits));
        }
        if self.writes.waiting.is_empty() {
            // One that wanted a segment beforehand, and does without, keeps nobody waiting.
            self.leave_line(cx.cache);
            if self.writes.starved {
                self.writes.starved = false;
                cx.out.push(Action::Report(Report::Stalled(false)));
            }
        }
        self.pump_writeback(cx);
    }

    /// Places as much of a request as there is room for; if that was not all of it, says what the rest waits for.
    fn place(&mut self, slot: usize, cx: &mut Cx<'_>) -> Result<(), WriteWait> {
        let segment_sectors = cx.cache.geometry().segment_sectors();
        loop {
            let (request, placed) = (self.active[slot].request, self.active[slot].placed);
            let start = request.range.start.add(placed);
            let left = request.range.end.since(start).get();
            if left == 0 {
                return Ok(());
            }
            let of_group = cx.cache.unsent_of(self.params.group);
            if self.writes.unsent.len() as u64 + self.writes.in_flight >= UNSENT_WRITES_MAX
                || of_group >= GROUP_UNSENT_WRITES_MAX
            {
                Branch::UnsentFull.taken();
                // It asks for no segment until then.
                self.leave_line(cx.cache);
                self.starve(cx);
                return Err(WriteWait::Unsent);
            }
            let tuning = &self.params.tuning;
            if self.log_entries() >= tuning.log_entries_max
                || self.writeback.log_replay() >= tuning.log_replay_max
            {
                Branch::LogFull.taken();
                self.leave_line(cx.cache);
                // With a damaged map it is refused, not kept waiting.
                if !self.writeback.map_damaged {
                    self.starve(cx);
                }
                return Err(WriteWait::Log);
            }
            if self.journal_used() >= u64::from(self.params.tuning.journal_entries) {
                Branch::JournalFull.taken();
                self.start_round(cx);
                return Err(WriteWait::Journal);
            }
            let begins = matches!(request.op, Op::Write { .. }) && placed == Sectors::ZERO;
            let whole = if begins && !Mutation::SplitShortWrites.is_on() {
                u32::try_from(left.min(WHOLE_SECTORS_MAX)).expect("bounded just now")
            } else {
                1
            };
            let Some((id, room)) = self.open_segment(whole, cx) else {
                return Err(match self.writes.preparing {
                    Some(_) => WriteWait::Segment,
                    None => WriteWait::Space,
                });
            };
            let segment = self
                .writes
                .segments
                .get_mut(&id)
                .expect("the open segment is in the table");
            if matches!(request.op, Op::Write { .. }) {
                let len = u32::try_from(left)
                    .unwrap_or(u32::MAX)
                    .min(room)
                    .min(PIECE_SECTORS_MAX);
                if placed > Sectors::ZERO {
                    Branch::WriteSplit.taken();
                }
                let at = CacheLoc {
                    segment: id,
                    offset: segment.data_end,
                };
                segment.data_end += len;
                segment.in_flight += 1;
                self.writes.in_flight += 1;
                let nearly_full = segment.data_end > segment_sectors / 4 * 3;
                cx.cache.hold(id);
                let range = LbaRange {
                    start,
                    end: start.add(Sectors::new(u64::from(len))),
                };
                let io = self.io(Io::Write { slot, at, range });
                let active = &mut self.active[slot];
                active.left += 1;
                active.placed = range.end.since(request.range.start);
                cx.out.push(Action::CacheWrite {
                    io,
                    request: request.id,
                    buffer_offset: u32::try_from(placed.bytes())
                        .expect("requests with data are short"),
                    offset: cx.cache.geometry().byte_of(at),
                    len: len * 512,
                });
                if nearly_full {
                    self.prepare_segment(cx);
                }
            } else {
                let len = left.min(ZERO_SECTORS_MAX);
                let range = LbaRange {
                    start,
                    end: start.add(Sectors::new(len)),
                };
                let body = if request.op == Op::Discard {
                    RecordBody::Discard
                } else {
                    RecordBody::Zero
                };
                cx.cache.hold(id);
                let seq = self.record(id, range, body, cx);
                let active = &mut self.active[slot];
                active.placed = range.end.since(request.range.start);
                active.last_write = seq;
            }
        }
    }

    /// Writes that are, or will be, in the journal and in no durable record page.
    fn journal_used(&self) -> u64 {
        self.writes.last.get() - self.durable_anywhere().get() + self.writes.in_flight
    }

    /// The open segment and its room: at least `least` sectors, and one record.
    fn open_segment(&mut self, least: u32, cx: &mut Cx<'_>) -> Option<(SegmentId, u32)> {
        let block = self.params.sector_size / 512;
        let segment_sectors = cx.cache.geometry().segment_sectors();
        loop {
            if let Some(id) = self.writes.open {
                let room =
                    self.writes.segments[&id].room(segment_sectors).unwrap_or(0) / block * block;
                if room >= least {
                    return Some((id, room));
                }
                Branch::SegmentTooFull.taken();
                self.writes.open = None;
                self.release(id, cx);
            }
            match self.writes.ready.take() {
                Some(id) => self.writes.open = Some(id),
                None => {
                    self.prepare_segment(cx);
                    return None;
                }
            }
        }
    }

    /// Takes a segment and has its header written, so that it is ready before it is needed. The
    /// header is durable before the first byte of data: recovery then never takes what lay there
    /// before, under the old header, for that header's.
    fn prepare_segment(&mut self, cx: &mut Cx<'_>) {
        let serving = self.state == VolumeState::Serving;
        if self.writes.ready.is_some() || self.writes.preparing.is_some() || !serving {
            return;
        }
        match cx.cache.open_for_writes(self.params.id, self.params.group) {
            Ok(opened) => {
                let id = opened.segment;
                self.writes.preparing = Some(id);
                self.writes.segments.insert(
                    id,
                    WriteSegment {
                        pages: 1,
                        ..WriteSegment::default()
                    },
                );
                let io = self.io(Io::Header { segment: id });
                self.write_header(io, id, opened.generation, SegmentKind::Write, cx);
            }
            // Both pass: the first when the store has taken something, the second in a moment.
            Err(full) => {
                let why = match full {
                    NoSpace::DirtyCap => Branch::SegmentRefused,
                    NoSpace::Busy => Branch::SegmentBusy,
                };
                why.taken();
                if self.writes.open.is_none() {
                    self.starve(cx);
                }
            }
        }
    }

    /// Writes wait until the store has taken something.
    fn starve(&mut self, cx: &mut Cx<'_>) {
        if !self.writes.starved {
            self.writes.starved = true;
            cx.out.push(Action::Report(Report::Stalled(true)));
        }
    }

    pub(super) fn write_header(
        &mut self,
        io: IoId,
        segment: SegmentId,
        generation: Generation,
        kind: SegmentKind,
        cx: &mut Cx<'_>,
    ) {
        let header = SegmentHeader {
            segment,
            generation,
            volume: self.params.id,
            epoch: self.params.epoch,
            kind,
            tenant: Some(self.params.tenant.clone()),
            // A build from before this was told need not understand what it may forget.
            durable: (kind == SegmentKind::Write).then(|| self.durable_anywhere()),
        };
        cx.out.push(Action::WritePage {
            io,
            offset: cx.cache.geometry().page_byte(segment, 0),
            page: header.encode(cx.cache.id()),
            durable: kind == SegmentKind::Write,
        });
    }

    pub(super) fn header_done(
        &mut self,
        segment: SegmentId,
        result: Result<(), i32>,
        cx: &mut Cx<'_>,
    ) {
        assert_eq!(
            self.writes.preparing.take(),
            Some(segment),
            "one header at a time"
        );
        if let Err(errno) = result {
            Branch::HeaderFailed.taken();
            self.release(segment, cx);
            self.fail(errno, "writing a segment header", cx);
            return;
        }
        self.writes.ready = Some(segment);
        self.pump_writes(cx);
        if self.stopping && !self.writeback.pending() {
            self.give_up_segments(cx);
        }
    }

    /// A piece has arrived on the device: only now does it exist.
    pub(super) fn write_done(
        &mut self,
        slot: usize,
        at: CacheLoc,
        range: LbaRange,
        result: Result<(), i32>,
        cx: &mut Cx<'_>,
    ) {
        let segment = self
            .writes
            .segments
            .get_mut(&at.segment)
            .expect("held for this piece");
        segment.in_flight -= 1;
        self.writes.in_flight -= 1;
        let result = match (result, &self.state) {
            (Ok(()), VolumeState::Serving) => {
                // The piece's hold on the segment goes over to the record.
                let seq = self.record(
                    at.segment,
                    range,
                    RecordBody::Data { offset: at.offset },
                    cx,
                );
                self.active[slot].last_write = seq;
                Ok(())
            }
            (Ok(()), VolumeState::Failed { .. }) => {
                Branch::ArrivedFailed.taken();
                Err(IoError::Io)
            }
            (Ok(()), _) => {
                Branch::ArrivedFenced.taken();
                Err(IoError::ReadOnly)
            }
            (Err(errno), _) => {
                self.fail(errno, "writing data", cx);
                Err(IoError::Io)
            }
        };
        if result.is_err() {
            self.release(at.segment, cx);
        }
        self.piece_done(slot, result, cx);
        self.pump_writeback(cx);
    }

    /// Number, record, journal and index of a write, in one step. The caller has held the segment
    /// for it.
    fn record(
        &mut self,
        id: SegmentId,
        range: LbaRange,
        body: RecordBody,
        cx: &mut Cx<'_>,
    ) -> WriteSeq {
        let record = Record {
            seq: self.writes.last.next(),
            start: range.start,
            len: u32::try_from(range.len().get()).expect("pieces are short"),
            body,
        };
        self.writes
            .segments
            .get_mut(&id)
            .expect("held")
            .pending
            .push(record);
        cx.out.push(Action::Journal {
            segment: id,
            generation: cx.cache.generation(id),
            record,
        });
        self.index(id, &record);
        cx.cache.note_unsent(self.params.group, 1);
        if self.journal_used() >= u64::from(self.params.tuning.journal_entries / 2) {
            Branch::JournalHalfFull.taken();
            self.start_round(cx);
        }
        record.seq
    }

    fn index(&mut self, id: SegmentId, record: &Record) {
        let at = match record.body {
            RecordBody::Data { offset } => Some(CacheLoc {
                segment: id,
                offset,
            }),
            RecordBody::Zero | RecordBody::Discard => None,
        };
        self.dirty.insert(
            record_range(record),
            Dirty {
                seq: record.seq,
                at,
            },
        );
        self.writes.note(id, *record, self.now_ms);
        self.writeback.note(self.now_ms, record);
    }

    /// A record of before the crash: in its page already, and dirty again.
    pub(super) fn adopt_record(&mut self, id: SegmentId, record: &Record) {
        assert_eq!(
            record.seq,
            self.writes.last.next(),
            "recovery cut off behind the first gap"
        );
        self.index(id, record);
    }

    /// The oldest `count` unsent writes, which come to `ranges`, are in the store: they are dirty no more.
    pub(super) fn forget_unsent(&mut self, count: usize, ranges: &[LbaRange], cx: &mut Cx<'_>) {
        let sent: Vec<Unsent> = self.writes.unsent.drain(..count).collect();
        cx.cache.forget_unsent(self.params.group, sent.len());
        let Some(last) = sent.last().map(|u| u.record.seq) else {
            return;
        };
        let mut touched: Vec<SegmentId> = sent.iter().map(|u| u.segment).collect();
        touched.sort_unstable();
        touched.dedup();
        for id in touched {
            if let Some(segment) = self.writes.segments.get_mut(&id) {
                // They need no record any more.
                segment.pending.retain(|r| r.seq > last);
            }
        }
        // Not each write's range, for those may all be one: then each would pass all that was written since.
        for range in ranges {
            self.dirty.remove_where(*range, |dirty| dirty.seq <= last);
        }
        for unsent in sent {
            if let RecordBody::Data { .. } = unsent.record.body {
                self.writes.unsent_sectors -= u64::from(unsent.record.len);
            }
            if !Mutation::FreeBeforeCommit.is_on() {
                self.release(unsent.segment, cx);
            }
        }
    }

    /// The segments of this volume and whether each holds writes that the store lacks.
    pub(super) fn into_segments(self) -> Vec<(SegmentId, bool)> {
        let unsent: BTreeSet<SegmentId> = self.writes.unsent.iter().map(|u| u.segment).collect();
        let idle = self.writes.segments.into_keys();
        let idle = idle.filter(|id| !unsent.contains(id)).map(|id| (id, false));
        let idle: Vec<_> = idle.collect();
        unsent.iter().map(|id| (*id, true)).chain(idle).collect()
    }

    /// Gives the open segment back when there was nothing to write for a while.
    pub(super) fn close_idle(&mut self, cx: &mut Cx<'_>) {
        let quiet = self.writes.unsent.is_empty() && self.writes.waiting.is_empty();
        if cx.cache.has_line_for(self.params.group) && self.writes.waiting.is_empty() {
            Branch::SegmentLent.taken();
            // Somebody has no segment at all: what is in ours goes out, and ours goes back.
            self.upload_up_to(self.writes.last, cx);
            self.give_up_segments(cx);
            return;
        }
        if !quiet || !self.writes.holds_segments() {
            self.writes.idle_since = None;
            return;
        }
        let since = *self.writes.idle_since.get_or_insert(self.now_ms);
        if self.now_ms.saturating_sub(since) >= IDLE_SEGMENT_MS {
            Branch::SegmentIdle.taken();
            self.give_up_segments(cx);
        }
    }

    /// Gives back the open segment and the one that is ready, which stay while they hold unsent data.
    pub(super) fn give_up_segments(&mut self, cx: &mut Cx<'_>) {
        let segments = [self.writes.open.take(), self.writes.ready.take()];
        for id in segments.into_iter().flatten() {
            self.release(id, cx);
        }
    }

    /// Whether a discard of the range would change nothing, told without any I/O.
    fn reads_as_hole(&self, range: LbaRange) -> bool {
        self.active
            .iter()
            .all(|(_, other)| !matches!(other.request.op, Op::Write { .. }))
            && self.dirty.has_none_of(range)
            && self.tail.has_none_of(range)
            && self
                .frozen
                .as_ref()
                .is_none_or(|frozen| frozen.runs().has_none_of(range))
            && self.root.is_hole_quick(range)
    }
}

pub(super) fn record_range(record: &Record) -> LbaRange {
    let start: Lba = record.start;
    LbaRange::new(start, Sectors::new(u64::from(record.len)))
        .expect("records were checked when made or decoded")
}
