//! What must hold: the writes of every volume in their order, and what was promised of them.
//!
//! Every sector says whose it is: volume, place, and the number of the write that made it. A
//! volume's history is kept for each epoch in which it was served; a history starts as a prefix of
//! the one before it (after a rollback, of the snapshot's), and everything that is read is held against the
//! newest state of its own. A clone reads as its snapshot under its own writes.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use quarry_objfmt::head::{Durability, RootRef};
use quarry_objfmt::{Lba, LbaRange, Sectors, TenantName, VolumeId};

use super::life::Life;

/// A write of any volume: the volume's index, then the number among its writes, which begins with 1; 0
/// reads as zeroes.
pub type Stamp = u64;

/// Bits of a stamp that are the number.
const NUMBER_BITS: u32 = 40;

/// A stamp, for people.
pub fn stamp_name(stamp: Stamp) -> String {
    match stamp {
        0 => "zeroes".to_owned(),
        _ => format!(
            "write {} of volume {}",
            stamp & ((1 << NUMBER_BITS) - 1),
            stamp >> NUMBER_BITS
        ),
    }
}

pub const SECTOR: usize = 512;

pub fn range(start: u64, len: u64) -> LbaRange {
    LbaRange::new(Lba::new(start), Sectors::new(len)).unwrap()
}

/// Fills a sector with its name.
pub fn fill(sector: &mut [u8], stamp: Stamp, lba: u64) {
    sector[..8].copy_from_slice(&stamp.to_le_bytes());
    sector[8..16].copy_from_slice(&lba.to_le_bytes());
    let mut len = 16;
    while len < sector.len() {
        sector.copy_within(..len, len);
        len *= 2;
    }
}

/// The write that a sector at `lba` comes from. `Err` says what it is instead.
pub fn stamp_of(sector: &[u8], lba: u64) -> Result<Stamp, String> {
    let first = &sector[..16];
    if sector[16..] != sector[..sector.len() - 16] {
        return Err(format!("sector {lba} is torn"));
    }
    if first == [0; 16] {
        return Ok(0);
    }
    let stamp = Stamp::from_le_bytes(first[..8].try_into().unwrap());
    let found = u64::from_le_bytes(first[8..].try_into().unwrap());
    if found != lba {
        let whose = stamp_name(stamp);
        return Err(format!("sector {lba} has bytes of sector {found}, {whose}"));
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
    /// It begins as a snapshot, not as a prefix of the one before; with this map.
    rolled_back: Option<RootRef>,
}

/// A volume, as it should be.
#[derive(Debug)]
pub struct Truth {
    pub index: u32,
    pub id: VolumeId,
    pub tenant: TenantName,
    pub durability: Durability,
    /// Whether its data are encrypted.
    pub encrypted: bool,
    /// Its size at first, and the most that it grows to.
    pub size: u64,
    pub size_max: u64,
    /// The size that somebody was told it has.
    pub grown: u64,
    /// What it reads as before its first write: nothing, or the snapshot of which it is a clone.
    base: Vec<Stamp>,
    next_write: u64,
    histories: BTreeMap<u32, History>,
    /// What else became of it.
    pub life: Life,
}

/// A volume at one point of its life.
#[derive(Clone, Debug)]
pub struct Point {
    /// All writes up to then.
    writes: Vec<(LbaRange, Stamp)>,
    /// What each sector reads as, up to the size that it had.
    pub image: Vec<Stamp>,
}

impl Point {
    /// The number of the newest write.
    pub fn newest(&self) -> u64 {
        self.writes.len() as u64
    }
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
            encrypted: false,
            size,
            size_max: size + size / 4,
            grown: size,
            base: Vec::new(),
            next_write: 1,
            histories: BTreeMap::from([(0, History::default())]),
            life: Life::default(),
        }
    }

    /// A clone of what `parent` was at that point.
    pub fn of_clone(index: u32, parent: &Self, at: &Point) -> Self {
        let (tenant, durability) = (parent.tenant.clone(), parent.durability);
        let size = at.image.len() as u64;
        Self {
            base: at.image.clone(),
            encrypted: parent.encrypted,
            ..Self::new(index, tenant, durability, size)
        }
    }

    pub fn next_stamp(&mut self) -> Stamp {
        self.next_write += 1;
        u64::from(self.index) << NUMBER_BITS | (self.next_write - 1)
    }

    /// The newest epoch up to `epoch` in which the volume was served.
    pub fn served(&self, epoch: u32) -> u32 {
        *self.histories.range(..=epoch).next_back().unwrap().0
    }

    /// The epoch whose history a reader has that found this map in `epoch`: a rollback has one epoch, and
    /// changes the map in it.
    pub fn read(&self, epoch: u32, root: Option<RootRef>) -> u32 {
        let served = self.served(epoch);
        let rolled_back = self.histories[&served].rolled_back;
        match served == epoch && rolled_back.is_some() && rolled_back != root {
            true => self.served(epoch - 1),
            false => served,
        }
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
            rolled_back: None,
        };
        assert!(
            self.histories.insert(epoch, history).is_none(),
            "two serve volume {} in epoch {epoch}",
            self.index
        );
    }

    /// In `epoch` the volume was made what it was at that point.
    pub fn roll_back(&mut self, epoch: u32, root: RootRef, to: &Point) {
        let history = History {
            writes: to.writes.clone(),
            stored: to.newest(),
            durable: to.newest(),
            rolled_back: Some(root),
        };
        let before = self.histories.insert(epoch, history);
        assert!(
            before.is_none(),
            "volume {} is served while it is rolled back",
            self.index
        );
    }

    /// The volume after write `upto` of `epoch`, of so many sectors.
    pub fn point(&self, epoch: u32, upto: u64, size: u64) -> Point {
        let mut image = self.image(epoch, upto);
        image.truncate(usize::try_from(size).unwrap());
        let writes = &self.histories[&epoch].writes;
        Point {
            writes: writes[..usize::try_from(upto).unwrap()].to_vec(),
            image,
        }
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
            // What of it was in the store when it was rolled back, nobody says.
            assert!(
                next.rolled_back.is_some() || seq <= next.stored,
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
        let mut image = self.base.clone();
        image.resize(usize::try_from(self.size_max).unwrap(), 0);
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
