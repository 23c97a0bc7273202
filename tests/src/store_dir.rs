//! The files of a folder store, seen from outside: to weigh, copy and damage them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// A folder store's directory.
#[derive(Clone, Debug)]
pub struct StoreDir {
    root: PathBuf,
}

impl StoreDir {
    /// The folder store in `root/store`, where [`crate::Site::with_folder`] puts it.
    #[must_use]
    pub fn of(root: &Path) -> Self {
        Self {
            root: root.join("store"),
        }
    }

    /// All objects whose key has `part` as one of its parts (such as `chunk`, `map` or `head`), in order.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn objects(&self, part: &str) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        walk(&self.root, &mut found)?;
        found.retain(|path| {
            path.strip_prefix(&self.root)
                .is_ok_and(|key| key.iter().any(|name| name == part))
        });
        found.sort();
        Ok(found)
    }

    /// An object's key, as the daemon would name it.
    ///
    /// # Panics
    /// If the path is not of this store.
    #[must_use]
    pub fn key(&self, object: &Path) -> String {
        let key = object
            .strip_prefix(&self.root)
            .expect("an object lies in its store");
        key.display().to_string()
    }

    /// Bytes of everything that belongs to volumes: heads, chunks, maps and snapshots.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn volume_bytes(&self) -> Result<u64> {
        let mut total = 0;
        for object in self.objects("v")? {
            match fs::metadata(object) {
                Ok(found) => total += found.len(),
                // Deleted since it was listed.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(total)
    }

    /// Copies the whole store to `root/store` of another root.
    ///
    /// # Errors
    /// If that fails.
    pub fn copy_to(&self, root: &Path) -> Result<Self> {
        let copy = Self::of(root);
        let mut files = Vec::new();
        walk(&self.root, &mut files)?;
        fs::create_dir_all(&copy.root)?;
        for file in files {
            let to = copy.root.join(file.strip_prefix(&self.root)?);
            fs::create_dir_all(to.parent().context("a file lies in a directory")?)?;
            fs::copy(&file, &to).with_context(|| file.display().to_string())?;
        }
        Ok(copy)
    }
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), found)?;
        } else {
            found.push(entry.path());
        }
    }
    Ok(())
}
