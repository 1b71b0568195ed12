//! Clipping: nobody's delta counts for more than a multiple of what the others' do.
//!
//! With n_i the norm of what contributor i's delta decodes to, and c = `[sync] clip_norm`:
//! ```text
//! f_i = min(1, c * median(n) / n_i)          the median over all that have trained; of an even number, the mean of the middle two
//! D = sum_i (T_i / sum T) * f_i * q_i        the product of weight and factor is rounded to f32 once
//! ```
//! While fewer than half of the contributors lie, the median is not above the largest norm of an honest one, so that a liar moves D by
//! at most c times that, times its weight. Nobody says its own norm: every site takes it from the very bytes that it merges, so all have
//! the same bits. Where nothing is clipped, the merge has the bits that it has without.
//!
//! It bounds how far, not where to: a liar below the bound still chooses the direction. That is what the trimmed mean is for ([`mod@super::merge`]),
//! which bounds every value by those of honest sites, whatever their norms, and is not clipped.

use base::config::{MergeRule, SyncSection};

/// Fewer are not clipped: of two nobody can say which one lies, and no norm is more than twice their median.
const CLIPPED_CONTRIBUTORS_MIN: usize = 3;

/// A delta that counts for less than it says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clipped {
    /// Its place among the contributors.
    pub index: usize,
    /// What it is long.
    pub norm: f64,
    /// The median of the contributors' norms.
    pub median: f64,
    /// What it is multiplied by, 0 to 1.
    pub factor: f32,
}

/// Whether a merge of contributors with these tokens is clipped: else nobody needs their norms.
pub(crate) fn is_clipped(sync: &SyncSection, tokens: impl Iterator<Item = u64>) -> bool {
    sync.merge == MergeRule::Mean
        && sync.clip_norm > 0.0
        && tokens.filter(|tokens| *tokens > 0).count() >= CLIPPED_CONTRIBUTORS_MIN
}

/// The deltas that are longer than `clip_norm` times the median, of contributors with these tokens and norms. Who has not trained counts for
/// nothing, and not in the median.
pub(crate) fn clip(clip_norm: f64, contributors: &[(u64, f64)]) -> Vec<Clipped> {
    let trained = || contributors.iter().enumerate().filter(|(_, (tokens, _))| *tokens > 0);
    let median = median(trained().map(|(_, (_, norm))| *norm).collect());
    let longest = clip_norm * median;
    let too_long = trained().filter(|(_, (_, norm))| *norm > longest);
    too_long.map(|(index, (_, norm))| Clipped { index, norm: *norm, median, factor: (longest / norm) as f32 }).collect()
}

/// 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        count if count.is_multiple_of(2) => 0.5 * values[middle - 1] + 0.5 * values[middle],
        _ => values[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn factors(clip_norm: f64, norms: &[f64]) -> Vec<f32> {
        let contributors: Vec<(u64, f64)> = norms.iter().map(|norm| (1, *norm)).collect();
        let mut factors = vec![1.0; norms.len()];
        clip(clip_norm, &contributors).iter().for_each(|clipped| factors[clipped.index] = clipped.factor);
        factors
    }

    #[test]
    fn what_is_longer_than_the_multiple_of_the_median_is_cut_to_it() {
        assert_eq!(factors(5.0, &[1.0, 2.0, 100.0]), [1.0, 1.0, 0.1]);
        assert_eq!(factors(5.0, &[2.0, 100.0, 1.0, 3.0]), [1.0, 0.125, 1.0, 1.0], "the median of four is 2.5");
        assert_eq!(factors(5.0, &[1.0, 2.0, 10.0]), [1.0; 3], "just as long is not too long");
        assert_eq!(factors(1.0, &[1.0, 4.0, 2.0]), [1.0, 0.5, 1.0]);
        assert_eq!(factors(5.0, &[0.0, 0.0, 3.0]), [1.0, 1.0, 0.0], "most have sent nothing");
        assert_eq!(factors(5.0, &[]), [0.0_f32; 0]);
    }

    #[test]
    fn who_has_not_trained_does_not_count_in_the_median() {
        let clipped = clip(5.0, &[(0, 0.0), (0, 1e30), (10, 1.0), (20, 1.5), (0, 0.0), (10, 50.0)]);
        assert_eq!(clipped, [Clipped { index: 5, norm: 50.0, median: 1.5, factor: 0.15 }]);
    }

    #[test]
    fn two_contributors_and_trimmed_means_are_not_clipped() {
        let with = |merge, clip_norm, tokens: &[u64]| {
            is_clipped(&SyncSection { merge, clip_norm, ..SyncSection::default() }, tokens.iter().copied())
        };
        assert!(with(MergeRule::Mean, 5.0, &[1, 1, 1]));
        assert!(!with(MergeRule::Mean, 5.0, &[1, 1]) && !with(MergeRule::Mean, 5.0, &[1, 0, 1]));
        assert!(!with(MergeRule::Mean, 0.0, &[1; 4]) && !with(MergeRule::TrimmedMean, 5.0, &[1; 4]));
    }

    proptest! {
        #[test]
        fn a_minority_of_liars_counts_for_no_more_than_the_multiple_of_the_longest_honest_delta(
            honest in prop::collection::vec(1e-6_f64..1e3, 2..9), lies in prop::collection::vec(0.0_f64..1e30, 0..8),
            clip_norm in 1.0_f64..10.0, turn in 0_usize..16,
        ) {
            let lies = &lies[..lies.len().min(honest.len() - 1)];
            let mut norms: Vec<f64> = honest.iter().chain(lies).copied().collect();
            let longest = honest.iter().copied().fold(0.0, f64::max);
            let in_order = factors(clip_norm, &norms);
            for (factor, norm) in in_order.iter().zip(&norms) {
                prop_assert!((0.0..=1.0).contains(factor));
                prop_assert!(f64::from(*factor) * norm <= clip_norm * longest * (1.0 + 1e-6));
            }
            // Whoever comes first, each has the same factor.
            let turn = turn % norms.len();
            norms.rotate_left(turn);
            let mut turned = factors(clip_norm, &norms);
            turned.rotate_right(turn);
            prop_assert_eq!(turned, in_order);
        }
    }
}
