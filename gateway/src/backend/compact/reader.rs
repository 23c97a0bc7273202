//! Reads the pieces of a stage: each chunk by windows, so that a chunk whose data lie in the order of
//! addresses, as in every chunk that is cut from the cache, is read about once.
//!
//! Memory: the windows that are kept, and the pieces that were asked for last.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream};
use quarry_objfmt::chunk::open_frame;
use quarry_objfmt::{ChunkId, DataKeys, SECTOR_SIZE, keys};
use quarry_volume::DataError;

use super::super::fetch::damaged;
use super::super::sound::{Unsound, insist};
use super::super::{VolumeBackend, aside, get_range};
use super::Piece;

/// A window is no shorter, however many chunks there are: a frame or so. Where more than fit are wanted,
/// some are read again.
pub(in super::super) const WINDOW_BYTES_MIN: u64 = 64 << 10;

/// Chunks read side by side.
const READS_AT_ONCE: usize = 16;

/// Stored bytes of a chunk, from a place of its object on.
#[derive(Clone)]
struct Window {
    first: u64,
    stored: Bytes,
}

impl Window {
    fn has(&self, range: &Range<u64>) -> bool {
        let end = self.first + self.stored.len() as u64;
        self.first <= range.start && range.end <= end
    }
}

/// Where a piece's frame lies in the object.
fn stored(piece: &Piece) -> Range<u64> {
    let from = u64::from(piece.at.stored_offset);
    from..from + u64::from(piece.at.stored_len)
}

pub(super) struct Reader<'a> {
    backend: &'a VolumeBackend,
    /// What the stage needs of each chunk, in the order of the object.
    needed: HashMap<ChunkId, Arc<[Range<u64>]>>,
    window_bytes: u64,
    windows: HashMap<ChunkId, Window>,
}

/// A piece, by its number among those that were asked for.
type Numbered = (usize, Piece);

impl<'a> Reader<'a> {
    /// Of the pieces of a stage.
    pub(super) fn new(backend: &'a VolumeBackend, pieces: &[Piece]) -> Self {
        let mut needed: HashMap<ChunkId, Vec<Range<u64>>> = HashMap::new();
        for piece in pieces {
            needed
                .entry(piece.at.chunk)
                .or_default()
                .push(stored(piece));
        }
        let sorted = |mut ranges: Vec<Range<u64>>| {
            ranges.sort_unstable_by_key(|range| range.start);
            ranges.dedup();
            ranges.into()
        };
        let share = backend.common.reclaim.window_bytes / needed.len().max(1) as u64;
        Self {
            backend,
            needed: needed.into_iter().map(|(c, r)| (c, sorted(r))).collect(),
            window_bytes: share.max(WINDOW_BYTES_MIN),
            windows: HashMap::new(),
        }
    }

    /// The contents of some of the pieces, in their order.
    ///
    /// # Errors
    /// The chunk that cannot be read, and why.
    pub(super) async fn contents(
        &mut self,
        pieces: &[Piece],
    ) -> Result<Vec<Bytes>, (ChunkId, DataError)> {
        let mut chunks: BTreeMap<ChunkId, Vec<Numbered>> = BTreeMap::new();
        for (number, piece) in pieces.iter().enumerate() {
            let of = chunks.entry(piece.at.chunk).or_default();
            of.push((number, *piece));
        }
        let reads: Vec<_> = chunks
            .into_iter()
            .map(|(chunk, mut pieces)| {
                pieces.sort_unstable_by_key(|(_, piece)| piece.at.raw);
                let job = Job {
                    backend: self.backend,
                    chunk,
                    pieces,
                    needed: Arc::clone(&self.needed[&chunk]),
                    window_bytes: self.window_bytes,
                    window: self.windows.remove(&chunk),
                };
                job.run().boxed()
            })
            .collect();
        let mut kept: u64 = self.windows.values().map(|w| w.stored.len() as u64).sum();
        let mut data = vec![Bytes::new(); pieces.len()];
        let mut reads = stream::iter(reads).buffer_unordered(READS_AT_ONCE);
        while let Some(read) = reads.next().await {
            let (chunk, contents, window) = read?;
            for (number, bytes) in contents {
                data[number] = bytes;
            }
            if let Some(window) = window
                && kept + window.stored.len() as u64 <= self.backend.common.reclaim.window_bytes
            {
                kept += window.stored.len() as u64;
                self.windows.insert(chunk, window);
            }
        }
        Ok(data)
    }
}

/// Reading some pieces of one chunk.
struct Job<'a> {
    backend: &'a VolumeBackend,
    chunk: ChunkId,
    /// In the order of the raw space.
    pieces: Vec<Numbered>,
    needed: Arc<[Range<u64>]>,
    window_bytes: u64,
    window: Option<Window>,
}

impl Job<'_> {
    async fn run(
        self,
    ) -> Result<(ChunkId, Vec<(usize, Bytes)>, Option<Window>), (ChunkId, DataError)> {
        let mut contents = Vec::with_capacity(self.pieces.len());
        let mut window = self.window.clone();
        let mut rest = &self.pieces[..];
        while let Some((_, first)) = rest.first() {
            if let Some(held) = window.take() {
                let inside = Self::inside(rest, &held);
                // What does not decode is read again.
                if inside > 0
                    && let Ok(cut) = self.cut_out(&held, &rest[..inside]).await
                {
                    contents.extend(cut);
                    rest = &rest[inside..];
                    window = Some(held);
                    continue;
                }
            }
            let (cut, read) = self.read(stored(first), rest).await?;
            rest = &rest[cut.len()..];
            contents.extend(cut);
            window = Some(read);
        }
        Ok((self.chunk, contents, window))
    }

    /// How many of the pieces the window has, from the first on.
    fn inside(pieces: &[Numbered], window: &Window) -> usize {
        let inside = pieces.iter().take_while(|(_, p)| window.has(&stored(p)));
        inside.count()
    }

    /// Reads a window that begins with `first`, and cuts out what it has of the pieces.
    async fn read(
        &self,
        first: Range<u64>,
        pieces: &[Numbered],
    ) -> Result<(Vec<(usize, Bytes)>, Window), (ChunkId, DataError)> {
        let behind = self.needed.partition_point(|r| r.start < first.start);
        let fits = |range: &&Range<u64>| range.end - first.start <= self.window_bytes;
        let last = self.needed[behind..].iter().take_while(fits).last();
        let range = first.start..last.map_or(first.end, |range| range.end);
        let object = keys::chunk_key(self.backend.head.tenant(), self.chunk);
        let attempt = async || {
            let stored = get_range(&*self.backend.common.background, &object, &range).await?;
            let first = range.start;
            let window = Window { first, stored };
            let inside = Self::inside(pieces, &window).max(1);
            let cut = self.cut_out(&window, &pieces[..inside]).await;
            Ok((cut.map_err(Unsound::Damaged)?, window))
        };
        let read = insist(attempt).await;
        read.map_err(|unsound| (self.chunk, damaged(object, &unsound)))
    }

    async fn cut_out(
        &self,
        window: &Window,
        pieces: &[Numbered],
    ) -> Result<Vec<(usize, Bytes)>, String> {
        let (window, pieces) = (window.clone(), pieces.to_vec());
        let (chunk, frame_sectors) = (self.chunk, self.backend.head.frame_sectors());
        let keys = self.backend.keys();
        let cut = move || cut_out(&window, chunk, &pieces, frame_sectors, keys.as_deref());
        aside(cut).await.map_err(|e| e.to_string()).flatten()
    }
}

/// Decodes the frames of the pieces, which are in the order of the raw space, and keeps only the pieces.
fn cut_out(
    window: &Window,
    chunk: ChunkId,
    pieces: &[Numbered],
    frame_sectors: u32,
    keys: Option<&DataKeys>,
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
                let from = stored(piece).start.checked_sub(window.first);
                let from = from.and_then(|from| usize::try_from(from).ok());
                let from = from.ok_or("a frame lies before the answer")?;
                let whole = window.stored.get(from..from + piece.at.stored_len as usize);
                let whole = window
                    .stored
                    .slice_ref(whole.ok_or("the answer is too short")?);
                let raw = open_frame(&whole, chunk, index, frame_sectors, keys);
                &frame.insert((index, raw.map_err(|e| e.to_string())?)).1
            }
        };
        let from = bytes(piece.at.raw % frame_sectors);
        let part = raw.get(from..from + bytes(piece.len));
        kept.extend_from_slice(part.ok_or("a frame is shorter than the map says")?);
    }
    let kept = Bytes::from(kept);
    let mut at = 0;
    let cut = |(number, piece): &Numbered| {
        let part = kept.slice(at..at + bytes(piece.len));
        at += part.len();
        (*number, part)
    };
    Ok(pieces.iter().map(cut).collect())
}
