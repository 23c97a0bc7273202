//! How a volume is to be used: the access modes and types that a volume of Quarry has.

use quarry_csi_proto::v1::VolumeCapability;
use quarry_csi_proto::v1::volume_capability::access_mode::Mode;
use quarry_csi_proto::v1::volume_capability::{AccessType, MountVolume};
use tonic::Status;

use super::answer::Answer;

/// A file system that is made here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fs {
    Ext4,
    Xfs,
}

impl Fs {
    /// As `mount` and `blkid` call it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Ext4, Self::Xfs]
            .into_iter()
            .find(|fs| fs.as_str() == name)
    }
}

/// As what a pod sees a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Access {
    /// A block device.
    Block,
    /// A folder, with this file system or, if none is said, the one that is there, or ext4.
    Mount { fs: Option<Fs>, flags: Vec<String> },
}

/// How a volume is to be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Use {
    pub access: Access,
    /// Nobody is to write.
    pub read_only: bool,
    /// More than one place of a node may have it.
    pub many_places: bool,
    /// More than one node may have it.
    pub many_nodes: bool,
}

/// Why a capability will not do.
#[derive(Debug)]
pub(super) enum Unfit {
    /// The request lacks something.
    Missing(&'static str),
    /// Quarry's volumes cannot be used so.
    Refused(String),
}

impl Unfit {
    /// Where a capability that no volume has is a mistake of the request.
    pub fn invalid(self) -> Status {
        match self {
            Self::Missing(what) => Status::invalid_argument(format!("{what} is missing")),
            Self::Refused(why) => Status::invalid_argument(why),
        }
    }

    /// Where it exceeds what the volume, which is there, can do.
    pub fn exceeds(self) -> Status {
        match self {
            Self::Refused(why) => Status::failed_precondition(why),
            missing @ Self::Missing(_) => missing.invalid(),
        }
    }
}

impl Use {
    /// What a capability says.
    ///
    /// # Errors
    /// If no volume can be used so.
    pub fn of(capability: Option<&VolumeCapability>) -> Result<Self, Unfit> {
        let capability = capability.ok_or(Unfit::Missing("the volume's capability"))?;
        let mode = capability.access_mode.as_ref();
        let mode = mode.ok_or(Unfit::Missing("the access mode"))?.mode;
        let mode = Mode::try_from(mode).unwrap_or(Mode::Unknown);
        let (read_only, many_places, many_nodes) = match mode {
            Mode::SingleNodeWriter | Mode::SingleNodeSingleWriter => (false, false, false),
            Mode::SingleNodeMultiWriter => (false, true, false),
            Mode::SingleNodeReaderOnly => (true, false, false),
            Mode::MultiNodeReaderOnly => (true, true, true),
            Mode::Unknown => return Err(Unfit::Missing("an access mode that is known")),
            Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => {
                let why = format!(
                    "a volume has one writing node, and nobody reads with it: {} cannot be had",
                    mode.as_str_name()
                );
                return Err(Unfit::Refused(why));
            }
        };
        let access = match &capability.access_type {
            None => return Err(Unfit::Missing("the access type")),
            Some(AccessType::Block(_)) => Access::Block,
            Some(AccessType::Mount(mount)) => mounted(mount)?,
        };
        Ok(Self {
            access,
            read_only,
            many_places,
            many_nodes,
        })
    }

    /// What all of them say.
    ///
    /// # Errors
    /// If there are none, or one of them asks for what no volume has.
    pub fn all(capabilities: &[VolumeCapability]) -> Result<Vec<Self>, Unfit> {
        if capabilities.is_empty() {
            return Err(Unfit::Missing("the volume's capabilities"));
        }
        capabilities.iter().map(|one| Self::of(Some(one))).collect()
    }
}

fn mounted(mount: &MountVolume) -> Result<Access, Unfit> {
    let fs = match mount.fs_type.as_str() {
        "" => None,
        name => Some(Fs::named(name).ok_or_else(|| {
            Unfit::Refused(format!(
                "the file system {name:?} is not made: use ext4 or xfs"
            ))
        })?),
    };
    if !mount.volume_mount_group.is_empty() {
        let why = "a volume is not mounted for a group: the kubelet gives it to one".to_owned();
        return Err(Unfit::Refused(why));
    }
    // They become one argument of `mount`.
    let is_plain = |flag: &String| !flag.is_empty() && !flag.contains([',', '\0']);
    if !mount.mount_flags.iter().all(is_plain) {
        return Err(Unfit::Refused(
            "a mount flag is empty or has a comma".to_owned(),
        ));
    }
    let flags = mount.mount_flags.clone();
    Ok(Access::Mount { fs, flags })
}

/// The use that is asked for on a node, whose volume is there.
///
/// # Errors
/// If it is missing, or exceeds what a volume can do.
pub(super) fn asked(capability: Option<&VolumeCapability>) -> Answer<Use> {
    Use::of(capability).map_err(Unfit::exceeds)
}

#[cfg(test)]
mod tests {
    use quarry_csi_proto::v1::volume_capability::{AccessMode, BlockVolume};
    use tonic::Code;

    use super::*;

    fn capability(mode: Mode, fs: Option<&str>) -> VolumeCapability {
        let mount = |fs: &str| MountVolume {
            fs_type: fs.to_owned(),
            mount_flags: vec!["noatime".to_owned()],
            ..MountVolume::default()
        };
        let block = AccessType::Block(BlockVolume {});
        VolumeCapability {
            access_mode: Some(AccessMode { mode: mode.into() }),
            access_type: Some(fs.map_or(block, |fs| AccessType::Mount(mount(fs)))),
        }
    }

    #[test]
    fn use_of_one_writer_or_of_readers_is_taken_and_of_more_writers_refused() {
        let of = |mode, fs| Use::of(Some(&capability(mode, fs)));
        let one = of(Mode::SingleNodeWriter, Some("xfs")).unwrap();
        let flags = vec!["noatime".to_owned()];
        let fs = Some(Fs::Xfs);
        assert_eq!(one.access, Access::Mount { fs, flags });
        assert!(!one.read_only && !one.many_places && !one.many_nodes);
        let readers = of(Mode::MultiNodeReaderOnly, None).unwrap();
        assert!(readers.read_only && readers.many_nodes && readers.access == Access::Block);
        assert!(
            of(Mode::SingleNodeMultiWriter, Some(""))
                .unwrap()
                .many_places
        );
        for mode in [Mode::MultiNodeMultiWriter, Mode::MultiNodeSingleWriter] {
            let unfit = of(mode, None).unwrap_err();
            assert_eq!(unfit.exceeds().code(), Code::FailedPrecondition);
        }
        let unfit = of(Mode::SingleNodeWriter, Some("ntfs")).unwrap_err();
        assert_eq!(unfit.invalid().code(), Code::InvalidArgument);
    }

    #[test]
    fn use_without_mode_or_type_is_a_mistake_everywhere() {
        let mut half = capability(Mode::Unknown, None);
        assert!(matches!(Use::of(Some(&half)), Err(Unfit::Missing(_))));
        half = capability(Mode::SingleNodeWriter, None);
        half.access_type = None;
        let unfit = Use::of(Some(&half)).unwrap_err();
        assert_eq!(unfit.exceeds().code(), Code::InvalidArgument);
        assert!(matches!(Use::of(None), Err(Unfit::Missing(_))));
        assert!(matches!(Use::all(&[]), Err(Unfit::Missing(_))));
    }
}
