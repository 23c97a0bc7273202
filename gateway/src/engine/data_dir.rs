//! The data folder: made for the daemon's user alone, and one daemon's alone.
//!
//! **Invariant:** who changes the list of what is attached here holds the lock on `daemon.lock` in its folder. The lock
//! dies with its process, however that ends. The file stays: removing it would let two daemons hold locks on different files.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::own;

/// A data folder that is this daemon's.
#[derive(Debug)]
pub(super) struct DataDir {
    /// Held, not used: see the module's invariant. There is none in a folder that nobody can write to.
    _lock: Option<File>,
}

impl DataDir {
    /// Makes the folder, if need be, and takes it for this process.
    ///
    /// # Errors
    /// If it cannot be made, or is another daemon's.
    pub(super) fn take(path: &Path) -> anyhow::Result<Self> {
        let (lock, is_ours) = lock(path)?;
        if !is_ours {
            return in_use(path);
        }
        Ok(Self { _lock: lock })
    }

    /// That [`Self::take`] will do once who is to end has ended: `is_given_up` knows what that has open.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub(super) fn check(
        path: &Path,
        is_given_up: impl FnOnce(&Metadata) -> bool,
    ) -> anyhow::Result<()> {
        let (lock, is_ours) = lock(path)?;
        match lock {
            Some(lock) if !is_ours && !is_given_up(&lock.metadata()?) => in_use(path),
            _ => Ok(()),
        }
    }
}

/// What is said where the folder cannot be made, read or written.
pub(super) fn unusable(path: &Path) -> String {
    format!(
        "the data folder {} cannot be used (set daemon.data_dir or --data-dir to another)",
        path.display()
    )
}

fn in_use<T>(path: &Path) -> anyhow::Result<T> {
    bail!(
        "the data folder {} is in use by another daemon: stop that one, or give this one a folder of its own with daemon.data_dir or --data-dir",
        path.display()
    )
}

/// The folder's lock, and whether it could be had.
fn lock(path: &Path) -> anyhow::Result<(Option<File>, bool)> {
    let locked = || -> io::Result<(Option<File>, bool)> {
        own::create_dir_all(path)?;
        let Some(file) = open(&path.join("daemon.lock"))? else {
            tracing::warn!(path = %path.display(), "the data folder's file system takes no writes: what is attached again is what its list says");
            return Ok((None, true));
        };
        match file.try_lock() {
            Ok(()) => Ok((Some(file), true)),
            Err(TryLockError::WouldBlock) => Ok((Some(file), false)),
            Err(TryLockError::Error(error)) => Err(error),
        }
    };
    locked().with_context(|| unusable(path))
}

/// The file to be locked, made if need be; none if it is not there and cannot be, on a file system that became read-only: what
/// is attached there is to be served all the same.
fn open(path: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options
        .create(true)
        .truncate(false)
        .write(true)
        .mode(own::FILE_MODE);
    let opened = match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => File::open(path),
        opened => opened,
    };
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_is_one_daemons_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        DataDir::check(&path, |_| false).unwrap();
        let first = DataDir::take(&path).unwrap();
        let refused = DataDir::take(&path).unwrap_err().to_string();
        assert!(refused.contains("in use by another daemon"), "{refused}");
        assert!(refused.contains("--data-dir"), "{refused}");
        assert!(DataDir::check(&path, |_| false).is_err());
        DataDir::check(&path, |_| true).unwrap();
        drop(first);
        DataDir::take(&path).unwrap();
    }

    #[test]
    fn folder_that_cannot_be_made_is_named_with_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        for path in [file.as_path(), Path::new("/proc/none")] {
            let refused = DataDir::take(path).unwrap_err().to_string();
            assert!(refused.contains(&path.display().to_string()), "{refused}");
            assert!(refused.contains("daemon.data_dir"), "{refused}");
        }
    }
}
