//! The journal: the records of acknowledged writes that are in no record page yet, in memory that
//! outlives the daemon's process.
//!
//! A header page, then a ring of entries of 32 bytes: write `n` lies in slot `n % entries`. An
//! entry's checksum begins with the attachment's id and with the generation of its segment, so that
//! what an earlier attachment, or an earlier use of the segment, left in the ring never passes.
//!
//! Byte tables are in `FORMAT.md`. Does not own: where the journal is kept, and when it is valid.

use crate::error::{FormatError, Result};
use crate::page::{Kind, Page, Record, Writer, finish, open, pack_record, unpack_record};
use crate::types::{CacheId, Epoch, Generation, SegmentId, VolumeId, WriteSeq};
use crate::wire::Reader;

/// Bytes of an entry.
pub const JOURNAL_ENTRY_LEN: usize = 32;

/// Most entries of a journal.
pub const JOURNAL_ENTRIES_MAX: u32 = 1 << 24;

const CRC_AT: usize = 28;
const _: () = assert!(CRC_AT == 8 + 8 + 4 + 4 + 4 && JOURNAL_ENTRY_LEN == CRC_AT + 4);

const HEADER: Kind = Kind {
    magic: *b"QYJN",
    what: "journal header",
    version: 1,
};
const ENTRY: &str = "journal entry";

/// Whose journal it is: its first page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalHeader {
    /// How many entries there are.
    pub entries: u32,
    /// The boot of the host in which it was made: after another, memory and device have parted.
    pub boot: [u8; 16],
    /// The volume.
    pub volume: VolumeId,
    /// The attachment, named at random.
    pub attachment: [u8; 16],
    /// The term in which the volume was attached: once the cache has segments of a later one, the
    /// journal is of the past.
    pub epoch: Epoch,
}

impl JournalHeader {
    /// Its page, for writes on the cache device `cache`.
    ///
    /// # Panics
    /// If it has no entries, or more than [`JOURNAL_ENTRIES_MAX`].
    #[must_use]
    pub fn encode(&self, cache: CacheId) -> Page {
        assert!(
            (1..=JOURNAL_ENTRIES_MAX).contains(&self.entries),
            "a journal of {} entries",
            self.entries
        );
        let mut page = Writer::new(&HEADER, 0);
        page.put(&self.entries.to_le_bytes());
        page.put(&self.boot);
        page.put(&self.volume.to_bytes());
        page.put(&self.attachment);
        page.put(&self.epoch.get().to_le_bytes());
        page.seal(cache)
    }

    /// The header that `bytes` are, for writes on the cache device `cache`.
    ///
    /// # Errors
    /// If they are none, damaged, or of another cache device.
    pub fn decode(bytes: &[u8], cache: CacheId) -> Result<Self> {
        let (mut reader, reserved) = open(&HEADER, bytes, cache)?;
        if reserved != 0 {
            return Err(FormatError::invalid(
                HEADER.what,
                "a reserved field is not 0",
            ));
        }
        let header = Self {
            entries: reader.u32()?,
            boot: reader.array()?,
            volume: VolumeId::from_bytes(reader.array()?),
            attachment: reader.array()?,
            epoch: Epoch::new(reader.u32()?),
        };
        finish(reader)?;
        if !(1..=JOURNAL_ENTRIES_MAX).contains(&header.entries) {
            return Err(FormatError::invalid(
                HEADER.what,
                "the number of entries is out of range",
            ));
        }
        Ok(header)
    }

    /// The slot of write `seq`.
    #[must_use]
    pub fn slot(&self, seq: WriteSeq) -> usize {
        usize::try_from(seq.get() % u64::from(self.entries)).expect("below a 32-bit number")
    }

    /// The bytes of an entry.
    #[must_use]
    pub fn encode_entry(
        &self,
        segment: SegmentId,
        generation: Generation,
        record: &Record,
    ) -> [u8; JOURNAL_ENTRY_LEN] {
        let (word, offset) = pack_record(record);
        let mut entry = [0; JOURNAL_ENTRY_LEN];
        entry[0..8].copy_from_slice(&record.seq.get().to_le_bytes());
        entry[8..16].copy_from_slice(&word.to_le_bytes());
        entry[16..20].copy_from_slice(&record.len.to_le_bytes());
        entry[20..24].copy_from_slice(&offset.to_le_bytes());
        entry[24..28].copy_from_slice(&segment.get().to_le_bytes());
        let crc = self.checksum(generation, &entry);
        entry[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        entry
    }

    /// The segment and the record that the entry in `slot` holds; `generation_of` tells the
    /// generation that a segment has on the cache device, if it holds writes of this volume.
    ///
    /// # Errors
    /// If it is empty, damaged, not this attachment's, or of a segment that has gone its way.
    pub fn decode_entry(
        &self,
        slot: usize,
        bytes: &[u8],
        generation_of: impl FnOnce(SegmentId) -> Option<Generation>,
    ) -> Result<(SegmentId, Record)> {
        let mut reader = Reader::new(bytes, ENTRY);
        let seq = WriteSeq::new(reader.u64()?);
        let (word, len, offset) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let segment = SegmentId::new(reader.u32()?);
        let crc = reader.u32()?;
        let Some(generation) = generation_of(segment) else {
            return Err(FormatError::invalid(ENTRY, "its segment is not in use"));
        };
        if crc != self.checksum(generation, bytes) {
            return Err(FormatError::Checksum { what: ENTRY });
        }
        if self.slot(seq) != slot {
            return Err(FormatError::invalid(ENTRY, "it lies in another's slot"));
        }
        Ok((segment, unpack_record(ENTRY, seq, word, len, offset)?))
    }

    fn checksum(&self, generation: Generation, entry: &[u8]) -> u32 {
        // Put together first: three short checksums cost twice as much as one.
        let mut covered = [0; 16 + 8 + CRC_AT];
        covered[..16].copy_from_slice(&self.attachment);
        covered[16..24].copy_from_slice(&generation.get().to_le_bytes());
        covered[24..].copy_from_slice(&entry[..CRC_AT]);
        crc32c::crc32c(&covered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::RecordBody;
    use crate::types::Lba;

    const CACHE: CacheId = CacheId::from_bytes([3; 16]);

    fn header() -> JournalHeader {
        JournalHeader {
            entries: 64,
            boot: [1; 16],
            volume: VolumeId::from_bytes([2; 16]),
            attachment: [4; 16],
            epoch: Epoch::new(6),
        }
    }

    fn record() -> Record {
        Record {
            seq: WriteSeq::new(64 * 5 + 7),
            start: Lba::new(800),
            len: 8,
            body: RecordBody::Data { offset: 24 },
        }
    }

    #[test]
    fn header_written_and_read_is_the_same_and_bound_to_its_cache() {
        let page = header().encode(CACHE);
        assert_eq!(JournalHeader::decode(&page[..], CACHE), Ok(header()));
        let other = CacheId::from_bytes([9; 16]);
        assert!(JournalHeader::decode(&page[..], other).is_err());
    }

    #[test]
    fn entry_of_any_kind_written_and_read_is_the_same() {
        for body in [
            RecordBody::Data { offset: 24 },
            RecordBody::Zero,
            RecordBody::Discard,
        ] {
            let record = Record { body, ..record() };
            let (segment, generation) = (SegmentId::new(3), Generation::new(8));
            let entry = header().encode_entry(segment, generation, &record);
            let read = header().decode_entry(7, &entry, |_| Some(generation));
            assert_eq!(read, Ok((segment, record)));
        }
    }

    #[test]
    fn entry_of_another_attachment_generation_or_slot_never_passes() {
        let generation = Generation::new(8);
        let entry = header().encode_entry(SegmentId::new(3), generation, &record());
        let other = JournalHeader {
            attachment: [5; 16],
            ..header()
        };
        assert!(other.decode_entry(7, &entry, |_| Some(generation)).is_err());
        let next = generation.next();
        assert!(header().decode_entry(7, &entry, |_| Some(next)).is_err());
        assert!(header().decode_entry(7, &entry, |_| None).is_err());
        assert!(
            header()
                .decode_entry(8, &entry, |_| Some(generation))
                .is_err()
        );
        for at in 0..JOURNAL_ENTRY_LEN {
            let mut hurt = entry;
            hurt[at] ^= 4;
            assert!(
                header()
                    .decode_entry(7, &hurt, |_| Some(generation))
                    .is_err()
            );
        }
        let empty = [0; JOURNAL_ENTRY_LEN];
        assert!(
            header()
                .decode_entry(0, &empty, |_| Some(generation))
                .is_err()
        );
    }
}
