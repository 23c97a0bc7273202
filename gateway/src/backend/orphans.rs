//! Orphans: chunks and map objects that nothing names, for whoever stored them died, or lost the volume, before a head
//! did: what a compaction or a checkpoint had made so far, and what a fenced writer had under way behind the end of
//! its log, or puts there late.
//!
//! One task for each volume attached for writing, seldom (`reclaim.orphan_interval`): *look*, wait for
//! the horizon, and for as long as what is dead is retained, *look* again, and delete what was an orphan both times.
//! A look lists the volume's objects page by page.
//!
//! **Invariants.** What is deleted
//! - is of an epoch before ours: of our own there may be PUTs under way, later ones are a successor's;
//! - is named neither by the map that the head names, nor by its log, the lists of its usage (what is dead
//!   has its own time to go), or any snapshot. From what these know every later map of the volume is made, by us, by a
//!   successor, or by a rollback to a snapshot: so what none of them names never will be named. If one of the lists
//!   is not known, nothing is deleted;
//! - is no seal: that keeps its writer out for ever, and a rescue follows it;
//! - is of this volume: a clone's objects lie below its own prefix.
//!
//! *Crash, or the volume lost, at any point: what is left is found by the next who looks.*

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use quarry_objfmt::chunk::{CHUNK_PREFIX_LEN, LogObject, classify};
use quarry_objfmt::head::LogRange;
use quarry_objfmt::map::{Manifest, ObjectKind, Usage};
use quarry_objfmt::{ChunkSeq, Epoch, Head, RootRef, VolumeId, keys};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::open::{OpenError, load_map, load_usage};
use super::{HeadError, VolumeBackend};
use crate::store::StoreError;

/// Keys listed at once: a page of S3.
const PAGE_KEYS: usize = 1000;

/// Between two pages, so that nobody notices.
const PAGE_PAUSE: Duration = Duration::from_millis(100);

/// Orphans taken up by one look; those behind them are the next one's.
const ORPHANS_MAX: usize = 10_000;

/// Objects looked into or deleted side by side.
const CALLS_AT_ONCE: usize = 4;

/// An object among its volume's.
type Name = (ObjectKind, Epoch, u64);

/// The state of a volume's sweeping.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    task: parking_lot::Mutex<Option<JoinHandle<()>>>,
    deleted: AtomicU64,
}

/// Why there is no looking, or no deleting, this time.
#[derive(Debug, thiserror::Error)]
enum NotNow {
    /// Not all that names objects is known.
    #[error("{0} is not counted yet")]
    Uncounted(String),
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is named.
#[derive(Default)]
struct Named {
    objects: HashSet<Name>,
    log: Vec<LogRange>,
}

impl Named {
    fn has(&self, object: &Name) -> bool {
        let (kind, epoch, number) = *object;
        let in_log = |range: &LogRange| {
            let end = range.end.map_or(ChunkSeq::COMPACTED.get(), ChunkSeq::get);
            range.epoch == epoch && (range.first.get()..end).contains(&number)
        };
        self.objects.contains(object) || kind == ObjectKind::Chunk && self.log.iter().any(in_log)
    }

    /// A map, and what its usage lists.
    fn add_map(&mut self, volume: VolumeId, root: Option<RootRef>, manifest: &Manifest) {
        let own = manifest.runs.iter().flatten().map(|table| table.object);
        let own = own.filter(|object| object.volume == volume);
        let own = own.map(|object| (ObjectKind::Map, object.epoch, object.seq.get()));
        self.objects.extend(own);
        let root = root.map(|root| (ObjectKind::Map, root.epoch, root.seq.get()));
        self.objects.extend(root);
    }

    fn add_usage(&mut self, usage: &Usage) {
        let chunks = usage.chunks.iter();
        let chunks = chunks.map(|chunk| (ObjectKind::Chunk, chunk.epoch, chunk.seq.get()));
        self.objects.extend(chunks);
        let dead = usage.dead.iter();
        let dead = dead.map(|dead| (dead.kind, dead.epoch, dead.number));
        self.objects.extend(dead);
    }
}

impl VolumeBackend {
    /// Begins to look for orphans: for a volume attached for writing.
    pub fn start_sweeping_orphans(self: &Arc<Self>) {
        let this = Arc::clone(self);
        let task = async move { this.sweep_orphans_now_and_then().await };
        *self.orphans.task.lock() = Some(self.common.runtime.spawn(task));
    }

    /// Ends it. A deletion may be under way still, of what nobody ever needs.
    pub async fn stop_sweeping_orphans(&self) {
        let task = self.orphans.task.lock().take();
        if let Some(task) = task {
            task.abort();
            let _ = task.await;
        }
    }

    /// Orphans deleted since the attach.
    pub fn orphans_deleted(&self) -> u64 {
        self.orphans.deleted.load(Ordering::Relaxed)
    }

    async fn sweep_orphans_now_and_then(&self) {
        let interval = self.common.orphan_interval;
        // At another time for each volume and attachment, which a volume that is attached shortly meets now and then.
        tokio::time::sleep(share(interval, self.volume, self.head.epoch())).await;
        while !self.condition().fenced {
            match self.sweep_orphans().await {
                Ok(0) => {}
                Ok(orphans) => {
                    tracing::info!(
                        volume = self.name,
                        orphans,
                        "objects that nothing names are deleted"
                    );
                }
                Err(why) => {
                    tracing::warn!(volume = self.name, %why, "objects that nothing names are left where they are");
                }
            }
            tokio::time::sleep(interval).await;
        }
    }

    /// Answers how many were deleted.
    async fn sweep_orphans(&self) -> Result<u64, NotNow> {
        let seen = self.find_orphans().await?;
        if seen.is_empty() {
            return Ok(0);
        }
        self.wait_for_the_horizon().await;
        let orphans: Vec<String> = self
            .find_orphans()
            .await?
            .intersection(&seen)
            .cloned()
            .collect();
        self.head.still_ours(&*self.common.background).await?;
        let before = self.orphans_deleted();
        let deletes = futures::stream::iter(orphans)
            .map(|key| async move { self.common.background.delete(&key).await })
            .buffer_unordered(CALLS_AT_ONCE);
        let count = |()| async {
            self.orphans.deleted.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        deletes.try_for_each(count).await?;
        Ok(self.orphans_deleted() - before)
    }

    /// Waits for the horizon, and for as long as dead objects are retained, as the head says meanwhile.
    async fn wait_for_the_horizon(&self) {
        let begun = Instant::now();
        loop {
            let retained = Duration::from_millis(self.head.get().retain_ms);
            let whole = self.common.reclaim.horizon.max(retained);
            let rest = whole.saturating_sub(begun.elapsed());
            if rest.is_zero() {
                return;
            }
            tokio::time::sleep(rest.min(self.common.orphan_interval)).await;
        }
    }

    /// The keys of what is an orphan now.
    async fn find_orphans(&self) -> Result<BTreeSet<String>, NotNow> {
        let (head, mut named) = self.named().await?;
        let mut unnamed = self.unnamed(&named).await?;
        if unnamed.is_empty() {
            return Ok(BTreeSet::new());
        }
        // Mostly in the lists too; but the lists may have been lost.
        let (store, tenant) = (&*self.common.background, self.head.tenant());
        for snapshot in &head.snapshots {
            let map = load_map(store, tenant, self.volume, snapshot.root).await?;
            named.add_map(self.volume, snapshot.root, map.manifest());
            let usage = load_usage(store, tenant, self.volume, snapshot.root).await?;
            let uncounted = || NotNow::Uncounted(format!("snapshot {}", snapshot.name));
            named.add_usage(&usage.ok_or_else(uncounted)?);
        }
        unnamed.retain(|(name, _)| !named.has(name));
        let looks = futures::stream::iter(unnamed)
            .map(|(name, key)| async move {
                let orphan = self.is_no_seal(&name, &key).await?;
                Ok::<_, NotNow>(orphan.then_some(key))
            })
            .buffered(CALLS_AT_ONCE);
        looks
            .try_filter_map(|key| async { Ok(key) })
            .try_collect()
            .await
    }

    /// What the volume names but for its snapshots, as of one moment.
    async fn named(&self) -> Result<(Head, Named), NotNow> {
        // With the right to change the map: neither it nor the log moves on in between.
        let objects = self.objects.lock().await;
        let head = self.head.get();
        let usage = objects.usage(quarry_objfmt::map::Basis::of(&head));
        let usage = usage.ok_or_else(|| NotNow::Uncounted("its map".to_owned()))?;
        let mut named = Named {
            log: head.log.clone(),
            ..Named::default()
        };
        named.add_usage(&usage);
        if head.root != *self.root_ref.lock() {
            return Err(NotNow::Uncounted("the map that the head names".to_owned()));
        }
        let root = self.root.lock().clone();
        named.add_map(self.volume, head.root, root.manifest());
        Ok((head, named))
    }

    /// Chunks and map objects of earlier epochs that are not in `named`.
    async fn unnamed(&self, named: &Named) -> Result<Vec<(Name, String)>, NotNow> {
        let volume = keys::volume_prefix(self.head.tenant(), self.volume);
        let mut unnamed = Vec::new();
        for (part, kind) in [("chunk", ObjectKind::Chunk), ("map", ObjectKind::Map)] {
            let prefix = format!("{volume}{part}/");
            let mut after = prefix.clone();
            'pages: loop {
                let store = &self.common.background;
                let page = store.list_after(&prefix, &after, PAGE_KEYS).await?;
                let Some(last) = page.last() else { break };
                after.clone_from(last);
                for key in page {
                    let Some((epoch, number)) = parse(&key[prefix.len()..]) else {
                        continue;
                    };
                    // In order: from here on there is nothing before ours.
                    if epoch >= self.head.epoch() || unnamed.len() >= ORPHANS_MAX {
                        break 'pages;
                    }
                    let name = (kind, epoch, number);
                    if !named.has(&name) {
                        unnamed.push((name, key));
                    }
                }
                tokio::time::sleep(PAGE_PAUSE).await;
            }
        }
        Ok(unnamed)
    }

    /// What cannot be told from a seal stays.
    async fn is_no_seal(&self, name: &Name, key: &str) -> Result<bool, NotNow> {
        let (kind, _, number) = *name;
        if kind == ObjectKind::Map || number >= ChunkSeq::COMPACTED.get() {
            return Ok(true);
        }
        let store = &self.common.background;
        match store.get_prefix(key, CHUNK_PREFIX_LEN as u64).await {
            Ok(bytes) => Ok(matches!(classify(&bytes), Ok(LogObject::Chunk))),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Epoch and number of the rest of a key, if it is just that.
fn parse(rest: &str) -> Option<(Epoch, u64)> {
    let (epoch, number) = rest.split_once('/')?;
    let plain = |text: &str, len| {
        text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    if !plain(epoch, 8) || !plain(number, 16) {
        return None;
    }
    let epoch = u32::from_str_radix(epoch, 16).ok()?;
    Some((Epoch::new(epoch), u64::from_str_radix(number, 16).ok()?))
}

/// A part of the interval, as [`chance`] has it.
fn share(interval: Duration, volume: VolumeId, epoch: Epoch) -> Duration {
    interval / CHANCES * chance(volume, epoch)
}

/// Of how many.
pub(super) const CHANCES: u32 = 0x1_0000;

/// A number below [`CHANCES`], by chance, but the same for the same attachment: nothing here draws numbers.
pub(super) fn chance(volume: VolumeId, epoch: Epoch) -> u32 {
    let bytes = volume
        .to_bytes()
        .into_iter()
        .chain(epoch.get().to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    u32::try_from((hash >> 32) & 0xffff).expect("16 bits")
}
