//! What is copied from and to, at any place: a file, a block device, an NBD export.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::nbd::client::{Client, ClientError, Run};

/// Longest range that a status is asked of at once: NBD's lengths have 32 bits.
const STATUS_BYTES_MAX: u64 = 2 << 30;

/// Most zeroes of one request.
const ZERO_BYTES_MAX: u64 = 1 << 30;

/// Why a disk cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The export failed.
    #[error(transparent)]
    Nbd(#[from] ClientError),
}

/// A disk.
#[derive(Debug)]
pub enum Disk {
    /// A file or block device.
    File {
        /// It.
        file: Arc<File>,
        /// Its length in bytes.
        size: u64,
    },
    /// A connection to an export.
    Nbd(Client),
}

impl Disk {
    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::File { size, .. } => *size,
            Self::Nbd(client) => client.size(),
        }
    }

    /// Fills `buf` with what is at `offset`; behind the end that is zeroes.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let there = self.size().saturating_sub(offset);
        let there = usize::try_from(there).map_or(buf.len(), |there| there.min(buf.len()));
        let (data, behind) = buf.split_at_mut(there);
        behind.fill(0);
        match self {
            _ if data.is_empty() => {}
            Self::File { file, .. } => file.read_exact_at(data, offset)?,
            Self::Nbd(client) => {
                let len = u32::try_from(data.len()).map_err(io::Error::other)?;
                data.copy_from_slice(&client.read_at(offset, len)?);
            }
        }
        Ok(())
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        match self {
            Self::File { file, .. } => file.write_all_at(data, offset)?,
            Self::Nbd(client) => client.write_at(offset, data)?,
        }
        Ok(())
    }

    /// Makes durable what was written by anybody.
    ///
    /// # Errors
    /// If that cannot be.
    pub fn flush(&mut self) -> Result<(), DiskError> {
        match self {
            Self::File { file, .. } => file.sync_all()?,
            Self::Nbd(client) => client.flush()?,
        }
        Ok(())
    }

    /// Makes `len` bytes at `offset` read as zeroes.
    ///
    /// # Errors
    /// If that cannot be.
    pub fn zero_at(&mut self, mut offset: u64, mut len: u64) -> Result<(), DiskError> {
        while len > 0 {
            let now = len.min(ZERO_BYTES_MAX);
            match self {
                Self::File { file, .. } => {
                    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(file, how, offset, now).map_err(io::Error::from)?;
                }
                Self::Nbd(client) => {
                    client.write_zeroes(offset, u32::try_from(now).unwrap_or(u32::MAX))?;
                }
            }
            (offset, len) = (offset + now, len - now);
        }
        Ok(())
    }

    /// The runs from `offset` on, `len` bytes of them at most and one at least.
    fn runs_at(&mut self, offset: u64, len: u64) -> Result<Vec<Run>, DiskError> {
        let there = self.size().saturating_sub(offset);
        if there == 0 {
            return Ok(vec![Run { len, zero: true }]);
        }
        let len = len.min(there);
        match self {
            Self::File { file, .. } => Ok(vec![file_run(file, offset, len)?]),
            Self::Nbd(client) if client.has_status() => {
                let asked = len.min(STATUS_BYTES_MAX);
                Ok(client.status_at(offset, u32::try_from(asked).unwrap_or(u32::MAX))?)
            }
            Self::Nbd(_) => Ok(vec![Run { len, zero: false }]),
        }
    }
}

/// A walk over a part of a disk, run by run: zeroes as far as that is known, and what may be data.
#[derive(Debug)]
pub struct Runs {
    at: u64,
    end: u64,
    known: VecDeque<Run>,
}

impl Runs {
    /// From `start` to `end`.
    #[must_use]
    pub fn new(start: u64, end: u64) -> Self {
        Self {
            at: start,
            end,
            known: VecDeque::new(),
        }
    }

    /// The next run and where it starts; none at the end.
    ///
    /// # Errors
    /// If the disk does not tell.
    pub fn next(&mut self, disk: &mut Disk) -> Result<Option<(u64, Run)>, DiskError> {
        if self.at >= self.end {
            return Ok(None);
        }
        let rest = self.end - self.at;
        if self.known.is_empty() {
            self.known.extend(disk.runs_at(self.at, rest)?);
        }
        let Some(mut run) = self.known.pop_front() else {
            return Ok(None);
        };
        // A server may tell of more than it was asked for.
        run.len = run.len.min(rest);
        let start = self.at;
        self.at += run.len;
        Ok(Some((start, run)))
    }

    /// The next run that is not zeroes.
    ///
    /// # Errors
    /// If the disk does not tell.
    pub fn next_data(&mut self, disk: &mut Disk) -> Result<Option<(u64, u64)>, DiskError> {
        while let Some((start, run)) = self.next(disk)? {
            if !run.zero {
                return Ok(Some((start, run.len)));
            }
        }
        Ok(None)
    }
}

/// Makes a disk read as zeroes, where it does not.
///
/// # Errors
/// If it cannot be written.
pub fn wipe(disk: &mut Disk) -> Result<(), DiskError> {
    let mut runs = Runs::new(0, disk.size());
    while let Some((start, len)) = runs.next_data(disk)? {
        disk.zero_at(start, len)?;
    }
    Ok(())
}

/// The run of a file at `offset`, which is before its end, by what its file system knows of holes.
fn file_run(file: &File, offset: u64, rest: u64) -> io::Result<Run> {
    let zero = |len: u64| Run {
        len: len.min(rest),
        zero: true,
    };
    let data = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data,
        // No data up to the end.
        Err(Errno::NXIO) => return Ok(zero(rest)),
        // A file system or device that knows of no holes: all is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => offset,
        Err(error) => return Err(error.into()),
    };
    if data > offset {
        return Ok(zero(data - offset));
    }
    let hole = match rustix::fs::seek(file, SeekFrom::Hole(offset)) {
        Ok(hole) => hole,
        Err(Errno::INVAL | Errno::OPNOTSUPP) => u64::MAX,
        Err(error) => return Err(error.into()),
    };
    // A file that was written or cut off in between may say anything; a run is never empty.
    let len = hole.saturating_sub(offset).clamp(1, rest);
    Ok(Run { len, zero: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_file_with_holes_cover_it_and_find_its_data() {
        let file = tempfile::tempfile().unwrap();
        let (hole, size) = (1 << 20, (3 << 20) + 100);
        file.write_all_at(&[1; 4096], hole).unwrap();
        file.set_len(size).unwrap();
        let file = Arc::new(file);
        let mut disk = Disk::File { file, size };
        let end = 4 << 20;
        let mut runs = Runs::new(0, end);
        let (mut at, mut data) = (0, 0);
        while let Some((start, run)) = runs.next(&mut disk).unwrap() {
            assert_eq!(start, at);
            at += run.len;
            assert!(run.len > 0 && at <= end);
            assert!(!run.zero || !(start..at).contains(&hole));
            data += if run.zero { 0 } else { run.len };
        }
        assert_eq!(at, end);
        // Not every file system knows of holes.
        assert!(data == 4096 || data == size, "{data}");
        let mut last = [7; 512];
        disk.read_at(size - 100, &mut last).unwrap();
        assert_eq!(last, [0; 512]);
        wipe(&mut disk).unwrap();
        let mut gone = [7; 4096];
        disk.read_at(hole, &mut gone).unwrap();
        assert_eq!(gone, [0; 4096]);
    }
}
