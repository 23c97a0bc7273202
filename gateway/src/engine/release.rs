//! Taking a volume from a host that is lost, without attaching it here; and not taking it back when that host is
//! there again.

use quarry_objfmt::CacheId;

use super::{Daemon, How, registry};
use crate::backend::release::release;
use crate::control::{ApiResult, ImageRef, ReleaseInfo, VolumeRef};

/// Who may write to a volume of the list.
pub enum Whose {
    /// This daemon.
    Ours,
    /// The cache that it was attached with, which is another than this daemon's.
    OtherCache(String),
    /// Another, or nobody.
    Others,
}

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
            tracing::warn!(%volume, %from, "taken from the host with this cache, which is fenced when somebody attaches it; until then it may still add to it");
        }
        Ok(ReleaseInfo {
            volume: volume.to_string(),
            released,
        })
    }

    /// Who may write to a volume that was attached here. It is not this host's any more if it was taken while the daemon was away, or a
    /// crash came between the end of its detaching and the note of it; what the cache has of it stays there.
    ///
    /// # Errors
    /// If its head cannot be had.
    pub async fn whose_is(&self, image: &ImageRef, how: &How) -> ApiResult<Whose> {
        let store = self.control(&image.volume.tenant).await?;
        let Some(owner) = registry::head(&store, &image.volume).await?.owner else {
            return Ok(Whose::Others);
        };
        if owner.cache == self.common.device.id() {
            return Ok(Whose::Ours);
        }
        let cache = owner.cache.to_string();
        Ok(match how.cache.as_ref() == Some(&cache) {
            true => Whose::OtherCache(cache),
            false => Whose::Others,
        })
    }
}
