//! Lays tables and a manifest out in one object.

use crate::error::{FormatError, Result};
use crate::map::index::{IndexEntry, encode_index};
use crate::map::leaf::{LEAF_ENTRIES_MAX, check_entry, encode_leaf};
use crate::map::node::{NodeKind, put_node};
use crate::map::{Manifest, MapObjectId, TableRef, Usage};
use crate::types::{Lba, MapEntry};

/// Builds a map object in RAM: push sorted entries, finish a table where it is to be cut, push on,
/// and in the end finish the manifest.
#[derive(Debug)]
pub struct MapObjectBuilder {
    id: MapObjectId,
    bytes: Vec<u8>,
    /// Entries of the leaf that is not written yet.
    pending: Vec<MapEntry>,
    /// Leaves of the table that is not finished yet.
    leaves: Vec<IndexEntry>,
    /// Where the unfinished table starts in the object.
    table_start: usize,
    /// Entries in the leaves of the unfinished table.
    table_entries: u64,
    /// Where the next entry of the unfinished table may start.
    table_end: Lba,
    /// Reused for each node's payload.
    scratch: Vec<u8>,
}

impl MapObjectBuilder {
    /// An empty object of this name; the name goes into every checksum.
    #[must_use]
    pub fn new(id: MapObjectId) -> Self {
        Self {
            id,
            bytes: Vec::new(),
            pending: Vec::with_capacity(LEAF_ENTRIES_MAX),
            leaves: Vec::new(),
            table_start: 0,
            table_entries: 0,
            table_end: Lba::ZERO,
            scratch: Vec::new(),
        }
    }

    /// The object's name.
    #[must_use]
    pub const fn id(&self) -> MapObjectId {
        self.id
    }

    /// Adds an entry to the table under way.
    ///
    /// # Errors
    /// If it is empty, starts before the end of the one before, or ends past the largest volume;
    /// if the object outgrows 4 GiB. The builder is of no use afterwards.
    pub fn push(&mut self, entry: MapEntry) -> Result<()> {
        check_entry(&entry, self.table_end)?;
        self.table_end = entry.end();
        self.pending.push(entry);
        if self.pending.len() == LEAF_ENTRIES_MAX {
            self.finish_leaf()?;
        }
        Ok(())
    }

    /// Bytes that the table under way takes so far, its last leaf and its index left out: what to
    /// cut tables by.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        self.bytes.len() - self.table_start
    }

    /// Entries in the table under way.
    #[must_use]
    pub fn table_entries(&self) -> u64 {
        self.table_entries + self.pending.len() as u64
    }

    /// Ends the table under way; the next entry starts a new one. `None` if it has no entry.
    ///
    /// # Errors
    /// If the object outgrows 4 GiB.
    pub fn finish_table(&mut self) -> Result<Option<TableRef>> {
        self.finish_leaf()?;
        let Some(first) = self.leaves.first().map(|leaf| leaf.first) else {
            return Ok(None);
        };
        self.scratch.clear();
        encode_index(&self.leaves, &mut self.scratch);
        let (index_offset, index_len) =
            put_node(&mut self.bytes, NodeKind::Index, self.id, &self.scratch)?;
        let table = TableRef {
            object: self.id,
            first,
            end: self.table_end,
            entries: self.table_entries,
            index_offset,
            index_len,
            stored_bytes: (self.bytes.len() - self.table_start) as u64,
        };
        self.leaves.clear();
        self.table_start = self.bytes.len();
        self.table_entries = 0;
        self.table_end = Lba::ZERO;
        Ok(Some(table))
    }

    /// Appends the manifest; returns its offset and length, for `head`.
    ///
    /// # Errors
    /// If a table is under way, the manifest is not sound, or the object outgrows 4 GiB.
    pub fn finish_manifest(&mut self, manifest: &Manifest) -> Result<(u32, u32)> {
        self.finish_node(NodeKind::Manifest, |out| manifest.encode(out))
    }

    /// Appends the usage; returns its offset and length, for `head`.
    ///
    /// # Errors
    /// As [`MapObjectBuilder::finish_manifest`].
    pub fn finish_usage(&mut self, usage: &Usage) -> Result<(u32, u32)> {
        self.finish_node(NodeKind::Usage, |out| usage.encode(out))
    }

    fn finish_node(
        &mut self,
        kind: NodeKind,
        encode: impl FnOnce(&mut Vec<u8>) -> Result<()>,
    ) -> Result<(u32, u32)> {
        if self.table_entries() > 0 {
            return Err(FormatError::invalid(
                "map object",
                "a table is not finished",
            ));
        }
        self.scratch.clear();
        encode(&mut self.scratch)?;
        let place = put_node(&mut self.bytes, kind, self.id, &self.scratch)?;
        self.table_start = self.bytes.len();
        Ok(place)
    }

    /// The object. Entries of an unfinished table are not in it.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn finish_leaf(&mut self) -> Result<()> {
        let Some(first) = self.pending.first().map(|entry| entry.start) else {
            return Ok(());
        };
        self.scratch.clear();
        encode_leaf(&self.pending, &mut self.scratch);
        let (offset, len) = put_node(&mut self.bytes, NodeKind::Leaf, self.id, &self.scratch)?;
        self.leaves.push(IndexEntry {
            first,
            last_end: self.table_end,
            offset,
            len,
        });
        self.table_entries += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }
}
