//! Metrics: one table of all names, helps and labels, and their text at a scrape.
//!
//! Owns the names and nothing that is counted: the engine hands over [`Snapshot`]s of plain
//! counters, and [`Metrics::render`] is a pure function of them and of what is in the registry
//! (histograms and counters that other modules register). So a name exists once, counters of I/O
//! paths stay plain integers, and the cost of metrics falls due at the scrape.
//!
//! **Invariant:** names follow Prometheus' conventions: base units, `_total` on counters only.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Registry, TextEncoder};

/// What one attached volume has counted since it was attached, and its gauges.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VolumeStats {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Read requests completed.
    pub reads: u64,
    /// Bytes of reads completed.
    pub read_bytes: u64,
    /// Write requests completed.
    pub writes: u64,
    /// Bytes of writes completed.
    pub write_bytes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Discards and write-zeroes completed.
    pub discards: u64,
    /// Requests completed with an error.
    pub errors: u64,
    /// Bytes read that the cache had.
    pub hit_bytes: u64,
    /// Bytes read that the store had to give.
    pub miss_bytes: u64,
    /// Bytes of requests that passed through the daemon's memory.
    pub copied_bytes: u64,
    /// Runs received from the store straight into requests' pages.
    pub direct_reads: u64,
    /// Their bytes.
    pub direct_bytes: u64,
    /// Runs that were to be received so, and came the ordinary way.
    pub direct_fallbacks: u64,
    /// Bytes read that were holes.
    pub zero_fill_bytes: u64,
    /// Bytes that the store does not have yet.
    pub dirty_bytes: u64,
    /// Age of the oldest write that the store does not have yet.
    pub rpo_ms: u64,
    /// Bytes on the cache device.
    pub cached_bytes: u64,
    /// Bytes of chunks uploaded.
    pub uploaded_bytes: u64,
    /// Chunks uploaded.
    pub uploaded_chunks: u64,
    /// Checkpoints made.
    pub checkpoints: u64,
    /// Bytes of map objects uploaded.
    pub map_bytes: u64,
    /// Bytes of chunks uploaded by compaction.
    pub compacted_bytes: u64,
    /// Bytes of objects that nobody needs and that will be deleted.
    pub dead_bytes: u64,
    /// Data not needed in chunks that are needed in part, before compression.
    pub debt_bytes: u64,
    /// Bytes of objects deleted for nobody needed them.
    pub deleted_bytes: u64,
    /// Objects deleted for nobody needed them.
    pub deleted_objects: u64,
    /// Objects deleted for nothing ever named them.
    pub orphans_deleted: u64,
    /// Data needed in the store, before compression, as of the last count.
    pub live_bytes: u64,
    /// Bytes of objects that only snapshots need.
    pub pinned_bytes: u64,
    /// Bytes of the volume's chunks in the store.
    pub stored_bytes: u64,
    /// Bytes fetched for misses, readahead and warming.
    pub fetched_bytes: u64,
    /// Ranged GETs for that.
    pub fetches: u64,
    /// Bytes that memory had, or that were on their way for another volume.
    pub shared_bytes: u64,
    /// Bytes that readahead asked for.
    pub readahead_bytes: u64,
    /// Bytes that warming asked for.
    pub warmed_bytes: u64,
    /// Requests to the store for it.
    pub store_requests: u64,
    /// What they cost by the configuration's prices, in millionths.
    pub store_cost_micros: u64,
    /// Requests that wait for a limit, now.
    pub held: u64,
    /// Requests that waited for a limit.
    pub held_total: u64,
    /// For how long, all together.
    pub held_ms: u64,
    /// Requests a second that it may make; 0 without a limit of its own.
    pub limit_iops: u64,
    /// Bytes a second that it may read and write; 0 without a limit of its own.
    pub limit_bytes: u64,
    /// 1 while writes wait for the store, else 0.
    pub stalled: u64,
    /// 1 while something is wrong with it, else 0.
    pub failed: u64,
}

/// Chunks that are being uploaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UploadStats {
    /// Under way, in the places that tenants share.
    pub in_flight: u64,
    /// Under way for longer than a sound store takes, beside these places.
    pub slow: u64,
    /// Waiting for a place.
    pub waiting: u64,
}

/// The cache device's gauges and counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheStats {
    /// Its size.
    pub size_bytes: u64,
    /// Bytes that the store does not have yet.
    pub dirty_bytes: u64,
    /// How many that may be.
    pub dirty_max_bytes: u64,
    /// Bytes that the store has too.
    pub clean_bytes: u64,
    /// Segments free.
    pub segments_free: u64,
    /// Segments in use.
    pub segments_used: u64,
    /// Segments reclaimed since the start.
    pub reclaims: u64,
    /// Memory of map nodes.
    pub node_bytes: u64,
    /// Lookups of map nodes that memory had.
    pub node_hits: u64,
    /// Lookups of map nodes that the store had to give.
    pub node_misses: u64,
}

/// What the daemon does with the trash.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TrashStats {
    /// Volumes in it, of all tenants, as of the last look.
    pub volumes: u64,
    /// Volumes purged by this daemon.
    pub purged_volumes: u64,
    /// Objects deleted for that.
    pub purged_objects: u64,
}

/// What the audit log counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AuditStats {
    /// Lines written.
    pub lines: u64,
    /// Lines that could not be written.
    pub failures: u64,
}

/// One kind of call to the object store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreCall {
    /// Such as `get`, `create` or `replace`.
    pub operation: &'static str,
    /// Such as `ok`, `precondition` or `error`.
    pub outcome: &'static str,
    /// How many.
    pub count: u64,
}

/// The object store's counters.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StoreStats {
    /// Calls by operation and outcome.
    pub calls: Vec<StoreCall>,
    /// Time that calls were under way, all together, by operation.
    pub busy: Vec<(&'static str, Duration)>,
    /// Bytes received.
    pub read_bytes: u64,
    /// Bytes sent.
    pub write_bytes: u64,
    /// Attempts after the first.
    pub retries: u64,
    /// Calls under way, now.
    pub in_flight: u64,
    /// Calls that wait for a place, now.
    pub waiting: u64,
    /// For how long calls have been failing; 0 when they are not.
    pub failing_ms: u64,
}

/// An attached volume.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VolumeSample {
    /// Whose.
    pub tenant: String,
    /// Its name.
    pub volume: String,
    /// By what it is attached.
    pub via: &'static str,
    /// How its data travel, such as `zero copy`.
    pub mode: &'static str,
    /// What it counted.
    pub stats: VolumeStats,
}

/// What a tenant asked of its store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TenantStats {
    /// Requests a second of all its volumes; 0 without a limit.
    pub limit_iops: u64,
    /// Bytes a second of all its volumes; 0 without a limit.
    pub limit_bytes: u64,
    /// Bytes of the cache's segments with its unsent data.
    pub dirty_bytes: u64,
    /// Bytes of all segments of the cache that it has.
    pub cache_bytes: u64,
    /// Bytes received.
    pub read_bytes: u64,
    /// Bytes sent.
    pub write_bytes: u64,
    /// What all its requests cost by the configuration's prices, in millionths.
    pub cost_micros: u64,
    /// For how long its store has been failing; 0 when it is not.
    pub failing_ms: u64,
}

/// A tenant that was asked for since the start.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TenantSample {
    /// Its name.
    pub tenant: String,
    /// Requests by what a provider takes money for: `put`, `get`, `list`, `delete`.
    pub calls: Vec<(&'static str, u64)>,
    /// What else it counted.
    pub stats: TenantStats,
}

/// What a reactor counts, and its gauges.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReactorCounts {
    /// Rounds of its loop.
    pub batches: u64,
    /// Requests completed.
    pub requests: u64,
    /// Volumes on it.
    pub volumes: u64,
}

/// All that the engine counts, at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    /// Attached volumes.
    pub volumes: Vec<VolumeSample>,
    /// Tenants.
    pub tenants: Vec<TenantSample>,
    /// Uploads.
    pub uploads: UploadStats,
    /// Reactors, by their number.
    pub reactors: Vec<ReactorCounts>,
    /// The cache device.
    pub cache: CacheStats,
    /// The object store.
    pub store: StoreStats,
    /// The trash.
    pub trash: TrashStats,
    /// The audit log.
    pub audit: AuditStats,
}

/// Where a metric's values come from.
#[derive(Clone, Copy)]
enum Source {
    /// One value a volume, labelled `tenant` and `volume`.
    Volume(fn(&VolumeStats) -> f64),
    /// One value.
    Uploads(fn(&UploadStats) -> f64),
    /// The constant 1 a volume, labelled with what does not change while it is attached.
    VolumeInfo,
    /// One value a tenant, labelled `tenant`.
    Tenant(fn(&TenantStats) -> f64),
    /// One value a tenant and operation, labelled so.
    TenantCalls,
    /// One value a reactor, labelled `reactor`.
    Reactor(fn(&ReactorCounts) -> f64),
    /// One value.
    Cache(fn(&CacheStats) -> f64),
    /// One value.
    Store(fn(&StoreStats) -> f64),
    /// One value.
    Trash(fn(&TrashStats) -> f64),
    /// One value.
    Audit(fn(&AuditStats) -> f64),
    /// One value an operation and outcome, labelled so.
    StoreCalls,
    /// One value an operation, labelled so.
    StoreBusy,
    /// Always 1, labelled `version`.
    Build,
}

struct Definition {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    source: Source,
}

const fn counter(name: &'static str, help: &'static str, source: Source) -> Definition {
    Definition {
        name,
        help,
        kind: MetricType::COUNTER,
        source,
    }
}

const fn gauge(name: &'static str, help: &'static str, source: Source) -> Definition {
    Definition {
        name,
        help,
        kind: MetricType::GAUGE,
        source,
    }
}

macro_rules! of {
    ($source:ident . $field:ident) => {
        Source::$source(|stats| count(stats.$field))
    };
    ($source:ident . $field:ident in micros) => {
        Source::$source(|stats| count(stats.$field) / 1_000_000.0)
    };
    ($source:ident . $field:ident in ms) => {
        Source::$source(|stats| count(stats.$field) / 1000.0)
    };
}

/// Every metric made of a snapshot. By name within each source.
static TABLE: &[Definition] = &[
    gauge(
        "quarry_build_info",
        "Version of the daemon, as a label of the constant 1.",
        Source::Build,
    ),
    counter(
        "quarry_volume_checkpoints_total",
        "Checkpoints made.",
        of!(Volume.checkpoints),
    ),
    counter(
        "quarry_volume_compacted_bytes_total",
        "Bytes of chunks uploaded by compaction.",
        of!(Volume.compacted_bytes),
    ),
    counter(
        "quarry_volume_copied_bytes_total",
        "Bytes of requests that passed through the daemon's memory.",
        of!(Volume.copied_bytes),
    ),
    gauge(
        "quarry_volume_dead_bytes",
        "Bytes of objects that nobody needs and that will be deleted.",
        of!(Volume.dead_bytes),
    ),
    gauge(
        "quarry_volume_debt_bytes",
        "Data not needed in chunks that are needed in part, before compression.",
        of!(Volume.debt_bytes),
    ),
    counter(
        "quarry_volume_deleted_bytes_total",
        "Bytes of objects deleted for nobody needed them.",
        of!(Volume.deleted_bytes),
    ),
    counter(
        "quarry_volume_deleted_objects_total",
        "Objects deleted for nobody needed them.",
        of!(Volume.deleted_objects),
    ),
    counter(
        "quarry_volume_orphans_deleted_total",
        "Objects deleted that nothing named: what a crash or a fenced writer had left.",
        of!(Volume.orphans_deleted),
    ),
    counter(
        "quarry_volume_direct_bytes_total",
        "Bytes received from the store straight into requests' pages.",
        of!(Volume.direct_bytes),
    ),
    counter(
        "quarry_volume_direct_fallbacks_total",
        "Reads that were to be received so, and came the ordinary way.",
        of!(Volume.direct_fallbacks),
    ),
    counter(
        "quarry_volume_direct_reads_total",
        "Reads received from the store straight into requests' pages.",
        of!(Volume.direct_reads),
    ),
    counter(
        "quarry_volume_discards_total",
        "Discards and write-zeroes completed.",
        of!(Volume.discards),
    ),
    counter(
        "quarry_volume_errors_total",
        "Requests completed with an error.",
        of!(Volume.errors),
    ),
    counter(
        "quarry_volume_fetched_bytes_total",
        "Bytes fetched from the store for misses, readahead and warming.",
        of!(Volume.fetched_bytes),
    ),
    counter(
        "quarry_volume_fetches_total",
        "Ranged reads of the store for misses, readahead and warming.",
        of!(Volume.fetches),
    ),
    counter(
        "quarry_volume_flushes_total",
        "Flushes completed.",
        of!(Volume.flushes),
    ),
    counter(
        "quarry_volume_hit_bytes_total",
        "Bytes read that the cache had.",
        of!(Volume.hit_bytes),
    ),
    gauge(
        "quarry_volume_held_requests",
        "Requests that wait for a limit of the volume or its tenant.",
        of!(Volume.held),
    ),
    counter(
        "quarry_volume_held_requests_total",
        "Requests that waited for a limit.",
        of!(Volume.held_total),
    ),
    counter(
        "quarry_volume_held_seconds_total",
        "Time that requests waited for a limit, all together.",
        of!(Volume.held_ms in ms),
    ),
    gauge(
        "quarry_volume_limit_bytes_per_second",
        "Bytes a second that the volume may read and write; 0 without a limit of its own.",
        of!(Volume.limit_bytes),
    ),
    gauge(
        "quarry_volume_limit_iops",
        "Requests a second that the volume may make; 0 without a limit of its own.",
        of!(Volume.limit_iops),
    ),
    gauge(
        "quarry_volume_live_bytes",
        "Data needed in the store, before compression, as of the last count.",
        of!(Volume.live_bytes),
    ),
    counter(
        "quarry_volume_map_bytes_total",
        "Bytes of map objects uploaded.",
        of!(Volume.map_bytes),
    ),
    counter(
        "quarry_volume_miss_bytes_total",
        "Bytes read that the store had to give.",
        of!(Volume.miss_bytes),
    ),
    gauge(
        "quarry_volume_pinned_bytes",
        "Bytes of objects that only snapshots need.",
        of!(Volume.pinned_bytes),
    ),
    counter(
        "quarry_volume_read_bytes_total",
        "Bytes read.",
        of!(Volume.read_bytes),
    ),
    counter(
        "quarry_volume_readahead_bytes_total",
        "Bytes that readahead asked for: fetched or shared.",
        of!(Volume.readahead_bytes),
    ),
    counter(
        "quarry_volume_reads_total",
        "Reads completed.",
        of!(Volume.reads),
    ),
    counter(
        "quarry_volume_shared_bytes_total",
        "Bytes that were not fetched, for memory had them, or they were on their way for another volume.",
        of!(Volume.shared_bytes),
    ),
    counter(
        "quarry_volume_store_cost_total",
        "What requests to the store for the volume cost, by the prices in the configuration.",
        of!(Volume.store_cost_micros in micros),
    ),
    counter(
        "quarry_volume_store_requests_total",
        "Requests to the store for the volume.",
        of!(Volume.store_requests),
    ),
    gauge(
        "quarry_volume_stored_bytes",
        "Bytes of the volume's chunks in the store.",
        of!(Volume.stored_bytes),
    ),
    counter(
        "quarry_volume_uploaded_bytes_total",
        "Bytes of chunks uploaded.",
        of!(Volume.uploaded_bytes),
    ),
    counter(
        "quarry_volume_uploaded_chunks_total",
        "Chunks uploaded.",
        of!(Volume.uploaded_chunks),
    ),
    counter(
        "quarry_volume_warmed_bytes_total",
        "Bytes that warming asked for: fetched or shared.",
        of!(Volume.warmed_bytes),
    ),
    counter(
        "quarry_volume_write_bytes_total",
        "Bytes written.",
        of!(Volume.write_bytes),
    ),
    counter(
        "quarry_volume_writes_total",
        "Writes completed.",
        of!(Volume.writes),
    ),
    counter(
        "quarry_volume_zero_fill_bytes_total",
        "Bytes read that were holes.",
        of!(Volume.zero_fill_bytes),
    ),
    gauge(
        "quarry_volume_cached_bytes",
        "Bytes of the volume on the cache device.",
        of!(Volume.cached_bytes),
    ),
    gauge(
        "quarry_volume_dirty_bytes",
        "Bytes that the store does not have yet.",
        of!(Volume.dirty_bytes),
    ),
    gauge(
        "quarry_volume_failed",
        "1 while something is wrong with the volume.",
        of!(Volume.failed),
    ),
    gauge(
        "quarry_volume_info",
        "How the volume is attached, and how its data travel, as labels of the constant 1.",
        Source::VolumeInfo,
    ),
    gauge(
        "quarry_volume_rpo_seconds",
        "Age of the oldest write that the store does not have yet.",
        of!(Volume.rpo_ms in ms),
    ),
    gauge(
        "quarry_volume_size_bytes",
        "Size of the volume.",
        of!(Volume.size_bytes),
    ),
    gauge(
        "quarry_volume_stalled",
        "1 while writes wait for the store.",
        of!(Volume.stalled),
    ),
    gauge(
        "quarry_tenant_cache_bytes",
        "Bytes of the cache's segments that the tenant has, of what it wrote and what was fetched for it.",
        of!(Tenant.cache_bytes),
    ),
    gauge(
        "quarry_tenant_dirty_bytes",
        "Bytes of the cache's segments that hold data of the tenant which the store does not have yet.",
        of!(Tenant.dirty_bytes),
    ),
    gauge(
        "quarry_tenant_limit_bytes_per_second",
        "Bytes a second that the tenant's volumes here may read and write together; 0 without a limit.",
        of!(Tenant.limit_bytes),
    ),
    gauge(
        "quarry_tenant_limit_iops",
        "Requests a second that the tenant's volumes here may make together; 0 without a limit.",
        of!(Tenant.limit_iops),
    ),
    gauge(
        "quarry_uploads_in_flight",
        "Chunks being uploaded, in the places that tenants share.",
        of!(Uploads.in_flight),
    ),
    gauge(
        "quarry_uploads_slow",
        "Chunks being uploaded for longer than a sound store takes, beside these places.",
        of!(Uploads.slow),
    ),
    gauge(
        "quarry_uploads_waiting",
        "Chunks that wait for a place.",
        of!(Uploads.waiting),
    ),
    counter(
        "quarry_tenant_store_cost_total",
        "What the tenant's requests to its store cost, by the prices in the configuration.",
        of!(Tenant.cost_micros in micros),
    ),
    gauge(
        "quarry_tenant_store_failing_seconds",
        "For how long calls to the tenant's store have been failing.",
        of!(Tenant.failing_ms in ms),
    ),
    counter(
        "quarry_tenant_store_read_bytes_total",
        "Bytes received from the tenant's store.",
        of!(Tenant.read_bytes),
    ),
    counter(
        "quarry_tenant_store_requests_total",
        "Requests to the tenant's store, by what a provider takes money for.",
        Source::TenantCalls,
    ),
    counter(
        "quarry_tenant_store_write_bytes_total",
        "Bytes sent to the tenant's store.",
        of!(Tenant.write_bytes),
    ),
    counter(
        "quarry_reactor_batches_total",
        "Rounds of the reactor's loop: one submission each.",
        of!(Reactor.batches),
    ),
    counter(
        "quarry_reactor_requests_total",
        "Requests completed by the reactor.",
        of!(Reactor.requests),
    ),
    gauge(
        "quarry_reactor_volumes",
        "Volumes on the reactor.",
        of!(Reactor.volumes),
    ),
    counter(
        "quarry_cache_node_hits_total",
        "Lookups of map nodes that memory had.",
        of!(Cache.node_hits),
    ),
    counter(
        "quarry_cache_node_misses_total",
        "Lookups of map nodes that the store had to give.",
        of!(Cache.node_misses),
    ),
    counter(
        "quarry_cache_reclaims_total",
        "Segments reclaimed.",
        of!(Cache.reclaims),
    ),
    gauge(
        "quarry_cache_clean_bytes",
        "Bytes cached that the store has too.",
        of!(Cache.clean_bytes),
    ),
    gauge(
        "quarry_cache_dirty_bytes",
        "Bytes cached that the store does not have yet.",
        of!(Cache.dirty_bytes),
    ),
    gauge(
        "quarry_cache_dirty_max_bytes",
        "How many bytes may be dirty before writes wait.",
        of!(Cache.dirty_max_bytes),
    ),
    gauge(
        "quarry_cache_node_bytes",
        "Memory of map nodes.",
        of!(Cache.node_bytes),
    ),
    gauge(
        "quarry_cache_segments_free",
        "Segments of the cache device that are free.",
        of!(Cache.segments_free),
    ),
    gauge(
        "quarry_cache_segments_used",
        "Segments of the cache device that are in use.",
        of!(Cache.segments_used),
    ),
    gauge(
        "quarry_cache_size_bytes",
        "Size of the cache device.",
        of!(Cache.size_bytes),
    ),
    counter(
        "quarry_store_busy_seconds_total",
        "Time that calls to the store were under way, all together, by operation.",
        Source::StoreBusy,
    ),
    counter(
        "quarry_store_read_bytes_total",
        "Bytes received from the store.",
        of!(Store.read_bytes),
    ),
    counter(
        "quarry_store_requests_total",
        "Calls to the store, by operation and outcome.",
        Source::StoreCalls,
    ),
    counter(
        "quarry_store_retries_total",
        "Attempts at calls to the store after the first.",
        of!(Store.retries),
    ),
    counter(
        "quarry_store_write_bytes_total",
        "Bytes sent to the store.",
        of!(Store.write_bytes),
    ),
    gauge(
        "quarry_store_failing_seconds",
        "For how long calls to the store have been failing.",
        of!(Store.failing_ms in ms),
    ),
    gauge(
        "quarry_store_in_flight",
        "Calls to the store under way.",
        of!(Store.in_flight),
    ),
    gauge(
        "quarry_store_waiting",
        "Calls to the store that wait for a place.",
        of!(Store.waiting),
    ),
    counter(
        "quarry_audit_failures_total",
        "Lines of the audit log that could not be written.",
        of!(Audit.failures),
    ),
    counter(
        "quarry_audit_lines_total",
        "Lines written to the audit log.",
        of!(Audit.lines),
    ),
    counter(
        "quarry_trash_purged_objects_total",
        "Objects of purged volumes deleted by this daemon.",
        of!(Trash.purged_objects),
    ),
    counter(
        "quarry_trash_purged_volumes_total",
        "Volumes purged by this daemon.",
        of!(Trash.purged_volumes),
    ),
    gauge(
        "quarry_trash_volumes",
        "Deleted volumes in the store that can be restored, as of the last look.",
        of!(Trash.volumes),
    ),
];

/// Exact below 2^53: for bytes, 8 PiB.
const fn count(value: u64) -> f64 {
    value as f64
}

/// The metrics of one daemon.
#[derive(Debug, Default)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// None yet but those of the table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metric that its owner keeps itself, such as a histogram.
    ///
    /// # Errors
    /// If its name is taken.
    pub fn register(&self, collector: impl Collector + 'static) -> prometheus::Result<()> {
        if collector
            .desc()
            .iter()
            .any(|desc| names().any(|name| name == desc.fq_name))
        {
            return Err(prometheus::Error::AlreadyReg);
        }
        self.registry.register(Box::new(collector))
    }

    /// The text of a scrape.
    #[must_use]
    pub fn render(&self, snapshot: &Snapshot) -> String {
        let mut families: Vec<_> = TABLE
            .iter()
            .map(|definition| definition.family(snapshot))
            .collect();
        families.extend(self.registry.gather());
        // A family without a value cannot be encoded.
        families.retain(|family| !family.get_metric().is_empty());
        let mut text = String::new();
        if let Err(error) = TextEncoder::new().encode_utf8(&families, &mut text) {
            tracing::error!(%error, "the metrics cannot be encoded");
        }
        text
    }
}

/// The names of all metrics of the table.
pub fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|definition| definition.name)
}

impl Definition {
    fn family(&self, snapshot: &Snapshot) -> MetricFamily {
        let metrics = match self.source {
            Source::Volume(value) => snapshot
                .volumes
                .iter()
                .map(|v| {
                    let labels = [("tenant", v.tenant.as_str()), ("volume", &v.volume)];
                    self.metric(&labels, value(&v.stats))
                })
                .collect(),
            Source::VolumeInfo => snapshot
                .volumes
                .iter()
                .map(|v| {
                    let name = [("tenant", v.tenant.as_str()), ("volume", &v.volume)];
                    let info = [("via", v.via), ("mode", v.mode)];
                    self.metric(&[name, info].concat(), 1.0)
                })
                .collect(),
            Source::Tenant(value) => snapshot
                .tenants
                .iter()
                .map(|t| self.metric(&[("tenant", t.tenant.as_str())], value(&t.stats)))
                .collect(),
            Source::TenantCalls => {
                let tenants = snapshot.tenants.iter();
                let calls = tenants.flat_map(|t| t.calls.iter().map(move |call| (t, call)));
                calls
                    .map(|(t, (operation, calls))| {
                        let labels = [("tenant", t.tenant.as_str()), ("operation", operation)];
                        self.metric(&labels, count(*calls))
                    })
                    .collect()
            }
            Source::Uploads(value) => vec![self.metric(&[], value(&snapshot.uploads))],
            Source::Reactor(value) => (0_u32..)
                .zip(&snapshot.reactors)
                .map(|(n, counts)| {
                    self.metric(&[("reactor", n.to_string().as_str())], value(counts))
                })
                .collect(),
            Source::Cache(value) => vec![self.metric(&[], value(&snapshot.cache))],
            Source::Trash(value) => vec![self.metric(&[], value(&snapshot.trash))],
            Source::Audit(value) => vec![self.metric(&[], value(&snapshot.audit))],
            Source::Store(value) => vec![self.metric(&[], value(&snapshot.store))],
            Source::StoreCalls => {
                let calls = snapshot.store.calls.iter();
                calls
                    .map(|c| {
                        self.metric(
                            &[("operation", c.operation), ("outcome", c.outcome)],
                            count(c.count),
                        )
                    })
                    .collect()
            }
            Source::StoreBusy => {
                let busy = snapshot.store.busy.iter();
                busy.map(|(operation, time)| {
                    self.metric(&[("operation", operation)], time.as_secs_f64())
                })
                .collect()
            }
            Source::Build => vec![self.metric(&[("version", env!("CARGO_PKG_VERSION"))], 1.0)],
        };
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(self.kind);
        family.set_metric(metrics);
        family
    }

    fn metric(&self, labels: &[(&str, &str)], value: f64) -> Metric {
        let pair = |(name, value): &(&str, &str)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        };
        let mut metric = Metric::from_label(labels.iter().map(pair).collect());
        if self.kind == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        metric
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        let stats = VolumeStats {
            read_bytes: 4096,
            rpo_ms: 1500,
            held_ms: 250,
            stalled: 1,
            ..VolumeStats::default()
        };
        let call = StoreCall {
            operation: "get",
            outcome: "ok",
            count: 7,
        };
        Snapshot {
            volumes: vec![VolumeSample {
                tenant: "acme".to_owned(),
                volume: "db".to_owned(),
                via: "ublk",
                mode: "zero copy",
                stats,
            }],
            tenants: vec![TenantSample {
                tenant: "acme".to_owned(),
                calls: vec![("put", 3)],
                stats: TenantStats {
                    limit_iops: 5000,
                    cost_micros: 1_500,
                    ..TenantStats::default()
                },
            }],
            uploads: UploadStats {
                slow: 3,
                ..UploadStats::default()
            },
            reactors: vec![
                ReactorCounts::default(),
                ReactorCounts {
                    requests: 9,
                    ..ReactorCounts::default()
                },
            ],
            cache: CacheStats {
                size_bytes: 1 << 30,
                ..CacheStats::default()
            },
            store: StoreStats {
                calls: vec![call],
                busy: vec![("get", Duration::from_millis(250))],
                ..StoreStats::default()
            },
            audit: AuditStats {
                lines: 9,
                failures: 1,
            },
            trash: TrashStats {
                volumes: 2,
                ..TrashStats::default()
            },
        }
    }

    #[test]
    fn scrape_of_a_snapshot_has_its_values_and_labels() {
        let text = Metrics::new().render(&snapshot());
        for line in [
            "# TYPE quarry_volume_read_bytes_total counter",
            "quarry_volume_read_bytes_total{tenant=\"acme\",volume=\"db\"} 4096",
            "quarry_volume_rpo_seconds{tenant=\"acme\",volume=\"db\"} 1.5",
            "quarry_volume_stalled{tenant=\"acme\",volume=\"db\"} 1",
            "quarry_tenant_store_cost_total{tenant=\"acme\"} 0.0015",
            "quarry_tenant_store_requests_total{tenant=\"acme\",operation=\"put\"} 3",
            "quarry_volume_held_seconds_total{tenant=\"acme\",volume=\"db\"} 0.25",
            "quarry_tenant_limit_iops{tenant=\"acme\"} 5000",
            "quarry_uploads_slow 3",
            "quarry_volume_info{tenant=\"acme\",volume=\"db\",via=\"ublk\",mode=\"zero copy\"} 1",
            "quarry_reactor_requests_total{reactor=\"1\"} 9",
            "quarry_cache_size_bytes 1073741824",
            "quarry_store_busy_seconds_total{operation=\"get\"} 0.25",
            "quarry_trash_volumes 2",
            "quarry_audit_lines_total 9",
            "quarry_audit_failures_total 1",
            "quarry_store_requests_total{operation=\"get\",outcome=\"ok\"} 7",
            concat!(
                "quarry_build_info{version=\"",
                env!("CARGO_PKG_VERSION"),
                "\"} 1"
            ),
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
    }

    #[test]
    fn scrape_without_volumes_is_still_valid() {
        let text = Metrics::new().render(&Snapshot::default());
        assert!(
            text.contains("quarry_build_info") && !text.contains("quarry_volume_"),
            "{text}"
        );
    }

    #[test]
    fn table_keeps_to_the_conventions() {
        let mut seen = std::collections::BTreeSet::new();
        for definition in TABLE {
            let name = definition.name;
            assert!(seen.insert(name), "{name} is there twice");
            assert!(name.starts_with("quarry_"), "{name}");
            assert_eq!(
                name.ends_with("_total"),
                definition.kind == MetricType::COUNTER,
                "{name}"
            );
            assert!(definition.help.ends_with('.'), "{name}");
            assert!(!name.contains("_ms"), "{name} is not in base units");
        }
    }

    #[test]
    fn metric_of_a_module_is_scraped_and_cannot_take_a_tables_name() {
        let metrics = Metrics::new();
        let own = prometheus::IntCounter::new("quarry_own_total", "Own.").unwrap();
        own.inc_by(3);
        metrics.register(own).unwrap();
        let taken = prometheus::IntCounter::new("quarry_volume_reads_total", "Taken.").unwrap();
        assert!(metrics.register(taken).is_err());
        assert!(
            metrics
                .render(&snapshot())
                .contains("\nquarry_own_total 3\n")
        );
    }
}
