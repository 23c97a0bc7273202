//! Why bytes were not what they should be.
//!
//! One small enum for every decoder. `what` names the structure in words for an error message
//! ("chunk header", "map leaf"); object keys are the caller's to add, this crate knows none.

/// Bytes that a decoder refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes end before the structure does.
    #[error("{what} is cut short: {need} bytes needed, {have} there")]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Bytes that the next field or the whole needs.
        need: u64,
        /// Bytes that were left.
        have: u64,
    },
    /// The structure ends before the bytes do.
    #[error("{what} is followed by {extra} bytes that do not belong to it")]
    Trailing {
        /// The structure.
        what: &'static str,
        /// Bytes too many.
        extra: u64,
    },
    /// It does not begin with its magic: something else, or overwritten.
    #[error("this is no {what}: it starts with {found:02x?}")]
    Magic {
        /// The structure that was looked for.
        what: &'static str,
        /// The first bytes found.
        found: [u8; 4],
    },
    /// A version that this build does not read.
    #[error("{what} has format version {found}, this build reads up to {supported}")]
    Version {
        /// The structure.
        what: &'static str,
        /// The version found.
        found: u16,
        /// The newest version known.
        supported: u16,
    },
    /// The checksum does not fit the bytes or the place they were read from.
    #[error("{what} is damaged: its checksum does not match")]
    Checksum {
        /// The structure.
        what: &'static str,
    },
    /// Whole and sound, but of another place than the one asked for.
    #[error("{what} belongs to another {field}")]
    Misplaced {
        /// The structure.
        what: &'static str,
        /// The field of its identity that differs.
        field: &'static str,
    },
    /// A value that the format forbids.
    #[error("{what} is invalid: {why}")]
    Invalid {
        /// The structure.
        what: &'static str,
        /// The rule that is broken.
        why: &'static str,
    },
    /// A count or length above its limit.
    #[error("{what} is invalid: {field} is {value}, the limit is {limit}")]
    TooLarge {
        /// The structure.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The largest value allowed.
        limit: u64,
    },
    /// A code (codec, encryption, kind) that this build does not know.
    #[error("{what} has an unknown {field}: {found}")]
    Unknown {
        /// The structure.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// The payload does not decompress to what the header says.
    #[error("{what} does not decompress to the length it states")]
    Decompress {
        /// The structure.
        what: &'static str,
    },
    /// The payload is encrypted and no key was given.
    #[error("{what} is encrypted and no key is at hand")]
    KeyMissing {
        /// The structure.
        what: &'static str,
    },
    /// The payload is encrypted with a key that is not among those at hand.
    #[error("{what} is encrypted with key {generation} of its volume, which is not at hand")]
    KeyUnknown {
        /// The structure.
        what: &'static str,
        /// The key's generation.
        generation: u16,
    },
    /// The payload's authentication fails: another key, or tampered with.
    #[error("{what} does not authenticate: wrong key, or changed after it was written")]
    Decrypt {
        /// The structure.
        what: &'static str,
    },
    /// The JSON inside a record is not the record's.
    #[error("{what} holds JSON that does not fit: {reason}")]
    Json {
        /// The structure.
        what: &'static str,
        /// What the parser says.
        reason: String,
    },
}

/// What a decoder returns.
pub type Result<T, E = FormatError> = std::result::Result<T, E>;

impl FormatError {
    /// Shorthand for [`FormatError::Invalid`].
    #[must_use]
    pub const fn invalid(what: &'static str, why: &'static str) -> Self {
        Self::Invalid { what, why }
    }
}

/// Refuses a value of a field above its limit.
pub(crate) fn check_up_to(
    what: &'static str,
    field: &'static str,
    value: u64,
    limit: u64,
) -> Result<()> {
    if value <= limit {
        return Ok(());
    }
    Err(FormatError::TooLarge {
        what,
        field,
        value,
        limit,
    })
}
