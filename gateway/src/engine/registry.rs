//! Tenants and the names of volumes, in the object store.
//!
//! A name is unique because its record is created create-only. A volume's head is written before
//! its name, and the copy of its keys before that: a crash in between leaves a head that no name leads to, or a copy of
//! keys alone. Deleting is [`crate::trash`]'s.

use std::time::Duration;

use bytes::Bytes;
use quarry_objfmt::head::{Deleted, Head};
use quarry_objfmt::record::{NAME_KIND, NameRecord, Rates, decode_record, encode_record};
use quarry_objfmt::{
    CacheId, Encryption, Epoch, Sectors, TenantName, VolumeId, VolumeName, WrappedKeys, keys,
};

use super::now_ms;
use super::resize::larger;
use crate::backend::open::OpenError;
use crate::backend::{self, HeadCell, HeadError};
use crate::control::{ApiError, ApiResult, Kind, VolumeRef, VolumeSpec};
use crate::keys::put_first_copy;
use crate::store::{Store, StoreError, create_own};

/// A store's error as the API tells it.
pub(super) fn store_error(error: &StoreError) -> ApiError {
    let (kind, remedy) = match error {
        StoreError::Denied { .. } => (Kind::Denied, "check the store's keys and their rights"),
        StoreError::Unavailable { .. } => (Kind::Unavailable, "try again when the store answers"),
        StoreError::NotFound { .. } => (Kind::NotFound, ""),
        _ => (Kind::Damaged, ""),
    };
    ApiError::new(kind, error.to_string(), remedy)
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        store_error(&error)
    }
}

fn damaged(key: &str, error: &impl std::fmt::Display) -> ApiError {
    ApiError::new(
        Kind::Damaged,
        format!("{key}: {error}"),
        "restore the object from a copy",
    )
}

fn internal(error: &impl std::fmt::Display) -> ApiError {
    ApiError::internal(error.to_string())
}

/// The names of all tenants, in order, whatever their records say.
pub(super) async fn tenant_names(store: &dyn Store) -> ApiResult<Vec<TenantName>> {
    let listed = store.list(keys::TENANTS_PREFIX).await?;
    let name = |key: &String| key.strip_prefix(keys::TENANTS_PREFIX).map(TenantName::new);
    Ok(listed.iter().filter_map(|key| name(key)?.ok()).collect())
}

/// An error if a tenant has volumes.
pub(super) async fn check_no_volumes(store: &dyn Store, tenant: &TenantName) -> ApiResult<()> {
    let names = store.list(&keys::names_prefix(tenant)).await?;
    if !names.is_empty() {
        let message = format!("tenant {tenant} has {} volumes", names.len());
        return Err(ApiError::new(Kind::Conflict, message, "delete them first"));
    }
    Ok(())
}

/// An error if a tenant has volumes or trash: nobody would purge that without it.
pub(super) async fn check_is_empty(store: &dyn Store, tenant: &TenantName) -> ApiResult<()> {
    check_no_volumes(store, tenant).await?;
    let trash = store.list(&keys::trash_prefix(tenant)).await?;
    if !trash.is_empty() {
        let message = format!("tenant {tenant} has {} volumes in the trash", trash.len());
        let remedy = "restore them, or delete it with --purge, which purges them";
        return Err(ApiError::new(Kind::Conflict, message, remedy));
    }
    Ok(())
}

/// Makes the volume `volume`, an id that none ever had; it is encrypted if it has keys.
pub(super) async fn create_volume(
    store: &dyn Store,
    spec: &VolumeSpec,
    volume: VolumeId,
    wrapped: WrappedKeys,
) -> ApiResult<()> {
    check_free(store, &spec.volume()).await?;
    let created_ms = now_ms();
    let size =
        Sectors::from_bytes(spec.size_bytes).ok_or_else(|| internal(&"an unchecked size"))?;
    let head = Head {
        sector_size: spec.sector_size,
        compression: spec.compression,
        durability: spec.durability,
        retain_ms: spec.retain_ms,
        encryption: match wrapped.keys.is_empty() {
            true => Encryption::None,
            false => Encryption::Aes256Gcm,
        },
        keys: wrapped,
        ..Head::fresh(volume, &spec.tenant, &spec.name, size, created_ms)
    };
    let keys_revision = head.keys.revision;
    let encrypted = !head.keys.keys.is_empty();
    if encrypted {
        put_first_copy(store, &spec.tenant, volume, &head.keys).await?;
    }
    let head_key = keys::head_key(&spec.tenant, volume);
    // Of an id that nobody else has: one that is there is our own, whose answer was lost.
    create_own(store, &head_key, Bytes::from(head.encode())).await?;
    let record = NameRecord {
        rates: spec.rates.into(),
        ..NameRecord::new(volume, created_ms)
    };
    match name_fresh(store, &spec.volume(), &record).await {
        Err(error) if error.kind == Kind::Exists => {
            let revision = encrypted.then_some(keys_revision);
            delete_head(store, &spec.tenant, volume, revision).await?;
            Err(error)
        }
        named => named,
    }
}

/// Marks a volume that was just made as deleted, so that nobody attaches it any more; answers whether that is so:
/// not if somebody has attached it since.
///
/// *Crash after that: it is as one whose deletion was broken off, and `quarry volume delete` goes on with that.*
async fn bar_unused(store: &dyn Store, name: &VolumeRef, volume: VolumeId) -> ApiResult<bool> {
    let read = HeadCell::read(store, &name.tenant, volume).await;
    let (head, tag) = read.map_err(|error| head_error(name, &error))?;
    if head.epoch != Epoch::ZERO {
        return Ok(false);
    }
    let (cell, since_ms) = (HeadCell::new(name.tenant.clone(), head, tag), now_ms());
    let barred = cell.update(store, |head| {
        head.epoch = head.epoch.next();
        head.owner = Some(Deleted::InTrash { since_ms }.owner());
    });
    match barred.await {
        Ok(_) => Ok(true),
        Err(HeadError::Fenced { .. }) => Ok(false),
        Err(error) => Err(head_error(name, &error)),
    }
}

/// Takes back a volume that was just made; answers whether it has: not if somebody has attached it since, and may have
/// written to it.
pub(super) async fn unmake_unused(
    store: &dyn Store,
    name: &VolumeRef,
    volume: VolumeId,
    keys_revision: Option<u32>,
) -> ApiResult<bool> {
    if !bar_unused(store, name, volume).await? {
        return Ok(false);
    }
    let name_key = keys::name_key(&name.tenant, &name.name);
    store.delete(&name_key).await?;
    delete_head(store, &name.tenant, volume, keys_revision).await?;
    Ok(true)
}

/// Deletes the head of a volume that nobody has, and the copy of its first keys, if it has keys.
async fn delete_head(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    keys_revision: Option<u32>,
) -> ApiResult<()> {
    let copy = keys_revision.map(|revision| keys::keys_key(tenant, volume, revision));
    for key in std::iter::once(keys::head_key(tenant, volume)).chain(copy) {
        store.delete(&key).await?;
    }
    Ok(())
}

/// [`Kind::Exists`] if a name is taken.
pub(super) async fn check_free(store: &dyn Store, volume: &VolumeRef) -> ApiResult<()> {
    match store
        .get(&keys::name_key(&volume.tenant, &volume.name))
        .await
    {
        Ok(_) => Err(taken(volume)),
        Err(StoreError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn taken(volume: &VolumeRef) -> ApiError {
    let message = format!("there is a volume {volume} already");
    let remedy = "choose another name, or delete it first";
    ApiError::new(Kind::Exists, message, remedy)
}

/// Gives a volume that was just made its name; [`Kind::Exists`] if it is taken.
pub(super) async fn name_fresh(
    store: &dyn Store,
    name: &VolumeRef,
    record: &NameRecord,
) -> ApiResult<()> {
    let key = keys::name_key(&name.tenant, &name.name);
    let bytes = encode_record(NAME_KIND, record).map_err(|e| internal(&e))?;
    match store.create(&key, Bytes::from(bytes)).await {
        Ok(_) => Ok(()),
        // The lost answer of our own try, or somebody quicker: the record tells.
        Err(StoreError::Exists { .. }) if find(store, name).await? == record.volume => Ok(()),
        Err(StoreError::Exists { .. }) => Err(taken(name)),
        Err(error) => Err(error.into()),
    }
}

/// The volume of this name.
pub(super) async fn find(store: &dyn Store, volume: &VolumeRef) -> ApiResult<VolumeId> {
    Ok(find_record(store, volume).await?.volume)
}

/// What the name says.
pub(super) async fn find_record(store: &dyn Store, volume: &VolumeRef) -> ApiResult<NameRecord> {
    let key = keys::name_key(&volume.tenant, &volume.name);
    match backend::record::<NameRecord>(store, NAME_KIND, &key).await {
        Ok(record) => record.map_err(|e| damaged(&key, &e)),
        Err(StoreError::NotFound { .. }) => Err(ApiError::no_volume(volume)),
        Err(error) => Err(error.into()),
    }
}

/// Most tries to rewrite a name that others rewrite at the same time.
const RATES_TRIES_MAX: u32 = 8;

/// Sets the rates of a volume in the record of its name, where that was seen.
pub(super) async fn set_rates(
    store: &dyn Store,
    volume: &VolumeRef,
    rates: Rates,
) -> ApiResult<()> {
    let key = keys::name_key(&volume.tenant, &volume.name);
    for _ in 0..RATES_TRIES_MAX {
        let (bytes, tag) = match store.get(&key).await {
            Ok(found) => found,
            Err(StoreError::NotFound { .. }) => return Err(ApiError::no_volume(volume)),
            Err(error) => return Err(error.into()),
        };
        let mut record: NameRecord =
            decode_record(NAME_KIND, &bytes).map_err(|e| damaged(&key, &e))?;
        // Set before, maybe by a try of ours whose answer was lost.
        if record.rates == rates {
            return Ok(());
        }
        record.rates = rates;
        let bytes = encode_record(NAME_KIND, &record).map_err(|e| internal(&e))?;
        match store.replace(&key, Bytes::from(bytes), &tag).await {
            Ok(_) => return Ok(()),
            // Changed, or deleted: another look tells.
            Err(StoreError::Changed { .. } | StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let message = format!("the rates of {volume} are set by others at the same time");
    Err(ApiError::new(Kind::Conflict, message, "try again"))
}

/// What leads from a volume's name to its id.
pub(super) enum Name {
    There,
    Missing,
    Damaged(crate::store::Tag),
}

impl Name {
    pub(super) const fn is_there(&self) -> bool {
        matches!(self, Self::There)
    }
}

/// Whether the name of `volume` leads to `id`; [`Kind::Conflict`] if it leads to another.
pub(super) async fn name_state(
    store: &dyn Store,
    volume: &VolumeRef,
    id: VolumeId,
) -> ApiResult<Name> {
    let key = keys::name_key(&volume.tenant, &volume.name);
    let (bytes, tag) = match store.get(&key).await {
        Ok(found) => found,
        Err(StoreError::NotFound { .. }) => return Ok(Name::Missing),
        Err(error) => return Err(error.into()),
    };
    match decode_record::<NameRecord>(NAME_KIND, &bytes) {
        Ok(record) if record.volume == id => Ok(Name::There),
        Ok(record) => {
            let message = format!("{volume} is the name of volume {}", record.volume);
            let remedy = "leave --id out, or choose another name";
            Err(ApiError::new(Kind::Conflict, message, remedy))
        }
        Err(_) => Ok(Name::Damaged(tag)),
    }
}

/// Makes the name of `volume` lead to `id`, where `name` was seen.
pub(super) async fn name_anew(
    store: &dyn Store,
    volume: &VolumeRef,
    id: VolumeId,
    name: Name,
) -> ApiResult<()> {
    let record = NameRecord::new(id, now_ms());
    let bytes = Bytes::from(encode_record(NAME_KIND, &record).map_err(|e| internal(&e))?);
    let key = keys::name_key(&volume.tenant, &volume.name);
    let written = match name {
        Name::There => return Ok(()),
        Name::Missing => store.create(&key, bytes).await,
        Name::Damaged(tag) => store.replace(&key, bytes, &tag).await,
    };
    match written {
        Ok(_) => Ok(()),
        // The lost answer of our own try, or somebody quicker: the record tells.
        Err(StoreError::Exists { .. } | StoreError::Changed { .. }) => {
            name_state(store, volume, id).await.map(drop)
        }
        Err(error) => Err(error.into()),
    }
}

/// The head of the volume of this name.
pub(super) async fn head(store: &dyn Store, volume: &VolumeRef) -> ApiResult<Head> {
    Ok(head_and_rates(store, volume).await?.0)
}

/// The head of the volume of this name, and how fast it may be used.
pub(super) async fn head_and_rates(
    store: &dyn Store,
    volume: &VolumeRef,
) -> ApiResult<(Head, Rates)> {
    let record = find_record(store, volume).await?;
    match HeadCell::read(store, &volume.tenant, record.volume).await {
        Ok((head, _)) => Ok((head, record.rates)),
        Err(error) => Err(head_error(volume, &error)),
    }
}

/// A head that cannot be read or changed, as the API tells it.
pub(super) fn head_error(volume: &VolumeRef, error: &HeadError) -> ApiError {
    match error {
        HeadError::Store(error) => store_error(error),
        HeadError::Fenced { by } => changed_elsewhere(volume, by),
        error => ApiError::new(
            Kind::Damaged,
            format!("{volume}: {error}"),
            format!(
                "make it anew with `quarry volume rescue {volume}`, or restore the object from a copy"
            ),
        ),
    }
}

/// What to do about an object that is damaged or gone, without which a volume cannot be opened.
pub(super) fn damage_remedy(object: &str) -> &'static str {
    match object.ends_with("/head") {
        true => "make it anew with `quarry volume rescue NAME`, or restore the object from a copy",
        false => "",
    }
}

/// Waits for a change of a volume's head, or for what ends with one, for so long. Given up, it is as after a crash.
pub(super) async fn in_time<T>(
    volume: &VolumeRef,
    limit: Duration,
    change: impl Future<Output = T>,
) -> ApiResult<T> {
    let changed = tokio::time::timeout(limit, change).await;
    changed.map_err(|_| {
        let message = format!("{volume}: the store does not take its head");
        let remedy = "try again when the store answers";
        ApiError::new(Kind::Unavailable, message, remedy)
    })
}

/// Somebody else took or changed the volume at the same moment.
pub(super) fn changed_elsewhere(volume: &VolumeRef, by: &str) -> ApiError {
    let message = format!("{volume} was attached or changed just now by {by}");
    let remedy = "if it is attached there, do that there; else try again";
    ApiError::new(Kind::Conflict, message, remedy)
}

/// The head of a volume that nobody has, or `cache` had and does not serve, to be changed. Whoever attaches it
/// at the same moment wins, or finds it changed: both change the head where they have seen it.
pub(super) async fn free_head(
    store: &dyn Store,
    volume: &VolumeRef,
    cache: CacheId,
    doing: &str,
) -> ApiResult<(Head, HeadCell)> {
    let id = find(store, volume).await?;
    let read = HeadCell::read(store, &volume.tenant, id).await;
    let (head, tag) = read.map_err(|error| head_error(volume, &error))?;
    if head.deleted().is_some() {
        return Err(OpenError::Deleted.into());
    }
    if let Some(other) = head.owner.as_ref().filter(|o| o.cache != cache) {
        let message = format!("{volume} is attached by host {}", other.shown_host());
        let remedy =
            format!("{doing} there, or, if that host is lost, attach it here with --force first");
        return Err(ApiError::new(Kind::Conflict, message, remedy));
    }
    let cell = HeadCell::new(volume.tenant.clone(), head.clone(), tag);
    Ok((head, cell))
}

/// Grows a volume that nobody has, or `cache` had and does not serve.
pub(super) async fn grow_volume(
    store: &dyn Store,
    volume: &VolumeRef,
    size_bytes: u64,
    cache: CacheId,
) -> ApiResult<()> {
    let (head, cell) = free_head(store, volume, cache, "resize it").await?;
    let size = larger(volume, &head, size_bytes)?;
    if head.size == size {
        return Ok(());
    }
    let grown = cell.update(store, |head| head.size = head.size.max(size));
    let head = grown.await.map_err(|error| head_error(volume, &error))?;
    larger(volume, &head, size_bytes).map(|_| ())
}

/// Sets how long dead objects of such a volume are retained.
pub(super) async fn retain_volume(
    store: &dyn Store,
    volume: &VolumeRef,
    retain_ms: u64,
    cache: CacheId,
) -> ApiResult<()> {
    let (_, cell) = free_head(store, volume, cache, "set that").await?;
    let changed = cell.update(store, |head| head.retain(retain_ms)).await;
    changed
        .map(drop)
        .map_err(|error| head_error(volume, &error))
}

/// The names of a tenant's volumes, in order.
pub(super) async fn volume_names(
    store: &dyn Store,
    tenant: &TenantName,
) -> ApiResult<Vec<VolumeRef>> {
    let prefix = keys::names_prefix(tenant);
    let listed = store.list(&prefix).await?;
    let name = |key: &String| key.strip_prefix(&prefix).map(VolumeName::new);
    let of = |name| VolumeRef {
        tenant: tenant.clone(),
        name,
    };
    let named = listed.iter().filter_map(|key| Some(of(name(key)?.ok()?)));
    Ok(named.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::open::{Claim, hold};
    use crate::store::FolderStore;

    const CACHE: CacheId = CacheId::from_bytes([8; 16]);

    fn id(n: u8) -> VolumeId {
        VolumeId::from_bytes([n; 16])
    }

    /// A volume of 1 MiB that nobody has, and the key of its head.
    async fn made(store: &dyn Store, name: &str, volume: VolumeId) -> (VolumeRef, String) {
        let called = VolumeRef::new("acme", name).unwrap();
        let size = Sectors::from_bytes(1 << 20).unwrap();
        let head = Head::fresh(volume, &called.tenant, &called.name, size, 1);
        let key = keys::head_key(&called.tenant, volume);
        store.create(&key, head.encode().into()).await.unwrap();
        let record = NameRecord::new(volume, 1);
        name_fresh(store, &called, &record).await.unwrap();
        (called, key)
    }

    #[tokio::test]
    async fn volume_with_the_head_of_another_is_refused_and_the_other_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        let (volume, key) = made(&store, "db", id(1)).await;
        let (_, others_key) = made(&store, "other", id(2)).await;
        let (others, _) = store.get(&others_key).await.unwrap();
        let (_, tag) = store.get(&key).await.unwrap();
        store.replace(&key, others.clone(), &tag).await.unwrap();
        let grown = grow_volume(&store, &volume, 4 << 20, CACHE).await;
        let kept = retain_volume(&store, &volume, 1000, CACHE).await;
        for error in [grown.unwrap_err(), kept.unwrap_err()] {
            assert_eq!(error.kind, Kind::Damaged, "{error}");
            assert!(error.message.contains(&id(2).to_string()), "{error}");
        }
        for key in [&key, &others_key] {
            assert_eq!(store.get(key).await.unwrap().0, others);
        }
    }

    #[tokio::test]
    async fn head_that_is_missing_or_damaged_is_told_with_its_rescue() {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        let (volume, key) = made(&store, "db", id(1)).await;
        store.delete(&key).await.unwrap();
        let missing = head(&store, &volume).await.unwrap_err();
        let junk = Bytes::from_static(b"QYHDx");
        store.create(&key, junk).await.unwrap();
        let damaged = head(&store, &volume).await.unwrap_err();
        for error in [missing, damaged] {
            assert_eq!(error.kind, Kind::Damaged, "{error}");
            let rescue = "`quarry volume rescue acme/db`";
            assert!(error.remedy.contains(rescue), "{error}");
        }
        let error = HeadCell::read(&store, &volume.tenant, id(1)).await;
        let refused = ApiError::from(OpenError::from(error.unwrap_err()));
        assert!(refused.remedy.contains("rescue"), "{refused}");
    }

    /// Who was told to try again found that it is so already, and then the first try arrived.
    #[tokio::test]
    async fn retention_set_to_what_it_is_outdoes_a_change_given_up_before_that_arrives_later() {
        const WEEK_MS: u64 = 7 * 86_400_000;
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        let (volume, key) = made(&store, "db", id(1)).await;
        let retain = || retain_volume(&store, &volume, WEEK_MS, CACHE);
        retain().await.unwrap();
        let (bytes, seen) = store.get(&key).await.unwrap();
        let mut late = Head::decode(&bytes).unwrap();
        late.retain(0);
        retain().await.unwrap();
        let arrived = store.replace(&key, late.encode().into(), &seen).await;
        assert!(matches!(arrived, Err(StoreError::Changed { .. })));
        let (head, _) = HeadCell::read(&store, &volume.tenant, id(1)).await.unwrap();
        assert_eq!(head.retain_ms, WEEK_MS);
    }

    fn claim() -> Claim {
        Claim {
            cache: CACHE,
            host: "a".to_owned(),
            now_ms: 1,
            force: false,
            discard_unsent: false,
            must_be_ours: false,
        }
    }

    #[tokio::test]
    async fn volume_to_be_taken_back_is_nobodys_any_more_and_one_attached_since_stays_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        let (fresh, _) = made(&store, "fresh", id(1)).await;
        let (used, key) = made(&store, "used", id(2)).await;
        let by = claim();
        let (held, _) = hold(&store, &used.tenant, id(2), &by).await.unwrap();
        assert!(!bar_unused(&store, &used, id(2)).await.unwrap());
        let there = store.get(&key).await.unwrap().0;
        assert_eq!(there, held.get().encode());
        assert!(bar_unused(&store, &fresh, id(1)).await.unwrap());
        let refused = hold(&store, &fresh.tenant, id(1), &by).await;
        assert!(matches!(refused, Err(OpenError::Deleted)));
    }

    /// The tenant was gone for a moment, and its volume's head with what had been written.
    #[tokio::test]
    async fn volume_is_unmade_unless_it_was_attached_since() {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        let (used, key) = made(&store, "used", id(2)).await;
        let before = store.list("").await.unwrap();
        let (fresh, _) = made(&store, "fresh", id(1)).await;
        let by = claim();
        let (held, _) = hold(&store, &used.tenant, id(2), &by).await.unwrap();
        assert!(!unmake_unused(&store, &used, id(2), None).await.unwrap());
        assert_eq!(store.get(&key).await.unwrap().0, held.get().encode());
        assert!(unmake_unused(&store, &fresh, id(1), None).await.unwrap());
        assert_eq!(store.list("").await.unwrap(), before);
    }
}
