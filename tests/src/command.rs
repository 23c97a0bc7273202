//! One call of the `quarry` command line and what came of it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::target_dir;

/// A finished call.
#[derive(Clone, Debug)]
pub struct Ran {
    /// What was called, for messages.
    pub line: String,
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A call that failed as it should: with words.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The kind of error, from its JSON.
    pub kind: String,
    /// What is wrong, in one sentence.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
    /// What a person saw on standard error.
    pub stderr: String,
}

impl Refusal {
    /// Whether any of its words contain `text`, in whatever case.
    #[must_use]
    pub fn mentions(&self, text: &str) -> bool {
        let text = text.to_lowercase();
        [&self.message, &self.remedy, &self.stderr]
            .iter()
            .any(|words| words.to_lowercase().contains(&text))
    }
}

impl Ran {
    /// Runs `command` to its end.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn run(command: &mut Command) -> Result<Self> {
        let line = format!("{command:?}");
        let Output {
            status,
            stdout,
            stderr,
        } = command.output().with_context(|| line.clone())?;
        Ok(Self {
            line,
            code: status.code(),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        })
    }

    /// Itself, if it succeeded.
    ///
    /// # Errors
    /// With all that it printed, if it did not.
    pub fn ok(self) -> Result<Self> {
        if self.code == Some(0) {
            return Ok(self);
        }
        bail!("{self}")
    }

    /// The JSON that it printed.
    ///
    /// # Errors
    /// If it failed or printed anything else.
    pub fn json(self) -> Result<Value> {
        let ran = self.ok()?;
        serde_json::from_str(&ran.stdout).with_context(|| ran.to_string())
    }

    /// Its error, from a call with `--output json`.
    ///
    /// # Errors
    /// If it succeeded, was killed, or failed without proper words.
    pub fn refusal(self) -> Result<Refusal> {
        ensure!(
            self.code.is_some_and(|code| code != 0),
            "should have failed: {self}"
        );
        let answer: Value = serde_json::from_str(&self.stdout)
            .with_context(|| format!("a failure has its JSON on standard output: {self}"))?;
        let word = |key: &str| {
            let text = answer["error"][key].as_str().unwrap_or_default();
            text.to_owned()
        };
        let refusal = Refusal {
            kind: word("kind"),
            message: word("message"),
            remedy: word("remedy"),
            stderr: self.stderr.trim().to_owned(),
        };
        ensure!(!refusal.kind.is_empty(), "an error has a kind: {self}");
        ensure!(!refusal.message.is_empty(), "an error says what: {self}");
        ensure!(!refusal.stderr.is_empty(), "a person is told too: {self}");
        ensure!(
            !refusal.stderr.contains("panicked"),
            "an error is no panic: {self}"
        );
        Ok(refusal)
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let code = self
            .code
            .map_or_else(|| "a signal".to_owned(), |code| code.to_string());
        write!(
            f,
            "{}\nended with {code}\n-- stdout\n{}\n-- stderr\n{}",
            self.line, self.stdout, self.stderr
        )
    }
}

/// The `quarry` program under test: `$QUARRY_BIN`, or else built now, in this test's own profile.
///
/// # Panics
/// If it cannot be built.
#[must_use]
pub fn quarry_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(path) = env::var_os("QUARRY_BIN") {
            return PathBuf::from(path);
        }
        build().expect("the quarry program can be built")
    })
}

fn build() -> Result<PathBuf> {
    let profile = env::current_exe()?
        .ancestors()
        .nth(2)
        .and_then(Path::file_name)
        .context("a test binary lies in target/PROFILE/deps")?
        .to_owned();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--quiet", "--package", "quarry-gateway"])
        .args(["--bin", "quarry", "--target-dir"])
        .arg(target_dir())
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    if profile == "release" {
        cargo.arg("--release");
    }
    Ran::run(&mut cargo)?.ok()?;
    Ok(target_dir().join(profile).join("quarry"))
}
