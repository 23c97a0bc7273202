//! Putting a volume's data in order and cutting its tie to its parent, over the wire and at their routes.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::Json;
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};

use super::api::{Body, Refused, Volume, json, volume_of};
use super::{ApiResult, Engine};

/// Request: put a volume's data in the order of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompactSpec {
    /// Also what snapshots need, which then takes its space twice.
    pub held: bool,
}

/// Answer: what was moved, or is so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MoveReport {
    /// Bytes of the volume's data that were moved.
    pub moved_bytes: u64,
    /// Bytes that the passes so far are to move.
    pub total_bytes: u64,
    /// Passes over the volume.
    pub passes: u64,
}

pub(super) fn routes() -> Router<Arc<dyn Engine>> {
    let path = |action: &str| format!("/v1/volumes/{{tenant}}/{{volume}}/{action}");
    Router::new()
        .route(&path("compact"), get(progress).post(compact))
        .route(&path("flatten"), post(flatten))
}

async fn compact(
    State(engine): State<Arc<dyn Engine>>,
    path: Volume,
    body: Body,
) -> Result<Json<MoveReport>, Refused> {
    let volume = volume_of(path)?;
    let spec: CompactSpec = json(body)?;
    // A client that hangs up ends it; what was moved stays moved.
    Ok(Json(engine.compact(&volume, &spec).await?))
}

async fn flatten(
    State(engine): State<Arc<dyn Engine>>,
    path: Volume,
) -> ApiResult<Json<MoveReport>> {
    Ok(Json(engine.flatten(&volume_of(path)?).await?))
}

async fn progress(
    State(engine): State<Arc<dyn Engine>>,
    path: Volume,
) -> ApiResult<Json<MoveReport>> {
    Ok(Json(engine.move_progress(&volume_of(path)?).await?))
}
