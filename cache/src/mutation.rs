//! Ways to break an invariant on purpose, so that the simulation can prove that it would notice.
//!
//! Without the feature `mutations`, which only the simulation asks for, and in every release build,
//! [`Mutation::is_on`] is the constant false: what it guards is not in the program.

/// One broken invariant. Each is looked at in one place of the real code.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Mutation {
    /// A flush writes its record pages without a sync of the data that they name.
    NoSyncBeforeRecords,
    /// A flush takes what arrived while its sync was under way for synced too.
    SyncCoversWhatCameLater,
    /// A flush is acknowledged when its record pages were submitted.
    FlushBeforeRecords,
    /// A write with FUA is acknowledged when its data arrived.
    FuaAsPlainWrite,
    /// A short write may be split into two where a segment ends.
    SplitShortWrites,
    /// The journal gets a record after the acknowledgement.
    JournalAfterAcknowledgement,
    /// A chunk is committed as soon as it is stored, whatever is before it.
    CommitOutOfOrder,
    /// A segment is given up by its writes when their chunk is cut, not when it is committed.
    FreeBeforeCommit,
    /// Segments that became clean stay counted in the dirty budget.
    DirtyNotCountedDown,
    /// A segment is reclaimed while it is being read.
    ReclaimPinned,
    /// What a failed fill would have put on the device can be found there.
    TrustFailedFill,
    /// A frame that was read ahead is found for any chunk of its volume and epoch.
    KeptOfAnyChunk,
    /// What was kept of a segment's writes stays when it is begun anew.
    KeptWritesOfBefore,
    /// What the index log says of a segment counts after it was begun anew.
    DescribedForEver,
    /// Recovery takes what is behind a gap too.
    IgnoreGap,
    /// Recovery leaves what it cut off on the device.
    LeaveWhatWasCut,
    /// What was acknowledged before a sync failed is not asked about.
    ForgetDoubt,
    /// After a sync that failed, what was not flushed is read from the device as before.
    ReadInDoubt,
    /// Unsent writes of a history that the volume has left are merged into it.
    MergeStale,
    /// A head that another epoch wrote is changed as if it were ours.
    IgnoreEpoch,
    /// The end of the log is not sealed.
    NoSeal,
    /// Head names a map object before it is stored.
    HeadBeforeMap,
    /// A body shorter than asked for is taken for whole.
    TrustShortRead,
    /// What a compaction moved is laid over what was folded meanwhile.
    CompactOverNewer,
    /// Objects are deleted while readers may have a map that needs them.
    DeleteBeforeTheHorizon,
    /// Dead objects are deleted that a snapshot needs.
    SweepSnapshots,
    /// A clone is made without the record of it at its parent.
    CloneWithoutRecord,
    /// A snapshot is deleted without a look for its clones.
    DeleteClonedSnapshot,
    /// A volume is deleted without a look for clones of its snapshots.
    DeleteClonedVolume,
    /// A volume is purged before its time in the trash is over.
    PurgeEarly,
    /// A rollback leaves the log behind the map that it takes away.
    RollbackKeepsLog,
    /// What caches kept of a volume goes on behind a rollback.
    RollbackKeepsLineage,
    /// A data key is dropped though something may be encrypted with it.
    DropKeyInUse,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 33] = [
        Self::NoSyncBeforeRecords,
        Self::SyncCoversWhatCameLater,
        Self::FlushBeforeRecords,
        Self::FuaAsPlainWrite,
        Self::SplitShortWrites,
        Self::JournalAfterAcknowledgement,
        Self::CommitOutOfOrder,
        Self::FreeBeforeCommit,
        Self::DirtyNotCountedDown,
        Self::ReclaimPinned,
        Self::TrustFailedFill,
        Self::KeptOfAnyChunk,
        Self::KeptWritesOfBefore,
        Self::DescribedForEver,
        Self::IgnoreGap,
        Self::LeaveWhatWasCut,
        Self::ForgetDoubt,
        Self::ReadInDoubt,
        Self::MergeStale,
        Self::IgnoreEpoch,
        Self::NoSeal,
        Self::HeadBeforeMap,
        Self::TrustShortRead,
        Self::CompactOverNewer,
        Self::DeleteBeforeTheHorizon,
        Self::SweepSnapshots,
        Self::CloneWithoutRecord,
        Self::DeleteClonedSnapshot,
        Self::DeleteClonedVolume,
        Self::PurgeEarly,
        Self::RollbackKeepsLog,
        Self::RollbackKeepsLineage,
        Self::DropKeyInUse,
    ];

    /// Whether the invariant is broken on this thread.
    #[cfg(not(all(feature = "mutations", debug_assertions)))]
    #[inline]
    #[must_use]
    pub const fn is_on(self) -> bool {
        false
    }

    /// Whether the invariant is broken on this thread.
    #[cfg(all(feature = "mutations", debug_assertions))]
    #[must_use]
    pub fn is_on(self) -> bool {
        ON.get() == Some(self)
    }

    /// Breaks one invariant, or none, on this thread.
    #[cfg(all(feature = "mutations", debug_assertions))]
    pub fn set(on: Option<Self>) {
        ON.set(on);
    }
}

#[cfg(all(feature = "mutations", debug_assertions))]
thread_local! {
    static ON: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}
