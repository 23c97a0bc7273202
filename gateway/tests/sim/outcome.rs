//! What a run came to, in numbers.

use std::fmt;

use super::counts::{Counts, counted};
use super::coverage::Coverage;
use super::faults::Fault;

counted! {
    /// How a volume's service ended, so that it had to be recovered.
    Crash {
        DaemonKilled: "the daemon was killed",
        PowerCut: "the host's power was cut",
        CacheLost: "the cache device was lost",
        TakenOver: "another host took the volume over",
    }
}

counted! {
    /// What came about in the life of volumes.
    Deed {
        Snapshot: "a snapshot was made",
        Unmade: "a snapshot was deleted",
        Cloned: "a clone was made",
        RolledBack: "a volume was rolled back",
        Gone: "a volume was purged",
        Compacted: "a volume was put in order",
        Flattened: "a clone was flattened",
        SnapshotRead: "the whole image of a snapshot was read",
        Rotated: "a volume was given a new data key",
        KeyDropped: "a data key was dropped",
    }
}

/// Also the sum of several runs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    pub digest: u64,
    pub runs: u64,
    pub writes: u64,
    /// Of daemons and hosts.
    pub crashes: u64,
    /// Histories of one volume: from the end of its service to its recovery, and the reading of its whole
    /// image, each sector of which was what it had to be.
    pub histories: Counts<Crash>,
    /// Recoveries whose image was not read to the end: the next crash, or a detach, came before.
    pub cut_short: u64,
    pub attaches: u64,
    pub readers: u64,
    pub store_requests: u64,
    pub simulated_ms: u64,
    pub faults: Counts<Fault>,
    pub deeds: Counts<Deed>,
    pub coverage: Coverage,
}

impl Outcome {
    /// Adds the counts of other runs.
    pub fn add(&mut self, other: &Self) {
        self.runs += other.runs;
        self.writes += other.writes;
        self.crashes += other.crashes;
        self.histories.add(&other.histories);
        self.cut_short += other.cut_short;
        self.attaches += other.attaches;
        self.readers += other.readers;
        self.store_requests += other.store_requests;
        self.simulated_ms += other.simulated_ms;
        self.faults.add(&other.faults);
        self.deeds.add(&other.deeds);
        self.coverage.add(&other.coverage);
    }

    /// All of it.
    pub fn table(&self) -> String {
        format!(
            "{self}\nhistories, by what began them\n{}  {:<56}{:>12}\nlife of volumes\n{}faults\n{}{}",
            self.histories,
            "(not counted: cut short)",
            self.cut_short,
            self.deeds,
            self.faults,
            self.coverage
        )
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} runs, {} histories, {} crashes, {} attaches, {} readers, {} writes in the end, {} store requests, {} simulated seconds",
            self.runs,
            self.histories.sum(),
            self.crashes,
            self.attaches,
            self.readers,
            self.writes,
            self.store_requests,
            self.simulated_ms / 1_000
        )
    }
}
