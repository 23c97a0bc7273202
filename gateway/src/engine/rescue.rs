//! Making the head of a volume anew, with its name if that is lost too.

use quarry_objfmt::head::Head;
use std::sync::Arc;

use super::{Daemon, now_ms, registry};
use crate::backend::HeadCell;
use crate::control::dto::check_size;
use crate::control::{ApiError, ApiResult, ImageRef, Kind, RescueReport, RescueSpec, VolumeRef};
use crate::rescue::{self, RescueError};
use crate::store::Store;

impl From<RescueError> for ApiError {
    fn from(error: RescueError) -> Self {
        let (kind, remedy) = match &error {
            RescueError::Sound => (
                Kind::Conflict,
                "there is nothing to rescue; `quarry volume verify` checks the rest of the volume",
            ),
            RescueError::Newer(_) => (Kind::Unsupported, "use a build of that version"),
            RescueError::Nothing => (
                Kind::Damaged,
                "check its id; if it is right, restore its objects from a copy",
            ),
            RescueError::NotWhole { .. } | RescueError::Keys { .. } | RescueError::Epochs => {
                (Kind::Damaged, "restore the objects from a copy")
            }
            RescueError::Needs { .. } => (
                Kind::Invalid,
                "give what the volume was made with; a size that is too large does no harm",
            ),
            RescueError::Size { .. } => (Kind::Invalid, "give another --size"),
            RescueError::Clone { .. } => (
                Kind::Conflict,
                "flatten that clone, or delete and purge it, first; or restore the snapshot's objects from a copy",
            ),
            RescueError::Raced { .. } => (
                Kind::Conflict,
                "stop whoever has the volume attached, and try again",
            ),
            RescueError::Store(error) => return registry::store_error(error),
        };
        Self::new(kind, error.to_string(), remedy)
    }
}

impl Daemon {
    pub(super) async fn rescue_volume(
        &self,
        volume: &VolumeRef,
        spec: &RescueSpec,
    ) -> ApiResult<RescueReport> {
        if let Some(size) = spec.size_bytes {
            check_size(size, spec.sector_size.unwrap_or(quarry_objfmt::SECTOR_SIZE))?;
        }
        let image = ImageRef::from(volume.clone());
        let slot = self.slot(&image);
        let _change = slot.change.lock().await;
        let answer = if slot.is_detached() {
            self.rescue_detached(volume, spec).await
        } else {
            let message = format!("{volume} is attached");
            Err(ApiError::new(Kind::Conflict, message, "detach it first"))
        };
        self.forget_idle(&image, &slot);
        answer
    }

    async fn rescue_detached(
        &self,
        volume: &VolumeRef,
        spec: &RescueSpec,
    ) -> ApiResult<RescueReport> {
        let tenant = self.tenant(&volume.tenant).await?;
        let control = tenant.control();
        let id = match spec.id {
            Some(id) => id,
            None => registry::find(&control, volume)
                .await
                .map_err(|e| e.with_remedy("if its name is lost, give its id with --id; of one that was deleted `quarry trash list` shows it"))?,
        };
        let name = registry::name_state(&control, volume, id).await?;
        // It reads much, and waits for the store as other work does.
        let store = Arc::new(tenant.lane().background());
        let rescued = rescue::run(store, volume, id, spec, &self.host, now_ms()).await;
        let report = match rescued {
            Err(RescueError::Sound) if !name.is_there() => {
                let head = sound_head(&control, volume, id).await?;
                RescueReport {
                    volume: volume.to_string(),
                    id: id.to_string(),
                    lost: "its name is lost, its head is sound".to_owned(),
                    epoch: head.epoch.get(),
                    last_write: head.root_write.get(),
                    size_min_bytes: head.size.bytes(),
                    applied: spec.apply,
                    ..RescueReport::default()
                }
            }
            rescued => rescued?,
        };
        if report.applied {
            registry::name_anew(&control, volume, id, name).await?;
        }
        Ok(report)
    }
}

/// The sound head of a volume that is to be called `volume` again, and says so itself.
async fn sound_head(
    store: &dyn Store,
    volume: &VolumeRef,
    id: quarry_objfmt::VolumeId,
) -> ApiResult<Head> {
    let (head, _) = HeadCell::read(store, &volume.tenant, id)
        .await
        .map_err(|e| registry::head_error(volume, &e))?;
    if head.deleted().is_some() {
        let message = format!("volume {id} was deleted, its head is sound");
        let remedy = format!("bring it back with `quarry volume restore {id}`");
        return Err(ApiError::new(Kind::Conflict, message, remedy));
    }
    if head.name == volume.name.as_str() {
        return Ok(head);
    }
    let message = format!("volume {id} is called {}/{}", head.tenant, head.name);
    Err(ApiError::new(Kind::Conflict, message, "use that name"))
}
