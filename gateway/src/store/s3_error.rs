//! What an answer of an S3 server means: from the client library's errors to ours.
//!
//! The library sorts answers by status alone, and keeps the error's code and the status itself in
//! its text only; from there they are read. The tests hold that text against a server of their own.
//!
//! The careful side is always "unavailable", which is tried again:
//! - 404 is "not found" only with the code `NoSuchKey`: not for a missing bucket or a proxy's page.
//! - 409 never means that an object exists: S3 answers it when two writes collide, done or not.

use super::{Operation, StoreError};

/// Codes that come with status 400 and are about our keys.
const KEY_CODES: [&str; 4] = [
    "ExpiredToken",
    "InvalidToken",
    "InvalidAccessKeyId",
    "AuthorizationHeaderMalformed",
];
/// The longest reason.
const REASON_CHARS_MAX: usize = 300;

/// What was asked, for the errors' texts and kinds.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub operation: Operation,
    pub key: &'a str,
}

impl Asked<'_> {
    pub(super) fn unavailable(self, reason: impl Into<String>) -> StoreError {
        StoreError::unavailable(self.operation, self.key, reason)
    }

    /// Turns an error of the library into one of ours. A range that begins behind the object's end is
    /// `None`: the caller knows its range.
    pub(super) fn explain(self, error: &object_store::Error) -> Option<StoreError> {
        let text = error.to_string();
        if let Some(status) = status(&text) {
            return self.explain_answer(status, &text);
        }
        Some(match error {
            object_store::Error::NotFound { .. } => match self.operation {
                Operation::Replace => StoreError::changed(self.key),
                _ => StoreError::not_found(self.key),
            },
            object_store::Error::AlreadyExists { .. } => StoreError::exists(self.key),
            object_store::Error::Precondition { .. } | object_store::Error::NotModified { .. } => {
                self.precondition()
            }
            object_store::Error::PermissionDenied { .. }
            | object_store::Error::Unauthenticated { .. } => {
                StoreError::denied(self.key, brief(&text))
            }
            object_store::Error::InvalidPath { .. }
            | object_store::Error::NotSupported { .. }
            | object_store::Error::NotImplemented { .. }
            | object_store::Error::UnknownConfigurationKey { .. } => {
                StoreError::invalid(self.key, brief(&text))
            }
            _ if text.contains("Wanted range starting at") => return None,
            _ if text.contains("redirect without LOCATION") => self.elsewhere(),
            _ => self.unavailable(brief(&text)),
        })
    }

    fn explain_answer(self, status: u16, text: &str) -> Option<StoreError> {
        let code = element(text, "Code").unwrap_or_default();
        let message = element(text, "Message").unwrap_or_default();
        let reason = match (code, message) {
            ("", _) => brief(text),
            (code, "") => brief(&format!("HTTP {status} {code}")),
            (code, message) => brief(&format!("HTTP {status} {code}: {message}")),
        };
        Some(match status {
            404 if code == "NoSuchKey" => match self.operation {
                Operation::Replace => StoreError::changed(self.key),
                _ => StoreError::not_found(self.key),
            },
            304 | 412 => self.precondition(),
            416 => return None,
            401 | 403 => StoreError::denied(self.key, reason),
            400 if KEY_CODES.contains(&code) => StoreError::denied(self.key, reason),
            301 | 302 | 303 | 307 | 308 => self.elsewhere(),
            405 | 411 | 413 | 501 => StoreError::invalid(self.key, reason),
            _ => self.unavailable(reason),
        })
    }

    /// As [`Self::explain`], where no range was asked for.
    pub(super) fn explain_whole(self, error: &object_store::Error) -> StoreError {
        let explained = self.explain(error);
        explained.unwrap_or_else(|| self.unavailable("the server refuses a range that was not set"))
    }

    fn precondition(self) -> StoreError {
        match self.operation {
            Operation::Create => StoreError::exists(self.key),
            Operation::Replace => StoreError::changed(self.key),
            _ => self.unavailable("the server refuses a condition that was not set"),
        }
    }

    fn elsewhere(self) -> StoreError {
        let reason = "the server sends us elsewhere: the bucket is in another region (set store.region or AWS_REGION)";
        StoreError::denied(self.key, reason)
    }
}

/// Whether the server refuses a body because it is not as its checksum says.
pub(super) fn is_wrong_checksum(error: &object_store::Error) -> bool {
    let text = error.to_string();
    let code = element(&text, "Code").unwrap_or_default();
    status(&text) == Some(400) && (code.contains("Digest") || code.contains("Checksum"))
}

/// Whether the server wants none of what came, as it came: no word on what is there already, and none
/// that it may take the same a moment later.
pub(super) fn is_refusal(error: &object_store::Error) -> bool {
    match status(&error.to_string()) {
        Some(404 | 408 | 409 | 412 | 429) | None => false,
        Some(status) => (400..500).contains(&status) || status == 501,
    }
}

/// The HTTP status in a text of the library.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// The content of the first XML element of that name.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    Some(rest.split_once('<')?.0.trim())
}

/// One line, and not a long one.
fn brief(text: &str) -> String {
    let one_line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match one_line.char_indices().nth(REASON_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &one_line[..end]),
        None => one_line,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use bytes::Bytes;
    use proptest::prelude::*;
    use tokio::net::TcpListener;

    use super::*;
    use crate::store::stub::{Answer, stub_store};
    use crate::store::{Store, Tag};

    /// One word for the kind.
    fn kind<T>(result: Result<T, StoreError>) -> &'static str {
        match result {
            Ok(_) => "ok",
            Err(StoreError::NotFound { .. }) => "not found",
            Err(StoreError::Exists { .. }) => "exists",
            Err(StoreError::Changed { .. }) => "changed",
            Err(StoreError::Denied { .. }) => "denied",
            Err(StoreError::Unavailable { .. }) => "unavailable",
            Err(StoreError::WrongLength { .. }) => "wrong length",
            Err(StoreError::Invalid { .. }) => "invalid",
        }
    }

    /// The kinds of (get, range, create, replace, delete).
    async fn kinds(answer: Answer) -> [&'static str; 5] {
        let store: Arc<dyn Store> = Arc::new(stub_store(answer).await);
        let body = Bytes::from_static(b"x");
        [
            kind(store.get("k").await),
            kind(store.get_range("k", 2..4).await),
            kind(store.create("k", body.clone()).await),
            kind(store.replace("k", body, &Tag::new("\"t\"")).await),
            kind(store.delete("k").await),
        ]
    }

    #[tokio::test]
    async fn not_found_is_only_the_key_itself() {
        let [get, range, _, replace, delete] = kinds(Answer::error(404, "NoSuchKey")).await;
        assert_eq!(
            [get, range, replace, delete],
            ["not found", "not found", "changed", "ok"]
        );
        for other in [
            Answer::error(404, "NoSuchBucket"),
            Answer::new(404, "<html>nothing here</html>"),
            Answer::new(404, ""),
        ] {
            assert_eq!(kinds(other).await, ["unavailable"; 5]);
        }
    }

    #[tokio::test]
    async fn precondition_failed_is_told_apart_from_a_collision() {
        let [_, _, create, replace, _] = kinds(Answer::error(412, "PreconditionFailed")).await;
        assert_eq!([create, replace], ["exists", "changed"]);
        for code in ["ConditionalRequestConflict", "OperationAborted"] {
            assert_eq!(kinds(Answer::error(409, code)).await, ["unavailable"; 5]);
        }
    }

    #[tokio::test]
    async fn refusals_and_troubles_are_told_apart() {
        assert_eq!(
            kinds(Answer::error(403, "AccessDenied")).await,
            ["denied"; 5]
        );
        assert_eq!(
            kinds(Answer::error(401, "Unauthorized")).await,
            ["denied"; 5]
        );
        assert_eq!(
            kinds(Answer::error(400, "ExpiredToken")).await,
            ["denied"; 5]
        );
        assert_eq!(
            kinds(Answer::error(400, "RequestTimeout")).await,
            ["unavailable"; 5]
        );
        assert_eq!(
            kinds(Answer::error(429, "TooManyRequests")).await,
            ["unavailable"; 5]
        );
        assert_eq!(
            kinds(Answer::error(500, "InternalError")).await,
            ["unavailable"; 5]
        );
        assert_eq!(
            kinds(Answer::error(503, "SlowDown")).await,
            ["unavailable"; 5]
        );
        assert_eq!(
            kinds(Answer::error(501, "NotImplemented")).await,
            ["invalid"; 5]
        );
        assert_eq!(
            kinds(Answer::error(301, "PermanentRedirect")).await,
            ["denied"; 5]
        );
    }

    #[tokio::test]
    async fn server_that_sends_us_elsewhere_is_not_obeyed() {
        let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let location = format!("http://{}/secret", elsewhere.local_addr().unwrap());
        let came = Arc::new(AtomicUsize::new(0));
        tokio::spawn({
            let came = Arc::clone(&came);
            async move {
                while elsewhere.accept().await.is_ok() {
                    came.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        for status in [301, 302, 303, 307, 308] {
            let answer = Answer::new(status, "").with("location", &location);
            assert_eq!(kinds(answer.clone()).await, ["denied"; 5], "{status}");
            let listed = stub_store(answer).await.list("").await;
            assert_eq!(kind(listed), "denied", "{status}");
        }
        assert_eq!(came.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn range_not_as_asked_for_is_no_success() {
        let get = async |answer: Answer| kind(stub_store(answer).await.get_range("k", 2..4).await);
        let partial = |range: &str, body: &str| {
            Answer::new(206, body).with("content-range", &format!("bytes {range}"))
        };
        assert_eq!(get(partial("2-3/9", "cd")).await, "ok");
        assert_eq!(get(partial("2-2/3", "c")).await, "wrong length");
        assert_eq!(
            get(Answer::error(416, "InvalidRange")).await,
            "wrong length"
        );
        assert_eq!(get(partial("2-3/9", "c")).await, "wrong length");
        assert_eq!(get(partial("2-3/9", "cde")).await, "wrong length");
        // The first bytes, or all of them, instead of those asked for.
        assert_eq!(get(partial("0-1/9", "ab")).await, "unavailable");
        assert_eq!(get(Answer::new(200, "abcdefghi")).await, "unavailable");
        // Cut off on its way.
        assert_eq!(get(partial("2-3/9", "c").cut_off()).await, "unavailable");
    }

    #[tokio::test]
    async fn reason_names_code_and_message_in_one_line() {
        let store = stub_store(Answer::error(503, "SlowDown")).await;
        let Err(StoreError::Unavailable { reason, .. }) = store.get("k").await else {
            panic!()
        };
        assert_eq!(reason, "HTTP 503 SlowDown: in words");
    }

    proptest! {
        #[test]
        fn any_answer_is_explained_and_only_the_servers_own_word_is_final(
            status in 100_u16..600,
            body in "(<Code>|</Code>|NoSuchKey|NoSuchBucket|<Message>|</Message>|status code: 404|[ -~ä\n]{0,8}){0,9}",
            which in 0..Operation::ALL.len(),
        ) {
            let operation = Operation::ALL[which];
            let asked = Asked { operation, key: "k" };
            let text = format!("Server returned non-2xx status code: {status} Such: {body}");
            prop_assert_eq!(super::status(&text), Some(status));
            let is_gone = status == 404 && element(&body, "Code") == Some("NoSuchKey");
            let is_refused = status == 412 || status == 304;
            match asked.explain_answer(status, &text) {
                Some(StoreError::NotFound { .. }) => prop_assert!(is_gone),
                Some(StoreError::Exists { .. }) => {
                    prop_assert!(is_refused && operation == Operation::Create);
                }
                Some(StoreError::Changed { .. }) => {
                    prop_assert!((is_refused || is_gone) && operation == Operation::Replace);
                }
                Some(StoreError::Denied { reason, .. } | StoreError::Unavailable { reason, .. }) => {
                    prop_assert!(reason.chars().count() <= REASON_CHARS_MAX + 1);
                    prop_assert!(!reason.contains('\n'));
                }
                Some(_) => {}
                None => prop_assert_eq!(status, 416),
            }
        }
    }

    #[test]
    fn reason_is_cut_between_characters() {
        assert_eq!(brief("a\n b"), "a b");
        assert_eq!(
            brief(&"ä".repeat(1000)).chars().count(),
            REASON_CHARS_MAX + 1
        );
    }
}
