//! A store in a folder of a local (or shared) file system.
//!
//! An object is a plain file at its key's path. `.quarry/` beside them holds the lock and the files
//! being written. Several processes may use one folder at once. What it makes is its user's alone.
//!
//! **Invariants.**
//! - A file at a key's path is always whole: it is written and synced under another name first, and
//!   gets its name by `link` (create: fails if the name is taken) or `rename` (replace).
//! - `replace` and `delete` hold the folder's lock from the comparison to the change; `create` needs
//!   no lock, for `link` itself lets one through.
//! - An answer that an object exists is only given once its directory is synced, so that what a
//!   caller relies on survives a crash. A crash before that leaves the old state, or the new one.
//! - Whoever else can write in the folder leads us nowhere else: no link in a path is followed, and nothing but plain files
//!   is read. The folder itself may be reached by a link, which is resolved when it is opened.
//! - A folder that is gone (not mounted) is [`StoreError::Unavailable`], never an empty store: its
//!   `.quarry/` is gone too.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::{
    AtFlags, CWD, Dir, DirEntry, FileType, FlockOperation, Mode, OFlags, ResolveFlags, flock,
    linkat, mkdirat, openat, openat2, renameat, statat, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};
use tokio::sync::{Notify, Semaphore};
use uuid::Uuid;

use crate::own;
use crate::provision::MARKER_KEY;

use super::{
    GET_BYTES_MAX, LIST_KEYS_MAX, OpenError, Operation, Store, StoreError, Tag, check_key,
    check_list_prefix, check_range,
};

/// Our own directory in the folder.
const OWN_DIR: &str = ".quarry";
/// Where in it files being written are.
const TMP_DIR: &str = "tmp";
/// How long an operation waits for the folder's lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How often it asks for it.
const LOCK_POLL: Duration = Duration::from_millis(2);
/// How many directories are remembered as synced.
const SYNCED_DIRS_MAX: usize = 65_536;

/// Most threads at once in a folder: the places of a lane. Of a file system that hangs they come back when it does not any more.
const THREADS_MAX: usize = 64;
/// Most threads at once in the folders of tenants, whichever: half of those that the runtime has for work of all kinds. The
/// daemon's own store takes none of them.
const ALL_THREADS_MAX: usize = 256;
static ALL_THREADS: Threads = Threads::new();
/// Folders being opened, each on one thread, however often one that hangs is asked for.
static OPENING: Mutex<BTreeMap<PathBuf, Weak<Semaphore>>> = Mutex::new(BTreeMap::new());

/// For tests: opening a folder in which this is waits until it is gone.
#[cfg(test)]
pub(crate) const HANGS: &str = ".hangs";

/// A store in a folder.
#[derive(Clone, Debug)]
pub struct FolderStore {
    folder: Arc<Folder>,
    threads: Arc<Semaphore>,
    /// Its part of the threads of all tenants' folders, if it is one of them.
    part: Option<Arc<Part>>,
}

/// Threads that folders share. Of them a folder takes only as many as it leaves free: ones that hang leave some to the others.
#[derive(Debug)]
struct Threads {
    free: Mutex<usize>,
    freed: Notify,
}

/// What one folder has of [`Threads`].
#[derive(Debug)]
struct Part {
    of: &'static Threads,
    /// Changed together with what is free.
    taken: AtomicUsize,
    /// For who waits, one at a time: all that wait are woken whenever one is freed.
    turn: Semaphore,
}

/// One of [`Threads`], in use.
struct Taken(Arc<Part>);

#[derive(Debug)]
struct Folder {
    root: PathBuf,
    /// Directories that are there and whose names are synced. Nobody removes a directory.
    synced_dirs: Mutex<HashSet<PathBuf>>,
}

impl FolderStore {
    /// Opens the folder, and removes what a crash left of unfinished writes. With `may_make` it is made, and a store in it, where
    /// there is none; without, a folder that no store was ever in is refused, as the mount point is of one that is not mounted.
    ///
    /// # Errors
    /// If there is none, or it cannot be written.
    pub fn open(root: &Path, may_make: bool) -> Result<Self, OpenError> {
        #[cfg(test)]
        tests::hang(root);
        let refused = |source: io::Error| OpenError::Folder {
            path: root.to_owned(),
            remedy: match source.kind() {
                io::ErrorKind::NotFound => {
                    "mount what belongs there, or have a new store made with store.make_missing = true"
                }
                io::ErrorKind::PermissionDenied => "let the daemon's user write there",
                _ if is(&source, Errno::LOOP) => "links in it are not followed",
                _ => "it must be a directory on a file system that can be written",
            },
            source,
        };
        if may_make {
            own::create_dir_all(root).map_err(refused)?;
        }
        let root_now = fs::canonicalize(root).map_err(refused)?;
        let folder = Folder {
            root: root_now,
            synced_dirs: Mutex::default(),
        };
        if !may_make && !folder.root.join(MARKER_KEY).try_exists().map_err(refused)? {
            let why = "there is no store in this folder";
            return Err(refused(io::Error::new(io::ErrorKind::NotFound, why)));
        }
        folder.prepare().map_err(refused)?;
        Ok(Self {
            folder: Arc::new(folder),
            threads: Arc::new(Semaphore::new(THREADS_MAX)),
            part: None,
        })
    }

    /// As [`FolderStore::open`], for a tenant's folder: on a thread made for that, and waited for at most so long. With it and all
    /// others that are opened so it shares the threads for what is asked of it.
    ///
    /// # Errors
    /// Those of [`FolderStore::open`]; [`io::ErrorKind::TimedOut`] in [`OpenError::Folder`] if the folder does not answer.
    pub async fn open_within(
        root: &Path,
        may_make: bool,
        time_max: Duration,
    ) -> Result<Self, OpenError> {
        let owned = root.to_owned();
        let opened = async {
            // As in `run`: who waits no longer leaves a thread behind, one a folder.
            let thread = being_opened(root).acquire_owned().await;
            let part = Part::new(&ALL_THREADS);
            let threads = (thread, part.take().await);
            let opened = tokio::task::spawn_blocking(move || {
                let _threads = threads;
                Self::open(&owned, may_make).map(|store| store.sharing(part))
            });
            opened.await
        };
        let source = match tokio::time::timeout(time_max, opened).await {
            Ok(Ok(opened)) => return opened,
            Ok(Err(error)) => io::Error::other(error),
            Err(_) => io::Error::new(io::ErrorKind::TimedOut, "it does not answer"),
        };
        Err(OpenError::Folder {
            path: root.to_owned(),
            remedy: "see to the file system that it is on",
            source,
        })
    }

    /// The same store, which takes its threads from those that others take theirs from too.
    fn sharing(self, part: Arc<Part>) -> Self {
        Self {
            part: Some(part),
            ..self
        }
    }

    /// Does blocking `work` on a thread made for that.
    async fn run<T: Send + 'static>(
        &self,
        operation: Operation,
        key: &str,
        work: impl FnOnce(&Folder, &str) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        let folder = Arc::clone(&self.folder);
        let owned = key.to_owned();
        // Who waits no longer for a file system that hangs leaves its thread behind.
        let thread = Arc::clone(&self.threads).acquire_owned().await;
        let of_all = match &self.part {
            Some(part) => Some(part.take().await),
            None => None,
        };
        let threads = (thread, of_all);
        let done = tokio::task::spawn_blocking(move || {
            let _threads = threads;
            work(&folder, &owned).map_err(|failure| folder.explain(operation, &owned, failure))
        });
        match done.await {
            Ok(result) => result,
            Err(error) => Err(StoreError::unavailable(operation, key, error.to_string())),
        }
    }
}

impl Threads {
    const fn new() -> Self {
        Self {
            free: Mutex::new(ALL_THREADS_MAX),
            freed: Notify::const_new(),
        }
    }
}

impl Part {
    /// Of a folder that has none of them yet.
    fn new(of: &'static Threads) -> Arc<Self> {
        Arc::new(Self {
            of,
            taken: AtomicUsize::new(0),
            turn: Semaphore::new(1),
        })
    }

    /// Takes one, as soon as the folder has fewer than are free.
    async fn take(self: &Arc<Self>) -> Taken {
        if let Some(taken) = self.try_take() {
            return taken;
        }
        let _turn = self.turn.acquire().await;
        loop {
            // Before the look: what is freed after it is not missed.
            let freed = self.of.freed.notified();
            if let Some(taken) = self.try_take() {
                return taken;
            }
            freed.await;
        }
    }

    fn try_take(self: &Arc<Self>) -> Option<Taken> {
        let mut free = self.of.free.lock();
        if self.taken.load(Ordering::Relaxed) >= *free {
            return None;
        }
        *free -= 1;
        self.taken.fetch_add(1, Ordering::Relaxed);
        Some(Taken(Arc::clone(self)))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Part { of, taken, .. } = &*self.0;
        {
            let mut free = of.free.lock();
            *free += 1;
            taken.fetch_sub(1, Ordering::Relaxed);
        }
        of.freed.notify_waiters();
    }
}

#[async_trait]
impl Store for FolderStore {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        check_key(key)?;
        self.run(Operation::Get, key, |folder, key| {
            let bytes = folder
                .read(key, GET_BYTES_MAX)?
                .ok_or_else(|| StoreError::too_large(key))?;
            let tag = tag_of(&bytes);
            Ok((bytes, tag))
        })
        .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        check_key(key)?;
        check_range(key, &range)?;
        self.run(Operation::GetRange, key, move |folder, key| {
            folder.read_range(key, &range)
        })
        .await
    }

    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        check_key(key)?;
        check_range(key, &(0..len))?;
        self.run(Operation::GetRange, key, move |folder, key| {
            let (file, size) = folder.open(key)?;
            let mut bytes = Vec::new();
            (&file).take(len.min(size)).read_to_end(&mut bytes)?;
            Ok(bytes.into())
        })
        .await
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        check_key(key)?;
        self.run(Operation::Create, key, move |folder, key| {
            folder.create(key, &body)
        })
        .await
    }

    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        check_key(key)?;
        let seen = seen.clone();
        self.run(Operation::Replace, key, move |folder, key| {
            folder.replace(key, &body, &seen)
        })
        .await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        check_key(key)?;
        self.run(Operation::Delete, key, |folder, key| folder.delete(key))
            .await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        check_list_prefix(prefix)?;
        self.run(Operation::List, prefix, |folder, prefix| {
            let mut keys = folder.list_some(prefix, LIST_KEYS_MAX + 1)?;
            if keys.len() > LIST_KEYS_MAX {
                return Err(StoreError::invalid(prefix, "too many keys to list").into());
            }
            keys.sort_unstable();
            Ok(keys)
        })
        .await
    }

    async fn list_some(&self, prefix: &str, max: usize) -> Result<Vec<String>, StoreError> {
        check_list_prefix(prefix)?;
        self.run(Operation::List, prefix, move |folder, prefix| {
            folder.list_some(prefix, max)
        })
        .await
    }

    fn describe(&self) -> String {
        format!("file://{}", self.folder.root.display())
    }
}

/// What went wrong inside, before it is put into words.
enum Failure {
    Io(io::Error),
    Store(StoreError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Folder {
    fn own(&self, name: &str) -> PathBuf {
        self.root.join(OWN_DIR).join(name)
    }

    fn path(&self, key: &str) -> Result<PathBuf, StoreError> {
        if key.split('/').next() == Some(OWN_DIR) {
            return Err(StoreError::invalid(
                key,
                "keys under .quarry are the folder store's own",
            ));
        }
        Ok(self.root.join(key))
    }

    /// The directory that a key is in, and its name there.
    fn place<'a>(&self, key: &'a str) -> Result<(PathBuf, &'a str), StoreError> {
        let mut dir = self.path(key)?;
        dir.pop();
        Ok((dir, key.rsplit('/').next().unwrap_or(key)))
    }

    fn prepare(&self) -> io::Result<()> {
        let root = open_dir(CWD, &self.root)?;
        let own = make_dir(&root, OsStr::new(OWN_DIR))?;
        let tmp = make_dir(&own, OsStr::new(TMP_DIR))?;
        self.open_lock()?;
        root.sync_all()?;
        own.sync_all()?;
        let mut entries = Dir::read_from(&tmp)?;
        while let Some(entry) = entries.read() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            // Who writes such a file holds its lock; a free one is what a crash left.
            let Ok(file) = open_at(&tmp, Path::new(name), OFlags::RDONLY) else {
                continue;
            };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                match unlinkat(&tmp, name, AtFlags::empty()) {
                    Err(error) if error != Errno::NOENT => return Err(error.into()),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// The directory of files being written.
    fn tmp(&self) -> io::Result<File> {
        open_dir(CWD, &self.own(TMP_DIR))
    }

    fn open_lock(&self) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE;
        open_at(CWD, &self.own("lock"), flags)
    }

    /// Takes the folder's lock, which ends with the answer.
    fn lock(&self) -> io::Result<File> {
        let file = self.open_lock()?;
        let begun = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_PATIENCE => {
                    thread::sleep(LOCK_POLL);
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(io::Error::other("another process keeps the folder locked"));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Opens the file of a key; also its size. A directory is not an object.
    fn open(&self, key: &str) -> Result<(File, u64), Failure> {
        let file = open_at(CWD, &self.path(key)?, OFlags::RDONLY)?;
        let meta = file.metadata()?;
        if meta.is_file() {
            return Ok((file, meta.len()));
        }
        if meta.is_dir() {
            return Err(StoreError::not_found(key).into());
        }
        Err(StoreError::invalid(key, "it is no plain file").into())
    }

    /// The whole object; none if it has more than `max` bytes.
    fn read(&self, key: &str, max: u64) -> Result<Option<Bytes>, Failure> {
        let (file, size) = self.open(key)?;
        if size > max {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        file.take(max).read_to_end(&mut bytes)?;
        Ok(Some(bytes.into()))
    }

    fn read_range(&self, key: &str, range: &Range<u64>) -> Result<Bytes, Failure> {
        let (file, size) = self.open(key)?;
        if size < range.end {
            let got = size.saturating_sub(range.start);
            return Err(StoreError::wrong_length(key, range, got).into());
        }
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        match file.read_exact_at(&mut bytes, range.start) {
            Ok(()) => Ok(bytes.into()),
            // Cut off after its size was read.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(StoreError::wrong_length(key, range, 0).into())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn create(&self, key: &str, body: &[u8]) -> Result<Tag, Failure> {
        let (dir, name) = self.place(key)?;
        let unfinished = Unfinished::write(self.tmp()?, body)?;
        let dir = self.make_dirs(&dir)?;
        let (from, temporary) = (&unfinished.dir, &unfinished.name);
        match linkat(from, temporary, &dir, name, AtFlags::empty()) {
            Ok(()) => {
                dir.sync_all()?;
                Ok(tag_of(body))
            }
            Err(Errno::EXIST) => {
                // Its maker may not have come to that yet, and our caller will rely on it.
                dir.sync_all()?;
                Err(StoreError::exists(key).into())
            }
            Err(error) => {
                // Somebody may have removed a directory that we remember.
                self.synced_dirs.lock().clear();
                Err(error.into())
            }
        }
    }

    fn replace(&self, key: &str, body: &[u8], seen: &Tag) -> Result<Tag, Failure> {
        let (dir, name) = self.place(key)?;
        let unfinished = Unfinished::write(self.tmp()?, body)?;
        let _lock = self.lock()?;
        match self.read(key, GET_BYTES_MAX) {
            Ok(Some(now)) if tag_of(&now) == *seen => {}
            Ok(_) | Err(Failure::Store(StoreError::NotFound { .. })) => {
                return Err(StoreError::changed(key).into());
            }
            Err(Failure::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                self.check_root(Operation::Replace, key)?;
                return Err(StoreError::changed(key).into());
            }
            Err(failure) => return Err(failure),
        }
        let dir = open_dir(CWD, &dir)?;
        renameat(&unfinished.dir, &unfinished.name, &dir, name)?;
        dir.sync_all()?;
        Ok(tag_of(body))
    }

    fn delete(&self, key: &str) -> Result<(), Failure> {
        let (dir, name) = self.place(key)?;
        let _lock = self.lock()?;
        let deleted = open_dir(CWD, &dir).and_then(|dir| {
            unlinkat(&dir, name, AtFlags::empty())?;
            dir.sync_all()
        });
        match deleted {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(self.check_root(Operation::Delete, key)?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a directory, made with those above it, whose names are synced.
    fn make_dirs(&self, dir: &Path) -> io::Result<File> {
        let is_synced = self.synced_dirs.lock().contains(dir);
        if is_synced {
            // Somebody may have removed it.
            return open_dir(CWD, dir).inspect_err(|_| self.synced_dirs.lock().clear());
        }
        let below = dir.strip_prefix(&self.root).map_err(io::Error::other)?;
        let mut made = open_dir(CWD, &self.root)?;
        for part in below {
            let child = make_dir(&made, part)?;
            // If another process has just made it, its sync may be outstanding: ours comes first.
            made.sync_all()?;
            made = child;
        }
        let mut synced = self.synced_dirs.lock();
        if synced.len() >= SYNCED_DIRS_MAX {
            synced.clear();
        }
        synced.insert(dir.to_owned());
        Ok(made)
    }

    fn list_some(&self, prefix: &str, max: usize) -> Result<Vec<String>, Failure> {
        let mut keys = Vec::new();
        if !prefix.is_empty() {
            self.path(prefix)?;
        }
        let mut dirs = vec![prefix.to_owned()];
        'dirs: while let Some(dir) = dirs.pop() {
            let mut entries = match open_dir(CWD, &self.root.join(&dir)) {
                Err(error) if is_nothing_there(&error) => continue,
                opened => Dir::new(opened?)?,
            };
            while let Some(entry) = entries.read() {
                let entry = entry?;
                let Ok(name) = entry.file_name().to_str() else {
                    continue;
                };
                let key = format!("{dir}{name}");
                // Not ours: a file that no key can name.
                if check_key(&key).is_err() || key == OWN_DIR {
                    continue;
                }
                if keys.len() == max {
                    break 'dirs;
                }
                if is_dir(&entries, &entry)? {
                    dirs.push(key + "/");
                } else {
                    keys.push(key);
                }
            }
        }
        self.check_root(Operation::List, prefix)?;
        Ok(keys)
    }

    /// An error unless the folder is where it was.
    fn check_root(&self, operation: Operation, key: &str) -> Result<(), StoreError> {
        if open_at(CWD, &self.own("lock"), OFlags::RDONLY).is_ok() {
            return Ok(());
        }
        let root = self.root.display();
        let reason = format!("the folder {root} is gone: mount it again");
        Err(StoreError::unavailable(operation, key, reason))
    }

    /// Puts a failure into words.
    fn explain(&self, operation: Operation, key: &str, failure: Failure) -> StoreError {
        let error = match failure {
            Failure::Store(error) => return error,
            Failure::Io(error) => error,
        };
        let root = self.root.display();
        match error.kind() {
            _ if is(&error, Errno::LOOP) => match self.check_root(operation, key) {
                Err(gone) => gone,
                Ok(()) => StoreError::invalid(key, "a link leads there, and is not followed"),
            },
            io::ErrorKind::NotFound => match self.check_root(operation, key) {
                Err(gone) => gone,
                Ok(()) if matches!(operation, Operation::Get | Operation::GetRange) => {
                    StoreError::not_found(key)
                }
                Ok(()) => StoreError::unavailable(operation, key, error.to_string()),
            },
            // A key whose beginning is an object is no object.
            io::ErrorKind::NotADirectory
                if matches!(operation, Operation::Get | Operation::GetRange) =>
            {
                StoreError::not_found(key)
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                StoreError::denied(
                    key,
                    format!("{error}: let the daemon's user write in {root}"),
                )
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let reason = format!("the disk of {root} is full ({error}): free some space on it");
                StoreError::unavailable(operation, key, reason)
            }
            io::ErrorKind::NotADirectory
            | io::ErrorKind::IsADirectory
            | io::ErrorKind::AlreadyExists
            | io::ErrorKind::InvalidFilename => StoreError::invalid(key, error.to_string()),
            _ => StoreError::unavailable(operation, key, error.to_string()),
        }
    }
}

/// A file being written, gone when this is dropped. It is locked, so that nobody takes it for a
/// crash's leftover.
struct Unfinished {
    dir: File,
    name: String,
    file: File,
}

impl Unfinished {
    /// Writes a whole file and syncs it.
    fn write(dir: File, body: &[u8]) -> io::Result<Self> {
        let name = Uuid::new_v4().to_string();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let file = open_at(&dir, Path::new(&name), flags)?;
        let mut this = Self { dir, name, file };
        flock(&this.file, FlockOperation::NonBlockingLockExclusive)?;
        this.file.write_all(body)?;
        this.file.sync_all()?;
        Ok(this)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Already renamed, or left for the sweep at the next opening.
        let _ = unlinkat(&self.dir, &self.name, AtFlags::empty());
    }
}

/// The place of who opens a folder: there is one.
fn being_opened(root: &Path) -> Arc<Semaphore> {
    let mut all = OPENING.lock();
    all.retain(|_, place| place.strong_count() > 0);
    if let Some(place) = all.get(root).and_then(Weak::upgrade) {
        return place;
    }
    let place = Arc::new(Semaphore::new(1));
    all.insert(root.to_owned(), Arc::downgrade(&place));
    place
}

/// The tag of a content.
fn tag_of(body: &[u8]) -> Tag {
    let digest = ring::digest::digest(&ring::digest::SHA256, body);
    let mut hex = String::with_capacity(64);
    for byte in digest.as_ref() {
        for nibble in [byte >> 4, byte & 15] {
            hex.extend(char::from_digit(nibble.into(), 16));
        }
    }
    Tag::new(&hex)
}

/// Opens what is at a path, in which no link is followed, and without waiting for the other end of a pipe.
fn open_at(at: impl AsFd, path: &Path, flags: OFlags) -> io::Result<File> {
    let mode = match flags.contains(OFlags::CREATE) {
        true => Mode::from_raw_mode(own::FILE_MODE),
        false => Mode::empty(),
    };
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened = retry_on_intr(|| openat2(&at, path, flags, mode, ResolveFlags::NO_SYMLINKS));
    match opened {
        // An old kernel, or a filter of system calls that does not know this one.
        Err(Errno::NOSYS | Errno::PERM) => Ok(walk_to(at.as_fd(), path, flags, mode)?.into()),
        opened => Ok(opened?.into()),
    }
}

/// The same, one name after the other; a link on the way is no directory.
fn walk_to(at: BorrowedFd<'_>, path: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let open = |at: BorrowedFd<'_>, name: &OsStr, flags: OFlags, mode: Mode| {
        retry_on_intr(|| openat(at, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, mode))
    };
    let step = OFlags::PATH | OFlags::DIRECTORY;
    let mut names = path.iter().peekable();
    let mut dir: Option<OwnedFd> = None;
    while let Some(name) = names.next() {
        let above = dir.as_ref().map_or(at, AsFd::as_fd);
        if names.peek().is_none() {
            return open(above, name, flags, mode);
        }
        let next = open(above, name, step, Mode::empty())?;
        dir = Some(next);
    }
    Err(Errno::NOENT)
}

fn open_dir(at: impl AsFd, path: &Path) -> io::Result<File> {
    open_at(at, path, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Opens a directory in another, made if there is none.
fn make_dir(at: &File, name: &OsStr) -> io::Result<File> {
    match mkdirat(at, name, Mode::from_raw_mode(own::DIR_MODE)) {
        Err(error) if error != Errno::EXIST => Err(error.into()),
        _ => open_dir(at, Path::new(name)),
    }
}

fn is_dir(dir: &Dir, entry: &DirEntry) -> io::Result<bool> {
    let kind = match entry.file_type() {
        // Not every file system tells in its listing.
        FileType::Unknown => {
            let meta = statat(dir.fd()?, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
            FileType::from_raw_mode(meta.st_mode)
        }
        kind => kind,
    };
    Ok(kind == FileType::Directory)
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn is_nothing_there(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::mkfifoat;

    use super::*;
    use crate::store::contract;

    fn open(dir: &Path) -> FolderStore {
        FolderStore::open(dir, true).unwrap()
    }

    /// Waits as a file system does that hangs, where [`HANGS`] is.
    pub(super) fn hang(root: &Path) {
        let begun = Instant::now();
        while root.join(HANGS).exists() && begun.elapsed() < Duration::from_secs(30) {
            thread::sleep(LOCK_POLL);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn folder_keeps_the_contract() {
        let dir = tempfile::tempdir().unwrap();
        contract::run(Arc::new(open(dir.path()))).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn folder_opened_twice_keeps_writers_apart() {
        let dir = tempfile::tempdir().unwrap();
        let both: [Arc<dyn Store>; 2] = [Arc::new(open(dir.path())), Arc::new(open(dir.path()))];
        contract::racing_creates(&both).await;
        contract::racing_replaces(&both).await;
        contract::counting_replaces(&both).await;
    }

    #[test]
    fn folder_that_hangs_takes_no_more_threads_than_are_its() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(THREADS_MAX + 1)
            .enable_time()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let all: &'static Threads = Box::leak(Box::new(Threads::new()));
        let store = open(dir.path()).sharing(Part::new(all));
        fs::write(dir.path().join(HANGS), "").unwrap();
        runtime.block_on(async {
            for _ in 0..2 * THREADS_MAX {
                let gives_up = Duration::from_millis(2);
                let hangs = store.run(Operation::Get, "t", |folder, _| {
                    hang(&folder.root);
                    Ok(())
                });
                let got = tokio::time::timeout(gives_up, hangs).await;
                assert!(got.is_err(), "{got:?}");
            }
            let other = tokio::task::spawn_blocking(|| 7);
            let done = tokio::time::timeout(Duration::from_secs(5), other).await;
            assert_eq!(done.unwrap().unwrap(), 7);
        });
        assert_eq!(ALL_THREADS_MAX - *all.free.lock(), THREADS_MAX);
        fs::remove_file(dir.path().join(HANGS)).unwrap();
        runtime.shutdown_timeout(Duration::from_secs(5));
    }

    /// Four of them stopped the daemon's own store, and those of all other tenants.
    #[test]
    fn folders_that_hang_leave_threads_to_the_others() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(2 * ALL_THREADS_MAX)
            .enable_time()
            .build()
            .unwrap();
        let all: &'static Threads = Box::leak(Box::new(Threads::new()));
        let dirs: [_; 4] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
        let store_in = |dir: &Path| open(dir).sharing(Part::new(all));
        runtime.block_on(async {
            for dir in &dirs {
                let store = store_in(dir.path());
                fs::write(dir.path().join(HANGS), "").unwrap();
                let hang_once = |_| {
                    store.run(Operation::Get, "t", |folder, _| {
                        hang(&folder.root);
                        Ok(())
                    })
                };
                let hang_all = futures::future::join_all((0..THREADS_MAX).map(hang_once));
                let got = tokio::time::timeout(Duration::from_millis(100), hang_all).await;
                assert!(got.is_err(), "{got:?}");
            }
            let dir = tempfile::tempdir().unwrap();
            let (sound, own) = (store_in(dir.path()), open(dir.path()));
            for store in [sound, own] {
                let work = store.run(Operation::Get, "t", |_, _| Ok(7));
                let done = tokio::time::timeout(Duration::from_secs(5), work).await;
                assert_eq!(done.unwrap().unwrap(), 7);
            }
        });
        for dir in &dirs {
            fs::remove_file(dir.path().join(HANGS)).unwrap();
        }
        runtime.shutdown_timeout(Duration::from_secs(5));
        assert_eq!(*all.free.lock(), ALL_THREADS_MAX);
    }

    #[test]
    fn folder_that_hangs_while_it_is_opened_takes_one_thread() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(2)
            .enable_time()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()));
        fs::write(dir.path().join(MARKER_KEY), "{}").unwrap();
        fs::write(dir.path().join(HANGS), "").unwrap();
        let within = |time_max| FolderStore::open_within(dir.path(), false, time_max);
        runtime.block_on(async {
            for _ in 0..8 {
                match within(Duration::from_millis(2)).await {
                    Err(OpenError::Folder { source, .. }) => {
                        assert_eq!(source.kind(), io::ErrorKind::TimedOut);
                    }
                    opened => panic!("{opened:?}"),
                }
            }
            let other = tokio::task::spawn_blocking(|| 7);
            let done = tokio::time::timeout(Duration::from_secs(5), other).await;
            assert_eq!(done.unwrap().unwrap(), 7);
            fs::remove_file(dir.path().join(HANGS)).unwrap();
            within(Duration::from_secs(5)).await.unwrap();
        });
    }

    #[test]
    fn folder_that_is_not_mounted_is_no_new_store_and_is_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let refused = FolderStore::open(dir.path(), false)
            .unwrap_err()
            .to_string();
        assert!(refused.contains("mount"), "{refused}");
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
        FolderStore::open(dir.path(), true).unwrap();
        assert!(FolderStore::open(dir.path(), false).is_err());
        fs::write(dir.path().join(MARKER_KEY), "{}").unwrap();
        FolderStore::open(dir.path(), false).unwrap();
    }

    #[tokio::test]
    async fn folder_missing_is_refused_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let error = FolderStore::open(&dir.path().join("none"), false).unwrap_err();
        assert!(error.to_string().contains("make_missing"), "{error}");
    }

    #[tokio::test]
    async fn folder_gone_is_unavailable_and_not_empty() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        fs::create_dir(&root).unwrap();
        let store = open(&root);
        let tag = store
            .create("a/head", Bytes::from_static(b"1"))
            .await
            .unwrap();
        fs::rename(&root, dir.path().join("elsewhere")).unwrap();
        fs::create_dir(&root).unwrap();
        let body = Bytes::from_static(b"2");
        for error in [
            store.get("a/head").await.unwrap_err(),
            store.get_range("a/head", 0..1).await.unwrap_err(),
            store.create("a/b", body.clone()).await.unwrap_err(),
            store.replace("a/head", body, &tag).await.unwrap_err(),
            store.delete("a/head").await.unwrap_err(),
            store.list("a/").await.unwrap_err(),
        ] {
            assert!(error.is_transient(), "{error}");
        }
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn leftovers_are_swept_at_open_and_files_being_written_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let tmp = dir.path().join(OWN_DIR).join(TMP_DIR);
        fs::write(tmp.join("left"), b"half").unwrap();
        let writing = Unfinished::write(store.folder.tmp().unwrap(), b"whole").unwrap();
        drop(open(dir.path()));
        let left: Vec<_> = fs::read_dir(&tmp)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        assert_eq!(left, [tmp.join(&writing.name)]);
        drop(writing);
        assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn failed_write_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.create("a", Bytes::from_static(b"1")).await.unwrap();
        let body = Bytes::from_static(b"2");
        assert!(store.create("a", body.clone()).await.is_err());
        assert!(
            store
                .replace("a", body.clone(), &Tag::new("x"))
                .await
                .is_err()
        );
        assert!(store.create("a/b", body).await.is_err());
        let tmp = dir.path().join(OWN_DIR).join("tmp");
        assert_eq!(fs::read_dir(tmp).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn own_directory_is_out_of_reach_and_foreign_files_are_not_listed() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        fs::write(dir.path().join("a file"), b"").unwrap();
        store.create("b/.quarry", Bytes::new()).await.unwrap();
        assert_eq!(store.list("").await.unwrap(), ["b/.quarry"]);
        for key in [".quarry/lock", ".quarry", ".quarry/tmp/x"] {
            assert!(matches!(
                store.get(key).await,
                Err(StoreError::Invalid { .. })
            ));
            assert!(matches!(
                store.delete(key).await,
                Err(StoreError::Invalid { .. })
            ));
        }
    }

    #[test]
    fn walk_to_a_path_is_as_opening_it_at_once_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir(root.join("a")).unwrap();
        fs::write(root.join("a/file"), "1").unwrap();
        symlink(root.join("a"), root.join("link")).unwrap();
        symlink(root.join("a/file"), root.join("a/link")).unwrap();
        let walk = |path: &Path| walk_to(CWD, path, OFlags::RDONLY, Mode::empty());
        let text = io::read_to_string(File::from(walk(&root.join("a/file")).unwrap()));
        assert_eq!(text.unwrap(), "1");
        assert!(walk(&root).is_ok());
        let inside = open_dir(CWD, &root).unwrap();
        let beneath = |path| {
            walk_to(
                inside.as_fd(),
                Path::new(path),
                OFlags::RDONLY,
                Mode::empty(),
            )
        };
        assert!(beneath("a/file").is_ok());
        assert_eq!(beneath("a/none").unwrap_err(), Errno::NOENT);
        assert_eq!(beneath("a/link").unwrap_err(), Errno::LOOP);
        assert_eq!(beneath("link/file").unwrap_err(), Errno::NOTDIR);
    }

    #[tokio::test]
    async fn links_in_a_folder_are_not_followed_and_pipes_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let [theirs, root, link] = ["theirs", "store", "link"].map(|name| dir.path().join(name));
        let other = open(&theirs);
        let body = Bytes::from_static(b"theirs");
        let seen = other.create("v/head", body.clone()).await.unwrap();
        fs::create_dir(&root).unwrap();
        symlink(&root, &link).unwrap();
        let store = open(&link);
        store.create("own", body.clone()).await.unwrap();
        symlink(theirs.join("v"), root.join("v")).unwrap();
        symlink(theirs.join("v/head"), root.join("head")).unwrap();
        let pipe = |path: &Path| mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR).unwrap();
        pipe(&root.join("pipe"));
        for (n, done) in [
            store.get("v/head").await.map(drop),
            store.get("head").await.map(drop),
            store.get("pipe").await.map(drop),
            store.get_range("v/head", 0..1).await.map(drop),
            store.get_prefix("pipe", 1).await.map(drop),
            store.create("v/new", body.clone()).await.map(drop),
            store.replace("v/head", body.clone(), &seen).await.map(drop),
            store.replace("head", body, &seen).await.map(drop),
            store.delete("v/head").await,
            store.list("v/").await.map(drop),
        ]
        .into_iter()
        .enumerate()
        {
            assert!(
                matches!(done, Err(StoreError::Invalid { .. })),
                "{n}: {done:?}"
            );
        }
        assert_eq!(store.list("").await.unwrap(), ["head", "own", "pipe", "v"]);
        for key in ["head", "pipe", "v"] {
            store.delete(key).await.unwrap();
        }
        assert_eq!(store.list("").await.unwrap(), ["own"]);
        assert_eq!(other.list("").await.unwrap(), ["v/head"]);
        assert_eq!(other.get("v/head").await.unwrap().0, "theirs");
        let lock = root.join(OWN_DIR).join("lock");
        fs::remove_file(&lock).unwrap();
        pipe(&lock);
        assert!(store.delete("own").await.is_err());
    }

    #[test]
    fn disk_full_says_so_and_passes() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let full = io::Error::from_raw_os_error(libc_enospc());
        let error = store.folder.explain(Operation::Create, "k", full.into());
        assert!(
            error.is_transient() && error.to_string().contains("is full"),
            "{error}"
        );
    }

    fn libc_enospc() -> i32 {
        rustix::io::Errno::NOSPC.raw_os_error()
    }
}
