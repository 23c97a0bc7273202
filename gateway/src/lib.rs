//! Quarry's daemon and its command line.

pub mod backend;
pub mod cli;
mod clones;
pub mod control;
pub mod csi;
pub mod daemon;
pub mod demo;
pub mod engine;
pub mod fair;
pub mod image;
pub mod keys;
pub mod latency;
pub mod metrics;
pub mod moment;
pub mod nbd;
mod places;
pub mod provision;
pub mod qos;
pub mod reactor;
pub mod rescue;
pub mod snapshot;
pub mod store;
mod tls;
pub mod trace;
pub mod trash;
pub mod ublk;
pub mod verify;
