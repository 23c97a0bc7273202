//! The folder of libublk's files, `/run/ublksrvd`.
//!
//! libublk writes and reads a device's file by its name, through whatever link is there, and makes a folder that is missing
//! writable to all. Whoever can make files in it has us empty any file, wait for a FIFO's other end or read what never ends.
//!
//! Invariant: no control object of a device is made before [`secure`] has answered.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use libublk::ctrl::UblkCtrl;

use super::UblkError;

/// The mode of the folder.
const OPEN: u32 = 0o755;

/// Its mode while it is cleared of what others may have left there, and after a crash meanwhile: it is cleared anew then.
const CLOSED: u32 = 0o700;

/// Makes sure that nobody but the daemon's user has made anything in the folder, or can.
///
/// # Errors
/// [`UblkError::Folder`] if it is another's, or no folder.
pub(super) fn secure() -> Result<(), UblkError> {
    secure_at(Path::new(&UblkCtrl::run_dir())).map_err(UblkError::Folder)
}

fn secure_at(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(OPEN).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let user = rustix::process::geteuid().as_raw();
    let is = fs::symlink_metadata(folder)?;
    if !is.is_dir() {
        return Err(io::Error::other("it is no directory"));
    }
    if is.uid() != user {
        return Err(io::Error::other("it is another user's"));
    }
    let mode = is.mode() & 0o777;
    if mode & 0o022 == 0 && mode != CLOSED {
        return Ok(());
    }
    // First, so that nothing comes after what is looked at.
    fs::set_permissions(folder, Permissions::from_mode(CLOSED))?;
    for entry in fs::read_dir(folder)? {
        clear(&entry?.path(), user)?;
    }
    fs::set_permissions(folder, Permissions::from_mode(OPEN))
}

/// Removes what is no file of the user's, with this one name: those of other programs' devices stay.
fn clear(path: &Path, user: u32) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(is) if is.is_file() && is.uid() == user && is.nlink() == 1 => return Ok(()),
        Ok(is) if is.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        // Another command removed it, or its device.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => {
            tracing::warn!(path = %path.display(), "removed what others may have put among the devices' files");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, mkfifoat};

    use super::*;

    fn mode_of(folder: &Path) -> u32 {
        fs::symlink_metadata(folder).unwrap().mode() & 0o7777
    }

    #[test]
    fn run_folder_that_others_could_write_to_is_closed_and_cleared_of_what_is_no_file_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("ublksrvd");
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        // As another program of libublk's makes it, and as a crash in the middle of the clearing leaves it.
        for left in [0o777, 0o1777, 0o775, CLOSED] {
            fs::create_dir_all(folder.join("0003.json/deep")).unwrap();
            fs::write(folder.join("0000.json"), "{}").unwrap();
            symlink(&victim, folder.join("0001.json")).unwrap();
            let fifo = rustix::fs::Mode::from_raw_mode(0o666);
            mkfifoat(CWD, folder.join("0002.json"), fifo).unwrap();
            fs::hard_link(&victim, folder.join("0004.json")).unwrap();
            fs::set_permissions(&folder, Permissions::from_mode(left)).unwrap();

            secure_at(&folder).unwrap();
            assert_eq!(mode_of(&folder), OPEN);
            let names = fs::read_dir(&folder).unwrap();
            let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["0000.json"], "{left:o}");
        }
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    }

    #[test]
    fn run_folder_that_is_missing_is_made_for_the_daemon_alone_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("ublksrvd");
        secure_at(&folder).unwrap();
        assert_eq!(mode_of(&folder) & 0o022, 0);
        fs::set_permissions(&folder, Permissions::from_mode(0o750)).unwrap();
        // The user's own, who alone could have made it.
        symlink("elsewhere", folder.join("mine")).unwrap();
        secure_at(&folder).unwrap();
        assert_eq!(mode_of(&folder), 0o750);
        assert!(fs::symlink_metadata(folder.join("mine")).is_ok());
    }

    #[test]
    fn run_folder_that_is_a_link_or_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let folder = dir.path().join("ublksrvd");
        for target in [&elsewhere, &dir.path().join("none")] {
            symlink(target, &folder).unwrap();
            let error = secure_at(&folder).unwrap_err();
            assert!(error.to_string().contains("no directory"), "{error}");
            fs::remove_file(&folder).unwrap();
        }
        assert!(!dir.path().join("none").exists());
        fs::write(&folder, "").unwrap();
        secure_at(&folder).unwrap_err();
    }
}
