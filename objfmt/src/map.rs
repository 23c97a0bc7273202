//! Map objects: immutable sorted tables of [`MapEntry`](crate::MapEntry), and the manifest that
//! names them.
//!
//! An object holds any number of tables and at most one usage node and one manifest, written front
//! to back. A table is a row of *leaf* nodes and then the one *index* node that lists them; a *manifest* lists the
//! runs of a map, newest first, each a sorted list of tables of this or of older objects. A reader
//! starts at the manifest (`head` names its object, offset and length) and loads single nodes.
//!
//! Owns the bytes: node header, leaf, index, manifest and usage, and [`MapObjectBuilder`], which lays
//! them out. Does not own what entries mean, which run shadows which, and what is loaded when.
//!
//! **Invariants.** Every node carries a CRC-32C over itself and its place (volume, epoch, map
//! number, offset): a node read from anywhere else does not pass. Whatever a decoder returns is
//! sorted, disjoint, non-empty where it must be, and ends at or before the largest volume's end.
//! Decoders never panic and reserve no more than the bytes at hand justify.

mod builder;
mod index;
mod leaf;
mod manifest;
mod node;
mod usage;

pub use builder::MapObjectBuilder;
pub use index::{IndexEntry, IndexNode};
pub use leaf::{LEAF_ENTRIES_MAX, Leaf};
pub use manifest::{Manifest, RUNS_MAX, TableRef};
pub use node::{NODE_HEADER_LEN, NODE_MAGIC, NODE_VERSION, NodeKind, open_node};
pub use usage::{Basis, ChunkUse, DeadObject, ObjectKind, Usage};

use crate::types::{Epoch, MapSeq, VolumeId};

/// A map object: whose, of which term, which number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MapObjectId {
    /// The volume that wrote it; of a clone's older tables the volume it was cloned from.
    pub volume: VolumeId,
    /// The term it was written in.
    pub epoch: Epoch,
    /// Its number, unique within volume and epoch.
    pub seq: MapSeq,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::FormatError;
    use crate::types::{ChunkId, ChunkSeq, DataLoc, Lba, Location, MapEntry, VOLUME_SECTORS_MAX};

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/map-v1.bin");

    fn id(seq: u64) -> MapObjectId {
        MapObjectId {
            volume: VolumeId::from_bytes([7; 16]),
            epoch: Epoch::new(3),
            seq: MapSeq::new(seq),
        }
    }

    fn chunk(volume: u8, epoch: u32, seq: u64) -> ChunkId {
        ChunkId {
            volume: VolumeId::from_bytes([volume; 16]),
            epoch: Epoch::new(epoch),
            seq: ChunkSeq::new(seq),
        }
    }

    fn data(start: u64, len: u32, chunk: ChunkId, raw: u32, place: (u32, u32)) -> MapEntry {
        let location = Location::Data(DataLoc {
            chunk,
            raw,
            stored_offset: place.0,
            stored_len: place.1,
        });
        MapEntry {
            start: Lba::new(start),
            len,
            location,
        }
    }

    fn zero(start: u64, len: u32) -> MapEntry {
        MapEntry {
            start: Lba::new(start),
            len,
            location: Location::Zero,
        }
    }

    fn node_at(object: &[u8], offset: u32, len: u32) -> &[u8] {
        &object[offset as usize..(offset + len) as usize]
    }

    fn table_entries(object: &[u8], table: &TableRef) -> Vec<MapEntry> {
        let bytes = node_at(object, table.index_offset, table.index_len);
        let (kind, payload) = open_node(table.object, table.index_offset, bytes).unwrap();
        assert_eq!(kind, NodeKind::Index);
        let index = IndexNode::decode(payload).unwrap();
        let mut entries = Vec::new();
        for leaf in index.leaves() {
            let bytes = node_at(object, leaf.offset, leaf.len);
            let (kind, payload) = open_node(table.object, leaf.offset, bytes).unwrap();
            assert_eq!(kind, NodeKind::Leaf);
            let decoded = Leaf::decode(payload).unwrap();
            let (first, last) = (
                decoded.get(0).unwrap(),
                decoded.get(decoded.len() - 1).unwrap(),
            );
            assert_eq!((leaf.first, leaf.last_end), (first.start, last.end()));
            entries.extend(decoded.iter());
        }
        assert_eq!(entries.len() as u64, table.entries);
        entries
    }

    fn build_table(entries: &[MapEntry]) -> (TableRef, Vec<u8>) {
        let mut builder = MapObjectBuilder::new(id(1));
        for entry in entries {
            builder.push(*entry).unwrap();
        }
        let table = builder.finish_table().unwrap().unwrap();
        (table, builder.into_bytes())
    }

    prop_compose! {
        fn any_entry()(
            gap in prop_oneof![Just(0u64), 1u64..300, 0u64..1 << 30],
            len in prop_oneof![Just(8u32), 1u32..200, 1u32..=u32::MAX],
            volume in 0u8..2, epoch in 0u32..2, seq in prop_oneof![0u64..3, any::<u64>()],
            raw in prop_oneof![Just(None), (0u32..1 << 20).prop_map(Some)],
            frame in 0u8..3, stored_offset in 0u32..1 << 30, stored_len in 1u32..1 << 20,
            zero in prop::bool::weighted(0.2),
        ) -> (u64, MapEntry, Option<u32>, u8) {
            let len = if zero { len } else { len.min(1 << 20) };
            let place = (stored_offset, stored_len);
            let mut entry = data(0, len, chunk(volume, epoch, seq), raw.unwrap_or(0), place);
            if zero {
                entry.location = Location::Zero;
            }
            (gap, entry, raw, frame)
        }
    }

    prop_compose! {
        /// Sorted entries that use every form of the coding: adjacent or not, same chunk or not,
        /// raw space that goes on, the same frame and the next.
        fn any_entries(max: usize)(
            parts in prop::collection::vec(any_entry(), 1..max),
        ) -> Vec<MapEntry> {
            let mut at = 0;
            let mut last: Option<(DataLoc, u32)> = None;
            let mut entries = Vec::new();
            for (gap, mut entry, raw, frame) in parts {
                entry.start = Lba::new(at + gap);
                at = entry.end().get();
                if let Location::Data(loc) = &mut entry.location {
                    if let (None, Some((before, len))) = (raw, last) {
                        let raw = before.raw.saturating_add(len);
                        if raw < 1 << 30 {
                            loc.chunk = before.chunk;
                            loc.raw = raw;
                            match frame {
                                0 => loc.stored_offset = before.stored_offset + before.stored_len,
                                1 => (loc.stored_offset, loc.stored_len) =
                                    (before.stored_offset, before.stored_len),
                                _ => {}
                            }
                        }
                    }
                    last = Some((*loc, entry.len));
                }
                entries.push(entry);
            }
            entries
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn table_any_entries_round_trip(entries in any_entries(2500)) {
            let (table, object) = build_table(&entries);
            prop_assert_eq!(table.stored_bytes, object.len() as u64);
            prop_assert_eq!(table_entries(&object, &table), entries);
        }

        #[test]
        fn leaf_find_any_sector_equals_a_plain_search(
            entries in any_entries(1000),
            near in prop::collection::vec((any::<prop::sample::Index>(), -2i64..3), 50),
            far in prop::collection::vec(any::<u64>(), 10),
        ) {
            let mut payload = Vec::new();
            leaf::encode_leaf(&entries, &mut payload);
            let leaf = Leaf::decode(&payload).unwrap();
            let near = near.into_iter().map(|(at, by)| {
                let entry = &entries[at.index(entries.len())];
                let at = if by % 2 == 0 { entry.start } else { entry.end() };
                at.get().saturating_add_signed(by)
            });
            for lba in near.chain(far).chain([0, VOLUME_SECTORS_MAX]) {
                let lba = Lba::new(lba);
                let plain = entries.partition_point(|entry| entry.end() <= lba);
                prop_assert_eq!(leaf.find(lba), plain);
            }
            for number in 0..=entries.len() {
                prop_assert_eq!(leaf.get(number), entries.get(number).copied());
                prop_assert_eq!(leaf.start(number), entries.get(number).map(|entry| entry.start));
            }
        }

        #[test]
        fn node_any_bit_flip_is_refused(entries in any_entries(40), bit: prop::sample::Index) {
            let (table, mut object) = build_table(&entries);
            let leaf_len = table.index_offset as usize;
            let at = bit.index(leaf_len * 8);
            object[at / 8] ^= 1 << (at % 8);
            prop_assert!(open_node(id(1), 0, &object[..leaf_len]).is_err());
        }

        #[test]
        fn node_any_truncation_is_refused(entries in any_entries(40), cut: prop::sample::Index) {
            let (table, object) = build_table(&entries);
            let cut = cut.index(table.index_offset as usize);
            prop_assert!(open_node(id(1), 0, &object[..cut]).is_err());
        }

        #[test]
        fn decoders_any_bytes_never_panic(bytes: Vec<u8>) {
            let _ = open_node(id(1), 0, &bytes);
            let _ = IndexNode::decode(&bytes);
            let _ = Leaf::decode(&bytes);
            let _ = Manifest::decode(id(1), 0, &bytes);
            let _ = Manifest::decode_payload(&bytes);
        }

        #[test]
        fn leaf_any_change_under_a_good_checksum_is_refused_or_sound(
            entries in any_entries(40),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut payload = Vec::new();
            leaf::encode_leaf(&entries, &mut payload);
            for (at, byte) in changes {
                let at = at.index(payload.len());
                payload[at] = byte;
            }
            if let Ok(leaf) = Leaf::decode(&payload) {
                let mut end = Lba::ZERO;
                for entry in leaf.iter() {
                    prop_assert!(leaf::check_entry(&entry, end).is_ok());
                    end = entry.end();
                    prop_assert!(end.get() <= VOLUME_SECTORS_MAX);
                }
            }
        }

        #[test]
        fn manifest_any_runs_round_trip(
            runs in prop::collection::vec(
                prop::collection::vec(
                    (0u64..1 << 30, 1u64..1 << 30, 0u8..3, 0u32..3, any::<u64>(), any::<u16>()),
                    1..20),
                0..10),
            flip: prop::sample::Index,
        ) {
            let runs = runs.into_iter().map(|run| {
                let mut at = 0;
                run.into_iter().map(|(gap, span, volume, epoch, seq, n)| {
                    let first = at + gap;
                    at = first + span;
                    TableRef {
                        object: MapObjectId {
                            volume: VolumeId::from_bytes([volume; 16]),
                            epoch: Epoch::new(epoch),
                            seq: MapSeq::new(seq),
                        },
                        first: Lba::new(first),
                        end: Lba::new(at),
                        entries: 1 + u64::from(n) % span,
                        index_offset: u32::from(n) * 1000,
                        index_len: 24 + u32::from(n),
                        stored_bytes: 24 + 3 * u64::from(n),
                    }
                }).collect()
            }).collect();
            let manifest = Manifest { runs };
            let mut builder = MapObjectBuilder::new(id(9));
            builder.push(zero(0, 5)).unwrap();
            builder.finish_table().unwrap().unwrap();
            let (offset, len) = builder.finish_manifest(&manifest).unwrap();
            let mut object = builder.into_bytes();
            let bytes = node_at(&object, offset, len);
            prop_assert_eq!(Manifest::decode(id(9), offset, bytes), Ok(manifest));
            prop_assert!(Manifest::decode(id(8), offset, bytes).is_err());
            let at = flip.index(len as usize * 8);
            object[offset as usize + at / 8] ^= 1 << (at % 8);
            let bytes = node_at(&object, offset, len);
            prop_assert!(Manifest::decode(id(9), offset, bytes).is_err());
        }
    }

    #[test]
    fn manifest_with_an_index_that_no_table_comes_to_is_refused() {
        for (index_len, is_sound) in [(256 << 10, true), ((256 << 10) + 1, false)] {
            let (mut table, _) = build_table(&[zero(0, 5)]);
            (table.index_len, table.stored_bytes) = (index_len, 1 << 20);
            let runs = vec![vec![table]];
            let mut builder = MapObjectBuilder::new(id(9));
            let (offset, len) = builder.finish_manifest(&Manifest { runs }).unwrap();
            let object = builder.into_bytes();
            let decoded = Manifest::decode(id(9), offset, node_at(&object, offset, len));
            assert_eq!(decoded.is_ok(), is_sound, "{decoded:?}");
        }
    }

    #[test]
    fn leaf_every_bit_flip_is_refused() {
        let entries: Vec<_> = (0..6)
            .map(|n| data(n * 16, 8, chunk(1, 1, n), 0, (100, 4120)))
            .collect();
        let (table, mut object) = build_table(&entries);
        let leaf = table.index_offset as usize;
        for bit in 0..leaf * 8 {
            object[bit / 8] ^= 1 << (bit % 8);
            assert!(open_node(id(1), 0, &object[..leaf]).is_err(), "bit {bit}");
            object[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn node_of_another_place_is_refused() {
        let (table, object) = build_table(&[zero(5, 5)]);
        let leaf = &object[..table.index_offset as usize];
        let moved = |change: fn(&mut MapObjectId)| {
            let mut other = id(1);
            change(&mut other);
            open_node(other, 0, leaf)
        };
        assert!(moved(|_| ()).is_ok());
        let refused = Err(FormatError::Checksum { what: "map node" });
        assert_eq!(moved(|id| id.seq = MapSeq::new(2)), refused);
        assert_eq!(moved(|id| id.epoch = Epoch::new(4)), refused);
        assert_eq!(
            moved(|id| id.volume = VolumeId::from_bytes([8; 16])),
            refused
        );
        assert_eq!(open_node(id(1), 1, leaf), refused);
    }

    #[test]
    fn leaf_of_sequential_frames_takes_at_most_5_bytes_an_entry() {
        // Frames of 64 KiB, 128 a chunk, compressed to lengths that jump about.
        let mut offset = 0;
        let entries: Vec<_> = (0..1024u32)
            .map(|n| {
                let stored = 20_000 + n.wrapping_mul(2_654_435_761) % 30_000;
                if n.is_multiple_of(128) {
                    offset = 900;
                }
                let raw = (n % 128) * 128;
                let chunk = chunk(1, 1, 40 + u64::from(n / 128));
                let entry = data(u64::from(n) * 128, 128, chunk, raw, (offset, stored));
                offset += stored;
                entry
            })
            .collect();
        let (table, _) = build_table(&entries);
        assert!(table.stored_bytes <= 5 * 1024, "{}", table.stored_bytes);
    }

    #[test]
    fn leaf_of_random_blocks_takes_at_most_16_bytes_an_entry() {
        // 4 KiB blocks at about every 200th sector, each of another place in one of 400 chunks.
        let entries: Vec<_> = (0..1024u64)
            .map(|n| {
                let mix = |salt: u64, below: u64| {
                    let x = (n + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    u32::try_from((x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33)
                        .unwrap()
                        % u32::try_from(below).unwrap()
                };
                let raw = mix(1, 2048) * 8;
                let place = (2000 + raw / 128 * 65_568, 60_000 + mix(2, 5568));
                let chunk = chunk(1, 1, 10_000 + u64::from(mix(3, 400)));
                data(n * 208 + u64::from(mix(4, 200)), 8, chunk, raw, place)
            })
            .collect();
        let (table, _) = build_table(&entries);
        let each = table.stored_bytes as f64 / 1024.0;
        assert!(each <= 16.0, "{each}");
    }

    #[test]
    fn leaf_of_as_many_chunks_as_entries_takes_40_bytes_an_entry_in_ram() {
        let entries: Vec<_> = (0..1024)
            .map(|n| data(n * 16, 8, chunk(1, 1, n * 3), 0, (100, 4120)))
            .collect();
        let mut payload = Vec::new();
        leaf::encode_leaf(&entries, &mut payload);
        let leaf = Leaf::decode(&payload).unwrap();
        assert!(leaf.ram_bytes() <= 40 * 1024 + 100);
    }

    #[test]
    fn frame_or_leaf_longer_than_any_can_be_is_refused() {
        let longest = u32::try_from(crate::frame::FRAME_STORED_MAX).unwrap();
        for (stored_len, fits) in [(longest, true), (longest + 1, false)] {
            let mut builder = MapObjectBuilder::new(id(1));
            let entry = data(0, 8, chunk(7, 1, 1), 0, (0, stored_len));
            assert_eq!(builder.push(entry).is_ok(), fits);
        }
        for (len, fits) in [(128 << 10, true), ((128 << 10) + 1, false)] {
            let leaf = IndexEntry {
                first: Lba::ZERO,
                last_end: Lba::new(8),
                offset: 0,
                len,
            };
            let mut payload = Vec::new();
            index::encode_index(&[leaf], &mut payload);
            assert_eq!(IndexNode::decode(&payload).is_ok(), fits);
        }
    }

    #[test]
    fn builder_entry_out_of_order_is_refused() {
        let mut builder = MapObjectBuilder::new(id(1));
        builder.push(zero(10, 10)).unwrap();
        assert!(builder.push(zero(19, 1)).is_err());
        assert!(builder.push(zero(20, 0)).is_err());
        assert!(builder.push(zero(VOLUME_SECTORS_MAX - 1, 2)).is_err());
        assert!(
            builder
                .push(data(20, 2, chunk(1, 1, 1), u32::MAX - 1, (0, 1)))
                .is_err()
        );
        assert!(
            builder
                .push(data(20, 2, chunk(1, 1, 1), 0, (u32::MAX, 1)))
                .is_err()
        );
        builder.push(zero(VOLUME_SECTORS_MAX - 1, 1)).unwrap();
        assert_eq!(builder.table_entries(), 2);
        builder.finish_table().unwrap().unwrap();
        assert_eq!(builder.finish_table(), Ok(None));
    }

    #[test]
    fn builder_several_tables_and_a_manifest_lie_in_one_object() {
        let mut builder = MapObjectBuilder::new(id(2));
        let mut tables = Vec::new();
        for table in 0..3u64 {
            for n in 0..1500 {
                builder.push(zero(table * 100_000 + n * 10, 5)).unwrap();
            }
            tables.push(builder.finish_table().unwrap().unwrap());
        }
        let manifest = Manifest { runs: vec![tables] };
        let (offset, len) = builder.finish_manifest(&manifest).unwrap();
        let object = builder.into_bytes();
        assert_eq!(offset as usize + len as usize, object.len());
        let read = Manifest::decode(id(2), offset, node_at(&object, offset, len)).unwrap();
        assert_eq!(read, manifest);
        for (n, table) in (0u64..).zip(&read.runs[0]) {
            let entries = table_entries(&object, table);
            assert_eq!((entries.len(), entries[0].start.get()), (1500, n * 100_000));
        }
    }

    fn golden_manifest_and_entries() -> (Vec<MapEntry>, Vec<u8>, u32, u32) {
        let entries = vec![
            data(0, 8, chunk(1, 1, 5), 0, (500, 4120)),
            data(8, 8, chunk(1, 1, 5), 8, (500, 4120)),
            data(16, 120, chunk(1, 1, 5), 16, (4620, 30_000)),
            zero(136, 64),
            data(1_000_000, 1, chunk(2, 9, 70_000), 77, (1, 2)),
            zero(VOLUME_SECTORS_MAX - 3, 3),
        ];
        let mut builder = MapObjectBuilder::new(id(0x0102_0304_0506));
        for entry in &entries {
            builder.push(*entry).unwrap();
        }
        let table = builder.finish_table().unwrap().unwrap();
        let manifest = Manifest {
            runs: vec![
                vec![table],
                vec![TableRef {
                    object: id(1),
                    ..table
                }],
            ],
        };
        let (offset, len) = builder.finish_manifest(&manifest).unwrap();
        (entries, builder.into_bytes(), offset, len)
    }

    #[test]
    #[ignore = "writes the golden object of a new format version; never of an old one"]
    fn golden_object_missing_is_written() {
        let path = std::path::Path::new(GOLDEN);
        if !path.exists() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, golden_manifest_and_entries().1).unwrap();
        }
    }

    #[test]
    fn golden_object_of_version_1_reads_as_ever() {
        let (entries, _, offset, len) = golden_manifest_and_entries();
        let object = std::fs::read(GOLDEN).unwrap();
        let id = id(0x0102_0304_0506);
        let manifest = Manifest::decode(id, offset, node_at(&object, offset, len)).unwrap();
        assert_eq!(manifest.runs.len(), 2);
        assert_eq!(manifest.runs[0].len(), 1);
        assert_eq!(table_entries(&object, &manifest.runs[0][0]), entries);
    }
}
