use quarry_objfmt::CacheId;
use quarry_objfmt::head::Lineage;
use quarry_objfmt::map::{Manifest, Usage};
use quarry_objfmt::record::{CLONE_KIND, CloneRecord, encode_record};
use quarry_objfmt::{Compression, Durability};

use super::*;
use crate::backend::open::{Claim, claim};
use crate::control::VerifySpec;
use crate::verify::fixture::{Fixture, SIZE, chunk_id, make_chunk, map_id, piece, volume_id};

fn flags() -> RescueSpec {
    RescueSpec {
        apply: true,
        size_bytes: Some(SIZE * 512),
        sector_size: Some(4096),
        durability: Some(Durability::Object),
        compression: Some(Compression::Zstd),
        ..RescueSpec::default()
    }
}

fn range(epoch: u32, first: u64, end: u64) -> LogRangeInfo {
    LogRangeInfo { epoch, first, end }
}

impl Fixture {
    async fn rescue(&self, spec: &RescueSpec) -> Result<RescueReport, RescueError> {
        self.rescue_at(spec, 5).await
    }

    async fn rescue_at(&self, spec: &RescueSpec, now_ms: u64) -> Result<RescueReport, RescueError> {
        let store = Arc::clone(&self.store);
        run(store, &self.name, volume_id(), spec, "rescuer", now_ms).await
    }

    /// What would come of it, and that asking changes nothing.
    async fn look(&self) -> Result<RescueReport, RescueError> {
        let before = self.store.list("").await.unwrap();
        let report = self.rescue(&RescueSpec::default()).await;
        assert_eq!(self.store.list("").await.unwrap(), before);
        report
    }

    async fn head_now(&self) -> Head {
        Head::decode(&self.store.get(&self.head_key()).await.unwrap().0).unwrap()
    }

    async fn assert_sound(&self) {
        let spec = VerifySpec {
            deep: true,
            snapshots: true,
        };
        let (store, image) = (Arc::clone(&self.store), self.name.clone().into());
        let report = verify::run(store, &image, volume_id(), spec, None, Arc::default()).await;
        let report = report.unwrap().unwrap();
        assert_eq!(report.findings, []);
        assert!(report.snapshots.iter().all(|s| s.findings.is_empty()));
    }

    /// Makes it so, and attaches the volume; answers the head written.
    async fn rescue_and_attach(&self, next: u64, last_write: u64) -> Head {
        let report = self.rescue(&flags()).await.unwrap();
        assert!(report.applied);
        let head = self.head_now().await;
        assert_eq!(head.epoch.get(), report.epoch);
        self.assert_sound().await;
        let who = Claim {
            cache: CacheId::from_bytes([3; 16]),
            host: "c".to_owned(),
            now_ms: 9,
            force: false,
            discard_unsent: false,
            must_be_ours: false,
        };
        let tenant = &self.name.tenant;
        let claimed = claim(&*self.store, tenant, volume_id(), None, &who).await;
        let claimed = claimed.unwrap();
        assert_eq!(claimed.next_chunk.get(), next);
        assert_eq!(claimed.stored_write.get(), last_write);
        assert_eq!(claimed.info.epoch, head.epoch.next());
        let lineage = Lineage {
            cache: who.cache,
            since: claimed.info.epoch,
        };
        assert_eq!(claimed.info.lineage, Some(lineage));
        head
    }
}

#[tokio::test]
async fn lost_head_is_made_as_it_was_with_a_later_epoch_and_its_log_sealed() {
    for damaged in [false, true] {
        let fixture = Fixture::new().await;
        if damaged {
            fixture.flip(&fixture.head_key(), 60);
        } else {
            fixture.remove(&fixture.head_key());
        }
        let report = fixture.look().await.unwrap();
        assert_eq!(report.map, Some(fixture.map_key(1, 1)));
        assert_eq!(report.log, [range(1, 4, 5), range(2, 5, 7)]);
        assert_eq!((report.left_behind, report.passed_over.len()), (0, 0));
        assert_eq!((report.last_write, report.epoch), (6, 258));
        assert_eq!(report.size_min_bytes, 5 * 256 * 512);
        assert_eq!(report.needs.len(), 4);
        assert!(!report.applied);

        let head = fixture.rescue_and_attach(7, 6).await;
        let was = &fixture.head;
        assert_eq!((head.root, head.root_write), (was.root, was.root_write));
        assert_eq!(
            (head.size, head.frame_sectors),
            (was.size, was.frame_sectors)
        );
        assert_eq!((head.sector_size, head.created_ms), (4096, 5));
        assert_eq!(head.durability, Durability::Object);
        assert_eq!(head.next_map, was.next_map);
        let key = fixture.chunk_key(2, 7);
        let (seal, _) = fixture.store.get(&key).await.unwrap();
        let seal = quarry_objfmt::Seal::decode(&seal, chunk_id(2, 7)).unwrap();
        assert_eq!((seal.by, &seal.by_host[..]), (head.epoch, "rescuer"));
    }
}

#[tokio::test]
async fn damaged_newest_map_is_passed_over_and_the_log_taken_from_before() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    let newest = fixture.map_key(1, 1);
    fixture.flip(&newest, -1);
    let report = fixture.look().await.unwrap();
    assert_eq!(report.map, Some(fixture.map_key(1, 0)));
    assert_eq!(report.log, [range(1, 3, 5), range(2, 5, 7)]);
    assert_eq!(report.passed_over.len(), 1);
    assert_eq!(report.passed_over[0].object, newest);

    // A leaf of the older run, which both maps have: only the whole log is left.
    fixture.flip(&fixture.map_key(1, 0), 30);
    let report = fixture.look().await.unwrap();
    assert_eq!(report.map, None);
    assert_eq!(report.log, [range(1, 1, 5), range(2, 5, 7)]);
    assert_eq!(report.passed_over.len(), 2);
    let head = fixture.rescue_and_attach(7, 6).await;
    assert_eq!((head.root, head.root_write), (None, WriteSeq::ZERO));
}

#[tokio::test]
async fn map_whose_usage_is_damaged_is_passed_over_and_no_older_chunk_laid_over_it() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    // Chunk 4 wrote zeroes over chunks 2 and 3 and is deleted: the map needs chunk 1 alone.
    fixture.remove(&fixture.chunk_key(1, 4));
    let entries = make_chunk(chunk_id(1, 1), &[piece(1)]).1.map_entries();
    let usage = Usage {
        basis: Basis {
            log_end: ChunkSeq::new(5),
            root_write: WriteSeq::new(4),
            ..Basis::of(&fixture.head)
        },
        ..Usage::default()
    };
    let (id, none) = (map_id(1, 2), Manifest::default());
    let (root, _) = fixture.put_map_with(id, &entries, none, Some(&usage)).await;
    let newest = fixture.map_key(1, 2);
    let report = fixture.look().await.unwrap();
    assert_eq!(report.map.as_ref(), Some(&newest));
    assert_eq!(report.log, [range(2, 5, 7)]);

    fixture.flip_usage(&root);
    let report = fixture.look().await.unwrap();
    // As the volume was before chunk 4.
    assert_eq!(report.map, Some(fixture.map_key(1, 1)));
    assert_eq!((report.log, report.last_write), (vec![range(1, 4, 4)], 3));
    let [passed_over] = &report.passed_over[..] else {
        panic!("{:?}", report.passed_over)
    };
    assert_eq!(passed_over.object, newest);
    let problem = &passed_over.problem;
    assert!(problem.contains("log goes on"), "{problem}");
}

#[tokio::test]
async fn sound_head_is_refused_and_stays() {
    let fixture = Fixture::new().await;
    let refused = fixture.rescue(&flags()).await;
    assert!(matches!(refused, Err(RescueError::Sound)));
    assert_eq!(fixture.head_now().await, fixture.head);
}

#[tokio::test]
async fn orphans_behind_a_seal_are_not_taken() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    for seq in [6, 7] {
        let key = fixture.chunk_key(1, seq);
        let (bytes, _) = make_chunk(chunk_id(1, seq), &[piece(9)]);
        fixture.put(&key, bytes).await;
    }
    let report = fixture.look().await.unwrap();
    assert_eq!(report.log, [range(1, 4, 5), range(2, 5, 7)]);
    assert_eq!((report.last_write, report.left_behind), (6, 0));
    fixture.rescue_and_attach(7, 6).await;
}

#[tokio::test]
async fn map_that_names_an_orphan_is_passed_over() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    // Of the first epoch, where the second had begun.
    let entries = fixture.put_chunk(chunk_id(1, 6), &[piece(6)]).await;
    let id = map_id(1, 2);
    fixture.put_map(id, &entries, Manifest::default()).await;
    let report = fixture.look().await.unwrap();
    assert_eq!(report.map, Some(fixture.map_key(1, 1)));
    assert!(report.passed_over[0].problem.contains("not of the log"));
}

#[tokio::test]
async fn log_goes_on_in_a_later_epoch_than_the_one_that_sealed_it() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    // The attach of epoch 2 sealed and died; that of epoch 3 wrote.
    for seq in [5, 6] {
        fixture.remove(&fixture.chunk_key(2, seq));
        fixture.put_chunk(chunk_id(3, seq), &[piece(seq)]).await;
    }
    let report = fixture.look().await.unwrap();
    assert_eq!(report.log, [range(1, 4, 5), range(3, 5, 7)]);
    assert_eq!(report.epoch, 259);
    fixture.rescue_and_attach(7, 6).await;
}

#[tokio::test]
async fn gap_ends_the_log_and_what_lies_behind_is_counted() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    fixture.remove(&fixture.chunk_key(2, 5));
    let report = fixture.look().await.unwrap();
    assert_eq!(report.log, [range(1, 4, 5)]);
    assert_eq!((report.last_write, report.left_behind), (4, 1));
    assert!(report.log_ends.contains("sealed"), "{}", report.log_ends);
    fixture.rescue_and_attach(5, 4).await;
    // A writer of the epoch that sealed cannot fill the gap.
    let key = fixture.chunk_key(2, 5);
    let put = fixture.store.create(&key, Bytes::new()).await;
    assert!(matches!(put, Err(StoreError::Exists { .. })));
}

#[tokio::test]
async fn damaged_chunk_of_the_log_ends_it() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    fixture.flip(&fixture.chunk_key(2, 6), 47);
    let report = fixture.look().await.unwrap();
    assert_eq!(report.log, [range(1, 4, 5), range(2, 5, 6)]);
    assert_eq!((report.last_write, report.left_behind), (5, 1));
    assert!(report.log_ends.contains("chunk 6"), "{}", report.log_ends);
    assert!(fixture.rescue(&flags()).await.unwrap().applied);
}

#[tokio::test]
async fn state_that_lacks_a_chunk_is_not_whole() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    fixture.remove(&fixture.chunk_key(1, 1));
    let error = fixture.rescue(&flags()).await.unwrap_err();
    let words = error.to_string();
    assert!(words.contains(&fixture.chunk_key(1, 1)), "{words}");
    assert!(fixture.store.get(&fixture.head_key()).await.is_err());
}

#[tokio::test]
async fn snapshot_that_a_clone_needs_is_not_left_out_of_the_new_head() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    let (tenant, clone) = (&fixture.name.tenant, VolumeId::from_bytes([9; 16]));
    let lost = SnapName::new("lost").unwrap();
    let record = CloneRecord {
        volume: clone,
        name: "copy".to_owned(),
        created_ms: 1,
    };
    let record = encode_record(CLONE_KIND, &record).unwrap();
    let key = keys::clone_key(tenant, volume_id(), &lost, clone);
    fixture.store.create(&key, record.into()).await.unwrap();
    fixture.look().await.unwrap();
    let before = fixture.store.list("").await.unwrap();
    let refused = fixture.rescue(&flags()).await.unwrap_err().to_string();
    assert!(
        refused.contains("acme/copy was cloned from snapshot lost"),
        "{refused}"
    );
    assert_eq!(fixture.store.list("").await.unwrap(), before);
    // Of a clone that was begun long ago and never made nothing is left.
    assert!(fixture.rescue_at(&flags(), 1 << 40).await.unwrap().applied);
}

#[tokio::test]
async fn volume_without_a_chunk_is_refused() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    let other = VolumeId::from_bytes([9; 16]);
    let store = Arc::clone(&fixture.store);
    let refused = run(store, &fixture.name, other, &flags(), "x", 5).await;
    assert!(matches!(refused, Err(RescueError::Nothing)));
}

#[tokio::test]
async fn what_the_head_alone_said_must_be_given_and_fit() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    let mut spec = flags();
    (spec.size_bytes, spec.durability) = (None, None);
    let error = fixture.rescue(&spec).await.unwrap_err().to_string();
    assert!(error.ends_with("--size, --durability missing"), "{error}");
    spec = flags();
    spec.size_bytes = Some(4096);
    let refused = fixture.rescue(&spec).await;
    assert!(matches!(
        refused,
        Err(RescueError::Size { min: 655_360, .. })
    ));
    assert!(fixture.store.get(&fixture.head_key()).await.is_err());
    assert!(fixture.store.get(&fixture.chunk_key(2, 7)).await.is_err());
}

#[tokio::test]
async fn rescue_cut_off_after_its_seal_is_done_again() {
    let fixture = Fixture::new().await;
    fixture.remove(&fixture.head_key());
    fixture.rescue(&flags()).await.unwrap();
    fixture.remove(&fixture.head_key());
    let report = fixture.look().await.unwrap();
    assert_eq!(report.log, [range(1, 4, 5), range(2, 5, 7)]);
    assert_eq!((report.last_write, report.epoch), (6, 514));
    fixture.rescue_and_attach(7, 6).await;
}

#[tokio::test]
async fn writer_that_is_quicker_than_the_seal_has_the_rescue_refused() {
    let fixture = Fixture::new().await;
    let store = Arc::clone(&fixture.store);
    let listed = Listed::read(&*store, &fixture.name, volume_id())
        .await
        .unwrap();
    let newest = Some(chunk_id(1, 3));
    let start = Start::Newest(newest, None);
    let followed = follow(&*store, &fixture.name, volume_id(), &listed, start).await;
    let followed = followed.unwrap().unwrap();
    let rescue = Rescue {
        store,
        volume: fixture.name.clone(),
        id: volume_id(),
        listed,
    };
    fixture.put_chunk(chunk_id(2, 7), &[piece(7)]).await;
    let refused = rescue.seal(&followed, Epoch::new(258), "x").await;
    assert!(matches!(refused, Err(RescueError::Raced { .. })));
}
