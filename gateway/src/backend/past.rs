//! Opening a volume as it was at a time.
//!
//! What the volume was at a time is its log up to, and not with, the first chunk that was cut later. Times of
//! a log do not go back (see [`VolumeBackend::cut`](super::VolumeBackend)): of two hosts whose clocks differ, the
//! one that is behind goes on at the other's last time. So nothing that says to be later is ever in it, and with
//! a clock that ran ahead for a while, all that was written until the time came true counts as of one moment.
//!
//! The log is read from behind the newest map that is no later, up to where the next map goes on. If that
//! newest map is the head's, nothing of it was given up. Else:
//! 1. The map objects are listed, and the two found by halving: a map's time grows with epoch and number.
//! 2. The log between them is followed by its seals, as a rescue does. Numbers of writes must go on without a
//!    gap: they do not where the volume went back to a snapshot by a map that is gone.
//! 3. What the older map needs must be there: what the newest map needs, or counts as dead, was not deleted yet; of
//!    the dead the store is asked one by one. A map's list of chunks may name some that the map needs no more, for they are
//!    counted from time to time only: if one is gone, the map is read to see whether it needs it.
//!
//! Owns: finding the state. Does not own: how long it is kept ([`super::objects`]). Nothing is held for the
//! reader's sake: what goes while the state is open, when its retention passes, fails the reads that need it.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::StreamExt;
use quarry_objfmt::chunk::ChunkHeader;
use quarry_objfmt::head::Head;
use quarry_objfmt::map::{Basis, MapObjectId, ObjectKind, Usage};
use quarry_objfmt::{
    ChunkId, ChunkSeq, Epoch, MapSeq, RootRef, Sectors, TenantName, VolumeId, WriteSeq, keys,
};
use quarry_volume::DataError;
use quarry_volume::map::MapRoot;

use super::HeadCell;
use super::map_end::{self, MapEnd};
use super::objects::{ChunkName, LogChunk, Objects};
use super::open::{
    Claimed, LogLeft, OpenError, REOPENS_MAX, REPLAY_CONCURRENCY, Stop, is_of_a_later_key,
    load_map, load_usage, log_entry, replay_range, stretch,
};
use super::scan::Scan;
use super::sound::Unsound;
use crate::moment::Moment;
use crate::store::{Store, StoreError, Tag, each_key};

/// Chunks whose headers are read before it is seen whether they are too late.
const STRETCH: u64 = 128;

/// Epochs that are asked for what goes on behind a seal: so many attaches in a row may have died half-way.
const EPOCHS_TRIED_MAX: u32 = 4096;

/// Objects that are asked for side by side.
const LOOKS_AT_ONCE: usize = 32;

/// Opens a volume as it was at `at_ms`, whoever has it: nothing in the store changes.
///
/// # Errors
/// [`OpenError::Future`], [`OpenError::NotKept`], and those of opening it as it is now.
pub async fn open_at(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    at_ms: u64,
    now_ms: u64,
) -> Result<Claimed, OpenError> {
    if at_ms > now_ms {
        return Err(OpenError::Future {
            at: Moment::from_ms(at_ms),
            now: Moment::from_ms(now_ms),
        });
    }
    let (mut head, mut tag) = HeadCell::read(store, tenant, volume).await?;
    let mut tries = 0;
    loop {
        if head.deleted().is_some() {
            return Err(OpenError::Deleted);
        }
        let past = Past {
            store,
            tenant,
            head: &head,
            at_ms,
        };
        let error = match past.find().await {
            Ok(state) => return Ok(state.opened(tenant, &head, tag)),
            Err(error @ (OpenError::Damaged { .. } | OpenError::NotKept { .. })) => error,
            Err(error) => return Err(error),
        };
        // The writer may have moved on, and given up what this went by.
        let (now, now_tag) = HeadCell::read(store, tenant, volume).await?;
        if now == head || tries == REOPENS_MAX {
            return Err(error);
        }
        tries += 1;
        (head, tag) = (now, now_tag);
    }
}

/// What a volume was.
struct State {
    root: Arc<MapRoot>,
    root_ref: Option<RootRef>,
    root_write: WriteSeq,
    size: Sectors,
    headers: Vec<ChunkHeader>,
}

impl State {
    /// As a volume that is never written.
    fn opened(self, tenant: &TenantName, head: &Head, tag: Tag) -> Claimed {
        let (mut log, mut chunks) = (Vec::new(), Vec::new());
        let (mut stored_write, mut next_chunk) = (self.root_write, ChunkSeq::new(1));
        for header in &self.headers {
            let chunk = LogChunk::new(header, header.object_len());
            chunks.push(chunk.cut_at(header.cut_ms));
            log.push(header.map_entries());
            (stored_write, next_chunk) = (header.last_write, header.id.seq.next());
        }
        let info = Head {
            size: self.size,
            root: self.root_ref,
            root_write: self.root_write,
            log: Vec::new(),
            ..head.clone()
        };
        Claimed {
            head: HeadCell::new(tenant.clone(), info.clone(), tag),
            root: self.root,
            log,
            chunks,
            // Of the volume, which this does not change.
            objects: Objects::new(head.volume, Usage::default()),
            next_chunk,
            stored_write,
            kept_since: info.epoch,
            info,
            keys: None,
        }
    }
}

/// A map that the log is read from; the first of all is of nothing.
struct Base {
    /// `None` of the first of all.
    end: Option<MapEnd>,
    basis: Basis,
}

/// How large a volume was that had these sizes before and after, and these chunks in between: as large as it
/// may have been, for what it lacked then reads as zeroes.
fn size(around: &[Sectors], headers: &[ChunkHeader]) -> Sectors {
    let extents = headers.iter().flat_map(|header| &header.extents);
    let ends = extents.map(|extent| extent.end().get());
    let sizes = around.iter().map(|size| size.get());
    Sectors::new(sizes.chain(ends).max().unwrap_or(0))
}

/// How to find out which chunks a map needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// By the list that it has of them, which may name more.
    ItsList,
    /// By reading the map, if one of the list is gone.
    ItsMap,
}

/// The chunks in the list of the map that are not in the newest one's: what died first, and is gone first, comes first.
fn dead_chunks(end: &MapEnd, newest: Option<&Usage>) -> Vec<ChunkName> {
    let alive: BTreeSet<ChunkName> = newest
        .iter()
        .flat_map(|usage| &usage.chunks)
        .map(|chunk| (chunk.epoch, chunk.seq))
        .collect();
    let died: BTreeMap<ChunkName, u64> = newest
        .iter()
        .flat_map(|usage| &usage.dead)
        .filter(|object| object.kind == ObjectKind::Chunk)
        .map(|object| ((object.epoch, ChunkSeq::new(object.number)), object.died_ms))
        .collect();
    let listed = end.usage.iter().flat_map(|usage| &usage.chunks);
    let mut dead: Vec<ChunkName> = listed
        .map(|chunk| (chunk.epoch, chunk.seq))
        .filter(|name| !alive.contains(name))
        .collect();
    dead.sort_unstable_by_key(|name| (died.get(name).copied(), *name));
    dead
}

struct Past<'a> {
    store: &'a dyn Store,
    tenant: &'a TenantName,
    head: &'a Head,
    at_ms: u64,
}

impl Past<'_> {
    async fn find(&self) -> Result<State, OpenError> {
        let head = self.head;
        let usage = load_usage(self.store, self.tenant, head.volume, head.root).await?;
        let basis = usage.as_ref().map(|usage| usage.basis).unwrap_or_default();
        let Some(root) = head.root.filter(|_| basis.log_ms > self.at_ms) else {
            return self.of_newest_map(&basis).await;
        };
        let maps = self.maps(root).await?;
        let (below, above) = self.around(&maps, root).await?;
        let not_kept = async |why: &str| Err(self.not_kept(why, &maps, usage.as_ref()).await?);
        let base = match below {
            Some(end) => Base {
                basis: end.basis(),
                end: Some(end),
            },
            // Before the first map there was nothing.
            None if above.is_first => Base {
                end: None,
                basis: Basis {
                    log_ms: head.created_ms,
                    ..Basis::default()
                },
            },
            None => return not_kept("its map is gone").await,
        };
        if self.was_cut_off(&base.basis) {
            return not_kept("it was a clone, which has been cut off from its parent since").await;
        }
        let headers = match self.follow(&base, &above).await? {
            Ok(headers) => headers,
            Err(why) => return not_kept(&why).await,
        };
        if let Some(why) = self.unknown(&headers, base.basis.log_ms) {
            return not_kept(why).await;
        }
        let mut seen = BTreeMap::new();
        if let Some(end) = &base.end
            && let Some(gone) = self
                .gone(end, &maps, usage.as_ref(), &mut seen, By::ItsMap)
                .await?
        {
            return not_kept(&format!("{gone} is gone")).await;
        }
        let manifest = base.end.as_ref().map(|end| end.manifest.clone());
        Ok(State {
            root: Arc::new(MapRoot::new(manifest.unwrap_or_default())),
            root_ref: base.end.map(|end| end.root),
            root_write: base.basis.root_write,
            size: size(&[base.basis.size, above.size], &headers),
            headers,
        })
    }

    /// The head's own map, and its log as far as it was there.
    async fn of_newest_map(&self, basis: &Basis) -> Result<State, OpenError> {
        let head = self.head;
        let (mut headers, mut left) = (Vec::new(), LogLeft::default());
        for range in &head.log {
            let found = replay_range(self.store, self.tenant, range, head, None, &mut left).await?;
            headers.extend(found);
        }
        let known_ms = match head.root {
            Some(_) => basis.log_ms,
            None => head.created_ms,
        };
        let headers = match self.cut(headers, head.root_write) {
            Ok((headers, _)) => headers,
            Err(object) => {
                let reason = "its writes do not follow upon those before it".to_owned();
                return Err(OpenError::Damaged { object, reason });
            }
        };
        if let Some(why) = self.unknown(&headers, known_ms) {
            return Err(self.refused(why, None));
        }
        Ok(State {
            root: load_map(self.store, self.tenant, head.volume, head.root).await?,
            root_ref: head.root,
            root_write: head.root_write,
            size: size(&[basis.size, head.size], &headers),
            headers,
        })
    }

    /// The chunks that were cut by then, and whether there are later ones. The error is the key of a chunk
    /// whose writes do not go on where the one before it ends.
    fn cut(
        &self,
        mut headers: Vec<ChunkHeader>,
        mut last: WriteSeq,
    ) -> Result<(Vec<ChunkHeader>, bool), String> {
        for (n, header) in headers.iter().enumerate() {
            if header.first_write != last.next() {
                return Err(keys::chunk_key(self.tenant, header.id));
            }
            if header.cut_ms > self.at_ms || is_of_a_later_key(self.head, header) {
                headers.truncate(n);
                return Ok((headers, true));
            }
            last = header.last_write;
        }
        Ok((headers, false))
    }

    /// Why it cannot be told whether the state of these chunks is what was there.
    fn unknown(&self, headers: &[ChunkHeader], base_ms: u64) -> Option<&'static str> {
        match headers.last().map_or(base_ms, |header| header.cut_ms) {
            0 => Some("what was written says no time, for an older version wrote it"),
            ms if ms > self.at_ms => Some("the volume was made later"),
            _ => None,
        }
    }

    /// Whether the map may need objects of a volume that does not keep them for this one any more.
    const fn was_cut_off(&self, basis: &Basis) -> bool {
        basis.is_clones && self.head.parent.is_none()
    }

    /// The volume's map objects up to the head's, in the order in which they were made.
    async fn maps(&self, root: RootRef) -> Result<Vec<MapObjectId>, OpenError> {
        let volume = self.head.volume;
        let prefix = format!("{}map/", keys::volume_prefix(self.tenant, volume));
        let id = |key: &str| {
            let (epoch, seq) = key[prefix.len()..].split_once('/')?;
            let id = MapObjectId {
                volume,
                epoch: Epoch::new(u32::from_str_radix(epoch, 16).ok()?),
                seq: MapSeq::new(u64::from_str_radix(seq, 16).ok()?),
            };
            (keys::map_key(self.tenant, volume, id.epoch, id.seq) == key)
                .then_some((id.epoch, id.seq))
        };
        let mut up_to_head = BTreeSet::new();
        let newest = (root.epoch, root.seq);
        let take = |key: &str| up_to_head.extend(id(key).filter(|name| *name <= newest));
        each_key(self.store, &prefix, take).await?;
        // What a rollback stored that was broken off is no state that the volume ever had.
        let maps = map_end::named(&up_to_head).into_iter();
        let maps = maps.map(|(epoch, seq)| MapObjectId { volume, epoch, seq });
        Ok(maps.collect())
    }

    /// The newest map that is no later than the time, and what the oldest later one is of.
    async fn around(
        &self,
        maps: &[MapObjectId],
        root: RootRef,
    ) -> Result<(Option<MapEnd>, Basis), OpenError> {
        let (mut below, mut above) = (None, None);
        let (mut low, mut high) = (0, maps.len());
        while low < high {
            let middle = low.midpoint(high);
            match self.first_of(&maps[middle..high]).await? {
                Some((n, end)) if end.basis().log_ms <= self.at_ms => {
                    low = middle + n + 1;
                    below = Some(end);
                }
                later => {
                    above = later.map(|(_, end)| end).or(above);
                    high = middle;
                }
            }
        }
        match above {
            Some(above) => Ok((below, above.basis())),
            None => {
                let object = keys::map_key(self.tenant, self.head.volume, root.epoch, root.seq);
                let reason = "the volume's map is missing".to_owned();
                Err(OpenError::Damaged { object, reason })
            }
        }
    }

    /// The first of the objects that has a manifest and says what it is of. Others are a part of the map whose
    /// manifest comes next, or damaged: from an older map there is only more of the log to read.
    async fn first_of(&self, maps: &[MapObjectId]) -> Result<Option<(usize, MapEnd)>, OpenError> {
        for (n, id) in maps.iter().enumerate() {
            match MapEnd::read(self.store, self.tenant, *id).await {
                Ok(Some(end)) if end.usage.is_some() => {
                    if self.was_named(&end).await? {
                        return Ok(Some((n, end)));
                    }
                }
                Ok(_) | Err(Unsound::Damaged(_)) => {}
                // Deleted since.
                Err(Unsound::Store(StoreError::NotFound { .. })) => {}
                Err(Unsound::Store(error)) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// Whether a head named this map, if it is of a rollback: then the place before its log stays empty. Else the volume was
    /// attached again with the log that it had, and that place sealed. Its number need not have been given again.
    async fn was_named(&self, end: &MapEnd) -> Result<bool, OpenError> {
        let basis = end.basis();
        let Some(empty) = basis.log_end.get().checked_sub(1).filter(|_| basis.is_back) else {
            return Ok(true);
        };
        let id = self.chunk(end.root.epoch, empty);
        Ok(log_entry(self.store, self.tenant, id).await?.is_none())
    }

    /// The chunks from behind `base` on that were cut by then, up to where the map of `above` goes on. The
    /// inner error says why they cannot be had.
    async fn follow(
        &self,
        base: &Base,
        above: &Basis,
    ) -> Result<Result<Vec<ChunkHeader>, String>, OpenError> {
        let begun = base.end.as_ref().map_or(Epoch::ZERO, |end| end.root.epoch);
        let mut at = base.basis.log_end.max(ChunkSeq::new(1));
        let mut last = base.basis.root_write;
        let mut kept = Vec::new();
        let mut epoch = None;
        let mut sealed_by = begun;
        let mut left = LogLeft::default();
        while at < above.log_end {
            let of = match epoch {
                Some(epoch) => epoch,
                None => match self.epoch_at(sealed_by, at).await? {
                    Some(found) => *epoch.insert(found),
                    // The volume went back: that was all.
                    None if above.is_back && at.next() == above.log_end => break,
                    None => return Ok(Err(format!("chunk {at} of its log is gone"))),
                },
            };
            let end = above.log_end.get().min(at.get() + STRETCH);
            let first = self.chunk(of, at.get());
            let (headers, stop) = stretch(self.store, self.tenant, first, end, &mut left).await?;
            if let Some(newest) = headers.last() {
                at = newest.id.seq.next();
            }
            let (mut headers, is_cut) = match self.cut(headers, last) {
                Ok(cut) => cut,
                Err(_) => {
                    return Ok(Err(
                        "the volume has gone back to a snapshot since".to_owned()
                    ));
                }
            };
            last = headers.last().map_or(last, |header| header.last_write);
            kept.append(&mut headers);
            match stop {
                _ if is_cut => break,
                Stop::Whole => {}
                Stop::Sealed(seal) => (epoch, sealed_by) = (None, seal.by),
                Stop::Missing => return Ok(Err(format!("chunk {at} of its log is gone"))),
            }
        }
        Ok(Ok(kept))
    }

    /// The lowest epoch from `from` on that has anything at a place of the log.
    async fn epoch_at(&self, from: Epoch, at: ChunkSeq) -> Result<Option<Epoch>, OpenError> {
        let most = from.get().saturating_add(EPOCHS_TRIED_MAX);
        let epochs = from.get()..=self.head.epoch.get().min(most);
        let mut looks = Box::pin(
            futures::stream::iter(epochs)
                .map(|epoch| async move {
                    let id = self.chunk(Epoch::new(epoch), at.get());
                    (epoch, log_entry(self.store, self.tenant, id).await)
                })
                .buffered(REPLAY_CONCURRENCY),
        );
        while let Some((epoch, entry)) = looks.next().await {
            if entry?.is_some() {
                return Ok(Some(Epoch::new(epoch)));
            }
        }
        Ok(None)
    }

    const fn chunk(&self, epoch: Epoch, seq: u64) -> ChunkId {
        ChunkId {
            volume: self.head.volume,
            epoch,
            seq: ChunkSeq::new(seq),
        }
    }

    /// The key of an object that the map needs and that is not there. `seen` keeps what the store was asked.
    async fn gone(
        &self,
        end: &MapEnd,
        maps: &[MapObjectId],
        newest: Option<&Usage>,
        seen: &mut BTreeMap<String, bool>,
        by: By,
    ) -> Result<Option<String>, OpenError> {
        let root = MapRoot::new(end.manifest.clone());
        let listed = |id: &MapObjectId| (id.epoch, id.seq);
        let unlisted = root.objects().into_iter().filter(|id| {
            id.volume != self.head.volume || maps.binary_search_by_key(&listed(id), listed).is_err()
        });
        let key = |id: MapObjectId| keys::map_key(self.tenant, id.volume, id.epoch, id.seq);
        let gone = self.first_gone(unlisted.map(key).collect(), seen).await?;
        if gone.is_some() {
            return Ok(gone);
        }
        let mut dead = dead_chunks(end, newest);
        let key =
            |(epoch, seq): &ChunkName| keys::chunk_key(self.tenant, self.chunk(*epoch, seq.get()));
        let gone = self
            .first_gone(dead.iter().map(key).collect(), seen)
            .await?;
        if gone.is_none() || by == By::ItsList {
            return Ok(gone);
        }
        let needed = self.needed(&root).await?;
        dead.retain(|name| needed.contains(name));
        self.first_gone(dead.iter().map(key).collect(), seen).await
    }

    /// The first of these keys under which nothing is.
    async fn first_gone(
        &self,
        asked: Vec<String>,
        seen: &mut BTreeMap<String, bool>,
    ) -> Result<Option<String>, OpenError> {
        let look = |key: String| {
            let known = seen.get(&key).copied();
            async move {
                if let Some(known) = known {
                    return Ok((key, known));
                }
                match self.store.get_prefix(&key, 1).await {
                    Ok(_) => Ok((key, true)),
                    Err(StoreError::NotFound { .. }) => Ok((key, false)),
                    Err(error) => Err(error),
                }
            }
        };
        let looks: Vec<_> = asked.into_iter().map(look).collect();
        let mut looks = Box::pin(futures::stream::iter(looks).buffered(LOOKS_AT_ONCE));
        while let Some(look) = looks.next().await {
            let (key, is_there) = look?;
            seen.insert(key.clone(), is_there);
            if !is_there {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// The volume's own chunks that the map names.
    async fn needed(&self, root: &MapRoot) -> Result<BTreeSet<ChunkName>, OpenError> {
        let mut needed = BTreeSet::new();
        let mut scan = Scan::of(self.store, self.tenant, Vec::new(), root.runs(), true);
        loop {
            match scan.next().await {
                Ok(Some(entry)) => needed.extend(Objects::chunk_of(self.head.volume, &entry)),
                Ok(None) => return Ok(needed),
                Err(DataError { object, reason }) => {
                    return Err(OpenError::Damaged { object, reason });
                }
            }
        }
    }

    /// The refusal, with the time of the oldest map that is whole: if one is, all later ones are.
    async fn not_kept(
        &self,
        why: &str,
        maps: &[MapObjectId],
        newest: Option<&Usage>,
    ) -> Result<OpenError, OpenError> {
        let mut seen = BTreeMap::new();
        let mut oldest = None;
        let (mut low, mut high) = (0, maps.len());
        while low < high {
            let middle = low.midpoint(high);
            let Some((n, end)) = self.first_of(&maps[middle..high]).await? else {
                high = middle;
                continue;
            };
            let ms = end.basis().log_ms;
            let is_whole = ms > self.at_ms
                && !self.was_cut_off(&end.basis())
                && self
                    .gone(&end, maps, newest, &mut seen, By::ItsList)
                    .await?
                    .is_none();
            if is_whole {
                (oldest, high) = (Some(ms), middle);
            } else {
                low = middle + n + 1;
            }
        }
        Ok(self.refused(why, oldest))
    }

    fn refused(&self, why: &str, oldest_ms: Option<u64>) -> OpenError {
        OpenError::NotKept {
            at: Moment::from_ms(self.at_ms),
            why: why.to_owned(),
            oldest: oldest_ms.map(Moment::from_ms),
        }
    }
}
