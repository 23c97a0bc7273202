//! Ten thousand random operations through NBD against an array of bytes, with restarts in between.

use anyhow::{Context as _, Result};
use quarry_tests::{Daemon, MIB, Nbd, Site, in_memory, same_bytes, seeded, test_number};
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _};
use tempfile::tempdir;

const VOLUME: &str = "acme/model";
const SIZE: u64 = 96 * MIB;
/// The longest request.
const REQUEST_BYTES_MAX: u64 = MIB;
/// How many times the daemon goes away during a run.
const RESTARTS: u64 = 9;

/// A volume beside the bytes that it ought to hold.
struct Pair {
    site: Site,
    daemon: Daemon,
    nbd: Nbd,
    bytes: Vec<u8>,
    block: u64,
}

impl Pair {
    fn operation(&mut self, random: &mut StdRng) -> Result<()> {
        let (offset, len) = self.range(random);
        let span = in_memory(offset)..in_memory(offset + len);
        let short = u32::try_from(len)?;
        match random.random_range(0..100) {
            0..40 => {
                let found = self.nbd.read_vec(offset, len)?;
                same_bytes("read", &found, &self.bytes[span])?;
            }
            40..78 => {
                let mut data = vec![0; in_memory(len)];
                if random.random_ratio(9, 10) {
                    random.fill_bytes(&mut data);
                } else {
                    data.fill(random.random());
                }
                self.nbd.write(offset, &data, random.random_ratio(1, 20))?;
                self.bytes[span].copy_from_slice(&data);
            }
            78..86 => {
                self.nbd.trim(offset, short)?;
                self.bytes[span].fill(0);
            }
            86..94 => {
                let fua = random.random_ratio(1, 10);
                self.nbd.write_zeroes(offset, short, fua)?;
                self.bytes[span].fill(0);
            }
            _ => self.nbd.flush()?,
        }
        Ok(())
    }

    /// Any run of blocks; short ones much more often, around a few hot places half of the time.
    fn range(&self, random: &mut StdRng) -> (u64, u64) {
        let most = REQUEST_BYTES_MAX / self.block;
        let shift = random.random_range(0..=most.ilog2());
        let len = random.random_range(1..=most >> shift);
        let blocks = SIZE / self.block;
        let first = if random.random() {
            random.random_range(0..4) * (blocks / 4) + random.random_range(0..64)
        } else {
            random.random_range(0..blocks)
        };
        let first = first.min(blocks - len);
        (first * self.block, len * self.block)
    }

    /// Ends the daemon in one of three ways that must lose nothing, and starts it again.
    fn restart(self, random: &mut StdRng) -> Result<Self> {
        let Self {
            site,
            daemon,
            mut nbd,
            bytes,
            block,
        } = self;
        let way = random.random_range(0..3);
        println!("restart: {}", ["graceful", "killed", "host lost"][way]);
        match way {
            0 => daemon.stop()?,
            1 => {
                nbd.flush()?;
                daemon.kill()?;
            }
            _ => {
                daemon.sync(VOLUME)?;
                daemon.kill()?;
                site.lose_host()?;
            }
        }
        let daemon = site.start()?;
        let nbd = if way == 2 {
            daemon.attach(VOLUME, &["--force"])?
        } else {
            daemon.connect(VOLUME)?
        };
        Ok(Self {
            site,
            daemon,
            nbd,
            bytes,
            block,
        })
    }

    fn check_all(&mut self) -> Result<()> {
        let found = self.nbd.read_vec(0, SIZE)?;
        same_bytes("the whole volume", &found, &self.bytes)
    }
}

fn run(name: &str, block: u64, compression: &str) -> Result<()> {
    let (mut random, _) = seeded(name);
    let operations = test_number("QUARRY_TEST_OPERATIONS", 10_000);
    let dir = tempdir()?;
    // Smaller than what is written, so that everything goes round: upload, reclaim, fetch.
    let site = Site::with_folder(dir.path(), "a")?.cache_size("64MiB");
    let daemon = site.start()?;
    let block_text = block.to_string();
    let options = ["--sector-size", &block_text, "--compression", compression];
    let nbd = daemon.fresh_volume(VOLUME, SIZE, &options)?;
    let mut pair = Pair {
        site,
        daemon,
        nbd,
        bytes: vec![0; in_memory(SIZE)],
        block,
    };
    for number in 1..=operations {
        pair.operation(&mut random)
            .with_context(|| format!("operation {number}"))?;
        if number % (operations / (RESTARTS + 1)).max(1) == 0 {
            pair = pair.restart(&mut random)?;
            pair.check_all()
                .with_context(|| format!("after the restart at {number}"))?;
        }
    }
    pair.check_all()?;
    pair.daemon.stop()
}

#[test]
fn volume_of_512_byte_sectors_under_random_operations_equals_the_model() -> Result<()> {
    run("model 512", 512, "lz4")
}

#[test]
fn volume_of_4096_byte_sectors_under_random_operations_equals_the_model() -> Result<()> {
    run("model 4096", 4096, "zstd")
}
