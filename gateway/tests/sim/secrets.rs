//! Keys of encrypted volumes. What wraps them wraps nothing: a wrapped key is the key, so that no service is
//! needed; who drops one cannot get it back all the same.

use std::sync::Arc;

use quarry_objfmt::{
    DataKey, DataKeys, Encryption, Head, KeyGeneration, KeyName, VolumeId, WrappedKey, WrappedKeys,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// A key of a volume, made of a seed. Of two of the same generation each is its own.
pub fn key(volume: VolumeId, generation: KeyGeneration, seed: u64) -> WrappedKey {
    let secret: [u8; 32] = SmallRng::seed_from_u64(seed).random();
    WrappedKey {
        volume,
        generation,
        by: KeyName::new("sim").unwrap(),
        bytes: secret.to_vec(),
    }
}

/// The first keys of a volume.
pub fn first(volume: VolumeId, seed: u64) -> WrappedKeys {
    quarry_gateway::keys::first(vec![key(volume, KeyGeneration::FIRST, seed)])
}

/// The data keys of the volume that `head` is of, if it is encrypted.
pub fn opened(head: &Head) -> Option<Arc<DataKeys>> {
    let mut all = DataKeys::default();
    for key in &head.keys.keys {
        let secret = key.bytes[..].try_into().unwrap();
        all.insert(key.volume, DataKey::of_generation(secret, key.generation));
    }
    (head.encryption != Encryption::None).then(|| Arc::new(all))
}
