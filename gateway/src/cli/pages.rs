//! docs/CLI.md and docs/CONFIGURATION.md, made from the commands and from the table of keys; and what all documents say of both,
//! held to them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command, CommandFactory as _, Parser as _};
use quarry_config::Config;

use super::args::Cli;

const COMMANDS: &str = "# Commands

This page is made from the commands: change those in `gateway/src/cli`, then run
`QUARRY_WRITE_PAGES=1 cargo test -p quarry-gateway --lib pages_that_are_checked_in`. The package has the same as man pages.

Every command takes:

";

const SETTINGS: &str = "# Configuration

A TOML file, `quarry serve --config FILE`. All of it is optional but `store.url`, and that may be said as `--store`. Flags win over the file, and the file over the `AWS_*` variables. Unknown keys are
refused, with the nearest one that there is. `quarry config check FILE` checks one; `quarry config example` prints what follows.

This page is made from `config/src/keys.rs`, as [commands](CLI.md) is.
";

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// `--size <SIZE>`, or `<VOLUME>`.
fn spelled(arg: &Arg) -> String {
    let value = || {
        let names = arg.get_value_names().unwrap_or_default();
        names.first().map(ToString::to_string).unwrap_or_default()
    };
    let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    match arg.get_long() {
        Some(long) if takes_value => format!("--{long} <{}>", value()),
        Some(long) => format!("--{long}"),
        None if arg.is_required_set() => format!("<{}>", value()),
        None => format!("[{}]", value()),
    }
}

fn describe(page: &mut String, arg: &Arg) {
    let help = arg.get_long_help().or_else(|| arg.get_help());
    let help = help.map(ToString::to_string).unwrap_or_default();
    let paragraphs = help.split("\n\n");
    let sentences = paragraphs.map(|told| told.trim_end_matches('.').replace('\n', " ") + ".");
    let help = sentences.collect::<Vec<_>>().join(" ");
    write!(page, "- `{}`: {help}", spelled(arg)).unwrap();
    let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    let values = arg.get_possible_values();
    if takes_value && !values.is_empty() && !arg.is_hide_possible_values_set() {
        let names: Vec<_> = values
            .iter()
            .map(|v| format!("`{}`", v.get_name()))
            .collect();
        write!(page, " One of {}.", names.join(", ")).unwrap();
    }
    if let [default] = arg.get_default_values()
        && takes_value
    {
        write!(page, " Default: `{}`.", default.display()).unwrap();
    }
    if let Some(variable) = arg.get_env() {
        write!(page, " Variable: `{}`.", variable.display()).unwrap();
    }
    page.push('\n');
}

fn own_arguments(command: &Command) -> impl Iterator<Item = &Arg> {
    let known = ["help", "version"];
    command
        .get_arguments()
        .filter(move |arg| !arg.is_global_set() && !known.contains(&arg.get_id().as_str()))
        .filter(|arg| !arg.is_hide_set())
}

fn commands_below(page: &mut String, command: &Command, path: &str) {
    for command in command.get_subcommands() {
        if command.get_name() == "help" || command.is_hide_set() {
            continue;
        }
        let path = format!("{path} {}", command.get_name());
        let about = command.get_long_about().or_else(|| command.get_about());
        let level = "#".repeat(path.matches(' ').count().min(2) + 1);
        write!(page, "\n{level} {path}\n\n").unwrap();
        writeln!(
            page,
            "{}",
            about.map(ToString::to_string).unwrap_or_default()
        )
        .unwrap();
        let mut arguments = own_arguments(command).peekable();
        if arguments.peek().is_some() {
            page.push('\n');
        }
        for arg in arguments {
            describe(page, arg);
        }
        if let Some(after) = command.get_after_help() {
            write!(page, "\n```text\n{}\n```\n", after.to_string().trim_end()).unwrap();
        }
        commands_below(page, command, &path);
    }
}

fn commands_page() -> String {
    let mut command = Cli::command();
    command.build();
    let mut page = COMMANDS.to_owned();
    for arg in command.get_arguments().filter(|arg| arg.is_global_set()) {
        describe(&mut page, arg);
    }
    commands_below(&mut page, &command, "quarry");
    page
}

fn settings_page() -> String {
    format!(
        "{SETTINGS}\n```toml\n{}\n```\n",
        Config::example().trim_end()
    )
}

/// With `QUARRY_WRITE_PAGES=1` it writes them instead.
#[test]
fn pages_that_are_checked_in_are_what_the_code_makes() {
    for (name, page) in [
        ("CLI.md", commands_page()),
        ("CONFIGURATION.md", settings_page()),
    ] {
        let path = top().join("docs").join(name);
        if std::env::var_os("QUARRY_WRITE_PAGES").is_some() {
            std::fs::write(&path, &page).unwrap();
        }
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            there == page,
            "{name}: run this test with QUARRY_WRITE_PAGES=1"
        );
    }
}

/// All documents for users.
fn documents() -> Vec<(PathBuf, String)> {
    let mut paths = vec![top().join("README.md"), top().join("gateway/ACCESS.md")];
    for entry in std::fs::read_dir(top().join("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "md") {
            paths.push(path);
        }
    }
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        (path, text)
    };
    paths.into_iter().map(read).collect()
}

/// The words of each command in a line of a shell, without quotes.
fn commands_in(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![vec![String::new()]];
    let mut quote = None;
    for c in line.chars() {
        let command = commands.last_mut().expect("one at least");
        match (quote, c) {
            (Some(open), c) if open == c => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, '|' | '&' | ';' | '(' | ')' | '{' | '}') => commands.push(vec![String::new()]),
            (None, c) if c.is_whitespace() => command.push(String::new()),
            // The rest is a comment.
            (None, '#') if command.last().is_some_and(String::is_empty) => break,
            _ => command.last_mut().expect("one at least").push(c),
        }
    }
    for command in &mut commands {
        command.retain(|word| !word.is_empty());
    }
    commands
}

/// The words of each call of `quarry` in a line of a shell.
fn calls(line: &str) -> Vec<Vec<String>> {
    let mut calls = Vec::new();
    for words in commands_in(line) {
        let Some(at) = words.iter().position(|word| word == "quarry") else {
            continue;
        };
        // Variables and the like may stand before it, but no other program.
        let before =
            |word: &String| word.contains('=') || ["!", "sudo", "until"].contains(&word.as_str());
        // In an example of how things are called, dots and brackets stand for something.
        let is_pattern = |word: &String| word.contains(['…', '[']) || word.contains("${");
        if words[..at].iter().all(before) && !words.iter().any(is_pattern) {
            let is_redirection =
                |word: &&String| word.starts_with(['>', '<']) || word.starts_with("2>");
            calls.push(
                words[at..]
                    .iter()
                    .take_while(|word| !is_redirection(word))
                    .cloned()
                    .collect(),
            );
        }
    }
    calls
}

/// The text in blocks of a shell's commands, and the text outside of all blocks.
fn shell_and_prose(text: &str) -> (Vec<String>, String) {
    let (mut shell, mut prose) = (Vec::new(), String::new());
    for (index, part) in format!("\n{text}").split("\n```").enumerate() {
        if index % 2 == 0 {
            prose += part;
            prose.push('\n');
        } else if let Some((kind, block)) = part.split_once('\n')
            && ["", "sh"].contains(&kind.trim())
        {
            shell.extend(block.replace("\\\n", " ").lines().map(str::to_owned));
        }
    }
    (shell, prose)
}

/// What is in backticks, also over the end of a line.
fn code(prose: &str) -> Vec<String> {
    let one_line = |code: &str| code.split_whitespace().collect::<Vec<_>>().join(" ");
    prose.split('`').skip(1).step_by(2).map(one_line).collect()
}

#[test]
fn every_command_of_the_documents_is_one() {
    use clap::error::ErrorKind as E;
    // A sentence may name a command or a flag without what it needs.
    let incomplete = [
        E::MissingRequiredArgument,
        E::DisplayHelpOnMissingArgumentOrSubcommand,
        E::DisplayHelp,
        E::DisplayVersion,
    ];
    let lacks_value = |error: &clap::Error| error.to_string().contains("a value is required for");
    let mut parsed = 0;
    for (path, text) in documents() {
        let (shell, prose) = shell_and_prose(&text);
        let in_prose = code(&prose);
        let lines = shell.iter().map(|line| (line, false));
        for (line, in_prose) in lines.chain(in_prose.iter().map(|line| (line, true))) {
            for call in calls(line) {
                if call.len() == 1 {
                    continue;
                }
                parsed += 1;
                if let Err(error) = Cli::try_parse_from(&call)
                    && !(in_prose && (incomplete.contains(&error.kind()) || lacks_value(&error)))
                {
                    panic!("{}: {line}\n{error}", path.display());
                }
            }
        }
    }
    assert!(parsed > 100, "{parsed} commands are looked at");
}

#[test]
fn every_setting_of_the_documents_is_one() {
    let example = Config::example();
    let mut keys = Vec::new();
    let mut section = "";
    for line in example.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = name;
        } else if let Some((key, _)) = line.trim_start_matches(['#', ' ']).split_once(" = ")
            && !key.contains(' ')
        {
            keys.push(format!("{section}.{key}"));
        }
    }
    let sections: std::collections::BTreeSet<_> = keys
        .iter()
        .filter_map(|key| key.split_once('.'))
        .map(|(section, _)| section)
        .collect();
    let mut seen = 0;
    for (path, text) in documents() {
        for word in code(&shell_and_prose(&text).1) {
            let Some((section, rest)) = word.split_once('.') else {
                continue;
            };
            let key = rest.split(' ').next().unwrap_or(rest);
            let is_name =
                !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            if sections.contains(section) && is_name {
                let key = format!("{section}.{key}");
                assert!(keys.contains(&key), "{}: there is no {key}", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 40, "{seen} settings are looked at");
}
