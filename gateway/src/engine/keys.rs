//! The keys of encrypted volumes: which one wraps them, and wrapping them anew.
//!
//! Wrapping anew changes no data: the same data keys, wrapped by another key. The order, and what a crash between
//! the steps leaves:
//! 1. The copy beside the head, under a number that is free. *Crash: a copy more, which opens what the others open.*
//! 2. The head, by whoever may change it, where the keys that were wrapped anew still stand. *Crash: earlier copies
//!    stay; the next change of keys, or purging the volume, deletes them.*
//! 3. Earlier copies are deleted.
//!
//! Of two at once one finds other keys in the head, and leaves its copy. A clone made meanwhile takes what the
//! head had: it is wrapped by the earlier key until it is wrapped anew itself.

use std::sync::Arc;

use quarry_objfmt::{
    DataKeys, Encryption, Head, KeyGeneration, KeyName, TenantName, VolumeId, WrappedKey,
    WrappedKeys,
};
use quarry_volume::Event;

use super::resize::HEAD_WAIT_MAX;
use super::slot::Stage;
use super::tenants::Tenant;
use super::{Daemon, registry};
use crate::backend::{HeadCell, HeadError};
use crate::control::{
    ApiError, ApiResult, ImageRef, Kind, RekeyInfo, RekeySpec, VolumeRef, VolumeSpec,
};
use crate::keys::{self, KeyError};

impl From<KeyError> for ApiError {
    fn from(error: KeyError) -> Self {
        let (kind, remedy) = match &error {
            KeyError::NotConfigured { .. } => (
                Kind::Unsupported,
                "set keys.keyring, keys.command or keys.url in the daemon's configuration",
            ),
            KeyError::Missing { .. } => (
                Kind::Denied,
                "add it to the keyring from where it is kept; `quarry key generate` makes a new one",
            ),
            KeyError::Keyring { .. } => (Kind::Denied, "mend the keyring"),
            KeyError::Wrong { .. } => (
                Kind::Denied,
                "add the key that it was wrapped with to the keyring, beside this one",
            ),
            KeyError::Unavailable { .. } => (Kind::Unavailable, "try again when it answers"),
            KeyError::Keyless { .. } => (
                Kind::Damaged,
                "restore its head, or delete that and make it anew with `quarry volume rescue`",
            ),
        };
        Self::new(kind, error.to_string(), remedy)
    }
}

impl Daemon {
    /// The data keys of a volume, if it is encrypted.
    pub(super) async fn unlock(
        &self,
        tenant: &TenantName,
        head: &Head,
    ) -> ApiResult<Option<Arc<DataKeys>>> {
        Ok(self.keys.open(tenant, head).await?)
    }

    /// The keys of a volume that is to be made; without any it is not encrypted.
    pub(super) async fn keys_for(
        &self,
        tenant: &Tenant,
        spec: &VolumeSpec,
        volume: VolumeId,
    ) -> ApiResult<WrappedKeys> {
        let by = match &spec.key {
            _ if spec.no_encryption => None,
            Some(key) => Some(key.clone()),
            None => key_of(tenant)?,
        };
        let Some(by) = by else {
            return Ok(WrappedKeys::default());
        };
        let generation = KeyGeneration::FIRST;
        let key = self
            .keys
            .fresh(&spec.tenant, volume, generation, &by)
            .await?;
        Ok(keys::first(vec![key]))
    }

    /// A clone's own key, if what it is made of is encrypted: wrapped by its tenant's key, or as its parent's.
    pub(super) async fn key_for_clone(
        &self,
        tenant: &Tenant,
        parent: &VolumeRef,
        clone: VolumeId,
    ) -> ApiResult<Option<WrappedKey>> {
        let head = registry::head(&tenant.control(), parent).await?;
        if head.encryption == Encryption::None {
            return Ok(None);
        }
        let volume = head.volume;
        let of_parent = head.keys.newest(volume);
        let of_parent = of_parent.ok_or(KeyError::Keyless { volume })?;
        let by = key_of(tenant)?.unwrap_or_else(|| of_parent.by.clone());
        let generation = KeyGeneration::FIRST;
        let key = self.keys.fresh(&parent.tenant, clone, generation, &by);
        Ok(Some(key.await?))
    }

    pub(super) async fn rekey_volume(
        &self,
        volume: &VolumeRef,
        spec: &RekeySpec,
    ) -> ApiResult<RekeyInfo> {
        let image = ImageRef::from(volume.clone());
        let slot = self.slot(&image);
        let tenant = self.tenant(&volume.tenant).await?;
        let answer = {
            let _change = slot.change.lock().await;
            match slot.stage() {
                Stage::Attached(attached) => match self.may_change(volume, &attached) {
                    Ok(()) => {
                        let head = attached.backend.head();
                        let done = self
                            .wrap_anew(&tenant, volume, head, spec.key.as_ref())
                            .await;
                        if let Err(Wrapping::Fenced(by)) = &done {
                            let by = by.clone();
                            attached.backend.tell(Event::Fenced { by }).await;
                        }
                        done
                    }
                    Err(error) => Err(error.into()),
                },
                // Nothing else lasts while no call changes the volume.
                _ => match registry::free_head(
                    &tenant.control(),
                    volume,
                    self.common.device.id(),
                    "change its keys",
                )
                .await
                {
                    Ok((_, head)) => {
                        self.wrap_anew(&tenant, volume, &head, spec.key.as_ref())
                            .await
                    }
                    Err(error) => Err(error.into()),
                },
            }
        };
        self.forget_idle(&image, &slot);
        answer.map_err(|error| match error {
            Wrapping::Fenced(by) => registry::changed_elsewhere(volume, &by),
            Wrapping::Api(error) => error,
        })
    }

    async fn wrap_anew(
        &self,
        of: &Tenant,
        volume: &VolumeRef,
        cell: &HeadCell,
        key: Option<&KeyName>,
    ) -> Result<RekeyInfo, Wrapping> {
        let (tenant, store, head) = (&of.name, &of.control(), cell.get());
        if head.encryption == Encryption::None {
            let message = format!("{volume} is not encrypted");
            let remedy = "copy it into a volume that is";
            return Err(ApiError::new(Kind::Conflict, message, remedy).into());
        }
        let by = match key {
            Some(key) => key.clone(),
            None => key_of(of)?.ok_or_else(|| {
                let message = format!("tenant {tenant} has no key");
                ApiError::invalid(message, "name one with --key")
            })?,
        };
        let (seen, id) = (head.keys, head.volume);
        let rewrapped = self.keys.rewrap(tenant, &seen.keys, &by).await;
        let next = WrappedKeys {
            keys: rewrapped.map_err(ApiError::from)?,
            revision: seen.revision,
        };
        // Step 1.
        let next = keys::put_next_copy(store, tenant, id, next).await;
        let next = next.map_err(|error| registry::store_error(&error))?;
        // Step 2.
        let change = |head: &mut Head| match &head.keys {
            // A turn before this one, whose answer was lost.
            now if *now == next => Err(Not::Needed),
            now if *now != seen => Err(Not::Seen),
            _ => {
                head.keys.clone_from(&next);
                Ok(())
            }
        };
        let changed = cell.try_update(store, change);
        // Refused, the copy stays: a deletion sent twice could meet the next one of this number. The next change of keys
        // deletes it, or the purge.
        match registry::in_time(volume, HEAD_WAIT_MAX, changed).await? {
            Ok(Ok(_) | Err(Not::Needed)) => {}
            Ok(Err(Not::Seen)) => {
                let message = format!("the keys of {volume} were changed just now");
                let remedy = "see `quarry volume show`, and try again";
                return Err(ApiError::new(Kind::Conflict, message, remedy).into());
            }
            Err(HeadError::Fenced { by }) => return Err(Wrapping::Fenced(by)),
            Err(error) => return Err(registry::head_error(volume, &error).into()),
        }
        // Step 3.
        let dropped = keys::drop_copies_before(store, tenant, id, next.revision).await;
        dropped.map_err(|error| {
            let message = format!(
                "{volume}: its keys are wrapped by {by}, but earlier copies of them stay: {error}"
            );
            ApiError::new(Kind::Unavailable, message, "do it again")
        })?;
        Ok(RekeyInfo {
            volume: volume.to_string(),
            key: by.to_string(),
            keys: next.keys.len() as u64,
        })
    }
}

/// The name of the key that wraps what new volumes of the tenant are encrypted with; none: they are not.
fn key_of(tenant: &Tenant) -> ApiResult<Option<KeyName>> {
    let name = tenant.record().settings.key.map(KeyName::new).transpose();
    name.map_err(|error| {
        let message = format!("the record of tenant {}: {error}", tenant.name);
        let remedy = "set it anew with `quarry tenant update --key`";
        ApiError::new(Kind::Damaged, message, remedy)
    })
}

/// Why a change of the head is not made.
enum Not {
    Needed,
    Seen,
}

/// Why keys are not wrapped anew.
enum Wrapping {
    Fenced(String),
    Api(ApiError),
}

impl From<ApiError> for Wrapping {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}
