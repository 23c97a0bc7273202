//! Changing a volume's keys, over the wire and at its route.

use axum::response::Json;
use quarry_objfmt::KeyName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::access::Allowed;
use super::api::{Body, Refused, Volume, json, volume_of, whole};
use super::openapi::Name;

/// Request: wrap the data keys of a volume anew, or give it a new one.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RekeySpec {
    /// By this key; none: the tenant's.
    #[schemars(with = "Option<Name>")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyName>,
    /// Make a new data key too, which encrypts what is written from now on; what is there is encrypted anew by compaction.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub data: bool,
}

/// A data key of a volume, wrapped.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DataKeyInfo {
    /// Which of the volume's it is; the last encrypts what is written.
    pub generation: u16,
    /// The name of the key that wraps it.
    pub key: String,
    /// Chunks that are encrypted with it, needed or not deleted yet; known where the volume is attached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunks: Option<u64>,
    /// Their bytes in the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<u64>,
    /// Snapshots that need some of them: as long as they are there, it is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<String>,
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
    /// Its own.
    pub data_keys: Vec<DataKeyInfo>,
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
