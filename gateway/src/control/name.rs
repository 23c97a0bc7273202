//! How people name a volume.

use std::fmt;
use std::str::FromStr;

use quarry_objfmt::keys::NAME_LEN_MAX;
use quarry_objfmt::{NameError, TenantName, VolumeName};

use super::{ApiError, ApiResult};

/// A volume as people name it: `tenant/name`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VolumeRef {
    /// The tenant.
    pub tenant: TenantName,
    /// Its volume.
    pub name: VolumeName,
}

impl VolumeRef {
    /// From its two names.
    ///
    /// # Errors
    /// If one of them cannot be a name.
    pub fn new(tenant: impl Into<String>, name: impl Into<String>) -> Result<Self, NameError> {
        Ok(Self {
            tenant: TenantName::new(tenant)?,
            name: VolumeName::new(name)?,
        })
    }
}

impl fmt::Display for VolumeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.name)
    }
}

impl FromStr for VolumeRef {
    type Err = ApiError;

    fn from_str(text: &str) -> ApiResult<Self> {
        match text.split_once('/') {
            Some((tenant, name)) => Ok(Self::new(tenant, name)?),
            None => Err(ApiError::invalid(
                format!("{text:?} names no volume"),
                "write tenant/volume, such as acme/db",
            )),
        }
    }
}

impl From<NameError> for ApiError {
    fn from(error: NameError) -> Self {
        let NameError { kind, name, why } = error;
        Self::invalid(
            format!("{name:?} cannot be the name of a {kind}: {why}"),
            format!(
                "use 1 to {NAME_LEN_MAX} of a-z, 0-9, '.', '_' and '-', a letter or digit first"
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_ref_of_two_names_reads_back() {
        let volume: VolumeRef = "acme/db.1_x-y".parse().unwrap();
        assert_eq!(
            (volume.tenant.as_str(), volume.name.as_str()),
            ("acme", "db.1_x-y")
        );
        assert_eq!(volume.to_string(), "acme/db.1_x-y");
    }

    #[test]
    fn names_that_could_reach_elsewhere_are_refused() {
        let long = format!("a/{}", "x".repeat(64));
        for text in [
            "", "acme", "acme/", "/db", "a/b/c", "../db", "a/..", "A/db", "a/d b", "a/-x", "a/é",
            "a/b\0", &long,
        ] {
            let error = text.parse::<VolumeRef>().expect_err(text);
            assert!(!error.message.is_empty() && !error.remedy.is_empty());
        }
    }
}
