//! A site's side of a sharded round: it fetches the slices of its own part, merges them when told whose count, and fetches the parts
//! that the others merged.
//!
//! Where the coordinator gives such a round back to the mesh it announces whole deltas instead, and what was merged in parts is not used.

use super::{Member, MemberCommand, ProtocolError};
use crate::exchange::{MergedPart, Part, is_cut};
use crate::plan::{Commit, Contributor, FragmentPlan, Report};
use base::{ContentHash, Round, SiteId, Term};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// What is known of slices and merged parts, each by the site that it is from.
#[derive(Debug, Clone, Default)]
pub(super) struct Shards {
    slices: BTreeMap<(Round, SiteId), ContentHash>,
    slices_held: BTreeSet<(Round, SiteId)>,
    parts: BTreeMap<(Round, SiteId), MergedPart>,
    parts_held: BTreeSet<(Round, SiteId)>,
}

impl Shards {
    pub(super) fn retain(&mut self, is_wanted: impl Fn(Round) -> bool) {
        self.slices.retain(|(round, _), _| is_wanted(*round));
        self.slices_held.retain(|(round, _)| is_wanted(*round));
        self.parts.retain(|(round, _), _| is_wanted(*round));
        self.parts_held.retain(|(round, _)| is_wanted(*round));
    }

    pub(super) fn hold_all(&self, commit: &Commit) -> bool {
        commit.parts.iter().all(|merged| self.parts_held.contains(&(commit.round, merged.part.site)))
    }
}

impl Member {
    /// The values that this site merges in a round.
    fn own_values(&self, round: Round) -> Option<Range<u64>> {
        let parts = &self.plans.get(&round)?.parts;
        parts.iter().find(|part| part.site == self.site).map(|part| part.values.clone())
    }

    pub(super) fn slice_ready(
        &mut self,
        (term, round): (Term, Round),
        from: SiteId,
        hash: ContentHash,
        commands: &mut Vec<MemberCommand>,
    ) -> Result<(), ProtocolError> {
        let Some(fragment) = self.planned(term, round).map(|plan| plan.fragment) else { return Ok(()) };
        let Some(values) = self.own_values(round) else {
            return Err(self.refuse(format!("a slice of round {round}, in which this site merges nothing")));
        };
        if self.shards.slices.insert((round, from), hash).is_none() {
            commands.push(MemberCommand::FetchSlice { round, fragment, values, from, hash });
        }
        Ok(())
    }

    pub(super) fn slice_held(&mut self, round: Round, from: SiteId, commands: &mut Vec<MemberCommand>) {
        if round > self.round && self.shards.slices.contains_key(&(round, from)) {
            self.shards.slices_held.insert((round, from));
            commands.push(MemberCommand::Report(Report::HoldsSlice { round, attempt: self.attempt(round), from }));
        }
    }

    pub(super) fn reduce(
        &mut self,
        (term, round): (Term, Round),
        contributors: Vec<Contributor>,
        commands: &mut Vec<MemberCommand>,
    ) -> Result<(), ProtocolError> {
        let Some(fragment) = self.planned(term, round).map(|plan| plan.fragment) else { return Ok(()) };
        let is_held = |contributor: &Contributor| match contributor.site == self.site {
            true => self.encoded.contains(&round),
            false => self.shards.slices_held.contains(&(round, contributor.site)),
        };
        let in_order = contributors.is_sorted_by(|one, other| one.site < other.site);
        match self.own_values(round) {
            Some(values) if in_order && contributors.iter().all(is_held) => {
                commands.push(MemberCommand::Reduce { round, fragment, values, contributors });
                Ok(())
            }
            _ => Err(self.refuse(format!("a merge for round {round} of what this site does not hold"))),
        }
    }

    /// The own part is merged.
    pub(super) fn reduced(&mut self, round: Round, hash: ContentHash, commands: &mut Vec<MemberCommand>) {
        if let Some(values) = self.own_values(round).filter(|_| round > self.round) {
            let (part, key) = (Part { site: self.site, values }, (round, self.site));
            self.shards.parts.insert(key, MergedPart { part, hash });
            self.shards.parts_held.insert(key);
            commands.push(MemberCommand::Report(Report::Reduced { round, attempt: self.attempt(round), hash }));
        }
    }

    /// Fetches a merged part that is not held and not on its way.
    pub(super) fn announce_part(
        &mut self,
        round: Round,
        fragment: FragmentPlan,
        part: MergedPart,
        commands: &mut Vec<MemberCommand>,
    ) -> Result<(), ProtocolError> {
        let key = (round, part.part.site);
        match self.shards.parts.get(&key) {
            Some(known) if *known == part => Ok(()),
            Some(_) => Err(self.refuse(format!("another part that site {} merged in round {round}", part.part.site))),
            None => {
                self.shards.parts.insert(key, part.clone());
                commands.push(MemberCommand::FetchPart { round, fragment, part });
                Ok(())
            }
        }
    }

    pub(super) fn announce_parts(
        &mut self,
        commit: &Commit,
        commands: &mut Vec<MemberCommand>,
    ) -> Result<(), ProtocolError> {
        if !is_cut(commit.parts.iter().map(|merged| &merged.part)) {
            return Err(
                self.refuse(format!("a commit of round {} whose parts are not one after the other", commit.round))
            );
        }
        commit
            .parts
            .iter()
            .try_for_each(|merged| self.announce_part(commit.round, commit.fragment, merged.clone(), commands))
    }

    pub(super) fn part_held(&mut self, round: Round, from: SiteId, commands: &mut Vec<MemberCommand>) {
        if round > self.round && self.shards.parts.contains_key(&(round, from)) {
            self.shards.parts_held.insert((round, from));
            commands.push(MemberCommand::Report(Report::HoldsPart { round, attempt: self.attempt(round), from }));
        }
    }
}
