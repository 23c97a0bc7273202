//! Randomness that can be repeated, and knobs that make a run longer.

use std::env;

use rand::SeedableRng;
use rand::rngs::StdRng;

/// A generator for the test `name`, seeded from `QUARRY_TEST_SEED` or at random, and the seed, which
/// is printed so that a failure can be repeated.
#[must_use]
pub fn seeded(name: &str) -> (StdRng, u64) {
    let seed = env::var("QUARRY_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(rand::random);
    println!("{name}: QUARRY_TEST_SEED={seed}");
    (StdRng::seed_from_u64(seed), seed)
}

/// The number in the environment variable `variable`, or `otherwise`.
///
/// # Panics
/// If the variable is set to something that is not a number.
#[must_use]
pub fn test_number(variable: &str, otherwise: u64) -> u64 {
    match env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
        Err(_) => otherwise,
    }
}
