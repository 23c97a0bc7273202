//! Taking a volume from a host that is lost, over the wire and at its route.

use axum::response::Json;
use quarry_objfmt::CacheId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::access::Allowed;
use super::api::{Body, Refused, Volume, json, volume_of, whole};
use super::openapi::Uuid;

/// Request: take the right to write from a host, and give it to nobody.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReleaseSpec {
    /// Its cache's id, as `owner` of the volume tells it: one that came after it loses nothing.
    #[schemars(with = "Uuid")]
    pub from: CacheId,
}

/// Answer: what came of it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ReleaseInfo {
    /// `tenant/name`.
    pub volume: String,
    /// Whether that host had it until now; if not, nobody has.
    pub released: bool,
}

pub(super) async fn release(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<Json<ReleaseInfo>, Refused> {
    let volume = volume_of(path)?;
    let spec: ReleaseSpec = json(body)?;
    let call = async move { engine.release(&volume, spec).await };
    Ok(Json(whole(call).await?))
}
