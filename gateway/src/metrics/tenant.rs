//! Metrics of tenants: on this host since it started.

use super::definition::{Definition, Source, count, counter, gauge, histogram, of};
use super::store::{StoreCall, bounds};
use crate::control::TenantUsage;
use crate::store::StoreTimes;

/// What a tenant has, may have, and asked of its store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TenantStats {
    /// Requests a second of all its volumes; 0 without a limit.
    pub limit_iops: u64,
    /// Bytes a second of all its volumes; 0 without a limit.
    pub limit_bytes: u64,
    /// 1 while it is suspended.
    pub suspended: u64,
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
    /// Attempts at requests after the first.
    pub retries: u64,
    /// Time that requests were under way.
    pub times: StoreTimes,
    /// What it has of what there are quotas for, as of the last count.
    pub usage: Option<TenantUsage>,
    /// How much of that it may have.
    pub volumes_max: Option<u64>,
    /// See `volumes_max`.
    pub snapshots_max: Option<u64>,
    /// See `volumes_max`.
    pub provisioned_max_bytes: Option<u64>,
    /// See `volumes_max`.
    pub stored_max_bytes: Option<u64>,
    /// What was not made here for a quota's sake.
    pub quota_refusals: u64,
    /// For how long its store has been failing; 0 when it is not.
    pub failing_ms: u64,
}

/// A tenant that was asked for since the start.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TenantSample {
    /// Its name.
    pub tenant: String,
    /// Requests to its store, by operation and outcome; those that there were.
    pub calls: Vec<StoreCall>,
    /// What else it counted.
    pub stats: TenantStats,
}

/// By name.
pub(super) static TABLE: &[Definition] = &[
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
        "quarry_tenant_provisioned_bytes",
        "Sizes of the tenant's volumes, all together, as of the last count: one is made when something is made under a quota, or the tenant shown.",
        Source::TenantIf(|stats| stats.usage.map(|usage| usage.provisioned_bytes)),
    ),
    gauge(
        "quarry_tenant_provisioned_max_bytes",
        "Sizes that the tenant's volumes may have, all together; absent without a quota.",
        Source::TenantIf(|stats| stats.provisioned_max_bytes),
    ),
    counter(
        "quarry_tenant_quota_refusals_total",
        "What was not made on this host for a quota's sake.",
        of!(Tenant.quota_refusals),
    ),
    gauge(
        "quarry_tenant_snapshots",
        "Snapshots of the tenant, as of the last count: one is made when something is made under a quota, or the tenant shown.",
        Source::TenantIf(|stats| stats.usage.map(|usage| usage.snapshots)),
    ),
    gauge(
        "quarry_tenant_snapshots_max",
        "Snapshots that the tenant may have; absent without a quota.",
        Source::TenantIf(|stats| stats.snapshots_max),
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
    histogram(
        "quarry_tenant_store_request_duration_seconds",
        "Time that requests to the tenant's store were under way, all operations together.",
        Source::Own(&["tenant"], |all, family| {
            let bounds = bounds();
            for t in &all.tenants {
                t.stats.times.write(&[&t.tenant], &bounds, family);
            }
        }),
    ),
    counter(
        "quarry_tenant_store_requests_total",
        "Requests to the tenant's store, by operation and outcome, those tried again included.",
        Source::Own(&["tenant", "operation", "outcome"], |all, family| {
            for t in &all.tenants {
                for c in &t.calls {
                    let labels = [t.tenant.as_str(), c.operation, c.outcome];
                    family.sample(&labels, count(c.count));
                }
            }
        }),
    ),
    counter(
        "quarry_tenant_store_retries_total",
        "Attempts at requests to the tenant's store after the first.",
        of!(Tenant.retries),
    ),
    counter(
        "quarry_tenant_store_write_bytes_total",
        "Bytes sent to the tenant's store.",
        of!(Tenant.write_bytes),
    ),
    gauge(
        "quarry_tenant_stored_bytes",
        "Bytes of the tenant's objects in the store, as of the last count: one is made when something is made under a quota, or the tenant shown.",
        Source::TenantIf(|stats| stats.usage.map(|usage| usage.stored_bytes)),
    ),
    gauge(
        "quarry_tenant_stored_max_bytes",
        "Bytes of the tenant's objects in the store at which nothing more is made; absent without a quota.",
        Source::TenantIf(|stats| stats.stored_max_bytes),
    ),
    gauge(
        "quarry_tenant_suspended",
        "1 while the tenant is suspended, and its volumes here refuse writes or wait.",
        of!(Tenant.suspended),
    ),
    gauge(
        "quarry_tenant_volumes",
        "Volumes of the tenant, as of the last count: one is made when something is made under a quota, or the tenant shown.",
        Source::TenantIf(|stats| stats.usage.map(|usage| usage.volumes)),
    ),
    gauge(
        "quarry_tenant_volumes_max",
        "Volumes that the tenant may have; absent without a quota.",
        Source::TenantIf(|stats| stats.volumes_max),
    ),
];
