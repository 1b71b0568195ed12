//! The host's side of a round, beside the engine's: encoding what the engine has trained, merging what all have sent.
//!
//! For the fragment p of a round, with local parameters L, global parameters G and what earlier coding left over, e:
//! ```text
//! d = G_p - L_p + e_p         (the gradient + e_p where the strategy is synchronous)
//! q = decode(encode(d))
//! D = sum over contributors, ascending by site id, of (T_i / sum T) * f_i * q_i  in f32, f_i of rounds::clip
//! ```
//! then the outer step on D ([`rounds::OuterOptimizer`]). What coding lost, d - q, is kept in one of two ways:
//!
//! - in `streaming`, unless `keep_residual` is off, in the local parameters: these change by G' - G + q, that is by what was merged less what
//!   this site has given to it. The next d holds what was lost, and e_p is 0. A delta that its commit left out needs no more: the
//!   local parameters change by G' - G;
//! - otherwise in e_p = beta * (d - q), and the local parameters take over all of G'. A delta that was left out goes back into e_p.
//!
//! Every pass over a fragment costs the engine's processor time where host and engine share one: none is made for what can be had in
//! another.

use crate::state::{GlobalState, SharedState};
use base::config::{MergeRule, Strategy, SyncSection};
use base::{ContentHash, Fragment, ParameterSchema, Round, RunConfig, SiteId};
use bytes::Bytes;
use formats::CodecKind;
use rounds::{Commit, Contributor, EncoderMemory, FragmentCodec, FragmentPlan, Weighed};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use telemetry::Event;

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
    /// What becomes of this site's own parameters of the fragment.
    pub local: LocalChange,
    /// Deltas that counted for less than their tokens say.
    pub clipped: Vec<Clipped>,
}

/// A delta that was too long beside the others, or a slice of one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clipped {
    /// Whose.
    pub site: SiteId,
    /// By how much.
    pub by: rounds::Clipped,
    /// Values that the norms are of: those of the fragment, or of a slice.
    pub values: usize,
}

impl Clipped {
    /// As the log has it.
    pub fn event(&self, round: Round) -> Event {
        let rounds::Clipped { norm, median, factor, .. } = self.by;
        let (site, values) = (self.site, self.values as u64);
        Event::DeltaClipped { round, site, norm, median, factor: f64::from(factor), values }
    }
}

/// Who each of these is, among `contributors`.
fn named(clipped: &[rounds::Clipped], contributors: &[Contributor], values: usize) -> Vec<Clipped> {
    clipped.iter().map(|by| Clipped { site: contributors[by.index].site, by: *by, values }).collect()
}

/// How local parameters take over what was merged.
#[derive(Debug, Clone, PartialEq)]
pub enum LocalChange {
    /// They become the fragment's new global parameters.
    Become(Vec<f32>),
    /// Something is added to them: they keep what was learnt since the snapshot.
    Add {
        /// What is added.
        change: Vec<f32>,
        /// It is counted from the snapshot that this site took in that round: whoever has lost that takes the global parameters
        /// instead.
        counts_from_snapshot: bool,
    },
}

/// An own delta that no commit has named or left out yet.
struct InFlight {
    encoded: Bytes,
    /// What the local parameters are counted from when they take over the merge, in `streaming`: the snapshot, or G - q where they keep
    /// what coding lost.
    before: Option<Vec<f32>>,
}

/// Which parameters a plan means.
#[derive(Debug)]
pub struct Fragments {
    schema: ParameterSchema,
    /// Where a plan has none.
    rank: u32,
    by_count: BTreeMap<u32, Vec<Fragment>>,
}

impl Fragments {
    /// Of a run's model.
    pub fn new(config: &RunConfig) -> Self {
        Self { schema: config.schema(), rank: config.sync.rank, by_count: BTreeMap::new() }
    }

    /// The parameters of that fragment.
    pub fn of(&mut self, plan: FragmentPlan) -> Fragment {
        let all = self.by_count.entry(plan.count).or_insert_with(|| self.schema.fragments(plan.count));
        all[plan.index as usize % all.len()].clone()
    }

    /// How its deltas are coded.
    pub fn codec(&mut self, plan: FragmentPlan) -> FragmentCodec {
        let fragment = self.of(plan);
        FragmentCodec::new(plan, plan.rank_or(self.rank), &self.schema, &fragment)
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
    in_flight: BTreeMap<Round, InFlight>,
    /// What the encoder keeps of each fragment, with the plan that it is kept for, by index.
    memories: BTreeMap<u32, (FragmentPlan, EncoderMemory)>,
    /// See [`Merger::lost_part`].
    lost_part: f64,
    /// Memory for what is merged: new memory of that size would be cleared by the system first.
    scratch: Vec<f32>,
}

impl Merger {
    /// For the site of that id, with nothing left over.
    pub fn new(site: SiteId, config: &RunConfig, state: SharedState) -> Self {
        let (schema, sync) = (config.schema(), config.sync.clone());
        let (fragments, in_flight) = (Fragments::new(config), BTreeMap::new());
        Self {
            site,
            sync,
            schema,
            state,
            fragments,
            residual: Vec::new(),
            in_flight,
            memories: BTreeMap::new(),
            lost_part: 0.0,
            scratch: Vec::new(),
        }
    }

    /// Encodes what this site has to give for a round: from the local parameters of the fragment, or from their gradient where the
    /// strategy is `synchronous`.
    ///
    /// # Errors
    /// A number that is not finite: nothing has changed but the encoder's warm start.
    pub fn encode(&mut self, round: Round, plan: FragmentPlan, local: &Arc<Vec<f32>>) -> Result<Bytes, NotFinite> {
        let fragment = self.fragments.of(plan);
        let codec = self.fragments.codec(plan);
        let mut memory = self.take_memory(plan);
        let mut encoded = vec![0; codec.encoded_bytes()];
        // In it, part by part: the delta, what coding lost of it, and what the local parameters are counted from.
        let mut values = Vec::with_capacity(local.len());
        let mut squares = (0.0, 0.0);
        for (index, part) in codec.parts().into_iter().enumerate() {
            self.push_delta(&fragment, part.clone(), local, &mut values);
            let delta = &mut values[part.clone()];
            self.require_finite(&fragment, part.start, delta)?;
            squares.0 += self.squared_norm(delta);
            codec.encode_part(index, delta, &mut memory, &mut encoded);
            squares.1 += self.squared_norm(delta);
            if self.keeps_residual() {
                // G - q = L + (d - q)
                delta.iter_mut().zip(&local[part]).for_each(|(lost, local)| *lost += local);
            }
        }
        self.lost_part = if squares.0 > 0.0 { (squares.1 / squares.0).sqrt() } else { 0.0 };
        self.memories.insert(plan.index, (plan, memory));
        let before = if self.keeps_residual() {
            Some(values)
        } else {
            self.feed_back(&fragment, &values);
            self.adds_to_local().then(|| local.to_vec())
        };
        let encoded = Bytes::from(encoded);
        self.in_flight.insert(round, InFlight { encoded: encoded.clone(), before });
        Ok(encoded)
    }

    /// What was kept for fragments or factors of another size is of no use.
    fn take_memory(&mut self, plan: FragmentPlan) -> EncoderMemory {
        self.memories.remove(&plan.index).filter(|(of, _)| *of == plan).map(|(_, memory)| memory).unwrap_or_default()
    }

    /// Appends a part of what is to be encoded: G - L + e, or the gradient + e where the strategy is `synchronous`.
    fn push_delta(&self, fragment: &Fragment, part: Range<usize>, local: &[f32], values: &mut Vec<f32>) {
        let start = values.len();
        let local = &local[part.clone()];
        if self.sync.strategy == Strategy::Synchronous {
            values.extend_from_slice(local);
        } else {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            for (place, within) in fragment.places(part.clone()) {
                values.extend(state.parameters[place].iter().zip(&local[within]).map(|(global, local)| global - local));
            }
        }
        if self.residual.is_empty() {
            return;
        }
        for (place, within) in fragment.places(part) {
            let delta = &mut values[start + within.start..start + within.end];
            delta.iter_mut().zip(&self.residual[place]).for_each(|(delta, residual)| *delta += residual);
        }
    }

    /// Where settings are adaptive; else 0.
    fn squared_norm(&self, values: &[f32]) -> f64 {
        if self.sync.adaptive { squared_norm(values) } else { 0.0 }
    }

    /// Norm of what the last encoding lost over the norm of what was to be encoded, where settings are adaptive; else 0.
    pub fn lost_part(&self) -> f64 {
        self.lost_part
    }

    fn keeps_residual(&self) -> bool {
        self.adds_to_local() && self.sync.keep_residual
    }

    /// Whether local parameters keep what was learnt since a snapshot.
    fn adds_to_local(&self) -> bool {
        self.sync.strategy == Strategy::Streaming && self.sync.keep_overlapped
    }

    /// `lost` is what the encoding of `fragment` left over.
    fn feed_back(&mut self, fragment: &Fragment, lost: &[f32]) {
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
    fn require_finite(&self, fragment: &Fragment, start: usize, delta: &[f32]) -> Result<(), NotFinite> {
        if formats::codec::all_finite(delta) {
            return Ok(());
        }
        let Some(index) = delta.iter().position(|value| !value.is_finite()) else { return Ok(()) };
        let place = fragment.ranges.iter().flat_map(Clone::clone).nth(start + index).unwrap_or_default();
        let holds_it = |parameter: &&base::ParameterSpec| parameter.range.contains(&place);
        let name = self.schema.parameters().iter().find(holds_it).map(|parameter| parameter.name.clone());
        Err(NotFinite { parameter: name.unwrap_or_default(), value: delta[index] })
    }

    /// Merges the slices of deltas that a round's contributors have for this site, `values` values of each, in order. Gives the merge as
    /// little-endian f32, and the slices that were clipped: where none is, the same bits as these values of the merge of the whole deltas.
    ///
    /// # Errors
    /// Bytes that no encoder writes. They were checked when they were fetched, so that this is a bug or a broken memory.
    pub fn reduce(
        &mut self,
        plan: FragmentPlan,
        values: usize,
        (contributors, slices): (&[Contributor], &[Bytes]),
    ) -> Result<(Bytes, Vec<Clipped>), formats::DecodeError> {
        let weighed = contributors.iter().map(|contributor| contributor.tokens);
        let slices: Vec<(u64, &[u8])> = weighed.zip(slices.iter().map(|slice| &slice[..])).collect();
        self.scratch.resize(values, 0.0);
        let clipped = rounds::merge(&self.sync, &self.fragments.codec(plan), &slices, &mut self.scratch)?;
        let merged = self.scratch.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok((merged, named(&clipped, contributors, values)))
    }

    /// How deltas of that fragment are coded.
    pub fn codec(&mut self, plan: FragmentPlan) -> FragmentCodec {
        self.fragments.codec(plan)
    }

    /// Takes the outer step by what a commit names: `inputs` are its contributors' deltas, or where it has merged parts, these; in its order.
    ///
    /// # Errors
    /// Bytes that no encoder writes, or parts that are not the whole. They were checked when they were fetched, so that this is a bug or a
    /// broken memory.
    pub fn merge(&mut self, commit: &Commit, inputs: &[Bytes]) -> Result<Merged, formats::DecodeError> {
        let fragment = self.fragments.of(commit.fragment);
        let codec = self.fragments.codec(commit.fragment);
        let inputs = match commit.parts.is_empty() {
            true => {
                let tokens = commit.contributors.iter().map(|contributor| contributor.tokens);
                let contributions: Vec<(u64, &Bytes)> = tokens.zip(inputs).collect();
                let weighed = rounds::weigh(&self.sync, &codec, &contributions, fragment.elements())?;
                Inputs::Deltas(self.sync.merge, weighed, inputs)
            }
            false => Inputs::parts(inputs, fragment.elements())?,
        };
        let clipped = named(inputs.clipped(), &commit.contributors, fragment.elements());
        let own_before = self.settle_own(commit, &fragment)?;
        let counts_from_snapshot = own_before.is_some();
        let (values, state_hash) = self.step(commit, (&fragment, &codec), &inputs, own_before)?;
        let local = if self.adds_to_local() {
            LocalChange::Add { change: values, counts_from_snapshot }
        } else {
            LocalChange::Become(values)
        };
        Ok(Merged { round: commit.round, state_hash, fragment: commit.fragment, local, clipped })
    }

    /// Takes the outer step, and gives what becomes of the local parameters, what is added to them or what they become, and the hash of the
    /// state. Parameters and commit change under one lock: nobody reads the one without the other.
    fn step(
        &mut self,
        commit: &Commit,
        (fragment, codec): (&Fragment, &FragmentCodec),
        inputs: &Inputs<'_>,
        own_before: Option<Vec<f32>>,
    ) -> Result<(Vec<f32>, ContentHash), formats::DecodeError> {
        let (adds, alpha) = (self.adds_to_local(), self.sync.mixing as f32);
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let GlobalState { parameters, outer, .. } = &mut *state;
        let is_separable = outer.is_separable();
        let mut values = own_before.unwrap_or_else(|| gathered(fragment, parameters));
        let parts = if is_separable { codec.parts() } else { Vec::new() };
        for (index, part) in parts.into_iter().enumerate() {
            self.scratch.clear();
            self.scratch.resize(part.len(), 0.0);
            inputs.merge_part(codec, (index, part.clone()), &mut self.scratch)?;
            for (place, within) in fragment.places(part.clone()) {
                outer.step_part(place.clone(), parameters, &self.scratch[within.clone()]);
                let values = &mut values[part.start + within.start..part.start + within.end];
                let stepped = values.iter_mut().zip(&parameters[place]);
                stepped.for_each(|(value, global)| *value = if adds { alpha * (global - *value) } else { *global });
            }
        }
        if !is_separable {
            inputs.merge(codec, &mut values)?;
            outer.step(commit.round.0 - 1, fragment, parameters, &mut values);
            fragment.gather(parameters, &mut values);
        }
        state.commit = commit.clone();
        let state_hash = state.hash();
        Ok((values, state_hash))
    }

    /// What this site sent and the commit left out is not lost. Gives what the local parameters are counted from, where that is not the
    /// global parameters before the merge.
    fn settle_own(&mut self, commit: &Commit, fragment: &Fragment) -> Result<Option<Vec<f32>>, formats::DecodeError> {
        let own = self.in_flight.remove(&commit.round);
        self.in_flight.retain(|round, _| *round > commit.round);
        let Some(InFlight { encoded, before }) = own else { return Ok(None) };
        if commit.contributors.iter().any(|contributor| contributor.site == self.site) {
            return Ok(before);
        }
        if self.keeps_residual() {
            return Ok(None);
        }
        if self.residual.is_empty() {
            self.residual = vec![0.0; self.schema.elements()];
        }
        let mut kept = vec![0.0; fragment.elements()];
        fragment.gather(&self.residual, &mut kept);
        self.fragments.codec(commit.fragment).accumulate(&encoded, 1.0, &mut kept)?;
        fragment.scatter(&kept, &mut self.residual);
        Ok(before)
    }

    /// Forgets own deltas that are on their way: their plans were withdrawn.
    pub fn withdraw(&mut self) {
        self.in_flight.clear();
    }

    /// Forgets all that is not global: another state is in place.
    pub fn start_over(&mut self) {
        self.residual = Vec::new();
        self.in_flight.clear();
        self.memories.clear();
    }

    /// The global state that this merger changes.
    pub fn state(&self) -> &SharedState {
        &self.state
    }
}

/// What a merge is made of.
enum Inputs<'a> {
    /// Whole deltas, in the order of the contributors, and how they become one.
    Deltas(MergeRule, Weighed, &'a [Bytes]),
    /// What sites have merged of them, little-endian f32, together all values in order.
    Parts(&'a [Bytes]),
}

impl<'a> Inputs<'a> {
    /// Parts that are the whole.
    fn parts(parts: &'a [Bytes], elements: usize) -> Result<Self, formats::DecodeError> {
        let uncoded = CodecKind::F32.codec();
        let (wanted, found) = (uncoded.encoded_bytes(elements), parts.iter().map(Bytes::len).sum());
        if wanted != found {
            return Err(formats::DecodeError::Length { codec: CodecKind::F32, values: elements, wanted, found });
        }
        parts.iter().try_for_each(|part| uncoded.check(part, part.len() / size_of::<f32>()))?;
        Ok(Self::Parts(parts))
    }

    /// What this site has clipped: merged parts were clipped by who has merged them.
    fn clipped(&self) -> &[rounds::Clipped] {
        match self {
            Self::Deltas(_, weighed, _) => &weighed.clipped,
            Self::Parts(_) => &[],
        }
    }

    /// Writes the merge of one of the codec's parts to `merged`, which is zero.
    fn merge_part(
        &self,
        codec: &FragmentCodec,
        (index, range): (usize, Range<usize>),
        merged: &mut [f32],
    ) -> Result<(), formats::DecodeError> {
        match self {
            Self::Deltas(rule, weighed, deltas) => {
                rounds::merge_part(*rule, codec, index, (&weighed.weights, deltas), merged)
            }
            Self::Parts(parts) => {
                copy_merged(parts, range, merged);
                Ok(())
            }
        }
    }

    /// Writes the whole merge to `merged`.
    fn merge(&self, codec: &FragmentCodec, merged: &mut [f32]) -> Result<(), formats::DecodeError> {
        match self {
            Self::Deltas(rule, weighed, deltas) => {
                rounds::merge_weighed(*rule, codec, (&weighed.weights, deltas), merged)
            }
            Self::Parts(parts) => {
                copy_merged(parts, 0..merged.len(), merged);
                Ok(())
            }
        }
    }
}

/// Copies the values in `range` of all that `parts` hold one after the other.
fn copy_merged(parts: &[Bytes], range: Range<usize>, values: &mut [f32]) {
    let mut begin = 0;
    for part in parts {
        let end = begin + part.len() / size_of::<f32>();
        let (from, to) = (range.start.max(begin), range.end.min(end));
        if from < to {
            let bytes = &part[(from - begin) * size_of::<f32>()..(to - begin) * size_of::<f32>()];
            let values = &mut values[from - range.start..to - range.start];
            values.iter_mut().zip(bytes.as_chunks().0).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
        }
        begin = end;
    }
}

/// The fragment's elements of `all`.
fn gathered(fragment: &Fragment, all: &[f32]) -> Vec<f32> {
    let mut values = Vec::with_capacity(fragment.elements());
    fragment.ranges.iter().for_each(|range| values.extend_from_slice(&all[range.clone()]));
    values
}

/// Sum of squares, by lanes: the order in which a compiler may use vectors.
fn squared_norm(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0f64; LANES];
    for chunk in values.chunks(LANES) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane += f64::from(*value) * f64::from(*value));
    }
    lanes.iter().sum()
}
