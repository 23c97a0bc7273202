//! A service that wraps and unwraps, by HTTP: `{"operation": "wrap"|"unwrap", "key": NAME, "data": BASE64}` is posted,
//! `{"data": BASE64}` comes back.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use quarry_objfmt::KeyName;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{HOOK_ANSWER_MAX, HOOK_TIME_MAX, KeyError};

#[derive(Clone, Debug)]
pub(super) struct Service {
    url: String,
    /// Its scheme and host, for people: who else is in a URL may be a secret.
    place: String,
    /// Why there is none, if there is not.
    http: Result<reqwest::Client, String>,
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the service {}", self.place)
    }
}

#[derive(Serialize)]
struct Question<'a> {
    operation: &'static str,
    key: &'a KeyName,
    data: &'a str,
}

#[derive(Deserialize)]
struct Answer {
    data: String,
}

impl Service {
    pub(super) fn new(url: &str) -> Self {
        crate::store::install_crypto();
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            // Keys go to whom they are asked from, and nobody between.
            .no_proxy()
            .timeout(HOOK_TIME_MAX)
            .build();
        Self {
            url: url.to_owned(),
            place: reqwest::Url::parse(url).map_or_else(
                |_| "of keys".to_owned(),
                |url| url.origin().ascii_serialization(),
            ),
            http: http.map_err(|error| format!("the HTTP client cannot start: {error}")),
        }
    }

    pub(super) async fn ask(
        &self,
        operation: &'static str,
        key: &KeyName,
        input: Zeroizing<Vec<u8>>,
    ) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let asked = self.call(operation, key, &input).await;
        asked.map_err(|why| KeyError::Unavailable {
            by: self.to_string(),
            key: key.clone(),
            why,
        })
    }

    async fn call(
        &self,
        operation: &'static str,
        key: &KeyName,
        input: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, String> {
        let http = self.http.as_ref().map_err(Clone::clone)?;
        let data = Zeroizing::new(STANDARD.encode(input));
        let question = Question {
            operation,
            key,
            data: &data,
        };
        // What went wrong is told without the URL, which is told anyway.
        let lost = |error: reqwest::Error| error.without_url().to_string();
        let mut response = http
            .post(&self.url)
            .json(&question)
            .send()
            .await
            .map_err(lost)?;
        if !response.status().is_success() {
            return Err(format!("it answers {}", response.status()));
        }
        let mut body = Zeroizing::new(Vec::with_capacity(HOOK_ANSWER_MAX));
        while let Some(part) = response.chunk().await.map_err(lost)? {
            if body.len() + part.len() > HOOK_ANSWER_MAX {
                return Err(format!("it answers more than {HOOK_ANSWER_MAX} bytes"));
            }
            body.extend_from_slice(&part);
        }
        let answer: Answer = serde_json::from_slice(&body)
            .map_err(|_| "its answer is not the JSON that was asked for".to_owned())?;
        let data = Zeroizing::new(answer.data);
        let decoded = STANDARD.decode(data.as_bytes());
        let decoded = decoded.map_err(|_| "its answer is not base64".to_owned())?;
        Ok(Zeroizing::new(decoded))
    }
}
