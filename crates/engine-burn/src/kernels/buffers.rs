//! Memory that goes from one step to the next.
//!
//! Every inner step needs the same arrays again. Asking the system each time costs a tenth of a step in zeroing and page
//! faults, so what a step has finished with waits here for the next one. A buffer comes with whatever it held last:
//! who takes one writes every element before reading it.

use super::FlexTensor;
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard};

/// Most buffers waiting: three engines of a process at once with some twenty arrays of a block each. The oldest go first.
const WAITING_MAX: usize = 192;

/// Shorter arrays are left to the allocator.
const LENGTH_MIN: usize = 4 * 1024;

static WAITING: Mutex<VecDeque<Vec<f32>>> = Mutex::new(VecDeque::new());

fn waiting() -> MutexGuard<'static, VecDeque<Vec<f32>>> {
    // A panic elsewhere leaves a list of vectors: nothing can be half done.
    WAITING.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An array that returns to the waiting ones when dropped.
#[derive(Debug)]
pub(super) struct Buffer(Vec<f32>);

impl Buffer {
    /// `length` elements that hold anything.
    pub(super) fn stale(length: usize) -> Self {
        let mut waiting = waiting();
        // The newest is the likeliest to be in a cache.
        let found = waiting.iter().rposition(|buffer| buffer.len() == length);
        let reused = found.and_then(|index| waiting.remove(index));
        drop(waiting);
        Self(reused.unwrap_or_else(|| vec![0.0; length]))
    }

    /// The array itself, to become a tensor.
    pub(super) fn into_vec(mut self) -> Vec<f32> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        keep(std::mem::take(&mut self.0));
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

fn keep(buffer: Vec<f32>) {
    if buffer.len() < LENGTH_MIN {
        return;
    }
    let mut waiting = waiting();
    if waiting.len() == WAITING_MAX {
        waiting.pop_front();
    }
    waiting.push_back(buffer);
}

/// Takes the memory of a tensor that nobody else holds.
pub(super) fn recycle(tensor: FlexTensor) {
    if tensor.is_unique()
        && let Ok(buffer) = tensor.into_data().try_into_vec::<f32>()
    {
        keep(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test: both look at the one list of this process.
    #[test]
    fn dropped_buffers_are_taken_again_and_bounded() {
        let length = LENGTH_MIN + 12_345;
        let first = Buffer::stale(length);
        let address = first.as_ptr();
        drop(first);
        assert_ne!(Buffer::stale(length + 1).as_ptr(), address);
        assert_eq!(Buffer::stale(length).as_ptr(), address);

        let buffers: Vec<Buffer> = (0..2 * WAITING_MAX).map(|_| Buffer::stale(LENGTH_MIN)).collect();
        drop(buffers);
        assert_eq!(waiting().len(), WAITING_MAX);
        assert!(waiting().iter().all(|buffer| buffer.len() == LENGTH_MIN), "the oldest went first");
    }
}
