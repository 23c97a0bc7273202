//! What the nodes of a map say.

use quarry_objfmt::map::{
    IndexNode, Leaf, Manifest, MapObjectBuilder, MapObjectId, NodeKind, Usage, open_node,
};
use quarry_objfmt::{Epoch, Lba, MapEntry, MapSeq, VOLUME_SECTORS_MAX, VolumeId};

use crate::mend;

const OBJECT: MapObjectId = MapObjectId {
    volume: VolumeId::from_bytes([4; 16]),
    epoch: Epoch::new(2),
    seq: MapSeq::new(u64::MAX),
};

fn end(entry: &MapEntry) -> u64 {
    entry.start.get() + u64::from(entry.len)
}

/// A leaf that decodes is sorted and disjoint, is searched as a list would be, and reads the same
/// when it is written into an object and found there by its index.
pub(crate) fn map_leaf(input: &[u8]) {
    let Ok(leaf) = Leaf::decode(input) else {
        return;
    };
    let entries: Vec<MapEntry> = leaf.iter().collect();
    assert_eq!(entries.len(), leaf.len());
    assert!(entries.iter().all(|entry| entry.len > 0));
    assert!(entries.iter().is_sorted_by(|a, b| end(a) <= b.start.get()));
    assert!(
        entries
            .last()
            .is_some_and(|last| end(last) <= VOLUME_SECTORS_MAX)
    );
    for (n, entry) in entries.iter().enumerate() {
        assert_eq!(leaf.get(n), Some(*entry));
        for lba in [
            entry.start.get().saturating_sub(1),
            entry.start.get(),
            end(entry),
        ] {
            let first = entries.partition_point(|entry| end(entry) <= lba);
            assert_eq!(leaf.find(Lba::new(lba)), first, "sector {lba}");
        }
    }

    let mut builder = MapObjectBuilder::new(OBJECT);
    for entry in &entries {
        builder.push(*entry).expect("sorted and inside a volume");
    }
    let table = builder.finish_table().expect("small").expect("not empty");
    let object = builder.into_bytes();
    let index = &object[table.index_offset as usize..][..table.index_len as usize];
    let (kind, payload) = open_node(OBJECT, table.index_offset, index).expect("just made");
    assert_eq!(kind, NodeKind::Index);
    let index = IndexNode::decode(payload).expect("just made");
    let mut read = Vec::new();
    for at in index.leaves() {
        let node = &object[at.offset as usize..][..at.len as usize];
        let (kind, payload) = open_node(OBJECT, at.offset, node).expect("just made");
        assert_eq!(kind, NodeKind::Leaf);
        read.extend(Leaf::decode(payload).expect("just made").iter());
    }
    assert_eq!(read, entries);
}

/// An index node that decodes is sorted and disjoint, and its leaves lie end to end.
pub(crate) fn map_index(input: &[u8]) {
    let Ok(index) = IndexNode::decode(input) else {
        return;
    };
    let leaves = index.leaves();
    assert!(leaves.iter().all(|leaf| leaf.first < leaf.last_end));
    assert!(leaves.iter().is_sorted_by(|a, b| a.last_end <= b.first));
    assert!(
        leaves
            .iter()
            .is_sorted_by(|a, b| a.offset + a.len == b.offset)
    );
    assert!(
        leaves
            .last()
            .is_some_and(|leaf| leaf.last_end.get() <= VOLUME_SECTORS_MAX)
    );
    for (n, leaf) in leaves.iter().enumerate() {
        assert_eq!(index.find(leaf.first), n);
    }
}

/// A manifest that decodes has sorted and disjoint tables in each run, and reads the same when it
/// is written again.
pub(crate) fn map_manifest(input: &[u8]) {
    for bytes in [input.to_vec(), mend::node(input, OBJECT, 0)] {
        let Ok(manifest) = Manifest::decode(OBJECT, 0, &bytes) else {
            continue;
        };
        for run in &manifest.runs {
            assert!(run.iter().all(|table| table.first < table.end));
            assert!(run.iter().is_sorted_by(|a, b| a.end <= b.first));
            assert!(
                run.last()
                    .is_some_and(|table| table.end.get() <= VOLUME_SECTORS_MAX)
            );
        }
        let mut builder = MapObjectBuilder::new(OBJECT);
        let (offset, _) = builder
            .finish_manifest(&manifest)
            .expect("within its rules");
        let again = builder.into_bytes();
        assert_eq!(Manifest::decode(OBJECT, offset, &again), Ok(manifest));
    }
}

/// A usage that decodes is sorted, needs no more of a chunk than it has, and reads the same when it is
/// written again.
pub(crate) fn map_usage(input: &[u8]) {
    for bytes in [input.to_vec(), mend::node(input, OBJECT, 0)] {
        let Ok(usage) = Usage::decode(OBJECT, 0, &bytes) else {
            continue;
        };
        let order = |chunk: &quarry_objfmt::map::ChunkUse| (chunk.epoch, chunk.seq);
        assert!(usage.chunks.is_sorted_by(|a, b| order(a) < order(b)));
        assert!(
            usage
                .chunks
                .iter()
                .all(|chunk| chunk.needed_sectors <= chunk.data_sectors)
        );
        assert!(usage.dead.iter().all(|object| object.born <= object.died));
        let mut builder = MapObjectBuilder::new(OBJECT);
        let (offset, _) = builder.finish_usage(&usage).expect("within its rules");
        let again = builder.into_bytes();
        assert_eq!(Usage::decode(OBJECT, offset, &again), Ok(usage));
    }
}
