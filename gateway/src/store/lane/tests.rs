//! A lane over a store that does what a test tells it. Time is the test's own.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::*;
use crate::store::{FolderStore, StoreState, contract};

/// What an attempt does.
#[derive(Clone, Debug)]
enum Act {
    /// Has its effect and succeeds.
    Work,
    /// Fails without effect.
    Fail(StoreError),
    /// Has its effect, and no answer comes.
    WorkAndHang,
    /// Nothing happens, and no answer comes.
    Hang,
}

/// One object in memory, `body`; acts by its script, and works when that is at its end.
#[derive(Debug, Default)]
struct Scripted {
    script: Mutex<VecDeque<Act>>,
    /// What to do when the script is at its end, if not to work.
    always: Mutex<Option<Act>>,
    body: Mutex<Option<(Bytes, u32)>>,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
}

impl Scripted {
    fn new(script: impl IntoIterator<Item = Act>) -> Arc<Self> {
        let script = Mutex::new(script.into_iter().collect());
        Arc::new(Self {
            script,
            ..Self::default()
        })
    }

    async fn act<T>(&self, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        let now = self.under_way.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_under_way.fetch_max(now, Ordering::Relaxed);
        let _down = Down(&self.under_way);
        let next = self.script.lock().pop_front();
        let act = next.or_else(|| self.always.lock().clone());
        match act.unwrap_or(Act::Work) {
            Act::Work => {
                sleep(Duration::from_millis(20)).await;
                work()
            }
            Act::Fail(error) => Err(error),
            Act::WorkAndHang => {
                drop(work());
                future::pending().await
            }
            Act::Hang => future::pending().await,
        }
    }
}

struct Down<'a>(&'a AtomicUsize);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn tag(version: u32) -> Tag {
    Tag::new(&version.to_string())
}

#[async_trait]
impl Store for Scripted {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        let work = || match &*self.body.lock() {
            Some((body, version)) => Ok((body.clone(), tag(*version))),
            None => Err(StoreError::not_found(key)),
        };
        self.act(work).await
    }
    async fn get_range(&self, key: &str, _: Range<u64>) -> Result<Bytes, StoreError> {
        self.get(key).await.map(|(body, _)| body)
    }
    async fn get_prefix(&self, key: &str, _: u64) -> Result<Bytes, StoreError> {
        self.get(key).await.map(|(body, _)| body)
    }
    async fn create(&self, key: &str, new: Bytes) -> Result<Tag, StoreError> {
        let work = || {
            let mut body = self.body.lock();
            if body.is_some() {
                return Err(StoreError::exists(key));
            }
            *body = Some((new, 1));
            Ok(tag(1))
        };
        self.act(work).await
    }
    async fn replace(&self, key: &str, new: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        let work = || match &mut *self.body.lock() {
            Some((body, version)) if tag(*version) == *seen => {
                *body = new;
                *version += 1;
                Ok(tag(*version))
            }
            _ => Err(StoreError::changed(key)),
        };
        self.act(work).await
    }
    async fn delete(&self, _: &str) -> Result<(), StoreError> {
        let work = || {
            *self.body.lock() = None;
            Ok(())
        };
        self.act(work).await
    }
    async fn list(&self, _: &str) -> Result<Vec<String>, StoreError> {
        self.act(|| Ok(Vec::new())).await
    }
    fn describe(&self) -> String {
        "scripted".to_owned()
    }
}

fn lane(store: &Arc<Scripted>) -> Lane {
    let settings = LaneSettings {
        requests_max: 4,
        foreground_min: 2,
        seed: Some(1),
        ..LaneSettings::default()
    };
    Lane::new(Arc::clone(store) as Arc<dyn Store>, &settings)
}

fn away() -> Act {
    Act::Fail(StoreError::unavailable(Operation::Get, "k", "away"))
}

fn denied() -> Act {
    Act::Fail(StoreError::denied("k", "the key is revoked"))
}

fn body() -> Bytes {
    Bytes::from_static(b"body")
}

#[tokio::test(start_paused = true)]
async fn outage_is_waited_for_and_reported() {
    let store = Scripted::new([]);
    *store.always.lock() = Some(away());
    let lane = lane(&store);
    let call = tokio::spawn({
        let lane = lane.clone();
        async move { lane.create("k", body()).await }
    });
    sleep(Duration::from_secs(3600)).await;
    assert!(!call.is_finished());
    let StoreState::Failing {
        lasting,
        attempts,
        last_error,
    } = lane.health().state()
    else {
        panic!()
    };
    assert!(
        lasting > Duration::from_secs(3500) && attempts > 1000,
        "{lasting:?} {attempts}"
    );
    assert!(last_error.to_string().contains("away"));
    *store.always.lock() = None;
    let back = Instant::now();
    call.await.unwrap().unwrap();
    assert!(back.elapsed() < Duration::from_secs(6));
    assert_eq!(lane.health().state(), StoreState::Healthy);
    let stats = lane.stats().snapshot();
    assert_eq!(stats.attempts(Operation::Create, Outcome::Ok), 1);
    assert_eq!(
        stats.attempts(Operation::Create, Outcome::Unavailable),
        stats.retries
    );
    assert_eq!(
        (stats.bytes_written, stats.in_flight, stats.waiting),
        (4, 0, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn refusal_is_waited_for_without_a_deadline_and_reported_with_one() {
    let store = Scripted::new([denied(), denied(), denied()]);
    let lane = lane(&store);
    let limited = lane.with_deadline(Duration::from_secs(60));
    let begun = Instant::now();
    assert!(matches!(
        limited.get("k").await,
        Err(StoreError::Denied { .. })
    ));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert!(!lane.health().is_healthy());
    lane.create("k", body()).await.unwrap();
    assert!(lane.health().is_healthy());
}

#[tokio::test(start_paused = true)]
async fn create_whose_answer_was_lost_is_flagged() {
    let store = Scripted::new([Act::WorkAndHang]);
    let lane = lane(&store);
    let error = lane.create("k", body()).await.unwrap_err();
    assert_eq!(
        error,
        StoreError::Exists {
            key: "k".to_owned(),
            after_retry: true
        }
    );
    // Without a lost answer there is no doubt.
    let error = lane.create("k", body()).await.unwrap_err();
    assert_eq!(
        error,
        StoreError::Exists {
            key: "k".to_owned(),
            after_retry: false
        }
    );
    let stats = lane.stats().snapshot();
    assert_eq!(stats.attempts(Operation::Create, Outcome::GivenUp), 1);
}

#[tokio::test(start_paused = true)]
async fn replace_whose_answer_was_lost_is_flagged() {
    let store = Scripted::new([Act::Work, Act::WorkAndHang]);
    let lane = lane(&store);
    let first = lane.create("k", body()).await.unwrap();
    let error = lane.replace("k", Bytes::new(), &first).await.unwrap_err();
    assert_eq!(
        error,
        StoreError::Changed {
            key: "k".to_owned(),
            after_retry: true
        }
    );
    let error = lane.replace("k", Bytes::new(), &first).await.unwrap_err();
    assert_eq!(
        error,
        StoreError::Changed {
            key: "k".to_owned(),
            after_retry: false
        }
    );
}

#[tokio::test(start_paused = true)]
async fn hanging_attempt_is_given_up_and_tried_again() {
    let store = Scripted::new([Act::Hang, Act::Hang]);
    let lane = lane(&store);
    let begun = Instant::now();
    lane.create("k", body()).await.unwrap();
    assert!(begun.elapsed() > ATTEMPT_TIME_MAX * 2 && begun.elapsed() < ATTEMPT_TIME_MAX * 3);
}

#[tokio::test(start_paused = true)]
async fn deadline_ends_a_call_with_the_newest_error() {
    let store = Scripted::new([]);
    *store.always.lock() = Some(away());
    let limited = lane(&store).with_deadline(Duration::from_secs(10));
    let begun = Instant::now();
    let error = limited.get("k").await.unwrap_err();
    assert!(
        error.is_transient() && error.to_string().contains("away"),
        "{error}"
    );
    assert_eq!(begun.elapsed(), Duration::from_secs(10));

    *store.always.lock() = Some(Act::Hang);
    let limited = lane(&store).with_deadline(Duration::from_secs(10));
    let error = limited.get("k").await.unwrap_err();
    assert!(
        error.to_string().contains("no answer within 10s"),
        "{error}"
    );
    assert!(!limited.health().is_healthy());
}

#[tokio::test(start_paused = true)]
async fn deadline_while_waiting_for_a_place_does_not_blame_the_store() {
    let store = Scripted::new([]);
    let lane = lane(&store);
    *store.always.lock() = Some(Act::Hang);
    let busy: Vec<_> = (0..4)
        .map(|_| {
            let lane = lane.clone();
            tokio::spawn(async move { lane.get("k").await })
        })
        .collect();
    tokio::task::yield_now().await;
    let limited = lane.with_deadline(Duration::from_secs(1));
    assert!(limited.get("k").await.unwrap_err().is_transient());
    assert!(lane.health().is_healthy());
    busy.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn answers_are_not_tried_again() {
    let store = Scripted::new([]);
    let lane = lane(&store);
    assert!(matches!(
        lane.get("k").await,
        Err(StoreError::NotFound { .. })
    ));
    *store.always.lock() = Some(Act::Fail(StoreError::invalid("k", "bad")));
    assert!(matches!(
        lane.get("k").await,
        Err(StoreError::Invalid { .. })
    ));
    assert_eq!(lane.stats().snapshot().retries, 0);
}

#[tokio::test(start_paused = true)]
async fn wrong_length_is_tried_again_a_few_times() {
    let short = || Act::Fail(StoreError::wrong_length("k", &(0..4), 3));
    let store = Scripted::new([Act::Work, short(), short()]);
    let lane = lane(&store);
    lane.create("k", body()).await.unwrap();
    assert_eq!(lane.get_range("k", 0..4).await.unwrap(), body());
    *store.always.lock() = Some(short());
    assert!(matches!(
        lane.get_range("k", 0..4).await,
        Err(StoreError::WrongLength { .. })
    ));
    assert!(lane.health().is_healthy());
}

#[tokio::test(start_paused = true)]
async fn places_bound_requests_and_keep_some_for_the_foreground() {
    let store = Scripted::new([]);
    let lane = lane(&store);
    let spawn = |lane: Lane, n: usize| -> Vec<_> {
        (0..n)
            .map(|_| {
                let lane = lane.clone();
                tokio::spawn(async move { drop(lane.get("k").await) })
            })
            .collect()
    };
    for task in spawn(lane.background(), 20) {
        task.await.unwrap();
    }
    assert_eq!(store.most_under_way.load(Ordering::Relaxed), 2);
    for task in spawn(lane.clone(), 20) {
        task.await.unwrap();
    }
    assert_eq!(store.most_under_way.load(Ordering::Relaxed), 4);

    // The background hangs; the foreground goes on.
    *store.always.lock() = Some(Act::Hang);
    let stuck = spawn(lane.background(), 20);
    tokio::task::yield_now().await;
    *store.always.lock() = None;
    let begun = Instant::now();
    for task in spawn(lane.clone(), 4) {
        task.await.unwrap();
    }
    assert_eq!(begun.elapsed(), Duration::from_millis(40));
    stuck.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(start_paused = true)]
async fn stop_ends_calls_with_a_deadline_and_silences_the_others() {
    let store = Scripted::new([]);
    *store.always.lock() = Some(away());
    let lane = lane(&store);
    let limited = lane.with_deadline(Duration::from_secs(60));
    let call = tokio::spawn(async move { limited.get("k").await });
    let waiting = tokio::spawn({
        let lane = lane.clone();
        async move { lane.get("k").await }
    });
    sleep(Duration::from_secs(1)).await;
    let stopped = Instant::now();
    lane.stop();
    let error = call.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("stopping"), "{error}");
    assert_eq!(stopped.elapsed(), Duration::ZERO);
    *store.always.lock() = None;
    sleep(Duration::from_secs(60)).await;
    assert!(!waiting.is_finished());
    waiting.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn lane_over_a_folder_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let store = FolderStore::open(dir.path(), true).unwrap();
    let lane = Lane::new(Arc::new(store), &LaneSettings::default());
    contract::run(Arc::new(lane)).await;
}

#[tokio::test(start_paused = true)]
async fn tenant_whose_store_hangs_leaves_the_others_of_the_server_their_places() {
    let settings = LaneSettings {
        requests_max: 4,
        foreground_min: 1,
        ..LaneSettings::default()
    };
    let hanging = Scripted::new([]);
    *hanging.always.lock() = Some(Act::Hang);
    let (sound, share) = (Scripted::new([]), Share::new(100));
    let lane = Lane::new(sound, &settings);
    let hung = lane.beside(hanging.clone(), &settings).of(&share);
    for _ in 0..20 {
        let hung = hung.clone();
        tokio::spawn(async move { hung.get("x").await });
    }
    // Some wait for ever, others try again: the places they take from others are lost to them once, for a moment.
    sleep(crate::fair::SLOW_AFTER * 2).await;
    for _ in 0..20 {
        let begun = Instant::now();
        assert!(matches!(
            lane.get("x").await,
            Err(StoreError::NotFound { .. })
        ));
        assert_eq!(begun.elapsed(), Duration::from_millis(20));
        sleep(Duration::from_secs(7)).await;
    }
    assert!(hanging.most_under_way.load(Ordering::Relaxed) <= 4);
}
