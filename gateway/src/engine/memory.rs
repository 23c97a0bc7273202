//! What the process has in memory beside what it caches: the map nodes, which take the largest part of `cache.ram`,
//! leave room for it, so that the whole stays near what was set.
//!
//! A heap that has grown hardly shrinks, and it grows within a second of the first reads: so room is left from the start
//! for the program as it is then and for what a heap of this size loses between its pieces, and later for what is found.
//!
//! **Invariant.** What is there for a moment only (chunks on their way, bodies of answers) puts nothing out: the least
//! of [`LOOKS`] looks counts.

use std::collections::VecDeque;
use std::fs;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use quarry_volume::Shared;

use crate::backend::Fetches;

const LOOK_EACH: Duration = Duration::from_secs(1);
const LOOKS: usize = 15;
/// A heap with so many bytes of caches loses them divided by this, at least.
const LOST_SHARE: u64 = 8;

/// Looks for as long as there are volumes' common things; `ram` bytes may be cached.
pub(super) async fn watch(shared: Weak<Mutex<Shared>>, fetches: Arc<Fetches>, ram: u64) {
    let least = resident_bytes().unwrap_or_default() + ram / LOST_SHARE;
    if let Some(shared) = shared.upgrade() {
        shared.lock().nodes.set_beside(least);
    }
    let mut looks = VecDeque::with_capacity(LOOKS);
    loop {
        tokio::time::sleep(LOOK_EACH).await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        // Without /proc nothing is known, and nothing is left.
        let Some(resident) = resident_bytes() else {
            return;
        };
        let mut shared = shared.lock();
        let cached = shared.memory_bytes() + fetches.bytes();
        let beside = least_of(&mut looks, resident.saturating_sub(cached));
        shared.nodes.set_beside(beside.max(least));
    }
}

/// The least of the last looks, with this one.
fn least_of(looks: &mut VecDeque<u64>, look: u64) -> u64 {
    if looks.len() == LOOKS {
        looks.pop_front();
    }
    looks.push_back(look);
    looks.iter().copied().min().unwrap_or_default()
}

/// What the kernel says that the process has in memory.
fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_is_in_memory() {
        let bytes = resident_bytes().unwrap();
        assert!((1 << 20..1 << 40).contains(&bytes), "{bytes}");
    }

    #[test]
    fn burst_counts_only_if_it_lasts() {
        let mut looks = VecDeque::new();
        for _ in 0..LOOKS - 1 {
            assert_eq!(least_of(&mut looks, 50), 50);
        }
        for _ in 0..LOOKS - 1 {
            assert_eq!(least_of(&mut looks, 200), 50);
        }
        assert_eq!(least_of(&mut looks, 200), 200);
        assert_eq!(least_of(&mut looks, 60), 60);
    }
}
