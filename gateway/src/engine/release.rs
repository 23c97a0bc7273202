//! Taking a volume from a host that is lost, without attaching it here; and not taking it back when that host is
//! there again.

use quarry_objfmt::CacheId;

use super::{Daemon, How, registry};
use crate::backend::release::release;
use crate::control::{ApiResult, ImageRef, ReleaseInfo, VolumeRef};

impl Daemon {
    pub(super) async fn release_volume(
        &self,
        volume: &VolumeRef,
        from: CacheId,
    ) -> ApiResult<ReleaseInfo> {
        let store = self.control(&volume.tenant).await?;
        let id = registry::find(&store, volume).await?;
        let released = release(&store, &volume.tenant, id, from).await?;
        if released {
            tracing::warn!(%volume, %from, "taken from the host with this cache, which can write to it no more");
        }
        Ok(ReleaseInfo {
            volume: volume.to_string(),
            released,
        })
    }

    /// The cache that a volume of the list was attached with, if it is another than this daemon's and the volume is that one's still.
    ///
    /// # Errors
    /// If its head cannot be had.
    pub async fn other_cache<'a>(
        &self,
        image: &ImageRef,
        how: &'a How,
    ) -> ApiResult<Option<&'a str>> {
        let is_other = |cache: &&str| *cache != self.common.device.id().to_string();
        let Some(cache) = how.cache.as_deref().filter(is_other) else {
            return Ok(None);
        };
        let store = self.control(&image.volume.tenant).await?;
        let owner = registry::head(&store, &image.volume).await?.owner;
        let is_its = owner.is_some_and(|owner| owner.cache.to_string() == cache);
        Ok(is_its.then_some(cache))
    }

    /// Whether a volume that was attached here is this host's no more: it was taken while the daemon was away, or a
    /// crash came between the end of its detaching and the note of it. What the cache has of it stays there.
    ///
    /// # Errors
    /// If its head cannot be had.
    pub async fn was_taken(&self, image: &ImageRef) -> ApiResult<bool> {
        let volume = &image.volume;
        let store = self.control(&volume.tenant).await?;
        let owner = registry::head(&store, volume).await?.owner;
        Ok(owner.is_none_or(|owner| owner.cache != self.common.device.id()))
    }
}
