//! Reads of what must decode: asked for again when it does not, for the damage may have happened on the
//! way.

use std::fmt::Display;

use quarry_cache::Branch;
use quarry_objfmt::{FormatError, decode_record};
use serde::de::DeserializeOwned;

use crate::store::{Store, StoreError};

/// Most times that a damaged answer is asked for again before the object is called damaged.
pub(crate) const DAMAGE_RETRIES_MAX: u32 = 2;

/// Why there is nothing sound.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unsound {
    /// The store's own answer.
    #[error(transparent)]
    Store(StoreError),
    /// The object is damaged; how.
    #[error("{0}")]
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
    insist(|| async {
        let answer = ask().await.map_err(Unsound::Store)?;
        decode(answer).map_err(|error| Unsound::Damaged(error.to_string()))
    })
    .await
}

/// A record of `kind`; the inner error is of one that stays damaged.
///
/// # Errors
/// The store's, [`StoreError::NotFound`] too.
pub(crate) async fn record<T: DeserializeOwned>(
    store: &dyn Store,
    kind: &str,
    key: &str,
) -> Result<Result<T, FormatError>, StoreError> {
    let mut tries = 0;
    loop {
        let (bytes, _) = store.get(key).await?;
        match decode_record(kind, &bytes) {
            Err(_) if tries < DAMAGE_RETRIES_MAX => {
                Branch::AskedAgain.taken();
                tries += 1;
            }
            end => return Ok(end),
        }
    }
}

/// Tries again what finds damage.
pub(crate) async fn insist<T, F>(attempt: impl Fn() -> F) -> Result<T, Unsound>
where
    F: Future<Output = Result<T, Unsound>>,
{
    let mut tries = 0;
    loop {
        match attempt().await {
            Err(Unsound::Damaged(_)) if tries < DAMAGE_RETRIES_MAX => {
                Branch::AskedAgain.taken();
                tries += 1;
            }
            end => return end,
        }
    }
}

/// For who looks for damage: damage is an answer, and only a store that gives none an error.
pub(crate) fn told<T>(result: Result<T, Unsound>) -> Result<Result<T, String>, StoreError> {
    match result {
        Ok(sound) => Ok(Ok(sound)),
        Err(Unsound::Damaged(reason)) => Ok(Err(reason)),
        Err(Unsound::Store(error)) => Err(error),
    }
}
