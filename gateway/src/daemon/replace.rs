//! Taking over from a daemon that runs: `quarry serve --replace`.
//!
//! The new daemon does all that it can while the old one serves, and only then tells it to stop: so
//! what the users of its devices wait for is the end of one and the last steps of the other.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The daemon that serves at a control socket.
#[derive(Debug)]
pub(super) struct Predecessor {
    pid: Pid,
    /// Names this process and never another one.
    process: OwnedFd,
}

impl Predecessor {
    /// The daemon that listens at `socket`; `None` if nobody does.
    ///
    /// # Errors
    /// If it cannot be told which process that is.
    pub(super) fn find(socket: &Path) -> io::Result<Option<Self>> {
        let connection = match UnixStream::connect(socket) {
            Ok(connection) => connection,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let pid = socket_peercred(&connection)?.pid;
        if pid == Pid::INIT {
            return Err(io::Error::other(
                "the first process of the system listens there",
            ));
        }
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        // Had it died before that, its number could be another's by now; but then nobody would hold
        // the other end of the connection.
        let mut other_end = [PollFd::new(&connection, PollFlags::RDHUP)];
        if poll(&mut other_end, Some(&rustix::time::Timespec::default()))? > 0 {
            return Ok(None);
        }
        Ok(Some(Self { pid, process }))
    }

    /// Its process.
    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// Tells it to stop, and waits until it has ended: it sends what it has to the store first, which
    /// its own configuration bounds. Blocks.
    ///
    /// # Errors
    /// If it may not be told.
    pub(super) fn stop(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.process, Signal::TERM) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        loop {
            match poll(&mut [PollFd::new(&self.process, PollFlags::IN)], None) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_without_a_daemon_has_no_predecessor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quarry.sock");
        assert!(Predecessor::find(&path).unwrap().is_none());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(Predecessor::find(&path).unwrap().is_none());
    }

    #[test]
    fn socket_of_a_process_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quarry.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let found = Predecessor::find(&path).unwrap().unwrap();
        assert_eq!(found.pid(), std::process::id().cast_signed());
    }
}
