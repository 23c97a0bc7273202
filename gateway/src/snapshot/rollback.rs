//! Going back to a snapshot: the volume's map becomes the snapshot's, all else stays as it is.

use std::collections::BTreeSet;

use quarry_cache::{Branch, Mutation};
use quarry_objfmt::head::{Head, LogRange, SnapshotRef};
use quarry_objfmt::map::{Basis, DeadObject, Manifest, MapObjectId, ObjectKind, TableRef, Usage};
use quarry_objfmt::{Epoch, KeyGeneration, MapSeq, SnapName, TenantName, VolumeId};

use super::{SnapshotError, find, put_root};
use crate::backend::open::{Claim, OpenError, TakenOver, give_back, load_map, load_usage, take};
use crate::backend::{HeadCell, LogChunk, bytes_of};
use crate::store::Store;

/// Makes a volume that nobody has what its snapshot is, and as large as that, if it is smaller. One that is larger
/// keeps its size: what lies behind the snapshot's end reads as zeroes. Snapshots stay, younger ones too.
///
/// The order, and what a crash between the steps leaves:
/// 1. The volume is claimed as by an attach, its log sealed. *Crash: it is ours, and as it was.*
/// 2. A map object with the snapshot's manifest. *Crash: garbage.*
/// 3. The head: the new map, a log that begins anew behind the sealed end, no owner, and no lineage: what a cache
///    kept follows upon writes that are no more, and is given up only with `--discard-unsent`.
///
/// # Errors
/// [`SnapshotError`]; the volume is as it was, if perhaps still ours.
pub async fn roll_back(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    name: &SnapName,
    by: &Claim,
) -> Result<Head, SnapshotError> {
    // Looked for first, so that nothing is changed in vain.
    let (head, _) = HeadCell::read(store, tenant, volume).await?;
    wanted(&head, name)?;
    // Step 1.
    let taken = take(store, tenant, volume, None, by).await?;
    let done = go_back(store, tenant, name, &taken, by.now_ms).await;
    if done.is_err()
        && let Err(error) = give_back(store, &taken.head).await
    {
        tracing::warn!(%volume, %error, "not rolled back, and the store still names this host as the owner");
    }
    done
}

fn wanted<'a>(head: &'a Head, name: &SnapName) -> Result<&'a SnapshotRef, SnapshotError> {
    match find(head, name) {
        None => Err(SnapshotError::NotFound(name.clone())),
        Some(snapshot) if snapshot.closing => Err(SnapshotError::Closing(name.clone())),
        Some(snapshot) => Ok(snapshot),
    }
}

/// Steps 2 and 3.
async fn go_back(
    store: &dyn Store,
    tenant: &TenantName,
    name: &SnapName,
    taken: &TakenOver,
    now_ms: u64,
) -> Result<Head, SnapshotError> {
    let info = &taken.info;
    let volume = info.volume;
    // Whoever had the volume until now may have deleted it.
    let snapshot = wanted(info, name)?;
    let map = load_map(store, tenant, volume, snapshot.root).await?;
    let at = info.next_map;
    // Nothing is left behind before it was written, though the clock be behind.
    let times = taken.log.chunks.iter().map(|chunk| chunk.cut_ms);
    let log_ms = times.fold(now_ms, u64::max);
    let usage = usage(store, tenant, taken, snapshot, map.manifest(), at, log_ms).await?;
    let size = info.size.max(snapshot.size);
    // A place of the log stays empty: who follows the log of what was left behind is not led into what comes now.
    let first = taken.log.end.next();
    let usage = usage.map(|usage| Usage {
        basis: Basis {
            log_end: first,
            is_back: true,
            root_write: snapshot.root_write,
            size,
            log_ms: log_ms.max(usage.basis.log_ms),
            ..Basis::of(info)
        },
        ..usage
    });
    // Step 2. An object even for an empty map: the newest map has the highest number.
    let id = MapObjectId {
        volume,
        epoch: info.epoch,
        seq: at,
    };
    let root = put_root(store, tenant, id, map.manifest(), usage.as_ref()).await?;
    // Step 3.
    let root_write = snapshot.root_write;
    let left_bytes = bytes_of(&taken.log.chunks);
    let back = taken.head.update(store, |head| {
        head.root = Some(root);
        head.root_write = root_write;
        head.size = size;
        head.next_map = at.next();
        // Which the log had been until now, and is to be taken off when it is deleted.
        head.stored_bytes = head.stored_bytes.saturating_add(left_bytes);
        if !Mutation::RollbackKeepsLog.is_on() {
            head.log = vec![LogRange {
                epoch: head.epoch,
                first,
                end: None,
            }];
        }
        if !Mutation::RollbackKeepsLineage.is_on() {
            head.lineage = None;
        }
        head.owner = None;
    });
    Ok(back.await?)
}

/// What is known of the volume's objects as of the map `at`; `None` if it was not known before.
async fn usage(
    store: &dyn Store,
    tenant: &TenantName,
    taken: &TakenOver,
    snapshot: &SnapshotRef,
    manifest: &Manifest,
    at: MapSeq,
    now_ms: u64,
) -> Result<Option<Usage>, SnapshotError> {
    let info = &taken.info;
    let volume = info.volume;
    let now = async {
        let usage = load_usage(store, tenant, volume, info.root).await?;
        let map = load_map(store, tenant, volume, info.root).await?;
        Ok(usage.map(|usage| (usage, map)))
    };
    let now = match now.await {
        Ok(now) => now,
        // The map that is left may be what is wrong with the volume.
        Err(OpenError::Damaged { object, reason }) => {
            tracing::warn!(
                object,
                reason,
                "the map that a rollback leaves is damaged: what it used is counted anew"
            );
            None
        }
        Err(error) => return Err(error.into()),
    };
    let to = match load_usage(store, tenant, volume, snapshot.root).await {
        Ok(to) => to,
        // No read needs it.
        Err(OpenError::Damaged { object, reason }) => {
            tracing::warn!(
                object,
                reason,
                "the usage of the snapshot's map is damaged: what the volume uses is counted anew"
            );
            None
        }
        Err(error) => return Err(error.into()),
    };
    let (Some((now, map)), Some(to)) = (now, to) else {
        Branch::RolledBackUncounted.taken();
        return Ok(None);
    };
    Branch::RolledBackCounted.taken();
    let now_ms = now_ms.max(now.basis.log_ms);
    let own = |table: &&TableRef| table.object.volume == volume;
    let maps: BTreeSet<(Epoch, MapSeq)> = (manifest.runs.iter().flatten().filter(own))
        .map(|table| (table.object.epoch, table.object.seq))
        .collect();
    let dead = |kind, epoch, number, born, stored_bytes, generation| DeadObject {
        kind,
        epoch,
        number,
        born,
        died: at,
        died_ms: now_ms,
        stored_bytes,
        generation,
    };
    let mut left: Vec<DeadObject> = Vec::new();
    // Not in the map that is left; but after a rescue perhaps in a later one, which a snapshot has.
    let born = info.root.map_or(MapSeq::ZERO, |root| root.seq.next());
    let chunk = |chunk: &LogChunk| {
        let (epoch, seq) = (chunk.id.epoch, chunk.id.seq.get());
        let (bytes, key) = (chunk.stored_bytes.into(), chunk.generation);
        dead(ObjectKind::Chunk, epoch, seq, born, bytes, key)
    };
    left.extend(taken.log.chunks.iter().map(chunk));
    // A map object is needed by no map before the one of its own number.
    let mut of_map = |epoch: Epoch, seq: MapSeq, bytes: u64| {
        let is_new = !left
            .iter()
            .any(|o| (o.kind, o.epoch, o.number) == (ObjectKind::Map, epoch, seq.get()));
        if is_new {
            let key = KeyGeneration::FIRST;
            left.push(dead(ObjectKind::Map, epoch, seq.get(), seq, bytes, key));
        }
    };
    for table in map.runs().iter().flatten().filter(own) {
        let TableRef {
            object,
            stored_bytes,
            ..
        } = table;
        of_map(object.epoch, object.seq, *stored_bytes);
    }
    if let Some(root) = info.root {
        of_map(root.epoch, root.seq, root.len.into());
    }
    Ok(Some(now.taken_back(&to, &maps, left, at, now_ms)))
}
