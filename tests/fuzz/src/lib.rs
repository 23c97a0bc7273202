//! Bytes of others against everything that reads them: formats, the NBD protocol, the control API,
//! the configuration, the kernel's requests.
//!
//! Owns the targets, what each must hold to, and the corpora (`corpus/<target>`). Does not own the
//! fuzzer: libFuzzer makes the inputs (`tests/fuzzer.rs`, by `tests/fuzz/run`); `tests/corpus.rs`
//! replays the corpora with every other test.
//!
//! Invariants of every target: no input makes it panic; what it allocates on the calling thread is
//! bounded by the input's length, whatever lengths the input declares; the same input does the same.

mod cache;
mod control;
mod map;
mod mend;
mod meter;
mod nbd;
mod store;
mod text;
mod ublk;

use std::collections::BTreeSet;
use std::sync::Mutex;

/// Memory that a target may take whatever its input: buffers of a fixed length, tables.
const MEMORY_BASE: usize = 1 << 20;

/// Memory that a target may take for each byte of its input.
const MEMORY_PER_BYTE: usize = 256;

/// Something that reads bytes of others.
pub struct Target {
    /// Its name, and that of its corpus' folder.
    pub name: &'static str,
    read: fn(&[u8]),
}

macro_rules! targets {
    ($($module:ident: $($name:ident),+;)+) => {
        /// All of them.
        pub const TARGETS: &[Target] = &[
            $($(Target { name: stringify!($name), read: $module::$name },)+)+
        ];
    };
}

targets! {
    store: head, keys, snapshot, record, chunk_header, seal, frame;
    cache: superblock, segment_header, record_page, journal, session, index;
    map: map_leaf, map_index, map_manifest, map_usage;
    text: config, words;
    nbd: nbd_handshake, nbd_request, nbd_connection;
    control: control_api;
    ublk: ublk_descriptor;
}

impl Target {
    /// The target of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Gives it an input.
    ///
    /// # Panics
    /// If the target does not hold to what it must.
    pub fn run(&self, input: &[u8]) {
        self.warm_up();
        let peak = meter::peak(|| (self.read)(input));
        let bound = MEMORY_BASE + MEMORY_PER_BYTE * input.len();
        assert!(
            peak <= bound,
            "{}: {peak} bytes of memory for {} bytes of input",
            self.name,
            input.len()
        );
    }

    /// Makes what the target makes once (a runtime, a reactor), which is no input's fault.
    fn warm_up(&self) {
        static WARM: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
        if WARM.lock().is_ok_and(|mut warm| warm.insert(self.name)) {
            (self.read)(&[]);
        }
    }
}
