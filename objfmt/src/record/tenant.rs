//! A tenant's state of record: who it is, where its data lie, and what it may have.
//!
//! Unlike other records it is rewritten, as a whole, where it was seen. So fields that a program does not
//! know are kept, and a number that only grows keeps its bytes from coming back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The weight of a tenant that was given none.
pub const WEIGHT_DEFAULT: u32 = 100;

/// Most things that are made for a tenant with quotas at once.
pub const RESERVATIONS_MAX: usize = 64;

/// A tenant.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TenantRecord {
    /// Its name.
    pub name: String,
    /// When it was created, in milliseconds since 1970.
    pub created_ms: u64,
    /// How often it was changed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub revision: u64,
    /// What it may have.
    #[serde(default, skip_serializing_if = "is_default")]
    pub settings: TenantSettings,
    /// What is being made for it just now and counts already: at most [`RESERVATIONS_MAX`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub reservations: Vec<Reservation>,
    /// What a newer program wrote.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_json::Value>,
}

/// What a tenant may have, and how it is treated. What is not said is not limited.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TenantSettings {
    /// Where its volumes are; none: in the store that the record is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<TenantStore>,
    /// Sizes of its volumes, all together, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provisioned_bytes_max: Option<u64>,
    /// Bytes of its objects in the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stored_bytes_max: Option<u64>,
    /// Volumes, those in the trash not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volumes_max: Option<u64>,
    /// Snapshots of all its volumes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshots_max: Option<u64>,
    /// What all its volumes on one host may do together.
    #[serde(skip_serializing_if = "is_default")]
    pub rates: Rates,
    /// Its share where several want more than there is, beside others'; none: [`WEIGHT_DEFAULT`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Bytes of each host's cache that no other tenant takes from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_reserve_bytes: Option<u64>,
    /// Bytes of each host's cache that it takes at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_bytes_max: Option<u64>,
    /// Of these, bytes that the store lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_bytes_max: Option<u64>,
    /// The name of the key that wraps its volumes' data keys; none: new volumes are not encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// How its volumes are held up, if they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspended: Option<Suspended>,
    /// What a newer program wrote.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_json::Value>,
}

/// What is being made for a tenant, and may not be found in the store yet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reservation {
    /// Told from others by this.
    pub id: u64,
    /// What it is, for people.
    pub what: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
    /// Volumes in it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub volumes: u64,
    /// Snapshots in it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub snapshots: u64,
    /// Bytes by which it makes the tenant's volumes larger.
    #[serde(default, skip_serializing_if = "is_default")]
    pub provisioned_bytes: u64,
}

/// A store of a tenant's own.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TenantStore {
    /// `s3://bucket/prefix` or `file:///dir`.
    pub url: String,
    /// URL of an S3 server other than Amazon's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The region.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// The bucket in the path rather than in the host name; none: yes with an endpoint, else no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_style: Option<bool>,
    /// What the hosts' configuration calls the credentials; none: those of the daemon's own store. Secrets are in no
    /// object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials: Option<String>,
    /// What a newer program wrote.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_json::Value>,
}

/// How fast requests are taken; none: as fast as can be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// Requests a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Requests that may come at once after a rest; none: a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
    /// Bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes: Option<u64>,
    /// Bytes that may come at once after a rest; none: a tenth of a second's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst_bytes: Option<u64>,
}

impl Rates {
    /// As fast as can be.
    pub const NONE: Self = Self {
        iops: None,
        iops_burst: None,
        bandwidth_bytes: None,
        bandwidth_burst_bytes: None,
    };
}

/// How a suspended tenant's devices behave.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Suspended {
    /// They refuse writes.
    ReadOnly,
    /// All their requests wait.
    Stall,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenant_record_of_the_first_version_is_read_and_written_as_it_was() {
        let json = r#"{"name":"acme","created_ms":5}"#;
        let record: TenantRecord = serde_json::from_str(json).unwrap();
        assert_eq!(record.settings, TenantSettings::default());
        assert_eq!(serde_json::to_string(&record).unwrap(), json);
    }

    #[test]
    fn tenant_record_rewritten_keeps_what_a_newer_program_wrote() {
        let json = r#"{"name":"acme","created_ms":5,"settings":{"volumes_max":7,"store":{"url":"s3://b/p","tier":3},"colour":{"deep":[1]}},"planet":"blue"}"#;
        let mut record: TenantRecord = serde_json::from_str(json).unwrap();
        record.revision += 1;
        record.settings.volumes_max = Some(8);
        let again = serde_json::to_string(&record).unwrap();
        for kept in [
            r#""tier":3"#,
            r#""colour":{"deep":[1]}"#,
            r#""planet":"blue""#,
        ] {
            assert!(again.contains(kept), "{again}");
        }
        assert!(again.contains(r#""volumes_max":8"#) && again.contains(r#""revision":1"#));
    }

    #[test]
    fn settings_that_are_all_said_round_trip() {
        let rates = Rates {
            iops: Some(1),
            iops_burst: Some(2),
            bandwidth_bytes: Some(3),
            bandwidth_burst_bytes: Some(u64::MAX),
        };
        let settings = TenantSettings {
            rates,
            suspended: Some(Suspended::ReadOnly),
            key: Some("k".to_owned()),
            ..TenantSettings::default()
        };
        let text = serde_json::to_string(&settings).unwrap();
        assert!(text.contains(r#""suspended":"read-only""#), "{text}");
        assert_eq!(
            serde_json::from_str::<TenantSettings>(&text).unwrap(),
            settings
        );
    }
}
