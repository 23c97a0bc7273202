//! What the cache device and the journal give us after a crash.

use quarry_objfmt::{
    CacheId, Generation, IndexEnd, IndexRecord, IndexTableHeader, JOURNAL_ENTRY_LEN, JournalHeader,
    PAGE_SIZE, RecordPage, SegmentHeader, SessionPage, Superblock,
};

use crate::mend;

const CACHE: CacheId = CacheId::from_bytes([9; 16]);

/// As it is, and with a right checksum.
fn both(input: &[u8], cache: CacheId) -> [[u8; PAGE_SIZE]; 2] {
    [mend::padded(input), mend::page(input, cache)]
}

/// A superblock that decodes is within its rules, and has one encoding.
pub(crate) fn superblock(input: &[u8]) {
    // It says itself which cache device it is of.
    let named = input.get(16..).and_then(|rest| rest.first_chunk());
    let cache = CacheId::from_bytes(named.copied().unwrap_or_default());
    for page in both(input, cache) {
        if let Ok(superblock) = Superblock::decode(&page) {
            assert_eq!(superblock.validate(), Ok(()));
            assert!(
                superblock.encode()[..] == page,
                "{superblock:?} has two encodings"
            );
        }
    }
    assert!(Superblock::decode(input).is_err() || input.len() == PAGE_SIZE);
}

/// A segment header that decodes has one encoding.
pub(crate) fn segment_header(input: &[u8]) {
    for page in both(input, CACHE) {
        if let Ok(header) = SegmentHeader::decode(&page, CACHE) {
            assert!(
                header.encode(CACHE)[..] == page,
                "{header:?} has two encodings"
            );
        }
    }
}

/// A record page that decodes has one encoding.
pub(crate) fn record_page(input: &[u8]) {
    for page in both(input, CACHE) {
        if let Ok(records) = RecordPage::decode(&page, CACHE) {
            assert!(
                records.encode(CACHE)[..] == page,
                "{records:?} has two encodings"
            );
        }
    }
}

/// A journal's header that decodes has one encoding, and so has each of its entries, in its own slot
/// alone.
pub(crate) fn journal(input: &[u8]) {
    let generation = Generation::new(u64::MAX);
    let (page, entry) = input.split_at(input.len().saturating_sub(JOURNAL_ENTRY_LEN));
    for page in both(page, CACHE) {
        let Ok(header) = JournalHeader::decode(&page, CACHE) else {
            continue;
        };
        assert!(
            header.encode(CACHE)[..] == page,
            "{header:?} has two encodings"
        );
        let mut entry: [u8; JOURNAL_ENTRY_LEN] = mend::padded(entry);
        mend::journal_entry(&mut entry, &header.attachment, generation.get());
        let seq = u64::from_le_bytes(mend::padded(&entry));
        let slot = usize::try_from(seq % u64::from(header.entries)).expect("below a u32");
        if let Ok((segment, record)) = header.decode_entry(slot, &entry, |_| Some(generation)) {
            assert_eq!(header.encode_entry(segment, generation, &record), entry);
            assert!(
                header
                    .decode_entry(slot + 1, &entry, |_| Some(generation))
                    .is_err()
            );
            assert!(header.decode_entry(slot, &entry, |_| None).is_err());
        }
    }
}

/// The page that says who has a device, and the one that an index table begins with, have one encoding.
pub(crate) fn session(input: &[u8]) {
    for page in both(input, CACHE) {
        if let Ok(session) = SessionPage::decode(&page, CACHE) {
            assert!(
                session.encode(CACHE)[..] == page,
                "{session:?} has two encodings"
            );
        }
        if let Ok(header) = IndexTableHeader::decode(&page, CACHE) {
            assert!(
                header.encode(CACHE)[..] == page,
                "{header:?} has two encodings"
            );
        }
    }
}

/// A record of the index log that decodes has one encoding and runs that end somewhere, and so has the log's end.
pub(crate) fn index(input: &[u8]) {
    for bytes in [input.to_vec(), mend::structure(input)] {
        if let Ok(record) = IndexRecord::decode(&bytes) {
            assert_eq!(record.encode(), bytes, "{record:?} has two encodings");
            assert_eq!(IndexRecord::encoded_len(&bytes), Ok(bytes.len()));
            for run in &record.runs {
                assert!(run.len > 0);
                assert!(run.raw.checked_add(run.len).is_some());
                assert!(run.offset.checked_add(run.len).is_some());
            }
        }
        if let Ok(end) = IndexEnd::decode(&bytes) {
            assert_eq!(end.encode(), bytes, "{end:?} has two encodings");
        }
    }
}
