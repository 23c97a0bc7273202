//! `quarry volume import`: a disk image becomes a volume's content.
//!
//! The order: the image is opened; the volume found or made, and attached; the record of an import that was
//! begun is held to both, or the volume found empty (or, with `--overwrite`, made so); the record is written; the
//! copy runs, and the record follows it; all is in the object store; the record is removed; the volume is detached.
//! A crash between any two leaves a record that goes on from no later than where the store is, or none and an
//! empty or a finished volume.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Failure;
use super::args::{ImportFlags, ShapeFlags};
use super::attachment::Attachment;
use super::copying::{Broken, INTERRUPTED, Interrupts, failed, started, watch};
use super::failure::chain;
use super::output::Console;
use super::progress::{copying, uploading};
use super::table::{bytes, span_ms};
use crate::control::{Client, Kind, RatesSpec, VolumeInfo, VolumeRef, VolumeSpec};
use crate::image::disk::{Runs, wipe};
use crate::image::format::MAGIC_BYTES;
use crate::image::qemu::{Served, inspect};
use crate::image::record::{ImageId, Record, RecordFile, folder};
use crate::image::sample::difference;
use crate::image::{Copy, CopyError, Disk, DiskError, Feed, ImageFormat, Progress};

/// Shortest time from a record to the next.
const RECORD_PAUSE: Duration = Duration::from_secs(1);

/// What was imported. Bytes of the image: resumed + written + zeroes.
#[derive(Serialize)]
struct ImportReport {
    volume: String,
    image: String,
    format: String,
    /// Bytes of the image as a disk.
    image_bytes: u64,
    /// Bytes of the volume.
    size_bytes: u64,
    /// Bytes before this one were imported by an earlier call.
    resumed_bytes: u64,
    /// Bytes written by this call; all others were zeroes.
    written_bytes: u64,
    elapsed_ms: u64,
    /// Where it is, if it is left attached.
    #[serde(skip_serializing_if = "Option::is_none")]
    uri: Option<String>,
}

/// An image that is open.
enum Image {
    Stream,
    Disk {
        id: ImageId,
        disk: Disk,
        /// The program that serves it, if it is not raw.
        served: Option<Served>,
    },
}

impl Image {
    fn open(path: &Path, format: Option<ImageFormat>, jobs: usize) -> Result<Self, Failure> {
        if path == Path::new("-") {
            return match format {
                None | Some(ImageFormat::Raw) if io::stdin().is_terminal() => Err(Failure::new(
                    Failure::USAGE,
                    "standard input is a terminal",
                    "send it the bytes of a disk, or name a file",
                )),
                None | Some(ImageFormat::Raw) => Ok(Self::Stream),
                Some(format) => Err(Failure::new(
                    Failure::USAGE,
                    format!("{format} cannot be read from standard input"),
                    "write it to a file first",
                )),
            };
        }
        let open = || {
            let path = path.canonicalize()?;
            let mut file = File::open(&path)?;
            let mut start = Vec::new();
            (&file).take(MAGIC_BYTES as u64).read_to_end(&mut start)?;
            let size = file.seek(SeekFrom::End(0))?;
            Ok((path, file, start, size))
        };
        let (absolute, file, start, size) = open().map_err(|error: io::Error| {
            let message = format!("{}: the image cannot be read: {error}", path.display());
            Failure::new("failed", message, "check its path")
        })?;
        let format = format.unwrap_or_else(|| ImageFormat::of(&start));
        let metadata = file
            .metadata()
            .map_err(|error| Failure::new("failed", format!("{}: {error}", path.display()), ""))?;
        let id = ImageId::new(absolute.clone(), format, size, &metadata);
        if format == ImageFormat::Raw {
            let file = Arc::new(file);
            let disk = Disk::File { file, size };
            let served = None;
            return Ok(Self::Disk { id, disk, served });
        }
        inspect(&absolute, format)?;
        // One for the feed, and one for each worker.
        let (served, client) = Served::start(&absolute, format, false, jobs + 1)?;
        Ok(Self::Disk {
            id,
            disk: Disk::Nbd(client),
            served: Some(served),
        })
    }

    /// Its size as a disk, if that is known.
    fn size(&self) -> Option<u64> {
        match self {
            Self::Stream => None,
            Self::Disk { disk, .. } => Some(disk.size()),
        }
    }
}

pub(super) async fn run(
    client: &Client,
    flags: ImportFlags,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let begun = Instant::now();
    let image = Image::open(&flags.image, flags.format, flags.jobs)?;
    let info = find_or_make(client, &flags, image.size()).await?;
    let import = Import {
        client,
        flags: &flags,
        info: &info,
        begun,
    };
    let report = import.run(image).await?;
    console.show(&report, text)
}

/// The volume; made if it is not there.
async fn find_or_make(
    client: &Client,
    flags: &ImportFlags,
    image_bytes: Option<u64>,
) -> Result<VolumeInfo, Failure> {
    let volume = &flags.volume;
    let wanted = flags.size.map(quarry_config::Size::bytes);
    let info = match client.show_volume(&volume.clone().into()).await {
        Ok(info) => info,
        Err(error) if error.kind == Kind::NotFound => {
            let ShapeFlags {
                sector_size,
                durability,
                compression,
                key,
                no_encryption,
            } = flags.shape.clone();
            let fits = |bytes: u64| bytes.next_multiple_of(u64::from(sector_size));
            let Some(size_bytes) = wanted.or(image_bytes.map(fits)) else {
                return Err(Failure::new(
                    Failure::USAGE,
                    format!("{volume} is not there, and how much will come is not known"),
                    "give --size",
                ));
            };
            too_small(volume, image_bytes, size_bytes, "give a larger --size")?;
            let VolumeRef { tenant, name } = volume.clone();
            let spec = VolumeSpec {
                tenant,
                name,
                size_bytes,
                sector_size,
                durability,
                compression,
                retain_ms: 0,
                rates: RatesSpec::default(),
                key,
                no_encryption,
            };
            return Ok(client.create_volume(&spec).await?);
        }
        Err(error) => return Err(error.into()),
    };
    if wanted.is_some_and(|wanted| wanted != info.size_bytes) {
        let message = format!("{volume} is there, with {}", bytes(info.size_bytes));
        let remedy = "leave --size out, which is for a volume that is made";
        return Err(Failure::new("conflict", message, remedy));
    }
    let remedy = format!("make it larger: `quarry volume resize {volume} SIZE`");
    too_small(volume, image_bytes, info.size_bytes, &remedy)?;
    Ok(info)
}

fn too_small(
    volume: &VolumeRef,
    image_bytes: Option<u64>,
    size_bytes: u64,
    remedy: &str,
) -> Result<(), Failure> {
    match image_bytes {
        Some(image_bytes) if image_bytes > size_bytes => {
            let (image, size) = (bytes(image_bytes), bytes(size_bytes));
            let message = format!(
                "the image has {image} ({image_bytes} bytes), more than the {size} of {volume}"
            );
            Err(Failure::new("invalid", message, remedy))
        }
        _ => Ok(()),
    }
}

/// An import under way.
struct Import<'a> {
    client: &'a Client,
    flags: &'a ImportFlags,
    info: &'a VolumeInfo,
    begun: Instant,
}

impl Import<'_> {
    async fn run(&self, mut image: Image) -> Result<ImportReport, Failure> {
        let place = self.record_place()?;
        let begun = match (&place, &image) {
            (Some(place), Image::Disk { id, .. }) => self.begun_before(place, id)?,
            _ => None,
        };
        let volume = &self.flags.volume;
        let mut attachment =
            Attachment::take(self.client, &volume.clone().into(), self.info, false).await?;
        let ready = self.make_ready(&mut image, &attachment, place.as_ref(), begun);
        let record = match ready {
            Ok(record) => record,
            Err(failure) => {
                attachment.leave().await;
                return Err(failure);
            }
        };
        // What an import attached that was cut off, this one detaches.
        attachment.ours |= record.as_ref().is_some_and(|record| record.detach);
        let resumed_bytes = record.as_ref().map_or(0, |record| record.sent_bytes);
        let format = match &image {
            Image::Stream => ImageFormat::Raw.to_string(),
            Image::Disk { id, .. } => id.format.clone(),
        };
        let image_bytes = image.size();
        let mark = place.as_ref().zip(record);
        let mut interrupts = Interrupts::listen()?;
        let copied = self.copy(image, &attachment, mark, &mut interrupts).await;
        let progress = match copied {
            Ok(progress) => progress,
            Err(failure) => {
                // Whoever has enough of it does not wait for an upload.
                if attachment.ours && failure.kind != INTERRUPTED {
                    let _ = interrupts.heed(attachment.detach()).await;
                }
                return Err(failure);
            }
        };

        // All of it in the store, before what says how far it is goes.
        let sync = self.client.sync(volume);
        let image = volume.clone().into();
        let sync = uploading("uploading", self.client, &image, sync);
        match interrupts.heed(sync).await {
            Some(synced) => synced?,
            None => return Err(self.broken(Broken::Interrupted, None)),
        }
        if let Some(place) = &place {
            place.remove()?;
        }
        let detach = attachment.ours && !self.flags.attach;
        if detach {
            interrupts
                .heed(attachment.detach())
                .await
                .unwrap_or_else(|| {
                    let message = format!("{volume} is imported; it is still being detached");
                    Err(Failure::new(INTERRUPTED, message, ""))
                })?;
        }
        Ok(ImportReport {
            volume: volume.to_string(),
            image: self.flags.image.display().to_string(),
            format,
            image_bytes: image_bytes.unwrap_or(progress.done),
            size_bytes: self.info.size_bytes,
            resumed_bytes,
            written_bytes: progress.written,
            elapsed_ms: u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            uri: attachment.uri.filter(|_| !detach),
        })
    }

    /// Where the record is; nowhere for one who has no home.
    fn record_place(&self) -> Result<Option<RecordFile>, Failure> {
        let Some(folder) = folder() else {
            eprintln!(
                "quarry: neither XDG_STATE_HOME nor HOME is set: cut off, this import cannot be resumed"
            );
            return Ok(None);
        };
        Ok(Some(RecordFile::take(&folder, &self.info.id)?))
    }

    /// The record of an import that was begun and is to go on.
    fn begun_before(&self, place: &RecordFile, id: &ImageId) -> Result<Option<Record>, Failure> {
        if self.flags.overwrite {
            return Ok(None);
        }
        let Some(record) = place.load()? else {
            return Ok(None);
        };
        if record.image == *id {
            return Ok(Some(record));
        }
        let (volume, other) = (&self.flags.volume, record.image.path.display());
        let message = if record.image.path == id.path && record.image.format == id.format {
            format!("{other} was changed since its import into {volume} was begun")
        } else {
            let format = record.image.format;
            format!("an import of {other} ({format}) into {volume} was begun and not finished")
        };
        let remedy = "finish that one, or start anew with --overwrite";
        Err(Failure::new("conflict", message, remedy))
    }

    /// Sees that the volume is as the copy wants it. Gives the record that the copy goes on by.
    fn make_ready(
        &self,
        image: &mut Image,
        attachment: &Attachment<'_>,
        place: Option<&RecordFile>,
        begun: Option<Record>,
    ) -> Result<Option<Record>, Failure> {
        let volume = &self.flags.volume;
        let told = |error: DiskError| {
            let what = chain(&anyhow::Error::new(error));
            let message = format!("{volume} or its image cannot be read or written: {what}");
            Failure::new("failed", message, "see the daemon's log")
        };
        let mut disk = attachment.connect()?;
        let overwrite = self.flags.overwrite;
        match (&begun, &mut *image) {
            (Some(record), Image::Disk { disk: image, .. }) => {
                let sent = record.sent_bytes;
                if let Some(at) = difference(image, &mut disk, sent).map_err(told)? {
                    let message = format!(
                        "{volume} and the image differ at byte {at}: it was written to since the import was cut off"
                    );
                    return Err(Failure::new(
                        "conflict",
                        message,
                        "start anew with --overwrite",
                    ));
                }
            }
            _ if overwrite => {}
            _ => {
                let mut runs = Runs::new(0, disk.size());
                if let Some((at, _)) = runs.next_data(&mut disk).map_err(told)? {
                    let message = format!("{volume} is not empty: it has data at byte {at}");
                    let remedy = "give --overwrite to lose them, or import into another volume";
                    return Err(Failure::new("conflict", message, remedy));
                }
            }
        }
        let record = match (begun, &*image) {
            (Some(record), _) => Some(record),
            (None, Image::Disk { id, .. }) => Some(Record {
                volume: self.info.id.clone(),
                image: id.clone(),
                sent_bytes: 0,
                detach: attachment.ours,
            }),
            (None, Image::Stream) => None,
        };
        // **Order:** the record first, then what makes the volume other than it was found. A crash in between
        // leaves a volume that only --overwrite gets further with, or an import that begins anew.
        match (place, &record) {
            (Some(place), Some(record)) => place.store(record)?,
            // A stream cannot be read again, and what an import before it recorded will not be so any more.
            (Some(place), None) => place.remove()?,
            (None, _) => {}
        }
        if record.as_ref().is_none_or(|record| record.sent_bytes == 0) {
            wipe(&mut disk).map_err(told)?;
        }
        Ok(record)
    }

    async fn copy(
        &self,
        image: Image,
        attachment: &Attachment<'_>,
        mark: Option<(&RecordFile, Record)>,
        interrupts: &mut Interrupts,
    ) -> Result<Progress, Failure> {
        let start = mark.as_ref().map_or(0, |(_, record)| record.sent_bytes);
        let mut last = attachment.connect()?;
        let total = image.size();
        let found = match &image {
            Image::Stream => None,
            Image::Disk { id, .. } => Some(id.clone()),
        };
        let mut pairs = Vec::new();
        let (feed, served) = match image {
            Image::Stream => {
                for _ in 0..self.flags.jobs {
                    pairs.push((None, attachment.connect()?));
                }
                let block = usize::try_from(self.info.sector_size).unwrap_or(4096);
                let stdin = Box::new(io::stdin());
                (Feed::stream(stdin, self.info.size_bytes, block), None)
            }
            Image::Disk { disk, served, .. } => {
                for _ in 0..self.flags.jobs {
                    let source = match (&disk, &served) {
                        (Disk::File { file, size }, _) => Disk::File {
                            file: Arc::clone(file),
                            size: *size,
                        },
                        (_, Some(served)) => Disk::Nbd(served.connect().map_err(|error| {
                            let message = format!("qemu-nbd takes no more connections: {error}");
                            Failure::new("failed", message, "give fewer --jobs")
                        })?),
                        (Disk::Nbd(_), None) => unreachable!("only a program serves by NBD"),
                    };
                    pairs.push((Some(source), attachment.connect()?));
                }
                let block = u64::from(self.info.sector_size);
                let end = disk.size().next_multiple_of(block);
                (Feed::disk(disk, start, end), served)
            }
        };
        let bar = copying("importing", &self.flags.volume, total, start);
        let copy = started(feed, pairs)?;
        let ended = watch(copy, &bar, interrupts, async |copy| match mark {
            Some((place, record)) => self.keep_record(copy, place, record).await,
            None => std::future::pending().await,
        })
        .await;
        bar.finish_and_clear();
        let progress = ended.map_err(|broken| self.broken(broken, served.as_ref()))?;
        last.flush().map_err(|source| {
            let offset = progress.done;
            let error = CopyError::Write { offset, source };
            self.broken(Broken::Copy(error), None)
        })?;
        match found {
            Some(id) if !id.is_unchanged() => {
                let message = format!("{} was changed while it was imported", id.path.display());
                let remedy = "stop whoever writes to it, and start anew with --overwrite";
                Err(Failure::new("conflict", message, remedy))
            }
            _ => Ok(progress),
        }
    }

    /// Notes again and again how far the copy is; ends with what keeps it from that.
    async fn keep_record(&self, copy: &Copy, place: &RecordFile, mut record: Record) -> Failure {
        loop {
            tokio::time::sleep(RECORD_PAUSE).await;
            // **Order:** answered, then in the store, then recorded: see [`crate::image::record`].
            let done = copy.progress().done;
            if done <= record.sent_bytes {
                continue;
            }
            if let Err(error) = self.client.sync(&self.flags.volume).await {
                return error.into();
            }
            record.sent_bytes = done;
            if let Err(error) = place.store(&record) {
                return error.into();
            }
        }
    }

    fn broken(&self, broken: Broken, served: Option<&Served>) -> Failure {
        let volume = self.flags.volume.to_string();
        let image = self.flags.image.display().to_string();
        let go_on = if self.flags.image == Path::new("-") {
            "start anew with --overwrite; what comes from standard input cannot be resumed"
        } else {
            "the same command goes on where this one stopped"
        };
        match broken {
            Broken::Interrupted => {
                let message = format!("interrupted; {volume} stays attached");
                Failure::new(INTERRUPTED, message, go_on)
            }
            Broken::Copy(error) => {
                let complaint = served.and_then(Served::complaint);
                let mut failure = failed(error, &image, &volume, go_on);
                if let Some(words) = complaint {
                    failure.message += &format!(" (qemu-nbd says: {words})");
                }
                failure
            }
            Broken::Beside(mut failure) => {
                failure.remedy = format!("{}; {go_on}", failure.remedy);
                failure
            }
        }
    }
}

fn text(report: &ImportReport) -> String {
    let resumed = match report.resumed_bytes {
        0 => String::new(),
        resumed => format!(", after {} by an earlier call", bytes(resumed)),
    };
    let attached = match &report.uri {
        None => String::new(),
        Some(uri) => format!("; it is attached at {uri}"),
    };
    format!(
        "{}: {} imported, {} of data written in {}{resumed}{attached}",
        report.volume,
        bytes(report.image_bytes),
        bytes(report.written_bytes),
        span_ms(report.elapsed_ms)
    )
}
