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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use quarry_objfmt::{KeyName, WrappedKey};

    use super::*;
    use crate::keys::put_first_copy;
    use crate::store::FolderStore;

    const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);

    fn keys(revision: u32, generations: &[u16]) -> WrappedKeys {
        let key = |generation: &u16| WrappedKey {
            volume: VOLUME,
            generation: KeyGeneration::new(*generation).unwrap(),
            by: KeyName::new("k").unwrap(),
            bytes: vec![7; 60],
        };
        WrappedKeys {
            revision,
            keys: generations.iter().map(key).collect(),
        }
    }

    async fn store(dir: &std::path::Path) -> (FolderStore, TenantName) {
        let store = FolderStore::open(dir, true).unwrap();
        let tenant = TenantName::new("acme").unwrap();
        let first = keys(1, &[1]);
        put_first_copy(&store, &tenant, VOLUME, &first)
            .await
            .unwrap();
        (store, tenant)
    }

    fn place(generation: u16, revision: u32) -> Place {
        Place {
            generation: KeyGeneration::new(generation).unwrap(),
            revision,
        }
    }

    #[tokio::test]
    async fn new_key_comes_after_all_that_the_head_and_any_copy_have() {
        let dir = tempfile::tempdir().unwrap();
        let (store, tenant) = store(dir.path()).await;
        let next = async |seen: WrappedKeys| next_place(&store, &tenant, VOLUME, &seen).await;
        assert_eq!(next(keys(1, &[1])).await.unwrap(), place(2, 2));
        // Of a writer that died before its head, or was fenced.
        put_copy(&store, &tenant, VOLUME, &keys(5, &[1, 2]))
            .await
            .unwrap();
        assert_eq!(next(keys(1, &[1])).await.unwrap(), place(3, 6));
        assert_eq!(next(keys(9, &[4])).await.unwrap(), place(5, 10));
        let last = next(keys(9, &[u16::MAX])).await.unwrap_err();
        assert!(matches!(last, RotateError::Generations), "{last}");
        // It may have had any.
        let object = keys::keys_key(&tenant, VOLUME, 6);
        store.create(&object, b"damaged"[..].into()).await.unwrap();
        let refused = next(keys(1, &[1])).await.unwrap_err();
        assert!(
            matches!(&refused, RotateError::Copy { object: named, .. } if *named == object),
            "{refused}"
        );
    }

    #[tokio::test]
    async fn new_key_whose_place_is_taken_meanwhile_gets_another_generation() {
        let dir = tempfile::tempdir().unwrap();
        let (store, tenant) = store(dir.path()).await;
        let is_first = AtomicBool::new(true);
        let make = async |place: Place| {
            let next = keys(place.revision, &[1, place.generation.get()]);
            if is_first.swap(false, Ordering::Relaxed) {
                put_copy(&store, &tenant, VOLUME, &next).await?;
            }
            Ok(next)
        };
        let made = put_new_key(&store, &tenant, VOLUME, &keys(1, &[1]), make).await;
        assert_eq!(made.unwrap(), keys(3, &[1, 3]));
        assert_eq!(copies(&store, &tenant, VOLUME).await.unwrap(), [1, 2, 3]);
    }
}
