//! The 16 bytes that every structure in the object store begins with, frames excepted.
//!
//! Byte table in `FORMAT.md`.
//!
//! Invariant: a body is handed out only after its magic, version, length and checksum passed.

use crate::error::{FormatError, Result, check_up_to};
use crate::wire::{Reader, put_u16};

/// Bytes of the prologue.
pub(crate) const PROLOGUE_LEN: usize = 16;

/// Longest host name kept, in bytes; longer ones are cut.
pub const HOST_LEN_MAX: usize = 255;

/// One kind of structure.
pub(crate) struct Format {
    /// Its first four bytes.
    pub magic: [u8; 4],
    /// The version this build writes, and the newest it reads.
    pub version: u16,
    /// Its name in errors.
    pub what: &'static str,
    /// Its longest encoding.
    pub len_max: usize,
}

impl Format {
    /// A buffer with room for the prologue; the body is appended by the caller.
    pub fn begin(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        out.extend_from_slice(&self.magic);
        put_u16(&mut out, self.version);
        put_u16(&mut out, 0);
        out.resize(PROLOGUE_LEN, 0);
        out
    }

    /// Writes length and checksum into a buffer that holds the prologue and the whole body.
    ///
    /// # Panics
    /// If the structure is longer than its format allows.
    pub fn seal(&self, out: &mut [u8]) {
        assert!(
            out.len() <= self.len_max,
            "{} of {} bytes",
            self.what,
            out.len()
        );
        let len = u32::try_from(out.len()).expect("len_max fits 32 bits");
        out[8..12].copy_from_slice(&len.to_le_bytes());
        let crc = checksum(out);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
    }

    /// The structure's length, from its first 16 bytes. Every version begins with them, so this
    /// is the one thing that may be believed before the checksum: to know where it ends.
    pub fn encoded_len(&self, prefix: &[u8]) -> Result<usize> {
        let mut reader = Reader::new(prefix, self.what);
        let magic = reader.array()?;
        if magic != self.magic {
            return Err(FormatError::Magic {
                what: self.what,
                found: magic,
            });
        }
        reader.bytes(4)?;
        let len = reader.u32()?;
        check_up_to(self.what, "length", len.into(), self.len_max as u64)?;
        if (len as usize) < PROLOGUE_LEN {
            return Err(FormatError::invalid(
                self.what,
                "the length is shorter than the prologue",
            ));
        }
        Ok(len as usize)
    }

    /// The version, and a reader of the body, of the structure that `bytes` begin with; what follows is
    /// ignored.
    pub fn open_leading<'a>(&self, bytes: &'a [u8]) -> Result<(u16, Reader<'a>)> {
        let len = self.encoded_len(bytes)?;
        let Some(whole) = bytes.get(..len) else {
            return Err(FormatError::Truncated {
                what: self.what,
                need: len as u64,
                have: bytes.len() as u64,
            });
        };
        let mut reader = Reader::new(whole, self.what);
        reader.bytes(4)?;
        let version = reader.u16()?;
        let flags = reader.u16()?;
        reader.bytes(4)?;
        // Before the version: one flipped bit must not look like a newer build's work.
        if reader.u32()? != checksum(whole) {
            return Err(FormatError::Checksum { what: self.what });
        }
        if version == 0 || version > self.version {
            let (what, found, supported) = (self.what, version, self.version);
            return Err(FormatError::Version {
                what,
                found,
                supported,
            });
        }
        if flags != 0 {
            return Err(FormatError::invalid(
                self.what,
                "a flag is set that no version knows",
            ));
        }
        Ok((version, reader))
    }

    /// The version, and a reader of the body, of the structure that `bytes` are.
    pub fn open<'a>(&self, bytes: &'a [u8]) -> Result<(u16, Reader<'a>)> {
        let len = self.encoded_len(bytes)?;
        if bytes.len() > len {
            let extra = (bytes.len() - len) as u64;
            return Err(FormatError::Trailing {
                what: self.what,
                extra,
            });
        }
        self.open_leading(bytes)
    }
}

/// CRC32C over all but the checksum's own four bytes.
fn checksum(whole: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&whole[..12]), &whole[PROLOGUE_LEN..])
}

/// Appends a string of at most 255 bytes: length, bytes. A longer one is cut at a character.
pub(crate) fn put_str(out: &mut Vec<u8>, text: &str) {
    let kept = cut(text);
    out.push(u8::try_from(kept.len()).expect("cut to 255 bytes"));
    out.extend_from_slice(kept.as_bytes());
}

/// Reads what [`put_str`] wrote.
pub(crate) fn read_str(reader: &mut Reader<'_>) -> Result<String> {
    let len = reader.u8()? as usize;
    let bytes = reader.bytes(len)?;
    let text = std::str::from_utf8(bytes)
        .map_err(|_| FormatError::invalid(reader.what(), "a text is not UTF-8"))?;
    Ok(text.to_owned())
}

/// A text that others wrote, as people are shown it: what does something to a terminal, or begins another line of a log,
/// is a space.
#[must_use]
pub fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(shown).collect()
}

/// The longest leading part of `text` that fits [`HOST_LEN_MAX`].
pub(crate) fn cut(text: &str) -> &str {
    let mut len = text.len().min(HOST_LEN_MAX);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    &text[..len]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEST: Format = Format {
        magic: *b"QYxx",
        version: 2,
        what: "test",
        len_max: 64,
    };

    fn sample() -> Vec<u8> {
        let mut out = TEST.begin();
        out.extend_from_slice(b"body");
        TEST.seal(&mut out);
        out
    }

    #[test]
    fn prologue_sound_structure_opens() {
        let bytes = sample();
        let (_, mut reader) = TEST.open(&bytes).unwrap();
        assert_eq!(reader.bytes(4), Ok(&b"body"[..]));
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn prologue_any_bit_flip_is_refused() {
        for bit in 0..sample().len() * 8 {
            let mut bytes = sample();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(TEST.open(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn prologue_older_version_opens_and_newer_is_refused() {
        let mut bytes = sample();
        bytes[4] = 1;
        TEST.seal(&mut bytes);
        assert!(TEST.open(&bytes).is_ok());
        bytes[4] = 3;
        TEST.seal(&mut bytes);
        let error = TEST.open(&bytes).unwrap_err();
        assert_eq!(
            error,
            FormatError::Version {
                what: "test",
                found: 3,
                supported: 2
            }
        );
    }

    #[test]
    fn text_longer_than_the_limit_is_cut_at_a_character() {
        let mut out = Vec::new();
        put_str(&mut out, &"ä".repeat(200));
        let mut reader = Reader::new(&out, "test");
        assert_eq!(read_str(&mut reader), Ok("ä".repeat(127)));
    }
}
