//! Small records of the control plane: JSON in an envelope that is versioned and checksummed.
//!
//! Fields that a reader does not know are ignored: records are created and deleted, not
//! rewritten, so nothing can be lost by that. A tenant's, a name's and that of a tenant's tokens are rewritten, and keep
//! them.

mod tenant;
mod token;

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{FormatError, Result, check_up_to};
use crate::prologue::{Format, put_str, read_str};
use crate::types::VolumeId;

pub use tenant::{
    RESERVATIONS_MAX, Rates, Reservation, Suspended, TenantRecord, TenantSettings, TenantStore,
    WEIGHT_DEFAULT,
};
pub use token::{TOKEN_NOTE_BYTES_MAX, TOKENS_MAX, TokenRecord, TokensRecord};

const WHAT: &str = "record";
const FORMAT: Format = Format {
    magic: *b"QYRC",
    version: 1,
    what: WHAT,
    len_max: 64 << 10,
};

/// The kind of a [`TenantRecord`].
pub const TENANT_KIND: &str = "tenant";
/// The kind of a [`NameRecord`].
pub const NAME_KIND: &str = "name";
/// The kind of a [`CloneRecord`].
pub const CLONE_KIND: &str = "clone";
/// The kind of a [`TrashRecord`].
pub const TRASH_KIND: &str = "trash";

/// The kind of a [`TokensRecord`].
pub const TOKENS_KIND: &str = "tokens";

/// The kind of a [`HotRecord`].
pub const HOT_KIND: &str = "hot";

/// Most ranges of a [`HotRecord`]: with the longest numbers it stays below 64 KiB.
pub const HOT_RANGES_MAX: usize = 1800;

/// The volume that a name stands for, and what it may do wherever it is attached.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NameRecord {
    /// The volume.
    pub volume: VolumeId,
    /// When it was created, in milliseconds since 1970.
    pub created_ms: u64,
    /// How fast it may be used.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rates: Rates,
    /// What a newer program wrote.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_json::Value>,
}

impl NameRecord {
    /// That of a volume that may do what it can.
    #[must_use]
    pub const fn new(volume: VolumeId, created_ms: u64) -> Self {
        Self {
            volume,
            created_ms,
            rates: Rates::NONE,
            others: BTreeMap::new(),
        }
    }
}

/// A clone, recorded at the snapshot that it was made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CloneRecord {
    /// The clone.
    pub volume: VolumeId,
    /// What it was to be called, for people.
    pub name: String,
    /// When it was begun, in milliseconds since 1970.
    pub created_ms: u64,
}

/// A volume that was deleted and can still be brought back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TrashRecord {
    /// The volume.
    pub volume: VolumeId,
    /// What it was called.
    pub name: String,
    /// When it was deleted, in milliseconds since 1970.
    pub deleted_ms: u64,
    /// The snapshot that it was cloned from, where a record of it is left when its head is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<CloneOf>,
    /// How fast it may be used when it is brought back.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rates: Rates,
}

/// What of a volume was read most where it was attached last: what the next host may fetch at once. A hint:
/// nothing depends on it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HotRecord {
    /// The epoch of that attachment.
    pub epoch: u32,
    /// First sector and sectors of each range, the most read first; at most [`HOT_RANGES_MAX`].
    pub ranges: Vec<(u64, u64)>,
}

/// A snapshot of a volume of the same tenant.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CloneOf {
    /// The volume.
    pub volume: VolumeId,
    /// The snapshot's name.
    pub snapshot: String,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The bytes of a record of this kind.
///
/// # Errors
/// If `json` cannot be JSON, or is longer than 64 KiB.
pub fn encode_record(kind: &str, json: &impl Serialize) -> Result<Vec<u8>> {
    let text = serde_json::to_vec(json).map_err(|error| FormatError::Json {
        what: WHAT,
        reason: error.to_string(),
    })?;
    let mut out = FORMAT.begin();
    put_str(&mut out, kind);
    out.extend_from_slice(&text);
    check_up_to(WHAT, "length", out.len() as u64, FORMAT.len_max as u64)?;
    FORMAT.seal(&mut out);
    Ok(out)
}

/// The record of this kind that `bytes` are.
///
/// # Errors
/// If they are damaged, a record of another kind, or hold JSON that does not fit.
pub fn decode_record<T: DeserializeOwned>(kind: &str, bytes: &[u8]) -> Result<T> {
    let (_, mut reader) = FORMAT.open(bytes)?;
    if read_str(&mut reader)? != kind {
        return Err(FormatError::Misplaced {
            what: WHAT,
            field: "kind",
        });
    }
    let text = reader.bytes(reader.remaining())?;
    serde_json::from_slice(text).map_err(|error| FormatError::Json {
        what: WHAT,
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> NameRecord {
        NameRecord::new(VolumeId::from_bytes([1; 16]), 2)
    }

    #[test]
    fn name_record_rewritten_keeps_what_a_newer_program_wrote() {
        let plain = r#"{"volume":"01010101-0101-0101-0101-010101010101","created_ms":2}"#;
        let mut record: NameRecord = serde_json::from_str(plain).unwrap();
        assert_eq!(record, sample());
        assert_eq!(serde_json::to_string(&record).unwrap(), plain);
        let newer = plain.replace('}', r#","rates":{"iops":5},"colour":{"deep":[1]}}"#);
        record = serde_json::from_str(&newer).unwrap();
        assert_eq!(record.rates.iops, Some(5));
        assert_eq!(serde_json::to_string(&record).unwrap(), newer);
    }

    #[test]
    fn record_round_trips() {
        let bytes = encode_record(NAME_KIND, &sample()).unwrap();
        assert_eq!(decode_record(NAME_KIND, &bytes), Ok(sample()));
    }

    #[test]
    fn trash_record_without_a_parent_is_read_and_written_without_one() {
        let json =
            r#"{"volume":"01010101-0101-0101-0101-010101010101","name":"db","deleted_ms":5}"#;
        let record: TrashRecord = serde_json::from_str(json).unwrap();
        assert_eq!(record.parent, None);
        assert_eq!(serde_json::to_string(&record).unwrap(), json);
    }

    #[test]
    fn hot_record_of_the_most_and_longest_ranges_fits() {
        let ranges = vec![((1 << 51) - 1, 1 << 51); HOT_RANGES_MAX];
        let epoch = u32::MAX;
        let record = HotRecord { epoch, ranges };
        let bytes = encode_record(HOT_KIND, &record).unwrap();
        assert_eq!(decode_record(HOT_KIND, &bytes), Ok(record));
    }

    #[test]
    fn record_of_another_kind_is_refused() {
        let bytes = encode_record(NAME_KIND, &sample()).unwrap();
        let refused = decode_record::<NameRecord>(TENANT_KIND, &bytes);
        assert_eq!(
            refused,
            Err(FormatError::Misplaced {
                what: "record",
                field: "kind"
            })
        );
    }

    #[test]
    fn record_with_other_json_is_refused() {
        let bytes = encode_record(NAME_KIND, &["a"]).unwrap();
        let refused = decode_record::<NameRecord>(NAME_KIND, &bytes);
        assert!(matches!(refused, Err(FormatError::Json { .. })));
    }

    #[test]
    fn record_any_flip_or_cut_is_an_error() {
        let bytes = encode_record(NAME_KIND, &sample()).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(
                decode_record::<NameRecord>(NAME_KIND, &bad).is_err(),
                "bit {bit}"
            );
        }
        for len in 0..bytes.len() {
            assert!(decode_record::<NameRecord>(NAME_KIND, &bytes[..len]).is_err());
        }
    }
}
