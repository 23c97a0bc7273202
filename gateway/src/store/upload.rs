//! What vouches for a large upload on its way: the request's signature, which covers the SHA-256 of
//! the body; or the body's CRC-64, which the server checks. The latter is a small part of the work on
//! both sides, but there are servers that ignore it, and some that refuse it.
//!
//! Owns: what is known of the server, and the client that leaves bodies unsigned. Does not own: uploads
//! themselves ([`super::S3Store`]).
//!
//! **Invariant.** Unless the settings say so, a body goes unsigned only to a server that has refused
//! one whose CRC-64 was wrong, and has taken one whose was right, since this process asked.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use object_store::aws::{AmazonS3, AmazonS3Builder, AwsCredentialProvider, Checksum};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _};
use parking_lot::Mutex;
use quarry_config::UploadCheck;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use super::s3::{self, builder, built};
use super::s3_error::{is_refusal, is_wrong_checksum};
use super::{OpenError, S3Settings};

/// From so many bytes on it is worth while to spare a body's SHA-256: chunks, and no heads.
const LARGE_BYTES_MIN: usize = 64 << 10;
/// How long the server may take to show what it checks.
const ASK_TIME_MAX: Duration = Duration::from_secs(5);
/// How long it is not asked again after it has shown nothing, or has refused what it had promised to take.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// How long after it has shown that it does not: it may be replaced, and keys refused then may be good now.
const NOT_CHECKED_FOR: Duration = Duration::from_secs(3600);
/// What it is asked with.
const PROBE: &[u8] = b"a body whose checksum is right, or is not";
/// Not the CRC-64 of that.
const WRONG_CRC: [u8; 8] = [0; 8];

/// What a server does with the CRC-64 of what is uploaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crc64 {
    /// It refuses a body that is another.
    Checked,
    /// It takes any body, or none with a checksum, or none unsigned.
    NotChecked,
}

/// Why it is not known what a server checks.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The settings are none.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be reached, or has too much to do.
    #[error(transparent)]
    Store(#[from] object_store::Error),
}

/// How large bodies are uploaded other than signed.
pub(super) struct Unsigned {
    client: Arc<dyn ObjectStore>,
    /// None: it was set, and the server is not asked.
    server: Option<Server>,
}

struct Server {
    settings: S3Settings,
    keys: AwsCredentialProvider,
    known: Mutex<Known>,
}

#[derive(Clone, Copy)]
enum Known {
    Checks,
    /// Bodies are signed. It is asked by the first upload from then on; none: now.
    NoMore(Option<Instant>),
}

impl Known {
    fn no_more_for(time: Duration) -> Self {
        Self::NoMore(Some(Instant::now() + time))
    }
}

impl Unsigned {
    /// With the keys of the client that signs. None: the settings want all bodies signed.
    ///
    /// # Errors
    /// [`OpenError::Client`] if the settings are none.
    pub(super) fn open(
        settings: &S3Settings,
        signing: &AmazonS3,
    ) -> Result<Option<Self>, OpenError> {
        let keys = signing.credentials();
        let is_asked = match settings.upload_check {
            UploadCheck::Signature => return Ok(None),
            UploadCheck::Auto => true,
            UploadCheck::Crc64Nvme | UploadCheck::None => false,
        };
        let client = unsigned(settings, keys, HeaderMap::new());
        let client = match settings.upload_check {
            UploadCheck::None => client,
            _ => client.with_checksum_algorithm(Checksum::CRC64NVME),
        };
        let server = is_asked.then(|| Server {
            settings: settings.clone(),
            keys: Arc::clone(keys),
            known: Mutex::new(Known::NoMore(None)),
        });
        Ok(Some(Self {
            client: Arc::new(built(client, settings)?),
            server,
        }))
    }

    /// What uploads a body of so many bytes unsigned, if it may go so. The first large one waits until
    /// the server has shown what it checks; others are signed meanwhile.
    pub(super) async fn client_for(&self, len: usize) -> Option<&dyn ObjectStore> {
        let may_go = match &self.server {
            _ if len < LARGE_BYTES_MIN => false,
            Some(server) => server.checks().await,
            None => true,
        };
        may_go.then_some(&*self.client)
    }

    /// Whether a body that the server refused unsigned is to be signed and sent again. The server,
    /// which may be another than the one that was asked, is asked anew after a while.
    pub(super) fn is_to_be_signed(&self, error: &object_store::Error) -> bool {
        let Some(server) = self.server.as_ref().filter(|_| is_refusal(error)) else {
            return false;
        };
        *server.known.lock() = Known::no_more_for(ASK_AGAIN_AFTER);
        tracing::warn!(%error, "the store refused an upload that is checked by its CRC-64; those to come are signed for a while");
        true
    }
}

impl Server {
    async fn checks(&self) -> bool {
        {
            let mut known = self.known.lock();
            match *known {
                Known::Checks => return true,
                Known::NoMore(Some(from)) if Instant::now() < from => return false,
                // Set before it is asked, for whoever asks may be given up while it waits.
                Known::NoMore(_) => *known = Known::no_more_for(ASK_AGAIN_AFTER),
            }
        }
        match timeout(ASK_TIME_MAX, ask_by(&self.settings, &self.keys)).await {
            Ok(Ok(Crc64::Checked)) => {
                tracing::info!("the store checks uploads by their CRC-64: chunks are not signed");
                *self.known.lock() = Known::Checks;
                true
            }
            Ok(Ok(Crc64::NotChecked)) => {
                tracing::info!("the store does not check uploads by their CRC-64: all are signed");
                *self.known.lock() = Known::no_more_for(NOT_CHECKED_FOR);
                false
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "what the store checks uploads by is not known yet");
                false
            }
            Err(_) => false,
        }
    }
}

/// Lets the server show whether it checks what is uploaded by its CRC-64, with two small objects under
/// `probe/`, which are deleted.
///
/// # Errors
/// [`AskError`] if it showed nothing.
pub async fn ask(settings: &S3Settings) -> Result<Crc64, AskError> {
    let signing = s3::client(settings)?;
    ask_by(settings, signing.credentials()).await
}

async fn ask_by(settings: &S3Settings, keys: &AwsCredentialProvider) -> Result<Crc64, AskError> {
    let name = HeaderName::from_static("x-amz-checksum-crc64nvme");
    let value = HeaderValue::from_str(&BASE64_STANDARD.encode(WRONG_CRC));
    let wrong = HeaderMap::from_iter([(name, value.expect("base64 is ASCII"))]);
    let wrong = unsigned(settings, keys, wrong);
    let right = unsigned(settings, keys, HeaderMap::new());
    let right = right.with_checksum_algorithm(Checksum::CRC64NVME);
    match put_probe(&built(right, settings)?, settings).await {
        Ok(()) => {}
        Err(error) if is_refusal(&error) => return Ok(Crc64::NotChecked),
        Err(error) => return Err(error.into()),
    }
    match put_probe(&built(wrong, settings)?, settings).await {
        Ok(()) => Ok(Crc64::NotChecked),
        // For that reason: any other says nothing, such as keys that have run out between the two.
        Err(error) if is_wrong_checksum(&error) => Ok(Crc64::Checked),
        Err(error) => Err(error.into()),
    }
}

async fn put_probe(client: &AmazonS3, settings: &S3Settings) -> object_store::Result<()> {
    let key = format!("{}probe/{}", s3::key_base(&settings.prefix), Uuid::new_v4());
    let path = Path::from(key);
    client.put(&path, Bytes::from_static(PROBE).into()).await?;
    // A leftover does no harm.
    if let Err(error) = client.delete(&path).await {
        tracing::debug!(%error, "an object of the probe is left");
    }
    Ok(())
}

/// A client that leaves bodies unsigned, and has these headers in each request.
fn unsigned(
    settings: &S3Settings,
    keys: &AwsCredentialProvider,
    headers: HeaderMap,
) -> AmazonS3Builder {
    builder(settings, headers)
        .with_credentials(Arc::clone(keys))
        .with_unsigned_payload(true)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use axum::Router;
    use axum::extract::State;
    use axum::http::{HeaderMap, Method, StatusCode};
    use axum::response::IntoResponse;

    use super::*;
    use crate::store::stub::settings_at;
    use crate::store::{S3Store, Store as _};

    /// A server that says which of its requests had bodies that were signed.
    #[derive(Default)]
    struct Stub {
        /// Refuses a checksum that is wrong.
        checks: AtomicBool,
        /// Refuses all checksums.
        knows_none: AtomicBool,
        /// Refuses what has a wrong one for another reason.
        keys_run_out: AtomicBool,
        /// Answers nothing but that it has too much to do.
        is_busy: AtomicBool,
        /// Of PUTs: the key, and whether its body was signed.
        puts: Mutex<Vec<(String, bool)>>,
        deleted: Mutex<Vec<String>>,
    }

    async fn answer(
        State(stub): State<Arc<Stub>>,
        method: Method,
        uri: axum::http::Uri,
        headers: HeaderMap,
        _body: Bytes,
    ) -> impl IntoResponse {
        let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap());
        let tag = [("etag", "\"t\"")];
        if method == Method::DELETE {
            stub.deleted.lock().push(uri.path().to_owned());
            return (StatusCode::NO_CONTENT, tag, "");
        }
        let is_signed = header("x-amz-content-sha256") != Some("UNSIGNED-PAYLOAD");
        stub.puts.lock().push((uri.path().to_owned(), is_signed));
        let crc = header("x-amz-checksum-crc64nvme");
        let is_wrong = crc == Some("AAAAAAAAAAA=");
        let (status, code) = if is(&stub.is_busy) {
            (StatusCode::SERVICE_UNAVAILABLE, "<Code>SlowDown</Code>")
        } else if is(&stub.keys_run_out) && is_wrong {
            (StatusCode::FORBIDDEN, "<Code>AccessDenied</Code>")
        } else if is(&stub.checks) && is_wrong {
            (StatusCode::BAD_REQUEST, "<Code>BadDigest</Code>")
        } else if is(&stub.knows_none) && crc.is_some() {
            (StatusCode::BAD_REQUEST, "<Code>InvalidRequest</Code>")
        } else {
            (StatusCode::OK, "")
        };
        (status, tag, code)
    }

    async fn server() -> (Arc<Stub>, S3Settings) {
        let stub = Arc::new(Stub::default());
        let app = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&stub))
            .layer(axum::extract::DefaultBodyLimit::disable());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await });
        (stub, settings_at(format!("http://{address}")))
    }

    impl Stub {
        /// Whether bodies were signed of what has come since the last time, but for the server's own
        /// proving.
        fn signed(&self) -> Vec<bool> {
            let puts = std::mem::take(&mut *self.puts.lock());
            let uploads = puts.iter().filter(|(key, _)| !key.contains("/probe/"));
            uploads.map(|(_, is_signed)| *is_signed).collect()
        }

        fn asked(&self) -> usize {
            let puts = self.puts.lock();
            puts.iter()
                .filter(|(key, _)| key.contains("/probe/"))
                .count()
        }
    }

    fn store(settings: &S3Settings, upload_check: UploadCheck) -> S3Store {
        S3Store::open(&S3Settings {
            upload_check,
            ..settings.clone()
        })
        .unwrap()
    }

    fn large() -> Bytes {
        Bytes::from(vec![7; LARGE_BYTES_MIN])
    }

    #[tokio::test]
    async fn large_body_is_unsigned_only_where_the_server_shows_that_it_checks() {
        for (checks, knows_none, expected) in [
            (true, false, Crc64::Checked),
            (false, false, Crc64::NotChecked),
            (false, true, Crc64::NotChecked),
        ] {
            let (stub, settings) = server().await;
            stub.checks.store(checks, Ordering::Relaxed);
            stub.knows_none.store(knows_none, Ordering::Relaxed);
            assert_eq!(ask(&settings).await.unwrap(), expected);
            stub.signed();
            let store = store(&settings, UploadCheck::Auto);
            store.create("a", large()).await.unwrap();
            assert!((1..=2).contains(&stub.asked()));
            let is_signed = expected == Crc64::NotChecked;
            assert_eq!(stub.signed(), [is_signed]);
            // It is not asked again, and small bodies are signed anyway.
            store.create("b", large()).await.unwrap();
            store.create("c", Bytes::from_static(b"c")).await.unwrap();
            assert_eq!(stub.asked(), 0);
            assert_eq!(stub.signed(), [is_signed, true]);
            // Nothing of the two probes is left that was taken: the right one, and the wrong one where none is checked.
            let taken = usize::from(!knows_none) + usize::from(!knows_none && !checks);
            assert_eq!(stub.deleted.lock().len(), 2 * taken);
        }
    }

    #[tokio::test]
    async fn what_is_set_is_done_without_asking() {
        let (stub, settings) = server().await;
        for (check, is_signed) in [
            (UploadCheck::Signature, true),
            (UploadCheck::Crc64Nvme, false),
            (UploadCheck::None, false),
        ] {
            store(&settings, check).create("a", large()).await.unwrap();
            assert_eq!(stub.asked(), 0);
            assert_eq!(stub.signed(), [is_signed], "{check:?}");
        }
    }

    #[tokio::test]
    async fn body_refused_unsigned_is_signed_at_once_and_the_server_not_trusted_for_a_while() {
        let (stub, settings) = server().await;
        stub.checks.store(true, Ordering::Relaxed);
        let store = store(&settings, UploadCheck::Auto);
        store.create("a", large()).await.unwrap();
        assert_eq!(stub.signed(), [false]);
        stub.knows_none.store(true, Ordering::Relaxed);
        store.create("b", large()).await.unwrap();
        store.create("c", large()).await.unwrap();
        assert_eq!(stub.asked(), 0);
        assert_eq!(stub.signed(), [false, true, true]);
    }

    #[tokio::test]
    async fn server_that_shows_nothing_gets_signed_bodies_and_is_not_asked_by_each_upload() {
        let (stub, settings) = server().await;
        stub.is_busy.store(true, Ordering::Relaxed);
        assert!(ask(&settings).await.is_err());
        stub.signed();
        let store = store(&settings, UploadCheck::Auto);
        store.create("a", large()).await.unwrap_err();
        assert_eq!(stub.asked(), 1);
        assert_eq!(stub.signed(), [true]);
        stub.is_busy.store(false, Ordering::Relaxed);
        store.create("b", large()).await.unwrap();
        assert_eq!(stub.asked(), 0);
        assert_eq!(stub.signed(), [true]);
    }

    #[tokio::test]
    async fn refusal_for_another_reason_proves_nothing() {
        let (stub, settings) = server().await;
        stub.keys_run_out.store(true, Ordering::Relaxed);
        assert!(ask(&settings).await.is_err());
        stub.signed();
        let store = store(&settings, UploadCheck::Auto);
        store.create("a", large()).await.unwrap();
        assert_eq!(stub.signed(), [true]);
    }

    #[tokio::test]
    async fn of_several_first_uploads_one_asks() {
        let (stub, settings) = server().await;
        stub.checks.store(true, Ordering::Relaxed);
        let store = store(&settings, UploadCheck::Auto);
        let uploads = (0..8).map(|n| {
            let (store, key) = (store.clone(), n.to_string());
            async move { store.create(&key, large()).await }
        });
        for done in futures::future::join_all(uploads).await {
            done.unwrap();
        }
        assert_eq!(stub.asked(), 2);
        assert_eq!(stub.signed().iter().filter(|signed| !**signed).count(), 1);
    }
}
