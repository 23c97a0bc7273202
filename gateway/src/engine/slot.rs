//! A volume's place in the engine: what it is doing here, and the right to change that.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use quarry_volume::Event;

use super::access::Access;
use super::owners::Owned;
use super::tenants::Tenant;
use crate::backend::{HeadError, VolumeBackend};
use crate::control::{AttachInfo, State};
use crate::qos::VolumeGate;
use crate::store::StoreStats;
use crate::ublk;

/// A volume attached here.
pub(super) struct Attached {
    pub(super) backend: Arc<VolumeBackend>,
    /// Whose it is stays so for as long.
    pub(super) _owned: Option<Arc<Owned>>,
    /// Whose it is.
    pub(super) tenant: Arc<Tenant>,
    /// What was asked of the store for it.
    pub(super) account: Arc<StoreStats>,
    /// How fast it may be used.
    pub(super) gate: Arc<VolumeGate>,
    pub(super) info: AttachInfo,
    /// How its data travel, for people.
    pub(super) mode: &'static str,
    /// Queues of its block device.
    pub(super) queues: u16,
    pub(super) since_ms: u64,
    pub(super) read_only: bool,
    pub(super) access: Access,
    pub(super) device: Option<(u32, ublk::DeviceSpec)>,
    /// Bytes of the volume that its device or its export shows.
    pub(super) shown: AtomicU64,
    /// Whether misses go around the daemon's memory, or why not; `None` if nobody asked for that.
    pub(super) direct: Option<Result<(), String>>,
}

impl Attached {
    /// Tells the volume that it is fenced, if a change of its head found that.
    pub(super) async fn tell_if_fenced(&self, error: &HeadError) {
        if let HeadError::Fenced { by } = error {
            self.backend.tell(Event::Fenced { by: by.clone() }).await;
        }
    }
}

/// How far a volume is attached.
#[derive(Clone, Default)]
pub(super) enum Stage {
    #[default]
    Detached,
    Attaching,
    Attached(Arc<Attached>),
    Detaching(Arc<Attached>),
}

impl Stage {
    pub(super) fn attached(&self) -> Option<&Arc<Attached>> {
        match self {
            Self::Attached(attached) | Self::Detaching(attached) => Some(attached),
            Self::Detached | Self::Attaching => None,
        }
    }
}

/// One volume's place. Looking never waits for changing.
#[derive(Default)]
pub(super) struct Slot {
    /// Held for as long as a call changes the volume.
    pub(super) change: tokio::sync::Mutex<()>,
    stage: Mutex<Stage>,
}

impl Slot {
    pub(super) fn stage(&self) -> Stage {
        self.stage.lock().clone()
    }

    /// Only by who holds `change`.
    pub(super) fn set(&self, stage: Stage) {
        *self.stage.lock() = stage;
    }

    pub(super) fn is_detached(&self) -> bool {
        matches!(*self.stage.lock(), Stage::Detached)
    }

    pub(super) fn state(&self) -> State {
        match &*self.stage.lock() {
            Stage::Detached => State::Detached,
            Stage::Attaching => State::Attaching,
            Stage::Detaching(_) => State::Detaching,
            Stage::Attached(attached) => {
                let condition = attached.backend.condition();
                match (condition.fenced, condition.failed) {
                    (true, _) => State::Fenced,
                    (_, true) => State::Failed,
                    _ => State::Attached,
                }
            }
        }
    }
}
