//! What the object store gives us: heads, chunks, seals, snapshots, records.

use quarry_objfmt::{
    CHUNK_PREFIX_LEN, ChunkExtent, ChunkHeader, ChunkId, ChunkParams, ChunkSeq, Compression,
    DataKey, DataKeys, Epoch, ExtentBody, Head, KeysCopy, Lba, Location, NameRecord, SECTOR_SIZE,
    Seal, Snapshot, TenantRecord, VOLUME_SECTORS_MAX, VolumeId, WriteSeq, classify, decode_frame,
    decode_record, encode_chunk, encode_record, record::NAME_KIND, record::TENANT_KIND,
};

use crate::mend;

/// Sectors of a frame in the volumes of this module: as the daemon makes them.
const FRAME_SECTORS: u32 = 128;

/// As it is, and with a right length and checksum.
fn both(input: &[u8]) -> [Vec<u8>; 2] {
    [input.to_vec(), mend::structure(input)]
}

fn volume_at(input: &[u8], at: usize) -> VolumeId {
    let id = input.get(at..).and_then(|rest| rest.first_chunk::<16>());
    VolumeId::from_bytes(id.copied().unwrap_or_default())
}

/// The name that a chunk or seal says it has: which of them it is was never in doubt.
fn chunk_named(input: &[u8]) -> ChunkId {
    let rest = input.get(32..).unwrap_or_default();
    let epoch = rest.first_chunk().copied().unwrap_or_default();
    let seq = rest.get(4..).and_then(|rest| rest.first_chunk());
    ChunkId {
        volume: volume_at(input, 16),
        epoch: Epoch::new(u32::from_le_bytes(epoch)),
        seq: ChunkSeq::new(u64::from_le_bytes(seq.copied().unwrap_or_default())),
    }
}

/// Whether the bytes, which decode, are of the version that is written now.
fn is_of_now(bytes: &[u8], encoded: &[u8]) -> bool {
    bytes[4..6] == encoded[4..6]
}

/// A head that decodes is within its rules, and has one encoding in each version.
pub(crate) fn head(input: &[u8]) {
    for bytes in both(input) {
        if let Ok(head) = Head::decode(&bytes) {
            assert_eq!(head.validate(), Ok(()));
            let again = head.encode();
            assert!(again == bytes || !is_of_now(&bytes, &again));
            assert_eq!(Head::decode(&again), Ok(head));
        }
    }
}

/// A copy of a volume's keys that decodes has one encoding.
pub(crate) fn keys(input: &[u8]) {
    for bytes in both(input) {
        if let Ok(copy) = KeysCopy::decode(&bytes, volume_at(&bytes, 16)) {
            assert_eq!(copy.encode(), bytes);
        }
    }
}

/// A snapshot that decodes has one encoding in each version.
pub(crate) fn snapshot(input: &[u8]) {
    for bytes in both(input) {
        let volume = volume_at(&bytes, 16);
        if let Ok(snapshot) = Snapshot::decode(&bytes, volume) {
            let again = snapshot.encode();
            assert!(again == bytes || !is_of_now(&bytes, &again));
            assert_eq!(Snapshot::decode(&again, volume), Ok(snapshot));
        }
    }
}

/// A record that decodes reads the same when written again.
pub(crate) fn record(input: &[u8]) {
    for bytes in both(input) {
        if let Ok(name) = decode_record::<NameRecord>(NAME_KIND, &bytes) {
            let again = encode_record(NAME_KIND, &name).expect("it was one");
            assert_eq!(decode_record(NAME_KIND, &again), Ok(name));
        }
        if let Ok(tenant) = decode_record::<TenantRecord>(TENANT_KIND, &bytes) {
            let again = encode_record(TENANT_KIND, &tenant).expect("it was one");
            assert_eq!(decode_record(TENANT_KIND, &again), Ok(tenant));
        }
    }
}

/// A seal that decodes has one encoding.
pub(crate) fn seal(input: &[u8]) {
    for bytes in both(input) {
        let found = classify(&bytes);
        if let Ok(seal) = Seal::decode(&bytes, chunk_named(&bytes)) {
            assert_eq!(found, Ok(quarry_objfmt::LogObject::Seal));
            assert_eq!(seal.encode(), bytes);
        }
    }
}

/// A chunk header that decodes keeps the rules of its extents, gives an entry of the map for every
/// sector of them, and reads the same when written again.
pub(crate) fn chunk_header(input: &[u8]) {
    for bytes in both(input) {
        let id = chunk_named(&bytes);
        let len = ChunkHeader::encoded_len(&bytes);
        let Ok(header) = ChunkHeader::decode(&bytes, id) else {
            continue;
        };
        let len = len.expect("its length was told before");
        assert!((CHUNK_PREFIX_LEN..=bytes.len()).contains(&len));

        let mut covered: Vec<_> = header
            .extents
            .iter()
            .map(|extent| (extent.start.get(), extent.end().get()))
            .collect();
        covered.sort_unstable();
        assert!(covered.iter().all(|(start, end)| start < end));
        assert!(covered.iter().is_sorted_by(|a, b| a.1 <= b.0), "disjoint");
        assert!(
            covered
                .last()
                .is_none_or(|last| last.1 <= VOLUME_SECTORS_MAX)
        );

        let sectors: u64 = covered.iter().map(|(start, end)| end - start).sum();
        let entries = header.map_entries();
        assert_eq!(
            entries.iter().map(|e| u64::from(e.len)).sum::<u64>(),
            sectors
        );
        for entry in &entries {
            if let Location::Data(data) = entry.location {
                let last = data.raw + entry.len - 1;
                assert_eq!(data.raw / header.frame_sectors, last / header.frame_sectors);
                let end = u64::from(data.stored_offset) + u64::from(data.stored_len);
                assert!(data.stored_offset as usize >= len && end <= header.object_len());
            }
        }

        // The unit of extents may be smaller than it could be: then there is a shorter encoding.
        let again = header.encode();
        assert!(again.len() <= len);
        let read = ChunkHeader::decode(&again, id).expect("its own header");
        assert_eq!(read.extents, header.extents);
        assert_eq!(
            (read.first_write, read.last_write, read.frames.len()),
            (header.first_write, header.last_write, header.frames.len())
        );
        if again[45] == bytes[45] {
            assert_eq!(again, bytes[..len]);
            assert_eq!(read, header);
        }
    }
}

/// A frame that decodes has as much content as it says and the volume allows; as the content of a
/// chunk, encrypted or not, any input reads back.
pub(crate) fn frame(input: &[u8]) {
    let chunk = ChunkId {
        volume: VolumeId::from_bytes([3; 16]),
        epoch: Epoch::new(7),
        seq: ChunkSeq::new(u64::MAX),
    };
    let key = DataKey::new([5; 32]);
    let keys = DataKeys::one(chunk.volume, key.clone());
    let most = (FRAME_SECTORS * SECTOR_SIZE) as usize;
    for bytes in [input.to_vec(), mend::frame(input, chunk, u32::MAX)] {
        if let Ok(raw) = decode_frame(&bytes, chunk, u32::MAX, FRAME_SECTORS, None) {
            let said = u32::from_le_bytes(mend::padded(&bytes[4..8]));
            assert_eq!((said * SECTOR_SIZE) as usize, raw.len());
            assert!(raw.len() <= most);
        }
        // Not one that was made without the key.
        assert!(decode_frame(&bytes, chunk, u32::MAX, FRAME_SECTORS, Some(&keys)).is_err());
    }

    let Some((&how, content)) = input.split_first() else {
        return;
    };
    let mut raw = content.to_vec();
    raw.resize(
        raw.len()
            .next_multiple_of(SECTOR_SIZE as usize)
            .clamp(512, most),
        0,
    );
    let sectors = u32::try_from(raw.len()).expect("at most a frame") / SECTOR_SIZE;
    let compression = [Compression::None, Compression::Lz4, Compression::Zstd];
    let key = (how & 4 != 0).then_some(&key);
    let params = ChunkParams {
        id: chunk,
        first_write: WriteSeq::new(1),
        last_write: WriteSeq::new(u64::MAX),
        cut_ms: u64::MAX,
        frame_sectors: FRAME_SECTORS,
        compression: compression[usize::from(how & 3) % 3],
        key,
    };
    let extent = ChunkExtent {
        start: Lba::new(VOLUME_SECTORS_MAX - u64::from(sectors)),
        len: sectors,
        body: ExtentBody::Data { raw: 0 },
    };
    let made = encode_chunk(&params, &[extent], &raw);
    let stored = &made.bytes[made.header.frames[0].stored_offset as usize..];
    let keys = key.map(|_| &keys);
    let read = decode_frame(stored, chunk, 0, FRAME_SECTORS, keys);
    assert_eq!(read.as_deref(), Ok(&raw[..]));
    let mut hurt = stored.to_vec();
    let at = usize::from(how) * 31 % hurt.len();
    hurt[at] ^= 1 << (how % 8);
    assert!(decode_frame(&hurt, chunk, 0, FRAME_SECTORS, keys).is_err());
}
