//! Merges sorted streams of entries, newest first, into the one stream that reads the same.

use quarry_objfmt::{Lba, LbaRange, Location, MapEntry};

use crate::map::{join, trim};

/// What a merge needs or gives next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Feed this source, then go on.
    Need(usize),
    /// The next entry of the result.
    Entry(MapEntry),
    /// There are no more.
    Done,
}

/// A source's entries are not sorted and disjoint: what was decoded contradicts itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("entries of source {from} of a map merge are not sorted and disjoint at {at:?}")]
pub struct MergeError {
    /// The source's number.
    pub from: usize,
    /// The start of the entry out of order.
    pub at: Lba,
}

#[derive(Debug)]
struct Source {
    entries: std::vec::IntoIter<MapEntry>,
    /// The next entry, cut to what the merge has not covered.
    head: Option<MapEntry>,
    /// Where the next entry fed may start.
    fed: Lba,
    ended: bool,
}

/// A pull-style merge: call [`Merger::step`] and do what it says. Source 0 is the newest; where
/// sources overlap, the newest counts, and the others are cut to the sector. Adjacent entries that
/// are one run become one entry.
#[derive(Debug)]
pub struct Merger {
    sources: Vec<Source>,
    /// All before this is decided.
    covered: Lba,
    drop_zeroes: bool,
    /// The last entry, which the next may still lengthen.
    last: Option<MapEntry>,
}

impl Merger {
    /// A merge of `sources` streams.
    #[must_use]
    pub fn new(sources: usize) -> Self {
        let source = || Source {
            entries: Vec::new().into_iter(),
            head: None,
            fed: Lba::ZERO,
            ended: false,
        };
        Self {
            sources: std::iter::repeat_with(source).take(sources).collect(),
            covered: Lba::ZERO,
            drop_zeroes: false,
            last: None,
        }
    }

    /// Leaves entries of zeroes out of the result: for a merge with the oldest run, below which
    /// there is nothing that they would hide.
    #[must_use]
    pub const fn drop_zeroes(mut self, drop: bool) -> Self {
        self.drop_zeroes = drop;
        self
    }

    /// Leaves out all before this place, as if it were decided already.
    #[must_use]
    pub const fn from(mut self, from: Lba) -> Self {
        self.covered = from;
        self
    }

    /// How far the merge has got: entries that end at or before this need not be fed any more.
    #[must_use]
    pub const fn covered(&self) -> Lba {
        self.covered
    }

    /// Gives a source its next entries; `None` says that it has no more.
    ///
    /// # Errors
    /// If they are not sorted, disjoint, and behind what was fed before. The merge is of no use
    /// afterwards.
    ///
    /// # Panics
    /// If there is no such source, or it has entries left or has ended: only what
    /// [`Step::Need`] names is fed.
    pub fn feed(
        &mut self,
        source: usize,
        entries: Option<Vec<MapEntry>>,
    ) -> Result<(), MergeError> {
        let from = source;
        let source = &mut self.sources[source];
        assert!(
            !source.ended && source.entries.len() == 0,
            "a source is fed that needs nothing"
        );
        let Some(entries) = entries else {
            source.ended = true;
            return Ok(());
        };
        for entry in &entries {
            if entry.start < source.fed || entry.len == 0 {
                return Err(MergeError {
                    from,
                    at: entry.start,
                });
            }
            source.fed = entry.end();
        }
        source.entries = entries.into_iter();
        Ok(())
    }

    /// The next thing to do.
    pub fn step(&mut self) -> Step {
        loop {
            let part = match self.next_part() {
                Ok(Some(part)) => part,
                Ok(None) => return self.last.take().map_or(Step::Done, Step::Entry),
                Err(source) => return Step::Need(source),
            };
            self.covered = part.end();
            if self.drop_zeroes && part.location == Location::Zero {
                continue;
            }
            if let Some(last) = &mut self.last
                && join(last, &part)
            {
                continue;
            }
            if let Some(done) = self.last.replace(part) {
                return Step::Entry(done);
            }
        }
    }

    /// The part that comes next, from the newest of the sources that start first, up to where a
    /// newer one starts; `None` when all have ended; the source that must be fed as the error.
    fn next_part(&mut self) -> Result<Option<MapEntry>, usize> {
        let mut first: Option<MapEntry> = None;
        // Where the newest source that starts later than `first` and is newer cuts it off.
        let mut cut = Lba::new(u64::MAX);
        for (number, source) in self.sources.iter_mut().enumerate() {
            let Some(head) = source.head_from(self.covered, number)? else {
                continue;
            };
            match &first {
                Some(found) if found.start <= head.start => {}
                Some(found) => {
                    cut = cut.min(found.start);
                    first = Some(head);
                }
                None => first = Some(head),
            }
        }
        Ok(first.map(|first| {
            let range = LbaRange {
                start: first.start,
                end: cut,
            };
            trim(&first, range)
        }))
    }
}

impl Source {
    /// The source's next entry, cut to what starts at `covered`; `None` when it has ended.
    fn head_from(&mut self, covered: Lba, number: usize) -> Result<Option<MapEntry>, usize> {
        loop {
            match self.head {
                Some(head) if head.end() > covered => {
                    if head.start < covered {
                        let rest = LbaRange {
                            start: covered,
                            end: head.end(),
                        };
                        self.head = Some(trim(&head, rest));
                    }
                    return Ok(self.head);
                }
                _ => {}
            }
            self.head = self.entries.next();
            if self.head.is_none() {
                return if self.ended { Ok(None) } else { Err(number) };
            }
        }
    }
}
