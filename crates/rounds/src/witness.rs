//! Steps that other sites recompute, because a device that computes the same wrong number each time cannot find that by itself.
//!
//! After the commit of a round in which a site has made a step twice, that site and up to two others with the same engine are sometimes asked
//! for the gradient of that step's samples at the global parameters: these are the same bits at every site (I1), so that nothing has to be
//! sent but a digest of the result ([`crate::digest`]). Where rounds do not overlap they are also what the round's first step begins from.
//! Of three answers the odd one out is wrong; of two nobody can tell, and the one that was asked first is left out.

use crate::digest::{DigestBounds, GradientDigest};
use crate::recompute::{StepMismatch, fold};
use base::random::Random;
use base::{ContentHash, Round, SiteId};
use std::collections::BTreeMap;

/// Stream of random numbers for this.
const STREAM: u64 = 0x3174_7E55;

/// Others that are asked: with the site itself three, of whom one can be outvoted.
pub const WITNESSES_MAX: usize = 2;

/// What a site says of a gradient.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    /// The state that it was computed at.
    pub(crate) state_hash: ContentHash,
    pub(crate) digest: GradientDigest,
    /// How far its engine may be from the same one elsewhere.
    pub(crate) bounds: DigestBounds,
}

/// Who is wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Judgement {
    pub(crate) accused: SiteId,
    /// Who has found otherwise.
    pub(crate) by: SiteId,
    pub(crate) mismatch: StepMismatch,
    /// Two agree against one.
    pub(crate) is_certain: bool,
}

/// A gradient that several sites were asked for.
#[derive(Debug, Clone)]
pub(crate) struct Comparison {
    pub(crate) round: Round,
    /// Number in the run of the step whose samples they are.
    pub(crate) step: u64,
    /// Whose step, then the witnesses.
    pub(crate) asked: Vec<SiteId>,
    answers: BTreeMap<SiteId, Answer>,
}

/// Draws who recomputes a step of `site` in a round, if somebody does: `share` of all are, by sites out of `candidates`.
pub fn choose_witnesses(seed: u64, share: f64, round: Round, candidates: &[SiteId]) -> Vec<SiteId> {
    let mut random = Random::new(fold(seed, round.0), STREAM);
    if random.next_unit() >= share {
        return Vec::new();
    }
    let mut left = candidates.to_vec();
    let mut chosen = Vec::new();
    while chosen.len() < WITNESSES_MAX && !left.is_empty() {
        chosen.push(left.swap_remove(random.next_below(left.len() as u64) as usize));
    }
    chosen
}

impl Comparison {
    pub(crate) fn new(round: Round, step: u64, asked: Vec<SiteId>) -> Self {
        Self { round, step, asked, answers: BTreeMap::new() }
    }

    /// Notes an answer; true where it was the last one.
    pub(crate) fn answer(&mut self, site: SiteId, answer: Answer) -> bool {
        if self.asked.contains(&site) {
            self.answers.entry(site).or_insert(answer);
        }
        self.answers.len() == self.asked.len()
    }

    fn mismatch(&self, site: SiteId, other: SiteId) -> Option<StepMismatch> {
        let (own, other) = (self.answers.get(&site)?, self.answers.get(&other)?);
        if own.state_hash != other.state_hash {
            // Not the same question: the run went back between the two.
            return None;
        }
        own.digest.mismatch(&other.digest, own.bounds.narrower(other.bounds))
    }

    /// Who is wrong, once all have answered.
    pub(crate) fn judge(&self) -> Option<Judgement> {
        let accuse = |accused: SiteId, by: SiteId, is_certain| {
            let mismatch = self.mismatch(accused, by)?;
            Some(Judgement { accused, by, mismatch, is_certain })
        };
        match self.asked[..] {
            [site, witness] => accuse(site, witness, false),
            [site, first, second] => {
                let differ = |one, other| self.mismatch(one, other).is_some();
                match (differ(site, first), differ(site, second), differ(first, second)) {
                    (true, true, false) => accuse(site, first, true),
                    (true, false, true) => accuse(first, site, true),
                    (false, true, true) => accuse(second, site, true),
                    (true, true, true) => accuse(site, first, false),
                    // One stands between the two others: all of it is noise, or it is too little to tell.
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::TensorDigest;
    use crate::recompute::StepQuantity;

    fn answer(value: f64) -> Answer {
        let tensor = TensorDigest { norm: value, projections: [value; 4] };
        Answer {
            state_hash: ContentHash([1; 32]),
            digest: GradientDigest { loss_nats: 1.0, tensors: vec![tensor] },
            bounds: DigestBounds { loss: 1e-5, gradient: 1e-2 },
        }
    }

    /// Sites 4, 5, ... say these.
    fn judged(values: &[f64]) -> Option<(u32, u32, bool)> {
        let asked: Vec<SiteId> = (4..).take(values.len()).map(SiteId).collect();
        let mut comparison = Comparison::new(Round(1), 1, asked.clone());
        for (number, (site, value)) in asked.iter().zip(values).enumerate() {
            assert_eq!(comparison.answer(*site, answer(*value)), number + 1 == values.len());
            assert!(!comparison.answer(SiteId(99), answer(0.0)) || number + 1 == values.len(), "nobody asked it");
        }
        let judgement = comparison.judge()?;
        assert_eq!(judgement.mismatch.quantity, StepQuantity::Gradient);
        Some((judgement.accused.0, judgement.by.0, judgement.is_certain))
    }

    #[test]
    fn of_three_the_odd_one_out_is_wrong_and_of_two_nobody_can_tell() {
        assert_eq!(judged(&[1.0, 1.001]), None);
        assert_eq!(judged(&[1.0, 1.5]), Some((4, 5, false)));
        assert_eq!(judged(&[1.0, 1.001, 0.999]), None);
        assert_eq!(judged(&[1.5, 1.0, 1.0]), Some((4, 5, true)));
        assert_eq!(judged(&[1.0, 1.5, 1.0]), Some((5, 4, true)));
        assert_eq!(judged(&[1.0, 1.0, 1.5]), Some((6, 4, true)));
        assert_eq!(judged(&[1.0, 1.5, 2.0]), Some((4, 5, false)));
        assert_eq!(judged(&[1.0, 1.008, 1.016]), None, "one stands between the others");
    }

    #[test]
    fn answers_of_another_state_are_not_compared() {
        let mut comparison = Comparison::new(Round(1), 1, vec![SiteId(0), SiteId(1)]);
        comparison.answer(SiteId(0), answer(1.0));
        assert!(comparison.answer(SiteId(1), Answer { state_hash: ContentHash([2; 32]), ..answer(2.0) }));
        assert_eq!(comparison.judge(), None);
    }

    #[test]
    fn witnesses_are_drawn_evenly_and_not_more_often_than_asked_for() {
        const ROUNDS: u64 = 20_000;
        let candidates: Vec<SiteId> = (1..5).map(SiteId).collect();
        let mut counts: BTreeMap<SiteId, u64> = BTreeMap::new();
        for round in (1..=ROUNDS).map(Round) {
            let chosen = choose_witnesses(3, 0.1, round, &candidates);
            assert_eq!(chosen, choose_witnesses(3, 0.1, round, &candidates));
            assert!(chosen.is_empty() || (chosen.len() == 2 && chosen[0] != chosen[1]));
            chosen.into_iter().for_each(|site| *counts.entry(site).or_default() += 1);
            assert!(choose_witnesses(3, 1.0, round, &candidates[..1]).len() == 1);
            assert!(choose_witnesses(3, 0.0, round, &candidates).is_empty());
        }
        // Each of four with probability 0.1 * 2 / 4: mean 1,000, standard deviation 31; five of them.
        assert!(counts.len() == 4 && counts.values().all(|count| count.abs_diff(1_000) < 155), "{counts:?}");
    }
}
