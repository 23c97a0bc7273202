//! Quarry's formats: what lies in the object store and on the cache device, and nothing else.
//!
//! Encodes and decodes; does no I/O, knows no clock and no runtime. `FORMAT.md` beside this crate
//! is the only text of the layout.
#![forbid(unsafe_code)]

pub mod chunk;
pub mod codec;
pub mod error;
pub mod frame;
pub mod head;
pub mod index;
pub mod journal;
pub mod keys;
pub mod map;
pub mod page;
pub mod page_vec;
mod prologue;
pub mod record;
pub mod seal;
pub mod snap;
pub mod types;
pub mod wire;
pub mod wrapped;

pub use chunk::{
    CHUNK_PREFIX_LEN, ChunkExtent, ChunkHeader, ChunkParams, EncodedChunk, ExtentBody, FrameEntry,
    encode_chunk,
};
pub use codec::{Compression, DataKey, DataKeys, Encryption, KeyGeneration};
pub use error::FormatError;
pub use frame::{decode_frame, open_frame};
pub use head::{Deleted, Durability, Head, Lineage, LogRange, Owner, Parent, RootRef, SnapshotRef};
pub use index::{IndexEnd, IndexRecord, IndexRun, IndexTableHeader, SessionPage};
pub use journal::{JOURNAL_ENTRY_LEN, JournalHeader};
pub use keys::{KeyName, NameError, SnapName, TenantName, VolumeName};
pub use page::{
    CacheKey, PAGE_SIZE, RECORDS_PER_PAGE, Record, RecordBody, RecordPage, SegmentHeader,
    SegmentKind, Superblock,
};
pub use page_vec::PageVec;
pub use prologue::{HOST_LEN_MAX, printable};
pub use record::{
    CloneOf, CloneRecord, NameRecord, Rates, Suspended, TenantRecord, TenantSettings, TenantStore,
    TrashRecord, decode_record, encode_record,
};
pub use seal::{LogObject, Seal, classify, encode_seal};
pub use snap::Snapshot;
pub use types::{
    CacheId, ChunkId, ChunkSeq, DataLoc, Epoch, Generation, Lba, LbaRange, Location, MapEntry,
    MapSeq, SECTOR_SIZE, Sectors, SegmentId, VOLUME_SECTORS_MAX, VolumeId, WriteSeq,
};
pub use wrapped::{KeysCopy, WrappedKey, WrappedKeys};
