//! How a device is known again after its daemon died: two marks, one for the machine, one for
//! people.
//!
//! The kernel keeps 64 bits of ours with the device (`ublksrv_flags`), which nobody can change: the
//! first half of the volume's id. The file that libublk keeps for the device under `/run/ublksrvd`
//! holds the [`Stamp`] in words, among them whose device it is: each daemon has a cache device of its own. Other programs may
//! have written there before, so the stamp counts only where it agrees with the kernel's word. libublk writes the file in place, so a
//! daemon that ends meanwhile may leave it empty: the stamp is in what udev is told of the device too.

use quarry_objfmt::{CacheId, SnapName, TenantName, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use super::DeviceSpec;
use crate::moment::Moment;

/// Version of the stamp's JSON.
const VERSION: u32 = 1;

/// What a device's file says of the volume behind it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stamp {
    version: u32,
    /// The cache device of the daemon that made it.
    pub cache: CacheId,
    /// The volume; of a snapshot's device [`snapshot_device`].
    pub volume: VolumeId,
    /// Its tenant.
    pub tenant: TenantName,
    /// Its name.
    pub name: VolumeName,
    /// The snapshot, if it is one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapName>,
    /// The time, if it is of a volume as it was then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Moment>,
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
            snapshot: spec.snapshot.clone(),
            at: spec.at,
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

/// By what a snapshot's device is known again, in the place of a volume's id: neither its volume's
/// device nor another snapshot's is taken for it, nor one's that had the name before.
pub fn snapshot_device(volume: VolumeId, name: &SnapName, created_ms: u64) -> VolumeId {
    marked(volume, name.as_str(), created_ms)
}

/// The same of the device of a volume as it was at a time.
pub fn past_device(volume: VolumeId, at: Moment) -> VolumeId {
    // No snapshot is called so.
    marked(volume, &at.to_string(), at.ms())
}

fn marked(volume: VolumeId, name: &str, created_ms: u64) -> VolumeId {
    // FNV-1a: the same in every build, for devices outlive their daemons.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.bytes().chain(created_ms.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut bytes = volume.to_bytes();
    for (byte, mark) in bytes.iter_mut().zip(hash.to_le_bytes()) {
        *byte ^= mark;
    }
    VolumeId::from_bytes(bytes)
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
    fn device_of_a_snapshot_is_known_from_its_volumes_and_other_snapshots() {
        let volume = VolumeId::from_bytes([7; 16]);
        let name = |name: &str| SnapName::new(name).unwrap();
        let device = snapshot_device(volume, &name("nightly"), 5);
        let words = [
            volume,
            past_device(volume, Moment::from_ms(5)),
            device,
            snapshot_device(volume, &name("nightlz"), 5),
            snapshot_device(volume, &name("nightly"), 6),
            snapshot_device(VolumeId::from_bytes([8; 16]), &name("nightly"), 5),
        ];
        let words: std::collections::BTreeSet<u64> = words.map(word).into();
        assert_eq!(words.len(), 6);
        // For ever: a daemon takes over what an older one made.
        assert_eq!(word(device), 0x2572e611d560a068);
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
