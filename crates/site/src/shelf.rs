//! What a site holds for the others to fetch: its own deltas and their slices, those it has fetched itself, merged parts, and its global
//! state.
//!
//! A pull, so that nobody can make a site hold more than it asked for. What belongs to a round stays for some rounds after its commit, so that a
//! site that was slow or away can catch up from anybody.

use crate::state::SharedState;
use base::{ContentHash, Round, SiteId};
use rounds::Peer;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use wire::{Blob, BlobKey, BlobSource, Holder};

/// What this site serves, and to whom.
pub(crate) struct Shelf {
    site: SiteId,
    state: SharedState,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    peers: BTreeMap<SiteId, Peer>,
    /// Of each round: deltas, slices, merged parts.
    rounds: BTreeMap<Round, BTreeMap<BlobKey, Blob>>,
    /// The encoded state that was asked for last: it stays while commits go on, so that who has begun to fetch it can end.
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

    /// Where to fetch from those of these sites that can be dialled.
    pub(crate) fn holders(&self, sites: &[SiteId]) -> Vec<Holder> {
        let inner = self.inner();
        let peers = sites.iter().filter(|site| **site != self.site).filter_map(|site| inner.peers.get(site));
        let peers = peers.filter(|peer| peer.can_be_dialled());
        peers.map(|peer| Holder { address: peer.address.clone(), fingerprint: peer.fingerprint }).collect()
    }

    /// Where to fetch at first what a site has made: from it; and what this site itself made, before it came back, from all others.
    pub(crate) fn first_holders(&self, maker: SiteId) -> Vec<Holder> {
        if maker == self.site { self.all_holders() } else { self.holders(&[maker]) }
    }

    /// All other sites that can be dialled.
    pub(crate) fn all_holders(&self) -> Vec<Holder> {
        let sites: Vec<SiteId> = self.inner().peers.keys().copied().collect();
        self.holders(&sites)
    }

    /// The other sites, as holders.
    pub(crate) fn others(&self) -> Vec<(SiteId, Holder)> {
        let inner = self.inner();
        let others = inner.peers.values().filter(|peer| peer.site != self.site);
        let holder = |peer: &Peer| Holder { address: peer.address.clone(), fingerprint: peer.fingerprint };
        others.map(|peer| (peer.site, holder(peer))).collect()
    }

    /// Number of sites.
    pub(crate) fn sites(&self) -> usize {
        self.inner().peers.len()
    }

    /// Offers what belongs to a round.
    pub(crate) fn offer(&self, round: Round, key: BlobKey, blob: Blob) {
        self.inner().rounds.entry(round).or_default().insert(key, blob);
    }

    /// Forgets rounds before this one.
    pub(crate) fn forget_before(&self, round: Round) {
        self.inner().rounds.retain(|offered, _| *offered >= round);
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
}

impl BlobSource for Shelf {
    fn open(&self, peer: ContentHash, key: &BlobKey) -> Option<Blob> {
        if !self.knows(peer) {
            return None;
        }
        match key {
            BlobKey::Delta { round, .. } | BlobKey::Slice { round, .. } | BlobKey::Part { round, .. } => {
                self.inner().rounds.get(round)?.get(key).cloned()
            }
            BlobKey::State { round } => self.state_blob(*round),
            _ => None,
        }
    }
}
