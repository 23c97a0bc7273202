//! Tasks on a store whose every call is a turn of its own: run in every order of their calls.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use quarry_gateway::store::{Store, StoreError, Tag};

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
pub struct Stepped {
    turns: Turns,
    pub objects: Mutex<BTreeMap<String, Bytes>>,
}

impl Stepped {
    /// The next turn.
    pub fn begin(&self) {
        self.turns.begin();
    }
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

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (body, _) = self.get(key).await?;
        let at = |byte: u64| usize::try_from(byte).expect("objects here are small");
        Ok(body.slice(at(range.start)..at(range.end)))
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
        self.turns.next().await;
        self.objects.lock().remove(key);
        Ok(())
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.turns.next().await;
        let objects = self.objects.lock();
        let keys = objects.keys().filter(|key| key.starts_with(prefix));
        Ok(keys.cloned().collect())
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

/// A task that is not done, and what it is to do.
pub type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Lets tasks go on in the turns that `choose` says (of so many, which one), until all are done. At
/// first each comes to its first call, which nobody else can see.
pub fn run(store: &Stepped, mut tasks: Vec<Task<'_>>, choose: &mut dyn FnMut(usize) -> usize) {
    let mut cx = Context::from_waker(Waker::noop());
    for task in &mut tasks {
        assert!(task.as_mut().poll(&mut cx).is_pending());
    }
    while !tasks.is_empty() {
        let at = choose(tasks.len());
        store.begin();
        if tasks[at].as_mut().poll(&mut cx).is_ready() {
            drop(tasks.remove(at));
        }
    }
}

/// Carries a task out with nobody beside it.
pub fn alone<T>(store: &Stepped, task: impl Future<Output = T>) -> T {
    let mut task = pin!(task);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        store.begin();
        if let Poll::Ready(done) = task.as_mut().poll(&mut cx) {
            return done;
        }
    }
}

/// Calls `test` once for each way to answer the questions that it asks: which of so many.
pub fn in_every_order(mut test: impl FnMut(&mut dyn FnMut(usize) -> usize)) -> usize {
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
