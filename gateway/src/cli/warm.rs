//! `quarry volume warm` and `quarry volume evict`.

use std::str::FromStr;

use quarry_config::Size;

use super::Failure;
use super::args::WarmFlags;
use super::output::Console;
use super::progress::{asking_for, spinner};
use super::table::bytes;
use crate::control::{Client, EvictInfo, VolumeRef, WarmReport, WarmSpec};

/// `FIRST-END`, such as `0-10GiB`: bytes of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    start: u64,
    end: u64,
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let place = |text: &str| match text.parse::<u64>() {
            Ok(bytes) => Ok(bytes),
            Err(_) => text
                .parse::<Size>()
                .map(Size::bytes)
                .map_err(|e| e.to_string()),
        };
        let (start, end) = text
            .split_once('-')
            .ok_or("write two places in the volume, such as 0-10GiB")?;
        let (start, end) = (place(start)?, place(end)?);
        if start < end {
            Ok(Self { start, end })
        } else {
            Err("it ends before it begins".to_owned())
        }
    }
}

pub(super) async fn warm(
    client: &Client,
    flags: WarmFlags,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let WarmFlags {
        volume,
        range,
        limit,
    } = flags;
    let spec = WarmSpec {
        start: range.map_or(0, |span| span.start),
        end: range.map(|span| span.end),
        limit_bytes: limit.map(Size::bytes),
    };
    let bar = spinner(&format!("warming {volume}"));
    let ask = async || {
        if let Ok(now) = client.warm_progress(&volume).await {
            let (looked, total) = (bytes(now.looked_bytes), bytes(now.total_bytes));
            let fetched = bytes(now.fetched_bytes);
            bar.set_message(format!("{looked} of {total}, {fetched} fetched"));
        }
    };
    let warmed = asking_for(&bar, ask, client.warm(&volume, &spec)).await;
    bar.finish_and_clear();
    console.show(&warmed?, |report| warm_text(&volume, report))
}

fn warm_text(volume: &VolumeRef, report: &WarmReport) -> String {
    let limited = if report.limited {
        format!(
            "; that is the limit, after {} of {}",
            bytes(report.looked_bytes),
            bytes(report.total_bytes)
        )
    } else {
        String::new()
    };
    let damaged = if report.damaged {
        format!("; something could not be had: see `quarry volume show {volume}`")
    } else {
        String::new()
    };
    format!(
        "{volume}: {} were fetched into the cache{limited}{damaged}",
        bytes(report.fetched_bytes)
    )
}

pub(super) fn evict_text(info: &EvictInfo) -> String {
    format!(
        "{}: {} on the cache device and {} in memory were dropped; all of it is in the store",
        info.volume,
        bytes(info.cache_bytes),
        bytes(info.ram_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_is_two_places_in_order() {
        let span = |text: &str| text.parse::<Span>();
        let (start, end) = (0, 10 << 30);
        assert_eq!(span("0-10GiB"), Ok(Span { start, end }));
        assert_eq!(
            span("512-1024"),
            Ok(Span {
                start: 512,
                end: 1024
            })
        );
        for wrong in ["", "10GiB", "10GiB-1GiB", "1-1", "a-b", "1-2-3"] {
            assert!(span(wrong).is_err(), "{wrong}");
        }
    }
}
