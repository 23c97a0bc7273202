//! What must hold: the writes of every volume in their order, and what was promised of them.
//!
//! Every sector says whose it is: volume, place, and the number of the write that made it. A
//! volume's history is kept for each epoch in which it was served; a history starts as a prefix of
//! the one before it, and everything that is read is held against the newest state of its own.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use quarry_objfmt::head::Durability;
use quarry_objfmt::{Lba, LbaRange, Sectors, TenantName, VolumeId};

/// The number of a write of one volume; 0 reads as zeroes.
pub type Stamp = u64;

pub const SECTOR: usize = 512;

pub fn range(start: u64, len: u64) -> LbaRange {
    LbaRange::new(Lba::new(start), Sectors::new(len)).unwrap()
}

/// Fills a sector with its name.
pub fn fill(sector: &mut [u8], volume: u32, stamp: Stamp, lba: u64) {
    sector[..8].copy_from_slice(&stamp.to_le_bytes());
    sector[8..12].copy_from_slice(&u32::try_from(lba).unwrap().to_le_bytes());
    sector[12..16].copy_from_slice(&volume.to_le_bytes());
    let mut len = 16;
    while len < sector.len() {
        sector.copy_within(..len, len);
        len *= 2;
    }
}

/// The write that a sector of `volume` at `lba` comes from. `Err` says what it is instead.
pub fn stamp_of(sector: &[u8], volume: u32, lba: u64) -> Result<Stamp, String> {
    let first = &sector[..16];
    if sector[16..] != sector[..sector.len() - 16] {
        return Err(format!("sector {lba} of volume {volume} is torn"));
    }
    if first == [0; 16] {
        return Ok(0);
    }
    let stamp = Stamp::from_le_bytes(first[..8].try_into().unwrap());
    let found_lba = u32::from_le_bytes(first[8..12].try_into().unwrap());
    let found_volume = u32::from_le_bytes(first[12..].try_into().unwrap());
    if found_volume != volume {
        return Err(format!(
            "sector {lba} of volume {volume} has bytes of volume {found_volume}"
        ));
    }
    if u64::from(found_lba) != lba {
        return Err(format!(
            "sector {lba} of volume {volume} has bytes of sector {found_lba}"
        ));
    }
    Ok(stamp)
}

/// The writes of a volume as one epoch has them.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Write n is at n - 1.
    writes: Vec<(LbaRange, Stamp)>,
    /// What the store had when the epoch began.
    stored: u64,
    /// The newest write that was reported to be in the store.
    durable: u64,
}

/// A volume, as it should be.
#[derive(Debug)]
pub struct Truth {
    pub index: u32,
    pub id: VolumeId,
    pub tenant: TenantName,
    pub durability: Durability,
    /// Its size at first, and the most that it grows to.
    pub size: u64,
    pub size_max: u64,
    /// The size that somebody was told it has.
    pub grown: u64,
    next_stamp: Stamp,
    histories: BTreeMap<u32, History>,
}

impl Truth {
    pub fn new(index: u32, tenant: TenantName, durability: Durability, size: u64) -> Self {
        let mut id = [0; 16];
        id[15] = u8::try_from(index + 1).unwrap();
        Self {
            index,
            id: VolumeId::from_bytes(id),
            tenant,
            durability,
            size,
            size_max: size + size / 4,
            grown: size,
            next_stamp: 1,
            histories: BTreeMap::from([(0, History::default())]),
        }
    }

    pub fn next_stamp(&mut self) -> Stamp {
        self.next_stamp += 1;
        self.next_stamp - 1
    }

    /// The newest epoch up to `epoch` in which the volume was served.
    pub fn served(&self, epoch: u32) -> u32 {
        *self.histories.range(..=epoch).next_back().unwrap().0
    }

    /// The number of the newest write in `epoch`.
    pub fn len(&self, epoch: u32) -> u64 {
        self.histories[&epoch].writes.len() as u64
    }

    /// The newest write known to be in the store by any epoch up to `epoch`.
    pub fn durable_by(&self, epoch: u32) -> u64 {
        self.histories[&self.served(epoch)].durable
    }

    /// `epoch` begins with what the store has up to `stored`, and what a cache kept up to `upto`.
    pub fn begin(&mut self, epoch: u32, stored: u64, upto: u64) {
        let before = self.served(epoch - 1);
        let last = &self.histories[&before];
        let known = last.writes.len() as u64;
        assert!(
            stored <= known && upto <= known,
            "volume {} in epoch {epoch}: the store has write {stored}, the cache {upto}; the newest ever made in epoch {before} is {known}",
            self.index
        );
        assert!(
            stored >= last.durable,
            "volume {} in epoch {epoch}: the store has writes up to {stored}, of which {} were reported durable in epoch {before}",
            self.index,
            last.durable
        );
        let history = History {
            writes: last.writes[..usize::try_from(upto).unwrap()].to_vec(),
            stored,
            durable: stored,
        };
        assert!(
            self.histories.insert(epoch, history).is_none(),
            "two serve volume {} in epoch {epoch}",
            self.index
        );
    }

    /// A write got its number.
    pub fn wrote(&mut self, epoch: u32, seq: u64, range: LbaRange, stamp: Stamp) {
        let writes = &mut self.histories.get_mut(&epoch).unwrap().writes;
        writes.push((range, stamp));
        assert_eq!(seq, writes.len() as u64, "numbers of writes have no gap");
    }

    /// Somebody was told that the store has everything up to `seq`.
    pub fn reported(&mut self, epoch: u32, seq: u64, how: &str) {
        if let Some((later, next)) = self.histories.range(epoch + 1..).next() {
            assert!(
                seq <= next.stored,
                "volume {}: {how} in epoch {epoch} reports write {seq}, but epoch {later} began with {}",
                self.index,
                next.stored
            );
            return;
        }
        let history = self.histories.get_mut(&epoch).unwrap();
        history.durable = history.durable.max(seq);
    }

    /// What each sector reads as after write `upto` of `epoch`.
    pub fn image(&self, epoch: u32, upto: u64) -> Vec<Stamp> {
        let mut image = vec![0; usize::try_from(self.size_max).unwrap()];
        let writes = &self.histories[&epoch].writes;
        assert!(
            upto <= writes.len() as u64,
            "volume {}: write {upto} of epoch {epoch} was never made",
            self.index
        );
        for (range, stamp) in &writes[..usize::try_from(upto).unwrap()] {
            let start = usize::try_from(range.start.get()).unwrap();
            image[start..usize::try_from(range.end.get()).unwrap()].fill(*stamp);
        }
        image
    }
}

/// What happened, in a number.
#[derive(Default)]
pub struct Digest(DefaultHasher);

impl Digest {
    pub fn add(&mut self, what: impl Hash) {
        what.hash(&mut self.0);
    }

    pub fn value(&self) -> u64 {
        self.0.finish()
    }
}
