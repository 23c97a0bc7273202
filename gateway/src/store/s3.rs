//! A store in a bucket of an S3 server, by the crate `object_store`.
//!
//! One request an operation (but for a listing's pages): retries, places and the size of time
//! limits are the [`Lane`](super::Lane)'s. The same code over the library's store in memory is what
//! the contract's tests run on without a server.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt as _;
use hyper::header::HeaderMap;
use object_store::aws::{
    AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsCredentialProvider, S3ConditionalPut,
};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, GetResult, ObjectStore,
    ObjectStoreExt as _, PutMode, PutOptions, PutResult, RetryConfig, UpdateVersion,
};
use quarry_cache::Mutation;

use super::credentials::Rotating;
use super::parts::Parts;
use super::plain::{PlainReads, TIMES};
use super::s3_error::Asked;
use super::s3_http::Straight;
use super::upload::Unsigned;
use super::{
    GET_BYTES_MAX, LIST_KEYS_MAX, OpenError, Operation, S3Settings, Store, StoreError, Tag,
    check_key, check_list_prefix, check_range,
};
use crate::reactor::errand;

/// How long a connection may take to be made.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long nothing may come on a connection that we read from.
const READ_TIME_MAX: Duration = Duration::from_secs(30);
/// How long any request may take; a lane's limits are shorter.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(300);
/// How long a connection is kept without use: shorter than servers and load balancers do.
pub(super) const IDLE_TIME_MAX: Duration = Duration::from_secs(20);
/// The longest range that is read in one piece on a connection of our own: map nodes and headers. There is no limit there to how
/// long nothing may come, which would take long for long ones.
const PLAIN_BYTES_MAX: usize = 1 << 20;
/// Variables that say how to get the machine's or container's role.
const ROLE_VARIABLES: [&str; 9] = [
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_ENDPOINT_URL_STS",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_METADATA_ENDPOINT",
    "AWS_IMDSV1_FALLBACK",
];

/// Chooses the process's cryptography for TLS. Before the first HTTP client is made (also one that
/// only speaks plain HTTP): without it, making one panics. Doing it again changes nothing.
pub fn install_crypto() {
    // An error means that it was chosen before.
    drop(rustls::crypto::ring::default_provider().install_default());
}

/// A store in a bucket.
#[derive(Clone)]
pub struct S3Store {
    inner: Arc<dyn ObjectStore>,
    /// Large uploads, other than signed.
    unsigned: Option<Arc<Unsigned>>,
    /// Reads of parts, other than by the library.
    plain: Option<Arc<PlainReads>>,
    /// What is put before each key: empty, or ends with `/`.
    prefix: String,
    description: String,
}

impl S3Store {
    /// A store as `settings` say; nothing is asked of the server yet.
    ///
    /// # Errors
    /// [`OpenError::Client`] if the settings are none.
    pub fn open(settings: &S3Settings) -> Result<Self, OpenError> {
        let inner = client(settings)?;
        let unsigned = Unsigned::open(settings, &inner)?.map(Arc::new);
        let plain = PlainReads::open(settings, Arc::clone(inner.credentials()), TIMES);
        let plain = plain.ok().map(Arc::new);
        let store = Self::over(Arc::new(inner), &settings.prefix, settings.describe());
        Ok(Self {
            unsigned,
            plain,
            ..store
        })
    }

    /// A store in `inner`, under `prefix`.
    #[must_use]
    pub fn over(inner: Arc<dyn ObjectStore>, prefix: &str, description: String) -> Self {
        Self {
            inner,
            unsigned: None,
            plain: None,
            prefix: key_base(prefix),
            description,
        }
    }

    fn path(&self, key: &str) -> Result<Path, StoreError> {
        check_key(key)?;
        let path = format!("{}{key}", self.prefix);
        Path::parse(path).map_err(|error| StoreError::invalid(key, error.to_string()))
    }

    async fn put(&self, asked: Asked<'_>, body: Bytes, mode: PutMode) -> Result<Tag, StoreError> {
        let path = self.path(asked.key)?;
        let options = PutOptions {
            mode,
            ..PutOptions::default()
        };
        match self.upload(&path, body, options).await {
            Ok(done) => tag(asked, done.e_tag),
            Err(error) => Err(asked.explain_whole(&error)),
        }
    }

    async fn upload(
        &self,
        path: &Path,
        body: Bytes,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        if let Some(unsigned) = &self.unsigned
            && let Some(client) = unsigned.client_for(body.len()).await
        {
            let put = client.put_opts(path, body.clone().into(), options.clone());
            match put.await {
                // It was refused as it came, and nothing was done.
                Err(error) if unsigned.is_to_be_signed(&error) => {}
                done => return done,
            }
        }
        self.inner.put_opts(path, body.into(), options).await
    }
}

/// What all keys of a store with that prefix begin with: nothing, or what ends with `/`.
pub(super) fn key_base(prefix: &str) -> String {
    match prefix {
        "" => String::new(),
        prefix => format!("{prefix}/"),
    }
}

/// The library's client for `settings`, which signs all of a request.
pub(crate) fn client(settings: &S3Settings) -> Result<AmazonS3, OpenError> {
    let mut builder = builder(settings, HeaderMap::new());
    if let Some((source, profiles)) = &settings.source {
        let keys = Rotating::new(source.clone(), profiles.clone(), &settings.region);
        builder = builder.with_credentials(Arc::new(keys));
    } else if let Some((id, secret)) = &settings.keys {
        builder = builder
            .with_access_key_id(id)
            .with_secret_access_key(secret.expose());
        if let Some(token) = &settings.session_token {
            builder = builder.with_token(token.expose());
        }
    } else {
        for name in ROLE_VARIABLES {
            let key = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>();
            if let (Ok(key), Ok(value)) = (key, std::env::var(name)) {
                builder = builder.with_config(key, value);
            }
        }
    }
    built(builder, settings)
}

/// What all clients for `settings` have in common, but the keys, with these headers in each request.
pub(super) fn builder(settings: &S3Settings, headers: HeaderMap) -> AmazonS3Builder {
    install_crypto();
    // Each is read in `Straight` too.
    let options = ClientOptions::new()
        .with_default_headers(headers)
        .with_allow_http(is_plain(settings))
        .with_connect_timeout(CONNECT_TIME_MAX)
        .with_read_timeout(READ_TIME_MAX)
        .with_timeout(REQUEST_TIME_MAX)
        .with_pool_idle_timeout(IDLE_TIME_MAX);
    let builder = AmazonS3Builder::new()
        .with_bucket_name(&settings.bucket)
        .with_region(&settings.region)
        .with_virtual_hosted_style_request(!settings.path_style)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_disable_bulk_delete(true)
        .with_client_options(options)
        .with_http_connector(Straight)
        .with_retry(RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: 0,
            retry_timeout: Duration::ZERO,
        });
    match &settings.endpoint {
        Some(endpoint) => builder.with_endpoint(endpoint_of(endpoint, settings)),
        None => builder,
    }
}

pub(super) fn built(
    builder: AmazonS3Builder,
    settings: &S3Settings,
) -> Result<AmazonS3, OpenError> {
    builder.build().map_err(|source| OpenError::Client {
        place: settings.describe(),
        source,
    })
}

/// Where the client gets its keys from: the provisioning client asks the same source.
pub(crate) fn credentials(settings: &S3Settings) -> Result<AwsCredentialProvider, OpenError> {
    Ok(Arc::clone(client(settings)?.credentials()))
}

/// What the addresses of all objects begin with, up to the key, as the library makes them of `settings`: buckets, prefixes
/// and keys have nothing that it would encode. None if the server is spoken to by TLS.
pub(super) fn plain_base(settings: &S3Settings) -> Option<String> {
    let endpoint = settings.endpoint.as_ref();
    let endpoint = endpoint_of(endpoint.filter(|_| is_plain(settings))?, settings);
    let prefix = key_base(&settings.prefix);
    Some(match settings.path_style {
        true => format!("{endpoint}/{}/{prefix}", settings.bucket),
        false => format!("{endpoint}/{prefix}"),
    })
}

/// Whether the server is spoken to without TLS.
fn is_plain(settings: &S3Settings) -> bool {
    settings
        .endpoint
        .as_ref()
        .is_some_and(|url| url.starts_with("http://"))
}

/// The library wants the bucket in the endpoint's host if it goes there.
fn endpoint_of(endpoint: &str, settings: &S3Settings) -> String {
    let endpoint = endpoint.trim_end_matches('/');
    match endpoint.split_once("://") {
        Some((scheme, host)) if !settings.path_style => {
            format!("{scheme}://{}.{host}", settings.bucket)
        }
        _ => endpoint.to_owned(),
    }
}

#[async_trait]
impl Store for S3Store {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        let path = self.path(key)?;
        let asked = Asked {
            operation: Operation::Get,
            key,
        };
        let failed = |error| asked.explain_whole(&error);
        let got = self.inner.get(&path).await.map_err(failed)?;
        if got.meta.size > GET_BYTES_MAX {
            return Err(StoreError::too_large(key));
        }
        let tag = tag(asked, got.meta.e_tag.clone())?;
        let size = got.meta.size;
        let bytes = collect(got, size).await.map_err(failed)?;
        if bytes.len() as u64 != size {
            return Err(asked.unavailable(format!("got {} bytes of {size}", bytes.len())));
        }
        Ok((bytes, tag))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        check_range(key, &range)?;
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        if len <= PLAIN_BYTES_MAX
            && let Some(mut parts) = self.read_plain(key, &range, &[len], 0).await
        {
            return Ok(parts.remove(0));
        }
        let (bytes, _) = self.read(key, range.clone()).await?;
        match bytes.len() as u64 {
            got if got == range.end - range.start || Mutation::TrustShortRead.is_on() => Ok(bytes),
            got => Err(StoreError::wrong_length(key, &range, got)),
        }
    }

    fn has_plain_reads(&self) -> bool {
        self.plain.as_ref().is_some_and(|plain| !plain.is_resting())
    }

    async fn get_parts(
        &self,
        key: &str,
        offset: u64,
        lens: &[usize],
        lead: usize,
    ) -> Result<Vec<Bytes>, StoreError> {
        let range = offset..offset + lens.iter().sum::<usize>() as u64;
        check_range(key, &range)?;
        if let Some(parts) = self.read_plain(key, &range, lens, lead).await {
            return Ok(parts);
        }
        let mut parts = Parts::new(lens, lead);
        if let Some(got) = self.ask(key, range.clone()).await? {
            let mut pieces = got.into_stream();
            while parts.received() <= range.end - range.start
                && let Some(piece) = pieces.try_next().await.map_err(|e| broken_off(key, &e))?
            {
                parts.receive(&piece);
            }
        }
        match parts.received() {
            got if got == range.end - range.start => Ok(parts.into_bytes()),
            got => Err(StoreError::wrong_length(key, &range, got)),
        }
    }

    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        check_range(key, &(0..len))?;
        let (bytes, size) = self.read(key, 0..len).await?;
        let whole = 0..len.min(size);
        match bytes.len() as u64 {
            got if got == whole.end || Mutation::TrustShortRead.is_on() => Ok(bytes),
            got => Err(StoreError::wrong_length(key, &whole, got)),
        }
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        let asked = Asked {
            operation: Operation::Create,
            key,
        };
        self.put(asked, body, PutMode::Create).await
    }

    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        let asked = Asked {
            operation: Operation::Replace,
            key,
        };
        let version = UpdateVersion {
            e_tag: Some(seen.as_str().to_owned()),
            version: None,
        };
        self.put(asked, body, PutMode::Update(version)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key)?;
        let asked = Asked {
            operation: Operation::Delete,
            key,
        };
        let Err(error) = self.inner.delete(&path).await else {
            return Ok(());
        };
        match asked.explain_whole(&error) {
            StoreError::NotFound { .. } => Ok(()),
            error => Err(error),
        }
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let mut keys = self.list_some(prefix, LIST_KEYS_MAX + 1).await?;
        if keys.len() > LIST_KEYS_MAX {
            return Err(StoreError::invalid(prefix, "too many keys to list"));
        }
        keys.sort_unstable();
        Ok(keys)
    }

    async fn list_some(&self, prefix: &str, max: usize) -> Result<Vec<String>, StoreError> {
        self.page(prefix, None, max).await
    }

    async fn list_after(
        &self,
        prefix: &str,
        after: &str,
        max: usize,
    ) -> Result<Vec<String>, StoreError> {
        self.page(prefix, Some(after), max).await
    }

    fn describe(&self) -> String {
        self.description.clone()
    }
}

impl S3Store {
    /// Keys below a prefix, all or those after one of them.
    async fn page(
        &self,
        prefix: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<String>, StoreError> {
        check_list_prefix(prefix)?;
        let asked = Asked {
            operation: Operation::List,
            key: prefix,
        };
        let whole = format!("{}{prefix}", self.prefix);
        let path = |key: &str| {
            let path = Path::parse(key.trim_end_matches('/'));
            path.map_err(|error| StoreError::invalid(prefix, error.to_string()))
        };
        let below = path(&whole)?;
        let failed = |error| asked.explain_whole(&error);
        let mut keys = Vec::new();
        let mut pages = match after {
            None => self.inner.list(Some(&below)),
            Some(after) => {
                let after = path(&format!("{}{after}", self.prefix))?;
                self.inner.list_with_offset(Some(&below), &after)
            }
        };
        let mut last = after.map(str::to_owned);
        while keys.len() < max
            && let Some(meta) = pages.try_next().await.map_err(failed)?
        {
            // What no key can name is not ours.
            let Some(key) = meta.location.as_ref().strip_prefix(&self.prefix) else {
                continue;
            };
            if !key.starts_with(prefix) || check_key(key).is_err() {
                continue;
            }
            if let Some(last) = &mut last {
                // The mark of a folder comes without the slash that gave it its place behind this one.
                if last.starts_with(key) {
                    continue;
                }
                // Who turns pages would never come to an end.
                if !is_behind(key, last) {
                    let reason = "the server does not list from where it was asked";
                    return Err(StoreError::invalid(prefix, reason));
                }
                key.clone_into(last);
            }
            keys.push(key.to_owned());
        }
        Ok(keys)
    }

    /// The parts of a range, asked for on a connection of our own. None: the library is to ask, by whose answer is told what
    /// went wrong.
    async fn read_plain(
        &self,
        key: &str,
        range: &Range<u64>,
        lens: &[usize],
        lead: usize,
    ) -> Option<Vec<Bytes>> {
        let plain = self.plain.as_ref()?;
        let parts = plain.get_parts(key, range.clone(), lens, lead).await;
        if parts.is_err() {
            errand::elsewhere().await;
        }
        parts.ok()
    }

    /// What came of a range, and the object's size: nothing, and 0, if the object ends before it begins.
    async fn read(&self, key: &str, range: Range<u64>) -> Result<(Bytes, u64), StoreError> {
        let Some(got) = self.ask(key, range.clone()).await? else {
            return Ok((Bytes::new(), 0));
        };
        let size = got.meta.size;
        match collect(got, range.end - range.start).await {
            Ok(bytes) => Ok((bytes, size)),
            Err(error) => Err(broken_off(key, &error)),
        }
    }

    /// The beginning of an answer with these bytes; none if the object ends before they begin.
    async fn ask(&self, key: &str, range: Range<u64>) -> Result<Option<GetResult>, StoreError> {
        let path = self.path(key)?;
        let asked = Asked {
            operation: Operation::GetRange,
            key,
        };
        let options = GetOptions {
            range: Some(GetRange::Bounded(range.clone())),
            ..GetOptions::default()
        };
        let got = match self.inner.get_opts(&path, options).await {
            Ok(got) => got,
            Err(error) => return asked.explain(&error).map_or(Ok(None), Err),
        };
        if got.range.start != range.start {
            return Err(asked.unavailable(format!("got bytes from {} on", got.range.start)));
        }
        Ok(Some(got))
    }
}

/// Whether a listing that is in order has `key` behind `other`: by their bytes, or part by part, as servers do that keep
/// objects in folders.
fn is_behind(key: &str, other: &str) -> bool {
    key > other || key.split('/').gt(other.split('/'))
}

/// An answer that began well was not whole.
fn broken_off(key: &str, error: &object_store::Error) -> StoreError {
    let asked = Asked {
        operation: Operation::GetRange,
        key,
    };
    let explained = asked.explain(error);
    explained.unwrap_or_else(|| asked.unavailable("the answer ended early"))
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("S3Store").field(&self.description).finish()
    }
}

/// The answer's body: all of it, or so much that it is more than `max`.
async fn collect(got: GetResult, max: u64) -> object_store::Result<Bytes> {
    let mut stream = got.into_stream();
    // A body in one piece is not copied.
    let first = stream.try_next().await?.unwrap_or_default();
    if first.len() as u64 > max {
        return Ok(first);
    }
    let Some(second) = stream.try_next().await? else {
        return Ok(first);
    };
    let mut bytes = BytesMut::with_capacity(usize::try_from(max).unwrap_or_default());
    bytes.extend_from_slice(&first);
    bytes.extend_from_slice(&second);
    while bytes.len() as u64 <= max
        && let Some(more) = stream.try_next().await?
    {
        bytes.extend_from_slice(&more);
    }
    Ok(bytes.freeze())
}

fn tag(asked: Asked<'_>, e_tag: Option<String>) -> Result<Tag, StoreError> {
    match e_tag {
        Some(e_tag) => Ok(Tag::new(&e_tag)),
        None => Err(StoreError::invalid(asked.key, "the server gives no ETag")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use object_store::memory::InMemory;
    use quarry_config::UploadCheck;

    use super::*;
    use crate::store::contract;
    use crate::store::stub::{Answer, stub_store};

    /// The adapter over a store in memory.
    pub(crate) fn in_memory(prefix: &str) -> S3Store {
        S3Store::over(Arc::new(InMemory::new()), prefix, "memory".to_owned())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn adapter_over_memory_keeps_the_contract() {
        contract::run(Arc::new(in_memory("some/prefix"))).await;
        contract::run(Arc::new(in_memory(""))).await;
    }

    #[tokio::test]
    async fn prefix_hides_what_is_outside() {
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let store = |prefix| S3Store::over(Arc::clone(&memory), prefix, String::new());
        store("a").create("x/1", Bytes::new()).await.unwrap();
        store("ab").create("x/2", Bytes::new()).await.unwrap();
        assert_eq!(store("a").list("").await.unwrap(), ["x/1"]);
        assert_eq!(store("").list("").await.unwrap(), ["a/x/1", "ab/x/2"]);
        assert!(store("a").get("x/2").await.is_err());
    }

    /// A server whose listings are these keys, wherever they are to begin.
    async fn listing(keys: &[&str]) -> S3Store {
        let contents = keys.iter().map(|key| {
            format!(
                "<Contents><Key>some/prefix/{key}</Key><LastModified>2026-11-23T00:00:00.000Z</LastModified>\
                 <ETag>\"t\"</ETag><Size>1</Size></Contents>"
            )
        });
        let contents: String = contents.collect();
        let body = format!("<ListBucketResult>{contents}</ListBucketResult>");
        stub_store(Answer::new(200, &body)).await
    }

    /// Whoever went through the pages of such a server got the first one again and again.
    #[tokio::test]
    async fn listing_that_does_not_begin_where_it_was_asked_to_is_refused() {
        let store = listing(&["t/a", "t/b"]).await;
        assert_eq!(
            store.list_after("t/", "t/", 2).await.unwrap(),
            ["t/a", "t/b"]
        );
        let again = store.list_after("t/", "t/b", 2).await.unwrap_err();
        assert!(matches!(again, StoreError::Invalid { .. }), "{again:?}");
        assert!(again.to_string().contains("does not list from"), "{again}");
        // Nothing turns the pages of these.
        assert_eq!(store.list_some("t/", 1).await.unwrap(), ["t/a"]);
        let store = listing(&["t/b", "t/c", "t/a"]).await;
        assert!(store.list_after("t/", "t/", 3).await.is_err());
        assert_eq!(store.list("t/").await.unwrap(), ["t/a", "t/b", "t/c"]);
    }

    #[tokio::test]
    async fn listing_in_the_order_of_folders_or_with_their_marks_is_one_in_order() {
        let store = listing(&["t/x/1", "t/x-1"]).await;
        let all = store.list_after("t/", "t/", 9).await.unwrap();
        assert_eq!(all, ["t/x/1", "t/x-1"]);
        let store = listing(&["t/x-1", "t/x/", "t/x/1"]).await;
        let all = store.list_after("t/", "t/", 9).await.unwrap();
        assert_eq!(all, ["t/x-1", "t/x/1"]);
    }

    #[test]
    fn endpoint_has_the_bucket_in_its_host_only_if_asked_for() {
        let settings = |path_style| S3Settings {
            bucket: "b".to_owned(),
            prefix: String::new(),
            endpoint: None,
            region: "r".to_owned(),
            keys: None,
            session_token: None,
            source: None,
            path_style,
            upload_check: UploadCheck::Auto,
        };
        assert_eq!(endpoint_of("https://h:1/", &settings(true)), "https://h:1");
        assert_eq!(
            endpoint_of("https://h:1/", &settings(false)),
            "https://b.h:1"
        );
    }
}
