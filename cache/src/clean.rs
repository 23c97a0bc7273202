//! Which parts of which chunks are on the cache device, readable without the store.
//!
//! Keyed by (chunk, raw sector), not by address in a volume: chunks never change, so an entry can
//! be missing but never wrong, and snapshots and clones share it. That holds inside a group: what a chunk's name
//! stands for is said by a tenant's own store, so each group has an index of its own.

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasherDefault;

use quarry_objfmt::{ChunkId, Epoch, SECTOR_SIZE, SegmentId, VolumeId};

use crate::{CacheLoc, NameHasher};

/// A part of a chunk's raw space and where it lies on the cache device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CleanRun {
    /// First sector in the chunk's raw space.
    pub raw: u32,
    /// Sectors.
    pub len: u32,
    /// Where the first one lies.
    pub at: CacheLoc,
}

impl CleanRun {
    const fn end(&self) -> u32 {
        self.raw + self.len
    }
}

/// Memory that a chunk of which something is here takes, its share of a table that was just doubled included.
const CHUNK_BYTES: u64 = 160;
/// Memory of a run, its chunk's name in the list of what its segment has included.
const RUN_BYTES: u64 = 48;

/// The index. Iteration order is never observed, so that a simulation repeats.
#[derive(Default, Debug)]
pub struct CleanIndex {
    chunks: HashMap<ChunkId, Vec<CleanRun>, BuildHasherDefault<NameHasher>>,
    /// Runs of all chunks.
    runs: u64,
    /// Of whose chunks something is here.
    volumes: Volumes,
}

/// What there is of a volume's chunks.
#[derive(Default, Debug)]
struct OfVolume {
    sectors: u64,
    /// The latest term of any that was added.
    newest: Epoch,
}

type Volumes = HashMap<VolumeId, OfVolume, BuildHasherDefault<NameHasher>>;

/// So many sectors of a volume are here no more.
fn take_off(volumes: &mut Volumes, volume: VolumeId, sectors: u64) {
    if let Some(of) = volumes.get_mut(&volume) {
        of.sectors -= sectors;
        if of.sectors == 0 {
            volumes.remove(&volume);
        }
    }
}

/// Of a group of which nothing is on the device.
static NOTHING: CleanIndex = CleanIndex {
    chunks: HashMap::with_hasher(BuildHasherDefault::new()),
    runs: 0,
    volumes: HashMap::with_hasher(BuildHasherDefault::new()),
};

/// The groups' indices.
#[derive(Default, Debug)]
pub(crate) struct CleanIndices {
    groups: BTreeMap<u32, CleanIndex>,
    /// Memory of all.
    ram_bytes: u64,
}

impl CleanIndices {
    pub(crate) fn of(&self, group: u32) -> &CleanIndex {
        self.groups.get(&group).unwrap_or(&NOTHING)
    }

    pub(crate) const fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    pub(crate) fn insert(&mut self, group: u32, chunk: ChunkId, run: CleanRun) {
        self.groups.entry(group).or_default();
        self.change(group, |index| index.insert(chunk, run));
    }

    pub(crate) fn forget(&mut self, group: u32, chunk: &ChunkId, segment: SegmentId) {
        self.change(group, |index| index.forget(chunk, segment));
    }

    pub(crate) fn forget_where(&mut self, group: u32, is_forgotten: impl Fn(&ChunkId) -> bool) {
        self.change(group, |index| index.forget_where(is_forgotten));
    }

    fn change(&mut self, group: u32, change: impl FnOnce(&mut CleanIndex)) {
        if let Some(index) = self.groups.get_mut(&group) {
            self.ram_bytes -= index.ram_bytes();
            change(index);
            self.ram_bytes += index.ram_bytes();
            if index.chunks.is_empty() {
                self.groups.remove(&group);
            }
        }
    }
}

impl CleanIndex {
    /// Adds a run; parts that are known already stay as they were.
    pub fn insert(&mut self, chunk: ChunkId, run: CleanRun) {
        // Of many chunks there is one run only.
        let runs = self.chunks.entry(chunk);
        let runs = runs.or_insert_with(|| Vec::with_capacity(1));
        let mut gaps = Vec::new();
        visit(runs, run.raw, run.len, |raw, len, at| {
            if at.is_none() {
                gaps.push(CleanRun {
                    raw,
                    len,
                    at: run.at.skip(raw - run.raw),
                });
            }
        });
        for gap in gaps {
            let of = self.volumes.entry(chunk.volume).or_default();
            of.sectors += u64::from(gap.len);
            of.newest = of.newest.max(chunk.epoch);
            let place = runs.partition_point(|r| r.raw < gap.raw);
            match place.checked_sub(1).and_then(|before| runs.get_mut(before)) {
                Some(before) if before.end() == gap.raw && before.at.skip(before.len) == gap.at => {
                    before.len += gap.len
                }
                _ => {
                    runs.insert(place, gap);
                    self.runs += 1;
                }
            }
        }
    }

    /// Walks `len` raw sectors from `raw` in order: parts on the device, and parts that are not.
    pub fn visit(
        &self,
        chunk: &ChunkId,
        raw: u32,
        len: u32,
        each: impl FnMut(u32, u32, Option<CacheLoc>),
    ) {
        visit(
            self.chunks.get(chunk).map_or(&[], Vec::as_slice),
            raw,
            len,
            each,
        );
    }

    /// Whether all of `len` sectors from `raw` are on the device.
    #[must_use]
    pub fn holds(&self, chunk: &ChunkId, raw: u32, len: u32) -> bool {
        let mut whole = true;
        self.visit(chunk, raw, len, |_, _, at| whole &= at.is_some());
        whole
    }

    /// Forgets what `segment` holds of `chunk`.
    pub fn forget(&mut self, chunk: &ChunkId, segment: SegmentId) {
        if let Some(runs) = self.chunks.get_mut(chunk) {
            let (mut forgotten, before) = (0, runs.len());
            runs.retain(|run| {
                let stays = run.at.segment != segment;
                forgotten += if stays { 0 } else { u64::from(run.len) };
                stays
            });
            self.runs -= (before - runs.len()) as u64;
            take_off(&mut self.volumes, chunk.volume, forgotten);
            if runs.is_empty() {
                self.chunks.remove(chunk);
            }
        }
    }

    /// Forgets these chunks.
    fn forget_where(&mut self, is_forgotten: impl Fn(&ChunkId) -> bool) {
        let Self {
            chunks,
            runs,
            volumes,
        } = self;
        chunks.retain(|chunk, of_chunk| {
            let goes = is_forgotten(chunk);
            if goes {
                *runs -= of_chunk.len() as u64;
                let sectors = of_chunk.iter().map(|run| u64::from(run.len)).sum();
                take_off(volumes, chunk.volume, sectors);
            }
            !goes
        });
    }

    /// What a segment holds of a chunk.
    pub(crate) fn runs_in(
        &self,
        chunk: &ChunkId,
        segment: SegmentId,
    ) -> impl Iterator<Item = &CleanRun> + use<'_> {
        let runs = self.chunks.get(chunk).map_or(&[][..], Vec::as_slice);
        runs.iter().filter(move |run| run.at.segment == segment)
    }

    /// The latest term of which there ever was a chunk of a volume here, since there is one.
    pub(crate) fn newest_of(&self, volume: VolumeId) -> Option<Epoch> {
        self.volumes.get(&volume).map(|of| of.newest)
    }

    /// Bytes of a volume's chunks that are on the device.
    #[must_use]
    pub fn bytes_of(&self, volume: VolumeId) -> u64 {
        let sectors = self.volumes.get(&volume).map_or(0, |of| of.sectors);
        sectors * u64::from(SECTOR_SIZE)
    }

    /// Memory that it takes, in bytes.
    #[must_use]
    pub fn ram_bytes(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK_BYTES + self.runs * RUN_BYTES
    }

    /// Chunks of which something is here.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }
}

fn visit(runs: &[CleanRun], raw: u32, len: u32, mut each: impl FnMut(u32, u32, Option<CacheLoc>)) {
    let end = raw + len;
    let mut at = raw;
    let first = runs.partition_point(|run| run.end() <= raw);
    for run in runs.iter().skip(first).take_while(|run| run.raw < end) {
        let from = run.raw.max(raw);
        let to = run.end().min(end);
        if at < from {
            each(at, from - at, None);
        }
        each(from, to - from, Some(run.at.skip(from - run.raw)));
        at = to;
    }
    if at < end {
        each(at, end - at, None);
    }
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::{ChunkSeq, Epoch, VolumeId};

    use super::*;

    fn chunk() -> ChunkId {
        ChunkId {
            volume: VolumeId::from_bytes([1; 16]),
            epoch: Epoch::new(1),
            seq: ChunkSeq::new(1),
        }
    }

    fn at(segment: u32, offset: u32) -> CacheLoc {
        CacheLoc {
            segment: SegmentId::new(segment),
            offset,
        }
    }

    fn parts(index: &CleanIndex, raw: u32, len: u32) -> Vec<(u32, u32, Option<CacheLoc>)> {
        let mut out = Vec::new();
        index.visit(&chunk(), raw, len, |raw, len, at| out.push((raw, len, at)));
        out
    }

    #[test]
    fn visit_over_a_hole_names_hits_and_misses_in_order() {
        let mut index = CleanIndex::default();
        index.insert(
            chunk(),
            CleanRun {
                raw: 8,
                len: 8,
                at: at(1, 100),
            },
        );
        index.insert(
            chunk(),
            CleanRun {
                raw: 24,
                len: 8,
                at: at(2, 0),
            },
        );
        assert_eq!(
            parts(&index, 4, 32),
            vec![
                (4, 4, None),
                (8, 8, Some(at(1, 100))),
                (16, 8, None),
                (24, 8, Some(at(2, 0))),
                (32, 4, None)
            ]
        );
    }

    #[test]
    fn second_insert_over_the_first_fills_only_the_gaps() {
        let mut index = CleanIndex::default();
        index.insert(
            chunk(),
            CleanRun {
                raw: 8,
                len: 8,
                at: at(1, 100),
            },
        );
        index.insert(
            chunk(),
            CleanRun {
                raw: 0,
                len: 24,
                at: at(2, 0),
            },
        );
        assert_eq!(
            parts(&index, 0, 24),
            vec![
                (0, 8, Some(at(2, 0))),
                (8, 8, Some(at(1, 100))),
                (16, 8, Some(at(2, 16)))
            ]
        );
        index.forget(&chunk(), SegmentId::new(2));
        assert_eq!(
            parts(&index, 0, 24),
            vec![(0, 8, None), (8, 8, Some(at(1, 100))), (16, 8, None)]
        );
        assert!(index.holds(&chunk(), 9, 7));
        assert_eq!(index.bytes_of(chunk().volume), 8 * 512);
        assert_eq!(index.ram_bytes(), CHUNK_BYTES + RUN_BYTES);
        index.forget(&chunk(), SegmentId::new(1));
        assert_eq!(index.chunks(), 0);
        assert_eq!(index.bytes_of(chunk().volume), 0);
        assert_eq!(index.ram_bytes(), 0);
    }

    #[test]
    fn memory_of_all_groups_is_what_is_left_of_them() {
        let mut indices = CleanIndices::default();
        let run = |raw| CleanRun {
            raw,
            len: 8,
            at: at(1, raw),
        };
        // Apart, so that they stay two.
        indices.insert(0, chunk(), run(0));
        indices.insert(0, chunk(), run(16));
        indices.insert(1, chunk(), run(0));
        assert_eq!(indices.ram_bytes(), 2 * CHUNK_BYTES + 3 * RUN_BYTES);
        indices.forget_where(0, |of| of.volume == chunk().volume);
        assert_eq!(indices.ram_bytes(), CHUNK_BYTES + RUN_BYTES);
        indices.forget(1, &chunk(), SegmentId::new(1));
        assert_eq!(indices.ram_bytes(), 0);
    }
}
