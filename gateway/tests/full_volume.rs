//! A volume full of extents of 4 KiB, in random places of the store, that is overwritten at random: what its map
//! costs, and how soon it is open again. All is real but the contents of chunks, which are zeroes that the store
//! makes up. `QUARRY_TEST_EXTENTS` sets how many extents it has, a power of two (2^17, so 512 MiB; 2^28 is 1 TiB), and
//! `QUARRY_TEST_WRITES` how many are written then (half as many).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use quarry_cache::{AlignedBuf, BlockDevice, Geometry};
use quarry_full_volume::{
    EPOCH, FRAME_SECTORS, FullVolume, HEADER_BYTES, chunk_of_key, read_frames,
};
use quarry_gateway::backend::Buffers;
use quarry_gateway::backend::open::{Claim, Claimed, claim};
use quarry_gateway::backend::{Common, Fetches, ReclaimSettings, VolumeBackend};
use quarry_gateway::fair::{Gate, plain_share};
use quarry_gateway::reactor::{BackendSink as _, Message, ReactorHandle};
use quarry_gateway::store::{FolderStore, Store, StoreError, Tag};
use quarry_objfmt::chunk::ChunkHeader;
use quarry_objfmt::codec::Compression;
use quarry_objfmt::{
    CHUNK_PREFIX_LEN, CacheId, ChunkId, ChunkSeq, Epoch, Head, Lba, LbaRange, Location, MapEntry,
    Sectors, TenantName, VolumeId, VolumeName, WriteSeq, keys,
};
use quarry_volume::{
    Action, CheckpointPlan, ChunkPlan, Event, ExtentSource, PlannedExtent, Tuning,
};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::mpsc;

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
const PAGE: u64 = 4096;
/// Extents of a chunk, of 8 sectors each.
const CHUNK_EXTENTS: u64 = 2048;
/// How far the store is that the volume is opened from.
const DISTANCE: Duration = Duration::from_millis(30);

fn full(extents: u64) -> FullVolume {
    FullVolume {
        id: VOLUME,
        extents,
        extent_sectors: 8,
        // Three tenths as much again is from before.
        dead_sectors: 2048 * 8 * 30 / 100,
    }
}

/// A folder that holds all but the frames of chunks.
#[derive(Debug)]
struct Simulated {
    folder: FolderStore,
    tenant: TenantName,
    /// Length of each chunk stored since, and of its header.
    stored: parking_lot::Mutex<BTreeMap<(u32, u64), (u64, u64)>>,
    chunk_bytes: AtomicU64,
    moved_bytes: AtomicU64,
    map_bytes: AtomicU64,
    map_read_bytes: AtomicU64,
    chunk_read_bytes: AtomicU64,
}

#[async_trait]
impl Store for Simulated {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        self.folder.get(key).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let len = range.end - range.start;
        let Some(chunk) = chunk_of_key(key) else {
            self.map_read_bytes.fetch_add(len, Ordering::Relaxed);
            return self.folder.get_range(key, range).await;
        };
        self.chunk_read_bytes.fetch_add(len, Ordering::Relaxed);
        let name = (chunk.epoch.get(), chunk.seq.get());
        let stored = self.stored.lock().get(&name).copied();
        let (end, header) = stored.unwrap_or((u64::MAX, HEADER_BYTES));
        Ok(Bytes::from(read_frames(chunk, range, header, end).unwrap()))
    }

    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        self.folder.get_prefix(key, len).await
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        let len = body.len() as u64;
        let Some(chunk) = chunk_of_key(key) else {
            if key.contains("/map/") {
                self.map_bytes.fetch_add(len, Ordering::Relaxed);
            }
            return self.folder.create(key, body).await;
        };
        let sum = match chunk.seq < ChunkSeq::COMPACTED {
            true => &self.chunk_bytes,
            false => &self.moved_bytes,
        };
        sum.fetch_add(len, Ordering::Relaxed);
        let header = match ChunkHeader::encoded_len(&body[..CHUNK_PREFIX_LEN]) {
            Ok(header) => header,
            // A seal.
            Err(_) => return self.folder.create(key, body).await,
        };
        let name = (chunk.epoch.get(), chunk.seq.get());
        self.stored.lock().insert(name, (len, header as u64));
        self.folder.create(key, body.slice(..header)).await
    }

    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        self.folder.replace(key, body, seen).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.folder.delete(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.folder.list(prefix).await
    }

    fn describe(&self) -> String {
        format!("{}, of {}", self.folder.describe(), self.tenant)
    }
}

/// The same, some way off.
#[derive(Debug)]
struct Distant(Arc<Simulated>, AtomicU64);

impl Distant {
    async fn travel(&self) {
        self.1.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(DISTANCE).await;
    }
}

#[async_trait]
impl Store for Distant {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        self.travel().await;
        self.0.get(key).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.travel().await;
        self.0.get_range(key, range).await
    }

    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        self.travel().await;
        self.0.get_prefix(key, len).await
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        self.travel().await;
        self.0.create(key, body).await
    }

    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        self.travel().await;
        self.0.replace(key, body, seen).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.travel().await;
        self.0.delete(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.travel().await;
        self.0.list(prefix).await
    }

    fn describe(&self) -> String {
        self.0.describe()
    }
}

/// A cache device of zeroes.
struct Zeroes;

impl BlockDevice for Zeroes {
    fn id(&self) -> CacheId {
        CacheId::from_bytes([1; 16])
    }

    fn geometry(&self) -> Geometry {
        unreachable!("nobody asks")
    }

    fn read_at(&self, buf: &mut AlignedBuf, _: u64) -> std::io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _: &AlignedBuf, _: u64) -> std::io::Result<()> {
        unreachable!("nothing is written")
    }

    fn sync(&self) -> std::io::Result<()> {
        unreachable!("nothing is synced")
    }
}

/// Writes the map of the full volume and its head.
async fn fill(store: &dyn Store, tenant: &TenantName, extents: u64) {
    let full = full(extents);
    let name = VolumeName::new("db").unwrap();
    let head = Head {
        compression: Compression::None,
        frame_sectors: FRAME_SECTORS,
        ..Head::fresh(VOLUME, tenant, &name, Sectors::new(full.sectors()), 1)
    };
    let put = async |seq, body: Vec<u8>| {
        let key = keys::map_key(tenant, VOLUME, EPOCH, seq);
        store.create(&key, body.into()).await.map(drop)
    };
    let head = full.build(head, put).await.unwrap();
    let key = keys::head_key(tenant, VOLUME);
    store.create(&key, head.encode().into()).await.unwrap();
}

fn claimant(force: bool) -> Claim {
    Claim {
        cache: CacheId::from_bytes([1; 16]),
        host: "a".to_owned(),
        now_ms: 1,
        force,
        discard_unsent: false,
        must_be_ours: false,
    }
}

/// A backend whose volume is this test.
struct Driven {
    backend: Arc<VolumeBackend>,
    inbox: mpsc::Receiver<Message>,
    next_chunk: ChunkSeq,
    next_write: WriteSeq,
    pages: u64,
    rng: SmallRng,
    epoch: Epoch,
    /// What was stored since the last checkpoint, by page.
    tail: BTreeMap<u64, MapEntry>,
}

impl Driven {
    fn new(store: &Arc<Simulated>, claimed: Claimed, pages: u64) -> Self {
        let (reactor, inbox) = ReactorHandle::detached().unwrap();
        let common = Common {
            store: store.clone(),
            background: store.clone(),
            device: Arc::new(Zeroes),
            direct: Arc::new(LazyLock::new(Box::new(|| Err("not here".to_owned())))),
            kept_writes: Default::default(),
            fetches: Fetches::new(0),
            share: plain_share(),
            group: 0,
            buffers: Buffers::default(),
            uploads: Gate::new(1),
            compactions: Gate::new(1),
            reclaim: ReclaimSettings {
                horizon: Duration::ZERO,
                debt_min: 0,
                chunk_sectors: u32::try_from(CHUNK_EXTENTS * 8).unwrap(),
                window_bytes: 128 << 20,
                percent: 100,
            },
            orphan_interval: Duration::from_secs(86_400),
            now_ms: || 1,
            runtime: tokio::runtime::Handle::current(),
            tracer: None,
        };
        let (next_chunk, epoch) = (claimed.next_chunk, claimed.info.epoch);
        let next_write = claimed.stored_write.next();
        let key = reactor.new_key();
        let backend = VolumeBackend::new(common, "acme/db".to_owned(), claimed, key, reactor);
        Self {
            backend,
            inbox,
            next_chunk,
            next_write,
            pages,
            rng: SmallRng::seed_from_u64(1),
            epoch,
            tail: BTreeMap::new(),
        }
    }

    async fn event(&mut self) -> Event {
        loop {
            match self.inbox.recv().await {
                Some(Message::VolumeEvent { event, .. }) => return event,
                Some(_) => {}
                None => panic!("the backend is gone"),
            }
        }
    }

    /// A chunk of random pages.
    async fn upload(&mut self) {
        let mut pages = std::collections::BTreeSet::new();
        while (pages.len() as u64) < CHUNK_EXTENTS.min(self.pages / 2) {
            pages.insert(self.rng.random_range(0..self.pages));
        }
        let extents = pages.iter().map(|page| PlannedExtent {
            range: LbaRange::new(Lba::new(page * 8), Sectors::new(8)).unwrap(),
            source: ExtentSource::Cache { offset: 0 },
        });
        let first_write = self.next_write;
        let last_write = WriteSeq::new(first_write.get() + pages.len() as u64 - 1);
        let id = ChunkId {
            volume: VOLUME,
            epoch: self.epoch,
            seq: self.next_chunk,
        };
        self.backend.submit(Action::Upload(ChunkPlan {
            id,
            first_write,
            last_write,
            extents: extents.collect(),
        }));
        (self.next_chunk, self.next_write) = (id.seq.next(), last_write.next());
        loop {
            if let Event::Uploaded { entries, .. } = self.event().await {
                for entry in entries {
                    for part in 0..entry.len / 8 {
                        let Location::Data(mut at) = entry.location else {
                            unreachable!("all is data")
                        };
                        at.raw += part * 8;
                        let start = Lba::new(entry.start.get() + u64::from(part) * 8);
                        let (len, location) = (8, Location::Data(at));
                        let page = start.get() / 8;
                        self.tail.insert(
                            page,
                            MapEntry {
                                start,
                                len,
                                location,
                            },
                        );
                    }
                }
                return;
            }
        }
    }

    async fn checkpoint(&mut self) {
        let log = std::mem::take(&mut self.tail).into_values().collect();
        self.backend.submit(Action::Checkpoint(CheckpointPlan {
            upto: ChunkSeq::new(self.next_chunk.get() - 1),
            last_write: WriteSeq::new(self.next_write.get() - 1),
            log,
        }));
        while !matches!(self.event().await, Event::Checkpointed { .. }) {}
    }

    /// Waits until reclaiming has done nothing for some time.
    async fn settle(&mut self, store: &Simulated) {
        let quiet = Duration::from_secs(2);
        let mut before = (0, 0, 0, 0);
        loop {
            while tokio::time::timeout(quiet, self.event()).await.is_ok() {}
            let moved = self.backend.reclaimed().moved_bytes;
            let read = store.map_read_bytes.load(Ordering::Relaxed);
            let moving = store.chunk_read_bytes.load(Ordering::Relaxed);
            let now = (moved, self.backend.space().debt, read, moving);
            if now == before {
                return;
            }
            before = now;
        }
    }
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[expect(clippy::cast_precision_loss, reason = "a share needs three digits")]
fn share(part: u64, of: u64) -> f64 {
    part as f64 / of as f64
}

#[test]
fn random_writes_over_a_full_volume_cost_a_small_map_and_it_opens_soon() {
    // As the daemon does.
    quarry_gateway::daemon::bound_heaps();
    let extents = number("QUARRY_TEST_EXTENTS", 1 << 17);
    let writes = number("QUARRY_TEST_WRITES", extents / 2);
    let dir = tempfile::tempdir().unwrap();
    let store = overwritten(dir.path(), extents, writes);

    // The host is lost, and another takes the volume over from afar.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let distant = Distant(store, AtomicU64::new(0));
        let begun = tokio::time::Instant::now();
        let tenant = distant.0.tenant.clone();
        let by = claimant(true);
        let claimed = claim(&distant, &tenant, VOLUME, None, &by).await.unwrap();
        let (took, requests) = (begun.elapsed(), distant.1.into_inner());
        println!(
            "opened again in {took:?} of the store's time, {requests} requests of {DISTANCE:?}; {} chunks of log",
            claimed.log.len()
        );
        assert!(took < Duration::from_secs(10), "{took:?}");
    });
}

fn overwritten(dir: &Path, extents: u64, writes: u64) -> Arc<Simulated> {
    let tenant = TenantName::new("acme").unwrap();
    let store = Arc::new(Simulated {
        folder: FolderStore::open(dir, true).unwrap(),
        tenant: tenant.clone(),
        stored: parking_lot::Mutex::default(),
        chunk_bytes: AtomicU64::new(0),
        moved_bytes: AtomicU64::new(0),
        map_bytes: AtomicU64::new(0),
        map_read_bytes: AtomicU64::new(0),
        chunk_read_bytes: AtomicU64::new(0),
    });
    let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let begun = Instant::now();
        fill(&*store, &tenant, extents).await;
        let full_map = count(&store.map_bytes);
        let before = resident_bytes();
        println!(
            "{extents} extents, a map of {:.1} MiB ({:.1} bytes each), made in {:.1?}",
            share(full_map, 1 << 20),
            share(full_map, extents),
            begun.elapsed()
        );
        let claimed = claim(&*store, &tenant, VOLUME, None, &claimant(false)).await;
        let mut driven = Driven::new(&store, claimed.unwrap(), extents);
        driven.backend.start_reclaiming();
        let (begun, tuning) = (Instant::now(), Tuning::default());
        // Of chunks as large as these.
        let checkpoint_chunks = tuning.checkpoint_sectors / (CHUNK_EXTENTS * PAGE / 512);
        let (mut written, mut chunks) = (0, 0);
        while written < writes {
            driven.upload().await;
            written += CHUNK_EXTENTS;
            chunks += 1;
            if chunks % checkpoint_chunks == 0 || driven.tail.len() >= 256 << 10 {
                driven.checkpoint().await;
            }
        }
        driven.checkpoint().await;
        driven.settle(&store).await;
        let problem = driven.backend.condition().problem;
        assert_eq!(problem, None);
        let (data, moved) = (count(&store.chunk_bytes), count(&store.moved_bytes));
        let map = count(&store.map_bytes) - full_map;
        let space = driven.backend.space();
        println!(
            "{:.1} MiB written at random in {:.1?}, {:.2} as much moved; debt {:.3} of live",
            share(data, 1 << 20),
            begun.elapsed(),
            share(moved, data),
            share(space.debt, space.live),
        );
        println!(
            "map bytes uploaded: {:.4} of the data's; read: {:.4}; memory: {:.1} MiB more at most",
            share(map, data),
            share(count(&store.map_read_bytes), data),
            share(resident_bytes() - before, 1 << 20),
        );
        assert!(data >= written * PAGE);
        assert!(share(map, data) <= 0.1, "{map} bytes of map for {data}");
        assert!(moved > 0, "nothing was compacted");
        driven.backend.stop_reclaiming().await;
        // A log as long as it gets.
        for _ in 1..checkpoint_chunks {
            driven.upload().await;
        }
    });
    store
}
