//! The values that TOML has no type for: sizes, bounds, secrets and the log's form.

use std::fmt;
use std::str::FromStr;

use bytesize::ByteSize;

/// A count of bytes, written as in `64MiB`.
///
/// A bare letter is binary, as for truncate(1) and qemu-img: `100G` is 100 GiB, `100GB` is 10^11.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Size(u64);

const UNITS: [(&str, u64); 6] = [
    ("EiB", 1 << 60),
    ("PiB", 1 << 50),
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
];

impl Size {
    /// This many bytes.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The count of bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// For people: as [`fmt::Display`] where that is short, else rounded to a tenth of the largest unit.
    #[must_use]
    pub fn human(self) -> String {
        match UNITS.iter().find(|(_, unit)| self.0 >= *unit) {
            None => format!("{}B", self.0),
            Some((name, unit)) if self.0.is_multiple_of(*unit) => {
                format!("{}{name}", self.0 / unit)
            }
            Some((name, unit)) => {
                let tenths = (u128::from(self.0) * 10 + u128::from(*unit) / 2) / u128::from(*unit);
                format!("{}.{}{name}", tenths / 10, tenths % 10)
            }
        }
    }
}

/// Exact and readable back: the largest binary unit that divides it, else plain bytes.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS
            .iter()
            .find(|(_, unit)| self.0 != 0 && self.0.is_multiple_of(*unit))
        {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}B", self.0),
        }
    }
}

/// Why a text is no [`Size`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SizeError {
    /// No number, or a unit that is none.
    #[error("{text:?} is not a size; write a number and a unit, such as 64MiB or 100GiB")]
    Malformed {
        /// What was given.
        text: String,
    },
    /// More than u64 holds.
    #[error("{text:?} is more bytes than can be counted; the largest volume is 1EiB")]
    TooLarge {
        /// What was given.
        text: String,
    },
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let trimmed = text.trim();
        let malformed = || SizeError::Malformed {
            text: text.to_owned(),
        };
        let mut spelt = trimmed.to_owned();
        let unit = trimmed
            .trim_start_matches(|c: char| c.is_ascii_digit() || c == '.')
            .trim();
        if unit.len() == 1 && unit.chars().all(|c| "kKmMgGtTpPeE".contains(c)) {
            spelt.push_str("iB");
        }
        let size: ByteSize = spelt.parse().map_err(|_| malformed())?;
        if size.0 == u64::MAX {
            return Err(SizeError::TooLarge {
                text: text.to_owned(),
            });
        }
        Ok(Self(size.0))
    }
}

/// A part of something: a share of it or so many bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bound {
    /// This many hundredths.
    Percent(u8),
    /// This much.
    Size(Size),
}

impl Bound {
    /// The bound in bytes of something that has `total` bytes; never more than `total`.
    #[must_use]
    pub const fn of(self, total: u64) -> u64 {
        match self {
            Self::Percent(p) => {
                let p = if p > 100 { 100 } else { p as u64 };
                total / 100 * p + total % 100 * p / 100
            }
            Self::Size(Size(bytes)) if bytes < total => bytes,
            Self::Size(_) => total,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(p) => write!(f, "{p}%"),
            Self::Size(size) => size.fmt(f),
        }
    }
}

impl FromStr for Bound {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        match text.trim().strip_suffix('%') {
            Some(share) => match share.trim().parse() {
                Ok(p) if p <= 100 => Ok(Self::Percent(p)),
                _ => Err(SizeError::Malformed {
                    text: text.to_owned(),
                }),
            },
            None => text.parse().map(Self::Size),
        }
    }
}

/// A text that must not be seen.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the one that must send it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Form of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LogFormat {
    /// A line of text an event.
    #[default]
    Human,
    /// A JSON object an event.
    Json,
}

impl LogFormat {
    /// As written in the file.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Human => "human",
            Self::Json => "json",
        }
    }
}

/// The best way that a block device's data may go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum UblkMode {
    /// No copy; the kernel hands a request's pages on by itself.
    #[default]
    ZeroCopy,
    /// No copy; the daemon asks for a request's pages.
    ZeroCopyByHand,
    /// One copy, made by the daemon.
    UserCopy,
    /// One copy, made by the kernel.
    Plain,
}

impl UblkMode {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::ZeroCopy,
        Self::ZeroCopyByHand,
        Self::UserCopy,
        Self::Plain,
    ];

    /// As written in the file.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ZeroCopy => "zero-copy",
            Self::ZeroCopyByHand => "zero-copy-by-hand",
            Self::UserCopy => "user-copy",
            Self::Plain => "plain",
        }
    }
}

/// What vouches for a large upload on its way to the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum UploadCheck {
    /// Its CRC-64 if the server shows that it checks it, else the signature.
    #[default]
    Auto,
    /// The request's signature, which covers its SHA-256.
    Signature,
    /// Its CRC-64 (CRC-64/NVME, in a header), without asking the server first.
    Crc64Nvme,
    /// Nothing but the connection.
    None,
}

impl UploadCheck {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Signature, Self::Crc64Nvme, Self::None];

    /// As written in the file.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Signature => "signature",
            Self::Crc64Nvme => "crc64nvme",
            Self::None => "none",
        }
    }
}

/// By what a tenant may attach its volumes to the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TenantAttach {
    /// NBD: nothing of the host becomes its.
    #[default]
    Nbd,
    /// ublk too: block devices on the host.
    Any,
    /// Not at all.
    None,
}

impl TenantAttach {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Nbd, Self::Any, Self::None];

    /// As written in the file.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::Any => "any",
            Self::None => "none",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_with_each_spelling_is_the_same_count() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("64MiB", 64 << 20),
            (" 64 MiB ", 64 << 20),
            ("100G", 100 << 30),
            ("100 g", 100 << 30),
            ("100GB", 100_000_000_000),
            ("1.5GiB", 3 << 29),
            ("1EiB", 1 << 60),
            ("9007199254740993B", 9_007_199_254_740_993),
        ] {
            assert_eq!(text.parse(), Ok(Size::new(bytes)), "{text}");
        }
    }

    #[test]
    fn size_of_nonsense_is_refused() {
        for text in ["", "GiB", "-1", "1 gigabyte", "1..2MiB", "ten", "1MiB2"] {
            assert!(
                matches!(text.parse::<Size>(), Err(SizeError::Malformed { .. })),
                "{text}"
            );
        }
        assert!(matches!(
            "99EiB".parse::<Size>(),
            Err(SizeError::TooLarge { .. })
        ));
    }

    #[test]
    fn size_shown_reads_back() {
        for bytes in [
            0,
            1,
            1023,
            1024,
            1536,
            64 << 20,
            (64 << 20) + 1,
            1 << 60,
            3 << 59,
        ] {
            let size = Size::new(bytes);
            assert_eq!(size.to_string().parse(), Ok(size));
        }
        assert_eq!(Size::new(100 << 30).to_string(), "100GiB");
        assert_eq!(Size::new(1500).human(), "1.5KiB");
        assert_eq!(Size::new((1 << 60) - 1).human(), "1024.0PiB");
    }

    #[test]
    fn bound_as_share_or_size_stays_within_the_whole() {
        assert_eq!("70%".parse(), Ok(Bound::Percent(70)));
        assert_eq!("512MiB".parse(), Ok(Bound::Size(Size::new(512 << 20))));
        assert!("101%".parse::<Bound>().is_err());
        assert_eq!(Bound::Percent(70).of(1000), 700);
        assert_eq!(Bound::Percent(100).of(u64::MAX), u64::MAX);
        assert_eq!(Bound::Size(Size::new(5000)).of(1000), 1000);
    }
}
