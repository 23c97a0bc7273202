//! Reads: which layer each run comes from, and the way of a miss.
//!
//! A read is resolved in one step into pieces: hits go to the cache device, holes are zeroed,
//! misses wait for frames. All pieces of a request go on at once. A frame that is being fetched is
//! not fetched again: whoever wants it waits with the others. If the map nodes that say where a
//! run lies are not in memory, the whole request is resolved anew once they are. A miss that goes
//! around our memory ([`super::direct`]) is nobody else's business: it is not waited for.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use quarry_cache::{Branch, CacheLoc, CleanIndex, CleanRun, Mutation};
use quarry_objfmt::{
    ChunkId, DataLoc, Lba, LbaRange, Location, MapEntry, Sectors, SegmentId, WriteSeq,
};

use super::{Cx, Dirty, Io, Queue, Volume, entry_range};
use crate::event::{Action, DataError, Fetch, FrameRef, IoError, IoId, Op, Report};
use crate::kept::{FrameName, KeptFrames};
use crate::map::{Node, NodeRef, Nodes};

/// Most frames of one fetch: with frames of 64 KiB, GETs of at most 1 MiB, several in flight.
const FETCH_FRAMES_MAX: usize = 16;

/// Most frames that readahead has in flight, so that it cannot crowd out what someone waits for: one window at its longest,
/// with frames of 64 KiB.
pub(super) const READAHEAD_FRAMES_MAX: usize = 1024;

/// Sequential readers told apart.
const STREAMS_MAX: usize = 8;

/// Readahead starts with this much, in sectors, and doubles.
const READAHEAD_SECTORS_MIN: u64 = (256 << 10) / 512;

/// It doubles to this much for any reader, in sectors: enough for a store a few milliseconds away.
const READAHEAD_SECTORS_USUAL: u64 = (16 << 20) / 512;

/// Readahead goes on in strides of half a window, but no longer ones than this, in sectors: so that its GETs are long, and there
/// are always some on their way.
const READAHEAD_STRIDE_MAX: u64 = (4 << 20) / 512;

/// Someone who waits for a run of a frame.
#[derive(Debug)]
pub(super) struct Waiter {
    slot: usize,
    buffer_offset: u32,
    /// Bytes from the frame's start.
    skip: usize,
    len: usize,
}

impl Waiter {
    /// Who reads on from there wants nothing of this frame any more.
    const fn takes_the_end_of(&self, raw: &Bytes) -> bool {
        self.skip + self.len == raw.len()
    }
}

/// A reader who goes on where it stopped.
#[derive(Debug)]
struct Stream {
    next: u64,
    /// Readahead has been asked for up to here.
    ahead: u64,
    window: u64,
    /// What is read from here on was asked for with this window: if it is waited for all the same, the window is too short.
    judged_from: u64,
}

impl Stream {
    /// What is read from `start` on was waited for, though it was asked for so far ahead: then the store is further away than
    /// the window is long.
    fn was_late(&mut self, start: u64, most: u64) {
        if start >= self.judged_from {
            self.window = (self.window * 2).min(most);
            self.judged_from = self.ahead;
        }
    }

    /// All up to there was asked for; a window that is not yet as long as is usual doubles.
    fn asked_up_to(&mut self, until: u64, usual: u64) {
        self.ahead = until;
        if self.window < usual {
            self.window = (self.window * 2).min(usual);
            self.judged_from = until;
        }
    }
}

/// For whom a fetch is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Why {
    /// Requests that wait for it.
    Requests,
    Readahead,
    Warming,
}

/// The read side of a volume.
#[derive(Debug, Default)]
pub(super) struct Reads {
    fetching: BTreeMap<(ChunkId, u32), Vec<Waiter>>,
    pub(super) readahead_frames: usize,
    /// Map nodes are being loaded for readahead: one load at a time is enough.
    pub(super) readahead_nodes: bool,
    pub(super) strides: super::stride::Strides,
    streams: Queue<Stream>,
    /// Whether misses may go around our memory.
    pub(super) direct: bool,
    pub(super) warming: Option<super::warm::Step>,
    pub(super) heat: super::heat::Heat,
    /// Kept between calls for their memory: what a read is resolved into, and a look-up's answer.
    pieces: Vec<Piece>,
    found: Vec<MapEntry>,
}

impl Reads {
    /// Gives back the memory of a long look-up: it is much longer than a request's.
    pub(super) fn forget_found(&mut self) {
        self.found = Vec::new();
    }
}

/// A run of a request and where it comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// Bytes from the buffer's start.
    pub(super) buffer_offset: u32,
    /// Sectors.
    pub(super) len: u32,
    pub(super) source: Source,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Source {
    Zero,
    Cache {
        at: CacheLoc,
        clean: bool,
    },
    /// Read ahead, and in memory.
    Kept(DataLoc),
    Store(DataLoc),
    /// Acknowledged and not flushed when a sync of the cache device failed: what is there may be older, or another's.
    InDoubt,
}

impl Source {
    /// Whether a piece with source `next` right behind `len` sectors of `self` is the same run.
    fn continues(self, len: u32, next: Self) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) | (Self::InDoubt, Self::InDoubt) => true,
            (
                Self::Cache { at, clean },
                Self::Cache {
                    at: next,
                    clean: next_clean,
                },
            ) => {
                at.segment == next.segment && at.offset + len == next.offset && clean == next_clean
            }
            // Of one frame, for both have the frame's place in the object.
            (Self::Store(at), Self::Store(next)) | (Self::Kept(at), Self::Kept(next)) => {
                at.skip(len) == next
            }
            _ => false,
        }
    }
}

impl Volume {
    pub(super) fn start_read(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let request = self.active[slot].request;
        self.active[slot].map = self.maps;
        self.active[slot].doubts = cx.cache.in_doubt().is_some();
        let mut pieces = std::mem::take(&mut self.reads.pieces);
        pieces.clear();
        // A copy may have been made anew, or another fail: after one that failed none is asked.
        let copies = !self.active[slot].distrusts;
        match self.resolve(request.range, copies, cx, &mut pieces) {
            Ok(()) => {
                // One more than there are pieces, until all are issued.
                let active = &mut self.active[slot];
                active.left = 1;
                active.held = Vec::new();
                self.reads.heat.note(request.range);
                let direct = self.goes_direct(request.range, &pieces);
                self.issue(slot, &pieces, direct, cx);
                let missed = |piece: &Piece| matches!(piece.source, Source::Store(_));
                let missed = pieces.iter().any(missed);
                if missed {
                    cx.out.push(Action::Missed {
                        request: request.id,
                    });
                }
                self.readahead(request.range, missed, cx);
                self.piece_done(slot, Ok(()), cx);
            }
            Err(missing) => {
                cx.out.push(Action::Missed {
                    request: request.id,
                });
                self.load_nodes(Some(slot), missing, cx);
            }
        }
        self.reads.pieces = pieces;
    }

    /// Where each run of `range` comes from, newest layer first; of what the store has, the cache's copies
    /// count only with `copies`.
    pub(super) fn resolve(
        &mut self,
        range: LbaRange,
        copies: bool,
        cx: &mut Cx<'_>,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), Vec<NodeRef>> {
        let mut plan = Plan {
            base: range.start,
            group: self.params.group,
            frame_sectors: self.params.frame_sectors,
            kept: cx.kept,
            clean: cx.cache.clean(self.params.group),
            copies,
            trusted: match cx.cache.in_doubt() {
                Some(_) if !Mutation::ReadInDoubt.is_on() => self.durable_anywhere(),
                _ => WriteSeq::MAX,
            },
            pieces,
        };
        self.walk_layers(range, &mut cx.nodes, &mut plan)
    }

    /// Tells `told` what each part of `range` is by the newest layer that knows of it, in order within
    /// each layer's gaps: together the parts are exactly `range`.
    pub(super) fn walk_layers(
        &mut self,
        range: LbaRange,
        nodes: &mut Nodes<'_>,
        told: &mut impl Layered,
    ) -> Result<(), Vec<NodeRef>> {
        let found = &mut self.reads.found;
        let mut missing = Vec::new();
        let mut in_map = |part: LbaRange, told: &mut _| {
            Branch::LookedUpInMap.taken();
            found.clear();
            match self.root.lookup_into(part, nodes, found) {
                Ok(()) => found
                    .iter()
                    .for_each(|e: &MapEntry| Layered::committed(told, entry_range(e), e.location)),
                Err(nodes) => missing.extend(nodes),
            }
        };
        self.dirty.visit(range, |part, dirty| match dirty {
            Some(Dirty { at, seq }) => told.dirty(part, at, seq),
            None => self
                .tail
                .visit(part, |part, found| match (found, &self.frozen) {
                    (Some(found), _) => {
                        Branch::FoundInLog.taken();
                        told.committed(part, found.0);
                    }
                    (None, Some(frozen)) => frozen.runs().visit(part, |part, found| match found {
                        Some(found) => {
                            Branch::FoundInFolding.taken();
                            told.committed(part, found.0);
                        }
                        None => in_map(part, told),
                    }),
                    (None, None) => in_map(part, told),
                }),
        });
        if missing.is_empty() {
            return Ok(());
        }
        // Several parts of the range may want the same node.
        missing.sort_unstable_by_key(|node| (node.object, node.offset));
        missing.dedup();
        Err(missing)
    }

    fn issue(&mut self, slot: usize, pieces: &[Piece], direct: bool, cx: &mut Cx<'_>) {
        let active = &mut self.active[slot];
        let request = active.request.id;
        active.left += u32::try_from(pieces.len()).expect("no more pieces than sectors");
        let mut wanted = Vec::new();
        for piece in pieces {
            let (buffer_offset, len) = (piece.buffer_offset, piece.len * 512);
            match piece.source {
                Source::Zero => {
                    self.stats.zero_bytes += u64::from(len);
                    let io = self.io(Io::Buffer { slot });
                    cx.out.push(Action::ZeroFill {
                        io,
                        request,
                        buffer_offset,
                        len,
                    });
                }
                Source::InDoubt => {
                    Branch::ReadInDoubt.taken();
                    self.piece_done(slot, Err(IoError::Io), cx);
                }
                Source::Cache { at, clean } => {
                    let whose = if clean {
                        Branch::ReadClean
                    } else {
                        Branch::ReadUnsent
                    };
                    whose.taken();
                    self.stats.hit_bytes += u64::from(len);
                    cx.cache.pin(at.segment);
                    let io = self.io(Io::Read {
                        slot,
                        segment: at.segment,
                        clean,
                    });
                    let offset = cx.cache.geometry().byte_of(at);
                    cx.out.push(Action::CacheRead {
                        io,
                        request,
                        buffer_offset,
                        offset,
                        len,
                    });
                }
                Source::Kept(at) => {
                    Branch::ReadKept.taken();
                    self.stats.hit_bytes += u64::from(len);
                    self.deliver_kept(slot, piece, at, cx);
                }
                Source::Store(at) => {
                    Branch::ReadMissed.taken();
                    self.stats.miss_bytes += u64::from(len);
                    if !(direct && self.fetch_direct(slot, piece, at, cx)) {
                        self.await_frame(slot, piece, at, &mut wanted);
                    }
                }
            }
        }
        self.forget_kept(slot, pieces, cx);
        self.fetch(&wanted, Why::Requests, cx);
    }

    /// Forgets what was read ahead and whose end was asked for now. After all pieces: several may be of one frame, in any
    /// order.
    fn forget_kept(&self, slot: usize, pieces: &[Piece], cx: &mut Cx<'_>) {
        for piece in pieces {
            let Source::Kept(at) = piece.source else {
                continue;
            };
            let (name, waiter) = (self.frame_name(at), self.waiter(slot, piece, at));
            if cx
                .kept
                .get(&name)
                .is_some_and(|raw| waiter.takes_the_end_of(raw))
            {
                cx.kept.forget(&name);
            }
        }
    }

    /// Answers a piece from what was read ahead.
    fn deliver_kept(&mut self, slot: usize, piece: &Piece, at: DataLoc, cx: &mut Cx<'_>) {
        let raw = cx.kept.get(&self.frame_name(at)).cloned();
        let raw = raw.expect("resolved a moment ago");
        self.deliver(&self.waiter(slot, piece, at), Some(&raw), cx);
    }

    const fn frame_name(&self, at: DataLoc) -> FrameName {
        (self.params.group, at.chunk, self.frame_of(at).index)
    }

    /// Who wants a piece of the frame that has `at`.
    const fn waiter(&self, slot: usize, piece: &Piece, at: DataLoc) -> Waiter {
        Waiter {
            slot,
            buffer_offset: piece.buffer_offset,
            skip: (at.raw % self.params.frame_sectors) as usize * 512,
            len: piece.len as usize * 512,
        }
    }

    /// Adds what the store alone has of these pieces to `wanted`, for nobody yet.
    pub(super) fn want_missing(&mut self, pieces: &[Piece], wanted: &mut Vec<(ChunkId, FrameRef)>) {
        for piece in pieces {
            if let Source::Store(at) = piece.source {
                self.want_frame(at, wanted);
            }
        }
    }

    /// Adds a frame to `wanted`, for nobody yet, unless it is being fetched. Answers who waits for it.
    pub(super) fn want_frame(
        &mut self,
        at: DataLoc,
        wanted: &mut Vec<(ChunkId, FrameRef)>,
    ) -> &mut Vec<Waiter> {
        let frame = self.frame_of(at);
        let fetching = &mut self.reads.fetching;
        fetching.entry((at.chunk, frame.index)).or_insert_with(|| {
            wanted.push((at.chunk, frame));
            Vec::new()
        })
    }

    /// Lets a piece wait for its frame; one that nobody fetches yet is added to `wanted`.
    pub(super) fn await_frame(
        &mut self,
        slot: usize,
        piece: &Piece,
        at: DataLoc,
        wanted: &mut Vec<(ChunkId, FrameRef)>,
    ) {
        let waiter = self.waiter(slot, piece, at);
        let waiters = self.want_frame(at, wanted);
        if !waiters.is_empty() {
            Branch::FrameAwaited.taken();
        }
        waiters.push(waiter);
    }

    pub(super) fn is_being_fetched(&self, at: DataLoc) -> bool {
        let frame = (at.chunk, self.frame_of(at).index);
        self.reads.fetching.contains_key(&frame)
    }

    /// Whether a read from here on would continue what one of the last readers read.
    pub(super) fn continues_a_stream(&self, start: Lba) -> bool {
        self.reads.streams.iter().any(|s| s.next == start.get())
    }

    /// Asks for frames, in GETs of neighbours.
    pub(super) fn fetch(&mut self, wanted: &[(ChunkId, FrameRef)], why: Why, cx: &mut Cx<'_>) {
        let neighbours = |a: &(ChunkId, FrameRef), b: &(ChunkId, FrameRef)| {
            a.0 == b.0 && a.1.stored_offset + a.1.stored_len == b.1.stored_offset
        };
        for run in wanted
            .chunk_by(neighbours)
            .flat_map(|run| run.chunks(FETCH_FRAMES_MAX))
        {
            let chunk = run[0].0;
            let frames: Vec<FrameRef> = run.iter().map(|(_, frame)| *frame).collect();
            let bytes: u64 = frames.iter().map(|f| u64::from(f.stored_len)).sum();
            if why == Why::Readahead {
                self.stats.readahead_bytes += bytes;
                self.reads.readahead_frames += frames.len();
            }
            let io = self.io(Io::Fetch {
                chunk,
                frames: frames.clone(),
                why,
                map: self.maps,
            });
            cx.out.push(Action::Fetch {
                io,
                fetch: Fetch { chunk, frames },
                foreground: why == Why::Requests,
            });
        }
    }

    const fn frame_of(&self, at: DataLoc) -> FrameRef {
        FrameRef {
            index: at.raw / self.params.frame_sectors,
            stored_offset: at.stored_offset,
            stored_len: at.stored_len,
        }
    }

    pub(super) fn read_done(
        &mut self,
        slot: usize,
        segment: SegmentId,
        clean: bool,
        result: Result<(), i32>,
        cx: &mut Cx<'_>,
    ) {
        cx.cache.unpin(segment);
        let active = &mut self.active[slot];
        if cx.cache.in_doubt().is_some() && !active.doubts && !Mutation::ReadInDoubt.is_on() {
            Branch::ReadDoubted.taken();
            active.again = true;
            return self.piece_done(slot, Ok(()), cx);
        }
        let result = result.map_err(|errno| {
            if clean {
                // The store has it: forget the copy, and read again from there.
                cx.cache.distrust(segment);
                self.active[slot].again = true;
                self.active[slot].distrusts = true;
            } else {
                cx.out.push(Action::Report(Report::Unreadable { errno }));
            }
            IoError::Io
        });
        self.piece_done(slot, result, cx);
    }

    pub(super) fn fetched(
        &mut self,
        io: IoId,
        contents: Vec<Result<Bytes, DataError>>,
        cx: &mut Cx<'_>,
    ) {
        let Io::Fetch {
            chunk,
            frames,
            why,
            map,
        } = self.ios.remove(super::io_key(io))
        else {
            panic!("a fetch answered for another I/O");
        };
        if why == Why::Readahead {
            self.reads.readahead_frames -= frames.len();
        }
        assert_eq!(contents.len(), frames.len(), "one content a frame");
        let failed = contents.iter().any(Result::is_err);
        // Of one object: the first says it all.
        let mut damage = frames.iter().zip(&contents).filter_map(|(frame, content)| {
            let error = content.as_ref().err()?;
            self.is_told(chunk, *frame, map).then_some(error)
        });
        if let Some(DataError { object, reason }) = damage.next().cloned() {
            cx.out
                .push(Action::Report(Report::Damaged { object, reason }));
        }
        let asked = frames.len();
        let mut fills = 0;
        for (frame, content) in frames.into_iter().zip(contents) {
            let content = content.ok();
            let waiters = self
                .reads
                .fetching
                .remove(&(chunk, frame.index))
                .unwrap_or_default();
            if let (Why::Readahead, Some(raw)) = (why, &content)
                && !waiters.iter().any(|waiter| waiter.takes_the_end_of(raw))
            {
                let name = (self.params.group, chunk, frame.index);
                cx.kept.keep(name, raw.clone());
            }
            for waiter in waiters {
                let request = self.active[waiter.slot].request.id;
                cx.out.push(Action::Waited { request, io });
                let part = content
                    .as_ref()
                    .filter(|raw| raw.len() >= waiter.skip + waiter.len);
                if part.is_none() && self.is_behind(waiter.slot) {
                    self.active[waiter.slot].behind = true;
                }
                self.deliver(&waiter, part, cx);
            }
            // After the answers, and only a copy: losing it costs a miss.
            if let Some(raw) = content {
                fills += usize::from(self.fill(chunk, frame.index, raw, why, cx));
            }
        }
        if why == Why::Warming {
            self.warm_fetched(asked - fills, failed, cx);
        }
    }

    /// Whether a frame that cannot be had, asked for by this map, is damage to be told of: what somebody fails for, or the newest map
    /// names. What an older map named may be gone rightly.
    fn is_told(&self, chunk: ChunkId, frame: FrameRef, map: u64) -> bool {
        match self.reads.fetching.get(&(chunk, frame.index)) {
            Some(waiters) if !waiters.is_empty() => {
                waiters.iter().any(|waiter| !self.is_behind(waiter.slot))
            }
            _ => map == self.maps,
        }
    }

    fn deliver(&mut self, waiter: &Waiter, raw: Option<&Bytes>, cx: &mut Cx<'_>) {
        let Some(raw) = raw else {
            return self.piece_done(waiter.slot, Err(IoError::Io), cx);
        };
        let io = self.io(Io::Buffer { slot: waiter.slot });
        cx.out.push(Action::CopyToRequest {
            io,
            request: self.active[waiter.slot].request.id,
            buffer_offset: waiter.buffer_offset,
            data: raw.slice(waiter.skip..waiter.skip + waiter.len),
        });
    }

    /// Answers whether the frame is being written to the cache device.
    fn fill(&mut self, chunk: ChunkId, index: u32, raw: Bytes, why: Why, cx: &mut Cx<'_>) -> bool {
        let Ok(len) = u32::try_from(raw.len() / 512) else {
            return false;
        };
        let (group, first) = (self.params.group, index * self.params.frame_sectors);
        if cx.cache.clean(group).holds(&chunk, first, len)
            || cx.cache.is_filling(group, chunk, first)
        {
            Branch::FillNeedless.taken();
            return false;
        }
        let Some(at) = cx.cache.reserve_fill(group, chunk, first, len) else {
            Branch::FillRefused.taken();
            return false;
        };
        let run = CleanRun {
            raw: first,
            len,
            at,
        };
        let io = self.io(Io::Fill { chunk, run, why });
        cx.out.push(Action::FillWrite {
            io,
            offset: cx.cache.geometry().byte_of(at),
            data: raw,
        });
        true
    }

    pub(super) fn nodes_loaded(
        &mut self,
        io: IoId,
        result: Result<Vec<(NodeRef, Arc<Node>)>, DataError>,
        cx: &mut Cx<'_>,
    ) {
        let (slot, map) = match self.ios.remove(super::io_key(io)) {
            Io::Nodes { slot, map } => (slot, map),
            Io::WarmNodes { map } => {
                if map < self.maps && result.is_err() {
                    // What an older map named may be gone rightly.
                    return self.warm_on(cx);
                }
                let nodes = result.map_err(|DataError { object, reason }| {
                    cx.out
                        .push(Action::Report(Report::Damaged { object, reason }));
                });
                return self.warm_nodes_loaded(nodes.ok(), cx);
            }
            _ => panic!("map nodes answered for another I/O"),
        };
        if let Some(slot) = slot {
            let request = self.active[slot].request.id;
            cx.out.push(Action::Waited { request, io });
        }
        match result {
            Ok(nodes) => match slot {
                Some(slot) => {
                    self.active[slot].held.extend(nodes);
                    cx.nodes.insert_all(self.active[slot].held.clone());
                    self.start_again(slot, cx);
                }
                None => {
                    self.reads.readahead_nodes = false;
                    cx.nodes.insert_all(nodes);
                }
            },
            Err(_) if slot.is_some_and(|slot| self.is_behind(slot)) => {
                let slot = slot.expect("it was just looked at");
                Branch::ReadAgain.taken();
                self.active[slot].renewed = true;
                self.start_again(slot, cx);
            }
            Err(_) if slot.is_none() && map < self.maps => self.reads.readahead_nodes = false,
            Err(DataError { object, reason }) => {
                cx.out
                    .push(Action::Report(Report::Damaged { object, reason }));
                // For readahead it is not tried again: the flag stays, and misses go on without it.
                if let Some(slot) = slot {
                    self.complete_with(slot, IoError::Io, cx);
                }
            }
        }
    }

    /// Asks for map nodes that a request lacks, which is resolved anew when they are there, or readahead.
    pub(super) fn load_nodes(&mut self, slot: Option<usize>, nodes: Vec<NodeRef>, cx: &mut Cx<'_>) {
        match slot {
            Some(slot) => self.active[slot].left = 1,
            None => self.reads.readahead_nodes = true,
        }
        let io = self.io(Io::Nodes {
            slot,
            map: self.maps,
        });
        cx.out.push(Action::LoadNodes {
            io,
            nodes,
            foreground: slot.is_some(),
        });
    }

    /// Looks up anew where a request's data are.
    fn start_again(&mut self, slot: usize, cx: &mut Cx<'_>) {
        match self.active[slot].request.op {
            Op::Status => self.start_status(slot, cx),
            _ => self.start_read(slot, cx),
        }
    }

    /// How far any reader is read ahead of, in sectors, however near the store.
    pub(super) fn usual_window(&self) -> u64 {
        READAHEAD_SECTORS_USUAL.min(self.params.tuning.readahead_sectors_max)
    }

    /// Fetches what a sequential reader will want next, or one who goes on in equal steps. Nobody waits for it, so it is the first to
    /// be left out.
    fn readahead(&mut self, range: LbaRange, missed: bool, cx: &mut Cx<'_>) {
        let (start, end) = (range.start.get(), range.end.get());
        let Some(place) = self.reads.streams.iter().position(|s| s.next == start) else {
            if self.stride_ahead(range, missed, cx) {
                return;
            }
            if self.reads.streams.len() == STREAMS_MAX {
                self.reads.streams.pop_front();
            }
            self.reads.streams.push_back(Stream {
                next: end,
                ahead: 0,
                window: READAHEAD_SECTORS_MIN,
                judged_from: 0,
            });
            return;
        };
        let mut stream = self.reads.streams.remove(place).expect("just found");
        stream.next = end;
        let most = self.params.tuning.readahead_sectors_max;
        let usual = self.usual_window();
        if missed && stream.window >= usual {
            stream.was_late(start, most);
        }
        let until = (end + stream.window).min(self.params.size.get());
        let from = stream.ahead.max(end);
        let stride = (stream.window / 2).min(READAHEAD_STRIDE_MAX);
        let due = from < until && until - from >= stride;
        let room = self.reads.readahead_frames < READAHEAD_FRAMES_MAX;
        if due && (!room || self.reads.readahead_nodes) {
            Branch::ReadaheadHeldBack.taken();
        }
        if due && room && !self.reads.readahead_nodes {
            let ahead = LbaRange {
                start: Lba::new(from),
                end: Lba::new(until),
            };
            let mut pieces = Vec::new();
            let resolved = self.resolve(ahead, true, cx, &mut pieces);
            self.reads.forget_found();
            match resolved {
                Ok(()) => {
                    let mut wanted = Vec::new();
                    self.want_missing(&pieces, &mut wanted);
                    self.fetch(&wanted, Why::Readahead, cx);
                    stream.asked_up_to(until, usual);
                }
                Err(nodes) => self.load_nodes(None, nodes, cx),
            }
        }
        self.reads.streams.push_back(stream);
    }
}

/// What is told of the parts of a range as the layers are walked.
pub(super) trait Layered {
    /// An unsent write, of that number, has it: on the cache device, or as zeroes.
    fn dirty(&mut self, part: LbaRange, at: Option<CacheLoc>, seq: WriteSeq);

    /// The store has it.
    fn committed(&mut self, part: LbaRange, location: Location);
}

/// A request being resolved into pieces.
struct Plan<'a> {
    base: Lba,
    group: u32,
    frame_sectors: u32,
    kept: &'a KeptFrames,
    clean: &'a CleanIndex,
    copies: bool,
    /// Dirty data up to this write are what was written.
    trusted: WriteSeq,
    pieces: &'a mut Vec<Piece>,
}

impl Plan<'_> {
    /// Whether all of a run lies in a frame that was read ahead.
    fn has_kept(&self, at: DataLoc, len: u32) -> bool {
        let name = (self.group, at.chunk, at.raw / self.frame_sectors);
        let end = ((at.raw % self.frame_sectors) + len) as usize * 512;
        self.kept.get(&name).is_some_and(|raw| end <= raw.len())
    }

    fn push(&mut self, part: LbaRange, source: Source) {
        let buffer_offset = part.start.since(self.base).bytes();
        let buffer_offset = u32::try_from(buffer_offset).expect("requests with data are short");
        let len = u32::try_from(part.len().get()).expect("requests with data are short");
        match self.pieces.last_mut() {
            Some(last)
                if last.buffer_offset + last.len * 512 == buffer_offset
                    && last.source.continues(last.len, source) =>
            {
                last.len += len;
            }
            _ => self.pieces.push(Piece {
                buffer_offset,
                len,
                source,
            }),
        }
    }
}

impl Layered for Plan<'_> {
    fn dirty(&mut self, part: LbaRange, at: Option<CacheLoc>, seq: WriteSeq) {
        let source = match at {
            None => Source::Zero,
            Some(_) if seq > self.trusted => Source::InDoubt,
            Some(at) => Source::Cache { at, clean: false },
        };
        self.push(part, source);
    }

    fn committed(&mut self, part: LbaRange, location: Location) {
        let Location::Data(at) = location else {
            return self.push(part, Source::Zero);
        };
        if !self.copies {
            return self.push(part, Source::Store(at));
        }
        let len = u32::try_from(part.len().get()).expect("a run inside a frame");
        if !self.kept.is_empty() && self.has_kept(at, len) {
            return self.push(part, Source::Kept(at));
        }
        let clean = self.clean;
        clean.visit(&at.chunk, at.raw, len, |raw, len, cached| {
            let start = part.start.add(Sectors::new(u64::from(raw - at.raw)));
            let run = LbaRange {
                start,
                end: start.add(Sectors::new(u64::from(len))),
            };
            let source = match cached {
                Some(at) => Source::Cache { at, clean: true },
                None => Source::Store(at.skip(raw - at.raw)),
            };
            self.push(run, source);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_doubles_to_what_is_usual_and_past_that_only_for_who_waits_for_what_it_brought() {
        let (usual, most) = (1024, 4096);
        let mut stream = Stream {
            next: 0,
            ahead: 0,
            window: 256,
            judged_from: 0,
        };
        for (until, window) in [(256, 512), (512, 1024), (1024, 1024)] {
            stream.asked_up_to(until, usual);
            assert_eq!(stream.window, window);
        }
        // Asked for before the window was as long.
        stream.was_late(300, most);
        assert_eq!(stream.window, 1024);
        stream.asked_up_to(2000, usual);
        stream.was_late(512, most);
        assert_eq!(stream.window, 2048);
        // Once for all that was asked for by then.
        stream.was_late(1999, most);
        assert_eq!(stream.window, 2048);
        stream.was_late(2000, most);
        stream.asked_up_to(6000, usual);
        stream.was_late(6000, most);
        assert_eq!(stream.window, most);
    }
}
