//! What is written in two places says the same in both: dashboards and metrics, documents and files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

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

/// Below dashboards/.
fn dashboards(under: &str, extension: &str) -> Result<Vec<PathBuf>> {
    let files = fs::read_dir(top().join("dashboards").join(under))?;
    let files: Vec<PathBuf> = files
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    let wanted = |file: &PathBuf| file.extension().is_some_and(|e| e == extension);
    Ok(files.into_iter().filter(wanted).collect())
}

#[test]
fn dashboards_and_rules_ask_only_for_metrics_that_there_are() -> Result<()> {
    let mut there = BTreeSet::new();
    for line in fs::read_to_string(top().join("docs/METRICS.md"))?.lines() {
        let mut cells = line.split(" | ");
        let (name, kind) = (cells.next().unwrap_or_default(), cells.next());
        let name = name.trim_start_matches("| ").trim_matches('`');
        match kind {
            Some("histogram") => {
                there.extend(["_bucket", "_sum", "_count"].map(|suffix| format!("{name}{suffix}")));
            }
            _ => {
                there.insert(name.to_owned());
            }
        }
    }
    let mut seen = BTreeSet::new();
    for path in [dashboards("", "json")?, dashboards("rules", "yaml")?].concat() {
        // Recorded names have a level before the metric, and an operation behind it.
        let text = fs::read_to_string(&path)?.replace(":quarry_", ":");
        let wanted = metric_names(&text);
        let unknown: Vec<_> = wanted.difference(&there).collect();
        ensure!(unknown.is_empty(), "{}: {unknown:?}", path.display());
        seen.extend(wanted);
    }
    ensure!(seen.len() > 60, "only {} metrics are asked for", seen.len());
    Ok(())
}

#[test]
fn every_alert_has_its_section_in_the_runbook_and_a_test() -> Result<()> {
    let rules = top().join("dashboards/rules");
    let alerts = fs::read_to_string(rules.join("alerts.yaml"))?;
    let tests = fs::read_to_string(rules.join("tests.yaml"))?;
    let runbook = fs::read_to_string(top().join("docs/RUNBOOK.md"))?;
    let names: Vec<&str> = alerts
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    ensure!(names.len() > 15, "{names:?}");
    for name in &names {
        let anchor = format!("docs/RUNBOOK.md#{}\n", name.to_lowercase());
        ensure!(alerts.contains(&anchor), "{name} does not lead there");
        let section = format!("\n## {name}\n");
        ensure!(runbook.contains(&section), "no section of {name}");
        ensure!(tests.contains(*name), "no test of {name}");
    }
    let sections = runbook.matches("\n## ").count();
    ensure!(sections == names.len(), "sections of no alert");
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
