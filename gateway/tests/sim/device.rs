//! A cache device: what is stable, what a power cut may take, and what goes wrong with it.
//!
//! A sector that was written and not synced is, after a power cut, as it was before or as it was
//! written, each for itself. A sync that fails has lost some of what it was asked for: some of it at once, some
//! can be read until the next start, as from a page cache, and is gone then.

use std::collections::BTreeSet;
use std::io;

use parking_lot::Mutex;
use quarry_cache::{AlignedBuf, BlockDevice, Geometry, SyncFailure};
use quarry_objfmt::page::{RecordPage, SegmentHeader, SegmentKind};
use quarry_objfmt::{CacheId, SegmentId};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::faults::{Fault, Faults};

const SECTOR: usize = 512;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

pub const GEOMETRY: Geometry = Geometry {
    data_start: 4096,
    segment_size: 256 << 10,
    segments: 16,
};

/// Chances that one I/O fails.
#[derive(Clone, Copy, Default, Debug)]
pub struct DeviceFaults {
    pub write: f64,
    /// A write of fetched data, which is only a copy.
    pub fill: f64,
    pub read: f64,
    pub sync: f64,
}

#[derive(Debug)]
pub struct SimDevice {
    id: CacheId,
    disk: Mutex<Disk>,
    /// What the daemon of now was told of its syncs.
    failure: Mutex<SyncFailure>,
}

#[derive(Debug)]
struct Disk {
    rng: SmallRng,
    current: Vec<u8>,
    stable: Vec<u8>,
    /// Sectors in which the two may differ.
    volatile: BTreeSet<usize>,
    /// Sectors that a failed sync lost.
    doomed: BTreeSet<usize>,
    faults: DeviceFaults,
    /// The host dies after so many more writes of its recovery.
    writes_left: Option<u32>,
    happened: Faults,
}

/// A sync under way: sectors, and what it found there.
#[derive(Debug)]
pub struct Sync(Vec<(usize, Vec<u8>)>);

/// How much of an I/O under way arrives when its host dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrives {
    Nothing,
    All,
    AnySectors,
}

impl SimDevice {
    pub fn new(id: CacheId, seed: u64, happened: Faults) -> Self {
        let segments = u64::from(GEOMETRY.segments) * u64::from(GEOMETRY.segment_size);
        let size = usize::try_from(GEOMETRY.data_start + segments).unwrap();
        let disk = Disk {
            rng: SmallRng::seed_from_u64(seed),
            current: vec![0; size],
            stable: vec![0; size],
            volatile: BTreeSet::new(),
            doomed: BTreeSet::new(),
            faults: DeviceFaults::default(),
            writes_left: None,
            happened,
        };
        Self {
            id,
            disk: Mutex::new(disk),
            failure: Mutex::default(),
        }
    }

    /// A daemon begins to use it, and hears of no failure that another one heard of.
    pub fn open(&self) -> SyncFailure {
        let failure = SyncFailure::default();
        *self.failure.lock() = failure.clone();
        failure
    }

    pub fn set_faults(&self, faults: DeviceFaults) {
        self.disk.lock().faults = faults;
    }

    pub fn is_dead(&self) -> bool {
        self.disk.lock().writes_left == Some(0)
    }

    pub fn die_after_writes(&self, writes: Option<u32>) {
        self.disk.lock().writes_left = writes;
    }

    /// What a read without a fault would get.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let at = usize::try_from(offset).unwrap();
        self.disk.lock().current[at..at + len].to_vec()
    }

    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), i32> {
        let mut disk = self.disk.lock();
        let chance = disk.faults.read;
        if chance > 0.0 && disk.rng.random_bool(chance) {
            disk.happened.note(Fault::ReadFailed);
            return Err(EIO);
        }
        let at = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&disk.current[at..at + buf.len()]);
        Ok(())
    }

    pub fn write(&self, offset: u64, data: &[u8], durable: bool) -> Result<(), i32> {
        let chance = self.disk.lock().faults.write;
        self.try_to_write(chance, Fault::WriteFailed, offset, data, durable)
    }

    pub fn fill(&self, offset: u64, data: &[u8]) -> Result<(), i32> {
        let chance = self.disk.lock().faults.fill;
        self.try_to_write(chance, Fault::FillFailed, offset, data, false)
    }

    /// A write that fails may have arrived in part.
    fn try_to_write(
        &self,
        chance: f64,
        fault: Fault,
        offset: u64,
        data: &[u8],
        durable: bool,
    ) -> Result<(), i32> {
        let mut disk = self.disk.lock();
        if chance > 0.0 && disk.rng.random_bool(chance) {
            disk.put(offset, data, Arrives::AnySectors);
            disk.happened.note(fault);
            return Err(if disk.rng.random_bool(0.5) {
                EIO
            } else {
                ENOSPC
            });
        }
        disk.put(offset, data, Arrives::All);
        if durable {
            disk.settle(offset, data.len());
        }
        Ok(())
    }

    /// A write that was under way when its host died.
    pub fn arrive(&self, offset: u64, data: &[u8], arrives: Arrives) {
        let mut disk = self.disk.lock();
        disk.put(offset, data, arrives);
        disk.happened.note(match arrives {
            Arrives::Nothing => Fault::InFlightLost,
            Arrives::All => Fault::InFlightWhole,
            Arrives::AnySectors => Fault::InFlightTorn,
        });
    }

    /// A sync begins: what is not stable now, as it is now, is what it makes so.
    pub fn sync_begins(&self) -> Sync {
        let disk = self.disk.lock();
        let sector = |sector: &usize| (*sector, disk.sector(*sector).to_vec());
        Sync(disk.volatile.iter().map(sector).collect())
    }

    /// It ends. What was written meanwhile is for the next one.
    pub fn sync_ends(&self, sync: Sync) -> Result<(), i32> {
        let mut disk = self.disk.lock();
        let chance = disk.faults.sync;
        let fails = chance > 0.0 && disk.rng.random_bool(chance);
        for (sector, data) in sync.0 {
            // Else another sync has made it stable, or it is another write's now.
            let is_the_same = disk.volatile.contains(&sector) && disk.sector(sector) == data;
            if fails && disk.rng.random_bool(0.5) {
                if is_the_same {
                    disk.volatile.remove(&sector);
                    disk.lose(sector);
                }
            } else if is_the_same {
                disk.volatile.remove(&sector);
                disk.harden(sector);
            } else if disk.volatile.contains(&sector) {
                let at = sector * SECTOR;
                disk.stable[at..at + SECTOR].copy_from_slice(&data);
            }
        }
        if !fails {
            return Ok(());
        }
        disk.happened.note(Fault::SyncFailed);
        Err(EIO)
    }

    /// The power goes: any part of what was not synced is lost.
    pub fn power_cut(&self) {
        let mut disk = self.disk.lock();
        // All of it, nothing, or anything in between.
        let kept = [0.0, 0.1, 0.5, 0.9, 1.0][disk.rng.random_range(0..5)];
        for sector in std::mem::take(&mut disk.volatile) {
            if disk.rng.random_bool(kept) {
                disk.harden(sector);
                disk.happened.note(Fault::SectorKeptByPower);
            } else {
                disk.revert(sector);
                disk.happened.note(Fault::SectorLostByPower);
            }
        }
        disk.restart();
    }

    /// The daemon died, the host did not.
    pub fn restart(&self) {
        self.disk.lock().restart();
    }

    /// Flips one bit in some record page of a segment that is open for writes or unsent. True if there
    /// was one.
    pub fn flip_a_record(&self) -> bool {
        let mut disk = self.disk.lock();
        let mut pages = Vec::new();
        for segment in (0..GEOMETRY.segments).map(SegmentId::new) {
            let page = |index| {
                let at = usize::try_from(GEOMETRY.page_byte(segment, index)).unwrap();
                (at, &disk.current[at..at + 4096])
            };
            let Ok(header) = SegmentHeader::decode(page(0).1, self.id) else {
                continue;
            };
            for (at, page) in (1..GEOMETRY.segment_size / 4096).map(page) {
                let of_now = RecordPage::decode(page, self.id)
                    .is_ok_and(|page| page.generation == header.generation);
                if header.kind == SegmentKind::Write && of_now {
                    pages.push(at);
                }
            }
        }
        if pages.is_empty() {
            return false;
        }
        let at = pages[disk.rng.random_range(0..pages.len())] + disk.rng.random_range(0..4096);
        let bit = 1 << disk.rng.random_range(0..8);
        disk.current[at] ^= bit;
        disk.stable[at] ^= bit;
        disk.happened.note(Fault::RecordFlipped);
        true
    }
}

impl Disk {
    fn put(&mut self, offset: u64, data: &[u8], arrives: Arrives) {
        let first = usize::try_from(offset).unwrap() / SECTOR;
        for (n, sector) in data.chunks(SECTOR).enumerate() {
            let here = match arrives {
                Arrives::Nothing => false,
                Arrives::All => true,
                Arrives::AnySectors => self.rng.random_bool(0.5),
            };
            if here {
                let at = (first + n) * SECTOR;
                self.current[at..at + SECTOR].copy_from_slice(sector);
                self.volatile.insert(first + n);
                self.doomed.remove(&(first + n));
            }
        }
    }

    fn settle(&mut self, offset: u64, len: usize) {
        let first = usize::try_from(offset).unwrap() / SECTOR;
        for sector in first..first + len / SECTOR {
            self.volatile.remove(&sector);
            self.harden(sector);
        }
    }

    fn sector(&self, sector: usize) -> &[u8] {
        &self.current[sector * SECTOR..(sector + 1) * SECTOR]
    }

    fn harden(&mut self, sector: usize) {
        let at = sector * SECTOR;
        self.stable[at..at + SECTOR].copy_from_slice(&self.current[at..at + SECTOR]);
    }

    fn revert(&mut self, sector: usize) {
        let at = sector * SECTOR;
        self.current[at..at + SECTOR].copy_from_slice(&self.stable[at..at + SECTOR]);
    }

    fn lose(&mut self, sector: usize) {
        self.happened.note(Fault::SectorLostBySync);
        if self.rng.random_bool(0.5) {
            self.revert(sector);
        } else {
            self.doomed.insert(sector);
        }
    }

    fn restart(&mut self) {
        for sector in std::mem::take(&mut self.doomed) {
            self.revert(sector);
        }
        self.writes_left = None;
        self.faults = DeviceFaults::default();
    }
}

/// Recovery's and the uploads' way to the device.
impl BlockDevice for SimDevice {
    fn id(&self) -> CacheId {
        self.id
    }

    fn geometry(&self) -> Geometry {
        GEOMETRY
    }

    fn read_at(&self, buf: &mut AlignedBuf, offset: u64) -> io::Result<()> {
        self.read(offset, buf).map_err(io::Error::from_raw_os_error)
    }

    fn write_at(&self, buf: &AlignedBuf, offset: u64) -> io::Result<()> {
        if let Some(left) = &mut self.disk.lock().writes_left {
            let Some(less) = left.checked_sub(1) else {
                return Err(io::Error::from_raw_os_error(EIO));
            };
            *left = less;
        }
        self.write(offset, buf, false)
            .map_err(io::Error::from_raw_os_error)
    }

    fn sync(&self) -> io::Result<()> {
        if self.disk.lock().writes_left == Some(0) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        // As the device's own: a failure is everybody's, and for as long as the daemon lives.
        let failure = self.failure.lock().clone();
        if let Err(errno) = self.sync_ends(self.sync_begins()) {
            failure.note(errno);
        }
        failure.get().map_err(io::Error::from_raw_os_error)
    }

    fn trusted(&self) -> io::Result<()> {
        let failure = self.failure.lock().clone();
        failure.get().map_err(io::Error::from_raw_os_error)
    }
}
