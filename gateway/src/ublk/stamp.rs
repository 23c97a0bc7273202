//! How a device is known again after its daemon died: two marks, one for the machine, one for
//! people.
//!
//! The kernel keeps 64 bits of ours with the device (`ublksrv_flags`), which nobody can change: the
//! first half of the volume's id. The file that libublk keeps for the device under `/run/ublksrvd`
//! holds the [`Stamp`] in words, among them whose device it is: each daemon has a cache device of its own; that directory is open to all, so the stamp counts only where it
//! agrees with the kernel's word.

use quarry_objfmt::{CacheId, TenantName, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use super::DeviceSpec;

/// Version of the stamp's JSON.
const VERSION: u32 = 1;

/// What a device's file says of the volume behind it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stamp {
    version: u32,
    /// The cache device of the daemon that made it.
    pub cache: CacheId,
    /// The volume.
    pub volume: VolumeId,
    /// Its tenant.
    pub tenant: TenantName,
    /// Its name.
    pub name: VolumeName,
    /// Whether the device takes no writes.
    pub read_only: bool,
}

impl Stamp {
    /// The stamp of a device.
    #[must_use]
    pub fn of(spec: &DeviceSpec) -> Self {
        Self {
            version: VERSION,
            cache: spec.cache,
            volume: spec.volume,
            tenant: spec.tenant.clone(),
            name: spec.name.clone(),
            read_only: spec.read_only,
        }
    }

    /// From a device's file; `None` if it is none of ours.
    pub(super) fn from_json(json: serde_json::Value) -> Option<Self> {
        let stamp: Self = serde_json::from_value(json.get("quarry")?.clone()).ok()?;
        (stamp.version == VERSION).then_some(stamp)
    }

    /// For a device's file.
    pub(super) fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "quarry": self })
    }
}

/// The mark that the kernel keeps; never 0, which is what others' devices have.
pub(super) fn word(volume: VolumeId) -> u64 {
    let bytes = volume.to_bytes();
    let mut half = [0; 8];
    half.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(half).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamp_written_and_read_is_the_same() {
        let stamp = Stamp::of(&DeviceSpec::example());
        assert_eq!(Stamp::from_json(stamp.to_json()), Some(stamp));
    }

    #[test]
    fn stamp_of_somebody_else_is_none() {
        for json in [
            serde_json::json!({}),
            serde_json::json!(null),
            serde_json::json!({ "quarry": 3 }),
            serde_json::json!({ "quarry": { "version": 1 } }),
        ] {
            assert_eq!(Stamp::from_json(json), None);
        }
    }

    #[test]
    fn stamp_of_another_version_is_none() {
        let mut json = Stamp::of(&DeviceSpec::example()).to_json();
        json["quarry"]["version"] = serde_json::json!(2);
        assert_eq!(Stamp::from_json(json), None);
    }

    #[test]
    fn word_of_a_volume_is_half_its_id_and_never_zero() {
        assert_eq!(word(VolumeId::from_bytes([0; 16])), 1);
        assert_eq!(word(VolumeId::from_bytes([1; 16])), 0x0101_0101_0101_0101);
    }
}
