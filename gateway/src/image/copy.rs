//! The copy itself: pieces of the source, several at a time, read, looked at for zeroes, written.
//!
//! Each worker has connections of its own and one request under way; the pieces come from one [`Feed`], in
//! order. How far all is done without a gap is known at every moment: that is what a record may name.
//!
//! Invariants:
//! - Memory is one piece a worker.
//! - [`Progress::done`] never passes a piece whose write was not answered.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::disk::{Disk, DiskError, Runs};
use crate::nbd::client::read_full;

/// Bytes of a piece, and of a request.
pub const PIECE_BYTES: usize = 1 << 20;

/// Zeroes are looked for in blocks of so many bytes: a frame of a chunk.
const ZERO_BLOCK: usize = 64 << 10;

/// Requests start and end at multiples of so many bytes, or at the target's end: the largest logical block.
const ALIGNMENT: u64 = 4096;

/// Most workers of a copy.
pub const JOBS_MAX: usize = 64;

/// Why a copy ended early.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source failed.
    #[error("it cannot be read at byte {offset}")]
    Read {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: DiskError,
    },
    /// The target failed.
    #[error("it cannot be written at byte {offset}")]
    Write {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: DiskError,
    },
    /// A stream has more bytes than the target.
    #[error("there is more to read than the {size} bytes that there is room for")]
    TooLong {
        /// Bytes of the target.
        size: u64,
    },
    /// It was told to.
    #[error("it was stopped")]
    Stopped,
}

/// What is copied, in order.
pub struct Feed {
    source: Source,
    /// What is next of a run of data.
    at: u64,
    run_end: u64,
    end: u64,
}

enum Source {
    Disk {
        disk: Disk,
        runs: Runs,
    },
    Stream {
        stream: Box<dyn Read + Send>,
        /// Its last bytes are filled up with zeroes to so many.
        block: usize,
    },
}

/// A piece of data.
struct Piece {
    offset: u64,
    len: usize,
    /// Whether it was read already.
    filled: bool,
}

impl Feed {
    /// The bytes of a disk from `start` to `end`.
    #[must_use]
    pub fn disk(disk: Disk, start: u64, end: u64) -> Self {
        let runs = Runs::new(start, end);
        Self {
            source: Source::Disk { disk, runs },
            at: start,
            run_end: start,
            end,
        }
    }

    /// All that a stream has, no more than `room` bytes; filled up with zeroes to a whole block.
    #[must_use]
    pub fn stream(stream: Box<dyn Read + Send>, room: u64, block: usize) -> Self {
        Self {
            source: Source::Stream { stream, block },
            at: 0,
            run_end: 0,
            end: room,
        }
    }

    /// The next piece; a stream's is put into `buf`. Runs known to be zeroes are passed over.
    fn next(&mut self, buf: &mut [u8]) -> Result<Option<Piece>, CopyError> {
        let offset = self.at;
        let failed = |error: DiskError| CopyError::Read {
            offset,
            source: error,
        };
        match &mut self.source {
            Source::Disk { disk, runs } => {
                while self.at == self.run_end {
                    let Some((start, len)) = runs.next_data(disk).map_err(failed)? else {
                        (self.at, self.run_end) = (self.end, self.end);
                        return Ok(None);
                    };
                    // A disk may know of smaller blocks than the target takes; a block that two runs share
                    // is in the first.
                    let end = (start + len).next_multiple_of(ALIGNMENT).min(self.end);
                    self.at = (start - start % ALIGNMENT).max(self.run_end);
                    self.run_end = end.max(self.at);
                }
                // Up to a boundary, so that requests lie on whole pieces of the target.
                let piece = PIECE_BYTES as u64;
                let end = (self.at / piece + 1) * piece;
                let offset = self.at;
                self.at = end.min(self.run_end);
                let len = usize::try_from(self.at - offset).expect("a piece is short");
                Ok(Some(Piece {
                    offset,
                    len,
                    filled: false,
                }))
            }
            Source::Stream { stream, block } => {
                let n = read_full(stream, buf).map_err(|error| failed(error.into()))?;
                if n == 0 {
                    return Ok(None);
                }
                let len = n.next_multiple_of(*block).min(buf.len());
                buf[n..len].fill(0);
                self.at += len as u64;
                if self.at > self.end {
                    return Err(CopyError::TooLong { size: self.end });
                }
                Ok(Some(Piece {
                    offset,
                    len,
                    filled: true,
                }))
            }
        }
    }
}

/// How far a copy is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Progress {
    /// Everything before this byte is done: read, and written or found to be zeroes.
    pub done: u64,
    /// Bytes written.
    pub written: u64,
}

struct State {
    /// How far the feed is: everything before is done or under way.
    fed: u64,
    /// The pieces being worked at, by their offsets.
    under_way: BTreeSet<u64>,
    written: u64,
    /// The first error, which ends all.
    error: Option<CopyError>,
    working: usize,
}

struct Shared {
    /// Held while the next piece is waited for, which may take as long as a pipe's other end likes. Taken before
    /// `state`, never after it.
    feed: Mutex<Feed>,
    state: Mutex<State>,
    over: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A worker that panicked is found out when it is joined.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece, which is under way from now on; none at the end, and after an error.
    fn next(&self, buf: &mut [u8]) -> Result<Option<Piece>, CopyError> {
        let mut feed = self.feed.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lock().error.is_some() {
            return Ok(None);
        }
        let piece = feed.next(buf)?;
        // In one step, or what is done would pass the piece for a moment.
        let mut state = self.lock();
        state.fed = feed.at;
        state
            .under_way
            .extend(piece.as_ref().map(|piece| piece.offset));
        Ok(piece)
    }
}

/// A copy under way. Dropped, it goes on until its next pieces are done.
pub struct Copy {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Copy {
    /// Starts a copy of `feed`: each worker reads from the first disk of its pair (none: the feed is a
    /// stream) and writes to the second.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(feed: Feed, pairs: Vec<(Option<Disk>, Disk)>) -> io::Result<Self> {
        let state = State {
            fed: feed.at,
            under_way: BTreeSet::new(),
            written: 0,
            error: None,
            working: pairs.len(),
        };
        let shared = Arc::new(Shared {
            feed: Mutex::new(feed),
            state: Mutex::new(state),
            over: Condvar::new(),
        });
        let mut copy = Self {
            shared,
            workers: Vec::new(),
        };
        for (source, target) in pairs {
            let shared = Arc::clone(&copy.shared);
            let builder = std::thread::Builder::new().name("copy".to_owned());
            match builder.spawn(move || work(&shared, source, target)) {
                Ok(worker) => copy.workers.push(worker),
                Err(error) => {
                    copy.stop();
                    return Err(error);
                }
            }
        }
        Ok(copy)
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let state = self.shared.lock();
        let done = state.under_way.first().copied().unwrap_or(state.fed);
        Progress {
            done,
            written: state.written,
        }
    }

    /// Waits until it is over, at most so long; whether it is.
    #[must_use]
    pub fn wait(&self, time: Duration) -> bool {
        let state = self.shared.lock();
        let going = |state: &mut State| state.working > 0;
        let waited = self.shared.over.wait_timeout_while(state, time, going);
        waited.unwrap_or_else(PoisonError::into_inner).0.working == 0
    }

    /// Ends it after the pieces under way.
    pub fn stop(&self) {
        self.shared.lock().error.get_or_insert(CopyError::Stopped);
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The first that a worker had.
    ///
    /// # Panics
    /// If a worker did.
    pub fn finish(self) -> Result<Progress, CopyError> {
        for worker in self.workers {
            worker.join().expect("a copy's worker ends in good order");
        }
        let mut state = self.shared.lock();
        match state.error.take() {
            Some(error) => Err(error),
            None => Ok(Progress {
                done: state.fed,
                written: state.written,
            }),
        }
    }
}

fn work(shared: &Shared, mut source: Option<Disk>, mut target: Disk) {
    let ended = copy_pieces(shared, source.as_mut(), &mut target);
    let mut state = shared.lock();
    if let Err(error) = ended {
        state.error.get_or_insert(error);
    }
    state.working -= 1;
    shared.over.notify_all();
}

fn copy_pieces(
    shared: &Shared,
    mut source: Option<&mut Disk>,
    target: &mut Disk,
) -> Result<(), CopyError> {
    let mut buf = vec![0; PIECE_BYTES];
    loop {
        let Some(piece) = shared.next(&mut buf)? else {
            return Ok(());
        };
        let Piece { offset, len, .. } = piece;
        let data = &mut buf[..len];
        // A piece whose copy fails stays under way: what is done ends before it, for good.
        if let (false, Some(disk)) = (piece.filled, &mut source) {
            let read = disk.read_at(offset, data);
            read.map_err(|source| CopyError::Read { offset, source })?;
        }
        let mut written = 0;
        for (start, end) in data_in(data) {
            let at = offset + start as u64;
            let done = target.write_at(at, &data[start..end]);
            done.map_err(|source| CopyError::Write { offset: at, source })?;
            written += (end - start) as u64;
        }
        let mut state = shared.lock();
        state.under_way.remove(&offset);
        state.written += written;
    }
}

/// The runs of whole blocks in which not all bytes are zero.
fn data_in(data: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let mut at = 0;
    for block in data.chunks(ZERO_BLOCK) {
        let end = at + block.len();
        if !is_zero(block) {
            match runs.last_mut() {
                Some(last) if last.1 == at => last.1 = end,
                _ => runs.push((at, end)),
            }
        }
        at = end;
    }
    runs
}

fn is_zero(block: &[u8]) -> bool {
    // The first is, and each is as the one before it: one comparison of memory.
    block
        .split_last()
        .is_none_or(|(_, rest)| block[0] == 0 && *rest == block[1..])
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn file(size: u64) -> (Arc<File>, impl Fn() -> Disk) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(size).unwrap();
        let same = Arc::clone(&file);
        let disk = move || Disk::File {
            file: Arc::clone(&same),
            size,
        };
        (file, disk)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut all = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut all, 0).unwrap();
        all
    }

    const SIZE: u64 = (9 << 20) + 4096;

    fn source() -> (Arc<File>, impl Fn() -> Disk) {
        let (from, disk) = file(SIZE);
        for at in [0, (1 << 20) - 10, 4 << 20, SIZE - 1] {
            let some = [0x7b; 100];
            let there = usize::try_from(SIZE - at).unwrap().min(100);
            from.write_all_at(&some[..there], at).unwrap();
        }
        // Zeroes that take space.
        from.write_all_at(&vec![0; 1 << 20], 6 << 20).unwrap();
        (from, disk)
    }

    #[test]
    fn copy_of_a_disk_is_the_same_and_writes_no_zeroes() {
        let (from, source) = source();
        let (to, target) = file(SIZE);
        let pairs = (0..5).map(|_| (Some(source()), target())).collect();
        let copy = Copy::start(Feed::disk(source(), 0, SIZE), pairs).unwrap();
        while !copy.wait(Duration::from_secs(1)) {}
        let end = copy.finish().unwrap();
        assert_eq!(end.done, SIZE);
        assert!(content(&from) == content(&to));
        assert!(end.written <= 6 * ZERO_BLOCK as u64, "{}", end.written);
    }

    #[test]
    fn copy_from_the_middle_leaves_what_is_before() {
        let (_, source) = source();
        let (to, target) = file(SIZE);
        let start = (1 << 20) + 4096;
        let feed = Feed::disk(source(), start, SIZE);
        Copy::start(feed, vec![(Some(source()), target())])
            .unwrap()
            .finish()
            .unwrap();
        let to = content(&to);
        assert!(
            to[..usize::try_from(start).unwrap()]
                .iter()
                .all(|b| *b == 0)
        );
        assert_eq!(to[4 << 20], 0x7b);
    }

    #[test]
    fn copy_of_a_stream_is_the_same_and_one_too_long_is_an_error() {
        let bytes: Vec<u8> = (0..3_000_001_u32)
            .map(|n| u8::try_from(n / 7 % 251).unwrap())
            .collect();
        for (room, fits) in [(3_000_320, true), (2_999_808, false)] {
            let (to, target) = file(room);
            let feed = Feed::stream(Box::new(io::Cursor::new(bytes.clone())), room, 512);
            let pairs = (0..3).map(|_| (None, target())).collect();
            let ended = Copy::start(feed, pairs).unwrap().finish();
            if fits {
                assert_eq!(ended.unwrap().done, 3_000_320);
                assert!(content(&to)[..bytes.len()] == bytes);
            } else {
                assert!(matches!(ended, Err(CopyError::TooLong { .. })), "{ended:?}");
            }
        }
    }

    #[test]
    fn copy_of_a_stream_that_stalls_can_be_watched_and_stopped() {
        let (reader, writer) = io::pipe().unwrap();
        let (_, target) = file(SIZE);
        let feed = Feed::stream(Box::new(reader), SIZE, 512);
        let pairs = (0..3).map(|_| (None, target())).collect();
        let copy = Copy::start(feed, pairs).unwrap();
        assert!(!copy.wait(Duration::from_millis(50)));
        assert_eq!(copy.progress().done, 0);
        copy.stop();
        drop(writer);
        assert!(matches!(copy.finish(), Err(CopyError::Stopped)));
    }

    #[test]
    fn copy_that_cannot_write_never_says_that_it_is_further() {
        let (_, source) = source();
        let (_, target) = file(SIZE);
        // Where the other worker is so quick that this one has nothing to write, all is copied.
        let failed = (0..100).find_map(|_| {
            // Opened for reading only.
            let deaf = File::open("/dev/zero").unwrap();
            let broken = Disk::File {
                file: Arc::new(deaf),
                size: SIZE,
            };
            let feed = Feed::disk(source(), 0, SIZE);
            let pairs = vec![(Some(source()), broken), (Some(source()), target())];
            let copy = Copy::start(feed, pairs).unwrap();
            while !copy.wait(Duration::from_secs(1)) {}
            let done = copy.progress().done;
            copy.finish().err().map(|error| (done, error))
        });
        let (done, error) = failed.expect("it has something to write some time");
        assert!(done < SIZE);
        assert!(matches!(error, CopyError::Write { .. }), "{error}");
    }

    #[test]
    fn zeroes_are_found_whatever_their_alignment() {
        let mut bytes = vec![0; 4 * ZERO_BLOCK + 33];
        assert!(data_in(&bytes).is_empty());
        *bytes.last_mut().unwrap() = 1;
        bytes[ZERO_BLOCK] = 1;
        bytes[3 * ZERO_BLOCK - 1] = 1;
        let found = [(ZERO_BLOCK, 3 * ZERO_BLOCK), (4 * ZERO_BLOCK, bytes.len())];
        assert_eq!(data_in(&bytes), found);
        assert!(is_zero(&bytes[1..ZERO_BLOCK]));
        assert!(!is_zero(&bytes[1..=ZERO_BLOCK]));
    }
}
