//! Snapshots: made by the host that has their volume, everything that was acknowledged sent before.

use quarry_csi_proto::Timestamp;
use quarry_csi_proto::v1::Snapshot;
use quarry_objfmt::{SnapName, VolumeName};
use tonic::Status;

use super::ControllerService;
use crate::control::{Kind, SnapRef, SnapshotInfo, VolumeRef, if_found};
use crate::csi::answer::{Answer, quota};
use crate::csi::class::bytes;
use crate::csi::ids;
use crate::engine::now_ms;

/// Longer than a clone takes from its snapshot on, tried again and again; and more than hosts' clocks differ.
const CLONING_MS_MAX: u64 = 60 * 60 * 1000;

impl ControllerService {
    /// `names` are what it may be called, the first what a new one is. `unique`: no other volume can have a
    /// snapshot of that name.
    pub(super) async fn snapshot(
        &self,
        volume: &VolumeRef,
        names: &[SnapName],
        unique: bool,
    ) -> Answer<Snapshot> {
        let info = self.show(volume).await?;
        for name in names {
            if let Some(there) = self.find(volume, name).await? {
                return Ok(told(&there));
            }
        }
        if !unique {
            self.check_no_other_has(volume, names).await?;
        }
        let daemon = self.must_at_owner(volume, &info)?;
        let snapshot = SnapRef {
            volume: volume.clone(),
            name: names[0].clone(),
        };
        match daemon.create_snapshot(&snapshot).await {
            Ok(made) => Ok(told(&made)),
            // By a call before this one, whose answer was lost.
            Err(error) if error.kind == Kind::Exists => {
                Ok(told(&self.client.show_snapshot(&snapshot).await?))
            }
            Err(error) => Err(quota(error)),
        }
    }

    async fn find(&self, volume: &VolumeRef, name: &SnapName) -> Answer<Option<SnapshotInfo>> {
        let snapshot = SnapRef {
            volume: volume.clone(),
            name: name.clone(),
        };
        match if_found(self.client.show_snapshot(&snapshot).await)? {
            Some(found) if found.deleting => {
                Err(Status::aborted(format!("{snapshot} is being deleted")))
            }
            found => Ok(found),
        }
    }

    /// To CSI a name is one of all snapshots, to Quarry one of its volume's. Reads every volume's head: so not
    /// asked for names that Kubernetes makes.
    async fn check_no_other_has(&self, volume: &VolumeRef, names: &[SnapName]) -> Answer<()> {
        let all = self.client.list_snapshots(None).await?.snapshots;
        let own = volume.to_string();
        let is_same = |s: &&SnapshotInfo| names.iter().any(|name| name.as_str() == s.name);
        match all.iter().filter(is_same).find(|s| s.volume != own) {
            Some(other) => {
                let message = format!("there is a snapshot {} of {}", other.name, other.volume);
                Err(Status::already_exists(message))
            }
            None => Ok(()),
        }
    }

    pub(super) async fn delete_snapshot_of(&self, snapshot: &SnapRef) -> Answer<()> {
        let Some(info) = self.there(&snapshot.volume).await? else {
            return Ok(());
        };
        if let Err(error) = self.client.show_snapshot(snapshot).await
            && error.kind == Kind::NotFound
        {
            return Ok(());
        }
        let daemon = self.must_at_owner(&snapshot.volume, &info)?;
        if_found(daemon.delete_snapshot(snapshot).await)?;
        Ok(())
    }

    /// What a snapshot can be called that is made to clone `volume` under a name that nothing has. One that is left of
    /// a call before has the bytes of then: it is deleted. Where that cannot be, as by a clone of that name in the
    /// trash, or by one that was begun, another name is free.
    pub(super) async fn free_for_clone(
        &self,
        volume: &VolumeRef,
        clone: &VolumeName,
    ) -> Answer<SnapName> {
        let list = self.client.list_snapshots(Some(volume)).await?;
        let is_left = |s: &&SnapshotInfo| ids::is_for_clone_called(&s.name, clone);
        let mut taken = Vec::new();
        for left in list.snapshots.iter().filter(is_left) {
            if !self.try_delete(volume, &left.name).await {
                taken.push(left.name.as_str());
            }
        }
        let mut tries = 0;
        loop {
            let name = ids::clone_snapshot(clone, tries);
            if !taken.contains(&name.as_str()) {
                return Ok(name);
            }
            tries += 1;
        }
    }

    /// Whether a snapshot is gone now.
    async fn try_delete(&self, volume: &VolumeRef, name: &str) -> bool {
        let Ok(snapshot) = format!("{volume}@{name}").parse() else {
            return false;
        };
        let deleted = self.delete_snapshot_of(&snapshot).await;
        if let Err(status) = &deleted {
            tracing::debug!(%snapshot, error = status.message(), "it stays");
        }
        deleted.is_ok()
    }

    /// Deletes what was made to clone a volume and has no clone any more, but for `newest` and what may just be about to
    /// have one, by another call. What cannot be deleted now is the next time.
    pub(super) async fn sweep(&self, volume: &VolumeRef, newest: &SnapRef) {
        let Ok(list) = self.client.list_snapshots(Some(volume)).await else {
            return;
        };
        let old_ms = now_ms().saturating_sub(CLONING_MS_MAX);
        let is_left = |s: &&SnapshotInfo| ids::is_for_clone(&s.name) && s.created_ms < old_ms;
        let made = list.snapshots.iter().filter(is_left);
        for snapshot in made.filter(|s| s.name != newest.name.as_str()) {
            self.try_delete(volume, &snapshot.name).await;
        }
    }
}

/// A snapshot as CSI tells it: it is made when all that was acknowledged is in the store, so it can be used at once.
pub(super) fn told(info: &SnapshotInfo) -> Snapshot {
    let (seconds, rest_ms) = (info.created_ms / 1000, info.created_ms % 1000);
    Snapshot {
        size_bytes: bytes(info.size_bytes),
        snapshot_id: format!("{}@{}", info.volume, info.name),
        source_volume_id: info.volume.clone(),
        creation_time: Some(Timestamp {
            seconds: bytes(seconds),
            nanos: i32::try_from(rest_ms * 1_000_000).unwrap_or(0),
        }),
        ready_to_use: !info.deleting,
        ..Snapshot::default()
    }
}
