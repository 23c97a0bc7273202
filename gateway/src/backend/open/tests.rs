use std::time::Duration;

use quarry_objfmt::{Sectors, VolumeName};

use super::*;
use crate::store::{FolderStore, Lane};

/// Looks ahead in the log take all places of this lane, and the seal behind it needs one.
#[tokio::test(start_paused = true)]
async fn log_is_sealed_through_a_lane_with_fewer_places_than_looks_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(FolderStore::open(dir.path(), false).unwrap());
    let lane = Lane::narrow(store);
    let tenant = TenantName::new("acme").unwrap();
    let name = VolumeName::new("db").unwrap();
    let volume = VolumeId::from_bytes([7; 16]);
    let head = Head::fresh(volume, &tenant, &name, Sectors::new(2048), 0);
    let key = keys::head_key(&tenant, volume);
    lane.create(&key, head.encode().into()).await.unwrap();
    let by = Claim {
        cache: CacheId::from_bytes([8; 16]),
        host: "a".to_owned(),
        now_ms: 0,
        force: false,
        discard_unsent: false,
        must_be_ours: false,
    };
    // The first has no log before it. Each other one seals that of the one before, which is empty and open.
    for epoch in 1..=3 {
        let claimed = claim(&lane, &tenant, volume, None, &by);
        let claimed = tokio::time::timeout(Duration::from_secs(60), claimed).await;
        let claimed = claimed.expect("it waits for a place for ever").unwrap();
        assert_eq!(claimed.info.epoch, Epoch::new(epoch));
    }
}
