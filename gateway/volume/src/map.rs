//! The map: which sectors of a volume lie where in the object store, as of the last checkpoint.
//!
//! A map is a small LSM tree of immutable sorted runs, newest first; what a newer run says of a
//! sector hides what older ones say. [`MapRoot`] is one version of it and answers lookups from
//! nodes in RAM, which [`NodeCache`] keeps within a budget; what is not in RAM is named for the
//! caller to load. [`Merger`] and [`RunCursor`] fold runs together without doing I/O, and
//! [`plan_merge`] says how many to fold at a checkpoint.
//!
//! Owns: the order of shadowing, lookup, the RAM of nodes, the merge and its policy. Does not own
//! the bytes of nodes (`quarry_objfmt::map`), the loading and storing of objects, or the log of
//! commits since the checkpoint, which its owner looks into before it asks the map.
//!
//! **Invariants.** A lookup's answer covers the range asked for exactly, in order, without overlap.
//! Every retry of a lookup whose caller puts back all the nodes it loaded for it gets further,
//! whatever the budget. Metadata that passed its checksums but contradicts itself never makes a lookup panic or
//! loop.

mod cache;
mod cursor;
mod merge;
mod plan;
mod root;

pub use cache::{NodeCache, NodeCacheStats, Nodes};
pub use cursor::RunCursor;
pub use merge::{MergeError, Merger, Step};
pub use plan::{RUN_ENTRIES_FLOOR, RUN_RATIO, RUNS_TARGET_MAX, plan_merge, plan_runs};
pub use root::{Lookup, MapRoot};

use quarry_objfmt::map::{IndexEntry, IndexNode, Leaf, MapObjectId, NodeKind, TableRef, open_node};
use quarry_objfmt::{FormatError, LbaRange, Location, MapEntry};

/// Where a node is, in as many words as one ranged GET and its checksum need.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NodeRef {
    /// The object.
    pub object: MapObjectId,
    /// The node's first byte in the object.
    pub offset: u32,
    /// Its length with its header, in bytes.
    pub len: u32,
    /// What it must be.
    pub kind: NodeKind,
}

impl NodeRef {
    /// A table's index node.
    #[must_use]
    pub const fn index_of(table: &TableRef) -> Self {
        Self {
            object: table.object,
            offset: table.index_offset,
            len: table.index_len,
            kind: NodeKind::Index,
        }
    }

    /// A leaf that an index node of `object` lists.
    #[must_use]
    pub const fn leaf_of(object: MapObjectId, leaf: &IndexEntry) -> Self {
        Self {
            object,
            offset: leaf.offset,
            len: leaf.len,
            kind: NodeKind::Leaf,
        }
    }
}

/// A node in RAM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Node {
    /// The leaves of a table.
    Index(IndexNode),
    /// Entries.
    Leaf(Leaf),
}

impl Node {
    /// Checks that `bytes` are exactly the node that `place` names, and decodes it.
    ///
    /// # Errors
    /// If the bytes are damaged, of another place, or not the node they must be.
    pub fn decode(place: &NodeRef, bytes: &[u8]) -> Result<Self, FormatError> {
        let (kind, payload) = open_node(place.object, place.offset, bytes)?;
        if kind != place.kind {
            return Err(FormatError::Misplaced {
                what: place.kind.what(),
                field: "kind of node",
            });
        }
        match kind {
            NodeKind::Index => IndexNode::decode(payload).map(Self::Index),
            NodeKind::Leaf => Leaf::decode(payload).map(Self::Leaf),
            NodeKind::Manifest | NodeKind::Usage => Err(FormatError::invalid(
                kind.what(),
                "it is not a node of a table",
            )),
        }
    }

    /// Bytes it takes in RAM.
    #[must_use]
    pub fn ram_bytes(&self) -> usize {
        match self {
            Self::Index(index) => index.ram_bytes(),
            Self::Leaf(leaf) => leaf.ram_bytes(),
        }
    }
}

/// The part of `entry` inside `range`, which it must touch.
fn trim(entry: &MapEntry, range: LbaRange) -> MapEntry {
    let start = entry.start.max(range.start);
    let end = entry.end().min(range.end);
    let within = "a part of an entry is no longer than the entry";
    let skip = u32::try_from(start.since(entry.start).get()).expect(within);
    MapEntry {
        start,
        len: u32::try_from(end.since(start).get()).expect(within),
        location: match entry.location {
            Location::Zero => Location::Zero,
            Location::Data(data) => Location::Data(data.skip(skip)),
        },
    }
}

/// Lengthens `last` by `next` if together they are one run: zeroes after zeroes, or the same
/// frame's content going on. Says whether it did.
fn join(last: &mut MapEntry, next: &MapEntry) -> bool {
    let Some(len) = last.len.checked_add(next.len) else {
        return false;
    };
    let joins = last.end() == next.start
        && match (&last.location, &next.location) {
            (Location::Zero, Location::Zero) => true,
            (Location::Data(a), Location::Data(b)) => {
                a.raw.checked_add(last.len) == Some(b.raw)
                    && *a == (quarry_objfmt::DataLoc { raw: a.raw, ..*b })
            }
            _ => false,
        };
    if joins {
        last.len = len;
    }
    joins
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use proptest::prelude::*;
    use quarry_objfmt::map::{Manifest, MapObjectBuilder};
    use quarry_objfmt::{
        ChunkId, ChunkSeq, DataLoc, Epoch, Lba, MapSeq, VOLUME_SECTORS_MAX, VolumeId,
    };

    use super::*;

    /// What each written sector reads as; a sector in a chunk is known by chunk and raw sector.
    type Sector = Option<(ChunkId, u32)>;

    /// Map objects in RAM.
    #[derive(Default)]
    struct Objects {
        objects: BTreeMap<MapObjectId, Vec<u8>>,
    }

    impl Objects {
        fn load(&self, place: &NodeRef) -> Arc<Node> {
            let bytes = &self.objects[&place.object];
            let bytes = &bytes[place.offset as usize..][..place.len as usize];
            Arc::new(Node::decode(place, bytes).unwrap())
        }

        /// Stores a run cut into tables of `cut` entries.
        fn store(&mut self, entries: &[MapEntry], cut: usize) -> Vec<TableRef> {
            let object = MapObjectId {
                volume: VolumeId::from_bytes([1; 16]),
                epoch: Epoch::new(1),
                seq: MapSeq::new(self.objects.len() as u64),
            };
            let mut builder = MapObjectBuilder::new(object);
            let mut tables = Vec::new();
            for part in entries.chunks(cut) {
                for entry in part {
                    builder.push(*entry).unwrap();
                }
                tables.extend(builder.finish_table().unwrap());
            }
            self.objects.insert(object, builder.into_bytes());
            tables
        }

        /// A lookup with its loads, as a volume does it: what was loaded is put back each time.
        /// Also says how many rounds of loads it took.
        fn lookup(
            &self,
            root: &MapRoot,
            range: LbaRange,
            nodes: &mut Nodes<'_>,
        ) -> (Vec<MapEntry>, usize) {
            let mut held = Vec::new();
            for round in 0.. {
                match root.lookup(range, nodes) {
                    Lookup::Found(entries) => return (entries, round),
                    Lookup::Missing(missing) => {
                        let loaded: Vec<_> = missing
                            .iter()
                            .map(|place| (*place, self.load(place)))
                            .collect();
                        held.extend(loaded);
                        nodes.insert_all(held.clone());
                    }
                }
            }
            unreachable!("the rounds are counted for ever")
        }

        /// All entries of a run, by the cursor.
        fn read_run(&self, run: &[TableRef]) -> Vec<MapEntry> {
            let mut cursor = RunCursor::new(run);
            let mut entries = Vec::new();
            while let Some(place) = cursor.next_node(Lba::ZERO) {
                entries.extend(
                    cursor
                        .accept(&self.load(&place))
                        .unwrap()
                        .into_iter()
                        .flatten(),
                );
            }
            entries
        }

        /// Merges `new` with the `count` newest runs of `root`.
        fn merge(&self, root: &MapRoot, new: &[MapEntry], count: usize) -> Vec<MapEntry> {
            let mut cursors: Vec<_> = root.runs()[..count]
                .iter()
                .map(|run| RunCursor::new(run))
                .collect();
            let mut merger = Merger::new(1 + count).drop_zeroes(count == root.runs().len());
            let mut new = Some(new.to_vec());
            let mut merged = Vec::new();
            loop {
                match merger.step() {
                    Step::Entry(entry) => merged.push(entry),
                    Step::Done => return merged,
                    Step::Need(0) => merger.feed(0, new.take()).unwrap(),
                    Step::Need(source) => {
                        let cursor = &mut cursors[source - 1];
                        let fed = loop {
                            let Some(place) = cursor.next_node(merger.covered()) else {
                                break None;
                            };
                            if let Some(entries) = cursor.accept(&self.load(&place)).unwrap() {
                                break Some(entries);
                            }
                        };
                        merger.feed(source, fed).unwrap();
                    }
                }
            }
        }
    }

    fn range(start: u64, end: u64) -> LbaRange {
        LbaRange {
            start: Lba::new(start),
            end: Lba::new(end),
        }
    }

    fn data(start: u64, len: u32, seq: u64, raw: u32) -> MapEntry {
        MapEntry {
            start: Lba::new(start),
            len,
            location: Location::Data(DataLoc {
                chunk: ChunkId {
                    volume: VolumeId::from_bytes([1; 16]),
                    epoch: Epoch::new(1),
                    seq: ChunkSeq::new(seq),
                },
                raw,
                stored_offset: 512 + (raw / 128) * 65_568,
                stored_len: 65_568,
            }),
        }
    }

    fn zero(start: u64, len: u32) -> MapEntry {
        MapEntry {
            start: Lba::new(start),
            len,
            location: Location::Zero,
        }
    }

    fn sectors(entries: &[MapEntry]) -> impl Iterator<Item = (u64, Sector)> + '_ {
        entries.iter().flat_map(|entry| {
            (0..entry.len).map(|n| {
                let sector = match entry.location {
                    Location::Zero => None,
                    Location::Data(data) => Some((data.chunk, data.raw + n)),
                };
                (entry.start.get() + u64::from(n), sector)
            })
        })
    }

    fn assert_reads_as(entries: &[MapEntry], range: LbaRange, model: &BTreeMap<u64, Sector>) {
        let mut at = range.start;
        for entry in entries {
            assert!(entry.start == at && entry.len > 0, "{entries:?}");
            at = entry.end();
        }
        assert_eq!(at, range.end.max(range.start));
        for pair in entries.windows(2) {
            assert!(!join(&mut pair[0].clone(), &pair[1]), "{pair:?}");
        }
        for (sector, found) in sectors(entries) {
            assert_eq!(found, model.get(&sector).copied().flatten(), "at {sector}");
        }
    }

    prop_compose! {
        /// One checkpoint's entries below sector `span` from parts (gap, length, raw start, zero).
        fn any_run(span: u64, most: usize)(
            parts in prop::collection::vec(
                (
                    prop_oneof![Just(0), 0..span / 8],
                    1u32..60,
                    0u32..60,
                    prop::bool::weighted(0.25),
                ),
                1..most,
            ),
            seq in 0u64..1000,
        ) -> Vec<MapEntry> {
            let mut at = 0;
            let mut raw = 0;
            let mut entries = Vec::new();
            for (gap, len, skip, is_zero) in parts {
                let start = at + gap;
                at = start + u64::from(len);
                if at > span {
                    break;
                }
                if is_zero {
                    entries.push(zero(start, len));
                    continue;
                }
                raw += if skip < 20 { 0 } else { skip };
                if raw % 128 + len > 128 {
                    raw = raw / 128 * 128 + 128;
                }
                entries.push(data(start, len, seq, raw));
                raw += len;
            }
            entries
        }
    }

    const SPAN: u64 = 3000;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn lookup_any_runs_equals_the_model_before_and_after_any_merge(
            runs in prop::collection::vec((any_run(SPAN, 60), 1usize..30), 1..7),
            new in any_run(SPAN, 40),
            ranges in prop::collection::vec((0..SPAN, 0..SPAN), 20),
            budget in prop_oneof![Just(0usize), Just(4000), Just(1 << 20)],
        ) {
            let mut objects = Objects::default();
            let mut model = BTreeMap::new();
            let mut root = MapRoot::empty();
            for (entries, cut) in &runs {
                model.extend(sectors(entries));
                root = root.with_new_run(0, objects.store(entries, *cut));
            }
            let ranges: Vec<_> = ranges
                .into_iter()
                .map(|(a, b)| range(a.min(b), a.max(b) + 1))
                .chain([range(0, SPAN), range(5, 5)])
                .collect();
            let mut nodes = NodeCache::new(budget);
            for range in &ranges {
                let (found, rounds) = objects.lookup(&root, *range, &mut nodes.of(0));
                assert_reads_as(&found, *range, &model);
                prop_assert!(rounds <= 2 || budget < 1 << 20);
                if root.is_hole_quick(*range) {
                    prop_assert!(found.iter().all(|entry| entry.location == Location::Zero));
                }
            }

            model.extend(sectors(&new));
            for count in 0..=root.runs().len() {
                let merged = objects.merge(&root, &new, count);
                for pair in merged.windows(2) {
                    prop_assert!(pair[1].start >= pair[0].end());
                    prop_assert!(!join(&mut pair[0].clone(), &pair[1]));
                }
                let tables = objects.store(&merged, 7);
                let next = root.with_new_run(count, tables.clone());
                prop_assert_eq!(objects.read_run(&tables), merged);
                let all = root.runs().len() == count;
                prop_assert!(!all || objects.read_run(next.runs().first().unwrap_or(&vec![]))
                    .iter().all(|entry| entry.location != Location::Zero));
                let (found, _) = objects.lookup(&next, range(0, SPAN), &mut nodes.of(0));
                assert_reads_as(&found, range(0, SPAN), &model);
                for range in &ranges {
                    let (found, _) = objects.lookup(&next, *range, &mut nodes.of(0));
                    assert_reads_as(&found, *range, &model);
                }
            }
        }

        #[test]
        fn node_any_bytes_never_panic(bytes: Vec<u8>, index: bool) {
            let place = NodeRef {
                object: MapObjectId {
                    volume: VolumeId::from_bytes([1; 16]),
                    epoch: Epoch::new(1),
                    seq: MapSeq::new(1),
                },
                offset: 0,
                len: u32::try_from(bytes.len()).unwrap(),
                kind: if index { NodeKind::Index } else { NodeKind::Leaf },
            };
            prop_assert!(Node::decode(&place, &bytes).is_err());
        }
    }

    #[test]
    fn lookup_runs_of_many_leaves_equals_the_model() {
        let mut objects = Objects::default();
        let mut model = BTreeMap::new();
        let mut root = MapRoot::empty();
        for (seq, (step, len)) in (0u64..).zip([(10u64, 8u32), (17, 5), (31, 9)]) {
            let entries: Vec<_> = (0..5000)
                .map(|n| {
                    data(
                        seq + n * step,
                        len,
                        seq,
                        u32::try_from(n % 99).unwrap() * 128,
                    )
                })
                .collect();
            model.extend(sectors(&entries));
            root = root.with_new_run(0, objects.store(&entries, 3000));
        }
        let mut nodes = NodeCache::new(30_000);
        for start in (0..160_000).step_by(997) {
            let part = range(start, start + 2048);
            let (found, _) = objects.lookup(&root, part, &mut nodes.of(0));
            assert_reads_as(&found, part, &model);
        }
        let (found, _) = objects.lookup(&root, range(0, 200_000), &mut nodes.of(0));
        assert_reads_as(&found, range(0, 200_000), &model);
        assert!(nodes.stats().evictions > 0);
        let merged = objects.merge(&root, &[], 3);
        let tables = objects.store(&merged, 100_000);
        let root = root.with_new_run(3, tables);
        assert_eq!(root.runs().len(), 1);
        let (found, _) = objects.lookup(&root, range(0, 200_000), &mut nodes.of(0));
        assert_reads_as(&found, range(0, 200_000), &model);
    }

    #[test]
    fn lookup_of_a_whole_empty_volume_is_cheap_and_splits_the_hole() {
        let mut nodes = NodeCache::new(0);
        let tebibytes_16 = range(100, 100 + (16 << 31));
        assert!(MapRoot::empty().is_hole_quick(tebibytes_16));
        let Lookup::Found(found) = MapRoot::empty().lookup(tebibytes_16, &mut nodes.of(0)) else {
            panic!("an empty map needs no node");
        };
        assert_eq!(found.len(), 9);
        assert_reads_as(&found[..0], range(5, 5), &BTreeMap::new());
        let covered: u64 = found.iter().map(|entry| u64::from(entry.len)).sum();
        assert_eq!(covered, 16 << 31);
        assert_eq!(found[1].start.get(), 100 + u64::from(u32::MAX));
    }

    #[test]
    fn lookup_into_appends_and_leaves_the_list_as_it_was_when_nodes_are_missing() {
        let mut objects = Objects::default();
        let root = MapRoot::empty().with_new_run(0, objects.store(&[zero(10, 10)], 1));
        let mut nodes = NodeCache::new(1 << 20);
        let mut out = vec![zero(0, 5)];
        let missing = root.lookup_into(range(5, 15), &mut nodes.of(0), &mut out);
        assert_eq!(missing.unwrap_err().len(), 1);
        assert_eq!(out, [zero(0, 5)]);
        objects.lookup(&root, range(5, 15), &mut nodes.of(0));
        root.lookup_into(range(5, 15), &mut nodes.of(0), &mut out)
            .unwrap();
        assert_eq!(out, [zero(0, 5), zero(5, 10)]);
    }

    #[test]
    fn lookup_of_metadata_that_contradicts_itself_ends() {
        // A sound table, and a manifest that says it spans something else.
        let mut objects = Objects::default();
        let entries: Vec<_> = (0..3000).map(|n| data(1000 + n * 10, 8, 1, 0)).collect();
        let table = objects.store(&entries, 9999)[0];
        for (first, end) in [(0, 500), (0, 50_000), (1500, 1600), (40_000, 90_000)] {
            let lie = |first, end| TableRef {
                first: Lba::new(first),
                end: Lba::new(end),
                ..table
            };
            let runs = vec![vec![lie(first, end), lie(end, end + 3000)], vec![table]];
            let root = MapRoot::new(Manifest { runs });
            let mut nodes = NodeCache::new(1 << 20);
            let (found, _) = objects.lookup(&root, range(0, 100_000), &mut nodes.of(0));
            assert_eq!(found.last().unwrap().end(), Lba::new(100_000));
            let mut cursor = RunCursor::new(&root.runs()[0]);
            let index = cursor.next_node(Lba::ZERO).unwrap();
            assert!(cursor.accept(&objects.load(&index)).is_err());
        }
    }

    #[test]
    fn node_of_another_kind_is_refused() {
        let mut objects = Objects::default();
        let table = objects.store(&[zero(1, 1)], 1)[0];
        let place = NodeRef {
            kind: NodeKind::Leaf,
            ..NodeRef::index_of(&table)
        };
        let bytes = &objects.objects[&table.object][place.offset as usize..];
        assert!(Node::decode(&place, bytes).is_err());
    }

    #[test]
    fn lookups_taking_turns_under_no_budget_all_end_in_three_rounds() {
        let mut objects = Objects::default();
        let mut root = MapRoot::empty();
        for seq in 0..4 {
            let entries: Vec<_> = (0..4000).map(|n| data(seq + n * 20, 8, seq, 0)).collect();
            root = root.with_new_run(0, objects.store(&entries, 1500));
        }
        let mut nodes = NodeCache::new(0);
        let asked: Vec<_> = (0..8).map(|n| range(n * 9000, n * 9000 + 9000)).collect();
        let mut held = vec![Vec::new(); asked.len()];
        let mut answered = vec![false; asked.len()];
        // Indexes, leaves, answer.
        for _ in 0..3 {
            for (number, range) in asked.iter().enumerate() {
                nodes.of(0).insert_all(held[number].clone());
                match root.lookup(*range, &mut nodes.of(0)) {
                    Lookup::Found(_) => answered[number] = true,
                    Lookup::Missing(missing) => {
                        let load = |place: &NodeRef| (*place, objects.load(place));
                        held[number].extend(missing.iter().map(load));
                    }
                }
            }
        }
        assert_eq!(answered, [true; 8]);
    }

    #[test]
    fn merge_wide_zeroes_hide_older_leaves_without_loading_them() {
        let mut objects = Objects::default();
        let entries: Vec<_> = (0..5000).map(|n| data(n * 10, 8, 1, 0)).collect();
        let root = MapRoot::empty().with_new_run(0, objects.store(&entries, 9999));
        let discard = [zero(0, 49_000)];
        let merged = objects.merge(&root, &discard, 1);
        assert_eq!(merged.len(), 100);
        let mut merger = Merger::new(2);
        assert_eq!(merger.step(), Step::Need(0));
        merger.feed(0, Some(discard.to_vec())).unwrap();
        assert_eq!(merger.step(), Step::Need(1));
        merger.feed(1, Some(vec![data(0, 8, 1, 0)])).unwrap();
        assert_eq!(merger.step(), Step::Need(0));
        merger.feed(0, None).unwrap();
        assert_eq!(merger.step(), Step::Need(1));
        assert_eq!(merger.covered(), Lba::new(49_000));
        let mut cursor = RunCursor::new(&root.runs()[0]);
        let index = cursor.next_node(merger.covered()).unwrap();
        cursor.accept(&objects.load(&index)).unwrap();
        let leaf = cursor.next_node(merger.covered()).unwrap();
        let entries = cursor.accept(&objects.load(&leaf)).unwrap().unwrap();
        assert_eq!(entries[0].start, Lba::new(4096 * 10));
    }

    #[test]
    fn merge_source_out_of_order_is_refused() {
        let mut merger = Merger::new(1);
        assert_eq!(merger.step(), Step::Need(0));
        assert_eq!(
            merger.feed(0, Some(vec![zero(10, 10), zero(19, 5)])),
            Err(MergeError {
                from: 0,
                at: Lba::new(19)
            })
        );
    }

    #[test]
    fn merge_of_nothing_is_done() {
        assert_eq!(Merger::new(0).step(), Step::Done);
        let end = range(VOLUME_SECTORS_MAX - 8, VOLUME_SECTORS_MAX);
        let last = data(end.start.get(), 8, 1, 0);
        let mut merger = Merger::new(1);
        assert_eq!(merger.step(), Step::Need(0));
        merger.feed(0, Some(vec![last])).unwrap();
        assert_eq!(merger.step(), Step::Need(0));
        merger.feed(0, None).unwrap();
        assert_eq!(merger.step(), Step::Entry(last));
        assert_eq!(merger.step(), Step::Done);
    }

    /// Measured, release build, CPU time on 2 cores that other builds kept busy (load 7). A block of
    /// 4 KiB at random: 0.2 us (1 run) and 0.8 to 1.2 us (8 runs) in a map of 20,000 entries, which
    /// CPU caches hold; 0.7 us and 4 to 4.4 us over 1,000,000 entries (38 and 76 MiB), which they
    /// do not. A run of 1 MiB in 256 entries: 24 to 65 us.
    #[test]
    #[ignore = "a measurement; run it in a release build with --nocapture"]
    fn lookup_in_ram_measured() {
        for (runs, size) in [(1, 1_000_000u64), (8, 1_000_000), (1, 20_000), (8, 20_000)] {
            let mut objects = Objects::default();
            let mut root = MapRoot::empty();
            for age in (0..runs).rev() {
                let count = size >> (runs - 1 - age);
                let step = size * 16 / count;
                let entries: Vec<_> = (0..count)
                    .map(|n| data(n * step, 8, n % 5000, u32::try_from(n % 2000).unwrap() * 8))
                    .collect();
                root = root.with_new_run(0, objects.store(&entries, 1_000_000));
            }
            let mut nodes = NodeCache::new(1 << 30);
            objects.lookup(&root, range(0, size * 16), &mut nodes.of(0));
            for sectors in [8, 2048] {
                let mut out = Vec::new();
                let mut at = 1u64;
                let (rounds, mut entries) = (1_000_000 / sectors, 0);
                // Time on the CPU: other work on the machine does not count.
                let cpu_ns = || {
                    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
                    stat.split(' ').next().unwrap().parse::<u64>().unwrap()
                };
                let start = cpu_ns();
                for _ in 0..rounds {
                    at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let lba = (at >> 20) % (size * 16 - sectors) / 8 * 8;
                    out.clear();
                    root.lookup_into(range(lba, lba + sectors), &mut nodes.of(0), &mut out)
                        .unwrap();
                    entries += out.len() as u64;
                }
                let each = (cpu_ns() - start) / rounds;
                println!(
                    "{runs} runs, {size} in the oldest, {sectors} sectors: {each} ns a lookup, {} entries; {} MiB for {} nodes",
                    entries / rounds,
                    nodes.stats().bytes >> 20,
                    nodes.stats().nodes,
                );
            }
        }
    }
}
