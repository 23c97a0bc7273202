//! An S3 bucket in memory, and the way to it: slow, lossy, and never to be relied upon.
//!
//! The real adapter and the real lane are on top of it. What was sent arrives or does not, now or
//! much later, whether or not anybody still waits for the answer.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{Future, pending};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{BoxStream, iter, once};
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    Attributes, CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result,
};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::faults::{Fault, Faults};

/// Bad bodies that a reader bears of one object.
pub const BAD_BODIES_BORNE: u32 = 2;

/// What the way to the store is like: chances of one request.
#[derive(Clone, Copy, Default, Debug)]
pub struct Weather {
    /// An error, and nothing was done.
    pub error_before: f64,
    /// An error, and it was done.
    pub error_after: f64,
    /// No answer, and nothing was done.
    pub lost_before: f64,
    /// No answer, and it was done: at once, or up to a minute later.
    pub lost_after: f64,
    /// A body that ends early.
    pub short: f64,
    /// A body with a bit flipped.
    pub wrong: f64,
    /// An answer that takes seconds.
    pub slow: f64,
    /// Bad bodies that one object gives at most.
    pub bad_bodies_max: u32,
}

impl Weather {
    /// The same kinds of trouble, each less often.
    pub fn milder(self) -> Self {
        Self {
            error_before: self.error_before / 8.0,
            error_after: self.error_after / 8.0,
            lost_before: self.lost_before / 8.0,
            lost_after: self.lost_after / 8.0,
            short: self.short / 4.0,
            wrong: self.wrong / 2.0,
            slow: self.slow / 8.0,
            ..self
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Fate {
    Plain,
    Refused,
    ErrorBefore,
    ErrorAfter,
    LostBefore,
    LostAfter(Duration),
}

pub struct SimBucket {
    memory: Arc<InMemory>,
    pub happened: Faults,
    sky: Arc<Mutex<Sky>>,
    heads: Arc<Heads>,
}

/// Each head that was stored, or deleted, in that order: a volume's life as everybody sees it.
#[derive(Default)]
struct Heads {
    watched: AtomicBool,
    seen: Mutex<Vec<(String, Option<Bytes>)>>,
}

impl Heads {
    fn note(&self, key: &Path, body: Option<Bytes>) {
        let key = key.as_ref();
        if self.watched.load(Ordering::Relaxed) && key.ends_with("/head") {
            self.seen.lock().push((key.to_owned(), body));
        }
    }
}

struct Sky {
    rng: SmallRng,
    weather: Weather,
    away_until: Option<Instant>,
    bad_bodies: BTreeMap<String, u32>,
    requests: u64,
    /// The longest way of a request, and of its answer.
    way_max: Duration,
    happened: Faults,
}

impl SimBucket {
    pub fn new(seed: u64, way_max: Duration, happened: Faults) -> Arc<Self> {
        let sky = Sky {
            rng: SmallRng::seed_from_u64(seed),
            weather: Weather::default(),
            away_until: None,
            bad_bodies: BTreeMap::new(),
            requests: 0,
            way_max,
            happened: happened.clone(),
        };
        Arc::new(Self {
            memory: Arc::new(InMemory::new()),
            happened,
            sky: Arc::new(Mutex::new(sky)),
            heads: Arc::default(),
        })
    }

    /// From now on heads are kept for [`Self::take_heads`].
    pub fn watch_heads(&self) {
        self.heads.watched.store(true, Ordering::Relaxed);
    }

    /// The keys of heads, and what was stored there since this was called last; none: they were deleted.
    pub fn take_heads(&self) -> Vec<(String, Option<Bytes>)> {
        std::mem::take(&mut *self.heads.seen.lock())
    }

    pub fn set_weather(&self, weather: Weather) {
        self.sky.lock().weather = weather;
    }

    /// Nobody reaches the store for so long.
    pub fn go_away(&self, lasting: Duration) {
        self.happened.note(Fault::Outage);
        self.sky.lock().away_until = Some(Instant::now() + lasting);
    }

    pub fn come_back(&self) {
        self.sky.lock().away_until = None;
    }

    pub fn requests(&self) -> u64 {
        self.sky.lock().requests
    }

    /// Carries out `effect` on the far side, as fate wills.
    fn send<T: Send + 'static>(
        &self,
        effect: impl Future<Output = Result<T>> + Send + 'static,
    ) -> impl Future<Output = Result<T>> + Send + 'static {
        let (sky, happened) = (Arc::clone(&self.sky), self.happened.clone());
        send(sky, happened, effect)
    }
}

async fn send<T: Send + 'static>(
    sky: Arc<Mutex<Sky>>,
    happened: Faults,
    effect: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let (fate, there, back) = sky.lock().draw();
    let (tx, rx) = oneshot::channel();
    tokio::spawn(async move {
        sleep(there).await;
        let answer = match fate {
            Fate::Refused => Err(broken("before")),
            Fate::LostBefore => {
                happened.note(Fault::LostBefore);
                return;
            }
            Fate::ErrorBefore => {
                happened.note(Fault::ErrorBefore);
                Err(broken("before"))
            }
            Fate::ErrorAfter => {
                happened.note(Fault::ErrorAfter);
                effect.await.and_then(|_| Err(broken("after")))
            }
            Fate::LostAfter(late) => {
                sleep(late).await;
                let _ = effect.await;
                happened.note(if late.is_zero() {
                    Fault::LostAfter
                } else {
                    Fault::LateEffect
                });
                return;
            }
            Fate::Plain => effect.await,
        };
        sleep(back).await;
        // Whoever asked may have given up.
        let _ = tx.send(answer);
    });
    match rx.await {
        Ok(answer) => answer,
        Err(_) => pending().await,
    }
}

/// The shortest way of a request, and of its answer.
const WAY_MIN: Duration = Duration::from_micros(100);

impl Sky {
    fn draw(&mut self) -> (Fate, Duration, Duration) {
        self.requests += 1;
        let longest = self.way_max;
        let way = |rng: &mut SmallRng| rng.random_range(WAY_MIN..longest);
        let (mut there, mut back) = (way(&mut self.rng), way(&mut self.rng));
        if self.away_until.is_some_and(|until| Instant::now() < until) {
            self.happened.note(Fault::RefusedByOutage);
            return (Fate::Refused, there, back);
        }
        let weather = self.weather;
        if self.chance(weather.slow) {
            self.happened.note(Fault::Slow);
            there += Duration::from_millis(self.rng.random_range(0..8_000));
            back += Duration::from_millis(self.rng.random_range(0..8_000));
        }
        let fate = if self.chance(weather.error_before) {
            Fate::ErrorBefore
        } else if self.chance(weather.error_after) {
            Fate::ErrorAfter
        } else if self.chance(weather.lost_before) {
            Fate::LostBefore
        } else if self.chance(weather.lost_after) {
            let late = if self.rng.random_bool(0.5) {
                0
            } else {
                self.rng.random_range(0..60_000)
            };
            Fate::LostAfter(Duration::from_millis(late))
        } else {
            Fate::Plain
        };
        (fate, there, back)
    }

    fn chance(&mut self, chance: f64) -> bool {
        chance > 0.0 && self.rng.random_bool(chance)
    }

    /// The body as it arrives.
    fn spoil(&mut self, key: &str, body: Bytes) -> Bytes {
        let (short, wrong) = (self.weather.short, self.weather.wrong);
        if body.is_empty() || (short == 0.0 && wrong == 0.0) {
            return body;
        }
        let (cut, flip) = (self.chance(short), self.chance(wrong));
        let bad = self.bad_bodies.entry(key.to_owned()).or_default();
        if (!cut && !flip) || *bad >= self.weather.bad_bodies_max {
            return body;
        }
        *bad += 1;
        if cut {
            self.happened.note(Fault::ShortBody);
            let len = self.rng.random_range(0..body.len());
            return body.slice(..len);
        }
        self.happened.note(Fault::WrongBody);
        let mut bytes = body.to_vec();
        let at = self.rng.random_range(0..bytes.len());
        bytes[at] ^= 1 << self.rng.random_range(0..8);
        bytes.into()
    }
}

fn broken(when: &str) -> Error {
    let source = format!("status code: 503 Service Unavailable: <Code>SlowDown</Code> {when}");
    Error::Generic {
        store: "simulation",
        source: source.into(),
    }
}

#[async_trait]
impl ObjectStore for SimBucket {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        let (memory, heads) = (Arc::clone(&self.memory), Arc::clone(&self.heads));
        let location = location.clone();
        let put = async move {
            let body = Bytes::from(payload.clone());
            let done = memory.put_opts(&location, payload, opts).await?;
            heads.note(&location, Some(body));
            Ok(done)
        };
        self.send(put).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let (memory, key) = (Arc::clone(&self.memory), location.clone());
        let read = async move {
            let got = memory.get_opts(&key, options).await?;
            let (meta, range) = (got.meta.clone(), got.range.clone());
            Ok((meta, range, got.bytes().await?))
        };
        let (meta, range, body) = self.send(read).await?;
        let body = self.sky.lock().spoil(location.as_ref(), body);
        Ok(GetResult {
            payload: GetResultPayload::Stream(once(async move { Ok(body) }).boxed()),
            meta,
            range,
            attributes: Attributes::default(),
            extensions: Default::default(),
        })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let (memory, heads) = (Arc::clone(&self.memory), Arc::clone(&self.heads));
        let (sky, happened) = (Arc::clone(&self.sky), self.happened.clone());
        let delete = move |location: Result<Path>| {
            let (memory, heads) = (Arc::clone(&memory), Arc::clone(&heads));
            let (sky, happened) = (Arc::clone(&sky), happened.clone());
            async move {
                let location = location?;
                let effect = async move {
                    match memory.delete(&location).await {
                        Ok(()) => heads.note(&location, None),
                        // S3 does not say so.
                        Err(Error::NotFound { .. }) => {}
                        Err(error) => return Err(error),
                    }
                    Ok(location)
                };
                send(sky, happened, effect).await
            }
        };
        locations.then(delete).boxed()
    }

    /// As it was when the request arrived, in one page.
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let listed = self.memory.list(prefix);
        let listed = self.send(async move { listed.try_collect::<Vec<_>>().await });
        let found = |found: Result<Vec<_>>| match found {
            Ok(found) => iter(found.into_iter().map(Ok).collect::<Vec<_>>()),
            Err(error) => iter(vec![Err(error)]),
        };
        once(listed).map(found).flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.memory.list_with_delimiter(prefix).await
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        unreachable!("nothing is sent in parts")
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        unreachable!("nothing is copied")
    }
}

impl SimBucket {
    /// What a request without a fault would get, at once.
    pub fn peek(&self, key: &str) -> Option<Bytes> {
        let read = async {
            let got = self.memory.get(&Path::from(key)).await.ok()?;
            got.bytes().await.ok()
        };
        read.now_or_never().expect("memory does not wait")
    }

    /// The keys of all objects.
    pub fn keys(&self) -> Vec<String> {
        let list = self.memory.list(None).try_collect::<Vec<_>>();
        let found = list.now_or_never().expect("memory does not wait");
        let keys = found.unwrap().into_iter();
        keys.map(|meta| meta.location.to_string()).collect()
    }

    /// Puts an object without any fault, as a world's beginning.
    pub async fn place(&self, key: &str, body: Vec<u8>) {
        self.memory
            .put(&Path::from(key), body.into())
            .await
            .unwrap();
    }
}

impl fmt::Debug for SimBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimBucket")
    }
}

impl fmt::Display for SimBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a simulated bucket")
    }
}
