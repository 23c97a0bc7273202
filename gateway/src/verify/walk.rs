//! The map and the log as a reader sees them: one row of entries, sorted, nothing hidden in it.
//!
//! What a damaged node would have told is in the row too, as entries that point to a finding: what newer
//! runs say of these sectors hides them, as it would hide what was lost.

use bytes::Bytes;
use quarry_objfmt::map::{Manifest, MapObjectId, TableRef, Usage};
use quarry_objfmt::{
    ChunkId, ChunkSeq, DataLoc, Epoch, Lba, LbaRange, Location, MapEntry, RootRef, VolumeId, keys,
};
use quarry_volume::map::{MapRoot, Merger, Node, NodeRef, RunCursor, Step};

use super::findings::Findings;
use super::{Check, add, is_damage, unsound};
use crate::backend::{Unsound, insist, told};
use crate::store::{Store, StoreError, get_long};

/// Bytes of a run read at once, for each of up to 64 runs.
const STRETCH_BYTES: u64 = 256 << 10;

/// The volume that stands for "lost", in entries that never leave this module's caller. No volume's
/// entries get here but those of the volume that is checked and of those that it was cloned from, whose ids
/// were drawn at random.
const LOST: VolumeId = VolumeId::from_bytes([0; 16]);

/// The finding for which the sectors of an entry are lost, if they are.
pub(super) fn lost_by(data: &DataLoc) -> Option<u64> {
    (data.chunk.volume == LOST).then(|| data.chunk.seq.get())
}

/// Entries that say of a range that it is lost for a finding.
fn lost(finding: u64, range: LbaRange) -> impl Iterator<Item = MapEntry> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let left = range.end.get().checked_sub(start.get());
        let left = left.filter(|left| *left > 0)?;
        let data = DataLoc {
            chunk: ChunkId {
                volume: LOST,
                epoch: Epoch::ZERO,
                seq: ChunkSeq::new(finding),
            },
            raw: 0,
            stored_offset: 0,
            stored_len: 0,
        };
        let entry = MapEntry {
            start,
            len: u32::try_from(left).unwrap_or(u32::MAX),
            location: Location::Data(data),
        };
        start = entry.end();
        Some(entry)
    })
}

/// The map that the head points to; none, with a finding, if it cannot be read.
pub(super) async fn load_root(
    check: &Check,
    findings: &mut Findings,
) -> Result<Option<MapRoot>, StoreError> {
    let Some(root) = &check.head.root else {
        return Ok(Some(MapRoot::empty()));
    };
    let id = MapObjectId {
        volume: check.head.volume,
        epoch: root.epoch,
        seq: root.seq,
    };
    let decode = |bytes: &Bytes| {
        let manifest = Manifest::decode(id, root.offset, bytes).map_err(|e| e.to_string())?;
        sound(check, id, &manifest).map(|()| manifest)
    };
    match read(check, id, root.offset, root.len, decode).await? {
        Ok(manifest) => {
            add(&check.progress.nodes, 1);
            if check.usage {
                check_usage(check, id, root, findings).await?;
            }
            Ok(Some(MapRoot::new(manifest)))
        }
        Err(reason) => {
            let problem = format!("the volume's map: {reason}; the volume cannot be attached");
            let finding = findings.add(&map_key(check, id), problem);
            findings.hit_all(finding, check.whole());
            Ok(None)
        }
    }
}

/// The usage beside the map: damage of it hits no sector.
async fn check_usage(
    check: &Check,
    id: MapObjectId,
    root: &RootRef,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    let Some((offset, len)) = root.usage else {
        return Ok(());
    };
    let decode = |bytes: &Bytes| Usage::decode(id, offset, bytes).map_err(|e| e.to_string());
    match read(check, id, offset, len, decode).await? {
        Ok(_) => add(&check.progress.nodes, 1),
        Err(reason) => {
            let problem = format!(
                "what is known of the objects that the map needs: {reason}; no read needs it, but past states and a rescue do"
            );
            findings.add(&map_key(check, id), problem);
        }
    }
    Ok(())
}

/// Whether a manifest names only what can be of this volume's history.
fn sound(check: &Check, root: MapObjectId, manifest: &Manifest) -> Result<(), String> {
    for table in manifest.runs.iter().flatten() {
        let object = table.object;
        let older = (object.epoch, object.seq) <= (root.epoch, root.seq);
        if !check.ancestors.have(object.volume) && (object.volume != root.volume || !older) {
            return Err(format!(
                "it names map {} of volume {}, which is not of its history",
                object.seq, object.volume
            ));
        }
    }
    Ok(())
}

fn map_key(check: &Check, id: MapObjectId) -> String {
    keys::map_key(&check.tenant, id.volume, id.epoch, id.seq)
}

/// Reads a part of a map object until `decode` takes it, or it has been asked for as often as a reader does.
async fn read<T>(
    check: &Check,
    id: MapObjectId,
    offset: u32,
    len: u32,
    decode: impl Fn(&Bytes) -> Result<T, String>,
) -> Result<Result<T, String>, StoreError> {
    let range = u64::from(offset)..u64::from(offset) + u64::from(len);
    let key = map_key(check, id);
    let attempt = || async {
        let bytes = get_long(&check.store, &key, range.clone()).await;
        decode(&bytes.map_err(unsound)?).map_err(Unsound::Damaged)
    };
    told(insist(attempt).await)
}

/// The merge of the log (source 0) with all runs.
pub(super) struct Walk<'a> {
    check: &'a Check,
    merger: Merger,
    log: Option<Vec<MapEntry>>,
    runs: Vec<Run>,
    /// Whether what is wrong is still to be told, and so all nodes are to be read.
    first: bool,
}

impl<'a> Walk<'a> {
    pub fn new(check: &'a Check, root: &MapRoot, log: Vec<MapEntry>, first: bool) -> Self {
        let run = |tables: &Vec<TableRef>| Run {
            cursor: RunCursor::new(tables),
            tables: tables.clone(),
            stretch: None,
        };
        Self {
            check,
            merger: Merger::new(1 + root.runs().len()),
            log: Some(log),
            runs: root.runs().iter().map(run).collect(),
            first,
        }
    }

    /// The next entry.
    pub async fn next(&mut self, findings: &mut Findings) -> Result<Option<MapEntry>, StoreError> {
        loop {
            let source = match self.merger.step() {
                Step::Entry(entry) => return Ok(Some(entry)),
                Step::Done => return Ok(None),
                Step::Need(source) => source,
            };
            let from = if self.first {
                Lba::ZERO
            } else {
                self.merger.covered()
            };
            let entries = match source.checked_sub(1) {
                None => self.log.take(),
                Some(run) => {
                    let run = &mut self.runs[run];
                    run.next(self.check, from, self.first, findings).await?
                }
            };
            self.merger
                .feed(source, entries)
                .expect("leaves are sorted, and cut to what their parents say");
        }
    }
}

struct Run {
    cursor: RunCursor,
    tables: Vec<TableRef>,
    /// What was read last: of which object, from where.
    stretch: Option<(MapObjectId, u64, Bytes)>,
}

impl Run {
    async fn next(
        &mut self,
        check: &Check,
        from: Lba,
        first: bool,
        findings: &mut Findings,
    ) -> Result<Option<Vec<MapEntry>>, StoreError> {
        while let Some(place) = self.cursor.next_node(from) {
            let taken = match self.node(check, &place).await? {
                Ok(node) => self.cursor.accept(&node).map_err(|e| e.to_string()),
                Err(reason) => Err(reason),
            };
            match taken {
                Ok(entries) => {
                    if first {
                        add(&check.progress.nodes, 1);
                    }
                    let key = || map_key(check, place.object);
                    if let Some(entries) = entries {
                        return Ok(Some(foreign_lost(check, entries, key, first, findings)));
                    }
                }
                Err(reason) => {
                    let range = self.cursor.give_up().expect("a node was named");
                    let finding = if first {
                        findings.add(&map_key(check, place.object), reason)
                    } else {
                        u64::MAX
                    };
                    return Ok(Some(lost(finding, range).collect()));
                }
            }
        }
        Ok(None)
    }

    /// A node, read together with those behind it: leaves are needed in their order.
    async fn node(
        &mut self,
        check: &Check,
        place: &NodeRef,
    ) -> Result<Result<Node, String>, StoreError> {
        let from = u64::from(place.offset);
        let to = from + u64::from(place.len);
        let decode = |bytes: &Bytes| Node::decode(place, bytes).map_err(|e| e.to_string());
        let held = |stretch: &Option<(MapObjectId, u64, Bytes)>| match stretch {
            Some((id, start, bytes)) if *id == place.object && *start <= from => {
                let skip = usize::try_from(from - start).ok()?;
                let end = skip.checked_add(place.len as usize)?;
                (end <= bytes.len()).then(|| bytes.slice(skip..end))
            }
            _ => None,
        };
        if held(&self.stretch).is_none() {
            let key = map_key(check, place.object);
            // Not past the table's last leaf: what lies behind may be the object's end.
            let tables = self.tables.iter().filter(|t| t.object == place.object);
            let leaves_end = tables
                .map(|t| u64::from(t.index_offset))
                .filter(|end| *end >= to);
            let until = leaves_end
                .min()
                .unwrap_or(to)
                .min(from + STRETCH_BYTES)
                .max(to);
            self.stretch = match check.store.get_range(&key, from..until).await {
                Ok(bytes) => Some((place.object, from, bytes)),
                Err(error) if is_damage(&error) => None,
                Err(error) => return Err(error),
            };
        }
        if let Some(bytes) = held(&self.stretch)
            && let Ok(node) = decode(&bytes)
        {
            return Ok(Ok(node));
        }
        self.stretch = None;
        read(check, place.object, place.offset, place.len, decode).await
    }
}

/// Entries of a leaf, those that name what cannot be of the volume's history made lost.
fn foreign_lost(
    check: &Check,
    mut entries: Vec<MapEntry>,
    key: impl Fn() -> String,
    first: bool,
    findings: &mut Findings,
) -> Vec<MapEntry> {
    let head = &check.head;
    let log = head.log.first().map_or(u64::MAX, |range| range.first.get());
    let mut finding = None;
    for entry in &mut entries {
        let Location::Data(data) = entry.location else {
            continue;
        };
        let ChunkId { volume, epoch, seq } = data.chunk;
        let folded = seq.get() < log || seq >= ChunkSeq::COMPACTED;
        if volume == head.volume && epoch <= head.epoch && folded || check.ancestors.have(volume) {
            continue;
        }
        let number = *finding.get_or_insert_with(|| {
            if !first {
                return u64::MAX;
            }
            let problem = format!(
                "it names chunk {} of epoch {} and volume {volume}, which is not of the volume's history",
                seq, epoch
            );
            findings.add(&key(), problem)
        });
        let range = LbaRange {
            start: entry.start,
            end: entry.end(),
        };
        *entry = lost(number, range).next().expect("no entry is empty");
    }
    entries
}
