//! Whose process is at the other end of a unix socket, as the kernel says.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::http::request::Parts;
use axum::serve::IncomingStream;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use super::super::ApiResult;
use super::super::serve::Limited;
use crate::engine::access::{find_group, find_user};

/// Supplementary groups of a process: the kernel's own limit.
const GROUPS_MAX: usize = 65_536;

/// The user that may do everything.
const ROOT: u32 = 0;

/// Who is at the other end of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peer {
    /// A process of this host.
    Unix {
        /// Its user when it connected.
        uid: u32,
        /// Its groups, its own and the others.
        groups: Vec<u32>,
        /// Its number.
        pid: Option<i32>,
    },
    /// Somebody on the network.
    Tcp(SocketAddr),
    /// The kernel does not say.
    Unknown,
}

impl Peer {
    /// Who sent a request, as its server says.
    pub(in super::super) fn of_request(parts: &Parts) -> &Self {
        let found = parts.extensions.get::<ConnectInfo<Self>>();
        found.map_or(&Self::Unknown, |ConnectInfo(peer)| peer)
    }

    fn of(stream: &UnixStream) -> io::Result<Self> {
        use std::os::fd::AsFd as _;
        let found = stream.peer_cred()?;
        let mut groups = supplementary_groups(stream.as_fd())?;
        groups.push(found.gid());
        Ok(Self::Unix {
            uid: found.uid(),
            groups,
            pid: found.pid(),
        })
    }
}

/// As the audit log has it.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { uid, pid, .. } => {
                write!(f, "uid {uid}, process {}", pid.unwrap_or_default())
            }
            Self::Tcp(address) => address.fmt(f),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

impl Connected<IncomingStream<'_, Limited<UnixListener>>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Limited<UnixListener>>) -> Self {
        Self::of(stream.io().inner()).unwrap_or_else(|error| {
            tracing::warn!(%error, "the kernel does not say who calls; they are refused");
            Self::Unknown
        })
    }
}

impl Connected<IncomingStream<'_, Limited<TcpListener>>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Limited<TcpListener>>) -> Self {
        Self::Tcp(*stream.remote_addr())
    }
}

fn supplementary_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<u32> = vec![0; 64];
    loop {
        let size = groups.len() * size_of::<u32>();
        let mut size = libc::socklen_t::try_from(size).map_err(io::Error::other)?;
        // SAFETY: `groups` has `size` bytes, which the kernel writes no more than, and outlives the call.
        let code = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut size,
            )
        };
        let count = size as usize / size_of::<u32>();
        if code == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // It says how much room it wants.
        let more = count.min(GROUPS_MAX);
        if error.raw_os_error() != Some(libc::ERANGE) || more <= groups.len() {
            return Err(error);
        }
        groups.resize(more, 0);
    }
}

/// Who may do everything by the unix socket.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Operators {
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl Operators {
    /// Root, the daemon's own user, and those named: users, or groups as `group:NAME`, by name or number.
    ///
    /// # Errors
    /// If the host does not know a name.
    pub fn find(names: &[String]) -> ApiResult<Self> {
        let mut found = Self {
            users: vec![ROOT, rustix::process::geteuid().as_raw()],
            groups: Vec::new(),
        };
        for name in names {
            match name.strip_prefix("group:") {
                Some(group) => found.groups.push(find_group(group)?),
                None => found.users.push(find_user(name)?),
            }
        }
        Ok(found)
    }

    pub(super) fn have(&self, peer: &Peer) -> bool {
        match peer {
            Peer::Unix { uid, groups, .. } => {
                self.users.contains(uid) || groups.iter().any(|g| self.groups.contains(g))
            }
            Peer::Tcp(_) | Peer::Unknown => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, groups: &[u32]) -> Peer {
        Peer::Unix {
            uid,
            groups: groups.to_vec(),
            pid: None,
        }
    }

    #[test]
    fn operators_are_root_the_daemons_user_and_those_named() {
        let named = ["54321".to_owned(), "group:54322".to_owned()];
        let operators = Operators::find(&named).unwrap();
        let own = rustix::process::geteuid().as_raw();
        for peer in [
            peer(0, &[9]),
            peer(own, &[9]),
            peer(54321, &[9]),
            peer(7, &[9, 54322]),
        ] {
            assert!(operators.have(&peer), "{peer:?}");
        }
        for peer in [peer(54322, &[54321]), peer(7, &[]), Peer::Unknown] {
            assert!(!operators.have(&peer), "{peer:?}");
        }
        let unknown = Operators::find(&["group:nobody-has-this-name".to_owned()]);
        assert!(unknown.unwrap_err().message.contains("no group"));
    }

    #[tokio::test]
    async fn peer_of_a_socket_is_this_process_with_its_groups() {
        let (a, _b) = UnixStream::pair().unwrap();
        let Peer::Unix { uid, groups, pid } = Peer::of(&a).unwrap() else {
            panic!("not a unix peer")
        };
        assert_eq!(uid, rustix::process::geteuid().as_raw());
        assert_eq!(pid, i32::try_from(std::process::id()).ok());
        let mut own: Vec<u32> = rustix::process::getgroups()
            .unwrap()
            .iter()
            .map(|g| g.as_raw())
            .collect();
        own.push(rustix::process::getegid().as_raw());
        assert!(own.iter().all(|g| groups.contains(g)), "{groups:?}");
    }
}
