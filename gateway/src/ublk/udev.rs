//! What udev is told of our devices, and when it is done with one.
//!
//! Where udev runs, it gives every new block device an owner and a mode of its own choosing, some
//! time after the device is there, and may do so again at each later event. So the rule
//! `gateway/udev/60-quarry.rules` is told beforehand, in a file for each device, and [`Udev::wait`]
//! waits until udev has had its turn: what is set after that stays, without the rule until a later
//! `add` event.
//!
//! Invariants:
//! - A file has the device's stamp, which is read where libublk's file was cut off.
//! - A file is there before its device is started, and is gone before the device's number can be
//!   used again. A device that is deleted by other means than ours leaves its file until the next
//!   start of a daemon.
//! - The folder and its parent are root's, and nobody else can write there: who writes a file there
//!   chooses who may read a device.
//! - Tenants', volumes' and snapshots' names have only letters, digits, `.`, `_` and `-`, a letter or digit
//!   first, and a snapshot's, or a time, which has colons too, follows its volume's behind an `@`. udev leaves
//!   both as they are: so they can break neither a line of the file nor a path.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use quarry_objfmt::VolumeId;

use super::{DeviceSpec, Stamp, UblkError, short_name};

/// Where the rule looks for what it is told; the rule has the same path.
const TOLD: &str = "/run/quarry/udev";

/// Where udev keeps its state.
const UDEV: &str = "/run/udev";

/// Before the stamp; udev reads over such a line.
const STAMP: &str = "# stamp ";

/// How long udev may take over a device.
const UDEV_MAX: Duration = Duration::from_secs(10);

/// Between two looks at udev's state.
const POLL: Duration = Duration::from_millis(5);

/// The udev of this host, if there is one.
pub(super) struct Udev {
    told: PathBuf,
    state: PathBuf,
    wait_max: Duration,
}

impl Default for Udev {
    fn default() -> Self {
        Self {
            told: TOLD.into(),
            state: UDEV.into(),
            wait_max: UDEV_MAX,
        }
    }
}

/// What udev's entry of a device says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    written: SystemTime,
    /// Since systemd 255: it is still at it.
    is_processing: bool,
    /// Our rule was there.
    has_rule: bool,
}

impl Udev {
    fn file(&self, id: u32) -> PathBuf {
        self.told.join(format!("ublkb{id}"))
    }

    /// Tells what the device is to be called and whose it is to be, atomically: before it is started,
    /// so that udev's first event of it finds the file.
    ///
    /// # Errors
    /// If the folder cannot be used.
    pub(super) fn tell(&self, id: u32, spec: &DeviceSpec) -> Result<(), UblkError> {
        self.try_tell(id, spec)
            .map_err(|source| UblkError::UdevFolder {
                path: self.told.clone(),
                source,
            })
    }

    fn try_tell(&self, id: u32, spec: &DeviceSpec) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.told)?;
        let _lock = self.lock()?;
        let file = self.file(id);
        let new = file.with_extension("new");
        let mut writer = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o644)
            .open(&new)?;
        writer.write_all(text(spec).as_bytes())?;
        fs::rename(&new, &file)
    }

    /// The stamp of the device, if a daemon told one.
    pub(super) fn stamp(&self, id: u32) -> Option<Stamp> {
        self.check().ok()?;
        let text = fs::read_to_string(self.file(id)).ok()?;
        let stamp = text.lines().find_map(|line| line.strip_prefix(STAMP))?;
        Stamp::from_json(serde_json::from_str(stamp).ok()?)
    }

    /// Whether the device may be one that was told of.
    pub(super) fn knows(&self, id: u32) -> bool {
        match fs::symlink_metadata(self.file(id)) {
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    /// That the folder is the daemon's user's alone.
    fn check(&self) -> io::Result<()> {
        let user = rustix::process::geteuid().as_raw();
        for folder in self.told.ancestors().take(2) {
            let is = fs::symlink_metadata(folder)?;
            if !is.is_dir() || is.uid() != user || is.mode() & 0o022 != 0 {
                let problem = format!("{} is not the daemon's user's alone", folder.display());
                return Err(io::Error::other(problem));
            }
        }
        Ok(())
    }

    /// Checks the folder and keeps other daemons out of it until the answer is dropped.
    fn lock(&self) -> io::Result<File> {
        self.check()?;
        // Whoever may open a file may hold its lock for ever.
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.told.join(".lock"))?;
        lock.lock()?;
        Ok(lock)
    }

    /// Takes back what was told of a volume's device: as the last before it is deleted.
    pub(super) fn forget(&self, id: u32, volume: VolumeId) {
        let file = self.file(id);
        match self.try_forget(&file, volume) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(file = %file.display(), %error, "what udev was told of a device stays");
            }
            _ => {}
        }
    }

    fn try_forget(&self, file: &Path, volume: VolumeId) -> io::Result<()> {
        let _lock = self.lock()?;
        // The number may be another device's by now.
        if fs::read_to_string(file)?
            .lines()
            .any(|l| l == id_line(volume))
        {
            fs::remove_file(file)?;
        }
        Ok(())
    }

    /// Takes back what dead daemons told of devices that are not in `list`, the kernel's folder of
    /// `ublkcN`.
    pub(super) fn sweep(&self, list: &Path) {
        match self.try_sweep(list) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(folder = %self.told.display(), %error, "what udev was told of devices that are gone stays");
            }
            _ => {}
        }
    }

    fn try_sweep(&self, list: &Path) -> io::Result<()> {
        // Another user's are another daemon's to clear up.
        if fs::symlink_metadata(&self.told)?.uid() != rustix::process::geteuid().as_raw() {
            return Ok(());
        }
        // Held, nobody can tell of a device that is not in the list yet.
        let _lock = self.lock()?;
        for entry in fs::read_dir(&self.told)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|n| n.strip_prefix("ublkb")) else {
                continue;
            };
            let id = name.strip_suffix(".new").unwrap_or(name);
            if !list.join(format!("ublkc{id}")).exists() {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Waits until udev, if it runs, is done with the device's node; longest [`UDEV_MAX`]. A fresh
    /// device is one that was started after [`Udev::tell`]; of another an earlier entry will do, for
    /// its recovery is no event.
    pub(super) fn wait(&self, id: u32, node: &Path, spec: &DeviceSpec, fresh: bool) {
        if !self.state.join("control").exists() {
            return;
        }
        let Ok(is) = fs::metadata(node) else { return };
        let (major, minor) = (rustix::fs::major(is.rdev()), rustix::fs::minor(is.rdev()));
        let entry = self.state.join(format!("data/b{major}:{minor}"));
        // Both times are the kernel's, so that they can be compared.
        let told = fs::metadata(self.file(id)).and_then(|told| told.modified());
        let since = told.ok().filter(|_| fresh);
        let deadline = Instant::now() + self.wait_max;
        loop {
            match Entry::read(&entry) {
                Some(entry) if entry.is_of(since) => {
                    if !entry.has_rule && !spec.permissions.is_default() {
                        tracing::warn!(device = %node.display(), "udev does not have Quarry's rule, and a later event of the device may undo owner and mode: install gateway/udev/60-quarry.rules");
                    }
                    return;
                }
                _ if Instant::now() >= deadline => {
                    tracing::warn!(device = %node.display(), waited = ?self.wait_max, "udev is not done with the device: it may yet undo owner and mode, unless it has Quarry's rule");
                    return;
                }
                _ => std::thread::sleep(POLL),
            }
        }
    }
}

impl Entry {
    /// `None` if there is none.
    fn read(path: &Path) -> Option<Self> {
        let written = fs::metadata(path).and_then(|is| is.modified()).ok()?;
        let text = fs::read_to_string(path).ok()?;
        Some(Self {
            written,
            is_processing: text.lines().any(|line| line == "E:ID_PROCESSING=1"),
            has_rule: text
                .lines()
                .any(|line| line.starts_with("E:QUARRY_VOLUME=")),
        })
    }

    /// Whether it is finished, and not of a device that had the number before.
    fn is_of(&self, since: Option<SystemTime>) -> bool {
        !self.is_processing && since.is_none_or(|since| self.written >= since)
    }
}

fn id_line(volume: VolumeId) -> String {
    format!("QUARRY_VOLUME_ID={volume}")
}

/// The file's lines, each a variable of the rule but for the last, the stamp.
fn text(spec: &DeviceSpec) -> String {
    let mut text = format!(
        "QUARRY_TENANT={}\nQUARRY_VOLUME={}\n{}\n",
        spec.tenant,
        short_name(&spec.name, spec.snapshot.as_ref(), spec.at),
        id_line(spec.volume)
    );
    let permissions = &spec.permissions;
    let mut line = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            text += &format!("QUARRY_{name}={value}\n");
        }
    };
    line("OWNER", permissions.uid.map(|uid| uid.to_string()));
    line("GROUP", permissions.gid.map(|gid| gid.to_string()));
    line("MODE", permissions.mode.map(|mode| format!("{mode:04o}")));
    text += &format!("{STAMP}{}\n", Stamp::of(spec).to_json());
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::Permissions;
    use super::*;

    fn spec(volume: u8) -> DeviceSpec {
        DeviceSpec {
            volume: VolumeId::from_bytes([volume; 16]),
            permissions: Permissions {
                uid: Some(1000),
                gid: Some(6),
                mode: Some(0o40),
            },
            ..DeviceSpec::example()
        }
    }

    fn udev(dir: &Path) -> Udev {
        fs::create_dir_all(dir.join("state/data")).unwrap();
        Udev {
            told: dir.join("quarry/udev"),
            state: dir.join("state"),
            wait_max: Duration::from_millis(50),
        }
    }

    #[test]
    fn file_has_what_the_rule_reads_and_no_more() {
        let id = VolumeId::from_bytes([7; 16]);
        let expected = format!(
            "QUARRY_TENANT=acme\nQUARRY_VOLUME=db\nQUARRY_VOLUME_ID={id}\nQUARRY_OWNER=1000\nQUARRY_GROUP=6\nQUARRY_MODE=0040\n"
        );
        let stamp = format!("# stamp {}\n", Stamp::of(&spec(7)).to_json());
        assert_eq!(text(&spec(7)), format!("{expected}{stamp}"));
        let plain = DeviceSpec {
            permissions: Permissions::default(),
            ..spec(7)
        };
        assert_eq!(text(&plain).lines().count(), 4);
        let rule = include_str!("../../udev/60-quarry.rules");
        let path = format!("IMPORT{{file}}=\"{TOLD}/%k\"");
        assert!(rule.contains(&path), "the rule reads another folder");
        for line in expected.lines().filter(|line| !line.contains("_ID=")) {
            let (name, _) = line.split_once('=').unwrap();
            assert!(rule.contains(&format!("$env{{{name}}}")), "{name}");
        }
    }

    #[test]
    fn file_told_is_forgotten_with_its_own_volume_only() {
        let dir = tempfile::tempdir().unwrap();
        let udev = udev(dir.path());
        udev.tell(3, &spec(1)).unwrap();
        udev.tell(3, &spec(2)).unwrap();
        let file = udev.told.join("ublkb3");
        assert_eq!(fs::read_to_string(&file).unwrap(), text(&spec(2)));
        udev.forget(3, spec(1).volume);
        assert!(file.exists(), "another volume's");
        udev.forget(3, spec(2).volume);
        assert!(!file.exists());
        udev.forget(3, spec(2).volume);
    }

    #[test]
    fn stamp_told_is_read_again_from_a_folder_of_the_daemons_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let udev = udev(dir.path());
        assert!(udev.stamp(3).is_none() && !udev.knows(3));
        udev.tell(3, &spec(1)).unwrap();
        assert_eq!(udev.stamp(3), Some(Stamp::of(&spec(1))));
        assert!(udev.knows(3) && udev.stamp(4).is_none());
        fs::set_permissions(&udev.told, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(udev.stamp(3), None);
        fs::set_permissions(&udev.told, fs::Permissions::from_mode(0o755)).unwrap();
        // As a daemon before this one told it.
        fs::write(udev.told.join("ublkb3"), "QUARRY_TENANT=acme\n").unwrap();
        assert!(udev.stamp(3).is_none() && udev.knows(3));
    }

    #[test]
    fn folder_that_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let udev = udev(dir.path());
        udev.tell(3, &spec(1)).unwrap();
        for folder in [&udev.told, udev.told.parent().unwrap()] {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o775)).unwrap();
            let error = udev.tell(3, &spec(1)).unwrap_err().to_string();
            assert!(error.contains(&folder.display().to_string()), "{error}");
            fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(&udev.told, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &udev.told).unwrap();
        udev.tell(3, &spec(1)).unwrap_err();
    }

    #[test]
    fn sweep_takes_back_only_what_is_of_devices_that_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let udev = udev(dir.path());
        let list = dir.path().join("list");
        udev.sweep(&list);
        udev.tell(3, &spec(1)).unwrap();
        udev.tell(4, &spec(2)).unwrap();
        fs::write(udev.told.join("ublkb5.new"), "").unwrap();
        fs::write(udev.told.join("else"), "").unwrap();
        fs::create_dir_all(list.join("ublkc4")).unwrap();
        udev.sweep(&list);
        let there = |name: &str| udev.told.join(name).exists();
        assert_eq!(
            ["ublkb3", "ublkb4", "ublkb5.new", "else"].map(there),
            [false, true, false, true]
        );
        fs::remove_dir_all(&list).unwrap();
        udev.sweep(&list);
        assert!(!there("ublkb4"), "the driver is gone");
    }

    #[test]
    fn entry_counts_when_it_is_finished_and_of_this_device() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("b259:0");
        assert_eq!(Entry::read(&file), None);
        fs::write(&file, "I:1\nE:ID_PROCESSING=1\nE:QUARRY_VOLUME=db\n").unwrap();
        let early = Entry::read(&file).unwrap();
        assert!(early.has_rule && !early.is_of(None));
        fs::write(&file, "I:1\nE:ID_PROCESSING_X=1\n").unwrap();
        let done = Entry::read(&file).unwrap();
        assert!(!done.has_rule && done.is_of(None) && done.is_of(Some(done.written)));
        assert!(!done.is_of(Some(done.written + Duration::from_millis(1))));
    }

    #[test]
    fn wait_is_over_at_once_without_udev_and_bounded_with_one_that_sleeps() {
        let dir = tempfile::tempdir().unwrap();
        let udev = udev(dir.path());
        udev.tell(3, &spec(1)).unwrap();
        let node = Path::new("/dev/null");
        let time = || {
            let start = Instant::now();
            udev.wait(3, node, &spec(1), true);
            start.elapsed()
        };
        assert!(time() < udev.wait_max);
        fs::write(udev.state.join("control"), "").unwrap();
        assert!(time() >= udev.wait_max);
        fs::write(udev.state.join("data/b1:3"), "I:1\n").unwrap();
        assert!(time() < udev.wait_max);
    }
}
