//! The agent in a sharded round: slices come here, their merge goes out, and the merged parts of the others come in.

use super::{Agent, AgentError, Fetched, conversation};
use crate::host::{HostJob, PartKey, Slice};
use crate::transit::sharded::{ShardCodec, WantedShard};
use base::{ContentHash, Round, SiteId};
use bytes::Bytes;
use rounds::{Commit, Contributor, FragmentPlan, MemberEvent, MergedPart};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use wire::{Blob, BlobKey};

/// What is here of sharded rounds that are not merged.
#[derive(Default)]
pub(super) struct Shards {
    /// For this site to merge, by maker. The own ones are cut from the own deltas.
    slices: BTreeMap<(Round, SiteId), Bytes>,
    /// By who has merged them, this site among them.
    parts: BTreeMap<(Round, SiteId), Bytes>,
}

impl Shards {
    pub(super) fn forget_through(&mut self, merged: Round) {
        self.slices.retain(|(round, _), _| *round > merged);
        self.parts.retain(|(round, _), _| *round > merged);
    }

    /// The merge that a commit names, where it is here.
    pub(super) fn of(&self, commit: &Commit) -> Option<Vec<Bytes>> {
        commit.parts.iter().map(|merged| self.parts.get(&(commit.round, merged.part.site)).cloned()).collect()
    }
}

impl Agent {
    pub(super) fn offer_slices(&self, round: Round, fragment: FragmentPlan, slices: Vec<Slice>) -> Vec<ContentHash> {
        let offer = |Slice { reducer, hash, blob }| {
            let key = BlobKey::Slice { round, fragment: fragment.index, site: self.site, reducer };
            self.shelf.offer(round, key, blob);
            hash
        };
        slices.into_iter().map(offer).collect()
    }

    pub(super) fn fetch_slice(
        &mut self,
        round: Round,
        (fragment, values): (FragmentPlan, Range<u64>),
        (from, hash): (SiteId, ContentHash),
    ) {
        let codec = self.fragments.codec(fragment);
        let Some(place) = codec.slice(&values) else { return self.refuse_parts(round) };
        let key = BlobKey::Slice { round, fragment: fragment.index, site: from, reducer: self.site };
        let (values, bytes) = ((values.end - values.start) as usize, place.len() as u64);
        self.fetch_shard(WantedShard { key, round, from, values, codec: ShardCodec::Slice(codec), bytes, hash });
    }

    pub(super) fn fetch_part(&mut self, round: Round, fragment: FragmentPlan, merged: &MergedPart) {
        let MergedPart { part, hash } = merged;
        if self.fragments.codec(fragment).slice(&part.values).is_none() {
            return self.refuse_parts(round);
        }
        let key = BlobKey::Part { round, fragment: fragment.index, reducer: part.site };
        let values = (part.values.end - part.values.start) as usize;
        let (from, codec, bytes) = (part.site, ShardCodec::Merged, part.merged_bytes());
        self.fetch_shard(WantedShard { key, round, from, values, codec, bytes, hash: *hash });
    }

    fn refuse_parts(&mut self, round: Round) {
        let error = format!("it cuts round {round} where its deltas cannot be cut");
        self.end(Err(conversation("its address", error).into()));
    }

    fn fetch_shard(&mut self, wanted: WantedShard) {
        let (transit, round) = (Arc::clone(&self.transit), wanted.round);
        let (key, hash) = (wanted.key.clone(), wanted.hash);
        let transfer = self.transfers.spawn(async move {
            let began = Instant::now();
            let bytes = transit.fetch_shard(&wanted).await;
            let WantedShard { key, from, hash, .. } = wanted;
            Fetched::Shard { round, key, from, hash, bytes, seconds: began.elapsed().as_secs_f64() }
        });
        self.is_fetching(round, key, hash, transfer);
    }

    /// A slice or a merged part has come.
    pub(super) async fn shard_fetched(
        &mut self,
        (round, key, from): (Round, BlobKey, SiteId),
        bytes: Bytes,
        seconds: f64,
    ) -> Result<(), AgentError> {
        self.tell_fetched(round, from, bytes.len() as u64, seconds).await;
        if matches!(key, BlobKey::Slice { .. }) {
            self.shards.slices.insert((round, from), bytes);
            return self.feed(MemberEvent::SliceHeld { round, from }).await;
        }
        self.shelf.offer(round, key, Blob::memory(bytes.clone()));
        self.shards.parts.insert((round, from), bytes);
        self.feed(MemberEvent::PartHeld { round, from }).await
    }

    pub(super) fn reduce(
        &mut self,
        round: Round,
        (fragment, values): (FragmentPlan, Range<u64>),
        contributors: &[Contributor],
    ) {
        let Some(place) = self.fragments.codec(fragment).slice(&values) else { return self.refuse_parts(round) };
        let slice = |contributor: &Contributor| match contributor.site == self.site {
            true => self.deltas.get(&(round, self.site)).map(|delta| delta.slice(place.clone())),
            false => self.shards.slices.get(&(round, contributor.site)).cloned(),
        };
        // The member merges only what is held.
        let Some(slices) = contributors.iter().map(slice).collect() else { return self.end(Err(AgentError::Internal)) };
        let (key, values) = (PartKey { round, fragment }, (values.end - values.start) as usize);
        let (contributors, abandon) = (contributors.to_vec(), Arc::clone(&self.abandon));
        self.host_job(HostJob::Reduce { key, values, contributors, slices, abandon });
    }

    /// The own part is merged.
    pub(super) async fn reduced(
        &mut self,
        PartKey { round, fragment }: PartKey,
        part: Bytes,
        (hash, blob): (ContentHash, Blob),
    ) -> Result<(), AgentError> {
        let key = BlobKey::Part { round, fragment: fragment.index, reducer: self.site };
        self.shelf.offer(round, key, blob);
        self.shards.parts.insert((round, self.site), part);
        self.feed(MemberEvent::Reduced { round, hash }).await
    }
}
