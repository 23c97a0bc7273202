//! How long a volume's past is kept, over the wire and at its route.

use std::time::Duration;

use axum::response::Json;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::access::Allowed;
use super::api::{Body, Refused, Volume, json, volume_of, whole};
use super::{ApiError, ApiResult};
use crate::backend::RETAIN_MS_MAX;

/// Request: keep what a volume needs no more for so long.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetainSpec {
    /// Milliseconds; 0: no longer than the store's readers need it.
    pub retain_ms: u64,
}

/// Answer: how long it is kept now.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RetainInfo {
    /// `tenant/name`.
    pub volume: String,
    /// Milliseconds.
    pub retain_ms: u64,
}

/// Refuses what nobody will live to see.
pub(super) fn check_retain(retain_ms: u64) -> ApiResult<()> {
    if retain_ms <= RETAIN_MS_MAX {
        return Ok(());
    }
    let words = |ms| humantime::format_duration(Duration::from_millis(ms));
    let message = format!("what a volume was cannot be kept for {}", words(retain_ms));
    let remedy = format!("choose at most {}", words(RETAIN_MS_MAX));
    Err(ApiError::invalid(message, remedy))
}

pub(super) async fn retain(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<Json<RetainInfo>, Refused> {
    let volume = volume_of(path)?;
    let RetainSpec { retain_ms } = json(body)?;
    check_retain(retain_ms)?;
    let call = async move { engine.retain(&volume, retain_ms).await };
    Ok(Json(whole(call).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_too_long_is_refused_with_both_spans_in_years() {
        assert!(check_retain(RETAIN_MS_MAX).is_ok());
        let error = check_retain(2 * RETAIN_MS_MAX).unwrap_err();
        assert!(error.message.ends_with("kept for 200years"), "{error}");
        assert_eq!(error.remedy, "choose at most 100years");
    }
}
