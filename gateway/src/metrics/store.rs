//! Metrics of the stores, of all tenants together, and of uploads.

use super::definition::{Definition, Source, count, counter, gauge, histogram, of};
use super::text::Family;
use crate::store::{STORE_BOUNDS_MS, StoreTimes};

/// Chunks that are being uploaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UploadStats {
    /// Under way, in the places that tenants share.
    pub in_flight: u64,
    /// Under way for longer than a sound store takes, beside these places.
    pub slow: u64,
    /// Waiting for a place.
    pub waiting: u64,
}

/// One kind of call to the object store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreCall {
    /// Such as `get`, `create` or `replace`.
    pub operation: &'static str,
    /// Such as `ok`, `precondition` or `error`.
    pub outcome: &'static str,
    /// How many.
    pub count: u64,
}

/// The object store's counters.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct StoreStats {
    /// Calls by operation and outcome.
    pub calls: Vec<StoreCall>,
    /// Time that calls were under way, by operation; those that there were.
    pub times: Vec<(&'static str, StoreTimes)>,
    /// Bytes received.
    pub read_bytes: u64,
    /// Bytes sent.
    pub write_bytes: u64,
    /// Attempts after the first.
    pub retries: u64,
    /// Calls under way, now.
    pub in_flight: u64,
    /// Calls that wait for a place, now.
    pub waiting: u64,
    /// For how long calls have been failing; 0 when they are not.
    pub failing_ms: u64,
}

/// The bounds of stores' histograms, as labels.
pub(super) fn bounds() -> [f64; STORE_BOUNDS_MS.len()] {
    STORE_BOUNDS_MS.map(|ms| count(ms) / 1000.0)
}

impl StoreTimes {
    /// Writes them as a histogram, unless there are none.
    pub(super) fn write(&self, labels: &[&str], bounds: &[f64], family: &mut Family<'_>) {
        let below = self.cumulative();
        if self.count() > 0 {
            family.histogram(
                labels,
                bounds,
                &below,
                self.count(),
                self.sum().as_secs_f64(),
            );
        }
    }
}

/// By name.
pub(super) static TABLE: &[Definition] = &[
    gauge(
        "quarry_store_failing_seconds",
        "For how long calls to the store have been failing.",
        of!(Store.failing_ms in ms),
    ),
    gauge(
        "quarry_store_in_flight",
        "Calls to the store under way.",
        of!(Store.in_flight),
    ),
    counter(
        "quarry_store_read_bytes_total",
        "Bytes received from the store.",
        of!(Store.read_bytes),
    ),
    histogram(
        "quarry_store_request_duration_seconds",
        "Time that calls to the stores were under way, by operation: each attempt, without its waiting for a place.",
        Source::Own(&["operation"], |all, family| {
            let bounds = bounds();
            for (operation, times) in &all.store.times {
                times.write(&[*operation], &bounds, family);
            }
        }),
    ),
    counter(
        "quarry_store_requests_total",
        "Calls to the store, by operation and outcome.",
        Source::Own(&["operation", "outcome"], |all, family| {
            for c in &all.store.calls {
                family.sample(&[c.operation, c.outcome], count(c.count));
            }
        }),
    ),
    counter(
        "quarry_store_retries_total",
        "Attempts at calls to the store after the first.",
        of!(Store.retries),
    ),
    gauge(
        "quarry_store_waiting",
        "Calls to the store that wait for a place.",
        of!(Store.waiting),
    ),
    counter(
        "quarry_store_write_bytes_total",
        "Bytes sent to the store.",
        of!(Store.write_bytes),
    ),
    gauge(
        "quarry_uploads_in_flight",
        "Chunks being uploaded, in the places that tenants share.",
        of!(Uploads.in_flight),
    ),
    gauge(
        "quarry_uploads_slow",
        "Chunks being uploaded for longer than a sound store takes, beside these places.",
        of!(Uploads.slow),
    ),
    gauge(
        "quarry_uploads_waiting",
        "Chunks that wait for a place.",
        of!(Uploads.waiting),
    ),
];
