//! Wrapping a volume's keys anew, over the wire and at its route.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::Json;
use axum::routing::post;
use quarry_objfmt::KeyName;
use serde::{Deserialize, Serialize};

use super::Engine;
use super::api::{Body, Refused, Volume, json, volume_of, whole};

/// Request: wrap the data keys of a volume anew.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RekeySpec {
    /// By this key; none: the tenant's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyName>,
}

/// Answer: by what they are wrapped now.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RekeyInfo {
    /// `tenant/name`.
    pub volume: String,
    /// The key's name.
    pub key: String,
    /// How many data keys: a clone has those of its parents too.
    pub keys: u64,
}

pub(super) fn routes() -> Router<Arc<dyn Engine>> {
    Router::new().route("/v1/volumes/{tenant}/{volume}/rekey", post(rekey))
}

async fn rekey(
    State(engine): State<Arc<dyn Engine>>,
    path: Volume,
    body: Body,
) -> Result<Json<RekeyInfo>, Refused> {
    let volume = volume_of(path)?;
    let spec: RekeySpec = json(body)?;
    let call = async move { engine.rekey(&volume, &spec).await };
    Ok(Json(whole(call).await?))
}
