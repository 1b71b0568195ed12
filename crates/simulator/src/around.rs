//! What every process of a simulation sees of the world around it.

use crate::network::Network;
use crate::options::Sabotage;
use crate::queue::Queue;
use crate::scenario::Scenario;
use crate::trace::Observation;
use base::ContentHash;
use base::random::Random;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use wire::Secret;

/// Time, links, chance, and an ear for what is to be seen.
pub(crate) struct Around {
    /// Virtual seconds since the beginning.
    pub(crate) now: f64,
    pub(crate) queue: Queue,
    pub(crate) net: Network,
    pub(crate) random: Random,
    pub(crate) scenario: Arc<Scenario>,
    pub(crate) sabotage: Option<Sabotage>,
    /// What has been seen since the checkers looked last.
    pub(crate) observed: Vec<Observation>,
    /// Processes of the coordinator that were replaced, whether they are still there or not.
    pub(crate) replaced: BTreeSet<u64>,
    /// Fetches of a site of which one bit will flip.
    pub(crate) corrupt: BTreeMap<usize, u32>,
    /// By which factor a machine computes slower.
    pub(crate) slowed: BTreeMap<usize, f64>,
    /// Machines by their certificates.
    pub(crate) machines: BTreeMap<ContentHash, usize>,
    /// Of the invite. The same for all: nothing depends on which it is.
    pub(crate) secret: Secret,
}

impl Around {
    pub(crate) fn observe(&mut self, observation: Observation) {
        self.observed.push(observation);
    }

    /// By which factor that site computes slower than usual.
    pub(crate) fn slowness(&self, machine: usize) -> f64 {
        self.slowed.get(&machine).copied().unwrap_or(1.0)
    }

    /// What arrives at a machine of what was sent to it: now and then a bit is another.
    pub(crate) fn corrupted(&mut self, machine: usize, bytes: Arc<[u8]>) -> Arc<[u8]> {
        let Some(left) = self.corrupt.get_mut(&machine).filter(|left| **left > 0) else { return bytes };
        *left -= 1;
        let mut damaged = bytes.to_vec();
        let place = self.random.next_below(damaged.len().max(1) as u64) as usize;
        if let Some(byte) = damaged.get_mut(place) {
            *byte ^= 1 << self.random.next_below(8);
        }
        damaged.into()
    }
}
