//! The store's side of an attached volume: carries out what the state machine asks of the store.
//!
//! Owns: the head and its tag (the right to write), encoding and decoding off the reactors'
//! threads, and what is fetched ([`fetch`]). Does not own: what is in a chunk or when it is cut
//! (`quarry-volume`), retries (the store lane).
//!
//! A store that is away is waited for, by the lane, for ever; what is reported here is only what
//! waiting cannot mend: a damaged object, or a newer writer.

mod buffers;
mod checkpoint;
mod chores;
mod compact;
mod direct;
mod fetch;
mod flights;
mod head;
mod map_end;
mod objects;
pub mod open;
mod orphans;
pub mod past;
mod reclaim;
pub mod release;
mod renew;
mod scan;
mod sound;
mod upload;
mod warm;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use quarry_cache::BlockDevice;
use quarry_objfmt::chunk::ChunkHeader;
use quarry_objfmt::head::{Head, RootRef};
use quarry_objfmt::{ChunkSeq, DataKeys, Encryption, SnapshotRef, VolumeId};
use quarry_volume::map::MapRoot;
use quarry_volume::{Action, Event, IoId, Report};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinError;

pub(crate) use map_end::{MapEnd, named};
use open::Claimed;
use reclaim::{Reclaim, first_credit};
pub(crate) use sound::{DAMAGE_RETRIES_MAX, Unsound, insist, record, told};
use upload::{NotSent, UNREADABLE};

pub use buffers::Buffers;
pub use chores::{Chore, ChoreError, ChoreProgress};
use fetch::get_range;
pub use fetch::{Fetched, Fetches};
pub use head::{HeadCell, HeadError};
pub(crate) use objects::unique_bytes;
pub use objects::{LogChunk, Objects, RETAIN_MS_MAX, Sealed, Space};
pub use reclaim::{ReclaimSettings, Reclaimed};
pub use warm::Warmed;

use crate::fair::{Gate, Share};
use crate::kept_writes::KeptWrites;
use crate::reactor::errand::Errand;
use crate::reactor::{BackendSink, Message, ReactorHandle, VolumeKey};
use crate::store::Store;
use crate::store::direct::DirectLane;
use crate::trace::{self, Recording, Step, Tracer};

/// Most chunks being read, encoded or sent at once, over all volumes: each takes up to 16 MiB. A tenant whose store
/// hangs may keep as many, beside those of the others ([`Gate`]).
pub const UPLOADS_MAX: usize = 16;

/// Most compactions at once, over all volumes: each takes up to twice
/// [`ReclaimSettings::window_bytes`] and four chunks. A tenant whose store hangs may keep as many, beside those of the others.
pub const COMPACTIONS_MAX: usize = 1;

/// How long a stage of a compaction may take before those of other tenants go on beside it.
pub const COMPACTION_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(120);

/// The way of direct reads, or why the store or the kernel has none; found out when first asked, for few
/// ask at all.
pub type DirectWay =
    LazyLock<Result<DirectLane, String>, Box<dyn FnOnce() -> Result<DirectLane, String> + Send>>;

/// What all volumes' backends share; of each volume's copy the share is its tenant's.
#[derive(Clone)]
pub struct Common {
    /// For reads that someone waits for.
    pub store: Arc<dyn Store>,
    /// For uploads, checkpoints and readahead.
    pub background: Arc<dyn Store>,
    /// For reads that do not pass through our memory.
    pub direct: Arc<DirectWay>,
    /// The cache device, for reading what is uploaded.
    pub device: Arc<dyn BlockDevice>,
    /// What of that is in memory still.
    pub kept_writes: Arc<KeptWrites>,
    /// The RAM tier, and what is being fetched.
    pub fetches: Arc<Fetches>,
    /// For whom the work is.
    pub share: Arc<Share>,
    /// Whose what is fetched is, in memory and on the cache device.
    pub group: u32,
    /// Bounds the memory of uploads.
    pub uploads: Gate,
    /// Theirs, kept for the next ones.
    pub buffers: Buffers,
    /// Bounds the memory of compactions.
    pub compactions: Gate,
    /// When what the store does not need any more is deleted.
    pub reclaim: ReclaimSettings,
    /// How often each volume's orphans are looked for.
    pub orphan_interval: std::time::Duration,
    /// The wall's clock, in milliseconds since 1970.
    pub now_ms: fn() -> u64,
    /// Where the work runs.
    pub runtime: Handle,
    /// Who wants to know what the work takes.
    pub tracer: Option<Arc<Tracer>>,
}

impl Common {
    /// The way to the store for a read that somebody waits for, or not.
    fn reads(&self, foreground: bool) -> &Arc<dyn Store> {
        if foreground {
            &self.store
        } else {
            &self.background
        }
    }
}

/// What the operator is told of a volume, beside its counters.
#[derive(Clone, Default, Debug)]
pub struct Condition {
    /// The newest problem, in a sentence.
    pub problem: Option<String>,
    /// Whether it was fenced by a newer writer.
    pub fenced: bool,
    /// Whether its cache device failed it.
    pub failed: bool,
    /// Damaged objects seen.
    pub damaged: u64,
}

impl Condition {
    /// Whether what was told last is that the store takes no new map.
    pub(crate) fn lacks_a_map(&self) -> bool {
        let problem = self.problem.as_deref().unwrap_or_default();
        problem.starts_with(checkpoint::REFUSED)
    }

    /// Tells of a problem, unless there is one that is for good.
    fn tell(&mut self, problem: String) {
        if !self.fenced && !self.failed {
            self.problem = Some(problem);
        }
    }
}

/// The backend of one attached volume.
pub struct VolumeBackend {
    common: Common,
    /// `tenant/volume`, for people.
    name: String,
    volume: VolumeId,
    head: HeadCell,
    /// Of the chunks that its map may name; none if it is not encrypted. What is written is encrypted with its newest.
    keys: parking_lot::Mutex<Option<Arc<DataKeys>>>,
    renewal: renew::Renewal,
    /// The map as of the last checkpoint.
    root: parking_lot::Mutex<Arc<MapRoot>>,
    /// Where that is. The head may name a later one: one whose PUT was given up for want of an answer.
    root_ref: parking_lot::Mutex<Option<RootRef>>,
    /// The number of the next map object.
    next_map: AtomicU64,
    /// Bytes of all chunks ever stored, those of the log too; what was deleted is taken off.
    stored_bytes: AtomicU64,
    /// Bytes of map objects stored since the attach.
    map_bytes: AtomicU64,
    /// The time of the newest chunk that was cut, or of the map.
    cut_ms: AtomicU64,
    /// Chunks that are stored and not folded into the map.
    log: parking_lot::Mutex<BTreeMap<ChunkSeq, LogChunk>>,
    /// The volume's objects, and the right to change the map.
    objects: tokio::sync::Mutex<Objects>,
    /// The oldest runs of the map that a compaction goes by; 0 without one.
    compacted_runs: AtomicUsize,
    /// The number of the next chunk of compaction.
    next_compacted: AtomicU64,
    reclaim: Reclaim,
    orphans: orphans::Orphans,
    key: VolumeKey,
    reactor: ReactorHandle,
    condition: parking_lot::Mutex<Condition>,
    drains: parking_lot::Mutex<Drains>,
    /// How many uploads wait for data that cannot be read.
    stuck: watch::Sender<usize>,
    /// Whether what the volume has of the cache is still its own. Held by who makes a chunk of that.
    has_cache: Arc<tokio::sync::RwLock<bool>>,
    warmings: warm::Warmings,
    fetched: fetch::FetchCounts,
}

/// Who waits for which drain; `None`: the volume is gone.
type Drains = Option<std::collections::HashMap<IoId, oneshot::Sender<bool>>>;

impl VolumeBackend {
    /// The backend of the volume that was claimed, answering to `reactor`.
    ///
    /// # Panics
    /// If the volume is encrypted and its keys are not at hand, or the other way round: what is written must be
    /// what its head says.
    #[must_use]
    pub fn new(
        common: Common,
        name: String,
        claimed: Claimed,
        key: VolumeKey,
        reactor: ReactorHandle,
    ) -> Arc<Self> {
        let encrypted = claimed.info.encryption != Encryption::None;
        assert_eq!(encrypted, claimed.keys.is_some(), "{name}: keys");
        let log = claimed.chunks.iter().map(|chunk| (chunk.id.seq, *chunk));
        let times = claimed.chunks.iter().map(|chunk| chunk.cut_ms);
        let space = claimed.objects.space(&claimed.info.snapshots);
        let credit = first_credit(&claimed.info, &claimed.root, (common.now_ms)());
        Arc::new(Self {
            common,
            name,
            volume: claimed.info.volume,
            cut_ms: AtomicU64::new(times.fold(claimed.objects.log_ms(), u64::max)),
            log: parking_lot::Mutex::new(log.collect()),
            reclaim: Reclaim::new(space, credit),
            objects: tokio::sync::Mutex::new(claimed.objects),
            orphans: orphans::Orphans::default(),
            compacted_runs: AtomicUsize::new(0),
            next_compacted: AtomicU64::new(ChunkSeq::COMPACTED.get()),
            root: parking_lot::Mutex::new(claimed.root),
            root_ref: parking_lot::Mutex::new(claimed.info.root),
            next_map: AtomicU64::new(claimed.info.next_map.get()),
            // The head counts what is in its map.
            stored_bytes: AtomicU64::new(
                claimed
                    .info
                    .stored_bytes
                    .saturating_add(bytes_of(&claimed.chunks)),
            ),
            map_bytes: AtomicU64::new(0),
            head: claimed.head,
            keys: parking_lot::Mutex::new(claimed.keys),
            renewal: renew::Renewal::default(),
            key,
            reactor,
            condition: parking_lot::Mutex::default(),
            drains: parking_lot::Mutex::new(Some(std::collections::HashMap::new())),
            stuck: watch::Sender::new(0),
            has_cache: Arc::new(tokio::sync::RwLock::new(true)),
            warmings: warm::Warmings::default(),
            fetched: fetch::FetchCounts::default(),
        })
    }

    /// `tenant/volume`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// What the operator is told.
    pub fn condition(&self) -> Condition {
        self.condition.lock().clone()
    }

    /// The head as last written or read by us.
    pub fn head(&self) -> &HeadCell {
        &self.head
    }

    /// Has dead objects retained for so long from now on; those that are too old for that go at once.
    ///
    /// # Errors
    /// As [`HeadCell::update`].
    pub async fn set_retention(
        &self,
        store: &dyn Store,
        retain_ms: u64,
    ) -> Result<Head, HeadError> {
        let changed = self.head.update(store, |head| head.retain(retain_ms)).await;
        self.reclaim.wake();
        changed
    }

    /// A snapshot was deleted: what only it needed can go.
    pub fn snapshot_is_gone(&self) {
        self.reclaim.wake();
    }

    /// Bytes of chunks stored over the volume's life, and bytes of map objects since the attach.
    pub fn stored(&self) -> (u64, u64) {
        (
            self.stored_bytes.load(Ordering::Relaxed),
            self.map_bytes.load(Ordering::Relaxed),
        )
    }

    /// What each of the snapshots keeps from being deleted that nothing else does, in bytes; `None` if that is not
    /// known, or the map is being changed.
    pub fn unique_bytes(&self, snapshots: &[SnapshotRef]) -> Option<Vec<u64>> {
        self.objects.try_lock().ok()?.unique_bytes(snapshots)
    }

    /// The reactor that serves the volume, and its name there.
    pub fn place(&self) -> (&ReactorHandle, VolumeKey) {
        (&self.reactor, self.key)
    }

    /// Uploads all that is acknowledged, and with `checkpoint` folds it into the map. False if the
    /// volume cannot: fenced, or its cache device failed or cannot be read where it is.
    pub async fn drain(&self, checkpoint: bool) -> bool {
        let (tx, rx) = oneshot::channel();
        let io = {
            let mut drains = self.drains.lock();
            let Some(drains) = &mut *drains else {
                return false;
            };
            let io = (0..)
                .map(IoId)
                .find(|io| !drains.contains_key(io))
                .expect("few drains at once");
            drains.insert(io, tx);
            io
        };
        self.tell(Event::Drain { io, checkpoint }).await;
        tokio::select! {
            biased;
            complete = rx => complete.unwrap_or(false),
            () = self.is_stuck() => false,
        }
    }

    /// Waits until what is unsent cannot be sent, for the cache device cannot be read there.
    pub async fn is_stuck(&self) {
        // Its sender is ours.
        let _ = self.stuck.subscribe().wait_for(|stuck| *stuck > 0).await;
    }

    /// The volume is gone from its reactor: whoever waits for something of it waits no longer, and no chunk is made any more of
    /// what it had in the cache, which may be another's from now on.
    pub async fn close(&self) {
        *self.drains.lock() = None;
        self.warmings.close();
        // Waits for one that is being made, at most as long as the cache device takes to be read.
        *self.has_cache.write().await = false;
    }

    /// Its data keys, if it is encrypted.
    fn keys(&self) -> Option<Arc<DataKeys>> {
        self.keys.lock().clone()
    }

    /// Feeds the volume an event, with what the task at hand has recorded.
    pub async fn tell(&self, event: Event) {
        // The reactor is gone only when the daemon ends.
        let _ = self.reactor.send(self.message(event)).await;
    }

    /// The event as it is told, with what the task at hand has recorded.
    fn message(&self, event: Event) -> Message {
        let key = self.key;
        match trace::taken() {
            Some(trail) => Message::Recorded {
                key,
                event,
                trail: Box::new(trail),
            },
            None => Message::VolumeEvent { key, event },
        }
    }

    /// The time of a chunk that is cut now: the clock's, but never before the chunk before it, so that
    /// times of the log do not go back when clocks do. Called in the order of the log.
    fn cut(&self) -> u64 {
        let now_ms = (self.common.now_ms)().max(1);
        self.cut_ms.fetch_max(now_ms, Ordering::Relaxed).max(now_ms)
    }

    /// An upload's chunk was cut at `cut_ms`.
    async fn carry_out(self: Arc<Self>, action: Action, cut_ms: u64) {
        match action {
            Action::Fetch {
                io,
                fetch,
                foreground,
            } => {
                let frames = self.fetch(&fetch, foreground).await;
                self.tell(Event::Fetched { io, frames }).await;
            }
            Action::FetchDirect {
                io,
                chunk,
                object_offset,
                len,
                ..
            } => self.fetch_direct(io, chunk, object_offset, len).await,
            Action::LoadNodes {
                io,
                nodes,
                foreground,
            } => {
                let result = self.load_nodes(&nodes, foreground).await;
                self.tell(Event::NodesLoaded { io, result }).await;
            }
            Action::Upload(plan) => match self.upload(&plan, cut_ms).await {
                // The volume is gone: what it had not sent stays in the cache.
                Err(NotSent::Gone) => {}
                Ok((header, stored_bytes)) => {
                    self.log_chunk(&header, stored_bytes, cut_ms);
                    let entries = header.map_entries();
                    self.tell(Event::Uploaded {
                        seq: plan.id.seq,
                        entries,
                        stored_bytes,
                    })
                    .await;
                }
                Err(NotSent::Fenced { by }) => self.tell(Event::Fenced { by }).await,
                Err(NotSent::Untrusted { errno }) => {
                    self.tell(Event::CacheFailed { errno }).await;
                }
            },
            Action::Checkpoint(plan) => match checkpoint::run(&self, plan).await {
                Ok(()) => {}
                Err(checkpoint::Stopped::Fenced { by }) => self.tell(Event::Fenced { by }).await,
                Err(checkpoint::Stopped::Damaged(error)) => {
                    self.report(Report::Damaged {
                        object: error.object,
                        reason: format!(
                            "{}; no checkpoint can be made, and the log grows",
                            error.reason
                        ),
                    });
                    self.tell(Event::CheckpointFailed { for_good: true }).await;
                }
                Err(checkpoint::Stopped::Refused(error)) => {
                    self.problem(format!("{}: {}", checkpoint::REFUSED, error.reason));
                    self.tell(Event::CheckpointFailed { for_good: false }).await;
                }
            },
            Action::Folded(log) => drop(log),
            Action::Drained { io, complete } => {
                let waiting = self.drains.lock().as_mut().and_then(|d| d.remove(&io));
                if let Some(tx) = waiting {
                    // Nobody listens if the caller gave up, and nothing is lost by that.
                    let _ = tx.send(complete);
                }
            }
            Action::Warmed {
                io,
                upto,
                bytes,
                end,
            } => self.warmings.answer(io, Warmed { upto, bytes, end }),
            Action::Report(report) => self.report(report),
            other => panic!("{other:?} is the reactor's to carry out"),
        }
    }

    fn report(&self, report: Report) {
        let mut condition = self.condition.lock();
        let volume = self.name.as_str();
        match report {
            Report::Fenced { by, unsent_bytes } => {
                tracing::error!(volume, %by, unsent_bytes, "fenced by a newer writer: read-only from now on");
                condition.fenced = true;
                condition.problem = Some(format!(
                    "fenced: {by} has taken the volume over; {unsent_bytes} bytes written here were not sent and stay in the cache"
                ));
            }
            Report::CacheFailed { errno, doing } => {
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::error!(volume, %error, doing, "the cache device failed: no more writes are taken");
                condition.failed = true;
                condition.problem = Some(format!("the cache device failed while {doing}: {error}"));
            }
            Report::Unreadable { errno } => {
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::error!(volume, %error, "{UNREADABLE}");
                condition.tell(format!("{UNREADABLE}: {error}"));
            }
            Report::Damaged { object, reason } => {
                tracing::error!(volume, object, reason, "damaged object");
                condition.damaged += 1;
                condition.problem = Some(format!("damaged object {object}: {reason}"));
            }
            Report::Stalled(true) => tracing::warn!(volume, "writes wait for cache space"),
            Report::Stalled(false) => tracing::info!(volume, "writes go on"),
        }
    }

    fn problem(&self, problem: String) {
        tracing::error!(volume = self.name, problem);
        self.condition.lock().tell(problem);
    }

    /// A problem of this kind is over, if it is the one that is told.
    fn over(&self, kind: &str) {
        let problem = &mut self.condition.lock().problem;
        if problem.as_ref().is_some_and(|p| p.starts_with(kind)) {
            tracing::info!(volume = self.name, "no more: {kind}");
            *problem = None;
        }
    }

    /// A chunk of ours is stored.
    fn log_chunk(&self, header: &ChunkHeader, stored_bytes: u64, cut_ms: u64) {
        let chunk = LogChunk::new(header, stored_bytes).cut_at(cut_ms);
        let mut log = self.log.lock();
        log.insert(header.id.seq, chunk);
        self.stored_bytes.fetch_add(stored_bytes, Ordering::Relaxed);
    }

    /// Bytes of all chunks but those that a log which begins at `first` has: what a head with that log counts.
    fn stored_before(&self, first: ChunkSeq) -> u64 {
        let log = self.log.lock();
        let stored = self.stored_bytes.load(Ordering::Relaxed);
        stored.saturating_sub(bytes_of(log.range(first..).map(|(_, chunk)| chunk)))
    }

    /// The chunks of the log up to and with `upto`.
    fn log_up_to(&self, upto: ChunkSeq) -> Vec<LogChunk> {
        self.log
            .lock()
            .range(..=upto)
            .map(|(_, chunk)| *chunk)
            .collect()
    }

    /// They are in the map.
    fn folded(&self, chunks: &[LogChunk]) {
        let mut log = self.log.lock();
        for chunk in chunks {
            log.remove(&chunk.id.seq);
        }
        drop(log);
        self.reclaim.folded(bytes_of(chunks));
    }
}

/// Their stored bytes, together.
pub(crate) fn bytes_of<'a>(chunks: impl IntoIterator<Item = &'a LogChunk>) -> u64 {
    let bytes = |chunk: &LogChunk| u64::from(chunk.stored_bytes);
    chunks.into_iter().map(bytes).sum()
}

/// Does what takes long on the runtime's blocking pool. A runtime of one thread does it at once: it is a
/// simulation's, whose order of steps must not hang on a pool.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => Ok(work()),
        _ => tokio::task::spawn_blocking(work).await,
    }
}

impl BackendSink for Arc<VolumeBackend> {
    /// Never blocks: the volume bounds what it has under way.
    fn submit(&self, action: Action) {
        let this = Self::clone(self);
        let runtime = this.common.runtime.clone();
        // Here, where they come in the order of the log.
        let cut_ms = match &action {
            Action::Upload(_) => self.cut(),
            _ => 0,
        };
        let recording = this.common.tracer.as_ref().and_then(|_| recorded(&action));
        let work = this.carry_out(action, cut_ms);
        match recording {
            Some(recording) => runtime.spawn(recording.over(work)),
            None => runtime.spawn(work),
        };
    }

    /// A fetch from a store that is asked on connections of our own can be gone for by the reactor.
    fn begin(&self, action: Action) -> Option<Errand> {
        if !self.common.store.has_plain_reads() {
            self.submit(action);
            return None;
        }
        let recording = self.common.tracer.as_ref().and_then(|_| recorded(&action));
        let Action::Fetch {
            io,
            fetch,
            foreground,
        } = action
        else {
            unreachable!("only fetches are begun")
        };
        let this = Self::clone(self);
        let (runtime, reactor) = (self.common.runtime.clone(), self.reactor.clone());
        let work = async move {
            let frames = this.fetch(&fetch, foreground).await;
            this.message(Event::Fetched { io, frames })
        };
        Some(match recording {
            Some(recording) => Errand::new(recording.over(work), runtime, reactor),
            None => Errand::new(work, runtime, reactor),
        })
    }
}

/// Records what requests may wait for.
fn recorded(action: &Action) -> Option<Recording> {
    let (step, count) = match action {
        Action::Fetch { fetch, .. } => (Step::Fetch, fetch.frames.len()),
        Action::LoadNodes { nodes, .. } => (Step::Nodes, nodes.len()),
        Action::Upload(plan) => (Step::Upload, plan.extents.len()),
        _ => return None,
    };
    Some(Recording::begin(step, count as u64))
}
