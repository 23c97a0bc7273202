//! The table of segments and the three budgets: what is free, dirty, clean, and in what order
//! clean segments are reclaimed.
//!
//! Life of a segment: free -> open (one volume's writes, or fills) -> held by what is unsent or in
//! flight -> clean -> free. `holds` counts the reasons why its data must stay: being open, writes
//! in flight, records not yet in the store, record pages in flight. `pins` counts reads and header
//! writes in flight. Only a segment with neither is ever reclaimed.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::hash::BuildHasherDefault;

use quarry_objfmt::index::INDEX_RUNS_MAX;
use quarry_objfmt::{
    CacheId, ChunkId, Epoch, Generation, IndexRun, SECTOR_SIZE, SegmentId, VolumeId,
};

use crate::clean::CleanIndices;
use crate::group::{GroupLimits, Groups};
use crate::{Branch, CleanIndex, CleanRun, IndexTable, Mutation, NameHasher};

/// Bytes of a page: segment headers and record pages.
pub const PAGE_SIZE: u64 = 4096;

/// Most sectors of fills under way: bounds the memory that they wait in, for a store may deliver
/// faster than the device takes. What would go past it is a later miss.
const FILL_SECTORS_MAX: u32 = (32 << 20) / 512;

/// Where sectors lie on the cache device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CacheLoc {
    /// The segment.
    pub segment: SegmentId,
    /// Sectors from the segment's start.
    pub offset: u32,
}

impl CacheLoc {
    /// `n` sectors further on in the same segment.
    #[must_use]
    pub const fn skip(self, n: u32) -> Self {
        Self {
            offset: self.offset + n,
            ..self
        }
    }
}

/// How the device is cut up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Byte at which segment 0 starts.
    pub data_start: u64,
    /// Bytes of a segment; a multiple of 4096.
    pub segment_size: u32,
    /// How many there are.
    pub segments: u32,
}

impl Geometry {
    /// The device's byte at which a location lies.
    #[must_use]
    pub fn byte_of(&self, at: CacheLoc) -> u64 {
        assert!(
            at.segment.get() < self.segments,
            "a segment that the device does not have"
        );
        let inside = u64::from(at.offset) * 512;
        assert!(
            inside < u64::from(self.segment_size),
            "an offset outside its segment"
        );
        self.data_start + u64::from(at.segment.get()) * u64::from(self.segment_size) + inside
    }

    /// The device's byte at which page `index` of a segment lies: 0 is the header, the last page.
    #[must_use]
    pub fn page_byte(&self, segment: SegmentId, index: u32) -> u64 {
        let back = (u64::from(index) + 1) * PAGE_SIZE;
        assert!(
            back <= u64::from(self.segment_size),
            "a page outside its segment"
        );
        self.data_start + (u64::from(segment.get()) + 1) * u64::from(self.segment_size) - back
    }

    /// Where the segment begins whose header lies at this byte of the device; `None` if no header does.
    #[must_use]
    pub const fn segment_of_header(&self, byte: u64) -> Option<u64> {
        let size = self.segment_size as u64;
        match (byte + PAGE_SIZE).checked_sub(self.data_start) {
            Some(end) if end > 0 && end.is_multiple_of(size) => Some(self.data_start + end - size),
            _ => None,
        }
    }

    /// Whether a segment begins at this byte of the device.
    #[must_use]
    pub const fn begins_segment(&self, byte: u64) -> bool {
        match byte.checked_sub(self.data_start) {
            Some(inside) => inside.is_multiple_of(self.segment_size as u64),
            None => false,
        }
    }

    /// Sectors of a segment, pages included.
    #[must_use]
    pub const fn segment_sectors(&self) -> u32 {
        self.segment_size / 512
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    /// Has, or may get, data that the store lacks.
    Dirty,
    /// Being filled with fetched data.
    Fill,
    Clean,
}

#[derive(Debug)]
struct Segment {
    state: State,
    generation: Generation,
    holds: u32,
    pins: u32,
    /// Read since it was last considered for reclaim: gets a second chance.
    hot: bool,
    /// The group whose segment it is; none is known of one that recovery found, until it is taken up.
    group: Option<u32>,
    /// Chunks of which the clean index points here.
    chunks: Vec<ChunkId>,
}

/// A segment just taken from the free ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenedSegment {
    /// Which.
    pub segment: SegmentId,
    /// Its new generation, to be written durably before any data.
    pub generation: Generation,
}

/// What a clean segment holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CleanSegment {
    /// Whose it is.
    pub group: u32,
    /// Which.
    pub segment: SegmentId,
    /// Which opening of it.
    pub generation: Generation,
    /// By chunk and sector.
    pub runs: Vec<IndexRun>,
}

/// What the index log describes.
#[derive(Clone, Default, Debug)]
pub struct Expected {
    /// The latest term of each group's volumes.
    pub newest: BTreeMap<(u32, VolumeId), Epoch>,
    /// Whose the segments are, and which opening of each it is.
    pub segments: BTreeMap<SegmentId, (u32, Generation)>,
}

/// Which terms of a volume began here.
#[derive(Clone, Copy, Debug)]
struct Terms {
    /// The first one of which there was nothing yet.
    lowest: Epoch,
    /// The last one of a writer.
    written: Epoch,
}

/// Why no segment can be had just now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoSpace {
    /// The dirty budget is used up: wait for the store.
    #[error("the cache holds as much unsent data as it may")]
    DirtyCap,
    /// Every clean segment is being read: wait for a moment.
    #[error("every clean segment of the cache is in use")]
    Busy,
}

/// A volume that waits for a segment for its writes.
#[derive(Clone, Copy, Debug)]
struct InLine {
    volume: VolumeId,
    group: u32,
    /// Its group has all that it may have, so that only what that gives up helps.
    is_for_its_groups: bool,
}

/// Segments by state, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CacheCounts {
    /// Free segments.
    pub free: u32,
    /// Segments with data that the store lacks.
    pub dirty: u32,
    /// Segments with clean data only (fills included).
    pub clean: u32,
    /// Those of them that what is fetched is put into now.
    pub filling: u32,
    /// Most segments that may be dirty.
    pub dirty_max: u32,
    /// All.
    pub total: u32,
    /// Bytes of a segment.
    pub segment_size: u32,
    /// Segments reclaimed since the start.
    pub reclaimed: u64,
}

/// Segments being filled, each for another group: at least so many at most, and this part of a larger device's. Past that
/// who fills closes the one that was not filled for the longest time, full or not; so does who writes, if there is nothing
/// else to be had.
const FILLS_OPEN_MIN: usize = 8;
const FILLS_OPEN_SHARE: usize = 16;

/// In the place of a group, for segments that are nobody's.
const NOBODY: u32 = u32::MAX;

#[derive(Debug)]
struct Fill {
    group: u32,
    segment: SegmentId,
    /// Next free sector.
    next: u32,
}

/// The bookkeeping of one cache device. Shared by all volumes of the daemon, behind one lock that
/// a reactor takes once a batch.
#[derive(Debug)]
pub struct Cache {
    id: CacheId,
    geometry: Geometry,
    segments: Vec<Segment>,
    free: VecDeque<SegmentId>,
    /// Clean segments by group, in the order in which they became clean.
    fifos: BTreeMap<u32, VecDeque<SegmentId>>,
    next_generation: Generation,
    dirty: u32,
    dirty_max: u32,
    /// The one that was used last is behind.
    fills: Vec<Fill>,
    /// Sectors of fills under way.
    fill_sectors: u32,
    /// What they fill, by group, chunk and first raw sector: volumes that fetched the same at once fill it once.
    filling: HashSet<(u32, ChunkId, u32), BuildHasherDefault<NameHasher>>,
    /// Volumes that were refused a segment for writes, and their groups, first come first served.
    line: VecDeque<InLine>,
    groups: Groups,
    clean: CleanIndices,
    /// Which segments are described in the index log as they are; none: there is no log.
    described: Option<IndexTable>,
    /// Clean segments that are to be described there.
    undescribed: BTreeSet<SegmentId>,
    /// What was described before the start and is not taken up yet; none: nobody knows yet.
    expected: Option<Expected>,
    /// Of volumes that were here.
    terms: BTreeMap<(u32, VolumeId), Terms>,
    reclaimed: u64,
    /// The errno of a sync that failed.
    in_doubt: Option<i32>,
}

impl Cache {
    /// A cache with all segments free but `dirty` ones, which recovery found to hold unsent data.
    /// `dirty_max` is in segments and is kept between 1 and all but one.
    #[must_use]
    pub fn new(
        id: CacheId,
        geometry: Geometry,
        dirty_max: u32,
        next_generation: Generation,
        dirty: &[(SegmentId, Generation)],
    ) -> Self {
        let mut segments: Vec<Segment> = (0..geometry.segments)
            .map(|_| Segment {
                state: State::Free,
                generation: Generation::ZERO,
                holds: 0,
                pins: 0,
                hot: false,
                group: None,
                chunks: Vec::new(),
            })
            .collect();
        for (id, generation) in dirty {
            let segment = &mut segments[id.get() as usize];
            segment.state = State::Dirty;
            segment.generation = *generation;
            segment.holds = 1;
        }
        let dirty_max = dirty_max.clamp(1, geometry.segments.saturating_sub(1).max(1));
        let free = (0..geometry.segments)
            .map(SegmentId::new)
            .filter(|id| segments[id.get() as usize].state == State::Free)
            .collect();
        Self {
            id,
            geometry,
            free,
            fifos: BTreeMap::new(),
            next_generation,
            dirty: u32::try_from(dirty.len()).expect("fewer segments than u32 holds"),
            dirty_max,
            fills: Vec::new(),
            fill_sectors: 0,
            filling: HashSet::default(),
            line: VecDeque::new(),
            groups: Groups::new(dirty_max, geometry.segments),
            clean: CleanIndices::default(),
            described: None,
            undescribed: BTreeSet::new(),
            expected: None,
            terms: BTreeMap::new(),
            reclaimed: 0,
            in_doubt: None,
            segments,
        }
    }

    /// Keeps this table from now on, which is the index log's and says what it was true of before.
    pub fn describe_in(&mut self, table: IndexTable) {
        self.described = Some(table);
    }

    /// Whether what the index log says of a segment's generation is so: nothing was put there since.
    #[must_use]
    pub fn is_described(&self, id: SegmentId, generation: Generation) -> bool {
        let table = self.described.as_ref();
        generation != Generation::ZERO && table.is_some_and(|table| table.get(id) == generation)
    }

    /// All segments of which that is so.
    #[must_use]
    pub fn all_described(&self) -> Vec<(SegmentId, Generation)> {
        self.described.iter().flat_map(IndexTable::iter).collect()
    }

    fn forget_description(&mut self, id: SegmentId) {
        if let Some(table) = &mut self.described
            && !Mutation::DescribedForEver.is_on()
        {
            table.set(id, Generation::ZERO);
        }
        self.undescribed.remove(&id);
    }

    /// It holds other clean data than were described, or was not described yet.
    fn is_to_be_described(&mut self, id: SegmentId) {
        if let Some(table) = &mut self.described {
            table.set(id, Generation::ZERO);
            self.undescribed.insert(id);
        }
    }

    /// Some of the segments that are to be described, with about so many runs; nothing if there are none.
    #[must_use]
    pub fn take_undescribed(&mut self, runs_max: usize) -> Vec<CleanSegment> {
        let (mut taken, mut runs) = (Vec::new(), 0);
        while runs < runs_max
            && let Some(id) = self.undescribed.pop_first()
        {
            let found = self.describe(id);
            runs += found.as_ref().map_or(1, |found| found.runs.len());
            taken.extend(found);
        }
        taken
    }

    /// Some of the segments that are described, as they are, with about so many runs, and how many segments were looked at: from
    /// this one on.
    #[must_use]
    pub fn described_from(&self, first: u32, runs_max: usize) -> (Vec<CleanSegment>, u32) {
        let (mut found, mut runs, mut looked) = (Vec::new(), 0, 0);
        for id in (first..self.geometry.segments).map(SegmentId::new) {
            if runs >= runs_max {
                break;
            }
            looked += 1;
            // A look costs something, too.
            runs += 1;
            if self.is_described(id, self.generation(id))
                && let Some(clean) = self.describe(id)
            {
                runs += clean.runs.len();
                found.push(clean);
            }
        }
        (found, looked)
    }

    /// What a clean segment holds, if it holds anything; none of one with more runs than can be described.
    fn describe(&self, id: SegmentId) -> Option<CleanSegment> {
        let segment = &self.segments[id.get() as usize];
        let group = segment.group.filter(|_| segment.state == State::Clean)?;
        let mut chunks = segment.chunks.clone();
        chunks.sort_unstable();
        chunks.dedup();
        let index = self.clean.of(group);
        let of_chunk = |chunk: &ChunkId| {
            let chunk = *chunk;
            index.runs_in(&chunk, id).map(move |run| IndexRun {
                chunk,
                raw: run.raw,
                len: run.len,
                offset: run.at.offset,
            })
        };
        let runs: Vec<IndexRun> = chunks.iter().flat_map(of_chunk).collect();
        (!runs.is_empty() && runs.len() <= INDEX_RUNS_MAX).then_some(CleanSegment {
            group,
            segment: id,
            generation: segment.generation,
            runs,
        })
    }

    /// The index log has what [`Self::take_undescribed`] gave of a segment. It counts unless the segment has changed since.
    pub fn described(&mut self, id: SegmentId, generation: Generation) {
        let segment = &self.segments[id.get() as usize];
        let is_as_it_was = segment.state == State::Clean
            && segment.generation == generation
            && !segment.chunks.is_empty();
        if let Some(table) = &mut self.described
            && is_as_it_was
            && !self.undescribed.contains(&id)
        {
            table.set(id, generation);
        }
    }

    /// The index log does not have it: it is to be described still, unless the segment has changed since.
    pub fn not_described(&mut self, id: SegmentId, generation: Generation) {
        let segment = &self.segments[id.get() as usize];
        if segment.state == State::Clean && segment.generation == generation {
            self.is_to_be_described(id);
        }
    }

    /// What was described before the start is known, and believed from here on, but for segments that were begun since, and but
    /// for groups of which a term began that has chunks there already: see [`Self::begin_term`].
    pub fn expect(&mut self, mut expected: Expected) {
        let is_known = |(of, terms): (&(u32, VolumeId), &Terms)| {
            (expected.newest.get(of) >= Some(&terms.lowest)).then_some(*of)
        };
        let known: BTreeMap<u32, VolumeId> = self.terms.iter().filter_map(is_known).collect();
        for (group, volume) in &known {
            self.put_back(*group, *volume);
        }
        expected
            .newest
            .retain(|(group, _), _| !known.contains_key(group));
        expected
            .segments
            .retain(|_, (group, _)| !known.contains_key(group));
        if let Some(table) = &mut self.described {
            table.forget_before();
            for (id, (_, generation)) in &expected.segments {
                let segment = self.segments.get(id.get() as usize);
                let is_untouched = |segment: &Segment| {
                    segment.state == State::Free && segment.generation == Generation::ZERO
                };
                if segment.is_some_and(is_untouched) {
                    table.set(*id, *generation);
                }
            }
        }
        self.expected = Some(expected);
    }

    /// All of it is taken up.
    pub fn expect_no_more(&mut self) {
        self.expected = Some(Expected::default());
    }

    /// Takes up segments as the index log describes them; those of which it is not true any more, or that recovery took, are
    /// passed over. Answers how many bytes were taken up.
    pub fn take_up(&mut self, found: Vec<CleanSegment>) -> u64 {
        let mut sectors = 0;
        let room = self.geometry.segment_sectors();
        for found in found {
            let id = found.segment;
            let is_true = self.is_described(id, found.generation);
            let Some(segment) = self.segments.get_mut(id.get() as usize) else {
                continue;
            };
            if !is_true || segment.state != State::Free || self.in_doubt.is_some() {
                continue;
            }
            segment.state = State::Clean;
            segment.generation = found.generation;
            segment.group = Some(found.group);
            self.groups.took(found.group, false);
            self.fifos.entry(found.group).or_default().push_back(id);
            for run in found.runs {
                if run.offset + run.len > room {
                    continue;
                }
                let (raw, len) = (run.raw, run.len);
                let at = CacheLoc {
                    segment: id,
                    offset: run.offset,
                };
                sectors += u64::from(len);
                self.add_clean(run.chunk, CleanRun { raw, len, at });
            }
        }
        let segments = &self.segments;
        self.free
            .retain(|id| segments[id.get() as usize].state == State::Free);
        sectors * u64::from(SECTOR_SIZE)
    }

    /// Closes all segments that are being filled, so that they can be described: nothing is filled any more.
    pub fn close_fills(&mut self) {
        for fill in std::mem::take(&mut self.fills) {
            let _ = self.release(fill.segment);
        }
    }

    /// A term of a volume begins in which chunks get their names, or is read: there is nothing clean of it yet, nor of later ones.
    /// If there is, the store was put back to an earlier state, and what has the same names is not the same: all that is clean of the
    /// group is forgotten, and what was described of it and is not taken up yet.
    pub fn begin_term(&mut self, group: u32, volume: VolumeId, epoch: Epoch, writes: bool) {
        let of = (group, volume);
        let before = self.terms.get(&of).copied();
        let written = before.map_or(Epoch::ZERO, |terms| terms.written);
        // A reader's term is the last writer's, whose chunks there are; it may have looked before a writer here began the next.
        let since = match writes {
            true => epoch,
            false => epoch.max(written).next(),
        };
        let terms = Terms {
            lowest: before.map_or(since, |terms| terms.lowest.min(since)),
            written: if writes { epoch.max(written) } else { written },
        };
        self.terms.insert(of, terms);
        if self.expected.is_none()
            && let Some(table) = &mut self.described
        {
            // Whether it is known already nobody can say yet, and the next daemon could not any more.
            table.forget_before();
        }
        let expected = self.expected.as_ref();
        let expected = expected.and_then(|expected| expected.newest.get(&of));
        let newest = self.clean.of(group).newest_of(volume);
        if newest.max(expected.copied()) >= Some(since) {
            self.put_back(group, volume);
        }
    }

    /// A group's store was put back to an earlier state, as a volume of it tells.
    fn put_back(&mut self, group: u32, volume: VolumeId) {
        tracing::warn!(%volume, "the store was put back to an earlier state: what the cache has of the volume's tenant is fetched anew");
        self.forget_where(group, |_| true);
        let Some(expected) = &mut self.expected else {
            return;
        };
        expected.newest.retain(|(of, _), _| *of != group);
        let of_group = expected.segments.iter();
        let of_group = of_group.filter(|(_, (of, _))| *of == group);
        let of_group: Vec<SegmentId> = of_group.map(|(id, _)| *id).collect();
        for id in of_group {
            if self.segment_mut(id).state == State::Free {
                self.forget_description(id);
            }
        }
    }

    /// A sync of the device failed: what was not known to be stable before may be what was there earlier, another tenant's
    /// for one. Nothing clean is found from here on; the store has it.
    pub fn put_in_doubt(&mut self, errno: i32) {
        if self.in_doubt.is_some() {
            return;
        }
        self.in_doubt = Some(errno);
        if let Some(mut table) = self.described.take() {
            table.clear();
        }
        self.undescribed.clear();
        self.clean = CleanIndices::default();
        for segment in &mut self.segments {
            segment.chunks = Vec::new();
        }
    }

    /// The errno of a sync of the device that failed, if one did.
    #[must_use]
    pub const fn in_doubt(&self) -> Option<i32> {
        self.in_doubt
    }

    /// The device's name, which its pages carry.
    #[must_use]
    pub const fn id(&self) -> CacheId {
        self.id
    }

    /// How the device is cut up.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Segments by state.
    #[must_use]
    pub fn counts(&self) -> CacheCounts {
        let free = u32::try_from(self.free.len()).unwrap_or(u32::MAX);
        CacheCounts {
            free,
            dirty: self.dirty,
            clean: self.geometry.segments - free - self.dirty,
            filling: u32::try_from(self.fills.len()).unwrap_or(u32::MAX),
            dirty_max: self.dirty_max,
            total: self.geometry.segments,
            segment_size: self.geometry.segment_size,
            reclaimed: self.reclaimed,
        }
    }

    /// Takes a segment for a volume's writes; it is held once, for being open. The caller writes
    /// its header durably before any data.
    ///
    /// # Errors
    /// [`NoSpace`] if the dirty budget is used up, or what is left of it is not for the volume's group, or for volumes
    /// that were refused before, or nothing can be reclaimed. In each case the volume then stands in the line until it
    /// gets one or calls [`Self::leave_line`].
    pub fn open_for_writes(
        &mut self,
        volume: VolumeId,
        group: u32,
    ) -> Result<OpenedSegment, NoSpace> {
        let left = self.dirty_max.saturating_sub(self.dirty);
        let place = self.line.iter().position(|other| other.volume == volume);
        let before = self.line.iter().take(place.unwrap_or(self.line.len()));
        // Who waits for one of its own group takes none of the others'.
        let before = before.filter(|other| !other.is_for_its_groups || other.group == group);
        let groups = before.clone().map(|other| other.group);
        if left == 0 || !self.groups.may_take(group, left, groups) {
            // Of what is left for all none is what it waits for, if its group has all that it may have.
            let is_for_its_groups = left > 0 && self.groups.is_full(group);
            self.stand_in_line(volume, group, is_for_its_groups);
            return Err(NoSpace::DirtyCap);
        }
        let is_full = self.groups.is_full(group);
        // Who gives one up for another does not take it back.
        let is_anothers = is_full && before.into_iter().any(|other| other.is_for_its_groups);
        let segment = match is_anothers {
            true => None,
            false => self.take_free_or_filled(group),
        };
        let Some(segment) = segment else {
            self.stand_in_line(volume, group, is_full);
            return Err(NoSpace::Busy);
        };
        self.leave_line(volume);
        self.dirty += 1;
        Ok(self.open(segment, State::Dirty, group))
    }

    /// Whether some volume waits for a segment for its writes.
    #[must_use]
    pub fn has_line(&self) -> bool {
        !self.line.is_empty()
    }

    /// Whether some volume waits that a segment given up by a volume of this group could help.
    #[must_use]
    pub fn has_line_for(&self, group: u32) -> bool {
        let left = self.dirty_max.saturating_sub(self.dirty);
        let mut waiting = self.line.iter();
        waiting.any(|other| match other.is_for_its_groups {
            true => other.group == group,
            false => self.groups.could_help(group, other.group, left),
        })
    }

    fn stand_in_line(&mut self, volume: VolumeId, group: u32, is_for_its_groups: bool) {
        match self.line.iter_mut().find(|other| other.volume == volume) {
            Some(there) => there.is_for_its_groups = is_for_its_groups,
            None => self.line.push_back(InLine {
                volume,
                group,
                is_for_its_groups,
            }),
        }
    }

    /// The volume wants no segment any more.
    pub fn leave_line(&mut self, volume: VolumeId) {
        self.line.retain(|other| other.volume != volume);
    }

    /// So many more writes of a group's volumes are known here that the store lacks.
    pub fn note_unsent(&mut self, group: u32, writes: usize) {
        self.groups.note_unsent(group, writes);
    }

    /// The store has so many of them, or they are not known here any more.
    ///
    /// # Panics
    /// If they are more than were noted.
    pub fn forget_unsent(&mut self, group: u32, writes: usize) {
        self.groups.forget_unsent(group, writes);
    }

    /// Writes of a group's volumes that the store lacks.
    #[must_use]
    pub fn unsent_of(&self, group: u32) -> usize {
        self.groups.unsent_of(group)
    }

    /// Says what a group may take from now on; what it has stays.
    pub fn set_group(&mut self, group: u32, limits: GroupLimits) {
        self.groups.set(group, limits);
    }

    /// A volume of the group is here: the group has a share, and if the volume takes writes, a part of the dirty budget
    /// is kept for it.
    pub fn join_group(&mut self, group: u32, writes: bool) {
        self.groups.join(group, writes);
    }

    /// It goes: the end of a [`Self::join_group`].
    pub fn leave_group(&mut self, group: u32, writes: bool) {
        self.groups.leave(group, writes);
    }

    /// Bytes of the segments of a group that have data that the store lacks.
    #[must_use]
    pub fn dirty_bytes_of_group(&self, group: u32) -> u64 {
        u64::from(self.groups.dirty(group)) * u64::from(self.geometry.segment_size)
    }

    /// Bytes of all segments of a group.
    #[must_use]
    pub fn bytes_of_group(&self, group: u32) -> u64 {
        u64::from(self.groups.used(group)) * u64::from(self.geometry.segment_size)
    }

    /// A dirty segment that recovery found is this group's.
    pub fn assign(&mut self, id: SegmentId, group: u32) {
        let segment = self.segment_mut(id);
        if segment.state == State::Dirty && segment.group.is_none() {
            segment.group = Some(group);
            self.groups.took(group, true);
        }
    }

    fn open(&mut self, id: SegmentId, state: State, group: u32) -> OpenedSegment {
        let generation = self.next_generation;
        self.next_generation = generation.next();
        self.groups.took(group, state == State::Dirty);
        // Before anything of the new generation is put there.
        self.forget_description(id);
        let segment = self.segment_mut(id);
        assert_eq!(
            (segment.holds, segment.pins),
            (0, 0),
            "a segment in use was taken"
        );
        segment.state = state;
        segment.group = Some(group);
        segment.generation = generation;
        segment.holds = 1;
        segment.hot = false;
        OpenedSegment {
            segment: id,
            generation,
        }
    }

    /// One more reason to keep a segment's data.
    pub fn hold(&mut self, id: SegmentId) {
        let segment = self.segment_mut(id);
        assert!(
            segment.holds > 0,
            "a segment nobody holds cannot be held again"
        );
        segment.holds += 1;
    }

    /// One reason less. True if it was the last: the segment is clean now, and if it was dirty the
    /// caller marks it so on the device ([`Self::pin`]ned meanwhile).
    #[must_use]
    pub fn release(&mut self, id: SegmentId) -> bool {
        let segment = self.segment_mut(id);
        segment.holds = segment
            .holds
            .checked_sub(1)
            .expect("a hold is released once");
        if segment.holds > 0 {
            return false;
        }
        let was_dirty = segment.state == State::Dirty;
        segment.state = State::Clean;
        let group = segment.group;
        if let (Some(group), true) = (group, was_dirty) {
            self.groups.cleaned(group);
        }
        let fifo = self.fifos.entry(group.unwrap_or(NOBODY)).or_default();
        fifo.push_back(id);
        if was_dirty && !Mutation::DirtyNotCountedDown.is_on() {
            self.dirty -= 1;
        }
        self.is_to_be_described(id);
        was_dirty
    }

    /// A volume goes and gives up all its holds on a segment at once: none is left, or one if the
    /// segment has data that must stay for whoever recovers them.
    pub fn part_with(&mut self, id: SegmentId, keep: bool) {
        let segment = self.segment_mut(id);
        assert!(segment.holds > 0, "a segment that nobody holds is given up");
        segment.holds = 1;
        if !keep {
            let _ = self.release(id);
        }
    }

    /// A segment's generation.
    #[must_use]
    pub fn generation(&self, id: SegmentId) -> Generation {
        self.segments[id.get() as usize].generation
    }

    /// Keeps a segment from being reclaimed while an I/O on it is in flight.
    pub fn pin(&mut self, id: SegmentId) {
        let segment = self.segment_mut(id);
        segment.pins += 1;
        segment.hot = true;
    }

    /// Ends a [`Self::pin`].
    pub fn unpin(&mut self, id: SegmentId) {
        let segment = self.segment_mut(id);
        segment.pins = segment
            .pins
            .checked_sub(1)
            .expect("a pin is taken off once");
    }

    /// Makes part of a chunk findable at a place on the device, for the group whose segment that is. Not on one that is in doubt.
    pub fn add_clean(&mut self, chunk: ChunkId, run: CleanRun) {
        if self.in_doubt.is_some() {
            return;
        }
        let segment = self.segment_mut(run.at.segment);
        assert!(segment.state != State::Free, "a free segment holds nothing");
        let group = segment.group.expect("a segment in use is some group's");
        if segment.chunks.last() != Some(&chunk) {
            segment.chunks.push(chunk);
        }
        self.clean.insert(group, chunk, run);
    }

    /// Memory of the index of what the store has too, in bytes.
    #[must_use]
    pub const fn index_bytes(&self) -> u64 {
        self.clean.ram_bytes()
    }

    /// The index of a group's clean data.
    #[must_use]
    pub fn clean(&self, group: u32) -> &CleanIndex {
        self.clean.of(group)
    }

    /// Forgets all clean data in a segment, after a read of it failed.
    pub fn distrust(&mut self, id: SegmentId) {
        self.forget_description(id);
        let segment = self.segment_mut(id);
        let chunks = std::mem::take(&mut segment.chunks);
        let Some(group) = segment.group else { return };
        for chunk in chunks {
            self.clean.forget(group, &chunk, id);
        }
    }

    /// Forgets all that a group has of a volume's chunks as clean data, and frees what held nothing else and is not
    /// being read. Dirty data stay. Answers how many bytes were forgotten. It takes a look at every segment.
    pub fn evict(&mut self, group: u32, volume: VolumeId) -> u64 {
        let bytes = self.clean.of(group).bytes_of(volume);
        self.forget_where(group, |chunk| chunk.volume == volume);
        bytes
    }

    /// Forgets these of a group's chunks, and frees what held nothing else and is not being read.
    fn forget_where(&mut self, group: u32, is_forgotten: impl Fn(&ChunkId) -> bool) {
        self.clean.forget_where(group, &is_forgotten);
        for id in (0..self.geometry.segments).map(SegmentId::new) {
            let segment = self.segment_mut(id);
            if segment.group != Some(group) {
                continue;
            }
            let before = segment.chunks.len();
            segment.chunks.retain(|chunk| !is_forgotten(chunk));
            if segment.chunks.len() == before || segment.state != State::Clean {
                continue;
            }
            if !segment.chunks.is_empty() {
                self.is_to_be_described(id);
                continue;
            }
            if segment.pins == 0 {
                segment.state = State::Free;
                segment.group = None;
                self.free.push_back(id);
                self.groups.gave(group);
            }
            self.forget_description(id);
        }
        let segments = &self.segments;
        for fifo in self.fifos.values_mut() {
            fifo.retain(|id| segments[id.get() as usize].state == State::Clean);
        }
    }

    /// Whether a fill of a chunk from `raw` on is under way for the group.
    #[must_use]
    pub fn is_filling(&self, group: u32, chunk: ChunkId, raw: u32) -> bool {
        self.filling.contains(&(group, chunk, raw))
    }

    /// Room for `sectors` of fetched data of a chunk from `raw` on, in a segment of the group that wants them; `None` if
    /// there is none just now, which costs nothing but a later miss. The place is held until [`Self::finish_fill`]. What
    /// is being filled already ([`Self::is_filling`]) is not to be asked for.
    pub fn reserve_fill(
        &mut self,
        group: u32,
        chunk: ChunkId,
        raw: u32,
        sectors: u32,
    ) -> Option<CacheLoc> {
        let room = self.geometry.segment_sectors() - u32::try_from(PAGE_SIZE / 512).expect("eight");
        let too_much = sectors > room || self.fill_sectors + sectors > FILL_SECTORS_MAX;
        if too_much || self.in_doubt.is_some() {
            return None;
        }
        let place = self.fills.iter().position(|fill| fill.group == group);
        let mut fill = place.map(|place| self.fills.remove(place));
        if let Some(full) = fill.take_if(|fill| fill.next + sectors > room) {
            let _ = self.release(full.segment);
        }
        let mut fill = match fill {
            Some(fill) => fill,
            None => {
                let open_max = FILLS_OPEN_MIN.max(self.segments.len() / FILLS_OPEN_SHARE);
                if self.fills.len() >= open_max {
                    let longest_unused = self.fills.remove(0);
                    let _ = self.release(longest_unused.segment);
                }
                let segment = self.take_free(group)?;
                self.open(segment, State::Fill, group);
                let next = 0;
                Fill {
                    group,
                    segment,
                    next,
                }
            }
        };
        let at = CacheLoc {
            segment: fill.segment,
            offset: fill.next,
        };
        fill.next += sectors;
        self.fills.push(fill);
        self.fill_sectors += sectors;
        let is_new = self.filling.insert((group, chunk, raw));
        assert!(is_new, "a run is filled by one at a time");
        self.hold(at.segment);
        Some(at)
    }

    /// A fill is on the device, and can be found from now on; or it failed.
    pub fn finish_fill(&mut self, chunk: ChunkId, run: CleanRun, is_written: bool) {
        self.fill_sectors -= run.len;
        let group = self.segment_mut(run.at.segment).group;
        let group = group.expect("a segment that is being filled is some group's");
        self.filling.remove(&(group, chunk, run.raw));
        if is_written {
            self.add_clean(chunk, run);
        }
        let _ = self.release(run.at.segment);
    }

    /// A segment for a group: a free one, or one that is reclaimed from who is most over its share. A group that has
    /// all that it may have gets its own only.
    fn take_free(&mut self, group: u32) -> Option<SegmentId> {
        if self.groups.is_full(group) {
            let id = self.reclaim_from(group)?;
            // More, if it may have less by now than it has.
            while self.groups.is_full(group)
                && let Some(more) = self.reclaim_from(group)
            {
                self.free.push_back(more);
            }
            return Some(id);
        }
        if let Some(id) = self.free.pop_front() {
            return Some(id);
        }
        let clean = self.fifos.iter().filter(|(_, fifo)| !fifo.is_empty());
        let others = self.groups.most_over(group, clean.map(|(group, _)| *group));
        others
            .into_iter()
            .find_map(|other| self.reclaim_from(other))
    }

    /// The same, for which fills are closed if need be: while they are open nobody can reclaim them, and who fills them may
    /// not come again. One with I/O under way is clean a moment later.
    fn take_free_or_filled(&mut self, group: u32) -> Option<SegmentId> {
        loop {
            if let Some(id) = self.take_free(group) {
                return Some(id);
            }
            let is_full = self.groups.is_full(group);
            let may_have = |fill: &Fill| match is_full {
                true => fill.group == group,
                false => {
                    let of = std::iter::once(fill.group);
                    !self.groups.most_over(group, of).is_empty()
                }
            };
            let longest_unused = self.fills.iter().position(may_have)?;
            let fill = self.fills.remove(longest_unused);
            let _ = self.release(fill.segment);
        }
    }

    /// A clean segment of a group: FIFO with a second chance, twice round at most, once to cool what was hot.
    fn reclaim_from(&mut self, group: u32) -> Option<SegmentId> {
        let count = self.fifos.get(&group)?.len();
        for _ in 0..count * 2 {
            let id = self.fifos.get_mut(&group)?.pop_front()?;
            let segment = self.segment_mut(id);
            if Mutation::ReclaimPinned.is_on() {
                segment.pins = 0;
            } else if segment.pins > 0 || segment.hot {
                Branch::ReclaimPassedOver.taken();
                segment.hot = false;
                self.fifos.entry(group).or_default().push_back(id);
                continue;
            }
            Branch::Reclaimed.taken();
            segment.state = State::Free;
            self.distrust(id);
            if let Some(group) = self.segment_mut(id).group.take() {
                self.groups.gave(group);
            }
            self.reclaimed += 1;
            return Some(id);
        }
        None
    }

    fn segment_mut(&mut self, id: SegmentId) -> &mut Segment {
        &mut self.segments[id.get() as usize]
    }
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::ChunkSeq;

    use super::*;

    const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
    const ID: CacheId = CacheId::from_bytes([3; 16]);
    const GEOMETRY: Geometry = Geometry {
        data_start: 1 << 20,
        segment_size: 64 << 10,
        segments: 4,
    };

    fn cache() -> Cache {
        Cache::new(ID, GEOMETRY, 2, Generation::new(1), &[])
    }

    fn chunk(n: u64) -> ChunkId {
        ChunkId {
            volume: VolumeId::from_bytes([1; 16]),
            epoch: Epoch::new(1),
            seq: ChunkSeq::new(n),
        }
    }

    /// The first `len` sectors of a chunk, at `at`.
    fn run(at: CacheLoc, len: u32) -> CleanRun {
        CleanRun { raw: 0, len, at }
    }

    #[test]
    fn headers_and_beginnings_of_segments_are_told_from_what_lies_between() {
        for segment in 0..GEOMETRY.segments {
            let begin = GEOMETRY.byte_of(CacheLoc {
                segment: SegmentId::new(segment),
                offset: 0,
            });
            assert!(GEOMETRY.begins_segment(begin));
            let header = GEOMETRY.page_byte(SegmentId::new(segment), 0);
            assert_eq!(GEOMETRY.segment_of_header(header), Some(begin));
            let page = GEOMETRY.page_byte(SegmentId::new(segment), 1);
            assert_eq!(GEOMETRY.segment_of_header(page), None);
            assert!(!GEOMETRY.begins_segment(header));
        }
        assert!(!GEOMETRY.begins_segment(0));
        assert_eq!(GEOMETRY.segment_of_header(0), None);
    }

    #[test]
    fn volume_of_a_group_that_has_all_it_may_have_gets_what_another_of_it_gives_up() {
        let geometry = Geometry {
            segments: 12,
            ..GEOMETRY
        };
        let mut cache = Cache::new(ID, geometry, 8, Generation::new(1), &[]);
        let limits = GroupLimits {
            space_max: Some(4),
            ..GroupLimits::default()
        };
        cache.set_group(1, limits);
        let volumes = [10, 11, 12, 13, 14].map(|n| VolumeId::from_bytes([n; 16]));
        let [giver, _, _, waiting, other] = volumes;
        for (volume, group) in [(giver, 1), (other, 2)] {
            assert_ne!(volume, waiting);
            cache.join_group(group, true);
        }
        cache.reserve_fill(1, chunk(1), 0, 8).unwrap();
        let open: Vec<_> = volumes[..3]
            .iter()
            .map(|volume| cache.open_for_writes(*volume, 1).unwrap().segment)
            .collect();
        assert_eq!(cache.open_for_writes(waiting, 1), Err(NoSpace::Busy));
        // Nor does one more of them make others give theirs up.
        let behind = VolumeId::from_bytes([15; 16]);
        assert!(cache.open_for_writes(behind, 1).is_err());
        assert!(cache.has_line_for(1) && !cache.has_line_for(2));
        cache.leave_line(behind);
        // Another group's volumes are not behind it.
        cache.open_for_writes(other, 2).unwrap();
        assert!(cache.release(open[0]));
        assert_eq!(cache.open_for_writes(giver, 1), Err(NoSpace::Busy));
        cache.open_for_writes(waiting, 1).unwrap();
        // And then the giver waits, until one of the others gives.
        assert_eq!(cache.open_for_writes(giver, 1), Err(NoSpace::Busy));
        assert!(cache.release(open[1]));
        cache.open_for_writes(giver, 1).unwrap();
        assert!(!cache.has_line());
    }

    #[test]
    fn dirty_cap_refuses_and_a_release_gives_back() {
        let mut cache = cache();
        let first = cache.open_for_writes(VOLUME, 0).unwrap();
        cache.open_for_writes(VOLUME, 0).unwrap();
        assert_eq!(cache.open_for_writes(VOLUME, 0), Err(NoSpace::DirtyCap));
        cache.hold(first.segment);
        assert!(!cache.release(first.segment));
        assert!(cache.release(first.segment));
        assert!(cache.open_for_writes(VOLUME, 0).is_ok());
    }

    #[test]
    fn volume_refused_a_segment_gets_the_next_before_who_asks_first() {
        let mut cache = cache();
        let other = VolumeId::from_bytes([2; 16]);
        let first = cache.open_for_writes(VOLUME, 0).unwrap();
        cache.open_for_writes(VOLUME, 0).unwrap();
        assert_eq!(cache.open_for_writes(other, 0), Err(NoSpace::DirtyCap));
        assert!(cache.has_line());
        assert!(cache.release(first.segment));
        assert_eq!(cache.open_for_writes(VOLUME, 0), Err(NoSpace::DirtyCap));
        let second = cache.open_for_writes(other, 0).unwrap();
        assert!(cache.release(second.segment));
        cache.open_for_writes(VOLUME, 0).unwrap();
        assert!(!cache.has_line());
    }

    #[test]
    fn group_that_the_store_takes_nothing_from_leaves_the_other_its_part() {
        let geometry = Geometry {
            segments: 16,
            ..GEOMETRY
        };
        let mut cache = Cache::new(ID, geometry, 8, Generation::new(1), &[]);
        let other = VolumeId::from_bytes([2; 16]);
        cache.join_group(1, true);
        cache.join_group(2, true);
        let hung = std::iter::from_fn(|| cache.open_for_writes(VOLUME, 1).ok()).count();
        assert_eq!(hung, 5);
        // It stands in the line, before the others, for good.
        assert!(cache.has_line() && !cache.has_line_for(2));
        for _ in 0..20 {
            let taken = [(); 3].map(|()| cache.open_for_writes(other, 2).unwrap().segment);
            assert_eq!(cache.open_for_writes(other, 2), Err(NoSpace::DirtyCap));
            cache.leave_line(other);
            assert!(taken.iter().all(|segment| cache.release(*segment)));
        }
        assert_eq!(cache.dirty_bytes_of_group(2), 0);
        assert_eq!(cache.dirty_bytes_of_group(1), 5 * (64 << 10));
        cache.leave_group(2, true);
        assert!(cache.open_for_writes(VOLUME, 1).is_ok());
    }

    #[test]
    fn tenant_that_reads_everything_pushes_out_its_own_once_it_has_its_share() {
        let geometry = Geometry {
            segments: 16,
            ..GEOMETRY
        };
        let mut cache = Cache::new(ID, geometry, 4, Generation::new(1), &[]);
        let limits = GroupLimits {
            reserve: 6,
            ..GroupLimits::default()
        };
        cache.set_group(3, limits);
        (1..4).for_each(|group| cache.join_group(group, false));
        // A segment each.
        let fill = |cache: &mut Cache, group, n| {
            let at = cache.reserve_fill(group, chunk(n), 0, 120).unwrap();
            cache.finish_fill(chunk(n), run(at, 120), true);
        };
        for n in 0..4 {
            fill(&mut cache, 1, 100 + n);
        }
        for n in 0..6 {
            fill(&mut cache, 3, 300 + n);
        }
        for n in 0..1000 {
            fill(&mut cache, 2, 1000 + n);
        }
        let held = |cache: &Cache, from: u64, count: u64| {
            let group = u32::try_from(from / 100).unwrap();
            let of_group = cache.clean(group);
            let held = (from..from + count).filter(|n| of_group.holds(&chunk(*n), 0, 120));
            held.count()
        };
        // Below its share, and reserved.
        assert_eq!((held(&cache, 100, 4), held(&cache, 300, 6)), (4, 6));
        // Who comes gets its part back from it.
        fill(&mut cache, 1, 150);
        assert_eq!((held(&cache, 100, 4), held(&cache, 150, 1)), (4, 1));
        assert_eq!(held(&cache, 300, 6), 6);
    }

    #[test]
    fn group_with_a_limit_reclaims_its_own_though_there_is_room() {
        let geometry = Geometry {
            segments: 16,
            ..GEOMETRY
        };
        let mut cache = Cache::new(ID, geometry, 8, Generation::new(1), &[]);
        let limits = GroupLimits {
            space_max: Some(5),
            ..GroupLimits::default()
        };
        cache.set_group(1, limits);
        cache.join_group(1, true);
        for n in 0..50 {
            let at = cache.reserve_fill(1, chunk(n), 0, 120).unwrap();
            cache.finish_fill(chunk(n), run(at, 120), true);
            let opened = cache.open_for_writes(VOLUME, 1).unwrap();
            assert!(cache.release(opened.segment));
            assert!(cache.counts().total - cache.counts().free <= 5);
        }
        let less = GroupLimits {
            space_max: Some(4),
            ..limits
        };
        cache.set_group(1, less);
        let opened = cache.open_for_writes(VOLUME, 1).unwrap();
        assert!(cache.release(opened.segment));
        assert_eq!(cache.bytes_of_group(1), 4 * (64 << 10));
    }

    #[test]
    fn segment_of_recovery_counts_for_the_group_that_takes_it_up() {
        let found = (SegmentId::new(1), Generation::new(1));
        let mut cache = Cache::new(ID, GEOMETRY, 2, Generation::new(2), &[found]);
        cache.assign(found.0, 7);
        cache.assign(found.0, 7);
        assert_eq!(cache.dirty_bytes_of_group(7), 64 << 10);
        assert!(cache.release(found.0));
        assert_eq!(cache.dirty_bytes_of_group(7), 0);
        cache.assign(found.0, 7);
        assert_eq!(cache.dirty_bytes_of_group(7), 0);
    }

    #[test]
    fn volume_evicted_leaves_what_is_dirty_being_read_or_of_others() {
        let other = ChunkId {
            volume: VolumeId::from_bytes([2; 16]),
            ..chunk(9)
        };
        let geometry = Geometry {
            segments: 8,
            ..GEOMETRY
        };
        let mut cache = Cache::new(ID, geometry, 2, Generation::new(1), &[]);
        let mut filled = |chunks: &[ChunkId]| {
            let at = cache.open_for_writes(VOLUME, 0).unwrap().segment;
            for (n, chunk) in (0..).zip(chunks) {
                let (raw, len) = (0, 8);
                let at = CacheLoc {
                    segment: at,
                    offset: n * 8,
                };
                cache.add_clean(*chunk, CleanRun { raw, len, at });
            }
            assert!(cache.release(at));
            at
        };
        filled(&[chunk(1), chunk(2)]);
        filled(&[chunk(3), other]);
        let read = filled(&[chunk(4)]);
        cache.pin(read);
        let dirty = cache.open_for_writes(VOLUME, 0).unwrap().segment;
        assert_eq!((cache.counts().free, cache.counts().clean), (4, 3));
        assert_eq!(cache.evict(0, VOLUME), 4 * 8 * 512);
        assert_eq!((cache.counts().free, cache.counts().clean), (5, 2));
        assert_eq!(cache.counts().dirty, 1);
        assert!(cache.clean(0).holds(&other, 0, 8));
        assert!(!cache.clean(0).holds(&chunk(1), 0, 1));
        assert_eq!(cache.evict(0, VOLUME), 0);
        // Everything can be had again, each segment once.
        cache.unpin(read);
        assert!(cache.release(dirty));
        let mut taken = Vec::new();
        while let Some(segment) = cache.take_free(0) {
            cache.open(segment, State::Fill, 0);
            taken.push(segment);
        }
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), 8);
    }

    #[test]
    fn fills_under_way_past_their_bound_are_left_out() {
        let geometry = Geometry {
            segment_size: 8 << 20,
            segments: 16,
            ..GEOMETRY
        };
        let mut cache = Cache::new(ID, geometry, 2, Generation::new(1), &[]);
        let at = cache.reserve_fill(0, chunk(1), 0, 128).unwrap();
        let more = (1..1000).map_while(|n| cache.reserve_fill(0, chunk(1), n * 128, 128));
        assert_eq!(more.count(), 511);
        cache.finish_fill(chunk(1), run(at, 128), false);
        assert!(cache.reserve_fill(0, chunk(1), 0, 128).is_some());
    }

    #[test]
    fn writer_gets_what_was_being_filled_if_all_is_the_longest_unused_first() {
        let geometry = Geometry {
            segments: 8,
            ..GEOMETRY
        };
        let mut cache = Cache::new(ID, geometry, 5, Generation::new(1), &[]);
        for group in 0..8_u32 {
            let filled = chunk(group.into());
            let at = cache.reserve_fill(group, filled, 0, 8).unwrap();
            cache.finish_fill(filled, run(at, 8), true);
        }
        assert_eq!((cache.counts().free, cache.counts().filling), (0, 8));
        cache.open_for_writes(VOLUME, 0).unwrap();
        assert_eq!(cache.counts().filling, 7);
        let at = cache.reserve_fill(1, chunk(9), 0, 8).unwrap();
        for _ in 1..5 {
            cache.open_for_writes(VOLUME, 0).unwrap();
        }
        assert_eq!(cache.counts().filling, 3);
        cache.finish_fill(chunk(9), run(at, 8), true);
        let held = (0..8).filter(|group| cache.clean(*group).chunks() > 0);
        assert!(held.eq([1, 6, 7]));
    }

    #[test]
    fn writer_gets_what_is_being_filled_once_that_has_ended_and_nothing_that_is_reserved() {
        let geometry = Geometry {
            segments: 16,
            ..GEOMETRY
        };
        let mut cache = Cache::new(ID, geometry, 10, Generation::new(1), &[]);
        let limits = GroupLimits {
            reserve: 1,
            ..GroupLimits::default()
        };
        cache.set_group(1, limits);
        cache.join_group(1, false);
        for _ in 0..8 {
            cache.open_for_writes(VOLUME, 0).unwrap();
        }
        let places: Vec<_> = (1..9_u32)
            .map(|group| {
                cache
                    .reserve_fill(group, chunk(group.into()), 0, 8)
                    .unwrap()
            })
            .collect();
        assert_eq!(cache.open_for_writes(VOLUME, 0), Err(NoSpace::Busy));
        for (group, at) in (1..).zip(places).take(2) {
            cache.finish_fill(chunk(group), run(at, 8), true);
        }
        cache.open_for_writes(VOLUME, 0).unwrap();
        assert_eq!(cache.open_for_writes(VOLUME, 0), Err(NoSpace::Busy));
        assert!(cache.clean(1).holds(&chunk(1), 0, 8));
        assert_eq!(cache.counts().filling, 1);
    }

    #[test]
    fn run_being_filled_is_told_until_its_fill_ends_well_or_not() {
        let mut cache = cache();
        for is_written in [false, true] {
            assert!(!cache.is_filling(0, chunk(1), 0));
            let at = cache.reserve_fill(0, chunk(1), 0, 8).unwrap();
            assert!(cache.is_filling(0, chunk(1), 0));
            assert!(!cache.is_filling(0, chunk(1), 8) && !cache.is_filling(0, chunk(2), 0));
            cache.finish_fill(chunk(1), run(at, 8), is_written);
            assert_eq!(cache.clean(0).holds(&chunk(1), 0, 8), is_written);
        }
        assert!(!cache.is_filling(0, chunk(1), 0));
    }

    #[test]
    fn segment_parted_with_is_clean_unless_its_data_must_stay() {
        let mut cache = cache();
        let [one, two] = [(); 2].map(|()| cache.open_for_writes(VOLUME, 0).unwrap().segment);
        cache.hold(one);
        cache.hold(two);
        cache.part_with(one, true);
        cache.part_with(two, false);
        assert_eq!(cache.counts().dirty, 1);
        assert!(cache.release(one));
        assert_eq!(cache.counts().dirty, 0);
    }

    #[test]
    fn dirty_segments_are_never_reclaimed_by_fills() {
        let mut cache = cache();
        let dirty = [
            cache.open_for_writes(VOLUME, 0).unwrap().segment,
            cache.open_for_writes(VOLUME, 0).unwrap().segment,
        ];
        for _ in 0..50 {
            let at = cache
                .reserve_fill(0, chunk(1), 0, 112)
                .expect("two segments are left for fills");
            assert!(!dirty.contains(&at.segment));
            cache.finish_fill(chunk(1), run(at, 112), false);
        }
        assert_eq!(cache.counts().dirty, 2);
    }

    #[test]
    fn pinned_segment_is_not_reclaimed_and_its_data_stay_findable() {
        let mut cache = Cache::new(ID, GEOMETRY, 1, Generation::new(1), &[]);
        let at = cache.reserve_fill(0, chunk(1), 0, 120).unwrap();
        cache.finish_fill(chunk(1), run(at, 120), true);
        cache.pin(at.segment);
        for _ in 0..50 {
            let other = cache.reserve_fill(0, chunk(2), 0, 120).unwrap();
            cache.finish_fill(chunk(2), run(other, 120), false);
        }
        assert!(cache.clean(0).holds(&chunk(1), 0, 120));
        cache.unpin(at.segment);
        for _ in 0..50 {
            let other = cache.reserve_fill(0, chunk(2), 0, 120).unwrap();
            cache.finish_fill(chunk(2), run(other, 120), false);
        }
        assert!(!cache.clean(0).holds(&chunk(1), 0, 120));
        assert_eq!(cache.clean(0).chunks(), 0);
    }

    #[test]
    fn generations_of_reused_segments_differ() {
        let mut cache = Cache::new(ID, GEOMETRY, 3, Generation::new(7), &[]);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..40 {
            let opened = cache.open_for_writes(VOLUME, 0).unwrap();
            assert!(seen.insert(opened.generation));
            assert!(cache.release(opened.segment));
        }
    }

    #[test]
    fn pages_and_data_of_a_segment_do_not_leave_it() {
        let last = SegmentId::new(3);
        assert_eq!(
            GEOMETRY.page_byte(last, 0),
            (1 << 20) + 4 * (64 << 10) - 4096
        );
        assert_eq!(
            GEOMETRY.byte_of(CacheLoc {
                segment: last,
                offset: 0
            }),
            (1 << 20) + 3 * (64 << 10)
        );
    }

    /// A cache with a table, and a filled segment of each of these chunks, described.
    fn described(chunks: &[u64]) -> (Cache, Vec<CleanSegment>) {
        let mut cache = cache();
        cache.describe_in(IndexTable::of_this_process(GEOMETRY.segments).unwrap());
        for n in chunks {
            let at = cache.reserve_fill(7, chunk(*n), 0, 120).unwrap();
            cache.finish_fill(chunk(*n), run(at, 120), true);
        }
        cache.close_fills();
        let clean = cache.take_undescribed(usize::MAX);
        for clean in &clean {
            cache.described(clean.segment, clean.generation);
        }
        (cache, clean)
    }

    /// The next daemon's, with the same table.
    fn next(before: &Cache) -> Cache {
        let mut table = IndexTable::of_this_process(GEOMETRY.segments).unwrap();
        for (segment, generation) in before.all_described() {
            table.set(segment, generation);
        }
        let mut cache = Cache::new(ID, GEOMETRY, 2, Generation::new(100), &[]);
        cache.describe_in(table);
        cache
    }

    #[test]
    fn what_was_described_is_clean_again_where_it_was_and_is_reclaimed_as_ever() {
        let (before, clean) = described(&[1, 2]);
        let mut cache = next(&before);
        assert_eq!(cache.take_up(clean.clone()), 2 * 120 * 512);
        for n in [1, 2] {
            let (mut was, mut is) = (None, None);
            before
                .clean(7)
                .visit(&chunk(n), 0, 120, |_, _, at| was = at);
            cache.clean(7).visit(&chunk(n), 0, 120, |_, _, at| is = at);
            assert!(is.is_some() && is == was);
        }
        assert_eq!(cache.counts().free, 2);
        assert_eq!(
            cache.bytes_of_group(7),
            2 * u64::from(GEOMETRY.segment_size)
        );
        // Twice is once.
        assert_eq!(cache.take_up(clean), 0);
        for n in 3..7 {
            let at = cache.reserve_fill(7, chunk(n), 0, 120).unwrap();
            cache.finish_fill(chunk(n), run(at, 120), true);
        }
        assert!(
            [1, 2]
                .iter()
                .all(|n| !cache.clean(7).holds(&chunk(*n), 0, 120))
        );
        assert!(
            [4, 5, 6]
                .iter()
                .all(|n| cache.clean(7).holds(&chunk(*n), 0, 120))
        );
    }

    #[test]
    fn segment_begun_anew_is_not_what_was_described_though_nobody_says_so_again() {
        let (mut before, clean) = described(&[1, 2, 3, 4]);
        assert_eq!(before.all_described().len(), 4);
        let opened = before.open_for_writes(VOLUME, 7).unwrap();
        // And one that is filled, of which nothing was told yet.
        let at = before.reserve_fill(7, chunk(5), 0, 120).unwrap();
        before.finish_fill(chunk(5), run(at, 120), true);
        let mut cache = next(&before);
        assert_eq!(cache.take_up(clean.clone()), 2 * 120 * 512);
        let gone = |clean: &&CleanSegment| [opened.segment, at.segment].contains(&clean.segment);
        for of_gone in clean.iter().filter(gone).flat_map(|clean| &clean.runs) {
            assert!(!cache.clean(7).holds(&of_gone.chunk, 0, 120));
        }
        // Nor is it once it holds something else: the record is to be of its generation.
        before.close_fills();
        for clean in before.take_undescribed(usize::MAX) {
            before.described(clean.segment, clean.generation);
        }
        let mut cache = next(&before);
        assert_eq!(cache.take_up(clean), 2 * 120 * 512);
    }

    #[test]
    fn segment_that_changes_while_its_record_is_written_is_not_described_by_it() {
        let mut cache = cache();
        cache.describe_in(IndexTable::of_this_process(GEOMETRY.segments).unwrap());
        let fill = |cache: &mut Cache, chunks: [u64; 2]| {
            for n in chunks {
                let at = cache.reserve_fill(7, chunk(n), 0, 50).unwrap();
                cache.finish_fill(chunk(n), run(at, 50), true);
            }
            cache.close_fills();
        };
        let other = ChunkId {
            volume: VolumeId::from_bytes([2; 16]),
            ..chunk(9)
        };
        fill(&mut cache, [1, 2]);
        let told = cache.take_undescribed(usize::MAX);
        cache.distrust(told[0].segment);
        cache.described(told[0].segment, told[0].generation);
        assert_eq!(cache.all_described(), []);
        assert_eq!(cache.take_undescribed(usize::MAX), []);
        // What is left of one is described anew.
        let at = cache.reserve_fill(7, other, 0, 8).unwrap();
        cache.finish_fill(other, run(at, 8), true);
        fill(&mut cache, [3, 4]);
        let told = cache.take_undescribed(usize::MAX);
        let told = told
            .iter()
            .find(|clean| clean.segment == at.segment)
            .unwrap();
        assert_eq!(told.runs.len(), 3);
        cache.evict(7, VOLUME);
        cache.described(told.segment, told.generation);
        assert!(!cache.is_described(told.segment, told.generation));
        let left = cache.take_undescribed(usize::MAX);
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].runs.len(), 1);
        assert_eq!(left[0].runs[0].chunk, other);
        cache.described(told.segment, told.generation);
        assert!(cache.is_described(told.segment, told.generation));
    }

    #[test]
    fn nothing_is_described_of_a_device_that_failed_a_sync_or_of_segments_that_recovery_took() {
        let (mut before, clean) = described(&[1, 2]);
        let mut cache = next(&before);
        let dirty = [(clean[0].segment, clean[0].generation)];
        let mut table = IndexTable::of_this_process(GEOMETRY.segments).unwrap();
        for (segment, generation) in before.all_described() {
            table.set(segment, generation);
        }
        let mut with_dirty = Cache::new(ID, GEOMETRY, 2, Generation::new(100), &dirty);
        with_dirty.describe_in(table);
        assert_eq!(with_dirty.take_up(clean.clone()), 120 * 512);
        before.put_in_doubt(5);
        assert_eq!(before.all_described(), []);
        cache.put_in_doubt(5);
        assert_eq!(cache.take_up(clean), 0);
    }

    fn of_term(epoch: u32) -> ChunkId {
        ChunkId {
            epoch: Epoch::new(epoch),
            ..chunk(1)
        }
    }

    fn segments_of(clean: &[CleanSegment]) -> BTreeMap<SegmentId, (u32, Generation)> {
        let of = |clean: &CleanSegment| (clean.segment, (clean.group, clean.generation));
        clean.iter().map(of).collect()
    }

    fn fill(cache: &mut Cache, group: u32, chunk: ChunkId) {
        let at = cache.reserve_fill(group, chunk, 0, 8).unwrap();
        cache.finish_fill(chunk, run(at, 8), true);
    }

    #[test]
    fn term_that_begins_and_is_known_ends_what_is_clean_of_its_group_and_one_that_is_new_does_not()
    {
        let mut cache = cache();
        cache.begin_term(7, VOLUME, Epoch::new(3), true);
        for (group, epoch) in [(7, 1), (7, 2), (7, 3), (8, 3)] {
            fill(&mut cache, group, of_term(epoch));
        }
        let holds = |cache: &Cache, group| {
            [1, 2, 3].map(|epoch| cache.clean(group).holds(&of_term(epoch), 0, 8))
        };
        cache.begin_term(7, VOLUME, Epoch::new(4), true);
        // Readers: one that looked before that, and one after.
        for epoch in [3, 4] {
            cache.begin_term(7, VOLUME, Epoch::new(epoch), false);
        }
        assert_eq!(holds(&cache, 7), [true; 3]);
        fill(&mut cache, 7, of_term(4));
        cache.begin_term(7, VOLUME, Epoch::new(4), true);
        assert_eq!(holds(&cache, 7), [false; 3]);
        assert_eq!(holds(&cache, 8), [false, false, true]);
    }

    #[test]
    fn term_that_begins_and_was_described_ends_what_was_described_of_its_group_whenever_that_is_known()
     {
        let mut before = cache();
        before.describe_in(IndexTable::of_this_process(GEOMETRY.segments).unwrap());
        for group in [7, 8] {
            fill(&mut before, group, of_term(5));
        }
        before.close_fills();
        let clean = before.take_undescribed(usize::MAX);
        for clean in &clean {
            before.described(clean.segment, clean.generation);
        }
        let expected = Expected {
            newest: [7, 8].map(|group| ((group, VOLUME), Epoch::new(5))).into(),
            segments: segments_of(&clean),
        };
        let holds = |cache: &Cache| [7, 8].map(|group| cache.clean(group).holds(&of_term(5), 0, 8));
        for (epoch, stays) in [(6, true), (5, false)] {
            for is_early in [false, true] {
                let mut cache = Cache::new(ID, GEOMETRY, 2, Generation::new(100), &[]);
                cache.describe_in(IndexTable::of_this_process(GEOMETRY.segments).unwrap());
                let begin =
                    |cache: &mut Cache| cache.begin_term(7, VOLUME, Epoch::new(epoch), true);
                if is_early {
                    begin(&mut cache);
                }
                assert_eq!(cache.all_described(), []);
                cache.expect(expected.clone());
                if !is_early {
                    begin(&mut cache);
                }
                // Of the daemon after this one, too.
                let mut after = next(&cache);
                for cache in [&mut cache, &mut after] {
                    cache.take_up(clean.clone());
                    assert_eq!(holds(cache), [stays, true], "{epoch} {is_early}");
                }
            }
        }
    }

    #[test]
    fn segment_begun_before_it_is_known_what_was_described_is_not_believed() {
        let (_, clean) = described(&[1, 2, 3, 4]);
        let mut cache = Cache::new(ID, GEOMETRY, 2, Generation::new(100), &[]);
        cache.describe_in(IndexTable::of_this_process(GEOMETRY.segments).unwrap());
        let opened = cache.open_for_writes(VOLUME, 7).unwrap();
        let at = cache.reserve_fill(7, chunk(9), 0, 120).unwrap();
        cache.finish_fill(chunk(9), run(at, 120), true);
        cache.evict(7, VOLUME);
        let expected = Expected {
            newest: BTreeMap::new(),
            segments: segments_of(&clean),
        };
        cache.expect(expected);
        let described = cache.all_described();
        assert_eq!(described.len(), 2);
        let begun = [opened.segment, at.segment];
        assert!(described.iter().all(|(id, _)| !begun.contains(id)));
        assert_eq!(cache.take_up(clean), 2 * 120 * 512);
    }
}
