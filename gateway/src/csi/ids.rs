//! Ids and names: a volume's id is `tenant/volume`, a snapshot's `tenant/volume@snapshot`, a node's `host/cache`.

use std::fmt;

use quarry_objfmt::{CacheId, SnapName, VolumeName};
use ring::digest::{SHA256, digest};
use tonic::Status;

use super::answer::Answer;
use crate::control::{OwnerInfo, SnapRef, StatusInfo, VolumeRef};

/// CSI's bound on the length of a string, in bytes.
const STRING_MAX: usize = 128;

/// What names begin with that are made here.
const OURS: &str = "csi-";
/// What the names of snapshots begin with that were made to clone a volume.
const FOR_CLONE: &str = "csi-clone-";

/// The volume with this id.
///
/// # Errors
/// If there cannot be one: of an id that was not given out here nothing is known.
pub(super) fn volume(id: &str) -> Answer<VolumeRef> {
    id.parse()
        .map_err(|_| Status::not_found(format!("there is no volume {id:?}")))
}

/// The snapshot with this id.
///
/// # Errors
/// If there cannot be one.
pub(super) fn snapshot(id: &str) -> Answer<SnapRef> {
    id.parse()
        .map_err(|_| Status::not_found(format!("there is no snapshot {id:?}")))
}

/// What a volume that the caller calls `name` is called here, whenever it is asked for: the same, if that can be a
/// name here.
///
/// # Errors
/// If CSI has no such names.
pub(super) fn volume_name(name: &str) -> Answer<VolumeName> {
    check(name)?;
    Ok(match VolumeName::new(name) {
        Ok(plain) if !name.starts_with(OURS) => plain,
        _ => VolumeName::new(hashed(OURS, name)).expect("a hash is a name"),
    })
}

/// What a snapshot of `volume` that the caller calls `name` can be called here; the first is what a new one is called.
///
/// # Errors
/// If CSI has no such names, or no string as long as its id.
pub(super) fn snapshot_names(volume: &VolumeRef, name: &str) -> Answer<Vec<SnapName>> {
    check(name)?;
    let plain = SnapName::new(name).ok().filter(|_| !name.starts_with(OURS));
    let short = SnapName::new(hashed(OURS, name)).expect("a hash is a name");
    let fits = |snapshot: &SnapName| format!("{volume}@{snapshot}").len() <= STRING_MAX;
    if !fits(&short) {
        let message = format!(
            "a snapshot of {volume} would have an id of more than {STRING_MAX} bytes: use shorter names"
        );
        return Err(Status::invalid_argument(message));
    }
    Ok(match plain {
        Some(plain) if fits(&plain) => vec![plain, short],
        Some(plain) => vec![short, plain],
        None => vec![short],
    })
}

/// What the snapshot is called that is made to clone a volume under this name, if `tries` such names are taken.
pub(super) fn clone_snapshot(clone: &VolumeName, tries: usize) -> SnapName {
    let first = hashed(FOR_CLONE, clone.as_str());
    let name = match tries {
        0 => first,
        tries => format!("{first}-{tries}"),
    };
    SnapName::new(name).expect("a hash and a number are a name")
}

/// Whether a snapshot was made to clone a volume under this name.
pub(super) fn is_for_clone_called(snapshot: &str, clone: &VolumeName) -> bool {
    let rest = snapshot.strip_prefix(&hashed(FOR_CLONE, clone.as_str()));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// Whether a snapshot was made to clone a volume, and nobody asked for it.
pub(super) fn is_for_clone(snapshot: &str) -> bool {
    snapshot.starts_with(FOR_CLONE)
}

/// Whether a name is of those that Kubernetes makes: it ends with a UUID, and nothing else has it.
pub(super) fn is_unique(name: &str) -> bool {
    let at = name.len().checked_sub(36);
    let uuid = at.and_then(|at| name.get(at..));
    uuid.is_some_and(|uuid| uuid::Uuid::try_parse(uuid).is_ok())
}

fn check(name: &str) -> Answer<()> {
    let is_allowed = |c: char| !c.is_control() || ['\t', '\n', '\r'].contains(&c);
    if name.is_empty() || name.len() > STRING_MAX || !name.chars().all(is_allowed) {
        let message = format!("the name is not 1 to {STRING_MAX} bytes without control characters");
        return Err(Status::invalid_argument(message));
    }
    Ok(())
}

/// 128 bits of the name's SHA-256: no two names are found that have them in common by chance.
fn hashed(prefix: &str, name: &str) -> String {
    let digest = digest(&SHA256, name.as_bytes());
    let hex = digest.as_ref().iter().take(16).map(|b| format!("{b:02x}"));
    prefix.to_owned() + &hex.collect::<String>()
}

/// A node: by the cache of its daemon, which is what a volume's head names as its owner; the host's name is for
/// people, and to reach it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct NodeId {
    host: String,
    pub cache: CacheId,
}

impl NodeId {
    /// The node with this id.
    ///
    /// # Errors
    /// If there cannot be one.
    pub fn parse(id: &str) -> Answer<Self> {
        let parts = id.split_once('/');
        let parsed = parts.and_then(|(host, cache)| Some((host, CacheId::parse(cache).ok()?)));
        let (host, cache) =
            parsed.ok_or_else(|| Status::not_found(format!("there is no node {id:?}")))?;
        let host = host.to_owned();
        Ok(Self { host, cache })
    }

    /// The node of a daemon; none if it does not tell.
    pub fn of(status: &StatusInfo) -> Option<Self> {
        let host = status.host.clone();
        let cache = CacheId::parse(&status.cache.id).ok()?;
        Some(Self { host, cache })
    }

    /// The node that may write to a volume.
    pub fn owner(owner: &OwnerInfo) -> Option<Self> {
        let host = owner.host.clone();
        let cache = CacheId::parse(&owner.cache).ok()?;
        Some(Self { host, cache })
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.cache)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    const PVC: &str = "pvc-0b7ad0a8-9f0e-4a3f-8f5c-0d6f4b6b2c11";

    #[test]
    fn name_that_can_be_one_stays_and_others_become_the_same_hash_each_time() {
        assert_eq!(volume_name(PVC).unwrap().as_str(), PVC);
        let odd = volume_name("Großer Name / 7").unwrap();
        assert_eq!(odd, volume_name("Großer Name / 7").unwrap());
        assert_ne!(odd, volume_name("Großer Name / 8").unwrap());
        assert_eq!(odd.as_str().len(), OURS.len() + 32);
        // Nobody can ask for the name of another's by what it is called here.
        assert_ne!(volume_name(odd.as_str()).unwrap(), odd);
        for wrong in ["", "a\0b", &"x".repeat(129)] {
            assert_eq!(
                volume_name(wrong).unwrap_err().code(),
                Code::InvalidArgument
            );
        }
        volume_name(&"ü".repeat(64)).unwrap();
    }

    #[test]
    fn snapshot_has_an_id_that_fits_csi_or_is_refused() {
        let volume = |tenant: usize| VolumeRef::new("t".repeat(tenant), PVC).unwrap();
        let name = "snapshot-0b7ad0a8-9f0e-4a3f-8f5c-0d6f4b6b2c11";
        let names = |tenant| snapshot_names(&volume(tenant), name);
        assert_eq!(names(40).unwrap()[0].as_str(), name);
        let short = names(50).unwrap();
        assert!(short[0].as_str().starts_with(OURS) && short[1].as_str() == name);
        assert!(format!("{}@{}", volume(50), short[0]).len() <= STRING_MAX);
        assert_eq!(names(63).unwrap_err().code(), Code::InvalidArgument);
        assert!(is_unique(name) && !is_unique("nightly") && !is_unique("ü"));
    }

    #[test]
    fn snapshots_made_to_clone_a_volume_are_known_by_its_name() {
        let (clone, other) = (volume_name(PVC).unwrap(), volume_name("copy").unwrap());
        let made = [0, 1, 1024, usize::MAX].map(|tries| clone_snapshot(&clone, tries));
        assert_eq!(made[2].as_str(), format!("{}-1024", made[0]));
        for name in &made {
            assert!(is_for_clone(name.as_str()));
            assert!(is_for_clone_called(name.as_str(), &clone));
            assert!(!is_for_clone_called(name.as_str(), &other));
        }
        let asked = snapshot_names(&VolumeRef::new("acme", PVC).unwrap(), made[0].as_str());
        let asked = asked.unwrap();
        assert!(asked.iter().all(|name| !is_for_clone(name.as_str())));
    }

    #[test]
    fn node_id_reads_back_and_what_is_none_is_not_found() {
        let text = "node-3.example/f7a4f3a0-0000-4000-8000-000000000001";
        assert_eq!(NodeId::parse(text).unwrap().to_string(), text);
        for wrong in ["", "node-3", "node-3/", "node-3/x"] {
            assert_eq!(NodeId::parse(wrong).unwrap_err().code(), Code::NotFound);
        }
    }
}
