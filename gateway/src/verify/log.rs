//! The log of a head: every chunk's header, in order, and the seals at its ends.

use futures::StreamExt;
use quarry_objfmt::chunk::ChunkHeader;
use quarry_objfmt::head::LogRange;
use quarry_objfmt::{ChunkId, ChunkSeq, Lba, MapEntry, Sectors, WriteSeq, keys};
use quarry_volume::map::{Merger, Step};

use super::findings::Findings;
use super::{Check, read_head};
use crate::backend::open::{Entry, LOG_TOO_LONG, LogLeft, log_place};
use crate::store::StoreError;

/// Headers read side by side.
const HEADERS_AT_ONCE: usize = 8;

/// What no volume can be attached without.
const UNATTACHABLE: &str = "the volume cannot be attached";

/// The log, as far as it can be read.
pub(super) struct Log {
    /// What it gives to the sectors, the newest of each; sorted, disjoint.
    pub entries: Vec<MapEntry>,
    /// The number of the chunk that would come next.
    pub end: ChunkSeq,
    /// The newest write in it.
    pub last_write: WriteSeq,
    /// The volume's size: larger than the head's, if it has grown since.
    pub size: Sectors,
}

/// Reads and checks the log of the head.
pub(super) async fn walk(check: &Check, findings: &mut Findings) -> Result<Log, StoreError> {
    let head = &check.head;
    let mut walk = LogWalk {
        check,
        reached: Lba::ZERO,
        last_write: head.root_write,
        gap: false,
        left: LogLeft::default(),
        chunks: Vec::new(),
    };
    let mut end = head.log.first().map_or(ChunkSeq::new(1), |r| r.first);
    for range in &head.log {
        end = walk.range(range, findings).await?;
    }
    let mut size = head.size;
    if walk.reached.get() > size.get()
        && let Ok(now) = read_head(&check.store, &check.tenant, head.volume).await?
    {
        size = size.max(now.size);
    }
    // The newest first.
    walk.chunks.reverse();
    Ok(Log {
        entries: fold(walk.chunks),
        end,
        last_write: walk.last_write,
        size,
    })
}

struct LogWalk<'a> {
    check: &'a Check,
    /// Where what it gives ends: behind the head's size, if the volume has grown since.
    reached: Lba,
    last_write: WriteSeq,
    /// A chunk before could not be read: where the next begins is not known.
    gap: bool,
    /// What it may still have.
    left: LogLeft,
    chunks: Vec<Vec<MapEntry>>,
}

impl LogWalk<'_> {
    /// Answers the number behind the last chunk.
    async fn range(
        &mut self,
        range: &LogRange,
        findings: &mut Findings,
    ) -> Result<ChunkSeq, StoreError> {
        let open_end = self.headers(range, findings).await?;
        let Some(end) = range.end else {
            return Ok(open_end.unwrap_or(range.first));
        };
        let check = self.check;
        let id = chunk_id(check, range, end.get());
        let problem = match log_place(&check.store, &check.tenant, id).await? {
            Ok(Some(Entry::Seal(seal))) if seal.by <= check.head.epoch => return Ok(end),
            Ok(Some(Entry::Seal(seal))) => {
                format!("it was sealed by epoch {}, later than the head's", seal.by)
            }
            Ok(Some(Entry::Chunk(_))) => "a chunk lies where the log was sealed".to_owned(),
            Ok(None) => "the seal of the log is missing".to_owned(),
            Err(reason) => reason,
        };
        findings.add(
            &keys::chunk_key(&check.tenant, id),
            format!("{problem}; reads do not need it, but it keeps a writer of old out"),
        );
        Ok(end)
    }

    /// Answers where an open range ends. Nothing is asked for any more when this returns: what follows may need the
    /// places that it had.
    async fn headers(
        &mut self,
        range: &LogRange,
        findings: &mut Findings,
    ) -> Result<Option<ChunkSeq>, StoreError> {
        let check = self.check;
        let last = range.end.map_or(u64::MAX, ChunkSeq::get);
        let mut found = Box::pin(
            futures::stream::iter(range.first.get()..last)
                .map(|seq| async move {
                    let id = chunk_id(check, range, seq);
                    (id, log_place(&check.store, &check.tenant, id).await)
                })
                .buffered(HEADERS_AT_ONCE),
        );
        while let Some((id, at)) = found.next().await {
            let key = keys::chunk_key(&check.tenant, id);
            let problem = match at? {
                Ok(Some(Entry::Chunk(header))) if self.left.take(&header) => {
                    self.chunk(&key, &header, findings);
                    continue;
                }
                Ok(Some(Entry::Chunk(_))) => {
                    let finding = findings.add(&key, format!("{LOG_TOO_LONG}; {UNATTACHABLE}"));
                    findings.hit_all(finding, check.whole());
                    break;
                }
                // As far as an open range goes.
                Ok(None | Some(Entry::Seal(_))) if range.end.is_none() => return Ok(Some(id.seq)),
                Ok(None) => "a chunk of the log is missing".to_owned(),
                Ok(Some(Entry::Seal(_))) => "a seal lies inside the log".to_owned(),
                Err(reason) => reason,
            };
            let finding = findings.add(&key, format!("{problem}; {UNATTACHABLE}"));
            findings.hit_all(finding, check.whole());
            self.gap = true;
            // A head that names a row of nothing is not followed to its end.
            if findings.is_full() {
                break;
            }
        }
        Ok(None)
    }

    fn chunk(&mut self, key: &str, header: &ChunkHeader, findings: &mut Findings) {
        let before = header.first_write.get().checked_sub(1);
        if before != Some(self.last_write.get()) && !self.gap {
            let (first, last) = (header.first_write, self.last_write);
            let problem = format!("it starts at write {first}, the log before it ends at {last}");
            let finding = findings.add(key, format!("{problem}; {UNATTACHABLE}"));
            findings.hit_all(finding, self.check.whole());
        }
        self.gap = false;
        self.last_write = header.last_write;
        let mut entries = header.map_entries();
        entries.sort_unstable_by_key(|entry| entry.start);
        let end = entries.last().map_or(Lba::ZERO, MapEntry::end);
        self.reached = self.reached.max(end);
        self.chunks.push(entries);
    }
}

fn chunk_id(check: &Check, range: &LogRange, seq: u64) -> ChunkId {
    ChunkId {
        volume: check.head.volume,
        epoch: range.epoch,
        seq: ChunkSeq::new(seq),
    }
}

/// Makes one of lists of entries, the newest list first, each sorted and disjoint.
fn fold(mut lists: Vec<Vec<MapEntry>>) -> Vec<MapEntry> {
    // Always two that stand beside each other, so that each entry is moved log2(lists) times.
    while lists.len() > 1 {
        let mut next = Vec::with_capacity(lists.len().div_ceil(2));
        let mut pairs = lists.into_iter();
        while let Some(newer) = pairs.next() {
            next.push(match pairs.next() {
                Some(older) => merge(newer, older),
                None => newer,
            });
        }
        lists = next;
    }
    lists.pop().unwrap_or_default()
}

fn merge(newer: Vec<MapEntry>, older: Vec<MapEntry>) -> Vec<MapEntry> {
    let mut merger = Merger::new(2);
    let mut sources = [Some(newer), Some(older)];
    let mut merged = Vec::new();
    loop {
        match merger.step() {
            Step::Entry(entry) => merged.push(entry),
            Step::Done => return merged,
            Step::Need(source) => merger
                .feed(source, sources[source].take())
                .expect("a header's extents are disjoint, and these are sorted"),
        }
    }
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::Location;

    use super::*;

    fn zeroes(start: u64, len: u32) -> MapEntry {
        MapEntry {
            start: Lba::new(start),
            len,
            location: Location::Zero,
        }
    }

    #[test]
    fn lists_of_any_number_become_one_that_is_sorted_and_disjoint() {
        for count in 0..9 {
            let lists = (0..count).map(|n| vec![zeroes(n * 10, 15), zeroes(500 - n * 10, 10)]);
            let merged = fold(lists.collect());
            assert!(merged.windows(2).all(|w| w[0].end() <= w[1].start));
            let sectors: u64 = merged.iter().map(|e| u64::from(e.len)).sum();
            let expected = if count == 0 { 0 } else { count * 20 + 5 };
            assert_eq!(sectors, expected, "{count}: {merged:?}");
        }
    }
}
