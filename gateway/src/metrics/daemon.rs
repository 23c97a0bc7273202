//! Metrics of the daemon itself: what it is, its reactors, trash, audit log, and its process.

use std::fs;
use std::time::Duration;

use super::definition::{Definition, Source, count, counter, gauge, of};
use crate::nbd::Refused;
use crate::trace::Lost;

/// What the daemon does with the trash.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TrashStats {
    /// Volumes in it, of all tenants, as of the last look.
    pub volumes: u64,
    /// Volumes purged by this daemon.
    pub purged_volumes: u64,
    /// Objects deleted for that.
    pub purged_objects: u64,
}

/// What the audit log counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AuditStats {
    /// Lines written.
    pub lines: u64,
    /// Lines that could not be written.
    pub failures: u64,
}

/// What a reactor counts, and its gauges.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReactorCounts {
    /// Rounds of its loop.
    pub batches: u64,
    /// Requests completed.
    pub requests: u64,
    /// Volumes on it.
    pub volumes: u64,
    /// Fetches that it began by itself.
    pub fetches: u64,
    /// Those of them that it handed over.
    pub fetches_handed_over: u64,
}

/// How the daemon is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DaemonStats {
    /// 1 while it serves and its store answers, else 0.
    pub ready: u64,
    /// What is attached.
    pub volumes_attached: u64,
    /// What is to be attached, and is not.
    pub volumes_waiting: u64,
    /// When the certificate of the API ends, in seconds since 1970, if there is one that can be read.
    pub certificate_expiry_s: Option<u64>,
    /// Attached volumes that the snapshot tells nothing of.
    pub volumes_left_out: u64,
    /// Tenants that the snapshot tells nothing of.
    pub tenants_left_out: u64,
}

/// What the kernel says of the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProcessStats {
    /// CPU time.
    pub cpu: Duration,
    /// Memory in RAM.
    pub resident_bytes: u64,
    /// Address space.
    pub virtual_bytes: u64,
    /// Threads.
    pub threads: u64,
    /// Open file descriptors.
    pub open_fds: u64,
    /// How many there may be.
    pub max_fds: u64,
    /// When it was started, in milliseconds since 1970.
    pub started_ms: u64,
}

/// Ticks a second in `/proc/PID/stat`, whatever the kernel's own clock does.
const USER_HZ: u64 = 100;

impl ProcessStats {
    /// Those of this process; what the kernel does not tell is 0.
    #[must_use]
    pub fn of_this(started_ms: u64) -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The directory is open itself while it is read.
        let fds = fs::read_dir("/proc/self/fd").map_or(0, |fds| fds.count().saturating_sub(1));
        let max_fds = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        Self {
            cpu: cpu_time(&stat),
            resident_bytes: field(&status, "VmRSS:") << 10,
            virtual_bytes: field(&status, "VmSize:") << 10,
            threads: field(&status, "Threads:"),
            open_fds: fds as u64,
            max_fds: max_fds.unwrap_or(u64::MAX),
            started_ms,
        }
    }
}

/// A number of `/proc/PID/status`.
fn field(status: &str, name: &str) -> u64 {
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix(name));
    let number = value.and_then(|value| value.split_whitespace().next());
    number
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}

/// The CPU time in `/proc/PID/stat`: fields 14 and 15, counted behind the name, which may hold anything.
fn cpu_time(stat: &str) -> Duration {
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    let times = behind.split_whitespace().skip(11).take(2);
    let ticks: u64 = times.filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * (1000 / USER_HZ))
}

/// By name.
pub(super) static TABLE: &[Definition] = &[
    counter(
        "process_cpu_seconds_total",
        "CPU time of the daemon, its own and the kernel's for it.",
        Source::Process(|stats| stats.cpu.as_secs_f64()),
    ),
    gauge(
        "process_max_fds",
        "How many file descriptors the daemon may have.",
        of!(Process.max_fds),
    ),
    gauge(
        "process_open_fds",
        "File descriptors that the daemon has.",
        of!(Process.open_fds),
    ),
    gauge(
        "process_resident_memory_bytes",
        "Memory of the daemon that is in RAM.",
        of!(Process.resident_bytes),
    ),
    gauge(
        "process_start_time_seconds",
        "When the daemon was started, since 1970.",
        of!(Process.started_ms in ms),
    ),
    gauge(
        "process_threads",
        "Threads of the daemon.",
        of!(Process.threads),
    ),
    gauge(
        "process_virtual_memory_bytes",
        "Address space of the daemon.",
        of!(Process.virtual_bytes),
    ),
    counter(
        "quarry_audit_failures_total",
        "Lines of the audit log that could not be written.",
        of!(Audit.failures),
    ),
    counter(
        "quarry_audit_lines_total",
        "Lines written to the audit log.",
        of!(Audit.lines),
    ),
    gauge(
        "quarry_build_info",
        "Version of the daemon, as a label of the constant 1.",
        Source::Own(&["version"], |_, family| {
            family.sample(&[env!("CARGO_PKG_VERSION")], 1.0);
        }),
    ),
    gauge(
        "quarry_certificate_expiry_timestamp_seconds",
        "When the certificate of the TCP listeners ends, since 1970; absent without one.",
        Source::Own(&[], |all, family| {
            if let Some(seconds) = all.daemon.certificate_expiry_s {
                family.sample(&[], count(seconds));
            }
        }),
    ),
    gauge(
        "quarry_left_out",
        "What has no metrics of its own, for there are more than a scrape may show: volumes, tenants.",
        Source::Own(&["what"], |all, family| {
            family.sample(&["volumes"], count(all.daemon.volumes_left_out));
            family.sample(&["tenants"], count(all.daemon.tenants_left_out));
        }),
    ),
    gauge(
        "quarry_nbd_connections",
        "Connections of NBD clients past their handshake.",
        Source::Own(&[], |all, family| {
            family.sample(&[], count(all.nbd.connections));
        }),
    ),
    counter(
        "quarry_nbd_refused_total",
        "NBD clients that were sent away: their handshake took too long (`slow`) or gave way to a newer one (`gave_way`), or there were too many connections, of all (`connections`) or of their tenant (`tenant`).",
        Source::Own(&["reason"], |all, family| {
            for (why, refused) in Refused::ALL.iter().zip(all.nbd.refused) {
                family.sample(&[why.as_str()], count(refused));
            }
        }),
    ),
    counter(
        "quarry_reactor_batches_total",
        "Rounds of the reactor's loop: one submission each.",
        of!(Reactor.batches),
    ),
    counter(
        "quarry_reactor_fetches_handed_over_total",
        "Of the reactor's own fetches, those that another thread brought to their end: no connection was there, or the answer took long.",
        of!(Reactor.fetches_handed_over),
    ),
    counter(
        "quarry_reactor_fetches_total",
        "Fetches of a single frame that the reactor began on its own thread.",
        of!(Reactor.fetches),
    ),
    counter(
        "quarry_reactor_requests_total",
        "Requests completed by the reactor.",
        of!(Reactor.requests),
    ),
    gauge(
        "quarry_reactor_volumes",
        "Volumes on the reactor.",
        of!(Reactor.volumes),
    ),
    gauge(
        "quarry_ready",
        "1 once the daemon's store was found fit and all that is to be attached was attached or tried, as /readyz says; a store that goes away later does not change it.",
        of!(Daemon.ready),
    ),
    counter(
        "quarry_trace_export_failures_total",
        "Calls of the collector that failed, those that were tried again too.",
        Source::Own(&[], |all, family| {
            if let Some(traces) = all.traces {
                family.sample(&[], count(traces.failures));
            }
        }),
    ),
    counter(
        "quarry_traces_dropped_total",
        "Traces that the collector did not get: too many waited for it (`queue`), or it did not take them in time, or at all (`collector`).",
        Source::Own(&["reason"], |all, family| {
            for (why, dropped) in Lost::ALL
                .iter()
                .zip(all.traces.iter().flat_map(|t| t.dropped))
            {
                family.sample(&[why.as_str()], count(dropped));
            }
        }),
    ),
    counter(
        "quarry_traces_exported_total",
        "Traces that the collector took; like the others of traces absent without one.",
        Source::Own(&[], |all, family| {
            if let Some(traces) = all.traces {
                family.sample(&[], count(traces.exported));
            }
        }),
    ),
    counter(
        "quarry_trash_purged_objects_total",
        "Objects of purged volumes deleted by this daemon.",
        of!(Trash.purged_objects),
    ),
    counter(
        "quarry_trash_purged_volumes_total",
        "Volumes purged by this daemon.",
        of!(Trash.purged_volumes),
    ),
    gauge(
        "quarry_trash_volumes",
        "Deleted volumes in the store that can be restored, as of the last look.",
        of!(Trash.volumes),
    ),
    gauge(
        "quarry_volumes_attached",
        "Volumes, and snapshots and past states of them, that are attached.",
        of!(Daemon.volumes_attached),
    ),
    gauge(
        "quarry_volumes_waiting",
        "What is to be attached, and is not yet.",
        of!(Daemon.volumes_waiting),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_tells_of_itself() {
        let stats = ProcessStats::of_this(7);
        assert!(stats.resident_bytes > 1 << 20 && stats.virtual_bytes >= stats.resident_bytes);
        assert!(stats.threads > 0 && stats.open_fds > 2 && stats.max_fds > stats.open_fds);
        assert_eq!(stats.started_ms, 7);
    }

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "7 (a ) 9 (b) S 1 1 1 0 -1 4194560 9 0 0 0 150 25 0 0 20 0 3 0";
        assert_eq!(cpu_time(stat), Duration::from_millis(1750));
        assert_eq!(cpu_time("nonsense"), Duration::ZERO);
    }
}
