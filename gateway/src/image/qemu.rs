//! QEMU's programs: `qemu-img` says what an image is and makes new ones, `qemu-nbd` serves one by NBD.
//!
//! The copy goes through `qemu-nbd` rather than `qemu-img convert`, so that it is ours: it can be resumed,
//! and shows how far it is.
//!
//! Invariant: no program outlives this process: it serves until the last of its clients has gone, and is
//! ended if its parent dies before there was one.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::format::ImageFormat;
use crate::nbd::client::{Client, ClientError};

/// How long `qemu-nbd` may take until it serves.
const START_TIME_MAX: Duration = Duration::from_secs(60);

/// Wait between two looks for its socket.
const START_PAUSE: Duration = Duration::from_millis(10);

/// Most of what a program says that is told on, in bytes and in lines.
const WORDS_BYTES_MAX: usize = 2000;
const WORDS_LINES_MAX: usize = 3;

/// Exit code of `qemu-img check`: space is lost, no data.
const CHECK_LEAKS: i32 = 3;
/// Exit code of `qemu-img check`: the format has no check.
const CHECK_UNKNOWN: i32 = 63;

/// Why QEMU's programs are of no help.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// A program is not there.
    #[error("{program} is not installed, and no format but raw can be read or written without it")]
    Missing {
        /// The program.
        program: &'static str,
    },
    /// A program said no.
    #[error("{program} says: {words}")]
    Refused {
        /// The program.
        program: &'static str,
        /// What it said.
        words: String,
    },
    /// An image is not all in one file.
    #[error("{image} refers to another file: {other}")]
    Refers {
        /// The image.
        image: PathBuf,
        /// As the image names it.
        other: String,
    },
    /// An image is damaged.
    #[error("{image} is damaged: {words}")]
    Damaged {
        /// The image.
        image: PathBuf,
        /// What is wrong, as QEMU words it.
        words: String,
    },
    /// A program did not what it should.
    #[error("{program} cannot be used: {why}")]
    Broken {
        /// The program.
        program: &'static str,
        /// Why.
        why: String,
    },
    /// The system failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The connection failed.
    #[error(transparent)]
    Nbd(#[from] ClientError),
}

const IMG: &str = "qemu-img";
const NBD: &str = "qemu-nbd";

/// Refuses an image that cannot be read, that names other files (a backing file, a file for its data, parts), or
/// whose metadata are damaged: QEMU reads what is missing of a file that was cut off as zeroes. `image` is
/// absolute, so that it is not taken for an address.
///
/// # Errors
/// See [`QemuError`].
pub fn inspect(image: &Path, format: ImageFormat) -> Result<(), QemuError> {
    let mut command = Command::new(IMG);
    command.args(["info", "--output=json", "-f", format.as_str(), "--"]);
    let told = run(IMG, command.arg(image))?;
    let told: Value = serde_json::from_slice(&told).map_err(|error| QemuError::Broken {
        program: IMG,
        why: error.to_string(),
    })?;
    if let Some(other) = other_file(&told, &image.to_string_lossy()) {
        return Err(QemuError::Refers {
            image: image.to_owned(),
            other,
        });
    }
    check(image, format)
}

/// Refuses an image whose metadata are damaged, if its format has a check.
fn check(image: &Path, format: ImageFormat) -> Result<(), QemuError> {
    let mut command = Command::new(IMG);
    command.args(["check", "-q", "-f", format.as_str(), "--"]);
    let ran = command.arg(image).stdin(Stdio::null()).output();
    let ran = ran.map_err(|error| not_started(IMG, error))?;
    match ran.status.code() {
        Some(0 | CHECK_LEAKS | CHECK_UNKNOWN) => Ok(()),
        _ => Err(QemuError::Damaged {
            image: image.to_owned(),
            words: words(IMG, &ran.stderr, ran.status),
        }),
    }
}

/// A file that is named anywhere in what is told about an image, other than itself.
fn other_file(told: &Value, image: &str) -> Option<String> {
    match told {
        Value::Array(items) => items.iter().find_map(|item| other_file(item, image)),
        Value::Object(fields) => fields.iter().find_map(|(key, value)| match key.as_str() {
            "backing-filename" | "data-file" => Some(plain(value)),
            "filename" => (value != image).then(|| plain(value)),
            _ => other_file(value, image),
        }),
        _ => None,
    }
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// Makes an empty image of `size` bytes, over whatever is there.
///
/// # Errors
/// See [`QemuError`].
pub fn create(image: &Path, format: ImageFormat, size: u64) -> Result<(), QemuError> {
    let mut command = Command::new(IMG);
    command.args(["create", "-q", "-f", format.as_str(), "--"]);
    run(IMG, command.arg(image).arg(size.to_string())).map(drop)
}

/// Runs a program to its end, and gives what it printed.
fn run(program: &'static str, command: &mut Command) -> Result<Vec<u8>, QemuError> {
    let ran = command.stdin(Stdio::null()).output();
    let ran = ran.map_err(|error| not_started(program, error))?;
    if ran.status.success() {
        Ok(ran.stdout)
    } else {
        let words = words(program, &ran.stderr, ran.status);
        Err(QemuError::Refused { program, words })
    }
}

fn not_started(program: &'static str, error: io::Error) -> QemuError {
    if error.kind() == io::ErrorKind::NotFound {
        return QemuError::Missing { program };
    }
    QemuError::Broken {
        program,
        why: error.to_string(),
    }
}

/// What a program said, on one line.
fn words(program: &str, said: &[u8], status: ExitStatus) -> String {
    let said = String::from_utf8_lossy(&said[..said.len().min(WORDS_BYTES_MAX)]);
    let own = format!("{program}: ");
    let lines = said
        .lines()
        .map(|line| line.trim().trim_start_matches(&own));
    let lines = lines.filter(|line| !line.is_empty());
    let lines: Vec<_> = lines.take(WORDS_LINES_MAX).collect();
    if lines.is_empty() {
        return format!("nothing, and ended with {status}");
    }
    lines.join("; ")
}

/// An image, served by NBD until the last client has gone.
#[derive(Debug)]
pub struct Served {
    child: Child,
    /// A folder of our own, for its socket and what it says.
    dir: PathBuf,
}

impl Served {
    /// Serves an image for as many as `clients` at once; gives the first, who must stay until the others have
    /// come. `image` is absolute, so that it is not taken for an address.
    ///
    /// # Errors
    /// See [`QemuError`].
    pub fn start(
        image: &Path,
        format: ImageFormat,
        writable: bool,
        clients: usize,
    ) -> Result<(Self, Client), QemuError> {
        let dir = std::env::temp_dir().join(format!("quarry-{}", uuid::Uuid::new_v4()));
        DirBuilder::new().mode(0o700).create(&dir)?;
        let said = match File::create(dir.join("said")) {
            Ok(said) => said,
            Err(error) => {
                let _ = fs::remove_dir(&dir);
                return Err(error.into());
            }
        };
        let mut command = Command::new(NBD);
        command
            .arg(format!("--format={format}"))
            .arg(format!("--shared={clients}"))
            .arg(format!("--socket={}", dir.join("nbd").display()))
            .args((!writable).then_some("--read-only"))
            .arg("--")
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            // Not to be interrupted with us, who end in good order.
            .process_group(0);
        let die = || {
            Ok(rustix::process::set_parent_process_death_signal(Some(
                Signal::TERM,
            ))?)
        };
        // SAFETY: between fork and exec only this one system call is made.
        unsafe { command.pre_exec(die) };
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                let _ = fs::remove_dir_all(&dir);
                return Err(not_started(NBD, error));
            }
        };
        let mut served = Self { child, dir };
        let client = served.first()?;
        Ok((served, client))
    }

    /// Waits until it serves.
    fn first(&mut self) -> Result<Client, QemuError> {
        let begun = Instant::now();
        loop {
            match self.connect() {
                Ok(client) => return Ok(client),
                Err(ClientError::Io(_)) => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(status) = self.child.try_wait()? {
                let words = words(NBD, &self.said(), status);
                let program = NBD;
                return Err(QemuError::Refused { program, words });
            }
            if begun.elapsed() > START_TIME_MAX {
                let why = format!("it does not serve after {START_TIME_MAX:?}");
                return Err(QemuError::Broken { program: NBD, why });
            }
            std::thread::sleep(START_PAUSE);
        }
    }

    /// One more client.
    ///
    /// # Errors
    /// If it does not serve, or has as many as it takes.
    pub fn connect(&self) -> Result<Client, ClientError> {
        Client::connect_mapped(&self.dir.join("nbd"), "")
    }

    fn said(&self) -> Vec<u8> {
        fs::read(self.dir.join("said")).unwrap_or_default()
    }

    /// What it complained of so far.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let said = self.said();
        (!said.is_empty()).then(|| words(NBD, &said, ExitStatus::default()))
    }

    /// Waits for its end, after the last client has gone.
    ///
    /// # Errors
    /// If it was not a good one.
    pub fn finish(mut self) -> Result<(), QemuError> {
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        let words = words(NBD, &self.said(), status);
        let program = NBD;
        Err(QemuError::Refused { program, words })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn other_files_are_found_wherever_an_image_names_them() {
        let child = json!({"name": "file", "info": {"filename": "/i", "format": "file"}});
        let own = json!({"filename": "/i", "children": [child], "format": "qcow2"});
        assert_eq!(other_file(&own, "/i"), None);
        let of = |key: &str, value: Value| {
            let mut image = own.clone();
            image[key] = value;
            other_file(&image, "/i")
        };
        let other = Some("/etc/shadow".to_owned());
        assert_eq!(of("backing-filename", json!("/etc/shadow")), other);
        let data = json!({"type": "qcow2", "data": {"data-file": "/etc/shadow"}});
        assert_eq!(of("format-specific", data), other);
        let extents =
            json!({"data": {"extents": [{"filename": "/i"}, {"filename": "/etc/shadow"}]}});
        assert_eq!(of("format-specific", extents), other);
        let child = json!([{"name": "data", "info": {"filename": "/etc/shadow"}}]);
        assert_eq!(of("children", child), other);
    }
}
