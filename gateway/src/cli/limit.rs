//! `quarry volume limit`, and rates as they are said and shown.

use quarry_config::Size;

use super::Failure;
use super::args::{LimitFlags, RateFlags};
use super::output::Console;
use super::progress::shown;
use super::table::{bytes, span_ms};
use crate::control::{Client, LimitsInfo, RatesSpec};

/// `200MiB/s`, or `200MiB`.
pub(super) fn bandwidth(text: &str) -> Result<Size, String> {
    let size = text.strip_suffix("/s").unwrap_or(text);
    size.parse::<Size>().map_err(|error| error.to_string())
}

impl From<RateFlags> for RatesSpec {
    fn from(flags: RateFlags) -> Self {
        Self {
            iops: flags.iops,
            iops_burst: flags.iops_burst,
            bandwidth_bytes: flags.bandwidth.map(Size::bytes),
            bandwidth_burst_bytes: flags.bandwidth_burst.map(Size::bytes),
        }
    }
}

pub(super) async fn run(
    client: &Client,
    flags: LimitFlags,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let LimitFlags {
        volume,
        rates,
        none: _,
    } = flags;
    let call = client.set_rates(&volume, rates.into());
    let limited = shown("limiting", &volume, call).await?;
    console.show(&limited, |limited| {
        let rates = rates_text(&limited.rates);
        format!(
            "{}: {}",
            limited.volume,
            rates.unwrap_or_else(|| "not limited".to_owned())
        )
    })
}

/// None without a limit.
pub(super) fn rates_text(rates: &RatesSpec) -> Option<String> {
    let burst = |burst: Option<String>| burst.map(|b| format!(" (burst {b})")).unwrap_or_default();
    let iops = rates.iops.map(|iops| {
        format!(
            "{iops} IOPS{}",
            burst(rates.iops_burst.map(|b| b.to_string()))
        )
    });
    let bandwidth = rates.bandwidth_bytes.map(|bandwidth| {
        format!(
            "{}/s{}",
            bytes(bandwidth),
            burst(rates.bandwidth_burst_bytes.map(bytes))
        )
    });
    let all: Vec<String> = iops.into_iter().chain(bandwidth).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// What limits do just now; none if they have done nothing.
pub(super) fn held_text(limits: &LimitsInfo) -> Option<String> {
    (limits.held_total > 0).then(|| {
        let oldest = limits
            .oldest_held_ms
            .map(|ms| format!(", the oldest for {}", span_ms(ms)));
        format!(
            "{} requests now{}; {} so far, those let through for {}; {} IOPS, {}/s let through now",
            limits.held,
            oldest.unwrap_or_default(),
            limits.held_total,
            span_ms(limits.held_ms),
            limits.iops_now,
            bytes(limits.bandwidth_bytes_now)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_read_with_and_without_its_second() {
        for text in ["200MiB/s", "200MiB"] {
            assert_eq!(bandwidth(text), Ok(Size::new(200 << 20)));
        }
        assert!(bandwidth("fast").is_err());
    }

    #[test]
    fn held_text_says_for_how_long_what_is_held_now_waits() {
        let mut limits = LimitsInfo::default();
        assert_eq!(held_text(&limits), None);
        limits.held_total = 1;
        let passed = held_text(&limits).unwrap();
        assert!(passed.starts_with("0 requests now; 1 so far"), "{passed}");
        limits.held = 1;
        limits.oldest_held_ms = Some(3000);
        let text = held_text(&limits).unwrap();
        let oldest = format!("1 requests now, the oldest for {};", span_ms(3000));
        assert!(text.starts_with(&oldest), "{text}");
    }

    #[test]
    fn rates_text_says_what_is_limited_and_nothing_else() {
        assert_eq!(rates_text(&RatesSpec::default()), None);
        let rates = RatesSpec {
            iops: Some(500),
            bandwidth_bytes: Some(1 << 20),
            bandwidth_burst_bytes: Some(4 << 20),
            ..RatesSpec::default()
        };
        assert_eq!(rates_text(&rates).unwrap(), "500 IOPS, 1MiB/s (burst 4MiB)");
    }
}
