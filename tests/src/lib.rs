//! The harness of the end-to-end tests: they drive the real `quarry` binary from outside, as a
//! person or a program would, by its command line, its sockets and its object store.
//!
//! Owns: starting and killing daemons ([`Site`], [`Daemon`]), object stores ([`SeaweedFs`],
//! [`StoreDir`]), CSI drivers ([`csi`]), faults between the two ([`FaultProxy`]), a collector of traces ([`Collector`]),
//! an NBD client of its own ([`Nbd`]), machines that boot from volumes ([`Qemu`]), and pictures of dashboards ([`picture`]).
//! Does not own: any knowledge of formats or of the daemon's inside. It links no other crate of the
//! workspace, so that a mistake there cannot hide itself here, but for the protocol of CSI, which is not ours.
//!
//! **Invariant:** a harness kills only processes that it started, by their own handle.
//!
//! **Invariant:** a test that lacks a tool says so through [`skip`] and is counted as skipped, never
//! silently passed.

#![forbid(unsafe_code)]

mod certificates;
mod collector;
mod command;
pub mod csi;
mod daemon;
mod http;
mod machine;
mod nanio;
mod nbd;
pub mod picture;
mod prometheus;
mod proxy;
mod seaweed;
mod seed;
mod site;
mod stamp;
mod stopwatch;
mod store_dir;
mod tools;

pub use certificates::certificates;
pub use collector::{Collector, Span, Trace};
pub use command::{Ran, Refusal, quarry_program};
pub use daemon::Daemon;
pub use http::{HttpAnswer, http_get, metric_sum};
pub use machine::{Machine, Qemu};
pub use nanio::Nanio;
pub use nbd::{BlockSizes, Nbd, NbdError, NbdFlags};
pub use prometheus::{Prometheus, Series, Window};
pub use proxy::FaultProxy;
pub use seaweed::SeaweedFs;
pub use seed::{seeded, test_number};
pub use site::Site;
pub use stamp::{History, Stamps};
pub use stopwatch::in_time;
pub use store_dir::StoreDir;
pub use tools::{Tool, free_port, skip, target_dir, tool, vm_kernel};

/// Bytes of a sector, always.
pub const SECTOR: u64 = 512;
/// One kibibyte.
pub const KIB: u64 = 1 << 10;
/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;
/// One tebibyte.
pub const TIB: u64 = 1 << 40;

/// A number of bytes as a length in memory.
///
/// # Panics
/// If this machine cannot address it, which no test asks for.
#[must_use]
pub fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a test's buffer fits the address space")
}

/// Fails unless two images are the same, naming where they part.
///
/// # Errors
/// Naming the first byte that differs.
pub fn same_bytes(what: &str, found: &[u8], expected: &[u8]) -> anyhow::Result<()> {
    anyhow::ensure!(
        found.len() == expected.len(),
        "{what}: {} bytes instead of {}",
        found.len(),
        expected.len()
    );
    if found != expected {
        let at = found.iter().zip(expected).position(|(a, b)| a != b);
        let at = at.unwrap_or_default();
        let wrong = found.iter().zip(expected).filter(|(a, b)| a != b).count();
        anyhow::bail!(
            "{what}: byte {at} (sector {}) is {} instead of {}; {wrong} bytes differ",
            at / 512,
            found[at],
            expected[at]
        );
    }
    Ok(())
}
