//! Making, showing, changing, suspending and deleting tenants.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::StreamExt as _;
use quarry_objfmt::record::TenantStore;
use quarry_objfmt::{Suspended, TenantName, TenantRecord};
use serde_json::{Map, Value};

use super::tenants::{self, Same, Site, Tenant};
use super::{Daemon, registry};
use crate::control::{
    ApiError, ApiResult, ImageRef, Kind, StoreStatus, TenantInfo, TenantSpec, VolumeRef, patched,
};
use crate::store::StoreState;

/// Records read side by side.
const RECORDS_AT_ONCE: usize = 16;

impl Daemon {
    pub(super) async fn create_one_tenant(&self, spec: TenantSpec) -> ApiResult<TenantInfo> {
        let record = self.make_tenant(&spec.name, spec.settings).await?;
        Ok(told(record))
    }

    pub(super) async fn all_tenants(&self) -> ApiResult<Vec<TenantInfo>> {
        let names = registry::tenant_names(&self.home).await?;
        let reads = names.into_iter().map(async |name| {
            match tenants::read(&self.home, &name).await {
                Ok((record, _)) => Ok(Some(told(record))),
                // Deleted since.
                Err(error) if error.kind == Kind::NotFound => Ok(None),
                // It hides no other; showing it tells.
                Err(error) if error.kind == Kind::Damaged => Ok(Some(TenantInfo {
                    name: name.to_string(),
                    ..TenantInfo::default()
                })),
                Err(error) => Err(error),
            }
        });
        let reads = futures::stream::iter(reads).buffered(RECORDS_AT_ONCE);
        let read: Vec<ApiResult<Option<TenantInfo>>> = reads.collect().await;
        read.into_iter().filter_map(Result::transpose).collect()
    }

    pub(super) async fn show_one_tenant(&self, name: &TenantName) -> ApiResult<TenantInfo> {
        let tenant = match self.read_tenant(name).await {
            Ok(tenant) => tenant,
            // Its store, not the tenant.
            Err(error) if error.kind != Kind::NotFound => {
                let (record, _) = tenants::read(&self.home, name).await?;
                let url = record
                    .settings
                    .store
                    .as_ref()
                    .map(|store| store.url.clone());
                return Ok(TenantInfo {
                    store: Some(StoreStatus {
                        url: url.unwrap_or_default(),
                        healthy: false,
                        failing_ms: None,
                        last_error: Some(error.message),
                    }),
                    ..told(record)
                });
            }
            Err(error) => return Err(error),
        };
        let usage = self.usage(&tenant).await;
        if let Err(error) = &usage {
            tracing::warn!(tenant = %name, %error, "what the tenant has cannot be counted");
        }
        Ok(TenantInfo {
            store: Some(status_of(&tenant.site)),
            usage: usage.ok(),
            requests: Some(self.requests(tenant.account())),
            ..told(tenant.record())
        })
    }

    pub(super) async fn update_one_tenant(
        &self,
        name: &TenantName,
        patch: &Map<String, Value>,
    ) -> ApiResult<TenantInfo> {
        let (before, _) = tenants::read(&self.home, name).await?;
        let was = before.settings.store.clone();
        let wanted = patched(&before.settings, patch)?;
        if wanted.store != was {
            let before = self.read_tenant(name).await?;
            let same_place = |store: &Option<TenantStore>| store.as_ref().map(|s| s.url.clone());
            if same_place(&wanted.store) == same_place(&was) && wanted.store.is_some() {
                // Reached in another way: what is attached goes on as it was until it is attached anew.
                self.check_store_of(name, wanted.store.as_ref(), false)
                    .await?;
                self.is_same_store(&before, wanted.store.as_ref()).await?;
            } else {
                self.may_move(&before, wanted.store.as_ref()).await?;
            }
        }
        let record = self
            .change_tenant(name, Same::Written, |record| {
                // Moved by somebody else meanwhile: what was looked at is not where it is.
                if record.settings.store != was && wanted.store != record.settings.store {
                    let message = format!("tenant {name} was changed just now by somebody else");
                    return Err(ApiError::new(Kind::Conflict, message, "try again"));
                }
                if wanted.store != was && !record.reservations.is_empty() {
                    let message = format!("something is being made for tenant {name}");
                    return Err(ApiError::new(Kind::Conflict, message, "try again"));
                }
                record.settings = patched(&record.settings, patch)?;
                Ok(())
            })
            .await?;
        Ok(told(record))
    }

    /// A tenant's store is another only while there is nothing in it. *Who makes a volume at the same moment on a host
    /// that has not seen the change makes it where nobody looks: so it is not to be done to a tenant in use.*
    async fn may_move(&self, tenant: &Tenant, to: Option<&TenantStore>) -> ApiResult<()> {
        registry::check_is_empty(&tenant.control(), &tenant.name)
            .await
            .map_err(|error| match error.kind {
                Kind::Conflict => {
                    error.with_remedy("its store can be changed only while it has nothing in it")
                }
                _ => error,
            })?;
        self.check_store_of(&tenant.name, to, true).await
    }

    /// Another endpoint may be another way to the same server, or another server: all of the tenant's volumes must be there.
    async fn is_same_store(&self, tenant: &Tenant, to: Option<&TenantStore>) -> ApiResult<()> {
        let endpoint = |store: Option<&TenantStore>| store.and_then(|s| s.endpoint.clone());
        let was = tenant.record().settings.store;
        if endpoint(to) == endpoint(was.as_ref()) {
            return Ok(());
        }
        let name = &tenant.name;
        let there = self.store_for_control(name, to).await?;
        let there = registry::volume_names(&there, name).await?;
        let has = registry::volume_names(&tenant.control(), name).await;
        let has = match has {
            Ok(names) => names,
            // The old way may be gone, or its keys: what is attached is known.
            Err(_) if !there.is_empty() => self.attached_of(name),
            Err(error) => return Err(error),
        };
        match has.iter().find(|volume| !there.contains(volume)) {
            None => Ok(()),
            Some(missing) => {
                let message =
                    format!("{missing} is not in the store that tenant {name} is to have");
                let remedy = "its store can be changed only while it has nothing in it; say another way to the same one";
                Err(ApiError::new(Kind::Conflict, message, remedy))
            }
        }
    }

    pub(super) async fn suspend_one_tenant(
        &self,
        name: &TenantName,
        how: Option<Suspended>,
    ) -> ApiResult<TenantInfo> {
        let changed = self.change_tenant(name, Same::Written, |record| {
            record.settings.suspended = how;
            Ok(())
        });
        Ok(told(changed.await?))
    }

    /// The names of a tenant's volumes, or of all tenants'. A tenant whose store does not answer hides no other's: of its volumes
    /// those that are attached here are named, and why that is not all.
    pub(super) async fn volumes(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<VolumeRef>> {
        if let Some(tenant) = tenant {
            return registry::volume_names(&self.control(tenant).await?, tenant).await;
        }
        let names = registry::tenant_names(&self.home).await?;
        let lists = names.into_iter().map(async |name| {
            let listed = match self.control(&name).await {
                Ok(store) => registry::volume_names(&store, &name).await,
                Err(error) => Err(error),
            };
            // One tenant's store is no reason to tell of no other's.
            listed.unwrap_or_else(|error| {
                tracing::warn!(tenant = %name, %error, "its volumes are not in the list");
                self.attached_of(&name)
            })
        });
        let lists = futures::stream::iter(lists).buffered(RECORDS_AT_ONCE);
        let lists: Vec<Vec<VolumeRef>> = lists.collect().await;
        Ok(lists.into_iter().flatten().collect())
    }

    /// The same; where the store that says whose they are does not answer, those that are attached here or wait to be.
    pub(super) async fn volumes_or_here(
        &self,
        tenant: Option<&TenantName>,
    ) -> ApiResult<(Vec<VolumeRef>, Option<String>)> {
        match self.volumes(tenant).await {
            Err(error) if matches!(error.kind, Kind::Unavailable | Kind::Denied) => {
                Ok((self.here(tenant), Some(error.message)))
            }
            listed => Ok((listed?, None)),
        }
    }

    fn here(&self, tenant: Option<&TenantName>) -> Vec<VolumeRef> {
        let attached = self.attached().into_iter().map(|(image, _)| image);
        let wanted = self.wanted.all().into_iter().map(|(image, _)| image);
        let of = |image: &ImageRef| {
            tenant.is_none_or(|tenant| image.volume.tenant == *tenant) && !image.is_past()
        };
        let here = attached.chain(wanted).filter(of);
        let here: BTreeSet<VolumeRef> = here.map(|image| image.volume).collect();
        here.into_iter().collect()
    }

    /// With those attached here that have no name any more, as they were deleted elsewhere.
    pub(super) fn and_attached(
        &self,
        volumes: Vec<VolumeRef>,
        tenant: Option<&TenantName>,
    ) -> Vec<VolumeRef> {
        let of = |image: &ImageRef| {
            tenant.is_none_or(|tenant| image.volume.tenant == *tenant) && !image.is_past()
        };
        let attached = self.attached().into_iter().map(|(image, _)| image);
        let attached = attached.filter(of).map(|image| image.volume);
        let all: BTreeSet<VolumeRef> = volumes.into_iter().chain(attached).collect();
        all.into_iter().collect()
    }

    fn attached_of(&self, tenant: &TenantName) -> Vec<VolumeRef> {
        let of = |image: &ImageRef| image.volume.tenant == *tenant && !image.is_past();
        let attached = self.attached().into_iter();
        attached
            .filter(|(image, _)| of(image))
            .map(|(image, _)| image.volume)
            .collect()
    }

    /// Reads the records of tenants with something attached here, for as long as the daemon runs, so that what other
    /// hosts changed is seen.
    pub async fn follow_tenants(self: Arc<Self>) {
        loop {
            tokio::time::sleep(tenants::REFRESH_INTERVAL).await;
            let has_slots =
                |name: &TenantName| self.slots.lock().keys().any(|i| i.volume.tenant == *name);
            self.forget_idle_tenants(has_slots);
            for tenant in self.tenants.all() {
                let name = &tenant.name;
                if has_slots(name)
                    && let Err(error) = self.read_tenant(name).await
                {
                    tracing::debug!(tenant = %name, %error, "the tenant's record cannot be read");
                }
            }
        }
    }
}

/// How the way to a store does.
pub(super) fn status_of(site: &Site) -> StoreStatus {
    let (failing_ms, last_error) = match site.lane.health().state() {
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
    StoreStatus {
        url: site.url(),
        healthy: failing_ms.is_none(),
        failing_ms,
        last_error,
    }
}

fn told(record: TenantRecord) -> TenantInfo {
    TenantInfo {
        name: record.name,
        created_ms: record.created_ms,
        settings: record.settings,
        ..TenantInfo::default()
    }
}
