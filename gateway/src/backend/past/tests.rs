//! A writer that makes chunks, checkpoints and compactions of one small volume by the real code, under a clock
//! that the test sets; and what the volume was after each chunk.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use quarry_cache::{AlignedBuf, BlockDevice, CacheDevice};
use quarry_objfmt::chunk::{ChunkExtent, ChunkParams, ExtentBody, encode_chunk};
use quarry_objfmt::head::{LogRange, Parent};
use quarry_objfmt::map::ChunkUse;
use quarry_objfmt::{
    CacheId, Compression, Lba, LbaRange, Location, MapEntry, SnapName, SnapshotRef, VolumeName,
    decode_frame,
};
use quarry_volume::{Action, CheckpointPlan, ChunkPlan, Event, ExtentSource, PlannedExtent};
use tokio::sync::mpsc;

use super::super::checkpoint;
use super::super::open::{Claim, claim};
use super::super::scan::Scan;
use super::super::upload::{NotSent, READ_RETRY_DELAY};
use super::super::{Common, Fetches, ReclaimSettings, VolumeBackend};
use super::*;
use crate::backend::Buffers;
use crate::control::{RescueReport, RescueSpec, VerifySpec, VolumeRef};
use crate::fair::{Gate, plain_share};
use crate::reactor::{Message, ReactorHandle};
use crate::store::FolderStore;
use crate::{rescue, snapshot, verify};

const BLOCKS: usize = 64;
const BLOCK_SECTORS: u32 = 8;
const HOUR_MS: u64 = 3_600_000;
const MINUTE_MS: u64 = 60_000;
const START_MS: u64 = 1_700_000_000_000;

thread_local! {
    static NOW_MS: Cell<u64> = const { Cell::new(START_MS) };
}

/// For each block the write that it is of, 0 if none.
type Image = Vec<u64>;

struct Bench {
    _dir: tempfile::TempDir,
    store: Arc<dyn Store>,
    common: Common,
    tenant: TenantName,
    volume: VolumeId,
    seed: u64,
    image: Image,
    /// The times of all chunks, and what the volume was from each on.
    past: Vec<(u64, Image)>,
}

/// A volume as it is attached.
struct Writer {
    backend: Arc<VolumeBackend>,
    next_chunk: u64,
    last_write: u64,
    /// What the map lacks.
    unfolded: BTreeMap<Lba, MapEntry>,
}

impl Writer {
    /// A checkpoint of all that the map lacks.
    fn plan(&mut self) -> CheckpointPlan {
        CheckpointPlan {
            upto: ChunkSeq::new(self.next_chunk - 1),
            last_write: WriteSeq::new(self.last_write),
            log: std::mem::take(&mut self.unfolded).into_values().collect(),
        }
    }
}

impl Bench {
    async fn new(retain_ms: u64) -> Self {
        NOW_MS.set(START_MS);
        let dir = tempfile::tempdir().unwrap();
        let objects = dir.path().join("objects");
        std::fs::create_dir(&objects).unwrap();
        let store: Arc<dyn Store> = Arc::new(FolderStore::open(&objects, true).unwrap());
        let cache = CacheId::from_bytes([8; 16]);
        let device =
            CacheDevice::open(&dir.path().join("cache"), Some(64 << 20), cache, "a", 1).unwrap();
        let common = Common {
            store: Arc::clone(&store),
            background: Arc::clone(&store),
            direct: Arc::new(LazyLock::new(Box::new(|| Err("not here".to_owned())))),
            device: Arc::new(device),
            kept_writes: Default::default(),
            fetches: Fetches::new(1 << 20),
            share: plain_share(),
            group: 0,
            buffers: Buffers::default(),
            uploads: Gate::new(1),
            compactions: Gate::new(1),
            reclaim: ReclaimSettings {
                horizon: Duration::from_secs(1),
                debt_min: 0,
                chunk_sectors: 64,
                window_bytes: 1 << 20,
                percent: 100,
            },
            orphan_interval: Duration::from_secs(86_400),
            now_ms: || NOW_MS.get(),
            runtime: tokio::runtime::Handle::current(),
            tracer: None,
        };
        let (tenant, name) = (
            TenantName::new("acme").unwrap(),
            VolumeName::new("db").unwrap(),
        );
        let volume = VolumeId::from_bytes([7; 16]);
        let size = Sectors::new(BLOCKS as u64 * u64::from(BLOCK_SECTORS));
        let head = Head {
            retain_ms,
            ..Head::fresh(volume, &tenant, &name, size, START_MS)
        };
        let key = keys::head_key(&tenant, volume);
        store.create(&key, head.encode().into()).await.unwrap();
        Self {
            _dir: dir,
            store,
            common,
            tenant,
            volume,
            seed: 1,
            image: vec![0; BLOCKS],
            past: Vec::new(),
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) % below
    }

    /// Both clocks go on, and whatever was waiting for that is done.
    async fn pass(&self, ms: u64) {
        NOW_MS.set(NOW_MS.get() + ms);
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    fn by(&self) -> Claim {
        Claim {
            cache: CacheId::from_bytes([8; 16]),
            host: "a".to_owned(),
            now_ms: NOW_MS.get(),
            force: false,
            discard_unsent: true,
            must_be_ours: false,
        }
    }

    fn serve(&self, claimed: Claimed) -> Arc<VolumeBackend> {
        let (backend, mut inbox) = self.serve_heard(claimed);
        tokio::spawn(async move { while inbox.recv().await.is_some() {} });
        backend
    }

    /// The same, and what it tells its volume.
    fn serve_heard(&self, claimed: Claimed) -> (Arc<VolumeBackend>, mpsc::Receiver<Message>) {
        let (reactor, inbox) = ReactorHandle::detached().unwrap();
        let key = reactor.new_key();
        let name = "acme/db".to_owned();
        let backend = VolumeBackend::new(self.common.clone(), name, claimed, key, reactor);
        (backend, inbox)
    }

    async fn attach(&self) -> Writer {
        let (writer, mut inbox) = self.attach_heard().await;
        tokio::spawn(async move { while inbox.recv().await.is_some() {} });
        writer
    }

    /// The same, and what its backend tells it.
    async fn attach_heard(&self) -> (Writer, mpsc::Receiver<Message>) {
        let by = self.by();
        let claimed = claim(&*self.store, &self.tenant, self.volume, None, &by).await;
        let claimed = claimed.unwrap();
        let (next_chunk, last_write) = (claimed.next_chunk.get(), claimed.stored_write.get());
        let unfolded = claimed
            .log
            .iter()
            .flatten()
            .map(|e| (e.start, *e))
            .collect();
        let (backend, inbox) = self.serve_heard(claimed);
        backend.start_reclaiming();
        let writer = Writer {
            backend,
            next_chunk,
            last_write,
            unfolded,
        };
        (writer, inbox)
    }

    /// The keys of all chunks and seals.
    async fn chunks(&self) -> Vec<String> {
        let prefix = format!("{}chunk/", keys::volume_prefix(&self.tenant, self.volume));
        self.store.list(&prefix).await.unwrap()
    }

    /// The host dies.
    async fn crash(&self, writer: Writer) {
        writer.backend.stop_reclaiming().await;
    }

    /// A chunk of some blocks, some of them zeroes, stored and told.
    async fn chunk(&mut self, writer: &mut Writer) -> u64 {
        let cut_ms = writer.backend.cut();
        self.chunk_cut_at(writer, cut_ms).await;
        cut_ms
    }

    async fn chunk_cut_at(&mut self, writer: &mut Writer, cut_ms: u64) {
        let first = writer.last_write + 1;
        let mut contents = BTreeMap::new();
        for _ in 0..=self.random(12) {
            let block = self.random(BLOCKS as u64);
            writer.last_write += 1;
            let zero = self.random(8) == 0;
            contents.insert(block, if zero { 0 } else { writer.last_write });
        }
        self.store_chunk(writer, cut_ms, first, &contents).await;
    }

    /// A chunk of the first 16 blocks.
    async fn chunk_over_the_last(&mut self, writer: &mut Writer) {
        let (cut_ms, first) = (writer.backend.cut(), writer.last_write + 1);
        let contents = (0..16).map(|block| (block, first + block)).collect();
        writer.last_write += 16;
        self.store_chunk(writer, cut_ms, first, &contents).await;
    }

    async fn store_chunk(
        &mut self,
        writer: &mut Writer,
        cut_ms: u64,
        first: u64,
        contents: &BTreeMap<u64, u64>,
    ) {
        let (mut extents, mut raw) = (Vec::new(), Vec::new());
        for (block, content) in contents {
            let body = match content {
                0 => ExtentBody::Zero,
                _ => ExtentBody::Data {
                    raw: u32::try_from(raw.len() / 512).unwrap(),
                },
            };
            if *content > 0 {
                let block = content.to_le_bytes().repeat(BLOCK_SECTORS as usize * 64);
                raw.extend_from_slice(&block);
            }
            extents.push(ChunkExtent {
                start: Lba::new(block * u64::from(BLOCK_SECTORS)),
                len: BLOCK_SECTORS,
                body,
            });
            self.image[usize::try_from(*block).unwrap()] = *content;
        }
        let id = ChunkId {
            volume: self.volume,
            epoch: writer.backend.head().epoch(),
            seq: ChunkSeq::new(writer.next_chunk),
        };
        writer.next_chunk += 1;
        let params = ChunkParams {
            id,
            first_write: WriteSeq::new(first),
            last_write: WriteSeq::new(writer.last_write),
            cut_ms,
            frame_sectors: writer.backend.head().frame_sectors(),
            compression: Compression::None,
            key: None,
        };
        let made = encode_chunk(&params, &extents, &raw);
        let entries = made.header.map_entries();
        let (key, len) = (keys::chunk_key(&self.tenant, id), made.bytes.len());
        self.store.create(&key, made.bytes).await.unwrap();
        writer.backend.log_chunk(&made.header, len as u64, cut_ms);
        writer
            .unfolded
            .extend(entries.iter().map(|e| (e.start, *e)));
        self.past.push((cut_ms, self.image.clone()));
    }

    async fn checkpoint(&self, writer: &mut Writer) {
        let plan = writer.plan();
        checkpoint::run(&writer.backend, plan).await.unwrap();
        // What reclaims space takes its turn.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    /// Chunks, checkpoints, hosts that die, and clocks that jump.
    async fn live(&mut self, writer: &mut Writer, chunks: u64) {
        for n in 0..chunks {
            let ms = 1 + self.random(MINUTE_MS);
            self.pass(ms).await;
            match self.random(10) {
                0 => NOW_MS.set(NOW_MS.get() - 10 * MINUTE_MS),
                1 => NOW_MS.set(NOW_MS.get() + 10 * MINUTE_MS),
                _ => {}
            }
            self.chunk(writer).await;
            if n % 5 == 4 {
                self.checkpoint(writer).await;
            }
            if self.random(13) == 0 {
                let next = self.attach().await;
                let dead = std::mem::replace(writer, next);
                self.crash(dead).await;
            }
        }
    }

    async fn open(&self, at_ms: u64) -> Result<Claimed, OpenError> {
        let now_ms = NOW_MS.get().max(at_ms);
        open_at(&*self.store, &self.tenant, self.volume, at_ms, now_ms).await
    }

    /// What was there at a time, read block by block.
    async fn read(&self, at_ms: u64) -> Result<Image, OpenError> {
        let claimed = self.open(at_ms).await?;
        let (root, log) = (Arc::clone(&claimed.root), claimed.log.clone());
        let backend = self.serve(claimed);
        let mut image = vec![0; BLOCKS];
        let mut scan = Scan::new(&backend, Vec::new(), root.runs(), true);
        let mut entries = Vec::new();
        while let Some(entry) = scan.next().await.unwrap() {
            entries.push(entry);
        }
        for entry in entries.into_iter().chain(log.into_iter().flatten()) {
            let content = self.content(&entry).await;
            let blocks = u64::from(BLOCK_SECTORS);
            let first = usize::try_from(entry.start.get() / blocks).unwrap();
            let count = (entry.len / BLOCK_SECTORS) as usize;
            image[first..first + count].copy_from_slice(&content);
        }
        Ok(image)
    }

    /// Of each of its blocks; the whole block must be of the same write.
    async fn content(&self, entry: &MapEntry) -> Vec<u64> {
        let count = (entry.len / BLOCK_SECTORS) as usize;
        let Location::Data(data) = entry.location else {
            return vec![0; count];
        };
        let key = keys::chunk_key(&self.tenant, data.chunk);
        let from = u64::from(data.stored_offset);
        let range = from..from + u64::from(data.stored_len);
        let stored = self.store.get_range(&key, range).await.unwrap();
        let frame = decode_frame(&stored, data.chunk, data.raw / 128, 128, None).unwrap();
        let from = (data.raw % 128) as usize * 512;
        let bytes = &frame[from..from + entry.len as usize * 512];
        let blocks = bytes.chunks_exact(BLOCK_SECTORS as usize * 512);
        let content = |block: &[u8]| {
            let words: Vec<u64> = block
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                .collect();
            assert!(words.iter().all(|word| *word == words[0]));
            words[0]
        };
        blocks.map(content).collect()
    }

    /// By the model: up to the first chunk that is later.
    fn expected(&self, at_ms: u64) -> Image {
        let before = self.past.iter().take_while(|(ms, _)| *ms <= at_ms);
        before
            .last()
            .map_or_else(|| vec![0; BLOCKS], |(_, image)| image.clone())
    }

    async fn assert_is_as_it_was(&self, at_ms: u64) {
        let found = self.read(at_ms).await;
        assert_eq!(found.unwrap(), self.expected(at_ms), "at {at_ms}");
    }

    /// Flips a bit of the usage of this map; the second time it is as it was.
    async fn damage_usage(&self, map: RootRef) {
        let key = keys::map_key(&self.tenant, self.volume, map.epoch, map.seq);
        let mut object = self.store.get(&key).await.unwrap().0.to_vec();
        let (offset, len) = map.usage.unwrap();
        object[(offset + len - 1) as usize] ^= 1;
        self.store.delete(&key).await.unwrap();
        self.store.create(&key, object.into()).await.unwrap();
    }

    /// Gives the newest map a name.
    async fn snapshot(&self, writer: &Writer, name: &str) -> SnapshotRef {
        let name = SnapName::new(name).unwrap();
        let (head, at) = (writer.backend.head(), WriteSeq::new(writer.last_write));
        let made = snapshot::create(&*self.store, head, &name, at, NOW_MS.get()).await;
        made.unwrap()
    }

    /// Nobody has the volume: it becomes what the snapshot of this name is.
    async fn roll_back(&self, name: &str) -> Head {
        let (name, by) = (SnapName::new(name).unwrap(), self.by());
        let back = snapshot::roll_back(&*self.store, &self.tenant, self.volume, &name, &by);
        back.await.unwrap()
    }

    /// Nobody has the volume, and its head is lost: it is made anew.
    async fn rescue(&self) -> RescueReport {
        let key = keys::head_key(&self.tenant, self.volume);
        self.store.delete(&key).await.unwrap();
        let (store, volume) = (Arc::clone(&self.store), self.named());
        let spec = RescueSpec {
            apply: true,
            ..RescueSpec::default()
        };
        let now_ms = NOW_MS.get();
        let report = rescue::run(store, &volume, self.volume, &spec, "r", now_ms).await;
        report.unwrap()
    }

    fn named(&self) -> VolumeRef {
        VolumeRef {
            tenant: self.tenant.clone(),
            name: VolumeName::new("db").unwrap(),
        }
    }

    /// That the volume and its snapshots, so many, are whole.
    async fn assert_sound(&self, snapshots: usize) {
        let spec = VerifySpec {
            deep: true,
            snapshots: true,
        };
        let (store, image) = (Arc::clone(&self.store), self.named().into());
        let report = verify::run(store, &image, self.volume, spec, None, Arc::default()).await;
        let report = report.unwrap().unwrap();
        let of_snapshots = report.snapshots.iter().flat_map(|s| &s.findings);
        let findings: Vec<_> = report.findings.iter().chain(of_snapshots).collect();
        assert!(findings.is_empty(), "{findings:?}");
        assert_eq!(report.snapshots.len(), snapshots);
    }

    async fn refused(&self, at_ms: u64) -> String {
        self.open(at_ms).await.unwrap_err().to_string()
    }
}

#[tokio::test(start_paused = true)]
async fn volume_at_any_time_that_is_kept_is_what_its_log_was() {
    let mut bench = Bench::new(24 * HOUR_MS).await;
    let mut writer = bench.attach().await;
    bench.live(&mut writer, 120).await;
    let is_compacted = |id: &str| u64::from_str_radix(id, 16).unwrap() >= 1 << 63;
    let names = bench.chunks().await;
    let names: Vec<&str> = names.iter().map(|key| &key[key.len() - 16..]).collect();
    assert!(names.iter().any(|name| is_compacted(name)));
    // Nothing was deleted: chunks, and a seal for each host that died.
    let of_log = names.iter().filter(|name| !is_compacted(name));
    let seals = usize::try_from(writer.backend.head().epoch().get() - 1).unwrap();
    assert_eq!(of_log.count(), 120 + seals);
    let end_ms = bench.past[bench.past.len() - 1].0;
    assert!(bench.past.is_sorted_by_key(|(ms, _)| *ms));
    bench.assert_is_as_it_was(START_MS).await;
    bench.assert_is_as_it_was(end_ms).await;
    for n in 0..bench.past.len() {
        let at_ms = bench.past[n].0;
        bench.assert_is_as_it_was(at_ms).await;
        bench.assert_is_as_it_was(at_ms - 1).await;
    }
    let refused = bench.refused(START_MS - 1).await;
    assert!(refused.contains("the volume was made later"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn volume_is_kept_for_its_retention_and_not_for_longer() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    bench.live(&mut writer, 60).await;
    let (old, before) = (bench.past.clone(), bench.chunks().await);
    // Longer than the clock jumps.
    bench.pass(2 * HOUR_MS).await;
    let after_ms = NOW_MS.get();
    bench.live(&mut writer, 20).await;
    bench.pass(1).await;
    let there = bench.chunks().await;
    assert!(before.iter().any(|key| !there.contains(key)));
    for (at_ms, _) in bench.past.iter().filter(|(ms, _)| *ms > after_ms) {
        bench.assert_is_as_it_was(*at_ms).await;
    }
    // What was the newest state for two hours is one of the last hour, too.
    let newest_ms = old[old.len() - 1].0;
    bench.assert_is_as_it_was(newest_ms.max(after_ms)).await;
    let refused = bench.refused(old[5].0).await;
    let named = refused.split("the oldest state that is kept is of ").nth(1);
    let named = humantime::parse_rfc3339(named.expect(&refused)).unwrap();
    let named = named.duration_since(std::time::UNIX_EPOCH).unwrap();
    let named = u64::try_from(named.as_millis()).unwrap();
    assert!(named > old[5].0 && named <= newest_ms, "{refused}");
    bench.assert_is_as_it_was(named).await;
    // Each time is either refused or what it was.
    let mut kept = 0;
    for (at_ms, _) in old {
        if let Ok(image) = bench.read(at_ms).await {
            assert_eq!(image, bench.expected(at_ms));
            kept += 1;
        }
    }
    assert!(kept < 60);
}

#[tokio::test(start_paused = true)]
async fn state_is_kept_though_chunks_that_its_map_only_lists_are_gone() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    for _ in 0..2 {
        bench.pass(MINUTE_MS).await;
        bench.chunk_over_the_last(&mut writer).await;
        bench.checkpoint(&mut writer).await;
    }
    let newest = writer.backend.head().get().root.unwrap();
    // What the newest map does not need is counted, and deleted when its time has passed: no later map says so.
    bench.pass(2 * HOUR_MS).await;
    let middle_ms = NOW_MS.get() - 30 * MINUTE_MS;
    bench.chunk(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    let id = MapObjectId {
        volume: bench.volume,
        epoch: newest.epoch,
        seq: newest.seq,
    };
    let end = MapEnd::read(&*bench.store, &bench.tenant, id).await;
    let listed = end.unwrap().unwrap().usage.unwrap().chunks;
    let there = bench.chunks().await;
    let is_gone = |chunk: &ChunkUse| {
        let id = ChunkId {
            volume: bench.volume,
            epoch: chunk.epoch,
            seq: chunk.seq,
        };
        !there.contains(&keys::chunk_key(&bench.tenant, id))
    };
    assert!(listed.iter().any(is_gone));
    bench.assert_is_as_it_was(middle_ms).await;
}

#[tokio::test(start_paused = true)]
async fn retention_that_is_lowered_frees_what_is_too_old_then() {
    let mut bench = Bench::new(24 * HOUR_MS).await;
    let mut writer = bench.attach().await;
    bench.live(&mut writer, 40).await;
    bench.pass(2 * HOUR_MS).await;
    assert_eq!(writer.backend.reclaimed().deleted_objects, 0);
    let at_ms = bench.past[7].0;
    bench.assert_is_as_it_was(at_ms).await;
    let retained = writer.backend.set_retention(&*bench.store, HOUR_MS).await;
    assert_eq!(retained.unwrap().retain_ms, HOUR_MS);
    bench.pass(1).await;
    assert!(writer.backend.reclaimed().deleted_objects > 0);
    assert!(bench.refused(at_ms).await.contains("is not kept"));
}

#[tokio::test(start_paused = true)]
async fn volume_that_is_never_attached_for_the_horizon_gives_back_what_it_overwrote() {
    let mut bench = Bench::new(0).await;
    bench.common.reclaim.horizon = Duration::from_secs(15 * 60);
    let mut dead = 0;
    for _ in 0..60 {
        let mut writer = bench.attach().await;
        // What is found dead after one checkpoint is written down by the next.
        for _ in 0..2 {
            bench.chunk_over_the_last(&mut writer).await;
            bench.checkpoint(&mut writer).await;
        }
        bench.pass(10 * MINUTE_MS).await;
        let epoch = writer.backend.head().epoch().get();
        bench.crash(writer).await;
        NOW_MS.set(NOW_MS.get() + 6 * HOUR_MS);
        // But for the seals, one of each attach but the first.
        let objects = bench.store.list("").await.unwrap().len();
        dead = objects - (usize::try_from(epoch).unwrap() - 1);
    }
    // Of a day and some of it, each with two chunks and their maps; of all there were 240.
    assert!(dead < 30, "{dead}");
}

#[tokio::test(start_paused = true)]
async fn fenced_writer_deletes_nothing_that_its_successor_was_told_to_retain() {
    for is_fenced in [false, true] {
        let mut bench = Bench::new(0).await;
        let mut writer = bench.attach().await;
        for _ in 0..3 {
            bench.chunk_over_the_last(&mut writer).await;
            bench.checkpoint(&mut writer).await;
        }
        if is_fenced {
            let next = bench.attach().await;
            let told = next.backend.set_retention(&*bench.store, HOUR_MS).await;
            assert_eq!(told.unwrap().retain_ms, HOUR_MS);
            bench.crash(next).await;
        }
        let before = bench.store.list("").await.unwrap();
        // Longer than the horizon.
        bench.pass(MINUTE_MS).await;
        let deleted = writer.backend.reclaimed().deleted_objects;
        assert_eq!(deleted == 0, is_fenced, "{deleted}");
        let is_all_there = bench.store.list("").await.unwrap() == before;
        assert_eq!(is_all_there, is_fenced);
        bench.crash(writer).await;
    }
}

#[tokio::test(start_paused = true)]
async fn volume_that_retains_nothing_is_refused_when_its_map_of_then_is_gone() {
    let mut bench = Bench::new(0).await;
    let mut writer = bench.attach().await;
    for _ in 0..3 {
        bench.pass(MINUTE_MS).await;
        for _ in 0..6 {
            bench.chunk(&mut writer).await;
        }
        bench.checkpoint(&mut writer).await;
    }
    bench.pass(MINUTE_MS).await;
    let refused = bench.refused(bench.past[0].0).await;
    assert!(refused.contains("is not kept: "), "{refused}");
    let now_ms = NOW_MS.get();
    bench.assert_is_as_it_was(now_ms).await;
    let future = open_at(
        &*bench.store,
        &bench.tenant,
        bench.volume,
        now_ms + 1,
        now_ms,
    )
    .await;
    assert!(matches!(future, Err(OpenError::Future { .. })));
}

#[tokio::test(start_paused = true)]
async fn writer_whose_clock_is_behind_goes_on_at_the_time_of_the_one_before() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    bench.pass(HOUR_MS).await;
    let ahead = bench.chunk(&mut writer).await;
    let state = bench.image.clone();
    for folded in [false, true] {
        if folded {
            bench.checkpoint(&mut writer).await;
        }
        bench.crash(writer).await;
        NOW_MS.set(START_MS + MINUTE_MS);
        writer = bench.attach().await;
        assert_eq!(bench.chunk(&mut writer).await, ahead);
    }
    // Nothing that says to be later is in it, nor what came after.
    assert_eq!(bench.read(ahead - 1).await.unwrap(), vec![0; BLOCKS]);
    assert_ne!(bench.read(ahead).await.unwrap(), state);
    bench.assert_is_as_it_was(ahead).await;
}

#[tokio::test(start_paused = true)]
async fn attach_that_died_behind_its_seal_leaves_no_gap_in_the_past() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    bench.pass(MINUTE_MS).await;
    bench.chunk(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    bench.pass(MINUTE_MS).await;
    bench.chunk(&mut writer).await;
    // Of this attach nothing is left but its epoch and its seal.
    let id = ChunkId {
        volume: bench.volume,
        epoch: writer.backend.head().epoch(),
        seq: ChunkSeq::new(writer.next_chunk),
    };
    let by = id.epoch.next();
    let seal = quarry_objfmt::chunk::encode_seal(id, by, "b");
    let key = keys::chunk_key(&bench.tenant, id);
    bench.store.create(&key, seal.into()).await.unwrap();
    let raise = |head: &mut Head| head.epoch = by;
    writer
        .backend
        .head()
        .update(&*bench.store, raise)
        .await
        .unwrap();
    bench.crash(writer).await;
    writer = bench.attach().await;
    assert_eq!(writer.backend.head().epoch(), by.next());
    for _ in 0..3 {
        bench.pass(MINUTE_MS).await;
        bench.chunk(&mut writer).await;
    }
    bench.checkpoint(&mut writer).await;
    for n in 0..bench.past.len() {
        bench.assert_is_as_it_was(bench.past[n].0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn volume_that_went_back_to_a_snapshot_is_what_it_was_before_and_after() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    for n in 0..8 {
        bench.pass(MINUTE_MS).await;
        bench.chunk(&mut writer).await;
        if n == 3 || n == 6 {
            bench.checkpoint(&mut writer).await;
        }
        if n == 3 {
            let name = SnapName::new("s").unwrap();
            let (head, at) = (writer.backend.head(), WriteSeq::new(writer.last_write));
            let made = snapshot::create(&*bench.store, head, &name, at, NOW_MS.get()).await;
            made.unwrap();
        }
    }
    bench.crash(writer).await;
    bench.pass(MINUTE_MS).await;
    let back_ms = NOW_MS.get();
    let (tenant, volume) = (bench.tenant.clone(), bench.volume);
    let map = bench.roll_back("s").await.root.unwrap();
    let then = bench.past[3].1.clone();
    bench.past.push((back_ms, then.clone()));
    bench.image = then;
    // The clock is behind: times go on all the same.
    NOW_MS.set(NOW_MS.get() - 5 * MINUTE_MS);
    writer = bench.attach().await;
    for _ in 0..3 {
        assert!(bench.chunk(&mut writer).await >= back_ms);
        bench.pass(3 * MINUTE_MS).await;
    }
    bench.checkpoint(&mut writer).await;
    let times: Vec<u64> = bench.past.iter().map(|(ms, _)| *ms).collect();
    for at_ms in &times {
        bench.assert_is_as_it_was(*at_ms).await;
        bench.assert_is_as_it_was(*at_ms - 1).await;
    }
    // Without the map that went back, the log does not say so: the two histories are not mixed up.
    let key = keys::map_key(&tenant, volume, map.epoch, map.seq);
    bench.store.delete(&key).await.unwrap();
    let refused = bench.refused(back_ms).await;
    assert!(refused.contains("of its log is gone"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn snapshot_whose_usage_alone_is_damaged_is_gone_back_to() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    bench.chunk(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    let name = SnapName::new("s").unwrap();
    let (head, at) = (writer.backend.head(), WriteSeq::new(writer.last_write));
    let made = snapshot::create(&*bench.store, head, &name, at, NOW_MS.get()).await;
    let root = made.unwrap().root;
    bench.chunk(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    bench.crash(writer).await;

    let (tenant, volume) = (bench.tenant.clone(), bench.volume);
    bench.damage_usage(root.unwrap()).await;

    let back = snapshot::roll_back(&*bench.store, &tenant, volume, &name, &bench.by()).await;
    let now = back.unwrap().root;
    assert_eq!(now.unwrap().usage, None);
    let map = |root| load_map(&*bench.store, &tenant, volume, root);
    let (now, then) = (map(now).await.unwrap(), map(root).await.unwrap());
    assert_eq!(now.manifest(), then.manifest());
    // And it is a volume like others, counted by the next map.
    let mut writer = bench.attach().await;
    bench.pass(MINUTE_MS).await;
    bench.chunk(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    let counted = writer.backend.head().get().root;
    assert!(counted.unwrap().usage.is_some());
}

/// What is wrong with a snapshot's map may be its usage alone, which no read needs: a rescue passes it over and keeps the
/// snapshot.
#[tokio::test(start_paused = true)]
async fn snapshot_of_a_later_map_than_a_rescue_went_back_to_keeps_what_it_needs() {
    for goes_back in [false, true] {
        let mut bench = Bench::new(0).await;
        let mut writer = bench.attach().await;
        bench.chunk(&mut writer).await;
        bench.checkpoint(&mut writer).await;
        bench.snapshot(&writer, "older").await;
        bench.chunk_over_the_last(&mut writer).await;
        bench.checkpoint(&mut writer).await;
        let map = bench.snapshot(&writer, "newer").await.root.unwrap();
        bench.crash(writer).await;
        bench.damage_usage(map).await;
        let report = bench.rescue().await;
        assert_eq!(report.snapshots, ["older", "newer"]);
        assert_eq!(report.log.len(), 1, "{report:?}");

        if goes_back {
            bench.roll_back("older").await;
        }
        writer = bench.attach().await;
        bench.checkpoint(&mut writer).await;
        bench.chunk_over_the_last(&mut writer).await;
        bench.checkpoint(&mut writer).await;
        // Longer than the horizon.
        bench.pass(MINUTE_MS).await;
        bench.damage_usage(map).await;
        bench.assert_sound(2).await;
        bench.crash(writer).await;
    }
}

/// What the map before a rollback calls dead, a snapshot of a later one may need.
#[tokio::test(start_paused = true)]
async fn snapshot_keeps_what_a_rollback_made_alive_though_a_rescue_went_back_behind_that() {
    let mut bench = Bench::new(0).await;
    let mut writer = bench.attach().await;
    bench.chunk(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    bench.snapshot(&writer, "older").await;
    bench.chunk_over_the_last(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    bench.chunk_over_the_last(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    bench.snapshot(&writer, "before").await;
    bench.crash(writer).await;
    bench.roll_back("older").await;
    let writer = bench.attach().await;
    let map = bench.snapshot(&writer, "after").await.root.unwrap();
    bench.crash(writer).await;
    bench.damage_usage(map).await;
    let report = bench.rescue().await;
    assert_eq!(report.snapshots, ["older", "before", "after"]);

    let mut writer = bench.attach().await;
    let older = SnapName::new("older").unwrap();
    let deleted = snapshot::delete(&*bench.store, writer.backend.head(), &older, NOW_MS.get());
    deleted.await.unwrap();
    bench.chunk_over_the_last(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    bench.pass(MINUTE_MS).await;
    bench.damage_usage(map).await;
    bench.assert_sound(2).await;
    bench.crash(writer).await;
}

#[tokio::test(start_paused = true)]
async fn snapshot_is_made_of_an_older_map_than_another_has_after_a_rescue() {
    let mut bench = Bench::new(0).await;
    let mut writer = bench.attach().await;
    bench.chunk(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    // A map without a log, as compaction makes it.
    bench.checkpoint(&mut writer).await;
    let map = bench.snapshot(&writer, "before").await.root.unwrap();
    bench.crash(writer).await;
    bench.damage_usage(map).await;
    bench.rescue().await;

    let mut writer = bench.attach().await;
    let made = bench.snapshot(&writer, "after").await;
    assert!(made.root.unwrap().seq < map.seq);
    let snapshots = writer.backend.head().get().snapshots;
    let names: Vec<&str> = snapshots.iter().map(|s| &*s.name).collect();
    assert_eq!(names, ["after", "before"]);
    bench.chunk_over_the_last(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    bench.pass(MINUTE_MS).await;
    bench.damage_usage(map).await;
    bench.assert_sound(2).await;
    bench.crash(writer).await;
}

/// The map of a rollback that was broken off, before the head, is no state that the volume had.
#[tokio::test(start_paused = true)]
async fn rollback_that_was_broken_off_is_in_nobodys_past() {
    for passes_over in [false, true] {
        broken_off_rollback_is_in_nobodys_past(passes_over).await;
    }
}

async fn broken_off_rollback_is_in_nobodys_past(passes_over: bool) {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    let name = SnapName::new("s").unwrap();
    for n in 0..6 {
        bench.pass(MINUTE_MS).await;
        bench.chunk(&mut writer).await;
        bench.checkpoint(&mut writer).await;
        if n == 2 {
            let (head, at) = (writer.backend.head(), WriteSeq::new(writer.last_write));
            let made = snapshot::create(&*bench.store, head, &name, at, NOW_MS.get()).await;
            made.unwrap();
        }
    }
    bench.crash(writer).await;
    bench.pass(MINUTE_MS).await;
    let (tenant, volume) = (bench.tenant.clone(), bench.volume);
    let before = HeadCell::read(&*bench.store, &tenant, volume).await;
    let (before, _) = before.unwrap();
    let back = snapshot::roll_back(&*bench.store, &tenant, volume, &name, &bench.by()).await;
    let back = back.unwrap();
    // As its first step left the head.
    let end = ChunkSeq::new(back.log[0].first.get() - 1);
    let mut log = before.log.clone();
    log.last_mut().unwrap().end = Some(end);
    log.retain(|range| range.end != Some(range.first));
    log.push(LogRange {
        epoch: back.epoch,
        first: end,
        end: None,
    });
    let broken_off = Head {
        epoch: back.epoch,
        log,
        owner: None,
        // Or as a change of the retention, or a snapshot, left it then: its number is given to no map.
        next_map: match passes_over {
            true => before.next_map.next(),
            false => before.next_map,
        },
        ..before
    };
    let key = keys::head_key(&tenant, volume);
    let (_, tag) = bench.store.get(&key).await.unwrap();
    let bytes = broken_off.encode().into();
    bench.store.replace(&key, bytes, &tag).await.unwrap();
    bench.pass(MINUTE_MS).await;
    let meanwhile_ms = NOW_MS.get();
    bench.pass(MINUTE_MS).await;
    let mut writer = bench.attach().await;
    let first_ms = bench.chunk(&mut writer).await;

    // Nor of its rescue, should the head be lost now.
    let (head, tag) = bench.store.get(&key).await.unwrap();
    bench.store.delete(&key).await.unwrap();
    let volume_ref = VolumeRef {
        tenant,
        name: VolumeName::new("db").unwrap(),
    };
    let spec = RescueSpec::default();
    let store = Arc::clone(&bench.store);
    let report = rescue::run(store, &volume_ref, volume, &spec, "r", 1).await;
    let report = report.unwrap();
    assert_eq!(report.last_write, writer.last_write, "{report:?}");
    assert!(report.passed_over[0].problem.contains("broken off"));
    drop(tag);
    bench.store.create(&key, head).await.unwrap();

    bench.pass(MINUTE_MS).await;
    bench.checkpoint(&mut writer).await;
    bench.assert_is_as_it_was(meanwhile_ms).await;
    bench.assert_is_as_it_was(first_ms).await;
}

#[tokio::test(start_paused = true)]
async fn chunks_without_a_time_are_told_from_later_ones_only() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    for folded in [true, false] {
        bench.pass(MINUTE_MS).await;
        bench.chunk_cut_at(&mut writer, 0).await;
        let refused = bench.refused(NOW_MS.get()).await;
        assert!(refused.contains("says no time"), "{refused}");
        if folded {
            bench.checkpoint(&mut writer).await;
        }
    }
    let refused = bench.refused(NOW_MS.get()).await;
    assert!(refused.contains("says no time"), "{refused}");
    bench.pass(MINUTE_MS).await;
    let first_ms = bench.chunk(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    bench.pass(MINUTE_MS).await;
    bench.chunk(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    bench.assert_is_as_it_was(first_ms).await;
    let refused = bench.refused(first_ms - 1).await;
    assert!(refused.contains("says no time"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn damaged_map_in_between_costs_a_longer_log_and_nothing_else() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    for n in 0..12 {
        bench.pass(MINUTE_MS).await;
        bench.chunk(&mut writer).await;
        if n % 3 == 2 {
            bench.checkpoint(&mut writer).await;
        }
    }
    let prefix = format!("{}map/", keys::volume_prefix(&bench.tenant, bench.volume));
    let mut maps = bench.store.list(&prefix).await.unwrap();
    maps.sort();
    let (bytes, _) = bench.store.get(&maps[1]).await.unwrap();
    // The usage: nothing in the manifest or the tables.
    let mut damaged = bytes.to_vec();
    let nodes: Vec<usize> = (0..damaged.len())
        .filter(|at| damaged[*at..].starts_with(b"QMAP") && damaged.get(at + 6) == Some(&4))
        .collect();
    damaged[nodes[0] + 30] ^= 1;
    bench.store.delete(&maps[1]).await.unwrap();
    bench
        .store
        .create(&maps[1], Bytes::from(damaged))
        .await
        .unwrap();
    for n in 0..bench.past.len() {
        bench.assert_is_as_it_was(bench.past[n].0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn volume_that_was_smaller_or_larger_is_as_large_as_it_was_or_larger() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    let full = writer.backend.head().get().size;
    let half = Sectors::new(full.get() / 2);
    for size in [full, half, full] {
        let resize = |head: &mut Head| head.size = size;
        let head = writer.backend.head();
        head.update(&*bench.store, resize).await.unwrap();
        bench.pass(MINUTE_MS).await;
        bench.chunk(&mut writer).await;
        bench.checkpoint(&mut writer).await;
    }
    for n in 0..bench.past.len() {
        let at_ms = bench.past[n].0;
        assert_eq!(bench.open(at_ms).await.unwrap().info.size, full);
        bench.assert_is_as_it_was(at_ms).await;
    }
}

#[tokio::test(start_paused = true)]
async fn clone_cut_off_from_its_parent_is_refused_as_it_was_before() {
    let mut bench = Bench::new(HOUR_MS).await;
    let mut writer = bench.attach().await;
    for is_clone in [true, true, false, false] {
        let parent = is_clone.then(|| Parent {
            volume: VolumeId::from_bytes([5; 16]),
            snapshot: "s".to_owned(),
        });
        let change = |head: &mut Head| head.parent.clone_from(&parent);
        let head = writer.backend.head();
        head.update(&*bench.store, change).await.unwrap();
        if is_clone {
            bench.pass(MINUTE_MS).await;
            bench.chunk(&mut writer).await;
        }
        bench.checkpoint(&mut writer).await;
        bench.pass(MINUTE_MS).await;
        bench.chunk(&mut writer).await;
        if is_clone {
            bench.assert_is_as_it_was(bench.past[0].0).await;
        }
    }
    bench.checkpoint(&mut writer).await;
    let refused = bench.refused(bench.past[0].0).await;
    assert!(refused.contains("cut off from its parent"), "{refused}");
    let last = bench.past.len() - 1;
    for n in last - 1..=last {
        bench.assert_is_as_it_was(bench.past[n].0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn orphan_waits_for_the_retention_as_it_is_while_it_waits() {
    for (before, after, minutes, is_there) in [
        (24 * HOUR_MS, 0, 2, false),
        (10 * MINUTE_MS, HOUR_MS, 30, true),
        (10 * MINUTE_MS, HOUR_MS, 62, false),
    ] {
        let mut bench = Bench::new(before).await;
        bench.common.orphan_interval = Duration::from_millis(MINUTE_MS);
        let mut writer = bench.attach().await;
        let epoch = writer.backend.head().epoch();
        bench.chunk(&mut writer).await;
        bench.checkpoint(&mut writer).await;
        bench.crash(writer).await;
        let (volume, seq) = (bench.volume, ChunkSeq::COMPACTED);
        let stray = keys::chunk_key(&bench.tenant, ChunkId { volume, epoch, seq });
        bench.store.create(&stray, "a chunk".into()).await.unwrap();
        let writer = bench.attach().await;
        writer.backend.start_sweeping_orphans();
        // The first look is within an interval.
        bench.pass(2 * MINUTE_MS).await;
        assert!(bench.chunks().await.contains(&stray));
        let told = writer.backend.set_retention(&*bench.store, after).await;
        assert_eq!(told.unwrap().retain_ms, after);
        bench.pass(minutes * MINUTE_MS).await;
        let there = bench.chunks().await.contains(&stray);
        assert_eq!(there, is_there, "{before} {after} {minutes}");
        writer.backend.stop_sweeping_orphans().await;
        bench.crash(writer).await;
    }
}

/// A store with something wrong about what is written.
#[derive(Debug)]
struct Hindered {
    store: Arc<dyn Store>,
    /// The next write of such a key is refused.
    refuses: parking_lot::Mutex<Option<&'static str>>,
    /// A replacement takes so long.
    takes: Duration,
}

/// What is written in the background meets such a store.
fn hinder(bench: &mut Bench, refuses: Option<&'static str>, takes: Duration) {
    bench.common.background = Arc::new(Hindered {
        store: Arc::clone(&bench.store),
        refuses: parking_lot::Mutex::new(refuses),
        takes,
    });
}

impl Hindered {
    fn look(&self, key: &str) -> Result<(), StoreError> {
        let mut refuses = self.refuses.lock();
        match refuses.take_if(|part| key.contains(*part)) {
            Some(_) => Err(StoreError::Invalid {
                key: key.to_owned(),
                reason: "the server answered 413".to_owned(),
            }),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Store for Hindered {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        self.store.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.store.get_range(key, range).await
    }
    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        self.store.get_prefix(key, len).await
    }
    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        self.look(key)?;
        self.store.create(key, body).await
    }
    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        self.look(key)?;
        tokio::time::sleep(self.takes).await;
        self.store.replace(key, body, seen).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.store.delete(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.store.list(prefix).await
    }
    fn describe(&self) -> String {
        self.store.describe()
    }
}

/// One answer of a proxy whose limit was too small for some seconds ended all checkpoints of the attachment.
#[tokio::test(start_paused = true)]
async fn checkpoint_that_the_store_refuses_once_damages_nothing_and_is_made_the_next_time() {
    for part in ["/map/", "/head"] {
        let mut bench = Bench::new(0).await;
        hinder(&mut bench, Some(part), Duration::ZERO);
        let (mut writer, mut inbox) = bench.attach_heard().await;
        bench.chunk(&mut writer).await;
        let plan = writer.plan();
        let last_write = plan.last_write;
        for is_refused in [true, false] {
            let checkpoint = Action::Checkpoint(plan.clone());
            Arc::clone(&writer.backend).carry_out(checkpoint, 0).await;
            let Some(Message::VolumeEvent { event, .. }) = inbox.recv().await else {
                panic!("{part}: nothing is told");
            };
            match is_refused {
                true => assert!(
                    matches!(event, Event::CheckpointFailed { for_good: false }),
                    "{part}: {event:?}"
                ),
                false => assert!(
                    matches!(event, Event::Checkpointed { .. }),
                    "{part}: {event:?}"
                ),
            }
            let condition = writer.backend.condition();
            assert_eq!(condition.damaged, 0, "{condition:?}");
            let told = condition.problem.is_some_and(|p| p.contains("413"));
            assert_eq!(told, is_refused, "{part}");
        }
        let (head, _) = HeadCell::read(&*bench.store, &bench.tenant, bench.volume)
            .await
            .unwrap();
        assert_eq!(head.root_write, last_write);
        bench.crash(writer).await;
    }
}

/// Who opened the old map meanwhile, a minute before the head moved, found its objects deleted.
#[tokio::test(start_paused = true)]
async fn map_whose_head_took_longer_than_the_horizon_is_kept_for_it_from_then_on() {
    let mut bench = Bench::new(0).await;
    bench.common.reclaim.horizon = Duration::from_millis(15 * MINUTE_MS);
    hinder(&mut bench, None, Duration::from_millis(20 * MINUTE_MS));
    let mut writer = bench.attach().await;
    bench.chunk_over_the_last(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    let old = writer.backend.head().get().root.unwrap();
    let old = keys::map_key(&bench.tenant, bench.volume, old.epoch, old.seq);
    bench.chunk_over_the_last(&mut writer).await;
    bench.checkpoint(&mut writer).await;
    for (minutes, is_there) in [(14, true), (2, false)] {
        bench.pass(minutes * MINUTE_MS).await;
        let there = bench.store.list("").await.unwrap();
        assert_eq!(there.contains(&old), is_there, "{minutes}");
    }
    bench.crash(writer).await;
}

/// The writer's next chunk: one write, of which the cache device is to have the data.
fn one_write(bench: &Bench, writer: &Writer) -> ChunkPlan {
    let write = WriteSeq::new(writer.last_write + 1);
    ChunkPlan {
        id: ChunkId {
            volume: bench.volume,
            epoch: writer.backend.head().epoch(),
            seq: ChunkSeq::new(writer.next_chunk),
        },
        first_write: write,
        last_write: write,
        extents: vec![PlannedExtent {
            range: LbaRange::new(Lba::ZERO, Sectors::new(8)).unwrap(),
            source: ExtentSource::Cache { offset: 1 << 20 },
        }],
    }
}

/// As when it is detached with a cache device that cannot be read, or beside a store so slow that there is no place.
#[tokio::test]
async fn upload_that_outlives_its_volume_makes_no_chunk_of_what_may_be_anothers() {
    for is_gone in [false, true] {
        let bench = Bench::new(0).await;
        let writer = bench.attach().await;
        let backend = Arc::clone(&writer.backend);
        let plan = one_write(&bench, &writer);
        let place = bench.common.uploads.enter(&bench.common.share).await;
        let upload = tokio::spawn(async move { backend.upload(&plan, START_MS).await });
        tokio::task::yield_now().await;
        if is_gone {
            writer.backend.close().await;
        }
        drop(place);
        let stored = upload.await.unwrap();
        assert_eq!(matches!(stored, Err(NotSent::Gone)), is_gone);
        assert_eq!(stored.is_err(), is_gone);
        assert_eq!(bench.chunks().await.is_empty(), is_gone);
        bench.crash(writer).await;
    }
}

/// A cache device with something wrong.
struct Ailing {
    device: Arc<dyn BlockDevice>,
    can_be_read: AtomicBool,
    lost_a_sync: bool,
}

impl BlockDevice for Ailing {
    fn id(&self) -> CacheId {
        self.device.id()
    }
    fn geometry(&self) -> quarry_cache::Geometry {
        self.device.geometry()
    }
    fn read_at(&self, buf: &mut AlignedBuf, offset: u64) -> io::Result<()> {
        match self.can_be_read.load(Ordering::Relaxed) {
            true => self.device.read_at(buf, offset),
            false => Err(io::Error::from_raw_os_error(libc::EIO)),
        }
    }
    fn write_at(&self, buf: &AlignedBuf, offset: u64) -> io::Result<()> {
        self.device.write_at(buf, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.trusted()
    }
    fn trusted(&self) -> io::Result<()> {
        match self.lost_a_sync {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(()),
        }
    }
}

async fn with_ailing(can_be_read: bool, lost_a_sync: bool) -> (Bench, Arc<Ailing>) {
    let mut bench = Bench::new(0).await;
    let ailing = Arc::new(Ailing {
        device: Arc::clone(&bench.common.device),
        can_be_read: AtomicBool::new(can_be_read),
        lost_a_sync,
    });
    bench.common.device = Arc::clone(&ailing) as Arc<dyn BlockDevice>;
    (bench, ailing)
}

/// What lies there then may be another's.
#[tokio::test]
async fn upload_after_a_sync_failed_makes_no_chunk_of_what_the_device_says() {
    let (bench, _ailing) = with_ailing(true, true).await;
    let writer = bench.attach().await;
    let plan = one_write(&bench, &writer);
    let stored = writer.backend.upload(&plan, START_MS).await;
    assert!(
        matches!(stored, Err(NotSent::Untrusted { errno: libc::EIO })),
        "{stored:?}"
    );
    assert!(bench.chunks().await.is_empty());
    bench.crash(writer).await;
}

#[tokio::test(start_paused = true)]
async fn upload_of_what_cannot_be_read_holds_no_place_and_no_drain_and_ends_once_it_can() {
    let (bench, ailing) = with_ailing(false, false).await;
    let writer = bench.attach().await;
    let (backend, plan) = (Arc::clone(&writer.backend), one_write(&bench, &writer));
    let upload = tokio::spawn(async move { backend.upload(&plan, START_MS).await });
    let second = Duration::from_secs(1);
    tokio::time::sleep(second).await;
    // The only one that there is, for whoever's upload.
    drop(bench.common.uploads.enter(&bench.common.share).await);
    let drained = tokio::time::timeout(2 * READ_RETRY_DELAY, writer.backend.drain(true)).await;
    assert_eq!(drained, Ok(false));
    ailing.can_be_read.store(true, Ordering::Relaxed);
    let stored = tokio::time::timeout(2 * READ_RETRY_DELAY, upload).await;
    stored.unwrap().unwrap().unwrap();
    assert_eq!(bench.chunks().await.len(), 1);
    // As when its answer was lost; but not of another chunk that says the same of its writes.
    let mut plan = one_write(&bench, &writer);
    writer.backend.upload(&plan, START_MS).await.unwrap();
    plan.extents[0].range = LbaRange::new(Lba::new(8), Sectors::new(8)).unwrap();
    let refused = writer.backend.upload(&plan, START_MS).await;
    assert!(
        matches!(refused, Err(NotSent::Fenced { .. })),
        "{refused:?}"
    );
    // Drains are waited for again.
    let drain = tokio::time::timeout(second, writer.backend.drain(true)).await;
    assert!(drain.is_err(), "{drain:?}");
    bench.crash(writer).await;
}
