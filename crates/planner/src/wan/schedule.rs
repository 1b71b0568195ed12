//! How much of a transfer stalls the site.
//!
//! Two kinds of stacks. One takes a *snapshot* at the end of an inner step, sends it, and needs the merge tau steps later: the stall is
//! what the transfer takes longer than tau t, or than H t / P, when the next fragment wants the link. The other sends *layer by layer* during the backward pass, as data parallelism does
//! and as the published simulations of DiLoCo assume. With a forward pass of t/3 and a backward pass of 2t/3, the layer at depth
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

/// Stall of a whole round whose transfers take `each` for each fragment.
pub(super) fn stall(case: &RoundCase, each: Seconds) -> Seconds {
    match case.hiding {
        Hiding::Snapshot => {
            // Fragments share one link: each has it until the next one's turn, H / P steps later.
            let window = case.overlap_steps.min(case.inner_steps / case.fragments);
            (each - case.step * window).max(Seconds::ZERO) * case.fragments
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
