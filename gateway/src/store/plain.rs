//! Ranged reads of a plain-HTTP S3 server on connections of our own: ask, read the answer's head, and receive the body to
//! where it is to lie. By the library a body is read into its memory and copied from there, by another task.
//!
//! Owns: the connections, the signed requests, and what is believed of an answer. Does not own: what is done when it
//! fails: every failure is an error at once and no more, for the ordinary way waits and tries again.
//!
//! Invariants:
//! - A connection is used again only if the whole body that was announced, and nothing else, was taken from it.
//! - A body is taken only if the server says that it is exactly the range asked for, as it is.
//! - No failure of a server is paid for by every read: after one, none is tried for a while, which doubles with each
//!   further one and is the longest at once where time was lost; then one is tried, and the others when that went well.

mod head;
mod pool;
mod socket;

use std::io;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hyper::Uri;
use object_store::aws::{AwsAuthorizer, AwsCredential, AwsCredentialProvider};
use object_store::client::{HttpRequest, HttpRequestBody};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use url::{Position, Url};

pub use head::HeadError;
pub(super) use socket::Socket;

use super::parts::Parts;
use super::{S3Settings, StoreError, check_key, lane, s3};
use crate::reactor::errand;
use pool::{Pool, connect};

/// How long a connection may take to be made, and the server from the request to the end of the answer's head. All of a read
/// has this and the body's time, which is less than the lane gives an attempt: the library has the rest.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the body may take, besides the time for its bytes.
const BODY_TIME_MAX: Duration = Duration::from_secs(5);
/// How long nothing is tried after a failure.
const REST_TIME: Duration = Duration::from_secs(1);
/// How often that doubles at most: to about a minute.
const REST_DOUBLINGS_MAX: u32 = 6;
/// How long a signature is used: shorter than the quarter of an hour for which servers take it, and than the keys of a role
/// hold, which are asked for again five minutes before their end and may be used on for 20 seconds while that lasts.
const SIGNATURE_USED_FOR: Duration = Duration::from_secs(4 * 60);
/// How long keys are used before they are asked for again: with [`SIGNATURE_USED_FOR`] still less than those five minutes.
const KEYS_USED_FOR: Duration = Duration::from_secs(30);
/// Most signed requests kept, about 1 KiB each.
const SIGNATURES_MAX: u64 = 4096;
/// Variables that make the ordinary way go through a proxy, to which we do not speak.
const PROXY_VARIABLES: [&str; 4] = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"];

/// How long is waited.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) head_max: Duration,
    pub(super) body_max: Duration,
    pub(super) rest: Duration,
}

impl Times {
    /// How long a body of `len` bytes may take.
    pub(super) fn body(&self, len: u64) -> Duration {
        self.body_max + lane::transfer_time_max(len)
    }
}

pub(super) const TIMES: Times = Times {
    head_max: HEAD_TIME_MAX,
    body_max: BODY_TIME_MAX,
    rest: REST_TIME,
};

/// Why a store cannot be read so.
#[derive(Debug, thiserror::Error)]
pub enum NotPlain {
    /// TLS.
    #[error("the store's endpoint is not plain http")]
    Tls,
    /// A proxy.
    #[error("{0} sends requests to the store through a proxy")]
    Proxy(&'static str),
}

/// Why a read went wrong.
#[derive(Debug, thiserror::Error)]
pub enum PlainError {
    /// Another failed a moment ago.
    #[error("another read failed a moment ago")]
    Resting,
    /// The object's key or the range is none.
    #[error(transparent)]
    Invalid(#[from] StoreError),
    /// The request cannot be signed.
    #[error("the request cannot be signed: {0}")]
    Sign(#[source] object_store::Error),
    /// No connection.
    #[error("cannot connect to {authority}: {source}")]
    Connect {
        /// The server.
        authority: String,
        /// What went wrong.
        source: io::Error,
    },
    /// No answer that is good for it.
    #[error(transparent)]
    Head(#[from] HeadError),
    /// It took too long.
    #[error("no {0} in time")]
    Late(&'static str),
    /// The body was not whole, or could not be received.
    #[error("the body was not received")]
    Body,
}

impl PlainError {
    /// Whether time was lost.
    fn is_late(&self) -> bool {
        match self {
            Self::Late(_) => true,
            Self::Connect { source, .. } => source.kind() == io::ErrorKind::TimedOut,
            _ => false,
        }
    }
}

/// A request, but for the range.
pub(super) struct Signed {
    /// `host:port`, to connect to.
    authority: String,
    /// Up to `Range: bytes=`.
    beginning: String,
}

/// A connection whose next bytes are a body.
pub(super) struct Answer {
    pub(super) socket: Socket,
    /// Whether the connection lives on after them.
    pub(super) lives: bool,
}

/// Whether reads are tried.
#[derive(Default)]
struct Rest {
    until: Option<Instant>,
    /// Since a read went well.
    failures: u32,
    /// It is over, but for the one read that is tried.
    is_tried: bool,
}

impl Rest {
    fn lasts(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }
}

/// The way to one server.
pub(super) struct PlainReads {
    keys: AwsCredentialProvider,
    /// Those that were asked for last, and when.
    known_keys: Mutex<Option<(Arc<AwsCredential>, Instant)>>,
    region: String,
    /// The address of each object up to its key.
    base: String,
    signed: moka::sync::Cache<String, Arc<Signed>>,
    pool: Pool,
    /// The length of the last head.
    head_bytes: AtomicUsize,
    rest: Mutex<Rest>,
    pub(super) times: Times,
}

impl PlainReads {
    /// The way to the server that `settings` name, with `keys` to sign with. Nothing is asked of it yet.
    ///
    /// # Errors
    /// [`NotPlain`]
    pub(super) fn open(
        settings: &S3Settings,
        keys: AwsCredentialProvider,
        times: Times,
    ) -> Result<Self, NotPlain> {
        let base = s3::plain_base(settings).ok_or(NotPlain::Tls)?;
        let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if let Some(name) = PROXY_VARIABLES.into_iter().find(|name| is_set(name)) {
            return Err(NotPlain::Proxy(name));
        }
        let signed = moka::sync::Cache::builder()
            .max_capacity(SIGNATURES_MAX)
            .time_to_live(SIGNATURE_USED_FOR)
            .build();
        Ok(Self {
            keys,
            known_keys: Mutex::default(),
            region: settings.region.clone(),
            base,
            signed,
            pool: Pool::default(),
            head_bytes: AtomicUsize::new(0),
            rest: Mutex::default(),
            times,
        })
    }

    /// As [`Store::get_parts`](super::Store::get_parts).
    ///
    /// # Errors
    /// [`PlainError`], without trying twice.
    pub(super) async fn get_parts(
        &self,
        key: &str,
        range: Range<u64>,
        lens: &[usize],
        lead: usize,
    ) -> Result<Vec<Bytes>, PlainError> {
        self.awake()?;
        let body_max = self.times.body(range.end - range.start);
        let read = async {
            let signed = self.signed(key).await?;
            let mut answer = self.ask(&signed, &range).await?;
            let mut parts = Parts::new(lens, lead);
            let error = match timeout(body_max, parts.receive_all(&mut answer.socket)).await {
                Ok(Ok(())) => {
                    self.took(answer.lives.then_some(answer.socket));
                    return Ok(parts.into_bytes());
                }
                Ok(Err(_)) => PlainError::Body,
                Err(_) => PlainError::Late("body"),
            };
            Err(self.failed(error).await)
        };
        match timeout(self.times.head_max + body_max, read).await {
            Ok(read) => read,
            Err(_) => Err(self.failed(PlainError::Late("answer")).await),
        }
    }

    /// Whether nothing is tried now.
    pub(super) fn is_resting(&self) -> bool {
        self.rest.lock().lasts()
    }

    /// Before a read is tried. Of those that come when a rest is over, the first one is.
    ///
    /// # Errors
    /// [`PlainError::Resting`]
    pub(super) fn awake(&self) -> Result<(), PlainError> {
        let mut rest = self.rest.lock();
        if rest.lasts() {
            return Err(PlainError::Resting);
        }
        if rest.failures > 0 {
            // Should it never be heard of again, another is.
            rest.until = Some(Instant::now() + self.times.head_max);
            rest.is_tried = true;
        }
        Ok(())
    }

    /// The request for parts of an object.
    ///
    /// # Errors
    /// If it cannot be signed.
    pub(super) async fn signed(&self, key: &str) -> Result<Arc<Signed>, PlainError> {
        if let Some(signed) = self.signed.get(key) {
            return Ok(signed);
        }
        match self.sign(key).await {
            Ok(signed) => Ok(signed),
            Err(error) => Err(self.failed(error).await),
        }
    }

    async fn sign(&self, key: &str) -> Result<Arc<Signed>, PlainError> {
        check_key(key)?;
        let keys = self.current_keys().await?;
        let signed = Signed::new(&self.address(key), &keys, &self.region);
        let signed = Arc::new(signed.map_err(PlainError::Sign)?);
        self.signed.insert(key.to_owned(), Arc::clone(&signed));
        Ok(signed)
    }

    async fn current_keys(&self) -> Result<Arc<AwsCredential>, PlainError> {
        let known = self.known_keys.lock().clone();
        if let Some((keys, since)) = known
            && since.elapsed() < KEYS_USED_FOR
        {
            return Ok(keys);
        }
        // Those of a role may have to be asked for, and others be read from a file.
        errand::elsewhere().await;
        let keys = timeout(self.times.head_max, self.keys.get_credential()).await;
        let keys = keys.map_err(|_| PlainError::Late("keys"))?;
        let keys = keys.map_err(PlainError::Sign)?;
        *self.known_keys.lock() = Some((Arc::clone(&keys), Instant::now()));
        Ok(keys)
    }

    fn address(&self, key: &str) -> String {
        format!("{}{key}", self.base)
    }

    /// Asks for the bytes `range`, which are some, of an object. Whoever takes the body says how that went: [`PlainReads::took`] or
    /// [`PlainReads::failed`].
    ///
    /// # Errors
    /// If they do not come.
    pub(super) async fn ask(
        &self,
        signed: &Signed,
        range: &Range<u64>,
    ) -> Result<Answer, PlainError> {
        let error = match self.answer(signed, range).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if let PlainError::Head(HeadError::Status(400 | 401 | 403)) = error {
            // It may be the keys that the server does not like any more; AWS answers 400 for those that have ended.
            *self.known_keys.lock() = None;
            self.signed.invalidate_all();
        }
        Err(match error {
            // This object's misfortune, and no other's: the server is well.
            PlainError::Head(HeadError::Status(404 | 416) | HeadError::Short) => {
                self.took(None);
                error
            }
            error => self.failed(error).await,
        })
    }

    async fn answer(&self, signed: &Signed, range: &Range<u64>) -> Result<Answer, PlainError> {
        let (first, last) = (range.start, range.end - 1);
        let request = format!("{}{first}-{last}\r\n\r\n", signed.beginning);
        let mut kept = self.pool.take();
        loop {
            let was_kept = kept.is_some();
            let socket = match kept.take() {
                Some(socket) => socket,
                None => {
                    // A name is looked up by a thread, which is not to be one of a reactor's.
                    errand::elsewhere().await;
                    let connected = connect(&signed.authority, self.times.head_max).await;
                    connected.map_err(|source| {
                        let authority = signed.authority.clone();
                        PlainError::Connect { authority, source }
                    })?
                }
            };
            let asked = timeout(self.times.head_max, self.exchange(socket, &request)).await;
            match asked.map_err(|_| PlainError::Late("answer"))? {
                Ok((socket, head)) => {
                    let lives = head::check(&head, range)?;
                    self.head_bytes.store(head.len(), Ordering::Relaxed);
                    return Ok(Answer { socket, lives });
                }
                // The server gave up an idle connection just now: that is no failure.
                Err(HeadError::Closed { at_once: true } | HeadError::Io(_)) if was_kept => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn exchange(
        &self,
        socket: Socket,
        request: &str,
    ) -> Result<(Socket, Vec<u8>), HeadError> {
        let mut socket = socket.for_this_thread()?;
        socket.send_all(request.as_bytes()).await?;
        let guess = self.head_bytes.load(Ordering::Relaxed);
        let head = head::read(&mut socket, guess).await?;
        Ok((socket, head))
    }

    /// The server answered as it should; the connection, if it lives and nothing is left on it.
    pub(super) fn took(&self, socket: Option<Socket>) {
        let mut rest = self.rest.lock();
        rest.failures = 0;
        if mem::replace(&mut rest.is_tried, false) {
            rest.until = None;
        }
        drop(rest);
        if let Some(socket) = socket {
            self.pool.give(socket);
        }
    }

    /// A read has failed. Of several at once the first counts.
    pub(super) async fn failed(&self, error: PlainError) -> PlainError {
        // Telling of it may have to wait for whoever reads the log.
        errand::elsewhere().await;
        let begun = self.begin_rest(error.is_late());
        if let Some(time) = begun {
            tracing::warn!(%error, rest = ?time, "a read on a connection of our own failed; those to come are made by the library for a while");
        }
        error
    }

    /// How long nothing is tried from now on; none, if that was so already.
    fn begin_rest(&self, is_late: bool) -> Option<Duration> {
        let mut rest = self.rest.lock();
        if rest.lasts() && !rest.is_tried {
            return None;
        }
        rest.is_tried = false;
        if is_late {
            rest.failures = rest.failures.max(REST_DOUBLINGS_MAX);
        }
        let time = self.times.rest * (1 << rest.failures.min(REST_DOUBLINGS_MAX));
        rest.until = Some(Instant::now() + time);
        rest.failures += 1;
        Some(time)
    }

    #[cfg(test)]
    pub(super) fn end_rest(&self) -> Option<Duration> {
        let until = self.rest.lock().until.take();
        until.map(|until| until - Instant::now())
    }

    #[cfg(test)]
    pub(super) fn failures(&self) -> u32 {
        self.rest.lock().failures
    }
}

impl Signed {
    fn new(address: &str, keys: &AwsCredential, region: &str) -> object_store::Result<Self> {
        let failed = |source| object_store::Error::Generic {
            store: "S3",
            source,
        };
        let url = Url::parse(address).map_err(|error| failed(Box::new(error)))?;
        let uri = url.as_str().parse::<Uri>();
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.uri_mut() = uri.map_err(|error| failed(Box::new(error)))?;
        // In headers, as the library does by itself: addresses are logged.
        AwsAuthorizer::new(keys, "s3", region).try_authorize(&mut request, None)?;
        let mut fields = String::new();
        for (name, value) in request.headers() {
            let value = String::from_utf8_lossy(value.as_bytes());
            fields.push_str(&format!("{name}: {value}\r\n"));
        }
        let port = url.port_or_known_default().unwrap_or(80);
        let host = url.host_str().unwrap_or_default();
        let signed_host = &url[Position::BeforeHost..Position::AfterPort];
        let target = &url[Position::BeforePath..Position::AfterQuery];
        Ok(Self {
            authority: format!("{host}:{port}"),
            beginning: format!(
                "GET {target} HTTP/1.1\r\nHost: {signed_host}\r\nUser-Agent: quarry\r\nAccept-Encoding: identity\r\n{fields}Range: bytes="
            ),
        })
    }
}

#[cfg(test)]
pub(super) mod tests;
