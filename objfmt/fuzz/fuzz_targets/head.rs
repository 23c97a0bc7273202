//! Any head that decodes is written and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::Head;

fuzz_target!(|data: &[u8]| {
    if let Ok(head) = Head::decode(data) {
        assert_eq!(Head::decode(&head.encode()), Ok(head));
    }
});
