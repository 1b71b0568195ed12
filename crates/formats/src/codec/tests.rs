//! What every codec promises, on every instruction set; and what the sparse one chooses.

use super::levels::{level_value, levels_of};
use super::select::{BLOCK_VALUES, Candidates, KEPT_MAX, select};
use super::*;
use crate::isa::tests::same_on_all;
use proptest::prelude::*;

/// Lengths around the blocks of all codecs.
fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![
        0_usize..300,
        // Blocks that are not full, and take as many bytes as full ones.
        Just(BLOCK_VALUES - 1),
        Just(BLOCK_VALUES - 63),
        Just(BLOCK_VALUES),
        Just(BLOCK_VALUES + 1),
        BLOCK_VALUES..3 * BLOCK_VALUES
    ]
}

/// Finite numbers of any size, some equal to others, zero or subnormal: from a seed, so that a failure is short to tell.
pub(crate) fn finite_values(length: usize, seed: u64) -> Vec<f32> {
    const PARTICULAR: [f32; 11] =
        [0.0, -0.0, 1.0, -1.0, 0.5, 3.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-42, -1e-30];
    let [choice, number] = [2, 3].map(|high| crate::round::Key::new(seed, high));
    // Some vectors hold ordinary numbers only: one enormous one makes all others of its block vanish.
    let extreme = seed % 3;
    (0..length as u32)
        .map(|index| {
            let bits = number.random(index);
            match u64::from(choice.random(index) % 64) {
                0 => PARTICULAR[bits as usize % if extreme == 0 { 11 } else { 6 }],
                roll if roll < extreme => f32::from_bits(bits & 0xbfff_ffff),
                _ => (bits as i32) as f32 / 2_f32.powi(31),
            }
        })
        .collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The encoding of `values`, and what was lost.
fn encoded(codec: &dyn Codec, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut residual = values.to_vec();
    let mut encoded = vec![0xaa; codec.encoded_bytes(values.len())];
    codec.encode(&mut residual, &mut encoded);
    (encoded, residual)
}

fn decoded(codec: &dyn Codec, encoded: &[u8], values: usize) -> Result<Vec<f32>, DecodeError> {
    let mut decoded = vec![7.0; values];
    codec.decode(encoded, &mut decoded).map(|()| decoded)
}

/// Standard normal numbers, by Box and Muller from a counter.
pub(crate) fn normal(count: usize, seed: u64) -> Vec<f32> {
    let key = crate::round::Key::new(seed, 0);
    let uniform = |index: u32| (f64::from(key.random(index)) + 0.5) / 2_f64.powi(32);
    (0..count as u32)
        .map(|index| {
            let radius = (-2.0 * uniform(2 * index).ln()).sqrt();
            (radius * (std::f64::consts::TAU * uniform(2 * index + 1)).cos()) as f32
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_left_is_what_decoding_lacks_on_every_instruction_set(length in lengths(), seed in any::<u64>()) {
        let values = finite_values(length, seed);
        for codec in CodecKind::ALL.map(CodecKind::codec) {
            let (bytes, residual) = same_on_all(|| {
                let (bytes, residual) = encoded(codec, &values);
                (bytes, bits(&residual))
            });
            let decoded = same_on_all(|| decoded(codec, &bytes, values.len()).map(|values| bits(&values))).unwrap();
            for ((value, decoded), residual) in values.iter().zip(&decoded).zip(&residual) {
                let decoded = f32::from_bits(*decoded);
                prop_assert!(decoded.is_finite());
                prop_assert_eq!((value - decoded).to_bits(), *residual, "{}: {:e} - {:e}", codec.kind(), value, decoded);
            }
        }
    }

    #[test]
    fn accumulating_is_decoding_and_adding(length in lengths(), seed in any::<u64>(), weight in -2.0_f32..2.0) {
        let values = finite_values(length, seed);
        // Sums that hold no -0.0, as sums that began with 0.0 never do.
        let sum: Vec<f32> = values.iter().rev().map(|value| value * 0.5 + 0.0).collect();
        for codec in CodecKind::ALL.map(CodecKind::codec) {
            let (bytes, _) = encoded(codec, &values);
            let decoded = decoded(codec, &bytes, values.len()).unwrap();
            let wanted: Vec<f32> = sum.iter().zip(&decoded).map(|(sum, decoded)| sum + weight * decoded).collect();
            let accumulated = same_on_all(|| {
                let mut sum = sum.clone();
                codec.accumulate(&bytes, weight, &mut sum).unwrap();
                bits(&sum)
            });
            prop_assert_eq!(accumulated, bits(&wanted), "{}", codec.kind());
        }
    }

    #[test]
    fn the_squared_norm_is_that_of_the_decoded_values_on_every_instruction_set(length in lengths(), seed in any::<u64>()) {
        let values = finite_values(length, seed);
        for codec in CodecKind::ALL.map(CodecKind::codec) {
            let (bytes, _) = encoded(codec, &values);
            let decoded = decoded(codec, &bytes, length).unwrap();
            let wanted: f64 = decoded.iter().map(|value| f64::from(*value).powi(2)).sum();
            let found = f64::from_bits(same_on_all(|| codec.squared_norm(&bytes, length).unwrap().to_bits()));
            prop_assert!((found - wanted).abs() <= 1e-12 * wanted, "{}: {found:e}, {wanted:e}", codec.kind());
        }
    }

    #[test]
    fn the_squared_norm_is_refused_as_the_check_is(length in lengths(), seed in any::<u64>(), mask in any::<u8>()) {
        let key = crate::round::Key::new(seed, 0);
        for codec in CodecKind::ALL.map(CodecKind::codec) {
            let bytes: Vec<u8> = (0..codec.encoded_bytes(length) as u32).map(|index| key.random(index) as u8 & mask).collect();
            prop_assert_eq!(codec.squared_norm(&bytes, length).map(drop), codec.check(&bytes, length));
            prop_assert!(codec.squared_norm(&bytes, length + 1).is_err() || length % codec.block_values() != 0);
        }
    }

    #[test]
    fn whole_blocks_of_values_are_whole_ranges_of_bytes(length in lengths(), seed in any::<u64>(), cut in any::<prop::sample::Index>()) {
        let values = finite_values(length, seed);
        for codec in CodecKind::ALL.map(CodecKind::codec) {
            let blocks = values.len() / codec.block_values();
            let cut = cut.index(blocks + 1) * codec.block_values();
            let (whole, _) = encoded(codec, &values);
            for part in [0..cut, cut..values.len()] {
                let range = codec.encoded_range(part.clone(), values.len());
                prop_assert_eq!(range.len(), codec.encoded_bytes(part.len()));
                prop_assert_eq!(&whole[range], &encoded(codec, &values[part]).0, "{}", codec.kind());
            }
        }
    }

    #[test]
    fn bytes_of_a_stranger_are_refused_or_finite(
        length in 0_usize..6_000,
        seed in any::<u64>(),
        flips in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
    ) {
        let random = crate::round::Key::new(seed, 1);
        for codec in CodecKind::ALL.map(CodecKind::codec) {
            let random_bytes: Vec<u8> =
                (0..codec.encoded_bytes(length) as u32).map(|index| random.random(index) as u8).collect();
            // Random bytes are mostly refused at once: a true encoding with a few bits changed gets further.
            let (mut changed, _) = encoded(codec, &normal(length, seed));
            for flip in flips.iter().filter(|_| length > 0) {
                let bit = flip.index(changed.len() * 8);
                changed[bit / 8] ^= 1 << (bit % 8);
            }
            for bytes in [random_bytes, changed] {
                let before: Vec<f32> = vec![7.0; length];
                let mut after = before.clone();
                let checked = codec.check(&bytes, length);
                prop_assert_eq!(codec.decode(&bytes, &mut after), checked.clone());
                match checked {
                    Ok(()) => prop_assert!(after.iter().all(|value| value.is_finite()), "{}", codec.kind()),
                    Err(_) => prop_assert_eq!(&after, &before),
                }
                prop_assert_eq!(codec.accumulate(&bytes, 0.5, &mut after.clone()), checked);
            }
        }
    }

    #[test]
    fn the_largest_are_selected_and_of_equal_ones_the_first(
        seed in any::<u64>(),
        kept in 1..=KEPT_MAX,
        levels in prop::option::of(1_u8..5),
    ) {
        // Few different magnitudes make many equal ones.
        let values: Vec<f32> = finite_values(BLOCK_VALUES, seed).iter().map(|value| levels.map_or(*value, |levels| (value * f32::from(levels)).trunc())).collect();
        let block: &[f32; BLOCK_VALUES] = values.as_slice().try_into().unwrap();
        let mut order: Vec<u16> = (0..BLOCK_VALUES as u16).collect();
        order.sort_by(|a, b| block[usize::from(*b)].abs().total_cmp(&block[usize::from(*a)].abs()).then(a.cmp(b)));
        order.truncate(kept);
        order.sort_unstable();
        let mut indices = [0; KEPT_MAX];
        let largest = select::<128>(block, kept, &mut Candidates::new(), &mut indices);
        if kept <= 64 {
            let mut with_64 = [0; KEPT_MAX];
            prop_assert_eq!(select::<64>(block, kept, &mut Candidates::new(), &mut with_64), largest);
            prop_assert_eq!(with_64, indices);
        }
        prop_assert_eq!(&indices[..kept], &order[..]);
        prop_assert!(indices[kept..].iter().all(|index| *index == 0));
        prop_assert_eq!(f32::from_bits(largest), block.iter().fold(0.0, |largest: f32, value| largest.max(value.abs())));
    }
}

#[test]
fn sizes_are_those_of_the_table() {
    let bytes = |kind: CodecKind, values| kind.codec().encoded_bytes(values);
    assert_eq!(CodecKind::ALL.map(|kind| bytes(kind, 4_096)), [16_384, 8_192, 4_160, 2_176, 2_080, 116, 116]);
    assert_eq!(CodecKind::ALL.map(|kind| bytes(kind, 0)), [0; 7]);
    // One value: a code, and the scale of its block. Sparse: two levels, an index in two bytes, a code.
    assert_eq!(CodecKind::ALL.map(|kind| bytes(kind, 1)), [4, 2, 3, 2, 2, 7, 7]);
    // 65 values: two entries, whose indices take three bytes: two of 12 bits, or 2 + 3 bits and two of 5.
    assert_eq!(CodecKind::ALL.map(|kind| bytes(kind, 65)), [260, 130, 67, 36, 34, 8, 8]);
}

#[test]
fn a_name_is_parsed_to_the_kind_that_it_names() {
    for kind in CodecKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
        assert_eq!(kind.codec().kind(), kind);
    }
    let error = "int4".parse::<CodecKind>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no codec \"int4\": f32, bf16, int8, mxfp4, e3m0, sparse96 and sparse are known"
    );
}

#[test]
fn kinds_are_in_the_order_of_their_losses_and_within_the_documented_ones() {
    // docs/formats.md, Gaussian values. The sparse ones lose what 98 % of the values carry.
    const DOCUMENTED: [f64; 7] = [0.0, 2.8e-6, 4.3e-5, 0.0127, 0.0380, 0.842, 0.884];
    let values = normal(1 << 18, 1);
    let energy = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
    let losses = CodecKind::ALL.map(|kind| energy(&encoded(kind.codec(), &values).1) / energy(&values));
    assert!(losses.is_sorted(), "{losses:?}");
    assert!(losses.iter().zip(DOCUMENTED).all(|(loss, documented)| *loss <= documented), "{losses:?}");
}

#[test]
fn what_was_not_finite_is_refused_wherever_it_stood() {
    for codec in CodecKind::ALL.map(CodecKind::codec) {
        for wrong in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (length, place) in [(1, 0), (100, 99), (BLOCK_VALUES + 10, 0), (BLOCK_VALUES + 10, BLOCK_VALUES + 9)] {
                let mut values = normal(length, 3);
                values[place] = wrong;
                let (bytes, _) = same_on_all(|| {
                    let (bytes, residual) = encoded(codec, &values);
                    (bytes, residual.len())
                });
                let error = decoded(codec, &bytes, length).unwrap_err();
                let DecodeError::NotFinite { codec: kind, value } = error else { panic!("{error}") };
                assert_eq!(kind, codec.kind());
                assert!((value..value + BLOCK_VALUES).contains(&place), "{error}");
            }
            let all_wrong = vec![wrong; BLOCK_VALUES + 70];
            assert!(decoded(codec, &encoded(codec, &all_wrong).0, all_wrong.len()).is_err());
        }
    }
}

#[test]
fn a_wrong_length_is_refused_before_a_byte_is_read() {
    for codec in CodecKind::ALL.map(CodecKind::codec) {
        let wanted = codec.encoded_bytes(5_000);
        for found in [0, wanted - 1, wanted + 1] {
            let error = decoded(codec, &vec![0; found], 5_000).unwrap_err();
            assert_eq!(error, DecodeError::Length { codec: codec.kind(), values: 5_000, wanted, found });
        }
    }
}

type Change<'a> = &'a dyn Fn(&mut [u8]);

#[test]
fn each_thing_that_no_encoder_writes_is_refused() {
    let refused = |kind: CodecKind, values: usize, change: Change<'_>| {
        let (mut bytes, _) = encoded(kind.codec(), &normal(values, 5));
        change(&mut bytes);
        kind.codec().check(&bytes, values).unwrap_err().to_string()
    };
    let cases: [(CodecKind, usize, Change<'_>, &str); 16] = [
        (CodecKind::Int8, 200, &|bytes| bytes[130 + 2] = 0x80, "int8: the code -128 in the block of value 128"),
        (CodecKind::Int8, 200, &|bytes| bytes[1] |= 0x80, "int8: a scale that no values have in the block of value 0"),
        (
            CodecKind::Int8,
            200,
            &|bytes| bytes[..2].fill(0),
            "int8: a scale that no values have in the block of value 0",
        ),
        (CodecKind::Mxfp4, 64, &|bytes| bytes[17] = 253, "mxfp4: a scale that no values have in the block of value 32"),
        (CodecKind::E3m0, 129, &|bytes| bytes[65] = 251, "e3m0: a scale that no values have in the block of value 128"),
        (CodecKind::Mxfp4, 33, &|bytes| bytes[18] |= 0x10, "mxfp4: bits after the last value in the block of value 32"),
        (
            CodecKind::Sparse,
            4_096,
            &|bytes| bytes.copy_within(7..10, 4),
            "sparse: indices that do not ascend in the block of value 0",
        ),
        (
            CodecKind::Sparse,
            4_196,
            &|bytes| bytes[116 + 6] = 0xff,
            "sparse: an index beyond the block in the block of value 4096",
        ),
        (
            CodecKind::Sparse,
            4_096,
            &|bytes| bytes[..4].rotate_left(2),
            "sparse: levels that are negative or not in order in the block of value 0",
        ),
        (
            CodecKind::Sparse,
            4_096,
            &|bytes| bytes[3] |= 0x80,
            "sparse: levels that are negative or not in order in the block of value 0",
        ),
        (CodecKind::Sparse, 65, &|bytes| bytes[7] |= 0x10, "sparse: bits after the last value in the block of value 0"),
        // A set bit more, and one less, among the high parts of the indices; low parts in the wrong order; an index of
        // 31 in a block of 20; a code of an entry that is not there.
        (
            CodecKind::Sparse96,
            4_096,
            &|bytes| bytes[4 + 27] = 0xff,
            "sparse96: more or fewer indices than there are entries in the block of value 0",
        ),
        (
            CodecKind::Sparse96,
            4_096,
            &|bytes| bytes[4..12].fill(0),
            "sparse96: more or fewer indices than there are entries in the block of value 0",
        ),
        (
            CodecKind::Sparse96,
            65,
            &|bytes| bytes[4..7].copy_from_slice(&[0b11, 0b00011_11111, 0]),
            "sparse96: indices that do not ascend in the block of value 0",
        ),
        (
            CodecKind::Sparse96,
            20,
            &|bytes| bytes[4..6].copy_from_slice(&[1, 31]),
            "sparse96: an index beyond the block in the block of value 0",
        ),
        (
            CodecKind::Sparse96,
            20,
            &|bytes| bytes[6] |= 4,
            "sparse96: bits after the last value in the block of value 0",
        ),
    ];
    for (kind, values, change, message) in cases {
        assert_eq!(refused(kind, values, change), message);
    }
}

#[test]
fn a_range_that_cuts_a_block_is_our_own_mistake() {
    let cut = || CodecKind::Int8.codec().encoded_range(0..100, 1_000);
    assert!(std::panic::catch_unwind(cut).is_err());
    assert_eq!(CodecKind::Int8.codec().encoded_range(896..1_000, 1_000), 910..1_016);
}

/// Squared error of magnitudes that take the nearer of two levels.
fn error_of(magnitudes: &[f32], low: f64, high: f64) -> f64 {
    let error = |magnitude: &f32| (f64::from(*magnitude) - low).abs().min((f64::from(*magnitude) - high).abs());
    magnitudes.iter().map(|magnitude| error(magnitude).powi(2)).sum()
}

#[test]
fn two_levels_are_nearly_the_best_two() {
    let (mut ours, mut best) = (0.0, 0.0);
    for seed in 0..200 {
        // The tail beyond the 98th percentile of a normal distribution, and of one with heavy tails.
        let mut block = normal(BLOCK_VALUES, seed);
        if seed % 2 == 1 {
            block.iter_mut().for_each(|value| *value = value.powi(3));
        }
        block.iter_mut().for_each(|value| *value = value.abs());
        block.sort_by(|a, b| b.total_cmp(a));
        let magnitudes: [f32; KEPT_MAX] = block[..KEPT_MAX].try_into().unwrap();
        let energy: f64 = magnitudes.iter().map(|magnitude| f64::from(*magnitude).powi(2)).sum();
        let mean = |part: &[f32]| part.iter().map(|value| f64::from(*value)).sum::<f64>() / part.len() as f64;
        let least = (1..KEPT_MAX)
            .map(|cut| error_of(&magnitudes, mean(&magnitudes[cut..]), mean(&magnitudes[..cut])))
            .fold(f64::INFINITY, f64::min);
        let levels = levels_of(&magnitudes, KEPT_MAX);
        ours += error_of(&magnitudes, level_value(levels.low).into(), level_value(levels.high).into()) / energy;
        best += least / energy;
    }
    assert!(ours < 1.06 * best, "{ours} against {best}");
}

#[test]
fn levels_of_equal_and_of_enormous_magnitudes_are_those_magnitudes() {
    let levels = levels_of(&[3.0; KEPT_MAX], KEPT_MAX);
    assert_eq!([level_value(levels.low), level_value(levels.high)], [3.0; 2]);
    let levels = levels_of(&[f32::MAX; KEPT_MAX], KEPT_MAX);
    assert!(level_value(levels.low) > 3.3e38 && level_value(levels.high) < f32::INFINITY);
    let levels = levels_of(&[0.0; KEPT_MAX], KEPT_MAX);
    assert_eq!([levels.low, levels.high], [0; 2]);
}
