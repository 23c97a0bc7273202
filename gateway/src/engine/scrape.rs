//! What `/metrics` tells: all counters, at one moment.
//!
//! Volumes are looked at on their reactors, a few at a time, so that a scrape delays nobody's requests for long.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::StreamExt as _;
use quarry_objfmt::TenantSettings;

use super::slot::Attached;
use super::tenants::Tenant;
use super::{Daemon, VolumeMachine};
use crate::control::ImageRef;
use crate::latency::Latencies;
use crate::metrics::{
    CacheStats, DaemonStats, ProcessStats, ReactorCounts, Snapshot, StoreCall, StoreStats,
    TENANTS_MAX, TenantSample, TenantStats, UploadStats, VOLUMES_MAX, VolumeSample, VolumeStats,
};
use crate::reactor::ReactorStats;
use crate::store::{Lane, Operation, Outcome, StoreSnapshot, StoreState};
use crate::tls;

/// Volumes looked at side by side.
pub(super) const LOOKS_AT_ONCE: usize = 32;

/// What a volume's reactor knows of it.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) stats: quarry_volume::VolumeStats,
    copied_bytes: u64,
    in_place_bytes: u64,
    pub(super) latencies: Latencies,
}

impl Daemon {
    pub(super) async fn snapshot(&self) -> Snapshot {
        let mut attached = self.attached();
        let waiting = self.waiting(&attached);
        let volumes_attached = attached.len();
        // Whoever has metrics keeps them when more volumes are attached.
        attached.sort_by_key(|(_, attached)| attached.since_ms);
        attached.truncate(VOLUMES_MAX);
        let looks = attached.into_iter().map(|(image, attached)| async move {
            let seen = look_at(&attached).await;
            (image, attached, seen)
        });
        let looks = futures::stream::iter(looks).buffered(LOOKS_AT_ONCE);
        let seen: Vec<_> = looks.collect().await;
        let open = seen.iter().map(|(_, _, seen)| seen.stats.open_segments);
        let open = open.sum();
        let sample = |(image, attached, seen): (ImageRef, Arc<Attached>, Seen)| {
            self.volume_sample(&image, &attached, seen)
        };
        let volumes = seen.into_iter().map(sample).collect();
        let mut tenants = self.tenants.all();
        let tenants_left_out = tenants.len().saturating_sub(TENANTS_MAX);
        tenants.truncate(TENANTS_MAX);
        let uploads = self.common.uploads.counts();
        let counts = |stats: &ReactorStats| ReactorCounts {
            batches: stats.batches.load(Ordering::Relaxed),
            requests: stats.requests.load(Ordering::Relaxed),
            volumes: stats.volumes.load(Ordering::Relaxed),
            fetches: stats.errands.load(Ordering::Relaxed),
            fetches_handed_over: stats.errands_handed_over.load(Ordering::Relaxed),
        };
        let reactors = self.reactors.lock();
        Snapshot {
            volumes,
            tenants: tenants.iter().map(|t| self.tenant_sample(t)).collect(),
            uploads: UploadStats {
                in_flight: uploads.held as u64,
                slow: uploads.slow as u64,
                waiting: uploads.waiting as u64,
            },
            reactors: reactors.iter().map(|r| counts(r.stats())).collect(),
            cache: self.cache_stats(open),
            store: self.store_stats(),
            trash: self.trash.stats(),
            audit: self.access.audit_stats(),
            nbd: self.nbd_clients.stats(),
            daemon: DaemonStats {
                ready: u64::from(self.readiness().is_ok()),
                volumes_attached: volumes_attached as u64,
                volumes_waiting: waiting as u64,
                certificate_expiry_s: self.certificate_expiry_s(),
                volumes_left_out: volumes_attached.saturating_sub(VOLUMES_MAX) as u64,
                tenants_left_out: tenants_left_out as u64,
            },
            traces: self.common.tracer.as_ref().map(|tracer| tracer.stats()),
            process: ProcessStats::of_this(self.started_ms),
        }
    }

    /// Of what is in the file: a changed one is in use within seconds, or told of in the log.
    fn certificate_expiry_s(&self) -> Option<u64> {
        tls::expiry::of_file(self.config.access.tls_cert.as_ref()?)
    }

    /// How much is to be attached and is not.
    pub(super) fn waiting(&self, attached: &[(ImageRef, Arc<Attached>)]) -> usize {
        let here: BTreeSet<&ImageRef> = attached.iter().map(|(image, _)| image).collect();
        let wanted = self.wanted.all().into_iter();
        wanted.filter(|(image, _)| !here.contains(image)).count()
    }

    fn volume_sample(&self, image: &ImageRef, attached: &Attached, seen: Seen) -> VolumeSample {
        let (s, backend) = (seen.stats, &attached.backend);
        let requests = self.requests(&attached.account);
        let (space, reclaimed) = (backend.space(), backend.reclaimed());
        let (fetched, condition) = (backend.fetched(), backend.condition());
        let (limits, rates) = (attached.gate.stats(), attached.gate.rates());
        let stats = VolumeStats {
            size_bytes: backend.head().get().size.bytes(),
            reads: s.reads,
            read_bytes: s.read_bytes,
            writes: s.writes,
            write_bytes: s.write_bytes,
            flushes: s.flushes,
            discards: s.discards,
            errors: s.errors,
            hit_bytes: s.hit_bytes,
            miss_bytes: s.miss_bytes,
            copied_bytes: seen.copied_bytes,
            in_place_bytes: seen.in_place_bytes + s.direct_bytes,
            direct_reads: s.direct_reads,
            direct_bytes: s.direct_bytes,
            direct_fallbacks: s.direct_fallbacks,
            zero_fill_bytes: s.zero_bytes,
            dirty_bytes: s.dirty_bytes,
            rpo_ms: s.rpo_ms,
            cached_bytes: self.cached_bytes(attached),
            uploaded_bytes: s.uploaded_bytes,
            uploaded_chunks: s.uploaded_chunks,
            checkpoints: s.checkpoints,
            map_bytes: backend.stored().1,
            stored_bytes: backend.stored().0,
            live_bytes: space.live,
            debt_bytes: space.debt,
            dead_bytes: space.dead,
            pinned_bytes: space.pinned,
            compacted_bytes: reclaimed.moved_bytes,
            deleted_bytes: reclaimed.deleted_bytes,
            deleted_objects: reclaimed.deleted_objects,
            orphans_deleted: backend.orphans_deleted(),
            fetched_bytes: fetched.bytes + s.direct_bytes,
            fetches: fetched.gets + s.direct_reads,
            shared_bytes: fetched.shared_bytes,
            readahead_bytes: s.readahead_bytes,
            warmed_bytes: s.warmed_bytes,
            store_requests: requests.count(),
            store_cost_micros: requests.cost_micros(),
            held: limits.held,
            held_total: limits.held_total,
            held_ms: limits.held_ms,
            limit_iops: rates.iops.unwrap_or(0),
            limit_bytes: rates.bandwidth_bytes.unwrap_or(0),
            in_flight: s.in_flight,
            epoch: backend.head().epoch().get().into(),
            damaged_objects: condition.damaged,
            fenced: u64::from(condition.fenced),
            stalled: u64::from(s.stalled),
            failed: u64::from(condition.problem.is_some()),
        };
        VolumeSample {
            tenant: image.volume.tenant.to_string(),
            volume: image.short_name(),
            via: attached.info.via.as_str(),
            mode: attached.mode,
            latencies: seen.latencies,
            stats,
        }
    }

    fn tenant_sample(&self, tenant: &Arc<Tenant>) -> TenantSample {
        let (gate, account) = (tenant.gate(), tenant.account().snapshot());
        let requests = self.requests(tenant.account());
        let limits = gate.rates();
        let (dirty_bytes, cache_bytes) = {
            let cache = &self.shared.lock().cache;
            let group = gate.group();
            (
                cache.dirty_bytes_of_group(group),
                cache.bytes_of_group(group),
            )
        };
        let TenantSettings {
            volumes_max,
            snapshots_max,
            provisioned_bytes_max,
            stored_bytes_max,
            ..
        } = tenant.record().settings;
        let quota = tenant.quota_seen();
        TenantSample {
            tenant: tenant.name.to_string(),
            calls: calls(&account),
            stats: TenantStats {
                limit_iops: limits.iops.unwrap_or(0),
                limit_bytes: limits.bandwidth_bytes.unwrap_or(0),
                suspended: tenant.gate().is_suspended().into(),
                dirty_bytes,
                cache_bytes,
                read_bytes: account.bytes_read,
                write_bytes: account.bytes_written,
                cost_micros: requests.cost_micros(),
                retries: account.retries,
                times: account.all_times(),
                usage: quota.usage,
                volumes_max,
                snapshots_max,
                provisioned_max_bytes: provisioned_bytes_max,
                stored_max_bytes: stored_bytes_max,
                quota_refusals: quota.refusals,
                failing_ms: failing_ms(&tenant.site.lane),
            },
        }
    }

    fn cache_stats(&self, open: u64) -> CacheStats {
        let (counts, nodes, index_bytes) = {
            let shared = self.shared.lock();
            let index_bytes = shared.cache.index_bytes();
            (shared.cache.counts(), shared.nodes.stats(), index_bytes)
        };
        let kept_writes = self.common.kept_writes.stats();
        let bytes = |segments: u32| u64::from(segments) * u64::from(counts.segment_size);
        // The looks at the volumes are a little older.
        let open = open.min(counts.dirty.into());
        let (dirty, filling) = (u64::from(counts.dirty) - open, u64::from(counts.filling));
        CacheStats {
            size_bytes: bytes(counts.total),
            dirty_bytes: bytes(counts.dirty),
            dirty_max_bytes: bytes(counts.dirty_max),
            clean_bytes: bytes(counts.clean),
            segments: [
                ("free", counts.free.into()),
                ("open", open),
                ("filling", filling),
                ("dirty", dirty),
                ("clean", u64::from(counts.clean) - filling),
            ],
            reclaims: counts.reclaimed,
            found_bytes: self.index.found_bytes(),
            index_bytes,
            node_bytes: nodes.bytes as u64,
            node_max_bytes: nodes.budget as u64,
            kept_write_bytes: kept_writes.bytes,
            kept_write_used_bytes: kept_writes.used_bytes,
            node_hits: nodes.hits,
            node_misses: nodes.misses,
        }
    }

    /// What was asked of each store, once, however many tenants are in it.
    pub(super) fn store_counts(&self) -> StoreSnapshot {
        let mut store = self.lane.stats().snapshot();
        store.add(&self.tenants.own_counts());
        store
    }

    fn store_stats(&self) -> StoreStats {
        let store = self.store_counts();
        let times = Operation::ALL.map(|o| (o.as_str(), *store.times(o)));
        StoreStats {
            read_bytes: store.bytes_read,
            write_bytes: store.bytes_written,
            retries: store.retries,
            in_flight: store.in_flight,
            waiting: store.waiting,
            failing_ms: failing_ms(&self.lane),
            calls: calls(&store),
            times: times.to_vec(),
        }
    }
}

/// A volume's counters; none if it has just been taken away.
pub(super) async fn look_at(attached: &Attached) -> Seen {
    let (reactor, key) = attached.backend.place();
    let look = |m: &VolumeMachine| Seen {
        stats: m.volume.stats(),
        copied_bytes: m.copied_bytes,
        in_place_bytes: m.in_place_bytes,
        latencies: m.latencies.clone(),
    };
    let seen = reactor.inspect(key, look).await;
    seen.ok().flatten().unwrap_or_default()
}

/// The requests that there were, by operation and outcome.
fn calls(account: &StoreSnapshot) -> Vec<StoreCall> {
    let kinds = Operation::ALL.into_iter();
    let kinds = kinds.flat_map(|operation| Outcome::ALL.map(|outcome| (operation, outcome)));
    let call = |(operation, outcome): (Operation, Outcome)| StoreCall {
        operation: operation.as_str(),
        outcome: outcome.as_str(),
        count: account.attempts(operation, outcome),
    };
    kinds.map(call).filter(|call| call.count > 0).collect()
}

/// For how long a way to a store has been failing.
fn failing_ms(lane: &Lane) -> u64 {
    match lane.health().state() {
        StoreState::Healthy => 0,
        StoreState::Failing { lasting, .. } => {
            u64::try_from(lasting.as_millis()).unwrap_or(u64::MAX)
        }
    }
}
