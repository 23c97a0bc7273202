//! Recovery: what the record pages say is on the cache device and perhaps not in the store.
//!
//! Reads segment headers and record pages, never data: a record page was written after the data it
//! names had been synced, so a page that passes its checksum vouches for them.
//!
//! A flush round writes its pages in any order. So a crash inside a round can leave a later write's
//! record without an earlier one's; no flush that covers either was acknowledged. Such records are
//! cut off ([`Recovered::cut`]), for the volume must stay a prefix of its writes.

use std::collections::BTreeMap;
use std::io;

use quarry_objfmt::page::{Record, RecordPage, SegmentHeader, SegmentKind};
use quarry_objfmt::{Epoch, Generation, SegmentId, VolumeId, WriteSeq};

use crate::{AlignedBuf, CacheDevice};

/// A record page found on the device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecoveredPage {
    /// Its index in the segment, from 1.
    pub index: u32,
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
    /// Its record pages, in order.
    pub pages: Vec<RecoveredPage>,
}

/// What the device holds of one volume.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Recovered {
    /// The segments, by position.
    pub segments: Vec<RecoveredSegment>,
}

/// What [`scan`] found.
#[derive(Default, Debug)]
pub struct Scan {
    /// By volume.
    pub volumes: BTreeMap<VolumeId, Recovered>,
    /// A generation newer than any on the device.
    pub next_generation: Generation,
}

impl Recovered {
    /// The newest epoch of any of its segments.
    #[must_use]
    pub fn newest_epoch(&self) -> Option<Epoch> {
        self.segments.iter().map(|s| s.epoch).max()
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
            .filter(|(_, r)| r.seq > stored)
            .collect();
        all.sort_by_key(|(_, r)| r.seq);
        all
    }

    /// Cuts off all records behind the first gap after `stored`, here and on the device, so that a
    /// second crash cannot find them again among the writes that will take their numbers. Returns
    /// how many were cut. Done before the volume serves; a crash in between repeats it, with the
    /// same gap.
    ///
    /// # Errors
    /// If a page cannot be written or synced.
    pub fn cut(
        &mut self,
        device: &CacheDevice,
        volume: VolumeId,
        stored: WriteSeq,
    ) -> io::Result<usize> {
        let mut last = stored;
        for (_, record) in self.unsent(stored) {
            if record.seq != last.next() {
                break;
            }
            last = record.seq;
        }
        let mut cut = 0;
        for segment in &mut self.segments {
            for page in &mut segment.pages {
                let before = page.records.len();
                page.records.retain(|r| r.seq <= last);
                if page.records.len() == before {
                    continue;
                }
                cut += before - page.records.len();
                let bytes = RecordPage {
                    segment: segment.segment,
                    generation: segment.generation,
                    volume,
                    epoch: segment.epoch,
                    page: page.index,
                    records: page.records.clone(),
                }
                .encode(device.id());
                let offset = device.geometry().page_byte(segment.segment, page.index);
                device.write_at(&AlignedBuf::copy_of(&bytes[..]), offset)?;
            }
        }
        if cut > 0 {
            device.sync()?;
        }
        Ok(cut)
    }

    /// Marks the given segments on the device as holding nothing unsent.
    ///
    /// # Errors
    /// If a header cannot be written.
    pub fn forget(
        device: &CacheDevice,
        volume: VolumeId,
        segments: &[RecoveredSegment],
    ) -> io::Result<()> {
        for segment in segments {
            let header = SegmentHeader {
                segment: segment.segment,
                generation: segment.generation,
                volume,
                epoch: segment.epoch,
                kind: SegmentKind::Fill,
            };
            let page = AlignedBuf::copy_of(&header.encode(device.id())[..]);
            device.write_at(&page, device.geometry().page_byte(segment.segment, 0))?;
        }
        Ok(())
    }
}

/// Reads all headers, and the record pages of segments that were open for writes.
///
/// A page that does not pass ends its segment's run: pages are written from the header downwards,
/// those of a round together, and none of a round is counted before all of it is durable.
///
/// # Errors
/// If the device cannot be read. Damaged pages are no error: what they named is missing, and shows
/// as a gap.
pub fn scan(device: &CacheDevice) -> io::Result<Scan> {
    let geometry = device.geometry();
    let mut found = Scan {
        next_generation: Generation::new(1),
        ..Scan::default()
    };
    if device.fresh() {
        return Ok(found);
    }
    let pages_max = geometry.segment_size / 4096;
    let mut buf = AlignedBuf::zeroed(4096);
    for id in (0..geometry.segments).map(SegmentId::new) {
        device.read_at(&mut buf, geometry.page_byte(id, 0))?;
        let Ok(header) = SegmentHeader::decode(&buf, device.id()) else {
            continue;
        };
        if header.segment != id {
            continue;
        }
        found.next_generation = found.next_generation.max(header.generation.next());
        if header.kind != SegmentKind::Write {
            continue;
        }
        let mut pages = Vec::new();
        // A round may have lost a page in the middle: look one round's worth further than the
        // last good one, so that its gap is seen as a gap and not as the end.
        let mut misses = 0;
        for index in 1..pages_max {
            device.read_at(&mut buf, geometry.page_byte(id, index))?;
            match RecordPage::decode(&buf, device.id()) {
                Ok(page)
                    if page.segment == id
                        && page.generation == header.generation
                        && page.volume == header.volume
                        && page.page == index =>
                {
                    pages.push(RecoveredPage {
                        index,
                        records: page.records,
                    });
                    misses = 0;
                }
                _ => {
                    misses += 1;
                    if misses > MISSING_PAGES_MAX {
                        break;
                    }
                }
            }
        }
        found
            .volumes
            .entry(header.volume)
            .or_default()
            .segments
            .push(RecoveredSegment {
                segment: id,
                generation: header.generation,
                epoch: header.epoch,
                pages,
            });
    }
    Ok(found)
}

/// Pages that may be missing in a row before the rest of a segment is taken for unwritten: those
/// of one round, which are written at once.
const MISSING_PAGES_MAX: u32 = 64;

#[cfg(test)]
mod tests {
    use quarry_objfmt::page::RecordBody;
    use quarry_objfmt::{CacheId, Lba};

    use super::*;

    const ID: CacheId = CacheId::from_bytes([3; 16]);
    const VOLUME: VolumeId = VolumeId::from_bytes([9; 16]);

    fn device(dir: &tempfile::TempDir) -> CacheDevice {
        CacheDevice::open(&dir.path().join("cache"), 32 << 20, ID, "a", 1).unwrap()
    }

    fn write_header(device: &CacheDevice, segment: u32, generation: u64) {
        let header = SegmentHeader {
            segment: SegmentId::new(segment),
            generation: Generation::new(generation),
            volume: VOLUME,
            epoch: Epoch::new(1),
            kind: SegmentKind::Write,
        };
        let page = AlignedBuf::copy_of(&header.encode(device.id())[..]);
        device
            .write_at(&page, device.geometry().page_byte(header.segment, 0))
            .unwrap();
    }

    fn write_page(device: &CacheDevice, segment: u32, generation: u64, index: u32, seqs: &[u64]) {
        let page = RecordPage {
            segment: SegmentId::new(segment),
            generation: Generation::new(generation),
            volume: VOLUME,
            epoch: Epoch::new(1),
            page: index,
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
        let device = CacheDevice::open(&dir.path().join("cache"), 32 << 20, ID, "a", 1).unwrap();
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
        assert_eq!(recovered.cut(&device, VOLUME, WriteSeq::new(2)).unwrap(), 0);
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
        assert_eq!(recovered.cut(&device, VOLUME, WriteSeq::ZERO).unwrap(), 2);
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
        assert_eq!(recovered.cut(&device, VOLUME, WriteSeq::ZERO).unwrap(), 1);
        assert!(seqs(&scan(&device).unwrap().volumes[&VOLUME], 1).is_empty());
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
}
