//! From HTTP to the [`Engine`](super::Engine) and back, every refusal a [`Problem`](super::Problem).

use std::future::Future;

use axum::body::Bytes;
use axum::extract::Path;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use quarry_objfmt::{SECTOR_SIZE, SnapName};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::access::{Allowed, Operating};
use super::dto::{
    AttachOptions, CloneSpec, RescueReport, RescueSpec, ResizeSpec, SnapshotInfo, SnapshotList,
    SnapshotSpec, VerifyProgress, VerifyReport, VerifySpec, VolumeInfo, VolumeList, VolumeSpec,
    check_size,
};
use super::error::response;
use super::page::{Page, PageQuery, TenantPageQuery, page, tenant_page};
use super::trash::TrashInfo;
use super::{ApiError, ApiResult, ImageRef, Kind, SnapRef, VolumeRef};

/// Largest body of a request; the largest real one has some 300 bytes.
pub(super) const BODY_BYTES_MAX: usize = 16 << 10;
/// The media type of Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(super) type Body = Result<Bytes, BytesRejection>;
/// What stands behind the question mark.
pub(super) type Query<T> = Result<axum::extract::Query<T>, QueryRejection>;
pub(super) type Volume = Result<Path<(String, String)>, PathRejection>;
type Snapshot = Result<Path<(String, String, String)>, PathRejection>;

/// Lets `call` run to its end even if the client hangs up: a change half made would be worse.
pub(super) async fn whole<T: Send + 'static>(
    call: impl Future<Output = ApiResult<T>> + Send + 'static,
) -> ApiResult<T> {
    match tokio::spawn(call).await {
        Ok(result) => result,
        Err(error) => {
            tracing::error!(%error, "a control call broke off");
            Err(ApiError::internal(
                "the call broke off by a mistake of the daemon",
            ))
        }
    }
}

/// A refusal that has a status of its own.
pub(super) struct Refused(pub StatusCode, pub ApiError);

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        Self(error.kind.status(), error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        response(self.0, self.1)
    }
}

/// The JSON body; an empty one is an object without fields.
pub(super) fn json<T: DeserializeOwned>(body: Body) -> Result<T, Refused> {
    let body = body.map_err(|rejection| {
        let remedy = format!("send at most {BODY_BYTES_MAX} bytes");
        Refused(
            rejection.status(),
            ApiError::invalid("the body cannot be read", remedy),
        )
    })?;
    let text: &[u8] = if body.is_empty() { b"{}" } else { &body };
    serde_json::from_slice(text).map_err(|error| {
        ApiError::invalid(
            format!("the body is not what this path takes: {error}"),
            "mend the request",
        )
        .into()
    })
}

pub(super) fn volume_of(path: Volume) -> ApiResult<VolumeRef> {
    let Path((tenant, name)) = path.map_err(|_| not_utf8())?;
    Ok(VolumeRef::new(tenant, name)?)
}

/// Where a snapshot will do: `name` or `name@snapshot` in a volume's place.
fn image_of(path: Volume) -> ApiResult<ImageRef> {
    let Path((tenant, name)) = path.map_err(|_| not_utf8())?;
    Ok(ImageRef::new(tenant, &name)?)
}

fn snapshot_of(path: Snapshot) -> ApiResult<SnapRef> {
    let Path((tenant, volume, name)) = path.map_err(|_| not_utf8())?;
    Ok(SnapRef {
        volume: VolumeRef::new(tenant, volume)?,
        name: SnapName::new(name)?,
    })
}

pub(super) fn not_utf8() -> ApiError {
    ApiError::invalid("the path is not UTF-8", "mend the request")
}

/// What was made, or what was there already and is the same.
pub(super) enum Made<T> {
    New(T),
    Same(T),
}

impl<T: Serialize> IntoResponse for Made<T> {
    fn into_response(self) -> Response {
        match self {
            Self::New(made) => (StatusCode::CREATED, Json(made)).into_response(),
            Self::Same(found) => Json(found).into_response(),
        }
    }
}

/// Makes something. Where one of its name is there, and is what was asked for, it will do: whoever asks again after
/// a lost answer gets the same.
pub(super) async fn make<T>(
    making: impl Future<Output = ApiResult<T>>,
    existing: impl Future<Output = ApiResult<T>>,
    is_it: impl FnOnce(&T) -> bool,
) -> ApiResult<Made<T>> {
    match making.await {
        Ok(made) => Ok(Made::New(made)),
        Err(error) if error.kind == Kind::Exists => match existing.await {
            Ok(found) if is_it(&found) => Ok(Made::Same(found)),
            _ => Err(error),
        },
        Err(error) => Err(error),
    }
}

pub(super) async fn create_volume(
    Allowed(engine): Allowed,
    body: Body,
) -> Result<Made<VolumeInfo>, Refused> {
    let spec: VolumeSpec = json(body)?;
    spec.check()?;
    let made = whole(async move {
        let image = spec.volume().into();
        let is_it = |found: &VolumeInfo| spec.is_of(found);
        make(
            engine.create_volume(spec.clone()),
            engine.show_volume(&image),
            is_it,
        )
        .await
    });
    Ok(made.await?)
}

/// What stands behind the question mark, as `T` takes it.
pub(super) fn query<T>(asked: Query<T>, remedy: &str) -> ApiResult<T> {
    let asked =
        asked.map_err(|_| ApiError::invalid("the query is not what this path takes", remedy))?;
    Ok(asked.0)
}

pub(super) async fn list_volumes(
    Allowed(engine): Allowed,
    asked: Query<TenantPageQuery>,
) -> ApiResult<Json<VolumeList>> {
    let (tenant, page) = tenant_page(asked)?;
    Ok(Json(engine.page_of_volumes(tenant.as_ref(), &page).await?))
}

pub(super) async fn show_volume(
    Allowed(engine): Allowed,
    path: Volume,
) -> ApiResult<Json<VolumeInfo>> {
    let image = image_of(path)?;
    Ok(Json(engine.show_volume(&image).await?))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct VolumeDelete {
    /// Give up writes that a host's cache has and the store does not.
    #[serde(default)]
    discard_unsent: bool,
}

pub(super) async fn delete_volume(
    Allowed(engine): Allowed,
    path: Volume,
    asked: Query<VolumeDelete>,
) -> ApiResult<Json<TrashInfo>> {
    let volume = volume_of(path)?;
    let how = query(asked, "use ?discard_unsent=true or none")?;
    let call = async move { engine.delete_volume(&volume, how.discard_unsent).await };
    Ok(Json(whole(call).await?))
}

pub(super) async fn attach(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<impl IntoResponse, Refused> {
    let image = image_of(path)?;
    let options: AttachOptions = json(body)?;
    options.check()?;
    Ok(Json(
        whole(async move { engine.attach(&image, options).await }).await?,
    ))
}

pub(super) async fn detach(Allowed(engine): Allowed, path: Volume) -> ApiResult<Response> {
    let image = image_of(path)?;
    let detached = whole(async move { engine.detach(&image).await }).await?;
    Ok(match detached.unsent_bytes {
        None => StatusCode::NO_CONTENT.into_response(),
        Some(_) => Json(detached).into_response(),
    })
}

pub(super) async fn resize(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<impl IntoResponse, Refused> {
    let volume = volume_of(path)?;
    let spec: ResizeSpec = json(body)?;
    // Its own sector size may ask for more, which the engine knows.
    check_size(spec.size_bytes, SECTOR_SIZE)?;
    let call = async move { engine.resize(&volume, spec).await };
    Ok(Json(whole(call).await?))
}

pub(super) async fn rescue(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<Json<RescueReport>, Refused> {
    let volume = volume_of(path)?;
    let spec: RescueSpec = json(body)?;
    let call = async move { engine.rescue(&volume, spec).await };
    Ok(Json(whole(call).await?))
}

pub(super) async fn sync(Allowed(engine): Allowed, path: Volume) -> ApiResult<StatusCode> {
    let volume = volume_of(path)?;
    // To its end, which cannot be hastened: until then it counts among its tenant's calls, however many clients hang up.
    whole(async move { engine.sync(&volume).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn verify(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<Json<VerifyReport>, Refused> {
    let image = image_of(path)?;
    let spec: VerifySpec = json(body)?;
    // Changes nothing: a client that hangs up ends it.
    Ok(Json(engine.verify(&image, spec).await?))
}

pub(super) async fn verify_progress(
    Allowed(engine): Allowed,
    path: Volume,
) -> ApiResult<Json<VerifyProgress>> {
    let image = image_of(path)?;
    Ok(Json(engine.verify_progress(&image).await?))
}

pub(super) async fn list_all_snapshots(
    Allowed(engine): Allowed,
    asked: Query<PageQuery>,
) -> ApiResult<Json<SnapshotList>> {
    Ok(Json(snapshots(
        &page(asked)?,
        engine.list_snapshots(None).await?,
    )))
}

pub(super) async fn list_snapshots(
    Allowed(engine): Allowed,
    path: Volume,
    asked: Query<PageQuery>,
) -> ApiResult<Json<SnapshotList>> {
    let (volume, page) = (volume_of(path)?, page(asked)?);
    Ok(Json(snapshots(
        &page,
        engine.list_snapshots(Some(&volume)).await?,
    )))
}

fn snapshots(page: &Page, all: Vec<SnapshotInfo>) -> SnapshotList {
    let place =
        |s: &SnapshotInfo| format!("{} {:020} {}", place_of(&s.volume), s.created_ms, s.name);
    let (snapshots, next) = page.cut(all, place);
    SnapshotList { snapshots, next }
}

/// A name's place in the order of tenants and volumes: what ends the tenant's name comes before all that a name has.
pub(crate) fn place_of(name: &str) -> String {
    name.replace('/', " ")
}

pub(super) async fn create_snapshot(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<Made<SnapshotInfo>, Refused> {
    let volume = volume_of(path)?;
    let SnapshotSpec { name } = json(body)?;
    let snapshot = SnapRef { volume, name };
    let made = whole(async move {
        let existing = engine.show_snapshot(&snapshot);
        make(engine.create_snapshot(&snapshot), existing, |found| {
            !found.deleting
        })
        .await
    });
    Ok(made.await?)
}

pub(super) async fn show_snapshot(
    Allowed(engine): Allowed,
    path: Snapshot,
) -> Result<Json<SnapshotInfo>, Refused> {
    let snapshot = snapshot_of(path)?;
    Ok(Json(engine.show_snapshot(&snapshot).await?))
}

pub(super) async fn delete_snapshot(
    Allowed(engine): Allowed,
    path: Snapshot,
) -> ApiResult<StatusCode> {
    let snapshot = snapshot_of(path)?;
    whole(async move { engine.delete_snapshot(&snapshot).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn clone_snapshot(
    Allowed(engine): Allowed,
    path: Snapshot,
    body: Body,
) -> Result<Made<VolumeInfo>, Refused> {
    let snapshot = snapshot_of(path)?;
    let CloneSpec { name } = json(body)?;
    let made = whole(async move {
        let image = VolumeRef {
            tenant: snapshot.volume.tenant.clone(),
            name: name.clone(),
        };
        let is_it = |found: &VolumeInfo| {
            let parent = found.parent.as_ref();
            parent.is_some_and(|p| format!("{}@{}", p.volume, p.snapshot) == snapshot.to_string())
        };
        let image = image.into();
        make(
            engine.clone_snapshot(&snapshot, &name),
            engine.show_volume(&image),
            is_it,
        )
        .await
    });
    Ok(made.await?)
}

pub(super) async fn rollback(
    Allowed(engine): Allowed,
    path: Snapshot,
) -> Result<Json<VolumeInfo>, Refused> {
    let snapshot = snapshot_of(path)?;
    let call = async move { engine.rollback(&snapshot).await };
    Ok(Json(whole(call).await?))
}

pub(super) async fn status(
    Allowed(engine): Allowed,
    Operating(access): Operating,
) -> ApiResult<impl IntoResponse> {
    let mut status = engine.status().await?;
    status.audit_problem = access.audit_problem();
    Ok(Json(status))
}

pub(super) async fn healthy() -> &'static str {
    "ok\n"
}

pub(super) async fn ready(Allowed(engine): Allowed) -> Response {
    match engine.ready().await {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {why}\n"),
        )
            .into_response(),
    }
}

pub(super) async fn metrics(Allowed(engine): Allowed) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, METRICS_TYPE)],
        engine.metrics_text().await,
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpStream, UnixStream};
    use tokio::time::timeout;

    use quarry_objfmt::{Compression, Durability};

    use super::super::fake::{FakeDaemon, FakeEngine};
    use super::super::trash::{PurgeSpec, RestoreSpec, TrashRef};
    use super::super::{Client, Problem, RatesSpec, State as VolumeState, Via};
    use quarry_objfmt::TenantName;

    use super::*;

    fn acme() -> TenantName {
        "acme".parse().unwrap()
    }

    fn spec(name: &str) -> VolumeSpec {
        VolumeSpec {
            tenant: "acme".parse().unwrap(),
            name: name.parse().unwrap(),
            size_bytes: 1 << 30,
            sector_size: 4096,
            durability: Durability::Object,
            compression: Compression::Zstd,
            retain_ms: 0,
            rates: RatesSpec::default(),
            key: None,
            no_encryption: false,
        }
    }

    fn volume(name: &str) -> VolumeRef {
        VolumeRef::new("acme", name).unwrap()
    }

    fn image(name: &str) -> ImageRef {
        ImageRef::new("acme", name).unwrap()
    }

    /// Status and body of one request on its own connection.
    async fn raw(daemon: &FakeDaemon, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(daemon.socket()).await.unwrap();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        parse(&answer)
    }

    fn parse(answer: &str) -> (u16, String) {
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (
            head.split(' ').nth(1).unwrap().parse().unwrap(),
            body.to_owned(),
        )
    }

    async fn refused(daemon: &FakeDaemon, method: &str, path: &str, body: &str) -> Problem {
        let (status, body) = raw(daemon, method, path, body).await;
        let problem: Problem =
            serde_json::from_str(&body).unwrap_or_else(|e| panic!("{method} {path}: {e}: {body}"));
        assert_eq!(problem.status, status);
        assert!(
            !problem.detail.is_empty() && !problem.remedy.is_empty(),
            "{body}"
        );
        problem
    }

    #[tokio::test]
    async fn volume_through_the_client_lives_its_whole_life() {
        let daemon = FakeDaemon::start(Arc::new(FakeEngine::default())).await;
        let client = daemon.client();
        assert_eq!(
            client.create_tenant(&acme().into()).await.unwrap().name,
            "acme"
        );
        assert_eq!(client.list_tenants().await.unwrap().tenants.len(), 1);

        let made = client.create_volume(&spec("db")).await.unwrap();
        assert_eq!(
            (made.durability, made.compression, made.sector_size),
            (Durability::Object, Compression::Zstd, 4096)
        );
        assert_eq!(client.list_volumes(None).await.unwrap().volumes.len(), 1);
        assert_eq!(
            client
                .list_volumes(Some(&"other".parse().unwrap()))
                .await
                .unwrap()
                .volumes
                .len(),
            0
        );

        let options = AttachOptions {
            via: Some(Via::Nbd),
            read_only: true,
            ..AttachOptions::default()
        };
        let attached = client.attach(&image("db"), &options).await.unwrap();
        assert_eq!(
            attached.uri.as_deref(),
            Some("nbd+unix:///acme/db?socket=/run/nbd.sock")
        );
        let spec = ResizeSpec {
            size_bytes: 2 << 30,
            force: false,
        };
        let resized = client.resize(&volume("db"), spec).await.unwrap();
        assert_eq!(
            (resized.volume.as_str(), resized.size_bytes),
            ("acme/db", 2 << 30)
        );
        let rates = RatesSpec {
            iops: Some(500),
            ..RatesSpec::default()
        };
        let limited = client.set_rates(&volume("db"), rates).await.unwrap();
        assert_eq!(limited.rates, rates);
        let shown = client.show_volume(&image("db")).await.unwrap();
        assert_eq!((shown.state, shown.rates), (VolumeState::Attached, rates));
        assert_eq!(shown.size_bytes, 2 << 30);
        assert!(shown.attached.unwrap().read_only);

        let early = client.delete_volume(&volume("db"), false).await;
        let early = early.unwrap_err();
        assert_eq!(early.kind, Kind::Conflict);
        client.sync(&volume("db")).await.unwrap();
        client.detach(&image("db")).await.unwrap();
        let delete = async || client.delete_volume(&volume("db"), false).await.unwrap();
        let deleted = delete().await;
        assert_eq!(client.list_trash(None).await.unwrap().trash, [deleted]);
        let gone = client.show_volume(&image("db")).await.unwrap_err();
        assert_eq!(gone, ApiError::no_volume(&volume("db")));
        let as_other =
            RestoreSpec::new(&TrashRef::Name(volume("db")), Some("db2".parse().unwrap()));
        assert_eq!(client.restore(&as_other).await.unwrap().name, "db2");
        let gone = client.restore(&as_other).await.unwrap_err();
        assert_eq!(gone.kind, Kind::NotFound);
        client.delete_volume(&volume("db2"), true).await.unwrap();
        let refused = client.delete_tenant(&acme(), false).await.unwrap_err();
        assert!(refused.remedy.contains("--purge"), "{refused}");
        let refused = client.purge_trash(&PurgeSpec::default()).await.unwrap_err();
        assert_eq!(refused.kind, Kind::Invalid);
        client.delete_tenant(&acme(), true).await.unwrap();
        assert_eq!(client.list_trash(None).await.unwrap().trash, []);
        assert_eq!(client.status().await.unwrap().host, "here");
        daemon.stop().await;
    }

    #[tokio::test]
    async fn check_ends_when_its_client_hangs_up() {
        let engine = Arc::new(FakeEngine::default());
        let ended = Arc::clone(&engine.verify_ended);
        let daemon = FakeDaemon::start(engine).await;
        let client = daemon.client();
        client.create_tenant(&acme().into()).await.unwrap();
        for name in ["db", "slow"] {
            client.create_volume(&spec(name)).await.unwrap();
        }
        let deep = VerifySpec {
            deep: true,
            ..VerifySpec::default()
        };
        let report = client.verify(&image("db"), &deep).await.unwrap();
        assert!(report.deep && report.findings.is_empty());
        ended.notified().await;
        client.verify_progress(&image("db")).await.unwrap();

        let slow = image("slow");
        let patience = Duration::from_millis(100);
        timeout(patience, client.verify(&slow, &VerifySpec::default()))
            .await
            .unwrap_err();
        timeout(Duration::from_secs(10), ended.notified())
            .await
            .expect("the check goes on though nobody waits for it");
        daemon.stop().await;
    }

    #[tokio::test]
    async fn requests_that_are_wrong_get_a_problem_that_says_so() {
        let daemon = FakeDaemon::start(Arc::new(FakeEngine::default())).await;
        daemon.client().create_tenant(&acme().into()).await.unwrap();
        let unknown = refused(
            &daemon,
            "POST",
            "/v1/tenants",
            r#"{"name":"b","colour":"red"}"#,
        )
        .await;
        assert!(
            unknown.detail.contains("colour") && unknown.status == 400,
            "{unknown:?}"
        );
        for (method, path, body, status) in [
            ("POST", "/v1/tenants", "{", 400),
            ("POST", "/v1/tenants", "", 400),
            ("POST", "/v1/tenants", r#"{"name":"../x"}"#, 400),
            ("GET", "/v1/volumes?limit=0", "", 400),
            ("GET", "/v1/tenants?limit=-1", "", 400),
            ("GET", "/v1/snapshots?tenant=acme", "", 400),
            (
                "POST",
                "/v1/volumes",
                r#"{"tenant":"acme","name":"v","size_bytes":5}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes",
                r#"{"tenant":"acme","name":"v","size_bytes":-5}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes",
                r#"{"tenant":"none","name":"v","size_bytes":512}"#,
                404,
            ),
            ("GET", "/v1/volumes?tenent=a", "", 400),
            ("GET", "/v1/volumes?tenant=..", "", 400),
            ("GET", "/v1/volumes/acme/%2e%2e%2fx", "", 400),
            ("GET", "/v1/volumes/acme/%ff", "", 400),
            (
                "POST",
                "/v1/volumes/acme/db/attach",
                r#"{"foce":true}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/db/attach",
                r#"{"via":"nbd","device_owner":"root"}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/db/attach",
                r#"{"device_owner":"a b"}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/db/attach",
                r#"{"device_mode":"1777"}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/db/attach",
                r#"{"device_mode":640}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/db/attach",
                r#"{"queues":17}"#,
                400,
            ),
            ("POST", "/v1/volumes/acme/db/resize", "", 400),
            (
                "POST",
                "/v1/volumes/acme/db/resize",
                r#"{"size_bytes":0}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/db/resize",
                r#"{"size_bytes":1152921504606847488}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/db/resize",
                r#"{"size_bytes":1000}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/db/resize",
                r#"{"size_bytes":512,"forced":true}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/none/resize",
                r#"{"size_bytes":512}"#,
                404,
            ),
            ("GET", "/v1/volumes/acme/db@/x", "", 404),
            ("GET", "/v1/volumes/acme/db@a@b", "", 400),
            ("POST", "/v1/volumes/acme/db/snapshots", "", 400),
            (
                "POST",
                "/v1/volumes/acme/db/snapshots",
                r#"{"name":"../x"}"#,
                400,
            ),
            ("GET", "/v1/volumes/acme/db/snapshots/UP", "", 400),
            ("DELETE", "/v1/volumes/acme/db/snapshots/none", "", 404),
            (
                "POST",
                "/v1/volumes/acme/db/snapshots/none/clone",
                r#"{"name":"a","tenant":"other"}"#,
                400,
            ),
            (
                "POST",
                "/v1/volumes/acme/db@nightly/resize",
                r#"{"size_bytes":512}"#,
                400,
            ),
            ("PUT", "/v1/volumes/acme/db/rates", r#"{"iops":0}"#, 400),
            ("PUT", "/v1/volumes/acme/db/rates", r#"{"iop":5}"#, 400),
            ("PUT", "/v1/volumes/acme/none/rates", "{}", 404),
            ("POST", "/v1/volumes/acme/db/rates", "{}", 405),
            ("DELETE", "/v1/volumes/acme/db?discard=true", "", 400),
            ("DELETE", "/v1/tenants/acme?purge=yes", "", 400),
            ("GET", "/v1/trash?tenant=..", "", 400),
            ("POST", "/v1/trash/restore", "", 400),
            ("POST", "/v1/trash/restore", r#"{"volume":"db"}"#, 400),
            (
                "POST",
                "/v1/trash/purge",
                r#"{"all":true,"older_than_ms":1}"#,
                400,
            ),
            ("POST", "/v1/volumes/acme/db/warm", r#"{"from":1}"#, 400),
            ("POST", "/v1/volumes/acme/db/compact", r#"{"all":1}"#, 400),
            ("GET", "/v1/nothing", "", 404),
            ("PATCH", "/v1/tenants", "", 405),
        ] {
            let problem = refused(&daemon, method, path, body).await;
            assert_eq!(problem.status, status, "{method} {path} {body}");
        }
        let huge = refused(
            &daemon,
            "POST",
            "/v1/tenants",
            &" ".repeat(BODY_BYTES_MAX + 1),
        )
        .await;
        assert_eq!(huge.status, 413);
        daemon.stop().await;
    }

    #[tokio::test]
    async fn engine_that_panics_costs_one_answer() {
        let daemon = FakeDaemon::start(Arc::new(FakeEngine::default())).await;
        let error = daemon
            .client()
            .attach(&image("panic"), &AttachOptions::default())
            .await
            .unwrap_err();
        assert_eq!(error.kind, Kind::Internal);
        daemon.client().status().await.unwrap();
        daemon.stop().await;
    }

    #[tokio::test]
    async fn attach_of_a_client_that_hung_up_is_finished() {
        let engine = Arc::new(FakeEngine::slow(Duration::from_millis(100)));
        let daemon = FakeDaemon::start(engine).await;
        let client = daemon.client();
        client.create_tenant(&acme().into()).await.unwrap();
        client.create_volume(&spec("db")).await.unwrap();
        let hung_up = timeout(
            Duration::from_millis(20),
            client.attach(&image("db"), &AttachOptions::default()),
        )
        .await;
        assert!(hung_up.is_err());
        let attached = async {
            while client.show_volume(&image("db")).await.unwrap().state != VolumeState::Attached {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(10), attached).await.unwrap();
        daemon.stop().await;
    }

    #[tokio::test]
    async fn shutdown_with_a_call_under_way_lets_it_finish() {
        let engine = Arc::new(FakeEngine::slow(Duration::from_millis(200)));
        let daemon = FakeDaemon::start(engine).await;
        let socket = daemon.socket();
        let client = daemon.client();
        client.create_tenant(&acme().into()).await.unwrap();
        client.create_volume(&spec("db")).await.unwrap();
        let call =
            tokio::spawn(
                async move { client.attach(&image("db"), &AttachOptions::default()).await },
            );
        tokio::time::sleep(Duration::from_millis(50)).await;
        daemon.stop().await;
        call.await.unwrap().unwrap();
        assert!(!socket.exists());
    }

    #[tokio::test]
    async fn tcp_answers_health_and_nothing_else() {
        let engine = Arc::new(FakeEngine::default());
        let daemon = FakeDaemon::start(engine.clone()).await;
        let get = async |path: &str| {
            let mut stream = TcpStream::connect(daemon.address).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(
                path != "/metrics" || answer.contains(METRICS_TYPE),
                "{answer}"
            );
            parse(&answer)
        };
        assert_eq!(get("/healthz").await, (200, "ok\n".to_owned()));
        assert_eq!(get("/readyz").await.0, 200);
        assert_eq!(
            get("/metrics").await,
            (200, "quarry_build_info 1\n".to_owned())
        );
        for path in ["/v1/status", "/v1/tenants", "/v1/volumes"] {
            assert_eq!(get(path).await.0, 404, "{path}");
        }
        *engine.not_ready.lock() = Some("the store does not answer".to_owned());
        assert_eq!(
            get("/readyz").await,
            (503, "not ready: the store does not answer\n".to_owned())
        );
        assert_eq!(raw(&daemon, "GET", "/readyz", "").await.0, 503);
        daemon.stop().await;
    }

    #[tokio::test]
    async fn client_without_a_daemon_says_how_to_start_one() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("none.sock");
        let error = Client::new(&socket).unwrap().status().await.unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable);
        let expected = format!(
            "no daemon answers at {}; start one with `quarry serve`, or name its socket with --socket",
            socket.display()
        );
        assert_eq!(error.to_string(), expected);
    }
}
