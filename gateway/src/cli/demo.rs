//! `quarry demo`: the whole of it is in [`crate::demo`].

use quarry_config::LogFormat;

use super::args::DemoFlags;
use super::serve::on_runtime;
use super::{Failure, logging};
use crate::demo::DemoOptions;

/// Runs the demo; it prints what it does itself.
pub(super) fn run(flags: DemoFlags) -> Result<(), Failure> {
    logging::start(LogFormat::Human, "warn")?;
    let options = DemoOptions {
        input: flags.input,
        ..DemoOptions::default()
    };
    if on_runtime(crate::demo::run(options))? {
        Ok(())
    } else {
        Err(Failure::new(
            "failed",
            "the demo did not pass",
            "see what it printed above",
        ))
    }
}
