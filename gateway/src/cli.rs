//! The command line: a client of the control plane and nothing more, but for `serve`, `demo`,
//! `config` and `key`, which need no daemon, and for `import` and `export`, which also read and write volumes by NBD.
//!
//! Owns the flags, the form of what is printed, and the exit codes: 0 done, 1 failed, 2 misused, 78 misconfigured.
//! Every failure is one sentence on standard error that ends in what to do; with `--output json`
//! standard output bears it too. What was asked for goes to standard output, progress never.

mod args;
mod attachment;
mod background;
mod bundle;
mod chores;
mod config;
mod copying;
mod csi;
mod data_keys;
mod demo;
mod doctor;
mod ensure;
mod export;
mod failure;
mod import;
mod key;
mod limit;
mod logging;
mod output;
#[cfg(test)]
mod pages;
mod progress;
mod release;
mod rescue;
mod serve;
mod snapshot;
mod status;
mod table;
mod tenant;
mod tenant_args;
mod token;
mod top;
mod trash;
mod verify;
mod volume;
mod warm;

use std::ffi::OsString;
use std::future::Future;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory as _, FromArgMatches as _};

pub use args::{Cli, Command, Format};
pub use failure::Failure;
use output::Console;

use crate::control::Client;

/// Exit code of a call that failed.
const FAILED: u8 = 1;
/// Exit code of a call that makes no sense.
const MISUSED: u8 = 2;
/// Exit code of a call whose configuration cannot be used: for service managers, which need not try again. `EX_CONFIG`.
const MISCONFIGURED: u8 = 78;

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    if let Some(code) = crate::ublk::apart::main(std::env::args_os()) {
        return code;
    }
    ExitCode::from(run(
        std::env::args_os(),
        &mut io::stdout(),
        &mut io::stderr(),
    ))
}

/// The program with its arguments (the first is its name) and outputs given; answers its exit code.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match parse(Cli::command(), &args) {
        Ok(cli) => cli,
        Err(error) => return misused(&error, wants_json(&args), out, err),
    };
    let mut console = Console::new(cli.output, out);
    match dispatch(cli, &mut console) {
        Ok(()) => 0,
        Err(failure) => {
            console.fail(&failure, err);
            match failure.kind.as_str() {
                Failure::CONFIG => MISCONFIGURED,
                Failure::USAGE => MISUSED,
                _ => FAILED,
            }
        }
    }
}

/// The flags, and the variables that stand in for them.
///
/// clap does not tell a flag from its variable where two exclude each other, so this does.
fn parse(mut command: clap::Command, args: &[OsString]) -> Result<Cli, clap::Error> {
    let matches = command.try_get_matches_from_mut(args)?;
    let mut cli = Cli::from_arg_matches(&matches)?;
    let is_said = |flag: &str| matches.value_source(flag) == Some(ValueSource::CommandLine);
    match (is_said("socket"), is_said("url")) {
        (true, true) => {
            let words = "--socket and --url name two daemons: give one of them";
            return Err(command.error(ErrorKind::ArgumentConflict, words));
        }
        (true, false) => cli.url = None,
        (false, _) => {}
    }
    Ok(cli)
}

/// Help, the version and wrong usage, as clap words them.
fn misused(error: &clap::Error, json: bool, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    if !error.use_stderr() {
        // Nobody is left to tell when this cannot be written.
        let _ = write!(out, "{}", error.render());
        let _ = out.flush();
        return 0;
    }
    let _ = write!(err, "{}", error.render());
    if json {
        let failure = Failure::new(Failure::USAGE, usage_words(error), "see `quarry --help`");
        Console::new(Format::Json, out).fail(&failure, &mut io::sink());
    }
    MISUSED
}

/// What clap says is wrong, on one line: without the form of the command, and where to find more.
fn usage_words(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "a command, or what it needs, is missing".to_owned();
    }
    let text = error.render().to_string();
    let is_said = |line: &&str| {
        let more = ["Usage: ", "For more information"];
        !more.iter().any(|start| line.starts_with(start))
    };
    let lines = text.lines().take_while(is_said);
    let words = lines.flat_map(str::split_whitespace).collect::<Vec<_>>();
    let words = words.join(" ");
    words.trim_start_matches("error: ").to_owned()
}

/// Whether JSON was asked for in a command line that cannot be parsed.
fn wants_json(args: &[OsString]) -> bool {
    let pair = |pair: &[OsString]| {
        pair.first().is_some_and(|a| a == "--output") && pair.get(1).is_some_and(|b| b == "json")
    };
    args.iter().any(|arg| arg == "--output=json") || args.windows(2).any(pair)
}

fn dispatch(cli: Cli, console: &mut Console<'_>) -> Result<(), Failure> {
    let Cli {
        socket,
        url,
        token_file,
        ca,
        command,
        output: _,
    } = cli;
    let client = || match &url {
        None => Client::new(socket.clone().unwrap_or_else(quarry_config::client_socket))
            .map_err(Failure::from),
        Some(url) => {
            let token = token_file.as_deref().map(read).transpose()?;
            let ca = ca.as_deref().map(read).transpose()?;
            let token = token.as_deref().map(str::trim);
            Client::network(url, token, ca.as_ref().map(String::as_bytes)).map_err(Failure::from)
        }
    };
    match command {
        Command::Serve(flags) => serve::run(*flags, socket),
        Command::Demo(flags) => demo::run(flags),
        Command::Config(command) => config::run(command, console),
        Command::Key(command) => key::run(&command, console),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "quarry", &mut script);
            console.raw(&script)
        }
        Command::Tenant(command) => wait(tenant::run(&client()?, command, console)),
        Command::Token(command) => wait(token::run(&client()?, command, console)),
        Command::Volume(command) => wait(volume::run(&client()?, command, console)),
        Command::Snapshot(command) => wait(snapshot::run(&client()?, command, console)),
        Command::Trash(command) => wait(trash::run(&client()?, command, console)),
        Command::Doctor => wait(doctor::run(&client()?, console)),
        Command::Top(flags) => wait(top::run(&client()?, flags, console)),
        Command::SupportBundle(flags) => {
            let secrets: Vec<&Path> = token_file.as_deref().into_iter().collect();
            wait(bundle::run(&client()?, flags, &secrets, console))
        }
        Command::Status => wait(status::run(&client()?, console)),
        Command::Csi(flags) => {
            let token = token_file.as_deref().map(read).transpose()?;
            let ca = ca.as_deref().map(read).transpose()?;
            csi::run(flags, client()?, token.as_deref(), ca.as_deref())
        }
    }
}

/// A small file that the caller named.
fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| {
        let message = format!("{} cannot be read: {error}", path.display());
        Failure::new("invalid", message, "name another file")
    })
}

/// Runs a client's call: one thread is plenty.
fn wait(call: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            Failure::new(
                "internal",
                format!("cannot start: {error}"),
                "raise the limits of this process",
            )
        })?
        .block_on(call)
}

#[cfg(test)]
mod tests;
