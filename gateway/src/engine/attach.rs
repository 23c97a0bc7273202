//! Attaching and detaching: the steps, their order, and what `show` and `/metrics` tell.

use std::sync::Arc;

use quarry_cache::Recovered;
use quarry_objfmt::WriteSeq;
use quarry_volume::{Event, Opened, Volume, VolumeParams, VolumeStats};

use super::{Attached, Daemon, Slot, VolumeMachine, not_attached, now_ms, registry};
use crate::backend::open::{Claim, OpenError, claim, give_back};
use crate::backend::{HeadError, VolumeBackend};
use crate::control::{
    ApiError, ApiResult, AttachInfo, AttachOptions, AttachedInfo, Kind, OwnerInfo, State, Via,
    VolumeInfo, VolumeRef,
};
use crate::metrics;
use crate::nbd::Export;
use crate::reactor::{Geometry, Message};
use crate::ublk::{DeviceSpec, UblkError};

impl From<OpenError> for ApiError {
    fn from(error: OpenError) -> Self {
        let kind = match &error {
            OpenError::Owned { .. } | OpenError::Stale { .. } | OpenError::Raced { .. } => {
                Kind::Conflict
            }
            OpenError::Damaged { .. } | OpenError::Cache(_) => Kind::Damaged,
            OpenError::Store(error) => return registry::store_error(error),
        };
        Self::new(kind, error.to_string(), "")
    }
}

impl From<UblkError> for ApiError {
    fn from(error: UblkError) -> Self {
        let kind = match &error {
            UblkError::Absent | UblkError::TooOld { .. } => Kind::Unsupported,
            UblkError::Denied(_) => Kind::Denied,
            UblkError::InUse { .. } | UblkError::Served { .. } | UblkError::Shape { .. } => {
                Kind::Conflict
            }
            _ => Kind::Internal,
        };
        Self::new(kind, error.to_string(), "")
    }
}

impl Daemon {
    pub(super) async fn attach_volume(
        &self,
        volume: &VolumeRef,
        options: &AttachOptions,
    ) -> ApiResult<AttachInfo> {
        if options.read_only {
            let message = "attaching for reading only is not supported yet";
            return Err(ApiError::new(
                Kind::Unsupported,
                message,
                "attach without --read-only",
            ));
        }
        let slot = self.slot(volume);
        let mut attached = slot.lock().await;
        if let Some(attached) = &*attached {
            let message = format!("{volume} is attached already");
            let place = attached.info.device.as_ref().or(attached.info.uri.as_ref());
            let remedy = place.map_or_else(String::new, |place| format!("use {place}"));
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        // Whether there is a front end is asked first: nothing is changed for want of one.
        let via = match options.via {
            Some(Via::Nbd) => Via::Nbd,
            Some(Via::Ublk) => {
                self.ublk.probe().await?;
                Via::Ublk
            }
            None => self.ublk.probe().await.map_or(Via::Nbd, |_| Via::Ublk),
        };
        *attached = Some(self.open(volume, options, via).await?);
        let info = attached.as_ref().expect("just put there").info.clone();
        drop(attached);
        self.write_list().await?;
        Ok(info)
    }

    async fn open(
        &self,
        volume: &VolumeRef,
        options: &AttachOptions,
        via: Via,
    ) -> ApiResult<Attached> {
        let id = registry::find(&self.control, volume).await?;
        let mut kept = self.kept.lock().remove(&id);
        let device = Arc::clone(&self.common.device);
        let how = Claim {
            cache: device.id(),
            host: self.host.clone(),
            now_ms: now_ms(),
            force: options.force,
            discard_unsent: options.discard_unsent,
        };
        let claimed = match claim(&self.control, &volume.tenant, id, kept.as_ref(), &how).await {
            Ok(claimed) => claimed,
            Err(error) => {
                if let Some(kept) = kept {
                    self.kept.lock().insert(id, kept);
                }
                return Err(error.into());
            }
        };
        let stored = claimed.stored_write;
        let forget = claimed.forget_kept;
        let recover = move || recover(&device, id, kept.as_mut(), stored, forget);
        let (unsent, kept_segments) = tokio::task::spawn_blocking(recover)
            .await
            .map_err(|e| ApiError::internal(e.to_string()))?
            .map_err(OpenError::Cache)?;
        let head = &claimed.info;
        let params = VolumeParams {
            id,
            size: head.size,
            sector_size: head.sector_size,
            frame_sectors: head.frame_sectors,
            epoch: head.epoch,
            durability: head.durability,
            read_only: false,
            tuning: self.tuning(),
        };
        let spec = DeviceSpec {
            volume: id,
            tenant: volume.tenant.clone(),
            name: volume.name.clone(),
            size: head.size,
            sector_size: head.sector_size,
            read_only: false,
        };
        let opened = Opened {
            root: Arc::clone(&claimed.root),
            log: claimed.log.clone(),
            next_chunk: claimed.next_chunk,
            stored_write: stored,
            unsent,
            kept_segments,
        };
        let mut actions = Vec::new();
        let machine = VolumeMachine {
            volume: Volume::new(params, opened, &mut self.shared.lock(), &mut actions),
            shared: Arc::clone(&self.shared),
            first: actions,
        };
        let reactor = self.pick_reactor();
        let key = reactor.new_key();
        let backend = VolumeBackend::new(
            self.common.clone(),
            volume.to_string(),
            claimed,
            key,
            reactor.clone(),
        );
        let gone = |e: crate::reactor::ReactorGone| ApiError::internal(e.to_string());
        let add = Message::AddVolume {
            key,
            machine: Box::new(machine),
            backend: Box::new(Arc::clone(&backend)),
        };
        reactor.send(add).await.map_err(gone)?;
        let (info, mode, device) = match via {
            Via::Ublk => {
                let host = {
                    let reactor = reactor.clone();
                    Box::new(move |queue: crate::reactor::ublk_queue::UblkQueue| {
                        let front_end = Box::new(queue);
                        reactor
                            .send_blocking(Message::AddFrontEnd { key, front_end })
                            .map_err(|e| e.to_string())
                    })
                };
                // A device that the last daemon left serves on; its requests are given to us anew.
                let left = self.ublk.find_recoverable().await?;
                let device = match left.iter().find(|found| found.is_of(id)) {
                    Some(found) => self.ublk.recover(found.id, spec.clone(), host).await?,
                    None => self.ublk.start(spec.clone(), host).await?,
                };
                let link = device.link.as_ref().map(|l| l.display().to_string());
                let info = AttachInfo::ublk(volume, device.node.display().to_string(), link);
                (
                    info,
                    format!("ublk, {}", device.mode),
                    Some((device.id, spec)),
                )
            }
            Via::Nbd => {
                let geometry = Geometry {
                    size: spec.size,
                    sector_size: spec.sector_size,
                    read_only: false,
                };
                let export = Export {
                    reactor,
                    volume: key,
                    geometry,
                };
                self.exports.0.lock().insert(volume.to_string(), export);
                (
                    AttachInfo::nbd(volume, &self.config.nbd_socket()),
                    "nbd".to_owned(),
                    None,
                )
            }
        };
        Ok(Attached {
            backend,
            info,
            mode,
            since_ms: now_ms(),
            device,
        })
    }

    pub(super) async fn detach_volume(&self, volume: &VolumeRef) -> ApiResult<()> {
        let slot = self.slot(volume);
        let mut attached = slot.lock().await;
        let there = attached.as_ref().ok_or_else(|| not_attached(volume))?;
        let (reactor, key) = there.backend.place();
        let gone = |e: crate::reactor::ReactorGone| ApiError::internal(e.to_string());
        // The device goes first: what its users wrote is then all acknowledged.
        if let Some((id, spec)) = &there.device {
            self.ublk.remove(*id, spec.clone(), false).await?;
        }
        self.exports.0.lock().remove(&volume.to_string());
        reactor.stop_front_ends(key).await.map_err(gone)?;
        there.backend.tell(Event::Stop).await;
        let complete = there.backend.drain(true).await;
        let fenced = there.backend.condition().fenced;
        if complete {
            match give_back(&self.control, there.backend.head()).await {
                Ok(()) | Err(HeadError::Fenced { .. }) => {}
                Err(error) => {
                    tracing::warn!(%volume, %error, "detached, but the store still names this host as the owner")
                }
            }
        }
        reactor.remove_volume(key).await.map_err(gone)?;
        *attached = None;
        drop(attached);
        self.write_list().await?;
        if complete || fenced {
            return Ok(());
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

    /// The list of what is attached, replaced in one step.
    async fn write_list(&self) -> ApiResult<()> {
        let slots: Vec<(VolumeRef, Slot)> = self
            .slots
            .lock()
            .iter()
            .map(|(v, s)| (v.clone(), Arc::clone(s)))
            .collect();
        let mut list = Vec::new();
        for (volume, slot) in slots {
            if let Some(attached) = &*slot.lock().await {
                list.push((volume.to_string(), attached.info.via));
            }
        }
        let path = self.list_path();
        let write = || -> std::io::Result<()> {
            let new = path.with_extension("new");
            let file = std::fs::File::create(&new)?;
            serde_json::to_writer(&file, &list)?;
            file.sync_all()?;
            std::fs::rename(&new, &path)?;
            std::fs::File::open(&self.config.daemon.data_dir)?.sync_all()
        };
        write().map_err(|e| ApiError::internal(format!("cannot write {}: {e}", path.display())))
    }

    async fn stats(&self, attached: &Attached) -> VolumeStats {
        let (reactor, key) = attached.backend.place();
        let stats = reactor
            .inspect(key, |m: &VolumeMachine| m.volume.stats())
            .await;
        stats.ok().flatten().unwrap_or_default()
    }

    pub(super) async fn show(&self, volume: &VolumeRef) -> ApiResult<VolumeInfo> {
        let slot = self.slot(volume);
        let attached = slot.lock().await;
        let head = match &*attached {
            Some(attached) => attached.backend.head().get().await,
            None => registry::head(&self.control, volume).await?,
        };
        let mut info = VolumeInfo {
            tenant: volume.tenant.to_string(),
            name: volume.name.to_string(),
            id: head.volume.to_string(),
            created_ms: head.created_ms,
            size_bytes: head.size.bytes(),
            sector_size: head.sector_size,
            durability: head.durability,
            compression: head.compression,
            stored_bytes: head.stored_bytes,
            state: if head.owner.is_some() {
                State::AttachedElsewhere
            } else {
                State::Detached
            },
            owner: head.owner.as_ref().map(|o| OwnerInfo {
                host: o.host.clone(),
                cache: o.cache.to_string(),
                since_ms: o.since_ms,
            }),
            ..VolumeInfo::default()
        };
        let Some(attached) = &*attached else {
            return Ok(info);
        };
        let stats = self.stats(attached).await;
        let condition = attached.backend.condition();
        info.state = match (condition.fenced, condition.failed) {
            (true, _) => State::Fenced,
            (_, true) => State::Failed,
            _ => State::Attached,
        };
        info.attached = Some(AttachedInfo {
            via: attached.info.via,
            device: attached.info.device.clone(),
            link: attached.info.link.clone(),
            uri: attached.info.uri.clone(),
            mode: attached.mode.clone(),
            epoch: attached.backend.head().epoch().get(),
            since_ms: attached.since_ms,
            read_only: false,
        });
        let read = stats.hit_bytes + stats.miss_bytes;
        info.dirty_bytes = stats.dirty_bytes;
        info.rpo_ms = stats.rpo_ms;
        info.stored_bytes = attached.backend.stored().0;
        (info.reads, info.read_bytes) = (stats.reads, stats.read_bytes);
        (info.writes, info.write_bytes) = (stats.writes, stats.write_bytes);
        (info.flushes, info.discards) = (stats.flushes, stats.discards);
        (info.hit_bytes, info.miss_bytes) = (stats.hit_bytes, stats.miss_bytes);
        #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
        let ratio = (read > 0).then(|| stats.hit_bytes as f64 / read as f64);
        info.hit_ratio = ratio;
        info.uploaded_bytes = stats.uploaded_bytes;
        info.stalled = stats.stalled;
        info.problem = condition.problem;
        Ok(info)
    }

    pub(super) async fn snapshot(&self) -> metrics::Snapshot {
        let slots: Vec<(VolumeRef, Slot)> = self
            .slots
            .lock()
            .iter()
            .map(|(v, s)| (v.clone(), Arc::clone(s)))
            .collect();
        let mut volumes = Vec::new();
        for (volume, slot) in slots {
            // A volume that is being attached or detached is left out rather than waited for.
            let Ok(attached) = slot.try_lock() else {
                continue;
            };
            let Some(attached) = &*attached else { continue };
            let s = self.stats(attached).await;
            let of = metrics::VolumeStats {
                size_bytes: attached.backend.head().get().await.size.bytes(),
                reads: s.reads,
                read_bytes: s.read_bytes,
                writes: s.writes,
                write_bytes: s.write_bytes,
                flushes: s.flushes,
                discards: s.discards,
                errors: s.errors,
                hit_bytes: s.hit_bytes,
                miss_bytes: s.miss_bytes,
                copied_bytes: s.copied_bytes,
                zero_fill_bytes: s.zero_bytes,
                dirty_bytes: s.dirty_bytes,
                rpo_ms: s.rpo_ms,
                cached_bytes: 0,
                uploaded_bytes: s.uploaded_bytes,
                uploaded_chunks: s.uploaded_chunks,
                checkpoints: s.checkpoints,
                map_bytes: attached.backend.stored().1,
                fetched_bytes: s.fetched_bytes,
                fetches: s.fetches,
                stalled: u64::from(s.stalled),
                failed: u64::from(attached.backend.condition().problem.is_some()),
            };
            volumes.push((volume.tenant.to_string(), volume.name.to_string(), of));
        }
        let shared = self.shared.lock();
        let counts = shared.cache.counts();
        let nodes = shared.nodes.stats();
        let bytes = |segments: u32| u64::from(segments) * u64::from(counts.segment_size);
        let store = self.lane.stats().snapshot();
        metrics::Snapshot {
            volumes,
            cache: metrics::CacheStats {
                size_bytes: bytes(counts.total),
                dirty_bytes: bytes(counts.dirty),
                dirty_max_bytes: bytes(counts.dirty_max),
                clean_bytes: bytes(counts.clean),
                segments_free: u64::from(counts.free),
                segments_used: u64::from(counts.total - counts.free),
                reclaims: counts.reclaimed,
                node_bytes: nodes.bytes as u64,
                node_hits: nodes.hits,
                node_misses: nodes.misses,
            },
            store: metrics::StoreStats {
                read_bytes: store.bytes_read,
                write_bytes: store.bytes_written,
                retries: store.retries,
                in_flight: store.in_flight,
                waiting: store.waiting,
                ..metrics::StoreStats::default()
            },
        }
    }
}

type Kept = (
    Vec<(quarry_objfmt::SegmentId, quarry_objfmt::page::Record)>,
    Vec<quarry_objfmt::SegmentId>,
);

/// What of the kept segments is still unsent; the rest is given up, here and on the device.
fn recover(
    device: &quarry_cache::CacheDevice,
    volume: quarry_objfmt::VolumeId,
    kept: Option<&mut Recovered>,
    stored: WriteSeq,
    forget: bool,
) -> std::io::Result<Kept> {
    let Some(kept) = kept else {
        return Ok((Vec::new(), Vec::new()));
    };
    let segments = kept.segments.iter().map(|s| s.segment).collect();
    if forget {
        Recovered::forget(device, volume, &kept.segments)?;
        return Ok((Vec::new(), segments));
    }
    let cut = kept.cut(device, volume, stored)?;
    if cut > 0 {
        tracing::warn!(%volume, cut, "writes behind a gap in the records were given up: no flush had covered them");
    }
    Ok((kept.unsent(stored), segments))
}
