//! How much memory a parser takes of what bytes: an allocator that counts, thread by thread.
//!
//! It counts what Rust code asks for. What a library in C takes (zstd), and what other threads do, is not in it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread has taken and not given back; negative where it gives back what others took.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn changed(by: isize) {
    // A thread that is ending has no counters any more.
    let _ = HELD.try_with(|held| {
        let now = held.get() + by;
        held.set(now);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now)));
    });
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        changed(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        changed(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        changed(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        changed(new_size as isize - layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

/// The most memory that `work` held at once on this thread, bytes, with what it gives.
pub fn peak_bytes<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.with(Cell::get);
    PEAK.with(|peak| peak.set(before));
    let given = work();
    let peak = PEAK.with(Cell::get);
    (given, usize::try_from(peak - before).unwrap_or(0))
}

/// What a parser may take of memory: so much at least, and so many times the bytes it is given.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    /// Whatever the length.
    pub base_bytes: usize,
    /// For each byte of input.
    pub per_byte: usize,
}

impl Bound {
    /// Runs `parse`, which is given `input_bytes` bytes.
    ///
    /// # Panics
    /// It took more.
    pub fn check<T>(self, input_bytes: usize, parse: impl FnOnce() -> T) -> T {
        let (given, peak) = peak_bytes(parse);
        let most = self.base_bytes + self.per_byte * input_bytes;
        assert!(peak <= most, "{peak} bytes of memory for {input_bytes} bytes of input, at most {most} are right");
        given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_at_once_is_counted() {
        let (kept, peak) = peak_bytes(|| {
            drop(vec![1_u8; 1_000]);
            vec![1_u8; 3_000]
        });
        assert_eq!(kept.len(), 3_000);
        assert!((3_000..4_000).contains(&peak), "{peak}");
    }

    #[test]
    #[should_panic(expected = "bytes of memory for 10 bytes of input")]
    fn too_much_is_a_finding() {
        Bound { base_bytes: 1_000, per_byte: 10 }.check(10, || vec![0_u8; 1_101]);
    }
}
