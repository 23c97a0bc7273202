//! What waits in the kernel for a device's own requests, and no signal ends, is done by a process of its own.
//!
//! Stopping a device waits until none of its requests is under way, and so does taking its I/O scheduler away; opening it
//! may read its partition table; writing its page cache back writes to it. In a thread of the daemon such a wait would keep
//! the daemon from dying: its threads share its descriptors and its memory, so the driver would not be told that who
//! serves the device is gone, nor give its requests back, and what is waited for would not come before a reboot. A child
//! shares neither.
//!
//! **Invariant:** a child does nothing after its daemon's end but what it was in the middle of.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use libublk::ctrl::UblkCtrl;
use quarry_objfmt::VolumeId;
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use super::UblkError;
use super::control::{command, done, errno, prepare_thread, simple};
use super::stamp;

/// The first argument of such a process: no command of the command line's. Behind it come the daemon's process id and
/// the [`Task`].
const ARGUMENT: &str = "ublk-task";

/// The daemon's own program, also when it was replaced or removed since.
const PROGRAM: &str = "/proc/self/exe";

/// What is to be done.
#[derive(Clone, Copy, Serialize, Deserialize, PartialEq, Eq, Debug)]
pub(super) enum Task {
    /// Stop the device `id` if this is its word.
    Stop {
        id: u32,
        word: u64,
        /// Not if somebody holds it for himself alone; and what the page cache has of it is written to it before, which
        /// the driver, of devices that can be recovered, no longer takes once it stops them.
        gently: bool,
    },
    /// Take the device's I/O scheduler away: the kernel gives one (mq-deadline) to each device of one queue, for disks
    /// that seek. Who wants one all the same sets it afterwards, and keeps it over a takeover.
    DropScheduler { id: u32 },
}

/// How it went.
#[derive(Clone, Copy, Serialize, Deserialize, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    Done,
    /// But what the page cache had was not all written.
    Unsynced {
        errno: i32,
    },
    InUse,
    /// The device is another's by now.
    Foreign,
    Failed {
        errno: i32,
    },
}

impl Answer {
    fn failed(error: &io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        Self::Failed { errno }
    }
}

/// Has a child do the task, and waits for it.
///
/// # Errors
/// If there can be no child, or it ended without an answer.
pub(super) fn run(task: Task) -> io::Result<Answer> {
    let daemon = getpid().as_raw_nonzero().to_string();
    let child = Command::new(PROGRAM)
        .args([ARGUMENT, &daemon, &serde_json::to_string(&task)?])
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    serde_json::from_slice(&child.stdout)
        .map_err(|_| io::Error::other(format!("its process gave no answer ({})", child.status)))
}

/// The program, if it was started to do a task: its exit code.
pub(crate) fn main(args: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut args = args.into_iter().skip(1);
    args.next().filter(|argument| argument == ARGUMENT)?;
    let mut text = || args.next()?.into_string().ok();
    let daemon = text()?.parse().ok().and_then(Pid::from_raw)?;
    let task = serde_json::from_str(&text()?).ok()?;
    // The signal is for ends from here on.
    let told = set_parent_process_death_signal(Some(Signal::KILL));
    if told.is_err() || getppid() != Some(daemon) {
        return Some(ExitCode::FAILURE);
    }
    prepare_thread();
    let answer = carry_out(task);
    let answer = serde_json::to_string(&answer).unwrap_or_default();
    // A daemon that has gone reads none.
    let _ = io::stdout().write_all(answer.as_bytes());
    Some(ExitCode::SUCCESS)
}

fn carry_out(task: Task) -> Answer {
    match task {
        Task::Stop { id, word, gently } => stop(id, word, gently),
        Task::DropScheduler { id } => {
            let path = format!("/sys/block/ublkb{id}/queue/scheduler");
            match fs::write(path, "none") {
                Ok(()) => Answer::Done,
                Err(error) => Answer::failed(&error),
            }
        }
    }
}

fn stop(id: u32, word: u64, gently: bool) -> Answer {
    let failed = |error: libublk::UblkError| Answer::Failed {
        errno: errno(&error).unwrap_or(libc::EIO),
    };
    let ctrl: UblkCtrl = match simple(id) {
        Ok(ctrl) if ctrl.dev_info().ublksrv_flags == word => ctrl,
        Ok(_) => return Answer::Foreign,
        Err(error) => return failed(error),
    };
    // Held until it has stopped: nobody mounts it in between.
    let held = match gently {
        true => hold(Path::new(&ctrl.get_bdev_path())),
        false => Ok(None),
    };
    let Ok(held) = held else {
        return Answer::InUse;
    };
    let written = held.as_ref().map_or(Ok(()), File::sync_data);
    match (ctrl.kill_dev().and_then(done), written) {
        (Ok(()), Ok(())) => Answer::Done,
        (Ok(()), Err(error)) => Answer::Unsynced {
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        },
        (Err(error), _) => failed(error),
    }
}

/// The device, held for oneself alone; an error if somebody else holds it so. Only a live disk can be held: of others there
/// is none, and nothing in the page cache.
fn hold(node: &Path) -> io::Result<Option<File>> {
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
        .open(node);
    match opened {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(error),
        opened => Ok(opened.ok()),
    }
}

/// Stops a device of this volume, as [`Task::Stop`] says.
///
/// # Errors
/// [`UblkError::InUse`] only if it is to be gentle.
pub(super) fn stop_device(id: u32, volume: VolumeId, gently: bool) -> Result<(), UblkError> {
    const STOPPING: &str = "stopping it";
    let failed = |source| UblkError::Command {
        id,
        doing: STOPPING,
        source,
    };
    let word = stamp::word(volume);
    match run(Task::Stop { id, word, gently }).map_err(failed)? {
        Answer::Done => Ok(()),
        Answer::Unsynced { errno } => {
            let error = io::Error::from_raw_os_error(errno);
            tracing::warn!(device = id, %error, "what the page cache had of the device could not all be written to it");
            Ok(())
        }
        Answer::InUse => Err(UblkError::InUse {
            node: format!("/dev/ublkb{id}").into(),
        }),
        Answer::Foreign => Err(UblkError::Foreign { id, volume }),
        Answer::Failed { errno } => Err(command(
            id,
            STOPPING,
            libublk::UblkError::UringIOError(-errno),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(args: &[&str]) -> Vec<OsString> {
        args.iter().map(OsString::from).collect()
    }

    #[test]
    fn other_arguments_are_no_task() {
        let task = serde_json::to_string(&Task::DropScheduler { id: 7 }).unwrap();
        for other in [
            &["quarry"][..],
            &["quarry", "serve"],
            &["quarry", "volume", ARGUMENT],
            &["quarry", ARGUMENT],
            &["quarry", ARGUMENT, "0", &task],
            &["quarry", ARGUMENT, "17", "{}"],
        ] {
            assert!(main(args(other)).is_none(), "{other:?}");
        }
    }

    #[test]
    fn device_that_is_not_there_is_not_in_use() {
        assert!(hold(Path::new("/dev/ublkb-none")).unwrap().is_none());
    }
}
