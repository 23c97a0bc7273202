//! The stories of bugs that the simulation found, each with the trouble that it takes and no other.

use quarry_gateway::store::{S3Store, Store, StoreError};

use super::plan::Plan;
use super::store::{SimBucket, Weather};
use super::world::run;

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
        ..Weather::default()
    });
}

/// An attach took the cut off beginning of a chunk for a damaged chunk.
#[tokio::test(start_paused = true)]
async fn beginning_of_an_object_that_is_cut_off_on_the_way_is_no_answer() {
    let bucket = SimBucket::new(1);
    bucket.place("key", vec![7; 100]).await;
    bucket.set_weather(Weather {
        short: 1.0,
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

#[test]
fn attach_whose_reads_are_cut_off_on_the_way_is_not_refused() {
    hold_in(Weather {
        short: 0.5,
        ..Weather::default()
    });
}
