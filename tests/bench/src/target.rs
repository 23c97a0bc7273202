//! What is measured: a block device by NBD on a unix socket, by Quarry and by its peers, each as its documents say.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, Nbd, Site};

use crate::lab::{Lab, Store};
use crate::store::{ACCESS_KEY, BUCKET, SECRET_KEY};

/// A program is given so long to come up.
const PATIENCE: Duration = Duration::from_secs(60);
const VOLUME: &str = "acme/db";
/// Of the same size, with flushes to the store.
const SYNCED: &str = "acme/synced";
const ZEROFS_DEVICE: &str = "disk";

/// One that serves a volume.
pub trait Target {
    fn name(&self) -> &'static str;

    /// A program that it needs and that is not here.
    fn missing(&self) -> Option<String>;

    /// Whether its data are in the store; else they are in a file, and all that is about the store is left out.
    fn has_store(&self) -> bool {
        true
    }

    /// Serves an empty volume.
    fn start(&mut self, store: &Store) -> Result<()>;

    /// Its process.
    fn pid(&self) -> Result<u32>;

    /// Where its socket is, and its export.
    fn address(&self) -> Result<(PathBuf, String)>;

    /// Returns when everything that was flushed is in the store.
    fn drain(&mut self) -> Result<()> {
        Ok(())
    }

    /// Serves another volume, whose flushes last until the store has the data, if they do not already; or the first again.
    fn flush_to_store(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    /// Serves the volume again, by a host that has nothing of it.
    fn lose_host(&mut self, store: &Store) -> Result<()>;

    fn connect(&self) -> Result<Nbd> {
        let (socket, export) = self.address()?;
        Ok(Nbd::connect(&socket, &export)?)
    }
}

/// All, each in a directory of its own.
pub fn all(lab: &Lab) -> Vec<Box<dyn Target>> {
    vec![
        Box::new(Quarry::new(lab)),
        Box::new(Program::new(lab, Kind::QemuNbd)),
        Box::new(Program::new(lab, Kind::NbdkitFile)),
        Box::new(Program::new(lab, Kind::S3backer)),
        Box::new(Program::new(lab, Kind::ZeroFs)),
    ]
}

fn is_here(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

struct Quarry {
    dir: PathBuf,
    size: u64,
    daemon: Option<Daemon>,
    volume: &'static str,
}

impl Quarry {
    fn new(lab: &Lab) -> Self {
        Self {
            dir: lab.dir.join("quarry"),
            size: lab.size,
            daemon: None,
            volume: VOLUME,
        }
    }

    /// What is written does not compress: that it is not tried is the same for all.
    fn make(&self, volume: &str, durability: &str) -> Result<()> {
        let options = ["--compression", "none", "--durability", durability];
        self.daemon()?.create(volume, self.size, &options)?;
        self.attach(volume)
    }

    fn attach(&self, volume: &str) -> Result<()> {
        let attach = ["volume", "attach", volume, "--via", "nbd", "--force"];
        self.daemon()?.quarry(&attach)
    }

    fn daemon(&self) -> Result<&Daemon> {
        self.daemon.as_ref().context("not started")
    }
}

impl Target for Quarry {
    fn name(&self) -> &'static str {
        "quarry"
    }

    fn missing(&self) -> Option<String> {
        None
    }

    fn start(&mut self, store: &Store) -> Result<()> {
        let environment = store.environment();
        let site = Site::with_environment(&self.dir, "host", BUCKET, environment)?;
        // Half of it may be unsent: less than the volume, so that a pass over all of it is held to the store's pace.
        let site = site
            .cache_size(&format!("{}MiB", (self.size >> 20) * 3 / 2))
            .settings("[cache]\ndirty_max = \"50%\"\n");
        // What it still knows of the last round is in a store that is gone.
        site.lose_host()?;
        self.daemon = Some(site.start()?);
        self.make(VOLUME, "local")
    }

    fn pid(&self) -> Result<u32> {
        Ok(self.daemon()?.process_id())
    }

    fn address(&self) -> Result<(PathBuf, String)> {
        let uri = self.daemon()?.uri(self.volume)?;
        let (export, socket) = uri
            .strip_prefix("nbd+unix:///")
            .and_then(|rest| rest.split_once("?socket="))
            .with_context(|| uri.clone())?;
        Ok((PathBuf::from(socket), export.to_owned()))
    }

    fn drain(&mut self) -> Result<()> {
        self.daemon()?.sync(self.volume)
    }

    fn flush_to_store(&mut self, to_store: bool) -> Result<()> {
        self.volume = VOLUME;
        if to_store {
            self.volume = SYNCED;
            self.make(SYNCED, "object")?;
        }
        Ok(())
    }

    fn lose_host(&mut self, _: &Store) -> Result<()> {
        let daemon = self.daemon.take().context("not started")?;
        let site = daemon.site().clone();
        daemon.stop()?;
        site.lose_host()?;
        self.daemon = Some(site.start()?);
        self.attach(self.volume)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    QemuNbd,
    NbdkitFile,
    S3backer,
    ZeroFs,
}

/// One that is started with a command line and ended by a signal.
struct Program {
    kind: Kind,
    dir: PathBuf,
    size: u64,
    child: Option<Child>,
}

impl Program {
    fn new(lab: &Lab, kind: Kind) -> Self {
        let mut program = Self {
            kind,
            dir: PathBuf::new(),
            size: lab.size,
            child: None,
        };
        program.dir = lab.dir.join(program.name());
        program
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("nbd")
    }

    fn command(&self, store: &Store) -> Command {
        let (socket, file) = (self.socket(), self.dir.join("disk"));
        let mut command = Command::new(self.program());
        match self.kind {
            Kind::QemuNbd => command
                .args([
                    "--format=raw",
                    "--persistent",
                    "--shared=4",
                    "--discard=unmap",
                ])
                .arg("--socket")
                .arg(socket)
                .arg(file),
            Kind::NbdkitFile => command
                .args(["--foreground", "--exit-with-parent", "--unix"])
                .arg(socket)
                .arg("file")
                .arg(file),
            Kind::S3backer => command
                .args([
                    "--foreground",
                    "--exit-with-parent",
                    "--threads=16",
                    "--unix",
                ])
                .arg(socket)
                .arg(s3backer_plugin())
                .arg(format!("bucket={BUCKET}"))
                .arg(format!("s3b_baseURL=http://{}/", store.address()))
                .arg(format!("s3b_accessId={ACCESS_KEY}"))
                .arg(format!("s3b_accessKey={SECRET_KEY}"))
                .args(["s3b_blockSize=256k", "s3b_force=true"])
                .arg(format!("s3b_size={}m", self.size >> 20))
                // All of it in its cache, on the same disk as the others'; written back as it sees fit, and at a flush.
                .arg(format!("s3b_blockCacheFile={}", self.cache().display()))
                .arg(format!("s3b_blockCacheSize={}", self.size >> 18)),
            Kind::ZeroFs => command
                .args(["run", "--config"])
                .arg(self.zerofs_config())
                .envs(store.environment()),
        };
        command
    }

    const fn program(&self) -> &'static str {
        match self.kind {
            Kind::QemuNbd => "qemu-nbd",
            Kind::NbdkitFile | Kind::S3backer => "nbdkit",
            Kind::ZeroFs => "zerofs",
        }
    }

    /// What it has of the volume on this host.
    fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    fn zerofs_config(&self) -> PathBuf {
        self.dir.join("zerofs.toml")
    }

    /// All of the volume in its disk cache, as the others have it, and the memory of its package's configuration; the
    /// quicker of its compressions. It reports to nobody.
    fn configure_zerofs(&self, store: &Store) -> Result<()> {
        let cache = (self.size as f64 / 1e9 * 2.0).max(1.0);
        let text = format!(
            "[cache]\ndir = \"{local}\"\ndisk_size_gb = {cache:.1}\nmemory_size_gb = 1.0\n\
             [storage]\nurl = \"s3://{BUCKET}/zerofs\"\nencryption_password = \"{SECRET_KEY}\"\n\
             [filesystem]\ncompression = \"lz4\"\n\
             [servers.ninep]\nunix_socket = \"{dir}/9p\"\n[servers.nbd]\nunix_socket = \"{nbd}\"\n\
             [telemetry]\nenabled = false\n\
             [aws]\naccess_key_id = \"{ACCESS_KEY}\"\nsecret_access_key = \"{SECRET_KEY}\"\n\
             endpoint = \"http://{address}\"\nallow_http = \"true\"\ndefault_region = \"us-east-1\"\n",
            dir = self.dir.display(),
            local = self.cache().display(),
            nbd = self.socket().display(),
            address = store.address(),
        );
        Ok(fs::write(self.zerofs_config(), text)?)
    }

    /// A device of ZeroFS is a file in its file system, which is made through a mount.
    fn make_zerofs_device(&self) -> Result<()> {
        let mount = self.dir.join("mount");
        fs::create_dir_all(&mount)?;
        let mut mounted = Command::new("zerofs")
            .arg("mount")
            .arg(format!("unix:{}/9p", self.dir.display()))
            .arg(&mount)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let devices = mount.join(".nbd");
        let made = wait_for(|| devices.is_dir())
            .and_then(|()| Ok(File::create(devices.join(ZEROFS_DEVICE))?.set_len(self.size)?));
        let unmounted = Command::new("umount").arg(&mount).status();
        drop(mounted.kill());
        drop(mounted.wait());
        made.context("zerofs mount")?;
        ensure!(unmounted?.success(), "umount {}", mount.display());
        Ok(())
    }

    fn run(&mut self, store: &Store) -> Result<()> {
        // One of before may have left it.
        drop(fs::remove_file(self.socket()));
        let log = File::create(self.dir.join("log"))?;
        let mut command = self.command(store);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.child = Some(command.spawn().with_context(|| format!("{command:?}"))?);
        let is_up = wait_for(|| self.is_up());
        is_up.with_context(|| {
            let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            format!("{command:?} does not come up: {log}")
        })
    }

    /// Whether it takes connections. ZeroFS has no device to connect to at first.
    fn is_up(&self) -> bool {
        match self.kind {
            Kind::ZeroFs => UnixStream::connect(self.socket()).is_ok(),
            _ => self.connect().is_ok(),
        }
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Until `is_so`, for [`PATIENCE`].
fn wait_for(mut is_so: impl FnMut() -> bool) -> Result<()> {
    let begun = Instant::now();
    while !is_so() {
        ensure!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}

/// The path of s3backer's plugin for nbdkit, or the name by which nbdkit finds one that is installed.
fn s3backer_plugin() -> PathBuf {
    std::env::var_os("S3BACKER_PLUGIN").map_or_else(|| PathBuf::from("s3backer"), PathBuf::from)
}

impl Target for Program {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::QemuNbd => "qemu-nbd",
            Kind::NbdkitFile => "nbdkit",
            Kind::S3backer => "s3backer",
            Kind::ZeroFs => "zerofs",
        }
    }

    fn missing(&self) -> Option<String> {
        if !is_here(self.program()) {
            return Some(self.program().to_owned());
        }
        let plugin = s3backer_plugin();
        let is_found = plugin.is_file() || has_nbdkit_plugin(&plugin);
        (self.kind == Kind::S3backer && !is_found)
            .then(|| "nbdkit's plugin s3backer ($S3BACKER_PLUGIN)".to_owned())
    }

    fn has_store(&self) -> bool {
        matches!(self.kind, Kind::S3backer | Kind::ZeroFs)
    }

    fn start(&mut self, store: &Store) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        if self.kind == Kind::ZeroFs {
            self.configure_zerofs(store)?;
            self.run(store)?;
            return self.make_zerofs_device();
        }
        File::create(self.dir.join("disk"))?.set_len(self.size)?;
        self.run(store)
    }

    fn pid(&self) -> Result<u32> {
        Ok(self.child.as_ref().context("not started")?.id())
    }

    fn address(&self) -> Result<(PathBuf, String)> {
        let export = match self.kind {
            Kind::ZeroFs => ZEROFS_DEVICE,
            _ => "",
        };
        Ok((self.socket(), export.to_owned()))
    }

    fn lose_host(&mut self, store: &Store) -> Result<()> {
        self.end();
        match self.kind {
            Kind::ZeroFs => fs::remove_dir_all(self.cache())?,
            _ => fs::remove_file(self.cache())?,
        }
        self.run(store)
    }
}

fn has_nbdkit_plugin(name: &Path) -> bool {
    let dump = Command::new("nbdkit")
        .arg("--dump-plugin")
        .arg(name)
        .output();
    dump.is_ok_and(|dump| dump.status.success())
}
