//! A volume as a state machine: requests, I/O completions, store results and time come in; cache
//! I/O, store calls and completions go out. No I/O, no clock, no lock, no thread.
//!
//! Owns: the order of a volume's writes, when they are durable, which of them form a chunk, and
//! what each sector reads as. Does not own: how an I/O is carried out (the reactor), how a chunk is
//! encoded and stored (the backend), which segment is free (`quarry-cache`).
#![forbid(unsafe_code)]

pub mod event;
mod kept;
mod log;
pub mod map;
mod volume;

pub use event::{
    Action, CheckpointPlan, ChunkPlan, DataError, Event, ExtentSource, Fetch, FrameRef, IoError,
    IoId, Op, PlannedExtent, Report, Request, RequestId, StatusRun, WarmEnd, WriteWait,
};
pub use kept::{FrameName, KeptFrames};
pub use log::FrozenLog;
pub use volume::{
    CHECKPOINT_CHUNKS_MIN, CHECKPOINT_SHARE, LOG_CHUNK_ENTRIES, LOG_REPLAY_MAX, Opened, Prepared,
    STATUS_RUNS_MAX, Shared, Tuning, Volume, VolumeParams, VolumeState, VolumeStats,
    WARM_SECTORS_MAX,
};
