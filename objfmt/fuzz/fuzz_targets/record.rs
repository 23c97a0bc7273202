//! No bytes make the decoder of records panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::{NameRecord, decode_record};

fuzz_target!(|data: &[u8]| {
    let _ = decode_record::<NameRecord>("name", data);
});
