//! A map from runs of sectors to values, where a newer run covers what it overlaps.

use std::collections::BTreeMap;

use quarry_objfmt::{Lba, LbaRange, Sectors};

/// A value that a run of sectors carries, and that can be cut with the run.
pub trait Carried: Copy {
    /// The value for the same run with its first `n` sectors cut off.
    #[must_use]
    fn skip(self, n: Sectors) -> Self;
}

/// Disjoint runs of sectors in order, each with a value.
///
/// Memory: one B-tree entry a run. Time: logarithmic in the runs held, linear in the runs touched.
#[derive(Clone, Debug)]
pub struct ExtentMap<V> {
    runs: BTreeMap<Lba, (Lba, V)>,
}

impl<V> Default for ExtentMap<V> {
    fn default() -> Self {
        Self {
            runs: BTreeMap::new(),
        }
    }
}

impl<V: Carried> ExtentMap<V> {
    /// How many runs it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether no run touches `range`, found by one search.
    #[must_use]
    pub fn has_none_of(&self, range: LbaRange) -> bool {
        let last = self.runs.range(..range.end).next_back();
        range.is_empty() || last.is_none_or(|(_, (end, _))| *end <= range.start)
    }

    /// Gives `range` the value `value`, whatever it had before.
    pub fn insert(&mut self, range: LbaRange, value: V) {
        if range.is_empty() {
            return;
        }
        match self.last_before_mut(range.end) {
            // What is overwritten as it was written takes one search.
            Some((start, run)) if start == range.start && run.0 <= range.end => {
                *run = (range.end, value);
                return;
            }
            Some((_, run)) if run.0 > range.start => self.cut_out(range),
            _ => {}
        }
        self.runs.insert(range.start, (range.end, value));
    }

    /// Takes `range` out, cutting the runs that reach over its ends.
    pub fn remove(&mut self, range: LbaRange) {
        if range.is_empty() {
            return;
        }
        match self.last_before_mut(range.end) {
            Some((start, run)) if start == range.start && run.0 <= range.end => {
                self.runs.remove(&start);
            }
            Some((_, run)) if run.0 > range.start => self.cut_out(range),
            _ => {}
        }
    }

    /// The last run that starts before `end`: if it ends before a range that ends at `end`, nothing
    /// touches that range; if it starts where the range does or before, nothing else does.
    fn last_before_mut(&mut self, end: Lba) -> Option<(Lba, &mut (Lba, V))> {
        let last = self.runs.range_mut(..end).next_back();
        last.map(|(&start, run)| (start, run))
    }

    /// As [`ExtentMap::remove`], for any overlap.
    fn cut_out(&mut self, range: LbaRange) {
        if let Some((&start, &mut (ref mut end, value))) =
            self.runs.range_mut(..range.start).next_back()
            && *end > range.start
        {
            let old_end = *end;
            *end = range.start;
            if old_end > range.end {
                self.runs
                    .insert(range.end, (old_end, value.skip(range.end.since(start))));
                return;
            }
        }
        while let Some((&start, &(end, value))) = self.runs.range(range.start..range.end).next() {
            self.runs.remove(&start);
            if end > range.end {
                self.runs
                    .insert(range.end, (end, value.skip(range.end.since(start))));
                return;
            }
        }
    }

    /// Takes those parts of `range` out whose value `wanted` picks.
    pub fn remove_where(&mut self, range: LbaRange, mut wanted: impl FnMut(V) -> bool) {
        match self.runs.range(..range.end).next_back() {
            // Most ranges are one run, or nothing any more.
            Some((&start, &(end, value))) if start == range.start && end <= range.end => {
                if wanted(value) {
                    self.runs.remove(&start);
                }
                return;
            }
            Some((_, (end, _))) if *end > range.start => {}
            _ => return,
        }
        let mut picked = Vec::new();
        self.visit(range, |part, value| {
            if value.is_some_and(&mut wanted) {
                picked.push(part);
            }
        });
        for part in picked {
            self.remove(part);
        }
    }

    /// Walks `range` in order, run by run and gap by gap: together the parts are exactly `range`.
    pub fn visit(&self, range: LbaRange, mut each: impl FnMut(LbaRange, Option<V>)) {
        let mut at = range.start;
        let mut run = |start: Lba, end: Lba, value: V| {
            let part = LbaRange {
                start: start.max(range.start),
                end: end.min(range.end),
            };
            if at < part.start {
                let gap = LbaRange {
                    start: at,
                    end: part.start,
                };
                each(gap, None);
            }
            each(part, Some(value.skip(part.start.since(start))));
            at = part.end;
        };
        match self.runs.range(..range.end).next_back() {
            // Most ranges are touched by one run at most: this one, found by one search.
            Some((&start, &(end, value))) if start <= range.start && end > range.start => {
                run(start, end, value);
            }
            Some((&start, _)) if start > range.start => {
                let before = self.runs.range(..range.start).next_back();
                let first = before.filter(|(_, (end, _))| *end > range.start);
                let inside = self.runs.range(range.start..range.end);
                for (&start, &(end, value)) in first.into_iter().chain(inside) {
                    run(start, end, value);
                }
            }
            _ => {}
        }
        if at < range.end {
            let rest = LbaRange {
                start: at,
                end: range.end,
            };
            each(rest, None);
        }
    }

    /// All runs in order.
    pub fn iter(&self) -> impl Iterator<Item = (LbaRange, V)> {
        self.runs
            .iter()
            .map(|(&start, &(end, value))| (LbaRange { start, end }, value))
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the model has 64 sectors")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, PartialEq, Debug)]
    struct At(u64);

    impl Carried for At {
        fn skip(self, n: Sectors) -> Self {
            Self(self.0 + n.get())
        }
    }

    fn range(start: u64, len: u64) -> LbaRange {
        LbaRange {
            start: Lba::new(start),
            end: Lba::new(start + len),
        }
    }

    fn contents(map: &ExtentMap<At>) -> Vec<Option<u64>> {
        let mut out = Vec::new();
        map.visit(range(0, 64), |part, value| {
            for i in 0..part.len().get() {
                out.push(value.map(|At(v)| v + i));
            }
        });
        out
    }

    proptest! {
        #[test]
        fn random_inserts_and_removals_agree_with_an_array(
            ops in proptest::collection::vec((0u64..60, 1u64..20, 0u8..3), 1..60)
        ) {
            let mut map = ExtentMap::default();
            let mut model = vec![None; 64];
            for (n, (start, len, kind)) in ops.into_iter().enumerate() {
                let len = len.min(64 - start);
                let base = (n as u64 + 1) * 1000;
                match kind {
                    0 => {
                        map.remove(range(start, len));
                        for i in 0..len { model[(start + i) as usize] = None; }
                    }
                    1 => {
                        map.remove_where(range(start, len), |At(v)| v % 2000 < 1000);
                        let mut at = start;
                        // The predicate sees the value at the start of each part.
                        let mut before = Vec::new();
                        for i in 0..len { before.push(model[(start + i) as usize]); }
                        while at < start + len {
                            let i = (at - start) as usize;
                            if let Some(v) = before[i] {
                                let v: u64 = v;
                                let mut run = 1;
                                while i + run < before.len() && before[i + run] == Some(v + run as u64) { run += 1; }
                                if v % 2000 < 1000 {
                                    for k in 0..run { model[at as usize + k] = None; }
                                }
                                at += run as u64;
                            } else { at += 1; }
                        }
                    }
                    _ => {
                        map.insert(range(start, len), At(base));
                        for i in 0..len { model[(start + i) as usize] = Some(base + i); }
                    }
                }
                prop_assert_eq!(&contents(&map), &model);
                let is_clear = model[start as usize..(start + len) as usize].iter().all(Option::is_none);
                prop_assert_eq!(map.has_none_of(range(start, len)), is_clear);
            }
        }
    }

    #[test]
    fn removal_inside_one_run_leaves_both_ends() {
        let mut map = ExtentMap::default();
        map.insert(range(0, 10), At(100));
        map.remove(range(3, 2));
        assert_eq!(
            map.iter().collect::<Vec<_>>(),
            vec![(range(0, 3), At(100)), (range(5, 5), At(105))]
        );
    }
}
