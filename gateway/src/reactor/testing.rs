//! A machine for tests: a volume that lies one to one on the cache file, and forgets nothing.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use quarry_objfmt::Sectors;
use quarry_volume::{Action, Event, IoError, IoId, Op, RequestId, STATUS_RUNS_MAX, StatusRun};

use super::{BackendSink, Geometry, Machine, PageCache, Reactor, ReactorConfig};

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
            | Event::CheckpointFailed
            | Event::Fenced { .. } => {}
        }
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }
}

/// A backend that is never asked.
pub(crate) struct NoBackend;

impl BackendSink for NoBackend {
    fn submit(&self, action: Action) {
        panic!("a mirror asks the store for {action:?}");
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
