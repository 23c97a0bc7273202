//! Signs of life for calls that take long: on standard error, and only if that is a terminal.

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::table::bytes;
use crate::control::{ApiResult, Client, ImageRef};

/// How often the spinner turns.
const TURN: Duration = Duration::from_millis(100);
/// How often the daemon is asked how far it is.
const ASK: Duration = Duration::from_millis(500);

/// A copy whose length is known.
const COPY_BAR: &str = "{prefix} [{wide_bar}] {percent}% {binary_bytes} of {binary_total_bytes}, \
    {binary_bytes_per_sec}, {eta} left";
/// A copy of who knows how much.
const STREAM_BAR: &str = "{spinner} {prefix} {binary_bytes}, {binary_bytes_per_sec}";

pub(super) fn spinner(doing: &str) -> ProgressBar {
    // Hidden by the library when standard error is no terminal.
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(doing.to_owned());
    bar.enable_steady_tick(TURN);
    bar
}

/// A bar for a copy of `total` bytes, if that is known, which starts at `start`: bytes, rate and time left.
pub(super) fn copying(
    doing: &str,
    volume: &impl Display,
    total: Option<u64>,
    start: u64,
) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), COPY_BAR),
        None => (ProgressBar::new_spinner(), STREAM_BAR),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(format!("{doing} {volume}"));
    bar.set_position(start);
    bar.reset_eta();
    bar
}

/// Waits for `call` while a spinner turns.
pub(super) async fn shown<T>(
    doing: &str,
    volume: &impl Display,
    call: impl Future<Output = ApiResult<T>>,
) -> ApiResult<T> {
    turning(&format!("{doing} {volume}"), call).await
}

/// As [`shown`], for what is not about one volume.
pub(super) async fn turning<T>(
    doing: &str,
    call: impl Future<Output = ApiResult<T>>,
) -> ApiResult<T> {
    let bar = spinner(doing);
    let result = call.await;
    bar.finish_and_clear();
    result
}

/// Waits for `call`, which checks a volume, and shows how far it is.
pub(super) async fn verifying<T>(
    client: &Client,
    volume: &ImageRef,
    call: impl Future<Output = ApiResult<T>>,
) -> ApiResult<T> {
    let bar = spinner(&format!("verifying {volume}"));
    if bar.is_hidden() {
        return call.await;
    }
    let ask = async || {
        if let Ok(Ok(now)) = timeout(ASK, client.verify_progress(volume)).await {
            let found = match now.findings {
                0 => String::new(),
                findings => format!(", {findings} findings"),
            };
            bar.set_message(format!(
                "{} of {} chunks, {} read{found}",
                now.chunks,
                now.chunks_total,
                bytes(now.read_bytes)
            ));
        }
    };
    let result = asking(ask, call).await;
    bar.finish_and_clear();
    result
}

/// Waits for `call`; if the bar can be seen, asks now and then how far it is.
pub(super) async fn asking_for<T>(
    bar: &ProgressBar,
    ask: impl AsyncFn(),
    call: impl Future<Output = ApiResult<T>>,
) -> ApiResult<T> {
    if bar.is_hidden() {
        return call.await;
    }
    asking(ask, call).await
}

/// Waits for `call`, and does `ask` now and then.
async fn asking<T>(ask: impl AsyncFn(), call: impl Future<Output = ApiResult<T>>) -> ApiResult<T> {
    let mut ticks = interval(ASK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut call = std::pin::pin!(call);
    loop {
        let asked = async {
            ticks.tick().await;
            ask().await;
        };
        tokio::select! {
            result = &mut call => return result,
            () = asked => {}
        }
    }
}

/// Waits for `call`, which uploads what is dirty, and shows how much still is.
pub(super) async fn uploading<T>(
    doing: &str,
    client: &Client,
    volume: &ImageRef,
    call: impl Future<Output = ApiResult<T>>,
) -> ApiResult<T> {
    let bar = spinner(&format!("{doing} {volume}"));
    if bar.is_hidden() {
        return call.await;
    }
    let ask = async || {
        if let Ok(Ok(info)) = timeout(ASK, client.show_volume(volume)).await {
            let waits = if info.stalled {
                ", the object store does not answer"
            } else {
                ""
            };
            bar.set_message(format!("{} to upload{waits}", bytes(info.dirty_bytes)));
        }
    };
    let result = asking(ask, call).await;
    bar.finish_and_clear();
    result
}
