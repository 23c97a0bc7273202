//! A snapshot and a clone of a volume with a large map cost a few small objects, and no time that anybody
//! notices. `QUARRY_TEST_EXTENTS` sets how many extents it has (1,000,000).

use std::path::Path;
use std::time::{Duration, Instant};

use quarry_gateway::backend::open::{Claim, claim, hold};
use quarry_gateway::snapshot::{CloneSpec, create, make_clone};
use quarry_gateway::store::{FolderStore, Store};
use quarry_objfmt::map::{Manifest, MapObjectBuilder, MapObjectId};
use quarry_objfmt::{
    CacheId, ChunkId, ChunkSeq, DataLoc, Epoch, Head, Lba, Location, MapEntry, MapSeq, RootRef,
    Sectors, SnapName, TenantName, VolumeId, VolumeName, WriteSeq, keys,
};

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
/// As checkpoints cut them.
const TABLE_BYTES: usize = 8 << 20;

/// 4 KiB at the n-th other place of 4 KiB, so that no two are one.
fn extent(n: u64) -> MapEntry {
    let frame = u32::try_from(n % 2048).unwrap();
    MapEntry {
        start: Lba::new(n * 16),
        len: 8,
        location: Location::Data(DataLoc {
            chunk: ChunkId {
                volume: VOLUME,
                epoch: Epoch::new(1),
                seq: ChunkSeq::new(n / 2048),
            },
            raw: frame * 8,
            stored_offset: 4096 + frame * 3000,
            stored_len: 3000 - frame % 100,
        }),
    }
}

async fn put_map(store: &dyn Store, tenant: &TenantName, extents: u64) -> RootRef {
    let mut tables = Vec::new();
    let mut seq = MapSeq::ZERO;
    let new = |seq| {
        let (volume, epoch) = (VOLUME, Epoch::new(1));
        MapObjectBuilder::new(MapObjectId { volume, epoch, seq })
    };
    let put = async |builder: MapObjectBuilder| {
        let id = builder.id();
        let key = keys::map_key(tenant, VOLUME, id.epoch, id.seq);
        store
            .create(&key, builder.into_bytes().into())
            .await
            .unwrap();
    };
    let mut builder = new(seq);
    for n in 0..extents {
        builder.push(extent(n)).unwrap();
        if builder.table_bytes() >= TABLE_BYTES {
            tables.extend(builder.finish_table().unwrap());
            seq = seq.next();
            put(std::mem::replace(&mut builder, new(seq))).await;
        }
    }
    tables.extend(builder.finish_table().unwrap());
    println!("{extents} extents in {} tables", tables.len());
    let runs = vec![tables];
    let (offset, len) = builder.finish_manifest(&Manifest { runs }).unwrap();
    put(builder).await;
    RootRef {
        epoch: Epoch::new(1),
        seq,
        offset,
        len,
        usage: None,
    }
}

fn objects(dir: &Path) -> usize {
    let inside = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        if path.is_dir() { objects(&path) } else { 1 }
    };
    std::fs::read_dir(dir).unwrap().map(inside).sum()
}

#[tokio::test]
async fn snapshot_and_clone_of_a_large_map_are_made_at_once() {
    let extents = std::env::var("QUARRY_TEST_EXTENTS");
    let extents = extents.map_or(1_000_000, |text| text.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    let tenant = TenantName::new("acme").unwrap();
    let root = put_map(&store, &tenant, extents).await;
    let name = VolumeName::new("db").unwrap();
    let head = Head {
        epoch: Epoch::new(1),
        root: Some(root),
        root_write: WriteSeq::new(extents),
        next_map: root.seq.next(),
        ..Head::fresh(VOLUME, &tenant, &name, Sectors::new(1 << 40), 1)
    };
    let key = keys::head_key(&tenant, VOLUME);
    store.create(&key, head.encode().into()).await.unwrap();
    let by = Claim {
        cache: CacheId::from_bytes([1; 16]),
        host: "a".to_owned(),
        now_ms: 1,
        force: false,
        discard_unsent: false,
        must_be_ours: false,
    };
    let (cell, _) = hold(&store, &tenant, VOLUME, &by).await.unwrap();
    let before = objects(dir.path());
    let begun = Instant::now();
    let snapshot = SnapName::new("golden").unwrap();
    create(&store, &cell, &snapshot, WriteSeq::new(extents), 2)
        .await
        .unwrap();
    let snapshotted = begun.elapsed();
    let spec = CloneSpec {
        tenant: tenant.clone(),
        parent: VOLUME,
        snapshot,
        volume: VolumeId::from_bytes([2; 16]),
        name: VolumeName::new("copy").unwrap(),
        key: None,
        now_ms: 3,
    };
    let begun = Instant::now();
    make_clone(&store, &spec).await.unwrap();
    let cloned = begun.elapsed();
    let made = objects(dir.path()) - before;
    println!("snapshot {snapshotted:?}, clone {cloned:?}, {made} objects");
    // The copy of the snapshot, the record, the map object and the head of the clone.
    assert_eq!(made, 4);
    assert!(snapshotted < Duration::from_secs(1) && cloned < Duration::from_secs(1));
    let begun = Instant::now();
    let opened = claim(&store, &tenant, spec.volume, None, &by)
        .await
        .unwrap();
    println!("opened in {:?}", begun.elapsed());
    assert_eq!(opened.root.run_entries(), [extents]);
}
