//! The keys of encrypted volumes: which one wraps them, wrapping them anew, and new data keys.
//!
//! Wrapping anew changes no data: the same data keys, wrapped by another key. A new data key encrypts what is written from then
//! on; what is there is encrypted anew later ([`crate::backend`]). The order of both, and what a crash between
//! the steps leaves:
//! 1. The copy beside the head, under a number above those of all copies. *Crash: a copy more, which opens what the others
//!    open; a new key in it encrypts nothing, and its generation is given to no other ([`crate::keys::rotate`]).*
//! 2. The head, by whoever may change it, where the keys that were seen still stand. *Crash: earlier copies
//!    stay; the next change of keys, or purging the volume, deletes them. Whoever attaches the volume has the new key.*
//! 3. Who has the volume attached here encrypts with the new key; so never before the head names it. Earlier copies are deleted.
//!
//! Of two at once one finds other keys in the head, and leaves its copy. A clone made meanwhile takes what the
//! head had: it is wrapped by the earlier key until it is wrapped anew itself.

use std::sync::Arc;

use quarry_objfmt::wrapped::KEYS_MAX;
use quarry_objfmt::{
    DataKeys, Encryption, Head, KeyGeneration, KeyName, TenantName, VolumeId, WrappedKey,
    WrappedKeys,
};
use quarry_volume::Event;

use super::resize::HEAD_WAIT_MAX;
use super::slot::Stage;
use super::tenants::Tenant;
use super::{Daemon, registry};
use crate::backend::{HeadCell, HeadError, VolumeBackend};
use crate::control::{
    ApiError, ApiResult, DataKeyInfo, ImageRef, Kind, RekeyInfo, RekeySpec, VolumeRef, VolumeSpec,
};
use crate::keys::rotate::{Place, RotateError, put_new_key};
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
        let tenant = self.tenant(&volume.tenant).await?;
        let slot = self.slot(&image);
        let answer = {
            let _change = slot.change.lock().await;
            match slot.stage() {
                Stage::Attached(attached) => match self.may_change(volume, &attached) {
                    Ok(()) => {
                        let (backend, head) = (&*attached.backend, attached.backend.head());
                        let done = self.change_keys(&tenant, volume, head, spec, Some(backend));
                        let done = done.await;
                        if let Err(Changing::Fenced(by)) = &done {
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
                    Ok((_, head)) => self.change_keys(&tenant, volume, &head, spec, None).await,
                    Err(error) => Err(error.into()),
                },
            }
        };
        self.forget_idle(&image, &slot);
        answer.map_err(|error| match error {
            Changing::Fenced(by) => registry::changed_elsewhere(volume, &by),
            Changing::Api(error) => error,
        })
    }

    /// `serving` is who has the volume attached here.
    async fn change_keys(
        &self,
        of: &Tenant,
        volume: &VolumeRef,
        cell: &HeadCell,
        spec: &RekeySpec,
        serving: Option<&VolumeBackend>,
    ) -> Result<RekeyInfo, Changing> {
        let (store, head) = (&of.control(), cell.get());
        if head.encryption == Encryption::None {
            let message = format!("{volume} is not encrypted");
            let remedy = "copy it into a volume that is";
            return Err(ApiError::new(Kind::Conflict, message, remedy).into());
        }
        let by = match (&spec.key, head.keys.newest(head.volume)) {
            (Some(key), _) => key.clone(),
            (None, newest) => {
                let as_before = newest.filter(|_| spec.data).map(|key| key.by.clone());
                key_of(of)?.or(as_before).ok_or_else(|| {
                    let message = format!("tenant {} has no key", of.name);
                    ApiError::invalid(message, "name one with --key")
                })?
            }
        };
        if let Some(backend) = serving
            && self.take_up_keys(of, &head, backend).await?
            && spec.data
        {
            // What was asked for before, and did not seem to be done.
            return Ok(rekeyed(volume, by, &head, serving));
        }
        // Step 1.
        let (next, opened) = match spec.data {
            false => (self.wrap_anew(of, &head, &by).await?, None),
            true => {
                let next = self.add_key(of, volume, &head, &by).await?;
                // Nothing is to be written that could not be read again.
                let then = Head {
                    keys: next.clone(),
                    ..head.clone()
                };
                (next, self.unlock(&of.name, &then).await?)
            }
        };
        // Step 2.
        let change = |now: &mut Head| match &now.keys {
            // A turn before this one, whose answer was lost.
            keys if *keys == next => Err(Not::Needed),
            keys if *keys != head.keys => Err(Not::Seen),
            _ => {
                now.keys.clone_from(&next);
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
            Err(HeadError::Fenced { by }) => return Err(Changing::Fenced(by)),
            Err(error) => return Err(registry::head_error(volume, &error).into()),
        }
        if let (Some(backend), Some(opened)) = (serving, opened) {
            backend.add_keys(&opened);
        }
        // Step 3.
        let dropped = keys::drop_copies_before(store, &of.name, head.volume, next.revision).await;
        match dropped {
            Ok(()) => {}
            // Done again, it would be another key; and earlier copies go when keys are dropped.
            Err(error) if spec.data => {
                tracing::warn!(%volume, %error, "earlier copies of the keys stay, until these change again");
            }
            Err(error) => {
                let message = format!(
                    "{volume}: its keys are wrapped by {by}, but earlier copies of them stay: {error}"
                );
                return Err(ApiError::new(Kind::Unavailable, message, "do it again").into());
            }
        }
        let head = Head { keys: next, ..head };
        Ok(rekeyed(volume, by, &head, serving))
    }

    /// The same keys, wrapped by `by`, and their copy.
    async fn wrap_anew(&self, of: &Tenant, head: &Head, by: &KeyName) -> ApiResult<WrappedKeys> {
        let next = WrappedKeys {
            keys: self.keys.rewrap(&of.name, &head.keys.keys, by).await?,
            revision: head.keys.revision,
        };
        let store = of.control();
        Ok(keys::put_next_copy(&store, &of.name, head.volume, next).await?)
    }

    /// The keys and a new one, all wrapped by `by`, and their copy.
    async fn add_key(
        &self,
        of: &Tenant,
        volume: &VolumeRef,
        head: &Head,
        by: &KeyName,
    ) -> ApiResult<WrappedKeys> {
        let (tenant, id) = (&of.name, head.volume);
        if head.keys.keys.len() >= KEYS_MAX {
            let message = format!("{volume} has {KEYS_MAX} data keys, and can have no more");
            let remedy = "earlier ones go when nothing is encrypted with them: delete snapshots, flatten a clone";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let rewrapped = self.keys.rewrap(tenant, &head.keys.keys, by).await?;
        let make = async |place: Place| {
            let mut next = WrappedKeys {
                revision: place.revision,
                keys: rewrapped.clone(),
            };
            next.insert(self.keys.fresh(tenant, id, place.generation, by).await?);
            Ok(next)
        };
        let store = of.control();
        let put = put_new_key(&store, tenant, id, &head.keys, make).await;
        put.map_err(|error| match error {
            RotateError::Key(error) => error.into(),
            RotateError::Store(error) => error.into(),
            error @ RotateError::Copy { .. } => {
                let remedy = "`quarry volume rekey` without --data makes the copies anew";
                ApiError::new(Kind::Damaged, error.to_string(), remedy)
            }
            error @ RotateError::Generations => {
                let remedy = "copy it into another volume";
                ApiError::new(Kind::Conflict, error.to_string(), remedy)
            }
        })
    }

    /// Has keys used that the head came to have, though it did not seem so; false if there are none.
    async fn take_up_keys(
        &self,
        of: &Tenant,
        head: &Head,
        backend: &VolumeBackend,
    ) -> ApiResult<bool> {
        let newest = head.keys.newest(head.volume).map(|key| key.generation);
        if newest <= backend.newest_generation() {
            return Ok(false);
        }
        if let Some(opened) = self.unlock(&of.name, head).await? {
            backend.add_keys(&opened);
        }
        Ok(true)
    }
}

fn rekeyed(
    volume: &VolumeRef,
    by: KeyName,
    head: &Head,
    serving: Option<&VolumeBackend>,
) -> RekeyInfo {
    RekeyInfo {
        volume: volume.to_string(),
        key: by.to_string(),
        keys: head.keys.keys.len() as u64,
        data_keys: data_keys(head, serving),
    }
}

/// A volume's own data keys, and what is encrypted with each, if it is attached here.
pub(super) fn data_keys(head: &Head, serving: Option<&VolumeBackend>) -> Vec<DataKeyInfo> {
    let own = head
        .keys
        .keys
        .iter()
        .filter(|key| key.volume == head.volume);
    let info = |key: &WrappedKey| {
        let sealed = serving.and_then(|b| b.sealed_by(key.generation, &head.snapshots));
        DataKeyInfo {
            generation: key.generation.get(),
            key: key.by.to_string(),
            chunks: sealed.as_ref().map(|sealed| sealed.chunks),
            stored_bytes: sealed.as_ref().map(|sealed| sealed.stored_bytes),
            snapshots: sealed.map(|sealed| sealed.snapshots).unwrap_or_default(),
        }
    };
    own.map(info).collect()
}

/// Whether two heads of a volume have the same data keys, whatever these are wrapped by.
pub(super) fn same_data_keys(a: &Head, b: &Head) -> bool {
    let name = |key: &WrappedKey| (key.volume, key.generation);
    a.keys
        .keys
        .iter()
        .map(name)
        .eq(b.keys.keys.iter().map(name))
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

/// Why keys are not changed.
enum Changing {
    Fenced(String),
    Api(ApiError),
}

impl From<ApiError> for Changing {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}
