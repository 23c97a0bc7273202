//! What a cache device keeps of a volume that nobody serves: found when it goes, taken up when it comes.

use quarry_cache::{BlockDevice, CutError, Journals, Recovered};
use quarry_objfmt::page::Record;
use quarry_objfmt::{Epoch, Generation, SegmentId, TenantName, VolumeId, WriteSeq};

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
