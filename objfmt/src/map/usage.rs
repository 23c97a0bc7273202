//! The usage node: what of a volume's objects its map needs, and which of them it needs no more.
//!
//! It is what reclaiming space goes by, and lies beside the manifest that it belongs to: `head` moves to
//! both at once. Only the volume's own objects are in it; a clone's parent counts its own.
//!
//! Invariant: a chunk that the map needs is listed under `chunks`; one that is not listed at all is a
//! chunk of the log behind the map, or garbage.

use std::collections::{BTreeMap, BTreeSet};

use crate::codec::{Compression, KeyGeneration};
use crate::error::{FormatError, Result, check_up_to};
use crate::head::{Durability, Head};
use crate::map::{MapObjectId, NodeKind, open_node};
use crate::types::{ChunkSeq, Epoch, MapSeq, Sectors, VOLUME_SECTORS_MAX, WriteSeq};
use crate::wire::{Reader, put_u8, put_varint, unzigzag, zigzag};

const WHAT: &str = "map usage";

/// The newest version this build reads, and the one it writes where a later key than the volume's first encrypts a
/// chunk.
const USAGE_VERSION: u8 = 3;
/// The version this build writes elsewhere.
const USAGE_VERSION_KEYLESS: u8 = 2;

/// Fewest bytes of a chunk: six varints.
const CHUNK_LEN_MIN: usize = 6;

/// Fewest bytes of a dead object: a byte and six varints.
const DEAD_LEN_MIN: usize = 7;

/// A chunk that the map may need.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkUse {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its number.
    pub seq: ChunkSeq,
    /// No map before this one needed it.
    pub born: MapSeq,
    /// Sectors of data in it.
    pub data_sectors: u32,
    /// How many of them the map needed when they were last counted: never fewer than it does now.
    pub needed_sectors: u32,
    /// Bytes of the object.
    pub stored_bytes: u32,
    /// Of the key that encrypts it; the first, if none does, or if that is not known.
    pub generation: KeyGeneration,
}

/// What an object is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ObjectKind {
    /// A chunk.
    Chunk,
    /// A map object.
    Map,
}

/// An object that the map needs no more and that was not deleted yet, for a snapshot may need it, or a
/// reader who has an older map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeadObject {
    /// What it is.
    pub kind: ObjectKind,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its number.
    pub number: u64,
    /// No map before this one needed it.
    pub born: MapSeq,
    /// The first map from there on that did not.
    pub died: MapSeq,
    /// When that was found, in milliseconds since 1970.
    pub died_ms: u64,
    /// Bytes of the object.
    pub stored_bytes: u64,
    /// As of a chunk that the map may need; of a map object, the first.
    pub generation: KeyGeneration,
}

impl DeadObject {
    /// Whether the map numbered `map` needs it.
    #[must_use]
    pub fn is_needed_by(&self, map: MapSeq) -> bool {
        self.born <= map && map < self.died
    }
}

/// Where a map stands in its volume's life, and what the volume is: for who has lost its head.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Basis {
    /// The first chunk of the log that is not in it.
    pub log_end: ChunkSeq,
    /// The newest write in it.
    pub root_write: WriteSeq,
    /// How large the volume was; it may be larger by now.
    pub size: Sectors,
    /// Bytes in a logical block.
    pub sector_size: u32,
    /// Sectors in a frame.
    pub frame_sectors: u32,
    /// Tried for each frame.
    pub compression: Compression,
    /// When a flush is durable.
    pub durability: Durability,
    /// The time of the newest chunk of the log that is in it, of the volume if it was cloned, or of going
    /// back to a snapshot; in milliseconds since 1970, 0 if that is not known. So a map is of the volume as
    /// it was at that time, whenever it was made, and times never go back from map to map.
    pub log_ms: u64,
    /// How long dead objects are retained.
    pub retain_ms: u64,
    /// Whether the volume had no map before it.
    pub is_first: bool,
    /// Whether the volume was a clone: then the map may need objects of others, as long as it is one.
    pub is_clones: bool,
    /// Whether the volume went back to a snapshot with it: then the log that was left behind ends one place before its
    /// own begins.
    pub is_back: bool,
}

/// Mark of a map that the volume had none before.
const MARK_FIRST: u8 = 1;
/// Mark of a clone's map.
const MARK_CLONES: u8 = 2;
/// It went back to a snapshot.
const MARK_BACK: u8 = 4;

impl Basis {
    /// Of the map that is to take the place of the one that this head names, but for its time.
    #[must_use]
    pub fn of(head: &Head) -> Self {
        Self {
            log_end: head.log.first().map_or(ChunkSeq::ZERO, |range| range.first),
            root_write: head.root_write,
            size: head.size,
            sector_size: head.sector_size,
            frame_sectors: head.frame_sectors,
            compression: head.compression,
            durability: head.durability,
            log_ms: 0,
            retain_ms: head.retain_ms,
            is_first: head.root.is_none(),
            is_clones: head.parent.is_some(),
            is_back: false,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        put_varint(out, self.log_end.get());
        put_varint(out, self.root_write.get());
        put_varint(out, self.size.get());
        put_varint(out, self.sector_size.into());
        put_varint(out, self.frame_sectors.into());
        put_u8(out, self.compression.code());
        put_u8(out, self.durability.code());
        put_varint(out, self.log_ms);
        put_varint(out, self.retain_ms);
        let mark = |mark: u8, is: bool| if is { mark } else { 0 };
        put_u8(
            out,
            mark(MARK_FIRST, self.is_first)
                | mark(MARK_CLONES, self.is_clones)
                | mark(MARK_BACK, self.is_back),
        );
    }

    fn decode(reader: &mut Reader<'_>, version: u8) -> Result<Self> {
        let basis = Self {
            log_end: ChunkSeq::new(reader.varint()?),
            root_write: WriteSeq::new(reader.varint()?),
            size: Sectors::new(reader.varint()?),
            sector_size: reader.varint_u32()?,
            frame_sectors: reader.varint_u32()?,
            compression: Compression::from_code(reader.u8()?, WHAT)?,
            durability: Durability::from_code(reader.u8()?, WHAT)?,
            ..Self::default()
        };
        basis.root_write.check(WHAT)?;
        basis.log_end.check_of_log(WHAT)?;
        check_up_to(WHAT, "size", basis.size.get(), VOLUME_SECTORS_MAX)?;
        if version == 1 {
            return Ok(basis);
        }
        let (log_ms, retain_ms, marks) = (reader.varint()?, reader.varint()?, reader.u8()?);
        if marks & !(MARK_FIRST | MARK_CLONES | MARK_BACK) != 0 {
            return Err(FormatError::Unknown {
                what: WHAT,
                field: "mark of the map",
                found: marks.into(),
            });
        }
        Ok(Self {
            log_ms,
            retain_ms,
            is_first: marks & MARK_FIRST != 0,
            is_clones: marks & MARK_CLONES != 0,
            is_back: marks & MARK_BACK != 0,
            ..basis
        })
    }
}

/// A volume's objects, as of one map.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Usage {
    /// What the map is of.
    pub basis: Basis,
    /// Chunks that the map may need, by epoch and number.
    pub chunks: Vec<ChunkUse>,
    /// Objects that it needs no more.
    pub dead: Vec<DeadObject>,
}

/// An object by its names.
type Name = (ObjectKind, Epoch, u64);

impl Usage {
    /// The usage of the map numbered `at` that takes the volume back to an older map, whose usage is `to`
    /// and which needs the volume's own map objects `maps`; `self` is the usage of the map that it comes
    /// after. `left` are objects in neither usage that only the newer map or its log needed.
    ///
    /// What the older map needs lives again, born when it was. All else that was known is dead: what was
    /// alive until now dies at `at`, what was dead before keeps its time.
    #[must_use]
    pub fn taken_back(
        &self,
        to: &Self,
        maps: &BTreeSet<(Epoch, MapSeq)>,
        left: impl IntoIterator<Item = DeadObject>,
        at: MapSeq,
        now_ms: u64,
    ) -> Self {
        let chunk = |c: &ChunkUse| (ObjectKind::Chunk, c.epoch, c.seq.get());
        let alive: BTreeSet<Name> = to
            .chunks
            .iter()
            .map(chunk)
            .chain(maps.iter().map(|(e, n)| (ObjectKind::Map, *e, n.get())))
            .collect();
        let dies = |c: &ChunkUse| DeadObject {
            kind: ObjectKind::Chunk,
            epoch: c.epoch,
            number: c.seq.get(),
            born: c.born,
            died: at,
            died_ms: now_ms,
            stored_bytes: c.stored_bytes.into(),
            generation: c.generation,
        };
        let mut dead: BTreeMap<Name, DeadObject> = BTreeMap::new();
        let known = self.dead.iter().copied();
        for object in known
            .chain(self.chunks.iter().map(dies))
            .chain(left)
            .map(|o| ((o.kind, o.epoch, o.number), o))
            .filter(|(name, _)| !alive.contains(name))
        {
            dead.entry(object.0).or_insert(object.1);
        }
        Self {
            basis: self.basis,
            chunks: to.chunks.clone(),
            dead: dead.into_values().collect(),
        }
    }

    /// Checks that `bytes` are exactly the usage node at `offset` of object `id`, and decodes it.
    ///
    /// # Errors
    /// If the bytes are damaged, of another place, or not a sound usage.
    pub fn decode(id: MapObjectId, offset: u32, bytes: &[u8]) -> Result<Self> {
        match open_node(id, offset, bytes)? {
            (NodeKind::Usage, payload) => Self::decode_payload(payload),
            _ => Err(FormatError::Misplaced {
                what: WHAT,
                field: "kind of node",
            }),
        }
    }

    pub(super) fn decode_payload(payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(payload, WHAT);
        let version = reader.u8()?;
        if version == 0 || version > USAGE_VERSION {
            return Err(FormatError::Version {
                what: WHAT,
                found: version.into(),
                supported: USAGE_VERSION.into(),
            });
        }
        let basis = Basis::decode(&mut reader, version)?;
        let count = reader.count(CHUNK_LEN_MIN)?;
        let mut chunks: Vec<ChunkUse> = Vec::with_capacity(count);
        for _ in 0..count {
            let chunk = read_chunk(&mut reader, version, chunks.last())?;
            chunks.push(chunk);
        }
        let count = reader.count(DEAD_LEN_MIN)?;
        let dead = (0..count)
            .map(|_| read_dead(&mut reader, version))
            .collect::<Result<_>>()?;
        reader.finish()?;
        Ok(Self {
            basis,
            chunks,
            dead,
        })
    }

    /// Appends the payload.
    ///
    /// # Errors
    /// If the chunks are not sorted, or one needs more than it has.
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let version = match self.is_keyed() {
            true => USAGE_VERSION,
            false => USAGE_VERSION_KEYLESS,
        };
        put_u8(out, version);
        self.basis.encode(out);
        put_varint(out, self.chunks.len() as u64);
        let mut last: Option<&ChunkUse> = None;
        for chunk in &self.chunks {
            let sorted = last.is_none_or(|l| (l.epoch, l.seq) < (chunk.epoch, chunk.seq));
            let Some(unneeded) = chunk.data_sectors.checked_sub(chunk.needed_sectors) else {
                return Err(FormatError::invalid(WHAT, MORE_THAN_IT_HAS));
            };
            if !sorted {
                return Err(FormatError::invalid(WHAT, "the chunks are not sorted"));
            }
            let (epoch, next, born) = before(last);
            let same = chunk.epoch.get() == epoch;
            put_varint(out, u64::from(chunk.epoch.get() - epoch));
            put_varint(out, chunk.seq.get() - if same { next } else { 0 });
            let born = chunk.born.get().wrapping_sub(born).cast_signed();
            put_varint(out, zigzag(born));
            put_varint(out, chunk.data_sectors.into());
            put_varint(out, unneeded.into());
            put_varint(out, chunk.stored_bytes.into());
            if version > USAGE_VERSION_KEYLESS {
                put_varint(out, chunk.generation.get().into());
            }
            last = Some(chunk);
        }
        put_varint(out, self.dead.len() as u64);
        for object in &self.dead {
            let Some(life) = object.died.get().checked_sub(object.born.get()) else {
                return Err(FormatError::invalid(WHAT, DEAD_BEFORE_BORN));
            };
            put_u8(out, object.kind as u8);
            put_varint(out, object.epoch.get().into());
            put_varint(out, object.number);
            put_varint(out, object.born.get());
            put_varint(out, life);
            put_varint(out, object.died_ms);
            put_varint(out, object.stored_bytes);
            if version > USAGE_VERSION_KEYLESS && object.kind == ObjectKind::Chunk {
                put_varint(out, object.generation.get().into());
            }
        }
        Ok(())
    }

    /// Whether a later key than the first encrypts a chunk of it.
    fn is_keyed(&self) -> bool {
        let live = self.chunks.iter().map(|chunk| chunk.generation);
        let mut all = live.chain(self.dead.iter().map(|object| object.generation));
        all.any(|generation| generation > KeyGeneration::FIRST)
    }
}

const MORE_THAN_IT_HAS: &str = "more of a chunk is needed than it has";
const DEAD_BEFORE_BORN: &str = "an object died before it was born";

/// What a chunk is told relative to: the epoch, the next number in it, and the map, of the one before.
fn before(last: Option<&ChunkUse>) -> (u32, u64, u64) {
    last.map_or((0, 0, 0), |l| {
        let next = l.seq.get().wrapping_add(1);
        (l.epoch.get(), next, l.born.get())
    })
}

fn read_chunk(reader: &mut Reader<'_>, version: u8, last: Option<&ChunkUse>) -> Result<ChunkUse> {
    let overflow = || FormatError::invalid(WHAT, "a number is too large");
    let (before, next, born) = before(last);
    let epoch = before
        .checked_add(reader.varint_u32()?)
        .ok_or_else(overflow)?;
    let seq = reader.varint()?;
    let seq = match last {
        // Behind the largest number there is none.
        Some(_) if epoch == before && next == 0 => return Err(overflow()),
        _ if epoch == before => seq.checked_add(next).ok_or_else(overflow)?,
        _ => seq,
    };
    let born = born.wrapping_add(unzigzag(reader.varint()?).cast_unsigned());
    let data_sectors = reader.varint_u32()?;
    let needed_sectors = data_sectors
        .checked_sub(reader.varint_u32()?)
        .ok_or_else(|| FormatError::invalid(WHAT, MORE_THAN_IT_HAS))?;
    Ok(ChunkUse {
        epoch: Epoch::new(epoch),
        seq: ChunkSeq::new(seq),
        born: MapSeq::new(born),
        data_sectors,
        needed_sectors,
        stored_bytes: reader.varint_u32()?,
        generation: read_generation(reader, version)?,
    })
}

fn read_generation(reader: &mut Reader<'_>, version: u8) -> Result<KeyGeneration> {
    if version <= USAGE_VERSION_KEYLESS {
        return Ok(KeyGeneration::FIRST);
    }
    let generation = u16::try_from(reader.varint()?).ok();
    generation
        .and_then(KeyGeneration::new)
        .ok_or_else(|| FormatError::invalid(WHAT, "the generation of a key is out of range"))
}

fn read_dead(reader: &mut Reader<'_>, version: u8) -> Result<DeadObject> {
    let kind = match reader.u8()? {
        0 => ObjectKind::Chunk,
        1 => ObjectKind::Map,
        code => {
            return Err(FormatError::Unknown {
                what: WHAT,
                field: "kind of object",
                found: code.into(),
            });
        }
    };
    let epoch = Epoch::new(reader.varint_u32()?);
    let number = reader.varint()?;
    let born = reader.varint()?;
    let died = born
        .checked_add(reader.varint()?)
        .ok_or_else(|| FormatError::invalid(WHAT, "a number is too large"))?;
    Ok(DeadObject {
        kind,
        epoch,
        number,
        born: MapSeq::new(born),
        died: MapSeq::new(died),
        died_ms: reader.varint()?,
        stored_bytes: reader.varint()?,
        generation: match kind {
            ObjectKind::Chunk => read_generation(reader, version)?,
            ObjectKind::Map => KeyGeneration::FIRST,
        },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn basis() -> Basis {
        Basis {
            log_end: ChunkSeq::new(77),
            root_write: WriteSeq::new(1000),
            size: Sectors::new(1 << 30),
            sector_size: 4096,
            frame_sectors: 128,
            compression: Compression::Zstd,
            durability: Durability::Object,
            log_ms: 1_700_000_000_000,
            retain_ms: 86_400_000,
            is_first: true,
            is_clones: true,
            is_back: true,
        }
    }

    #[test]
    fn usage_of_a_volume_larger_than_any_is_refused() {
        for (sectors, is_sound) in [(VOLUME_SECTORS_MAX, true), (VOLUME_SECTORS_MAX + 1, false)] {
            let basis = Basis {
                size: Sectors::new(sectors),
                ..basis()
            };
            let usage = Usage {
                basis,
                ..Usage::default()
            };
            let mut payload = Vec::new();
            usage.encode(&mut payload).unwrap();
            assert_eq!(Usage::decode_payload(&payload).is_ok(), is_sound);
        }
    }

    #[test]
    fn usage_of_version_1_is_read_and_says_no_time() {
        let usage = Usage {
            basis: basis(),
            ..Usage::default()
        };
        let mut payload = Vec::new();
        usage.encode(&mut payload).unwrap();
        // Six bytes of time, four of retention, a mark; behind them two empty lists.
        let end = payload.len() - 2;
        let mut old = payload[..end - 6 - 4 - 1].to_vec();
        old.extend_from_slice(&payload[end..]);
        old[0] = 1;
        let expected = Basis {
            log_ms: 0,
            retain_ms: 0,
            is_first: false,
            is_clones: false,
            is_back: false,
            ..basis()
        };
        assert_eq!(Usage::decode_payload(&old).unwrap().basis, expected);
        payload[0] = 4;
        assert!(Usage::decode_payload(&payload).is_err());
    }

    fn any_generation() -> impl Strategy<Value = KeyGeneration> {
        let first = KeyGeneration::FIRST;
        let any = any::<u16>().prop_map(move |n| KeyGeneration::new(n).unwrap_or(first));
        prop_oneof![9 => Just(first), 1 => any]
    }

    prop_compose! {
        fn any_chunk()(
            epoch in 0u32..4, seq in prop_oneof![0u64..50, any::<u64>()], born: u64,
            data: u32, needed: u32, stored_bytes: u32, generation in any_generation(),
        ) -> ChunkUse {
            ChunkUse {
                epoch: Epoch::new(epoch),
                seq: ChunkSeq::new(seq),
                born: MapSeq::new(born),
                data_sectors: data.max(needed),
                needed_sectors: data.min(needed),
                stored_bytes,
                generation,
            }
        }
    }

    prop_compose! {
        fn any_dead()(
            map: bool, epoch: u32, number: u64, (born, died) in (any::<u64>(), any::<u64>()),
            died_ms: u64, stored_bytes: u64, generation in any_generation(),
        ) -> DeadObject {
            DeadObject {
                kind: if map { ObjectKind::Map } else { ObjectKind::Chunk },
                epoch: Epoch::new(epoch),
                number,
                born: MapSeq::new(born.min(died)),
                died: MapSeq::new(born.max(died)),
                died_ms,
                stored_bytes,
                generation: if map { KeyGeneration::FIRST } else { generation },
            }
        }
    }

    proptest! {
        #[test]
        fn usage_any_round_trips(
            mut chunks in prop::collection::vec(any_chunk(), 0..50),
            dead in prop::collection::vec(any_dead(), 0..20),
        ) {
            chunks.sort_by_key(|chunk| (chunk.epoch, chunk.seq));
            chunks.dedup_by_key(|chunk| (chunk.epoch, chunk.seq));
            let usage = Usage {
                basis: basis(),
                chunks,
                dead,
            };
            let mut payload = Vec::new();
            usage.encode(&mut payload).unwrap();
            prop_assert_eq!(Usage::decode_payload(&payload), Ok(usage));
        }

        #[test]
        fn usage_any_bytes_are_refused_or_sound(bytes: Vec<u8>) {
            if let Ok(usage) = Usage::decode_payload(&bytes) {
                let mut payload = Vec::new();
                usage.encode(&mut payload).unwrap();
                prop_assert_eq!(Usage::decode_payload(&payload), Ok(usage));
            }
        }
    }

    #[test]
    fn usage_taken_back_lives_as_then_and_keeps_account_of_all_since() {
        let chunk = |seq: u64, born: u64, needed_sectors| ChunkUse {
            epoch: Epoch::new(1),
            seq: ChunkSeq::new(seq),
            born: MapSeq::new(born),
            data_sectors: 100,
            needed_sectors,
            stored_bytes: 7,
            generation: KeyGeneration::FIRST,
        };
        let dead = |kind, number, born, died| DeadObject {
            kind,
            epoch: Epoch::new(1),
            number,
            born: MapSeq::new(born),
            died: MapSeq::new(died),
            died_ms: 5,
            stored_bytes: 7,
            generation: KeyGeneration::FIRST,
        };
        // Map 10 needed chunks 1 and 2 and map object 9; chunk 1 died at 12, chunk 0 before it.
        let to = Usage {
            basis: basis(),
            chunks: vec![chunk(1, 8, 100), chunk(2, 9, 60)],
            dead: vec![dead(ObjectKind::Chunk, 0, 7, 10)],
        };
        let now = Usage {
            basis: basis(),
            chunks: vec![chunk(2, 9, 10), chunk(3, 12, 100)],
            dead: vec![
                dead(ObjectKind::Chunk, 0, 7, 10),
                dead(ObjectKind::Chunk, 1, 8, 12),
                dead(ObjectKind::Map, 9, 9, 12),
                dead(ObjectKind::Map, 11, 11, 13),
            ],
        };
        let log = dead(ObjectKind::Chunk, 4, 20, 20);
        let maps = BTreeSet::from([(Epoch::new(1), MapSeq::new(9))]);
        let back = now.taken_back(&to, &maps, [log], MapSeq::new(20), 99);
        assert_eq!(back.chunks, to.chunks);
        let died = DeadObject {
            died_ms: 99,
            ..dead(ObjectKind::Chunk, 3, 12, 20)
        };
        let expected = [
            dead(ObjectKind::Chunk, 0, 7, 10),
            died,
            log,
            dead(ObjectKind::Map, 11, 11, 13),
        ];
        assert_eq!(back.dead, expected);
        // Nothing that was known is forgotten, and nothing both lives and is dead.
        let mut payload = Vec::new();
        back.encode(&mut payload).unwrap();
    }

    #[test]
    fn usage_without_later_keys_is_of_version_2_and_one_with_generation_0_is_refused() {
        let chunk = |generation| ChunkUse {
            epoch: Epoch::new(1),
            seq: ChunkSeq::new(2),
            born: MapSeq::new(3),
            data_sectors: 8,
            needed_sectors: 8,
            stored_bytes: 9,
            generation: KeyGeneration::new(generation).unwrap(),
        };
        let payload = |generation| {
            let usage = Usage {
                basis: basis(),
                chunks: vec![chunk(generation)],
                dead: Vec::new(),
            };
            let mut payload = Vec::new();
            usage.encode(&mut payload).unwrap();
            payload
        };
        let (first, mut later) = (payload(1), payload(2));
        assert_eq!((first[0], later[0]), (2, 3));
        assert_eq!(later.len(), first.len() + 1);
        assert_eq!(Usage::decode_payload(&first).unwrap().chunks, [chunk(1)]);
        assert_eq!(Usage::decode_payload(&later).unwrap().chunks, [chunk(2)]);
        let at = later.len() - 2;
        assert_eq!(later[at], 2);
        later[at] = 0;
        assert!(Usage::decode_payload(&later).is_err());
    }

    #[test]
    fn usage_of_a_full_chunk_takes_at_most_12_bytes() {
        let chunks = (0..10_000u64).map(|n| ChunkUse {
            epoch: Epoch::new(3),
            seq: ChunkSeq::new(100 + n),
            born: MapSeq::new(7 + n / 100),
            data_sectors: 16_384,
            needed_sectors: 9_000,
            stored_bytes: 8 << 20,
            generation: KeyGeneration::FIRST,
        });
        let usage = Usage {
            basis: basis(),
            chunks: chunks.collect(),
            dead: Vec::new(),
        };
        let mut payload = Vec::new();
        usage.encode(&mut payload).unwrap();
        assert!(payload.len() <= 12 * 10_000 + 32, "{}", payload.len());
    }
}
