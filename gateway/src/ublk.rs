//! The ublk front end: volumes as block devices of the Linux kernel, `/dev/ublkbN`.
//!
//! Owns: the life of the devices (add, start, recover, stop, delete), the stamp by which a device
//! is known again after a crash, the names under `/dev/quarry`, and the devices' owners and modes. Does
//! not own: the requests, which a queue on a reactor's ring carries ([`crate::reactor::ublk_queue`]), nor
//! the volumes.
//!
//! Invariants:
//! - A device is recovered or removed only if the stamp that the *kernel* keeps for it names the
//!   volume: device numbers are used again, and files under `/run` can be forged.
//! - A device outlives the daemon: nothing but [`Control::remove`] deletes one that was started.
//! - The link under `/dev/quarry` exists only while the device node does.
//! - A start that succeeds has given the device the owner and the mode that were asked for.

pub(crate) mod apart;
mod control;
mod link;
mod node;
mod params;
mod run_folder;
mod stamp;
mod udev;

use std::fmt;
use std::io;
use std::path::PathBuf;

use libublk::sys;
use quarry_objfmt::{CacheId, Sectors, SnapName, TenantName, VolumeId, VolumeName};

use crate::moment::Moment;

pub use control::{Control, Found, Host, State};
pub use node::Permissions;
pub use stamp::{Stamp, past_device, snapshot_device};

/// Requests that a queue of a device has under way at most.
pub const QUEUE_DEPTH: u16 = 128;

/// Queues of a device at most.
pub const QUEUES_MAX: u16 = 16;

/// Largest read or write of one request, in bytes.
pub const IO_BYTES_MAX: u32 = 1 << 20;

/// Largest discard or write-zeroes of one request, in bytes.
pub const DISCARD_BYTES_MAX: u32 = 1 << 30;

/// Where the names of the devices are: `<here>/<tenant>/<volume>`, or `…/<volume>@<snapshot>`.
pub const LINK_ROOT: &str = "/dev/quarry";

/// What the ublk driver of the running kernel can do (`UBLK_F_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features(u64);

impl Features {
    /// From the word that `UBLK_U_CMD_GET_FEATURES` answers.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The word.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `flags` are there.
    #[must_use]
    pub const fn has(self, flags: u64) -> bool {
        self.0 & flags == flags
    }

    /// The best mode that it can run a device in, and that is no better than `best`.
    ///
    /// # Errors
    /// [`UblkError::TooOld`] if it has none, for want of user recovery (Linux 6.1).
    pub fn mode(self, best: Mode) -> Result<Mode, UblkError> {
        Mode::ALL
            .into_iter()
            .find(|mode| *mode >= best && self.has(mode.flags()))
            .ok_or(UblkError::TooOld { features: self.0 })
    }
}

/// What every device of ours has: life beyond its daemon.
const RECOVERY: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// How a request's data get between its pages and the cache device; better ones first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Mode {
    /// The kernel puts the pages into the ring's buffer table with each request; a request for
    /// which it cannot is served as in the next mode (Linux 6.16).
    ZeroCopy,
    /// We have the kernel put the pages into the buffer table, one more command a request; a request
    /// for which it cannot is served as in the next mode (Linux 6.15).
    ZeroCopyByHand,
    /// By way of the daemon's memory, one copy, by `pread` and `pwrite` (Linux 6.5).
    UserCopy,
    /// By way of the daemon's memory, one copy, which the kernel makes with the commands.
    Plain,
}

impl Mode {
    /// All of them, the best one first.
    const ALL: [Self; 4] = [
        Self::ZeroCopy,
        Self::ZeroCopyByHand,
        Self::UserCopy,
        Self::Plain,
    ];

    /// The mode of a device with these `UBLK_F_*` flags.
    #[must_use]
    pub fn of_flags(flags: u64) -> Self {
        let has = |mode: &Self| flags & mode.flags() == mode.flags();
        Self::ALL.into_iter().find(has).unwrap_or(Self::Plain)
    }

    /// The `UBLK_F_*` flags to add a device with.
    #[must_use]
    pub const fn flags(self) -> u64 {
        let flags = match self {
            Self::ZeroCopy => {
                sys::UBLK_F_USER_COPY | sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG
            }
            Self::ZeroCopyByHand => sys::UBLK_F_USER_COPY | sys::UBLK_F_SUPPORT_ZERO_COPY,
            Self::UserCopy => sys::UBLK_F_USER_COPY,
            Self::Plain => sys::UBLK_F_NEED_GET_DATA,
        };
        RECOVERY | flags as u64
    }

    /// As it is written: in `volume show`, the log and the metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ZeroCopy => "zero copy",
            Self::ZeroCopyByHand => "zero copy by hand",
            Self::UserCopy => "user copy",
            Self::Plain => "plain",
        }
    }
}

impl From<quarry_config::UblkMode> for Mode {
    fn from(mode: quarry_config::UblkMode) -> Self {
        match mode {
            quarry_config::UblkMode::ZeroCopy => Self::ZeroCopy,
            quarry_config::UblkMode::ZeroCopyByHand => Self::ZeroCopyByHand,
            quarry_config::UblkMode::UserCopy => Self::UserCopy,
            quarry_config::UblkMode::Plain => Self::Plain,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The device to make of a volume, or that was made of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceSpec {
    /// The cache device of the daemon that serves it.
    pub cache: CacheId,
    /// The volume; for a snapshot [`snapshot_device`], at a time [`past_device`].
    pub volume: VolumeId,
    /// Its tenant.
    pub tenant: TenantName,
    /// Its name.
    pub name: VolumeName,
    /// The snapshot, if it is one's.
    pub snapshot: Option<SnapName>,
    /// The time, if it is of a volume as it was then.
    pub at: Option<Moment>,
    /// Its size; a multiple of `sector_size`.
    pub size: Sectors,
    /// Bytes of a logical block: 512 or 4096.
    pub sector_size: u32,
    /// Whether the device takes no writes.
    pub read_only: bool,
    /// Queues of a device that is to be made: all on the volume's reactor, so more of them mean more
    /// requests under way and less contention among those who make them. The kernel has no more than
    /// CPUs.
    pub queues: u16,
    /// Whose its node is to be and who may use it.
    pub permissions: Permissions,
}

/// The name of a device beside its tenant's: `<volume>`, `<volume>@<snapshot>` or `<volume>@<time>`.
fn short_name(name: &VolumeName, snapshot: Option<&SnapName>, at: Option<Moment>) -> String {
    match (snapshot, at) {
        (_, Some(at)) => format!("{name}@{at}"),
        (Some(snapshot), None) => format!("{name}@{snapshot}"),
        (None, None) => name.to_string(),
    }
}

#[cfg(test)]
impl DeviceSpec {
    /// One for tests, to be changed where they look.
    fn example() -> Self {
        Self {
            cache: CacheId::from_bytes([8; 16]),
            volume: VolumeId::from_bytes([7; 16]),
            tenant: TenantName::new("acme").unwrap(),
            name: VolumeName::new("db").unwrap(),
            snapshot: None,
            at: None,
            size: Sectors::new(2048),
            sector_size: 4096,
            read_only: false,
            queues: 1,
            permissions: Permissions::default(),
        }
    }
}

/// A device that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub node: PathBuf,
    /// `/dev/quarry/<tenant>/<volume>`, or `…/<volume>@<snapshot>`; `None` if it could not be made.
    pub link: Option<PathBuf>,
    /// How its data travel.
    pub mode: Mode,
    /// How many queues it has.
    pub queues: u16,
    /// What its users see of the volume: less than all of it if the volume has grown and the kernel
    /// could not be told.
    pub size: Sectors,
}

/// Why something could not be done with a device.
#[derive(Debug, thiserror::Error)]
pub enum UblkError {
    /// There is no driver.
    #[error("this kernel has no ublk: load it with `modprobe ublk_drv`, or use --via nbd")]
    Absent,
    /// The driver is there, but not for us.
    #[error("/dev/ublk-control cannot be used ({0}): run the daemon as root, or use --via nbd")]
    Denied(#[source] io::Error),
    /// The driver lacks what we cannot do without.
    #[error(
        "ublk of this kernel is too old (features {features:#x}; Linux 6.1 is the first that will do): use --via nbd"
    )]
    TooOld {
        /// `UBLK_F_*`.
        features: u64,
    },
    /// A command of the driver's failed.
    #[error("ublk device {id}: {doing} failed: {source}")]
    Command {
        /// The device.
        id: u32,
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The reactor did not take the queue, or the kernel did not take its commands.
    #[error("ublk device {id}: its queue could not be started: {reason}")]
    Queue {
        /// The device.
        id: u32,
        /// What went wrong.
        reason: String,
    },
    /// Somebody has it open for himself alone: a mounted file system, a volume group.
    #[error("{} is in use (mounted, or part of another device): unmount it first", .node.display())]
    InUse {
        /// The device.
        node: PathBuf,
    },
    /// Another daemon serves it.
    #[error("ublk device {id} is served by process {pid}")]
    Served {
        /// The device.
        id: u32,
        /// The process.
        pid: i32,
    },
    /// A device that may be the volume's is there, and no other is made beside it.
    #[error(
        "ublk device {id} may be the one that an earlier daemon left for the volume, and cannot be taken over yet: {why}"
    )]
    NotTaken {
        /// The device.
        id: u32,
        /// Why not.
        why: String,
    },
    /// The device is not, or no longer, this volume's.
    #[error("ublk device {id} is not volume {volume}'s: it is left alone")]
    Foreign {
        /// The device.
        id: u32,
        /// The volume whose it should have been.
        volume: VolumeId,
    },
    /// The device is the volume's, but was made with another shape.
    #[error(
        "ublk device {id} has another {what} than its volume ({device}, not {volume}): detach it and attach the volume again"
    )]
    Shape {
        /// The device.
        id: u32,
        /// What differs.
        what: &'static str,
        /// The device's value.
        device: u64,
        /// The volume's value.
        volume: u64,
    },
    /// A device that was left gives its requests' pages to the cache device, which must not have them as they are.
    #[error(
        "ublk device {id} was made for zero copy, and this host's cache is encrypted: end its users and delete it, or start with the cache that it was made with"
    )]
    ZeroCopy {
        /// The device.
        id: u32,
    },
    /// The driver cannot change a device's size.
    #[error(
        "ublk of this kernel cannot resize a device that is there (Linux 6.16 is the first that can)"
    )]
    FixedSize,
    /// The device started, but its node never came.
    #[error("{} did not appear: is /dev a devtmpfs?", .node.display())]
    NoNode {
        /// The node.
        node: PathBuf,
    },
    /// The node is there, but its owner or mode cannot be set.
    #[error(
        "{} cannot be given its owner and mode ({source}): run the daemon as root, with CAP_CHOWN and CAP_FOWNER, or leave them out", .node.display()
    )]
    Permissions {
        /// The node.
        node: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The folder from which udev's rule learns of the devices cannot be used.
    #[error(
        "{} cannot be used ({source}): it needs some room, and it and the folder above must be directories of the daemon's user, writable by nobody else", .path.display()
    )]
    UdevFolder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder of the devices' files cannot be used.
    #[error(
        "/run/ublksrvd cannot be used ({0}): it must be a directory of the daemon's user, writable by nobody else"
    )]
    Folder(#[source] io::Error),
    /// Too many commands wait for the kernel already.
    #[error("too many ublk commands are under way: try again when they are done")]
    Busy,
    /// Too many of a tenant's do.
    #[error(
        "too many ublk commands for devices of tenant {0} are under way: try again when they are done, or see why its store does not answer"
    )]
    TenantBusy(TenantName),
    /// The thread of the command died or could not be made.
    #[error("the ublk command did not run: {0}")]
    Thread(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINUX_7_3: u64 = 0x1e_ffff;

    fn without(flags: u32) -> Features {
        Features::from_bits(LINUX_7_3 & !u64::from(flags))
    }

    #[test]
    fn features_give_the_best_mode_that_they_have() {
        for (features, mode) in [
            (without(0), Mode::ZeroCopy),
            (without(sys::UBLK_F_AUTO_BUF_REG), Mode::ZeroCopyByHand),
            (without(sys::UBLK_F_SUPPORT_ZERO_COPY), Mode::UserCopy),
            (without(sys::UBLK_F_USER_COPY), Mode::Plain),
        ] {
            assert_eq!(features.mode(Mode::ZeroCopy).unwrap(), mode);
        }
    }

    #[test]
    fn mode_is_no_better_than_asked_for() {
        assert_eq!(without(0).mode(Mode::UserCopy).unwrap(), Mode::UserCopy);
        let old = without(sys::UBLK_F_USER_COPY);
        assert_eq!(old.mode(Mode::UserCopy).unwrap(), Mode::Plain);
    }

    #[test]
    fn features_without_recovery_are_too_old() {
        let features = without(sys::UBLK_F_USER_RECOVERY);
        assert!(matches!(
            features.mode(Mode::ZeroCopy),
            Err(UblkError::TooOld { .. })
        ));
    }

    #[test]
    fn mode_of_its_own_flags_is_itself() {
        for mode in Mode::ALL {
            assert_eq!(Mode::of_flags(mode.flags()), mode);
        }
    }
}
