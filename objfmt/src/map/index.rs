//! The index node of a table: where its leaves are and what they span.

use crate::error::{FormatError, Result, check_up_to};
use crate::map::NODE_HEADER_LEN;
use crate::map::leaf::LEAF_BYTES_MAX;
use crate::types::{Lba, VOLUME_SECTORS_MAX};
use crate::wire::{Reader, put_varint};

/// Most bytes of an index node with its header: of a table of 8 MiB of leaves, each at its shortest (a byte an entry), with its place at its
/// longest (19 bytes), and half as much again.
pub(super) const INDEX_BYTES_MAX: usize = 256 << 10;

const WHAT: &str = "map index node";

/// One leaf of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexEntry {
    /// The start of its first entry.
    pub first: Lba,
    /// The end of its last entry.
    pub last_end: Lba,
    /// Where the leaf starts in the object, in bytes.
    pub offset: u32,
    /// The leaf's length with its header, in bytes.
    pub len: u32,
}

/// A decoded index node: at least one leaf, sorted and disjoint, end to end in the object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IndexNode {
    leaves: Box<[IndexEntry]>,
}

impl IndexNode {
    /// Its leaves, by address.
    #[must_use]
    pub fn leaves(&self) -> &[IndexEntry] {
        &self.leaves
    }

    /// The number of the first leaf that ends behind `lba`; the count of leaves if none does.
    #[must_use]
    pub fn find(&self, lba: Lba) -> usize {
        self.leaves.partition_point(|leaf| leaf.last_end <= lba)
    }

    /// Bytes it takes in RAM.
    #[must_use]
    pub fn ram_bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.leaves)
    }

    /// Decodes the payload of an index node.
    ///
    /// # Errors
    /// If the bytes are not exactly one sound index.
    pub fn decode(payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(payload, WHAT);
        // A leaf takes a gap, a span and a length: three varints.
        let count = reader.count(3)?;
        if count == 0 {
            return Err(FormatError::invalid(WHAT, "it lists no leaf"));
        }
        let mut offset = reader.varint_u32()?;
        let mut leaves = Vec::with_capacity(count);
        let mut end = 0;
        for _ in 0..count {
            let (first, last_end) = read_span(&mut reader, end)?;
            let len = reader.varint_u32()?;
            if (len as usize) < NODE_HEADER_LEN {
                return Err(FormatError::invalid(
                    WHAT,
                    "a leaf is shorter than its header",
                ));
            }
            let limit = LEAF_BYTES_MAX as u64;
            check_up_to(WHAT, "length of a leaf", len.into(), limit)?;
            leaves.push(IndexEntry {
                first: Lba::new(first),
                last_end: Lba::new(last_end),
                offset,
                len,
            });
            offset = offset
                .checked_add(len)
                .ok_or_else(|| FormatError::invalid(WHAT, "a leaf ends past 32-bit offsets"))?;
            end = last_end;
        }
        reader.finish()?;
        Ok(Self {
            leaves: leaves.into_boxed_slice(),
        })
    }
}

/// Appends the payload of an index node: leaves as the builder made them.
pub(super) fn encode_index(leaves: &[IndexEntry], out: &mut Vec<u8>) {
    put_varint(out, leaves.len() as u64);
    put_varint(out, leaves.first().map_or(0, |leaf| u64::from(leaf.offset)));
    let mut end = 0;
    for leaf in leaves {
        put_varint(out, leaf.first.get() - end);
        put_varint(out, leaf.last_end.get() - leaf.first.get());
        put_varint(out, u64::from(leaf.len));
        end = leaf.last_end.get();
    }
}

/// Reads a gap from `after` and a length as a run of sectors: not empty, inside the largest volume.
pub(super) fn read_span(reader: &mut Reader<'_>, after: u64) -> Result<(u64, u64)> {
    let what = reader.what();
    let gap = reader.varint()?;
    let span = reader.varint()?;
    if span == 0 {
        return Err(FormatError::invalid(what, "a span is empty"));
    }
    after
        .checked_add(gap)
        .and_then(|first| Some((first, first.checked_add(span)?)))
        .filter(|&(_, end)| end <= VOLUME_SECTORS_MAX)
        .ok_or_else(|| FormatError::invalid(what, "a span ends past the largest volume"))
}
