//! The table and a scrape.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::*;
use crate::latency::{Latencies, Timed};
use crate::store::{Operation, Outcome, StoreTimes};
use prometheus::proto::MetricType;

/// A scrape of [`VOLUMES_MAX`] busy volumes and as many tenants is written within this time, and twenty times that without
/// optimisation, where it is no measure.
const SCRAPE_MAX: Duration =
    Duration::from_millis(if cfg!(debug_assertions) { 2_000 } else { 100 });

/// The most bytes of it.
const SCRAPE_BYTES_MAX: usize = 24 << 20;

fn volume(name: &str) -> VolumeSample {
    let mut latencies = Latencies::default();
    for kind in Timed::REQUESTS {
        latencies.record(kind, 250_000);
    }
    latencies.record(Timed::Held, 2_000_000);
    let stats = VolumeStats {
        read_bytes: 4096,
        rpo_ms: 1500,
        held_ms: 250,
        stalled: 1,
        epoch: 3,
        ..VolumeStats::default()
    };
    VolumeSample {
        tenant: "acme".to_owned(),
        volume: name.to_owned(),
        via: "ublk",
        mode: "zero copy",
        latencies,
        stats,
    }
}

fn tenant(name: &str) -> TenantSample {
    let stats = TenantStats {
        limit_iops: 5000,
        suspended: 1,
        cost_micros: 1_500,
        usage: Some(crate::control::TenantUsage {
            volumes: 2,
            ..Default::default()
        }),
        volumes_max: Some(3),
        times: StoreTimes::of_one(Duration::from_millis(7)),
        ..TenantStats::default()
    };
    let call = |(operation, outcome): (Operation, Outcome)| StoreCall {
        operation: operation.as_str(),
        outcome: outcome.as_str(),
        count: 7,
    };
    let calls = Operation::ALL.map(|operation| call((operation, Outcome::Ok)));
    TenantSample {
        tenant: name.to_owned(),
        calls: calls.to_vec(),
        stats,
    }
}

fn snapshot() -> Snapshot {
    let call = StoreCall {
        operation: "get",
        outcome: "ok",
        count: 7,
    };
    Snapshot {
        volumes: vec![volume("db")],
        tenants: vec![tenant("acme")],
        uploads: UploadStats {
            slow: 3,
            ..UploadStats::default()
        },
        reactors: vec![
            ReactorCounts::default(),
            ReactorCounts {
                requests: 9,
                ..ReactorCounts::default()
            },
        ],
        cache: CacheStats {
            size_bytes: 1 << 30,
            segments: [
                ("free", 1),
                ("open", 2),
                ("filling", 3),
                ("dirty", 4),
                ("clean", 5),
            ],
            ..CacheStats::default()
        },
        store: StoreStats {
            calls: vec![call],
            ..StoreStats::default()
        },
        audit: AuditStats {
            lines: 9,
            failures: 1,
        },
        trash: TrashStats {
            volumes: 2,
            ..TrashStats::default()
        },
        daemon: DaemonStats {
            ready: 1,
            certificate_expiry_s: Some(1_800_000_000),
            volumes_left_out: 5,
            ..DaemonStats::default()
        },
        nbd: ClientStats {
            connections: 3,
            refused: [0, 2, 0, 0],
        },
        traces: Some(TraceStats {
            exported: 8,
            dropped: [4, 0],
            failures: 1,
        }),
        process: ProcessStats {
            cpu: Duration::from_millis(250),
            ..ProcessStats::default()
        },
    }
}

#[test]
fn scrape_of_a_snapshot_has_its_values_and_labels() {
    let text = render(&snapshot());
    for line in [
        "# TYPE quarry_volume_read_bytes_total counter",
        r#"quarry_volume_read_bytes_total{tenant="acme",volume="db"} 4096"#,
        r#"quarry_volume_rpo_seconds{tenant="acme",volume="db"} 1.5"#,
        r#"quarry_volume_stalled{tenant="acme",volume="db"} 1"#,
        r#"quarry_volume_epoch{tenant="acme",volume="db"} 3"#,
        "# TYPE quarry_volume_request_duration_seconds histogram",
        r#"quarry_volume_request_duration_seconds_bucket{tenant="acme",volume="db",op="write",le="0.000128"} 0"#,
        r#"quarry_volume_request_duration_seconds_bucket{tenant="acme",volume="db",op="write",le="0.000256"} 1"#,
        r#"quarry_volume_request_duration_seconds_bucket{tenant="acme",volume="db",op="read_miss",le="+Inf"} 1"#,
        r#"quarry_volume_request_duration_seconds_sum{tenant="acme",volume="db",op="flush"} 0.00025"#,
        r#"quarry_volume_request_duration_seconds_count{tenant="acme",volume="db",op="read_hit"} 1"#,
        r#"quarry_volume_held_duration_seconds_sum{tenant="acme",volume="db"} 0.002"#,
        r#"quarry_tenant_store_cost_total{tenant="acme"} 0.0015"#,
        r#"quarry_tenant_store_requests_total{tenant="acme",operation="create",outcome="ok"} 7"#,
        r#"quarry_tenant_store_request_duration_seconds_bucket{tenant="acme",le="0.01"} 1"#,
        r#"quarry_tenant_store_request_duration_seconds_sum{tenant="acme"} 0.007"#,
        r#"quarry_tenant_volumes{tenant="acme"} 2"#,
        r#"quarry_tenant_volumes_max{tenant="acme"} 3"#,
        r#"quarry_volume_held_seconds_total{tenant="acme",volume="db"} 0.25"#,
        r#"quarry_tenant_limit_iops{tenant="acme"} 5000"#,
        r#"quarry_tenant_suspended{tenant="acme"} 1"#,
        "quarry_uploads_slow 3",
        r#"quarry_volume_info{tenant="acme",volume="db",via="ublk",mode="zero copy"} 1"#,
        r#"quarry_reactor_requests_total{reactor="1"} 9"#,
        "quarry_cache_size_bytes 1073741824",
        r#"quarry_cache_segments{state="filling"} 3"#,
        "quarry_trash_volumes 2",
        "quarry_traces_exported_total 8",
        r#"quarry_traces_dropped_total{reason="queue"} 4"#,
        "quarry_trace_export_failures_total 1",
        "quarry_audit_lines_total 9",
        "quarry_audit_failures_total 1",
        "quarry_nbd_connections 3",
        r#"quarry_nbd_refused_total{reason="gave_way"} 2"#,
        r#"quarry_store_requests_total{operation="get",outcome="ok"} 7"#,
        r#"quarry_left_out{what="volumes"} 5"#,
        "quarry_ready 1",
        "quarry_certificate_expiry_timestamp_seconds 1800000000",
        "process_cpu_seconds_total 0.25",
        concat!(
            "quarry_build_info{version=\"",
            env!("CARGO_PKG_VERSION"),
            "\"} 1"
        ),
    ] {
        assert!(
            text.lines().any(|l| l == line),
            "{line} is missing in\n{text}"
        );
    }
    // What is not known is not there, rather than 0.
    assert!(!text.contains("quarry_tenant_snapshots_max"));
}

#[test]
fn scrape_without_volumes_is_still_valid() {
    let text = render(&Snapshot::default());
    assert!(
        text.contains("quarry_build_info") && !text.contains("quarry_volume_"),
        "{text}"
    );
}

#[test]
fn table_keeps_to_the_conventions() {
    let mut seen = BTreeSet::new();
    for (_, _, part) in &PARTS {
        assert!(part.is_sorted_by_key(|d| d.name), "to be found by name");
    }
    for definition in table() {
        let name = definition.name;
        assert!(seen.insert(name), "{name} is there twice");
        assert!(name.starts_with("quarry_") || name.starts_with("process_"));
        assert_eq!(
            name.ends_with("_total"),
            definition.kind == MetricType::COUNTER,
            "{name}"
        );
        if definition.kind == MetricType::HISTOGRAM {
            assert!(name.ends_with("_seconds"), "{name}");
        }
        let help = definition.help;
        assert!(help.ends_with('.'), "{name}");
        assert!(
            !help.contains(['\\', '\n', '|']),
            "{name}: for text and page"
        );
        assert!(!name.contains("_ms"), "{name} is not in base units");
    }
    // Nothing may be taken for a histogram's series.
    for name in &seen {
        for suffix in ["_bucket", "_sum", "_count"] {
            assert!(!name.ends_with(suffix), "{name}");
        }
    }
}

#[test]
fn scrape_of_as_many_volumes_as_it_may_show_is_quick_and_bounded() {
    let mut all = snapshot();
    all.volumes = (0..VOLUMES_MAX)
        .map(|n| volume(&format!("volume-with-a-usual-name-{n:04}")))
        .collect();
    all.tenants = (0..TENANTS_MAX)
        .map(|n| tenant(&format!("tenant-{n:04}")))
        .collect();
    let mut times = Vec::new();
    let mut text = String::new();
    for _ in 0..5 {
        let begun = Instant::now();
        text = render(&all);
        times.push(begun.elapsed());
    }
    let best = times.iter().min().unwrap();
    let series = text.lines().filter(|line| !line.starts_with('#')).count();
    println!("{series} series, {} bytes, {best:?} at best", text.len());
    assert!(*best < SCRAPE_MAX, "{times:?}");
    assert!(text.len() < SCRAPE_BYTES_MAX, "{} bytes", text.len());
    let mut of_a_volume = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some((_, rest)) = line.split_once("volume=\"") {
            *of_a_volume.entry(rest.split('"').next()).or_insert(0) += 1;
        }
    }
    assert!(of_a_volume.values().all(|series| *series <= 145));
}
