//! The merge: token-weighted mean of the contributors' deltas.
//!
//! D = sum_i (T_i / sum T) * decode(q_i) in f32, contributors in ascending order of site id, so that every site computes the
//! same bits. The weight is rounded to f32 once; products and sums are separate roundings (Rust never contracts
//! them into a fused multiply-add).

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
    use crate::plan::FragmentPlan;
    use base::ParameterSchema;
    use base::config::Codec;

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
}
