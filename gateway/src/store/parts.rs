//! Neighbouring parts of an object, each put where it is to lie as the answer comes in.

use std::io;

use bytes::Bytes;
use quarry_objfmt::PageVec;

use super::plain::Socket;

/// Parts of which some are there.
pub(super) struct Parts {
    /// With the length that each is to have.
    parts: Vec<(PageVec, usize)>,
    /// The first that is not whole.
    next: usize,
    /// Bytes that came, those that are no part's too.
    received: u64,
}

impl Parts {
    /// Parts of these lengths, in each of which the byte `lead` begins a page.
    pub(super) fn new(lens: &[usize], lead: usize) -> Self {
        let part = |len: &usize| (PageVec::new(*len, lead), *len);
        Self {
            parts: lens.iter().map(part).collect(),
            next: 0,
            received: 0,
        }
    }

    /// What comes next. What comes behind the last part is none of ours, and only counted.
    pub(super) fn receive(&mut self, mut piece: &[u8]) {
        self.received += piece.len() as u64;
        while let Some((part, len)) = self.parts.get_mut(self.next)
            && !piece.is_empty()
        {
            let (ours, rest) = piece.split_at(piece.len().min(*len - part.len()));
            part.append(ours);
            piece = rest;
            self.next += usize::from(part.len() == *len);
        }
    }

    /// Receives all of them from a connection whose next bytes they are, and nothing behind them.
    ///
    /// # Errors
    /// If the connection breaks or ends before; what came is there.
    pub(super) async fn receive_all(&mut self, socket: &mut Socket) -> io::Result<()> {
        while let Some((part, len)) = self.parts.get_mut(self.next) {
            match *len - part.len() {
                0 => self.next += 1,
                missing => match socket.receive(&mut part.room(missing)).await? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    count => self.received += count as u64,
                },
            }
        }
        Ok(())
    }

    /// Bytes that came.
    pub(super) const fn received(&self) -> u64 {
        self.received
    }

    /// What came of each.
    pub(super) fn into_bytes(self) -> Vec<Bytes> {
        let parts = self.parts.into_iter();
        parts.map(|(part, _)| part.into()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_same_in_whatever_pieces_they_come() {
        let bytes: Vec<u8> = (0..=250).cycle().take(20_000).collect();
        for piece_len in [1, 7, 4096, 9000, 20_000] {
            let mut parts = Parts::new(&[5000, 1, 9000, 5999], 16);
            for piece in bytes.chunks(piece_len) {
                parts.receive(piece);
            }
            assert_eq!(parts.received(), 20_000);
            let parts = parts.into_bytes();
            assert_eq!(parts.concat(), bytes);
            for part in parts.iter().filter(|part| part.len() > 16) {
                assert_eq!(part[16..].as_ptr() as usize % 4096, 0);
            }
        }
    }

    #[test]
    fn more_or_less_than_the_parts_is_told_by_the_count() {
        let mut parts = Parts::new(&[2, 2], 0);
        parts.receive(b"abc");
        assert_eq!(parts.received(), 3);
        parts.receive(b"de");
        parts.receive(b"f");
        assert_eq!(parts.received(), 6);
        assert_eq!(parts.into_bytes(), ["ab", "cd"]);
    }
}
