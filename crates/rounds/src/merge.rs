//! The merge: token-weighted mean of the contributors' deltas.
//!
//! D = sum_i (T_i / sum T) * q_i in f32, contributors in ascending order of site id, so that every site computes the
//! same bits. The weight is rounded to f32 once; products and sums are separate roundings (Rust never contracts
//! them into a fused multiply-add).

/// Writes the token-weighted mean of `contributions` (tokens and delta, ascending by site id) to `merged`.
///
/// All deltas are as long as `merged`, and at least one contribution has tokens.
pub fn token_weighted_mean(contributions: &[(u64, &[f32])], merged: &mut [f32]) {
    let tokens_total: u64 = contributions.iter().map(|(tokens, _)| tokens).sum();
    assert!(tokens_total > 0, "a merge needs trained tokens");
    merged.fill(0.0);
    for (tokens, delta) in contributions {
        assert_eq!(delta.len(), merged.len(), "a delta is as long as its fragment");
        let weight = (*tokens as f64 / tokens_total as f64) as f32;
        for (sum, value) in merged.iter_mut().zip(*delta) {
            *sum += weight * value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_tokens() {
        let mut merged = [0.0; 2];
        token_weighted_mean(&[(100, &[8.0, 0.0]), (200, &[0.0, 8.0]), (500, &[0.0, 16.0])], &mut merged);
        assert_eq!(merged, [1.0, 12.0]);
    }
}
