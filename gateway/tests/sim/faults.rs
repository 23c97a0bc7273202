//! What was really done to a run, by kind: counted where it happens, not where it is planned.

use std::sync::Arc;

use parking_lot::Mutex;

use super::counts::{Counts, counted};

counted! {
    /// A fault that happened.
    Fault {
        // The cache device.
        WriteFailed: "device: a write failed, some of it arrived",
        FillFailed: "device: a write of fetched data failed",
        ReadFailed: "device: a read failed",
        SyncFailed: "device: a sync failed",
        SectorLostBySync: "device: a sector that a failed sync lost",
        SectorLostByPower: "device: an unsynced sector that a power cut lost",
        SectorKeptByPower: "device: an unsynced sector that a power cut kept",
        InFlightLost: "device: a write under way at a death that did not arrive",
        InFlightTorn: "device: a write under way at a death that arrived in part",
        InFlightWhole: "device: a write under way at a death that arrived",
        RecordFlipped: "device: a bit of a record page flipped",
        RecoveryCutShort: "host: died while its recovery wrote",
        // The store.
        ErrorBefore: "store: an error, and nothing was done",
        ErrorAfter: "store: an error, and it was done",
        LostBefore: "store: no answer, and nothing was done",
        LostAfter: "store: no answer, and it was done at once",
        LateEffect: "store: no answer, and it was done up to a minute later",
        ShortBody: "store: a body that ended early",
        WrongBody: "store: a body with a bit flipped",
        Slow: "store: an answer that took seconds",
        Outage: "store: an outage",
        RefusedByOutage: "store: a request that an outage refused",
        // Direct reads.
        DirectFailed: "direct read: failed, some of it received",
    }
}

/// Where all of a run count.
#[derive(Clone, Default, Debug)]
pub struct Faults(Arc<Mutex<Counts<Fault>>>);

impl Faults {
    pub fn note(&self, fault: Fault) {
        self.0.lock().note(fault);
    }

    pub fn counts(&self) -> Counts<Fault> {
        self.0.lock().clone()
    }
}
