//! Checks of volumes under way: one a volume, a few a daemon.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use quarry_objfmt::{DataKeys, VolumeId};

use super::keys::same_data_keys;
use super::snapshot::no_snapshot;
use super::tenants::Tenant;
use super::{Daemon, registry};
use crate::backend::{HeadCell, HeadError};
use crate::control::{
    ApiError, ApiResult, ImageRef, Kind, VerifyProgress, VerifyReport, VerifySpec,
};
use crate::verify::{self, Progress};

/// Checks at once in a daemon: each may hold some hundred MiB, and takes its share of the store.
const VERIFIES_MAX: usize = 3;

/// Of these, a tenant's: never all, for its store may hang.
const TENANT_VERIFIES_MAX: usize = 1;

/// Times that a volume's keys are read, until they are the same as the time before.
const KEYS_READ_MAX: usize = 4;

/// The checks under way.
#[derive(Clone, Default)]
pub(super) struct Verifies(Arc<Mutex<BTreeMap<ImageRef, Arc<Progress>>>>);

/// The right to check a volume, given back when it is dropped, finished or not.
struct Running {
    all: Verifies,
    volume: ImageRef,
    progress: Arc<Progress>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.all.0.lock().remove(&self.volume);
    }
}

impl Verifies {
    fn begin(&self, volume: &ImageRef) -> ApiResult<Running> {
        let mut all = self.0.lock();
        if all.contains_key(volume) {
            let message = format!("{volume} is being verified already");
            return Err(ApiError::new(
                Kind::Conflict,
                message,
                "wait for that to end",
            ));
        }
        let tenant = &volume.volume.tenant;
        let of_tenant = all.keys().filter(|other| other.volume.tenant == *tenant);
        if of_tenant.count() >= TENANT_VERIFIES_MAX {
            let message = format!("another volume of tenant {tenant} is being verified");
            let remedy = "try again when that is done";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        if all.len() >= VERIFIES_MAX {
            let message = format!("{} volumes are being verified already", all.len());
            let remedy = "try again when one of them is done";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let progress = Arc::<Progress>::default();
        all.insert(volume.clone(), Arc::clone(&progress));
        Ok(Running {
            all: self.clone(),
            volume: volume.clone(),
            progress,
        })
    }

    pub(super) fn progress(&self, volume: &ImageRef) -> ApiResult<VerifyProgress> {
        let found = self.0.lock().get(volume).map(|progress| progress.get());
        found.ok_or_else(|| {
            let message = format!("{volume} is not being verified");
            let remedy = format!("verify it with `quarry volume verify {volume}`");
            ApiError::new(Kind::NotFound, message, remedy)
        })
    }
}

impl Daemon {
    /// Changes nothing, and ends where it is when its caller goes away.
    pub(super) async fn verify_image(
        &self,
        image: &ImageRef,
        spec: VerifySpec,
    ) -> ApiResult<VerifyReport> {
        if image.at.is_some() {
            let message = "a volume as it was at a time cannot be verified";
            let remedy = "attach it and read it: what is read is verified";
            return Err(ApiError::invalid(message, remedy));
        }
        let tenant = self.tenant(&image.volume.tenant).await?;
        let id = registry::find(&tenant.control(), &image.volume).await?;
        let running = self.verifies.begin(image)?;
        // A store that is away is waited for; what the volumes' users read comes first.
        let store = Arc::new(tenant.lane().background());
        let progress = Arc::clone(&running.progress);
        let keys = match spec.deep {
            true => self.keys_to_verify(&tenant, id).await?,
            false => None,
        };
        let report = verify::run(store, image, id, spec, keys, progress).await?;
        report.ok_or_else(|| no_snapshot(image))
    }

    /// With a damaged head none are known, and no frame is read.
    async fn keys_to_verify(
        &self,
        tenant: &Tenant,
        id: VolumeId,
    ) -> ApiResult<Option<Arc<DataKeys>>> {
        let (mut before, mut opened) = (None, None);
        // Opening them may take a while, in which the volume gets a new one.
        for _ in 0..KEYS_READ_MAX {
            match HeadCell::read(&tenant.control(), &tenant.name, id).await {
                Ok((head, _)) if before.as_ref().is_some_and(|b| same_data_keys(b, &head)) => break,
                Ok((head, _)) => {
                    opened = self.unlock(&tenant.name, &head).await?;
                    before = Some(head);
                }
                Err(HeadError::Store(error)) => return Err(error.into()),
                Err(_) => return Ok(None),
            }
        }
        Ok(opened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(name: &str) -> ImageRef {
        ImageRef::new("acme", name).unwrap()
    }

    #[test]
    fn volume_being_verified_is_refused_until_that_ends() {
        let all = Verifies::default();
        assert_eq!(all.progress(&volume("a")).unwrap_err().kind, Kind::NotFound);
        let running = all.begin(&volume("a")).unwrap();
        assert_eq!(all.begin(&volume("a")).err().unwrap().kind, Kind::Conflict);
        all.progress(&volume("a")).unwrap();
        drop(running);
        all.begin(&volume("a")).unwrap();
    }

    #[test]
    fn tenant_has_no_more_than_its_part_of_the_places() {
        let all = Verifies::default();
        let running: Vec<_> = (0..TENANT_VERIFIES_MAX)
            .map(|n| all.begin(&volume(&n.to_string())).unwrap())
            .collect();
        let refused = all.begin(&volume("more")).err().unwrap();
        assert!(refused.message.contains("tenant acme"), "{refused}");
        all.begin(&ImageRef::new("zebra", "db").unwrap()).unwrap();
        drop(running);
        all.begin(&volume("more")).unwrap();
    }

    #[test]
    fn volumes_past_the_most_at_once_are_refused() {
        let all = Verifies::default();
        let of = |tenant: usize| ImageRef::new(format!("t{tenant}"), "db").unwrap();
        let mut running: Vec<_> = (0..VERIFIES_MAX)
            .map(|n| all.begin(&of(n)).unwrap())
            .collect();
        let refused = all.begin(&of(VERIFIES_MAX)).err().unwrap();
        assert!(refused.message.contains("being verified"), "{refused}");
        running.pop();
        all.begin(&of(VERIFIES_MAX)).unwrap();
    }
}
