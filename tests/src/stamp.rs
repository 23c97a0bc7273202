//! Writes that can be told apart afterwards, and the judgement of an image made of them.
//!
//! Every sector that a test writes says which sector it is and by which write it came, so that from
//! an image alone it can be seen whether it is the exact state after some prefix of the writes.
//!
//! **Invariant:** writes are numbered from 1 in the order in which they were issued, one at a time.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};

use crate::{SECTOR, in_memory};

/// Makes and reads stamped sectors; `seed` keeps one run's stamps from passing for another's.
#[derive(Clone, Copy, Debug)]
pub struct Stamps {
    seed: u64,
}

impl Stamps {
    /// Stamps of the run `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The bytes of write `number` over `sectors` sectors from the sector `first`.
    #[must_use]
    pub fn fill(self, first: u64, sectors: u64, number: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(in_memory(sectors * SECTOR));
        for sector in first..first + sectors {
            bytes.extend(self.sector(sector, number));
        }
        bytes
    }

    /// The number of the write that a sector's content came by; 0 for all zeroes.
    ///
    /// # Errors
    /// If no write of this run ever put these bytes there.
    pub fn read(self, sector: u64, content: &[u8]) -> Result<u64> {
        if content.iter().all(|byte| *byte == 0) {
            return Ok(0);
        }
        let mut number = [0; 8];
        number.copy_from_slice(&content[..8]);
        let number = u64::from_le_bytes(number);
        ensure!(
            content == self.sector(sector, number),
            "sector {sector} holds bytes that were never written to it"
        );
        Ok(number)
    }

    fn sector(self, sector: u64, number: u64) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        // Noise that a mixed-up or shifted sector cannot have by chance.
        let mut state = self.seed ^ sector.rotate_left(24) ^ number.rotate_left(48);
        for word in bytes[8..].chunks_mut(8) {
            state = split_mix(state);
            word.copy_from_slice(&state.to_le_bytes());
        }
        bytes
    }
}

/// A sector as a length in memory.
const SECTOR_BYTES: usize = 512;

/// One step of SplitMix64.
const fn split_mix(state: u64) -> u64 {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 27)
}

/// What was written where and when: one content a sector and write, 0 standing for zeroes.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// For each sector its contents, oldest first, as (the write's number, the content's stamp).
    sectors: BTreeMap<u64, Vec<(u64, u64)>>,
    writes: u64,
    /// The newest write that a flush covered.
    flushed: u64,
    /// Sectors that one FUA write covered after the last flush, and its number.
    forced: BTreeMap<u64, u64>,
}

impl History {
    /// How many writes there were.
    #[must_use]
    pub const fn writes(&self) -> u64 {
        self.writes
    }

    /// Notes a write of stamps and answers its number. Call it before the write is sent: from then on it
    /// may be seen.
    pub fn write(&mut self, first: u64, sectors: u64) -> u64 {
        let number = self.writes + 1;
        self.put(first, sectors, number);
        number
    }

    /// Notes a trim or a write of zeroes, before it is sent.
    pub fn zero(&mut self, first: u64, sectors: u64) -> u64 {
        self.put(first, sectors, 0);
        self.writes
    }

    fn put(&mut self, first: u64, sectors: u64, stamp: u64) {
        self.writes += 1;
        for sector in first..first + sectors {
            let contents = self.sectors.entry(sector).or_default();
            contents.push((self.writes, stamp));
        }
    }

    /// Notes that a flush succeeded.
    pub fn flushed(&mut self) {
        self.flushed = self.writes;
        self.forced.clear();
    }

    /// Notes that the write `number` was acknowledged with FUA.
    pub fn forced(&mut self, first: u64, sectors: u64, number: u64) {
        for sector in first..first + sectors {
            self.forced.insert(sector, number);
        }
    }

    /// Checks an image after a crash that left the cache: each sector holds what it held at the last flush
    /// or anything written to it later.
    ///
    /// # Errors
    /// Naming the first sector that does not.
    pub fn check_flushed(&self, stamps: Stamps, image: &[u8]) -> Result<()> {
        for (sector, content) in numbered(image) {
            let stamp = stamps.read(sector, content)?;
            let contents = self.contents(sector);
            let durable = self
                .flushed
                .max(self.forced.get(&sector).copied().unwrap_or(0));
            let oldest = contents.partition_point(|(number, _)| *number <= durable);
            let kept = &contents[oldest.saturating_sub(1)..];
            // Before its first write a sector is zero, and may be so until that write is flushed.
            let blank = oldest == 0 && stamp == 0;
            ensure!(
                blank || kept.iter().any(|(_, known)| *known == stamp),
                "sector {sector} holds write {stamp}, but {kept:?} were possible (flushed: {durable})"
            );
        }
        Ok(())
    }

    /// Checks that an image is the exact state after some prefix of the writes, and answers the length of the
    /// shortest such prefix and of the longest.
    ///
    /// # Errors
    /// If there is no such prefix.
    pub fn prefix(&self, stamps: Stamps, image: &[u8]) -> Result<(u64, u64)> {
        // Over all cuts 0..=writes: how many sectors fit each, as differences.
        let mut change = vec![0_i64; in_memory(self.writes) + 2];
        let mut sectors = 0_i64;
        for (sector, content) in numbered(image) {
            let stamp = stamps.read(sector, content)?;
            let contents = self.contents(sector);
            let mut fits = false;
            let mut interval = |from: u64, to: u64, known: u64| {
                if known == stamp {
                    change[in_memory(from)] += 1;
                    change[in_memory(to)] -= 1;
                    fits = true;
                }
            };
            let first = contents
                .first()
                .map_or(self.writes + 1, |(number, _)| *number);
            interval(0, first, 0);
            for (index, (number, known)) in contents.iter().enumerate() {
                let next = contents.get(index + 1);
                let end = next.map_or(self.writes + 1, |(number, _)| *number);
                interval(*number, end, *known);
            }
            ensure!(fits, "sector {sector} holds write {stamp}: never written");
            sectors += 1;
        }
        let mut fitting = 0;
        let mut cuts = (0..).zip(&change).filter_map(|(cut, change)| {
            fitting += change;
            (fitting == sectors && cut <= self.writes).then_some(cut)
        });
        let Some(shortest) = cuts.next() else {
            bail!(
                "the image is no prefix of the {} writes: it mixes states",
                self.writes
            );
        };
        Ok((shortest, cuts.last().unwrap_or(shortest)))
    }

    /// Takes what an image holds as the state of now, flushed: what a crash left is settled.
    ///
    /// # Errors
    /// If the image holds bytes that were never written.
    pub fn settle(&mut self, stamps: Stamps, image: &[u8]) -> Result<()> {
        self.sectors.clear();
        for (sector, content) in numbered(image) {
            let stamp = stamps.read(sector, content)?;
            if stamp != 0 {
                self.sectors.insert(sector, vec![(self.writes, stamp)]);
            }
        }
        self.flushed();
        Ok(())
    }

    /// Forgets everything after the cut: from now on the volume is known to be in that state.
    pub fn truncate(&mut self, cut: u64) {
        for contents in self.sectors.values_mut() {
            contents.retain(|(number, _)| *number <= cut);
        }
        self.forced.clear();
        self.flushed = cut.min(self.flushed);
    }

    fn contents(&self, sector: u64) -> &[(u64, u64)] {
        self.sectors.get(&sector).map_or(&[], Vec::as_slice)
    }
}

fn numbered(image: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    (0..).zip(image.chunks_exact(in_memory(SECTOR)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A volume of four sectors after these writes.
    fn image(stamps: Stamps, numbers: [u64; 4]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (sector, number) in (0..).zip(numbers) {
            if number == 0 {
                bytes.extend([0; 512]);
            } else {
                bytes.extend(stamps.fill(sector, 1, number));
            }
        }
        bytes
    }

    /// 1: sectors 0 and 1; 2: sectors 1 and 2; flush; 3: sector 0; 4: trim of sector 1.
    fn history() -> History {
        let mut history = History::default();
        assert_eq!(history.write(0, 2), 1);
        assert_eq!(history.write(1, 2), 2);
        history.flushed();
        assert_eq!(history.write(0, 1), 3);
        history.zero(1, 1);
        history
    }

    #[test]
    fn prefix_of_exact_states_is_found() {
        let stamps = Stamps::new(1);
        for (numbers, cut) in [
            ([0, 0, 0, 0], 0),
            ([1, 1, 0, 0], 1),
            ([1, 2, 2, 0], 2),
            ([3, 2, 2, 0], 3),
            ([3, 0, 2, 0], 4),
        ] {
            let found = history().prefix(stamps, &image(stamps, numbers)).unwrap();
            assert_eq!(found, (cut, cut), "{numbers:?}");
        }
    }

    #[test]
    fn prefix_of_mixed_states_is_refused() {
        let stamps = Stamps::new(1);
        for numbers in [[1, 0, 2, 0], [3, 1, 0, 0], [0, 2, 2, 0], [1, 0, 2, 0]] {
            assert!(history().prefix(stamps, &image(stamps, numbers)).is_err());
        }
        let foreign = image(Stamps::new(2), [1, 1, 0, 0]);
        assert!(history().prefix(stamps, &foreign).is_err());
    }

    #[test]
    fn check_flushed_takes_old_or_new_and_nothing_else() {
        let stamps = Stamps::new(1);
        let check = |numbers| history().check_flushed(stamps, &image(stamps, numbers));
        check([1, 2, 2, 0]).unwrap();
        check([3, 0, 2, 0]).unwrap();
        check([1, 0, 2, 0]).unwrap();
        assert!(check([1, 1, 2, 0]).is_err(), "older than the flush");
        assert!(check([0, 2, 2, 0]).is_err(), "flushed write lost");
        let mut forced = history();
        forced.forced(0, 1, 3);
        let old = image(stamps, [1, 2, 2, 0]);
        assert!(forced.check_flushed(stamps, &old).is_err());
    }
}
