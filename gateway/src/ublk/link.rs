//! The names of the devices: `/dev/quarry/<tenant>/<volume>` -> `/dev/ublkbN`.
//!
//! A name is a convenience: failing to make or to remove one is logged, never an error.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use quarry_objfmt::{TenantName, VolumeName};

/// The name of a volume's device.
fn path(root: &Path, tenant: &TenantName, name: &VolumeName) -> PathBuf {
    root.join(tenant.as_str()).join(name.as_str())
}

/// Makes or replaces the name, atomically.
pub(super) fn make(
    root: &Path,
    tenant: &TenantName,
    name: &VolumeName,
    node: &Path,
) -> Option<PathBuf> {
    let link = path(root, tenant, name);
    match try_make(&link, node) {
        Ok(()) => Some(link),
        Err(error) => {
            tracing::warn!(link = %link.display(), node = %node.display(), %error, "the device has no name");
            None
        }
    }
}

fn try_make(link: &Path, node: &Path) -> io::Result<()> {
    let folder = link.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    // No volume's name starts with a dot.
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(link.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    let temporary = folder.join(temporary);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(node, &temporary)?;
    fs::rename(&temporary, link)
}

/// Removes the name if it still leads to `node`, and its tenant's folder if it was the last.
pub(super) fn remove(root: &Path, tenant: &TenantName, name: &VolumeName, node: &Path) {
    let link = path(root, tenant, name);
    match fs::read_link(&link) {
        Ok(target) if target == node => {}
        _ => return,
    }
    if let Err(error) = fs::remove_file(&link) {
        tracing::warn!(link = %link.display(), %error, "the name of a device that is gone stays");
        return;
    }
    if let Some(folder) = link.parent() {
        // Fails unless it is empty, and that is meant.
        let _ = fs::remove_dir(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> (TenantName, VolumeName) {
        (
            TenantName::new("acme").unwrap(),
            VolumeName::new("db").unwrap(),
        )
    }

    #[test]
    fn link_made_twice_leads_to_the_newer_node() {
        let root = tempfile::tempdir().unwrap();
        let (tenant, name) = names();
        make(root.path(), &tenant, &name, Path::new("/dev/ublkb0")).unwrap();
        let link = make(root.path(), &tenant, &name, Path::new("/dev/ublkb1")).unwrap();
        assert_eq!(fs::read_link(link).unwrap(), Path::new("/dev/ublkb1"));
    }

    #[test]
    fn link_to_another_node_is_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let (tenant, name) = names();
        let link = make(root.path(), &tenant, &name, Path::new("/dev/ublkb1")).unwrap();
        remove(root.path(), &tenant, &name, Path::new("/dev/ublkb0"));
        assert!(fs::read_link(&link).is_ok());
        remove(root.path(), &tenant, &name, Path::new("/dev/ublkb1"));
        assert!(fs::read_link(&link).is_err());
        assert!(!link.parent().unwrap().exists());
    }

    #[test]
    fn link_under_a_file_is_none() {
        let root = tempfile::NamedTempFile::new().unwrap();
        let (tenant, name) = names();
        assert_eq!(
            make(root.path(), &tenant, &name, Path::new("/dev/ublkb0")),
            None
        );
    }
}
