//! Filling and emptying the cache, over the wire and at their routes.

use axum::response::Json;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ApiResult;
use super::access::Allowed;
use super::api::{Body, Refused, Volume, json, volume_of};

/// Request: fetch what the cache lacks of a volume into it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WarmSpec {
    /// The first byte of the volume.
    pub start: u64,
    /// The byte behind the last; none: the volume's end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<u64>,
    /// Fetch no more than this, but for the step under way; none: as much as the cache device has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<u64>,
}

/// Answer: what was fetched, or is so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct WarmReport {
    /// Bytes of the volume that were looked at.
    pub looked_bytes: u64,
    /// Bytes of the volume that are to be looked at.
    pub total_bytes: u64,
    /// Bytes asked of the store.
    pub fetched_bytes: u64,
    /// Whether it ended at its limit.
    pub limited: bool,
    /// Whether something could not be had; the volume's problem says what.
    pub damaged: bool,
}

/// Answer: what was dropped from the cache.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct EvictInfo {
    /// `tenant/name`.
    pub volume: String,
    /// Bytes on the cache device.
    pub cache_bytes: u64,
    /// Bytes in memory.
    pub ram_bytes: u64,
}

pub(super) async fn warm(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<Json<WarmReport>, Refused> {
    let volume = volume_of(path)?;
    let spec: WarmSpec = json(body)?;
    // Changes nothing that must be finished: a client that hangs up ends it.
    Ok(Json(engine.warm(&volume, &spec).await?))
}

pub(super) async fn progress(
    Allowed(engine): Allowed,
    path: Volume,
) -> ApiResult<Json<WarmReport>> {
    Ok(Json(engine.warm_progress(&volume_of(path)?).await?))
}

pub(super) async fn evict(Allowed(engine): Allowed, path: Volume) -> ApiResult<Json<EvictInfo>> {
    Ok(Json(engine.evict(&volume_of(path)?).await?))
}
