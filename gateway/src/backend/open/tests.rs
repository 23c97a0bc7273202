use std::time::Duration;

use quarry_objfmt::map::{DeadObject, MapObjectBuilder, ObjectKind};
use quarry_objfmt::{KeyGeneration, MapSeq, Sectors, VolumeName};

use super::*;
use crate::backend::MapEnd;
use crate::store::{FolderStore, GET_BYTES_MAX, Lane};

/// Looks ahead in the log take all places of this lane, and the seal behind it needs one.
#[tokio::test(start_paused = true)]
async fn log_is_sealed_through_a_lane_with_fewer_places_than_looks_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(FolderStore::open(dir.path(), false).unwrap());
    let lane = Lane::narrow(store);
    let tenant = TenantName::new("acme").unwrap();
    let name = VolumeName::new("db").unwrap();
    let volume = VolumeId::from_bytes([7; 16]);
    let head = Head::fresh(volume, &tenant, &name, Sectors::new(2048), 0);
    let key = keys::head_key(&tenant, volume);
    lane.create(&key, head.encode().into()).await.unwrap();
    let by = Claim {
        cache: CacheId::from_bytes([8; 16]),
        host: "a".to_owned(),
        now_ms: 0,
        force: false,
        discard_unsent: false,
        must_be_ours: false,
    };
    // The first has no log before it. Each other one seals that of the one before, which is empty and open.
    for epoch in 1..=3 {
        let claimed = claim(&lane, &tenant, volume, None, &by);
        let claimed = tokio::time::timeout(Duration::from_secs(60), claimed).await;
        let claimed = claimed.expect("it waits for a place for ever").unwrap();
        assert_eq!(claimed.info.epoch, Epoch::new(epoch));
    }
}

/// Such a volume was refused for good at its next attach, for one read may bring 64 MiB.
#[tokio::test]
async fn volume_with_millions_of_dead_objects_is_attached_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), false).unwrap();
    let tenant = TenantName::new("acme").unwrap();
    let name = VolumeName::new("db").unwrap();
    let volume = VolumeId::from_bytes([7; 16]);
    let dead = |number: u64| DeadObject {
        kind: ObjectKind::Chunk,
        epoch: Epoch::new(1),
        number,
        born: MapSeq::new(1),
        died: MapSeq::new(2),
        died_ms: 1_700_000_000_000 + number,
        stored_bytes: 8 << 20,
        generation: KeyGeneration::FIRST,
    };
    let usage = Usage {
        dead: (1..=4_000_000).map(dead).collect(),
        ..Usage::default()
    };
    let id = MapObjectId {
        volume,
        epoch: Epoch::new(1),
        seq: MapSeq::new(1),
    };
    let mut builder = MapObjectBuilder::new(id);
    let place = builder.finish_usage(&usage).unwrap();
    assert!(u64::from(place.1) > GET_BYTES_MAX);
    let (offset, len) = builder.finish_manifest(&Manifest::default()).unwrap();
    let key = keys::map_key(&tenant, volume, id.epoch, id.seq);
    store
        .create(&key, builder.into_bytes().into())
        .await
        .unwrap();
    let root = RootRef {
        epoch: id.epoch,
        seq: id.seq,
        offset,
        len,
        usage: Some(place),
    };
    let head = Head {
        root: Some(root),
        next_map: MapSeq::new(2),
        ..Head::fresh(volume, &tenant, &name, Sectors::new(2048), 0)
    };
    let (_, objects) = load_root(&store, &tenant, &head).await.unwrap();
    assert!(objects.usage(usage.basis) == Some(usage.clone()));
    let end = MapEnd::read(&store, &tenant, id).await.unwrap().unwrap();
    assert!(end.root == root && end.usage == Some(usage));
}
