//! Attaching and detaching: the steps and their order.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use quarry_cache::{Journal, Recovered};
use quarry_objfmt::{Generation, Owner, SegmentId, SnapName, TenantName, VolumeId};
use quarry_volume::{Event, Opened, Volume, VolumeParams};

use super::access::Access;
use super::kept::{Taken, Unsettled, settle, take_up};
use super::keys::same_data_keys;
use super::owners::Owned;
use super::release::Whose::OtherCache;
use super::slot::{Attached, Slot, Stage};
use super::snapshot::no_snapshot;
use super::tenants::Tenant;
use super::trash::trash_error;
use super::wanted::{How, NotAdded, TENANT_PAST_MAX};
use super::{Daemon, VolumeMachine, now_ms, registry};
use crate::backend::open::{
    Claim, Claimed, OpenError, claim, give_back, open_read_only, open_snapshot,
};
use crate::backend::past::open_at;
use crate::backend::{HeadCell, HeadError, VolumeBackend};
use crate::control::{
    ApiError, ApiResult, AttachInfo, AttachOptions, DetachInfo, ImageRef, Kind, Via, VolumeRef,
};
use crate::latency::Latencies;
use crate::moment::Moment;
use crate::nbd::Export;
use crate::qos::VolumeGate;
use crate::reactor::ublk_queue::UblkQueue;
use crate::reactor::{Geometry, Machine, Message, ReactorGone, ReactorHandle, Traced, VolumeKey};
use crate::store::{Store, StoreStats};
use crate::trace::Whose;
use crate::trash::check_name;
use crate::ublk::{
    Device, DeviceSpec, Found, Mode, Permissions, Stamp, State, UblkError, past_device,
    snapshot_device,
};

/// How long the front ends of a volume may take to end. A ublk queue ends when its device is
/// stopped, which comes first; one whose device could not be recovered never does.
const FRONT_ENDS_END_MAX: Duration = Duration::from_secs(10);

/// How long a start waits for a device to go that a daemon before it left: as long as somebody has it open, a file
/// system that is mounted for one, the kernel keeps it, stopped.
const REMOVED_WAIT_MAX: Duration = Duration::from_secs(5);

/// How the data of a volume travel that is attached by NBD.
const THROUGH_THE_DAEMON: &str = "through the daemon";

/// As [`THROUGH_THE_DAEMON`], where its data on the cache device are encrypted.
const THROUGH_THE_DAEMON_ENCRYPTED: &str = "through the daemon (encrypted cache)";

impl From<OpenError> for ApiError {
    fn from(error: OpenError) -> Self {
        let kind = match &error {
            OpenError::Owned { .. }
            | OpenError::Taken
            | OpenError::Deleted
            | OpenError::Stale { .. }
            | OpenError::Unsent
            | OpenError::Raced { .. } => Kind::Conflict,
            OpenError::NoSnapshot { .. } | OpenError::NotKept { .. } => Kind::NotFound,
            OpenError::Future { .. } => Kind::Invalid,
            OpenError::Damaged { .. }
            | OpenError::Lost { .. }
            | OpenError::InDoubt { .. }
            | OpenError::Cache(_) => Kind::Damaged,
            OpenError::Store(error) => return registry::store_error(error),
        };
        let remedy = match &error {
            OpenError::NotKept { .. } => "`quarry volume retain` keeps more from now on",
            OpenError::Damaged { object, .. } => registry::damage_remedy(object),
            _ => "",
        };
        Self::new(kind, error.to_string(), remedy)
    }
}

impl From<UblkError> for ApiError {
    fn from(error: UblkError) -> Self {
        let kind = match &error {
            UblkError::Absent | UblkError::TooOld { .. } => Kind::Unsupported,
            UblkError::Denied(_) | UblkError::Permissions { .. } => Kind::Denied,
            UblkError::InUse { .. }
            | UblkError::Served { .. }
            | UblkError::Shape { .. }
            | UblkError::ZeroCopy { .. } => Kind::Conflict,
            UblkError::Busy | UblkError::TenantBusy(_) => Kind::Unavailable,
            // `NotTaken` among them, which is tried again, and which others do not wait for.
            _ => Kind::Internal,
        };
        Self::new(kind, error.to_string(), "")
    }
}

impl From<ReactorGone> for ApiError {
    fn from(error: ReactorGone) -> Self {
        Self::internal(error.to_string())
    }
}

/// A volume that a reactor serves, without a front end yet.
pub(super) struct Opening {
    pub(super) backend: Arc<VolumeBackend>,
    gate: Arc<VolumeGate>,
    spec: DeviceSpec,
    tenant: Arc<Tenant>,
    account: Arc<StoreStats>,
    /// Kept for as long as it is here.
    owned: Option<Arc<Owned>>,
}

impl Daemon {
    /// Attaches a volume as it was when the last daemon of this data folder ended.
    ///
    /// # Errors
    /// As attaching it for the first time, but for its owner, who was found then.
    pub async fn attach_again(&self, volume: &ImageRef, how: &How) -> ApiResult<AttachInfo> {
        self.fit()?;
        self.attach_volume(volume, &how.again(), how.access.clone())
            .await
    }

    /// Only for [`Daemon::attach_again`] is `access` not what `options` says.
    pub(super) async fn attach_volume(
        &self,
        volume: &ImageRef,
        options: &AttachOptions,
        access: Access,
    ) -> ApiResult<AttachInfo> {
        // What is past takes no writes, whoever asks.
        let options = &AttachOptions {
            read_only: options.read_only || volume.is_past(),
            ..options.clone()
        };
        let slot = self.slot(volume);
        let _change = slot.change.lock().await;
        let answer = self.attach_to(&slot, volume, options, access).await;
        self.forget_idle(volume, &slot);
        answer
    }

    async fn attach_to(
        &self,
        slot: &Slot,
        volume: &ImageRef,
        options: &AttachOptions,
        access: Access,
    ) -> ApiResult<AttachInfo> {
        if let Some(attached) = slot.stage().attached() {
            let message = format!("{volume} is attached already");
            let place = attached.info.device.as_ref().or(attached.info.uri.as_ref());
            let remedy = place.map_or_else(String::new, |place| format!("use {place}"));
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        // Whether there is a front end is asked first: nothing is changed for want of one.
        let via = match options.via {
            Some(Via::Nbd) => Via::Nbd,
            None if !options.wants_a_device() => {
                self.ublk.probe().await.map_or(Via::Nbd, |_| Via::Ublk)
            }
            Some(Via::Ublk) | None => {
                self.ublk.probe().await?;
                Via::Ublk
            }
        };
        // It was detached while it waited for its turn.
        if options.again && !self.wanted.contains(volume) {
            let message = format!("{volume} is not to be attached again any more");
            return Err(ApiError::new(Kind::Unavailable, message, ""));
        }
        let known = self.wanted.how(volume);
        let waits = known.as_ref().filter(|_| !options.again);
        if waits.is_some_and(|how| how.via == Via::Ublk) && via == Via::Nbd {
            let message = format!(
                "{volume} waits here to be attached again as a block device, which may be in use"
            );
            let remedy = "attach it with --via ublk, or detach it first";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let how = How {
            via,
            read_only: options.read_only,
            // To take it away from somebody is said once; to look on takes nothing away.
            force: options.force && options.read_only,
            queues: options.queues,
            access: access.clone(),
            direct_reads: options.direct_reads,
            cache: match known {
                // Only once it is attached is it known to be with another.
                Some(known) => known.cache,
                None => self.cache_of(options.read_only),
            },
        };
        // First: what cannot be noted is not begun. *Crash from here on: the next start attaches it if it is ours by
        // then, or else takes it off the list.*
        let before = self.wanted.add(volume, how.clone()).await;
        let before = before.map_err(|error| self.not_noted(volume, &error))?;
        // One that waits to be attached again: who does that by hand does not give it up.
        let options = &AttachOptions {
            stays: options.stays || before.is_some(),
            ..options.clone()
        };
        slot.set(Stage::Attaching);
        match self.open(volume, options, via, access).await {
            Ok(attached) => {
                let info = attached.info.clone();
                self.warm_hot_set(&attached);
                slot.set(Stage::Attached(Arc::new(attached)));
                self.wanted.note(volume, None);
                self.note_cache(volume, how).await;
                if before.is_some() {
                    self.note_found(volume).await;
                }
                Ok(info)
            }
            Err((error, Some(left))) => {
                slot.set(Stage::Attached(Arc::new(left)));
                Err(error)
            }
            Err((error, None)) => {
                if let Err(error) = self.wanted.restore(volume, before).await {
                    self.wanted.note(volume, Some(error.to_string()));
                    tracing::error!(%volume, %error, "not attached, but the next start will try it: the list of attached volumes cannot be written");
                }
                // Last: it is not to be seen as one that waits to be attached again.
                slot.set(Stage::Detached);
                Err(error)
            }
        }
    }

    /// Why what is not on the list is not attached.
    fn not_noted(&self, volume: &ImageRef, error: &NotAdded) -> ApiError {
        match error {
            NotAdded::Full => {
                let message = format!(
                    "tenant {} has {TENANT_PAST_MAX} snapshots and past states attached on this host, and may have no more",
                    volume.volume.tenant
                );
                ApiError::new(Kind::Conflict, message, "detach one of them first")
            }
            NotAdded::Write(error) => {
                let message =
                    format!("{volume} cannot be noted as attached for the next start: {error}");
                let remedy = format!(
                    "see that {} has room and can be written",
                    self.config.daemon.data_dir.display()
                );
                ApiError::new(kind_of(error), message, remedy)
            }
        }
    }

    /// What the list says of the cache that a volume is attached with.
    fn cache_of(&self, read_only: bool) -> Option<String> {
        (!read_only).then(|| self.common.device.id().to_string())
    }

    /// Notes with which cache a volume is attached: before, it may have been with another, and lists of older daemons do not say so.
    async fn note_cache(&self, volume: &ImageRef, how: How) {
        let cache = self.cache_of(how.read_only);
        if how.cache == cache {
            return;
        }
        if let Err(error) = self.wanted.add(volume, How { cache, ..how }).await {
            tracing::warn!(%volume, %error, "the list of attached volumes cannot be written, and does not say with which cache it is");
        }
    }

    /// Notes that the list's volumes are in the daemon's store, as this one is, which was in the list before.
    async fn note_found(&self, volume: &ImageRef) {
        if let Err(error) = self.wanted.found_here().await {
            tracing::warn!(%volume, %error, "the list of attached volumes cannot be written, and does not say in which store they are");
        }
    }

    /// Opens the volume and gives it a front end. With the error comes what could not be taken back.
    async fn open(
        &self,
        volume: &ImageRef,
        options: &AttachOptions,
        via: Via,
        access: Access,
    ) -> Result<Attached, (ApiError, Option<Attached>)> {
        let mut opening = self.serve(volume, options).await.map_err(|e| (e, None))?;
        opening.spec.permissions = access.permissions();
        let mut attached = Attached {
            read_only: options.read_only,
            access,
            shown: AtomicU64::new(opening.spec.size.bytes()),
            ..self.without_front_end(volume, &opening)
        };
        if options.direct_reads {
            let can = attached.can_read_directly(via);
            attached.direct = Some(can);
            attached.tell_direct().await;
        }
        // Should its device be given only in part, it is to be let go as a device is.
        attached.info.via = via;
        if via == Via::Ublk {
            attached.info.uri = None;
        }
        match via {
            Via::Ublk => match self.make_device(&attached.backend, &opening.spec).await {
                Ok(device) => {
                    let link = device.link.as_ref().map(|l| l.display().to_string());
                    attached.info =
                        AttachInfo::ublk(volume, device.node.display().to_string(), link);
                    attached.mode = self.mode_text(device.mode);
                    attached.queues = device.queues;
                    attached.shown = AtomicU64::new(device.size.bytes());
                    attached.direct_in(device.mode).await;
                    attached.device = Some((device.id, opening.spec));
                }
                Err(error) => {
                    // As if it had been detached again: what the cache has of it stays findable.
                    let error = ApiError::from(error);
                    let after = After::of(options.stays);
                    let left = self.let_go(&attached, after).await.is_err();
                    let left = left.then_some(attached);
                    return Err((error, left));
                }
            },
            Via::Nbd => {
                let (reactor, key) = attached.backend.place();
                let export = Export {
                    reactor: reactor.clone(),
                    volume: key,
                    geometry: Geometry {
                        size: opening.spec.size,
                        sector_size: opening.spec.sector_size,
                        read_only: options.read_only,
                    },
                    group: attached.tenant.gate().group(),
                };
                self.exports.0.lock().insert(volume.to_string(), export);
            }
        }
        attached.info.warning = attached.direct_warning();
        if let Some(warning) = &attached.info.warning {
            tracing::warn!(%volume, warning);
        }
        Ok(attached)
    }

    /// How a device's data travel, and why no better.
    fn mode_text(&self, mode: Mode) -> &'static str {
        match mode {
            Mode::UserCopy if self.config.cache.encrypt => "user copy (encrypted cache)",
            Mode::Plain if self.config.cache.encrypt => "plain (encrypted cache)",
            mode => mode.as_str(),
        }
    }

    /// A volume that is served here to nobody.
    pub(super) fn without_front_end(&self, volume: &ImageRef, opening: &Opening) -> Attached {
        let backend = &opening.backend;
        Attached {
            backend: Arc::clone(backend),
            _owned: opening.owned.clone(),
            tenant: Arc::clone(&opening.tenant),
            account: Arc::clone(&opening.account),
            gate: Arc::clone(&opening.gate),
            info: AttachInfo::nbd(volume, &self.config.nbd_socket()),
            mode: match self.config.cache.encrypt {
                true => THROUGH_THE_DAEMON_ENCRYPTED,
                false => THROUGH_THE_DAEMON,
            },
            queues: 0,
            since_ms: now_ms(),
            read_only: false,
            access: Access::default(),
            device: None,
            shown: AtomicU64::new(backend.head().get().size.bytes()),
            direct: None,
        }
    }

    /// Takes the right to write (or reads what is there), takes up what the cache kept, and puts
    /// the volume on a reactor. After an error all is as before, but for a raised epoch.
    pub(super) async fn serve(
        &self,
        volume: &ImageRef,
        options: &AttachOptions,
    ) -> ApiResult<Opening> {
        let tenant = self.tenant(&volume.volume.tenant).await?;
        let record = registry::find_record(&tenant.control(), &volume.volume).await?;
        let id = record.volume;
        let owned = self.own(volume, id)?;
        let mut opening = match (&volume.snapshot, volume.at) {
            (Some(name), _) => {
                self.serve_snapshot(&tenant, volume, id, name, options)
                    .await?
            }
            (None, Some(at)) => self.serve_past(&tenant, volume, id, at, options).await?,
            (None, None) => {
                let opening = self.serve_volume(&tenant, volume, id, options).await?;
                // There is no front end yet.
                opening.gate.set_rates(&record.rates);
                opening
            }
        };
        opening.owned = Some(Arc::new(owned));
        Ok(opening)
    }

    async fn serve_volume(
        &self,
        tenant: &Arc<Tenant>,
        volume: &ImageRef,
        id: VolumeId,
        options: &AttachOptions,
    ) -> ApiResult<Opening> {
        let unsettled = self.unsettled.lock().remove(&id);
        if let Some(Unsettled { tenant, segments }) = unsettled {
            self.settle_cache(id, &tenant, segments)
                .await
                .map_err(OpenError::Cache)?;
        }
        // It stays known until the volume has taken it up.
        let kept = self.kept.lock().get(&id).cloned();
        let opening = self.serve_kept(tenant, volume, id, kept, options).await?;
        if !options.read_only {
            self.kept.lock().remove(&id);
        }
        Ok(opening)
    }

    /// Refuses a volume that is here for another tenant, or of which the cache keeps unsent writes for one: two stores
    /// that say that they have it, one of which must be a copy, or made up.
    fn own(&self, image: &ImageRef, id: VolumeId) -> ApiResult<Owned> {
        let tenant = &image.volume.tenant;
        let owned = self.owners.take(id, tenant);
        let is_kept = |found: &Recovered| !found.is_of(tenant);
        let is_unsettled = |found: &Unsettled| found.tenant != *tenant;
        let is_anothers = self.kept.lock().get(&id).is_some_and(is_kept)
            || self.unsettled.lock().get(&id).is_some_and(is_unsettled);
        owned.filter(|_| !is_anothers).ok_or_else(|| {
            let message = format!("{image} has the id of a volume of another tenant, {id}");
            let remedy = "a copy of a store is not attached beside what it was copied from";
            ApiError::new(Kind::Conflict, message, remedy)
        })
    }

    /// Reads what the snapshot is. What the cache kept of its volume is no part of it.
    async fn serve_snapshot(
        &self,
        tenant: &Arc<Tenant>,
        image: &ImageRef,
        id: VolumeId,
        name: &SnapName,
        options: &AttachOptions,
    ) -> ApiResult<Opening> {
        let opened = open_snapshot(&tenant.control(), &tenant.name, id, name).await;
        let (mut opened, created_ms) = opened.map_err(|error| match error {
            OpenError::NoSnapshot { .. } => no_snapshot(image),
            error => error.into(),
        })?;
        opened.keys = self.unlock(&tenant.name, &opened.info).await?;
        let device = snapshot_device(id, name, created_ms);
        let taken = (Taken::default(), None);
        self.put_on_a_reactor(tenant, image, device, opened, taken, options)
            .await
    }

    /// Finds out what the volume was. What the cache kept of it was never in the store, and is no part of it.
    async fn serve_past(
        &self,
        tenant: &Arc<Tenant>,
        image: &ImageRef,
        id: VolumeId,
        at: Moment,
        options: &AttachOptions,
    ) -> ApiResult<Opening> {
        let mut opened = open_at(&tenant.control(), &tenant.name, id, at.ms(), now_ms()).await?;
        opened.keys = self.unlock(&tenant.name, &opened.info).await?;
        let device = past_device(id, at);
        let taken = (Taken::default(), None);
        self.put_on_a_reactor(tenant, image, device, opened, taken, options)
            .await
    }

    async fn serve_kept(
        &self,
        tenant: &Arc<Tenant>,
        volume: &ImageRef,
        id: VolumeId,
        kept: Option<Recovered>,
        options: &AttachOptions,
    ) -> ApiResult<Opening> {
        if !options.read_only {
            // One that failed a sync takes no writes any more: to be seen before the right to write is taken.
            let device = Arc::clone(&self.common.device);
            let synced = tokio::task::spawn_blocking(move || device.sync()).await;
            let synced = synced.unwrap_or_else(|error| Err(std::io::Error::other(error)));
            synced.map_err(OpenError::Cache)?;
        }
        let how = Claim {
            cache: self.common.device.id(),
            host: self.host.clone(),
            now_ms: now_ms(),
            force: options.force,
            discard_unsent: options.discard_unsent,
            must_be_ours: options.again && !options.read_only,
        };
        let read_only = options.read_only;
        let (store, name) = (&tenant.control(), &tenant.name);
        let claimed = if read_only {
            let mut opened = open_read_only(store, name, id, kept.as_ref(), &how).await?;
            opened.keys = self.unlock(name, &opened.info).await?;
            opened
        } else {
            // First: nobody is fenced by who could not read or write it. What they are wrapped by does not matter here.
            let read = HeadCell::read(store, name, id).await;
            let (head, _) = read.map_err(|e| registry::head_error(&volume.volume, &e))?;
            // By the other name it may be attached here.
            if head.deleted().is_none() {
                let called = check_name(store, &head, &volume.volume).await;
                called.map_err(|error| trash_error(volume, error))?;
            }
            let keys = self.unlock(name, &head).await?;
            let mut claimed = claim(store, name, id, kept.as_ref(), &how).await?;
            if let Some(owner) = head.owner.as_ref().filter(|owner| owner.cache != how.cache) {
                tracing::warn!(%volume, from = owner.host, cache = %owner.cache, epoch = %claimed.info.epoch, epoch_before = %head.epoch, "taken over by force: that host can write to it no more, and what it had not sent is not in it");
            }
            claimed.keys = match same_data_keys(&head, &claimed.info) {
                true => keys,
                // Whoever had it until now gave it a new one meanwhile.
                false => match self.unlock(name, &claimed.info).await {
                    Ok(keys) => keys,
                    Err(error) => {
                        let leaves = kept.is_none() && !options.stays;
                        leave_to_others(store, volume, &claimed.head, leaves).await;
                        return Err(error);
                    }
                },
            };
            claimed
        };
        let taken = if read_only {
            (Taken::default(), None)
        } else {
            let leaves = kept.is_none() && !options.stays;
            match self.take_up(id, kept, &claimed, options.discard_lost).await {
                Ok((taken, journal)) => {
                    if let Some(bytes) = taken.given_up {
                        tracing::warn!(%volume, bytes, "given up: writes that the cache kept and that may not be in the store");
                    }
                    (taken, Some(journal))
                }
                Err(error) => {
                    leave_to_others(store, volume, &claimed.head, leaves).await;
                    return Err(error);
                }
            }
        };
        self.put_on_a_reactor(tenant, volume, id, claimed, taken, options)
            .await
    }

    /// `device` is by what its block device is known again.
    async fn put_on_a_reactor(
        &self,
        tenant: &Arc<Tenant>,
        volume: &ImageRef,
        device: VolumeId,
        claimed: Claimed,
        (taken, journal): (Taken, Option<Journal>),
        options: &AttachOptions,
    ) -> ApiResult<Opening> {
        let read_only = options.read_only;
        let head = &claimed.info;
        let gate = VolumeGate::new(Arc::clone(tenant.gate()));
        let params = VolumeParams {
            id: head.volume,
            tenant: tenant.name.clone(),
            size: head.size,
            sector_size: head.sector_size,
            frame_sectors: head.frame_sectors,
            epoch: head.epoch,
            durability: head.durability,
            read_only,
            group: gate.tenant().group(),
            tuning: self.tuning(),
        };
        let spec = DeviceSpec {
            cache: self.common.device.id(),
            volume: device,
            tenant: volume.volume.tenant.clone(),
            name: volume.volume.name.clone(),
            snapshot: volume.snapshot.clone(),
            at: volume.at,
            size: head.size,
            sector_size: head.sector_size,
            read_only,
            queues: options.queues.unwrap_or(1),
            permissions: Permissions::default(),
        };
        let opened = Opened {
            root: Arc::clone(&claimed.root),
            log: claimed.log.clone(),
            next_chunk: claimed.next_chunk,
            stored_write: claimed.stored_write,
            unsent: taken.unsent,
            kept_segments: taken.segments,
        };
        // Of a long log it takes a while, in which nobody else is to wait for the lock, nor a thread of the runtime.
        let prepare = move || Volume::prepare(params, opened);
        let prepared = tokio::task::spawn_blocking(prepare).await;
        let prepared = prepared.map_err(|error| ApiError::internal(error.to_string()))?;
        let mut actions = Vec::new();
        let machine = VolumeMachine {
            gate: Arc::clone(&gate),
            volume: prepared.join(&mut self.shared.lock(), &mut actions),
            shared: Arc::clone(&self.shared),
            journal,
            copied_bytes: 0,
            in_place_bytes: 0,
            latencies: Latencies::default(),
            traced: self.common.tracer.clone().map(|tracer| Traced {
                tracer,
                whose: Arc::new(Whose {
                    tenant: volume.volume.tenant.to_string(),
                    volume: volume.short_name(),
                }),
                durability: head.durability,
            }),
            first: actions,
        };
        let (reactor, key) = self.place()?;
        let account = Arc::new(StoreStats::default());
        let common = tenant.common(&self.common, Arc::clone(&account));
        let name = volume.to_string();
        let backend = VolumeBackend::new(common, name, claimed, key, reactor.clone());
        let add = Message::AddVolume {
            key,
            machine: Box::new(machine),
            backend: Box::new(Arc::clone(&backend)),
        };
        reactor.send(add).await?;
        if !read_only {
            backend.start_reclaiming();
            backend.start_sweeping_orphans();
        }
        Ok(Opening {
            backend,
            gate,
            spec,
            tenant: Arc::clone(tenant),
            account,
            owned: None,
        })
    }

    /// Takes up what the cache kept, and makes the journal anew.
    async fn take_up(
        &self,
        id: VolumeId,
        kept: Option<Recovered>,
        claimed: &Claimed,
        give_up: bool,
    ) -> ApiResult<(Taken, Journal)> {
        let device = Arc::clone(&self.common.device);
        let (stored, since) = (claimed.stored_write, claimed.kept_since);
        let take_up = move || take_up(&*device, id, kept, stored, since, give_up);
        let taken = tokio::task::spawn_blocking(take_up)
            .await
            .map_err(|e| ApiError::internal(e.to_string()))?
            .map_err(OpenError::from)?;
        let attachment = *uuid::Uuid::new_v4().as_bytes();
        let entries = self.tuning().journal_entries;
        let epoch = claimed.info.epoch;
        let journal = self.journals.create(id, epoch, attachment, entries);
        let journal = journal.map_err(|error| {
            let message = format!(
                "the journal in {} cannot be made: {error}",
                self.config.daemon.journal_dir.display()
            );
            let remedy = "free memory there, or set daemon.journal_dir";
            ApiError::new(kind_of(&error), message, remedy)
        })?;
        Ok((taken, journal))
    }

    /// Makes a ublk device for the volume, or takes over the one that the last daemon left: its
    /// requests are then given to us anew.
    async fn make_device(
        &self,
        backend: &VolumeBackend,
        spec: &DeviceSpec,
    ) -> Result<Device, UblkError> {
        let (reactor, key) = backend.place();
        let host = Box::new(add_queue(reactor.clone(), key));
        match self.left_device(spec).await? {
            Some(id) => {
                let device = self.ublk.recover(id, spec.clone(), host).await?;
                if let Some(left) = &mut *self.left.lock() {
                    left.retain(|found| found.id != id);
                }
                if let Some(since) = self.waiting_since {
                    let pause_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
                    tracing::info!(volume = backend.name(), device = %device.node.display(), pause_ms, "the device's users waited so long for this daemon");
                }
                Ok(device)
            }
            None => self.ublk.start(spec.clone(), host).await,
        }
    }

    /// The device that a dead daemon left for a volume.
    async fn left_device(&self, spec: &DeviceSpec) -> Result<Option<u32>, UblkError> {
        let known = self
            .left
            .lock()
            .as_deref()
            .map(|all| Found::left_for(all, spec));
        match known {
            Some(Ok(id)) => Ok(id),
            // What was in the way at the start may be so no more.
            Some(Err(_)) | None => Found::left_for(&self.ublk.find().await?, spec),
        }
    }

    /// Looks once for the devices that dead daemons left, for the attaches that follow a start: each
    /// look asks for every device of the host.
    pub async fn look_for_left_devices(&self) {
        match self.ublk.find().await {
            Ok(all) => *self.left.lock() = Some(all),
            Err(error) => {
                tracing::warn!(%error, "the devices of earlier daemons cannot be looked for");
            }
        }
    }

    /// The devices that an earlier daemon on this cache device left.
    async fn devices_left_here(&self) -> Result<Vec<(u32, State, Stamp)>, UblkError> {
        let mut all = self.ublk.find().await?;
        all.retain(|device| device.is_recoverable() || device.state == State::Dead);
        let cache = self.common.device.id();
        let left = all.into_iter().filter_map(|found| {
            let stamp = found.stamp.filter(|stamp| stamp.cache == cache)?;
            Some((found.id, found.state, stamp))
        });
        Ok(left.collect())
    }

    /// Removes the devices that an earlier daemon on this cache device left and that are not to be
    /// attached: one that died before it had noted the device, or whose volume is no more. Another
    /// daemon's devices are left alone.
    pub async fn remove_left_devices(&self) {
        *self.left.lock() = None;
        let left = match self.devices_left_here().await {
            Ok(left) => left,
            Err(error) => {
                tracing::warn!(%error, "the devices of earlier daemons cannot be looked for");
                return;
            }
        };
        for (device, state, stamp) in left {
            let is_dead = state == State::Dead;
            let volume = image_of(&stamp);
            // One that is wanted may be on its way, from a store that hangs.
            if !is_dead && self.wanted.contains(&volume) {
                continue;
            }
            let slot = self.slot(&volume);
            let _change = slot.change.lock().await;
            // What was stopped while its daemon died serves nobody; one that is being made is made with this lock.
            let is_another = || match slot.stage().attached() {
                Some(attached) => attached.device.as_ref().map(|(id, _)| *id) != Some(device),
                None => slot.is_detached(),
            };
            let is_left = match is_dead {
                true => is_another(),
                false => !self.wanted.contains(&volume) && slot.is_detached(),
            };
            if is_left {
                // Told in the log.
                let _ = self.remove_left_device(&volume, device, stamp).await;
            }
            self.forget_idle(&volume, &slot);
        }
    }

    /// Whether what is not attached waits here to be attached again. One that somebody had meanwhile does not, for it is not.
    pub(super) fn waits_here(&self, image: &ImageRef, owner: Option<&Owner>) -> bool {
        let is_ours = || owner.is_some_and(|owner| owner.cache == self.common.device.id());
        let how = self.wanted.how(image);
        how.is_some_and(|how| how.read_only || image.is_past() || is_ours())
    }

    /// A volume that could not be attached again, and is not to be any more: says what stays of it.
    async fn leave_waiting(&self, volume: &ImageRef, how: &How) -> ApiResult<()> {
        let writes = !how.read_only && !volume.is_past();
        if writes && let Ok(OtherCache(cache)) = self.whose_is(volume, how).await {
            let message = format!(
                "{volume} is given up here, and nothing of it was sent: cache {cache}, with which it was attached, has it still"
            );
            let remedy =
                "attach it where that cache is; if that is lost, attach it anywhere with --force";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let keeps = match self.control(&volume.volume.tenant).await {
            Ok(store) => match registry::find(&store, &volume.volume).await {
                Ok(id) => self.keeps(&volume.volume.tenant, id),
                Err(error) if error.kind == Kind::NotFound => false,
                Err(_) => self.keeps_any(&volume.volume.tenant),
            },
            Err(_) => self.keeps_any(&volume.volume.tenant),
        };
        if !keeps || volume.is_past() {
            return Ok(());
        }
        let message = format!(
            "{volume} is not attached again, but the cache on this host may hold writes to it that were never sent; they stay there"
        );
        let remedy = "attach and detach it here, which sends them";
        Err(ApiError::new(Kind::Conflict, message, remedy))
    }

    /// After a volume was taken off the list when the devices of the others had been looked through: removes its own.
    pub async fn remove_device_of_unlisted(&self, volume: &ImageRef) {
        let slot = self.slot(volume);
        {
            let _change = slot.change.lock().await;
            if !self.wanted.contains(volume) && slot.is_detached() {
                // Told in the log.
                let _ = self.remove_devices_left_of(volume).await;
            }
        }
        self.forget_idle(volume, &slot);
    }

    /// Its device goes, as who uses it would wait for ever. Only by who holds the right to change the volume's place.
    async fn remove_devices_left_of(&self, volume: &ImageRef) -> ApiResult<()> {
        let left = self.devices_left_here().await.inspect_err(|error| {
            tracing::warn!(%volume, %error, "the device that an earlier daemon left cannot be looked for");
        })?;
        for (device, _, stamp) in left {
            if image_of(&stamp) == *volume {
                self.remove_left_device(volume, device, stamp).await?;
            }
        }
        Ok(())
    }

    async fn remove_left_device(
        &self,
        volume: &ImageRef,
        device: u32,
        stamp: Stamp,
    ) -> Result<(), UblkError> {
        let removed = self.ublk.remove_left(device, stamp);
        let removed = tokio::time::timeout(REMOVED_WAIT_MAX, removed).await;
        if !matches!(removed, Ok(Err(_)))
            && let Some(left) = &mut *self.left.lock()
        {
            left.retain(|found| found.id != device);
        }
        match removed {
            Err(_) => {
                tracing::warn!(%volume, device, "a device that an earlier daemon left and nobody wants is stopped, and goes when those who have it open close it");
                Ok(())
            }
            Ok(Ok(())) => {
                tracing::warn!(%volume, device, "removed a device that an earlier daemon left and nobody wants");
                Ok(())
            }
            Ok(Err(error)) => {
                tracing::error!(%volume, device, %error, "a device that nobody wants stays");
                Err(error)
            }
        }
    }

    pub(super) async fn detach_volume(&self, volume: &ImageRef) -> ApiResult<DetachInfo> {
        let slot = self.slot(volume);
        let _change = slot.change.lock().await;
        let answer = self.detach_from(&slot, volume).await;
        self.forget_idle(volume, &slot);
        answer
    }

    /// Takes what is detached off the list.
    async fn unlist(&self, volume: &ImageRef) -> ApiResult<()> {
        self.wanted.remove(volume).await.map_err(|error| {
            self.wanted.note(volume, Some(error.to_string()));
            let message =
                format!("{volume} is detached, but the next start will attach it again: {error}");
            ApiError::internal(message)
        })
    }

    async fn detach_from(&self, slot: &Slot, volume: &ImageRef) -> ApiResult<DetachInfo> {
        let Some(attached) = slot.stage().attached().cloned() else {
            let Some(how) = self.wanted.how(volume) else {
                let message = format!("{volume} is not attached to this host");
                let remedy = "there is nothing to detach here";
                return Err(ApiError::new(Kind::Conflict, message, remedy));
            };
            // It is waited for since the start. That it cannot be attached was not found yet: then it is, and detached as any other.
            if self.wanted.problem(volume).is_none() {
                let attached = match self.fit() {
                    Ok(()) => {
                        let options = how.again();
                        self.attach_to(slot, volume, &options, how.access).await
                    }
                    Err(unfit) => Err(unfit),
                };
                return match attached {
                    Ok(_) => Box::pin(self.detach_from(slot, volume)).await,
                    Err(error) => {
                        self.wanted.note(volume, Some(error.to_string()));
                        Err(error)
                    }
                };
            }
            let removed = self.remove_devices_left_of(volume).await;
            // Of one that had none it does not matter that nobody can look.
            if how.via == Via::Ublk {
                removed?;
            }
            self.unlist(volume).await?;
            self.leave_waiting(volume, &how).await?;
            return Ok(DetachInfo::new(volume, None));
        };
        slot.set(Stage::Detaching(Arc::clone(&attached)));
        // Its end waits for all requests.
        attached.gate.set_leaving(true);
        let stay = || {
            attached.gate.set_leaving(false);
            slot.set(Stage::Attached(Arc::clone(&attached)));
        };
        // The device goes first: what its users wrote is then all acknowledged.
        if let Some((id, spec)) = &attached.device
            && let Err(error) = self.ublk.remove(*id, spec.clone(), false).await
        {
            stay();
            return Err(error.into());
        }
        // Nobody new comes in from here on.
        self.exports.0.lock().remove(&volume.to_string());
        let left = match self.let_go(&attached, After::GiveBack).await {
            Ok(left) => left,
            Err(error) => {
                stay();
                return Err(error);
            }
        };
        let unlisted = self.unlist(volume).await;
        // Last: it is not to be seen as one that waits to be attached again.
        slot.set(Stage::Detached);
        unlisted?;
        if left.complete || attached.backend.condition().fenced {
            let unsent = !left.complete && left.unsent_bytes > 0;
            let unsent = unsent.then_some(left.unsent_bytes);
            return Ok(DetachInfo::new(volume, unsent));
        }
        let message = format!(
            "{volume} is detached, but not all of its writes could be sent; they stay in the cache"
        );
        Err(ApiError::new(
            Kind::Conflict,
            message,
            "mend the cache device and attach it here again",
        ))
    }

    /// Ends the service of a volume: everything sent, the cache's segments given up, the right to
    /// write given back. Those of its writes that are not in the store stay
    /// in the cache and the journal, for whoever attaches it next.
    ///
    /// The order: no more requests, drain, take apart, settle the cache, say what was hot, give back. *Crash before the giving back: it
    /// is still ours, and the next start attaches it again. After: nothing of it is unsent.*
    pub(super) async fn let_go(&self, attached: &Attached, after: After) -> ApiResult<Left> {
        let backend = &attached.backend;
        let (reactor, key) = backend.place();
        let ended = reactor.stop_front_ends(key);
        if attached.info.via == Via::Ublk {
            let ended = tokio::time::timeout(FRONT_ENDS_END_MAX, ended).await;
            ended.map_err(|_| {
                let message = "the device's queue does not end";
                ApiError::new(
                    Kind::Internal,
                    message,
                    "restart the daemon, which takes it over",
                )
            })??;
        } else {
            // Requests that wait for the store end when it answers; but for those that wait for what cannot be sent.
            let mut ended = pin!(ended);
            tokio::select! {
                ended = &mut ended => ended?,
                () = backend.is_stuck() => {
                    backend.tell(Event::CacheFailed { errno: libc::EIO }).await;
                    ended.await?;
                }
            }
        }
        backend.tell(Event::Stop).await;
        backend.stop_reclaiming().await;
        backend.stop_sweeping_orphans().await;
        let drained = attached.read_only || backend.drain(true).await;
        let hot = self.hot_set(attached).await;
        let machine = reactor.remove_volume(key).await?;
        // Before its segments are: an upload may still wait for its place, or for the cache device to be read.
        backend.close().await;
        let (kept, unsent_bytes) = machine.map(|m| self.close(m)).unwrap_or_default();
        let complete = drained && kept.is_empty();
        if attached.read_only {
            return Ok(Left {
                complete: true,
                unsent_bytes: 0,
            });
        }
        // Before others may have it, if the device takes it: after a power cut its segments are to be told from writes of a history
        // that it has left.
        let tenant = &attached.tenant.name;
        if let Err(error) = self.settle_cache(backend.volume(), tenant, kept).await {
            tracing::error!(volume = backend.name(), %error, "the cache device failed; what it has of the volume is looked for again when it is attached");
        }
        if complete {
            if let Some(hot) = &hot {
                self.leave_hot_set(attached, hot).await;
            }
            let given = match after {
                After::GiveBack => give_back(&attached.tenant.control(), backend.head()).await,
                After::Keep => Ok(()),
            };
            match given {
                Ok(()) | Err(HeadError::Fenced { .. }) => {}
                Err(error) => {
                    tracing::warn!(volume = backend.name(), %error, "detached, but the store still names this host as the owner");
                }
            }
        }
        Ok(Left {
            complete,
            unsent_bytes,
        })
    }

    /// Gives up a volume's place on the cache device, but for the segments that it answers; with the bytes of its unsent writes.
    fn close(&self, machine: Box<dyn Machine>) -> (Vec<(SegmentId, Generation)>, u64) {
        let machine: Box<dyn std::any::Any> = machine;
        let machine = machine.downcast::<VolumeMachine>();
        let machine = machine.expect("the engine makes no other machines");
        let unsent_bytes = machine.volume.stats().dirty_bytes;
        let kept = machine.volume.close(&mut self.shared.lock());
        (kept, unsent_bytes)
    }

    /// After a volume is gone: what the device says of it is made stable, or found again. `kept` are
    /// the segments that still hold writes of it, and are held for whoever attaches it next.
    async fn settle_cache(
        &self,
        volume: VolumeId,
        tenant: &TenantName,
        kept: Vec<(SegmentId, Generation)>,
    ) -> std::io::Result<()> {
        let (device, journals) = (Arc::clone(&self.common.device), self.journals.clone());
        let wanted = kept.clone();
        let settle = move || settle(&*device, &journals, volume, &wanted);
        let settled = tokio::task::spawn_blocking(settle).await;
        match settled.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            Ok(Some(found)) => {
                self.kept.lock().insert(volume, found);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(error) if kept.is_empty() => Err(error),
            Err(error) => {
                let unsettled = Unsettled {
                    tenant: tenant.clone(),
                    segments: kept,
                };
                self.unsettled.lock().insert(volume, unsettled);
                Err(error)
            }
        }
    }
}

/// What a volume that is not served any more leaves here.
pub(super) struct Left {
    /// All of its writes are in the store.
    complete: bool,
    /// Bytes of those that are not.
    unsent_bytes: u64,
}

/// What becomes of the right to write to a volume that is not served any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum After {
    /// Whoever comes may have it, if all is sent.
    GiveBack,
    /// It stays this host's.
    Keep,
}

impl After {
    /// For one that stays this host's, or for any other.
    pub(super) const fn of(stays: bool) -> Self {
        match stays {
            true => Self::Keep,
            false => Self::GiveBack,
        }
    }
}

/// After an attach that came to nothing: with nothing of the volume here, others need not ask for it by force. One
/// that was attached before the daemon's start stays this host's: its device waits, and it is tried again.
async fn leave_to_others(store: &dyn Store, volume: &ImageRef, head: &HeadCell, leaves: bool) {
    if leaves && let Err(error) = give_back(store, head).await {
        tracing::warn!(%volume, %error, "not attached, but the store names this host as the owner");
    }
}

/// What a device was made for.
fn image_of(stamp: &Stamp) -> ImageRef {
    ImageRef {
        volume: VolumeRef {
            tenant: stamp.tenant.clone(),
            name: stamp.name.clone(),
        },
        snapshot: stamp.snapshot.clone(),
        at: stamp.at,
    }
}

/// What is full may have room again: then it is worth another try.
fn kind_of(error: &std::io::Error) -> Kind {
    match error.kind() {
        std::io::ErrorKind::StorageFull => Kind::Unavailable,
        _ => Kind::Internal,
    }
}

/// Gives a queue to the reactor of its volume.
fn add_queue(
    reactor: ReactorHandle,
    key: VolumeKey,
) -> impl FnMut(UblkQueue) -> Result<(), String> + Send + 'static {
    move |queue| {
        let front_end = Box::new(queue);
        reactor
            .send_blocking(Message::AddFrontEnd { key, front_end })
            .map_err(|e| e.to_string())
    }
}
