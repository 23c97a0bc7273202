//! The kernel's table of mounts, and what is done to it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use quarry_csi_proto::v1::VolumeUsage;
use quarry_csi_proto::v1::volume_usage::Unit;
use rustix::fs::{AtFlags, CWD, statvfs};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree};
use tonic::Status;

use crate::csi::answer::Answer;
use crate::csi::capability::Access;
use crate::csi::class::bytes;

/// Mounts on top of each other that are taken off a path at most.
const LAYERS_MAX: usize = 16;

/// A block device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Device {
    node: PathBuf,
    /// Its number.
    number: (u32, u32),
}

impl Device {
    /// The one whose node is here.
    ///
    /// # Errors
    /// If there is none.
    pub fn at(node: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(node)?;
        if !metadata.file_type().is_block_device() {
            return Err(io::Error::other("it is no block device"));
        }
        Ok(Self {
            node: node.to_path_buf(),
            number: number(metadata.rdev()),
        })
    }

    /// Its node.
    pub fn node(&self) -> &Path {
        &self.node
    }
}

fn number(device: u64) -> (u32, u32) {
    (rustix::fs::major(device), rustix::fs::minor(device))
}

/// A mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mount {
    /// The number of the device that its file system is on.
    device: (u32, u32),
    /// What of that file system it shows.
    root: PathBuf,
    pub at: PathBuf,
    pub read_only: bool,
    pub fs: String,
}

impl Mount {
    /// Whether it is a mount of the file system on this device.
    pub fn is_of(&self, device: &Device) -> bool {
        self.device == device.number
    }

    /// Whether it is this device's node, bound here.
    pub fn is_node_of(&self, device: &Device) -> bool {
        self.root.file_name() == device.node.file_name()
            && Device::at(&self.at).is_ok_and(|here| here.number == device.number)
    }
}

/// The table of mounts that this process sees.
#[derive(Debug)]
pub(super) struct Mounts(Vec<Mount>);

impl Mounts {
    /// As it is now.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn read() -> Answer<Self> {
        let text = tokio::fs::read("/proc/self/mountinfo").await;
        let text = text.map_err(|error| {
            Status::internal(format!("the table of mounts cannot be read: {error}"))
        })?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &[u8]) -> Self {
        let lines = text.split(|byte| *byte == b'\n');
        Self(lines.filter_map(line).collect())
    }

    /// What is on top at a path.
    pub fn at(&self, path: &Path) -> Option<Mount> {
        // The table has it without links; what is not there is nowhere.
        let path = std::fs::canonicalize(path).ok()?;
        self.0.iter().rev().find(|mount| mount.at == path).cloned()
    }

    /// A mount of the file system on this device.
    pub fn of(&self, device: &Device) -> Option<Mount> {
        self.0.iter().find(|mount| mount.is_of(device)).cloned()
    }

    /// Whether the device's file system is mounted, or its node bound, anywhere but at `staged`.
    pub fn is_elsewhere(&self, device: &Device, staged: &Path) -> bool {
        let staged = std::fs::canonicalize(staged).unwrap_or_else(|_| staged.to_path_buf());
        let is_shown = |mount: &&Mount| mount.is_of(device) || mount.is_node_of(device);
        let mut all = self.0.iter().filter(is_shown);
        all.any(|mount| mount.at != staged)
    }
}

/// A line of `mountinfo`: id, parent, device, root, path, options, fields up to a dash, type, source, options of
/// the file system.
fn line(line: &[u8]) -> Option<Mount> {
    let line: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = line.iter().position(|field| *field == b"-")?;
    let device = std::str::from_utf8(line.get(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let has_ro = |options: &[u8]| options.split(|byte| *byte == b',').any(|one| one == b"ro");
    Some(Mount {
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: unescaped(line.get(3)?),
        at: unescaped(line.get(4)?),
        read_only: has_ro(line.get(5)?) || has_ro(line.get(dash + 3)?),
        fs: String::from_utf8_lossy(line.get(dash + 1)?).into_owned(),
    })
}

/// A path in which spaces and the like are written as a backslash and three octal digits.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [byte, behind @ ..] = rest {
        let digits = behind.first_chunk::<3>().filter(|_| *byte == b'\\');
        let code = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(code) => {
                path.push(code);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                path.push(*byte);
                rest = behind;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

/// As what a device is shown at a path: as itself, or as a mount of its file system; none: it is not.
///
/// # Errors
/// If the table of mounts cannot be read.
pub(super) async fn shown(at: &Path, device: &Device) -> Answer<Option<Access>> {
    let mounts = Mounts::read().await?;
    let Some(mount) = mounts.at(at) else {
        return Ok(None);
    };
    if mount.is_of(device) {
        let flags = Vec::new();
        return Ok(Some(Access::Mount { fs: None, flags }));
    }
    Ok(mount.is_node_of(device).then_some(Access::Block))
}

/// How full a file system is, in bytes and inodes.
///
/// # Errors
/// If it does not tell.
pub(super) async fn usage(at: &Path) -> Answer<[VolumeUsage; 2]> {
    let path = at.to_path_buf();
    let stat = blocking(at, "looked at", move || Ok(statvfs(&path)?)).await?;
    let in_bytes = |blocks: u64| bytes(blocks.saturating_mul(stat.f_frsize));
    Ok([
        VolumeUsage {
            available: in_bytes(stat.f_bavail),
            total: in_bytes(stat.f_blocks),
            used: in_bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
            unit: Unit::Bytes.into(),
        },
        VolumeUsage {
            available: bytes(stat.f_favail),
            total: bytes(stat.f_files),
            used: bytes(stat.f_files.saturating_sub(stat.f_ffree)),
            unit: Unit::Inodes.into(),
        },
    ])
}

/// Takes off what is mounted at a path; nothing, if nothing is.
///
/// # Errors
/// If somebody uses it.
pub(super) async fn unmount(at: &Path) -> Answer<()> {
    for _ in 0..LAYERS_MAX {
        if Mounts::read().await?.at(at).is_none() {
            return Ok(());
        }
        let path = at.to_path_buf();
        let unmounted = move || Ok(rustix::mount::unmount(&path, UnmountFlags::NOFOLLOW)?);
        blocking(at, "unmounted", unmounted).await?;
    }
    let message = format!("{LAYERS_MAX} mounts are not all at {}", at.display());
    Err(Status::internal(message))
}

/// Makes what something is to be bound to: a folder, or for a device's node an empty file.
///
/// # Errors
/// If it cannot be made.
pub(super) async fn make(target: &Path, is_file: bool) -> Answer<()> {
    let path = target.to_path_buf();
    let make = move || match is_file {
        true => File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map(drop),
        false => match std::fs::DirBuilder::new().mode(0o750).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        },
    };
    blocking(target, "made", make).await
}

/// Removes what [`make`] made; what has anything in it stays.
///
/// # Errors
/// If it stays.
pub(super) async fn remove(target: &Path) -> Answer<()> {
    let path = target.to_path_buf();
    let remove = move || match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(found) if found.is_dir() => std::fs::remove_dir(&path),
        Ok(found) if found.is_file() && found.len() == 0 => std::fs::remove_file(&path),
        Ok(_) => Err(io::Error::other("it is not what a volume was bound to")),
    };
    blocking(target, "removed", remove).await
}

/// Shows what is at `from` at `to` as well, there without writes if `read_only`: it is so from the moment that it
/// is there.
///
/// # Errors
/// If it cannot be.
pub(super) async fn bind(from: &Path, to: &Path, read_only: bool) -> Answer<()> {
    let (source, target) = (from.to_path_buf(), to.to_path_buf());
    let bind = move || {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, &source, flags)?;
        if read_only {
            forbid_writes(tree.as_fd())?;
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(tree.as_fd(), c"", CWD, &target, flags)?)
    };
    blocking(to, "bound", bind).await
}

/// As the kernel has it, of Linux 5.12.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// `MOUNT_ATTR_RDONLY`
const READ_ONLY: u64 = 1;

/// Makes a mount that is nowhere yet one without writes.
fn forbid_writes(tree: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let attributes = MountAttributes {
        set: READ_ONLY,
        clear: 0,
        propagation: 0,
        userns: 0,
    };
    // SAFETY: the file is open, the path is an empty string, and the attributes, which the kernel only reads, are
    // as long as is said.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            AtFlags::EMPTY_PATH.bits(),
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Does what may wait for a device, where that holds nobody up.
async fn blocking<T: Send + 'static>(
    path: &Path,
    what: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Answer<T> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
    done.map_err(|error| Status::internal(format!("{} cannot be {what}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 1 0:21 / /proc rw,nosuid - proc proc rw
30 1 259:3 / /stage/a\\040b rw,relatime shared:12 - ext4 /dev/ublkb3 rw
31 1 259:3 / /pod/x ro,relatime shared:12 - ext4 /dev/ublkb3 rw
32 1 0:5 /ublkb4 /pod/dev rw - devtmpfs udev rw
33 1 259:5 / /read rw - xfs /dev/ublkb5 ro,nouuid
nonsense
";

    #[test]
    fn table_of_mounts_tells_device_path_and_whether_writes_are_taken() {
        let mounts = Mounts::parse(TABLE.as_bytes());
        let shown: Vec<_> = mounts
            .0
            .iter()
            .map(|m| (m.device, m.at.to_str().unwrap(), m.read_only, m.fs.as_str()))
            .collect();
        assert_eq!(
            shown,
            [
                ((0, 21), "/proc", false, "proc"),
                ((259, 3), "/stage/a b", false, "ext4"),
                ((259, 3), "/pod/x", true, "ext4"),
                ((0, 5), "/pod/dev", false, "devtmpfs"),
                ((259, 5), "/read", true, "xfs"),
            ]
        );
        assert_eq!(mounts.0[3].root, Path::new("/ublkb4"));
    }

    #[test]
    fn device_is_elsewhere_if_a_mount_is_not_the_staged_one() {
        let mounts = Mounts::parse(TABLE.as_bytes());
        let device = |number| Device {
            node: "/dev/nothing-here".into(),
            number,
        };
        assert!(mounts.is_elsewhere(&device((259, 3)), Path::new("/stage/a b")));
        assert!(!mounts.is_elsewhere(&device((259, 5)), Path::new("/read")));
        assert!(!mounts.is_elsewhere(&device((259, 9)), Path::new("/read")));
    }

    #[test]
    fn path_with_odd_escapes_stays_as_it_is() {
        assert_eq!(unescaped(b"/a\\134b\\04"), Path::new("/a\\b\\04"));
        assert_eq!(unescaped(b"/a\\999"), Path::new("/a\\999"));
    }

    #[tokio::test]
    async fn what_was_made_to_be_bound_to_is_removed_and_what_has_something_in_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, file) = (dir.path().join("folder"), dir.path().join("file"));
        for _ in 0..2 {
            make(&folder, false).await.unwrap();
            make(&file, true).await.unwrap();
        }
        std::fs::write(folder.join("x"), "x").unwrap();
        std::fs::write(&file, "x").unwrap();
        assert!(remove(&folder).await.is_err());
        assert!(remove(&file).await.is_err());
        std::fs::remove_file(folder.join("x")).unwrap();
        std::fs::write(&file, "").unwrap();
        for _ in 0..2 {
            remove(&folder).await.unwrap();
            remove(&file).await.unwrap();
            unmount(&folder).await.unwrap();
        }
    }
}
