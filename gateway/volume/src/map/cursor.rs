//! Reads the entries of one run in order, node by node, without doing the I/O.

use std::collections::VecDeque;

use quarry_objfmt::map::TableRef;
use quarry_objfmt::{FormatError, Lba, LbaRange, MapEntry};

use crate::map::{Node, NodeRef};

/// Walks a run: [`RunCursor::next_node`] names the node to load, [`RunCursor::accept`] takes it.
#[derive(Debug)]
pub struct RunCursor {
    /// The tables left.
    tables: VecDeque<TableRef>,
    /// The leaves left of the table under way, last one first.
    leaves: Vec<(NodeRef, Lba, Lba)>,
    /// What `accept` must be given next.
    due: Option<Due>,
}

#[derive(Clone, Copy, Debug)]
enum Due {
    Index(TableRef),
    Leaf(NodeRef, Lba, Lba),
}

impl RunCursor {
    /// At the start of a run.
    #[must_use]
    pub fn new(run: &[TableRef]) -> Self {
        Self {
            tables: run.iter().copied().collect(),
            leaves: Vec::new(),
            due: None,
        }
    }

    /// The node to load next; `None` at the run's end. Leaves and tables that end at or before
    /// `from` are passed over: a merge that has got that far ([`Merger::covered`](crate::map::Merger::covered))
    /// needs nothing of them. The same node again until it is accepted.
    pub fn next_node(&mut self, from: Lba) -> Option<NodeRef> {
        if self.due.is_none() {
            self.due = self.find_due(from);
        }
        self.due.map(|due| match due {
            Due::Index(table) => NodeRef::index_of(&table),
            Due::Leaf(place, ..) => place,
        })
    }

    /// Goes on without the node that [`RunCursor::next_node`] named, and answers what it and all
    /// below it would have told of; `None` if no node was named.
    pub fn give_up(&mut self) -> Option<LbaRange> {
        self.due.take().map(|due| {
            let (start, end) = match due {
                Due::Index(table) => (table.first, table.end),
                Due::Leaf(_, first, last_end) => (first, last_end),
            };
            LbaRange { start, end }
        })
    }

    fn find_due(&mut self, from: Lba) -> Option<Due> {
        while let Some((place, first, last_end)) = self.leaves.pop() {
            if last_end > from {
                return Some(Due::Leaf(place, first, last_end));
            }
        }
        while let Some(table) = self.tables.pop_front() {
            if table.end > from {
                return Some(Due::Index(table));
            }
        }
        None
    }

    /// Takes the node that [`RunCursor::next_node`] named: the entries of a leaf, `None` for an
    /// index node.
    ///
    /// # Errors
    /// If the node is not what its parent says of it; it is then still the next.
    pub fn accept(&mut self, node: &Node) -> Result<Option<Vec<MapEntry>>, FormatError> {
        match (self.due, node) {
            (Some(Due::Index(table)), Node::Index(index)) => {
                let leaves = index.leaves();
                let first = leaves.first().map(|leaf| leaf.first);
                let end = leaves.last().map(|leaf| leaf.last_end);
                if (first, end) != (Some(table.first), Some(table.end)) {
                    return Err(FormatError::invalid(
                        "map index node",
                        "its span is not what the manifest says",
                    ));
                }
                self.leaves = leaves
                    .iter()
                    .rev()
                    .map(|leaf| {
                        let place = NodeRef::leaf_of(table.object, leaf);
                        (place, leaf.first, leaf.last_end)
                    })
                    .collect();
                self.due = None;
                Ok(None)
            }
            (Some(Due::Leaf(_, first, last_end)), Node::Leaf(leaf)) => {
                let entries: Vec<MapEntry> = leaf.iter().collect();
                let start = entries.first().map(|entry| entry.start);
                let end = entries.last().map(MapEntry::end);
                if (start, end) != (Some(first), Some(last_end)) {
                    return Err(FormatError::invalid(
                        "map leaf",
                        "its span is not what the index says",
                    ));
                }
                self.due = None;
                Ok(Some(entries))
            }
            _ => Err(FormatError::invalid(
                "map node",
                "it is not the node that was asked for",
            )),
        }
    }
}
