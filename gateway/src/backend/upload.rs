//! Uploads: a chunk is made of what the cache device has, and stored, however long that takes.
//!
//! Invariant: what cannot be sent stays unsent in the cache, and is tried again for as long as the volume is attached,
//! unless another writer's object is in the chunk's place, or a sync of the cache device failed.

use std::sync::Arc;
use std::time::Duration;

use quarry_cache::{AlignedBuf, BlockDevice, Branch};
use quarry_objfmt::chunk::{
    ChunkExtent, ChunkHeader, ChunkParams, EncodedChunk, ExtentBody, encode_chunk_in,
};
use quarry_objfmt::codec::Compression;
use quarry_objfmt::{ChunkId, DataKey, DataKeys, VolumeId, WriteSeq, keys};
use quarry_volume::{ChunkPlan, ExtentSource, PlannedExtent, Report};
use tokio::sync::watch;

use super::open::{Entry, log_place};
use super::{Buffers, VolumeBackend, aside};
use crate::kept_writes::{KeptWrites, Part};
use crate::store::StoreError;
use crate::trace::{self, Step};

/// What begins the problem of a cache device from which unsent data cannot be read.
pub(super) const UNREADABLE: &str = "unsent data cannot be read from the cache device";

/// What begins the problem of a store that takes no chunks.
const REFUSED: &str = "the store takes no chunks";

/// Between tries to store a chunk that the store refuses.
const REFUSED_RETRY_DELAY: Duration = Duration::from_secs(10);

/// So many tries to read unsent data from a cache device that fails, and nobody waits any more for their being sent.
const STUCK_AFTER: usize = 2;

/// Between tries to read unsent data from a cache device that fails.
pub(super) const READ_RETRY_DELAY: Duration = Duration::from_secs(10);

impl VolumeBackend {
    /// Makes the chunk and stores it, however long that takes. Answers its header and bytes.
    ///
    /// The order: the data are on the cache device and stay there until the chunk is committed.
    /// *Crash before the PUT, or with it under way: the writes are still unsent, or replay finds
    /// the chunk; its `last_write` then says what the cache need not send again.*
    pub(super) async fn upload(
        &self,
        plan: &ChunkPlan,
        cut_ms: u64,
    ) -> Result<(ChunkHeader, u64), NotSent> {
        let mut stuck = None;
        loop {
            let waiting = trace::open(Step::UploadPlace, None);
            let place = self.common.uploads.enter(&self.common.share).await;
            drop(waiting);
            let tried = self.try_to_upload(plan, cut_ms, &mut stuck).await;
            // Others need not wait while nothing is done in it.
            drop(place);
            let delay = match tried {
                Ok(stored) => return Ok(stored),
                Err(Failed::Over(why)) => return Err(why),
                // The writes stay unsent and the volume serves on: an operator can still save them.
                Err(Failed::Unreadable { errno }) => {
                    Branch::UploadReadFailed.taken();
                    self.report(Report::Unreadable { errno });
                    stuck.get_or_insert_with(|| Stuck::of(&self.stuck)).tried();
                    READ_RETRY_DELAY
                }
                // Nothing that waiting alone mends (a proxy that takes no large objects, say), but
                // somebody can mend it, and the writes are safe in the cache until then.
                Err(Failed::Refused { problem }) => {
                    self.problem(problem);
                    REFUSED_RETRY_DELAY
                }
            };
            tokio::time::sleep(delay).await;
        }
    }

    /// As [`VolumeBackend::upload`], once. It is not `stuck` any more when its data could be read.
    async fn try_to_upload(
        &self,
        plan: &ChunkPlan,
        cut_ms: u64,
        stuck: &mut Option<Stuck<'_>>,
    ) -> Result<(ChunkHeader, u64), Failed> {
        let encoded = self.encode(plan, cut_ms).await?;
        *stuck = None;
        self.over(UNREADABLE);
        let object = keys::chunk_key(self.head.tenant(), plan.id);
        let stored_bytes = encoded.bytes.len() as u64;
        let store = &self.common.background;
        let header = match store.create(&object, encoded.bytes).await {
            Ok(_) => encoded.header,
            Err(StoreError::Exists { .. }) => match self.settle_existing(plan).await {
                Ok(Existing::Ours(header)) => header,
                Ok(Existing::NewerWriter(by)) => return Err(NotSent::Fenced { by }.into()),
                // Not to be guessed: a fence is for good.
                Err(reason) => {
                    let problem =
                        format!("{object} is there already, and cannot be read: {reason}");
                    return Err(Failed::Refused { problem });
                }
            },
            Err(error) => {
                let problem = format!("{REFUSED}: {error}");
                return Err(Failed::Refused { problem });
            }
        };
        self.over(REFUSED);
        Ok((header, stored_bytes))
    }

    /// Makes a chunk of what the cache device has.
    async fn encode(&self, plan: &ChunkPlan, cut_ms: u64) -> Result<EncodedChunk, Failed> {
        let (device, plan) = (Arc::clone(&self.common.device), plan.clone());
        let how = self.how(cut_ms);
        let _encoding = trace::open(Step::Encode, None);
        let buffers = self.common.buffers.clone();
        let kept = Arc::clone(&self.common.kept_writes);
        let has_cache = Arc::clone(&self.has_cache).read_owned().await;
        if !*has_cache {
            return Err(NotSent::Gone.into());
        }
        let encode = move || {
            let made = make_chunk(&*device, &kept, &plan, &how, &buffers);
            drop(has_cache);
            made
        };
        let made = aside(encode).await;
        made.expect("encoding does not panic")
    }

    /// Something is at our key already: our own chunk, whose first answer was lost, or a seal.
    async fn settle_existing(&self, plan: &ChunkPlan) -> Result<Existing, String> {
        let store = &*self.common.background;
        let there = log_place(store, self.head.tenant(), plan.id).await;
        match there.map_err(|error| error.to_string())?? {
            Some(Entry::Chunk(header))
                if header.first_write == plan.first_write
                    && header.last_write == plan.last_write
                    && has_extents_of(&header, plan) =>
            {
                Branch::ChunkThere.taken();
                Ok(Existing::Ours(header))
            }
            Some(Entry::Seal(seal)) => {
                Branch::SealMet.taken();
                let by = quarry_objfmt::printable(&seal.by_host);
                Ok(Existing::NewerWriter(by))
            }
            Some(Entry::Chunk(_)) => Ok(Existing::NewerWriter("an unknown writer".to_owned())),
            None => Err("the store says that it exists, and that it does not".to_owned()),
        }
    }

    /// How a chunk is made that is cut at `cut_ms`.
    pub(super) fn how(&self, cut_ms: u64) -> How {
        How {
            volume: self.volume,
            cut_ms,
            frame_sectors: self.head.frame_sectors(),
            compression: self.head.compression(),
            keys: self.keys(),
        }
    }
}

/// Whose object is where a chunk was to be.
enum Existing {
    Ours(ChunkHeader),
    NewerWriter(String),
}

/// Whether a chunk covers what was planned, and nothing else.
fn has_extents_of(header: &ChunkHeader, plan: &ChunkPlan) -> bool {
    let planned = plan.extents.iter();
    let same = |(there, planned): (&ChunkExtent, &PlannedExtent)| {
        let kind = matches!(
            (there.body, planned.source),
            (ExtentBody::Data { .. }, ExtentSource::Cache { .. })
                | (ExtentBody::Zero, ExtentSource::Zero)
                | (ExtentBody::Discard, ExtentSource::Discard)
        );
        let len = u64::from(there.len);
        kind && there.start == planned.range.start && len == planned.range.len().get()
    };
    header.extents.len() == plan.extents.len() && header.extents.iter().zip(planned).all(same)
}

/// Why a chunk is not in the store, and not tried again.
#[derive(Debug)]
pub(super) enum NotSent {
    /// The volume is gone: what it had not sent stays in the cache.
    Gone,
    /// Another's object is in its place.
    Fenced { by: String },
    /// A sync of the cache device failed.
    Untrusted { errno: i32 },
}

/// Why a try to send a chunk came to nothing.
enum Failed {
    /// The next one would, too.
    Over(NotSent),
    /// The cache device cannot be read there.
    Unreadable { errno: i32 },
    /// The store does not take it.
    Refused { problem: String },
}

impl From<NotSent> for Failed {
    fn from(why: NotSent) -> Self {
        Self::Over(why)
    }
}

/// An upload whose data cannot be read, counted from its second try on among those of its volume.
struct Stuck<'a> {
    all: &'a watch::Sender<usize>,
    tries: usize,
}

impl<'a> Stuck<'a> {
    const fn of(all: &'a watch::Sender<usize>) -> Self {
        Self { all, tries: 0 }
    }

    fn tried(&mut self) {
        self.tries += 1;
        if self.tries == STUCK_AFTER {
            self.all.send_modify(|all| *all += 1);
        }
    }
}

impl Drop for Stuck<'_> {
    fn drop(&mut self) {
        if self.tries >= STUCK_AFTER {
            self.all.send_modify(|all| *all -= 1);
        }
    }
}

/// How a volume's chunks are made.
pub(super) struct How {
    volume: VolumeId,
    cut_ms: u64,
    frame_sectors: u32,
    compression: Compression,
    keys: Option<Arc<DataKeys>>,
}

impl How {
    /// What makes a chunk of that name, of these writes.
    pub(super) fn params(
        &self,
        id: ChunkId,
        first_write: WriteSeq,
        last_write: WriteSeq,
    ) -> ChunkParams<'_> {
        ChunkParams {
            id,
            first_write,
            last_write,
            cut_ms: self.cut_ms,
            frame_sectors: self.frame_sectors,
            compression: self.compression,
            key: self.key(),
        }
    }

    /// The key that a chunk which is made now is encrypted with.
    ///
    /// # Panics
    /// If the volume is encrypted and has none of its own.
    fn key(&self) -> Option<&DataKey> {
        let keys = self.keys.as_ref()?;
        let own = keys.newest(self.volume);
        Some(own.expect("an encrypted volume has a key of its own"))
    }
}

/// Reads the plan's data from the cache device and encodes the chunk. Blocking.
///
/// # Errors
/// [`Failed::Unreadable`], [`NotSent::Untrusted`]
fn make_chunk(
    device: &dyn BlockDevice,
    kept: &KeptWrites,
    plan: &ChunkPlan,
    how: &How,
    buffers: &Buffers,
) -> Result<EncodedChunk, Failed> {
    let mut extents = Vec::with_capacity(plan.extents.len());
    let mut raw_sectors = 0;
    for extent in &plan.extents {
        let len = u32::try_from(extent.range.len().get()).expect("a chunk's runs are short");
        let body = match extent.source {
            ExtentSource::Cache { .. } => {
                let raw = raw_sectors;
                raw_sectors += len;
                ExtentBody::Data { raw }
            }
            ExtentSource::Zero => ExtentBody::Zero,
            ExtentSource::Discard => ExtentBody::Discard,
        };
        extents.push(ChunkExtent {
            start: extent.range.start,
            len,
            body,
        });
    }
    let runs = || {
        let run = |extent: &PlannedExtent| match extent.source {
            ExtentSource::Cache { offset } => Some(offset..offset + extent.range.len().bytes()),
            ExtentSource::Zero | ExtentSource::Discard => None,
        };
        plan.extents.iter().filter_map(run)
    };
    let parts = kept.find(runs());
    let missing = |part: &Part| match part {
        Part::Kept { .. } => 0,
        Part::Missing(run) => usize::try_from(run.end - run.start).expect("a chunk is short"),
    };
    let mut read = buffers.raw(parts.iter().map(missing).sum());
    let mut at = 0;
    for part in &parts {
        if let Part::Missing(run) = part {
            let len = missing(part);
            let done = device.read_data(&mut read, at..at + len, run.start);
            done.map_err(|error| Failed::Unreadable {
                errno: errno_of(&error),
            })?;
            at += len;
        }
    }
    // After the reads: what a sync that failed meanwhile lost is in none of them.
    if at > 0 {
        let trusted = device.trusted();
        trusted.map_err(|error| NotSent::Untrusted {
            errno: errno_of(&error),
        })?;
    }
    debug_assert!(
        device.trusted().is_err() || parts.iter().all(|part| is_on_device(device, part)),
        "what is kept of a chunk's data is not what the cache device has"
    );
    let mut unused = &read[..];
    let pieces: Vec<&[u8]> = parts
        .iter()
        .map(|part| match part {
            Part::Kept { data, .. } => &data[..],
            Part::Missing(_) => {
                let len = missing(part);
                unused.split_off(..len).expect("so many were read")
            }
        })
        .collect();
    let params = how.params(plan.id, plan.first_write, plan.last_write);
    let (out, start, header) = encode_chunk_in(buffers.encoded(), &params, &extents, &pieces);
    drop(pieces);
    buffers.give_raw(read);
    kept.forget(runs());
    let bytes = buffers.lend(out, start);
    Ok(EncodedChunk { bytes, header })
}

fn errno_of(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Whether a part that is kept is what the device has there, as far as it can be read.
fn is_on_device(device: &dyn BlockDevice, part: &Part) -> bool {
    let Part::Kept { at, data } = part else {
        return true;
    };
    let mut there = AlignedBuf::zeroed(data.len());
    let read = device.read_data(&mut there, 0..data.len(), *at);
    read.is_err() || there[..] == **data
}
