//! Which part of the state machine a run came through: each kind of event in each state of a volume,
//! each kind of action, and the decisions that the code marks as [`Branch`].

use std::fmt;

use quarry_cache::Branch;
use quarry_volume::{Action, Event, IoError, Op, Report, Volume, VolumeState};

use super::counts::{Counted, Counts, counted};

counted! {
    /// What a volume is told.
    Told {
        Read: "Request: read",
        Write: "Request: write",
        WriteFua: "Request: write, FUA",
        Flush: "Request: flush",
        Discard: "Request: discard",
        WriteZeroes: "Request: write zeroes",
        WriteZeroesFua: "Request: write zeroes, FUA",
        Status: "Request: status",
        ReadDone: "IoDone: CacheRead",
        ReadFailed: "IoDone: CacheRead, failed",
        WriteDone: "IoDone: CacheWrite",
        WriteFailed: "IoDone: CacheWrite, failed",
        ZeroDone: "IoDone: ZeroFill",
        CopyDone: "IoDone: CopyToRequest",
        PageDone: "IoDone: WritePage",
        PageFailed: "IoDone: WritePage, failed",
        SyncDone: "IoDone: Sync",
        SyncFailed: "IoDone: Sync, failed",
        FillDone: "IoDone: FillWrite",
        FillFailed: "IoDone: FillWrite, failed",
        DirectDone: "IoDone: FetchDirect",
        DirectFailed: "IoDone: FetchDirect, failed",
        Fetched: "Fetched",
        FetchedDamaged: "Fetched, damaged",
        NodesLoaded: "NodesLoaded",
        NodesDamaged: "NodesLoaded, damaged",
        Uploaded: "Uploaded",
        Checkpointed: "Checkpointed",
        CheckpointFailed: "CheckpointFailed",
        CacheFailed: "CacheFailed",
        Remapped: "Remapped",
        Fenced: "Fenced",
        Tick: "Tick",
        DirectReads: "DirectReads",
        Drain: "Drain",
        DrainAndFold: "Drain, with a checkpoint",
        Grown: "Grown",
        Stop: "Stop",
        Warm: "Warm",
    }
}

counted! {
    /// What a volume is like when it is told.
    Mode {
        Serving: "serving",
        ReadOnly: "read-only",
        Fenced: "fenced",
        Failed: "failed",
        ServingStops: "serving+stop",
        ReadOnlyStops: "r-o+stop",
        FencedStops: "fenced+stop",
        FailedStops: "failed+stop",
    }
}

counted! {
    /// What a volume asks for.
    Asked {
        CacheRead: "CacheRead",
        CacheWrite: "CacheWrite",
        ZeroFill: "ZeroFill",
        CopyToRequest: "CopyToRequest",
        Status: "Status",
        WritePage: "WritePage",
        WritePageDurable: "WritePage, durable",
        Journal: "Journal",
        Sync: "Sync",
        FillWrite: "FillWrite",
        Fetch: "Fetch, foreground",
        FetchAhead: "Fetch, readahead",
        FetchDirect: "FetchDirect",
        LoadNodes: "LoadNodes, foreground",
        LoadNodesAhead: "LoadNodes, readahead",
        Upload: "Upload",
        Checkpoint: "Checkpoint",
        Folded: "Folded",
        Missed: "Missed",
        Waited: "Waited",
        WritesWait: "WritesWait",
        WritesGoOn: "WritesWait, no more",
        Complete: "Complete: done",
        CompleteInvalid: "Complete: invalid",
        CompleteReadOnly: "Complete: read-only",
        CompleteIo: "Complete: cannot be had or kept",
        CompleteShuttingDown: "Complete: being detached",
        Drained: "Drained, complete",
        DrainedIncomplete: "Drained, not complete",
        Warmed: "Warmed",
        ReportFenced: "Report: fenced",
        ReportCacheFailed: "Report: cache failed",
        ReportUnreadable: "Report: unreadable",
        ReportDamaged: "Report: damaged",
        ReportStalled: "Report: stalled",
        ReportGoesOn: "Report: goes on",
    }
}

/// How an I/O went that a driver was asked for.
pub fn io_told(action: &Action, failed: bool) -> Told {
    match (action, failed) {
        (Action::CacheRead { .. }, false) => Told::ReadDone,
        (Action::CacheRead { .. }, true) => Told::ReadFailed,
        (Action::CacheWrite { .. }, false) => Told::WriteDone,
        (Action::CacheWrite { .. }, true) => Told::WriteFailed,
        (Action::ZeroFill { .. }, false) => Told::ZeroDone,
        (Action::CopyToRequest { .. }, false) => Told::CopyDone,
        (Action::WritePage { .. }, false) => Told::PageDone,
        (Action::WritePage { .. }, true) => Told::PageFailed,
        (Action::Sync { .. }, false) => Told::SyncDone,
        (Action::Sync { .. }, true) => Told::SyncFailed,
        (Action::FillWrite { .. }, false) => Told::FillDone,
        (Action::FillWrite { .. }, true) => Told::FillFailed,
        (Action::FetchDirect { .. }, false) => Told::DirectDone,
        (Action::FetchDirect { .. }, true) => Told::DirectFailed,
        (other, _) => unreachable!("{other:?} is no I/O, or one of memory"),
    }
}

/// What an event is, but for the end of an I/O, of which it does not say what it was.
fn told(event: &Event) -> Option<Told> {
    Some(match event {
        Event::IoDone { .. } => return None,
        Event::Request(request) => match request.op {
            Op::Read => Told::Read,
            Op::Write { fua: false } => Told::Write,
            Op::Write { fua: true } => Told::WriteFua,
            Op::Flush => Told::Flush,
            Op::Discard => Told::Discard,
            Op::WriteZeroes { fua: false } => Told::WriteZeroes,
            Op::WriteZeroes { fua: true } => Told::WriteZeroesFua,
            Op::Status => Told::Status,
        },
        Event::Fetched { frames, .. } if frames.iter().all(Result::is_ok) => Told::Fetched,
        Event::Fetched { .. } => Told::FetchedDamaged,
        Event::NodesLoaded { result: Ok(_), .. } => Told::NodesLoaded,
        Event::NodesLoaded { result: Err(_), .. } => Told::NodesDamaged,
        Event::Uploaded { .. } => Told::Uploaded,
        Event::Checkpointed { .. } => Told::Checkpointed,
        Event::CheckpointFailed { .. } => Told::CheckpointFailed,
        Event::CacheFailed { .. } => Told::CacheFailed,
        Event::Remapped { .. } => Told::Remapped,
        Event::Fenced { .. } => Told::Fenced,
        Event::Tick { .. } => Told::Tick,
        Event::DirectReads(_) => Told::DirectReads,
        Event::Drain {
            checkpoint: false, ..
        } => Told::Drain,
        Event::Drain {
            checkpoint: true, ..
        } => Told::DrainAndFold,
        Event::Grown { .. } => Told::Grown,
        Event::Stop => Told::Stop,
        Event::Warm { .. } => Told::Warm,
    })
}

fn asked(action: &Action) -> Asked {
    match action {
        Action::CacheRead { .. } => Asked::CacheRead,
        Action::CacheWrite { .. } => Asked::CacheWrite,
        Action::ZeroFill { .. } => Asked::ZeroFill,
        Action::CopyToRequest { .. } => Asked::CopyToRequest,
        Action::Status { .. } => Asked::Status,
        Action::WritePage { durable: false, .. } => Asked::WritePage,
        Action::WritePage { durable: true, .. } => Asked::WritePageDurable,
        Action::Journal { .. } => Asked::Journal,
        Action::Sync { .. } => Asked::Sync,
        Action::FillWrite { .. } => Asked::FillWrite,
        Action::Fetch {
            foreground: true, ..
        } => Asked::Fetch,
        Action::Fetch {
            foreground: false, ..
        } => Asked::FetchAhead,
        Action::FetchDirect { .. } => Asked::FetchDirect,
        Action::LoadNodes {
            foreground: true, ..
        } => Asked::LoadNodes,
        Action::LoadNodes {
            foreground: false, ..
        } => Asked::LoadNodesAhead,
        Action::Upload(_) => Asked::Upload,
        Action::Checkpoint(_) => Asked::Checkpoint,
        Action::Folded(_) => Asked::Folded,
        Action::Missed { .. } => Asked::Missed,
        Action::Waited { .. } => Asked::Waited,
        Action::WritesWait(Some(_)) => Asked::WritesWait,
        Action::WritesWait(None) => Asked::WritesGoOn,
        Action::Complete { result, .. } => match result {
            Ok(()) => Asked::Complete,
            Err(IoError::Invalid) => Asked::CompleteInvalid,
            Err(IoError::ReadOnly) => Asked::CompleteReadOnly,
            Err(IoError::Io) => Asked::CompleteIo,
            Err(IoError::ShuttingDown) => Asked::CompleteShuttingDown,
        },
        Action::Drained { complete: true, .. } => Asked::Drained,
        Action::Drained {
            complete: false, ..
        } => Asked::DrainedIncomplete,
        Action::Warmed { .. } => Asked::Warmed,
        Action::Report(Report::Fenced { .. }) => Asked::ReportFenced,
        Action::Report(Report::CacheFailed { .. }) => Asked::ReportCacheFailed,
        Action::Report(Report::Unreadable { .. }) => Asked::ReportUnreadable,
        Action::Report(Report::Damaged { .. }) => Asked::ReportDamaged,
        Action::Report(Report::Stalled(true)) => Asked::ReportStalled,
        Action::Report(Report::Stalled(false)) => Asked::ReportGoesOn,
    }
}

const fn mode(state: &VolumeState, stops: bool) -> Mode {
    match (state, stops) {
        (VolumeState::Serving, false) => Mode::Serving,
        (VolumeState::ReadOnly, false) => Mode::ReadOnly,
        (VolumeState::Fenced { .. }, false) => Mode::Fenced,
        (VolumeState::Failed { .. }, false) => Mode::Failed,
        (VolumeState::Serving, true) => Mode::ServingStops,
        (VolumeState::ReadOnly, true) => Mode::ReadOnlyStops,
        (VolumeState::Fenced { .. }, true) => Mode::FencedStops,
        (VolumeState::Failed { .. }, true) => Mode::FailedStops,
    }
}

/// What was reached, and how often.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Coverage {
    /// For each mode.
    told: Vec<Counts<Told>>,
    asked: Counts<Asked>,
    /// As in [`Branch::ALL`].
    branches: Vec<u64>,
}

impl Default for Coverage {
    fn default() -> Self {
        Self {
            told: vec![Counts::default(); Mode::NAMES.len()],
            asked: Counts::default(),
            branches: vec![0; Branch::ALL.len()],
        }
    }
}

impl Coverage {
    /// A volume is about to be told `event`; of the end of an I/O, `io` says what it is.
    pub fn tells(&mut self, volume: &Volume, stopped: bool, event: &Event, io: Option<Told>) {
        let mode = mode(volume.state(), stopped);
        let kind = told(event).or(io).expect("whoever ends an I/O says which");
        self.told[mode.index()].note(kind);
    }

    pub fn asks(&mut self, action: &Action) {
        self.asked.note(asked(action));
    }

    /// Takes the decisions that were counted on this thread since this was called last.
    pub fn take_branches(&mut self) {
        for (sum, more) in self.branches.iter_mut().zip(Branch::take_counts()) {
            *sum += more;
        }
    }

    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.told.iter_mut().zip(&other.told) {
            sum.add(more);
        }
        self.asked.add(&other.asked);
        for (sum, more) in self.branches.iter_mut().zip(&other.branches) {
            *sum += more;
        }
    }

    /// Each event in any state, each action, each decision, and how often it was reached.
    fn rows(&self) -> Vec<(String, u64)> {
        let told = Told::ALL.iter().map(|told| {
            let seen = self.told.iter().map(|of_mode| of_mode.of(told.index()));
            (Told::NAMES[told.index()].to_owned(), seen.sum())
        });
        let actions = self
            .asked
            .named()
            .map(|(name, seen)| (name.to_owned(), seen));
        let branches = Branch::ALL.iter().zip(&self.branches);
        let branches = branches.map(|(branch, seen)| (format!("{branch:?}"), *seen));
        told.chain(actions).chain(branches).collect()
    }

    /// What was never reached, each with the reason if there is one.
    fn never(&self) -> Vec<(String, Option<&'static str>)> {
        let never = self.rows().into_iter().filter(|(_, seen)| *seen == 0);
        let why = |name: &str| UNREACHED.iter().find(|(never, _)| *never == name);
        let never = never.map(|(name, _)| {
            let why = why(&name).map(|(_, why)| *why);
            (name, why)
        });
        never.collect()
    }

    /// Everything must be reached but for what has a reason not to be; of few runs, but for what is seldom too.
    pub fn check(&self, of_many: bool) {
        // Only with debug assertions are decisions counted.
        if !cfg!(debug_assertions) {
            return;
        }
        let is_owed = |name: &str| of_many || !SELDOM.contains(&name);
        let never = self.never().into_iter().filter(|(_, why)| why.is_none());
        let never = never
            .filter(|(name, _)| is_owed(name))
            .map(|(name, _)| name);
        assert_eq!(
            never.collect::<Vec<_>>(),
            Vec::<String>::new(),
            "never reached"
        );
    }

    /// Events that never came in a state, each with the reason.
    fn unseen(&self) -> Vec<(String, &'static str)> {
        let mut unseen = Vec::new();
        for told in Told::ALL {
            for mode in Mode::ALL {
                let seen = self.told[mode.index()].of(told.index());
                match cannot(*told, *mode) {
                    Some(why) => {
                        let name = Told::NAMES[told.index()];
                        assert_eq!(seen, 0, "{name} while {mode:?}: {why}");
                    }
                    None if seen == 0 => unseen.push((
                        format!(
                            "{} while {}",
                            Told::NAMES[told.index()],
                            Mode::NAMES[mode.index()]
                        ),
                        unlikely(*mode),
                    )),
                    None => {}
                }
            }
        }
        unseen
    }
}

/// Why an event cannot come in a state, whatever happens.
const fn cannot(told: Told, mode: Mode) -> Option<&'static str> {
    let reads_only = matches!(mode, Mode::ReadOnly | Mode::ReadOnlyStops);
    let stops = matches!(
        mode,
        Mode::ServingStops | Mode::ReadOnlyStops | Mode::FencedStops | Mode::FailedStops
    );
    match told {
        Told::WriteDone
        | Told::WriteFailed
        | Told::PageDone
        | Told::PageFailed
        | Told::SyncDone
        | Told::SyncFailed
        | Told::Uploaded
        | Told::Checkpointed
        | Told::CheckpointFailed
        | Told::Remapped
        | Told::Fenced
            if reads_only =>
        {
            Some("a reader writes nothing")
        }
        Told::Drain | Told::DrainAndFold | Told::Grown if reads_only => {
            Some("the engine neither drains nor grows a reader")
        }
        Told::Fetched
        | Told::FetchedDamaged
        | Told::NodesLoaded
        | Told::NodesDamaged
        | Told::FillDone
        | Told::FillFailed
        | Told::Tick
            if matches!(mode, Mode::ReadOnlyStops) =>
        {
            Some("a reader that is stopped is taken apart at once")
        }
        Told::ReadDone
        | Told::ReadFailed
        | Told::WriteDone
        | Told::WriteFailed
        | Told::ZeroDone
        | Told::CopyDone
        | Told::DirectDone
        | Told::DirectFailed
            if stops =>
        {
            Some("a volume is stopped when no request is in flight")
        }
        Told::DirectReads if !matches!(mode, Mode::Serving | Mode::ReadOnly) => {
            Some("said at once after the attach")
        }
        Told::Stop if stops => Some("said once"),
        Told::Drain | Told::Grown if stops => {
            Some("the engine does one thing to a volume at a time")
        }
        Told::ReadFailed | Told::FillFailed if reads_only => {
            Some("the devices of readers elsewhere are sound")
        }
        _ => None,
    }
}

/// Why an event did not come in a state in which it can.
const fn unlikely(mode: Mode) -> &'static str {
    match mode {
        Mode::ServingStops | Mode::FencedStops | Mode::FailedStops => {
            "little is under way between the stop and the end of the drain"
        }
        _ => "takes two failures at one moment",
    }
}

/// What runs do not reach, or by luck only, and why.
const UNREACHED: &[(&str, &str)] = &[
    ("UnsentFull", "takes a million writes"),
    ("LogFull", "takes four million entries"),
    (
        "JournalWithoutRoom",
        "room for each record is set aside when its write is placed; `cache/src/recover.rs` tests it",
    ),
    (
        "FlushRefused",
        "a write's last piece arrives while the volume serves, or fails the write",
    ),
    (
        "RoundWithoutPages",
        "takes as many pieces in flight as the journal has entries",
    ),
    (
        "HeaderLonger",
        "takes a header of 64 KiB, or a damaged length: `scenarios.rs` has that",
    ),
    (
        "HeadOfBefore",
        "takes a growth given up after 20 s that happens later; `backend/head.rs` tests it",
    ),
    (
        "SnapshotThere",
        "takes a snapshot given up that happens later, and is asked for again in between",
    ),
    (
        "SnapshotCopyLeft",
        "nobody here deletes a snapshot that is gone: `snapshot_schedules.rs` does",
    ),
    (
        "CloneFoundGivenUp",
        "takes a clone that is given up while it is being made: `snapshot_schedules.rs` has that",
    ),
    (
        "RolledBackUncounted",
        "takes a usage that is damaged, or of a head of version 1",
    ),
    (
        "DeletionUndone",
        "takes a clone made between two looks for clones, some requests apart",
    ),
    (
        "RestoringGoesOn",
        "nobody here restores what is not in the trash: `trash/tests.rs` does",
    ),
    (
        "PurgeFindsRestored",
        "nobody here purges what is not in the trash: `trash/tests.rs` does",
    ),
];

/// What many runs reach, and a few need not.
const SELDOM: &[&str] = &[
    "Fetched, damaged",
    "NodesLoaded, damaged",
    "CheckpointFailed",
    "CacheFailed",
    // A sync failed, and its daemon was told before it died.
    "ReadInDoubt",
    "ReadDoubted",
    "DoubtRefused",
    "DoubtGivenUp",
    "CutByWrites",
    "Report: damaged",
    "SegmentBusy",
    "FillRefused",
    "JournalFull",
    "SealBeaten",
    "ArrivedFenced",
    "HeaderFailed",
    // Of families, which are few among few runs.
    "Warm",
    "Warmed",
    "SnapshotCopyThere",
    "SnapshotMoved",
    "SnapshotClosing",
    "SnapshotReopened",
    "CloneRefused",
    "CloneThere",
    "CloneGivenUp",
    "CloneTakenBack",
    "DeletionGoesOn",
    "TrashRecordRenewed",
    "RestoredMeanwhile",
    "PurgeGoesOn",
    "PurgeHeadless",
];

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "events, by the volume's state\n  {:<28}", "")?;
        for mode in Mode::NAMES {
            write!(f, "{mode:>13}")?;
        }
        writeln!(f)?;
        for (n, name) in Told::NAMES.iter().enumerate() {
            write!(f, "  {name:<28}")?;
            for of_mode in &self.told {
                write!(f, "{:>13}", of_mode.of(n))?;
            }
            writeln!(f)?;
        }
        write!(f, "actions\n{}decisions\n", self.asked)?;
        for (branch, seen) in Branch::ALL.iter().zip(&self.branches) {
            writeln!(f, "  {:<56}{seen:>12}", format!("{branch:?}"))?;
        }
        writeln!(f, "never reached")?;
        for (name, why) in self.never() {
            writeln!(f, "  {name}: {}", why.unwrap_or("it should be"))?;
        }
        for (name, why) in self.unseen() {
            writeln!(f, "  {name}: {why}")?;
        }
        Ok(())
    }
}
