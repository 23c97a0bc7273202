//! The reactor's loop: completions and messages in, one submission a batch out.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use std::{io, mem};

use io_uring::{cqueue, opcode, types};
use quarry_cache::SectorCipher;
use quarry_volume::{Action, Event, IoError, IoId, StatusRun};
use slab::Slab;
use tokio::sync::{mpsc, oneshot};

use super::direct::DirectReads;
use super::doorbell::Doorbell;
use super::errand::{ERRAND_TIME_MAX_NS, Errands};
use super::execute::{FILL_BYTES_MAX, SEALED_KEPT_BYTES, WaitingFills};
use super::frontend::{FrontEnd, Inbox, Pending, Port};
use super::hold::{Held, Holds};
use super::memory::Pool;
use super::op::{CacheOp, Code, Hold, Step as Progress};
use super::rate::Rate;
use super::ring::{Completion, File as Target, Ring};
use super::runs::Runs;
use super::sync::Syncs;
use super::token::Token;
use super::trails::Trails;
use super::{
    BackendSink, MESSAGES_MAX, Machine, Message, PageCache, ReactorConfig, ReactorStats, VolumeKey,
};
use crate::clock::{self, now_ns};
use crate::kept_writes::KeptWrites;
use crate::qos::VolumeGate;
use crate::trace::Step;

/// Time between two ticks, in milliseconds.
const TICK_MS: u64 = 100;

/// How long a reactor that was told to end waits for NBD's clients to be gone, in milliseconds.
const END_GRACE_MS: u64 = 2_000;

/// Record pages kept for reuse, in bytes.
const PAGES_KEPT_BYTES: usize = 1 << 20;

/// How far a volume is on its way out.
enum Stage {
    Serving,
    /// Waits for its requests and I/O; then goes to whoever asked.
    Leaving(Vec<oneshot::Sender<Option<Box<dyn Machine>>>>),
}

/// A volume and all that is under way for it.
pub(super) struct VolumeSlot {
    key: VolumeKey,
    pub(super) machine: Box<dyn Machine>,
    pub(super) backend: Box<dyn BackendSink>,
    pub(super) inbox: Inbox,
    /// How fast it may be used; none: as fast as can be.
    pub(super) gate: Option<Arc<VolumeGate>>,
    pub(super) held: Held,
    pub(super) direct: DirectReads,
    pub(super) trails: Trails,
    actions: Vec<Action>,
    /// Cache operations under way or waiting for memory.
    pub(super) ops: u32,
    front_ends: u32,
    stage: Stage,
    /// Told when the last front end is gone.
    without_front_ends: Vec<oneshot::Sender<()>>,
    touched: bool,
}

impl VolumeSlot {
    /// An operation that took long, or is of a request that is traced, has ended.
    #[cold]
    fn mark(&mut self, op: &CacheOp, now_ns: u64) {
        let step = match (op.moving.code, op.moving.file) {
            (Code::ReceiveFixed { .. }, _) => Step::Receive,
            (Code::Read | Code::ReadFixed { .. }, Target::Cache | Target::CachePages) => {
                Step::CacheRead
            }
            (Code::Write { .. } | Code::WriteFixed { .. }, Target::Cache) => Step::CacheWrite,
            _ => Step::Copy,
        };
        match (op.request, op.moving.code) {
            (Some(request), _) => {
                let in_flight = &mut self.inbox.requests[request];
                self.trails
                    .part_done(in_flight, step, op.since_ns, now_ns, op.moving.len);
            }
            (None, Code::Write { durable: true }) => self.trails.page_written(op.since_ns, now_ns),
            // A fill, for which nobody waits.
            (None, _) => {}
        }
    }
}

pub(super) struct FrontEndSlot {
    pub(super) front_end: Box<dyn FrontEnd>,
    pub(super) volume: u32,
    pending: Pending,
    touched: bool,
}

/// What the kernel reads and writes for as long as the ring lives.
pub(super) struct Fixed {
    doorbell_count: u64,
    tick: types::Timespec,
    /// Until the next held request may pass.
    pub(super) hold: types::Timespec,
}

/// A reactor's whole state.
pub(super) struct Core {
    pub(super) ring: Ring,
    pub(super) ops: Slab<CacheOp>,
    pub(super) runs: Runs,
    pub(super) volumes: Slab<VolumeSlot>,
    pub(super) pages: Pool,
    pub(super) fills: WaitingFills,
    /// What the data on the cache device are encrypted with.
    pub(super) cipher: Option<Arc<SectorCipher>>,
    /// The memory of encrypted writes: no more than the writes under way have.
    pub(super) sealed: Pool,
    /// Large writes, until their chunk is made.
    pub(super) kept_writes: Arc<KeptWrites>,
    pub(super) syncs: Syncs,
    pub(super) errands: Errands,
    pub(super) zeroes: File,
    pub(super) holds: Holds,
    pub(super) page_cache: Option<PageCache>,
    _cache: Arc<File>,
    pub(super) fixed: Box<Fixed>,
    keys: HashMap<VolumeKey, u32>,
    pub(super) front_ends: Slab<FrontEndSlot>,
    touched_volumes: Vec<u32>,
    touched_front_ends: Vec<u32>,
    messages: mpsc::Receiver<Message>,
    pub(super) doorbell: Arc<Doorbell>,
    pub(super) stats: Arc<ReactorStats>,
    rate: Rate,
    started: Instant,
    now_ms: u64,
    /// When the batch began: of requests' times the beginning or the end.
    pub(super) batch_ns: u64,
    timer_armed: bool,
    /// When it was told to end.
    ending_since: Option<u64>,
}

/// Aborts the process if the thread unwinds: see the invariants of [`super`].
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Core {
    /// Must be called on the thread that runs it.
    pub(super) fn new(
        config: &ReactorConfig,
        messages: mpsc::Receiver<Message>,
        doorbell: Arc<Doorbell>,
        stats: Arc<ReactorStats>,
    ) -> io::Result<Self> {
        let tick =
            types::Timespec::new().nsec(u32::try_from(TICK_MS * 1_000_000).unwrap_or(u32::MAX));
        Ok(Self {
            ring: Ring::new(
                config.cache.as_raw_fd(),
                config
                    .page_cache
                    .as_ref()
                    .map(|pages| pages.file.as_raw_fd()),
                config.buffer_entries,
            )?,
            ops: Slab::with_capacity(1024),
            runs: Runs::default(),
            volumes: Slab::new(),
            pages: Pool::new(usize::MAX, PAGES_KEPT_BYTES),
            fills: WaitingFills::new(FILL_BYTES_MAX),
            cipher: config.cipher.clone(),
            sealed: Pool::new(usize::MAX, SEALED_KEPT_BYTES),
            kept_writes: Arc::clone(&config.kept_writes),
            syncs: Syncs::new(config.sync_failure.clone()),
            errands: Errands::default(),
            zeroes: File::open("/dev/zero")?,
            holds: Holds::default(),
            page_cache: config.page_cache.clone(),
            _cache: Arc::clone(&config.cache),
            fixed: Box::new(Fixed {
                doorbell_count: 0,
                tick,
                hold: types::Timespec::new(),
            }),
            keys: HashMap::new(),
            front_ends: Slab::new(),
            touched_volumes: Vec::new(),
            touched_front_ends: Vec::new(),
            messages,
            doorbell,
            stats,
            rate: Rate::default(),
            started: Instant::now(),
            now_ms: 0,
            batch_ns: now_ns(),
            timer_armed: false,
            ending_since: None,
        })
    }

    /// Runs until it was told to stop and everything under way is done.
    ///
    /// # Panics
    /// If the ring itself fails, which leaves nothing that could be completed.
    pub(super) fn run(mut self) {
        // Dropped before `self` is, and with it what the kernel uses.
        let _guard = AbortOnPanic;
        let mut completions = Vec::with_capacity(1024);
        self.arm_doorbell();
        while !self.is_over() {
            self.ring.submit(true).expect("io_uring_enter");
            self.ring.completions(&mut completions);
            self.batch_ns = now_ns();
            self.stats.batches.fetch_add(1, Ordering::Relaxed);
            self.stats
                .completions
                .fetch_add(completions.len() as u64, Ordering::Relaxed);
            for completion in completions.drain(..) {
                self.complete(completion);
            }
            self.answer_writes();
            self.settle();
        }
        self.abandon();
    }

    fn complete(&mut self, completion: Completion) {
        match Token::unpack(completion.user_data) {
            Token::Op { index } => self.op_done(index, completion.result),
            Token::Run { index } => self.run_done(index, completion.result),
            Token::FrontEnd { index, tag } => {
                if !cqueue::more(completion.flags)
                    && let Some(slot) = self.front_ends.get_mut(index as usize)
                {
                    slot.pending.ops -= 1;
                }
                self.with_front_end(index, |front_end, port| {
                    front_end.op_done(tag, completion.result, completion.flags, port);
                });
            }
            Token::Doorbell => {
                self.arm_doorbell();
                self.receive();
                self.answer_sync();
            }
            Token::Timer => self.tick(),
            Token::Hold => self.hold_is_over(),
            Token::Sync => self.synced(completion.result),
            Token::Errand => self.errand_woken(),
            Token::Advice | Token::GivenUp => {}
            Token::Unknown => tracing::error!(?completion, "a completion that nobody asked for"),
        }
    }

    /// Runs volumes and front ends until none has anything left to say in this batch.
    fn settle(&mut self) {
        loop {
            while let Some(index) = self.touched_volumes.pop() {
                self.run_volume(index);
            }
            let Some(index) = self.touched_front_ends.pop() else {
                self.end_run();
                return self.arm_holds();
            };
            self.with_front_end(index, FrontEnd::end_batch);
            if let Some(slot) = self.front_ends.get_mut(index as usize) {
                slot.touched = false;
            }
            self.reap_front_end(index);
        }
    }

    fn run_volume(&mut self, index: u32) {
        let Some(slot) = self.volumes.get_mut(index as usize) else {
            return;
        };
        let mut actions = mem::take(&mut slot.actions);
        self.wake_timer();
        loop {
            self.admit(index);
            let slot = &mut self.volumes[index as usize];
            if slot.inbox.events.is_empty() {
                break;
            }
            slot.machine
                .apply_all(self.now_ms, &mut slot.inbox.events, &mut actions);
            assert!(slot.inbox.events.is_empty(), "a machine left events unread");
            for action in actions.drain(..) {
                self.execute(index, action);
            }
        }
        let slot = &mut self.volumes[index as usize];
        slot.actions = actions;
        slot.touched = false;
        slot.trails.settle();
        self.reap_volume(index);
    }

    /// A cache operation's completion.
    pub(super) fn op_done(&mut self, index: u32, result: i32) {
        let op = &mut self.ops[index as usize];
        match op.advance(result) {
            Progress::Again => self.submit_op(index),
            // The kernel reads whole pages, for which it needs memory: what is wrong may not concern this read.
            Progress::Done(Err(_)) if op.moving.file == Target::CachePages => {
                op.go_around_pages();
                self.submit_op(index);
            }
            Progress::Done(result) => {
                let op = self.ops.remove(index as usize);
                if result.is_ok() {
                    self.decrypt(&op);
                }
                let (volume, io, request) = (op.volume, op.io, op.request);
                let is_durable = matches!(op.moving.code, Code::Write { durable: true });
                if is_durable {
                    self.syncs.end_write(index, (volume, io), result);
                }
                let slot = &mut self.volumes[volume as usize];
                let took_ns = self.batch_ns.saturating_sub(op.since_ns);
                let is_marked = took_ns >= slot.trails.mark_ns
                    || request.is_some_and(|key| slot.inbox.requests[key].trail.is_some());
                if is_marked {
                    slot.mark(&op, self.batch_ns);
                }
                match op.moving.hold {
                    Hold::Body(body) => body.end(result.is_ok()),
                    hold => self.release(hold),
                }
                if let Some(request) = request {
                    self.buffer_released(volume, request);
                }
                // A durable write is under way until it is answered.
                if !is_durable {
                    self.io_done(volume, io, result);
                }
            }
        }
    }

    /// An operation of a volume is over.
    pub(super) fn io_done(&mut self, volume: u32, io: IoId, result: Result<(), i32>) {
        self.volumes[volume as usize].ops -= 1;
        self.feed(volume, Event::IoDone { io, result });
    }

    /// One operation less uses the request's buffer.
    pub(super) fn buffer_released(&mut self, volume: u32, request: usize) {
        let slot = &mut self.volumes[volume as usize];
        let in_flight = &mut slot.inbox.requests[request];
        in_flight.ops -= 1;
        if in_flight.ops == 0
            && let Some(result) = in_flight.answer.take()
        {
            self.answer(volume, request, result);
        }
    }

    /// The volume has completed a request: tells the front end, once the buffer is free.
    pub(super) fn request_done(
        &mut self,
        volume: u32,
        request: usize,
        result: Result<(), IoError>,
    ) {
        let in_flight = &mut self.volumes[volume as usize].inbox.requests[request];
        assert!(in_flight.answer.is_none(), "a request is completed twice");
        if in_flight.ops > 0 {
            in_flight.answer = Some(result);
        } else {
            self.answer(volume, request, result);
        }
    }

    /// The volume answers a request for the status of a range, which it completes next.
    pub(super) fn status_told(&mut self, volume: u32, request: usize, runs: &[StatusRun]) {
        let in_flight = &self.volumes[volume as usize].inbox.requests[request];
        let (front_end, tag) = (in_flight.front_end, in_flight.tag);
        self.with_front_end(front_end, |front_end, _| front_end.status_told(tag, runs));
    }

    fn answer(&mut self, volume: u32, request: usize, result: Result<(), IoError>) {
        let slot = &mut self.volumes[volume as usize];
        let mut in_flight = slot.inbox.requests.remove(request);
        let ns = self.batch_ns.saturating_sub(in_flight.since_ns);
        if let (Some(timed), Ok(())) = (in_flight.timed, result) {
            slot.machine.took(timed, ns);
        }
        if ns >= slot.trails.slow_ns || in_flight.trail.is_some() {
            let front_end = &self.front_ends[in_flight.front_end as usize].front_end;
            slot.trails.finish(&mut in_flight, result, front_end.name());
        }
        self.stats.requests.fetch_add(1, Ordering::Relaxed);
        let slot = &mut self.front_ends[in_flight.front_end as usize];
        slot.pending.requests -= 1;
        if let (Ok(()), Some(place)) = (result, in_flight.placed)
            && let Some(data) = slot.front_end.give_away(in_flight.tag)
        {
            self.kept_writes.keep(place, data);
        }
        self.with_front_end(in_flight.front_end, |front_end, port| {
            front_end.request_done(in_flight.tag, result, port);
        });
    }

    /// Gives a volume an event in this batch.
    pub(super) fn feed(&mut self, volume: u32, event: Event) {
        self.volumes[volume as usize].inbox.events.push(event);
        self.touch(volume);
    }

    /// Has a volume run in this batch.
    pub(super) fn touch(&mut self, volume: u32) {
        if !mem::replace(&mut self.volumes[volume as usize].touched, true) {
            self.touched_volumes.push(volume);
        }
    }

    fn with_front_end(
        &mut self,
        index: u32,
        call: impl FnOnce(&mut (dyn FrontEnd + 'static), &mut Port<'_>),
    ) {
        self.wake_timer();
        let Some(slot) = self.front_ends.get_mut(index as usize) else {
            return;
        };
        let volume = &mut self.volumes[slot.volume as usize];
        let mut port = Port {
            ring: &mut self.ring,
            inbox: &mut volume.inbox,
            front_end: index,
            pending: &mut slot.pending,
            now_ms: self.now_ms,
            batch_ns: self.batch_ns,
        };
        call(&mut *slot.front_end, &mut port);
        if !slot.touched {
            slot.touched = true;
            self.touched_front_ends.push(index);
        }
        if !volume.touched && !volume.inbox.events.is_empty() {
            volume.touched = true;
            self.touched_volumes.push(slot.volume);
        }
    }

    /// Drops a front end that has come to its end.
    fn reap_front_end(&mut self, index: u32) {
        let Some(slot) = self.front_ends.get(index as usize) else {
            return;
        };
        if slot.pending.ops > 0 || slot.pending.requests > 0 || !slot.front_end.is_finished() {
            return;
        }
        let slot = self.front_ends.remove(index as usize);
        let volume = &mut self.volumes[slot.volume as usize];
        volume.front_ends -= 1;
        if volume.front_ends == 0 {
            for done in volume.without_front_ends.drain(..) {
                // Nobody may wait any more.
                let _ = done.send(());
            }
        }
        self.reap_volume(slot.volume);
    }

    /// Gives away a volume that leaves and has nothing under way.
    fn reap_volume(&mut self, index: u32) {
        let slot = &self.volumes[index as usize];
        let busy = slot.ops > 0
            || slot.front_ends > 0
            || slot.touched
            || !slot.inbox.requests.is_empty()
            || !slot.inbox.events.is_empty();
        if busy || matches!(slot.stage, Stage::Serving) {
            return;
        }
        let slot = self.volumes.remove(index as usize);
        self.stats.volumes.fetch_sub(1, Ordering::Relaxed);
        self.keys.remove(&slot.key);
        if let Stage::Leaving(waiters) = slot.stage {
            let mut machine = Some(slot.machine);
            for done in waiters {
                // Nobody may wait any more: then the volume is dropped here.
                let _ = done.send(machine.take());
            }
        }
    }

    fn receive(&mut self) {
        self.look_at_the_clock();
        self.doorbell.answer();
        if self.doorbell.stopped() && self.ending_since.is_none() {
            self.end();
        }
        for n in 0.. {
            let Ok(message) = self.messages.try_recv() else {
                break;
            };
            self.hear(message);
            if n == MESSAGES_MAX {
                // The rest in the next batch: completions wait as well.
                self.doorbell.ring();
                break;
            }
        }
    }

    pub(super) fn hear(&mut self, message: Message) {
        match message {
            Message::AddVolume {
                key,
                machine,
                backend,
            } => {
                if self.ending_since.is_some() {
                    self.stats.volumes.fetch_sub(1, Ordering::Relaxed);
                    return;
                }
                let inbox = Inbox {
                    geometry: machine.geometry(),
                    requests: Slab::new(),
                    events: Vec::new(),
                };
                let trails = Trails::new(machine.traced());
                let slot = VolumeSlot {
                    key,
                    gate: machine.gate(),
                    held: Held::default(),
                    machine,
                    backend,
                    inbox,
                    direct: DirectReads::default(),
                    trails,
                    actions: Vec::new(),
                    ops: 0,
                    front_ends: 0,
                    stage: Stage::Serving,
                    without_front_ends: Vec::new(),
                    touched: false,
                };
                let index = index_of(self.volumes.insert(slot));
                let before = self.keys.insert(key, index);
                assert!(before.is_none(), "two volumes of one key");
                self.wake_timer();
            }
            Message::RemoveVolume { key, done } => match self.keys.get(&key) {
                Some(&index) => self.leave(index, Some(done)),
                None => {
                    let _ = done.send(None);
                }
            },
            Message::StopFrontEnds { key, done } => match self.keys.get(&key) {
                Some(&index) if self.volumes[index as usize].front_ends > 0 => {
                    self.volumes[index as usize].without_front_ends.push(done);
                    self.stop_front_ends(index);
                }
                _ => {
                    let _ = done.send(());
                }
            },
            Message::VolumeEvent { key, event } => {
                if let Some(&index) = self.keys.get(&key) {
                    self.feed(index, event);
                }
            }
            Message::Recorded { key, event, trail } => {
                if let Some(&index) = self.keys.get(&key) {
                    let slot = &mut self.volumes[index as usize];
                    let has_requests = !slot.inbox.requests.is_empty();
                    slot.trails.heard(&event, *trail, has_requests);
                    self.feed(index, event);
                }
            }
            Message::Grow { key, size, done } => {
                let index = self.keys.get(&key).copied();
                if let Some(index) = index {
                    // What is checked against the new shape stands behind the event in the inbox.
                    let geometry = &mut self.volumes[index as usize].inbox.geometry;
                    geometry.size = geometry.size.max(size);
                    self.feed(index, Event::Grown { size });
                }
                // Whoever asked may have gone; the volume is larger all the same.
                let _ = done.send(index.is_some());
            }
            Message::Direct { key, io, body } => self.receive_direct(key, io, body),
            Message::AddFrontEnd { key, front_end } => {
                let Some(&volume) = self.keys.get(&key) else {
                    return;
                };
                let slot = &mut self.volumes[volume as usize];
                // While somebody waits for the last one's end, none comes that would have to be waited for too.
                if matches!(slot.stage, Stage::Serving) && slot.without_front_ends.is_empty() {
                    slot.front_ends += 1;
                    let slot = FrontEndSlot {
                        front_end,
                        volume,
                        pending: Pending::default(),
                        touched: false,
                    };
                    let index = index_of(self.front_ends.insert(slot));
                    self.let_through(volume, false);
                    self.with_front_end(index, FrontEnd::start);
                }
            }
            Message::Inspect { key, look } => {
                let index = self.keys.get(&key);
                look(index.map(|index| &*self.volumes[*index as usize].machine));
            }
        }
    }

    /// Sends a volume on its way out.
    fn leave(&mut self, index: u32, done: Option<oneshot::Sender<Option<Box<dyn Machine>>>>) {
        match &mut self.volumes[index as usize].stage {
            Stage::Leaving(waiters) => waiters.extend(done),
            stage @ Stage::Serving => {
                *stage = Stage::Leaving(done.into_iter().collect());
                // Before the volume takes no more: a ublk device's user would get an error.
                self.let_through(index, true);
                self.feed(index, Event::Stop);
                self.stop_front_ends(index);
            }
        }
    }

    /// What is held passes, for whoever stops them waits for it.
    fn stop_front_ends(&mut self, volume: u32) {
        self.let_through(volume, true);
        let indices: Vec<u32> = self
            .front_ends
            .iter()
            .filter(|(_, slot)| slot.volume == volume)
            .map(|(n, _)| index_of(n))
            .collect();
        for index in indices {
            self.with_front_end(index, FrontEnd::stop);
        }
    }

    /// What volumes and front ends are told of time goes on with ticks and messages only: they need it no
    /// finer. `batch_ns` is for stopwatches, and read once a batch: a system call where a kernel has no vDSO.
    fn look_at_the_clock(&mut self) {
        self.now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
    }

    /// Without anybody who waits for time there is no next tick until something happens to a volume or
    /// a front end: an idle reactor sleeps.
    fn tick(&mut self) {
        clock::check();
        self.look_at_the_clock();
        self.timer_armed = false;
        let requests = self.stats.requests.load(Ordering::Relaxed);
        let rate = match self.volumes.is_empty() {
            true => 0,
            false => self.rate.update(requests, self.now_ms),
        };
        self.stats.rate.store(rate, Ordering::Relaxed);
        let now_ms = self.now_ms;
        let wants =
            |(n, slot): (usize, &VolumeSlot)| slot.machine.wants_tick().then(|| index_of(n));
        let volumes: Vec<u32> = self.volumes.iter().filter_map(wants).collect();
        let wants =
            |(n, slot): (usize, &FrontEndSlot)| slot.front_end.wants_tick().then(|| index_of(n));
        let front_ends: Vec<u32> = self.front_ends.iter().filter_map(wants).collect();
        self.hand_over_errand(ERRAND_TIME_MAX_NS);
        let waits = !volumes.is_empty()
            || !front_ends.is_empty()
            || self.errands.is_on()
            || self.ending_since.is_some();
        // A rate that is not seen to fall would stand for ever.
        if waits || rate > 0 {
            self.arm_timer();
        }
        for index in volumes {
            self.feed(index, Event::Tick { now_ms });
        }
        for index in front_ends {
            self.with_front_end(index, FrontEnd::tick);
        }
    }

    /// Told to end: every volume leaves.
    fn end(&mut self) {
        self.ending_since = Some(self.now_ms);
        self.cut_direct();
        self.hand_over_errand(0);
        let volumes: Vec<u32> = self.volumes.iter().map(|(n, _)| index_of(n)).collect();
        for index in volumes {
            self.leave(index, None);
        }
    }

    /// Whether it was told to end.
    pub(super) fn is_ending(&self) -> bool {
        self.ending_since.is_some()
    }

    pub(super) fn index_of_volume(&self, key: VolumeKey) -> Option<u32> {
        self.keys.get(&key).copied()
    }

    fn is_over(&self) -> bool {
        let Some(since) = self.ending_since else {
            return false;
        };
        if self.volumes.is_empty() {
            return true;
        }
        if !self.ops.is_empty() || self.volumes.iter().any(|(_, slot)| slot.ops > 0) {
            return false;
        }
        // What waits now waits for the store, or for room that it makes. A ublk device gives such a
        // request to the next daemon; an NBD client is given some time, for it has only this one.
        let mut front_ends = self.front_ends.iter();
        front_ends.all(|(_, slot)| !slot.front_end.ends_by_itself())
            || self.now_ms.saturating_sub(since) >= END_GRACE_MS
    }

    /// The thread ends. Memory that the kernel may still use must outlive the ring, which the
    /// kernel takes apart in its own time: it is never freed.
    fn abandon(mut self) {
        for slot in self.front_ends.drain() {
            if slot.pending.ops > 0 {
                mem::forget(slot.front_end);
            }
        }
        mem::forget(self.fixed);
    }

    fn arm_doorbell(&mut self) {
        let count: *mut u64 = &raw mut self.fixed.doorbell_count;
        let read = opcode::Read::new(types::Fd(self.doorbell.raw_fd()), count.cast(), 8).build();
        // SAFETY: the count is in a box that is never freed while the ring may use it (`abandon`),
        // and nothing else reads or writes it.
        unsafe { self.ring.push(read.user_data(Token::Doorbell.pack())) };
    }

    /// Time goes on again after a rest: see [`Core::tick`].
    fn wake_timer(&mut self) {
        if !self.timer_armed {
            self.look_at_the_clock();
            self.arm_timer();
        }
    }

    fn arm_timer(&mut self) {
        if mem::replace(&mut self.timer_armed, true) {
            return;
        }
        let tick: *const types::Timespec = &raw const self.fixed.tick;
        let entry = opcode::Timeout::new(tick)
            .build()
            .user_data(Token::Timer.pack());
        // SAFETY: as the doorbell's count; the kernel reads it at submission.
        unsafe { self.ring.push(entry) };
    }
}

/// A slab's key as an index, which a token has room for up to 28 bits (it checks).
pub(super) fn index_of(key: usize) -> u32 {
    u32::try_from(key).expect("fewer than 2^32 entries")
}
