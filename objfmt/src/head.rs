//! `head`: the one object of a volume that is ever replaced, by conditional PUT only.
//!
//! Says what the volume is, who may write to it, which map it has, and which ranges of its log
//! come after that map. Byte table in `FORMAT.md`.
//!
//! Bytes behind the last field are refused, and so is a later version: a head is read, changed and
//! written back, and a build that carried on without a field it does not know would drop it. Each
//! new field therefore raises the version; every build reads all versions up to its own.

use crate::codec::{Compression, Encryption};
use crate::error::{FormatError, Result};
use crate::frame::frame_sectors_valid;
use crate::keys::{TenantName, VolumeName};
use crate::prologue::{Format, PROLOGUE_LEN, put_str, read_str};
use crate::types::{
    CacheId, ChunkSeq, Epoch, MapSeq, SECTOR_SIZE, Sectors, VOLUME_SECTORS_MAX, VolumeId, WriteSeq,
};
use crate::wire::{Reader, put_u8, put_u32, put_u64};

/// The most log ranges in a head. An attach adds one and a checkpoint drops those it folded in.
pub const LOG_RANGES_MAX: usize = 1 << 16;

const WHAT: &str = "head";
const LOG_RANGE_LEN: usize = 4 + 8 + 8;
const FORMAT: Format = Format {
    magic: *b"QYHD",
    version: 1,
    what: WHAT,
    len_max: HEAD_LEN_MAX,
};
/// The end of an open log range.
const OPEN: u64 = u64::MAX;

const HAS_OWNER: u8 = 1;
const HAS_LINEAGE: u8 = 2;
const HAS_ROOT: u8 = 4;

/// The fields up to the names.
const FIXED_LEN: usize = 16 + 8 + 4 + 4 + 4 + 8 + 4 + 8 + 8 + 8;
/// Tenant, name, owner with host, lineage, root and the number of log ranges at their longest.
const PARTS_LEN_MAX: usize = 3 * 256 + (16 + 8) + (16 + 4) + (4 + 8 + 4 + 4) + 4;
const HEAD_LEN_MAX: usize =
    PROLOGUE_LEN + FIXED_LEN + PARTS_LEN_MAX + LOG_RANGES_MAX * LOG_RANGE_LEN;

/// When a flush is durable.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// When it is on the cache device.
    #[default]
    Local,
    /// When it is in the object store.
    Object,
}

impl std::fmt::Display for Durability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Object => "object",
        })
    }
}

/// Who has the volume attached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Its cache device.
    pub cache: CacheId,
    /// Its host's name, for the operator; longer than 255 bytes it is cut.
    pub host: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
}

/// The cache device whose content is the newest: it has held the volume without a break.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lineage {
    /// The cache device.
    pub cache: CacheId,
    /// The first epoch of the unbroken row.
    pub since: Epoch,
}

/// A run of the log, written in one epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogRange {
    /// The epoch.
    pub epoch: Epoch,
    /// Its first chunk.
    pub first: ChunkSeq,
    /// The seq behind its last chunk; `None` while it is being written.
    pub end: Option<ChunkSeq>,
}

/// Where the manifest of a map lies.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RootRef {
    /// The epoch of the map object.
    pub epoch: Epoch,
    /// Its number.
    pub seq: MapSeq,
    /// The manifest's first byte in it.
    pub offset: u32,
    /// The manifest's bytes.
    pub len: u32,
}

/// A volume's state of record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// The volume.
    pub volume: VolumeId,
    /// Whose it is.
    pub tenant: String,
    /// What it is called.
    pub name: String,
    /// When it was created, in milliseconds since 1970.
    pub created_ms: u64,
    /// Bytes in a logical block: 512 or 4096.
    pub sector_size: u32,
    /// Sectors in a frame.
    pub frame_sectors: u32,
    /// Tried for each frame.
    pub compression: Compression,
    /// Of each frame.
    pub encryption: Encryption,
    /// When a flush is durable.
    pub durability: Durability,
    /// How large it is; it only grows.
    pub size: Sectors,
    /// The term of the newest attach; 0 before the first.
    pub epoch: Epoch,
    /// Who attached it last and has not detached.
    pub owner: Option<Owner>,
    /// Whose cache is the newest.
    pub lineage: Option<Lineage>,
    /// The log after the map.
    pub log: Vec<LogRange>,
    /// The map; `None` before the first checkpoint.
    pub root: Option<RootRef>,
    /// The newest write folded into the map.
    pub root_write: WriteSeq,
    /// The number of the next map object.
    pub next_map: MapSeq,
    /// Bytes of the volume's objects in the store.
    pub stored_bytes: u64,
}

impl Head {
    /// Its bytes.
    ///
    /// # Panics
    /// If [`Head::validate`] refuses it: a head of our own making is right.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.validate().unwrap_or_else(|error| panic!("{error}"));
        let mut out = FORMAT.begin();
        out.extend_from_slice(&self.volume.to_bytes());
        put_u64(&mut out, self.created_ms);
        put_u32(&mut out, self.sector_size);
        put_u32(&mut out, self.frame_sectors);
        put_u8(&mut out, self.compression.code());
        put_u8(&mut out, self.encryption.code());
        put_u8(
            &mut out,
            matches!(self.durability, Durability::Object).into(),
        );
        let mut present = 0;
        present |= if self.owner.is_some() { HAS_OWNER } else { 0 };
        present |= if self.lineage.is_some() {
            HAS_LINEAGE
        } else {
            0
        };
        present |= if self.root.is_some() { HAS_ROOT } else { 0 };
        put_u8(&mut out, present);
        put_u64(&mut out, self.size.get());
        put_u32(&mut out, self.epoch.get());
        put_u64(&mut out, self.root_write.get());
        put_u64(&mut out, self.next_map.get());
        put_u64(&mut out, self.stored_bytes);
        put_str(&mut out, &self.tenant);
        put_str(&mut out, &self.name);
        if let Some(owner) = &self.owner {
            out.extend_from_slice(&owner.cache.to_bytes());
            put_u64(&mut out, owner.since_ms);
            put_str(&mut out, &owner.host);
        }
        if let Some(lineage) = &self.lineage {
            out.extend_from_slice(&lineage.cache.to_bytes());
            put_u32(&mut out, lineage.since.get());
        }
        if let Some(root) = &self.root {
            root.put(&mut out);
        }
        put_u32(&mut out, u32::try_from(self.log.len()).expect("validated"));
        for range in &self.log {
            put_u32(&mut out, range.epoch.get());
            put_u64(&mut out, range.first.get());
            put_u64(&mut out, range.end.map_or(OPEN, ChunkSeq::get));
        }
        FORMAT.seal(&mut out);
        out
    }

    /// The head that `bytes` are.
    ///
    /// # Errors
    /// If they are damaged, of a later version, or break a rule of [`Head::validate`].
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = FORMAT.open(bytes)?;
        let r = &mut reader;
        let volume = VolumeId::from_bytes(r.array()?);
        let created_ms = r.u64()?;
        let sector_size = r.u32()?;
        let frame_sectors = r.u32()?;
        let compression = Compression::from_code(r.u8()?, WHAT)?;
        let encryption = Encryption::from_code(r.u8()?, WHAT)?;
        let durability = match r.u8()? {
            0 => Durability::Local,
            1 => Durability::Object,
            code => {
                let found = code.into();
                return Err(FormatError::Unknown {
                    what: WHAT,
                    field: "durability",
                    found,
                });
            }
        };
        let present = r.u8()?;
        if present & !(HAS_OWNER | HAS_LINEAGE | HAS_ROOT) != 0 {
            return Err(FormatError::invalid(
                WHAT,
                "a part is present that version 1 does not know",
            ));
        }
        let head = Self {
            volume,
            created_ms,
            sector_size,
            frame_sectors,
            compression,
            encryption,
            durability,
            size: Sectors::new(r.u64()?),
            epoch: Epoch::new(r.u32()?),
            root_write: WriteSeq::new(r.u64()?),
            next_map: MapSeq::new(r.u64()?),
            stored_bytes: r.u64()?,
            tenant: read_str(r)?,
            name: read_str(r)?,
            owner: if present & HAS_OWNER != 0 {
                Some(read_owner(r)?)
            } else {
                None
            },
            lineage: if present & HAS_LINEAGE != 0 {
                Some(read_lineage(r)?)
            } else {
                None
            },
            root: if present & HAS_ROOT != 0 {
                Some(RootRef::read(r)?)
            } else {
                None
            },
            log: read_log(r)?,
        };
        reader.finish()?;
        head.validate()?;
        Ok(head)
    }

    /// Checks every rule of a head.
    ///
    /// # Errors
    /// With the rule that is broken.
    pub fn validate(&self) -> Result<()> {
        let invalid = |why| Err(FormatError::invalid(WHAT, why));
        if self.sector_size != SECTOR_SIZE && self.sector_size != 4096 {
            return invalid("the logical block is neither 512 nor 4096 bytes");
        }
        if !frame_sectors_valid(self.frame_sectors) {
            return invalid("the frame length is out of range");
        }
        if self.size.get() > VOLUME_SECTORS_MAX {
            let (value, limit) = (self.size.get(), VOLUME_SECTORS_MAX);
            return Err(FormatError::TooLarge {
                what: WHAT,
                field: "size",
                value,
                limit,
            });
        }
        if self.size == Sectors::ZERO || !self.size.bytes().is_multiple_of(self.sector_size.into())
        {
            return invalid("the size is not a number of logical blocks");
        }
        if self.tenant.parse::<TenantName>().is_err() || self.name.parse::<VolumeName>().is_err() {
            return invalid("a name is not a name");
        }
        if self
            .lineage
            .is_some_and(|lineage| lineage.since > self.epoch)
        {
            return invalid("the lineage begins after the newest epoch");
        }
        if let Some(root) = self.root {
            root.validate(WHAT, self.epoch)?;
        }
        self.validate_log()
    }

    fn validate_log(&self) -> Result<()> {
        let invalid = |why| Err(FormatError::invalid(WHAT, why));
        if self.log.len() > LOG_RANGES_MAX {
            let (value, limit) = (self.log.len() as u64, LOG_RANGES_MAX as u64);
            return Err(FormatError::TooLarge {
                what: WHAT,
                field: "number of log ranges",
                value,
                limit,
            });
        }
        for range in &self.log {
            if range.epoch > self.epoch {
                return invalid("a log range is of a later epoch than the newest");
            }
            if range.end.is_some_and(|end| end < range.first) {
                return invalid("a log range ends before it begins");
            }
            if range.end.is_some_and(|end| end.get() == OPEN) {
                return invalid("a log range ends at the mark of an open one");
            }
        }
        for pair in self.log.windows(2) {
            let Some(end) = pair[0].end else {
                return invalid("a log range is open and not the last");
            };
            if pair[0].epoch >= pair[1].epoch || end > pair[1].first {
                return invalid("the log ranges are not ascending");
            }
        }
        Ok(())
    }
}

impl RootRef {
    pub(crate) fn put(self, out: &mut Vec<u8>) {
        put_u32(out, self.epoch.get());
        put_u64(out, self.seq.get());
        put_u32(out, self.offset);
        put_u32(out, self.len);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self> {
        Ok(Self {
            epoch: Epoch::new(reader.u32()?),
            seq: MapSeq::new(reader.u64()?),
            offset: reader.u32()?,
            len: reader.u32()?,
        })
    }

    pub(crate) fn validate(self, what: &'static str, newest: Epoch) -> Result<()> {
        if self.epoch > newest {
            return Err(FormatError::invalid(
                what,
                "the map is of a later epoch than the newest",
            ));
        }
        if self.len == 0 || self.offset.checked_add(self.len).is_none() {
            return Err(FormatError::invalid(
                what,
                "the map's manifest has no place",
            ));
        }
        Ok(())
    }
}

fn read_owner(reader: &mut Reader<'_>) -> Result<Owner> {
    let cache = CacheId::from_bytes(reader.array()?);
    let since_ms = reader.u64()?;
    Ok(Owner {
        cache,
        since_ms,
        host: read_str(reader)?,
    })
}

fn read_lineage(reader: &mut Reader<'_>) -> Result<Lineage> {
    let cache = CacheId::from_bytes(reader.array()?);
    Ok(Lineage {
        cache,
        since: Epoch::new(reader.u32()?),
    })
}

fn read_log(reader: &mut Reader<'_>) -> Result<Vec<LogRange>> {
    let count = reader.u32()? as usize;
    if count > reader.remaining() / LOG_RANGE_LEN {
        let (need, have) = ((count * LOG_RANGE_LEN) as u64, reader.remaining() as u64);
        return Err(FormatError::Truncated {
            what: WHAT,
            need,
            have,
        });
    }
    let mut log = Vec::with_capacity(count);
    for _ in 0..count {
        let epoch = Epoch::new(reader.u32()?);
        let first = ChunkSeq::new(reader.u64()?);
        let end = reader.u64()?;
        log.push(LogRange {
            epoch,
            first,
            end: (end != OPEN).then_some(ChunkSeq::new(end)),
        });
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn sample() -> Head {
        let range = |epoch, first, end: Option<u64>| LogRange {
            epoch: Epoch::new(epoch),
            first: ChunkSeq::new(first),
            end: end.map(ChunkSeq::new),
        };
        Head {
            volume: VolumeId::from_bytes([1; 16]),
            tenant: "acme".to_owned(),
            name: "db".to_owned(),
            created_ms: 1_700_000_000_000,
            sector_size: 4096,
            frame_sectors: 128,
            compression: Compression::Zstd,
            encryption: Encryption::None,
            durability: Durability::Object,
            size: Sectors::new(1 << 20),
            epoch: Epoch::new(7),
            owner: Some(Owner {
                cache: CacheId::from_bytes([2; 16]),
                host: "host-a".to_owned(),
                since_ms: 5,
            }),
            lineage: Some(Lineage {
                cache: CacheId::from_bytes([2; 16]),
                since: Epoch::new(6),
            }),
            log: vec![
                range(3, 10, Some(20)),
                range(6, 20, Some(20)),
                range(7, 20, None),
            ],
            root: Some(RootRef {
                epoch: Epoch::new(3),
                seq: MapSeq::new(4),
                offset: 100,
                len: 200,
            }),
            root_write: WriteSeq::new(99),
            next_map: MapSeq::new(5),
            stored_bytes: 12345,
        }
    }

    #[test]
    fn head_full_and_bare_round_trip() {
        let full = sample();
        assert_eq!(Head::decode(&full.encode()), Ok(full.clone()));
        let bare = Head {
            owner: None,
            lineage: None,
            root: None,
            log: Vec::new(),
            ..full
        };
        assert_eq!(Head::decode(&bare.encode()), Ok(bare));
    }

    #[test]
    fn head_largest_volume_is_taken_and_one_block_more_refused() {
        let mut head = Head {
            size: Sectors::new(VOLUME_SECTORS_MAX),
            ..sample()
        };
        assert_eq!(Head::decode(&head.encode()), Ok(head.clone()));
        head.size = Sectors::new(VOLUME_SECTORS_MAX + 8);
        assert!(matches!(head.validate(), Err(FormatError::TooLarge { .. })));
    }

    #[test]
    fn head_any_flip_or_cut_is_an_error() {
        let bytes = sample().encode();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Head::decode(&bad).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Head::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
        assert!(Head::decode(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn head_any_byte_changed_under_a_right_checksum_never_panics() {
        let bytes = sample().encode();
        for at in 16..bytes.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[at] = value;
                FORMAT.seal(&mut bad);
                if let Ok(head) = Head::decode(&bad) {
                    assert_eq!(head.encode(), bad);
                }
            }
        }
    }

    #[test]
    fn head_broken_rules_are_named() {
        type Break = fn(&mut Head);
        let cases: [(Break, &str); 9] = [
            (|h| h.sector_size = 1024, "logical block"),
            (|h| h.frame_sectors = 100, "frame length"),
            (|h| h.size = Sectors::new(9), "number of logical blocks"),
            (|h| h.size = Sectors::ZERO, "number of logical blocks"),
            (|h| h.name = "../x".to_owned(), "name"),
            (|h| h.log[0].end = None, "not the last"),
            (|h| h.log[1].first = ChunkSeq::new(19), "ascending"),
            (|h| h.log[2].epoch = Epoch::new(8), "later epoch"),
            (|h| h.root.as_mut().unwrap().offset = u32::MAX, "no place"),
        ];
        for (broken, word) in cases {
            let mut head = sample();
            broken(&mut head);
            let error = head.validate().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
