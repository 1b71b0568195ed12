//! Rounding of every element format against its definition: all codes, and the one that is nearest. That needs no
//! Python, and covers what `ml_dtypes` lacks: E3M0, int8, saturation and stochastic rounding.

use super::*;
use crate::isa::tests::same_on_all;
use proptest::prelude::*;

/// The finite magnitudes of a format by its formula, by code.
fn magnitudes<E: Element>() -> Vec<f64> {
    let value = |code: u32| {
        let (exponent, mantissa) = (code >> E::MANTISSA_BITS, f64::from(code & ((1 << E::MANTISSA_BITS) - 1)));
        let fraction = mantissa / f64::from(1 << E::MANTISSA_BITS);
        let (exponent, leading) = if exponent == 0 { (1, 0.0) } else { (exponent, 1.0) };
        2_f64.powi(exponent as i32 - E::BIAS as i32) * (leading + fraction)
    };
    (0..=E::MAGNITUDE_MAX).map(value).collect()
}

/// The nearest code, saturating: the definition, by looking at all of them.
fn nearest_by_search<E: Element>(magnitudes: &[f64], value: f32) -> u32 {
    // Far above the largest value all distances would be the same number.
    let exact = f64::from(value.abs()).min(magnitudes[magnitudes.len() - 1]);
    let distance = |code: u32| (magnitudes[code as usize] - exact).abs();
    let nearer = |best: u32, code: u32| match distance(code).total_cmp(&distance(best)) {
        std::cmp::Ordering::Less => code,
        std::cmp::Ordering::Equal if code.is_multiple_of(2) => code,
        _ => best,
    };
    let magnitude = (1..=E::MAGNITUDE_MAX).fold(0, nearer);
    u32::from(value.is_sign_negative()) << (E::BITS - 1) | magnitude
}

fn encode_one<E: Element<Code: Default>>(value: f32, rounding: Rounding, overflow: Overflow) -> u32 {
    let mut code = [E::Code::default()];
    encode::<E>(&[value], &mut code, rounding, overflow);
    code[0].bits()
}

fn decode_one<E: Element>(code: u32) -> f32 {
    let mut value = [7.0];
    decode::<E>(&[E::Code::from_bits(code)], &mut value);
    value[0]
}

/// Every bf16 number, and the f32 numbers beside each middle between two codes.
fn interesting<E: Element>() -> Vec<f32> {
    let middles = magnitudes::<E>().windows(2).map(|pair| (pair[0] + pair[1]) as f32 / 2.0).collect::<Vec<_>>();
    let beside = middles.into_iter().flat_map(|middle| [middle.next_down(), middle, middle.next_up()]);
    let bf16 = (0..=u16::MAX).map(|bits| f32::from_bits(u32::from(bits) << 16)).filter(|value| value.is_finite());
    bf16.chain(beside.flat_map(|value| [value, -value])).collect()
}

fn rounds_to_the_nearest_code<E: Element<Code: Default + PartialEq + std::fmt::Debug>>() {
    let magnitudes = magnitudes::<E>();
    let values = interesting::<E>();
    let codes = same_on_all(|| {
        let mut codes = vec![E::Code::default(); values.len()];
        encode::<E>(&values, &mut codes, Rounding::NearestEven, Overflow::Saturate);
        codes
    });
    for (value, code) in values.iter().zip(codes) {
        assert_eq!(code.bits(), nearest_by_search::<E>(&magnitudes, *value), "{}: {value:e}", E::NAME);
    }
    for (code, magnitude) in magnitudes.iter().enumerate() {
        assert_eq!(f64::from(decode_one::<E>(code as u32)), *magnitude, "{}", E::NAME);
    }
}

#[test]
fn a_value_takes_the_nearest_code_and_in_the_middle_the_even_one() {
    rounds_to_the_nearest_code::<E4m3>();
    rounds_to_the_nearest_code::<E5m2>();
    rounds_to_the_nearest_code::<E3m2>();
    rounds_to_the_nearest_code::<E2m3>();
    rounds_to_the_nearest_code::<E2m1>();
    rounds_to_the_nearest_code::<E3m0>();
}

#[test]
fn e3m0_is_zero_and_seven_powers_of_two() {
    assert_eq!(magnitudes::<E3m0>(), [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]);
    // Middles: 1/8 goes to 0, 3/8 to 1/2 (code 2), 3/4 to 1/2, 1.5 to 2 (code 4), 24 and all above it to 16.
    let code = |value| encode_one::<E3m0>(value, Rounding::NearestEven, Overflow::Special);
    assert_eq!([0.125, 0.126, 0.375, 0.75, 1.5, 3.0, -3.0, 1e9].map(code), [0, 1, 2, 2, 4, 4, 12, 7]);
    assert_eq!([f32::INFINITY, f32::NEG_INFINITY, f32::NAN].map(code), [7, 15, 8]);
}

#[test]
fn overflow_and_what_is_not_finite_follow_each_specification() {
    fn codes<E: Element<Code: Default>>(overflow: Overflow) -> [u32; 4] {
        [1e30, f32::NEG_INFINITY, f32::NAN, -f32::NAN]
            .map(|value| encode_one::<E>(value, Rounding::NearestEven, overflow))
    }
    assert_eq!(codes::<E4m3>(Overflow::Special), [0x7f, 0xff, 0x7f, 0xff]);
    assert_eq!(codes::<E4m3>(Overflow::Saturate), [0x7e, 0xfe, 0x7f, 0xff]);
    assert_eq!(codes::<E5m2>(Overflow::Special), [0x7c, 0xfc, 0x7e, 0xfe]);
    assert_eq!(codes::<E5m2>(Overflow::Saturate), [0x7b, 0xfb, 0x7e, 0xfe]);
    assert_eq!(codes::<E2m1>(Overflow::Special), [0x7, 0xf, 0x8, 0x0]);
    assert_eq!(codes::<E2m1>(Overflow::Saturate), [0x7, 0xf, 0x8, 0x0]);
    assert_eq!(codes::<F16>(Overflow::Special), [0x7c00, 0xfc00, 0x7e00, 0xfe00]);
    assert_eq!(codes::<F16>(Overflow::Saturate), [0x7bff, 0xfbff, 0x7e00, 0xfe00]);
    assert_eq!(encode_one::<Bf16>(f32::MAX, Rounding::NearestEven, Overflow::Special), 0x7f80);
    assert_eq!(encode_one::<Bf16>(f32::MAX, Rounding::NearestEven, Overflow::Saturate), 0x7f7f);
}

/// Stochastic roundings of one value.
fn draws<E: Element<Code: Default + Clone>>(value: f32, count: usize) -> Vec<f32> {
    let mut codes = vec![E::Code::default(); count];
    let rounding = Rounding::Stochastic { seed: 11, first: u64::from(u32::MAX) - 100 };
    encode::<E>(&vec![value; count], &mut codes, rounding, Overflow::Saturate);
    let mut values = vec![0.0; count];
    decode::<E>(&codes, &mut values);
    values
}

fn stochastic_rounding_is_fair<E: Element<Code: Default + Clone + PartialEq + std::fmt::Debug>>() {
    const DRAWS: usize = 20_000;
    let magnitudes = magnitudes::<E>();
    // A subnormal, the first and a later normal step, near its lower and its upper end.
    let last = magnitudes.len() - 2;
    for (lower, part) in [(0, 0.001), (0, 0.3), (1, 0.75), (last / 2, 0.5), (last, 0.1), (last, 0.999)] {
        let (low, high) = (magnitudes[lower], magnitudes[lower + 1]);
        let value = -(low + part * (high - low)) as f32;
        let up = same_on_all(|| {
            draws::<E>(value, DRAWS)
                .into_iter()
                .map(|drawn| {
                    let drawn = -f64::from(drawn);
                    assert!(drawn == low || drawn == high, "{}: {value:e} became {drawn:e}", E::NAME);
                    usize::from(drawn == high)
                })
                .sum::<usize>()
        });
        // Five standard errors.
        let part = (-f64::from(value) - low) / (high - low);
        let (wanted, error) = (part * DRAWS as f64, 5.0 * (part * (1.0 - part) * DRAWS as f64).sqrt());
        assert!((up as f64 - wanted).abs() <= error, "{}: {value:e}: {up} of {DRAWS}, not {wanted}", E::NAME);
    }
    for magnitude in &magnitudes {
        let exact = *magnitude as f32;
        assert!(draws::<E>(exact, 50).iter().all(|drawn| *drawn == exact), "{}: {exact:e}", E::NAME);
    }
}

#[test]
fn stochastic_rounding_takes_a_neighbour_with_the_probability_of_its_nearness() {
    stochastic_rounding_is_fair::<E4m3>();
    stochastic_rounding_is_fair::<E5m2>();
    stochastic_rounding_is_fair::<E3m2>();
    stochastic_rounding_is_fair::<E2m3>();
    stochastic_rounding_is_fair::<E2m1>();
    stochastic_rounding_is_fair::<E3m0>();
    stochastic_rounding_is_fair::<F16>();
}

#[test]
fn int8_is_symmetric_saturates_and_has_no_nan() {
    let values = [0.5, 1.5, -0.5, -1.5, 126.5, 127.4, 128.0, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    let codes = same_on_all(|| {
        let mut codes = [7; 12];
        encode_int8(&values, &mut codes, Rounding::NearestEven);
        codes
    });
    assert_eq!(codes, [0, 2, 0, -2, 126, 127, 127, 127, -127, 127, -127, 0]);
    let mut decoded = [0.0; 12];
    decode_int8(&codes, &mut decoded);
    assert_eq!(decoded[..5], [0.0, 2.0, 0.0, -2.0, 126.0]);
}

#[test]
fn int8_rounds_stochastically_to_a_neighbour() {
    const DRAWS: usize = 20_000;
    for value in [0.25_f32, -0.25, 100.75, -126.9, 5.0, -127.0] {
        let mut codes = [0; DRAWS];
        encode_int8(&[value; DRAWS], &mut codes, Rounding::Stochastic { seed: 3, first: 0 });
        let lower = value.floor() as i8;
        let up = codes.iter().filter(|code| **code != lower).count() as f64;
        assert!(codes.iter().all(|code| *code == lower || f32::from(*code) == value.ceil()), "{value}");
        let part = f64::from(value - value.floor());
        let error = 5.0 * (part * (1.0 - part) * DRAWS as f64).sqrt();
        assert!((up - part * DRAWS as f64).abs() <= error, "{value}: {up}");
    }
}

proptest! {
    #[test]
    fn random_bits_belong_to_the_value_and_not_to_the_slice(
        values in prop::collection::vec(-500.0_f32..500.0, 1..200),
        cut in any::<prop::sample::Index>(),
        seed in any::<u64>(),
        first in prop_oneof![any::<u64>(), Just(u64::MAX - 50), Just((1_u64 << 32) - 50)],
    ) {
        let code = |values: &[f32], first| {
            let mut codes = vec![0; values.len()];
            encode::<E4m3>(values, &mut codes, Rounding::Stochastic { seed, first }, Overflow::Saturate);
            codes
        };
        let cut = cut.index(values.len());
        let (left, right) = values.split_at(cut);
        let parts = [code(left, first), code(right, first.wrapping_add(cut as u64))].concat();
        prop_assert_eq!(code(&values, first), parts);
    }
}
