//! Map nodes in RAM, within a budget of bytes.
//!
//! Eviction is CLOCK (second chance): a node that was looked at since the hand last passed stays
//! for another round. Order depends on the calls alone, so that a simulation repeats.
//!
//! **Progress.** Room is made before a batch of nodes goes in, never by evicting from the batch
//! itself: the cache may exceed its budget by one batch until the next one comes or the budget
//! changes. So a lookup that is retried right after [`Nodes::insert_all`] finds all of that batch. Who keeps the nodes it
//! loaded for a lookup and puts all of them in again before each retry gets further with each
//! load, however small the budget and however many lookups take turns.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use quarry_cache::NameHasher;

use crate::map::{Node, NodeRef};

/// However much else there is in memory, nodes have the budget divided by this.
const LEAST_SHARE: usize = 4;
/// The budget is changed by steps of the whole divided by this: a change may evict.
const BUDGET_STEPS: usize = 64;

/// RAM of a node's slot, its place in the table of places, and its allocations' own overhead.
const NODE_OVERHEAD: usize = 192;

/// What the cache holds and how it did.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct NodeCacheStats {
    /// Bytes of RAM that its nodes take, overhead included.
    pub bytes: usize,
    /// The budget.
    pub budget: usize,
    /// Nodes in it.
    pub nodes: usize,
    /// Questions answered.
    pub hits: u64,
    /// Questions for nodes that were not there.
    pub misses: u64,
    /// Nodes put out to make room.
    pub evictions: u64,
}

/// A node's place in the store of the tenants that are one group: which node lies there is their store's word.
type GroupNode = (u32, NodeRef);

#[derive(Debug)]
struct Slot {
    place: GroupNode,
    node: Arc<Node>,
    bytes: usize,
    /// Looked at since the hand last passed.
    seen: bool,
    /// Of an index node: in which slot each of its leaves was found last. A hint, for the slot may
    /// have been given to another node since.
    leaves: Box<[u32]>,
}

/// The nodes in RAM of all volumes of a daemon.
#[derive(Debug)]
pub struct NodeCache {
    /// The budget if there is nothing else.
    whole: usize,
    budget: usize,
    /// What the process has in memory that nobody counts.
    beside: u64,
    bytes: usize,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    places: HashMap<GroupNode, usize, BuildHasherDefault<NameHasher>>,
    hand: usize,
    hits: u64,
    misses: u64,
    evictions: u64,
}

impl NodeCache {
    /// An empty cache that keeps to `budget` bytes of RAM.
    #[must_use]
    pub fn new(budget: usize) -> Self {
        Self {
            whole: budget,
            budget,
            beside: 0,
            bytes: 0,
            slots: Vec::new(),
            free: Vec::new(),
            places: HashMap::default(),
            hand: 0,
            hits: 0,
            misses: 0,
            evictions: 0,
        }
    }

    /// What a group has in it.
    pub fn of(&mut self, group: u32) -> Nodes<'_> {
        Nodes { cache: self, group }
    }

    fn put(&mut self, place: GroupNode, node: Arc<Node>) {
        let bytes = cost(&node);
        let leaves = vec![u32::MAX; leaf_count(&node)].into_boxed_slice();
        let slot = Some(Slot {
            leaves,
            place,
            node,
            bytes,
            seen: true,
        });
        let at = match self.free.pop() {
            Some(at) => {
                self.slots[at] = slot;
                at
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        self.places.insert(place, at);
        self.bytes += bytes;
    }

    /// Says how many bytes the process has in memory beside what it caches and indexes: from the next time on that room is
    /// left, it is left for them too.
    pub const fn set_beside(&mut self, bytes: u64) {
        self.beside = bytes;
    }

    /// Leaves so many bytes of its budget to what else is in memory, but for a share that stays; evicts what has no room
    /// then.
    pub fn leave(&mut self, bytes: u64) {
        let bytes = bytes.saturating_add(self.beside);
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let budget = self.whole.saturating_sub(bytes);
        let budget = budget.max(self.whole / LEAST_SHARE);
        if budget.abs_diff(self.budget) > self.whole / BUDGET_STEPS {
            self.budget = budget;
            self.make_room(0);
        }
    }

    /// What it holds and how it did.
    #[must_use]
    pub fn stats(&self) -> NodeCacheStats {
        NodeCacheStats {
            bytes: self.bytes,
            budget: self.budget,
            nodes: self.places.len(),
            hits: self.hits,
            misses: self.misses,
            evictions: self.evictions,
        }
    }

    /// Evicts until `room` more bytes fit the budget, or nothing is left.
    fn make_room(&mut self, room: usize) {
        // One round may only take second chances away; a second one finds all that can go.
        let mut steps = 2 * self.slots.len();
        while self.bytes.saturating_add(room) > self.budget && steps > 0 {
            steps -= 1;
            let at = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let Some(slot) = &mut self.slots[at] else {
                continue;
            };
            if slot.seen {
                slot.seen = false;
                continue;
            }
            self.bytes -= slot.bytes;
            self.places.remove(&slot.place);
            self.slots[at] = None;
            self.free.push(at);
            self.evictions += 1;
        }
    }
}

/// The nodes of one group in the cache. It sees no others', and puts none in for them.
#[derive(Debug)]
pub struct Nodes<'a> {
    cache: &'a mut NodeCache,
    group: u32,
}

impl Nodes<'_> {
    /// The node of this place, if it is here.
    pub fn get(&mut self, place: &NodeRef) -> Option<&Arc<Node>> {
        let at = self.find(place)?;
        self.cache.slots[at].as_ref().map(|slot| &slot.node)
    }

    /// The slot of a node, good until the next insertion or change of budget.
    pub(super) fn find(&mut self, place: &NodeRef) -> Option<usize> {
        let found = self.cache.places.get(&(self.group, *place)).copied();
        match found.and_then(|at| self.cache.slots[at].as_mut()) {
            Some(slot) => {
                slot.seen = true;
                self.cache.hits += 1;
            }
            None => self.cache.misses += 1,
        }
        found
    }

    /// The slot of leaf `number` of the index node in slot `parent`; `place` is the leaf's.
    pub(super) fn find_leaf(
        &mut self,
        parent: usize,
        number: usize,
        place: &NodeRef,
    ) -> Option<usize> {
        let hints = |slot: &Slot| slot.leaves.get(number).copied();
        let hint = self.cache.slots[parent].as_ref().and_then(hints)? as usize;
        if let Some(Some(slot)) = self.cache.slots.get_mut(hint)
            && slot.place == (self.group, *place)
        {
            slot.seen = true;
            self.cache.hits += 1;
            return Some(hint);
        }
        let found = self.find(place)?;
        let hint = self.cache.slots[parent]
            .as_mut()
            .and_then(|slot| slot.leaves.get_mut(number));
        if let (Some(hint), Ok(found)) = (hint, u32::try_from(found)) {
            *hint = found;
        }
        Some(found)
    }

    /// The node in a slot that was just found.
    pub(super) fn node(&self, slot: usize) -> Option<&Node> {
        self.cache.slots.get(slot)?.as_ref().map(|slot| &*slot.node)
    }

    /// Puts a node in, making room first.
    pub fn insert(&mut self, place: NodeRef, node: Arc<Node>) {
        self.insert_all(vec![(place, node)]);
    }

    /// Puts the nodes of one load in, making room for all of them first: they are all here until
    /// the next insertion or change of budget.
    pub fn insert_all(&mut self, batch: Vec<(NodeRef, Arc<Node>)>) {
        let mut room = 0;
        for (place, node) in &batch {
            match self.cache.places.get(&(self.group, *place)) {
                // Looked at before the hand moves, so that it is not the first to go.
                Some(&at) => self.cache.slots[at]
                    .iter_mut()
                    .for_each(|slot| slot.seen = true),
                None => room += cost(node),
            }
        }
        self.cache.make_room(room);
        for (place, node) in batch {
            // A place always holds the same node: what is here stays.
            let place = (self.group, place);
            if !self.cache.places.contains_key(&place) {
                self.cache.put(place, node);
            }
        }
    }
}

fn leaf_count(node: &Node) -> usize {
    match node {
        Node::Index(index) => index.leaves().len(),
        Node::Leaf(_) => 0,
    }
}

fn cost(node: &Node) -> usize {
    node.ram_bytes() + size_of::<u32>() * leaf_count(node) + NODE_OVERHEAD
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::map::{MapObjectBuilder, MapObjectId, NodeKind};
    use quarry_objfmt::{Epoch, Lba, Location, MapEntry, MapSeq, VolumeId};

    use super::*;

    fn node(seq: u64) -> (NodeRef, Arc<Node>) {
        let object = MapObjectId {
            volume: VolumeId::from_bytes([1; 16]),
            epoch: Epoch::new(1),
            seq: MapSeq::new(seq),
        };
        let mut builder = MapObjectBuilder::new(object);
        let entry = MapEntry {
            start: Lba::ZERO,
            len: 8,
            location: Location::Zero,
        };
        builder.push(entry).unwrap();
        let table = builder.finish_table().unwrap().unwrap();
        let place = NodeRef {
            object,
            offset: 0,
            len: table.index_offset,
            kind: NodeKind::Leaf,
        };
        let bytes = builder.into_bytes();
        let leaf = Node::decode(&place, &bytes[..table.index_offset as usize]).unwrap();
        (place, Arc::new(leaf))
    }

    fn budget_of(nodes: usize) -> usize {
        nodes * cost(&node(0).1)
    }

    #[test]
    fn cache_over_budget_evicts_what_was_not_looked_at() {
        let mut cache = NodeCache::new(budget_of(3));
        for seq in 0..4 {
            let (place, node) = node(seq);
            cache.of(0).insert(place, node);
        }
        // The first insertion over the budget took all second chances away; these get theirs anew.
        assert!(cache.of(0).get(&node(0).0).is_none());
        assert!(cache.of(0).get(&node(1).0).is_some());
        cache.of(0).insert(node(4).0, node(4).1);
        assert!(cache.of(0).get(&node(2).0).is_none());
        for seq in [1, 3, 4] {
            assert!(cache.of(0).get(&node(seq).0).is_some(), "{seq}");
        }
        let stats = cache.stats();
        assert_eq!((stats.nodes, stats.evictions), (3, 2));
        assert_eq!((stats.hits, stats.misses), (4, 2));
        assert!(stats.bytes <= stats.budget);
    }

    #[test]
    fn cache_smaller_than_a_batch_holds_the_batch() {
        let mut cache = NodeCache::new(1);
        cache.of(0).insert(node(9).0, node(9).1);
        let batch: Vec<_> = (0..5).map(node).collect();
        cache.of(0).insert_all(batch.clone());
        assert!(
            batch
                .iter()
                .all(|(place, _)| cache.of(0).get(place).is_some())
        );
        assert!(cache.of(0).get(&node(9).0).is_none());
        cache.of(0).insert(node(9).0, node(9).1);
        assert_eq!(cache.stats().nodes, 1);
    }

    #[test]
    fn cache_batch_partly_there_is_all_there_afterwards() {
        let mut cache = NodeCache::new(budget_of(2));
        for seq in 0..2 {
            cache.of(0).insert(node(seq).0, node(seq).1);
        }
        let batch: Vec<_> = (1..4).map(node).collect();
        cache.of(0).insert_all(batch.clone());
        assert!(
            batch
                .iter()
                .all(|(place, _)| cache.of(0).get(place).is_some())
        );
    }

    #[test]
    fn cache_leaves_room_to_others_but_for_its_least_and_takes_it_back() {
        let mut cache = NodeCache::new(budget_of(256));
        cache.of(0).insert_all((0..256).map(node).collect());
        cache.leave(1);
        assert_eq!(cache.stats().nodes, 256, "too little to move for");
        cache.leave(budget_of(64) as u64);
        assert_eq!(cache.stats().nodes, 192);
        cache.leave(u64::MAX);
        assert_eq!(cache.stats().nodes, 256 / LEAST_SHARE);
        assert_eq!(cache.stats().bytes, budget_of(256 / LEAST_SHARE));
        cache.leave(0);
        assert_eq!(cache.stats().budget, budget_of(256));
    }

    #[test]
    fn cache_same_node_twice_counts_once() {
        let mut cache = NodeCache::new(budget_of(9));
        cache.of(0).insert_all(vec![node(1), node(1)]);
        cache.of(0).insert(node(1).0, node(1).1);
        assert_eq!(cache.stats().bytes, budget_of(1));
    }

    #[test]
    fn node_of_a_group_is_no_other_groups() {
        let mut cache = NodeCache::new(budget_of(9));
        let (place, ours) = node(1);
        let theirs = node(2).1;
        cache.of(1).insert(place, Arc::clone(&theirs));
        assert!(cache.of(0).get(&place).is_none());
        cache.of(0).insert(place, Arc::clone(&ours));
        assert!(
            cache
                .of(0)
                .get(&place)
                .is_some_and(|node| Arc::ptr_eq(node, &ours))
        );
        assert!(
            cache
                .of(1)
                .get(&place)
                .is_some_and(|node| Arc::ptr_eq(node, &theirs))
        );
    }
}
