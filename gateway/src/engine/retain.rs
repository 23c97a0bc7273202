//! How long a volume's past is kept: a word in its head, changed by whoever may change that.
//!
//! One conditional PUT, as the attachment that has the right to write if the volume is attached here, else only
//! while nobody has that right. *Crash before: nothing has happened. After: it is so.*

use super::resize::HEAD_WAIT_MAX;
use super::slot::{Attached, Stage};
use super::{Daemon, registry};
use crate::control::{ApiResult, ImageRef, RetainInfo, VolumeRef};

impl Daemon {
    pub(super) async fn retain_volume(
        &self,
        volume: &VolumeRef,
        retain_ms: u64,
    ) -> ApiResult<RetainInfo> {
        let image = ImageRef::from(volume.clone());
        let slot = self.slot(&image);
        let _change = slot.change.lock().await;
        let answer = match slot.stage() {
            Stage::Attached(attached) => self.retain_attached(volume, &attached, retain_ms).await,
            // Nothing else lasts while no call changes the volume.
            _ => {
                let cache = self.common.device.id();
                match self.control(&volume.tenant).await {
                    Ok(store) => registry::retain_volume(&store, volume, retain_ms, cache).await,
                    Err(error) => Err(error),
                }
            }
        };
        self.forget_idle(&image, &slot);
        answer.map(|()| RetainInfo {
            volume: volume.to_string(),
            retain_ms,
        })
    }

    async fn retain_attached(
        &self,
        volume: &VolumeRef,
        attached: &Attached,
        retain_ms: u64,
    ) -> ApiResult<()> {
        self.may_change(volume, attached)?;
        let store = attached.tenant.control();
        let changed = attached.backend.set_retention(&store, retain_ms);
        match registry::in_time(volume, HEAD_WAIT_MAX, changed).await? {
            Ok(_) => Ok(()),
            Err(error) => {
                attached.tell_if_fenced(&error).await;
                Err(registry::head_error(volume, &error))
            }
        }
    }
}
