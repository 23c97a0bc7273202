//! The API's errors: a kind for programs, a sentence and a remedy for people.

use std::fmt;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use quarry_objfmt::TenantName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ApiResult, VolumeRef};

/// Media type of an error's body (RFC 9457).
pub const PROBLEM_JSON: &str = "application/problem+json";

/// What an operator or a program can do about an error.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The thing named does not exist.
    NotFound,
    /// The name is taken.
    Exists,
    /// The thing's state forbids it: attached, owned elsewhere, not empty.
    Conflict,
    /// The request itself is wrong.
    Invalid,
    /// The credentials do not allow it.
    Denied,
    /// This host or kernel cannot do it.
    Unsupported,
    /// Not now: the store or the daemon does not answer. Trying again may help.
    Unavailable,
    /// Data in the store or the cache are missing or broken.
    Damaged,
    /// Our own mistake, or a kind from a newer daemon.
    #[serde(other)]
    Internal,
}

impl Kind {
    /// The one HTTP status of each kind.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Exists | Self::Conflict => StatusCode::CONFLICT,
            Self::Invalid => StatusCode::BAD_REQUEST,
            Self::Denied => StatusCode::FORBIDDEN,
            Self::Unsupported => StatusCode::NOT_IMPLEMENTED,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Damaged | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// An error of the API.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApiError {
    /// For programs.
    pub kind: Kind,
    /// What is wrong: a sentence without its full stop.
    pub message: String,
    /// What to do about it, likewise; may be empty.
    pub remedy: String,
}

/// One sentence: what is wrong; what to do.
impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.remedy.is_empty() {
            Ok(())
        } else {
            write!(f, "; {}", self.remedy)
        }
    }
}

impl std::error::Error for ApiError {}

impl ApiError {
    /// An error of this kind.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            remedy: remedy.into(),
        }
    }

    /// There is no such volume.
    #[must_use]
    pub fn no_volume(volume: &VolumeRef) -> Self {
        let remedy = "`quarry volume list` shows those that are there";
        Self::new(
            Kind::NotFound,
            format!("there is no volume {volume}"),
            remedy,
        )
    }

    /// There is no such tenant.
    #[must_use]
    pub fn no_tenant(tenant: &TenantName) -> Self {
        let remedy = format!("make it with `quarry tenant create {tenant}`");
        Self::new(
            Kind::NotFound,
            format!("there is no tenant {tenant}"),
            remedy,
        )
    }

    /// The trash has no such volume.
    #[must_use]
    pub fn not_in_trash(which: &impl fmt::Display) -> Self {
        Self::new(
            Kind::NotFound,
            format!("{which}: it is not in the trash"),
            "`quarry trash list` shows what is",
        )
    }

    /// The request is wrong.
    #[must_use]
    pub fn invalid(message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message, remedy)
    }

    /// The same error with another remedy.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Self {
        Self {
            remedy: remedy.into(),
            ..self
        }
    }

    /// Our own mistake.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message, "see the daemon's log")
    }
}

/// What was asked for, or none: that it is not there is an answer, not an error.
pub(crate) fn if_found<T>(asked: ApiResult<T>) -> ApiResult<Option<T>> {
    match asked {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The body of an error's response.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// The HTTP status once more.
    pub status: u16,
    /// The status in words.
    pub title: String,
    /// What is wrong.
    pub detail: String,
    /// For programs.
    pub kind: Kind,
    /// What to do about it.
    #[serde(default)]
    pub remedy: String,
}

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> Self {
        Self {
            kind: problem.kind,
            message: problem.detail,
            remedy: problem.remedy,
        }
    }
}

/// The response for `error` with a status that says more than its kind's own.
pub(super) fn response(status: StatusCode, error: ApiError) -> Response {
    let problem = Problem {
        status: status.as_u16(),
        title: status.canonical_reason().unwrap_or("Error").to_owned(),
        detail: error.message,
        kind: error.kind,
        remedy: error.remedy,
    };
    let mut response = (status, axum::Json(problem)).into_response();
    response.extensions_mut().insert(error.kind);
    if status == StatusCode::UNAUTHORIZED {
        let scheme = header::HeaderValue::from_static("Bearer");
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, scheme);
    }
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(PROBLEM_JSON),
    );
    response
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        response(self.kind.status(), self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_shown_is_one_sentence_with_what_to_do() {
        let error = ApiError::no_tenant(&TenantName::new("acme").unwrap());
        assert_eq!(
            error.to_string(),
            "there is no tenant acme; make it with `quarry tenant create acme`"
        );
        assert_eq!(
            ApiError::new(Kind::Internal, "oops", "").to_string(),
            "oops"
        );
    }

    #[test]
    fn kind_from_a_newer_daemon_reads_as_internal() {
        let text = r#"{"status":418,"title":"t","detail":"d","kind":"teapot","new":1}"#;
        let problem: Problem = serde_json::from_str(text).unwrap();
        assert_eq!(
            ApiError::from(problem),
            ApiError::new(Kind::Internal, "d", "")
        );
    }

    #[test]
    fn every_kind_has_an_error_status() {
        use Kind::*;
        for kind in [
            NotFound,
            Exists,
            Conflict,
            Invalid,
            Denied,
            Unsupported,
            Unavailable,
            Damaged,
            Internal,
        ] {
            assert!(kind.status().as_u16() >= 400, "{kind:?}");
            let word = serde_json::to_string(&kind).unwrap();
            assert_eq!(serde_json::from_str::<Kind>(&word).unwrap(), kind);
        }
    }
}
