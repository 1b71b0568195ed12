//! What travels between sites: every strategy with its settings, the round that it makes and the tokens that it needs.

use super::Task;
use crate::units::{BitsPerSecond, BytesPerSecond, Seconds};
use crate::wan::loss::{LossRatio, loss_ratio};
use crate::wan::schedule::Hiding;
use crate::wan::{Exchange, Link, RoundCase, RoundTime, round_time_at};

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

/// Bits of scales for each value: one of 8 bits for 32 values of MXFP4, one of 16 for 128 of int8.
const SCALE_BITS_4: f64 = 8.0 / 32.0;
const SCALE_BITS_8: f64 = 16.0 / 128.0;

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
    /// Each delta to each site, or each site merges a slice.
    pub exchange: Exchange,
}

impl Way {
    /// Encoding and decoding, bytes of f32 a second: f32 and bf16 travel as they are.
    pub fn coding(&self) -> BytesPerSecond {
        if self.bits < 16 { CODING } else { BytesPerSecond(f64::INFINITY) }
    }

    /// Bits that a value takes on the link, its part of a scale among them.
    pub fn bits_on_link(&self) -> f64 {
        match self.bits {
            4 => 4.0 + SCALE_BITS_4,
            8 => 8.0 + SCALE_BITS_8,
            bits => f64::from(bits),
        }
    }

    /// In words: strategy, H, fragments, overlap, bits, exchange.
    pub fn describe(&self) -> String {
        let exchange = match self.exchange {
            Exchange::Mesh => "",
            Exchange::Sharded => ", sharded",
            Exchange::Ring => ", in a ring",
            Exchange::UploadBound => ", through storage",
        };
        match self.strategy {
            Strategy::Synchronous => format!("synchronous, {}-bit gradients{exchange}", self.bits),
            Strategy::Diloco => format!("diloco, H = {}, {} bits{exchange}", self.inner_steps, self.bits),
            Strategy::Streaming => format!(
                "streaming, H = {}, {} fragments, overlap {}, {} bits{exchange}",
                self.inner_steps, self.fragments, self.overlap_steps, self.bits
            ),
        }
    }
}

/// What a way gives: its round, tokens to the loss of data parallelism over its tokens, and whether that law is used beyond its data.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judged {
    /// The way.
    pub way: Way,
    /// Its round.
    pub round: RoundTime,
    /// Tokens and loss.
    pub loss: LossRatio,
}

/// The links of a team of sites as its busiest member sees them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wan {
    /// What the busiest site sends and receives in a second.
    pub rate: BytesPerSecond,
    /// The longest round trip.
    pub round_trip: Seconds,
}

/// Every way for so many sites; those that lose least information first.
pub fn judged(task: &Task, sites: usize, step: Seconds, wan: Wan) -> impl Iterator<Item = Judged> {
    let task = *task;
    ways(&task, sites).map(move |way| {
        let round = round_time_at(&round_case(&task, sites, step, wan, way), wan.rate, wan.rate);
        let steps = if sites > 1 { f64::from(way.inner_steps) } else { 1.0 };
        Judged { way, round, loss: loss_ratio(task.shape.parameters(), sites as f64, steps) }
    })
}

fn ways(task: &Task, sites: usize) -> impl Iterator<Item = Way> + use<> {
    let synchronous = GRADIENT_BITS.iter().map(|bits| Way {
        strategy: Strategy::Synchronous,
        inner_steps: 1,
        fragments: 1,
        overlap_steps: 0,
        bits: *bits,
        exchange: Exchange::Mesh,
    });
    let layers = task.shape.layers;
    let outer = BITS.iter().flat_map(move |bits| {
        INNER_STEPS.iter().flat_map(move |inner_steps| {
            let diloco = Way {
                strategy: Strategy::Diloco,
                inner_steps: *inner_steps,
                fragments: 1,
                overlap_steps: 0,
                bits: *bits,
                exchange: Exchange::Mesh,
            };
            let fragments = fragments(layers, *inner_steps);
            let streaming = Way { strategy: Strategy::Streaming, fragments, overlap_steps: OVERLAP_STEPS, ..diloco };
            [diloco, streaming]
        })
    });
    // Between two sites a sharded exchange moves what a mesh moves; a single site does without.
    let exchanges = if sites > 2 { &[Exchange::Mesh, Exchange::Sharded][..] } else { &[Exchange::Mesh][..] };
    let several = if sites > 1 { usize::MAX } else { 1 };
    let all = synchronous
        .chain(outer)
        .flat_map(move |way| exchanges.iter().map(move |exchange| Way { exchange: *exchange, ..way }));
    all.take(several)
}

/// The most fragments of three layers or more of which each has a whole number of inner steps to itself, as run.toml wants it.
pub(super) fn fragments(layers: f64, inner_steps: u32) -> u32 {
    let most = (layers / FRAGMENT_LAYERS).ceil() as u32;
    (1..=most.min(inner_steps)).rev().find(|count| inner_steps.is_multiple_of(*count)).unwrap_or(1)
}

pub(super) fn round_case(task: &Task, sites: usize, step: Seconds, wan: Wan, way: Way) -> RoundCase {
    RoundCase {
        parameters: task.shape.parameters(),
        layers: task.shape.layers,
        bits_per_parameter: way.bits_on_link(),
        sites: sites as f64,
        inner_steps: f64::from(way.inner_steps),
        fragments: f64::from(way.fragments),
        overlap_steps: f64::from(way.overlap_steps),
        step,
        // A single site exchanges nothing, and waits for nobody.
        link: Link {
            round_trip: if sites > 1 { wan.round_trip } else { Seconds::ZERO },
            ..Link::ideal(BitsPerSecond::from_bytes_per_second(wan.rate))
        },
        exchange: way.exchange,
        hiding: Hiding::Snapshot,
        coding: if sites > 1 { way.coding() } else { BytesPerSecond(f64::INFINITY) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fragments_divide_the_inner_steps() {
        assert_eq!(
            INNER_STEPS.iter().map(|steps| fragments(80.0, *steps)).collect::<Vec<_>>(),
            [10, 15, 25, 25, 25, 25]
        );
        assert_eq!((fragments(9.0, 7), fragments(18.0, 100)), (1, 5));
    }
}
