//! A volume without its data: what its store is asked for, and keeps, by the rules that the daemon goes by.
//!
//! The limits are the daemon's own ([`Tuning`], [`plan_runs`]); the rest is counted here, a block at a time: when a
//! chunk is cut, what of it is still needed later, when the log is folded, what of the map a merge rewrites, when
//! compaction begins and what it moves. The test below holds the result to a real daemon's.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::ops::AddAssign;

use quarry_volume::map::plan_runs;
use quarry_volume::{CHECKPOINT_CHUNKS_MIN, CHECKPOINT_SHARE, Tuning};

/// The grain of writes and of what is needed: 4 KiB.
pub const BLOCK: u64 = 4096;
/// What a read that misses asks for: a frame.
const FRAME_BLOCKS: u64 = 16;
const SECTORS_A_BLOCK: u64 = BLOCK / 512;

/// Bytes of a chunk's header for each extent, and beside them.
const EXTENT_BYTES: u64 = 6;
const HEADER_BYTES: u64 = 128;
/// Bytes of the map for each entry: those of a map of 2^28 of them (`gateway/tests/full_volume.rs`).
const ENTRY_BYTES: u64 = 11;
/// A map object is cut at so many bytes, and read in such pieces by merges and counts.
const TABLE_BYTES: u64 = 8 << 20;
const MAP_READ_BYTES: u64 = 1 << 20;
const HEAD_BYTES: u64 = 1024;

/// As in `gateway/src/backend/reclaim.rs`.
const DEBT_START_PERCENT: u64 = 31;
const DEBT_STOP_PERCENT: u64 = 30;
const VICTIM_NEEDED_PERCENT_MAX: u64 = 90;
const MOVED_BYTES_MIN: u64 = 64 << 20;
const READ_SHARE: u64 = 4;
const PATIENCE_MAX: u64 = 16;

/// What was asked of the store.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Bill {
    pub puts: u64,
    pub gets: u64,
    pub deletes: u64,
    pub put_bytes: u64,
    pub got_bytes: u64,
    /// Of the bytes put: of the map; by compaction.
    pub map_bytes: u64,
    pub moved_bytes: u64,
    /// Written by the volume's user, and how many writes.
    pub written_bytes: u64,
    pub writes: u64,
    /// What a store of 256 KiB blocks, each an object, would have been put in the same batches.
    pub block_puts: u64,
}

impl AddAssign<&Self> for Bill {
    fn add_assign(&mut self, other: &Self) {
        self.puts += other.puts;
        self.gets += other.gets;
        self.deletes += other.deletes;
        self.put_bytes += other.put_bytes;
        self.got_bytes += other.got_bytes;
        self.map_bytes += other.map_bytes;
        self.moved_bytes += other.moved_bytes;
        self.written_bytes += other.written_bytes;
        self.writes += other.writes;
        self.block_puts += other.block_puts;
    }
}

/// What a volume has in the store at a time.
#[derive(Clone, Copy, Default, Debug)]
pub struct Stock {
    pub objects: u64,
    pub bytes: u64,
    pub live_bytes: u64,
    pub map_entries: u64,
    pub map_bytes: u64,
}

impl AddAssign<&Self> for Stock {
    fn add_assign(&mut self, other: &Self) {
        self.objects += other.objects;
        self.bytes += other.bytes;
        self.live_bytes += other.live_bytes;
        self.map_entries += other.map_entries;
        self.map_bytes += other.map_bytes;
    }
}

/// How a volume is kept.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub tuning: Tuning,
    pub debt_min: u64,
    pub horizon_ms: u64,
    /// Blocks of it that its host's cache holds.
    pub cache_blocks: u64,
    /// Whether a flush waits for the store.
    pub flush_to_store: bool,
    /// Stored bytes a byte, in hundredths.
    pub compression_percent: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            tuning: Tuning::default(),
            debt_min: 32 << 20,
            horizon_ms: 15 * 60 * 1000,
            cache_blocks: u64::MAX,
            flush_to_store: false,
            compression_percent: 100,
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Chunk {
    data: u32,
    needed: u32,
    bytes: u64,
}

/// What is written and not cut yet.
#[derive(Default)]
struct Batch {
    blocks: BTreeSet<u64>,
    raw: u64,
    writes: usize,
    since_ms: u64,
}

/// A volume that is attached and written to.
pub struct Volume {
    settings: Settings,
    now_ms: u64,
    /// The chunk that has each block, plus one.
    owner: Vec<u32>,
    chunks: Vec<Chunk>,
    batch: Batch,
    log_chunks: u64,
    log_covered: u64,
    log_entries: u64,
    /// Entries of the map's runs, newest first.
    runs: Vec<u64>,
    /// Uploaded since compaction last looked.
    credit: u64,
    patience: u64,
    /// Chunks that nothing needs, with the time of their end.
    dead: VecDeque<(u64, u64)>,
    /// Chunks cut from what was written.
    cut_chunks: u64,
    bill: Bill,
    cache: Cache,
}

impl Volume {
    pub fn new(size: u64, settings: Settings) -> Self {
        let blocks = usize::try_from(size / BLOCK).expect("a volume of this machine's memory");
        Self {
            settings,
            now_ms: 0,
            owner: vec![0; blocks],
            chunks: Vec::new(),
            batch: Batch::default(),
            log_chunks: 0,
            log_covered: 0,
            log_entries: 0,
            runs: Vec::new(),
            credit: 0,
            patience: 1,
            dead: VecDeque::new(),
            cut_chunks: 0,
            bill: Bill::default(),
            cache: Cache::new(settings.cache_blocks / FRAME_BLOCKS),
        }
    }

    /// What was asked of the store since this was last taken.
    pub fn take_bill(&mut self) -> Bill {
        std::mem::take(&mut self.bill)
    }

    pub fn blocks(&self) -> u64 {
        self.owner.len() as u64
    }

    /// Lets time pass.
    pub fn at(&mut self, now_ms: u64) {
        let due = self.batch.since_ms + self.settings.tuning.writeback_delay_ms;
        if self.batch.writes > 0 && due <= now_ms {
            self.now_ms = due;
            self.cut();
        }
        self.now_ms = now_ms;
        while let Some((end_ms, _)) = self.dead.front()
            && end_ms + self.settings.horizon_ms <= now_ms
        {
            self.dead.pop_front();
            self.bill.deletes += 1;
        }
    }

    pub fn write(&mut self, first: u64, count: u64) {
        if self.batch.writes == 0 {
            self.batch.since_ms = self.now_ms;
        }
        for block in first..first + count {
            self.batch.blocks.insert(block);
        }
        self.cache.keep(first, count);
        self.batch.raw += count * BLOCK;
        self.batch.writes += 1;
        self.bill.writes += 1;
        self.bill.written_bytes += count * BLOCK;
        let tuning = &self.settings.tuning;
        let full = u64::from(tuning.chunk_sectors_max) * 512;
        if self.batch.raw >= full || self.batch.writes >= tuning.chunk_writes_max {
            self.cut();
        }
    }

    pub fn flush(&mut self) {
        if self.settings.flush_to_store && self.batch.writes > 0 {
            self.cut();
        }
    }

    pub fn read(&mut self, first: u64, count: u64) {
        // Neighbouring frames that are missing are asked for together.
        let mut joined = false;
        for frame in first / FRAME_BLOCKS..=(first + count - 1) / FRAME_BLOCKS {
            let block = usize::try_from(frame * FRAME_BLOCKS).unwrap_or(usize::MAX);
            let is_written = self.owner.get(block).is_some_and(|owner| *owner > 0);
            if self.cache.has(frame) || !is_written {
                joined = false;
                continue;
            }
            self.bill.gets += u64::from(!joined);
            self.bill.got_bytes += FRAME_BLOCKS * BLOCK * self.settings.compression_percent / 100;
            joined = true;
        }
    }

    /// What is written is uploaded.
    pub fn cut_all(&mut self) {
        if self.batch.writes > 0 {
            self.cut();
        }
    }

    /// What is written is uploaded, and folded into the map.
    pub fn drain(&mut self) {
        self.cut_all();
        if self.log_chunks > 0 {
            self.fold();
        }
    }

    /// Where a run of blocks begins that is not the one before it and one.
    fn runs_of(blocks: impl Iterator<Item = u64>) -> u64 {
        let mut next = None;
        let begins = |block: &u64| {
            let begins = next != Some(*block);
            next = Some(block + 1);
            begins
        };
        blocks.filter(begins).count() as u64
    }

    fn own(&mut self, block: u64, chunk: u32) {
        let owner = &mut self.owner[usize::try_from(block).unwrap_or(usize::MAX)];
        let before = std::mem::replace(owner, chunk);
        if before > 0 {
            let before = &mut self.chunks[before as usize - 1];
            before.needed -= 1;
            if before.needed == 0 {
                self.dead.push_back((self.now_ms, before.bytes));
            }
        }
    }

    /// Stores a chunk of these blocks, in the order of their addresses.
    fn store(&mut self, blocks: &[u64]) -> u64 {
        let extents = Self::runs_of(blocks.iter().copied());
        let data = blocks.len() as u64 * BLOCK;
        let bytes =
            data * self.settings.compression_percent / 100 + extents * EXTENT_BYTES + HEADER_BYTES;
        let count = u32::try_from(blocks.len()).expect("a chunk is small");
        self.chunks.push(Chunk {
            data: count,
            needed: count,
            bytes,
        });
        let id = u32::try_from(self.chunks.len()).expect("fewer chunks than 2^32");
        for block in blocks {
            self.own(*block, id);
        }
        self.bill.puts += 1;
        self.bill.put_bytes += bytes;
        extents
    }

    fn cut(&mut self) {
        self.cut_chunks += 1;
        let batch = std::mem::take(&mut self.batch);
        let blocks: Vec<u64> = batch.blocks.into_iter().collect();
        let mut last = None;
        for block in &blocks {
            let object = block / 64;
            self.bill.block_puts += u64::from(last.replace(object) != Some(object));
        }
        let extents = self.store(&blocks);
        self.credit += blocks.len() as u64 * BLOCK / READ_SHARE;
        self.log_chunks += 1;
        self.log_covered += blocks.len() as u64 * SECTORS_A_BLOCK;
        self.log_entries += extents;
        let tuning = &self.settings.tuning;
        let much = self.log_chunks >= CHECKPOINT_CHUNKS_MIN
            && self.log_covered
                >= (self.blocks() * SECTORS_A_BLOCK / CHECKPOINT_SHARE)
                    .min(tuning.checkpoint_sectors);
        if much
            || self.log_chunks >= tuning.checkpoint_chunks
            || self.log_entries >= tuning.checkpoint_entries as u64
        {
            self.fold();
        }
    }

    /// Lays a run of so many entries upon the map, and moves the head.
    fn lay(&mut self, entries: u64) {
        let count = plan_runs(&self.runs, entries);
        let swallowed: u64 = self.runs.drain(..count).sum();
        // No run has more entries than the volume has blocks.
        let merged = (entries + swallowed).min(self.blocks());
        self.runs.insert(0, merged);
        let (read, written) = (swallowed * ENTRY_BYTES, merged * ENTRY_BYTES);
        self.bill.gets += read.div_ceil(MAP_READ_BYTES);
        self.bill.got_bytes += read;
        self.bill.puts += written.div_ceil(TABLE_BYTES).max(1) + 1;
        self.bill.put_bytes += written + HEAD_BYTES;
        self.bill.map_bytes += written + HEAD_BYTES;
        self.bill.deletes += count as u64;
    }

    fn fold(&mut self) {
        let entries = std::mem::take(&mut self.log_entries);
        self.log_chunks = 0;
        self.log_covered = 0;
        self.lay(entries);
        self.reclaim();
    }

    fn map_bytes(&self) -> u64 {
        self.runs.iter().sum::<u64>() * ENTRY_BYTES
    }

    /// Bytes needed, and bytes that are not in chunks that are.
    fn space(&self) -> (u64, u64) {
        let (mut live, mut debt) = (0, 0);
        for chunk in self.chunks.iter().filter(|chunk| chunk.needed > 0) {
            live += u64::from(chunk.needed) * BLOCK;
            debt += u64::from(chunk.data - chunk.needed) * BLOCK;
        }
        (live, debt)
    }

    /// Compaction, once enough was uploaded that to look is worth it.
    fn reclaim(&mut self) {
        let map = self.map_bytes();
        if self.credit == 0 || self.credit < 2 * map * self.patience {
            return;
        }
        self.credit = 0;
        self.bill.gets += map.div_ceil(MAP_READ_BYTES);
        self.bill.got_bytes += map;
        let (live, debt) = self.space();
        self.patience = if debt * 100 >= live * DEBT_START_PERCENT / 4 {
            1
        } else {
            (self.patience * 2).min(PATIENCE_MAX)
        };
        let mut percent = DEBT_START_PERCENT;
        loop {
            let (live, debt) = self.space();
            if debt <= live * percent / 100 || debt < self.settings.debt_min {
                return;
            }
            if !self.compact(debt - live * DEBT_STOP_PERCENT / 100) {
                return;
            }
            percent = DEBT_STOP_PERCENT;
        }
    }

    /// Moves what is needed of the emptiest chunks, for so many bytes to gain.
    fn compact(&mut self, mut left: u64) -> bool {
        let mut candidates: Vec<(u64, u32)> = Vec::new();
        for (at, chunk) in self.chunks.iter().enumerate() {
            let (needed, data) = (u64::from(chunk.needed), u64::from(chunk.data));
            if needed > 0 && needed * 100 <= data * VICTIM_NEEDED_PERCENT_MAX {
                let id = u32::try_from(at + 1).unwrap_or(u32::MAX);
                candidates.push((needed * 1_000_000 / data, id));
            }
        }
        candidates.sort_unstable();
        let mut room = MOVED_BYTES_MIN.max(3 * self.map_bytes());
        let mut victims = HashSet::new();
        for (_, id) in candidates {
            let chunk = self.chunks[id as usize - 1];
            let needed = u64::from(chunk.needed) * BLOCK;
            let gain = u64::from(chunk.data - chunk.needed) * BLOCK;
            victims.insert(id);
            let (Some(rest), Some(more)) = (room.checked_sub(needed), left.checked_sub(gain))
            else {
                break;
            };
            (room, left) = (rest, more);
        }
        if victims.is_empty() {
            return false;
        }
        let moved: Vec<u64> = (0_u64..)
            .zip(&self.owner)
            .filter(|(_, owner)| victims.contains(owner))
            .map(|(block, _)| block)
            .collect();
        let map = self.map_bytes();
        let bytes = moved.len() as u64 * BLOCK * self.settings.compression_percent / 100;
        // A window of each victim at a time.
        self.bill.gets += map.div_ceil(MAP_READ_BYTES) + (victims.len() as u64).max(bytes >> 20);
        self.bill.got_bytes += map + bytes;
        let full =
            usize::try_from(u64::from(self.settings.tuning.chunk_sectors_max) / SECTORS_A_BLOCK)
                .unwrap_or(usize::MAX);
        let (before, mut entries) = (self.bill.put_bytes, 0);
        for blocks in moved.chunks(full) {
            entries += self.store(blocks);
        }
        self.bill.moved_bytes += self.bill.put_bytes - before;
        self.lay(entries);
        true
    }

    pub fn stock(&self) -> Stock {
        let needed = self.chunks.iter().filter(|chunk| chunk.needed > 0);
        let (count, bytes) = needed.fold((0, 0), |(count, bytes), chunk| {
            (count + 1, bytes + chunk.bytes)
        });
        let dead: u64 = self.dead.iter().map(|(_, bytes)| bytes).sum();
        let tables: u64 = self
            .runs
            .iter()
            .map(|run| (run * ENTRY_BYTES).div_ceil(TABLE_BYTES))
            .sum();
        Stock {
            // Beside them: the head, the name, the manifest's lists.
            objects: count + self.dead.len() as u64 + tables + 3,
            bytes: bytes + dead + self.map_bytes(),
            live_bytes: self.space().0,
            map_entries: self.runs.iter().sum(),
            map_bytes: self.map_bytes(),
        }
    }
}

/// Frames on the host, the one least recently asked for leaving first: by two generations, each half of the room.
struct Cache {
    half: usize,
    young: HashSet<u64>,
    old: HashSet<u64>,
}

impl Cache {
    fn new(frames: u64) -> Self {
        Self {
            half: usize::try_from(frames / 2).unwrap_or(usize::MAX).max(1),
            young: HashSet::new(),
            old: HashSet::new(),
        }
    }

    /// Whether it is there; it is, after this.
    fn has(&mut self, frame: u64) -> bool {
        if self.young.contains(&frame) {
            return true;
        }
        let was_there = self.old.remove(&frame);
        self.young.insert(frame);
        if self.young.len() >= self.half {
            self.old = std::mem::take(&mut self.young);
        }
        was_there
    }

    fn keep(&mut self, first: u64, count: u64) {
        for frame in first / FRAME_BLOCKS..=(first + count - 1) / FRAME_BLOCKS {
            self.has(frame);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::thread;
    use std::time::{Duration, Instant};

    use anyhow::{Result, ensure};
    use quarry_tests::{Daemon, MIB, Nbd, Site, seeded};
    use rand::RngExt as _;

    use super::*;

    const VOLUME: &str = "acme/churn";
    const SIZE: u64 = 128 * MIB;
    const DEPTH: usize = 32;
    const SETTINGS: &str =
        "[writeback]\nchunk_size = \"1MiB\"\ndelay = \"2s\"\n[reclaim]\ndebt_min = \"4MiB\"\n";
    /// What may be between the model's figure and the daemon's, of a hundred.
    const APART_PERCENT: u64 = 10;

    /// Both of the same writes.
    struct Pair {
        daemon: Daemon,
        nbd: Nbd,
        model: Volume,
        begun: Instant,
        under_way: VecDeque<u64>,
    }

    impl Pair {
        fn write(&mut self, first: u64, count: u64) -> Result<()> {
            if self.under_way.len() == DEPTH
                && let Some(oldest) = self.under_way.pop_front()
            {
                self.nbd.wait(oldest)?;
            }
            let data = vec![0x5a; quarry_tests::in_memory(count * BLOCK)];
            let cookie = self.nbd.send_write(first * BLOCK, &data, false)?;
            self.under_way.push_back(cookie);
            self.model
                .at(u64::try_from(self.begun.elapsed().as_millis())?);
            self.model.write(first, count);
            Ok(())
        }

        /// Until all is stored and folded, and compaction has come to rest.
        fn settle(&mut self) -> Result<()> {
            for cookie in std::mem::take(&mut self.under_way) {
                self.nbd.wait(cookie)?;
            }
            self.daemon.sync(VOLUME)?;
            let (begun, mut before) = (Instant::now(), u64::MAX);
            loop {
                let moved = self.count("quarry_volume_compacted_bytes_total")?;
                if moved == before {
                    break;
                }
                ensure!(
                    begun.elapsed() < Duration::from_secs(60),
                    "compaction goes on"
                );
                before = moved;
                thread::sleep(Duration::from_secs(2));
            }
            self.model.cut_all();
            Ok(())
        }

        fn count(&self, name: &str) -> Result<u64> {
            self.daemon.count(name, "churn")
        }

        fn uploaded(&self) -> Result<[u64; 3]> {
            Ok([
                self.count("quarry_volume_uploaded_chunks_total")?,
                self.count("quarry_volume_uploaded_bytes_total")?,
                self.count("quarry_volume_compacted_bytes_total")?,
            ])
        }
    }

    /// Writes in order, then random ones, few of them far apart in time: chunks cut full and by age, dead and compacted.
    #[test]
    fn model_counts_what_a_daemon_does() -> Result<()> {
        let (mut random, seed) = seeded("model_counts_what_a_daemon_does");
        let dir = tempfile::tempdir()?;
        let daemon = Site::with_folder(dir.path(), "a")?
            .settings(SETTINGS)
            .start()?;
        let nbd = daemon.fresh_volume(VOLUME, SIZE, &["--compression", "none"])?;
        let tuning = Tuning {
            chunk_sectors_max: 2048,
            writeback_delay_ms: 2000,
            ..Tuning::default()
        };
        let settings = Settings {
            tuning,
            debt_min: 4 * MIB,
            ..Settings::default()
        };
        let mut pair = Pair {
            daemon,
            nbd,
            model: Volume::new(SIZE, settings),
            begun: Instant::now(),
            under_way: VecDeque::new(),
        };
        for first in (0..SIZE / BLOCK * 8 / 10).step_by(64) {
            pair.write(first, 64)?;
        }
        let among = SIZE / BLOCK * 8 / 10;
        for count in 1..=3 * among {
            pair.write(random.random_range(0..among), 1)?;
            // Compaction is to keep up, as it does with users: what it moves late is less.
            if count % 512 == 0 {
                thread::sleep(Duration::from_millis(150));
            }
        }
        pair.settle()?;
        for _ in 0..4 {
            pair.write(random.random_range(0..among), 1)?;
            thread::sleep(Duration::from_millis(2500));
        }
        pair.settle()?;
        let bill = pair.model.take_bill();
        let mine = [
            pair.model.cut_chunks,
            bill.put_bytes - bill.map_bytes - bill.moved_bytes,
            bill.moved_bytes,
        ];
        let found = pair.uploaded()?;
        for (what, (mine, found)) in ["chunks", "bytes", "moved bytes"]
            .iter()
            .zip(mine.into_iter().zip(found))
        {
            let apart = mine.abs_diff(found) * 100;
            ensure!(
                apart <= found * APART_PERCENT,
                "seed {seed}: {what}: {mine} by the model, {found} by the daemon"
            );
        }
        Ok(())
    }
}
