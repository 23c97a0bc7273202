//! A device's node: whose it is and who may use it.
//!
//! On a host with udev the rule `gateway/udev/60-quarry.rules` does the same by what [`super::udev`]
//! tells it. Both set the same values, so it does not matter which comes last, nor how often.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

/// Whose a device is and who may use it; what is none is left as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Permissions {
    /// The user.
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
    /// The permission bits.
    pub mode: Option<u16>,
}

impl Permissions {
    /// Whether all is left as it is.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Gives them to the node. Meanwhile nobody has a right that he has neither before nor after.
    pub(super) fn apply(&self, node: &Path) -> io::Result<()> {
        let is = fs::symlink_metadata(node)?;
        let new = |wanted: Option<u32>, is: u32| wanted.filter(|id| *id != is);
        let (uid, gid) = (new(self.uid, is.uid()), new(self.gid, is.gid()));
        let old_mode = is.mode() & 0o7777;
        let mode = self.mode.map_or(old_mode, u32::from);
        let set_mode = |mode: u32| fs::set_permissions(node, fs::Permissions::from_mode(mode));
        if uid.is_some() || gid.is_some() {
            set_mode(old_mode & mode)?;
            std::os::unix::fs::lchown(node, uid, gid)?;
            set_mode(mode)?;
        } else if mode != old_mode {
            set_mode(mode)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(path: &Path) -> (u32, u32, u32) {
        let is = fs::metadata(path).unwrap();
        (is.uid(), is.gid(), is.mode() & 0o7777)
    }

    #[test]
    fn permissions_of_none_leave_the_node_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let before = is(file.path());
        Permissions::default().apply(file.path()).unwrap();
        assert_eq!(is(file.path()), before);
    }

    #[test]
    fn mode_given_twice_is_the_mode() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (uid, gid, _) = is(file.path());
        let permissions = Permissions {
            mode: Some(0o640),
            ..Permissions::default()
        };
        for _ in 0..2 {
            permissions.apply(file.path()).unwrap();
            assert_eq!(is(file.path()), (uid, gid, 0o640));
        }
    }

    #[test]
    fn owner_and_mode_given_are_both_there() {
        let file = tempfile::NamedTempFile::new().unwrap();
        if is(file.path()).0 != 0 {
            quarry_tests::skip("not root");
            return;
        }
        let permissions = Permissions {
            uid: Some(54321),
            gid: Some(54322),
            mode: Some(0o606),
        };
        permissions.apply(file.path()).unwrap();
        assert_eq!(is(file.path()), (54321, 54322, 0o606));
        let back = Permissions {
            uid: Some(0),
            ..Permissions::default()
        };
        back.apply(file.path()).unwrap();
        assert_eq!(is(file.path()), (0, 54322, 0o606));
    }

    #[test]
    fn node_that_is_not_there_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = Permissions::default().apply(&dir.path().join("none"));
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
