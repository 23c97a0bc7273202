//! Checkpoints: the log folded into the map, and `head` moved to the new map.
//!
//! The order: map objects first, then one conditional PUT of `head`. *Crash in between: map
//! objects that nothing names; the old map and the log are whole.*
//!
//! The new entries are a run of their own, or are merged with the newest runs as
//! [`plan_merge`] says. Memory: one table being built, one stretch of each run being read.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use quarry_cache::Mutation;
use quarry_objfmt::head::RootRef;
use quarry_objfmt::map::{MapObjectBuilder, MapObjectId, TableRef};
use quarry_objfmt::{MapSeq, keys};
use quarry_volume::map::{MapRoot, Merger, Node, NodeRef, RunCursor, Step, plan_merge};
use quarry_volume::{CheckpointPlan, DataError};

use super::VolumeBackend;
use super::head::HeadError;
use super::sound::DAMAGE_RETRIES_MAX;
use crate::store::StoreError;

/// A table is cut at about this many bytes: the memory of building one, and the grain of merges.
const TABLE_BYTES_MAX: usize = 8 << 20;

/// Bytes of a run that are read at once when it is merged.
const STRETCH_BYTES: u64 = 1 << 20;

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
}

impl From<DataError> for Stopped {
    fn from(error: DataError) -> Self {
        Self::Damaged(error)
    }
}

/// Writes the map objects of a checkpoint and moves the head to them.
pub(super) async fn run(
    backend: &VolumeBackend,
    plan: &CheckpointPlan,
) -> Result<Arc<MapRoot>, Stopped> {
    let old = backend.root.lock().clone();
    let merged = plan_merge(&old, plan.entries.len() as u64);
    let mut writer = Writer {
        backend,
        builder: None,
        tables: Vec::new(),
    };
    let mut merge = Merge::new(backend, &old, merged, plan);
    while let Some(entry) = merge.next().await? {
        let builder = writer.builder();
        builder
            .push(entry)
            .expect("a merge gives sorted entries inside the volume");
        if builder.table_bytes() >= TABLE_BYTES_MAX {
            writer.finish_object().await?;
        }
    }
    writer.end_table();
    let root = old.with_new_run(merged, std::mem::take(&mut writer.tables));

    // The manifest goes into the newest table's object: one PUT for all of a small checkpoint.
    let builder = writer.builder();
    let id = builder.id();
    let (offset, len) = builder
        .finish_manifest(root.manifest())
        .expect("the policy keeps runs few");
    let late = writer.builder.take_if(|_| Mutation::HeadBeforeMap.is_on());
    writer.put_object().await?;

    let next_map = MapSeq::new(backend.next_map.load(Ordering::Relaxed));
    let stored_bytes = backend.stored_bytes.load(Ordering::Relaxed);
    let (upto, last_write) = (plan.upto, plan.last_write);
    let changed = backend
        .head
        .update(&*backend.common.background, move |head| {
            head.root = Some(RootRef {
                epoch: id.epoch,
                seq: id.seq,
                offset,
                len,
                usage: None,
            });
            head.root_write = last_write;
            head.next_map = next_map;
            head.stored_bytes = stored_bytes;
            let after = upto.next();
            head.log
                .retain(|range| range.end.is_none_or(|end| end > after));
            for range in &mut head.log {
                range.first = range.first.max(after);
            }
        });
    match changed.await {
        Ok(_) => {}
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
    Ok(root)
}

fn refused(object: &str, error: &StoreError) -> Stopped {
    Stopped::Damaged(DataError {
        object: object.to_owned(),
        reason: error.to_string(),
    })
}

/// Builds the map objects, one in memory at a time.
struct Writer<'a> {
    backend: &'a VolumeBackend,
    builder: Option<MapObjectBuilder>,
    tables: Vec<TableRef>,
}

impl Writer<'_> {
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

    fn end_table(&mut self) {
        let table = self
            .builder()
            .finish_table()
            .expect("tables are cut long before 4 GiB");
        self.tables.extend(table);
    }

    async fn finish_object(&mut self) -> Result<(), Stopped> {
        self.end_table();
        self.put_object().await
    }

    async fn put_object(&mut self) -> Result<(), Stopped> {
        let Some(builder) = self.builder.take() else {
            return Ok(());
        };
        let id = builder.id();
        let object = keys::map_key(self.backend.head.tenant(), id.volume, id.epoch, id.seq);
        let bytes = Bytes::from(builder.into_bytes());
        let len = bytes.len() as u64;
        match self.backend.common.background.create(&object, bytes).await {
            // Its number is ours alone in our epoch: what exists is what we sent, its answer lost.
            Ok(_) | Err(StoreError::Exists { .. }) => {
                self.backend.map_bytes.fetch_add(len, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(refused(&object, &error)),
        }
    }
}

/// The merge of the new entries (source 0) with the newest runs.
struct Merge<'a> {
    backend: &'a VolumeBackend,
    merger: Merger,
    fresh: Option<Vec<quarry_objfmt::MapEntry>>,
    runs: Vec<Run>,
}

struct Run {
    cursor: RunCursor,
    tables: Vec<TableRef>,
    /// The stretch of a map object that was read last.
    stretch: Option<(MapObjectId, u64, Bytes)>,
}

impl<'a> Merge<'a> {
    fn new(
        backend: &'a VolumeBackend,
        old: &MapRoot,
        merged: usize,
        plan: &CheckpointPlan,
    ) -> Self {
        let oldest = merged == old.runs().len();
        let runs = old.runs()[..merged]
            .iter()
            .map(|tables| Run {
                cursor: RunCursor::new(tables),
                tables: tables.clone(),
                stretch: None,
            })
            .collect();
        Self {
            backend,
            merger: Merger::new(merged + 1).drop_zeroes(oldest),
            fresh: Some(plan.entries.to_vec()),
            runs,
        }
    }

    async fn next(&mut self) -> Result<Option<quarry_objfmt::MapEntry>, Stopped> {
        loop {
            let source = match self.merger.step() {
                Step::Entry(entry) => return Ok(Some(entry)),
                Step::Done => return Ok(None),
                Step::Need(source) => source,
            };
            let covered = self.merger.covered();
            let entries = match source.checked_sub(1) {
                None => self.fresh.take(),
                Some(run) => self.runs[run].next(covered, self.backend).await?,
            };
            if let Err(error) = self.merger.feed(source, entries) {
                return Err(DataError {
                    object: "the map".to_owned(),
                    reason: error.to_string(),
                }
                .into());
            }
        }
    }
}

impl Run {
    async fn next(
        &mut self,
        covered: quarry_objfmt::Lba,
        backend: &VolumeBackend,
    ) -> Result<Option<Vec<quarry_objfmt::MapEntry>>, Stopped> {
        while let Some(place) = self.cursor.next_node(covered) {
            let object = keys::map_key(
                backend.head.tenant(),
                place.object.volume,
                place.object.epoch,
                place.object.seq,
            );
            let damaged = |reason: String| DataError {
                object: object.clone(),
                reason,
            };
            let mut tries = 0;
            let node = loop {
                let bytes = self.read(&place, &object, backend).await?;
                match Node::decode(&place, &bytes) {
                    Ok(node) => break node,
                    // Once more: the damage may have happened on the way.
                    Err(_) if tries < DAMAGE_RETRIES_MAX => self.stretch = None,
                    Err(error) => return Err(damaged(error.to_string()).into()),
                }
                tries += 1;
            };
            if let Some(entries) = self
                .cursor
                .accept(&node)
                .map_err(|e| damaged(e.to_string()))?
            {
                return Ok(Some(entries));
            }
        }
        Ok(None)
    }

    /// A node's bytes, read together with those behind it: leaves are needed in their order.
    async fn read(
        &mut self,
        place: &NodeRef,
        object: &str,
        backend: &VolumeBackend,
    ) -> Result<Bytes, DataError> {
        let (from, to) = (
            u64::from(place.offset),
            u64::from(place.offset) + u64::from(place.len),
        );
        if let Some((id, start, bytes)) = &self.stretch
            && *id == place.object
            && *start <= from
            && to <= start + bytes.len() as u64
        {
            let skip = usize::try_from(from - start).expect("inside the stretch");
            return Ok(bytes.slice(skip..skip + place.len as usize));
        }
        // Not past the end of the table's nodes: leaves lie before their index.
        let table_end = self
            .tables
            .iter()
            .filter(|table| table.object == place.object && u64::from(table.index_offset) >= to)
            .map(|table| u64::from(table.index_offset))
            .min()
            .unwrap_or(to);
        let until = table_end.min(from + STRETCH_BYTES).max(to);
        let bytes = backend
            .common
            .background
            .get_range(object, from..until)
            .await
            .map_err(|e| DataError {
                object: object.to_owned(),
                reason: e.to_string(),
            })?;
        let first = bytes.slice(..place.len as usize);
        self.stretch = Some((place.object, from, bytes));
        Ok(first)
    }
}
