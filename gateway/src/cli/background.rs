//! `quarry serve --replace --background`: for service managers whose reload is a command that ends.
//!
//! The daemon is left alone once it serves; until then its end is this command's failure, and the daemon that was to be
//! replaced goes on if it was not stopped yet.
//!
//! **Invariant:** the daemon is no child of this process when it takes over, but of the first process of the system. systemd
//! minds a main process that is not its own child badly: to stop it, it does not wait before it kills.

use std::ffi::OsString;
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Failure;
use crate::control::Client;

/// The flag, which the daemon is not given.
const FLAG: &str = "--background";

/// Between two looks at the daemon.
const PAUSE: Duration = Duration::from_millis(50);

/// How long is waited for the answer of the daemon before, once the new one has ended.
const LOOK_TIME_MAX: Duration = Duration::from_secs(10);

/// Starts the same command in the background, and waits until it is the daemon that answers at `socket`. To be called before
/// there are threads.
///
/// # Errors
/// If it ends before.
pub(super) fn run(socket: &Path) -> Result<(), Failure> {
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = Command::new(program);
    command.args(without_flag(std::env::args_os().skip(1)));
    let pid = spawn_orphan(command.stdin(Stdio::null())).map_err(failed)?;
    // None: it has ended already.
    let process = pidfd_open(pid, PidfdFlags::empty()).ok();
    let number = pid.as_raw_pid().unsigned_abs();
    let client = Client::new(socket)?;
    super::wait(async {
        loop {
            let has_ended = process.as_ref().is_none_or(|process| {
                let mut end = [PollFd::new(process, PollFlags::IN)];
                poll(&mut end, Some(&rustix::time::Timespec::default())) == Ok(1)
            });
            if has_ended {
                let serves = tokio::time::timeout(LOOK_TIME_MAX, client.status()).await;
                let serves = serves.ok().and_then(Result::ok).map(|status| status.pid);
                return Err(ended(socket, serves));
            }
            if client.status().await.is_ok_and(|s| s.pid == number) {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
    })
}

/// `serves`: the process that answers at the socket now, if one does.
fn ended(socket: &Path, serves: Option<u32>) -> Failure {
    let remedy = match serves {
        Some(pid) => format!("see what it said; the one before it, process {pid}, serves on"),
        None => format!(
            "see what it said; none answers at {} now: start one",
            socket.display()
        ),
    };
    Failure::new("failed", "the new daemon ended before it served", remedy)
}

fn failed(why: io::Error) -> Failure {
    let message = format!("the new daemon cannot be started: {why}");
    Failure::new("failed", message, "")
}

fn without_flag(args: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    args.filter(|arg| arg != FLAG)
}

/// Starts a program whose parent has ended by the time of the answer.
fn spawn_orphan(command: &mut Command) -> io::Result<Pid> {
    let (mut reader, writer) = io::pipe()?;
    let fd = writer.as_raw_fd();
    let in_between = move || {
        // SAFETY: of the parent's threads only this one is here; both sides do nothing but system calls until the one
        // executes the program and the other ends.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => Ok(()),
            pid => {
                let pid = pid.to_le_bytes();
                // SAFETY: the bytes are there, and the descriptor is open: it is closed by the program's execution. What
                // cannot be written is missed by the reader.
                unsafe { libc::write(fd, pid.as_ptr().cast(), pid.len()) };
                // SAFETY: it ends the process, without anything that was meant for its parent.
                unsafe { libc::_exit(0) }
            }
        }
    };
    // SAFETY: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(in_between) };
    command.spawn()?.wait()?;
    drop(writer);
    let mut pid = [0; 4];
    reader.read_exact(&mut pid)?;
    Pid::from_raw(i32::from_le_bytes(pid)).ok_or_else(|| io::Error::other("it has no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemon_gets_every_argument_but_the_flag() {
        let args = ["serve", "--replace", FLAG, "--config", "/c"].map(OsString::from);
        let left: Vec<_> = without_flag(args.into_iter()).collect();
        assert_eq!(left, ["serve", "--replace", "--config", "/c"]);
    }

    #[test]
    fn end_of_the_daemon_says_whether_another_serves() {
        let socket = Path::new("/run/q.sock");
        let failure = ended(socket, Some(7)).to_string();
        assert!(failure.ends_with("process 7, serves on"), "{failure}");
        let failure = ended(socket, None).to_string();
        assert!(failure.contains("none answers at /run/q.sock"), "{failure}");
    }

    #[test]
    fn orphan_is_nobodys_child_here() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo $PPID; sleep 30"]).stdout(writer);
        let pid = spawn_orphan(&mut command).unwrap();
        let mut parent = [0; 16];
        let length = reader.read(&mut parent).unwrap();
        let parent = str::from_utf8(&parent[..length]).unwrap().trim();
        assert_ne!(parent, std::process::id().to_string());
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    #[test]
    fn program_that_is_not_there_is_an_error() {
        let found = spawn_orphan(&mut Command::new("/nowhere/quarry")).unwrap_err();
        assert_eq!(found.kind(), io::ErrorKind::NotFound);
    }
}
