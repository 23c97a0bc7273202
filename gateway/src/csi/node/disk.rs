//! What is on a device: looked for, formatted, checked, mounted and grown, by the system's own programs.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tonic::Status;

use super::mounts::{Device, Mount};
use crate::csi::answer::Answer;
use crate::csi::capability::Fs;

/// What `blkid` ends with if it knows nothing of what is on a device.
const NOTHING_FOUND: i32 = 2;
/// What `e2fsck` ends with at most if all is well now: some of it was put right, and the system that has it as its
/// root is to be booted anew.
const PUT_RIGHT_MAX: i32 = 3;
/// How much of what a program says is told.
const SAID_MAX: usize = 500;

/// A program's end.
async fn run(program: &'static str, arguments: &[&OsStr]) -> Answer<Output> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    let ran = tokio::task::spawn_blocking(move || command.output()).await;
    let ran = ran.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    ran.map_err(|error| Status::internal(format!("{program} cannot be run: {error}")))
}

/// What a program that failed said.
fn failed(program: &str, device: &Device, output: &Output) -> Status {
    let said = [&output.stderr[..], &output.stdout[..]].concat();
    let said = String::from_utf8_lossy(&said);
    let end: String = said.trim().chars().rev().take(SAID_MAX).collect();
    let end: String = end.chars().rev().collect();
    let node = device.node().display();
    Status::internal(format!(
        "{program} of {node} failed ({}): {end}",
        output.status
    ))
}

/// The file system, partition table or other thing that is on the device; none: nothing that is known.
///
/// # Errors
/// If the device cannot be read, or has several.
pub(super) async fn probe(device: &Device) -> Answer<Option<String>> {
    let node = device.node().as_os_str();
    let arguments = ["-p", "-o", "export"].map(OsStr::new);
    let output = run("blkid", &[&arguments[..], &[node]].concat()).await?;
    match output.status.code() {
        Some(0) => Ok(Some(kind(&String::from_utf8_lossy(&output.stdout)))),
        Some(NOTHING_FOUND) => Ok(None),
        _ => Err(failed("blkid", device, &output)),
    }
}

/// What `blkid -o export` says that there is.
fn kind(export: &str) -> String {
    let value = |name: &str| {
        let mut lines = export.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    };
    match (value("TYPE"), value("PTTYPE")) {
        (Some(kind), _) => kind.to_owned(),
        (None, Some(table)) => format!("a partition table ({table})"),
        (None, None) => "something".to_owned(),
    }
}

/// Makes a file system. The programs refuse a device on which they find anything, as they are not told otherwise.
///
/// # Errors
/// If that fails.
pub(super) async fn format(device: &Device, fs: Fs) -> Answer<()> {
    let node = device.node().as_os_str();
    tracing::info!(device = %device.node().display(), fs = fs.as_str(), "formatting a blank volume");
    let (program, arguments): (_, &[&str]) = match fs {
        // No blocks are kept for root: a pod's volume is not the system's.
        Fs::Ext4 => ("mkfs.ext4", &["-q", "-m", "0"]),
        Fs::Xfs => ("mkfs.xfs", &["-q"]),
    };
    let mut all: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
    all.push(node);
    let output = run(program, &all).await?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(program, device, &output)),
    }
}

/// Puts right what can be without anybody's word; XFS does that itself when it is mounted.
///
/// # Errors
/// If something is wrong that can not.
pub(super) async fn check(device: &Device, fs: Fs) -> Answer<()> {
    if fs != Fs::Ext4 {
        return Ok(());
    }
    let output = run("e2fsck", &[OsStr::new("-p"), device.node().as_os_str()]).await?;
    match output.status.code() {
        Some(0..=PUT_RIGHT_MAX) => Ok(()),
        _ => Err(failed("e2fsck", device, &output)),
    }
}

/// Mounts it.
///
/// # Errors
/// If that fails.
pub(super) async fn mount(
    device: &Device,
    fs: Fs,
    at: &Path,
    flags: &[String],
    read_only: bool,
) -> Answer<()> {
    let options = options(fs, flags, read_only);
    let mut arguments = vec![OsStr::new("-t"), OsStr::new(fs.as_str())];
    if !options.is_empty() {
        arguments.extend([OsStr::new("-o"), OsStr::new(&options)]);
    }
    arguments.extend([device.node().as_os_str(), at.as_os_str()]);
    let output = run("mount", &arguments).await?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed("mount", device, &output)),
    }
}

fn options(fs: Fs, flags: &[String], read_only: bool) -> String {
    let mut all: Vec<&str> = flags.iter().map(String::as_str).collect();
    if read_only {
        all.push("ro");
    }
    // Beside what it was cloned from.
    if fs == Fs::Xfs {
        all.push("nouuid");
    }
    all.join(",")
}

/// Grows a mounted file system to its device; where it is as large already, nothing is done.
///
/// # Errors
/// If that fails.
pub(super) async fn grow(device: &Device, mount: &Mount) -> Answer<()> {
    let (program, what) = match Fs::named(&mount.fs) {
        Some(Fs::Ext4) => ("resize2fs", device.node()),
        Some(Fs::Xfs) => ("xfs_growfs", mount.at.as_path()),
        None => return Ok(()),
    };
    let output = run(program, &[what.as_os_str()]).await?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(program, device, &output)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_a_device_is_told_by_its_type_or_its_partitions() {
        assert_eq!(
            kind("DEVNAME=/dev/x\nUUID=1\nTYPE=ext4\nPTTYPE=dos\n"),
            "ext4"
        );
        assert_eq!(
            kind("DEVNAME=/dev/x\nPTTYPE=gpt\n"),
            "a partition table (gpt)"
        );
        assert_eq!(kind(""), "something");
    }

    #[test]
    fn options_of_a_mount_are_the_flags_and_what_the_file_system_needs() {
        let flags = ["noatime".to_owned()];
        assert_eq!(options(Fs::Ext4, &flags, false), "noatime");
        assert_eq!(options(Fs::Xfs, &flags, true), "noatime,ro,nouuid");
        assert_eq!(options(Fs::Ext4, &[], false), "");
    }
}
