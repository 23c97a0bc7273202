//! Compression and encryption of a frame's payload, each in memory and each bounded.
//!
//! Compression is a choice per volume and a fact per frame: a frame that does not shrink is kept
//! as it is. Decompression is given the exact raw length, allocates no more, and accepts no less.
//!
//! Encryption is AES-256-GCM. A [`DataKey`] never encrypts data itself: each chunk gets a key of
//! its own, `AES(key, "QYF" 1 epoch seq) || AES(key, "QYF" 2 epoch seq)` (one block each: 4 bytes
//! label and counter, 4 bytes epoch, 8 bytes seq). The nonce is 8 random bytes, drawn once for
//! each time a chunk is encoded, then the frame's index. So a nonce repeats under one key only if
//! the same chunk is encoded twice *and* draws the same 64 bits; and no count of frames ever
//! wears a data key out. The additional data are the frame's identity and its header.
//!
//! Keys are wiped when they are dropped, and shown to nobody.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use aes_gcm::aead::Generate;
use aes_gcm::aes::Aes256;
use aes_gcm::aes::cipher::BlockCipherEncrypt;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit, Nonce, Tag};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use crate::error::{FormatError, Result};
use crate::page_vec::PageVec;
use crate::types::{ChunkId, VolumeId};
use crate::wire::Reader;

/// The level of zstd: its own default, 3.
pub const ZSTD_LEVEL: i32 = 3;
/// Bytes of the nonce in front of an encrypted payload.
pub const NONCE_LEN: usize = 12;
/// Bytes of the tag behind an encrypted payload.
pub const TAG_LEN: usize = 16;

/// How a payload is compressed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    None,
    /// An LZ4 block without a length in front.
    #[default]
    Lz4,
    /// One zstd frame.
    Zstd,
}

impl Compression {
    /// Its number in the formats.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    /// The one with this number.
    ///
    /// # Errors
    /// If there is none.
    pub fn from_code(code: u8, what: &'static str) -> Result<Self> {
        match code {
            0 => Ok(Self::None),
            1 => Ok(Self::Lz4),
            2 => Ok(Self::Zstd),
            _ => Err(FormatError::Unknown {
                what,
                field: "compression",
                found: code.into(),
            }),
        }
    }

    /// Compresses `raw`; falls back to [`Compression::None`] when that is not smaller.
    #[must_use]
    pub fn compress(self, raw: &[u8]) -> (Self, Cow<'_, [u8]>) {
        let mut out = Vec::new();
        match Compressor::new(self).compress_into(raw, &mut out) {
            Self::None => (Self::None, Cow::Borrowed(raw)),
            codec => (codec, Cow::Owned(out)),
        }
    }

    /// The `raw_len` bytes that `stored` was made of, from a page's beginning, allocating a page more than they are. Check
    /// `raw_len` against a limit first.
    ///
    /// # Errors
    /// If `stored` is no such stream, or gives any other length.
    pub fn decompress(self, stored: &[u8], raw_len: usize, what: &'static str) -> Result<Bytes> {
        let mut raw = PageVec::new(raw_len, 0);
        raw.append_zeroes(raw_len);
        let made = match self {
            Self::None if stored.len() == raw_len => {
                raw.filled_mut().copy_from_slice(stored);
                Some(raw_len)
            }
            Self::None => None,
            Self::Lz4 => lz4_flex::block::decompress_into(stored, raw.filled_mut()).ok(),
            Self::Zstd => zstd::bulk::decompress_to_buffer(stored, raw.filled_mut()).ok(),
        };
        match made {
            Some(made) if made == raw_len => Ok(raw.into()),
            _ => Err(FormatError::Decompress { what }),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// A word that names no compression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown compression {found:?}; use one of none, lz4, zstd")]
pub struct UnknownCompression {
    /// The word.
    pub found: String,
}

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(text: &str) -> Result<Self, UnknownCompression> {
        match text {
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            _ => Err(UnknownCompression {
                found: text.to_owned(),
            }),
        }
    }
}

/// Compresses many payloads with one context.
pub struct Compressor {
    codec: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Compressor {
    /// A compressor of this kind.
    #[must_use]
    pub fn new(codec: Compression) -> Self {
        let zstd = match codec {
            Compression::Zstd => zstd::bulk::Compressor::new(ZSTD_LEVEL).ok(),
            Compression::None | Compression::Lz4 => None,
        };
        Self { codec, zstd }
    }

    /// Appends to `out` what the answer names: `raw` compressed, or nothing and
    /// [`Compression::None`] when that is not smaller.
    pub fn compress_into(&mut self, raw: &[u8], out: &mut Vec<u8>) -> Compression {
        let start = out.len();
        let len = match self.codec {
            Compression::None => None,
            Compression::Lz4 => {
                out.resize(
                    start + lz4_flex::block::get_maximum_output_size(raw.len()),
                    0,
                );
                lz4_flex::block::compress_into(raw, &mut out[start..]).ok()
            }
            Compression::Zstd => {
                // No room for a result that is not smaller: zstd gives up by itself.
                out.resize(start + raw.len().saturating_sub(1), 0);
                let zstd = self.zstd.as_mut();
                zstd.and_then(|zstd| zstd.compress_to_buffer(raw, &mut out[start..]).ok())
            }
        };
        match len.filter(|&len| len < raw.len()) {
            Some(len) => {
                out.truncate(start + len);
                self.codec
            }
            None => {
                out.truncate(start);
                Compression::None
            }
        }
    }
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Compressor({})", self.codec)
    }
}

/// How a volume's frames are encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub enum Encryption {
    /// Not at all.
    #[default]
    #[serde(rename = "none")]
    None,
    /// AES-256-GCM with a key per volume.
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
}

impl Encryption {
    /// Its number in the formats.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Aes256Gcm => 1,
        }
    }

    /// The one with this number.
    ///
    /// # Errors
    /// If there is none.
    pub fn from_code(code: u8, what: &'static str) -> Result<Self> {
        match code {
            0 => Ok(Self::None),
            1 => Ok(Self::Aes256Gcm),
            _ => Err(FormatError::Unknown {
                what,
                field: "encryption",
                found: code.into(),
            }),
        }
    }
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Aes256Gcm => "aes-256-gcm",
        })
    }
}

/// Which of a volume's data keys: each rotation makes the next one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeyGeneration(u16);

impl KeyGeneration {
    /// That of a volume's first key.
    pub const FIRST: Self = Self(1);

    /// The generation of this number; none has 0.
    #[must_use]
    pub const fn new(number: u16) -> Option<Self> {
        match number {
            0 => None,
            number => Some(Self(number)),
        }
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Reads that of a later key than the first, where only such are written.
    pub(crate) fn read_later(reader: &mut Reader<'_>) -> Result<Self> {
        let what = reader.what();
        let number = reader.varint()?;
        let generation = u16::try_from(number).ok().and_then(Self::new);
        generation
            .filter(|later| *later > Self::FIRST)
            .ok_or(FormatError::invalid(
                what,
                "it names a key that its version does not need",
            ))
    }

    /// The one after it; none after the last that there can be.
    #[must_use]
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

impl fmt::Display for KeyGeneration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The key of a volume's data. Never shown.
#[derive(Clone)]
pub struct DataKey {
    bytes: [u8; 32],
    generation: KeyGeneration,
}

impl Drop for DataKey {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl DataKey {
    /// A volume's first key, from its 32 bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self::of_generation(bytes, KeyGeneration::FIRST)
    }

    /// A later one.
    #[must_use]
    pub const fn of_generation(bytes: [u8; 32], generation: KeyGeneration) -> Self {
        Self { bytes, generation }
    }

    /// Which of its volume's it is.
    #[must_use]
    pub const fn generation(&self) -> KeyGeneration {
        self.generation
    }

    /// The cipher for the frames of one chunk, with a nonce prefix drawn from the system.
    ///
    /// # Panics
    /// If the system has no randomness to give: then nothing may be encrypted.
    pub(crate) fn sealer(&self, chunk: ChunkId) -> Sealer {
        Sealer {
            cipher: self.chunk_cipher(chunk),
            generation: self.generation,
            prefix: <[u8; 8]>::generate(),
        }
    }

    /// As [`DataKey::sealer`], with a given nonce prefix: for tests and golden vectors.
    #[cfg(test)]
    pub(crate) fn sealer_with(&self, chunk: ChunkId, prefix: [u8; 8]) -> Sealer {
        Sealer {
            cipher: self.chunk_cipher(chunk),
            generation: self.generation,
            prefix,
        }
    }

    /// Undoes [`Sealer::seal`]: `stored` is nonce, ciphertext and tag.
    pub(crate) fn open(
        &self,
        chunk: ChunkId,
        aad: &[u8],
        stored: &[u8],
        what: &'static str,
    ) -> Result<Vec<u8>> {
        let need = NONCE_LEN + TAG_LEN;
        let Some(text_len) = stored.len().checked_sub(need) else {
            let (need, have) = (need as u64, stored.len() as u64);
            return Err(FormatError::Truncated { what, need, have });
        };
        let (nonce, rest) = stored.split_at(NONCE_LEN);
        let (text, tag) = rest.split_at(text_len);
        let refused = FormatError::Decrypt { what };
        let Ok(nonce) = Nonce::try_from(nonce) else {
            return Err(refused);
        };
        let Ok(tag) = Tag::try_from(tag) else {
            return Err(refused);
        };
        let mut text = text.to_vec();
        let buffer = text.as_mut_slice().into();
        match self
            .chunk_cipher(chunk)
            .decrypt_inout_detached(&nonce, aad, buffer, &tag)
        {
            Ok(()) => Ok(text),
            Err(_) => Err(refused),
        }
    }

    fn chunk_cipher(&self, chunk: ChunkId) -> Aes256Gcm {
        let root = Aes256::new(&self.bytes.into());
        let mut key = Zeroizing::new([0; 32]);
        for (counter, half) in (1u8..).zip(key.chunks_exact_mut(16)) {
            let mut block = [0; 16];
            block[..4].copy_from_slice(&[b'Q', b'Y', b'F', counter]);
            block[4..8].copy_from_slice(&chunk.epoch.get().to_le_bytes());
            block[8..].copy_from_slice(&chunk.seq.get().to_le_bytes());
            let mut block = block.into();
            root.encrypt_block(&mut block);
            half.copy_from_slice(&block);
        }
        Aes256Gcm::new((&*key).into())
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(hidden)")
    }
}

/// The data keys of a volume, and of those whose chunks its map may name.
#[derive(Clone, Default, Debug)]
pub struct DataKeys(BTreeMap<(VolumeId, KeyGeneration), DataKey>);

impl DataKeys {
    /// One volume's first key alone.
    #[must_use]
    pub fn one(volume: VolumeId, key: DataKey) -> Self {
        let mut keys = Self::default();
        keys.insert(volume, key);
        keys
    }

    /// Adds a key of `volume`.
    pub fn insert(&mut self, volume: VolumeId, key: DataKey) {
        self.0.insert((volume, key.generation), key);
    }

    /// Adds all of these.
    pub fn extend(&mut self, others: &Self) {
        let others = others.0.iter();
        self.0
            .extend(others.map(|(name, key)| (*name, key.clone())));
    }

    /// Keeps those of which `keep` says so, by volume and generation.
    pub fn retain(&mut self, keep: impl Fn(VolumeId, KeyGeneration) -> bool) {
        self.0
            .retain(|(volume, generation), _| keep(*volume, *generation));
    }

    /// That key of `volume`.
    #[must_use]
    pub fn get(&self, volume: VolumeId, generation: KeyGeneration) -> Option<&DataKey> {
        self.0.get(&(volume, generation))
    }

    /// The newest key of `volume`: what is written is written with it.
    #[must_use]
    pub fn newest(&self, volume: VolumeId) -> Option<&DataKey> {
        let all = (volume, KeyGeneration::FIRST)..=(volume, KeyGeneration(u16::MAX));
        self.0.range(all).next_back().map(|(_, key)| key)
    }
}

/// Encrypts the frames of one encoding of one chunk.
pub(crate) struct Sealer {
    cipher: Aes256Gcm,
    /// Of its key.
    pub generation: KeyGeneration,
    prefix: [u8; 8],
}

impl Sealer {
    /// The nonce of the frame with this index.
    pub fn nonce(&self, index: u32) -> [u8; NONCE_LEN] {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&self.prefix);
        nonce[8..].copy_from_slice(&index.to_le_bytes());
        nonce
    }

    /// Encrypts `text` in place and answers the tag.
    pub fn seal(&self, index: u32, aad: &[u8], text: &mut [u8]) -> [u8; TAG_LEN] {
        let tag = self
            .cipher
            .encrypt_inout_detached(&self.nonce(index).into(), aad, text.into());
        tag.expect("a frame is far below the 64 GiB that GCM takes")
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ChunkSeq, Epoch, VolumeId};
    use proptest::prelude::*;

    const ALL: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd];

    fn chunk(seq: u64) -> ChunkId {
        let volume = VolumeId::from_bytes([7; 16]);
        ChunkId {
            volume,
            epoch: Epoch::new(3),
            seq: ChunkSeq::new(seq),
        }
    }

    proptest! {
        #[test]
        fn compression_any_bytes_round_trip_and_never_grow(
            raw in prop::collection::vec(0u8..4, 0..5000),
        ) {
            for codec in ALL {
                let (used, stored) = codec.compress(&raw);
                prop_assert!(stored.len() <= raw.len());
                let back = used.decompress(&stored, raw.len(), "test");
                prop_assert_eq!(back.as_deref(), Ok(&raw[..]));
                if raw.len() > 1 {
                    prop_assert!(used.decompress(&stored, raw.len() - 1, "test").is_err());
                }
                prop_assert!(used.decompress(&stored, raw.len() + 1, "test").is_err());
            }
        }

        #[test]
        fn decompression_any_bytes_never_panic(stored: Vec<u8>, raw_len in 0usize..70_000) {
            for codec in ALL {
                if let Ok(raw) = codec.decompress(&stored, raw_len, "test") {
                    prop_assert_eq!(raw.len(), raw_len);
                }
            }
        }
    }

    #[test]
    fn compression_noise_is_kept_as_it_is() {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed.to_le_bytes()[7]
        };
        let noise: Vec<u8> = (0..4096).map(|_| next()).collect();
        assert_eq!(Compression::Zstd.compress(&noise).0, Compression::None);
        assert_eq!(Compression::Lz4.compress(&noise).0, Compression::None);
        assert_eq!(Compression::Lz4.compress(&[0; 4096]).0, Compression::Lz4);
        assert_eq!(Compression::Zstd.compress(&[0; 4096]).0, Compression::Zstd);
    }

    #[test]
    fn compression_names_round_trip() {
        for codec in ALL {
            assert_eq!(codec.to_string().parse(), Ok(codec));
            assert_eq!(
                serde_json::to_string(&codec).unwrap(),
                format!("\"{codec}\"")
            );
            assert_eq!(Compression::from_code(codec.code(), "test"), Ok(codec));
        }
        assert!(
            "gzip"
                .parse::<Compression>()
                .unwrap_err()
                .to_string()
                .contains("lz4")
        );
    }

    #[test]
    fn key_debug_shows_nothing_of_it() {
        assert_eq!(format!("{:?}", DataKey::new([42; 32])), "DataKey(hidden)");
    }

    #[test]
    fn sealed_text_opens_only_with_the_same_key_chunk_and_aad() {
        let key = DataKey::new([1; 32]);
        let sealer = key.sealer(chunk(5));
        let mut text = b"some data".to_vec();
        let tag = sealer.seal(9, b"aad", &mut text);
        assert_ne!(text, b"some data");
        let stored = [&sealer.nonce(9)[..], &text, &tag].concat();

        assert_eq!(
            key.open(chunk(5), b"aad", &stored, "test"),
            Ok(b"some data".to_vec())
        );
        let refused = Err(FormatError::Decrypt { what: "test" });
        assert_eq!(key.open(chunk(5), b"other", &stored, "test"), refused);
        assert_eq!(key.open(chunk(6), b"aad", &stored, "test"), refused);
        assert_eq!(
            DataKey::new([2; 32]).open(chunk(5), b"aad", &stored, "test"),
            refused
        );
        for bit in 0..stored.len() * 8 {
            let mut bad = stored.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                key.open(chunk(5), b"aad", &bad, "test"),
                refused,
                "bit {bit}"
            );
        }
        assert!(key.open(chunk(5), b"aad", &stored[..27], "test").is_err());
    }

    #[test]
    fn sealers_of_one_chunk_draw_different_nonces() {
        let key = DataKey::new([1; 32]);
        assert_ne!(key.sealer(chunk(5)).nonce(0), key.sealer(chunk(5)).nonce(0));
        assert_ne!(key.sealer(chunk(5)).nonce(0), key.sealer(chunk(5)).nonce(1));
    }

    #[test]
    fn sealer_given_prefix_is_deterministic() {
        let key = DataKey::new([1; 32]);
        let (mut a, mut b) = (*b"text", *b"text");
        let tag_a = key.sealer_with(chunk(1), [8; 8]).seal(0, b"", &mut a);
        let tag_b = key.sealer_with(chunk(1), [8; 8]).seal(0, b"", &mut b);
        assert_eq!((a, tag_a), (b, tag_b));
    }
}
