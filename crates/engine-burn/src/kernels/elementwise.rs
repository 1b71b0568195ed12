//! Row-wise arithmetic on slices, written so that the compiler turns every loop into vector instructions.
//!
//! Loops run inside [`vectorised`], which compiles them for AVX-512, AVX2 and the baseline and picks at run time. Sums keep
//! [`LANES`] partial sums, so that their order, and with it their bits, is the same for every vector width.

/// Partial sums of a reduction: one AVX-512 register of f32.
pub(super) const LANES: usize = 16;

/// Runs `work` compiled for the widest vectors that this processor has.
#[inline]
pub(super) fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    struct Work<F>(F);
    impl<R, F: FnOnce() -> R> pulp::WithSimd for Work<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) -> R {
            simd.vectorize(Inner(self.0))
        }
    }
    struct Inner<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Inner<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Work(work))
}

/// eˣ with a relative error under 2 units in the last place for −87 ≤ x ≤ 88; smaller x give e⁻⁸⁷ ≈ 1e-38, NaN stays NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, the Taylor polynomial of degree 6 with Cephes' minimax coefficients
/// for eʳ, and n put into the exponent's bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding it rounds to the nearest integer and leaves that in the low bits of the mantissa (1.5·2²³).
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts: the first has few enough bits for n·LN2_HIGH to be exact (Cody and Waite).
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Comparisons with NaN are false: it passes through.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(exponent)
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Σ f(i) over 0..length in the fixed order of [`LANES`] partial sums.
#[inline(always)]
pub(super) fn sum_lanes(length: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = length - length % LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    for index in whole..length {
        lanes[index - whole] += term(index);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest element; NaN may be lost, and comes back from the `exp` that follows.
#[inline(always)]
pub(super) fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (largest, value) in lanes.iter_mut().zip(chunk) {
            *largest = if *value > *largest { *value } else { *largest };
        }
    }
    lanes.iter().chain(chunks.remainder()).copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// Rows of x / √(mean(x²) + ε) ⊙ w into `normed`; the factors 1 / √(…) into `inverse_rms`.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, normed: &mut [f32], inverse_rms: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            let width = weight.len();
            for ((x, normed), inverse) in x.chunks_exact(width).zip(normed.chunks_exact_mut(width)).zip(inverse_rms) {
                let squares = sum_lanes(width, |i| x[i] * x[i]);
                *inverse = 1.0 / (squares / width as f32 + epsilon).sqrt();
                for ((y, x), w) in normed.iter_mut().zip(x).zip(weight) {
                    *y = x * *inverse * w;
                }
            }
        },
    );
}

/// Rows of x·`inverse_rms` ⊙ w: [`rms_norm`] again, with its factors known.
pub(super) fn rms_norm_again(x: &[f32], weight: &[f32], inverse_rms: &[f32], normed: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            let width = weight.len();
            for ((x, normed), inverse) in x.chunks_exact(width).zip(normed.chunks_exact_mut(width)).zip(inverse_rms) {
                for ((y, x), w) in normed.iter_mut().zip(x).zip(weight) {
                    *y = x * *inverse * w;
                }
            }
        },
    );
}

/// Derivative of [`rms_norm`]: adds s·(g⊙w − x·s²·mean(g⊙w⊙x)) to the rows of `gradient_x` and Σ g⊙x·s to
/// `gradient_weight`, where s is the row's `inverse_rms` and g the row of `gradient`.
pub(super) fn rms_norm_backward(
    gradient: &[f32],
    x: &[f32],
    weight: &[f32],
    inverse_rms: &[f32],
    gradient_x: &mut [f32],
    gradient_weight: &mut [f32],
) {
    vectorised(
        #[inline(always)]
        || {
            let width = weight.len();
            let rows = gradient.chunks_exact(width).zip(x.chunks_exact(width));
            for (((g, x), gx), s) in rows.zip(gradient_x.chunks_exact_mut(width)).zip(inverse_rms) {
                let s = *s;
                let (g, x, gx) = (&g[..width], &x[..width], &mut gx[..width]);
                let projection = sum_lanes(width, |i| g[i] * weight[i] * x[i]) / width as f32 * s * s;
                for i in 0..width {
                    gx[i] += s * (g[i] * weight[i] - x[i] * projection);
                }
                for i in 0..width {
                    gradient_weight[i] += g[i] * x[i] * s;
                }
            }
        },
    );
}

/// silu(gate) ⊙ up.
pub(super) fn swiglu(gate: &[f32], up: &[f32], gated: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for ((y, g), u) in gated.iter_mut().zip(gate).zip(up) {
                *y = g * sigmoid(*g) * u;
            }
        },
    );
}

/// Derivative of [`swiglu`]. `gated` holds the gradient of the output and receives the output itself, which
/// the gradient of the next matrix needs.
pub(super) fn swiglu_backward(
    gate: &[f32],
    up: &[f32],
    gated: &mut [f32],
    gradient_gate: &mut [f32],
    gradient_up: &mut [f32],
) {
    vectorised(
        #[inline(always)]
        || {
            let inputs = gate.iter().zip(up);
            let outputs = gradient_gate.iter_mut().zip(gradient_up);
            for (((g, u), y), (dg, du)) in inputs.zip(gated).zip(outputs) {
                let s = sigmoid(*g);
                let silu = g * s;
                let dy = *y;
                *y = silu * u;
                *du = dy * silu;
                *dg = dy * u * (s + silu * (1.0 - s));
            }
        },
    );
}

/// Σ x² in f64, by blocks of f32 partial sums.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    /// Squares added up in f32 before going to f64: keeps the error of a block under 2^-24 · 64 per lane.
    const BLOCK: usize = 64 * LANES;
    vectorised(
        #[inline(always)]
        || values.chunks(BLOCK).map(|block| f64::from(sum_lanes(block.len(), |i| block[i] * block[i]))).sum(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for step in 0..=1_000_000 {
            let x = -87.0 + 175.0 * step as f32 / 1_000_000.0;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        // A unit in the last place is at most 2^-23 = 1.2e-7 of the value.
        assert!(worst < 2.0 * 1.2e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn lanes_add_up_every_term_once() {
        for length in [0, 1, 15, 16, 17, 100] {
            assert_eq!(sum_lanes(length, |i| i as f32), (length * length.saturating_sub(1) / 2) as f32);
        }
        let squares: Vec<f32> = (0..3000).map(|i| (i % 7) as f32).collect();
        let expected: f32 = squares.iter().map(|x| x * x).sum();
        assert_eq!(sum_of_squares(&squares), f64::from(expected));
    }

    #[test]
    fn maximum_sees_the_remainder() {
        let mut values = vec![-3.0; 37];
        values[36] = 2.0;
        assert_eq!(maximum(&values), 2.0);
    }
}
