//! What the daemon finds wrong around it, over the wire and at its route.

use axum::response::Json;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ApiResult;
use super::access::Allowed;
use super::api::whole;

/// What a check came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    #[default]
    Ok,
    /// It works, and could be better.
    Warning,
    /// Something does not work, or will not.
    Failed,
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Check {
    /// What.
    pub what: String,
    /// What it came to.
    pub verdict: Verdict,
    /// What was found.
    pub finding: String,
    /// What to change; empty where that is in the finding, or nothing.
    pub remedy: String,
}

impl Check {
    /// A check.
    pub fn new(
        what: impl Into<String>,
        verdict: Verdict,
        finding: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            what: what.into(),
            verdict,
            finding: finding.into(),
            remedy: remedy.into(),
        }
    }

    /// A check of something that is as it should be.
    pub fn ok(what: impl Into<String>, finding: impl Into<String>) -> Self {
        Self::new(what, Verdict::Ok, finding, "")
    }
}

/// Answer: all checks.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct DoctorReport {
    /// In the order in which they were made.
    pub checks: Vec<Check>,
}

pub(super) async fn doctor(Allowed(engine): Allowed) -> ApiResult<Json<DoctorReport>> {
    let call = async move { engine.doctor().await };
    Ok(Json(whole(call).await?))
}
