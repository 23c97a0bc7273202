use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::AtomicUsize;

use async_trait::async_trait;
use quarry_objfmt::head::{Lineage, Owner, Parent, SnapshotRef};
use quarry_objfmt::map::{Basis, Manifest, MapObjectBuilder, MapObjectId, Usage};
use quarry_objfmt::record::CLONE_KIND;
use quarry_objfmt::{
    ChunkId, ChunkSeq, Epoch, KeyGeneration, KeyName, MapSeq, RootRef, WrappedKey, WriteSeq,
};

use super::*;
use crate::snapshot::{CloneSpec, SnapshotError, make_clone};
use crate::store::{FolderStore, Operation};

const HOST: CacheId = CacheId::from_bytes([9; 16]);
const DAY: u64 = 24 * 60 * 60 * 1000;
const NOW: u64 = 1000 * DAY;

/// Where a store stops answering.
#[derive(Clone, Copy, Debug)]
enum Stop {
    /// The call has no effect.
    Before,
    /// It has its effect, and no answer.
    After,
}

/// A store that is away from its call `calls` on.
#[derive(Debug)]
struct Stops {
    store: FolderStore,
    left: AtomicUsize,
    how: Stop,
}

impl Stops {
    fn new(store: &FolderStore, calls: usize, how: Stop) -> Self {
        Self {
            store: store.clone(),
            left: AtomicUsize::new(calls),
            how,
        }
    }

    async fn call<T>(
        &self,
        key: &str,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let one_less = |left: usize| left.checked_sub(1);
        let left = self
            .left
            .try_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        let answer = match (left, self.how) {
            (Ok(2..), _) => return call.await,
            (Ok(1), Stop::After) => call.await.map(drop),
            _ => Ok(()),
        };
        drop(answer);
        Err(StoreError::Unavailable {
            operation: Operation::Get,
            key: key.to_owned(),
            reason: "stopped".to_owned(),
        })
    }
}

#[async_trait]
impl Store for Stops {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        self.call(key, self.store.get(key)).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.call(key, self.store.get_range(key, range)).await
    }
    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        self.call(key, self.store.get_prefix(key, len)).await
    }
    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        self.call(key, self.store.create(key, body)).await
    }
    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        self.call(key, self.store.replace(key, body, seen)).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.call(key, self.store.delete(key)).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.call(prefix, self.store.list(prefix)).await
    }
    async fn list_some(&self, prefix: &str, max: usize) -> Result<Vec<String>, StoreError> {
        self.call(prefix, self.store.list_some(prefix, max)).await
    }
    fn describe(&self) -> String {
        self.store.describe()
    }
}

/// A store whose call number `left` waits, before it is made, until it is told to go on.
#[derive(Debug)]
struct Waits {
    store: FolderStore,
    left: AtomicUsize,
    reached: tokio::sync::Notify,
    go_on: tokio::sync::Notify,
}

impl Waits {
    fn new(store: &FolderStore, calls: usize) -> Self {
        Self {
            store: store.clone(),
            left: AtomicUsize::new(calls),
            reached: tokio::sync::Notify::new(),
            go_on: tokio::sync::Notify::new(),
        }
    }

    async fn wait(&self) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.reached.notify_one();
            self.go_on.notified().await;
        }
    }
}

#[async_trait]
impl Store for Waits {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        self.wait().await;
        self.store.get(key).await
    }
    async fn get_range(&self, key: &str, _: Range<u64>) -> Result<Bytes, StoreError> {
        panic!("{key} is read by part")
    }
    async fn get_prefix(&self, key: &str, _: u64) -> Result<Bytes, StoreError> {
        panic!("{key} is read by part")
    }
    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        self.wait().await;
        self.store.create(key, body).await
    }
    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        self.wait().await;
        self.store.replace(key, body, seen).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.wait().await;
        self.store.delete(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.wait().await;
        self.store.list(prefix).await
    }
    async fn list_some(&self, prefix: &str, max: usize) -> Result<Vec<String>, StoreError> {
        self.wait().await;
        self.store.list_some(prefix, max).await
    }
    fn describe(&self) -> String {
        self.store.describe()
    }
}

/// Runs `check` for each place where `run` can be stopped, in a bucket of its own, and then once for a
/// run that was not.
async fn at_each_stop<T>(
    prepare: impl AsyncFn(&FolderStore),
    run: impl AsyncFn(&dyn Store) -> Result<T, TrashError>,
    check: impl AsyncFn(&FolderStore, &str),
) {
    for how in [Stop::Before, Stop::After] {
        let mut calls = 0;
        loop {
            calls += 1;
            assert!(calls < 100, "it goes on for ever");
            let dir = tempfile::tempdir().unwrap();
            let store = FolderStore::open(dir.path(), true).unwrap();
            prepare(&store).await;
            let done = run(&Stops::new(&store, calls, how)).await.is_ok();
            check(&store, &format!("stopped {how:?} call {calls}")).await;
            if done {
                break;
            }
        }
        assert!(calls > 3, "only {calls} calls");
    }
}

fn volume(name: &str) -> VolumeRef {
    VolumeRef::new("acme", name).unwrap()
}

fn id(number: u8) -> VolumeId {
    VolumeId::from_bytes([number; 16])
}

/// A volume of three objects beside its name.
async fn make(store: &FolderStore, volume: &VolumeRef, id: VolumeId, change: impl Fn(&mut Head)) {
    let mut head = Head::fresh(id, &volume.tenant, &volume.name, Sectors::new(1000), 7);
    head.epoch = Epoch::new(3);
    head.next_map = MapSeq::new(9);
    change(&mut head);
    let key = keys::head_key(&volume.tenant, id);
    store.create(&key, head.encode().into()).await.unwrap();
    let prefix = keys::volume_prefix(&volume.tenant, id);
    for object in ["chunk/00000001/1", "map/00000001/1"] {
        let key = format!("{prefix}{object}");
        store.create(&key, Bytes::from_static(b"x")).await.unwrap();
    }
    give_name(store, volume, id, 7, Rates::NONE).await.unwrap();
}

/// Two volumes, one of them to be deleted, and one of another tenant that is called the same.
async fn two(store: &FolderStore) {
    make(store, &volume("db"), id(1), |_| ()).await;
    make(store, &volume("other"), id(2), |_| ()).await;
    make(
        store,
        &VolumeRef::new("acme2", "db").unwrap(),
        id(3),
        |_| (),
    )
    .await;
}

async fn all(store: &FolderStore) -> BTreeMap<String, Bytes> {
    let mut all = BTreeMap::new();
    for key in store.list("").await.unwrap() {
        match store.get(&key).await {
            Ok((bytes, _)) => _ = all.insert(key, bytes),
            // A purge that was stopped has deletions under way.
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => panic!("{key}: {error}"),
        }
    }
    all
}

/// All that is not of the volume `id`, whose name is `name` if it has one.
async fn others(store: &FolderStore, id: VolumeId) -> BTreeMap<String, Bytes> {
    let mut all = all(store).await;
    let id = id.to_string();
    all.retain(|key, _| !key.contains(&id) && key != "t/acme/names/db");
    all
}

async fn head(store: &FolderStore, id: VolumeId) -> Head {
    match look(store, &volume("db").tenant, id).await.unwrap() {
        Found::Sound(head, _) => *head,
        _ => panic!("no sound head of {id}"),
    }
}

async fn delete(store: &dyn Store) -> Result<TrashRecord, TrashError> {
    put(store, &volume("db"), id(1), HOST, NOW).await
}

async fn bring_back(store: &dyn Store) -> Result<VolumeRef, TrashError> {
    restore(store, &volume("db").tenant, id(1), None).await
}

async fn purge_old(store: &dyn Store, now_ms: u64, age_ms: u64) -> Result<Purged, TrashError> {
    let objects = AtomicU64::new(0);
    purge(store, &volume("db").tenant, id(1), now_ms, age_ms, &objects).await
}

async fn assert_whole(store: &FolderStore, at: &str) {
    assert_eq!(
        named(store, &volume("db")).await.unwrap(),
        Some(id(1)),
        "{at}"
    );
    let head = head(store, id(1)).await;
    assert!(
        head.deleted().is_none() && head.owner.is_none(),
        "{at}: {head:?}"
    );
    assert_eq!(head.name, "db");
    let prefix = keys::volume_prefix(&volume("db").tenant, id(1));
    assert_eq!(store.list(&prefix).await.unwrap().len(), 3, "{at}");
    assert_eq!(
        records(store, &volume("db").tenant).await.unwrap(),
        [],
        "{at}"
    );
}

#[tokio::test]
async fn deleting_stopped_anywhere_is_finished_by_the_next_and_loses_nothing() {
    let later = NOW + DAY;
    let check = async |store: &FolderStore, at: &str| {
        let before = others(store, id(1)).await;
        let named = named(store, &volume("db")).await.unwrap();
        let tenant = &volume("db").tenant;
        let is_listed = !records(store, tenant).await.unwrap().is_empty();
        assert!(
            named.is_some() || is_listed,
            "{at}: it cannot be found any more"
        );
        if named.is_some() {
            let again = put(store, &volume("db"), id(1), HOST, later).await.unwrap();
            assert_eq!(again.name, "db");
        }
        let trash = list(store, tenant).await.unwrap();
        assert_eq!(trash.len(), 1, "{at}");
        let since_ms = trash[0].since_ms();
        assert_eq!(trash[0].record.deleted_ms, since_ms, "{at}");
        assert!(since_ms == NOW || since_ms == later, "{at}");
        // What is new in the trash is not purged by what was left of an earlier try.
        let early = purge_old(store, since_ms + DAY - 1, DAY).await.unwrap();
        assert_eq!(early, Purged::NotDue { since_ms }, "{at}");
        bring_back(store).await.unwrap();
        assert_whole(store, at).await;
        assert_eq!(others(store, id(1)).await, before, "{at}");
    };
    at_each_stop(two, delete, check).await;
}

#[tokio::test]
async fn deleting_stopped_anywhere_can_be_taken_back_at_once() {
    let check = async |store: &FolderStore, at: &str| {
        if head(store, id(1)).await.deleted().is_some() {
            bring_back(store).await.unwrap();
        }
        assert_whole(store, at).await;
    };
    at_each_stop(two, delete, check).await;
}

#[tokio::test]
async fn restoring_stopped_anywhere_is_finished_by_the_next_and_never_purged_half_way() {
    let prepare = async |store: &FolderStore| {
        two(store).await;
        delete(store).await.unwrap();
    };
    let check = async |store: &FolderStore, at: &str| {
        if head(store, id(1)).await.deleted().is_none() {
            let purged = purge_old(store, NOW + 9 * DAY, DAY).await;
            let kept = matches!(
                purged,
                Ok(Purged::Restored) | Err(TrashError::Nameless | TrashError::NotThere)
            );
            assert!(kept, "{at}: {purged:?}");
        }
        match bring_back(store).await {
            Ok(restored) => assert_eq!(restored, volume("db"), "{at}"),
            Err(TrashError::NotThere) => {}
            Err(error) => panic!("{at}: {error}"),
        }
        assert_whole(store, at).await;
    };
    at_each_stop(prepare, bring_back, check).await;
}

#[tokio::test]
async fn purging_stopped_anywhere_is_finished_by_the_next_and_leaves_only_the_others() {
    let prepare = async |store: &FolderStore| {
        two(store).await;
        delete(store).await.unwrap();
    };
    let check = async |store: &FolderStore, at: &str| {
        let before = others(store, id(1)).await;
        assert_eq!(before.len(), 8, "{at}");
        match purge_old(store, NOW + DAY, DAY).await {
            Ok(Purged::Gone) | Err(TrashError::NotThere) => {}
            other => panic!("{at}: {other:?}"),
        }
        assert_eq!(all(store).await, before, "{at}");
    };
    let run = async |store: &dyn Store| purge_old(store, NOW + DAY, DAY).await;
    at_each_stop(prepare, run, check).await;
}

/// With two copies of its keys, as a rewrapping that was cut off leaves them.
async fn encrypt(store: &FolderStore, tenant: &TenantName, id: VolumeId) {
    let key = WrappedKey {
        volume: id,
        generation: KeyGeneration::FIRST,
        by: KeyName::new("k").unwrap(),
        bytes: vec![1; 60],
    };
    let wrapped = crate::keys::first(vec![key]);
    let first = crate::keys::put_first_copy(store, tenant, id, &wrapped);
    first.await.unwrap();
    let next = crate::keys::put_next_copy(store, tenant, id, wrapped.clone());
    next.await.unwrap();
    let Found::Sound(head, tag) = look(store, tenant, id).await.unwrap() else {
        panic!("no sound head");
    };
    let encrypted = Head {
        encryption: Encryption::Aes256Gcm,
        keys: wrapped,
        ..*head
    };
    let key = keys::head_key(tenant, id);
    let put = store.replace(&key, encrypted.encode().into(), &tag);
    put.await.unwrap();
}

#[tokio::test]
async fn purging_stopped_anywhere_leaves_no_data_of_an_encrypted_volume_less_any_beside_its_keys() {
    for lost in [false, true] {
        let prepare = async |store: &FolderStore| {
            two(store).await;
            let tenant = &volume("db").tenant;
            encrypt(store, tenant, id(1)).await;
            delete(store).await.unwrap();
            if lost {
                let key = keys::head_key(tenant, id(1));
                store.delete(&key).await.unwrap();
            }
        };
        let check = async |store: &FolderStore, at: &str| {
            let left = all(store).await;
            let of_it = |part: &str| {
                let part = format!("{}/{part}/", id(1));
                left.keys().filter(|key| key.contains(&part)).count()
            };
            let data = of_it("chunk") + of_it("map");
            let in_head = match look(store, &volume("db").tenant, id(1)).await.unwrap() {
                Found::Sound(head, _) => head.keys.keys.len(),
                _ => 0,
            };
            assert!(data == 2 || of_it("keys") + in_head == 0, "{at}: {left:?}");
            match purge_old(store, NOW + DAY, DAY).await {
                Ok(Purged::Gone) | Err(TrashError::NotThere) => {}
                other => panic!("{at}: {other:?}"),
            }
            assert_eq!(all(store).await.len(), 8, "{at}");
        };
        let run = async |store: &dyn Store| purge_old(store, NOW + DAY, DAY).await;
        at_each_stop(prepare, run, check).await;
    }
}

#[tokio::test]
async fn purging_begun_cannot_be_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    two(&store).await;
    delete(&store).await.unwrap();
    // Record, head, clones, the change of the head.
    let stops = Stops::new(&store, 5, Stop::Before);
    purge_old(&stops, NOW + DAY, DAY).await.unwrap_err();
    assert_eq!(head(&store, id(1)).await.deleted(), Some(Deleted::Purging));
    let refused = bring_back(&store).await;
    assert!(matches!(refused, Err(TrashError::Purging)), "{refused:?}");
}

#[tokio::test]
async fn two_purging_at_once_leave_only_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    two(&store).await;
    delete(&store).await.unwrap();
    let before = others(&store, id(1)).await;
    let purge = || purge_old(&store, NOW + DAY, DAY);
    let harmless = |purged: &_| matches!(purged, Ok(Purged::Gone) | Err(TrashError::NotThere));
    for purged in futures::future::join_all([purge(), purge(), purge()]).await {
        assert!(harmless(&purged), "{purged:?}");
    }
    // One that is as far as one call, when another does all of it.
    for calls in 1..12 {
        make(&store, &volume("db"), id(1), |_| ()).await;
        delete(&store).await.unwrap();
        let waits = Waits::new(&store, calls);
        let (slow, quick) = futures::future::join(purge_old(&waits, NOW + DAY, DAY), async {
            waits.reached.notified().await;
            let purged = purge().await;
            waits.go_on.notify_one();
            purged
        })
        .await;
        assert!(
            harmless(&slow) && harmless(&quick),
            "{calls}: {slow:?} {quick:?}"
        );
        assert_eq!(all(&store).await, before, "{calls}");
    }
    assert_eq!(all(&store).await, before);
}

#[tokio::test]
async fn volume_attached_elsewhere_is_not_deleted_and_one_deleted_is_not_attached() {
    use crate::backend::open::{Claim, OpenError, claim};
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    let owner = |cache| {
        move |head: &mut Head| {
            head.owner = Some(Owner {
                cache,
                host: "there".to_owned(),
                since_ms: 1,
            });
        }
    };
    make(
        &store,
        &volume("db"),
        id(1),
        owner(CacheId::from_bytes([8; 16])),
    )
    .await;
    let before = all(&store).await;
    let refused = delete(&store).await;
    assert!(matches!(refused, Err(TrashError::Owned { host }) if host == "there"));
    assert_eq!(all(&store).await, before);
    // One's own that is not served is no obstacle.
    make(&store, &volume("mine"), id(4), owner(HOST)).await;
    put(&store, &volume("mine"), id(4), HOST, NOW)
        .await
        .unwrap();
    let how = Claim {
        cache: HOST,
        host: "here".to_owned(),
        now_ms: NOW,
        force: true,
        discard_unsent: true,
        must_be_ours: false,
    };
    let refused = claim(&store, &volume("mine").tenant, id(4), None, &how).await;
    assert!(matches!(refused, Err(OpenError::Deleted)));
}

#[tokio::test]
async fn restored_volume_takes_up_nothing_that_the_cache_has_of_which_it_was_given_up() {
    // What another host's cache has was not given up.
    let other = CacheId::from_bytes([8; 16]);
    for (cache, is_kept) in [(HOST, false), (other, true)] {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        let since = Epoch::new(1);
        let lineage = |head: &mut Head| head.lineage = Some(Lineage { cache, since });
        make(&store, &volume("db"), id(1), lineage).await;
        delete(&store).await.unwrap();
        bring_back(&store).await.unwrap();
        assert_eq!(head(&store, id(1)).await.lineage.is_some(), is_kept);
    }
}

fn snapshots(head: &mut Head) {
    head.snapshots = vec![SnapshotRef {
        name: "monday".to_owned(),
        created_ms: 1,
        root_write: WriteSeq::ZERO,
        size: Sectors::new(1000),
        closing: false,
        root: None,
    }];
}

async fn record_clone(store: &FolderStore, clone: VolumeId, created_ms: u64) {
    let record = CloneRecord {
        volume: clone,
        name: "copy".to_owned(),
        created_ms,
    };
    let snapshot = SnapName::new("monday").unwrap();
    let key = keys::clone_key(&volume("db").tenant, id(1), &snapshot, clone);
    let bytes = encode_record(CLONE_KIND, &record).unwrap();
    store.create(&key, bytes.into()).await.unwrap();
}

fn of_monday(head: &mut Head) {
    head.parent = Some(Parent {
        volume: id(1),
        snapshot: "monday".to_owned(),
    });
}

#[tokio::test]
async fn volume_with_clones_is_refused_and_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    make(&store, &volume("db"), id(1), snapshots).await;
    record_clone(&store, id(5), NOW).await;
    let refused = delete(&store).await;
    assert!(matches!(refused, Err(TrashError::Cloning { clone }) if clone == "acme/copy"));
    make(&store, &volume("copy"), id(5), of_monday).await;
    let before = all(&store).await;
    let refused = delete(&store).await.unwrap_err().to_string();
    assert_eq!(refused, "it has clones: acme/copy");
    assert_eq!(all(&store).await, before);
    // A clone in the trash can come back.
    put(&store, &volume("copy"), id(5), HOST, NOW)
        .await
        .unwrap();
    let refused = delete(&store).await.unwrap_err().to_string();
    assert_eq!(refused, "it has clones: acme/copy (in the trash)");
    // And when it is purged, its record at the parent goes too.
    let objects = AtomicU64::new(0);
    let tenant = volume("db").tenant;
    purge(&store, &tenant, id(5), NOW, 0, &objects)
        .await
        .unwrap();
    assert_eq!(objects.into_inner(), 3);
    let left = all(&store).await;
    assert!(
        !left.keys().any(|key| key.contains(&id(5).to_string())),
        "{left:?}"
    );
    delete(&store).await.unwrap();
    assert_eq!(purge_old(&store, NOW, 0).await.unwrap(), Purged::Gone);
    assert!(all(&store).await.is_empty());
}

#[tokio::test]
async fn clone_that_does_not_know_its_parent_or_cannot_be_read_protects_it_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    make(&store, &volume("db"), id(1), snapshots).await;
    record_clone(&store, id(5), NOW - CLONING_TIME_MAX_MS).await;
    make(&store, &volume("copy"), id(5), snapshots).await;
    let refused = delete(&store).await.unwrap_err().to_string();
    assert_eq!(refused, "it has clones: acme/copy");
    let key = keys::head_key(&volume("db").tenant, id(5));
    store.delete(&key).await.unwrap();
    let damaged = Bytes::from_static(b"QYHDx");
    store.create(&key, damaged).await.unwrap();
    let refused = delete(&store).await.unwrap_err().to_string();
    assert!(refused.contains("cannot be read"), "{refused}");
}

#[tokio::test]
async fn clone_that_lost_its_head_is_not_given_up() {
    let clone = VolumeRef {
        name: VolumeName::new("copy").unwrap(),
        ..volume("db")
    };
    let chunk = keys::chunk_key(
        &clone.tenant,
        ChunkId {
            volume: id(5),
            epoch: Epoch::new(1),
            seq: ChunkSeq::new(1),
        },
    );
    let name = keys::name_key(&clone.tenant, &clone.name);
    for left in [chunk, name] {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        make(&store, &volume("db"), id(1), snapshots).await;
        record_clone(&store, id(5), NOW - CLONING_TIME_MAX_MS).await;
        let body = encode_record(NAME_KIND, &NameRecord::new(id(5), NOW));
        store.create(&left, body.unwrap().into()).await.unwrap();
        let refused = delete(&store).await.unwrap_err().to_string();
        assert!(refused.contains("whose head is lost"), "{refused}");
        let head = keys::head_key(&clone.tenant, id(5));
        assert!(store.get(&head).await.is_err(), "it can be rescued still");
    }
}

#[tokio::test]
async fn record_of_a_clone_that_was_flattened_protects_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    make(&store, &volume("db"), id(1), snapshots).await;
    record_clone(&store, id(5), NOW - CLONING_TIME_MAX_MS).await;
    make(&store, &volume("copy"), id(5), |_| ()).await;
    delete(&store).await.unwrap();
}

/// A map of the volume, which says whether that was a clone.
async fn make_map(store: &FolderStore, of: VolumeId, is_clones: bool) -> RootRef {
    let map = MapObjectId {
        volume: of,
        epoch: Epoch::new(1),
        seq: MapSeq::new(2),
    };
    let usage = Usage {
        basis: Basis {
            log_ms: 5,
            is_clones,
            ..Basis::default()
        },
        ..Usage::default()
    };
    let mut builder = MapObjectBuilder::new(map);
    let place = builder.finish_usage(&usage).unwrap();
    let (offset, len) = builder.finish_manifest(&Manifest::default()).unwrap();
    let key = keys::map_key(&volume("db").tenant, of, map.epoch, map.seq);
    let bytes = builder.into_bytes().into();
    store.create(&key, bytes).await.unwrap();
    RootRef {
        epoch: map.epoch,
        seq: map.seq,
        offset,
        len,
        usage: Some(place),
    }
}

/// Flattening it was cut off between its head and the record of it.
#[tokio::test]
async fn snapshots_made_since_a_clone_was_flattened_protect_nothing() {
    for was_clone in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        make(&store, &volume("db"), id(1), snapshots).await;
        record_clone(&store, id(5), NOW - CLONING_TIME_MAX_MS).await;
        let root = make_map(&store, id(5), was_clone).await;
        let with_snapshot = |head: &mut Head| {
            snapshots(head);
            head.root = Some(root);
            head.snapshots[0].root = Some(root);
        };
        make(&store, &volume("copy"), id(5), with_snapshot).await;
        let deleted = delete(&store).await;
        assert_eq!(deleted.is_err(), was_clone, "{deleted:?}");
    }
}

#[tokio::test]
async fn clone_recorded_between_the_look_and_the_mark_takes_the_mark_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    make(&store, &volume("db"), id(1), snapshots).await;
    // Name, head, clones, the change of the head: it is marked, and its clones not looked for again.
    let marked = put(
        &Stops::new(&store, 5, Stop::Before),
        &volume("db"),
        id(1),
        HOST,
        NOW,
    )
    .await;
    marked.unwrap_err();
    let now = head(&store, id(1)).await;
    assert!(now.deleted().is_some() && now.snapshots[0].closing);
    record_clone(&store, id(5), NOW).await;
    make(&store, &volume("copy"), id(5), of_monday).await;
    delete(&store).await.unwrap_err();
    let now = head(&store, id(1)).await;
    assert!(now.deleted().is_none() && !now.snapshots[0].closing);
    assert_eq!(named(&store, &volume("db")).await.unwrap(), Some(id(1)));
}

#[tokio::test]
async fn clone_that_was_never_finished_is_no_obstacle_and_cannot_come_late() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    make(&store, &volume("db"), id(1), snapshots).await;
    record_clone(&store, id(5), NOW - CLONING_TIME_MAX_MS).await;
    delete(&store).await.unwrap();
    let tenant = volume("db").tenant;
    let late = store
        .create(&keys::head_key(&tenant, id(5)), Bytes::new())
        .await;
    assert!(matches!(late, Err(StoreError::Exists { .. })));
    let restored = restore(&store, &tenant, id(5), None).await;
    assert!(
        matches!(restored, Err(TrashError::NotThere)),
        "{restored:?}"
    );
    for id in [id(1), id(5)] {
        let objects = AtomicU64::new(0);
        purge(&store, &tenant, id, NOW, 0, &objects).await.unwrap();
    }
    assert!(all(&store).await.is_empty());
}

/// Its data would have been deleted: nothing said any more that a clone needs them.
#[tokio::test]
async fn clone_whose_maker_slept_until_it_was_given_up_and_purged_does_not_come_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    make(&store, &volume("db"), id(1), snapshots).await;
    let VolumeRef { tenant, name } = volume("copy");
    let spec = CloneSpec {
        tenant,
        parent: id(1),
        snapshot: SnapName::new("monday").unwrap(),
        volume: id(5),
        name,
        key: None,
        now_ms: NOW - CLONING_TIME_MAX_MS,
    };
    // The record, the parent's head, and then the clone's.
    let waits = Waits::new(&store, 3);
    let meanwhile = async {
        waits.reached.notified().await;
        delete(&store).await.unwrap();
        for id in [id(1), id(5)] {
            let objects = AtomicU64::new(0);
            let tenant = &spec.tenant;
            purge(&store, tenant, id, NOW, 0, &objects).await.unwrap();
        }
        waits.go_on.notify_one();
    };
    let (made, ()) = tokio::join!(make_clone(&waits, &spec), meanwhile);
    assert!(matches!(made, Err(SnapshotError::NotFound(_))), "{made:?}");
    assert!(all(&store).await.is_empty());
}

/// It stayed for ever where the answer to its making was lost: nothing led to it any more.
#[tokio::test]
async fn clone_given_up_is_in_the_trash_wherever_giving_it_up_was_stopped() {
    let prepare = async |store: &FolderStore| {
        make(store, &volume("db"), id(1), snapshots).await;
        record_clone(store, id(5), NOW - CLONING_TIME_MAX_MS).await;
    };
    let check = async |store: &FolderStore, at: &str| {
        delete(store)
            .await
            .unwrap_or_else(|error| panic!("{at}: {error}"));
        let records = records(store, &volume("db").tenant).await.unwrap();
        assert!(records.iter().any(|r| r.volume == id(5)), "{at}");
    };
    at_each_stop(prepare, delete, check).await;
}

#[tokio::test]
async fn volume_whose_head_is_lost_or_damaged_is_deleted_and_purged_but_not_restored() {
    for damage in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let store = FolderStore::open(dir.path(), true).unwrap();
        two(&store).await;
        let before = others(&store, id(1)).await;
        let key = keys::head_key(&volume("db").tenant, id(1));
        store.delete(&key).await.unwrap();
        if damage {
            store
                .create(&key, Bytes::from_static(b"QYHDx"))
                .await
                .unwrap();
        }
        delete(&store).await.unwrap();
        let refused = bring_back(&store).await;
        assert!(matches!(refused, Err(TrashError::Headless)));
        let since_ms = NOW;
        let early = purge_old(&store, NOW + DAY - 1, DAY).await.unwrap();
        assert_eq!(early, Purged::NotDue { since_ms });
        assert_eq!(
            purge_old(&store, NOW + DAY, DAY).await.unwrap(),
            Purged::Gone
        );
        assert_eq!(all(&store).await, before);
    }
}

#[tokio::test]
async fn name_taken_meanwhile_is_refused_and_another_can_be_given() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    two(&store).await;
    delete(&store).await.unwrap();
    make(&store, &volume("db"), id(6), |_| ()).await;
    let refused = bring_back(&store).await;
    assert!(matches!(refused, Err(TrashError::Taken(taken)) if taken == volume("db")));
    let name = VolumeName::new("db-old").unwrap();
    let restored = restore(&store, &volume("db").tenant, id(1), Some(&name)).await;
    assert_eq!(restored.unwrap(), volume("db-old"));
    assert_eq!(head(&store, id(1)).await.name, "db-old");
    assert_eq!(named(&store, &volume("db")).await.unwrap(), Some(id(6)));
    let again = bring_back(&store).await;
    assert!(matches!(again, Err(TrashError::NotThere)));
}

#[tokio::test]
async fn volume_of_two_names_is_deleted_by_the_one_that_it_is_called_by() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    two(&store).await;
    // As a PUT of a restoring that was given up leaves it, when it comes late.
    let left = volume("left");
    give_name(&store, &left, id(1), 7, Rates::NONE)
        .await
        .unwrap();
    let before = all(&store).await;
    let refused = put(&store, &left, id(1), HOST, NOW).await;
    assert!(matches!(refused, Err(TrashError::Misnamed(called)) if called == volume("db")));
    assert_eq!(all(&store).await, before);
    delete(&store).await.unwrap();
}

#[tokio::test]
async fn name_that_a_deletion_left_goes_when_the_volume_is_restored_under_another() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    two(&store).await;
    delete(&store).await.unwrap();
    // As a deletion that is broken off before its last step leaves it.
    let db = volume("db");
    give_name(&store, &db, id(1), 7, Rates::NONE).await.unwrap();
    let other = VolumeName::new("other-one").unwrap();
    let restored = restore(&store, &db.tenant, id(1), Some(&other)).await;
    assert_eq!(restored.unwrap(), volume("other-one"));
    assert_eq!(named(&store, &db).await.unwrap(), None);
}

#[tokio::test]
async fn volume_half_deleted_is_restored_under_another_name_wherever_that_was_stopped() {
    let one = VolumeName::new("one").unwrap();
    let tenant = volume("db").tenant;
    let prepare = async |store: &FolderStore| {
        two(store).await;
        mark(store, &volume("db"), id(1), HOST, NOW).await.unwrap();
    };
    let run = async |store: &dyn Store| restore(store, &tenant, id(1), Some(&one)).await;
    let check = async |store: &FolderStore, at: &str| {
        if head(store, id(1)).await.name == "one"
            && named(store, &volume("one")).await.unwrap().is_none()
        {
            let refused = put(store, &volume("db"), id(1), HOST, NOW).await;
            let is_begun =
                matches!(&refused, Err(TrashError::Restoring(begun)) if *begun == volume("one"));
            assert!(is_begun, "{at}: {refused:?}");
        }
        match run(store).await {
            Ok(restored) => assert_eq!(restored, volume("one"), "{at}"),
            Err(TrashError::NotThere) => {}
            Err(error) => panic!("{at}: {error}"),
        }
        assert_eq!(
            named(store, &volume("one")).await.unwrap(),
            Some(id(1)),
            "{at}"
        );
        assert_eq!(named(store, &volume("db")).await.unwrap(), None, "{at}");
        assert_eq!(records(store, &tenant).await.unwrap(), [], "{at}");
    };
    at_each_stop(prepare, run, check).await;
}

#[tokio::test]
async fn restoring_that_was_begun_goes_on_under_its_name_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    two(&store).await;
    delete(&store).await.unwrap();
    let tenant = volume("db").tenant;
    let Found::Sound(there, tag) = look(&store, &tenant, id(1)).await.unwrap() else {
        panic!("its head is sound")
    };
    let cell = HeadCell::new(tenant.clone(), *there, tag);
    let revived = |head: &mut Head| {
        revive(head);
        head.name = "one".to_owned();
    };
    cell.update(&store, revived).await.unwrap();
    let under = |name: &str| VolumeName::new(name).unwrap();
    let refused = restore(&store, &tenant, id(1), Some(&under("two"))).await;
    assert!(matches!(refused, Err(TrashError::Restoring(begun)) if begun == volume("one")));
    let restored = restore(&store, &tenant, id(1), Some(&under("one"))).await;
    assert_eq!(restored.unwrap(), volume("one"));
}

/// The volume that the record named was marked as purged, and the one at whose place it lay was emptied.
#[tokio::test]
async fn record_of_another_volume_is_named_and_purges_neither() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    two(&store).await;
    let tenant = volume("db").tenant;
    let record = delete(&store).await.unwrap();
    let key = keys::trash_key(&tenant, id(2));
    let bytes = encode_record(TRASH_KIND, &record).unwrap();
    store.create(&key, bytes.into()).await.unwrap();
    let before = all(&store).await;
    let objects = AtomicU64::new(0);
    let refused = purge(&store, &tenant, id(2), NOW + DAY, 0, &objects).await;
    let refused = refused.unwrap_err().to_string();
    assert_eq!(
        refused,
        format!("{key}: record of the trash belongs to another volume")
    );
    assert_eq!(all(&store).await, before);
    assert_eq!(records(&store, &tenant).await.unwrap(), [record]);
    assert_eq!(purge_old(&store, NOW, 0).await.unwrap(), Purged::Gone);
}

#[tokio::test]
async fn purge_of_more_than_a_page_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    two(&store).await;
    let prefix = keys::volume_prefix(&volume("db").tenant, id(1));
    for n in 0..KEYS_AT_ONCE + 10 {
        let key = format!("{prefix}chunk/00000002/{n}");
        store.create(&key, Bytes::new()).await.unwrap();
    }
    delete(&store).await.unwrap();
    let objects = AtomicU64::new(0);
    let tenant = volume("db").tenant;
    let purged = purge(&store, &tenant, id(1), NOW, 0, &objects).await;
    assert_eq!(purged.unwrap(), Purged::Gone);
    assert_eq!(objects.into_inner(), KEYS_AT_ONCE as u64 + 13);
    assert_eq!(all(&store).await.len(), 8);
}
