//! Pages of the cache device: superblock, segment headers, record pages. 4 KiB each.
//!
//! Every page has its magic, version and CRC32C at the same places. The checksum begins with the
//! cache device's id, so that a page left behind by an earlier formatting never passes. A page
//! that was never written is no page ([`FormatError::Magic`]), not a damaged one.
//!
//! Byte tables are in `FORMAT.md`. Does not own: where pages lie, and in which order they are
//! written.

use crate::error::{FormatError, Result, check_up_to};
use crate::keys::{KeyName, TenantName};
use crate::prologue::{cut, read_str};
use crate::types::{
    CacheId, Epoch, Generation, Lba, SegmentId, VOLUME_SECTORS_MAX, VolumeId, WriteSeq,
};
use crate::wire::Reader;
use crate::wrapped::WRAPPED_LEN_MAX;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;
/// Bytes of one record.
const RECORD_LEN: usize = 20;
/// Where the records of a record page of version 1 begin.
const RECORDS_AT: usize = 56;
/// Records that fit a page which says what was durable before it; one that does not had room for one more.
pub const RECORDS_PER_PAGE: usize = (PAGE_SIZE - RECORDS_AT - 8) / RECORD_LEN;
const RECORDS_MAX: usize = (PAGE_SIZE - RECORDS_AT) / RECORD_LEN;
/// Smallest segment: header, a record page and data.
pub const SEGMENT_SIZE_MIN: u32 = 4 * 4096;

const VERSION: u16 = 1;
const CRC_AT: usize = 8;
const BODY_AT: usize = 12;
const START_BITS: u32 = 62;

const _: () = assert!(RECORDS_PER_PAGE == 201 && RECORDS_MAX == 202);
const _: () = assert!(RECORD_LEN == 8 + 4 + 4 + 4);
const _: () = assert!(RECORDS_AT == BODY_AT + 4 + 8 + 16 + 4 + 4 + 8);
const _: () = assert!(VOLUME_SECTORS_MAX < 1 << START_BITS);

/// One page.
pub type Page = Box<[u8; PAGE_SIZE]>;

/// What a cache device is: the first page on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Its name, given when it was formatted.
    pub cache: CacheId,
    /// When it was formatted, in milliseconds since 1970.
    pub created_ms: u64,
    /// The host that did it; longer than 255 bytes it is cut.
    pub host: String,
    /// Bytes in a segment.
    pub segment_size: u32,
    /// How many segments there are.
    pub segments: u32,
    /// Where the first one begins, in bytes.
    pub data_start: u64,
    /// What the data on it are encrypted with, if they are.
    pub key: Option<CacheKey>,
    /// Whether whoever uses it says so in a session page: then what it has of the store can be known again.
    pub has_sessions: bool,
}

/// The key of a cache device's data, wrapped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CacheKey {
    /// The name of the key that wraps it.
    pub by: KeyName,
    /// What that made of it; 1 to [`WRAPPED_LEN_MAX`] bytes.
    pub bytes: Vec<u8>,
}

/// What a segment is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SegmentKind {
    /// Writes of a volume.
    Write,
    /// Data that were fetched from the store.
    Fill,
}

/// What a segment holds: its last page, written before any data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// The segment.
    pub segment: SegmentId,
    /// Which opening of a segment this is.
    pub generation: Generation,
    /// Whose data.
    pub volume: VolumeId,
    /// The term they are written in.
    pub epoch: Epoch,
    /// What for.
    pub kind: SegmentKind,
    /// Whose volume: what has its id in another tenant's store is not it. `None` before version 2.
    pub tenant: Option<TenantName>,
    /// Every write of the volume up to this one was durable on the device, or in the store, before this was written; only
    /// with a tenant. `None` before version 3, where its record pages do not say so either, and of a segment with nothing unsent.
    pub durable: Option<WriteSeq>,
}

/// What a record gives its sectors.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RecordBody {
    /// Data in the page's segment.
    Data {
        /// Their first sector, from the segment's start.
        offset: u32,
    },
    /// Zeroes, written.
    Zero,
    /// Zeroes, discarded.
    Discard,
}

/// One write, or a part of one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Record {
    /// Its place in the volume's order of completion.
    pub seq: WriteSeq,
    /// Its first sector in the volume.
    pub start: Lba,
    /// How many; never 0.
    pub len: u32,
    /// The content.
    pub body: RecordBody,
}

/// Which extents of a segment hold what, in order of completion.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordPage {
    /// The segment.
    pub segment: SegmentId,
    /// Which opening of it.
    pub generation: Generation,
    /// Whose data.
    pub volume: VolumeId,
    /// The term they are written in.
    pub epoch: Epoch,
    /// Its place among the segment's pages, from the back; the header is number 0.
    pub page: u32,
    /// Every write of the volume up to this one was durable on the device, or in the store, before this was written.
    /// `None` in version 1.
    pub durable: Option<WriteSeq>,
    /// At most [`RECORDS_PER_PAGE`]; one more where `durable` is `None`.
    pub records: Vec<Record>,
}

/// One kind of page.
pub(crate) struct Kind {
    pub(crate) magic: [u8; 4],
    pub(crate) what: &'static str,
    /// The newest version of it that is read.
    pub(crate) version: u16,
}

const SUPERBLOCK: Kind = Kind {
    magic: *b"QYSB",
    what: "cache superblock",
    version: SUPERBLOCK_SESSIONS,
};
/// The version of a superblock with a key, and no sessions; without either it is version 1.
const SUPERBLOCK_KEYED: u16 = 2;
/// The version of one of a device with sessions, with a key or without.
const SUPERBLOCK_SESSIONS: u16 = 3;
const SEGMENT: Kind = Kind {
    magic: *b"QYSG",
    what: "segment header",
    version: SEGMENT_DURABLE,
};
/// The version of a segment header that names the tenant; without one it is version 1.
const SEGMENT_OF_TENANT: u16 = 2;
/// The version of one that says what was durable, and whose record pages may.
const SEGMENT_DURABLE: u16 = 3;
const RECORDS: Kind = Kind {
    magic: *b"QYRP",
    what: "record page",
    version: RECORDS_DURABLE,
};
/// The version of a record page that says what was durable; else it is version 1.
const RECORDS_DURABLE: u16 = 2;

impl Superblock {
    /// Its page.
    ///
    /// # Panics
    /// If [`Superblock::validate`] refuses it.
    #[must_use]
    pub fn encode(&self) -> Page {
        self.validate().unwrap_or_else(|error| panic!("{error}"));
        let mut page = Writer::new(&SUPERBLOCK, 0);
        page.put(&[0; 4]);
        page.put(&self.cache.to_bytes());
        page.put(&self.created_ms.to_le_bytes());
        page.put(&self.segment_size.to_le_bytes());
        page.put(&self.segments.to_le_bytes());
        page.put(&self.data_start.to_le_bytes());
        let host = cut(&self.host);
        page.put(&[u8::try_from(host.len()).expect("cut to 255 bytes")]);
        page.put(host.as_bytes());
        match (&self.key, self.has_sessions) {
            (None, false) => {}
            (Some(_), false) => page.version(SUPERBLOCK_KEYED),
            (_, true) => page.version(SUPERBLOCK_SESSIONS),
        }
        if let Some(key) = &self.key {
            page.put(&[u8::try_from(key.by.as_str().len()).expect("names are short")]);
            page.put(key.by.as_str().as_bytes());
            let len = u16::try_from(key.bytes.len()).expect("validated");
            page.put(&len.to_le_bytes());
            page.put(&key.bytes);
        }
        page.seal(self.cache)
    }

    /// The superblock that `bytes` are. It is what tells the cache device's id, so it is bound to
    /// the one it names.
    ///
    /// # Errors
    /// If they are no superblock, damaged, or break a rule of [`Superblock::validate`].
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let named = bytes
            .get(16..32)
            .and_then(|id| id.try_into().ok())
            .unwrap_or_default();
        let cache = CacheId::from_bytes(named);
        let (mut reader, reserved) = open(&SUPERBLOCK, bytes, cache)?;
        if reserved != 0 || reader.u32()? != 0 {
            return Err(FormatError::invalid(
                SUPERBLOCK.what,
                "a reserved field is not 0",
            ));
        }
        reader.bytes(16)?;
        let superblock = Self {
            cache,
            created_ms: reader.u64()?,
            segment_size: reader.u32()?,
            segments: reader.u32()?,
            data_start: reader.u64()?,
            host: read_str(&mut reader)?,
            key: match version(bytes) {
                SUPERBLOCK_KEYED => Some(CacheKey::read(&mut reader)?),
                // No name is empty.
                SUPERBLOCK_SESSIONS if reader.peek() != Some(0) => {
                    Some(CacheKey::read(&mut reader)?)
                }
                _ => None,
            },
            has_sessions: version(bytes) == SUPERBLOCK_SESSIONS,
        };
        finish(reader)?;
        superblock.validate()?;
        Ok(superblock)
    }

    /// Checks every rule of a superblock.
    ///
    /// # Errors
    /// With the rule that is broken.
    pub fn validate(&self) -> Result<()> {
        const WHAT: &str = SUPERBLOCK.what;
        if self.segment_size < SEGMENT_SIZE_MIN
            || !(self.segment_size as usize).is_multiple_of(PAGE_SIZE)
        {
            return Err(FormatError::invalid(
                WHAT,
                "the segment size is not 4 or more whole pages",
            ));
        }
        if self.segments == 0 {
            return Err(FormatError::invalid(WHAT, "there is no segment"));
        }
        if self.data_start == 0 || !self.data_start.is_multiple_of(PAGE_SIZE as u64) {
            return Err(FormatError::invalid(
                WHAT,
                "the first segment is not behind whole pages",
            ));
        }
        if self.has_sessions && self.data_start < 2 * PAGE_SIZE as u64 {
            return Err(FormatError::invalid(
                WHAT,
                "the first segment lies over the session page",
            ));
        }
        let fits = |key: &CacheKey| (1..=WRAPPED_LEN_MAX).contains(&key.bytes.len());
        if !self.key.as_ref().is_none_or(fits) {
            return Err(FormatError::invalid(
                WHAT,
                "the length of its wrapped key is out of range",
            ));
        }
        // The product of two 32-bit numbers fits; file offsets are signed.
        let end = self
            .data_start
            .checked_add(u64::from(self.segment_size) * u64::from(self.segments));
        if end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(FormatError::invalid(
                WHAT,
                "the segments end behind any device",
            ));
        }
        Ok(())
    }
}

impl CacheKey {
    fn read(reader: &mut Reader<'_>) -> Result<Self> {
        let what = reader.what();
        let by = KeyName::new(read_str(reader)?)
            .map_err(|_| FormatError::invalid(what, "its key's name is not a name"))?;
        let len = reader.u16()? as usize;
        let bytes = reader.bytes(len)?.to_vec();
        Ok(Self { by, bytes })
    }
}

impl SegmentHeader {
    /// Its page on the cache device `cache`.
    ///
    /// # Panics
    /// If it says what was durable, and not whose it is.
    #[must_use]
    pub fn encode(&self, cache: CacheId) -> Page {
        assert!(
            self.durable.is_none() || self.tenant.is_some(),
            "whose writes?"
        );
        let kind = match self.kind {
            SegmentKind::Write => 0,
            SegmentKind::Fill => 1,
        };
        let mut page = Writer::new(&SEGMENT, kind);
        page.put(&self.segment.get().to_le_bytes());
        page.put(&self.generation.get().to_le_bytes());
        page.put(&self.volume.to_bytes());
        page.put(&self.epoch.get().to_le_bytes());
        if let Some(tenant) = &self.tenant {
            page.version(SEGMENT_OF_TENANT);
            page.put(&[u8::try_from(tenant.as_str().len()).expect("names are short")]);
            page.put(tenant.as_str().as_bytes());
        }
        if let Some(durable) = self.durable {
            page.version(SEGMENT_DURABLE);
            page.put(&durable.get().to_le_bytes());
        }
        page.seal(cache)
    }

    /// The segment header that `bytes` are, on the cache device `cache`.
    ///
    /// # Errors
    /// If they are none, damaged, or of another cache device.
    pub fn decode(bytes: &[u8], cache: CacheId) -> Result<Self> {
        let (mut reader, kind) = open(&SEGMENT, bytes, cache)?;
        let kind = match kind {
            0 => SegmentKind::Write,
            1 => SegmentKind::Fill,
            other => {
                let (what, found) = (SEGMENT.what, other.into());
                return Err(FormatError::Unknown {
                    what,
                    field: "kind",
                    found,
                });
            }
        };
        let segment = SegmentId::new(reader.u32()?);
        let generation = Generation::new(reader.u64()?);
        let volume = VolumeId::from_bytes(reader.array()?);
        let epoch = Epoch::new(reader.u32()?);
        let (mut tenant, mut durable) = (None, None);
        if version(bytes) >= SEGMENT_OF_TENANT {
            tenant = Some(read_tenant(&mut reader)?);
        }
        if version(bytes) >= SEGMENT_DURABLE {
            durable = Some(WriteSeq::new(reader.u64()?));
        }
        finish(reader)?;
        Ok(Self {
            segment,
            generation,
            volume,
            epoch,
            kind,
            tenant,
            durable,
        })
    }
}

fn read_tenant(reader: &mut Reader<'_>) -> Result<TenantName> {
    let what = reader.what();
    TenantName::new(read_str(reader)?)
        .map_err(|_| FormatError::invalid(what, "its tenant's name is not a name"))
}

impl RecordPage {
    /// Its page on the cache device `cache`.
    ///
    /// # Panics
    /// If it holds too many records, one that is empty or outside any volume, or records more
    /// than 2^32 writes apart.
    #[must_use]
    pub fn encode(&self, cache: CacheId) -> Page {
        assert!(
            self.records.len() <= records_max(self.durable.is_some()),
            "{} records",
            self.records.len()
        );
        let count = u16::try_from(self.records.len()).expect("at most 202");
        let base = base_of(&self.records);
        let mut page = Writer::new(&RECORDS, count);
        page.put(&self.segment.get().to_le_bytes());
        page.put(&self.generation.get().to_le_bytes());
        page.put(&self.volume.to_bytes());
        page.put(&self.epoch.get().to_le_bytes());
        page.put(&self.page.to_le_bytes());
        page.put(&base.get().to_le_bytes());
        if let Some(durable) = self.durable {
            page.version(RECORDS_DURABLE);
            page.put(&durable.get().to_le_bytes());
        }
        for record in &self.records {
            let (word, offset) = pack_record(record);
            let delta =
                u32::try_from(record.seq.get() - base.get()).expect("writes of one segment");
            page.put(&word.to_le_bytes());
            page.put(&record.len.to_le_bytes());
            page.put(&offset.to_le_bytes());
            page.put(&delta.to_le_bytes());
        }
        page.seal(cache)
    }

    /// The record page that `bytes` are, on the cache device `cache`.
    ///
    /// # Errors
    /// If they are none, damaged, or of another cache device.
    pub fn decode(bytes: &[u8], cache: CacheId) -> Result<Self> {
        const WHAT: &str = RECORDS.what;
        let (mut reader, count) = open(&RECORDS, bytes, cache)?;
        let says_durable = version(bytes) >= RECORDS_DURABLE;
        let most = records_max(says_durable);
        check_up_to(WHAT, "number of records", count.into(), most as u64)?;
        let segment = SegmentId::new(reader.u32()?);
        let generation = Generation::new(reader.u64()?);
        let volume = VolumeId::from_bytes(reader.array()?);
        let epoch = Epoch::new(reader.u32()?);
        let page = reader.u32()?;
        let base = reader.u64()?;
        let mut durable = None;
        if says_durable {
            durable = Some(WriteSeq::new(reader.u64()?));
        }
        let mut records = Vec::with_capacity(count.into());
        for _ in 0..count {
            records.push(read_record(&mut reader, base)?);
        }
        finish(reader)?;
        if base != base_of(&records).get() {
            return Err(FormatError::invalid(
                WHAT,
                "the base is not the smallest number of its writes",
            ));
        }
        Ok(Self {
            segment,
            generation,
            volume,
            epoch,
            page,
            durable,
            records,
        })
    }
}

/// Most records of a page that says what was durable, or does not.
const fn records_max(says_durable: bool) -> usize {
    if says_durable {
        RECORDS_PER_PAGE
    } else {
        RECORDS_MAX
    }
}

/// The smallest number of the writes; 0 of none.
fn base_of(records: &[Record]) -> WriteSeq {
    let numbers = records.iter().map(|record| record.seq);
    numbers.min().unwrap_or_default()
}

fn read_record(reader: &mut Reader<'_>, base: u64) -> Result<Record> {
    const WHAT: &str = RECORDS.what;
    let (word, len, offset, delta) = (reader.u64()?, reader.u32()?, reader.u32()?, reader.u32()?);
    let Some(seq) = base.checked_add(delta.into()) else {
        return Err(FormatError::invalid(
            WHAT,
            "a write's number does not fit 64 bits",
        ));
    };
    unpack_record(WHAT, WriteSeq::new(seq), word, len, offset)
}

/// A record's start with its kind, and its data's offset, as they are written.
///
/// # Panics
/// If it is empty or outside any volume.
pub(crate) fn pack_record(record: &Record) -> (u64, u32) {
    check_record(RECORDS.what, record).unwrap_or_else(|error| panic!("{error}"));
    let (kind, offset) = match record.body {
        RecordBody::Data { offset } => (0u64, offset),
        RecordBody::Zero => (1, 0),
        RecordBody::Discard => (2, 0),
    };
    (record.start.get() | kind << START_BITS, offset)
}

/// The record of write `seq` from what [`pack_record`] gave.
pub(crate) fn unpack_record(
    what: &'static str,
    seq: WriteSeq,
    word: u64,
    len: u32,
    offset: u32,
) -> Result<Record> {
    let body = match word >> START_BITS {
        0 => RecordBody::Data { offset },
        1 => RecordBody::Zero,
        2 => RecordBody::Discard,
        found => {
            return Err(FormatError::Unknown {
                what,
                field: "kind of record",
                found,
            });
        }
    };
    if offset != 0 && !matches!(body, RecordBody::Data { .. }) {
        return Err(FormatError::invalid(
            what,
            "a record without data says where they are",
        ));
    }
    let start = Lba::new(word & ((1 << START_BITS) - 1));
    let record = Record {
        seq,
        start,
        len,
        body,
    };
    check_record(what, &record)?;
    Ok(record)
}

fn check_record(what: &'static str, record: &Record) -> Result<()> {
    if record.len == 0 {
        return Err(FormatError::invalid(what, "a record is empty"));
    }
    let end = record.start.get().checked_add(record.len.into());
    if end.is_none_or(|end| end > VOLUME_SECTORS_MAX) {
        return Err(FormatError::invalid(
            what,
            "a record lies outside any volume",
        ));
    }
    match record.body {
        RecordBody::Data { offset } if offset.checked_add(record.len).is_none() => Err(
            FormatError::invalid(what, "a record's data lie outside any segment"),
        ),
        _ => Ok(()),
    }
}

/// Fills a page from the front.
pub(crate) struct Writer {
    page: Page,
    at: usize,
}

impl Writer {
    /// `word` is the kind's own use of bytes 6 and 7.
    pub(crate) fn new(kind: &Kind, word: u16) -> Self {
        let mut writer = Self {
            page: Box::new([0; PAGE_SIZE]),
            at: 0,
        };
        writer.put(&kind.magic);
        writer.put(&VERSION.to_le_bytes());
        writer.put(&word.to_le_bytes());
        writer.put(&[0; 4]);
        writer
    }

    /// Not the first version of its kind.
    fn version(&mut self, version: u16) {
        self.page[4..6].copy_from_slice(&version.to_le_bytes());
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.page[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    pub(crate) fn seal(mut self, cache: CacheId) -> Page {
        let crc = checksum(&self.page[..], cache);
        self.page[CRC_AT..BODY_AT].copy_from_slice(&crc.to_le_bytes());
        self.page
    }
}

/// CRC32C over the cache device's id and all of the page but the checksum itself.
fn checksum(page: &[u8], cache: CacheId) -> u32 {
    let crc = crc32c::crc32c(&cache.to_bytes());
    let crc = crc32c::crc32c_append(crc, &page[..CRC_AT]);
    crc32c::crc32c_append(crc, &page[BODY_AT..])
}

/// The version of a page that was opened.
fn version(page: &[u8]) -> u16 {
    u16::from_le_bytes([page[4], page[5]])
}

/// A reader from byte 12 on, and bytes 6 and 7.
pub(crate) fn open<'a>(kind: &Kind, bytes: &'a [u8], cache: CacheId) -> Result<(Reader<'a>, u16)> {
    let what = kind.what;
    if bytes.len() > PAGE_SIZE {
        return Err(FormatError::Trailing {
            what,
            extra: (bytes.len() - PAGE_SIZE) as u64,
        });
    }
    if bytes.len() < PAGE_SIZE {
        let (need, have) = (PAGE_SIZE as u64, bytes.len() as u64);
        return Err(FormatError::Truncated { what, need, have });
    }
    let mut reader = Reader::new(bytes, what);
    let magic = reader.array()?;
    if magic != kind.magic {
        return Err(FormatError::Magic { what, found: magic });
    }
    let version = reader.u16()?;
    let word = reader.u16()?;
    // Before the version: one flipped bit must not look like a newer build's page.
    if reader.u32()? != checksum(bytes, cache) {
        return Err(FormatError::Checksum { what });
    }
    if version == 0 || version > kind.version {
        return Err(FormatError::Version {
            what,
            found: version,
            supported: kind.version,
        });
    }
    Ok((reader, word))
}

/// The rest of a page is zeroes.
pub(crate) fn finish(mut reader: Reader<'_>) -> Result<()> {
    let what = reader.what();
    let rest = reader.bytes(reader.remaining())?;
    if rest.iter().any(|byte| *byte != 0) {
        return Err(FormatError::invalid(
            what,
            "there is something behind its end",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CACHE: CacheId = CacheId::from_bytes([3; 16]);

    fn superblock() -> Superblock {
        Superblock {
            cache: CACHE,
            created_ms: 1_700_000_000_000,
            host: "host-a".to_owned(),
            segment_size: 8 << 20,
            segments: 128,
            data_start: 1 << 20,
            key: None,
            has_sessions: false,
        }
    }

    fn header() -> SegmentHeader {
        SegmentHeader {
            segment: SegmentId::new(1),
            generation: Generation::new(2),
            volume: VolumeId::from_bytes([4; 16]),
            epoch: Epoch::new(5),
            kind: SegmentKind::Fill,
            tenant: Some(TenantName::new("acme").unwrap()),
            durable: Some(WriteSeq::new(77)),
        }
    }

    fn records(records: Vec<Record>) -> RecordPage {
        RecordPage {
            segment: SegmentId::new(1),
            generation: Generation::new(2),
            volume: VolumeId::from_bytes([4; 16]),
            epoch: Epoch::new(5),
            page: 6,
            durable: Some(WriteSeq::new(u64::MAX)),
            records,
        }
    }

    fn any_record() -> impl Strategy<Value = Record> {
        let body = prop_oneof![
            (0u32..1 << 23).prop_map(|offset| RecordBody::Data { offset }),
            Just(RecordBody::Zero),
            Just(RecordBody::Discard),
        ];
        (
            0u64..1 << 32,
            0..VOLUME_SECTORS_MAX - (1 << 31),
            1u32..1 << 31,
            body,
        )
            .prop_map(|(seq, start, len, body)| {
                let seq = WriteSeq::new(u64::MAX - (1 << 32) + seq);
                Record {
                    seq,
                    start: Lba::new(start),
                    len,
                    body,
                }
            })
    }

    fn reseal(page: &mut [u8]) {
        let crc = checksum(page, CACHE);
        page[CRC_AT..BODY_AT].copy_from_slice(&crc.to_le_bytes());
    }

    proptest! {
        #[test]
        fn record_page_any_records_round_trip(
            list in prop::collection::vec(any_record(), 0..=RECORDS_PER_PAGE),
        ) {
            let page = records(list);
            prop_assert_eq!(RecordPage::decode(&page.encode(CACHE)[..], CACHE), Ok(page));
        }

        #[test]
        fn page_any_flip_or_cut_is_an_error(
            list in prop::collection::vec(any_record(), 0..=RECORDS_PER_PAGE),
            at in 0..PAGE_SIZE,
            bit in 0u8..8,
        ) {
            let flip = |mut page: Page| {
                page[at] ^= 1 << bit;
                page
            };
            let page = records(list).encode(CACHE);
            prop_assert!(RecordPage::decode(&page[..at], CACHE).is_err());
            prop_assert!(RecordPage::decode(&flip(page)[..], CACHE).is_err());
            let page = header().encode(CACHE);
            prop_assert!(SegmentHeader::decode(&page[..at], CACHE).is_err());
            prop_assert!(SegmentHeader::decode(&flip(page)[..], CACHE).is_err());
            let page = superblock().encode();
            prop_assert!(Superblock::decode(&page[..at]).is_err());
            prop_assert!(Superblock::decode(&flip(page)[..]).is_err());
        }

        #[test]
        fn page_any_bytes_under_a_right_checksum_never_panic(
            list in prop::collection::vec(any_record(), 1..=RECORDS_PER_PAGE),
            changes in prop::collection::vec((6usize..600, any::<u8>()), 1..6),
        ) {
            let change = |mut page: Page| {
                for (at, value) in &changes {
                    page[*at] = *value;
                }
                reseal(&mut page[..]);
                page
            };
            let page = change(records(list).encode(CACHE));
            if let Ok(decoded) = RecordPage::decode(&page[..], CACHE) {
                prop_assert_eq!(&decoded.encode(CACHE)[..], &page[..]);
            }
            let page = change(header().encode(CACHE));
            let _ = SegmentHeader::decode(&page[..], CACHE);
            let page = change(superblock().encode());
            let _ = Superblock::decode(&page[..]);
        }
    }

    #[test]
    fn superblock_and_segment_header_round_trip() {
        assert_eq!(
            Superblock::decode(&superblock().encode()[..]),
            Ok(superblock())
        );
        assert_eq!(
            SegmentHeader::decode(&header().encode(CACHE)[..], CACHE),
            Ok(header())
        );
    }

    #[test]
    fn pages_of_older_versions_round_trip_as_such() {
        for (tenant, version) in [(None, 1), (Some(TenantName::new("acme").unwrap()), 2)] {
            let durable = None;
            let old = SegmentHeader {
                tenant,
                durable,
                ..header()
            };
            let page = old.encode(CACHE);
            assert_eq!(u16::from_le_bytes([page[4], page[5]]), version);
            assert_eq!(SegmentHeader::decode(&page[..], CACHE), Ok(old));
        }
        let record = |n: u64| Record {
            seq: WriteSeq::new(n),
            start: Lba::new(n * 8),
            len: 8,
            body: RecordBody::Zero,
        };
        let old = RecordPage {
            durable: None,
            ..records((1..=202).map(record).collect())
        };
        let page = old.encode(CACHE);
        assert_eq!(u16::from_le_bytes([page[4], page[5]]), 1);
        assert_eq!(RecordPage::decode(&page[..], CACHE), Ok(old));
        // So many are not of a page that says what was durable.
        let mut page = page;
        page[4] = 2;
        reseal(&mut page[..]);
        let refused = RecordPage::decode(&page[..], CACHE);
        assert!(matches!(
            refused,
            Err(FormatError::TooLarge { limit: 201, .. })
        ));
    }

    #[test]
    fn page_of_another_cache_device_is_refused() {
        let other = CacheId::from_bytes([9; 16]);
        let refused = SegmentHeader::decode(&header().encode(CACHE)[..], other);
        assert_eq!(
            refused,
            Err(FormatError::Checksum {
                what: "segment header"
            })
        );
        let refused = RecordPage::decode(&records(Vec::new()).encode(CACHE)[..], other);
        assert_eq!(
            refused,
            Err(FormatError::Checksum {
                what: "record page"
            })
        );
    }

    #[test]
    fn record_page_whose_base_is_not_its_smallest_write_is_refused() {
        let mut page = records(Vec::new()).encode(CACHE);
        page[48] = 1;
        reseal(&mut page[..]);
        let refused = RecordPage::decode(&page[..], CACHE);
        assert!(matches!(refused, Err(FormatError::Invalid { .. })));
    }

    #[test]
    fn page_never_written_is_no_page() {
        let blank = RecordPage::decode(&[0; PAGE_SIZE], CACHE);
        assert!(matches!(blank, Err(FormatError::Magic { .. })));
        let wrong = RecordPage::decode(&header().encode(CACHE)[..], CACHE);
        assert!(matches!(wrong, Err(FormatError::Magic { .. })));
    }

    #[test]
    fn page_of_a_later_version_is_named_so() {
        let mut page = superblock().encode();
        page[4] = 4;
        reseal(&mut page[..]);
        let refused = Superblock::decode(&page[..]);
        let (what, found, supported) = ("cache superblock", 4, 3);
        assert_eq!(
            refused,
            Err(FormatError::Version {
                what,
                found,
                supported
            })
        );
    }

    #[test]
    fn superblock_with_a_key_round_trips_and_any_flip_is_an_error() {
        let keyed = Superblock {
            key: Some(CacheKey {
                by: KeyName::new("host-a").unwrap(),
                bytes: vec![7; 92],
            }),
            ..superblock()
        };
        for key in [None, keyed.key.clone()] {
            let with_sessions = Superblock {
                key,
                has_sessions: true,
                ..superblock()
            };
            let page = with_sessions.encode();
            assert_eq!(Superblock::decode(&page[..]), Ok(with_sessions));
        }
        let page = keyed.encode();
        assert_eq!(Superblock::decode(&page[..]), Ok(keyed));
        for bit in 0..512 * 8 {
            let mut bad = page.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&bad[..]).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn superblock_broken_rules_are_named() {
        let cases = [
            (
                Superblock {
                    key: Some(CacheKey {
                        by: KeyName::new("k").unwrap(),
                        bytes: Vec::new(),
                    }),
                    ..superblock()
                },
                "wrapped key",
            ),
            (
                Superblock {
                    segment_size: 4096,
                    ..superblock()
                },
                "segment size",
            ),
            (
                Superblock {
                    segment_size: 20_000,
                    ..superblock()
                },
                "segment size",
            ),
            (
                Superblock {
                    segments: 0,
                    ..superblock()
                },
                "no segment",
            ),
            (
                Superblock {
                    data_start: 100,
                    ..superblock()
                },
                "whole pages",
            ),
            (
                Superblock {
                    data_start: (i64::MAX as u64) & !4095,
                    ..superblock()
                },
                "any device",
            ),
        ];
        for (superblock, word) in cases {
            let error = superblock.validate().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
