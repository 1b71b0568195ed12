//! What the low-rank coding promises: sizes, bits, residuals, refusals; and how near it comes to the best of its rank.

use super::*;
use crate::codec::tests::{bits, finite_values, normal};
use crate::isa::tests::same_on_all;
use proptest::prelude::*;

const fn shape(rows: usize, columns: usize) -> MatrixShape {
    MatrixShape { rows, columns }
}

/// Around the lanes, the blocks of rows and columns, and the choice between factors and values.
const SHAPES: [MatrixShape; 9] = [
    shape(64, 48),
    shape(1, 77),
    shape(37, 129),
    shape(0, 5),
    shape(3, 3),
    shape(128, 64),
    shape(50, 301),
    shape(1, 0),
    shape(301, 50),
];

fn energy(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum()
}

/// A matrix of the rank `scales` is long, its singular values near them, and noise of the size `noise`.
fn matrix(shape: MatrixShape, scales: &[f32], noise: f32, seed: u64) -> Vec<f32> {
    let MatrixShape { rows, columns } = shape;
    let (left, right) = (normal(rows * scales.len(), seed), normal(scales.len() * columns, seed + 1));
    let mut values: Vec<f32> = normal(shape.values(), seed + 2).into_iter().map(|value| value * noise).collect();
    for i in 0..rows {
        for (k, scale) in scales.iter().enumerate() {
            for j in 0..columns {
                let size = scale / ((rows * columns) as f32).sqrt();
                values[i * columns + j] += size * left[i * scales.len() + k] * right[k * columns + j];
            }
        }
    }
    values
}

fn encode(low_rank: &LowRank, values: &[f32], basis: &mut Basis) -> (Vec<u8>, Vec<f32>) {
    let mut residual = values.to_vec();
    let mut encoded = vec![0xaa; low_rank.encoded_bytes()];
    low_rank.encode(&mut residual, basis, &mut encoded);
    (encoded, residual)
}

fn decode(low_rank: &LowRank, encoded: &[u8]) -> Result<Vec<f32>, DecodeError> {
    let mut values = vec![7.0; low_rank.values()];
    low_rank.decode(encoded, &mut values).map(|()| values)
}

fn factors(low_rank: &LowRank, index: usize, encoded: &[u8]) -> Factors {
    let (place, rank) = low_rank.places(encoded).unwrap().0.swap_remove(index);
    low_rank.factors(index, rank, &encoded[place]).unwrap()
}

/// Relative squared error of each of `times` encodings of the same values, from a cold start on.
fn errors(low_rank: &LowRank, values: &[f32], times: usize) -> Vec<f64> {
    let mut basis = low_rank.basis(3);
    (0..times).map(|_| energy(&encode(low_rank, values, &mut basis).1) / energy(values)).collect()
}

/// Squared singular values, largest first: Jacobi's rotations of pairs of rows until all are orthogonal.
fn squared_singular_values(shape: MatrixShape, values: &[f32]) -> Vec<f64> {
    let mut rows: Vec<Vec<f64>> =
        values.chunks(shape.columns).map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for _ in 0..12 {
        for p in 0..rows.len() {
            for q in p + 1..rows.len() {
                let (left, right) = rows.split_at_mut(q);
                let (a, b) = (&mut left[p], &mut right[0]);
                let angle = 0.5 * (2.0 * dot(a, b)).atan2(dot(a, a) - dot(b, b));
                let (sine, cosine) = angle.sin_cos();
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (cosine * *a + sine * *b, cosine * *b - sine * *a);
                }
            }
        }
    }
    let mut squares: Vec<f64> = rows.iter().map(|row| dot(row, row)).collect();
    squares.sort_by(|a, b| b.total_cmp(a));
    squares
}

#[test]
fn the_size_follows_from_the_shapes() {
    // MXFP4 of 256 numbers is 136 bytes, of 704 is 374, and of 100 is 54; two bytes are for the rank of each matrix with factors.
    let size = |shapes: &[MatrixShape], rank| LowRank::new(shapes, rank).encoded_bytes();
    assert_eq!(size(&[shape(256, 704)], 10), 2 + 10 * (136 + 374));
    assert_eq!(size(&[shape(1, 256)], 10), 136);
    assert_eq!(size(&[shape(256, 704), shape(1, 256), shape(704, 256)], 4), 4 + 8 * (136 + 374) + 136);
    // 256 x 256 values are 256 * 136 bytes, as much as rank 128: there factors save nothing.
    assert_eq!(size(&[shape(256, 256)], 127), 2 + 127 * 272);
    assert_eq!(size(&[shape(256, 256)], 128), 256 * 136);
    assert_eq!(LowRank::with_factors(&[shape(256, 704)], 5, CodecKind::Int8).encoded_bytes(), 2 + 5 * (260 + 716));
    assert_eq!(size(&[], 1), 0);
}

#[test]
fn a_matrix_of_that_rank_is_lost_only_by_the_rounding_of_the_factors() {
    for (shape, rank) in [(shape(96, 160), 4), (shape(160, 96), 4), (shape(96, 160), 3), (shape(300, 70), 20)] {
        let scales: Vec<f32> = (0..rank).map(|k| 1.0 + k as f32).collect();
        let values = matrix(shape, &scales, 0.0, 5);
        for (codec, bound) in [(CodecKind::F32, 1e-10), (CodecKind::Int8, 3e-4), (CodecKind::Mxfp4, 0.03)] {
            for extra in [0, 2] {
                let low_rank = LowRank::with_factors(&[shape], rank + extra, codec);
                if low_rank.ranks > 0 {
                    let error = errors(&low_rank, &values, 2)[1];
                    assert!(error < bound, "{shape:?}, rank {rank} in {}: {error:e}, {codec}", rank + extra);
                }
            }
        }
    }
}

#[test]
fn a_warm_start_improves_up_to_the_best_of_the_rank() {
    // Six directions stand out: by (0.15 / 0.5)^2 an encoding the others fade.
    let scales = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05];
    for shape in [shape(96, 128), shape(128, 96)] {
        let values = matrix(shape, &scales, 0.004, 9);
        let squares = squared_singular_values(shape, &values);
        let total: f64 = squares.iter().sum();
        assert!((total / energy(&values) - 1.0).abs() < 1e-9);
        let best = squares[6..].iter().sum::<f64>() / total;
        // Rank 6: f32 factors of rank 8 would not be shorter than the values.
        let exact = errors(&LowRank::with_factors(&[shape], 6, CodecKind::F32), &values, 8);
        assert!(exact.windows(2).all(|pair| pair[1] <= pair[0] + 1e-6), "{exact:?}");
        assert!(exact[0] > 1.05 * best, "a random start is not the best one: {exact:?}, {best}");
        assert!((best - 1e-6..1.01 * best).contains(&exact[7]), "{exact:?}, {best}");
        // Codes of 4 bits lose 1.2 % of P, most of which the least squares win back, and 1.2 % of Q.
        let rounded = errors(&LowRank::new(&[shape], 6), &values, 8);
        assert!(rounded[7] < best + 0.03, "{rounded:?}, {best}");
    }
}

#[test]
fn least_squares_make_good_the_rounding_of_the_left_factor() {
    let (shape, scales) = (shape(96, 160), [4.0, 2.0, 1.0, 0.5]);
    let values = matrix(shape, &scales, 0.0, 5);
    let low_rank = LowRank::new(&[shape], 4);
    let mut basis = low_rank.basis(1);
    encode(&low_rank, &values, &mut basis);
    let (encoded, residual) = encode(&low_rank, &values, &mut basis);
    // What is left is orthogonal to the columns of P', but for the rounding of Q.
    let factors = factors(&low_rank, 0, &encoded);
    let along = |values: &[f32]| -> f64 {
        (0..4)
            .flat_map(|k| (0..160).map(move |j| (k, j)))
            .map(|(k, j)| (0..96).map(|i| f64::from(factors.left_of(i, k) * values[i * 160 + j])).sum::<f64>().powi(2))
            .sum()
    };
    assert!(along(&residual) < 0.03 * along(&values), "{:e} of {:e}", along(&residual), along(&values));
}

#[test]
fn zeros_are_zeros_and_leave_the_basis_alone() {
    let low_rank = LowRank::new(&SHAPES, 3);
    let mut basis = low_rank.basis(1);
    let (encoded, residual) = encode(&low_rank, &vec![0.0; low_rank.values()], &mut basis);
    assert!(residual.iter().all(|value| *value == 0.0));
    assert!(decode(&low_rank, &encoded).unwrap().iter().all(|value| *value == 0.0));
    assert_eq!(basis, low_rank.basis(1));
    assert!((0..low_rank.ranks).all(|number| written_rank(&encoded, number) == 3), "nothing says which is worth more");
    // Numbers too small for any scale are zeros too.
    let (encoded, residual) = encode(&low_rank, &vec![1e-41; low_rank.values()], &mut basis);
    assert!(residual.iter().all(|value| *value == 1e-41));
    low_rank.check(&encoded).unwrap();
}

#[test]
fn what_is_not_finite_is_refused_and_forgotten() {
    let low_rank = LowRank::new(&[shape(96, 70), shape(80, 64)], 4);
    let values = normal(low_rank.values(), 2);
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
        let mut basis = low_rank.basis(1);
        let mut broken = values.clone();
        broken[96 * 70 + 5] = wrong;
        broken[96 * 70 + 6] = -wrong;
        let (encoded, residual) = encode(&low_rank, &broken, &mut basis);
        let error = decode(&low_rank, &encoded).unwrap_err();
        assert!(
            matches!(error, DecodeError::Matrix { matrix: 1, .. } | DecodeError::ProductNotFinite { matrix: 1 }),
            "{wrong}: {error}"
        );
        assert!(residual[..96 * 70].iter().all(|value| value.is_finite()));
        assert!(residual[96 * 70..].iter().all(|value| value.is_nan()));
        let (encoded, residual) = encode(&low_rank, &values, &mut basis);
        low_rank.check(&encoded).unwrap();
        assert!(energy(&residual) < energy(&values));
    }
}

#[test]
fn foreign_bytes_are_refused() {
    let shapes = [shape(64, 48), shape(1, 40)];
    let low_rank = LowRank::new(&shapes, 2);
    let (encoded, _) = encode(&low_rank, &normal(low_rank.values(), 4), &mut low_rank.basis(1));
    let length = encoded.len();
    for wrong in [&encoded[1..], &[], &[&encoded[..], &[0]].concat()] {
        let error = DecodeError::MatricesLength { matrices: 2, wanted: length, found: wrong.len() };
        assert_eq!(decode(&low_rank, wrong), Err(error.clone()));
        let mut sum = vec![1.0; low_rank.values()];
        assert_eq!(low_rank.accumulate(wrong, 1.0, &mut sum), Err(error));
        assert!(sum.iter().all(|value| *value == 1.0));
    }
    // After the rank the scales of the first block of P, of Q (64 numbers are 34 bytes, two columns 68), and of the vector.
    for (scale, matrix) in [(2, 0), (70, 0), (length - 22, 1)] {
        let mut broken = encoded.clone();
        broken[scale] = 0xff;
        assert!(
            matches!(decode(&low_rank, &broken), Err(DecodeError::Matrix { matrix: found, .. }) if found == matrix)
        );
        let mut sum = vec![1.0; low_rank.values()];
        assert!(low_rank.accumulate(&broken, 1.0, &mut sum).is_err());
        assert!(sum.iter().all(|value| *value == 1.0), "what is refused changes nothing");
    }
    // Each scale is one that MXFP4 has; 2^120 times 2^120 is not.
    let mut broken = encoded.clone();
    (broken[2], broken[3], broken[70], broken[71]) = (247, 0x77, 247, 0x77);
    assert_eq!(decode(&low_rank, &broken), Err(DecodeError::ProductNotFinite { matrix: 0 }));
    // 64 x 48 values are 1,632 bytes, factors of rank 26 are 26 * 60.
    let of_rank = |rank: u16| decode(&low_rank, &[&rank.to_le_bytes(), &encoded[2..]].concat()).unwrap_err();
    for rank in [0, 28, 255, 65_535] {
        assert_eq!(of_rank(rank), DecodeError::Rank { matrix: 0, rank: rank.into(), most: 27 });
    }
    assert_eq!(of_rank(3), DecodeError::Ranks { wanted: 2 + 3 * 60 + 22, found: length });
    assert!(matches!(of_rank(1), DecodeError::Matrix { .. } | DecodeError::AfterLastMatrix));
}

#[test]
fn ranks_follow_the_energy_and_no_byte_more() {
    // One matrix of many directions alike, one of a single direction: 16 directions for both together.
    let shapes = [shape(96, 160), shape(160, 96)];
    let values = [matrix(shapes[0], &[1.0; 16], 0.0, 5), matrix(shapes[1], &[1.0], 1e-4, 6)].concat();
    let low_rank = LowRank::new(&shapes, 8);
    let mut basis = low_rank.basis(1);
    let mut found = Vec::new();
    let mut lost = Vec::new();
    for _ in 0..8 {
        let (encoded, residual) = encode(&low_rank, &values, &mut basis);
        assert_eq!(encoded.len(), low_rank.encoded_bytes());
        found.push([0, 1].map(|number| written_rank(&encoded, number)));
        lost.push(energy(&residual));
    }
    assert_eq!(found[..3], [[8, 8], [10, 6], [12, 4]], "{found:?}");
    assert_eq!(found[7], [14, 2], "{found:?}");
    assert!(lost[7] < 0.5 * lost[1], "{lost:?}");
}

#[test]
#[should_panic(expected = "the number of values follows from the shapes")]
fn a_caller_with_other_shapes_is_stopped() {
    let low_rank = LowRank::new(&SHAPES, 2);
    let _ = low_rank.decode(&vec![0; low_rank.encoded_bytes()], &mut [0.0; 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn bits_are_equal_on_every_instruction_set_and_follow_the_formula(seed in any::<u64>(), rank in 1_usize..20, codec in 0_usize..5) {
        let low_rank = LowRank::with_factors(&SHAPES, rank, CodecKind::ALL[codec]);
        // Numbers of any size below 2^100: no product overflows.
        let values: Vec<f32> = finite_values(low_rank.values(), seed).iter().map(|v| v.clamp(-1e30, 1e30)).collect();
        let (encoded, residual, _) = same_on_all(|| {
            let mut basis = low_rank.basis(seed);
            encode(&low_rank, &values, &mut basis);
            let (encoded, residual) = encode(&low_rank, &values, &mut basis);
            (encoded, bits(&residual), basis)
        });
        let decoded = same_on_all(|| bits(&decode(&low_rank, &encoded).unwrap()));
        let decoded: Vec<f32> = decoded.into_iter().map(f32::from_bits).collect();
        for index in 0..values.len() {
            prop_assert!(decoded[index].is_finite());
            prop_assert_eq!((values[index] - decoded[index]).to_bits(), residual[index]);
        }
        for (index, matrix) in low_rank.matrices.iter().enumerate() {
            let Way::Factors { number, .. } = matrix.way else { continue };
            let (factors, rank) = (factors(&low_rank, index, &encoded), written_rank(&encoded, number));
            let decoded = &decoded[matrix.values.clone()];
            for (place, decoded) in decoded.iter().enumerate() {
                let (i, j) = (place / matrix.shape.columns, place % matrix.shape.columns);
                let mut wanted = factors.left_of(i, 0) * factors.right_of(0, j);
                for k in 1..rank {
                    wanted += factors.left_of(i, k) * factors.right_of(k, j);
                }
                prop_assert_eq!(decoded.to_bits(), wanted.to_bits());
            }
        }
    }

    #[test]
    fn accumulating_is_decoding_and_adding(seed in any::<u64>(), rank in 1_usize..14, weight in -2.0_f32..2.0) {
        let low_rank = LowRank::new(&SHAPES, rank);
        let values = normal(low_rank.values(), seed);
        let (encoded, _) = encode(&low_rank, &values, &mut low_rank.basis(seed));
        let decoded = decode(&low_rank, &encoded).unwrap();
        let wanted: Vec<f32> = values.iter().zip(&decoded).map(|(sum, decoded)| sum + weight * decoded).collect();
        let accumulated = same_on_all(|| {
            let mut sum = values.clone();
            low_rank.accumulate(&encoded, weight, &mut sum).unwrap();
            bits(&sum)
        });
        prop_assert_eq!(accumulated, bits(&wanted));
    }

    #[test]
    fn the_squared_norm_is_just_above_that_of_the_decoded_values(seed in any::<u64>(), rank in 1_usize..14) {
        let low_rank = LowRank::new(&SHAPES, rank);
        let values = normal(low_rank.values(), seed);
        let (encoded, _) = encode(&low_rank, &values, &mut low_rank.basis(seed));
        let wanted = energy(&decode(&low_rank, &encoded).unwrap());
        let found = f64::from_bits(same_on_all(|| low_rank.squared_norm(&encoded).unwrap().to_bits()));
        prop_assert!((1.0 - 1e-12..1.0 + 2e-4).contains(&(found / wanted)), "{found:e}, {wanted:e}");
    }

    #[test]
    fn any_bytes_are_refused_or_finite(seed in any::<u64>(), rank in 1_usize..6, mask in any::<u8>()) {
        let low_rank = LowRank::new(&SHAPES, rank);
        let key = Key::new(seed, 0);
        let encoded: Vec<u8> = (0..low_rank.encoded_bytes() as u32).map(|index| key.random(index) as u8 & mask | 0x10).collect();
        prop_assert_eq!(low_rank.squared_norm(&encoded).map(drop), low_rank.check(&encoded));
        if let Ok(values) = decode(&low_rank, &encoded) {
            prop_assert!(values.iter().all(|value| value.is_finite()));
            prop_assert!(low_rank.squared_norm(&encoded).unwrap() >= energy(&values) * (1.0 - 1e-12));
        }
    }
}

/// The product is 2^60 + 2^35 - 2^60 - 2^35 at one place: 0, and -2^35 where each sum is rounded to f32.
#[test]
fn directions_that_cancel_hide_no_norm() {
    let low_rank = LowRank::with_factors(&[shape(128, 64)], 4, CodecKind::F32);
    let mut encoded = vec![0; low_rank.encoded_bytes()];
    encoded[..RANK_BYTES].copy_from_slice(&4_u16.to_le_bytes());
    let terms = [(2_f32.powi(30), 2_f32.powi(30)), (2_f32.powi(30), 32.0)];
    for (k, (left, right)) in
        [terms[0], terms[1], (-terms[0].0, terms[0].1), (-terms[1].0, terms[1].1)].into_iter().enumerate()
    {
        for (place, value) in [(k * 128, left), (4 * 128 + k * 64, right)] {
            let start = RANK_BYTES + 4 * place;
            encoded[start..start + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
    let values = decode(&low_rank, &encoded).unwrap();
    assert_eq!((values[0], energy(&values[1..])), (-2_f32.powi(35), 0.0));
    assert!(low_rank.squared_norm(&encoded).unwrap() >= energy(&values));
}
