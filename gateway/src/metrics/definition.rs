//! What a metric is, and how its lines come about.

use super::text::Family;
use super::{
    AuditStats, DaemonStats, ProcessStats, TenantStats, TrashStats, UploadStats, VolumeStats,
};
use super::{CacheStats, ReactorCounts, Snapshot, StoreStats, TenantSample, VolumeSample};
use prometheus::proto::MetricType;

use crate::latency::{BOUNDS_US, Timed};

/// Where a metric's values come from.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// One value a volume.
    Volume(fn(&VolumeStats) -> f64),
    /// A histogram a volume and kind of request, of those that it had.
    Latency(&'static [Timed]),
    /// One value a tenant.
    Tenant(fn(&TenantStats) -> f64),
    /// One value a tenant of which it is known.
    TenantIf(fn(&TenantStats) -> Option<u64>),
    /// One value a reactor.
    Reactor(fn(&ReactorCounts) -> f64),
    Uploads(fn(&UploadStats) -> f64),
    Cache(fn(&CacheStats) -> f64),
    Store(fn(&StoreStats) -> f64),
    Trash(fn(&TrashStats) -> f64),
    Audit(fn(&AuditStats) -> f64),
    Daemon(fn(&DaemonStats) -> f64),
    Process(fn(&ProcessStats) -> f64),
    /// With these labels, written by itself.
    Own(&'static [&'static str], fn(&Snapshot, &mut Family<'_>)),
}

/// A metric.
pub(super) struct Definition {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: MetricType,
    pub(super) source: Source,
}

const fn of_kind(
    kind: MetricType,
    name: &'static str,
    help: &'static str,
    source: Source,
) -> Definition {
    Definition {
        name,
        help,
        kind,
        source,
    }
}

pub(super) const fn counter(name: &'static str, help: &'static str, source: Source) -> Definition {
    of_kind(MetricType::COUNTER, name, help, source)
}

pub(super) const fn gauge(name: &'static str, help: &'static str, source: Source) -> Definition {
    of_kind(MetricType::GAUGE, name, help, source)
}

pub(super) const fn histogram(
    name: &'static str,
    help: &'static str,
    source: Source,
) -> Definition {
    of_kind(MetricType::HISTOGRAM, name, help, source)
}

/// Exact below 2^53: for bytes, 8 PiB.
pub(super) const fn count(value: u64) -> f64 {
    value as f64
}

/// A field of a source's counters as a value in base units.
macro_rules! of {
    ($source:ident . $field:ident) => {
        Source::$source(|stats| crate::metrics::definition::count(stats.$field))
    };
    ($source:ident . $field:ident in micros) => {
        Source::$source(|stats| crate::metrics::definition::count(stats.$field) / 1_000_000.0)
    };
    ($source:ident . $field:ident in ms) => {
        Source::$source(|stats| crate::metrics::definition::count(stats.$field) / 1000.0)
    };
}
pub(super) use of;

impl Definition {
    /// Its labels, in the order in which they are written; a histogram's `le` is not among them.
    pub(super) const fn labels(&self) -> &'static [&'static str] {
        match self.source {
            Source::Volume(_) => &["tenant", "volume"],
            // One kind needs no label.
            Source::Latency([_]) => &["tenant", "volume"],
            Source::Latency(_) => &["tenant", "volume", "op"],
            Source::Tenant(_) | Source::TenantIf(_) => &["tenant"],
            Source::Reactor(_) => &["reactor"],
            Source::Own(labels, _) => labels,
            Source::Uploads(_)
            | Source::Cache(_)
            | Source::Store(_)
            | Source::Trash(_)
            | Source::Audit(_)
            | Source::Daemon(_)
            | Source::Process(_) => &[],
        }
    }

    /// Appends its lines, if it has values.
    pub(super) fn write(&self, snapshot: &Snapshot, out: &mut String) {
        let mut family = Family::begin(self.name, self.help, self.kind, self.labels(), out);
        self.fill(&mut family, snapshot);
        family.end();
    }

    fn fill(&self, family: &mut Family<'_>, snapshot: &Snapshot) {
        let all = snapshot;
        match self.source {
            Source::Volume(value) => all.volumes.iter().for_each(|v| {
                family.sample(&[&v.tenant, &v.volume], value(&v.stats));
            }),
            Source::Latency(kinds) => write_latencies(kinds, &all.volumes, family),
            Source::Tenant(value) => all.tenants.iter().for_each(|t| {
                family.sample(&[&t.tenant], value(&t.stats));
            }),
            Source::TenantIf(value) => {
                let known = |t: &TenantSample| Some((t.tenant.clone(), value(&t.stats)?));
                for (tenant, value) in all.tenants.iter().filter_map(known) {
                    family.sample(&[&tenant], count(value));
                }
            }
            Source::Reactor(value) => {
                for (n, counts) in all.reactors.iter().enumerate() {
                    family.sample(&[&n.to_string()], value(counts));
                }
            }
            Source::Uploads(value) => family.sample(&[], value(&all.uploads)),
            Source::Cache(value) => family.sample(&[], value(&all.cache)),
            Source::Store(value) => family.sample(&[], value(&all.store)),
            Source::Trash(value) => family.sample(&[], value(&all.trash)),
            Source::Audit(value) => family.sample(&[], value(&all.audit)),
            Source::Daemon(value) => family.sample(&[], value(&all.daemon)),
            Source::Process(value) => family.sample(&[], value(&all.process)),
            Source::Own(_, write) => write(all, family),
        }
    }
}

fn write_latencies(kinds: &[Timed], volumes: &[VolumeSample], family: &mut Family<'_>) {
    let bounds = BOUNDS_US.map(|us| count(us) / 1_000_000.0);
    for v in volumes {
        for kind in kinds {
            let Some(times) = v.latencies.of(*kind) else {
                continue;
            };
            let labels: &[&str] = match kinds.len() {
                1 => &[&v.tenant, &v.volume],
                _ => &[&v.tenant, &v.volume, kind.as_str()],
            };
            let below = times.cumulative();
            let seconds = count(times.sum_ns()) / 1_000_000_000.0;
            family.histogram(labels, &bounds, &below, times.count(), seconds);
        }
    }
}
