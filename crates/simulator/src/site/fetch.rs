//! Fetches of a simulated site: from whoever holds it, one after the other, until it is there or not wanted any more.
//!
//! As `site::transit` and `wire::blob` do it: at first from the site that made the delta, then from anybody; what comes is compared with
//! the length and the hash that were announced, and what is not right is fetched again.

use super::host::{HostJob, codec_of};
use super::{SiteDisk, SiteEvent, SiteProcess};
use crate::around::Around;
use crate::queue::Happening;
use crate::scenario::Scenario;
use crate::trace::Observation;
use base::{ContentHash, Round, SiteId};
use rounds::{Commit, Contributor, FragmentPlan, MemberEvent, MergedPart};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use wire::BlobKey;

/// As `site::transit` has it: the pause before what could not be fetched is tried again.
const AGAIN_SECONDS: f64 = 1.0;

/// A holder that has not answered by then is not there: as long as a dial may take.
const ANSWER_SECONDS: f64 = 10.0;

/// What is fetched.
#[derive(Debug, Clone)]
pub(crate) enum Key {
    Delta {
        round: Round,
        fragment: FragmentPlan,
        contributor: Contributor,
    },
    /// What `reducer` merges of a delta.
    Slice {
        round: Round,
        fragment: FragmentPlan,
        values: Range<u64>,
        from: SiteId,
        reducer: SiteId,
        hash: ContentHash,
    },
    Part {
        round: Round,
        fragment: FragmentPlan,
        part: MergedPart,
    },
    State {
        commit: Commit,
        state_hash: ContentHash,
    },
}

impl Key {
    /// What holders call it.
    pub(crate) fn blob(&self) -> BlobKey {
        match self {
            Self::Delta { round, fragment, contributor } => delta_key(*round, *fragment, contributor.site),
            Self::Slice { round, fragment, from, reducer, .. } => {
                BlobKey::Slice { round: *round, fragment: fragment.index, site: *from, reducer: *reducer }
            }
            Self::Part { round, fragment, part } => part_key(*round, *fragment, part.part.site),
            Self::State { commit, .. } => BlobKey::State { round: commit.round },
        }
    }

    /// The round that it belongs to; none of a state.
    fn round(&self) -> Option<Round> {
        match self {
            Self::Delta { round, .. } | Self::Slice { round, .. } | Self::Part { round, .. } => Some(*round),
            Self::State { .. } => None,
        }
    }
}

pub(crate) fn delta_key(round: Round, fragment: FragmentPlan, site: SiteId) -> BlobKey {
    BlobKey::Delta { round, fragment: fragment.index, site }
}

pub(crate) fn part_key(round: Round, fragment: FragmentPlan, reducer: SiteId) -> BlobKey {
    BlobKey::Part { round, fragment: fragment.index, reducer }
}

/// Which try of which fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Try {
    id: u64,
    number: u64,
}

struct Fetch {
    key: Key,
    /// Of a state: who was said to hold it.
    named: Vec<SiteId>,
    /// Holders that were not asked in this attempt.
    left: Vec<SiteId>,
    attempts: u32,
    tries: u64,
}

/// The fetches of one process.
#[derive(Default)]
pub(crate) struct Fetches {
    all: BTreeMap<u64, Fetch>,
    made: u64,
}

impl Fetches {
    pub(crate) fn len(&self) -> usize {
        self.all.len()
    }

    /// What belongs to these rounds is not wanted any more.
    pub(crate) fn stop(&mut self, is_void: impl Fn(Round) -> bool) {
        self.all.retain(|_, fetch| !fetch.key.round().is_some_and(&is_void));
    }
}

impl SiteProcess {
    /// Fetches something of a round. The same thing that is still on its way was for a plan that has been withdrawn.
    pub(super) fn fetch_of_round(&mut self, key: Key, around: &mut Around) {
        let blob = key.blob();
        self.fetches.all.retain(|_, fetch| fetch.key.blob() != blob);
        self.fetch(key, Vec::new(), around);
    }

    pub(super) fn fetch_state(
        &mut self,
        commit: Commit,
        state_hash: ContentHash,
        from: Vec<SiteId>,
        around: &mut Around,
    ) {
        self.fetch(Key::State { commit, state_hash }, from, around);
    }

    fn fetch(&mut self, key: Key, named: Vec<SiteId>, around: &mut Around) {
        self.fetches.made += 1;
        let id = self.fetches.made;
        let fetch = Fetch { key, named, left: Vec::new(), attempts: 0, tries: 0 };
        self.fetches.all.insert(id, fetch);
        self.try_fetch(id, around);
    }

    /// Begins another attempt.
    pub(super) fn try_fetch(&mut self, id: u64, around: &mut Around) {
        let own = self.site;
        let Some(fetch) = self.fetches.all.get_mut(&id) else { return };
        fetch.attempts += 1;
        let anybody = || self.peers.keys().copied().collect::<Vec<_>>();
        let mut holders = match &fetch.key {
            Key::Delta { contributor, .. } if fetch.attempts == 1 => vec![contributor.site],
            // Nobody but its maker has it.
            Key::Slice { from, .. } => vec![*from],
            Key::Part { part, .. } if fetch.attempts == 1 => vec![part.part.site],
            Key::Delta { .. } | Key::Part { .. } => anybody(),
            Key::State { .. } => fetch.named.clone(),
        };
        holders.retain(|site| Some(*site) != own && self.peers.contains_key(site));
        // Not all ask the same one first.
        for index in (1..holders.len()).rev() {
            holders.swap(index, around.random.next_below(index as u64 + 1) as usize);
        }
        fetch.left = holders;
        self.ask_next(id, around);
    }

    fn ask_next(&mut self, id: u64, around: &mut Around) {
        let Some(fetch) = self.fetches.all.get_mut(&id) else { return };
        fetch.tries += 1;
        let tried = Try { id, number: fetch.tries };
        let holder = loop {
            let Some(site) = fetch.left.pop() else { return self.give_up_attempt(id, around) };
            let found = self.peers.get(&site).and_then(|peer| around.machines.get(&peer.fingerprint));
            if let Some(machine) = found {
                break *machine;
            }
        };
        let key = fetch.key.clone();
        let arrives = around.now + around.net.delay(self.machine + 1, holder + 1);
        let asked = Happening::Asked { holder, asker: (self.machine, self.process), tried, key };
        around.queue.push(arrives, asked);
        self.at(around, ANSWER_SECONDS, SiteEvent::Answered(tried, None));
    }

    fn give_up_attempt(&mut self, id: u64, around: &mut Around) {
        // A delta is tried again for ever, a state is asked for anew: by then somebody else may hold it.
        self.at(around, AGAIN_SECONDS, SiteEvent::Fetch(id));
        if let Some(fetch) = self.fetches.all.get_mut(&id)
            && matches!(fetch.key, Key::State { .. })
        {
            fetch.named.clear();
        }
    }

    /// A holder has answered, or not in time.
    pub(super) fn answered(&mut self, tried: Try, answer: Option<Arc<[u8]>>, disk: &mut SiteDisk, around: &mut Around) {
        let Some(fetch) = self.fetches.all.get(&tried.id).filter(|fetch| fetch.tries == tried.number) else { return };
        let Some(bytes) = answer else { return self.ask_next(tried.id, around) };
        let bytes = around.corrupted(self.machine, bytes);
        if !self.is_right(&fetch.key, &bytes) {
            around.observe(Observation::Corrupt(self.machine));
            return self.ask_next(tried.id, around);
        }
        let Some(Fetch { key, .. }) = self.fetches.all.remove(&tried.id) else { return };
        match key {
            Key::Delta { round, fragment, contributor } => {
                self.shelf.insert((round, delta_key(round, fragment, contributor.site)), Arc::clone(&bytes));
                self.deltas.insert((round, contributor.site), bytes);
                self.feed(MemberEvent::DeltaHeld { round, from: contributor.site }, disk, around);
            }
            Key::Slice { round, from, .. } => {
                self.slices.insert((round, from), bytes);
                self.feed(MemberEvent::SliceHeld { round, from }, disk, around);
            }
            Key::Part { round, fragment, part } => {
                let from = part.part.site;
                self.shelf.insert((round, part_key(round, fragment, from)), Arc::clone(&bytes));
                self.parts.insert((round, from), bytes);
                self.feed(MemberEvent::PartHeld { round, from }, disk, around);
            }
            Key::State { commit, .. } => self.host.queue.push_back(HostJob::Install { commit, bytes }),
        }
    }

    fn is_right(&self, key: &Key, bytes: &[u8]) -> bool {
        match key {
            Key::Delta { fragment, contributor, .. } => {
                let codec = codec_of(&self.config, *fragment);
                bytes.len() as u64 == contributor.delta_bytes
                    && ContentHash::of(bytes) == contributor.delta_hash
                    && codec.check(bytes).is_ok()
            }
            Key::Slice { fragment, values, hash, .. } => {
                let codec = codec_of(&self.config, *fragment);
                codec.slice(values).is_some_and(|place| place.len() == bytes.len())
                    && ContentHash::of(bytes) == *hash
                    && codec.check_slice(bytes, (values.end - values.start) as usize).is_ok()
            }
            Key::Part { part, .. } => {
                bytes.len() as u64 == part.part.merged_bytes() && ContentHash::of(bytes) == part.hash
            }
            Key::State { state_hash, .. } => ContentHash::of(bytes) == *state_hash,
        }
    }

    /// Whether a state was given up: see [`SiteProcess::give_up_attempt`].
    pub(super) fn state_given_up(&mut self, id: u64) -> bool {
        let is_given_up = self.fetches.all.get(&id).is_some_and(|fetch| {
            matches!(fetch.key, Key::State { .. }) && fetch.attempts > 0 && fetch.named.is_empty()
        });
        if is_given_up {
            self.fetches.all.remove(&id);
        }
        is_given_up
    }
}

/// Who asks, as the holder knows it.
pub(crate) fn asker_fingerprint(machine: usize) -> ContentHash {
    Scenario::fingerprint(machine)
}
