//! The engine: tenants, volumes and attachments of one daemon.
//!
//! Owns: which volumes and snapshots are attached here and by what, and the order of the steps that
//! attach, detach, create, resize and delete one. The state of record is in the object store; this host keeps only
//! the list of what it had attached, so that the next start attaches it again.
//!
//! Invariants:
//! - One call at a time changes a given volume; calls on different volumes do not wait for each
//!   other.
//! - Looking never waits for changing: a volume that hangs hangs alone.

pub(crate) mod access;
mod activity;
mod attach;
mod cache_key;
mod chores;
mod costs;
mod data_dir;
mod direct;
mod doctor;
mod handover;
mod index;
pub mod kept;
mod keys;
mod memory;
mod owners;
mod quota;
mod rates;
mod registry;
mod release;
mod report;
mod rescue;
mod resize;
mod retain;
mod scrape;
mod shrink;
mod slot;
mod snapshot;
mod tenancy;
mod tenants;
mod trash;
mod verify;
mod wanted;
mod warm;

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};
use quarry_cache::{Cache, Journal, Journals, Recovered, Scan, device};
use quarry_objfmt::{
    CacheKey, Generation, Record, SegmentId, Suspended, TenantName, VolumeId, VolumeName,
};
use quarry_volume::map::NodeCache;
use quarry_volume::{KeptFrames, Shared, Tuning, Volume};

use self::access::Access as DeviceAccess;
pub use self::cache_key::{PreparedKey, prepare as prepare_cache_key};
use self::data_dir::DataDir;
use self::index::Index;
use self::owners::Owners;
use self::quota::Wish;
pub use self::release::Whose;
use self::slot::{Attached, Slot, Stage};
pub(crate) use self::tenants::read as tenant_record;
use self::tenants::{Site, Tenants};
pub use self::wanted::{How, StoreNote, Wanted};
use crate::backend::{self, Chore, Common, Fetches};
use crate::control::{
    Access, Activity, ApiError, ApiResult, AttachInfo, AttachOptions, CompactSpec, DetachInfo,
    DoctorReport, Engine, EvictInfo, ImageRef, Kind, MoveReport, Page, PurgeReport, PurgeSpec,
    RatesInfo, RatesSpec, RekeyInfo, RekeySpec, ReleaseInfo, ReleaseSpec, RescueReport, RescueSpec,
    ResizeInfo, ResizeSpec, RetainInfo, SnapRef, SnapshotInfo, StatusInfo, TenantInfo, TenantSpec,
    TrashInfo, TrashRef, VerifyProgress, VerifyReport, VerifySpec, VolumeInfo, VolumeList,
    VolumeRef, VolumeSpec, WarmReport, WarmSpec, place_of,
};
use crate::fair::{Gate, plain_share};
use crate::kept_writes::{KEPT_WRITE_AGE_MAX, KEPT_WRITE_BYTES_MAX, KeptWrites};
use crate::keys::KeyService;
use crate::latency::{Latencies, Timed};
use crate::metrics;
use crate::nbd::{Clients, Export, ExportDirectory, NbdServer};
use crate::qos::VolumeGate;
use crate::reactor::{
    Geometry, Machine, PageCache, Reactor, ReactorConfig, ReactorGone, ReactorHandle, Traced,
    VolumeKey,
};
use crate::store::direct::DirectLane;
use crate::store::{Lane, StoreSettings};
use crate::trace::export::Exporter;
use crate::ublk;

fn unusable_journals(config: &quarry_config::Config) -> String {
    format!(
        "the journals' folder {} cannot be used (set daemon.journal_dir to another)",
        config.daemon.journal_dir.display()
    )
}

/// Longest time that a control call waits for the store before it answers with the store's error.
const CONTROL_DEADLINE: Duration = Duration::from_secs(20);

/// The same where the question is whose a token is.
const TOKENS_DEADLINE: Duration = Duration::from_secs(5);

/// Entries of a reactor's registered buffer table: one for each tag of each ublk queue on it.
const BUFFER_ENTRIES: u16 = 16_384;

/// Share of the RAM budget that map nodes get; the rest is for fetched frames.
const NODE_SHARE: u64 = 2;

/// Share of it that what was read ahead gets, and that one sequential reader may be read ahead of: two at their usual window,
/// by default, or one whose store is far away.
const KEPT_SHARE: u64 = 8;

/// The part of `cache.ram` that large writes may have beside it until their chunk is made, as memory that chunks are made in is
/// beside it: less than `KEPT_WRITE_BYTES_MAX` where that is small.
const KEPT_WRITES_SHARE: u64 = 8;

/// Actions of a batch after which another reactor that waits for the lock gets it: some tenths of a millisecond.
const ACTIONS_AT_ONCE: usize = 1024;

/// A volume as the reactor drives it: the state machine, with the lock on what all volumes share.
pub struct VolumeMachine {
    volume: Volume,
    gate: Arc<VolumeGate>,
    shared: Arc<Mutex<Shared>>,
    /// None for a volume that takes no writes.
    journal: Option<Journal>,
    /// Bytes of requests that passed through the daemon's memory.
    copied_bytes: u64,
    /// Bytes of requests that the kernel moved between their pages and the cache device.
    in_place_bytes: u64,
    latencies: Latencies,
    /// What the volume asked for when it was made: carried out with the first event.
    first: Vec<quarry_volume::Action>,
    traced: Option<Traced>,
}

impl Machine for VolumeMachine {
    fn apply(&mut self, event: quarry_volume::Event, out: &mut Vec<quarry_volume::Action>) {
        out.append(&mut self.first);
        self.volume.apply(event, &mut self.shared.lock(), out);
    }

    fn apply_all(
        &mut self,
        now_ms: u64,
        events: &mut Vec<quarry_volume::Event>,
        out: &mut Vec<quarry_volume::Action>,
    ) {
        out.append(&mut self.first);
        self.volume.set_now(now_ms);
        let mut shared = self.shared.lock();
        let mut since = out.len();
        for event in events.drain(..) {
            if out.len() - since > ACTIONS_AT_ONCE {
                since = out.len();
                MutexGuard::bump(&mut shared);
            }
            self.volume.apply(event, &mut shared, out);
        }
    }

    fn journal(&mut self, segment: SegmentId, generation: Generation, record: &Record) {
        let journal = self.journal.as_mut();
        journal
            .expect("a volume that takes writes has a journal")
            .put(segment, generation, record);
    }

    fn copied(&mut self, bytes: u64) {
        self.copied_bytes += bytes;
    }

    fn moved_in_place(&mut self, bytes: u64) {
        self.in_place_bytes += bytes;
    }

    fn took(&mut self, what: Timed, ns: u64) {
        self.latencies.record(what, ns);
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.volume.size(),
            sector_size: self.volume.sector_size(),
            read_only: self.volume.read_only(),
        }
    }

    fn gate(&self) -> Option<Arc<VolumeGate>> {
        Some(Arc::clone(&self.gate))
    }

    fn traced(&self) -> Option<Traced> {
        self.traced.clone()
    }

    fn wants_tick(&self) -> bool {
        // What an attach began is submitted with the first event, whatever that is.
        !self.first.is_empty() || self.volume.wants_ticks()
    }
}

/// The engine of one daemon.
pub struct Daemon {
    config: quarry_config::Config,
    /// Held, not used: it keeps others out.
    _data_dir: DataDir,
    host: String,
    keys: KeyService,
    started_ms: u64,
    lane: Lane,
    /// The way to the daemon's own store, where the tenants' records are, for a control call.
    home: Lane,
    tenants: Tenants,
    common: Common,
    shared: Arc<Mutex<Shared>>,
    /// What is told of a cache that was made of another size than is configured.
    other_cache_size: Option<String>,
    /// The wrapped key of the cache's data, if they are encrypted.
    wrapped_cache_key: Option<CacheKey>,
    reactors: Mutex<Vec<Reactor>>,
    /// Whose the volumes are that are attached here.
    owners: Owners,
    /// What the cache kept from before the start, until its volume is attached.
    kept: Mutex<BTreeMap<VolumeId, Recovered>>,
    index: Index,
    /// The host's devices at the start, but for those taken over since, while what was attached is being attached again.
    left: Mutex<Option<Vec<ublk::Found>>>,
    /// Since when the devices that the last daemon left have been waiting.
    waiting_since: Option<handover::Since>,
    /// Segments with unsent writes of volumes that went, which could not be read again.
    unsettled: Mutex<BTreeMap<VolumeId, kept::Unsettled>>,
    journals: Journals,
    slots: Mutex<BTreeMap<ImageRef, Arc<Slot>>>,
    wanted: Wanted,
    ublk: ublk::Control,
    /// Why the daemon is not ready, if it is not.
    not_ready: Mutex<Option<String>>,
    /// Why nothing is to be kept in the store yet, or ever.
    unfit: Mutex<Option<ApiError>>,
    exports: Arc<Exports>,
    nbd_clients: Arc<Clients>,
    verifies: verify::Verifies,
    trash: trash::Trash,
    access: Arc<Access>,
    pace: Arc<warm::Pace>,
    warms: warm::Warms,
    /// Sends traces, if there is a collector, until the daemon ends.
    exporter: Mutex<Option<Exporter>>,
}

/// The volumes that can be had over NBD: those attached with it.
#[derive(Default)]
pub struct Exports(Mutex<BTreeMap<String, Export>>);

impl ExportDirectory for Exports {
    fn lookup(&self, name: &str) -> Option<Export> {
        self.0.lock().get(name).cloned()
    }

    fn list(&self) -> Vec<String> {
        self.0.lock().keys().cloned().collect()
    }
}

/// Compaction reads ahead in this part of the memory that is configured.
const WINDOWS_SHARE: u64 = 4;

/// And in no more than this.
const WINDOWS_BYTES_MAX: u64 = 128 << 20;

/// Sectors of data in a chunk.
fn chunk_sectors(config: &quarry_config::Config) -> u32 {
    let chunk = config.writeback.chunk_size.bytes() / u64::from(quarry_objfmt::SECTOR_SIZE);
    u32::try_from(chunk).unwrap_or(u32::MAX)
}

/// Now, in milliseconds of Unix time: recorded for people, decided upon by nobody.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl Daemon {
    /// Whether [`Daemon::start`] will find what it needs of the host, as far as that can be told while another daemon runs.
    /// `is_given_up` knows what is in use by one that is to end before.
    ///
    /// # Errors
    /// With what is missing, and what to do.
    pub fn may_start(
        config: &quarry_config::Config,
        is_given_up: &dyn Fn(&Metadata) -> bool,
    ) -> anyhow::Result<()> {
        let data_dir = &config.daemon.data_dir;
        DataDir::check(data_dir, is_given_up)?;
        Access::without_tokens(&config.access, data_dir)?;
        Wanted::load(data_dir)?;
        let journals = Journals::make_root(&config.daemon.journal_dir);
        journals.with_context(|| unusable_journals(config))?;
        let size = config.cache.size.map(quarry_config::Size::bytes);
        device::check(&config.cache_path(), size, is_given_up)?;
        Ok(())
    }

    /// Opens the cache device, with what [`prepare_cache_key`] gave, recovers what it holds, and starts the reactors.
    ///
    /// # Errors
    /// If the cache device, an io_uring or the data folder cannot be had.
    pub fn start(
        config: quarry_config::Config,
        lane: Lane,
        cache_key: Option<PreparedKey>,
    ) -> anyhow::Result<Arc<Self>> {
        let data_dir = DataDir::take(&config.daemon.data_dir)?;
        let host = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        let path = config.cache_path();
        let device = Arc::new(cache_key::open(&config, cache_key, &host)?);
        let other_cache_size = cache_key::other_size(&config, &device);
        let wrapped_cache_key = device.key().cloned();
        let journal_dir = &config.daemon.journal_dir;
        let journals =
            Journals::open(journal_dir, device.id()).with_context(|| unusable_journals(&config))?;
        // On a device formatted just now there is nothing to find.
        let mut scan = if device.fresh() {
            Scan::default()
        } else {
            quarry_cache::scan(&*device).with_context(|| {
                format!(
                    "the cache {} cannot be read, and what it keeps is not known: mend the device, or copy what can be read of it to a sound one",
                    path.display()
                )
            })?
        };
        scan.add_journals(&journals)?;
        let begun = index::begin(&config, &device, &journals);
        let synced = device.failure().get();
        if synced.is_err() {
            // What they name may be what the device has just lost, and the next daemon is not told of that.
            journals.void();
        }
        let begun = synced.map_err(std::io::Error::from_raw_os_error).and(begun);
        let (described, index) =
            begun.with_context(|| format!("the cache {} cannot be written", path.display()))?;
        let geometry = device.geometry();
        let total = u64::from(geometry.segments) * u64::from(geometry.segment_size);
        let dirty_max = config.cache.dirty_max.of(total) / u64::from(geometry.segment_size);
        let dirty: Vec<_> = scan
            .volumes
            .values()
            .flat_map(|v| v.segments.iter().map(|s| (s.segment, s.generation)))
            .collect();
        let newest = index.newest();
        let mut cache = Cache::new(
            device.id(),
            geometry,
            u32::try_from(dirty_max).unwrap_or(u32::MAX),
            unguessed(scan.next_generation.max(newest.next())),
            &dirty,
        );
        if let Some(described) = described {
            cache.describe_in(described);
        }
        let ram = config.cache.ram.bytes();
        let mut nodes = NodeCache::new(usize::try_from(ram / NODE_SHARE)?);
        nodes.set_beside(memory::beside(ram));
        let kept = KeptFrames::new(usize::try_from(ram / KEPT_SHARE)?);
        let shared = Arc::new(Mutex::new(Shared { cache, nodes, kept }));
        // What the journals name may be what the device lost.
        device.failure().then({
            let (journals, shared) = (journals.clone(), Arc::clone(&shared));
            move |errno| {
                journals.void();
                shared.lock().cache.put_in_doubt(errno);
            }
        });
        let kept_writes = usize::try_from(ram / KEPT_WRITES_SHARE)?.min(KEPT_WRITE_BYTES_MAX);
        let kept_writes = Arc::new(KeptWrites::new(geometry, kept_writes, KEPT_WRITE_AGE_MAX));
        let threads = config.reactor.threads.max(1);
        let reactors = (0..threads as usize)
            .map(|index| {
                Reactor::spawn(ReactorConfig {
                    index,
                    cache: Arc::new(device.reopen()?),
                    page_cache: match config.cache.page_cache {
                        true => device.reopen_buffered()?.map(|file| PageCache {
                            file: Arc::new(file),
                            geometry,
                        }),
                        false => None,
                    },
                    kept_writes: Arc::clone(&kept_writes),
                    sync_failure: device.failure().clone(),
                    cipher: device.cipher().cloned(),
                    buffer_entries: BUFFER_ENTRIES,
                })
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        let ublk = ublk::Control::new(PathBuf::from(ublk::LINK_ROOT))
            .no_better_than(config.ublk.mode.into());
        let ublk = match device.cipher() {
            Some(_) => ublk.always_copied(),
            None => ublk,
        };
        ublk.sweep();
        let tracing = Exporter::start(&config.tracing, &host)?;
        let (tracer, exporter) = tracing.unzip();
        let (settings, for_direct) = (StoreSettings::from(&config.store), lane.clone());
        let open = move || DirectLane::open(&settings, for_direct).map_err(|why| why.to_string());
        let common = Common {
            store: Arc::new(lane.clone()),
            background: Arc::new(lane.background()),
            direct: Arc::new(LazyLock::new(Box::new(open))),
            device,
            kept_writes,
            fetches: Fetches::new(ram - ram / NODE_SHARE - ram / KEPT_SHARE),
            share: plain_share(),
            group: 0,
            buffers: backend::Buffers::kept(tokio::runtime::Handle::current()),
            uploads: Gate::new(backend::UPLOADS_MAX),
            compactions: Gate::with_time(backend::COMPACTIONS_MAX, backend::COMPACTION_TIME_MAX),
            reclaim: backend::ReclaimSettings {
                horizon: config.reclaim.horizon,
                debt_min: config.reclaim.debt_min.bytes(),
                chunk_sectors: chunk_sectors(&config),
                window_bytes: (config.cache.ram.bytes() / WINDOWS_SHARE).min(WINDOWS_BYTES_MAX),
                percent: config.reclaim.percent.into(),
            },
            orphan_interval: config.reclaim.orphan_interval,
            now_ms,
            runtime: tokio::runtime::Handle::current(),
            tracer,
        };
        let tokens = Arc::new(lane.with_deadline(TOKENS_DEADLINE));
        let access = Access::new(&config.access, tokens, &config.daemon.data_dir)?;
        Ok(Arc::new(Self {
            host,
            keys: KeyService::new(&config.keys),
            started_ms: now_ms(),
            home: lane.with_deadline(CONTROL_DEADLINE),
            tenants: Tenants::new(Site::looked_at((&config.store).into(), lane.clone())),
            lane,
            common,
            shared,
            other_cache_size,
            wrapped_cache_key,
            reactors: Mutex::new(reactors),
            owners: Owners::default(),
            kept: Mutex::new(scan.volumes),
            index,
            left: Mutex::default(),
            waiting_since: handover::take(&config.daemon.data_dir),
            unsettled: Mutex::default(),
            journals,
            slots: Mutex::default(),
            wanted: Wanted::load(&config.daemon.data_dir)?,
            ublk,
            not_ready: Mutex::new(Some("it has just started".to_owned())),
            unfit: Mutex::default(),
            exports: Arc::default(),
            nbd_clients: Arc::default(),
            verifies: verify::Verifies::default(),
            trash: trash::Trash::default(),
            access: Arc::new(access),
            pace: Arc::new(warm::Pace::new(config.cache.warm_rate.bytes())),
            warms: warm::Warms::default(),
            exporter: Mutex::new(exporter),
            config,
            _data_dir: data_dir,
        }))
    }

    fn slot(&self, volume: &ImageRef) -> Arc<Slot> {
        Arc::clone(self.slots.lock().entry(volume.clone()).or_default())
    }

    /// An image as it is attached here.
    fn attached_here(&self, image: &ImageRef) -> ApiResult<Arc<Attached>> {
        let slot = self.slots.lock().get(image).cloned().unwrap_or_default();
        match slot.stage() {
            Stage::Attached(attached) => Ok(attached),
            _ => Err(not_attached(image)),
        }
    }

    /// Forgets a slot in which nothing happens any more; the caller holds `slot`.
    fn forget_idle(&self, volume: &ImageRef, slot: &Arc<Slot>) {
        let mut slots = self.slots.lock();
        // One in the table, one the caller's.
        if slot.is_detached() && Arc::strong_count(slot) == 2 {
            slots.remove(volume);
        }
    }

    fn tuning(&self) -> Tuning {
        let (writeback, usual) = (&self.config.writeback, Tuning::default());
        let ram_sectors = self.config.cache.ram.bytes() / 512;
        Tuning {
            writeback_delay_ms: u64::try_from(writeback.delay.as_millis()).unwrap_or(u64::MAX),
            chunk_sectors_max: chunk_sectors(&self.config),
            uploads_max: writeback.uploads_max as usize,
            readahead_sectors_max: usual.readahead_sectors_max.min(ram_sectors / KEPT_SHARE),
            ..usual
        }
    }

    /// The reactor with the least to do, and a name for a volume on it.
    fn place(&self) -> Result<(ReactorHandle, VolumeKey), ReactorGone> {
        let reactors = self.reactors.lock();
        let idlest = reactors.iter().min_by_key(|r| r.stats().load());
        let handle = idlest.ok_or(ReactorGone)?.handle();
        // Under the lock: the next one sees that this volume is there.
        let key = handle.new_key();
        Ok((handle, key))
    }

    /// A server of what can be had over NBD.
    pub fn nbd_server(&self) -> NbdServer {
        let directory: Arc<dyn ExportDirectory> = Arc::clone(&self.exports) as _;
        NbdServer::new(directory, Arc::clone(&self.nbd_clients))
    }

    /// How callers of the control API are told.
    pub fn access(&self) -> Arc<Access> {
        Arc::clone(&self.access)
    }

    /// The volumes that are to be attached here.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// Whether it is attached here now.
    pub fn is_attached(&self, image: &ImageRef) -> bool {
        let slot = self.slots.lock().get(image).cloned();
        slot.is_some_and(|slot| slot.stage().attached().is_some())
    }

    /// Says whether the daemon is ready, and if not, why.
    pub fn set_ready(&self, ready: Result<(), String>) {
        *self.not_ready.lock() = ready.err();
    }

    /// Says whether the store was found fit to keep something in it, and if not, why.
    pub fn set_fit(&self, fit: Result<(), ApiError>) {
        *self.unfit.lock() = fit.err();
    }

    fn fit(&self) -> ApiResult<()> {
        self.unfit.lock().clone().map_or(Ok(()), Err)
    }

    fn readiness(&self) -> Result<(), String> {
        if let Some(unfit) = &*self.unfit.lock() {
            return Err(unfit.message.clone());
        }
        self.not_ready.lock().clone().map_or(Ok(()), Err)
    }

    /// Uploads everything of all volumes and folds it into their maps; they stay attached.
    pub async fn drain_all(&self) {
        let slots: Vec<Arc<Slot>> = self.slots.lock().values().cloned().collect();
        let drains = slots.iter().filter_map(|slot| match slot.stage() {
            Stage::Attached(attached) if !attached.read_only => Some(attached),
            _ => None,
        });
        // All at once: one that cannot be drained holds up no other.
        let drains = drains.map(|attached| async move { attached.backend.drain(true).await });
        futures::future::join_all(drains).await;
    }

    /// Answers when every reactor has, and what the control plane needs is not locked for ever; with a line on how the
    /// daemon does. Asks no store.
    ///
    /// # Errors
    /// If a reactor has come to an end.
    pub async fn pulse(&self) -> Result<String, ReactorGone> {
        let handles: Vec<_> = self.reactors.lock().iter().map(Reactor::handle).collect();
        if handles.is_empty() {
            return Err(ReactorGone);
        }
        for handle in handles {
            handle.answer().await?;
        }
        drop(self.shared.lock());
        let slots: Vec<Arc<Slot>> = self.slots.lock().values().cloned().collect();
        let attached = slots
            .iter()
            .filter(|slot| slot.stage().attached().is_some());
        let attached = match attached.count() {
            1 => "1 volume attached".to_owned(),
            count => format!("{count} volumes attached"),
        };
        Ok(match self.readiness() {
            Ok(()) => attached,
            // One line, whatever the store said.
            Err(why) => format!("{attached}; not ready: {}", why.replace('\n', " ")),
        })
    }

    /// Ends the ways to all stores, as [`Lane::stop`].
    pub fn stop_asking(&self) {
        self.lane.stop();
        self.tenants.stop();
    }

    /// Ends the reactors. Requests under way are answered; what comes later is not taken.
    pub async fn stop(self: &Arc<Self>) {
        // Before somebody waits for it.
        self.index.end();
        let reactors = std::mem::take(&mut *self.reactors.lock());
        handover::leave(&self.config.daemon.data_dir);
        let join = move || Reactor::shutdown_all(reactors);
        if let Err(error) = tokio::task::spawn_blocking(join).await {
            tracing::error!(%error, "a reactor did not end well");
        }
        let daemon = Arc::clone(self);
        if let Err(error) = tokio::task::spawn_blocking(move || daemon.end_index()).await {
            tracing::error!(%error, "the index log did not end well");
        }
        let exporter = self.exporter.lock().take();
        if let Some(exporter) = exporter {
            exporter.end().await;
        }
    }
}

#[async_trait]
impl Engine for Daemon {
    async fn create_tenant(&self, spec: TenantSpec) -> ApiResult<TenantInfo> {
        self.fit()?;
        // Of one of that name which is gone, should a crash have left any.
        let tokens = self.access.tokens()?;
        match tenants::read(&self.home, &spec.name).await {
            Err(error) if error.kind == Kind::NotFound => tokens.forget(&spec.name).await?,
            // Its record is made anew, it is the same, and keeps its tokens, whoever's record it is that is there then.
            Err(error) if error.kind == Kind::Damaged => {
                tokens.hand_on(&spec.name).await?;
            }
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        self.create_one_tenant(spec).await
    }

    async fn list_tenants(&self) -> ApiResult<Vec<TenantInfo>> {
        self.all_tenants().await
    }

    async fn show_tenant(&self, tenant: &TenantName) -> ApiResult<TenantInfo> {
        self.show_one_tenant(tenant).await
    }

    async fn update_tenant(
        &self,
        tenant: &TenantName,
        patch: &serde_json::Map<String, serde_json::Value>,
    ) -> ApiResult<TenantInfo> {
        self.fit()?;
        self.update_one_tenant(tenant, patch).await
    }

    async fn suspend_tenant(
        &self,
        tenant: &TenantName,
        how: Option<Suspended>,
    ) -> ApiResult<TenantInfo> {
        self.suspend_one_tenant(tenant, how).await
    }

    async fn delete_tenant(&self, tenant: &TenantName, purge: bool) -> ApiResult<()> {
        self.delete_tenant_and_trash(tenant, purge).await?;
        // *Crash in between: they let nobody do anything, and are deleted when there is such a tenant again.*
        self.access.tokens()?.forget(tenant).await
    }

    async fn create_volume(&self, spec: VolumeSpec) -> ApiResult<VolumeInfo> {
        self.fit()?;
        let tenant = self.tenant(&spec.tenant).await?;
        let volume = VolumeId::from(uuid::Uuid::new_v4());
        let keys = self.keys_for(&tenant, &spec, volume).await?;
        let copy = (!keys.keys.is_empty()).then_some(keys.revision);
        // What is there already was asked for before: that it is, is to be said, and not that there is no room for another.
        registry::check_free(&tenant.control(), &spec.volume()).await?;
        let wish = Wish::sized(&spec.volume(), spec.size_bytes);
        let admission = self.admit(&tenant, &wish).await?;
        let made = registry::create_volume(&tenant.control(), &spec, volume, keys).await;
        self.settle(admission).await;
        made?;
        // Whoever deletes the tenant looks for volumes once more after that: of the two one sees the other.
        let (store, name) = (tenant.control(), spec.volume());
        let there = self.is_still_there(&tenant).await;
        // It is gone, or may be. Who has attached the volume since, and may have written to it, keeps it.
        let stays = matches!(there, Ok(true))
            || !registry::unmake_unused(&store, &name, volume, copy).await?;
        match there {
            Err(error) => Err(error),
            // Also if whoever deleted the tenant found the volume, and put the tenant back.
            Ok(_) if stays => self.show_volume(&name.into()).await,
            Ok(_) => Err(ApiError::no_tenant(&spec.tenant)),
        }
    }

    async fn list_volumes(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<VolumeInfo>> {
        let volumes = self.and_attached(self.volumes(tenant).await?, tenant);
        let volumes = volumes.into_iter().map(Into::into);
        let images = volumes.chain(self.past_images(tenant)).collect();
        self.show_all(images, tenant.is_some()).await
    }

    async fn page_of_volumes(
        &self,
        tenant: Option<&TenantName>,
        page: &Page,
    ) -> ApiResult<VolumeList> {
        let (volumes, incomplete) = self.volumes_or_here(tenant).await?;
        let volumes = self.and_attached(volumes, tenant);
        let mut all: Vec<ImageRef> = volumes.into_iter().map(Into::into).collect();
        all.append(&mut self.past_images(tenant));
        // Only what is on the page is looked at, which costs a read each.
        let (images, next) = page.cut(all, |image| place_of(&image.to_string()));
        Ok(VolumeList {
            volumes: self.show_all(images, tenant.is_some()).await?,
            next,
            incomplete,
        })
    }

    async fn show_volume(&self, image: &ImageRef) -> ApiResult<VolumeInfo> {
        self.show(image).await
    }

    async fn attach(&self, image: &ImageRef, options: AttachOptions) -> ApiResult<AttachInfo> {
        self.fit()?;
        let access = DeviceAccess::resolve(&options).await?;
        self.attach_volume(image, &options, access).await
    }

    async fn detach(&self, image: &ImageRef) -> ApiResult<DetachInfo> {
        self.detach_volume(image).await
    }

    async fn resize(&self, volume: &VolumeRef, spec: ResizeSpec) -> ApiResult<ResizeInfo> {
        self.fit()?;
        self.resize_volume(volume, spec).await
    }

    async fn retain(&self, volume: &VolumeRef, retain_ms: u64) -> ApiResult<RetainInfo> {
        self.fit()?;
        self.retain_volume(volume, retain_ms).await
    }

    async fn set_rates(&self, volume: &VolumeRef, rates: RatesSpec) -> ApiResult<RatesInfo> {
        self.fit()?;
        self.set_volume_rates(volume, rates).await
    }

    async fn rekey(&self, volume: &VolumeRef, spec: &RekeySpec) -> ApiResult<RekeyInfo> {
        self.fit()?;
        self.rekey_volume(volume, spec).await
    }

    async fn release(&self, volume: &VolumeRef, spec: ReleaseSpec) -> ApiResult<ReleaseInfo> {
        self.release_volume(volume, spec.from).await
    }

    async fn sync(&self, volume: &VolumeRef) -> ApiResult<()> {
        let image = ImageRef::from(volume.clone());
        let attached = self.attached_here(&image)?;
        let backend = &attached.backend;
        if attached.read_only {
            // What was written elsewhere is not known here.
            let head = registry::head(&attached.tenant.control(), volume).await;
            let owner = head.ok().filter(|head| head.deleted().is_none());
            let owner = owner.and_then(|head| head.owner);
            let there = owner.map_or_else(
                || "on the host that writes to it".to_owned(),
                |owner| format!("on the host that writes to it, {}", owner.shown_host()),
            );
            return Err(ApiError::new(
                Kind::Conflict,
                format!("{volume} is attached here for reading only"),
                format!("sync it {there}"),
            ));
        }
        if backend.drain(false).await {
            return Ok(());
        }
        let problem = backend.condition().problem.unwrap_or_default();
        let message = format!("{volume} cannot be synced: {problem}");
        Err(ApiError::new(
            Kind::Conflict,
            message,
            "see `quarry volume show`",
        ))
    }

    async fn verify(&self, image: &ImageRef, spec: VerifySpec) -> ApiResult<VerifyReport> {
        self.verify_image(image, spec).await
    }

    async fn verify_progress(&self, image: &ImageRef) -> ApiResult<VerifyProgress> {
        self.verifies.progress(image)
    }

    async fn create_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        self.fit()?;
        self.snapshot_volume(snapshot).await
    }

    async fn list_snapshots(&self, volume: Option<&VolumeRef>) -> ApiResult<Vec<SnapshotInfo>> {
        self.snapshots(volume).await
    }

    async fn show_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        self.show_one_snapshot(snapshot).await
    }

    async fn delete_snapshot(&self, snapshot: &SnapRef) -> ApiResult<()> {
        self.unname_snapshot(snapshot).await
    }

    async fn clone_snapshot(&self, snapshot: &SnapRef, name: &VolumeName) -> ApiResult<VolumeInfo> {
        self.fit()?;
        let volume = self.volume_of_snapshot(snapshot, name).await?;
        self.show_volume(&volume.into()).await
    }

    async fn rollback(&self, snapshot: &SnapRef) -> ApiResult<VolumeInfo> {
        self.fit()?;
        self.roll_volume_back(snapshot).await?;
        self.show_volume(&snapshot.volume.clone().into()).await
    }

    async fn rescue(&self, volume: &VolumeRef, spec: RescueSpec) -> ApiResult<RescueReport> {
        self.fit()?;
        self.rescue_volume(volume, &spec).await
    }

    async fn delete_volume(
        &self,
        volume: &VolumeRef,
        discard_unsent: bool,
    ) -> ApiResult<TrashInfo> {
        self.delete_to_trash(volume, discard_unsent).await
    }

    async fn warm(&self, volume: &VolumeRef, spec: &WarmSpec) -> ApiResult<WarmReport> {
        self.warm_volume(volume, spec).await
    }

    async fn compact(&self, volume: &VolumeRef, spec: &CompactSpec) -> ApiResult<MoveReport> {
        let held = spec.held;
        self.do_chore(volume, Chore::Compact { held }).await
    }

    async fn flatten(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        self.do_chore(volume, Chore::Flatten).await
    }

    async fn move_progress(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        self.chore_progress(volume)
    }

    async fn warm_progress(&self, volume: &VolumeRef) -> ApiResult<WarmReport> {
        self.warms.progress(volume)
    }

    async fn evict(&self, volume: &VolumeRef) -> ApiResult<EvictInfo> {
        self.evict_volume(volume).await
    }

    async fn list_trash(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<TrashInfo>> {
        self.show_trash(tenant).await
    }

    async fn restore(&self, which: &TrashRef, name: Option<&VolumeName>) -> ApiResult<VolumeInfo> {
        self.fit()?;
        self.restore_volume(which, name).await
    }

    async fn purge_trash(&self, spec: &PurgeSpec) -> ApiResult<PurgeReport> {
        self.purge_now(spec).await
    }

    async fn doctor(&self) -> ApiResult<DoctorReport> {
        let checks = self.examine().await;
        Ok(DoctorReport { checks })
    }

    async fn status(&self) -> ApiResult<StatusInfo> {
        Ok(self.tell_status().await)
    }

    async fn activity(&self, tenant: Option<&TenantName>) -> ApiResult<Activity> {
        Ok(self.tell_activity(tenant).await)
    }

    async fn ready(&self) -> Result<(), String> {
        self.readiness()
    }

    async fn metrics_text(&self) -> String {
        metrics::render(&self.snapshot().await)
    }
}

/// A generation behind `next`, by a number that nobody knows: recovery believes a record page by its generation, among
/// other things, and a volume's users can write what looks like a page to where one may lie.
fn unguessed(next: Generation) -> Generation {
    let (_, random) = uuid::Uuid::new_v4().as_u64_pair();
    Generation::new(next.get() + (random & u64::from(u32::MAX)))
}

fn not_attached(volume: &ImageRef) -> ApiError {
    let message = format!("{volume} is not attached to this host");
    let remedy = format!("attach it with `quarry volume attach {volume}`");
    ApiError::new(Kind::Conflict, message, remedy)
}
