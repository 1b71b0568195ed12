//! All settings, ordered by what they cost in quality, and the best of them that a link can carry.
//!
//! What one site has learnt reaches the others H / 2 + tau steps later on the mean, so a choice counts as its *age* H + 2 tau, and
//! its cost is in doublings of that age, the codec's loss included:
//!
//! ```text
//! cost = log2(H + 2 tau) + loss(codec)
//! ```
//!
//! Measured here (5M and 0.7M parameters, 2 sites, about 300 steps) a doubling of H costs about 0.7 % of loss: H = 3 is 2.4 % above data
//! parallelism, H = 12 is 3.8 %. A codec with half the bits buys one doubling; so bits go first, H next, and sparse deltas last.

use crate::encoded_bytes;
use crate::stall::{Conditions, RoundShape, RoundTime, round_time};
use base::ParameterSchema;
use base::config::Codec;
use std::fmt;

/// Part of every time limit that a new choice may use: what is left is for jitter.
pub const FIT_LOAD_MAX: f64 = 0.8;

/// Codecs with their loss in doublings of the age, from the least lossy on. The dense ones are in the order of their relative squared
/// error (docs/formats.md), and cost little: 4-bit deltas (E3M0) end at the loss of f32 at 1B parameters and H = 100 (arXiv 2501.18512),
/// and here H = 52 in 4 bits ended within 1 % of H = 12 in f32. Sparse deltas with error feedback ended 5.6 % above f32 at the same
/// H = 3, and 1.3 % (the mean of the sites) where the residual stays in the local parameters: 8 and 2 doublings; 5 is between.
pub const CODEC_LOSS_DOUBLINGS: [(Codec, f64); 7] = [
    (Codec::F32, 0.0),
    (Codec::Bf16, 0.001),
    (Codec::Int8, 0.01),
    (Codec::Mxfp4, 0.05),
    (Codec::E3m0, 0.15),
    (Codec::Sparse96, 5.0),
    (Codec::Sparse, 5.3),
];

/// What is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// H, a multiple of P.
    pub inner_steps: u64,
    /// P.
    pub fragments: u32,
    /// tau, less than H.
    pub overlap_steps: u64,
    /// How deltas travel.
    pub codec: Codec,
}

impl Choice {
    /// What it costs in quality, in doublings of the age. A codec that is not in the table counts as lossless.
    pub fn cost_doublings(&self) -> f64 {
        let age = self.inner_steps.max(1) as f64 + 2.0 * self.overlap_steps as f64;
        libm::log2(age) + loss_doublings(self.codec)
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inner_steps, fragments, overlap_steps, codec } = self;
        let codec = crate::codec(*codec).kind();
        write!(formatter, "H = {inner_steps}, P = {fragments}, tau = {overlap_steps}, {codec}")
    }
}

pub(super) fn loss_doublings(codec: Codec) -> f64 {
    CODEC_LOSS_DOUBLINGS.iter().find(|(known, _)| *known == codec).map_or(0.0, |(_, loss)| *loss)
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
    /// Codecs that may be taken; those that are not in [`CODEC_LOSS_DOUBLINGS`] never are.
    pub codecs: Vec<Codec>,
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
        let codecs = CODEC_LOSS_DOUBLINGS.iter().map(|(codec, _)| *codec).collect();
        Self { inner_steps_min: INNER_STEPS_MIN, inner_steps_max, fragments_max: FRAGMENTS_MAX, codecs }
    }
}

/// Elements of the largest fragment for each number of fragments that leaves none of them empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sizes(Vec<(u32, u64)>);

impl Sizes {
    pub(super) fn of(schema: &ParameterSchema, fragments_max: u32) -> Self {
        let mut sizes = Vec::new();
        for count in 1..=fragments_max.clamp(1, FRAGMENTS_MAX) {
            let elements = || {
                let fragments = schema.fragments(count).into_iter();
                fragments.map(|fragment| fragment.ranges.iter().map(|range| range.len() as u64).sum())
            };
            let largest: u64 = elements().max().unwrap_or(0);
            if count > 1 && elements().min() == Some(0) {
                break;
            }
            // A number of fragments that does not make the largest smaller has no use.
            if sizes.last().is_none_or(|(_, smaller): &(u32, u64)| largest < *smaller) {
                sizes.push((count, largest));
            }
        }
        Self(sizes)
    }

    /// Elements of the largest of `fragments`.
    pub(super) fn elements(&self, fragments: u32) -> u64 {
        let known = self.0.iter().rev().find(|(count, _)| *count <= fragments);
        known.map_or(0, |(_, elements)| *elements)
    }
}

/// The time of a choice's rounds.
pub(super) fn time_of(choice: &Choice, sizes: &Sizes, conditions: &Conditions) -> RoundTime {
    let elements = sizes.elements(choice.fragments);
    let shape = RoundShape {
        steps: choice.inner_steps / u64::from(choice.fragments.max(1)),
        overlap_steps: choice.overlap_steps,
        elements,
        encoded_bytes: encoded_bytes(choice.codec, elements),
    };
    round_time(&shape, conditions)
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
    for (codec, _) in CODEC_LOSS_DOUBLINGS.iter().filter(|(codec, _)| limits.codecs.contains(codec)) {
        for (fragments, _) in &sizes.0 {
            let Some(choice) = smallest(limits, sizes, conditions, (*codec, *fragments), allowed) else { continue };
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
    (codec, fragments): (Codec, u32),
    allowed: Allowed,
) -> Option<Choice> {
    let part = match allowed {
        Allowed::Margin => FIT_LOAD_MAX,
        // S c / (S c + w) = 1 - stall; the overlap is left as exact as without.
        Allowed::Stall(stall) => 1.0 / (1.0 - stall),
    };
    let one = Choice { inner_steps: u64::from(fragments), fragments, overlap_steps: 1, codec };
    let time = time_of(&one, sizes, conditions);
    let needed = |seconds: f64, part: f64| (seconds / (conditions.step_seconds * part)).ceil().max(1.0);
    let steps = needed(time.link_seconds.max(time.host_seconds), part);
    let overlap_steps = needed(time.merge_seconds, part.min(1.0));
    let at_least = (steps * f64::from(fragments)).max(overlap_steps + 1.0).max(limits.inner_steps_min as f64);
    if at_least > limits.inner_steps_max as f64 {
        return None;
    }
    let inner_steps = (at_least as u64).next_multiple_of(u64::from(fragments));
    let choice = Choice { inner_steps, fragments, overlap_steps: overlap_steps as u64, codec };
    (inner_steps <= limits.inner_steps_max).then_some(choice)
}

/// Of a wait, what a lossier codec must at most leave to be taken: some bytes in a block more or less are no reason.
const LESS_STALL_PART: f64 = 0.99;

/// Where nothing fits: the choice for which sites wait least, at the largest H and half of it as overlap.
pub(super) fn least_stall(limits: &Limits, sizes: &Sizes, conditions: &Conditions) -> Option<Choice> {
    let mut found: Option<(f64, Choice)> = None;
    for (codec, _) in CODEC_LOSS_DOUBLINGS.iter().filter(|(codec, _)| limits.codecs.contains(codec)) {
        for (fragments, _) in &sizes.0 {
            let count = u64::from(*fragments);
            let inner_steps = limits.inner_steps_max / count * count;
            if inner_steps < limits.inner_steps_min.max(2) {
                continue;
            }
            let choice = Choice { inner_steps, fragments: *fragments, overlap_steps: inner_steps / 2, codec: *codec };
            let time = time_of(&choice, sizes, conditions);
            let waits = time.stall_seconds / time.compute_seconds;
            if found.is_none_or(|(least, _)| waits < LESS_STALL_PART * least) {
                found = Some((waits, choice));
            }
        }
    }
    found.map(|(_, choice)| choice)
}
