//! Deleting volumes in two steps: into the trash, which costs a few requests whatever the volume's
//! size, and out of it, back or for good.
//!
//! Owns: the order of the store calls of each step. Does not own: when a volume's time in the trash is
//! over, or what hosts have of it ([`crate::engine`]).
//!
//! Into the trash ([`put`]):
//! 1. `head`: a new epoch, [`Deleted::InTrash`] in the owner's place, and no snapshot takes clones any
//!    more. From here on nobody attaches it, and who had it is fenced. *Crash: it has its name and is
//!    not in the trash's list; deleting or restoring it again goes on.*
//! 2. Its clones are looked for, which none can be added to any more; if there are any, 1 is undone.
//! 3. The record `trash/<uuid>`. *Crash: as after 1, and it is in the list.*
//! 4. Its name is deleted.
//!
//! Out of it again ([`restore`]): `head` without the mark and with the name that it gets; the name,
//! create-only; then the record goes. *Crash in between: the record is there, the mark is not, so
//! nobody purges it; restoring it again goes on.*
//!
//! For good ([`purge`]):
//! 1. `head`: [`Deleted::Purging`], and without its keys. From here on nobody restores it. A head that is lost or
//!    damaged is replaced by one that says so. *Crash: whoever purges next goes on, and several at once do no
//!    harm: each deletes what it finds.*
//! 2. The copies of its keys, if it may have any: from here on what is left of an encrypted volume's data can be read by
//!    nobody, but by its clones, whose heads have those keys too.
//! 3. Its record at the snapshot that it was cloned from, which protects nothing since 1. It goes before the head does: who
//!    wakes late over the making of a clone that was given up finds the head's place taken, or that record gone.
//! 4. Every object below the volume's own prefix, the head last.
//! 5. The record `trash/<uuid>`. *Crash before: an empty prefix, and 3 and 5 are done again.*
//!
//! **Invariants.**
//! - Only keys below the prefix of a volume that its own head marks as deleted are deleted, or of one whose
//!   head is lost and that the trash's record names.
//! - The head alone says since when a volume is deleted: a record may be left over from before.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use quarry_cache::{Branch, Mutation};
use quarry_objfmt::head::{Head, Parent};
use quarry_objfmt::record::{
    CloneOf, CloneRecord, NAME_KIND, NameRecord, Rates, TRASH_KIND, TrashRecord, encode_record,
};
use quarry_objfmt::{
    CacheId, Deleted, Encryption, Epoch, FormatError, Sectors, SnapName, TenantName, VolumeId,
    VolumeName, keys,
};

use crate::backend::{self, DAMAGE_RETRIES_MAX, HeadCell, HeadError};
use crate::clones::{Fate, fates};
use crate::control::VolumeRef;
use crate::keys::copies;
use crate::store::{Store, StoreError, Tag};

/// Objects deleted side by side.
const DELETES_AT_ONCE: usize = 16;

/// Keys listed at once, the head among them: a page of S3.
const KEYS_AT_ONCE: usize = 1000;

/// How long making a clone may take from its record at the parent to its head. After that the record is
/// of one that is given up. (Whoever began it and wakes later finds that; the time only keeps creations under way
/// from being disturbed.)
pub(crate) const CLONING_TIME_MAX_MS: u64 = 60 * 60 * 1000;

/// Most times that a head is looked at again because somebody else changed it.
const TURNS_MAX: u32 = 4;

/// Why a volume cannot be deleted, brought back or purged.
#[derive(Debug, thiserror::Error)]
pub enum TrashError {
    /// Somebody has it.
    #[error("it is attached by host {host}")]
    Owned {
        /// Where.
        host: String,
    },
    /// It was changed at the same moment.
    #[error("it was changed just now by {by}")]
    Raced {
        /// By whom.
        by: String,
    },
    /// Other volumes need its objects.
    #[error("it has clones: {}", .clones.join(", "))]
    Clones {
        /// Their names, or what is known of them.
        clones: Vec<String>,
    },
    /// A clone has its record and no head yet.
    #[error("a clone of it, {clone}, is being made")]
    Cloning {
        /// What it is to be called.
        clone: String,
    },
    /// There is no such volume in the trash.
    #[error("it is not in the trash")]
    NotThere,
    /// It is too late.
    #[error("it is being purged: its objects are being deleted")]
    Purging,
    /// Its name is another volume's by now.
    #[error("there is a volume {0} already")]
    Taken(VolumeRef),
    /// It was restored already.
    #[error("it was restored as {0}")]
    Restored(VolumeRef),
    /// Another name leads to it too.
    #[error(
        "it is called {0}, and this name was left by a restoring or a rescue that gave it that one"
    )]
    Misnamed(VolumeRef),
    /// Its restoring under another name was begun, and may still take effect.
    #[error("its restoring as {0} was begun")]
    Restoring(VolumeRef),
    /// It was being restored, and has no name yet.
    #[error("it was being restored, and has no name yet")]
    Nameless,
    /// What says whether it may be restored is lost.
    #[error("its head is missing or damaged")]
    Headless,
    /// A later build made it.
    #[error("its head cannot be read: {0}")]
    Newer(FormatError),
    /// A record is damaged.
    #[error("{key}: {error}")]
    Record {
        /// The record.
        key: String,
        /// What is wrong with it.
        error: FormatError,
    },
    /// The store says of an object that it is deleted, and that it is there.
    #[error("{key} was deleted, and the store lists it still")]
    Stays {
        /// The first such object.
        key: String,
    },
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<HeadError> for TrashError {
    fn from(error: HeadError) -> Self {
        match error {
            HeadError::Fenced { by } => Self::Raced { by },
            // It was sound when it was looked at: somebody purged it, or is about to.
            HeadError::Damaged { .. } => Self::Raced {
                by: "somebody who purges it".to_owned(),
            },
            HeadError::Store(error) => error.into(),
        }
    }
}

/// A volume in the trash.
#[derive(Clone, Debug)]
pub struct Trashed {
    /// What its record says.
    pub record: TrashRecord,
    /// Its head; none if it is lost or damaged.
    pub head: Option<Head>,
}

impl Trashed {
    /// Since when it is deleted, in milliseconds since 1970.
    #[must_use]
    pub fn since_ms(&self) -> u64 {
        match self.head.as_ref().and_then(Head::deleted) {
            Some(Deleted::InTrash { since_ms }) => since_ms,
            _ => self.record.deleted_ms,
        }
    }
}

/// What came of purging a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purged {
    /// Nothing of it is left.
    Gone,
    /// It has not been in the trash for long enough.
    NotDue {
        /// Since when it is there, in milliseconds since 1970.
        since_ms: u64,
    },
    /// It was restored; its record in the trash was left over.
    Restored,
}

/// A head as it was found.
pub(crate) enum Found {
    Sound(Box<Head>, Tag),
    Missing,
    Damaged(Tag),
}

pub(crate) async fn look(
    store: &dyn Store,
    tenant: &TenantName,
    id: VolumeId,
) -> Result<Found, TrashError> {
    let key = keys::head_key(tenant, id);
    let mut tries = 0;
    loop {
        let (bytes, tag) = match store.get(&key).await {
            Ok(found) => found,
            Err(StoreError::NotFound { .. }) => return Ok(Found::Missing),
            Err(error) => return Err(error.into()),
        };
        match Head::decode(&bytes) {
            Ok(head) if head.volume == id => return Ok(Found::Sound(Box::new(head), tag)),
            Err(error @ FormatError::Version { .. }) => return Err(TrashError::Newer(error)),
            _ if tries < DAMAGE_RETRIES_MAX => tries += 1,
            _ => return Ok(Found::Damaged(tag)),
        }
    }
}

/// Deletes the volume of this name, for now. `cache` is this host's, which may have had it attached and
/// does not serve it.
///
/// # Errors
/// [`TrashError::Owned`], [`TrashError::Clones`] or [`TrashError::Cloning`] if that cannot be; else those of
/// the store.
pub async fn put(
    store: &dyn Store,
    volume: &VolumeRef,
    id: VolumeId,
    cache: CacheId,
    now_ms: u64,
) -> Result<TrashRecord, TrashError> {
    let name = name_record(store, volume).await?;
    let rates = match name.filter(|name| name.volume == id) {
        Some(name) => name.rates,
        // Its deletion goes on: what the trash says already.
        None => rates_in_trash(store, &volume.tenant, id).await?,
    };
    let record = |deleted_ms, head: Option<&Head>| TrashRecord {
        volume: id,
        name: volume.name.to_string(),
        deleted_ms,
        rates,
        parent: head.and_then(|head| head.parent.as_ref()).map(clone_of),
    };
    let mut turns = 0;
    let record = loop {
        match mark(store, volume, id, cache, now_ms).await {
            Ok(Some(head)) => match head.deleted() {
                Some(Deleted::InTrash { since_ms }) => {
                    let record = record(since_ms, Some(&head));
                    note(store, &volume.tenant, &record).await?;
                    break record;
                }
                // Its record is there until all of it is gone.
                _ => break record(now_ms, Some(&head)),
            },
            // Nobody can attach it, and that is a reason more to be rid of it.
            Ok(None) => {
                let record = record(now_ms, None);
                note(store, &volume.tenant, &record).await?;
                break record;
            }
            Err(TrashError::Raced { .. }) if turns < TURNS_MAX => turns += 1,
            Err(error) => return Err(error),
        }
    };
    // Not another volume's that was made meanwhile, after somebody else deleted this one.
    if named(store, volume).await? != Some(id) {
        return Ok(record);
    }
    let key = keys::name_key(&volume.tenant, &volume.name);
    store.delete(&key).await?;
    // Who restored it since it was marked relied on the name.
    match look(store, &volume.tenant, id).await? {
        Found::Sound(head, _) if head.deleted().is_none() => {
            Branch::RestoredMeanwhile.taken();
            if called_otherwise(&head, volume).is_none() {
                give_name(store, volume, id, head.created_ms, rates).await?;
            }
            let by = "somebody who restored it".to_owned();
            Err(TrashError::Raced { by })
        }
        _ => Ok(record),
    }
}

fn clone_of(parent: &Parent) -> CloneOf {
    CloneOf {
        volume: parent.volume,
        snapshot: parent.snapshot.clone(),
    }
}

/// Gives a volume its name. *Before that, a volume that is not deleted can be found by its id alone.*
async fn give_name(
    store: &dyn Store,
    volume: &VolumeRef,
    id: VolumeId,
    created_ms: u64,
    rates: Rates,
) -> Result<(), TrashError> {
    let key = keys::name_key(&volume.tenant, &volume.name);
    let record = NameRecord {
        rates,
        ..NameRecord::new(id, created_ms)
    };
    let bytes = encode_record(NAME_KIND, &record).map_err(|error| TrashError::Record {
        key: key.clone(),
        error,
    })?;
    match store.create(&key, bytes.into()).await {
        Ok(_) => Ok(()),
        // The lost answer of our own try, or another volume's: the record tells.
        Err(StoreError::Exists { .. }) if named(store, volume).await? == Some(id) => Ok(()),
        Err(StoreError::Exists { .. }) => Err(TrashError::Taken(volume.clone())),
        Err(error) => Err(error.into()),
    }
}

/// Steps 1 and 2: the head, marked as deleted; none if it cannot be read.
async fn mark(
    store: &dyn Store,
    volume: &VolumeRef,
    id: VolumeId,
    cache: CacheId,
    now_ms: u64,
) -> Result<Option<Head>, TrashError> {
    let tenant = &volume.tenant;
    let Found::Sound(head, tag) = look(store, tenant, id).await? else {
        return Ok(None);
    };
    let cell = HeadCell::new(tenant.clone(), (*head).clone(), tag);
    // As it is again if it cannot go.
    let mut before = *head.clone();
    let marked = match head.deleted() {
        Some(Deleted::Purging) => return Ok(Some(*head)),
        Some(Deleted::InTrash { .. }) => {
            Branch::DeletionGoesOn.taken();
            revive(&mut before);
            *head
        }
        None => {
            if let Some(other) = head.owner.as_ref().filter(|o| o.cache != cache) {
                let host = other.shown_host();
                return Err(TrashError::Owned { host });
            }
            check_name(store, &head, volume).await?;
            // Most refusals are had without changing anything.
            no_clones(store, tenant, &head, now_ms).await?;
            let bury = |head: &mut Head| {
                bury(head, now_ms);
                // What our cache kept of it is given up next, and may be found there again all the same.
                head.lineage = head.lineage.filter(|lineage| lineage.cache != cache);
            };
            cell.update(store, bury).await?
        }
    };
    if let Err(refusal) = no_clones(store, tenant, &marked, now_ms).await {
        let back = |head: &mut Head| {
            head.epoch = head.epoch.next();
            head.owner.clone_from(&before.owner);
            head.lineage = before.lineage;
            head.snapshots.clone_from(&before.snapshots);
        };
        Branch::DeletionUndone.taken();
        cell.update(store, back).await?;
        return Err(refusal);
    }
    Ok(Some(marked))
}

/// What a volume is called, if that is not the name that led to it. Its head alone says what it is called.
fn called_otherwise(head: &Head, volume: &VolumeRef) -> Option<VolumeRef> {
    let name = VolumeName::new(head.name.as_str()).ok()?;
    let tenant = volume.tenant.clone();
    (name != volume.name).then_some(VolumeRef { tenant, name })
}

/// Refuses a name that leads to a volume which is called otherwise: by that, it may be attached.
///
/// # Errors
/// [`TrashError::Misnamed`]; [`TrashError::Restoring`] if it has not got that name yet; else those of the store.
pub async fn check_name(
    store: &dyn Store,
    head: &Head,
    volume: &VolumeRef,
) -> Result<(), TrashError> {
    let Some(called) = called_otherwise(head, volume) else {
        return Ok(());
    };
    match own_name(store, &volume.tenant, called.name.as_str(), head.volume).await? {
        Some(_) => Err(TrashError::Misnamed(called)),
        None => Err(TrashError::Restoring(called)),
    }
}

/// Marks a head as that of a volume in the trash.
fn bury(head: &mut Head, since_ms: u64) {
    head.epoch = head.epoch.next();
    head.owner = Some(Deleted::InTrash { since_ms }.owner());
    for snapshot in &mut head.snapshots {
        snapshot.closing = true;
    }
}

/// Takes [`bury`] back. A snapshot that was half deleted before is whole: its entry goes last.
fn revive(head: &mut Head) {
    head.epoch = head.epoch.next();
    head.owner = None;
    for snapshot in &mut head.snapshots {
        snapshot.closing = false;
    }
}

/// Writes the trash's record. One that is there already may be from before a restore that was not
/// finished: it is made anew. *Crash in between: the volume is not in the list and has its name.*
async fn note(
    store: &dyn Store,
    tenant: &TenantName,
    record: &TrashRecord,
) -> Result<(), TrashError> {
    let key = keys::trash_key(tenant, record.volume);
    let bytes = encode_record(TRASH_KIND, record);
    let bytes = Bytes::from(bytes.map_err(|error| TrashError::Record {
        key: key.clone(),
        error,
    })?);
    loop {
        match store.create(&key, bytes.clone()).await {
            Ok(_) => return Ok(()),
            Err(StoreError::Exists { .. }) => match store.get(&key).await {
                Ok((found, _)) if found == bytes => return Ok(()),
                Ok(_) => {
                    Branch::TrashRecordRenewed.taken();
                    store.delete(&key).await?;
                }
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
}

/// An error if another volume needs objects of this one.
async fn no_clones(
    store: &dyn Store,
    tenant: &TenantName,
    head: &Head,
    now_ms: u64,
) -> Result<(), TrashError> {
    if head.snapshots.is_empty() {
        return Ok(());
    }
    clones_of(store, tenant, head.volume, now_ms).await
}

/// An error if a record below the volume's prefix leads to a clone, or to one that is being made. One that was left
/// long ago by one who made no clone is made harmless.
async fn clones_of(
    store: &dyn Store,
    tenant: &TenantName,
    id: VolumeId,
    now_ms: u64,
) -> Result<(), TrashError> {
    if Mutation::DeleteClonedVolume.is_on() {
        return Ok(());
    }
    let prefix = keys::all_clones_prefix(tenant, id);
    let (mut clones, mut begun) = (Vec::new(), None);
    for (_, fate) in fates(store, tenant, &prefix, Some(now_ms)).await? {
        match fate {
            Fate::Live(name) => clones.push(name),
            Fate::Begun(name) => begun = Some(name),
            Fate::Gone => {}
        }
    }
    match begun {
        _ if !clones.is_empty() => Err(TrashError::Clones { clones }),
        Some(clone) => Err(TrashError::Cloning { clone }),
        None => Ok(()),
    }
}

/// Gives up a clone that was begun, whose record is `key`, and has no head: an empty volume in the trash gets its id,
/// create-only, so that who wakes late finds that taken. *Crash before its record in the trash, or an answer lost: whoever
/// meets the empty volume next writes that* ([`note_given_up`]).
///
/// # Errors
/// Those of the store; [`StoreError::Exists`] if there is a head.
pub(crate) async fn give_up(
    store: &dyn Store,
    tenant: &TenantName,
    clone: &CloneRecord,
    key: &str,
    now_ms: u64,
) -> Result<(), TrashError> {
    let since_ms = now_ms;
    let empty = stand_in(
        tenant,
        clone.volume,
        &clone.name,
        Deleted::InTrash { since_ms },
    );
    let head_key = keys::head_key(tenant, clone.volume);
    store.create(&head_key, empty.encode().into()).await?;
    Branch::CloneGivenUp.taken();
    note_given_up(store, tenant, &empty, key, since_ms).await
}

/// Puts an empty volume that stands for a clone given up, whose record is `key`, into the trash's list, where it may be.
/// Purging it deletes that record, if nobody has before.
///
/// # Errors
/// Those of the store.
pub(crate) async fn note_given_up(
    store: &dyn Store,
    tenant: &TenantName,
    empty: &Head,
    key: &str,
    since_ms: u64,
) -> Result<(), TrashError> {
    let left = TrashRecord {
        volume: empty.volume,
        name: empty.name.clone(),
        deleted_ms: since_ms,
        parent: recorded_at(key),
        rates: Rates::NONE,
    };
    note(store, tenant, &left).await
}

/// The snapshot at which the record of a clone lies, by the record's key.
fn recorded_at(key: &str) -> Option<CloneOf> {
    let mut parts = key.rsplit('/');
    let (_, snapshot, _, volume) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    Some(CloneOf {
        volume: VolumeId::parse(volume).ok()?,
        snapshot: snapshot.to_owned(),
    })
}

/// Whether the head of a deleted volume is one that [`give_up`] put there: nothing was ever in it.
pub(crate) fn never_was(head: &Head) -> bool {
    head.epoch == Epoch::ZERO && head.deleted().is_some()
}

/// A head for a volume that has none and is to have none. It is told by its epoch, which is 0.
fn stand_in(tenant: &TenantName, id: VolumeId, name: &str, deleted: Deleted) -> Head {
    let name = VolumeName::new(name)
        .unwrap_or_else(|_| VolumeName::new("unknown").expect("a name that is allowed"));
    Head {
        owner: Some(deleted.owner()),
        ..Head::fresh(id, tenant, &name, Sectors::new(8), 0)
    }
}

/// The volume that a name leads to, if there is one.
async fn named(store: &dyn Store, volume: &VolumeRef) -> Result<Option<VolumeId>, TrashError> {
    Ok(name_record(store, volume)
        .await?
        .map(|record| record.volume))
}

async fn name_record(
    store: &dyn Store,
    volume: &VolumeRef,
) -> Result<Option<NameRecord>, TrashError> {
    let key = keys::name_key(&volume.tenant, &volume.name);
    match backend::record::<NameRecord>(store, NAME_KIND, &key).await {
        Ok(record) => record
            .map(Some)
            .map_err(|error| TrashError::Record { key, error }),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The name, if it leads to this volume; one that cannot be read leads nowhere.
pub(crate) async fn own_name(
    store: &dyn Store,
    tenant: &TenantName,
    name: &str,
    id: VolumeId,
) -> Result<Option<VolumeName>, TrashError> {
    let Ok(name) = VolumeName::new(name) else {
        return Ok(None);
    };
    let tenant = tenant.clone();
    let volume = VolumeRef { tenant, name };
    match named(store, &volume).await {
        Ok(found) => Ok((found == Some(id)).then_some(volume.name)),
        Err(TrashError::Record { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A record of the trash, if it is there. One of another volume is as good as damaged: purging goes by what it says.
async fn record(
    store: &dyn Store,
    tenant: &TenantName,
    id: VolumeId,
) -> Result<Option<TrashRecord>, TrashError> {
    let key = keys::trash_key(tenant, id);
    let misplaced = FormatError::Misplaced {
        what: "record of the trash",
        field: "volume",
    };
    match backend::record::<TrashRecord>(store, TRASH_KIND, &key).await {
        Ok(Ok(record)) if record.volume == id => Ok(Some(record)),
        Ok(read) => {
            let error = read.err().unwrap_or(misplaced);
            Err(TrashError::Record { key, error })
        }
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The rates of a volume of the trash; none if its record is missing or damaged, for the volume is worth more than they.
async fn rates_in_trash(
    store: &dyn Store,
    tenant: &TenantName,
    id: VolumeId,
) -> Result<Rates, TrashError> {
    match record(store, tenant, id).await {
        Ok(record) => Ok(record.map_or(Rates::NONE, |record| record.rates)),
        Err(TrashError::Record { .. }) => Ok(Rates::NONE),
        Err(error) => Err(error),
    }
}

/// The records of a tenant's trash. One that is damaged is left out, and logged: what it names is not
/// purged.
///
/// # Errors
/// Those of the store.
pub async fn records(
    store: &dyn Store,
    tenant: &TenantName,
) -> Result<Vec<TrashRecord>, TrashError> {
    let prefix = keys::trash_prefix(tenant);
    let keys = store.list(&prefix).await?;
    let mut ids = Vec::new();
    for key in keys {
        let id = key.strip_prefix(&prefix).map(VolumeId::parse);
        ids.extend(id.and_then(Result::ok));
    }
    let read = futures::stream::iter(ids)
        .map(|id| record(store, tenant, id))
        .buffered(DELETES_AT_ONCE);
    let mut records = Vec::new();
    let mut read = std::pin::pin!(read);
    while let Some(record) = read.next().await {
        match record {
            Ok(record) => records.extend(record),
            Err(error @ TrashError::Record { .. }) => {
                tracing::error!(%error, "a record of the trash is damaged");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}

/// A tenant's trash, the heads too.
///
/// # Errors
/// Those of the store.
pub async fn list(store: &dyn Store, tenant: &TenantName) -> Result<Vec<Trashed>, TrashError> {
    let records = records(store, tenant).await?;
    futures::stream::iter(records)
        .map(|record| async move {
            let head = match look(store, tenant, record.volume).await {
                Ok(Found::Sound(head, _)) => Some(*head),
                Ok(_) | Err(TrashError::Newer(_)) => None,
                Err(error) => return Err(error),
            };
            Ok(Trashed { record, head })
        })
        .buffered(DELETES_AT_ONCE)
        .try_collect()
        .await
}

/// Gives a volume of the trash a name again: `name`, or the one that it had.
///
/// # Errors
/// [`TrashError::NotThere`], [`TrashError::Purging`], [`TrashError::Taken`], [`TrashError::Headless`]; else
/// those of the store.
pub async fn restore(
    store: &dyn Store,
    tenant: &TenantName,
    id: VolumeId,
    name: Option<&VolumeName>,
) -> Result<VolumeRef, TrashError> {
    let (head, tag) = match look(store, tenant, id).await? {
        Found::Sound(head, tag) => (head, tag),
        Found::Missing | Found::Damaged(_) => return Err(TrashError::Headless),
    };
    let since_ms = match head.deleted() {
        // Nothing was ever in it.
        Some(Deleted::InTrash { .. }) if never_was(&head) => {
            return Err(TrashError::NotThere);
        }
        Some(Deleted::InTrash { since_ms }) => Some(since_ms),
        Some(Deleted::Purging) => return Err(TrashError::Purging),
        None if record(store, tenant, id).await?.is_none() => return Err(TrashError::NotThere),
        None => None,
    };
    let had = VolumeRef {
        tenant: tenant.clone(),
        name: VolumeName::new(head.name.as_str()).map_err(|_| TrashError::Headless)?,
    };
    let volume = VolumeRef {
        tenant: tenant.clone(),
        name: name.unwrap_or(&had.name).clone(),
    };
    if since_ms.is_none() {
        match named(store, &had).await? {
            // Restored before, but for the record.
            Some(there) if there == id => {
                Branch::RestoringGoesOn.taken();
                drop_other_names(store, id, &had, &had).await?;
                store.delete(&keys::trash_key(tenant, id)).await?;
                return match volume == had {
                    true => Ok(volume),
                    false => Err(TrashError::Restored(had)),
                };
            }
            // The PUT of that name may be on its way still: then the volume would have two.
            None if volume != had => return Err(TrashError::Restoring(had)),
            _ => {}
        }
    }
    if let Some(owner) = head.owner.as_ref().filter(|_| since_ms.is_none()) {
        let host = owner.shown_host();
        return Err(TrashError::Owned { host });
    }
    match named(store, &volume).await? {
        Some(other) if other != id => return Err(TrashError::Taken(volume)),
        _ => {}
    }
    if let Some(deleted_ms) = since_ms
        && record(store, tenant, id).await?.is_none()
    {
        // A deletion that was broken off after its mark: what is begun here can be gone on with by its record alone.
        let there = name_record(store, &had).await?;
        let record = TrashRecord {
            volume: id,
            name: head.name.clone(),
            deleted_ms,
            rates: there.map_or(Rates::NONE, |name| name.rates),
            parent: head.parent.as_ref().map(clone_of),
        };
        note(store, tenant, &record).await?;
    }
    let rates = rates_in_trash(store, tenant, id).await?;
    let cell = HeadCell::new(tenant.clone(), *head, tag);
    let revived = |head: &mut Head| {
        revive(head);
        head.name = volume.name.to_string();
    };
    cell.update(store, revived).await?;
    let named = give_name(store, &volume, id, cell.get().created_ms, rates).await;
    if let (Err(TrashError::Taken(_)), Some(since_ms)) = (&named, since_ms) {
        // Nobody else can have taken a volume without a name.
        cell.update(store, |head| bury(head, since_ms)).await?;
    }
    named?;
    drop_other_names(store, id, &volume, &had).await?;
    store.delete(&keys::trash_key(tenant, id)).await?;
    Ok(volume)
}

/// Deletes what leads to the volume beside `volume`: the name that it `had`, or had when it was deleted, where a deletion that was broken
/// off left that.
async fn drop_other_names(
    store: &dyn Store,
    id: VolumeId,
    volume: &VolumeRef,
    had: &VolumeRef,
) -> Result<(), TrashError> {
    let tenant = &volume.tenant;
    let deleted = match record(store, tenant, id).await {
        Ok(record) => record.map(|record| record.name),
        Err(TrashError::Record { .. }) => None,
        Err(error) => return Err(error),
    };
    for name in [Some(had.name.to_string()), deleted].into_iter().flatten() {
        let is_other = name != volume.name.as_str();
        if is_other && let Some(name) = own_name(store, tenant, &name, id).await? {
            store.delete(&keys::name_key(tenant, &name)).await?;
        }
    }
    Ok(())
}

/// Deletes a volume of the trash for good, if it is there for `age_min_ms` or longer. Each object that is
/// deleted counts up `objects`.
///
/// # Errors
/// [`TrashError::NotThere`]; [`TrashError::Clones`] and [`TrashError::Nameless`] if it must not be; else
/// those of the store. All but the first can be tried again.
pub async fn purge(
    store: &dyn Store,
    tenant: &TenantName,
    id: VolumeId,
    now_ms: u64,
    age_min_ms: u64,
    objects: &AtomicU64,
) -> Result<Purged, TrashError> {
    let Some(record) = record(store, tenant, id).await? else {
        return Err(TrashError::NotThere);
    };
    let mut turns = 0;
    let keys = loop {
        match condemn(store, tenant, &record, now_ms, age_min_ms).await {
            Ok(Ok(keys)) => break keys,
            Ok(Err(Purged::Restored)) => {
                Branch::PurgeFindsRestored.taken();
                store.delete(&keys::trash_key(tenant, id)).await?;
                return Ok(Purged::Restored);
            }
            Ok(Err(answer)) => return Ok(answer),
            Err(TrashError::Raced { .. }) if turns < TURNS_MAX => turns += 1,
            Err(error) => return Err(error),
        }
    };
    if let MayHaveKeys(true) = keys {
        erase_keys(store, tenant, id, objects).await?;
    }
    if let Some(of) = &record.parent
        && let Ok(snapshot) = SnapName::new(of.snapshot.as_str())
    {
        let key = keys::clone_key(tenant, of.volume, &snapshot, id);
        store.delete(&key).await?;
    }
    empty(store, tenant, id, objects).await?;
    drop_name(store, tenant, &record).await?;
    store.delete(&keys::trash_key(tenant, id)).await?;
    Ok(Purged::Gone)
}

/// Deletes the name of a volume that is gone, if it still leads to it: a name that was stored late, when it had been
/// deleted already, would be in the way of the next volume of that name for ever.
async fn drop_name(
    store: &dyn Store,
    tenant: &TenantName,
    record: &TrashRecord,
) -> Result<(), TrashError> {
    match own_name(store, tenant, &record.name, record.volume).await? {
        Some(name) => Ok(store.delete(&keys::name_key(tenant, &name)).await?),
        None => Ok(()),
    }
}

/// Whether copies of keys may lie beside a head.
struct MayHaveKeys(bool);

impl MayHaveKeys {
    /// One that stands in for a lost head says nothing of that.
    fn of(head: &Head) -> Self {
        Self(head.encryption != Encryption::None || never_was(head))
    }
}

/// Step 1 of purging; the inner error is an answer: it must not go on.
async fn condemn(
    store: &dyn Store,
    tenant: &TenantName,
    record: &TrashRecord,
    now_ms: u64,
    age_min_ms: u64,
) -> Result<Result<MayHaveKeys, Purged>, TrashError> {
    let id = record.volume;
    let early = |since_ms: u64| {
        let due = age_min_ms == 0 || now_ms.saturating_sub(since_ms) >= age_min_ms;
        if due || Mutation::PurgeEarly.is_on() {
            return None;
        }
        Branch::PurgeNotDue.taken();
        Some(Purged::NotDue { since_ms })
    };
    let changed = || TrashError::Raced {
        by: "another daemon".to_owned(),
    };
    match look(store, tenant, id).await? {
        Found::Sound(head, tag) => match head.deleted() {
            Some(Deleted::Purging) => {
                Branch::PurgeGoesOn.taken();
                return Ok(Ok(MayHaveKeys::of(&head)));
            }
            Some(Deleted::InTrash { since_ms }) => {
                if let Some(early) = early(since_ms) {
                    return Ok(Err(early));
                }
                clones_of(store, tenant, id, now_ms).await?;
                let keys = MayHaveKeys::of(&head);
                let cell = HeadCell::new(tenant.clone(), *head, tag);
                let condemned = |head: &mut Head| {
                    head.epoch = head.epoch.next();
                    head.owner = Some(Deleted::Purging.owner());
                    head.keys.keys.clear();
                };
                cell.update(store, condemned).await?;
                return Ok(Ok(keys));
            }
            None => {
                let name = VolumeName::new(head.name).map_err(|_| TrashError::Nameless)?;
                let tenant = tenant.clone();
                return match named(store, &VolumeRef { tenant, name }).await? {
                    Some(named) if named == id => Ok(Err(Purged::Restored)),
                    _ => Err(TrashError::Nameless),
                };
            }
        },
        Found::Missing => {
            Branch::PurgeHeadless.taken();
            let prefix = keys::volume_prefix(tenant, id);
            if store.list_some(&prefix, 1).await?.is_empty() {
                return Ok(Ok(MayHaveKeys(false)));
            }
            if let Some(early) = early(record.deleted_ms) {
                return Ok(Err(early));
            }
            clones_of(store, tenant, id, now_ms).await?;
            let head = stand_in(tenant, id, &record.name, Deleted::Purging);
            let key = keys::head_key(tenant, id);
            match store.create(&key, head.encode().into()).await {
                Ok(_) => {}
                Err(StoreError::Exists { .. }) => return Err(changed()),
                Err(error) => return Err(error.into()),
            }
        }
        Found::Damaged(tag) => {
            if let Some(early) = early(record.deleted_ms) {
                return Ok(Err(early));
            }
            clones_of(store, tenant, id, now_ms).await?;
            let head = stand_in(tenant, id, &record.name, Deleted::Purging);
            let key = keys::head_key(tenant, id);
            match store.replace(&key, head.encode().into(), &tag).await {
                Ok(_) => {}
                Err(StoreError::Changed { .. }) => return Err(changed()),
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(Ok(MayHaveKeys(true)))
}

/// Deletes the copies of a volume's keys.
async fn erase_keys(
    store: &dyn Store,
    tenant: &TenantName,
    id: VolumeId,
    objects: &AtomicU64,
) -> Result<(), TrashError> {
    for revision in copies(store, tenant, id).await? {
        store.delete(&keys::keys_key(tenant, id, revision)).await?;
        objects.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Deletes everything below a volume's prefix, the head when nothing else is left.
async fn empty(
    store: &dyn Store,
    tenant: &TenantName,
    id: VolumeId,
    objects: &AtomicU64,
) -> Result<(), TrashError> {
    let (prefix, head) = (keys::volume_prefix(tenant, id), keys::head_key(tenant, id));
    let mut last = Vec::new();
    loop {
        let mut found = store.list_some(&prefix, KEYS_AT_ONCE).await?;
        if found.iter().any(|key| *key != head) {
            found.retain(|key| *key != head);
        }
        match found.first() {
            None => return Ok(()),
            Some(key) if found == last => return Err(TrashError::Stays { key: key.clone() }),
            Some(_) => {}
        }
        futures::stream::iter(found.clone())
            .map(|key| async move { store.delete(&key).await })
            .buffer_unordered(DELETES_AT_ONCE)
            .try_for_each(|()| async {
                objects.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
            .await?;
        last = found;
    }
}

#[cfg(test)]
mod tests;
