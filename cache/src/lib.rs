//! The cache device: segments, the index of clean data, the budgets, and recovery after a crash.
//!
//! Owns: the layout of the device in segments, which segment holds what, and the rules by which
//! one is freed. Does not own: the order of a volume's writes and flushes (`quarry-volume`), nor
//! the queue that carries the I/O out (the reactor). Everything here but [`device`] is plain
//! bookkeeping in memory.
//!
//! Invariants:
//! - A segment with unsent data is never freed, whatever the pressure.
//! - A segment is reused only when no read of it is in flight, and its header of the new
//!   generation is durable before the first new byte of data is written.
//! - Clean data are found by (chunk, raw sector) and by nothing else, so a stale fill is harmless.

mod aligned;
mod branch;
mod cipher;
mod clean;
pub mod device;
mod extent;
mod failure;
mod group;
mod hash;
mod index_log;
mod journal;
mod mutation;
mod recover;
mod segment;

pub use aligned::AlignedBuf;
pub use branch::Branch;
pub use cipher::{CIPHER_KEY_LEN, SectorCipher};
pub use clean::{CleanIndex, CleanRun};
pub use device::{BlockDevice, CACHE_FILE_SIZE_DEFAULT, CacheDevice, CacheError};
pub use extent::{Carried, ExtentMap};
pub use failure::{Ended, SyncFailure, UnderWay};
pub use group::GroupLimits;
pub use hash::NameHasher;
pub use index_log::{Generations, IndexLog, IndexTable, Place};
pub use journal::{Journal, Journals, Voided};
pub use mutation::Mutation;
pub use recover::{CutError, Recovered, RecoveredPage, RecoveredSegment, Scan, scan};
pub use segment::{
    Cache, CacheCounts, CacheLoc, CleanSegment, Expected, Geometry, NoSpace, OpenedSegment,
};
