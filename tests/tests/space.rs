//! What overwriting leaves behind in the store, and what it costs to be rid of that.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use quarry_tests::{Daemon, MIB, Nbd, Site, Stamps, StoreDir, seeded, test_number};
use rand::RngExt as _;
use rand::rngs::StdRng;
use tempfile::tempdir;

const VOLUME: &str = "acme/churn";
const BLOCK: u64 = 4096;
/// Small chunks, for a volume that is as much smaller than real ones.
const SETTINGS: &str =
    "[writeback]\nchunk_size = \"256KiB\"\n[reclaim]\nhorizon = \"2s\"\ndebt_min = \"1MiB\"\n";
/// Requests under way.
const DEPTH: usize = 32;
/// By then what is not needed must be gone.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// The number of the newest write to each block.
struct Blocks {
    stamps: Stamps,
    newest: Vec<u64>,
    written: u64,
}

impl Blocks {
    fn new(seed: u64, count: u64) -> Result<Self> {
        Ok(Self {
            stamps: Stamps::new(seed),
            newest: vec![0; usize::try_from(count)?],
            written: 0,
        })
    }

    fn write(&mut self, nbd: &mut Nbd, blocks: impl Iterator<Item = u64>) -> Result<()> {
        let mut under_way = std::collections::VecDeque::new();
        for block in blocks {
            self.written += 1;
            self.newest[usize::try_from(block)?] = self.written;
            let data = self.stamps.fill(block * 8, 8, self.written);
            under_way.push_back(nbd.send_write(block * BLOCK, &data, false)?);
            // Two writes to one block at once would have no order.
            if under_way.len() == DEPTH {
                for cookie in under_way.drain(..) {
                    nbd.wait(cookie)?;
                }
            }
        }
        for cookie in under_way {
            nbd.wait(cookie)?;
        }
        Ok(())
    }

    fn check(&self, nbd: &mut Nbd) -> Result<()> {
        for (part, newest) in (0..).zip(self.newest.chunks(256)) {
            let at = part * 256 * BLOCK;
            let found = nbd.read_vec(at, newest.len() as u64 * BLOCK)?;
            for (block, (content, number)) in (0..).zip(found.chunks(4096).zip(newest)) {
                let first = at / 512 + block * 8;
                let stamp = self.stamps.read(first, &content[..512])?;
                ensure!(stamp == *number, "sector {first}: {stamp}, not {number}");
                let whole = *number == 0 || content == self.stamps.fill(first, 8, *number);
                ensure!(whole, "sector {first} and behind: not one write");
            }
        }
        Ok(())
    }
}

/// Random blocks, none twice within what is under way.
fn random_blocks(rng: &mut StdRng, among: u64, count: u64) -> Vec<u64> {
    let mut blocks: Vec<u64> = Vec::new();
    while (blocks.len() as u64) < count {
        let block = rng.random_range(0..among);
        let recent = blocks.len().saturating_sub(DEPTH);
        if !blocks[recent..].contains(&block) {
            blocks.push(block);
        }
    }
    blocks
}

fn metric(daemon: &Daemon, name: &str) -> Result<u64> {
    daemon.count(name, "churn")
}

/// Waits until nothing is left to delete, and answers the bytes of the volume's objects.
fn settled(daemon: &Daemon, store: &StoreDir) -> Result<u64> {
    daemon.sync(VOLUME)?;
    let begun = Instant::now();
    let mut before = 0;
    loop {
        let bytes = store.volume_bytes()?;
        let dead = metric(daemon, "quarry_volume_dead_bytes")?;
        if dead == 0 && bytes == before {
            return Ok(bytes);
        }
        ensure!(begun.elapsed() < SETTLE_MAX, "{dead} bytes stay dead");
        before = bytes;
        thread::sleep(Duration::from_millis(2500));
    }
}

/// Uniform random overwrites of five times the volume's size: the store holds little more than what is live, and
/// not much more was uploaded than was written.
#[test]
fn uniform_overwrites_leave_little_behind_and_cost_little() -> Result<()> {
    let (mut rng, seed) = seeded("uniform_overwrites_leave_little_behind_and_cost_little");
    let size = test_number("QUARRY_TEST_CHURN_MIB", 64) * MIB;
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let site = Site::with_folder(dir.path(), "a")?.settings(SETTINGS);
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, size, &["--compression", "none"])?;
    let among = size / BLOCK * 8 / 10;
    let live = among * BLOCK;
    let mut blocks = Blocks::new(seed, size / BLOCK)?;
    blocks.write(&mut nbd, 0..among)?;
    let filled = settled(&daemon, &store)?;
    ensure!(metric(&daemon, "quarry_volume_compacted_bytes_total")? == 0);
    let uploads = |daemon: &Daemon| -> Result<u64> {
        Ok(metric(daemon, "quarry_volume_uploaded_bytes_total")?
            + metric(daemon, "quarry_volume_compacted_bytes_total")?
            + metric(daemon, "quarry_volume_map_bytes_total")?)
    };
    let before = uploads(&daemon)?;

    let overwrites = random_blocks(&mut rng, among, 5 * size / BLOCK);
    let mut most = 0;
    for part in overwrites.chunks(4096) {
        blocks.write(&mut nbd, part.iter().copied())?;
        let needed = store
            .volume_bytes()?
            .saturating_sub(metric(&daemon, "quarry_volume_dead_bytes")?);
        most = most.max(needed);
    }
    // On to a checkpoint: what is in the log behind one is neither counted nor compacted before it has come into the map.
    let checkpoints = || metric(&daemon, "quarry_volume_checkpoints_total");
    let made = checkpoints()?;
    let mut written = overwrites.len() as u64 * BLOCK;
    for part in random_blocks(&mut rng, among, size / BLOCK).chunks(64) {
        if checkpoints()? > made {
            break;
        }
        blocks.write(&mut nbd, part.iter().copied())?;
        daemon.sync(VOLUME)?;
        written += part.len() as u64 * BLOCK;
    }
    let stored = settled(&daemon, &store)?;
    let uploaded = uploads(&daemon)? - before;
    #[allow(clippy::cast_precision_loss, reason = "ratios for people")]
    let ratio = |a: u64, b: u64| a as f64 / b as f64;
    println!(
        "filled {:.3}, stored {:.3} x live in the end, without what waits for the horizon {:.3} at most; uploaded {:.3} x written (maps {:.3})",
        ratio(filled, live),
        ratio(stored, live),
        ratio(most, live),
        ratio(uploaded, written),
        ratio(metric(&daemon, "quarry_volume_map_bytes_total")?, written),
    );
    blocks.check(&mut nbd)?;
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.quarry(&["volume", "verify", VOLUME, "--deep"])?;
    daemon.stop()?;
    site.lose_host()?;
    // The head lost too: the map says where its log goes on, for chunks before that are deleted.
    for object in store.objects("v")? {
        if object.ends_with("head") {
            std::fs::remove_file(object)?;
        }
    }
    let elsewhere = Site::with_folder(dir.path(), "b")?.settings(SETTINGS);
    let daemon = elsewhere.start()?;
    daemon.quarry(&["volume", "rescue", VOLUME, "--apply"])?;
    blocks.check(&mut daemon.attach(VOLUME, &[])?)?;
    ensure!(
        stored * 100 <= live * 135,
        "{stored} bytes for {live} live ones"
    );
    ensure!(
        uploaded * 100 <= written * 220,
        "{uploaded} bytes for {written} written ones"
    );
    daemon.stop()
}

#[test]
fn what_a_crash_left_in_the_log_counts_and_the_volume_is_not_blank() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, 16 * MIB, &["--compression", "none"])?;
    ensure!(daemon.show(VOLUME)?["newest_write"] == 0);
    let mut blocks = Blocks::new(1, 16 * MIB / BLOCK)?;
    blocks.write(&mut nbd, 0..MIB / BLOCK)?;
    daemon.sync(VOLUME)?;
    drop(nbd);
    // Before any of it is in the map, whose head is what a detached volume is shown by.
    daemon.kill()?;
    let daemon = site.start()?;
    let told = |daemon: &Daemon| -> Result<(u64, u64)> {
        let shown = daemon.show(VOLUME)?;
        let number = |name: &str| shown[name].as_u64().unwrap_or_default();
        Ok((number("stored_bytes"), number("newest_write")))
    };
    let (stored, newest) = told(&daemon)?;
    ensure!(
        (MIB..MIB + MIB / 8).contains(&stored),
        "{stored} bytes are stored"
    );
    ensure!(newest == MIB / BLOCK, "the newest write is {newest}");
    for _ in 0..2 {
        daemon.quarry(&["volume", "detach", VOLUME])?;
        ensure!(told(&daemon)? == (stored, newest));
        blocks.check(&mut daemon.attach(VOLUME, &[])?)?;
        ensure!(told(&daemon)? == (stored, newest));
    }
    daemon.stop()
}
