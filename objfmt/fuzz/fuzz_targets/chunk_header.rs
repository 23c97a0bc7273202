//! Any chunk header that decodes has entries for all of its extents.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarry_objfmt::{ChunkHeader, ChunkId, ChunkSeq, Epoch, VolumeId, decode_header};

fuzz_target!(|data: &[u8]| {
    let _ = ChunkHeader::encoded_len(data);
    let Some(id) = data.get(16..44) else { return };
    let chunk = ChunkId {
        volume: VolumeId::from_bytes(id[..16].try_into().unwrap()),
        epoch: Epoch::new(u32::from_le_bytes(id[16..20].try_into().unwrap())),
        seq: ChunkSeq::new(u64::from_le_bytes(id[20..].try_into().unwrap())),
    };
    if let Ok(header) = decode_header(data, chunk) {
        assert!(header.map_entries().len() >= header.extents.len());
        let _ = header.object_len();
    }
});
