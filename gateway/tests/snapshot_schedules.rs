//! The code that makes a clone beside the code that deletes its snapshot, in every order of their store calls, and
//! each cut off after any of them: never is a clone there whose snapshot is gone.

#[path = "common/stepped.rs"]
mod stepped;

use std::cell::{Cell, RefCell};
use std::pin::{Pin, pin};
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll, Waker};

use quarry_gateway::backend::open::{Claim, hold};
use quarry_gateway::backend::{HeadCell, HeadError};
use quarry_gateway::control::VolumeRef;
use quarry_gateway::keys::{copy_problem, first};
use quarry_gateway::snapshot::{CloneSpec, SnapshotError, clones, create, delete, make_clone};
use quarry_gateway::store::Store;
use quarry_gateway::trash::{Purged, TrashError, purge, put};
use quarry_objfmt::head::SNAPSHOTS_MAX;
use quarry_objfmt::map::{Manifest, MapObjectBuilder, MapObjectId};
use quarry_objfmt::{
    CacheId, Encryption, Epoch, Head, KeyGeneration, KeyName, Lba, Location, MapEntry, MapSeq,
    RootRef, Sectors, SnapName, SnapshotRef, TenantName, VolumeId, VolumeName, WrappedKey,
    WriteSeq, keys,
};
use stepped::{Stepped, Task, alone, in_every_order, run};

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
const CLONE: VolumeId = VolumeId::from_bytes([2; 16]);
/// Another clone of the same snapshot.
const OTHER: VolumeId = VolumeId::from_bytes([3; 16]);
/// The cache of who has the volume.
const HOST: CacheId = CacheId::from_bytes([1; 16]);
/// When the clone is begun.
const BEGUN: u64 = 10;
/// When one that is begun is given up.
const LATE: u64 = BEGUN + 3_600_000;

fn tenant() -> TenantName {
    TenantName::new("acme").unwrap()
}

fn snap() -> SnapName {
    SnapName::new("golden").unwrap()
}

fn spec() -> CloneSpec {
    CloneSpec {
        tenant: tenant(),
        parent: VOLUME,
        snapshot: snap(),
        volume: CLONE,
        name: VolumeName::new("copy").unwrap(),
        key: Some(wrapped(CLONE)),
        now_ms: BEGUN,
    }
}

fn wrapped(volume: VolumeId) -> WrappedKey {
    WrappedKey {
        volume,
        generation: KeyGeneration::FIRST,
        by: KeyName::new("k").unwrap(),
        bytes: vec![1; 60],
    }
}

/// An encrypted volume with a map that somebody has attached, and a snapshot of it.
fn attached() -> (Stepped, HeadCell) {
    let store = Stepped::default();
    let id = MapObjectId {
        volume: VOLUME,
        epoch: Epoch::new(0),
        seq: MapSeq::new(0),
    };
    let mut builder = MapObjectBuilder::new(id);
    let entry = MapEntry {
        start: Lba::new(8),
        len: 8,
        location: Location::Zero,
    };
    builder.push(entry).unwrap();
    let table = builder.finish_table().unwrap().unwrap();
    let manifest = Manifest {
        runs: vec![vec![table]],
    };
    let (offset, len) = builder.finish_manifest(&manifest).unwrap();
    let key = keys::map_key(&tenant(), VOLUME, id.epoch, id.seq);
    alone(&store, store.create(&key, builder.into_bytes().into())).unwrap();
    let name = VolumeName::new("db").unwrap();
    let head = Head {
        root: Some(RootRef {
            epoch: id.epoch,
            seq: id.seq,
            offset,
            len,
            usage: None,
        }),
        root_write: WriteSeq::new(3),
        next_map: MapSeq::new(1),
        encryption: Encryption::Aes256Gcm,
        keys: first(vec![wrapped(VOLUME)]),
        ..Head::fresh(VOLUME, &tenant(), &name, Sectors::new(1000), 1)
    };
    let key = keys::head_key(&tenant(), VOLUME);
    alone(&store, store.create(&key, head.encode().into())).unwrap();
    let by = Claim {
        cache: HOST,
        host: "a".to_owned(),
        now_ms: 1,
        force: false,
        discard_unsent: false,
        must_be_ours: false,
    };
    let (cell, _) = alone(&store, hold(&store, &tenant(), VOLUME, &by)).unwrap();
    let name = snap();
    let made = create(&store, &cell, &name, WriteSeq::new(3), 5);
    alone(&store, made).unwrap();
    (store, cell)
}

fn head_of(store: &Stepped, volume: VolumeId) -> Option<Head> {
    let objects = store.objects.lock();
    Head::decode(objects.get(&keys::head_key(&tenant(), volume))?).ok()
}

/// What is there in the end. A clone has all that it needs; who is not there has left nothing to find it by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Found {
    clone: bool,
    snapshot: bool,
    closing: bool,
}

fn look(store: &Stepped) -> Found {
    let parent = head_of(store, VOLUME).expect("the parent stays");
    let snapshot = parent.snapshots.first();
    let clone = head_of(store, CLONE).filter(|head| head.deleted().is_none());
    if let Some(clone) = &clone {
        let root = clone.root.unwrap();
        let key = keys::map_key(&tenant(), CLONE, root.epoch, root.seq);
        assert!(
            store.objects.lock().contains_key(&key),
            "a clone without its map"
        );
        assert!(snapshot.is_some(), "a clone whose snapshot is gone");
        assert_eq!(
            clone.keys,
            first(vec![wrapped(VOLUME), wrapped(CLONE)]),
            "a clone without its parent's keys"
        );
        let copy = alone(store, copy_problem(store, &tenant(), clone));
        assert_eq!(copy.unwrap(), None);
        let key = keys::clone_key(&tenant(), VOLUME, &snap(), CLONE);
        assert!(
            store.objects.lock().contains_key(&key),
            "a clone without its record"
        );
    }
    let copy = keys::snap_key(&tenant(), VOLUME, &snap());
    assert!(snapshot.is_none() || store.objects.lock().contains_key(&copy));
    Found {
        clone: clone.is_some(),
        snapshot: snapshot.is_some(),
        closing: snapshot.is_some_and(|s| s.closing),
    }
}

/// Deletes the snapshot at a time, beside the making of a clone.
fn race(now_ms: u64) -> (usize, [usize; 4]) {
    let outcomes = Cell::new([0; 4]);
    let orders = in_every_order(|choose| {
        let (store, cell) = attached();
        let (made, deleted) = (RefCell::new(None), RefCell::new(None));
        let spec = spec();
        let tasks: Vec<Task<'_>> = vec![
            Box::pin(async { *made.borrow_mut() = Some(make_clone(&store, &spec).await) }),
            Box::pin(async {
                *deleted.borrow_mut() = Some(delete(&store, &cell, &snap(), now_ms).await);
            }),
        ];
        run(&store, tasks, choose);
        let (made, deleted) = (made.take().unwrap(), deleted.take().unwrap());
        let found = look(&store);
        assert_eq!(found.clone, made.is_ok(), "{made:?}");
        assert_eq!(found.snapshot, deleted.is_err(), "{deleted:?}");
        assert!(
            !found.closing,
            "a refused deletion leaves the snapshot as it was"
        );
        let outcome = match (&made, &deleted) {
            (Ok(_), Err(SnapshotError::HasClones { .. })) => 0,
            (Ok(_), Err(SnapshotError::BeingCloned { .. })) => 1,
            (Err(SnapshotError::NotFound(_) | SnapshotError::Closing(_)), Ok(())) => 2,
            (Err(SnapshotError::Closing(_)), Err(SnapshotError::BeingCloned { .. })) => 3,
            others => panic!("{others:?}"),
        };
        let mut counts = outcomes.get();
        counts[outcome] += 1;
        outcomes.set(counts);
        let record = keys::clone_key(&tenant(), VOLUME, &snap(), CLONE);
        assert!(found.clone || !store.objects.lock().contains_key(&record));
    });
    (orders, outcomes.get())
}

#[test]
fn clone_beside_a_deletion_in_every_order_has_its_snapshot_or_is_not_there() {
    let (orders, counts) = race(BEGUN);
    println!("{orders} orders: {counts:?}");
    assert!(orders > 100 && counts.iter().all(|count| *count > 0));
}

#[test]
fn clone_that_is_made_late_beside_a_deletion_is_given_up_or_has_its_snapshot() {
    let (orders, counts) = race(LATE);
    println!("{orders} orders: {counts:?}");
    // None is waited for.
    assert!(orders > 1000 && counts[0] > 0 && counts[2] > 0);
    assert_eq!((counts[1], counts[3]), (0, 0));
}

#[test]
fn clone_beside_the_deletion_of_its_whole_volume_keeps_it_or_is_not_there() {
    let refused = Cell::new(0);
    let orders = in_every_order(|choose| {
        let (store, _) = attached();
        let volume = VolumeRef {
            tenant: tenant(),
            name: VolumeName::new("db").unwrap(),
        };
        let (made, closed) = (RefCell::new(None), RefCell::new(None));
        let spec = spec();
        let tasks: Vec<Task<'_>> = vec![
            Box::pin(async { *made.borrow_mut() = Some(make_clone(&store, &spec).await) }),
            Box::pin(async {
                *closed.borrow_mut() = Some(put(&store, &volume, VOLUME, HOST, BEGUN).await);
            }),
        ];
        run(&store, tasks, choose);
        let (made, closed) = (made.take().unwrap(), closed.take().unwrap());
        let found = look(&store);
        assert_eq!(found.clone, made.is_ok());
        // Once it is in the trash, the volume's objects may be deleted.
        assert!(
            closed.is_err() || made.is_err(),
            "a clone of a deleted volume"
        );
        assert_eq!(found.closing, closed.is_ok());
        refused.set(refused.get() + usize::from(closed.is_err()));
    });
    println!("{orders} orders, {} deletions were refused", refused.get());
    assert!(orders > 150 && (1..orders).contains(&refused.get()));
}

/// Carries a task out for so many calls; what it came to, if that was its end.
fn carry_on<T>(
    store: &Stepped,
    calls: usize,
    mut task: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..=calls {
        store.begin();
        if let Poll::Ready(done) = task.as_mut().poll(&mut cx) {
            return Some(done);
        }
    }
    None
}

/// Carries a task out for so many calls, and then no more; whether it came to its end.
fn cut_off<T>(store: &Stepped, calls: usize, task: impl Future<Output = T>) -> bool {
    carry_on(store, calls, pin!(task)).is_some()
}

#[test]
fn clone_cut_off_after_any_call_is_there_or_can_be_given_up() {
    let (mut calls, mut there) = (0, 0);
    loop {
        let (store, cell) = attached();
        let spec = spec();
        let done = cut_off(&store, calls, make_clone(&store, &spec));
        let found = look(&store);
        there += usize::from(found.clone);
        // At first nobody can know whether it goes on; later it is given up, and never made.
        let early = alone(&store, delete(&store, &cell, &snap(), BEGUN));
        assert_eq!(early.is_ok(), calls == 0, "after {calls} calls: {early:?}");
        if calls > 0 {
            let late = alone(&store, delete(&store, &cell, &snap(), LATE));
            assert_eq!(late.is_err(), found.clone, "after {calls} calls: {late:?}");
        }
        assert_eq!(look(&store).snapshot, found.clone);
        if done {
            break;
        }
        calls += 1;
    }
    println!("{calls} calls, and the clone is there after {there} of them");
    assert!(calls >= 5 && there > 0);
}

/// The parent stayed for the sake of another clone, and with it the record: the maker took that for leave, though its map had
/// been purged.
#[test]
fn clone_whose_maker_sleeps_until_it_is_given_up_and_purged_is_whole_or_not_made() {
    let parent = VolumeRef {
        tenant: tenant(),
        name: VolumeName::new("db").unwrap(),
    };
    let (mut calls, mut refused) = (0, 0);
    loop {
        let (store, _) = attached();
        let other = CloneSpec {
            volume: OTHER,
            name: VolumeName::new("other").unwrap(),
            key: Some(wrapped(OTHER)),
            now_ms: LATE,
            ..spec()
        };
        alone(&store, make_clone(&store, &other)).unwrap();
        let spec = spec();
        let mut maker = pin!(make_clone(&store, &spec));
        let done = carry_on(&store, calls, maker.as_mut());
        let is_done = done.is_some();

        let deleted = alone(&store, put(&store, &parent, VOLUME, HOST, LATE));
        assert!(
            matches!(deleted, Err(TrashError::Clones { .. })),
            "after {calls} calls: {deleted:?}"
        );
        let (acme, objects) = (tenant(), AtomicU64::new(0));
        let purged = alone(&store, purge(&store, &acme, CLONE, LATE, 0, &objects));
        assert!(
            matches!(purged, Ok(Purged::Gone) | Err(TrashError::NotThere)),
            "after {calls} calls: {purged:?}"
        );

        let made = done.unwrap_or_else(|| alone(&store, maker.as_mut()));
        let found = look(&store);
        assert_eq!(found.clone, made.is_ok(), "after {calls} calls: {made:?}");
        refused += usize::from(made.is_err());
        if is_done {
            break;
        }
        calls += 1;
    }
    println!("{calls} calls, and the clone is not made after {refused} of them");
    assert!(calls >= 5 && (1..calls).contains(&refused));
}

#[test]
fn deletion_cut_off_after_any_call_is_finished_by_the_next() {
    let mut calls = 0;
    loop {
        let (store, cell) = attached();
        let done = cut_off(&store, calls, delete(&store, &cell, &snap(), BEGUN));
        let found = look(&store);
        let spec = spec();
        let made = alone(&store, make_clone(&store, &spec));
        assert_eq!(made.is_ok(), calls == 0, "after {calls} calls: {made:?}");
        let again = alone(&store, delete(&store, &cell, &snap(), BEGUN));
        match &again {
            Ok(()) => assert!(!look(&store).snapshot),
            Err(SnapshotError::HasClones { clones: names, .. }) => {
                // The engine had not named it yet.
                let known_as = format!("acme/copy (nameless, id {CLONE})");
                assert_eq!((calls, &names[..]), (0, &[known_as][..]));
                let listed = alone(&store, clones(&store, &tenant(), VOLUME, &snap()));
                assert_eq!(&listed.unwrap(), names);
            }
            // It had come to its end, but for nobody's knowing.
            Err(SnapshotError::NotFound(_)) => assert!(!found.snapshot),
            Err(error) => panic!("after {calls} calls: {error}"),
        }
        let copy = keys::snap_key(&tenant(), VOLUME, &snap());
        assert!(calls == 0 || !store.objects.lock().contains_key(&copy));
        if done {
            break;
        }
        calls += 1;
    }
    assert!(calls >= 3, "{calls}");
}

#[test]
fn snapshot_past_the_most_is_refused_when_the_last_was_made_without_an_answer() {
    let (store, cell) = attached();
    let fill = |head: &mut Head| {
        let first = head.snapshots[0].clone();
        let more = (1..SNAPSHOTS_MAX - 1).map(|n| SnapshotRef {
            name: format!("s{n}"),
            ..first.clone()
        });
        head.snapshots.extend(more);
    };
    alone(&store, cell.update(&store, fill)).unwrap();
    // As a PUT whose answer nobody waited for.
    let acme = tenant();
    let read = HeadCell::read(&store, &acme, VOLUME);
    let (head, tag) = alone(&store, read).unwrap();
    let late = HeadCell::new(tenant(), head, tag);
    let last = SnapName::new("last").unwrap();
    alone(&store, create(&store, &late, &last, WriteSeq::new(3), 6)).unwrap();

    let more = SnapName::new("more").unwrap();
    let refused = alone(&store, create(&store, &cell, &more, WriteSeq::new(3), 7));
    assert!(
        matches!(refused, Err(SnapshotError::TooMany)),
        "{refused:?}"
    );
    let there = head_of(&store, VOLUME).unwrap();
    assert_eq!(there.snapshots.len(), SNAPSHOTS_MAX);
}

#[test]
fn writer_that_was_taken_over_can_neither_make_a_snapshot_nor_delete_one() {
    let (store, stalled) = attached();
    let by = Claim {
        cache: CacheId::from_bytes([2; 16]),
        host: "b".to_owned(),
        now_ms: 2,
        force: true,
        discard_unsent: false,
        must_be_ours: false,
    };
    let (owner, was_owned) = alone(&store, hold(&store, &tenant(), VOLUME, &by)).unwrap();
    assert!(was_owned);
    let before = head_of(&store, VOLUME);
    let fenced = |error: &SnapshotError| matches!(error, SnapshotError::Head(HeadError::Fenced { by }) if by == "host b");
    let [golden, late, other] = ["golden", "late", "other"].map(|n| SnapName::new(n).unwrap());
    let made = create(&store, &stalled, &late, WriteSeq::ZERO, 9);
    assert!(fenced(&alone(&store, made).unwrap_err()));
    let deleted = delete(&store, &stalled, &golden, 9);
    assert!(fenced(&alone(&store, deleted).unwrap_err()));
    assert_eq!(head_of(&store, VOLUME), before);
    // What the stalled one left there is written over by the snapshot of that name that comes to be.
    let made = create(&store, &owner, &late, WriteSeq::ZERO, 10);
    let made = alone(&store, made).unwrap();
    let head = head_of(&store, VOLUME).unwrap();
    assert_eq!(head.snapshots[1], made);
    // The stalled one knows of no snapshot of that name, but finds its copy, which is the other's.
    let deleted = delete(&store, &stalled, &late, 10);
    assert!(fenced(&alone(&store, deleted).unwrap_err()));
    let copy = keys::snap_key(&tenant(), VOLUME, &late);
    assert!(store.objects.lock().contains_key(&copy));
    let behind = create(&store, &owner, &other, WriteSeq::new(4), 11);
    assert!(matches!(alone(&store, behind), Err(SnapshotError::Behind)));
    let twice = create(&store, &owner, &late, WriteSeq::ZERO, 12);
    assert!(matches!(
        alone(&store, twice),
        Err(SnapshotError::Exists(_))
    ));
}
