//! The log: what chunks in the store say that the map does not yet.

use std::sync::Arc;

use quarry_cache::{Carried, ExtentMap};
use quarry_objfmt::{Lba, LbaRange, Location, MapEntry, Sectors};

use crate::volume::{entry_range, sectors_u32};

/// Longest map entry, whose length is 32 bits.
const ENTRY_SECTORS_MAX: usize = 1 << 31;

/// A committed run's location, as the layers keep it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Committed(pub(crate) Location);

impl Carried for Committed {
    fn skip(self, n: Sectors) -> Self {
        match self.0 {
            Location::Zero => self,
            Location::Data(at) => Self(Location::Data(at.skip(sectors_u32(n)))),
        }
    }
}

/// The log as it was when a checkpoint began. The volume reads by it until the map has it, and whoever folds it
/// makes the map's entries of it: both long, and the latter not under the lock that all volumes share.
#[derive(Clone, Debug)]
pub struct FrozenLog(Arc<ExtentMap<Committed>>);

impl FrozenLog {
    pub(crate) fn new(runs: ExtentMap<Committed>) -> Self {
        Self(Arc::new(runs))
    }

    pub(crate) fn runs(&self) -> &ExtentMap<Committed> {
        &self.0
    }

    /// The runs, to be written to.
    pub(crate) fn thaw(self) -> ExtentMap<Committed> {
        Arc::unwrap_or_clone(self.0)
    }

    /// It as map entries: sorted and disjoint. Runs of zeroes longer than an entry can say are several.
    #[must_use]
    pub fn entries(&self) -> Vec<MapEntry> {
        let mut entries = Vec::with_capacity(self.0.len());
        let runs = self.0.iter();
        entries.extend(runs.flat_map(|(range, found)| committed_entries(range, found)));
        entries
    }
}

/// Of entries that are disjoint, or of which later ones are newer.
impl FromIterator<MapEntry> for FrozenLog {
    fn from_iter<I: IntoIterator<Item = MapEntry>>(entries: I) -> Self {
        let mut runs = ExtentMap::default();
        for entry in entries {
            runs.insert(entry_range(&entry), Committed(entry.location));
        }
        Self::new(runs)
    }
}

fn committed_entries(range: LbaRange, found: Committed) -> impl Iterator<Item = MapEntry> {
    let (start, end) = (range.start.get(), range.end.get());
    (start..end)
        .step_by(ENTRY_SECTORS_MAX)
        .map(move |from| MapEntry {
            start: Lba::new(from),
            len: u32::try_from((end - from).min(ENTRY_SECTORS_MAX as u64))
                .expect("bounded just now"),
            location: found.skip(Sectors::new(from - start)).0,
        })
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::{ChunkId, ChunkSeq, DataLoc, Epoch, VolumeId};

    use super::*;

    fn data(start: u64, len: u32, raw: u32) -> MapEntry {
        let chunk = ChunkId {
            volume: VolumeId::from_bytes([7; 16]),
            epoch: Epoch::ZERO,
            seq: ChunkSeq::ZERO,
        };
        MapEntry {
            start: Lba::new(start),
            len,
            location: Location::Data(DataLoc {
                chunk,
                raw,
                stored_offset: 0,
                stored_len: 4096,
            }),
        }
    }

    fn zeroes(start: u64, len: u32) -> MapEntry {
        MapEntry {
            start: Lba::new(start),
            len,
            location: Location::Zero,
        }
    }

    #[test]
    fn entries_are_what_later_ones_leave_of_earlier_ones_in_order() {
        let log: FrozenLog = [data(100, 16, 0), zeroes(8, 4), data(104, 4, 64)]
            .into_iter()
            .collect();
        let entries = [
            zeroes(8, 4),
            data(100, 4, 0),
            data(104, 4, 64),
            data(108, 8, 8),
        ];
        assert_eq!(log.entries(), entries);
    }

    #[test]
    fn run_of_zeroes_longer_than_an_entry_is_several() {
        let longest = u64::try_from(ENTRY_SECTORS_MAX).unwrap();
        let mut runs = ExtentMap::default();
        let range = LbaRange::new(Lba::new(5), Sectors::new(2 * longest + 3)).unwrap();
        runs.insert(range, Committed(Location::Zero));
        let len = u32::try_from(longest).unwrap();
        let entries = [
            zeroes(5, len),
            zeroes(5 + longest, len),
            zeroes(5 + 2 * longest, 3),
        ];
        assert_eq!(FrozenLog::new(runs).entries(), entries);
    }
}
