//! `head`: the one object of a volume that is ever replaced, by conditional PUT only.
//!
//! Says what the volume is, who may write to it, which map it has, and which ranges of its log
//! come after that map. Byte table in `FORMAT.md`.
//!
//! Bytes behind the last field are refused, and so is a later version: a head is read, changed and
//! written back, and a build that carried on without a field it does not know would drop it. Each
//! new field therefore raises the version; every build reads all versions up to its own.

use crate::codec::{Compression, Encryption};
use crate::error::{FormatError, Result, check_up_to};
use crate::frame::frame_sectors_valid;
use crate::keys::{NAME_LEN_MAX, SnapName, TenantName, VolumeName};
use crate::prologue::{Format, PROLOGUE_LEN, printable, put_str, read_str};
use crate::types::{
    CacheId, ChunkSeq, Epoch, MapSeq, SECTOR_SIZE, Sectors, VOLUME_SECTORS_MAX, VolumeId, WriteSeq,
};
use crate::wire::{Reader, put_u8, put_u32, put_u64};
use crate::wrapped::{KEYS_LEN_MAX, WrappedKeys};

/// The most log ranges in a head. An attach adds one and a checkpoint drops those it folded in.
pub const LOG_RANGES_MAX: usize = 1 << 16;

/// Most snapshots of a volume: what a head can hold and still be written at each checkpoint.
pub const SNAPSHOTS_MAX: usize = 1024;

/// Sectors of a frame in new volumes: 64 KiB, the unit of a fetch.
const FRAME_SECTORS: u32 = 128;

const WHAT: &str = "head";
/// Version 2 added the parent, the time that dead objects are retained, the snapshots, and in a root the
/// place of its usage; version 3 the wrapped keys.
const VERSION: u16 = 3;
const LOG_RANGE_LEN: usize = 4 + 8 + 8;
const FORMAT: Format = Format {
    magic: *b"QYHD",
    version: VERSION,
    what: WHAT,
    len_max: HEAD_LEN_MAX,
};
/// The end of an open log range.
const OPEN: u64 = u64::MAX;

const HAS_OWNER: u8 = 1;
const HAS_LINEAGE: u8 = 2;
const HAS_ROOT: u8 = 4;
const HAS_PARENT: u8 = 8;

/// The fields up to the names.
const FIXED_LEN: usize = 16 + 8 + 4 + 4 + 4 + 8 + 4 + 8 + 8 + 8;
/// Tenant, name, owner with host, lineage, root, parent, retention and both counts at their longest.
const PARTS_LEN_MAX: usize = 4 * 256 + (16 + 8) + (16 + 4) + ROOT_LEN + 16 + 8 + 4 + 4;
const ROOT_LEN: usize = 4 + 8 + 4 * 4;
/// Fewest bytes of a snapshot: a name of one character, and no root.
const SNAPSHOT_LEN_MIN: usize = 1 + 1 + 3 * 8 + 1;
const SNAPSHOT_LEN_MAX: usize = SNAPSHOT_LEN_MIN + NAME_LEN_MAX + ROOT_LEN;
const HEAD_LEN_MAX: usize = PROLOGUE_LEN
    + FIXED_LEN
    + PARTS_LEN_MAX
    + LOG_RANGES_MAX * LOG_RANGE_LEN
    + SNAPSHOTS_MAX * SNAPSHOT_LEN_MAX
    + KEYS_LEN_MAX;

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

impl Durability {
    /// Its number in the formats.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Local => 0,
            Self::Object => 1,
        }
    }

    /// What has this number.
    pub(crate) fn from_code(code: u8, what: &'static str) -> Result<Self> {
        match code {
            0 => Ok(Self::Local),
            1 => Ok(Self::Object),
            _ => Err(FormatError::Unknown {
                what,
                field: "durability",
                found: code.into(),
            }),
        }
    }
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
    /// Its host's name; longer than 255 bytes it is cut. Whoever has the bucket can write any text here: people are shown
    /// [`Owner::shown_host`].
    pub host: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
}

impl Owner {
    /// Its host's name, for the operator.
    #[must_use]
    pub fn shown_host(&self) -> String {
        printable(&self.host)
    }
}

/// What an owner's cache is called who is none: the volume is in the trash.
const TRASH_CACHE: [u8; 16] = [0; 16];
/// As [`TRASH_CACHE`]: its objects are being deleted.
const PURGE_CACHE: [u8; 16] = [0xff; 16];

/// What became of a volume that was deleted. The head says it in its owner's place, so that whoever
/// attaches, deletes, brings back or purges it, does so against the others by a conditional PUT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deleted {
    /// It is in the trash since then (milliseconds since 1970), and can be brought back.
    InTrash {
        /// Since when.
        since_ms: u64,
    },
    /// Its objects are being deleted: it is lost.
    Purging,
}

impl Deleted {
    /// What says so in a head.
    #[must_use]
    pub fn owner(self) -> Owner {
        let (cache, host, since_ms) = match self {
            Self::InTrash { since_ms } => (TRASH_CACHE, "the trash", since_ms),
            Self::Purging => (PURGE_CACHE, "the purge", 0),
        };
        Owner {
            cache: CacheId::from_bytes(cache),
            host: host.to_owned(),
            since_ms,
        }
    }
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
    /// The usage node in the same object: its first byte and its bytes. `None` where version 1 wrote it.
    pub usage: Option<(u32, u32)>,
}

/// The snapshot that a clone was made of. Its objects are the clone's too until the tie is cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parent {
    /// The volume, of the same tenant.
    pub volume: VolumeId,
    /// Its snapshot's name.
    pub snapshot: String,
}

/// A state of the volume that was given a name, and is kept until that is taken away.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotRef {
    /// Its name, unique in the volume.
    pub name: String,
    /// When it was taken, in milliseconds since 1970.
    pub created_ms: u64,
    /// The newest write in it.
    pub root_write: WriteSeq,
    /// How large the volume was.
    pub size: Sectors,
    /// Whether it is being deleted: no clone is made of it any more.
    pub closing: bool,
    /// Its map; `None` if nothing was ever written.
    pub root: Option<RootRef>,
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
    /// How large it is.
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
    /// What it was cloned from, while it needs that.
    pub parent: Option<Parent>,
    /// How long objects that nothing needs any more are kept, in milliseconds: so far back the volume
    /// can be opened as it was.
    pub retain_ms: u64,
    /// Its snapshots, in the order of their maps.
    pub snapshots: Vec<SnapshotRef>,
    /// The data keys that its chunks and those of its parents need; none if it is not encrypted, or being
    /// purged.
    pub keys: WrappedKeys,
}

impl Head {
    /// The head of a volume that nothing was written to, of blocks of 512 bytes, frames of 64 KiB, LZ4 and
    /// local durability.
    #[must_use]
    pub fn fresh(
        volume: VolumeId,
        tenant: &TenantName,
        name: &VolumeName,
        size: Sectors,
        created_ms: u64,
    ) -> Self {
        Self {
            volume,
            tenant: tenant.to_string(),
            name: name.to_string(),
            created_ms,
            sector_size: SECTOR_SIZE,
            frame_sectors: FRAME_SECTORS,
            compression: Compression::Lz4,
            encryption: Encryption::None,
            durability: Durability::Local,
            size,
            epoch: Epoch::ZERO,
            owner: None,
            lineage: None,
            log: Vec::new(),
            root: None,
            root_write: WriteSeq::ZERO,
            next_map: MapSeq::ZERO,
            stored_bytes: 0,
            parent: None,
            retain_ms: 0,
            snapshots: Vec::new(),
            keys: WrappedKeys::default(),
        }
    }

    /// Sets how long dead objects are retained. A map number is passed over, for the bytes of a head never
    /// come back: also if it is so already, so that a PUT that was given up before, and arrives later, finds
    /// another head than it was made for.
    pub fn retain(&mut self, retain_ms: u64) {
        self.retain_ms = retain_ms;
        self.next_map = self.next_map.next();
    }

    /// Whether the volume was deleted.
    #[must_use]
    pub fn deleted(&self) -> Option<Deleted> {
        let owner = self.owner.as_ref()?;
        match owner.cache.to_bytes() {
            TRASH_CACHE => Some(Deleted::InTrash {
                since_ms: owner.since_ms,
            }),
            PURGE_CACHE => Some(Deleted::Purging),
            _ => None,
        }
    }

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
        put_u8(&mut out, self.durability.code());
        let mut present = 0;
        present |= if self.owner.is_some() { HAS_OWNER } else { 0 };
        present |= if self.lineage.is_some() {
            HAS_LINEAGE
        } else {
            0
        };
        present |= if self.root.is_some() { HAS_ROOT } else { 0 };
        present |= if self.parent.is_some() { HAS_PARENT } else { 0 };
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
        if let Some(parent) = &self.parent {
            out.extend_from_slice(&parent.volume.to_bytes());
            put_str(&mut out, &parent.snapshot);
        }
        put_u64(&mut out, self.retain_ms);
        let count = u32::try_from(self.snapshots.len()).expect("validated");
        put_u32(&mut out, count);
        for snapshot in &self.snapshots {
            snapshot.put(&mut out);
        }
        self.keys.put(&mut out);
        FORMAT.seal(&mut out);
        out
    }

    /// The head that `bytes` are.
    ///
    /// # Errors
    /// If they are damaged, of a later version, or break a rule of [`Head::validate`].
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (version, mut reader) = FORMAT.open(bytes)?;
        let r = &mut reader;
        let volume = VolumeId::from_bytes(r.array()?);
        let created_ms = r.u64()?;
        let sector_size = r.u32()?;
        let frame_sectors = r.u32()?;
        let compression = Compression::from_code(r.u8()?, WHAT)?;
        let encryption = Encryption::from_code(r.u8()?, WHAT)?;
        let durability = Durability::from_code(r.u8()?, WHAT)?;
        let present = r.u8()?;
        let known = HAS_OWNER | HAS_LINEAGE | HAS_ROOT | if version > 1 { HAS_PARENT } else { 0 };
        if present & !known != 0 {
            return Err(FormatError::invalid(
                WHAT,
                "a part is present that its version does not know",
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
                Some(RootRef::read(r, version > 1)?)
            } else {
                None
            },
            log: read_log(r)?,
            parent: if present & HAS_PARENT != 0 {
                Some(read_parent(r)?)
            } else {
                None
            },
            retain_ms: if version > 1 { r.u64()? } else { 0 },
            snapshots: if version > 1 {
                read_snapshots(r)?
            } else {
                Vec::new()
            },
            keys: if version > 2 {
                WrappedKeys::read(r)?
            } else {
                WrappedKeys::default()
            },
        };
        reader.finish()?;
        head.validate()?;
        head.check_numbers()?;
        Ok(head)
    }

    /// Refuses numbers that no volume comes to. Only of what is read: what is written may be a little further.
    fn check_numbers(&self) -> Result<()> {
        self.epoch.check(WHAT)?;
        self.root_write.check(WHAT)?;
        self.next_map.check(WHAT)?;
        let roots = self.snapshots.iter().filter_map(|snapshot| snapshot.root);
        for root in roots.chain(self.root) {
            if root.seq >= self.next_map {
                return Err(FormatError::invalid(
                    WHAT,
                    "a map has a number that is still to be given",
                ));
            }
        }
        for snapshot in &self.snapshots {
            snapshot.root_write.check(WHAT)?;
        }
        for range in &self.log {
            range.end.unwrap_or(range.first).check_of_log(WHAT)?;
        }
        Ok(())
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
        check_up_to(WHAT, "size", self.size.get(), VOLUME_SECTORS_MAX)?;
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
        if let Some(parent) = &self.parent
            && parent.snapshot.parse::<SnapName>().is_err()
        {
            return invalid("the parent's snapshot has a name that is none");
        }
        self.keys.validate(WHAT)?;
        if self.encryption == Encryption::None && !self.keys.keys.is_empty() {
            return invalid("it has keys, and is not encrypted");
        }
        self.validate_snapshots()?;
        self.validate_log()
    }

    fn validate_snapshots(&self) -> Result<()> {
        let invalid = |why| Err(FormatError::invalid(WHAT, why));
        let (count, limit) = (self.snapshots.len() as u64, SNAPSHOTS_MAX as u64);
        check_up_to(WHAT, "number of snapshots", count, limit)?;
        let mut names = std::collections::HashSet::with_capacity(self.snapshots.len());
        for snapshot in &self.snapshots {
            if snapshot.name.parse::<SnapName>().is_err() {
                return invalid("a snapshot's name is not a name");
            }
            if !names.insert(&snapshot.name) {
                return invalid("two snapshots have one name");
            }
            if snapshot.size == Sectors::ZERO || snapshot.size.get() > VOLUME_SECTORS_MAX {
                return invalid("a snapshot's size is out of range");
            }
            if let Some(root) = snapshot.root {
                root.validate(WHAT, self.epoch)?;
            }
        }
        let order = |s: &SnapshotRef| s.root.map(|root| root.seq);
        if !self.snapshots.is_sorted_by_key(order) {
            return invalid("the snapshots are not in the order of their maps");
        }
        Ok(())
    }

    fn validate_log(&self) -> Result<()> {
        let invalid = |why| Err(FormatError::invalid(WHAT, why));
        let (count, limit) = (self.log.len() as u64, LOG_RANGES_MAX as u64);
        check_up_to(WHAT, "number of log ranges", count, limit)?;
        for range in &self.log {
            if range.epoch > self.epoch {
                return invalid("a log range is of a later epoch than the newest");
            }
            if range.end.is_some_and(|end| end < range.first) {
                return invalid("a log range ends before it begins");
            }
            if range.end.unwrap_or(range.first) > ChunkSeq::COMPACTED {
                return invalid("a log range reaches into the numbers of compaction");
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
        let (offset, len) = self.usage.unwrap_or_default();
        put_u32(out, offset);
        put_u32(out, len);
    }

    /// With the place of its usage, or without, as version 1 wrote it.
    pub(crate) fn read(reader: &mut Reader<'_>, with_usage: bool) -> Result<Self> {
        Ok(Self {
            epoch: Epoch::new(reader.u32()?),
            seq: MapSeq::new(reader.u64()?),
            offset: reader.u32()?,
            len: reader.u32()?,
            usage: if with_usage {
                Some((reader.u32()?, reader.u32()?)).filter(|place| *place != (0, 0))
            } else {
                None
            },
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
        if let Some((offset, len)) = self.usage
            && (len == 0 || offset.checked_add(len).is_none())
        {
            return Err(FormatError::invalid(what, "the map's usage has no place"));
        }
        Ok(())
    }
}

impl SnapshotRef {
    fn put(&self, out: &mut Vec<u8>) {
        put_str(out, &self.name);
        put_u64(out, self.created_ms);
        put_u64(out, self.root_write.get());
        put_u64(out, self.size.get());
        let marks = u8::from(self.closing) << 1 | u8::from(self.root.is_some());
        put_u8(out, marks);
        if let Some(root) = self.root {
            root.put(out);
        }
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self> {
        let name = read_str(reader)?;
        let created_ms = reader.u64()?;
        let root_write = WriteSeq::new(reader.u64()?);
        let size = Sectors::new(reader.u64()?);
        let marks = reader.u8()?;
        if marks > 3 {
            return Err(FormatError::invalid(
                WHAT,
                "a snapshot has a mark that no version knows",
            ));
        }
        Ok(Self {
            name,
            created_ms,
            root_write,
            size,
            closing: marks & 2 != 0,
            root: match marks & 1 {
                0 => None,
                _ => Some(RootRef::read(reader, true)?),
            },
        })
    }
}

fn read_parent(reader: &mut Reader<'_>) -> Result<Parent> {
    Ok(Parent {
        volume: VolumeId::from_bytes(reader.array()?),
        snapshot: read_str(reader)?,
    })
}

fn read_snapshots(reader: &mut Reader<'_>) -> Result<Vec<SnapshotRef>> {
    let count = reader.count_u32(SNAPSHOT_LEN_MIN)?;
    (0..count).map(|_| SnapshotRef::read(reader)).collect()
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
    let count = reader.count_u32(LOG_RANGE_LEN)?;
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
    use crate::codec::KeyGeneration;
    use crate::keys::KeyName;
    use crate::wrapped::WrappedKey;

    fn sample() -> Head {
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
            encryption: Encryption::Aes256Gcm,
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
                usage: Some((60, 40)),
            }),
            root_write: WriteSeq::new(99),
            next_map: MapSeq::new(5),
            stored_bytes: 12345,
            parent: Some(Parent {
                volume: VolumeId::from_bytes([3; 16]),
                snapshot: "golden".to_owned(),
            }),
            retain_ms: 86_400_000,
            snapshots: vec![
                snapshot("first", None, false),
                snapshot("nightly", Some(2), true),
            ],
            keys: WrappedKeys {
                revision: 2,
                keys: vec![WrappedKey {
                    volume: VolumeId::from_bytes([1; 16]),
                    generation: KeyGeneration::FIRST,
                    by: KeyName::new("acme").unwrap(),
                    bytes: vec![7; 60],
                }],
            },
        }
    }

    fn snapshot(name: &str, map: Option<u64>, closing: bool) -> SnapshotRef {
        SnapshotRef {
            name: name.to_owned(),
            created_ms: 1_700_000_000_001,
            root_write: WriteSeq::new(50),
            size: Sectors::new(1 << 19),
            closing,
            root: map.map(|seq| RootRef {
                epoch: Epoch::new(3),
                seq: MapSeq::new(seq),
                offset: 7,
                len: 8,
                usage: None,
            }),
        }
    }

    #[test]
    fn head_of_a_deleted_volume_says_so() {
        for deleted in [Deleted::InTrash { since_ms: 5 }, Deleted::Purging] {
            let mut head = sample();
            assert_eq!(head.deleted(), None);
            head.owner = Some(deleted.owner());
            let read = Head::decode(&head.encode()).unwrap();
            assert_eq!(read.deleted(), Some(deleted));
        }
    }

    #[test]
    fn head_retention_set_to_what_it_is_makes_another_head() {
        let (before, mut head) = (sample(), sample());
        head.retain(before.retain_ms);
        assert_eq!(head.retain_ms, before.retain_ms);
        assert_ne!(head.encode(), before.encode());
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
            parent: None,
            snapshots: Vec::new(),
            keys: WrappedKeys::default(),
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
    fn head_with_numbers_that_no_volume_comes_to_is_refused_and_one_just_before_can_go_on() {
        type Break = fn(&mut Head, bool);
        // One too many, or the last.
        let cases: [(Break, &str); 7] = [
            (
                |h, over| h.epoch = Epoch::new(Epoch::MAX.get() + u32::from(over)),
                "Epoch",
            ),
            (
                |h, over| h.root_write = WriteSeq::new(WriteSeq::MAX.get() + u64::from(over)),
                "WriteSeq",
            ),
            (
                |h, over| h.next_map = MapSeq::new(MapSeq::MAX.get() + u64::from(over)),
                "MapSeq",
            ),
            (
                |h, over| {
                    let (root, next) = (h.root.as_mut().unwrap(), h.next_map.get());
                    root.seq = MapSeq::new(next - u64::from(!over));
                },
                "still to be given",
            ),
            (
                |h, over| {
                    h.snapshots[0].root_write =
                        WriteSeq::new(WriteSeq::MAX.get() + u64::from(over));
                },
                "WriteSeq",
            ),
            (
                |h, over| h.log[2].first = ChunkSeq::new((1 << 62) + u64::from(over)),
                "ChunkSeq",
            ),
            (
                |h, over| {
                    let end = ChunkSeq::new((1 << 62) + u64::from(over));
                    (h.log[1].end, h.log[2].first) = (Some(end), end);
                },
                "ChunkSeq",
            ),
        ];
        for (change, word) in cases {
            let mut head = sample();
            change(&mut head, true);
            let error = Head::decode(&head.encode()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            change(&mut head, false);
            assert_eq!(Head::decode(&head.encode()).unwrap(), head);
            // A takeover, a map and writes more are written without a fuss.
            (head.epoch, head.next_map) = (head.epoch.next(), head.next_map.next());
            head.root_write = head.root_write.next();
            assert!(!head.encode().is_empty());
        }
    }

    #[test]
    fn head_broken_rules_are_named() {
        type Break = fn(&mut Head);
        let cases: [(Break, &str); 15] = [
            (|h| h.sector_size = 1024, "logical block"),
            (|h| h.frame_sectors = 100, "frame length"),
            (|h| h.size = Sectors::new(9), "number of logical blocks"),
            (|h| h.size = Sectors::ZERO, "number of logical blocks"),
            (|h| h.name = "../x".to_owned(), "name"),
            (|h| h.log[0].end = None, "not the last"),
            (|h| h.log[1].first = ChunkSeq::new(19), "ascending"),
            (|h| h.log[2].epoch = Epoch::new(8), "later epoch"),
            (|h| h.root.as_mut().unwrap().offset = u32::MAX, "no place"),
            (|h| h.parent.as_mut().unwrap().snapshot.clear(), "parent"),
            (|h| h.snapshots[1].name = "first".to_owned(), "one name"),
            (|h| h.snapshots.swap(0, 1), "order of their maps"),
            (
                |h| h.snapshots[0].size = Sectors::ZERO,
                "size is out of range",
            ),
            (|h| h.encryption = Encryption::None, "not encrypted"),
            (|h| h.keys.revision = 0, "no copy"),
        ];
        for (broken, word) in cases {
            let mut head = sample();
            broken(&mut head);
            let error = head.validate().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
