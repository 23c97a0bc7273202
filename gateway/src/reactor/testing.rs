//! A machine for tests: a volume that lies one to one on the cache file, and forgets nothing.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quarry_objfmt::{ChunkId, ChunkSeq, Epoch, Lba, Sectors, VolumeId};
use quarry_volume::{
    Action, Event, Fetch, FrameRef, IoError, IoId, Op, RequestId, STATUS_RUNS_MAX, StatusRun,
};

use super::errand::Errand;
use super::{
    BackendSink, Geometry, Machine, Message, PageCache, Reactor, ReactorConfig, ReactorHandle,
    VolumeKey,
};
use crate::qos::VolumeGate;

/// What a test can see of a machine from outside.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) flushes: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) durable_writes: AtomicU64,
    pub(crate) ticks: AtomicU64,
    pub(crate) stops: AtomicU64,
}

/// What a request still waits for.
struct Waiting {
    request: RequestId,
    fua: bool,
}

/// A volume of the cache file's own content. Zeroes and discards are written as zeroes; `holes`
/// reads as zeroes without a look at the file.
pub(crate) struct Mirror {
    geometry: Geometry,
    seen: Arc<Seen>,
    ios: HashMap<IoId, Waiting>,
    next_io: u64,
    stopped: bool,
    /// Requests are held back until it is told to let go by a `Drain`.
    pub(crate) hold: bool,
    held: Vec<RequestId>,
    /// Reads from this sector on are answered from memory: zeroes for even, a copy for odd blocks.
    pub(crate) synthetic_from: u64,
    /// Reads of this sector fail.
    pub(crate) unreadable: Option<Lba>,
    /// How fast it may be used.
    pub(crate) gate: Option<Arc<VolumeGate>>,
}

impl Mirror {
    pub(crate) fn new(geometry: Geometry) -> (Self, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        let mirror = Self {
            geometry,
            seen: Arc::clone(&seen),
            ios: HashMap::new(),
            next_io: 0,
            stopped: false,
            hold: false,
            held: Vec::new(),
            synthetic_from: u64::MAX,
            unreadable: None,
            gate: None,
        };
        (mirror, seen)
    }

    fn io(&mut self, request: RequestId, fua: bool) -> IoId {
        self.next_io += 1;
        let io = IoId(self.next_io);
        self.ios.insert(io, Waiting { request, fua });
        io
    }
}

impl Machine for Mirror {
    fn apply(&mut self, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Warm { .. } => unreachable!("nobody warms a mirror"),
            Event::Request(request) => {
                let id = request.id;
                if self.stopped {
                    out.push(Action::Complete {
                        request: id,
                        result: Err(IoError::ShuttingDown),
                    });
                    return;
                }
                if self.hold {
                    self.held.push(id);
                    return;
                }
                let offset = request.range.start.get() * 512;
                let len = u32::try_from(request.range.len().bytes()).unwrap();
                match request.op {
                    Op::Read
                        if self.unreadable.is_some_and(|lba| {
                            (request.range.start..request.range.end).contains(&lba)
                        }) =>
                    {
                        out.push(Action::Complete {
                            request: id,
                            result: Err(IoError::Io),
                        });
                    }
                    Op::Read if request.range.start.get() >= self.synthetic_from => {
                        let half = len / 2 / 512 * 512;
                        let io = self.io(id, false);
                        out.push(Action::ZeroFill {
                            io,
                            request: id,
                            buffer_offset: 0,
                            len: half,
                        });
                        // Only the last one answers: the first completes without a waiter.
                        self.ios.remove(&io);
                        let io = self.io(id, false);
                        let data = Bytes::from(vec![0x5a; (len - half) as usize]);
                        out.push(Action::CopyToRequest {
                            io,
                            request: id,
                            buffer_offset: half,
                            data,
                        });
                    }
                    Op::Read => {
                        let io = self.io(id, false);
                        out.push(Action::CacheRead {
                            io,
                            request: id,
                            buffer_offset: 0,
                            offset,
                            len,
                        });
                    }
                    Op::Write { fua } => {
                        let io = self.io(id, fua);
                        out.push(Action::CacheWrite {
                            io,
                            request: id,
                            buffer_offset: 0,
                            offset,
                            len,
                        });
                    }
                    // Odd blocks of 4 KiB are zeroes, even ones are not.
                    Op::Status => {
                        let sectors = request.range.start.get()..request.range.end.get();
                        let runs = sectors.step_by(8).map(|lba| StatusRun {
                            len: Sectors::new(8),
                            zero: lba / 8 % 2 == 1,
                        });
                        let runs = runs.take(STATUS_RUNS_MAX).collect();
                        out.push(Action::Status { request: id, runs });
                        out.push(Action::Complete {
                            request: id,
                            result: Ok(()),
                        });
                    }
                    Op::Flush => {
                        self.seen.flushes.fetch_add(1, Ordering::SeqCst);
                        let io = self.io(id, false);
                        out.push(Action::Sync { io });
                    }
                    Op::Discard | Op::WriteZeroes { .. } => {
                        if request.op == Op::Discard {
                            self.seen.discards.fetch_add(1, Ordering::SeqCst);
                        }
                        let io = self.io(id, request.op == (Op::WriteZeroes { fua: true }));
                        // Odd memory on purpose: a fill is copied to where direct I/O can take it.
                        let data = Bytes::from(vec![0; len as usize + 1]).slice(1..);
                        out.push(Action::FillWrite { io, offset, data });
                    }
                }
            }
            Event::IoDone { io, result } => {
                let Some(waiting) = self.ios.remove(&io) else {
                    return;
                };
                if waiting.fua && result.is_ok() {
                    self.seen.durable_writes.fetch_add(1, Ordering::SeqCst);
                    let io = self.io(waiting.request, false);
                    out.push(Action::Sync { io });
                    return;
                }
                let result = result.map_err(|_| IoError::Io);
                out.push(Action::Complete {
                    request: waiting.request,
                    result,
                });
            }
            Event::Tick { .. } => {
                self.seen.ticks.fetch_add(1, Ordering::SeqCst);
            }
            Event::Drain { .. } => {
                self.hold = false;
                for request in self.held.drain(..) {
                    out.push(Action::Complete {
                        request,
                        result: Err(IoError::Io),
                    });
                }
            }
            Event::Stop => {
                self.seen.stops.fetch_add(1, Ordering::SeqCst);
                self.stopped = true;
                for request in self.held.drain(..) {
                    out.push(Action::Complete {
                        request,
                        result: Err(IoError::ShuttingDown),
                    });
                }
            }
            Event::Grown { size } => self.geometry.size = size,
            Event::Fetched { .. }
            | Event::NodesLoaded { .. }
            | Event::Uploaded { .. }
            | Event::Checkpointed { .. }
            | Event::Remapped { .. }
            | Event::DirectReads(_)
            | Event::CheckpointFailed { .. }
            | Event::CacheFailed { .. }
            | Event::Fenced { .. } => {}
        }
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn gate(&self) -> Option<Arc<VolumeGate>> {
        self.gate.clone()
    }
}

/// A backend that is never asked.
pub(crate) struct NoBackend;

impl BackendSink for NoBackend {
    fn submit(&self, action: Action) {
        panic!("a mirror asks the store for {action:?}");
    }
}

/// A machine that has a frame fetched whenever it is drained, or two of them with a checkpoint, and tells what came.
struct Fetching(std::sync::mpsc::Sender<Bytes>);

impl Machine for Fetching {
    fn apply(&mut self, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Drain { io, checkpoint } => {
                let chunk = ChunkId {
                    volume: VolumeId::from_bytes([1; 16]),
                    epoch: Epoch::ZERO,
                    seq: ChunkSeq::ZERO,
                };
                let frames = vec![FrameRef {
                    index: 0,
                    stored_offset: 0,
                    stored_len: 512,
                }];
                let fetch = Fetch { chunk, frames };
                for _ in 0..1 + usize::from(checkpoint) {
                    out.push(Action::Fetch {
                        io,
                        fetch: fetch.clone(),
                        foreground: true,
                    });
                }
            }
            // Nobody may listen any more.
            Event::Fetched { mut frames, .. } => drop(self.0.send(frames.remove(0).unwrap())),
            _ => {}
        }
    }

    fn geometry(&self) -> Geometry {
        geometry(1 << 20, 512)
    }
}

/// A backend whose fetches are errands, on which is done what it makes.
struct Begins<W> {
    work: Box<dyn Fn() -> W + Send>,
    key: VolumeKey,
    runtime: tokio::runtime::Handle,
    reactor: ReactorHandle,
}

impl<W: Future<Output = Bytes> + Send + 'static> Begins<W> {
    fn errand(&self, action: Action) -> Errand {
        let Action::Fetch { io, .. } = action else {
            panic!("{action:?} is no fetch")
        };
        let (work, key) = ((self.work)(), self.key);
        let work = async move {
            let frames = vec![Ok(work.await)];
            let event = Event::Fetched { io, frames };
            Message::VolumeEvent { key, event }
        };
        Errand::new(work, self.runtime.clone(), self.reactor.clone())
    }
}

impl<W: Future<Output = Bytes> + Send + 'static> BackendSink for Begins<W> {
    fn submit(&self, action: Action) {
        self.errand(action).hand_over();
    }

    fn begin(&self, action: Action) -> Option<Errand> {
        Some(self.errand(action))
    }
}

/// A volume for which a reactor goes on errands.
pub(crate) struct Goer {
    reactor: Reactor,
    key: VolumeKey,
    brought: std::sync::mpsc::Receiver<Bytes>,
    // After the reactor, which polls with it.
    _runtime: tokio::runtime::Runtime,
}

impl Goer {
    /// Each errand is what `work` makes, handed over to `runtime`.
    pub(crate) fn new<W: Future<Output = Bytes> + Send + 'static>(
        runtime: tokio::runtime::Runtime,
        work: impl Fn() -> W + Send + 'static,
    ) -> Self {
        let (reactor, _cache) = reactor(1 << 20);
        let handle = reactor.handle();
        let (tell, brought) = std::sync::mpsc::channel();
        let key = handle.new_key();
        let backend = Begins {
            work: Box::new(work),
            key,
            runtime: runtime.handle().clone(),
            reactor: handle.clone(),
        };
        let add = Message::AddVolume {
            key,
            machine: Box::new(Fetching(tell)),
            backend: Box::new(backend),
        };
        handle.send_blocking(add).unwrap();
        Self {
            reactor,
            key,
            brought,
            _runtime: runtime,
        }
    }

    /// Sends it.
    pub(crate) fn send(&self) {
        self.drain(false);
    }

    /// Sends it twice in one batch.
    pub(crate) fn send_twice(&self) {
        self.drain(true);
    }

    fn drain(&self, checkpoint: bool) {
        let event = Event::Drain {
            io: IoId(1),
            checkpoint,
        };
        let key = self.key;
        let message = Message::VolumeEvent { key, event };
        self.reactor.handle().send_blocking(message).unwrap();
    }

    /// What it brings; none: nothing for so long.
    pub(crate) fn wait(&self, limit: Duration) -> Option<Bytes> {
        self.brought.recv_timeout(limit).ok()
    }

    /// Ends the reactor.
    pub(crate) fn shutdown(self) {
        self.reactor.shutdown();
    }
}

/// A reactor on a fresh cache file of `bytes`.
pub(crate) fn reactor(bytes: u64) -> (Reactor, Arc<File>) {
    reactor_with(bytes, None)
}

/// The same, whose reads into memory come from the file of a page cache.
pub(crate) fn reactor_with(bytes: u64, page_cache: Option<PageCache>) -> (Reactor, Arc<File>) {
    let cache = tempfile::tempfile().unwrap();
    cache.set_len(bytes).unwrap();
    let cache = Arc::new(cache);
    let config = ReactorConfig {
        index: 0,
        page_cache,
        kept_writes: Default::default(),
        sync_failure: Default::default(),
        cache: Arc::clone(&cache),
        buffer_entries: 8,
        cipher: None,
    };
    (Reactor::spawn(config).unwrap(), cache)
}

/// A shape of `bytes` with this block size.
pub(crate) fn geometry(bytes: u64, sector_size: u32) -> Geometry {
    Geometry {
        size: Sectors::from_bytes(bytes).unwrap(),
        sector_size,
        read_only: false,
    }
}
