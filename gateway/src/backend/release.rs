//! Taking the right to write from a host that is lost, without taking it.

use quarry_objfmt::head::Head;
use quarry_objfmt::{CacheId, TenantName, VolumeId};

use super::head::{HeadCell, put};
use super::open::OpenError;
use crate::store::Store;

/// Takes the right to write from the host with the cache `from`, and gives it to nobody; answers whether it had it.
///
/// One PUT. *Crash before: nothing has happened. After: the next who attaches finds the end of the log, and seals
/// it; until then what that host still puts into it belongs to it, and its next change of the head tells it that it
/// is fenced.*
///
/// # Errors
/// [`OpenError`]; nothing was changed.
pub async fn release(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    from: CacheId,
) -> Result<bool, OpenError> {
    let (head, tag) = HeadCell::read(store, tenant, volume).await?;
    match &head.owner {
        _ if head.deleted().is_some() => return Err(OpenError::Deleted),
        None => return Ok(false),
        Some(owner) if owner.cache != from => return Ok(false),
        Some(_) => {}
    }
    let released = Head {
        epoch: head.epoch.next(),
        owner: None,
        ..head
    };
    put(store, tenant, &released, &tag).await?;
    Ok(true)
}
