//! Writes what a package has beside the program, made from the command line itself: man pages, completions, and the
//! commented configuration. The program does not carry the first.
//!
//! usage: pages DIRECTORY      makes man/, completions/ and quarry.toml in it

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use clap::CommandFactory as _;
use clap_complete::Shell;
use quarry_gateway::cli::Cli;

/// What the completions are called, where shells look for them.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "quarry"),
    (Shell::Zsh, "_quarry"),
    (Shell::Fish, "quarry.fish"),
];

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let dir = args.next().context("usage: pages DIRECTORY")?;
    ensure!(args.next().is_none(), "usage: pages DIRECTORY");
    let dir = Path::new(&dir);
    let (man, completions) = (dir.join("man"), dir.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    // One for each command, named quarry-volume-attach.1 and so on.
    clap_mangen::generate_to(Cli::command(), &man)?;
    for (shell, name) in COMPLETIONS {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "quarry", &mut script);
        fs::write(completions.join(name), script)?;
    }
    fs::write(dir.join("quarry.toml"), quarry_config::Config::example())?;
    Ok(())
}
