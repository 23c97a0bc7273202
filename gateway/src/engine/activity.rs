//! What goes on, as the status page and `quarry top` see it: what the volumes' reactors know, and nothing of the store.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt as _;
use quarry_objfmt::TenantName;

use super::report::problem_of;
use super::scrape::{LOOKS_AT_ONCE, look_at};
use super::slot::Attached;
use super::{Daemon, now_ms};
use crate::control::{Activity, ImageRef, State, TimesInfo, VolumeActivity};
use crate::latency::{BOUNDS_US, Latencies, Timed};
use crate::metrics::VOLUMES_MAX;

impl Daemon {
    /// What goes on; of a tenant only, if one is named.
    pub(super) async fn tell_activity(&self, tenant: Option<&TenantName>) -> Activity {
        let is_asked = |image: &ImageRef| tenant.is_none_or(|t| *t == image.volume.tenant);
        let wanted = self
            .wanted
            .all()
            .into_iter()
            .map(|(image, _)| (image, None));
        let mut here: BTreeMap<ImageRef, Option<Arc<Attached>>> = wanted.collect();
        let attached = self.attached().into_iter();
        here.extend(attached.map(|(image, attached)| (image, Some(attached))));
        here.retain(|image, _| is_asked(image));
        let volumes_left_out = here.len().saturating_sub(VOLUMES_MAX);
        let mut here: Vec<_> = here.into_iter().collect();
        if volumes_left_out > 0 {
            // Those that are not attached come last, and are counted in the daemon's status.
            here.sort_by_key(|(_, attached)| attached.as_ref().map_or(u64::MAX, |a| a.since_ms));
            here.truncate(VOLUMES_MAX);
            here.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        let looks = here.into_iter().map(async |(image, attached)| {
            let slot = self.slots.lock().get(&image).cloned().unwrap_or_default();
            let state = match slot.state() {
                // It is to be attached.
                State::Detached => State::Attaching,
                state => state,
            };
            match attached {
                Some(attached) => {
                    let cached = self.cached_bytes(&attached);
                    volume_activity(&image, state, &attached, cached).await
                }
                None => VolumeActivity {
                    volume: image.to_string(),
                    state,
                    problem: self.wanted.problem(&image),
                    ..VolumeActivity::default()
                },
            }
        });
        let looks = futures::stream::iter(looks).buffered(LOOKS_AT_ONCE);
        let volumes = looks.collect().await;
        let daemon = match tenant {
            Some(_) => None,
            None => {
                let mut status = self.tell_status().await;
                status.audit_problem = self.access.audit_problem();
                Some(status)
            }
        };
        Activity {
            at_ms: now_ms(),
            daemon,
            bounds_us: BOUNDS_US.to_vec(),
            volumes,
            volumes_left_out: volumes_left_out as u64,
            waits: Vec::new(),
        }
    }
}

async fn volume_activity(
    image: &ImageRef,
    state: State,
    attached: &Attached,
    cached_bytes: u64,
) -> VolumeActivity {
    let seen = look_at(attached).await;
    let s = seen.stats;
    VolumeActivity {
        volume: image.to_string(),
        state,
        via: Some(attached.info.via),
        mode: attached.mode.to_owned(),
        since_ms: attached.since_ms,
        size_bytes: attached.backend.head().get().size.bytes(),
        reads: s.reads,
        read_bytes: s.read_bytes,
        writes: s.writes,
        write_bytes: s.write_bytes,
        flushes: s.flushes,
        errors: s.errors,
        hit_bytes: s.hit_bytes,
        miss_bytes: s.miss_bytes,
        in_flight: s.in_flight,
        held: attached.gate.stats().held,
        dirty_bytes: s.dirty_bytes,
        rpo_ms: s.rpo_ms,
        cached_bytes,
        uploaded_bytes: s.uploaded_bytes,
        times: times(&seen.latencies),
        stalled: s.stalled,
        problem: problem_of(attached),
    }
}

fn times(latencies: &Latencies) -> Vec<TimesInfo> {
    let of = |timed: Timed| {
        let histogram = latencies.of(timed)?;
        Some(TimesInfo {
            op: timed.as_str().to_owned(),
            count: histogram.count(),
            sum_us: histogram.sum_ns() / 1000,
            below: histogram.cumulative().to_vec(),
        })
    };
    Timed::REQUESTS.into_iter().filter_map(of).collect()
}
