//! Filling the cache on somebody's word, emptying it, and handing on what is hot to the next host.
//!
//! Owns: the pace of warming, which all volumes of the daemon share, and the object `hot`.
//!
//! What is read most is written to `hot` while a volume is detached, before the right to write is given
//! back, and fetched in the background where it is attached next. *Crash before or in between: there is
//! no `hot`, or an older one. It says what to fetch, never what is there: a wrong one costs time.*

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use quarry_objfmt::record::{HOT_KIND, HOT_RANGES_MAX, HotRecord, decode_record, encode_record};
use quarry_objfmt::{Lba, LbaRange, Sectors, keys};
use quarry_volume::{WARM_SECTORS_MAX, WarmEnd};
use tokio::time::Instant;

use super::slot::Attached;
use super::{Daemon, VolumeMachine, not_attached, registry};
use crate::backend::VolumeBackend;
use crate::control::{
    ApiError, ApiResult, EvictInfo, ImageRef, Kind, VolumeRef, WarmReport, WarmSpec,
};
use crate::store::{Store, StoreError};

/// Sectors that a step looks at after one that found something to fetch; each that finds nothing makes the
/// next twice as long.
const STEP_SECTORS_MIN: u64 = (4 << 20) / 512;

/// Time until a step that was refused is tried again: another is under way.
const BUSY_DELAY: Duration = Duration::from_millis(50);

/// Longest time that a detach spends on the object `hot`.
const HOT_TIME_MAX: Duration = Duration::from_secs(5);

/// Share of the cache device that the hot set of one volume may fill when it is attached.
const HOT_SHARE: u64 = 2;

/// The pace of warming.
pub(super) struct Pace {
    bytes_per_second: u64,
    next: tokio::sync::Mutex<Instant>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_second.max(1),
            next: tokio::sync::Mutex::new(Instant::now()),
        }
    }

    /// Waits until what was fetched is paid for.
    async fn spend(&self, bytes: u64) {
        let cost = bytes.saturating_mul(1_000_000) / self.bytes_per_second;
        let until = {
            let mut next = self.next.lock().await;
            *next = (*next).max(Instant::now()) + Duration::from_micros(cost);
            *next
        };
        tokio::time::sleep_until(until).await;
    }
}

/// How far a warming is.
#[derive(Default)]
struct Progress {
    looked: AtomicU64,
    total: AtomicU64,
    fetched: AtomicU64,
}

impl Progress {
    fn get(&self) -> WarmReport {
        WarmReport {
            looked_bytes: self.looked.load(Ordering::Relaxed),
            total_bytes: self.total.load(Ordering::Relaxed),
            fetched_bytes: self.fetched.load(Ordering::Relaxed),
            ..WarmReport::default()
        }
    }
}

/// The warmings that somebody asked for: one a volume.
#[derive(Clone, Default)]
pub(super) struct Warms(Arc<Mutex<BTreeMap<VolumeRef, Arc<Progress>>>>);

/// Ends with its call.
struct Running {
    all: Warms,
    volume: VolumeRef,
    progress: Arc<Progress>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.all.0.lock().remove(&self.volume);
    }
}

impl Warms {
    fn begin(&self, volume: &VolumeRef) -> ApiResult<Running> {
        let progress = Arc::<Progress>::default();
        let mut all = self.0.lock();
        if all.contains_key(volume) {
            let message = format!("{volume} is being warmed already");
            let remedy = "wait for that to end, or end it";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        all.insert(volume.clone(), Arc::clone(&progress));
        Ok(Running {
            all: self.clone(),
            volume: volume.clone(),
            progress,
        })
    }

    pub(super) fn progress(&self, volume: &VolumeRef) -> ApiResult<WarmReport> {
        let found = self.0.lock().get(volume).map(|progress| progress.get());
        found.ok_or_else(|| {
            let message = format!("{volume} is not being warmed");
            let remedy = format!("warm it with `quarry volume warm {volume}`");
            ApiError::new(Kind::NotFound, message, remedy)
        })
    }
}

/// Why warming ended before its ranges did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Early {
    Limit,
    Detached,
}

/// Fetches what the cache lacks of `range`, step by step. Answers whether something could not be had.
async fn warm_range(
    backend: &VolumeBackend,
    pace: &Pace,
    range: LbaRange,
    limit: u64,
    progress: &Progress,
) -> Result<bool, Early> {
    let (mut at, mut step, mut damaged) = (range.start, STEP_SECTORS_MIN, false);
    while at < range.end {
        if progress.fetched.load(Ordering::Relaxed) >= limit {
            return Err(Early::Limit);
        }
        let end = Lba::new(at.get().saturating_add(step)).min(range.end);
        let asked = LbaRange { start: at, end };
        let warmed = backend.warm(asked).await.ok_or(Early::Detached)?;
        match warmed.end {
            WarmEnd::Stopping => return Err(Early::Detached),
            WarmEnd::Busy => {
                tokio::time::sleep(BUSY_DELAY).await;
                continue;
            }
            WarmEnd::Damaged => damaged = true,
            WarmEnd::Done => {}
        }
        // Behind the volume's end there is nothing.
        let upto = if warmed.upto > at {
            warmed.upto
        } else {
            range.end
        };
        let looked = upto.get() - at.get();
        progress.looked.fetch_add(looked * 512, Ordering::Relaxed);
        progress.fetched.fetch_add(warmed.bytes, Ordering::Relaxed);
        at = upto;
        step = match warmed.bytes {
            0 => (step * 2).min(WARM_SECTORS_MAX),
            _ => STEP_SECTORS_MIN,
        };
        pace.spend(warmed.bytes).await;
    }
    Ok(damaged)
}

impl Daemon {
    /// Bytes of the cache device.
    fn cache_bytes(&self) -> u64 {
        let counts = self.shared.lock().cache.counts();
        u64::from(counts.total) * u64::from(counts.segment_size)
    }

    /// Ends where it is when its caller goes away.
    pub(super) async fn warm_volume(
        &self,
        volume: &VolumeRef,
        spec: &WarmSpec,
    ) -> ApiResult<WarmReport> {
        let image = ImageRef::from(volume.clone());
        let attached = self.attached_here(&image)?;
        let running = self.warms.begin(volume)?;
        let size = attached.backend.head().get().size;
        let end = spec
            .end
            .map_or(size.get(), |end| end.div_ceil(512))
            .min(size.get());
        let start = spec.start / 512;
        if start >= end {
            let message = format!("{volume} has nothing from byte {} on", spec.start);
            return Err(ApiError::invalid(message, "give a range inside the volume"));
        }
        let range = LbaRange {
            start: Lba::new(start),
            end: Lba::new(end),
        };
        let limit = spec.limit_bytes.unwrap_or_else(|| self.cache_bytes());
        let progress = &running.progress;
        let total = range.len().bytes();
        progress.total.store(total, Ordering::Relaxed);
        let warmed = warm_range(&attached.backend, &self.pace, range, limit, progress).await;
        let mut report = progress.get();
        match warmed {
            Ok(damaged) => report.damaged = damaged,
            Err(Early::Limit) => report.limited = true,
            Err(Early::Detached) => return Err(not_attached(&image)),
        }
        Ok(report)
    }

    /// Drops what the cache device and the memory have of a volume, attached or not, and the store has too.
    pub(super) async fn evict_volume(&self, volume: &VolumeRef) -> ApiResult<EvictInfo> {
        let image = ImageRef::from(volume.clone());
        let slot = self.slots.lock().get(&image).cloned().unwrap_or_default();
        let tenant = self.tenant(&volume.tenant).await?;
        let id = match slot.stage().attached() {
            Some(attached) => attached.backend.volume(),
            None => registry::find(&tenant.control(), volume).await?,
        };
        let group = tenant.gate().group();
        let (cache_bytes, kept_bytes) = self.shared.lock().evict(group, id);
        let ram_bytes = kept_bytes + self.common.fetches.evict(group, id);
        Ok(EvictInfo {
            volume: volume.to_string(),
            cache_bytes,
            ram_bytes,
        })
    }

    /// Fetches in the background what was read most where the volume was attached last.
    pub(super) fn warm_hot_set(&self, attached: &Attached) {
        if !self.config.cache.hot_set {
            return;
        }
        let backend = Arc::clone(&attached.backend);
        let (store, pace) = (attached.tenant.lane().background(), Arc::clone(&self.pace));
        let limit = self.cache_bytes() / HOT_SHARE;
        tokio::spawn(async move {
            let key = keys::hot_key(backend.head().tenant(), backend.volume());
            let record: HotRecord = match store.get(&key).await {
                Ok((bytes, _)) => match decode_record(HOT_KIND, &bytes) {
                    Ok(record) => record,
                    Err(error) => {
                        let volume = backend.name();
                        tracing::warn!(volume, %error, "what was hot is not known");
                        return;
                    }
                },
                Err(_) => return,
            };
            let progress = Progress::default();
            for (start, sectors) in record.ranges.into_iter().take(HOT_RANGES_MAX) {
                let Some(range) = LbaRange::new(Lba::new(start), Sectors::new(sectors)) else {
                    continue;
                };
                if warm_range(&backend, &pace, range, limit, &progress)
                    .await
                    .is_err()
                {
                    break;
                }
            }
            let fetched_bytes = progress.fetched.into_inner();
            tracing::info!(
                volume = backend.name(),
                fetched_bytes,
                "what was hot is in the cache"
            );
        });
    }

    /// What is read most of a volume, if anything was read.
    pub(super) async fn hot_set(&self, attached: &Attached) -> Option<HotRecord> {
        if !self.config.cache.hot_set || attached.read_only {
            return None;
        }
        let (reactor, key) = attached.backend.place();
        let look = |m: &VolumeMachine| m.volume.hottest(HOT_RANGES_MAX);
        let hottest = reactor.inspect(key, look).await.ok().flatten()?;
        let pairs = hottest.iter().map(|r| (r.start.get(), r.len().get()));
        let record = HotRecord {
            epoch: attached.backend.head().epoch().get(),
            ranges: pairs.collect(),
        };
        (!record.ranges.is_empty()).then_some(record)
    }

    /// Writes it for the next host, if that takes no time.
    pub(super) async fn leave_hot_set(&self, attached: &Attached, hot: &HotRecord) {
        let (store, backend) = (attached.tenant.control(), &attached.backend);
        let key = keys::hot_key(backend.head().tenant(), backend.volume());
        let write = async {
            let Ok(bytes) = encode_record(HOT_KIND, hot) else {
                return Ok(());
            };
            store.delete(&key).await?;
            store.create(&key, Bytes::from(bytes)).await.map(drop)
        };
        let written: Result<Result<(), StoreError>, _> =
            tokio::time::timeout(HOT_TIME_MAX, write).await;
        match written {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(volume = backend.name(), %error, "what is hot was not written down");
            }
            Err(_) => {
                tracing::warn!(
                    volume = backend.name(),
                    "what is hot was not written down in time"
                );
            }
        }
    }
}
