//! Buffers of one fetch: what a broken stream had received of its chunk, and empty ones to be used again.
//!
//! A chunk is torn when its stream ends inside it. The next stream to the same holder asks for the rest only. Bytes of two
//! holders are never joined: if the whole chunk then had a wrong hash, nobody could say whose fault it is.

use crate::limits::{STREAMS_MAX, TORN_CHUNKS_MAX};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Shared by the streams of one fetch.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// By chunk: whose bytes, and the bytes so far.
    torn: HashMap<u64, (usize, Vec<u8>)>,
    free: Vec<Vec<u8>>,
}

impl Buffers {
    /// How much of a chunk is here from that holder. What another one had sent of it is forgotten.
    pub(super) fn offset(&self, index: u64, holder: usize) -> u32 {
        let mut inner = self.lock();
        match inner.torn.get(&index) {
            Some((from, bytes)) if *from == holder => bytes.len() as u32,
            Some(_) => {
                inner.torn.remove(&index);
                0
            }
            None => 0,
        }
    }

    /// A buffer of `bytes` bytes for a chunk. It begins with the `offset` bytes that are here; what follows has no meaning.
    /// `None` if they are not here any more.
    pub(super) fn take(&self, index: u64, offset: u32, bytes: usize) -> Option<Vec<u8>> {
        let mut inner = self.lock();
        let mut buffer = match offset {
            0 => inner.free.pop().unwrap_or_default(),
            _ => inner.torn.remove(&index).map(|(_, buffer)| buffer).filter(|torn| torn.len() == offset as usize)?,
        };
        buffer.resize(bytes, 0);
        Some(buffer)
    }

    /// Keeps what has come of a chunk.
    pub(super) fn keep(&self, index: u64, holder: usize, received: Vec<u8>) {
        let mut inner = self.lock();
        if !received.is_empty() && inner.torn.len() < TORN_CHUNKS_MAX {
            inner.torn.insert(index, (holder, received));
        }
    }

    /// Takes back a buffer that is not needed any more.
    pub(super) fn recycle(&self, buffer: Vec<u8>) {
        let mut inner = self.lock();
        if inner.free.len() < STREAMS_MAX {
            inner.free.push(buffer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing here can panic half-way; a poisoned map is still a map of buffers.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_chunk_goes_on_where_it_stopped_with_the_same_holder_only() {
        let buffers = Buffers::default();
        buffers.keep(5, 0, vec![1, 2, 3]);
        assert_eq!((buffers.offset(5, 0), buffers.offset(4, 0)), (3, 0));
        assert_eq!(buffers.take(5, 3, 6).unwrap()[..3], [1, 2, 3]);
        assert_eq!(buffers.offset(5, 0), 0, "it is at one stream at a time");
        buffers.keep(5, 0, vec![1, 2, 3, 4]);
        assert_eq!((buffers.offset(5, 1), buffers.offset(5, 0)), (0, 0), "another holder begins anew");
        assert_eq!(buffers.take(5, 4, 6), None);
    }

    #[test]
    fn buffers_are_used_again_and_bounded() {
        let buffers = Buffers::default();
        for index in 0..2 * TORN_CHUNKS_MAX as u64 {
            buffers.keep(index, 0, vec![0; 8]);
            buffers.recycle(vec![7; 16]);
        }
        let inner = buffers.lock();
        assert_eq!((inner.torn.len(), inner.free.len()), (TORN_CHUNKS_MAX, STREAMS_MAX));
        drop(inner);
        let used = buffers.take(1_000, 0, 12).unwrap();
        assert_eq!((used.len(), used[0]), (12, 7));
    }
}
