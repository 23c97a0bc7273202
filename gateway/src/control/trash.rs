//! The trash, over the wire and at its routes.

use axum::response::Json;
use quarry_objfmt::{TenantName, VolumeId, VolumeName};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::access::Allowed;
use super::api::{Body, Query, Refused, json, whole};
use super::openapi::{Name, Uuid};
use super::page::listed;
use super::page::{TenantPageQuery, tenant_page};
use super::{ApiError, ApiResult, VolumeInfo, VolumeRef};

/// A deleted volume.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TrashInfo {
    /// Whose.
    pub tenant: String,
    /// What it was called.
    pub name: String,
    /// Its id.
    pub id: String,
    /// When it was deleted.
    pub deleted_ms: u64,
    /// When it is purged, by this daemon's settings.
    pub purge_ms: u64,
    /// Its size; none if its head is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Its objects in the store; none if its head is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<u64>,
    /// What is different with it, in a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Answer: the trash.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct TrashList {
    /// By tenant, and then the oldest first.
    pub trash: Vec<TrashInfo>,
    /// What to ask for the next page after; none: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

listed!(TrashList, trash);

/// Request: bring a volume back, by its name or by its id.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RestoreSpec {
    /// What it was called: `tenant/name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// Its id.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Uuid>")]
    pub id: Option<VolumeId>,
    /// What it is to be called; none: as before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Name>")]
    pub name: Option<VolumeName>,
}

/// A deleted volume as people name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TrashRef {
    /// By what it was called.
    Name(VolumeRef),
    /// By its id.
    Id(VolumeId),
    /// By its id, if it is this tenant's.
    Of(TenantName, VolumeId),
}

impl std::str::FromStr for TrashRef {
    type Err = ApiError;

    fn from_str(text: &str) -> ApiResult<Self> {
        match VolumeId::parse(text) {
            Ok(id) => Ok(Self::Id(id)),
            Err(_) => text.parse().map(Self::Name),
        }
    }
}

impl RestoreSpec {
    /// What brings `which` back, as `name`.
    #[must_use]
    pub fn new(which: &TrashRef, name: Option<VolumeName>) -> Self {
        let (volume, id) = match which {
            TrashRef::Name(volume) => (Some(volume.to_string()), None),
            TrashRef::Id(id) | TrashRef::Of(_, id) => (None, Some(*id)),
        };
        Self { volume, id, name }
    }

    fn which(&self) -> ApiResult<TrashRef> {
        match (&self.volume, self.id) {
            (Some(volume), None) => volume.parse().map(TrashRef::Name),
            (None, Some(id)) => Ok(TrashRef::Id(id)),
            _ => Err(ApiError::invalid(
                "it must be said which volume is to be restored",
                "give its name or its id, one of them",
            )),
        }
    }
}

/// Request: delete volumes of the trash for good.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PurgeSpec {
    /// Only this tenant's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Name>")]
    pub tenant: Option<TenantName>,
    /// This one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Uuid>")]
    pub id: Option<VolumeId>,
    /// All.
    pub all: bool,
    /// Those that have been there for so long.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub older_than_ms: Option<u64>,
}

impl PurgeSpec {
    fn check(&self) -> ApiResult<()> {
        let said = [self.id.is_some(), self.all, self.older_than_ms.is_some()];
        if said.into_iter().filter(|said| *said).count() == 1 {
            return Ok(());
        }
        Err(ApiError::invalid(
            "it must be said which volumes are to be purged",
            "give an id, --all or --older-than, one of them",
        ))
    }
}

/// Answer: what was purged.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct PurgeReport {
    /// Volumes of which nothing is left.
    pub purged: Vec<TrashInfo>,
    /// Those that were to be purged and are not; `problem` says why.
    pub kept: Vec<TrashInfo>,
    /// Objects deleted.
    pub objects: u64,
}

pub(super) async fn list(
    Allowed(engine): Allowed,
    asked: Query<TenantPageQuery>,
) -> ApiResult<Json<TrashList>> {
    let (tenant, page) = tenant_page(asked)?;
    let all = engine.list_trash(tenant.as_ref()).await?;
    let place = |t: &TrashInfo| format!("{} {:020} {}", t.tenant, t.deleted_ms, t.id);
    let (trash, next) = page.cut(all, place);
    Ok(Json(TrashList { trash, next }))
}

pub(super) async fn restore(
    Allowed(engine): Allowed,
    body: Body,
) -> Result<Json<VolumeInfo>, Refused> {
    let spec: RestoreSpec = json(body)?;
    let which = spec.which()?;
    let call = async move { engine.restore(&which, spec.name.as_ref()).await };
    Ok(Json(whole(call).await?))
}

pub(super) async fn purge(
    Allowed(engine): Allowed,
    body: Body,
) -> Result<Json<PurgeReport>, Refused> {
    let spec: PurgeSpec = json(body)?;
    spec.check()?;
    let call = async move { engine.purge_trash(&spec).await };
    Ok(Json(whole(call).await?))
}
