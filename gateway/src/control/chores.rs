//! Putting a volume's data in order and cutting its tie to its parent, over the wire and at their routes.

use axum::response::Json;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ApiResult;
use super::access::Allowed;
use super::api::{Body, Refused, Volume, json, volume_of};

/// Request: put a volume's data in the order of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CompactSpec {
    /// Also what snapshots need, which then takes its space twice.
    pub held: bool,
}

/// Answer: what was moved, or is so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MoveReport {
    /// Bytes of the volume's data that were moved.
    pub moved_bytes: u64,
    /// Bytes that the passes so far are to move.
    pub total_bytes: u64,
    /// Passes over the volume.
    pub passes: u64,
}

pub(super) async fn compact(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<Json<MoveReport>, Refused> {
    let volume = volume_of(path)?;
    let spec: CompactSpec = json(body)?;
    // A client that hangs up ends it; what was moved stays moved.
    Ok(Json(engine.compact(&volume, &spec).await?))
}

pub(super) async fn flatten(Allowed(engine): Allowed, path: Volume) -> ApiResult<Json<MoveReport>> {
    Ok(Json(engine.flatten(&volume_of(path)?).await?))
}

pub(super) async fn progress(
    Allowed(engine): Allowed,
    path: Volume,
) -> ApiResult<Json<MoveReport>> {
    Ok(Json(engine.move_progress(&volume_of(path)?).await?))
}
