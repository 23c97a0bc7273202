//! Bytes of every format version, kept for ever: what was written once must be read always.
//!
//! The files in `golden/` are never changed. A new format version adds files beside the old ones
//! (`cargo test -p quarry-objfmt --test golden -- --ignored` writes those that are missing, and
//! only those).

use std::path::PathBuf;

use quarry_objfmt::head::{Lineage, LogRange, Owner, Parent, RootRef, SnapshotRef};
use quarry_objfmt::map::{
    Basis, ChunkUse, DeadObject, MapObjectBuilder, MapObjectId, ObjectKind, Usage,
};
use quarry_objfmt::record::{NAME_KIND, TENANT_KIND};
use quarry_objfmt::{
    CHUNK_PREFIX_LEN, CacheId, CacheKey, ChunkExtent, ChunkHeader, ChunkId, ChunkParams, ChunkSeq,
    Compression, DataKey, DataKeys, Durability, Encryption, Epoch, ExtentBody, Generation, Head,
    IndexEnd, IndexRecord, IndexRun, IndexTableHeader, JournalHeader, KeyGeneration, KeyName,
    KeysCopy, Lba, MapSeq, NameRecord, Record, RecordBody, RecordPage, Seal, Sectors,
    SegmentHeader, SegmentId, SegmentKind, SessionPage, Snapshot, Superblock, TenantName,
    TenantRecord, VolumeId, WrappedKey, WrappedKeys, WriteSeq, decode_frame, decode_record,
    encode_chunk, encode_record,
};

const VOLUME: VolumeId = VolumeId::from_bytes(*b"golden volume id");
const CACHE: CacheId = CacheId::from_bytes(*b"golden cache id.");

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name)
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap_or_else(|error| panic!("golden/{name}: {error}"))
}

fn chunk_id() -> ChunkId {
    ChunkId {
        volume: VOLUME,
        epoch: Epoch::new(3),
        seq: ChunkSeq::new(0x1234),
    }
}

fn root() -> RootRef {
    RootRef {
        epoch: Epoch::new(2),
        seq: MapSeq::new(8),
        offset: 4096,
        len: 321,
        usage: Some((3000, 1096)),
    }
}

/// As version 1 of head and snapshot wrote it.
fn root_v1() -> RootRef {
    RootRef {
        usage: None,
        ..root()
    }
}

fn full_head() -> Head {
    Head {
        volume: VOLUME,
        tenant: "acme".to_owned(),
        name: "db-1.prod".to_owned(),
        created_ms: 1_700_000_000_123,
        sector_size: 4096,
        frame_sectors: 128,
        compression: Compression::Zstd,
        encryption: Encryption::Aes256Gcm,
        durability: Durability::Object,
        size: Sectors::new(100 << 21),
        epoch: Epoch::new(7),
        owner: Some(Owner {
            cache: CACHE,
            host: "host-ä".to_owned(),
            since_ms: 1_700_000_001_000,
        }),
        lineage: Some(Lineage {
            cache: CACHE,
            since: Epoch::new(5),
        }),
        log: vec![
            LogRange {
                epoch: Epoch::new(5),
                first: ChunkSeq::new(20),
                end: Some(ChunkSeq::new(30)),
            },
            LogRange {
                epoch: Epoch::new(7),
                first: ChunkSeq::new(30),
                end: None,
            },
        ],
        root: Some(root()),
        root_write: WriteSeq::new(99_999),
        next_map: MapSeq::new(9),
        stored_bytes: 123_456_789,
        parent: Some(Parent {
            volume: VolumeId::from_bytes(*b"golden parent id"),
            snapshot: "golden".to_owned(),
        }),
        retain_ms: 86_400_000,
        snapshots: vec![
            SnapshotRef {
                name: "empty".to_owned(),
                created_ms: 1_700_000_000_200,
                root_write: WriteSeq::ZERO,
                size: Sectors::new(50 << 21),
                closing: true,
                root: None,
            },
            SnapshotRef {
                name: "monday".to_owned(),
                created_ms: 1_700_000_000_300,
                root_write: WriteSeq::new(4_711),
                size: Sectors::new(100 << 21),
                closing: false,
                root: Some(root()),
            },
        ],
        keys: wrapped_keys(),
    }
}

fn wrapped_keys() -> WrappedKeys {
    let key = |volume: &[u8; 16], generation, bytes| WrappedKey {
        volume: VolumeId::from_bytes(*volume),
        generation: KeyGeneration::new(generation).unwrap(),
        by: KeyName::new("acme-2026").unwrap(),
        bytes,
    };
    WrappedKeys {
        revision: 0x1a,
        keys: vec![
            key(b"golden parent id", 1, vec![0x11; 60]),
            key(b"golden volume id", 1, vec![0x22; 60]),
            key(b"golden volume id", 2, vec![0x33; 184]),
        ],
    }
}

fn keys_copy() -> KeysCopy {
    KeysCopy {
        volume: VOLUME,
        keys: wrapped_keys(),
    }
}

/// What version 2 could say.
fn head_v2(head: Head) -> Head {
    Head {
        keys: WrappedKeys::default(),
        ..head
    }
}

/// What version 1 could say.
fn head_v1(head: Head) -> Head {
    Head {
        root: head.root.map(|_| root_v1()),
        parent: None,
        retain_ms: 0,
        snapshots: Vec::new(),
        ..head_v2(head)
    }
}

fn bare_head() -> Head {
    Head {
        sector_size: 512,
        compression: Compression::Lz4,
        encryption: Encryption::None,
        durability: Durability::Local,
        epoch: Epoch::ZERO,
        owner: None,
        lineage: None,
        log: Vec::new(),
        root: None,
        root_write: WriteSeq::ZERO,
        next_map: MapSeq::ZERO,
        stored_bytes: 0,
        parent: None,
        retain_ms: 0,
        snapshots: Vec::new(),
        keys: WrappedKeys::default(),
        ..full_head()
    }
}

fn seal() -> Seal {
    Seal {
        id: chunk_id(),
        by: Epoch::new(4),
        by_host: "host-b".to_owned(),
    }
}

fn usage() -> Usage {
    let chunk = |seq, generation| ChunkUse {
        epoch: Epoch::new(3),
        seq: ChunkSeq::new(seq),
        born: MapSeq::new(5),
        data_sectors: 16_384,
        needed_sectors: 9_000,
        stored_bytes: 7 << 20,
        generation: KeyGeneration::new(generation).unwrap(),
    };
    let dead = |kind, number, generation| DeadObject {
        kind,
        epoch: Epoch::new(2),
        number,
        born: MapSeq::new(4),
        died: MapSeq::new(6),
        died_ms: 1_700_000_000_400,
        stored_bytes: 4096,
        generation: KeyGeneration::new(generation).unwrap(),
    };
    Usage {
        basis: Basis {
            retain_ms: 86_400_000,
            ..Basis::of(&full_head())
        },
        chunks: vec![chunk(20, 1), chunk(21, 2)],
        dead: vec![
            dead(ObjectKind::Chunk, 9, 2),
            dead(ObjectKind::Map, 4, 1),
            dead(ObjectKind::Chunk, 10, 1),
        ],
    }
}

/// What version 2 could say.
fn usage_v2() -> Usage {
    let first = KeyGeneration::FIRST;
    let mut usage = usage();
    usage.chunks.iter_mut().for_each(|c| c.generation = first);
    usage.dead.iter_mut().for_each(|d| d.generation = first);
    usage
}

const USAGE_OBJECT: MapObjectId = MapObjectId {
    volume: VOLUME,
    epoch: Epoch::new(3),
    seq: MapSeq::new(9),
};

/// A node at the beginning of its object.
fn usage_node(usage: &Usage) -> Vec<u8> {
    let mut builder = MapObjectBuilder::new(USAGE_OBJECT);
    builder.finish_usage(usage).unwrap();
    builder.into_bytes()
}

fn snapshot() -> Snapshot {
    Snapshot {
        volume: VOLUME,
        name: "monday".to_owned(),
        created_ms: 1_700_000_002_000,
        root: Some(root()),
        root_write: WriteSeq::new(99_999),
        size: Sectors::new(100 << 21),
        log_end: ChunkSeq::new(30),
    }
}

fn tenant_record() -> TenantRecord {
    TenantRecord {
        name: "acme".to_owned(),
        created_ms: 1_700_000_000_000,
        ..TenantRecord::default()
    }
}

fn name_record() -> NameRecord {
    NameRecord::new(VOLUME, 1_700_000_000_000)
}

fn superblock() -> Superblock {
    Superblock {
        cache: CACHE,
        created_ms: 1_700_000_000_000,
        host: "host-a".to_owned(),
        segment_size: 8 << 20,
        segments: 1000,
        data_start: 1 << 20,
        key: None,
        has_sessions: false,
    }
}

/// With a key it is of version 2.
fn keyed_superblock() -> Superblock {
    Superblock {
        key: Some(CacheKey {
            by: KeyName::new("host-a").unwrap(),
            bytes: vec![0x44; 92],
        }),
        ..superblock()
    }
}

/// With sessions it is of version 3, and has a key or none.
fn superblock_with_sessions() -> Superblock {
    Superblock {
        has_sessions: true,
        ..superblock()
    }
}

fn keyed_superblock_with_sessions() -> Superblock {
    Superblock {
        has_sessions: true,
        ..keyed_superblock()
    }
}

fn session_page() -> SessionPage {
    SessionPage {
        session: *b"a golden session",
    }
}

fn index_table() -> IndexTableHeader {
    IndexTableHeader {
        segments: 1000,
        boot: *b"golden boot id..",
        session: *b"a golden session",
    }
}

fn index_record() -> IndexRecord {
    IndexRecord {
        cache: CACHE,
        segment: SegmentId::new(17),
        generation: Generation::new(4711),
        owner: r#"{"name":"acme"}"#.to_owned(),
        runs: vec![IndexRun {
            chunk: chunk_id(),
            raw: 128,
            len: 64,
            offset: 4096,
        }],
    }
}

fn index_end() -> IndexEnd {
    IndexEnd {
        cache: CACHE,
        session: *b"a golden session",
        segments: vec![(SegmentId::new(17), Generation::new(4711))],
    }
}

fn segment_header() -> SegmentHeader {
    SegmentHeader {
        segment: SegmentId::new(17),
        generation: Generation::new(4711),
        volume: VOLUME,
        epoch: Epoch::new(7),
        kind: SegmentKind::Write,
        tenant: None,
        durable: None,
    }
}

fn segment_header_of_a_tenant() -> SegmentHeader {
    SegmentHeader {
        tenant: Some(TenantName::new("acme").unwrap()),
        ..segment_header()
    }
}

/// As it is written today.
fn segment_header_with_durable() -> SegmentHeader {
    SegmentHeader {
        durable: Some(WriteSeq::new(999_990)),
        ..segment_header_of_a_tenant()
    }
}

fn record_page_with_durable() -> RecordPage {
    RecordPage {
        durable: Some(WriteSeq::new(999_999)),
        ..record_page()
    }
}

fn record_page() -> RecordPage {
    let record = |seq, start, len, body| Record {
        seq: WriteSeq::new(seq),
        start: Lba::new(start),
        len,
        body,
    };
    RecordPage {
        segment: SegmentId::new(17),
        generation: Generation::new(4711),
        volume: VOLUME,
        epoch: Epoch::new(7),
        page: 3,
        durable: None,
        records: vec![
            record(1_000_000, 8, 16, RecordBody::Data { offset: 0 }),
            record(1_000_001, (1 << 51) - 8, 8, RecordBody::Data { offset: 16 }),
            record(1_000_002, 1 << 40, 1 << 21, RecordBody::Discard),
            record(1_000_007, 512, 8, RecordBody::Zero),
        ],
    }
}

fn extents() -> Vec<ChunkExtent> {
    let extent = |start, len, body| ChunkExtent {
        start: Lba::new(start),
        len,
        body,
    };
    vec![
        extent(1 << 40, 24, ExtentBody::Data { raw: 0 }),
        extent(0, 8, ExtentBody::Zero),
        extent(64, 16, ExtentBody::Data { raw: 24 }),
        extent(1 << 30, 1 << 21, ExtentBody::Discard),
    ]
}

/// 40 sectors: the first frame shrinks, the second is noise, the third is short.
fn raw() -> Vec<u8> {
    let mut seed = 1u64;
    let mut noise = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed.to_le_bytes()[7]
    };
    let mut raw = vec![7; 16 * 512];
    raw.extend((0..16 * 512).map(|_| noise()));
    raw.extend((0u8..8).flat_map(|sector| [sector; 512]));
    raw
}

fn key() -> DataKey {
    DataKey::new(*b"golden data key, of 32 bytes 32.")
}

/// With it frames are of version 2.
fn second_key() -> DataKey {
    let generation = KeyGeneration::new(2).unwrap();
    DataKey::of_generation(*b"another golden data key, 32 byte", generation)
}

fn journal() -> JournalHeader {
    JournalHeader {
        entries: 8192,
        boot: *b"golden boot id..",
        volume: VOLUME,
        attachment: *b"golden attaching",
        epoch: Epoch::new(3),
    }
}

fn journal_entry() -> (SegmentId, Record) {
    let record = Record {
        seq: WriteSeq::new(8192 * 3 + 17),
        start: Lba::new(0x1234_5678),
        len: 96,
        body: RecordBody::Data { offset: 1024 },
    };
    (SegmentId::new(7), record)
}

const JOURNAL_GENERATION: Generation = Generation::new(11);

const CUT_MS: u64 = 1_700_000_000_456;

fn chunk(compression: Compression, key: Option<&DataKey>) -> Vec<u8> {
    let params = ChunkParams {
        id: chunk_id(),
        first_write: WriteSeq::new(1000),
        last_write: WriteSeq::new(1003),
        cut_ms: CUT_MS,
        frame_sectors: 16,
        compression,
        key,
    };
    encode_chunk(&params, &extents(), &raw()).bytes.to_vec()
}

/// What this build writes, under each golden file's name.
fn current() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("head-full-v3.bin", full_head().encode()),
        ("head-bare-v3.bin", bare_head().encode()),
        ("keys-v1.bin", keys_copy().encode()),
        ("usage-v2.bin", usage_node(&usage_v2())),
        ("usage-v3.bin", usage_node(&usage())),
        ("seal-v1.bin", seal().encode()),
        ("snapshot-v2.bin", snapshot().encode()),
        (
            "record-tenant-v1.bin",
            encode_record(TENANT_KIND, &tenant_record()).unwrap(),
        ),
        (
            "record-name-v1.bin",
            encode_record(NAME_KIND, &name_record()).unwrap(),
        ),
        ("superblock-v1.bin", superblock().encode().to_vec()),
        ("superblock-v2.bin", keyed_superblock().encode().to_vec()),
        (
            "superblock-v3.bin",
            superblock_with_sessions().encode().to_vec(),
        ),
        (
            "superblock-keyed-v3.bin",
            keyed_superblock_with_sessions().encode().to_vec(),
        ),
        ("session-v1.bin", session_page().encode(CACHE).to_vec()),
        ("index-table-v1.bin", index_table().encode(CACHE).to_vec()),
        ("index-record-v1.bin", index_record().encode()),
        ("index-end-v1.bin", index_end().encode()),
        (
            "segment-header-v1.bin",
            segment_header().encode(CACHE).to_vec(),
        ),
        (
            "segment-header-v2.bin",
            segment_header_of_a_tenant().encode(CACHE).to_vec(),
        ),
        (
            "segment-header-v3.bin",
            segment_header_with_durable().encode(CACHE).to_vec(),
        ),
        ("record-page-v1.bin", record_page().encode(CACHE).to_vec()),
        (
            "record-page-v2.bin",
            record_page_with_durable().encode(CACHE).to_vec(),
        ),
        ("journal-header-v1.bin", journal().encode(CACHE).to_vec()),
        ("journal-entry-v1.bin", {
            let (segment, record) = journal_entry();
            journal()
                .encode_entry(segment, JOURNAL_GENERATION, &record)
                .to_vec()
        }),
        ("chunk-none-v2.bin", chunk(Compression::None, None)),
        ("chunk-lz4-v2.bin", chunk(Compression::Lz4, None)),
        ("chunk-zstd-v2.bin", chunk(Compression::Zstd, None)),
        (
            "chunk-lz4-aes-v2.bin",
            chunk(Compression::Lz4, Some(&key())),
        ),
        (
            "chunk-lz4-aes-key2-v3.bin",
            chunk(Compression::Lz4, Some(&second_key())),
        ),
    ]
}

#[test]
#[ignore = "writes the golden files of a new format version; never changes one that is there"]
fn golden_files_missing_are_written() {
    for (name, bytes) in current() {
        if !path(name).exists() {
            std::fs::write(path(name), bytes).unwrap();
            println!("wrote golden/{name}");
        }
    }
}

#[test]
fn golden_files_without_codecs_are_what_this_build_writes() {
    for (name, bytes) in current() {
        // What a compressor makes of the same bytes may change, and a nonce always does.
        if !name.starts_with("chunk-") {
            assert_eq!(golden(name), bytes, "golden/{name}");
        }
    }
}

#[test]
fn golden_files_of_the_store_read_as_ever() {
    let head = |name| Head::decode(&golden(name));
    assert_eq!(head("head-full-v1.bin"), Ok(head_v1(full_head())));
    assert_eq!(head("head-bare-v1.bin"), Ok(bare_head()));
    assert_eq!(head("head-full-v2.bin"), Ok(head_v2(full_head())));
    assert_eq!(head("head-bare-v2.bin"), Ok(bare_head()));
    assert_eq!(head("head-full-v3.bin"), Ok(full_head()));
    assert_eq!(head("head-bare-v3.bin"), Ok(bare_head()));
    let keys = KeysCopy::decode(&golden("keys-v1.bin"), VOLUME);
    assert_eq!(keys, Ok(keys_copy()));
    for (name, expected) in [("usage-v2.bin", usage_v2()), ("usage-v3.bin", usage())] {
        let read = Usage::decode(USAGE_OBJECT, 0, &golden(name));
        assert_eq!(read, Ok(expected), "{name}");
    }
    assert_eq!(Seal::decode(&golden("seal-v1.bin"), chunk_id()), Ok(seal()));
    let v1 = Snapshot {
        root: Some(root_v1()),
        ..snapshot()
    };
    for (name, snapshot) in [("snapshot-v1.bin", v1), ("snapshot-v2.bin", snapshot())] {
        assert_eq!(Snapshot::decode(&golden(name), VOLUME), Ok(snapshot));
    }
    let record = decode_record(TENANT_KIND, &golden("record-tenant-v1.bin"));
    assert_eq!(record, Ok(tenant_record()));
    let record = decode_record(NAME_KIND, &golden("record-name-v1.bin"));
    assert_eq!(record, Ok(name_record()));
}

#[test]
fn golden_files_of_the_cache_read_as_ever() {
    assert_eq!(
        Superblock::decode(&golden("superblock-v1.bin")),
        Ok(superblock())
    );
    assert_eq!(
        Superblock::decode(&golden("superblock-v2.bin")),
        Ok(keyed_superblock())
    );
    assert_eq!(
        Superblock::decode(&golden("superblock-v3.bin")),
        Ok(superblock_with_sessions())
    );
    assert_eq!(
        Superblock::decode(&golden("superblock-keyed-v3.bin")),
        Ok(keyed_superblock_with_sessions())
    );
    let page = SessionPage::decode(&golden("session-v1.bin"), CACHE);
    assert_eq!(page, Ok(session_page()));
    let header = SegmentHeader::decode(&golden("segment-header-v1.bin"), CACHE);
    assert_eq!(header, Ok(segment_header()));
    let header = SegmentHeader::decode(&golden("segment-header-v2.bin"), CACHE);
    assert_eq!(header, Ok(segment_header_of_a_tenant()));
    let header = SegmentHeader::decode(&golden("segment-header-v3.bin"), CACHE);
    assert_eq!(header, Ok(segment_header_with_durable()));
    let page = RecordPage::decode(&golden("record-page-v1.bin"), CACHE);
    assert_eq!(page, Ok(record_page()));
    let page = RecordPage::decode(&golden("record-page-v2.bin"), CACHE);
    assert_eq!(page, Ok(record_page_with_durable()));
}

#[test]
fn golden_files_of_the_journal_read_as_ever() {
    let header = JournalHeader::decode(&golden("journal-header-v1.bin"), CACHE);
    assert_eq!(header, Ok(journal()));
    let entry = golden("journal-entry-v1.bin");
    let entry = journal().decode_entry(17, &entry, |_| Some(JOURNAL_GENERATION));
    assert_eq!(entry, Ok(journal_entry()));
}

#[test]
fn golden_files_of_the_index_read_as_ever() {
    let header = IndexTableHeader::decode(&golden("index-table-v1.bin"), CACHE);
    assert_eq!(header, Ok(index_table()));
    let record = IndexRecord::decode(&golden("index-record-v1.bin"));
    assert_eq!(record, Ok(index_record()));
    let end = IndexEnd::decode(&golden("index-end-v1.bin"));
    assert_eq!(end, Ok(index_end()));
}

#[test]
fn golden_chunks_read_as_ever() {
    let mut keys = DataKeys::one(VOLUME, key());
    keys.insert(VOLUME, second_key());
    let cases = [
        ("chunk-none", None),
        ("chunk-lz4", None),
        ("chunk-zstd", None),
        ("chunk-lz4-aes", Some(&keys)),
    ];
    let versions = [(1, 0), (2, CUT_MS)];
    let cases = cases.iter().flat_map(|case| versions.map(|v| (*case, v)));
    let later = ("chunk-lz4-aes-key2", Some(&keys));
    let later = [2, 3].map(|version| (later, (version, CUT_MS)));
    for ((name, key), (version, cut_ms)) in cases.chain(later) {
        let name = &format!("{name}-v{version}.bin");
        let bytes = golden(name);
        let len = ChunkHeader::encoded_len(&bytes[..CHUNK_PREFIX_LEN]).unwrap();
        let header = ChunkHeader::decode(&bytes[..len], chunk_id()).unwrap();
        assert_eq!(header.extents, extents(), "{name}");
        assert_eq!(header.first_write, WriteSeq::new(1000));
        assert_eq!(header.last_write, WriteSeq::new(1003));
        assert_eq!(header.cut_ms, cut_ms, "{name}");
        // Which key it is, a header says from version 3.
        let generation = if version < 3 { 1 } else { 2 };
        assert_eq!(header.generation.get(), generation, "{name}");
        assert_eq!(header.frame_sectors, 16);
        assert_eq!(header.object_len(), bytes.len() as u64);
        let mut read = Vec::new();
        for (index, frame) in (0..).zip(&header.frames) {
            let stored = &bytes[frame.stored_offset as usize..][..frame.stored_len as usize];
            read.extend_from_slice(&decode_frame(stored, chunk_id(), index, 16, key).unwrap());
        }
        assert!(read == raw(), "{name}");
    }
}
