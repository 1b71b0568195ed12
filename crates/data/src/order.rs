//! The order in which samples are trained on: a permutation without memory.
//!
//! Every epoch is a permutation of 0..n, computed for one index at a time, so that resuming a run is one
//! integer and a site can be given any range of it. The permutation is a Feistel network (Luby and Rackoff
//! 1988) over the smallest even number of bits that holds n, walked until it falls below n (cycle walking:
//! Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). The domain is below 4n, so fewer than four
//! steps are expected. It shuffles; it keeps no secrets.

use base::random::{Random, mix64};

/// Feistel rounds. Four give a pseudo-random permutation with ideal round functions; twice that covers the
/// half-words of few bits that small n have.
const ROUNDS: usize = 8;

/// Separates this use of the seed from others.
const STREAM: u64 = 0x6f72_6465_7200_0000;

/// Sample order of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleOrder {
    seed: u64,
    samples: u64,
    half_bits: u32,
}

impl SampleOrder {
    /// Order of `samples` samples.
    ///
    /// # Panics
    /// `samples` is 0 or above 2^62: a data set without samples is refused when it is opened.
    pub fn new(seed: u64, samples: u64) -> Self {
        assert!(samples > 0 && samples <= 1 << 62, "{samples} samples cannot be ordered");
        let bits = u64::BITS - (samples - 1).leading_zeros();
        Self { seed, samples, half_bits: bits.div_ceil(2).max(1) }
    }

    /// Samples in an epoch.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The epoch that a cursor is in; the first is 0.
    pub fn epoch_of(&self, cursor: u64) -> u64 {
        cursor / self.samples
    }

    /// The sample at `cursor` = epoch × samples + index.
    pub fn sample_at(&self, cursor: u64) -> u64 {
        let keys = self.keys(self.epoch_of(cursor));
        let mut value = cursor % self.samples;
        loop {
            value = self.feistel(value, &keys);
            // The permutation's cycle through an index below n comes back below n: this ends.
            if value < self.samples {
                return value;
            }
        }
    }

    fn keys(&self, epoch: u64) -> [u64; ROUNDS] {
        let mut random = Random::new(self.seed ^ STREAM, epoch);
        std::array::from_fn(|_| random.next_u64())
    }

    /// (left, right) → (right, left xor f(right)), a bijection whatever f is.
    fn feistel(&self, value: u64, keys: &[u64; ROUNDS]) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in keys {
            (left, right) = (right, left ^ (mix64(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn epoch(order: &SampleOrder, epoch: u64) -> Vec<u64> {
        let start = epoch * order.samples();
        (start..start + order.samples()).map(|cursor| order.sample_at(cursor)).collect()
    }

    fn is_permutation(values: &[u64]) -> bool {
        let mut seen = vec![false; values.len()];
        values.iter().all(|value| !std::mem::replace(&mut seen[*value as usize], true))
    }

    #[test]
    fn every_epoch_is_a_permutation() {
        let sizes = (1..=70).chain([97, 127, 128, 129, 1_009, 4_095, 4_096, 4_097, 65_537, 99_991, 1_000_000]);
        for samples in sizes {
            let order = SampleOrder::new(7, samples);
            assert!(is_permutation(&epoch(&order, 0)), "{samples}");
            assert!(is_permutation(&epoch(&order, 3)), "{samples}");
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_repeat() {
        let order = SampleOrder::new(7, 1_000);
        assert_eq!(epoch(&order, 1), epoch(&SampleOrder::new(7, 1_000), 1));
        assert_ne!(epoch(&order, 0), epoch(&order, 1));
        assert_ne!(epoch(&order, 0), epoch(&SampleOrder::new(8, 1_000), 0));
        // Two unrelated permutations agree in one place on average; eight or more has probability below 1e-5.
        let agree = |a: &[u64], b: &[u64]| a.iter().zip(b).filter(|(x, y)| x == y).count();
        assert!(agree(&epoch(&order, 0), &epoch(&order, 1)) < 8);
        assert!(agree(&epoch(&order, 0), &(0..1_000).collect::<Vec<_>>()) < 8, "close to no shuffle");
    }

    #[test]
    fn each_sample_comes_at_each_place_about_equally_often() {
        for samples in [5, 13] {
            let (order, epochs) = (SampleOrder::new(1, samples), 20_000);
            let mut counts = vec![0f64; (samples * samples) as usize];
            for cursor in 0..epochs * samples {
                counts[(cursor % samples * samples + order.sample_at(cursor)) as usize] += 1.0;
            }
            let expected = epochs as f64 / samples as f64;
            let chi_squared: f64 = counts.iter().map(|count| (count - expected).powi(2) / expected).sum();
            // (n-1)² degrees of freedom; mean + 5 standard deviations.
            let freedom = ((samples - 1) * (samples - 1)) as f64;
            assert!(chi_squared < freedom + 5.0 * (2.0 * freedom).sqrt(), "n = {samples}: {chi_squared}");
        }
    }

    #[test]
    fn neighbours_do_not_stay_neighbours() {
        let order = SampleOrder::new(3, 10_000);
        let values = epoch(&order, 0);
        let mean_step = values.windows(2).map(|w| w[0].abs_diff(w[1]) as f64).sum::<f64>() / 9_999.0;
        // The mean distance of two uniform draws is n / 3; its standard error here is about 24.
        assert!((mean_step - 10_000.0 / 3.0).abs() < 120.0, "{mean_step}");
    }

    proptest! {
        #[test]
        fn any_size_and_seed_is_a_permutation(samples in 1u64..3_000, seed: u64, start in 0u64..1 << 40) {
            prop_assert!(is_permutation(&epoch(&SampleOrder::new(seed, samples), start)));
        }

        #[test]
        fn any_cursor_is_in_range(samples in 1u64..1 << 62, seed: u64, cursor: u64) {
            prop_assert!(SampleOrder::new(seed, samples).sample_at(cursor) < samples);
        }
    }
}
