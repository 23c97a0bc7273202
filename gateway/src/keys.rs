//! The keys of encrypted volumes: made, wrapped, unwrapped, and kept beside their heads.
//!
//! Owns: where wrapping keys are had from (a keyring file, a program or a service), and the order in which
//! wrapped keys and their copies are written. Does not own: their layout (`quarry_objfmt::wrapped`), who may ask
//! for what (`crate::engine`).
//!
//! **Invariants.**
//! - An unwrapped key is in memory only, and wiped when it is dropped; no key is in an error, a log or an answer.
//! - A copy of the wrapped keys is there before a head that names them: a head can be lost, keys cannot be made
//!   anew.

mod command;
mod keyring;
pub mod rotate;
mod service;

use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use quarry_objfmt::wrapped::{WRAPPED_LEN_MAX, data_key_context, random_key};
use quarry_objfmt::{
    DataKey, DataKeys, Encryption, Head, KeyGeneration, KeyName, KeysCopy, TenantName, VolumeId,
    WrappedKey, WrappedKeys, keys,
};
use zeroize::Zeroizing;

use crate::store::{Store, StoreError};

pub use keyring::line as keyring_line;

/// How long a program or a service may take over one key, and how long a key waits for its turn with a program.
const HOOK_TIME_MAX: Duration = Duration::from_secs(10);

/// Longest answer of either that is read.
const HOOK_ANSWER_MAX: usize = 64 << 10;

/// Keys unwrapped side by side.
const KEYS_AT_ONCE: usize = 8;

/// The number of a volume's first copy.
pub(crate) const FIRST_REVISION: u32 = 1;

/// Numbers of copies tried: each that is taken was left by a crash, or is somebody else's just now.
const REVISIONS_TRIED_MAX: u32 = 16;

/// Why a key cannot be had or used. None of it says anything of a key but its name.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// This daemon has no way to any.
    #[error("key {key} is needed, and this host's daemon knows no keys")]
    NotConfigured {
        /// Its name.
        key: KeyName,
    },
    /// It is not in the keyring.
    #[error("the keyring {keyring} has no key {key}")]
    Missing {
        /// Its name.
        key: KeyName,
        /// The file.
        keyring: String,
    },
    /// The keyring cannot be used.
    #[error("the keyring {keyring} {why}")]
    Keyring {
        /// The file.
        keyring: String,
        /// What is wrong with it.
        why: String,
    },
    /// What was wrapped is not opened by this key.
    #[error(
        "{what} is not opened by key {key}: that is another key of this name, or what it wrapped was changed"
    )]
    Wrong {
        /// Its name.
        key: KeyName,
        /// What it should have opened.
        what: String,
    },
    /// The program or the service does not answer.
    #[error("{by} does not give key {key}: {why}")]
    Unavailable {
        /// What was asked.
        by: String,
        /// The key's name.
        key: KeyName,
        /// What happened.
        why: String,
    },
    /// A head says that its volume is encrypted, and has no key of it.
    #[error("volume {volume} is encrypted, and its head has no key of its own")]
    Keyless {
        /// The volume.
        volume: VolumeId,
    },
}

/// Where wrapping keys are had from.
#[derive(Debug)]
enum Source {
    None,
    Keyring(keyring::Keyring),
    Command(command::Command),
    Service(service::Service),
}

/// Wraps and unwraps keys.
#[derive(Debug)]
pub struct KeyService(Source);

impl KeyService {
    /// As configured. Nothing is asked or read yet.
    #[must_use]
    pub fn new(config: &quarry_config::Keys) -> Self {
        let source = if let Some(path) = &config.keyring {
            Source::Keyring(keyring::Keyring::new(path))
        } else if let Some(program) = &config.command {
            Source::Command(command::Command::new(program))
        } else if let Some(url) = &config.url {
            Source::Service(service::Service::new(url))
        } else {
            Source::None
        };
        Self(source)
    }

    /// Whether the keyring can be used; `None` if keys are not had from one.
    pub async fn check_keyring(&self) -> Option<Result<(), KeyError>> {
        match &self.0 {
            Source::Keyring(keyring) => Some(keyring.check().await),
            Source::None | Source::Command(_) | Source::Service(_) => None,
        }
    }

    /// Wraps `secret` for `context` with the key of this name, so that it was opened again. `tenant` is whose it is; none:
    /// the daemon's own.
    ///
    /// # Errors
    /// [`KeyError`].
    pub async fn wrap(
        &self,
        tenant: Option<&TenantName>,
        key: &KeyName,
        context: &[u8],
        secret: &[u8],
    ) -> Result<Vec<u8>, KeyError> {
        let wrapped = match &self.0 {
            Source::None => return Err(KeyError::NotConfigured { key: key.clone() }),
            Source::Keyring(keyring) => return keyring.wrap(key, context, secret).await,
            Source::Command(command) => {
                let framed = framed(context, secret);
                command.ask(tenant, "wrap", key, framed).await?
            }
            Source::Service(service) => service.ask("wrap", key, framed(context, secret)).await?,
        };
        if !(1..=WRAPPED_LEN_MAX).contains(&wrapped.len()) {
            let why = format!(
                "it answers {} bytes, where 1 to {WRAPPED_LEN_MAX} can be kept",
                wrapped.len()
            );
            return Err(self.unavailable(key, why));
        }
        // Before anything relies on it: what was wrapped before may be deleted for its sake. A program may end well, and have
        // said something else than what it was asked for.
        match self
            .unwrap(tenant, key, context, &wrapped, "just wrapped")
            .await
        {
            Ok(opened) if opened[..] == *secret => Ok(wrapped.to_vec()),
            Ok(_) | Err(KeyError::Wrong { .. }) => {
                let why = "it does not open what it has just wrapped".to_owned();
                Err(self.unavailable(key, why))
            }
            Err(error) => Err(error),
        }
    }

    /// What was wrapped so; `what` is what an error calls it.
    ///
    /// # Errors
    /// [`KeyError`].
    pub async fn unwrap(
        &self,
        tenant: Option<&TenantName>,
        key: &KeyName,
        context: &[u8],
        wrapped: &[u8],
        what: &str,
    ) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let wrapped = Zeroizing::new(wrapped.to_vec());
        let opened = match &self.0 {
            Source::None => return Err(KeyError::NotConfigured { key: key.clone() }),
            Source::Keyring(keyring) => keyring.unwrap(key, context, &wrapped).await?,
            Source::Command(command) => {
                let asked = command.ask(tenant, "unwrap", key, wrapped);
                unframed(context, &asked.await?)
            }
            Source::Service(service) => {
                unframed(context, &service.ask("unwrap", key, wrapped).await?)
            }
        };
        opened.ok_or_else(|| KeyError::Wrong {
            key: key.clone(),
            what: what.to_owned(),
        })
    }

    fn unavailable(&self, key: &KeyName, why: String) -> KeyError {
        let by = match &self.0 {
            Source::Command(command) => command.to_string(),
            Source::Service(service) => service.to_string(),
            Source::None | Source::Keyring(_) => "the keyring".to_owned(),
        };
        let key = key.clone();
        KeyError::Unavailable { by, key, why }
    }

    /// A data key of a volume, made now and wrapped by the key of this name.
    ///
    /// # Errors
    /// [`KeyError`].
    pub async fn fresh(
        &self,
        tenant: &TenantName,
        volume: VolumeId,
        generation: KeyGeneration,
        by: &KeyName,
    ) -> Result<WrappedKey, KeyError> {
        let secret = random_key::<32>();
        let context = data_key_context(tenant, volume, generation);
        Ok(WrappedKey {
            volume,
            generation,
            by: by.clone(),
            bytes: self.wrap(Some(tenant), by, &context, &*secret).await?,
        })
    }

    /// The data keys of the volume that `head` is of; none if it is not encrypted.
    ///
    /// # Errors
    /// [`KeyError`], if one of them cannot be had: what is read and written needs them all.
    pub async fn open(
        &self,
        tenant: &TenantName,
        head: &Head,
    ) -> Result<Option<Arc<DataKeys>>, KeyError> {
        if head.encryption == Encryption::None {
            return Ok(None);
        }
        let volume = head.volume;
        if head.keys.newest(volume).is_none() {
            return Err(KeyError::Keyless { volume });
        }
        let mut all = DataKeys::default();
        for some in head.keys.keys.chunks(KEYS_AT_ONCE) {
            let opened = some.iter().map(|wrapped| self.data_key(tenant, wrapped));
            for (wrapped, secret) in some.iter().zip(try_join_all(opened).await?) {
                let key = DataKey::of_generation(*secret, wrapped.generation);
                all.insert(wrapped.volume, key);
            }
        }
        Ok(Some(Arc::new(all)))
    }

    async fn data_key(
        &self,
        tenant: &TenantName,
        wrapped: &WrappedKey,
    ) -> Result<Zeroizing<[u8; 32]>, KeyError> {
        let WrappedKey {
            volume, generation, ..
        } = wrapped;
        let context = data_key_context(tenant, *volume, *generation);
        let what = format!("key {generation} of volume {volume}");
        let secret = self
            .unwrap(Some(tenant), &wrapped.by, &context, &wrapped.bytes, &what)
            .await?;
        let secret = <&[u8; 32]>::try_from(&secret[..]).map(|secret| Zeroizing::new(*secret));
        secret.map_err(|_| KeyError::Wrong {
            key: wrapped.by.clone(),
            what,
        })
    }

    /// The same data keys, wrapped by the key of this name.
    ///
    /// # Errors
    /// [`KeyError`].
    pub async fn rewrap(
        &self,
        tenant: &TenantName,
        wrapped: &[WrappedKey],
        by: &KeyName,
    ) -> Result<Vec<WrappedKey>, KeyError> {
        let mut all = Vec::with_capacity(wrapped.len());
        for some in wrapped.chunks(KEYS_AT_ONCE) {
            let rewrapped = some.iter().map(|old| self.rewrap_one(tenant, old, by));
            all.extend(try_join_all(rewrapped).await?);
        }
        Ok(all)
    }

    async fn rewrap_one(
        &self,
        tenant: &TenantName,
        old: &WrappedKey,
        by: &KeyName,
    ) -> Result<WrappedKey, KeyError> {
        let secret = self.data_key(tenant, old).await?;
        let context = data_key_context(tenant, old.volume, old.generation);
        Ok(WrappedKey {
            volume: old.volume,
            generation: old.generation,
            by: by.clone(),
            bytes: self.wrap(Some(tenant), by, &context, &*secret).await?,
        })
    }
}

/// What a program or a service wraps: it binds nothing itself, so the context goes in front.
fn framed(context: &[u8], secret: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut framed = Zeroizing::new(Vec::with_capacity(context.len() + secret.len()));
    framed.extend_from_slice(context);
    framed.extend_from_slice(secret);
    framed
}

fn unframed(context: &[u8], opened: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let secret = opened.strip_prefix(context)?;
    Some(Zeroizing::new(secret.to_vec()))
}

/// The first keys of a volume that is to be.
#[must_use]
pub fn first(keys: Vec<WrappedKey>) -> WrappedKeys {
    let mut first = WrappedKeys {
        revision: FIRST_REVISION,
        keys: Vec::new(),
    };
    for key in keys {
        first.insert(key);
    }
    first
}

/// Writes the copy of the first keys of a volume whose id is ours alone.
///
/// # Errors
/// The store's.
pub async fn put_first_copy(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    wrapped: &WrappedKeys,
) -> Result<(), StoreError> {
    let (key, copy) = copy_of(tenant, volume, wrapped);
    crate::store::create_own(store, &key, copy).await
}

/// Writes the copy of keys that replace those of revision `wrapped.revision`, all of which some copy has, under a number
/// above those of all copies; answers them with it.
///
/// # Errors
/// The store's; [`StoreError::Exists`] if too many numbers are taken.
pub async fn put_next_copy(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    mut wrapped: WrappedKeys,
) -> Result<WrappedKeys, StoreError> {
    let there = copies(store, tenant, volume).await?;
    wrapped.revision = there.into_iter().fold(wrapped.revision, u32::max);
    let mut tries = 0;
    loop {
        wrapped.revision = wrapped.revision.saturating_add(1);
        match put_copy(store, tenant, volume, &wrapped).await {
            Ok(()) => return Ok(wrapped),
            // Or our own try, whose answer was lost: then one copy more is left, and deleted as an earlier one.
            Err(StoreError::Exists { .. }) if tries < REVISIONS_TRIED_MAX => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

async fn put_copy(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    wrapped: &WrappedKeys,
) -> Result<(), StoreError> {
    let (key, copy) = copy_of(tenant, volume, wrapped);
    store.create(&key, copy).await.map(drop)
}

/// The copy of keys as an object: its name, and what it holds.
fn copy_of(tenant: &TenantName, volume: VolumeId, wrapped: &WrappedKeys) -> (String, Bytes) {
    let key = keys::keys_key(tenant, volume, wrapped.revision);
    let keys = wrapped.clone();
    (key, KeysCopy { volume, keys }.encode().into())
}

/// The numbers of the copies that are there.
///
/// # Errors
/// The store's.
pub async fn copies(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
) -> Result<Vec<u32>, StoreError> {
    let prefix = keys::keys_prefix(tenant, volume);
    let listed = store.list(&prefix).await?;
    let number = |key: &String| u32::from_str_radix(key.strip_prefix(&prefix)?, 16).ok();
    Ok(listed.iter().filter_map(number).collect())
}

/// Deletes the copies of revisions before `revision`, which a head names.
///
/// # Errors
/// The store's; doing it again goes on.
pub async fn drop_copies_before(
    store: &dyn Store,
    tenant: &TenantName,
    volume: VolumeId,
    revision: u32,
) -> Result<(), StoreError> {
    for earlier in copies(store, tenant, volume).await? {
        if earlier < revision {
            store
                .delete(&keys::keys_key(tenant, volume, earlier))
                .await?;
        }
    }
    Ok(())
}

/// What is wrong with the copy of a head's keys, if anything is.
///
/// # Errors
/// The store's, if it cannot tell.
pub async fn copy_problem(
    store: &dyn Store,
    tenant: &TenantName,
    head: &Head,
) -> Result<Option<(String, String)>, StoreError> {
    if head.keys.keys.is_empty() {
        return Ok(None);
    }
    let key = keys::keys_key(tenant, head.volume, head.keys.revision);
    let problem = match store.get(&key).await {
        Ok((bytes, _)) => match KeysCopy::decode(&bytes, head.volume) {
            Ok(copy) if copy.keys == head.keys => return Ok(None),
            Ok(_) => "it has other keys than the head".to_owned(),
            Err(error) => error.to_string(),
        },
        Err(error @ (StoreError::NotFound { .. } | StoreError::Invalid { .. })) => {
            error.to_string()
        }
        Err(error) => return Err(error),
    };
    let problem = format!(
        "the copy of the volume's keys: {problem}; `quarry volume rekey` makes it anew, and without it they are \
         lost with the head"
    );
    Ok(Some((key, problem)))
}

#[cfg(test)]
mod tests;
