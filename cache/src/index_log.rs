//! What lets the next daemon know what is clean on the device: the index log and the index table.
//!
//! The *log* is a file in the data folder, of a record for each segment that became clean: which chunks' sectors lie where in it.
//! Records are only added, and old ones are found again whatever became of their segment. Which of them are true is what the
//! *table* says, a file of mapped memory beside the journals: the generation of each segment whose newest record is. A store
//! into it is no syscall, so that a segment's number is taken out of it the moment the segment is begun anew.
//!
//! It outlives the daemon's process, as a journal does, and says nothing in another boot, for what it speaks of may not have
//! been stable. A daemon that ends in good order syncs the device, and then the log, and writes the *end*: what the table
//! says, for whichever boot comes next.
//!
//! Both say in which *session* of the device they were made. A daemon that begins has its own written on the device before it
//! puts anything there: so what another host, or a daemon without these files, has done to the device since makes them void.
//!
//! **Invariant:** if the table has a segment's generation, what the newest record of that generation says is on the device.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Seek as _, SeekFrom, Write as _};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use memmap2::MmapMut;
use quarry_objfmt::index::{INDEX_PREFIX_LEN, Session};
use quarry_objfmt::{
    CacheId, Generation, IndexEnd, IndexRecord, IndexTableHeader, PAGE_SIZE, SegmentId,
};

use crate::journal::{GENERATION_LEN, OF_BEFORE, remove};
use crate::{CacheDevice, Journals};

/// A log is written anew once it is twice as long as what was true of it when that was done last, and so much more.
const REWRITE_MIN: u64 = 8 << 20;

/// So much of a log is not synced at most, for whoever ends a daemon waits for that.
const UNSYNCED_MAX: u64 = 8 << 20;

/// Which segments' records are true.
pub struct IndexTable {
    map: MmapMut,
}

impl IndexTable {
    /// One that dies with the process.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn of_this_process(segments: u32) -> io::Result<Self> {
        let map = MmapMut::map_anon(PAGE_SIZE + segments as usize * GENERATION_LEN)?;
        Ok(Self { map })
    }

    fn place(segment: SegmentId) -> usize {
        PAGE_SIZE + segment.get() as usize * GENERATION_LEN
    }

    /// The generation of which a segment's newest record is true; zero if there is none.
    #[must_use]
    pub fn get(&self, segment: SegmentId) -> Generation {
        let place = Self::place(segment);
        let bytes = self.map.get(place..place + GENERATION_LEN);
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        believed(bytes.map_or(0, u64::from_le_bytes))
    }

    /// Its newest record, of this generation, is true from now on; with zero none is.
    pub fn set(&mut self, segment: SegmentId, generation: Generation) {
        let place = Self::place(segment);
        self.map[place..place + GENERATION_LEN].copy_from_slice(&generation.get().to_le_bytes());
    }

    /// No record is true any more.
    pub fn clear(&mut self) {
        self.map[PAGE_SIZE..].fill(0);
    }

    /// What was true before this session is said no more.
    pub fn forget_before(&mut self) {
        for entry in self.map[PAGE_SIZE..].chunks_exact_mut(GENERATION_LEN) {
            // The highest bit.
            if entry[GENERATION_LEN - 1] & 0x80 != 0 {
                entry.fill(0);
            }
        }
    }

    /// All that it says of this session.
    pub fn iter(&self) -> impl Iterator<Item = (SegmentId, Generation)> {
        let generations = self.map[PAGE_SIZE..].chunks_exact(GENERATION_LEN);
        (0..)
            .map(SegmentId::new)
            .zip(generations)
            .map(|(id, bytes)| {
                let bytes = bytes.try_into().expect("eight");
                (id, believed(u64::from_le_bytes(bytes)))
            })
            .filter(|(_, generation)| *generation != Generation::ZERO)
    }
}

/// What an entry of the table has this session believe.
const fn believed(entry: u64) -> Generation {
    match entry & OF_BEFORE {
        0 => Generation::new(entry),
        _ => Generation::ZERO,
    }
}

impl std::fmt::Debug for IndexTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Where a record lies in the log.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    at: u64,
    len: usize,
}

/// Of segments, that of which the newest record is true.
pub type Generations = Vec<(SegmentId, Generation)>;

/// The log of one cache device, open.
#[derive(Debug)]
pub struct IndexLog {
    cache: CacheId,
    session: Session,
    folder: PathBuf,
    file: File,
    len: u64,
    /// How long it was when it was written anew, or what was true of it when it was read.
    len_then: u64,
    /// Bytes that were written since it was synced.
    unsynced: u64,
    /// A record may have been written in part: nothing behind it would be found.
    is_torn: bool,
}

impl IndexLog {
    /// Begins with a session of the device, the second one; the first had it before. Answers with the table, the log in `folder`,
    /// and what was true of it before, of which the table has nothing believed yet.
    ///
    /// **Order:** the device says that this session has it, durably ([`CacheDevice::begin_session`]); then the table is made
    /// anew, last of all. *Killed or failed before: nothing is true. After that: the next session is told what this one was, but for
    /// what was begun, and but for all if a volume was ([`IndexTable::forget_before`]).*
    ///
    /// # Errors
    /// If one of the files cannot be read or written.
    pub fn begin(
        device: &CacheDevice,
        journals: &Journals,
        folder: &Path,
        (before, session): (Session, Session),
    ) -> io::Result<(IndexTable, Self, Generations)> {
        let (cache, segments) = (device.id(), device.geometry().segments);
        let path = log_path(folder, cache);
        let end_path = path.with_extension("end");
        let header = |session| IndexTableHeader {
            segments,
            boot: journals.boot(),
            session,
        };
        let of_table = journals.read_index_table(&header(before))?;
        let of_end = || read_end(&end_path, cache, before);
        let generations = match of_table {
            Some(generations) => generations,
            None => of_end()?,
        };
        // The device has said that it is of the past.
        remove(&end_path)?;
        remove_others(folder, cache)?;
        let file = open(&path)?;
        if generations.is_empty() {
            file.set_len(0)?;
        }
        let len = file.metadata()?.len();
        let map = journals.make_index_table(&header(session), &generations)?;
        let log = Self {
            cache,
            session,
            folder: folder.to_owned(),
            file,
            len,
            len_then: 0,
            unsynced: len,
            is_torn: false,
        };
        Ok((IndexTable { map }, log, generations.into_iter().collect()))
    }

    /// Looks through all of it, and calls `each` with every record that `is_true` by its segment and generation, until that says
    /// that it is enough. What lies behind one that was written in part is cut off. Answers where the newest of each segment are.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn survey(
        &mut self,
        is_true: impl Fn(SegmentId, Generation) -> bool,
        mut each: impl FnMut(&IndexRecord) -> ControlFlow<()>,
    ) -> io::Result<Vec<Place>> {
        (&self.file).seek(SeekFrom::Start(0))?;
        let mut reader = BufReader::with_capacity(1 << 20, &self.file);
        let (mut newest, mut at) = (BTreeMap::new(), 0);
        let mut bytes = Vec::new();
        while let Some(record) = next(&mut reader, &mut bytes)? {
            let len = bytes.len();
            if record.cache == self.cache && is_true(record.segment, record.generation) {
                newest.insert(record.segment, Place { at, len });
                if each(&record).is_break() {
                    return Ok(Vec::new());
                }
            }
            at += len as u64;
        }
        if at < self.len {
            tracing::warn!(at, "the index log ends in the middle of a record");
            self.file.set_len(at)?;
            self.len = at;
        }
        let mut places: Vec<Place> = newest.into_values().collect();
        places.sort_unstable_by_key(|place| place.at);
        self.len_then = places.iter().map(|place| place.len as u64).sum();
        Ok(places)
    }

    /// The record at a place that [`Self::survey`] found.
    ///
    /// # Errors
    /// If it cannot be read any more.
    pub fn read(&self, place: Place) -> io::Result<IndexRecord> {
        let mut bytes = vec![0; place.len];
        self.file.read_exact_at(&mut bytes, place.at)?;
        IndexRecord::decode(&bytes).map_err(io::Error::other)
    }

    /// Adds records. They are to be called true after that, not before.
    ///
    /// # Errors
    /// If they cannot be written. What was there stays.
    pub fn add(&mut self, records: &[IndexRecord]) -> io::Result<()> {
        if self.is_torn {
            return Err(io::Error::other(
                "it could not be mended after a failed write",
            ));
        }
        let bytes: Vec<u8> = records.iter().flat_map(IndexRecord::encode).collect();
        let written = (&self.file).write_all(&bytes);
        if written.is_err() {
            self.is_torn = self.file.set_len(self.len).is_err();
            return written;
        }
        self.len += bytes.len() as u64;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= UNSYNCED_MAX {
            self.file.sync_data()?;
            self.unsynced = 0;
        }
        Ok(())
    }

    /// Whether it is to be written anew: most of it is of the past, or nothing can be added.
    #[must_use]
    pub const fn is_due(&self) -> bool {
        self.is_torn || self.len > 2 * self.len_then + REWRITE_MIN
    }

    /// Writes it anew, of what `next` gives until that is nothing: all records that are true, or are called so later. The old
    /// one stays until the new one is whole.
    ///
    /// # Errors
    /// If it cannot be written, or `next` fails: then the old one is the log.
    pub fn rewrite(
        &mut self,
        mut next: impl FnMut() -> io::Result<Option<Vec<IndexRecord>>>,
    ) -> io::Result<()> {
        let new = self.path().with_extension("new");
        remove(&new)?;
        let file = open(&new)?;
        let mut len = 0;
        let mut write = || -> io::Result<()> {
            while let Some(records) = next()? {
                let bytes: Vec<u8> = records.iter().flat_map(IndexRecord::encode).collect();
                (&file).write_all(&bytes)?;
                let before = len / UNSYNCED_MAX;
                len += bytes.len() as u64;
                if len / UNSYNCED_MAX > before {
                    file.sync_data()?;
                }
            }
            file.sync_data()?;
            fs::rename(&new, self.path())
        };
        if let Err(error) = write() {
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        (self.file, self.len, self.len_then) = (file, len, len);
        (self.unsynced, self.is_torn) = (0, false);
        Ok(())
    }

    /// Says that the daemon has ended, and these records are true. The caller has synced the device since it wrote to it for the
    /// last time, and puts nothing there any more.
    ///
    /// # Errors
    /// If that cannot be made durable: then nothing is true in another boot.
    pub fn end(self, segments: Generations) -> io::Result<()> {
        if self.is_torn || segments.len() > IndexEnd::SEGMENTS_MAX {
            return Ok(());
        }
        // Before the end that speaks of it.
        self.file.sync_all()?;
        let end = IndexEnd {
            cache: self.cache,
            session: self.session,
            segments,
        };
        let path = self.path().with_extension("end");
        let new = self.path().with_extension("new");
        remove(&new)?;
        let mut file = open(&new)?;
        file.write_all(&end.encode())?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(&self.folder)?.sync_all()
    }

    /// The cache device.
    #[must_use]
    pub const fn cache(&self) -> CacheId {
        self.cache
    }

    fn path(&self) -> PathBuf {
        log_path(&self.folder, self.cache)
    }
}

/// Where a device's log is. Its end, and what is to become either, have names of another extension.
fn log_path(folder: &Path, cache: CacheId) -> PathBuf {
    folder.join(format!("index-{cache}.log"))
}

/// The next record, and in `bytes` what it is made of; `None` at the end, or where no record is.
fn next(reader: &mut impl io::Read, bytes: &mut Vec<u8>) -> io::Result<Option<IndexRecord>> {
    bytes.resize(INDEX_PREFIX_LEN, 0);
    if !fill(reader, bytes)? {
        return Ok(None);
    }
    let Ok(len) = IndexRecord::encoded_len(bytes) else {
        return Ok(None);
    };
    bytes.resize(len, 0);
    if !fill(reader, &mut bytes[INDEX_PREFIX_LEN..])? {
        return Ok(None);
    }
    Ok(IndexRecord::decode(bytes).ok())
}

/// Fills all of `part`; false if the file ends before.
fn fill(reader: &mut impl io::Read, part: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(part) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// What the end of that session says.
fn read_end(
    path: &Path,
    cache: CacheId,
    session: Session,
) -> io::Result<BTreeMap<SegmentId, Generation>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    match IndexEnd::decode(&bytes) {
        Ok(end) if end.cache == cache && end.session == session => {
            Ok(end.segments.into_iter().collect())
        }
        Ok(_) => Ok(BTreeMap::new()),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "it says nothing");
            Ok(BTreeMap::new())
        }
    }
}

/// Removes what is left of the logs of devices that were here before: one that comes back begins with none.
fn remove_others(folder: &Path, cache: CacheId) -> io::Result<()> {
    let ours = format!("index-{cache}.");
    for file in fs::read_dir(folder)? {
        let file = file?;
        let name = file.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("index-") && !name.starts_with(&ours) {
            remove(&file.path())?;
        }
    }
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::{ChunkId, ChunkSeq, Epoch, IndexRun, VolumeId};

    use super::*;

    const ID: CacheId = CacheId::from_bytes([3; 16]);

    /// A host with a cache device.
    struct Host {
        dir: tempfile::TempDir,
        sessions: u8,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self { dir, sessions: 0 }
        }

        fn device(&self) -> CacheDevice {
            CacheDevice::open(&self.dir.path().join("cache"), Some(32 << 20), ID, "a", 1).unwrap()
        }

        /// A daemon begins, as far as it comes.
        fn try_begin(&mut self) -> (CacheDevice, io::Result<(IndexTable, IndexLog, Generations)>) {
            let device = self.device();
            self.sessions += 1;
            let session = [self.sessions; 16];
            let before = device.begin_session(session).unwrap().unwrap();
            let journals = Journals::open(&self.dir.path().join("journals"), ID).unwrap();
            let begun = IndexLog::begin(&device, &journals, self.dir.path(), (before, session));
            (device, begun)
        }

        /// A daemon begins, and believes all that was true before.
        fn begin(&mut self) -> (CacheDevice, IndexTable, IndexLog) {
            let (device, begun) = self.try_begin();
            let (mut table, log, generations) = begun.unwrap();
            assert_eq!(table.iter().count(), 0);
            for (segment, generation) in generations {
                table.set(segment, generation);
            }
            (device, table, log)
        }

        /// The host was started anew: what is in its memory is gone.
        fn boot(&self) {
            std::fs::remove_dir_all(self.dir.path().join("journals")).unwrap();
        }
    }

    fn record(segment: u32, generation: u64, seq: u64) -> IndexRecord {
        IndexRecord {
            cache: ID,
            segment: SegmentId::new(segment),
            generation: Generation::new(generation),
            owner: "acme".to_owned(),
            runs: vec![IndexRun {
                chunk: ChunkId {
                    volume: VolumeId::from_bytes([9; 16]),
                    epoch: Epoch::new(1),
                    seq: ChunkSeq::new(seq),
                },
                raw: 0,
                len: 8,
                offset: 0,
            }],
        }
    }

    fn describe(table: &mut IndexTable, log: &mut IndexLog, record: IndexRecord) {
        log.add(std::slice::from_ref(&record)).unwrap();
        table.set(record.segment, record.generation);
    }

    fn found(table: &IndexTable, log: &mut IndexLog) -> Vec<IndexRecord> {
        let is_true = |segment, generation| table.get(segment) == generation;
        let places = log.survey(is_true, |_| ControlFlow::Continue(())).unwrap();
        let read = places.into_iter().map(|place| log.read(place).unwrap());
        read.collect()
    }

    #[test]
    fn daemon_that_is_killed_leaves_what_is_true_to_the_next_and_in_another_boot_nothing() {
        let mut host = Host::new();
        let (device, mut table, mut log) = host.begin();
        assert_eq!(found(&table, &mut log), []);
        for record in [record(1, 10, 1), record(2, 11, 2), record(3, 12, 3)] {
            describe(&mut table, &mut log, record);
        }
        // The second is described again, and the third begun anew.
        describe(&mut table, &mut log, record(2, 11, 22));
        table.set(SegmentId::new(3), Generation::ZERO);
        drop((device, table, log));
        for _ in 0..2 {
            let (_device, table, mut log) = host.begin();
            assert_eq!(
                found(&table, &mut log),
                [record(1, 10, 1), record(2, 11, 22)]
            );
        }
        host.boot();
        let (_device, table, mut log) = host.begin();
        assert_eq!(found(&table, &mut log), []);
        assert_eq!(log.len, 0);
    }

    #[test]
    fn daemon_that_fails_to_start_leaves_to_the_next_what_it_was_told() {
        let mut host = Host::new();
        let (device, mut table, mut log) = host.begin();
        for record in [record(1, 10, 1), record(2, 11, 2)] {
            describe(&mut table, &mut log, record);
        }
        drop((device, table, log));
        for (session, (forgets, left)) in (1..).zip([(false, 2), (false, 1), (true, 1), (false, 0)])
        {
            let (_device, begun) = host.try_begin();
            let (mut table, _log, generations) = begun.unwrap();
            assert_eq!(generations.len(), left, "session {session}");
            assert_eq!(table.iter().count(), 0);
            assert_eq!(table.get(SegmentId::new(2)), Generation::ZERO);
            // The first segment is begun, and that is all that it did.
            table.set(SegmentId::new(1), Generation::ZERO);
            if forgets {
                table.forget_before();
            }
        }
    }

    #[test]
    fn daemon_that_ends_leaves_it_to_another_boot_once() {
        let mut host = Host::new();
        let (device, mut table, mut log) = host.begin();
        describe(&mut table, &mut log, record(1, 10, 1));
        let said = table.iter().collect();
        device.sync().unwrap();
        log.end(said).unwrap();
        drop((device, table));
        host.boot();
        let (device, table, mut log) = host.begin();
        assert_eq!(found(&table, &mut log), [record(1, 10, 1)]);
        // It was begun, and the power went.
        drop((device, table, log));
        host.boot();
        let (_device, table, mut log) = host.begin();
        assert_eq!(found(&table, &mut log), []);
    }

    #[test]
    fn device_that_another_had_meanwhile_is_not_what_was_described() {
        for ends in [false, true] {
            let mut host = Host::new();
            let (device, mut table, mut log) = host.begin();
            describe(&mut table, &mut log, record(1, 10, 1));
            if ends {
                log.end(table.iter().collect()).unwrap();
            } else {
                drop(log);
            }
            drop((device, table));
            // Another host, with folders of its own.
            host.device().begin_session([99; 16]).unwrap();
            let (_device, table, mut log) = host.begin();
            assert_eq!(found(&table, &mut log), [], "ends: {ends}");
        }
    }

    /// What it did meanwhile is in no table.
    #[test]
    fn daemon_whose_log_cannot_be_opened_leaves_nothing_to_the_next() {
        let mut host = Host::new();
        let (device, mut table, mut log) = host.begin();
        describe(&mut table, &mut log, record(1, 10, 1));
        let path = log.path();
        drop((device, table, log));
        let aside = path.with_extension("aside");
        fs::rename(&path, &aside).unwrap();
        fs::create_dir(&path).unwrap();
        let (device, begun) = host.try_begin();
        assert!(begun.is_err());
        drop(device);
        fs::remove_dir(&path).unwrap();
        fs::rename(&aside, &path).unwrap();
        let (_device, table, mut log) = host.begin();
        assert_eq!(found(&table, &mut log), []);
    }

    #[test]
    fn log_that_ends_in_the_middle_of_a_record_is_read_up_to_there_and_added_to() {
        let mut host = Host::new();
        let (device, mut table, mut log) = host.begin();
        describe(&mut table, &mut log, record(1, 10, 1));
        let whole = log.len;
        table.set(SegmentId::new(2), Generation::new(11));
        let half = &record(2, 11, 2).encode()[..40];
        (&log.file).write_all(half).unwrap();
        drop((device, table, log));
        let (device, mut table, mut log) = host.begin();
        assert_eq!(found(&table, &mut log), [record(1, 10, 1)]);
        assert_eq!(log.len, whole);
        describe(&mut table, &mut log, record(2, 12, 4));
        drop((device, table, log));
        let (_device, table, mut log) = host.begin();
        assert_eq!(
            found(&table, &mut log),
            [record(1, 10, 1), record(2, 12, 4)]
        );
    }

    #[test]
    fn log_is_written_anew_of_what_is_true_and_stays_as_it_was_if_that_fails() {
        let mut host = Host::new();
        let (device, mut table, mut log) = host.begin();
        for generation in 1..=40 {
            describe(&mut table, &mut log, record(1, generation, generation));
        }
        drop((device, table, log));
        let (_device, mut table, mut log) = host.begin();
        assert_eq!(found(&table, &mut log), [record(1, 40, 40)]);
        // What is of the past is not what it is measured by.
        assert_eq!(log.len_then * 40, log.len);
        assert!(!log.is_due());
        let before = log.len;
        log.len += REWRITE_MIN;
        assert!(log.is_due());
        log.len = before;
        // A folder is in the way.
        let new = log.path().with_extension("new");
        std::fs::create_dir(&new).unwrap();
        assert!(log.rewrite(|| Ok(None)).is_err());
        assert_eq!(found(&table, &mut log), [record(1, 40, 40)]);
        std::fs::remove_dir(&new).unwrap();
        let mut parts = vec![vec![record(1, 40, 40)], vec![]].into_iter();
        log.rewrite(|| Ok(parts.next())).unwrap();
        assert_eq!(log.len * 40, before);
        assert!(!log.is_due());
        describe(&mut table, &mut log, record(2, 50, 50));
        assert_eq!(
            found(&table, &mut log),
            [record(1, 40, 40), record(2, 50, 50)]
        );
    }

    #[test]
    fn device_made_without_sessions_has_none() {
        let host = Host::new();
        let path = host.dir.path().join("cache");
        drop(host.device());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let mut page = vec![0; PAGE_SIZE];
        file.read_exact_at(&mut page, 0).unwrap();
        let superblock = quarry_objfmt::Superblock {
            has_sessions: false,
            ..quarry_objfmt::Superblock::decode(&page).unwrap()
        };
        file.write_all_at(&superblock.encode()[..], 0).unwrap();
        let device = host.device();
        assert_eq!(device.begin_session([1; 16]).unwrap(), None);
        let mut page = [1; PAGE_SIZE];
        file.read_exact_at(&mut page, PAGE_SIZE as u64).unwrap();
        assert_eq!(page, [0; PAGE_SIZE]);
    }
}
