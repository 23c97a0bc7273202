//! `quarry status`: how the daemon does; a failure while it is not ready, for scripts that wait.

use super::Failure;
use super::output::Console;
use super::table::{bytes, fields, span_ms, time_ms};
use crate::control::{Client, StatusInfo};

pub(super) async fn run(client: &Client, console: &mut Console<'_>) -> Result<(), Failure> {
    let status = client.status().await?;
    let ready = status.ready;
    if ready || !console.is_json() {
        console.show(&status, text)?;
    }
    if ready {
        return Ok(());
    }
    let why = status.not_ready.as_deref().unwrap_or("it has not said why");
    Err(Failure::new(
        "unavailable",
        format!("the daemon is not ready: {why}"),
        "see its log",
    ))
}

fn text(status: &StatusInfo) -> String {
    let StatusInfo { store, cache, .. } = status;
    let store_state = match (store.healthy, store.failing_ms) {
        (true, _) if status.ready => " answers".to_owned(),
        // It may not have been asked yet, but for the first look at it.
        (true, _) => String::new(),
        (false, Some(ms)) => format!(" has been failing for {}", span_ms(ms)),
        (false, None) => " does not answer".to_owned(),
    };
    let error = store
        .last_error
        .as_ref()
        .filter(|_| !store.healthy)
        .map(|e| format!(": {e}"))
        .unwrap_or_default();
    let cache_use = format!(
        "{}{}: {} of {} dirty (at most {}), {} clean",
        cache.path,
        if cache.encrypted { " (encrypted)" } else { "" },
        bytes(cache.dirty_bytes),
        bytes(cache.size_bytes),
        bytes(cache.dirty_max_bytes),
        bytes(cache.clean_bytes)
    );
    let volumes = match status.volumes_failing {
        0 => format!("{} attached", status.volumes_attached),
        failing => format!(
            "{} attached, {failing} with a problem",
            status.volumes_attached
        ),
    };
    let there = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    fields(&[
        (
            "daemon",
            Some(format!(
                "{} on {}, process {}",
                status.version, status.host, status.pid
            )),
        ),
        ("running since", time_ms(status.started_ms)),
        (
            "ready",
            Some(if status.ready { "yes" } else { "no" }.to_owned()),
        ),
        ("store", Some(format!("{}{store_state}{error}", store.url))),
        ("cache", Some(cache_use)),
        ("volumes", Some(volumes)),
        ("ublk", there(&status.ublk)),
        ("nbd socket", there(&status.nbd_socket)),
        ("audit log", status.audit_problem.clone()),
    ])
}
