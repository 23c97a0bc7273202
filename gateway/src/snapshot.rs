//! Snapshots in the store: how they are made, deleted, cloned and gone back to.
//!
//! Owns: the order of the store calls of each, and what a crash between them leaves. Does not own: who
//! may ask (`crate::engine`), what is kept for a snapshot's sake (the reclaiming of space, which goes by the
//! snapshots that the head names).
//!
//! **Invariants.**
//! - A snapshot is there if the head names it. The head is changed by its owner's conditional PUTs alone, so
//!   that a writer that was stalled can make none of objects that are gone.
//! - A clone is there if its head is. What its map names of its parent's objects is kept as long as the
//!   parent's head names the snapshot, and it does as long as the clone is there: the clone's record is written
//!   before the snapshot is looked for, and the snapshot is closing before the records are listed, so
//!   that of a creation and a deletion one sees the other. The test `snapshot_schedules` runs both in
//!   every order of their calls.
//! - Each change of a head moves it on: its bytes never come back.

mod rollback;

use bytes::Bytes;
use quarry_cache::{Branch, Mutation};
use quarry_objfmt::head::{Head, Parent, RootRef, SNAPSHOTS_MAX, SnapshotRef};
use quarry_objfmt::map::{Basis, MapObjectBuilder, MapObjectId, Usage};
use quarry_objfmt::record::CLONE_KIND;
use quarry_objfmt::wrapped::KEYS_MAX;
use quarry_objfmt::{
    ChunkSeq, CloneRecord, Encryption, Epoch, MapSeq, SnapName, Snapshot, TenantName, VolumeId,
    VolumeName, WrappedKey, WrappedKeys, WriteSeq, encode_record, keys,
};

pub use self::rollback::roll_back;
use crate::backend::open::{OpenError, load_map};
use crate::backend::{HeadCell, HeadError};
use crate::clones::{Fate, fates};
use crate::keys::{FIRST_REVISION, first, put_first_copy};
use crate::store::{Store, StoreError, create_own};
use crate::trash::TrashError;

/// Most times that a snapshot is tried anew because a checkpoint came between its two PUTs.
const TRIES_MAX: u32 = 16;

/// Why something cannot be done with a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The name is taken.
    #[error("there is a snapshot {0} already")]
    Exists(SnapName),
    /// There is none, or no more.
    #[error("there is no snapshot {0}")]
    NotFound(SnapName),
    /// Its deletion was begun.
    #[error("snapshot {0} is being deleted")]
    Closing(SnapName),
    /// The head is full.
    #[error("the volume has {SNAPSHOTS_MAX} snapshots, and can have no more")]
    TooMany,
    /// What was acknowledged is not in the map, and cannot be brought there.
    #[error("the volume's newest writes cannot be folded into its map")]
    Behind,
    /// Volumes need it.
    #[error("snapshot {snapshot} has clones: {}", .clones.join(", "))]
    HasClones {
        /// Its name.
        snapshot: SnapName,
        /// Their names.
        clones: Vec<String>,
    },
    /// A clone of it is being made, or was begun and given up less than an hour ago.
    #[error("a clone of snapshot {snapshot} is being made: {}", .clones.join(", "))]
    BeingCloned {
        /// Its name.
        snapshot: SnapName,
        /// What they are to be called.
        clones: Vec<String>,
    },
    /// The head, or what else was just seen, changes all the time.
    #[error("{object} is changed by somebody else all the time")]
    Busy {
        /// The object.
        object: String,
    },
    /// An object is damaged.
    #[error("{object}: {reason}")]
    Damaged {
        /// Its key.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// The snapshot's volume is encrypted, and the clone was given no key of its own.
    #[error("the volume is encrypted, and its clone was given no key")]
    Keyless,
    /// A head can have no more.
    #[error(
        "a clone of it would need more than {KEYS_MAX} keys, for it was cloned of clones itself"
    )]
    TooManyKeys,
    /// The head cannot be read or changed.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// The volume cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<TrashError> for SnapshotError {
    fn from(error: TrashError) -> Self {
        match error {
            TrashError::Store(error) => error.into(),
            TrashError::Record { key, error } => Self::Damaged {
                object: key,
                reason: error.to_string(),
            },
            error => Self::Damaged {
                object: "a clone".to_owned(),
                reason: error.to_string(),
            },
        }
    }
}

/// Why a change of the head is not made.
enum Not {
    Exists,
    Missing,
    Moved,
    Needed,
    /// Or it would be more than a head holds.
    Full,
}

/// Moves a head on, so that its bytes are none that it had before: a map number is passed over.
fn renew(head: &mut Head) {
    head.next_map = head.next_map.next();
}

fn find<'a>(head: &'a Head, name: &SnapName) -> Option<&'a SnapshotRef> {
    head.snapshots.iter().find(|s| s.name == name.as_str())
}

/// Gives the map of the head a name. All writes up to `at_least` must be in that map.
///
/// The order, and what a crash between the steps leaves:
/// 1. The copy, for a rescue. *Crash: a copy that no head names; the next snapshot of that name takes its
///    place, and deleting the name deletes it.*
/// 2. The head. If a checkpoint moved it since, both are done anew with the new map.
///
/// # Errors
/// [`SnapshotError`]; after one of the store's, the snapshot may be there or not.
pub async fn create(
    store: &dyn Store,
    cell: &HeadCell,
    name: &SnapName,
    at_least: WriteSeq,
    now_ms: u64,
) -> Result<SnapshotRef, SnapshotError> {
    for _ in 0..TRIES_MAX {
        let head = cell.get();
        if find(&head, name).is_some() {
            return Err(SnapshotError::Exists(name.clone()));
        }
        if head.snapshots.len() >= SNAPSHOTS_MAX {
            return Err(SnapshotError::TooMany);
        }
        if head.root_write < at_least {
            return Err(SnapshotError::Behind);
        }
        let snapshot = SnapshotRef {
            name: name.to_string(),
            created_ms: now_ms,
            root_write: head.root_write,
            size: head.size,
            closing: false,
            root: head.root,
        };
        // Step 1.
        put_copy(store, cell, &head, &snapshot, name).await?;
        // Step 2.
        let add = |head: &mut Head| match find(head, name) {
            // A turn before this one, whose answer was lost.
            Some(there) if *there == snapshot => {
                Branch::SnapshotThere.taken();
                Err(Not::Needed)
            }
            Some(_) => Err(Not::Exists),
            None if head.root != snapshot.root => Err(Not::Moved),
            // A change before this one, whose answer was lost, may have filled it.
            None if head.snapshots.len() >= SNAPSHOTS_MAX => Err(Not::Full),
            None => {
                // The last, but where a rescue went back to an older map than a snapshot has.
                let map = |s: &SnapshotRef| s.root.map(|root| root.seq);
                let at = head.snapshots.partition_point(|s| map(s) <= map(&snapshot));
                head.snapshots.insert(at, snapshot.clone());
                renew(head);
                Ok(())
            }
        };
        match cell.try_update(store, add).await? {
            Ok(_) | Err(Not::Needed) => return Ok(snapshot),
            Err(Not::Moved) => Branch::SnapshotMoved.taken(),
            Err(Not::Full) => return Err(SnapshotError::TooMany),
            Err(_) => return Err(SnapshotError::Exists(name.clone())),
        }
    }
    let object = keys::head_key(cell.tenant(), cell.get().volume);
    Err(SnapshotError::Busy { object })
}

/// Writes the copy of a snapshot, over one that no head names: not if the volume was taken over, for it may be of a
/// snapshot of the new owner's.
async fn put_copy(
    store: &dyn Store,
    cell: &HeadCell,
    head: &Head,
    snapshot: &SnapshotRef,
    name: &SnapName,
) -> Result<(), SnapshotError> {
    let key = keys::snap_key(cell.tenant(), head.volume, name);
    let copy = Snapshot {
        volume: head.volume,
        name: snapshot.name.clone(),
        created_ms: snapshot.created_ms,
        root: snapshot.root,
        root_write: snapshot.root_write,
        size: snapshot.size,
        log_end: head.log.first().map_or(ChunkSeq::new(1), |r| r.first),
    };
    let bytes = Bytes::from(copy.encode());
    match store.create(&key, bytes.clone()).await {
        Ok(_) => return Ok(()),
        Err(StoreError::Exists { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Branch::SnapshotCopyThere.taken();
    let (there, tag) = store.get(&key).await?;
    if there == bytes {
        return Ok(());
    }
    // After the copy was read: one that is written later has another tag.
    cell.still_ours(store).await?;
    match store.replace(&key, bytes.clone(), &tag).await {
        Ok(_) => Ok(()),
        Err(StoreError::Changed { .. }) if store.get(&key).await?.0 == bytes => Ok(()),
        Err(StoreError::Changed { .. }) => Err(SnapshotError::Busy { object: key }),
        Err(error) => Err(error.into()),
    }
}

/// Takes a snapshot's name away, if no clone needs it.
///
/// The order, and what a crash between the steps leaves:
/// 1. The head: the snapshot is closing. *Crash, here and up to step 3: it stays so; no clone is made
///    of it, and deleting it again goes on.*
/// 2. The records of its clones. If one is there, or being made, the head is changed back, and that is an
///    error. One that was begun long ago and has no head gets an empty one, in the trash, create-only, and
///    then its record is deleted: whoever began it finds that, or was there first.
/// 3. The head, without the snapshot. From here on what only it needed may be deleted. *Crash: the copy
///    stays; deleting it again deletes that.*
/// 4. The copy.
///
/// # Errors
/// [`SnapshotError`].
pub async fn delete(
    store: &dyn Store,
    cell: &HeadCell,
    name: &SnapName,
    now_ms: u64,
) -> Result<(), SnapshotError> {
    let volume = cell.get().volume;
    let copy = keys::snap_key(cell.tenant(), volume, name);
    // Step 1.
    match cell.try_update(store, |head| close(head, name)).await? {
        Ok(_) | Err(Not::Needed) => {}
        Err(_) => {
            // We know of none of that name; whoever has taken the volume over may have made one since.
            cell.still_ours(store).await?;
            return match store.get(&copy).await {
                Ok(_) => {
                    Branch::SnapshotCopyLeft.taken();
                    Ok(store.delete(&copy).await?)
                }
                Err(StoreError::NotFound { .. }) => Err(SnapshotError::NotFound(name.clone())),
                Err(error) => Err(error.into()),
            };
        }
    }
    // Step 2.
    if let Err(needed) = settle_clones(store, cell.tenant(), volume, name, now_ms).await? {
        Branch::SnapshotReopened.taken();
        cell.update(store, |head| reopen(head, name)).await?;
        return Err(needed);
    }
    // Step 3.
    let remove = |head: &mut Head| {
        head.snapshots.retain(|s| s.name != name.as_str());
        renew(head);
    };
    cell.update(store, remove).await?;
    // Step 4.
    Ok(store.delete(&copy).await?)
}

/// From here on no clone of the snapshot is made.
fn close(head: &mut Head, name: &SnapName) -> Result<(), Not> {
    let mut all = head.snapshots.iter_mut();
    let found = all.find(|s| s.name == name.as_str()).ok_or(Not::Missing)?;
    if found.closing {
        Branch::SnapshotClosing.taken();
        return Err(Not::Needed);
    }
    found.closing = true;
    renew(head);
    Ok(())
}

fn reopen(head: &mut Head, name: &SnapName) {
    for snapshot in &mut head.snapshots {
        if snapshot.name == name.as_str() {
            snapshot.closing = false;
        }
    }
    renew(head);
}

/// Step 2 of [`delete`]: the inner error says which clones there are.
async fn settle_clones(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    name: &SnapName,
    now_ms: u64,
) -> Result<Result<(), SnapshotError>, SnapshotError> {
    if Mutation::DeleteClonedSnapshot.is_on() {
        return Ok(Ok(()));
    }
    let (mut live, mut begun) = (Vec::new(), Vec::new());
    let prefix = keys::clones_prefix(tenant, volume, name);
    for (key, fate) in fates(store, tenant, &prefix, Some(now_ms)).await? {
        match fate {
            Fate::Live(name) => live.push(name),
            Fate::Begun(name) => begun.push(name),
            Fate::Gone => store.delete(&key).await?,
        }
    }
    let snapshot = name.clone();
    Ok(match (live.is_empty(), begun.is_empty()) {
        (true, true) => Ok(()),
        (false, _) => Err(SnapshotError::HasClones {
            snapshot,
            clones: live,
        }),
        (true, false) => Err(SnapshotError::BeingCloned {
            snapshot,
            clones: begun,
        }),
    })
}

/// The names of the clones of a snapshot that are there; changes nothing.
///
/// # Errors
/// [`SnapshotError`].
pub async fn clones(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    name: &SnapName,
) -> Result<Vec<String>, SnapshotError> {
    let live = |(_, fate)| match fate {
        Fate::Live(name) => Some(name),
        Fate::Begun(_) | Fate::Gone => None,
    };
    let prefix = keys::clones_prefix(tenant, volume, name);
    let fates = fates(store, tenant, &prefix, None).await?;
    Ok(fates.into_iter().filter_map(live).collect())
}

fn encoded(kind: &str, record: &impl serde::Serialize) -> Result<Bytes, SnapshotError> {
    let bytes = encode_record(kind, record).map_err(|error| SnapshotError::Damaged {
        object: format!("a record of kind {kind}"),
        reason: error.to_string(),
    })?;
    Ok(bytes.into())
}

/// A clone to be.
#[derive(Clone, Debug)]
pub struct CloneSpec {
    /// Whose, as the parent.
    pub tenant: TenantName,
    /// The volume whose snapshot it is made of.
    pub parent: VolumeId,
    /// The snapshot.
    pub snapshot: SnapName,
    /// Its own id, that no volume ever had.
    pub volume: VolumeId,
    /// What it is to be called.
    pub name: VolumeName,
    /// Its own data key, if the volume is encrypted.
    pub key: Option<WrappedKey>,
    /// Now, in milliseconds since 1970.
    pub now_ms: u64,
}

/// Makes a volume of a snapshot, without its name, whatever is done with the snapshot's volume meanwhile.
///
/// The order, and what a crash between the steps leaves:
/// 1. The record at the parent, create-only. *Crash: the snapshot cannot be deleted for an hour; then
///    whoever deletes it gives the clone up.*
/// 2. The parent's head is read: the snapshot must be there and not closing.
/// 3. The map object: the snapshot's manifest in the clone's own name. Its tables stay the parent's. If they are encrypted,
///    the copy of the clone's keys, which are its own and those that the parent's head has. *Crash: garbage.*
/// 4. The head, create-only: that of one given up may be there by now. *Crash: the clone is there, without a name.*
/// 5. The record is looked for once more: what stands in the head's place for a clone given up is purged some day, so a maker
///    that slept for days would come to step 4 as if nothing had been. But that purge deletes the record first. *Crash before: as
///    after step 4.*
///
/// # Errors
/// [`SnapshotError`]. Up to step 3, and if it was given up, what was made is taken back as far as the store lets
/// it. A head that the store gave no answer to may arrive at any time: the record stays for its sake, as after a
/// crash.
pub async fn make_clone(store: &dyn Store, spec: &CloneSpec) -> Result<Head, SnapshotError> {
    let CloneSpec { tenant, parent, .. } = spec;
    let key = clone_key(spec);
    let record = CloneRecord {
        volume: spec.volume,
        name: spec.name.to_string(),
        created_ms: spec.now_ms,
    };
    // Step 1.
    // The id is ours alone.
    if !Mutation::CloneWithoutRecord.is_on() {
        create_own(store, &key, encoded(CLONE_KIND, &record)?).await?;
    }
    // Step 2.
    let read = HeadCell::read(store, tenant, *parent).await;
    let found = read.map_err(SnapshotError::from).and_then(|(head, _)| {
        if head.deleted().is_some() {
            return Err(OpenError::Deleted.into());
        }
        let refused = match find(&head, &spec.snapshot).cloned() {
            None => SnapshotError::NotFound(spec.snapshot.clone()),
            Some(s) if s.closing => SnapshotError::Closing(spec.snapshot.clone()),
            Some(snapshot) => return Ok((head, snapshot)),
        };
        Branch::CloneRefused.taken();
        Err(refused)
    });
    let made = match found {
        Ok((head, snapshot)) => new_head(store, spec, &head, &snapshot).await,
        Err(error) => Err(error),
    };
    let head = match made {
        Ok(head) => head,
        Err(error) => {
            take_back(store, spec).await;
            return Err(error);
        }
    };
    // Step 4.
    let head_key = keys::head_key(tenant, spec.volume);
    match store.create(&head_key, head.encode().into()).await {
        Ok(_) => {}
        Err(StoreError::Exists { .. })
            if HeadCell::read(store, tenant, spec.volume).await?.0 == head =>
        {
            Branch::CloneThere.taken();
        }
        Err(StoreError::Exists { .. }) => {
            Branch::CloneFoundGivenUp.taken();
            take_back(store, spec).await;
            return Err(SnapshotError::NotFound(spec.snapshot.clone()));
        }
        Err(error) => return Err(error.into()),
    }
    // Step 5.
    match store.get(&key).await {
        Ok(_) => Ok(head),
        Err(StoreError::NotFound { .. }) if Mutation::CloneWithoutRecord.is_on() => Ok(head),
        Err(StoreError::NotFound { .. }) => {
            store.delete(&head_key).await?;
            take_back(store, spec).await;
            Err(SnapshotError::NotFound(spec.snapshot.clone()))
        }
        Err(error) => Err(error.into()),
    }
}

fn clone_key(spec: &CloneSpec) -> String {
    keys::clone_key(&spec.tenant, spec.parent, &spec.snapshot, spec.volume)
}

/// Step 3, and the head for step 4.
async fn new_head(
    store: &dyn Store,
    spec: &CloneSpec,
    parent: &Head,
    snapshot: &SnapshotRef,
) -> Result<Head, SnapshotError> {
    let fresh = Head::fresh(
        spec.volume,
        &spec.tenant,
        &spec.name,
        snapshot.size,
        spec.now_ms,
    );
    let mut head = Head {
        sector_size: parent.sector_size,
        frame_sectors: parent.frame_sectors,
        compression: parent.compression,
        encryption: parent.encryption,
        durability: parent.durability,
        retain_ms: parent.retain_ms,
        next_map: CLONED_MAP.next(),
        parent: Some(Parent {
            volume: spec.parent,
            snapshot: spec.snapshot.to_string(),
        }),
        ..fresh
    };
    if snapshot.root.is_some() {
        let basis = Basis {
            log_ms: spec.now_ms,
            ..Basis::of(&head)
        };
        head.root = Some(copy_map(store, spec, snapshot.root, basis).await?);
    }
    if head.encryption != Encryption::None {
        let own = spec.key.clone().ok_or(SnapshotError::Keyless)?;
        let mut all = parent.keys.keys.clone();
        all.push(own);
        head.keys = keys_of(all)?;
        put_first_copy(store, &spec.tenant, spec.volume, &head.keys).await?;
    }
    Ok(head)
}

/// A clone's first keys.
fn keys_of(all: Vec<WrappedKey>) -> Result<WrappedKeys, SnapshotError> {
    if all.len() > KEYS_MAX {
        return Err(SnapshotError::TooManyKeys);
    }
    Ok(first(all))
}

/// The number of a clone's first map, in epoch 0.
const CLONED_MAP: MapSeq = MapSeq::ZERO;

/// Step 3.
async fn copy_map(
    store: &dyn Store,
    spec: &CloneSpec,
    root: Option<RootRef>,
    basis: Basis,
) -> Result<RootRef, SnapshotError> {
    let map = load_map(store, &spec.tenant, spec.parent, root).await?;
    let id = MapObjectId {
        volume: spec.volume,
        epoch: Epoch::ZERO,
        seq: CLONED_MAP,
    };
    let usage = Usage {
        basis,
        ..Usage::default()
    };
    put_root(store, &spec.tenant, id, map.manifest(), Some(&usage)).await
}

/// Stores a map object of a manifest, and a usage if it is known, alone.
async fn put_root(
    store: &dyn Store,
    tenant: &TenantName,
    id: MapObjectId,
    manifest: &quarry_objfmt::map::Manifest,
    usage: Option<&Usage>,
) -> Result<RootRef, SnapshotError> {
    let key = keys::map_key(tenant, id.volume, id.epoch, id.seq);
    let damaged = |error: quarry_objfmt::FormatError| SnapshotError::Damaged {
        object: key.clone(),
        reason: error.to_string(),
    };
    let mut builder = MapObjectBuilder::new(id);
    let usage = usage.map(|usage| builder.finish_usage(usage));
    let usage = usage.transpose().map_err(damaged)?;
    let (offset, len) = builder.finish_manifest(manifest).map_err(damaged)?;
    // The number is ours alone.
    create_own(store, &key, builder.into_bytes().into()).await?;
    Ok(RootRef {
        epoch: id.epoch,
        seq: id.seq,
        offset,
        len,
        usage,
    })
}

/// Takes back a clone whose head was never sent, or was given up: the record goes last, for it is what leads
/// to the rest. *Crash: as one of its creation.*
async fn take_back(store: &dyn Store, spec: &CloneSpec) {
    Branch::CloneTakenBack.taken();
    let CloneSpec { tenant, volume, .. } = spec;
    let map = keys::map_key(tenant, *volume, Epoch::ZERO, CLONED_MAP);
    let copy = keys::keys_key(tenant, *volume, FIRST_REVISION);
    let undo = async {
        store.delete(&map).await?;
        if spec.key.is_some() {
            store.delete(&copy).await?;
        }
        store.delete(&clone_key(spec)).await
    };
    if let Err(error) = undo.await {
        tracing::warn!(clone = %volume, %error, "a clone that was begun is not taken back; deleting its snapshot will");
    }
}
