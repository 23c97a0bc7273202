//! Where the time of a request goes that is not answered at once, kept for a trace of it ([`crate::trace`]).
//!
//! Owns: the trails of requests, and what a volume did of late that its requests wait for together: syncs, record pages,
//! uploads. Does not own: what is slow, or what becomes of a trace.
//!
//! Invariants:
//! - A volume that is not traced has nothing here, and pays comparisons with a time that is never reached.
//! - What is kept is bounded: a trail by [`SPANS_MAX`], all trails by the tracer, the rest by [`RECENT_MAX`] and
//!   [`WAITS_MAX`], for each volume.

use std::collections::VecDeque;
use std::sync::Arc;

use quarry_objfmt::Durability;
use quarry_volume::{Event, IoError, IoId, Op, WriteWait};

use super::frontend::InFlight;
use crate::clock::now_ns;
use crate::trace::{Finished, SPANS_MAX, Span, Step, Ticket, Tracer, Trail, Value, Whose, notes};

/// What a volume did of late that is kept, while it has requests: as many uploads as may be under way, and some rounds.
const RECENT_MAX: usize = 32;

/// Changes of what writes wait for that are kept.
const WAITS_MAX: usize = 16;

/// A volume's requests are traced.
#[derive(Clone, Debug)]
pub struct Traced {
    /// Where traces go.
    pub tracer: Arc<Tracer>,
    /// Whose they are.
    pub whose: Arc<Whose>,
    /// What a flush waits for.
    pub durability: Durability,
}

/// What is known of a request's time so far.
#[derive(Debug)]
pub(super) struct RequestTrail {
    /// When it came: before it was held.
    since_ns: u64,
    spans: Vec<Span>,
    trails: Vec<Arc<Trail>>,
    left_out: u32,
    /// It is exported however short it takes.
    is_sample: bool,
    _ticket: Ticket,
}

impl RequestTrail {
    fn add(&mut self, span: Span) {
        if self.spans.len() < SPANS_MAX {
            self.spans.push(span);
        } else {
            self.left_out += 1;
        }
    }
}

/// What a volume did for all of its requests.
#[derive(Debug)]
enum Recent {
    Span(Span),
    Trail(Arc<Trail>),
}

impl Recent {
    fn whole(&self) -> &Span {
        match self {
            Self::Span(span) => span,
            Self::Trail(trail) => trail.whole(),
        }
    }
}

/// What is kept of a volume that is traced.
#[derive(Debug)]
struct Kept {
    traced: Traced,
    /// Answers of the batch at hand, until the volume has said who waited for them.
    brought: Vec<(IoId, Arc<Trail>)>,
    recent: VecDeque<Recent>,
    /// What writes waited for, and from when on.
    waits: VecDeque<(Option<WriteWait>, u64)>,
    sync_since_ns: u64,
}

/// The trails of a volume's requests.
#[derive(Debug)]
pub(super) struct Trails {
    /// From how long on a request is traced, whatever it did.
    pub(super) slow_ns: u64,
    /// From how long on a part of a request is marked.
    pub(super) mark_ns: u64,
    kept: Option<Box<Kept>>,
}

impl Trails {
    pub(super) fn new(traced: Option<Traced>) -> Self {
        let Some(traced) = traced else {
            return Self {
                slow_ns: u64::MAX,
                mark_ns: u64::MAX,
                kept: None,
            };
        };
        Self {
            slow_ns: traced.tracer.slow_ns(),
            mark_ns: traced.tracer.mark_ns(),
            kept: Some(Box::new(Kept {
                traced,
                brought: Vec::new(),
                recent: VecDeque::new(),
                waits: VecDeque::new(),
                sync_since_ns: 0,
            })),
        }
    }

    /// The request's trail, made if there is none; none: it is not traced.
    fn of<'a>(&self, request: &'a mut InFlight) -> Option<&'a mut RequestTrail> {
        let kept = self.kept.as_ref()?;
        if request.trail.is_none() {
            request.trail = Some(Box::new(RequestTrail {
                since_ns: request.since_ns,
                spans: Vec::new(),
                trails: Vec::new(),
                left_out: 0,
                is_sample: false,
                _ticket: kept.traced.tracer.ticket()?,
            }));
        }
        request.trail.as_deref_mut()
    }

    /// The request waits for the store.
    pub(super) fn missed(&self, request: &mut InFlight) {
        let is_first = request.trail.is_none();
        let Some(kept) = &self.kept else { return };
        let is_sample = is_first && kept.traced.tracer.picks();
        if let Some(trail) = self.of(request) {
            trail.is_sample |= is_sample;
        }
    }

    /// The request was held, and passes now; before its own time is said to begin.
    #[cold]
    pub(super) fn held(&self, request: &mut InFlight, since_ns: u64, now_ns: u64) {
        if now_ns.saturating_sub(since_ns) >= self.mark_ns
            && let Some(trail) = self.of(request)
        {
            trail.add(Span::new(Step::Held, since_ns, now_ns));
        }
    }

    /// A part of the request, which may be known to be worth it, is done.
    #[cold]
    pub(super) fn part_done(
        &self,
        request: &mut InFlight,
        step: Step,
        since_ns: u64,
        end_ns: u64,
        bytes: u32,
    ) {
        if let Some(trail) = self.of(request) {
            let span = Span::new(step, since_ns, end_ns);
            trail.add(span.with(notes::BYTES, Value::Count(bytes.into())));
        }
    }

    /// Data of the request are given their place later than in the batch in which it came.
    #[cold]
    pub(super) fn placed_late(&self, request: &mut InFlight, now_ns: u64) {
        let Some(kept) = &self.kept else { return };
        let last_end_ns = |trail: &RequestTrail| {
            let rooms = trail.spans.iter().filter(|span| span.step == Step::Room);
            rooms.map(|span| span.end_ns).max()
        };
        let before_ns = request.trail.as_deref().and_then(last_end_ns);
        let since_ns = before_ns.unwrap_or(request.since_ns);
        if now_ns.saturating_sub(since_ns) < self.mark_ns {
            return;
        }
        let rooms = kept.rooms(since_ns, now_ns);
        if let Some(trail) = self.of(request) {
            rooms.into_iter().for_each(|span| trail.add(span));
        }
    }

    /// What the oldest write without a place waits for.
    pub(super) fn writes_wait(&mut self, waits: Option<WriteWait>, now_ns: u64) {
        let Some(kept) = &mut self.kept else { return };
        if matches!(kept.waits.back(), None | Some((None, _))) {
            // What was before is nobody's any more who waits from now on.
            kept.waits.clear();
        }
        if kept.waits.len() == WAITS_MAX {
            kept.waits.pop_front();
        }
        kept.waits.push_back((waits, now_ns));
    }

    /// The volume asks for a sync.
    pub(super) fn sync_asked(&mut self, now_ns: u64) {
        if let Some(kept) = &mut self.kept {
            kept.sync_since_ns = now_ns;
        }
    }

    /// The sync that it asked for last is done.
    pub(super) fn synced(&mut self, now_ns: u64) {
        let mark_ns = self.mark_ns;
        if let Some(kept) = &mut self.kept
            && now_ns.saturating_sub(kept.sync_since_ns) >= mark_ns
        {
            let span = Span::new(Step::Sync, kept.sync_since_ns, now_ns);
            kept.keep(Recent::Span(span));
        }
    }

    /// A page that took long is written.
    #[cold]
    pub(super) fn page_written(&mut self, since_ns: u64, now_ns: u64) {
        let Some(kept) = &mut self.kept else { return };
        // Pages of a round are written side by side: one span.
        if let Some(Recent::Span(last)) = kept.recent.back_mut()
            && last.step == Step::Pages
            && last.begin_ns == since_ns
        {
            last.end_ns = last.end_ns.max(now_ns);
            if let Some((_, Value::Count(count))) = last.notes.last_mut() {
                *count += 1;
            }
            return;
        }
        let span = Span::new(Step::Pages, since_ns, now_ns);
        kept.keep(Recent::Span(span.with(notes::COUNT, Value::Count(1))));
    }

    /// The store's side has answered, and says what it did.
    pub(super) fn heard(&mut self, event: &Event, mut trail: Trail, has_requests: bool) {
        let Some(kept) = &mut self.kept else { return };
        if let Some(whole) = trail.spans.first_mut() {
            whole.end_ns = now_ns();
        }
        let trail = Arc::new(trail);
        match event {
            Event::Fetched { io, .. } | Event::NodesLoaded { io, .. } => {
                kept.brought.push((*io, trail));
            }
            // Nobody can have waited for it otherwise.
            Event::Uploaded { .. } if has_requests => kept.keep(Recent::Trail(trail)),
            Event::Uploaded { .. } => kept.recent.clear(),
            _ => {}
        }
    }

    /// The request waited for what `io` has brought.
    pub(super) fn waited(&self, request: &mut InFlight, io: IoId) {
        let Some(kept) = &self.kept else { return };
        let brought = kept.brought.iter().find(|(known, _)| *known == io);
        let (Some((_, trail)), Some(of)) = (brought, self.of(request)) else {
            return;
        };
        // It may have waited for several runs of it.
        if of.trails.iter().any(|known| Arc::ptr_eq(known, trail)) {
            return;
        }
        if of.trails.len() < SPANS_MAX {
            of.trails.push(Arc::clone(trail));
        } else {
            of.left_out += 1;
        }
    }

    /// The volume has said all of this batch.
    pub(super) fn settle(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.brought.clear();
        }
    }

    /// The request is answered: its trace is handed over, if it is to have one.
    #[cold]
    pub(super) fn finish(
        &mut self,
        request: &mut InFlight,
        result: Result<(), IoError>,
        front_end: &'static str,
    ) {
        let trail = request.trail.take();
        let Some(kept) = &mut self.kept else { return };
        let since_ns = trail
            .as_ref()
            .map_or(request.since_ns, |trail| trail.since_ns);
        let end_ns = now_ns().max(since_ns);
        let is_slow = end_ns - since_ns >= self.slow_ns;
        if !is_slow && !trail.as_ref().is_some_and(|trail| trail.is_sample) {
            return;
        }
        let mut finished = Finished {
            whose: Arc::clone(&kept.traced.whose),
            op: request.op,
            kind: kind_of(request),
            range: request.range,
            result,
            front_end,
            tag: request.tag,
            begin_ns: since_ns,
            end_ns,
            spans: Vec::new(),
            trails: Vec::new(),
            left_out: 0,
        };
        if let Some(trail) = trail {
            finished.spans = trail.spans;
            finished.trails = trail.trails;
            finished.left_out = trail.left_out;
        }
        kept.add_common(&mut finished);
        kept.traced.tracer.submit(finished);
    }
}

/// What a request was, as in a metric's label where it has one.
fn kind_of(request: &InFlight) -> &'static str {
    match (request.timed, request.op) {
        (Some(timed), _) => timed.as_str(),
        (None, Op::Discard) => "discard",
        (None, Op::WriteZeroes { .. }) => "write_zeroes",
        (None, _) => "status",
    }
}

impl Kept {
    fn keep(&mut self, recent: Recent) {
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(recent);
    }

    /// What writes waited for in this time.
    fn rooms(&self, since_ns: u64, now_ns: u64) -> Vec<Span> {
        let ends = self.waits.iter().skip(1).map(|(_, from_ns)| *from_ns);
        let waits = self.waits.iter().zip(ends.chain([now_ns]));
        let rooms = waits.filter_map(|((waits, from_ns), end_ns)| {
            let why = match (*waits)? {
                WriteWait::Segment => "segment",
                WriteWait::Space => "space",
                WriteWait::Journal => "journal",
                WriteWait::Unsent => "unsent",
                WriteWait::Log => "log",
            };
            let (from_ns, end_ns) = ((*from_ns).max(since_ns), end_ns.min(now_ns));
            let span =
                || Span::new(Step::Room, from_ns, end_ns).with(notes::WAITS_FOR, Value::Word(why));
            (from_ns < end_ns).then(span)
        });
        rooms.collect()
    }

    /// Adds what the volume did meanwhile that the request waited for.
    fn add_common(&self, finished: &mut Finished) {
        let (begin_ns, end_ns) = (finished.begin_ns, finished.end_ns);
        let is_durable = match finished.op {
            Op::Read | Op::Status => return,
            Op::Flush => true,
            Op::Write { fua } | Op::WriteZeroes { fua } => fua,
            Op::Discard => false,
        };
        // What has no data is done with when it has its place.
        if let Op::Discard | Op::WriteZeroes { .. } = finished.op {
            finished.spans.extend(self.rooms(begin_ns, end_ns));
        }
        let has_waited = finished.spans.iter().any(|span| span.step == Step::Room);
        if !has_waited && !is_durable {
            return;
        }
        // What only went on at the same time is not to be blamed.
        let waits_for_store = self.traced.durability == Durability::Object;
        for recent in &self.recent {
            if !recent.whole().overlaps(begin_ns, end_ns) {
                continue;
            }
            match recent {
                Recent::Span(span) if has_waited || !waits_for_store => {
                    finished.spans.push(span.clone());
                }
                Recent::Trail(trail) if has_waited || waits_for_store => {
                    finished.trails.push(Arc::clone(trail));
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::{Lba, LbaRange, Sectors};
    use tokio::sync::mpsc;

    use super::*;
    use crate::latency::Timed;
    use crate::reactor::Buffer;

    /// What makes a request slow here, in nanoseconds; a part is marked from 64 on.
    const SLOW: u64 = 4096;

    type Handed = mpsc::Receiver<Finished>;

    fn trails(sample: f64) -> (Trails, Handed) {
        trails_of(SLOW, sample, Durability::Local)
    }

    fn trails_of(slow_ns: u64, sample: f64, durability: Durability) -> (Trails, Handed) {
        let (tracer, handed) = Tracer::new(slow_ns, sample, 8);
        let whose = Arc::new(Whose {
            tenant: "acme".to_owned(),
            volume: "db".to_owned(),
        });
        let traced = Traced {
            tracer,
            whose,
            durability,
        };
        (Trails::new(Some(traced)), handed)
    }

    /// A request that came so long ago.
    fn request(op: Op, ago_ns: u64) -> InFlight {
        InFlight {
            front_end: 0,
            tag: 5,
            buffer: Buffer::NONE,
            ops: 0,
            answer: None,
            timed: Timed::of(op),
            since_ns: now_ns() - ago_ns,
            op,
            range: LbaRange::new(Lba::new(0), Sectors::new(8)).unwrap(),
            placed: None,
            trail: None,
        }
    }

    /// Times are counted from the process' start, which is to be some time ago.
    fn settle_clock() {
        while now_ns() < 100 * SLOW {
            std::thread::yield_now();
        }
    }

    fn fetched(io: u64) -> (Event, Trail) {
        let spans = vec![Span::new(Step::Fetch, now_ns() - SLOW, now_ns())];
        let event = Event::Fetched {
            io: IoId(io),
            frames: Vec::new(),
        };
        (event, Trail { spans, left_out: 0 })
    }

    fn steps(finished: &Finished) -> Vec<Step> {
        finished.spans.iter().map(|span| span.step).collect()
    }

    #[test]
    fn slow_miss_is_handed_over_with_what_it_waited_for_once() {
        settle_clock();
        let (mut trails, mut handed) = trails(0.0);
        let mut read = request(Op::Read, 2 * SLOW);
        trails.missed(&mut read);
        for io in [1, 2] {
            let (event, trail) = fetched(io);
            trails.heard(&event, trail, true);
        }
        // Two runs of the first, none of the second.
        trails.waited(&mut read, IoId(1));
        trails.waited(&mut read, IoId(1));
        trails.settle();
        trails.waited(&mut read, IoId(2));
        let copied = now_ns();
        trails.part_done(&mut read, Step::Copy, copied, copied + 1, 4096);
        trails.finish(&mut read, Ok(()), "nbd");
        let finished = handed.try_recv().unwrap();
        assert_eq!(steps(&finished), [Step::Copy]);
        assert_eq!(finished.trails.len(), 1);
        assert_eq!(
            (finished.kind, finished.front_end, finished.tag),
            ("read_hit", "nbd", 5)
        );
        assert_eq!(finished.begin_ns, read.since_ns);
        assert!(handed.try_recv().is_err());
    }

    #[test]
    fn fast_miss_is_handed_over_as_a_sample_only() {
        for (sample, count) in [(0.0, 0), (1.0, 1)] {
            let (mut trails, mut handed) = trails_of(u64::MAX, sample, Durability::Local);
            let mut read = request(Op::Read, 0);
            trails.missed(&mut read);
            trails.finish(&mut read, Ok(()), "nbd");
            assert!(read.trail.is_none());
            assert_eq!(std::iter::from_fn(|| handed.try_recv().ok()).count(), count);
        }
    }

    #[test]
    fn write_without_a_place_waited_for_each_reason_and_what_was_uploaded_meanwhile() {
        settle_clock();
        let (mut trails, mut handed) = trails(0.0);
        let mut write = request(Op::Write { fua: false }, 10 * SLOW);
        let begun = write.since_ns;
        // Over before this one came.
        trails.writes_wait(Some(WriteWait::Journal), begun - 5 * SLOW);
        trails.writes_wait(None, begun - 4 * SLOW);
        trails.writes_wait(Some(WriteWait::Space), begun - SLOW);
        trails.writes_wait(Some(WriteWait::Segment), begun + 3 * SLOW);
        let uploaded = Event::Uploaded {
            seq: quarry_objfmt::ChunkSeq::new(1),
            entries: Vec::new(),
            stored_bytes: 0,
        };
        let trail = |begin_ns| Trail {
            spans: vec![Span::new(Step::Upload, begin_ns, u64::MAX)],
            left_out: 0,
        };
        trails.heard(&uploaded, trail(begun + SLOW), true);
        trails.placed_late(&mut write, begun + 4 * SLOW);
        trails.finish(&mut write, Ok(()), "nbd");
        let finished = handed.try_recv().unwrap();
        let rooms: Vec<_> = finished
            .spans
            .iter()
            .map(|span| {
                (
                    span.notes[0].1.clone(),
                    span.begin_ns - begun,
                    span.end_ns - begun,
                )
            })
            .collect();
        assert_eq!(
            rooms,
            [
                (Value::Word("space"), 0, 3 * SLOW),
                (Value::Word("segment"), 3 * SLOW, 4 * SLOW),
            ]
        );
        assert_eq!(finished.trails[0].whole().step, Step::Upload);
        // One that waited for nothing has nothing to do with uploads.
        let mut write = request(Op::Write { fua: false }, 2 * SLOW);
        trails.finish(&mut write, Ok(()), "nbd");
        let finished = handed.try_recv().unwrap();
        assert!(finished.trails.is_empty() && finished.spans.is_empty());
    }

    #[test]
    fn flush_to_the_store_waited_for_uploads_and_one_to_the_cache_device_for_syncs() {
        settle_clock();
        for (durability, has_upload) in [(Durability::Local, false), (Durability::Object, true)] {
            let (mut trails, mut handed) = trails_of(SLOW, 0.0, durability);
            let mut flush = request(Op::Flush, 4 * SLOW);
            let begun = flush.since_ns;
            let uploaded = Event::Uploaded {
                seq: quarry_objfmt::ChunkSeq::new(1),
                entries: Vec::new(),
                stored_bytes: 0,
            };
            let trail = Trail {
                spans: vec![Span::new(Step::Upload, begun, u64::MAX)],
                left_out: 0,
            };
            trails.heard(&uploaded, trail, true);
            trails.sync_asked(begun);
            trails.synced(begun + 2 * SLOW);
            trails.finish(&mut flush, Ok(()), "nbd");
            let finished = handed.try_recv().unwrap();
            assert_eq!(
                finished.trails.len(),
                usize::from(has_upload),
                "{durability:?}"
            );
            let syncs = if has_upload { &[][..] } else { &[Step::Sync] };
            assert_eq!(steps(&finished), syncs, "{durability:?}");
        }
    }

    #[test]
    fn discard_waited_until_it_was_answered() {
        settle_clock();
        let (mut trails, mut handed) = trails(0.0);
        let mut discard = request(Op::Discard, 8 * SLOW);
        trails.writes_wait(Some(WriteWait::Unsent), discard.since_ns);
        trails.finish(&mut discard, Ok(()), "ublk");
        let finished = handed.try_recv().unwrap();
        assert_eq!(steps(&finished), [Step::Room]);
        assert_eq!(finished.spans[0].begin_ns, finished.begin_ns);
        assert_eq!(finished.spans[0].end_ns, finished.end_ns);
        assert_eq!(finished.kind, "discard");
    }

    #[test]
    fn flush_waited_for_the_syncs_and_pages_of_its_time() {
        settle_clock();
        let (mut trails, mut handed) = trails(0.0);
        let mut flush = request(Op::Flush, 20 * SLOW);
        let begun = flush.since_ns;
        trails.sync_asked(begun - 4 * SLOW);
        trails.synced(begun - 2 * SLOW);
        trails.sync_asked(begun + SLOW);
        trails.synced(begun + 2 * SLOW);
        // Too short to explain anything.
        trails.sync_asked(begun + 2 * SLOW);
        trails.synced(begun + 2 * SLOW + 1);
        for end in [3, 5, 4] {
            trails.page_written(begun + 2 * SLOW, begun + end * SLOW);
        }
        trails.finish(&mut flush, Ok(()), "nbd");
        let finished = handed.try_recv().unwrap();
        assert_eq!(steps(&finished), [Step::Sync, Step::Pages]);
        assert_eq!(finished.spans[1].notes, [(notes::COUNT, Value::Count(3))]);
        assert_eq!(finished.spans[1].end_ns, begun + 5 * SLOW);
    }

    #[test]
    fn uploads_are_kept_while_there_are_requests_and_not_without_end() {
        let (mut trails, _handed) = trails(0.0);
        let uploaded = || Event::Uploaded {
            seq: quarry_objfmt::ChunkSeq::new(1),
            entries: Vec::new(),
            stored_bytes: 0,
        };
        let trail = || Trail {
            spans: vec![Span::new(Step::Upload, 1, 2)],
            left_out: 0,
        };
        (0..3 * RECENT_MAX).for_each(|_| trails.heard(&uploaded(), trail(), true));
        (0..3 * WAITS_MAX).for_each(|_| trails.writes_wait(Some(WriteWait::Space), 1));
        let kept = trails.kept.as_ref().unwrap();
        assert_eq!(
            (kept.recent.len(), kept.waits.len()),
            (RECENT_MAX, WAITS_MAX)
        );
        trails.heard(&uploaded(), trail(), false);
        assert!(trails.kept.as_ref().unwrap().recent.is_empty());
    }

    #[test]
    fn volume_that_is_not_traced_keeps_nothing() {
        let mut trails = Trails::new(None);
        assert_eq!((trails.slow_ns, trails.mark_ns), (u64::MAX, u64::MAX));
        let mut read = request(Op::Read, 0);
        trails.missed(&mut read);
        trails.held(&mut read, 0, 1);
        trails.writes_wait(Some(WriteWait::Space), 1);
        trails.finish(&mut read, Ok(()), "nbd");
        assert!(read.trail.is_none() && trails.kept.is_none());
    }
}
