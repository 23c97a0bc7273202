//! What an operator asks of a daemon about the life of volumes: the engine's order of steps, of the same
//! parts, each given up when its daemon dies.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use quarry_cache::Recovered;
use quarry_gateway::backend::open::{Claim, give_back, hold};
use quarry_gateway::backend::{Chore, ChoreError, HeadError, VolumeBackend};
use quarry_gateway::control::VolumeRef;
use quarry_gateway::snapshot::{self, CloneSpec, SnapshotError};
use quarry_gateway::trash::{self, Purged, TrashError};
use quarry_objfmt::{KeyGeneration, SnapName, VolumeId, VolumeName};
use quarry_volume::Event;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::attach::CONTROL_DEADLINE;
use super::{Host, group_of};
use crate::life::GRACE_MS;
use crate::oracle::Truth;
use crate::secrets;

/// How long the steps of a snapshot are waited for, as in the engine.
const STORE_WAIT_MAX: Duration = Duration::from_secs(60);

/// What is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ask {
    /// By whoever serves the volume.
    Snapshot(String),
    /// By whoever serves the volume, or of one that nobody does.
    Unmake(String),
    /// The clone's index, and whether its name turns out to be taken.
    Clone {
        snapshot: String,
        clone: usize,
        taken: bool,
    },
    RollBack(String),
    Delete,
    Restore,
    Purge,
    /// By whoever serves the volume.
    Compact {
        held: bool,
    },
    Flatten,
}

/// Why it was not done.
#[derive(Debug)]
pub enum Not {
    Snapshot(SnapshotError),
    Trash(TrashError),
    /// It is to be purged another time, or was restored.
    Purged,
    Chore(ChoreError),
    /// The volume could not send what it has.
    Unsent,
    InTime,
}

impl From<SnapshotError> for Not {
    fn from(error: SnapshotError) -> Self {
        Self::Snapshot(error)
    }
}

impl From<TrashError> for Not {
    fn from(error: TrashError) -> Self {
        Self::Trash(error)
    }
}

/// A call under way.
pub struct Call {
    pub n: usize,
    pub ask: Ask,
    pub task: JoinHandle<Result<(), Not>>,
}

/// A volume, as people name it.
pub fn name_of(truth: &Truth) -> VolumeRef {
    VolumeRef {
        tenant: truth.tenant.clone(),
        name: VolumeName::new(format!("v{}", truth.index)).unwrap(),
    }
}

impl super::Daemon {
    /// Whether a call is under way that has volume `n` to itself here.
    pub fn is_called(&self, n: usize) -> bool {
        let apart = |call: &Call| !matches!(call.ask, Ask::Clone { .. } | Ask::Purge);
        self.calls.iter().any(|call| call.n == n && apart(call))
    }

    /// Whether nothing is done with volume `n` here.
    pub fn is_away(&self, n: usize) -> bool {
        let served = self.sessions.contains_key(&n) || self.opening.contains_key(&n);
        !served && !self.is_called(n)
    }
}

impl Host {
    /// Begins what is asked of volume `n`, in the name of `by`. `clone` is the id that a clone gets, and the seed of its key.
    pub fn call(
        &mut self,
        n: usize,
        truth: &Truth,
        ask: Ask,
        by: Claim,
        clone: Option<(VolumeId, u64)>,
    ) {
        let daemon = self.daemon.as_mut().unwrap();
        let store = daemon.lane.with_deadline(CONTROL_DEADLINE);
        let background = daemon.lane.background();
        let (tenant, id, encrypted) = (truth.tenant.clone(), truth.id, truth.encrypted);
        let serving = daemon.sessions.get(&n).filter(|s| !s.read_only);
        let backend = serving.map(|session| Arc::clone(&session.backend));
        let at_least = serving.map(|session| session.volume.last_acknowledged());
        let snap = |name: &str| SnapName::new(name).unwrap();
        let volume = name_of(truth);
        let asked = ask.clone();
        let task = async move {
            match asked {
                Ask::Snapshot(name) => {
                    let backend = backend.expect("asked of who serves it");
                    if !backend.drain(true).await {
                        return Err(Not::Unsent);
                    }
                    let (head, name) = (backend.head(), snap(&name));
                    let at_least = at_least.unwrap_or_default();
                    let made = snapshot::create(&store, head, &name, at_least, by.now_ms);
                    let made = timeout(STORE_WAIT_MAX, made).await;
                    tell_if_fenced(&backend, made.map_err(|_| Not::InTime)?.map(drop)).await
                }
                Ask::Unmake(name) => {
                    let name = snap(&name);
                    if let Some(backend) = backend {
                        let gone = snapshot::delete(&store, backend.head(), &name, by.now_ms);
                        let gone = timeout(STORE_WAIT_MAX, gone).await;
                        let gone = gone.map_err(|_| Not::InTime)?;
                        return tell_if_fenced(&backend, gone).await;
                    }
                    let held = hold(&store, &tenant, id, &by).await;
                    let (head, was_ours) = held.map_err(SnapshotError::from)?;
                    let gone = snapshot::delete(&store, &head, &name, by.now_ms);
                    let gone = timeout(STORE_WAIT_MAX, gone).await;
                    if !was_ours {
                        // Its answer makes no difference.
                        let _ = give_back(&store, &head).await;
                    }
                    Ok(gone.map_err(|_| Not::InTime)??)
                }
                Ask::Clone {
                    snapshot,
                    clone: index,
                    taken,
                } => {
                    let (clone, seed) = clone.unwrap();
                    let spec = CloneSpec {
                        tenant,
                        parent: id,
                        snapshot: snap(&snapshot),
                        volume: clone,
                        name: VolumeName::new(format!("v{index}")).unwrap(),
                        key: encrypted.then(|| secrets::key(clone, KeyGeneration::FIRST, seed)),
                        now_ms: by.now_ms,
                    };
                    snapshot::make_clone(&store, &spec).await?;
                    if taken {
                        let clone = VolumeRef {
                            tenant: spec.tenant,
                            name: spec.name,
                        };
                        // The name is another's.
                        let _ = trash::put(&store, &clone, spec.volume, by.cache, by.now_ms).await;
                    }
                    Ok(())
                }
                Ask::RollBack(name) => {
                    let name = snap(&name);
                    let back = snapshot::roll_back(&store, &tenant, id, &name, &by);
                    let back = timeout(STORE_WAIT_MAX, back).await;
                    Ok(back.map_err(|_| Not::InTime)?.map(drop)?)
                }
                Ask::Delete => Ok(trash::put(&store, &volume, id, by.cache, by.now_ms)
                    .await
                    .map(drop)?),
                Ask::Restore => Ok(trash::restore(&store, &tenant, id, None).await.map(drop)?),
                Ask::Compact { held } => do_chore(backend, Chore::Compact { held }).await,
                Ask::Flatten => do_chore(backend, Chore::Flatten).await,
                Ask::Purge => {
                    let objects = AtomicU64::new(0);
                    let now_ms = by.now_ms;
                    match trash::purge(&background, &tenant, id, now_ms, GRACE_MS, &objects).await?
                    {
                        Purged::Gone => Ok(()),
                        Purged::NotDue { .. } | Purged::Restored => Err(Not::Purged),
                    }
                }
            }
        };
        let task = tokio::spawn(task);
        daemon.calls.push(Call { n, ask, task });
    }

    /// Gives up what the cache kept of a volume that is no more, as the engine does.
    pub fn forget(&mut self, volume: VolumeId) {
        let daemon = self.daemon.as_mut().unwrap();
        self.promises.remove(&volume);
        let Some(kept) = daemon.kept.remove(&volume) else {
            return;
        };
        self.journals.remove(volume).unwrap();
        Recovered::forget(&*self.device, volume, &kept.segments).unwrap();
        for segment in &kept.segments {
            daemon.shared.cache.part_with(segment.segment, false);
        }
    }

    /// Drops what the cache has of a volume and the store has too.
    pub fn evict(&mut self, truth: &Truth) {
        let daemon = self.daemon.as_mut().unwrap();
        let group = group_of(truth.tenant.as_str());
        daemon.shared.evict(group, truth.id);
        daemon.common.fetches.evict(group, truth.id);
    }
}

async fn do_chore(backend: Option<Arc<VolumeBackend>>, chore: Chore) -> Result<(), Not> {
    let backend = backend.expect("asked of who serves it");
    backend.do_chore(chore).await.map(drop).map_err(Not::Chore)
}

/// Tells an attachment that it is fenced, if that was found.
async fn tell_if_fenced(
    backend: &VolumeBackend,
    done: Result<(), SnapshotError>,
) -> Result<(), Not> {
    if let Err(SnapshotError::Head(HeadError::Fenced { by })) = &done {
        backend.tell(Event::Fenced { by: by.clone() }).await;
    }
    Ok(done?)
}
