//! Which chunk is asked for where: the decisions of one fetch, without sockets or clocks.
//!
//! Chunks are handed out in order to whichever stream has room, so that fast streams carry more. What a failed
//! stream had asked for goes to the next stream with room. A holder is given up after [`HOLDER_FAILURES_MAX`] failures in
//! a row; several streams that break together are one failure, not several.

use super::protocol;
use super::tree::{self, ChunkHash};
use crate::limits::{FORGIVEN_PER_CHUNK_MAX, HOLDER_FAILURES_MAX};
use base::ContentHash;

/// The progress of one fetch.
#[derive(Debug)]
pub(crate) struct Transfer {
    blob_bytes: u64,
    /// Hash of each chunk that is here.
    here: Vec<Option<ChunkHash>>,
    missing: u64,
    /// All before it have been handed out at least once.
    next: u64,
    /// Handed out to a stream that failed.
    returned: Vec<u64>,
    holders: Vec<HolderState>,
}

#[derive(Debug, Default, Clone)]
struct HolderState {
    failures_in_row: u32,
    /// Counted failures; a stream that was started before the last one tells nothing new by failing too.
    epoch: u32,
    given_up: bool,
    /// Broken streams that were not counted as failures.
    forgiven: u64,
    streams: usize,
    last_failure: Option<String>,
}

/// A stream's place: which holder, since when, and what it has been asked for.
#[derive(Debug)]
pub(crate) struct Assignment {
    pub(super) holder: usize,
    epoch: u32,
    /// Failures in a row of the holder when the stream started: how long to pause first.
    pub(super) failures_in_row: u32,
    in_flight: Vec<u64>,
}

impl Assignment {
    /// Chunks asked for and not here.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}

/// What a stream's failure says about its holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blame {
    /// Nothing: a kept connection had gone stale.
    Nobody,
    /// The stream broke after it had brought a part of a chunk: nothing, unless it goes on for ever.
    Torn,
    /// It may work again.
    Passing,
    /// It will not have what we want.
    Lasting,
}

impl Transfer {
    /// A fetch of `blob_bytes` of which some chunks may be `here` already.
    pub(crate) fn new(blob_bytes: u64, here: Vec<Option<ChunkHash>>, holders: usize) -> Self {
        assert_eq!(here.len() as u64, protocol::chunks(blob_bytes), "one entry a chunk");
        let missing = here.iter().filter(|hash| hash.is_none()).count() as u64;
        let holders = vec![HolderState::default(); holders];
        Self { blob_bytes, here, missing, next: 0, returned: Vec::new(), holders }
    }

    /// Chunks that are not here.
    pub(super) fn missing(&self) -> u64 {
        self.missing
    }

    /// The holder for another stream: the one with the fewest failures, then the fewest streams. `None` when all are
    /// given up.
    pub(super) fn assign(&mut self) -> Option<Assignment> {
        let usable = self.holders.iter_mut().enumerate().filter(|(_, holder)| !holder.given_up);
        let (index, holder) = usable.min_by_key(|(_, holder)| (holder.failures_in_row, holder.streams))?;
        holder.streams += 1;
        Some(Assignment {
            holder: index,
            epoch: holder.epoch,
            failures_in_row: holder.failures_in_row,
            in_flight: Vec::new(),
        })
    }

    /// The next chunk for a stream to ask for, if any is left.
    pub(super) fn take(&mut self, stream: &mut Assignment) -> Option<u64> {
        let index = loop {
            match self.returned.pop() {
                Some(index) if self.here[index as usize].is_some() => {}
                Some(index) => break index,
                None => {
                    let open = &self.here[self.next as usize..];
                    self.next += open.iter().position(Option::is_none)? as u64 + 1;
                    break self.next - 1;
                }
            }
        };
        stream.in_flight.push(index);
        Some(index)
    }

    /// Notes that a chunk came. False when it was here already.
    pub(crate) fn arrived(&mut self, stream: Option<&mut Assignment>, index: u64, hash: ChunkHash) -> bool {
        if let Some(stream) = stream {
            stream.in_flight.retain(|asked| *asked != index);
            self.holders[stream.holder].failures_in_row = 0;
        }
        let new = self.here[index as usize].replace(hash).is_none();
        self.missing -= u64::from(new);
        new
    }

    /// Notes that a stream ended with an error and takes back what it had been asked for.
    pub(super) fn failed(&mut self, stream: Assignment, blame: Blame, reason: String) {
        self.returned.extend(stream.in_flight);
        let forgiven_max = FORGIVEN_PER_CHUNK_MAX * self.here.len() as u64;
        let holder = &mut self.holders[stream.holder];
        holder.streams -= 1;
        holder.last_failure = Some(reason);
        if blame == Blame::Torn && holder.forgiven < forgiven_max {
            holder.forgiven += 1;
            holder.failures_in_row = 0;
            return;
        }
        if blame == Blame::Lasting {
            holder.given_up = true;
        }
        if matches!(blame, Blame::Passing | Blame::Torn) && stream.epoch == holder.epoch {
            holder.epoch += 1;
            holder.failures_in_row += 1;
            holder.given_up |= holder.failures_in_row >= HOLDER_FAILURES_MAX;
        }
    }

    /// The last failure of each holder, by index.
    pub(super) fn failures(&self) -> impl Iterator<Item = (usize, &str)> {
        let holders = self.holders.iter().enumerate();
        holders.filter_map(|(index, holder)| Some((index, holder.last_failure.as_deref()?)))
    }

    /// BLAKE3 of the whole, once nothing is missing.
    pub(crate) fn root(&self) -> Option<ContentHash> {
        let hashes: Option<Vec<ChunkHash>> = self.here.iter().copied().collect();
        Some(tree::root(&hashes?, self.blob_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CHUNK_BYTES_MAX;

    const HASH: ChunkHash = [1; 32];

    fn transfer(chunks: usize, holders: usize) -> Transfer {
        Transfer::new((chunks * CHUNK_BYTES_MAX) as u64, vec![None; chunks], holders)
    }

    #[test]
    fn every_chunk_is_handed_out_once() {
        let mut transfer = Transfer::new(4 * CHUNK_BYTES_MAX as u64, vec![None, Some(HASH), None, None], 1);
        let mut stream = transfer.assign().unwrap();
        let taken: Vec<_> = std::iter::from_fn(|| transfer.take(&mut stream)).collect();
        assert_eq!(taken, [0, 2, 3]);
        assert_eq!(stream.in_flight(), 3);
        assert!(transfer.arrived(Some(&mut stream), 2, HASH));
        assert!(!transfer.arrived(Some(&mut stream), 2, HASH));
        assert_eq!((stream.in_flight(), transfer.missing(), transfer.root()), (2, 2, None));
    }

    #[test]
    fn what_a_failed_stream_had_goes_to_another() {
        let mut transfer = transfer(3, 2);
        let (mut first, mut second) = (transfer.assign().unwrap(), transfer.assign().unwrap());
        assert_ne!(first.holder, second.holder, "streams spread over the holders");
        assert_eq!((transfer.take(&mut first), transfer.take(&mut second)), (Some(0), Some(1)));
        transfer.failed(first, Blame::Passing, "gone".to_owned());
        assert_eq!((transfer.take(&mut second), transfer.take(&mut second)), (Some(0), Some(2)));
        assert_eq!(transfer.take(&mut second), None);
        assert_eq!(transfer.assign().unwrap().holder, second.holder, "the holder that failed comes last");
    }

    #[test]
    fn a_returned_chunk_that_came_after_all_is_not_asked_for_again() {
        let mut transfer = transfer(1, 1);
        let mut stream = transfer.assign().unwrap();
        assert_eq!(transfer.take(&mut stream), Some(0));
        transfer.failed(stream, Blame::Passing, "gone".to_owned());
        assert!(transfer.arrived(None, 0, HASH));
        let mut next = transfer.assign().unwrap();
        assert_eq!(transfer.take(&mut next), None);
        assert_eq!(transfer.missing(), 0);
    }

    #[test]
    fn streams_that_break_together_are_one_failure() {
        let mut transfer = transfer(8, 1);
        for failure in 0..HOLDER_FAILURES_MAX {
            let streams: Vec<_> = (0..4).map(|_| transfer.assign().unwrap()).collect();
            assert_eq!(streams[0].failures_in_row, failure);
            for stream in streams {
                transfer.failed(stream, Blame::Passing, "refused".to_owned());
            }
        }
        assert!(transfer.assign().is_none());
        assert_eq!(transfer.failures().collect::<Vec<_>>(), [(0, "refused")]);
    }

    #[test]
    fn a_torn_stream_is_forgiven_as_often_as_its_bytes_can_have_helped() {
        let mut transfer = transfer(2, 1);
        let tear = |transfer: &mut Transfer| {
            let stream = transfer.assign().unwrap();
            transfer.failed(stream, Blame::Torn, "reset".to_owned());
        };
        (0..2 * FORGIVEN_PER_CHUNK_MAX).for_each(|_| tear(&mut transfer));
        assert_eq!(transfer.assign().unwrap().failures_in_row, 0);
        (0..HOLDER_FAILURES_MAX).for_each(|_| tear(&mut transfer));
        assert!(transfer.assign().is_none());
    }

    #[test]
    fn progress_forgives_and_a_lasting_failure_does_not() {
        let mut transfer = transfer(64, 1);
        for chunk in 0..10 {
            let mut stream = transfer.assign().unwrap();
            transfer.arrived(Some(&mut stream), chunk, HASH);
            transfer.failed(stream, Blame::Passing, "reset".to_owned());
        }
        let stream = transfer.assign().unwrap();
        transfer.failed(stream, Blame::Nobody, "stale".to_owned());
        let stream = transfer.assign().unwrap();
        transfer.failed(stream, Blame::Lasting, "not found".to_owned());
        assert!(transfer.assign().is_none());
    }
}
