//! The Debian package in a clean Debian 12 with its own systemd: installed, mounted at boot, upgraded under load, removed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Ran, skip, target_dir, tool, vm_kernel};
use tempfile::tempdir_in;

/// Higher than what the workspace has, which the first package is of.
const NEXT_VERSION: &str = "999.0.0";

/// The disk of a clean system, if `tests/vm/build-root.sh` has made one.
fn clean_root() -> Option<PathBuf> {
    let cache = std::env::var_os("QUARRY_ROOT_CACHE").map(PathBuf::from);
    let path = cache.unwrap_or_else(|| target_dir().join("root"));
    let path = path.join("root.ext4");
    if path.is_file() {
        return Some(path);
    }
    let path = path.display();
    skip(&format!("no {path} (tests/vm/build-root.sh makes it)"));
    None
}

/// A file of the repository.
fn file(path: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("in the repository").join(path)
}

/// The package of the debug build, with its path.
fn build_package(dir: &Path, flags: &[&str]) -> Result<PathBuf> {
    let mut command = Command::new(file("gateway/packaging/build-deb"));
    command
        .env("CARGO_TARGET_DIR", target_dir())
        .args(["--debug", "--output"])
        .arg(dir)
        .args(flags);
    let ran = Ran::run(&mut command)?.ok()?;
    let path = ran.stdout.lines().last().context("no path")?;
    Ok(PathBuf::from(path))
}

#[test]
fn package_is_mounted_at_boot_and_upgraded_under_load_and_removed() -> Result<()> {
    let (Some(kernel), Some(root)) = (vm_kernel(), clean_root()) else {
        return Ok(());
    };
    for program in ["cargo-deb", "dpkg-shlibdeps", "fio", "taskset"] {
        if tool(program).is_none() {
            return Ok(());
        }
    }
    if !target_dir().join("debug/examples/pages").is_file() {
        skip("no man pages can be made (cargo build --workspace --bins --examples)");
        return Ok(());
    }
    // Not /tmp, which may be in memory.
    let dir = tempdir_in(target_dir())?;
    let packages = [
        build_package(dir.path(), &[])?,
        build_package(dir.path(), &["--version", NEXT_VERSION])?,
    ];
    let disk = dir.path().join("root.ext4");
    let mut copy = Command::new("cp");
    copy.args(["--sparse=always".as_ref(), root.as_os_str(), disk.as_ref()]);
    Ran::run(&mut copy)?.ok()?;
    for (life, package) in ["first", "second"].into_iter().zip(&packages) {
        let mut boot = Command::new(file("tests/vm/boot-root"));
        boot.env("QUARRY_VM_KERNEL", &kernel)
            .args(["-t", "300"])
            .args([disk.as_os_str(), dir.path().as_ref()])
            .arg(file("tests/vm/guest-install.sh"))
            .args([OsStr::new(life), package.as_ref()]);
        let ran = Ran::run(&mut boot)?;
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
        println!("{log}");
        ensure!(ran.code == Some(0), "{ran}\n{log}");
        ensure!(log.contains(&format!("guest: {life}: passed")), "{log}");
    }
    Ok(())
}
