//! The host's side of a round, beside the engine's: encoding what the engine has trained, merging what all have sent.
//!
//! For the fragment p of a round, with local parameters L, global parameters G and what earlier coding left over, e:
//! ```text
//! d = G_p - L_p + e_p         (the gradient + e_p where the strategy is synchronous)
//! q = encode(d);   e_p = beta * (d - decode(q))
//! D = sum over contributors, ascending by site id, of (T_i / sum T) * decode(q_i)        in f32
//! ```
//! then the outer step on D ([`rounds::OuterOptimizer`]). A delta that was left out of its round's commit goes back into e_p whole, so
//! that the next one holds it.

use crate::state::{GlobalState, SharedState};
use base::config::{Strategy, SyncSection};
use base::{ContentHash, Fragment, ParameterSchema, Round, RunConfig, SiteId};
use rounds::{Commit, FragmentPlan};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

/// A number in a delta that is not finite.
#[derive(Debug, Clone, PartialEq)]
pub struct NotFinite {
    /// The parameter it belongs to.
    pub parameter: String,
    /// The number.
    pub value: f32,
}

/// A commit that has become part of the global state.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// Its round.
    pub round: Round,
    /// Hash of the state after it (invariant I1).
    pub state_hash: ContentHash,
    /// What was merged.
    pub fragment: FragmentPlan,
    /// The fragment's new global parameters.
    pub values: Arc<Vec<f32>>,
}

/// Which parameters a plan means.
#[derive(Debug)]
pub struct Fragments {
    schema: ParameterSchema,
    by_count: BTreeMap<u32, Vec<Fragment>>,
}

impl Fragments {
    /// Of a model.
    pub fn new(schema: ParameterSchema) -> Self {
        Self { schema, by_count: BTreeMap::new() }
    }

    /// The parameters of that fragment.
    pub fn of(&mut self, plan: FragmentPlan) -> Fragment {
        let all = self.by_count.entry(plan.count).or_insert_with(|| self.schema.fragments(plan.count));
        all[plan.index as usize % all.len()].clone()
    }
}

/// Encodes this site's deltas and merges everybody's into the global state.
pub struct Merger {
    site: SiteId,
    sync: SyncSection,
    schema: ParameterSchema,
    state: SharedState,
    fragments: Fragments,
    /// What coding left over, of all parameters; empty while nothing was.
    residual: Vec<f32>,
    /// Own deltas that no commit has named or left out yet.
    in_flight: BTreeMap<Round, bytes::Bytes>,
}

impl Merger {
    /// For the site of that id, with nothing left over.
    pub fn new(site: SiteId, config: &RunConfig, state: SharedState) -> Self {
        let (schema, sync) = (config.schema(), config.sync.clone());
        let (fragments, in_flight) = (Fragments::new(schema.clone()), BTreeMap::new());
        Self { site, sync, schema, state, fragments, residual: Vec::new(), in_flight }
    }

    /// Encodes what this site has to give for a round: from the local parameters of the fragment, or from their gradient where the
    /// strategy is `synchronous`.
    ///
    /// # Errors
    /// A number that is not finite: nothing has changed.
    pub fn encode(&mut self, round: Round, plan: FragmentPlan, local: &[f32]) -> Result<bytes::Bytes, NotFinite> {
        let fragment = self.fragments.of(plan);
        let mut delta = vec![0.0; fragment.elements()];
        if self.sync.strategy == Strategy::Synchronous {
            delta.copy_from_slice(local);
        } else {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            fragment.gather(&state.parameters, &mut delta);
            delta.iter_mut().zip(local).for_each(|(global, local)| *global -= local);
        }
        if !self.residual.is_empty() {
            visit(&fragment, &self.residual, &mut delta, |residual, delta| *delta += residual);
        }
        self.require_finite(&fragment, &delta)?;
        let codec = rounds::codec(plan.codec);
        let mut encoded = vec![0; codec.encoded_bytes(delta.len())];
        codec.encode(&mut delta, &mut encoded);
        self.keep(&fragment, &delta);
        let encoded = bytes::Bytes::from(encoded);
        self.in_flight.insert(round, encoded.clone());
        Ok(encoded)
    }

    /// `lost` is what the encoding of `fragment` left over.
    fn keep(&mut self, fragment: &Fragment, lost: &[f32]) {
        let decay = self.sync.error_feedback as f32;
        if self.residual.is_empty() {
            if lost.iter().all(|value| *value == 0.0) {
                return;
            }
            self.residual = vec![0.0; self.schema.elements()];
        }
        let mut rest = lost;
        for range in &fragment.ranges {
            let (part, after) = rest.split_at(range.len());
            for (residual, lost) in self.residual[range.clone()].iter_mut().zip(part) {
                *residual = decay * lost;
            }
            rest = after;
        }
    }

    /// A delta with a number that is not finite would poison every site's model.
    fn require_finite(&self, fragment: &Fragment, delta: &[f32]) -> Result<(), NotFinite> {
        // Summed without branches; a number that is not finite makes the sum so.
        if delta.iter().map(|value| value * 0.0).sum::<f32>() == 0.0 {
            return Ok(());
        }
        let Some(index) = delta.iter().position(|value| !value.is_finite()) else { return Ok(()) };
        let place = fragment.ranges.iter().flat_map(Clone::clone).nth(index).unwrap_or_default();
        let holds_it = |parameter: &&base::ParameterSpec| parameter.range.contains(&place);
        let name = self.schema.parameters().iter().find(holds_it).map(|parameter| parameter.name.clone());
        Err(NotFinite { parameter: name.unwrap_or_default(), value: delta[index] })
    }

    /// Merges the deltas that a commit names, in its order, and takes the outer step.
    ///
    /// # Errors
    /// Bytes that no encoder writes. They were checked when they were fetched, so that this is a bug or a broken memory.
    pub fn merge(&mut self, commit: &Commit, deltas: &[bytes::Bytes]) -> Result<Merged, formats::DecodeError> {
        let fragment = self.fragments.of(commit.fragment);
        let codec = rounds::codec(commit.fragment.codec);
        let mut merged = vec![0.0; fragment.elements()];
        let contributions: Vec<(u64, &[u8])> = commit
            .contributors
            .iter()
            .zip(deltas)
            .map(|(contributor, delta)| (contributor.tokens, &delta[..]))
            .collect();
        rounds::token_weighted_mean(codec, &contributions, &mut merged)?;
        self.settle_own(commit, &fragment)?;
        let state = Arc::clone(&self.state);
        let mut state = state.write().unwrap_or_else(PoisonError::into_inner);
        let GlobalState { parameters, outer, .. } = &mut *state;
        outer.step(commit.round.0 - 1, &fragment, parameters, &mut merged);
        state.commit = commit.clone();
        let state_hash = state.hash();
        fragment.gather(&state.parameters, &mut merged);
        Ok(Merged { round: commit.round, state_hash, fragment: commit.fragment, values: Arc::new(merged) })
    }

    /// What this site sent and the commit left out is not lost.
    fn settle_own(&mut self, commit: &Commit, fragment: &Fragment) -> Result<(), formats::DecodeError> {
        let own = self.in_flight.remove(&commit.round);
        self.in_flight.retain(|round, _| *round > commit.round);
        let Some(own) = own.filter(|_| commit.contributors.iter().all(|contributor| contributor.site != self.site))
        else {
            return Ok(());
        };
        if self.residual.is_empty() {
            self.residual = vec![0.0; self.schema.elements()];
        }
        let mut kept = vec![0.0; fragment.elements()];
        fragment.gather(&self.residual, &mut kept);
        rounds::codec(commit.fragment.codec).accumulate(&own, 1.0, &mut kept)?;
        fragment.scatter(&kept, &mut self.residual);
        Ok(())
    }

    /// Euclidean norm of what coding has left over.
    pub fn residual_norm(&self) -> f64 {
        self.residual.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt()
    }

    /// Forgets own deltas that are on their way: their plans were withdrawn.
    pub fn withdraw(&mut self) {
        self.in_flight.clear();
    }

    /// Forgets all that is not global: another state is in place.
    pub fn start_over(&mut self) {
        self.residual = Vec::new();
        self.in_flight.clear();
    }

    /// The global state that this merger changes.
    pub fn state(&self) -> &SharedState {
        &self.state
    }
}

/// Calls `each` with the elements of `all` that are in `fragment`, and those of `values`, side by side.
fn visit(fragment: &Fragment, all: &[f32], values: &mut [f32], each: impl Fn(f32, &mut f32)) {
    let mut rest = values;
    for range in &fragment.ranges {
        let (part, after) = rest.split_at_mut(range.len());
        all[range.clone()].iter().zip(part).for_each(|(from, to)| each(*from, to));
        rest = after;
    }
}
