//! Any snapshot that decodes is written and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::{Snapshot, VolumeId};

fuzz_target!(|data: &[u8]| {
    let volume = VolumeId::from_bytes(
        data.get(16..32)
            .and_then(|id| id.try_into().ok())
            .unwrap_or_default(),
    );
    if let Ok(snapshot) = Snapshot::decode(data, volume) {
        assert_eq!(Snapshot::decode(&snapshot.encode(), volume), Ok(snapshot));
    }
});
