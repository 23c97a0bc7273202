//! The client of the API: one method a call, over the unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use quarry_objfmt::{TenantName, VolumeName};
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::chores::{CompactSpec, MoveReport};
use super::dto::{
    AttachInfo, AttachOptions, CloneSpec, RescueReport, RescueSpec, ResizeInfo, ResizeSpec,
    SnapshotInfo, SnapshotList, SnapshotSpec, StatusInfo, TenantInfo, TenantList, TenantSpec,
    VerifyProgress, VerifyReport, VerifySpec, VolumeInfo, VolumeList, VolumeSpec,
};
use super::rekey::{RekeyInfo, RekeySpec};
use super::retain::{RetainInfo, RetainSpec};
use super::trash::{PurgeReport, PurgeSpec, RestoreSpec, TrashInfo, TrashList};
use super::warm::{EvictInfo, WarmReport, WarmSpec};
use super::{ApiError, ApiResult, ImageRef, Kind, Problem, SnapRef, VolumeRef};

/// How long a daemon may take to answer what it should know by itself or ask the store once.
const ANSWER_TIME: Duration = Duration::from_secs(120);
/// How long a daemon may take to accept a connection.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// How long a call may take.
#[derive(Clone, Copy)]
enum Patience {
    /// [`ANSWER_TIME`].
    Answer,
    /// For ever: it moves data, and the store may be away.
    Work,
}

/// A client of the daemon at one socket.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    socket: PathBuf,
}

impl Client {
    /// A client of the daemon at `socket`; connects with the first call.
    ///
    /// # Errors
    /// If the HTTP library cannot start.
    pub fn new(socket: impl Into<PathBuf>) -> ApiResult<Self> {
        let socket = socket.into();
        // The library wants one, even for plain HTTP on a unix socket.
        crate::store::install_crypto();
        let http = reqwest::Client::builder()
            .unix_socket(socket.clone())
            .no_proxy()
            // There is no TLS on a unix socket; without this, a host without CA certificates fails here.
            .tls_certs_only([])
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIME)
            .build()
            .map_err(|error| {
                ApiError::internal(format!("the HTTP client cannot start: {error}"))
            })?;
        Ok(Self { http, socket })
    }

    /// The daemon's socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        patience: Patience,
    ) -> ApiResult<Response> {
        let mut request = self.http.request(method, format!("http://quarry{path}"));
        if let Some(body) = body {
            request = request.json(body);
        }
        if matches!(patience, Patience::Answer) {
            request = request.timeout(ANSWER_TIME);
        }
        let response = request.send().await.map_err(|error| self.lost(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.bytes().await.map_err(|error| self.lost(&error))?;
        Err(match serde_json::from_slice::<Problem>(&text) {
            Ok(problem) => problem.into(),
            Err(_) => self.stranger(status),
        })
    }

    async fn json<T: DeserializeOwned>(&self, response: Response) -> ApiResult<T> {
        let status = response.status();
        let text = response.bytes().await.map_err(|error| self.lost(&error))?;
        serde_json::from_slice(&text).map_err(|_| self.stranger(status))
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> ApiResult<T> {
        let response = self
            .call(Method::GET, path, None::<&()>, Patience::Answer)
            .await?;
        self.json(response).await
    }

    async fn order(&self, method: Method, path: &str) -> ApiResult<()> {
        self.call(method, path, None::<&()>, Patience::Work)
            .await
            .map(drop)
    }

    /// Why nothing came back.
    fn lost(&self, error: &reqwest::Error) -> ApiError {
        let socket = self.socket.display();
        if error.is_timeout() {
            let message = format!("the daemon at {socket} does not answer");
            return ApiError::new(
                Kind::Unavailable,
                message,
                "see its log; it may be waiting for the object store",
            );
        }
        if error.is_connect() {
            if denied(error) {
                let message = format!("the daemon's socket {socket} does not let you in");
                return ApiError::new(
                    Kind::Denied,
                    message,
                    "run this as root or as a member of the socket's group",
                );
            }
            let message = format!("no daemon answers at {socket}");
            let remedy = "start one with `quarry serve`, or name its socket with --socket";
            return ApiError::new(Kind::Unavailable, message, remedy);
        }
        let message = format!("the daemon at {socket} broke off");
        ApiError::new(
            Kind::Unavailable,
            message,
            "see its log, and check with `quarry status` whether it runs",
        )
    }

    fn stranger(&self, status: StatusCode) -> ApiError {
        let message = format!(
            "what answers at {} ({status}) does not speak as this client does",
            self.socket.display()
        );
        ApiError::internal(message)
            .with_remedy("check --socket, and that client and daemon have the same version")
    }

    /// Makes a tenant.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn create_tenant(&self, name: &TenantName) -> ApiResult<TenantInfo> {
        let spec = TenantSpec { name: name.clone() };
        let response = self
            .call(Method::POST, "/v1/tenants", Some(&spec), Patience::Answer)
            .await?;
        self.json(response).await
    }

    /// All tenants.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn list_tenants(&self) -> ApiResult<TenantList> {
        self.get("/v1/tenants").await
    }

    /// Removes a tenant without volumes, and purges its trash if `purge`.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn delete_tenant(&self, name: &TenantName, purge: bool) -> ApiResult<()> {
        self.order(Method::DELETE, &format!("/v1/tenants/{name}?purge={purge}"))
            .await
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn create_volume(&self, spec: &VolumeSpec) -> ApiResult<VolumeInfo> {
        let response = self
            .call(Method::POST, "/v1/volumes", Some(spec), Patience::Answer)
            .await?;
        self.json(response).await
    }

    /// All volumes, or those of one tenant.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn list_volumes(&self, tenant: Option<&TenantName>) -> ApiResult<VolumeList> {
        match tenant {
            None => self.get("/v1/volumes").await,
            Some(tenant) => self.get(&format!("/v1/volumes?tenant={tenant}")).await,
        }
    }

    /// One volume.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn show_volume(&self, volume: &ImageRef) -> ApiResult<VolumeInfo> {
        self.get(&format!("/v1/volumes/{volume}")).await
    }

    /// Attaches a volume, or a snapshot, to the daemon's host.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn attach(
        &self,
        volume: &ImageRef,
        options: &AttachOptions,
    ) -> ApiResult<AttachInfo> {
        let path = format!("/v1/volumes/{volume}/attach");
        let response = self
            .call(Method::POST, &path, Some(options), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// Detaches a volume.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn detach(&self, volume: &ImageRef) -> ApiResult<()> {
        self.order(Method::POST, &format!("/v1/volumes/{volume}/detach"))
            .await
    }

    /// Gives a volume a larger size.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn resize(&self, volume: &VolumeRef, spec: ResizeSpec) -> ApiResult<ResizeInfo> {
        let path = format!("/v1/volumes/{volume}/resize");
        let response = self
            .call(Method::POST, &path, Some(&spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// Sets how long what a volume needs no more is kept.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn retain(&self, volume: &VolumeRef, retain_ms: u64) -> ApiResult<RetainInfo> {
        let path = format!("/v1/volumes/{volume}/retain");
        let spec = RetainSpec { retain_ms };
        let response = self
            .call(Method::POST, &path, Some(&spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// Wraps a volume's data keys anew.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn rekey(&self, volume: &VolumeRef, spec: &RekeySpec) -> ApiResult<RekeyInfo> {
        let path = format!("/v1/volumes/{volume}/rekey");
        let response = self
            .call(Method::POST, &path, Some(spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// Waits until all that was acknowledged before is in the object store.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn sync(&self, volume: &VolumeRef) -> ApiResult<()> {
        self.order(Method::POST, &format!("/v1/volumes/{volume}/sync"))
            .await
    }

    /// Makes a volume's lost head anew, or says what it would be.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn rescue(&self, volume: &VolumeRef, spec: &RescueSpec) -> ApiResult<RescueReport> {
        let path = format!("/v1/volumes/{volume}/rescue");
        let response = self
            .call(Method::POST, &path, Some(spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// Checks a volume in the store; ends when the answer is not waited for any more.
    ///
    /// # Errors
    /// The daemon's, or that there is none; that something is wrong with the volume is none.
    pub async fn verify(&self, volume: &ImageRef, spec: &VerifySpec) -> ApiResult<VerifyReport> {
        let path = format!("/v1/volumes/{volume}/verify");
        let response = self
            .call(Method::POST, &path, Some(spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// How far the check of a volume is.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn verify_progress(&self, volume: &ImageRef) -> ApiResult<VerifyProgress> {
        self.get(&format!("/v1/volumes/{volume}/verify")).await
    }

    /// Gives a volume's state a name.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn create_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        let path = format!("/v1/volumes/{}/snapshots", snapshot.volume);
        let name = snapshot.name.clone();
        let spec = SnapshotSpec { name };
        let response = self
            .call(Method::POST, &path, Some(&spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// A volume's snapshots, or all.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn list_snapshots(&self, volume: Option<&VolumeRef>) -> ApiResult<SnapshotList> {
        match volume {
            Some(volume) => self.get(&format!("/v1/volumes/{volume}/snapshots")).await,
            None => self.get("/v1/snapshots").await,
        }
    }

    /// One snapshot.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn show_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo> {
        self.get(&snapshot_path(snapshot)).await
    }

    /// Takes a snapshot's name away.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn delete_snapshot(&self, snapshot: &SnapRef) -> ApiResult<()> {
        self.order(Method::DELETE, &snapshot_path(snapshot)).await
    }

    /// Makes a volume that starts as the snapshot is.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn clone_snapshot(
        &self,
        snapshot: &SnapRef,
        name: &VolumeName,
    ) -> ApiResult<VolumeInfo> {
        let path = format!("{}/clone", snapshot_path(snapshot));
        let spec = CloneSpec { name: name.clone() };
        let response = self
            .call(Method::POST, &path, Some(&spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// Makes a volume what its snapshot is.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn rollback(&self, snapshot: &SnapRef) -> ApiResult<VolumeInfo> {
        let path = format!("{}/rollback", snapshot_path(snapshot));
        let response = self
            .call(Method::POST, &path, None::<&()>, Patience::Work)
            .await?;
        self.json(response).await
    }

    /// Fetches a volume into the cache; ends when the answer is not waited for any more.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn warm(&self, volume: &VolumeRef, spec: &WarmSpec) -> ApiResult<WarmReport> {
        let path = format!("/v1/volumes/{volume}/warm");
        let response = self
            .call(Method::POST, &path, Some(spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// How far the warming of a volume is.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn warm_progress(&self, volume: &VolumeRef) -> ApiResult<WarmReport> {
        self.get(&format!("/v1/volumes/{volume}/warm")).await
    }

    /// Puts a volume's data in order; ends when the answer is not waited for any more.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn compact(&self, volume: &VolumeRef, spec: &CompactSpec) -> ApiResult<MoveReport> {
        let path = format!("/v1/volumes/{volume}/compact");
        let response = self
            .call(Method::POST, &path, Some(spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// Makes a clone need nothing of its parent; ends when the answer is not waited for any more.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn flatten(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        let path = format!("/v1/volumes/{volume}/flatten");
        let response = self
            .call(Method::POST, &path, None::<&()>, Patience::Work)
            .await?;
        self.json(response).await
    }

    /// How far the compacting or flattening of a volume is.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn move_progress(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        self.get(&format!("/v1/volumes/{volume}/compact")).await
    }

    /// Drops what the cache has of a volume and the store has too.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn evict(&self, volume: &VolumeRef) -> ApiResult<EvictInfo> {
        let path = format!("/v1/volumes/{volume}/evict");
        let response = self
            .call(Method::POST, &path, None::<&()>, Patience::Answer)
            .await?;
        self.json(response).await
    }

    /// Puts a volume into the trash.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn delete_volume(
        &self,
        volume: &VolumeRef,
        discard_unsent: bool,
    ) -> ApiResult<TrashInfo> {
        let path = format!("/v1/volumes/{volume}?discard_unsent={discard_unsent}");
        let response = self
            .call(Method::DELETE, &path, None::<&()>, Patience::Work)
            .await?;
        self.json(response).await
    }

    /// What is in the trash, of one tenant or of all.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn list_trash(&self, tenant: Option<&TenantName>) -> ApiResult<TrashList> {
        match tenant {
            None => self.get("/v1/trash").await,
            Some(tenant) => self.get(&format!("/v1/trash?tenant={tenant}")).await,
        }
    }

    /// Brings a volume back from the trash.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn restore(&self, spec: &RestoreSpec) -> ApiResult<VolumeInfo> {
        let response = self
            .call(
                Method::POST,
                "/v1/trash/restore",
                Some(spec),
                Patience::Work,
            )
            .await?;
        self.json(response).await
    }

    /// Deletes volumes of the trash for good.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn purge_trash(&self, spec: &PurgeSpec) -> ApiResult<PurgeReport> {
        let response = self
            .call(Method::POST, "/v1/trash/purge", Some(spec), Patience::Work)
            .await?;
        self.json(response).await
    }

    /// How the daemon does.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn status(&self) -> ApiResult<StatusInfo> {
        self.get("/v1/status").await
    }
}

fn snapshot_path(snapshot: &SnapRef) -> String {
    let SnapRef { volume, name } = snapshot;
    format!("/v1/volumes/{volume}/snapshots/{name}")
}

/// Whether a connection failed for want of permission.
fn denied(error: &reqwest::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::PermissionDenied
        {
            return true;
        }
        cause = error.source();
    }
    false
}
