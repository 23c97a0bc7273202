//! The tokens of a tenant, or of the operators: what they may do, and the hashes that they are known by.
//!
//! One object for all of a holder's tokens, rewritten as a whole where it was seen: fields that a program does
//! not know are kept, and a number that only grows keeps its bytes from coming back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Most tokens of one holder: the record of the longest stays below 64 KiB.
pub const TOKENS_MAX: usize = 100;

/// Longest note on a token, in bytes.
pub const TOKEN_NOTE_BYTES_MAX: usize = 128;

/// The tokens of one holder.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TokensRecord {
    /// How often it was changed.
    pub revision: u64,
    /// When the tenant that they are of was created: one of its name that was created at another time has none of
    /// them. None of the operators', and where an older program wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_created_ms: Option<u64>,
    /// The tokens, the oldest first.
    pub tokens: Vec<TokenRecord>,
    /// What a newer program wrote.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_json::Value>,
}

/// A token. Its secret is in no object.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TokenRecord {
    /// The part of its id that is its own.
    pub serial: String,
    /// The SHA-256 of its text, in hexadecimal digits.
    pub sha256: String,
    /// `read`, `admin` or `operator`. One that a program does not know lets it do nothing.
    pub role: String,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// When it ends; none: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// What a newer program wrote.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_json::Value>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{TOKENS_KIND, decode_record, encode_record};

    #[test]
    fn record_of_the_most_and_longest_tokens_fits() {
        let token = TokenRecord {
            serial: "a".repeat(16),
            sha256: "0".repeat(64),
            role: "operator".to_owned(),
            created_ms: u64::MAX,
            expires_ms: Some(u64::MAX),
            // Quotes take two bytes in JSON.
            note: "\"".repeat(TOKEN_NOTE_BYTES_MAX),
            others: BTreeMap::new(),
        };
        let record = TokensRecord {
            revision: u64::MAX,
            tenant_created_ms: Some(u64::MAX),
            tokens: vec![token; TOKENS_MAX],
            others: BTreeMap::new(),
        };
        let bytes = encode_record(TOKENS_KIND, &record).unwrap();
        assert_eq!(decode_record(TOKENS_KIND, &bytes), Ok(record));
    }

    #[test]
    fn record_rewritten_keeps_what_a_newer_program_wrote() {
        let json = r#"{"revision":1,"tokens":[{"serial":"a","sha256":"00","role":"poet","created_ms":5,"scope":["x"]}],"colour":1}"#;
        let record: TokensRecord = serde_json::from_str(json).unwrap();
        assert_eq!(record.tenant_created_ms, None);
        assert_eq!(serde_json::to_string(&record).unwrap(), json);
        let bound = json.replace(r#""tokens""#, r#""tenant_created_ms":7,"tokens""#);
        let record: TokensRecord = serde_json::from_str(&bound).unwrap();
        assert_eq!(record.tenant_created_ms, Some(7));
        assert_eq!(serde_json::to_string(&record).unwrap(), bound);
    }
}
