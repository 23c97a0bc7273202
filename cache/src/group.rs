//! Groups of volumes that share the dirty budget: what each may take, and what is kept for it.
//!
//! Half of the budget is kept for the groups that have a writer, by weight, used or not; of the other half, and of all if
//! there is one group, gets who comes first. So a group whose data the store does not take cannot take the last of the
//! others', and one that is busy can have most while the others rest. With more groups than half of the budget has
//! segments, some have nothing that is kept for them.
//!
//! Owns: the groups' limits and counts. Does not own: who a group is, and who waits ([`crate::Cache`]).
//!
//! **Invariant:** what is kept for all groups together is no more than half of the budget.

use std::collections::BTreeMap;

/// The weight of a group of which nothing was said.
const WEIGHT_DEFAULT: u32 = 100;

/// The part of the budget that is kept for groups.
const KEPT_SHARE: u64 = 2;

/// What is said of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupLimits {
    /// Its part, beside others'.
    pub weight: u32,
    /// Most segments with data that the store lacks; none: no limit of its own. At least 1.
    pub dirty_max: Option<u32>,
}

impl Default for GroupLimits {
    fn default() -> Self {
        Self {
            weight: WEIGHT_DEFAULT,
            dirty_max: None,
        }
    }
}

#[derive(Clone, Copy, Default, Debug)]
struct Group {
    limits: GroupLimits,
    writers: u32,
    /// Segments that it has.
    dirty: u32,
    /// Segments that no other group may take from it.
    kept: u32,
}

impl Group {
    fn max(&self) -> u32 {
        self.limits.dirty_max.map_or(u32::MAX, |max| max.max(1))
    }

    /// What of its own is still to be had.
    const fn owed(&self) -> u32 {
        self.kept.saturating_sub(self.dirty)
    }
}

/// All groups that were named.
#[derive(Debug, Default)]
pub(crate) struct Groups(BTreeMap<u32, Group>);

impl Groups {
    pub(crate) fn set(&mut self, id: u32, limits: GroupLimits, dirty_max: u32) {
        self.0.entry(id).or_default().limits = limits;
        self.divide(dirty_max);
    }

    /// One more writer.
    pub(crate) fn join(&mut self, id: u32, dirty_max: u32) {
        self.0.entry(id).or_default().writers += 1;
        self.divide(dirty_max);
    }

    pub(crate) fn leave(&mut self, id: u32, dirty_max: u32) {
        let group = self.0.entry(id).or_default();
        group.writers = group.writers.checked_sub(1).expect("who leaves had joined");
        self.divide(dirty_max);
    }

    fn divide(&mut self, dirty_max: u32) {
        let active = self.0.values().filter(|group| group.writers > 0);
        let weights: u64 = active.map(|group| u64::from(group.limits.weight)).sum();
        let budget = u64::from(dirty_max) / KEPT_SHARE;
        for group in self.0.values_mut() {
            let weight = match group.writers {
                0 => 0,
                _ => u64::from(group.limits.weight),
            };
            let kept = (budget * weight).checked_div(weights).unwrap_or(0);
            group.kept = u32::try_from(kept).unwrap_or(u32::MAX).min(group.max());
        }
    }

    pub(crate) fn took(&mut self, id: u32) {
        self.0.entry(id).or_default().dirty += 1;
    }

    pub(crate) fn gave(&mut self, id: u32) {
        let group = self.0.entry(id).or_default();
        group.dirty = group.dirty.checked_sub(1).expect("what is given was taken");
    }

    pub(crate) fn dirty(&self, id: u32) -> u32 {
        self.0.get(&id).map_or(0, |group| group.dirty)
    }

    fn of(&self, id: u32) -> Group {
        self.0.get(&id).copied().unwrap_or_default()
    }

    /// Whether a volume of group `id` may take one of `left` segments when those before it in the line, of these
    /// groups, have taken what they may.
    pub(crate) fn may_take(
        &self,
        id: u32,
        mut left: u32,
        before: impl Iterator<Item = u32>,
    ) -> bool {
        let mut owed: u32 = self.0.values().map(Group::owed).sum();
        let mut taken: BTreeMap<u32, u32> = BTreeMap::new();
        let may = |id: u32, left: u32, owed: u32, taken: u32| {
            let mut group = self.of(id);
            group.dirty += taken;
            let may = left > owed - group.owed() && group.dirty < group.max();
            (may, group.owed().min(1))
        };
        for other in before {
            if left == 0 {
                return false;
            }
            let taken = taken.entry(other).or_default();
            let (may_take, of_its_own) = may(other, left, owed, *taken);
            if may_take {
                *taken += 1;
                left -= 1;
                owed -= of_its_own;
            }
        }
        may(id, left, owed, taken.get(&id).copied().unwrap_or(0)).0
    }

    /// Whether a segment that group `id` gives up can help somebody who waits.
    pub(crate) fn could_help(&self, id: u32, waiting: u32) -> bool {
        let (own, other) = (self.of(id), self.of(waiting));
        id == waiting || (own.dirty > own.kept && other.dirty < other.max())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes as many as it may of a budget, and answers how many.
    fn fill(groups: &mut Groups, id: u32, left: &mut u32) -> u32 {
        let mut count = 0;
        while groups.may_take(id, *left, std::iter::empty()) {
            groups.took(id);
            (*left, count) = (*left - 1, count + 1);
        }
        count
    }

    #[test]
    fn group_alone_may_take_all_and_its_own_limit_binds_it() {
        let (mut groups, mut left) = (Groups::default(), 32);
        groups.join(1, 32);
        assert_eq!(fill(&mut groups, 1, &mut left), 32);
        let (mut groups, mut left) = (Groups::default(), 32);
        let limits = GroupLimits {
            dirty_max: Some(5),
            ..GroupLimits::default()
        };
        groups.set(1, limits, 32);
        groups.join(1, 32);
        assert_eq!(fill(&mut groups, 1, &mut left), 5);
    }

    #[test]
    fn group_that_takes_all_it_may_leaves_the_others_what_is_kept_for_them() {
        let (mut groups, mut left) = (Groups::default(), 32);
        for (id, weight) in [(1, 100), (2, 100), (3, 200)] {
            let limits = GroupLimits {
                weight,
                dirty_max: None,
            };
            groups.set(id, limits, 32);
            groups.join(id, 32);
        }
        // A half is for all, a quarter and an eighth are the others'.
        assert_eq!(fill(&mut groups, 1, &mut left), 32 - 8 - 4);
        assert_eq!(fill(&mut groups, 2, &mut left), 4);
        assert_eq!(fill(&mut groups, 3, &mut left), 8);
        assert_eq!(left, 0);
        // What comes back to who has too much is nobody's own.
        groups.gave(1);
        assert_eq!(fill(&mut groups, 2, &mut 1), 1);
        groups.leave(3, 32);
        groups.leave(2, 32);
        assert_eq!(groups.of(1).kept, 16);
    }

    #[test]
    fn who_waits_behind_a_group_that_is_full_is_not_held_up_by_it() {
        let mut groups = Groups::default();
        let limits = GroupLimits {
            dirty_max: Some(1),
            ..GroupLimits::default()
        };
        groups.set(1, limits, 8);
        groups.join(1, 8);
        groups.join(2, 8);
        groups.took(1);
        assert!(!groups.may_take(1, 7, std::iter::empty()));
        assert!(groups.may_take(2, 1, [1, 1, 1].into_iter()));
        assert!(!groups.may_take(2, 1, [1, 2].into_iter()));
        assert!(groups.could_help(1, 1) && !groups.could_help(2, 1));
    }

    #[test]
    fn more_groups_than_segments_take_turns_and_nothing_is_kept() {
        let mut groups = Groups::default();
        (0..100).for_each(|id| groups.join(id, 8));
        assert_eq!(fill(&mut groups, 7, &mut 8), 8);
    }
}
