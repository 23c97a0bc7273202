//! Families of volumes: snapshots, clones, rollbacks and the trash, asked for by anybody at any time, and
//! held against what the heads in the store say, each at the moment when it is stored.

use quarry_gateway::backend::open::{Claim, OpenError};
use quarry_gateway::backend::{ChoreError, HeadError};
use quarry_gateway::snapshot::SnapshotError;
use quarry_gateway::trash::TrashError;
use quarry_objfmt::chunk::ChunkHeader;
use quarry_objfmt::head::{Deleted, Head};
use quarry_objfmt::map::{MapObjectId, Usage};
use quarry_objfmt::{ChunkId, KeyGeneration, VolumeId, keys};
use rand::RngExt;

use super::World;
use crate::host::{Ask, Call, Not};
use crate::life::{Life, Rollback, Snap, Stage};
use crate::oracle::Truth;
use crate::outcome::Deed;
use crate::store::BAD_BODIES_BORNE;

/// Most volumes of a world, those that are gone too.
const VOLUMES_MAX: usize = 10;

/// Most snapshots of a volume at a time.
const SNAPSHOTS_MAX: usize = 4;

/// By how much some clocks are ahead: enough that whoever deletes a snapshot gives up clones that were only
/// just begun.
pub(super) const AHEAD_MS: u64 = 2 * 60 * 60 * 1000;

impl World {
    /// Asks for something, perhaps.
    pub(super) fn live(&mut self) {
        let Some(family) = self.plan.family else {
            return;
        };
        let h = self.core.rng.random_range(0..self.hosts.len());
        let n = self.core.rng.random_range(0..self.truths.len());
        if self.hosts[h].daemon.is_none() || self.truths[n].life.hidden {
            return;
        }
        let chances = [
            (
                family.snapshot,
                Self::snapshot as fn(&mut Self, usize, usize),
            ),
            (family.unmake, Self::unmake),
            (family.clone, Self::clone),
            (family.roll_back, Self::roll_back),
            (family.delete, Self::delete),
            (family.restore, Self::restore),
            (family.purge, Self::purge),
            (family.read_snapshot, Self::read_snapshot),
            (family.warm, Self::warm),
            (family.evict, Self::evict),
            (family.compact, Self::compact),
            (family.flatten, Self::flatten),
        ];
        for (chance, ask) in chances {
            if self.chance(chance) {
                ask(self, h, n);
            }
        }
    }

    /// Whether host `h` serves volume `n` and may be asked for something about it.
    fn serves(&self, h: usize, n: usize) -> bool {
        let Some(daemon) = &self.hosts[h].daemon else {
            return false;
        };
        let session = daemon.sessions.get(&n);
        session.is_some_and(|s| !s.read_only && !s.stopping && !s.is_fenced())
            && !daemon.has_errand(n)
            && !daemon.is_called(n)
    }

    /// Whether nothing is done with volume `n` on host `h`.
    fn is_away(&self, h: usize, n: usize) -> bool {
        self.hosts[h].daemon.as_ref().is_some_and(|d| d.is_away(n))
    }

    fn any_snapshot(&mut self, n: usize) -> Option<String> {
        let names = self.truths[n].life.names();
        let pick = self.core.rng.random_range(0..names.len().max(1));
        names.into_iter().nth(pick)
    }

    /// By host `h`, which takes nothing from anybody, by a clock that is ahead.
    fn caller(&mut self, h: usize, ahead_ms: u64) -> Claim {
        let claim = self.claim(h, false, false);
        Claim {
            now_ms: claim.now_ms + ahead_ms,
            ..claim
        }
    }

    pub(super) fn call(&mut self, h: usize, n: usize, ask: Ask, ahead_ms: u64) {
        let by = self.caller(h, ahead_ms);
        let clone = match ask {
            Ask::Clone { clone, .. } => {
                // One that was never given before, and takes nothing from the run's own numbers.
                let seed = self.plan.seed.wrapping_mul(VOLUMES_MAX as u64 + 1);
                Some((self.truths[clone].id, seed.wrapping_add(clone as u64)))
            }
            _ => None,
        };
        self.core.digest.add((h, n, format!("{ask:?}")));
        self.hosts[h].call(n, &self.truths[n], ask, by, clone);
    }

    fn snapshot(&mut self, h: usize, n: usize) {
        if !self.serves(h, n) || self.truths[n].life.names().len() >= SNAPSHOTS_MAX {
            return;
        }
        let session = &self.hosts[h].daemon.as_ref().unwrap().sessions[&n];
        let life = &mut self.truths[n].life;
        // Now and then one that was asked for before: it is there, or was never made.
        let again = life.making.keys().next_back().cloned();
        let again = again.filter(|name| !life.snaps.contains_key(name));
        let again = again.filter(|_| self.core.rng.random_bool(0.2));
        let name = again.unwrap_or_else(|| format!("s{:03}", life.making.len()));
        let acked = session.acked.max(session.volume.last_acknowledged().get());
        // Of one that is asked for again, either call may make it; and what was acknowledged may be lost since, or the
        // volume rolled back.
        let at_least = life.making.entry(name.clone()).or_insert(acked);
        *at_least = acked.min(*at_least);
        self.call(h, n, Ask::Snapshot(name), 0);
    }

    fn unmake(&mut self, h: usize, n: usize) {
        let away = self.truths[n].life.is_there() && self.is_away(h, n);
        if !away && !self.serves(h, n) {
            return;
        }
        let Some(name) = self.any_snapshot(n) else {
            return;
        };
        self.truths[n].life.unmaking.insert(name.clone());
        let ahead_ms = match self.core.rng.random_bool(0.3) {
            true => AHEAD_MS,
            false => 0,
        };
        self.call(h, n, Ask::Unmake(name), ahead_ms);
    }

    fn clone(&mut self, h: usize, n: usize) {
        if self.truths.len() >= VOLUMES_MAX || !self.truths[n].life.is_there() {
            return;
        }
        let Some(snapshot) = self.any_snapshot(n) else {
            return;
        };
        let clone = self.truths.len();
        let parent = &self.truths[n];
        let at = &parent.life.snaps[&snapshot].at;
        let mut truth = Truth::of_clone(u32::try_from(clone).unwrap(), parent, at);
        truth.life = Life::of_clone(n, &snapshot);
        self.truths.push(truth);
        self.lost.push(None);
        let taken = self.core.rng.random_bool(0.1);
        let ask = Ask::Clone {
            snapshot,
            clone,
            taken,
        };
        self.call(h, n, ask, 0);
    }

    fn roll_back(&mut self, h: usize, n: usize) {
        if !self.truths[n].life.is_there() || !self.is_away(h, n) {
            return;
        }
        let Some(snapshot) = self.any_snapshot(n) else {
            return;
        };
        let rollback = Rollback {
            host: self.hosts[h].name.clone(),
            asked_ms: self.core.now_ms(),
            snapshot: snapshot.clone(),
            done: false,
        };
        self.truths[n].life.rollbacks.push(rollback);
        self.call(h, n, Ask::RollBack(snapshot), 0);
    }

    fn delete(&mut self, h: usize, n: usize) {
        let daemon = self.hosts[h].daemon.as_ref().unwrap();
        let keeps = daemon.keeps(&self.truths[n]);
        if self.truths[n].life.is_there() && self.is_away(h, n) && !keeps {
            self.call(h, n, Ask::Delete, 0);
        }
    }

    fn restore(&mut self, h: usize, n: usize) {
        if matches!(self.truths[n].life.stage, Stage::InTrash { .. }) && self.is_away(h, n) {
            self.call(h, n, Ask::Restore, 0);
        }
    }

    fn purge(&mut self, h: usize, n: usize) {
        let stage = self.truths[n].life.stage;
        if matches!(stage, Stage::InTrash { .. } | Stage::Purging) && self.is_away(h, n) {
            self.call(h, n, Ask::Purge, 0);
        }
    }

    fn read_snapshot(&mut self, _: usize, n: usize) {
        if self.readers.len() < 2
            && let Some(name) = self.any_snapshot(n)
        {
            self.read(n, Some(name));
        }
    }

    fn warm(&mut self, h: usize, n: usize) {
        if self.serves(h, n) {
            let mut outer = self.core.outer(&mut self.truths[n], &mut self.fuses[h]);
            self.hosts[h].warm(n, &mut outer);
        }
    }

    fn evict(&mut self, h: usize, n: usize) {
        self.hosts[h].evict(&self.truths[n]);
    }

    fn compact(&mut self, h: usize, n: usize) {
        if self.serves(h, n) {
            let held = self.core.rng.random_bool(0.5);
            self.call(h, n, Ask::Compact { held }, 0);
        }
    }

    fn flatten(&mut self, h: usize, n: usize) {
        if self.truths[n].life.parent.is_some() && self.serves(h, n) {
            self.truths[n].life.flattening = true;
            self.call(h, n, Ask::Flatten, 0);
        }
    }

    /// Holds the heads that were stored since this was called last against what may be.
    pub(super) fn hear_heads(&mut self) {
        for (key, body) in self.core.bucket.take_heads() {
            let found = |truth: &Truth| keys::head_key(&truth.tenant, truth.id) == key;
            let n = self.truths.iter().position(found).expect("a volume");
            let what = match body {
                Some(body) => self.head_is(n, Head::decode(&body).unwrap()),
                None => self.head_is_gone(n),
            };
            if let Err(what) = what {
                panic!("volume {n}: {what}");
            }
        }
    }

    fn head_is(&mut self, n: usize, head: Head) -> Result<(), String> {
        let now_ms = self.core.now_ms();
        let before = self.truths[n].life.head.clone();
        self.core.digest.add((n, head.epoch.get(), now_ms));
        self.truths[n].life.goes_on(&head, now_ms)?;
        if let Some(before) = &before
            && head.deleted() != Some(Deleted::Purging)
        {
            self.drops_no_key_in_use(n, before, &head)?;
        }
        if self.truths[n].life.stage == Stage::Never {
            self.truths[n].life.head = Some(head);
            return Ok(());
        }
        match &before {
            None => self.clone_is_made(n)?,
            Some(before) => {
                self.snapshots_are(n, before, &head)?;
                self.is_rolled_back(n, before, &head)?;
                self.is_flattened(n, before, &head)?;
            }
        }
        if self.truths[n].life.stage == Stage::Purging {
            self.has_no_clones(n, None)?;
        }
        self.truths[n].life.head = Some(head);
        Ok(())
    }

    /// A key leaves the head only when nothing is encrypted with it that the head's map and its snapshots need, or
    /// may not be deleted yet.
    fn drops_no_key_in_use(&mut self, n: usize, before: &Head, head: &Head) -> Result<(), String> {
        let has = |volume: VolumeId, generation: KeyGeneration| {
            let mut keys = head.keys.keys.iter();
            keys.any(|key| (key.volume, key.generation) == (volume, generation))
        };
        let dropped = before.keys.keys.iter();
        let mut dropped = dropped.filter(|key| !has(key.volume, key.generation));
        if dropped.clone().next().is_none() {
            return Ok(());
        }
        if head.parent.is_some() && dropped.any(|key| key.volume != head.volume) {
            return Err("it drops keys of its parent's".to_owned());
        }
        let snapshots = head.snapshots.iter().map(|snapshot| snapshot.root);
        for root in snapshots.chain([head.root]).flatten() {
            let tenant = &self.truths[n].tenant;
            let key = keys::map_key(tenant, head.volume, root.epoch, root.seq);
            let object = self
                .core
                .bucket
                .peek(&key)
                .ok_or(format!("{key} is gone"))?;
            let Some((offset, len)) = root.usage else {
                return Err(format!(
                    "a key is dropped, and {key} does not say what is needed"
                ));
            };
            let id = MapObjectId {
                volume: head.volume,
                epoch: root.epoch,
                seq: root.seq,
            };
            let node = &object[offset as usize..][..len as usize];
            let usage = Usage::decode(id, offset, node).map_err(|error| error.to_string())?;
            for chunk in &usage.chunks {
                let id = ChunkId {
                    volume: head.volume,
                    epoch: chunk.epoch,
                    seq: chunk.seq,
                };
                let key = keys::chunk_key(tenant, id);
                // Listed is what may be needed; when that was counted, it was found that it is not.
                let Some(object) = self.core.bucket.peek(&key) else {
                    continue;
                };
                let header = ChunkHeader::decode(&object, id).map_err(|error| error.to_string())?;
                if !has(head.volume, header.generation) || header.generation < chunk.generation {
                    return Err(format!(
                        "{key} is encrypted with key {}, which is dropped, or listed as {}",
                        header.generation, chunk.generation
                    ));
                }
            }
        }
        self.core.outcome.deeds.note(Deed::KeyDropped);
        Ok(())
    }

    fn head_is_gone(&mut self, n: usize) -> Result<(), String> {
        let life = &mut self.truths[n].life;
        life.head = None;
        life.stage = match life.stage {
            Stage::Purging | Stage::Gone => Stage::Gone,
            Stage::Never => Stage::Never,
            stage => return Err(format!("its head is deleted, and it is {stage:?}")),
        };
        self.core.outcome.deeds.note(Deed::Gone);
        Ok(())
    }

    /// A clone's head is stored: its snapshot must be there.
    fn clone_is_made(&mut self, n: usize) -> Result<(), String> {
        let Some((parent, snapshot)) = &self.truths[n].life.parent else {
            return Ok(());
        };
        let of = &self.truths[*parent].life;
        let gone = of.snaps.get(snapshot).is_none_or(|snap| snap.gone);
        if gone || of.is_condemned() {
            return Err(format!("a clone of {snapshot} of {parent}, which is gone"));
        }
        self.core.outcome.deeds.note(Deed::Cloned);
        Ok(())
    }

    /// An error if a volume needs objects of this one, or of this one's snapshot.
    fn has_no_clones(&self, n: usize, snapshot: Option<&str>) -> Result<(), String> {
        let needs = |truth: &Truth| truth.life.needs(n, snapshot);
        match self.truths.iter().position(needs) {
            Some(clone) => Err(format!(
                "{snapshot:?} is deleted, of which {clone} is a clone"
            )),
            None => Ok(()),
        }
    }

    fn snapshots_are(&mut self, n: usize, before: &Head, head: &Head) -> Result<(), String> {
        for gone in &before.snapshots {
            if head.snapshots.iter().any(|s| s.name == gone.name) {
                continue;
            }
            if !gone.closing || !self.truths[n].life.unmaking.contains(&gone.name) {
                return Err(format!("nobody deletes the snapshot {}", gone.name));
            }
            self.has_no_clones(n, Some(&gone.name))?;
            let snap = self.truths[n].life.snaps.get_mut(&gone.name);
            snap.expect("it was there").gone = true;
            self.core.outcome.deeds.note(Deed::Unmade);
        }
        for now in &head.snapshots {
            let truth = &mut self.truths[n];
            if let Some(old) = before.snapshots.iter().find(|s| s.name == now.name) {
                if (old.root, old.root_write, old.size) != (now.root, now.root_write, now.size) {
                    return Err(format!("the snapshot {} changes", now.name));
                }
                let snap = truth.life.snaps.get_mut(&now.name);
                snap.expect("it was there").closing = now.closing;
                continue;
            }
            let Some(at_least) = truth.life.making.get(&now.name).copied() else {
                return Err(format!("nobody asked for the snapshot {}", now.name));
            };
            let (epoch, upto) = (truth.served(head.epoch.get()), now.root_write.get());
            if upto < at_least {
                return Err(format!(
                    "the snapshot {} has writes up to {upto}; {at_least} was acknowledged before",
                    now.name
                ));
            }
            truth.reported(epoch, upto, "a snapshot");
            let snap = Snap {
                at: truth.point(epoch, upto, now.size.get()),
                closing: now.closing,
                gone: false,
            };
            if truth.life.snaps.insert(now.name.clone(), snap).is_some() {
                return Err(format!("the snapshot {} is made twice", now.name));
            }
            self.core.outcome.deeds.note(Deed::Snapshot);
        }
        Ok(())
    }

    /// A rollback gives the volume another map and back to nobody, in one step.
    fn is_rolled_back(&mut self, n: usize, before: &Head, head: &Head) -> Result<(), String> {
        let given_back = before.owner.as_ref().filter(|_| head.owner.is_none());
        let Some(owner) = given_back.filter(|_| head.root != before.root) else {
            return Ok(());
        };
        let truth = &mut self.truths[n];
        let ours = |r: &&mut Rollback| (&r.host, r.asked_ms) == (&owner.host, owner.since_ms);
        let Some(rollback) = truth.life.rollbacks.iter_mut().find(ours) else {
            return Err("nobody rolls it back".to_owned());
        };
        rollback.done = true;
        let snap = &truth.life.snaps[&rollback.snapshot];
        if snap.gone {
            return Err(format!(
                "rolled back to {}, which is gone",
                rollback.snapshot
            ));
        }
        let to = snap.at.clone();
        let root = head.root.ok_or("rolled back to no map")?;
        truth.roll_back(head.epoch.get(), root, &to);
        truth.life.rolled_back += 1;
        self.core.outcome.deeds.note(Deed::RolledBack);
        Ok(())
    }

    /// A clone that was flattened names no parent, and no snapshot of it can need that.
    fn is_flattened(&mut self, n: usize, before: &Head, head: &Head) -> Result<(), String> {
        if head.parent == before.parent || head.deleted() != before.deleted() {
            return Ok(());
        }
        let life = &mut self.truths[n].life;
        if head.parent.is_some() || !life.flattening || !head.snapshots.is_empty() {
            return Err(format!(
                "its parent was {:?} and is {:?}",
                before.parent, head.parent
            ));
        }
        life.flattened = true;
        self.core.outcome.deeds.note(Deed::Flattened);
        Ok(())
    }

    /// Ends calls, and holds what they say against what is there.
    pub(super) async fn end_calls(&mut self) {
        for h in 0..self.hosts.len() {
            let Some(daemon) = &mut self.hosts[h].daemon else {
                continue;
            };
            let calls = std::mem::take(&mut daemon.calls);
            let (done, left): (Vec<_>, Vec<_>) =
                calls.into_iter().partition(|call| call.task.is_finished());
            daemon.calls = left;
            for call in done {
                let Call { n, ask, task } = call;
                let came = task.await.expect("a call does not panic");
                self.hear_heads();
                self.core
                    .digest
                    .add((h, n, format!("{ask:?}"), came.is_ok()));
                match came {
                    Ok(()) => self.is_done(n, &ask),
                    Err(not) => self.may_not(n, &ask, &not),
                }
                if let Ask::Clone { clone, .. } = ask {
                    // Whoever made it knows of it, or finds it there.
                    self.truths[clone].life.hidden = false;
                }
            }
        }
    }

    /// Host `h` is about to die. A clone that it has begun may be found by others.
    pub(super) fn forget_calls(&mut self, h: usize) {
        let calls = self.hosts[h].daemon.as_ref().map(|daemon| &daemon.calls);
        for call in calls.into_iter().flatten() {
            if let Ask::Clone { clone, .. } = call.ask {
                self.truths[clone].life.hidden = false;
            }
        }
    }

    /// What is said to be done must be.
    fn is_done(&mut self, n: usize, ask: &Ask) {
        let life = &self.truths[n].life;
        let done = match ask {
            Ask::Snapshot(name) => life.snaps.contains_key(name),
            Ask::Unmake(name) => life.snaps.get(name).is_none_or(|snap| snap.gone),
            Ask::Clone { clone, .. } => self.truths[*clone].life.stage != Stage::ToBe,
            Ask::RollBack(name) => life.rollbacks.iter().any(|r| r.done && r.snapshot == *name),
            Ask::Delete | Ask::Restore => true,
            Ask::Compact { .. } => {
                self.core.outcome.deeds.note(Deed::Compacted);
                true
            }
            Ask::Flatten => life.flattened,
            Ask::Purge => matches!(life.stage, Stage::Gone | Stage::Never),
        };
        assert!(
            done,
            "volume {n}: {ask:?} is said to be done, and it is not"
        );
    }

    /// What is refused must have a reason.
    fn may_not(&mut self, n: usize, ask: &Ask, not: &Not) {
        let life = &self.truths[n].life;
        let name = match ask {
            Ask::Snapshot(name) | Ask::Unmake(name) | Ask::RollBack(name) => Some(name),
            Ask::Clone { snapshot, .. } => Some(snapshot),
            Ask::Delete | Ask::Restore | Ask::Purge | Ask::Compact { .. } | Ask::Flatten => None,
        };
        let ending = life.is_condemned() || name.is_some_and(|name| life.is_ending(name));
        let rough = self.plan.weather.bad_bodies_max > BAD_BODIES_BORNE;
        let may = match not {
            // Of a volume whose map is damaged.
            Not::Snapshot(
                SnapshotError::Behind
                | SnapshotError::Damaged { .. }
                | SnapshotError::Head(HeadError::Damaged { .. })
                | SnapshotError::Open(OpenError::Damaged { .. }),
            )
            | Not::Trash(
                TrashError::Record { .. } | TrashError::Newer(_) | TrashError::Stays { .. },
            ) => rough || ending,
            Not::Snapshot(SnapshotError::HasClones { .. } | SnapshotError::BeingCloned { .. })
            | Not::Trash(TrashError::Clones { .. } | TrashError::Cloning { .. }) => {
                let of = |truth: &Truth| truth.life.parent.as_ref().is_some_and(|of| of.0 == n);
                self.truths.iter().any(of)
            }
            Not::Chore(ChoreError::NoParent) => life.parent.is_none() || life.flattened,
            Not::Chore(ChoreError::Snapshots(_)) => !life.snaps.is_empty(),
            Not::Chore(ChoreError::Damaged { .. }) => rough,
            Not::Trash(TrashError::Headless) => rough || life.is_condemned(),
            _ => true,
        };
        assert!(
            may,
            "volume {n}: {ask:?} is refused without a reason: {not:?}"
        );
    }
}
