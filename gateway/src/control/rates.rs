//! How fast a volume may be used, over the wire and at its route.

use axum::response::Json;
use quarry_objfmt::record::Rates;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::access::Allowed;
use super::api::{Body, Refused, Volume, json, volume_of, whole};
use super::{ApiError, ApiResult};

/// Request and answer: how fast requests are taken. What is not said is not limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RatesSpec {
    /// Requests a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Requests that may come at once after a rest; none: a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
    /// Bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes: Option<u64>,
    /// Bytes that may come at once after a rest; none: a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst_bytes: Option<u64>,
}

impl From<RatesSpec> for Rates {
    fn from(spec: RatesSpec) -> Self {
        Self {
            iops: spec.iops,
            iops_burst: spec.iops_burst,
            bandwidth_bytes: spec.bandwidth_bytes,
            bandwidth_burst_bytes: spec.bandwidth_burst_bytes,
        }
    }
}

impl From<Rates> for RatesSpec {
    fn from(rates: Rates) -> Self {
        Self {
            iops: rates.iops,
            iops_burst: rates.iops_burst,
            bandwidth_bytes: rates.bandwidth_bytes,
            bandwidth_burst_bytes: rates.bandwidth_burst_bytes,
        }
    }
}

impl RatesSpec {
    /// Refuses rates at which nothing passes, and bursts of no rate.
    pub(super) fn check(&self) -> ApiResult<()> {
        let all = [
            (self.iops, self.iops_burst, "iops"),
            (
                self.bandwidth_bytes,
                self.bandwidth_burst_bytes,
                "bandwidth",
            ),
        ];
        for (rate, burst, name) in all {
            if rate == Some(0) || burst == Some(0) {
                let message = format!("a rate or burst of 0 ({name}) would let nothing pass");
                let remedy = "choose at least 1, or leave it out for no limit";
                return Err(ApiError::invalid(message, remedy));
            }
            if rate.is_none() && burst.is_some() {
                let message = format!("a burst without a rate ({name})");
                return Err(ApiError::invalid(message, "give the rate too"));
            }
        }
        Ok(())
    }
}

/// Answer: how fast a volume may be used now.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RatesInfo {
    /// `tenant/name`.
    pub volume: String,
    /// So fast.
    pub rates: RatesSpec,
}

/// What limits do to an attached volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LimitsInfo {
    /// What all volumes of its tenant on this host may do together.
    pub tenant_rates: RatesSpec,
    /// Requests a second let through just now; 0 without limits.
    pub iops_now: u64,
    /// Bytes a second let through just now; 0 without limits.
    pub bandwidth_bytes_now: u64,
    /// Requests held now.
    pub held: u64,
    /// For how long the oldest of them; none: there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_held_ms: Option<u64>,
    /// Requests that were held.
    pub held_total: u64,
    /// For how long, all together; those that are held now not counted.
    pub held_ms: u64,
}

pub(super) async fn set_rates(
    Allowed(engine): Allowed,
    path: Volume,
    body: Body,
) -> Result<Json<RatesInfo>, Refused> {
    let volume = volume_of(path)?;
    let rates: RatesSpec = json(body)?;
    rates.check()?;
    let call = async move { engine.set_rates(&volume, rates).await };
    Ok(Json(whole(call).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_that_let_nothing_pass_are_refused_and_others_are_not() {
        let spec = |json: &str| serde_json::from_str::<RatesSpec>(json).unwrap();
        for json in [
            "{}",
            r#"{"iops":1}"#,
            r#"{"iops":5,"iops_burst":9,"bandwidth_bytes":1}"#,
        ] {
            spec(json).check().unwrap();
        }
        for json in [
            r#"{"iops":0}"#,
            r#"{"iops_burst":5}"#,
            r#"{"iops":5,"iops_burst":0}"#,
            r#"{"bandwidth_bytes":0}"#,
            r#"{"iops":5,"bandwidth_burst_bytes":5}"#,
        ] {
            assert!(spec(json).check().is_err(), "{json}");
        }
        assert!(serde_json::from_str::<RatesSpec>(r#"{"iop":5}"#).is_err());
    }

    #[test]
    fn rates_pass_to_the_record_and_back() {
        let spec = RatesSpec {
            iops: Some(1),
            iops_burst: Some(2),
            bandwidth_bytes: Some(3),
            bandwidth_burst_bytes: Some(4),
        };
        assert_eq!(RatesSpec::from(Rates::from(spec)), spec);
    }
}
