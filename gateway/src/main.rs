//! The `quarry` program: everything is in the library, so that tests can call it.

use std::process::ExitCode;

fn main() -> ExitCode {
    quarry_gateway::cli::main()
}
