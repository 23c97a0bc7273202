//! What goes into a volume and what comes out of it: its whole contract with the world.
//!
//! The driver (a reactor on io_uring, or a simulation) feeds [`Event`]s to
//! [`Volume::apply`](crate::Volume::apply) and carries out the [`Action`]s it answers with, in any
//! order that respects this: an action's completion event is fed exactly once, after the I/O it
//! names is done. An action whose text says that it is done at once (`Journal`, `Status`) is done before those that come
//! after it; nothing else is promised between two actions. All ordering that durability needs
//! is made by the volume itself, which holds the second action back until the first completed.

use std::sync::Arc;

use bytes::Bytes;
use quarry_objfmt::{
    ChunkId, ChunkSeq, Generation, Lba, LbaRange, MapEntry, Record, Sectors, SegmentId, WriteSeq,
};

use crate::log::FrozenLog;
use crate::map::{MapRoot, Node, NodeRef};

/// The front end's name for a request in flight: unique among those of one volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// The volume's name for an I/O it asked for; comes back in the completion.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct IoId(pub u64);

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Fill the request's buffer.
    Read,
    /// Store the request's buffer; with `fua`, durably so before it completes.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Make all that was acknowledged durable.
    Flush,
    /// The data are no longer wanted; they read as zeroes from now on.
    Discard,
    /// Read as zeroes from now on; with `fua`, durably so before it completes.
    WriteZeroes {
        /// Force unit access.
        fua: bool,
    },
    /// Tell which runs are known to read as zeroes, by [`Action::Status`], and nothing of the data. The
    /// answer covers the start of the range, as far as it can be told at once.
    Status,
}

impl Op {
    /// How many bytes of data a request of it has in its buffer, of this range.
    #[must_use]
    pub const fn data_bytes(self, range: LbaRange) -> u64 {
        match self {
            Self::Read | Self::Write { .. } => range.len().bytes(),
            Self::Flush | Self::Discard | Self::WriteZeroes { .. } | Self::Status => 0,
        }
    }
}

/// A run of a volume and whether it is known to read as zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StatusRun {
    /// Its length.
    pub len: Sectors,
    /// Whether it is known to read as zeroes.
    pub zero: bool,
}

/// One request of a front end. Its buffer stays with the driver, which knows it by `id`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Its name; free again once completed.
    pub id: RequestId,
    /// What to do.
    pub op: Op,
    /// The sectors; empty for [`Op::Flush`] only.
    pub range: LbaRange,
}

/// Why an I/O failed, in the terms that the kernel's edge maps to an errno.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IoError {
    /// Outside the volume, not on a logical block boundary, or empty (`EINVAL`).
    #[error("the request is not a run of logical blocks inside the volume")]
    Invalid,
    /// The volume takes no writes: attached read-only, or fenced by a newer writer (`EROFS`).
    #[error("the volume is read-only")]
    ReadOnly,
    /// The data cannot be had or kept: a damaged object or a failed cache device (`EIO`).
    #[error("the data cannot be read or written")]
    Io,
    /// The volume is being taken away (`ESHUTDOWN`).
    #[error("the volume is being detached")]
    ShuttingDown,
}

impl IoError {
    /// The one errno of each kind.
    #[must_use]
    pub const fn errno(self) -> i32 {
        match self {
            Self::Invalid => 22,
            Self::ReadOnly => 30,
            Self::Io => 5,
            Self::ShuttingDown => 108,
        }
    }
}

/// A frame that a fetch delivers, and its place in the chunk's object.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FrameRef {
    /// Its number in the chunk.
    pub index: u32,
    /// Where it starts in the chunk object (header and payload), in bytes.
    pub stored_offset: u32,
    /// Its length in the object, in bytes.
    pub stored_len: u32,
}

/// Frames of one chunk that lie end to end in its object: one ranged GET.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fetch {
    /// The chunk.
    pub chunk: ChunkId,
    /// At least one; each starts where the one before it ended.
    pub frames: Vec<FrameRef>,
}

/// One run of a chunk that is about to be written to the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedExtent {
    /// The sectors it gives a new content.
    pub range: LbaRange,
    /// Where that content is.
    pub source: ExtentSource,
}

/// Where the content of a planned extent is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtentSource {
    /// On the cache device, at this byte.
    Cache {
        /// Bytes from the start of the cache device.
        offset: u64,
    },
    /// Zeroes, written.
    Zero,
    /// Zeroes, discarded.
    Discard,
}

/// A chunk to be made and stored: an exact prefix cut of the volume's writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChunkPlan {
    /// Its place in the log.
    pub id: ChunkId,
    /// The oldest write in it.
    pub first_write: WriteSeq,
    /// The newest write in it; the next chunk starts after it.
    pub last_write: WriteSeq,
    /// Disjoint. The data runs in the order of their raw space.
    pub extents: Vec<PlannedExtent>,
}

/// A fold of the log into the map: everything committed up to and with `upto`.
#[derive(Clone, Debug)]
pub struct CheckpointPlan {
    /// The last chunk folded in.
    pub upto: ChunkSeq,
    /// The newest write folded in.
    pub last_write: WriteSeq,
    /// What is new: each run newer than all that the map holds there.
    pub log: FrozenLog,
}

/// What a volume is told.
#[derive(Debug)]
pub enum Event {
    /// A front end's request.
    Request(Request),
    /// A cache I/O (`CacheRead`, `CacheWrite`, `ZeroFill`, `WritePage`, `Sync`, `FillWrite`,
    /// `CopyToRequest`) or a `FetchDirect` is done; a transfer that was short is an error.
    IoDone {
        /// The I/O.
        io: IoId,
        /// How it went; `Err` holds the errno.
        result: Result<(), i32>,
    },
    /// A fetch is done (a store that is merely away is waited for, not reported).
    Fetched {
        /// The I/O.
        io: IoId,
        /// For each frame in the fetch its raw content, or that it is damaged or gone.
        frames: Vec<Result<Bytes, DataError>>,
    },
    /// Map nodes were loaded.
    NodesLoaded {
        /// The I/O.
        io: IoId,
        /// The nodes, which the volume puts into the node cache; or the damage.
        result: Result<Vec<(NodeRef, Arc<Node>)>, DataError>,
    },
    /// A chunk is in the store.
    Uploaded {
        /// Which.
        seq: ChunkSeq,
        /// Its data extents as map entries: sorted as in the plan, split at frame boundaries,
        /// with the zero and discard runs as `Location::Zero`.
        entries: Vec<MapEntry>,
        /// Its object's length in bytes.
        stored_bytes: u64,
    },
    /// A checkpoint is recorded in `head`.
    Checkpointed {
        /// The map as it is now.
        root: Arc<MapRoot>,
        /// The last chunk it holds.
        upto: ChunkSeq,
    },
    /// The map is another that reads the same: a compaction has moved data.
    Remapped {
        /// The map as it is now.
        root: Arc<MapRoot>,
    },
    /// The checkpoint under way cannot be made. The log stays as it is.
    CheckpointFailed {
        /// The map that is there is damaged: no other checkpoint is tried. Else the store refuses what is to be stored, and
        /// another is tried later.
        for_good: bool,
    },
    /// What is unsent cannot be read on the cache device any more, or not be believed: a sync failed, whoever's it was, or it is
    /// given up where it cannot be read.
    CacheFailed {
        /// What the device said.
        errno: i32,
    },
    /// A newer writer took the volume; nothing of ours will ever be committed again.
    Fenced {
        /// By whom, for the operator.
        by: String,
    },
    /// Time has passed. `now_ms` counts from any fixed point and never goes back.
    Tick {
        /// Milliseconds.
        now_ms: u64,
    },
    /// From now on misses may be received straight into requests' buffers, or not: see
    /// [`Action::FetchDirect`]. Only for volumes whose frames are neither compressed nor encrypted.
    DirectReads(bool),
    /// Upload all that was acknowledged before now, then say [`Action::Drained`].
    Drain {
        /// Name of this drain.
        io: IoId,
        /// Also fold the whole log into the map.
        checkpoint: bool,
    },
    /// Fetch what the cache lacks of `range` into it, for whoever reads it later, then say
    /// [`Action::Warmed`]. One at a time; as far as [`WARM_SECTORS_MAX`](crate::WARM_SECTORS_MAX) sectors, or
    /// so many frames that the cache lacks.
    Warm {
        /// Comes back in `Warmed`.
        io: IoId,
        /// The sectors.
        range: LbaRange,
    },
    /// The volume has this size now, which `head` holds already; requests from here on may reach up to
    /// its end, and what was never written reads as zeroes. One that is not larger changes nothing.
    Grown {
        /// The size.
        size: Sectors,
    },
    /// Complete nothing new: fail all requests that come from now on with `ShuttingDown`. With the
    /// next drain that is complete, the volume gives up its place on the cache device too.
    Stop,
}

/// Damage in the object store: which object, and what is wrong with it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{object}: {reason}")]
pub struct DataError {
    /// The object's key.
    pub object: String,
    /// What is wrong, in words.
    pub reason: String,
}

/// What a volume asks for.
#[derive(Debug)]
pub enum Action {
    /// Read `len` bytes at `offset` of the cache device into the request's buffer at `buffer_offset`.
    CacheRead {
        /// Comes back in `IoDone`.
        io: IoId,
        /// Whose buffer.
        request: RequestId,
        /// Bytes from the buffer's start.
        buffer_offset: u32,
        /// Bytes from the cache device's start.
        offset: u64,
        /// Bytes; a multiple of 512.
        len: u32,
    },
    /// Write `len` bytes of the request's buffer at `buffer_offset` to `offset` of the cache device.
    CacheWrite {
        /// Comes back in `IoDone`.
        io: IoId,
        /// Whose buffer.
        request: RequestId,
        /// Bytes from the buffer's start.
        buffer_offset: u32,
        /// Bytes from the cache device's start.
        offset: u64,
        /// Bytes; a multiple of 512.
        len: u32,
    },
    /// Fill a run of the request's buffer with zeroes.
    ZeroFill {
        /// Comes back in `IoDone`.
        io: IoId,
        /// Whose buffer.
        request: RequestId,
        /// Bytes from the buffer's start.
        buffer_offset: u32,
        /// Bytes.
        len: u32,
    },
    /// Copy fetched bytes into the request's buffer: the one copy of a miss.
    CopyToRequest {
        /// Comes back in `IoDone`.
        io: IoId,
        /// Whose buffer.
        request: RequestId,
        /// Bytes from the buffer's start.
        buffer_offset: u32,
        /// What to copy.
        data: Bytes,
    },
    /// Write a page of 4 KiB (a segment header or a record page) to the cache device. With
    /// `durable` it must be on stable media when it completes (`RWF_DSYNC`).
    WritePage {
        /// Comes back in `IoDone`.
        io: IoId,
        /// Bytes from the cache device's start.
        offset: u64,
        /// Exactly 4096 bytes.
        page: Box<[u8; 4096]>,
        /// Whether it must be durable when it completes.
        durable: bool,
    },
    /// Put the record of a write into the journal: memory that outlives this process. Done at once,
    /// before any action that comes after it; nothing comes back.
    Journal {
        /// The segment that holds the write's data, or of a discard its record.
        segment: SegmentId,
        /// The segment's generation.
        generation: Generation,
        /// The record.
        record: Record,
    },
    /// Sync the cache device's data (`fdatasync`).
    Sync {
        /// Comes back in `IoDone`.
        io: IoId,
    },
    /// Write fetched frames to the cache device, after the requests were answered.
    FillWrite {
        /// Comes back in `IoDone`.
        io: IoId,
        /// Bytes from the cache device's start.
        offset: u64,
        /// What to write; a multiple of 512.
        data: Bytes,
    },
    /// Get frames from the store; `foreground` ones have a request waiting.
    Fetch {
        /// Comes back in `Fetched`.
        io: IoId,
        /// What.
        fetch: Fetch,
        /// Whether a request waits for it (false: readahead, warming).
        foreground: bool,
    },
    /// Receive bytes of a chunk's object from the store into the request's buffer, by a way on which
    /// they do not pass through our memory. An error of any kind is allowed, at once too, and after a
    /// part was received: the run is then fetched the ordinary way.
    FetchDirect {
        /// Comes back in `IoDone`.
        io: IoId,
        /// Whose buffer.
        request: RequestId,
        /// Bytes from the buffer's start.
        buffer_offset: u32,
        /// The chunk.
        chunk: ChunkId,
        /// Bytes from the object's start.
        object_offset: u64,
        /// Bytes; a multiple of 512.
        len: u32,
    },
    /// Get map nodes from the store.
    LoadNodes {
        /// Comes back in `NodesLoaded`.
        io: IoId,
        /// Which; at least one.
        nodes: Vec<NodeRef>,
        /// Whether a request waits for them (false: readahead, warming).
        foreground: bool,
    },
    /// Make a chunk of this plan and store it, create-only; answer `Uploaded` or `Fenced`. Several
    /// may be under way at once; the volume commits them in order.
    Upload(ChunkPlan),
    /// Fold the log into the map and move `head`; answer `Checkpointed` or `Fenced`.
    Checkpoint(CheckpointPlan),
    /// A checkpoint's log, which nothing is read by any more. To be dropped where nobody waits for it: it is long, and
    /// here all volumes do. Nothing comes back.
    Folded(FrozenLog),
    /// The answer to [`Op::Status`], which is completed next. Done at once, before any action that comes
    /// after it; nothing comes back.
    Status {
        /// Whose.
        request: RequestId,
        /// From the range's start on, without gaps, neighbours being different; at least one, and
        /// no more than [`STATUS_RUNS_MAX`](crate::STATUS_RUNS_MAX).
        runs: Vec<StatusRun>,
    },
    /// The request, a read, waits for the store: for data, or for map nodes that say where they are. May be said
    /// more than once, and never after it is done; nothing comes back.
    Missed {
        /// Which.
        request: RequestId,
    },
    /// A `Fetch` or `LoadNodes` that the request waited for was answered. Said before what comes of it for the
    /// request; may be said more than once, and nothing comes back.
    Waited {
        /// Which.
        request: RequestId,
        /// For what.
        io: IoId,
    },
    /// What the oldest write without a place waits for from now on, or that no write waits for one. Nothing comes
    /// back.
    WritesWait(Option<WriteWait>),
    /// The request is done. Its buffer may be given away.
    Complete {
        /// Which.
        request: RequestId,
        /// How it went.
        result: Result<(), IoError>,
    },
    /// The drain of this name is done: all that was acknowledged before it is in the store (and, if
    /// that was asked for and the map is not damaged, folded into the map).
    Drained {
        /// Its name.
        io: IoId,
        /// False if the volume was fenced or has failed, and what it held stays in the cache.
        complete: bool,
    },
    /// The warming of this name is done.
    Warmed {
        /// Its name.
        io: IoId,
        /// How far it came.
        upto: Lba,
        /// Bytes asked of the store for it.
        bytes: u64,
        /// How it went.
        end: WarmEnd,
    },
    /// Something the operator must know; the reason is one sentence.
    Report(Report),
}

/// What a write waits for that has no place on the cache device yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteWait {
    /// A new segment's header is being written.
    Segment,
    /// Room on the cache device, which comes when the store has taken something.
    Space,
    /// Room in the journal, which comes with a round of record pages.
    Journal,
    /// The store lacks as many writes as memory has room for.
    Unsent,
    /// The map lacks as many entries as memory has room for.
    Log,
}

/// How a step of warming ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WarmEnd {
    /// What it came by is in the cache, or was left out for want of room.
    Done,
    /// Something of it could not be had; that was reported.
    Damaged,
    /// Nothing was done: another one is under way.
    Busy,
    /// Nothing was done: the volume is being detached.
    Stopping,
}

/// A change of state that the operator must know of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Report {
    /// A newer writer took the volume; it is read-only here and keeps what it could not send.
    Fenced {
        /// By whom.
        by: String,
        /// Bytes acknowledged here that the store will not get.
        unsent_bytes: u64,
    },
    /// The cache device failed a write or a sync; the volume takes no more writes.
    CacheFailed {
        /// The errno.
        errno: i32,
        /// What was being done.
        doing: &'static str,
    },
    /// Data that the store lacks cannot be read from the cache device. The volume serves on: they may be
    /// read again later, and what can be read can be saved.
    Unreadable {
        /// The errno.
        errno: i32,
    },
    /// An object of the volume is damaged; reads of what it held fail.
    Damaged {
        /// The object's key.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Writes wait for cache space (`true`) or go on again (`false`).
    Stalled(bool),
}

/// Convenience for tests and drivers.
impl Request {
    /// A request over `sectors` sectors from `start`.
    ///
    /// # Errors
    /// [`IoError::Invalid`] if the end does not fit 64 bits.
    pub fn new(id: RequestId, op: Op, start: Lba, sectors: Sectors) -> Result<Self, IoError> {
        let range = LbaRange::new(start, sectors).ok_or(IoError::Invalid)?;
        Ok(Self { id, op, range })
    }
}
