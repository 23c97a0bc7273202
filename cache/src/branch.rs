//! Decisions of the real code that the simulation counts, so that it can say which it never came through.
//!
//! Without the feature `mutations`, which only the simulation asks for, and in every release build,
//! [`Branch::taken`] does nothing and is not in the program.

macro_rules! branches {
    ($($(#[$about:meta])* $name:ident,)*) => {
        /// One decision. Each is noted in one place, when it was taken.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum Branch {
            $($(#[$about])* $name,)*
        }

        impl Branch {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

branches! {
    /// A run is read that the store lacks.
    ReadUnsent,
    /// A run is read from the cache that the store has too.
    ReadClean,
    /// A run is answered from what was read ahead and is in memory.
    ReadKept,
    /// A frame that was read ahead makes room for newer ones.
    KeptPushedOut,
    /// A run that the cache lacks is wanted.
    ReadMissed,
    /// A run is found in the log.
    FoundInLog,
    /// A run is found in the part of the log that is being folded.
    FoundInFolding,
    /// A run is looked up in the map.
    LookedUpInMap,
    /// A clean read failed and is made again, from the store.
    ReadAgain,
    /// A frame that is on its way already is waited for.
    FrameAwaited,
    /// A fetched frame is in the cache already, or being written to it.
    FillNeedless,
    /// There is no room for a fetched frame.
    FillRefused,
    /// Readahead is left out, for enough is under way.
    ReadaheadHeldBack,
    /// A discard of what reads as a hole.
    HoleDiscarded,
    /// A write goes on behind the piece that fitted.
    WriteSplit,
    /// What is left of the open segment is too little.
    SegmentTooFull,
    /// No segment for writes: too many are dirty, or volumes wait in line.
    SegmentRefused,
    /// No segment for writes: none can be reclaimed just now.
    SegmentBusy,
    /// Writes wait for a round, for the journal is full.
    JournalFull,
    /// A round is started because the journal is half full.
    JournalHalfFull,
    /// Writes wait, for the store lacks too many.
    UnsentFull,
    /// Writes wait, for the map lacks too much.
    LogFull,
    /// Data arrived after the volume was fenced.
    ArrivedFenced,
    /// Data arrived after the cache device had failed.
    ArrivedFailed,
    /// A header could not be written.
    HeaderFailed,
    /// The open segment is given up for another volume.
    SegmentLent,
    /// The open segment is given up after a quiet while.
    SegmentIdle,
    /// A flush has nothing to wait for.
    FlushDurable,
    /// A flush waits for the store.
    FlushByStore,
    /// A flush waits for the round after the one under way.
    FlushBehindRound,
    /// A write with FUA waits for its durability.
    FuaWaits,
    /// Durability is asked for of a volume that was fenced or has failed since.
    FlushRefused,
    /// A round has no record to write.
    RoundWithoutPages,
    /// A round's sync failed.
    RoundSyncFailed,
    /// A record page could not be written.
    RecordPageFailed,
    /// A round ends in a volume that has failed.
    RoundEndsFailed,
    /// A chunk is cut for its data.
    CutBySectors,
    /// A chunk is cut for its number of writes.
    CutByWrites,
    /// A chunk is cut for its age.
    CutByAge,
    /// A chunk is cut because somebody waits for it.
    CutWanted,
    /// A chunk is cut because writes wait for room.
    CutStarved,
    /// A chunk waits, for enough are being uploaded.
    UploadsFull,
    /// A chunk is stored before one that comes earlier.
    StoredEarly,
    /// Several chunks are committed at once.
    CommittedSeveral,
    /// A checkpoint for the log's chunks.
    CheckpointByChunks,
    /// A checkpoint for the log's entries.
    CheckpointByEntries,
    /// A checkpoint because a drain wants it.
    CheckpointAsked,
    /// A drain ends, not complete.
    DrainStuck,
    /// A segment is reclaimed.
    Reclaimed,
    /// A segment that was used or is in use is passed over.
    ReclaimPassedOver,
    /// Recovery gives the journal's records pages.
    JournalPaged,
    /// A record of the journal has no room for a page.
    JournalWithoutRoom,
    /// Recovery cuts off records behind a gap.
    GapCut,
    /// Less was found than had been durable.
    LossRefused,
    /// What was durable and is not there is not missed any more.
    LossGivenUp,
    /// What is read was not flushed before a sync failed.
    ReadInDoubt,
    /// A read was under way when a sync failed: it is made again.
    ReadDoubted,
    /// What was acknowledged before a sync failed is in doubt: the volume is refused.
    DoubtRefused,
    /// The same is given up.
    DoubtGivenUp,
    /// Segments of a history that the volume has left are split off.
    StaleSplitOff,
    /// Attaching is refused because of them.
    StaleRefused,
    /// Attaching is refused, for somebody else has the volume.
    OwnedRefused,
    /// The log's open end is sealed.
    Sealed,
    /// The log is found sealed by an attach that went no further.
    SealFound,
    /// The old writer's chunk is where the seal was to be.
    SealBeaten,
    /// A header longer than what was asked for first.
    HeaderLonger,
    /// A chunk is there already, by a try of ours whose answer was lost.
    ChunkThere,
    /// A seal is where a chunk was to be: a newer writer.
    SealMet,
    /// Unsent data cannot be read for their upload, just now.
    UploadReadFailed,
    /// The head is what was to be written, by a try of ours whose answer was lost.
    HeadThere,
    /// The head has a change of ours that was given up.
    HeadOfBefore,
    /// The head is a newer writer's.
    HeadFenced,
    /// An answer that was damaged is asked for again.
    AskedAgain,
    /// A snapshot's copy takes the place of one that no head names, or of its own.
    SnapshotCopyThere,
    /// A snapshot is tried anew, for a checkpoint came before it.
    SnapshotMoved,
    /// A snapshot is there already, by a change of ours that was given up.
    SnapshotThere,
    /// A snapshot whose deletion was begun before is deleted.
    SnapshotClosing,
    /// A snapshot is not deleted, for it has clones.
    SnapshotReopened,
    /// Only the copy of a snapshot is left to be deleted.
    SnapshotCopyLeft,
    /// A clone is refused, for its snapshot is gone or going.
    CloneRefused,
    /// The head of a clone is there, by a try of ours whose answer was lost.
    CloneThere,
    /// A clone finds that it was given up.
    CloneFoundGivenUp,
    /// A clone that was begun and has no head is given up.
    CloneGivenUp,
    /// A clone that was begun is taken back.
    CloneTakenBack,
    /// A volume is rolled back, and all that it has is known.
    RolledBackCounted,
    /// A volume is rolled back, and what it has is to be counted.
    RolledBackUncounted,
    /// A deletion is taken back, for clones were found.
    DeletionUndone,
    /// A deletion that was begun before goes on.
    DeletionGoesOn,
    /// A record of the trash is made anew.
    TrashRecordRenewed,
    /// A volume was restored while it was being deleted.
    RestoredMeanwhile,
    /// A restoring that was begun before goes on.
    RestoringGoesOn,
    /// It is too early to purge a volume.
    PurgeNotDue,
    /// A purge that was begun before goes on.
    PurgeGoesOn,
    /// A volume that was restored has a record in the trash.
    PurgeFindsRestored,
    /// A volume to be purged has no head.
    PurgeHeadless,
}

impl Branch {
    /// Notes that the decision was taken.
    #[cfg(not(all(feature = "mutations", debug_assertions)))]
    #[inline]
    pub const fn taken(self) {}

    /// Notes that the decision was taken, on this thread.
    #[cfg(all(feature = "mutations", debug_assertions))]
    pub fn taken(self) {
        COUNTS.with_borrow_mut(|counts| counts[self as usize] += 1);
    }

    /// How often each of [`Self::ALL`] was taken on this thread since this was called last.
    #[cfg(not(all(feature = "mutations", debug_assertions)))]
    #[must_use]
    pub const fn take_counts() -> [u64; Self::ALL.len()] {
        [0; Self::ALL.len()]
    }

    /// How often each of [`Self::ALL`] was taken on this thread since this was called last.
    #[cfg(all(feature = "mutations", debug_assertions))]
    pub fn take_counts() -> [u64; Self::ALL.len()] {
        COUNTS.replace([0; Self::ALL.len()])
    }
}

#[cfg(all(feature = "mutations", debug_assertions))]
thread_local! {
    static COUNTS: std::cell::RefCell<[u64; Branch::ALL.len()]> =
        const { std::cell::RefCell::new([0; Branch::ALL.len()]) };
}
