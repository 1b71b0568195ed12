//! How a value between two codes is rounded, and the random bits for it.
//!
//! Stochastic rounding takes the upper neighbour with the probability of the distance from the lower one, so that the
//! error is zero in the mean. Its random bits are a function of (seed, index of the value), not of a state: the result
//! does not depend on how a tensor is cut into slices or on the order in which they are coded.

use std::ops::Range;

/// How a value between two codes is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearer code; in the middle, to the one whose last bit is 0.
    NearestEven,
    /// Up with the probability of the distance from the lower code (resolution 2^-24 of a step, and exact on codes).
    Stochastic {
        /// Equal seeds give equal roundings.
        seed: u64,
        /// Index of the slice's first value in the whole that is coded with this seed.
        first: u64,
    },
}

impl Rounding {
    /// The same for the values from the `offset`th on.
    #[inline(always)]
    pub(crate) fn skip(self, offset: usize) -> Self {
        match self {
            Self::NearestEven => self,
            Self::Stochastic { seed, first } => Self::Stochastic { seed, first: first.wrapping_add(offset as u64) },
        }
    }
}

/// A seed's key for 2^32 consecutive indices; see [`Key::random`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key([u32; 2]);

impl Key {
    /// `high`: the upper 32 bits of the indices.
    pub(crate) fn new(seed: u64, high: u32) -> Self {
        let mixed = mix64(seed ^ mix64(u64::from(high)));
        Self([mixed as u32, (mixed >> 32) as u32])
    }

    /// 32 random bits for the index whose lower half is `low`.
    #[inline(always)]
    pub(crate) fn random(self, low: u32) -> u32 {
        mix32(mix32(low ^ self.0[0]).wrapping_add(self.0[1]))
    }
}

/// The parts of a slice whose values' indices share their upper halves: the key of each, the lower half of its first index,
/// and where in the slice it lies. An iterator and not a function that takes a closure, which would be compiled for the baseline.
pub(crate) struct KeyedParts {
    seed: u64,
    first: u64,
    values: usize,
    done: usize,
}

impl KeyedParts {
    #[inline(always)]
    pub(crate) fn new(seed: u64, first: u64, values: usize) -> Self {
        Self { seed, first, values, done: 0 }
    }
}

impl Iterator for KeyedParts {
    type Item = (Key, u32, Range<usize>);

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.done == self.values {
            return None;
        }
        let index = self.first.wrapping_add(self.done as u64);
        let until_carry = (1 << 32) - u64::from(index as u32);
        let start = self.done;
        self.done += until_carry.min((self.values - start) as u64) as usize;
        Some((Key::new(self.seed, (index >> 32) as u32), index as u32, start..self.done))
    }
}

/// A bijection of 32 bits whose output bits each depend on all input bits (multipliers by Chris Wellons' search for
/// the lowest bias, "lowbias32").
#[inline(always)]
fn mix32(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014) after one step of its counter.
fn mix64(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_bits_are_fair_and_differ_between_seeds_and_halves() {
        const DRAWS: u32 = 1 << 16;
        // Five standard errors of a fair coin: 5 * sqrt(DRAWS) / 2.
        let tolerance = 5.0 * f64::from(DRAWS).sqrt() / 2.0;
        let fair = |count: u32| (f64::from(count) - f64::from(DRAWS) / 2.0).abs() < tolerance;
        let [a, b, c] = [Key::new(1, 0), Key::new(2, 0), Key::new(1, 1)];
        for bit in 0..32 {
            let count = |draw: &dyn Fn(u32) -> u32| (0..DRAWS).map(|low| (draw(low) >> bit) & 1).sum::<u32>();
            assert!(fair(count(&|low| a.random(low))), "bit {bit}");
            assert!(fair(count(&|low| a.random(low) ^ a.random(low + 1))), "neighbours, bit {bit}");
            assert!(fair(count(&|low| a.random(low) ^ b.random(low))), "seeds, bit {bit}");
            assert!(fair(count(&|low| a.random(low) ^ c.random(low))), "halves, bit {bit}");
        }
    }

    #[test]
    fn keys_change_where_the_upper_half_of_the_index_does() {
        let parts = KeyedParts::new(7, (1 << 32) - 3, 10).map(|(key, low, range)| (key.random(low), low, range));
        let parts: Vec<_> = parts.collect();
        assert_eq!(parts[0], (Key::new(7, 0).random(u32::MAX - 2), u32::MAX - 2, 0..3));
        assert_eq!(parts[1], (Key::new(7, 1).random(0), 0, 3..10));
        assert_eq!(parts.len(), 2);
    }
}
