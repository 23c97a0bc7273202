//! Compaction: what a map still needs of some chunks goes into chunks of its own, in the order of addresses.
//!
//! One sweep over the addresses, in stages. Of each stage the order, and what a crash between the steps
//! leaves:
//! 1. A scan of the map finds what it needs of the victims; that is read, in order, and stored as chunks
//!    numbered outside the log. *Crash: chunks that nothing names.*
//! 2. A run with the new places is laid upon the runs of *that* map, below all that was folded since, and
//!    the head is moved to the result. So a write that came meanwhile is never hidden by the older data
//!    that were moved. *Crash before the head is moved: as after step 1.*
//!
//! With the map of the last stage the victims are dead: readers who still go by an older one find them until
//! the horizon has passed. *Crash, or a stop, between two stages: what was moved is, and the victims are
//! needed for the rest.*
//!
//! Checkpoints go on meanwhile; they leave the scanned runs as they are (`compacted_runs`).

mod reader;

use std::collections::{BTreeSet, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use quarry_cache::Mutation;
use quarry_objfmt::chunk::{ChunkExtent, ExtentBody, encode_chunk_in};
use quarry_objfmt::{
    ChunkId, ChunkSeq, DataLoc, Lba, Location, MapEntry, SECTOR_SIZE, Sectors, VolumeId, WriteSeq,
    keys,
};
use quarry_volume::DataError;
use quarry_volume::map::{MapRoot, RUNS_TARGET_MAX, plan_merge};
use tokio::time::Instant;

use super::checkpoint::{Stopped, Writer, merge, refused, remap};
use super::chores::Order;
use super::objects::{ChunkName, LogChunk, Objects};
use super::scan::Scan;
use super::{VolumeBackend, aside};
use crate::fair::Place;
use crate::store::create_own;
use reader::Reader;
pub(super) use reader::WINDOW_BYTES_MIN;

/// What one stage moves at most, in new chunks (256 MiB of large ones): what a crash makes one do again, and for how
/// long the runs of a map are not merged.
const STAGE_CHUNKS_MAX: u64 = 32;

/// What one stage moves at most, in pieces: 7 MiB of memory.
const STAGE_PIECES_MAX: usize = 128 << 10;

/// New chunks being encoded or stored side by side; each takes twice its size.
const CHUNKS_AT_ONCE: usize = 2;

/// A stop is looked for so often.
pub(super) const REST_MAX: Duration = Duration::from_millis(100);

/// What is taken apart.
pub(super) enum Victims {
    /// Chunks of the volume itself.
    Own(BTreeSet<ChunkName>),
    /// All that is another volume's: its parents'.
    Foreign,
}

impl Victims {
    fn has(&self, volume: VolumeId, chunk: ChunkId) -> bool {
        match self {
            Self::Own(chunks) => {
                chunk.volume == volume && chunks.contains(&(chunk.epoch, chunk.seq))
            }
            Self::Foreign => chunk.volume != volume,
        }
    }
}

/// A run of sectors that the map needs of a victim.
#[derive(Clone, Copy)]
struct Piece {
    start: Lba,
    len: u32,
    at: DataLoc,
}

impl Piece {
    fn end(&self) -> Lba {
        self.start.add(Sectors::new(self.len.into()))
    }
}

/// The runs of the scanned map are free again when this is dropped.
struct Pinned<'a>(&'a VolumeBackend);

impl<'a> Pinned<'a> {
    /// The runs of the newest map, which are few: each stage brings one, and there may be no checkpoint in between that
    /// merges some.
    async fn newest(backend: &'a VolumeBackend) -> Result<(Self, Arc<MapRoot>), Stopped> {
        let mut objects = backend.objects.lock().await;
        let now = backend.root.lock().clone();
        if now.runs().len() >= RUNS_TARGET_MAX {
            let (count, go_on) = (plan_merge(&now, 0), || !backend.reclaim.is_stopping());
            merge(backend, &mut objects, count.max(2), |_| {}, &go_on).await?;
        }
        let base = backend.root.lock().clone();
        let runs = base.runs().len();
        backend.compacted_runs.store(runs, Ordering::Relaxed);
        Ok((Self(backend), base))
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.0.compacted_runs.store(0, Ordering::Relaxed);
    }
}

/// Takes `victims` apart, at `percent` of the time. Answers false if it was stopped, or not wanted any more,
/// before it was done, or if there is a log of an earlier epoch.
///
/// # Errors
/// [`Stopped`]; the map is then as the last stage left it.
pub(super) async fn run(
    backend: &VolumeBackend,
    victims: &Victims,
    percent: u32,
    order: &Order,
) -> Result<bool, Stopped> {
    if !backend.log_is_ours() {
        return Ok(false);
    }
    let mut from = Some(Lba::ZERO);
    while let Some(at) = from {
        let Some(_memory) = memory(backend).await else {
            return Ok(false);
        };
        from = stage(backend, victims, at, percent, order).await?;
        if backend.reclaim.is_stopping() || order.is_unwanted() {
            return Ok(from.is_none());
        }
    }
    Ok(true)
}

/// The right to the memory of a compaction; `None` if reclaiming is to stop.
async fn memory(backend: &VolumeBackend) -> Option<Place> {
    let common = &backend.common;
    let mut free = pin!(common.compactions.enter(&common.share));
    while !backend.reclaim.is_stopping() {
        if let Ok(place) = tokio::time::timeout(REST_MAX, &mut free).await {
            return Some(place);
        }
    }
    None
}

/// Moves what comes first from `from` on. Answers where to go on, if there may be more.
async fn stage(
    backend: &VolumeBackend,
    victims: &Victims,
    from: Lba,
    percent: u32,
    order: &Order,
) -> Result<Option<Lba>, Stopped> {
    let (_pinned, base) = Pinned::newest(backend).await?;
    let (pieces, mut next) = gather(backend, &base, victims, from).await?;
    let parts = parts(&pieces, backend.common.reclaim.chunk_sectors);
    let work = (parts, Reader::new(backend, &pieces), Instant::now());
    let contents = stream::unfold(work, async |(mut parts, mut reader, begun)| {
        rest(backend, begun.elapsed(), percent).await;
        if backend.reclaim.is_stopping() || order.is_unwanted() {
            return None;
        }
        let (part, begun) = (parts.next()?, Instant::now());
        let contents = reader.contents(part).await;
        Some(((part, contents), (parts, reader, begun)))
    });
    let moved = contents.map(async |(part, contents)| match contents {
        Ok(contents) => {
            let new = write(backend, part, contents).await?;
            let sectors: u64 = part.iter().map(|piece| u64::from(piece.len)).sum();
            order.progress.moved(sectors * u64::from(SECTOR_SIZE));
            Ok((part, new))
        }
        Err((chunk, error)) => {
            if chunk.volume == backend.volume {
                backend.reclaim.cannot_read((chunk.epoch, chunk.seq));
            }
            Err(Stopped::Damaged(error))
        }
    });
    // Boxed, for the compiler finds it Send only so.
    let moved = moved.buffered(CHUNKS_AT_ONCE).boxed();
    let moved: Vec<_> = moved.try_collect().await?;

    let count: usize = moved.iter().map(|(part, _)| part.len()).sum();
    if let Some(left) = pieces.get(count) {
        next = Some(left.start);
    }
    if count == 0 && next.is_some() {
        return Ok(next);
    }
    let mut objects = backend.objects.lock().await;
    let now = backend.root.lock().clone();
    let mut writer = Writer::new(backend);
    for entry in moved.iter().flat_map(|(_, (_, entries))| entries) {
        writer.push(*entry).await?;
    }
    let tables = writer.end_tables();
    let above = match Mutation::CompactOverNewer.is_on() {
        true => now.runs().len(),
        false => base.runs().len(),
    };
    let root = now.with_run_above(above, tables);
    let mut taken: HashMap<ChunkName, u32> = HashMap::new();
    for Piece { len, at, .. } in &pieces[..count] {
        if at.chunk.volume == backend.volume {
            *taken.entry((at.chunk.epoch, at.chunk.seq)).or_default() += len;
        }
    }
    let list = |objects: &mut Objects, map, now_ms| {
        for (_, (chunk, _)) in &moved {
            objects.add(chunk, chunk.data_sectors, map);
        }
        objects.take(&taken);
        if let (None, Victims::Own(victims)) = (next, victims) {
            for victim in victims {
                objects.end_chunk(*victim, map, now_ms);
            }
        }
    };
    remap(backend, writer, &mut objects, &now, root, list, |_| {}).await?;
    Ok(next)
}

/// So that no more than `percent` of the time is spent at work that took so long; cut short when reclaiming
/// is to stop.
async fn rest(backend: &VolumeBackend, worked: Duration, percent: u32) {
    let percent = percent.clamp(1, 100);
    let until = Instant::now() + worked * (100 - percent) / percent;
    while Instant::now() < until && !backend.reclaim.is_stopping() {
        tokio::time::sleep_until(until.min(Instant::now() + REST_MAX)).await;
    }
}

/// What `base` needs of the victims from `from` on, in the order of addresses, as much as a stage moves;
/// and where the rest begins.
async fn gather(
    backend: &VolumeBackend,
    base: &Arc<MapRoot>,
    victims: &Victims,
    from: Lba,
) -> Result<(Vec<Piece>, Option<Lba>), Stopped> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut sectors = 0;
    let sectors_max = STAGE_CHUNKS_MAX * u64::from(backend.common.reclaim.chunk_sectors);
    let frame_sectors = backend.head.frame_sectors();
    let mut scan = Scan::new(backend, Vec::new(), base.runs(), true).from(from);
    while let Some(entry) = scan.next().await? {
        if backend.reclaim.is_stopping() {
            return Ok((Vec::new(), Some(from)));
        }
        let Location::Data(at) = entry.location else {
            continue;
        };
        if !victims.has(backend.volume, at.chunk) {
            continue;
        }
        if u64::from(at.raw % frame_sectors) + u64::from(entry.len) > u64::from(frame_sectors) {
            return Err(Stopped::Damaged(DataError {
                object: "map".to_owned(),
                reason: format!(
                    "its entry at sector {} is longer than a frame",
                    entry.start.get()
                ),
            }));
        }
        sectors += u64::from(entry.len);
        pieces.push(Piece {
            start: entry.start,
            len: entry.len,
            at,
        });
        if pieces.len() >= STAGE_PIECES_MAX || sectors >= sectors_max {
            let end = pieces.last().map(Piece::end);
            return Ok((pieces, end));
        }
    }
    Ok((pieces, None))
}

/// The pieces of one new chunk of so many sectors after the other.
fn parts(pieces: &[Piece], sectors: u32) -> impl Iterator<Item = &[Piece]> {
    let mut left = pieces;
    std::iter::from_fn(move || {
        let mut room = sectors;
        let fit = left.iter().take_while(|piece| {
            let rest = room.checked_sub(piece.len);
            room = rest.unwrap_or(0);
            rest.is_some()
        });
        // A piece is no longer than a frame; where a chunk is to be shorter, it is as long as that.
        let count = fit.count().max(1).min(left.len());
        let (part, rest) = left.split_at(count);
        left = rest;
        (!part.is_empty()).then_some(part)
    })
}

/// Stores the pieces as a chunk. Answers it and its entries.
async fn write(
    backend: &VolumeBackend,
    pieces: &[Piece],
    data: Vec<Bytes>,
) -> Result<(LogChunk, Vec<MapEntry>), Stopped> {
    let number = backend.next_compacted.fetch_add(1, Ordering::Relaxed);
    let id = ChunkId {
        volume: backend.volume,
        epoch: backend.head.epoch(),
        seq: ChunkSeq::new(number),
    };
    let extents = extents(pieces);
    let how = backend.how((backend.common.now_ms)());
    let buffers = backend.common.buffers.clone();
    let encode = move || {
        let pieces: Vec<&[u8]> = data.iter().map(|piece| &piece[..]).collect();
        let params = how.params(id, WriteSeq::ZERO, WriteSeq::ZERO);
        let (out, start, header) = encode_chunk_in(buffers.encoded(), &params, &extents, &pieces);
        (buffers.lend(out, start), header)
    };
    let (bytes, header) = aside(encode).await.expect("encoding does not panic");
    let object = keys::chunk_key(backend.head.tenant(), id);
    let stored_bytes = bytes.len() as u64;
    // Its number is ours alone in our epoch.
    create_own(&*backend.common.background, &object, bytes)
        .await
        .map_err(|error| refused(&object, &error))?;
    backend
        .stored_bytes
        .fetch_add(stored_bytes, Ordering::Relaxed);
    backend.reclaim.moved(stored_bytes);
    let entries = header.map_entries();
    Ok((LogChunk::new(&header, stored_bytes), entries))
}

/// The extents of a chunk of these pieces, neighbours joined.
fn extents(pieces: &[Piece]) -> Vec<ChunkExtent> {
    let mut extents: Vec<ChunkExtent> = Vec::new();
    let mut raw = 0;
    for piece in pieces {
        match extents.last_mut() {
            Some(last) if last.end() == piece.start => {
                last.len += piece.len;
            }
            _ => extents.push(ChunkExtent {
                start: piece.start,
                len: piece.len,
                body: ExtentBody::Data { raw },
            }),
        }
        raw += piece.len;
    }
    extents
}
