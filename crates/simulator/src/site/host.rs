//! The host's thread of a simulated site: encodes and merges with the arithmetic that ships, in virtual time.
//!
//! What a site does with its own part of a merge is that of `site::merger`, in its default settings; there it is spread over parts of
//! large tensors, here it is three lines.

use super::state::GlobalState;
use crate::options::Sabotage;
use base::config::Strategy;
use base::{ContentHash, Fragment, Round, RunConfig, SiteId};
use rounds::{Commit, EncoderMemory, FragmentCodec, FragmentPlan, RoundPlan};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// What a site has trained of a round.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Progress {
    pub(crate) tokens: u64,
    pub(crate) compute_seconds: f64,
}

/// A slice of a delta, and the tokens of its maker.
pub(crate) type Slice = (u64, Arc<[u8]>);

/// Jobs are done in order.
#[derive(Debug, Clone)]
pub(crate) enum HostJob {
    Encode {
        plan: RoundPlan,
        values: Vec<f32>,
        progress: Progress,
        generation: u64,
    },
    /// `inputs` are the contributors' deltas, or the merged parts.
    Merge {
        commit: Commit,
        inputs: Vec<Arc<[u8]>>,
    },
    /// Merge the slices of these contributors.
    Reduce {
        round: Round,
        fragment: FragmentPlan,
        values: Range<u64>,
        slices: Vec<Slice>,
        generation: u64,
    },
    Install {
        commit: Commit,
        bytes: Arc<[u8]>,
    },
    Withdraw,
}

/// How local parameters take over what was merged.
#[derive(Debug, Clone)]
pub(crate) enum LocalChange {
    Become(Vec<f32>),
    Add { change: Vec<f32>, counts_from_snapshot: bool },
}

/// A commit that has become part of the global state.
#[derive(Debug, Clone)]
pub(crate) struct Merged {
    pub(crate) round: Round,
    pub(crate) state_hash: ContentHash,
    pub(crate) fragment: FragmentPlan,
    pub(crate) local: LocalChange,
}

struct InFlight {
    encoded: Arc<[u8]>,
    /// In `streaming`: G - q, what the local parameters are counted from.
    before: Option<Vec<f32>>,
}

/// Encodes this site's deltas and merges everybody's.
pub(crate) struct Host {
    site: SiteId,
    config: Arc<RunConfig>,
    sabotage: Option<Sabotage>,
    residual: Vec<f32>,
    in_flight: BTreeMap<Round, InFlight>,
    memories: BTreeMap<u32, EncoderMemory>,
    pub(crate) queue: VecDeque<HostJob>,
    pub(crate) busy: Option<HostJob>,
}

/// The parameters that a plan means.
pub(crate) fn fragment_of(config: &RunConfig, plan: FragmentPlan) -> Fragment {
    let mut all = config.schema().fragments(plan.count);
    all.swap_remove(plan.index as usize)
}

/// How their deltas are coded.
pub(crate) fn codec_of(config: &RunConfig, plan: FragmentPlan) -> FragmentCodec {
    FragmentCodec::new(plan, plan.rank_or(config.sync.rank), &config.schema(), &fragment_of(config, plan))
}

/// The values of merged parts, one after the other.
fn joined(parts: &[Arc<[u8]>]) -> Vec<f32> {
    let values = parts.iter().flat_map(|part| part.chunks_exact(size_of::<f32>()));
    values.map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect()
}

fn gathered(fragment: &Fragment, all: &[f32]) -> Vec<f32> {
    let mut values = vec![0.0; fragment.elements()];
    fragment.gather(all, &mut values);
    values
}

impl Host {
    pub(crate) fn new(site: SiteId, config: Arc<RunConfig>, sabotage: Option<Sabotage>) -> Self {
        let residual = vec![0.0; config.schema().elements()];
        let (in_flight, memories) = (BTreeMap::new(), BTreeMap::new());
        Self { site, config, sabotage, residual, in_flight, memories, queue: VecDeque::new(), busy: None }
    }

    fn is_streaming(&self) -> bool {
        self.config.sync.strategy == Strategy::Streaming
    }

    /// The delta of a snapshot: d = G - L + e; what coding lost stays in the local parameters in `streaming`, else in e.
    pub(crate) fn encode(&mut self, plan: &RoundPlan, local: &[f32], state: &GlobalState) -> Arc<[u8]> {
        let fragment = fragment_of(&self.config, plan.fragment);
        let codec = codec_of(&self.config, plan.fragment);
        let mut delta = gathered(&fragment, &state.parameters);
        let residual = gathered(&fragment, &self.residual);
        for ((delta, local), residual) in delta.iter_mut().zip(local).zip(&residual) {
            *delta = *delta - local + residual;
        }
        let memory = self.memories.entry(plan.fragment.index).or_default();
        let encoded: Arc<[u8]> = codec.encode(&mut delta, memory).into();
        let lost = delta;
        let before = if self.is_streaming() {
            Some(local.iter().zip(&lost).map(|(local, lost)| local + lost).collect())
        } else {
            fragment.scatter(&lost, &mut self.residual);
            None
        };
        self.in_flight.insert(plan.round, InFlight { encoded: Arc::clone(&encoded), before });
        encoded
    }

    /// Merges the slices of a round's contributors, in their order. `None`: bytes that no encoder writes.
    pub(crate) fn reduce(&self, fragment: FragmentPlan, values: &Range<u64>, slices: &[Slice]) -> Option<Arc<[u8]>> {
        let codec = codec_of(&self.config, fragment);
        let slices: Vec<(u64, &[u8])> = slices.iter().map(|(tokens, slice)| (*tokens, &slice[..])).collect();
        let merged = self.merged(&codec, slices, (values.end - values.start) as usize)?;
        Some(merged.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// Merges the deltas of a commit in its order, or takes its merged parts, and takes the outer step. `None`: bytes that no encoder
    /// writes, or parts that are not the whole.
    pub(crate) fn merge(&mut self, commit: &Commit, inputs: &[Arc<[u8]>], state: &mut GlobalState) -> Option<Merged> {
        let fragment = fragment_of(&self.config, commit.fragment);
        let codec = codec_of(&self.config, commit.fragment);
        let own = self.settle_own(commit, &fragment, &codec)?;
        let counts_from_snapshot = own.is_some();
        let before = own.unwrap_or_else(|| gathered(&fragment, &state.parameters));
        let mut merged = match commit.parts.is_empty() {
            true => {
                let tokens = commit.contributors.iter().map(|contributor| contributor.tokens);
                let deltas = tokens.zip(inputs.iter().map(|delta| &delta[..])).collect();
                self.merged(&codec, deltas, fragment.elements())?
            }
            false => joined(inputs),
        };
        if merged.len() != fragment.elements() {
            return None;
        }
        state.outer.step(commit.round.0.saturating_sub(1), &fragment, &mut state.parameters, &mut merged);
        state.commit = commit.clone();
        let after = gathered(&fragment, &state.parameters);
        let local = match self.is_streaming() {
            true => {
                let change = after.iter().zip(&before).map(|(after, before)| after - before).collect();
                LocalChange::Add { change, counts_from_snapshot }
            }
            false => LocalChange::Become(after),
        };
        Some(Merged { round: commit.round, state_hash: state.hash(), fragment: commit.fragment, local })
    }

    /// The merge of deltas, or of their slices, with their tokens.
    fn merged(&self, codec: &FragmentCodec, mut deltas: Vec<(u64, &[u8])>, values: usize) -> Option<Vec<f32>> {
        if self.sabotage == Some(Sabotage::EqualWeights) {
            deltas.iter_mut().for_each(|(tokens, _)| *tokens = 1);
        }
        let mut merged = vec![0.0; values];
        rounds::merge(&self.config.sync, codec, &deltas, &mut merged).ok()?;
        Some(merged)
    }

    /// What the own local parameters are counted from, where that is not the global parameters before the merge. What was sent and
    /// left out is not lost.
    fn settle_own(&mut self, commit: &Commit, fragment: &Fragment, codec: &FragmentCodec) -> Option<Option<Vec<f32>>> {
        let own = self.in_flight.remove(&commit.round);
        self.in_flight.retain(|round, _| *round > commit.round);
        let Some(InFlight { encoded, before }) = own else { return Some(None) };
        if commit.contributors.iter().any(|contributor| contributor.site == self.site) {
            return Some(before);
        }
        if !self.is_streaming() {
            let mut kept = gathered(fragment, &self.residual);
            codec.accumulate(&encoded, 1.0, &mut kept).ok()?;
            fragment.scatter(&kept, &mut self.residual);
        }
        Some(None)
    }

    /// Takes over a state that was fetched; false where it does not fit.
    pub(crate) fn install(&mut self, commit: &Commit, bytes: &[u8], state: &mut GlobalState) -> bool {
        if !state.decode(commit.clone(), bytes) {
            return false;
        }
        if self.sabotage == Some(Sabotage::MomentumMissing) {
            state.outer.buffers_mut().iter_mut().for_each(|buffer| buffer.fill(0.0));
        }
        self.residual.fill(0.0);
        self.in_flight.clear();
        self.memories.clear();
        true
    }

    /// Plans were withdrawn: own deltas on their way are not wanted.
    pub(crate) fn withdraw(&mut self) {
        self.in_flight.clear();
    }
}
