//! What `show` and `status` tell.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt as _;
use quarry_objfmt::head::Head;
use quarry_objfmt::{TenantName, WriteSeq};
use quarry_volume::VolumeStats;

use super::keys::data_keys;
use super::rates::limits_info;
use super::slot::{Attached, Slot};
use super::snapshot::no_snapshot;
use super::tenancy::status_of;
use super::{Daemon, VolumeMachine, not_attached, registry};
use crate::backend::HeadCell;
use crate::backend::open::OpenError;
use crate::control::{
    ApiResult, AttachedInfo, CacheStatus, ImageRef, Kind, OwnerInfo, ParentInfo, RatesSpec,
    SegmentsInfo, State, StatusInfo, VolumeInfo, VolumeRef, if_found,
};
use crate::qos::Passage;

/// How long the store is waited for whose a volume is, where all else is known here.
const OWNER_WAIT_MAX: Duration = Duration::from_secs(2);

/// What is told of a volume that is attached here, and in no list of the store's any more.
const DELETED_ELSEWHERE: &str = "it was deleted elsewhere, and can be read until it is purged";

/// Volumes shown side by side, each by two reads of its store at most.
const SHOWN_AT_ONCE: usize = 16;

/// What a volume on its reactor says of itself.
#[derive(Default)]
struct Look {
    stats: VolumeStats,
    /// Bytes of its requests that passed through the daemon's memory.
    copied_bytes: u64,
    newest_write: WriteSeq,
}

impl Daemon {
    async fn look(&self, attached: &Attached) -> Look {
        let (reactor, key) = attached.backend.place();
        let look = |m: &VolumeMachine| Look {
            stats: m.volume.stats(),
            copied_bytes: m.copied_bytes,
            newest_write: m.volume.last_acknowledged(),
        };
        let look = reactor.inspect(key, look).await;
        look.ok().flatten().unwrap_or_default()
    }

    /// Whether writes of a volume wait for the store.
    pub(super) async fn is_stalled(&self, attached: &Attached) -> bool {
        self.look(attached).await.stats.stalled
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
        // Whose it is now, and whether it still is, this host was not told: of a volume that it only reads, or that was taken
        // from it.
        let mut is_gone = false;
        if let Some(attached) = &attached
            && (attached.read_only || attached.backend.condition().fenced)
            && !image.is_past()
        {
            let id = head.volume;
            let asked = async {
                let store = self.control(&volume.tenant).await?;
                let named = if_found(registry::find(&store, volume).await)?;
                // Another may have its name.
                if named != Some(id) {
                    return Ok(None);
                }
                match HeadCell::read(&store, &volume.tenant, id).await {
                    Ok((now, _)) => Ok(Some(now)),
                    Err(error) => Err(registry::head_error(volume, &error)),
                }
            };
            match tokio::time::timeout(OWNER_WAIT_MAX, asked).await {
                Ok(Ok(Some(now))) => {
                    is_gone = now.deleted().is_some();
                    head.owner = now.owner;
                }
                Ok(Ok(None)) => is_gone = true,
                Ok(Err(_)) | Err(_) => {}
            }
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
            newest_write: head.root_write.get(),
            parent: self.parent(volume, &head, attached.as_deref()).await,
            snapshots: head.snapshots.len() as u64,
            retain_ms: head.retain_ms,
            state: match slot.state() {
                State::Detached if self.waits_here(image, owner) => State::Attaching,
                State::Detached if !image.is_past() && owner.is_some_and(elsewhere) => {
                    State::AttachedElsewhere
                }
                state => state,
            },
            owner: owner.map(|o| OwnerInfo {
                host: o.shown_host(),
                cache: o.cache.to_string(),
                since_ms: o.since_ms,
            }),
            problem: self.wanted.problem(image).or(deleted),
            ..VolumeInfo::default()
        };
        if !image.is_past() && attached.as_ref().is_none_or(|attached| attached.read_only) {
            info.kept_bytes = self.kept_bytes(&volume.tenant, head.volume);
        }
        let Some(attached) = attached else {
            return Ok(info);
        };
        let Look {
            stats,
            copied_bytes,
            newest_write,
        } = self.look(&attached).await;
        info.newest_write = info.newest_write.max(newest_write.get());
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
        let gone = is_gone.then(|| DELETED_ELSEWHERE.to_owned());
        info.problem = problem_of(&attached).or(gone);
        Ok(info)
    }

    /// Shows them side by side. Of all tenants' volumes one whose store does not answer is shown with what is wrong, and so is
    /// one that waits here.
    pub(super) async fn show_all(
        &self,
        images: Vec<ImageRef>,
        of_one_tenant: bool,
    ) -> ApiResult<Vec<VolumeInfo>> {
        let shows = images.into_iter().map(|image| async move {
            let waits = self.wanted.contains(&image) && !self.is_attached(&image);
            let shown = match waits {
                // That it does is known without its store.
                true => self.show_waiting(&image).await,
                false => self.show(&image).await,
            };
            match shown {
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

    /// A volume that waits here to be attached; without an answer of its store, what is known here.
    async fn show_waiting(&self, image: &ImageRef) -> ApiResult<VolumeInfo> {
        match tokio::time::timeout(OWNER_WAIT_MAX, self.show(image)).await {
            Ok(Err(error)) if !matches!(error.kind, Kind::Unavailable | Kind::Denied) => Err(error),
            Ok(Ok(info)) => Ok(info),
            Ok(Err(_)) | Err(_) => Ok(VolumeInfo {
                tenant: image.volume.tenant.to_string(),
                name: image.volume.name.to_string(),
                snapshot: image.behind(),
                state: State::Attaching,
                problem: self.wanted.problem(image),
                ..VolumeInfo::default()
            }),
        }
    }

    /// The snapshot that a volume was cloned from, by its volume's name if that can be had.
    async fn parent(
        &self,
        volume: &VolumeRef,
        head: &Head,
        attached: Option<&Attached>,
    ) -> Option<ParentInfo> {
        let parent = head.parent.as_ref()?;
        let store = match attached {
            Some(attached) => attached.tenant.control(),
            None => self.control(&volume.tenant).await.ok()?,
        };
        let name = match HeadCell::read(&store, &volume.tenant, parent.volume).await {
            Ok((head, _)) => format!("{}/{}", head.tenant, head.name),
            Err(_) => parent.volume.to_string(),
        };
        Some(ParentInfo {
            volume: name,
            snapshot: parent.snapshot.clone(),
        })
    }

    /// Clean data of a volume on the cache device.
    pub(super) fn cached_bytes(&self, attached: &Attached) -> u64 {
        let (volume, group) = (attached.backend.volume(), attached.tenant.gate().group());
        self.shared.lock().cache.clean(group).bytes_of(volume)
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
            Ok(features) => format!("available (features {:#x})", features.bits()),
            Err(error) => error.to_string(),
        };
        let attached = self.attached();
        let failing = attached
            .iter()
            .filter(|(_, a)| a.backend.condition().problem.is_some());
        let not_ready = self.readiness().err();
        let (store, uploads) = (self.store_counts(), self.common.uploads.counts());
        let mut tenant_stores = Vec::new();
        self.tenants.each_own_site(|site| {
            let status = status_of(site);
            if !status.healthy {
                tenant_stores.push(status);
            }
        });
        StatusInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.host.clone(),
            pid: std::process::id(),
            started_ms: self.started_ms,
            ready: not_ready.is_none(),
            not_ready,
            store: status_of(self.tenants.home()),
            tenant_stores,
            store_calls: store.in_flight,
            store_calls_waiting: store.waiting,
            uploads: (uploads.held + uploads.slow) as u64,
            uploads_waiting: uploads.waiting as u64,
            cache: CacheStatus {
                path: self.config.cache_path().display().to_string(),
                id: self.common.device.id().to_string(),
                size_bytes: bytes(counts.total),
                dirty_bytes: bytes(counts.dirty),
                dirty_max_bytes: bytes(counts.dirty_max),
                clean_bytes: bytes(counts.clean),
                encrypted: self.config.cache.encrypt,
                segment_bytes: counts.segment_size.into(),
                segments: SegmentsInfo {
                    free: counts.free.into(),
                    dirty: counts.dirty.into(),
                    filling: counts.filling.into(),
                    clean: counts.clean.saturating_sub(counts.filling).into(),
                },
            },
            volumes_attached: attached.len() as u64,
            volumes_waiting: self.waiting(&attached) as u64,
            volumes_failing: (failing.count() + self.wanted.failing()) as u64,
            ublk,
            nbd_socket: self.config.nbd_socket().display().to_string(),
            audit_problem: None,
        }
    }
}

/// What is wrong with what is attached here, in a sentence.
pub(super) fn problem_of(attached: &Attached) -> Option<String> {
    let problem = attached.backend.condition().problem;
    let suspended = suspension(attached.gate.passage(), attached.read_only);
    match (problem, suspended) {
        (Some(problem), Some(suspended)) => Some(format!("{problem}; {suspended}")),
        (problem, suspended) => problem.or(suspended.map(str::to_owned)),
    }
}

/// What its tenant's suspension does to a volume.
const fn suspension(passage: Passage, read_only: bool) -> Option<&'static str> {
    match passage {
        Passage::Stalled => Some("its tenant is suspended: its requests wait"),
        Passage::ReadOnly if !read_only => Some("its tenant is suspended: it takes no writes"),
        Passage::ReadOnly | Passage::Open => None,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suspension_is_told_of_where_it_changes_something() {
        for read_only in [false, true] {
            assert_eq!(suspension(Passage::Open, read_only), None);
            let stalled = suspension(Passage::Stalled, read_only);
            assert!(stalled.is_some_and(|words| words.contains("wait")));
            let takes_none = suspension(Passage::ReadOnly, read_only);
            assert_eq!(takes_none.is_some(), !read_only);
        }
    }
}
