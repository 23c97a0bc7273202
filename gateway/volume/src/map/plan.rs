//! When to merge: the policy that keeps both lookups and rewriting cheap.
//!
//! A checkpoint brings a new run. It swallows the newest runs as long as the next one is less
//! than [`RUN_RATIO`] times what was swallowed, and until no more than [`RUNS_TARGET_MAX`] are
//! left. So runs grow at least by that ratio from newer to older, an entry is rewritten about once
//! each time its run doubles, and the big oldest run is left alone until what lies above is half
//! its size.

use crate::map::MapRoot;

/// A run is merged when the next older one is less than so many times as large.
pub const RUN_RATIO: u64 = 2;

/// Most runs that a plan leaves. A lookup may load an index node and a leaf of each.
pub const RUNS_TARGET_MAX: usize = 8;

/// Runs smaller than this (4 leaves) count as this large: rewriting them costs little, and keeping
/// them apart costs each lookup the same as a big one.
pub const RUN_ENTRIES_FLOOR: u64 = 4096;

/// How many of the newest runs of `root` to merge with a new run of `new_run_entries` entries.
/// If it is all of them, the result is the oldest run, and its entries of zeroes can be dropped.
#[must_use]
pub fn plan_merge(root: &MapRoot, new_run_entries: u64) -> usize {
    plan_runs(root.run_entries(), new_run_entries)
}

/// The same over the sizes of the runs, newest first.
#[must_use]
pub fn plan_runs(runs: &[u64], new: u64) -> usize {
    let mut merged = new.max(RUN_ENTRIES_FLOOR);
    let mut count = 0;
    for &run in runs {
        let left = 1 + runs.len() - count;
        if run >= merged.saturating_mul(RUN_RATIO) && left <= RUNS_TARGET_MAX {
            break;
        }
        merged = merged.saturating_add(run);
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Outcome {
        /// Entries written by merges for each entry brought by checkpoints, in hundredths.
        amplification: u64,
        runs_max: usize,
    }

    /// Checkpoints of these sizes, nothing overwritten (the worst case), after a run of `bulk`.
    fn simulate(bulk: u64, sizes: impl Iterator<Item = u64>) -> Outcome {
        let mut runs = if bulk > 0 { vec![bulk] } else { Vec::new() };
        let (mut brought, mut written, mut runs_max) = (0, 0, 0);
        for new in sizes {
            let count = plan_runs(&runs, new);
            let merged = new + runs.drain(..count).sum::<u64>();
            runs.insert(0, merged);
            brought += new;
            written += merged;
            runs_max = runs_max.max(runs.len());
        }
        Outcome {
            amplification: written * 100 / brought,
            runs_max,
        }
    }

    // Measured, entries written for each one brought (runs at most):
    //   10,000 checkpoints of 10,000 entries, from empty             7.47 (8)
    //   the same onto a bulk run of 10^9 entries                     8.01 (8)
    //   10,000 checkpoints of 10 to 100,000 entries, from empty     7.73 (8)
    //   100,000 checkpoints of 10,000 entries, from empty           10.91 (8)
    #[test]
    fn plan_10_000_checkpoints_keeps_runs_few_and_rewriting_logarithmic() {
        let even = |n| std::iter::repeat_n(10_000, n);
        let outcome = simulate(0, even(10_000));
        assert!(outcome.amplification <= 750, "{}", outcome.amplification);
        assert_eq!(outcome.runs_max, 8);

        let outcome = simulate(1_000_000_000, even(10_000));
        assert!(outcome.amplification <= 810, "{}", outcome.amplification);
        assert_eq!(outcome.runs_max, 8);

        let mut x = 1u64;
        let uneven = std::iter::repeat_with(|| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            [10, 100, 1000, 10_000, 100_000][usize::try_from(x >> 33).unwrap() % 5]
        });
        let outcome = simulate(0, uneven.take(10_000));
        assert!(outcome.amplification <= 900, "{}", outcome.amplification);
        assert!(outcome.runs_max <= 8);

        let outcome = simulate(0, even(100_000));
        assert!(outcome.amplification <= 1100, "{}", outcome.amplification);
        assert_eq!(outcome.runs_max, 8);
    }

    #[test]
    fn plan_tiny_runs_are_merged_at_once() {
        assert_eq!(plan_runs(&[5, 90, 1_000_000], 1), 2);
    }

    #[test]
    fn plan_big_oldest_run_is_left_alone() {
        assert_eq!(plan_runs(&[1_000_000], 10_000), 0);
        assert_eq!(plan_runs(&[1_000_000], 500_001), 1);
    }
}
