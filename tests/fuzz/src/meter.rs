//! How much memory a call takes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// No allocation of a target is this large: what asks for it trusted a length.
const ALLOCATION_BYTES_MAX: usize = 1 << 32;

thread_local! {
    /// Bytes that this thread took and did not give back; below 0 if it gave back another's.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The peak of what the calling thread holds during `call`, in bytes.
pub(crate) fn peak(call: impl FnOnce()) -> usize {
    let before = HELD.get();
    PEAK.set(before);
    call();
    usize::try_from(PEAK.get() - before).unwrap_or(0)
}

fn count(bytes: isize) {
    let held = HELD.get().wrapping_add(bytes);
    HELD.set(held);
    PEAK.set(PEAK.get().max(held));
}

/// The system's allocator, with a count.
struct Meter;

#[global_allocator]
static METER: Meter = Meter;

// SAFETY: it hands every call on as it is, or answers null, which an allocator may.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ALLOCATION_BYTES_MAX {
            return std::ptr::null_mut();
        }
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ALLOCATION_BYTES_MAX {
            return std::ptr::null_mut();
        }
        count(layout.size().cast_signed());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > ALLOCATION_BYTES_MAX {
            return std::ptr::null_mut();
        }
        count(size.cast_signed() - layout.size().cast_signed());
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_is_what_is_held_at_once_and_not_the_sum() {
        let peak = peak(|| {
            for _ in 0..10 {
                drop(std::hint::black_box(vec![1_u8; 1000]));
            }
        });
        assert!((1000..2000).contains(&peak), "{peak}");
    }
}
