//! `quarry top`, for programs and on a terminal, with a daemon that has something to do.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{KIB, MIB, Ran, Site, in_memory, tool};
use tempfile::tempdir;

#[test]
fn top_shows_what_volumes_do_by_the_column_that_is_asked_for() -> Result<()> {
    let dir = tempdir()?;
    let daemon = Site::with_folder(dir.path(), "a")?.start()?;
    daemon.fresh_volume("acme/aaa", 64 * MIB, &[])?;
    let mut disk = daemon.fresh_volume("acme/busy", 64 * MIB, &[])?;
    let writes = thread::spawn(move || -> Result<()> {
        let block = vec![7; in_memory(16 * KIB)];
        for n in 0..400 {
            disk.write(n % 64 * 16 * KIB, &block, false)?;
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    });
    let seen = daemon.json(&["top", "--once", "--interval", "500ms", "--sort", "requests"])?;
    let text = daemon
        .site()
        .quarry(&["top", "--once", "--interval", "500ms", "--sort", "volume"])?
        .ok()?;
    let two = daemon
        .site()
        .quarry(&["top", "--count", "2", "--interval", "100ms"])?
        .ok()?;
    writes.join().expect("no test code panics there")?;

    let first = &seen["volumes"][0];
    ensure!(first["volume"] == "acme/busy", "{seen}");
    ensure!(first["per_second"]["writes"].as_f64() > Some(1.0), "{seen}");
    ensure!(
        first["per_second"]["write_us"].as_f64() > Some(0.0),
        "{seen}"
    );
    ensure!(seen["volumes"][1]["per_second"]["writes"] == 0.0, "{seen}");
    ensure!(
        seen["daemon"]["cache"]["segments"]["free"].as_u64() > Some(0),
        "{seen}"
    );
    // Not on a terminal: no escapes, and by name if that is asked for.
    ensure!(!text.stdout.contains('\x1b'), "{text}");
    let lines: Vec<&str> = text.stdout.lines().collect();
    let at = |what: &str| lines.iter().position(|line| line.starts_with(what));
    let (head, idle, busy) = (at("VOLUME"), at("acme/aaa"), at("acme/busy"));
    ensure!(head.is_some() && head < idle && idle < busy, "{text}");
    ensure!(two.stdout.matches("VOLUME").count() == 2, "{two}");
    Ok(())
}

#[test]
fn top_on_a_terminal_gives_it_back_when_it_is_interrupted() -> Result<()> {
    let (Some(script), Some(timeout)) = (tool("script"), tool("timeout")) else {
        return Ok(());
    };
    let dir = tempdir()?;
    let daemon = Site::with_folder(dir.path(), "a")?.start()?;
    daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    let quarry = daemon.site().command(&["top", "--interval", "200ms"]);
    let words: Vec<_> = std::iter::once(quarry.get_program())
        .chain(quarry.get_args())
        .map(|word| word.to_str().context("words of UTF-8"))
        .collect::<Result<_>>()?;
    // As Ctrl-C does: the program itself gets the signal.
    let line = format!(
        "stty rows 20 cols 60; {} --foreground -s INT 3 {}; echo ended $?",
        timeout.path().display(),
        words.join(" ")
    );
    let mut command: Command = script.command();
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    for (name, value) in quarry.get_envs() {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    let ran = Ran::run(&mut command)?.ok()?;
    let out = &ran.stdout;
    let (entered, left) = (out.find("\x1b[?1049h"), out.rfind("\x1b[?25h\x1b[?1049l"));
    ensure!(entered.is_some() && entered < left, "{out:?}");
    let ended = out.find("ended ").context("it ended")?;
    ensure!(left < Some(ended), "{out:?}");
    // 124 is timeout's own word for having sent the signal.
    ensure!(
        out[ended..].starts_with("ended 124") || out[ended..].starts_with("ended 0"),
        "{out:?}"
    );
    ensure!(out.contains("acme/db"), "{out:?}");
    let tables = out.matches("\x1b[H").count();
    ensure!(tables > 3, "{tables} tables");
    // Cut to the terminal's width.
    let longest = out
        .split("\x1b[K")
        .map(|line| line.trim_start_matches(['\r', '\n']).chars().count())
        .max();
    ensure!(longest < Some(110), "{longest:?} {out:?}");
    Ok(())
}
