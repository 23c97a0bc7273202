//! Metrics of the cache device and of what memory has of maps.

use super::definition::{Definition, Source, count, counter, gauge, of};

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
    /// Segments by state: each is in one.
    pub segments: [(&'static str, u64); 5],
    /// Segments reclaimed since the start.
    pub reclaims: u64,
    /// Bytes cached before the start that were known again.
    pub found_bytes: u64,
    /// Memory of the index of what is cached and in the store.
    pub index_bytes: u64,
    /// Memory of map nodes.
    pub node_bytes: u64,
    /// How much it may be.
    pub node_max_bytes: u64,
    /// Memory of large writes whose chunk is not made yet.
    pub kept_write_bytes: u64,
    /// Bytes of chunks that were made of it.
    pub kept_write_used_bytes: u64,
    /// Lookups of map nodes that memory had.
    pub node_hits: u64,
    /// Lookups of map nodes that the store had to give.
    pub node_misses: u64,
}

/// By name.
pub(super) static TABLE: &[Definition] = &[
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
        "quarry_cache_found_bytes",
        "Bytes that were cached before the daemon was started, and are known again.",
        of!(Cache.found_bytes),
    ),
    gauge(
        "quarry_cache_index_bytes",
        "Memory of the index of what is cached and in the store, which the map nodes leave room for.",
        of!(Cache.index_bytes),
    ),
    gauge(
        "quarry_cache_kept_write_bytes",
        "Memory of large writes whose chunk is not made yet, 64 MiB or an eighth of cache.ram at most.",
        of!(Cache.kept_write_bytes),
    ),
    counter(
        "quarry_cache_kept_write_used_bytes_total",
        "Bytes of chunks that were in memory still when their chunk was made, and not read back from the cache device.",
        of!(Cache.kept_write_used_bytes),
    ),
    gauge(
        "quarry_cache_node_bytes",
        "Memory of map nodes.",
        of!(Cache.node_bytes),
    ),
    counter(
        "quarry_cache_node_hits_total",
        "Lookups of map nodes that memory had.",
        of!(Cache.node_hits),
    ),
    gauge(
        "quarry_cache_node_max_bytes",
        "How much memory map nodes may have: half of cache.ram less the index and what the process has in memory for more \
         than moments, but a quarter of it at least.",
        of!(Cache.node_max_bytes),
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
        "quarry_cache_segments",
        "Segments of the cache device by state: free; open, which a volume writes to; filling, which what was fetched is put into; dirty, written, of which the store lacks something; clean.",
        Source::Own(&["state"], |all, family| {
            for (state, segments) in all.cache.segments {
                family.sample(&[state], count(segments));
            }
        }),
    ),
    gauge(
        "quarry_cache_size_bytes",
        "Size of the cache device.",
        of!(Cache.size_bytes),
    ),
];
