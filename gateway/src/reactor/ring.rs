//! The reactor's io_uring: its setup with fall-backs, and a push that cannot fail.
//!
//! Owns: the ring, the table of registered buffer entries, and what the submission queue could not
//! hold. Does not own: any memory that an entry points to.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use io_uring::{IoUring, squeue, types};

/// Entries of the submission queue: a batch larger than this is submitted in parts.
pub(super) const SUBMISSION_ENTRIES: u32 = 1024;

/// Entries of the completion queue: completions past it are kept by the kernel and cost a syscall.
const COMPLETION_ENTRIES: u32 = 8 * SUBMISSION_ENTRIES;

/// Entries of the buffer table that are taken one by one, for the time of a request; the others are
/// taken by whole queues. More requests than these at once, of queues without entries of their own,
/// are copied.
const LOOSE_ENTRIES: u16 = 1024;

/// Indexes in the ring's table of registered files: of the cache device, and of its other file.
const CACHE_FILE: RawFd = 0;
const CACHE_PAGES_FILE: RawFd = 1;

/// A completion, copied out of the queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) user_data: u64,
    pub(super) result: i32,
    pub(super) flags: u32,
}

/// The file of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum File {
    /// The cache device.
    Cache,
    /// The cache device through the kernel's page cache; nobody's file if it is not there twice.
    CachePages,
    /// Any other.
    Fd(RawFd),
}

/// One io_uring of one thread.
pub(super) struct Ring {
    ring: IoUring,
    /// Entries that wait for room in the submission queue, in order.
    backlog: VecDeque<squeue::Entry>,
    /// Whether an entry of the registered buffer table is taken; empty without a table. Those that
    /// are taken one by one are behind these.
    buffer_entries: Vec<bool>,
    /// Entries to be taken one by one.
    loose_entries: Vec<u16>,
    cache_fd: RawFd,
    /// The same as [`Ring::cache_fd`] if there is no other: the table has two places either way.
    cache_pages_fd: RawFd,
    cache_registered: bool,
}

impl Ring {
    /// A ring with `buffer_entries` sparse registered buffers (0: none). Must be called on the
    /// thread that will use it.
    pub(super) fn new(
        cache_fd: RawFd,
        cache_pages_fd: Option<RawFd>,
        buffer_entries: u16,
    ) -> io::Result<Self> {
        let ring = build()?;
        let (mut taken, mut loose) = (Vec::new(), Vec::new());
        if buffer_entries > 0 {
            match ring
                .submitter()
                .register_buffers_sparse(u32::from(buffer_entries))
            {
                Ok(()) => {
                    let first_loose = buffer_entries - LOOSE_ENTRIES.min(buffer_entries / 2);
                    taken = vec![false; usize::from(first_loose)];
                    loose = (first_loose..buffer_entries).rev().collect();
                }
                Err(error) => {
                    tracing::warn!(%error, "no registered buffer table: ublk devices copy their data");
                }
            }
        }
        let cache_pages_fd = cache_pages_fd.unwrap_or(cache_fd);
        let files = [cache_fd, cache_pages_fd];
        let cache_registered = ring.submitter().register_files(&files).is_ok();
        Ok(Self {
            ring,
            backlog: VecDeque::new(),
            buffer_entries: taken,
            loose_entries: loose,
            cache_fd,
            cache_pages_fd,
            cache_registered,
        })
    }

    /// The entry for `file` that `make` makes, by way of the table of registered files where it is in it.
    pub(super) fn entry_for(
        &self,
        file: File,
        make: impl FnOnce(types::Fd) -> squeue::Entry,
    ) -> squeue::Entry {
        let (registered, fd) = match file {
            File::Cache => (CACHE_FILE, self.cache_fd),
            File::CachePages => (CACHE_PAGES_FILE, self.cache_pages_fd),
            File::Fd(fd) => return make(types::Fd(fd)),
        };
        match self.cache_registered {
            true => make(types::Fd(registered)).flags(squeue::Flags::FIXED_FILE),
            false => make(types::Fd(fd)),
        }
    }

    /// Queues an entry for the next submission.
    ///
    /// # Safety
    /// All that the entry points to must stay valid until its final completion.
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: the caller's promise.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    /// Submits all that was pushed and waits for a completion; with `wait` false, for none.
    pub(super) fn submit(&mut self, wait: bool) -> io::Result<()> {
        loop {
            self.refill();
            let more = !self.backlog.is_empty();
            let want = usize::from(wait && !more);
            match self.ring.submit_and_wait(want) {
                Ok(_) => {}
                // A signal: what was to be submitted is, or will be in the next round.
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The kernel holds completions that the queue had no room for, or is short of
                // memory: it wants completions taken before it goes on.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
            if !more || !self.ring.completion().is_empty() {
                return Ok(());
            }
        }
    }

    fn refill(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: whoever pushed it vouched for it until its completion.
            if unsafe { queue.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }

    /// Moves all completions that are there into `out`.
    pub(super) fn completions(&mut self, out: &mut Vec<Completion>) {
        out.extend(self.ring.completion().map(|entry| Completion {
            user_data: entry.user_data(),
            result: entry.result(),
            flags: entry.flags(),
        }));
    }

    /// See [`super::Port::take_buffer_entries`]: first fit.
    pub(super) fn take_buffer_entries(&mut self, count: u16) -> Option<u16> {
        let count = usize::from(count);
        if count == 0 {
            return None;
        }
        let first = self
            .buffer_entries
            .windows(count)
            .position(|run| run.iter().all(|taken| !taken))?;
        self.buffer_entries[first..first + count].fill(true);
        u16::try_from(first).ok()
    }

    /// See [`super::Port::has_buffer_table`].
    pub(super) fn has_buffer_table(&self) -> bool {
        !self.buffer_entries.is_empty()
    }

    /// See [`super::Port::take_loose_entry`].
    pub(super) fn take_loose_entry(&mut self) -> Option<u16> {
        self.loose_entries.pop()
    }

    /// See [`super::Port::give_loose_entry`].
    pub(super) fn give_loose_entry(&mut self, entry: u16) {
        assert!(
            usize::from(entry) >= self.buffer_entries.len(),
            "an entry that belongs to a queue is given back alone"
        );
        self.loose_entries.push(entry);
    }

    /// See [`super::Port::give_buffer_entries`].
    pub(super) fn give_buffer_entries(&mut self, first: u16, count: u16) {
        let run =
            &mut self.buffer_entries[usize::from(first)..usize::from(first) + usize::from(count)];
        assert!(
            run.iter().all(|taken| *taken),
            "buffer entries that were not taken are given back"
        );
        run.fill(false);
    }
}

/// The ring with the best flags that this kernel takes.
fn build() -> io::Result<IoUring> {
    let mut first = IoUring::builder();
    first
        .setup_cqsize(COMPLETION_ENTRIES)
        .setup_clamp()
        .setup_submit_all();
    let mut best = first.clone();
    best.setup_single_issuer().setup_defer_taskrun();
    let mut second = first.clone();
    second.setup_coop_taskrun();
    let mut plain = IoUring::builder();
    plain.setup_cqsize(COMPLETION_ENTRIES).setup_clamp();
    let mut last = None;
    for builder in [best, second, first, plain] {
        match builder.build(SUBMISSION_ENTRIES) {
            Ok(ring) => return Ok(ring),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::from_raw_os_error(libc::ENOSYS)))
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::fd::AsRawFd;

    use io_uring::opcode;

    use super::*;

    pub(in crate::reactor) fn bytes(entry: squeue::Entry) -> [u8; 64] {
        // SAFETY: the kernel's struct, 64 bytes by their numbers, all of them set.
        unsafe { std::mem::transmute::<squeue::Entry, [u8; 64]>(entry) }
    }

    fn ring() -> (Ring, std::fs::File) {
        let file = std::fs::File::open("/dev/null").unwrap();
        (Ring::new(file.as_raw_fd(), None, 16).unwrap(), file)
    }

    #[test]
    fn ring_with_more_entries_than_its_queue_completes_each_once() {
        let (mut ring, _file) = ring();
        let count = u64::from(COMPLETION_ENTRIES) + 3 * u64::from(SUBMISSION_ENTRIES) + 5;
        for n in 0..count {
            // SAFETY: a no-op points to nothing.
            unsafe { ring.push(opcode::Nop::new().build().user_data(n)) };
        }
        let mut seen = Vec::new();
        while (seen.len() as u64) < count {
            ring.submit(true).unwrap();
            ring.completions(&mut seen);
        }
        let mut names: Vec<u64> = seen.iter().map(|c| c.user_data).collect();
        names.sort_unstable();
        assert!(names.iter().copied().eq(0..count));
    }

    #[test]
    fn entry_for_a_registered_file_is_what_the_library_makes_of_its_index() {
        let (ring, _file) = ring();
        assert!(ring.cache_registered);
        let made = ring.entry_for(File::CachePages, |fd| opcode::Fsync::new(fd).build());
        let index = types::Fixed(CACHE_PAGES_FILE.cast_unsigned());
        assert_eq!(bytes(made), bytes(opcode::Fsync::new(index).build()));
    }

    #[test]
    fn buffer_entries_are_taken_first_fit_and_come_back() {
        let (mut ring, _file) = ring();
        assert_eq!(ring.take_buffer_entries(3), Some(0));
        assert_eq!(ring.take_buffer_entries(4), Some(3));
        assert_eq!(ring.take_buffer_entries(2), None);
        ring.give_buffer_entries(0, 3);
        assert_eq!(ring.take_buffer_entries(2), Some(0));
        assert_eq!(ring.take_buffer_entries(0), None);
    }

    #[test]
    fn loose_entries_are_none_of_the_queues_and_come_back() {
        let (mut ring, _file) = ring();
        let taken: Vec<u16> = std::iter::from_fn(|| ring.take_loose_entry()).collect();
        assert!(taken.iter().copied().eq(8..16));
        assert_eq!(ring.take_buffer_entries(8), Some(0));
        ring.give_loose_entry(11);
        assert_eq!(ring.take_loose_entry(), Some(11));
    }
}
