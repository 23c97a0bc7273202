//! Attaching: taking the right to write, finding the end of the log, and only then serving.
//!
//! The order, and what a crash between the steps leaves:
//! 1. Raise the epoch in `head`, with us as the owner. *Crash: the volume is ours and nobody
//!    serves it; we attach again, others need `--force`.*
//! 2. Find the end of the last log range: its first missing chunk. Put a seal there, create-only:
//!    either the old writer's chunk is there first and belongs to the log, or the seal is and the
//!    old writer's PUT fails, which tells it that it is fenced. *Crash: the seal stays; whoever
//!    attaches next finds the same end.*
//! 3. Record the end in `head`, and a range for our epoch. *Crash before: the range is still open,
//!    under its old epoch; step 2 is done anew.*
//! 4. Serve.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use quarry_cache::{Branch, CutError, Mutation, Recovered};
use quarry_objfmt::FormatError;
use quarry_objfmt::chunk::{CHUNK_PREFIX_LEN, ChunkHeader, LogObject, Seal, classify, encode_seal};
use quarry_objfmt::head::{Head, Lineage, LogRange, Owner, RootRef};
use quarry_objfmt::map::{Manifest, MapObjectId, Usage};
use quarry_objfmt::{
    CacheId, ChunkId, ChunkSeq, DataKeys, Epoch, MapEntry, SnapName, TenantName, VolumeId,
    WriteSeq, keys,
};
use quarry_volume::map::MapRoot;
use quarry_volume::{LOG_CHUNK_ENTRIES, LOG_REPLAY_MAX};

use super::head::{HeadCell, HeadError, Replaced, fenced, missing, replace};
use super::objects::{LogChunk, Objects};
use super::sound::{self, Unsound};
use crate::moment::Moment;
use crate::store::{Store, StoreError, Tag, get_long};

/// Bytes of a chunk asked for when its header is wanted: most headers are shorter.
pub(crate) const HEADER_GUESS: u64 = 64 << 10;

/// How often a volume that is being written elsewhere is opened again for reading, if what its head named
/// was gone.
pub(super) const REOPENS_MAX: u32 = 3;

/// How often a head is raised anew that is ours and was changed meanwhile: each time, a change that was given up for want of an
/// answer took effect after all, and of those there is hardly ever more than one.
const RAISES_MAX: u32 = 4;

/// Chunks of the log looked at side by side.
pub(super) const REPLAY_CONCURRENCY: usize = 16;

/// Most that a log has, in entries, each chunk counted as [`LOG_CHUNK_ENTRIES`] more: what is written at most beside it, the unsent
/// writes that come in addition, and twice that, for extents and frames are counted apart here. So few in tests that they reach it.
const LOG_ENTRIES_MAX: u64 = if cfg!(test) {
    1 << 16
} else {
    4 * LOG_REPLAY_MAX
};

/// Why a volume cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Somebody else has it.
    #[error(
        "the volume is attached by host {host} (since {since}); detach it there, or take it over with --force if that host is lost"
    )]
    Owned {
        /// The owner's host.
        host: String,
        /// Since when, for people.
        since: String,
    },
    /// It is not this host's any more, as it was to be.
    #[error("the volume was taken from this host, or detached from it")]
    Taken,
    /// It was deleted, though it still has its name.
    #[error(
        "the volume was deleted: `quarry volume restore` brings it back from the trash, unless it is being purged"
    )]
    Deleted,
    /// The cache has writes that the store's volume went on without.
    #[error(
        "the cache on this host holds up to {bytes} bytes written to this volume up to epoch {epoch} that may never have been \
         sent, and the volume has since been written elsewhere; they cannot be merged: attach with --discard-unsent to give them up"
    )]
    Stale {
        /// How much at most: which of it was sent, nobody knows any more.
        bytes: u64,
        /// Of when.
        epoch: Epoch,
    },
    /// The cache has not all that it had made durable.
    #[error(
        "write {missing} of this volume is missing, and all up to {durable} were flushed: the cache device of this host has lost \
         it, or the store, if objects were deleted or put back there; what came before it is whole: attach with --discard-lost to \
         go on with that"
    )]
    Lost {
        /// The first that is not there.
        missing: WriteSeq,
        /// The newest that is known to have been there.
        durable: WriteSeq,
    },
    /// The cache failed a sync, and may not have all that it had acknowledged.
    #[error(
        "write {missing} of this volume and those up to {acknowledged} were acknowledged and not flushed when the cache device of \
         this host failed a sync: what it has of them is not to be trusted; what came before is whole: attach with --discard-lost \
         to go on with that"
    )]
    InDoubt {
        /// The first that is not known to be there.
        missing: WriteSeq,
        /// The newest that was acknowledged.
        acknowledged: WriteSeq,
    },
    /// Read-only, while this host's cache has writes that the store lacks.
    #[error(
        "the cache on this host holds writes to this volume that were never sent: attach it without --read-only, which sends them"
    )]
    Unsent,
    /// It was deleted, or is being deleted.
    #[error("there is no snapshot {snapshot}")]
    NoSnapshot {
        /// Its name.
        snapshot: SnapName,
    },
    /// A time that has not come.
    #[error("{at} is in the future: by this host's clock it is {now}")]
    Future {
        /// The time.
        at: Moment,
        /// Now.
        now: Moment,
    },
    /// The volume as it was at a time cannot be had any more.
    #[error(
        "what the volume was at {at} is not kept: {why}{}",
        .oldest.map(|oldest| format!("; the oldest state that is kept is of {oldest}")).unwrap_or_default()
    )]
    NotKept {
        /// The time.
        at: Moment,
        /// Why, in a few words.
        why: String,
        /// From when on its states are kept, if that is known.
        oldest: Option<Moment>,
    },
    /// Two attached at once, or one attached and one changed it; the other won.
    #[error(
        "the volume was attached or changed at the same moment by {by}: try again; if it is attached there, detach it first"
    )]
    Raced {
        /// Who.
        by: String,
    },
    /// An object that attaching needs is missing or damaged.
    #[error("the volume cannot be attached: {object}: {reason}")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// The cache device cannot be read or written.
    #[error(
        "the cache device failed: {0}; after a sync that failed, start the daemon anew on a sound device"
    )]
    Cache(#[from] std::io::Error),
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<HeadError> for OpenError {
    fn from(error: HeadError) -> Self {
        match error {
            HeadError::Fenced { by } => Self::Raced { by },
            HeadError::Damaged { object, reason } => Self::Damaged { object, reason },
            HeadError::Store(error) => error.into(),
        }
    }
}

impl From<CutError> for OpenError {
    fn from(error: CutError) -> Self {
        match error {
            CutError::Lost { missing, durable } => Self::Lost { missing, durable },
            CutError::InDoubt {
                missing,
                acknowledged,
            } => Self::InDoubt {
                missing,
                acknowledged,
            },
            CutError::Io(error) => Self::Cache(error),
        }
    }
}

/// Who attaches, and how.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Our cache device.
    pub cache: CacheId,
    /// Our host's name, for people.
    pub host: String,
    /// Now, in milliseconds of Unix time; recorded for people, decided upon by nobody.
    pub now_ms: u64,
    /// Take it even if somebody else has it.
    pub force: bool,
    /// Give up unsent writes that cannot be merged.
    pub discard_unsent: bool,
    /// Only if the head names us: nobody has had it since we had it last.
    pub must_be_ours: bool,
}

/// A volume as the store has it, ours to write.
#[derive(Debug)]
pub struct Claimed {
    /// Its head.
    pub head: HeadCell,
    /// A copy of it.
    pub info: Head,
    /// The map at the last checkpoint.
    pub root: Arc<MapRoot>,
    /// The entries of the chunks after it, oldest first.
    pub log: Vec<Vec<MapEntry>>,
    /// These chunks.
    pub chunks: Vec<LogChunk>,
    /// The volume's objects that the map needs, and the dead ones.
    pub objects: Objects,
    /// The number of the next chunk.
    pub next_chunk: ChunkSeq,
    /// The newest write in the store.
    pub stored_write: WriteSeq,
    /// What the cache kept from before this epoch is of a history that the volume has left.
    pub kept_since: Epoch,
    /// Its data keys, if it is encrypted: whoever serves it puts them here.
    pub keys: Option<Arc<DataKeys>>,
}

/// Attaches a volume for writing. `kept` is what the cache device holds of it from before.
///
/// # Errors
/// [`OpenError`]; up to and with step 1 nothing was changed.
pub async fn claim(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    kept: Option<&Recovered>,
    claim: &Claim,
) -> Result<Claimed, OpenError> {
    let taken = take(store, tenant, volume, kept, claim).await?;
    let (root, objects) = load_root(store, tenant, &taken.info).await?;
    let Replayed {
        log,
        chunks,
        stored_write,
        end,
    } = taken.log;
    Ok(Claimed {
        head: taken.head,
        info: taken.info,
        root,
        log,
        chunks,
        objects,
        next_chunk: end,
        stored_write,
        kept_since: taken.kept_since,
        keys: None,
    })
}

/// A volume whose log is ours to write; its map is not read yet.
pub(crate) struct TakenOver {
    pub head: HeadCell,
    pub info: Head,
    pub log: Replayed,
    kept_since: Epoch,
}

/// Steps 1 to 3.
pub(crate) async fn take(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    kept: Option<&Recovered>,
    claim: &Claim,
) -> Result<TakenOver, OpenError> {
    // Step 1.
    let mut kept_from = Epoch::ZERO;
    let raised = raise(store, tenant, volume, claim, |before, raised| {
        kept_from = kept_since(before, kept, claim)?;
        if kept_from > before.epoch {
            raised.lineage = Some(Lineage {
                cache: claim.cache,
                since: raised.epoch,
            });
        }
        Ok(())
    });
    let (raised, tag) = raised.await?;

    // Step 2.
    let log = replay(store, tenant, &raised, Some(claim)).await?;
    let end = log.end;

    // Step 3.
    let cell = HeadCell::new(tenant.clone(), raised, tag);
    let info = cell
        .update(store, |head| {
            if let Some(last) = head.log.last_mut() {
                last.end = Some(end);
            }
            head.log.retain(|range| range.end != Some(range.first));
            head.log.push(LogRange {
                epoch: head.epoch,
                first: end,
                end: None,
            });
        })
        .await?;
    Ok(TakenOver {
        head: cell,
        info,
        log,
        kept_since: kept_from,
    })
}

/// Puts the head with the next term, which is ours, and with what `change` makes of it, given the head before. Answers it.
///
/// Between the look and the PUT a change of our own may take effect that was given up for want of an answer: of a try before this one,
/// or of a daemon that was killed. Then it is done anew, upon that.
async fn raise(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    claim: &Claim,
    mut change: impl FnMut(&Head, &mut Head) -> Result<(), OpenError> + Send,
) -> Result<(Head, Tag), OpenError> {
    let mut turns = 1;
    loop {
        let (before, tag) = read_head(store, tenant, volume, claim).await?;
        let mut head = raised(&before, claim);
        change(&before, &mut head)?;
        match replace(store, tenant, &head, &tag).await? {
            Replaced::Done(tag) => return Ok((head, tag)),
            Replaced::Changed(now, _) => {
                let is_ours = now.owner.as_ref().is_some_and(|o| o.cache == claim.cache);
                if !is_ours || turns >= RAISES_MAX {
                    return Err(fenced(&now).into());
                }
            }
            Replaced::Missing => return Err(missing(tenant, volume).into()),
        }
        turns += 1;
    }
}

/// The head with the next term, which is ours.
fn raised(head: &Head, claim: &Claim) -> Head {
    Head {
        epoch: head.epoch.next(),
        owner: Some(Owner {
            cache: claim.cache,
            host: claim.host.clone(),
            since_ms: claim.now_ms,
        }),
        ..head.clone()
    }
}

/// Takes the right to change the head of a volume that nobody serves, without opening it: step 1 alone.
/// Answers whether it was ours already; if not, it is to be given back.
///
/// # Errors
/// [`OpenError`]; nothing was changed.
pub async fn hold(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    claim: &Claim,
) -> Result<(HeadCell, bool), OpenError> {
    let mut was_ours = false;
    let raised = raise(store, tenant, volume, claim, |before, _| {
        was_ours = before.owner.is_some();
        Ok(())
    });
    let (raised, tag) = raised.await?;
    let cell = HeadCell::new(tenant.clone(), raised, tag);
    Ok((cell, was_ours))
}

/// The volume's head, unless somebody else has the volume and `claim` does not say `force`.
async fn read_head(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    claim: &Claim,
) -> Result<(Head, Tag), OpenError> {
    let (head, tag) = HeadCell::read(store, tenant, volume).await?;
    let is_ours = |owner: &Owner| owner.cache == claim.cache;
    match &head.owner {
        Some(_) if head.deleted().is_some() => Err(OpenError::Deleted),
        owner if claim.must_be_ours && !owner.as_ref().is_some_and(is_ours) => {
            Err(OpenError::Taken)
        }
        Some(owner) if owner.cache != claim.cache && !claim.force => {
            Branch::OwnedRefused.taken();
            Err(OpenError::Owned {
                host: owner.shown_host(),
                since: since(owner.since_ms),
            })
        }
        _ => Ok((head, tag)),
    }
}

/// Opens a volume as the store has it at this moment, without the right to write: nothing in the
/// store changes, and what a writer elsewhere adds later does not show.
///
/// # Errors
/// [`OpenError`]; with a writer elsewhere only if `claim` does not say `force`.
pub async fn open_read_only(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    kept: Option<&Recovered>,
    claim: &Claim,
) -> Result<Claimed, OpenError> {
    let (mut head, mut tag) = read_head(store, tenant, volume, claim).await?;
    for _ in 0..REOPENS_MAX {
        let error = match open_head(store, tenant, head.clone(), tag, kept, claim).await {
            Err(error @ OpenError::Damaged { .. }) => error,
            opened => return opened,
        };
        // What a writer elsewhere has given up meanwhile may be gone; what it has now is not.
        let (now, now_tag) = read_head(store, tenant, volume, claim).await?;
        if now == head {
            return Err(error);
        }
        (head, tag) = (now, now_tag);
    }
    open_head(store, tenant, head, tag, kept, claim).await
}

async fn open_head(
    store: &dyn Store,
    tenant: &TenantName,
    head: Head,
    tag: Tag,
    kept: Option<&Recovered>,
    claim: &Claim,
) -> Result<Claimed, OpenError> {
    let replayed = replay(store, tenant, &head, None).await?;
    if kept.is_some_and(|kept| kept.has_more_than(replayed.stored_write)) && !claim.discard_unsent {
        return Err(OpenError::Unsent);
    }
    let (root, objects) = load_root(store, tenant, &head).await?;
    Ok(Claimed {
        head: HeadCell::new(tenant.clone(), head.clone(), tag),
        kept_since: head.epoch,
        info: head,
        root,
        log: replayed.log,
        chunks: replayed.chunks,
        objects,
        next_chunk: replayed.end,
        stored_write: replayed.stored_write,
        keys: None,
    })
}

/// Opens a snapshot of a volume, whoever has the volume: nothing in the store changes. Answers when it
/// was made, too.
///
/// # Errors
/// [`OpenError`].
pub async fn open_snapshot(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    name: &SnapName,
) -> Result<(Claimed, u64), OpenError> {
    let (head, tag) = HeadCell::read(store, tenant, volume).await?;
    let found = head.snapshots.iter().find(|s| s.name == name.as_str());
    let Some(snapshot) = found.filter(|s| !s.closing) else {
        let snapshot = name.clone();
        return Err(OpenError::NoSnapshot { snapshot });
    };
    let root = load_map(store, tenant, volume, snapshot.root).await?;
    let created_ms = snapshot.created_ms;
    // As the volume was then; never written.
    let info = Head {
        size: snapshot.size,
        root: snapshot.root,
        root_write: snapshot.root_write,
        log: Vec::new(),
        ..head.clone()
    };
    let opened = Claimed {
        head: HeadCell::new(tenant.clone(), info.clone(), tag),
        root,
        log: Vec::new(),
        chunks: Vec::new(),
        // Of the volume, which this does not change.
        objects: Objects::new(volume, Usage::default()),
        next_chunk: ChunkSeq::new(1),
        stored_write: info.root_write,
        kept_since: info.epoch,
        info,
        keys: None,
    };
    Ok((opened, created_ms))
}

/// The log after the map.
pub(crate) struct Replayed {
    /// The entries of its chunks, oldest first.
    log: Vec<Vec<MapEntry>>,
    /// The chunks.
    pub chunks: Vec<LogChunk>,
    /// The newest write in it.
    stored_write: WriteSeq,
    /// The number of the chunk that would come next.
    pub end: ChunkSeq,
}

/// Whether what a chunk holds is encrypted with a later key of its volume than the head has: then it was written after the head
/// was read, and is not of the state that this is.
pub(super) fn is_of_a_later_key(head: &Head, header: &ChunkHeader) -> bool {
    let own = head
        .keys
        .keys
        .iter()
        .filter(|key| key.volume == head.volume);
    let newest = own.map(|key| key.generation).max();
    newest.is_some_and(|newest| header.generation > newest)
}

/// Reads the log of `head`. With a claim its open end is sealed on the way; without, it ends where
/// it ends now, or where a key begins that the head has not.
async fn replay(
    store: &dyn Store,
    tenant: &TenantName,
    head: &Head,
    claim: Option<&Claim>,
) -> Result<Replayed, OpenError> {
    let (mut log, mut chunks) = (Vec::new(), Vec::new());
    let mut stored_write = head.root_write;
    let mut left = LogLeft::default();
    let first = head.log.first();
    let mut end = first.map_or(ChunkSeq::new(1), |range| range.first);
    for range in &head.log {
        end = range.first;
        for header in replay_range(store, tenant, range, head, claim, &mut left).await? {
            if claim.is_none() && is_of_a_later_key(head, &header) {
                return Ok(Replayed {
                    log,
                    chunks,
                    stored_write,
                    end,
                });
            }
            if header.first_write != stored_write.next() {
                return Err(OpenError::Damaged {
                    object: keys::chunk_key(tenant, header.id),
                    reason: format!(
                        "it starts at write {}, the log before it ends at {stored_write}",
                        header.first_write
                    ),
                });
            }
            stored_write = header.last_write;
            end = header.id.seq.next();
            let chunk = LogChunk::new(&header, header.object_len());
            chunks.push(chunk.cut_at(header.cut_ms));
            log.push(header.map_entries());
        }
    }
    Ok(Replayed {
        log,
        chunks,
        stored_write,
        end,
    })
}

/// The first epoch of the unbroken row in which this cache wrote the volume: what it kept from then
/// on follows upon what the store has. Writes from before cannot be told from those that were sent,
/// for the volume has gone on counting elsewhere; they are given up only by the operator's word.
fn kept_since(head: &Head, kept: Option<&Recovered>, claim: &Claim) -> Result<Epoch, OpenError> {
    let lineage = head.lineage.as_ref().filter(|l| l.cache == claim.cache);
    let since = lineage.map_or(head.epoch.next(), |l| l.since);
    if Mutation::MergeStale.is_on() {
        return Ok(Epoch::ZERO);
    }
    let Some(mut kept) = kept.cloned() else {
        return Ok(since);
    };
    let stale = kept.split_off_before(since);
    match stale.segments.iter().map(|s| s.epoch).max() {
        Some(epoch) if stale.has_any() && !claim.discard_unsent => {
            Branch::StaleRefused.taken();
            let bytes = stale.data_bytes();
            Err(OpenError::Stale { bytes, epoch })
        }
        _ => Ok(since),
    }
}

/// What a log may still have: a store that has a chunk for every number takes no more memory than that.
pub(crate) struct LogLeft(u64);

impl Default for LogLeft {
    fn default() -> Self {
        Self(LOG_ENTRIES_MAX)
    }
}

/// Why a log is not read to its end.
pub(crate) const LOG_TOO_LONG: &str = "the log is longer than any of ours";

impl LogLeft {
    /// Whether it may have this chunk too.
    pub(crate) fn take(&mut self, header: &ChunkHeader) -> bool {
        let entries = (header.extents.len() + header.frames.len()) as u64;
        let left = self.0.checked_sub(entries + LOG_CHUNK_ENTRIES);
        self.0 = left.unwrap_or(0);
        left.is_some()
    }

    fn take_or_refuse(
        &mut self,
        tenant: &TenantName,
        header: &ChunkHeader,
    ) -> Result<(), OpenError> {
        if self.take(header) {
            return Ok(());
        }
        Err(OpenError::Damaged {
            object: keys::chunk_key(tenant, header.id),
            reason: LOG_TOO_LONG.to_owned(),
        })
    }
}

/// The headers of a log range, in order, up to its end; the end of an open range is sealed if we
/// have a claim. `left` is what the log may have with it.
pub(super) async fn replay_range(
    store: &dyn Store,
    tenant: &TenantName,
    range: &LogRange,
    head: &Head,
    claim: Option<&Claim>,
    left: &mut LogLeft,
) -> Result<Vec<ChunkHeader>, OpenError> {
    let id = |seq: u64| ChunkId {
        volume: head.volume,
        epoch: range.epoch,
        seq: ChunkSeq::new(seq),
    };
    let last = range.end.map_or(u64::MAX, ChunkSeq::get);
    let (mut found, mut at) = (Vec::new(), range.first.get());
    loop {
        let (mut headers, stop) = stretch(store, tenant, id(at), last, left).await?;
        at += headers.len() as u64;
        found.append(&mut headers);
        match stop {
            Stop::Whole => return Ok(found),
            Stop::Sealed(_) => {
                Branch::SealFound.taken();
                return Ok(found);
            }
            Stop::Missing if range.end.is_some() => {
                let reason = "a chunk of the log is missing".to_owned();
                return Err(OpenError::Damaged {
                    object: keys::chunk_key(tenant, id(at)),
                    reason,
                });
            }
            Stop::Missing => {}
        }
        let Some(claim) = claim else { return Ok(found) };
        if Mutation::NoSeal.is_on() {
            return Ok(found);
        }
        match seal(store, tenant, id(at), head, claim).await? {
            // The old writer was quicker: its chunk belongs to the log, and more may follow.
            Some(header) => {
                left.take_or_refuse(tenant, &header)?;
                found.push(header);
            }
            None => return Ok(found),
        }
        at += 1;
    }
}

/// Where a stretch of a log ends.
pub(super) enum Stop {
    /// At the number that was asked for.
    Whole,
    /// At a seal.
    Sealed(Seal),
    /// At a place that has nothing.
    Missing,
}

/// The headers of an epoch's chunks from `first` on, up to the number `end` or what ends them before it.
///
/// Several are asked for at once, and none is when this returns: a request that nobody polls keeps its place in the
/// [`Lane`](crate::store::Lane), where what is asked for next may wait for one.
pub(super) async fn stretch(
    store: &dyn Store,
    tenant: &TenantName,
    first: ChunkId,
    end: u64,
    left: &mut LogLeft,
) -> Result<(Vec<ChunkHeader>, Stop), OpenError> {
    let mut found = Vec::new();
    let mut looks = Box::pin(
        futures::stream::iter(first.seq.get()..end)
            .map(|seq| {
                let seq = ChunkSeq::new(seq);
                log_entry(store, tenant, ChunkId { seq, ..first })
            })
            .buffered(REPLAY_CONCURRENCY),
    );
    while let Some(entry) = looks.next().await {
        match entry? {
            Some(Entry::Chunk(header)) => {
                left.take_or_refuse(tenant, &header)?;
                found.push(header);
            }
            Some(Entry::Seal(seal)) => return Ok((found, Stop::Sealed(seal))),
            None => return Ok((found, Stop::Missing)),
        }
    }
    Ok((found, Stop::Whole))
}

/// What lies at a place of the log.
pub(crate) enum Entry {
    /// A chunk, which says this of itself.
    Chunk(ChunkHeader),
    /// The end of its range.
    Seal(Seal),
}

/// What is at a place of the log: nothing, a chunk, or its end.
///
/// # Errors
/// [`OpenError::Damaged`] if it is neither chunk nor seal, whole and of that place.
pub(crate) async fn log_entry(
    store: &dyn Store,
    tenant: &TenantName,
    id: ChunkId,
) -> Result<Option<Entry>, OpenError> {
    let object = keys::chunk_key(tenant, id);
    // Both reads again, if the second finds damage: how much it asks for was said by the first.
    let attempt = || async {
        let prefix = store.get_prefix(&object, HEADER_GUESS).await;
        let needed = match look(&prefix.map_err(Unsound::Store)?, id).map_err(Unsound::Damaged)? {
            Look::Entry(entry) => return Ok(entry),
            Look::Longer(needed) => needed,
        };
        Branch::HeaderLonger.taken();
        let header = store.get_range(&object, 0..needed as u64).await;
        let header = header.map_err(|error| match error {
            error @ (StoreError::Unavailable { .. } | StoreError::Denied { .. }) => {
                Unsound::Store(error)
            }
            error => Unsound::Damaged(error.to_string()),
        })?;
        let header =
            ChunkHeader::decode(&header, id).map_err(|e| Unsound::Damaged(e.to_string()))?;
        Ok(Entry::Chunk(header))
    };
    match sound::insist(attempt).await {
        Ok(entry) => Ok(Some(entry)),
        Err(Unsound::Store(StoreError::NotFound { .. })) => Ok(None),
        Err(Unsound::Store(error)) => Err(error.into()),
        Err(Unsound::Damaged(reason)) => Err(OpenError::Damaged { object, reason }),
    }
}

/// As [`log_entry`], for who looks for damage: it is an answer.
pub(crate) async fn log_place(
    store: &dyn Store,
    tenant: &TenantName,
    id: ChunkId,
) -> Result<Result<Option<Entry>, String>, StoreError> {
    match log_entry(store, tenant, id).await {
        Ok(entry) => Ok(Ok(entry)),
        Err(OpenError::Store(error)) => Err(error),
        Err(OpenError::Damaged { reason, .. }) => Ok(Err(reason)),
        Err(other) => Ok(Err(other.to_string())),
    }
}

/// What the first bytes of an object of the log say.
enum Look {
    Entry(Entry),
    /// A chunk whose header has so many bytes, which is more.
    Longer(usize),
}

fn look(prefix: &Bytes, id: ChunkId) -> Result<Look, String> {
    match classify(prefix).map_err(|e| e.to_string())? {
        LogObject::Seal => {
            let seal = Seal::decode(prefix, id).map_err(|e| e.to_string())?;
            Ok(Look::Entry(Entry::Seal(seal)))
        }
        LogObject::Chunk => {
            let front = prefix.get(..CHUNK_PREFIX_LEN).ok_or("it is cut off")?;
            let needed = ChunkHeader::encoded_len(front).map_err(|e| e.to_string())?;
            let Some(header) = prefix.get(..needed) else {
                return Ok(Look::Longer(needed));
            };
            let header = ChunkHeader::decode(header, id).map_err(|e| e.to_string())?;
            Ok(Look::Entry(Entry::Chunk(header)))
        }
    }
}

/// Seals the log at `id`. `Some` if the old writer's chunk got there first.
async fn seal(
    store: &dyn Store,
    tenant: &TenantName,
    id: ChunkId,
    head: &Head,
    claim: &Claim,
) -> Result<Option<ChunkHeader>, OpenError> {
    let object = keys::chunk_key(tenant, id);
    let seal = encode_seal(id, head.epoch, &claim.host);
    match store.create(&object, seal.into()).await {
        Ok(_) => {
            Branch::Sealed.taken();
            Ok(None)
        }
        Err(StoreError::Exists { .. }) => match log_entry(store, tenant, id).await? {
            Some(Entry::Chunk(header)) => {
                Branch::SealBeaten.taken();
                Ok(Some(header))
            }
            Some(Entry::Seal(_)) => Ok(None),
            None => {
                let reason = "the store says that it exists, and that it does not".to_owned();
                Err(OpenError::Damaged { object, reason })
            }
        },
        Err(error) => Err(error.into()),
    }
}

/// The map that the head points to, and what is known of the volume's objects.
async fn load_root(
    store: &dyn Store,
    tenant: &TenantName,
    head: &Head,
) -> Result<(Arc<MapRoot>, Objects), OpenError> {
    let volume = head.volume;
    let map = load_map(store, tenant, volume, head.root).await?;
    let objects = match load_usage(store, tenant, volume, head.root).await {
        Ok(Some(usage)) => Objects::new(volume, usage),
        Ok(None) => Objects::uncounted(volume),
        // What is needed can be counted again; of what is dead only the list is lost.
        Err(OpenError::Damaged { object, reason }) => {
            tracing::error!(
                object,
                reason,
                "the usage of the map is damaged: some dead objects will stay"
            );
            Objects::uncounted(volume)
        }
        Err(error) => return Err(error),
    };
    Ok((map, objects))
}

/// The map that a head or a snapshot of the volume points to.
pub(crate) async fn load_map(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    root: Option<RootRef>,
) -> Result<Arc<MapRoot>, OpenError> {
    let Some(root) = root else {
        return Ok(Arc::new(MapRoot::empty()));
    };
    let place = (root.offset, root.len);
    let manifest = root_node(store, tenant, volume, root, place, Manifest::decode).await?;
    Ok(Arc::new(MapRoot::new(manifest)))
}

/// The usage beside that map; `None` if it has none.
pub(crate) async fn load_usage(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    root: Option<RootRef>,
) -> Result<Option<Usage>, OpenError> {
    let Some(root) = root else {
        return Ok(Some(Usage::default()));
    };
    let Some(place) = root.usage else {
        return Ok(None);
    };
    let usage = root_node(store, tenant, volume, root, place, Usage::decode).await?;
    Ok(Some(usage))
}

/// A node of the object that `root` names.
async fn root_node<T>(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    root: RootRef,
    (offset, len): (u32, u32),
    decode: impl Fn(MapObjectId, u32, &[u8]) -> Result<T, FormatError> + Send,
) -> Result<T, OpenError> {
    let id = MapObjectId {
        volume,
        epoch: root.epoch,
        seq: root.seq,
    };
    let object = keys::map_key(tenant, volume, root.epoch, root.seq);
    let damaged = |reason: String| OpenError::Damaged {
        object: object.clone(),
        reason,
    };
    let range = u64::from(offset)..u64::from(offset) + u64::from(len);
    // A usage grows with what a volume has in the store.
    let ask = || get_long(store, &object, range.clone());
    sound::read(ask, |bytes| decode(id, offset, &bytes))
        .await
        .map_err(|error| match error {
            Unsound::Store(StoreError::NotFound { .. }) => {
                damaged("the volume's map is missing".to_owned())
            }
            Unsound::Store(error) => error.into(),
            Unsound::Damaged(reason) => damaged(reason),
        })
}

/// Gives the volume back: no owner, so that anybody may attach it.
///
/// # Errors
/// [`HeadError::Fenced`] if it is not ours any more.
pub async fn give_back(store: &dyn Store, head: &HeadCell) -> Result<(), HeadError> {
    head.update(store, |head| head.owner = None)
        .await
        .map(|_| ())
}

fn since(ms: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms);
    humantime::format_rfc3339_seconds(at).to_string()
}
