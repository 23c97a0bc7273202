//! Readahead for readers who go on in equal steps, forwards or backwards, and leave out what lies between.
//!
//! Only misses are looked at: such a reader is told by four of them, each as far from the one before, with as many of
//! others' in between each time. From then on it is known by where it is expected. What it will want is fetched within
//! readahead's budget, further ahead the longer it keeps its step; nothing more once it does not come where it was
//! expected.

use quarry_cache::Branch;
use quarry_objfmt::{Lba, LbaRange, Sectors};

use super::read::{READAHEAD_FRAMES_MAX, Why};
use super::{Cx, Queue, Volume};

/// Readers told apart.
const STRIDES_MAX: usize = 8;

/// Readers whose misses may come in turns until they are known.
const TURNS_MAX: usize = 5;

/// Equal steps that make a reader known.
const STEPS_MIN: usize = 3;

/// Readahead starts with so many steps, and doubles.
const WINDOW_MIN: u64 = 4;

/// Most steps that readahead runs before a reader: each is looked up for itself.
const WINDOW_MAX: u64 = 64;

/// A reader who goes on in equal steps.
#[derive(Debug)]
struct Stride {
    /// Where it is expected.
    next: u64,
    len: u64,
    step: i64,
    /// Steps from `next` on that have been asked for.
    ahead: u64,
    window: u64,
}

/// What is known of them.
#[derive(Debug, Default)]
pub(super) struct Strides {
    known: Queue<Stride>,
    /// Start and length of the last misses, the newest first.
    misses: Queue<(u64, u64)>,
}

impl Strides {
    /// The reader that this read is of, expected at its next place.
    fn take(&mut self, start: u64, len: u64, missed: bool) -> Option<Stride> {
        let expected = |s: &Stride| (s.next, s.len) == (start, len);
        if let Some(at) = self.known.iter().position(expected) {
            let stride = self.known.remove(at).expect("just found");
            return Some(Stride {
                next: start.checked_add_signed(stride.step)?,
                ahead: stride.ahead.saturating_sub(1),
                ..stride
            });
        }
        if !missed {
            return None;
        }
        self.misses.push_front((start, len));
        self.misses.truncate(TURNS_MAX * STEPS_MIN + 1);
        let (turns, step) = (1..=TURNS_MAX).find_map(|turns| Some((turns, self.step(turns)?)))?;
        // Those of others stay, in their own turns.
        let mut place = 0..;
        self.misses.retain(|_| {
            let place = place.next().expect("without end");
            place % turns != 0 || place > turns * STEPS_MIN
        });
        Some(Stride {
            next: start.checked_add_signed(step)?,
            len,
            step,
            ahead: 0,
            window: WINDOW_MIN,
        })
    }

    /// How far each of the last misses of every so many lies from the one before, if all lie as far.
    fn step(&self, turns: usize) -> Option<i64> {
        let mut all = self.misses.iter().step_by(turns).take(STEPS_MIN + 1);
        let (mut start, len) = *all.next()?;
        let (mut step, mut steps) = (None, 0);
        for &(before, its_len) in all {
            let this = i64::try_from(start).ok()? - i64::try_from(before).ok()?;
            if its_len != len || step.is_some_and(|step| step != this) || this == 0 {
                return None;
            }
            (start, step, steps) = (before, Some(this), steps + 1);
        }
        step.filter(|_| steps == STEPS_MIN)
    }

    fn put(&mut self, stride: Stride) {
        if self.known.len() == STRIDES_MAX {
            self.known.pop_front();
        }
        self.known.push_back(stride);
    }
}

impl Volume {
    /// Fetches what the reader of this read will want next, if it goes on in equal steps. Answers whether it does.
    pub(super) fn stride_ahead(&mut self, range: LbaRange, missed: bool, cx: &mut Cx<'_>) -> bool {
        let (start, len) = (range.start.get(), range.len().get());
        let Some(mut stride) = self.reads.strides.take(start, len, missed) else {
            return false;
        };
        let due = stride.window - stride.ahead >= stride.window / 2;
        let held_back =
            self.reads.readahead_frames >= READAHEAD_FRAMES_MAX || self.reads.readahead_nodes;
        if due && held_back {
            Branch::ReadaheadHeldBack.taken();
        } else if due {
            self.fetch_strided(&mut stride, cx);
        }
        self.reads.strides.put(stride);
        true
    }

    fn fetch_strided(&mut self, stride: &mut Stride, cx: &mut Cx<'_>) {
        let (mut pieces, mut wanted) = (Vec::new(), Vec::new());
        while stride.ahead < stride.window
            && self.reads.readahead_frames + wanted.len() < READAHEAD_FRAMES_MAX
        {
            let steps = i64::try_from(stride.ahead).expect("a window is small");
            let offset = stride.step.checked_mul(steps);
            let start = offset.and_then(|offset| stride.next.checked_add_signed(offset));
            let range = start.and_then(|at| LbaRange::new(Lba::new(at), Sectors::new(stride.len)));
            let inside = |range: &LbaRange| range.end.get() <= self.params.size.get();
            let Some(range) = range.filter(inside) else {
                break;
            };
            pieces.clear();
            if let Err(nodes) = self.resolve(range, true, cx, &mut pieces) {
                self.load_nodes(None, nodes, cx);
                break;
            }
            self.want_missing(&pieces, &mut wanted);
            stride.ahead += 1;
        }
        self.reads.forget_found();
        self.fetch(&wanted, Why::Readahead, cx);
        if stride.ahead == stride.window {
            let cost = stride.len.max(u64::from(self.params.frame_sectors));
            let most = (self.usual_window() / cost).min(WINDOW_MAX);
            stride.window = (stride.window * 2).min(most).max(stride.window);
        }
    }
}
