//! Direct reads: misses that the kernel receives from the store into the request's own pages.
//!
//! Their data never pass through our memory, and so miss what happens there: the checksum, which
//! covers the whole frame, is not verified, and nothing of them is kept in the cache. It is a short
//! cut only: what fails on it in any way is fetched, and verified, as if it had not been tried.
//!
//! Not taken by a reader who goes on where one stopped: readahead hides the store's distance from
//! it, and needs memory to read ahead into. Nor by a read in many places: one GET brings up to
//! sixteen neighbouring frames the ordinary way, each of which would be a GET of its own here, for
//! each has a header.

use quarry_objfmt::frame::FRAME_HEADER_LEN;
use quarry_objfmt::{DataLoc, LbaRange, SECTOR_SIZE};

use super::read::{Piece, Source};
use super::{Cx, Io, Volume};
use crate::event::Action;

/// Most runs of a request that are received directly, each by a GET of its own: a read no longer
/// than a frame crosses at most one frame's end.
const DIRECT_RUNS_MAX: usize = 2;

#[allow(clippy::cast_possible_truncation, reason = "it is 16")]
const HEADER_BYTES: u32 = FRAME_HEADER_LEN as u32;

impl Volume {
    /// Whether what a request lacks is to be received directly.
    pub(super) fn goes_direct(&self, range: LbaRange, pieces: &[Piece]) -> bool {
        let missing = |piece: &&Piece| matches!(piece.source, Source::Store(_));
        self.reads.direct
            && pieces.iter().filter(missing).count() <= DIRECT_RUNS_MAX
            && !self.continues_a_stream(range.start)
    }

    /// Asks for a piece directly. False, with nothing done, if its frame is not stored as it is, or
    /// is on its way already.
    pub(super) fn fetch_direct(
        &mut self,
        slot: usize,
        piece: &Piece,
        at: DataLoc,
        cx: &mut Cx<'_>,
    ) -> bool {
        let Some(object_offset) = self.plain_offset(at, piece.len) else {
            return false;
        };
        if self.is_being_fetched(at) {
            return false;
        }
        let len = piece.len * SECTOR_SIZE;
        let io = self.io(Io::Direct {
            slot,
            piece: *piece,
        });
        cx.out.push(Action::FetchDirect {
            io,
            request: self.active[slot].request.id,
            buffer_offset: piece.buffer_offset,
            chunk: at.chunk,
            object_offset,
            len,
        });
        true
    }

    /// The byte of the chunk's object from which on `sectors` sectors lie as they are, if the
    /// frame's length says so: its payload is as long as the contents of a full frame, and what is compressed is
    /// shorter. (What is written now is not; what a head said of before that was lost, nobody knows.) A
    /// chunk's last frame, if it is not full, goes the ordinary way.
    fn plain_offset(&self, at: DataLoc, sectors: u32) -> Option<u64> {
        let frame_sectors = self.params.frame_sectors;
        let payload = at.stored_len.checked_sub(HEADER_BYTES)?;
        let skip = at.raw % frame_sectors;
        let is_plain = at.chunk.volume == self.params.id
            && payload == frame_sectors * SECTOR_SIZE
            && skip + sectors <= frame_sectors;
        let offset = u64::from(at.stored_offset) + u64::from(HEADER_BYTES);
        is_plain.then(|| offset + u64::from(skip) * u64::from(SECTOR_SIZE))
    }

    pub(super) fn direct_done(
        &mut self,
        slot: usize,
        piece: Piece,
        result: Result<(), i32>,
        cx: &mut Cx<'_>,
    ) {
        if result.is_ok() {
            self.stats.direct_reads += 1;
            self.stats.direct_bytes += u64::from(piece.len * SECTOR_SIZE);
            return self.piece_done(slot, Ok(()), cx);
        }
        self.stats.direct_fallbacks += 1;
        let Source::Store(at) = piece.source else {
            unreachable!("only what the store has is fetched")
        };
        let mut wanted = Vec::new();
        self.await_frame(slot, &piece, at, &mut wanted);
        self.fetch(&wanted, super::read::Why::Requests, cx);
    }
}
