//! Where things lie by default: the system's places for root, the XDG ones for everybody else.

use std::env;
use std::path::{Path, PathBuf};

/// Socket of the system's daemon.
const SYSTEM_SOCKET: &str = "/run/quarry/quarry.sock";
/// Journals of the system's daemons.
const SYSTEM_JOURNAL: &str = "/run/quarry/journal";
/// Data directory of the system's daemon.
const SYSTEM_DATA: &str = "/var/lib/quarry";

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A variable that names an absolute path; XDG says to ignore the others.
fn absolute(variable: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .map(PathBuf::from)
        .filter(|p| p.is_absolute())
}

/// A place of this user's own, when there is no home.
fn fallback() -> PathBuf {
    env::temp_dir().join(format!("quarry-{}", rustix::process::geteuid().as_raw()))
}

fn user_data(state: Option<PathBuf>, home: Option<PathBuf>) -> PathBuf {
    match (state, home) {
        (Some(state), _) => state.join("quarry"),
        (None, Some(home)) => home.join(".local/state/quarry"),
        (None, None) => fallback(),
    }
}

fn user_socket(runtime: Option<PathBuf>, data: &Path) -> PathBuf {
    match runtime {
        Some(runtime) => runtime.join("quarry/quarry.sock"),
        None => data.join("quarry.sock"),
    }
}

/// The default data directory.
pub(crate) fn data_dir() -> PathBuf {
    if is_root() {
        SYSTEM_DATA.into()
    } else {
        user_data(absolute("XDG_STATE_HOME"), absolute("HOME"))
    }
}

/// The default folder of the journals: in memory, where there is such a place for this user.
pub(crate) fn journal_dir() -> PathBuf {
    if is_root() {
        SYSTEM_JOURNAL.into()
    } else {
        user_journal(absolute("XDG_RUNTIME_DIR"), &data_dir())
    }
}

fn user_journal(runtime: Option<PathBuf>, data: &Path) -> PathBuf {
    match runtime {
        Some(runtime) => runtime.join("quarry/journal"),
        None => data.join("journal"),
    }
}

/// The default socket of a daemon.
pub(crate) fn daemon_socket() -> PathBuf {
    if is_root() {
        SYSTEM_SOCKET.into()
    } else {
        user_socket(absolute("XDG_RUNTIME_DIR"), &data_dir())
    }
}

/// The socket that a client tries when none is named: that of this user's own daemon if there is
/// one, else the system's.
#[must_use]
pub fn client_socket() -> PathBuf {
    let own = daemon_socket();
    if own.exists() {
        own
    } else {
        SYSTEM_SOCKET.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_prefers_xdg_state_over_home() {
        assert_eq!(
            user_data(Some("/s".into()), Some("/h".into())),
            PathBuf::from("/s/quarry")
        );
        assert_eq!(
            user_data(None, Some("/h".into())),
            PathBuf::from("/h/.local/state/quarry")
        );
        assert!(user_data(None, None).is_absolute());
    }

    #[test]
    fn user_socket_without_runtime_dir_lies_in_the_data_dir() {
        assert_eq!(
            user_socket(Some("/run/user/7".into()), Path::new("/d")),
            PathBuf::from("/run/user/7/quarry/quarry.sock")
        );
        assert_eq!(
            user_socket(None, Path::new("/d")),
            PathBuf::from("/d/quarry.sock")
        );
        assert_eq!(
            user_journal(Some("/run/user/7".into()), Path::new("/d")),
            PathBuf::from("/run/user/7/quarry/journal")
        );
        assert_eq!(
            user_journal(None, Path::new("/d")),
            PathBuf::from("/d/journal")
        );
    }
}
