//! What goes on, for who looks at it every few seconds: the status page and `quarry top`.
//!
//! Counters only grow while `since_ms` stays the same, so that rates are made of two answers. Nothing here asks the store.

use std::time::Duration;

use axum::response::Json;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::access::Allowed;
use super::dto::{State, StatusInfo};
use super::{ApiResult, Via};

/// Reasons to wait that are told one by one.
const WAITS_MAX: usize = 32;

/// How long requests of one kind took.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TimesInfo {
    /// `read_hit`, `read_miss`, `write` or `flush`.
    pub op: String,
    /// How many there were.
    pub count: u64,
    /// How long all took together, in microseconds.
    pub sum_us: u64,
    /// How many took no longer than each of the answer's `bounds_us`.
    pub below: Vec<u64>,
}

/// A volume, a snapshot or a past state that is attached here or is to be. The counters are of this attachment.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VolumeActivity {
    /// `tenant/name`, `tenant/name@snapshot` or `tenant/name@time`.
    pub volume: String,
    /// What it is doing.
    pub state: State,
    /// By what it is attached; none: it is not yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub via: Option<Via>,
    /// How data pass between the kernel and the cache.
    pub mode: String,
    /// When it was attached.
    pub since_ms: u64,
    /// Its size.
    pub size_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that ended in an error.
    pub errors: u64,
    /// Bytes read that the cache had.
    pub hit_bytes: u64,
    /// Bytes read that the store had to give.
    pub miss_bytes: u64,
    /// Requests under way.
    pub in_flight: u64,
    /// Requests that wait for a limit.
    pub held: u64,
    /// Writes that the store does not have yet.
    pub dirty_bytes: u64,
    /// Age of the oldest of them.
    pub rpo_ms: u64,
    /// Its data on the cache device.
    pub cached_bytes: u64,
    /// Bytes of chunks uploaded.
    pub uploaded_bytes: u64,
    /// How long its requests took, by kind; those of which there was one.
    pub times: Vec<TimesInfo>,
    /// Whether writes wait for the store.
    pub stalled: bool,
    /// What is wrong with it, in a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Answer: what goes on.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Activity {
    /// When this was.
    pub at_ms: u64,
    /// How the daemon does; to a tenant, none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub daemon: Option<StatusInfo>,
    /// The bounds of `times`, in microseconds.
    pub bounds_us: Vec<u64>,
    /// What is attached here or is to be, by name; those attached for the longest time, if there are very many.
    pub volumes: Vec<VolumeActivity>,
    /// How many more there are.
    pub volumes_left_out: u64,
    /// What is waited for, a sentence each.
    pub waits: Vec<String>,
}

impl Activity {
    /// With what is waited for, as the rest of it tells.
    #[must_use]
    pub fn with_waits(mut self) -> Self {
        let mut waits = self.daemon.as_ref().map(daemon_waits).unwrap_or_default();
        waits.extend(self.volumes.iter().filter_map(volume_waits));
        let more = waits.len().saturating_sub(WAITS_MAX);
        if more > 0 {
            waits.truncate(WAITS_MAX);
            waits.push(format!("and {more} more"));
        }
        self.waits = waits;
        self
    }
}

fn daemon_waits(status: &StatusInfo) -> Vec<String> {
    let mut waits = Vec::new();
    let why = status.not_ready.as_ref();
    waits.extend(why.map(|why| format!("the daemon is not ready: {why}")));
    for store in std::iter::once(&status.store).chain(&status.tenant_stores) {
        if !store.healthy {
            let lasting = store.failing_ms.unwrap_or(0);
            let why = store.last_error.as_deref().unwrap_or("it does not answer");
            // To the second: it is read anew all the time.
            let lasting = humantime::format_duration(Duration::from_secs(lasting / 1000));
            let url = &store.url;
            waits.push(format!("store {url} has been failing for {lasting}: {why}"));
        }
    }
    if status.cache.dirty_max_bytes > 0 && status.cache.dirty_bytes >= status.cache.dirty_max_bytes
    {
        waits.push("the cache has no room for writes until the store has taken some".to_owned());
    }
    let audit = status.audit_problem.as_ref();
    waits.extend(audit.map(|why| format!("the audit log cannot be written: {why}")));
    waits
}

fn volume_waits(volume: &VolumeActivity) -> Option<String> {
    let name = &volume.volume;
    let why = match (&volume.problem, volume.state) {
        (Some(problem), State::Attaching) => format!("is to be attached: {problem}"),
        (Some(problem), _) => problem.clone(),
        (None, State::Attaching) => "is being attached".to_owned(),
        (None, State::Detaching) => "is being detached: its writes go to the store".to_owned(),
        (None, _) if volume.stalled => "writes wait for the store".to_owned(),
        (None, _) if volume.held > 0 => format!("{} requests wait for a limit", volume.held),
        (None, _) => return None,
    };
    Some(format!("{name}: {why}"))
}

pub(super) async fn activity(Allowed(engine): Allowed) -> ApiResult<Json<Activity>> {
    Ok(Json(engine.activity(None).await?.with_waits()))
}

#[cfg(test)]
mod tests {
    use super::super::dto::StoreStatus;
    use super::*;

    fn volume(name: &str, state: State) -> VolumeActivity {
        VolumeActivity {
            volume: name.to_owned(),
            state,
            ..VolumeActivity::default()
        }
    }

    #[test]
    fn waits_of_all_kinds_are_told_and_too_many_are_counted() {
        let store = |url: &str, failing_ms| StoreStatus {
            url: url.to_owned(),
            healthy: false,
            failing_ms: Some(failing_ms),
            last_error: Some("refused".to_owned()),
        };
        let mut pending = volume("a/pending", State::Attaching);
        pending.problem = Some("the store is away".to_owned());
        let mut stalled = volume("a/stalled", State::Attached);
        stalled.stalled = true;
        let mut volumes = vec![volume("a/well", State::Attached), pending, stalled];
        let activity = Activity {
            daemon: Some(StatusInfo {
                store: store("s3://home", 2000),
                tenant_stores: vec![store("s3://theirs", 500)],
                ..StatusInfo::default()
            }),
            volumes: volumes.clone(),
            ..Activity::default()
        };
        let expected = [
            "store s3://home has been failing for 2s: refused",
            "store s3://theirs has been failing for 0s: refused",
            "a/pending: is to be attached: the store is away",
            "a/stalled: writes wait for the store",
        ];
        assert_eq!(activity.with_waits().waits, expected);
        volumes.resize(200, volume("a/more", State::Attaching));
        let many = Activity {
            volumes,
            ..Activity::default()
        };
        let waits = many.with_waits().waits;
        assert_eq!(waits.len(), WAITS_MAX + 1);
        assert_eq!(waits[WAITS_MAX], "and 167 more");
    }
}
