//! Makes a lost or damaged head anew from the volume's other objects.
//!
//! Owns: finding the newest consistent state, and the order in which it becomes the volume's. Does not
//! own: whether a state is sound ([`crate::verify`] is asked).
//!
//! A state is a map and the chunks after it. Where its log goes on is told by the map's usage. A map whose usage is damaged is
//! passed over: of the chunks that are folded into it some are deleted, so a log that is taken up among them ends at the hole,
//! and what lies before the hole would be laid over the newer data of the map.
//!
//! Maps without a usage are of times when no chunk was deleted. Then any place will do that is not too late: chunks that
//! are folded into a map already give, replayed in order, what is there. So the log is taken from behind the newest chunk that
//! the map names, of which there may be chunks of zeroes alone that the map holds too; or from the first chunk, if no map is
//! whole. A map holds all of the log of epochs before its own, for a checkpoint folds all that its attach found (and a rollback
//! leaves it behind): so the log begins no earlier than where the map's epoch began.
//!
//! The log is followed by its seals: a chunk behind a seal was never the volume's. Behind a seal the
//! lowest epoch from the sealing one on goes on that has anything at that place: an attach that sealed and
//! died before it recorded its range never wrote. Numbers of writes must go on without a gap.
//!
//! A map that a writer stored without moving the head to it is as good as others: it holds chunks that
//! were in the log by then; if a later epoch has given its number again, it is not needed. One of a rollback that was broken
//! off is not, and is told by the place before its log, which a rollback leaves empty. One that names chunks that a later
//! epoch has in other words is passed over.
//!
//! Size, logical block, durability, compression and retention are in a map's usage too, and must be given only without
//! one. The head gets an epoch [`EPOCH_MARGIN`] above all found. Its lineage is lost: writes that a cache had not sent are
//! then only given up with `--discard-unsent`. A writer that attached after another attach had died half-way, and wrote
//! nothing since, left no trace outside the head: so all hosts are to be stopped first.
//!
//! A clone's map names objects of the volumes that it comes from; what it was cloned from is told by its record there.
//! Snapshots come back from their copies, those that are whole, also of a later map than the one that was found. An encrypted
//! volume's keys come back from all of their copies that are whole, each as the newest has it: one that no head came to name
//! may lack some (`crate::keys::rotate`).
//!
//! The order of making it so, and what a crash between the steps leaves:
//! 1. Seal the log's end, for an epoch far above all that were found. *Crash: the seal stays, and
//!    the next rescue finds the same end.* A chunk that is there instead means that somebody writes: refused.
//! 2. The head, create-only or where the damaged one was seen. *Crash: the volume is there, by its id.*
//! 3. The name, if it is lost. *Crash before: as after step 2; the next rescue finds a sound head, and
//!    the name is still to be made.*

mod log;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use quarry_objfmt::chunk::{ChunkHeader, encode_seal, is_encrypted};
use quarry_objfmt::error::FormatError;
use quarry_objfmt::head::{Head, LogRange, Parent, RootRef, SNAPSHOTS_MAX, SnapshotRef};
use quarry_objfmt::map::{Basis, Manifest, MapObjectId};
use quarry_objfmt::{
    ChunkId, ChunkSeq, Encryption, Epoch, KeysCopy, MapSeq, Sectors, SnapName, Snapshot,
    VOLUME_SECTORS_MAX, VolumeId, WrappedKeys, WriteSeq, keys,
};

use self::log::{Followed, Start, follow};
use crate::backend::open::{Entry, log_place};
use crate::backend::{DAMAGE_RETRIES_MAX, MapEnd, named, told};
use crate::clones::{self, Fate};
use crate::control::{Finding, LogRangeInfo, RescueReport, RescueSpec, VolumeRef};
use crate::store::{Store, StoreError, Tag, each_key};
use crate::trash::TrashError;
use crate::verify;

/// How far the new epoch is above all that were found: an attach that wrote nothing left no trace of
/// its epoch but in the head.
const EPOCH_MARGIN: u32 = 256;

/// Chunks looked at to find out whether a volume is encrypted: most have data.
const CHUNKS_LOOKED_AT_MAX: usize = 16;

/// Maps passed over that are listed.
const PASSED_OVER_MAX: usize = 100;

/// Why a head cannot be made anew.
#[derive(Debug, thiserror::Error)]
pub enum RescueError {
    /// There is nothing to mend.
    #[error("the head of the volume is sound")]
    Sound,
    /// A newer build wrote it.
    #[error("the head of the volume is not damaged but of a later version: {0}")]
    Newer(FormatError),
    /// No chunk and no map.
    #[error("the store has no chunk of the volume")]
    Nothing,
    /// No state is whole.
    #[error("no state of the volume is whole; the newest is not for {object}: {problem}")]
    NotWhole {
        /// The object.
        object: String,
        /// What is wrong with it.
        problem: String,
    },
    /// It is encrypted, and no copy of its keys is whole.
    #[error(
        "the volume is encrypted, and no copy of its keys is whole; the newest is {object}: {problem}"
    )]
    Keys {
        /// The object.
        object: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The last epoch is used up.
    #[error("the objects of the volume are of the last epochs that there are")]
    Epochs,
    /// What the head alone said was not given.
    #[error("no object but the lost head says all about the volume: {} missing", .flags.join(", "))]
    Needs {
        /// The flags.
        flags: Vec<String>,
    },
    /// What was given cannot be.
    #[error("the volume has at least {min} bytes, in whole sectors of {sector_size}")]
    Size {
        /// Bytes that are written to.
        min: u64,
        /// Its logical block.
        sector_size: u32,
    },
    /// A clone was made of a snapshot that is not whole, or not there.
    #[error(
        "{clone} was cloned from snapshot {snapshot}, which the new head would not have: what only that keeps would be deleted"
    )]
    Clone {
        /// The snapshot.
        snapshot: String,
        /// The clone, or why it cannot be told.
        clone: String,
    },
    /// Somebody writes to the volume, or makes its head anew too.
    #[error("{object} was written just now")]
    Raced {
        /// The object.
        object: String,
    },
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The objects of the volume, by their keys.
#[derive(Debug, Default)]
struct Listed {
    /// Chunks of the log, and seals.
    chunks: BTreeMap<Epoch, BTreeSet<u64>>,
    /// Chunks of compaction.
    compacted: BTreeSet<(Epoch, u64)>,
    /// Map objects.
    maps: BTreeSet<(Epoch, MapSeq)>,
    /// Copies of snapshots.
    snapshots: Vec<SnapName>,
    /// Copies of its keys.
    keys: BTreeSet<u32>,
}

impl Listed {
    async fn read(store: &dyn Store, volume: &VolumeRef, id: VolumeId) -> Result<Self, StoreError> {
        let prefix = keys::volume_prefix(&volume.tenant, id);
        let mut listed = Self::default();
        each_key(store, &prefix, |key| listed.take(&key[prefix.len()..])).await?;
        Ok(listed)
    }

    /// Takes in what a key names, which is without the volume's prefix here.
    fn take(&mut self, key: &str) {
        let mut parts = key.split('/');
        let (kind, epoch, seq) = (parts.next(), parts.next(), parts.next());
        if let (Some("snap"), Some(Ok(name)), None) = (kind, epoch.map(SnapName::new), seq) {
            self.snapshots.push(name);
            return;
        }
        if let (Some("keys"), Some(revision), None) = (kind, hex(epoch, 8), seq) {
            self.keys.extend(u32::try_from(revision));
            return;
        }
        let (Some(epoch), Some(seq), None) = (hex(epoch, 8), hex(seq, 16), parts.next()) else {
            return;
        };
        let Ok(epoch) = u32::try_from(epoch).map(Epoch::new) else {
            return;
        };
        // Numbers that nothing can follow upon are nobody's.
        if seq == u64::MAX || (kind == Some("map") && MapSeq::new(seq) >= MapSeq::MAX) {
            return;
        }
        match kind {
            Some("chunk") if ChunkSeq::new(seq).is_compacted() => {
                self.compacted.insert((epoch, seq));
            }
            Some("chunk") => {
                self.chunks.entry(epoch).or_default().insert(seq);
            }
            Some("map") => {
                self.maps.insert((epoch, MapSeq::new(seq)));
            }
            _ => {}
        }
    }

    /// Whether a chunk is there and, of the log, no later epoch began at or before its place.
    fn can_be(&self, chunk: ChunkId) -> bool {
        if chunk.seq.is_compacted() {
            return self.compacted.contains(&(chunk.epoch, chunk.seq.get()));
        }
        let there = self.chunks.get(&chunk.epoch);
        let later = (
            std::ops::Bound::Excluded(chunk.epoch),
            std::ops::Bound::Unbounded,
        );
        let begun = |seqs: &BTreeSet<u64>| seqs.first().is_some_and(|s| *s <= chunk.seq.get());
        there.is_some_and(|seqs| seqs.contains(&chunk.seq.get()))
            && !self.chunks.range(later).any(|(_, seqs)| begun(seqs))
    }

    fn epoch_max(&self) -> Epoch {
        let chunks = self.chunks.keys().next_back().copied();
        let maps = self.maps.last().map(|(epoch, _)| *epoch);
        chunks.max(maps).unwrap_or(Epoch::ZERO)
    }
}

/// A number of so many hexadecimal digits, lower case.
fn hex(text: Option<&str>, digits: usize) -> Option<u64> {
    let text = text.filter(|text| text.len() == digits)?;
    let is_hex = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    is_hex.then(|| u64::from_str_radix(text, 16).ok())?
}

/// A state that the volume can have.
struct Candidate {
    root: Option<RootRef>,
    root_write: WriteSeq,
    frame_sectors: u32,
    size_min: Sectors,
    followed: Followed,
    /// What it was cloned from, if its map needs that.
    parent: Option<Parent>,
    /// What the map says of the volume, and where its log goes on.
    basis: Option<Basis>,
}

impl Candidate {
    /// What was given, and for what was not what the map says.
    fn with_basis(&self, spec: &RescueSpec) -> RescueSpec {
        let mut spec = spec.clone();
        if let Some(basis) = &self.basis {
            spec.size_bytes = spec.size_bytes.or(Some(self.size_min.bytes()));
            spec.sector_size = spec.sector_size.or(Some(basis.sector_size));
            spec.durability = spec.durability.or(Some(basis.durability));
            spec.compression = spec.compression.or(Some(basis.compression));
        }
        spec
    }
}

/// What stands in the head's place.
enum Lost {
    Missing,
    Damaged(Tag, FormatError),
}

/// Makes a head anew, or says what it would be.
///
/// # Errors
/// [`RescueError`]; nothing was changed then but the log's end sealed, and clones given up that never came to be.
pub async fn run(
    store: Arc<dyn Store>,
    volume: &VolumeRef,
    id: VolumeId,
    spec: &RescueSpec,
    host: &str,
    now_ms: u64,
) -> Result<RescueReport, RescueError> {
    let head_key = keys::head_key(&volume.tenant, id);
    let lost = lost(&*store, &head_key, id).await?;
    let listed = Listed::read(&*store, volume, id).await?;
    if listed.chunks.is_empty() && listed.maps.is_empty() {
        return Err(RescueError::Nothing);
    }
    let rescue = Rescue {
        store,
        volume: volume.clone(),
        id,
        listed,
    };
    let mut passed_over = Vec::new();
    let found = rescue.newest(spec, &mut passed_over).await?;
    let epoch = rescue.listed.epoch_max().max(found.followed.epoch_max);
    let epoch = epoch.get().checked_add(EPOCH_MARGIN).map(Epoch::new);
    let epoch = epoch.filter(|epoch| *epoch < Epoch::MAX);
    let epoch = epoch.ok_or(RescueError::Epochs)?;
    let mut report = rescue.report(&found, epoch, passed_over);
    report.lost = match &lost {
        Lost::Missing => "it is missing".to_owned(),
        Lost::Damaged(_, error) => error.to_string(),
    };
    let spec = &found.with_basis(spec);
    report.needs = needs(spec);
    let snapshots = rescue.snapshots(&found, &mut report.passed_over).await?;
    report.snapshots = snapshots.iter().map(|s| s.name.clone()).collect();
    let keys = rescue.keys(&mut report.passed_over).await?;
    report.keys = keys.keys.len() as u64;
    if !spec.apply {
        return Ok(report);
    }
    rescue.no_clone_is_left(&snapshots, now_ms).await?;
    let mut head = rescue.head(&found, spec)?;
    head.epoch = epoch;
    head.snapshots = snapshots;
    // What this map's lists call dead, a rollback behind it may have made alive again, for a snapshot that is kept. Without
    // lists nothing of before is deleted that somebody may need.
    let newest = head
        .snapshots
        .iter()
        .filter_map(|kept| kept.root)
        .max_by_key(|root| root.seq);
    if let Some(root) = &mut head.root
        && newest.is_some_and(|newest| newest.seq > root.seq)
    {
        root.usage = None;
    }
    if !keys.keys.is_empty() {
        head.encryption = Encryption::Aes256Gcm;
        head.keys = keys;
    }
    head.created_ms = now_ms;
    for range in &mut head.log {
        range.end = range.end.or(Some(found.followed.end));
    }
    // Step 1.
    rescue.seal(&found.followed, epoch, host).await?;
    // Step 2.
    let bytes = Bytes::from(head.encode());
    let written = match &lost {
        Lost::Missing => rescue.store.create(&head_key, bytes.clone()).await,
        Lost::Damaged(tag, _) => rescue.store.replace(&head_key, bytes.clone(), tag).await,
    };
    match written {
        Ok(_) => {}
        Err(StoreError::Exists { .. } | StoreError::Changed { .. }) => {
            // Our own PUT, whose answer was lost, or another's.
            let (now, _) = rescue.store.get(&head_key).await?;
            if now != bytes {
                return Err(RescueError::Raced { object: head_key });
            }
        }
        Err(error) => return Err(error.into()),
    }
    report.applied = true;
    Ok(report)
}

/// What is wrong with the head.
async fn lost(store: &dyn Store, key: &str, id: VolumeId) -> Result<Lost, RescueError> {
    let mut tries = 0;
    loop {
        let (bytes, tag) = match store.get(key).await {
            Ok(found) => found,
            Err(StoreError::NotFound { .. }) => return Ok(Lost::Missing),
            Err(error) => return Err(error.into()),
        };
        let error = match Head::decode(&bytes) {
            Ok(head) if head.volume == id => return Err(RescueError::Sound),
            Ok(_) => FormatError::Misplaced {
                what: "head",
                field: "volume",
            },
            Err(error @ FormatError::Version { .. }) => return Err(RescueError::Newer(error)),
            Err(error) => error,
        };
        // The damage may have happened on the way.
        if tries == DAMAGE_RETRIES_MAX {
            return Ok(Lost::Damaged(tag, error));
        }
        tries += 1;
    }
}

/// The flags that are missing.
fn needs(spec: &RescueSpec) -> Vec<String> {
    let all = [
        (spec.size_bytes.is_some(), "--size"),
        (spec.sector_size.is_some(), "--sector-size"),
        (spec.durability.is_some(), "--durability"),
        (spec.compression.is_some(), "--compression"),
    ];
    let missing = all.iter().filter(|(given, _)| !given);
    missing.map(|(_, flag)| (*flag).to_owned()).collect()
}

struct Rescue {
    store: Arc<dyn Store>,
    volume: VolumeRef,
    id: VolumeId,
    listed: Listed,
}

impl Rescue {
    /// The newest state that is whole. Which maps it cannot start from goes to `passed_over`.
    async fn newest(
        &self,
        spec: &RescueSpec,
        passed_over: &mut Vec<Finding>,
    ) -> Result<Candidate, RescueError> {
        let mut newest: Option<Finding> = None;
        let maps = named(&self.listed.maps);
        let maps = maps.iter().rev().map(|map| Some(*map));
        for map in maps.chain([None]) {
            let object = match map {
                Some((epoch, seq)) => keys::map_key(&self.volume.tenant, self.id, epoch, seq),
                None => format!(
                    "{}chunk/",
                    keys::volume_prefix(&self.volume.tenant, self.id)
                ),
            };
            let problem = match self.candidate(map).await? {
                Ok(None) => continue,
                Ok(Some(candidate)) => match self.whole(&candidate, spec).await? {
                    None => return Ok(candidate),
                    Some(finding) => format!("{}: {}", finding.object, finding.problem),
                },
                Err(problem) => problem,
            };
            let finding = Finding {
                object,
                problem,
                ..Finding::default()
            };
            newest.get_or_insert_with(|| finding.clone());
            if passed_over.len() < PASSED_OVER_MAX {
                passed_over.push(finding);
            }
        }
        let Finding {
            object, problem, ..
        } = newest.unwrap_or_default();
        Err(RescueError::NotWhole { object, problem })
    }

    /// Whether a head named the map of this epoch, if it is of a rollback: then the place before its log stays empty.
    fn went_back(&self, epoch: Epoch, basis: &Basis) -> bool {
        let empty = basis.log_end.get().checked_sub(1);
        let mut since = self.listed.chunks.range(epoch..);
        let is_empty = |at: u64| !since.any(|(_, there)| there.contains(&at));
        !basis.is_back || empty.is_none_or(is_empty)
    }

    /// The state that starts from a map object, or from no map; none if the object has no manifest.
    async fn candidate(
        &self,
        map: Option<(Epoch, MapSeq)>,
    ) -> Result<Result<Option<Candidate>, String>, RescueError> {
        let mut newest: Option<ChunkId> = None;
        let mut size_min = Sectors::ZERO;
        let (mut root, mut basis) = (None, None);
        let mut foreign_volumes = BTreeSet::new();
        if let Some((epoch, seq)) = map {
            let (found, manifest, known) = match self.manifest(epoch, seq).await? {
                Ok(Some(found)) => found,
                Ok(None) => return Ok(Ok(None)),
                Err(problem) => return Ok(Err(problem)),
            };
            if let Some(basis) = known.filter(|basis| !self.went_back(epoch, basis)) {
                return Ok(Err(format!(
                    "it is of a rollback that was broken off: the log went on before chunk {}",
                    basis.log_end
                )));
            }
            (root, basis) = (Some(found), known);
            // What lies behind the end of one that was shrunk reads as zeroes, and is no reason for a size.
            let tables = || manifest.runs.iter().flatten();
            let end = tables().map(|table| table.end.get()).max().unwrap_or(0);
            size_min = known.map_or(Sectors::new(end), |basis| basis.size);
            let of_tables = tables().map(|table| table.object.volume);
            foreign_volumes.extend(of_tables.filter(|volume| *volume != self.id));
            let mut foreign = None;
            let head = self.template(root, Vec::new());
            let each = |chunk: ChunkId| {
                if chunk.volume != self.id {
                    foreign_volumes.insert(chunk.volume);
                } else if !self.listed.can_be(chunk) {
                    foreign.get_or_insert(chunk);
                }
                let of_log = chunk.volume == self.id && chunk.seq < ChunkSeq::COMPACTED;
                if of_log && newest.is_none_or(|n| n.seq < chunk.seq) {
                    newest = Some(chunk);
                }
            };
            let store = Arc::clone(&self.store);
            if let Some(problem) = verify::walk_map(store, &self.volume, head, each).await? {
                return Ok(Err(problem));
            }
            if let Some(chunk) = foreign {
                let key = keys::chunk_key(&self.volume.tenant, chunk);
                return Ok(Err(format!(
                    "it names {key}, which is missing or not of the log"
                )));
            }
        }
        let start = match (map, basis) {
            (Some((epoch, _)), Some(basis)) => Start::Basis(epoch, basis),
            (Some((epoch, _)), None) => Start::Newest(newest, self.begun(epoch).await?),
            (None, _) => Start::Newest(None, None),
        };
        let followed = follow(&*self.store, &self.volume, self.id, &self.listed, start);
        let followed = match followed.await? {
            Ok(followed) => followed,
            Err(problem) => return Ok(Err(problem)),
        };
        let size_min = size_min.max(followed.size_min);
        let mut parent = None;
        if let Some(volume) = foreign_volumes.first() {
            parent = self.parent(&foreign_volumes).await?;
            if parent.is_none() {
                return Ok(Err(format!(
                    "it names objects of volume {volume}, and no record says that it was cloned from that"
                )));
            }
        }
        Ok(Ok(Some(Candidate {
            parent,
            basis,
            root,
            root_write: followed.root_write,
            frame_sectors: followed.frame_sectors,
            size_min,
            followed,
        })))
    }

    /// Where the log of an epoch began, if that can be told: at its first object, or, if it wrote nothing,
    /// where its attach sealed the log before it.
    async fn begun(&self, epoch: Epoch) -> Result<Option<ChunkId>, StoreError> {
        let id = |epoch, seq| ChunkId {
            volume: self.id,
            epoch,
            seq: ChunkSeq::new(seq),
        };
        let own = self.listed.chunks.get(&epoch);
        if let Some(first) = own.and_then(BTreeSet::first) {
            return Ok(Some(id(epoch, *first)));
        }
        for (before, seqs) in self.listed.chunks.range(..epoch).rev() {
            let of_log = seqs.range(..ChunkSeq::COMPACTED.get()).next_back();
            let Some(last) = of_log else { continue };
            let at = id(*before, *last);
            let place = log_place(&*self.store, &self.volume.tenant, at).await?;
            if let Ok(Some(Entry::Seal(seal))) = place
                && seal.by == epoch
            {
                return Ok(Some(id(epoch, *last)));
            }
        }
        Ok(None)
    }

    /// What is wrong with a state.
    async fn whole(
        &self,
        candidate: &Candidate,
        spec: &RescueSpec,
    ) -> Result<Option<Finding>, StoreError> {
        let followed = &candidate.followed;
        let mut head = self.template(candidate.root, followed.log.clone());
        // What lies at the end and is no chunk of it is left out, though it is no seal.
        let mut left_out = None;
        if let Some(last) = head.log.last_mut().filter(|_| followed.blocked) {
            last.end = Some(followed.end);
            let id = ChunkId {
                volume: self.id,
                epoch: last.epoch,
                seq: followed.end,
            };
            left_out = Some(keys::chunk_key(&self.volume.tenant, id));
        }
        head.root_write = candidate.root_write;
        head.frame_sectors = candidate.frame_sectors;
        head.parent.clone_from(&candidate.parent);
        // Too small a size is refused in its own words.
        let given = spec.size_bytes.and_then(Sectors::from_bytes);
        head.size = given.unwrap_or(head.size).max(candidate.size_min);
        let store = Arc::clone(&self.store);
        let report = verify::check_head(store, &self.volume, head).await?;
        let mut findings = report.findings.into_iter();
        Ok(findings.find(|finding| Some(&finding.object) != left_out.as_ref()))
    }

    /// The snapshot that the volume was cloned from, by its record: looked for at the volumes that its map
    /// names, and at their clones, and so on.
    async fn parent(&self, named: &BTreeSet<VolumeId>) -> Result<Option<Parent>, StoreError> {
        let mut seen = named.clone();
        let mut next: Vec<VolumeId> = named.iter().copied().collect();
        while let Some(volume) = next.pop() {
            let prefix = format!("{}clone/", keys::volume_prefix(&self.volume.tenant, volume));
            for key in self.store.list(&prefix).await? {
                let Some((snapshot, clone)) = key[prefix.len()..].split_once('/') else {
                    continue;
                };
                let (Ok(snapshot), Ok(clone)) = (SnapName::new(snapshot), VolumeId::parse(clone))
                else {
                    continue;
                };
                if clone == self.id {
                    let snapshot = snapshot.to_string();
                    return Ok(Some(Parent { volume, snapshot }));
                }
                if seen.insert(clone) {
                    next.push(clone);
                }
            }
        }
        Ok(None)
    }

    /// The volume's keys, by all copies that are whole, with the number of the newest of all; none if it is
    /// not encrypted. Those that are damaged go to `passed_over`.
    async fn keys(&self, passed_over: &mut Vec<Finding>) -> Result<WrappedKeys, RescueError> {
        let mut newest: Option<(String, String)> = None;
        let mut found: Option<WrappedKeys> = None;
        for revision in self.listed.keys.iter().rev() {
            let object = keys::keys_key(&self.volume.tenant, self.id, *revision);
            let problem = match self.store.get(&object).await {
                Ok((bytes, _)) => match KeysCopy::decode(&bytes, self.id) {
                    Ok(copy) => {
                        found.get_or_insert_default().add_missing(copy.keys.keys);
                        continue;
                    }
                    Err(error) => error.to_string(),
                },
                Err(error @ (StoreError::NotFound { .. } | StoreError::Invalid { .. })) => {
                    error.to_string()
                }
                Err(error) => return Err(error.into()),
            };
            if passed_over.len() < PASSED_OVER_MAX {
                passed_over.push(Finding {
                    object: object.clone(),
                    problem: problem.clone(),
                    ..Finding::default()
                });
            }
            newest.get_or_insert((object, problem));
        }
        if let Some(keys) = found {
            let revision = self.listed.keys.last().copied().unwrap_or_default();
            return Ok(WrappedKeys { revision, ..keys });
        }
        match newest {
            None => match self.encrypted_chunk().await? {
                None => Ok(WrappedKeys::default()),
                // Without its keys what is written from now on would be in the clear.
                Some(object) => Err(RescueError::Keys {
                    object,
                    problem: "it is encrypted, and there is no copy of the keys at all".to_owned(),
                }),
            },
            Some((object, problem)) => Err(RescueError::Keys { object, problem }),
        }
    }

    /// An encrypted chunk of the volume's own, if the newest that has data is one.
    async fn encrypted_chunk(&self) -> Result<Option<String>, StoreError> {
        let log = self.listed.chunks.iter().rev();
        let log = log.flat_map(|(epoch, seqs)| seqs.iter().rev().map(|seq| (*epoch, *seq)));
        let compacted = self.listed.compacted.iter().rev().copied();
        let looked_at = log.chain(compacted).take(CHUNKS_LOOKED_AT_MAX);
        let looked_at: Vec<(Epoch, u64)> = looked_at.collect();
        for (epoch, seq) in looked_at {
            let chunk = ChunkId {
                volume: self.id,
                epoch,
                seq: ChunkSeq::new(seq),
            };
            let object = keys::chunk_key(&self.volume.tenant, chunk);
            let bytes = match self.store.get(&object).await {
                Ok((bytes, _)) => bytes,
                Err(StoreError::NotFound { .. } | StoreError::Invalid { .. }) => continue,
                Err(error) => return Err(error),
            };
            // A seal, a damaged one, or one of zeroes alone says nothing.
            let Ok(header) = ChunkHeader::decode(&bytes, chunk) else {
                continue;
            };
            let first = header
                .frames
                .first()
                .map(|frame| frame.stored_offset as usize);
            if let Some(frame) = first.and_then(|at| bytes.get(at..)) {
                return Ok(is_encrypted(frame).then_some(object));
            }
        }
        Ok(None)
    }

    /// The snapshots that are whole, by their copies; the others go to `passed_over`.
    async fn snapshots(
        &self,
        found: &Candidate,
        passed_over: &mut Vec<Finding>,
    ) -> Result<Vec<SnapshotRef>, StoreError> {
        let mut whole = Vec::new();
        for name in &self.listed.snapshots {
            let object = keys::snap_key(&self.volume.tenant, self.id, name);
            let problem = match self.snapshot(name, &object, found).await? {
                Ok(snapshot) => {
                    whole.push(snapshot);
                    continue;
                }
                Err(problem) => problem,
            };
            if passed_over.len() < PASSED_OVER_MAX {
                passed_over.push(Finding {
                    object,
                    problem,
                    ..Finding::default()
                });
            }
        }
        whole.sort_by_key(|s| s.root.map(|root| root.seq));
        whole.truncate(SNAPSHOTS_MAX);
        Ok(whole)
    }

    /// That no clone needs a snapshot that a head with these alone would not have.
    /// One that was begun long ago and never came to be is given up.
    async fn no_clone_is_left(
        &self,
        whole: &[SnapshotRef],
        now_ms: u64,
    ) -> Result<(), RescueError> {
        let tenant = &self.volume.tenant;
        let prefix = keys::all_clones_prefix(tenant, self.id);
        let records = self.store.list(&prefix).await?;
        let snapshots = records
            .iter()
            .filter_map(|key| key.strip_prefix(&prefix)?.split('/').next());
        let mut left: BTreeSet<&str> = snapshots.collect();
        for kept in whole {
            left.remove(&*kept.name);
        }
        for snapshot in left {
            let prefix = format!("{prefix}{snapshot}/");
            let clone = match clones::fates(&*self.store, tenant, &prefix, Some(now_ms)).await {
                Ok(fates) => fates.into_iter().find_map(|(_, fate)| match fate {
                    Fate::Live(clone) | Fate::Begun(clone) => Some(clone),
                    Fate::Gone => None,
                }),
                Err(TrashError::Store(error)) => return Err(error.into()),
                Err(error) => Some(format!("something ({error})")),
            };
            if let Some(clone) = clone {
                let snapshot = snapshot.to_owned();
                return Err(RescueError::Clone { snapshot, clone });
            }
        }
        Ok(())
    }

    async fn snapshot(
        &self,
        name: &SnapName,
        object: &str,
        found: &Candidate,
    ) -> Result<Result<SnapshotRef, String>, StoreError> {
        let copy = match self.store.get(object).await {
            Ok((bytes, _)) => Snapshot::decode(&bytes, self.id),
            Err(error @ (StoreError::NotFound { .. } | StoreError::Invalid { .. })) => {
                return Ok(Err(error.to_string()));
            }
            Err(error) => return Err(error),
        };
        let copy = match copy {
            Ok(copy) if copy.name == name.as_str() => copy,
            Ok(copy) => return Ok(Err(format!("it is of snapshot {}", copy.name))),
            Err(error) => return Ok(Err(error.to_string())),
        };
        let mut head = self.template(copy.root, Vec::new());
        head.frame_sectors = found.frame_sectors;
        head.size = copy.size;
        head.parent.clone_from(&found.parent);
        let report = verify::check_head(Arc::clone(&self.store), &self.volume, head).await?;
        if let Some(finding) = report.findings.first() {
            return Ok(Err(format!("{}: {}", finding.object, finding.problem)));
        }
        Ok(Ok(SnapshotRef {
            name: copy.name,
            created_ms: copy.created_ms,
            root_write: copy.root_write,
            size: copy.size,
            closing: false,
            root: copy.root,
        }))
    }

    /// A head to check states with: as large and as late as can be.
    fn template(&self, root: Option<RootRef>, log: Vec<LogRange>) -> Head {
        let (tenant, name) = (&self.volume.tenant, &self.volume.name);
        let size = Sectors::new(VOLUME_SECTORS_MAX);
        Head {
            frame_sectors: 1,
            epoch: Epoch::MAX,
            log,
            root,
            ..Head::fresh(self.id, tenant, name, size, 0)
        }
    }

    /// The manifest of a map object, if it has one, and where it is.
    async fn manifest(
        &self,
        epoch: Epoch,
        seq: MapSeq,
    ) -> Result<Result<Option<(RootRef, Manifest, Option<Basis>)>, String>, StoreError> {
        let id = MapObjectId {
            volume: self.id,
            epoch,
            seq,
        };
        let read = MapEnd::read(&*self.store, &self.volume.tenant, id).await;
        let end = match told(read) {
            Ok(Ok(Some(end))) => end,
            Ok(Ok(None)) => return Ok(Ok(None)),
            Ok(Err(problem)) => return Ok(Err(problem)),
            Err(error @ StoreError::NotFound { .. }) => return Ok(Err(error.to_string())),
            Err(error) => return Err(error),
        };
        // Where there never was one, what the log's chunks say has to do.
        let basis = end.usage.as_ref().map(|usage| usage.basis);
        Ok(Ok(Some((end.root, end.manifest, basis))))
    }

    /// The head of a state, with what the flags say; the last range of its log open.
    fn head(&self, found: &Candidate, spec: &RescueSpec) -> Result<Head, RescueError> {
        let (Some(size), Some(sector_size), Some(durability), Some(compression)) = (
            spec.size_bytes,
            spec.sector_size,
            spec.durability,
            spec.compression,
        ) else {
            return Err(RescueError::Needs { flags: needs(spec) });
        };
        let min = found.size_min.bytes();
        let sectors = Sectors::from_bytes(size).filter(|_| size >= min);
        let mut head = self.template(found.root, found.followed.log.clone());
        head.size = sectors.ok_or(RescueError::Size { min, sector_size })?;
        head.sector_size = sector_size;
        head.frame_sectors = found.frame_sectors;
        head.durability = durability;
        head.compression = compression;
        head.root_write = found.root_write;
        head.parent.clone_from(&found.parent);
        head.retain_ms = found.basis.map_or(0, |basis| basis.retain_ms);
        head.next_map = self
            .listed
            .maps
            .iter()
            .map(|(_, seq)| seq.next())
            .max()
            .unwrap_or(MapSeq::ZERO);
        head.validate()
            .map_err(|_| RescueError::Size { min, sector_size })?;
        Ok(head)
    }

    /// Ends the log for every writer that may still be there.
    async fn seal(&self, followed: &Followed, by: Epoch, host: &str) -> Result<(), RescueError> {
        for epoch in &followed.open {
            let id = ChunkId {
                volume: self.id,
                epoch: *epoch,
                seq: followed.end,
            };
            let key = keys::chunk_key(&self.volume.tenant, id);
            let seal = Bytes::from(encode_seal(id, by, host));
            match self.store.create(&key, seal.clone()).await {
                Ok(_) => {}
                Err(StoreError::Exists { .. }) => {
                    // Our own PUT, whose answer was lost; or what a damaged chunk left in its place, which
                    // nobody can write over.
                    let (there, _) = self.store.get(&key).await?;
                    if there != seal && !followed.blocked {
                        return Err(RescueError::Raced { object: key });
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn report(&self, found: &Candidate, epoch: Epoch, passed_over: Vec<Finding>) -> RescueReport {
        let followed = &found.followed;
        let range = |range: &LogRange| LogRangeInfo {
            epoch: range.epoch.get(),
            first: range.first.get(),
            end: range.end.map_or(followed.end.get(), ChunkSeq::get),
        };
        RescueReport {
            volume: self.volume.to_string(),
            id: self.id.to_string(),
            epoch: epoch.get(),
            map: found
                .root
                .map(|root| keys::map_key(&self.volume.tenant, self.id, root.epoch, root.seq)),
            passed_over,
            log: followed.log.iter().map(range).collect(),
            log_ends: followed.ends.clone(),
            left_behind: followed.left_behind,
            last_write: followed.last_write.get(),
            parent: found
                .parent
                .as_ref()
                .map(|p| format!("{}@{}", p.volume, p.snapshot)),
            size_min_bytes: found.size_min.bytes(),
            ..RescueReport::default()
        }
    }
}
