//! The corpora, replayed without a fuzzer; and what a fuzzer finds late: the ends of every integer.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use quarry_fuzz::{TARGETS, Target};

/// Put at each place of each seed, in four and in eight bytes, in the target's order.
const ENDS: [u64; 7] = [
    0,
    u32::MAX as u64,
    1 << 51,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 511,
    u64::MAX,
];

/// Bytes of a seed that are tried: what is behind is content.
const SEED_BYTES_MAX: usize = 128;

/// A connection takes a thousand times as long as all else.
const SLOW: &str = "nbd_connection";

fn corpora() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// The names and inputs of a target's corpus.
fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let dir = corpora().join(target.name);
    let files = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let read = |file: std::io::Result<fs::DirEntry>| {
        let file = file.unwrap();
        let name = file.file_name().into_string().unwrap();
        (name, fs::read(file.path()).unwrap())
    };
    files.map(read).collect()
}

#[test]
fn every_target_has_a_corpus_with_seeds_and_every_corpus_a_target() {
    let targets: BTreeSet<_> = TARGETS.iter().map(|t| t.name.to_owned()).collect();
    let folders = fs::read_dir(corpora()).unwrap();
    let folders: BTreeSet<_> = folders
        .map(|folder| folder.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(folders, targets);
    for target in TARGETS {
        let names = corpus(target);
        assert!(
            names.iter().any(|(name, _)| name.starts_with("seed")),
            "{}",
            target.name
        );
    }
}

#[test]
fn corpus_replayed_holds() {
    let mut count = 0;
    for target in TARGETS {
        for (name, input) in corpus(target) {
            println!("{}/{name}", target.name);
            target.run(&input);
            count += 1;
        }
    }
    println!("{count} inputs");
}

#[test]
fn seeds_cut_anywhere_or_with_integers_at_their_ends_hold() {
    let mut count = 0;
    for target in TARGETS.iter().filter(|target| target.name != SLOW) {
        let is_big_endian = target.name.starts_with("nbd");
        for (name, seed) in corpus(target) {
            if !name.starts_with("seed") {
                continue;
            }
            println!("{}/{name}", target.name);
            for at in 0..seed.len().min(SEED_BYTES_MAX) {
                target.run(&seed[..at]);
                for end in ENDS {
                    let mut wide = end.to_le_bytes();
                    let mut half = [wide[0], wide[1], wide[2], wide[3]];
                    if is_big_endian {
                        wide.reverse();
                        half.reverse();
                    }
                    for bytes in [&wide[..], &half[..]] {
                        let mut input = seed.clone();
                        let len = bytes.len().min(input.len() - at);
                        input[at..at + len].copy_from_slice(&bytes[..len]);
                        target.run(&input);
                        count += 1;
                    }
                }
            }
        }
    }
    println!("{count} inputs");
}
