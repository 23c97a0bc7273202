//! What becomes of a volume beside its writes: snapshots, clones, rollbacks, the trash. Told by its heads
//! as they were stored, one after the other, each of which must follow upon the one before it.

use std::collections::{BTreeMap, BTreeSet};

use quarry_objfmt::head::Head;
use quarry_objfmt::{Deleted, Epoch};

use super::oracle::Point;

/// How long a volume stays in the trash: longer than anything that was sent can be on its way.
pub const GRACE_MS: u64 = 100_000;

/// Where a volume is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Stage {
    /// A clone that was begun.
    ToBe,
    #[default]
    There,
    InTrash {
        since_ms: u64,
    },
    /// It was being deleted for good, or is gone.
    Purging,
    Gone,
    /// A clone that was given up, and whose place was taken.
    Never,
}

/// A snapshot that was there once.
#[derive(Debug)]
pub struct Snap {
    pub at: Point,
    pub closing: bool,
    pub gone: bool,
}

#[derive(Debug, Default)]
pub struct Life {
    pub stage: Stage,
    /// The newest head.
    pub head: Option<Head>,
    /// Of a clone: the volume of its snapshot, and the snapshot.
    pub parent: Option<(usize, String)>,
    pub snaps: BTreeMap<String, Snap>,
    /// Snapshots that were asked for, each with the newest write that was acknowledged then.
    pub making: BTreeMap<String, u64>,
    /// Snapshots that somebody wanted to be deleted.
    pub unmaking: BTreeSet<String>,
    /// Rollbacks that were asked for: by which host, when, to which snapshot, and whether that came about.
    pub rollbacks: Vec<Rollback>,
    /// Of a clone: somebody wanted it to be flattened, and it is.
    pub flattening: bool,
    pub flattened: bool,
    /// How often it was rolled back.
    pub rolled_back: u32,
    /// It was in the trash once.
    pub was_deleted: bool,
    /// Of a clone: nobody knows of it yet.
    pub hidden: bool,
}

#[derive(Debug)]
pub struct Rollback {
    pub host: String,
    pub asked_ms: u64,
    pub snapshot: String,
    pub done: bool,
}

impl Life {
    /// Of a clone that is begun.
    pub fn of_clone(parent: usize, snapshot: &str) -> Self {
        Self {
            stage: Stage::ToBe,
            parent: Some((parent, snapshot.to_owned())),
            hidden: true,
            ..Self::default()
        }
    }

    /// Whether somebody may want to attach it.
    pub fn is_known(&self) -> bool {
        !self.hidden && !matches!(self.stage, Stage::ToBe | Stage::Gone | Stage::Never)
    }

    pub fn is_there(&self) -> bool {
        !self.hidden && self.stage == Stage::There
    }

    /// Whether its objects may be gone.
    pub const fn is_condemned(&self) -> bool {
        matches!(self.stage, Stage::Purging | Stage::Gone | Stage::Never)
    }

    /// Whether it is there, or in the trash.
    pub const fn is_needy(&self) -> bool {
        matches!(self.stage, Stage::There | Stage::InTrash { .. })
    }

    /// Whether it needs objects of volume `n`, or of a snapshot of that.
    pub fn needs(&self, n: usize, snapshot: Option<&str>) -> bool {
        let of = self.parent.as_ref();
        let ours = of.is_some_and(|of| of.0 == n && snapshot.is_none_or(|name| name == of.1));
        ours && self.is_needy() && !self.flattened
    }

    /// Whether a snapshot's objects may be gone, or are about to be.
    pub fn is_ending(&self, snapshot: &str) -> bool {
        let snap = self.snaps.get(snapshot);
        self.is_condemned() || snap.is_none_or(|snap| snap.closing || snap.gone)
    }

    /// Snapshots that are there.
    pub fn names(&self) -> Vec<String> {
        let there = self.snaps.iter().filter(|(_, snap)| !snap.gone);
        there.map(|(name, _)| name.clone()).collect()
    }

    /// Goes from the stage before to that of a head, and says whether that may be.
    pub fn goes_on(&mut self, head: &Head, now_ms: u64) -> Result<(), String> {
        let before = self.stage;
        self.stage = match (before, head.deleted()) {
            (Stage::ToBe, None) | (Stage::There, None) => Stage::There,
            // Nobody is to make it any more.
            (Stage::ToBe, Some(_)) if head.epoch == Epoch::ZERO => Stage::Never,
            // Or one that is gone, and whose record at its parent is not yet.
            (Stage::Never | Stage::Gone, Some(_)) if head.epoch == Epoch::ZERO => Stage::Never,
            (Stage::Never, Some(Deleted::Purging)) => Stage::Never,
            (Stage::There | Stage::InTrash { .. }, Some(Deleted::InTrash { since_ms })) => {
                Stage::InTrash { since_ms }
            }
            (Stage::InTrash { .. }, None) => Stage::There,
            (Stage::InTrash { since_ms }, Some(Deleted::Purging)) => {
                if now_ms < since_ms + GRACE_MS {
                    return Err(format!("it is purged after {} ms", now_ms - since_ms));
                }
                Stage::Purging
            }
            (Stage::Purging, Some(Deleted::Purging)) => Stage::Purging,
            (from, to) => return Err(format!("it goes from {from:?} to {to:?}")),
        };
        self.was_deleted |= head.deleted().is_some();
        let epoch = self.head.as_ref().map_or(0, |head| head.epoch.get());
        // What stands in for a head that cannot be read has none.
        let stands_in = head.epoch == Epoch::ZERO && self.stage == Stage::Purging;
        match head.epoch.get() < epoch && !stands_in {
            true => Err(format!(
                "its epoch goes back from {epoch} to {}",
                head.epoch
            )),
            false => Ok(()),
        }
    }
}
