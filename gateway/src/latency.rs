//! How long requests took: histograms of plain integers, kept by who answers the requests.
//!
//! A time falls into one of [`BUCKETS`] buckets, four to an octave of microseconds, so that a quantile is known to 25 %
//! from a microsecond to a minute. [`BOUNDS_US`] are those bounds among them that Prometheus is shown: few, for each is a
//! series, and exact, for they are bounds of buckets.
//!
//! **Invariant:** recording takes no lock, no clock and, but for the first time of a kind, no memory.

use quarry_volume::Op;

/// Four buckets of a microsecond each, and then four to each octave until 2^26 us, which is 67 s.
const BUCKETS: usize = 4 + 4 * 24;

/// The largest time of each bucket that is shown, in microseconds, and a last one without bound: fine where devices and stores are.
pub const BOUNDS_US: [u64; 14] = [
    32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 65_536, 262_144, 1_048_576,
    33_554_432,
];

/// What was done in the time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Timed {
    /// A read of what the cache had, or of holes.
    ReadHit,
    /// A read that waited for the store.
    ReadMiss,
    /// A write; one with FUA waits for its flush too.
    Write,
    /// A flush.
    Flush,
    /// Waiting for a limit of the volume or its tenant, whatever came then: not part of the others.
    Held,
}

impl Timed {
    /// Those of requests, in the order of their declaration.
    pub const REQUESTS: [Self; 4] = [Self::ReadHit, Self::ReadMiss, Self::Write, Self::Flush];

    /// Its name, as in a metric's label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ReadHit => "read_hit",
            Self::ReadMiss => "read_miss",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Held => "held",
        }
    }

    /// What a request is until more is known of it; `None`: nobody asks how long it takes.
    #[must_use]
    pub const fn of(op: Op) -> Option<Self> {
        match op {
            Op::Read => Some(Self::ReadHit),
            Op::Write { .. } => Some(Self::Write),
            Op::Flush => Some(Self::Flush),
            Op::Discard | Op::WriteZeroes { .. } | Op::Status => None,
        }
    }
}

/// Times of one kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Histogram {
    counts: [u64; BUCKETS],
    sum_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: [0; BUCKETS],
            sum_ns: 0,
        }
    }
}

/// The bucket of a time: its largest one is in it, as Prometheus has it.
const fn bucket_of(ns: u64) -> usize {
    let us = ns.saturating_sub(1) / 1000;
    if us < 4 {
        return us as usize;
    }
    let octave = us.ilog2() as usize;
    let bucket = 4 * (octave - 1) + ((us >> (octave - 2)) & 3) as usize;
    if bucket < BUCKETS {
        bucket
    } else {
        BUCKETS - 1
    }
}

/// How many buckets hold no time above a bound.
const fn buckets_below(bound_us: u64) -> usize {
    bucket_of(bound_us * 1000) + 1
}

const SHOWN: [usize; BOUNDS_US.len()] = {
    let (mut shown, mut n) = ([0; BOUNDS_US.len()], 0);
    while n < shown.len() {
        shown[n] = buckets_below(BOUNDS_US[n]);
        // A bound inside of a bucket would say something that nobody knows.
        assert!(bucket_of(BOUNDS_US[n] * 1000 + 1) == shown[n] && shown[n] < BUCKETS);
        n += 1;
    }
    shown
};

impl Histogram {
    /// One more took so long, in nanoseconds.
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket_of(ns)] += 1;
        self.sum_ns = self.sum_ns.wrapping_add(ns);
    }

    /// How many took no longer than each of [`BOUNDS_US`].
    #[must_use]
    pub fn cumulative(&self) -> [u64; BOUNDS_US.len()] {
        let (mut from, mut sum) = (0, 0);
        SHOWN.map(|upto| {
            sum += self.counts[from..upto].iter().sum::<u64>();
            from = upto;
            sum
        })
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How long all took together, in nanoseconds.
    #[must_use]
    pub const fn sum_ns(&self) -> u64 {
        self.sum_ns
    }
}

/// What a volume's requests took, by what they were.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Latencies([Option<Box<Histogram>>; 5]);

impl Latencies {
    /// One more took so long, in nanoseconds.
    pub fn record(&mut self, what: Timed, ns: u64) {
        self.0[what as usize].get_or_insert_default().record(ns);
    }

    /// Those of a kind; none: there was none.
    #[must_use]
    pub fn of(&self, what: Timed) -> Option<&Histogram> {
        self.0[what as usize].as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_the_order_of_times_and_no_wider_than_a_quarter() {
        let mut before = 0;
        let (mut least, mut ns) = (1, 1);
        while ns < 67_000_000_000 {
            let bucket = bucket_of(ns);
            assert!(bucket == before || bucket == before + 1, "{ns}");
            if bucket > before {
                (before, least) = (bucket, ns);
            }
            assert!(
                ns - least < 1000.max(least / 4 + 1000),
                "{ns} is beside {least}"
            );
            ns += 1.max(ns / 300);
        }
        assert_eq!(before, BUCKETS - 1);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket_of(0), 0);
    }

    #[test]
    fn time_counts_below_its_own_bound_and_not_a_nanosecond_later() {
        for (n, bound) in BOUNDS_US.into_iter().enumerate() {
            let mut histogram = Histogram::default();
            histogram.record(bound * 1000);
            histogram.record(bound * 1000 + 1);
            let below = histogram.cumulative();
            assert_eq!(below[n], 1, "{bound} us");
            assert_eq!(below[n + 1..].first().copied().unwrap_or(2), 2);
            assert_eq!(
                (histogram.count(), histogram.sum_ns()),
                (2, bound * 2000 + 1)
            );
        }
    }

    #[test]
    fn kinds_are_counted_apart_and_what_never_happened_is_not_there() {
        let mut latencies = Latencies::default();
        latencies.record(Timed::Write, 5_000);
        latencies.record(Timed::Held, 7_000);
        assert_eq!(latencies.of(Timed::Write).unwrap().sum_ns(), 5_000);
        assert_eq!(latencies.of(Timed::Held).unwrap().count(), 1);
        assert!(
            Timed::REQUESTS[..2]
                .iter()
                .all(|t| latencies.of(*t).is_none())
        );
    }
}
