//! The merge: token-weighted mean of the contributors' deltas.
//!
//! D = sum_i (T_i / sum T) * decode(q_i) in f32, contributors in ascending order of site id, so that every site computes the
//! same bits. The weight is rounded to f32 once; products and sums are separate roundings (Rust never contracts
//! them into a fused multiply-add). Each value is the sum of the same products in the same order wherever it is computed: the merge of
//! slices is a slice of the merge.

use crate::codec::FragmentCodec;
use formats::DecodeError;

/// Weights of contributors by their tokens. Where nobody has trained, all are zero.
pub fn token_weights(tokens: impl Iterator<Item = u64> + Clone) -> Vec<f32> {
    let total: u64 = tokens.clone().sum();
    tokens.map(|tokens| if total == 0 { 0.0 } else { (tokens as f64 / total as f64) as f32 }).collect()
}

/// Writes the token-weighted mean of `contributions` (tokens and encoded delta, ascending by site id) to `merged`. Where nobody has
/// trained, the mean is zero.
///
/// # Errors
/// A delta that is no encoding of as many values as `merged` has.
pub fn token_weighted_mean(
    codec: &FragmentCodec,
    contributions: &[(u64, &[u8])],
    merged: &mut [f32],
) -> Result<(), DecodeError> {
    merged.fill(0.0);
    for (weight, (_, delta)) in token_weights(contributions.iter().map(|(tokens, _)| *tokens)).iter().zip(contributions)
    {
        codec.accumulate(delta, *weight, merged)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::EncoderMemory;
    use crate::plan::FragmentPlan;
    use base::ParameterSchema;
    use base::config::Codec;
    use base::random::Random;
    use proptest::prelude::*;
    use std::ops::Range;

    /// Of a fragment of two values.
    fn uncoded() -> FragmentCodec {
        let schema = ParameterSchema::new([("weight".to_owned(), vec![2])]);
        FragmentCodec::new(FragmentPlan { index: 0, count: 1, codec: Codec::F32, rank: 0 }, 1, &schema, &schema.whole())
    }

    fn encoded(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn weights_are_tokens() {
        let deltas = [[8.0, 0.0], [0.0, 8.0], [0.0, 16.0]].map(|delta| encoded(&delta));
        let contributions = [(100, &deltas[0][..]), (200, &deltas[1][..]), (500, &deltas[2][..])];
        let mut merged = [0.0; 2];
        token_weighted_mean(&uncoded(), &contributions, &mut merged).unwrap();
        assert_eq!(merged, [1.0, 12.0]);
        token_weighted_mean(&uncoded(), &[(0, &deltas[0])], &mut merged).unwrap();
        assert_eq!(merged, [0.0; 2], "nobody has trained");
    }

    #[test]
    fn another_models_delta_is_refused() {
        let delta = encoded(&[1.0, 2.0, 3.0]);
        token_weighted_mean(&uncoded(), &[(1, &delta)], &mut [0.0; 2]).unwrap_err();
    }

    const CUT: [Codec; 7] =
        [Codec::F32, Codec::Bf16, Codec::Int8, Codec::E3m0, Codec::Mxfp4, Codec::Sparse96, Codec::Sparse];

    /// Ranges of whole blocks, cut where `marks` say, 0 to 1.
    fn ranges(elements: usize, block: usize, marks: &[f64]) -> Vec<Range<u64>> {
        let blocks = elements.div_ceil(block);
        let mut ends: Vec<usize> = marks.iter().map(|mark| (mark * blocks as f64) as usize * block).collect();
        ends.extend([0, elements]);
        ends.sort_unstable();
        ends.dedup();
        ends.windows(2).map(|pair| pair[0] as u64..pair[1] as u64).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_merge_of_slices_has_the_bits_of_the_merge_of_deltas(
            codec in prop::sample::select(CUT.to_vec()), elements in 1usize..20_000, seed in any::<u64>(),
            tokens in prop::collection::vec(0u64..5_000, 1..5), marks in prop::collection::vec(0.0f64..1.0, 0..6),
        ) {
            let schema = ParameterSchema::new([("weight".to_owned(), vec![elements])]);
            let plan = FragmentPlan { index: 0, count: 1, codec, rank: 0 };
            let codec = FragmentCodec::new(plan, 1, &schema, &schema.whole());
            let mut random = Random::new(seed, 0);
            let mut delta = || -> Vec<u8> {
                let mut values: Vec<f32> = (0..elements).map(|_| random.next_normal() * 1e-2).collect();
                codec.encode(&mut values, &mut EncoderMemory::default())
            };
            let deltas: Vec<(u64, Vec<u8>)> = tokens.iter().map(|tokens| (*tokens, delta())).collect();
            let of = |range: Range<usize>| -> Vec<(u64, &[u8])> {
                deltas.iter().map(|(tokens, delta)| (*tokens, &delta[range.clone()])).collect()
            };
            let mut whole = vec![0.0; elements];
            token_weighted_mean(&codec, &of(0..codec.encoded_bytes()), &mut whole).unwrap();
            let mut parts = Vec::new();
            for values in ranges(elements, codec.block_values().unwrap(), &marks) {
                let mut part = vec![1.0; (values.end - values.start) as usize];
                let slices = of(codec.slice(&values).unwrap());
                slices.iter().for_each(|(_, slice)| codec.check_slice(slice, part.len()).unwrap());
                token_weighted_mean(&codec, &slices, &mut part).unwrap();
                parts.extend(part);
            }
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&parts), bits(&whole));
        }
    }

    #[test]
    fn no_slice_cuts_a_block_or_ends_beyond_the_values() {
        let schema = ParameterSchema::new([("weight".to_owned(), vec![1_000])]);
        let of = |codec| {
            let plan = FragmentPlan { index: 0, count: 1, codec, rank: 0 };
            FragmentCodec::new(plan, 1, &schema, &schema.whole())
        };
        let int8 = of(Codec::Int8);
        assert_eq!(int8.slice(&(128..256)), Some(130..260));
        assert_eq!(int8.slice(&(896..1_000)), Some(7 * 130..1_000 + 16));
        for range in [100..128, 128..200, 128..128, 0..2_000, 1_000..1_128, u64::MAX - 127..u64::MAX] {
            assert_eq!(int8.slice(&range), None, "{range:?}");
        }
        let low_rank = of(Codec::LowRank);
        assert_eq!((low_rank.slice(&(0..1_000)), low_rank.block_values()), (None, None));
    }
}
