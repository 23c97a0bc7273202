//! One chunk, and what the map needs of it.

use std::collections::HashMap;

use bytes::Bytes;
use quarry_objfmt::chunk::{
    CHUNK_PREFIX_LEN, ChunkHeader, ExtentBody, LogObject, classify, open_frame,
};
use quarry_objfmt::frame::FRAME_OVERHEAD_MAX;
use quarry_objfmt::{ChunkId, DataLoc, Encryption, MapEntry, SECTOR_SIZE, WrappedKey, keys};

use super::{Check, add, is_damage};
use crate::backend::open::HEADER_GUESS;
use crate::backend::{DAMAGE_RETRIES_MAX, Unsound, insist, told};
use crate::store::{Store, StoreError};

/// Bytes of frames read at once, unless a single frame has more.
pub(super) const GET_BYTES: u64 = 1 << 20;

/// An entry of the map, seen from its chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Ref {
    /// The first sector in the volume.
    start: u64,
    /// How many.
    len: u32,
    /// The first in the chunk's raw space.
    raw: u32,
    /// The frame's place in the object.
    offset: u32,
    stored: u32,
}

impl Ref {
    pub fn new(entry: &MapEntry, data: &DataLoc) -> Self {
        Self {
            start: entry.start.get(),
            len: entry.len,
            raw: data.raw,
            offset: data.stored_offset,
            stored: data.stored_len,
        }
    }

    fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.stored)
    }
}

/// What is wrong with a chunk, and which sectors of the volume are hit.
#[derive(Debug)]
pub(super) struct Fault {
    pub object: String,
    pub problem: String,
    /// First sector and number.
    pub ranges: Vec<(u64, u32)>,
}

/// Checks a chunk, and that it holds what `refs` need of it.
pub(super) async fn check_chunk(
    check: &Check,
    id: ChunkId,
    refs: Vec<Ref>,
) -> Result<Vec<Fault>, StoreError> {
    let mut one = OneChunk {
        check,
        id,
        key: keys::chunk_key(&check.tenant, id),
        refs,
        faults: Vec::new(),
    };
    one.check().await?;
    Ok(one.faults)
}

struct OneChunk<'a> {
    check: &'a Check,
    id: ChunkId,
    key: String,
    /// Those that are not hit yet.
    refs: Vec<Ref>,
    faults: Vec<Fault>,
}

impl OneChunk<'_> {
    /// Notes what is wrong; the entries that `hit` says are out of it from then on.
    fn fault(&mut self, problem: String, hit: impl Fn(&Ref) -> bool) {
        let (hit, left) = self.refs.iter().partition(|r| hit(r));
        let hit: Vec<Ref> = hit;
        self.refs = left;
        self.faults.push(Fault {
            object: self.key.clone(),
            problem,
            ranges: hit.iter().map(|r| (r.start, r.len)).collect(),
        });
    }

    async fn check(&mut self) -> Result<(), StoreError> {
        let prefix = match self.check.store.get_prefix(&self.key, HEADER_GUESS).await {
            Ok(prefix) => prefix,
            Err(StoreError::NotFound { .. }) => {
                self.fault("it is missing".to_owned(), |_| true);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        match self.header(&prefix).await? {
            Ok(Some(header)) => self.compare(&header),
            Ok(None) => {
                self.fault("a seal lies in its place".to_owned(), |_| true);
                return Ok(());
            }
            // The map says where the frames are: readers do not need the header.
            Err(reason) => self.fault(
                format!("its header: {reason}; reads do not need it, but a rescue would"),
                |_| false,
            ),
        }
        if self.check.deep {
            self.frames().await
        } else {
            let whole = (prefix.len() as u64) < HEADER_GUESS;
            self.length(whole.then_some(prefix.len() as u64)).await
        }
    }

    /// Its header, or none if it is a seal.
    async fn header(
        &self,
        prefix: &Bytes,
    ) -> Result<Result<Option<ChunkHeader>, String>, StoreError> {
        let mut prefix = prefix.clone();
        let mut tries = 0;
        loop {
            let reason = match classify(&prefix) {
                Ok(LogObject::Seal) => return Ok(Ok(None)),
                Ok(LogObject::Chunk) => match self.decode_header(&prefix).await? {
                    Ok(header) => return Ok(Ok(Some(header))),
                    Err(reason) => reason,
                },
                Err(error) => error.to_string(),
            };
            tries += 1;
            if tries > DAMAGE_RETRIES_MAX {
                return Ok(Err(reason));
            }
            prefix = self.check.store.get_prefix(&self.key, HEADER_GUESS).await?;
        }
    }

    async fn decode_header(
        &self,
        prefix: &Bytes,
    ) -> Result<Result<ChunkHeader, String>, StoreError> {
        let Some(first) = prefix.get(..CHUNK_PREFIX_LEN) else {
            return Ok(Err("it is cut off".to_owned()));
        };
        let needed = match ChunkHeader::encoded_len(first) {
            Ok(needed) => needed,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let bytes = if needed <= prefix.len() {
            prefix.clone()
        } else {
            let store = &self.check.store;
            match store.get_range(&self.key, 0..needed as u64).await {
                Ok(bytes) => bytes,
                Err(error) if is_damage(&error) => return Ok(Err(error.to_string())),
                Err(error) => return Err(error),
            }
        };
        Ok(ChunkHeader::decode(&bytes, self.id).map_err(|e| e.to_string()))
    }

    /// Whether the header says the same as the map.
    fn compare(&mut self, header: &ChunkHeader) {
        if header.frame_sectors != self.check.head.frame_sectors {
            let problem = "its frames are not as long as the volume's".to_owned();
            return self.fault(problem, |_| true);
        }
        let (head, generation) = (&self.check.head, header.generation);
        let is_its =
            |key: &WrappedKey| (key.volume, key.generation) == (self.id.volume, generation);
        if head.encryption != Encryption::None && !head.keys.keys.iter().any(is_its) {
            let problem =
                format!("it is encrypted with data key {generation}, which the head does not have");
            return self.fault(problem, |_| true);
        }
        // By raw sector, where each data extent starts and how long it is; those that go on from the one
        // before are one, as an entry of the map may go over both.
        let mut pieces: Vec<(u32, u64, u32)> = Vec::new();
        for extent in &header.extents {
            let ExtentBody::Data { raw } = extent.body else {
                continue;
            };
            let start = extent.start.get();
            match pieces.last_mut() {
                Some((_, first, len)) if *first + u64::from(*len) == start => *len += extent.len,
                _ => pieces.push((raw, start, extent.len)),
            }
        }
        let agrees = |needed: &Ref| {
            let frame = header
                .frames
                .get((needed.raw / header.frame_sectors) as usize);
            let at = pieces.partition_point(|(raw, ..)| *raw <= needed.raw);
            let piece = at.checked_sub(1).map(|at| pieces[at]);
            frame.is_some_and(|f| (f.stored_offset, f.stored_len) == (needed.offset, needed.stored))
                && piece.is_some_and(|(raw, start, len)| {
                    let skip = needed.raw - raw;
                    start + u64::from(skip) == needed.start
                        && u64::from(skip) + u64::from(needed.len) <= u64::from(len)
                })
        };
        if !self.refs.iter().all(agrees) {
            let problem = "it holds other sectors, or elsewhere, than the map says".to_owned();
            self.fault(problem, |needed| !agrees(needed));
        }
    }

    /// Whether the object is as long as is needed; `len` if that is known.
    async fn length(&mut self, len: Option<u64>) -> Result<(), StoreError> {
        let mut ends: Vec<u64> = self.refs.iter().map(Ref::end).collect();
        ends.sort_unstable();
        ends.dedup();
        let there = match len {
            Some(len) => ends.partition_point(|end| *end <= len),
            // The last first: nearly always it is there, and so are all before it.
            None => {
                let (mut low, mut high) = (0, ends.len());
                let mut at = high;
                while low < high {
                    if self.is_there(ends[at - 1]).await? {
                        low = at;
                    } else {
                        high = at - 1;
                    }
                    at = low + (high - low).div_ceil(2);
                }
                low
            }
        };
        if let Some(&first) = ends.get(there) {
            let problem = format!(
                "it is cut off: {} bytes are needed of it",
                ends[ends.len() - 1]
            );
            self.fault(problem, |needed| needed.end() >= first);
        }
        Ok(())
    }

    /// Whether the object has the byte before `end`.
    async fn is_there(&self, end: u64) -> Result<bool, StoreError> {
        match self.check.store.get_range(&self.key, end - 1..end).await {
            Ok(_) => Ok(true),
            Err(error) if is_damage(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads and decodes every frame that is needed.
    async fn frames(&mut self) -> Result<(), StoreError> {
        let frame_sectors = self.check.head.frame_sectors;
        let mut frames: Vec<Frame> = Vec::new();
        self.refs.sort_unstable_by_key(|r| (r.offset, r.raw));
        for needed in &self.refs {
            let (index, within) = (needed.raw / frame_sectors, needed.raw % frame_sectors);
            let sectors = u64::from(within) + u64::from(needed.len);
            let frame = Frame {
                index,
                offset: needed.offset,
                stored: needed.stored,
                sectors,
            };
            match frames.last_mut() {
                Some(last) if last.key() == frame.key() => last.sectors = last.sectors.max(sectors),
                _ => frames.push(frame),
            }
        }
        let mut bad: HashMap<(u32, u32, u32), String> = HashMap::new();
        let mut rest = &frames[..];
        while !rest.is_empty() {
            let (together, left) = rest.split_at(row(rest));
            rest = left;
            let got = if together.len() == 1 {
                None
            } else {
                self.fetch(together).await?.ok()
            };
            let got = got.unwrap_or_else(|| vec![Err(String::new()); together.len()]);
            for (frame, result) in together.iter().zip(got) {
                if result.is_err()
                    && let Err(reason) = self.alone(*frame).await?
                {
                    bad.insert(frame.key(), reason);
                }
                add(&self.check.progress.frames, 1);
            }
        }
        if let Some(first) = frames.iter().find(|f| bad.contains_key(&f.key())) {
            let problem = format!(
                "{} of the {} frames needed of it cannot be read; the first is frame {}: {}",
                bad.len(),
                frames.len(),
                first.index,
                bad[&first.key()]
            );
            self.fault(problem, |r| {
                bad.contains_key(&(r.raw / frame_sectors, r.offset, r.stored))
            });
        }
        Ok(())
    }

    /// A frame that could not be had with others, asked for as often as a reader does.
    async fn alone(&self, frame: Frame) -> Result<Result<(), String>, StoreError> {
        let longest = self.check.head.frame_sectors as usize * SECTOR_SIZE as usize;
        if frame.stored as usize > longest + FRAME_OVERHEAD_MAX {
            return Ok(Err(
                "the map says that it is longer than a frame can be".to_owned()
            ));
        }
        let attempt = || async {
            let results = self.fetch(&[frame]).await.map_err(Unsound::Store)?;
            let alone = results.and_then(|mut results| results.pop().unwrap_or(Ok(())));
            alone.map_err(Unsound::Damaged)
        };
        told(insist(attempt).await)
    }

    /// Reads frames that lie end to end, and decodes them.
    async fn fetch(
        &self,
        frames: &[Frame],
    ) -> Result<Result<Vec<Result<(), String>>, String>, StoreError> {
        let (first, last) = (frames[0], frames[frames.len() - 1]);
        let range = u64::from(first.offset)..last.end();
        let stored = match self.check.store.get_range(&self.key, range).await {
            Ok(stored) => stored,
            Err(error) if is_damage(&error) => return Ok(Err(error.to_string())),
            Err(error) => return Err(error),
        };
        let (frames, id) = (frames.to_vec(), self.id);
        let frame_sectors = self.check.head.frame_sectors;
        let keys = self.check.keys.clone();
        let decode = move || {
            let one = |frame: &Frame| {
                let from = (frame.offset - first.offset) as usize;
                let bytes = stored
                    .get(from..from + frame.stored as usize)
                    .ok_or("the answer is too short")?;
                let bytes = stored.slice_ref(bytes);
                let raw = open_frame(&bytes, id, frame.index, frame_sectors, keys.as_deref())
                    .map_err(|e| e.to_string())?;
                if frame.sectors * u64::from(SECTOR_SIZE) > raw.len() as u64 {
                    return Err("it holds less than the map says".to_owned());
                }
                Ok(())
            };
            frames.iter().map(one).collect::<Vec<_>>()
        };
        match tokio::task::spawn_blocking(decode).await {
            Ok(results) => Ok(Ok(results)),
            Err(error) => Ok(Err(error.to_string())),
        }
    }
}

/// A frame, and how much of it is needed.
#[derive(Clone, Copy, Debug)]
struct Frame {
    index: u32,
    offset: u32,
    stored: u32,
    /// Sectors from its start.
    sectors: u64,
}

impl Frame {
    const fn key(&self) -> (u32, u32, u32) {
        (self.index, self.offset, self.stored)
    }

    fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.stored)
    }
}

/// How many frames from the first on lie end to end and are read at once; one at least.
fn row(frames: &[Frame]) -> usize {
    let from = u64::from(frames[0].offset);
    let goes_on = |pair: &&[Frame]| {
        pair[0].end() == u64::from(pair[1].offset) && pair[1].end() - from <= GET_BYTES
    };
    1 + frames.windows(2).take_while(goes_on).count()
}
