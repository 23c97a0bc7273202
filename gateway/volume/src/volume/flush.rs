//! Flush: rounds of sync, record pages, sync, each shared by all that wait.
//!
//! The order, and what a crash leaves between the steps:
//! 1. The data of every write acknowledged so far have arrived (that is when a write gets its
//!    number), but may sit in the device's volatile cache. *Crash: they may be lost; no flush that
//!    covers them was acknowledged.*
//! 2. Sync. The data are stable. *Crash: no record names them; old content is read.*
//! 3. Record pages, each durable when it completes, as far as the syncs beside it tell. *Crash
//!    between two pages: a gap in the numbers, behind which recovery cuts off.*
//! 4. All pages are durable: the waiters complete.
//!
//! The data never pass through our memory, so no checksum vouches for them: the sync before the
//! record that names them does.

use quarry_cache::{Branch, Mutation};
use quarry_objfmt::head::Durability;
use quarry_objfmt::page::{RECORDS_PER_PAGE, Record, RecordPage};
use quarry_objfmt::{SegmentId, WriteSeq};

use super::{Cx, Io, Queue, Volume, VolumeState};
use crate::event::{Action, IoError};

#[derive(Debug)]
struct Page {
    segment: SegmentId,
    index: u32,
    records: Vec<Record>,
}

#[derive(Debug)]
enum Round {
    Syncing { target: WriteSeq, pages: Vec<Page> },
    Recording { target: WriteSeq, left: usize },
}

#[derive(Debug)]
struct Waiter {
    slot: usize,
    target: WriteSeq,
}

/// The flush side of a volume.
#[derive(Debug)]
pub(super) struct Flush {
    /// Every write up to this one is on stable media of the cache device.
    durable: WriteSeq,
    round: Option<Round>,
    waiters: Queue<Waiter>,
}

impl Flush {
    pub(super) fn new(stored: WriteSeq) -> Self {
        Self {
            durable: stored,
            round: None,
            waiters: Queue::new(),
        }
    }

    pub(super) fn durable_up_to(&mut self, seq: WriteSeq) {
        self.durable = self.durable.max(seq);
    }

    pub(super) fn take_waiters(&mut self) -> Vec<usize> {
        self.waiters.drain(..).map(|w| w.slot).collect()
    }
}

impl Volume {
    pub(super) fn start_flush(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let target = self.writes.last_acknowledged();
        self.await_durable(slot, target, cx);
    }

    /// Completes the request once every write up to `target` is as durable as the volume promises.
    pub(super) fn await_durable(&mut self, slot: usize, target: WriteSeq, cx: &mut Cx<'_>) {
        if target <= self.durable_now() {
            Branch::FlushDurable.taken();
            self.complete(slot, cx);
            return;
        }
        match self.state {
            VolumeState::Serving | VolumeState::ReadOnly => {}
            VolumeState::Fenced { .. } => {
                Branch::FlushRefused.taken();
                return self.complete_with(slot, IoError::ReadOnly, cx);
            }
            VolumeState::Failed { .. } => {
                Branch::FlushRefused.taken();
                return self.complete_with(slot, IoError::Io, cx);
            }
        }
        if self.flush.round.is_some() {
            Branch::FlushBehindRound.taken();
        }
        self.flush.waiters.push_back(Waiter { slot, target });
        self.pump_flush(cx);
    }

    fn durable_now(&self) -> WriteSeq {
        match self.params.durability {
            Durability::Object => self.writeback.committed(),
            Durability::Local => self.durable_anywhere(),
        }
    }

    /// Every write up to this one is on stable media of the cache device, or in the store, which survives that.
    pub(super) fn durable_anywhere(&self) -> WriteSeq {
        self.flush.durable.max(self.writeback.committed())
    }

    /// Completes what is durable, and sees to it that the rest will be.
    pub(super) fn pump_flush(&mut self, cx: &mut Cx<'_>) {
        let durable = self.durable_now();
        // Waiters come in the order of their targets but for FUA writes, which wait for less.
        let mut rest = Queue::new();
        for waiter in std::mem::take(&mut self.flush.waiters) {
            if waiter.target <= durable {
                self.complete(waiter.slot, cx);
            } else {
                rest.push_back(waiter);
            }
        }
        self.flush.waiters = rest;
        let Some(newest) = self.flush.waiters.iter().map(|w| w.target).max() else {
            return;
        };
        match self.params.durability {
            Durability::Object => {
                Branch::FlushByStore.taken();
                self.upload_up_to(newest, cx);
            }
            Durability::Local => self.start_round(cx),
        }
    }

    /// Makes the records of all that was acknowledged durable, unless that is under way.
    pub(super) fn start_round(&mut self, cx: &mut Cx<'_>) {
        let serving = self.state == VolumeState::Serving;
        if self.flush.round.is_some() || !serving {
            return;
        }
        let target = self.writes.last_acknowledged();
        let pages = self.pages_of_pending(cx);
        if pages.is_empty() {
            Branch::RoundWithoutPages.taken();
        }
        self.stats.flush_rounds += 1;
        self.flush.round = Some(Round::Syncing { target, pages });
        if Mutation::NoSyncBeforeRecords.is_on() {
            return self.synced(Ok(()), cx);
        }
        let io = self.io(Io::Sync);
        cx.out.push(Action::Sync { io });
    }

    /// The record pages of what has none, each held.
    fn pages_of_pending(&mut self, cx: &mut Cx<'_>) -> Vec<Page> {
        let mut pages = Vec::new();
        self.writes.take_pending(|segment, first_index, records| {
            for (n, records) in records.chunks(RECORDS_PER_PAGE).enumerate() {
                let index = first_index + u32::try_from(n).expect("few pages a segment");
                pages.push(Page {
                    segment,
                    index,
                    records: records.to_vec(),
                });
            }
        });
        for page in &pages {
            // The page's place must not go to another generation before it is written.
            cx.cache.hold(page.segment);
        }
        pages
    }

    pub(super) fn synced(&mut self, result: Result<(), i32>, cx: &mut Cx<'_>) {
        let Some(Round::Syncing {
            mut target,
            mut pages,
        }) = self.flush.round.take()
        else {
            panic!("a sync completed outside a round");
        };
        if Mutation::SyncCoversWhatCameLater.is_on() {
            target = self.writes.last_acknowledged();
            pages.extend(self.pages_of_pending(cx));
        }
        if let Err(errno) = result {
            Branch::RoundSyncFailed.taken();
            for page in pages {
                self.release(page.segment, cx);
            }
            self.fail(errno, "syncing the data of writes", cx);
            return;
        }
        self.flush.round = Some(Round::Recording {
            target,
            left: pages.len(),
        });
        for page in pages {
            let io = self.io(Io::RecordPage {
                segment: page.segment,
            });
            let offset = cx.cache.geometry().page_byte(page.segment, page.index);
            let bytes = RecordPage {
                segment: page.segment,
                generation: cx.cache.generation(page.segment),
                volume: self.params.id,
                epoch: self.params.epoch,
                page: page.index,
                durable: Some(self.durable_anywhere()),
                records: page.records,
            }
            .encode(cx.cache.id());
            cx.out.push(Action::WritePage {
                io,
                offset,
                page: bytes,
                durable: true,
            });
        }
        if Mutation::FlushBeforeRecords.is_on() {
            self.flush.durable_up_to(target);
            self.pump_flush(cx);
        }
        self.finish_round(cx);
    }

    pub(super) fn record_page_done(
        &mut self,
        segment: SegmentId,
        result: Result<(), i32>,
        cx: &mut Cx<'_>,
    ) {
        self.release(segment, cx);
        let Some(Round::Recording { left, .. }) = &mut self.flush.round else {
            panic!("a record page completed outside a round");
        };
        *left -= 1;
        if let Err(errno) = result {
            Branch::RecordPageFailed.taken();
            self.fail(errno, "writing a record page", cx);
        }
        self.finish_round(cx);
    }

    fn finish_round(&mut self, cx: &mut Cx<'_>) {
        let Some(Round::Recording { target, left: 0 }) = self.flush.round else {
            return;
        };
        self.flush.round = None;
        if matches!(self.state, VolumeState::Failed { .. }) {
            Branch::RoundEndsFailed.taken();
            for slot in self.flush.take_waiters() {
                self.complete_with(slot, IoError::Io, cx);
            }
            return;
        }
        self.flush.durable_up_to(target);
        self.pump_flush(cx);
        // The journal has room again.
        self.pump_writes(cx);
    }
}
