//! The engine as a tenant sees it: one in which there are no others.
//!
//! **Invariant:** no call names another tenant to the engine within, and none that looks at all tenants
//! reaches it. So what a tenant is told, errors included, is made of its own things, and takes as long for
//! another's name as for one that nobody has.

use std::sync::Arc;

use async_trait::async_trait;
use quarry_config::TenantAttach;
use quarry_objfmt::{KeyName, Suspended, TenantName, VolumeName};

use super::super::{
    Activity, ApiError, ApiResult, AttachInfo, AttachOptions, CompactSpec, DetachInfo,
    DoctorReport, Engine, EvictInfo, ImageRef, Kind, MoveReport, Page, PurgeReport, PurgeSpec,
    RatesInfo, RatesSpec, RekeyInfo, RekeySpec, ReleaseInfo, ReleaseSpec, RescueReport, RescueSpec,
    ResizeInfo, ResizeSpec, RetainInfo, SnapRef, SnapshotInfo, StatusInfo, TenantInfo, TenantSpec,
    TrashInfo, TrashRef, VerifyProgress, VerifyReport, VerifySpec, Via, VolumeInfo, VolumeList,
    VolumeRef, VolumeSpec, WarmReport, WarmSpec, if_found,
};
use crate::places::Place;

/// Refuses a key by name: a keyring has other tenants' too. The tenant's own needs no name.
fn no_key(key: Option<&KeyName>) -> ApiResult<()> {
    match key {
        None => Ok(()),
        Some(_) => Err(ApiError::new(
            Kind::Denied,
            "naming a key is for the role operator",
            "leave it out: the tenant's own is taken",
        )),
    }
}

/// See the module.
pub(super) struct Tenanted {
    inner: Arc<dyn Engine>,
    tenant: TenantName,
    attach: TenantAttach,
    /// Given back when the last who holds this engine is done.
    _call: Option<Place<TenantName>>,
}

impl Tenanted {
    pub fn new(
        inner: Arc<dyn Engine>,
        tenant: TenantName,
        attach: TenantAttach,
        call: Option<Place<TenantName>>,
    ) -> Self {
        Self {
            inner,
            tenant,
            attach,
            _call: call,
        }
    }

    fn own(&self, tenant: &TenantName) -> ApiResult<()> {
        if *tenant == self.tenant {
            Ok(())
        } else {
            Err(ApiError::no_tenant(tenant))
        }
    }

    fn own_volume(&self, volume: &VolumeRef) -> ApiResult<()> {
        if volume.tenant == self.tenant {
            Ok(())
        } else {
            Err(ApiError::no_volume(volume))
        }
    }

    /// The tenant to list: its own, whether it is named or not.
    fn only(&self, tenant: Option<&TenantName>) -> ApiResult<Option<&TenantName>> {
        tenant.map_or(Ok(()), |tenant| self.own(tenant))?;
        Ok(Some(&self.tenant))
    }

    /// What of an attachment is a tenant's to choose: not what makes something of the host its, nor what
    /// takes a volume from another host or gives up writes, which somebody must know to be lost.
    fn attach_options(&self, mut options: AttachOptions) -> ApiResult<AttachOptions> {
        let refuse = |what: &str| {
            let message = format!("{what} is for the role operator");
            Err(ApiError::new(
                Kind::Denied,
                message,
                "leave it out, or ask the operator of the daemon",
            ))
        };
        match self.attach {
            TenantAttach::None => return refuse("attaching"),
            TenantAttach::Nbd if options.via == Some(Via::Ublk) => {
                return refuse("attaching by ublk");
            }
            TenantAttach::Nbd => options.via = Some(Via::Nbd),
            TenantAttach::Any => {}
        }
        for (asked, what) in [
            (
                options.wants_a_device(),
                "an owner, a mode or queues of a device",
            ),
            (options.force, "taking a volume from another host"),
            (options.discard_unsent, "giving up unsent writes"),
            (
                options.discard_lost,
                "giving up what came after lost writes",
            ),
            (options.direct_reads, "reading unverified"),
        ] {
            if asked {
                return refuse(what);
            }
        }
        Ok(options)
    }
}

/// What only operators may; the endpoints' roles keep tenants from it before this does.
fn operators_only<T>() -> ApiResult<T> {
    Err(ApiError::new(
        Kind::Denied,
        "this is for the role operator",
        "ask the operator of the daemon",
    ))
}

#[async_trait]
impl Engine for Tenanted {
    async fn create_tenant(&self, _: TenantSpec) -> ApiResult<TenantInfo> {
        operators_only()
    }

    async fn show_tenant(&self, tenant: &TenantName) -> ApiResult<TenantInfo> {
        self.own(tenant)?;
        let mut info = self.inner.show_tenant(tenant).await?;
        if let Some(store) = &mut info.store {
            // The newest failure may be of another's object, and the daemon's own store is its operator's.
            store.last_error = None;
            if info.settings.store.is_none() {
                store.url = String::new();
            }
        }
        Ok(info)
    }

    async fn update_tenant(
        &self,
        _: &TenantName,
        _: &serde_json::Map<String, serde_json::Value>,
    ) -> ApiResult<TenantInfo> {
        operators_only()
    }

    async fn suspend_tenant(&self, _: &TenantName, _: Option<Suspended>) -> ApiResult<TenantInfo> {
        operators_only()
    }

    async fn list_tenants(&self) -> ApiResult<Vec<TenantInfo>> {
        // Of the others nothing is read, so that what is wrong with theirs is not told.
        let own = if_found(self.show_tenant(&self.tenant).await)?;
        Ok(own.into_iter().collect())
    }

    async fn delete_tenant(&self, _: &TenantName, _: bool) -> ApiResult<()> {
        operators_only()
    }

    async fn create_volume(&self, spec: VolumeSpec) -> ApiResult<VolumeInfo> {
        self.own(&spec.tenant)?;
        no_key(spec.key.as_ref())?;
        self.inner.create_volume(spec).await
    }

    async fn list_volumes(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<VolumeInfo>> {
        self.inner.list_volumes(self.only(tenant)?).await
    }

    async fn page_of_volumes(
        &self,
        tenant: Option<&TenantName>,
        page: &Page,
    ) -> ApiResult<VolumeList> {
        self.inner.page_of_volumes(self.only(tenant)?, page).await
    }

    async fn show_volume(&self, image: &ImageRef) -> ApiResult<VolumeInfo> {
        self.own_volume(&image.volume)?;
        self.inner.show_volume(image).await
    }

    async fn attach(&self, image: &ImageRef, options: AttachOptions) -> ApiResult<AttachInfo> {
        self.own_volume(&image.volume)?;
        let options = self.attach_options(options)?;
        self.inner.attach(image, options).await
    }

    async fn detach(&self, image: &ImageRef) -> ApiResult<DetachInfo> {
        self.own_volume(&image.volume)?;
        self.inner.detach(image).await
    }

    async fn resize(&self, volume: &VolumeRef, spec: ResizeSpec) -> ApiResult<ResizeInfo> {
        self.own_volume(volume)?;
        self.inner.resize(volume, spec).await
    }

    async fn rekey(&self, volume: &VolumeRef, spec: &RekeySpec) -> ApiResult<RekeyInfo> {
        self.own_volume(volume)?;
        no_key(spec.key.as_ref())?;
        self.inner.rekey(volume, spec).await
    }

    async fn release(&self, _: &VolumeRef, _: ReleaseSpec) -> ApiResult<ReleaseInfo> {
        operators_only()
    }

    async fn set_rates(&self, volume: &VolumeRef, rates: RatesSpec) -> ApiResult<RatesInfo> {
        self.own_volume(volume)?;
        self.inner.set_rates(volume, rates).await
    }

    async fn retain(&self, volume: &VolumeRef, retain_ms: u64) -> ApiResult<RetainInfo> {
        self.own_volume(volume)?;
        self.inner.retain(volume, retain_ms).await
    }

    async fn sync(&self, volume: &VolumeRef) -> ApiResult<()> {
        self.own_volume(volume)?;
        self.inner.sync(volume).await
    }

    async fn verify(&self, image: &ImageRef, spec: VerifySpec) -> ApiResult<VerifyReport> {
        self.own_volume(&image.volume)?;
        self.inner.verify(image, spec).await
    }

    async fn verify_progress(&self, image: &ImageRef) -> ApiResult<VerifyProgress> {
        self.own_volume(&image.volume)?;
        self.inner.verify_progress(image).await
    }

    async fn rescue(&self, _: &VolumeRef, _: RescueSpec) -> ApiResult<RescueReport> {
        operators_only()
    }

    async fn create_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        self.own_volume(&snapshot.volume)?;
        self.inner.create_snapshot(snapshot).await
    }

    async fn list_snapshots(&self, volume: Option<&VolumeRef>) -> ApiResult<Vec<SnapshotInfo>> {
        if let Some(volume) = volume {
            self.own_volume(volume)?;
            return self.inner.list_snapshots(Some(volume)).await;
        }
        let mut all = Vec::new();
        for info in self.inner.list_volumes(Some(&self.tenant)).await? {
            if info.snapshot.is_some() || info.snapshots == 0 {
                continue;
            }
            let volume = VolumeRef::new(info.tenant, info.name)?;
            all.append(&mut self.inner.list_snapshots(Some(&volume)).await?);
        }
        Ok(all)
    }

    async fn show_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        self.own_volume(&snapshot.volume)?;
        self.inner.show_snapshot(snapshot).await
    }

    async fn delete_snapshot(&self, snapshot: &SnapRef) -> ApiResult<()> {
        self.own_volume(&snapshot.volume)?;
        self.inner.delete_snapshot(snapshot).await
    }

    async fn clone_snapshot(&self, snapshot: &SnapRef, name: &VolumeName) -> ApiResult<VolumeInfo> {
        self.own_volume(&snapshot.volume)?;
        self.inner.clone_snapshot(snapshot, name).await
    }

    async fn rollback(&self, snapshot: &SnapRef) -> ApiResult<VolumeInfo> {
        self.own_volume(&snapshot.volume)?;
        self.inner.rollback(snapshot).await
    }

    async fn warm(&self, volume: &VolumeRef, spec: &WarmSpec) -> ApiResult<WarmReport> {
        self.own_volume(volume)?;
        self.inner.warm(volume, spec).await
    }

    async fn compact(&self, volume: &VolumeRef, spec: &CompactSpec) -> ApiResult<MoveReport> {
        self.own_volume(volume)?;
        self.inner.compact(volume, spec).await
    }

    async fn flatten(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        self.own_volume(volume)?;
        self.inner.flatten(volume).await
    }

    async fn move_progress(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        self.own_volume(volume)?;
        self.inner.move_progress(volume).await
    }

    async fn warm_progress(&self, volume: &VolumeRef) -> ApiResult<WarmReport> {
        self.own_volume(volume)?;
        self.inner.warm_progress(volume).await
    }

    async fn evict(&self, volume: &VolumeRef) -> ApiResult<EvictInfo> {
        self.own_volume(volume)?;
        self.inner.evict(volume).await
    }

    async fn delete_volume(
        &self,
        volume: &VolumeRef,
        discard_unsent: bool,
    ) -> ApiResult<TrashInfo> {
        self.own_volume(volume)?;
        if discard_unsent {
            let remedy = "leave it out, or ask the operator of the daemon";
            let message = "giving up unsent writes is for the role operator";
            return Err(ApiError::new(Kind::Denied, message, remedy));
        }
        self.inner.delete_volume(volume, false).await
    }

    async fn list_trash(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<TrashInfo>> {
        self.inner.list_trash(self.only(tenant)?).await
    }

    async fn restore(&self, which: &TrashRef, name: Option<&VolumeName>) -> ApiResult<VolumeInfo> {
        let which = match which {
            TrashRef::Name(volume) => {
                self.own_volume(volume)?;
                which.clone()
            }
            TrashRef::Id(id) | TrashRef::Of(_, id) => TrashRef::Of(self.tenant.clone(), *id),
        };
        self.inner.restore(&which, name).await
    }

    async fn purge_trash(&self, spec: &PurgeSpec) -> ApiResult<PurgeReport> {
        let tenant = self.only(spec.tenant.as_ref())?.cloned();
        let spec = PurgeSpec {
            tenant,
            ..spec.clone()
        };
        self.inner.purge_trash(&spec).await
    }

    async fn doctor(&self) -> ApiResult<DoctorReport> {
        operators_only()
    }

    async fn status(&self) -> ApiResult<StatusInfo> {
        operators_only()
    }

    async fn activity(&self, tenant: Option<&TenantName>) -> ApiResult<Activity> {
        self.inner.activity(self.only(tenant)?).await
    }

    async fn ready(&self) -> Result<(), String> {
        // Why not may name others' volumes.
        self.inner
            .ready()
            .await
            .map_err(|_| "see the daemon's log".to_owned())
    }

    async fn metrics_text(&self) -> String {
        String::new()
    }
}
