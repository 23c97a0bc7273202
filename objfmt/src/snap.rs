//! Snapshots: a name for a root. Created once, deleted once, never changed.

use crate::error::{FormatError, Result};
use crate::head::RootRef;
use crate::keys::SnapName;
use crate::prologue::{Format, put_str, read_str};
use crate::types::{ChunkSeq, Epoch, Sectors, VOLUME_SECTORS_MAX, VolumeId, WriteSeq};
use crate::wire::{put_u8, put_u64};

const WHAT: &str = "snapshot";
const FORMAT: Format = Format {
    magic: *b"QYSN",
    // Version 2 added the place of the map's usage.
    version: 2,
    what: WHAT,
    len_max: 1024,
};

/// The state of a volume at one past point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// The volume.
    pub volume: VolumeId,
    /// What the snapshot is called.
    pub name: String,
    /// When it was taken, in milliseconds since 1970.
    pub created_ms: u64,
    /// The map at that point; `None` if the volume was never written to.
    pub root: Option<RootRef>,
    /// The newest write in it.
    pub root_write: WriteSeq,
    /// How large the volume was.
    pub size: Sectors,
    /// The first chunk that is not in it.
    pub log_end: ChunkSeq,
}

impl Snapshot {
    /// Its bytes.
    ///
    /// # Panics
    /// If [`Snapshot::validate`] refuses it: a snapshot of our own making is right.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.validate().unwrap_or_else(|error| panic!("{error}"));
        let mut out = FORMAT.begin();
        out.extend_from_slice(&self.volume.to_bytes());
        put_u64(&mut out, self.created_ms);
        put_u64(&mut out, self.root_write.get());
        put_u64(&mut out, self.size.get());
        put_u64(&mut out, self.log_end.get());
        put_str(&mut out, &self.name);
        put_u8(&mut out, self.root.is_some().into());
        if let Some(root) = self.root {
            root.put(&mut out);
        }
        FORMAT.seal(&mut out);
        out
    }

    /// The snapshot of `expect` that `bytes` are.
    ///
    /// # Errors
    /// If they are damaged, or another volume's.
    pub fn decode(bytes: &[u8], expect: VolumeId) -> Result<Self> {
        let (version, mut reader) = FORMAT.open(bytes)?;
        let volume = VolumeId::from_bytes(reader.array()?);
        if volume != expect {
            return Err(FormatError::Misplaced {
                what: WHAT,
                field: "volume",
            });
        }
        let created_ms = reader.u64()?;
        let root_write = WriteSeq::new(reader.u64()?);
        let size = Sectors::new(reader.u64()?);
        let log_end = ChunkSeq::new(reader.u64()?);
        let name = read_str(&mut reader)?;
        let root = match reader.u8()? {
            0 => None,
            1 => Some(RootRef::read(&mut reader, version > 1)?),
            _ => {
                return Err(FormatError::invalid(
                    WHAT,
                    "the mark of a map is neither 0 nor 1",
                ));
            }
        };
        reader.finish()?;
        let snapshot = Self {
            volume,
            name,
            created_ms,
            root,
            root_write,
            size,
            log_end,
        };
        snapshot.validate()?;
        snapshot.root_write.check(WHAT)?;
        snapshot.log_end.check_of_log(WHAT)?;
        if let Some(root) = snapshot.root {
            root.seq.check(WHAT)?;
        }
        Ok(snapshot)
    }

    /// Checks every rule of a snapshot.
    ///
    /// # Errors
    /// With the rule that is broken.
    pub fn validate(&self) -> Result<()> {
        if self.name.parse::<SnapName>().is_err() {
            return Err(FormatError::invalid(WHAT, "the name is not a name"));
        }
        if self.size == Sectors::ZERO || self.size.get() > VOLUME_SECTORS_MAX {
            return Err(FormatError::invalid(WHAT, "the size is out of range"));
        }
        match self.root {
            Some(root) => root.validate(WHAT, Epoch::new(u32::MAX)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::MapSeq;

    fn sample() -> Snapshot {
        Snapshot {
            volume: VolumeId::from_bytes([1; 16]),
            name: "monday".to_owned(),
            created_ms: 1,
            root: Some(RootRef {
                epoch: Epoch::new(1),
                seq: MapSeq::new(2),
                offset: 3,
                len: 4,
                usage: Some((5, 6)),
            }),
            root_write: WriteSeq::new(5),
            size: Sectors::new(6),
            log_end: ChunkSeq::new(7),
        }
    }

    #[test]
    fn snapshot_with_and_without_a_map_round_trips() {
        let full = sample();
        assert_eq!(
            Snapshot::decode(&full.encode(), full.volume),
            Ok(full.clone())
        );
        let bare = Snapshot { root: None, ..full };
        assert_eq!(Snapshot::decode(&bare.encode(), bare.volume), Ok(bare));
    }

    #[test]
    fn snapshot_of_another_volume_is_refused() {
        let refused = Snapshot::decode(&sample().encode(), VolumeId::from_bytes([2; 16]));
        assert_eq!(
            refused,
            Err(FormatError::Misplaced {
                what: "snapshot",
                field: "volume"
            })
        );
    }

    #[test]
    fn snapshot_any_flip_or_cut_is_an_error() {
        let bytes = sample().encode();
        let volume = sample().volume;
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Snapshot::decode(&bad, volume).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(
                Snapshot::decode(&bytes[..len], volume).is_err(),
                "cut to {len}"
            );
        }
    }
}
