//! Growing a volume, attached or not, under I/O: the steps and their order. Making one smaller is
//! [`super::shrink`]'s.
//!
//! 1. `head`, by a conditional PUT: as the attachment that has the right to write if the volume is
//!    attached here, else only while nobody has that right. *Crash before: nothing has happened.
//!    After: the volume is served with its new size from the next attach on.*
//! 2. The volume and its reactor, which from then on take requests up to the new end. *Crash: as
//!    after step 1, and no write behind the old end was acknowledged that `head` does not cover.*
//! 3. The NBD export: whoever connects is told the new size.
//! 4. The ublk device. *Crash before: the next daemon finds a device that is smaller than its
//!    volume, takes it over and grows it.*
//!
//! So no front end shows a size that the volume does not have. A call for the size that the volume
//! has already does what of steps 2 to 4 is left to do.

use std::sync::atomic::Ordering;
use std::time::Duration;

use quarry_config::Size;
use quarry_objfmt::Sectors;
use quarry_objfmt::head::Head;

use super::quota::Wish;
use super::shrink::refuse_attached;
use super::slot::{Attached, Slot, Stage};
use super::{Daemon, registry};
use crate::control::dto::check_size;
use crate::control::{ApiError, ApiResult, ImageRef, Kind, ResizeInfo, ResizeSpec, VolumeRef};
use crate::ublk::UblkError;

/// Longest wait for a change of the head: longer than its own deadline, for a checkpoint's change that
/// is under way has none, and comes first.
pub(super) const HEAD_WAIT_MAX: Duration = Duration::from_secs(30);

/// What an NBD client has to do with the new size.
const NBD_NOTE: &str = "NBD clients are told when they connect again";

impl Daemon {
    pub(super) async fn resize_volume(
        &self,
        volume: &VolumeRef,
        spec: ResizeSpec,
    ) -> ApiResult<ResizeInfo> {
        let ResizeSpec { size_bytes, force } = spec;
        let image = ImageRef::from(volume.clone());
        let slot = self.slot(&image);
        let _change = slot.change.lock().await;
        let answer = match slot.stage() {
            Stage::Attached(attached) => self.grow_attached(volume, &attached, size_bytes).await,
            // Nothing else lasts while no call changes the volume.
            _ => self.resize_detached(&slot, volume, size_bytes, force).await,
        };
        self.forget_idle(&image, &slot);
        answer
    }

    async fn resize_detached(
        &self,
        slot: &Slot,
        volume: &VolumeRef,
        size_bytes: u64,
        force: bool,
    ) -> ApiResult<ResizeInfo> {
        let store = self.control(&volume.tenant).await?;
        let head = registry::head(&store, volume).await?;
        // Or it was shrunk, and left to be detached by a crash.
        let unfinished = force && size_bytes == head.size.bytes() && head.owner.is_some();
        if size_bytes < head.size.bytes() || unfinished {
            let shrunk = self.shrink_detached(slot, volume, &head, size_bytes, force);
            return shrunk.await;
        }
        let cache = self.common.device.id();
        let more = size_bytes - head.size.bytes();
        let tenant = self.tenant(&volume.tenant).await?;
        let admission = self.admit(&tenant, &Wish::growth(volume, more)).await?;
        let grown = registry::grow_volume(&store, volume, size_bytes, cache).await;
        self.settle(admission).await;
        grown?;
        Ok(resized(volume, size_bytes, None))
    }

    async fn grow_attached(
        &self,
        volume: &VolumeRef,
        attached: &Attached,
        size_bytes: u64,
    ) -> ApiResult<ResizeInfo> {
        if attached.read_only {
            let message = format!("{volume} is attached here for reading only");
            let remedy = "detach it first, or resize it on the host that writes to it";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let backend = &attached.backend;
        let condition = backend.condition();
        if condition.fenced {
            let problem = condition.problem.unwrap_or_default();
            let message = format!("{volume} cannot be resized here: {problem}");
            let remedy = "resize it on the host that has it now";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let has = backend.head().get();
        let size = larger(volume, &has, size_bytes)?;
        let head = if has.size == size {
            has
        } else {
            let store = attached.tenant.control();
            let more = size.bytes() - has.size.bytes();
            let wish = Wish::growth(volume, more);
            let tenant = self.now_of(&attached.tenant);
            let admission = self.admit(&tenant, &wish).await?;
            let grown = backend.head().update(&store, |head| {
                head.size = head.size.max(size);
            });
            let grown = registry::in_time(volume, HEAD_WAIT_MAX, grown).await;
            self.settle(admission).await;
            match grown? {
                Ok(head) => head,
                Err(error) => {
                    attached.tell_if_fenced(&error).await;
                    return Err(registry::head_error(volume, &error));
                }
            }
        };
        let note = self.show_size(volume, attached, head.size).await?;
        // A call before this one, given up for want of an answer, may have got through after all.
        larger(volume, &head, size_bytes)?;
        Ok(resized(volume, size_bytes, note))
    }

    /// Steps 2 to 4. Answers with what is left to be done until all see the size.
    async fn show_size(
        &self,
        volume: &VolumeRef,
        attached: &Attached,
        size: Sectors,
    ) -> ApiResult<Option<String>> {
        let (reactor, key) = attached.backend.place();
        if !reactor.grow(key, size).await? {
            return Err(ApiError::internal(format!("{volume} is not served")));
        }
        let Some((device, spec)) = &attached.device else {
            if let Some(export) = self.exports.0.lock().get_mut(&volume.to_string()) {
                export.geometry.size = size;
            }
            let before = attached.shown.swap(size.bytes(), Ordering::Relaxed);
            return Ok((before < size.bytes()).then(|| NBD_NOTE.to_owned()));
        };
        match self.ublk.grow(*device, spec, size).await {
            Ok(()) => {
                attached.shown.store(size.bytes(), Ordering::Relaxed);
                Ok(None)
            }
            Err(error @ UblkError::FixedSize) => {
                tracing::warn!(%volume, device, %error, "the volume has grown, its device has not");
                Ok(Some(format!(
                    "its device shows the new size after it is detached and attached again: {error}"
                )))
            }
            Err(error) => {
                let message = format!(
                    "{volume} has {} now, but its device does not show them: {error}",
                    Size::new(size.bytes())
                );
                let remedy = "resize it to that size once more, or detach it and attach it again";
                Err(ApiError::new(Kind::Internal, message, remedy))
            }
        }
    }
}

/// The size asked for, if the volume can be grown to it or has it.
pub(super) fn larger(volume: &VolumeRef, head: &Head, size_bytes: u64) -> ApiResult<Sectors> {
    check_size(size_bytes, head.sector_size)?;
    if size_bytes < head.size.bytes() {
        return Err(refuse_attached(volume, head.size, size_bytes));
    }
    Ok(Sectors::from_bytes(size_bytes).expect("whole blocks are whole sectors"))
}

pub(super) fn resized(volume: &VolumeRef, size_bytes: u64, note: Option<String>) -> ResizeInfo {
    ResizeInfo {
        volume: volume.to_string(),
        size_bytes,
        note,
    }
}
