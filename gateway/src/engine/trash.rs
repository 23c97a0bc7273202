//! The trash of all tenants: when what is in it is purged, and what that means for this host.
//!
//! Any daemon purges what is due, whoever deleted it; several at once do no harm ([`crate::trash`]).
//! What is due is judged by this host's clock and settings.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use quarry_cache::Recovered;
use quarry_objfmt::record::TrashRecord;
use quarry_objfmt::{Deleted, TenantName, VolumeId, VolumeName, keys};
use tokio::sync::Notify;

use super::quota::Wish;
use super::slot::Slot;
use super::snapshot::without_clones;
use super::tenants::Tenant;
use super::{Daemon, now_ms, registry, tenants};
use crate::backend::{HeadCell, HeadError};
use crate::control::{
    ApiError, ApiResult, ImageRef, Kind, PurgeReport, PurgeSpec, TrashInfo, TrashRef, VolumeInfo,
    VolumeRef,
};
use crate::metrics;
use crate::store::{Store, StoreError};
use crate::trash::{self, Purged, TrashError, Trashed};

/// Longest and shortest time between two looks into the trash. A look is a LIST a tenant, and a GET for
/// each volume in it.
const LOOK_MAX: Duration = Duration::from_secs(60 * 60);
const LOOK_MIN: Duration = Duration::from_secs(1);

/// How long a look at one tenant's trash may take, with all that is purged of it.
const LOOK_TIME_MAX: Duration = Duration::from_secs(10 * 60);

/// Tenants looked at side by side.
const TENANTS_AT_ONCE: usize = 16;

/// Time to the next look after one that failed.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// What this daemon does with the trash.
#[derive(Default)]
pub(super) struct Trash {
    /// Something was put into it here.
    told: Notify,
    /// Volumes in it, as of the last look.
    volumes: AtomicU64,
    purged_volumes: AtomicU64,
    purged_objects: AtomicU64,
}

impl Trash {
    pub(super) fn stats(&self) -> metrics::TrashStats {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        metrics::TrashStats {
            volumes: count(&self.volumes),
            purged_volumes: count(&self.purged_volumes),
            purged_objects: count(&self.purged_objects),
        }
    }
}

/// An error of the trash, as the API tells it.
pub(super) fn trash_error(volume: &impl std::fmt::Display, error: TrashError) -> ApiError {
    let (kind, remedy) = match &error {
        TrashError::Store(error) => return registry::store_error(error),
        TrashError::Owned { .. } => (Kind::Conflict, "detach it there first"),
        TrashError::Raced { .. } => (Kind::Conflict, "try again"),
        TrashError::Clones { clones } => {
            let remedy = without_clones(clones);
            return ApiError::new(Kind::Conflict, format!("{volume}: {error}"), remedy);
        }
        TrashError::Cloning { .. } => (Kind::Conflict, "try again in an hour"),
        TrashError::NotThere => return ApiError::not_in_trash(volume),
        TrashError::Purging => (Kind::Conflict, "make a new volume"),
        TrashError::Taken(_) => (Kind::Exists, "give it another name with --as"),
        TrashError::Restored(_) => (Kind::Conflict, "use that name"),
        TrashError::Misnamed(_) => (
            Kind::Conflict,
            "use that name; this one goes with its object below names/ in the store",
        ),
        TrashError::Restoring(_) => (Kind::Conflict, "restore it with --as that name"),
        TrashError::Nameless => (
            Kind::Conflict,
            "restore it with `quarry volume restore`, and delete it again if it is to go",
        ),
        TrashError::Headless => (
            Kind::Damaged,
            "make it anew with `quarry volume rescue NAME --id ID`, which gives the volume its name too",
        ),
        TrashError::Newer(_) => (Kind::Unsupported, "use a build of that version"),
        TrashError::Record { .. } => (Kind::Damaged, "restore the object from a copy"),
        TrashError::Stays { .. } => (
            Kind::Unsupported,
            "check the bucket for object locks and retention",
        ),
    };
    ApiError::new(kind, format!("{volume}: {error}"), remedy)
}

/// What is different with a volume that `restore` does not bring back.
const HEADLESS: &str = "its head is missing or damaged";

fn tell(tenant: &TenantName, found: &Trashed, grace_ms: u64) -> TrashInfo {
    let (record, head) = (&found.record, found.head.as_ref());
    let problem = match head.map(quarry_objfmt::Head::deleted) {
        Some(Some(Deleted::InTrash { .. })) => None,
        Some(Some(Deleted::Purging)) => Some("it is being purged"),
        Some(None) => Some("it was being restored: restore it again to finish that"),
        None => Some(HEADLESS),
    };
    TrashInfo {
        size_bytes: head.map(|head| head.size.bytes()),
        stored_bytes: head.map(|head| head.stored_bytes),
        problem: problem.map(str::to_owned),
        ..tell_record(tenant, record, found.since_ms(), grace_ms)
    }
}

fn tell_record(
    tenant: &TenantName,
    record: &TrashRecord,
    since_ms: u64,
    grace_ms: u64,
) -> TrashInfo {
    TrashInfo {
        tenant: tenant.to_string(),
        name: record.name.clone(),
        id: record.volume.to_string(),
        deleted_ms: since_ms,
        purge_ms: since_ms.saturating_add(grace_ms),
        ..TrashInfo::default()
    }
}

impl Daemon {
    fn grace_ms(&self) -> u64 {
        u64::try_from(self.config.trash.grace.as_millis()).unwrap_or(u64::MAX)
    }

    /// Puts a volume into the trash. What this host's cache has of it and the store lacks would be lost for
    /// who restores it, so it is given up only if that is said.
    pub(super) async fn delete_to_trash(
        &self,
        volume: &VolumeRef,
        discard_unsent: bool,
    ) -> ApiResult<TrashInfo> {
        let image = ImageRef::from(volume.clone());
        let slot = self.slot(&image);
        let _change = slot.change.lock().await;
        let answer = match self.may_be_deleted(&slot, &image).await {
            Ok(()) => self.delete_detached(volume, discard_unsent).await,
            Err(error) => Err(error),
        };
        self.forget_idle(&image, &slot);
        answer
    }

    async fn may_be_deleted(&self, slot: &Slot, image: &ImageRef) -> ApiResult<()> {
        let refuse = |why: &str| {
            let message = format!("{} {why}", image.volume);
            Err(ApiError::new(Kind::Conflict, message, "detach it first"))
        };
        if !slot.is_detached() {
            return refuse("is attached");
        }
        if !self.wanted.contains(image) {
            return Ok(());
        }
        let store = self.control(&image.volume.tenant).await?;
        let waits = match registry::head(&store, &image.volume).await {
            Ok(head) => self.waits_here(image, head.owner.as_ref()),
            Err(error) if error.kind == Kind::Damaged => true,
            Err(error) => return Err(error),
        };
        match waits {
            true => refuse("waits here to be attached again"),
            false => Ok(()),
        }
    }

    async fn delete_detached(
        &self,
        volume: &VolumeRef,
        discard_unsent: bool,
    ) -> ApiResult<TrashInfo> {
        let store = self.control(&volume.tenant).await?;
        let id = registry::find(&store, volume).await?;
        let keeps = self.keeps(&volume.tenant, id);
        if keeps && !discard_unsent {
            let message = format!(
                "{volume}: the cache on this host may hold writes to it that were never sent"
            );
            let remedy = "attach and detach it here, which sends them, or give them up with --discard-unsent";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let cache = self.common.device.id();
        let put = trash::put(&store, volume, id, cache, now_ms()).await;
        let record = put.map_err(|error| trash_error(volume, error))?;
        if keeps {
            let kept = self.kept.lock().get(&id).map(Recovered::data_bytes);
            tracing::warn!(%volume, bytes = kept, "given up: writes that the cache kept and that may not be in the store");
        }
        self.forget_kept(&volume.tenant, id).await;
        self.trash.told.notify_one();
        tracing::info!(%volume, %id, "put into the trash");
        let problem = match trash::look(&store, &volume.tenant, id).await {
            Ok(trash::Found::Missing | trash::Found::Damaged(_)) => Some(HEADLESS.to_owned()),
            // It is in the trash, whatever the store says now.
            _ => None,
        };
        let since_ms = record.deleted_ms;
        let told = tell_record(&volume.tenant, &record, since_ms, self.grace_ms());
        Ok(TrashInfo { problem, ..told })
    }

    async fn tenants_of(&self, only: Option<&TenantName>) -> ApiResult<Vec<TenantName>> {
        if let Some(tenant) = only {
            self.tenant(tenant).await?;
            return Ok(vec![tenant.clone()]);
        }
        registry::tenant_names(&self.home).await
    }

    pub(super) async fn show_trash(
        &self,
        tenant: Option<&TenantName>,
    ) -> ApiResult<Vec<TrashInfo>> {
        let tenants = self.tenants_of(tenant).await?;
        let looks = tenants.into_iter().map(|name| async move {
            match self.trash_of(&name).await {
                Ok(found) => Ok(found),
                // It hides no other's.
                Err(error) if tenant.is_none() => {
                    tracing::warn!(tenant = %name, %error, "its trash is not in the list");
                    Ok(Vec::new())
                }
                Err(error) => Err(error),
            }
        });
        let looks = futures::stream::iter(looks).buffered(TENANTS_AT_ONCE);
        let all: Vec<Vec<TrashInfo>> = looks.try_collect().await?;
        Ok(all.into_iter().flatten().collect())
    }

    async fn trash_of(&self, tenant: &TenantName) -> ApiResult<Vec<TrashInfo>> {
        let found = trash::list(&self.control(tenant).await?, tenant).await;
        let found = found.map_err(|error| trash_error(tenant, error))?;
        let mut of: Vec<_> = found
            .iter()
            .map(|t| tell(tenant, t, self.grace_ms()))
            .collect();
        of.sort_by_key(|info| info.deleted_ms);
        Ok(of)
    }

    pub(super) async fn restore_volume(
        &self,
        which: &TrashRef,
        name: Option<&VolumeName>,
    ) -> ApiResult<VolumeInfo> {
        let (tenant, id) = match which {
            TrashRef::Name(volume) => (volume.tenant.clone(), self.trashed(volume).await?),
            TrashRef::Id(id) => (self.whose(*id).await?, *id),
            TrashRef::Of(tenant, id) if self.has_in_trash(tenant, *id).await? => {
                (tenant.clone(), *id)
            }
            TrashRef::Of(_, id) => return Err(ApiError::not_in_trash(id)),
        };
        let of = self.tenant(&tenant).await?;
        let store = of.control();
        // Its size is not in the trash's record.
        let bytes = match HeadCell::read(&store, &tenant, id).await {
            Ok((head, _)) => head.size.bytes(),
            Err(HeadError::Store(error)) if !matches!(error, StoreError::NotFound { .. }) => {
                return Err(error.into());
            }
            // Restoring it will tell.
            Err(_) => 0,
        };
        let wish = Wish {
            what: format!("{tenant}/{id}"),
            volumes: 1,
            provisioned_bytes: bytes,
            ..Wish::default()
        };
        let admission = self.admit(&of, &wish).await?;
        let restored = trash::restore(&store, &tenant, id, name).await;
        self.settle(admission).await;
        let volume = restored.map_err(|error| match which {
            TrashRef::Name(volume) => trash_error(volume, error),
            TrashRef::Id(id) | TrashRef::Of(_, id) => trash_error(id, error),
        })?;
        tracing::info!(%volume, %id, "restored from the trash");
        self.show(&volume.into()).await
    }

    /// The deleted volume that was called `volume`.
    async fn trashed(&self, volume: &VolumeRef) -> ApiResult<VolumeId> {
        let store = self.control(&volume.tenant).await?;
        let records = trash::records(&store, &volume.tenant).await;
        let mut records = records.map_err(|error| trash_error(volume, error))?;
        records.retain(|record| record.name == volume.name.as_str());
        match &*records {
            [record] => Ok(record.volume),
            // It may have been deleted by half, and be called so still.
            [] => match registry::head(&store, volume).await {
                Ok(head) if head.deleted().is_some() => Ok(head.volume),
                Ok(_)
                | Err(ApiError {
                    kind: Kind::NotFound,
                    ..
                }) => Err(trash_error(volume, TrashError::NotThere)),
                Err(error) => Err(error),
            },
            several => {
                let ids: Vec<_> = several.iter().map(|r| r.volume.to_string()).collect();
                let message = format!("several deleted volumes were called {volume}");
                let remedy = format!("give one by its id: {}", ids.join(", "));
                Err(ApiError::new(Kind::Conflict, message, remedy))
            }
        }
    }

    /// The tenant whose trash has this volume.
    async fn whose(&self, id: VolumeId) -> ApiResult<TenantName> {
        let looks = self
            .tenants_of(None)
            .await?
            .into_iter()
            .map(|tenant| async move {
                let is_there = self.has_in_trash(&tenant, id).await;
                is_there.map(|is_there| is_there.then_some(tenant))
            });
        let mut looks = futures::stream::iter(looks).buffer_unordered(TENANTS_AT_ONCE);
        let mut failed = None;
        while let Some(look) = looks.next().await {
            match look {
                Ok(Some(tenant)) => return Ok(tenant),
                Ok(None) => {}
                // It may be another's.
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| trash_error(&id, TrashError::NotThere)))
    }

    async fn has_in_trash(&self, tenant: &TenantName, id: VolumeId) -> ApiResult<bool> {
        let key = keys::trash_key(tenant, id);
        match self.control(tenant).await?.get(&key).await {
            Ok(_) => Ok(true),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn purge_now(&self, spec: &PurgeSpec) -> ApiResult<PurgeReport> {
        let mut wanted = Vec::new();
        for info in self.show_trash(spec.tenant.as_ref()).await? {
            if spec.id.is_none_or(|id| info.id == id.to_string()) {
                wanted.push(info);
            }
        }
        if let Some(id) = spec.id.filter(|_| wanted.is_empty()) {
            return Err(trash_error(&id, TrashError::NotThere));
        }
        let objects = AtomicU64::new(0);
        let mut report = PurgeReport::default();
        for mut info in wanted {
            let (Ok(tenant), Ok(id)) = (
                TenantName::new(info.tenant.as_str()),
                VolumeId::parse(&info.id),
            ) else {
                continue;
            };
            let age_min_ms = spec.older_than_ms.unwrap_or(0);
            let tenant = self.tenant(&tenant).await?;
            match self.purge_one(&tenant, id, age_min_ms, &objects).await {
                Ok(Purged::Gone) | Err(TrashError::NotThere) => report.purged.push(info),
                Ok(Purged::NotDue { .. } | Purged::Restored) => {}
                Err(error @ TrashError::Store(_)) => return Err(trash_error(&id, error)),
                Err(error) => {
                    info.problem = Some(trash_error(&id, error).to_string());
                    report.kept.push(info);
                }
            }
        }
        report.objects = objects.into_inner();
        Ok(report)
    }

    async fn purge_one(
        &self,
        tenant: &Tenant,
        id: VolumeId,
        age_min_ms: u64,
        objects: &AtomicU64,
    ) -> Result<Purged, TrashError> {
        // One that hangs holds up no other tenant's.
        let _turn = tenant.purging.lock().await;
        let store = &tenant.lane().background();
        let before = objects.load(Ordering::Relaxed);
        let purged = trash::purge(store, &tenant.name, id, now_ms(), age_min_ms, objects).await;
        let deleted = objects.load(Ordering::Relaxed) - before;
        let total = &self.trash.purged_objects;
        total.fetch_add(deleted, Ordering::Relaxed);
        let purged = purged?;
        if purged == Purged::Gone {
            self.trash.purged_volumes.fetch_add(1, Ordering::Relaxed);
            // This host does not show it any more.
            let group = tenant.gate().group();
            self.shared.lock().evict(group, id);
            self.common.fetches.evict(group, id);
            self.forget_kept(&tenant.name, id).await;
            tracing::info!(tenant = %tenant.name, volume = %id, "purged from the trash");
        }
        Ok(purged)
    }

    /// Purges what is due, for as long as the daemon runs.
    pub async fn empty_trash(&self) {
        loop {
            let wait = match self.fit() {
                Ok(()) => self.look_into_trash().await.unwrap_or_else(|error| {
                    tracing::warn!(%error, "the trash cannot be looked into");
                    LOOK_AGAIN
                }),
                Err(_) => LOOK_AGAIN,
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.trash.told.notified() => {}
            }
        }
    }

    /// Purges what is due now, and answers when to look again. Tenants side by side: one whose store hangs holds up
    /// no other.
    async fn look_into_trash(&self) -> ApiResult<Duration> {
        let tenants = self.tenants_of(None).await?;
        let looks = futures::stream::iter(tenants).map(async |tenant| {
            let look = self.look_into_trash_of(&tenant);
            match tokio::time::timeout(LOOK_TIME_MAX, look).await {
                Ok(Ok(look)) => look,
                Ok(Err(error)) => {
                    tracing::warn!(%tenant, %error, "the tenant's trash cannot be looked into");
                    (0, LOOK_AGAIN)
                }
                // Begun again where it was.
                Err(_) => (0, LOOK_AGAIN),
            }
        });
        let looks: Vec<(u64, Duration)> = looks.buffer_unordered(TENANTS_AT_ONCE).collect().await;
        let volumes = looks.iter().map(|(volumes, _)| volumes).sum();
        self.trash.volumes.store(volumes, Ordering::Relaxed);
        let waits = looks.into_iter().map(|(_, wait)| wait);
        Ok(waits.min().unwrap_or(LOOK_MAX).clamp(LOOK_MIN, LOOK_MAX))
    }

    /// How many volumes are left in a tenant's trash, and how long until the next is due.
    async fn look_into_trash_of(&self, name: &TenantName) -> ApiResult<(u64, Duration)> {
        let grace_ms = self.grace_ms();
        let tenant = self.tenant(name).await?;
        let records = trash::records(&tenant.control(), name).await;
        let records = records.map_err(|error| trash_error(name, error))?;
        let (mut left, mut wait) = (records.len() as u64, LOOK_MAX);
        for record in records {
            let (id, mut since_ms) = (record.volume, record.deleted_ms);
            let wait_ms =
                |since_ms: u64| since_ms.saturating_add(grace_ms).saturating_sub(now_ms());
            if wait_ms(since_ms) == 0 {
                let objects = AtomicU64::new(0);
                match self.purge_one(&tenant, id, grace_ms, &objects).await {
                    Ok(Purged::NotDue { since_ms: since }) => since_ms = since,
                    Ok(Purged::Gone | Purged::Restored) | Err(TrashError::NotThere) => {
                        left -= 1;
                        continue;
                    }
                    Err(error) => {
                        // The others' time comes all the same.
                        let error = trash_error(&id, error);
                        tracing::warn!(tenant = %name, %error, "a volume of the trash is not purged");
                        continue;
                    }
                }
            }
            wait = wait.min(Duration::from_millis(wait_ms(since_ms)));
        }
        Ok((left, wait))
    }

    pub(super) async fn delete_tenant_and_trash(
        &self,
        tenant: &TenantName,
        purge: bool,
    ) -> ApiResult<()> {
        let store = self.control(tenant).await?;
        if purge {
            registry::check_no_volumes(&store, tenant).await?;
            let spec = PurgeSpec {
                tenant: Some(tenant.clone()),
                all: true,
                ..PurgeSpec::default()
            };
            if let Some(kept) = self.purge_now(&spec).await?.kept.pop() {
                let why = kept.problem.unwrap_or_default();
                let message = format!("tenant {tenant}: {} is not purged: {why}", kept.name);
                return Err(ApiError::new(Kind::Conflict, message, ""));
            }
        }
        registry::check_is_empty(&store, tenant).await?;
        let (record, _) = tenants::read(&self.home, tenant).await?;
        self.home.delete(&keys::tenant_key(tenant)).await?;
        // Who made a volume meanwhile, by what was known of the tenant, gave it its name before looking whether the tenant is still
        // there. *Crash here: such a volume is the next tenant's of that name.*
        if let Err(error) = registry::check_is_empty(&store, tenant).await {
            self.restore_tenant(tenant, record).await?;
            return Err(error);
        }
        self.forget_tenant(tenant);
        Ok(())
    }
}
