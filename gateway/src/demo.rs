//! `quarry demo`: the main job in one process, on a store in a folder.
//!
//! A tenant and a volume are made, the volume is attached, real input is copied in and flushed;
//! then the cache is thrown away, the volume opened anew from the object store alone, read back
//! and compared. Exit status says whether it held.

use std::fs::File;
use std::io::{Read, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::control::{AttachOptions, Engine, Via, VolumeRef, VolumeSpec};
use crate::engine::Daemon;
use crate::image::Disk;
use crate::nbd::client::{Client, read_full};
use crate::nbd::listen_unix;
use crate::store::{Lane, LaneSettings, StoreSettings, open_store};

/// Bytes of one transfer.
const STEP: usize = 1 << 20;

/// What the demo does.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// What is copied in; `None`: a file system image that is made up.
    pub input: Option<PathBuf>,
    /// Bytes of the cache.
    pub cache_bytes: u64,
}

impl Default for DemoOptions {
    fn default() -> Self {
        Self {
            input: None,
            cache_bytes: 256 << 20,
        }
    }
}

/// Runs it in a temporary folder, which is removed at the end. True if what came back is what went
/// in.
///
/// # Errors
/// If a step cannot be done at all.
pub async fn run(options: DemoOptions) -> anyhow::Result<bool> {
    let home = std::env::temp_dir().join(format!("quarry-demo-{}", std::process::id()));
    std::fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    let held = in_folder(&home, &options).await;
    if let Err(error) = std::fs::remove_dir_all(&home) {
        eprintln!("{} could not be removed: {error}", home.display());
    }
    held
}

async fn in_folder(home: &Path, options: &DemoOptions) -> anyhow::Result<bool> {
    let input = match &options.input {
        Some(input) => input.clone(),
        None => {
            let program = std::env::current_exe()?;
            tokio::task::block_in_place(|| make_image(home, &program))?
        }
    };
    let length = std::fs::metadata(&input)
        .with_context(|| format!("cannot read {}", input.display()))?
        .len();
    ensure!(
        length > 0,
        "{} is empty; name a file with content",
        input.display()
    );
    let size = length.next_multiple_of(4096).max(STEP as u64);
    let volume: VolumeRef = "demo/disk".parse()?;
    std::fs::create_dir_all(home.join("store"))?;

    let first = Host::start(home, "first", options.cache_bytes).await?;
    first
        .daemon
        .create_tenant(volume.tenant.clone().into())
        .await?;
    let spec = VolumeSpec {
        tenant: volume.tenant.clone(),
        name: volume.name.clone(),
        size_bytes: size,
        sector_size: 4096,
        durability: quarry_objfmt::Durability::Local,
        compression: quarry_objfmt::Compression::Lz4,
        retain_ms: 0,
        rates: crate::control::RatesSpec::default(),
        key: None,
        no_encryption: false,
    };
    first.daemon.create_volume(spec).await?;
    let (disk, place) = first.attach(&volume, size).await?;
    say(&format!(
        "made tenant demo and volume {volume} of {}, attached as {place}",
        bytes(size)
    ));
    let begun = Instant::now();
    let hash_in = tokio::task::block_in_place(|| copy_in(&input, disk, size))?;
    say(&format!(
        "copied {} in and flushed: {}",
        bytes(length),
        rate(length, begun.elapsed())
    ));
    let begun = Instant::now();
    first.daemon.sync(&volume).await?;
    say(&format!(
        "everything is in the object store, {:.1} s later",
        begun.elapsed().as_secs_f64()
    ));
    first.daemon.detach(&volume.clone().into()).await?;
    first.stop().await;
    std::fs::remove_file(home.join("first.cache")).context("cannot throw the cache away")?;
    say("threw the cache away");

    let second = Host::start(home, "second", options.cache_bytes).await?;
    let (disk, place) = second.attach(&volume, size).await?;
    let begun = Instant::now();
    let hash_out = tokio::task::block_in_place(|| copy_out(disk, size))?;
    say(&format!(
        "read {} back by {place}: {}",
        bytes(size),
        rate(size, begun.elapsed())
    ));
    let info = second.daemon.show_volume(&volume.clone().into()).await?;
    second.daemon.detach(&volume.clone().into()).await?;
    second.stop().await;

    let held = hash_in == hash_out;
    let (objects, stored) = usage(&home.join("store"))?;
    say(&format!(
        "the store holds {objects} objects, {}",
        bytes(stored)
    ));
    if let Some(ratio) = info.hit_ratio {
        say(&format!(
            "of the bytes read from a cold cache, readahead had {:.0} % there in time",
            ratio * 100.0
        ));
    }
    say(if held {
        "what came back is what went in"
    } else {
        "WHAT CAME BACK IS NOT WHAT WENT IN"
    });
    say("where to go next: `quarry serve --help`, and README.md");
    Ok(held)
}

fn say(line: &str) {
    // A closed pipe is no reason to stop half-way.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn bytes(n: u64) -> String {
    bytesize::ByteSize(n).to_string()
}

#[allow(clippy::cast_precision_loss, reason = "a rate for people")]
fn rate(bytes: u64, time: Duration) -> String {
    format!(
        "{:.0} MiB/s",
        bytes as f64 / f64::from(1 << 20) / time.as_secs_f64().max(1e-9)
    )
}

/// A daemon with a cache of its own on the common store.
struct Host {
    daemon: Arc<Daemon>,
    lane: Lane,
    nbd: tokio::task::JoinHandle<()>,
    socket: PathBuf,
}

impl Host {
    async fn start(home: &Path, name: &str, cache_bytes: u64) -> anyhow::Result<Self> {
        let url = url::Url::from_directory_path(home.join("store"))
            .map_err(|()| anyhow::anyhow!("{} is no absolute path", home.display()))?;
        let socket = home.join(format!("{name}.nbd"));
        let mut config = quarry_config::Config::default();
        config.daemon.data_dir = home.join(name);
        config.daemon.nbd_socket = Some(socket.clone());
        config.daemon.journal_dir = home.join(format!("{name}.journal"));
        config.store.url = Some(url.to_string());
        config.cache.path = Some(home.join(format!("{name}.cache")));
        config.cache.size = Some(quarry_config::Size::new(cache_bytes));
        let store = open_store(&StoreSettings::from(&config.store))?;
        let lane = Lane::new(Arc::clone(&store), &LaneSettings::default());
        let daemon = Daemon::start(config, lane.clone(), None)?;
        let listener = listen_unix(&socket)?;
        let server = daemon.nbd_server();
        let nbd = tokio::spawn(async move { server.serve_unix(listener).await });
        Ok(Self {
            daemon,
            lane,
            nbd,
            socket,
        })
    }

    /// The attached volume of so many bytes, as its user sees it, and where that is.
    async fn attach(&self, volume: &VolumeRef, size: u64) -> anyhow::Result<(Disk, String)> {
        let info = self
            .daemon
            .attach(&volume.clone().into(), AttachOptions::default())
            .await?;
        match (info.via, info.device) {
            (Via::Ublk, Some(device)) => {
                let file = File::options().read(true).write(true).open(&device);
                let file = Arc::new(file.with_context(|| format!("cannot open {device}"))?);
                Ok((Disk::File { file, size }, device))
            }
            (Via::Ublk, None) => bail!("the volume is attached, but no device was named"),
            (Via::Nbd, _) => {
                let client = Client::connect(&self.socket, &volume.to_string())?;
                Ok((
                    Disk::Nbd(client),
                    "an NBD export (this kernel has no ublk)".to_owned(),
                ))
            }
        }
    }

    async fn stop(self) {
        self.nbd.abort();
        self.daemon.stop().await;
        self.lane.stop();
    }
}

/// SHA-256 of the input, zeroes to the volume's end included.
fn copy_in(input: &Path, mut disk: Disk, size: u64) -> anyhow::Result<Vec<u8>> {
    let mut file = File::open(input)?;
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    let mut offset = 0;
    while offset < size {
        let step = usize::try_from((size - offset).min(STEP as u64))?;
        let mut buf = vec![0; step];
        read_full(&mut file, &mut buf)?;
        hash.update(&buf);
        disk.write_at(offset, &buf)?;
        offset += step as u64;
    }
    disk.flush()?;
    Ok(hash.finish().as_ref().to_vec())
}

fn copy_out(mut disk: Disk, size: u64) -> anyhow::Result<Vec<u8>> {
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    let mut offset = 0;
    while offset < size {
        let step = usize::try_from((size - offset).min(STEP as u64))?;
        let mut buf = vec![0; step];
        disk.read_at(offset, &mut buf)?;
        hash.update(&buf);
        offset += step as u64;
    }
    Ok(hash.finish().as_ref().to_vec())
}

/// Bytes of an image that is made up.
const IMAGE_BYTES: u64 = 128 << 20;

/// As much of this program goes into it: the rest is the file system's.
const CONTENT_BYTES_MAX: u64 = 64 << 20;

/// An ext4 image with the beginning of `program` in it, or without mkfs.ext4 that over and over.
fn make_image(home: &Path, program: &Path) -> anyhow::Result<PathBuf> {
    let image = home.join("input.img");
    let file = File::create(&image)?;
    file.set_len(IMAGE_BYTES)?;
    let mut part = Vec::new();
    File::open(program)?
        .take(CONTENT_BYTES_MAX)
        .read_to_end(&mut part)?;
    let content = home.join("content");
    std::fs::create_dir_all(&content)?;
    std::fs::write(content.join("quarry"), &part)?;
    let made = std::process::Command::new("mkfs.ext4")
        .args(["-q", "-F", "-d"])
        .arg(&content)
        .arg(&image)
        .output();
    let why = match made {
        Ok(made) if made.status.success() => return Ok(image),
        Ok(made) => format!(
            "mkfs.ext4 failed: {}",
            String::from_utf8_lossy(&made.stderr).trim()
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            "no mkfs.ext4 here".to_owned()
        }
        Err(error) => format!("mkfs.ext4 cannot be run: {error}"),
    };
    say(&format!("{why}; the input is this program, over and over"));
    ensure!(!part.is_empty(), "{} is empty", program.display());
    let mut at = 0;
    while at < IMAGE_BYTES {
        file.write_all_at(&part, at)?;
        at += part.len() as u64;
    }
    Ok(image)
}

/// Files in a folder, and their bytes.
fn usage(folder: &Path) -> anyhow::Result<(u64, u64)> {
    let (mut files, mut bytes) = (0, 0);
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            let (f, b) = usage(&entry.path())?;
            files += f;
            bytes += b;
        } else {
            files += 1;
            bytes += entry.metadata()?.len();
        }
    }
    Ok((files, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_has_room_for_its_file_system_however_large_the_program_is() {
        let home = tempfile::tempdir().unwrap();
        let program = home.path().join("program");
        let mebibytes = usize::try_from(IMAGE_BYTES >> 20).unwrap() + 32;
        let mut file = File::create(&program).unwrap();
        for _ in 0..mebibytes {
            file.write_all(&[7; STEP]).unwrap();
        }
        let image = make_image(home.path(), &program).unwrap();
        assert_eq!(std::fs::metadata(&image).unwrap().len(), IMAGE_BYTES);
        if std::process::Command::new("mkfs.ext4")
            .arg("-V")
            .output()
            .is_err()
        {
            quarry_tests::skip("the program mkfs.ext4 is not installed");
            return;
        }
        let mut magic = [0; 2];
        let file = File::open(&image).unwrap();
        file.read_exact_at(&mut magic, 1024 + 56).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
    }
}
