//! A session's I/O on the cache device and on the buffers of its requests, and what is left of it when
//! the host dies.

use quarry_volume::{Action, Event, IoId, RequestId};
use rand::RngExt;
use rand::rngs::SmallRng;

use super::{Cx, Died, Pending, Session};
use crate::device::{Arrives, SimDevice};

impl Session {
    /// Carries out one I/O that is due, any one. False if there is none.
    pub fn step_io(&mut self, cx: &mut Cx<'_>) -> Result<bool, Died> {
        let due = (0..self.pending.len()).filter(|n| self.pending[*n].due_ms <= cx.now_ms);
        let due: Vec<usize> = due.collect();
        if due.is_empty() {
            return Ok(false);
        }
        let pick = due[cx.rng.random_range(0..due.len())];
        let Pending { action, .. } = self.pending.swap_remove(pick);
        let is_fill = matches!(action, Action::FillWrite { .. });
        let (io, result) = self.carry_out(action, cx);
        self.hurt |= result.is_err() && !is_fill;
        cx.digest.add((io.0, result));
        self.feed(Event::IoDone { io, result }, cx)?;
        Ok(true)
    }

    fn carry_out(&mut self, action: Action, cx: &mut Cx<'_>) -> (IoId, Result<(), i32>) {
        match action {
            Action::CacheRead {
                io,
                request,
                buffer_offset,
                offset,
                len,
            } => {
                let read = cx.device.read(offset, len as usize);
                let result = read.map(|data| self.put(request, buffer_offset, &data));
                (io, result)
            }
            Action::CacheWrite {
                io,
                request,
                buffer_offset,
                offset,
                len,
            } => {
                let data = self.part(request, buffer_offset, len);
                (io, cx.device.write(offset, data, false))
            }
            Action::ZeroFill {
                io,
                request,
                buffer_offset,
                len,
            } => {
                self.put(request, buffer_offset, &vec![0; len as usize]);
                (io, Ok(()))
            }
            Action::CopyToRequest {
                io,
                request,
                buffer_offset,
                data,
            } => {
                self.put(request, buffer_offset, &data);
                (io, Ok(()))
            }
            Action::WritePage {
                io,
                offset,
                page,
                durable,
            } => (io, cx.device.write(offset, &page[..], durable)),
            Action::FillWrite { io, offset, data } => (io, cx.device.fill(offset, &data)),
            Action::Sync { io } => {
                // As a reactor: a failure is everybody's, and for ever.
                if let Err(errno) = cx.device.sync_data() {
                    cx.failure.note(errno);
                }
                (io, cx.failure.get())
            }
            other => unreachable!("{other:?} is no I/O"),
        }
    }

    fn put(&mut self, request: RequestId, at: u32, data: &[u8]) {
        let asked = self.requests.get_mut(&request.0);
        let asked = asked.expect("a buffer is used while its request is in flight");
        let at = at as usize;
        asked.data[at..at + data.len()].copy_from_slice(data);
    }

    fn part(&self, request: RequestId, at: u32, len: u32) -> &[u8] {
        let asked = self.requests.get(&request.0);
        let asked = asked.expect("a buffer is used while its request is in flight");
        &asked.data[at as usize..(at + len) as usize]
    }

    /// The host is dead: writes that were under way have arrived, or not, or in part.
    pub fn bury(self, whole_only: bool, device: &SimDevice, rng: &mut SmallRng) {
        for Pending { action, .. } in &self.pending {
            let arrives = match rng.random_range(0..3) {
                0 => Arrives::Nothing,
                1 if !whole_only => Arrives::AnySectors,
                _ => Arrives::All,
            };
            match action {
                Action::CacheWrite {
                    request,
                    buffer_offset,
                    offset,
                    len,
                    ..
                } => device.arrive(*offset, self.part(*request, *buffer_offset, *len), arrives),
                Action::WritePage { offset, page, .. } => {
                    device.arrive(*offset, &page[..], arrives);
                }
                Action::FillWrite { offset, data, .. } => device.arrive(*offset, data, arrives),
                _ => {}
            }
        }
    }
}
