//! `quarry volume compact` and `quarry volume flatten`, at the volume that is attached here.

use super::Daemon;
use crate::backend::{Chore, ChoreError, ChoreProgress, Condition};
use crate::control::{ApiError, ApiResult, ImageRef, Kind, MoveReport, VolumeRef};

fn report(progress: &ChoreProgress) -> MoveReport {
    let (moved_bytes, total_bytes, passes) = progress.get();
    MoveReport {
        moved_bytes,
        total_bytes,
        passes,
    }
}

fn refusal(volume: &VolumeRef, error: &ChoreError, condition: Condition) -> ApiError {
    let elsewhere = "ask the host that has it now";
    // A volume that takes no writes any more ends what is asked of it.
    if let (ChoreError::Ended, Some(problem)) = (error, condition.problem)
        && (condition.fenced || condition.failed)
    {
        let remedy = match condition.fenced {
            true => elsewhere.to_owned(),
            false => format!("see `quarry volume show {volume}`"),
        };
        return ApiError::new(Kind::Conflict, format!("{volume}: {problem}"), remedy);
    }
    let message = format!("{volume}: {error}");
    let (kind, remedy) = match error {
        ChoreError::Busy => (Kind::Conflict, "wait for that to end".to_owned()),
        ChoreError::Ended => (Kind::Conflict, "attach it, and ask again".to_owned()),
        ChoreError::Fenced { .. } => (Kind::Conflict, elsewhere.to_owned()),
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
        let backend = &attached.backend;
        let done = backend.do_chore(chore).await;
        let progress = done.map_err(|error| refusal(volume, &error, backend.condition()))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(condition: Condition) -> ApiError {
        let volume: VolumeRef = "acme/db".parse().unwrap();
        refusal(&volume, &ChoreError::Ended, condition)
    }

    #[test]
    fn chore_of_a_fenced_volume_is_refused_as_such() {
        let fenced = refused(Condition {
            problem: Some("fenced: b has taken the volume over".to_owned()),
            fenced: true,
            ..Condition::default()
        });
        assert_eq!(
            fenced.message,
            "acme/db: fenced: b has taken the volume over"
        );
        assert_eq!(fenced.remedy, "ask the host that has it now");

        let failed = refused(Condition {
            problem: Some("the cache device failed".to_owned()),
            failed: true,
            ..Condition::default()
        });
        assert_eq!(failed.message, "acme/db: the cache device failed");

        // What may pass did not end it.
        let detached = refused(Condition {
            problem: Some("the store refuses a chunk".to_owned()),
            ..Condition::default()
        });
        assert!(detached.message.contains("was ended"), "{detached:?}");
        assert_eq!(detached.remedy, "attach it, and ask again");
    }
}
