//! The memory in which chunks are made, kept for the next ones: had from the kernel anew, megabytes for each chunk would be
//! zeroed and paged in each time, which costs as much as all else that is done to them but signing.
//!
//! **Invariant:** what is kept is bounded in number and size, and given back when nobody has made a chunk for a while.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use quarry_cache::AlignedBuf;
use tokio::runtime::Handle;

/// Buffers of each kind that are kept at most: as many as a daemon uploads at once. No more are than were in use at once,
/// so that keeping them never makes the most memory more.
const KEPT_MAX: usize = 16;

/// A buffer larger than this is not kept: of a chunk as large as they are by default.
const KEPT_BYTES_MAX: usize = 9 << 20;

/// How long buffers are kept that nobody uses.
const KEPT_TIME: Duration = Duration::from_secs(2);

/// See the module's words. Cheap to clone: all clones are one.
#[derive(Clone, Default)]
pub struct Buffers(Option<Arc<Pool>>);

struct Pool {
    kept: Mutex<Kept>,
    runtime: Handle,
}

#[derive(Default)]
struct Kept {
    raw: Stack<AlignedBuf>,
    encoded: Stack<Vec<u8>>,
    /// Somebody looks.
    watched: bool,
}

impl Buffers {
    /// Kept for reuse; [`Buffers::default`] keeps none.
    #[must_use]
    pub fn kept(runtime: Handle) -> Self {
        let kept = Mutex::default();
        Self(Some(Arc::new(Pool { kept, runtime })))
    }

    /// Memory for what a chunk holds, of this length; its content is of before, or zero.
    pub(super) fn raw(&self, len: usize) -> AlignedBuf {
        let kept = self.0.as_ref().and_then(|pool| pool.kept.lock().raw.take());
        match kept {
            Some(mut kept) => {
                kept.set_len(len);
                kept
            }
            None => AlignedBuf::zeroed(len),
        }
    }

    pub(super) fn give_raw(&self, buffer: AlignedBuf) {
        if buffer.capacity() <= KEPT_BYTES_MAX {
            self.give(|kept| &mut kept.raw, buffer);
        }
    }

    /// Memory for a chunk.
    pub(super) fn encoded(&self) -> Vec<u8> {
        let kept = self.0.as_ref();
        let kept = kept.and_then(|pool| pool.kept.lock().encoded.take());
        kept.unwrap_or_default()
    }

    /// What is in it from `start` on; its memory comes back when that is dropped.
    pub(super) fn lend(&self, buffer: Vec<u8>, start: usize) -> Bytes {
        let lent = Lent {
            buffer,
            of: self.clone(),
        };
        Bytes::from_owner(lent).slice(start..)
    }

    fn give<T>(&self, of: impl FnOnce(&mut Kept) -> &mut Stack<T>, buffer: T) {
        let Some(pool) = &self.0 else {
            return;
        };
        let mut kept = pool.kept.lock();
        let is_watched = mem::replace(&mut kept.watched, true);
        let of = of(&mut kept);
        if of.buffers.len() < KEPT_MAX {
            of.buffers.push(buffer);
        }
        drop(kept);
        if !is_watched {
            pool.runtime.spawn(watch(Arc::clone(pool)));
        }
    }
}

/// Buffers of a kind, of which the newest is taken first.
struct Stack<T> {
    buffers: Vec<T>,
    /// How many were never taken since somebody last looked.
    idle: usize,
}

impl<T> Default for Stack<T> {
    fn default() -> Self {
        Self {
            buffers: Vec::new(),
            idle: 0,
        }
    }
}

impl<T> Stack<T> {
    fn take(&mut self) -> Option<T> {
        let taken = self.buffers.pop();
        self.idle = self.buffers.len().min(self.idle);
        taken
    }

    /// Gives up the oldest, as many as nobody took.
    fn give_up(&mut self) {
        self.buffers.drain(..self.idle);
        self.idle = self.buffers.len();
    }
}

/// Gives back those that nobody has taken for [`KEPT_TIME`].
async fn watch(pool: Arc<Pool>) {
    loop {
        tokio::time::sleep(KEPT_TIME).await;
        let mut kept = pool.kept.lock();
        let kept = &mut *kept;
        kept.raw.give_up();
        kept.encoded.give_up();
        if kept.raw.buffers.is_empty() && kept.encoded.buffers.is_empty() {
            kept.watched = false;
            return;
        }
    }
}

struct Lent {
    buffer: Vec<u8>,
    of: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.buffer.capacity() <= KEPT_BYTES_MAX {
            self.of
                .give(|kept| &mut kept.encoded, mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn buffers_come_back_are_bounded_and_given_up_when_nobody_uses_them() {
        let buffers = Buffers::kept(Handle::current());
        let lent: Vec<Bytes> = (0..KEPT_MAX + 2)
            .map(|_| buffers.lend(vec![7; 4096], 96))
            .collect();
        assert!(lent.iter().all(|bytes| bytes.len() == 4000));
        drop(lent);
        buffers.give_raw(buffers.raw(8192));
        let count = || {
            let kept = buffers.0.as_ref().unwrap().kept.lock();
            (kept.raw.buffers.len(), kept.encoded.buffers.len())
        };
        assert_eq!(count(), (1, KEPT_MAX));
        assert_eq!(buffers.raw(512).len(), 512);
        assert_eq!(count(), (0, KEPT_MAX));
        drop(buffers.lend(vec![0; KEPT_BYTES_MAX + 1], 0));
        assert_eq!(count(), (0, KEPT_MAX), "one that is too large");
        tokio::time::sleep(3 * KEPT_TIME).await;
        assert_eq!(count(), (0, 0));
        // And again.
        drop(buffers.lend(vec![7; 4096], 0));
        assert_eq!(count(), (0, 1));
        tokio::time::sleep(3 * KEPT_TIME).await;
        assert_eq!(count(), (0, 0));
    }
}
