//! For tests: a small volume in a folder, laid out by hand, to be damaged.
//!
//! Chunk n (1 to 5) writes the sectors from (n-1) x 256 on, 256 of them, as two frames. Chunk 6 writes the
//! first 64 sectors anew and zeroes 256..320. The map has chunks 1 and 2 in its older run, chunk 3 in its
//! newer; the log has chunk 4, a seal, and of the next epoch chunks 5 and 6.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use quarry_objfmt::chunk::{
    ChunkExtent, ChunkHeader, ChunkParams, ExtentBody, encode_chunk, encode_seal,
};
use quarry_objfmt::head::{Head, LogRange, RootRef};
use quarry_objfmt::map::{Manifest, MapObjectBuilder, MapObjectId, TableRef, Usage};
use quarry_objfmt::{
    ChunkId, ChunkSeq, Compression, Epoch, Lba, MapEntry, MapSeq, Sectors, TenantName, VolumeId,
    VolumeName, WriteSeq, keys,
};
use tempfile::TempDir;

use crate::control::VolumeRef;
use crate::store::{FolderStore, Store};

/// Sectors of the volume.
pub(crate) const SIZE: u64 = 4096;
/// Sectors that a chunk writes.
pub(crate) const PIECE: u64 = 256;
const FRAME: u32 = 128;

/// The volume.
pub(crate) struct Fixture {
    dir: TempDir,
    pub store: Arc<dyn Store>,
    pub head: Head,
    pub name: VolumeRef,
}

pub(crate) fn volume_id() -> VolumeId {
    VolumeId::from_bytes([7; 16])
}

pub(crate) fn chunk_id(epoch: u32, seq: u64) -> ChunkId {
    ChunkId {
        volume: volume_id(),
        epoch: Epoch::new(epoch),
        seq: ChunkSeq::new(seq),
    }
}

pub(crate) fn map_id(epoch: u32, seq: u64) -> MapObjectId {
    MapObjectId {
        volume: volume_id(),
        epoch: Epoch::new(epoch),
        seq: MapSeq::new(seq),
    }
}

pub(crate) fn piece(seq: u64) -> ChunkExtent {
    extent((seq - 1) * PIECE, 256, Some(0))
}

pub(crate) fn extent(start: u64, len: u32, raw: Option<u32>) -> ChunkExtent {
    ChunkExtent {
        start: Lba::new(start),
        len,
        body: raw.map_or(ExtentBody::Zero, |raw| ExtentBody::Data { raw }),
    }
}

/// A chunk of one write, whose number is the chunk's.
pub(crate) fn make_chunk(id: ChunkId, extents: &[ChunkExtent]) -> (Bytes, ChunkHeader) {
    make_chunk_of(id, id.seq.get(), extents)
}

pub(crate) fn make_chunk_of(
    id: ChunkId,
    write: u64,
    extents: &[ChunkExtent],
) -> (Bytes, ChunkHeader) {
    let data = extents
        .iter()
        .filter(|e| matches!(e.body, ExtentBody::Data { .. }));
    let sectors: u32 = data.map(|e| e.len).sum();
    let seed = id.seq.get() * 31;
    let raw: Vec<u8> = (0..u64::from(sectors) * 512)
        .map(|n| u8::try_from((n + seed) * (n + 7) % 251).unwrap())
        .collect();
    let params = ChunkParams {
        id,
        first_write: WriteSeq::new(write),
        last_write: WriteSeq::new(write),
        cut_ms: 0,
        frame_sectors: FRAME,
        compression: Compression::None,
        key: None,
    };
    let encoded = encode_chunk(&params, extents, &raw);
    (encoded.bytes, encoded.header)
}

impl Fixture {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(FolderStore::open(dir.path(), true).unwrap());
        let (tenant, name) = (
            TenantName::new("acme").unwrap(),
            VolumeName::new("db").unwrap(),
        );
        let head = Head {
            sector_size: 4096,
            frame_sectors: FRAME,
            compression: Compression::None,
            epoch: Epoch::new(2),
            log: vec![
                LogRange {
                    epoch: Epoch::new(1),
                    first: ChunkSeq::new(4),
                    end: Some(ChunkSeq::new(5)),
                },
                LogRange {
                    epoch: Epoch::new(2),
                    first: ChunkSeq::new(5),
                    end: None,
                },
            ],
            root_write: WriteSeq::new(3),
            next_map: MapSeq::new(2),
            ..Head::fresh(volume_id(), &tenant, &name, Sectors::new(SIZE), 1)
        };
        let mut new = Self {
            dir,
            store,
            head,
            name: VolumeRef::new("acme", "db").unwrap(),
        };
        let mut entries = Vec::new();
        for seq in 1..=4 {
            entries.push(new.put_chunk(chunk_id(1, seq), &[piece(seq)]).await);
        }
        new.put_chunk(chunk_id(2, 5), &[piece(5)]).await;
        let newest = [extent(0, 64, Some(0)), extent(256, 64, None)];
        new.put_chunk(chunk_id(2, 6), &newest).await;
        let seal = encode_seal(chunk_id(1, 5), Epoch::new(2), "b");
        new.put(&new.chunk_key(1, 5), seal).await;
        let older = entries[..2].concat();
        let (_, table) = new.put_map(map_id(1, 0), &older, Manifest::default()).await;
        let below = Manifest {
            runs: vec![vec![table]],
        };
        let (root, _) = new.put_map(map_id(1, 1), &entries[2], below).await;
        new.head.root = Some(root);
        new.put_head().await;
        new
    }

    pub async fn put(&self, key: &str, bytes: impl Into<Bytes>) {
        self.store.delete(key).await.unwrap();
        self.store.create(key, bytes.into()).await.unwrap();
    }

    pub async fn put_head(&self) {
        self.put(&self.head_key(), self.head.encode()).await;
    }

    /// Puts a chunk and answers its entries.
    pub async fn put_chunk(&self, id: ChunkId, extents: &[ChunkExtent]) -> Vec<MapEntry> {
        let (bytes, header) = make_chunk(id, extents);
        let key = keys::chunk_key(&self.name.tenant, id);
        self.put(&key, bytes).await;
        header.map_entries()
    }

    /// Puts a map object: a run of `entries` above the runs of `below`.
    pub async fn put_map(
        &self,
        id: MapObjectId,
        entries: &[MapEntry],
        below: Manifest,
    ) -> (RootRef, TableRef) {
        self.put_map_with(id, entries, below, None).await
    }

    /// The same, with a usage if there is one to be.
    pub async fn put_map_with(
        &self,
        id: MapObjectId,
        entries: &[MapEntry],
        below: Manifest,
        usage: Option<&Usage>,
    ) -> (RootRef, TableRef) {
        let mut builder = MapObjectBuilder::new(id);
        for entry in entries {
            builder.push(*entry).unwrap();
        }
        let table = builder.finish_table().unwrap().unwrap();
        let mut runs = below.runs;
        runs.insert(0, vec![table]);
        let usage = usage.map(|usage| builder.finish_usage(usage).unwrap());
        let (offset, len) = builder.finish_manifest(&Manifest { runs }).unwrap();
        let key = self.map_key(id.epoch.get(), id.seq.get());
        self.put(&key, builder.into_bytes()).await;
        let (epoch, seq) = (id.epoch, id.seq);
        let root = RootRef {
            epoch,
            seq,
            offset,
            len,
            usage,
        };
        (root, table)
    }

    pub fn head_key(&self) -> String {
        keys::head_key(&self.name.tenant, volume_id())
    }

    pub fn chunk_key(&self, epoch: u32, seq: u64) -> String {
        keys::chunk_key(&self.name.tenant, chunk_id(epoch, seq))
    }

    pub fn map_key(&self, epoch: u32, seq: u64) -> String {
        let id = map_id(epoch, seq);
        keys::map_key(&self.name.tenant, id.volume, id.epoch, id.seq)
    }

    pub fn path(&self, key: &str) -> PathBuf {
        self.dir.path().join(key)
    }

    /// Flips a bit; from the end, if `at` is negative.
    pub fn flip(&self, key: &str, at: i64) {
        let mut bytes = fs::read(self.path(key)).unwrap();
        let at = at.rem_euclid(i64::try_from(bytes.len()).unwrap());
        bytes[usize::try_from(at).unwrap()] ^= 1;
        fs::write(self.path(key), bytes).unwrap();
    }

    /// Flips a bit of the usage of this map.
    pub fn flip_usage(&self, root: &RootRef) {
        let (offset, len) = root.usage.unwrap();
        let key = self.map_key(root.epoch.get(), root.seq.get());
        self.flip(&key, i64::from(offset + len - 1));
    }

    pub fn remove(&self, key: &str) {
        fs::remove_file(self.path(key)).unwrap();
    }

    /// Cuts off so many bytes.
    pub fn cut(&self, key: &str, bytes: u64) {
        let file = fs::OpenOptions::new().write(true).open(self.path(key));
        let file = file.unwrap();
        file.set_len(file.metadata().unwrap().len() - bytes)
            .unwrap();
    }
}
