//! The journal: the records of acknowledged writes that are in no durable record page yet, in a
//! mapped file. It outlives a daemon that is killed, and is void after a power cut.
//!
//! The data themselves are safe from the daemon's death as soon as the device took them; what dies
//! with it is the knowledge where they lie. A store into mapped memory keeps that, without a
//! syscall. The file belongs on a tmpfs, where the kernel never writes it back.
//!
//! After a sync of the device that failed, journals are *void*: the data that they name may not be there. They are set aside
//! then, for they still tell what was acknowledged: nobody is to go on with less and not know ([`Voided`]).
//!
//! Invariant: an entry that reads as valid names data that the device had taken in this very boot.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use memmap2::MmapMut;
use quarry_objfmt::{
    CacheId, Epoch, Generation, IndexTableHeader, JOURNAL_ENTRY_LEN, JournalHeader, PAGE_SIZE,
    Record, SegmentId, VolumeId, WriteSeq,
};

/// Where the kernel tells which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The index table's name among the journals, which no volume has.
const INDEX_TABLE: &str = "index";

/// Bytes of the index table for a segment.
pub(crate) const GENERATION_LEN: usize = 8;

/// In a generation of the index table: it was true in a session before, and is not believed in this one yet.
pub(crate) const OF_BEFORE: u64 = 1 << 63;

/// The folder of one cache device's journals, one file for each attached volume.
#[derive(Clone, Debug)]
pub struct Journals {
    folder: PathBuf,
    /// Where those are that a failed sync made void.
    set_aside: PathBuf,
    cache: CacheId,
    boot: [u8; 16],
}

/// What a journal says that a failed sync made void.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Voided {
    /// The term in which its volume was attached.
    pub epoch: Epoch,
    /// The newest write in it: it and all before it were acknowledged.
    pub acknowledged: WriteSeq,
}

/// The journal of one attached volume.
pub struct Journal {
    header: JournalHeader,
    map: MmapMut,
}

/// What a journal says.
struct Said {
    epoch: Epoch,
    records: Vec<(SegmentId, Record)>,
}

impl Journals {
    /// The journals for writes on the cache device `cache`, in a folder of its own below `root`.
    /// Both are made, for this user alone.
    ///
    /// # Errors
    /// If they cannot be made, or `root` is somebody else's.
    pub fn open(root: &Path, cache: CacheId) -> io::Result<Self> {
        Self::make_root(root)?;
        let folder = root.join(cache.to_string());
        make_folder(&folder)?;
        Ok(Self {
            folder,
            set_aside: root.join(format!("{cache}.void")),
            cache,
            boot: boot_id()?,
        })
    }

    /// Makes the folder that those of all caches are in.
    ///
    /// # Errors
    /// As [`Journals::open`].
    pub fn make_root(root: &Path) -> io::Result<()> {
        make_folder(root)?;
        // Who can write here can have us believe in writes that never were.
        let found = fs::symlink_metadata(root)?;
        if found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o022 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "others can write there",
            ));
        }
        Ok(())
    }

    fn path(&self, volume: VolumeId) -> PathBuf {
        self.folder.join(volume.to_string())
    }

    /// Makes a volume's journal anew, named `attachment` at random. The one before it stays until
    /// this one is whole. One that was set aside goes, too: what it told of is there, or given up.
    ///
    /// # Errors
    /// If there is no room for it, or the one that was set aside stays.
    pub fn create(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        attachment: [u8; 16],
        entries: u32,
    ) -> io::Result<Journal> {
        let header = JournalHeader {
            entries,
            boot: self.boot,
            volume,
            attachment,
            epoch,
        };
        let path = self.path(volume);
        let new = path.with_extension("new");
        let mut bytes = header.encode(self.cache).to_vec();
        bytes.resize(PAGE_SIZE + header.entries as usize * JOURNAL_ENTRY_LEN, 0);
        let made = make(&new, &bytes).and_then(|map| {
            // Before the new one has its name: with the folder it may be set aside itself, from any moment on.
            remove(&self.set_aside.join(volume.to_string()))?;
            fs::rename(&new, &path)?;
            Ok(Journal { header, map })
        });
        if made.is_err() {
            // What there is of it takes the room that another volume's needs.
            let _ = fs::remove_file(&new);
        }
        made
    }

    /// What the last daemon's journal of a volume says: the records in it that were valid on the
    /// device when it died, in no order. `newest` is the newest epoch of the volume's segments, and
    /// `generation_of` tells the generation of one. Nothing if there is no journal, one of another
    /// boot, or one that was left behind when a daemon went on without it.
    ///
    /// # Errors
    /// If it is there and cannot be read.
    pub fn read(
        &self,
        volume: VolumeId,
        newest: Epoch,
        generation_of: impl Fn(SegmentId) -> Option<Generation>,
    ) -> io::Result<Vec<(SegmentId, Record)>> {
        let read = self.read_in(&self.folder, volume, newest, generation_of)?;
        Ok(read.map(|said| said.records).unwrap_or_default())
    }

    /// What a volume's journal says that was set aside and not taken up since. Arguments, and what counts, as in [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_voided(
        &self,
        volume: VolumeId,
        newest: Epoch,
        generation_of: impl Fn(SegmentId) -> Option<Generation>,
    ) -> io::Result<Option<Voided>> {
        let read = self.read_in(&self.set_aside, volume, newest, generation_of)?;
        Ok(read.and_then(|said| {
            let acknowledged = said.records.iter().map(|(_, record)| record.seq).max()?;
            let epoch = said.epoch;
            Some(Voided {
                epoch,
                acknowledged,
            })
        }))
    }

    fn read_in(
        &self,
        folder: &Path,
        volume: VolumeId,
        newest: Epoch,
        generation_of: impl Fn(SegmentId) -> Option<Generation>,
    ) -> io::Result<Option<Said>> {
        let bytes = match fs::read(folder.join(volume.to_string())) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some((page, entries)) = bytes.split_at_checked(PAGE_SIZE) else {
            return Ok(None);
        };
        let header = match JournalHeader::decode(page, self.cache) {
            Ok(header)
                if header.boot == self.boot
                    && header.volume == volume
                    && header.epoch >= newest =>
            {
                header
            }
            Ok(_) => return Ok(None),
            Err(error) => {
                tracing::warn!(%volume, %error, "the journal of the last daemon says nothing");
                return Ok(None);
            }
        };
        let records = entries
            .chunks_exact(JOURNAL_ENTRY_LEN)
            .take(header.entries as usize)
            .enumerate()
            .filter_map(|(slot, entry)| header.decode_entry(slot, entry, &generation_of).ok())
            .collect();
        let epoch = header.epoch;
        Ok(Some(Said { epoch, records }))
    }

    /// Makes all journals void: what they name may not be on the device. They are set aside, and none is made any more.
    /// Those that are attached are written on where they are now: what is acknowledged from here on counts, too.
    pub fn void(&self) {
        if let Err(error) = self.move_aside() {
            let (from, to) = (self.folder.display(), self.set_aside.display());
            tracing::error!(%error, "the journals cannot be set aside: move {from} to {to} before the next start, which would else believe them");
        }
    }

    fn move_aside(&self) -> io::Result<()> {
        match fs::rename(&self.folder, &self.set_aside) {
            // Some of an earlier failure are there, of volumes that were not attached since.
            // By which of the two is the file system's affair.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                ) =>
            {
                for journal in fs::read_dir(&self.folder)? {
                    let journal = journal?;
                    fs::rename(journal.path(), self.set_aside.join(journal.file_name()))?;
                }
                fs::remove_dir(&self.folder)
            }
            moved => moved,
        }
    }

    /// The boot that this is.
    pub(crate) const fn boot(&self) -> [u8; 16] {
        self.boot
    }

    /// What the index table with this header says; `None` if there is none, or another's.
    ///
    /// # Errors
    /// If it is there and cannot be read.
    pub(crate) fn read_index_table(
        &self,
        header: &IndexTableHeader,
    ) -> io::Result<Option<BTreeMap<SegmentId, Generation>>> {
        let bytes = match fs::read(self.folder.join(INDEX_TABLE)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some((page, generations)) = bytes.split_at_checked(PAGE_SIZE) else {
            return Ok(None);
        };
        if IndexTableHeader::decode(page, self.cache) != Ok(*header) {
            return Ok(None);
        }
        let generations = generations.chunks_exact(GENERATION_LEN).map(|bytes| {
            let bytes = bytes.try_into().expect("eight");
            Generation::new(u64::from_le_bytes(bytes) & !OF_BEFORE)
        });
        let of_segments = (0..header.segments).map(SegmentId::new).zip(generations);
        let said = of_segments.filter(|(_, generation)| *generation != Generation::ZERO);
        Ok(Some(said.collect()))
    }

    /// Makes the index table anew, which says what was true before and believes none of it. It lies beside the journals, and is
    /// set aside with them.
    ///
    /// # Errors
    /// If there is no room for it.
    pub(crate) fn make_index_table(
        &self,
        header: &IndexTableHeader,
        before: &BTreeMap<SegmentId, Generation>,
    ) -> io::Result<MmapMut> {
        let path = self.folder.join(INDEX_TABLE);
        let new = path.with_extension("new");
        let mut bytes = header.encode(self.cache).to_vec();
        for segment in (0..header.segments).map(SegmentId::new) {
            let of_before = before.get(&segment).map_or(0, |g| g.get() | OF_BEFORE);
            bytes.extend_from_slice(&of_before.to_le_bytes());
        }
        let made = make(&new, &bytes).and_then(|map| {
            fs::rename(&new, &path)?;
            Ok(map)
        });
        made.inspect_err(|_| {
            let _ = fs::remove_file(&new);
        })
    }

    /// Removes a volume's journals: everything is in the store, or given up.
    ///
    /// # Errors
    /// If one is there and stays.
    pub fn remove(&self, volume: VolumeId) -> io::Result<()> {
        remove(&self.path(volume))?;
        remove(&self.set_aside.join(volume.to_string()))
    }
}

impl Journal {
    /// Puts a record in, over the one that lay there `entries` writes ago.
    pub fn put(&mut self, segment: SegmentId, generation: Generation, record: &Record) {
        let entry = self.header.encode_entry(segment, generation, record);
        let at = PAGE_SIZE + self.header.slot(record.seq) * JOURNAL_ENTRY_LEN;
        self.map[at..at + JOURNAL_ENTRY_LEN].copy_from_slice(&entry);
    }
}

/// Makes a file of these bytes, and maps it.
fn make(path: &Path, bytes: &[u8]) -> io::Result<MmapMut> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    // All of it now: a store into a page that the file system has no room for kills the process.
    file.write_all(bytes)?;
    map(&file)
}

/// Removes a file, if it is there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

fn map(file: &File) -> io::Result<MmapMut> {
    // SAFETY: the file lies in a folder that only this user may write to, and nothing of ours
    // makes one shorter or writes to it but through its one mapping.
    unsafe { MmapMut::map_mut(file) }
}

fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string(BOOT_ID)?;
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let mut id = [0; 16];
    if digits.len() != 2 * id.len() {
        return Err(io::Error::other(format!("{BOOT_ID} is no UUID")));
    }
    for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(io::Error::other)?;
        *byte = u8::from_str_radix(pair, 16).map_err(io::Error::other)?;
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::{Lba, RecordBody, WriteSeq};

    use super::*;

    const CACHE: CacheId = CacheId::from_bytes([3; 16]);
    const VOLUME: VolumeId = VolumeId::from_bytes([9; 16]);
    const GENERATION: Generation = Generation::new(4);

    fn record(seq: u64) -> Record {
        Record {
            seq: WriteSeq::new(seq),
            start: Lba::new(seq * 8),
            len: 8,
            body: RecordBody::Zero,
        }
    }

    fn seqs(journals: &Journals) -> Vec<u64> {
        let found = journals.read(VOLUME, Epoch::new(3), |_| Some(GENERATION));
        let found = found.unwrap();
        let mut seqs: Vec<u64> = found.iter().map(|(_, r)| r.seq.get()).collect();
        seqs.sort_unstable();
        seqs
    }

    #[test]
    fn journal_of_a_dead_daemon_holds_its_newest_records() {
        let dir = tempfile::tempdir().unwrap();
        let journals = Journals::open(&dir.path().join("j"), CACHE).unwrap();
        assert!(seqs(&journals).is_empty());
        let mut journal = journals.create(VOLUME, Epoch::new(3), [1; 16], 8).unwrap();
        for seq in 1..=11 {
            journal.put(SegmentId::new(2), GENERATION, &record(seq));
        }
        assert_eq!(seqs(&journals), [4, 5, 6, 7, 8, 9, 10, 11]);
        drop(journal);
        assert_eq!(seqs(&journals).len(), 8);
        let _next = journals.create(VOLUME, Epoch::new(4), [2; 16], 8).unwrap();
        assert!(seqs(&journals).is_empty());
        journals.remove(VOLUME).unwrap();
        journals.remove(VOLUME).unwrap();
    }

    #[test]
    fn journal_that_a_later_attachment_went_on_without_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let journals = Journals::open(&dir.path().join("j"), CACHE).unwrap();
        let mut journal = journals.create(VOLUME, Epoch::new(3), [1; 16], 8).unwrap();
        journal.put(SegmentId::new(2), GENERATION, &record(1));
        let later = journals.read(VOLUME, Epoch::new(4), |_| Some(GENERATION));
        assert!(later.unwrap().is_empty());
        assert_eq!(seqs(&journals), [1]);
    }

    #[test]
    fn void_journals_say_what_was_acknowledged_until_their_volumes_have_others() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("j");
        let other = VolumeId::from_bytes([8; 16]);
        let voided = |volume, newest| {
            let journals = Journals::open(&root, CACHE).unwrap();
            let voided = journals.read_voided(volume, Epoch::new(newest), |_| Some(GENERATION));
            voided.unwrap().map(|voided| voided.acknowledged.get())
        };
        for (failure, volumes) in [vec![VOLUME, other], vec![VOLUME]].iter().enumerate() {
            let journals = Journals::open(&root, CACHE).unwrap();
            let create = |volume| journals.create(volume, Epoch::new(3), [1; 16], 8);
            let mut made: Vec<_> = volumes
                .iter()
                .map(|volume| create(*volume).unwrap())
                .collect();
            let expected = if failure == 0 { None } else { Some(2) };
            assert_eq!((voided(VOLUME, 3), voided(other, 3)), (None, expected));
            for journal in &mut made {
                journal.put(SegmentId::new(2), GENERATION, &record(1));
            }
            journals.void();
            assert!(create(VOLUME).is_err());
            // Acknowledged after the failure.
            for journal in &mut made {
                journal.put(SegmentId::new(2), GENERATION, &record(2));
            }
            assert!(seqs(&Journals::open(&root, CACHE).unwrap()).is_empty());
            assert_eq!((voided(VOLUME, 3), voided(other, 3)), (Some(2), Some(2)));
            assert_eq!(voided(VOLUME, 4), None);
        }
        let journals = Journals::open(&root, CACHE).unwrap();
        journals.remove(VOLUME).unwrap();
        assert_eq!((voided(VOLUME, 3), voided(other, 3)), (None, Some(2)));
    }

    #[test]
    fn journal_of_another_boot_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut journals = Journals::open(&dir.path().join("j"), CACHE).unwrap();
        let mut journal = journals.create(VOLUME, Epoch::new(3), [1; 16], 8).unwrap();
        journal.put(SegmentId::new(2), GENERATION, &record(1));
        assert_eq!(seqs(&journals), [1]);
        journals.boot[0] ^= 1;
        assert!(seqs(&journals).is_empty());
    }

    #[test]
    fn folder_that_others_can_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("j");
        fs::create_dir(&root).unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Journals::open(&root, CACHE).is_err());
    }
}
