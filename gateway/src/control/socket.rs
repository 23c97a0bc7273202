//! The control socket's file: made with the right mode, taken over from a dead daemon, never from
//! a live one.
//!
//! **Invariant:** who holds the lock on `SOCKET.lock` owns the socket's path. The lock dies with its
//! process, however that ends, so a socket file found while holding it is a dead daemon's.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use tokio::net::UnixListener;

/// Who may talk to the daemon: its user and its group.
const SOCKET_MODE: u32 = 0o660;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a control socket cannot be had. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A daemon is using it.
    #[error("another daemon is running at {}; stop it, or choose another socket with --socket", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// There is something else at its path.
    #[error("{} is there and is no socket; move it away, or choose another path with --socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The file system says no.
    #[error("cannot make the socket {}: {source}; check its directory, or choose another path with --socket", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A unix socket that listens, and the right to its path. Dropping it removes the file.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    listener: Option<UnixListener>,
    /// Held, not used: see the module's invariant.
    _lock: File,
}

impl ControlSocket {
    /// Listens at `path`, making its directory if need be. Within a tokio runtime.
    ///
    /// # Errors
    /// If a daemon is alive there, or the path cannot be used.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let io_error = |source: io::Error| SocketError::Io {
            path: path.to_owned(),
            source,
        };
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(directory)
                .map_err(io_error)?;
        }
        let lock = Self::lock(path)?;
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::NotASocket {
                    path: path.to_owned(),
                });
            }
            // Ours by the lock; but if somebody does answer, the lock file was tampered with.
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(SocketError::InUse {
                    path: path.to_owned(),
                });
            }
            Ok(_) => fs::remove_file(path).map_err(io_error)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error(error)),
        }
        let listener = listen_at(path).map_err(io_error)?;
        Ok(Self {
            path: path.to_owned(),
            listener: Some(listener),
            _lock: lock,
        })
    }

    fn lock(path: &Path) -> Result<File, SocketError> {
        let io_error = |source: io::Error| SocketError::Io {
            path: path.to_owned(),
            source,
        };
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(PathBuf::from(name))
            .map_err(io_error)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(SocketError::InUse {
                path: path.to_owned(),
            }),
            Err(TryLockError::Error(error)) => Err(io_error(error)),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listener, once.
    pub(super) fn take_listener(&mut self) -> io::Result<UnixListener> {
        self.listener
            .take()
            .ok_or_else(|| io::Error::other("the control socket is served already"))
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // The lock is still held, so the file is ours; the next daemon copes if it stays. The lock
        // file itself stays: removing it would let two daemons hold locks on different files.
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "the control socket was not removed");
        }
    }
}

/// The mode is set before the file exists (the kernel takes it from the socket, less the umask),
/// so there is no moment in which others could connect.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::from_raw_mode(SOCKET_MODE))?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
    listen(&socket, BACKLOG)?;
    UnixListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn socket_of_a_live_daemon_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/q.sock");
        let first = ControlSocket::bind(&path).unwrap();
        let refusal = ControlSocket::bind(&path).unwrap_err();
        assert!(matches!(refusal, SocketError::InUse { .. }), "{refusal}");
        assert!(
            refusal
                .to_string()
                .starts_with("another daemon is running at ")
        );
        drop(first);
        assert!(!path.exists());
        ControlSocket::bind(&path).unwrap();
    }

    #[tokio::test]
    async fn socket_of_a_dead_daemon_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = ControlSocket::bind(&path).unwrap();
        UnixStream::connect(socket.path()).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            SOCKET_MODE
        );
    }

    #[tokio::test]
    async fn socket_of_a_live_program_without_our_lock_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sock");
        let _live = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(
            ControlSocket::bind(&path),
            Err(SocketError::InUse { .. })
        ));
    }

    #[tokio::test]
    async fn file_at_the_sockets_path_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(
            ControlSocket::bind(&path),
            Err(SocketError::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }
}
