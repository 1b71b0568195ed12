//! A simulated site in a sharded round: slices come here, their merge goes out, and the merged parts of the others come in.

use super::fetch::part_key;
use super::host::{HostJob, Slice, codec_of};
use super::{Key, SiteDisk, SiteProcess};
use crate::around::Around;
use base::{ContentHash, Round, SiteId};
use rounds::{Commit, Contributor, FragmentPlan, MemberEvent, RoundPlan};
use std::ops::Range;
use std::sync::Arc;
use wire::BlobKey;

impl SiteProcess {
    /// Puts what each reducer merges of a delta on the shelf; gives the hashes, in the order of the plan's parts.
    pub(super) fn offer_slices(&mut self, plan: &RoundPlan, delta: &[u8]) -> Vec<ContentHash> {
        let (Some(site), codec) = (self.site, codec_of(&self.config, plan.fragment)) else { return Vec::new() };
        let mut hashes = Vec::new();
        for part in &plan.parts {
            // The coordinator that made such a plan is told by their number.
            let Some(place) = codec.slice(&part.values) else { continue };
            let (slice, fragment) = (&delta[place], plan.fragment.index);
            let key = BlobKey::Slice { round: plan.round, fragment, site, reducer: part.site };
            self.shelf.insert((plan.round, key), slice.into());
            hashes.push(ContentHash::of(slice));
        }
        hashes
    }

    pub(super) fn fetch_slice(
        &mut self,
        round: Round,
        (fragment, values): (FragmentPlan, Range<u64>),
        (from, hash): (SiteId, ContentHash),
        around: &mut Around,
    ) {
        let Some(reducer) = self.site else { return };
        self.fetch_of_round(Key::Slice { round, fragment, values, from, reducer, hash }, around);
    }

    pub(super) fn reduce(
        &mut self,
        round: Round,
        (fragment, values): (FragmentPlan, Range<u64>),
        contributors: &[Contributor],
        around: &mut Around,
    ) {
        let place = codec_of(&self.config, fragment).slice(&values);
        let slice = |contributor: &Contributor| {
            let bytes: Arc<[u8]> = match Some(contributor.site) == self.site {
                true => self.deltas.get(&(round, contributor.site))?.get(place.clone()?)?.into(),
                false => Arc::clone(self.slices.get(&(round, contributor.site))?),
            };
            Some((contributor.tokens, bytes))
        };
        // The member merges only what is held.
        let Some(slices) = contributors.iter().map(slice).collect() else { return self.fail(around) };
        let generation = self.generation;
        self.host.queue.push_back(HostJob::Reduce { round, fragment, values, slices, generation });
    }

    /// The own part is merged.
    pub(super) fn reduced(
        &mut self,
        round: Round,
        fragment: FragmentPlan,
        (values, slices): (&Range<u64>, &[Slice]),
        disk: &mut SiteDisk,
        around: &mut Around,
    ) {
        let Some(site) = self.site else { return };
        let Some(part) = self.host.reduce(fragment, values, slices) else { return self.fail(around) };
        let hash = ContentHash::of(&part);
        self.shelf.insert((round, part_key(round, fragment, site)), Arc::clone(&part));
        self.parts.insert((round, site), part);
        self.feed(MemberEvent::Reduced { round, hash }, disk, around);
    }

    /// The merge that a commit names, where it is here.
    pub(super) fn merged_parts(&self, commit: &Commit) -> Option<Vec<Arc<[u8]>>> {
        commit.parts.iter().map(|merged| self.parts.get(&(commit.round, merged.part.site)).cloned()).collect()
    }
}
