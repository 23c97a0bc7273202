//! `quarry volume compact` and `quarry volume flatten`, at the volume that is attached here.

use super::Daemon;
use crate::backend::{Chore, ChoreError, ChoreProgress};
use crate::control::{ApiError, ApiResult, ImageRef, Kind, MoveReport, VolumeRef};

fn report(progress: &ChoreProgress) -> MoveReport {
    let (moved_bytes, total_bytes, passes) = progress.get();
    MoveReport {
        moved_bytes,
        total_bytes,
        passes,
    }
}

fn refusal(volume: &VolumeRef, error: &ChoreError) -> ApiError {
    let message = format!("{volume}: {error}");
    let (kind, remedy) = match error {
        ChoreError::Busy => (Kind::Conflict, "wait for that to end".to_owned()),
        ChoreError::Ended => (Kind::Conflict, "attach it, and ask again".to_owned()),
        ChoreError::Fenced { .. } => (Kind::Conflict, "ask the host that has it now".to_owned()),
        ChoreError::Damaged { .. } => (
            Kind::Damaged,
            format!("see what is wrong with `quarry volume verify {volume}`"),
        ),
        ChoreError::Snapshots(names) => {
            let name = names.first().map_or("NAME", String::as_str);
            let remedy = format!("delete them with `quarry snapshot delete {volume}@{name}`");
            (Kind::Conflict, remedy)
        }
        ChoreError::NoParent => (Kind::Conflict, "there is nothing to do".to_owned()),
    };
    ApiError::new(kind, message, remedy)
}

impl Daemon {
    /// Ends after the stage under way when its caller goes away.
    pub(super) async fn do_chore(&self, volume: &VolumeRef, chore: Chore) -> ApiResult<MoveReport> {
        let image = ImageRef::from(volume.clone());
        let attached = self.attached_here(&image)?;
        if attached.read_only {
            let message = format!("{volume} is attached for reading only");
            let remedy = "attach it for writing: only who may write may move its data";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let done = attached.backend.do_chore(chore).await;
        let progress = done.map_err(|error| refusal(volume, &error))?;
        Ok(report(&progress))
    }

    /// How far the chore under way is.
    pub(super) fn chore_progress(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        let image = ImageRef::from(volume.clone());
        let slot = self.slots.lock().get(&image).cloned().unwrap_or_default();
        let attached = slot.stage().attached().cloned();
        let progress = attached.and_then(|attached| attached.backend.chore_progress());
        let progress = progress.ok_or_else(|| {
            let message = format!("{volume} is neither being compacted nor flattened");
            let remedy = format!("compact it with `quarry volume compact {volume}`");
            ApiError::new(Kind::NotFound, message, remedy)
        })?;
        Ok(report(&progress))
    }
}
