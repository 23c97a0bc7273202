//! An engine of plain memory, for the tests of the API and of the command line.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use quarry_objfmt::record::{TENANT_KIND, TenantRecord, encode_record};
use tokio::sync::oneshot;

use super::*;
use crate::store::{FolderStore, Store as _};

/// Keeps what it is told, and does nothing.
#[derive(Default)]
pub(crate) struct FakeEngine {
    tenants: Mutex<Vec<TenantName>>,
    volumes: Mutex<BTreeMap<VolumeRef, VolumeInfo>>,
    snapshots: Mutex<Vec<SnapshotInfo>>,
    trash: Mutex<BTreeMap<VolumeRef, VolumeInfo>>,
    /// How long an attach takes.
    attach_time: Duration,
    /// Told when a check ends, whichever way.
    pub verify_ended: Arc<tokio::sync::Notify>,
    /// Why it is not ready, if so.
    pub not_ready: Mutex<Option<String>>,
}

impl FakeEngine {
    /// One whose attaches take that long.
    pub fn slow(attach_time: Duration) -> Self {
        Self {
            attach_time,
            ..Self::default()
        }
    }

    fn check_free(&self, volume: &VolumeRef) -> ApiResult<()> {
        if !self.volumes.lock().contains_key(volume) {
            return Ok(());
        }
        let message = format!("there is a volume {volume} already");
        Err(ApiError::new(Kind::Exists, message, "choose another name"))
    }

    fn change(&self, volume: &VolumeRef, change: impl FnOnce(&mut VolumeInfo)) -> ApiResult<()> {
        let mut volumes = self.volumes.lock();
        let found = volumes.get_mut(volume);
        found.map(change).ok_or_else(|| ApiError::no_volume(volume))
    }
}

#[async_trait]
impl Engine for FakeEngine {
    async fn create_tenant(&self, spec: TenantSpec) -> ApiResult<TenantInfo> {
        let TenantSpec {
            name: tenant,
            settings,
        } = spec;
        let mut tenants = self.tenants.lock();
        if tenants.contains(&tenant) {
            return Err(ApiError::new(
                Kind::Exists,
                format!("tenant {tenant} exists already"),
                "choose another name",
            ));
        }
        tenants.push(tenant.clone());
        Ok(TenantInfo {
            name: tenant.to_string(),
            created_ms: 1,
            settings,
            ..TenantInfo::default()
        })
    }

    async fn show_tenant(&self, tenant: &TenantName) -> ApiResult<TenantInfo> {
        let tenants = self.tenants.lock();
        let found = tenants.iter().find(|t| *t == tenant);
        let name = found
            .ok_or_else(|| ApiError::no_tenant(tenant))?
            .to_string();
        Ok(TenantInfo {
            name,
            created_ms: 1,
            ..TenantInfo::default()
        })
    }

    async fn update_tenant(
        &self,
        tenant: &TenantName,
        patch: &serde_json::Map<String, serde_json::Value>,
    ) -> ApiResult<TenantInfo> {
        let mut info = self.show_tenant(tenant).await?;
        info.settings = patched(&info.settings, patch)?;
        Ok(info)
    }

    async fn suspend_tenant(
        &self,
        tenant: &TenantName,
        how: Option<Suspended>,
    ) -> ApiResult<TenantInfo> {
        let mut info = self.show_tenant(tenant).await?;
        info.settings.suspended = how;
        Ok(info)
    }

    async fn list_tenants(&self) -> ApiResult<Vec<TenantInfo>> {
        let tenants = self.tenants.lock();
        Ok(tenants
            .iter()
            .map(|name| TenantInfo {
                name: name.to_string(),
                created_ms: 1,
                ..TenantInfo::default()
            })
            .collect())
    }

    async fn delete_tenant(&self, tenant: &TenantName, purge: bool) -> ApiResult<()> {
        let mut trash = self.trash.lock();
        if !trash.is_empty() && !purge {
            let remedy = "purge it with --purge";
            return Err(ApiError::new(Kind::Conflict, "there is trash", remedy));
        }
        trash.clear();
        let mut tenants = self.tenants.lock();
        let at = tenants
            .iter()
            .position(|t| t == tenant)
            .ok_or_else(|| ApiError::no_tenant(tenant))?;
        tenants.remove(at);
        Ok(())
    }

    async fn create_volume(&self, spec: VolumeSpec) -> ApiResult<VolumeInfo> {
        if !self.tenants.lock().contains(&spec.tenant) {
            return Err(ApiError::no_tenant(&spec.tenant));
        }
        self.check_free(&spec.volume())?;
        let info = VolumeInfo {
            tenant: spec.tenant.to_string(),
            name: spec.name.to_string(),
            id: format!("f7a4f3a0-0000-4000-8000-{:012}", self.volumes.lock().len()),
            size_bytes: spec.size_bytes,
            sector_size: spec.sector_size,
            durability: spec.durability,
            compression: spec.compression,
            retain_ms: spec.retain_ms,
            rates: spec.rates,
            key: spec.key.as_ref().map(ToString::to_string),
            ..VolumeInfo::default()
        };
        self.volumes.lock().insert(spec.volume(), info.clone());
        Ok(info)
    }

    async fn list_volumes(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<VolumeInfo>> {
        let volumes = self.volumes.lock();
        Ok(volumes
            .values()
            .filter(|v| is_of(v, tenant))
            .cloned()
            .collect())
    }

    async fn show_volume(&self, image: &ImageRef) -> ApiResult<VolumeInfo> {
        let volume = &image.volume;
        let volumes = self.volumes.lock();
        let found = volumes.get(volume).cloned();
        found.ok_or_else(|| ApiError::no_volume(volume))
    }

    async fn attach(&self, image: &ImageRef, options: AttachOptions) -> ApiResult<AttachInfo> {
        let volume = &image.volume;
        assert_ne!(volume.name.as_str(), "panic", "asked to");
        tokio::time::sleep(self.attach_time).await;
        let info = AttachInfo::nbd(image, std::path::Path::new("/run/nbd.sock"));
        self.change(volume, |volume| {
            volume.state = State::Attached;
            volume.attached = Some(AttachedInfo {
                via: options.via.unwrap_or(Via::Nbd),
                uri: info.uri.clone(),
                mode: "user memory".to_owned(),
                size_bytes: volume.size_bytes,
                epoch: 3,
                read_only: options.read_only,
                device_owner: options.device_owner.map(String::from),
                device_mode: options.device_mode.map(String::from),
                ..AttachedInfo::default()
            });
            volume.dirty_bytes = 5 << 20;
            volume.rpo_ms = 1500;
            volume.hit_ratio = Some(0.75);
        })?;
        Ok(info)
    }

    async fn detach(&self, image: &ImageRef) -> ApiResult<DetachInfo> {
        self.change(&image.volume, |volume| {
            volume.state = State::Detached;
            volume.attached = None;
        })?;
        Ok(DetachInfo::new(image, None))
    }

    async fn resize(&self, volume: &VolumeRef, spec: ResizeSpec) -> ApiResult<ResizeInfo> {
        let (size_bytes, mut note) = (spec.size_bytes, None);
        self.change(volume, |volume| {
            volume.size_bytes = size_bytes;
            if volume.attached.is_some() {
                note = Some("its device shows the old size".to_owned());
            }
        })?;
        Ok(ResizeInfo {
            volume: volume.to_string(),
            size_bytes,
            note,
        })
    }

    async fn retain(&self, volume: &VolumeRef, retain_ms: u64) -> ApiResult<RetainInfo> {
        self.change(volume, |volume| volume.retain_ms = retain_ms)?;
        Ok(RetainInfo {
            volume: volume.to_string(),
            retain_ms,
        })
    }

    async fn set_rates(&self, volume: &VolumeRef, rates: RatesSpec) -> ApiResult<RatesInfo> {
        self.change(volume, |volume| volume.rates = rates)?;
        Ok(RatesInfo {
            volume: volume.to_string(),
            rates,
        })
    }

    async fn release(&self, volume: &VolumeRef, _: ReleaseSpec) -> ApiResult<ReleaseInfo> {
        self.change(volume, |volume| volume.owner = None)?;
        Ok(ReleaseInfo {
            volume: volume.to_string(),
            released: true,
        })
    }

    async fn rekey(&self, volume: &VolumeRef, spec: &RekeySpec) -> ApiResult<RekeyInfo> {
        let key = spec.key.clone();
        let key = key.ok_or_else(|| ApiError::invalid("the tenant has no key", "name one"))?;
        self.change(volume, |volume| volume.key = Some(key.to_string()))?;
        Ok(RekeyInfo {
            volume: volume.to_string(),
            key: key.to_string(),
            keys: 1,
            ..RekeyInfo::default()
        })
    }

    async fn sync(&self, volume: &VolumeRef) -> ApiResult<()> {
        self.change(volume, |volume| volume.dirty_bytes = 0)
    }

    async fn rescue(&self, volume: &VolumeRef, spec: RescueSpec) -> ApiResult<RescueReport> {
        self.show_volume(&volume.clone().into()).await?;
        let flags = [
            (spec.id.is_none(), "--id"),
            (spec.size_bytes.is_none(), "--size"),
            (spec.sector_size.is_none(), "--sector-size"),
            (spec.durability.is_none(), "--durability"),
            (spec.compression.is_none(), "--compression"),
        ];
        let missing = flags.iter().filter(|(missing, _)| *missing);
        Ok(RescueReport {
            volume: volume.to_string(),
            lost: "it is missing".to_owned(),
            epoch: 300,
            log: vec![LogRangeInfo {
                epoch: 2,
                first: 5,
                end: 9,
            }],
            log_ends: "there is no chunk 9".to_owned(),
            left_behind: 1,
            needs: missing.map(|(_, flag)| (*flag).to_owned()).collect(),
            applied: spec.apply,
            ..RescueReport::default()
        })
    }

    async fn verify(&self, image: &ImageRef, spec: VerifySpec) -> ApiResult<VerifyReport> {
        let (volume, deep) = (&image.volume, spec.deep);
        struct Ended(Arc<tokio::sync::Notify>);
        impl Drop for Ended {
            fn drop(&mut self) {
                self.0.notify_one();
            }
        }
        self.show_volume(image).await?;
        let _ended = Ended(Arc::clone(&self.verify_ended));
        if volume.name.as_str() == "slow" {
            std::future::pending::<()>().await;
        }
        let mut report = VerifyReport {
            volume: volume.to_string(),
            deep,
            epoch: Some(3),
            ..VerifyReport::default()
        };
        if volume.name.as_str() == "bad" {
            let ranges = vec![ByteRange {
                start: 65_536,
                end: 131_072,
            }];
            report.unreadable = ranges.clone();
            report.unreadable_bytes = 65_536;
            report.findings = vec![Finding {
                object: "t/acme/v/x/chunk/1/2".to_owned(),
                problem: "it is missing".to_owned(),
                ranges,
                ranges_left_out: 0,
            }];
        }
        Ok(report)
    }

    async fn verify_progress(&self, image: &ImageRef) -> ApiResult<VerifyProgress> {
        self.show_volume(image).await?;
        Ok(VerifyProgress::default())
    }

    async fn create_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        let volume = self.show_volume(&snapshot.volume.clone().into()).await?;
        let made = SnapshotInfo {
            volume: volume.image(),
            name: snapshot.name.to_string(),
            created_ms: 1,
            size_bytes: volume.size_bytes,
            newest_write: 7,
            ..SnapshotInfo::default()
        };
        if self.show_snapshot(snapshot).await.is_ok() {
            let message = format!("there is a snapshot {snapshot} already");
            return Err(ApiError::new(Kind::Exists, message, "choose another name"));
        }
        self.snapshots.lock().push(made.clone());
        Ok(made)
    }

    async fn list_snapshots(&self, volume: Option<&VolumeRef>) -> ApiResult<Vec<SnapshotInfo>> {
        let all = self.snapshots.lock().clone();
        let is = |s: &SnapshotInfo| volume.is_none_or(|v| v.to_string() == s.volume);
        Ok(all.into_iter().filter(is).collect())
    }

    async fn show_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        let all = self.list_snapshots(Some(&snapshot.volume)).await?;
        let mut found = all.into_iter().filter(|s| s.name == snapshot.name.as_str());
        let found = found.next().ok_or_else(|| {
            let message = format!("there is no snapshot {snapshot}");
            ApiError::new(Kind::NotFound, message, "choose another")
        })?;
        let volumes = self.volumes.lock();
        let of = |v: &&VolumeInfo| v.parent.as_ref().is_some_and(|p| p.snapshot == found.name);
        Ok(SnapshotInfo {
            clones: Some(volumes.values().filter(of).map(VolumeInfo::image).collect()),
            ..found
        })
    }

    async fn delete_snapshot(&self, snapshot: &SnapRef) -> ApiResult<()> {
        let found = self.show_snapshot(snapshot).await?;
        if let Some(clone) = found.clones.unwrap_or_default().first() {
            let message = format!("{snapshot} has clones: {clone}");
            let remedy = "delete the clones first";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let mut all = self.snapshots.lock();
        all.retain(|s| (&s.volume, &s.name) != (&found.volume, &found.name));
        Ok(())
    }

    async fn clone_snapshot(&self, snapshot: &SnapRef, name: &VolumeName) -> ApiResult<VolumeInfo> {
        let found = self.show_snapshot(snapshot).await?;
        let parent = self.show_volume(&snapshot.volume.clone().into()).await?;
        let made = VolumeInfo {
            name: name.to_string(),
            parent: Some(ParentInfo {
                volume: found.volume,
                snapshot: found.name,
            }),
            attached: None,
            state: State::Detached,
            ..parent
        };
        let volume = VolumeRef {
            tenant: snapshot.volume.tenant.clone(),
            name: name.clone(),
        };
        self.check_free(&volume)?;
        self.volumes.lock().insert(volume, made.clone());
        Ok(made)
    }

    async fn rollback(&self, snapshot: &SnapRef) -> ApiResult<VolumeInfo> {
        self.show_snapshot(snapshot).await?;
        self.show_volume(&snapshot.volume.clone().into()).await
    }

    async fn delete_volume(&self, volume: &VolumeRef, _: bool) -> ApiResult<TrashInfo> {
        if self
            .show_volume(&volume.clone().into())
            .await?
            .attached
            .is_some()
        {
            let remedy = format!("detach it first with `quarry volume detach {volume}`");
            return Err(ApiError::new(
                Kind::Conflict,
                format!("{volume} is attached"),
                remedy,
            ));
        }
        let removed = self.volumes.lock().remove(volume);
        let removed = removed.ok_or_else(|| ApiError::no_volume(volume))?;
        let info = trash_info(&removed);
        self.trash.lock().insert(volume.clone(), removed);
        Ok(info)
    }

    async fn warm(&self, volume: &VolumeRef, spec: &WarmSpec) -> ApiResult<WarmReport> {
        let size = self.show_volume(&volume.clone().into()).await?.size_bytes;
        let looked_bytes = spec.end.unwrap_or(size) - spec.start;
        Ok(WarmReport {
            looked_bytes,
            total_bytes: looked_bytes,
            fetched_bytes: spec.limit_bytes.unwrap_or(looked_bytes),
            limited: spec.limit_bytes.is_some(),
            ..WarmReport::default()
        })
    }

    async fn warm_progress(&self, volume: &VolumeRef) -> ApiResult<WarmReport> {
        Err(ApiError::no_volume(volume))
    }

    async fn compact(&self, volume: &VolumeRef, _: &CompactSpec) -> ApiResult<MoveReport> {
        let moved_bytes = self.show_volume(&volume.clone().into()).await?.size_bytes;
        Ok(MoveReport {
            moved_bytes,
            total_bytes: moved_bytes,
            passes: 1,
        })
    }

    async fn flatten(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        self.compact(volume, &CompactSpec::default()).await
    }

    async fn move_progress(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        Err(ApiError::no_volume(volume))
    }

    async fn evict(&self, volume: &VolumeRef) -> ApiResult<EvictInfo> {
        self.show_volume(&volume.clone().into()).await?;
        Ok(EvictInfo {
            volume: volume.to_string(),
            cache_bytes: 1 << 20,
            ram_bytes: 4096,
        })
    }

    async fn list_trash(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<TrashInfo>> {
        let trash = self.trash.lock();
        let of = trash.values().filter(|v| is_of(v, tenant));
        Ok(of.map(trash_info).collect())
    }

    async fn restore(&self, which: &TrashRef, name: Option<&VolumeName>) -> ApiResult<VolumeInfo> {
        let mut trash = self.trash.lock();
        let is = |(named, info): &(&VolumeRef, &VolumeInfo)| match which {
            TrashRef::Name(volume) => volume == *named,
            TrashRef::Id(id) => id.to_string() == info.id,
            TrashRef::Of(tenant, id) => id.to_string() == info.id && *tenant == named.tenant,
        };
        let found = trash.iter().find(is).map(|(volume, _)| volume.clone());
        let mut volume = found.ok_or_else(|| match which {
            TrashRef::Name(volume) => ApiError::no_volume(volume),
            TrashRef::Id(id) | TrashRef::Of(_, id) => ApiError::not_in_trash(id),
        })?;
        let mut info = trash.remove(&volume).expect("it was just found");
        if let Some(name) = name {
            volume.name = name.clone();
            info.name = name.to_string();
        }
        self.volumes.lock().insert(volume, info.clone());
        Ok(info)
    }

    async fn purge_trash(&self, spec: &PurgeSpec) -> ApiResult<PurgeReport> {
        let tenant = spec.tenant.as_ref();
        let all = self.list_trash(tenant).await?;
        if !spec.all {
            let problem = Some("it has clones".to_owned());
            let kept = all.into_iter().map(|info| TrashInfo {
                problem: problem.clone(),
                ..info
            });
            let kept = kept.collect();
            return Ok(PurgeReport {
                kept,
                ..PurgeReport::default()
            });
        }
        self.trash.lock().retain(|_, v| !is_of(v, tenant));
        let objects = 3 * all.len() as u64;
        Ok(PurgeReport {
            purged: all,
            objects,
            ..PurgeReport::default()
        })
    }

    async fn doctor(&self) -> ApiResult<DoctorReport> {
        Ok(DoctorReport {
            checks: vec![Check::ok("all", "is well")],
        })
    }

    async fn status(&self) -> ApiResult<StatusInfo> {
        let not_ready = self.not_ready.lock().clone();
        Ok(StatusInfo {
            version: "0.1.0".to_owned(),
            host: "here".to_owned(),
            ready: not_ready.is_none(),
            not_ready,
            store: StoreStatus {
                url: "file:///store".to_owned(),
                healthy: true,
                ..StoreStatus::default()
            },
            ..StatusInfo::default()
        })
    }

    async fn activity(&self, tenant: Option<&TenantName>) -> ApiResult<Activity> {
        let volumes = self.list_volumes(tenant).await?.into_iter();
        let volumes = volumes.map(|v| VolumeActivity {
            volume: v.image(),
            ..VolumeActivity::default()
        });
        let daemon = match tenant {
            None => Some(self.status().await?),
            Some(_) => None,
        };
        Ok(Activity {
            daemon,
            volumes: volumes.collect(),
            ..Activity::default()
        })
    }

    async fn ready(&self) -> Result<(), String> {
        self.not_ready.lock().clone().map_or(Ok(()), Err)
    }

    async fn metrics_text(&self) -> String {
        "quarry_build_info 1\n".to_owned()
    }
}

fn is_of(volume: &VolumeInfo, tenant: Option<&TenantName>) -> bool {
    tenant.is_none_or(|tenant| tenant.as_str() == volume.tenant)
}

fn trash_info(volume: &VolumeInfo) -> TrashInfo {
    TrashInfo {
        tenant: volume.tenant.clone(),
        name: volume.name.clone(),
        id: volume.id.clone(),
        deleted_ms: 1000,
        purge_ms: 2000,
        ..TrashInfo::default()
    }
}

/// What the daemon makes of a configuration that says nothing, with tokens and log in `dir`.
pub(crate) fn access_in(dir: &std::path::Path) -> Access {
    let store = FolderStore::open(&dir.join("store"), true).unwrap();
    let config = quarry_config::Access::default();
    Access::new(&config, Arc::new(store), dir).unwrap()
}

/// A control plane over `engine` in a directory of its own.
pub(crate) struct FakeDaemon {
    pub dir: tempfile::TempDir,
    pub address: std::net::SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl FakeDaemon {
    pub async fn start(engine: Arc<dyn Engine>) -> Self {
        Self::start_on(engine, None).await
    }

    /// One that listens on the network too.
    pub async fn start_on(engine: Arc<dyn Engine>, network: Option<Network>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listen = "127.0.0.1:0".parse().unwrap();
        let listeners = Listeners::bind(&dir.path().join("q.sock"), Some(listen))
            .await
            .unwrap();
        let listeners = listeners.with_network(network);
        let address = listeners.health_address().unwrap();
        let (stop, stopped) = oneshot::channel();
        let access = Arc::new(access_in(dir.path()));
        let server = tokio::spawn(serve(engine, access, listeners, async {
            let _ = stopped.await;
        }));
        Self {
            dir,
            address,
            stop: Some(stop),
            server,
        }
    }

    /// Puts the record of a tenant of the engine's where its tokens are held to it.
    pub async fn keep_tenant(&self, name: &TenantName) {
        let record = TenantRecord {
            name: name.to_string(),
            created_ms: 1,
            ..TenantRecord::default()
        };
        let bytes = encode_record(TENANT_KIND, &record).unwrap();
        let store = FolderStore::open(&self.dir.path().join("store"), true).unwrap();
        let key = quarry_objfmt::keys::tenant_key(name);
        store.create(&key, bytes.into()).await.unwrap();
    }

    pub fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("q.sock")
    }

    pub fn client(&self) -> Client {
        Client::new(self.socket()).unwrap()
    }

    pub async fn stop(mut self) {
        drop(self.stop.take());
        self.server.await.unwrap().unwrap();
    }
}
