//! Why a call failed, for people and for programs.

use std::fmt;

use quarry_config::ConfigError;
use serde::Serialize;

use crate::control::{ApiError, ListenError};
use crate::store::OpenError;

/// Why a call failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Failure {
    /// For programs: one of the API's kinds, `usage`, `config` or `failed`.
    pub kind: String,
    /// What is wrong: a sentence without its full stop.
    pub message: String,
    /// What to do about it; may be empty.
    pub remedy: String,
    /// Programs were told already.
    #[serde(skip)]
    told: bool,
}

impl Failure {
    /// The kind of those whose cause is the configuration.
    pub const CONFIG: &str = "config";
    /// The kind of those whose cause is the command line.
    pub const USAGE: &str = "usage";

    /// A failure of this kind.
    pub fn new(kind: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            kind: kind.to_owned(),
            message: message.into(),
            remedy: remedy.into(),
            told: false,
        }
    }

    /// The same, after it was printed as a part of the answer.
    pub fn told(self) -> Self {
        Self { told: true, ..self }
    }

    /// Whether programs were told already.
    pub fn is_told(&self) -> bool {
        self.told
    }
}

/// One sentence: what is wrong; what to do.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.remedy.is_empty() {
            Ok(())
        } else {
            write!(f, "; {}", self.remedy)
        }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        let kind = serde_json::to_value(error.kind).ok();
        let kind = kind
            .as_ref()
            .and_then(serde_json::Value::as_str)
            .unwrap_or("internal");
        Self::new(kind, error.message, error.remedy)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::new(Self::CONFIG, error.message(), error.remedy())
    }
}

/// Errors of the daemon and the demo: those that say what to do are taken at their word.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        if let Some(known) = error.downcast_ref::<ApiError>() {
            return known.clone().into();
        }
        if let Some(known) = error.downcast_ref::<ConfigError>() {
            return Self::new(Self::CONFIG, known.message(), known.remedy());
        }
        if is_of_the_configuration(&error) {
            return Self::new(Self::CONFIG, chain(&error), "");
        }
        if let Some(known) = error.downcast_ref::<ListenError>() {
            return Self::new("conflict", known.to_string(), "");
        }
        Self::new("failed", chain(&error), "")
    }
}

/// Whether it is what the configuration says, told elsewhere than in a [`ConfigError`], as it is found only when it is used.
/// Each says what to do. A certificate is none: who renews it may be late.
fn is_of_the_configuration(error: &anyhow::Error) -> bool {
    let settings = error.downcast_ref::<OpenError>();
    matches!(
        settings,
        Some(OpenError::Settings { .. } | OpenError::Credentials(_))
    )
}

/// An error and its causes in one sentence, without those that an error before has told in full.
pub(super) fn chain(error: &anyhow::Error) -> String {
    let mut sentence = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !sentence.contains(&cause) {
            let colon = if sentence.is_empty() { "" } else { ": " };
            sentence = sentence + colon + &cause;
        }
    }
    sentence
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;
    use crate::control::Kind;
    use crate::store::StoreSettings;

    #[test]
    fn failure_of_a_daemon_keeps_kind_and_remedy() {
        let error =
            anyhow::Error::new(ApiError::new(Kind::Conflict, "it is taken", "take another"));
        let failure = Failure::from(error.context("starting"));
        assert_eq!(
            failure,
            Failure::new("conflict", "it is taken", "take another")
        );
    }

    #[test]
    fn failure_of_a_setting_is_the_configurations() {
        let settings = StoreSettings {
            url: "s3://bucket".to_owned(),
            ..StoreSettings::default()
        };
        let error = anyhow::Error::new(settings.place().unwrap_err());
        let failure = Failure::from(error.context("starting"));
        assert_eq!(failure.kind, Failure::CONFIG);
        assert!(failure.message.contains("AWS_REGION"), "{failure}");
    }

    #[test]
    fn failure_of_an_unknown_error_tells_the_whole_chain() {
        let inner: Result<(), std::io::Error> = Err(std::io::Error::other("disk on fire"));
        let failure = Failure::from(inner.context("cannot open the cache").unwrap_err());
        assert_eq!(failure.to_string(), "cannot open the cache: disk on fire");
        let told: Result<(), std::io::Error> = Err(std::io::Error::other("disk on fire"));
        let told = told.context("it cannot be opened (disk on fire): mend it");
        let failure = Failure::from(told.unwrap_err());
        assert_eq!(
            failure.to_string(),
            "it cannot be opened (disk on fire): mend it"
        );
    }
}
