//! Recovery: what the record pages say is on the cache device and perhaps not in the store.
//!
//! Reads segment headers and record pages, never data: a record page was written after the data it
//! names had been synced, so a page that passes its checksum vouches for them.
//!
//! A flush round writes its pages in any order. So a crash inside a round can leave a later write's
//! record without an earlier one's; no flush that covers either was acknowledged. Such records are
//! cut off ([`Recovered::cut`]), for the volume must stay a prefix of its writes.
//!
//! A gap further back is no crash's: headers and pages say what was durable before them. Then the device has lost what a flush
//! had promised, and the volume is refused, unless somebody gives up what came after the gap.
//!
//! If only the daemon died, not the host, the journal holds the records that had no page yet. Their
//! data are on the device, perhaps not stable: recovery does for them what a flush would have done. After a sync that failed
//! they may not be: then the journal says what is to be missed, as headers and pages do of what was flushed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::ops::Range;

use quarry_objfmt::page::{
    RECORDS_PER_PAGE, Record, RecordBody, RecordPage, SegmentHeader, SegmentKind,
};
use quarry_objfmt::{Epoch, FormatError, Generation, SegmentId, TenantName, VolumeId, WriteSeq};

use crate::segment::{Geometry, PAGE_SIZE};
use crate::{AlignedBuf, BlockDevice, Branch, Journals, Mutation, Voided};

/// A record page found on the device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecoveredPage {
    /// Its index in the segment, from 1.
    pub index: u32,
    /// What was durable before it was written, if it says so.
    pub durable: Option<WriteSeq>,
    /// Its records.
    pub records: Vec<Record>,
}

/// A segment that was open for writes or unsent at the crash.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecoveredSegment {
    /// Which.
    pub segment: SegmentId,
    /// Its generation.
    pub generation: Generation,
    /// The epoch in which it was opened.
    pub epoch: Epoch,
    /// Whose volume's, if it says so.
    pub tenant: Option<TenantName>,
    /// What was durable before it was opened, if it says so.
    pub durable: Option<WriteSeq>,
    /// Its record pages, in order.
    pub pages: Vec<RecoveredPage>,
}

/// What the device holds of one volume.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Recovered {
    /// The segments, by position.
    pub segments: Vec<RecoveredSegment>,
    /// What the journal of a daemon that died in this boot says; some of it may be in pages too.
    pub journal: Vec<(SegmentId, Record)>,
    /// What the journal of one says whose device failed a sync.
    pub voided: Option<Voided>,
    /// Whose volume it is by the segments that say so: one tenant, unless one's store was copied to another's.
    pub tenants: BTreeSet<TenantName>,
}

/// Why what the device holds of a volume is not taken up.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// It holds less than it had made durable.
    #[error("write {missing} is missing, and all up to {durable} were durable")]
    Lost {
        /// The first write that is not there.
        missing: WriteSeq,
        /// The newest that is known to have been durable.
        durable: WriteSeq,
    },
    /// It failed a sync, and what it has of the writes that were acknowledged is not to be trusted.
    #[error("write {missing} is in doubt, and all up to {acknowledged} were acknowledged")]
    InDoubt {
        /// The first write that is not known to be there.
        missing: WriteSeq,
        /// The newest that was acknowledged.
        acknowledged: WriteSeq,
    },
    /// It cannot be read, written or synced.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What [`scan`] found.
#[derive(Debug)]
pub struct Scan {
    /// By volume.
    pub volumes: BTreeMap<VolumeId, Recovered>,
    /// A generation newer than any on the device.
    pub next_generation: Generation,
}

impl Default for Scan {
    /// An empty device.
    fn default() -> Self {
        Self {
            volumes: BTreeMap::new(),
            next_generation: Generation::new(1),
        }
    }
}

impl Scan {
    /// Adds what the journals say of the segments that were found.
    ///
    /// # Errors
    /// If a journal is there and cannot be read.
    pub fn add_journals(&mut self, journals: &Journals) -> io::Result<()> {
        for (volume, found) in &mut self.volumes {
            let generations: BTreeMap<SegmentId, Generation> = found
                .segments
                .iter()
                .map(|s| (s.segment, s.generation))
                .collect();
            let newest = found.segments.iter().map(|s| s.epoch).max();
            let newest = newest.unwrap_or_default();
            let generation_of = |id| generations.get(&id).copied();
            found.journal = journals.read(*volume, newest, generation_of)?;
            found.voided = journals.read_voided(*volume, newest, generation_of)?;
        }
        Ok(())
    }
}

impl Recovered {
    /// Whether it is of the volume that has its id in this tenant's store.
    #[must_use]
    pub fn is_of(&self, tenant: &TenantName) -> bool {
        self.tenants.iter().all(|of| of == tenant)
    }

    /// Parts with the segments that were opened before `since`, and the journal's records in them.
    #[must_use]
    pub fn split_off_before(&mut self, since: Epoch) -> Self {
        let (kept, old): (Vec<_>, Vec<_>) = self.segments.drain(..).partition(|s| s.epoch >= since);
        let is_kept = |id: SegmentId| kept.iter().any(|s| s.segment == id);
        let (journal, old_journal) = self.journal.drain(..).partition(|(id, _)| is_kept(*id));
        if !old.is_empty() {
            Branch::StaleSplitOff.taken();
        }
        self.segments = kept;
        self.journal = journal;
        let (voided, old_voided) = match self.voided {
            Some(voided) if voided.epoch < since => (None, Some(voided)),
            voided => (voided, None),
        };
        self.voided = voided;
        Self {
            segments: old,
            journal: old_journal,
            voided: old_voided,
            tenants: self.tenants.clone(),
        }
    }

    /// Bytes of all data that any record names.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        let data = |r: &Record| match r.body {
            RecordBody::Data { .. } => u64::from(r.len) * 512,
            RecordBody::Zero | RecordBody::Discard => 0,
        };
        let journal = self.journal.iter();
        let mut journal: HashMap<WriteSeq, u64> = journal.map(|(_, r)| (r.seq, data(r))).collect();
        let pages = self.segments.iter().flat_map(|s| &s.pages);
        let in_pages = pages.flat_map(|p| &p.records).map(|r| {
            // A record may be in both.
            journal.remove(&r.seq);
            data(r)
        });
        in_pages.sum::<u64>() + journal.values().sum::<u64>()
    }

    /// Every record newer than `stored`, oldest first, with its segment: what the store lacks.
    #[must_use]
    pub fn unsent(&self, stored: WriteSeq) -> Vec<(SegmentId, Record)> {
        let mut all: Vec<_> = self
            .segments
            .iter()
            .flat_map(|s| {
                s.pages
                    .iter()
                    .flat_map(|p| &p.records)
                    .map(|r| (s.segment, *r))
            })
            .chain(self.journal.iter().copied())
            .filter(|(_, r)| r.seq > stored)
            .collect();
        all.sort_by_key(|(_, r)| r.seq);
        all.dedup_by_key(|(_, r)| r.seq);
        all
    }

    /// Whether writes newer than `stored` are here, or were.
    #[must_use]
    pub fn has_more_than(&self, stored: WriteSeq) -> bool {
        let acknowledged = self.voided.map(|voided| voided.acknowledged);
        acknowledged.max(Some(self.durable())) > Some(stored) || !self.unsent(stored).is_empty()
    }

    /// Whether any writes are here, or were, and were acknowledged: of a history that was left, nobody knows which were sent.
    #[must_use]
    pub fn has_any(&self) -> bool {
        self.voided.is_some() || !self.unsent(WriteSeq::ZERO).is_empty()
    }

    /// Gives the journal's records that no page holds and the store lacks pages of their own, as
    /// the flush would have done that the daemon did not live to see. Their room was set aside when
    /// the writes were placed.
    ///
    /// The order: sync the data, write the pages; the caller syncs once more. *Killed in between: the journal is still
    /// there, and the pages that are written are found the next time.*
    fn write_journal(
        &mut self,
        device: &dyn BlockDevice,
        volume: VolumeId,
        stored: WriteSeq,
    ) -> io::Result<()> {
        let in_pages: BTreeSet<WriteSeq> = self
            .segments
            .iter()
            .flat_map(|s| s.pages.iter().flat_map(|p| &p.records))
            .map(|r| r.seq)
            .collect();
        let mut missing: Vec<(SegmentId, Record)> = std::mem::take(&mut self.journal);
        missing.retain(|(_, r)| r.seq > stored && !in_pages.contains(&r.seq));
        if missing.is_empty() {
            return Ok(());
        }
        Branch::JournalPaged.taken();
        missing.sort_by_key(|(_, r)| r.seq);
        // Before the pages that name them.
        device.sync()?;
        for segment in &mut self.segments {
            let of_segment = missing.iter().filter(|(id, _)| *id == segment.segment);
            let records: Vec<Record> = of_segment.map(|(_, r)| *r).collect();
            let pages = segment.pages_for(&records, device.geometry().segment_size);
            for page in pages {
                segment.write(&page, device, volume)?;
                segment.pages.push(page);
            }
            segment.pages.sort_by_key(|page| page.index);
        }
        Ok(())
    }

    /// Cuts off all records behind the first gap after `stored`, here and on the device, so that a
    /// second crash cannot find them again among the writes that will take their numbers. Returns
    /// how many were cut. Done before the volume serves; a crash in between repeats it, with the
    /// same gap. With `give_up` also if the gap is before what was durable, or what was acknowledged before a sync failed.
    ///
    /// # Errors
    /// [`CutError::Lost`] or [`CutError::InDoubt`], and nothing was changed; or if a page cannot be written or synced.
    pub fn cut(
        &mut self,
        device: &dyn BlockDevice,
        volume: VolumeId,
        stored: WriteSeq,
        give_up: bool,
    ) -> Result<usize, CutError> {
        let (durable, mut last) = (self.durable(), self.end_of_row(stored));
        if last < durable && !give_up {
            Branch::LossRefused.taken();
            let missing = last.next();
            return Err(CutError::Lost { missing, durable });
        }
        let voided = self.voided.filter(|_| !Mutation::ForgetDoubt.is_on());
        let acknowledged = voided.map_or(last, |voided| voided.acknowledged);
        if last < acknowledged {
            let missing = last.next();
            if !give_up {
                Branch::DoubtRefused.taken();
                return Err(CutError::InDoubt {
                    missing,
                    acknowledged,
                });
            }
            Branch::DoubtGivenUp.taken();
            tracing::error!(%volume, %missing, %acknowledged, "the cache device failed a sync: what had been acknowledged and not flushed is given up");
        }
        if !self.journal.is_empty() {
            self.write_journal(device, volume, stored)?;
            // What had no room for its page is a gap, too.
            last = self.end_of_row(stored);
        }
        if last < durable {
            let missing = last.next();
            tracing::error!(%volume, %missing, %durable, "the cache device has lost what was flushed: what came after it is given up");
            // Before anything says that no more was durable: of that the journal's pages may be the newest.
            device.sync()?;
        }
        let mut cut = 0;
        for segment in &mut self.segments {
            // It is not to be missed again.
            if segment.durable.is_some_and(|durable| durable > last) {
                segment.durable = Some(last);
                segment.write_header(SegmentKind::Write, device, volume)?;
            }
            let mut pages = std::mem::take(&mut segment.pages);
            for page in &mut pages {
                let before = page.records.len();
                page.records.retain(|r| r.seq <= last);
                let is_cut = page.records.len() != before;
                if is_cut {
                    Branch::GapCut.taken();
                    cut += before - page.records.len();
                }
                let is_missed = page.durable.is_some_and(|durable| durable > last);
                if is_missed {
                    Branch::LossGivenUp.taken();
                    page.durable = Some(last);
                }
                if (is_cut || is_missed) && !Mutation::LeaveWhatWasCut.is_on() {
                    segment.write(page, device, volume)?;
                }
            }
            segment.pages = pages;
        }
        // Also with nothing cut: the daemon may have died before a page that was found became
        // stable, and from here on it counts as durable.
        device.sync()?;
        Ok(cut)
    }

    /// The newest write that any header or page says was durable.
    fn durable(&self) -> WriteSeq {
        let of_segment = |segment: &RecoveredSegment| {
            let pages = segment.pages.iter().map(|page| page.durable);
            pages.chain([segment.durable]).max().flatten()
        };
        self.segments
            .iter()
            .filter_map(of_segment)
            .max()
            .unwrap_or_default()
    }

    /// The last write before the first gap after `stored`.
    fn end_of_row(&self, stored: WriteSeq) -> WriteSeq {
        let mut last = stored;
        for (_, record) in self.unsent(stored) {
            if record.seq != last.next() && !Mutation::IgnoreGap.is_on() {
                break;
            }
            last = record.seq;
        }
        last
    }

    /// Marks the given segments on the device as holding nothing unsent. Only then may others' data be put there.
    ///
    /// # Errors
    /// If a header cannot be written or synced: any of them may be found as it was.
    pub fn forget(
        device: &dyn BlockDevice,
        volume: VolumeId,
        segments: &[RecoveredSegment],
    ) -> io::Result<()> {
        if segments.is_empty() {
            return Ok(());
        }
        for segment in segments {
            segment.write_header(SegmentKind::Fill, device, volume)?;
        }
        device.sync()
    }
}

impl RecoveredSegment {
    /// Pages for `records`, at the first places that no page has. Records that would not fit
    /// between those and the data are left out: a gap, behind which is cut off.
    fn pages_for(&self, records: &[Record], segment_size: u32) -> Vec<RecoveredPage> {
        let in_pages = self.pages.iter().flat_map(|p| &p.records);
        let data_end = in_pages.chain(records).map(data_end).max().unwrap_or(0);
        let room = u64::from(segment_size) - data_end.min(segment_size.into());
        let places = 1..u32::try_from(room / PAGE_SIZE).unwrap_or(0);
        let free = places.filter(|index| self.pages.iter().all(|p| p.index != *index));
        let pages = free
            .zip(records.chunks(RECORDS_PER_PAGE))
            .map(|(index, records)| RecoveredPage {
                index,
                // A segment of an older build has no pages that say so.
                durable: None,
                records: records.to_vec(),
            });
        let pages: Vec<_> = pages.collect();
        if pages.len() < records.len().div_ceil(RECORDS_PER_PAGE) {
            Branch::JournalWithoutRoom.taken();
        }
        pages
    }

    fn write_header(
        &self,
        kind: SegmentKind,
        device: &dyn BlockDevice,
        volume: VolumeId,
    ) -> io::Result<()> {
        let header = SegmentHeader {
            segment: self.segment,
            generation: self.generation,
            volume,
            epoch: self.epoch,
            kind,
            tenant: self.tenant.clone(),
            durable: self.durable.filter(|_| kind == SegmentKind::Write),
        };
        let page = AlignedBuf::copy_of(&header.encode(device.id())[..]);
        device.write_at(&page, device.geometry().page_byte(self.segment, 0))
    }

    fn write(
        &self,
        page: &RecoveredPage,
        device: &dyn BlockDevice,
        volume: VolumeId,
    ) -> io::Result<()> {
        let bytes = RecordPage {
            segment: self.segment,
            generation: self.generation,
            volume,
            epoch: self.epoch,
            page: page.index,
            durable: page.durable,
            records: page.records.clone(),
        }
        .encode(device.id());
        let offset = device.geometry().page_byte(self.segment, page.index);
        device.write_at(&AlignedBuf::copy_of(&bytes[..]), offset)
    }
}

/// Reads all headers, and the record pages of segments that were open for writes, by several threads:
/// a large device has a hundred thousand headers, and while they are read nobody is served.
///
/// # Errors
/// If the device cannot be read, or a newer build has written there: what is not understood may be unsent. Damaged
/// pages are no error: what they named is missing, and shows as a gap.
pub fn scan(device: &dyn BlockDevice) -> io::Result<Scan> {
    let segments = device.geometry().segments;
    let share = segments.div_ceil(SCAN_THREADS).max(SCAN_SHARE_MIN);
    if segments <= share {
        return scan_part(device, 0..segments);
    }
    let parts = std::thread::scope(|scope| {
        let scans: Vec<_> = (0..segments)
            .step_by(share as usize)
            .map(|first| {
                let part = first..(first + share).min(segments);
                scope.spawn(move || scan_part(device, part))
            })
            .collect();
        let join = |scan: std::thread::ScopedJoinHandle<'_, io::Result<Scan>>| {
            scan.join().expect("a scan does not panic")
        };
        scans.into_iter().map(join).collect::<io::Result<Vec<_>>>()
    })?;
    let mut found = Scan::default();
    for part in parts {
        found.next_generation = found.next_generation.max(part.next_generation);
        for (volume, mut of_part) in part.volumes {
            let of_volume = found.volumes.entry(volume).or_default();
            of_volume.segments.append(&mut of_part.segments);
            of_volume.tenants.append(&mut of_part.tenants);
        }
    }
    Ok(found)
}

/// Threads of a scan: enough reads at once for any device.
const SCAN_THREADS: u32 = 16;

/// Fewest segments that a thread is worth.
const SCAN_SHARE_MIN: u32 = 32;

fn scan_part(device: &dyn BlockDevice, part: Range<u32>) -> io::Result<Scan> {
    let mut found = Scan::default();
    let mut page = AlignedBuf::zeroed(4096);
    for id in part.map(SegmentId::new) {
        device.read_at(&mut page, device.geometry().page_byte(id, 0))?;
        let header = match SegmentHeader::decode(&page, device.id()) {
            Ok(header) => header,
            Err(error @ FormatError::Version { .. }) => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            Err(_) => continue,
        };
        if header.segment != id {
            continue;
        }
        found.next_generation = found.next_generation.max(header.generation.next());
        if header.kind == SegmentKind::Write {
            let pages = read_pages(device, &header)?;
            let of_volume = found.volumes.entry(header.volume).or_default();
            of_volume.tenants.extend(header.tenant.clone());
            of_volume.segments.push(RecoveredSegment {
                segment: id,
                generation: header.generation,
                epoch: header.epoch,
                tenant: header.tenant,
                durable: header.durable,
                pages,
            });
        }
    }
    Ok(found)
}

/// The record pages of a segment.
///
/// They are written from the header downwards, those of a round together, and none of a round is
/// counted before all of it is durable. A round may have lost a page in the middle: so a page that
/// does not pass ends the run only if one round's worth behind it does not either, and a gap is seen
/// as a gap and not as the end.
fn read_pages(device: &dyn BlockDevice, header: &SegmentHeader) -> io::Result<Vec<RecoveredPage>> {
    let geometry = device.geometry();
    let pages_max = geometry.segment_size / 4096;
    let mut pages = Vec::new();
    let mut misses = 0;
    for first in (1..pages_max).step_by(BLOCK_PAGES as usize) {
        let end = (first + BLOCK_PAGES).min(pages_max);
        // The page of the highest index comes first on the device.
        let mut block = AlignedBuf::zeroed((end - first) as usize * 4096);
        device.read_at(&mut block, geometry.page_byte(header.segment, end - 1))?;
        for (index, bytes) in (first..end).zip(block.chunks(4096).rev()) {
            match RecordPage::decode(bytes, device.id()) {
                Ok(page)
                    if page.segment == header.segment
                        && page.generation == header.generation
                        && page.volume == header.volume
                        && page.page == index
                        && page.records.iter().all(|r| lies_below(r, index, geometry)) =>
                {
                    misses = 0;
                    pages.push(RecoveredPage {
                        index,
                        durable: page.durable,
                        records: page.records,
                    });
                }
                _ => misses += 1,
            }
            if misses > MISSING_PAGES_MAX {
                return Ok(pages);
            }
        }
    }
    Ok(pages)
}

/// Whether a record's data lie below its page, as all do that were ever written: where pages may lie there may be a user's
/// data, which look as they like.
fn lies_below(record: &Record, page: u32, geometry: Geometry) -> bool {
    let pages = (u64::from(page) + 1) * PAGE_SIZE;
    data_end(record) + pages <= u64::from(geometry.segment_size)
}

/// The byte of its segment at which a record's data end; 0 of one without data.
fn data_end(record: &Record) -> u64 {
    match record.body {
        RecordBody::Data { offset } => (u64::from(offset) + u64::from(record.len)) * 512,
        RecordBody::Zero | RecordBody::Discard => 0,
    }
}

/// Record pages that are read at once.
const BLOCK_PAGES: u32 = 64;

/// Pages that may be missing in a row before the rest of a segment is taken for unwritten: those
/// of one round, which are written at once.
const MISSING_PAGES_MAX: u32 = 64;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use quarry_objfmt::{CacheId, Lba};

    use super::*;
    use crate::CacheDevice;

    const ID: CacheId = CacheId::from_bytes([3; 16]);
    const VOLUME: VolumeId = VolumeId::from_bytes([9; 16]);

    fn device(dir: &tempfile::TempDir) -> CacheDevice {
        CacheDevice::open(&dir.path().join("cache"), Some(32 << 20), ID, "a", 1).unwrap()
    }

    fn write_header(device: &CacheDevice, segment: u32, generation: u64) {
        let header = SegmentHeader {
            segment: SegmentId::new(segment),
            generation: Generation::new(generation),
            volume: VOLUME,
            epoch: Epoch::new(1),
            kind: SegmentKind::Write,
            tenant: None,
            durable: None,
        };
        put_header(device, &header);
    }

    fn put_header(device: &CacheDevice, header: &SegmentHeader) {
        let page = AlignedBuf::copy_of(&header.encode(device.id())[..]);
        device
            .write_at(&page, device.geometry().page_byte(header.segment, 0))
            .unwrap();
    }

    fn write_page(device: &CacheDevice, segment: u32, generation: u64, index: u32, seqs: &[u64]) {
        write_page_after(None, device, segment, generation, index, seqs);
    }

    /// It says that the writes up to `durable` were.
    fn write_page_after(
        durable: Option<u64>,
        device: &CacheDevice,
        segment: u32,
        generation: u64,
        index: u32,
        seqs: &[u64],
    ) {
        let page = RecordPage {
            segment: SegmentId::new(segment),
            generation: Generation::new(generation),
            volume: VOLUME,
            epoch: Epoch::new(1),
            page: index,
            durable: durable.map(WriteSeq::new),
            records: seqs
                .iter()
                .map(|n| Record {
                    seq: WriteSeq::new(*n),
                    start: Lba::new(n * 8),
                    len: 8,
                    body: RecordBody::Data {
                        offset: u32::try_from(*n).unwrap() * 8,
                    },
                })
                .collect(),
        };
        let bytes = AlignedBuf::copy_of(&page.encode(device.id())[..]);
        device
            .write_at(&bytes, device.geometry().page_byte(page.segment, index))
            .unwrap();
    }

    fn reopen(device: CacheDevice, dir: &tempfile::TempDir) -> CacheDevice {
        drop(device);
        let device =
            CacheDevice::open(&dir.path().join("cache"), Some(32 << 20), ID, "a", 1).unwrap();
        assert!(!device.fresh());
        device
    }

    fn seqs(recovered: &Recovered, stored: u64) -> Vec<u64> {
        recovered
            .unsent(WriteSeq::new(stored))
            .iter()
            .map(|(_, r)| r.seq.get())
            .collect()
    }

    #[test]
    fn records_of_two_segments_come_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 2, 5);
        write_header(&device, 0, 6);
        write_page(&device, 2, 5, 1, &[1, 2, 4]);
        write_page(&device, 0, 6, 1, &[3, 5]);
        let device = reopen(device, &dir);
        let mut found = scan(&device).unwrap();
        assert_eq!(found.next_generation, Generation::new(7));
        let recovered = found.volumes.get_mut(&VOLUME).unwrap();
        assert_eq!(seqs(recovered, 2), [3, 4, 5]);
        assert_eq!(
            recovered
                .cut(&device, VOLUME, WriteSeq::new(2), false)
                .unwrap(),
            0
        );
    }

    #[test]
    fn pages_of_an_older_generation_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_page(&device, 1, 4, 1, &[1, 2]);
        write_header(&device, 1, 8);
        let device = reopen(device, &dir);
        let found = scan(&device).unwrap();
        assert!(seqs(&found.volumes[&VOLUME], 0).is_empty());
    }

    #[test]
    fn records_behind_a_lost_page_are_cut_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 0, 1);
        write_header(&device, 1, 2);
        write_page(&device, 0, 1, 1, &[1, 2]);
        // Page 2 of segment 0 (writes 3 and 4) was lost; its round's other page was not.
        write_page(&device, 1, 2, 1, &[5, 6]);
        let device = reopen(device, &dir);
        let mut found = scan(&device).unwrap();
        let recovered = found.volumes.get_mut(&VOLUME).unwrap();
        assert_eq!(
            recovered
                .cut(&device, VOLUME, WriteSeq::ZERO, false)
                .unwrap(),
            2
        );
        assert_eq!(seqs(recovered, 0), [1, 2]);
        let again = scan(&device).unwrap();
        assert_eq!(seqs(&again.volumes[&VOLUME], 0), [1, 2]);
    }

    #[test]
    fn page_lost_in_the_middle_of_a_segment_hides_nothing_behind_it_from_the_cut() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 0, 1);
        write_page(&device, 0, 1, 1, &[1]);
        write_page(&device, 0, 1, 3, &[3]);
        let device = reopen(device, &dir);
        let mut found = scan(&device).unwrap();
        let recovered = found.volumes.get_mut(&VOLUME).unwrap();
        assert_eq!(
            recovered
                .cut(&device, VOLUME, WriteSeq::ZERO, false)
                .unwrap(),
            1
        );
        assert!(seqs(&scan(&device).unwrap().volumes[&VOLUME], 1).is_empty());
    }

    #[test]
    fn what_was_durable_and_is_not_there_is_refused_until_it_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 0, 1);
        write_page(&device, 0, 1, 1, &[1]);
        // Page 2, with write 2, has rotted.
        write_page_after(Some(2), &device, 0, 1, 3, &[3, 4]);
        write_page_after(Some(4), &device, 0, 1, 4, &[]);
        let device = reopen(device, &dir);
        let find = || scan(&device).unwrap().volumes.remove(&VOLUME).unwrap();
        let stored = WriteSeq::ZERO;
        let mut recovered = find();
        let refused = recovered.cut(&device, VOLUME, stored, false).unwrap_err();
        let said = "write 2 is missing, and all up to 4 were durable";
        assert_eq!(refused.to_string(), said);
        assert_eq!(seqs(&recovered, 0), [1, 3, 4]);
        assert_eq!(seqs(&find(), 0), [1, 3, 4]);
        // What the store has meanwhile is not missing.
        let mut stored_since = find();
        let cut = stored_since.cut(&device, VOLUME, WriteSeq::new(2), false);
        assert_eq!(cut.unwrap(), 0);
        assert_eq!(recovered.cut(&device, VOLUME, stored, true).unwrap(), 2);
        assert_eq!(seqs(&find(), 0), [1]);
        assert_eq!(find().cut(&device, VOLUME, stored, false).unwrap(), 0);
    }

    #[test]
    fn segment_that_was_lost_as_a_whole_is_missed_by_the_header_of_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        let header = SegmentHeader {
            segment: SegmentId::new(1),
            generation: Generation::new(2),
            volume: VOLUME,
            epoch: Epoch::new(1),
            kind: SegmentKind::Write,
            tenant: Some(TenantName::new("acme").unwrap()),
            durable: Some(WriteSeq::new(9)),
        };
        put_header(&device, &header);
        let find = || scan(&device).unwrap().volumes.remove(&VOLUME).unwrap();
        let stored = WriteSeq::new(8);
        let refused = find().cut(&device, VOLUME, stored, false).unwrap_err();
        let said = "write 9 is missing, and all up to 9 were durable";
        assert_eq!(refused.to_string(), said);
        let nine = WriteSeq::new(9);
        assert_eq!(find().cut(&device, VOLUME, nine, false).unwrap(), 0);
        assert_eq!(find().cut(&device, VOLUME, stored, true).unwrap(), 0);
        assert_eq!(find().cut(&device, VOLUME, stored, false).unwrap(), 0);
    }

    #[test]
    fn what_was_acknowledged_before_a_sync_failed_is_in_doubt_until_it_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 0, 1);
        write_page(&device, 0, 1, 1, &[1, 2]);
        let device = reopen(device, &dir);
        let find = |acknowledged| {
            let mut found = scan(&device).unwrap().volumes.remove(&VOLUME).unwrap();
            let (epoch, acknowledged) = (Epoch::new(1), WriteSeq::new(acknowledged));
            found.voided = Some(Voided {
                epoch,
                acknowledged,
            });
            found
        };
        // The store has all, or the pages.
        assert!(!find(4).has_more_than(WriteSeq::new(4)));
        assert_eq!(
            find(4)
                .cut(&device, VOLUME, WriteSeq::new(4), false)
                .unwrap(),
            0
        );
        assert_eq!(
            find(2).cut(&device, VOLUME, WriteSeq::ZERO, false).unwrap(),
            0
        );
        assert!(find(4).has_more_than(WriteSeq::new(3)));
        for stored in [0, 1] {
            let refused = find(4).cut(&device, VOLUME, WriteSeq::new(stored), false);
            let said = "write 3 is in doubt, and all up to 4 were acknowledged";
            assert_eq!(refused.unwrap_err().to_string(), said);
        }
        let mut given_up = find(4);
        assert_eq!(
            given_up.cut(&device, VOLUME, WriteSeq::ZERO, true).unwrap(),
            0
        );
        assert_eq!(seqs(&given_up, 0), [1, 2]);
    }

    fn journaled(segment: u32, seqs: &[u64]) -> Vec<(SegmentId, Record)> {
        let record = |n: &u64| Record {
            seq: WriteSeq::new(*n),
            start: Lba::new(n * 8),
            len: 8,
            body: RecordBody::Data {
                offset: u32::try_from(*n).unwrap() * 8,
            },
        };
        let of_segment = seqs.iter().map(|n| (SegmentId::new(segment), record(n)));
        of_segment.collect()
    }

    #[test]
    fn records_of_the_journal_get_pages_and_close_the_gaps() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 0, 1);
        write_header(&device, 1, 2);
        write_page(&device, 0, 1, 1, &[1]);
        // Page 2 was lost: a round was under way when the daemon died.
        write_page(&device, 0, 1, 3, &[4]);
        let device = reopen(device, &dir);
        let mut found = scan(&device).unwrap();
        let recovered = found.volumes.get_mut(&VOLUME).unwrap();
        recovered.journal = journaled(0, &[4, 3, 1]);
        recovered.journal.extend(journaled(1, &[2, 5]));
        assert_eq!(seqs(recovered, 1), [2, 3, 4, 5]);
        assert_eq!(
            recovered
                .cut(&device, VOLUME, WriteSeq::ZERO, false)
                .unwrap(),
            0
        );
        let again = scan(&device).unwrap();
        assert_eq!(seqs(&again.volumes[&VOLUME], 0), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn record_of_the_journal_that_has_no_room_is_cut_and_not_put_over_data() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 0, 1);
        let device = reopen(device, &dir);
        let mut found = scan(&device).unwrap();
        let recovered = found.volumes.get_mut(&VOLUME).unwrap();
        recovered.journal = journaled(0, &[1]);
        let sectors = device.geometry().segment_sectors();
        recovered.journal[0].1.body = RecordBody::Data {
            offset: sectors - 16,
        };
        recovered
            .cut(&device, VOLUME, WriteSeq::ZERO, false)
            .unwrap();
        assert!(seqs(recovered, 0).is_empty());
    }

    #[test]
    fn segments_of_older_epochs_are_split_off_with_their_journal() {
        let mut recovered = Recovered {
            tenants: BTreeSet::new(),
            voided: None,
            segments: [(0, 3), (1, 5)]
                .map(|(id, epoch)| RecoveredSegment {
                    segment: SegmentId::new(id),
                    generation: Generation::new(1),
                    epoch: Epoch::new(epoch),
                    tenant: None,
                    durable: None,
                    pages: Vec::new(),
                })
                .to_vec(),
            journal: [journaled(0, &[1]), journaled(1, &[2])].concat(),
        };
        let voided = |epoch| Voided {
            epoch: Epoch::new(epoch),
            acknowledged: WriteSeq::new(3),
        };
        for (epoch, stays) in [(5, true), (4, false)] {
            let mut recovered = recovered.clone();
            recovered.voided = Some(voided(epoch));
            let old = recovered.split_off_before(Epoch::new(5));
            assert_eq!(
                (recovered.voided.is_some(), old.voided.is_none()),
                (stays, stays)
            );
        }
        let old = recovered.split_off_before(Epoch::new(5));
        assert_eq!((seqs(&old, 0), seqs(&recovered, 0)), (vec![1], vec![2]));
        assert_eq!(old.segments.len(), 1);
        assert_eq!(old.data_bytes(), 4096);
    }

    #[test]
    fn page_whose_records_lie_among_the_pages_or_behind_them_is_no_page() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 0, 1);
        write_page(&device, 0, 1, 1, &[1]);
        // Page 2 begins three pages from the end.
        let last = u64::from(device.geometry().segment_size / 4096) - 4;
        write_page(&device, 0, 1, 2, &[last]);
        let device = reopen(device, &dir);
        assert_eq!(seqs(&scan(&device).unwrap().volumes[&VOLUME], 0), [1, last]);
        for behind in [last + 1, last + 3, last + 4, u64::from(u32::MAX / 8) - 1] {
            write_page(&device, 0, 1, 2, &[behind]);
            assert_eq!(
                seqs(&scan(&device).unwrap().volumes[&VOLUME], 0),
                [1],
                "{behind}"
            );
        }
    }

    /// Counts what was written since the last sync.
    struct Watched(CacheDevice, AtomicU32);

    impl BlockDevice for Watched {
        fn id(&self) -> CacheId {
            self.0.id()
        }

        fn geometry(&self) -> Geometry {
            self.0.geometry()
        }

        fn read_at(&self, buf: &mut AlignedBuf, offset: u64) -> io::Result<()> {
            self.0.read_at(buf, offset)
        }

        fn write_at(&self, buf: &AlignedBuf, offset: u64) -> io::Result<()> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.write_at(buf, offset)
        }

        fn sync(&self) -> io::Result<()> {
            self.1.store(0, Ordering::Relaxed);
            self.0.sync()
        }
    }

    #[test]
    fn segments_are_forgotten_for_good_before_others_may_have_them() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 0, 1);
        write_header(&device, 1, 2);
        let device = reopen(device, &dir);
        let found = scan(&device).unwrap();
        let device = Watched(device, AtomicU32::new(0));
        Recovered::forget(&device, VOLUME, &found.volumes[&VOLUME].segments).unwrap();
        assert_eq!(device.1.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn forgotten_segment_is_not_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 0, 1);
        write_page(&device, 0, 1, 1, &[1]);
        let device = reopen(device, &dir);
        let found = scan(&device).unwrap();
        Recovered::forget(&device, VOLUME, &found.volumes[&VOLUME].segments).unwrap();
        let again = scan(&device).unwrap();
        assert!(again.volumes.is_empty());
        assert_eq!(again.next_generation, Generation::new(2));
    }

    #[test]
    fn segments_found_are_of_the_tenants_that_they_name() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        let names = ["acme", "globex"].map(|name| TenantName::new(name).unwrap());
        write_header(&device, 1, 1);
        let tenants = scan(&device).unwrap().volumes.remove(&VOLUME).unwrap();
        assert!(names.iter().all(|name| tenants.is_of(name)));
        for (segment, tenant) in (2..).zip(&names) {
            let header = SegmentHeader {
                segment: SegmentId::new(segment),
                generation: Generation::new(1),
                volume: VOLUME,
                epoch: Epoch::new(1),
                kind: SegmentKind::Write,
                tenant: Some(tenant.clone()),
                durable: None,
            };
            put_header(&device, &header);
            let found = scan(&device).unwrap().volumes.remove(&VOLUME).unwrap();
            assert_eq!(found.is_of(tenant), segment == 2);
        }
    }

    #[test]
    fn scan_of_what_a_newer_build_wrote_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        write_header(&device, 1, 1);
        let at = device.geometry().page_byte(SegmentId::new(1), 0);
        let mut page = AlignedBuf::zeroed(4096);
        device.read_at(&mut page, at).unwrap();
        page[4] = 0xff;
        let crc = crc32c::crc32c(&ID.to_bytes());
        let crc = crc32c::crc32c_append(crc, &page[..8]);
        let crc = crc32c::crc32c_append(crc, &page[12..]);
        page[8..12].copy_from_slice(&crc.to_le_bytes());
        device.write_at(&page, at).unwrap();
        let error = scan(&device).unwrap_err();
        assert!(error.to_string().contains("format version"), "{error}");
    }
}
