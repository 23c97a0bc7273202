//! One attachment of a volume: the real state machine and backend, driven in place of a reactor.
//!
//! Actions are carried out in any order that the contract allows: journal and acknowledgements at
//! once and in place, I/O whenever the scheduler says, the store's by the backend.

mod io;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use quarry_cache::{CacheLoc, Journal, SyncFailure};
use quarry_gateway::backend::VolumeBackend;
use quarry_gateway::kept_writes::KeptWrites;
use quarry_gateway::reactor::{BackendSink, Message};
use quarry_objfmt::head::{Durability, Head};
use quarry_objfmt::{Generation, LbaRange, Record, RecordBody, SegmentId, keys};
use quarry_volume::{
    Action, Event, IoError, Op, Report, Request, RequestId, Shared, StatusRun, Volume, VolumeState,
};
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::sync::mpsc;

use super::coverage::Told;
use super::device::{GEOMETRY, SimDevice, Sync};
use super::host::HORIZON;
use super::oracle::{Digest, SECTOR, Stamp, Truth, fill, range, stamp_name, stamp_of};
use super::outcome::{Crash, Deed, Outcome};
use super::store::SimBucket;

/// Writes up to this are never split: the contract's 128 KiB.
const WHOLE_SECTORS_MAX: u64 = (128 << 10) / 512;

/// Sectors of one read of a sweep over the whole volume.
const SWEEP_SECTORS: u64 = 256;

/// What a session needs of the world for one step.
pub struct Cx<'a> {
    pub shared: &'a mut Shared,
    pub device: &'a SimDevice,
    pub kept_writes: &'a KeptWrites,
    pub failure: &'a SyncFailure,
    pub bucket: &'a SimBucket,
    pub outcome: &'a mut Outcome,
    pub truth: &'a mut Truth,
    pub rng: &'a mut SmallRng,
    pub digest: &'a mut Digest,
    pub now_ms: u64,
    /// How long an I/O of the cache device takes at most.
    pub io_ms_max: u64,
    /// That a direct read fails; none: there are none.
    pub direct: Option<f64>,
    /// Readers may get more bad bodies of an object than they bear.
    pub damage: bool,
    /// The host dies after so many more actions.
    pub fuse: &'a mut Option<u32>,
}

/// The host died in the middle of a step.
#[derive(Debug)]
pub struct Died;

/// An I/O of the cache device, under way.
struct Pending {
    due_ms: u64,
    action: Action,
    /// What a sync found when it began.
    sync: Option<Sync>,
}

/// A request in flight.
struct Asked {
    op: Op,
    range: LbaRange,
    data: Vec<u8>,
    stamp: Stamp,
    /// Reads: what each sector may be.
    allowed: Vec<Vec<Stamp>>,
    /// Writes: sectors that have got a number, and the newest.
    recorded: u64,
    last_seq: u64,
    /// How many numbers that were.
    pieces: u32,
    /// Where its data are on the cache device, if they are kept in memory too.
    placed: Option<(u64, Bytes)>,
    /// Flushes: the newest write acknowledged before.
    target: u64,
    /// It must be refused, for this reason.
    refusal: Option<IoError>,
    of_sweep: bool,
}

impl Asked {
    const fn new(op: Op, range: LbaRange) -> Self {
        Self {
            op,
            range,
            data: Vec::new(),
            stamp: 0,
            allowed: Vec::new(),
            recorded: 0,
            last_seq: 0,
            pieces: 0,
            placed: None,
            target: 0,
            refusal: None,
            of_sweep: false,
        }
    }
}

/// A chunk that was planned.
struct Planned {
    last_write: u64,
    stored: bool,
}

pub struct Session {
    pub epoch: u32,
    pub read_only: bool,
    pub volume: Volume,
    pub backend: Arc<VolumeBackend>,
    inbox: mpsc::Receiver<Message>,
    journal: Option<Journal>,
    pending: Vec<Pending>,
    requests: BTreeMap<u64, Asked>,
    next_request: u64,
    /// What each sector reads as.
    now: Vec<Stamp>,
    chunks: BTreeMap<u64, Planned>,
    /// Writes that the store was not said to have, and since when they are here.
    unsent: VecDeque<(u64, u64)>,
    /// The newest write that was acknowledged, and that a flush covered.
    pub acked: u64,
    pub flushed: u64,
    /// The cache device failed an I/O of ours, so that requests may fail.
    pub hurt: bool,
    /// An object showed as damaged, so that reads may fail, and checkpoints.
    pub damaged: bool,
    pub stopping: bool,
    /// When it began: what it reads by may be gone a horizon later, if somebody else has the volume by then.
    opened_ms: u64,
    /// The snapshot that it reads, if it is not the volume.
    snapshot: Option<String>,
    /// It was told to stop.
    pub stopped: bool,
    /// The crash from which it came back, until its whole image was checked.
    pub history: Option<Crash>,
    /// Sectors of the sweep that were read and are right, of so many.
    swept: u64,
    sweep_sectors: u64,
    /// The next sector of the sweep that reads all; none: it is done.
    sweep: Option<u64>,
    last_tick_ms: u64,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let requests: Vec<_> = self.requests.values().map(|r| (r.op, r.range)).collect();
        f.debug_struct("Session")
            .field("epoch", &self.epoch)
            .field("state", self.volume.state())
            .field("stats", &self.volume.stats())
            .field("requests", &requests)
            .field("pending", &self.pending.len())
            .field("sweep", &self.sweep)
            .field("condition", &self.backend.condition())
            .finish_non_exhaustive()
    }
}

/// How a session begins.
pub struct Beginning {
    pub epoch: u32,
    pub read_only: bool,
    /// The newest write that it has.
    pub upto: u64,
    pub volume: Volume,
    pub first: Vec<Action>,
    pub backend: Arc<VolumeBackend>,
    pub inbox: mpsc::Receiver<Message>,
    pub journal: Option<Journal>,
    /// Whether its frames are stored as they are, and may be received directly.
    pub direct: bool,
    pub snapshot: Option<String>,
    pub history: Option<Crash>,
}

impl Session {
    pub fn new(beginning: Beginning, now: Vec<Stamp>, cx: &mut Cx<'_>) -> Result<Self, Died> {
        let mut session = Self {
            epoch: beginning.epoch,
            read_only: beginning.read_only,
            volume: beginning.volume,
            backend: beginning.backend,
            inbox: beginning.inbox,
            journal: beginning.journal,
            pending: Vec::new(),
            requests: BTreeMap::new(),
            next_request: 0,
            now,
            chunks: BTreeMap::new(),
            unsent: VecDeque::new(),
            acked: beginning.upto,
            flushed: beginning.upto,
            hurt: false,
            damaged: false,
            stopping: false,
            opened_ms: cx.now_ms,
            snapshot: beginning.snapshot,
            stopped: false,
            history: beginning.history,
            swept: 0,
            sweep_sectors: 0,
            sweep: Some(0),
            last_tick_ms: 0,
        };
        session.sweep_sectors = session.volume.size().get();
        session.volume.set_now(cx.now_ms);
        if !session.read_only && cx.truth.durable_by(session.epoch) < session.acked {
            session.unsent.push_back((session.acked, cx.now_ms));
        }
        session.take(beginning.first, cx)?;
        if beginning.direct {
            session.feed(Event::DirectReads(true), cx)?;
        }
        Ok(session)
    }

    pub fn in_flight(&self) -> usize {
        self.requests.len()
    }

    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.pending.is_empty()
    }

    pub fn is_fenced(&self) -> bool {
        matches!(self.volume.state(), VolumeState::Fenced { .. })
    }

    pub fn is_swept(&self) -> bool {
        self.sweep.is_none()
    }

    pub fn feed(&mut self, event: Event, cx: &mut Cx<'_>) -> Result<(), Died> {
        self.tell(event, None, cx)
    }

    /// Feeds an event; of an I/O's end, `io` says what it is.
    fn tell(&mut self, event: Event, io: Option<Told>, cx: &mut Cx<'_>) -> Result<(), Died> {
        self.check(&event, cx);
        let coverage = &mut cx.outcome.coverage;
        coverage.tells(&self.volume, self.stopped, &event, io);
        self.stopped |= matches!(event, Event::Stop);
        let mut out = Vec::new();
        if let Err(errno) = cx.failure.get() {
            cx.shared.cache.put_in_doubt(errno);
        }
        self.volume.set_now(cx.now_ms);
        self.volume.apply(event, cx.shared, &mut out);
        self.take(out, cx)
    }

    /// Bad news must have a reason.
    fn check(&mut self, event: &Event, cx: &Cx<'_>) {
        match event {
            Event::Fenced { by } => {
                let key = keys::head_key(&cx.truth.tenant, cx.truth.id);
                // Purged: it was in the trash before.
                let head = cx.bucket.peek(&key);
                let head = head.map(|bytes| Head::decode(&bytes).unwrap());
                assert!(
                    head.map_or(cx.truth.life.is_condemned(), |head| head.epoch.get()
                        > self.epoch),
                    "volume {} is fenced in epoch {} by {by}, and nobody has taken it over",
                    cx.truth.index,
                    self.epoch
                );
            }
            Event::CheckpointFailed { .. } => self.sees_damage("a checkpoint is given up", cx),
            _ => {}
        }
    }

    /// Whether objects that it needs may be gone.
    fn may_lack(&self, cx: &Cx<'_>) -> bool {
        let succeeded = self.read_only || cx.truth.served(u32::MAX) > self.epoch;
        // It was opened some time before it began.
        let kept_ms = HORIZON.as_millis() / 2;
        let outlived = succeeded && u128::from(cx.now_ms - self.opened_ms) >= kept_ms;
        let life = &cx.truth.life;
        match &self.snapshot {
            None => outlived || life.is_condemned(),
            Some(name) => life.is_ending(name),
        }
    }

    fn sees_damage(&mut self, what: &str, cx: &Cx<'_>) {
        let condition = self.backend.condition();
        assert!(
            cx.damage || self.may_lack(cx),
            "volume {}: {what}, and no object is damaged ({condition:?})",
            cx.truth.index
        );
        self.damaged = true;
    }

    fn take(&mut self, actions: Vec<Action>, cx: &mut Cx<'_>) -> Result<(), Died> {
        for action in actions {
            cx.outcome.coverage.asks(&action);
            if let Action::Missed { .. }
            | Action::Waited { .. }
            | Action::WritesWait(_)
            | Action::Folded(_) = action
            {
                // Said, not asked for: no step at which the host could die.
                continue;
            }
            if let Some(left) = cx.fuse {
                *left = left.checked_sub(1).ok_or(Died)?;
            }
            match action {
                Action::Journal {
                    segment,
                    generation,
                    record,
                } => self.journal(segment, generation, record, cx),
                Action::Status { request, runs } => self.told(request.0, &runs, cx),
                Action::Complete { request, result } => self.complete(request.0, result, cx),
                Action::Upload(plan) => {
                    let planned = Planned {
                        last_write: plan.last_write.get(),
                        stored: false,
                    };
                    self.chunks.insert(plan.id.seq.get(), planned);
                    self.backend.submit(Action::Upload(plan));
                }
                Action::CacheRead { .. }
                | Action::CacheWrite { .. }
                | Action::ZeroFill { .. }
                | Action::CopyToRequest { .. }
                | Action::WritePage { .. }
                | Action::Sync { .. }
                | Action::FetchDirect { .. }
                | Action::FillWrite { .. } => {
                    if let Action::WritePage {
                        offset,
                        durable: true,
                        ..
                    } = action
                    {
                        cx.kept_writes.begin(offset);
                    }
                    let due_ms = cx.now_ms + cx.rng.random_range(0..=cx.io_ms_max);
                    let is_sync = matches!(action, Action::Sync { .. });
                    let sync = is_sync.then(|| cx.device.sync_begins());
                    self.pending.push(Pending {
                        due_ms,
                        action,
                        sync,
                    });
                }
                other => {
                    if let Action::Report(Report::Damaged { object, reason }) = &other {
                        self.sees_damage(&format!("{object}: {reason}"), cx);
                    }
                    self.backend.submit(other);
                }
            }
        }
        Ok(())
    }

    fn journal(&mut self, id: SegmentId, generation: Generation, record: Record, cx: &mut Cx<'_>) {
        self.journal
            .as_mut()
            .expect("only writers make records")
            .put(id, generation, &record);
        self.unsent.push_back((record.seq.get(), cx.now_ms));
        let (start, len) = (record.start.get(), u64::from(record.len));
        let stamp = match record.body {
            RecordBody::Data { offset } => {
                let at = CacheLoc {
                    segment: id,
                    offset,
                };
                let data = cx
                    .device
                    .peek(GEOMETRY.byte_of(at), record.len as usize * SECTOR);
                let stamp = stamp_of(&data[..SECTOR], start).unwrap();
                for (lba, sector) in (start..).zip(data.chunks(SECTOR)) {
                    let found = stamp_of(sector, lba).unwrap();
                    assert_eq!(found, stamp, "one piece, one write");
                }
                stamp
            }
            RecordBody::Zero | RecordBody::Discard => 0,
        };
        let made_by = self.requests.values_mut().find(|asked| match asked.op {
            Op::Write { .. } => asked.stamp == stamp,
            Op::Discard | Op::WriteZeroes { .. } => {
                asked.recorded == 0 && asked.range == range(start, len)
            }
            Op::Read | Op::Flush | Op::Status => false,
        });
        let asked = made_by.expect("a record is of a request in flight");
        asked.recorded += len;
        asked.last_seq = record.seq.get();
        asked.pieces += 1;
        let written = range(start, len);
        cx.truth.wrote(self.epoch, record.seq.get(), written, stamp);
        cx.digest.add((record.seq.get(), start, len, stamp));
        for lba in start..start + len {
            self.now[usize::try_from(lba).unwrap()] = stamp;
            for read in self.requests.values_mut() {
                let inside = read.range.start.get() <= lba && lba < read.range.end.get();
                if read.op == Op::Read && inside {
                    let at = usize::try_from(lba - read.range.start.get()).unwrap();
                    read.allowed[at].push(stamp);
                }
            }
        }
    }

    fn complete(&mut self, id: u64, result: Result<(), IoError>, cx: &mut Cx<'_>) {
        let asked = self.requests.remove(&id).expect("completed once");
        cx.digest.add((id, result.is_ok(), cx.now_ms));
        let index = cx.truth.index;
        if let Some(refusal) = asked.refusal {
            assert_eq!(result, Err(refusal), "{:?} of {:?}", asked.op, asked.range);
            return;
        }
        if let Err(error) = result {
            let lacks = self.may_lack(cx);
            let may = match error {
                IoError::Io => {
                    let reads = matches!(asked.op, Op::Read | Op::Status);
                    let missing = self.damaged && reads;
                    missing || self.hurt || lacks || cx.failure.get().is_err()
                }
                IoError::ReadOnly => {
                    self.read_only || matches!(self.volume.state(), VolumeState::Fenced { .. })
                }
                IoError::ShuttingDown => self.stopping,
                IoError::Invalid => false,
            };
            let condition = self.backend.condition();
            assert!(
                may,
                "volume {index} in epoch {}: {:?} of {:?} failed without a reason: {error} ({condition:?})",
                self.epoch, asked.op, asked.range.start
            );
            return;
        }
        if let Some((at, data)) = asked.placed {
            cx.kept_writes.keep(at, data);
        }
        match asked.op {
            Op::Read => {
                let first = asked.range.start.get();
                for (n, sector) in asked.data.chunks(SECTOR).enumerate() {
                    let lba = first + n as u64;
                    let stamp = stamp_of(sector, lba)
                        .unwrap_or_else(|error| panic!("volume {index}: {error}"));
                    let allowed = &asked.allowed[n];
                    assert!(
                        allowed.contains(&stamp),
                        "volume {index} in epoch {}: sector {lba} reads as {}, may be {:?}",
                        self.epoch,
                        stamp_name(stamp),
                        allowed.iter().copied().map(stamp_name).collect::<Vec<_>>()
                    );
                }
                if asked.of_sweep {
                    self.has_swept(asked.range.len().get(), cx);
                }
            }
            Op::Write { fua } | Op::WriteZeroes { fua } => {
                assert_eq!(
                    asked.recorded,
                    asked.range.len().get(),
                    "volume {index}: a write is acknowledged before the journal has it"
                );
                let is_short = asked.range.len().get() <= WHOLE_SECTORS_MAX;
                let has_data = matches!(asked.op, Op::Write { .. });
                assert!(
                    asked.pieces == 1 || !(is_short && has_data),
                    "volume {index}: a short write is split"
                );
                self.acked = self.acked.max(asked.last_seq);
                if fua {
                    self.flushed_up_to(asked.last_seq, cx);
                }
            }
            Op::Discard => {
                let (start, end) = (asked.range.start.get(), asked.range.end.get());
                let mut lbas = start..end;
                let holes = lbas.all(|lba| self.now[usize::try_from(lba).unwrap()] == 0);
                assert!(
                    holes || asked.recorded == end - start,
                    "volume {index}: a discard is acknowledged and was not made"
                );
                self.acked = self.acked.max(asked.last_seq);
            }
            Op::Flush => self.flushed_up_to(asked.target, cx),
            Op::Status => {}
        }
    }

    /// A run told to be zeroes reads as zeroes now, and one told to have data does not.
    fn told(&mut self, id: u64, runs: &[StatusRun], cx: &mut Cx<'_>) {
        let asked = &self.requests[&id];
        assert_eq!(asked.op, Op::Status);
        let (mut lba, end) = (asked.range.start.get(), asked.range.end.get());
        assert!(!runs.is_empty());
        for run in runs {
            cx.digest.add((id, run.len.get(), run.zero));
            for lba in lba..lba + run.len.get() {
                let stamp = self.now[usize::try_from(lba).unwrap()];
                assert_eq!(
                    stamp == 0,
                    run.zero,
                    "volume {}: status of {lba}",
                    cx.truth.index
                );
            }
            lba += run.len.get();
        }
        assert!(lba <= end);
    }

    /// So much more of the image was read and is right; all of it ends a history.
    fn has_swept(&mut self, sectors: u64, cx: &mut Cx<'_>) {
        self.swept += sectors;
        if self.swept != self.sweep_sectors {
            return;
        }
        if let Some(crash) = self.history.take() {
            cx.outcome.histories.note(crash);
        }
        if self.snapshot.is_some() {
            cx.outcome.deeds.note(Deed::SnapshotRead);
        }
    }

    fn flushed_up_to(&mut self, seq: u64, cx: &mut Cx<'_>) {
        self.flushed = self.flushed.max(seq);
        if cx.truth.durability == Durability::Object && !self.read_only {
            cx.truth.reported(self.epoch, seq, "a flush");
        }
    }

    /// Makes a request: of the sweep, if that is not done, else any.
    pub fn ask_something(&mut self, cx: &mut Cx<'_>) -> Result<(), Died> {
        if let Some(start) = self.sweep {
            let end = (start + SWEEP_SECTORS).min(self.sweep_sectors);
            self.sweep = Some(end).filter(|end| *end < self.sweep_sectors);
            let asked = Asked {
                of_sweep: true,
                ..Asked::new(Op::Read, range(start, end - start))
            };
            return self.send(asked, cx);
        }
        let now = self.volume.size().get();
        if cx.rng.random_bool(0.005) {
            // Over the end.
            let len = cx.rng.random_range(1..8);
            let beyond = range(now + 1 - len.min(2), len);
            return self.ask_in_vain(Op::Read, beyond, IoError::Invalid, cx);
        }
        let kind = if self.read_only {
            0
        } else {
            cx.rng.random_range(0..24)
        };
        // Half of it in one corner, so that writes meet.
        let size = if cx.rng.random_bool(0.5) {
            now
        } else {
            now / 16
        };
        let start = cx.rng.random_range(0..size - 1);
        let long = cx.rng.random_bool(0.1);
        let len = cx.rng.random_range(1..=if long { 400 } else { 24 });
        let range = range(start, len.min(now - start));
        let fua = cx.rng.random_bool(0.1);
        match kind {
            0 => {
                self.ask(Op::Status, range, cx)?;
                self.ask(Op::Read, range, cx)
            }
            1..7 => self.ask(Op::Read, range, cx),
            7..18 => self.ask(Op::Write { fua }, range, cx),
            18 => self.ask(Op::Discard, range, cx),
            19 => self.ask(Op::WriteZeroes { fua }, range, cx),
            _ => self.flush(cx),
        }
    }

    pub fn flush(&mut self, cx: &mut Cx<'_>) -> Result<(), Died> {
        self.ask(Op::Flush, range(0, 0), cx)
    }

    /// Ends its service, with no request in flight.
    pub fn stop(&mut self, cx: &mut Cx<'_>) -> Result<(), Died> {
        self.feed(Event::Stop, cx)?;
        let (op, range) = match cx.rng.random_range(0..4) {
            0 => (Op::Flush, range(0, 0)),
            1 => (Op::Read, range(0, 8)),
            _ => (any_change(cx.rng), range(0, 8)),
        };
        self.ask_in_vain(op, range, IoError::ShuttingDown, cx)
    }

    /// Makes any request that changes something, which must be refused.
    pub fn change_in_vain(&mut self, refusal: IoError, cx: &mut Cx<'_>) -> Result<(), Died> {
        let op = any_change(cx.rng);
        self.ask_in_vain(op, range(0, 8), refusal, cx)
    }

    /// Makes a request that must be refused.
    fn ask_in_vain(
        &mut self,
        op: Op,
        range: LbaRange,
        refusal: IoError,
        cx: &mut Cx<'_>,
    ) -> Result<(), Died> {
        let asked = Asked {
            refusal: Some(refusal),
            ..Asked::new(op, range)
        };
        let id = self.next_request;
        self.next_request += 1;
        self.requests.insert(id, asked);
        let id = RequestId(id);
        self.feed(Event::Request(Request { id, op, range }), cx)?;
        assert!(
            !self.requests.contains_key(&id.0),
            "what cannot be is refused at once"
        );
        Ok(())
    }

    fn ask(&mut self, op: Op, range: LbaRange, cx: &mut Cx<'_>) -> Result<(), Died> {
        self.send(Asked::new(op, range), cx)
    }

    fn send(&mut self, mut asked: Asked, cx: &mut Cx<'_>) -> Result<(), Died> {
        let id = self.next_request;
        self.next_request += 1;
        let (op, range) = (asked.op, asked.range);
        asked.target = self.acked;
        let bytes = usize::try_from(range.len().bytes()).unwrap();
        let lbas = range.start.get()..range.end.get();
        match op {
            Op::Read => {
                // What is not filled shows as nobody's.
                asked.data = vec![0xee; bytes];
                let now = lbas.map(|lba| vec![self.now[usize::try_from(lba).unwrap()]]);
                asked.allowed = now.collect();
            }
            Op::Write { .. } => {
                asked.stamp = cx.truth.next_stamp();
                asked.data = vec![0; bytes];
                for (lba, sector) in lbas.zip(asked.data.chunks_mut(SECTOR)) {
                    fill(sector, asked.stamp, lba);
                }
            }
            Op::Flush | Op::Discard | Op::WriteZeroes { .. } | Op::Status => {}
        }
        self.requests.insert(id, asked);
        let id = RequestId(id);
        self.feed(Event::Request(Request { id, op, range }), cx)
    }

    /// Takes one message of the backend. False if there is none.
    pub fn hear(&mut self, cx: &mut Cx<'_>) -> Result<bool, Died> {
        let Ok(message) = self.inbox.try_recv() else {
            return Ok(false);
        };
        let Message::VolumeEvent { event, .. } = message else {
            panic!("a backend sends events only");
        };
        if let Event::Uploaded { seq, .. } = &event {
            cx.digest.add(seq.get());
            self.chunks.get_mut(&seq.get()).unwrap().stored = true;
            while let Some(first) = self.chunks.first_entry().filter(|c| c.get().stored) {
                let last_write = first.remove().last_write;
                cx.truth.reported(self.epoch, last_write, "a chunk");
                self.unsent.retain(|(seq, _)| *seq > last_write);
            }
        }
        self.feed(event, cx)?;
        Ok(true)
    }

    pub fn tick(&mut self, cx: &mut Cx<'_>) -> Result<(), Died> {
        if cx.now_ms < self.last_tick_ms + 20 || !self.volume.wants_ticks() {
            return Ok(());
        }
        self.last_tick_ms = cx.now_ms;
        let now_ms = cx.now_ms;
        self.feed(Event::Tick { now_ms }, cx)?;
        let oldest = self.unsent.front().map_or(0, |(_, since)| now_ms - since);
        assert_eq!(
            self.volume.stats().rpo_ms,
            oldest,
            "volume {}: the age of the oldest write that the store lacks",
            cx.truth.index
        );
        Ok(())
    }
}

/// Any operation that changes something.
fn any_change(rng: &mut SmallRng) -> Op {
    let fua = rng.random_bool(0.5);
    match rng.random_range(0..3) {
        0 => Op::Write { fua },
        1 => Op::WriteZeroes { fua },
        _ => Op::Discard,
    }
}
