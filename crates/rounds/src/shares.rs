//! How the samples of a round are divided among sites of unequal speed.
//!
//! Work is counted per round: `batch_samples · steps` samples, divided by largest remainder, so that every site's part
//! differs from the ideal one by less than a sample in the whole round, whatever the ratio of the speeds. Inside the round
//! a site spreads its samples over its inner steps as evenly as whole samples allow ([`step_samples`]).
//!
//! Speeds are measured anew in every round. A jump is believed at once, small changes are averaged first ([`follow`]): a
//! throttled device loses samples in the very next round, and noise moves nothing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A share moves only when the speeds have changed by more than this fraction, so that noise does not.
pub const SHARE_CHANGE_MIN: f64 = 0.10;

/// Weight of the newest measurement in a speed that only drifts. Independent noise of 5 % a round is averaged to
/// 5 % · √(0.3 / 1.7) = 2.1 %.
pub const SPEED_SMOOTHING: f64 = 0.3;

/// Work of one site in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Portion {
    /// Samples of the whole round.
    pub samples: u64,
    /// Inner steps over which they are spread, at least one sample in each.
    pub steps: u64,
}

/// Training speed of one site as the coordinator knows it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// As measured last, tokens a second.
    pub newest: f64,
    /// What its share is computed from, tokens a second.
    pub believed: f64,
}

impl Speed {
    /// A first measurement.
    pub fn new(tokens_per_second: f64) -> Self {
        Self { newest: tokens_per_second, believed: tokens_per_second }
    }
}

/// Divides `samples` in proportion to `weights` (positive), by largest remainder; ties go to the earlier site.
/// The parts add up to `samples`, and each differs from the exact proportion by less than one.
pub fn divide(samples: u64, weights: &[f64]) -> Vec<u64> {
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|weight| samples as f64 * (weight / total)).collect();
    let mut parts: Vec<u64> = exact.iter().map(|part| part.floor() as u64).collect();
    let missing = samples.saturating_sub(parts.iter().sum()) as usize;
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    for &index in order.iter().cycle().take(missing) {
        parts[index] += 1;
    }
    parts
}

/// The portion of each site in a round of `steps` inner steps of `batch_samples` samples. A site whose samples are fewer
/// than the steps takes one sample in that many steps. In a round of several steps every site has a sample, if there are
/// enough: a site that is given none would never be measured again. In a round of one step a sample too many would hold up
/// the others, and the slowest site may only follow.
pub fn portions(batch_samples: u64, steps: u64, weights: &[f64]) -> Vec<Portion> {
    let portion = |samples: u64| Portion { samples, steps: steps.min(samples) };
    let mut parts = divide(batch_samples * steps, weights);
    if steps > 1 && batch_samples * steps >= parts.len() as u64 {
        give_each_a_sample(&mut parts);
    }
    parts.into_iter().map(portion).collect()
}

/// Takes what a part lacks from the largest.
fn give_each_a_sample(parts: &mut [u64]) {
    let empty: Vec<usize> = (0..parts.len()).filter(|index| parts[*index] == 0).collect();
    if empty.is_empty() {
        return;
    }
    // The first of the largest, whatever the order in which equals are met.
    let mut largest: BinaryHeap<(u64, Reverse<usize>)> =
        parts.iter().enumerate().map(|(index, part)| (*part, Reverse(index))).collect();
    for empty in empty {
        let Some((part, Reverse(index))) = largest.pop() else { return };
        (parts[index], parts[empty]) = (part - 1, 1);
        largest.push((part - 1, Reverse(index)));
    }
}

/// Samples of inner step `index` (from 0) of `steps`, of a round of `samples`:
/// ⌊(index + 1) · samples / steps⌋ − ⌊index · samples / steps⌋.
pub fn step_samples(samples: u64, steps: u64, index: u64) -> u64 {
    let before = |index: u64| u128::from(index) * u128::from(samples) / u128::from(steps.max(1));
    // The difference of two neighbours is at most `samples`.
    (before(index + 1) - before(index)) as u64
}

/// Whether averaged speeds have left the weights in use: some site has become faster or slower, against some other, by
/// more than [`SHARE_CHANGE_MIN`]. What all sites have in common changes no share.
pub fn have_drifted(in_use: &[f64], believed: &[f64]) -> bool {
    let changes = || in_use.iter().zip(believed).map(|(in_use, believed)| believed / in_use);
    let largest = changes().fold(f64::NEG_INFINITY, f64::max);
    let smallest = changes().fold(f64::INFINITY, f64::min);
    in_use.len() != believed.len() || largest / smallest > 1.0 + SHARE_CHANGE_MIN
}

/// Whether newest measurements differ so much from what is believed that noise does not explain it: some site's part of the
/// total speed has changed by more than [`SHARE_CHANGE_MIN`].
pub fn have_moved(in_use: &[f64], measured: &[f64]) -> bool {
    let (in_use_total, measured_total) = (in_use.iter().sum::<f64>(), measured.iter().sum::<f64>());
    let has_moved = |(in_use, measured): (&f64, &f64)| {
        ((measured / measured_total) / (in_use / in_use_total) - 1.0).abs() > SHARE_CHANGE_MIN
    };
    in_use.len() != measured.len() || in_use.iter().zip(measured).any(has_moved)
}

/// Brings what is believed up to the newest measurements of all sites, once a round, and tells whether the round is to be
/// divided anew: the newest have moved from the weights in use (something has happened: they are taken as they are), or their
/// averages have drifted from them.
pub fn follow(speeds: &mut [Speed], in_use: &[f64]) -> bool {
    let newest: Vec<f64> = speeds.iter().map(|speed| speed.newest).collect();
    let jumped = have_moved(in_use, &newest);
    for speed in speeds.iter_mut() {
        let averaged = speed.believed + SPEED_SMOOTHING * (speed.newest - speed.believed);
        speed.believed = if jumped { speed.newest } else { averaged };
    }
    let believed: Vec<f64> = speeds.iter().map(|speed| speed.believed).collect();
    jumped || have_drifted(in_use, &believed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::random::Random;
    use proptest::prelude::*;

    #[test]
    fn shares_follow_speed() {
        assert_eq!(divide(8, &[1.0, 2.0, 5.0]), [1, 2, 5]);
        assert_eq!(divide(8, &[1.0, 1.0, 1.0]), [3, 3, 2]);
        assert_eq!(divide(1, &[1.0, 1.0]), [1, 0]);
    }

    #[test]
    fn whole_samples_a_step_stay_whole() {
        let portions = portions(8, 20, &[1.0, 2.0, 5.0]);
        assert_eq!(portions.iter().map(|portion| portion.samples).collect::<Vec<_>>(), [20, 40, 100]);
        for (portion, expected) in portions.iter().zip([1, 2, 5]) {
            assert!((0..20).all(|step| step_samples(portion.samples, portion.steps, step) == expected));
        }
    }

    #[test]
    fn sites_of_1_to_12_share_the_round_and_not_the_step() {
        // A step of 8 samples cannot be cut 1:12; a round of 20 steps can: 12.3 and 147.7 of 160.
        let portions = portions(8, 20, &[1.0, 12.0]);
        assert_eq!(portions, [Portion { samples: 12, steps: 12 }, Portion { samples: 148, steps: 20 }]);
        let steps: Vec<u64> = (0..5).map(|step| step_samples(148, 20, step)).collect();
        assert_eq!(steps, [7, 7, 8, 7, 8]);
    }

    #[test]
    fn a_very_slow_site_does_fewer_steps_or_only_follows() {
        // 8 samples · 20 steps · 1/201 = 0.8 samples in the round.
        assert_eq!(portions(8, 20, &[100.0, 100.0, 1.0])[2], Portion { samples: 1, steps: 1 });
        assert_eq!(portions(8, 1, &[100.0, 100.0, 1.0])[2], Portion { samples: 0, steps: 0 });
    }

    #[test]
    fn small_changes_move_nothing() {
        assert!(!have_moved(&[1.0, 2.0], &[1.05, 2.0]));
        assert!(have_moved(&[1.0, 2.0], &[1.3, 2.0]));
        assert!(!have_moved(&[1.0, 2.0], &[2.0, 4.0]));
        assert!(have_moved(&[1.0], &[1.0, 1.0]));
    }

    #[test]
    fn drift_is_seen_between_any_two_sites() {
        assert!(!have_drifted(&[1.0, 1.0], &[0.95, 1.0]));
        assert!(have_drifted(&[1.0, 1.0], &[0.85, 1.0]), "15 % of one of two sites changes its part by 8 % only");
        assert!(!have_drifted(&[1.0, 2.0], &[2.0, 4.0]), "all sites alike");
        assert!(have_drifted(&[1.0], &[1.0, 1.0]));
    }

    #[test]
    fn no_site_of_a_long_round_is_left_without_a_sample() {
        let samples = |batch, steps, weights: &[f64]| -> Vec<u64> {
            portions(batch, steps, weights).iter().map(|portion| portion.samples).collect()
        };
        assert_eq!(samples(8, 20, &[1e4, 1.0, 1.0]), [158, 1, 1]);
        assert_eq!(samples(8, 1, &[1e4, 1.0, 1.0]), [8, 0, 0]);
        assert_eq!(samples(1, 2, &[1e4, 1.0, 1.0]), [2, 0, 0], "two samples are not enough for three");
        assert_eq!(samples(5, 2, &[1e4, 1e4, 1.0, 1.0, 1.0]), [3, 4, 1, 1, 1], "of equals the first gives first");
    }

    #[test]
    fn a_jump_is_believed_at_once_and_drift_is_averaged() {
        let mut speeds = [Speed::new(100.0), Speed::new(300.0)];
        speeds[0].newest = 50.0;
        assert!(follow(&mut speeds, &[100.0, 300.0]));
        assert_eq!(speeds[0].believed, 50.0);
        speeds[0].newest = 52.0;
        assert!(!follow(&mut speeds, &[50.0, 300.0]));
        assert!((speeds[0].believed - 50.6).abs() < 1e-9);
    }

    #[test]
    fn a_change_that_stays_moves_the_shares_however_it_is_spread() {
        // 15 % slower, one of two sites: its part changes by 8 %, which a single round's noise could be.
        let mut speeds = [Speed::new(100.0), Speed::new(100.0)];
        let moved = (0..5).any(|_| {
            speeds[0].newest = 85.0;
            follow(&mut speeds, &[100.0, 100.0])
        });
        assert!(moved, "{speeds:?}");
    }

    #[test]
    fn noise_of_5_percent_never_takes_what_is_believed_out_of_the_bound() {
        for seed in 0..100 {
            let mut random = Random::new(seed, 0);
            let truth = [120.0, 120.0, 1_440.0];
            let mut speeds = truth.map(Speed::new);
            for _ in 0..50 {
                for (speed, truth) in speeds.iter_mut().zip(truth) {
                    speed.newest = truth * (0.95 + 0.1 * random.next_unit());
                }
                assert!(!follow(&mut speeds, &truth), "seed {seed}: {speeds:?}");
            }
        }
    }

    fn weights() -> impl Strategy<Value = Vec<f64>> {
        prop::collection::vec(0.001f64..1e6, 1..40)
    }

    proptest! {
        #[test]
        fn every_sample_is_given_once(batch in 1u64..10_000, weights in weights()) {
            let parts = divide(batch, &weights);
            prop_assert_eq!(parts.iter().sum::<u64>(), batch);
            let total: f64 = weights.iter().sum();
            for (part, weight) in parts.iter().zip(&weights) {
                prop_assert!((*part as f64 - batch as f64 * weight / total).abs() <= 1.0 + 1e-6);
            }
        }

        /// A site of `weight` samples a second needs samples / weight seconds. It is late by one sample's time at most, and early
        /// by no more than what it gave to those that would have had none.
        #[test]
        fn all_sites_finish_within_one_sample_of_the_ideal(
            batch in 1u64..512, steps in 1u64..200, weights in weights(),
        ) {
            let ideal_seconds = (batch * steps) as f64 / weights.iter().sum::<f64>();
            let given = divide(batch * steps, &weights).iter().filter(|part| **part == 0).count() as f64;
            for (portion, weight) in portions(batch, steps, &weights).iter().zip(&weights) {
                let sample_seconds = 1.0 / weight;
                let late = portion.samples as f64 * sample_seconds - ideal_seconds;
                prop_assert!(late <= sample_seconds * (1.0 + 1e-6));
                prop_assert!(late >= -sample_seconds * (1.0 + given + 1e-6));
            }
        }

        #[test]
        fn the_steps_of_a_round_add_up_and_are_even(batch in 1u64..512, steps in 1u64..200, weights in weights()) {
            for Portion { samples, steps } in portions(batch, steps, &weights) {
                let each: Vec<u64> = (0..steps).map(|index| step_samples(samples, steps, index)).collect();
                prop_assert_eq!(each.iter().sum::<u64>(), samples);
                prop_assert!(each.iter().all(|&count| count >= 1 && count.abs_diff(samples / steps.max(1)) <= 1));
            }
        }
    }
}
