//! Why a configuration is refused: what is wrong, where, and what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A place in the configuration file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Place {
    /// The file; none when the text came from elsewhere.
    pub path: Option<PathBuf>,
    /// The line, counted from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{} line {}", path.display(), self.line),
            None => write!(f, "line {}", self.line),
        }
    }
}

/// Why a configuration is refused. Shown, each is one sentence that ends in what to do.
#[derive(Debug)]
pub enum ConfigError {
    /// The file cannot be read.
    Read {
        /// What the file is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The text is not TOML.
    Syntax {
        /// Where.
        place: Place,
        /// The parser's words.
        why: String,
    },
    /// A section or key that does not exist.
    Unknown {
        /// Where.
        place: Place,
        /// `section` or `key`.
        what: &'static str,
        /// As written.
        name: String,
        /// The known name that looks most like it.
        nearest: Option<String>,
    },
    /// A value of the wrong type or outside its limits.
    Value {
        /// Where, if it came from the file.
        place: Option<Place>,
        /// The key, as `section.name`.
        key: &'static str,
        /// The value as written; `(hidden)` if it is secret.
        value: String,
        /// What is wrong with it.
        why: String,
        /// What to write instead.
        remedy: String,
    },
    /// A value that must be given and has no default.
    Missing {
        /// The key, as `section.name`.
        key: &'static str,
        /// How to set it.
        remedy: &'static str,
    },
}

impl ConfigError {
    /// What is wrong.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::Read { what, path, source } => {
                format!("cannot read {what} {}: {source}", path.display())
            }
            Self::Syntax { place, why } => format!("{place}: {why}"),
            Self::Unknown {
                place, what, name, ..
            } => format!("{place}: there is no {what} `{name}`"),
            Self::Value {
                place: Some(place),
                key,
                value,
                why,
                ..
            } => format!("{place}: {key} = {value}: {why}"),
            Self::Value {
                place: None,
                key,
                value,
                why,
                ..
            } => format!("{key} = {value}: {why}"),
            Self::Missing { key, .. } => format!("{key} is not set"),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Read { .. } => "check the path and its permissions".to_owned(),
            Self::Syntax { .. } => "`quarry config example` shows a file that is right".to_owned(),
            Self::Unknown {
                nearest: Some(name),
                ..
            } => format!("did you mean `{name}`?"),
            Self::Unknown { nearest: None, .. } => {
                "`quarry config example` lists them all".to_owned()
            }
            Self::Value { remedy, .. } => remedy.clone(),
            Self::Missing { remedy, .. } => (*remedy).to_owned(),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.message(), self.remedy())
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Read { source, .. } => Some(source),
            _ => None,
        }
    }
}
