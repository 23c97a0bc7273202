//! The client of the API: one method a call, over the unix socket or by TLS.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use quarry_objfmt::{Suspended, TenantName, VolumeName};
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::activity::Activity;
use super::chores::{CompactSpec, MoveReport};
use super::doctor::DoctorReport;
use super::dto::{
    AttachInfo, AttachOptions, CloneSpec, DetachInfo, RescueReport, RescueSpec, ResizeInfo,
    ResizeSpec, SnapshotInfo, SnapshotList, SnapshotSpec, StatusInfo, VerifyProgress, VerifyReport,
    VerifySpec, VolumeInfo, VolumeList, VolumeSpec,
};
use super::page::Listed;
use super::rates::{RatesInfo, RatesSpec};
use super::rekey::{RekeyInfo, RekeySpec};
use super::release::{ReleaseInfo, ReleaseSpec};
use super::retain::{RetainInfo, RetainSpec};
use super::tenant::{SuspendSpec, TenantInfo, TenantList, TenantSpec};
use super::token::{TokenList, TokenMade, TokenSpec};
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

/// Where a daemon is.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    Socket(PathBuf),
    /// An origin, such as `https://host:9443`.
    Url(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Url(url) => f.write_str(url),
        }
    }
}

/// A client of one daemon.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    place: Place,
    /// What to send with each request, if anything.
    token: Option<HeaderValue>,
}

impl Client {
    /// A client of the daemon at `socket`; connects with the first call.
    ///
    /// # Errors
    /// If the HTTP library cannot start.
    pub fn new(socket: impl Into<PathBuf>) -> ApiResult<Self> {
        let socket = socket.into();
        let http = builder()
            .unix_socket(socket.clone())
            // There is no TLS on a unix socket; without this, a host without CA certificates fails here.
            .tls_certs_only([]);
        Ok(Self {
            http: build(http)?,
            place: Place::Socket(socket),
            token: None,
        })
    }

    /// A client of the daemon whose API is at `url`, which knows its caller by `token`, and is known by a
    /// certificate of the authorities in `ca` (PEM), or of those that the system trusts.
    ///
    /// # Errors
    /// If one of these cannot be used.
    pub fn network(url: &str, token: Option<&str>, ca: Option<&[u8]>) -> ApiResult<Self> {
        let remedy = "write a URL such as https://host:9443";
        let wrong = |why: &str| ApiError::invalid(format!("{url:?} {why}"), remedy);
        let parsed = url::Url::parse(url).map_err(|_| wrong("is no URL"))?;
        let loopback = match parsed.host() {
            Some(url::Host::Domain(name)) => name == "localhost",
            Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
            Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
            None => return Err(wrong("names no host")),
        };
        match parsed.scheme() {
            "https" => {}
            "http" if loopback => {}
            "http" => return Err(wrong("would show the token to whoever listens in")),
            _ => return Err(wrong("is no https URL")),
        }
        if parsed.path() != "/" || parsed.query().is_some() || !parsed.username().is_empty() {
            return Err(wrong("has more than a host and a port"));
        }
        let mut http = builder();
        if let Some(ca) = ca {
            let certs = reqwest::Certificate::from_pem_bundle(ca).ok();
            let certs = certs.filter(|certs| !certs.is_empty()).ok_or_else(|| {
                let message = "the file of authorities holds no certificate";
                ApiError::invalid(message, "name one with certificates in PEM")
            })?;
            http = http.tls_certs_only(certs);
        }
        let bearer = |token: &str| {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| {
                let remedy = "name the file that `quarry token create` was printed to";
                ApiError::invalid("the token file holds no token", remedy)
            })?;
            value.set_sensitive(true);
            ApiResult::Ok(value)
        };
        Ok(Self {
            http: build(http)?,
            place: Place::Url(parsed.origin().ascii_serialization()),
            token: token.map(bearer).transpose()?,
        })
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        patience: Patience,
    ) -> ApiResult<Response> {
        let origin = match &self.place {
            Place::Socket(_) => "http://quarry",
            Place::Url(url) => url,
        };
        let mut request = self.http.request(method, format!("{origin}{path}"));
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token.clone());
        }
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

    /// Calls, and reads the answer.
    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        patience: Patience,
    ) -> ApiResult<T> {
        let response = self.call(method, path, body, patience).await?;
        self.json(response).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> ApiResult<T> {
        self.ask(Method::GET, path, None::<&()>, Patience::Answer)
            .await
    }

    /// A list, page by page.
    async fn list<T: Listed>(&self, path: &str, tenant: Option<&TenantName>) -> ApiResult<T> {
        let ask = |next: Option<String>| {
            let mut query = url::form_urlencoded::Serializer::new(String::new());
            if let Some(tenant) = tenant {
                query.append_pair("tenant", tenant.as_str());
            }
            if let Some(next) = next {
                query.append_pair("after", &next);
            }
            format!("{path}?{}", query.finish())
        };
        let mut all: T = self.get(&ask(None)).await?;
        while let Some(next) = all.next() {
            let page = self.get(&ask(Some(next))).await?;
            all.append(page);
        }
        Ok(all)
    }

    /// Makes what must not be there yet. (The API takes one that is the same for it: to people it is another.)
    async fn make<T: DeserializeOwned>(
        &self,
        path: &str,
        spec: &impl Serialize,
        patience: Patience,
        what: impl FnOnce() -> String,
    ) -> ApiResult<T> {
        let response = self.call(Method::POST, path, Some(spec), patience).await?;
        if response.status() == StatusCode::OK {
            let message = format!("there is a {} already", what());
            return Err(ApiError::new(Kind::Exists, message, "choose another name"));
        }
        self.json(response).await
    }

    async fn order(&self, method: Method, path: &str) -> ApiResult<()> {
        self.call(method, path, None::<&()>, Patience::Work)
            .await
            .map(drop)
    }

    /// Why nothing came back.
    fn lost(&self, error: &reqwest::Error) -> ApiError {
        let place = &self.place;
        if error.is_timeout() {
            let message = format!("the daemon at {place} does not answer");
            return ApiError::new(
                Kind::Unavailable,
                message,
                "see its log; it may be waiting for the object store",
            );
        }
        if error.is_connect() {
            if denied(error) {
                let message = format!("the daemon's socket {place} does not let you in");
                return ApiError::new(
                    Kind::Denied,
                    message,
                    "run this as root or as the daemon's user, or have access.operators name you",
                );
            }
            if let Some(why) = untrusted(error) {
                let message = format!("what answers at {place} is not known to be it: {why}");
                let remedy = "name the file of its certificate's authority with --ca";
                return ApiError::new(Kind::Denied, message, remedy);
            }
            let message = format!("no daemon answers at {place}");
            let remedy = match place {
                Place::Socket(_) => {
                    "start one with `quarry serve`, or name its socket with --socket"
                }
                Place::Url(_) => "check --url, and access.listen of the daemon",
            };
            return ApiError::new(Kind::Unavailable, message, remedy);
        }
        let message = format!("the daemon at {place} broke off");
        ApiError::new(
            Kind::Unavailable,
            message,
            "see its log, and check with `quarry status` whether it runs",
        )
    }

    fn stranger(&self, status: StatusCode) -> ApiError {
        let message = format!(
            "what answers at {} ({status}) does not speak as this client does",
            self.place
        );
        ApiError::internal(message).with_remedy(
            "check --socket or --url, and that client and daemon have the same version",
        )
    }

    /// Makes a tenant.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn create_tenant(&self, spec: &TenantSpec) -> ApiResult<TenantInfo> {
        let what = || format!("tenant {}", spec.name);
        self.make("/v1/tenants", spec, Patience::Work, what).await
    }

    /// One tenant, with what it has.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn show_tenant(&self, name: &TenantName) -> ApiResult<TenantInfo> {
        self.get(&format!("/v1/tenants/{name}")).await
    }

    /// Changes what a tenant may have.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn update_tenant(
        &self,
        name: &TenantName,
        patch: &serde_json::Map<String, serde_json::Value>,
    ) -> ApiResult<TenantInfo> {
        let path = format!("/v1/tenants/{name}");
        self.ask(Method::PATCH, &path, Some(patch), Patience::Work)
            .await
    }

    /// Holds a tenant's volumes up, or lets them go on.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn suspend_tenant(
        &self,
        name: &TenantName,
        how: Option<Suspended>,
    ) -> ApiResult<TenantInfo> {
        match how {
            Some(how) => {
                let path = format!("/v1/tenants/{name}/suspend");
                let spec = SuspendSpec { how };
                self.ask(Method::POST, &path, Some(&spec), Patience::Work)
                    .await
            }
            None => {
                let path = format!("/v1/tenants/{name}/resume");
                self.ask(Method::POST, &path, None::<&()>, Patience::Work)
                    .await
            }
        }
    }

    /// All tenants.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn list_tenants(&self) -> ApiResult<TenantList> {
        self.list("/v1/tenants", None).await
    }

    /// Removes a tenant without volumes, and purges its trash if `purge`.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn delete_tenant(&self, name: &TenantName, purge: bool) -> ApiResult<()> {
        self.order(Method::DELETE, &format!("/v1/tenants/{name}?purge={purge}"))
            .await
    }

    /// Makes a token.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn create_token(&self, spec: &TokenSpec) -> ApiResult<TokenMade> {
        self.ask(Method::POST, "/v1/tokens", Some(spec), Patience::Answer)
            .await
    }

    /// All tokens, or those of one tenant.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn list_tokens(&self, tenant: Option<&TenantName>) -> ApiResult<TokenList> {
        self.list("/v1/tokens", tenant).await
    }

    /// Takes a token back.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn revoke_token(&self, id: &str) -> ApiResult<()> {
        // Whatever was typed is one part of a path.
        let escaped: String = url::form_urlencoded::byte_serialize(id.as_bytes()).collect();
        self.order(Method::DELETE, &format!("/v1/tokens/{escaped}"))
            .await
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn create_volume(&self, spec: &VolumeSpec) -> ApiResult<VolumeInfo> {
        let what = || format!("volume {}", spec.volume());
        self.make("/v1/volumes", spec, Patience::Answer, what).await
    }

    /// All volumes, or those of one tenant.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn list_volumes(&self, tenant: Option<&TenantName>) -> ApiResult<VolumeList> {
        self.list("/v1/volumes", tenant).await
    }

    /// Up to `limit` volumes behind `after`, and behind what the next are.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn page_of_volumes(
        &self,
        limit: usize,
        after: Option<&str>,
    ) -> ApiResult<VolumeList> {
        self.get(&page_path("/v1/volumes", limit, after)).await
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
        self.ask(Method::POST, &path, Some(options), Patience::Work)
            .await
    }

    /// Detaches a volume.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn detach(&self, volume: &ImageRef) -> ApiResult<DetachInfo> {
        let path = format!("/v1/volumes/{volume}/detach");
        let response = self
            .call(Method::POST, &path, None::<&()>, Patience::Work)
            .await?;
        match response.status() {
            StatusCode::NO_CONTENT => Ok(DetachInfo::new(volume, None)),
            _ => self.json(response).await,
        }
    }

    /// Gives a volume another size.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn resize(&self, volume: &VolumeRef, spec: ResizeSpec) -> ApiResult<ResizeInfo> {
        let path = format!("/v1/volumes/{volume}/resize");
        self.ask(Method::POST, &path, Some(&spec), Patience::Work)
            .await
    }

    /// Sets how long what a volume needs no more is kept.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn retain(&self, volume: &VolumeRef, retain_ms: u64) -> ApiResult<RetainInfo> {
        let path = format!("/v1/volumes/{volume}/retain");
        let spec = RetainSpec { retain_ms };
        self.ask(Method::POST, &path, Some(&spec), Patience::Work)
            .await
    }

    /// Sets how fast a volume may be used.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn set_rates(&self, volume: &VolumeRef, rates: RatesSpec) -> ApiResult<RatesInfo> {
        let path = format!("/v1/volumes/{volume}/rates");
        self.ask(Method::PUT, &path, Some(&rates), Patience::Work)
            .await
    }

    /// Wraps a volume's data keys anew, or gives it a new one.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn rekey(&self, volume: &VolumeRef, spec: &RekeySpec) -> ApiResult<RekeyInfo> {
        let path = format!("/v1/volumes/{volume}/rekey");
        self.ask(Method::POST, &path, Some(spec), Patience::Work)
            .await
    }

    /// Takes the right to write from a host that is lost.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn release(&self, volume: &VolumeRef, spec: ReleaseSpec) -> ApiResult<ReleaseInfo> {
        let path = format!("/v1/volumes/{volume}/release");
        self.ask(Method::POST, &path, Some(&spec), Patience::Answer)
            .await
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
        self.ask(Method::POST, &path, Some(spec), Patience::Work)
            .await
    }

    /// Checks a volume in the store; ends when the answer is not waited for any more.
    ///
    /// # Errors
    /// The daemon's, or that there is none; that something is wrong with the volume is none.
    pub async fn verify(&self, volume: &ImageRef, spec: &VerifySpec) -> ApiResult<VerifyReport> {
        let path = format!("/v1/volumes/{volume}/verify");
        self.ask(Method::POST, &path, Some(spec), Patience::Work)
            .await
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
        let what = || format!("snapshot {snapshot}");
        self.make(&path, &spec, Patience::Work, what).await
    }

    /// A volume's snapshots, or all.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn list_snapshots(&self, volume: Option<&VolumeRef>) -> ApiResult<SnapshotList> {
        match volume {
            Some(volume) => {
                let path = format!("/v1/volumes/{volume}/snapshots");
                self.list(&path, None).await
            }
            None => self.list("/v1/snapshots", None).await,
        }
    }

    /// Up to `limit` snapshots behind `after`, of a volume or of all, and behind what the next are.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn page_of_snapshots(
        &self,
        volume: Option<&VolumeRef>,
        limit: usize,
        after: Option<&str>,
    ) -> ApiResult<SnapshotList> {
        let path = match volume {
            Some(volume) => format!("/v1/volumes/{volume}/snapshots"),
            None => "/v1/snapshots".to_owned(),
        };
        self.get(&page_path(&path, limit, after)).await
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
        let what = || format!("volume {}/{name}", snapshot.volume.tenant);
        self.make(&path, &spec, Patience::Work, what).await
    }

    /// Makes a volume what its snapshot is.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn rollback(&self, snapshot: &SnapRef) -> ApiResult<VolumeInfo> {
        let path = format!("{}/rollback", snapshot_path(snapshot));
        self.ask(Method::POST, &path, None::<&()>, Patience::Work)
            .await
    }

    /// Fetches a volume into the cache; ends when the answer is not waited for any more.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn warm(&self, volume: &VolumeRef, spec: &WarmSpec) -> ApiResult<WarmReport> {
        let path = format!("/v1/volumes/{volume}/warm");
        self.ask(Method::POST, &path, Some(spec), Patience::Work)
            .await
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
        self.ask(Method::POST, &path, Some(spec), Patience::Work)
            .await
    }

    /// Makes a clone need nothing of its parent; ends when the answer is not waited for any more.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn flatten(&self, volume: &VolumeRef) -> ApiResult<MoveReport> {
        let path = format!("/v1/volumes/{volume}/flatten");
        self.ask(Method::POST, &path, None::<&()>, Patience::Work)
            .await
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
        self.ask(Method::POST, &path, None::<&()>, Patience::Answer)
            .await
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
        self.ask(Method::DELETE, &path, None::<&()>, Patience::Work)
            .await
    }

    /// What is in the trash, of one tenant or of all.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn list_trash(&self, tenant: Option<&TenantName>) -> ApiResult<TrashList> {
        self.list("/v1/trash", tenant).await
    }

    /// Brings a volume back from the trash.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn restore(&self, spec: &RestoreSpec) -> ApiResult<VolumeInfo> {
        self.ask(
            Method::POST,
            "/v1/trash/restore",
            Some(spec),
            Patience::Work,
        )
        .await
    }

    /// Deletes volumes of the trash for good.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn purge_trash(&self, spec: &PurgeSpec) -> ApiResult<PurgeReport> {
        self.ask(Method::POST, "/v1/trash/purge", Some(spec), Patience::Work)
            .await
    }

    /// What is not as it should be around the daemon.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn doctor(&self) -> ApiResult<DoctorReport> {
        let nothing: Option<&()> = None;
        self.ask(Method::POST, "/v1/doctor", nothing, Patience::Work)
            .await
    }

    /// That the daemon runs.
    ///
    /// # Errors
    /// That there is none, or that it cannot be reached.
    pub async fn reach(&self) -> ApiResult<()> {
        let nothing: Option<&()> = None;
        self.call(Method::GET, "/healthz", nothing, Patience::Answer)
            .await
            .map(drop)
    }

    /// How the daemon does.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn status(&self) -> ApiResult<StatusInfo> {
        self.get("/v1/status").await
    }

    /// What goes on.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn activity(&self) -> ApiResult<Activity> {
        self.get("/v1/activity").await
    }

    /// All metrics, in Prometheus' text format.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn metrics_text(&self) -> ApiResult<String> {
        let response = self
            .call(Method::GET, "/metrics", None::<&()>, Patience::Answer)
            .await?;
        response.text().await.map_err(|error| self.lost(&error))
    }
}

fn page_path(path: &str, limit: usize, after: Option<&str>) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    query.append_pair("limit", &limit.to_string());
    if let Some(after) = after {
        query.append_pair("after", after);
    }
    format!("{path}?{}", query.finish())
}

fn snapshot_path(snapshot: &SnapRef) -> String {
    let SnapRef { volume, name } = snapshot;
    format!("/v1/volumes/{volume}/snapshots/{name}")
}

fn builder() -> reqwest::ClientBuilder {
    // The library wants one, even for plain HTTP on a unix socket.
    crate::store::install_crypto();
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIME)
}

fn build(builder: reqwest::ClientBuilder) -> ApiResult<reqwest::Client> {
    let built = builder.build();
    built.map_err(|error| ApiError::internal(format!("the HTTP client cannot start: {error}")))
}

/// Why a server's certificate is not taken, if that is why.
fn untrusted(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return Some(tls.to_string());
    }
    // What is within an I/O error is not its source.
    let within = error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::get_ref);
    match within {
        Some(within) => untrusted(within),
        None => error.source().and_then(untrusted),
    }
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
