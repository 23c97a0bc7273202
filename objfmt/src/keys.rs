//! Where everything lies in the object store, below the configured prefix.
//!
//! Names are checked before they become part of a key: a tenant cannot reach outside its own keys
//! by the choice of a name.

use std::fmt;
use std::str::FromStr;

use crate::types::{ChunkId, Epoch, MapSeq, VolumeId};

/// Longest name, in characters (which are bytes).
pub const NAME_LEN_MAX: usize = 63;

/// A name that cannot be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} cannot be the name of a {kind}: {why}; use 1 to {NAME_LEN_MAX} of a-z, 0-9, '.', '_' \
     and '-', a letter or digit first"
)]
pub struct NameError {
    /// What was to be named.
    pub kind: &'static str,
    /// The name; a long one is cut.
    pub name: String,
    /// What is wrong with it.
    pub why: &'static str,
}

fn check(kind: &'static str, name: &str) -> Result<(), NameError> {
    let allowed = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '.' | '_' | '-');
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_LEN_MAX {
        "it is too long"
    } else if name.chars().any(|c| c.is_ascii_uppercase()) {
        "it has a capital letter"
    } else if !name.chars().all(allowed) {
        "it has a character that is not allowed"
    } else if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        "it starts with a punctuation mark"
    } else {
        return Ok(());
    };
    Err(NameError {
        kind,
        name: name.chars().take(NAME_LEN_MAX + 1).collect(),
        why,
    })
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name(String);

        impl $name {
            /// The name, if it can be one.
            ///
            /// # Errors
            /// With what is wrong and what is allowed.
            pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
                let name = name.into();
                check($kind, &name)?;
                Ok(Self(name))
            }

            /// The name.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(name: String) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A tenant's name.
    TenantName,
    "tenant"
);
name!(
    /// A volume's name, unique within its tenant.
    VolumeName,
    "volume"
);
name!(
    /// A snapshot's name, unique within its volume.
    SnapName,
    "snapshot"
);

name!(
    /// The name of a key that wraps data keys.
    KeyName,
    "key"
);

/// Where the tenant records lie, to list them.
pub const TENANTS_PREFIX: &str = "tenants/";

/// The tenant's record.
#[must_use]
pub fn tenant_key(tenant: &TenantName) -> String {
    format!("{TENANTS_PREFIX}{tenant}")
}

/// Where the tokens of tenants lie, to list them.
pub const TOKENS_PREFIX: &str = "tokens/";

/// The operators' tokens.
pub const OPERATOR_TOKENS_KEY: &str = "operator-tokens";

/// A tenant's tokens, or the operators'.
#[must_use]
pub fn tokens_key(tenant: Option<&TenantName>) -> String {
    match tenant {
        Some(tenant) => format!("{TOKENS_PREFIX}{tenant}"),
        None => OPERATOR_TOKENS_KEY.to_owned(),
    }
}

/// Where all of a tenant's objects but its record and its tokens lie.
#[must_use]
pub fn tenant_prefix(tenant: &TenantName) -> String {
    format!("t/{tenant}/")
}

/// Where the names of a tenant's volumes lie, to list them.
#[must_use]
pub fn names_prefix(tenant: &TenantName) -> String {
    format!("t/{tenant}/names/")
}

/// The record that gives a volume its name.
#[must_use]
pub fn name_key(tenant: &TenantName, name: &VolumeName) -> String {
    format!("t/{tenant}/names/{name}")
}

/// Where all objects of a volume lie.
#[must_use]
pub fn volume_prefix(tenant: &TenantName, volume: VolumeId) -> String {
    format!("t/{tenant}/v/{volume}/")
}

/// The volume's head.
#[must_use]
pub fn head_key(tenant: &TenantName, volume: VolumeId) -> String {
    format!("t/{tenant}/v/{volume}/head")
}

/// A chunk, or the seal in its place.
#[must_use]
pub fn chunk_key(tenant: &TenantName, chunk: ChunkId) -> String {
    let ChunkId { volume, epoch, seq } = chunk;
    format!(
        "t/{tenant}/v/{volume}/chunk/{:08x}/{:016x}",
        epoch.get(),
        seq.get()
    )
}

/// A map object.
#[must_use]
pub fn map_key(tenant: &TenantName, volume: VolumeId, epoch: Epoch, seq: MapSeq) -> String {
    format!(
        "t/{tenant}/v/{volume}/map/{:08x}/{:016x}",
        epoch.get(),
        seq.get()
    )
}

/// Where the copies of a volume's wrapped keys lie, to list them.
#[must_use]
pub fn keys_prefix(tenant: &TenantName, volume: VolumeId) -> String {
    format!("t/{tenant}/v/{volume}/keys/")
}

/// A copy of a volume's wrapped keys.
#[must_use]
pub fn keys_key(tenant: &TenantName, volume: VolumeId, revision: u32) -> String {
    format!("t/{tenant}/v/{volume}/keys/{revision:08x}")
}

/// What of the volume was read most.
#[must_use]
pub fn hot_key(tenant: &TenantName, volume: VolumeId) -> String {
    format!("t/{tenant}/v/{volume}/hot")
}

/// A snapshot.
#[must_use]
pub fn snap_key(tenant: &TenantName, volume: VolumeId, name: &SnapName) -> String {
    format!("t/{tenant}/v/{volume}/snap/{name}")
}

/// Where the clones of all of a volume's snapshots are recorded, to list them.
#[must_use]
pub fn all_clones_prefix(tenant: &TenantName, volume: VolumeId) -> String {
    format!("t/{tenant}/v/{volume}/clone/")
}

/// Where the clones of a snapshot are recorded, to list them.
#[must_use]
pub fn clones_prefix(tenant: &TenantName, volume: VolumeId, name: &SnapName) -> String {
    format!("t/{tenant}/v/{volume}/clone/{name}/")
}

/// The record of a clone of a snapshot.
#[must_use]
pub fn clone_key(
    tenant: &TenantName,
    volume: VolumeId,
    name: &SnapName,
    clone: VolumeId,
) -> String {
    format!("t/{tenant}/v/{volume}/clone/{name}/{clone}")
}

/// Where a tenant's deleted volumes are recorded, to list them.
#[must_use]
pub fn trash_prefix(tenant: &TenantName) -> String {
    format!("t/{tenant}/trash/")
}

/// The record of a deleted volume.
#[must_use]
pub fn trash_key(tenant: &TenantName, volume: VolumeId) -> String {
    format!("t/{tenant}/trash/{volume}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ChunkSeq;

    #[test]
    fn name_allowed_ones_are_taken() {
        for name in ["a", "0", "acme", "db-1.prod_x", &"x".repeat(63)] {
            assert_eq!(TenantName::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn name_others_are_refused_with_the_reason() {
        let cases = [
            ("", "empty"),
            (&*"x".repeat(64), "too long"),
            ("Acme", "capital"),
            ("a/b", "not allowed"),
            ("a b", "not allowed"),
            ("ä", "not allowed"),
            ("a\0", "not allowed"),
            ("..", "punctuation"),
            ("-a", "punctuation"),
        ];
        for (name, reason) in cases {
            let error = VolumeName::new(name).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("a-z"), "{error}");
        }
    }

    #[test]
    fn name_from_json_is_checked() {
        assert!(serde_json::from_str::<VolumeName>("\"db\"").is_ok());
        assert!(serde_json::from_str::<VolumeName>("\"../db\"").is_err());
    }

    #[test]
    fn keys_are_those_of_the_layout() {
        let tenant = TenantName::new("acme").unwrap();
        let volume = VolumeId::from_bytes([0x11; 16]);
        let id = "11111111-1111-1111-1111-111111111111";
        let chunk = ChunkId {
            volume,
            epoch: Epoch::new(2),
            seq: ChunkSeq::new(0xabc),
        };
        let name = VolumeName::new("db").unwrap();
        let snap = SnapName::new("monday").unwrap();
        assert_eq!(tenant_key(&tenant), "tenants/acme");
        assert_eq!(tokens_key(Some(&tenant)), "tokens/acme");
        assert_eq!(tokens_key(None), "operator-tokens");
        assert_eq!(name_key(&tenant, &name), "t/acme/names/db");
        assert_eq!(volume_prefix(&tenant, volume), format!("t/acme/v/{id}/"));
        assert_eq!(head_key(&tenant, volume), format!("t/acme/v/{id}/head"));
        let key = format!("t/acme/v/{id}/chunk/00000002/0000000000000abc");
        assert_eq!(chunk_key(&tenant, chunk), key);
        let key = format!("t/acme/v/{id}/map/00000002/0000000000000005");
        assert_eq!(map_key(&tenant, volume, Epoch::new(2), MapSeq::new(5)), key);
        assert_eq!(
            keys_key(&tenant, volume, 0x1a),
            format!("t/acme/v/{id}/keys/0000001a")
        );
        assert_eq!(
            snap_key(&tenant, volume, &snap),
            format!("t/acme/v/{id}/snap/monday")
        );
        assert_eq!(
            clone_key(&tenant, volume, &snap, volume),
            format!("t/acme/v/{id}/clone/monday/{id}")
        );
        assert_eq!(trash_key(&tenant, volume), format!("t/acme/trash/{id}"));
    }
}
