//! The direct exchange: each site holds its own delta and its global state for the others to fetch.
//!
//! A pull, so that nobody can make a site hold more than it asked for. What is served follows the round: the own
//! delta of the last two rounds, and the state of the last commit.

use crate::state::GlobalState;
use base::{ContentHash, Round, SiteId};
use bytes::Bytes;
use rounds::Peer;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use wire::{Blob, BlobKey, BlobSource, Holder};

/// Global state, shared between the engine's thread and those who fetch it. Only that thread writes, and only while it
/// merges: an engine that hangs holds nobody up.
pub(crate) type SharedState = Arc<RwLock<GlobalState>>;

/// Encodes a delta as little-endian f32.
pub(crate) fn encode_delta(delta: &[f32]) -> Bytes {
    delta.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

/// Decodes a delta whose length has been checked. Gives `None` if a value is not finite: such a delta would poison the model.
pub(crate) fn decode_delta(bytes: &[u8]) -> Option<Vec<f32>> {
    let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let values: Vec<f32> = values.collect();
    values.iter().all(|value| value.is_finite()).then_some(values)
}

/// What this site serves, and to whom.
pub(crate) struct Shelf {
    site: SiteId,
    state: SharedState,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    peers: BTreeMap<SiteId, Peer>,
    deltas: BTreeMap<Round, Blob>,
    state: Option<(Round, Blob)>,
}

impl Shelf {
    pub(crate) fn new(site: SiteId, state: SharedState) -> Self {
        Self { site, state, inner: Mutex::default() }
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the list of sites that may fetch.
    pub(crate) fn set_peers(&self, peers: Vec<Peer>) {
        self.inner().peers = peers.into_iter().map(|peer| (peer.site, peer)).collect();
    }

    /// Whether that certificate is a member's.
    pub(crate) fn knows(&self, fingerprint: ContentHash) -> bool {
        self.inner().peers.values().any(|member| member.fingerprint == fingerprint)
    }

    /// Whether this site has the lowest id of all: it does what one site must do for everybody.
    pub(crate) fn is_first(&self) -> bool {
        self.inner().peers.keys().next().is_none_or(|first| *first == self.site)
    }

    /// Where to fetch from these sites.
    pub(crate) fn holders(&self, sites: &[SiteId]) -> Vec<Holder> {
        let inner = self.inner();
        let peers = sites.iter().filter(|site| **site != self.site).filter_map(|site| inner.peers.get(site));
        peers.map(|peer| Holder { address: peer.address.clone(), fingerprint: peer.fingerprint }).collect()
    }

    /// Offers the own delta of a round, and forgets those that nobody can want any more.
    pub(crate) fn offer(&self, round: Round, blob: Blob) {
        let mut inner = self.inner();
        inner.deltas.retain(|older, _| older.0 + 1 >= round.0);
        inner.deltas.insert(round, blob);
    }

    fn state_blob(&self, round: Round) -> Option<Blob> {
        if let Some((held, blob)) = &self.inner().state
            && *held == round
        {
            return Some(blob.clone());
        }
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        if state.commit.round != round {
            return None;
        }
        let blob = Blob::memory(state.encode());
        self.inner().state = Some((round, blob.clone()));
        Some(blob)
    }

    /// Frees the encoded state of an older round.
    pub(crate) fn forget_state(&self) {
        self.inner().state = None;
    }
}

impl BlobSource for Shelf {
    fn open(&self, peer: ContentHash, key: &BlobKey) -> Option<Blob> {
        if !self.knows(peer) {
            return None;
        }
        match key {
            BlobKey::Delta { round, fragment: 0, site } if *site == self.site => {
                self.inner().deltas.get(round).cloned()
            }
            BlobKey::State { round } => self.state_blob(*round),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delta_survives_and_one_that_is_not_finite_is_refused() {
        let delta = [1.5f32, -0.0, f32::MIN_POSITIVE, 3e38];
        assert_eq!(decode_delta(&encode_delta(&delta)).unwrap(), delta);
        assert!(decode_delta(&encode_delta(&[1.0, f32::NAN])).is_none());
        assert!(decode_delta(&encode_delta(&[f32::NEG_INFINITY])).is_none());
    }
}
