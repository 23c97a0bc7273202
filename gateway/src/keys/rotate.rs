//! A new data key: of which generation it is, and where its copy goes.
//!
//! **Invariant.** Of two keys with the same volume and generation the one of the later copy is right. For that, whoever makes a
//! key gives it a generation after all that any copy has, and its copy a number above all of theirs; and if that number
//! is taken by then, looks at all copies again. So a copy that no head came to name, of a writer that died or was fenced, has
//! no key under the name of one that data are encrypted with.

use quarry_objfmt::{
    FormatError, KeyGeneration, KeysCopy, TenantName, VolumeId, WrappedKeys, keys,
};

use super::{REVISIONS_TRIED_MAX, copies, put_copy};
use crate::store::{Store, StoreError};

/// Why there is no new key.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// What wraps it does not.
    #[error(transparent)]
    Key(#[from] super::KeyError),
    /// A copy of the keys says nothing.
    #[error("{object}: {error}")]
    Copy {
        /// Its key.
        object: String,
        /// What is wrong with it.
        error: FormatError,
    },
    /// There can be no later generation.
    #[error("the volume had as many data keys as there can be")]
    Generations,
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A key to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Its generation.
    pub generation: KeyGeneration,
    /// The number of its copy.
    pub revision: u32,
}

/// The place of the key that comes after all that the head, whose keys are `seen`, and the copies beside it have.
///
/// # Errors
/// [`RotateError`]. A copy that is damaged may have any key: it is refused, and [`super::copy_problem`] tells how to mend it.
pub async fn next_place(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    seen: &WrappedKeys,
) -> Result<Place, RotateError> {
    let newest = |keys: &WrappedKeys| keys.newest(volume).map(|key| key.generation);
    let (mut generation, mut revision) = (newest(seen), seen.revision);
    for number in copies(store, tenant, volume).await? {
        revision = revision.max(number);
        let object = keys::keys_key(tenant, volume, number);
        let bytes = match store.get(&object).await {
            Ok((bytes, _)) => bytes,
            // Deleted meanwhile, as an earlier one: the head has changed, and will not take this key.
            Err(StoreError::NotFound { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        match KeysCopy::decode(&bytes, volume) {
            Ok(copy) => generation = generation.max(newest(&copy.keys)),
            Err(error) => return Err(RotateError::Copy { object, error }),
        }
    }
    let next = match generation {
        Some(newest) => newest.next().ok_or(RotateError::Generations)?,
        None => KeyGeneration::FIRST,
    };
    Ok(Place {
        generation: next,
        revision: revision.saturating_add(1),
    })
}

/// Makes a key by `make`, for its place, and writes the copy of the keys with it, which are answered.
///
/// # Errors
/// Those of `make`, and [`RotateError`]; [`StoreError::Exists`] if others make keys all the time.
pub async fn put_new_key<F: Future<Output = Result<WrappedKeys, RotateError>> + Send>(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    seen: &WrappedKeys,
    make: impl Fn(Place) -> F + Send + Sync,
) -> Result<WrappedKeys, RotateError> {
    let mut tries = 0;
    loop {
        let place = next_place(store, tenant, volume, seen).await?;
        let next = make(place).await?;
        match put_copy(store, tenant, volume, &next).await {
            Ok(()) => return Ok(next),
            // Another's, or our own try, whose answer was lost; then no head comes to name it.
            Err(StoreError::Exists { .. }) if tries < REVISIONS_TRIED_MAX => tries += 1,
            Err(error) => return Err(error.into()),
        }
    }
}
