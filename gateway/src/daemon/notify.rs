//! What the service manager is told, as sd_notify(3) has it: a datagram to the socket that `NOTIFY_SOCKET` names.
//!
//! Best effort throughout: a daemon serves the same whether somebody listens or not.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The service manager, if one started this process.
#[derive(Debug, Default)]
pub(super) struct Manager {
    socket: Option<UnixDatagram>,
}

impl Manager {
    /// The one that the environment names. One that cannot be reached is logged, and not told anything.
    pub(super) fn find(env: impl Fn(&str) -> Option<OsString>) -> Self {
        let Some(name) = env("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Self::default();
        };
        match connect(name.as_bytes()) {
            Ok(socket) => Self {
                socket: Some(socket),
            },
            Err(error) => {
                tracing::warn!(socket = ?name, %error, "the service manager is not told anything");
                Self::default()
            }
        }
    }

    /// Whether somebody listens.
    pub(super) fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// Says so, in lines of `NAME=value`. Never waits: a manager that does not read misses it.
    pub(super) fn tell(&self, lines: &str) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(lines.as_bytes())
        {
            tracing::debug!(%error, lines, "the service manager was not told");
        }
    }

    /// The daemon serves.
    pub(super) fn ready(&self) {
        self.tell("READY=1");
    }

    /// This process is about to stop the daemon that the manager knows, and goes on in its place: from now on it is the
    /// service's main process. To be told before the other ends, which would be the service's end.
    pub(super) fn taking_over(&self) {
        let pid = std::process::id();
        self.tell(&format!(
            "RELOADING=1\nMAINPID={pid}\nSTATUS=taking over from the daemon before"
        ));
    }

    /// The daemon stops, which may take so long.
    pub(super) fn stopping(&self, time_max: Duration) {
        let time_us = time_max.as_micros();
        self.tell(&format!(
            "STOPPING=1\nEXTEND_TIMEOUT_USEC={time_us}\nSTATUS=sending what the store lacks"
        ));
    }
}

/// A leading `@` stands for the zero byte of an abstract name.
fn connect(name: &[u8]) -> io::Result<UnixDatagram> {
    let address = match name {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
        _ => {
            let problem = "NOTIFY_SOCKET is neither a path nor an abstract name";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A manager's end, which has heard nothing yet; and what its daemon has.
    pub(crate) fn listener() -> (tempfile::TempDir, UnixDatagram, Manager) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let listener = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::find(|_| Some(path.clone().into_os_string()));
        assert!(manager.is_there());
        (dir, listener, manager)
    }

    pub(crate) fn heard(listener: &UnixDatagram) -> Option<String> {
        let mut text = [0; 4096];
        let length = listener.recv(&mut text).ok()?;
        Some(String::from_utf8(text[..length].to_vec()).unwrap())
    }

    #[test]
    fn manager_at_a_path_hears_each_stage() {
        let (_dir, listener, manager) = listener();
        manager.ready();
        assert_eq!(heard(&listener).unwrap(), "READY=1");
        manager.stopping(Duration::from_secs(90));
        let told = heard(&listener).unwrap();
        assert!(told.starts_with("STOPPING=1\nEXTEND_TIMEOUT_USEC=90000000\n"));
        manager.taking_over();
        let told = heard(&listener).unwrap();
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines[0], "RELOADING=1");
        assert_eq!(lines[1], format!("MAINPID={}", std::process::id()));
    }

    #[test]
    fn manager_at_an_abstract_name_hears() {
        let name = format!("quarry-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        let manager = Manager::find(|_| Some(format!("@{name}").into()));
        manager.ready();
        assert_eq!(heard(&listener).unwrap(), "READY=1");
    }

    #[test]
    fn manager_that_is_not_there_or_does_not_read_holds_up_nobody() {
        for name in [None, Some(""), Some("relative"), Some("/nowhere/notify")] {
            let manager = Manager::find(|_| name.map(OsString::from));
            assert!(!manager.is_there(), "{name:?}");
            manager.ready();
        }
        let (_dir, _listener, manager) = listener();
        for _ in 0..10_000 {
            manager.ready();
        }
    }
}
