//! A session's I/O on the cache device and on the buffers of its requests, and what is left of it when
//! the host dies.

use bytes::Bytes;
use quarry_objfmt::{ChunkId, keys};
use quarry_volume::{Action, Event, IoId, Op, RequestId};
use rand::RngExt;
use rand::rngs::SmallRng;

use super::{Cx, Died, Pending, Session};
use crate::coverage::io_told;
use crate::device::{Arrives, SimDevice, Sync};
use crate::faults::Fault;

const EIO: i32 = 5;

impl Session {
    /// Carries out one I/O that is due, any one. False if there is none.
    pub fn step_io(&mut self, cx: &mut Cx<'_>) -> Result<bool, Died> {
        let due = (0..self.pending.len()).filter(|n| self.pending[*n].due_ms <= cx.now_ms);
        let due: Vec<usize> = due.collect();
        if due.is_empty() {
            return Ok(false);
        }
        let pick = due[cx.rng.random_range(0..due.len())];
        let Pending { action, sync, .. } = self.pending.swap_remove(pick);
        // Failures of which nobody is to hear.
        let is_aside = matches!(
            action,
            Action::FillWrite { .. } | Action::FetchDirect { .. }
        );
        let (io, result) = self.carry_out(&action, sync, cx);
        self.hurt |= result.is_err() && !is_aside;
        cx.digest.add((io.0, result));
        let told = io_told(&action, result.is_err());
        self.tell(Event::IoDone { io, result }, Some(told), cx)?;
        Ok(true)
    }

    fn carry_out(
        &mut self,
        action: &Action,
        sync: Option<Sync>,
        cx: &mut Cx<'_>,
    ) -> (IoId, Result<(), i32>) {
        match *action {
            Action::CacheRead {
                io,
                request,
                buffer_offset,
                offset,
                len,
            } => {
                let buf = self.part_mut(request, buffer_offset, len as usize);
                (io, cx.device.read(offset, buf))
            }
            Action::CacheWrite {
                io,
                request,
                buffer_offset,
                offset,
                len,
            } => {
                let data = self.part(request, buffer_offset, len);
                let result = cx.device.write(offset, data, false);
                let asked = self.requests.get_mut(&request.0);
                let asked = asked.expect("as above");
                // As a reactor: of those in one piece. Not of all of these, as not all are long enough.
                if request.0.is_multiple_of(2)
                    && asked.op == (Op::Write { fua: false })
                    && len as usize == asked.data.len()
                {
                    asked.placed = Some((offset, Bytes::copy_from_slice(&asked.data)));
                }
                (io, result)
            }
            Action::ZeroFill {
                io,
                request,
                buffer_offset,
                len,
            } => {
                self.part_mut(request, buffer_offset, len as usize).fill(0);
                (io, Ok(()))
            }
            Action::CopyToRequest {
                io,
                request,
                buffer_offset,
                ref data,
            } => {
                self.part_mut(request, buffer_offset, data.len())
                    .copy_from_slice(data);
                (io, Ok(()))
            }
            Action::FetchDirect {
                io,
                request,
                buffer_offset,
                chunk,
                object_offset,
                len,
            } => {
                let buf = self.part_mut(request, buffer_offset, len as usize);
                (io, receive(buf, chunk, object_offset, cx))
            }
            Action::WritePage {
                io,
                offset,
                ref page,
                durable,
            } => (io, cx.device.write(offset, &page[..], durable)),
            Action::FillWrite {
                io,
                offset,
                ref data,
            } => (io, cx.device.fill(offset, data)),
            Action::Sync { io } => {
                // As a reactor: a failure is everybody's, and for ever.
                if let Err(errno) = cx.device.sync_ends(sync.expect("it has begun")) {
                    cx.failure.note(errno);
                }
                (io, cx.failure.get())
            }
            ref other => unreachable!("{other:?} is no I/O"),
        }
    }

    fn part_mut(&mut self, request: RequestId, at: u32, len: usize) -> &mut [u8] {
        let asked = self.requests.get_mut(&request.0);
        let asked = asked.expect("a buffer is used while its request is in flight");
        &mut asked.data[at as usize..at as usize + len]
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

/// Receives part of a chunk's object as it is, or fails with some of it received.
fn receive(buf: &mut [u8], chunk: ChunkId, offset: u64, cx: &mut Cx<'_>) -> Result<(), i32> {
    let object = cx.bucket.peek(&keys::chunk_key(&cx.truth.tenant, chunk));
    let object = object.ok_or(EIO)?;
    let at = usize::try_from(offset).unwrap();
    let body = object.get(at..at + buf.len()).ok_or(EIO)?;
    if cx.rng.random_bool(cx.direct.unwrap()) {
        let some = cx.rng.random_range(0..buf.len());
        buf[..some].copy_from_slice(&body[..some]);
        cx.bucket.happened.note(Fault::DirectFailed);
        return Err(EIO);
    }
    buf.copy_from_slice(body);
    Ok(())
}
