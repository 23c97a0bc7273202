//! What an operator asks of an attached volume: to send all that it holds, to grow, and to fetch what its
//! cache lacks.

use std::time::Duration;

use quarry_gateway::backend::{HeadError, VolumeBackend, Warmed};
use quarry_gateway::keys::drop_copies_before;
use quarry_gateway::keys::rotate::{Place, put_new_key};
use quarry_gateway::store::Lane;
use quarry_objfmt::head::Head;
use quarry_objfmt::wrapped::KEYS_MAX;
use quarry_objfmt::{LbaRange, Sectors, TenantName, VolumeId, WrappedKeys};
use quarry_volume::{Event, WarmEnd};
use rand::RngExt;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::attach::CONTROL_DEADLINE;
use super::{Host, Outer};
use crate::oracle::range;
use crate::outcome::Deed;
use crate::secrets;
use crate::session::{Died, Session};

/// How long a change of the head is waited for, as in the engine.
const HEAD_WAIT_MAX: Duration = Duration::from_secs(30);

/// Sectors by which a volume grows at least.
const GROWTH_SECTORS: u64 = 32;

/// One that is under way.
pub struct Errand {
    n: usize,
    epoch: u32,
    what: What,
}

enum What {
    Drain { acked: u64, task: JoinHandle<bool> },
    Grow(JoinHandle<Option<Result<Head, HeadError>>>),
    Warm(LbaRange, JoinHandle<Option<Warmed>>),
    Rotate(JoinHandle<Result<(), NotRotated>>),
}

/// Why there is no new key, or it is not known.
enum NotRotated {
    Fenced(String),
    Changed,
    Store,
}

impl Errand {
    pub fn abort(&self) {
        match &self.what {
            What::Drain { task, .. } => task.abort(),
            What::Grow(task) => task.abort(),
            What::Warm(_, task) => task.abort(),
            What::Rotate(task) => task.abort(),
        }
    }

    fn is_finished(&self) -> bool {
        match &self.what {
            What::Drain { task, .. } => task.is_finished(),
            What::Grow(task) => task.is_finished(),
            What::Warm(_, task) => task.is_finished(),
            What::Rotate(task) => task.is_finished(),
        }
    }
}

impl Host {
    /// Asks volume `n`, which is served here, to send what was acknowledged.
    pub fn drain(&mut self, n: usize, checkpoint: bool) {
        let daemon = self.daemon.as_mut().unwrap();
        let session = &daemon.sessions[&n];
        let backend = session.backend.clone();
        let what = What::Drain {
            acked: session.acked,
            task: tokio::spawn(async move { backend.drain(checkpoint).await }),
        };
        let epoch = session.epoch;
        daemon.errands.push(Errand { n, epoch, what });
    }

    /// Grows volume `n`, which is served here, if it is not at its largest.
    pub fn grow(&mut self, n: usize, outer: &mut Outer<'_>) {
        let daemon = self.daemon.as_mut().unwrap();
        let session = &daemon.sessions[&n];
        let size = session.volume.size().get() + GROWTH_SECTORS * outer.rng.random_range(1..3);
        if size > outer.truth.size_max || daemon.has_errand(n) {
            return;
        }
        let backend = session.backend.clone();
        let store = daemon.lane.with_deadline(CONTROL_DEADLINE);
        let size = Sectors::new(size);
        let task = tokio::spawn(async move {
            let grown = backend.head().update(&store, |head| {
                head.size = head.size.max(size);
            });
            timeout(HEAD_WAIT_MAX, grown).await.ok()
        });
        let (epoch, what) = (session.epoch, What::Grow(task));
        daemon.errands.push(Errand { n, epoch, what });
    }

    /// Asks volume `n`, which is served here, to fetch a part of it into the cache.
    pub fn warm(&mut self, n: usize, outer: &mut Outer<'_>) {
        let daemon = self.daemon.as_mut().unwrap();
        let session = &daemon.sessions[&n];
        let size = session.volume.size().get();
        let start = outer.rng.random_range(0..size);
        // Perhaps behind the end.
        let range = range(start, outer.rng.random_range(1..=size));
        let backend = session.backend.clone();
        let task = tokio::spawn(async move { backend.warm(range).await });
        let (epoch, what) = (session.epoch, What::Warm(range, task));
        daemon.errands.push(Errand { n, epoch, what });
    }

    /// Gives volume `n`, which is served here, a new data key.
    pub fn rotate(&mut self, n: usize, outer: &mut Outer<'_>) {
        let daemon = self.daemon.as_mut().unwrap();
        let session = &daemon.sessions[&n];
        if session.read_only || daemon.has_errand(n) {
            return;
        }
        let seed = outer.rng.random();
        let backend = session.backend.clone();
        let store = daemon.lane.with_deadline(CONTROL_DEADLINE);
        let (tenant, volume) = (outer.truth.tenant.clone(), outer.truth.id);
        let task =
            tokio::spawn(async move { rotate(&backend, &store, &tenant, volume, seed).await });
        let (epoch, what) = (session.epoch, What::Rotate(task));
        daemon.errands.push(Errand { n, epoch, what });
    }

    /// Ends what is done of volume `n`.
    pub async fn end_errands(&mut self, n: usize, mut outer: Outer<'_>) -> Result<(), Died> {
        let daemon = self.daemon.as_mut().unwrap();
        let (done, left) = std::mem::take(&mut daemon.errands)
            .into_iter()
            .partition(|errand| errand.n == n && errand.is_finished());
        daemon.errands = left;
        let done: Vec<Errand> = done;
        for Errand { epoch, what, .. } in done {
            let event = match what {
                What::Drain { acked, task } => {
                    if task.await.expect("a drain does not panic") {
                        outer.truth.reported(epoch, acked, "a drain");
                    }
                    continue;
                }
                What::Grow(task) => match task.await.expect("a change does not panic") {
                    Some(Ok(head)) => {
                        outer.truth.grown = outer.truth.grown.max(head.size.get());
                        Event::Grown { size: head.size }
                    }
                    Some(Err(HeadError::Fenced { by })) => Event::Fenced { by },
                    Some(Err(_)) | None => continue,
                },
                What::Rotate(task) => match task.await.expect("a change does not panic") {
                    Ok(()) => {
                        outer.outcome.deeds.note(Deed::Rotated);
                        continue;
                    }
                    Err(NotRotated::Fenced(by)) => Event::Fenced { by },
                    Err(NotRotated::Changed | NotRotated::Store) => continue,
                },
                What::Warm(asked, task) => {
                    let Some(warmed) = task.await.expect("a step does not panic") else {
                        continue;
                    };
                    outer.digest.add((warmed.upto.get(), warmed.bytes));
                    assert!(asked.start <= warmed.upto && warmed.upto <= asked.end);
                    let damaged = warmed.end == WarmEnd::Damaged;
                    let lacks = |s: &Session| s.damaged || s.hurt;
                    let session = daemon.sessions.get(&n).filter(|s| s.epoch == epoch);
                    assert!(
                        !damaged || session.is_none_or(lacks),
                        "volume {n}: warming finds damage that nobody told of"
                    );
                    continue;
                }
            };
            if daemon.sessions.get(&n).is_some_and(|s| s.epoch == epoch) {
                daemon.drive(n, &self.device, &mut outer, |session, cx| {
                    session.feed(event, cx)
                })?;
            }
        }
        Ok(())
    }
}

/// The steps of the engine.
async fn rotate(
    backend: &VolumeBackend,
    store: &Lane,
    tenant: &TenantName,
    volume: VolumeId,
    seed: u64,
) -> Result<(), NotRotated> {
    let head = backend.head().get();
    let newest = head.keys.newest(volume).map(|key| key.generation);
    if newest > backend.newest_generation() {
        // An earlier one, of which it was not known.
        backend.add_keys(&secrets::opened(&head).unwrap());
        return Ok(());
    }
    if head.keys.keys.len() >= KEYS_MAX {
        return Err(NotRotated::Changed);
    }
    let make = async |place: Place| {
        let mut next = WrappedKeys {
            revision: place.revision,
            keys: head.keys.keys.clone(),
        };
        // Made anew each time, as the engine does.
        let seed = seed ^ u64::from(place.revision) << 32;
        next.insert(secrets::key(volume, place.generation, seed));
        Ok(next)
    };
    let put = put_new_key(store, tenant, volume, &head.keys, make).await;
    let next = put.map_err(|_| NotRotated::Store)?;
    let change = |now: &mut Head| match &now.keys {
        keys if *keys == next => Err(true),
        keys if *keys != head.keys => Err(false),
        _ => {
            now.keys.clone_from(&next);
            Ok(())
        }
    };
    let changed = timeout(HEAD_WAIT_MAX, backend.head().try_update(store, change)).await;
    match changed.map_err(|_| NotRotated::Store)? {
        Ok(Ok(_) | Err(true)) => {}
        Ok(Err(false)) => return Err(NotRotated::Changed),
        Err(HeadError::Fenced { by }) => return Err(NotRotated::Fenced(by)),
        Err(_) => return Err(NotRotated::Store),
    }
    let named = Head { keys: next, ..head };
    backend.add_keys(&secrets::opened(&named).unwrap());
    // Copies that stay do no harm.
    let _ = drop_copies_before(store, tenant, volume, named.keys.revision).await;
    Ok(())
}

impl super::Daemon {
    /// Whether something is under way that must end before volume `n` is detached.
    pub fn has_errand(&self, n: usize) -> bool {
        self.errands.iter().any(|errand| errand.n == n)
    }
}
