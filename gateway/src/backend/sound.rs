//! Reads of what must decode: asked for again when it does not, for the damage may have happened on the
//! way.

use std::fmt::Display;

use crate::store::StoreError;

/// Most times that a damaged answer is asked for again before the object is called damaged.
pub(crate) const DAMAGE_RETRIES_MAX: u32 = 2;

/// Why there is nothing sound.
#[derive(Debug)]
pub(super) enum Unsound {
    /// The store's own answer.
    Store(StoreError),
    /// The object is damaged; how.
    Damaged(String),
}

/// Asks until the answer decodes.
pub(super) async fn read<A, T, E: Display, F>(
    ask: impl Fn() -> F,
    decode: impl Fn(A) -> Result<T, E>,
) -> Result<T, Unsound>
where
    F: Future<Output = Result<A, StoreError>>,
{
    let mut tries = 0;
    loop {
        match decode(ask().await.map_err(Unsound::Store)?) {
            Ok(sound) => return Ok(sound),
            Err(_) if tries < DAMAGE_RETRIES_MAX => tries += 1,
            Err(error) => return Err(Unsound::Damaged(error.to_string())),
        }
    }
}
