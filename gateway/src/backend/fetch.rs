//! Frames and map nodes from the store, each once for all volumes of the daemon that want it.
//!
//! Owns: the RAM tier of fetched frames, and joining of fetches. Does not own: which frames a volume lacks
//! (`quarry-volume`), the clean data on the cache device (`quarry-cache`), retries (the store lane).
//!
//! Clones read their parent's chunks by the parent's names, so what one of them fetches is what the others want:
//! a hundred that boot the same image at once make one GET of each run of it. What a name stands for is said by the
//! tenant's own store, so names here are a group's: tenants never meet, whatever ids their maps name.
//!
//! A fetch is no volume's own: it goes on to its end when the volume that began it is detached or fenced, and when it
//! fails the others fail with it, for it has been tried as often as they would. Who waits for somebody waits behind the
//! background if a fetch of the background's was first, as it does for its own readahead; but for [`JOIN_TIME_MAX`] at most.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, join, join_all, select};
use quarry_objfmt::chunk::open_frame;
use quarry_objfmt::frame::FRAME_HEADER_LEN;
use quarry_objfmt::{ChunkId, VolumeId, keys};
use quarry_volume::map::{Node, NodeRef};
use quarry_volume::{DataError, Fetch, FrameName, FrameRef};

use super::flights::{Flight, Flights, Sought, Waiting};
use super::{Unsound, VolumeBackend, aside, insist};
use crate::reactor::errand;
use crate::store::{Store, StoreError};
use crate::trace::{self, Step};

/// What a frame costs in the RAM tier beside its content: its entry, its header, and what it takes to begin a page.
const FRAME_ENTRY_BYTES: usize = 128 + 16 + 4096;

/// Frames up to this size together, stored and decoded, are decoded where they arrive: tens of microseconds, as many as it
/// takes to wake another thread, for which a read that waits would wait. Two, if nobody says otherwise. Those that are stored
/// as they are count an eighth: the checksum of all that one fetch brings, 1 MiB, takes a tenth of a millisecond.
const DECODED_HERE_BYTES_MAX: usize = 132 << 10;

/// How long a read that somebody waits for waits for another's fetch, before it asks for itself too: longer than a sound
/// store takes.
const JOIN_TIME_MAX: Duration = Duration::from_secs(2);

/// What the daemon has fetched and has in memory, and what it fetches just now; shared by all volumes.
pub struct Fetches {
    held: moka::sync::Cache<FrameName, Bytes>,
    frames: Flights<FrameName, Bytes>,
    nodes: Flights<(u32, NodeRef), Arc<Node>>,
}

impl Fetches {
    /// With room for `ram` bytes of frames.
    #[must_use]
    pub fn new(ram: u64) -> Arc<Self> {
        let cost = |_: &FrameName, frame: &Bytes| {
            u32::try_from(frame.len() + FRAME_ENTRY_BYTES).unwrap_or(u32::MAX)
        };
        let held = moka::sync::Cache::builder();
        Arc::new(Self {
            held: held.max_capacity(ram).weigher(cost).build(),
            frames: Flights::default(),
            nodes: Flights::default(),
        })
    }

    /// Drops what memory has of a volume's chunks for a group, and answers how many bytes that were.
    pub fn evict(&self, group: u32, volume: VolumeId) -> u64 {
        let mut bytes = 0;
        for (name, frame) in &self.held {
            if name.0 == group && name.1.volume == volume {
                self.held.invalidate(&*name);
                bytes += frame.len() as u64;
            }
        }
        bytes
    }
}

/// What a volume had fetched, since it was attached.
#[derive(Default, Debug)]
pub(super) struct FetchCounts {
    gets: AtomicU64,
    bytes: AtomicU64,
    shared_bytes: AtomicU64,
}

/// As [`FetchCounts`], at one time. Direct reads are not in it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Fetched {
    /// Ranged GETs of chunks.
    pub gets: u64,
    /// Stored bytes that they asked for.
    pub bytes: u64,
    /// Stored bytes that were in memory, or on their way for another volume.
    pub shared_bytes: u64,
}

/// What a frame holds, or that it is damaged or gone.
type Content = Result<Bytes, DataError>;

/// A frame that this fetch must bring, its place among those asked for, and the duty.
type Duty<'a> = (usize, FrameRef, Flight<'a, FrameName, Bytes>);

impl VolumeBackend {
    /// What was fetched for this volume.
    pub fn fetched(&self) -> Fetched {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Fetched {
            gets: read(&self.fetched.gets),
            bytes: read(&self.fetched.bytes),
            shared_bytes: read(&self.fetched.shared_bytes),
        }
    }

    /// The raw contents of the frames: from memory, from whoever fetches them already, the rest by a GET for each
    /// run of neighbours.
    pub(super) async fn fetch(&self, fetch: &Fetch, foreground: bool) -> Vec<Content> {
        let mut contents = vec![None; fetch.frames.len()];
        // Again only if another's fetch was given up, which then is nobody's.
        while contents.contains(&None) {
            self.fetch_missing(fetch, foreground, &mut contents).await;
        }
        contents.into_iter().flatten().collect()
    }

    async fn fetch_missing(
        &self,
        fetch: &Fetch,
        foreground: bool,
        contents: &mut [Option<Content>],
    ) {
        let Fetches { held, frames, .. } = &*self.common.fetches;
        let (mut ours, mut theirs): (Vec<Duty<'_>>, _) = (Vec::new(), Vec::new());
        let mut shared_bytes = 0;
        for (place, frame) in fetch.frames.iter().enumerate() {
            if contents[place].is_some() {
                continue;
            }
            let name = (self.common.group, fetch.chunk, frame.index);
            match frames.seek(name, || held.get(&name)) {
                Sought::Held(raw) => {
                    shared_bytes += u64::from(frame.stored_len);
                    contents[place] = Some(Ok(raw));
                }
                Sought::Theirs(waiting) => {
                    shared_bytes += u64::from(frame.stored_len);
                    let chunk = fetch.chunk;
                    theirs.push(async move {
                        let own = async || {
                            let got = self.get_frames(chunk, &[*frame], true).await;
                            got.map(|mut contents| contents.remove(0))
                        };
                        (place, joined(waiting, foreground, own).await)
                    });
                }
                Sought::Ours(flight) => ours.push((place, *frame, flight)),
            }
        }
        let count = &self.fetched.shared_bytes;
        count.fetch_add(shared_bytes, Ordering::Relaxed);
        let brought = runs(ours)
            .into_iter()
            .map(|run| self.bring(fetch.chunk, run, foreground));
        let (brought, theirs) = join(join_all(brought), join_all(theirs)).await;
        for (place, content) in brought.into_iter().flatten() {
            contents[place] = Some(content);
        }
        for (place, landed) in theirs {
            contents[place] = landed;
        }
    }

    /// Brings neighbouring frames by one GET, for whoever waits for them.
    async fn bring(
        &self,
        chunk: ChunkId,
        run: Vec<Duty<'_>>,
        foreground: bool,
    ) -> Vec<(usize, Content)> {
        let frames: Vec<FrameRef> = run.iter().map(|(_, frame, _)| *frame).collect();
        let contents = match self.get_frames(chunk, &frames, foreground).await {
            Ok(contents) => contents.into_iter().map(Ok).collect(),
            // Each for itself: who waits for a sound one is not to suffer for its neighbour.
            Err(_) if frames.len() > 1 => {
                let alone = frames.iter().map(|frame| async move {
                    let got = self.get_frames(chunk, &[*frame], foreground).await;
                    got.map(|mut contents| contents.remove(0))
                });
                join_all(alone).await
            }
            Err(error) => vec![Err(error)],
        };
        let landed = run.into_iter().zip(contents);
        let landed = landed.map(|((place, frame, flight), content)| {
            if let Ok(raw) = &content {
                // Before it lands: who looks after that finds it here.
                let name = (self.common.group, chunk, frame.index);
                self.common.fetches.held.insert(name, raw.clone());
            }
            flight.land(content.clone());
            (place, content)
        });
        landed.collect()
    }

    /// The raw contents of neighbouring frames, by one GET.
    async fn get_frames(
        &self,
        chunk: ChunkId,
        frames: &[FrameRef],
        foreground: bool,
    ) -> Result<Vec<Bytes>, DataError> {
        let object = keys::chunk_key(self.head.tenant(), chunk);
        let offset = u64::from(frames[0].stored_offset);
        let lens: Vec<usize> = frames.iter().map(|f| f.stored_len as usize).collect();
        let bytes = lens.iter().sum::<usize>() as u64;
        let store = self.common.reads(foreground);
        let attempt = || async {
            self.fetched.gets.fetch_add(1, Ordering::Relaxed);
            self.fetched.bytes.fetch_add(bytes, Ordering::Relaxed);
            // Content that is stored as it is goes to the cache device from where it arrives.
            let stored = store.get_parts(&object, offset, &lens, FRAME_HEADER_LEN);
            let stored = stored.await.map_err(unsound)?;
            let decoded = self.decode(chunk, frames, stored).await;
            decoded.map_err(Unsound::Damaged)
        };
        let decoded = insist(attempt).await;
        decoded.map_err(|unsound| damaged(object, &unsound))
    }

    async fn decode(
        &self,
        chunk: ChunkId,
        frames: &[FrameRef],
        stored: Vec<Bytes>,
    ) -> Result<Vec<Bytes>, String> {
        let (frames, frame_sectors) = (frames.to_vec(), self.head.frame_sectors());
        let keys = self.keys();
        let raw_len = frame_sectors as usize * 512;
        let is_raw = |frame: &Bytes| keys.is_none() && frame.len() == FRAME_HEADER_LEN + raw_len;
        let bytes: usize = stored
            .iter()
            .map(|frame| match is_raw(frame) {
                true => frame.len() / 8,
                false => frame.len().max(raw_len),
            })
            .sum();
        let are_raw = stored.iter().all(is_raw);
        let decode = move || {
            let keys = keys.as_deref();
            let open = |(frame, stored): (&FrameRef, &Bytes)| {
                open_frame(stored, chunk, frame.index, frame_sectors, keys)
                    .map_err(|e| e.to_string())
            };
            frames.iter().zip(&stored).map(open).collect()
        };
        let _decoding = trace::open(Step::Decode, None);
        if !are_raw {
            // A reactor has others to serve in that time.
            errand::elsewhere().await;
        }
        if bytes <= DECODED_HERE_BYTES_MAX {
            return decode();
        }
        // Milliseconds at most for 1 MiB; yet long enough to hold up other tasks' wake-ups.
        aside(decode).await.map_err(|e| e.to_string())?
    }

    pub(super) async fn load_nodes(
        &self,
        nodes: &[NodeRef],
        foreground: bool,
    ) -> Result<Vec<(NodeRef, Arc<Node>)>, DataError> {
        // All to their end, whatever becomes of one: others may wait for them.
        let loads = nodes.iter().map(|node| self.load_node(*node, foreground));
        join_all(loads).await.into_iter().collect()
    }

    async fn load_node(
        &self,
        node: NodeRef,
        foreground: bool,
    ) -> Result<(NodeRef, Arc<Node>), DataError> {
        let name = (self.common.group, node);
        let loaded = loop {
            // What was loaded is kept beside the volumes' state, where this does not look.
            match self.common.fetches.nodes.seek(name, || None) {
                Sought::Held(node) => break Ok(node),
                Sought::Theirs(waiting) => {
                    let own = async || self.get_node(node, true).await;
                    if let Some(landed) = joined(waiting, foreground, own).await {
                        break landed;
                    }
                }
                Sought::Ours(flight) => {
                    let loaded = self.get_node(node, foreground).await;
                    flight.land(loaded.clone());
                    break loaded;
                }
            }
        };
        loaded.map(|loaded| (node, loaded))
    }

    async fn get_node(&self, node: NodeRef, foreground: bool) -> Result<Arc<Node>, DataError> {
        let store = self.common.reads(foreground);
        let id = node.object;
        let object = keys::map_key(self.head.tenant(), id.volume, id.epoch, id.seq);
        let range = u64::from(node.offset)..u64::from(node.offset) + u64::from(node.len);
        let attempt = || async {
            let bytes = get_range(&**store, &object, &range).await?;
            Node::decode(&node, &bytes).map_err(|error| Unsound::Damaged(error.to_string()))
        };
        let decoded = insist(attempt).await;
        decoded
            .map(Arc::new)
            .map_err(|unsound| damaged(object, &unsound))
    }
}

/// What another's fetch brings; `None` if it was given up. Somebody who waits for it does not do so for long, for it may
/// be behind all of the background: then whichever is first, that or a fetch of one's own.
async fn joined<V: Clone, F: Future<Output = Result<V, DataError>>>(
    waiting: Waiting<V>,
    foreground: bool,
    own: impl FnOnce() -> F,
) -> Option<Result<V, DataError>> {
    let joined = trace::open(Step::Joined, None);
    if !foreground {
        return waiting.await.ok();
    }
    if let Ok(landed) = tokio::time::timeout(JOIN_TIME_MAX, waiting.clone()).await {
        return landed.ok();
    }
    drop(joined);
    match select(waiting, pin!(own())).await {
        Either::Left((Ok(landed), _)) => Some(landed),
        Either::Left((Err(_), own)) => Some(own.await),
        Either::Right((own, _)) => Some(own),
    }
}

/// Cuts what is to be brought where one does not start where the one before it ended.
fn runs(duties: Vec<Duty<'_>>) -> Vec<Vec<Duty<'_>>> {
    let mut runs: Vec<Vec<Duty<'_>>> = Vec::new();
    let mut end = None;
    for duty in duties {
        let frame = duty.1;
        match runs.last_mut() {
            Some(run) if end == Some(frame.stored_offset) => run.push(duty),
            _ => runs.push(vec![duty]),
        }
        end = frame.stored_offset.checked_add(frame.stored_len);
    }
    runs
}

/// A part of an object that must be there: that it is not is damage, too.
pub(super) async fn get_range(
    store: &dyn Store,
    object: &str,
    range: &Range<u64>,
) -> Result<Bytes, Unsound> {
    let got = store.get_range(object, range.clone()).await;
    got.map_err(unsound)
}

fn unsound(error: StoreError) -> Unsound {
    Unsound::Damaged(error.to_string())
}

pub(super) fn damaged(object: String, unsound: &Unsound) -> DataError {
    DataError {
        object,
        reason: unsound.to_string(),
    }
}
