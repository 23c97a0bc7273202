//! `quarry serve --replace --background`: for service managers whose reload is a command that ends.
//!
//! The daemon is a child that is left alone once it serves; until then its end is this command's failure, and the daemon
//! that was to be replaced goes on if it was not stopped yet.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::Failure;
use crate::control::Client;

/// The flag, which the child is not given.
const FLAG: &str = "--background";

/// Between two looks at the child.
const PAUSE: Duration = Duration::from_millis(50);

/// Starts the same command in the background, and waits until it is the daemon that answers at `socket`.
///
/// # Errors
/// If it ends before.
pub(super) fn run(socket: &Path) -> Result<(), Failure> {
    let failed = |why: std::io::Error| {
        let message = format!("the new daemon cannot be started: {why}");
        Failure::new("failed", message, "")
    };
    let program = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new(program)
        .args(without_flag(std::env::args_os().skip(1)))
        .stdin(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let client = Client::new(socket)?;
    super::wait(async {
        loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                let message = format!("the new daemon ended before it served ({status})");
                let remedy =
                    "see what it said; the one before it serves on, if it was still running";
                return Err(Failure::new("failed", message, remedy));
            }
            if client.status().await.is_ok_and(|s| s.pid == child.id()) {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
    })
}

fn without_flag(args: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    args.filter(|arg| arg != FLAG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn child_gets_every_argument_but_the_flag() {
        let args = ["serve", "--replace", FLAG, "--config", "/c"].map(OsString::from);
        let left: Vec<_> = without_flag(args.into_iter()).collect();
        assert_eq!(left, ["serve", "--replace", "--config", "/c"]);
    }
}
