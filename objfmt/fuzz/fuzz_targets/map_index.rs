//! Any index node that decodes is sorted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::map::IndexNode;

fuzz_target!(|data: &[u8]| {
    if let Ok(index) = IndexNode::decode(data) {
        assert!(index.leaves().is_sorted_by_key(|leaf| leaf.first));
    }
});
