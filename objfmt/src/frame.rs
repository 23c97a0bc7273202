//! Frames: the unit that a read fetches, checks, decrypts and decompresses.
//!
//! Byte table in `FORMAT.md`. The identity (volume, epoch, seq, index) is not stored: it goes into
//! the checksum and, encrypted, into the additional data. Invariant: no byte of a frame is handed out that is
//! not of exactly the frame asked for.

use bytes::Bytes;

use crate::codec::{
    Compression, Compressor, DataKeys, Encryption, KeyGeneration, NONCE_LEN, Sealer, TAG_LEN,
};
use crate::error::{FormatError, Result, check_up_to};
use crate::types::{ChunkId, SECTOR_SIZE};
use crate::wire::Reader;

/// Bytes in front of a frame's payload.
pub const FRAME_HEADER_LEN: usize = 16;
/// The most bytes that a frame is longer than its raw content.
pub const FRAME_OVERHEAD_MAX: usize = FRAME_HEADER_LEN + NONCE_LEN + TAG_LEN;
/// Sectors in the largest frame: 1 MiB.
pub const FRAME_SECTORS_MAX: u32 = 2048;

const MAGIC: [u8; 2] = *b"QF";
const VERSION: u8 = 1;
/// Of a frame that is encrypted with a later key than its volume's first.
const VERSION_KEYED: u8 = 2;
const WHAT: &str = "frame";
/// Volume, epoch, seq and frame index.
const IDENTITY_LEN: usize = 16 + 4 + 8 + 4;
/// The part of the header that the additional data hold: all that is known before the payload.
const AAD_HEADER_LEN: usize = 8;

/// Most bytes that a frame takes in an object.
pub(crate) const FRAME_STORED_MAX: usize =
    (FRAME_SECTORS_MAX * SECTOR_SIZE) as usize + FRAME_OVERHEAD_MAX;

const _: () = assert!(FRAME_HEADER_LEN == 2 + 1 + 1 + 4 + 4 + 4);
const _: () = assert!(FRAME_OVERHEAD_MAX <= 32 + TAG_LEN);

/// Whether frames may hold this many sectors: a power of two up to [`FRAME_SECTORS_MAX`].
#[must_use]
pub const fn frame_sectors_valid(sectors: u32) -> bool {
    sectors.is_power_of_two() && sectors <= FRAME_SECTORS_MAX
}

fn identity(chunk: ChunkId, index: u32) -> [u8; IDENTITY_LEN] {
    let mut out = [0; IDENTITY_LEN];
    out[..16].copy_from_slice(&chunk.volume.to_bytes());
    out[16..20].copy_from_slice(&chunk.epoch.get().to_le_bytes());
    out[20..28].copy_from_slice(&chunk.seq.get().to_le_bytes());
    out[28..].copy_from_slice(&index.to_le_bytes());
    out
}

fn checksum(identity: &[u8; IDENTITY_LEN], header: &[u8], payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c(identity);
    crc32c::crc32c_append(crc32c::crc32c_append(crc, header), payload)
}

fn additional_data(
    identity: &[u8; IDENTITY_LEN],
    header: &[u8],
) -> [u8; IDENTITY_LEN + AAD_HEADER_LEN] {
    let mut out = [0; IDENTITY_LEN + AAD_HEADER_LEN];
    out[..IDENTITY_LEN].copy_from_slice(identity);
    out[IDENTITY_LEN..].copy_from_slice(&header[..AAD_HEADER_LEN]);
    out
}

/// Appends the frame number `index` of `chunk`, holding `raw`, and answers its stored length.
///
/// # Panics
/// If `raw` is empty, longer than [`FRAME_SECTORS_MAX`], or not whole sectors.
pub(crate) fn encode_frame(
    out: &mut Vec<u8>,
    chunk: ChunkId,
    index: u32,
    raw: &[u8],
    compressor: &mut Compressor,
    sealer: Option<&Sealer>,
) -> u32 {
    assert!(raw.len().is_multiple_of(SECTOR_SIZE as usize) && !raw.is_empty());
    let raw_sectors = u32::try_from(raw.len() / SECTOR_SIZE as usize).expect("a frame is small");
    assert!(raw_sectors <= FRAME_SECTORS_MAX);

    let start = out.len();
    let payload_at = start + FRAME_HEADER_LEN;
    out.resize(payload_at, 0);
    if let Some(sealer) = sealer {
        out.extend_from_slice(&sealer.nonce(index));
    }
    let text_at = out.len();
    let compression = compressor.compress_into(raw, out);
    if compression == Compression::None {
        out.extend_from_slice(raw);
    }
    let encryption = if sealer.is_some() {
        Encryption::Aes256Gcm
    } else {
        Encryption::None
    };

    let identity = identity(chunk, index);
    let mut header = [0; 12];
    header[..2].copy_from_slice(&MAGIC);
    header[2] = VERSION;
    header[3] = compression.code() | encryption.code() << 4;
    header[4..8].copy_from_slice(&raw_sectors.to_le_bytes());
    if let Some(sealer) = sealer
        && sealer.generation != KeyGeneration::FIRST
    {
        header[2] = VERSION_KEYED;
        header[6..8].copy_from_slice(&sealer.generation.get().to_le_bytes());
    }
    if let Some(sealer) = sealer {
        let aad = additional_data(&identity, &header);
        let tag = sealer.seal(index, &aad, &mut out[text_at..]);
        out.extend_from_slice(&tag);
    }
    let payload_len = u32::try_from(out.len() - payload_at).expect("a frame is small");
    header[8..12].copy_from_slice(&payload_len.to_le_bytes());
    let crc = checksum(&identity, &header, &out[payload_at..]);
    out[start..start + 12].copy_from_slice(&header);
    out[start + 12..payload_at].copy_from_slice(&crc.to_le_bytes());
    u32::try_from(out.len() - start).expect("a frame is small")
}

/// The raw content of the frame number `index` of `chunk`, of which `stored` are all the bytes.
///
/// `raw_len_sectors_max` is the volume's frame length; no more than that is ever allocated. With
/// keys, a frame that is not encrypted is refused: a store must not be able to choose.
///
/// # Errors
/// If `stored` is not exactly that frame, whole and unchanged.
pub fn decode_frame(
    stored: &[u8],
    chunk: ChunkId,
    index: u32,
    raw_len_sectors_max: u32,
    keys: Option<&DataKeys>,
) -> Result<Bytes> {
    Ok(
        match decode(stored, chunk, index, raw_len_sectors_max, keys)? {
            Content::AsStored(raw) => Bytes::copy_from_slice(raw),
            Content::Made(raw) => raw,
        },
    )
}

/// As [`decode_frame`]; but content that is stored as it is is a part of `stored`, and no copy of it. What is made anew
/// begins a page.
///
/// # Errors
/// Those of [`decode_frame`].
pub fn open_frame(
    stored: &Bytes,
    chunk: ChunkId,
    index: u32,
    raw_len_sectors_max: u32,
    keys: Option<&DataKeys>,
) -> Result<Bytes> {
    Ok(
        match decode(stored, chunk, index, raw_len_sectors_max, keys)? {
            Content::AsStored(raw) => stored.slice_ref(raw),
            Content::Made(raw) => raw,
        },
    )
}

/// Where a frame's raw content is.
enum Content<'a> {
    /// In the frame.
    AsStored(&'a [u8]),
    Made(Bytes),
}

fn decode<'a>(
    stored: &'a [u8],
    chunk: ChunkId,
    index: u32,
    raw_len_sectors_max: u32,
    keys: Option<&DataKeys>,
) -> Result<Content<'a>> {
    let mut reader = Reader::new(stored, WHAT);
    let header = reader.array::<12>()?;
    let crc = reader.u32()?;
    let mut fields = Reader::new(&header, WHAT);
    if fields.array()? != MAGIC {
        return Err(FormatError::Magic {
            what: WHAT,
            found: [header[0], header[1], header[2], header[3]],
        });
    }
    let version = fields.u8()?;
    let codecs = fields.u8()?;
    let raw_sectors = fields.u32()?;
    let payload_len = fields.u32()? as usize;
    if payload_len < reader.remaining() {
        let extra = (reader.remaining() - payload_len) as u64;
        return Err(FormatError::Trailing { what: WHAT, extra });
    }
    let payload = reader.bytes(payload_len)?;
    let identity = identity(chunk, index);
    if crc != checksum(&identity, &header, payload) {
        return Err(FormatError::Checksum { what: WHAT });
    }
    if !matches!(version, VERSION | VERSION_KEYED) {
        let (found, supported) = (version.into(), VERSION_KEYED.into());
        return Err(FormatError::Version {
            what: WHAT,
            found,
            supported,
        });
    }

    let (raw_sectors, generation) = match version {
        VERSION_KEYED => keyed(raw_sectors, codecs)?,
        _ => (raw_sectors, KeyGeneration::FIRST),
    };
    let limit = raw_len_sectors_max.min(FRAME_SECTORS_MAX);
    check_up_to(WHAT, "raw length", raw_sectors.into(), limit.into())?;
    if raw_sectors == 0 {
        return Err(FormatError::invalid(WHAT, "the raw length is 0"));
    }
    let raw_len = raw_sectors as usize * SECTOR_SIZE as usize;
    let compression = Compression::from_code(codecs & 0xf, WHAT)?;
    Ok(match (Encryption::from_code(codecs >> 4, WHAT)?, keys) {
        (Encryption::None, None) => match compression {
            Compression::None if payload.len() == raw_len => Content::AsStored(payload),
            codec => Content::Made(codec.decompress(payload, raw_len, WHAT)?),
        },
        (Encryption::None, Some(_)) => {
            return Err(FormatError::invalid(
                WHAT,
                "it is not encrypted, and its volume is",
            ));
        }
        (Encryption::Aes256Gcm, None) => return Err(FormatError::KeyMissing { what: WHAT }),
        (Encryption::Aes256Gcm, Some(keys)) => {
            let key = keys
                .get(chunk.volume, generation)
                .ok_or(FormatError::KeyUnknown {
                    what: WHAT,
                    generation: generation.get(),
                })?;
            let text = key.open(chunk, &additional_data(&identity, &header), payload, WHAT)?;
            Content::Made(match compression {
                Compression::None if text.len() == raw_len => text.into(),
                codec => codec.decompress(&text, raw_len, WHAT)?,
            })
        }
    })
}

/// The raw length and the key's generation, of the field that version 2 shares between them.
fn keyed(field: u32, codecs: u8) -> Result<(u32, KeyGeneration)> {
    let [raw @ .., low, high] = field.to_le_bytes();
    let generation = KeyGeneration::new(u16::from_le_bytes([low, high]));
    match generation.filter(|generation| *generation > KeyGeneration::FIRST) {
        Some(generation) if codecs >> 4 != Encryption::None.code() => {
            Ok((u16::from_le_bytes(raw).into(), generation))
        }
        _ => Err(FormatError::invalid(
            WHAT,
            "it names a key that its version does not need",
        )),
    }
}

/// Whether the frame that begins with these bytes is encrypted, as far as its header tells; nothing of it is checked.
#[must_use]
pub fn is_encrypted(frame: &[u8]) -> bool {
    frame.get(3).is_some_and(|codecs| codecs >> 4 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::DataKey;
    use crate::types::{ChunkSeq, Epoch, VolumeId};
    use proptest::prelude::*;

    fn chunk() -> ChunkId {
        let volume = VolumeId::from_bytes([9; 16]);
        ChunkId {
            volume,
            epoch: Epoch::new(2),
            seq: ChunkSeq::new(77),
        }
    }

    fn frame(raw: &[u8], compression: Compression, key: Option<&DataKey>) -> Vec<u8> {
        let mut out = Vec::new();
        let sealer = key.map(|key| key.sealer(chunk()));
        let len = encode_frame(
            &mut out,
            chunk(),
            4,
            raw,
            &mut Compressor::new(compression),
            sealer.as_ref(),
        );
        assert_eq!(len as usize, out.len());
        assert!(out.len() <= raw.len() + FRAME_OVERHEAD_MAX);
        out
    }

    fn keys(key: &DataKey) -> DataKeys {
        DataKeys::one(chunk().volume, key.clone())
    }

    fn any_compression() -> impl Strategy<Value = Compression> {
        prop_oneof![
            Just(Compression::None),
            Just(Compression::Lz4),
            Just(Compression::Zstd)
        ]
    }

    proptest! {
        #[test]
        fn frame_any_content_round_trips(
            sectors in 1usize..16,
            fill in prop::collection::vec(any::<u8>(), 1..600),
            compression in any_compression(),
            generation: u16,
        ) {
            let raw: Vec<u8> = fill.iter().copied().cycle().take(sectors * 512).collect();
            let key = KeyGeneration::new(generation).map(|g| DataKey::of_generation([3; 32], g));
            let stored = frame(&raw, compression, key.as_ref());
            let back = decode_frame(&stored, chunk(), 4, 16, key.as_ref().map(keys).as_ref());
            prop_assert_eq!(back, Ok(raw.into()));
        }

        #[test]
        fn frame_any_flip_or_cut_is_an_error(
            compression in any_compression(),
            generation in 0u16..3,
            at: prop::sample::Index,
            bit in 0u8..8,
        ) {
            let key = KeyGeneration::new(generation).map(|g| DataKey::of_generation([3; 32], g));
            let stored = frame(&[5; 1024], compression, key.as_ref());
            let key = key.as_ref().map(keys);
            let at = at.index(stored.len());
            let mut bad = stored.clone();
            bad[at] ^= 1 << bit;
            prop_assert!(decode_frame(&bad, chunk(), 4, 16, key.as_ref()).is_err());
            prop_assert!(decode_frame(&stored[..at], chunk(), 4, 16, key.as_ref()).is_err());
            bad.clone_from(&stored);
            bad.push(0);
            prop_assert!(decode_frame(&bad, chunk(), 4, 16, key.as_ref()).is_err());
        }

        #[test]
        fn frame_any_header_and_payload_with_a_right_checksum_never_panic(
            version in 0u8..4,
            codecs: u8,
            raw_sectors in 0u32..4096,
            generation in 0u32..3,
            payload: Vec<u8>,
            keyed: bool,
        ) {
            let mut header = [b'Q', b'F', version, codecs, 0, 0, 0, 0, 0, 0, 0, 0];
            header[4..8].copy_from_slice(&(raw_sectors | generation << 16).to_le_bytes());
            header[8..].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
            let crc = checksum(&identity(chunk(), 0), &header, &payload).to_le_bytes();
            let stored = [&header[..], &crc, &payload].concat();
            let key = keyed.then(|| keys(&DataKey::new([3; 32])));
            if let Ok(raw) = decode_frame(&stored, chunk(), 0, 128, key.as_ref()) {
                prop_assert_eq!(raw.len(), raw_sectors as usize * 512);
            }
        }
    }

    #[test]
    fn frame_of_another_place_is_refused() {
        let stored = frame(&[1; 512], Compression::Lz4, None);
        let damaged = Err(FormatError::Checksum { what: "frame" });
        assert_eq!(decode_frame(&stored, chunk(), 5, 16, None), damaged);
        let other = ChunkId {
            seq: ChunkSeq::new(78),
            ..chunk()
        };
        assert_eq!(decode_frame(&stored, other, 4, 16, None), damaged);
        let other = ChunkId {
            epoch: Epoch::new(3),
            ..chunk()
        };
        assert_eq!(decode_frame(&stored, other, 4, 16, None), damaged);
        let other = ChunkId {
            volume: VolumeId::from_bytes([8; 16]),
            ..chunk()
        };
        assert_eq!(decode_frame(&stored, other, 4, 16, None), damaged);
    }

    #[test]
    fn frame_longer_than_the_volume_allows_is_refused_before_it_is_allocated() {
        let stored = frame(&[0; 17 * 512], Compression::Zstd, None);
        let refused = decode_frame(&stored, chunk(), 4, 16, None);
        assert!(matches!(
            refused,
            Err(FormatError::TooLarge {
                value: 17,
                limit: 16,
                ..
            })
        ));
    }

    #[test]
    fn frame_encrypted_needs_its_key_and_a_plain_one_is_refused_with_a_key() {
        let key = DataKey::new([1; 32]);
        let sealed = frame(&[0; 512], Compression::Lz4, Some(&key));
        let missing = decode_frame(&sealed, chunk(), 4, 16, None);
        assert_eq!(missing, Err(FormatError::KeyMissing { what: "frame" }));
        let of = |key: &DataKey| decode_frame(&sealed, chunk(), 4, 16, Some(&keys(key)));
        let wrong = of(&DataKey::new([2; 32]));
        assert_eq!(wrong, Err(FormatError::Decrypt { what: "frame" }));
        let plain = frame(&[0; 512], Compression::Lz4, None);
        let downgraded = decode_frame(&plain, chunk(), 4, 16, Some(&keys(&key)));
        assert!(matches!(downgraded, Err(FormatError::Invalid { .. })));
    }

    #[test]
    fn frame_of_a_later_key_is_read_with_that_key_alone() {
        let second = KeyGeneration::FIRST.next().unwrap();
        let (old, new) = (
            DataKey::new([1; 32]),
            DataKey::of_generation([2; 32], second),
        );
        let mut both = keys(&old);
        both.insert(chunk().volume, new.clone());
        assert_eq!(both.newest(chunk().volume).unwrap().generation(), second);
        for key in [&old, &new] {
            let stored = frame(&[7; 512], Compression::None, Some(key));
            let read = |keys: &DataKeys| decode_frame(&stored, chunk(), 4, 16, Some(keys));
            assert_eq!(read(&both), Ok(vec![7; 512].into()));
            assert_eq!(read(&keys(key)), Ok(vec![7; 512].into()));
            let other = if std::ptr::eq(key, &old) { &new } else { &old };
            let unknown = Err(FormatError::KeyUnknown {
                what: "frame",
                generation: key.generation().get(),
            });
            assert_eq!(read(&keys(other)), unknown);
        }
    }

    #[test]
    fn frame_of_another_volume_with_the_same_key_is_refused() {
        let (key, other) = (DataKey::new([1; 32]), VolumeId::from_bytes([8; 16]));
        let stored = frame(&[1; 512], Compression::None, Some(&key));
        // Its checksum made right for the place that it was moved to, as whoever moves it would.
        let moved_to = ChunkId {
            volume: other,
            ..chunk()
        };
        let mut moved = stored.clone();
        let crc = checksum(&identity(moved_to, 4), &stored[..12], &stored[16..]);
        moved[12..16].copy_from_slice(&crc.to_le_bytes());
        let keys = DataKeys::one(other, key);
        let refused = decode_frame(&moved, moved_to, 4, 16, Some(&keys));
        assert_eq!(refused, Err(FormatError::Decrypt { what: "frame" }));
    }
}
