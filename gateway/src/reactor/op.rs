//! One I/O of a volume on the ring: from its first submission to its last byte.
//!
//! A transfer that ends short is submitted again for the rest; the volume only hears of whole ones.

use bytes::Bytes;
use io_uring::{opcode, squeue};
use quarry_volume::IoId;

use super::direct::{Body, receive_fixed};
use super::memory::AlignedBuf;
use super::ring::{File, Ring};

/// How often an I/O that the kernel turned away (`EAGAIN`, `EINTR`) is tried again.
const TRIES_MAX: u8 = 100;

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Code {
    /// Read to an address of ours.
    Read,
    /// Write from an address of ours; `durable` until it is on stable media.
    Write { durable: bool },
    /// Read into a registered buffer.
    ReadFixed { buf_index: u16 },
    /// Write from a registered buffer.
    WriteFixed { buf_index: u16 },
    /// Receive from a socket into a registered buffer.
    ReceiveFixed { buf_index: u16 },
}

/// What the kernel must find alive until the I/O is done.
pub(super) enum Hold {
    /// Memory that a request owns, or none.
    Nothing,
    /// A page to write.
    Page(AlignedBuf),
    /// An aligned copy of a fill.
    Fill(AlignedBuf),
    /// What a request writes, encrypted.
    Sealed(AlignedBuf),
    /// Fetched bytes; held, not read again.
    Bytes(#[expect(dead_code, reason = "kept alive for the kernel")] Bytes),
    /// The connection of a direct read.
    Body(Body),
}

/// What the kernel is to move, and between which places.
pub(super) struct Move {
    pub(super) code: Code,
    pub(super) file: File,
    /// Bytes from the file's start.
    pub(super) offset: u64,
    /// An address of ours, or the offset in a registered buffer.
    pub(super) address: u64,
    /// Bytes in all.
    pub(super) len: u32,
    pub(super) hold: Hold,
}

impl Move {
    /// One whose memory is the request's.
    pub(super) const fn new(code: Code, file: File, offset: u64, address: u64, len: u32) -> Self {
        Self {
            code,
            file,
            offset,
            address,
            len,
            hold: Hold::Nothing,
        }
    }

    pub(super) fn holding(self, hold: Hold) -> Self {
        Self { hold, ..self }
    }
}

/// One I/O under way.
pub(super) struct CacheOp {
    /// Index of the volume that asked.
    pub(super) volume: u32,
    /// The volume's name for it.
    pub(super) io: IoId,
    /// The request whose buffer it uses.
    pub(super) request: Option<usize>,
    pub(super) moving: Move,
    /// Bytes transferred.
    pub(super) done: u32,
    pub(super) tries: u8,
    /// The batch in which it was begun: nanoseconds of [`now_ns`](crate::clock::now_ns).
    pub(super) since_ns: u64,
}

/// What a completion means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Submit again for the rest.
    Again,
    /// Over; `Err` holds the errno.
    Done(Result<(), i32>),
}

impl CacheOp {
    /// The entry for what is left of it. What it points to lives as long as `self` or the request.
    pub(super) fn entry(&self, ring: &Ring) -> squeue::Entry {
        let Move { code, file, .. } = self.moving;
        let offset = self.moving.offset + u64::from(self.done);
        let address = (self.moving.address + u64::from(self.done)) as *mut u8;
        let len = self.moving.len - self.done;
        if let Code::ReceiveFixed { buf_index } = code {
            return match file {
                File::Fd(fd) => receive_fixed(fd, buf_index, address, len),
                File::Cache | File::CachePages => unreachable!("the cache device is no socket"),
            };
        }
        ring.entry_for(file, |fd| match code {
            Code::Read => opcode::Read::new(fd, address, len).offset(offset).build(),
            Code::Write { durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                let write = opcode::Write::new(fd, address, len).rw_flags(flags);
                write.offset(offset).build()
            }
            Code::ReadFixed { buf_index } => {
                let read = opcode::ReadFixed::new(fd, address, len, buf_index);
                read.offset(offset).build()
            }
            Code::WriteFixed { buf_index } => {
                let write = opcode::WriteFixed::new(fd, address, len, buf_index);
                write.offset(offset).build()
            }
            Code::ReceiveFixed { .. } => unreachable!("just made"),
        })
    }

    /// Begins a read anew, past the page cache.
    pub(super) fn go_around_pages(&mut self) {
        (self.moving.file, self.done, self.tries) = (File::Cache, 0, 0);
    }

    /// Takes a completion's result into account.
    pub(super) fn advance(&mut self, result: i32) -> Step {
        if result == -libc::EINTR || result == -libc::EAGAIN {
            self.tries += 1;
            return if self.tries < TRIES_MAX {
                Step::Again
            } else {
                Step::Done(Err(-result))
            };
        }
        let Ok(bytes) = u32::try_from(result) else {
            return Step::Done(Err(-result));
        };
        if bytes == 0 || bytes > self.moving.len - self.done {
            // The end of the file inside the cache device's extent, of a body that is not whole, or nonsense.
            return Step::Done(Err(libc::EIO));
        }
        self.done += bytes;
        self.tries = 0;
        if self.done == self.moving.len {
            Step::Done(Ok(()))
        } else {
            Step::Again
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::reactor) fn op(code: Code, len: u32) -> CacheOp {
        CacheOp {
            volume: 0,
            io: IoId(1),
            request: None,
            moving: Move::new(code, File::Cache, 0, 0, len),
            done: 0,
            tries: 0,
            since_ns: 0,
        }
    }

    #[test]
    fn transfer_short_is_submitted_again_for_the_rest() {
        let mut op = op(Code::Read, 4096);
        assert_eq!(op.advance(512), Step::Again);
        assert_eq!(op.advance(-libc::EINTR), Step::Again);
        assert_eq!(op.done, 512);
        assert_eq!(op.advance(3584), Step::Done(Ok(())));
    }

    #[test]
    fn transfer_of_nothing_is_an_error() {
        assert_eq!(op(Code::Read, 512).advance(0), Step::Done(Err(libc::EIO)));
        assert_eq!(
            op(Code::Write { durable: true }, 512).advance(-28),
            Step::Done(Err(28))
        );
        assert_eq!(
            op(Code::Write { durable: false }, 512).advance(513),
            Step::Done(Err(libc::EIO))
        );
    }

    #[test]
    fn read_that_fails_by_the_page_cache_is_read_whole_past_it() {
        let mut op = op(Code::Read, 4096);
        op.moving.file = File::CachePages;
        assert_eq!(op.advance(100), Step::Again);
        assert_eq!(op.advance(-libc::EIO), Step::Done(Err(libc::EIO)));
        op.go_around_pages();
        assert_eq!((op.moving.file, op.done), (File::Cache, 0));
        assert_eq!(op.advance(4096), Step::Done(Ok(())));
    }

    #[test]
    fn transfer_turned_away_for_ever_ends() {
        let mut op = op(Code::Read, 512);
        let mut steps = 0;
        while op.advance(-libc::EAGAIN) == Step::Again {
            steps += 1;
            assert!(steps < 1000);
        }
    }
}
