//! Renewing data keys: what an earlier key than the newest encrypts is encrypted anew, and then the earlier key is
//! dropped. Part of the task of reclaiming, after its count.
//!
//! The order, and what a crash between the steps leaves:
//! 1. *Settle.* What was being uploaded when the newest key came is folded into the map, and from then on nothing comes
//!    that an earlier key encrypts. *Crash: each chunk's header says by which key it is encrypted.*
//! 2. *Move.* Chunks of earlier keys are taken apart by compaction, as many at once as the map that it reads is worth; but for
//!    those that a snapshot needs, which stay as long as it does. What is taken apart is deleted like all that is dead.
//!    *Crash: the lists beside the map say what is left.*
//! 3. *Drop*, once none of these lists has a chunk of the key, nor of an earlier one, nor has the log or a snapshot's list:
//!    a copy of the keys without it; a map of the same runs, whose lists say so, and with it the head, without the key; then
//!    earlier copies are deleted. *Crash after the copy: it lacks a key that nothing is encrypted with. After the head: earlier
//!    copies stay; the next change of keys deletes them.*
//!
//! Keys of other volumes go the same way, once the head names no parent.
//!
//! **Invariant.** A key leaves the head only when every chunk that it encrypts was deleted, by lists that the same head
//! names: so no reader within the horizon needs it, no retained state, and no clone, whose snapshot keeps its chunks and whose own
//! head has the key. Where a list is not known, keys stay.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;

use quarry_cache::Mutation;
use quarry_objfmt::map::ChunkUse;
use quarry_objfmt::{
    DataKeys, Head, KeyGeneration, SECTOR_SIZE, SnapshotRef, WrappedKey, WrappedKeys,
};

use super::VolumeBackend;
use super::checkpoint::{Stopped, Writer, refused, remap};
use super::chores::Order;
use super::compact::{self, REST_MAX, Victims};
use super::objects::{ChunkName, Sealed, is_held};
use super::open::load_usage;
use super::reclaim::{MOVED_BYTES_FOR_EACH_READ, MOVED_BYTES_MIN};
use crate::keys::{drop_copies_before, put_next_copy};

/// How far it is.
#[derive(Default, Debug)]
pub(super) struct Renewal {
    /// Of the newest key when all that was being uploaded had last been folded into the map.
    settled: parking_lot::Mutex<Option<KeyGeneration>>,
    /// A copy that no head names yet: the keys that the head had, and those of the copy.
    copied: parking_lot::Mutex<Option<(WrappedKeys, WrappedKeys)>>,
}

/// What there is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Renewed {
    /// Nothing: all keys are needed.
    All,
    /// Something, at once.
    GoesOn,
    /// Something, later: what has not been deleted yet is encrypted with an earlier key.
    Waits,
}

impl VolumeBackend {
    /// Adds keys that the head has. What is written from now on is encrypted with the newest, and what is there is
    /// encrypted anew.
    pub fn add_keys(&self, opened: &DataKeys) {
        let mut keys = self.keys.lock();
        let mut all = keys.as_deref().cloned().unwrap_or_default();
        all.extend(opened);
        *keys = Some(Arc::new(all));
        drop(keys);
        self.reclaim.wake();
    }

    /// Of the key that what is written is encrypted with; none if the volume is not encrypted.
    pub fn newest_generation(&self) -> Option<KeyGeneration> {
        let newest = self.keys()?.newest(self.volume)?.generation();
        Some(newest)
    }

    /// What the volume's key of this generation encrypts in the store; `None` if that is not known, or the map is
    /// being changed.
    pub fn sealed_by(
        &self,
        generation: KeyGeneration,
        snapshots: &[SnapshotRef],
    ) -> Option<Sealed> {
        let mut sealed = {
            let objects = self.objects.try_lock().ok()?;
            objects.sealed_by(generation, snapshots)?
        };
        let log = self.log.lock();
        for chunk in log.values().filter(|c| c.generation == generation) {
            sealed.chunks += 1;
            sealed.stored_bytes += u64::from(chunk.stored_bytes);
        }
        Some(sealed)
    }

    /// Takes the next step, if there is one to take.
    pub(super) async fn renew(&self) -> Result<Renewed, Stopped> {
        let Some(newest) = self.newest_generation() else {
            return Ok(Renewed::All);
        };
        let head = self.head.get();
        let earlier = |key: &WrappedKey| key.volume == self.volume && key.generation < newest;
        let foreign = |key: &WrappedKey| key.volume != self.volume && head.parent.is_none();
        let keys = &head.keys.keys;
        if !keys.iter().any(|key| earlier(key) || foreign(key)) {
            return Ok(Renewed::All);
        }
        if keys.iter().any(earlier) {
            if !self.settle(newest).await {
                return Ok(Renewed::Waits);
            }
            let victims = self.of_earlier_keys(newest).await;
            if !victims.is_empty() {
                let (victims, order) = (Victims::Own(victims), Order::default());
                let moved = compact::run(self, &victims, self.percent(), &order).await?;
                return Ok(match moved {
                    true => Renewed::GoesOn,
                    false => Renewed::Waits,
                });
            }
        }
        self.drop_keys(&head, newest).await
    }

    /// Folds into the map what may have been encrypted with an earlier key than the newest; false if it cannot be.
    async fn settle(&self, newest: KeyGeneration) -> bool {
        if *self.renewal.settled.lock() == Some(newest) {
            return true;
        }
        // A drain waits for the store; whoever ends reclaiming does not.
        let mut drained = pin!(self.drain(true));
        let drained = loop {
            if let Ok(drained) = tokio::time::timeout(REST_MAX, &mut drained).await {
                break drained;
            }
            if self.reclaim.is_stopping() {
                return false;
            }
        };
        if drained {
            *self.renewal.settled.lock() = Some(newest);
        }
        drained
    }

    /// Chunks of earlier keys to take apart, those of the earliest first; none that a snapshot needs.
    async fn of_earlier_keys(&self, newest: KeyGeneration) -> BTreeSet<ChunkName> {
        let snapshots = self.head.get().snapshots;
        let map_bytes = self.root.lock().stored_bytes();
        let objects = self.objects.lock().await;
        let free = |name: &ChunkName, chunk: &ChunkUse| {
            chunk.generation < newest && !is_held(chunk, &snapshots) && self.is_sound(name)
        };
        let mut all: Vec<(ChunkName, &ChunkUse)> = objects
            .chunks()
            .filter(|(name, chunk)| free(name, chunk))
            .collect();
        all.sort_by_key(|(name, chunk)| (chunk.generation, *name));
        all.truncate(self.fan_in());
        let mut room = MOVED_BYTES_MIN.max(map_bytes * MOVED_BYTES_FOR_EACH_READ);
        let fits = all.iter().take_while(|(_, chunk)| {
            let fits = room > 0;
            room = room.saturating_sub(u64::from(chunk.needed_sectors) * u64::from(SECTOR_SIZE));
            fits
        });
        fits.map(|(name, _)| *name).collect()
    }

    /// The earliest key that something may be encrypted with that `head`, which was just seen, needs, or that is not deleted
    /// yet, or the newest; `None` if that is not known.
    async fn earliest_needed(
        &self,
        head: &Head,
        newest: KeyGeneration,
    ) -> Result<Option<KeyGeneration>, Stopped> {
        if Mutation::DropKeyInUse.is_on() {
            return Ok(Some(newest));
        }
        let Some(mut earliest) = self.earliest_listed(newest).await else {
            return Ok(None);
        };
        let own = |key: &&WrappedKey| key.volume == self.volume;
        let first = head.keys.keys.iter().filter(own).map(|key| key.generation);
        let first = first.min().unwrap_or(newest);
        // Mostly in the lists too; but the lists may have been lost.
        let (store, tenant) = (&*self.common.background, self.head.tenant());
        for snapshot in &head.snapshots {
            if snapshot.root.is_none() || earliest <= first {
                continue;
            }
            let usage = load_usage(store, tenant, self.volume, snapshot.root).await;
            let usage = match usage {
                Ok(Some(usage)) => usage,
                Ok(None) => return Ok(None),
                Err(error) => {
                    let name = &snapshot.name;
                    tracing::warn!(volume = self.name, snapshot = name, %error, "earlier keys are kept");
                    return Ok(None);
                }
            };
            let chunks = usage.chunks.iter().map(|chunk| chunk.generation);
            earliest = chunks.fold(earliest, KeyGeneration::min);
        }
        Ok(Some(earliest))
    }

    /// As [`Self::earliest_needed`], by the lists of the newest map and the log behind it.
    async fn earliest_listed(&self, newest: KeyGeneration) -> Option<KeyGeneration> {
        let objects = self.objects.lock().await;
        if !objects.is_counted() {
            return None;
        }
        let log = self.log.lock();
        let log = log.values().map(|chunk| chunk.generation);
        Some(
            log.chain(objects.earliest_generation())
                .fold(newest, KeyGeneration::min),
        )
    }

    /// Drops the keys that nothing is encrypted with.
    async fn drop_keys(&self, seen: &Head, newest: KeyGeneration) -> Result<Renewed, Stopped> {
        let Some(earliest) = self.earliest_needed(seen, newest).await? else {
            return Ok(Renewed::Waits);
        };
        let is_needed = |key: &WrappedKey| match key.volume == self.volume {
            true => key.generation >= earliest,
            false => seen.parent.is_some(),
        };
        let mut needed = seen.keys.clone();
        needed.keys.retain(is_needed);
        if needed.keys.len() == seen.keys.keys.len() || !self.log_is_ours() {
            return Ok(Renewed::Waits);
        }
        let next = self.copy_of(&seen.keys, needed).await?;
        let mut objects = self.objects.lock().await;
        let old = self.root.lock().clone();
        let root = old.with_new_run(0, Vec::new());
        // Whoever changed the keys meanwhile knew nothing of this.
        let change = |head: &mut Head| {
            if head.keys == seen.keys {
                head.keys.clone_from(&next);
            }
        };
        let writer = Writer::new(self);
        remap(self, writer, &mut objects, &old, root, |_, _, _| {}, change).await?;
        drop(objects);
        if self.head.get().keys != next {
            return Ok(Renewed::Waits);
        }
        self.forget_before(earliest);
        tracing::info!(
            volume = self.name,
            dropped = seen.keys.keys.len() - next.keys.len(),
            newest = newest.get(),
            "data keys that nothing is encrypted with any more are dropped"
        );
        let (store, tenant) = (&*self.common.background, self.head.tenant());
        let deleted = drop_copies_before(store, tenant, self.volume, next.revision).await;
        if let Err(error) = deleted {
            tracing::warn!(volume = self.name, %error, "earlier copies of the keys stay, until these change again");
        }
        Ok(Renewed::GoesOn)
    }

    /// Writes the copy of keys that are to take the place of those seen, or finds that it did before.
    async fn copy_of(&self, seen: &WrappedKeys, next: WrappedKeys) -> Result<WrappedKeys, Stopped> {
        let copied = self.renewal.copied.lock().take();
        let copied = copied.filter(|(had, copy)| had == seen && copy.keys == next.keys);
        let copy = match copied {
            Some((_, copy)) => copy,
            None => {
                let (store, tenant) = (&*self.common.background, self.head.tenant());
                let copy = put_next_copy(store, tenant, self.volume, next).await;
                copy.map_err(|error| refused("keys", &error))?
            }
        };
        *self.renewal.copied.lock() = Some((seen.clone(), copy.clone()));
        Ok(copy)
    }

    /// Wipes the volume's own keys of earlier generations.
    fn forget_before(&self, earliest: KeyGeneration) {
        let mut keys = self.keys.lock();
        if let Some(all) = &*keys {
            let mut left = DataKeys::clone(all);
            let own = self.volume;
            left.retain(|volume, generation| volume != own || generation >= earliest);
            *keys = Some(Arc::new(left));
        }
    }
}
