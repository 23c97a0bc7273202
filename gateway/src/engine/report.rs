//! What `show`, `status` and `/metrics` tell.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::StreamExt as _;
use quarry_objfmt::head::Head;
use quarry_objfmt::{TenantName, keys};
use quarry_volume::VolumeStats;

use super::keys::data_keys;
use super::rates::limits_info;
use super::slot::{Attached, Slot};
use super::snapshot::no_snapshot;
use super::tenancy::status_of;
use super::tenants::Tenant;
use super::{Daemon, VolumeMachine, not_attached, registry};
use crate::backend::HeadCell;
use crate::backend::open::OpenError;
use crate::control::{
    ApiResult, AttachedInfo, CacheStatus, ImageRef, Kind, OwnerInfo, ParentInfo, RatesSpec, State,
    StatusInfo, VolumeInfo, VolumeRef,
};
use crate::metrics;
use crate::reactor::ReactorStats;
use crate::store::{Lane, Operation, Outcome, StoreState};

/// Volumes shown side by side, each by two reads of its store at most.
const SHOWN_AT_ONCE: usize = 16;

impl Daemon {
    /// A volume's counters, and the bytes of its requests that passed through the daemon's memory.
    async fn stats(&self, attached: &Attached) -> (VolumeStats, u64) {
        let (reactor, key) = attached.backend.place();
        let look = |m: &VolumeMachine| (m.volume.stats(), m.copied_bytes);
        let stats = reactor.inspect(key, look).await;
        stats.ok().flatten().unwrap_or_default()
    }

    /// Never waits for a call that changes the volume.
    pub(super) async fn show(&self, image: &ImageRef) -> ApiResult<VolumeInfo> {
        let slot = self.slots.lock().get(image).cloned().unwrap_or_default();
        let attached = slot.stage().attached().cloned();
        let volume = &image.volume;
        if image.at.is_some() && attached.is_none() && !self.wanted.contains(image) {
            return Err(not_attached(image));
        }
        let (mut head, rates) = match &attached {
            Some(attached) => (attached.backend.head().get(), attached.gate.rates()),
            None => {
                let store = self.control(&volume.tenant).await?;
                registry::head_and_rates(&store, volume).await?
            }
        };
        if let (Some(name), None) = (&image.snapshot, &attached) {
            let mut all = head.snapshots.iter();
            let found = all.find(|s| s.name == name.as_str());
            head.size = found.ok_or_else(|| no_snapshot(image))?.size;
        }
        let owner = head.owner.as_ref().filter(|_| head.deleted().is_none());
        let elsewhere = |o: &quarry_objfmt::Owner| o.cache != self.common.device.id();
        let deleted = head.deleted().map(|_| OpenError::Deleted.to_string());
        let mut info = VolumeInfo {
            tenant: volume.tenant.to_string(),
            name: volume.name.to_string(),
            snapshot: image.behind(),
            id: head.volume.to_string(),
            created_ms: head.created_ms,
            size_bytes: head.size.bytes(),
            sector_size: head.sector_size,
            durability: head.durability,
            compression: head.compression,
            rates: if image.is_past() {
                RatesSpec::default()
            } else {
                rates.into()
            },
            encryption: head.encryption,
            key: head.keys.newest(head.volume).map(|key| key.by.to_string()),
            data_keys: match image.is_past() {
                true => Vec::new(),
                false => data_keys(&head, attached.as_ref().map(|a| &*a.backend)),
            },
            stored_bytes: head.stored_bytes,
            parent: self.parent(volume, &head, attached.as_deref()).await,
            snapshots: head.snapshots.len() as u64,
            retain_ms: head.retain_ms,
            state: match slot.state() {
                // What is past is nobody's.
                State::Detached if image.is_past() => State::Detached,
                State::Detached if owner.is_some_and(elsewhere) => State::AttachedElsewhere,
                state => state,
            },
            owner: owner.map(|o| OwnerInfo {
                host: o.host.clone(),
                cache: o.cache.to_string(),
                since_ms: o.since_ms,
            }),
            problem: self.wanted.problem(image).or(deleted),
            ..VolumeInfo::default()
        };
        let Some(attached) = attached else {
            return Ok(info);
        };
        let (stats, copied_bytes) = self.stats(&attached).await;
        info.attached = Some(attached_info(&attached));
        info.limits = Some(limits_info(&attached.gate));
        let read = stats.hit_bytes + stats.miss_bytes;
        info.dirty_bytes = stats.dirty_bytes;
        info.rpo_ms = stats.rpo_ms;
        info.stored_bytes = attached.backend.stored().0;
        let space = attached.backend.space();
        (info.live_bytes, info.debt_bytes) = (space.live, space.debt);
        (info.dead_bytes, info.pinned_bytes) = (space.dead, space.pinned);
        let reclaimed = attached.backend.reclaimed();
        info.compacted_bytes = reclaimed.moved_bytes;
        info.deleted_bytes = reclaimed.deleted_bytes;
        info.cached_bytes = self.cached_bytes(&attached);
        (info.reads, info.read_bytes) = (stats.reads, stats.read_bytes);
        (info.writes, info.write_bytes) = (stats.writes, stats.write_bytes);
        (info.flushes, info.discards) = (stats.flushes, stats.discards);
        (info.hit_bytes, info.miss_bytes) = (stats.hit_bytes, stats.miss_bytes);
        #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
        let ratio = (read > 0).then(|| stats.hit_bytes as f64 / read as f64);
        info.copied_bytes = copied_bytes;
        (info.direct_bytes, info.direct_fallbacks) = (stats.direct_bytes, stats.direct_fallbacks);
        info.hit_ratio = ratio;
        info.uploaded_bytes = stats.uploaded_bytes;
        info.stalled = stats.stalled;
        info.requests = Some(self.requests(&attached.account));
        info.problem = attached.backend.condition().problem;
        Ok(info)
    }

    /// Shows them side by side. Of all tenants' volumes one whose store does not answer is shown with what is wrong.
    pub(super) async fn show_all(
        &self,
        images: Vec<ImageRef>,
        of_one_tenant: bool,
    ) -> ApiResult<Vec<VolumeInfo>> {
        let shows = images.into_iter().map(|image| async move {
            match self.show(&image).await {
                Ok(info) => Ok(Some(info)),
                // It may just have been detached, or its volume be deleted.
                Err(_) if image.is_past() => Ok(None),
                Err(error) if of_one_tenant || error.kind == Kind::Internal => Err(error),
                Err(error) => Ok(Some(VolumeInfo {
                    tenant: image.volume.tenant.to_string(),
                    name: image.volume.name.to_string(),
                    state: State::Unknown,
                    problem: Some(error.to_string()),
                    ..VolumeInfo::default()
                })),
            }
        });
        let shown = futures::stream::iter(shows).buffered(SHOWN_AT_ONCE);
        let shown: Vec<ApiResult<Option<VolumeInfo>>> = shown.collect().await;
        shown.into_iter().filter_map(Result::transpose).collect()
    }

    /// The snapshot that a volume was cloned from, by its volume's name if that can be had.
    async fn parent(
        &self,
        volume: &VolumeRef,
        head: &Head,
        attached: Option<&Attached>,
    ) -> Option<ParentInfo> {
        let parent = head.parent.as_ref()?;
        let key = keys::head_key(&volume.tenant, parent.volume);
        let store = match attached {
            Some(attached) => attached.tenant.control(),
            None => self.control(&volume.tenant).await.ok()?,
        };
        let name = match HeadCell::read(&store, &key).await {
            Ok((head, _)) => format!("{}/{}", head.tenant, head.name),
            Err(_) => parent.volume.to_string(),
        };
        Some(ParentInfo {
            volume: name,
            snapshot: parent.snapshot.clone(),
        })
    }

    /// Clean data of a volume on the cache device.
    fn cached_bytes(&self, attached: &Attached) -> u64 {
        let volume = attached.backend.volume();
        self.shared.lock().cache.clean().bytes_of(volume)
    }

    /// What is attached, or is to be, of volumes as they were at a time.
    pub(super) fn past_images(&self, tenant: Option<&TenantName>) -> Vec<ImageRef> {
        let of_tenant = |image: &ImageRef| tenant.is_none_or(|t| *t == image.volume.tenant);
        let wanted = self.wanted.all().into_iter().map(|(image, _)| image);
        wanted
            .filter(|image| image.at.is_some() && of_tenant(image))
            .collect()
    }

    pub(super) fn attached(&self) -> Vec<(ImageRef, Arc<Attached>)> {
        let slots: Vec<(ImageRef, Arc<Slot>)> = self
            .slots
            .lock()
            .iter()
            .map(|(v, s)| (v.clone(), Arc::clone(s)))
            .collect();
        let attached = |(v, s): (ImageRef, Arc<Slot>)| Some((v, s.stage().attached().cloned()?));
        slots.into_iter().filter_map(attached).collect()
    }

    pub(super) async fn tell_status(&self) -> StatusInfo {
        let counts = self.shared.lock().cache.counts();
        let bytes = |segments: u32| u64::from(segments) * u64::from(counts.segment_size);
        let ublk = match self.ublk.probe().await {
            Ok(_) => "available".to_owned(),
            Err(error) => error.to_string(),
        };
        let attached = self.attached();
        let failing = attached
            .iter()
            .filter(|(_, a)| a.backend.condition().problem.is_some());
        let not_ready = self.readiness().err();
        StatusInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.host.clone(),
            pid: std::process::id(),
            started_ms: self.started_ms,
            ready: not_ready.is_none(),
            not_ready,
            store: status_of(self.tenants.home()),
            cache: CacheStatus {
                path: self.config.cache_path().display().to_string(),
                id: self.common.device.id().to_string(),
                size_bytes: bytes(counts.total),
                dirty_bytes: bytes(counts.dirty),
                dirty_max_bytes: bytes(counts.dirty_max),
                clean_bytes: bytes(counts.clean),
                encrypted: self.config.cache.encrypt,
            },
            volumes_attached: attached.len() as u64,
            volumes_failing: (failing.count() + self.wanted.failing()) as u64,
            ublk,
            nbd_socket: self.config.nbd_socket().display().to_string(),
            audit_problem: None,
        }
    }

    pub(super) async fn snapshot(&self) -> metrics::Snapshot {
        let mut volumes = Vec::new();
        for (volume, attached) in self.attached() {
            let requests = self.requests(&attached.account);
            let (s, copied_bytes) = self.stats(&attached).await;
            let (space, reclaimed) = (attached.backend.space(), attached.backend.reclaimed());
            let fetched = attached.backend.fetched();
            let (limits, rates) = (attached.gate.stats(), attached.gate.rates());
            let of = metrics::VolumeStats {
                size_bytes: attached.backend.head().get().size.bytes(),
                reads: s.reads,
                read_bytes: s.read_bytes,
                writes: s.writes,
                write_bytes: s.write_bytes,
                flushes: s.flushes,
                discards: s.discards,
                errors: s.errors,
                hit_bytes: s.hit_bytes,
                miss_bytes: s.miss_bytes,
                copied_bytes,
                direct_reads: s.direct_reads,
                direct_bytes: s.direct_bytes,
                direct_fallbacks: s.direct_fallbacks,
                zero_fill_bytes: s.zero_bytes,
                dirty_bytes: s.dirty_bytes,
                rpo_ms: s.rpo_ms,
                cached_bytes: self.cached_bytes(&attached),
                uploaded_bytes: s.uploaded_bytes,
                uploaded_chunks: s.uploaded_chunks,
                checkpoints: s.checkpoints,
                map_bytes: attached.backend.stored().1,
                stored_bytes: attached.backend.stored().0,
                live_bytes: space.live,
                debt_bytes: space.debt,
                dead_bytes: space.dead,
                pinned_bytes: space.pinned,
                compacted_bytes: reclaimed.moved_bytes,
                deleted_bytes: reclaimed.deleted_bytes,
                deleted_objects: reclaimed.deleted_objects,
                orphans_deleted: attached.backend.orphans_deleted(),
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
                stalled: u64::from(s.stalled),
                failed: u64::from(attached.backend.condition().problem.is_some()),
            };
            volumes.push(metrics::VolumeSample {
                tenant: volume.volume.tenant.to_string(),
                volume: volume.short_name(),
                via: attached.info.via.as_str(),
                mode: attached.mode,
                stats: of,
            });
        }
        let reactors = self.reactors.lock();
        let counts = |stats: &ReactorStats| metrics::ReactorCounts {
            batches: stats.batches.load(Ordering::Relaxed),
            requests: stats.requests.load(Ordering::Relaxed),
            volumes: stats.volumes.load(Ordering::Relaxed),
        };
        let reactors = reactors.iter().map(|r| counts(r.stats())).collect();
        let (counts, nodes) = {
            let shared = self.shared.lock();
            (shared.cache.counts(), shared.nodes.stats())
        };
        let bytes = |segments: u32| u64::from(segments) * u64::from(counts.segment_size);
        let uploads = self.common.uploads.counts();
        let mut store = self.lane.stats().snapshot();
        // Each store once, however many tenants are in it.
        self.tenants
            .each_own_site(|site| store.add(&site.lane.stats().snapshot()));
        let tenants = self.tenant_samples();
        metrics::Snapshot {
            volumes,
            tenants,
            uploads: metrics::UploadStats {
                in_flight: uploads.held as u64,
                slow: uploads.slow as u64,
                waiting: uploads.waiting as u64,
            },
            reactors,
            cache: metrics::CacheStats {
                size_bytes: bytes(counts.total),
                dirty_bytes: bytes(counts.dirty),
                dirty_max_bytes: bytes(counts.dirty_max),
                clean_bytes: bytes(counts.clean),
                segments_free: u64::from(counts.free),
                segments_used: u64::from(counts.total - counts.free),
                reclaims: counts.reclaimed,
                node_bytes: nodes.bytes as u64,
                node_hits: nodes.hits,
                node_misses: nodes.misses,
            },
            trash: self.trash.stats(),
            audit: self.access.audit_stats(),
            store: metrics::StoreStats {
                read_bytes: store.bytes_read,
                write_bytes: store.bytes_written,
                retries: store.retries,
                in_flight: store.in_flight,
                waiting: store.waiting,
                failing_ms: failing_ms(&self.lane),
                calls: Operation::ALL
                    .iter()
                    .flat_map(|operation| Outcome::ALL.iter().map(move |o| (*operation, *o)))
                    .map(|(operation, outcome)| metrics::StoreCall {
                        operation: operation.as_str(),
                        outcome: outcome.as_str(),
                        count: store.attempts(operation, outcome),
                    })
                    .filter(|call| call.count > 0)
                    .collect(),
                busy: Operation::ALL
                    .iter()
                    .map(|operation| (operation.as_str(), store.busy(*operation)))
                    .collect(),
            },
        }
    }
}

impl Daemon {
    fn tenant_samples(&self) -> Vec<metrics::TenantSample> {
        let sample = |tenant: Arc<Tenant>| {
            let (gate, requests) = (tenant.gate(), self.requests(tenant.account()));
            let limits = gate.rates();
            let (dirty_bytes, cache_bytes) = {
                let cache = &self.shared.lock().cache;
                let group = gate.group();
                (
                    cache.dirty_bytes_of_group(group),
                    cache.bytes_of_group(group),
                )
            };
            metrics::TenantSample {
                tenant: tenant.name.to_string(),
                calls: vec![
                    ("put", requests.puts),
                    ("get", requests.gets),
                    ("list", requests.lists),
                    ("delete", requests.deletes),
                ],
                stats: metrics::TenantStats {
                    limit_iops: limits.iops.unwrap_or(0),
                    limit_bytes: limits.bandwidth_bytes.unwrap_or(0),
                    dirty_bytes,
                    cache_bytes,
                    read_bytes: requests.read_bytes,
                    write_bytes: requests.written_bytes,
                    cost_micros: requests.cost_micros(),
                    failing_ms: failing_ms(&tenant.site.lane),
                },
            }
        };
        self.tenants.all().into_iter().map(sample).collect()
    }
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

/// How a volume or a snapshot is attached here.
pub(super) fn attached_info(attached: &Attached) -> AttachedInfo {
    AttachedInfo {
        via: attached.info.via,
        device: attached.info.device.clone(),
        link: attached.info.link.clone(),
        uri: attached.info.uri.clone(),
        mode: attached.mode.to_owned(),
        queues: attached.queues,
        size_bytes: attached.shown.load(Ordering::Relaxed),
        epoch: attached.backend.head().epoch().get(),
        since_ms: attached.since_ms,
        read_only: attached.read_only,
        device_owner: attached.access.owner.as_ref().map(|o| o.name.to_string()),
        device_mode: attached.access.mode.map(|mode| mode.to_string()),
        direct_reads: attached.direct == Some(Ok(())),
        direct_reads_refused: attached.direct.clone().and_then(Result::err),
    }
}
