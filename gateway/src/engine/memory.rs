//! What the process has in memory beside what it caches: the map nodes, which take the largest part of `cache.ram`,
//! leave room for it, so that the whole stays near what was set.
//!
//! It is an estimate, made at the start. What is found later would be of no use: a heap that has grown hardly shrinks,
//! so what is freed would be taken for something else, and nodes put out for it.

use std::fs;

/// A heap with so many bytes of caches loses them divided by this, between its pieces and in buffers.
const LOST_SHARE: u64 = 8;

/// How much of `ram` bytes for caches goes to what is none: the program as it is now, and what the heap will lose.
pub(super) fn beside(ram: u64) -> u64 {
    // Without /proc nothing is known of the program.
    resident_bytes().unwrap_or_default() + ram / LOST_SHARE
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
    fn program_and_an_eighth_are_left_room_for() {
        let program = beside(0);
        assert!((1 << 20..1 << 40).contains(&program), "{program}");
        assert!(beside(8 << 40) >= 1 << 40);
    }
}
