//! Encryption of the data on a cache device: AES-256-XTS, each sector on its own.
//!
//! Owns: how a sector is encrypted. Does not own: the key, which is wrapped in the superblock. What is not data
//! (superblock, segment headers, record pages) is not encrypted: it says which sectors are where, not what is in them.

use std::array::from_fn;
use std::fmt;

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit as _};
use aes::{Aes256, Block};

/// Bytes of a sector.
const SECTOR: usize = 512;

/// Bytes of a cipher block.
const BLOCK: usize = 16;

/// Blocks of a sector: encrypted side by side, several times as quick as one after the other.
const BLOCKS: usize = SECTOR / BLOCK;

/// Bytes of the key: half of them for data, half for tweaks.
pub const CIPHER_KEY_LEN: usize = 64;

/// Encrypts and decrypts sectors of a device by their place on it.
pub struct SectorCipher {
    data: Aes256,
    tweaks: Aes256,
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SectorCipher(hidden)")
    }
}

impl SectorCipher {
    /// With this key. The schedules made of it are wiped when it is dropped.
    #[must_use]
    pub fn new(key: &[u8; CIPHER_KEY_LEN]) -> Self {
        let (data, tweaks) = key.split_at(CIPHER_KEY_LEN / 2);
        let half = |half| Aes256::new_from_slice(half).expect("half of 64 bytes");
        Self {
            data: half(data),
            tweaks: half(tweaks),
        }
    }

    /// Encrypts in place what is to lie at `offset` bytes of the device.
    ///
    /// # Panics
    /// If it is not whole sectors.
    pub fn encrypt(&self, offset: u64, data: &mut [u8]) {
        self.each_sector(offset, data, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// Decrypts in place what lay at `offset` bytes of the device.
    ///
    /// # Panics
    /// If it is not whole sectors.
    pub fn decrypt(&self, offset: u64, data: &mut [u8]) {
        self.each_sector(offset, data, |blocks| self.data.decrypt_blocks(blocks));
    }

    fn each_sector(&self, offset: u64, data: &mut [u8], turn: impl Fn(&mut [Block])) {
        let first = first_sector(offset, data);
        for (sector, data) in (first..).zip(data.chunks_exact_mut(SECTOR)) {
            let tweaks = self.tweaks_of(sector);
            let mut blocks: [Block; BLOCKS] = from_fn(|n| {
                let mut block = Block::default();
                block.copy_from_slice(&data[n * BLOCK..][..BLOCK]);
                tweaked(block, tweaks[n])
            });
            turn(&mut blocks);
            for ((out, block), tweak) in data.chunks_exact_mut(BLOCK).zip(blocks).zip(tweaks) {
                out.copy_from_slice(&tweaked(block, tweak));
            }
        }
    }

    /// One for each block: the encrypted number of the sector, times x from block to block.
    fn tweaks_of(&self, sector: u64) -> [u128; BLOCKS] {
        let mut first = Block::from(u128::from(sector).to_le_bytes());
        self.tweaks.encrypt_block(&mut first);
        let mut next = u128::from_le_bytes(first.into());
        from_fn(|_| {
            let tweak = next;
            let carry = next >> 127;
            next = (next << 1) ^ (carry * 0x87);
            tweak
        })
    }
}

fn tweaked(block: Block, tweak: u128) -> Block {
    Block::from((u128::from_le_bytes(block.into()) ^ tweak).to_le_bytes())
}

fn first_sector(offset: u64, data: &[u8]) -> u64 {
    let sector = SECTOR as u64;
    assert!(
        offset.is_multiple_of(sector) && data.len().is_multiple_of(SECTOR),
        "data on a cache device are whole sectors"
    );
    offset / sector
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cipher() -> SectorCipher {
        let key: Vec<u8> = (0..64).collect();
        SectorCipher::new(&key.try_into().unwrap())
    }

    #[test]
    fn sectors_read_back_from_their_own_place_alone_in_any_pieces() {
        let plain: Vec<u8> = (0..4096u32).map(|n| (n % 251) as u8).collect();
        let mut stored = plain.clone();
        cipher().encrypt(1 << 20, &mut stored);
        assert!(stored.chunks(16).zip(plain.chunks(16)).all(|(a, b)| a != b));
        let mut whole = stored.clone();
        cipher().decrypt(1 << 20, &mut whole);
        assert_eq!(whole, plain);
        let mut part = stored[1024..2048].to_vec();
        cipher().decrypt((1 << 20) + 1024, &mut part);
        assert_eq!(part, plain[1024..2048]);
        let mut moved = stored[..512].to_vec();
        cipher().decrypt((1 << 20) + 512, &mut moved);
        assert_ne!(moved, plain[..512]);
        // Equal sectors are not equal on the device.
        let mut zeroes = vec![0; 1024];
        cipher().encrypt(0, &mut zeroes);
        assert_ne!(zeroes[..512], zeroes[512..]);
    }

    /// IEEE 1619-2007, annex B, vector 10: 512 bytes at data unit 0xff, so that other programs can read it too.
    #[test]
    fn sector_is_encrypted_as_the_standard_says() {
        let key = [
            0x27, 0x18, 0x28, 0x18, 0x28, 0x45, 0x90, 0x45, 0x23, 0x53, 0x60, 0x28, 0x74, 0x71,
            0x35, 0x26, 0x62, 0x49, 0x77, 0x57, 0x24, 0x70, 0x93, 0x69, 0x99, 0x59, 0x57, 0x49,
            0x66, 0x96, 0x76, 0x27, 0x31, 0x41, 0x59, 0x26, 0x53, 0x58, 0x97, 0x93, 0x23, 0x84,
            0x62, 0x64, 0x33, 0x83, 0x27, 0x95, 0x02, 0x88, 0x41, 0x97, 0x16, 0x93, 0x99, 0x37,
            0x51, 0x05, 0x82, 0x09, 0x74, 0x94, 0x45, 0x92,
        ];
        let mut sector: Vec<u8> = (0..=255).cycle().take(512).collect();
        SectorCipher::new(&key).encrypt(0xff * 512, &mut sector);
        assert_eq!(
            sector[..16],
            [
                0x1c, 0x3b, 0x3a, 0x10, 0x2f, 0x77, 0x03, 0x86, 0xe4, 0x83, 0x6c, 0x99, 0xe3, 0x70,
                0xcf, 0x9b
            ]
        );
        // The last of 32 blocks, whose tweak is the 31st product.
        assert_eq!(
            sector[496..],
            [
                0xc4, 0xf3, 0x6f, 0xfd, 0xa9, 0xfc, 0xea, 0x70, 0xb9, 0xc6, 0xe6, 0x93, 0xe1, 0x48,
                0xc1, 0x51
            ]
        );
    }

    #[test]
    #[should_panic(expected = "whole sectors")]
    fn part_of_a_sector_is_refused() {
        cipher().encrypt(512, &mut [0; 100]);
    }
}
