//! How long something takes, and may take.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// Does `work`, says how long it took, and answers what came of it.
///
/// # Errors
/// The work's, or that it took as long as `limit`, or longer.
pub fn in_time<T>(what: &str, limit: Duration, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    let done = work()?;
    let took = begun.elapsed();
    println!("{what}: {took:?}");
    ensure!(took < limit, "{what} took {took:?}, more than {limit:?}");
    Ok(done)
}
