//! What is wrong, and which parts of the volume are hit: all of it counted, a bounded part listed.

use std::collections::BTreeMap;
use std::sync::Arc;

use quarry_objfmt::Sectors;

use super::{Progress, add};
use crate::control::{ByteRange, Finding, VerifyReport};

/// Findings listed.
pub(super) const FINDINGS_MAX: usize = 100;
/// Ranges listed with one finding.
const FINDING_RANGES_MAX: usize = 64;
/// Ranges listed of the volume.
const RANGES_MAX: usize = 4096;

/// Disjoint ranges of sectors, merged; those past a bound are counted.
#[derive(Debug, Default)]
struct Ranges {
    /// By their starts, their ends.
    listed: BTreeMap<u64, u64>,
    left_out: u64,
}

impl Ranges {
    fn insert(&mut self, mut start: u64, mut end: u64, max: usize) {
        // All that touch the new one, the last first.
        while let Some((&s, &e)) = self.listed.range(..=end).next_back()
            && e >= start
        {
            (start, end) = (start.min(s), end.max(e));
            self.listed.remove(&s);
        }
        if self.listed.len() < max {
            self.listed.insert(start, end);
        } else {
            self.left_out += 1;
        }
    }

    fn bytes(&self) -> Vec<ByteRange> {
        let bytes = |sectors: u64| Sectors::new(sectors).bytes();
        let listed = self.listed.iter();
        listed
            .map(|(start, end)| ByteRange {
                start: bytes(*start),
                end: bytes(*end),
            })
            .collect()
    }
}

struct Listed {
    object: String,
    problem: String,
    ranges: Ranges,
}

/// What was found.
pub(super) struct Findings {
    listed: Vec<Listed>,
    total: u64,
    unreadable: Ranges,
    unreadable_sectors: u64,
    /// All of the volume is hit already.
    whole: bool,
    progress: Arc<Progress>,
}

impl Findings {
    pub fn new(progress: Arc<Progress>) -> Self {
        Self {
            listed: Vec::new(),
            total: 0,
            unreadable: Ranges::default(),
            unreadable_sectors: 0,
            whole: false,
            progress,
        }
    }

    /// Notes what is wrong with an object, and answers the finding's number.
    pub fn add(&mut self, object: &str, problem: impl Into<String>) -> u64 {
        add(&self.progress.findings, 1);
        if self.listed.len() < FINDINGS_MAX {
            self.listed.push(Listed {
                object: object.to_owned(),
                problem: problem.into(),
                ranges: Ranges::default(),
            });
        }
        self.total += 1;
        self.total - 1
    }

    /// Notes sectors that cannot be read for a finding. No sector is hit twice, but by
    /// [`Findings::hit_all`].
    pub fn hit(&mut self, finding: u64, start: u64, len: u64) {
        let listed = usize::try_from(finding).ok();
        if let Some(listed) = listed.and_then(|at| self.listed.get_mut(at)) {
            let ranges = &mut listed.ranges;
            ranges.insert(start, start + len, FINDING_RANGES_MAX);
        }
        if !self.whole {
            self.unreadable.insert(start, start + len, RANGES_MAX);
            self.unreadable_sectors += len;
        }
    }

    /// Notes that for a finding the volume cannot be attached, and so no sector be read.
    pub fn hit_all(&mut self, finding: u64, (start, len): (u64, u64)) {
        self.unreadable = Ranges::default();
        self.unreadable_sectors = 0;
        self.whole = false;
        self.hit(finding, start, len);
        self.whole = true;
    }

    /// Whether so many were found that more are not listed.
    pub fn is_full(&self) -> bool {
        self.listed.len() == FINDINGS_MAX
    }

    /// Puts it all into a report, by object.
    pub fn tell(mut self, report: &mut VerifyReport) {
        self.listed.sort_by(|a, b| a.object.cmp(&b.object));
        report.findings_left_out = self.total - self.listed.len() as u64;
        report.findings = self
            .listed
            .into_iter()
            .map(|listed| Finding {
                object: listed.object,
                problem: listed.problem,
                ranges: listed.ranges.bytes(),
                ranges_left_out: listed.ranges.left_out,
            })
            .collect();
        report.unreadable = self.unreadable.bytes();
        report.unreadable_left_out = self.unreadable.left_out;
        report.unreadable_bytes = Sectors::new(self.unreadable_sectors).bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one_and_those_past_the_bound_are_counted() {
        let mut ranges = Ranges::default();
        for (start, end) in [(8, 16), (32, 40), (0, 4), (16, 32), (3, 5), (100, 101)] {
            ranges.insert(start, end, 3);
        }
        assert_eq!(
            ranges.listed.iter().collect::<Vec<_>>(),
            [(&0, &5), (&8, &40), (&100, &101)]
        );
        ranges.insert(60, 61, 3);
        assert_eq!((ranges.listed.len(), ranges.left_out), (3, 1));
    }

    #[test]
    fn volume_hit_as_a_whole_is_counted_once() {
        let mut findings = Findings::new(Arc::default());
        let part = findings.add("a", "part");
        findings.hit(part, 8, 8);
        let all = findings.add("b", "all");
        findings.hit_all(all, (0, 100));
        findings.hit(part, 32, 8);
        let mut report = VerifyReport::default();
        findings.tell(&mut report);
        assert_eq!(report.unreadable_bytes, 51_200);
        assert_eq!(report.unreadable.len(), 1);
        assert_eq!(report.findings[0].ranges.len(), 2);
    }

    #[test]
    fn finding_past_the_bound_is_counted_and_its_ranges_too() {
        let mut findings = Findings::new(Arc::default());
        for n in 0..FINDINGS_MAX as u64 + 2 {
            let finding = findings.add("a", "wrong");
            findings.hit(finding, n * 8, 1);
        }
        let mut report = VerifyReport::default();
        findings.tell(&mut report);
        assert_eq!((report.findings.len(), report.findings_left_out), (100, 2));
        assert_eq!(report.unreadable.len(), 102);
    }
}
