//! Compaction: what a map still needs of chunks that are mostly dead goes into chunks of its own, in the
//! order of addresses.
//!
//! The order, and what a crash between the steps leaves:
//! 1. A scan of the map finds what it needs of the victims; that is read, put in order, and stored as chunks
//!    numbered outside the log. *Crash: chunks that nothing names.*
//! 2. A run with the new places is laid upon the runs of *that* map, below all that was folded since, and
//!    the head is moved to the result. So a write that came meanwhile is never hidden by the older data
//!    that were moved. *Crash before the head is moved: as after step 1.*
//! 3. The victims are dead with that map: readers who still go by an older one find them until the horizon
//!    has passed.
//!
//! Checkpoints go on meanwhile; they leave the scanned runs as they are (`compacted_runs`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use quarry_cache::Mutation;
use quarry_objfmt::chunk::{ChunkExtent, ChunkParams, ExtentBody, decode_frame, encode_chunk};
use quarry_objfmt::{
    ChunkId, ChunkSeq, DataLoc, Lba, Location, MapEntry, SECTOR_SIZE, Sectors, WriteSeq, keys,
};
use quarry_volume::map::MapRoot;
use quarry_volume::{DataError, Event};

use super::checkpoint::{Stopped, Writer, publish, refused};
use super::objects::{ChunkName, LogChunk, Objects};
use super::scan::Scan;
use super::sound::{Unsound, insist};
use super::{VolumeBackend, aside, get_range};
use crate::store::create_own;

/// What one compaction moves at most, in sectors (64 MiB): its memory, twice, and the stretch of data that it
/// puts in order.
pub(super) const STAGE_SECTORS_MAX: u32 = 128 << 10;

/// Victims read side by side; each takes its object and its needed data.
const READS_AT_ONCE: usize = 4;

/// A run of sectors that the map needs of a victim.
#[derive(Clone, Copy)]
struct Piece {
    start: Lba,
    len: u32,
    at: DataLoc,
}

/// The runs of the scanned map are free again when this is dropped.
struct Pinned<'a>(&'a VolumeBackend);

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.0.compacted_runs.store(0, Ordering::Relaxed);
    }
}

/// Takes `victims` apart.
///
/// # Errors
/// [`Stopped`]; the map is then as it was.
pub(super) async fn run(backend: &VolumeBackend, victims: &[ChunkName]) -> Result<(), Stopped> {
    let _memory = backend
        .common
        .compactions
        .acquire()
        .await
        .expect("never closed");
    let base = {
        let _right = backend.objects.lock().await;
        let base = backend.root.lock().clone();
        let runs = base.runs().len();
        backend.compacted_runs.store(runs, Ordering::Relaxed);
        base
    };
    let _pinned = Pinned(backend);
    let pieces = gather(backend, &base, victims).await?;
    let data = match read(backend, &pieces).await {
        Ok(data) => data,
        Err((chunk, error)) => {
            backend.reclaim.cannot_read((chunk.epoch, chunk.seq));
            return Err(Stopped::Damaged(error));
        }
    };
    let mut moved = Vec::new();
    let mut rest = &pieces[..];
    let mut first = 0;
    while !rest.is_empty() {
        let (part, more) = rest.split_at(chunk_of(rest, backend.common.reclaim.chunk_sectors));
        moved.push(write(backend, part, &data[first..first + part.len()]).await?);
        first += part.len();
        rest = more;
    }

    let mut objects = backend.objects.lock().await;
    let now = backend.root.lock().clone();
    let mut writer = Writer::new(backend);
    for entry in moved.iter().flat_map(|(_, entries)| entries) {
        writer.push(*entry).await?;
    }
    let tables = writer.end_tables();
    let above = match Mutation::CompactOverNewer.is_on() {
        true => now.runs().len(),
        false => base.runs().len(),
    };
    let root = now.with_run_above(above, tables);
    let list = |objects: &mut Objects, map, now_ms| {
        for (chunk, _) in &moved {
            objects.add(chunk, chunk.data_sectors, map, now_ms);
        }
        for victim in victims {
            objects.end_chunk(*victim, map, now_ms);
        }
    };
    let root = publish(backend, writer, &mut objects, root, list, |_| {}).await?;
    backend.note_space(&objects);
    // With the right to change the map: the volume hears of its maps in their order.
    backend.tell(Event::Remapped { root }).await;
    Ok(())
}

/// All that `base` needs of the victims, in the order of addresses.
async fn gather(
    backend: &VolumeBackend,
    base: &Arc<MapRoot>,
    victims: &[ChunkName],
) -> Result<Vec<Piece>, Stopped> {
    let victims: BTreeSet<ChunkName> = victims.iter().copied().collect();
    let mut pieces = Vec::new();
    let mut scan = Scan::new(backend, Vec::new(), base.runs(), true);
    while let Some(entry) = scan.next().await? {
        let name = Objects::chunk_of(backend.volume, &entry);
        if let Location::Data(at) = entry.location
            && name.is_some_and(|name| victims.contains(&name))
        {
            pieces.push(Piece {
                start: entry.start,
                len: entry.len,
                at,
            });
        }
    }
    Ok(pieces)
}

/// The contents of the pieces, in their order.
async fn read(
    backend: &VolumeBackend,
    pieces: &[Piece],
) -> Result<Vec<Bytes>, (ChunkId, DataError)> {
    let mut chunks: BTreeMap<ChunkId, Vec<(usize, Piece)>> = BTreeMap::new();
    for (number, piece) in pieces.iter().enumerate() {
        chunks
            .entry(piece.at.chunk)
            .or_default()
            .push((number, *piece));
    }
    let mut data = vec![Bytes::new(); pieces.len()];
    let mut reads = futures::stream::iter(chunks)
        .map(|(chunk, pieces)| async move {
            let contents = read_chunk(backend, chunk, pieces).await;
            contents.map_err(|error| (chunk, error))
        })
        .buffer_unordered(READS_AT_ONCE);
    while let Some(contents) = reads.try_next().await? {
        for (number, bytes) in contents {
            data[number] = bytes;
        }
    }
    Ok(data)
}

/// The contents of some pieces of one chunk, each with its number.
async fn read_chunk(
    backend: &VolumeBackend,
    chunk: ChunkId,
    mut pieces: Vec<(usize, Piece)>,
) -> Result<Vec<(usize, Bytes)>, DataError> {
    let object = keys::chunk_key(backend.head.tenant(), chunk);
    pieces.sort_unstable_by_key(|(_, piece)| piece.at.raw);
    let ends = |piece: &Piece| {
        let from = u64::from(piece.at.stored_offset);
        (from, from + u64::from(piece.at.stored_len))
    };
    let (first, _) = ends(&pieces[0].1);
    let (_, last) = ends(&pieces[pieces.len() - 1].1);
    let pieces = Arc::new(pieces);
    let frame_sectors = backend.head.frame_sectors();
    let attempt = || async {
        let stored = get_range(&*backend.common.background, &object, &(first..last)).await?;
        let pieces = Arc::clone(&pieces);
        let decode = move || cut_out(&stored, first, chunk, &pieces, frame_sectors);
        let contents = aside(decode).await;
        let contents = contents.map_err(|error| error.to_string()).flatten();
        contents.map_err(Unsound::Damaged)
    };
    insist(attempt).await.map_err(|unsound| DataError {
        object: object.clone(),
        reason: unsound.to_string(),
    })
}

/// Decodes the frames of the pieces, which are in the order of the raw space, from the chunk's bytes from
/// `first` on, and keeps only the pieces.
fn cut_out(
    stored: &Bytes,
    first: u64,
    chunk: ChunkId,
    pieces: &[(usize, Piece)],
    frame_sectors: u32,
) -> Result<Vec<(usize, Bytes)>, String> {
    let bytes = |sectors: u32| sectors as usize * SECTOR_SIZE as usize;
    let total: usize = pieces.iter().map(|(_, piece)| bytes(piece.len)).sum();
    let mut kept = Vec::with_capacity(total);
    let mut frame: Option<(u32, Bytes)> = None;
    for (_, piece) in pieces {
        let index = piece.at.raw / frame_sectors;
        let raw = match &frame {
            Some((held, raw)) if *held == index => raw,
            _ => {
                let from = usize::try_from(u64::from(piece.at.stored_offset) - first);
                let from = from.map_err(|_| "a frame lies too far")?;
                let whole = stored.get(from..from + piece.at.stored_len as usize);
                let whole = whole.ok_or("the answer is too short")?;
                let raw = decode_frame(whole, chunk, index, frame_sectors, None);
                &frame.insert((index, raw.map_err(|e| e.to_string())?)).1
            }
        };
        let from = bytes(piece.at.raw % frame_sectors);
        let part = raw.get(from..from + bytes(piece.len));
        kept.extend_from_slice(part.ok_or("a frame is shorter than the map says")?);
    }
    let kept = Bytes::from(kept);
    let mut at = 0;
    let cut = |(number, piece): &(usize, Piece)| {
        let part = kept.slice(at..at + bytes(piece.len));
        at += part.len();
        (*number, part)
    };
    Ok(pieces.iter().map(cut).collect())
}

/// How many of the pieces the next chunk takes, of so many sectors.
fn chunk_of(pieces: &[Piece], sectors: u32) -> usize {
    let mut room = sectors;
    let fit = pieces.iter().take_while(|piece| {
        let rest = room.checked_sub(piece.len);
        room = rest.unwrap_or(0);
        rest.is_some()
    });
    // A piece is no longer than a frame; where a chunk is to be shorter, it is as long as that.
    fit.count().max(1)
}

/// Stores the pieces as a chunk. Answers it and its entries.
async fn write(
    backend: &VolumeBackend,
    pieces: &[Piece],
    data: &[Bytes],
) -> Result<(LogChunk, Vec<MapEntry>), Stopped> {
    let number = backend.next_compacted.fetch_add(1, Ordering::Relaxed);
    let id = ChunkId {
        volume: backend.volume,
        epoch: backend.head.epoch(),
        seq: ChunkSeq::new(number),
    };
    let extents = extents(pieces);
    let raw = data.concat();
    let (frame_sectors, compression) = (backend.head.frame_sectors(), backend.head.compression());
    let cut_ms = (backend.common.now_ms)();
    let encode = move || {
        let params = ChunkParams {
            id,
            first_write: WriteSeq::ZERO,
            last_write: WriteSeq::ZERO,
            cut_ms,
            frame_sectors,
            compression,
            key: None,
        };
        encode_chunk(&params, &extents, &raw)
    };
    let encoded = aside(encode).await.expect("encoding does not panic");
    let object = keys::chunk_key(backend.head.tenant(), id);
    let stored_bytes = encoded.bytes.len() as u64;
    // Its number is ours alone in our epoch.
    create_own(&*backend.common.background, &object, encoded.bytes)
        .await
        .map_err(|error| refused(&object, &error))?;
    backend
        .stored_bytes
        .fetch_add(stored_bytes, Ordering::Relaxed);
    backend.reclaim.moved(stored_bytes);
    let entries = encoded.header.map_entries();
    Ok((LogChunk::new(id, &entries, stored_bytes), entries))
}

/// The extents of a chunk of these pieces, neighbours joined.
fn extents(pieces: &[Piece]) -> Vec<ChunkExtent> {
    let mut extents: Vec<ChunkExtent> = Vec::new();
    let mut raw = 0;
    for piece in pieces {
        match extents.last_mut() {
            Some(last) if last.start.add(Sectors::new(last.len.into())) == piece.start => {
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
