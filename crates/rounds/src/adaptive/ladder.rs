//! All settings, ordered by what they cost in quality, and the best of them that a link can carry.
//!
//! What one site has learnt reaches the others H / 2 + tau steps later on the mean, so a choice without coding counts as its *age*
//! H + 2 tau. Of what is to be sent, a codec leaves a part e over (relative squared error, with all residuals added up), that comes a round
//! later, where the same part is left over: (1 + e) / (1 - e) times as long on the mean. Runs lose more than by that delay alone
//! ([`CODING_WEIGHT`]). The cost of a choice is in doublings:
//!
//! ```text
//! cost = log2(H + 2 tau) + CODING_WEIGHT log2((1 + e) / (1 - e))
//! ```
//!
//! Measured here (5M and 0.7M parameters, 2 sites, about 300 steps) a doubling of H costs about 0.7 % of loss: H = 3 is 2.4 % above data
//! parallelism, H = 12 is 3.8 %. A codec with half the bits buys one doubling; so bits go first, H next, and sparse deltas last. In low
//! rank, where bytes are in proportion to the rank, the rank is one more way to spend what a link has.

use crate::codec::{FragmentCodec, shapes};
use crate::plan::FragmentPlan;
use crate::stall::{Conditions, RoundShape, RoundTime, round_time};
use base::ParameterSchema;
use base::config::{Codec, SyncSection};
use formats::lowrank::LowRank;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Part of every time limit that a new choice may use: what is left is for jitter.
pub const FIT_LOAD_MAX: f64 = 0.8;

/// By how much coding costs more than the delay that it makes. At H = 3, against f32, sparse codes lost 5.6 to 14 % (8 to 20 doublings;
/// the delay alone is 5), and low rank 8 to 10 between nothing and 9 % (up to 13; 2): docs/log.md and docs/sync.md. 4-bit deltas, where
/// this makes a tenth of a doubling, end at the loss of f32 (arXiv 2501.18512).
const CODING_WEIGHT: f64 = 2.0;

/// Codecs that may be chosen, low rank aside.
const CODECS: [Codec; 7] =
    [Codec::F32, Codec::Bf16, Codec::Int8, Codec::Mxfp4, Codec::E3m0, Codec::Sparse96, Codec::Sparse];

/// Ranks that may be chosen: half as much again or a third more each time, from what loses as much as a doubling of H can give back to
/// what few links need.
const RANKS: [u32; 11] = [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128];

/// The part e that a codec leaves over, residuals included. Dense codecs: docs/formats.md, Laplacian draws. Sparse ones carry 5 to 7 %
/// of what waits (docs/log.md). Low rank: 0.73, 0.61 and 0.48 at ranks 5, 10 and 20 (docs/formats.md, six deltas of a Llama of width 256), which
/// is e / (1 - e) = 9 / rank^0.77 within 2 %; of wider matrices nothing is known.
pub fn residual_part(codec: Codec, rank: u32) -> f64 {
    match codec {
        Codec::F32 => 0.0,
        Codec::Bf16 => 2.75e-6,
        Codec::Int8 => 8.11e-5,
        Codec::Mxfp4 => 0.0154,
        Codec::E3m0 => 0.0382,
        Codec::LowRank => 1.0 / (1.0 + libm::pow(f64::from(rank.max(1)), 0.77) / 9.0),
        Codec::Sparse96 => 0.94,
        Codec::Sparse => 0.95,
    }
}

/// How many doublings of the age a codec costs.
pub(super) fn loss_doublings(codec: Codec, rank: u32) -> f64 {
    let part = residual_part(codec, rank);
    CODING_WEIGHT * libm::log2((1.0 + part) / (1.0 - part))
}

/// What is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// H, a multiple of P.
    pub inner_steps: u64,
    /// P.
    pub fragments: u32,
    /// tau, less than H.
    pub overlap_steps: u64,
    /// How deltas travel.
    pub codec: Codec,
    /// Its rank where it has one; else 0.
    pub rank: u32,
}

impl Choice {
    /// What a configuration begins with.
    pub fn of(sync: &SyncSection) -> Self {
        let SyncSection { inner_steps, fragments, overlap_steps, codec, rank, .. } = *sync;
        Self { inner_steps, fragments, overlap_steps, codec, rank: if codec == Codec::LowRank { rank } else { 0 } }
    }

    /// Whether both have rounds of the same steps: then one can follow the other while rounds are open.
    pub fn has_schedule_of(&self, other: &Self) -> bool {
        let schedule = |choice: &Self| (choice.inner_steps, choice.fragments, choice.overlap_steps);
        schedule(self) == schedule(other)
    }

    /// What it costs in quality, in doublings of the age.
    pub fn cost_doublings(&self) -> f64 {
        let age = self.inner_steps.max(1) as f64 + 2.0 * self.overlap_steps as f64;
        libm::log2(age) + loss_doublings(self.codec, self.rank)
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inner_steps, fragments, overlap_steps, codec, rank } = self;
        write!(formatter, "H = {inner_steps}, P = {fragments}, tau = {overlap_steps}, {}", codec.name())?;
        if *rank > 0 { write!(formatter, " of rank {rank}") } else { Ok(()) }
    }
}

/// What may be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Smallest H.
    pub inner_steps_min: u64,
    /// Largest H.
    pub inner_steps_max: u64,
    /// Most fragments; more than the model has layers are never taken.
    pub fragments_max: u32,
    /// Codecs that may be taken, each with its rank, or 0, from the least lossy on.
    pub codecs: Vec<(Codec, u32)>,
}

/// With one step of overlap, H = 2 is the least.
const INNER_STEPS_MIN: u64 = 2;

/// Published runs keep their loss up to here (arXiv 2311.08105, figure 4).
const INNER_STEPS_MAX: u64 = 500;

/// A run needs some exchanges to be one.
const EXCHANGES_MIN: u64 = 10;

/// The published 100B model has 36 (arXiv 2501.18512); more fragments than this save nothing that a round trip does not take back.
const FRAGMENTS_MAX: u32 = 64;

impl Limits {
    /// For a run of that many inner steps.
    pub fn of_run(steps_total: u64) -> Self {
        let inner_steps_max = (steps_total / EXCHANGES_MIN).clamp(INNER_STEPS_MIN, INNER_STEPS_MAX);
        let ranks = RANKS.iter().map(|rank| (Codec::LowRank, *rank));
        let mut codecs: Vec<(Codec, u32)> = CODECS.into_iter().map(|codec| (codec, 0)).chain(ranks).collect();
        let loss = |(codec, rank): &(Codec, u32)| loss_doublings(*codec, *rank);
        codecs.sort_by(|one, other| loss(one).total_cmp(&loss(other)));
        Self { inner_steps_min: INNER_STEPS_MIN, inner_steps_max, fragments_max: FRAGMENTS_MAX, codecs }
    }
}

/// Numbers of fragments that are looked at: a half or a third more each time.
const FRAGMENT_COUNTS: [u32; 12] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64];

/// How large fragments are for each number of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sizes {
    /// What the sizes are known of: those of the limits, and what the configuration begins with.
    codecs: Vec<(Codec, u32)>,
    /// Ascending; without those that leave a fragment empty, or make the largest no smaller.
    useful: Vec<Size>,
    first: Size,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Size {
    fragments: u32,
    /// Values of the largest.
    elements: u64,
    /// Bytes of the largest in each codec.
    encoded_bytes: Vec<u64>,
}

impl Sizes {
    pub(super) fn of(schema: &ParameterSchema, limits: &Limits, first: &Choice) -> Self {
        let mut codecs = limits.codecs.clone();
        codecs.push((first.codec, first.rank));
        let mut useful: Vec<Size> = Vec::new();
        for count in FRAGMENT_COUNTS.into_iter().filter(|count| *count <= limits.fragments_max.max(1)) {
            let is_empty = |fragment: &base::Fragment| fragment.elements() == 0;
            if count > 1 && schema.fragments(count).iter().any(is_empty) {
                break;
            }
            let size = Size::of(schema, count, &codecs);
            if useful.last().is_none_or(|smaller| size.elements < smaller.elements) {
                useful.push(size);
            }
        }
        let first = Size::of(schema, first.fragments.max(1), &codecs);
        Self { codecs, useful, first }
    }

    fn counts(&self) -> impl Iterator<Item = u32> + '_ {
        self.useful.iter().map(|size| size.fragments)
    }

    /// Values of the largest fragment, and its bytes; 0 where nothing is known of such a choice.
    fn largest(&self, choice: &Choice) -> (u64, u64) {
        let of_choice = |size: &&Size| size.fragments == choice.fragments.max(1);
        let size = self.useful.iter().chain([&self.first]).find(of_choice);
        let index = self.codecs.iter().position(|known| *known == (choice.codec, choice.rank));
        size.zip(index).map_or((0, 0), |(size, index)| (size.elements, size.encoded_bytes[index]))
    }
}

impl Size {
    fn of(schema: &ParameterSchema, count: u32, codecs: &[(Codec, u32)]) -> Self {
        let fragments = schema.fragments(count);
        let Some(largest) = fragments.iter().max_by_key(|fragment| fragment.elements()) else {
            return Self { fragments: count, elements: 0, encoded_bytes: vec![0; codecs.len()] };
        };
        let matrices: Vec<_> = fragments.iter().map(|fragment| shapes(schema, fragment)).collect();
        let encoded_bytes = |(codec, rank): &(Codec, u32)| {
            if *codec == Codec::LowRank {
                let bytes = |matrices: &Vec<_>| LowRank::new(matrices, (*rank).max(1) as usize).encoded_bytes() as u64;
                return matrices.iter().map(bytes).max().unwrap_or(0);
            }
            let plan = FragmentPlan { index: 0, count, codec: *codec, rank: *rank };
            FragmentCodec::new(plan, *rank, schema, largest).encoded_bytes() as u64
        };
        let encoded_bytes = codecs.iter().map(encoded_bytes).collect();
        Self { fragments: count, elements: largest.elements() as u64, encoded_bytes }
    }
}

/// The time of a choice's rounds.
pub(super) fn time_of(choice: &Choice, sizes: &Sizes, conditions: &Conditions) -> RoundTime {
    let (elements, encoded_bytes) = sizes.largest(choice);
    let steps = choice.inner_steps / u64::from(choice.fragments.max(1));
    let shape = RoundShape { steps, overlap_steps: choice.overlap_steps, elements, encoded_bytes };
    round_time(&shape, conditions)
}

/// Bytes of a choice's largest delta.
pub(super) fn bytes_of(choice: &Choice, sizes: &Sizes) -> u64 {
    sizes.largest(choice).1
}

/// How much of the sites' time a choice may leave unused.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Allowed {
    /// Nobody waits, with a margin: [`FIT_LOAD_MAX`].
    Margin,
    /// They may wait for this part of the time.
    Stall(f64),
}

/// The choice of least cost that is allowed; of equal ones that with the less lossy codec and the fewest fragments. `None` where
/// none is.
pub(super) fn best(limits: &Limits, sizes: &Sizes, conditions: &Conditions, allowed: Allowed) -> Option<Choice> {
    let mut found: Option<(f64, Choice)> = None;
    for codec in &limits.codecs {
        for fragments in sizes.counts() {
            let Some(choice) = smallest(limits, sizes, conditions, (*codec, fragments), allowed) else { continue };
            let cost = choice.cost_doublings();
            if found.is_none_or(|(least, _)| cost < least) {
                found = Some((cost, choice));
            }
        }
    }
    found.map(|(_, choice)| choice)
}

/// The smallest tau, and with it the smallest H, that these fragments may have.
fn smallest(
    limits: &Limits,
    sizes: &Sizes,
    conditions: &Conditions,
    ((codec, rank), fragments): ((Codec, u32), u32),
    allowed: Allowed,
) -> Option<Choice> {
    let part = match allowed {
        Allowed::Margin => FIT_LOAD_MAX,
        // S c / (S c + w) = 1 - stall; the overlap is left as exact as without.
        Allowed::Stall(stall) => 1.0 / (1.0 - stall),
    };
    let one = Choice { inner_steps: u64::from(fragments), fragments, overlap_steps: 1, codec, rank };
    let time = time_of(&one, sizes, conditions);
    let needed = |seconds: f64, part: f64| (seconds / (conditions.step_seconds * part)).ceil().max(1.0);
    let steps = needed(time.link_seconds.max(time.host_seconds), part);
    let overlap_steps = needed(time.merge_seconds, part.min(1.0));
    let at_least = (steps * f64::from(fragments)).max(overlap_steps + 1.0).max(limits.inner_steps_min as f64);
    if at_least > limits.inner_steps_max as f64 {
        return None;
    }
    let inner_steps = (at_least as u64).next_multiple_of(u64::from(fragments));
    let choice = Choice { inner_steps, fragments, overlap_steps: overlap_steps as u64, codec, rank };
    (inner_steps <= limits.inner_steps_max).then_some(choice)
}

/// Of a wait, what a lossier codec must at most leave to be taken: some bytes in a block more or less are no reason.
const LESS_STALL_PART: f64 = 0.99;

/// Where nothing fits: the choice for which sites wait least, at the largest H and half of it as overlap.
pub(super) fn least_stall(limits: &Limits, sizes: &Sizes, conditions: &Conditions) -> Option<Choice> {
    let mut found: Option<(f64, Choice)> = None;
    for (codec, rank) in limits.codecs.iter().copied() {
        for fragments in sizes.counts() {
            let count = u64::from(fragments);
            let inner_steps = limits.inner_steps_max / count * count;
            if inner_steps < limits.inner_steps_min.max(2) {
                continue;
            }
            let choice = Choice { inner_steps, fragments, overlap_steps: inner_steps / 2, codec, rank };
            let time = time_of(&choice, sizes, conditions);
            let waits = time.stall_seconds / time.compute_seconds;
            if found.is_none_or(|(least, _)| waits < LESS_STALL_PART * least) {
                found = Some((waits, choice));
            }
        }
    }
    found.map(|(_, choice)| choice)
}
