use std::time::Duration;

use quarry_objfmt::map::{Manifest, Usage};
use quarry_objfmt::{Epoch, Lba, Location, Sectors};

use super::fixture::{
    Fixture, PIECE, SIZE, chunk_id, extent, make_chunk, make_chunk_of, map_id, piece, volume_id,
};
use super::*;
use crate::store::Lane;

async fn in_time(
    run: impl Future<Output = Result<Option<VerifyReport>, StoreError>>,
) -> VerifyReport {
    let run = tokio::time::timeout(Duration::from_secs(60), run).await;
    run.expect("it waits for ever").unwrap().unwrap()
}

/// Sectors that a report calls unreadable.
fn unreadable(report: &VerifyReport) -> Vec<(u64, u64)> {
    let ranges = report.unreadable.iter();
    let sectors: Vec<_> = ranges.map(|r| (r.start / 512, r.end / 512)).collect();
    let sum: u64 = sectors.iter().map(|(start, end)| end - start).sum();
    assert_eq!(sum * 512, report.unreadable_bytes);
    sectors
}

impl Fixture {
    async fn verify_with(&self, deep: bool, refs_max: usize) -> VerifyReport {
        let progress = Arc::<Progress>::default();
        let store = Arc::new(Lane::narrow(Arc::clone(&self.store)));
        let image = self.name.clone().into();
        let spec = VerifySpec {
            deep,
            snapshots: true,
        };
        let run = run_with(store, &image, volume_id(), spec, None, progress, refs_max);
        in_time(run).await
    }

    async fn verify(&self, deep: bool) -> VerifyReport {
        let report = self.verify_with(deep, REFS_MAX).await;
        // With room for one entry the map is walked once for each chunk, and the same is found.
        let tight = self.verify_with(deep, 1).await;
        assert_eq!(report.findings, tight.findings);
        assert_eq!(unreadable(&report), unreadable(&tight));
        assert_eq!(report.checked.chunks, tight.checked.chunks);
        report
    }

    /// Asserts what is found: one finding, of `key`, that says `words` and hits `sectors`.
    async fn assert_found(&self, deep: bool, key: &str, words: &str, sectors: &[(u64, u64)]) {
        let report = self.verify(deep).await;
        let [finding] = &report.findings[..] else {
            panic!("{words}: {:?}", report.findings);
        };
        assert_eq!(finding.object, key, "{finding:?}");
        assert!(finding.problem.contains(words), "{finding:?}");
        assert_eq!(unreadable(&report), sectors, "{words}, deep: {deep}");
    }

    async fn assert_clean(&self, deep: bool) {
        let report = self.verify(deep).await;
        assert_eq!(report.findings, []);
        assert_eq!(unreadable(&report), []);
    }
}

const WHOLE: &[(u64, u64)] = &[(0, SIZE)];

#[tokio::test]
async fn sound_volume_has_no_findings_and_all_of_it_is_counted() {
    let fixture = Fixture::new().await;
    for deep in [false, true] {
        fixture.assert_clean(deep).await;
        let report = fixture.verify(deep).await;
        assert_eq!((report.epoch, report.next_chunk), (Some(2), 7));
        assert_eq!(report.last_write, 6);
        // A manifest, two index nodes, two leaves; and the frame of chunk 6 beside two of each other.
        let checked = report.checked;
        assert_eq!((checked.nodes, checked.chunks), (5, 6));
        assert_eq!(checked.frames, if deep { 11 } else { 0 });
        assert_eq!(checked.chunks_total, 6);
    }
}

#[tokio::test]
async fn volume_never_written_has_no_findings() {
    let mut fixture = Fixture::new().await;
    fixture.head.root = None;
    fixture.head.log = Vec::new();
    fixture.put_head().await;
    fixture.assert_clean(true).await;
}

#[tokio::test]
async fn damaged_frame_is_found_by_deep_alone_and_hits_what_newer_data_leave() {
    let fixture = Fixture::new().await;
    let key = fixture.chunk_key(1, 1);
    let len = i64::try_from(std::fs::metadata(fixture.path(&key)).unwrap().len()).unwrap();
    // In the first frame, whose first half chunk 6 has written anew.
    fixture.flip(&key, len / 4);
    fixture.assert_clean(false).await;
    let words = "1 of the 2 frames needed of it cannot be read; the first is frame 0";
    fixture.assert_found(true, &key, words, &[(64, 128)]).await;
    // And in the second: both in one finding.
    fixture.flip(&key, -1);
    let words = "2 of the 2 frames";
    fixture.assert_found(true, &key, words, &[(64, 256)]).await;
}

#[tokio::test]
async fn chunk_that_is_missing_or_cut_off_hits_its_sectors() {
    for deep in [false, true] {
        let fixture = Fixture::new().await;
        let key = fixture.chunk_key(1, 1);
        fixture.cut(&key, 1);
        let words = if deep { "frame 1" } else { "cut off" };
        let second = [(128, 256)];
        fixture.assert_found(deep, &key, words, &second).await;
        fixture.cut(&key, PIECE * 512 / 2 + 100);
        let words = if deep { "frame 0" } else { "cut off" };
        let both = [(64, 256)];
        fixture.assert_found(deep, &key, words, &both).await;
        fixture.remove(&key);
        fixture.assert_found(deep, &key, "missing", &both).await;
    }
}

#[tokio::test]
async fn chunk_longer_than_its_first_read_is_found_cut_off() {
    let fixture = Fixture::new().await;
    let key = fixture.chunk_key(1, 4);
    assert!(std::fs::metadata(fixture.path(&key)).unwrap().len() > 2 * (64 << 10));
    fixture.cut(&key, 1);
    let words = "cut off";
    fixture
        .assert_found(false, &key, words, &[(768 + 128, 1024)])
        .await;
    // All but the header, which the log needs.
    fixture.cut(&key, 131_000);
    fixture
        .assert_found(false, &key, words, &[(768, 1024)])
        .await;
}

#[tokio::test]
async fn damaged_header_of_a_chunk_in_the_map_hits_no_sector() {
    let fixture = Fixture::new().await;
    let key = fixture.chunk_key(1, 2);
    fixture.flip(&key, 47);
    for deep in [false, true] {
        fixture.assert_found(deep, &key, "its header", &[]).await;
    }
}

#[tokio::test]
async fn chunk_of_another_place_under_the_key_is_found() {
    let fixture = Fixture::new().await;
    let key = fixture.chunk_key(1, 2);
    let (other, _) = make_chunk(chunk_id(1, 3), &[piece(3)]);
    fixture.put(&key, other).await;
    let words = "another place";
    let report = fixture.verify(false).await;
    assert_eq!(report.findings.len(), 1, "{words}");
    assert!(report.findings[0].problem.contains("place in the log"));
    let deep = fixture.verify(true).await;
    // The header is another's, and so is each frame.
    assert_eq!(deep.findings.len(), 2);
    assert_eq!(unreadable(&deep), [(320, 512)]);
}

#[tokio::test]
async fn seal_in_the_place_of_a_chunk_hits_its_sectors() {
    let fixture = Fixture::new().await;
    let key = fixture.chunk_key(1, 2);
    let seal = quarry_objfmt::encode_seal(chunk_id(1, 2), Epoch::new(2), "b");
    fixture.put(&key, seal).await;
    for deep in [false, true] {
        let hit = [(320, 512)];
        fixture.assert_found(deep, &key, "a seal", &hit).await;
    }
}

#[tokio::test]
async fn chunk_that_holds_other_sectors_than_the_map_says_hits_them() {
    let fixture = Fixture::new().await;
    let key = fixture.chunk_key(1, 3);
    // Sound in itself, and of that place.
    let moved = [extent(2 * PIECE + 8, 256, Some(0))];
    fixture.put_chunk(chunk_id(1, 3), &moved).await;
    for deep in [false, true] {
        let hit = [(512, 768)];
        fixture
            .assert_found(deep, &key, "than the map says", &hit)
            .await;
    }
}

#[tokio::test]
async fn entry_over_extents_that_lie_end_to_end_is_no_finding() {
    let mut fixture = Fixture::new().await;
    // As a merge joins them: one entry for each frame.
    let (_, header) = make_chunk(chunk_id(1, 3), &[piece(3)]);
    let joined = header.map_entries();
    let at = 2 * PIECE;
    let extents = [extent(at, 100, Some(0)), extent(at + 100, 156, Some(100))];
    let split = fixture.put_chunk(chunk_id(1, 3), &extents).await;
    assert_eq!((joined.len(), split.len()), (2, 3));
    let mut entries = joined;
    for entry in &mut entries {
        if let (Location::Data(data), Location::Data(of)) = (&mut entry.location, split[0].location)
        {
            let second = data.raw == 128;
            let Location::Data(last) = split[2].location else {
                unreachable!()
            };
            let place = if second { last } else { of };
            (data.stored_offset, data.stored_len) = (place.stored_offset, place.stored_len);
        }
    }
    let (root, _) = fixture
        .put_map(map_id(1, 1), &entries, Manifest::default())
        .await;
    fixture.head.root = Some(root);
    fixture.put_head().await;
    for deep in [false, true] {
        fixture.assert_clean(deep).await;
    }
}

#[tokio::test]
async fn damaged_nodes_of_the_map_hit_what_newer_runs_leave() {
    let older = [(64, 256), (320, 512)];
    let newer = [(512, 768)];
    for deep in [false, true] {
        let fixture = Fixture::new().await;
        let key = fixture.map_key(1, 0);
        // The leaf comes first in an object.
        fixture.flip(&key, 30);
        fixture.assert_found(deep, &key, "checksum", &older).await;
        fixture.remove(&key);
        let words = "is not in the store";
        fixture.assert_found(deep, &key, words, &older).await;

        let fixture = Fixture::new().await;
        let key = fixture.map_key(1, 1);
        fixture.flip(&key, 30);
        fixture.assert_found(deep, &key, "checksum", &newer).await;

        // The manifest is the last of it.
        let fixture = Fixture::new().await;
        let key = fixture.map_key(1, 1);
        fixture.flip(&key, -1);
        let words = "cannot be attached";
        fixture.assert_found(deep, &key, words, WHOLE).await;
        fixture.cut(&key, 1);
        fixture.assert_found(deep, &key, words, WHOLE).await;
    }
}

#[tokio::test]
async fn damaged_index_hits_its_table() {
    let fixture = Fixture::new().await;
    let key = fixture.map_key(1, 1);
    let len = std::fs::metadata(fixture.path(&key)).unwrap().len();
    let root = fixture.head.root.unwrap();
    assert!(u64::from(root.offset + root.len) == len);
    // Right in front of the manifest.
    fixture.flip(&key, i64::from(root.offset) - 1);
    fixture
        .assert_found(false, &key, "checksum", &[(512, 768)])
        .await;
}

#[tokio::test]
async fn damaged_usage_is_found_and_hits_no_sector() {
    let mut fixture = Fixture::new().await;
    let entries = (1..=3).flat_map(|n| make_chunk(chunk_id(1, n), &[piece(n)]).1.map_entries());
    let (entries, usage) = (entries.collect::<Vec<_>>(), Usage::default());
    let (id, below) = (map_id(1, 1), Manifest::default());
    let (root, _) = fixture
        .put_map_with(id, &entries, below, Some(&usage))
        .await;
    fixture.head.root = Some(root);
    fixture.put_head().await;
    fixture.assert_clean(true).await;
    fixture.flip_usage(&root);
    for deep in [false, true] {
        let words = "no read needs it";
        let key = fixture.map_key(1, 1);
        fixture.assert_found(deep, &key, words, &[]).await;
    }
}

#[tokio::test]
async fn map_that_names_what_is_not_of_the_history_hits_these_sectors() {
    let mut fixture = Fixture::new().await;
    // Chunk 5 is the log's: no map of before can name it; nor a chunk of another volume.
    let mut other = chunk_id(1, 3);
    other.volume = quarry_objfmt::VolumeId::from_bytes([8; 16]);
    for wrong in [chunk_id(2, 5), chunk_id(9, 3), other] {
        let (_, header) = make_chunk(chunk_id(1, 3), &[piece(3)]);
        let mut entries = header.map_entries();
        for entry in &mut entries {
            if let Location::Data(data) = &mut entry.location {
                data.chunk = wrong;
            }
        }
        let (root, _) = fixture
            .put_map(map_id(1, 1), &entries, Manifest::default())
            .await;
        fixture.head.root = Some(root);
        fixture.put_head().await;
        let key = fixture.map_key(1, 1);
        let hit = [(512, 768)];
        fixture
            .assert_found(false, &key, "not of the volume's history", &hit)
            .await;
    }
}

#[tokio::test]
async fn data_behind_the_end_of_a_volume_that_was_shrunk_are_found_unless_they_were_discarded() {
    let mut fixture = Fixture::new().await;
    fixture.head.size = Sectors::new(512);
    fixture.put_head().await;
    let report = fixture.verify(false).await;
    assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    let problem = &report.findings[0].problem;
    assert!(problem.contains("behind the volume's end"), "{problem}");
    let tail = u32::try_from(SIZE - 512).unwrap();
    let discarded = [extent(512, tail, None)];
    fixture.put_chunk(chunk_id(2, 7), &discarded).await;
    fixture.assert_clean(true).await;
}

#[tokio::test]
async fn damaged_missing_or_foreign_head_is_found() {
    let fixture = Fixture::new().await;
    let key = fixture.head_key();
    fixture.flip(&key, 40);
    let words = "cannot be attached";
    fixture.assert_found(false, &key, words, &[]).await;
    fixture.remove(&key);
    fixture.assert_found(true, &key, words, &[]).await;

    let mut fixture = Fixture::new().await;
    fixture.head.name = "other".to_owned();
    fixture.put_head().await;
    let words = "the volume is called acme/other";
    fixture.assert_found(false, &key, words, &[]).await;
}

#[tokio::test]
async fn damaged_log_is_found_and_no_sector_can_be_read() {
    for deep in [false, true] {
        let fixture = Fixture::new().await;
        let key = fixture.chunk_key(1, 4);
        fixture.flip(&key, 46);
        fixture
            .assert_found(deep, &key, "cannot be attached", WHOLE)
            .await;
        fixture.remove(&key);
        fixture.assert_found(deep, &key, "missing", WHOLE).await;

        let fixture = Fixture::new().await;
        let key = fixture.chunk_key(2, 5);
        fixture.flip(&key, 0);
        fixture
            .assert_found(deep, &key, "cannot be attached", WHOLE)
            .await;
    }
}

#[tokio::test]
async fn gap_in_the_numbers_of_writes_is_found() {
    let fixture = Fixture::new().await;
    let key = fixture.chunk_key(2, 6);
    let (bytes, _) = make_chunk_of(chunk_id(2, 6), 7, &[piece(6)]);
    fixture.put(&key, bytes).await;
    let words = "it starts at write 7, the log before it ends at 5";
    fixture.assert_found(false, &key, words, WHOLE).await;
}

#[tokio::test]
async fn seal_that_is_missing_or_damaged_is_found_and_hits_nothing() {
    let fixture = Fixture::new().await;
    let key = fixture.chunk_key(1, 5);
    fixture.flip(&key, 44);
    fixture.assert_found(false, &key, "seal", &[]).await;
    fixture.remove(&key);
    fixture.assert_found(false, &key, "missing", &[]).await;
    fixture.put_chunk(chunk_id(1, 5), &[piece(5)]).await;
    fixture.assert_found(true, &key, "was sealed", &[]).await;
    let late = quarry_objfmt::encode_seal(chunk_id(1, 5), Epoch::new(3), "b");
    fixture.put(&key, late).await;
    fixture.assert_found(true, &key, "by epoch 3", &[]).await;
}

#[tokio::test]
async fn orphan_behind_a_seal_is_not_looked_at() {
    let fixture = Fixture::new().await;
    let key = fixture.chunk_key(1, 6);
    fixture.put(&key, "no chunk at all").await;
    fixture.assert_clean(true).await;
}

#[tokio::test]
async fn head_that_names_a_long_row_of_nothing_ends_soon() {
    let mut fixture = Fixture::new().await;
    fixture.head.log[0].end = Some(quarry_objfmt::ChunkSeq::new(1 << 60));
    fixture.head.log.pop();
    fixture.put_head().await;
    let report = fixture.verify(false).await;
    assert_eq!(report.findings.len(), findings::FINDINGS_MAX);
    assert_eq!(unreadable(&report), WHOLE);
}

#[tokio::test]
async fn volume_that_grew_since_its_head_was_read_is_no_finding() {
    let fixture = Fixture::new().await;
    let far = [extent(SIZE, 256, Some(0))];
    fixture.put_chunk(chunk_id(2, 7), &far).await;
    let key = fixture.chunk_key(2, 7);
    fixture
        .assert_found(false, &key, "behind the volume's end", &[])
        .await;

    let mut grown = fixture.head.clone();
    grown.size = Sectors::new(SIZE * 2);
    let store = Lane::narrow(Arc::new(Grows {
        store: Arc::clone(&fixture.store),
        key: fixture.head_key(),
        first: parking_lot::Mutex::new(true),
        grown: grown.encode().into(),
    }));
    let (image, spec) = (fixture.name.clone().into(), VerifySpec::default());
    let run = run(
        Arc::new(store),
        &image,
        volume_id(),
        spec,
        None,
        Arc::default(),
    );
    assert_eq!(in_time(run).await.findings, []);
}

#[tokio::test]
async fn snapshot_is_hit_where_newer_writes_hide_the_damage_from_its_volume() {
    let mut fixture = Fixture::new().await;
    fixture.head.snapshots.push(SnapshotRef {
        name: "then".to_owned(),
        created_ms: 1,
        root_write: fixture.head.root_write,
        size: fixture.head.size,
        closing: false,
        root: fixture.head.root,
    });
    fixture.put_head().await;
    let report = fixture.verify(true).await;
    assert_eq!((&report.findings[..], report.snapshots.len()), (&[][..], 1));
    assert_eq!(
        (&report.snapshots[0].findings[..], report.snapshots_left_out),
        (&[][..], 0)
    );
    // The last byte of the first of its two frames; the log has zeroes over half of what is in that.
    let second = 16 + 128 * 512;
    fixture.flip(&fixture.chunk_key(1, 2), -second - 1);
    let report = fixture.verify(true).await;
    assert_eq!(unreadable(&report), [(320, 384)]);
    assert_eq!(report.snapshots[0].volume, "acme/db@then");
    assert_eq!(unreadable(&report.snapshots[0]), [(256, 384)]);
    let of = async |image: &str, spec| {
        let (store, image) = (Arc::clone(&fixture.store), image.parse().unwrap());
        let run = run(
            Arc::new(store),
            &image,
            volume_id(),
            spec,
            None,
            Arc::default(),
        );
        run.await.unwrap()
    };
    let deep = VerifySpec {
        deep: true,
        snapshots: false,
    };
    let alone = of("acme/db@then", deep).await.unwrap();
    assert_eq!(unreadable(&alone), [(256, 384)]);
    assert!(of("acme/db@none", deep).await.is_none());
    let told = of("acme/db", deep).await.unwrap();
    assert_eq!((told.snapshots.len(), told.snapshots_left_out), (0, 1));
}

/// A store in which a volume grows as soon as its head was read.
#[derive(Debug)]
struct Grows {
    store: Arc<dyn Store>,
    key: String,
    first: parking_lot::Mutex<bool>,
    grown: bytes::Bytes,
}

#[async_trait::async_trait]
impl Store for Grows {
    async fn get(&self, key: &str) -> Result<(bytes::Bytes, crate::store::Tag), StoreError> {
        let first = std::mem::replace(&mut *self.first.lock(), false);
        let got = self.store.get(key).await?;
        if key == self.key && !first {
            return Ok((self.grown.clone(), got.1));
        }
        Ok(got)
    }
    async fn get_range(
        &self,
        key: &str,
        range: std::ops::Range<u64>,
    ) -> Result<bytes::Bytes, StoreError> {
        self.store.get_range(key, range).await
    }
    async fn get_prefix(&self, key: &str, len: u64) -> Result<bytes::Bytes, StoreError> {
        self.store.get_prefix(key, len).await
    }
    async fn create(&self, _: &str, _: bytes::Bytes) -> Result<crate::store::Tag, StoreError> {
        unreachable!("a check changes nothing")
    }
    async fn replace(
        &self,
        _: &str,
        _: bytes::Bytes,
        _: &crate::store::Tag,
    ) -> Result<crate::store::Tag, StoreError> {
        unreachable!("a check changes nothing")
    }
    async fn delete(&self, _: &str) -> Result<(), StoreError> {
        unreachable!("a check changes nothing")
    }
    async fn list(&self, _: &str) -> Result<Vec<String>, StoreError> {
        unreachable!("a check does not list")
    }
    fn describe(&self) -> String {
        self.store.describe()
    }
}

#[test]
fn batch_past_its_bound_leaves_the_highest_chunks_for_later() {
    let needed = |start: u64| {
        let entry = quarry_objfmt::MapEntry {
            start: Lba::new(start),
            len: 8,
            location: Location::Zero,
        };
        let data = quarry_objfmt::DataLoc {
            chunk: chunk_id(1, 1),
            raw: 0,
            stored_offset: 0,
            stored_len: 1,
        };
        Ref::new(&entry, &data)
    };
    let mut batch = Batch::default();
    for seq in [3, 1, 2, 1, 3, 9] {
        batch.push(chunk_id(1, seq), needed(seq), 3);
    }
    assert_eq!(batch.above, Some(chunk_id(1, 3)));
    assert_eq!(batch.held, 3);
    let held: Vec<_> = batch.chunks.keys().map(|c| c.seq.get()).collect();
    assert_eq!(held, [1, 2]);
}
