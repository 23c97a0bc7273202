//! What is clean in the cache, known again after a restart: the index log is read once at the start, and from then on told what
//! becomes clean. All of it is in the background, and losing any of it costs fetching anew.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quarry_cache::{CacheDevice, CleanSegment, Expected, IndexLog, IndexTable, Journals};
use quarry_objfmt::index::INDEX_OWNER_LEN_MAX;
use quarry_objfmt::{CacheId, Generation, IndexRecord, SegmentId};

use super::{Daemon, Slot};

/// How long after it became clean a segment is in the log.
const PAUSE: Duration = Duration::from_secs(1);

/// The same, where the log could not be written.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(60);

/// Runs that are looked up, or taken up, while others wait for the lock on the cache: some tenths of a millisecond.
const RUNS_AT_ONCE: usize = 2048;

/// The index log of the daemon's cache device.
pub(super) struct Index {
    /// None where there is none, and once the daemon has ended.
    log: Mutex<Option<IndexLog>>,
    /// What was true before the start, until the log is read.
    before: Mutex<Vec<(SegmentId, Generation)>>,
    is_read: AtomicBool,
    /// The daemon ends: who reads it still, or writes it anew, stops doing so.
    ends: AtomicBool,
    /// Bytes that were known again.
    found_bytes: AtomicU64,
}

impl Index {
    fn new(log: Option<IndexLog>, before: Vec<(SegmentId, Generation)>) -> Self {
        Self {
            log: Mutex::new(log),
            before: Mutex::new(before),
            is_read: AtomicBool::new(false),
            ends: AtomicBool::new(false),
            found_bytes: AtomicU64::new(0),
        }
    }

    /// The latest generation that it speaks of.
    pub(super) fn newest(&self) -> Generation {
        let before = self.before.lock();
        let generations = before.iter().map(|(_, generation)| *generation);
        generations.max().unwrap_or_default()
    }

    /// The daemon ends.
    pub(super) fn end(&self) {
        self.ends.store(true, Ordering::Relaxed);
    }

    fn goes_on(&self) -> std::io::Result<()> {
        match self.ends.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(std::io::Error::other("the daemon ends")),
        }
    }

    /// Bytes that were clean before the daemon was started, and were known again.
    pub(super) fn found_bytes(&self) -> u64 {
        self.found_bytes.load(Ordering::Relaxed)
    }
}

/// Begins the daemon's session on the device, and the index log's, if there is to be one. What else can be wrong with its files is no
/// reason not to serve.
///
/// # Errors
/// If the device cannot be told who has it: what was true of it before would be believed after what comes now.
pub(super) fn begin(
    config: &quarry_config::Config,
    device: &CacheDevice,
    journals: &Journals,
) -> std::io::Result<(Option<IndexTable>, Index)> {
    let session = uuid::Uuid::new_v4().into_bytes();
    let Some(before) = device.begin_session(session)? else {
        tracing::info!(
            "the cache was made by an earlier version: what is clean in it is not known again after a restart"
        );
        return Ok((None, Index::new(None, Vec::new())));
    };
    if !config.cache.keep_index {
        return Ok((None, Index::new(None, Vec::new())));
    }
    let folder = &config.daemon.data_dir;
    match IndexLog::begin(device, journals, folder, (before, session)) {
        Ok((table, log, before)) => Ok((Some(table), Index::new(Some(log), before))),
        Err(error) => {
            tracing::warn!(%error, folder = %folder.display(), "the index log cannot be kept: what is clean in the cache is fetched anew after a restart");
            Ok((None, Index::new(None, Vec::new())))
        }
    }
}

/// Adds what a record speaks of.
fn expect(expected: &mut Expected, group: u32, record: &IndexRecord) {
    let of_segment = (group, record.generation);
    expected.segments.insert(record.segment, of_segment);
    let mut last = None;
    for run in &record.runs {
        let (volume, epoch) = (run.chunk.volume, run.chunk.epoch);
        // Most are of the same as the one before.
        if last.replace((volume, epoch)) != Some((volume, epoch)) {
            let newest = expected.newest.entry((group, volume)).or_default();
            *newest = epoch.max(*newest);
        }
    }
}

impl Daemon {
    /// Takes up what the index log tells, and tells it what becomes clean, for as long as the daemon serves.
    pub async fn keep_index(self: Arc<Self>) {
        loop {
            let daemon = Arc::clone(&self);
            let kept = tokio::task::spawn_blocking(move || {
                let mut log = daemon.index.log.lock();
                log.as_mut().map_or(Ok(()), |log| daemon.keep(log))
            });
            let pause = match kept.await {
                Ok(Ok(())) => PAUSE,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the index log cannot be written: what becomes clean meanwhile is fetched anew after a restart");
                    PAUSE_AFTER_FAILURE
                }
                // The runtime ends.
                Err(_) => return,
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn keep(&self, log: &mut IndexLog) -> std::io::Result<()> {
        if !self.index.is_read.swap(true, Ordering::Relaxed)
            && let Err(error) = self.read_index(log)
        {
            tracing::warn!(%error, "the index log cannot be read: what was clean in the cache is fetched anew");
        }
        if log.is_due() {
            self.rewrite_index(log)?;
        }
        self.describe_clean(log)
    }

    /// What was clean before the start. **Order:** all of the log is looked through; the cache is told which terms of which volumes
    /// there are, and believes what no term that has begun since speaks against; only then anything is taken up.
    fn read_index(&self, log: &mut IndexLog) -> std::io::Result<()> {
        let begun = Instant::now();
        let before = std::mem::take(&mut *self.index.before.lock());
        let before: HashMap<_, _> = before.into_iter().collect();
        let is_true = |segment, generation| before.get(&segment) == Some(&generation);
        let mut expected = Expected::default();
        let places = log.survey(is_true, |record| {
            if let Some(group) = self.tenants.group_named(&record.owner) {
                expect(&mut expected, group, record);
            }
            match self.index.goes_on() {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        self.index.goes_on()?;
        self.shared.lock().cache.expect(expected);
        let (mut found, mut runs) = (Vec::new(), 0);
        let take_up = |found: &mut Vec<CleanSegment>| {
            let bytes = self.shared.lock().cache.take_up(std::mem::take(found));
            self.index.found_bytes.fetch_add(bytes, Ordering::Relaxed);
        };
        for place in places {
            self.index.goes_on()?;
            let record = log.read(place)?;
            let Some(group) = self.tenants.group_named(&record.owner) else {
                continue;
            };
            runs += record.runs.len();
            found.push(CleanSegment {
                group,
                segment: record.segment,
                generation: record.generation,
                runs: record.runs,
            });
            if runs >= RUNS_AT_ONCE {
                take_up(&mut found);
                runs = 0;
            }
        }
        take_up(&mut found);
        self.shared.lock().cache.expect_no_more();
        tracing::info!(bytes = self.index.found_bytes(), elapsed = ?begun.elapsed(), "what was clean in the cache is known again");
        Ok(())
    }

    /// **Order:** the record, then the word that it is true. *Killed in between: it is as if it were not there.*
    fn describe_clean(&self, log: &mut IndexLog) -> std::io::Result<()> {
        loop {
            let clean = self.shared.lock().cache.take_undescribed(RUNS_AT_ONCE);
            if clean.is_empty() {
                return Ok(());
            }
            let places: Vec<_> = clean.iter().map(|c| (c.segment, c.generation)).collect();
            let added = log.add(&self.records(log.cache(), clean));
            let cache = &mut self.shared.lock().cache;
            for (segment, generation) in places {
                match &added {
                    Ok(()) => cache.described(segment, generation),
                    Err(_) => cache.not_described(segment, generation),
                }
            }
            added?;
        }
    }

    fn rewrite_index(&self, log: &mut IndexLog) -> std::io::Result<()> {
        let cache = log.cache();
        let mut first = 0;
        log.rewrite(|| {
            self.index.goes_on()?;
            let (clean, looked) = self.shared.lock().cache.described_from(first, RUNS_AT_ONCE);
            first += looked;
            Ok((looked > 0).then(|| self.records(cache, clean)))
        })
    }

    fn records(&self, cache: CacheId, clean: Vec<CleanSegment>) -> Vec<IndexRecord> {
        let groups = clean.iter().map(|clean| clean.group).collect();
        let owners = self.tenants.names_of(&groups);
        let record = |clean: CleanSegment| {
            let owner = owners.get(&clean.group)?;
            let is_short = owner.len() <= INDEX_OWNER_LEN_MAX;
            is_short.then(|| IndexRecord {
                cache,
                segment: clean.segment,
                generation: clean.generation,
                owner: owner.clone(),
                runs: clean.runs,
            })
        };
        clean.into_iter().filter_map(record).collect()
    }

    /// The last of it, when nothing is written to the cache device any more. Where devices wait for the next daemon it is not
    /// made durable: that daemon comes in this boot.
    pub(super) fn end_index(&self) {
        let Some(mut log) = self.index.log.lock().take() else {
            return;
        };
        let end = || -> std::io::Result<()> {
            self.shared.lock().cache.close_fills();
            self.describe_clean(&mut log)?;
            let slots: Vec<_> = self.slots.lock().values().cloned().collect();
            let has_device = |slot: &Arc<Slot>| {
                let stage = slot.stage();
                stage
                    .attached()
                    .is_some_and(|attached| attached.device.is_some())
            };
            if slots.iter().any(has_device) {
                return Ok(());
            }
            self.common.device.sync()?;
            let described = self.shared.lock().cache.all_described();
            log.end(described)
        };
        if let Err(error) = end() {
            tracing::warn!(%error, "the index log is not whole: some of what is clean in the cache is fetched anew");
        }
    }
}
