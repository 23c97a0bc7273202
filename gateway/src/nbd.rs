//! The NBD front end: volumes for hosts without ublk, for QEMU, and for tests.
//!
//! A connection is negotiated in tokio ([`negotiate`](mod@negotiate)); its socket then goes to the
//! reactor of its volume, where a [`Connection`] serves it on the reactor's ring without ever
//! leaving that thread. By TLS ([`secure`]) a task stands in between.
//!
//! Owns: sockets, the protocol, the memory of requests. Does not own: which volumes there are
//! ([`ExportDirectory`]), what they do.

mod admission;
pub mod client;
mod connection;
pub mod negotiate;
mod permit;
mod secure;
pub mod wire;

#[cfg(test)]
mod tests;

use std::any::Any;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};

use self::admission::{Admission, Handshake};
pub use self::admission::{ClientStats, Clients, Refused};
pub use self::connection::Connection;
use crate::reactor::memory::{Budget, Total};
use crate::reactor::{Geometry, Message, ReactorHandle, VolumeKey};

/// Most memory of all connections' requests and replies, in bytes; and of a tenant's. What others have, and what its own idle
/// connections keep, leaves a tenant a part: by so much a tenant there may be more together.
const MEMORY_BYTES_MAX: usize = 1 << 30;
const TENANT_MEMORY_BYTES_MAX: usize = 256 << 20;
const TENANT_MEMORY_BYTES_MIN: usize = 32 << 20;

/// How long a client by TCP may be silent before it is asked whether it is there, how often, and how many times: one whose
/// host is gone gives its place back.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(10), 6);

/// Wait after a failed `accept` (no file descriptors left, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A volume that can be had over NBD.
#[derive(Clone)]
pub struct Export {
    /// The reactor that serves the volume.
    pub reactor: ReactorHandle,
    /// The volume's name there.
    pub volume: VolumeKey,
    /// The volume's shape.
    pub geometry: Geometry,
    /// Whose it is: the tenant's group.
    pub group: u32,
}

/// Which volumes can be had, by their names `tenant/volume`.
pub trait ExportDirectory: Send + Sync + 'static {
    /// The export of this name. Must not block.
    fn lookup(&self, name: &str) -> Option<Export>;

    /// All names. Must not block.
    fn list(&self) -> Vec<String>;
}

/// Why an NBD socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another daemon listens there.
    #[error("{path}: another daemon is listening on this socket; stop it or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A file is in the way.
    #[error("{path}: there is a file that is not a socket; remove it or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error(
        "{path}: the socket cannot be opened; make its folder, or choose another path with daemon.nbd_socket"
    )]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Opens a unix socket for the owner and the group; the leftover of a dead daemon is replaced.
///
/// # Errors
/// See [`ListenError`].
pub fn listen_unix(path: &Path) -> Result<UnixListener, ListenError> {
    let fail = io_error(path);
    if is_left_over(path, |_| false)? {
        fs::remove_file(path).map_err(&fail)?;
    }
    let listener = UnixListener::bind(path).map_err(&fail)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(&fail)?;
    Ok(listener)
}

/// Refuses what [`listen_unix`] would refuse, as far as that can be told without changing anything. `ends`: the process that
/// is to end before, if one is.
///
/// # Errors
/// See [`ListenError`].
pub fn may_listen_unix(path: &Path, ends: Option<i32>) -> Result<(), ListenError> {
    let fail = io_error(path);
    is_left_over(path, |peer| {
        let found = sockopt::socket_peercred(peer);
        found.is_ok_and(|found| Some(found.pid.as_raw_pid()) == ends)
    })?;
    // A socket's path may be of 107 bytes.
    std::os::unix::net::SocketAddr::from_pathname(path).map_err(&fail)?;
    let folder = path.with_file_name(".");
    // By what the process may do, not by who started it.
    let (may, flags) = (Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS);
    accessat(CWD, &folder, may, flags).map_err(|errno| fail(errno.into()))
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> ListenError {
    move |source| ListenError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Whether there is a socket that nobody listens at any more, or only who ends.
fn is_left_over(
    path: &Path,
    ends: impl Fn(&std::os::unix::net::UnixStream) -> bool,
) -> Result<bool, ListenError> {
    let fail = io_error(path);
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(fail(error)),
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(peer) if ends(&peer) => Ok(true),
        Ok(_) => Err(ListenError::InUse {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(fail(error)),
    }
}

/// Accepts connections and hands them to the reactors of their volumes. Cheap to clone.
#[derive(Clone)]
pub struct NbdServer {
    directory: Arc<dyn ExportDirectory>,
    admission: Admission,
    memory: Arc<Total>,
    memory_of_tenants: Arc<Mutex<HashMap<u32, Weak<Budget>>>>,
}

impl NbdServer {
    /// A server of these exports, whose clients are counted.
    #[must_use]
    pub fn new(directory: Arc<dyn ExportDirectory>, clients: Arc<Clients>) -> Self {
        Self {
            directory,
            admission: Admission::new(clients),
            memory: Total::new(MEMORY_BYTES_MAX),
            memory_of_tenants: Arc::default(),
        }
    }

    /// The memory of a tenant's connections: one for all that it has at a time.
    fn memory_of(&self, group: u32) -> Arc<Budget> {
        let mut all = self.memory_of_tenants.lock();
        if let Some(budget) = all.get(&group).and_then(Weak::upgrade) {
            return budget;
        }
        all.retain(|_, budget| budget.strong_count() > 0);
        let budget = Budget::new(
            &self.memory,
            TENANT_MEMORY_BYTES_MIN,
            TENANT_MEMORY_BYTES_MAX,
        );
        all.insert(group, Arc::downgrade(&budget));
        budget
    }

    /// Serves a unix socket, until the future is dropped. Connections that are through their
    /// handshake live on: they belong to their volumes.
    pub async fn serve_unix(&self, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let handshake = self.admission.handshake(None);
                    self.welcome(stream, handshake, |stream| {
                        stream.into_std().and_then(blocking_unix)
                    });
                }
                Err(error) => pause(&error).await,
            }
        }
    }

    /// Serves a TCP socket, until the future is dropped.
    pub async fn serve_tcp(&self, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, from)) => self.welcome_tcp(stream, from.ip()),
                Err(error) => pause(&error).await,
            }
        }
    }

    fn welcome_tcp(&self, stream: TcpStream, from: IpAddr) {
        tune(&stream);
        let handshake = self.admission.handshake(Some(from));
        self.welcome(stream, handshake, |stream| {
            stream.into_std().and_then(blocking_tcp)
        });
    }

    /// Starts the handshake of a fresh connection.
    fn welcome<S>(
        &self,
        mut stream: S,
        handshake: Handshake,
        into_fd: impl FnOnce(S) -> io::Result<OwnedFd> + Send + 'static,
    ) where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let server = self.clone();
        tokio::spawn(async move {
            let negotiation = negotiate::negotiate(&mut stream, &*server.directory);
            let Some(negotiated) = handshake.carry_out(negotiation).await else {
                return;
            };
            let Some(place) = server.admission.connection(negotiated.export.group) else {
                return;
            };
            match into_fd(stream) {
                Ok(fd) => server.hand_on(fd, negotiated, Box::new(place)).await,
                Err(error) => tracing::warn!(%error, "an NBD socket cannot be handed on"),
            }
        });
    }

    /// Gives a socket that is through its handshake to the reactor of its volume, which drops `guard` when it is done with it.
    async fn hand_on(
        &self,
        fd: OwnedFd,
        negotiated: negotiate::Negotiated,
        guard: Box<dyn Any + Send>,
    ) {
        let export = negotiated.export;
        let connection = Connection::new(fd, negotiated.replies)
            .within(self.memory_of(export.group))
            .with_guard(guard);
        let message = Message::AddFrontEnd {
            key: export.volume,
            front_end: Box::new(connection),
        };
        if export.reactor.send(message).await.is_err() {
            tracing::debug!("an NBD client came while the daemon went");
        }
    }
}

fn tune(stream: &TcpStream) {
    // Without it a reply waits for the acknowledgement of the one before it.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was refused");
    }
    if let Err(error) = keep_alive(stream) {
        tracing::debug!(%error, "SO_KEEPALIVE was refused");
    }
}

fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    let (idle, interval, count) = KEEPALIVE;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, idle)?;
    sockopt::set_tcp_keepintvl(stream, interval)?;
    sockopt::set_tcp_keepcnt(stream, count)?;
    Ok(())
}

/// The ring waits by itself, if the socket is one that can block.
fn blocking_unix(stream: std::os::unix::net::UnixStream) -> io::Result<OwnedFd> {
    stream.set_nonblocking(false)?;
    Ok(stream.into())
}

fn blocking_tcp(stream: std::net::TcpStream) -> io::Result<OwnedFd> {
    stream.set_nonblocking(false)?;
    Ok(stream.into())
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "an NBD connection cannot be accepted");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

impl std::fmt::Debug for NbdServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdServer").finish_non_exhaustive()
    }
}
