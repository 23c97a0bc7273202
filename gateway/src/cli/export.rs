//! `quarry volume export`: a volume's content becomes a disk image.
//!
//! The image is written beside its name, synced, and renamed when it is whole: nobody meets a half one, and
//! a crash leaves a file that ends in `.part`, which the next export of that name takes up and writes anew.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use indicatif::ProgressBar;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde::Serialize;

use super::Failure;
use super::args::ExportFlags;
use super::attachment::Attachment;
use super::copying::{Broken, INTERRUPTED, Interrupts, failed, started, watch};
use super::failure::chain;
use super::output::Console;
use super::progress::copying;
use super::table::{bytes, span_ms};
use super::volume::image_at;
use crate::control::{Client, Kind, VolumeInfo};
use crate::image::qemu::{self, Served};
use crate::image::{CopyError, Disk, Feed, ImageFormat, Progress};
use crate::nbd::client::{ClientError, read_full};

/// Bytes of a device that are read at once for standard output.
const STREAM_BYTES: usize = 1 << 20;

/// What was exported.
#[derive(Serialize)]
struct ExportReport {
    volume: String,
    image: String,
    format: &'static str,
    size_bytes: u64,
    /// Bytes written; all others are zeroes.
    written_bytes: u64,
    elapsed_ms: u64,
}

pub(super) async fn run(
    client: &Client,
    mut flags: ExportFlags,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let begun = Instant::now();
    flags.volume = image_at(flags.volume, flags.at)?;
    let to_stdout = flags.image == Path::new("-");
    let by_name = || ImageFormat::by_name(&flags.image);
    let format = flags.format.unwrap_or_else(by_name);
    if to_stdout && (format != ImageFormat::Raw || console.is_json()) {
        return Err(Failure::new(
            Failure::USAGE,
            "standard output takes the raw bytes of the disk and nothing else",
            "name a file",
        ));
    }
    let info = match client.show_volume(&flags.volume).await {
        // What a volume was is shown only while it is attached.
        Err(error) if flags.volume.at.is_some() && error.kind == Kind::Conflict => {
            VolumeInfo::default()
        }
        shown => shown?,
    };
    let target = match to_stdout {
        true => None,
        false => Some(Target::new(&flags.image, flags.force)?),
    };
    let attachment = Attachment::take(client, &flags.volume, &info, true).await?;
    if attachment.in_use {
        eprintln!(
            "quarry: {} is attached for writing: what is written meanwhile may be in the image or not",
            flags.volume
        );
    }
    let mut interrupts = Interrupts::listen()?;
    let export = Export {
        flags: &flags,
        attachment: &attachment,
    };
    let done = async {
        let size_bytes = attachment.connect()?.size();
        let written = match &target {
            None => export.stream(&mut interrupts).await?,
            Some(target) => export.file(target, format, &mut interrupts).await?,
        };
        Ok((size_bytes, written))
    };
    let (size_bytes, written) = match done.await {
        Ok(done) => done,
        Err(failure) => {
            attachment.leave().await;
            return Err(failure);
        }
    };
    if attachment.ours {
        let detached = interrupts.heed(attachment.detach()).await;
        detached.unwrap_or_else(|| Err(interrupted()))?;
    }
    if to_stdout {
        return Ok(());
    }
    let report = ExportReport {
        volume: flags.volume.to_string(),
        image: flags.image.display().to_string(),
        format: format.as_str(),
        size_bytes,
        written_bytes: written,
        elapsed_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    };
    console.show(&report, |report| {
        format!(
            "{}: {} exported to {}, {} of data written in {}",
            report.volume,
            bytes(report.size_bytes),
            report.image,
            bytes(report.written_bytes),
            span_ms(report.elapsed_ms)
        )
    })
}

/// An export under way.
struct Export<'a> {
    flags: &'a ExportFlags,
    attachment: &'a Attachment<'a>,
}

impl Export<'_> {
    /// Makes the image, and gives the bytes that were written.
    async fn file(
        &self,
        target: &Target,
        format: ImageFormat,
        interrupts: &mut Interrupts,
    ) -> Result<u64, Failure> {
        let written = self.fill(target, format, interrupts).await?;
        target.name_it()?;
        Ok(written)
    }

    async fn fill(
        &self,
        target: &Target,
        format: ImageFormat,
        interrupts: &mut Interrupts,
    ) -> Result<u64, Failure> {
        let size = self.attachment.connect()?.size();
        if format == ImageFormat::Raw {
            target
                .file
                .set_len(size)
                .map_err(|error| target.failure(&error))?;
            let disk = || Disk::File {
                file: Arc::clone(&target.file),
                size,
            };
            let targets = (0..self.flags.jobs).map(|_| disk()).collect();
            let progress = self.copy(size, targets, interrupts).await?;
            target
                .file
                .sync_all()
                .map_err(|error| target.failure(&error))?;
            return Ok(progress.written);
        }
        qemu::create(&target.part, format, size)?;
        let (served, client) = Served::start(&target.part, format, true, self.flags.jobs + 1)?;
        let mut last = Disk::Nbd(client);
        if last.size() < size {
            let message = format!(
                "{format} has no image of {size} bytes, only of {}",
                last.size()
            );
            return Err(Failure::new(
                "unsupported",
                message,
                "choose another --format",
            ));
        }
        let connect = |_| served.connect().map(Disk::Nbd);
        let targets: Result<Vec<_>, _> = (0..self.flags.jobs).map(connect).collect();
        let targets = targets.map_err(|error| {
            let message = format!("qemu-nbd takes no more connections: {error}");
            Failure::new("failed", message, "give fewer --jobs")
        })?;
        let complain = |mut failure: Failure| {
            if let Some(words) = served.complaint() {
                failure.message += &format!(" (qemu-nbd says: {words})");
            }
            failure
        };
        let progress = self
            .copy(size, targets, interrupts)
            .await
            .map_err(complain)?;
        let flushed = last.flush();
        flushed.map_err(|source| {
            let offset = size;
            complain(self.failed(CopyError::Write { offset, source }))
        })?;
        // The last one goes: the image is closed in good order.
        drop(last);
        served.finish()?;
        // What it wrote went through another open file; a sync is of the file, whoever wrote it.
        target
            .file
            .sync_all()
            .map_err(|error| target.failure(&error))?;
        Ok(progress.written)
    }

    async fn copy(
        &self,
        size: u64,
        targets: Vec<Disk>,
        interrupts: &mut Interrupts,
    ) -> Result<Progress, Failure> {
        let feed = Feed::disk(self.attachment.connect()?, 0, size);
        let mut pairs = Vec::new();
        for target in targets {
            pairs.push((Some(self.attachment.connect()?), target));
        }
        let bar = copying("exporting", &self.flags.volume, Some(size), 0);
        let copy = started(feed, pairs)?;
        let ended = watch(copy, &bar, interrupts, async |_| {
            std::future::pending().await
        })
        .await;
        bar.finish_and_clear();
        ended.map_err(|broken| match broken {
            Broken::Interrupted => interrupted(),
            Broken::Copy(error) => self.failed(error),
            Broken::Beside(failure) => failure,
        })
    }

    fn failed(&self, error: CopyError) -> Failure {
        let (volume, image) = (self.flags.volume.to_string(), self.flags.image.display());
        let remedy = remedy(&error);
        failed(error, &volume, &image.to_string(), remedy)
    }

    /// Writes all to standard output, in order.
    async fn stream(&self, interrupts: &mut Interrupts) -> Result<u64, Failure> {
        let disk = self.attachment.connect()?;
        let size = disk.size();
        let bar = copying("exporting", &self.flags.volume, Some(size), 0);
        // On a thread that nobody waits for when there is an interrupt: its reader may read no more.
        let (tell, told) = tokio::sync::oneshot::channel();
        let progress = bar.clone();
        std::thread::spawn(move || tell.send(to_stdout(disk, &progress)));
        let ended = interrupts.heed(told).await;
        bar.finish_and_clear();
        match ended {
            None => Err(interrupted()),
            Some(Ok(Ok(()))) => Ok(size),
            Some(Ok(Err(StreamError::Output(error)))) => {
                let message = format!("standard output cannot be written: {error}");
                let remedy = "check where it goes, and the space there";
                Err(Failure::new("failed", message, remedy))
            }
            Some(ended) => {
                let why = match ended {
                    Ok(Err(StreamError::Volume(error))) => chain(&error),
                    _ => "its thread has ended".to_owned(),
                };
                let message = format!("{}: it cannot be exported: {why}", self.flags.volume);
                Err(Failure::new("failed", message, "see the daemon's log"))
            }
        }
    }
}

/// What to do about an export that failed: of the image and of the volume another thing.
const fn remedy(error: &CopyError) -> &'static str {
    match error {
        CopyError::Write { .. } => "check the space and the permissions there",
        _ => "see the daemon's log",
    }
}

fn interrupted() -> Failure {
    Failure::new(INTERRUPTED, "interrupted", "")
}

/// Why a stream of a volume ended early.
enum StreamError {
    /// Where it goes takes no more.
    Output(io::Error),
    /// It cannot be read.
    Volume(anyhow::Error),
}

fn to_stdout(disk: Disk, bar: &ProgressBar) -> Result<(), StreamError> {
    let size = disk.size();
    let mut out = io::stdout().lock();
    match disk {
        Disk::Nbd(mut client) => {
            let copied = client.copy_out(&mut out, 0, size, &mut |done| bar.set_position(done));
            copied.map_err(|error| match error {
                ClientError::Output(error) => StreamError::Output(error),
                error => StreamError::Volume(error.into()),
            })?;
        }
        Disk::File { file, .. } => {
            let mut source = &*file;
            let unread = |error: io::Error| StreamError::Volume(error.into());
            source.rewind().map_err(unread)?;
            let mut buf = vec![0; STREAM_BYTES];
            loop {
                let n = read_full(&mut source, &mut buf).map_err(unread)?;
                if n == 0 {
                    break;
                }
                out.write_all(&buf[..n]).map_err(StreamError::Output)?;
                bar.inc(n as u64);
            }
        }
    }
    out.flush().map_err(StreamError::Output)
}

/// The image to be made.
struct Target {
    path: PathBuf,
    /// What it is called until it is whole.
    part: PathBuf,
    /// Open and locked: nobody else writes to it.
    file: Arc<File>,
    force: bool,
    named: std::cell::Cell<bool>,
}

impl Target {
    fn new(path: &Path, force: bool) -> Result<Self, Failure> {
        let wrong = |what: &str, remedy: &str| {
            let message = format!("{}: {what}", path.display());
            Err(Failure::new("conflict", message, remedy))
        };
        match fs::symlink_metadata(path) {
            Ok(there) if !there.is_file() => {
                let kind = there.file_type();
                if kind.is_block_device() || kind.is_char_device() || kind.is_fifo() {
                    return wrong(
                        "this is no file",
                        "write to it from `quarry volume export … -`",
                    );
                }
                return wrong("there is something that is no file", "choose another name");
            }
            Ok(_) if !force => {
                return wrong("this file is there", "give --force to replace it");
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return wrong(&error.to_string(), "choose another name"),
        }
        let Some(name) = path.file_name() else {
            return wrong("this is no name of a file", "choose another name");
        };
        let mut part = OsString::from(".");
        part.push(name);
        part.push(".part");
        let fail = |error: &io::Error| {
            let message = format!("{}: the image cannot be written: {error}", path.display());
            Failure::new(
                "failed",
                message,
                "check the path and its folder's permissions",
            )
        };
        // Absolute, so that it is not taken for an address or a flag by other programs.
        let part = std::path::absolute(path.with_file_name(part)).map_err(|error| fail(&error))?;
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&part)
        };
        let file = open().map_err(|error| fail(&error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return wrong(
                    "another export to this name is under way",
                    "wait for its end",
                );
            }
            Err(TryLockError::Error(error)) => return Err(fail(&error)),
        }
        let target = Self {
            path: path.to_owned(),
            part,
            file: Arc::new(file),
            force,
            named: std::cell::Cell::new(false),
        };
        // Whoever had the lock may have given the file its name in between.
        if !target.is_part() {
            target.named.set(true);
            return wrong("another export to this name just ended", "look at it");
        }
        // What a killed export left.
        target.file.set_len(0).map_err(|error| fail(&error))?;
        Ok(target)
    }

    /// Whether what is called by the name of the part is the file that is locked.
    fn is_part(&self) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let id = |found: io::Result<fs::Metadata>| found.map(|m| (m.dev(), m.ino())).ok();
        id(fs::symlink_metadata(&self.part)) == id(self.file.metadata())
    }

    fn failure(&self, error: &dyn std::error::Error) -> Failure {
        let message = format!(
            "{}: the image cannot be written: {error}",
            self.path.display()
        );
        Failure::new(
            "failed",
            message,
            "check the space and the permissions there",
        )
    }

    /// Gives the image its name.
    ///
    /// **Order:** the content is synced; then the name is given; then the folder is synced. A crash in between
    /// leaves the part, or the whole image.
    fn name_it(&self) -> Result<(), Failure> {
        let flags = if self.force {
            RenameFlags::empty()
        } else {
            RenameFlags::NOREPLACE
        };
        match renameat_with(CWD, &self.part, CWD, &self.path, flags) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let message = format!("{}: this file came up meanwhile", self.path.display());
                return Err(Failure::new(
                    "conflict",
                    message,
                    "give --force to replace it",
                ));
            }
            // A file system without the flag.
            Err(Errno::INVAL | Errno::NOSYS) if !self.path.exists() => {
                fs::rename(&self.part, &self.path).map_err(|error| self.failure(&error))?;
            }
            Err(error) => return Err(self.failure(&io::Error::from(error))),
        }
        self.named.set(true);
        let folder = self.part.parent().unwrap_or(Path::new("/"));
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| self.failure(&error))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.named.get() {
            // It is of no use; that it cannot be removed is no reason to say anything else.
            let _ = fs::remove_file(&self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DiskError;

    #[test]
    fn image_that_cannot_be_written_is_not_looked_for_in_the_daemons_log() {
        let full = || DiskError::Nbd(ClientError::Request { errno: 28 });
        let (offset, source) = (4096, full());
        let unwritten = remedy(&CopyError::Write { offset, source });
        assert!(unwritten.contains("space"), "{unwritten}");
        let source = full();
        let unread = remedy(&CopyError::Read { offset, source });
        assert!(unread.contains("log"), "{unread}");
    }
}
