//! Checkpoints: the log folded into the map, and `head` moved to the new map.
//!
//! The order: map objects first, then one conditional PUT of `head`. *Crash in between: map
//! objects that nothing names; the old map and the log are whole.* One change of the map at a time: whoever
//! makes it holds the lock on [`VolumeBackend`]'s objects.
//!
//! The new entries are a run of their own, or are merged with the newest runs as
//! [`plan_merge`] says. Memory: one table being built, one stretch of each run being read.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use quarry_cache::Mutation;
use quarry_objfmt::head::{Head, RootRef};
use quarry_objfmt::map::{Basis, MapObjectBuilder, MapObjectId, TableRef};
use quarry_objfmt::{ChunkSeq, MapEntry, MapSeq, keys};
use quarry_volume::map::{MapRoot, plan_merge};
use quarry_volume::{CheckpointPlan, DataError, Event};

use super::VolumeBackend;
use super::head::HeadError;
use super::objects::Objects;
use super::scan::Scan;
use crate::store::{StoreError, create_own};

/// A table is cut at about this many bytes: the memory of building one, and the grain of merges.
const TABLE_BYTES_MAX: usize = 8 << 20;

/// Why there is no checkpoint.
#[derive(Debug)]
pub(super) enum Stopped {
    /// The volume is somebody else's.
    Fenced {
        /// Whose.
        by: String,
    },
    /// The map that is there cannot be read.
    Damaged(DataError),
    /// The store does not take what is to be stored: nothing that waiting alone mends, but somebody can mend it.
    Refused(DataError),
}

/// What begins the problem of a store that takes no map.
pub(super) const REFUSED: &str = "the store takes no new map";

impl From<DataError> for Stopped {
    fn from(error: DataError) -> Self {
        Self::Damaged(error)
    }
}

/// Writes the map objects of a checkpoint, moves the head to them, and tells the volume.
pub(super) async fn run(backend: &VolumeBackend, plan: CheckpointPlan) -> Result<(), Stopped> {
    let entries = plan.log.entries();
    // Should it fail, the volume's is the only one, and need not be copied to be written to.
    drop(plan.log);
    let mut objects = backend.objects.lock().await;
    let old = backend.root.lock().clone();
    // The runs that a compaction goes by stay as they are until it is done.
    let free = old.runs().len() - backend.compacted_runs.load(Ordering::Relaxed);
    let merged = plan_merge(&old, entries.len() as u64).min(free);
    let (runs, oldest) = (&old.runs()[..merged], merged == old.runs().len());
    let mut writer = Writer::new(backend);
    let mut scan = Scan::new(backend, entries.clone(), runs, oldest);
    while let Some(entry) = scan.next().await? {
        writer.push(entry).await?;
    }
    let tables = writer.end_tables();
    let root = old.with_new_run(merged, tables);
    let chunks = backend.log_up_to(plan.upto);
    let (upto, last_write) = (plan.upto, plan.last_write);
    let born = backend
        .root_ref
        .lock()
        .map_or(MapSeq::ZERO, |root| root.seq.next());
    let root = publish(
        backend,
        writer,
        &mut objects,
        &old,
        root,
        |objects, map, now_ms| objects.fold(&chunks, &entries, born, map, now_ms),
        move |head| {
            head.root_write = last_write;
            let after = upto.next();
            head.log
                .retain(|range| range.end.is_none_or(|end| end > after));
            for range in &mut head.log {
                range.first = range.first.max(after);
            }
        },
    )
    .await?;
    backend.folded(&chunks);
    // With the right to change the map: the volume hears of its maps in their order.
    backend.tell(Event::Checkpointed { root, upto }).await;
    Ok(())
}

/// Merges the `count` newest runs into one, and moves the head to the result; `change` is made to the head with
/// it. The caller has the right to change the map. Answers false if it was ended by `go_on` before.
pub(super) async fn merge(
    backend: &VolumeBackend,
    objects: &mut Objects,
    count: usize,
    change: impl Fn(&mut Head) + Send,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<bool, Stopped> {
    let old = backend.root.lock().clone();
    let mut writer = Writer::new(backend);
    let (runs, oldest) = (&old.runs()[..count], count == old.runs().len());
    let mut scan = Scan::new(backend, Vec::new(), runs, oldest);
    while let Some(entry) = scan.next().await? {
        if !go_on() {
            return Ok(false);
        }
        writer.push(entry).await?;
    }
    let root = old.with_new_run(count, writer.end_tables());
    remap(backend, writer, objects, &old, root, |_, _, _| {}, change).await?;
    Ok(true)
}

/// As [`publish`], of a map that says what the one before it said, and tells the volume.
pub(super) async fn remap(
    backend: &VolumeBackend,
    writer: Writer<'_>,
    objects: &mut Objects,
    old: &Arc<MapRoot>,
    root: MapRoot,
    list: impl FnOnce(&mut Objects, MapSeq, u64),
    change: impl Fn(&mut Head) + Send,
) -> Result<(), Stopped> {
    let root = publish(backend, writer, objects, old, root, list, change).await?;
    // With the right to change the map: the volume hears of its maps in their order.
    backend.tell(Event::Remapped { root }).await;
    Ok(())
}

/// Writes the manifest of `root` and its usage behind the tables, and moves the head to them. `list` makes
/// of the objects what they are with the new map, whose number it is given, `change` of the head. `old` is the map that
/// `root` was made from, with the right to change the map.
///
/// The manifest goes into the newest table's object: one PUT for all of a small change. A head that names another map
/// than the one that `root` was made from is left as it is: a change before this one was stored after all, though
/// nobody knew, and has in it what this one has not.
///
/// # Panics
/// If `old` is not the map: what was folded since would be gone with it.
async fn publish(
    backend: &VolumeBackend,
    mut writer: Writer<'_>,
    objects: &mut Objects,
    old: &Arc<MapRoot>,
    root: MapRoot,
    list: impl FnOnce(&mut Objects, MapSeq, u64),
    change: impl Fn(&mut Head) + Send,
) -> Result<Arc<MapRoot>, Stopped> {
    let is_newest = Arc::ptr_eq(old, &backend.root.lock());
    assert!(is_newest, "a map is made from the one before it");
    let builder = writer.builder();
    let id = builder.id();
    // Nothing dies before what it was in was written, though the clock be behind: what is kept for a time is kept for all of it.
    let now_ms = (backend.common.now_ms)().max(objects.log_ms());
    let mut next = objects.clone();
    list(&mut next, id.seq, now_ms);
    let from = *backend.root_ref.lock();
    let manifest = from.map(|root| MapObjectId {
        volume: backend.volume,
        epoch: root.epoch,
        seq: root.seq,
    });
    next.replace_map(old, manifest, &root, id.seq, now_ms);
    let mut after = backend.head.get();
    change(&mut after);
    let usage = next.usage(Basis::of(&after));
    let usage = usage.map(|usage| builder.finish_usage(&usage)).transpose();
    let usage =
        usage.map_err(|error| damaged("what is known of the objects", error.to_string()))?;
    let (offset, len) = builder
        .finish_manifest(root.manifest())
        .map_err(|error| damaged("the new map", error.to_string()))?;
    let late = writer.builder.take_if(|_| Mutation::HeadBeforeMap.is_on());
    writer.put_object().await?;

    let next_map = MapSeq::new(backend.next_map.load(Ordering::Relaxed));
    let log_begins = after
        .log
        .first()
        .map_or(ChunkSeq::ZERO, |range| range.first);
    let stored_bytes = backend.stored_before(log_begins);
    let named = Some(RootRef {
        epoch: id.epoch,
        seq: id.seq,
        offset,
        len,
        usage,
    });
    let changed = backend
        .head
        .try_update(&*backend.common.background, move |head| {
            // A turn before this one, or the first.
            if head.root != from && head.root != named {
                return Err(());
            }
            head.root = named;
            // A snapshot may have passed over numbers.
            head.next_map = head.next_map.max(next_map);
            head.stored_bytes = stored_bytes;
            change(head);
            Ok(())
        });
    match changed.await {
        Ok(Ok(_)) => {}
        Ok(Err(())) => {
            let reason = "it names a map that was stored without an answer: detach the volume and attach it anew";
            return Err(damaged("head", reason.to_owned()));
        }
        Err(HeadError::Fenced { by }) => return Err(Stopped::Fenced { by }),
        Err(HeadError::Damaged { object, reason }) => {
            return Err(Stopped::Damaged(DataError { object, reason }));
        }
        Err(HeadError::Store(error)) => return Err(refused("head", &error)),
    }
    if late.is_some() {
        writer.builder = late;
        writer.put_object().await?;
    }
    let root = Arc::new(root);
    *backend.root.lock() = Arc::clone(&root);
    *backend.root_ref.lock() = named;
    next.head_names(id.seq);
    *objects = next;
    backend.note_space(objects);
    backend.over(REFUSED);
    Ok(root)
}

pub(super) fn refused(object: &str, error: &StoreError) -> Stopped {
    let (object, reason) = (object.to_owned(), error.to_string());
    let why = DataError { object, reason };
    match error {
        StoreError::Invalid { .. } => Stopped::Refused(why),
        _ => Stopped::Damaged(why),
    }
}

fn damaged(object: &str, reason: String) -> Stopped {
    let object = object.to_owned();
    Stopped::Damaged(DataError { object, reason })
}

/// Builds the map objects, one in memory at a time.
pub(super) struct Writer<'a> {
    backend: &'a VolumeBackend,
    builder: Option<MapObjectBuilder>,
    tables: Vec<TableRef>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(backend: &'a VolumeBackend) -> Self {
        Self {
            backend,
            builder: None,
            tables: Vec::new(),
        }
    }

    fn builder(&mut self) -> &mut MapObjectBuilder {
        let backend = self.backend;
        self.builder.get_or_insert_with(|| {
            MapObjectBuilder::new(MapObjectId {
                volume: backend.volume,
                epoch: backend.head.epoch(),
                seq: MapSeq::new(backend.next_map.fetch_add(1, Ordering::Relaxed)),
            })
        })
    }

    /// Adds an entry behind those before.
    pub(super) async fn push(&mut self, entry: MapEntry) -> Result<(), Stopped> {
        let builder = self.builder();
        builder
            .push(entry)
            .expect("entries are sorted and inside the volume");
        if builder.table_bytes() >= TABLE_BYTES_MAX {
            self.end_table();
            self.put_object().await?;
        }
        Ok(())
    }

    /// The tables, with all that was pushed.
    pub(super) fn end_tables(&mut self) -> Vec<TableRef> {
        self.end_table();
        std::mem::take(&mut self.tables)
    }

    fn end_table(&mut self) {
        let table = self
            .builder()
            .finish_table()
            .expect("tables are cut long before 4 GiB");
        self.tables.extend(table);
    }

    async fn put_object(&mut self) -> Result<(), Stopped> {
        let Some(builder) = self.builder.take() else {
            return Ok(());
        };
        let id = builder.id();
        let object = keys::map_key(self.backend.head.tenant(), id.volume, id.epoch, id.seq);
        let bytes = Bytes::from(builder.into_bytes());
        let len = bytes.len() as u64;
        // Its number is ours alone in our epoch.
        create_own(&*self.backend.common.background, &object, bytes)
            .await
            .map_err(|error| refused(&object, &error))?;
        self.backend.map_bytes.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }
}
