//! Large writes that stay in memory until their chunk is made, which then need not be read back from the cache device: that is
//! half of what the device does while writes go through it to the store.
//!
//! Owns: which bytes of the cache device are in memory too. Does not own: whose they are, and what the store has of them.
//!
//! **Invariant:** what is found for a place is what was last written there. A write comes here in the step in which it has
//! arrived on the device and is answered, which is before anybody sends it and so before its segment can be free; only
//! those come that are whole in one place, for of others a part may have been sent long before the last has a place. And
//! a segment that is begun anew ([`KeptWrites::begin`]) takes all that was kept of it along, before anything else is written there.

use std::collections::BTreeMap;
use std::iter::once;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use quarry_cache::{Geometry, Mutation};

/// How long a request at least is whose data are kept, in bytes: a shorter one's are read back with its neighbours', hundreds
/// at once.
const REQUEST_BYTES_MIN: u32 = 64 << 10;

/// How much may be kept, in bytes: as much as a volume at its fastest has in the chunk that is gathered and in those that are
/// being made, of 8 MiB each. Buffers are powers of two, so the memory of it is twice as much at most.
pub const KEPT_WRITE_BYTES_MAX: usize = 64 << 20;

/// What is older is dropped: its chunk waits for the store, which is then what all wait for; or there is none, for it was
/// written over. What is younger does not make room for what comes, which would always drive out what is next to be used.
pub const KEPT_WRITE_AGE_MAX: Duration = Duration::from_secs(2);

/// See the module's words. [`KeptWrites::default`] keeps none.
#[derive(Default, Debug)]
pub struct KeptWrites {
    /// Where segments begin.
    geometry: Option<Geometry>,
    bytes_max: usize,
    age_max: Duration,
    kept: Mutex<Kept>,
}

#[derive(Default, Debug)]
struct Kept {
    /// By the byte of the device where it begins: its number, and what it is.
    places: BTreeMap<u64, (u64, Bytes)>,
    /// By their numbers, in the order in which they came: where they begin, and when they came.
    numbers: BTreeMap<u64, (u64, Instant)>,
    next_number: u64,
    bytes: usize,
    used_bytes: u64,
}

impl Kept {
    /// Where one begins that any of these bytes of the device are of.
    fn any_of(&self, run: &Range<u64>) -> Option<u64> {
        let (at, (_, data)) = self.places.range(..run.end).next_back()?;
        (at + data.len() as u64 > run.start).then_some(*at)
    }

    /// Drops what begins at this byte of the device.
    fn drop_at(&mut self, at: u64) -> Option<Bytes> {
        let (number, data) = self.places.remove(&at)?;
        self.numbers.remove(&number);
        self.bytes -= data.len();
        Some(data)
    }
}

/// Bytes of the device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
    /// They are kept.
    Kept {
        /// The first of them.
        at: u64,
        /// What they are.
        data: Bytes,
    },
    /// These are not.
    Missing(Range<u64>),
}

/// What is kept, and what that was good for.
#[derive(Clone, Copy, Default, Debug)]
pub struct KeptWriteStats {
    /// Bytes kept.
    pub bytes: u64,
    /// Bytes of chunks that were made of what was kept.
    pub used_bytes: u64,
}

impl KeptWrites {
    /// Keeps up to `bytes_max` bytes of what is written to a device of this shape; what is older than `age_max` makes room.
    #[must_use]
    pub fn new(geometry: Geometry, bytes_max: usize, age_max: Duration) -> Self {
        Self {
            geometry: Some(geometry),
            bytes_max,
            age_max,
            kept: Mutex::default(),
        }
    }

    /// Whether the data of a request of so many bytes are kept.
    #[must_use]
    pub fn wants(&self, len: u32) -> bool {
        self.bytes_max > 0 && len >= REQUEST_BYTES_MIN
    }

    /// Keeps `data`, which were written at this byte of the device just now, if there is room.
    pub fn keep(&self, at: u64, data: Bytes) {
        // Given back when the lock is: freeing memory takes long.
        let mut dropped = Vec::new();
        let now = Instant::now();
        let mut kept = self.kept.lock();
        let run = at..at + data.len() as u64;
        while let Some(stale) = kept.any_of(&run) {
            dropped.extend(kept.drop_at(stale));
        }
        while let Some((_, (oldest, since))) = kept.numbers.first_key_value()
            && kept.bytes + data.len() > self.bytes_max
            && now.duration_since(*since) >= self.age_max
        {
            let oldest = *oldest;
            dropped.extend(kept.drop_at(oldest));
        }
        if kept.bytes + data.len() <= self.bytes_max {
            let number = kept.next_number;
            kept.next_number += 1;
            kept.bytes += data.len();
            kept.numbers.insert(number, (at, now));
            kept.places.insert(at, (number, data));
        }
    }

    /// These runs of the device's bytes, one after the other, in parts that are kept and parts that are not; of the latter those
    /// that are neighbours on the device are one.
    #[must_use]
    pub fn find(&self, runs: impl Iterator<Item = Range<u64>>) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let lacks = |parts: &mut Vec<Part>, run: Range<u64>| match parts.last_mut() {
            _ if run.is_empty() => {}
            Some(Part::Missing(before)) if before.end == run.start => before.end = run.end,
            _ => parts.push(Part::Missing(run)),
        };
        for run in runs {
            // Anew for each, for there may be thousands, and reactors wait for it.
            let mut kept = self.kept.lock();
            let kept = &mut *kept;
            let before = kept.places.range(..=run.start).next_back();
            let from = before.map_or(run.start, |(at, _)| *at);
            let mut next = run.start;
            for (at, (_, data)) in kept.places.range(from..run.end) {
                let end = run.end.min(at + data.len() as u64);
                if end <= next {
                    continue;
                }
                lacks(&mut parts, next..*at);
                next = next.max(*at);
                let inside = |byte: u64| usize::try_from(byte - at).expect("inside of the data");
                let data = data.slice(inside(next)..inside(end));
                kept.used_bytes += data.len() as u64;
                parts.push(Part::Kept { at: next, data });
                next = end;
            }
            lacks(&mut parts, next..run.end);
        }
        parts
    }

    /// Drops the writes that any of these runs of the device's bytes are of.
    pub fn forget(&self, runs: impl Iterator<Item = Range<u64>>) {
        for run in runs {
            let mut dropped = Vec::new();
            let mut kept = self.kept.lock();
            while let Some(at) = kept.any_of(&run) {
                dropped.extend(kept.drop_at(at));
            }
        }
    }

    /// The segment whose header is to be written at this byte of the device, if one is, is begun anew.
    pub fn begin(&self, header: u64) {
        let Some(geometry) = self.geometry else {
            return;
        };
        if let Some(begin) = geometry.segment_of_header(header)
            && !Mutation::KeptWritesOfBefore.is_on()
        {
            self.forget(once(begin..begin + u64::from(geometry.segment_size)));
        }
    }

    /// What is kept.
    #[must_use]
    pub fn stats(&self) -> KeptWriteStats {
        let kept = self.kept.lock();
        KeptWriteStats {
            bytes: kept.bytes as u64,
            used_bytes: kept.used_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGE_MAX: Duration = KEPT_WRITE_AGE_MAX;
    const GEOMETRY: Geometry = Geometry {
        data_start: 1 << 20,
        segment_size: 1 << 20,
        segments: 4,
    };

    fn data(byte: u8, len: usize) -> Bytes {
        Bytes::from(vec![byte; len])
    }

    /// Whether all of these bytes are kept.
    fn has(kept: &KeptWrites, at: u64, len: u64) -> bool {
        matches!(kept.find(once(at..at + len))[..], [Part::Kept { .. }])
    }

    #[test]
    fn bytes_are_found_in_parts_of_the_writes_that_they_are_of() {
        let kept = KeptWrites::new(GEOMETRY, 1 << 20, AGE_MAX);
        let find = |run: Range<u64>| kept.find(once(run));
        let missing = |run: Range<u64>| vec![Part::Missing(run)];
        assert_eq!(find(0..512), missing(0..512));
        kept.keep(4096, data(1, 8192));
        kept.keep(12_288, data(2, 4096));
        kept.keep(20_480, data(3, 4096));
        let of = |at, byte, len| Part::Kept {
            at,
            data: data(byte, len),
        };
        assert_eq!(find(4096..12_288), [of(4096, 1, 8192)]);
        assert_eq!(find(8192..8704), [of(8192, 1, 512)]);
        assert_eq!(find(8192..13_312), [of(8192, 1, 4096), of(12_288, 2, 1024)]);
        assert_eq!(find(0..512), missing(0..512));
        assert_eq!(find(16_384..20_480), missing(16_384..20_480));
        assert_eq!(find(24_576..30_000), missing(24_576..30_000));
        let parts = [
            Part::Missing(512..4096),
            of(4096, 1, 8192),
            of(12_288, 2, 4096),
            Part::Missing(16_384..20_480),
            of(20_480, 3, 4096),
            Part::Missing(24_576..30_000),
        ];
        // Neighbours on the device, and one that is none.
        let runs = [512..16_384, 16_384..24_577, 24_577..30_000];
        assert_eq!(kept.find(runs.into_iter()), parts);
        let runs = [512..1024, 2048..4096];
        assert_eq!(kept.find(runs.into_iter()).len(), 2);
        let used = 8192 + 512 + 4096 + 1024 + 16_384;
        assert_eq!(kept.stats().used_bytes, used);
    }

    #[test]
    fn old_ones_alone_make_room_and_what_is_forgotten_takes_none() {
        let kept = KeptWrites::new(GEOMETRY, 3 * 4096, AGE_MAX);
        let there = || (0..5).map(|n| has(&kept, n * 4096, 1));
        for n in 0..4 {
            kept.keep(n * 4096, data(1, 4096));
        }
        assert!(there().eq([true, true, true, false, false]));
        for (at, since) in kept.kept.lock().numbers.values_mut() {
            *since -= AGE_MAX * u32::from(*at == 0);
        }
        kept.keep(3 * 4096, data(1, 4096));
        kept.keep(4 * 4096, data(1, 4096));
        assert!(there().eq([false, true, true, true, false]));
        // Of the third a byte, and all of the fourth.
        kept.forget(once(3 * 4096 - 1..4 * 4096));
        assert!(there().eq([false, true, false, false, false]));
        assert_eq!(kept.stats().bytes, 4096);
        // Anew, and longer.
        kept.keep(4096, data(2, 8192));
        assert_eq!(
            kept.find(once(4096..12_288)),
            [Part::Kept {
                at: 4096,
                data: data(2, 8192)
            }]
        );
        assert_eq!(kept.stats().bytes, 8192);
        kept.keep(5 * 4096, data(3, 4 * 4096));
        assert!(!has(&kept, 5 * 4096, 1), "more than there is room for");
        kept.forget(once(0..u64::MAX));
        let inner = kept.kept.lock();
        assert!(inner.places.is_empty() && inner.numbers.is_empty());
    }

    #[test]
    fn segment_that_is_begun_anew_takes_what_was_kept_of_it_along() {
        let kept = KeptWrites::new(GEOMETRY, 1 << 20, AGE_MAX);
        for segment in 1..=3_u64 {
            kept.keep(segment << 20, data(1, 4096));
            kept.keep((segment << 20) + 65_536, data(1, 4096));
        }
        // The second's header; then a page before it, which is no header.
        kept.begin((3 << 20) - 4096);
        kept.begin((2 << 20) - 8192);
        let found = |segment: u64| has(&kept, (segment << 20) + 65_536, 4096);
        assert!((1..=3).map(found).eq([true, false, true]));
    }

    #[test]
    fn short_requests_are_not_kept_and_without_room_none() {
        let kept = KeptWrites::new(GEOMETRY, 1 << 20, AGE_MAX);
        let wanted = [512, (64 << 10) - 512, 64 << 10, 1 << 20].map(|len| kept.wants(len));
        assert_eq!(wanted, [false, false, true, true]);
        assert!(!KeptWrites::default().wants(64 << 10));
    }

    #[test]
    fn what_is_kept_takes_the_place_of_all_that_it_lies_on() {
        let kept = KeptWrites::new(GEOMETRY, 32 << 10, AGE_MAX);
        kept.keep(0, data(1, 8192));
        kept.keep(8192, data(2, 8192));
        kept.keep(4096, data(3, 8192));
        let parts = [
            Part::Missing(0..4096),
            Part::Kept {
                at: 4096,
                data: data(3, 8192),
            },
            Part::Missing(12_288..16_384),
        ];
        assert_eq!(kept.find(once(0..16_384)), parts);
        // One that there is no room for, too.
        kept.keep(4096, data(4, 64 << 10));
        assert_eq!(kept.find(once(0..16_384)), [Part::Missing(0..16_384)]);
        assert_eq!(kept.stats().bytes, 0);
    }
}
