//! Holds FORMAT.md to the code: its limits, magics and offsets.

use quarry_objfmt::map::{LEAF_ENTRIES_MAX, NODE_HEADER_LEN, NODE_MAGIC, RUNS_MAX};
use quarry_objfmt::{chunk, frame, head, index, journal, keys, page, seal, types, wrapped};

const FORMAT: &str = include_str!("../FORMAT.md");

#[test]
fn format_page_limits_are_those_of_the_code() {
    let limits = [
        ("VOLUME_SECTORS_MAX", types::VOLUME_SECTORS_MAX),
        ("FRAME_SECTORS_MAX", frame::FRAME_SECTORS_MAX.into()),
        ("FRAME_HEADER_LEN", frame::FRAME_HEADER_LEN as u64),
        ("FRAME_OVERHEAD_MAX", frame::FRAME_OVERHEAD_MAX as u64),
        ("CHUNK_PREFIX_LEN", chunk::CHUNK_PREFIX_LEN as u64),
        ("CHUNK_SECTORS_MAX", chunk::CHUNK_SECTORS_MAX.into()),
        ("CHUNK_EXTENTS_MAX", chunk::CHUNK_EXTENTS_MAX as u64),
        ("CHUNK_HEADER_LEN_MAX", chunk::CHUNK_HEADER_LEN_MAX as u64),
        ("LOG_RANGES_MAX", head::LOG_RANGES_MAX as u64),
        ("SNAPSHOTS_MAX", head::SNAPSHOTS_MAX as u64),
        ("NAME_LEN_MAX", keys::NAME_LEN_MAX as u64),
        ("KEYS_MAX", wrapped::KEYS_MAX as u64),
        ("WRAPPED_LEN_MAX", wrapped::WRAPPED_LEN_MAX as u64),
        (
            "HOT_RANGES_MAX",
            quarry_objfmt::record::HOT_RANGES_MAX as u64,
        ),
        ("HOST_LEN_MAX", quarry_objfmt::HOST_LEN_MAX as u64),
        ("PAGE_SIZE", page::PAGE_SIZE as u64),
        ("RECORDS_PER_PAGE", page::RECORDS_PER_PAGE as u64),
        ("JOURNAL_ENTRY_LEN", journal::JOURNAL_ENTRY_LEN as u64),
        ("JOURNAL_ENTRIES_MAX", journal::JOURNAL_ENTRIES_MAX.into()),
        ("INDEX_OWNER_LEN_MAX", index::INDEX_OWNER_LEN_MAX as u64),
        ("INDEX_RUNS_MAX", index::INDEX_RUNS_MAX as u64),
        ("SEGMENT_SIZE_MIN", page::SEGMENT_SIZE_MIN.into()),
        ("LEAF_ENTRIES_MAX", LEAF_ENTRIES_MAX as u64),
        ("RUNS_MAX", RUNS_MAX as u64),
        ("NODE_HEADER_LEN", NODE_HEADER_LEN as u64),
    ];
    for (name, value) in limits {
        let row = format!("\n| `{name}` | {value} |\n");
        assert!(FORMAT.contains(&row), "no row {row:?}");
    }
    let section = FORMAT.split("## Limits").nth(1).unwrap();
    let section = section.split("\n#").next().unwrap();
    assert_eq!(
        section.matches("\n| `").count(),
        limits.len(),
        "a limit without a check"
    );
}

#[test]
fn format_page_magics_are_those_of_the_golden_files() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/golden");
    for file in std::fs::read_dir(golden).unwrap() {
        let file = file.unwrap();
        // An entry has no magic: its header's checksum key is in its own.
        if file.file_name() == "journal-entry-v1.bin" {
            continue;
        }
        let bytes = std::fs::read(file.path()).unwrap();
        let magic = std::str::from_utf8(&bytes[..4]).unwrap();
        assert!(FORMAT.contains(&format!("`{magic}`")), "no {magic}");
    }
    for magic in [chunk::CHUNK_MAGIC, seal::SEAL_MAGIC, NODE_MAGIC] {
        let magic = std::str::from_utf8(&magic).unwrap();
        assert!(FORMAT.contains(&format!("`{magic}`")), "no {magic}");
    }
}
