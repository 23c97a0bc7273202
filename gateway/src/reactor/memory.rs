//! Memory that the kernel reads and writes: page-aligned buffers, and pools of them with a cap.
//!
//! Owns: the allocations. Invariant: a buffer's address does not change while it lives, so that
//! moving its owner is no matter to a ring operation under way.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::mem;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

/// Alignment of every buffer, in bytes: what direct I/O needs on any device.
pub(crate) const ALIGNMENT: usize = 4096;

/// Size classes of a pool: 4 KiB << 0 up to 4 KiB << 13 = 32 MiB.
const CLASSES: usize = 14;

/// The largest buffer that a pool gives, in bytes.
pub(crate) const POOLED_BYTES_MAX: usize = ALIGNMENT << (CLASSES - 1);

/// A page-aligned allocation.
pub(crate) struct AlignedBuf {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its memory, like a `Box<[u8]>`.
unsafe impl Send for AlignedBuf {}

impl AlignedBuf {
    /// `bytes` zeroed bytes, rounded up to whole pages.
    ///
    /// # Panics
    /// If `bytes` is larger than the address space.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        let size = bytes.max(1).next_multiple_of(ALIGNMENT);
        let layout =
            Layout::from_size_align(size, ALIGNMENT).expect("a buffer fits the address space");
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else {
            handle_alloc_error(layout)
        };
        Self { ptr, layout }
    }

    /// Where it starts.
    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Its length in bytes.
    pub(crate) fn capacity(&self) -> usize {
        self.layout.size()
    }

    /// The byte at `at` and all after it, as an address for the kernel.
    ///
    /// # Panics
    /// If `at` is behind the end.
    pub(crate) fn ptr_at(&self, at: usize) -> NonNull<u8> {
        assert!(at <= self.capacity(), "an address behind a buffer's end");
        // SAFETY: `at` is inside the allocation or one past it.
        unsafe { self.ptr.add(at) }
    }

    /// Copies `bytes` to `at`. No ring operation may be using that part.
    ///
    /// # Panics
    /// If they do not fit.
    pub(crate) fn copy_in(&mut self, at: usize, bytes: &[u8]) {
        assert!(
            at <= self.capacity() && bytes.len() <= self.capacity() - at,
            "more bytes than the buffer holds"
        );
        // SAFETY: the destination lies inside the allocation by the line above, and `bytes` cannot
        // overlap it, for no reference into it is ever given out together with `&mut self`.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr.add(at).as_ptr(), bytes.len())
        };
    }

    /// The first `len` bytes, to be changed. No ring operation may be using them.
    ///
    /// # Panics
    /// If there are not so many.
    pub(crate) fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.capacity(), "more bytes than the buffer holds");
        // SAFETY: as in `bytes`, and `&mut self` is the only way to it.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), len) }
    }

    /// The first `len` bytes. No ring operation may be writing them.
    ///
    /// # Panics
    /// If there are not so many.
    pub(crate) fn bytes(&self, len: usize) -> &[u8] {
        assert!(len <= self.capacity(), "more bytes than the buffer holds");
        // SAFETY: the allocation is initialised (zeroed) and at least `len` long.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and only once freed.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) };
    }
}

/// Buffers that others had, which come back from whichever thread drops them.
#[derive(Default)]
struct Returned {
    /// Which those that are kept are counted in; none: in none.
    budget: Option<Arc<Budget>>,
    buffers: Vec<AlignedBuf>,
    /// How many bytes of them are kept.
    bytes_max: usize,
}

impl Returned {
    fn bytes(&self) -> usize {
        self.buffers.iter().map(AlignedBuf::capacity).sum()
    }

    /// Keeps one, which the budget has then, if there is room and the budget is ample.
    fn add(&mut self, buffer: AlignedBuf) {
        let size = buffer.capacity();
        if self.bytes() + size > self.bytes_max {
            return;
        }
        if let Some(budget) = &self.budget {
            if !budget.is_ample() {
                return;
            }
            budget.take(size);
        }
        self.buffers.push(buffer);
    }

    fn trim(&mut self) {
        let mut bytes = self.bytes();
        while bytes > self.bytes_max
            && let Some(buffer) = self.buffers.pop()
        {
            bytes -= buffer.capacity();
            if let Some(budget) = &self.budget {
                budget.give(buffer.capacity());
            }
        }
    }
}

/// From now on no more than so many bytes are kept of what comes back.
fn keep(returned: &Mutex<Returned>, bytes_max: usize) {
    let mut returned = returned.lock();
    returned.bytes_max = bytes_max;
    returned.trim();
}

/// A buffer that others read; its memory goes back to its pool.
struct Lent {
    buffer: Option<AlignedBuf>,
    len: usize,
    to: Arc<Mutex<Returned>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        let buffer = self.buffer.as_ref();
        buffer.map_or(&[], |buffer| buffer.bytes(self.len))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.to.lock().add(buffer);
        }
    }
}

/// Memory that the pools of all budgets may have together.
#[derive(Debug)]
pub(crate) struct Total {
    used: AtomicUsize,
    max: usize,
}

impl Total {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            max,
        })
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// Memory that some pools may have together, out or kept for reuse; what is lent is not theirs until it came back and is kept.
#[derive(Debug)]
pub(crate) struct Budget {
    used: AtomicUsize,
    max: usize,
    /// So much may be out whatever the pools of others have, and whatever those of its own keep.
    min: usize,
    /// What is out of each pool: a number each, for they change with every request, on several threads.
    out: Mutex<Vec<Arc<AtomicUsize>>>,
    total: Arc<Total>,
}

/// A pool with nothing out may have so much, whatever its budget says: each client has one request at least.
const ALWAYS_BYTES: usize = 1 << 20;

impl Budget {
    pub(crate) fn new(total: &Arc<Total>, min: usize, max: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            max,
            min,
            out: Mutex::default(),
            total: Arc::clone(total),
        })
    }

    /// Takes so much for a pool that has `held`, if there is so much to be had: a pool has no more than is left to the others then,
    /// so that a few clients that do not take their replies never have all. What two take at the same moment may be past the
    /// bounds by the one, and of the total each budget may have its least past the bound: what others keep, nobody can have back.
    fn try_take(&self, bytes: usize, held: usize) -> bool {
        let own = self.used.load(Ordering::Relaxed) + bytes;
        let is_there =
            self.total.used() + bytes <= self.total.max || self.out() + bytes <= self.min;
        let fits = is_there && held + bytes <= self.max.saturating_sub(own);
        if fits {
            self.take(bytes);
        }
        fits
    }

    /// Bytes in use but for what is only kept.
    fn out(&self) -> usize {
        let all = self.out.lock();
        all.iter().map(|out| out.load(Ordering::Relaxed)).sum()
    }

    fn take(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.total.used.fetch_add(bytes, Ordering::Relaxed);
    }

    fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        self.total.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether there is enough left for pools to keep what they do not use.
    fn is_ample(&self) -> bool {
        self.used.load(Ordering::Relaxed) <= self.max / 2 && self.total.used() <= self.total.max / 2
    }
}

/// Buffers of power-of-two sizes, kept for reuse, with a cap on what is out.
///
/// What a buffer held stays in it: of one that serves several clients no more may leave than was written to it since.
pub(crate) struct Pool {
    /// Which what is out, what is free and what came back is counted in; none: in none.
    budget: Option<Arc<Budget>>,
    free: [Vec<AlignedBuf>; CLASSES],
    free_bytes: usize,
    out_bytes: usize,
    /// The same, for the budget.
    out_told: Arc<AtomicUsize>,
    out_bytes_max: usize,
    free_bytes_max: usize,
    /// The same while some are out.
    busy_bytes_max: usize,
    /// Those that were lent come back here; none: none was.
    returned: Option<Arc<Mutex<Returned>>>,
    /// How many bytes of those are kept.
    returned_bytes_max: usize,
}

impl Pool {
    /// A pool with at most `out_bytes_max` in use and `free_bytes_max` kept for reuse.
    pub(crate) fn new(out_bytes_max: usize, free_bytes_max: usize) -> Self {
        Self {
            budget: None,
            free: std::array::from_fn(|_| Vec::new()),
            free_bytes: 0,
            out_bytes: 0,
            out_told: Arc::default(),
            out_bytes_max,
            free_bytes_max,
            busy_bytes_max: free_bytes_max,
            returned: None,
            returned_bytes_max: 0,
        }
    }

    /// As long as some are out, so much is kept: who sends one large request after another has the memory of those before,
    /// and who is idle holds little.
    pub(crate) const fn keeping_while_busy(mut self, bytes: usize) -> Self {
        self.busy_bytes_max = bytes;
        self
    }

    /// What it has is of this budget. Before anything is taken.
    pub(crate) fn within(mut self, budget: Arc<Budget>) -> Self {
        debug_assert_eq!((self.out_bytes, self.free_bytes), (0, 0));
        budget.out.lock().push(Arc::clone(&self.out_told));
        self.budget = Some(budget);
        self
    }

    /// A buffer of at least `bytes`; `None` while the cap, or the budget, is reached. With nothing out the cap never is,
    /// so that a single large request is never stuck.
    ///
    /// # Panics
    /// If `bytes` is more than [`POOLED_BYTES_MAX`].
    pub(crate) fn take(&mut self, bytes: usize) -> Option<AlignedBuf> {
        assert!(
            bytes <= POOLED_BYTES_MAX,
            "a pool has no buffer of this size"
        );
        let class = class_of(bytes);
        let size = ALIGNMENT << class;
        if self.out_bytes > 0 && self.out_bytes.saturating_add(size) > self.out_bytes_max {
            return None;
        }
        if self.free[class].is_empty() {
            self.collect();
        }
        let buf = match self.free[class].pop() {
            Some(buf) => {
                self.free_bytes -= size;
                buf
            }
            None if self.charge(size) => AlignedBuf::zeroed(size),
            None => return None,
        };
        self.set_out(self.out_bytes + size);
        Some(buf)
    }

    fn set_out(&mut self, bytes: usize) {
        self.out_bytes = bytes;
        self.out_told.store(bytes, Ordering::Relaxed);
    }

    /// So much more is its own; whether the budget had it. What is only kept is given up for that.
    fn charge(&mut self, bytes: usize) -> bool {
        let Some(budget) = self.budget.clone() else {
            return true;
        };
        if self.out_bytes == 0 && bytes <= ALWAYS_BYTES {
            budget.take(bytes);
            return true;
        }
        while !budget.try_take(bytes, self.out_bytes + self.free_bytes) {
            if !self.give_up_largest() {
                return false;
            }
        }
        true
    }

    /// Gives up the largest of what it keeps; whether there was one.
    fn give_up_largest(&mut self) -> bool {
        let Some(largest) = self.free.iter_mut().rev().find_map(Vec::pop) else {
            return false;
        };
        self.free_bytes -= largest.capacity();
        self.discharge(largest.capacity());
        true
    }

    fn discharge(&self, bytes: usize) {
        if let Some(budget) = &self.budget {
            budget.give(bytes);
        }
    }

    /// Takes a buffer back.
    pub(crate) fn give(&mut self, buf: AlignedBuf) {
        let size = buf.capacity();
        self.set_out(self.out_bytes - size);
        if self
            .budget
            .as_ref()
            .is_some_and(|budget| !budget.is_ample())
        {
            self.discharge(size);
            return self.trim();
        }
        self.free_bytes += size;
        self.free[class_of(size)].push(buf);
        self.trim();
    }

    /// The first `len` bytes of a buffer, for others to read, whoever they are; it is in use no more, and its memory comes back
    /// when they drop it, or is freed then if the budget is not ample.
    ///
    /// # Panics
    /// If it is not as long.
    pub(crate) fn lend(&mut self, buf: AlignedBuf, len: usize) -> Bytes {
        assert!(len <= buf.capacity(), "more bytes than the buffer holds");
        self.set_out(self.out_bytes - buf.capacity());
        self.discharge(buf.capacity());
        let budget = &self.budget;
        let to = Arc::clone(self.returned.get_or_insert_with(|| {
            Arc::new(Mutex::new(Returned {
                budget: budget.clone(),
                ..Returned::default()
            }))
        }));
        self.trim();
        Bytes::from_owner(Lent {
            buffer: Some(buf),
            len,
            to,
        })
    }

    /// Takes back those that were lent and dropped, which are counted already.
    fn collect(&mut self) {
        let Some(returned) = &self.returned else {
            return;
        };
        let back = mem::take(&mut returned.lock().buffers);
        for buf in back {
            self.free_bytes += buf.capacity();
            self.free[class_of(buf.capacity())].push(buf);
        }
    }

    /// Gives up what is more than is kept.
    fn trim(&mut self) {
        let kept_max = match self.out_bytes {
            0 => self.free_bytes_max,
            _ => self.busy_bytes_max,
        };
        if let Some(returned) = &self.returned
            && self.returned_bytes_max != kept_max
        {
            self.returned_bytes_max = kept_max;
            keep(returned, kept_max);
        }
        while self.free_bytes > kept_max && self.give_up_largest() {}
    }

    /// Bytes in use.
    #[cfg(test)]
    pub(crate) fn out_bytes(&self) -> usize {
        self.out_bytes
    }
}

impl Drop for Pool {
    /// What comes back from now on is for nobody.
    fn drop(&mut self) {
        if let Some(returned) = &self.returned {
            keep(returned, 0);
        }
        // Buffers that are out go with whoever has the pool.
        self.discharge(self.out_bytes + self.free_bytes);
        if let Some(budget) = &self.budget {
            let mut all = budget.out.lock();
            all.retain(|out| !Arc::ptr_eq(out, &self.out_told));
        }
    }
}

/// The smallest class whose buffers hold `bytes`.
fn class_of(bytes: usize) -> usize {
    let pages = bytes.div_ceil(ALIGNMENT).max(1);
    pages.next_power_of_two().trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_at_its_cap_gives_none_until_one_comes_back() {
        let mut pool = Pool::new(16 << 10, 16 << 10);
        let a = pool.take(5000).unwrap();
        assert_eq!(a.capacity(), 8192);
        let b = pool.take(8192).unwrap();
        assert!(pool.take(1).is_none());
        pool.give(a);
        let c = pool.take(4096).unwrap();
        pool.give(b);
        pool.give(c);
        assert_eq!(pool.out_bytes(), 0);
    }

    #[test]
    fn pool_with_nothing_out_gives_more_than_its_cap() {
        let mut pool = Pool::new(4096, 0);
        let a = pool.take(POOLED_BYTES_MAX).unwrap();
        assert_eq!(a.capacity(), POOLED_BYTES_MAX);
        assert!(pool.take(1).is_none());
        pool.give(a);
        assert!(pool.take(1).is_some());
    }

    #[test]
    fn pool_keeps_more_while_some_are_out() {
        const MIB: usize = 1 << 20;
        let mut pool = Pool::new(64 * MIB, 2 * MIB).keeping_while_busy(4 * MIB);
        let out: Vec<_> = (0..8).map(|_| pool.take(MIB).unwrap()).collect();
        let mut kept = Vec::new();
        for buf in out {
            pool.give(buf);
            kept.push(pool.free_bytes / MIB);
        }
        assert_eq!(kept, [1, 2, 3, 4, 4, 4, 4, 2]);
    }

    #[test]
    fn pools_share_their_budget_and_none_has_all_of_it() {
        const MIB: usize = 1 << 20;
        let total = Total::new(20 * MIB);
        let budgets = [(); 2].map(|()| Budget::new(&total, 8 * MIB, 16 * MIB));
        let pool = |of: usize| Pool::new(64 * MIB, 4 * MIB).within(Arc::clone(&budgets[of]));
        let take_all =
            |pool: &mut Pool| -> Vec<_> { std::iter::from_fn(|| pool.take(MIB)).collect() };
        let (mut first, mut second, mut third, mut other) = (pool(0), pool(0), pool(0), pool(1));
        let out = [&mut first, &mut second, &mut third].map(take_all);
        assert_eq!(out.each_ref().map(Vec::len), [8, 4, 2]);
        // What others have leaves a budget its least.
        let of_other = take_all(&mut other);
        assert_eq!(of_other.len(), 8);
        let small = pool(0).take(ALWAYS_BYTES);
        assert!(small.is_some(), "each has one request at least");
        // Nothing is kept while there is little left, and what is lent is others'.
        let [mut out, ..] = out;
        first.give(out.pop().unwrap());
        assert_eq!(first.free_bytes, 0);
        let before = total.used();
        let lent = first.lend(out.pop().unwrap(), 10);
        assert_eq!(total.used(), before - MIB);
        drop((first, second, third, other, lent));
        assert_eq!(total.used(), 0);
    }

    /// Its idle clients' memory had used up the tenant's part, and larger requests waited for other tenants' clients.
    #[test]
    fn what_idle_pools_keep_leaves_a_budget_its_least() {
        const MIB: usize = 1 << 20;
        let total = Total::new(20 * MIB);
        let budgets = [(); 2].map(|()| Budget::new(&total, 8 * MIB, 16 * MIB));
        let pool = |of: usize| Pool::new(64 * MIB, 4 * MIB).within(Arc::clone(&budgets[of]));
        let take_all =
            |pool: &mut Pool| -> Vec<_> { std::iter::from_fn(|| pool.take(MIB)).collect() };
        let mut idle = [pool(0), pool(0)];
        let out = idle
            .each_mut()
            .map(|pool| [(); 4].map(|()| pool.take(MIB).unwrap()));
        for (pool, out) in idle.iter_mut().zip(out) {
            out.into_iter().for_each(|buf| pool.give(buf));
        }
        assert_eq!(idle.each_ref().map(|pool| pool.free_bytes), [4 * MIB; 2]);
        let mut others = [pool(1), pool(1)];
        let of_others = others.each_mut().map(take_all);
        assert_eq!(of_others.each_ref().map(Vec::len), [8, 4]);
        assert_eq!(total.used(), 20 * MIB, "there is no more");

        let mut busy = pool(0);
        assert!(busy.take(2 * MIB).is_some());
        let rest = take_all(&mut busy);
        assert_eq!((rest.len(), total.used()), (2, 24 * MIB));
        // What is kept may be used again, and no more than its least is had beside others' memory.
        let again = idle.each_mut().map(take_all);
        assert_eq!(again.each_ref().map(Vec::len), [4, 4]);
        assert!(pool(0).take(2 * MIB).is_none());
        assert_eq!(total.used(), 24 * MIB);
        drop((idle, others, busy));
        assert_eq!((total.used(), budgets[0].out()), (0, 0));
    }

    #[test]
    fn what_a_pool_keeps_is_given_up_for_another_size() {
        const MIB: usize = 1 << 20;
        let total = Total::new(32 * MIB);
        let budget = Budget::new(&total, 0, 16 * MIB);
        let mut pool = Pool::new(64 * MIB, 8 * MIB).within(budget);
        let out: Vec<_> = (0..6).map(|_| pool.take(MIB).unwrap()).collect();
        out.into_iter().for_each(|buf| pool.give(buf));
        assert_eq!((pool.free_bytes, total.used()), (6 * MIB, 6 * MIB));
        assert!(pool.take(4 * MIB).is_some());
        assert_eq!((pool.free_bytes, total.used()), (4 * MIB, 8 * MIB));
    }

    #[test]
    fn buffers_that_are_lent_are_out_no_more_and_come_back_when_they_are_dropped() {
        const MIB: usize = 1 << 20;
        let mut pool = Pool::new(4 * MIB, MIB).keeping_while_busy(2 * MIB);
        let (mut places, mut lent) = (Vec::new(), Vec::new());
        for n in 0..8 {
            let mut buf = pool.take(MIB).unwrap();
            buf.copy_in(0, &[n; 10]);
            places.push(buf.ptr());
            lent.push(pool.lend(buf, 10));
        }
        assert_eq!(pool.out_bytes(), 0);
        assert!((0..8).zip(&lent).all(|(n, bytes)| *bytes == [n; 10][..]));
        let busy = pool.take(MIB).unwrap();
        std::thread::spawn(move || drop(lent)).join().unwrap();
        // Two of them were kept.
        let again: Vec<_> = (0..3).map(|_| pool.take(MIB).unwrap()).collect();
        let known = |buf: &&AlignedBuf| places.contains(&buf.ptr());
        assert!(again[..2].iter().all(|buf| known(&buf)));
        // And one, when nobody is busy any more.
        let lent: Vec<_> = again.into_iter().map(|buf| pool.lend(buf, MIB)).collect();
        drop(lent);
        pool.give(busy);
        let returned = pool.returned.as_ref().unwrap().lock().buffers.len();
        assert_eq!(returned, 1);
    }

    #[test]
    fn buffers_that_come_back_are_within_the_budget_of_their_pools() {
        const PIECE: usize = 64 << 10;
        let total = Total::new(64 * PIECE);
        let budget = Budget::new(&total, 0, 32 * PIECE);
        let mut pools: Vec<_> = (0..100)
            .map(|_| Pool::new(64 * PIECE, 4 * PIECE).within(Arc::clone(&budget)))
            .collect();
        let mut lent: [Vec<Bytes>; 5] = Default::default();
        for pool in &mut pools {
            let out = [(); 5].map(|()| pool.take(PIECE).unwrap());
            for (lent, buf) in lent.iter_mut().zip(out) {
                lent.push(pool.lend(buf, PIECE));
            }
        }
        assert_eq!(total.used(), 0, "what is lent is others'");
        let [late, back @ ..] = lent;
        let threads = back.map(|back| std::thread::spawn(move || drop(back)));
        for thread in threads {
            thread.join().unwrap();
        }
        let returned = |pool: &Pool| pool.returned.as_ref().unwrap().lock().bytes();
        let kept: usize = pools.iter().map(returned).sum();
        // Half of the budget, and one more of each thread.
        assert!((17..=20).contains(&(kept / PIECE)), "{kept}");
        assert_eq!(total.used(), kept);
        drop(pools);
        assert_eq!(total.used(), 0);
        drop(late);
        assert_eq!(total.used(), 0, "kept for nobody");
    }

    #[test]
    fn buffers_that_come_back_and_are_taken_again_are_counted_once() {
        const MIB: usize = 1 << 20;
        let total = Total::new(64 * MIB);
        let budget = Budget::new(&total, 0, 32 * MIB);
        let mut pool = Pool::new(64 * MIB, MIB)
            .keeping_while_busy(2 * MIB)
            .within(budget);
        let [busy, out @ ..] = [(); 4].map(|()| pool.take(MIB).unwrap());
        let lent = out.map(|buf| pool.lend(buf, MIB));
        assert_eq!(total.used(), MIB);
        drop(lent);
        assert_eq!(total.used(), 3 * MIB, "two are kept");
        let again = [(); 2].map(|()| pool.take(MIB).unwrap());
        assert_eq!((pool.out_bytes(), total.used()), (3 * MIB, 3 * MIB));
        // One that is given back and one that comes back are kept, when nobody is busy any more.
        drop(again.map(|buf| pool.lend(buf, MIB)));
        assert_eq!(total.used(), 3 * MIB);
        pool.give(busy);
        assert_eq!((pool.out_bytes(), total.used()), (0, 2 * MIB));
        let out = [(); 2].map(|()| pool.take(MIB).unwrap());
        assert_eq!((pool.out_bytes(), total.used()), (2 * MIB, 2 * MIB));
        drop((pool, out));
        assert_eq!(total.used(), 0);
    }

    #[test]
    fn buffer_is_aligned_zeroed_and_copied_into_in_bounds() {
        let mut buf = AlignedBuf::zeroed(5000);
        assert_eq!(buf.ptr().as_ptr() as usize % ALIGNMENT, 0);
        assert!(buf.bytes(8192).iter().all(|b| *b == 0));
        buf.copy_in(8190, &[1, 2]);
        assert_eq!(&buf.bytes(8192)[8190..], &[1, 2]);
    }

    #[test]
    #[should_panic(expected = "more bytes than the buffer holds")]
    fn buffer_copied_into_past_its_end_panics() {
        AlignedBuf::zeroed(4096).copy_in(4095, &[1, 2]);
    }
}
