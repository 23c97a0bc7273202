//! Any superblock that decodes is written and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::{PAGE_SIZE, Superblock};

fuzz_target!(|data: &[u8]| {
    let mut page = [0; PAGE_SIZE];
    let len = data.len().min(PAGE_SIZE);
    page[..len].copy_from_slice(&data[..len]);
    if let Ok(superblock) = Superblock::decode(&page) {
        assert_eq!(Superblock::decode(&superblock.encode()[..]), Ok(superblock));
    }
});
