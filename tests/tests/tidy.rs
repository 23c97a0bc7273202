//! What is written in two places says the same in both: dashboards and metrics, documents and files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{MIB, Site};
use tempfile::tempdir;

/// The top of the repository.
fn top() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the tests lie in the repository")
}

/// The names that begin with `quarry_` in a text.
fn metric_names(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("quarry_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn dashboards_ask_only_for_metrics_that_a_daemon_has() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume("acme/db", 64 * MIB, &[])?;
    nbd.write(0, &[1; 4096], true)?;
    let there = metric_names(&daemon.metrics()?);
    daemon.stop()?;
    let mut seen = 0;
    for entry in fs::read_dir(top().join("dashboards"))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let _: serde_json::Value =
            serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let wanted = metric_names(&text);
        let unknown: Vec<_> = wanted.difference(&there).collect();
        ensure!(unknown.is_empty(), "{}: {unknown:?}", path.display());
        seen += wanted.len();
    }
    ensure!(seen > 20, "only {seen} metrics are on any dashboard");
    Ok(())
}

/// The relative links of a Markdown text.
fn links(text: &str) -> Vec<&str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .map(|(link, _)| link.split('#').next().unwrap_or(link))
        .filter(|link| !link.is_empty() && !link.contains("://"))
        .collect()
}

fn documents(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                documents(&path, found)?;
            }
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
    Ok(())
}

#[test]
fn links_of_documents_lead_to_files() -> Result<()> {
    let mut all = Vec::new();
    documents(top(), &mut all)?;
    ensure!(all.len() >= 4, "{all:?}");
    for document in all {
        let text = fs::read_to_string(&document)?;
        let from = document.parent().context("a file lies in a folder")?;
        for link in links(&text) {
            let there = from.join(link).exists();
            ensure!(there, "{}: no {link}", document.display());
        }
    }
    Ok(())
}

#[test]
fn architecture_names_files_and_constants_that_are_there() -> Result<()> {
    let text = fs::read_to_string(top().join("ARCHITECTURE.md"))?;
    ensure!(text.lines().count() <= 300, "it is to be read in one go");
    let mut sources = String::new();
    gather(top(), &mut sources)?;
    let words = text.split('`').skip(1).step_by(2);
    let constants: Vec<&str> = words
        .clone()
        .filter(|word| word.len() > 3 && word.contains('_'))
        .filter(|word| word.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
        .collect();
    ensure!(constants.len() > 5, "{constants:?}");
    for constant in constants {
        ensure!(sources.contains(constant), "no {constant} in the code");
    }
    for path in words.filter(|word| word.ends_with(".rs")) {
        ensure!(top().join(path).exists(), "no {path}");
    }
    Ok(())
}

fn gather(dir: &Path, into: &mut String) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                gather(&path, into)?;
            }
        } else if name.ends_with(".rs") {
            into.push_str(&fs::read_to_string(&path)?);
        }
    }
    Ok(())
}
