//! How fast requests are taken: rates of volumes and tenants, and tenants that are held up.
//!
//! Owns: the limits as reactors see them (shared memory, changed at any time, read without a lock), and what they cost so
//! far. Does not own: the requests that are held ([`crate::reactor`]), nor where limits are kept (the records of names
//! and tenants).
//!
//! A tenant's rates are for all its volumes on this host together, whichever reactors they are on. What is counted: every
//! request, and the bytes of reads and writes. Discards, zeroes, flushes and block statuses are requests of 0 bytes.

pub(crate) mod bucket;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use parking_lot::Mutex;
use quarry_objfmt::record::{Rates, Suspended, TenantSettings, WEIGHT_DEFAULT};

use self::bucket::Bucket;
use crate::clock::now_ns;
use crate::fair::Share;

/// After so long without a request a rate that was measured is 0, in nanoseconds.
const METER_OLD_NS: u64 = 3_000_000_000;

/// The shortest time over which a rate is measured, in nanoseconds.
const METER_MIN_NS: u64 = 1_000_000_000;

/// The buckets of a volume or a tenant.
#[derive(Debug, Default)]
struct Buckets {
    requests: Bucket,
    bytes: Bucket,
    /// Whether either has a rate: what is asked for each batch.
    is_limited: AtomicBool,
    rates: Mutex<Rates>,
}

impl Buckets {
    fn set(&self, rates: &Rates) {
        let mut known = self.rates.lock();
        self.requests.set(rates.iops, rates.iops_burst);
        self.bytes
            .set(rates.bandwidth_bytes, rates.bandwidth_burst_bytes);
        let is_limited = self.requests.is_limited() || self.bytes.is_limited();
        self.is_limited.store(is_limited, Ordering::Relaxed);
        *known = *rates;
    }

    fn is_limited(&self) -> bool {
        self.is_limited.load(Ordering::Relaxed)
    }

    fn changes(&self) -> u32 {
        self.requests.changes().wrapping_add(self.bytes.changes())
    }

    fn cost_ns(&self, requests: u64, bytes: u64) -> u64 {
        self.requests
            .cost_ns(requests)
            .max(self.bytes.cost_ns(bytes))
    }

    fn take(&self, now_ns: u64, requests: u64, bytes: u64) -> u64 {
        self.requests
            .take(now_ns, requests)
            .max(self.bytes.take(now_ns, bytes))
    }
}

/// What a tenant may do on this host. One for each tenant that has had something attached here.
#[derive(Debug)]
pub struct TenantGate {
    buckets: Buckets,
    /// 0: not suspended; else [`Suspended`].
    suspended: AtomicU8,
    share: Arc<Share>,
    group: u32,
}

impl Default for TenantGate {
    fn default() -> Self {
        Self::new(0)
    }
}

impl TenantGate {
    /// Of the tenant that is this group in the cache.
    #[must_use]
    pub fn new(group: u32) -> Self {
        Self {
            group,
            buckets: Buckets::default(),
            suspended: AtomicU8::new(0),
            share: Share::new(WEIGHT_DEFAULT),
        }
    }

    /// Makes these its settings, as far as they are about this: at once, for requests that are held too.
    pub fn set(&self, settings: &TenantSettings) {
        self.buckets.set(&settings.rates);
        self.share
            .set_weight(settings.weight.unwrap_or(WEIGHT_DEFAULT));
        let suspended = match settings.suspended {
            None => 0,
            Some(Suspended::ReadOnly) => 1,
            Some(Suspended::Stall) => 2,
        };
        self.suspended.store(suspended, Ordering::Relaxed);
    }

    /// Whether it is suspended, in whichever way.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::Relaxed) != 0
    }

    /// Its rates.
    #[must_use]
    pub fn rates(&self) -> Rates {
        *self.buckets.rates.lock()
    }

    /// What it is called in the cache.
    #[must_use]
    pub const fn group(&self) -> u32 {
        self.group
    }

    /// Its part of what tenants share.
    #[must_use]
    pub fn share(&self) -> &Arc<Share> {
        &self.share
    }
}

/// How a volume's requests are to be treated now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Passage {
    /// As fast as its rates say.
    Open,
    /// The same, but writes are refused.
    ReadOnly,
    /// None passes.
    Stalled,
}

/// What a volume attached here may do. Its reactor asks; others set and look.
#[derive(Debug)]
pub struct VolumeGate {
    own: Buckets,
    tenant: Arc<TenantGate>,
    /// Everything passes, for the volume is being taken away.
    is_leaving: AtomicBool,
    counts: Counts,
}

/// Written by the volume's reactor only.
#[derive(Debug, Default)]
struct Counts {
    held: AtomicU64,
    /// Since when the oldest of them is.
    held_since_ns: AtomicU64,
    held_total: AtomicU64,
    held_ns: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
    meter: Mutex<Meter>,
}

/// Rates as they were measured last, while there were limits.
#[derive(Clone, Copy, Default, Debug)]
struct Meter {
    since_ns: u64,
    requests: u64,
    bytes: u64,
    requests_a_second: u64,
    bytes_a_second: u64,
}

/// What limits did to a volume since it was attached.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct GateStats {
    /// Requests held now.
    pub held: u64,
    /// For how long the oldest of them, in milliseconds; none: there are none.
    pub oldest_held_ms: Option<u64>,
    /// Requests that were held.
    pub held_total: u64,
    /// For how long, all together, in milliseconds; those that are held now not counted.
    pub held_ms: u64,
    /// Requests a second let through just now; 0 without limits.
    pub requests_a_second: u64,
    /// Bytes a second let through just now; 0 without limits.
    pub bytes_a_second: u64,
}

impl VolumeGate {
    /// That of a volume of `tenant`, without rates of its own.
    #[must_use]
    pub fn new(tenant: Arc<TenantGate>) -> Arc<Self> {
        Arc::new(Self {
            own: Buckets::default(),
            tenant,
            is_leaving: AtomicBool::new(false),
            counts: Counts::default(),
        })
    }

    /// Gives it rates of its own: at once, for requests that are held too.
    pub fn set_rates(&self, rates: &Rates) {
        self.own.set(rates);
    }

    /// Its own rates.
    #[must_use]
    pub fn rates(&self) -> Rates {
        *self.own.rates.lock()
    }

    /// Its tenant's.
    #[must_use]
    pub fn tenant(&self) -> &Arc<TenantGate> {
        &self.tenant
    }

    /// Whether the volume is being taken away: then nothing is held, for who takes it away waits for its requests.
    pub fn set_leaving(&self, is_leaving: bool) {
        self.is_leaving.store(is_leaving, Ordering::Relaxed);
    }

    /// What limits did to it.
    #[must_use]
    pub fn stats(&self) -> GateStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let meter = *self.counts.meter.lock();
        let now_ns = now_ns();
        let is_old = now_ns.saturating_sub(meter.since_ns) > METER_OLD_NS;
        let held = read(&self.counts.held);
        let held_ns = now_ns.saturating_sub(read(&self.counts.held_since_ns));
        GateStats {
            held,
            oldest_held_ms: (held > 0).then_some(held_ns / 1_000_000),
            held_total: read(&self.counts.held_total),
            held_ms: read(&self.counts.held_ns) / 1_000_000,
            requests_a_second: if is_old { 0 } else { meter.requests_a_second },
            bytes_a_second: if is_old { 0 } else { meter.bytes_a_second },
        }
    }

    /// Whether requests must be looked at one by one. Asked once a batch.
    #[inline]
    pub(crate) fn is_limited(&self) -> bool {
        self.own.is_limited() || self.tenant.buckets.is_limited() || self.tenant.is_suspended()
    }

    pub(crate) fn passage(&self) -> Passage {
        match self.tenant.suspended.load(Ordering::Relaxed) {
            0 => Passage::Open,
            1 => Passage::ReadOnly,
            _ if self.is_leaving.load(Ordering::Relaxed) => Passage::Open,
            _ => Passage::Stalled,
        }
    }

    /// Whether requests pass whatever the rates.
    pub(crate) fn is_free(&self) -> bool {
        self.is_leaving.load(Ordering::Relaxed)
            || !(self.own.is_limited() || self.tenant.buckets.is_limited())
    }

    /// Another number after each change of a rate.
    pub(crate) fn changes(&self) -> u32 {
        self.own
            .changes()
            .wrapping_add(self.tenant.buckets.changes())
    }

    /// The longest time that so much takes by one of the rates.
    pub(crate) fn cost_ns(&self, requests: u64, bytes: u64) -> u64 {
        let of_tenant = self.tenant.buckets.cost_ns(requests, bytes);
        self.own.cost_ns(requests, bytes).max(of_tenant)
    }

    /// Takes so much of all buckets, and answers when it may pass.
    pub(crate) fn take(&self, now_ns: u64, requests: u64, bytes: u64) -> u64 {
        let of_tenant = self.tenant.buckets.take(now_ns, requests, bytes);
        self.own.take(now_ns, requests, bytes).max(of_tenant)
    }

    /// So many are held now, `new` ones among them, the oldest since then.
    pub(crate) fn note_held(&self, held: usize, new: usize, since_ns: u64) {
        if held > 0 {
            self.counts.held_since_ns.store(since_ns, Ordering::Relaxed);
        }
        self.counts.held.store(held as u64, Ordering::Relaxed);
        self.counts
            .held_total
            .fetch_add(new as u64, Ordering::Relaxed);
    }

    pub(crate) fn note_passed(&self, now_ns: u64, requests: u64, bytes: u64, held_ns: u64) {
        let counts = &self.counts;
        counts.held_ns.fetch_add(held_ns, Ordering::Relaxed);
        let requests = counts.requests.fetch_add(requests, Ordering::Relaxed) + requests;
        let bytes = counts.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let mut meter = counts.meter.lock();
        let time = now_ns.saturating_sub(meter.since_ns);
        if time < METER_MIN_NS {
            return;
        }
        let a_second = |count: u64| {
            let rate = u128::from(count) * 1_000_000_000 / u128::from(time);
            u64::try_from(rate).unwrap_or(u64::MAX)
        };
        // The first one measures from nowhere.
        let is_first = meter.since_ns == 0 || time > METER_OLD_NS;
        *meter = Meter {
            since_ns: now_ns,
            requests_a_second: if is_first {
                0
            } else {
                a_second(requests - meter.requests)
            },
            bytes_a_second: if is_first {
                0
            } else {
                a_second(bytes - meter.bytes)
            },
            requests,
            bytes,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_passes_when_both_its_own_and_its_tenants_rates_let_it() {
        let tenant = Arc::new(TenantGate::default());
        let gate = VolumeGate::new(Arc::clone(&tenant));
        assert!(!gate.is_limited() && gate.is_free());
        let rates = |iops, bandwidth_bytes| Rates {
            iops,
            bandwidth_bytes,
            iops_burst: Some(1),
            bandwidth_burst_bytes: Some(1),
        };
        gate.set_rates(&rates(Some(100), None));
        let settings = |rates| TenantSettings {
            rates,
            ..TenantSettings::default()
        };
        tenant.set(&settings(rates(None, Some(1000))));
        assert!(gate.is_limited() && !gate.is_free());
        let now = 1_000_000_000;
        assert!(gate.take(now, 1, 1000) <= now);
        // A second for the bytes, beside a hundredth for the request.
        let due = gate.take(now, 1, 10);
        assert!(
            (now + 900_000_000..=now + 1_000_000_000).contains(&due),
            "{due}"
        );
        let changes = gate.changes();
        tenant.set(&settings(Rates::default()));
        assert_ne!(gate.changes(), changes);
        assert_eq!(gate.cost_ns(1, 1 << 40), 10_000_000);
        gate.set_leaving(true);
        assert!(gate.is_free());
    }

    #[test]
    fn suspended_tenants_volume_is_stalled_or_read_only_until_it_leaves() {
        let tenant = Arc::new(TenantGate::default());
        let gate = VolumeGate::new(Arc::clone(&tenant));
        for (suspended, passage) in [
            (Some(Suspended::Stall), Passage::Stalled),
            (Some(Suspended::ReadOnly), Passage::ReadOnly),
            (None, Passage::Open),
        ] {
            let settings = TenantSettings {
                suspended,
                ..TenantSettings::default()
            };
            tenant.set(&settings);
            assert_eq!(
                (gate.passage(), gate.is_limited()),
                (passage, suspended.is_some())
            );
            assert_eq!(tenant.is_suspended(), suspended.is_some());
        }
        tenant.set(&TenantSettings {
            suspended: Some(Suspended::Stall),
            ..TenantSettings::default()
        });
        gate.set_leaving(true);
        assert_eq!(gate.passage(), Passage::Open);
    }

    #[test]
    fn oldest_request_is_told_of_while_it_is_held() {
        let gate = VolumeGate::new(Arc::new(TenantGate::default()));
        assert_eq!(gate.stats().oldest_held_ms, None);
        gate.note_held(2, 2, now_ns());
        let stats = gate.stats();
        // None of them has passed.
        assert_eq!((stats.held, stats.held_ms), (2, 0));
        assert!(stats.oldest_held_ms < Some(60_000), "{stats:?}");
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(gate.stats().oldest_held_ms >= Some(5));
        gate.note_held(0, 0, 0);
        assert_eq!(gate.stats().oldest_held_ms, None);
    }
}
