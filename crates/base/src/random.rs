//! Seeded random numbers that are the same on every platform.
//!
//! Training must be repeatable over makers and machines, so nothing here reads the system's randomness, and
//! the normal deviates use `libm`, whose results do not depend on the C library. Not for secrets: keys and
//! invites come from the TLS library's generator.

/// SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"): 64-bit state, period 2^64.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Random {
    state: u64,
}

/// Mixes 64 bits so that close inputs give unrelated outputs (the finaliser of SplitMix64).
pub fn mix64(value: u64) -> u64 {
    let mut z = value;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    /// Generator for one purpose: equal seeds with different `stream`s are unrelated.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { state: mix64(seed ^ mix64(stream.wrapping_add(0x9E37_79B9_7F4A_7C15))) }
    }

    /// The whole state, to be saved in a checkpoint.
    pub fn state(&self) -> u64 {
        self.state
    }

    /// Continues from a saved state.
    pub fn from_state(state: u64) -> Self {
        Self { state }
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix64(self.state)
    }

    /// Uniform in [0, 1) with 53 random bits.
    pub fn next_unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..`bound` (Lemire's multiply-shift; bias below 2^-32 for bounds under 2^32). `bound` must not be 0.
    pub fn next_below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "an empty range has no member");
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// One standard normal deviate (Box-Muller, in f64, rounded to f32).
    pub fn next_normal(&mut self) -> f32 {
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.next_unit()));
        (radius * libm::cos(std::f64::consts::TAU * self.next_unit())) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_repeat_and_streams_differ() {
        let draw = |seed, stream| {
            let mut random = Random::new(seed, stream);
            (0..8).map(|_| random.next_u64()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7, 0), draw(7, 0));
        assert_ne!(draw(7, 0), draw(7, 1));
        assert_ne!(draw(7, 0), draw(8, 0));
    }

    #[test]
    fn normal_has_unit_moments() {
        let mut random = Random::new(1, 2);
        let draws: Vec<f64> = (0..100_000).map(|_| f64::from(random.next_normal())).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        // Standard error of the mean is 1/sqrt(1e5) = 0.0032; five of them.
        assert!(mean.abs() < 0.016, "{mean}");
        assert!((variance - 1.0).abs() < 0.025, "{variance}");
    }
}
