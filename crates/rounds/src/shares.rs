//! How the batch of an inner step is divided among sites of unequal speed.

/// A share moves only when some site's measured part of the total speed has changed by more than this fraction,
/// so that noise does not.
pub const SHARE_CHANGE_MIN: f64 = 0.10;

/// Work of one site in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Portion {
    /// Samples in each of its inner steps.
    pub samples_per_step: u64,
    /// Its inner steps.
    pub steps: u64,
}

/// Divides `batch_samples` in proportion to `weights` (positive), by largest remainder; ties go to the earlier site.
/// The parts add up to `batch_samples`.
pub fn divide(batch_samples: u64, weights: &[f64]) -> Vec<u64> {
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|weight| batch_samples as f64 * weight / total).collect();
    let mut parts: Vec<u64> = exact.iter().map(|part| part.floor() as u64).collect();
    let missing = batch_samples.saturating_sub(parts.iter().sum()) as usize;
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    for &index in order.iter().cycle().take(missing) {
        parts[index] += 1;
    }
    parts
}

/// The portion of each site. A site whose share is under one sample takes one sample in fewer of the `steps`; where a
/// round has a single step there are no fewer, and it only follows (0 steps).
pub fn portions(batch_samples: u64, steps: u64, weights: &[f64]) -> Vec<Portion> {
    let total: f64 = weights.iter().sum();
    let slow = |weight: f64| batch_samples as f64 * weight / total < 0.5;
    let fast: Vec<f64> = weights.iter().copied().filter(|weight| !slow(*weight)).collect();
    let mut parts = divide(batch_samples, &fast).into_iter();
    let portion = |&weight: &f64| {
        if slow(weight) {
            let steps = (steps as f64 * batch_samples as f64 * weight / total).round() as u64;
            return Portion { samples_per_step: 1, steps };
        }
        let samples_per_step = parts.next().unwrap_or(0);
        Portion { samples_per_step, steps: if samples_per_step == 0 { 0 } else { steps } }
    };
    weights.iter().map(portion).collect()
}

/// Whether measured speeds have moved far enough from the weights in use to divide anew.
pub fn have_moved(in_use: &[f64], measured: &[f64]) -> bool {
    let part = |weights: &[f64], index: usize| weights[index] / weights.iter().sum::<f64>();
    in_use.len() != measured.len()
        || (0..in_use.len()).any(|i| (part(measured, i) / part(in_use, i) - 1.0).abs() > SHARE_CHANGE_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shares_follow_speed() {
        assert_eq!(divide(8, &[1.0, 2.0, 5.0]), [1, 2, 5]);
        assert_eq!(divide(8, &[1.0, 1.0, 1.0]), [3, 3, 2]);
        assert_eq!(divide(1, &[1.0, 1.0]), [1, 0]);
    }

    #[test]
    fn a_very_slow_site_does_fewer_steps() {
        let portions = portions(8, 20, &[100.0, 100.0, 1.0]);
        // 8 samples * 1/201 * 20 steps = 0.8 samples in the round.
        assert_eq!(portions[2], Portion { samples_per_step: 1, steps: 1 });
        assert_eq!(portions[0].samples_per_step + portions[1].samples_per_step, 8);
    }

    #[test]
    fn small_changes_move_nothing() {
        assert!(!have_moved(&[1.0, 2.0], &[1.05, 2.0]));
        assert!(have_moved(&[1.0, 2.0], &[1.3, 2.0]));
        assert!(!have_moved(&[1.0, 2.0], &[2.0, 4.0]));
        assert!(have_moved(&[1.0], &[1.0, 1.0]));
    }

    proptest! {
        #[test]
        fn every_sample_is_given_once(batch in 1u64..10_000, weights in prop::collection::vec(0.001f64..1e6, 1..40)) {
            let parts = divide(batch, &weights);
            prop_assert_eq!(parts.iter().sum::<u64>(), batch);
            let total: f64 = weights.iter().sum();
            for (part, weight) in parts.iter().zip(&weights) {
                prop_assert!((*part as f64 - batch as f64 * weight / total).abs() <= 1.0);
            }
        }
    }
}
