//! Warming: data that nobody reads yet are fetched into the cache because somebody said so.
//!
//! One step at a time, each of a bounded run of sectors, and the next when it was answered: so the pace
//! is the driver's. Steps go by the background's way, as readahead does, and what they bring is filled in
//! as what readers missed is; no room for a fill costs a later miss, as always.

use std::sync::Arc;

use quarry_objfmt::{Lba, LbaRange, Sectors};

use super::read::Source;
use super::{Cx, Io, Volume};
use crate::event::{Action, IoId, WarmEnd};
use crate::map::{Node, NodeRef};

/// Most sectors that a step looks at: 64 MiB, some milliseconds where they are in small pieces.
pub const WARM_SECTORS_MAX: u64 = (64 << 20) / 512;

/// Most frames that a step asks for: with frames of 64 KiB 4 MiB, which readers may come to wait behind.
const WARM_FRAMES_MAX: usize = 64;

/// The step under way.
#[derive(Debug)]
pub(super) struct Step {
    io: IoId,
    range: LbaRange,
    /// Frames that are not there yet, or not on the cache device: a step is not done before, or fetching
    /// would run ahead of the device, and what it brings be left out.
    frames_left: usize,
    /// Stored bytes asked for.
    bytes: u64,
    end: WarmEnd,
    /// Map nodes loaded for it so far: other lookups cannot push them out before it is resolved.
    held: Vec<(NodeRef, Arc<Node>)>,
}

impl Volume {
    pub(super) fn warm(&mut self, io: IoId, range: LbaRange, cx: &mut Cx<'_>) {
        let refused = if self.stopping {
            Some(WarmEnd::Stopping)
        } else {
            self.reads.warming.as_ref().map(|_| WarmEnd::Busy)
        };
        if let Some(end) = refused {
            let (upto, bytes) = (range.start, 0);
            cx.out.push(Action::Warmed {
                io,
                upto,
                bytes,
                end,
            });
            return;
        }
        let size = Lba::new(self.params.size.get());
        let start = range.start.min(size);
        let longest = Lba::new(start.get().saturating_add(WARM_SECTORS_MAX));
        let end = range.end.min(size).min(longest).max(start);
        self.reads.warming = Some(Step {
            io,
            range: LbaRange { start, end },
            frames_left: 0,
            bytes: 0,
            end: WarmEnd::Done,
            held: Vec::new(),
        });
        self.warm_on(cx);
    }

    /// Asks for what the cache lacks, or for the map nodes that say what that is.
    pub(super) fn warm_on(&mut self, cx: &mut Cx<'_>) {
        let step = self.reads.warming.as_ref().expect("a step is under way");
        let range = step.range;
        let mut pieces = Vec::new();
        let resolved = self.resolve(range, true, cx, &mut pieces);
        self.reads.forget_found();
        if let Err(nodes) = resolved {
            let io = self.io(Io::WarmNodes { map: self.maps });
            let foreground = false;
            cx.out.push(Action::LoadNodes {
                io,
                nodes,
                foreground,
            });
            return;
        }
        let mut wanted = Vec::new();
        for piece in &pieces {
            let Source::Store(at) = piece.source else {
                continue;
            };
            if wanted.len() == WARM_FRAMES_MAX {
                let covered = Sectors::new(u64::from(piece.buffer_offset) / 512);
                let step = self.reads.warming.as_mut().expect("a step is under way");
                step.range.end = step.range.start.add(covered);
                break;
            }
            self.want_frame(at, &mut wanted);
        }
        let bytes = wanted.iter().map(|(_, f)| u64::from(f.stored_len)).sum();
        self.stats.warmed_bytes += bytes;
        let step = self.reads.warming.as_mut().expect("a step is under way");
        (step.frames_left, step.bytes) = (wanted.len(), bytes);
        self.fetch(&wanted, super::read::Why::Warming, cx);
        self.end_step(cx);
    }

    pub(super) fn warm_nodes_loaded(
        &mut self,
        nodes: Option<Vec<(NodeRef, Arc<Node>)>>,
        cx: &mut Cx<'_>,
    ) {
        let step = self.reads.warming.as_mut().expect("a step is under way");
        if let Some(nodes) = nodes {
            step.held.extend(nodes);
            cx.nodes.insert_all(step.held.clone());
            self.warm_on(cx);
        } else {
            step.end = WarmEnd::Damaged;
            self.end_step(cx);
        }
    }

    /// So many frames need nothing more: they are in the cache, or were left out.
    pub(super) fn warm_fetched(&mut self, frames: usize, failed: bool, cx: &mut Cx<'_>) {
        let step = self.reads.warming.as_mut().expect("a step is under way");
        step.frames_left -= frames;
        if failed {
            step.end = WarmEnd::Damaged;
        }
        self.end_step(cx);
    }

    /// Answers the step if nothing of it is under way.
    fn end_step(&mut self, cx: &mut Cx<'_>) {
        let is_done = |step: &mut Step| step.frames_left == 0;
        if let Some(step) = self.reads.warming.take_if(is_done) {
            cx.out.push(Action::Warmed {
                io: step.io,
                upto: step.range.end,
                bytes: step.bytes,
                end: step.end,
            });
        }
    }
}
