//! Inner steps that are made twice, because a device that computes something wrong now and then does not say so.
//!
//! A plan names at most one step of its round ([`StepCheck`]). Its site makes that step, goes back to where it was, makes it again, and
//! compares; so a fault that comes and goes is seen where it happens. Which step it is, is drawn from the run's seed ([`choose`]): with
//! s for the share of the steps that may be made twice and n for the steps of all sites in a round,
//! ```text
//! P(the round has one) = min(1, s n),    each of the n steps equally likely
//! ```
//! so that s bounds what it costs, on average, whatever n is.
//!
//! It says nothing of a device that computes the same wrong number each time: that is for others to find ([`crate::witness`]).

use crate::plan::Assignment;
use crate::witness::Comparison;
use base::random::{Random, mix64};
use base::{Round, SiteId, Term};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Stream of random numbers for this.
const STREAM: u64 = 0x5EC0_4D57;

/// A second mismatch before so many steps of the site have been found right ends its part in the run.
pub const PASSES_TO_FORGET: u32 = 8;

/// Checks of rounds that are not answered; rounds that are open are fewer.
const PLANNED_MAX: usize = 256;

/// A step that is to be made twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepCheck {
    /// Whose.
    pub site: SiteId,
    /// Which of the inner steps of its assignment, from 0.
    pub step: u64,
}

/// What can be different the second time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum StepQuantity {
    /// Mean loss of the batch.
    Loss,
    /// Norm of the gradient.
    GradientNorm,
    /// Every value of the gradient.
    Gradient,
    /// How far every parameter has moved.
    Movement,
}

impl StepQuantity {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::GradientNorm => "gradient norm",
            Self::Gradient => "gradient",
            Self::Movement => "movement of the parameters",
        }
    }
}

/// Two results of one step that are further apart than the engine's own noise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepMismatch {
    /// Of what.
    pub quantity: StepQuantity,
    /// How far apart, as a part of the quantity itself.
    pub difference: f64,
    /// How far apart they may be; 0 where the engine gives the same bits each time.
    pub bound: f64,
}

/// What came of a step that was made twice.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepVerdict {
    /// Number of the inner step in the run, from 1.
    pub step: u64,
    /// What the check has cost.
    pub seconds: f64,
    /// Where the results do not agree.
    pub mismatch: Option<StepMismatch>,
}

impl StepVerdict {
    /// Whether every number is one that can have been measured.
    pub fn is_acceptable(&self) -> bool {
        let is_real = |value: f64| value.is_finite() && value >= 0.0;
        is_real(self.seconds)
            && self.mismatch.is_none_or(|mismatch| {
                is_real(mismatch.difference) && is_real(mismatch.bound) && mismatch.difference > mismatch.bound
            })
    }
}

/// How far two numbers are apart, as a part of the first; the largest number there is where that cannot be said.
pub fn relative_difference(first: f64, second: f64) -> f64 {
    relative((first - second).abs(), first.abs())
}

/// `distance / size`, finite whatever went in.
pub fn relative(distance: f64, size: f64) -> f64 {
    let ratio = if distance == 0.0 { 0.0 } else { distance / size };
    if ratio.is_finite() { ratio } else { f64::MAX }
}

/// Draws the step of a round that is made twice, if one is: `share` of all steps are, at most one in a round.
pub fn choose(seed: u64, share: f64, plan: (Term, Round, u32), assignments: &[Assignment]) -> Option<StepCheck> {
    let (term, round, attempt) = plan;
    let steps: u64 = assignments.iter().map(|assignment| assignment.steps).sum();
    let mut random = Random::new([term.0, round.0, u64::from(attempt)].into_iter().fold(seed, fold), STREAM);
    if steps == 0 || random.next_unit() >= share * steps as f64 {
        return None;
    }
    let mut step = random.next_below(steps);
    for assignment in assignments {
        if step < assignment.steps {
            return Some(StepCheck { site: assignment.site, step });
        }
        step -= assignment.steps;
    }
    None
}

pub(crate) fn fold(seed: u64, value: u64) -> u64 {
    mix64(seed ^ mix64(value.wrapping_add(1)))
}

/// What the coordinator makes of a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Consequence {
    /// Nobody asked.
    Ignore,
    /// The site computes as it should.
    GoOn,
    /// What it has not given to a merge is left out, and it begins anew.
    BeginAnew,
    /// It computes wrongly too often.
    Leave,
}

/// What is known of the sites' steps.
#[derive(Debug, Clone, Default)]
pub(crate) struct Checks {
    /// Steps that sites were asked to make twice, and have not answered.
    planned: BTreeMap<(Round, u32), StepCheck>,
    /// What sites were asked to recompute for one of them, and have not all answered. One at a time: it is rare.
    pub(crate) comparison: Option<Comparison>,
    /// Sites whose last mismatch is not forgotten: how many of their steps were right since.
    suspects: BTreeMap<SiteId, u32>,
}

impl Checks {
    pub(crate) fn plan(&mut self, round: Round, attempt: u32, check: StepCheck) {
        self.planned.insert((round, attempt), check);
        while self.planned.len() > PLANNED_MAX {
            self.planned.pop_first();
        }
    }

    /// Steps and sites that are remembered.
    #[cfg(test)]
    pub(crate) fn entries(&self) -> usize {
        self.planned.len() + self.suspects.len()
    }

    /// A step of that site was wrong.
    pub(crate) fn suspect(&mut self, site: SiteId) -> Consequence {
        match self.suspects.insert(site, 0) {
            Some(_) => Consequence::Leave,
            None => Consequence::BeginAnew,
        }
    }

    /// Takes what a site says of its step in a plan.
    pub(crate) fn settle(&mut self, site: SiteId, plan: (Round, u32), verdict: &StepVerdict) -> Consequence {
        if self.planned.get(&plan).is_none_or(|check| check.site != site) {
            return Consequence::Ignore;
        }
        self.planned.remove(&plan);
        if verdict.mismatch.is_some() {
            return self.suspect(site);
        }
        if let Some(passes) = self.suspects.get_mut(&site) {
            *passes += 1;
            if *passes >= PASSES_TO_FORGET {
                self.suspects.remove(&site);
            }
        }
        Consequence::GoOn
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn assignments(steps: &[u64]) -> Vec<Assignment> {
        let assign = |(site, steps): (usize, &u64)| Assignment {
            site: SiteId(site as u32),
            samples: *steps,
            steps: *steps,
            lease: Vec::new(),
            share: 0.5,
        };
        steps.iter().enumerate().map(assign).collect()
    }

    fn plan(round: u64) -> (Term, Round, u32) {
        (Term(1), Round(round), 1)
    }

    fn verdict(is_right: bool) -> StepVerdict {
        let mismatch = StepMismatch { quantity: StepQuantity::Loss, difference: 0.5, bound: 0.0 };
        StepVerdict { step: 1, seconds: 1.0, mismatch: (!is_right).then_some(mismatch) }
    }

    proptest! {
        #[test]
        fn what_is_chosen_is_a_step_of_the_plan_and_the_same_again(
            seed: u64, round in 1u64..1_000, steps in prop::collection::vec(0u64..40, 0..6), share in 0.0f64..0.2
        ) {
            let assignments = assignments(&steps);
            let chosen = choose(seed, share, plan(round), &assignments);
            prop_assert_eq!(chosen, choose(seed, share, plan(round), &assignments));
            if let Some(StepCheck { site, step }) = chosen {
                prop_assert!(step < steps[site.0 as usize]);
            }
            prop_assert_eq!(choose(seed, 0.0, plan(round), &assignments), None);
            // Where the share allows one step of each round, each round with steps has one.
            let is_chosen = choose(seed, 1.0, plan(round), &assignments).is_some();
            prop_assert_eq!(is_chosen, steps.iter().any(|steps| *steps > 0));
        }
    }

    #[test]
    fn the_share_bounds_the_cost_and_every_step_is_as_likely() {
        const ROUNDS: u64 = 40_000;
        let steps = [4, 1, 3];
        for (share, expected) in [(0.005, 0.04), (0.05, 0.4), (0.125, 1.0), (0.5, 1.0)] {
            let assignments = assignments(&steps);
            let mut counts: BTreeMap<(u32, u64), u64> = BTreeMap::new();
            for check in (0..ROUNDS).filter_map(|round| choose(7, share, plan(round), &assignments)) {
                *counts.entry((check.site.0, check.step)).or_default() += 1;
            }
            // Each of the eight steps: a binomial of ROUNDS draws; five standard deviations.
            let probability = expected / 8.0;
            let deviation = (ROUNDS as f64 * probability * (1.0 - probability)).sqrt();
            assert_eq!(counts.len(), 8);
            for (step, count) in counts {
                let off = (count as f64 - ROUNDS as f64 * probability).abs();
                assert!(off < 5.0 * deviation, "share {share}: step {step:?} is chosen {count} times");
            }
        }
    }

    #[test]
    fn another_attempt_or_seed_draws_anew() {
        let assignments = assignments(&[50, 50]);
        let drawn = |seed, attempt| choose(seed, 1.0, (Term(1), Round(1), attempt), &assignments);
        assert!((2..20).any(|attempt| drawn(3, attempt) != drawn(3, 1)));
        assert!((4..20).any(|seed| drawn(seed, 1) != drawn(3, 1)));
    }

    #[test]
    fn a_second_mismatch_ends_it_unless_enough_steps_were_right_between() {
        let mut checks = Checks::default();
        let (site, mut round) = (SiteId(1), 0);
        let mut settle = |is_right: bool| {
            round += 1;
            checks.plan(Round(round), 1, StepCheck { site, step: 0 });
            assert_eq!(checks.settle(SiteId(0), (Round(round), 1), &verdict(false)), Consequence::Ignore, "another's");
            let consequence = checks.settle(site, (Round(round), 1), &verdict(is_right));
            assert_eq!(checks.settle(site, (Round(round), 1), &verdict(false)), Consequence::Ignore, "once");
            consequence
        };
        assert_eq!(settle(true), Consequence::GoOn);
        assert_eq!(settle(false), Consequence::BeginAnew);
        (0..PASSES_TO_FORGET).for_each(|_| assert_eq!(settle(true), Consequence::GoOn));
        assert_eq!(settle(false), Consequence::BeginAnew);
        (1..PASSES_TO_FORGET).for_each(|_| assert_eq!(settle(true), Consequence::GoOn));
        assert_eq!(settle(false), Consequence::Leave);
    }

    #[test]
    fn a_verdict_without_sense_is_not_acceptable() {
        assert!(verdict(true).is_acceptable() && verdict(false).is_acceptable());
        assert!(!StepVerdict { seconds: f64::NAN, ..verdict(true) }.is_acceptable());
        for (difference, bound) in [(0.0, 0.0), (f64::INFINITY, 0.0), (f64::NAN, 0.0), (1.0, 2.0), (1.0, -1.0)] {
            let mismatch = Some(StepMismatch { quantity: StepQuantity::Gradient, difference, bound });
            assert!(!StepVerdict { mismatch, ..verdict(true) }.is_acceptable(), "{difference} {bound}");
        }
    }

    #[test]
    fn differences_are_finite_whatever_is_compared() {
        assert_eq!(relative_difference(2.0, 2.0), 0.0);
        assert_eq!(relative_difference(2.0, 3.0), 0.5);
        for (first, second) in [(0.0, 1.0), (1.0, f64::NAN), (1.0, f64::INFINITY), (f64::NAN, f64::NAN)] {
            assert_eq!(relative_difference(first, second), f64::MAX);
        }
    }
}
