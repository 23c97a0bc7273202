//! Traces of slow requests: where a request's time went, from the queue to the store.
//!
//! A request that is answered at once leaves no mark. One that leaves the fast path (it waits for the store, for a rate,
//! for room, or long for a device) gets a trail, to which the spans of what it waits for are added as they end. When it
//! is answered, the trail is handed to the [`Exporter`](export::Exporter), if the request was slow or was picked as a
//! sample, and is dropped otherwise. What the store's side does is recorded by the task that does it ([`Recording`])
//! and comes back with its answer, for whichever requests waited for it.
//!
//! Owns: what spans are of, how they are recorded, and their way to the collector. Does not own: which request waited for
//! what (`quarry-volume` says so), and the trails of requests, which are their reactor's.
//!
//! **Invariants:**
//! - Without a collector, and for requests on the fast path, nothing is recorded: a reactor compares two times a request.
//! - Handing a trace over never waits: what there is no room for is dropped, and counted.
//! - What is kept is bounded: [`TRAILS_MAX`], [`SPANS_MAX`], [`QUEUED_MAX`](export::QUEUED_MAX).

pub mod export;
mod headers;
mod message;
mod recording;
mod span;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use quarry_objfmt::LbaRange;
use quarry_volume::{IoError, Op};
use tokio::sync::mpsc;

pub(crate) use self::recording::{Open, Recording, open, taken};
pub(crate) use self::span::{Span, Step, Trail, Value, notes};

/// Requests that have a trail at once, of the daemon: a store that is away may have all of its requests wait. About
/// 1 KiB each, and up to 128 spans of what it waited for. The traces of those beyond have nothing of that.
pub const TRAILS_MAX: usize = 4096;

/// Spans of a request, or of one piece of work of the store's side: a read of 1 MiB in many places has some dozens.
pub const SPANS_MAX: usize = 128;

/// What takes less than this part of the time that makes a request slow is not marked where it costs to look: it does
/// not explain a slow request.
const MARK_SHARE: u64 = 64;

/// Whose a traced request is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Whose {
    /// The tenant.
    pub tenant: String,
    /// The volume, snapshot or past state, as in a metric's label.
    pub volume: String,
}

/// Why a trace was not exported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lost {
    /// Too many traces waited for the collector.
    Queue,
    /// The collector did not take it in time, or at all.
    Collector,
}

impl Lost {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 2] = [Self::Queue, Self::Collector];

    /// Its name, as in a metric's label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Collector => "collector",
        }
    }
}

/// What is counted of traces.
#[derive(Debug, Default)]
pub struct Counts {
    exported: AtomicU64,
    dropped: [AtomicU64; Lost::ALL.len()],
    failures: AtomicU64,
}

impl Counts {
    fn dropped(&self, why: Lost, traces: u64) {
        self.dropped[why as usize].fetch_add(traces, Ordering::Relaxed);
    }
}

/// As [`Counts`], at one time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TraceStats {
    /// Traces that the collector took.
    pub exported: u64,
    /// Traces that it did not get, by [`Lost`].
    pub dropped: [u64; Lost::ALL.len()],
    /// Calls of the collector that failed.
    pub failures: u64,
}

/// How requests are traced, and where the traces go. One for all reactors.
#[derive(Debug)]
pub struct Tracer {
    slow_ns: u64,
    /// Of 2^64 misses so many are a sample.
    sample: u64,
    misses: AtomicU64,
    trails: AtomicUsize,
    queue: mpsc::Sender<Finished>,
    counts: Arc<Counts>,
}

/// A request that was answered, and what is known of its time.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) whose: Arc<Whose>,
    pub(crate) op: Op,
    /// What it was in the end: `read_miss`, say.
    pub(crate) kind: &'static str,
    pub(crate) range: LbaRange,
    pub(crate) result: Result<(), IoError>,
    pub(crate) front_end: &'static str,
    pub(crate) tag: u32,
    pub(crate) begin_ns: u64,
    pub(crate) end_ns: u64,
    /// Its own spans, all below the request.
    pub(crate) spans: Vec<Span>,
    /// What it waited for, maybe with others.
    pub(crate) trails: Vec<Arc<Trail>>,
    /// Spans that there was no room for.
    pub(crate) left_out: u32,
}

impl Tracer {
    /// One that finds requests slow from `slow_ns` on, and picks `share` of the misses; and where what it hands over
    /// comes out.
    pub(crate) fn new(
        slow_ns: u64,
        share: f64,
        queued_max: usize,
    ) -> (Arc<Self>, mpsc::Receiver<Finished>) {
        let (queue, finished) = mpsc::channel(queued_max);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of 0 to 1 becomes one of all numbers: casts of floats saturate"
        )]
        let sample = (share * u64::MAX as f64) as u64;
        let tracer = Arc::new(Self {
            slow_ns: slow_ns.max(1),
            sample,
            misses: AtomicU64::new(0),
            trails: AtomicUsize::new(0),
            queue,
            counts: Arc::default(),
        });
        (tracer, finished)
    }

    /// From how long on a request is slow, in nanoseconds.
    pub(crate) fn slow_ns(&self) -> u64 {
        self.slow_ns
    }

    /// From how long on a part of a request is marked, in nanoseconds.
    pub(crate) fn mark_ns(&self) -> u64 {
        (self.slow_ns / MARK_SHARE).max(1)
    }

    /// Whether the next miss is a sample: evenly spread, and not by the clock.
    pub(crate) fn picks(&self) -> bool {
        if self.sample == 0 {
            return false;
        }
        // The finaliser of splitmix64, over a counter.
        let mut x = self.misses.fetch_add(1, Ordering::Relaxed);
        x = x.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) <= self.sample
    }

    /// The right to keep a trail; none: there are too many.
    pub(crate) fn ticket(self: &Arc<Self>) -> Option<Ticket> {
        if self.trails.fetch_add(1, Ordering::Relaxed) < TRAILS_MAX {
            return Some(Ticket(Arc::clone(self)));
        }
        self.trails.fetch_sub(1, Ordering::Relaxed);
        None
    }

    /// Hands a trace over; never waits.
    pub(crate) fn submit(&self, finished: Finished) {
        if self.queue.try_send(finished).is_err() {
            self.counts.dropped(Lost::Queue, 1);
        }
    }

    /// What is counted.
    pub(crate) fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    /// What was counted so far.
    #[must_use]
    pub fn stats(&self) -> TraceStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TraceStats {
            exported: read(&self.counts.exported),
            dropped: self.counts.dropped.each_ref().map(read),
            failures: read(&self.counts.failures),
        }
    }
}

/// The right to keep one request's trail.
#[derive(Debug)]
pub(crate) struct Ticket(Arc<Tracer>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.trails.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sample_is_the_share_that_was_asked_for_and_none_is_none() {
        for (share, least, most) in [
            (0.0, 0, 0),
            (0.01, 60, 140),
            (0.5, 4700, 5300),
            (1.0, 10_000, 10_000),
        ] {
            let (tracer, _finished) = Tracer::new(1, share, 1);
            let picked = (0..10_000).filter(|_| tracer.picks()).count();
            assert!((least..=most).contains(&picked), "{share}: {picked}");
        }
    }

    #[test]
    fn trails_past_the_most_are_refused_until_one_ends() {
        let (tracer, _finished) = Tracer::new(1, 0.0, 1);
        let mut tickets: Vec<_> = (0..TRAILS_MAX).map(|_| tracer.ticket().unwrap()).collect();
        assert!(tracer.ticket().is_none() && tracer.ticket().is_none());
        tickets.pop();
        assert!(tracer.ticket().is_some());
        tickets.clear();
        assert_eq!(tracer.trails.load(Ordering::Relaxed), 0);
    }
}
