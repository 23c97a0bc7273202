//! The words of the format as types: addresses, counts and names that cannot be mixed up.
//!
//! Every address inside a volume is a count of 512-byte sectors from its start ([`Lba`]); every
//! length of volume data is a count of sectors ([`Sectors`]). Bytes appear only at the kernel's
//! and the socket's edge, where they become sectors once.

use std::fmt;

use uuid::Uuid;

use crate::error::check_up_to;

/// Bytes in a sector; the unit of every address in a volume, whatever its logical block size.
pub const SECTOR_SIZE: u32 = 512;

/// Largest volume: 1 EiB, in sectors (2^60 / 2^9).
pub const VOLUME_SECTORS_MAX: u64 = 1 << 51;

/// A sector's address in a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lba(u64);

impl Lba {
    /// The first sector of a volume.
    pub const ZERO: Self = Self(0);

    /// The sector with this number.
    #[must_use]
    pub const fn new(sector: u64) -> Self {
        Self(sector)
    }

    /// The sector's number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The sector `n` further on; `None` past the end of u64.
    #[must_use]
    pub const fn checked_add(self, n: Sectors) -> Option<Self> {
        match self.0.checked_add(n.0) {
            Some(v) => Some(Self(v)),
            None => None,
        }
    }

    /// The sector `n` further on.
    ///
    /// # Panics
    /// On overflow: for addresses that were range-checked when they came in.
    #[must_use]
    pub const fn add(self, n: Sectors) -> Self {
        match self.checked_add(n) {
            Some(v) => v,
            None => panic!("an address past the end of u64 got through the range check"),
        }
    }

    /// How far this sector lies behind `earlier`.
    ///
    /// # Panics
    /// If `earlier` is later than `self`.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Sectors {
        match self.0.checked_sub(earlier.0) {
            Some(v) => Sectors(v),
            None => panic!("the earlier address is the later one"),
        }
    }
}

impl fmt::Debug for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lba{}", self.0)
    }
}

/// A count of 512-byte sectors.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sectors(u64);

impl Sectors {
    /// None.
    pub const ZERO: Self = Self(0);

    /// `n` sectors.
    #[must_use]
    pub const fn new(n: u64) -> Self {
        Self(n)
    }

    /// The count.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The count in bytes.
    ///
    /// # Panics
    /// On overflow: volumes end at 2^51 sectors, so it is our own mistake.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self.0.checked_mul(SECTOR_SIZE as u64) {
            Some(v) => v,
            None => panic!("more bytes than u64 holds"),
        }
    }

    /// Whole sectors in `bytes`; `None` if it is not a multiple of 512.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_multiple_of(SECTOR_SIZE as u64) {
            Some(Self(bytes / SECTOR_SIZE as u64))
        } else {
            None
        }
    }
}

impl fmt::Debug for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0)
    }
}

/// A half-open run of sectors `[start, end)` of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LbaRange {
    /// First sector.
    pub start: Lba,
    /// First sector behind the range.
    pub end: Lba,
}

impl LbaRange {
    /// `len` sectors from `start`; `None` if the end does not fit u64.
    #[must_use]
    pub const fn new(start: Lba, len: Sectors) -> Option<Self> {
        match start.checked_add(len) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// Its length.
    #[must_use]
    pub const fn len(self) -> Sectors {
        self.end.since(self.start)
    }

    /// Whether it holds no sector.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start.0 >= self.end.0
    }
}

impl fmt::Debug for LbaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start.0, self.end.0)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($int:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name($int);

        impl $name {
            /// The first one.
            pub const ZERO: Self = Self(0);

            /// The one with this number.
            #[must_use]
            pub const fn new(n: $int) -> Self {
                Self(n)
            }

            /// Its number.
            #[must_use]
            pub const fn get(self) -> $int {
                self.0
            }

            /// The one after it.
            ///
            /// # Panics
            /// When the numbers are used up, which no volume lives to see.
            #[must_use]
            pub const fn next(self) -> Self {
                match self.0.checked_add(1) {
                    Some(n) => Self(n),
                    None => panic!(concat!(stringify!($name), " is used up")),
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number!(
    /// The term of one writer: raised in `head` by each attach, part of every chunk and map key.
    Epoch(u32)
);
number!(
    /// A chunk's place in its volume's log, counted on across epochs.
    ChunkSeq(u64)
);
number!(
    /// A write's place in its volume's order of completion; discards and zeroes count as writes.
    WriteSeq(u64)
);
number!(
    /// The number of a map object, unique within its volume and epoch.
    MapSeq(u64)
);
number!(
    /// A segment of the cache device, by position.
    SegmentId(u32)
);
number!(
    /// Counts the times segments were opened, over the whole cache device: no two share one.
    Generation(u64)
);

impl ChunkSeq {
    /// The first number of chunks that are not of the log: compaction made them.
    pub const COMPACTED: Self = Self(1 << 63);

    /// Refuses a place in a log that none reaches: see `limited!`.
    pub(crate) fn check_of_log(self, what: &'static str) -> Result<(), crate::FormatError> {
        check_up_to(what, "ChunkSeq", self.0, 1 << 62)
    }

    /// Whether it is a compaction's chunk, and in no log.
    #[must_use]
    pub const fn is_compacted(self) -> bool {
        self.0 >= Self::COMPACTED.0
    }
}

/// Numbers that what comes from a store must not exceed: one more is made of each in the life of a volume, and none that was not made
/// up comes near them.
macro_rules! limited {
    ($name:ident, $max:expr) => {
        impl $name {
            /// The largest that is read from a store.
            pub const MAX: Self = Self($max);

            /// Refuses one past the largest.
            pub(crate) fn check(self, what: &'static str) -> Result<(), crate::FormatError> {
                check_up_to(what, stringify!($name), self.0.into(), Self::MAX.0.into())
            }
        }
    };
}

limited!(Epoch, u32::MAX - (1 << 16));
limited!(WriteSeq, 1 << 62);
limited!(MapSeq, 1 << 62);

macro_rules! uuid_name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// From the 16 bytes that the formats store.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }

            /// The 16 bytes that the formats store.
            #[must_use]
            pub const fn to_bytes(self) -> [u8; 16] {
                *self.0.as_bytes()
            }

            /// From its text form.
            ///
            /// # Errors
            /// If it is not a UUID.
            pub fn parse(text: &str) -> Result<Self, uuid::Error> {
                Uuid::parse_str(text).map(Self)
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

uuid_name!(
    /// A volume, for ever: names can be given anew, ids cannot.
    VolumeId
);
uuid_name!(
    /// A cache device, from the day it was formatted.
    CacheId
);

/// A chunk of any volume: what a map entry points into.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId {
    /// The volume that wrote it; of a clone's entries the volume it was cloned from.
    pub volume: VolumeId,
    /// The term it was written in.
    pub epoch: Epoch,
    /// Its place in the log; a compaction's number.
    pub seq: ChunkSeq,
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/chunk/{:08x}/{:016x}",
            self.volume,
            self.epoch.get(),
            self.seq.get()
        )
    }
}

/// Where a run of sectors lies in the object store, in as many words as one ranged GET needs.
///
/// The run never leaves its frame: `raw` .. `raw + len` is inside frame number
/// `raw / frame_sectors` of the chunk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DataLoc {
    /// The chunk.
    pub chunk: ChunkId,
    /// The first sector in the chunk's raw space (its frames' contents, uncompressed, end to end).
    pub raw: u32,
    /// Where the frame (header and payload) starts in the chunk object, in bytes.
    pub stored_offset: u32,
    /// The frame's length in the object (header and payload), in bytes.
    pub stored_len: u32,
}

impl DataLoc {
    /// The same frame, `n` sectors further on in it.
    #[must_use]
    pub const fn skip(self, n: u32) -> Self {
        Self {
            raw: self.raw + n,
            ..self
        }
    }
}

/// What a run of sectors reads as, in committed state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Location {
    /// Zeroes: written as such, discarded, or never written.
    Zero,
    /// Data in a chunk.
    Data(DataLoc),
}

/// One run of sectors and what it reads as: the unit of the map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapEntry {
    /// Its first sector.
    pub start: Lba,
    /// How many; never 0. A data run is never longer than what its frame still holds.
    pub len: u32,
    /// Where it is.
    pub location: Location,
}

impl MapEntry {
    /// The first sector behind it.
    ///
    /// # Panics
    /// On overflow: what is read is checked to end inside a volume, so it is our own mistake.
    #[must_use]
    pub const fn end(&self) -> Lba {
        self.start.add(Sectors::new(self.len as u64))
    }
}
