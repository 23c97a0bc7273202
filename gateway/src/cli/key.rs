//! `quarry key`: makes keys for a keyring.

use serde::Serialize;

use super::Failure;
use super::args::KeyCommand;
use super::output::Console;
use crate::keys::keyring_line;

#[derive(Serialize)]
struct Generated<'a> {
    name: String,
    line: &'a str,
}

pub(super) fn run(command: &KeyCommand, console: &mut Console<'_>) -> Result<(), Failure> {
    let KeyCommand::Generate { name } = command;
    let line = keyring_line(name);
    let generated = Generated {
        name: name.to_string(),
        line: &line,
    };
    console.show(&generated, |generated| generated.line.to_owned())
}
