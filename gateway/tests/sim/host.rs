//! A gateway's host: a cache device and the journals, which outlive the daemon, and the daemon.
//!
//! A daemon here is what the engine makes of a start and an attach, in the same order and of the
//! same parts, without its front ends.

mod attach;
mod calls;
mod errands;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::iter::once;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

pub use calls::{Ask, Call, Not, name_of};
pub use errands::Errand;
use quarry_cache::{
    BlockDevice as _, Cache, CleanSegment, Expected, IndexTable, Journals, Recovered, SyncFailure,
    scan,
};
use quarry_gateway::backend::Buffers;
use quarry_gateway::backend::open::{Claimed, OpenError};
use quarry_gateway::backend::{
    COMPACTION_TIME_MAX, COMPACTIONS_MAX, Common, Fetches, ReclaimSettings, UPLOADS_MAX,
};
use quarry_gateway::fair::{Gate, GateCounts, plain_share};
use quarry_gateway::kept_writes::KeptWrites;
use quarry_gateway::store::{Lane, LaneSettings, S3Store};
use quarry_objfmt::{CacheId, Epoch, Generation, SegmentId, VolumeId};
use quarry_volume::map::NodeCache;
use quarry_volume::{KeptFrames, Shared, Tuning};
use rand::rngs::SmallRng;
use tokio::task::JoinHandle;

use super::device::SimDevice;
use super::faults::Faults;
use super::oracle::{Digest, Truth};
use super::outcome::Outcome;
use super::plan::Plan;
use super::session::{Cx, Died, Session};
use super::store::SimBucket;

/// Memory of fetched frames: more than a run fetches, for what its cache evicts hangs on the clock.
const FRAMES_BYTES: u64 = 1 << 30;
/// More than the writes of a few chunks, less than those of all segments.
const KEPT_WRITE_BYTES: usize = 1 << 20;

/// Segments that may be dirty.
const DIRTY_MAX: u32 = 9;

/// Of one seed in so many the lane to the store has few places, some of them the foreground's alone: less than is
/// looked at side by side anywhere, so that who waits for a place beside others that it holds is found out.
const NARROW_EACH: u64 = 3;
const NARROW_LANE: (usize, usize) = (3, 1);

/// What became clean is told the index log in so many milliseconds each, about so many runs of it.
const DESCRIBED_EACH: u64 = 4;
const DESCRIBED_RUNS: usize = 40;

/// How long what the map does not need is kept.
pub const HORIZON: Duration = Duration::from_secs(120);
/// How often orphans are looked for.
const ORPHAN_INTERVAL: Duration = Duration::from_secs(60);

/// Small enough that a short run meets every limit.
const TUNING: Tuning = Tuning {
    // These three are a plan's own.
    writeback_delay_ms: 0,
    chunk_sectors_max: 0,
    checkpoint_entries: 0,
    chunk_writes_max: 64,
    uploads_max: 4,
    checkpoint_sectors: 2048,
    checkpoint_chunks: 6,
    readahead_sectors_max: 256,
    journal_entries: 24,
    log_entries_max: 4 << 20,
    log_replay_max: quarry_volume::LOG_REPLAY_MAX,
};

/// What a host owes a volume when it comes back with its cache.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    epoch: u32,
    acked: u64,
    flushed: u64,
    /// Whether a sync failed since: what was acknowledged only may be given up, by who says so.
    in_doubt: bool,
}

pub struct Host {
    pub name: String,
    pub cache: CacheId,
    pub device: Arc<SimDevice>,
    dir: PathBuf,
    journals: Journals,
    pub daemon: Option<Daemon>,
    promises: BTreeMap<VolumeId, Promise>,
    /// What the index table and the index log said when the daemon died.
    described: Vec<(SegmentId, Generation)>,
    index: Vec<CleanSegment>,
    /// Whether its device has ever lost a record page.
    was_flipped: bool,
}

/// How a life ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The daemon alone.
    Killed,
    /// The host; what was not synced is lost in part.
    PowerCut,
}

pub struct Daemon {
    tuning: Tuning,
    lane: Lane,
    common: Common,
    shared: Shared,
    failure: SyncFailure,
    kept: BTreeMap<VolumeId, Recovered>,
    /// The index log, and of which of its records it was not said yet that they are true.
    index: Vec<CleanSegment>,
    written: Vec<(SegmentId, Generation)>,
    /// Segments of volumes that went, which could not be read again.
    unsettled: BTreeMap<VolumeId, Vec<(SegmentId, Generation)>>,
    pub sessions: BTreeMap<usize, Session>,
    pub opening: BTreeMap<usize, Opening>,
    /// Detaches under way: the drain, once all requests are done.
    pub leaving: BTreeMap<usize, Option<JoinHandle<bool>>>,
    pub errands: Vec<Errand>,
    pub calls: Vec<Call>,
}

/// An attach under way.
pub struct Opening {
    task: JoinHandle<Result<Claimed, OpenError>>,
    read_only: bool,
    /// What was lost on the device is given up.
    gives_up: bool,
    /// What is opened, if not the volume.
    snapshot: Option<String>,
    /// The newest write that was durable when it began, and the size.
    durable: u64,
    grown: u64,
    /// How often it was rolled back before.
    rolled_back: u32,
}

/// What an attach came to.
#[derive(PartialEq, Eq, Debug)]
pub enum Attach {
    UnderWay,
    Serves,
    /// Of what kind, and in words.
    Refused(&'static str, String),
    /// The host died in its recovery.
    Died,
}

impl Host {
    pub fn new(index: usize, life: u64, seed: u64, dir: &Path, happened: &Faults) -> Self {
        let mut id = [0xc0; 16];
        id[0] = u8::try_from(index).unwrap();
        id[1..9].copy_from_slice(&life.to_le_bytes());
        let cache = CacheId::from_bytes(id);
        Self {
            name: format!("host-{index}"),
            cache,
            device: Arc::new(SimDevice::new(cache, seed, happened.clone())),
            journals: Journals::open(dir, cache).unwrap(),
            dir: dir.to_owned(),
            daemon: None,
            promises: BTreeMap::new(),
            described: Vec::new(),
            index: Vec::new(),
            was_flipped: false,
        }
    }

    /// Starts the daemon.
    pub fn start(&mut self, bucket: &Arc<SimBucket>, seed: u64, plan: &Plan) {
        assert!(self.daemon.is_none());
        self.journals = Journals::open(&self.dir, self.cache).unwrap();
        let mut scan = scan(&*self.device).unwrap();
        scan.add_journals(&self.journals).unwrap();
        let dirty: Vec<_> = scan
            .volumes
            .values()
            .flat_map(|v| v.segments.iter().map(|s| (s.segment, s.generation)))
            .collect();
        let geometry = self.device.geometry();
        let described = std::mem::take(&mut self.described);
        let table = IndexTable::of_this_process(geometry.segments).unwrap();
        let newest = described.iter().map(|(_, generation)| generation.next());
        let newest = newest.max().unwrap_or_default();
        let mut cache = Cache::new(
            self.cache,
            geometry,
            DIRTY_MAX,
            scan.next_generation.max(newest),
            &dirty,
        );
        cache.describe_in(table);
        take_up(&mut cache, &described, &self.index);
        let failure = self.device.open();
        failure.then({
            let journals = self.journals.clone();
            move |_| journals.void()
        });
        let bucket = Arc::clone(bucket);
        let store = Arc::new(S3Store::over(bucket, "", "simulated".to_owned()));
        let mut settings = LaneSettings {
            seed: Some(seed),
            ..LaneSettings::default()
        };
        if plan.seed.is_multiple_of(NARROW_EACH) {
            (settings.requests_max, settings.foreground_min) = NARROW_LANE;
        }
        let lane = Lane::new(store, &settings);
        let common = Common {
            store: Arc::new(lane.clone()),
            background: Arc::new(lane.background()),
            device: Arc::clone(&self.device) as Arc<_>,
            direct: Arc::new(LazyLock::new(Box::new(|| Err("not simulated".to_owned())))),
            kept_writes: Arc::new(KeptWrites::new(
                geometry,
                KEPT_WRITE_BYTES,
                // No clock but the simulation's own.
                Duration::ZERO,
            )),
            fetches: Fetches::new(FRAMES_BYTES),
            share: plain_share(),
            group: 0,
            buffers: Buffers::default(),
            uploads: Gate::new(UPLOADS_MAX),
            compactions: Gate::with_time(COMPACTIONS_MAX, COMPACTION_TIME_MAX),
            reclaim: ReclaimSettings {
                horizon: HORIZON,
                debt_min: 0,
                chunk_sectors: plan.chunk_sectors_max,
                window_bytes: 256 << 10,
                percent: 50,
            },
            orphan_interval: ORPHAN_INTERVAL,
            now_ms: || 0,
            runtime: tokio::runtime::Handle::current(),
            tracer: None,
        };
        self.daemon = Some(Daemon {
            tuning: Tuning {
                writeback_delay_ms: plan.writeback_delay_ms,
                chunk_sectors_max: plan.chunk_sectors_max,
                checkpoint_entries: plan.checkpoint_entries,
                ..TUNING
            },
            lane,
            common,
            shared: Shared {
                cache,
                nodes: NodeCache::new(16 << 10),
                // Fewer frames than are read ahead at once.
                kept: KeptFrames::new(6 * (16 << 10)),
            },
            failure,
            kept: scan.volumes,
            index: std::mem::take(&mut self.index),
            written: Vec::new(),
            unsettled: BTreeMap::new(),
            sessions: BTreeMap::new(),
            opening: BTreeMap::new(),
            leaving: BTreeMap::new(),
            errands: Vec::new(),
            calls: Vec::new(),
        });
    }

    /// The daemon ends, and perhaps the host with it.
    pub fn crash(&mut self, end: End, truths: &[Truth], rng: &mut SmallRng) {
        let Some(daemon) = self.daemon.take() else {
            return;
        };
        daemon.lane.stop();
        // Chunks that a task of the dead makes yet reach no store; but the device may not be what it was.
        daemon.common.kept_writes.forget(once(0..u64::MAX));
        for opening in daemon.opening.into_values() {
            opening.task.abort();
        }
        for drained in daemon.leaving.into_values().flatten() {
            drained.abort();
        }
        for errand in daemon.errands {
            errand.abort();
        }
        for call in daemon.calls {
            call.task.abort();
        }
        let in_doubt = daemon.failure.get().is_err();
        if in_doubt {
            for promise in self.promises.values_mut() {
                promise.in_doubt = true;
            }
        }
        for (n, session) in daemon.sessions {
            if !session.read_only {
                let promise = Promise {
                    epoch: session.epoch,
                    acked: session.acked,
                    flushed: session.flushed,
                    in_doubt,
                };
                self.promises.insert(truths[n].id, promise);
            }
            session.bury(end == End::Killed, &self.device, rng);
        }
        match end {
            End::Killed => {
                self.described = daemon.shared.cache.all_described();
                self.index = daemon.index;
                self.device.restart();
            }
            End::PowerCut => {
                self.device.power_cut();
                self.lose_journals();
                for promise in self.promises.values_mut() {
                    promise.acked = promise.flushed;
                }
            }
        }
    }

    /// They lie in memory: those that were set aside, too.
    fn lose_journals(&self) {
        let found = fs::read_dir(&self.dir).unwrap().map(Result::unwrap);
        let is_ours = |name: OsString| name.to_string_lossy().starts_with(&self.cache.to_string());
        for folder in found.filter(|folder| is_ours(folder.file_name())) {
            fs::remove_dir_all(folder.path()).unwrap();
        }
    }

    /// Whether it has acknowledged writes of a volume that it does not serve now.
    pub fn owes(&self, volume: VolumeId) -> bool {
        self.promises.contains_key(&volume)
    }

    /// Whether the end of its daemon ends the service of volume `n`, or it is the one that can recover it
    /// best.
    pub fn matters_to(&self, n: usize, volume: VolumeId) -> bool {
        let serves = |daemon: &Daemon| {
            let session = daemon.sessions.get(&n).filter(|s| !s.read_only);
            daemon.opening.contains_key(&n) || session.is_some_and(|s| !s.is_fenced())
        };
        self.owes(volume) || self.daemon.as_ref().is_some_and(serves)
    }

    /// A record page is damaged: what it said of is lost, and what came after it.
    pub fn flip_a_record(&mut self) {
        if self.device.flip_a_record() {
            self.was_flipped = true;
            for promise in self.promises.values_mut() {
                (promise.acked, promise.flushed) = (0, 0);
            }
        }
    }

    pub fn has_no_uploads(&self) -> bool {
        let daemon = self.daemon.as_ref().unwrap();
        daemon.common.uploads.counts() == GateCounts::default()
    }

    /// What must hold when nothing is attached here and everything was sent.
    pub fn check_budgets(&mut self) {
        let daemon = self.daemon.as_mut().unwrap();
        let counts = daemon.shared.cache.counts();
        assert_eq!(counts.dirty, 0, "{}: segments stay dirty", self.name);
        assert_eq!(counts.free + counts.clean, counts.total);
        for group in 0..2 {
            let dirty = daemon.shared.cache.dirty_bytes_of_group(group);
            assert_eq!(dirty, 0, "{}: group {group} stays dirty", self.name);
        }
        // It may be over its budget by one batch until the next one comes.
        daemon.shared.nodes.of(0).insert_all(Vec::new());
        let nodes = daemon.shared.nodes.stats();
        assert!(nodes.bytes <= nodes.budget, "{}: {nodes:?}", self.name);
    }
}

impl Promise {
    /// Holds what came back with a cache against what was promised.
    fn keeps(&self, upto: u64, since: Epoch, gives_up: bool, truth: &Truth) {
        let owed = match gives_up && self.in_doubt {
            true => self.flushed,
            false => self.acked,
        };
        // Before `since` the volume has gone on elsewhere.
        assert!(
            Epoch::new(self.epoch) < since || upto >= owed,
            "volume {}: {self:?}, and it came back with writes up to {upto}",
            truth.index
        );
    }
}

/// The world's part of a step.
pub struct Outer<'a> {
    pub truth: &'a mut Truth,
    pub rng: &'a mut SmallRng,
    pub digest: &'a mut Digest,
    pub now_ms: u64,
    pub io_ms_max: u64,
    pub direct: Option<f64>,
    pub damage: bool,
    pub bucket: &'a SimBucket,
    pub outcome: &'a mut Outcome,
    pub fuse: &'a mut Option<u32>,
}

impl Daemon {
    /// Whether its cache holds what a volume left behind.
    pub fn keeps(&self, truth: &Truth) -> bool {
        self.kept.contains_key(&truth.id) || self.unsettled.contains_key(&truth.id)
    }

    /// Whether segments cannot be read of volumes that went.
    pub fn is_unsettled(&self) -> bool {
        !self.unsettled.is_empty()
    }

    /// Its cache, for people.
    pub fn cache(&self) -> String {
        let cache = &self.shared.cache;
        let kept: Vec<_> = self.kept.values().map(|k| k.segments.len()).collect();
        format!(
            "{:?}, a line: {}, kept: {kept:?}",
            cache.counts(),
            cache.has_line()
        )
    }

    /// Whether a sync of its device failed: then only a restart helps.
    pub fn is_failed(&self) -> bool {
        self.failure.get().is_err()
    }

    /// Lets one of its sessions do something.
    pub fn drive<T>(
        &mut self,
        n: usize,
        device: &SimDevice,
        outer: &mut Outer<'_>,
        step: impl FnOnce(&mut Session, &mut Cx<'_>) -> Result<T, Died>,
    ) -> Result<T, Died> {
        self.describe(outer.now_ms);
        let mut session = self.sessions.remove(&n).unwrap();
        let mut cx = self.cx(device, outer);
        let done = step(&mut session, &mut cx);
        self.sessions.insert(n, session);
        done
    }

    /// What became clean is written to the index log, and some time later called true.
    fn describe(&mut self, now_ms: u64) {
        if !now_ms.is_multiple_of(DESCRIBED_EACH) {
            return;
        }
        let cache = &mut self.shared.cache;
        for (segment, generation) in self.written.drain(..) {
            cache.described(segment, generation);
        }
        let clean = cache.take_undescribed(DESCRIBED_RUNS);
        self.written = clean.iter().map(|c| (c.segment, c.generation)).collect();
        self.index.extend(clean);
    }

    fn with<T>(
        &mut self,
        device: &SimDevice,
        outer: &mut Outer<'_>,
        step: impl FnOnce(&mut Cx<'_>) -> Result<T, Died>,
    ) -> (Option<T>, bool) {
        let mut cx = self.cx(device, outer);
        match step(&mut cx) {
            Ok(value) => (Some(value), false),
            Err(Died) => (None, true),
        }
    }

    fn cx<'a>(&'a mut self, device: &'a SimDevice, outer: &'a mut Outer<'_>) -> Cx<'a> {
        Cx {
            shared: &mut self.shared,
            device,
            kept_writes: &self.common.kept_writes,
            failure: &self.failure,
            truth: outer.truth,
            rng: outer.rng,
            digest: outer.digest,
            now_ms: outer.now_ms,
            io_ms_max: outer.io_ms_max,
            direct: outer.direct,
            damage: outer.damage,
            bucket: outer.bucket,
            outcome: outer.outcome,
            fuse: outer.fuse,
        }
    }
}

/// Takes up what the index log says, the newest of each segment that is described.
fn take_up(cache: &mut Cache, described: &[(SegmentId, Generation)], index: &[CleanSegment]) {
    let is_true = |record: &&CleanSegment| described.contains(&(record.segment, record.generation));
    let newest: BTreeMap<_, _> = index
        .iter()
        .filter(is_true)
        .map(|record| (record.segment, record.clone()))
        .collect();
    let mut expected = Expected::default();
    for record in newest.values() {
        let of_segment = (record.group, record.generation);
        expected.segments.insert(record.segment, of_segment);
        for run in &record.runs {
            let of = (record.group, run.chunk.volume);
            let known = expected.newest.entry(of).or_default();
            *known = run.chunk.epoch.max(*known);
        }
    }
    cache.expect(expected);
    cache.take_up(newest.into_values().collect());
    cache.expect_no_more();
}

/// Whose part of the cache a tenant's volumes have.
fn group_of(tenant: &str) -> u32 {
    u32::from(tenant != "acme")
}
