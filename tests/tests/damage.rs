//! Damage in the object store: an error in the right place, never wrong data and never an empty device.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use quarry_tests::{Daemon, MIB, Nbd, Site, Stamps, StoreDir, seeded, test_number};
use rand::RngExt as _;
use tempfile::{TempDir, tempdir};

const VOLUME: &str = "acme/damage";
const SIZE: u64 = 64 * MIB;
/// Regions that are each synced on their own, and so lie in objects of their own.
const REGIONS: u64 = 6;
const REGION: u64 = 256 << 10;
/// The errno of an I/O error, in NBD and in Linux.
const EIO: u32 = 5;

/// A volume of some regions in a folder store, its host gone.
struct Sound {
    dir: TempDir,
    store: StoreDir,
    stamps: Stamps,
    /// The chunk of each region.
    chunks: Vec<PathBuf>,
}

fn sound(seed: u64) -> Result<Sound> {
    let dir = tempdir()?;
    let store = StoreDir::of(dir.path());
    let stamps = Stamps::new(seed);
    let site = Site::with_folder(dir.path(), "a")?;
    let daemon = site.start()?;
    let mut nbd = daemon.fresh_volume(VOLUME, SIZE, &[])?;
    let mut chunks = Vec::new();
    for region in 0..REGIONS {
        let known = store.objects("chunk")?;
        write_region(&mut nbd, stamps, region)?;
        daemon.sync(VOLUME)?;
        let mut new = store.objects("chunk")?;
        new.retain(|chunk| !known.contains(chunk));
        ensure!(new.len() == 1, "region {region} became {new:?}");
        chunks.append(&mut new);
    }
    drop(nbd);
    daemon.quarry(&["volume", "detach", VOLUME])?;
    daemon.stop()?;
    Ok(Sound {
        dir,
        store,
        stamps,
        chunks,
    })
}

fn write_region(nbd: &mut Nbd, stamps: Stamps, region: u64) -> Result<()> {
    let data = stamps.fill(region * REGION / 512, REGION / 512, region + 1);
    Ok(nbd.write(region * REGION, &data, false)?)
}

/// What reading a region gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Region {
    Right,
    Failed,
}

/// What came of a damaged store.
#[derive(Debug)]
enum Outcome {
    /// The volume was not attached, with these words.
    Refused(String),
    /// It was, and this is what its regions read as.
    Attached(Vec<Region>),
}

impl Sound {
    /// Damages a copy of the store with `damage`, attaches it to a new host and reads everything.
    fn after(&self, damage: impl FnOnce(&StoreDir) -> Result<()>) -> Result<(Outcome, Findings)> {
        let dir = tempdir()?;
        let store = self.store.copy_to(dir.path())?;
        damage(&store)?;
        let site = Site::with_folder(dir.path(), "b")?;
        let mut daemon = site.start()?;
        let attached = site.quarry_json(&["volume", "attach", VOLUME, "--via", "nbd"])?;
        let outcome = if attached.code == Some(0) {
            Outcome::Attached(self.read_regions(&daemon)?)
        } else {
            let refusal = attached.refusal()?;
            Outcome::Refused(format!("{} {}", refusal.message, refusal.remedy))
        };
        daemon.assert_alive()?;
        let findings = Findings {
            shown: daemon
                .site()
                .quarry_json(&["volume", "show", VOLUME])?
                .stdout,
            log: daemon.log(),
        };
        daemon.quarry(&["status"])?;
        Ok((outcome, findings))
    }

    fn read_regions(&self, daemon: &Daemon) -> Result<Vec<Region>> {
        let mut nbd = daemon.connect(VOLUME)?;
        let mut regions = Vec::new();
        for region in 0..REGIONS {
            let right = self
                .stamps
                .fill(region * REGION / 512, REGION / 512, region + 1);
            regions.push(match nbd.read_vec(region * REGION, REGION) {
                Ok(found) if found == right => Region::Right,
                Ok(_) => bail!("region {region} reads as something never written there"),
                Err(error) if error.errno() == Some(EIO) => Region::Failed,
                Err(error) => return Err(error).context("neither data nor an I/O error"),
            });
        }
        // Beside the damage the volume still takes writes and keeps them.
        nbd.write(SIZE - 4096, &[5; 4096], true)?;
        ensure!(nbd.read_vec(SIZE - 4096, 4096)? == [5; 4096]);
        Ok(regions)
    }
}

/// Where a person would look for the reason.
struct Findings {
    shown: String,
    log: String,
}

impl Findings {
    fn name(&self, key: &str) -> bool {
        self.shown.contains(key) || self.log.contains(key)
    }
}

fn flip(path: &Path, at: usize, bit: u8) -> Result<()> {
    let mut bytes = fs::read(path)?;
    bytes[at] ^= 1 << bit;
    Ok(fs::write(path, bytes)?)
}

/// The same object in a copy of the store.
fn twin(sound: &Sound, copy: &StoreDir, object: &Path) -> Result<PathBuf> {
    let key = sound.store.key(object);
    let all = copy.objects("v")?;
    let found = all.into_iter().find(|path| copy.key(path) == key);
    found.with_context(|| format!("no copy of {key}"))
}

#[test]
fn damaged_payload_of_a_chunk_fails_its_own_range_and_is_named() -> Result<()> {
    let (mut random, seed) = seeded("damaged chunk");
    let sound = sound(seed)?;
    let hurt = random.random_range(0..sound.chunks.len());
    let chunk = &sound.chunks[hurt];
    let len = fs::metadata(chunk)?.len();
    // The header is at the front; the payload fills the rest.
    let place = usize::try_from(len * 3 / 4)?;
    for way in ["flipped", "truncated", "deleted"] {
        let (outcome, findings) = sound.after(|copy| {
            let chunk = twin(&sound, copy, chunk)?;
            match way {
                "flipped" => flip(&chunk, place, 3)?,
                "truncated" => fs::OpenOptions::new()
                    .write(true)
                    .open(&chunk)?
                    .set_len(len / 2)?,
                _ => fs::remove_file(&chunk)?,
            }
            Ok(())
        })?;
        println!("{way}: {outcome:?}");
        let key = sound.store.key(chunk);
        match outcome {
            Outcome::Attached(regions) => {
                for (region, read) in regions.iter().enumerate() {
                    let expected = if region == hurt {
                        Region::Failed
                    } else {
                        Region::Right
                    };
                    ensure!(*read == expected, "{way}: region {region} is {read:?}");
                }
                ensure!(findings.name(&key), "{way}: {key} is named nowhere");
            }
            // A chunk that the map does not hold yet is needed whole to attach at all.
            Outcome::Refused(words) => {
                ensure!(way != "flipped", "refused for a flipped byte: {words}");
                ensure!(words.contains(&key), "{way}: {key} is not named: {words}");
            }
        }
    }
    Ok(())
}

#[test]
fn damaged_or_missing_head_refuses_to_attach() -> Result<()> {
    let (mut random, seed) = seeded("damaged head");
    let sound = sound(seed)?;
    let heads = sound.store.objects("head")?;
    ensure!(heads.len() == 1, "{heads:?}");
    let len = fs::read(&heads[0])?.len();
    for way in ["flipped", "truncated", "emptied", "deleted"] {
        let (outcome, _) = sound.after(|copy| {
            let head = twin(&sound, copy, &heads[0])?;
            match way {
                "flipped" => flip(
                    &head,
                    random.random_range(0..len),
                    random.random_range(0..8),
                )?,
                "truncated" => fs::write(&head, &fs::read(&heads[0])?[..len / 2])?,
                "emptied" => fs::write(&head, [])?,
                _ => fs::remove_file(&head)?,
            }
            Ok(())
        })?;
        match outcome {
            Outcome::Refused(words) => {
                println!("{way}: {words}");
                ensure!(words.contains("head"), "{way}: not named: {words}");
            }
            Outcome::Attached(_) => bail!("{way}: attached without a sound head"),
        }
    }
    Ok(())
}

#[test]
fn damaged_or_missing_map_object_gives_no_wrong_data() -> Result<()> {
    let (_, seed) = seeded("damaged map");
    let sound = sound(seed)?;
    let maps = sound.store.objects("map")?;
    ensure!(!maps.is_empty(), "a sync or detach leaves no map object");
    for map in &maps {
        let len = fs::read(map)?.len();
        let key = sound.store.key(map);
        for way in ["front", "back", "truncated", "deleted"] {
            let (outcome, findings) = sound.after(|copy| {
                let map = twin(&sound, copy, map)?;
                match way {
                    "front" => flip(&map, len / 8, 0)?,
                    "back" => flip(&map, len - 1, 7)?,
                    "truncated" => {
                        let bytes = fs::read(&map)?;
                        fs::write(&map, &bytes[..len / 2])?;
                    }
                    _ => fs::remove_file(&map)?,
                }
                Ok(())
            })?;
            println!("{way} of {key}: {outcome:?}");
            match outcome {
                Outcome::Refused(words) => {
                    ensure!(words.contains(&key), "{way}: {key} is not named: {words}");
                }
                Outcome::Attached(regions) if regions.contains(&Region::Failed) => {
                    ensure!(findings.name(&key), "{way}: {key} is named nowhere");
                }
                // An older object that nothing points to any more may be damaged unseen.
                Outcome::Attached(_) => {
                    ensure!(
                        maps.last() != Some(map),
                        "{way}: the newest map is not read"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn any_single_flipped_bit_gives_no_wrong_data() -> Result<()> {
    let (mut random, seed) = seeded("any flipped bit");
    let sound = sound(seed)?;
    let objects = sound.store.objects("t")?;
    for _ in 0..test_number("QUARRY_TEST_FLIPS", 16) {
        let object = &objects[random.random_range(0..objects.len())];
        let len = fs::read(object)?.len();
        // Headers and ends are where the structure is.
        let at = match random.random_range(0..3) {
            0 => random.random_range(0..len.min(128)),
            1 => len - 1 - random.random_range(0..len.min(128)),
            _ => random.random_range(0..len),
        };
        let bit = random.random_range(0..8);
        let key = sound.store.key(object);
        let (outcome, _) = sound
            .after(|copy| {
                let all = copy.objects("t")?;
                let hurt = all.into_iter().find(|path| copy.key(path) == key);
                flip(&hurt.context("a copy of each object")?, at, bit)
            })
            .with_context(|| format!("bit {bit} of byte {at} of {key}"))?;
        println!("bit {bit} of byte {at} of {key} ({len}): {outcome:?}");
    }
    ensure!(sound.dir.path().exists());
    Ok(())
}
