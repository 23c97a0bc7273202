//! The manifest: which tables make up a map, and in which order they shadow each other.

use crate::error::{FormatError, Result, check_up_to};
use crate::map::index::{INDEX_BYTES_MAX, read_span};
use crate::map::{MapObjectId, NODE_HEADER_LEN, NodeKind, open_node};
use crate::types::{Epoch, Lba, MapSeq, VolumeId};
use crate::wire::{Reader, put_u32, put_varint};

const WHAT: &str = "map manifest";

/// Most runs in a manifest; the merge policy stays far below.
pub const RUNS_MAX: usize = 64;

/// Fewest bytes of a table in a manifest: eight varints.
const TABLE_LEN_MIN: usize = 8;

/// Bytes of one volume and epoch in the manifest's dictionary.
const ORIGIN_LEN: usize = 20;

/// One table of a run: where it is and what it spans.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableRef {
    /// The object it lies in.
    pub object: MapObjectId,
    /// The start of its first entry.
    pub first: Lba,
    /// The end of its last entry.
    pub end: Lba,
    /// How many entries it has; at least one.
    pub entries: u64,
    /// Where its index node starts in the object, in bytes.
    pub index_offset: u32,
    /// The index node's length with its header, in bytes.
    pub index_len: u32,
    /// Bytes of all its nodes in the object.
    pub stored_bytes: u64,
}

/// The runs of a map, newest first. The tables of a run are sorted and disjoint, at least one.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Manifest {
    /// The runs; where two hold the same sector, the one that comes first counts.
    pub runs: Vec<Vec<TableRef>>,
}

impl Manifest {
    /// Checks that `bytes` are exactly the manifest at `offset` of object `id`, and decodes it.
    ///
    /// # Errors
    /// If the bytes are damaged, of another place, or not a sound manifest.
    pub fn decode(id: MapObjectId, offset: u32, bytes: &[u8]) -> Result<Self> {
        match open_node(id, offset, bytes)? {
            (NodeKind::Manifest, payload) => Self::decode_payload(payload),
            _ => Err(FormatError::Misplaced {
                what: WHAT,
                field: "kind of node",
            }),
        }
    }

    pub(super) fn decode_payload(payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(payload, WHAT);
        let origins = reader.count(ORIGIN_LEN)?;
        let origins = (0..origins)
            .map(|_| {
                let volume = VolumeId::from_bytes(reader.array()?);
                Ok((volume, Epoch::new(reader.u32()?)))
            })
            .collect::<Result<Vec<_>>>()?;
        let runs = reader.count(1)?;
        check_up_to(WHAT, "count of runs", runs as u64, RUNS_MAX as u64)?;
        let runs = (0..runs)
            .map(|_| decode_run(&mut reader, &origins))
            .collect::<Result<Vec<_>>>()?;
        reader.finish()?;
        Ok(Self { runs })
    }

    /// Appends the payload.
    ///
    /// # Errors
    /// If it is not what a reader would accept: too many runs, an empty run, tables out of order.
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let runs = self.runs.len() as u64;
        check_up_to(WHAT, "count of runs", runs, RUNS_MAX as u64)?;
        let mut origins: Vec<(VolumeId, Epoch)> = self
            .runs
            .iter()
            .flatten()
            .map(|table| (table.object.volume, table.object.epoch))
            .collect();
        origins.sort_unstable();
        origins.dedup();
        put_varint(out, origins.len() as u64);
        for (volume, epoch) in &origins {
            out.extend_from_slice(&volume.to_bytes());
            put_u32(out, epoch.get());
        }
        put_varint(out, self.runs.len() as u64);
        for run in &self.runs {
            encode_run(run, &origins, out)?;
        }
        Ok(())
    }
}

fn encode_run(run: &[TableRef], origins: &[(VolumeId, Epoch)], out: &mut Vec<u8>) -> Result<()> {
    if run.is_empty() {
        return Err(FormatError::invalid(WHAT, "a run has no table"));
    }
    put_varint(out, run.len() as u64);
    let mut end = Lba::ZERO;
    for table in run {
        if table.first < end || table.end <= table.first {
            return Err(FormatError::invalid(
                WHAT,
                "tables are not sorted and disjoint",
            ));
        }
        let origin = (table.object.volume, table.object.epoch);
        let origin = origins
            .binary_search(&origin)
            .map_err(|_| FormatError::invalid(WHAT, "a table's origin is not listed"))?;
        put_varint(out, origin as u64);
        put_varint(out, table.object.seq.get());
        put_varint(out, table.first.get() - end.get());
        put_varint(out, table.end.get() - table.first.get());
        put_varint(out, table.entries);
        put_varint(out, u64::from(table.index_offset));
        put_varint(out, u64::from(table.index_len));
        put_varint(out, table.stored_bytes);
        end = table.end;
    }
    Ok(())
}

fn decode_run(reader: &mut Reader<'_>, origins: &[(VolumeId, Epoch)]) -> Result<Vec<TableRef>> {
    let count = reader.count(TABLE_LEN_MIN)?;
    if count == 0 {
        return Err(FormatError::invalid(WHAT, "a run has no table"));
    }
    let mut tables = Vec::with_capacity(count);
    let mut after = 0;
    for _ in 0..count {
        let origin = reader.varint_u32()? as usize;
        let &(volume, epoch) = origins.get(origin).ok_or_else(|| {
            FormatError::invalid(WHAT, "a table names an origin that is not listed")
        })?;
        let seq = MapSeq::new(reader.varint()?);
        let (first, end) = read_span(reader, after)?;
        let entries = reader.varint()?;
        let index_offset = reader.varint_u32()?;
        let index_len = reader.varint_u32()?;
        let stored_bytes = reader.varint()?;
        if entries == 0 || entries > end - first {
            return Err(FormatError::invalid(
                WHAT,
                "a table's count of entries does not fit its span",
            ));
        }
        let limit = INDEX_BYTES_MAX as u64;
        check_up_to(WHAT, "length of an index node", index_len.into(), limit)?;
        if (index_len as usize) < NODE_HEADER_LEN || index_offset.checked_add(index_len).is_none() {
            return Err(FormatError::invalid(
                WHAT,
                "an index node's place is impossible",
            ));
        }
        if stored_bytes > u64::from(u32::MAX) || stored_bytes < u64::from(index_len) {
            return Err(FormatError::invalid(WHAT, "a table's length is impossible"));
        }
        tables.push(TableRef {
            object: MapObjectId { volume, epoch, seq },
            first: Lba::new(first),
            end: Lba::new(end),
            entries,
            index_offset,
            index_len,
            stored_bytes,
        });
        after = end;
    }
    Ok(tables)
}
