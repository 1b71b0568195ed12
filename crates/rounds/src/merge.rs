//! The merge: one delta from those of all contributors.
//!
//! D = sum_i (T_i / sum T) * decode(q_i) in f32, contributors in ascending order of site id, so that every site computes the
//! same bits. The weight is rounded to f32 once; products and sums are separate roundings (Rust never contracts
//! them into a fused multiply-add). Each value is the sum of the same products in the same order wherever it is computed: the merge of
//! slices is a slice of the merge.
//!
//! With [`MergeRule::TrimmedMean`] each value is the weighted mean of those that are left when the k largest and the k smallest have been
//! taken away (Yin et al., arXiv 1803.01498), k = max(1, n / 4) of n contributors, and 0 of two. What it promises: while at most k
//! contributors lie, every merged value lies between the smallest and the largest that an honest contributor has given, whatever
//! the liars send. What it costs: a value that only few sites have learnt is lost, as those of sparse deltas are.
//!
//! With [`MergeRule::Mean`] weights are times the factors of [`crate::clip`].

use crate::clip::{Clipped, clip, is_clipped};
use crate::codec::FragmentCodec;
use base::config::{MergeRule, SyncSection};
use formats::DecodeError;

/// One in so many contributors may lie.
const CONTRIBUTORS_A_LIAR: usize = 4;

/// Fewest contributors of which some can be left out: of two nobody can say which one lies.
const TRIMMED_CONTRIBUTORS_MIN: usize = 3;

/// Weights of contributors by their tokens. Where nobody has trained, all are zero.
pub fn token_weights(tokens: impl Iterator<Item = u64> + Clone) -> Vec<f32> {
    let total: u64 = tokens.clone().sum();
    tokens.map(|tokens| if total == 0 { 0.0 } else { (tokens as f64 / total as f64) as f32 }).collect()
}

/// What each contributor's delta counts for in a merge.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Weighed {
    /// In the order of the contributors.
    pub weights: Vec<f32>,
    /// Those that count for less than their tokens say.
    pub clipped: Vec<Clipped>,
}

/// Looks at every delta of a merge and says what it counts for: its part of the tokens, less where it is too long beside the others.
/// `contributions` are tokens and encoded delta, or slice, of `values` values.
///
/// # Errors
/// A delta that is no encoding of so many values.
pub fn weigh(
    sync: &SyncSection,
    codec: &FragmentCodec,
    contributions: &[(u64, impl AsRef<[u8]>)],
    values: usize,
) -> Result<Weighed, DecodeError> {
    let tokens = contributions.iter().map(|(tokens, _)| *tokens);
    let mut weights = token_weights(tokens.clone());
    if !is_clipped(sync, tokens) {
        contributions.iter().try_for_each(|(_, delta)| codec.check_slice(delta.as_ref(), values))?;
        return Ok(Weighed { weights, clipped: Vec::new() });
    }
    let norm = |delta: &[u8]| codec.squared_norm(delta, values).map(f64::sqrt);
    let norms = contributions.iter().map(|(tokens, delta)| Ok((*tokens, norm(delta.as_ref())?)));
    let clipped = clip(sync.clip_norm, &norms.collect::<Result<Vec<_>, DecodeError>>()?);
    for Clipped { index, factor, .. } in &clipped {
        // A subnormal product has lost too many digits to bound anything.
        let weight = weights[*index] * factor;
        weights[*index] = if weight.is_normal() { weight } else { 0.0 };
    }
    Ok(Weighed { weights, clipped })
}

/// Writes the merge of `contributions` (tokens and encoded delta, ascending by site id) to `merged`. Where nobody has trained, it is zero. Gives
/// those that were clipped.
///
/// # Errors
/// A delta that is no encoding of as many values as `merged` has.
pub fn merge(
    sync: &SyncSection,
    codec: &FragmentCodec,
    contributions: &[(u64, &[u8])],
    merged: &mut [f32],
) -> Result<Vec<Clipped>, DecodeError> {
    let Weighed { weights, clipped } = weigh(sync, codec, contributions, merged.len())?;
    let deltas: Vec<&[u8]> = contributions.iter().map(|(_, delta)| *delta).collect();
    merge_weighed(sync.merge, codec, (&weights, &deltas), merged)?;
    Ok(clipped)
}

/// As [`merge`] of deltas whose [weights](weigh) are known.
///
/// # Errors
/// As there.
pub fn merge_weighed(
    rule: MergeRule,
    codec: &FragmentCodec,
    (weights, deltas): (&[f32], &[impl AsRef<[u8]>]),
    merged: &mut [f32],
) -> Result<(), DecodeError> {
    merged.fill(0.0);
    merge_by(rule, weights, merged, |index, weight, sum| codec.accumulate(deltas[index].as_ref(), weight, sum))
}

/// As [`merge_weighed`] for one of the codec's [parts](FragmentCodec::parts): `merged` has its values, and is zero.
///
/// # Errors
/// As there, for that part.
pub fn merge_part(
    rule: MergeRule,
    codec: &FragmentCodec,
    part: usize,
    (weights, deltas): (&[f32], &[impl AsRef<[u8]>]),
    merged: &mut [f32],
) -> Result<(), DecodeError> {
    merge_by(rule, weights, merged, |index, weight, sum| {
        codec.accumulate_part(part, deltas[index].as_ref(), weight, sum)
    })
}

/// Contributors that are left out at either end of each value.
fn trimmed_each_end(rule: MergeRule, contributors: usize) -> usize {
    match rule {
        MergeRule::TrimmedMean if contributors >= TRIMMED_CONTRIBUTORS_MIN => {
            (contributors / CONTRIBUTORS_A_LIAR).max(1)
        }
        MergeRule::TrimmedMean | MergeRule::Mean => 0,
    }
}

/// `accumulate` adds a weight times the values of the contributor of that index.
fn merge_by(
    rule: MergeRule,
    weights: &[f32],
    merged: &mut [f32],
    accumulate: impl Fn(usize, f32, &mut [f32]) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    let trimmed = trimmed_each_end(rule, weights.len());
    if trimmed == 0 {
        return weights.iter().enumerate().try_for_each(|(index, weight)| accumulate(index, *weight, merged));
    }
    let mut rows = vec![0.0; weights.len() * merged.len()];
    if merged.is_empty() {
        return Ok(());
    }
    for (index, row) in rows.chunks_exact_mut(merged.len()).enumerate() {
        accumulate(index, 1.0, row)?;
    }
    let mut values = vec![(0.0, 0); weights.len()];
    for (place, merged) in merged.iter_mut().enumerate() {
        for (index, value) in values.iter_mut().enumerate() {
            *value = (rows[index * rows.len() / weights.len() + place], index);
        }
        *merged = trimmed_mean(&mut values, trimmed, weights);
    }
    Ok(())
}

/// The weighted mean of the values but for `trimmed` at either end, each with the index of its contributor.
fn trimmed_mean(values: &mut [(f32, usize)], trimmed: usize, weights: &[f32]) -> f32 {
    values.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let kept = &mut values[trimmed..weights.len() - trimmed];
    let (least, most) = (kept[0].0, kept[kept.len() - 1].0);
    // The order of all sums: ascending by site.
    kept.sort_unstable_by_key(|(_, index)| *index);
    let (sum, total) = kept.iter().fold((0.0, 0.0), |(sum, total): (f32, f32), (value, index)| {
        (sum + weights[*index] * value, total + weights[*index])
    });
    // Roundings must not carry it beyond what was kept.
    if total > 0.0 { (sum / total).clamp(least, most) } else { 0.0 }
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

    fn by(merge: MergeRule) -> SyncSection {
        SyncSection { merge, ..SyncSection::default() }
    }

    fn encoded(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn weights_are_tokens() {
        let deltas = [[8.0, 0.0], [0.0, 8.0], [0.0, 16.0]].map(|delta| encoded(&delta));
        let contributions = [(100, &deltas[0][..]), (200, &deltas[1][..]), (500, &deltas[2][..])];
        let mut merged = [0.0; 2];
        merge(&by(MergeRule::Mean), &uncoded(), &contributions, &mut merged).unwrap();
        assert_eq!(merged, [1.0, 12.0]);
        merge(&by(MergeRule::Mean), &uncoded(), &[(0, &deltas[0])], &mut merged).unwrap();
        assert_eq!(merged, [0.0; 2], "nobody has trained");
    }

    #[test]
    fn another_models_delta_is_refused() {
        let delta = encoded(&[1.0, 2.0, 3.0]);
        merge(&by(MergeRule::Mean), &uncoded(), &[(1, &delta)], &mut [0.0; 2]).unwrap_err();
    }

    #[test]
    fn what_a_liar_sends_moves_no_value_beyond_those_of_the_others() {
        let deltas = [[1.0, -2.0], [2.0, -1.0], [4.0, 3.0]].map(|delta| encoded(&delta));
        let merged_with = |lie: &[f32], place: usize| {
            let mut all: Vec<(u64, Vec<u8>)> = deltas.iter().map(|delta| (100, delta.clone())).collect();
            all.insert(place, (100, encoded(lie)));
            let all: Vec<(u64, &[u8])> = all.iter().map(|(tokens, delta)| (*tokens, &delta[..])).collect();
            let mut merged = [0.0; 2];
            merge(&by(MergeRule::TrimmedMean), &uncoded(), &all, &mut merged).unwrap();
            merged
        };
        for place in 0..4 {
            assert_eq!(merged_with(&[1e30, -1e30], place), [3.0, -1.5], "the middle two of each");
            assert_eq!(merged_with(&[-1e30, 1e30], place), [1.5, 1.0]);
            assert_eq!(merged_with(&[2.5, 0.0], place), [2.25, -0.5], "an honest one counts");
        }
        let of = |count: usize| trimmed_each_end(MergeRule::TrimmedMean, count);
        assert_eq!([1, 2, 3, 4, 7, 8, 12].map(of), [0, 0, 1, 1, 1, 2, 3]);
        assert_eq!(trimmed_each_end(MergeRule::Mean, 12), 0);
    }

    #[test]
    fn what_is_left_counts_by_tokens() {
        let deltas = [[0.0, 0.0], [1.0, 8.0], [4.0, 4.0], [9.0, 5.0]].map(|delta| encoded(&delta));
        let all: Vec<(u64, &[u8])> =
            [100, 300, 100, 0].into_iter().zip(deltas.iter().map(|delta| &delta[..])).collect();
        let mut merged = [0.0; 2];
        merge(&by(MergeRule::TrimmedMean), &uncoded(), &all, &mut merged).unwrap();
        assert!((merged[0] - (3.0 + 4.0) / 4.0).abs() < 1e-6, "{merged:?}");
        assert_eq!(merged[1], 4.0, "one that has trained nothing may be left in, and says nothing");
        let none: Vec<(u64, &[u8])> = all.iter().map(|(_, delta)| (0, *delta)).collect();
        merge(&by(MergeRule::TrimmedMean), &uncoded(), &none, &mut merged).unwrap();
        assert_eq!(merged, [0.0; 2], "nobody has trained");
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
            tokens in prop::collection::vec(0u64..5_000, 1..6), trims in any::<bool>(), marks in prop::collection::vec(0.0f64..1.0, 0..6),
        ) {
            // What is too long for a slice is not what is too long for the whole.
            let sync = SyncSection { clip_norm: 0.0, ..by(if trims { MergeRule::TrimmedMean } else { MergeRule::Mean }) };
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
            merge(&sync, &codec, &of(0..codec.encoded_bytes()), &mut whole).unwrap();
            let mut parts = Vec::new();
            for values in ranges(elements, codec.block_values().unwrap(), &marks) {
                let mut part = vec![1.0; (values.end - values.start) as usize];
                let slices = of(codec.slice(&values).unwrap());
                slices.iter().for_each(|(_, slice)| codec.check_slice(slice, part.len()).unwrap());
                merge(&sync, &codec, &slices, &mut part).unwrap();
                parts.extend(part);
            }
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&parts), bits(&whole));
        }
    }

    /// Of `elements` values, each codec in turn: deltas of nearly the same norm.
    fn deltas_of(codec: &FragmentCodec, elements: usize, count: usize, seed: u64) -> Vec<Vec<u8>> {
        let mut random = Random::new(seed, 0);
        let mut delta = || -> Vec<u8> {
            let mut values: Vec<f32> = (0..elements).map(|_| random.next_normal() * 1e-2).collect();
            codec.encode(&mut values, &mut EncoderMemory::default())
        };
        (0..count).map(|_| delta()).collect()
    }

    #[test]
    fn a_delta_that_is_too_long_counts_as_one_that_is_not() {
        let lie = encoded(&[-3e4, 4e4]);
        let deltas = [[3.0, 4.0], [4.0, 3.0], [0.0, 5.0]].map(|delta| encoded(&delta));
        let all: Vec<(u64, &[u8])> = deltas.iter().chain([&lie]).map(|delta| (100, &delta[..])).collect();
        let mut merged = [0.0; 2];
        let clipped = merge(&by(MergeRule::Mean), &uncoded(), &all, &mut merged).unwrap();
        assert_eq!(clipped, [Clipped { index: 3, norm: 5e4, median: 5.0, factor: 5e-4 }]);
        // (3 + 4 + 0 - 15) / 4, (4 + 3 + 5 + 20) / 4
        assert!((merged[0] + 2.0).abs() < 1e-6 && (merged[1] - 8.0).abs() < 1e-6, "{merged:?}");
        let switched_off = SyncSection { clip_norm: 0.0, ..SyncSection::default() };
        assert_eq!(merge(&switched_off, &uncoded(), &all, &mut merged).unwrap(), []);
        assert!(merged[0] < -7e3);
    }

    #[test]
    fn where_nothing_is_too_long_the_bits_are_those_without_clipping() {
        const ELEMENTS: usize = 96 * 64;
        let schema = ParameterSchema::new([("weight".to_owned(), vec![96, 64])]);
        for codec in CUT.into_iter().chain([Codec::LowRank]) {
            let plan = FragmentPlan { index: 0, count: 1, codec, rank: 4 };
            let codec = FragmentCodec::new(plan, 4, &schema, &schema.whole());
            let deltas = deltas_of(&codec, ELEMENTS, 4, 9);
            let all: Vec<(u64, &[u8])> =
                deltas.iter().zip([10, 20, 30, 40]).map(|(delta, tokens)| (tokens, &delta[..])).collect();
            let merged_with = |clip_norm: f64| {
                let mut merged = vec![0.0; ELEMENTS];
                let sync = SyncSection { clip_norm, ..SyncSection::default() };
                let clipped = merge(&sync, &codec, &all, &mut merged).unwrap();
                (merged.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), clipped.len())
            };
            let (unclipped, none) = merged_with(0.0);
            assert_eq!((merged_with(5.0), none), ((unclipped.clone(), 0), 0), "{plan:?}");
            let (clipped, count) = merged_with(0.5);
            assert!(clipped != unclipped && count == 4, "{plan:?}");
        }
    }

    #[test]
    fn a_delta_that_is_none_is_refused_with_and_without_clipping() {
        let good = encoded(&[1.0, 2.0]);
        for (bad, kind) in [
            (encoded(&[f32::NAN, 1.0]), "NaN"),
            (encoded(&[1.0, f32::INFINITY]), "infinity"),
            (encoded(&[1.0]), "short"),
        ] {
            for clip_norm in [0.0, 5.0] {
                let sync = SyncSection { clip_norm, ..SyncSection::default() };
                let all = [(1, &good[..]), (1, &bad[..]), (1, &good[..])];
                let mut merged = [7.0; 2];
                merge(&sync, &uncoded(), &all, &mut merged).unwrap_err();
                assert_eq!(merged, [7.0; 2], "{kind}");
            }
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
