//! Little-endian reading and writing of fixed integers and varints.
//!
//! [`Reader`] never panics and never reads past its slice; every failure names the structure.
//! Varints are LEB128: 7 bits a byte, low bits first, the shortest form only, so that one value
//! has one encoding.

use crate::error::{FormatError, Result};

/// Longest varint: 64 bits in groups of 7.
pub const VARINT_MAX_LEN: usize = 10;

/// A cursor over untrusted bytes.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads `bytes`, calling them `what` in errors.
    #[must_use]
    pub const fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, at: 0, what }
    }

    /// The structure's name in errors.
    #[must_use]
    pub const fn what(&self) -> &'static str {
        self.what
    }

    /// How many bytes were read.
    #[must_use]
    pub const fn position(&self) -> usize {
        self.at
    }

    /// How many bytes are left.
    #[must_use]
    pub const fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// If fewer are left.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = rest.get(..n) else {
            return Err(FormatError::Truncated {
                what: self.what,
                need: n as u64,
                have: rest.len() as u64,
            });
        };
        self.at += n;
        Ok(taken)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// If fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    /// The next byte, which is still to be read.
    #[must_use]
    pub fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    /// One byte.
    ///
    /// # Errors
    /// If none is left.
    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    /// Two bytes.
    ///
    /// # Errors
    /// If fewer are left.
    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Four bytes.
    ///
    /// # Errors
    /// If fewer are left.
    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// If fewer are left.
    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A varint.
    ///
    /// # Errors
    /// If it is cut short, wider than 64 bits, or not the shortest form.
    pub fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for index in 0..VARINT_MAX_LEN {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if index == VARINT_MAX_LEN - 1 && byte > 1 {
                return Err(FormatError::invalid(
                    self.what,
                    "a varint is wider than 64 bits",
                ));
            }
            value |= bits << (7 * index);
            if byte & 0x80 == 0 {
                if byte == 0 && index > 0 {
                    return Err(FormatError::invalid(
                        self.what,
                        "a varint is not in its shortest form",
                    ));
                }
                return Ok(value);
            }
        }
        Err(FormatError::invalid(
            self.what,
            "a varint is wider than 64 bits",
        ))
    }

    /// A varint that fits 32 bits.
    ///
    /// # Errors
    /// As [`Reader::varint`], or if it does not fit.
    pub fn varint_u32(&mut self) -> Result<u32> {
        let what = self.what;
        u32::try_from(self.varint()?)
            .map_err(|_| FormatError::invalid(what, "a varint is wider than 32 bits"))
    }

    /// A count of items that take at least `min_len` bytes each: never more than the bytes left
    /// can hold, so a vector of that capacity is safe to reserve.
    ///
    /// # Errors
    /// As [`Reader::varint`], or if the bytes left cannot hold so many.
    pub fn count(&mut self, min_len: usize) -> Result<usize> {
        let count = self.varint()?;
        self.fits(count, min_len)
    }

    /// A count as [`Reader::count`] has it, of four bytes.
    ///
    /// # Errors
    /// As [`Reader::u32`], or if the bytes left cannot hold so many.
    pub fn count_u32(&mut self, min_len: usize) -> Result<usize> {
        let count = self.u32()?;
        self.fits(count.into(), min_len)
    }

    fn fits(&self, count: u64, min_len: usize) -> Result<usize> {
        let most = (self.remaining() / min_len.max(1)) as u64;
        if count > most {
            return Err(FormatError::Truncated {
                what: self.what,
                need: count.saturating_mul(min_len as u64),
                have: self.remaining() as u64,
            });
        }
        usize::try_from(count).map_err(|_| FormatError::invalid(self.what, "a count is too large"))
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// If bytes are left.
    pub fn finish(self) -> Result<()> {
        match self.remaining() {
            0 => Ok(()),
            extra => Err(FormatError::Trailing {
                what: self.what,
                extra: extra as u64,
            }),
        }
    }
}

/// Appends one byte.
pub fn put_u8(out: &mut Vec<u8>, value: u8) {
    out.push(value);
}

/// Appends two bytes.
pub fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Appends four bytes.
pub fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Appends eight bytes.
pub fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Appends a varint in its shortest form.
#[expect(clippy::cast_possible_truncation, reason = "masked to 7 bits")]
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Folds a signed difference so that small ones of either sign are small varints.
#[must_use]
pub const fn zigzag(value: i64) -> u64 {
    (value.cast_unsigned() << 1) ^ (value >> 63).cast_unsigned()
}

/// Undoes [`zigzag`].
#[must_use]
pub const fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn varint_any_value_round_trips(value: u64, tail: u8) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            prop_assert!(out.len() <= VARINT_MAX_LEN);
            out.push(tail);
            let mut reader = Reader::new(&out, "test");
            prop_assert_eq!(reader.varint(), Ok(value));
            prop_assert_eq!(reader.remaining(), 1);
        }

        #[test]
        fn varint_any_bytes_reencode_to_what_was_read(bytes: Vec<u8>) {
            let mut reader = Reader::new(&bytes, "test");
            if let Ok(value) = reader.varint() {
                let mut out = Vec::new();
                put_varint(&mut out, value);
                prop_assert_eq!(&bytes[..reader.position()], &out[..]);
            }
        }

        #[test]
        fn zigzag_any_value_round_trips(value: i64) {
            prop_assert_eq!(unzigzag(zigzag(value)), value);
        }
    }

    #[test]
    fn reader_bytes_left_are_refused_at_the_end() {
        let mut reader = Reader::new(&[1, 2, 3], "test");
        assert_eq!(reader.u16(), Ok(0x0201));
        assert_eq!(
            reader.finish(),
            Err(FormatError::Trailing {
                what: "test",
                extra: 1
            })
        );
    }

    #[test]
    fn reader_count_beyond_the_bytes_is_refused() {
        let mut out = Vec::new();
        put_varint(&mut out, 1 << 40);
        assert!(Reader::new(&out, "test").count(1).is_err());
    }
}
