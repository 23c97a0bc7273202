//! What of a volume is read most: what the next host should have in its cache at once.
//!
//! Counts reads by regions of equal size. When there are too many, regions become twice as large, so
//! that the memory is bounded and nothing that is read is left out, however large the volume is. Counts
//! are halved now and then: what was read long ago is forgotten, and regions become smaller again.
//!
//! An idle volume has no counts. Iteration order of the table is never observed.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use quarry_cache::NameHasher;
use quarry_objfmt::{Lba, LbaRange};

/// Most regions of a volume: some 200 KiB of memory while it is busy.
pub(super) const HEAT_REGIONS_MAX: usize = 8192;

/// Smallest region, as the exponent of 2 of its sectors: 64 KiB, a frame.
const REGION_SHIFT_MIN: u32 = 7;

/// Reads between two halvings.
const READS_HALVED: u32 = 1 << 20;

/// Reads that are all counted, from the start and from each halving on. Of those after them, which say little
/// that is new, one in [`READS_A_COUNT`] counts for as many: a look at the table costs a hit a twentieth.
const READS_EXACT: u32 = 1 << 14;

/// A power of two.
const READS_A_COUNT: u32 = 8;

type Counts = HashMap<u64, u32, BuildHasherDefault<NameHasher>>;

/// The counts of one volume.
#[derive(Debug)]
pub(super) struct Heat {
    shift: u32,
    regions: Counts,
    reads: u32,
}

impl Default for Heat {
    fn default() -> Self {
        Self {
            shift: REGION_SHIFT_MIN,
            regions: Counts::default(),
            reads: 0,
        }
    }
}

impl Heat {
    /// A read of `range`, which is not empty.
    pub(super) fn note(&mut self, range: LbaRange) {
        self.reads += 1;
        if self.reads == READS_HALVED {
            self.halve();
        }
        let mut weight = 1;
        if self.reads > READS_EXACT {
            // Multiples of the golden ratio fall everywhere alike, in step with no reader's rhythm.
            if self.reads.wrapping_mul(0x9e37_79b9) >= u32::MAX / READS_A_COUNT {
                return;
            }
            weight = READS_A_COUNT;
        }
        let (first, last) = (range.start.get(), range.end.get() - 1);
        for region in first >> self.shift..=last >> self.shift {
            let count = self.regions.entry(region).or_default();
            *count = count.saturating_add(weight);
        }
        while self.regions.len() > HEAT_REGIONS_MAX {
            self.coarsen();
        }
    }

    fn coarsen(&mut self) {
        self.shift += 1;
        for (region, count) in std::mem::take(&mut self.regions) {
            let whole = self.regions.entry(region >> 1).or_default();
            *whole = whole.saturating_add(count);
        }
    }

    fn halve(&mut self) {
        self.reads = 0;
        self.regions.retain(|_, count| {
            *count /= 2;
            *count > 0
        });
        // Of the two halves of a region, the one that is not read goes with the next halvings.
        while self.shift > REGION_SHIFT_MIN && self.regions.len() < HEAT_REGIONS_MAX / 4 {
            self.shift -= 1;
            for (region, count) in std::mem::take(&mut self.regions) {
                self.regions.insert(region << 1, count);
                self.regions.insert((region << 1) + 1, count);
            }
        }
    }

    /// What is read, the most read first by powers of two, merged with neighbours that are as hot; at
    /// most `ranges_max` ranges, none of them behind `end`.
    pub(super) fn hottest(&self, end: Lba, ranges_max: usize) -> Vec<LbaRange> {
        let mut by_heat: Vec<(u32, u64)> = self
            .regions
            .iter()
            .map(|(region, count)| (count.leading_zeros(), *region))
            .collect();
        by_heat.sort_unstable();
        let mut ranges: Vec<(u32, LbaRange)> = Vec::new();
        for (cold, region) in by_heat {
            let range = LbaRange {
                start: Lba::new(region << self.shift),
                end: end.min(Lba::new((region + 1) << self.shift)),
            };
            let count = ranges.len();
            match ranges.last_mut() {
                _ if range.start >= range.end => {}
                Some((same, last)) if *same == cold && last.end == range.start => {
                    last.end = range.end;
                }
                _ if count == ranges_max => break,
                _ => ranges.push((cold, range)),
            }
        }
        ranges.into_iter().map(|(_, range)| range).collect()
    }
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::Sectors;

    use super::*;

    const END: Lba = Lba::new(1 << 51);

    fn range(start: u64, len: u64) -> LbaRange {
        LbaRange::new(Lba::new(start), Sectors::new(len)).unwrap()
    }

    #[test]
    fn hottest_comes_first_and_neighbours_are_one() {
        let mut heat = Heat::default();
        assert!(heat.hottest(END, 9).is_empty());
        heat.note(range(0, 300));
        for _ in 0..10 {
            heat.note(range(5000, 8));
        }
        let expected = [range(39 * 128, 128), range(0, 384)];
        assert_eq!(heat.hottest(END, 9), expected);
        assert_eq!(heat.hottest(END, 1), expected[..1]);
        assert_eq!(heat.hottest(Lba::new(100), 9), [range(0, 100)]);
    }

    #[test]
    fn reads_all_over_the_largest_volume_are_counted_in_bounded_memory() {
        let mut heat = Heat::default();
        let mut at = 1_u64;
        for _ in 0..100_000 {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            heat.note(range((at >> 13) - 8, 8));
            assert!(heat.regions.len() <= HEAT_REGIONS_MAX);
        }
        let counted: u64 = heat.regions.values().map(|count| u64::from(*count)).sum();
        assert!(counted >= 99_000, "{counted}");
    }

    #[test]
    fn reads_in_any_rhythm_are_counted_as_often_as_they_are_made() {
        for beats in 2..20_u64 {
            let mut heat = Heat::default();
            let reads = u64::from(READS_EXACT) * 8;
            for read in 0..reads {
                heat.note(range(read % beats * 128, 8));
            }
            for (region, count) in &heat.regions {
                let (count, expected) = (u64::from(*count), reads / beats);
                let off = count.abs_diff(expected);
                assert!(
                    off * 50 < expected,
                    "{region} of {beats}: {count}, not {expected}"
                );
            }
        }
    }

    #[test]
    fn what_was_read_long_ago_is_forgotten_and_regions_become_small_again() {
        let mut heat = Heat::default();
        for n in 0..2 * HEAT_REGIONS_MAX as u64 {
            heat.note(range(n << 20, 8));
        }
        assert!(heat.shift > REGION_SHIFT_MIN);
        for _ in 0..40 {
            for _ in 0..1000 {
                heat.note(range(1000, 8));
            }
            heat.halve();
        }
        assert_eq!(heat.hottest(END, 9), [range(896, 128)]);
    }
}
