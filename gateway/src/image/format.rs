//! The formats of images, and how an image shows its own.

use std::fmt;
use std::path::Path;

/// Bytes at an image's start that tell its format.
pub const MAGIC_BYTES: usize = 128;

/// A format. All but raw are QEMU's business.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
#[value(rename_all = "lower")]
pub enum ImageFormat {
    /// The bytes of the disk, one after the other.
    Raw,
    /// QEMU.
    Qcow2,
    /// QEMU, long ago.
    Qcow,
    /// QEMU, for a while.
    Qed,
    /// VMware.
    Vmdk,
    /// Hyper-V.
    Vhdx,
    /// Virtual PC; a fixed one is told from raw by `--format` only.
    Vpc,
    /// VirtualBox.
    Vdi,
    /// Parallels.
    Parallels,
}

/// Where a format has its magic.
const MAGICS: [(usize, &[u8], ImageFormat); 11] = [
    (0, b"QFI\xfb\0\0\0\x01", ImageFormat::Qcow),
    (0, b"QFI\xfb", ImageFormat::Qcow2),
    (0, b"QED\0", ImageFormat::Qed),
    (0, b"KDMV", ImageFormat::Vmdk),
    (0, b"COWD", ImageFormat::Vmdk),
    (0, b"# Disk DescriptorFile", ImageFormat::Vmdk),
    (0, b"vhdxfile", ImageFormat::Vhdx),
    (0, b"conectix", ImageFormat::Vpc),
    (64, b"\x7f\x10\xda\xbe", ImageFormat::Vdi),
    (0, b"WithoutFreeSpace", ImageFormat::Parallels),
    (0, b"WithouFreSpacExt", ImageFormat::Parallels),
];

impl ImageFormat {
    /// The format of an image that starts with these bytes; what has no magic is raw.
    #[must_use]
    pub fn of(start: &[u8]) -> Self {
        let found = MAGICS.iter().find(|(at, magic, _)| {
            let here = start.get(*at..);
            here.is_some_and(|here| here.starts_with(magic))
        });
        found.map_or(Self::Raw, |(.., format)| *format)
    }

    /// The format that a file of this name has by custom; raw for all other names.
    #[must_use]
    pub fn by_name(path: &Path) -> Self {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        match extension.to_ascii_lowercase().as_str() {
            "qcow2" => Self::Qcow2,
            "vmdk" => Self::Vmdk,
            "vhdx" => Self::Vhdx,
            "vdi" => Self::Vdi,
            _ => Self::Raw,
        }
    }

    /// As QEMU's programs call it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow",
            Self::Qed => "qed",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vpc => "vpc",
            Self::Vdi => "vdi",
            Self::Parallels => "parallels",
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_is_told_by_the_magic_and_is_raw_without_one() {
        let of = |start: &[u8]| ImageFormat::of(start);
        assert_eq!(of(b"QFI\xfb\0\0\0\x03rest"), ImageFormat::Qcow2);
        assert_eq!(of(b"QFI\xfb\0\0\0\x01rest"), ImageFormat::Qcow);
        let mut vdi = [0; MAGIC_BYTES];
        vdi[64..68].copy_from_slice(b"\x7f\x10\xda\xbe");
        assert_eq!(of(&vdi), ImageFormat::Vdi);
        for short in [&b""[..], b"Q", b"QFI", &[0; 66]] {
            assert_eq!(of(short), ImageFormat::Raw);
        }
    }

    #[test]
    fn format_of_a_name_is_that_of_its_ending() {
        let by_name = |name: &str| ImageFormat::by_name(Path::new(name));
        assert_eq!(by_name("a/disk.QCOW2"), ImageFormat::Qcow2);
        assert_eq!(by_name("disk.img"), ImageFormat::Raw);
        assert_eq!(by_name("qcow2"), ImageFormat::Raw);
    }

    #[test]
    fn format_is_called_the_same_on_the_command_line_and_by_qemu() {
        use clap::ValueEnum as _;
        for format in ImageFormat::value_variants() {
            let flag = format.to_possible_value().unwrap();
            assert_eq!(flag.get_name(), format.as_str());
        }
    }
}
