//! The log: on standard error, for people or as JSON.

use std::io::{self, IsTerminal as _};

use quarry_config::LogFormat;
use tracing_subscriber::EnvFilter;

use super::Failure;

/// Starts the log. `RUST_LOG` wins over `filter`.
pub(super) fn start(format: LogFormat, filter: &str) -> Result<(), Failure> {
    let (name, filter) = match std::env::var("RUST_LOG") {
        Ok(wish) if !wish.is_empty() => ("RUST_LOG", wish),
        _ => ("daemon.log_filter", filter.to_owned()),
    };
    let filter = EnvFilter::try_new(&filter).map_err(|error| {
        let message = format!("{name} = {filter:?} is no log filter: {error}");
        Failure::new(
            "config",
            message,
            "write info, debug or filters such as info,quarry_gateway=debug",
        )
    })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    let started = match format {
        LogFormat::Human => {
            let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            log.with_ansi(colours).try_init()
        }
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| {
        Failure::new(
            "internal",
            format!("the log cannot start: {error}"),
            "report this",
        )
    })
}
