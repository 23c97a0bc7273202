//! What a ublk queue shares with the kernel: the requests' descriptors, the commands' bytes, and
//! the way to a request's pages by `pread` and `pwrite`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use libublk::sys;
use quarry_objfmt::{Lba, LbaRange, SECTOR_SIZE, Sectors};
use quarry_volume::Op;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::reactor::memory::AlignedBuf;
use crate::ublk::IO_BYTES_MAX;

/// Bytes of a descriptor.
const DESCRIPTOR_LEN: usize = size_of::<sys::ublksrv_io_desc>();

const _: () = assert!(DESCRIPTOR_LEN == 24 && size_of::<sys::ublksrv_io_cmd>() == 16);

/// The descriptors of a queue's tags, which the kernel writes and we read.
pub(super) struct Descriptors {
    memory: NonNull<sys::ublksrv_io_desc>,
    len: usize,
    depth: u16,
}

// SAFETY: it owns its mapping, which any thread may read.
unsafe impl Send for Descriptors {}

impl Descriptors {
    /// Maps those of queue `queue` of the device open at `cdev`.
    pub(super) fn map(cdev: &OwnedFd, queue: u16, depth: u16) -> io::Result<Self> {
        // The kernel rounds it up to whole pages, and accepts nothing else.
        let len = usize::from(depth) * DESCRIPTOR_LEN;
        let stride = u64::from(sys::UBLK_MAX_QUEUE_DEPTH) * DESCRIPTOR_LEN as u64;
        let offset = u64::from(sys::UBLKSRV_CMD_BUF_OFFSET) + u64::from(queue) * stride;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let memory = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::POPULATE,
                cdev.as_fd(),
                offset,
            )?
        };
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { memory, len, depth })
    }

    /// How many.
    pub(super) fn depth(&self) -> u16 {
        self.depth
    }

    /// The tag's descriptor. The kernel changes it only while the tag is fetched.
    pub(super) fn read(&self, tag: u16) -> sys::ublksrv_io_desc {
        assert!(tag < self.depth, "a tag outside the queue");
        // SAFETY: the mapping holds `depth` descriptors.
        let descriptor = unsafe { self.memory.add(usize::from(tag)) };
        // SAFETY: valid for reads as long as `self`; the kernel wrote it before the completion
        // that we saw, and volatile keeps the read after that.
        unsafe { descriptor.as_ptr().read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which no reference was ever given out.
        if let Err(error) = unsafe { munmap(self.memory.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "the descriptors of a ublk queue cannot be unmapped");
        }
    }
}

/// Where a request's data are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Data {
    /// It has none.
    None,
    /// It has some.
    Bytes {
        /// How many.
        len: u32,
        /// Whether the kernel could put its pages into the buffer table, if it was to.
        registered: bool,
    },
}

/// A request of the kernel's in our words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoRequest {
    /// What is asked for.
    pub op: Op,
    /// Of which sectors; of a flush none.
    pub range: LbaRange,
    /// Where its data are.
    pub data: Data,
}

impl IoRequest {
    /// What a descriptor says. Whether the range is inside the volume is the volume's to check.
    ///
    /// # Errors
    /// The errno of what cannot be a request of ours.
    pub fn parse(descriptor: &sys::ublksrv_io_desc) -> Result<Self, i32> {
        let flags = descriptor.op_flags;
        let fua = flags & sys::UBLK_IO_F_FUA != 0;
        let op = match flags & 0xff {
            sys::UBLK_IO_OP_READ => Op::Read,
            sys::UBLK_IO_OP_WRITE => Op::Write { fua },
            sys::UBLK_IO_OP_FLUSH => {
                let range = LbaRange {
                    start: Lba::ZERO,
                    end: Lba::ZERO,
                };
                return Ok(Self {
                    op: Op::Flush,
                    range,
                    data: Data::None,
                });
            }
            sys::UBLK_IO_OP_DISCARD => Op::Discard,
            sys::UBLK_IO_OP_WRITE_ZEROES => Op::WriteZeroes { fua },
            _ => return Err(libc::EOPNOTSUPP),
        };
        let sectors = Sectors::new(descriptor.nr_sectors.into());
        let range =
            LbaRange::new(Lba::new(descriptor.start_sector), sectors).ok_or(libc::EINVAL)?;
        let data = if matches!(op, Op::Read | Op::Write { .. }) {
            let len = descriptor
                .nr_sectors
                .checked_mul(SECTOR_SIZE)
                .ok_or(libc::EINVAL)?;
            if len == 0 || len > IO_BYTES_MAX {
                return Err(libc::EINVAL);
            }
            let registered = flags & sys::UBLK_IO_F_NEED_REG_BUF == 0;
            Data::Bytes { len, registered }
        } else {
            Data::None
        };
        Ok(Self { op, range, data })
    }

    /// What to commit if it goes well: all its bytes.
    ///
    /// # Panics
    /// If it was not made by [`IoRequest::parse`].
    #[must_use]
    pub fn result(&self) -> i32 {
        match self.data {
            Data::None => 0,
            Data::Bytes { len, .. } => {
                i32::try_from(len).expect("a request is at most IO_BYTES_MAX long")
            }
        }
    }
}

/// The bytes of a command of a queue (`struct ublksrv_io_cmd`). `address` is that of the request's
/// buffer where the kernel copies, the index of its entry where it registers, else 0.
#[expect(
    clippy::host_endian_bytes,
    reason = "it is a struct of the running kernel's"
)]
pub(super) fn io_command(queue: u16, tag: u16, result: i32, address: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..16].copy_from_slice(&address.to_ne_bytes());
    bytes
}

/// Where on the character device a request's pages begin.
pub(super) fn user_copy_offset(queue: u16, tag: u16) -> u64 {
    u64::from(sys::UBLKSRV_IO_BUF_OFFSET)
        + (u64::from(queue) << sys::UBLK_QID_OFF)
        + (u64::from(tag) << sys::UBLK_TAG_OFF)
}

/// Copies `len` bytes of a write's pages, at `offset` of the character device, into `buffer`.
pub(super) fn copy_out(
    cdev: &OwnedFd,
    offset: u64,
    buffer: &mut AlignedBuf,
    len: usize,
) -> io::Result<()> {
    assert!(
        len <= buffer.capacity(),
        "a bounce buffer is as long as its request"
    );
    // SAFETY: the allocation is initialised, at least `len` long, and borrowed mutably.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.ptr().as_ptr(), len) };
    copy_all(cdev.as_fd(), offset, len, |fd, done, at| {
        rustix::io::pread(fd, &mut bytes[done..], at)
    })
}

/// Copies `len` bytes of `buffer` into a read's pages, at `offset` of the character device.
pub(super) fn copy_in(
    cdev: &OwnedFd,
    offset: u64,
    buffer: &AlignedBuf,
    len: usize,
) -> io::Result<()> {
    let bytes = buffer.bytes(len);
    copy_all(cdev.as_fd(), offset, len, |fd, done, at| {
        rustix::io::pwrite(fd, &bytes[done..], at)
    })
}

/// Repeats `copy` until all is done: a copy between memories, which never waits.
fn copy_all(
    cdev: BorrowedFd<'_>,
    offset: u64,
    len: usize,
    mut copy: impl FnMut(BorrowedFd<'_>, usize, u64) -> rustix::io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match copy(cdev, done, offset + done as u64) {
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EIO)),
            Ok(bytes) => done += bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(op_flags: u32, start_sector: u64, nr_sectors: u32) -> sys::ublksrv_io_desc {
        sys::ublksrv_io_desc {
            op_flags,
            nr_sectors,
            start_sector,
            addr: 0,
        }
    }

    fn range(start: u64, end: u64) -> LbaRange {
        LbaRange {
            start: Lba::new(start),
            end: Lba::new(end),
        }
    }

    #[test]
    fn write_with_fua_keeps_it_and_has_data() {
        let request = IoRequest::parse(&descriptor(
            sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA,
            8,
            16,
        ))
        .unwrap();
        assert_eq!(
            request,
            IoRequest {
                op: Op::Write { fua: true },
                range: range(8, 24),
                data: Data::Bytes {
                    len: 8192,
                    registered: true
                }
            }
        );
        assert_eq!(request.result(), 8192);
    }

    #[test]
    fn read_that_was_not_registered_says_so() {
        let request = IoRequest::parse(&descriptor(
            sys::UBLK_IO_OP_READ | sys::UBLK_IO_F_NEED_REG_BUF,
            0,
            1,
        ))
        .unwrap();
        assert_eq!(
            request.data,
            Data::Bytes {
                len: 512,
                registered: false
            }
        );
    }

    #[test]
    fn flush_has_an_empty_range_whatever_the_descriptor_holds() {
        let request = IoRequest::parse(&descriptor(sys::UBLK_IO_OP_FLUSH, u64::MAX, 7)).unwrap();
        assert_eq!(
            request,
            IoRequest {
                op: Op::Flush,
                range: range(0, 0),
                data: Data::None
            }
        );
        assert_eq!(request.result(), 0);
    }

    #[test]
    fn discard_of_a_gibibyte_passes_and_has_no_data() {
        let request = IoRequest::parse(&descriptor(sys::UBLK_IO_OP_DISCARD, 0, 1 << 21)).unwrap();
        assert_eq!(
            request,
            IoRequest {
                op: Op::Discard,
                range: range(0, 1 << 21),
                data: Data::None
            }
        );
    }

    #[test]
    fn write_zeroes_keeps_fua() {
        let request = IoRequest::parse(&descriptor(
            sys::UBLK_IO_OP_WRITE_ZEROES | sys::UBLK_IO_F_FUA,
            0,
            8,
        ))
        .unwrap();
        assert_eq!(request.op, Op::WriteZeroes { fua: true });
    }

    #[test]
    fn requests_that_cannot_be_are_refused() {
        for (op, start, sectors, errno) in [
            (sys::UBLK_IO_OP_ZONE_OPEN, 0, 8, libc::EOPNOTSUPP),
            (sys::UBLK_IO_OP_READ, u64::MAX, 8, libc::EINVAL),
            (sys::UBLK_IO_OP_READ, 0, 0, libc::EINVAL),
            (
                sys::UBLK_IO_OP_READ,
                0,
                IO_BYTES_MAX / SECTOR_SIZE + 1,
                libc::EINVAL,
            ),
            (sys::UBLK_IO_OP_WRITE, 0, u32::MAX, libc::EINVAL),
        ] {
            assert_eq!(
                IoRequest::parse(&descriptor(op, start, sectors)),
                Err(errno)
            );
        }
    }

    #[test]
    fn user_copy_offset_of_the_last_tag_stays_in_its_queue() {
        assert_eq!(user_copy_offset(0, 0), 0x8000_0000);
        assert_eq!(user_copy_offset(0, 1) - user_copy_offset(0, 0), 32 << 20);
        assert_eq!(user_copy_offset(1, 0) - user_copy_offset(0, 0), 1 << 41);
    }

    #[test]
    fn io_command_has_the_kernels_layout() {
        let bytes = io_command(0x0102, 0x0304, -5, 0x0506_0708_090a_0b0c);
        let command = sys::ublksrv_io_cmd {
            q_id: 0x0102,
            tag: 0x0304,
            result: -5,
            addr: 0x0506_0708_090a_0b0c,
        };
        // SAFETY: both are 16 plain bytes, and the struct has no padding.
        let expected: [u8; 16] = unsafe { std::mem::transmute(command) };
        assert_eq!(bytes, expected);
    }
}
