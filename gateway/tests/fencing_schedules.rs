//! The code of attaching itself, in every order of its store calls: hosts that attach, one that still
//! writes, and a reader, each stopped before every call of theirs and let go on in all possible turns.
//! (`fencing_model.rs` goes further, on a model; this holds the code to it.)

#[path = "common/stepped.rs"]
mod stepped;

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use quarry_gateway::backend::open::{Claim, Claimed, OpenError, claim, give_back, open_read_only};
use quarry_gateway::store::{Store, StoreError};
use quarry_objfmt::chunk::{LogObject, classify};
use quarry_objfmt::{
    CacheId, ChunkExtent, ChunkId, ChunkParams, ChunkSeq, Compression, Durability, ExtentBody,
    Head, Lba, Location, MapEntry, Sectors, TenantName, VolumeId, VolumeName, WriteSeq,
    encode_chunk, keys,
};

use stepped::{Stepped, Task, alone, in_every_order, run};

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);

fn tenant() -> TenantName {
    TenantName::new("acme").unwrap()
}

fn by(host: u8) -> Claim {
    Claim {
        cache: CacheId::from_bytes([host; 16]),
        host: format!("host-{host}"),
        now_ms: u64::from(host),
        force: true,
        discard_unsent: true,
        must_be_ours: false,
    }
}

fn fresh_head() -> Head {
    let (tenant, name) = (
        TenantName::new("acme").unwrap(),
        VolumeName::new("db").unwrap(),
    );
    Head {
        frame_sectors: 8,
        compression: Compression::None,
        durability: Durability::Object,
        ..Head::fresh(VOLUME, &tenant, &name, Sectors::new(1000), 1)
    }
}

/// Chunks as an attach or a reader finds them, oldest first.
fn chunks(claimed: &Claimed) -> Vec<ChunkId> {
    let first = |entries: &Vec<MapEntry>| match entries[0].location {
        Location::Data(data) => data.chunk,
        Location::Zero => panic!("all chunks here have data"),
    };
    claimed.log.iter().map(first).collect()
}

/// Stores chunks of one write each, as an owner does, until it is fenced; tells which are stored.
async fn write(store: &Stepped, owner: &Claimed, count: u64, told: &RefCell<Vec<ChunkId>>) {
    for n in 0..count {
        let write = WriteSeq::new(owner.stored_write.get() + 1 + n);
        let params = ChunkParams {
            id: ChunkId {
                volume: VOLUME,
                epoch: owner.head.epoch(),
                seq: ChunkSeq::new(owner.next_chunk.get() + n),
            },
            first_write: write,
            last_write: write,
            cut_ms: 1,
            frame_sectors: 8,
            compression: Compression::None,
            key: None,
        };
        let extent = ChunkExtent {
            start: Lba::new(n),
            len: 1,
            body: ExtentBody::Data { raw: 0 },
        };
        let key = keys::chunk_key(&tenant(), params.id);
        let body = encode_chunk(&params, &[extent], &[7; 512]).bytes;
        match store.create(&key, body).await {
            Ok(_) => told.borrow_mut().push(params.id),
            Err(StoreError::Exists { .. }) => {
                let (found, _) = store.get(&key).await.unwrap();
                assert_eq!(
                    classify(&found),
                    Ok(LogObject::Seal),
                    "two writers of {key}"
                );
                return;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// A volume that host 1 owns, with a chunk in the store.
fn owned() -> (Arc<Stepped>, Claimed, RefCell<Vec<ChunkId>>) {
    let store = Arc::new(Stepped::default());
    let key = keys::head_key(&tenant(), VOLUME);
    alone(&store, store.create(&key, fresh_head().encode().into())).unwrap();
    let owner = alone(&store, claim(&*store, &tenant(), VOLUME, None, &by(1))).unwrap();
    let told = RefCell::default();
    alone(&store, write(&store, &owner, 1, &told));
    let owner = Claimed {
        next_chunk: owner.next_chunk.next(),
        stored_write: owner.stored_write.next(),
        ..owner
    };
    (store, owner, told)
}

/// The history in the end, which must begin as each of `found` has it and hold all of `told`.
fn settle(store: &Stepped, found: &[Vec<ChunkId>], told: &[ChunkId]) -> Vec<ChunkId> {
    let end = alone(
        store,
        open_read_only(store, &tenant(), VOLUME, None, &by(9)),
    );
    let history = chunks(&end.expect("the log is whole"));
    for found in found {
        assert!(
            history.starts_with(found),
            "{found:?} was found of {history:?}"
        );
    }
    for told in told {
        assert!(
            history.contains(told),
            "{told:?} was stored, and is not in {history:?}"
        );
    }
    history
}

/// A takeover, while the owner goes on to write: the new owner writes so much, and somebody reads.
fn take_over(writes: u64, new_writes: u64, reads: bool) {
    let fenced = Cell::new(0);
    let orders = in_every_order(|choose| {
        let (store, owner, told) = owned();
        let (found, taken) = (RefCell::new(Vec::new()), Cell::new(0));
        let mut tasks: Vec<Task<'_>> = vec![
            Box::pin(write(&store, &owner, writes, &told)),
            Box::pin(async {
                let new = claim(&*store, &tenant(), VOLUME, None, &by(2)).await;
                let new = new.unwrap();
                taken.set(new.log.len());
                found.borrow_mut().push(chunks(&new));
                write(&store, &new, new_writes, &told).await;
            }),
        ];
        if reads {
            tasks.push(Box::pin(async {
                let read = open_read_only(&*store, &tenant(), VOLUME, None, &by(3)).await;
                found.borrow_mut().push(chunks(&read.unwrap()));
            }));
        }
        run(&store, tasks, choose);
        let history = settle(&store, &found.borrow(), &told.borrow());
        // What the old owner wrote is what the new one found, and nothing more.
        let epochs = history.iter().map(|chunk| chunk.epoch);
        let old = epochs.filter(|epoch| *epoch == owner.head.epoch());
        assert_eq!(old.count(), taken.get());
        assert_eq!(history.len() as u64, taken.get() as u64 + new_writes);
        fenced.set(fenced.get() + usize::from(taken.get() as u64 <= writes));
    });
    println!(
        "{orders} orders, in {} of them the old owner was fenced",
        fenced.get()
    );
    assert!(orders > 100 && (1..orders).contains(&fenced.get()));
}

#[test]
fn claim_of_what_must_be_ours_is_refused_when_it_is_anothers_or_nobodys() {
    let (store, owner, _) = owned();
    let ours = |host| Claim {
        must_be_ours: true,
        ..by(host)
    };
    let claimed = |host| alone(&store, claim(&*store, &tenant(), VOLUME, None, &ours(host)));
    let before = owner.head.epoch();
    assert!(matches!(claimed(2), Err(OpenError::Taken)));
    let again = claimed(1).unwrap();
    assert_eq!(again.head.epoch(), before.next());
    alone(&store, give_back(&*store, &again.head)).unwrap();
    // It may have been another's meanwhile, and had its device's blocks changed.
    for host in [1, 2] {
        assert!(matches!(claimed(host), Err(OpenError::Taken)));
    }
    let anybodys = alone(&store, claim(&*store, &tenant(), VOLUME, None, &by(2))).unwrap();
    assert_eq!(anybodys.head.epoch(), again.head.epoch().next());
}

#[test]
fn takeover_beside_the_owners_writes_in_every_order_keeps_one_history() {
    take_over(4, 2, false);
}

#[test]
fn takeover_beside_a_write_and_a_reader_in_every_order_keeps_one_history() {
    take_over(2, 1, true);
}

#[test]
fn attaches_beside_each_other_in_every_order_leave_one_owner() {
    let raced = Cell::new(0);
    let orders = in_every_order(|choose| {
        let (store, _, told) = owned();
        let (found, owners) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let attach = async |host| match claim(&*store, &tenant(), VOLUME, None, &by(host)).await {
            Ok(new) => {
                owners.borrow_mut().push(new.head.epoch());
                found.borrow_mut().push(chunks(&new));
                write(&store, &new, 1, &told).await;
            }
            Err(OpenError::Raced { .. }) => raced.set(raced.get() + 1),
            Err(error) => panic!("{error}"),
        };
        let tasks: Vec<Task<'_>> = vec![Box::pin(attach(2)), Box::pin(attach(3))];
        run(&store, tasks, choose);
        settle(&store, &found.borrow(), &told.borrow());
        let owners = owners.borrow();
        assert!(
            !owners.is_empty() && owners.iter().is_sorted_by(|a, b| a < b),
            "{owners:?}"
        );
    });
    println!("{orders} orders, {} attaches gave way", raced.get());
    assert!(orders > 100 && raced.get() > 0);
}
