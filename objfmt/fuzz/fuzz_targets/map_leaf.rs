//! Any leaf that decodes can be walked from end to end.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::map::Leaf;

fuzz_target!(|data: &[u8]| {
    if let Ok(leaf) = Leaf::decode(data) {
        assert_eq!(leaf.iter().count(), leaf.len());
    }
});
