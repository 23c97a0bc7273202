//! Disk images: what `quarry volume import` and `quarry volume export` copy from and to.
//!
//! Owns: the formats and how they are told apart ([`format`](mod@format)), QEMU's programs, which know all formats but
//! raw ([`qemu`]), the parallel copy ([`copy`]), the record that an import goes on by ([`record`]), and whether
//! image and volume still are what it says ([`sample`]).
//! Does not own: volumes and their attachments, which the command line asks the daemon for.
//!
//! Invariants:
//! - A copy's target reads as zeroes before it, or as what the same copy wrote: zeroes are not written.
//! - An image that names other files is refused: whoever made it would choose what is read.

pub mod copy;
pub mod disk;
pub mod format;
pub mod qemu;
pub mod record;
pub mod sample;

pub use copy::{Copy, CopyError, Feed, Progress};
pub use disk::{Disk, DiskError};
pub use format::ImageFormat;
