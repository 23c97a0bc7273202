//! The S3 server of the benchmarks: objects in memory, and as little work as can be, so that it is not what is measured.
//!
//! Owns: buckets and objects, for as long as it runs. Does not own: the protocol and its signatures (crate `s3s`).
//!
//! **Invariant:** what an object is, is changed under one lock with its condition: of two that create, one does.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::{Bound, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{Bytes, BytesMut};
use crc_fast::CrcAlgorithm;
use futures::{StreamExt as _, stream};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use quarry_full_volume::{CHUNK_BYTES, HEADER_BYTES, chunk_of_key, read_frames};
use s3s::auth::SimpleAuth;
use s3s::dto::*;
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use tokio::net::TcpListener;

/// The bucket of all that is measured.
pub const BUCKET: &str = "bench";
pub const ACCESS_KEY: &str = "bench";
pub const SECRET_KEY: &str = "not-a-secret";
/// What makes the C library keep memory that was freed, all in one heap: see [`page_in`].
pub const MALLOC: [(&str, &str); 3] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("MALLOC_TRIM_THRESHOLD_", "1099511627776"),
];
/// In how large pieces an object goes out.
const PIECE: usize = 256 << 10;
/// The most that a listing answers at once, as S3's.
const LISTED_MAX: usize = 1000;

#[derive(Clone)]
struct Object {
    bytes: Bytes,
    tag: ETag,
    modified: Timestamp,
}

impl Object {
    /// What is there of one whose bytes are made up when they are asked for.
    fn made_up() -> Self {
        Self {
            bytes: Bytes::new(),
            tag: ETag::Strong("made-up".to_owned()),
            modified: SystemTime::UNIX_EPOCH.into(),
        }
    }
}

#[derive(Default)]
struct State {
    /// By bucket and key.
    objects: BTreeMap<(String, String), Object>,
    buckets: BTreeMap<String, Timestamp>,
    /// By upload: its parts.
    uploads: BTreeMap<String, BTreeMap<i32, Bytes>>,
}

/// What clients did.
#[derive(Default)]
struct Counts {
    puts: AtomicU64,
    gets: AtomicU64,
    others: AtomicU64,
    put_bytes: AtomicU64,
    got_bytes: AtomicU64,
}

/// All buckets. Cheap to clone: all clones are one store.
#[derive(Clone, Default)]
pub struct Memory {
    state: Arc<Mutex<State>>,
    counts: Arc<Counts>,
    next: Arc<AtomicU64>,
    /// Before each answer.
    delay: Duration,
    /// Chunks that are not there are made up.
    making_up: bool,
}

impl Memory {
    /// One with an empty [`BUCKET`], that waits for so long before each answer.
    pub fn new(delay: Duration, making_up: bool) -> Self {
        let memory = Self {
            delay,
            making_up,
            ..Self::default()
        };
        let now = SystemTime::now().into();
        memory.state().buckets.insert(BUCKET.to_owned(), now);
        memory
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tag(&self) -> ETag {
        ETag::Strong(format!(
            "{:032x}",
            self.next.fetch_add(1, Ordering::Relaxed) + 1
        ))
    }

    async fn pause(&self, count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
    }

    /// Since the start: PUTs (parts too), GETs, other requests, bytes put, bytes got.
    pub fn counted(&self) -> [u64; 5] {
        let counts = &*self.counts;
        [
            &counts.puts,
            &counts.gets,
            &counts.others,
            &counts.put_bytes,
            &counts.got_bytes,
        ]
        .map(|count| count.load(Ordering::Relaxed))
    }

    /// Makes the object, if what is there is as the conditions say.
    fn put(
        &self,
        name: (String, String),
        bytes: Bytes,
        if_match: Option<&ETagCondition>,
        if_none_match: Option<&ETagCondition>,
    ) -> S3Result<ETag> {
        let mut state = self.state();
        if !state.buckets.contains_key(&name.0) {
            return Err(s3_error!(NoSuchBucket));
        }
        let there = state.objects.get(&name).map(|object| &object.tag);
        let is_met = |condition: &ETagCondition| match (condition, there) {
            (_, None) => false,
            (ETagCondition::Any, Some(_)) => true,
            (ETagCondition::ETag(wanted), Some(tag)) => wanted.value() == tag.value(),
        };
        if if_match.is_some_and(|c| !is_met(c)) || if_none_match.is_some_and(is_met) {
            return Err(s3_error!(PreconditionFailed));
        }
        let object = Object {
            bytes,
            tag: self.tag(),
            modified: SystemTime::now().into(),
        };
        let tag = object.tag.clone();
        state.objects.insert(name, object);
        Ok(tag)
    }

    fn find(&self, bucket: String, key: String) -> S3Result<Object> {
        let found = self.state().objects.get(&(bucket, key)).cloned();
        found.ok_or_else(|| s3_error!(NoSuchKey))
    }
}

async fn collect(body: Option<StreamingBlob>, len: Option<i64>) -> S3Result<Bytes> {
    let Some(mut body) = body else {
        return Ok(Bytes::new());
    };
    let len = len.and_then(|len| usize::try_from(len).ok()).unwrap_or(0);
    let mut bytes = BytesMut::with_capacity(len);
    while let Some(piece) = body.next().await {
        bytes.extend_from_slice(&piece.map_err(|_| s3_error!(IncompleteBody))?);
    }
    Ok(bytes.freeze())
}

/// Has `mib` MiB of memory from the kernel before anything is measured. Else each object would be put into pages that the kernel
/// zeroes first, which took a fifth of two processors beside random writes: more than all else that the store does.
pub fn page_in(mib: u64) {
    drop(
        (0..mib / 8)
            .map(|_| vec![1_u8; 8 << 20])
            .collect::<Vec<_>>(),
    );
}

/// That a body is what its header says, if there is one.
#[expect(clippy::big_endian_bytes, reason = "the header's order")]
fn check_crc(bytes: &Bytes, told: Option<&str>) -> S3Result<()> {
    let crc = || crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes).to_be_bytes();
    match told {
        Some(told) if told != BASE64_STANDARD.encode(crc()) => Err(s3_error!(BadDigest)),
        _ => Ok(()),
    }
}

fn pieces(bytes: Bytes) -> StreamingBlob {
    let pieces = stream::unfold(bytes, |mut left| async move {
        let piece = left.split_to(left.len().min(PIECE));
        (!piece.is_empty()).then_some((Ok::<_, std::io::Error>(piece), left))
    });
    StreamingBlob::wrap(pieces)
}

fn length(bytes: &Bytes) -> i64 {
    i64::try_from(bytes.len()).unwrap_or(i64::MAX)
}

#[async_trait]
impl S3 for Memory {
    async fn create_bucket(
        &self,
        request: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        let now = SystemTime::now().into();
        self.state().buckets.insert(request.input.bucket, now);
        Ok(S3Response::new(CreateBucketOutput::default()))
    }

    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        if !self.state().buckets.contains_key(&request.input.bucket) {
            return Err(s3_error!(NoSuchBucket));
        }
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_bucket_location(
        &self,
        _: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        Ok(S3Response::new(GetBucketLocationOutput::default()))
    }

    async fn put_object(
        &self,
        request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let input = request.input;
        let bytes = collect(input.body, input.content_length).await?;
        check_crc(&bytes, input.checksum_crc64nvme.as_deref())?;
        self.pause(&self.counts.puts).await;
        self.counts
            .put_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let (if_match, if_none_match) = (input.if_match.as_ref(), input.if_none_match.as_ref());
        let tag = self.put((input.bucket, input.key), bytes, if_match, if_none_match)?;
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(tag),
            ..PutObjectOutput::default()
        }))
    }

    async fn get_object(
        &self,
        request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        self.pause(&self.counts.gets).await;
        let made_up = chunk_of_key(&input.key).filter(|_| self.making_up);
        let found = self.find(input.bucket, input.key);
        let (object, made_up) = match (found, made_up) {
            (Ok(object), _) => (object, None),
            (Err(error), None) => return Err(error),
            (Err(_), chunk) => (Object::made_up(), chunk),
        };
        let whole = made_up.map_or(object.bytes.len() as u64, |_| CHUNK_BYTES);
        let range = input.range.map(|range| range.check(whole)).transpose()?;
        let told = |range: &Range<u64>| format!("bytes {}-{}/{whole}", range.start, range.end - 1);
        let content_range = range.as_ref().map(told);
        let range = range.unwrap_or(0..whole);
        let bytes = match made_up {
            Some(chunk) => read_frames(chunk, range, HEADER_BYTES, CHUNK_BYTES)
                .ok_or_else(|| s3_error!(NoSuchKey))?
                .into(),
            None => {
                let at = |byte| usize::try_from(byte).unwrap_or(object.bytes.len());
                object.bytes.slice(at(range.start)..at(range.end))
            }
        };
        self.counts
            .got_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(S3Response::new(GetObjectOutput {
            content_length: Some(length(&bytes)),
            content_range,
            body: Some(pieces(bytes)),
            e_tag: Some(object.tag),
            last_modified: Some(object.modified),
            ..GetObjectOutput::default()
        }))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        self.pause(&self.counts.others).await;
        let object = self.find(request.input.bucket, request.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(length(&object.bytes)),
            e_tag: Some(object.tag),
            last_modified: Some(object.modified),
            ..HeadObjectOutput::default()
        }))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.pause(&self.counts.others).await;
        let input = request.input;
        self.state().objects.remove(&(input.bucket, input.key));
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        self.pause(&self.counts.others).await;
        let input = request.input;
        let mut state = self.state();
        let mut deleted = Vec::new();
        for object in input.delete.objects {
            state
                .objects
                .remove(&(input.bucket.clone(), object.key.clone()));
            deleted.push(DeletedObject {
                key: Some(object.key),
                ..DeletedObject::default()
            });
        }
        Ok(S3Response::new(DeleteObjectsOutput {
            deleted: Some(deleted),
            ..DeleteObjectsOutput::default()
        }))
    }

    async fn copy_object(
        &self,
        request: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        self.pause(&self.counts.others).await;
        let input = request.input;
        let CopySource::Bucket { bucket, key, .. } = input.copy_source else {
            return Err(s3_error!(NotImplemented));
        };
        let object = self.find(bucket.into(), key.into())?;
        let tag = self.put((input.bucket, input.key), object.bytes, None, None)?;
        Ok(S3Response::new(CopyObjectOutput {
            copy_object_result: Some(CopyObjectResult {
                e_tag: Some(tag),
                ..CopyObjectResult::default()
            }),
            ..CopyObjectOutput::default()
        }))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        self.pause(&self.counts.others).await;
        let input = request.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let max = input.max_keys.and_then(|max| usize::try_from(max).ok());
        let max = max.unwrap_or(LISTED_MAX).min(LISTED_MAX);
        let after = input
            .continuation_token
            .clone()
            .or(input.start_after.clone());
        let state = self.state();
        let from = match &after {
            Some(after) if *after >= prefix => {
                Bound::Excluded((input.bucket.clone(), after.clone()))
            }
            _ => Bound::Included((input.bucket.clone(), prefix.clone())),
        };
        // Keys, and what several have in common up to the delimiter, in one order.
        let (mut listed, mut is_truncated) = (Vec::<(String, Option<Object>)>::new(), false);
        for ((bucket, key), object) in state.objects.range((from, Bound::Unbounded)) {
            if *bucket != input.bucket || !key.starts_with(&prefix) {
                break;
            }
            let folded = input.delimiter.as_ref().and_then(|delimiter| {
                let end = key[prefix.len()..].find(delimiter.as_str())? + delimiter.len();
                Some(key[..prefix.len() + end].to_owned())
            });
            let is_told = |folded: &String| {
                after.as_ref() == Some(folded)
                    || listed.last().is_some_and(|(last, _)| last == folded)
            };
            if folded.as_ref().is_some_and(is_told) {
                continue;
            }
            if listed.len() == max {
                is_truncated = true;
                break;
            }
            listed.push(match folded {
                Some(folded) => (folded, None),
                None => (key.clone(), Some(object.clone())),
            });
        }
        drop(state);
        let next = listed.last().map(|(last, _)| last.clone());
        let count = listed.len();
        let (mut contents, mut common) = (Vec::new(), Vec::new());
        for (name, object) in listed {
            match object {
                None => common.push(CommonPrefix { prefix: Some(name) }),
                Some(object) => contents.push(s3s::dto::Object {
                    key: Some(name),
                    size: Some(length(&object.bytes)),
                    e_tag: Some(object.tag),
                    last_modified: Some(object.modified),
                    ..s3s::dto::Object::default()
                }),
            }
        }
        Ok(S3Response::new(ListObjectsV2Output {
            key_count: i32::try_from(count).ok(),
            max_keys: i32::try_from(max).ok(),
            is_truncated: Some(is_truncated),
            next_continuation_token: next.filter(|_| is_truncated),
            contents: Some(contents),
            common_prefixes: Some(common),
            name: Some(input.bucket),
            prefix: Some(prefix),
            delimiter: input.delimiter,
            ..ListObjectsV2Output::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.pause(&self.counts.others).await;
        let id = format!("{:016x}", self.next.fetch_add(1, Ordering::Relaxed));
        self.state().uploads.insert(id.clone(), BTreeMap::new());
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(request.input.bucket),
            key: Some(request.input.key),
            upload_id: Some(id),
            ..CreateMultipartUploadOutput::default()
        }))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let input = request.input;
        let bytes = collect(input.body, input.content_length).await?;
        self.pause(&self.counts.puts).await;
        self.counts
            .put_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let tag = self.tag();
        let mut state = self.state();
        let upload = state.uploads.get_mut(&input.upload_id);
        upload
            .ok_or_else(|| s3_error!(NoSuchUpload))?
            .insert(input.part_number, bytes);
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(tag),
            ..UploadPartOutput::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        self.pause(&self.counts.others).await;
        let input = request.input;
        let parts = self.state().uploads.remove(&input.upload_id);
        let parts = parts.ok_or_else(|| s3_error!(NoSuchUpload))?;
        let whole: Vec<Bytes> = parts.into_values().collect();
        let (if_match, if_none_match) = (input.if_match.as_ref(), input.if_none_match.as_ref());
        let name = (input.bucket.clone(), input.key.clone());
        let tag = self.put(name, whole.concat().into(), if_match, if_none_match)?;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(tag),
            ..CompleteMultipartUploadOutput::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.state().uploads.remove(&request.input.upload_id);
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }
}

/// Serves `memory` on a loopback port, for ever.
///
/// # Errors
/// If no port can be had.
pub async fn serve(memory: Memory, ready: impl FnOnce(SocketAddr)) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let mut service = S3ServiceBuilder::new(memory);
    service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
    let service = service.build();
    ready(listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        // A small answer at once, not with the next one.
        stream.set_nodelay(true)?;
        let service = service.clone();
        tokio::spawn(async move {
            let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // One that breaks is its client's matter.
            drop(connection.await);
        });
    }
}
