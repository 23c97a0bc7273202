//! Reclaiming: what the map does not need any more is found, moved out of the way, and deleted.
//!
//! One task for each volume attached for writing, all of it in the background's lane:
//! 1. *Count.* A scan of the whole map says how much of each chunk it needs. It goes by the map that the head
//!    names, never by what is only in memory; chunks that it does not need are dead.
//! 2. *Compact* ([`super::compact`]), while there is too much in chunks that nobody needs; and what an earlier data key
//!    encrypts ([`super::renew`]).
//! 3. *Sweep.* Dead objects are deleted once no reader can have a map that needs them (the horizon), unless a
//!    snapshot does. *Crash before the next checkpoint: they are found and deleted again, which is no error.*
//!
//! A writer that was fenced and wakes up late deletes nothing that its successor needs: what was dead in its
//! map is dead in every later one, and a snapshot in its head is a snapshot in every later head until
//! somebody deletes that. Nor does it delete what its successor was told to retain: before a sweep that has something to
//! delete it looks whose the head is.
//!
//! Owns: the task, and when what is done. Does not own: the lists ([`super::objects`]).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use quarry_cache::Mutation;
use quarry_objfmt::map::{ChunkUse, DeadObject, ObjectKind};
use quarry_objfmt::{ChunkId, ChunkSeq, Head, MapSeq, SECTOR_SIZE, SnapshotRef, keys};
use quarry_volume::map::MapRoot;
use quarry_volume::{Event, Report};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::VolumeBackend;
use super::checkpoint::{self, Stopped};
use super::chores::{Chores, Order};
use super::compact::{self, Victims, WINDOW_BYTES_MIN};
use super::head::HeadError;
use super::objects::{CLOCK_MARGIN, ChunkName, Need, Needed, Objects, Space, is_held};
use super::orphans::{CHANCES, chance};
use super::renew::Renewed;
use super::scan::Scan;
use crate::store::{Operation, StoreError};

/// The map is read for counting and gathering at most so many bytes for each byte that was uploaded since:
/// one in this many.
const READ_SHARE: u64 = 4;

/// A count that found little to do makes the next one wait for twice as many uploads, up to this factor.
const PATIENCE_MAX: u64 = 16;

/// Compaction begins when so much of a hundredth of what is needed lies about that is not, in chunks that
/// are.
const DEBT_START_PERCENT: u64 = 31;

/// And ends when it is down to this.
const DEBT_STOP_PERCENT: u64 = 30;

/// From this on compaction takes all the time there is.
const DEBT_URGENT_PERCENT: u64 = 40;

/// A compaction takes as many victims apart as give it so much to move, if it must: it reads the whole map
/// once.
pub(super) const MOVED_BYTES_MIN: u64 = 64 << 20;

/// And so many times as much as the map that it reads.
pub(super) const MOVED_BYTES_FOR_EACH_READ: u64 = 3;

/// A chunk of which more than this is needed is not taken apart.
const VICTIM_NEEDED_PERCENT_MAX: u64 = 90;

/// Objects deleted side by side.
const DELETES_AT_ONCE: usize = 8;

/// Longest wait for a deletion, and for the look at the head before. A store refuses requests of a host whose clock is wrong, and so is then what seems to be due: once
/// the store answers again, that is found out anew.
const DELETE_TIME_MAX: Duration = Duration::from_secs(60);

/// Between two tries to delete what the store refuses to delete, and two looks whether snapshots still need
/// what only they do.
const LOOK_AGAIN_DELAY: Duration = Duration::from_secs(60);

/// When what is not needed is deleted.
#[derive(Clone, Copy, Debug)]
pub struct ReclaimSettings {
    /// How long an object is kept that the map does not need any more: longer than any reader goes by an
    /// older map.
    pub horizon: Duration,
    /// So many bytes at least must be to gain for compaction to begin.
    pub debt_min: u64,
    /// Sectors of data in a chunk that compaction makes.
    pub chunk_sectors: u32,
    /// Memory for what compaction reads ahead, in bytes.
    pub window_bytes: u64,
    /// Hundredths of the time that compaction takes, unless it is urgent.
    pub percent: u32,
}

/// The state of a volume's reclaiming.
#[derive(Debug)]
pub(super) struct Reclaim {
    wake: Notify,
    stopping: AtomicBool,
    task: parking_lot::Mutex<Option<JoinHandle<()>>>,
    space: parking_lot::Mutex<Space>,
    /// Bytes of the map that may be read.
    credit: AtomicU64,
    patience: AtomicU64,
    pub(super) chores: Chores,
    /// Chunks that could not be read; compaction leaves them.
    unsound: parking_lot::Mutex<BTreeSet<ChunkName>>,
    moved_bytes: AtomicU64,
    deleted_bytes: AtomicU64,
    deleted_objects: AtomicU64,
}

/// Bytes of the map that are read where there is something to do: once for the count, once for what a compaction gathers.
fn cost(root: &MapRoot) -> u64 {
    2 * root.stored_bytes()
}

/// The credit that an attachment begins with. How much was written since the last count nothing durable says, so it is a
/// part of what a count costs, by chance: attachments that are each too short for a count have one as often, in the long
/// run, as one that lasts as long as all of them. It is never enough for a count where nothing is written. Of a volume
/// that is younger than a day there is no more to be found than a day's writes.
pub(super) fn first_credit(head: &Head, root: &MapRoot, now_ms: u64) -> u64 {
    if Duration::from_millis(now_ms.saturating_sub(head.created_ms)) < CLOCK_MARGIN {
        return 0;
    }
    cost(root).saturating_mul(chance(head.volume, head.epoch).into()) / u64::from(CHANCES)
}

/// What reclaiming has done since the attach.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Reclaimed {
    /// Bytes of chunks that compaction has uploaded.
    pub moved_bytes: u64,
    /// Bytes of the objects that were deleted.
    pub deleted_bytes: u64,
    /// How many these were.
    pub deleted_objects: u64,
}

impl Reclaim {
    /// `credit` is [`first_credit`].
    pub(super) fn new(space: Space, credit: u64) -> Self {
        Self {
            wake: Notify::new(),
            stopping: AtomicBool::new(false),
            task: parking_lot::Mutex::new(None),
            space: parking_lot::Mutex::new(space),
            credit: AtomicU64::new(credit),
            patience: AtomicU64::new(1),
            chores: Chores::default(),
            unsound: parking_lot::Mutex::new(BTreeSet::new()),
            moved_bytes: AtomicU64::new(0),
            deleted_bytes: AtomicU64::new(0),
            deleted_objects: AtomicU64::new(0),
        }
    }

    /// There is something to do, or what is dead may be deleted earlier.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Chunks of so many bytes went from the log into the map.
    pub(super) fn folded(&self, bytes: u64) {
        self.credit.fetch_add(bytes / READ_SHARE, Ordering::Relaxed);
        self.wake.notify_one();
    }

    pub(super) fn moved(&self, bytes: u64) {
        self.moved_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn cannot_read(&self, chunk: ChunkName) {
        self.unsound.lock().insert(chunk);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

impl VolumeBackend {
    /// Begins to reclaim: for a volume attached for writing.
    pub fn start_reclaiming(self: &Arc<Self>) {
        let this = Arc::clone(self);
        let task = self.common.runtime.spawn(async move {
            this.reclaim().await;
            this.reclaim.chores.close();
        });
        *self.reclaim.task.lock() = Some(task);
    }

    /// Ends it; when this has returned, nothing is moved or deleted any more.
    pub async fn stop_reclaiming(&self) {
        self.reclaim.stopping.store(true, Ordering::Relaxed);
        self.reclaim.wake.notify_one();
        let task = self.reclaim.task.lock().take();
        if let Some(task) = task {
            // It does not panic, and is aborted by nobody.
            let _ = task.await;
        }
    }

    /// What the volume takes in the store, as of the last change of its map.
    pub fn space(&self) -> Space {
        *self.reclaim.space.lock()
    }

    /// What reclaiming has done since the attach.
    pub fn reclaimed(&self) -> Reclaimed {
        Reclaimed {
            moved_bytes: self.reclaim.moved_bytes.load(Ordering::Relaxed),
            deleted_bytes: self.reclaim.deleted_bytes.load(Ordering::Relaxed),
            deleted_objects: self.reclaim.deleted_objects.load(Ordering::Relaxed),
        }
    }

    /// The lists have changed.
    pub(super) fn note_space(&self, objects: &Objects) {
        *self.reclaim.space.lock() = objects.space(&self.head.get().snapshots);
    }

    async fn reclaim(&self) {
        while !self.reclaim.is_stopping() {
            if let Some(asked) = self.reclaim.chores.take() {
                self.carry_out_chore(asked).await;
            }
            let tidied = match self.tidy().await {
                Ok(()) => self.renew().await,
                Err(stopped) => Err(stopped),
            };
            let renewed = match tidied {
                Ok(renewed) => renewed,
                Err(Stopped::Fenced { by }) => {
                    self.tell(Event::Fenced { by }).await;
                    return;
                }
                Err(Stopped::Damaged(error)) => {
                    self.report(Report::Damaged {
                        object: error.object,
                        reason: format!("{}; space is not reclaimed", error.reason),
                    });
                    Renewed::All
                }
                Err(Stopped::Refused(error)) => {
                    let reason = error.reason;
                    self.problem(format!(
                        "{}: {reason}; space is not reclaimed",
                        checkpoint::REFUSED
                    ));
                    Renewed::All
                }
            };
            let (next, deleted) = match self.sweep().await {
                Ok(swept) => swept,
                Err(by) => {
                    self.tell(Event::Fenced { by }).await;
                    return;
                }
            };
            let next = match renewed {
                Renewed::All => next,
                // There is more to move, or what was deleted was the last that a key encrypts.
                Renewed::GoesOn => continue,
                Renewed::Waits if deleted > 0 => continue,
                Renewed::Waits => {
                    let later = Instant::now() + LOOK_AGAIN_DELAY;
                    Some(next.map_or(later, |next| next.min(later)))
                }
            };
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.reclaim.wake.notified() => {}
                () = due => {}
            }
        }
    }

    /// Counts, if it is time, and compacts what is worth it.
    async fn tidy(&self) -> Result<(), Stopped> {
        let (root, map, counted) = {
            let objects = self.objects.lock().await;
            let map = self.root_ref.lock().map(|root| root.seq);
            (self.root.lock().clone(), map, objects.is_counted())
        };
        let Some(map) = map else {
            return Ok(());
        };
        let cost = cost(&root);
        let patience = self.reclaim.patience.load(Ordering::Relaxed);
        let credit = self.reclaim.credit.load(Ordering::Relaxed);
        if counted && (credit == 0 || credit < cost * patience) {
            return Ok(());
        }
        self.reclaim.credit.store(0, Ordering::Relaxed);
        if self.recount(map, &root).await?.is_none() {
            return Ok(());
        }
        let space = self.space();
        let patience = if space.debt * 100 >= space.live * DEBT_START_PERCENT / 4 {
            1
        } else {
            (patience * 2).min(PATIENCE_MAX)
        };
        self.reclaim.patience.store(patience, Ordering::Relaxed);

        let order = Order::default();
        let mut least = DEBT_START_PERCENT;
        while !self.reclaim.is_stopping() {
            let victims = self.victims(map, least, root.stored_bytes()).await;
            if victims.is_empty() {
                break;
            }
            let percent = self.percent();
            if !compact::run(self, &Victims::Own(victims), percent, &order).await? {
                break;
            }
            least = DEBT_STOP_PERCENT;
        }
        Ok(())
    }

    /// The share of the time to spend on compaction, in hundredths.
    pub(super) fn percent(&self) -> u32 {
        let space = self.space();
        match space.debt > space.live / 100 * DEBT_URGENT_PERCENT {
            true => 100,
            false => self.common.reclaim.percent,
        }
    }

    /// Whether the log begins in our epoch. Else no map is made but by folding it: a map says where its log goes on, and whoever
    /// has lost the head takes that for a place in the map's own epoch.
    pub(super) fn log_is_ours(&self) -> bool {
        let log = self.head.get().log;
        let first = log.first();
        first.is_none_or(|range| range.epoch == self.head.epoch())
    }

    /// Counts what the map numbered `map` needs, and brings the lists up to that; `None` if there is no time left.
    pub(super) async fn recount(
        &self,
        map: MapSeq,
        root: &Arc<MapRoot>,
    ) -> Result<Option<Needed>, Stopped> {
        let Some(needed) = self.count(root).await? else {
            return Ok(None);
        };
        let mut objects = self.objects.lock().await;
        let now_ms = (self.common.now_ms)().max(objects.log_ms());
        objects.count(&needed, map, now_ms);
        self.note_space(&objects);
        Ok(Some(needed))
    }

    /// What a map needs of each own chunk; `None` if there is no time left to find out.
    async fn count(&self, root: &Arc<MapRoot>) -> Result<Option<Needed>, Stopped> {
        let mut needed = Needed::new();
        let mut scan = Scan::new(self, Vec::new(), root.runs(), true);
        while let Some(entry) = scan.next().await? {
            if let Some(name) = Objects::chunk_of(self.volume, &entry) {
                Need::add(&mut needed, name, &entry);
            }
            if self.reclaim.is_stopping() {
                return Ok(None);
            }
        }
        Ok(Some(needed))
    }

    /// Chunks that are read side by side at most.
    pub(super) fn fan_in(&self) -> usize {
        let windows = self.common.reclaim.window_bytes / WINDOW_BYTES_MIN;
        usize::try_from(windows).unwrap_or(usize::MAX).max(2)
    }

    pub(super) fn is_sound(&self, chunk: &ChunkName) -> bool {
        !self.reclaim.unsound.lock().contains(chunk)
    }

    /// Chunks to take apart, those of which the least is needed first, if more than `percent` of what is
    /// needed is to gain in all. Only those that the map numbered `map` could have: others were not counted.
    async fn victims(&self, map: MapSeq, percent: u64, map_bytes: u64) -> BTreeSet<ChunkName> {
        let snapshots = self.head.get().snapshots;
        let objects = self.objects.lock().await;
        let free = |name: &ChunkName, chunk: &ChunkUse| {
            !is_held(chunk, &snapshots) && chunk.born <= map && self.is_sound(name)
        };
        let bytes = |sectors: u32| u64::from(sectors) * u64::from(SECTOR_SIZE);
        let (mut live, mut debt, mut candidates) = (0, 0, Vec::new());
        for (name, chunk) in objects.chunks() {
            live += bytes(chunk.needed_sectors);
            if free(&name, chunk) {
                debt += bytes(chunk.data_sectors - chunk.needed_sectors);
                let needed = u64::from(chunk.needed_sectors) * 100;
                if needed <= u64::from(chunk.data_sectors) * VICTIM_NEEDED_PERCENT_MAX {
                    candidates.push((name, *chunk));
                }
            }
        }
        let enough = live * percent / 100;
        if debt <= enough || debt < self.common.reclaim.debt_min {
            return BTreeSet::new();
        }
        let share = |chunk: &ChunkUse| {
            u64::from(chunk.needed_sectors) * 1_000_000 / u64::from(chunk.data_sectors.max(1))
        };
        candidates.sort_by_key(|(name, chunk)| (share(chunk), *name));
        candidates.truncate(self.fan_in());
        let mut room = MOVED_BYTES_MIN.max(map_bytes * MOVED_BYTES_FOR_EACH_READ);
        let mut left = debt - live * DEBT_STOP_PERCENT / 100;
        let mut victims = BTreeSet::new();
        for (name, chunk) in candidates {
            victims.insert(name);
            let rest = room.checked_sub(bytes(chunk.needed_sectors));
            let more = left.checked_sub(bytes(chunk.data_sectors - chunk.needed_sectors));
            let (Some(rest), Some(more)) = (rest, more) else {
                break;
            };
            (room, left) = (rest, more);
        }
        victims
    }

    /// Deletes what nobody can need any more. Answers when the next may be due, and how many were deleted. The error is who
    /// has the volume now.
    async fn sweep(&self) -> Result<(Option<Instant>, usize), String> {
        let settings = self.common.reclaim;
        let mut due = {
            let objects = self.objects.lock().await;
            self.due(&objects, &self.head.get().snapshots)
        };
        let mut refused = false;
        if !due.is_empty() && !self.is_ours().await? {
            due.clear();
            refused = true;
        }
        let mut deleted = Vec::new();
        let mut deletes = futures::stream::iter(due)
            .map(|object| async move { (object, self.delete(&object).await) })
            .buffer_unordered(DELETES_AT_ONCE);
        while let Some((object, result)) = deletes.next().await {
            match result {
                Ok(()) => deleted.push(object),
                Err(error) => {
                    tracing::warn!(volume = self.name, %error, "the store does not delete what is not needed");
                    refused = true;
                }
            }
            if self.reclaim.is_stopping() {
                break;
            }
        }
        drop(deletes);
        let mut objects = self.objects.lock().await;
        for object in &deleted {
            self.reclaim.deleted_objects.fetch_add(1, Ordering::Relaxed);
            self.reclaim
                .deleted_bytes
                .fetch_add(object.stored_bytes, Ordering::Relaxed);
            if object.kind == ObjectKind::Chunk {
                let less = |bytes: u64| Some(bytes.saturating_sub(object.stored_bytes));
                let (set, get) = (Ordering::Relaxed, Ordering::Relaxed);
                let _ = self.stored_bytes.fetch_update(set, get, less);
            }
        }
        objects.forget(&deleted);
        self.note_space(&objects);
        let head = self.head.get();
        let now_ms = (self.common.now_ms)();
        let (next, pinned) =
            objects.next_due(&head.snapshots, settings.horizon, head.retain_ms, now_ms);
        let later = Instant::now() + LOOK_AGAIN_DELAY;
        let next = match next {
            Some(next) if refused => Some(next.max(later)),
            // Of a snapshot that was deleted nobody may have told.
            Some(next) if pinned => Some(next.min(later)),
            None if pinned => Some(later),
            next => next,
        };
        Ok((next, deleted.len()))
    }

    /// Whether the head is known to be ours; the error is who has the volume now.
    async fn is_ours(&self) -> Result<bool, String> {
        let ours = self.head.still_ours(&*self.common.background);
        match tokio::time::timeout(DELETE_TIME_MAX, ours).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(HeadError::Fenced { by })) => Err(by),
            unknown => {
                tracing::warn!(
                    volume = self.name,
                    ?unknown,
                    "whose the volume is cannot be told: nothing is deleted"
                );
                Ok(false)
            }
        }
    }

    fn due(&self, objects: &Objects, snapshots: &[SnapshotRef]) -> Vec<DeadObject> {
        let retain_ms = self.head.get().retain_ms;
        let horizon = match Mutation::DeleteBeforeTheHorizon.is_on() {
            true => Duration::ZERO,
            false => self.common.reclaim.horizon,
        };
        objects.due(snapshots, horizon, retain_ms, (self.common.now_ms)())
    }

    async fn delete(&self, object: &DeadObject) -> Result<(), StoreError> {
        let (tenant, volume, epoch) = (self.head.tenant(), self.volume, object.epoch);
        let key = match object.kind {
            ObjectKind::Map => keys::map_key(tenant, volume, epoch, MapSeq::new(object.number)),
            ObjectKind::Chunk => {
                let seq = ChunkSeq::new(object.number);
                keys::chunk_key(tenant, ChunkId { volume, epoch, seq })
            }
        };
        let deleted = self.common.background.delete(&key);
        let late = |_| StoreError::Unavailable {
            operation: Operation::Delete,
            reason: format!("it did not answer for {} s", DELETE_TIME_MAX.as_secs()),
            key: key.clone(),
        };
        tokio::time::timeout(DELETE_TIME_MAX, deleted)
            .await
            .map_err(late)?
    }
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::map::{Manifest, MapObjectId, TableRef};
    use quarry_objfmt::{Epoch, Lba, Sectors, TenantName, VolumeId, VolumeName};

    use super::*;

    #[test]
    fn attachments_too_short_for_a_count_have_one_as_often_as_their_writes_are_worth() {
        let volume = VolumeId::from_bytes([7; 16]);
        let table = TableRef {
            object: MapObjectId {
                volume,
                epoch: Epoch::new(1),
                seq: MapSeq::ZERO,
            },
            first: Lba::ZERO,
            end: Lba::new(8),
            entries: 1,
            index_offset: 0,
            index_len: 24,
            stored_bytes: 500_000,
        };
        let root = MapRoot::new(Manifest {
            runs: vec![vec![table]],
        });
        let (tenant, name) = (
            TenantName::new("acme").unwrap(),
            VolumeName::new("db").unwrap(),
        );
        let mut head = Head::fresh(volume, &tenant, &name, Sectors::new(8), 1);
        let mut counts = 0;
        for epoch in 1..=1000 {
            head.epoch = Epoch::new(epoch);
            assert_eq!(first_credit(&head, &root, 86_400_000), 0);
            let credit = first_credit(&head, &root, 86_400_001);
            assert!(credit < cost(&root));
            // Each writes a tenth of what a count is worth.
            counts += u32::from(credit + cost(&root) / 10 >= cost(&root));
        }
        assert!((80..=120).contains(&counts), "{counts}");
        assert_eq!(first_credit(&head, &MapRoot::empty(), 86_400_001), 0);
    }
}
