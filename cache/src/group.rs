//! Groups of volumes that share the cache: what each may take, and what is kept for it.
//!
//! *Dirty*: half of the budget is kept for the groups that have a writer, by weight, used or not. The other half is for who
//! comes first, but of it a group has no more than [`COMMON_RATIO`] times what is left (as switches share their memory among
//! ports, by dynamic thresholds: Choudhury and Hahne, 1998): so a group whose data the store does not take leaves a third to
//! those that come after it, beside what is kept for them, and one that is busy has two thirds while the others rest. A
//! group that is alone has all. With more groups than half of the budget has segments, some have nothing that is kept.
//!
//! *All else* is reclaimed from the groups that are most over their share, which is by weight among those with a volume
//! here, or what is reserved for them if that is more. Of a group no other takes what is reserved, and one that has all
//! that it may have takes from its own.
//!
//! Owns: the groups' limits and counts. Does not own: who a group is, and who waits ([`crate::Cache`]).
//!
//! **Invariants:** what is kept for all groups together is no more than half of the budget; and what is reserved for
//! those here leaves room for all that may be dirty: reservations that come to more are cut in proportion.

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
    /// Segments that no other group takes from it once it has them, while a volume of it is here; less where all
    /// reservations come to more than there is.
    pub reserve: u32,
    /// Most segments of all kinds; none: no limit of its own. At least 4.
    pub space_max: Option<u32>,
}

/// A writer has a segment open and the next one ready, a reader one that is being filled, and one is to be had.
pub(crate) const SPACE_MIN: u32 = 4;

impl Default for GroupLimits {
    fn default() -> Self {
        Self {
            weight: WEIGHT_DEFAULT,
            dirty_max: None,
            reserve: 0,
            space_max: None,
        }
    }
}

/// How much of what is nobody's own a group may have, for each part that is left of it.
const COMMON_RATIO: u32 = 2;

#[derive(Clone, Copy, Default, Debug)]
struct Group {
    limits: GroupLimits,
    writers: u32,
    readers: u32,
    /// Segments that it has with data that the store lacks.
    dirty: u32,
    /// All segments that it has.
    used: u32,
    /// Writes that the store lacks.
    unsent: usize,
    /// Segments of all kinds that are its part.
    share: u32,
    /// Dirty segments that no other group may take from it.
    kept: u32,
    /// Segments of all kinds that none may: of what is reserved, what there is for that.
    reserved: u32,
}

impl Group {
    fn max(&self) -> u32 {
        let dirty_max = self.limits.dirty_max.unwrap_or(u32::MAX).max(1);
        dirty_max.min(self.space_max())
    }

    fn space_max(&self) -> u32 {
        let max = self.limits.space_max;
        max.map_or(u32::MAX, |max| max.max(SPACE_MIN))
    }

    /// Its volumes here that take writes, or that do not.
    const fn volumes(&mut self, writes: bool) -> &mut u32 {
        if writes {
            &mut self.writers
        } else {
            &mut self.readers
        }
    }

    /// What of its own is still to be had.
    const fn owed(&self) -> u32 {
        self.kept.saturating_sub(self.dirty)
    }

    /// Whether one more of `left` segments would be its own, or its fair part of what is nobody's; `owed` are all groups'.
    /// Who has a part of its own that it did not take may take it, though there be less left than is owed to all: somebody
    /// took more before the others were here.
    const fn is_due(&self, left: u32, owed: u32, is_alone: bool) -> bool {
        let common = left.saturating_sub(owed);
        let over = self.dirty.saturating_sub(self.kept);
        self.owed() > 0 || (common > 0 && (is_alone || over < common * COMMON_RATIO))
    }
}

/// All groups that were named.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    groups: BTreeMap<u32, Group>,
    /// Segments that may be dirty.
    dirty_max: u32,
    /// All segments.
    total: u32,
}

impl Groups {
    pub(crate) fn new(dirty_max: u32, total: u32) -> Self {
        Self {
            groups: BTreeMap::new(),
            dirty_max,
            total,
        }
    }

    pub(crate) fn set(&mut self, id: u32, limits: GroupLimits) {
        self.entry(id).limits = limits;
        self.divide();
        self.forget_if_nothing(id);
    }

    /// One more volume, which takes writes or not.
    pub(crate) fn join(&mut self, id: u32, writes: bool) {
        *self.entry(id).volumes(writes) += 1;
        self.divide();
    }

    pub(crate) fn leave(&mut self, id: u32, writes: bool) {
        let count = self.entry(id).volumes(writes);
        *count = count.checked_sub(1).expect("who leaves had joined");
        self.divide();
        self.forget_if_nothing(id);
    }

    /// A group of which nothing is said and nothing is here is as one that was never named.
    fn forget_if_nothing(&mut self, id: u32) {
        let is_nothing = |group: &Group| {
            group.limits == GroupLimits::default()
                && [group.writers, group.readers, group.dirty, group.used] == [0; 4]
                && group.unsent == 0
        };
        if self.groups.get(&id).is_some_and(is_nothing) {
            self.groups.remove(&id);
        }
    }

    fn entry(&mut self, id: u32) -> &mut Group {
        self.groups.entry(id).or_default()
    }

    fn divide(&mut self) {
        let (mut writing, mut here) = (0, 0);
        for group in self.groups.values() {
            let weight = u64::from(group.limits.weight);
            writing += weight * u64::from(group.writers > 0);
            here += weight * u64::from(group.writers + group.readers > 0);
        }
        // What all may have unsent is nobody's to reserve, else who writes would wait for what nobody gives.
        let reservable = u64::from(self.total.saturating_sub(self.dirty_max + SPACE_MIN));
        let wanted = |group: &Group| {
            let is_here = group.writers + group.readers > 0;
            u64::from(group.limits.reserve) * u64::from(is_here)
        };
        let wanted_by_all: u64 = self.groups.values().map(wanted).sum();
        let part = |budget: u64, is_there: bool, weight: u32, weights: u64| {
            let weight = u64::from(weight) * u64::from(is_there);
            let part = (budget * weight).checked_div(weights).unwrap_or(0);
            u32::try_from(part).unwrap_or(u32::MAX)
        };
        let budget = u64::from(self.dirty_max) / KEPT_SHARE;
        for group in self.groups.values_mut() {
            let weight = group.limits.weight;
            group.kept = part(budget, group.writers > 0, weight, writing).min(group.max());
            let is_here = group.writers + group.readers > 0;
            let share = part(self.total.into(), is_here, weight, here);
            let reserved = match wanted(group) {
                all if wanted_by_all <= reservable => all,
                some => some * reservable / wanted_by_all,
            };
            group.reserved = u32::try_from(reserved).unwrap_or(u32::MAX);
            group.share = share.max(group.reserved).min(group.space_max());
        }
    }

    /// The group takes a segment, for unsent data or not.
    pub(crate) fn took(&mut self, id: u32, is_dirty: bool) {
        let group = self.entry(id);
        group.used += 1;
        group.dirty += u32::from(is_dirty);
    }

    /// So many more writes of the group are there that the store lacks.
    pub(crate) fn note_unsent(&mut self, id: u32, writes: usize) {
        self.entry(id).unsent += writes;
    }

    /// The store has so many of them, or nobody here knows them any more.
    pub(crate) fn forget_unsent(&mut self, id: u32, writes: usize) {
        let group = self.entry(id);
        let left = group.unsent.checked_sub(writes);
        group.unsent = left.expect("what is sent was noted");
        self.forget_if_nothing(id);
    }

    pub(crate) fn unsent_of(&self, id: u32) -> usize {
        self.of(id).unsent
    }

    /// A dirty segment of the group is clean.
    pub(crate) fn cleaned(&mut self, id: u32) {
        let group = self.entry(id);
        group.dirty = group.dirty.checked_sub(1).expect("what is clean was dirty");
    }

    /// The group gives back a clean segment.
    pub(crate) fn gave(&mut self, id: u32) {
        let group = self.entry(id);
        group.used = group.used.checked_sub(1).expect("what is given was taken");
        self.forget_if_nothing(id);
    }

    /// Whether a group has all the segments that it may have.
    pub(crate) fn is_full(&self, id: u32) -> bool {
        let group = self.of(id);
        group.used >= group.space_max()
    }

    /// Of these groups, those from which a segment may be taken for group `id`, first who is most over its share.
    pub(crate) fn most_over(&self, id: u32, of: impl Iterator<Item = u32>) -> Vec<u32> {
        let may = |other: &u32| {
            let group = self.of(*other);
            *other == id || group.reserved == 0 || group.used > group.reserved
        };
        let mut all: Vec<u32> = of.filter(may).collect();
        all.sort_by_key(|other| {
            let group = self.of(*other);
            std::cmp::Reverse(i64::from(group.used) - i64::from(group.share))
        });
        all
    }

    pub(crate) fn used(&self, id: u32) -> u32 {
        self.of(id).used
    }

    pub(crate) fn dirty(&self, id: u32) -> u32 {
        self.of(id).dirty
    }

    fn of(&self, id: u32) -> Group {
        self.groups.get(&id).copied().unwrap_or_default()
    }

    /// Whether a volume of group `id` may take one of `left` segments when those before it in the line, of these
    /// groups, have taken what they may.
    pub(crate) fn may_take(
        &self,
        id: u32,
        mut left: u32,
        before: impl Iterator<Item = u32>,
    ) -> bool {
        let mut owed: u32 = self.groups.values().map(Group::owed).sum();
        let mut taken: BTreeMap<u32, u32> = BTreeMap::new();
        let is_alone = self.is_alone();
        let may = |id: u32, left: u32, owed: u32, taken: u32| {
            let mut group = self.of(id);
            group.dirty += taken;
            let may = left > 0 && group.dirty < group.max() && group.is_due(left, owed, is_alone);
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

    /// Whether a segment that group `id` gives up can help somebody who waits while `left` are to be had.
    pub(crate) fn could_help(&self, id: u32, waiting: u32, left: u32) -> bool {
        let (own, other) = (self.of(id), self.of(waiting));
        let owed = self.groups.values().map(Group::owed).sum();
        let would_do = || other.is_due(left + 1, owed, self.is_alone());
        id == waiting || (own.dirty > own.kept && other.dirty < other.max() && would_do())
    }

    fn is_alone(&self) -> bool {
        let mut writing = self.groups.values().filter(|group| group.writers > 0);
        writing.nth(1).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes as many as it may of a budget, and answers how many.
    fn fill(groups: &mut Groups, id: u32, left: &mut u32) -> u32 {
        let mut count = 0;
        while groups.may_take(id, *left, std::iter::empty()) {
            groups.took(id, true);
            (*left, count) = (*left - 1, count + 1);
        }
        count
    }

    #[test]
    fn group_alone_may_take_all_and_its_own_limit_binds_it() {
        let (mut groups, mut left) = (Groups::new(32, 64), 32);
        groups.join(1, true);
        assert_eq!(fill(&mut groups, 1, &mut left), 32);
        let (mut groups, mut left) = (Groups::new(32, 64), 32);
        let limits = GroupLimits {
            dirty_max: Some(5),
            ..GroupLimits::default()
        };
        groups.set(1, limits);
        groups.join(1, true);
        assert_eq!(fill(&mut groups, 1, &mut left), 5);
    }

    #[test]
    fn group_that_takes_all_it_may_leaves_the_others_what_is_kept_for_them() {
        let (mut groups, mut left) = (Groups::new(32, 64), 32);
        for (id, weight) in [(1, 100), (2, 100), (3, 200)] {
            let limits = GroupLimits {
                weight,
                ..GroupLimits::default()
            };
            groups.set(id, limits);
            groups.join(id, true);
        }
        // Its own eighth, and two thirds of the half that is nobody's.
        assert_eq!(fill(&mut groups, 1, &mut left), 4 + 11);
        // And the same of the five that are left of that, and of the one that is left then.
        assert_eq!(fill(&mut groups, 2, &mut left), 4 + 4);
        assert_eq!(fill(&mut groups, 3, &mut left), 8 + 1);
        assert_eq!(left, 0);
        // What comes back to who has too much is nobody's own.
        groups.cleaned(1);
        assert_eq!(fill(&mut groups, 3, &mut 1), 1);
        groups.leave(3, true);
        groups.leave(2, true);
        assert_eq!(groups.of(1).kept, 16);
    }

    #[test]
    fn who_waits_behind_a_group_that_is_full_is_not_held_up_by_it() {
        let mut groups = Groups::new(8, 16);
        let limits = GroupLimits {
            dirty_max: Some(1),
            ..GroupLimits::default()
        };
        groups.set(1, limits);
        groups.join(1, true);
        groups.join(2, true);
        groups.took(1, true);
        assert!(!groups.may_take(1, 7, std::iter::empty()));
        assert!(groups.may_take(2, 1, [1, 1, 1].into_iter()));
        assert!(!groups.may_take(2, 1, [1, 2].into_iter()));
        assert!(groups.could_help(1, 1, 7) && !groups.could_help(2, 1, 7));
    }

    #[test]
    fn reclaim_takes_from_who_is_most_over_its_share_and_never_what_is_reserved() {
        let mut groups = Groups::new(6, 16);
        let limits = |reserve, space_max| GroupLimits {
            reserve,
            space_max,
            ..GroupLimits::default()
        };
        groups.set(1, limits(6, None));
        groups.set(2, limits(0, Some(5)));
        (1..4).for_each(|id| groups.join(id, false));
        for (id, used) in [(1, 6), (2, 4), (3, 6)] {
            (0..used).for_each(|_| groups.took(id, false));
        }
        // A third of 16, or what is reserved.
        assert_eq!(groups.most_over(2, 1..4), [3, 2]);
        assert_eq!(groups.most_over(1, 1..4), [3, 1, 2]);
        assert!(!groups.is_full(2));
        groups.took(2, false);
        assert!(groups.is_full(2) && !groups.is_full(3));
        // Nobody of it is here any more: it has no share.
        groups.leave(2, false);
        assert_eq!(groups.most_over(3, 1..4)[0], 2);
    }

    #[test]
    fn reservations_of_more_than_there_is_leave_what_may_be_dirty_to_all() {
        let mut groups = Groups::new(8, 16);
        let reserve = |reserve| GroupLimits {
            reserve,
            ..GroupLimits::default()
        };
        groups.set(1, reserve(u32::MAX));
        groups.set(2, reserve(1000));
        // Of who is not here nothing is reserved.
        groups.set(4, reserve(1000));
        (1..4).for_each(|id| groups.join(id, true));
        (0..16).for_each(|_| groups.took(1, false));
        let mut left = 0;
        while groups.most_over(3, 1..2) == [1] {
            groups.gave(1);
            left += 1;
        }
        assert!(left >= 8, "{left} of 8 that may be dirty");
        // And what no tenant has any more is nobody's.
        groups.set(1, GroupLimits::default());
        assert_eq!(groups.most_over(3, 1..2), [1]);
    }

    #[test]
    fn group_that_took_more_before_the_others_came_does_not_keep_them_from_their_own() {
        let (mut groups, mut left) = (Groups::new(100, 200), 100);
        groups.join(1, true);
        (0..65).for_each(|_| groups.took(1, true));
        left -= 65;
        (2..12).for_each(|id| groups.join(id, true));
        // 4 are kept for each, more than are left for all.
        for id in 2..10 {
            assert_eq!(fill(&mut groups, id, &mut left), 4, "{id}");
        }
        assert_eq!(left, 3);
        assert!(!groups.may_take(1, left, std::iter::empty()));
    }

    #[test]
    fn segment_given_up_helps_nobody_who_has_more_than_its_part() {
        let (mut groups, mut left) = (Groups::new(64, 128), 64);
        (1..3).for_each(|id| groups.join(id, true));
        let hung = fill(&mut groups, 1, &mut left);
        fill(&mut groups, 2, &mut left);
        assert!(groups.of(2).dirty > groups.of(2).kept);
        assert!(!groups.could_help(2, 1, left));
        (0..hung - 1).for_each(|_| groups.cleaned(1));
        assert!(groups.could_help(2, 1, left));
    }

    #[test]
    fn group_of_which_nothing_is_left_is_forgotten() {
        let mut groups = Groups::new(8, 16);
        for id in 0..1000 {
            let weight = 7;
            groups.set(
                id,
                GroupLimits {
                    weight,
                    ..GroupLimits::default()
                },
            );
            groups.join(id, true);
            groups.took(id, true);
            groups.cleaned(id);
            groups.leave(id, true);
            groups.set(id, GroupLimits::default());
            groups.gave(id);
        }
        assert!(groups.groups.is_empty());
    }

    #[test]
    fn more_groups_than_segments_take_turns_and_nothing_is_kept() {
        let mut groups = Groups::new(8, 16);
        (0..100).for_each(|id| groups.join(id, true));
        assert_eq!(fill(&mut groups, 7, &mut 8), 6);
        assert_eq!(fill(&mut groups, 8, &mut 2), 2);
    }
}
