//! Direct reads of a plain-HTTP S3 server: ask, read the answer's head, and hand the connection with
//! the body still in it to whoever receives it into memory that is not ours.
//!
//! Owns: the connections, the signed requests, and what is believed of an answer. Does not own: the
//! receiving ([`crate::reactor::direct`]), and what is done when it fails: every failure is an
//! error at once and no more, for the ordinary way waits and tries again.
//!
//! A direct read has a place in the [`Lane`] like any other foreground read, from before it asks until
//! its body is there, and is counted there.
//!
//! Invariants:
//! - A connection is used again only if the whole body that was announced, and nothing else, was
//!   taken from it.
//! - A body is handed over only if the server says that it is exactly the range asked for, as it is.
//! - No failure of a server is paid for by every read: after one, none is tried for a while, which
//!   doubles with each further one until a read goes well.

mod head;
mod pool;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use object_store::aws::AmazonS3;
use object_store::path::Path;
use object_store::signer::{Method, Signer as _};
use parking_lot::Mutex;
use rustix::net::{Shutdown, shutdown};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};
use url::{Position, Url};

pub use head::HeadError;

use super::lane::LanePlace;
use super::{
    Lane, OpenError, Operation, Outcome, Place, S3Settings, StoreSettings, check_key, check_range,
    s3,
};
use crate::reactor::direct::Body;
use pool::{Pool, connect};

/// How long the server may take from the request to the end of the answer's head.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the body may take, besides the time for its bytes.
const BODY_TIME_MAX: Duration = Duration::from_secs(5);
/// The slowest body that is waited for, in bytes a second.
const RATE_BYTES_MIN: u64 = 256 << 10;
/// How long nothing is tried after a failure.
const REST_TIME: Duration = Duration::from_secs(1);
/// How often that doubles at most: to about a minute.
const REST_DOUBLINGS_MAX: u32 = 6;
/// How long a signature holds.
const SIGNED_FOR: Duration = Duration::from_secs(15 * 60);
/// How long it is used: shorter than the keys of a role, which the library has renewed when they hold
/// for less than five minutes.
const SIGNATURE_USED_FOR: Duration = Duration::from_secs(4 * 60);
/// Most signed requests kept, about 1 KiB each.
const SIGNATURES_MAX: u64 = 4096;
/// Variables that make the ordinary way go through a proxy, to which we do not speak.
const PROXY_VARIABLES: [&str; 4] = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"];

/// How long is waited.
#[derive(Clone, Copy, Debug)]
struct Times {
    head_max: Duration,
    body_max: Duration,
    rest: Duration,
}

const TIMES: Times = Times {
    head_max: HEAD_TIME_MAX,
    body_max: BODY_TIME_MAX,
    rest: REST_TIME,
};

/// Why there can be no direct reads of a store.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// A folder.
    #[error("the store is no S3 server")]
    NotS3,
    /// TLS: the kernel would receive ciphertext.
    #[error("the store's endpoint is not plain http")]
    NotPlain,
    /// A proxy.
    #[error("{0} sends requests to the store through a proxy")]
    Proxy(&'static str),
    /// The kernel cannot.
    #[error("this kernel does not receive into registered pages ({0}; Linux 7.2 is the first)")]
    Kernel(#[source] io::Error),
    /// The settings are none.
    #[error(transparent)]
    Settings(#[from] OpenError),
}

/// Why a read is not direct.
#[derive(Debug, thiserror::Error)]
pub enum DirectError {
    /// Another failed a moment ago.
    #[error("a direct read failed a moment ago")]
    Resting,
    /// The object's key or the range is none.
    #[error(transparent)]
    Invalid(#[from] super::StoreError),
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

impl DirectError {
    /// As the lane counts it.
    const fn outcome(&self) -> Outcome {
        match self {
            Self::Head(HeadError::Status(404)) => Outcome::NotFound,
            Self::Head(HeadError::Status(401 | 403)) => Outcome::Denied,
            _ => Outcome::Unavailable,
        }
    }
}

/// A request, but for the range.
struct Signed {
    /// `host:port`, to connect to.
    authority: String,
    /// Up to `Range: bytes=`.
    beginning: String,
}

/// Whether reads are tried.
#[derive(Default)]
struct Rest {
    until: Option<Instant>,
    /// Since a read went well.
    failures: u32,
}

impl Rest {
    fn lasts(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }
}

/// The way to one server.
pub struct DirectLane {
    lane: Lane,
    client: AmazonS3,
    /// What is put before each key: empty, or ends with `/`.
    prefix: String,
    signed: moka::sync::Cache<String, Arc<Signed>>,
    pool: Pool,
    /// The length of the last head.
    head_bytes: AtomicUsize,
    rest: Mutex<Rest>,
    times: Times,
}

impl DirectLane {
    /// The way to the store that `settings` name, with places in `lane`. Nothing is asked of the
    /// server yet.
    ///
    /// # Errors
    /// [`Unfit`]
    pub fn open(settings: &StoreSettings, lane: Lane) -> Result<Self, Unfit> {
        let Place::S3(settings) = settings.place()? else {
            return Err(Unfit::NotS3);
        };
        if !s3::is_plain(&settings) {
            return Err(Unfit::NotPlain);
        }
        let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if let Some(name) = PROXY_VARIABLES.into_iter().find(|name| is_set(name)) {
            return Err(Unfit::Proxy(name));
        }
        crate::reactor::direct::probe().map_err(Unfit::Kernel)?;
        Ok(Self::over(&settings, lane, TIMES)?)
    }

    fn over(settings: &S3Settings, lane: Lane, times: Times) -> Result<Self, OpenError> {
        let client = s3::client(settings)?;
        let signed = moka::sync::Cache::builder()
            .max_capacity(SIGNATURES_MAX)
            .time_to_live(SIGNATURE_USED_FOR)
            .build();
        Ok(Self {
            lane,
            client,
            prefix: s3::key_base(&settings.prefix),
            signed,
            pool: Pool::default(),
            head_bytes: AtomicUsize::new(0),
            rest: Mutex::default(),
            times,
        })
    }

    /// Asks for the bytes `range` of an object. The body is to be received by whoever gets it; how
    /// that went is the [`Opening`]'s to wait for.
    ///
    /// # Errors
    /// [`DirectError`], without trying twice.
    pub async fn ask(
        &self,
        key: &str,
        range: Range<u64>,
    ) -> Result<(Opening<'_>, Body), DirectError> {
        self.awake()?;
        check_range(key, &range)?;
        let signed = self.signed(key).await.map_err(|e| self.failed(e))?;
        let place = self.lane.place(Operation::GetRange).await;
        // Those before it in the line may have failed.
        self.awake()?;
        let (stream, lives) = match self.answer(&signed, &range).await {
            Ok(answer) => answer,
            Err(error) => {
                place.end(error.outcome());
                if let DirectError::Head(HeadError::Status(_)) = error {
                    // It may be the signature that the server does not like any more.
                    self.signed.invalidate(key);
                }
                return Err(match error {
                    // This object's misfortune, and no other's.
                    DirectError::Head(HeadError::Status(404)) => error,
                    error => self.failed(error),
                });
            }
        };
        let stream = Arc::new(stream);
        let (body, heard) = Body::new(Arc::clone(&stream));
        let opening = Opening {
            way: self,
            place,
            stream: Cut(Some(stream)),
            heard,
            len: range.end - range.start,
            lives,
        };
        Ok((opening, body))
    }

    /// A connection whose next bytes are the body, and whether it lives on after them.
    async fn answer(
        &self,
        signed: &Signed,
        range: &Range<u64>,
    ) -> Result<(TcpStream, bool), DirectError> {
        let (first, last) = (range.start, range.end - 1);
        let request = format!("{}{first}-{last}\r\n\r\n", signed.beginning);
        let mut kept = self.pool.take();
        loop {
            let was_kept = kept.is_some();
            let stream = match kept.take() {
                Some(stream) => stream,
                None => connect(&signed.authority).await.map_err(|source| {
                    let authority = signed.authority.clone();
                    DirectError::Connect { authority, source }
                })?,
            };
            let asked = timeout(self.times.head_max, self.exchange(stream, &request)).await;
            match asked.map_err(|_| DirectError::Late("answer"))? {
                Ok((stream, head)) => {
                    let lives = head::check(&head, range)?;
                    self.head_bytes.store(head.len(), Ordering::Relaxed);
                    return Ok((stream, lives));
                }
                // The server gave up an idle connection just now: that is no failure.
                Err(HeadError::Closed { at_once: true } | HeadError::Io(_)) if was_kept => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn exchange(
        &self,
        mut stream: TcpStream,
        request: &str,
    ) -> Result<(TcpStream, Vec<u8>), HeadError> {
        stream.write_all(request.as_bytes()).await?;
        let guess = self.head_bytes.load(Ordering::Relaxed);
        let head = head::read(&stream, guess).await?;
        Ok((stream, head))
    }

    fn awake(&self) -> Result<(), DirectError> {
        if self.rest.lock().lasts() {
            return Err(DirectError::Resting);
        }
        Ok(())
    }

    async fn signed(&self, key: &str) -> Result<Arc<Signed>, DirectError> {
        if let Some(signed) = self.signed.get(key) {
            return Ok(signed);
        }
        check_key(key)?;
        let path = Path::from(format!("{}{key}", self.prefix));
        // The keys of a role may have to be asked for first.
        let url = self.client.signed_url(Method::GET, &path, SIGNED_FOR);
        let url = timeout(self.times.head_max, url).await;
        let url = url.map_err(|_| DirectError::Late("keys"))?;
        let signed = Arc::new(Signed::new(&url.map_err(DirectError::Sign)?));
        self.signed.insert(key.to_owned(), Arc::clone(&signed));
        Ok(signed)
    }

    /// A read has failed. Of several at once the first counts.
    fn failed(&self, error: DirectError) -> DirectError {
        let mut rest = self.rest.lock();
        if !rest.lasts() {
            let time = self.times.rest * (1 << rest.failures.min(REST_DOUBLINGS_MAX));
            rest.until = Some(Instant::now() + time);
            rest.failures += 1;
            tracing::warn!(%error, rest = ?time, "a direct read failed; those to come are made the ordinary way for a while");
        }
        error
    }
}

impl Signed {
    fn new(url: &Url) -> Self {
        let port = url.port_or_known_default().unwrap_or(80);
        let host = url.host_str().unwrap_or_default();
        let signed_host = &url[Position::BeforeHost..Position::AfterPort];
        let target = &url[Position::BeforePath..Position::AfterQuery];
        Self {
            authority: format!("{host}:{port}"),
            beginning: format!(
                "GET {target} HTTP/1.1\r\nHost: {signed_host}\r\nUser-Agent: quarry\r\nAccept-Encoding: identity\r\nRange: bytes="
            ),
        }
    }
}

/// A direct read whose body is being received; dropped, it is broken off.
pub struct Opening<'a> {
    way: &'a DirectLane,
    place: LanePlace<'a>,
    stream: Cut,
    heard: oneshot::Receiver<bool>,
    len: u64,
    lives: bool,
}

impl Opening<'_> {
    /// Waits until the body was received, or breaks it off when its time is over.
    ///
    /// # Errors
    /// If it was not received whole.
    pub async fn finish(mut self) -> Result<(), DirectError> {
        let limit =
            self.way.times.body_max + Duration::from_millis(self.len * 1000 / RATE_BYTES_MIN);
        let (heard, outcome, error) = match timeout(limit, &mut self.heard).await {
            Ok(heard) => (heard, Outcome::Unavailable, DirectError::Body),
            Err(_) => {
                self.lives = false;
                self.stream.cut();
                // Who receives hears of that, and says so; or was done in this moment.
                let heard = (&mut self.heard).await;
                (heard, Outcome::GivenUp, DirectError::Late("body"))
            }
        };
        if heard != Ok(true) {
            self.place.end(outcome);
            return Err(self.way.failed(error));
        }
        self.way.rest.lock().failures = 0;
        self.place
            .received(usize::try_from(self.len).unwrap_or(usize::MAX));
        if self.lives
            && let Some(stream) = self.stream.into_inner()
        {
            self.way.pool.give(stream);
        }
        Ok(())
    }
}

/// A connection that is shut down with this handle: whoever else has it is not left waiting.
struct Cut(Option<Arc<TcpStream>>);

impl Cut {
    fn cut(&self) {
        if let Some(stream) = &self.0 {
            // Not connected any more: then nobody waits on it.
            let _ = shutdown(&**stream, Shutdown::Both);
        }
    }

    /// The connection, if nobody else has it.
    fn into_inner(mut self) -> Option<TcpStream> {
        Arc::into_inner(self.0.take()?)
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.cut();
    }
}

impl fmt::Debug for DirectLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectLane")
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
