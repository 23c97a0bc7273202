//! The messages and services of the Container Storage Interface (CSI) 1.12, as its text `proto/csi.proto`
//! (Apache-2.0) has them.
//!
//! Owns: [`v1`], made beforehand, so that a build needs no compiler of protocol buffers; `make/` makes it anew, and
//! the test `protocol` holds it to the text. Does not own: anything that a driver does. Left out are the services
//! that Quarry's driver does not have (groups of volumes, metadata of snapshots) and their messages.

#![forbid(unsafe_code)]

#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::nursery,
    reason = "made by a program; what its parts mean is told in proto/csi.proto"
)]
#[rustfmt::skip]
pub mod v1;

pub use prost_types::Timestamp;
