//! The ublk front end: volumes as block devices of the Linux kernel, `/dev/ublkbN`.
//!
//! Owns: the life of the devices (add, start, recover, stop, delete), the stamp by which a device
//! is known again after a crash, and the names under `/dev/quarry`. Does not own: the requests,
//! which a queue on a reactor's ring carries ([`crate::reactor::ublk_queue`]), nor the volumes.
//!
//! Invariants:
//! - A device is recovered or removed only if the stamp that the *kernel* keeps for it names the
//!   volume: device numbers are used again, and files under `/run` can be forged.
//! - A device outlives the daemon: nothing but [`Control::remove`] deletes one that was started.
//! - The link under `/dev/quarry` exists only while the device node does.

mod control;
mod link;
mod params;
mod stamp;

use std::fmt;
use std::io;
use std::path::PathBuf;

use libublk::sys;
use quarry_objfmt::{CacheId, Sectors, TenantName, VolumeId, VolumeName};

pub use control::{Control, Found, Host, State};
pub use stamp::Stamp;

/// Requests that a device has under way at most.
pub const QUEUE_DEPTH: u16 = 128;

/// Largest read or write of one request, in bytes.
pub const IO_BYTES_MAX: u32 = 1 << 20;

/// Largest discard or write-zeroes of one request, in bytes.
pub const DISCARD_BYTES_MAX: u32 = 1 << 30;

/// Where the names of the devices are: `<here>/<tenant>/<volume>`.
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

    /// The best mode that it can run a device in.
    ///
    /// # Errors
    /// [`UblkError::TooOld`] without user copy or user recovery (both since Linux 6.5).
    pub const fn mode(self) -> Result<Mode, UblkError> {
        if !self.has(MODE_USER_COPY) {
            return Err(UblkError::TooOld { features: self.0 });
        }
        Ok(Mode::of_flags(self.0))
    }
}

/// What every device of ours has: data by `pread` and `pwrite`, and life beyond its daemon.
const MODE_USER_COPY: u64 =
    (sys::UBLK_F_USER_COPY | sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// What a zero-copy device has beside.
const MODE_ZERO_COPY: u64 =
    MODE_USER_COPY | (sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG) as u64;

/// How a request's data get between its pages and the cache device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// The kernel puts the pages into the ring's buffer table with each request; a request for
    /// which it cannot is served as in the other mode.
    ZeroCopy,
    /// By way of the daemon's memory, one copy (Linux 6.5 to 6.15).
    UserCopy,
}

impl Mode {
    /// The mode of a device with these `UBLK_F_*` flags.
    #[must_use]
    pub const fn of_flags(flags: u64) -> Self {
        if flags & MODE_ZERO_COPY == MODE_ZERO_COPY {
            Self::ZeroCopy
        } else {
            Self::UserCopy
        }
    }

    /// The `UBLK_F_*` flags to add a device with.
    #[must_use]
    pub const fn flags(self) -> u64 {
        match self {
            Self::ZeroCopy => MODE_ZERO_COPY,
            Self::UserCopy => MODE_USER_COPY,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ZeroCopy => "zero copy",
            Self::UserCopy => "user copy",
        })
    }
}

/// The device to make of a volume, or that was made of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceSpec {
    /// The cache device of the daemon that serves it.
    pub cache: CacheId,
    /// The volume.
    pub volume: VolumeId,
    /// Its tenant.
    pub tenant: TenantName,
    /// Its name.
    pub name: VolumeName,
    /// Its size; a multiple of `sector_size`.
    pub size: Sectors,
    /// Bytes of a logical block: 512 or 4096.
    pub sector_size: u32,
    /// Whether the device takes no writes.
    pub read_only: bool,
}

/// A device that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub node: PathBuf,
    /// `/dev/quarry/<tenant>/<volume>`; `None` if it could not be made.
    pub link: Option<PathBuf>,
    /// How its data travel.
    pub mode: Mode,
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
        "ublk of this kernel is too old (features {features:#x}; Linux 6.5 is the first that will do): use --via nbd"
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
    /// The folder of the devices' files cannot be made.
    #[error("/run/ublksrvd cannot be made: {0}")]
    Folder(#[source] io::Error),
    /// Too many commands wait for the kernel already.
    #[error("too many ublk commands are under way: try again when they are done")]
    Busy,
    /// The thread of the command died or could not be made.
    #[error("the ublk command did not run: {0}")]
    Thread(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_of_linux_7_3_give_zero_copy() {
        assert_eq!(
            Features::from_bits(0x1e_ffff).mode().unwrap(),
            Mode::ZeroCopy
        );
    }

    #[test]
    fn features_without_auto_registration_give_user_copy() {
        let bits = 0x1e_ffff & !u64::from(sys::UBLK_F_AUTO_BUF_REG);
        assert_eq!(Features::from_bits(bits).mode().unwrap(), Mode::UserCopy);
    }

    #[test]
    fn features_without_user_copy_are_too_old() {
        let bits = 0x1e_ffff & !u64::from(sys::UBLK_F_USER_COPY);
        assert!(matches!(
            Features::from_bits(bits).mode(),
            Err(UblkError::TooOld { .. })
        ));
    }

    #[test]
    fn mode_of_its_own_flags_is_itself() {
        for mode in [Mode::ZeroCopy, Mode::UserCopy] {
            assert_eq!(Mode::of_flags(mode.flags()), mode);
        }
    }
}
