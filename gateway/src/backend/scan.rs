//! The runs of a map as one stream of entries, in the order of addresses: what shows, and nothing that newer
//! runs hide.
//!
//! Memory: one stretch of each run, however large the map.

use bytes::Bytes;
use quarry_objfmt::map::{MapObjectId, TableRef};
use quarry_objfmt::{Lba, MapEntry, TenantName, keys};
use quarry_volume::DataError;
use quarry_volume::map::{Merger, Node, NodeRef, RunCursor, Step};

use super::VolumeBackend;
use super::sound::DAMAGE_RETRIES_MAX;
use crate::store::Store;

/// Bytes of a run that are read at once.
const STRETCH_BYTES: u64 = 1 << 20;

/// Entries in memory (source 0), if there are any, over some runs of a map.
pub(super) struct Scan<'a> {
    place: Place<'a>,
    merger: Merger,
    fresh: Option<Vec<MapEntry>>,
    runs: Vec<Run>,
}

/// Where map objects are.
#[derive(Clone, Copy)]
struct Place<'a> {
    store: &'a dyn Store,
    tenant: &'a TenantName,
}

struct Run {
    cursor: RunCursor,
    tables: Vec<TableRef>,
    /// The stretch of a map object that was read last.
    stretch: Option<(MapObjectId, u64, Bytes)>,
}

impl<'a> Scan<'a> {
    /// Of `fresh` over `runs`, newest first. With `drop_zeroes` entries of zeroes are left out: below the
    /// oldest run of a map there is nothing that they hide.
    pub(super) fn new(
        backend: &'a VolumeBackend,
        fresh: Vec<MapEntry>,
        runs: &[Vec<TableRef>],
        drop_zeroes: bool,
    ) -> Self {
        let (store, tenant) = (&*backend.common.background, backend.head.tenant());
        Self::of(store, tenant, fresh, runs, drop_zeroes)
    }

    /// The same, of a volume that nobody need serve.
    pub(super) fn of(
        store: &'a dyn Store,
        tenant: &'a TenantName,
        fresh: Vec<MapEntry>,
        runs: &[Vec<TableRef>],
        drop_zeroes: bool,
    ) -> Self {
        let run = |tables: &Vec<TableRef>| Run {
            cursor: RunCursor::new(tables),
            tables: tables.clone(),
            stretch: None,
        };
        Self {
            place: Place { store, tenant },
            merger: Merger::new(runs.len() + 1).drop_zeroes(drop_zeroes),
            fresh: Some(fresh),
            runs: runs.iter().map(run).collect(),
        }
    }

    /// Only from this place on: what lies before it is cut off, and not read.
    pub(super) fn from(mut self, from: Lba) -> Self {
        self.merger = self.merger.from(from);
        self
    }

    /// The next entry.
    ///
    /// # Errors
    /// If a node cannot be read.
    pub(super) async fn next(&mut self) -> Result<Option<MapEntry>, DataError> {
        loop {
            let source = match self.merger.step() {
                Step::Entry(entry) => return Ok(Some(entry)),
                Step::Done => return Ok(None),
                Step::Need(source) => source,
            };
            let covered = self.merger.covered();
            let entries = match source.checked_sub(1) {
                None => self.fresh.take(),
                Some(run) => self.runs[run].next(covered, self.place).await?,
            };
            if let Err(error) = self.merger.feed(source, entries) {
                return Err(DataError {
                    object: "the map".to_owned(),
                    reason: error.to_string(),
                });
            }
        }
    }
}

impl Run {
    async fn next(
        &mut self,
        covered: Lba,
        place: Place<'_>,
    ) -> Result<Option<Vec<MapEntry>>, DataError> {
        while let Some(wanted) = self.cursor.next_node(covered) {
            let id = wanted.object;
            let object = keys::map_key(place.tenant, id.volume, id.epoch, id.seq);
            let damaged = |reason: String| DataError {
                object: object.clone(),
                reason,
            };
            let mut tries = 0;
            let node = loop {
                let bytes = self.read(&wanted, &object, place.store).await?;
                match Node::decode(&wanted, &bytes) {
                    Ok(node) => break node,
                    // Once more: the damage may have happened on the way.
                    Err(_) if tries < DAMAGE_RETRIES_MAX => self.stretch = None,
                    Err(error) => return Err(damaged(error.to_string())),
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
        wanted: &NodeRef,
        object: &str,
        store: &dyn Store,
    ) -> Result<Bytes, DataError> {
        let (from, to) = (
            u64::from(wanted.offset),
            u64::from(wanted.offset) + u64::from(wanted.len),
        );
        if let Some((id, start, bytes)) = &self.stretch
            && *id == wanted.object
            && *start <= from
            && to <= start + bytes.len() as u64
        {
            let skip = usize::try_from(from - start).expect("inside the stretch");
            return Ok(bytes.slice(skip..skip + wanted.len as usize));
        }
        // Not past the end of the table's nodes: leaves lie before their index.
        let table_end = self
            .tables
            .iter()
            .filter(|table| table.object == wanted.object && u64::from(table.index_offset) >= to)
            .map(|table| u64::from(table.index_offset))
            .min()
            .unwrap_or(to);
        let until = table_end.min(from + STRETCH_BYTES).max(to);
        let bytes = store
            .get_range(object, from..until)
            .await
            .map_err(|e| DataError {
                object: object.to_owned(),
                reason: e.to_string(),
            })?;
        let first = bytes.slice(..wanted.len as usize);
        self.stretch = Some((wanted.object, from, bytes));
        Ok(first)
    }
}
