//! The Container Storage Interface (CSI 1.x): volumes for the pods of Kubernetes, by Quarry's daemons.
//!
//! Owns: what CSI's calls, names and errors are in terms of the API, and on a node file systems, their checks and
//! their mounts. Does not own any state: what is there, attached, and whose, the daemons and the object store know;
//! what is staged and published, the kernel's table of mounts. So a plugin that is killed at any line goes on when
//! the call is made again. Nor does it move volumes: Kubernetes says where they are to be, and when a node is lost;
//! that node is then fenced by the volume's epoch.
//!
//! Invariants:
//! - one call a volume at a time, others are told `ABORTED`; a call runs to its end though its caller hangs up;
//! - nothing is formatted that was ever written to;
//! - no secret of a request is looked at, kept or logged.

mod answer;
mod capability;
mod class;
mod controller;
mod identity;
mod ids;
mod node;
mod peers;
mod serve;

pub use class::Topology;
pub use peers::Peers;
pub use serve::{Endpoint, Services, Settings, run};

/// The driver's name, as storage classes and persistent volumes have it.
pub const DRIVER: &str = "csi.quarry.storage";
