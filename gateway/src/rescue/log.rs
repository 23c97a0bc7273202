//! The log behind a map, followed from chunk to chunk and from seal to seal.

use quarry_objfmt::chunk::ChunkHeader;
use quarry_objfmt::head::LogRange;
use quarry_objfmt::map::Basis;
use quarry_objfmt::{ChunkId, ChunkSeq, Epoch, Sectors, VolumeId, WriteSeq};

use super::Listed;
use crate::backend::open::{Entry, log_place};
use crate::control::VolumeRef;
use crate::store::{Store, StoreError};

/// A log, as far as it goes.
pub(super) struct Followed {
    /// Its ranges; the last may be open, and is there even if it is empty: it says where the log goes on.
    pub log: Vec<LogRange>,
    /// The number of the chunk that would come next.
    pub end: ChunkSeq,
    /// Epochs in which a writer may still be, to be sealed at the end.
    pub open: Vec<Epoch>,
    /// Something that is no chunk lies at the end, where then no writer can put one.
    pub blocked: bool,
    /// Why it ends there.
    pub ends: String,
    /// Objects behind the end, of the last epoch and later ones.
    pub left_behind: u64,
    /// The newest write before the first chunk.
    pub root_write: WriteSeq,
    pub last_write: WriteSeq,
    pub frame_sectors: u32,
    /// The end of the last sector that a chunk of it writes.
    pub size_min: Sectors,
    /// The latest epoch that it tells of.
    pub epoch_max: Epoch,
}

/// From where on a log is followed.
pub(super) enum Start {
    /// Of a map that says nothing, or of none: from behind the newest chunk that the map names, from the first chunk if
    /// it names none; but from no earlier than where the map's epoch has begun.
    Newest(Option<ChunkId>, Option<ChunkId>),
    /// From where a map of this epoch says: what it does not need of the chunks before may be deleted.
    Basis(Epoch, Basis),
}

/// Follows the log behind a map. The inner error says why there is none.
pub(super) async fn follow(
    store: &dyn Store,
    volume: &VolumeRef,
    id: VolumeId,
    listed: &Listed,
    start: Start,
) -> Result<Result<Followed, String>, StoreError> {
    let mut follow = Follow {
        store,
        volume,
        id,
        listed,
    };
    follow.run(start).await
}

struct Follow<'a> {
    store: &'a dyn Store,
    volume: &'a VolumeRef,
    id: VolumeId,
    listed: &'a Listed,
}

impl Follow<'_> {
    async fn run(&mut self, start: Start) -> Result<Result<Followed, String>, StoreError> {
        let (newest, begun, basis) = match start {
            Start::Newest(newest, begun) => (newest, begun, None),
            Start::Basis(epoch, basis) => (None, None, Some((epoch, basis))),
        };
        // What the header of the newest chunk in the map says; its log goes on from there.
        let mut before: Option<ChunkHeader> = None;
        let (mut epoch, mut first) = match newest {
            None if let Some((epoch, basis)) = &basis => {
                let first = basis.log_end.max(ChunkSeq::new(1));
                // A clone's first map is of an epoch that has no log: nobody had to seal one.
                (self.lowest(*epoch, first).unwrap_or(*epoch), first)
            }
            Some(chunk) => {
                if let Ok(Some(Entry::Chunk(header))) = self.place(chunk.epoch, chunk.seq).await? {
                    before = Some(header);
                }
                (chunk.epoch, chunk.seq.next())
            }
            None => {
                let first = ChunkSeq::new(1);
                match self.lowest(Epoch::ZERO, first).or(begun.map(|b| b.epoch)) {
                    Some(epoch) => (epoch, first),
                    None => return Ok(Err("the first chunk of the log is missing".to_owned())),
                }
            }
        };
        let behind = begun.filter(|b| b.seq > first);
        if let Some(begun) = behind {
            (epoch, first) = (begun.epoch, begun.seq);
        }
        let mut range = LogRange {
            epoch,
            first,
            end: None,
        };
        let mut log = Vec::new();
        let mut end = first;
        let mut open = vec![epoch];
        let mut epoch_max = epoch;
        // What lies between the newest chunk of the map and where its epoch began is in it, or was left
        // behind: the first chunk tells how writes are numbered.
        let known = before.as_ref().map(|header| header.last_write);
        let known = known.or(basis.map(|(_, basis)| basis.root_write));
        let mut root_write = known.filter(|_| behind.is_none());
        let at_first = newest.is_none() && behind.is_none() && basis.is_none();
        let mut last_write = root_write.or(at_first.then_some(WriteSeq::ZERO));
        let mut frame_sectors = before.as_ref().map(|header| header.frame_sectors);
        frame_sectors = frame_sectors.or(basis.map(|(_, basis)| basis.frame_sectors));
        let mut size_min = 0;
        let (ends, blocked) = loop {
            match self.place(range.epoch, end).await? {
                Ok(Some(Entry::Chunk(header))) => {
                    let first = header.first_write;
                    let due = |last: &WriteSeq| first.get().checked_sub(1) == Some(last.get());
                    if let Some(last) = last_write.filter(|last| !due(last)) {
                        let why = format!(
                            "chunk {end} starts at write {first}, and the log before it ends at {last}"
                        );
                        break (why, true);
                    }
                    let ahead = first.get().saturating_sub(1);
                    root_write.get_or_insert(WriteSeq::new(ahead));
                    last_write = Some(header.last_write);
                    frame_sectors.get_or_insert(header.frame_sectors);
                    let ends = header.extents.iter();
                    let ends = ends.map(|e| e.end().get());
                    size_min = ends.fold(size_min, u64::max);
                    end = end.next();
                }
                Ok(Some(Entry::Seal(seal))) => {
                    epoch_max = epoch_max.max(seal.by);
                    range.end = Some(end);
                    let Some(next) = self.lowest(seal.by, end) else {
                        open = vec![seal.by];
                        break ("it is sealed there".to_owned(), false);
                    };
                    if range.first < end {
                        log.push(range);
                    }
                    range = LogRange {
                        epoch: next,
                        first: end,
                        end: None,
                    };
                    open = vec![next];
                }
                Ok(None) => break (format!("there is no chunk {end}"), false),
                Err(reason) => break (format!("chunk {end}: {reason}"), true),
            }
        };
        epoch_max = epoch_max.max(range.epoch);
        log.push(range);
        let (Some(root_write), Some(frame_sectors)) = (root_write.or(known), frame_sectors) else {
            return Ok(Err(format!("no chunk tells how it goes on; {ends}")));
        };
        Ok(Ok(Followed {
            left_behind: self.behind(&range, end),
            log,
            end,
            open,
            blocked,
            ends,
            root_write,
            last_write: last_write.unwrap_or(root_write),
            frame_sectors,
            size_min: Sectors::new(size_min),
            epoch_max,
        }))
    }

    /// The lowest epoch from `from` on that has anything at a place.
    fn lowest(&self, from: Epoch, seq: ChunkSeq) -> Option<Epoch> {
        let mut epochs = self.listed.chunks.range(from..);
        epochs
            .find(|(_, seqs)| seqs.contains(&seq.get()))
            .map(|(epoch, _)| *epoch)
    }

    /// How many objects lie behind the end of the last range. Behind its seal there is nothing that ever
    /// was the volume's.
    fn behind(&self, range: &LogRange, end: ChunkSeq) -> u64 {
        let count = |(of, seqs): (&Epoch, &std::collections::BTreeSet<u64>)| {
            let from = match (*of == range.epoch, range.end) {
                (false, _) => 0,
                (true, None) => end.get(),
                (true, Some(_)) => return 0,
            };
            seqs.range(from..).count() as u64
        };
        self.listed.chunks.range(range.epoch..).map(count).sum()
    }

    /// What is at a place of the log, or why that cannot be told.
    async fn place(
        &self,
        epoch: Epoch,
        seq: ChunkSeq,
    ) -> Result<Result<Option<Entry>, String>, StoreError> {
        let id = ChunkId {
            volume: self.id,
            epoch,
            seq,
        };
        log_place(self.store, &self.volume.tenant, id).await
    }
}
