//! docs/METRICS.md, made from the table.

use std::fmt::Write as _;

use super::{PARTS, TENANTS_MAX, VOLUMES_MAX};
use crate::latency::BOUNDS_US;
use crate::store::STORE_BOUNDS_MS;

const HEAD: &str = "# Metrics

`GET /metrics` on the control socket and, with `daemon.listen` (`quarry serve --listen`), on a TCP port, in Prometheus' text format.
`dashboards/` has dashboards, recording rules and alerts made of them.

This page is made from the table in `gateway/src/metrics`: change that, then run
`QUARRY_WRITE_METRICS=1 cargo test -p quarry-gateway --lib page_that_is_checked_in`.
";

fn page() -> String {
    let mut page = HEAD.to_owned();
    let list = |bounds: &mut dyn Iterator<Item = f64>| {
        let bounds: Vec<_> = bounds.map(|bound| bound.to_string()).collect();
        bounds.join(", ")
    };
    let volume = list(&mut BOUNDS_US.iter().map(|us| *us as f64 / 1_000_000.0));
    let store = list(&mut STORE_BOUNDS_MS.iter().map(|ms| *ms as f64 / 1000.0));
    write!(
        page,
        "
What is counted starts at 0 with the daemon, or when a volume is attached: use `rate()` and `increase()`. Gauges are as of the
scrape. The hit ratio of reads, by bytes, is the rate of `quarry_volume_hit_bytes_total` divided by that and the rate of
`quarry_volume_miss_bytes_total`.

A scrape shows {VOLUMES_MAX} volumes, those attached for the longest time, and {TENANTS_MAX} tenants; `quarry_left_out` says how many
more there are. A histogram of a kind of request is there once there was one.

Times of requests go from the round of the reactor's loop in which they were taken up to the one in which they were done: neither
what they waited in the kernel's or the socket's queue is in them, nor what the last round itself took.

Bounds of the volumes' histograms, in seconds: {volume}.

Bounds of the stores' histograms, in seconds: {store}.
"
    )
    .unwrap();
    for (title, about, definitions) in &PARTS {
        write!(page, "\n## {title}\n").unwrap();
        if !about.is_empty() {
            write!(page, "\n{about}\n").unwrap();
        }
        page.push_str("\n| name | type | labels | what |\n|---|---|---|---|\n");
        for d in *definitions {
            let labels: Vec<_> = d.labels().iter().map(|l| format!("`{l}`")).collect();
            let (labels, kind) = (labels.join(", "), format!("{:?}", d.kind).to_lowercase());
            writeln!(page, "| `{}` | {kind} | {labels} | {} |", d.name, d.help).unwrap();
        }
    }
    page
}

/// With `QUARRY_WRITE_METRICS=1` it writes the file instead.
#[test]
fn page_that_is_checked_in_is_what_the_table_makes() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/METRICS.md");
    if std::env::var_os("QUARRY_WRITE_METRICS").is_some() {
        std::fs::write(path, page()).unwrap();
    }
    let there = std::fs::read_to_string(path).unwrap_or_default();
    assert!(there == page(), "run this test with QUARRY_WRITE_METRICS=1");
}
