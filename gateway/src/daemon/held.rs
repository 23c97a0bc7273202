//! What the daemon that is to be replaced has in use: that is free once it has ended, and what others have is not.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use super::replace::Predecessor;

/// The kernel's number of a socket that listens, in its tables.
const LISTENS: &str = "0A";

/// A file or block device, by whichever path or node.
type Identity = (bool, u64, u64);

/// What a process has open.
#[derive(Debug)]
pub(super) struct Held {
    files: BTreeSet<Identity>,
    /// By their inodes.
    sockets: BTreeSet<u64>,
    /// Otherwise all may be its.
    is_known: bool,
}

impl Held {
    /// What it has; nothing, if there is none to be replaced.
    pub(super) fn of(predecessor: Option<&Predecessor>) -> Self {
        let mut held = Self {
            files: BTreeSet::new(),
            sockets: BTreeSet::new(),
            is_known: true,
        };
        if let Some(predecessor) = predecessor
            && let Err(error) = held.add(predecessor.pid())
        {
            tracing::debug!(%error, "what the daemon before has open cannot be told");
            held.is_known = false;
        }
        held
    }

    fn add(&mut self, pid: i32) -> io::Result<()> {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            let found = match fs::metadata(&path) {
                Ok(found) => found,
                // Closed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if found.file_type().is_socket() {
                self.sockets.insert(found.ino());
            } else {
                self.files.insert(identity(&found));
            }
        }
        Ok(())
    }

    /// Whether it has this file or block device open, or may have.
    pub(super) fn has_file(&self, file: &Metadata) -> bool {
        !self.is_known || self.files.contains(&identity(file))
    }

    /// Whether it has this file or block device open, for all that is known.
    pub(super) fn is_seen_with(&self, file: &Metadata) -> bool {
        self.files.contains(&identity(file))
    }

    /// Whether an address in use is in use by somebody else.
    pub(super) fn others_listen_on(&self, address: SocketAddr) -> bool {
        if !self.is_known {
            return false;
        }
        let (its, others): (Vec<_>, Vec<_>) =
            listeners().partition(|(_, inode)| self.sockets.contains(inode));
        !its.iter().any(|(at, _)| *at == address)
            && others.iter().any(|(at, _)| overlap(*at, address))
    }
}

fn identity(found: &Metadata) -> Identity {
    if found.file_type().is_block_device() {
        (true, found.rdev(), 0)
    } else {
        (false, found.dev(), found.ino())
    }
}

/// Where sockets listen on this host, and their inodes; nothing that cannot be read.
fn listeners() -> impl Iterator<Item = (SocketAddr, u64)> {
    ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
        .into_iter()
        .flat_map(|table| {
            let table = fs::read_to_string(table).unwrap_or_default();
            table.lines().filter_map(listener).collect::<Vec<_>>()
        })
}

/// A line of the kernel's table, if its socket listens.
fn listener(line: &str) -> Option<(SocketAddr, u64)> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let (address, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
    if *state != LISTENS {
        return None;
    }
    let (ip, port) = address.split_once(':')?;
    // In the network's order, printed as the host's numbers.
    let word = |at: usize| {
        let digits = ip.get(at..at + 8)?;
        Some(u32::from_be(u32::from_str_radix(digits, 16).ok()?))
    };
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bits = 0_u128;
            for at in [0, 8, 16, 24] {
                bits = (bits << 32) | u128::from(word(at)?);
            }
            IpAddr::from(Ipv6Addr::from(bits))
        }
        _ => return None,
    };
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((SocketAddr::new(ip, port), inode.parse().ok()?))
}

/// Whether two sockets cannot listen there at once.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let (a, b) = (one.ip().to_canonical(), other.ip().to_canonical());
    let takes_in = |a: IpAddr, b: IpAddr| a.is_unspecified() && (a.is_ipv6() || b.is_ipv4());
    one.port() == other.port() && (a == b || takes_in(a, b) || takes_in(b, a))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn held_is_what_the_process_has_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let (open, shut) = (dir.path().join("open"), dir.path().join("shut"));
        let _open = fs::File::create(&open).unwrap();
        drop(fs::File::create(&shut).unwrap());
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        // This process.
        let predecessor = Predecessor::find(&path).unwrap().unwrap();
        let held = Held::of(Some(&predecessor));
        assert!(held.has_file(&fs::metadata(&open).unwrap()));
        assert!(!held.has_file(&fs::metadata(&shut).unwrap()));
        assert!(!held.others_listen_on(address));

        let nobodys = Held::of(None);
        assert!(!nobodys.has_file(&fs::metadata(&open).unwrap()));
        assert!(nobodys.others_listen_on(address));
    }

    #[test]
    fn line_of_a_socket_that_listens_is_its_address_and_inode() {
        let line = |address: &str, state: &str| {
            format!(
                "   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0"
            )
        };
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        // As a little-endian host prints them.
        if cfg!(target_endian = "little") {
            let four = listener(&line("0100007F:2508", "0A")).unwrap();
            assert_eq!(four, (at("127.0.0.1:9480"), 4711));
            let six = "00000000000000000000000001000000:2508";
            let six = listener(&line(six, "0A")).unwrap();
            assert_eq!(six, (at("[::1]:9480"), 4711));
        }
        assert_eq!(listener(&line("0100007F:2508", "01")), None);
        assert_eq!(listener("  sl  local_address rem_address   st"), None);
        assert_eq!(listener(&line("0100:2508", "0A")), None);
    }

    #[test]
    fn addresses_overlap_if_one_takes_in_the_other() {
        let overlaps = |a: &str, b: &str| {
            let (a, b): (SocketAddr, SocketAddr) = (a.parse().unwrap(), b.parse().unwrap());
            assert_eq!(overlap(a, b), overlap(b, a));
            overlap(a, b)
        };
        assert!(overlaps("127.0.0.1:1", "127.0.0.1:1"));
        assert!(overlaps("127.0.0.1:1", "0.0.0.0:1"));
        assert!(overlaps("127.0.0.1:1", "[::]:1"));
        assert!(overlaps("0.0.0.0:1", "[::]:1"));
        assert!(!overlaps("127.0.0.1:1", "127.0.0.1:2"));
        assert!(!overlaps("127.0.0.1:1", "127.0.0.2:1"));
        assert!(!overlaps("[::1]:1", "0.0.0.0:1"));
    }
}
