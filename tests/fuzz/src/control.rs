//! What a client of the control API sends.

use std::cell::OnceCell;
use std::sync::Arc;

use async_trait::async_trait;
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, Uri, header};
use quarry_gateway::backend::RETAIN_MS_MAX;
use quarry_gateway::control::dto::{SECTOR_SIZES, VOLUME_BYTES_MAX};
use quarry_gateway::control::{
    Activity, ApiError, ApiResult, AttachInfo, AttachOptions, CompactSpec, DetachInfo,
    DoctorReport, Engine, EvictInfo, ImageRef, MoveReport, Problem, PurgeReport, PurgeSpec,
    RatesInfo, RatesSpec, RekeyInfo, RekeySpec, ReleaseInfo, ReleaseSpec, RescueReport, RescueSpec,
    ResizeInfo, ResizeSpec, RetainInfo, SnapRef, SnapshotInfo, StatusInfo, TenantInfo, TenantSpec,
    TrashInfo, TrashRef, VerifyProgress, VerifyReport, VerifySpec, Via, VolumeInfo, VolumeRef,
    VolumeSpec, WarmReport, WarmSpec, patched, routes,
};
use quarry_objfmt::{Suspended, TenantName, VolumeName};
use tokio::runtime::Runtime;
use tower::ServiceExt as _;

/// Longer than any answer of [`Strict`].
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// An engine that has no volumes, and holds every call to what engines are promised.
struct Strict;

#[async_trait]
impl Engine for Strict {
    async fn create_tenant(&self, spec: TenantSpec) -> ApiResult<TenantInfo> {
        let TenantSpec {
            name: tenant,
            settings,
        } = spec;
        Ok(TenantInfo {
            name: tenant.to_string(),
            created_ms: 1,
            settings,
            ..TenantInfo::default()
        })
    }

    async fn show_tenant(&self, tenant: &TenantName) -> ApiResult<TenantInfo> {
        Err(ApiError::no_tenant(tenant))
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
        Ok(Vec::new())
    }

    async fn delete_tenant(&self, tenant: &TenantName, _purge: bool) -> ApiResult<()> {
        Err(ApiError::no_tenant(tenant))
    }

    async fn create_volume(&self, spec: VolumeSpec) -> ApiResult<VolumeInfo> {
        assert!(SECTOR_SIZES.contains(&spec.sector_size));
        assert!((1..=VOLUME_BYTES_MAX).contains(&spec.size_bytes));
        assert!(spec.size_bytes.is_multiple_of(spec.sector_size.into()));
        assert!(spec.retain_ms <= RETAIN_MS_MAX);
        let text = serde_json::to_vec(&spec).expect("JSON");
        assert_eq!(serde_json::from_slice::<VolumeSpec>(&text).ok(), Some(spec));
        Ok(VolumeInfo::default())
    }

    async fn list_volumes(&self, _tenant: Option<&TenantName>) -> ApiResult<Vec<VolumeInfo>> {
        Ok(Vec::new())
    }

    async fn show_volume(&self, image: &ImageRef) -> ApiResult<VolumeInfo> {
        Err(ApiError::no_volume(&image.volume))
    }

    async fn attach(&self, image: &ImageRef, options: AttachOptions) -> ApiResult<AttachInfo> {
        assert!(options.via != Some(Via::Nbd) || !options.wants_a_device());
        assert!(options.queues.is_none_or(|queues| queues > 0));
        let text = serde_json::to_vec(&options).expect("JSON");
        assert_eq!(
            serde_json::from_slice::<AttachOptions>(&text).ok(),
            Some(options)
        );
        Err(ApiError::no_volume(&image.volume))
    }

    async fn detach(&self, image: &ImageRef) -> ApiResult<DetachInfo> {
        Err(ApiError::no_volume(&image.volume))
    }

    async fn resize(&self, volume: &VolumeRef, spec: ResizeSpec) -> ApiResult<ResizeInfo> {
        let size_bytes = spec.size_bytes;
        assert!((1..=VOLUME_BYTES_MAX).contains(&size_bytes));
        assert!(size_bytes.is_multiple_of(u64::from(quarry_objfmt::SECTOR_SIZE)));
        Err(ApiError::no_volume(volume))
    }

    async fn set_rates(&self, volume: &VolumeRef, rates: RatesSpec) -> ApiResult<RatesInfo> {
        assert_ne!(rates.iops, Some(0));
        assert_ne!(rates.bandwidth_bytes, Some(0));
        Err(ApiError::no_volume(volume))
    }

    async fn retain(&self, volume: &VolumeRef, retain_ms: u64) -> ApiResult<RetainInfo> {
        assert!(retain_ms <= RETAIN_MS_MAX);
        Err(ApiError::no_volume(volume))
    }

    async fn rekey(&self, volume: &VolumeRef, _spec: &RekeySpec) -> ApiResult<RekeyInfo> {
        Err(ApiError::no_volume(volume))
    }

    async fn release(&self, volume: &VolumeRef, _: ReleaseSpec) -> ApiResult<ReleaseInfo> {
        Err(ApiError::no_volume(volume))
    }

    async fn sync(&self, volume: &VolumeRef) -> ApiResult<()> {
        Err(ApiError::no_volume(volume))
    }

    async fn verify(&self, image: &ImageRef, _spec: VerifySpec) -> ApiResult<VerifyReport> {
        Err(ApiError::no_volume(&image.volume))
    }

    async fn verify_progress(&self, image: &ImageRef) -> ApiResult<VerifyProgress> {
        Err(ApiError::no_volume(&image.volume))
    }

    async fn create_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        Err(ApiError::no_volume(&snapshot.volume))
    }

    async fn list_snapshots(&self, _volume: Option<&VolumeRef>) -> ApiResult<Vec<SnapshotInfo>> {
        Ok(Vec::new())
    }

    async fn show_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        Err(ApiError::no_volume(&snapshot.volume))
    }

    async fn delete_snapshot(&self, snapshot: &SnapRef) -> ApiResult<()> {
        Err(ApiError::no_volume(&snapshot.volume))
    }

    async fn clone_snapshot(
        &self,
        snapshot: &SnapRef,
        _name: &VolumeName,
    ) -> ApiResult<VolumeInfo> {
        Err(ApiError::no_volume(&snapshot.volume))
    }

    async fn rollback(&self, snapshot: &SnapRef) -> ApiResult<VolumeInfo> {
        Err(ApiError::no_volume(&snapshot.volume))
    }

    async fn rescue(&self, volume: &VolumeRef, spec: RescueSpec) -> ApiResult<RescueReport> {
        let text = serde_json::to_vec(&spec).expect("JSON");
        assert_eq!(serde_json::from_slice::<RescueSpec>(&text).ok(), Some(spec));
        Err(ApiError::no_volume(volume))
    }

    async fn delete_volume(&self, volume: &VolumeRef, _: bool) -> ApiResult<TrashInfo> {
        Err(ApiError::no_volume(volume))
    }

    async fn warm(&self, volume: &VolumeRef, spec: &WarmSpec) -> ApiResult<WarmReport> {
        let text = serde_json::to_vec(spec).expect("JSON");
        assert_eq!(serde_json::from_slice::<WarmSpec>(&text).ok(), Some(*spec));
        Err(ApiError::no_volume(volume))
    }

    async fn warm_progress(&self, volume: &VolumeRef) -> ApiResult<WarmReport> {
        Err(ApiError::no_volume(volume))
    }

    async fn compact(&self, volume: &VolumeRef, spec: &CompactSpec) -> ApiResult<MoveReport> {
        let text = serde_json::to_vec(spec).expect("JSON");
        assert_eq!(
            serde_json::from_slice::<CompactSpec>(&text).ok(),
            Some(*spec)
        );
        Err(ApiError::no_volume(volume))
    }

    async fn flatten(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        Err(ApiError::no_volume(volume))
    }

    async fn move_progress(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        Err(ApiError::no_volume(volume))
    }

    async fn evict(&self, volume: &VolumeRef) -> ApiResult<EvictInfo> {
        Err(ApiError::no_volume(volume))
    }

    async fn list_trash(&self, _tenant: Option<&TenantName>) -> ApiResult<Vec<TrashInfo>> {
        Ok(Vec::new())
    }

    async fn restore(&self, which: &TrashRef, _: Option<&VolumeName>) -> ApiResult<VolumeInfo> {
        match which {
            TrashRef::Name(volume) => Err(ApiError::no_volume(volume)),
            TrashRef::Id(_) | TrashRef::Of(..) => Ok(VolumeInfo::default()),
        }
    }

    async fn purge_trash(&self, spec: &PurgeSpec) -> ApiResult<PurgeReport> {
        let said = [spec.id.is_some(), spec.all, spec.older_than_ms.is_some()];
        assert_eq!(said.into_iter().filter(|said| *said).count(), 1);
        Ok(PurgeReport::default())
    }

    async fn doctor(&self) -> ApiResult<DoctorReport> {
        Ok(DoctorReport::default())
    }

    async fn status(&self) -> ApiResult<StatusInfo> {
        Ok(StatusInfo::default())
    }

    async fn activity(&self, _tenant: Option<&TenantName>) -> ApiResult<Activity> {
        Ok(Activity::default())
    }

    async fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    async fn metrics_text(&self) -> String {
        String::new()
    }
}

/// The input is a method, a path and a body, each but the last ended by a line feed. A request is
/// carried out or refused by a problem with a remedy, never by a fault of the daemon's.
pub(crate) fn control_api(input: &[u8]) {
    thread_local! {
        static RUNTIME: OnceCell<Runtime> = const { OnceCell::new() };
    }
    let mut parts = input.splitn(3, |byte| *byte == b'\n');
    let (method, path) = (parts.next(), parts.next());
    let body = parts.next().unwrap_or_default();
    let method = method.and_then(|method| Method::from_bytes(method).ok());
    let path = path.and_then(|path| Uri::try_from(path).ok());
    let (Some(method), Some(path)) = (method, path) else {
        return;
    };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .body(Body::from(body.to_vec()))
        .expect("of sound parts");
    RUNTIME.with(|runtime| {
        let runtime = runtime.get_or_init(|| {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_time().build().expect("a runtime")
        });
        runtime.block_on(ask(request));
    });
}

async fn ask(request: Request<Body>) {
    let shown = format!("{request:?}");
    let Ok(response) = routes(Arc::new(Strict)).oneshot(request).await;
    let (head, body) = response.into_parts();
    let body = to_bytes(body, ANSWER_BYTES_MAX)
        .await
        .expect("a short answer");
    assert!(head.status.as_u16() < 500, "{shown}: {}", head.status);
    if head.status.is_success() || body.is_empty() {
        return;
    }
    let kind = head.headers.get(header::CONTENT_TYPE);
    assert_eq!(
        kind.map(|kind| kind.as_bytes()),
        Some(&b"application/problem+json"[..]),
        "{shown}"
    );
    let problem: Problem = serde_json::from_slice(&body).expect("a problem");
    assert_eq!(problem.status, head.status.as_u16());
    assert!(!problem.detail.is_empty() && !problem.remedy.is_empty());
}
