use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use quarry_objfmt::chunk::{ChunkExtent, ChunkParams, ExtentBody, encode_chunk};
use quarry_objfmt::map::{DeadObject, MapObjectBuilder, ObjectKind};
use quarry_objfmt::{
    Compression, DataKey, Encryption, KeyGeneration, KeyName, Lba, MapSeq, Sectors, SnapshotRef,
    VolumeName, WrappedKey, WrappedKeys,
};

use super::*;
use crate::backend::MapEnd;
use crate::backend::past::open_at;
use crate::backend::release::release;
use crate::control::{Finding, VerifySpec, VolumeRef};
use crate::store::{FolderStore, GET_BYTES_MAX, Lane, Operation};

/// Looks ahead in the log take all places of this lane, and the seal behind it needs one.
#[tokio::test(start_paused = true)]
async fn log_is_sealed_through_a_lane_with_fewer_places_than_looks_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(FolderStore::open(dir.path(), true).unwrap());
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

/// Who takes a volume whoever has it.
fn by_force() -> Claim {
    Claim {
        cache: CacheId::from_bytes([8; 16]),
        host: "a".to_owned(),
        now_ms: 0,
        force: true,
        discard_unsent: false,
        must_be_ours: false,
    }
}

/// A store that answers a replacement in time or, once told so, not: that one takes effect just before the next.
#[derive(Debug)]
struct Late {
    store: FolderStore,
    is_slow: AtomicBool,
    late: parking_lot::Mutex<Option<(Bytes, Tag)>>,
}

#[async_trait]
impl Store for Late {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        self.store.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.store.get_range(key, range).await
    }
    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        self.store.get_prefix(key, len).await
    }
    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        self.store.create(key, body).await
    }
    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        if self.is_slow.swap(false, Ordering::Relaxed) {
            *self.late.lock() = Some((body, seen.clone()));
            return Err(StoreError::Unavailable {
                operation: Operation::Replace,
                key: key.to_owned(),
                reason: "slow".to_owned(),
            });
        }
        let late = self.late.lock().take();
        if let Some((body, seen)) = late {
            self.store.replace(key, body, &seen).await?;
        }
        self.store.replace(key, body, seen).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.store.delete(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.store.list(prefix).await
    }
    fn describe(&self) -> String {
        self.store.describe()
    }
}

/// Such a volume was not attached again by a start, and who used its device waited for ever.
#[tokio::test]
async fn own_change_given_up_that_takes_effect_during_a_claim_is_raised_upon() {
    let dir = tempfile::tempdir().unwrap();
    let store = Late {
        store: FolderStore::open(dir.path(), true).unwrap(),
        is_slow: AtomicBool::new(false),
        late: parking_lot::Mutex::new(None),
    };
    let tenant = TenantName::new("acme").unwrap();
    let name = VolumeName::new("db").unwrap();
    let volume = VolumeId::from_bytes([7; 16]);
    let head = Head::fresh(volume, &tenant, &name, Sectors::new(2048), 0);
    let key = keys::head_key(&tenant, volume);
    store.create(&key, head.encode().into()).await.unwrap();
    let again = |now_ms| Claim {
        now_ms,
        force: false,
        must_be_ours: true,
        ..by_force()
    };
    let next_is_slow = || store.is_slow.store(true, Ordering::Relaxed);
    let attached = claim(&store, &tenant, volume, None, &by_force()).await;
    assert_eq!(attached.unwrap().info.epoch, Epoch::new(1));

    // A try before it.
    next_is_slow();
    let given_up = claim(&store, &tenant, volume, None, &again(1)).await;
    let given_up = given_up.unwrap_err();
    assert!(
        matches!(given_up, OpenError::Store(StoreError::Unavailable { .. })),
        "{given_up}"
    );
    let claimed = claim(&store, &tenant, volume, None, &again(2)).await;
    let claimed = claimed.unwrap();
    assert_eq!(claimed.info.epoch, Epoch::new(3), "one was given up");
    assert_eq!(claimed.info.owner.as_ref().unwrap().since_ms, 2);

    // A checkpoint of a daemon that was killed.
    next_is_slow();
    let checkpoint = |head: &mut Head| head.stored_bytes += 7;
    let given_up = claimed.head.update(&store, checkpoint).await;
    assert!(matches!(given_up, Err(HeadError::Store(_))));
    let claimed = claim(&store, &tenant, volume, None, &again(3)).await;
    let claimed = claimed.unwrap();
    assert_eq!(claimed.info.epoch, Epoch::new(4));
    assert_eq!(claimed.info.stored_bytes, head.stored_bytes + 7);

    // Only the right to change it.
    next_is_slow();
    hold(&store, &tenant, volume, &again(4)).await.unwrap_err();
    let (held, was_ours) = hold(&store, &tenant, volume, &again(5)).await.unwrap();
    assert_eq!((held.epoch(), was_ours), (Epoch::new(6), true));

    // Another's is not raised upon.
    next_is_slow();
    let others = Claim {
        cache: CacheId::from_bytes([9; 16]),
        host: "b".to_owned(),
        ..by_force()
    };
    let given_up = claim(&store, &tenant, volume, None, &others).await;
    given_up.unwrap_err();
    let raced = claim(&store, &tenant, volume, None, &again(6)).await;
    match raced {
        Err(OpenError::Raced { by }) => assert_eq!(by, "host b"),
        other => panic!("{other:?}"),
    }
}

/// A store that has a chunk at every place of a log.
#[derive(Debug)]
struct Endless(FolderStore);

#[async_trait]
impl Store for Endless {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        self.0.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.0.get_range(key, range).await
    }
    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        let Some((_, number)) = key.rsplit_once("/chunk/00000001/") else {
            return self.0.get_prefix(key, len).await;
        };
        let seq = u64::from_str_radix(number, 16).unwrap();
        let params = ChunkParams {
            id: ChunkId {
                volume: VolumeId::from_bytes([7; 16]),
                epoch: Epoch::new(1),
                seq: ChunkSeq::new(seq),
            },
            first_write: WriteSeq::new(seq),
            last_write: WriteSeq::new(seq),
            cut_ms: 1,
            frame_sectors: 128,
            compression: Compression::None,
            key: None,
        };
        let zero = ChunkExtent {
            start: Lba::new(0),
            len: 8,
            body: ExtentBody::Zero,
        };
        Ok(encode_chunk(&params, &[zero], &[]).bytes)
    }
    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        self.0.create(key, body).await
    }
    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        self.0.replace(key, body, seen).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.0.delete(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.0.list(prefix).await
    }
    fn describe(&self) -> String {
        self.0.describe()
    }
}

/// It took all memory of the daemon, and of all other tenants with it.
#[tokio::test]
async fn log_without_an_end_is_refused_and_told_of_by_a_check() {
    let dir = tempfile::tempdir().unwrap();
    let store = Endless(FolderStore::open(dir.path(), true).unwrap());
    let tenant = TenantName::new("acme").unwrap();
    let name = VolumeName::new("db").unwrap();
    let volume = VolumeId::from_bytes([7; 16]);
    let head = Head {
        log: vec![LogRange {
            epoch: Epoch::new(1),
            first: ChunkSeq::new(1),
            end: None,
        }],
        epoch: Epoch::new(1),
        ..Head::fresh(volume, &tenant, &name, Sectors::new(2048), 0)
    };
    let key = keys::head_key(&tenant, volume);
    store.create(&key, head.encode().into()).await.unwrap();
    let by = by_force();
    let read_only = open_read_only(&store, &tenant, volume, None, &by).await;
    let claimed = claim(&store, &tenant, volume, None, &by).await;
    for refused in [read_only, claimed] {
        match refused {
            Err(OpenError::Damaged { object, reason }) => {
                assert!(object.contains("/chunk/"), "{object}");
                assert!(reason.contains("longer than any"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    let image = VolumeRef { tenant, name }.into();
    let (store, spec) = (Arc::new(store), VerifySpec::default());
    let checked = crate::verify::run(store, &image, volume, spec, None, Arc::default()).await;
    let report = checked.unwrap().unwrap();
    let is_told = |finding: &Finding| finding.problem.contains("longer than any");
    assert!(report.findings.iter().any(is_told), "{report:?}");
}

/// Whoever put the wrong copy back had another volume served under this one's name.
#[tokio::test]
async fn head_of_another_volume_is_refused_by_all_who_open_or_take_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    let tenant = TenantName::new("acme").unwrap();
    let name = VolumeName::new("other").unwrap();
    let (volume, other) = (VolumeId::from_bytes([7; 16]), VolumeId::from_bytes([9; 16]));
    let by = by_force();
    let snapshot = SnapshotRef {
        name: "s".to_owned(),
        created_ms: 1,
        root_write: WriteSeq::ZERO,
        size: Sectors::new(2048),
        closing: false,
        root: None,
    };
    let head = Head {
        owner: Some(Owner {
            cache: by.cache,
            host: by.host.clone(),
            since_ms: 0,
        }),
        snapshots: vec![snapshot],
        ..Head::fresh(other, &tenant, &name, Sectors::new(2048), 0)
    };
    let bytes = Bytes::from(head.encode());
    let places = [volume, other].map(|of| keys::head_key(&tenant, of));
    for place in &places {
        store.create(place, bytes.clone()).await.unwrap();
    }
    let (snap, now_ms) = (SnapName::new("s").unwrap(), 2);
    let read_only = open_read_only(&store, &tenant, volume, None, &by).await;
    let as_it_was = open_at(&store, &tenant, volume, 1, now_ms).await;
    let of_snapshot = open_snapshot(&store, &tenant, volume, &snap).await;
    let released = release(&store, &tenant, volume, by.cache).await;
    let held = hold(&store, &tenant, volume, &by).await;
    let claimed = claim(&store, &tenant, volume, None, &by).await;
    let all = [
        ("read-only", read_only.err()),
        ("as it was", as_it_was.err()),
        ("a snapshot", of_snapshot.err()),
        ("released", released.err()),
        ("held", held.err()),
        ("claimed", claimed.err()),
    ];
    for (how, error) in all {
        match error {
            Some(OpenError::Damaged { object, reason }) => {
                assert_eq!(object, places[0], "{how}");
                assert!(reason.contains(&other.to_string()), "{how}: {reason}");
            }
            error => panic!("{how}: {error:?}"),
        }
    }
    for place in &places {
        assert_eq!(store.get(place).await.unwrap().0, bytes, "{place}");
    }
}

/// Such a volume was refused for good at its next attach, for one read may bring 64 MiB.
#[tokio::test]
async fn volume_with_millions_of_dead_objects_is_attached_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
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

/// Its reads failed: the key was not at hand.
#[tokio::test]
async fn reader_leaves_out_what_was_written_with_a_key_that_its_head_has_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    let tenant = TenantName::new("acme").unwrap();
    let name = VolumeName::new("db").unwrap();
    let volume = VolumeId::from_bytes([7; 16]);
    let own = WrappedKey {
        volume,
        generation: KeyGeneration::FIRST,
        by: KeyName::new("k").unwrap(),
        bytes: vec![1; 40],
    };
    let head = Head {
        encryption: Encryption::Aes256Gcm,
        keys: WrappedKeys {
            revision: 1,
            keys: vec![own],
        },
        log: vec![LogRange {
            epoch: Epoch::new(1),
            first: ChunkSeq::new(1),
            end: None,
        }],
        epoch: Epoch::new(1),
        ..Head::fresh(volume, &tenant, &name, Sectors::new(2048), 0)
    };
    let key = keys::head_key(&tenant, volume);
    store.create(&key, head.encode().into()).await.unwrap();
    for (seq, generation) in [(1, 1), (2, 1), (3, 2), (4, 2)] {
        let generation = KeyGeneration::new(generation).unwrap();
        let data_key = DataKey::of_generation([9; 32], generation);
        let id = ChunkId {
            volume,
            epoch: Epoch::new(1),
            seq: ChunkSeq::new(seq),
        };
        let params = ChunkParams {
            id,
            first_write: WriteSeq::new(seq),
            last_write: WriteSeq::new(seq),
            cut_ms: 1,
            frame_sectors: head.frame_sectors,
            compression: Compression::None,
            key: Some(&data_key),
        };
        let zero = ChunkExtent {
            start: Lba::new(0),
            len: 8,
            body: ExtentBody::Zero,
        };
        let chunk = encode_chunk(&params, &[zero], &[]).bytes;
        let key = keys::chunk_key(&tenant, id);
        store.create(&key, chunk).await.unwrap();
    }
    let by = by_force();
    let opened = open_read_only(&store, &tenant, volume, None, &by).await;
    let opened = opened.unwrap();
    assert_eq!(opened.stored_write, WriteSeq::new(2));
    assert_eq!((opened.log.len(), opened.next_chunk), (2, ChunkSeq::new(3)));
}
