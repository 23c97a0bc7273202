//! The book in docs/: that it is whole, that what it says of tests and of the API is so, and that what it tells to type works.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Ran, quarry_program, tool};
use tempfile::tempdir;

fn top() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the tests lie in the repository")
}

/// The pages of docs/, by name. A page that only includes another document is that one.
fn pages() -> Result<BTreeMap<String, String>> {
    let mut pages = BTreeMap::new();
    for entry in fs::read_dir(top().join("docs"))? {
        let path = entry?.path();
        let name = path.file_name().context("a name")?.to_string_lossy();
        if !name.ends_with(".md") || name == "SUMMARY.md" {
            continue;
        }
        let mut text = fs::read_to_string(&path)?;
        if let Some((before, rest)) = text.split_once("{{#include ") {
            let (included, after) = rest.split_once("}}").context("an include ends")?;
            let inside = fs::read_to_string(top().join("docs").join(included))
                .with_context(|| format!("{name} includes {included}"))?;
            text = format!("{before}{inside}{after}");
        }
        pages.insert(name.into_owned(), text);
    }
    Ok(pages)
}

/// The text without its blocks of code and its code in backticks, where brackets mean something else.
fn prose(text: &str) -> String {
    let outside = text
        .split("\n```")
        .step_by(2)
        .collect::<Vec<_>>()
        .join("\n");
    outside.split('`').step_by(2).collect::<Vec<_>>().join("")
}

/// The targets of the links of a Markdown text.
fn links(text: &str) -> Vec<String> {
    let prose = prose(text);
    let ends = prose.split("](").skip(1);
    let links = ends.filter_map(|rest| rest.split_once(')'));
    links.map(|(link, _)| link.to_owned()).collect()
}

/// What mdBook makes of a heading: its anchor.
fn anchor(heading: &str) -> String {
    let heading = heading.replace('`', "");
    let kept = |c: &char| c.is_alphanumeric() || "-_ ".contains(*c);
    let text: String = heading.trim().to_lowercase().chars().filter(kept).collect();
    text.replace(' ', "-")
}

fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.starts_with("```") {
            in_code = !in_code;
        }
        if let Some(heading) = line.strip_prefix('#')
            && !in_code
        {
            anchors.insert(anchor(heading.trim_start_matches('#')));
        }
    }
    anchors
}

#[test]
fn book_has_every_page_and_its_links_lead_to_pages_and_headings() -> Result<()> {
    let pages = pages()?;
    let summary = fs::read_to_string(top().join("docs/SUMMARY.md"))?;
    let listed: BTreeSet<String> = links(&summary).into_iter().collect();
    let there: BTreeSet<String> = pages.keys().cloned().collect();
    let missing: Vec<_> = there.difference(&listed).collect();
    ensure!(missing.is_empty(), "add to docs/SUMMARY.md: {missing:?}");
    let gone: Vec<_> = listed.difference(&there).collect();
    ensure!(gone.is_empty(), "docs/SUMMARY.md lists {gone:?}");

    // Where links of included documents lead, which go by where these are.
    let settings = fs::read_to_string(top().join("docs/book.toml"))?;
    let redirects: BTreeMap<String, String> = settings
        .lines()
        .filter_map(|line| line.strip_prefix("\"/")?.split_once("\" = \""))
        .map(|(from, to)| {
            let page = |path: &str| path.trim_end_matches('"').replace(".html", ".md");
            (page(from), page(to).replace("../", ""))
        })
        .collect();
    for (name, text) in &pages {
        for link in links(text) {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let file = redirects.get(file).map_or(file, String::as_str);
            let file = if file.is_empty() { name.as_str() } else { file };
            let Some(target) = pages.get(file) else {
                // Pictures lie beside the pages.
                let is_there = top().join("docs").join(file).is_file();
                let why = "it is not in the book: write it as code, or add a page";
                ensure!(is_there && !file.contains(".."), "{name}: {link}: {why}");
                continue;
            };
            let found = anchor.is_empty() || anchors(target).contains(anchor);
            ensure!(found, "{name}: no heading {link}");
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs mdbook, which takes minutes to compile: just book"]
fn mdbook_builds_the_book_without_a_warning() -> Result<()> {
    let Some(mdbook) = tool("mdbook") else {
        return Ok(());
    };
    let place = tempdir()?;
    let mut command = mdbook.command();
    command.arg("build").arg(top().join("docs"));
    let ran = Ran::run(command.arg("--dest-dir").arg(place.path()))?.ok()?;
    let said = format!("{}{}", ran.stdout, ran.stderr);
    ensure!(!said.contains("WARN") && !said.contains("ERROR"), "{ran}");
    ensure!(place.path().join("FAILURES.html").is_file(), "{ran}");
    Ok(())
}

/// All functions of the workspace's tests.
fn test_names(dir: &Path, names: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                test_names(&path, names)?;
            }
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path)?;
            for rest in text.split("fn ").skip(1) {
                let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
                names.insert(rest[..end.unwrap_or(rest.len())].to_owned());
            }
        }
    }
    Ok(())
}

#[test]
fn tests_that_the_documents_name_are_there() -> Result<()> {
    let mut there = BTreeSet::new();
    test_names(top(), &mut there)?;
    let mut named = 0;
    let mut texts = pages()?;
    for name in ["README.md", "CHANGELOG.md"] {
        texts.insert(name.to_owned(), fs::read_to_string(top().join(name))?);
    }
    for (name, text) in texts {
        for word in text.split('`').skip(1).step_by(2) {
            // Names of tests are sentences.
            let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            if word.matches('_').count() < 5 || !word.chars().all(is_name) {
                continue;
            }
            if word.starts_with("quarry_") {
                continue;
            }
            ensure!(there.contains(word), "{name}: there is no test {word}");
            named += 1;
        }
    }
    ensure!(named > 80, "only {named} tests are named");
    Ok(())
}

/// Has a shell do what the ` ```sh ` blocks of a page say, all in one go, as anybody would who types them.
fn follow(page: &str, from: &str) -> Result<()> {
    let text = fs::read_to_string(top().join("docs").join(page))?;
    let (_, text) = text.split_once(from).context("the part of the page")?;
    let blocks: Vec<&str> = text
        .split("\n```sh\n")
        .skip(1)
        .filter_map(|block| block.split("\n```").next())
        .collect();
    ensure!(blocks.len() > 3, "{} blocks in {page}", blocks.len());
    let dir = tempdir()?;
    let program = quarry_program();
    let programs = program.parent().context("it lies in a folder")?;
    let path = env::var("PATH").unwrap_or_default();
    let mut script = String::from("set -euo pipefail\n");
    // What they start ends with them.
    script += "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n";
    for block in blocks {
        writeln!(script, "{block}")?;
    }
    let mut command = Command::new("bash");
    command
        .current_dir(dir.path())
        .env("PATH", format!("{}:{path}", programs.display()))
        .env("XDG_STATE_HOME", dir.path().join("state-of-clients"))
        .env_remove("QUARRY_SOCKET")
        .args(["-c", &script]);
    let ran = Ran::run(&mut command)?.ok()?;
    println!("{}{}", ran.stdout, ran.stderr);
    Ok(())
}

#[test]
fn quick_start_works_as_it_is_typed() -> Result<()> {
    follow("QUICKSTART.md", "# Quick start")
}

#[test]
fn disaster_recovery_drill_works_as_it_is_typed() -> Result<()> {
    follow("OPERATIONS.md", "## A drill: the host is lost")
}
