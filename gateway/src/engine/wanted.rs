//! What is to be attached here: the list that survives the daemon, so that the next one goes on.
//!
//! Invariants:
//! - The list on disk is the list in memory; a change that cannot be written is not made.
//! - A volume leaves it only when it was detached for good.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::access::Access;
use crate::control::{AttachOptions, ImageRef, Via};

/// Version of the file.
const VERSION: u32 = 1;

/// How a volume is to be attached.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct How {
    /// By what.
    pub via: Via,
    /// Whether it takes no writes.
    pub read_only: bool,
    /// Of one that takes no writes: whether somebody else may be writing to it.
    #[serde(default)]
    pub force: bool,
    /// Queues of its block device, if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Whose its device is and who may use it.
    #[serde(default, skip_serializing_if = "Access::is_default")]
    pub access: Access,
    /// Whether misses are to go around the daemon's memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direct_reads: bool,
    /// With which cache device, if it takes writes: a daemon with another one cannot tell what has become of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<String>,
}

impl How {
    /// To attach it as it was before the daemon's start.
    pub(super) fn again(&self) -> AttachOptions {
        AttachOptions {
            via: Some(self.via),
            read_only: self.read_only,
            force: self.force,
            queues: self.queues,
            direct_reads: self.direct_reads,
            again: true,
            stays: true,
            ..AttachOptions::default()
        }
    }
}

/// A volume or snapshot of the list, and why it is not attached, if it is not.
#[derive(Clone, Debug)]
struct Entry {
    how: How,
    problem: Option<String>,
}

/// The list.
#[derive(Debug)]
pub struct Wanted {
    path: PathBuf,
    entries: Mutex<BTreeMap<ImageRef, Entry>>,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    version: u32,
    attached: BTreeMap<String, How>,
}

impl Wanted {
    /// The list kept in `data_dir`; empty if there is none yet.
    ///
    /// # Errors
    /// If it is there and cannot be read, with what to do.
    pub fn load(data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join("attached.json");
        let entries = match fs::read(&path) {
            Ok(bytes) => parse(&bytes).map_err(|error| {
                anyhow::anyhow!(
                    "{} cannot be read ({error}): mend it, or remove it and attach the volumes by hand",
                    path.display()
                )
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            path,
            entries: Mutex::new(entries),
        })
    }

    /// All of it.
    pub fn all(&self) -> Vec<(ImageRef, How)> {
        let entries = self.entries.lock();
        entries
            .iter()
            .map(|(v, e)| (v.clone(), e.how.clone()))
            .collect()
    }

    /// Whether a volume is in it.
    pub fn contains(&self, volume: &ImageRef) -> bool {
        self.entries.lock().contains_key(volume)
    }

    /// How a volume of the list is to be attached.
    pub fn how(&self, volume: &ImageRef) -> Option<How> {
        Some(self.entries.lock().get(volume)?.how.clone())
    }

    /// Puts a volume in, and answers how it was to be attached before, if it was. Nothing is written if that
    /// is the same: a start needs no room.
    ///
    /// # Errors
    /// If that cannot be written.
    pub fn add(&self, volume: &ImageRef, how: How) -> io::Result<Option<How>> {
        let before = self.entries.lock().get(volume).map(|e| e.how.clone());
        if before.as_ref() != Some(&how) {
            self.change(|entries| {
                let problem = entries.remove(volume).and_then(|e| e.problem);
                entries.insert(volume.clone(), Entry { how, problem });
            })?;
        }
        Ok(before)
    }

    /// Makes it again what it was before [`Self::add`].
    ///
    /// # Errors
    /// If that cannot be written.
    pub fn restore(&self, volume: &ImageRef, before: Option<How>) -> io::Result<()> {
        match before {
            Some(how) => self.add(volume, how).map(|_| ()),
            None => self.remove(volume),
        }
    }

    /// Takes a volume out.
    ///
    /// # Errors
    /// If that cannot be written.
    pub fn remove(&self, volume: &ImageRef) -> io::Result<()> {
        self.change(|entries| {
            entries.remove(volume);
        })
    }

    /// Notes why a volume is not attached, or that it is.
    pub fn note(&self, volume: &ImageRef, problem: Option<String>) {
        if let Some(entry) = self.entries.lock().get_mut(volume) {
            entry.problem = problem;
        }
    }

    /// Why a volume of the list is not attached.
    pub fn problem(&self, volume: &ImageRef) -> Option<String> {
        self.entries.lock().get(volume)?.problem.clone()
    }

    /// How many are not attached, for a reason that was noted.
    pub fn failing(&self) -> usize {
        let entries = self.entries.lock();
        entries.values().filter(|e| e.problem.is_some()).count()
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<ImageRef, Entry>)) -> io::Result<()> {
        let mut entries = self.entries.lock();
        let mut changed = entries.clone();
        change(&mut changed);
        write(&self.path, &changed)?;
        *entries = changed;
        Ok(())
    }
}

fn parse(bytes: &[u8]) -> anyhow::Result<BTreeMap<ImageRef, Entry>> {
    let on_disk: OnDisk = serde_json::from_slice(bytes)?;
    anyhow::ensure!(
        on_disk.version == VERSION,
        "its version is {}, and this program knows {VERSION}",
        on_disk.version
    );
    let entry = |(name, how): (String, How)| {
        let volume: ImageRef = name.parse()?;
        Ok((volume, Entry { how, problem: None }))
    };
    on_disk.attached.into_iter().map(entry).collect()
}

/// Replaces the file in one step: written, synced, renamed, and the folder synced.
fn write(path: &Path, entries: &BTreeMap<ImageRef, Entry>) -> io::Result<()> {
    let on_disk = OnDisk {
        version: VERSION,
        attached: entries
            .iter()
            .map(|(volume, entry)| (volume.to_string(), entry.how.clone()))
            .collect(),
    };
    let new = path.with_extension("new");
    let file = File::create(&new)?;
    serde_json::to_writer(&file, &on_disk)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOW: How = How {
        via: Via::Nbd,
        read_only: true,
        force: true,
        queues: None,
        access: Access {
            owner: None,
            mode: None,
        },
        direct_reads: false,
        cache: None,
    };

    const ACCESS: &str = r#"{"owner":{"name":"alice:disk","uid":1000,"gid":6},"mode":"0640"}"#;

    #[test]
    fn list_written_is_read_by_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        assert!(list.all().is_empty());
        let (one, two): (ImageRef, ImageRef) =
            ("acme/one".parse().unwrap(), "acme/one@two".parse().unwrap());
        list.add(&one, HOW).unwrap();
        let how = How {
            access: serde_json::from_str(ACCESS).unwrap(),
            queues: Some(2),
            direct_reads: true,
            cache: Some("5f0e".to_owned()),
            ..HOW
        };
        list.add(&two, how.clone()).unwrap();
        list.note(&two, Some("the store is away".to_owned()));
        list.remove(&one).unwrap();
        assert_eq!(list.failing(), 1);
        let next = Wanted::load(dir.path()).unwrap();
        assert_eq!(next.all(), [(two.clone(), how)]);
        assert_eq!(next.problem(&two), None);
    }

    #[test]
    fn list_without_owners_is_read_and_written_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attached.json");
        let old =
            r#"{"version":1,"attached":{"acme/one":{"via":"nbd","read_only":true,"force":true}}}"#;
        fs::write(&path, old).unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        let one: ImageRef = "acme/one".parse().unwrap();
        assert_eq!(list.all(), [(one.clone(), HOW)]);
        list.add(&one, HOW).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), old);
    }

    #[test]
    fn list_damaged_is_named_and_not_taken_for_empty() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in ["", "{}", r#"{"version":9,"attached":{}}"#] {
            fs::write(dir.path().join("attached.json"), bytes).unwrap();
            let error = Wanted::load(dir.path()).unwrap_err().to_string();
            assert!(error.contains("attached.json"), "{error}");
        }
    }

    #[test]
    fn change_that_cannot_be_written_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        let (one, two): (ImageRef, ImageRef) =
            ("acme/one".parse().unwrap(), "acme/two".parse().unwrap());
        assert_eq!(list.add(&one, HOW).unwrap(), None);
        dir.close().unwrap();
        assert!(list.add(&two, HOW).is_err());
        assert!(!list.contains(&two));
        assert_eq!(list.add(&one, HOW).unwrap(), Some(HOW));
    }

    #[test]
    fn volume_restored_is_as_it_was_or_gone() {
        let dir = tempfile::tempdir().unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        let one: ImageRef = "acme/one".parse().unwrap();
        let other = How {
            queues: Some(2),
            ..HOW
        };
        list.add(&one, HOW).unwrap();
        list.note(&one, Some("the store is away".to_owned()));
        let before = list.add(&one, other).unwrap();
        list.restore(&one, before).unwrap();
        assert_eq!(list.all(), [(one.clone(), HOW)]);
        assert_eq!(list.failing(), 1);
        list.restore(&one, None).unwrap();
        assert!(Wanted::load(dir.path()).unwrap().all().is_empty());
    }
}
