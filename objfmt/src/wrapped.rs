//! Data keys as they are stored: each wrapped by a key that is in no object.
//!
//! Owns: the layout in a head and in its copy beside it, what a key is wrapped for, and the local way of
//! wrapping. Does not own: where the wrapping keys are, and other ways (a program, a service), whose bytes are
//! opaque here.
//!
//! A wrapped key opens for one tenant, volume and generation alone: that is its *context*, which the local way
//! authenticates, and others get in front of the key. Byte tables are in `FORMAT.md`.

use std::fmt;

use aes_gcm::aead::Generate;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit, Nonce, Tag};
use zeroize::{Zeroize as _, Zeroizing};

use crate::codec::{KeyGeneration, NONCE_LEN, TAG_LEN};
use crate::error::{FormatError, Result, check_up_to};
use crate::keys::{KeyName, NAME_LEN_MAX, TenantName};
use crate::prologue::{Format, PROLOGUE_LEN, put_str, read_str};
use crate::types::{CacheId, VolumeId};
use crate::wire::{Reader, put_u16, put_u32};

/// Most keys of a head: its volume's own of all generations, and those of the volumes that it was cloned from.
pub const KEYS_MAX: usize = 256;
/// Bytes of the longest wrapped key: services answer some hundred.
pub const WRAPPED_LEN_MAX: usize = 1024;

/// Volume, generation, name, length; and of a wrapped key one byte at least.
const KEY_LEN_MIN: usize = 16 + 2 + 1 + 1 + 2 + 1;
const KEY_LEN_MAX: usize = 16 + 2 + 1 + NAME_LEN_MAX + 2 + WRAPPED_LEN_MAX;
/// Revision and count, then the keys.
pub(crate) const KEYS_LEN_MAX: usize = 4 + 4 + KEYS_MAX * KEY_LEN_MAX;

const FORMAT: Format = Format {
    magic: *b"QYKY",
    version: 1,
    what: "keys",
    len_max: PROLOGUE_LEN + 16 + KEYS_LEN_MAX,
};

/// A data key, wrapped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WrappedKey {
    /// Whose chunks it is for.
    pub volume: VolumeId,
    /// Which of that volume's keys it is.
    pub generation: KeyGeneration,
    /// The name of the key that wraps it.
    pub by: KeyName,
    /// What that made of it; 1 to [`WRAPPED_LEN_MAX`] bytes.
    pub bytes: Vec<u8>,
}

/// All data keys that a volume needs: its own, and those of the volumes whose chunks its map may name.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct WrappedKeys {
    /// The number of their copy beside the head; 0 without keys. It only grows.
    pub revision: u32,
    /// By volume and generation; at most [`KEYS_MAX`].
    pub keys: Vec<WrappedKey>,
}

impl WrappedKeys {
    /// The newest key of `volume`.
    #[must_use]
    pub fn newest(&self, volume: VolumeId) -> Option<&WrappedKey> {
        self.keys.iter().rfind(|key| key.volume == volume)
    }

    /// Puts a key in its place, over one of the same volume and generation.
    pub fn insert(&mut self, key: WrappedKey) {
        let name = |key: &WrappedKey| (key.volume, key.generation);
        match self.keys.binary_search_by_key(&name(&key), name) {
            Ok(at) => self.keys[at] = key,
            Err(at) => self.keys.insert(at, key),
        }
    }

    /// Adds those of a volume and generation that it has no key of, as many as there is room for.
    pub fn add_missing(&mut self, keys: Vec<WrappedKey>) {
        let name = |key: &WrappedKey| (key.volume, key.generation);
        for key in keys {
            if let Err(at) = self.keys.binary_search_by_key(&name(&key), name)
                && self.keys.len() < KEYS_MAX
            {
                self.keys.insert(at, key);
            }
        }
    }

    /// Checks every rule of them.
    ///
    /// # Errors
    /// With the rule that is broken.
    pub(crate) fn validate(&self, what: &'static str) -> Result<()> {
        let keys = self.keys.len() as u64;
        check_up_to(what, "number of keys", keys, KEYS_MAX as u64)?;
        let name = |key: &WrappedKey| (key.volume, key.generation);
        if !self.keys.is_sorted_by(|a, b| name(a) < name(b)) {
            return Err(FormatError::invalid(what, "the keys are not ascending"));
        }
        let fits = |key: &WrappedKey| (1..=WRAPPED_LEN_MAX).contains(&key.bytes.len());
        if !self.keys.iter().all(fits) {
            return Err(FormatError::invalid(
                what,
                "the length of a wrapped key is out of range",
            ));
        }
        if self.revision == 0 && !self.keys.is_empty() {
            return Err(FormatError::invalid(what, "its keys have no copy"));
        }
        Ok(())
    }

    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        put_u32(out, self.revision);
        put_u32(out, u32::try_from(self.keys.len()).expect("validated"));
        for key in &self.keys {
            out.extend_from_slice(&key.volume.to_bytes());
            put_u16(out, key.generation.get());
            put_str(out, key.by.as_str());
            put_u16(out, u16::try_from(key.bytes.len()).expect("validated"));
            out.extend_from_slice(&key.bytes);
        }
    }

    /// Without checking the rules of [`WrappedKeys::validate`].
    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self> {
        let what = reader.what();
        let revision = reader.u32()?;
        let count = reader.count_u32(KEY_LEN_MIN)?;
        let mut keys = Vec::with_capacity(count);
        for _ in 0..count {
            let volume = VolumeId::from_bytes(reader.array()?);
            let generation = KeyGeneration::new(reader.u16()?)
                .ok_or(FormatError::invalid(what, "a key is of generation 0"))?;
            let by = KeyName::new(read_str(reader)?)
                .map_err(|_| FormatError::invalid(what, "a key's name is not a name"))?;
            let len = reader.u16()? as usize;
            keys.push(WrappedKey {
                volume,
                generation,
                by,
                bytes: reader.bytes(len)?.to_vec(),
            });
        }
        Ok(Self { revision, keys })
    }
}

/// The copy of a head's keys that lies beside it: with a lost head its data are not lost.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeysCopy {
    /// The volume.
    pub volume: VolumeId,
    /// Its keys, and the number of this copy.
    pub keys: WrappedKeys,
}

impl KeysCopy {
    /// Its bytes.
    ///
    /// # Panics
    /// If the keys break a rule: those of our own making are right.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let valid = self.keys.validate(FORMAT.what);
        valid.unwrap_or_else(|error| panic!("{error}"));
        let mut out = FORMAT.begin();
        out.extend_from_slice(&self.volume.to_bytes());
        self.keys.put(&mut out);
        FORMAT.seal(&mut out);
        out
    }

    /// The copy that `bytes` are, which must be of `volume`.
    ///
    /// # Errors
    /// If they are damaged, of a later version, another volume's, or break a rule.
    pub fn decode(bytes: &[u8], volume: VolumeId) -> Result<Self> {
        let (_, mut reader) = FORMAT.open(bytes)?;
        if VolumeId::from_bytes(reader.array()?) != volume {
            return Err(FormatError::Misplaced {
                what: FORMAT.what,
                field: "volume",
            });
        }
        let keys = WrappedKeys::read(&mut reader)?;
        reader.finish()?;
        keys.validate(FORMAT.what)?;
        Ok(Self { volume, keys })
    }
}

/// What a data key of a volume is wrapped for.
#[must_use]
pub fn data_key_context(
    tenant: &TenantName,
    volume: VolumeId,
    generation: KeyGeneration,
) -> Vec<u8> {
    let mut out = b"QYKW".to_vec();
    put_str(&mut out, tenant.as_str());
    out.extend_from_slice(&volume.to_bytes());
    put_u16(&mut out, generation.get());
    out
}

/// What a cache device's key is wrapped for.
#[must_use]
pub fn cache_key_context(cache: CacheId) -> Vec<u8> {
    [&b"QYKC"[..], &cache.to_bytes()].concat()
}

/// A key that wraps others. Never shown.
#[derive(Clone)]
pub struct WrappingKey([u8; 32]);

impl Drop for WrappingKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for WrappingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WrappingKey(hidden)")
    }
}

impl WrappingKey {
    /// From its 32 bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Wraps `secret` for `context`: a random nonce (12), ciphertext, tag (16).
    ///
    /// # Panics
    /// If the system has no randomness to give.
    #[must_use]
    pub fn wrap(&self, context: &[u8], secret: &[u8]) -> Vec<u8> {
        let nonce = <[u8; NONCE_LEN]>::generate();
        let mut out = nonce.to_vec();
        out.extend_from_slice(secret);
        let text = &mut out[NONCE_LEN..];
        let tag = self
            .cipher()
            .encrypt_inout_detached(&nonce.into(), context, text.into());
        let tag: [u8; TAG_LEN] = tag.expect("a key is short").into();
        out.extend_from_slice(&tag);
        out
    }

    /// What was wrapped; none if it was by another key, for another context, or changed since.
    #[must_use]
    pub fn unwrap(&self, context: &[u8], wrapped: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (nonce, rest) = wrapped.split_at_checked(NONCE_LEN)?;
        let (text, tag) = rest.split_at_checked(rest.len().checked_sub(TAG_LEN)?)?;
        let (nonce, tag) = (Nonce::try_from(nonce).ok()?, Tag::try_from(tag).ok()?);
        let mut secret = Zeroizing::new(text.to_vec());
        let buffer = secret.as_mut_slice().into();
        let opened = self
            .cipher()
            .decrypt_inout_detached(&nonce, context, buffer, &tag);
        opened.is_ok().then_some(secret)
    }

    fn cipher(&self) -> Aes256Gcm {
        Aes256Gcm::new((&self.0).into())
    }
}

/// A key's worth of random bytes.
///
/// # Panics
/// If the system has no randomness to give: then nothing may be encrypted.
#[must_use]
pub fn random_key<const N: usize>() -> Zeroizing<[u8; N]>
where
    [u8; N]: Generate,
{
    Zeroizing::new(<[u8; N]>::generate())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(volume: u8, generation: u16) -> WrappedKey {
        WrappedKey {
            volume: VolumeId::from_bytes([volume; 16]),
            generation: KeyGeneration::new(generation).unwrap(),
            by: KeyName::new("acme-2026").unwrap(),
            bytes: vec![volume; 60],
        }
    }

    fn copy() -> KeysCopy {
        let mut keys = WrappedKeys {
            revision: 3,
            keys: Vec::new(),
        };
        for (volume, generation) in [(2, 1), (1, 2), (1, 1)] {
            keys.insert(key(volume, generation));
        }
        KeysCopy {
            volume: VolumeId::from_bytes([1; 16]),
            keys,
        }
    }

    #[test]
    fn keys_inserted_in_any_order_round_trip_in_theirs() {
        let copy = copy();
        let order: Vec<_> = copy.keys.keys.iter().map(|k| k.generation.get()).collect();
        assert_eq!(order, [1, 2, 1]);
        assert_eq!(copy.keys.newest(copy.volume), Some(&key(1, 2)));
        assert_eq!(
            KeysCopy::decode(&copy.encode(), copy.volume),
            Ok(copy.clone())
        );
        let other = VolumeId::from_bytes([9; 16]);
        assert!(matches!(
            KeysCopy::decode(&copy.encode(), other),
            Err(FormatError::Misplaced { .. })
        ));
    }

    #[test]
    fn keys_added_where_missing_take_the_place_of_none() {
        let mut keys = copy().keys;
        let other = WrappedKey {
            bytes: vec![9; 60],
            ..key(1, 2)
        };
        keys.add_missing(vec![other, key(1, 3), key(3, 1)]);
        let names = keys.keys.iter().map(|k| (k.volume, k.generation.get()));
        let volume = |byte| VolumeId::from_bytes([byte; 16]);
        let expected = [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)];
        assert!(names.eq(expected.map(|(of, generation)| (volume(of), generation))));
        assert_eq!(keys.keys[1], key(1, 2));
        keys.add_missing((1..=300).map(|n| key(9, n)).collect());
        assert_eq!(keys.keys.len(), KEYS_MAX);
        assert_eq!(keys.validate("keys"), Ok(()));
    }

    #[test]
    fn keys_any_flip_or_cut_is_an_error() {
        let (copy, bytes) = (copy(), copy().encode());
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(KeysCopy::decode(&bad, copy.volume).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(KeysCopy::decode(&bytes[..len], copy.volume).is_err());
        }
    }

    #[test]
    fn keys_that_break_a_rule_are_refused() {
        type Break = fn(&mut WrappedKeys);
        let cases: [(Break, &str); 5] = [
            (|keys| keys.keys.swap(0, 1), "ascending"),
            (|keys| keys.keys[1] = keys.keys[0].clone(), "ascending"),
            (|keys| keys.keys[0].bytes.clear(), "length"),
            (|keys| keys.keys[0].bytes = vec![0; 1025], "length"),
            (|keys| keys.revision = 0, "copy"),
        ];
        for (broken, word) in cases {
            let mut keys = copy().keys;
            broken(&mut keys);
            let error = keys.validate("keys").unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn wrapped_key_opens_with_its_key_and_context_alone() {
        let tenant = TenantName::new("acme").unwrap();
        let context = |tenant: &TenantName, volume, generation| {
            let generation = KeyGeneration::new(generation).unwrap();
            data_key_context(tenant, VolumeId::from_bytes([volume; 16]), generation)
        };
        let (right, wrapping) = (context(&tenant, 1, 1), WrappingKey::new([7; 32]));
        let wrapped = wrapping.wrap(&right, &[9; 32]);
        assert_eq!(wrapped.len(), 60);
        assert_ne!(wrapped, wrapping.wrap(&right, &[9; 32]));
        let opened = wrapping.unwrap(&right, &wrapped).unwrap();
        assert_eq!(opened[..], [9; 32]);

        assert!(WrappingKey::new([8; 32]).unwrap(&right, &wrapped).is_none());
        let other = TenantName::new("acm").unwrap();
        for wrong in [
            context(&other, 1, 1),
            context(&tenant, 2, 1),
            context(&tenant, 1, 2),
            cache_key_context(CacheId::from_bytes([1; 16])),
        ] {
            assert!(wrapping.unwrap(&wrong, &wrapped).is_none());
        }
        for len in 0..wrapped.len() {
            assert!(wrapping.unwrap(&right, &wrapped[..len]).is_none());
        }
        assert_eq!(format!("{wrapping:?}"), "WrappingKey(hidden)");
    }
}
