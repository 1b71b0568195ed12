//! The sites that are connected, and what the coordinator knows of each.
//!
//! After every event somebody asks who takes part, and who waits to. Both lists are kept here, and so what they follow from is changed
//! here only.

use super::awaited::Asked;
use crate::plan::{Peer, SiteDevice};
use crate::shares::Speed;
use base::{ContentHash, Round, SiteId};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

/// What a site was asked to do in a round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owed {
    pub(super) attempt: u32,
    pub(super) samples: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Site {
    pub(super) peer: Peer,
    /// What it computes on, as far as it has said.
    pub(super) device: SiteDevice,
    /// See [`Site::held`].
    held: Option<(Round, ContentHash)>,
    /// See [`Site::since`].
    since: Option<Round>,
    /// The last commit when that began: it has the deltas of later ones, or can have them from those that had them then.
    pub(super) placed_at: Round,
    /// The last commit that it says it has applied.
    pub(super) applied: Round,
    /// Tokens a second.
    pub(super) speed: Speed,
    /// Each round that it has not reported yet.
    pub(super) owed: BTreeMap<Round, Owed>,
    /// Tokens trained on since it joined.
    pub(super) trained_tokens: u64,
    /// The same when the snapshot of each fragment was taken that was merged last.
    pub(super) merged_tokens: BTreeMap<u32, u64>,
    /// When a word of it was last heard.
    pub(super) heard: f64,
    /// For how many ticks nobody has had the deltas that it lacks, as far as is known.
    pub(super) stranded_ticks: u32,
    /// For how many ticks it has been here without a word of what it holds, though nothing was asked of it.
    pub(super) unready_ticks: u32,
    /// How many times it was recalled over this connection ([`super::regroup`]), and whether it has yet to answer.
    pub(super) recalls: u32,
    pub(super) is_recalled: bool,
    /// It was asked to fetch a state, and has yet to say what came of it.
    pub(super) is_fetching: bool,
    pub(super) asked: Asked,
}

impl Site {
    pub(super) fn new(peer: Peer, now: f64) -> Self {
        let (owed, merged_tokens) = (BTreeMap::new(), BTreeMap::new());
        let (speed, applied, placed_at) = (Speed::new(1.0), Round(0), Round(0));
        Self {
            peer,
            device: SiteDevice::default(),
            held: None,
            since: None,
            placed_at,
            applied,
            speed,
            owed,
            trained_tokens: 0,
            merged_tokens,
            heard: now,
            stranded_ticks: 0,
            unready_ticks: 0,
            recalls: 0,
            is_recalled: false,
            is_fetching: false,
            asked: Asked::default(),
        }
    }

    /// The state it says it holds; `None` before it is ready, and while it fetches one.
    pub(super) fn held(&self) -> Option<(Round, ContentHash)> {
        self.held
    }

    /// It takes part: from the state of this round on it has been sent every commit.
    pub(super) fn since(&self) -> Option<Round> {
        self.since
    }
}

/// All sites by id; reads as that map.
#[derive(Debug, Clone, Default)]
pub(super) struct Sites {
    all: BTreeMap<SiteId, Site>,
    /// Those that take part, ascending.
    current: Vec<SiteId>,
    /// Those that hold a state and take no part yet.
    waiting: BTreeSet<SiteId>,
}

impl Deref for Sites {
    type Target = BTreeMap<SiteId, Site>;

    fn deref(&self) -> &Self::Target {
        &self.all
    }
}

impl Sites {
    /// Who takes part, ascending.
    pub(super) fn current(&self) -> &[SiteId] {
        &self.current
    }

    /// Who holds a state and takes no part yet, ascending.
    pub(super) fn waiting(&self) -> &BTreeSet<SiteId> {
        &self.waiting
    }

    pub(super) fn get_mut(&mut self, id: &SiteId) -> Option<&mut Site> {
        self.all.get_mut(id)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (SiteId, &mut Site)> {
        self.all.iter_mut().map(|(id, site)| (*id, site))
    }

    /// A site is here, or begins anew.
    pub(super) fn insert(&mut self, site: Site) {
        let id = site.peer.site;
        self.remove(id);
        self.all.insert(id, site);
    }

    pub(super) fn remove(&mut self, id: SiteId) -> Option<Site> {
        let site = self.all.remove(&id)?;
        self.waiting.remove(&id);
        if let Ok(place) = self.current.binary_search(&id) {
            self.current.remove(place);
        }
        Some(site)
    }

    /// A site says which state it holds.
    pub(super) fn hold(&mut self, id: SiteId, held: (Round, ContentHash)) {
        let Some(site) = self.all.get_mut(&id) else { return };
        site.held = Some(held);
        if site.since.is_none() {
            self.waiting.insert(id);
        }
    }

    /// A site that waits is sent for the state after that round.
    pub(super) fn send_for_state(&mut self, id: SiteId, round: Round) {
        if let Some(site) = self.all.get_mut(&id) {
            site.held = None;
            site.ask(round);
            self.waiting.remove(&id);
        }
    }

    /// A site takes part from the state of that round on, at a time at which `last` is the last commit.
    pub(super) fn place(&mut self, id: SiteId, round: Round, last: Round) {
        let Some(site) = self.all.get_mut(&id) else { return };
        (site.since, site.placed_at, site.applied) = (Some(round), last, round);
        self.waiting.remove(&id);
        if let Err(place) = self.current.binary_search(&id) {
            self.current.insert(place, id);
        }
    }
}
