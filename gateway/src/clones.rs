//! What became of the clones of a volume's snapshots, by their records at the volume.
//!
//! One rule for all who ask, whether a snapshot may go or its volume: a record protects what it lies at unless it is
//! certain that there is no clone and never will be. So one whose head cannot be read counts, and one that was rescued
//! and does not know its parent any more, but has snapshots of when it was a clone.

use futures::{StreamExt as _, TryStreamExt as _};
use quarry_objfmt::record::CLONE_KIND;
use quarry_objfmt::{
    CloneRecord, Deleted, Epoch, FormatError, Head, MapSeq, SnapName, TenantName, VolumeId, keys,
};

use crate::backend;
use crate::backend::open::{OpenError, load_usage};
use crate::keys::FIRST_REVISION;
use crate::store::{Store, StoreError};
use crate::trash::{
    CLONING_TIME_MAX_MS, Found, TrashError, give_up, look, never_was, note_given_up, own_name,
};

/// Clones looked at side by side.
const CLONES_AT_ONCE: usize = 16;

/// What became of a clone that has a record.
pub(crate) enum Fate {
    /// It is there.
    Live(String),
    /// It has no head, and began not long ago.
    Begun(String),
    /// It is not there, and never will be.
    Gone,
}

/// The keys of the records below `prefix`, one snapshot's or all of a volume's, and what became of each. With a time, a
/// clone that was begun long before it is given up.
///
/// # Errors
/// [`TrashError::Record`] if a record is damaged that alone could tell; else those of the store.
pub(crate) async fn fates(
    store: &dyn Store,
    tenant: &TenantName,
    prefix: &str,
    now_ms: Option<u64>,
) -> Result<Vec<(String, Fate)>, TrashError> {
    let listed = store.list(prefix).await?;
    let looks = futures::stream::iter(listed).map(|key| async move {
        let fate = fate(store, tenant, &key, now_ms).await?;
        Ok((key, fate))
    });
    looks.buffered(CLONES_AT_ONCE).try_collect().await
}

async fn fate(
    store: &dyn Store,
    tenant: &TenantName,
    key: &str,
    now_ms: Option<u64>,
) -> Result<Fate, TrashError> {
    let id = key.rsplit_once('/').map(|(_, id)| VolumeId::parse(id));
    let Some(Ok(clone)) = id else {
        return Ok(Fate::Live(key.to_owned()));
    };
    loop {
        match look(store, tenant, clone).await {
            Ok(Found::Sound(head, _)) => {
                let needs_parent = needs_parent(store, tenant, &head, key).await?;
                return Ok(match head.deleted() {
                    Some(Deleted::Purging) => Fate::Gone,
                    Some(Deleted::InTrash { since_ms }) if never_was(&head) => {
                        // Before the record here goes, which alone leads to it otherwise.
                        if now_ms.is_some() {
                            note_given_up(store, tenant, &head, key, since_ms).await?;
                        }
                        Fate::Gone
                    }
                    _ if !needs_parent => Fate::Gone,
                    Some(_) => Fate::Live(format!("{tenant}/{} (in the trash)", head.name)),
                    None => Fate::Live(known_as(store, tenant, &head).await?),
                });
            }
            // It can be mended, or read by another build.
            Ok(Found::Damaged(_)) | Err(TrashError::Newer(_)) => {
                return Ok(Fate::Live(format!(
                    "volume {clone}, whose head cannot be read"
                )));
            }
            Ok(Found::Missing) => {}
            Err(error) => return Err(error),
        }
        let record = match backend::record(store, CLONE_KIND, key).await {
            Ok(record) => record,
            // Deleted since, with its clone.
            Err(StoreError::NotFound { .. }) => return Ok(Fate::Gone),
            Err(error) => return Err(error.into()),
        }
        .and_then(|record: CloneRecord| match record.volume == clone {
            true => Ok(record),
            false => Err(FormatError::invalid("clone", "it is of another volume")),
        })
        .map_err(|error| TrashError::Record {
            key: key.to_owned(),
            error,
        })?;
        let age = now_ms.map_or(0, |now| now.saturating_sub(record.created_ms));
        if age < CLONING_TIME_MAX_MS {
            return Ok(Fate::Begun(format!("{tenant}/{}", record.name)));
        }
        if was_there(store, tenant, &record).await? {
            return Ok(Fate::Live(format!("volume {clone}, whose head is lost")));
        }
        match give_up(store, tenant, &record, key, now_ms.unwrap_or_default()).await {
            // Whoever was quicker, or our own lost answer: what is there tells.
            Ok(()) | Err(TrashError::Store(StoreError::Exists { .. })) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether a clone without a head had one once: its making leaves no more than its first map and the copy of its first keys
/// before that, and its name comes after.
async fn was_there(
    store: &dyn Store,
    tenant: &TenantName,
    record: &CloneRecord,
) -> Result<bool, TrashError> {
    let id = record.volume;
    let prefix = keys::volume_prefix(tenant, id);
    let before = [
        keys::keys_key(tenant, id, FIRST_REVISION),
        keys::map_key(tenant, id, Epoch::ZERO, MapSeq::ZERO),
    ];
    if store
        .list_some(&prefix, before.len() + 1)
        .await?
        .iter()
        .any(|key| !before.contains(key))
    {
        return Ok(true);
    }
    let named = own_name(store, tenant, &record.name, id).await?;
    Ok(named.is_some())
}

/// Whether a clone may need the parent at which the record `key` lies. One that was flattened names no parent, and
/// its record is left where a crash came between the two. Of each of its snapshots the map says whether it was a clone then.
async fn needs_parent(
    store: &dyn Store,
    tenant: &TenantName,
    clone: &Head,
    key: &str,
) -> Result<bool, TrashError> {
    let lies_at = clone.parent.as_ref().and_then(|parent| {
        let snapshot = SnapName::new(&parent.snapshot).ok()?;
        let at = keys::clone_key(tenant, parent.volume, &snapshot, clone.volume);
        Some(at)
    });
    if lies_at.is_some_and(|at| at == key) {
        return Ok(true);
    }
    for snapshot in &clone.snapshots {
        match load_usage(store, tenant, clone.volume, snapshot.root).await {
            // One that says no time says nothing of this either.
            Ok(Some(usage)) if usage.basis.log_ms > 0 && !usage.basis.is_clones => {}
            Err(OpenError::Store(error)) => return Err(error.into()),
            // It cannot be told.
            _ => return Ok(true),
        }
    }
    Ok(false)
}

/// What people know a clone by: its name, or, if that does not lead to it, its id too.
async fn known_as(
    store: &dyn Store,
    tenant: &TenantName,
    clone: &Head,
) -> Result<String, TrashError> {
    let (name, id) = (&clone.name, clone.volume);
    Ok(match own_name(store, tenant, name, id).await? {
        Some(name) => format!("{tenant}/{name}"),
        None => format!("{tenant}/{name} (nameless, id {id})"),
    })
}
