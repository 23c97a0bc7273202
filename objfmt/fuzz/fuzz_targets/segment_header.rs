//! Any segment header that decodes is written and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::{CacheId, PAGE_SIZE, SegmentHeader};

fuzz_target!(|data: &[u8]| {
    let cache = CacheId::from_bytes([0; 16]);
    let mut page = [0; PAGE_SIZE];
    let len = data.len().min(PAGE_SIZE);
    page[..len].copy_from_slice(&data[..len]);
    if let Ok(header) = SegmentHeader::decode(&page, cache) {
        assert_eq!(
            SegmentHeader::decode(&header.encode(cache)[..], cache),
            Ok(header)
        );
    }
});
