//! Snapshots and clones: who may make and delete them here, and the right to write while that is done.
//!
//! The steps in the store, and what a crash between them leaves, are in [`crate::snapshot`]. Before them:
//! of a volume that is attached here, what was acknowledged is brought into its map, and its writers go on; one
//! that is attached nowhere is this daemon's for the moment (crash: it stays this host's, and the next attach or
//! snapshot here goes on; others need `--force`).

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use quarry_objfmt::{
    Head, NameRecord, Sectors, SnapName, SnapshotRef, VolumeId, VolumeName, WriteSeq,
};

use super::attach::After;
use super::quota::Wish;
use super::report::attached_info;
use super::slot::{Attached, Slot, Stage};
use super::tenants::Tenant;
use super::trash::trash_error;
use super::{Daemon, VolumeMachine, now_ms, registry};
use crate::backend::open::{Claim, OpenError, give_back, hold, load_usage};
use crate::backend::{HeadCell, HeadError, unique_bytes};
use crate::control::{
    ApiError, ApiResult, AttachOptions, ImageRef, Kind, SnapRef, SnapshotInfo, VolumeRef,
};
use crate::snapshot::{self, CloneSpec, SnapshotError};
use crate::store::Lane;
use crate::trash;

/// Longest wait for the store once all is uploaded: longer than one call's own deadline, for a checkpoint's
/// change of the head that is under way has none, and comes first.
const STORE_WAIT_MAX: Duration = Duration::from_secs(60);

/// There is no such snapshot.
pub(super) fn no_snapshot(image: &ImageRef) -> ApiError {
    let message = format!("there is no snapshot {image}");
    let remedy = format!(
        "`quarry snapshot list {}` shows those that are there",
        image.volume
    );
    ApiError::new(Kind::NotFound, message, remedy)
}

/// What cannot be done with a snapshot of `volume`, as the API tells it.
pub(super) fn told(volume: &VolumeRef, error: SnapshotError) -> ApiError {
    let (kind, remedy) = match &error {
        SnapshotError::Exists(_) => (Kind::Exists, "choose another name, or delete it first"),
        SnapshotError::NotFound(_) => (
            Kind::NotFound,
            "`quarry snapshot list` shows those that are there",
        ),
        SnapshotError::Closing(_) => (
            Kind::Conflict,
            "finish that with `quarry snapshot delete`, or use another",
        ),
        SnapshotError::TooMany => (Kind::Conflict, "delete some of them"),
        SnapshotError::Behind => (
            Kind::Damaged,
            "see `quarry volume show` and `quarry volume verify`",
        ),
        SnapshotError::HasClones { clones, .. } => {
            let remedy = without_clones(clones);
            return ApiError::new(Kind::Conflict, format!("{volume}: {error}"), remedy);
        }
        SnapshotError::BeingCloned { .. } => (
            Kind::Conflict,
            "try again when they are there or have failed; one whose making was broken off is given up after an hour",
        ),
        SnapshotError::Keyless => (Kind::Conflict, "try again"),
        SnapshotError::TooManyKeys => (
            Kind::Conflict,
            "`quarry volume flatten` the volume, and make the snapshot anew",
        ),
        SnapshotError::Busy { .. } => (Kind::Conflict, "try again"),
        SnapshotError::Damaged { .. } => (Kind::Damaged, "restore the object from a copy"),
        SnapshotError::Head(HeadError::Fenced { .. }) => (
            Kind::Conflict,
            "do that on the host that has the volume now",
        ),
        SnapshotError::Head(error) => return registry::head_error(volume, error),
        SnapshotError::Open(error) => return not_ours(volume, error),
        SnapshotError::Store(error) => return registry::store_error(error),
    };
    ApiError::new(kind, format!("{volume}: {error}"), remedy)
}

/// What to do about clones, as they are named where they are in the way: by a name alone if they are there.
pub(super) fn without_clones(clones: &[String]) -> String {
    let is_there = |clone: &&String| clone.parse::<VolumeRef>().is_ok();
    let clone = clones.iter().find(is_there);
    let clone = clone.map_or("CLONE", String::as_str);
    let mut remedy = format!(
        "make the clones independent (`quarry volume flatten {clone}`, while it is attached), or delete and purge them"
    );
    if clones.iter().any(|clone| clone.contains("(nameless")) {
        remedy +=
            "; `quarry volume rescue NAME --id ID --apply` gives a nameless one its name first";
    }
    remedy
}

/// Why the volume cannot be this daemon's for the moment.
fn not_ours(volume: &VolumeRef, error: &OpenError) -> ApiError {
    match error {
        OpenError::Owned { host, .. } => {
            let message = format!("{volume} is attached by host {host}");
            let remedy =
                "do that there; if that host is lost, attach the volume here with --force first";
            ApiError::new(Kind::Conflict, message, remedy)
        }
        OpenError::Store(error) => registry::store_error(error),
        OpenError::Damaged { object, .. } => {
            let remedy = registry::damage_remedy(object);
            ApiError::new(Kind::Damaged, error.to_string(), remedy)
        }
        OpenError::Cache(_) => ApiError::new(Kind::Damaged, error.to_string(), ""),
        _ => ApiError::new(Kind::Conflict, error.to_string(), ""),
    }
}

fn info_of(volume: &VolumeRef, snapshot: &SnapshotRef) -> SnapshotInfo {
    SnapshotInfo {
        volume: volume.to_string(),
        name: snapshot.name.clone(),
        created_ms: snapshot.created_ms,
        size_bytes: snapshot.size.bytes(),
        newest_write: snapshot.root_write.get(),
        blank: snapshot.root.is_none(),
        deleting: snapshot.closing,
        ..SnapshotInfo::default()
    }
}

/// Volumes whose snapshots are listed side by side.
const VOLUMES_AT_ONCE: usize = 16;

impl Daemon {
    /// In this daemon's name, taking nothing from anybody.
    fn claim(&self) -> Claim {
        Claim {
            cache: self.common.device.id(),
            host: self.host.clone(),
            now_ms: now_ms(),
            force: false,
            discard_unsent: false,
            must_be_ours: false,
        }
    }

    pub(super) async fn snapshot_volume(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        let image = ImageRef::from(snapshot.volume.clone());
        let slot = self.slot(&image);
        let made = match slot.stage() {
            Stage::Attached(attached) => self.snapshot_attached(&slot, &attached, snapshot).await,
            _ => self.snapshot_detached(&slot, &image, snapshot).await,
        };
        self.forget_idle(&image, &slot);
        made
    }

    /// The right to change the slot is taken only when all is uploaded, which may take as long as the
    /// store is away.
    async fn snapshot_attached(
        &self,
        slot: &Slot,
        attached: &Arc<Attached>,
        snapshot: &SnapRef,
    ) -> ApiResult<SnapshotInfo> {
        let volume = &snapshot.volume;
        self.may_change(volume, attached)?;
        let backend = &attached.backend;
        let acknowledged = self.fold(volume, attached).await?;
        let _change = slot.change.lock().await;
        let same = |stage: Stage| {
            stage
                .attached()
                .is_some_and(|now| Arc::ptr_eq(now, attached))
        };
        if !same(slot.stage()) {
            let message = format!("{volume} was detached meanwhile");
            return Err(ApiError::new(Kind::Conflict, message, "try again"));
        }
        let (store, tenant) = (attached.tenant.control(), self.now_of(&attached.tenant));
        let made = self.make_snapshot(&tenant, &store, backend.head(), snapshot, acknowledged);
        let made = made.await?;
        if let Err(SnapshotError::Head(error)) = &made {
            attached.tell_if_fenced(error).await;
        }
        made.map(|made| info_of(volume, &made))
            .map_err(|error| told(volume, error))
    }

    /// Makes a snapshot of all up to `acknowledged`, as far as the tenant may have one more.
    async fn make_snapshot(
        &self,
        tenant: &Arc<Tenant>,
        store: &Lane,
        head: &HeadCell,
        snapshot: &SnapRef,
        acknowledged: WriteSeq,
    ) -> ApiResult<Result<SnapshotRef, SnapshotError>> {
        let SnapRef { volume, name } = snapshot;
        let admission = self.admit(tenant, &Wish::snapshot(snapshot)).await?;
        let made = snapshot::create(store, head, name, acknowledged, now_ms());
        let made = registry::in_time(volume, STORE_WAIT_MAX, made).await;
        self.settle(admission).await;
        made
    }

    /// Brings all that is acknowledged by now into the map; answers up to which write.
    async fn fold(&self, volume: &VolumeRef, attached: &Attached) -> ApiResult<WriteSeq> {
        let backend = &attached.backend;
        let (reactor, key) = backend.place();
        let look = |m: &VolumeMachine| m.volume.last_acknowledged();
        let acknowledged = reactor.inspect(key, look).await?.unwrap_or_default();
        let is_sent = backend.drain(true).await;
        let condition = backend.condition();
        let lacks_a_map = condition.lacks_a_map();
        let problem = condition.problem.unwrap_or_default();
        let is_behind = backend.head().get().root_write < acknowledged;
        if is_sent && is_behind && lacks_a_map {
            let message = format!("{volume}: {problem}");
            return Err(ApiError::new(
                Kind::Unavailable,
                message,
                "try again once it does",
            ));
        }
        if is_sent {
            return Ok(acknowledged);
        }
        let message = format!("{volume} cannot be brought into the store as it is: {problem}");
        let remedy = "see `quarry volume show`";
        Err(ApiError::new(Kind::Conflict, message, remedy))
    }

    /// Attached without a front end, snapshotted, detached: so that what the cache kept is in it too.
    async fn snapshot_detached(
        &self,
        slot: &Slot,
        image: &ImageRef,
        snapshot: &SnapRef,
    ) -> ApiResult<SnapshotInfo> {
        let volume = &snapshot.volume;
        let _change = slot.change.lock().await;
        if !slot.is_detached() {
            let message = format!("{volume} was attached meanwhile");
            return Err(ApiError::new(Kind::Conflict, message, "try again"));
        }
        let store = self.control(&volume.tenant).await?;
        let head = registry::head(&store, volume).await?;
        if head.deleted().is_some() {
            return Err(not_ours(volume, &OpenError::Deleted));
        }
        let elsewhere = |o: &&quarry_objfmt::Owner| o.cache != self.common.device.id();
        if let Some(owner) = head.owner.as_ref().filter(elsewhere) {
            let owned = OpenError::Owned {
                host: owner.shown_host(),
                since: String::new(),
            };
            return Err(not_ours(volume, &owned));
        }
        if head
            .snapshots
            .iter()
            .any(|s| s.name == snapshot.name.as_str())
        {
            return Err(told(volume, SnapshotError::Exists(snapshot.name.clone())));
        }
        slot.set(Stage::Attaching);
        // One that waits to be attached again, maybe with a device in use, is this host's until then.
        let options = AttachOptions {
            stays: head.owner.is_some() && self.wanted.contains(image),
            ..AttachOptions::default()
        };
        let served = self.serve(image, &options).await;
        let opening = served.inspect_err(|_| slot.set(Stage::Detached))?;
        let attached = self.without_front_end(image, &opening);
        let made = match self.fold(volume, &attached).await {
            Ok(acknowledged) => {
                let (tenant, head) = (&attached.tenant, opening.backend.head());
                self.make_snapshot(tenant, &store, head, snapshot, acknowledged)
                    .await
            }
            Err(error) => Err(error),
        };
        match self.let_go(&attached, After::of(options.stays)).await {
            Ok(_) => slot.set(Stage::Detached),
            Err(error) => {
                slot.set(Stage::Attached(Arc::new(attached)));
                return Err(error);
            }
        }
        made?
            .map(|made| info_of(volume, &made))
            .map_err(|error| told(volume, error))
    }

    /// Whether the volume's head is this attachment's to change.
    pub(super) fn may_change(&self, volume: &VolumeRef, attached: &Attached) -> ApiResult<()> {
        if attached.read_only {
            let message = format!("{volume} is attached here for reading only");
            let remedy = "detach it first, or do that on the host that writes to it";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let condition = attached.backend.condition();
        if condition.fenced {
            let message = format!("{volume}: {}", condition.problem.unwrap_or_default());
            let remedy = "do that on the host that has it now";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        Ok(())
    }

    pub(super) async fn snapshots(
        &self,
        volume: Option<&VolumeRef>,
    ) -> ApiResult<Vec<SnapshotInfo>> {
        let volumes = match volume {
            Some(volume) => vec![volume.clone()],
            None => self.volumes(None).await?,
        };
        let mut all = Vec::new();
        let of_one = volume.is_some();
        let looks = volumes.into_iter().map(|volume| async move {
            match self.snapshots_of(&volume).await {
                Ok(found) => Ok(found),
                // It hides no other's.
                Err(error) if !of_one => {
                    tracing::warn!(%volume, %error, "its snapshots are not in the list");
                    Ok(Vec::new())
                }
                Err(error) => Err(error),
            }
        });
        let looks = futures::stream::iter(looks).buffered(VOLUMES_AT_ONCE);
        let found: Vec<ApiResult<Vec<SnapshotInfo>>> = looks.collect().await;
        for of in found {
            all.append(&mut of?);
        }
        Ok(all)
    }

    async fn snapshots_of(&self, volume: &VolumeRef) -> ApiResult<Vec<SnapshotInfo>> {
        let store = self.control(&volume.tenant).await?;
        let head = registry::head(&store, volume).await?;
        let unique = self.unique_bytes(volume, &head).await?;
        let told = head.snapshots.iter().enumerate().map(|(number, snapshot)| {
            let mut info = info_of(volume, snapshot);
            info.unique_bytes = unique.as_ref().map(|bytes| bytes[number]);
            info.attached = self.attached_snapshot(volume, &snapshot.name);
            info
        });
        Ok(told.collect())
    }

    /// What each snapshot of a head keeps that nothing else needs: as the attachment here knows, else as the newest map
    /// in the store says. `None` if it does not.
    async fn unique_bytes(&self, volume: &VolumeRef, head: &Head) -> ApiResult<Option<Vec<u64>>> {
        if head.snapshots.is_empty() {
            return Ok(Some(Vec::new()));
        }
        let slot = self.slots.lock().get(&volume.clone().into()).cloned();
        let attached = slot.and_then(|slot| slot.stage().attached().cloned());
        let here = attached.filter(|a| !a.read_only && a.backend.volume() == head.volume);
        if let Some(bytes) = here.and_then(|a| a.backend.unique_bytes(&head.snapshots)) {
            return Ok(Some(bytes));
        }
        let store = self.control(&volume.tenant).await?;
        match load_usage(&store, &volume.tenant, head.volume, head.root).await {
            Ok(usage) => Ok(usage.map(|usage| unique_bytes(usage.dead.iter(), &head.snapshots))),
            // Its owner may have made a newer one meanwhile.
            Err(OpenError::Damaged { object, reason }) => {
                tracing::warn!(%volume, object, reason, "what its snapshots keep is not known");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn attached_snapshot(
        &self,
        volume: &VolumeRef,
        name: &str,
    ) -> Option<crate::control::AttachedInfo> {
        let image = ImageRef::new(volume.tenant.as_str(), &format!("{}@{name}", volume.name));
        let slot = self.slots.lock().get(&image.ok()?).cloned()?;
        slot.stage().attached().map(|a| attached_info(a))
    }

    pub(super) async fn show_one_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        let SnapRef { volume, name } = snapshot;
        let store = self.control(&volume.tenant).await?;
        let head = registry::head(&store, volume).await?;
        let mut all = head.snapshots.iter();
        let number = all.position(|s| s.name == name.as_str());
        let number = number.ok_or_else(|| no_snapshot(&snapshot.clone().into()))?;
        let (found, unique) = (
            &head.snapshots[number],
            self.unique_bytes(volume, &head).await?,
        );
        let clones = snapshot::clones(&store, &volume.tenant, head.volume, name);
        let clones = clones.await.map_err(|error| told(volume, error))?;
        Ok(SnapshotInfo {
            clones: Some(clones),
            unique_bytes: unique.map(|bytes| bytes[number]),
            attached: self.attached_snapshot(volume, &found.name),
            ..info_of(volume, found)
        })
    }

    pub(super) async fn unname_snapshot(&self, snapshot: &SnapRef) -> ApiResult<()> {
        let (image, volume) = (ImageRef::from(snapshot.clone()), &snapshot.volume);
        let of_volume = ImageRef::from(volume.clone());
        let (slot, own) = (self.slot(&of_volume), self.slot(&image));
        let deleted = {
            // In this order, always: so nobody attaches it meanwhile.
            let _change = slot.change.lock().await;
            let _own = own.change.lock().await;
            if !own.is_detached() || self.wanted.contains(&image) {
                let message = format!("{image} is attached here");
                Err(ApiError::new(Kind::Conflict, message, "detach it first"))
            } else {
                self.unname(&slot, snapshot).await
            }
        };
        self.forget_idle(&image, &own);
        self.forget_idle(&of_volume, &slot);
        deleted
    }

    async fn unname(&self, slot: &Slot, snapshot: &SnapRef) -> ApiResult<()> {
        let SnapRef { volume, name } = snapshot;
        let writes = |a: &Arc<Attached>| !a.read_only;
        if let Some(attached) = slot.stage().attached().filter(|a| writes(a)) {
            self.may_change(volume, attached)?;
            let (store, head) = (attached.tenant.control(), attached.backend.head());
            let deleted = snapshot::delete(&store, head, name, now_ms());
            let deleted = registry::in_time(volume, STORE_WAIT_MAX, deleted).await?;
            if let Err(SnapshotError::Head(error)) = &deleted {
                attached.tell_if_fenced(error).await;
            }
            attached.backend.snapshot_is_gone();
            return deleted.map_err(|error| told(volume, error));
        }
        let store = self.control(&volume.tenant).await?;
        let id = find_by_its_name(&store, volume).await?.0;
        let held = hold(&store, &volume.tenant, id, &self.claim()).await;
        let (head, was_ours) = held.map_err(|error| not_ours(volume, &error))?;
        let deleted = snapshot::delete(&store, &head, name, now_ms());
        let deleted = registry::in_time(volume, STORE_WAIT_MAX, deleted).await;
        if !was_ours && let Err(error) = give_back(&store, &head).await {
            tracing::warn!(%volume, %error, "the store still names this host as the owner");
        }
        deleted?.map_err(|error| told(volume, error))
    }

    /// Makes a clone and gives it its name. *Crash before the name: the clone is there, without one, and its
    /// snapshot cannot be deleted; whoever tries is told its id, and `volume rescue` gives it the name.*
    pub(super) async fn volume_of_snapshot(
        &self,
        snapshot: &SnapRef,
        name: &VolumeName,
    ) -> ApiResult<VolumeRef> {
        let parent = &snapshot.volume;
        let clone = VolumeRef {
            tenant: parent.tenant.clone(),
            name: name.clone(),
        };
        let tenant = self.tenant(&parent.tenant).await?;
        let store = tenant.control();
        registry::check_free(&store, &clone).await?;
        let size = size_of(&registry::head(&store, parent).await?, &snapshot.name);
        let size = size.ok_or_else(|| no_snapshot(&snapshot.clone().into()))?;
        let wish = Wish::sized(&clone, size.bytes());
        let admission = self.admit(&tenant, &wish).await?;
        let made = self.make_clone(&tenant, snapshot, &clone).await;
        self.settle(admission).await;
        made?;
        Ok(clone)
    }

    async fn make_clone(
        &self,
        tenant: &Tenant,
        snapshot: &SnapRef,
        clone: &VolumeRef,
    ) -> ApiResult<()> {
        let (parent, store) = (&snapshot.volume, &tenant.control());
        let volume = VolumeId::from(uuid::Uuid::new_v4());
        let spec = CloneSpec {
            tenant: parent.tenant.clone(),
            parent: registry::find(store, parent).await?,
            snapshot: snapshot.name.clone(),
            volume,
            name: clone.name.clone(),
            key: self.key_for_clone(tenant, parent, volume).await?,
            now_ms: now_ms(),
        };
        let made = snapshot::make_clone(store, &spec).await;
        made.map_err(|error| told(parent, error))?;
        let record = NameRecord::new(spec.volume, spec.now_ms);
        let named = registry::name_fresh(store, clone, &record).await;
        if let Err(error) = named {
            // Somebody was quicker. Its head is not deleted at once: one that was sent twice may arrive yet. After
            // other errors it may have its name, and stays.
            if error.kind == Kind::Exists {
                let cache = self.common.device.id();
                let put = trash::put(store, clone, spec.volume, cache, now_ms()).await;
                if let Err(error) = put {
                    tracing::warn!(%clone, id = %spec.volume, %error, "a clone without a name stays");
                }
            }
            return Err(error);
        }
        Ok(())
    }

    pub(super) async fn roll_volume_back(&self, snapshot: &SnapRef) -> ApiResult<()> {
        let SnapRef { volume, name } = snapshot;
        let image = ImageRef::from(volume.clone());
        let slot = self.slot(&image);
        let rolled = {
            let _change = slot.change.lock().await;
            if !slot.is_detached() || self.wanted.contains(&image) {
                let message = format!("{volume} is attached");
                Err(ApiError::new(Kind::Conflict, message, "detach it first"))
            } else {
                self.roll_detached_back(volume, name).await
            }
        };
        self.forget_idle(&image, &slot);
        rolled
    }

    async fn roll_detached_back(&self, volume: &VolumeRef, name: &SnapName) -> ApiResult<()> {
        let tenant = self.tenant(&volume.tenant).await?;
        let store = tenant.control();
        let (id, head) = find_by_its_name(&store, volume).await?;
        let by = self.claim();
        // It may have been larger then.
        let size = size_of(&head, name).map_or(0, Sectors::bytes);
        let more = size.saturating_sub(head.size.bytes());
        let admission = match more {
            0 => None,
            more => Some(self.admit(&tenant, &Wish::growth(volume, more)).await?),
        };
        let back = snapshot::roll_back(&store, &volume.tenant, id, name, &by);
        let back = registry::in_time(volume, STORE_WAIT_MAX, back).await;
        if let Some(admission) = admission {
            self.settle(admission).await;
        }
        let back = back?;
        back.map(drop).map_err(|error| told(volume, error))
    }
}

/// A volume that is called so and not otherwise too, by which it may be attached here.
async fn find_by_its_name(store: &Lane, volume: &VolumeRef) -> ApiResult<(VolumeId, Head)> {
    let head = registry::head(store, volume).await?;
    let called = trash::check_name(store, &head, volume).await;
    called.map_err(|error| trash_error(volume, error))?;
    Ok((head.volume, head))
}

/// How large a volume was when it was snapshotted.
fn size_of(head: &Head, name: &SnapName) -> Option<Sectors> {
    let mut all = head.snapshots.iter();
    Some(all.find(|s| s.name == name.as_str())?.size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedy_for_clones_is_first_to_keep_them() {
        let remedy = |clones: &[&str]| {
            let clones: Vec<String> = clones.iter().map(|clone| (*clone).to_owned()).collect();
            without_clones(&clones)
        };
        let named = remedy(&["acme/old (in the trash)", "acme/test"]);
        assert!(
            named.contains("`quarry volume flatten acme/test`"),
            "{named}"
        );
        assert!(!named.contains("rescue"), "{named}");
        let nameless = remedy(&["acme/test (nameless, id 7)"]);
        assert!(nameless.contains("flatten CLONE"), "{nameless}");
        assert!(nameless.contains("rescue NAME --id"), "{nameless}");
    }
}
