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
use rounds::{Commit, FragmentCodec};
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
        let tokens: u64 = commit.contributors.iter().map(|contributor| contributor.tokens).sum();
        let mut merged = vec![0.0; fragment.elements()];
        for contributor in &commit.contributors {
            let key = (commit.round, contributor.site, contributor.delta_hash);
            let Some(delta) = self.deltas.get(&key) else {
                return Err(format!("{} names a delta that nobody has offered", described(commit)));
            };
            let weight = if tokens == 0 { 0.0 } else { (contributor.tokens as f64 / tokens as f64) as f32 };
            codec.accumulate(delta, weight, &mut merged).map_err(|error| error.to_string())?;
        }
        let steps_before = commit.round.0.saturating_sub(1);
        state.outer.step(steps_before, &fragment, &mut state.parameters, &mut merged);
        state.commit = commit.clone();
        let hash = state.hash();
        self.states.push((state, hash));
        self.deltas.retain(|(round, _, _), _| round.0 + 1 > commit.round.0);
        Ok(())
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
