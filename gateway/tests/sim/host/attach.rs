//! Attaching and detaching, in the order and of the parts of the engine.

use std::sync::Arc;
use std::time::Duration;

use quarry_cache::{CutError, Journal};
use quarry_gateway::backend::open::{
    Claim, Claimed, OpenError, claim, give_back, open_read_only, open_snapshot,
};
use quarry_gateway::backend::{Common, VolumeBackend};
use quarry_gateway::engine::kept::{Taken, settle, take_up};
use quarry_gateway::reactor::ReactorHandle;
use quarry_objfmt::codec::Compression;
use quarry_objfmt::{Encryption, SnapName, TenantName, VolumeId};
use quarry_volume::{Opened, Volume, VolumeParams};

use super::{Attach, Host, Opening, Outer, Promise, TUNING, group_of};
use crate::oracle::Truth;
use crate::outcome::Crash;
use crate::secrets;
use crate::session::{Beginning, Died, Session};

/// How long an attach waits for the store, as in the engine.
pub(super) const CONTROL_DEADLINE: Duration = Duration::from_secs(20);

impl Host {
    /// Begins to read a snapshot of a volume.
    pub fn attach_snapshot(&mut self, n: usize, truth: &Truth, name: &str) {
        let daemon = self.daemon.as_mut().unwrap();
        let store = daemon.lane.with_deadline(CONTROL_DEADLINE);
        let (tenant, id) = (truth.tenant.clone(), truth.id);
        let snap = SnapName::new(name).unwrap();
        let task = tokio::spawn(async move {
            let opened = open_snapshot(&store, &tenant, id, &snap).await;
            opened.map(|(opened, _)| opened)
        });
        let opening = Opening {
            task,
            read_only: true,
            gives_up: false,
            snapshot: Some(name.to_owned()),
            durable: 0,
            rolled_back: 0,
            grown: 0,
        };
        daemon.opening.insert(n, opening);
    }

    /// Begins to attach a volume.
    pub fn attach(&mut self, n: usize, truth: &Truth, how: &Claim, read_only: bool) {
        let daemon = self.daemon.as_mut().unwrap();
        if let Some(kept) = daemon.unsettled.remove(&truth.id) {
            match settle(&*self.device, &self.journals, truth.id, &kept) {
                Ok(found) => daemon.kept.extend(found.map(|found| (truth.id, found))),
                Err(_) => {
                    daemon.unsettled.insert(truth.id, kept);
                    return;
                }
            }
        }
        let store = daemon.lane.with_deadline(CONTROL_DEADLINE);
        let kept = daemon.kept.get(&truth.id).cloned();
        let (tenant, id) = (truth.tenant.clone(), truth.id);
        let claimed = how.clone();
        let task = tokio::spawn(async move {
            if read_only {
                open_read_only(&store, &tenant, id, kept.as_ref(), &claimed).await
            } else {
                claim(&store, &tenant, id, kept.as_ref(), &claimed).await
            }
        });
        let opening = Opening {
            task,
            read_only,
            gives_up: how.discard_unsent,
            snapshot: None,
            durable: truth.durable_by(u32::MAX),
            rolled_back: truth.life.rolled_back,
            grown: truth.grown,
        };
        daemon.opening.insert(n, opening);
    }

    /// Goes on with an attach, after `crash`.
    pub async fn go_on(&mut self, n: usize, crash: Option<Crash>, mut world: Outer<'_>) -> Attach {
        let daemon = self.daemon.as_mut().unwrap();
        if !daemon.opening[&n].task.is_finished() {
            return Attach::UnderWay;
        }
        let opening = daemon.opening.remove(&n).unwrap();
        let claimed = match opening.task.await.expect("a claim does not panic") {
            Ok(claimed) => Claimed {
                keys: secrets::opened(&claimed.info),
                ..claimed
            },
            Err(error) => {
                let ends = |name: &String| world.truth.life.is_ending(name);
                let kind = match opening.snapshot.as_ref().is_some_and(ends) {
                    true => "no snapshot",
                    false => kind(&error),
                };
                return Attach::Refused(kind, error.to_string());
            }
        };
        let truth = &mut *world.truth;
        let (id, epoch) = (truth.id, claimed.info.epoch.get());
        let stored = claimed.stored_write.get();
        let kept = daemon.kept.get(&id).cloned().filter(|_| !opening.read_only);
        let taken = take_up(
            &*self.device,
            id,
            kept,
            claimed.stored_write,
            claimed.kept_since,
            opening.gives_up,
        );
        let taken = match taken {
            Ok(taken) => taken,
            Err(error @ CutError::Lost { .. }) => {
                let index = truth.index;
                assert!(self.was_flipped, "volume {index}: lost by nobody: {error}");
                return Attach::Refused("lost", error.to_string());
            }
            Err(error @ CutError::InDoubt { .. }) => {
                let promise = self.promises.get(&id);
                let (in_doubt, index) = (promise.is_some_and(|p| p.in_doubt), truth.index);
                assert!(in_doubt, "volume {index}: no sync failed: {error}");
                return Attach::Refused("in doubt", error.to_string());
            }
            Err(_) if self.device.is_dead() => return Attach::Died,
            Err(error) => return Attach::Refused("cache", error.to_string()),
        };
        let mut attachment = [0; 16];
        attachment[..4].copy_from_slice(&epoch.to_le_bytes());
        let entries = TUNING.journal_entries;
        let epoch_name = claimed.info.epoch;
        let journal =
            (!opening.read_only).then(|| self.journals.create(id, epoch_name, attachment, entries));
        let Ok(journal) = journal.transpose() else {
            // The folder is gone since a sync failed.
            return Attach::Refused("cache", "the folder of journals is gone".to_owned());
        };
        let upto = taken.unsent.last().map_or(stored, |(_, r)| r.seq.get());
        let served = if opening.read_only {
            assert!(
                stored >= opening.durable || truth.life.rolled_back > opening.rolled_back,
                "volume {}: a reader sees writes up to {stored}, of which {} were durable before",
                truth.index,
                opening.durable
            );
            truth.read(epoch, claimed.info.root)
        } else {
            truth.begin(epoch, stored, upto);
            if let Some(promise) = self.promises.remove(&id) {
                promise.keeps(upto, claimed.kept_since, opening.gives_up, truth);
            }
            epoch
        };
        let size = claimed.info.size.get();
        assert!(
            opening.grown <= size && size <= truth.size_max,
            "volume {} has {size} sectors",
            truth.index
        );
        let now = match &opening.snapshot {
            None => truth.image(served, upto),
            Some(name) => {
                let at = &truth.life.snaps[name].at;
                assert_eq!((at.newest(), at.image.len() as u64), (upto, size));
                at.image.clone()
            }
        };
        let direct = world.direct.is_some()
            && claimed.info.compression == Compression::None
            && claimed.info.encryption == Encryption::None;
        world.digest.add((n, epoch, stored, upto));
        let mut beginning = self.begin(id, claimed, taken, upto, journal);
        beginning.direct = direct;
        beginning.history = crash;
        beginning.snapshot = opening.snapshot;
        let daemon = self.daemon.as_mut().unwrap();
        daemon.kept.remove(&id);
        let (session, died) = daemon.with(&self.device, &mut world, |cx| {
            Session::new(beginning, now, cx)
        });
        if died {
            let promise = Promise {
                epoch,
                acked: upto,
                flushed: upto,
                in_doubt: false,
            };
            self.promises.insert(id, promise);
            return Attach::Died;
        }
        daemon.sessions.insert(n, session.unwrap());
        Attach::Serves
    }

    fn begin(
        &mut self,
        id: VolumeId,
        claimed: Claimed,
        taken: Taken,
        upto: u64,
        journal: Option<Journal>,
    ) -> Beginning {
        let daemon = self.daemon.as_mut().unwrap();
        let head = &claimed.info;
        let epoch = head.epoch;
        let read_only = journal.is_none();
        let tenant = TenantName::new(&head.tenant).unwrap();
        let group = group_of(&head.tenant);
        let params = VolumeParams {
            id,
            tenant,
            size: head.size,
            sector_size: head.sector_size,
            frame_sectors: head.frame_sectors,
            epoch,
            durability: head.durability,
            read_only,
            group,
            tuning: daemon.tuning,
        };
        let opened = Opened {
            root: Arc::clone(&claimed.root),
            log: claimed.log.clone(),
            next_chunk: claimed.next_chunk,
            stored_write: claimed.stored_write,
            unsent: taken.unsent,
            kept_segments: taken.segments,
        };
        let mut first = Vec::new();
        let volume = Volume::new(params, opened, &mut daemon.shared, &mut first);
        let (reactor, inbox) = ReactorHandle::detached().unwrap();
        let key = reactor.new_key();
        let common = Common {
            group,
            ..daemon.common.clone()
        };
        let backend = VolumeBackend::new(common, self.name.clone(), claimed, key, reactor);
        if !read_only {
            backend.start_reclaiming();
            backend.start_sweeping_orphans();
        }
        Beginning {
            epoch: epoch.get(),
            read_only,
            upto,
            volume,
            first,
            backend,
            inbox,
            journal,
            direct: false,
            snapshot: None,
            history: None,
        }
    }

    /// Begins to detach: no new requests, and everything is sent.
    pub fn detach(&mut self, n: usize) {
        let daemon = self.daemon.as_mut().unwrap();
        daemon.sessions.get_mut(&n).unwrap().stopping = true;
        daemon.leaving.insert(n, None);
    }

    /// Goes on with a detach.
    pub async fn let_go(&mut self, n: usize, mut world: Outer<'_>) -> Result<(), Died> {
        let daemon = self.daemon.as_mut().unwrap();
        let session = &daemon.sessions[&n];
        match daemon.leaving.get_mut(&n).unwrap() {
            None if session.in_flight() > 0 => return Ok(()),
            waiting @ None => {
                let backend = Arc::clone(&session.backend);
                *waiting = Some(tokio::spawn(async move {
                    backend.stop_reclaiming().await;
                    backend.stop_sweeping_orphans().await;
                    backend.drain(true).await
                }));
                return daemon.drive(n, &self.device, &mut world, |session, cx| session.stop(cx));
            }
            Some(drained) if !drained.is_finished() || !session.is_idle() => return Ok(()),
            Some(_) => {}
        }
        let drained = daemon.leaving.remove(&n).flatten().unwrap();
        let drained = drained.await.unwrap();
        let session = daemon.sessions.remove(&n).unwrap();
        world.outcome.cut_short += u64::from(session.history.is_some());
        let truth = world.truth;
        let (epoch, acked) = (session.epoch, session.acked);
        let stats = session.volume.stats();
        session.backend.close().await;
        let kept = session.volume.close(&mut daemon.shared);
        if drained && kept.is_empty() {
            truth.reported(epoch, acked, "a detach");
            assert!(
                (stats.dirty_bytes, stats.dirty_entries) == (0, 0)
                    && (stats.log_entries == 0 || session.damaged),
                "volume {}: all is sent and folded into the map, it says",
                truth.index
            );
            let (store, backend) = (daemon.lane.clone(), session.backend);
            // Its answer is waited for by nobody here; an owner that stays is forced away.
            tokio::spawn(async move { give_back(&store, backend.head()).await });
        } else {
            let promise = Promise {
                epoch,
                acked: session.flushed,
                flushed: session.flushed,
                in_doubt: daemon.failure.get().is_err(),
            };
            self.promises.insert(truth.id, promise);
        }
        match settle(&*self.device, &self.journals, truth.id, &kept) {
            Ok(Some(found)) => {
                daemon.kept.insert(truth.id, found);
            }
            Ok(None) => {}
            Err(_) => {
                daemon.unsettled.insert(truth.id, kept);
            }
        }
        Ok(())
    }
}

fn kind(error: &OpenError) -> &'static str {
    match error {
        OpenError::Owned { .. } => "owned",
        OpenError::Taken => "taken",
        OpenError::Deleted => "deleted",
        OpenError::Stale { .. } => "stale",
        OpenError::Lost { .. } => "lost",
        OpenError::InDoubt { .. } => "in doubt",
        OpenError::Unsent => "unsent",
        OpenError::NoSnapshot { .. } => "no snapshot",
        OpenError::Future { .. } => "future",
        OpenError::NotKept { .. } => "not kept",
        OpenError::Raced { .. } => "raced",
        OpenError::Damaged { .. } => "damaged",
        OpenError::Cache(_) => "cache",
        OpenError::Store(_) => "store",
    }
}
