//! What a cache device keeps of a volume that nobody serves: found when it goes, taken up when it comes, given up when it
//! is no more.

use std::sync::Arc;

use quarry_cache::{BlockDevice, CutError, Journals, Recovered};
use quarry_objfmt::page::Record;
use quarry_objfmt::{Epoch, Generation, SegmentId, TenantName, VolumeId, WriteSeq};

use super::Daemon;

/// What the device and the journal say of the segments that a volume left; `None` if it left none.
///
/// # Errors
/// If the device or the journal cannot be read, or segments that were left are not found there.
pub fn settle(
    device: &dyn BlockDevice,
    journals: &Journals,
    volume: VolumeId,
    kept: &[(SegmentId, Generation)],
) -> std::io::Result<Option<Recovered>> {
    if kept.is_empty() {
        let removed = journals.remove(volume);
        // The notes that its segments are clean: after a power cut, too, nobody is to ask for
        // writes that were sent long ago.
        device.sync()?;
        return removed.map(|()| None);
    }
    let mut found = quarry_cache::scan(device)?;
    found.volumes.retain(|id, _| *id == volume);
    for found in found.volumes.values_mut() {
        // Others that bear its name may be in other hands by now.
        found
            .segments
            .retain(|s| kept.contains(&(s.segment, s.generation)));
    }
    found.add_journals(journals)?;
    match found.volumes.remove(&volume) {
        Some(found) if found.segments.len() == kept.len() => Ok(Some(found)),
        _ => Err(std::io::Error::other(
            "segments with unsent writes cannot be found again on the cache device",
        )),
    }
}

/// Segments with unsent writes that could not be found again when their volume went.
pub struct Unsettled {
    /// Whose volume it was.
    pub tenant: TenantName,
    /// Which, held once each.
    pub segments: Vec<(SegmentId, Generation)>,
}

/// What was taken up from the cache.
#[derive(Default)]
pub struct Taken {
    /// Writes that the store lacks, consecutive.
    pub unsent: Vec<(SegmentId, Record)>,
    /// The segments that were kept, each held once.
    pub segments: Vec<SegmentId>,
    /// Bytes of the writes that were given up, if any were: the volume has gone on elsewhere without them.
    pub given_up: Option<u64>,
}

/// What of the kept segments is still unsent: what follows upon `stored`, written in or after the epoch
/// `since`. The rest is given up, here and on the device; what had been flushed only with `give_up`.
///
/// # Errors
/// If something is missing that had been flushed; if the device cannot be read, written or synced.
pub fn take_up(
    device: &dyn BlockDevice,
    volume: VolumeId,
    kept: Option<Recovered>,
    stored: WriteSeq,
    since: Epoch,
    give_up: bool,
) -> Result<Taken, CutError> {
    let Some(mut kept) = kept else {
        return Ok(Taken::default());
    };
    let segments = kept.segments.iter().map(|s| s.segment).collect();
    let stale = kept.split_off_before(since);
    let given_up = stale.has_any().then(|| stale.data_bytes());
    Recovered::forget(device, volume, &stale.segments)?;
    let cut = kept.cut(device, volume, stored, give_up)?;
    if cut > 0 {
        tracing::warn!(%volume, cut, "writes behind a gap in the records were given up");
    }
    Ok(Taken {
        unsent: kept.unsent(stored),
        segments,
        given_up,
    })
}

impl Daemon {
    /// Whether the cache has something of a tenant's volume that nobody serves.
    pub(super) fn keeps(&self, tenant: &TenantName, id: VolumeId) -> bool {
        let (kept, unsettled) = (self.kept.lock(), self.unsettled.lock());
        kept.get(&id).is_some_and(|kept| kept.is_of(tenant))
            || unsettled
                .get(&id)
                .is_some_and(|left| left.tenant == *tenant)
    }

    /// How much that is at most, in bytes; none if it has nothing.
    pub(super) fn kept_bytes(&self, tenant: &TenantName, id: VolumeId) -> Option<u64> {
        let segment_size = u64::from(self.common.device.geometry().segment_size);
        let (kept, unsettled) = (self.kept.lock(), self.unsettled.lock());
        let found = kept.get(&id).filter(|kept| kept.is_of(tenant));
        let left = unsettled.get(&id).filter(|left| left.tenant == *tenant);
        // Of what was not found again nobody knows more.
        let left = left.map(|left| left.segments.len() as u64 * segment_size);
        found.map(Recovered::data_bytes).or(left)
    }

    /// The volumes of which it has something, and whose they are; but for those of which it does not say whose.
    pub(super) fn all_kept(&self) -> Vec<(TenantName, VolumeId)> {
        let (kept, unsettled) = (self.kept.lock(), self.unsettled.lock());
        let found = kept.iter();
        let found = found.filter_map(|(id, kept)| Some((kept.tenants.first()?.clone(), *id)));
        let left = unsettled
            .iter()
            .map(|(id, left)| (left.tenant.clone(), *id));
        found.chain(left).collect()
    }

    /// Whether it may hold some of any of the tenant's volumes.
    pub(super) fn keeps_any(&self, tenant: &TenantName) -> bool {
        let (kept, unsettled) = (self.kept.lock(), self.unsettled.lock());
        kept.values().any(|kept| kept.is_of(tenant))
            || unsettled.values().any(|left| left.tenant == *tenant)
    }

    /// Gives up what it has of a tenant's volume that is no more. What another tenant has of the same id stays.
    pub(super) async fn forget_kept(&self, tenant: &TenantName, id: VolumeId) {
        let found = {
            let mut kept = self.kept.lock();
            let is_its_own = kept.get(&id).is_some_and(|kept| kept.is_of(tenant));
            is_its_own.then(|| kept.remove(&id)).flatten()
        };
        if let Some(kept) = found {
            self.forget(id, kept).await;
        }
    }

    /// The order: the journal goes, at once, for should the volume be restored and attached meanwhile the next one is not
    /// this; the device says so, for good; others may have the room. *Crash, or an error, before that: what is left is found
    /// again at the next start.*
    async fn forget(&self, volume: VolumeId, kept: Recovered) {
        let removed = self.journals.remove(volume);
        let device = Arc::clone(&self.common.device);
        let shared = Arc::clone(&self.shared);
        // To its end, whether or not anybody waits for it.
        let forget = move || -> std::io::Result<()> {
            removed?;
            Recovered::forget(&*device, volume, &kept.segments)?;
            let mut shared = shared.lock();
            for segment in &kept.segments {
                shared.cache.part_with(segment.segment, false);
            }
            Ok(())
        };
        let forgotten = tokio::task::spawn_blocking(forget).await;
        let forgotten = forgotten.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        if let Err(error) = forgotten {
            tracing::warn!(%volume, %error, "what the cache kept of a deleted volume stays there");
        }
    }
}
