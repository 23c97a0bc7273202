//! What is known of a volume's own objects: which the map needs, and which are dead and still there.
//!
//! A map's number is the clock of their lives. An object that no map before `born` needed, and the map
//! `died` not any more, is needed by a snapshot of any map in between, and by nothing else. Maps are
//! only ever made from the one before, so what is dead stays dead, whoever makes the next; but for a rollback
//! to a snapshot, which needs nothing that the snapshot did not, and a rescue, which may go on from an older map than
//! a snapshot has: what is folded from then on may be in that snapshot's map too.
//!
//! Owns: the lists. Does not own: the counting ([`super::reclaim`]), the deleting, or the chunks of the log
//! behind the map.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use quarry_cache::Mutation;
use quarry_objfmt::chunk::ChunkHeader;
use quarry_objfmt::map::{Basis, ChunkUse, DeadObject, MapObjectId, ObjectKind, Usage};
use quarry_objfmt::{
    ChunkId, ChunkSeq, Epoch, KeyGeneration, Lba, Location, MapEntry, MapSeq, SECTOR_SIZE,
    SnapshotRef, VolumeId,
};
use quarry_volume::map::MapRoot;
use tokio::time::Instant;

/// Longest time for which dead objects are retained: 100 years.
pub const RETAIN_MS_MAX: u64 = 36_525 * 86_400_000;

/// So much longer than the horizon must an object have been dead, by clocks, for the horizon to be over though this process
/// has not waited for it: else what is never attached for that long in one go would keep all its dead objects.
///
/// The horizon is for who reads by a map of before the death: an attachment elsewhere that is read-only, or a writer that
/// was fenced and does not know it yet. Two clocks are asked, and the earlier is believed: that of the host that is attached
/// now, and that by which attachments before it cut the newest chunk of the map. So a clock that is years ahead deletes
/// nothing too early until the volume was written by it, let go, and attached again by such a one; one that was days behind
/// when it noted a death has it over sooner. Even then nothing goes
/// that the head or a snapshot needs: such a reader gets errors, as one that reads for longer than the horizon does.
pub(super) const CLOCK_MARGIN: Duration = Duration::from_secs(86_400);

/// A chunk as it came into the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogChunk {
    /// The chunk.
    pub id: ChunkId,
    /// Sectors of data in it.
    pub data_sectors: u32,
    /// Bytes of the object.
    pub stored_bytes: u32,
    /// When it was cut, in milliseconds since 1970; 0 if that is not known.
    pub cut_ms: u64,
    /// Of the key that encrypts it.
    pub generation: KeyGeneration,
}

impl LogChunk {
    /// The chunk with this header; when it was cut is left out.
    pub(super) fn new(header: &ChunkHeader, stored_bytes: u64) -> Self {
        let data = header.raw_len().get();
        Self {
            id: header.id,
            data_sectors: u32::try_from(data).unwrap_or(u32::MAX),
            stored_bytes: u32::try_from(stored_bytes).unwrap_or(u32::MAX),
            cut_ms: 0,
            generation: header.generation,
        }
    }

    /// The same, cut at this time.
    pub(super) const fn cut_at(self, cut_ms: u64) -> Self {
        Self { cut_ms, ..self }
    }
}

/// The name of a chunk among its volume's.
pub(super) type ChunkName = (Epoch, ChunkSeq);

/// What a map needs of each chunk.
pub(super) type Needed = HashMap<ChunkName, Need>;

/// What a map needs of a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Need {
    pub(super) sectors: u32,
    /// Where the first of them is in the volume.
    pub(super) start: Lba,
    /// Behind the last.
    pub(super) end: Lba,
}

impl Need {
    /// What entries of one chunk, which come in the order of addresses, need of it.
    pub(super) fn add(needed: &mut Needed, name: ChunkName, entry: &MapEntry) {
        let end = entry.end();
        let none = Self {
            sectors: 0,
            start: entry.start,
            end,
        };
        let need = needed.entry(name).or_insert(none);
        need.sectors += entry.len;
        need.end = end;
    }
}

/// What a volume takes in the store, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Space {
    /// Data that the map needs, before compression, as of when they were last counted.
    pub live: u64,
    /// Data in chunks that the map needs a part of, before compression, which it does not need.
    pub debt: u64,
    /// Dead objects that no snapshot needs: they go when the horizon and the retention have passed.
    pub dead: u64,
    /// Dead objects that a snapshot needs.
    pub pinned: u64,
}

/// What a key encrypts of a volume, needed or not deleted yet.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Sealed {
    /// Chunks.
    pub chunks: u64,
    /// Their bytes in the store.
    pub stored_bytes: u64,
    /// Snapshots that need some of them.
    pub snapshots: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
struct Dead {
    object: DeadObject,
    /// Since when this process knows, and the head names the map that does not need it: a clock that does not jump.
    since: Instant,
}

impl Dead {
    /// Until when it is kept, whether or not a snapshot needs it. Before this process began it was `found_ms` at least.
    fn kept_until(
        &self,
        now: Instant,
        horizon: Duration,
        retain_ms: u64,
        (found_ms, now_ms): (u64, u64),
    ) -> Instant {
        let age_ms = now_ms.saturating_sub(self.object.died_ms);
        let retain_ms = retain_ms.min(RETAIN_MS_MAX);
        let retained = Duration::from_millis(retain_ms.saturating_sub(age_ms));
        let known_ms = found_ms.min(now_ms).saturating_sub(self.object.died_ms);
        let is_long_dead = Duration::from_millis(known_ms) >= horizon.saturating_add(CLOCK_MARGIN);
        let unread = match is_long_dead {
            true => now,
            false => self.since + horizon,
        };
        unread.max(now + retained)
    }
}

/// A volume's objects as of its newest map.
#[derive(Clone, Debug)]
pub struct Objects {
    volume: VolumeId,
    /// Whether `chunks` are all that the map needs. They are not where version 1 of a head has left a map
    /// without usage, until it is counted.
    counted: bool,
    /// The time of the map, as its basis has it.
    log_ms: u64,
    /// The same of the map that this process began with, once it has made one: what is deleted is off the list with the
    /// next, and else would be deleted by each attachment anew.
    found_ms: Option<u64>,
    chunks: BTreeMap<ChunkName, ChunkUse>,
    dead: Vec<Dead>,
}

impl Objects {
    /// As a map's usage says.
    pub(super) fn new(volume: VolumeId, usage: Usage) -> Self {
        let since = Instant::now();
        let dead = |object: DeadObject| Dead { object, since };
        Self {
            volume,
            counted: true,
            log_ms: usage.basis.log_ms,
            found_ms: None,
            chunks: usage
                .chunks
                .iter()
                .map(|c| ((c.epoch, c.seq), *c))
                .collect(),
            dead: usage.dead.into_iter().map(dead).collect(),
        }
    }

    /// Of a map without usage.
    pub(super) fn uncounted(volume: VolumeId) -> Self {
        Self {
            counted: false,
            ..Self::new(volume, Usage::default())
        }
    }

    pub(super) const fn is_counted(&self) -> bool {
        self.counted
    }

    /// The time of the map, in milliseconds since 1970; 0 if it is not known.
    pub(super) const fn log_ms(&self) -> u64 {
        self.log_ms
    }

    /// What is to be written beside the manifest; `None` if it would not be all. The time of `basis` is
    /// filled in.
    pub(super) fn usage(&self, basis: Basis) -> Option<Usage> {
        let log_ms = self.log_ms;
        self.counted.then(|| Usage {
            basis: Basis { log_ms, ..basis },
            chunks: self.chunks.values().copied().collect(),
            dead: self.dead.iter().map(|dead| dead.object).collect(),
        })
    }

    /// Chunks go from the log into the map numbered `map`, which needs `entries` of them. No map before the one
    /// numbered `born` needed them: that is the number behind the map that the new one is made from. A snapshot's may lie
    /// between the two and need them, where a rescue went back to an older map.
    pub(super) fn fold(
        &mut self,
        chunks: &[LogChunk],
        entries: &[MapEntry],
        born: MapSeq,
        map: MapSeq,
        now_ms: u64,
    ) {
        self.found_ms.get_or_insert(self.log_ms);
        let mut needed = Needed::new();
        for entry in entries {
            if let Some(name) = Self::chunk_of(self.volume, entry) {
                Need::add(&mut needed, name, entry);
            }
        }
        for chunk in chunks {
            let name = (chunk.id.epoch, chunk.id.seq);
            let needed = needed.get(&name).map_or(0, |need| need.sectors);
            self.add(chunk, needed, born);
            if needed == 0 {
                self.end_chunk(name, map, now_ms);
            }
            self.log_ms = self.log_ms.max(chunk.cut_ms);
        }
    }

    /// The map numbered `born` is the first that could have needed the chunk.
    pub(super) fn add(&mut self, chunk: &LogChunk, needed: u32, born: MapSeq) {
        let name = (chunk.id.epoch, chunk.id.seq);
        let used = ChunkUse {
            epoch: chunk.id.epoch,
            seq: chunk.id.seq,
            born,
            data_sectors: chunk.data_sectors,
            needed_sectors: needed,
            stored_bytes: chunk.stored_bytes,
            generation: chunk.generation,
        };
        self.chunks.insert(name, used);
    }

    /// The chunk of this volume that an entry is in.
    pub(super) fn chunk_of(volume: VolumeId, entry: &MapEntry) -> Option<ChunkName> {
        match entry.location {
            Location::Data(data) if data.chunk.volume == volume => {
                Some((data.chunk.epoch, data.chunk.seq))
            }
            _ => None,
        }
    }

    /// The map numbered `map` does not need the chunk any more.
    pub(super) fn end_chunk(&mut self, name: ChunkName, map: MapSeq, now_ms: u64) {
        let Some(chunk) = self.chunks.remove(&name) else {
            return;
        };
        self.bury(DeadObject {
            kind: ObjectKind::Chunk,
            epoch: chunk.epoch,
            number: chunk.seq.get(),
            born: chunk.born.min(map),
            died: map,
            died_ms: now_ms,
            stored_bytes: chunk.stored_bytes.into(),
            generation: chunk.generation,
        });
    }

    /// The map numbered `map` takes the place of the one whose manifest is in `manifest`: map objects that
    /// it does not name are dead.
    pub(super) fn replace_map(
        &mut self,
        old: &MapRoot,
        manifest: Option<MapObjectId>,
        new: &MapRoot,
        map: MapSeq,
        now_ms: u64,
    ) {
        let kept = new.objects();
        let mut gone: BTreeSet<MapObjectId> = old.objects();
        gone.extend(manifest);
        gone.retain(|object| object.volume == self.volume && !kept.contains(object));
        let tables: Vec<_> = old.runs().iter().flatten().collect();
        for object in gone {
            let own = tables.iter().filter(|table| table.object == object);
            self.bury(DeadObject {
                kind: ObjectKind::Map,
                epoch: object.epoch,
                number: object.seq.get(),
                // A damaged manifest may name any.
                born: object.seq.min(map),
                died: map,
                died_ms: now_ms,
                stored_bytes: own.map(|table| table.stored_bytes).sum(),
                generation: KeyGeneration::FIRST,
            });
        }
    }

    fn bury(&mut self, object: DeadObject) {
        self.dead.push(Dead {
            object,
            since: Instant::now(),
        });
    }

    /// The head names the map numbered `map`: from now on nobody is given the one before, though what it needs was written
    /// down as dead when there was no telling how long the head would take.
    pub(super) fn head_names(&mut self, map: MapSeq) {
        let since = Instant::now();
        for dead in &mut self.dead {
            if dead.object.died == map {
                dead.since = since;
            }
        }
    }

    /// The map numbered `map`, which this one was made from or is, needs so much of each chunk: what it
    /// does not need at all is dead. Younger chunks were not counted.
    pub(super) fn count(&mut self, needed: &Needed, map: MapSeq, now_ms: u64) {
        if !self.counted {
            let unlisted = needed
                .iter()
                .filter(|(name, _)| !self.chunks.contains_key(name));
            let found: Vec<ChunkUse> = unlisted
                .map(|(&(epoch, seq), need)| ChunkUse {
                    epoch,
                    seq,
                    born: MapSeq::ZERO,
                    data_sectors: need.sectors,
                    needed_sectors: need.sectors,
                    stored_bytes: 0,
                    generation: KeyGeneration::FIRST,
                })
                .collect();
            self.chunks
                .extend(found.into_iter().map(|c| ((c.epoch, c.seq), c)));
            self.counted = true;
        }
        let mut ended = Vec::new();
        for (name, chunk) in &mut self.chunks {
            if chunk.born > map {
                continue;
            }
            chunk.needed_sectors = needed
                .get(name)
                .map_or(0, |need| need.sectors)
                .min(chunk.data_sectors);
            if chunk.needed_sectors == 0 {
                ended.push(*name);
            }
        }
        for name in ended {
            self.end_chunk(name, map, now_ms);
        }
    }

    /// So many sectors of each chunk have moved elsewhere.
    pub(super) fn take(&mut self, taken: &HashMap<ChunkName, u32>) {
        for (name, sectors) in taken {
            if let Some(chunk) = self.chunks.get_mut(name) {
                // What was overwritten since the count is counted as needed still.
                chunk.needed_sectors = chunk.needed_sectors.saturating_sub(*sectors);
            }
        }
    }

    /// The chunks, by epoch and number.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (ChunkName, &ChunkUse)> {
        self.chunks.iter().map(|(name, chunk)| (*name, chunk))
    }

    /// Dead objects that nobody can need any more: no snapshot does, and for `horizon` no reader
    /// was given a map that does ([`CLOCK_MARGIN`]); by the wall's clock they died `retain` ago or longer.
    pub(super) fn due(
        &self,
        snapshots: &[SnapshotRef],
        horizon: Duration,
        retain_ms: u64,
        now_ms: u64,
    ) -> Vec<DeadObject> {
        let (now, clocks) = (Instant::now(), (self.found_ms.unwrap_or(0), now_ms));
        let due = self.dead.iter().filter(|dead| {
            dead.kept_until(now, horizon, retain_ms, clocks) <= now
                && !is_pinned(&dead.object, snapshots)
        });
        due.map(|dead| dead.object).collect()
    }

    /// When the next of them is due, and whether there are some that are not as long as there is a snapshot.
    pub(super) fn next_due(
        &self,
        snapshots: &[SnapshotRef],
        horizon: Duration,
        retain_ms: u64,
        now_ms: u64,
    ) -> (Option<Instant>, bool) {
        let (now, clocks) = (Instant::now(), (self.found_ms.unwrap_or(0), now_ms));
        let (pinned, free): (Vec<&Dead>, Vec<&Dead>) = self
            .dead
            .iter()
            .partition(|dead| is_pinned(&dead.object, snapshots));
        let due = free
            .iter()
            .map(|dead| dead.kept_until(now, horizon, retain_ms, clocks));
        (due.min(), !pinned.is_empty())
    }

    /// They are deleted.
    pub(super) fn forget(&mut self, deleted: &[DeadObject]) {
        let name = |object: &DeadObject| (object.kind, object.epoch, object.number);
        let deleted: BTreeSet<_> = deleted.iter().map(name).collect();
        self.dead
            .retain(|dead| !deleted.contains(&name(&dead.object)));
    }

    /// As [`unique_bytes`]; `None` as long as not all that is dead is known.
    pub(super) fn unique_bytes(&self, snapshots: &[SnapshotRef]) -> Option<Vec<u64>> {
        let dead = self.dead.iter().map(|dead| &dead.object);
        self.counted.then(|| unique_bytes(dead, snapshots))
    }

    /// The earliest generation of the keys that encrypt what is there, needed or dead; none if there is nothing.
    pub(super) fn earliest_generation(&self) -> Option<KeyGeneration> {
        let live = self.chunks.values().map(|chunk| chunk.generation);
        live.chain(self.dead_chunks().map(|dead| dead.generation))
            .min()
    }

    /// What the key of this generation encrypts; `None` as long as not all that is dead is known.
    pub(super) fn sealed_by(
        &self,
        generation: KeyGeneration,
        snapshots: &[SnapshotRef],
    ) -> Option<Sealed> {
        if !self.counted {
            return None;
        }
        let mut sealed = Sealed::default();
        let by_map: BTreeMap<MapSeq, &str> = snapshots
            .iter()
            .filter_map(|s| Some((s.root?.seq, s.name.as_str())))
            .collect();
        let mut needing: BTreeSet<&str> = BTreeSet::new();
        let mut born = None;
        let of_it = self.chunks.values().filter(|c| c.generation == generation);
        for chunk in of_it {
            sealed.chunks += 1;
            sealed.stored_bytes += u64::from(chunk.stored_bytes);
            born = Some(born.map_or(chunk.born, |b: MapSeq| b.min(chunk.born)));
        }
        if let Some(born) = born {
            needing.extend(by_map.range(born..).map(|(_, name)| *name));
        }
        for dead in self.dead_chunks().filter(|d| d.generation == generation) {
            sealed.chunks += 1;
            sealed.stored_bytes += dead.stored_bytes;
            needing.extend(by_map.range(dead.born..dead.died).map(|(_, name)| *name));
        }
        sealed.snapshots = needing.into_iter().map(str::to_owned).collect();
        Some(sealed)
    }

    fn dead_chunks(&self) -> impl Iterator<Item = &DeadObject> {
        let dead = self.dead.iter().map(|dead| &dead.object);
        dead.filter(|object| object.kind == ObjectKind::Chunk)
    }

    pub(super) fn space(&self, snapshots: &[SnapshotRef]) -> Space {
        let mut space = Space::default();
        for chunk in self.chunks.values() {
            let bytes = |sectors: u32| u64::from(sectors) * u64::from(SECTOR_SIZE);
            space.live += bytes(chunk.needed_sectors);
            space.debt += bytes(chunk.data_sectors - chunk.needed_sectors);
        }
        for dead in &self.dead {
            let sum = match is_pinned(&dead.object, snapshots) {
                true => &mut space.pinned,
                false => &mut space.dead,
            };
            *sum += dead.object.stored_bytes;
        }
        space
    }
}

/// Bytes of the dead objects that are there for the sake of one snapshot alone, for each of them: what goes when it
/// is deleted. One of the same map as another has none.
pub(crate) fn unique_bytes<'a>(
    dead: impl Iterator<Item = &'a DeadObject>,
    snapshots: &[SnapshotRef],
) -> Vec<u64> {
    let mut by_map: Vec<(MapSeq, usize)> = (snapshots.iter().enumerate())
        .filter_map(|(index, s)| Some((s.root?.seq, index)))
        .collect();
    by_map.sort_unstable();
    let mut bytes = vec![0; snapshots.len()];
    for object in dead {
        let first = by_map.partition_point(|(map, _)| *map < object.born);
        let needing = by_map[first..].iter();
        let mut needing = needing.take_while(|(map, _)| object.is_needed_by(*map));
        if let (Some((_, only)), None) = (needing.next(), needing.next()) {
            bytes[*only] += object.stored_bytes;
        }
    }
    bytes
}

/// The maps that snapshots keep.
fn maps(snapshots: &[SnapshotRef]) -> impl Iterator<Item = MapSeq> {
    snapshots.iter().filter_map(|s| s.root.map(|root| root.seq))
}

fn is_pinned(object: &DeadObject, snapshots: &[SnapshotRef]) -> bool {
    !Mutation::SweepSnapshots.is_on() && maps(snapshots).any(|map| object.is_needed_by(map))
}

/// Whether a snapshot needs the chunk, dead or alive: taking it apart would give nothing back.
pub(super) fn is_held(chunk: &ChunkUse, snapshots: &[SnapshotRef]) -> bool {
    maps(snapshots).any(|map| chunk.born <= map)
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::map::Manifest;
    use quarry_objfmt::map::TableRef;
    use quarry_objfmt::{DataLoc, RootRef, Sectors, WriteSeq};

    use super::*;

    const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);

    fn chunk(seq: u64) -> LogChunk {
        LogChunk {
            id: ChunkId {
                volume: VOLUME,
                epoch: Epoch::new(1),
                seq: ChunkSeq::new(seq),
            },
            data_sectors: 100,
            stored_bytes: 1000,
            cut_ms: 0,
            generation: KeyGeneration::FIRST,
        }
    }

    fn need(sectors: u32) -> Need {
        Need {
            sectors,
            start: Lba::new(0),
            end: Lba::new(sectors.into()),
        }
    }

    fn entry(at: u64, len: u32, chunk: &LogChunk) -> MapEntry {
        MapEntry {
            start: Lba::new(at),
            len,
            location: Location::Data(DataLoc {
                chunk: chunk.id,
                raw: 0,
                stored_offset: 0,
                stored_len: 1,
            }),
        }
    }

    fn snapshot(map: u64) -> SnapshotRef {
        SnapshotRef {
            name: format!("s{map}"),
            created_ms: 0,
            root_write: WriteSeq::ZERO,
            size: Sectors::new(8),
            closing: false,
            root: Some(RootRef {
                epoch: Epoch::new(1),
                seq: MapSeq::new(map),
                offset: 0,
                len: 1,
                usage: None,
            }),
        }
    }

    fn due(objects: &Objects, snapshots: &[u64]) -> Vec<u64> {
        let snapshots: Vec<_> = snapshots.iter().map(|map| snapshot(*map)).collect();
        let due = objects.due(&snapshots, Duration::ZERO, 0, 0);
        due.iter().map(|object| object.number).collect()
    }

    #[test]
    fn chunk_is_due_when_no_snapshot_lies_between_its_birth_and_its_death() {
        let mut objects = Objects::new(VOLUME, Usage::default());
        let (a, b) = (chunk(1), chunk(2));
        let entries = [entry(0, 60, &a), entry(100, 100, &b)];
        objects.fold(&[a, b], &entries, MapSeq::new(3), MapSeq::new(3), 0);
        assert!(due(&objects, &[]).is_empty());
        let needed = Needed::from([((b.id.epoch, b.id.seq), need(50))]);
        objects.count(&needed, MapSeq::new(7), 0);
        for held in [3, 4, 6] {
            assert!(due(&objects, &[held]).is_empty(), "{held}");
        }
        assert_eq!(due(&objects, &[1, 2, 7, 8]), [1]);
        let space = objects.space(&[]);
        assert_eq!((space.live, space.debt), (50 * 512, 50 * 512));
        assert_eq!((space.dead, space.pinned), (1000, 0));
        assert_eq!(objects.space(&[snapshot(4)]).pinned, 1000);
        let again = Objects::new(VOLUME, objects.usage(Basis::default()).unwrap());
        assert_eq!(due(&again, &[]), [1]);
    }

    #[test]
    fn keys_are_in_use_until_the_last_chunk_of_theirs_is_deleted() {
        let generation = |number| KeyGeneration::new(number).unwrap();
        let sealed = |seq, number| LogChunk {
            generation: generation(number),
            ..chunk(seq)
        };
        let mut objects = Objects::new(VOLUME, Usage::default());
        assert_eq!(objects.earliest_generation(), None);
        let (a, b, c) = (sealed(1, 1), sealed(2, 1), sealed(3, 2));
        let entries = [entry(0, 100, &a), entry(100, 100, &b), entry(200, 100, &c)];
        objects.fold(&[a, b, c], &entries, MapSeq::new(3), MapSeq::new(3), 0);
        let snapshots = [snapshot(1), snapshot(4)];
        let in_use = |objects: &Objects, number, snapshots| {
            let sealed = objects.sealed_by(generation(number), snapshots).unwrap();
            (sealed.chunks, sealed.stored_bytes, sealed.snapshots)
        };
        let named = || vec!["s4".to_owned()];
        assert_eq!(in_use(&objects, 1, &snapshots), (2, 2000, named()));
        assert_eq!(in_use(&objects, 2, &[]), (1, 1000, Vec::new()));
        // One is moved, and the other overwritten; both are needed by who reads an older map.
        objects.end_chunk((a.id.epoch, a.id.seq), MapSeq::new(5), 0);
        objects.end_chunk((b.id.epoch, b.id.seq), MapSeq::new(5), 0);
        objects.replace_map(
            &MapRoot::new(Manifest { runs: Vec::new() }),
            Some(MapObjectId {
                volume: VOLUME,
                epoch: Epoch::new(1),
                seq: MapSeq::new(3),
            }),
            &MapRoot::new(Manifest { runs: Vec::new() }),
            MapSeq::new(5),
            0,
        );
        let mut again = Objects::new(VOLUME, objects.usage(Basis::default()).unwrap());
        assert_eq!(again.earliest_generation(), Some(generation(1)));
        assert_eq!(in_use(&again, 1, &snapshots), (2, 2000, named()));
        assert_eq!(in_use(&again, 1, &snapshots[..1]), (2, 2000, Vec::new()));
        let dead = again.due(&[], Duration::ZERO, 0, 0);
        let chunks = dead.iter().filter(|d| d.kind == ObjectKind::Chunk);
        again.forget(&chunks.copied().collect::<Vec<_>>());
        // What is left dead is a map object, which no key encrypts.
        assert_eq!(again.earliest_generation(), Some(generation(2)));
        assert_eq!(in_use(&again, 1, &snapshots), (0, 0, Vec::new()));
        assert_eq!(
            Objects::uncounted(VOLUME).sealed_by(generation(1), &[]),
            None
        );
    }

    #[test]
    fn chunk_overwritten_within_the_log_was_never_needed() {
        let mut objects = Objects::new(VOLUME, Usage::default());
        let (a, b) = (chunk(1), chunk(2));
        let map = MapSeq::new(3);
        objects.fold(&[a, b], &[entry(0, 100, &b)], map, map, 0);
        assert_eq!(due(&objects, &[1, 2, 3, 4]), [1]);
    }

    #[test]
    fn chunk_that_was_folded_before_into_a_map_that_a_snapshot_keeps_stays_for_that() {
        // A rescue went back from map 3, which a snapshot has, to map 2: the next is the fourth.
        let mut objects = Objects::new(VOLUME, Usage::default());
        let (a, b) = (chunk(1), chunk(2));
        let (born, map) = (MapSeq::new(3), MapSeq::new(4));
        objects.fold(&[a, b], &[entry(0, 100, &b)], born, map, 0);
        let held = |snapshots: &[u64]| -> Vec<bool> {
            let snapshots: Vec<_> = snapshots.iter().map(|map| snapshot(*map)).collect();
            let chunks = objects.chunks();
            chunks.map(|(_, used)| is_held(used, &snapshots)).collect()
        };
        assert_eq!((held(&[2]), held(&[3])), (vec![false], vec![true]));
        objects.count(&Needed::new(), MapSeq::new(5), 0);
        assert!(due(&objects, &[3]).is_empty());
        assert_eq!(due(&objects, &[4]), [1]);
        assert_eq!(due(&objects, &[2, 5]), [1, 2]);
    }

    #[test]
    fn unique_bytes_are_of_what_one_snapshot_needs_and_no_other() {
        let mut objects = Objects::new(VOLUME, Usage::default());
        let live = |n| [entry(n * 100, 100, &chunk(n))];
        for n in 1..=3 {
            let map = MapSeq::new(n * 2);
            objects.fold(&[chunk(n)], &live(n), map, map, 0);
        }
        // Chunk 1 lives from map 2 to 7, chunk 2 from 4 to 9; chunk 3 lives on.
        let needed = |numbers: &[u64]| -> Needed {
            let names = numbers.iter().map(|n| (Epoch::new(1), ChunkSeq::new(*n)));
            names.map(|name| (name, need(100))).collect()
        };
        objects.count(&needed(&[2, 3]), MapSeq::new(7), 0);
        objects.count(&needed(&[3]), MapSeq::new(9), 0);
        for (snapshots, bytes) in [
            (vec![], vec![]),
            (vec![1, 9], vec![0, 0]),
            (vec![3], vec![1000]),
            (vec![5], vec![2000]),
            (vec![3, 5], vec![0, 1000]),
            (vec![8, 2], vec![1000, 1000]),
            (vec![3, 3, 8], vec![0, 0, 1000]),
        ] {
            let all: Vec<_> = snapshots.iter().map(|map| snapshot(*map)).collect();
            assert_eq!(objects.unique_bytes(&all), Some(bytes), "{snapshots:?}");
        }
        let empty = SnapshotRef {
            root: None,
            ..snapshot(0)
        };
        assert_eq!(
            objects.unique_bytes(&[empty, snapshot(8)]),
            Some(vec![0, 1000])
        );
        assert_eq!(Objects::uncounted(VOLUME).unique_bytes(&[]), None);
    }

    #[test]
    fn chunk_younger_than_the_map_that_was_counted_lives() {
        let mut objects = Objects::new(VOLUME, Usage::default());
        let a = chunk(1);
        let map = MapSeq::new(9);
        objects.fold(&[a], &[entry(0, 100, &a)], map, map, 0);
        objects.count(&Needed::new(), MapSeq::new(8), 0);
        assert!(due(&objects, &[]).is_empty());
        objects.count(&Needed::new(), MapSeq::new(9), 0);
        assert_eq!(due(&objects, &[]), [1]);
    }

    #[test]
    fn map_without_usage_has_it_once_it_is_counted() {
        let mut objects = Objects::uncounted(VOLUME);
        let (old, young) = (chunk(1), chunk(2));
        let map = MapSeq::new(5);
        objects.fold(&[young], &[entry(0, 70, &young)], map, map, 0);
        assert_eq!(objects.usage(Basis::default()), None);
        let name = |chunk: &LogChunk| (chunk.id.epoch, chunk.id.seq);
        let needed = Needed::from([(name(&old), need(30)), (name(&young), need(70))]);
        objects.count(&needed, MapSeq::new(5), 0);
        let usage = objects.usage(Basis::default()).unwrap();
        let listed: Vec<_> = usage
            .chunks
            .iter()
            .map(|c| (c.seq.get(), c.data_sectors))
            .collect();
        assert_eq!(listed, [(1, 30), (2, 100)]);
    }

    #[test]
    fn map_objects_that_the_next_map_does_not_name_are_dead_but_for_a_clones_parents() {
        let object = |volume: u8, seq| MapObjectId {
            volume: VolumeId::from_bytes([volume; 16]),
            epoch: Epoch::new(1),
            seq: MapSeq::new(seq),
        };
        let table = |object| TableRef {
            object,
            first: Lba::new(0),
            end: Lba::new(8),
            entries: 1,
            index_offset: 0,
            index_len: 24,
            stored_bytes: 500,
        };
        let root = |tables: &[MapObjectId]| {
            let runs = tables.iter().map(|object| vec![table(*object)]).collect();
            MapRoot::new(Manifest { runs })
        };
        let mut objects = Objects::new(VOLUME, Usage::default());
        let old = root(&[object(1, 3), object(1, 2), object(2, 1)]);
        let new = root(&[object(1, 5), object(1, 2)]);
        objects.replace_map(&old, Some(object(1, 4)), &new, MapSeq::new(5), 0);
        assert_eq!(due(&objects, &[]), [3, 4]);
        assert!(due(&objects, &[4]).is_empty());
        assert_eq!(due(&objects, &[3]), [4]);
    }

    #[tokio::test(start_paused = true)]
    async fn dead_objects_wait_for_the_horizon_and_for_their_retention() {
        let mut objects = Objects::new(VOLUME, Usage::default());
        let map = MapSeq::new(3);
        objects.fold(&[chunk(1)], &[], map, map, 1_000);
        let horizon = Duration::from_secs(60);
        let due = |objects: &Objects, retain, now| objects.due(&[], horizon, retain, now).len();
        assert_eq!(due(&objects, 0, 1_000_000), 0);
        tokio::time::advance(horizon).await;
        let next = objects.next_due(&[], horizon, 0, 0);
        assert_eq!(next, (Some(Instant::now()), false));
        let held = objects.next_due(&[snapshot(3)], horizon, 0, 0);
        assert_eq!(held, (Some(Instant::now()), false));
        assert_eq!(due(&objects, 0, 0), 1);
        assert_eq!(due(&objects, 5_000, 5_999), 0);
        assert_eq!(due(&objects, 5_000, 6_000), 1);
        // Known anew, it waits anew; but not if it died long ago by the log and by the clock.
        let long_ms = 1_000 + 60_000 + 86_400_000;
        for (log_ms, now_ms, count) in [
            (0, 1_000_000, 0),
            (0, long_ms, 0),
            (long_ms, 1_000_000, 0),
            (long_ms, long_ms - 1, 0),
            (long_ms - 1, long_ms, 0),
            (long_ms, long_ms, 1),
        ] {
            let mut usage = objects.usage(Basis::default()).unwrap();
            usage.basis.log_ms = log_ms;
            let mut again = Objects::new(VOLUME, usage);
            assert_eq!(due(&again, 0, now_ms), 0, "an attachment without a map");
            again.fold(&[], &[], map, map, 0);
            assert_eq!(due(&again, 0, now_ms), count, "{log_ms} {now_ms}");
            assert_eq!(due(&again, long_ms, now_ms), 0);
            let (next, _) = again.next_due(&[], horizon, 0, now_ms);
            let waits = horizon * u32::from(count == 0);
            assert_eq!(next, Some(Instant::now() + waits));
            // What this process cuts is by the same clock.
            let late = chunk(2).cut_at(long_ms);
            again.fold(&[late], &[entry(0, 100, &late)], map, map, long_ms);
            assert_eq!(due(&again, 0, now_ms), count);
        }
    }
}
