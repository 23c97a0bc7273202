//! Memory that begins a page at a byte of one's choice, so that it can go to a device as it is.

use bytes::buf::Limit;
use bytes::{BufMut as _, Bytes};

use crate::page::PAGE_SIZE;

/// What direct I/O needs on any device, in bytes.
const PAGE: usize = PAGE_SIZE;

/// Bytes that are appended up to a length that is known before; one of them begins a page.
pub struct PageVec {
    memory: Vec<u8>,
    /// Where they begin.
    start: usize,
}

impl PageVec {
    /// None yet, and room for `len`, of which the one at `lead` begins a page.
    #[must_use]
    pub fn new(len: usize, lead: usize) -> Self {
        let mut memory = Vec::with_capacity(len + PAGE);
        let lead = memory.as_ptr() as usize + lead;
        let start = lead.next_multiple_of(PAGE) - lead;
        memory.resize(start, 0);
        Self { memory, start }
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.memory.len() - self.start
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends them.
    ///
    /// # Panics
    /// If there is no room for them: they would be moved, and begin no page any more.
    pub fn append(&mut self, bytes: &[u8]) {
        self.assert_room(bytes.len());
        self.memory.extend_from_slice(bytes);
    }

    /// Room for `count` more of them, for whoever has bytes to put there without a copy.
    ///
    /// # Panics
    /// As [`PageVec::append`].
    pub fn room(&mut self, count: usize) -> Limit<&mut Vec<u8>> {
        self.assert_room(count);
        (&mut self.memory).limit(count)
    }

    /// Appends so many zeroes.
    ///
    /// # Panics
    /// As [`PageVec::append`].
    pub fn append_zeroes(&mut self, count: usize) {
        self.assert_room(count);
        self.memory.resize(self.memory.len() + count, 0);
    }

    /// Those that there are.
    pub fn filled_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }

    fn assert_room(&self, count: usize) {
        let room = self.memory.capacity() - self.memory.len();
        assert!(count <= room, "more bytes than there is room for");
    }
}

impl From<PageVec> for Bytes {
    /// Without moving them.
    fn from(from: PageVec) -> Self {
        Self::from(from.memory).slice(from.start..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_of_ones_choice_begins_a_page_wherever_the_memory_is() {
        // Several at a time, so that they lie in different places.
        let made: Vec<Bytes> = (0..64)
            .map(|n| {
                let mut bytes = PageVec::new(8000, 16);
                assert!(bytes.is_empty());
                bytes.append(&[7; 16]);
                bytes.append(&[n; 7000]);
                bytes.append_zeroes(984);
                bytes.filled_mut()[7999] = n;
                assert_eq!(bytes.len(), 8000);
                bytes.into()
            })
            .collect();
        for (n, bytes) in (0..).zip(made) {
            assert_eq!(bytes[16..].as_ptr() as usize % PAGE, 0);
            assert_eq!(bytes.len(), 8000);
            assert_eq!(
                (bytes[15], bytes[16], bytes[7998], bytes[7999]),
                (7, n, 0, n)
            );
        }
    }

    #[test]
    #[should_panic(expected = "more bytes than there is room for")]
    fn bytes_that_there_is_no_room_for_are_refused() {
        let mut bytes = PageVec::new(10, 0);
        bytes.append_zeroes(PAGE + 11);
    }
}
