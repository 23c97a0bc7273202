//! Metrics of attached volumes.

use super::definition::{Definition, Source, counter, gauge, histogram, of};
use crate::latency::{Latencies, Timed};

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
    /// Bytes that the kernel moved between requests' pages and the cache device or the store.
    pub in_place_bytes: u64,
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
    /// Requests that it works on, now.
    pub in_flight: u64,
    /// Which attachment of its life this is.
    pub epoch: u64,
    /// Damaged objects seen.
    pub damaged_objects: u64,
    /// 1 if a newer writer took it, else 0.
    pub fenced: u64,
    /// 1 while writes wait for the store, else 0.
    pub stalled: u64,
    /// 1 while something is wrong with it, else 0.
    pub failed: u64,
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
    /// How long its requests took.
    pub latencies: Latencies,
    /// What it counted.
    pub stats: VolumeStats,
}

/// By name.
pub(super) static TABLE: &[Definition] = &[
    gauge(
        "quarry_volume_cached_bytes",
        "Bytes of the volume on the cache device.",
        of!(Volume.cached_bytes),
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
    counter(
        "quarry_volume_damaged_objects_total",
        "Damaged objects of the volume that were seen.",
        of!(Volume.damaged_objects),
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
    gauge(
        "quarry_volume_dirty_bytes",
        "Bytes that the store does not have yet: what losing the host would lose, in bytes.",
        of!(Volume.dirty_bytes),
    ),
    counter(
        "quarry_volume_discards_total",
        "Discards and write-zeroes completed.",
        of!(Volume.discards),
    ),
    gauge(
        "quarry_volume_epoch",
        "Number of the attachment in the volume's life: each writer's is higher than the one's before.",
        of!(Volume.epoch),
    ),
    counter(
        "quarry_volume_errors_total",
        "Requests completed with an error.",
        of!(Volume.errors),
    ),
    gauge(
        "quarry_volume_failed",
        "1 while something is wrong with the volume.",
        of!(Volume.failed),
    ),
    gauge(
        "quarry_volume_fenced",
        "1 if a newer writer took the volume: it is read-only here and keeps what it could not send.",
        of!(Volume.fenced),
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
    histogram(
        "quarry_volume_held_duration_seconds",
        "Time that requests waited for a limit, before what quarry_volume_request_duration_seconds counts.",
        Source::Latency(&[Timed::Held]),
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
    counter(
        "quarry_volume_hit_bytes_total",
        "Bytes read that the cache had.",
        of!(Volume.hit_bytes),
    ),
    gauge(
        "quarry_volume_in_flight_requests",
        "Requests that the volume works on: the queue's depth as the daemon sees it.",
        of!(Volume.in_flight),
    ),
    counter(
        "quarry_volume_in_place_bytes_total",
        "Bytes that the kernel moved between requests' pages and the cache device or the store: not copied.",
        of!(Volume.in_place_bytes),
    ),
    gauge(
        "quarry_volume_info",
        "How the volume is attached, and how its data travel, as labels of the constant 1.",
        Source::Own(&["tenant", "volume", "via", "mode"], |all, family| {
            for v in &all.volumes {
                family.sample(&[&v.tenant, &v.volume, v.via, v.mode], 1.0);
            }
        }),
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
    counter(
        "quarry_volume_orphans_deleted_total",
        "Objects deleted that nothing named: what a crash or a fenced writer had left.",
        of!(Volume.orphans_deleted),
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
        "Reads completed; one by NBD of more than 1 MiB counts as one for each MiB.",
        of!(Volume.reads),
    ),
    histogram(
        "quarry_volume_request_duration_seconds",
        "Time of requests that ended well, from when the daemon took them up, or a limit let them through, until they were done; read_miss: waited for the store; write: with FUA for the flush too.",
        Source::Latency(&Timed::REQUESTS),
    ),
    gauge(
        "quarry_volume_rpo_seconds",
        "Age of the oldest write that the store does not have yet: what losing the host would lose, in time. Of what a cache kept from before, the time since the attach: it is older.",
        of!(Volume.rpo_ms in ms),
    ),
    counter(
        "quarry_volume_shared_bytes_total",
        "Bytes that were not fetched, for memory had them, or they were on their way for another volume.",
        of!(Volume.shared_bytes),
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
];
