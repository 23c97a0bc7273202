//! The names of the devices: `/dev/quarry/<tenant>/<volume>` -> `/dev/ublkbN`.
//!
//! A name is a convenience: failing to make or to remove one is logged, never an error. Udev, told by
//! [`super::udev`], makes the same link with the same text and may remove it, and folders with it, at any
//! time after the device is gone: whoever comes second has nothing to do.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use quarry_objfmt::TenantName;

/// Tries to make a name: meanwhile udev may remove an empty folder.
const TRIES: u32 = 3;

/// The name of a device; `name` is that of a volume, or `volume@snapshot`.
fn path(root: &Path, tenant: &TenantName, name: &str) -> PathBuf {
    root.join(tenant.as_str()).join(name)
}

/// What the name leads to: relative to its folder, as udev has it.
fn target(root: &Path, node: &Path) -> PathBuf {
    match root.parent().and_then(|dev| node.strip_prefix(dev).ok()) {
        Some(below) => Path::new("../..").join(below),
        None => node.to_owned(),
    }
}

/// Makes or replaces the name, atomically.
pub(super) fn make(root: &Path, tenant: &TenantName, name: &str, node: &Path) -> Option<PathBuf> {
    let link = path(root, tenant, name);
    let target = target(root, node);
    let mut made = try_make(&link, &target);
    for _ in 1..TRIES {
        if !matches!(&made, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            break;
        }
        made = try_make(&link, &target);
    }
    match made {
        Ok(()) => Some(link),
        Err(error) => {
            tracing::warn!(link = %link.display(), node = %node.display(), %error, "the device has no name");
            None
        }
    }
}

fn try_make(link: &Path, target: &Path) -> io::Result<()> {
    if fs::read_link(link).is_ok_and(|found| found == target) {
        return Ok(());
    }
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
    symlink(target, &temporary)?;
    fs::rename(&temporary, link)
}

/// Removes the name if it still leads to `node`, and its tenant's folder if it was the last.
pub(super) fn remove(root: &Path, tenant: &TenantName, name: &str, node: &Path) {
    let link = path(root, tenant, name);
    match fs::read_link(&link) {
        Ok(found) if found == target(root, node) => {}
        _ => return,
    }
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(link = %link.display(), %error, "the name of a device that is gone stays");
            return;
        }
        _ => {}
    }
    if let Some(folder) = link.parent() {
        // Fails unless it is empty, and that is meant.
        let _ = fs::remove_dir(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> (TenantName, &'static str) {
        (TenantName::new("acme").unwrap(), "db@nightly")
    }

    #[test]
    fn link_made_twice_leads_to_the_newer_node() {
        let root = tempfile::tempdir().unwrap();
        let (tenant, name) = names();
        make(root.path(), &tenant, name, Path::new("/dev/ublkb0")).unwrap();
        let link = make(root.path(), &tenant, name, Path::new("/dev/ublkb1")).unwrap();
        assert_eq!(fs::read_link(link).unwrap(), Path::new("/dev/ublkb1"));
    }

    #[test]
    fn link_beside_its_node_is_relative_and_leads_to_it() {
        let dev = tempfile::tempdir().unwrap();
        let node = dev.path().join("ublkb7");
        fs::write(&node, "").unwrap();
        let (tenant, name) = names();
        let root = dev.path().join("quarry");
        let link = make(&root, &tenant, name, &node).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("../../ublkb7"));
        assert_eq!(link.canonicalize().unwrap(), node.canonicalize().unwrap());
        remove(&root, &tenant, name, &node);
        assert!(fs::read_link(&link).is_err());
    }

    #[test]
    fn link_to_another_node_is_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let (tenant, name) = names();
        let link = make(root.path(), &tenant, name, Path::new("/dev/ublkb1")).unwrap();
        remove(root.path(), &tenant, name, Path::new("/dev/ublkb0"));
        assert!(fs::read_link(&link).is_ok());
        remove(root.path(), &tenant, name, Path::new("/dev/ublkb1"));
        assert!(fs::read_link(&link).is_err());
        assert!(!link.parent().unwrap().exists());
    }

    #[test]
    fn link_under_a_file_is_none() {
        let root = tempfile::NamedTempFile::new().unwrap();
        let (tenant, name) = names();
        assert_eq!(
            make(root.path(), &tenant, name, Path::new("/dev/ublkb0")),
            None
        );
    }
}
