//! Any seal that decodes is written and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::{ChunkId, ChunkSeq, Epoch, Seal, VolumeId, classify};

fuzz_target!(|data: &[u8]| {
    let _ = classify(data);
    let Some(id) = data.get(16..44) else { return };
    let chunk = ChunkId {
        volume: VolumeId::from_bytes(id[..16].try_into().unwrap()),
        epoch: Epoch::new(u32::from_le_bytes(id[16..20].try_into().unwrap())),
        seq: ChunkSeq::new(u64::from_le_bytes(id[20..].try_into().unwrap())),
    };
    if let Ok(seal) = Seal::decode(data, chunk) {
        assert_eq!(Seal::decode(&seal.encode(), chunk), Ok(seal));
    }
});
