//! Reads the log of a dm-log-writes device, for the scripts of `tests/vm`: where its flushes are, and what the disk
//! held at each.
//!
//! usage: `log-writes LOG boundaries` or `log-writes LOG replay FROM TO TARGET [SEED]`
//!
//! `boundaries` prints a line for each flush and each FUA write: how many entries have to be replayed for the disk as it
//! was then, and the newest mark before it (`-` if there is none). `replay` writes the entries FROM (counted from 0) up
//! to, and without, TO to TARGET. With SEED it is what a power cut may leave of them: of each write those blocks of
//! [`BLOCK`] that chance takes, and no discard.
//!
//! The layout, all little-endian, by the kernel's `drivers/md/dm-log-writes.c`. Sectors are of the size that the head tells;
//! it is in sector 0, and the entries follow one another from sector 1.
//!
//! | offset | in the head | in an entry |
//! |---|---|---|
//! | 0 | magic, 8 bytes | first sector on the device, 8 bytes |
//! | 8 | version, 8 bytes | sectors, 8 bytes |
//! | 16 | entries, 8 bytes | flags, 8 bytes |
//! | 24 | bytes of a sector, 4 bytes | bytes of a mark, 8 bytes |
//!
//! An entry takes a sector of its own, in which a mark's text follows it. Then come its sectors of data, unless it is a
//! discard. The kernel logs a write when a flush covers it, before that flush; a FUA write when it is done.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;

const FLUSH: u64 = 1 << 0;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;

/// What a disk writes at once, in bytes: a file system's own superblock is not safe from less.
const BLOCK: usize = 4096;

/// The longest run of one entry, in bytes: a sane log has no longer one.
const RUN_BYTES_MAX: u64 = 64 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments.as_slice() {
        [log, "boundaries"] => {
            for (entries, mark) in boundaries(Log::open(log)?)? {
                println!("{entries} {mark}");
            }
            Ok(())
        }
        [log, "replay", from, to, target] => {
            replay(Log::open(log)?, from.parse()?, to.parse()?, target, None)
        }
        [log, "replay", from, to, target, seed] => {
            let chance = StdRng::seed_from_u64(seed.parse()?);
            replay(
                Log::open(log)?,
                from.parse()?,
                to.parse()?,
                target,
                Some(chance),
            )
        }
        _ => bail!("usage: log-writes LOG boundaries | LOG replay FROM TO TARGET [SEED]"),
    }
}

/// A log, read from its start.
struct Log {
    file: File,
    sector_bytes: u64,
    entries: u64,
    /// Of the next entry, in bytes.
    at: u64,
}

struct Entry {
    /// Its place on the device, in bytes.
    offset: u64,
    flags: u64,
    mark: String,
    data: Vec<u8>,
}

impl Log {
    fn open(path: &str) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {path}"))?;
        let mut head = [0; 28];
        file.read_exact_at(&mut head, 0).context("read the head")?;
        ensure!(
            (number(&head, 0), number(&head, 8)) == (MAGIC, VERSION),
            "{path} is no log of dm-log-writes, version 1"
        );
        let sector_bytes = u64::from(u32::from_le_bytes(head[24..28].try_into()?));
        ensure!(
            (512..=4096).contains(&sector_bytes),
            "sectors of {sector_bytes} bytes"
        );
        Ok(Self {
            file,
            sector_bytes,
            entries: number(&head, 16),
            at: sector_bytes,
        })
    }

    /// The next entry, its data only if they are wanted.
    fn read(&mut self, wanted: bool) -> Result<Entry> {
        let mut sector = vec![0; usize::try_from(self.sector_bytes)?];
        self.file.read_exact_at(&mut sector, self.at)?;
        self.at += self.sector_bytes;
        let [first, sectors, flags, text] = [0, 8, 16, 24].map(|at| number(&sector, at));
        let offset = first.checked_mul(self.sector_bytes);
        let bytes = sectors.checked_mul(self.sector_bytes);
        let (Some(offset), Some(bytes)) = (offset, bytes) else {
            bail!("an entry of sectors {first} and {sectors} more");
        };
        let mut entry = Entry {
            offset,
            flags,
            mark: String::new(),
            data: Vec::new(),
        };
        if flags & MARK != 0 {
            let text = sector
                .get(32..)
                .and_then(|s| s.get(..usize::try_from(text).ok()?));
            entry.mark = String::from_utf8(text.context("a mark longer than a sector")?.to_vec())?;
        }
        if flags & DISCARD == 0 {
            ensure!(bytes <= RUN_BYTES_MAX, "an entry of {bytes} bytes");
            if wanted {
                entry.data = vec![0; usize::try_from(bytes)?];
                self.file.read_exact_at(&mut entry.data, self.at)?;
            }
            self.at += bytes;
        }
        Ok(entry)
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn boundaries(mut log: Log) -> Result<Vec<(u64, String)>> {
    let mut found = Vec::new();
    let mut mark = "-".to_owned();
    for number in 0..log.entries {
        let entry = log.read(false);
        let entry = entry.with_context(|| format!("entry {number}"))?;
        if entry.flags & MARK != 0 {
            mark = entry.mark;
        } else if entry.flags & (FLUSH | FUA) != 0 {
            found.push((number + 1, mark.clone()));
        }
    }
    Ok(found)
}

fn replay(mut log: Log, from: u64, to: u64, target: &str, chance: Option<StdRng>) -> Result<()> {
    ensure!(
        from <= to && to <= log.entries,
        "the log has {} entries",
        log.entries
    );
    let file = OpenOptions::new().write(true).open(target);
    let file = file.with_context(|| format!("open {target}"))?;
    let mut chance = chance;
    for number in 0..to {
        let entry = log.read(number >= from);
        let entry = entry.with_context(|| format!("entry {number}"))?;
        // A discard leaves what is there, which is one of the things that it may do.
        match &mut chance {
            None => file.write_all_at(&entry.data, entry.offset)?,
            Some(chance) => {
                let mut at = entry.offset;
                for block in entry.data.chunks(BLOCK) {
                    if chance.random_bool(0.5) {
                        file.write_all_at(block, at)?;
                    }
                    at += block.len() as u64;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A head and entries of (sector, flags, mark or data).
    fn log(entries: &[(u64, u64, &[u8])]) -> tempfile::NamedTempFile {
        let mut bytes = vec![0; 512];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8] = 1;
        bytes[16..24].copy_from_slice(&(entries.len() as u64).to_le_bytes());
        bytes[24..28].copy_from_slice(&512_u32.to_le_bytes());
        for (sector, flags, content) in entries {
            let mut head = vec![0; 512];
            let is_mark = flags & MARK != 0;
            let sectors = if is_mark {
                0
            } else {
                content.len() as u64 / 512
            };
            head[..8].copy_from_slice(&sector.to_le_bytes());
            head[8..16].copy_from_slice(&sectors.to_le_bytes());
            head[16..24].copy_from_slice(&flags.to_le_bytes());
            if is_mark {
                head[24] = u8::try_from(content.len()).unwrap();
                head[32..32 + content.len()].copy_from_slice(content);
            }
            bytes.extend(head);
            if !is_mark && flags & DISCARD == 0 {
                bytes.extend(*content);
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    #[test]
    fn log_is_replayed_up_to_each_of_its_flushes() {
        let (one, two, three) = ([1; 512], [2; 1024], [3; 512]);
        let log = log(&[
            (0, 0, &one),
            (0, FLUSH, &[]),
            (0, MARK, b"a file"),
            (1, 0, &two),
            (9, DISCARD, &three),
            (2, FUA, &three),
        ]);
        let path = log.path().to_str().unwrap();
        let found = boundaries(Log::open(path).unwrap()).unwrap();
        assert_eq!(found, [(2, "-".to_owned()), (6, "a file".to_owned())]);
        let disk = tempfile::NamedTempFile::new().unwrap();
        let target = disk.path().to_str().unwrap();
        replay(Log::open(path).unwrap(), 0, 2, target, None).unwrap();
        assert_eq!(std::fs::read(target).unwrap(), one);
        replay(Log::open(path).unwrap(), 2, 6, target, None).unwrap();
        let expected = [&one[..], &two[..512], &three].concat();
        assert_eq!(std::fs::read(target).unwrap(), expected);
        assert!(replay(Log::open(path).unwrap(), 0, 7, target, None).is_err());
    }

    #[test]
    fn replay_of_a_power_cut_takes_whole_blocks_by_its_seed() {
        let data: Vec<u8> = (0..64).flat_map(|block| [block + 1; BLOCK]).collect();
        let log = log(&[(0, 0, &data), (0, FLUSH, &[])]);
        let path = log.path().to_str().unwrap();
        let left = |seed| {
            let disk = tempfile::NamedTempFile::new().unwrap();
            disk.as_file().set_len(data.len() as u64).unwrap();
            let chance = Some(StdRng::seed_from_u64(seed));
            let target = disk.path().to_str().unwrap();
            replay(Log::open(path).unwrap(), 0, 1, target, chance).unwrap();
            std::fs::read(target).unwrap()
        };
        let some = left(1);
        let blocks = || some.chunks(BLOCK).zip(data.chunks(BLOCK));
        assert!(blocks().all(|(found, wrote)| found == wrote || found == [0; BLOCK]));
        assert!(blocks().any(|(found, wrote)| found == wrote));
        assert!(blocks().any(|(found, wrote)| found != wrote));
        assert!(some == left(1) && some != left(2));
    }

    #[test]
    fn other_files_are_no_logs() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 4096]).unwrap();
        assert!(Log::open(file.path().to_str().unwrap()).is_err());
    }
}
