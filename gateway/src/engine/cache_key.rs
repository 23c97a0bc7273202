//! The key of an encrypted cache device: made with the device, unwrapped before it is opened.
//!
//! It lies wrapped in the device's own superblock, so that unsent writes need nothing but the device and the
//! wrapping key. It is had before the device is opened, and before another daemon is stopped for its sake: one that
//! cannot have it must not end the other.

use std::io;
use std::path::Path;

use anyhow::{Context as _, bail};
use quarry_cache::{CIPHER_KEY_LEN, CacheDevice, Journals, SectorCipher, device};
use quarry_objfmt::wrapped::{cache_key_context, random_key};
use quarry_objfmt::{CacheId, CacheKey, KeyName};

use super::now_ms;
use crate::keys::KeyService;

/// What an encrypted cache is opened with.
pub struct PreparedKey {
    /// The device's id, or what it is to be called.
    cache: CacheId,
    wrapped: CacheKey,
    cipher: SectorCipher,
}

/// Has the key of the cache that is configured, or makes one for a cache that is to be made; none if it is not to
/// be encrypted.
///
/// # Errors
/// If the key cannot be had, or the cache was made the other way.
pub async fn prepare(config: &quarry_config::Config) -> anyhow::Result<Option<PreparedKey>> {
    let path = config.cache_path();
    let there = device::peek(&path);
    check(&path, there.as_ref().map(|s| s.key.is_some()), config)?;
    let Some(name) = config.cache.key.as_ref().filter(|_| config.cache.encrypt) else {
        return Ok(None);
    };
    let name = KeyName::new(name.as_str()).context("cache.key")?;
    let service = KeyService::new(&config.keys);
    let failed = |error| format!("the cache {} cannot be opened: {error}", path.display());
    if let Some(superblock) = there
        && let Some(wrapped) = superblock.key
    {
        let cache = superblock.cache;
        let context = cache_key_context(cache);
        let what = format!("the key of the cache {}", path.display());
        let secret = service
            .unwrap(None, &wrapped.by, &context, &wrapped.bytes, &what)
            .await;
        let secret = secret.map_err(crate::control::ApiError::from);
        let secret = secret.map_err(|error| anyhow::anyhow!(failed(error)))?;
        let Ok(key) = <&[u8; CIPHER_KEY_LEN]>::try_from(&secret[..]) else {
            bail!("{what} is not {CIPHER_KEY_LEN} bytes long");
        };
        let cipher = SectorCipher::new(key);
        return Ok(Some(PreparedKey {
            cache,
            wrapped,
            cipher,
        }));
    }
    let cache = CacheId::from(uuid::Uuid::new_v4());
    let key = random_key::<CIPHER_KEY_LEN>();
    let context = cache_key_context(cache);
    let wrapped = service.wrap(None, &name, &context, &*key).await;
    let bytes = wrapped.map_err(crate::control::ApiError::from);
    let bytes = bytes.map_err(|error| anyhow::anyhow!(failed(error)))?;
    Ok(Some(PreparedKey {
        cache,
        wrapped: CacheKey { by: name, bytes },
        cipher: SectorCipher::new(&key),
    }))
}

/// Refuses a cache that was made the other way; `None`: it is to be made.
fn check(
    path: &Path,
    encrypted: Option<bool>,
    config: &quarry_config::Config,
) -> anyhow::Result<()> {
    let path = path.display();
    match (encrypted, config.cache.encrypt) {
        (Some(false), true) => bail!(
            "the cache {path} was made without encryption: detach its volumes with cache.encrypt = false, which sends what it holds, then delete it or name another"
        ),
        (Some(true), false) => bail!(
            "the cache {path} is encrypted: set cache.encrypt = true, cache.key and a way to that key under [keys]"
        ),
        _ => Ok(()),
    }
}

/// Opens the cache that is configured.
pub(super) fn open(
    config: &quarry_config::Config,
    prepared: Option<PreparedKey>,
    host: &str,
) -> anyhow::Result<CacheDevice> {
    let path = config.cache_path();
    let size = config.cache.size.map(quarry_config::Size::bytes);
    let fresh = match &prepared {
        Some(prepared) => prepared.cache,
        None => CacheId::from(uuid::Uuid::new_v4()),
    };
    let key = prepared.as_ref().map(|prepared| &prepared.wrapped);
    let mut device = CacheDevice::open_with(&path, size, fresh, key, host, now_ms())?;
    if let Err(errno) = device.failure().get() {
        // What they name may be what the device has just lost, and the next daemon is not told of that.
        Journals::open(&config.daemon.journal_dir, device.id())?.void();
        let error = io::Error::from_raw_os_error(errno);
        bail!("the cache {} cannot be synced: {error}", path.display());
    }
    // Somebody else may have made it since it was looked at.
    check(&path, Some(device.key().is_some()), config)?;
    if let Some(prepared) = prepared {
        if device.id() != prepared.cache || device.key() != Some(&prepared.wrapped) {
            bail!(
                "the cache {} was made anew just now by somebody else: start again",
                path.display()
            );
        }
        device.unlock(prepared.cipher);
    }
    if let Some(words) = other_size(config, &device) {
        tracing::warn!(path = %path.display(), "{words}: {OTHER_SIZE_REMEDY}");
    }
    Ok(device)
}

/// What to do about a cache of another size than is configured.
pub(super) const OTHER_SIZE_REMEDY: &str = "set cache.size to that, or make the cache anew: detach all volumes, stop the daemon, remove the cache, and start the daemon";

/// What is told of a cache that was made of another size than is configured.
pub(super) fn other_size(config: &quarry_config::Config, device: &CacheDevice) -> Option<String> {
    let (wanted, kept) = (config.cache.size?, device.kept_size()?);
    let kept = quarry_config::Size::new(kept);
    Some(format!(
        "cache.size is {wanted}, and the cache was made before and keeps its {kept}"
    ))
}
