//! The code of attaching itself, in every order of its store calls: hosts that attach, one that still
//! writes, and a reader, each stopped before every call of theirs and let go on in all possible turns.
//! (`fencing_model.rs` goes further, on a model; this holds the code to it.)

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use quarry_gateway::backend::open::{Claim, Claimed, OpenError, claim, open_read_only};
use quarry_gateway::store::{Store, StoreError, Tag};
use quarry_objfmt::chunk::{LogObject, classify};
use quarry_objfmt::{
    CacheId, ChunkExtent, ChunkId, ChunkParams, ChunkSeq, Compression, Durability, ExtentBody,
    Head, Lba, Location, MapEntry, Sectors, TenantName, VolumeId, VolumeName, WriteSeq,
    encode_chunk, keys,
};

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);

/// Turns in which a task is let go on. Calls made in one turn are carried out in the next.
#[derive(Default)]
struct Turns {
    now: Mutex<u64>,
    waiting: Mutex<Vec<Waker>>,
}

impl Turns {
    /// Waits for the next turn of whoever calls.
    async fn next(&self) {
        let asked = *self.now.lock();
        std::future::poll_fn(|cx| {
            if *self.now.lock() > asked {
                return Poll::Ready(());
            }
            self.waiting.lock().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The next turn. All are woken, and only who is polled goes on.
    fn begin(&self) {
        *self.now.lock() += 1;
        let waiting = std::mem::take(&mut *self.waiting.lock());
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// Objects in memory, each call a turn.
#[derive(Default)]
struct Stepped {
    turns: Turns,
    objects: Mutex<BTreeMap<String, Bytes>>,
}

impl fmt::Debug for Stepped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stepped")
    }
}

/// A state's name, by its content.
fn tag(body: &Bytes) -> Tag {
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    Tag::new(&hasher.hash_one(body).to_string())
}

fn not_found(key: &str) -> StoreError {
    StoreError::NotFound {
        key: key.to_owned(),
    }
}

#[async_trait]
impl Store for Stepped {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        self.turns.next().await;
        let found = self.objects.lock().get(key).cloned();
        found
            .map(|body| (body.clone(), tag(&body)))
            .ok_or(not_found(key))
    }

    async fn get_range(&self, key: &str, _range: Range<u64>) -> Result<Bytes, StoreError> {
        panic!("{key}: no header here is long, and there is no map")
    }

    async fn get_prefix(&self, key: &str, _len: u64) -> Result<Bytes, StoreError> {
        self.get(key).await.map(|(body, _)| body)
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        self.turns.next().await;
        let mut objects = self.objects.lock();
        if objects.contains_key(key) {
            return Err(StoreError::Exists {
                key: key.to_owned(),
                after_retry: false,
            });
        }
        objects.insert(key.to_owned(), body.clone());
        Ok(tag(&body))
    }

    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        self.turns.next().await;
        let mut objects = self.objects.lock();
        if objects.get(key).map(tag).as_ref() != Some(seen) {
            return Err(StoreError::Changed {
                key: key.to_owned(),
                after_retry: false,
            });
        }
        objects.insert(key.to_owned(), body.clone());
        Ok(tag(&body))
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        panic!("{key} is deleted")
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        panic!("{prefix} is listed")
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

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

/// A task that is not done, and what it is to do.
type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Lets tasks go on in the turns that `choose` says (of so many, which one), until all are done. At
/// first each comes to its first call, which nobody else can see.
fn run(store: &Stepped, mut tasks: Vec<Task<'_>>, choose: &mut dyn FnMut(usize) -> usize) {
    let mut cx = Context::from_waker(Waker::noop());
    for task in &mut tasks {
        assert!(task.as_mut().poll(&mut cx).is_pending());
    }
    while !tasks.is_empty() {
        let at = choose(tasks.len());
        store.turns.begin();
        if tasks[at].as_mut().poll(&mut cx).is_ready() {
            drop(tasks.remove(at));
        }
    }
}

fn alone<T>(store: &Stepped, task: impl Future<Output = T>) -> T {
    let mut task = pin!(task);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        store.turns.begin();
        if let Poll::Ready(done) = task.as_mut().poll(&mut cx) {
            return done;
        }
    }
}

/// Calls `test` once for each way to answer the questions that it asks: which of so many.
fn in_every_order(mut test: impl FnMut(&mut dyn FnMut(usize) -> usize)) -> usize {
    let (mut orders, mut plan) = (0, Vec::<(usize, usize)>::new());
    loop {
        let mut step = 0;
        test(&mut |of| {
            if step == plan.len() {
                plan.push((0, of));
            }
            step += 1;
            plan[step - 1].0
        });
        orders += 1;
        while let Some((choice, of)) = plan.pop() {
            if choice + 1 < of {
                plan.push((choice + 1, of));
                break;
            }
        }
        if plan.is_empty() {
            return orders;
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
