//! Metrics: one table of all names, helps and labels, and their text at a scrape.
//!
//! Owns the names and nothing that is counted: the engine hands over a [`Snapshot`] of plain counters, and [`render`] is
//! a pure function of it. So a name exists once, counters of I/O paths stay plain integers, and the cost of metrics falls
//! due at the scrape. The table is in parts, by subject; docs/METRICS.md is made from it.
//!
//! The text is made metric by metric by the `prometheus` crate: of 1,000 busy volumes it has about 140,000 lines.
//!
//! **Invariants:**
//! - names follow Prometheus' conventions: base units, `_total` on counters only;
//! - labels are names of tenants, volumes and reactors, and words of a fixed list; of volumes there are [`VOLUMES_MAX`]
//!   at most, of tenants [`TENANTS_MAX`], and a metric says how many were left out.

mod cache;
mod daemon;
mod definition;
#[cfg(test)]
mod page;
mod store;
mod tenant;
#[cfg(test)]
mod tests;
mod text;
mod volume;

pub use self::cache::CacheStats;
pub use self::daemon::{AuditStats, DaemonStats, ProcessStats, ReactorCounts, TrashStats};
pub use self::store::{StoreCall, StoreStats, UploadStats};
pub use self::tenant::{TenantSample, TenantStats};
pub use self::volume::{VolumeSample, VolumeStats};

use self::definition::Definition;
use crate::nbd::ClientStats;
use crate::trace::TraceStats;

/// Volumes that have metrics of their own: those that have been attached for the longest time. Each may have 140 series.
pub const VOLUMES_MAX: usize = 1000;

/// Tenants that have metrics of their own, each up to 80 series.
pub const TENANTS_MAX: usize = 1000;

/// All that the engine counts, at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    /// Attached volumes, [`VOLUMES_MAX`] at most.
    pub volumes: Vec<VolumeSample>,
    /// Tenants, [`TENANTS_MAX`] at most.
    pub tenants: Vec<TenantSample>,
    /// Uploads.
    pub uploads: UploadStats,
    /// Reactors, by their number.
    pub reactors: Vec<ReactorCounts>,
    /// The cache device.
    pub cache: CacheStats,
    /// The object stores.
    pub store: StoreStats,
    /// The trash.
    pub trash: TrashStats,
    /// The audit log.
    pub audit: AuditStats,
    /// The clients of NBD.
    pub nbd: ClientStats,
    /// Traces, if there is a collector.
    pub traces: Option<TraceStats>,
    /// The daemon.
    pub daemon: DaemonStats,
    /// Its process.
    pub process: ProcessStats,
}

/// The table's parts: their titles, what they are of, and their metrics.
static PARTS: [(&str, &str, &[Definition]); 5] = [
    (
        "Volumes",
        "One series for each attached volume, snapshot or past state, counted since it was attached. A label `volume` is `name`, `name@snapshot` or `name@time`.",
        volume::TABLE,
    ),
    (
        "Tenants",
        "One series for each tenant that this daemon knows, counted since the daemon started.",
        tenant::TABLE,
    ),
    (
        "Object stores",
        "All stores that this daemon uses, together, counted since it started.",
        store::TABLE,
    ),
    ("Cache device", "", cache::TABLE),
    ("Daemon", "", daemon::TABLE),
];

fn table() -> impl Iterator<Item = &'static Definition> {
    PARTS.iter().flat_map(|(_, _, definitions)| *definitions)
}

/// The text of a scrape.
#[must_use]
pub fn render(snapshot: &Snapshot) -> String {
    // About what a scrape of so many busy volumes takes, so that it does not grow page by page.
    let mut text = String::with_capacity(20_000 + snapshot.volumes.len() * 8_000);
    for definition in table() {
        definition.write(snapshot, &mut text);
    }
    text
}
