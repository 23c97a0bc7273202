//! The cache device itself: a file or a block device, opened, locked and checked.
//!
//! Owns the file descriptor, the lock that keeps a second daemon out, and the superblock. Blocking
//! calls only: used at start, by recovery and by upload workers; the reactor does its I/O on the
//! descriptor with its own ring.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quarry_objfmt::index::Session;
use quarry_objfmt::page::Superblock;
use quarry_objfmt::{CacheId, CacheKey, PAGE_SIZE, SessionPage};
use rustix::fs::{FallocateFlags, FlockOperation, IFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::{AlignedBuf, Geometry, SectorCipher, SyncFailure};

/// Size of a cache file when none is named.
pub const CACHE_FILE_SIZE_DEFAULT: u64 = 8 << 30;

/// Who may read a cache file: its owner.
const FILE_MODE: u32 = 0o600;

/// Bytes kept at the front of the device for the superblock and what may come to stand beside it.
const DATA_START: u64 = 1 << 20;

/// Where the session page is: behind the superblock.
const SESSION_AT: u64 = PAGE_SIZE as u64;

/// Largest logical block of a device: of less it zeroes nothing.
const BLOCK_SIZE_MAX: u64 = 4096;

/// Largest segment, and the size on any cache of 512 MiB or more.
const SEGMENT_SIZE_MAX: u32 = 8 << 20;

/// Smallest segment: still 1 MiB of data and room for its records.
const SEGMENT_SIZE_MIN: u32 = 1 << 20;

/// A cache is cut into at least this many segments, so that a few volumes can write at once.
const SEGMENTS_AIM: u64 = 64;

/// The smallest cache that works: eight of the smallest segments.
pub const CACHE_SIZE_MIN: u64 = DATA_START + 8 * SEGMENT_SIZE_MIN as u64;

/// What can go wrong with a cache device.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The system refused.
    #[error("cannot {action} the cache {}: {source}{}", path.display(), remedy(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// The device.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another process holds the lock.
    #[error("the cache {} is in use by another daemon; stop that one or give this one a cache of its own", path.display())]
    Locked {
        /// The device.
        path: PathBuf,
    },
    /// The kernel has given the block device to somebody.
    #[error("the cache {} is in use: it is mounted, a part of a RAID or a volume group, or another daemon's under another name; give this daemon a device of its own", path.display())]
    Claimed {
        /// The device.
        path: PathBuf,
    },
    /// It has content, and not ours.
    #[error("{} holds data that are not a Quarry cache ({reason}); if nobody needs them, wipe its first 4 KiB and start again", path.display())]
    Foreign {
        /// The device.
        path: PathBuf,
        /// Why it is not taken for ours.
        reason: String,
    },
    /// It is a cache of ours, and its end is not there.
    #[error("{} is Quarry cache {id}, cut short: it has {length} of its {needed} bytes; give it these back (a file by `truncate -s {needed}`), and what the rest holds is found again", path.display())]
    Short {
        /// The device.
        path: PathBuf,
        /// Which cache it is.
        id: CacheId,
        /// Its size, in bytes.
        length: u64,
        /// What its superblock speaks of.
        needed: u64,
    },
    /// Too small to work with.
    #[error("the cache {} has {size} bytes; it needs at least {CACHE_SIZE_MIN}", path.display())]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => "; free space there or make the cache smaller",
        io::ErrorKind::PermissionDenied => "; run the daemon as a user that may write it",
        io::ErrorKind::NotFound => "; make its folder first",
        _ => "",
    }
}

/// An open cache device. The lock lasts as long as this value, and every file that was
/// [reopened](Self::reopen), and every I/O on one of them that is under way.
#[derive(Debug)]
pub struct CacheDevice {
    file: File,
    /// Of a block device, which the lock alone does not keep to us: it is on the node, and a device may have
    /// several. And no lock keeps a file system out.
    _claim: Option<File>,
    path: PathBuf,
    id: CacheId,
    geometry: Geometry,
    key: Option<CacheKey>,
    cipher: Option<Arc<SectorCipher>>,
    direct: bool,
    fresh: bool,
    has_sessions: bool,
    kept_size: Option<u64>,
    failure: SyncFailure,
}

impl CacheDevice {
    /// Opens the cache at `path`, formatting it if it is new: a file is made `size` bytes long (none:
    /// [`CACHE_FILE_SIZE_DEFAULT`]), of a block device at most `size` bytes are used.
    ///
    /// A cache that exists keeps its size: changing it needs an empty one. `fresh_id` names it if
    /// it is formatted now; `host` and `now_ms` are recorded in it for people.
    ///
    /// # Errors
    /// [`CacheError`], each naming the path and what to do.
    pub fn open(
        path: &Path,
        size: Option<u64>,
        fresh_id: CacheId,
        host: &str,
        now_ms: u64,
    ) -> Result<Self, CacheError> {
        Self::open_with(path, size, fresh_id, None, host, now_ms)
    }

    /// As [`CacheDevice::open`]; formatted now, its data are to be encrypted by `fresh_key`, if there is one.
    ///
    /// # Errors
    /// [`CacheError`], each naming the path and what to do.
    pub fn open_with(
        path: &Path,
        size: Option<u64>,
        fresh_id: CacheId,
        fresh_key: Option<&CacheKey>,
        host: &str,
        now_ms: u64,
    ) -> Result<Self, CacheError> {
        let fail = |action| failed(action, path);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            // It holds what volumes hold, of encrypted ones too.
            .mode(FILE_MODE)
            .open(path)
            .map_err(fail("open"))?;
        lock(&file, path)?;
        let lost = |errno: rustix::io::Errno| match errno {
            // Another daemon came in between.
            rustix::io::Errno::WOULDBLOCK => CacheError::Locked {
                path: path.to_owned(),
            },
            errno => fail("lock")(errno.into()),
        };
        let meta = file.metadata().map_err(fail("inspect"))?;
        let is_device = meta.file_type().is_block_device();
        let claim = is_device.then(|| claim(&file, path)).transpose()?;
        let length = length_of(&file, &meta).map_err(fail("measure"))?;

        let (superblock, fresh) = if let Some(superblock) = look(&file, path, length)? {
            if !is_device {
                // A copy of a cache may have holes.
                let end = end_of(geometry_of(&superblock));
                allocate(&file, end).map_err(fail("allocate"))?;
            }
            (superblock, false)
        } else {
            let (size, geometry) = blank(path, size, is_device, length)?;
            if !is_device {
                if length == 0 {
                    rewrite_in_place(&file);
                }
                allocate(&file, size).map_err(fail("allocate"))?;
            }
            let superblock = Superblock {
                cache: fresh_id,
                created_ms: now_ms,
                host: host.to_owned(),
                segment_size: geometry.segment_size,
                segments: geometry.segments,
                data_start: geometry.data_start,
                key: fresh_key.cloned(),
                has_sessions: true,
            };
            format(&file, &superblock, size).map_err(|(action, error)| fail(action)(error))?;
            (superblock, true)
        };
        let geometry = geometry_of(&superblock);

        let kept_size = size.filter(|_| !fresh).and_then(|size| {
            let size = if is_device { size.min(length) } else { size };
            other_size(geometry, size)
        });

        // Not before: now it is known to be a cache.
        if !is_device {
            keep_to_ourselves(&file, &meta, path);
        }
        // From here on several of our open files hold it together, each shut out by a lock like the
        // one above.
        share(&file).map_err(lost)?;
        let failure = SyncFailure::default();
        let (file, direct) = match open_again(&file, true) {
            Ok(direct) => {
                share(&direct).map_err(lost)?;
                (direct, true)
            }
            Err(error) => {
                tracing::info!(path = %path.display(), %error, "the cache is used through the page cache: no direct I/O here");
                // What a daemon before could not write is there, clean, as if it were on the device: to be read from that.
                if let Err(error) = file.sync_data() {
                    failure.note(error.raw_os_error().unwrap_or(libc::EIO));
                }
                let dropped = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                if failure.get().is_ok() {
                    dropped.map_err(|error| fail("drop the pages of")(error.into()))?;
                }
                (file, false)
            }
        };
        Ok(Self {
            file,
            _claim: claim,
            path: path.to_owned(),
            id: superblock.cache,
            geometry,
            key: superblock.key,
            cipher: None,
            direct,
            fresh,
            has_sessions: superblock.has_sessions,
            kept_size,
            failure,
        })
    }

    /// The cache's name.
    #[must_use]
    pub const fn id(&self) -> CacheId {
        self.id
    }

    /// How it is cut up.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The wrapped key of its data, if they are encrypted.
    #[must_use]
    pub const fn key(&self) -> Option<&CacheKey> {
        self.key.as_ref()
    }

    /// Gives it what its data are encrypted with. Before that they are not to be read or written.
    pub fn unlock(&mut self, cipher: SectorCipher) {
        self.cipher = Some(Arc::new(cipher));
    }

    /// What its data are encrypted with, if they are; to be shared with the rings.
    #[must_use]
    pub const fn cipher(&self) -> Option<&Arc<SectorCipher>> {
        self.cipher.as_ref()
    }

    /// Whether I/O goes around the page cache.
    #[must_use]
    pub const fn direct(&self) -> bool {
        self.direct
    }

    /// Whether it was formatted just now: then there is nothing to recover.
    #[must_use]
    pub const fn fresh(&self) -> bool {
        self.fresh
    }

    /// Says on the device, durably, that this session has it, and answers which had it before: one of zeroes, if that is not
    /// known. `None`, and nothing is said, on a device that was made by a build without sessions: such a build would use it and
    /// not say so.
    ///
    /// # Errors
    /// If the device cannot be read, written or synced.
    pub fn begin_session(&self, session: Session) -> io::Result<Option<Session>> {
        if !self.has_sessions {
            return Ok(None);
        }
        let mut page = AlignedBuf::zeroed(PAGE_SIZE);
        self.read_at(&mut page, SESSION_AT)?;
        let before = SessionPage::decode(&page, self.id).map(|page| page.session);
        let page = AlignedBuf::copy_of(&SessionPage { session }.encode(self.id)[..]);
        self.write_at(&page, SESSION_AT)?;
        self.sync()?;
        Ok(Some(before.unwrap_or_default()))
    }

    /// Its size in bytes, if it was opened with another than that of which it was made.
    #[must_use]
    pub const fn kept_size(&self) -> Option<u64> {
        self.kept_size
    }

    /// The device opened once more, for a ring, with a share in the lock: so the lock lasts until the
    /// last I/O of a daemon that died is done, and none can land in what its successor writes.
    ///
    /// # Errors
    /// If the process has too many descriptors.
    pub fn reopen(&self) -> io::Result<File> {
        let file = open_again(&self.file, self.direct)?;
        share(&file)?;
        Ok(file)
    }

    /// The device opened once more, for reads through the kernel's page cache, with a share in the lock; `None` if there
    /// is no other way here, or none that is sure: what is written directly must be dropped there by the kernel before the
    /// write is told done, so that a read which begins after that finds it.
    ///
    /// # Errors
    /// If the process has too many descriptors.
    pub fn reopen_buffered(&self) -> io::Result<Option<File>> {
        if !self.direct || !drops_what_is_written(&self.file)? {
            return Ok(None);
        }
        let file = open_again(&self.file, false)?;
        share(&file)?;
        // The hits of many volumes, by extents: nothing is to be read because its neighbour was.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
        Ok(Some(file))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads exactly `buf.len()` bytes.
    ///
    /// # Errors
    /// What the system says; a short read is an error.
    pub fn read_at(&self, buf: &mut AlignedBuf, offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Fills a part of `buf`, sectors that begin at a sector, with data in segments: decrypted, if they are encrypted.
    ///
    /// # Errors
    /// What the system says; a short read is an error.
    pub fn read_data(
        &self,
        buf: &mut AlignedBuf,
        part: Range<usize>,
        offset: u64,
    ) -> io::Result<()> {
        let part = &mut buf[part];
        self.file.read_exact_at(part, offset)?;
        if let Some(cipher) = &self.cipher {
            cipher.decrypt(offset, part);
        }
        Ok(())
    }

    /// Writes all of `buf`.
    ///
    /// # Errors
    /// What the system says.
    pub fn write_at(&self, buf: &AlignedBuf, offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    /// Whether a sync failed, here or on a ring; to be shared with the rings.
    #[must_use]
    pub const fn failure(&self) -> &SyncFailure {
        &self.failure
    }

    /// Makes what was written stable.
    ///
    /// # Errors
    /// What the system says, or said to anybody who synced before: see [`SyncFailure`].
    pub fn sync(&self) -> io::Result<()> {
        let sync = self.failure.begin();
        let synced = self.file.sync_data();
        let errno = synced.err().map(|e| e.raw_os_error().unwrap_or(libc::EIO));
        let how = sync.end(errno).wait();
        how.map_err(io::Error::from_raw_os_error)
    }
}

/// What recovery and uploads need of a cache device. Blocking; the queue of a reactor goes by the file.
pub trait BlockDevice: Send + Sync {
    /// See [`CacheDevice::id`].
    fn id(&self) -> CacheId;
    /// See [`CacheDevice::geometry`].
    fn geometry(&self) -> Geometry;
    /// See [`CacheDevice::read_at`].
    ///
    /// # Errors
    /// What the system says; a short read is an error.
    fn read_at(&self, buf: &mut AlignedBuf, offset: u64) -> io::Result<()>;
    /// See [`CacheDevice::read_data`]; without encryption it is reading.
    ///
    /// # Errors
    /// What the system says; a short read is an error.
    fn read_data(&self, buf: &mut AlignedBuf, part: Range<usize>, offset: u64) -> io::Result<()> {
        let mut whole = AlignedBuf::zeroed(part.len());
        self.read_at(&mut whole, offset)?;
        buf[part].copy_from_slice(&whole);
        Ok(())
    }
    /// See [`CacheDevice::write_at`].
    ///
    /// # Errors
    /// What the system says.
    fn write_at(&self, buf: &AlignedBuf, offset: u64) -> io::Result<()>;
    /// See [`CacheDevice::sync`].
    ///
    /// # Errors
    /// What the system says, or said before.
    fn sync(&self) -> io::Result<()>;
    /// Whether what is read can be believed: after a sync that failed it may be what was there before a write.
    ///
    /// # Errors
    /// What the sync said.
    fn trusted(&self) -> io::Result<()> {
        Ok(())
    }
}

impl BlockDevice for CacheDevice {
    fn id(&self) -> CacheId {
        self.id()
    }
    fn geometry(&self) -> Geometry {
        self.geometry()
    }
    fn read_at(&self, buf: &mut AlignedBuf, offset: u64) -> io::Result<()> {
        self.read_at(buf, offset)
    }
    fn read_data(&self, buf: &mut AlignedBuf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.read_data(buf, part, offset)
    }
    fn write_at(&self, buf: &AlignedBuf, offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.sync()
    }
    fn trusted(&self) -> io::Result<()> {
        self.failure.get().map_err(io::Error::from_raw_os_error)
    }
}

impl AsFd for CacheDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for CacheDevice {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Locks the cache for this process. Waits a little: the kernel takes a dead daemon's io_uring
/// down behind its back, and until then the ring keeps the file, and the lock on it, alive.
fn lock(file: &File, path: &Path) -> Result<(), CacheError> {
    let lock = || rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive);
    match in_time(rustix::io::Errno::WOULDBLOCK, lock) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(CacheError::Locked {
            path: path.to_owned(),
        }),
        locked => locked.map_err(|errno| failed("lock", path)(errno.into())),
    }
}

/// Has the kernel give the block device to this process alone, by whatever node it is opened. Others that
/// do not ask for that can still open it, as we do ourselves. Waits as [`lock`] does.
fn claim(file: &File, path: &Path) -> Result<File, CacheError> {
    let node = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    let open = || rustix::fs::open(&*node, flags, Mode::empty());
    match in_time(rustix::io::Errno::BUSY, open) {
        Ok(claim) => Ok(claim.into()),
        Err(rustix::io::Errno::BUSY) => Err(CacheError::Claimed {
            path: path.to_owned(),
        }),
        Err(errno) => Err(failed("claim", path)(errno.into())),
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
    let path = path.to_owned();
    move |source| CacheError::Io {
        action,
        path,
        source,
    }
}

/// Tries until the answer is another one than `busy`, or it has lasted too long.
fn in_time<T>(
    busy: rustix::io::Errno,
    attempt: impl Fn() -> rustix::io::Result<T>,
) -> rustix::io::Result<T> {
    let begun = Instant::now();
    loop {
        match attempt() {
            Err(errno) if errno == busy && begun.elapsed() < LOCK_WAIT_MAX => {
                std::thread::sleep(LOCK_WAIT_STEP);
            }
            answer => return answer,
        }
    }
}

/// Longest wait for a lock that a dead process may still hold.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// Between two tries.
const LOCK_WAIT_STEP: Duration = Duration::from_millis(10);

/// Gives the file all of its blocks now: a full file system shows here, not under a tenant's write. What
/// was taken before the room ended is given back.
fn allocate(file: &File, size: u64) -> io::Result<()> {
    let before = file.metadata()?.len();
    rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size).map_err(|errno| {
        // Only what lies behind the old end can be told apart.
        let _ = file.set_len(before);
        errno.into()
    })
}

/// That a file beside `path` gets so many bytes. It has no name, and is gone with the answer.
fn room(path: &Path, bytes: u64) -> Result<(), CacheError> {
    let folder = path.with_file_name(".");
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let file = match rustix::fs::open(&folder, flags, Mode::from_raw_mode(FILE_MODE)) {
        Ok(file) => File::from(file),
        // Not every file system has files without a name.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => return Ok(()),
        Err(errno) => return Err(failed("open", path)(errno.into())),
    };
    // What is too much by far is not to take from others what they need meanwhile.
    if let Ok(stat) = rustix::fs::fstatvfs(&file)
        && stat.f_bfree.saturating_mul(stat.f_frsize) < bytes
    {
        return Err(failed("allocate", path)(Errno::NOSPC.into()));
    }
    allocate(&file, bytes).map_err(failed("allocate", path))
}

/// What is asked of a file to make a cache of it.
trait Blank {
    /// Its first `size` bytes are to be zeroes, as far as it has so many.
    fn zero(&self, size: u64) -> io::Result<()>;
    /// It is to begin with this.
    fn write(&self, first: &[u8]) -> io::Result<()>;
    /// What was asked is to be stable.
    fn sync(&self) -> io::Result<()>;
}

impl Blank for File {
    fn zero(&self, size: u64) -> io::Result<()> {
        let size = size.min(length_of(self, &self.metadata()?)?);
        let whole = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(self, whole, 0, size) {
            // Of memory, say: what is cut off is gone.
            Err(Errno::OPNOTSUPP) if self.metadata()?.is_file() => {
                self.set_len(0)?;
                allocate(self, size)
            }
            done => done.map_err(io::Error::from),
        }
    }

    fn write(&self, first: &[u8]) -> io::Result<()> {
        self.write_all_at(first, 0)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Makes a cache of `size` bytes of what is blank where it begins. Fails with what was tried, and why not.
///
/// The order, and what a crash leaves between the steps:
/// 1. If it is to be encrypted: zeroes over what an earlier cache left in the clear, and a sync, for a block device may
///    write in any order until then. *Crash: the first page is blank, and the next start comes back here.*
/// 2. The superblock. *Crash: it may be there or not; what it says of what lies behind it is true.*
/// 3. Sync.
fn format(
    file: &impl Blank,
    superblock: &Superblock,
    size: u64,
) -> Result<(), (&'static str, io::Error)> {
    let failed = |action| move |error: io::Error| (action, error);
    if superblock.key.is_some() {
        // What is behind the last segment, too.
        let whole = size.next_multiple_of(BLOCK_SIZE_MAX);
        file.zero(whole).map_err(failed("zero"))?;
        file.sync().map_err(failed("sync"))?;
    }
    let page = superblock.encode();
    file.write(&page[..]).map_err(failed("format"))?;
    file.sync().map_err(failed("sync"))
}

/// On btrfs a block that is written again is put elsewhere, for which there may be no room, whatever was allocated. Only an
/// empty file can be told not to; other file systems know nothing of it.
fn rewrite_in_place(file: &File) {
    let Ok(flags) = rustix::fs::ioctl_getflags(file) else {
        return;
    };
    if let Err(error) = rustix::fs::ioctl_setflags(file, flags | IFlags::NOCOW) {
        tracing::debug!(%error, "the cache file cannot be told to be written in place, or need not");
    }
}

/// Takes from others what they may do with a cache file of ours that was made with more.
fn keep_to_ourselves(file: &File, meta: &Metadata, path: &Path) {
    let is_ours = meta.uid() == rustix::process::geteuid().as_raw();
    if !meta.is_file() || !is_ours || meta.mode() & 0o077 == 0 {
        return;
    }
    let mode = format!("{:04o}", meta.mode() & 0o7777);
    match rustix::fs::fchmod(file, Mode::from_raw_mode(FILE_MODE)) {
        Ok(()) => {
            tracing::warn!(path = %path.display(), %mode, "others could read the cache file: its mode is 0600 now");
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %mode, %error, "others can read the cache file, and its mode cannot be changed");
        }
    }
}

/// The superblock of what is `length` bytes long; `None` if it is blank.
fn look(file: &File, path: &Path, length: u64) -> Result<Option<Superblock>, CacheError> {
    // All before the first segment: other file systems and volume managers leave the first page blank.
    let mut start = vec![0; usize::try_from(length.min(DATA_START)).expect("1 MiB")];
    file.read_exact_at(&mut start, 0)
        .map_err(failed("read", path))?;
    if start.iter().all(|b| *b == 0) {
        return Ok(None);
    }
    let first = &start[..start.len().min(4096)];
    let superblock = Superblock::decode(first).map_err(|e| CacheError::Foreign {
        path: path.to_owned(),
        reason: e.to_string(),
    })?;
    let needed = end_of(geometry_of(&superblock));
    if length < needed {
        return Err(CacheError::Short {
            path: path.to_owned(),
            id: superblock.cache,
            length,
            needed,
        });
    }
    Ok(Some(superblock))
}

/// How large a cache is that is made now, of what is `length` bytes long, and how it is cut up.
fn blank(
    path: &Path,
    asked: Option<u64>,
    is_device: bool,
    length: u64,
) -> Result<(u64, Geometry), CacheError> {
    let size = if is_device {
        asked.unwrap_or(u64::MAX).min(length)
    } else {
        asked.unwrap_or(CACHE_FILE_SIZE_DEFAULT)
    };
    let geometry = cut(size).ok_or_else(|| CacheError::TooSmall {
        path: path.to_owned(),
        size,
    })?;
    Ok((size, geometry))
}

const fn geometry_of(superblock: &Superblock) -> Geometry {
    Geometry {
        data_start: superblock.data_start,
        segment_size: superblock.segment_size,
        segments: superblock.segments,
    }
}

/// Where its last segment ends.
fn end_of(geometry: Geometry) -> u64 {
    geometry.data_start + u64::from(geometry.segments) * u64::from(geometry.segment_size)
}

/// The geometry for `size` bytes; `None` if they are too few.
fn cut(size: u64) -> Option<Geometry> {
    if size < CACHE_SIZE_MIN {
        return None;
    }
    let room = size - DATA_START;
    let aimed = (room / SEGMENTS_AIM)
        .next_power_of_two()
        .clamp(u64::from(SEGMENT_SIZE_MIN), u64::from(SEGMENT_SIZE_MAX));
    let segment_size = u32::try_from(aimed).ok()?;
    let segments = u32::try_from(room / aimed).unwrap_or(u32::MAX);
    Some(Geometry {
        data_start: DATA_START,
        segment_size,
        segments,
    })
}

/// How many bytes a cache of this geometry has, if they are not those of one that is made of `size`.
fn other_size(geometry: Geometry, size: u64) -> Option<u64> {
    let has = end_of(geometry);
    // A last part that is no whole segment is left unused.
    let same = has..has + u64::from(geometry.segment_size);
    (!same.contains(&size)).then_some(has)
}

/// A share in the lock; see [`lock`].
fn share(file: &File) -> rustix::io::Result<()> {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockShared)
}

/// Opens the same file once more, for direct I/O if sectors of 512 bytes can be read that way; a
/// device that wants more would need bounce buffers for small writes, and is used through the page
/// cache instead.
fn open_again(file: &File, direct: bool) -> io::Result<File> {
    // By its descriptor: the path may lead elsewhere by now.
    let again = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if direct {
        let mut probe = AlignedBuf::zeroed(1024);
        again.read_exact_at(&mut probe[512..1024], 512)?;
    }
    Ok(again)
}

/// Whether the kernel drops what its page cache has of a range when a direct write of it is done, and before that is told:
/// so it is on file systems whose direct I/O is iomap's. On a block device it drops it before the write only, if the write
/// is asynchronous: what anybody reads of the page meanwhile (a neighbour's sectors, `blkid` behind a udev event) stays.
fn drops_what_is_written(file: &File) -> io::Result<bool> {
    const EXT4: u64 = 0xEF53;
    const XFS: u64 = 0x5846_5342;
    const BTRFS: u64 = 0x9123_683E;
    if !file.metadata()?.is_file() {
        return Ok(false);
    }
    let kind = u64::try_from(rustix::fs::fstatfs(file)?.f_type).unwrap_or_default();
    Ok(matches!(kind, EXT4 | XFS | BTRFS))
}

/// The superblock that is at `path` now. None if there is no device, it is blank, cannot be read, or holds none: opening
/// it tells that better, for it may be in use by others. It is locked for nobody: what [`CacheDevice::open`] finds may be
/// another.
#[must_use]
pub fn peek(path: &Path) -> Option<Superblock> {
    let mut first = vec![0; 4096];
    File::open(path).ok()?.read_exact_at(&mut first, 0).ok()?;
    Superblock::decode(&first).ok()
}

/// Refuses what [`CacheDevice::open`] would refuse, as far as that can be told without changing anything. `is_given_up` knows
/// what is in use by who is to end before.
///
/// # Errors
/// [`CacheError`], each naming the path and what to do.
pub fn check(
    path: &Path,
    size: Option<u64>,
    is_given_up: impl FnOnce(&Metadata) -> bool,
) -> Result<(), CacheError> {
    let fail = |action| failed(action, path);
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let (size, _) = blank(path, size, false, 0)?;
            return room(path, size);
        }
        Err(error) => return Err(fail("inspect")(error)),
    };
    let is_device = meta.file_type().is_block_device();
    // A block device that was open for writing is looked at by udev when it is closed.
    let file = OpenOptions::new()
        .read(true)
        .write(!is_device)
        .open(path)
        .map_err(fail("open"))?;
    // Let go with the answer.
    if !is_given_up(&meta) {
        lock(&file, path)?;
        if is_device {
            claim(&file, path)?;
        }
    }
    let length = length_of(&file, &meta).map_err(fail("measure"))?;
    if look(&file, path, length)?.is_some() {
        return Ok(());
    }
    let (size, _) = blank(path, size, is_device, length)?;
    match size.saturating_sub(meta.blocks() * 512) {
        missing if missing > 0 && !is_device => room(path, missing),
        _ => Ok(()),
    }
}

/// How long a file or a block device is, in bytes.
fn length_of(file: &File, meta: &Metadata) -> io::Result<u64> {
    if !meta.file_type().is_block_device() {
        return Ok(meta.len());
    }
    rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use quarry_objfmt::KeyName;

    use super::*;

    const ID: CacheId = CacheId::from_bytes([3; 16]);
    const OTHER: CacheId = CacheId::from_bytes([4; 16]);

    #[test]
    fn reopened_cache_keeps_its_name_and_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let first = CacheDevice::open(&path, Some(64 << 20), ID, "a", 1).unwrap();
        assert!(first.fresh());
        let geometry = first.geometry();
        drop(first);
        let again = CacheDevice::open(&path, Some(128 << 20), OTHER, "b", 2).unwrap();
        assert_eq!(
            (again.id(), again.geometry(), again.fresh()),
            (ID, geometry, false)
        );
    }

    #[test]
    fn cache_opened_with_another_size_tells_which_it_keeps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        // Not whole segments.
        let size = (64 << 20) + 5000;
        let kept = |size| {
            let device = CacheDevice::open(&path, size, ID, "a", 1).unwrap();
            (device.kept_size(), device.geometry())
        };
        let (none, geometry) = kept(Some(size));
        assert_eq!(none, None);
        let segment = u64::from(geometry.segment_size);
        let has = geometry.data_start + u64::from(geometry.segments) * segment;
        for same in [None, Some(size), Some(has), Some(has + segment - 1)] {
            assert_eq!(kept(same).0, None, "{same:?}");
        }
        for other in [32 << 20, has - 1, has + segment, 128 << 20] {
            assert_eq!(kept(Some(other)).0, Some(has), "{other}");
        }
    }

    #[test]
    fn copy_of_a_cache_with_holes_has_none_once_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("cache"), dir.path().join("copy"));
        drop(CacheDevice::open(&path, Some(16 << 20), ID, "a", 1).unwrap());
        let mut first = vec![0; 4096];
        File::open(&path)
            .unwrap()
            .read_exact_at(&mut first, 0)
            .unwrap();
        let sparse = File::create(&copy).unwrap();
        sparse.write_all_at(&first, 0).unwrap();
        sparse.set_len(16 << 20).unwrap();
        assert!(sparse.metadata().unwrap().blocks() * 512 < 1 << 20);
        let opened = CacheDevice::open(&copy, None, OTHER, "a", 1).unwrap();
        assert!(!opened.fresh());
        let geometry = opened.geometry();
        let used =
            geometry.data_start + u64::from(geometry.segments) * u64::from(geometry.segment_size);
        assert!(sparse.metadata().unwrap().blocks() * 512 >= used);
    }

    #[test]
    fn file_made_or_found_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let mode = || std::fs::metadata(&path).unwrap().mode() & 0o7777;
        drop(CacheDevice::open(&path, Some(16 << 20), ID, "a", 1).unwrap());
        assert_eq!(mode(), 0o600);
        let open = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(&path, open).unwrap();
        drop(CacheDevice::open(&path, None, ID, "a", 1).unwrap());
        assert_eq!(mode(), 0o600);
    }

    /// Tells what it was asked, in order.
    #[derive(Default)]
    struct Asked {
        order: RefCell<Vec<&'static str>>,
        zeroed: Cell<u64>,
    }

    impl Asked {
        fn note(&self, what: &'static str) -> io::Result<()> {
            self.order.borrow_mut().push(what);
            Ok(())
        }
    }

    impl Blank for Asked {
        fn zero(&self, size: u64) -> io::Result<()> {
            self.zeroed.set(size);
            self.note("zero")
        }

        fn write(&self, _: &[u8]) -> io::Result<()> {
            self.note("write")
        }

        fn sync(&self) -> io::Result<()> {
            self.note("sync")
        }
    }

    /// What is asked of it to become a cache of `size` bytes.
    fn asked_for(size: u64, key: Option<CacheKey>) -> Asked {
        let geometry = cut(size).unwrap();
        let superblock = Superblock {
            cache: ID,
            created_ms: 1,
            host: "a".to_owned(),
            segment_size: geometry.segment_size,
            segments: geometry.segments,
            data_start: geometry.data_start,
            key,
            has_sessions: true,
        };
        let asked = Asked::default();
        format(&asked, &superblock, size).unwrap();
        asked
    }

    fn some_key() -> CacheKey {
        CacheKey {
            by: KeyName::new("host-a").unwrap(),
            bytes: vec![7; 92],
        }
    }

    #[test]
    fn cache_says_that_it_is_encrypted_once_what_was_there_is_gone_for_good() {
        let cases: [(_, &[&str]); 2] = [
            (None, &["write", "sync"]),
            (Some(some_key()), &["zero", "sync", "write", "sync"]),
        ];
        for (key, order) in cases {
            assert_eq!(*asked_for(64 << 20, key).order.borrow(), order);
        }
    }

    /// A block device refuses to zero a part of a block.
    #[test]
    fn encrypted_cache_of_any_size_is_zeroed_in_whole_blocks() {
        for (size, zeroed) in [
            (64 << 20, 64 << 20),
            ((64 << 20) + 1, (64 << 20) + 4096),
            ((64 << 20) + 5000, (64 << 20) + 8192),
        ] {
            assert_eq!(asked_for(size, Some(some_key())).zeroed.get(), zeroed);
        }
        // And no further than there is something.
        let file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        file.zero(8192).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 5000);
    }

    #[test]
    fn second_opener_is_refused_while_the_first_lives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let _first = CacheDevice::open(&path, Some(64 << 20), ID, "a", 1).unwrap();
        assert!(matches!(
            CacheDevice::open(&path, Some(64 << 20), ID, "a", 1),
            Err(CacheError::Locked { .. })
        ));
    }

    #[test]
    fn lock_outlives_the_device_while_a_file_of_it_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let first = CacheDevice::open(&path, Some(64 << 20), ID, "a", 1).unwrap();
        let of_a_ring = first.reopen().unwrap();
        drop(first);
        assert!(matches!(
            CacheDevice::open(&path, None, ID, "a", 1),
            Err(CacheError::Locked { .. })
        ));
        drop(of_a_ring);
        CacheDevice::open(&path, None, ID, "a", 1).unwrap();
    }

    #[test]
    fn foreign_content_is_refused_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        // What has its mark at 64 KiB, as btrfs, or just before the first segment would be.
        let marked = |at: usize| {
            let mut content = vec![0; 20 << 20];
            content[at] = b'x';
            content
        };
        let short = vec![b'x'; 7];
        for content in [
            vec![b'x'; 20 << 20],
            marked(64 << 10),
            marked((1 << 20) - 1),
            short,
        ] {
            std::fs::write(&path, &content).unwrap();
            assert!(matches!(
                CacheDevice::open(&path, Some(20 << 20), ID, "a", 1),
                Err(CacheError::Foreign { .. })
            ));
            assert!(std::fs::read(&path).unwrap() == content);
        }
    }

    #[test]
    fn cache_that_is_cut_short_is_told_as_ours_and_works_when_it_has_its_length_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        drop(CacheDevice::open(&path, Some(64 << 20), ID, "a", 1).unwrap());
        let whole = std::fs::metadata(&path).unwrap().len();
        let resize = |len: u64| {
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(len).unwrap();
        };
        resize(32 << 20);
        let error = CacheDevice::open(&path, None, ID, "a", 1).unwrap_err();
        let is_ours = matches!(error, CacheError::Short { id, .. } if id == ID);
        assert!(is_ours, "{error}");
        let words = error.to_string();
        assert!(words.contains(&ID.to_string()), "{words}");
        assert!(words.contains(&whole.to_string()), "{words}");
        assert!(!words.contains("wipe"), "{words}");
        resize(whole);
        let device = CacheDevice::open(&path, None, ID, "a", 1).unwrap();
        assert!(!device.fresh());
    }

    #[test]
    fn check_refuses_what_opening_would_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let ours = |_: &Metadata| true;
        let others = |_: &Metadata| false;
        let size = Some(16 << 20);
        check(&at("new"), size, others).unwrap();
        assert!(!at("new").exists());
        let huge = check(&at("new"), Some(1 << 60), others).unwrap_err();
        assert!(huge.to_string().starts_with("cannot allocate"), "{huge}");
        let small = check(&at("new"), Some(1 << 20), others);
        assert!(matches!(small, Err(CacheError::TooSmall { .. })));
        let nowhere = check(&at("none/cache"), size, others).unwrap_err();
        assert!(nowhere.to_string().contains("make its folder"), "{nowhere}");
        let folder = check(dir.path(), size, others).unwrap_err();
        assert!(folder.to_string().starts_with("cannot open"), "{folder}");

        std::fs::write(at("foreign"), [b'x'; 8192]).unwrap();
        let foreign = check(&at("foreign"), size, others);
        assert!(matches!(foreign, Err(CacheError::Foreign { .. })));
        std::fs::write(at("blank"), [0; 8192]).unwrap();
        check(&at("blank"), size, others).unwrap();
        assert_eq!(std::fs::metadata(at("blank")).unwrap().len(), 8192);

        let device = CacheDevice::open(&at("cache"), size, ID, "a", 1).unwrap();
        check(&at("cache"), size, ours).unwrap();
        let locked = check(&at("cache"), size, others);
        assert!(matches!(locked, Err(CacheError::Locked { .. })));
        drop(device);
        check(&at("cache"), size, others).unwrap();
        let file = OpenOptions::new().write(true).open(at("cache")).unwrap();
        file.set_len(8 << 20).unwrap();
        let cut_off = check(&at("cache"), size, others);
        assert!(matches!(cut_off, Err(CacheError::Short { .. })));
    }

    #[test]
    fn too_small_a_cache_names_the_least_size() {
        let dir = tempfile::tempdir().unwrap();
        let error =
            CacheDevice::open(&dir.path().join("cache"), Some(1 << 20), ID, "a", 1).unwrap_err();
        assert!(error.to_string().contains(&CACHE_SIZE_MIN.to_string()));
    }

    #[test]
    fn geometry_of_any_size_fits_the_device() {
        for size in [CACHE_SIZE_MIN, 64 << 20, 1 << 30, 1 << 40] {
            let geometry = cut(size).unwrap();
            assert!(geometry.segments >= 8);
            assert!(
                geometry.data_start
                    + u64::from(geometry.segments) * u64::from(geometry.segment_size)
                    <= size
            );
        }
    }
}
