//! Wrapping a volume's keys anew, over the wire and at its route.

use axum::response::Json;
use quarry_objfmt::KeyName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::access::Allowed;
use super::api::{Body, Refused, Volume, json, volume_of, whole};
use super::openapi::Name;

/// Request: wrap the data keys of a volume anew.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RekeySpec {
    /// By this key; none: the tenant's.
    #[schemars(with = "Option<Name>")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyName>,
}

/// Answer: by what they are wrapped now.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RekeyInfo {
    /// `tenant/name`.
    pub volume: String,
    /// The key's name.
    pub key: String,
    /// How many data keys: a clone has those of its parents too.
    pub keys: u64,
}

pub(super) async fn rekey(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<Json<RekeyInfo>, Refused> {
    let volume = volume_of(path)?;
    let spec: RekeySpec = json(body)?;
    let call = async move { engine.rekey(&volume, &spec).await };
    Ok(Json(whole(call).await?))
}
