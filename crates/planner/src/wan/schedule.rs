//! How much of a transfer stalls the site.
//!
//! Two kinds of stacks. One takes a *snapshot* every S = H / P inner steps, sends it, and needs the merge tau steps later. Link (u seconds a
//! fragment) and host (h) serve one fragment after the other, so that rounds cannot be shorter than either; and between a snapshot and the
//! point where its merge takes effect, m = h + u + delays later, lie q = floor(tau / S) rounds' waits and its own:
//! ```text
//! stall of a fragment = max(0, u - S t, h - S t, (m - tau t) / (q + 1))
//! ```
//! which is what `rounds::stall` has for runs (it is tested there against a simulation of each round). With q > 0 another fragment is on its
//! way at the same time, and m is longer by what one waits for the other (`MEETING_PASSES`). The other sends *layer by layer*
//! during the backward pass, as data parallelism does and as the published simulations of DiLoCo assume. With a forward pass of t/3 and a backward pass of 2t/3, the layer at depth
//! z (0 is the first) has its gradient at
//! ```text
//! ready(z) = t (1/3 + 2/3 (1 - z))        needed(z) = t (1 + tau + z/3)
//! ```
//! and the link sends layers in the order in which they become ready. A stall in the next forward pass delays all that follows, so
//! the stall of a sync is the greatest lateness of its layers. Fragments are strided: fragment i of P has the layers i, i+P, i+2P, ...
//! (arXiv 2501.18512, section 2).

use super::RoundCase;
use crate::units::Seconds;

/// What hides a transfer beside whole overlapped steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hiding {
    /// Nothing: a snapshot after the step.
    Snapshot,
    /// The backward pass before it and the forward pass after it.
    Layerwise,
}

/// Most fragments that are computed one by one; beyond, their depths are sampled.
const FRAGMENTS_MAX: usize = 256;

/// What one fragment's sync takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sync {
    /// On the busiest link or access.
    pub(super) transfer: Seconds,
    /// On a site's host.
    pub(super) coding: Seconds,
    /// Words on their way.
    pub(super) delay: Seconds,
    /// Behind another fragment, where one is on its way meanwhile.
    pub(super) meeting: Seconds,
}

impl Sync {
    pub(super) fn total(&self) -> Seconds {
        self.transfer + self.coding + self.delay
    }
}

/// Stall of a whole round with such a sync of each fragment.
pub(super) fn stall(case: &RoundCase, sync: Sync) -> Seconds {
    let each = sync.total();
    match case.hiding {
        Hiding::Snapshot => {
            let steps = case.inner_steps / case.fragments;
            let waits = (case.overlap_steps / steps).floor() + 1.0;
            let merged = if waits > 1.0 { each + sync.meeting } else { each };
            let busy = sync.transfer.max(sync.coding) - case.step * steps;
            let late = (merged - case.step * case.overlap_steps) / waits;
            busy.max(late).max(Seconds::ZERO) * case.fragments
        }
        Hiding::Layerwise => {
            let counted = (case.fragments as usize).clamp(1, FRAGMENTS_MAX);
            let sum: f64 = (0..counted).map(|fragment| layerwise(case, each / case.step, fragment, counted)).sum();
            case.step * (sum * case.fragments / counted as f64)
        }
    }
}

/// Stall of one fragment's sync, in inner steps; `each` likewise.
fn layerwise(case: &RoundCase, each: f64, fragment: usize, fragments: usize) -> f64 {
    let layers = (case.layers as usize).max(fragments);
    let mine: Vec<f64> = (fragment..layers).step_by(fragments).map(|layer| layer as f64 / layers as f64).collect();
    let part = each / mine.len() as f64;
    let mut sent = 0.0_f64;
    let mut late = 0.0_f64;
    for depth in mine.into_iter().rev() {
        let ready = 1.0 / 3.0 + 2.0 / 3.0 * (1.0 - depth);
        sent = sent.max(ready) + part;
        late = late.max(sent - (1.0 + case.overlap_steps + depth / 3.0));
    }
    late
}
