//! What is to be attached here: the list that survives the daemon, so that the next one goes on.
//!
//! Invariants:
//! - The list on disk is the list in memory; a change that cannot be written is not made. One that is begun is made or
//!   not in both, whether or not its caller waits for that.
//! - Only who changes the list waits for the disk, and on no thread of the runtime.
//! - A volume leaves it only when it was detached for good.
//! - What is attached is on it, and what is being attached: so what it does not take is not in memory either.
//! - It names the store that its volumes are in, once that is known: an empty list that of the daemon; one of before, which
//!   names none, once one of its volumes was attached again. What it says of that is on disk with its next change at the latest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use parking_lot::Mutex;
use quarry_objfmt::TenantName;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;

use super::access::Access;
use super::data_dir;
use crate::control::{AttachOptions, ImageRef, Via};

/// Version of the file.
const VERSION: u32 = 1;

/// Snapshots and past states of a tenant that are attached here or are to be. Each has a log of its own in memory, of up
/// to 262,144 entries of 200 bytes: 64 × 50 MB = 3.2 GB. Nothing else bounds them: a volume has a past state for each
/// millisecond.
pub(super) const TENANT_PAST_MAX: usize = 64;

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

/// Why something is not put into the list.
#[derive(Debug, thiserror::Error)]
pub enum NotAdded {
    /// The tenant has as many in it as it may.
    #[error(
        "the tenant has {} snapshots and past states in the list",
        TENANT_PAST_MAX
    )]
    Full,
    /// The list cannot be written.
    #[error(transparent)]
    Write(#[from] io::Error),
}

/// Which store the volumes of a list are in.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoreNote {
    /// Where it was, for people.
    pub place: String,
    /// What its marker calls it, if it does: the same wherever it is moved to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl StoreNote {
    /// Whether it is the same store, perhaps moved.
    pub fn is_same(&self, other: &Self) -> bool {
        self.place == other.place || (self.id.is_some() && self.id == other.id)
    }
}

/// The list.
#[derive(Debug)]
pub struct Wanted {
    /// Where it is kept. Held by who changes it, until that is written.
    path: Arc<tokio::sync::Mutex<PathBuf>>,
    /// Never locked for long.
    entries: Arc<Mutex<Entries>>,
    /// Locked after the entries.
    stores: Arc<Mutex<Stores>>,
}

/// The list's store and the daemon's.
#[derive(Debug)]
struct Stores {
    /// What the list says. None in a list of before.
    noted: Option<StoreNote>,
    /// The one that the daemon serves, once it was found fit.
    served: Option<StoreNote>,
}

impl Stores {
    /// What the list is to say: the daemon's store if its volumes are known to be in that, or if it has none.
    fn settle(&mut self, is_empty: bool) -> Option<StoreNote> {
        if let Some(served) = &self.served
            && (is_empty || self.noted.as_ref().is_some_and(|n| n.is_same(served)))
        {
            self.noted = Some(served.clone());
        }
        self.noted.clone()
    }
}

type Entries = BTreeMap<ImageRef, Entry>;

/// The right to change the list.
type Turn = OwnedMutexGuard<PathBuf>;

#[derive(Serialize, Deserialize)]
struct OnDisk {
    version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    store: Option<StoreNote>,
    attached: BTreeMap<String, How>,
}

impl Wanted {
    /// The list kept in `data_dir`; empty if there is none yet.
    ///
    /// # Errors
    /// If it is there and cannot be read, with what to do.
    pub fn load(data_dir: &Path) -> anyhow::Result<Self> {
        let path = Self::path_in(data_dir);
        let (noted, entries) = match fs::read(&path) {
            Ok(bytes) => parse(&bytes).map_err(|error| {
                anyhow::anyhow!(
                    "{} cannot be read ({error}): mend it, or remove it and attach the volumes by hand",
                    path.display()
                )
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => (None, BTreeMap::new()),
            Err(error) => return Err(error).context(data_dir::unusable(data_dir)),
        };
        Ok(Self {
            path: Arc::new(tokio::sync::Mutex::new(path)),
            entries: Arc::new(Mutex::new(entries)),
            stores: Arc::new(Mutex::new(Stores {
                noted,
                served: None,
            })),
        })
    }

    /// Where it is kept.
    pub fn path_in(data_dir: &Path) -> PathBuf {
        data_dir.join("attached.json")
    }

    /// The store that its volumes are in, if it says so.
    pub fn store(&self) -> Option<StoreNote> {
        self.stores.lock().noted.clone()
    }

    /// Notes the store that the daemon serves. The list names it from now on, unless it has volumes that may be in another.
    /// Nothing is written if it does already: a start needs no room.
    ///
    /// # Errors
    /// If that cannot be written. The next change of the list writes it too.
    pub async fn note_store(&self, note: StoreNote) -> io::Result<()> {
        let turn = self.turn().await;
        {
            let is_empty = self.entries.lock().is_empty();
            let mut stores = self.stores.lock();
            let before = stores.noted.clone();
            stores.served = Some(note);
            if stores.settle(is_empty) == before {
                return Ok(());
            }
        }
        self.write_again(turn).await
    }

    /// One of its volumes was attached again: they are in the store that the daemon serves.
    ///
    /// # Errors
    /// As [`Self::note_store`].
    pub async fn found_here(&self) -> io::Result<()> {
        let turn = self.turn().await;
        {
            let mut stores = self.stores.lock();
            if stores.served.is_none() || stores.noted == stores.served {
                return Ok(());
            }
            stores.noted = stores.served.clone();
        }
        self.write_again(turn).await
    }

    /// Writes it as it is in memory.
    async fn write_again(&self, turn: Turn) -> io::Result<()> {
        let attached = on_disk(&self.entries.lock());
        let noted = self.store();
        let written = tokio::task::spawn_blocking(move || write(&turn, noted, attached)).await;
        written.unwrap_or_else(|error| Err(io::Error::other(error)))
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
    /// If that cannot be written, or it is of the past, is not in it yet, and its tenant has `TENANT_PAST_MAX` already.
    pub async fn add(&self, volume: &ImageRef, how: How) -> Result<Option<How>, NotAdded> {
        let turn = self.turn().await;
        let before = self.how(volume);
        if before.as_ref() == Some(&how) {
            return Ok(before);
        }
        let is_more = before.is_none() && volume.is_past();
        if is_more && self.past_of(&volume.volume.tenant) >= TENANT_PAST_MAX {
            return Err(NotAdded::Full);
        }
        self.set(turn, volume, Some(how)).await?;
        Ok(before)
    }

    /// Makes it again what it was before [`Self::add`].
    ///
    /// # Errors
    /// If that cannot be written.
    pub async fn restore(&self, volume: &ImageRef, before: Option<How>) -> Result<(), NotAdded> {
        match before {
            Some(how) => self.add(volume, how).await.map(|_| ()),
            None => Ok(self.remove(volume).await?),
        }
    }

    /// Takes a volume out.
    ///
    /// # Errors
    /// If that cannot be written.
    pub async fn remove(&self, volume: &ImageRef) -> io::Result<()> {
        let turn = self.turn().await;
        self.set(turn, volume, None).await
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

    /// How many snapshots and past states of a tenant are in it.
    fn past_of(&self, tenant: &TenantName) -> usize {
        let entries = self.entries.lock();
        let images = entries.keys();
        let past = images.filter(|image| image.is_past() && image.volume.tenant == *tenant);
        past.count()
    }

    async fn turn(&self) -> Turn {
        Arc::clone(&self.path).lock_owned().await
    }

    /// Puts a volume in, or takes it out: on disk, then in memory. *Crash in between: the next daemon has what is on disk.*
    /// Its caller may be gone by then: the turn is the change's, so that the next one goes by what became of this.
    async fn set(&self, turn: Turn, volume: &ImageRef, how: Option<How>) -> io::Result<()> {
        let (entries, stores) = (Arc::clone(&self.entries), Arc::clone(&self.stores));
        let volume = volume.clone();
        let change = move || -> io::Result<()> {
            let mut attached = on_disk(&entries.lock());
            let note = stores.lock().settle(attached.is_empty());
            match how.clone() {
                Some(how) => attached.insert(volume.to_string(), how),
                None => attached.remove(&volume.to_string()),
            };
            write(&turn, note, attached)?;
            // What was noted meanwhile stays.
            let mut entries = entries.lock();
            let was = entries.remove(&volume);
            if let Some(how) = how {
                let problem = was.and_then(|e| e.problem);
                entries.insert(volume, Entry { how, problem });
            }
            Ok(())
        };
        let changed = tokio::task::spawn_blocking(change).await;
        changed.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

type Parsed = (Option<StoreNote>, Entries);

fn parse(bytes: &[u8]) -> anyhow::Result<Parsed> {
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
    let entries = on_disk.attached.into_iter().map(entry);
    Ok((on_disk.store, entries.collect::<anyhow::Result<_>>()?))
}

/// What of them is kept.
fn on_disk(entries: &Entries) -> BTreeMap<String, How> {
    let kept = |(volume, entry): (&ImageRef, &Entry)| (volume.to_string(), entry.how.clone());
    entries.iter().map(kept).collect()
}

/// Replaces the file in one step: written, synced, renamed, and the folder synced. Blocking.
fn write(path: &Path, store: Option<StoreNote>, attached: BTreeMap<String, How>) -> io::Result<()> {
    let bytes = serde_json::to_vec(&OnDisk {
        version: VERSION,
        store,
        attached,
    })?;
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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

    #[tokio::test]
    async fn list_written_is_read_by_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        assert!(list.all().is_empty());
        let (one, two): (ImageRef, ImageRef) =
            ("acme/one".parse().unwrap(), "acme/one@two".parse().unwrap());
        list.add(&one, HOW).await.unwrap();
        let how = How {
            access: serde_json::from_str(ACCESS).unwrap(),
            queues: Some(2),
            direct_reads: true,
            cache: Some("5f0e".to_owned()),
            ..HOW
        };
        list.add(&two, how.clone()).await.unwrap();
        list.note(&two, Some("the store is away".to_owned()));
        list.remove(&one).await.unwrap();
        assert_eq!(list.failing(), 1);
        let next = Wanted::load(dir.path()).unwrap();
        assert_eq!(next.all(), [(two.clone(), how)]);
        assert_eq!(next.problem(&two), None);
    }

    #[tokio::test]
    async fn list_without_owners_is_read_and_written_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attached.json");
        let old =
            r#"{"version":1,"attached":{"acme/one":{"via":"nbd","read_only":true,"force":true}}}"#;
        fs::write(&path, old).unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        let one: ImageRef = "acme/one".parse().unwrap();
        assert_eq!(list.all(), [(one.clone(), HOW)]);
        list.add(&one, HOW).await.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), old);
    }

    #[tokio::test]
    async fn list_names_its_store_to_the_next_daemon_whatever_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        assert_eq!(list.store(), None);
        let note = StoreNote {
            place: "s3://bucket/p".to_owned(),
            id: Some("5f0e".to_owned()),
        };
        list.note_store(note.clone()).await.unwrap();
        let one: ImageRef = "acme/one".parse().unwrap();
        list.add(&one, HOW).await.unwrap();
        list.remove(&one).await.unwrap();
        let next = Wanted::load(dir.path()).unwrap();
        assert_eq!(next.store(), Some(note.clone()));
        assert!(next.all().is_empty());
        dir.close().unwrap();
        list.note_store(note.clone()).await.unwrap();
        let other = StoreNote { id: None, ..note };
        assert!(list.note_store(other).await.is_err());
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

    #[tokio::test]
    async fn change_that_cannot_be_written_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        let (one, two): (ImageRef, ImageRef) =
            ("acme/one".parse().unwrap(), "acme/two".parse().unwrap());
        assert_eq!(list.add(&one, HOW).await.unwrap(), None);
        dir.close().unwrap();
        assert!(list.add(&two, HOW).await.is_err());
        assert!(!list.contains(&two));
        assert_eq!(list.add(&one, HOW).await.unwrap(), Some(HOW));
    }

    #[tokio::test]
    async fn volume_restored_is_as_it_was_or_gone() {
        let dir = tempfile::tempdir().unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        let one: ImageRef = "acme/one".parse().unwrap();
        let other = How {
            queues: Some(2),
            ..HOW
        };
        list.add(&one, HOW).await.unwrap();
        list.note(&one, Some("the store is away".to_owned()));
        let before = list.add(&one, other).await.unwrap();
        list.restore(&one, before).await.unwrap();
        assert_eq!(list.all(), [(one.clone(), HOW)]);
        assert_eq!(list.failing(), 1);
        list.restore(&one, None).await.unwrap();
        assert!(Wanted::load(dir.path()).unwrap().all().is_empty());
    }

    #[tokio::test]
    async fn past_of_a_tenant_is_bounded_and_what_is_in_the_list_stays() {
        let dir = tempfile::tempdir().unwrap();
        // An older daemon's list may be longer.
        let name = |number: usize| match number % 2 {
            0 => format!("acme/db@s{number}"),
            _ => format!("acme/db@2026-11-28T10:00:00.{number:03}Z"),
        };
        let attached = (0..=TENANT_PAST_MAX).map(|number| (name(number), HOW));
        let on_disk = OnDisk {
            version: VERSION,
            store: None,
            attached: attached.collect(),
        };
        let bytes = serde_json::to_vec(&on_disk).unwrap();
        fs::write(dir.path().join("attached.json"), bytes).unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        let image = |name: &str| -> ImageRef { name.parse().unwrap() };
        let (first, second, more) = (image(&name(0)), image(&name(1)), image("acme/db@more"));
        let other = How {
            queues: Some(2),
            ..HOW
        };
        assert_eq!(list.add(&first, HOW).await.unwrap(), Some(HOW));
        assert_eq!(list.add(&first, other).await.unwrap(), Some(HOW));
        for taken in [&first, &second] {
            assert!(matches!(list.add(&more, HOW).await, Err(NotAdded::Full)));
            assert!(!list.contains(&more));
            list.remove(taken).await.unwrap();
        }
        assert_eq!(list.add(&more, HOW).await.unwrap(), None);
        assert!(matches!(list.add(&first, HOW).await, Err(NotAdded::Full)));
        // Volumes have limits of their own, and so have other tenants.
        list.add(&image("acme/db"), HOW).await.unwrap();
        list.add(&image("globex/db@s"), HOW).await.unwrap();
    }

    /// As on a disk that hangs: what is written to is a pipe, which cannot be synced either.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn change_that_the_disk_holds_up_holds_up_nobody_who_reads() {
        let dir = tempfile::tempdir().unwrap();
        let list = Arc::new(Wanted::load(dir.path()).unwrap());
        let (one, two): (ImageRef, ImageRef) =
            ("acme/one".parse().unwrap(), "acme/two".parse().unwrap());
        list.add(&one, HOW).await.unwrap();
        let pipe = dir.path().join("attached.new");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, mode).unwrap();
        let adding = tokio::spawn({
            let (list, two) = (Arc::clone(&list), two.clone());
            async move { list.add(&two, HOW).await }
        });
        let reading = tokio::spawn({
            let (list, two) = (Arc::clone(&list), two.clone());
            async move {
                list.note(&one, Some("the store is away".to_owned()));
                (list.contains(&one), list.contains(&two))
            }
        });
        let read = tokio::time::timeout(Duration::from_secs(10), reading).await;
        let is_written = adding.is_finished();
        assert!(!fs::read(&pipe).unwrap().is_empty());
        assert_eq!(read.expect("nobody waits").unwrap(), (true, false));
        assert!(!is_written);
        assert!(adding.await.unwrap().is_err());
        assert!(!list.contains(&two));
        fs::remove_file(&pipe).unwrap();
        list.add(&two, HOW).await.unwrap();
        assert_eq!((list.all().len(), list.failing()), (2, 1));
    }

    #[tokio::test]
    async fn change_that_nobody_waits_for_is_made_on_disk_and_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let list = Wanted::load(dir.path()).unwrap();
        let (one, two): (ImageRef, ImageRef) =
            ("acme/one".parse().unwrap(), "acme/two".parse().unwrap());
        tokio::select! {
            biased;
            _ = list.add(&one, HOW) => {}
            () = std::future::ready(()) => {}
        }
        assert_eq!(list.add(&two, HOW).await.unwrap(), None);
        assert_eq!(list.all(), [(one, HOW), (two, HOW)]);
        assert_eq!(Wanted::load(dir.path()).unwrap().all(), list.all());
    }
}
