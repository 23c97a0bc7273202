//! No bytes make the decoder of manifests panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::{
    Epoch, MapSeq, VolumeId,
    map::{Manifest, MapObjectId},
};

fuzz_target!(|data: &[u8]| {
    let id = MapObjectId {
        volume: VolumeId::from_bytes([0; 16]),
        epoch: Epoch::ZERO,
        seq: MapSeq::ZERO,
    };
    let _ = Manifest::decode(id, 0, data);
});
