//! When which fragment is synchronised, and when its merge takes effect: pure functions that the coordinator, the sites, a
//! simulator and a planner share.
//!
//! The run's inner steps are cut into rounds of S = H / P steps. At the end of round k a site takes a snapshot of fragment
//! (k − 1) mod P; so every fragment is synchronised every H steps, one after the other (arXiv 2501.18512). While the snapshot
//! travels the site goes on, and exactly tau inner steps later the merged fragment takes effect. With tau = q · S + r:
//!
//! ```text
//! round k       |<------------------- S steps ------------------->|
//!               ^ before its first step:     ^ after r steps:      ^ snapshot of fragment (k - 1) mod P
//!                 rounds up to k - 2 - q       round k - 1 - q
//!                 (k - 1 - q where r = 0)
//! ```
//!
//! The point where a merge takes effect is part of the plan, not of the network's mood: the same contributors give the same bits. A
//! site that makes s < S steps in a round (a slow one) applies it after ⌈r · s / S⌉ of its own.

use base::Round;
use serde::{Deserialize, Serialize};

/// Which commits take effect where in a round's inner steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effects {
    /// All commits up to this one are applied before the first step.
    pub before: Round,
    /// All up to this one after [`Effects::after_steps`].
    pub during: Round,
    /// Steps, of those that a full round has.
    pub after_steps: u64,
}

/// The fragment that round `round` (from 1) synchronises, of `fragments`.
pub fn fragment_of(round: Round, fragments: u32) -> u32 {
    (round.0.saturating_sub(1) % u64::from(fragments.max(1))) as u32
}

/// Rounds that are open beside the one in which sites train: the plan of round k is needed when round k − 1 − this commits.
pub fn lookahead(steps: u64, overlap_steps: u64) -> u64 {
    overlap_steps.div_ceil(steps.max(1))
}

/// What takes effect in round `round` where rounds have `steps` (S) inner steps and merges take effect `overlap_steps` (tau)
/// after their snapshot.
pub fn effects(round: Round, steps: u64, overlap_steps: u64) -> Effects {
    let (whole, rest) = (overlap_steps / steps.max(1), overlap_steps % steps.max(1));
    let during = Round(round.0.saturating_sub(1 + whole));
    let before = if rest == 0 { during } else { Round(during.0.saturating_sub(1)) };
    Effects { before, during, after_steps: rest }
}

impl Effects {
    /// The same, in rounds of which `first` is the first with this schedule: what was committed before it, under another one, takes
    /// effect before its first step.
    #[must_use]
    pub fn since(self, first: Round) -> Self {
        let before_it = Round(first.0.saturating_sub(1));
        Self { before: self.before.max(before_it), during: self.during.max(before_it), ..self }
    }

    /// After how many of its own steps a site applies [`Effects::during`], if it makes `own_steps` in a round of `steps`.
    pub fn after_own_steps(&self, own_steps: u64, steps: u64) -> u64 {
        let scaled = u128::from(self.after_steps) * u128::from(own_steps);
        // At most `own_steps`, because `after_steps` is less than `steps`.
        (scaled.div_ceil(u128::from(steps.max(1))) as u64).min(own_steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn without_overlap_a_round_begins_with_the_merge_of_the_one_before() {
        assert_eq!(effects(Round(5), 20, 0), Effects { before: Round(4), during: Round(4), after_steps: 0 });
        assert_eq!(lookahead(20, 0), 0);
    }

    #[test]
    fn overlap_within_a_round_and_beyond_it() {
        assert_eq!(effects(Round(5), 20, 3), Effects { before: Round(3), during: Round(4), after_steps: 3 });
        assert_eq!(effects(Round(5), 5, 12), Effects { before: Round(1), during: Round(2), after_steps: 2 });
        assert_eq!(effects(Round(5), 5, 10), Effects { before: Round(2), during: Round(2), after_steps: 0 });
        assert_eq!(effects(Round(1), 5, 12), Effects { before: Round(0), during: Round(0), after_steps: 2 });
        assert_eq!((lookahead(20, 3), lookahead(5, 10), lookahead(5, 12)), (1, 2, 3));
    }

    #[test]
    fn what_another_schedule_has_left_takes_effect_before_the_first_step() {
        let of = |round| effects(Round(round), 5, 12).since(Round(9));
        assert_eq!(of(9), Effects { before: Round(8), during: Round(8), after_steps: 2 });
        assert_eq!(of(11), Effects { before: Round(8), during: Round(8), after_steps: 2 });
        assert_eq!(of(12), Effects { before: Round(8), during: Round(9), after_steps: 2 });
        assert_eq!(of(13), effects(Round(13), 5, 12));
    }

    #[test]
    fn a_slow_site_applies_at_the_same_part_of_its_round() {
        let effects = effects(Round(5), 20, 5);
        assert_eq!(effects.after_own_steps(20, 20), 5);
        assert_eq!(effects.after_own_steps(4, 20), 1);
        assert_eq!(effects.after_own_steps(1, 20), 1);
        assert_eq!(effects.after_own_steps(0, 0), 0);
    }

    proptest! {
        /// Every commit takes effect exactly once, tau steps after its snapshot, and no fragment is in flight twice.
        #[test]
        fn every_commit_takes_effect_tau_steps_after_its_snapshot(
            steps in 1u64..40, fragments in 1u32..9, part in 0.0f64..1.0,
        ) {
            let between = steps * u64::from(fragments);
            let overlap = ((between as f64 * part) as u64).min(between - 1);
            let mut applied = 0;
            let mut taken = Vec::new();
            for round in 1..=60u64 {
                let Effects { before, during, after_steps } = effects(Round(round), steps, overlap);
                for (limit, step) in [(before, 0), (during, after_steps)] {
                    while applied < limit.0 {
                        applied += 1;
                        taken.push((applied, (round - 1) * steps + step));
                    }
                }
                // When the snapshot of this round is taken, the round before of the same fragment is over.
                prop_assert!(applied + u64::from(fragments) >= round);
                prop_assert!(round - applied.min(round) <= lookahead(steps, overlap) + 1);
            }
            for (round, step) in taken {
                prop_assert_eq!(step, round * steps + overlap);
            }
        }
    }
}
