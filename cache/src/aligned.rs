//! Page-aligned memory for direct I/O.

use std::ops::{Deref, DerefMut};

/// Alignment of every buffer, in bytes: a page, which satisfies any device's direct I/O.
const ALIGNMENT: usize = 4096;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; ALIGNMENT]);

/// A zero-initialised byte buffer whose address is a multiple of 4096.
pub struct AlignedBuf {
    pages: Vec<Page>,
    len: usize,
}

impl AlignedBuf {
    /// A buffer of `len` bytes, all zero.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self {
            pages: vec![Page([0; ALIGNMENT]); len.div_ceil(ALIGNMENT)],
            len,
        }
    }

    /// Makes it `len` bytes long; what it holds then is of before, or zero.
    pub fn set_len(&mut self, len: usize) {
        let pages = len.div_ceil(ALIGNMENT);
        if pages > self.pages.len() {
            self.pages.resize(pages, Page([0; ALIGNMENT]));
        }
        self.len = len;
    }

    /// Bytes that it has memory for.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.pages.len() * ALIGNMENT
    }

    /// An aligned copy of `bytes`.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `pages` owns at least `len` initialised bytes, laid end to end: `Page` is
        // `repr(C)`, as large as its alignment, and so has no padding.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow the only one.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_of_odd_length_is_aligned_and_whole() {
        let buf = AlignedBuf::copy_of(&[7; 5000]);
        assert_eq!(buf.as_ptr() as usize % ALIGNMENT, 0);
        assert_eq!(buf.len(), 5000);
        assert!(buf.iter().all(|b| *b == 7));
    }
}
