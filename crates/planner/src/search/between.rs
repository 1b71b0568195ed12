//! What travels between sites: the way with the least time to the same loss.

use super::Task;
use crate::units::{BytesPerSecond, Seconds};
use crate::wan::loss::loss_ratio;
use crate::wan::schedule::Hiding;
use crate::wan::{Exchange, Link, RoundCase, RoundTime, round_time};

/// Inner steps that are tried.
const INNER_STEPS: &[u32] = &[10, 30, 50, 100, 200, 300];

/// Bits a parameter that are tried with outer steps; synchronous gradients travel in f32 or bf16.
const BITS: &[u32] = &[32, 16, 8, 4];
const GRADIENT_BITS: &[u32] = &[32, 16];

/// Inner steps that a streamed fragment may take (tau): more would use parameters that are too old.
const OVERLAP_STEPS: u32 = 5;

/// Layers of a fragment (arXiv 2501.18512).
const FRAGMENT_LAYERS: f64 = 3.0;

/// Encoding and decoding, bytes of f32 a second: what one site's CPU does at least with 4-bit blocks.
const CODING: BytesPerSecond = BytesPerSecond(2e9);

/// The three strategies of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// Gradients at every step.
    Synchronous,
    /// Outer steps, nothing hidden.
    Diloco,
    /// Fragments, hidden behind inner steps.
    Streaming,
}

impl Strategy {
    /// As a run's configuration spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Synchronous => "synchronous",
            Self::Diloco => "diloco",
            Self::Streaming => "streaming",
        }
    }
}

/// A strategy with its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Way {
    /// Which.
    pub strategy: Strategy,
    /// H.
    pub inner_steps: u32,
    /// P.
    pub fragments: u32,
    /// tau.
    pub overlap_steps: u32,
    /// Bits a parameter.
    pub bits: u32,
}

/// The best way for so many sites, its round, and tokens to the loss of data parallelism over its tokens.
pub fn best_way(task: &Task, sites: usize, step: Seconds, link: Link) -> (Way, RoundTime, f64) {
    let judged = ways(task).map(|way| {
        let round = round_time(&round_case(task, sites, step, link, way));
        let tokens = if sites > 1 {
            loss_ratio(task.shape.parameters(), sites as f64, f64::from(way.inner_steps)).tokens
        } else {
            1.0
        };
        (way, round, tokens)
    });
    let cost = |judged: &(Way, RoundTime, f64)| judged.2 / judged.1.utilisation;
    // The first of equals: ways come with the least loss of information first.
    judged
        .reduce(|best, next| if cost(&next) < cost(&best) { next } else { best })
        .unwrap_or_else(|| unreachable!("there are ways"))
}

fn ways(task: &Task) -> impl Iterator<Item = Way> {
    let synchronous = GRADIENT_BITS.iter().map(|bits| Way {
        strategy: Strategy::Synchronous,
        inner_steps: 1,
        fragments: 1,
        overlap_steps: 0,
        bits: *bits,
    });
    let fragments = (task.shape.layers / FRAGMENT_LAYERS).ceil() as u32;
    let outer = BITS.iter().flat_map(move |bits| {
        INNER_STEPS.iter().flat_map(move |inner_steps| {
            let diloco = Way {
                strategy: Strategy::Diloco,
                inner_steps: *inner_steps,
                fragments: 1,
                overlap_steps: 0,
                bits: *bits,
            };
            let streaming = Way { strategy: Strategy::Streaming, fragments, overlap_steps: OVERLAP_STEPS, ..diloco };
            [diloco, streaming]
        })
    });
    synchronous.chain(outer)
}

fn round_case(task: &Task, sites: usize, step: Seconds, link: Link, way: Way) -> RoundCase {
    RoundCase {
        parameters: task.shape.parameters(),
        layers: task.shape.layers,
        bits_per_parameter: f64::from(way.bits),
        sites: sites as f64,
        inner_steps: f64::from(way.inner_steps),
        fragments: f64::from(way.fragments),
        overlap_steps: f64::from(way.overlap_steps),
        step,
        // A single site exchanges nothing, and waits for nobody.
        link: if sites > 1 { link } else { Link { round_trip: Seconds::ZERO, ..link } },
        exchange: Exchange::Mesh,
        hiding: Hiding::Snapshot,
        // f32 and bf16 travel as they are.
        coding: if sites > 1 && way.bits < 16 { CODING } else { BytesPerSecond(f64::INFINITY) },
    }
}
