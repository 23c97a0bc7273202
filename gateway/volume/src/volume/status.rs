//! Block status: which runs of a range are known to read as zeroes, told without reading data.
//!
//! Invariant: the work of a request is bounded, however long its range and however fragmented the
//! volume: the range is walked in steps, and what the bounds leave out is for the next request.

use quarry_cache::CacheLoc;
use quarry_objfmt::{LbaRange, Location, Sectors, WriteSeq};

use super::read::Layered;
use super::{Cx, Volume};
use crate::event::{Action, StatusRun};

/// Most runs of an answer: one of 8 KiB, in NBD.
pub const STATUS_RUNS_MAX: usize = 1024;

/// Entries of the layers at which a walk takes no further step: some tenths of a millisecond, and the last step.
const ENTRIES_MAX: usize = 4096;

/// How far a walk goes between looking at the bounds: 16 MiB, as readahead looks ahead.
const STEP_SECTORS: u64 = (16 << 20) / 512;

impl Volume {
    /// Answers with as much of the range's start as the bounds and the map nodes in memory allow; if
    /// that is nothing, loads nodes first.
    pub(super) fn start_status(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let request = self.active[slot].request;
        self.active[slot].map = self.maps;
        let mut told = Told::default();
        let mut at = request.range.start;
        while at < request.range.end && told.entries < ENTRIES_MAX {
            let end = at.add(Sectors::new(STEP_SECTORS)).min(request.range.end);
            let before = told.runs.len();
            let last = told.runs.last().copied();
            if let Err(nodes) =
                self.walk_layers(LbaRange { start: at, end }, &mut cx.nodes, &mut told)
            {
                if at == request.range.start {
                    return self.load_nodes(Some(slot), nodes, cx);
                }
                // The parts in front of a missing node do not say where it is: the step is undone.
                told.runs.truncate(before);
                if let (Some(run), Some(last)) = (told.runs.last_mut(), last) {
                    *run = last;
                }
                break;
            }
            at = end;
        }
        self.reads.forget_found();
        told.runs.truncate(STATUS_RUNS_MAX);
        cx.out.push(Action::Status {
            request: request.id,
            runs: told.runs,
        });
        self.complete(slot, cx);
    }
}

/// The runs so far.
#[derive(Default)]
struct Told {
    runs: Vec<StatusRun>,
    entries: usize,
}

impl Told {
    fn push(&mut self, part: LbaRange, zero: bool) {
        self.entries += 1;
        let len = part.len();
        match self.runs.last_mut() {
            Some(last) if last.zero == zero => last.len = Sectors::new(last.len.get() + len.get()),
            _ => self.runs.push(StatusRun { len, zero }),
        }
    }
}

impl Layered for Told {
    fn dirty(&mut self, part: LbaRange, at: Option<CacheLoc>, _: WriteSeq) {
        self.push(part, at.is_none());
    }

    fn committed(&mut self, part: LbaRange, location: Location) {
        self.push(part, location == Location::Zero);
    }
}
