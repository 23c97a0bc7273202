//! No frame is longer than it may be.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::{ChunkId, ChunkSeq, DataKey, Epoch, VolumeId, decode_frame};

fuzz_target!(|data: &[u8]| {
    let chunk = ChunkId {
        volume: VolumeId::from_bytes([0; 16]),
        epoch: Epoch::ZERO,
        seq: ChunkSeq::ZERO,
    };
    if let Ok(raw) = decode_frame(data, chunk, 0, 128, None) {
        assert!(raw.len() <= 128 * 512);
    }
    let _ = decode_frame(data, chunk, 0, 128, Some(&DataKey::new([0; 32])));
});
