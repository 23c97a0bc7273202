//! Any journal that decodes is written and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::{CacheId, Generation, JOURNAL_ENTRY_LEN, JournalHeader, PAGE_SIZE};

fuzz_target!(|data: &[u8]| {
    let cache = CacheId::from_bytes([0; 16]);
    let mut bytes = [0; PAGE_SIZE + JOURNAL_ENTRY_LEN];
    let len = data.len().min(bytes.len());
    bytes[..len].copy_from_slice(&data[..len]);
    let (page, entry) = bytes.split_at(PAGE_SIZE);
    let Ok(header) = JournalHeader::decode(page, cache) else {
        return;
    };
    assert_eq!(
        JournalHeader::decode(&header.encode(cache)[..], cache),
        Ok(header)
    );
    let generation = Generation::new(1);
    for slot in 0..4 {
        if let Ok((segment, record)) = header.decode_entry(slot, entry, |_| Some(generation)) {
            let again = header.encode_entry(segment, generation, &record);
            let read = header.decode_entry(slot, &again, |_| Some(generation));
            assert_eq!(read, Ok((segment, record)));
        }
    }
});
