//! The engine: tenants, volumes and attachments of one daemon.
//!
//! Owns: which volumes are attached here and by what, and the order of the steps that attach,
//! detach, create and delete one. The state of record is in the object store; this host keeps only
//! the list of what it had attached, so that the next start attaches it again.
//!
//! Invariants:
//! - One call at a time changes a given volume; calls on different volumes do not wait for each
//!   other.
//! - A volume leaves the list only when it was detached for good.

mod attach;
mod registry;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use parking_lot::Mutex;
use quarry_cache::{Cache, CacheDevice, Recovered};
use quarry_objfmt::{TenantName, VolumeId};
use quarry_volume::map::NodeCache;
use quarry_volume::{Shared, Tuning, Volume};

use crate::backend::{self, Common, VolumeBackend, frame_cache};
use crate::control::{
    ApiError, ApiResult, AttachInfo, AttachOptions, CacheStatus, Engine, Kind, StatusInfo,
    StoreStatus, TenantInfo, VolumeInfo, VolumeRef, VolumeSpec,
};
use crate::metrics;
use crate::nbd::{Export, ExportDirectory};
use crate::reactor::{Geometry, Machine, Reactor, ReactorConfig};
use crate::store::{Lane, StoreState};
use crate::ublk;

/// Longest time that a control call waits for the store before it answers with the store's error.
const CONTROL_DEADLINE: Duration = Duration::from_secs(20);

/// Entries of a reactor's registered buffer table: one for each tag of each ublk queue on it.
const BUFFER_ENTRIES: u16 = 16_384;

/// Share of the RAM budget that map nodes get; the rest is for fetched frames.
const NODE_SHARE: u64 = 2;

/// A volume as the reactor drives it: the state machine, with the lock on what all volumes share.
pub struct VolumeMachine {
    volume: Volume,
    shared: Arc<Mutex<Shared>>,
    /// What the volume asked for when it was made: carried out with the first event.
    first: Vec<quarry_volume::Action>,
}

impl Machine for VolumeMachine {
    fn apply(&mut self, event: quarry_volume::Event, out: &mut Vec<quarry_volume::Action>) {
        out.append(&mut self.first);
        self.volume.apply(event, &mut self.shared.lock(), out);
    }

    fn apply_all(
        &mut self,
        events: &mut Vec<quarry_volume::Event>,
        out: &mut Vec<quarry_volume::Action>,
    ) {
        out.append(&mut self.first);
        let mut shared = self.shared.lock();
        for event in events.drain(..) {
            self.volume.apply(event, &mut shared, out);
        }
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.volume.size(),
            sector_size: self.volume.sector_size(),
            read_only: self.volume.read_only(),
        }
    }

    fn wants_tick(&self) -> bool {
        self.volume.wants_ticks()
    }
}

/// A volume attached here.
struct Attached {
    backend: Arc<VolumeBackend>,
    info: AttachInfo,
    mode: String,
    since_ms: u64,
    device: Option<(u32, ublk::DeviceSpec)>,
}

/// What a slot of the table holds: the lock on it is held for as long as a call changes the volume.
type Slot = Arc<tokio::sync::Mutex<Option<Attached>>>;

/// The engine of one daemon.
pub struct Daemon {
    config: quarry_config::Config,
    host: String,
    started_ms: u64,
    lane: Lane,
    control: Lane,
    store_url: String,
    common: Common,
    shared: Arc<Mutex<Shared>>,
    reactors: Mutex<Vec<Reactor>>,
    next_reactor: AtomicUsize,
    /// What the cache kept from before the start, until its volume is attached.
    kept: Mutex<BTreeMap<VolumeId, Recovered>>,
    slots: Mutex<BTreeMap<VolumeRef, Slot>>,
    ublk: ublk::Control,
    metrics: metrics::Metrics,
    ready: std::sync::atomic::AtomicBool,
    exports: Arc<Exports>,
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

/// Now, in milliseconds of Unix time: recorded for people, decided upon by nobody.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl Daemon {
    /// Opens the cache device, recovers what it holds, and starts the reactors.
    ///
    /// # Errors
    /// If the cache device, an io_uring or the data folder cannot be had.
    pub fn start(
        config: quarry_config::Config,
        lane: Lane,
        store_url: String,
    ) -> anyhow::Result<Arc<Self>> {
        std::fs::create_dir_all(&config.daemon.data_dir)?;
        let host = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        let path = config.cache_path();
        let size = config
            .cache
            .size
            .unwrap_or(quarry_config::CACHE_FILE_SIZE_DEFAULT);
        let fresh = quarry_objfmt::CacheId::from(uuid::Uuid::new_v4());
        let device = Arc::new(CacheDevice::open(
            &path,
            size.bytes(),
            fresh,
            &host,
            now_ms(),
        )?);
        let scan = quarry_cache::scan(&device)?;
        let geometry = device.geometry();
        let total = u64::from(geometry.segments) * u64::from(geometry.segment_size);
        let dirty_max = config.cache.dirty_max.of(total) / u64::from(geometry.segment_size);
        let dirty: Vec<_> = scan
            .volumes
            .values()
            .flat_map(|v| v.segments.iter().map(|s| (s.segment, s.generation)))
            .collect();
        let cache = Cache::new(
            device.id(),
            geometry,
            u32::try_from(dirty_max).unwrap_or(u32::MAX),
            scan.next_generation,
            &dirty,
        );
        let ram = config.cache.ram.bytes();
        let nodes = NodeCache::new(usize::try_from(ram / NODE_SHARE)?);
        let shared = Arc::new(Mutex::new(Shared { cache, nodes }));
        let file = Arc::new(device.file()?);
        let threads = config.reactor.threads.max(1);
        let reactors = (0..threads as usize)
            .map(|index| {
                Reactor::spawn(ReactorConfig {
                    index,
                    cache: Arc::clone(&file),
                    buffer_entries: BUFFER_ENTRIES,
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let common = Common {
            store: Arc::new(lane.clone()),
            background: Arc::new(lane.background()),
            device,
            frames: frame_cache(ram - ram / NODE_SHARE),
            uploads: Arc::new(tokio::sync::Semaphore::new(backend::UPLOADS_MAX)),
            runtime: tokio::runtime::Handle::current(),
        };
        Ok(Arc::new(Self {
            host,
            started_ms: now_ms(),
            control: lane.with_deadline(CONTROL_DEADLINE),
            lane,
            store_url,
            common,
            shared,
            reactors: Mutex::new(reactors),
            next_reactor: AtomicUsize::new(0),
            kept: Mutex::new(scan.volumes),
            slots: Mutex::default(),
            ublk: ublk::Control::new(PathBuf::from("/dev/quarry")),
            metrics: metrics::Metrics::new(),
            ready: std::sync::atomic::AtomicBool::new(false),
            exports: Arc::default(),
            config,
        }))
    }

    fn slot(&self, volume: &VolumeRef) -> Slot {
        Arc::clone(self.slots.lock().entry(volume.clone()).or_default())
    }

    fn tuning(&self) -> Tuning {
        let writeback = &self.config.writeback;
        let chunk = writeback.chunk_size.bytes() / u64::from(quarry_objfmt::SECTOR_SIZE);
        Tuning {
            writeback_delay_ms: u64::try_from(writeback.delay.as_millis()).unwrap_or(u64::MAX),
            chunk_sectors_max: u32::try_from(chunk).unwrap_or(u32::MAX),
            uploads_max: writeback.uploads_max as usize,
            ..Tuning::default()
        }
    }

    fn pick_reactor(&self) -> crate::reactor::ReactorHandle {
        let reactors = self.reactors.lock();
        let at = self.next_reactor.fetch_add(1, Ordering::Relaxed) % reactors.len();
        reactors[at].handle()
    }

    /// What can be had over NBD.
    pub fn exports(&self) -> Arc<Exports> {
        Arc::clone(&self.exports)
    }

    /// What was attached before has been seen to.
    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Release);
    }

    /// Uploads everything of all volumes and folds it into their maps; they stay attached.
    pub async fn drain_all(&self) {
        let slots: Vec<Slot> = self.slots.lock().values().cloned().collect();
        for slot in slots {
            if let Some(attached) = &*slot.lock().await {
                attached.backend.drain(true).await;
            }
        }
    }

    /// Ends the reactors. Requests under way are answered; what comes later is not taken.
    pub async fn stop(&self) {
        let reactors = std::mem::take(&mut *self.reactors.lock());
        let join = move || reactors.into_iter().for_each(Reactor::shutdown);
        if let Err(error) = tokio::task::spawn_blocking(join).await {
            tracing::error!(%error, "a reactor did not end well");
        }
    }

    /// What was attached when the last daemon of this data folder ended.
    ///
    /// # Errors
    /// If the list is there and cannot be read.
    pub fn read_list(&self) -> anyhow::Result<Vec<(VolumeRef, crate::control::Via)>> {
        let bytes = match std::fs::read(self.list_path()) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let list: Vec<(String, crate::control::Via)> = serde_json::from_slice(&bytes)?;
        list.into_iter()
            .map(|(name, via)| Ok((name.parse::<VolumeRef>()?, via)))
            .collect()
    }

    /// Where the list of attached volumes is kept.
    fn list_path(&self) -> PathBuf {
        self.config.daemon.data_dir.join("attached.json")
    }
}

#[async_trait]
impl Engine for Daemon {
    async fn create_tenant(&self, tenant: &TenantName) -> ApiResult<TenantInfo> {
        registry::create_tenant(&self.control, tenant).await
    }

    async fn list_tenants(&self) -> ApiResult<Vec<TenantInfo>> {
        registry::list_tenants(&self.control).await
    }

    async fn delete_tenant(&self, tenant: &TenantName) -> ApiResult<()> {
        registry::delete_tenant(&self.control, tenant).await
    }

    async fn create_volume(&self, spec: VolumeSpec) -> ApiResult<VolumeInfo> {
        registry::create_volume(&self.control, &spec).await?;
        self.show_volume(&spec.volume()).await
    }

    async fn list_volumes(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<VolumeInfo>> {
        let mut all = Vec::new();
        for volume in registry::list_volumes(&self.control, tenant).await? {
            all.push(self.show_volume(&volume).await?);
        }
        Ok(all)
    }

    async fn show_volume(&self, volume: &VolumeRef) -> ApiResult<VolumeInfo> {
        self.show(volume).await
    }

    async fn attach(&self, volume: &VolumeRef, options: AttachOptions) -> ApiResult<AttachInfo> {
        self.attach_volume(volume, &options).await
    }

    async fn detach(&self, volume: &VolumeRef) -> ApiResult<()> {
        self.detach_volume(volume).await
    }

    async fn sync(&self, volume: &VolumeRef) -> ApiResult<()> {
        let backend = {
            let slot = self.slot(volume);
            let attached = slot.lock().await;
            let attached = attached.as_ref().ok_or_else(|| not_attached(volume))?;
            Arc::clone(&attached.backend)
        };
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

    async fn delete_volume(&self, volume: &VolumeRef) -> ApiResult<()> {
        let slot = self.slot(volume);
        let attached = slot.lock().await;
        if attached.is_some() {
            let message = format!("{volume} is attached");
            return Err(ApiError::new(Kind::Conflict, message, "detach it first"));
        }
        registry::delete_volume(&self.control, volume).await
    }

    async fn status(&self) -> ApiResult<StatusInfo> {
        let counts = self.shared.lock().cache.counts();
        let bytes = |segments: u32| u64::from(segments) * u64::from(counts.segment_size);
        let health = self.lane.health().state();
        let (failing_ms, last_error) = match &health {
            StoreState::Healthy => (None, None),
            StoreState::Failing {
                lasting,
                last_error,
                ..
            } => {
                let lasting = u64::try_from(lasting.as_millis()).unwrap_or(u64::MAX);
                (Some(lasting), Some(last_error.to_string()))
            }
        };
        let slots: Vec<Slot> = self.slots.lock().values().cloned().collect();
        let attached = slots
            .iter()
            .filter(|s| s.try_lock().is_ok_and(|a| a.is_some()))
            .count();
        let ublk = match self.ublk.probe().await {
            Ok(_) => "available".to_owned(),
            Err(error) => error.to_string(),
        };
        let not_ready = self.ready().await.err();
        Ok(StatusInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.host.clone(),
            pid: std::process::id(),
            started_ms: self.started_ms,
            ready: not_ready.is_none(),
            not_ready,
            store: StoreStatus {
                url: self.store_url.clone(),
                healthy: failing_ms.is_none(),
                failing_ms,
                last_error,
            },
            cache: CacheStatus {
                path: self.common.device.path().display().to_string(),
                id: self.common.device.id().to_string(),
                size_bytes: bytes(counts.total),
                dirty_bytes: bytes(counts.dirty),
                dirty_max_bytes: bytes(counts.dirty_max),
                clean_bytes: bytes(counts.clean),
            },
            volumes_attached: attached as u64,
            volumes_failing: 0,
            ublk,
            nbd_socket: self.config.nbd_socket().display().to_string(),
        })
    }

    async fn ready(&self) -> Result<(), String> {
        if !self.ready.load(Ordering::Acquire) {
            return Err("what was attached before is being attached again".to_owned());
        }
        Ok(())
    }

    async fn metrics_text(&self) -> String {
        self.metrics.render(&self.snapshot().await)
    }
}

fn not_attached(volume: &VolumeRef) -> ApiError {
    let message = format!("{volume} is not attached to this host");
    let remedy = format!("attach it with `quarry volume attach {volume}`");
    ApiError::new(Kind::Conflict, message, remedy)
}
