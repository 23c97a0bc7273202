//! One version of a map, and the lookup.

use std::collections::BTreeSet;

use quarry_objfmt::map::{Manifest, MapObjectId, TableRef};
use quarry_objfmt::{Lba, LbaRange, Location, MapEntry};

use crate::map::{Node, NodeRef, Nodes, join, trim};

/// The longest entry, in sectors; a longer hole is several.
const ENTRY_SECTORS_MAX: u64 = u32::MAX as u64;

/// What a lookup finds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// Entries that cover the range exactly, in order; holes are zeroes.
    Found(Vec<MapEntry>),
    /// Nodes to load before the lookup is tried again, each once.
    Missing(Vec<NodeRef>),
}

/// One version of a map: immutable, small, shared.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MapRoot {
    manifest: Manifest,
    /// Entries of each run, as in the manifest.
    run_entries: Vec<u64>,
}

impl MapRoot {
    /// The map that a manifest names.
    #[must_use]
    pub fn new(manifest: Manifest) -> Self {
        let entries = |run: &Vec<TableRef>| {
            run.iter()
                .fold(0u64, |sum, table| sum.saturating_add(table.entries))
        };
        Self {
            run_entries: manifest.runs.iter().map(entries).collect(),
            manifest,
        }
    }

    /// The map of a new volume: one hole.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// What is stored of it.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its runs, newest first, each a sorted list of tables.
    #[must_use]
    pub fn runs(&self) -> &[Vec<TableRef>] {
        &self.manifest.runs
    }

    /// The count of entries of each run, newest first.
    #[must_use]
    pub fn run_entries(&self) -> &[u64] {
        &self.run_entries
    }

    /// Bytes that its tables take in the store.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let tables = self.manifest.runs.iter().flatten();
        tables.fold(0, |sum, table| sum.saturating_add(table.stored_bytes))
    }

    /// The objects its tables lie in: those that must outlive it. The manifest's own object is
    /// one more if it holds no table.
    #[must_use]
    pub fn objects(&self) -> BTreeSet<MapObjectId> {
        let tables = self.manifest.runs.iter().flatten();
        tables.map(|table| table.object).collect()
    }

    /// The version after this one: `tables` are a new run merged with the `merged` newest of the
    /// runs here, and take their place. Without tables (all was dropped) there is no new run.
    ///
    /// # Panics
    /// If there are not so many runs.
    #[must_use]
    pub fn with_new_run(&self, merged: usize, tables: Vec<TableRef>) -> Self {
        let kept = &self.manifest.runs[merged..];
        let new = if tables.is_empty() {
            None
        } else {
            Some(tables)
        };
        Self::new(Manifest {
            runs: new.into_iter().chain(kept.iter().cloned()).collect(),
        })
    }

    /// The version after this one: `tables` are a new run right above the `older` oldest runs. Without
    /// tables there is no new run.
    ///
    /// # Panics
    /// If there are not so many runs.
    #[must_use]
    pub fn with_run_above(&self, older: usize, tables: Vec<TableRef>) -> Self {
        let mut runs = self.manifest.runs.clone();
        if !tables.is_empty() {
            runs.insert(runs.len() - older, tables);
        }
        Self::new(Manifest { runs })
    }

    /// Whether `range` surely is one hole: no table touches it. Needs no node.
    #[must_use]
    pub fn is_hole_quick(&self, range: LbaRange) -> bool {
        self.manifest.runs.iter().all(|run| {
            let at = run.partition_point(|table| table.end <= range.start);
            run.get(at).is_none_or(|table| table.first >= range.end)
        })
    }

    /// What the sectors of `range` read as.
    ///
    /// What is missing is named in at most two rounds: all index nodes that the range touches,
    /// then all leaves, of older runs too where the node above is not known yet and might hide
    /// them. A cold lookup so waits for two loads, not for two a run; it may load a node too many.
    pub fn lookup(&self, range: LbaRange, nodes: &mut Nodes<'_>) -> Lookup {
        let mut found = Vec::new();
        match self.lookup_into(range, nodes, &mut found) {
            Ok(()) => Lookup::Found(found),
            Err(missing) => Lookup::Missing(missing),
        }
    }

    /// As [`MapRoot::lookup`], but appends to `out`, so that a caller who keeps it allocates
    /// nothing when all nodes are there.
    ///
    /// # Errors
    /// The nodes to load; `out` is then as it was.
    pub fn lookup_into(
        &self,
        range: LbaRange,
        nodes: &mut Nodes<'_>,
        out: &mut Vec<MapEntry>,
    ) -> Result<(), Vec<NodeRef>> {
        let from = out.len();
        let mut walk = Walk {
            runs: &self.manifest.runs,
            nodes,
            out,
            from,
            missing: Vec::new(),
        };
        walk.descend(0, range);
        let mut missing = walk.missing;
        if missing.is_empty() {
            return Ok(());
        }
        out.truncate(from);
        missing.sort_unstable_by_key(|place| (place.object, place.offset, place.len));
        missing.dedup();
        Err(missing)
    }
}

/// What a run says of a sector.
enum Located {
    /// It is in this entry.
    Entry(MapEntry),
    /// Nothing, up to here.
    Gap(Lba),
    /// Not known without this node, up to here.
    Missing(NodeRef, Lba),
}

/// A lookup under way.
struct Walk<'a, 'c> {
    runs: &'a [Vec<TableRef>],
    nodes: &'a mut Nodes<'c>,
    out: &'a mut Vec<MapEntry>,
    /// Where the answer starts in `out`.
    from: usize,
    missing: Vec<NodeRef>,
}

impl Walk<'_, '_> {
    /// Answers `range` from run `depth` and, where it has gaps, from those below. Recursion ends
    /// after the runs of a manifest, which are few.
    fn descend(&mut self, depth: usize, range: LbaRange) {
        let Some(run) = self.runs.get(depth) else {
            self.hole(range);
            return;
        };
        let mut at = range.start;
        while at < range.end {
            let rest = LbaRange {
                start: at,
                end: range.end,
            };
            let below = match locate(run, rest, self.nodes) {
                Located::Entry(entry) => {
                    let part = trim(&entry, rest);
                    at = part.end();
                    self.push(part);
                    continue;
                }
                Located::Gap(until) => until,
                Located::Missing(place, until) => {
                    self.missing.push(place);
                    until
                }
            };
            let gap = LbaRange {
                start: at,
                end: below,
            };
            self.descend(depth + 1, gap);
            at = below;
        }
    }

    fn push(&mut self, entry: MapEntry) {
        if !self.missing.is_empty() {
            return;
        }
        if self.out.len() > self.from
            && let Some(last) = self.out.last_mut()
            && join(last, &entry)
        {
            return;
        }
        self.out.push(entry);
    }

    fn hole(&mut self, range: LbaRange) {
        let mut at = range.start;
        while at < range.end && self.missing.is_empty() {
            let len = range.end.since(at).get().min(ENTRY_SECTORS_MAX);
            let part = MapEntry {
                start: at,
                len: u32::try_from(len).unwrap_or(u32::MAX),
                location: Location::Zero,
            };
            at = part.end();
            self.push(part);
        }
    }
}

/// What `run` says of the first sector of `rest`. An answer reaches at least one sector further
/// and, but for an entry, at most to the end of `rest`, whatever the nodes hold.
fn locate(run: &[TableRef], rest: LbaRange, nodes: &mut Nodes<'_>) -> Located {
    let at = rest.start;
    let number = run.partition_point(|table| table.end <= at);
    let Some(table) = run.get(number) else {
        return Located::Gap(rest.end);
    };
    if table.first > at {
        return Located::Gap(table.first.min(rest.end));
    }
    let place = NodeRef::index_of(table);
    let slot = nodes.find(&place);
    let index = slot.and_then(|slot| Some((slot, nodes.node(slot)?)));
    let Some((slot, Node::Index(index))) = index else {
        return Located::Missing(place, table.end.min(rest.end));
    };
    let after_table = || run.get(number + 1).map_or(rest.end, |next| next.first);
    let number = index.find(at);
    let Some(&leaf) = index.leaves().get(number) else {
        return Located::Gap(after_table().min(rest.end));
    };
    if leaf.first > at {
        return Located::Gap(leaf.first.min(rest.end));
    }
    let after_leaf = index
        .leaves()
        .get(number + 1)
        .map_or_else(after_table, |next| next.first);
    let place = NodeRef::leaf_of(table.object, &leaf);
    let found = nodes.find_leaf(slot, number, &place);
    let Some(Node::Leaf(entries)) = found.and_then(|slot| nodes.node(slot)) else {
        return Located::Missing(place, leaf.last_end.min(rest.end));
    };
    let number = entries.find(at);
    match entries.start(number) {
        Some(start) if start > at => Located::Gap(start.min(rest.end)),
        Some(_) => entries
            .get(number)
            .map_or(Located::Gap(after_leaf.min(rest.end)), Located::Entry),
        None => Located::Gap(after_leaf.min(rest.end)),
    }
}
