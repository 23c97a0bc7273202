//! Files and folders that are for the daemon's user alone: volumes' data are in them.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

/// The mode of such a file.
pub(crate) const FILE_MODE: u32 = 0o600;
/// The mode of such a folder.
pub(crate) const DIR_MODE: u32 = 0o700;

fn create_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(DIR_MODE).create(path)
}

/// Makes such a folder if there is none, and those above it as they usually are.
pub(crate) fn create_dir_all(path: &Path) -> io::Result<()> {
    if let Some(above) = path.parent() {
        fs::create_dir_all(above)?;
    }
    match create_dir(path) {
        Err(_) if path.is_dir() => Ok(()),
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn folder_made_is_its_owners_alone_and_one_that_is_there_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let made = dir.path().join("above/made");
        create_dir_all(&made).unwrap();
        assert_eq!(mode(&made), DIR_MODE);
        fs::set_permissions(&made, fs::Permissions::from_mode(0o750)).unwrap();
        create_dir_all(&made).unwrap();
        assert_eq!(mode(&made), 0o750);
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(create_dir_all(&dir.path().join("file")).is_err());
    }
}
