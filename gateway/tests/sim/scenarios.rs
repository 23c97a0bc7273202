//! The stories of bugs that the simulation found, each with the trouble that it takes and no other.

use std::time::Duration;

use quarry_gateway::backend::open::{Claim, open_read_only};
use quarry_gateway::store::{S3Store, Store, StoreError};
use quarry_objfmt::chunk::{ChunkExtent, ChunkParams, ExtentBody, encode_chunk};
use quarry_objfmt::codec::Compression;
use quarry_objfmt::head::{Durability, LogRange};
use quarry_objfmt::{CacheId, ChunkId, ChunkSeq, Epoch, Lba, TenantName, WriteSeq, keys};

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
