//! Requests that a volume's rates let through later: held in order, and woken by a timer of their own.
//!
//! A volume pays for its oldest requests together, as many as its rates let through in [`TURN_NS`], and pays for the next
//! ones when these have passed. So volumes that share a tenant's rate take turns, on whichever reactors they are, and none
//! gets ahead of the others by having more requests.
//!
//! Owns: the held requests and the timer. Does not own: the rates ([`crate::qos`]); the requests' buffers, which stay their
//! front ends', and whose number bounds what is held.
//!
//! Invariants:
//! - Of one volume's requests none overtakes another here. (What a flush covers was acknowledged before it came, so it
//!   covers nothing that is held.)
//! - A volume without limits pays a look at them, once a batch.
//! - Of a volume that goes, or whose front ends are stopped, nothing is held.
//! - Of a front end whose client is gone no suspension holds anything for long: its requests never come to the volume, and
//!   it ends.

use std::collections::VecDeque;
use std::mem;

use io_uring::{opcode, types};
use quarry_volume::{Event, IoError, Op, Request, RequestId};

use super::core::{Core, VolumeSlot, index_of};
use super::execute::request_key;
use super::token::Token;
use crate::clock::now_ns;
use crate::latency::Timed;
use crate::qos::{Passage, VolumeGate};

/// How much a volume pays for at once, by the time that its rates take for it, in nanoseconds; one request may be more.
const TURN_NS: u64 = 1_000_000;

/// How much earlier than asked for a timer may end, in nanoseconds: it goes by the kernel's clock, and we by another.
const EARLY_NS_MAX: u64 = 1_000_000;

/// Longest time before limits are looked at again while requests are held, in nanoseconds: a change of them, or their end,
/// is seen after so long.
const LOOK_NS: u64 = 100_000_000;

/// A volume's held requests, oldest first.
#[derive(Default)]
pub(super) struct Held {
    /// With the time since when each is held, in nanoseconds.
    queue: VecDeque<(Request, u64)>,
    /// So many at the front are paid for.
    paid: usize,
    /// When these may pass.
    due_ns: u64,
    /// Which state of the limits they were paid under.
    changes: u32,
    /// When to look at it again.
    look_ns: u64,
    /// Whether it is among [`Holds::volumes`].
    is_listed: bool,
    /// Nothing is held.
    is_off: bool,
}

impl Held {
    fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Takes all requests among the events behind those that are held. Answers how many.
    fn take_in(&mut self, events: &mut Vec<Event>, now_ns: u64) -> usize {
        let before = self.queue.len();
        for event in events.extract_if(.., |event| matches!(event, Event::Request(_))) {
            if let Event::Request(request) = event {
                self.queue.push_back((request, now_ns));
            }
        }
        self.queue.len() - before
    }

    /// Takes out those whose client is gone.
    fn give_up(&mut self, is_gone: impl Fn(&Request) -> bool) -> Vec<RequestId> {
        let paid = self.queue.iter().take(self.paid);
        self.paid -= paid.filter(|(request, _)| is_gone(request)).count();
        let mut given_up = Vec::new();
        self.queue.retain(|(request, _)| {
            let is_gone = is_gone(request);
            if is_gone {
                given_up.push(request.id);
            }
            !is_gone
        });
        given_up
    }

    /// How many may pass now.
    fn passable(&mut self, gate: &VolumeGate, now_ns: u64) -> usize {
        let changes = gate.changes();
        if mem::replace(&mut self.changes, changes) != changes {
            self.paid = 0;
        }
        let mut passable = 0;
        loop {
            if self.paid > passable {
                if self.due_ns > now_ns {
                    return passable;
                }
                passable = self.paid;
            }
            if passable == self.queue.len() {
                return passable;
            }
            let (mut count, mut bytes) = (0, 0);
            for (request, _) in self.queue.range(passable..) {
                let more = bytes + request.op.data_bytes(request.range);
                if count > 0 && gate.cost_ns(count + 1, more) > TURN_NS {
                    break;
                }
                (count, bytes) = (count + 1, more);
            }
            self.due_ns = gate.take(now_ns, count, bytes);
            self.paid = passable + usize::try_from(count).unwrap_or(usize::MAX);
        }
    }
}

/// Has what passes whatever the rates owed for by what comes later: a volume that goes and comes back would else get round them.
fn charge<'a>(gate: &VolumeGate, now_ns: u64, passing: impl Iterator<Item = &'a Request>) {
    let add = |(count, bytes), request: &Request| {
        (count + 1, bytes + request.op.data_bytes(request.range))
    };
    let (count, bytes) = passing.fold((0, 0), add);
    if count > 0 {
        // When it were its turn matters to nobody.
        let _ = gate.take(now_ns, count, bytes);
    }
}

const fn is_write(op: Op) -> bool {
    matches!(op, Op::Write { .. } | Op::Discard | Op::WriteZeroes { .. })
}

/// The volumes of a reactor that hold requests, and the timer that wakes them.
pub(super) struct Holds {
    volumes: Vec<u32>,
    /// When the next one is to be looked at.
    next_ns: u64,
    /// The time as of the newest look at any.
    now_ns: u64,
    /// Until when the timer sleeps that was armed last.
    armed_ns: u64,
    /// Timers under way: one that was armed for an earlier time leaves the one before it asleep.
    timers: u32,
}

impl Holds {
    /// How long the timer is to sleep that is armed now. Never longer than anybody may be left alone, whatever the clock says: it
    /// may have begun anew, and be set right only at the next tick.
    fn sleep_ns(&self) -> u64 {
        self.next_ns.saturating_sub(self.now_ns).min(LOOK_NS)
    }
}

impl Default for Holds {
    fn default() -> Self {
        Self {
            volumes: Vec::new(),
            next_ns: u64::MAX,
            now_ns: 0,
            armed_ns: u64::MAX,
            timers: 0,
        }
    }
}

impl VolumeSlot {
    /// Lets the `count` oldest through; `came` of all that are held are new. Answers the writes that are not let through
    /// where the volume is read-only.
    fn pass(
        &mut self,
        count: usize,
        came: usize,
        is_read_only: bool,
        now_ns: u64,
    ) -> Vec<RequestId> {
        let held = &mut self.held;
        held.paid = held.paid.saturating_sub(count);
        let (mut bytes, mut held_ns, mut refused) = (0, 0, Vec::new());
        for (request, since_ns) in held.queue.drain(..count) {
            bytes += request.op.data_bytes(request.range);
            held_ns += now_ns.saturating_sub(since_ns);
            if since_ns < now_ns {
                let in_flight = &mut self.inbox.requests[request_key(request.id)];
                self.trails.held(in_flight, since_ns, now_ns);
                // What the request itself takes is counted from here on.
                in_flight.since_ns = now_ns;
                self.machine
                    .took(Timed::Held, now_ns.saturating_sub(since_ns));
            }
            if is_read_only && is_write(request.op) {
                refused.push(request.id);
            } else {
                self.inbox.events.push(Event::Request(request));
            }
        }
        let left = held.queue.len();
        let oldest_ns = held.queue.front().map_or(0, |(_, since_ns)| *since_ns);
        if let Some(gate) = &self.gate {
            gate.note_held(left, came.min(left), oldest_ns);
            if count > 0 {
                gate.note_passed(now_ns, count as u64, bytes, held_ns);
            }
        }
        refused
    }
}

impl Core {
    /// Takes a volume's new requests into the line, if it has limits, and lets through what may pass.
    pub(super) fn admit(&mut self, index: u32) {
        // What is refused makes room for new ones, which may be there at once.
        while self.admit_some(index) {}
    }

    /// Whether some were refused or given up.
    fn admit_some(&mut self, index: u32) -> bool {
        let slot = &mut self.volumes[index as usize];
        let Some(gate) = &slot.gate else {
            return false;
        };
        let held = &mut slot.held;
        if !gate.is_limited() && held.is_empty() {
            return false;
        }
        let events = &mut slot.inbox.events;
        if held.is_off {
            // In their places: what the volume is told after them must not come before them.
            let is_refused = |event: &mut Event| matches!(event, Event::Request(request) if is_write(request.op));
            let refused: Vec<_> = match gate.passage() {
                Passage::ReadOnly => events.extract_if(.., is_refused).collect(),
                Passage::Open | Passage::Stalled => Vec::new(),
            };
            let passing = events.iter().filter_map(|event| match event {
                Event::Request(request) => Some(request),
                _ => None,
            });
            // Once: after a refusal it is looked again.
            if refused.is_empty() {
                charge(gate, now_ns(), passing);
            }
            for event in &refused {
                if let Event::Request(request) = event {
                    self.request_done(index, request_key(request.id), Err(IoError::ReadOnly));
                }
            }
            return !refused.is_empty();
        }
        let now_ns = now_ns();
        let came = held.take_in(events, now_ns);
        let passage = gate.passage();
        let given_up = match passage {
            // Now and then, not with every request that comes.
            Passage::Stalled if held.look_ns <= now_ns => {
                let of_volume = self.front_ends.iter();
                let of_volume = of_volume.filter(|(_, slot)| slot.volume == index);
                let gone = of_volume.filter(|(_, slot)| slot.front_end.is_gone());
                // Sorted, as the slab is.
                let gone: Vec<u32> = gone.map(|(n, _)| index_of(n)).collect();
                let requests = &slot.inbox.requests;
                held.give_up(|request| {
                    let front_end = requests[request_key(request.id)].front_end;
                    gone.binary_search(&front_end).is_ok()
                })
            }
            _ => Vec::new(),
        };
        for request in &given_up {
            // It took no time of the volume's.
            slot.inbox.requests[request_key(*request)].since_ns = now_ns;
        }
        let count = match passage {
            Passage::Stalled => 0,
            _ if gate.is_free() => {
                let unpaid = held.queue.iter().skip(held.paid);
                charge(gate, now_ns, unpaid.map(|(request, _)| request));
                held.queue.len()
            }
            _ => held.passable(gate, now_ns),
        };
        let refused = slot.pass(count, came, passage == Passage::ReadOnly, now_ns);
        let held = &mut slot.held;
        if !held.is_empty() {
            let look_ns = now_ns + LOOK_NS;
            held.look_ns = match passage {
                Passage::Stalled if held.look_ns > now_ns => look_ns.min(held.look_ns),
                Passage::Stalled => look_ns,
                Passage::Open | Passage::ReadOnly => look_ns.min(held.due_ns),
            };
            let holds = &mut self.holds;
            if !mem::replace(&mut held.is_listed, true) {
                holds.volumes.push(index);
            }
            holds.next_ns = holds.next_ns.min(held.look_ns);
            holds.now_ns = now_ns;
        }
        let some = !refused.is_empty() || !given_up.is_empty();
        for request in given_up {
            self.request_done(index, request_key(request), Err(IoError::ShuttingDown));
        }
        for request in refused {
            self.request_done(index, request_key(request), Err(IoError::ReadOnly));
        }
        some
    }

    /// Nothing of the volume is held from now on (what is held passes, before anything that the volume is told from now
    /// on), or again.
    pub(super) fn let_through(&mut self, index: u32, is_off: bool) {
        let slot = &mut self.volumes[index as usize];
        let held = &mut slot.held;
        held.is_off = is_off;
        if !is_off || held.is_empty() {
            return;
        }
        let now_ns = now_ns();
        // What came in this batch stays behind what came before.
        let came = held.take_in(&mut slot.inbox.events, now_ns);
        // What they owe is charged when they come by `admit`, in this batch.
        let count = held.queue.len();
        slot.pass(count, came, false, now_ns);
        self.touch(index);
    }

    /// A timer of held requests has ended.
    pub(super) fn hold_is_over(&mut self) {
        let now_ns = now_ns();
        let holds = &mut self.holds;
        holds.timers -= 1;
        if holds.timers == 0 || holds.armed_ns <= now_ns.saturating_add(EARLY_NS_MAX) {
            holds.armed_ns = u64::MAX;
        }
        (holds.next_ns, holds.now_ns) = (u64::MAX, now_ns);
        let mut listed = mem::take(&mut holds.volumes);
        listed.retain(|index| {
            let Some(slot) = self.volumes.get_mut(*index as usize) else {
                return false;
            };
            slot.held.is_listed = !slot.held.is_empty();
            if slot.held.is_listed && slot.held.look_ns <= now_ns {
                self.touch(*index);
            } else if slot.held.is_listed {
                self.holds.next_ns = self.holds.next_ns.min(slot.held.look_ns);
            }
            self.volumes[*index as usize].held.is_listed
        });
        self.holds.volumes = listed;
    }

    /// Has the ring wake the next volume in time.
    pub(super) fn arm_holds(&mut self) {
        let holds = &mut self.holds;
        if holds.next_ns >= holds.armed_ns {
            return;
        }
        holds.armed_ns = holds.next_ns;
        holds.timers += 1;
        let time_ns = holds.sleep_ns();
        let (seconds, ns) = (time_ns / 1_000_000_000, time_ns % 1_000_000_000);
        let ns = u32::try_from(ns).unwrap_or(u32::MAX);
        // One that waits for room on the ring gets the newer time too: it is an earlier one.
        let hold = &mut self.fixed.hold;
        *hold = types::Timespec::new().sec(seconds).nsec(ns);
        let entry = opcode::Timeout::new(&raw const *hold).build();
        let entry = entry.user_data(Token::Hold.pack());
        // SAFETY: the time is in a box that is never freed while the ring may use it (`abandon`).
        unsafe { self.ring.push(entry) };
    }
}

#[cfg(test)]
mod tests;
