//! Right checksums for wrong bytes, by `FORMAT.md`: a mutation gets past the checksum to what lies
//! behind it, without a way past it in the code under test.

use quarry_objfmt::map::{MapObjectId, NODE_HEADER_LEN};
use quarry_objfmt::{CacheId, ChunkId, PAGE_SIZE};

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn crc(parts: &[&[u8]]) -> u32 {
    parts
        .iter()
        .fold(0, |crc, part| crc32c::crc32c_append(crc, part))
}

fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("inputs are short")
}

/// A structure with a prologue; its length is mended too.
pub(crate) fn structure(input: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    if bytes.len() >= 16 {
        let len = len32(bytes.len());
        put(&mut bytes, 8, len);
        let crc = crc(&[&bytes[..12], &bytes[16..]]);
        put(&mut bytes, 12, crc);
    }
    bytes
}

/// A page of the cache device `cache`, zeroes behind the input.
pub(crate) fn page(input: &[u8], cache: CacheId) -> [u8; PAGE_SIZE] {
    let mut page = padded(input);
    let crc = crc(&[&cache.to_bytes(), &page[..8], &page[12..]]);
    put(&mut page, 8, crc);
    page
}

/// The input and zeroes behind it, or the beginning of it.
pub(crate) fn padded<const N: usize>(input: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    let len = input.len().min(N);
    bytes[..len].copy_from_slice(&input[..len]);
    bytes
}

/// An entry of a journal of `attachment`, in a segment of this generation.
pub(crate) fn journal_entry(entry: &mut [u8; 32], attachment: &[u8; 16], generation: u64) {
    let crc = crc(&[attachment, &generation.to_le_bytes(), &entry[..28]]);
    put(entry, 28, crc);
}

/// A map node at `offset` of object `id`; the length of what is stored is mended too.
pub(crate) fn node(input: &[u8], id: MapObjectId, offset: u32) -> Vec<u8> {
    let mut bytes = input.to_vec();
    if bytes.len() >= NODE_HEADER_LEN {
        let len = len32(bytes.len() - NODE_HEADER_LEN);
        put(&mut bytes, 16, len);
        let crc = crc(&[
            &id.volume.to_bytes(),
            &id.epoch.get().to_le_bytes(),
            &id.seq.get().to_le_bytes(),
            &offset.to_le_bytes(),
            &bytes[..20],
            &bytes[24..],
        ]);
        put(&mut bytes, 20, crc);
    }
    bytes
}

/// The frame number `index` of `chunk`; the payload's length is mended too.
pub(crate) fn frame(input: &[u8], chunk: ChunkId, index: u32) -> Vec<u8> {
    let mut bytes = input.to_vec();
    if bytes.len() >= 16 {
        let len = len32(bytes.len() - 16);
        put(&mut bytes, 8, len);
        let crc = crc(&[
            &chunk.volume.to_bytes(),
            &chunk.epoch.get().to_le_bytes(),
            &chunk.seq.get().to_le_bytes(),
            &index.to_le_bytes(),
            &bytes[..12],
            &bytes[16..],
        ]);
        put(&mut bytes, 12, crc);
    }
    bytes
}
