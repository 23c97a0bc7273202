//! The stories of bugs that the simulation found, each with the trouble that it takes and no other.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use quarry_gateway::backend::open::{Claim, open_read_only};
use quarry_gateway::snapshot::{CloneSpec, make_clone};
use quarry_gateway::store::{Lane, LaneSettings, S3Store, Store, StoreError};
use quarry_gateway::trash::{Purged, purge};
use quarry_objfmt::chunk::{ChunkExtent, ChunkParams, ExtentBody, encode_chunk};
use quarry_objfmt::codec::Compression;
use quarry_objfmt::head::{Durability, LogRange, SnapshotRef};
use quarry_objfmt::record::{TRASH_KIND, TrashRecord};
use quarry_objfmt::{
    CacheId, ChunkId, ChunkSeq, Epoch, Lba, SnapName, TenantName, VolumeId, VolumeName, WriteSeq,
    encode_record, keys,
};

use super::faults::Faults;
use super::oracle::Truth;
use super::plan::Plan;
use super::store::{BAD_BODIES_BORNE, SimBucket, Weather};
use super::world::{head, run};

fn hold_in(weather: Weather) {
    for seed in 0..10 {
        run(Plan {
            weather,
            ..Plan::calm(seed)
        });
    }
}

/// One flipped bit on the way ended all checkpoints of the attachment: the log grew until the next.
#[test]
fn checkpoint_whose_reads_are_damaged_on_the_way_is_made_all_the_same() {
    hold_in(Weather {
        wrong: 0.5,
        bad_bodies_max: BAD_BODIES_BORNE,
        ..Weather::default()
    });
}

/// An attach took the cut off beginning of a chunk for a damaged chunk.
#[tokio::test(start_paused = true)]
async fn beginning_of_an_object_that_is_cut_off_on_the_way_is_no_answer() {
    let bucket = SimBucket::new(1, Duration::from_millis(20), Faults::default());
    bucket.place("key", vec![7; 100]).await;
    bucket.set_weather(Weather {
        short: 1.0,
        bad_bodies_max: BAD_BODIES_BORNE,
        ..Weather::default()
    });
    let store = S3Store::over(bucket, "", String::new());
    let cut_off = store.get_prefix("key", 1000).await.unwrap_err();
    assert!(
        matches!(cut_off, StoreError::WrongLength { expected: 100, .. }),
        "{cut_off}"
    );
    let _second = store.get_prefix("key", 10).await.unwrap_err();
    // An object gives two bad bodies, and then good ones.
    assert_eq!(store.get_prefix("key", 10).await.unwrap(), [7; 10][..]);
    assert_eq!(store.get_prefix("key", 1000).await.unwrap(), [7; 100][..]);
}

/// One flipped bit in the answer to "what is there already?" made a volume read-only, for good.
#[test]
fn upload_whose_answers_are_lost_and_damaged_fences_nobody() {
    hold_in(Weather {
        error_after: 0.3,
        wrong: 0.5,
        bad_bodies_max: BAD_BODIES_BORNE,
        ..Weather::default()
    });
}

#[test]
fn attach_whose_reads_are_cut_off_on_the_way_is_not_refused() {
    hold_in(Weather {
        short: 0.5,
        bad_bodies_max: BAD_BODIES_BORNE,
        ..Weather::default()
    });
}

/// A bit flipped in what says how long a header is had bytes asked for that are not there; that was taken
/// for damage of the object.
#[tokio::test(start_paused = true)]
async fn length_of_a_header_that_is_damaged_on_the_way_is_asked_for_again() {
    let tenant = TenantName::new("acme").unwrap();
    let truth = Truth::new(0, tenant, Durability::Local, 64);
    let id = ChunkId {
        volume: truth.id,
        epoch: Epoch::ZERO,
        seq: ChunkSeq::new(1),
    };
    let mut head = head(&truth);
    head.log = vec![LogRange {
        epoch: id.epoch,
        first: id.seq,
        end: None,
    }];
    let params = ChunkParams {
        id,
        first_write: WriteSeq::new(1),
        last_write: WriteSeq::new(1),
        cut_ms: 1,
        frame_sectors: head.frame_sectors,
        compression: Compression::None,
        key: None,
    };
    let discard = ChunkExtent {
        start: Lba::new(0),
        len: 8,
        body: ExtentBody::Discard,
    };
    let chunk = encode_chunk(&params, &[discard], &[]).bytes;
    let claim = Claim {
        cache: CacheId::from_bytes([1; 16]),
        host: "host".to_owned(),
        now_ms: 0,
        force: false,
        discard_unsent: false,
        must_be_ours: false,
    };
    for seed in 0..300 {
        let bucket = SimBucket::new(seed, Duration::from_millis(20), Faults::default());
        let place = keys::chunk_key(&truth.tenant, id);
        bucket.place(&place, chunk.to_vec()).await;
        let place = keys::head_key(&truth.tenant, truth.id);
        bucket.place(&place, head.encode()).await;
        bucket.set_weather(Weather {
            wrong: 1.0,
            bad_bodies_max: BAD_BODIES_BORNE,
            ..Weather::default()
        });
        let store = S3Store::over(bucket, "", String::new());
        let opened = open_read_only(&store, &truth.tenant, truth.id, None, &claim).await;
        let opened = opened.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!(opened.stored_write, WriteSeq::new(1));
    }
}

/// A clone's head arrived when its making had been given up and its record was deleted: its snapshot could go
/// from under it.
#[tokio::test(start_paused = true)]
async fn clone_whose_head_arrives_late_has_its_record() {
    let mut late = 0;
    for seed in 0..300 {
        let bucket = SimBucket::new(seed, Duration::from_millis(20), Faults::default());
        let tenant = TenantName::new("acme").unwrap();
        let truth = Truth::new(0, tenant.clone(), Durability::Local, 64);
        let mut parent = head(&truth);
        parent.snapshots.push(SnapshotRef {
            name: "snap".to_owned(),
            created_ms: 0,
            root_write: WriteSeq::ZERO,
            size: parent.size,
            closing: false,
            root: None,
        });
        let place = keys::head_key(&tenant, truth.id);
        bucket.place(&place, parent.encode()).await;
        bucket.set_weather(Weather {
            lost_after: 0.4,
            ..Weather::default()
        });
        let store = S3Store::over(bucket.clone(), "", String::new());
        let settings = LaneSettings {
            seed: Some(seed),
            ..LaneSettings::default()
        };
        let lane = Lane::new(Arc::new(store), &settings);
        let spec = CloneSpec {
            tenant: tenant.clone(),
            parent: truth.id,
            snapshot: SnapName::new("snap").unwrap(),
            volume: VolumeId::from_bytes([9; 16]),
            name: VolumeName::new("copy").unwrap(),
            key: None,
            now_ms: 0,
        };
        let patience = lane.with_deadline(Duration::from_secs(20));
        let made = make_clone(&patience, &spec).await;
        // All that is on its way arrives.
        tokio::time::sleep(Duration::from_secs(90)).await;
        let place = keys::head_key(&tenant, spec.volume);
        if bucket.peek(&place).is_some() {
            late += u32::from(made.is_err());
            let record = keys::clone_key(&tenant, spec.parent, &spec.snapshot, spec.volume);
            assert!(bucket.peek(&record).is_some(), "seed {seed}: {made:?}");
        }
    }
    assert!(late > 0, "no head arrived late");
}

/// A bit flipped in the answer had a sound record called damaged: a volume could not be purged.
#[tokio::test(start_paused = true)]
async fn record_that_is_damaged_on_the_way_is_asked_for_again() {
    for seed in 0..50 {
        let bucket = SimBucket::new(seed, Duration::from_millis(20), Faults::default());
        let tenant = TenantName::new("acme").unwrap();
        let truth = Truth::new(0, tenant.clone(), Durability::Local, 64);
        let record = TrashRecord {
            volume: truth.id,
            name: "v0".to_owned(),
            deleted_ms: 0,
            parent: None,
            rates: quarry_objfmt::Rates::NONE,
        };
        let place = keys::trash_key(&tenant, truth.id);
        let bytes = encode_record(TRASH_KIND, &record).unwrap();
        bucket.place(&place, bytes).await;
        bucket.set_weather(Weather {
            wrong: 1.0,
            bad_bodies_max: BAD_BODIES_BORNE,
            ..Weather::default()
        });
        let store = S3Store::over(bucket.clone(), "", String::new());
        let purged = purge(&store, &tenant, truth.id, 0, 0, &AtomicU64::new(0)).await;
        assert!(
            matches!(purged, Ok(Purged::Gone)),
            "seed {seed}: {purged:?}"
        );
        assert!(bucket.peek(&place).is_none());
    }
}
