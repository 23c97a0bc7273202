//! How people name a volume, a snapshot, and what of both can be attached.

use std::fmt;
use std::str::FromStr;

use quarry_objfmt::keys::NAME_LEN_MAX;
use quarry_objfmt::{NameError, SnapName, TenantName, VolumeName};

use super::{ApiError, ApiResult};
use crate::moment::Moment;

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

/// A snapshot as people name it: `tenant/name@snapshot`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SnapRef {
    /// Whose it is.
    pub volume: VolumeRef,
    /// Its name.
    pub name: SnapName,
}

impl fmt::Display for SnapRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.name)
    }
}

impl FromStr for SnapRef {
    type Err = ApiError;

    fn from_str(text: &str) -> ApiResult<Self> {
        match text.split_once('@') {
            Some((volume, name)) => Ok(Self {
                volume: volume.parse()?,
                name: SnapName::new(name)?,
            }),
            None => Err(ApiError::invalid(
                format!("{text:?} names no snapshot"),
                "write tenant/volume@snapshot, such as acme/db@nightly",
            )),
        }
    }
}

/// What can be attached: a volume, or, for reading, one of its snapshots or the volume as it was at a time.
/// Ordered and compared by all of it, so that none is taken for another.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ImageRef {
    /// The volume.
    pub volume: VolumeRef,
    /// Its snapshot; `None`: the volume itself.
    pub snapshot: Option<SnapName>,
    /// The time, if it is the volume as it was then; then there is no snapshot.
    pub at: Option<Moment>,
}

impl ImageRef {
    /// From the tenant's name and [`ImageRef::short_name`].
    ///
    /// # Errors
    /// If one of the names cannot be one.
    pub fn new(tenant: impl Into<String>, short_name: &str) -> Result<Self, NameError> {
        let (name, behind) = match short_name.split_once('@') {
            Some((name, behind)) => (name, Some(behind)),
            None => (short_name, None),
        };
        // A time has a `T` and colons, which no name has.
        let at = behind.and_then(|text| text.parse().ok());
        let snapshot = behind.filter(|_| at.is_none()).map(SnapName::new);
        Ok(Self {
            volume: VolumeRef::new(tenant, name)?,
            snapshot: snapshot.transpose()?,
            at,
        })
    }

    /// A volume as it was at a time.
    #[must_use]
    pub fn past(volume: VolumeRef, at: Moment) -> Self {
        Self {
            at: Some(at),
            ..volume.into()
        }
    }

    /// Whether it is of the past: it takes no writes, and is nobody's.
    #[must_use]
    pub const fn is_past(&self) -> bool {
        self.snapshot.is_some() || self.at.is_some()
    }

    /// What stands behind the volume's name: the snapshot's, or the time.
    #[must_use]
    pub fn behind(&self) -> Option<String> {
        let at = self.at.map(|at| at.to_string());
        at.or_else(|| self.snapshot.as_ref().map(ToString::to_string))
    }

    /// The name without the tenant's, as devices, exports and metrics have it: `name`, `name@snapshot` or
    /// `name@time`.
    #[must_use]
    pub fn short_name(&self) -> String {
        match self.behind() {
            Some(behind) => format!("{}@{behind}", self.volume.name),
            None => self.volume.name.to_string(),
        }
    }
}

impl From<VolumeRef> for ImageRef {
    fn from(volume: VolumeRef) -> Self {
        Self {
            volume,
            snapshot: None,
            at: None,
        }
    }
}

impl From<SnapRef> for ImageRef {
    fn from(snapshot: SnapRef) -> Self {
        Self {
            volume: snapshot.volume,
            snapshot: Some(snapshot.name),
            at: None,
        }
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.volume.tenant, self.short_name())
    }
}

impl FromStr for ImageRef {
    type Err = ApiError;

    fn from_str(text: &str) -> ApiResult<Self> {
        match text.split_once('/') {
            Some((tenant, short_name)) => Ok(Self::new(tenant, short_name)?),
            None => Err(text.parse::<VolumeRef>().unwrap_err()),
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
    fn image_ref_is_a_volume_or_a_snapshot_and_reads_back() {
        for text in ["acme/db", "acme/db@nightly-1.2"] {
            let image: ImageRef = text.parse().unwrap();
            assert_eq!(image.to_string(), text);
            assert_eq!(image.snapshot.is_some(), text.contains('@'));
        }
        let text = "acme/db@2026-11-25T03:00:00.040Z";
        let image: ImageRef = text.parse().unwrap();
        assert_eq!(image.to_string(), text);
        assert!(image.at.is_some() && image.snapshot.is_none() && image.is_past());
        assert!(text.parse::<SnapRef>().is_err());
        let snapshot: SnapRef = "acme/db@nightly".parse().unwrap();
        assert_eq!(ImageRef::from(snapshot).short_name(), "db@nightly");
        for text in [
            "acme/db@",
            "@nightly",
            "acme@nightly",
            "acme/db@a@b",
            "acme/db@../x",
            "acme/db@Nightly",
        ] {
            assert!(text.parse::<ImageRef>().is_err(), "{text}");
            assert!(text.parse::<SnapRef>().is_err(), "{text}");
        }
        assert!("acme/db".parse::<SnapRef>().is_err());
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
