//! How far an import is, so that the next one goes on there: a file of the user's, one for each volume.
//!
//! **Order:** the pieces before `sent_bytes` were answered; then the daemon said that all that was
//! acknowledged is in the object store; then the record is written beside itself, synced, renamed, and its folder
//! synced. A crash between any two leaves an older record: what it does not name is copied again, which
//! changes nothing. What it names is in the store, so it is still there after a crash of the daemon, of the host, and
//! after the loss of the cache device: a FLUSH alone would promise less.

use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::format::ImageFormat;

/// Which image it is. One that was changed is another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ImageId {
    /// Where, absolutely.
    pub path: PathBuf,
    /// As what it is read.
    pub format: String,
    /// Bytes of the file or block device.
    pub file_bytes: u64,
    /// When it was changed last, in nanoseconds of Unix time.
    pub modified_ns: i128,
    /// Its place on its file system.
    pub inode: u64,
}

impl ImageId {
    /// Of a file or block device of so many bytes.
    #[must_use]
    pub fn new(path: PathBuf, format: ImageFormat, file_bytes: u64, metadata: &Metadata) -> Self {
        Self {
            path,
            format: format.as_str().to_owned(),
            file_bytes,
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000
                + i128::from(metadata.mtime_nsec()),
            inode: metadata.ino(),
        }
    }

    /// Whether the file is still the same.
    #[must_use]
    pub fn is_unchanged(&self) -> bool {
        let now = || {
            let mut file = File::open(&self.path)?;
            let size = file.seek(SeekFrom::End(0))?;
            Ok::<_, io::Error>((size, file.metadata()?))
        };
        now().is_ok_and(|(size, metadata)| {
            let format = self.format.clone();
            *self
                == Self {
                    format,
                    ..Self::new(self.path.clone(), ImageFormat::Raw, size, &metadata)
                }
        })
    }
}

/// An import that was begun.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The volume's id, which no other has.
    pub volume: String,
    /// What is imported.
    pub image: ImageId,
    /// All of the image before this byte is in the object store. At 0 the volume may not be empty yet.
    pub sent_bytes: u64,
    /// Whether the import attached the volume, and so detaches it.
    pub detach: bool,
}

/// Why a record cannot be had or kept.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Another import has it.
    #[error("another import into this volume is under way")]
    Busy,
    /// It is not what this program writes.
    #[error("{path}: this is no record of an import")]
    Malformed {
        /// Where.
        path: PathBuf,
    },
    /// The system failed.
    #[error("{path}: the record of the import cannot be read or written")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The place of a volume's record; while it lives, no other import of this user has it.
#[derive(Debug)]
pub struct RecordFile {
    folder: PathBuf,
    path: PathBuf,
    lock: PathBuf,
    _locked: File,
}

impl RecordFile {
    /// Takes the place of the volume with this id in `folder`, which is made.
    ///
    /// # Errors
    /// If another import has it, or the folder cannot be used.
    pub fn take(folder: &Path, volume: &str) -> Result<Self, RecordError> {
        let lock = folder.join(format!("import-{volume}.lock"));
        let io = |source| RecordError::Io {
            path: lock.clone(),
            source,
        };
        fs::create_dir_all(folder).map_err(io)?;
        let locked = loop {
            let file = File::options().create(true).append(true).open(&lock);
            let file = file.map_err(io)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(RecordError::Busy),
                Err(TryLockError::Error(error)) => return Err(io(error)),
            }
            // Who had it may have removed it in between: then this lock keeps nobody out.
            let inode = |found: io::Result<Metadata>| found.map(|m| (m.dev(), m.ino())).ok();
            if inode(file.metadata()) == inode(fs::metadata(&lock)) {
                break file;
            }
        };
        Ok(Self {
            folder: folder.to_owned(),
            path: folder.join(format!("import-{volume}.json")),
            lock,
            _locked: locked,
        })
    }

    fn io(&self, source: io::Error) -> RecordError {
        RecordError::Io {
            path: self.path.clone(),
            source,
        }
    }

    /// The record, if there is one.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn load(&self) -> Result<Option<Record>, RecordError> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io(error)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|_| {
            let path = self.path.clone();
            RecordError::Malformed { path }
        })
    }

    /// Writes the record, durably; see the module's text for what came before.
    ///
    /// # Errors
    /// If it cannot be written; the old one is then still there, or the new one.
    pub fn store(&self, record: &Record) -> Result<(), RecordError> {
        let store = || {
            let new = self.path.with_extension("new");
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            file.sync_all()?;
            fs::rename(&new, &self.path)?;
            File::open(&self.folder)?.sync_all()
        };
        store().map_err(|error: io::Error| self.io(error))
    }

    /// Removes the record: the import is done, or given up.
    ///
    /// # Errors
    /// If it is still there.
    pub fn remove(&self) -> Result<(), RecordError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.io(error)),
            _ => Ok(()),
        }
    }
}

impl Drop for RecordFile {
    fn drop(&mut self) {
        // While it is still locked. One that stays is in nobody's way.
        let _ = fs::remove_file(&self.lock);
    }
}

/// Where a user's records are: `$XDG_STATE_HOME/quarry`, or `~/.local/state/quarry`.
#[must_use]
pub fn folder() -> Option<PathBuf> {
    let absolute = |name: &str| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let state = absolute("XDG_STATE_HOME");
    let state = state.or_else(|| Some(absolute("HOME")?.join(".local/state")));
    state.map(|state| state.join("quarry"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: &str = "0190aabb-0000-7000-8000-000000000001";

    #[test]
    fn record_stored_is_loaded_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a/b");
        let image = dir.path().join("image");
        fs::write(&image, "some").unwrap();
        let metadata = fs::metadata(&image).unwrap();
        let mut record = Record {
            volume: VOLUME.to_owned(),
            image: ImageId::new(image.clone(), ImageFormat::Raw, 4, &metadata),
            sent_bytes: 0,
            detach: true,
        };
        let place = RecordFile::take(&folder, VOLUME).unwrap();
        assert_eq!(place.load().unwrap(), None);
        for sent_bytes in [0, 1 << 40] {
            record.sent_bytes = sent_bytes;
            place.store(&record).unwrap();
            assert_eq!(place.load().unwrap().as_ref(), Some(&record));
        }
        assert!(record.image.is_unchanged());
        fs::write(&image, "more").unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        let file = File::options().write(true).open(&image).unwrap();
        file.set_modified(later).unwrap();
        assert!(!record.image.is_unchanged());
        let metadata = fs::metadata(&image).unwrap();
        let changed = ImageId::new(image, ImageFormat::Raw, 4, &metadata);
        assert_ne!(changed, record.image);
        place.remove().unwrap();
        place.remove().unwrap();
        assert_eq!(place.load().unwrap(), None);
    }

    #[test]
    fn record_taken_or_malformed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let place = RecordFile::take(dir.path(), VOLUME).unwrap();
        let again = RecordFile::take(dir.path(), VOLUME);
        assert!(matches!(again, Err(RecordError::Busy)), "{again:?}");
        RecordFile::take(dir.path(), "another").unwrap();
        fs::write(dir.path().join(format!("import-{VOLUME}.json")), "{}").unwrap();
        assert!(matches!(place.load(), Err(RecordError::Malformed { .. })));
        drop(place);
        drop(RecordFile::take(dir.path(), VOLUME).unwrap());
        let left = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 1, "the record alone");
    }
}
