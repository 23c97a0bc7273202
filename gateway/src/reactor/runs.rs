//! Small writes that come in one batch and follow each other on the cache device, written by one I/O; and so fills.
//!
//! The log puts the writes of a volume one behind the other, and a device takes one write of 32 KiB in the time and
//! with the work of one or two of 4 KiB. Nobody waits for more writes to come: what is there when the batch ends goes.
//!
//! Owns: which operations an I/O stands for. Does not own: the operations (`Core::ops`), which hear of nothing but
//! their own end.
//!
//! **Invariant.** An operation ends well only if the kernel said so of every byte of it: if a run ends in any other way
//! than whole, each of its operations is submitted by itself, and has its own end.

use std::mem;

use io_uring::opcode;
use slab::Slab;

use super::core::Core;
use super::op::{CacheOp, Code};
use super::ring::File;
use super::token::Token;

/// The longest run, in bytes. Several are under way at a time: who waits for the first of many writes is not to wait
/// for all of them.
const RUN_BYTES_MAX: u32 = 32 << 10;

/// The longest run of fills, in bytes, for which nobody waits: what one fetch brings, in two.
const FILL_RUN_BYTES_MAX: u32 = 512 << 10;

/// The longest run that a write may be part of.
const fn longest_with(op: &CacheOp) -> u32 {
    match op.request {
        Some(_) => RUN_BYTES_MAX,
        None => FILL_RUN_BYTES_MAX,
    }
}

/// Writes that follow each other.
#[derive(Default)]
struct Run {
    /// Of fills.
    is_fill: bool,
    begin: u64,
    bytes: u32,
    /// Where their data are.
    parts: Vec<libc::iovec>,
    /// Their indices in the table of operations.
    ops: Vec<u32>,
}

impl Run {
    /// Whether this write follows those in it, and there is room.
    fn takes(&self, op: &CacheOp) -> bool {
        self.is_fill == op.request.is_none()
            && self.begin + u64::from(self.bytes) == op.moving.offset
            && op.moving.len <= longest_with(op) - self.bytes
    }

    fn push(&mut self, index: u32, op: &CacheOp) {
        if self.ops.is_empty() {
            self.begin = op.moving.offset;
            self.is_fill = op.request.is_none();
        }
        self.bytes += op.moving.len;
        self.parts.push(libc::iovec {
            iov_base: op.moving.address as *mut libc::c_void,
            iov_len: op.moving.len as usize,
        });
        self.ops.push(index);
    }

    /// As new, but for its memory.
    fn clear(&mut self) {
        self.bytes = 0;
        self.parts.clear();
        self.ops.clear();
    }
}

/// The run that is being made, and those that are written.
#[derive(Default)]
pub(super) struct Runs {
    open: Run,
    under_way: Slab<Run>,
    /// Memory of those that are over: as many at most as were under way at once.
    spare: Vec<Run>,
}

impl Runs {
    /// Whether such a write may be part of a run: a request's or a fill, and not a large one.
    pub(super) const fn may_take(op: &CacheOp) -> bool {
        matches!(op.moving.code, Code::Write { durable: false })
            && matches!(op.moving.file, File::Cache)
            && op.moving.len <= longest_with(op) / 2
    }
}

impl Core {
    /// Has a write go with those before it, if it follows them.
    pub(super) fn join_run(&mut self, index: u32) {
        if !self.runs.open.takes(&self.ops[index as usize]) {
            self.end_run();
        }
        self.runs.open.push(index, &self.ops[index as usize]);
    }

    /// Submits the run that was being made; at the latest when the batch ends.
    pub(super) fn end_run(&mut self) {
        match *self.runs.open.ops {
            [] => return,
            [one] => {
                self.runs.open.clear();
                return self.submit_op(one);
            }
            _ => {}
        }
        let next = self.runs.spare.pop().unwrap_or_default();
        let run = mem::replace(&mut self.runs.open, next);
        let (parts, begin) = (run.parts.as_ptr(), run.begin);
        let count = u32::try_from(run.parts.len()).expect("a run is short");
        let index = self.runs.under_way.insert(run);
        let index = u32::try_from(index).expect("no more runs than operations");
        let entry = self.ring.entry_for(File::Cache, |fd| {
            opcode::Writev::new(fd, parts, count).offset(begin).build()
        });
        // SAFETY: the list of parts lies on the heap, owned by a run that stays in the table until its completion is
        // taken; the parts are what the operations hold, by `submit_op`, and no operation ends before its run.
        unsafe {
            self.ring.push(entry.user_data(Token::Run { index }.pack()));
        }
    }

    /// A run's completion.
    pub(super) fn run_done(&mut self, index: u32, result: i32) {
        let mut run = self.runs.under_way.remove(index as usize);
        let is_whole = u32::try_from(result) == Ok(run.bytes);
        for index in run.ops.drain(..) {
            if is_whole {
                let len = self.ops[index as usize].moving.len;
                let len = i32::try_from(len).expect("a part of a run is small");
                self.op_done(index, len);
            } else {
                self.submit_op(index);
            }
        }
        run.clear();
        self.runs.spare.push(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::op::tests::op;

    fn write(request: Option<usize>, offset: u64, len: u32) -> CacheOp {
        let mut op = op(Code::Write { durable: false }, len);
        (op.request, op.moving.offset) = (request, offset);
        op
    }

    #[test]
    fn run_is_of_neighbours_of_one_kind_up_to_its_length() {
        for (request, longest) in [(Some(1), RUN_BYTES_MAX), (None, FILL_RUN_BYTES_MAX)] {
            let half = longest / 2;
            assert!(Runs::may_take(&write(request, 0, half)));
            assert!(!Runs::may_take(&write(request, 0, half + 512)));
            let mut run = Run::default();
            run.push(0, &write(request, 4096, half));
            let next = 4096 + u64::from(half);
            assert!(run.takes(&write(request, next, half)));
            assert!(!run.takes(&write(request, next + 512, 512)), "a gap");
            assert!(!run.takes(&write(request, next, half + 512)), "too long");
            let other = request.map_or(Some(1), |_| None);
            assert!(!run.takes(&write(other, next, 512)), "another kind");
            run.push(1, &write(request, next, half));
            assert!(
                !run.takes(&write(request, next + u64::from(half), 512)),
                "full"
            );
        }
        assert!(!Runs::may_take(&op(Code::Write { durable: true }, 4096)));
    }
}
