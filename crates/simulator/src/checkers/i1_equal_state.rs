//! I1: after each commit, the hash of (parameters, outer momentum, term, round, cursor) is equal on all live sites.
//!
//! Equal is not enough, since all may be wrong in the same way: the state is computed anew here, from the deltas that sites have offered
//! and the commits that the log has acknowledged, with weights by tokens, and every site's must have the same hash.

use super::{Checker, described, effective};
use crate::scenario::Scenario;
use crate::site::GlobalState;
use crate::trace::Observation;
use base::{ContentHash, Round, RunConfig, SiteId};
use rounds::coordinator::Record;
use rounds::{Commit, Contributor, FragmentCodec, MergedPart};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) struct EqualState {
    config: Arc<RunConfig>,
    /// The state after each commit that counts, from round 0.
    states: Vec<(GlobalState, ContentHash)>,
    /// By the round and the hash that it was announced with.
    deltas: BTreeMap<(Round, SiteId, ContentHash), Arc<[u8]>>,
}

impl EqualState {
    pub(super) fn new(scenario: &Scenario) -> Self {
        let initial = GlobalState::initial(&scenario.config);
        let hash = initial.hash();
        Self { config: Arc::clone(&scenario.config), states: vec![(initial, hash)], deltas: BTreeMap::new() }
    }

    /// The log has this commit behind all others.
    fn committed(&mut self, commit: &Commit) -> Result<(), String> {
        let Some((before, _)) = self.states.last() else { return Ok(()) };
        let (mut state, plan) = (before.clone(), commit.fragment);
        let schema = self.config.schema();
        let fragment = schema.fragments(plan.count).swap_remove(plan.index as usize);
        let codec = FragmentCodec::new(plan, plan.rank_or(self.config.sync.rank), &schema, &fragment);
        let mut merged = self.merged(commit, &codec, fragment.elements())?;
        let steps_before = commit.round.0.saturating_sub(1);
        state.outer.step(steps_before, &fragment, &mut state.parameters, &mut merged);
        state.commit = commit.clone();
        let hash = state.hash();
        self.states.push((state, hash));
        self.deltas.retain(|(round, _, _), _| round.0 + 1 > commit.round.0);
        Ok(())
    }

    /// What the deltas that a commit names become: each part by itself, where sites have merged parts, for what is too long is so beside the
    /// other slices.
    fn merged(&self, commit: &Commit, codec: &FragmentCodec, elements: usize) -> Result<Vec<f32>, String> {
        let delta = |contributor: &Contributor| {
            let delta = self.deltas.get(&(commit.round, contributor.site, contributor.delta_hash));
            let missing = || format!("{} names a delta that nobody has offered", described(commit));
            delta.map(|delta| (contributor.tokens, &delta[..])).ok_or_else(missing)
        };
        let deltas = commit.contributors.iter().map(delta).collect::<Result<Vec<_>, String>>()?;
        let mut merged = vec![0.0; elements];
        if commit.parts.is_empty() {
            rounds::merge(&self.config.sync, codec, &deltas, &mut merged).map_err(|error| error.to_string())?;
        }
        for MergedPart { part, .. } in &commit.parts {
            let cut = || format!("{} has a part that cuts a block", described(commit));
            let place = codec.slice(&part.values).ok_or_else(cut)?;
            let slices: Vec<(u64, &[u8])> =
                deltas.iter().map(|(tokens, delta)| (*tokens, &delta[place.clone()])).collect();
            let values = &mut merged[part.values.start as usize..part.values.end as usize];
            rounds::merge(&self.config.sync, codec, &slices, values).map_err(|error| error.to_string())?;
        }
        Ok(merged)
    }

    fn log_read(&mut self, records: &[Record]) -> Result<(), String> {
        for committed in effective(records) {
            let known = self.states.last().map_or(Round(0), |(state, _)| state.commit.round);
            // What the log had and had not acknowledged when its process died.
            if committed.commit.round == known.next() {
                self.committed(&committed.commit)?;
            }
        }
        Ok(())
    }

    fn compare(&self, machine: usize, commit: &Commit, found: ContentHash) -> Result<(), String> {
        let known = self.states.iter().find(|(state, _)| state.commit == *commit);
        match known {
            Some((_, expected)) if *expected != found => Err(format!(
                "machine {machine} holds {} after {}, which gives {}",
                found.short(),
                described(commit),
                expected.short()
            )),
            // That a commit is in the log is another invariant.
            _ => Ok(()),
        }
    }
}

impl Checker for EqualState {
    fn name(&self) -> &'static str {
        "I1 equal state"
    }

    fn see(&mut self, _seconds: f64, observation: &Observation) -> Result<(), String> {
        match observation {
            Observation::Offers { site, round, delta, .. } => {
                self.deltas.insert((*round, *site, ContentHash::of(delta)), Arc::clone(delta));
                Ok(())
            }
            Observation::LogRead(records) => self.log_read(records),
            Observation::Logged(record) => match &**record {
                Record::Committed(committed) => self.committed(&committed.commit),
                Record::RolledBack { to } => {
                    self.states.retain(|(state, _)| state.commit.round <= *to);
                    Ok(())
                }
                _ => Ok(()),
            },
            Observation::Merged { machine, commit, state_hash } => self.compare(*machine, commit, *state_hash),
            Observation::Installed(machine, commit, state_hash) => self.compare(*machine, commit, *state_hash),
            Observation::SiteLeft(site, reason) if reason == "diverged" => {
                Err(format!("site {site} was dropped because its state differs"))
            }
            _ => Ok(()),
        }
    }
}
