//! The baseline: a bigram model of the same training tokens.
//!
//! A language model that does not beat it has learnt nothing beyond pairs. Smoothing is interpolated
//! Witten-Bell (Witten and Bell 1991, method C; in the form of Chen and Goodman 1998, section 2.4), which has
//! no parameter to tune:
//! ```text
//! p(w | h) = (c(h, w) + t(h) p(w)) / (c(h) + t(h))      t(h) = number of distinct tokens seen after h
//! p(w)     = (c(w) + t / V) / (n + t)                   t    = number of distinct tokens seen, n = all of them
//! ```
//! so that every token has a probability and the probabilities after any token sum to 1.

use crate::dataset::Dataset;
use crate::validation::ValidationSet;
use base::Hint;
use rayon::prelude::*;
use std::ops::Range;

/// Most pairs that a model is fitted on: sorted as 8 bytes each, 256 MiB.
pub const BIGRAM_PAIRS_MAX: u64 = 1 << 25;

/// Where a data set has more, it is taken in blocks of so many pairs, evenly spaced.
const BLOCK_PAIRS: u64 = 1 << 16;

/// Counts of token pairs, sparse.
#[derive(Debug, Clone, PartialEq)]
pub struct BigramModel {
    /// c(w), by token.
    token_counts: Vec<u64>,
    /// n.
    pairs: u64,
    /// t.
    distinct_tokens: u64,
    /// Where the successors of a token begin in the next two, by token; one more at the end.
    row_starts: Vec<u32>,
    /// w, ascending within a row.
    successors: Vec<u32>,
    /// c(h, w).
    successor_counts: Vec<u32>,
    /// c(h), by token.
    row_counts: Vec<u64>,
}

/// What a model reaches on a validation set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BigramScore {
    /// Summed cross-entropy.
    pub nats: f64,
    /// Predicted tokens.
    pub tokens: u64,
    /// The same figure as a trained model's.
    pub bits_per_byte: f64,
}

/// A token that the vocabulary does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("token {token} is outside the vocabulary of {vocabulary_size}")]
pub struct TokenOutsideError {
    /// The token.
    pub token: u32,
    /// Tokens must be below it.
    pub vocabulary_size: usize,
}

impl Hint for TokenOutsideError {
    fn hint(&self) -> Option<String> {
        Some("remove the run's data folder and run `beringia init` (or `beringia join`) again".to_owned())
    }
}

impl BigramModel {
    /// Counts the pairs of consecutive tokens within each stream; pairs beyond [`BIGRAM_PAIRS_MAX`] are not read.
    ///
    /// # Errors
    /// A token that is not below `vocabulary_size`.
    pub fn fit<S: IntoIterator<Item = u32>>(
        vocabulary_size: usize,
        streams: impl IntoIterator<Item = S>,
    ) -> Result<Self, TokenOutsideError> {
        let mut pairs = Vec::new();
        for stream in streams {
            let mut previous = None;
            for token in stream.into_iter() {
                if token as usize >= vocabulary_size {
                    return Err(TokenOutsideError { token, vocabulary_size });
                }
                if pairs.len() as u64 == BIGRAM_PAIRS_MAX {
                    break;
                }
                pairs.extend(previous.map(|previous| u64::from(previous) << 32 | u64::from(token)));
                previous = Some(token);
            }
        }
        pairs.par_sort_unstable();
        Ok(Self::from_sorted_pairs(vocabulary_size, &pairs))
    }

    /// Fits on a split; one with more than [`BIGRAM_PAIRS_MAX`] pairs is sampled evenly.
    ///
    /// # Errors
    /// A token outside the vocabulary, where the data set was opened without verifying it.
    pub fn fit_dataset(dataset: &Dataset) -> Result<Self, TokenOutsideError> {
        let blocks = training_blocks(dataset.tokens());
        Self::fit(dataset.manifest().vocabulary_size as usize, blocks.map(|block| dataset.iter(block)))
    }

    fn from_sorted_pairs(vocabulary_size: usize, pairs: &[u64]) -> Self {
        let mut model = Self {
            token_counts: vec![0; vocabulary_size],
            pairs: pairs.len() as u64,
            distinct_tokens: 0,
            row_starts: vec![0; vocabulary_size + 1],
            successors: Vec::new(),
            successor_counts: Vec::new(),
            row_counts: vec![0; vocabulary_size],
        };
        for equal in pairs.chunk_by(|a, b| a == b) {
            let (previous, next) = ((equal[0] >> 32) as usize, equal[0] as u32);
            model.successors.push(next);
            model.successor_counts.push(equal.len() as u32);
            model.token_counts[next as usize] += equal.len() as u64;
            model.row_counts[previous] += equal.len() as u64;
            model.row_starts[previous + 1] = model.successors.len() as u32;
        }
        // A token without successors has an empty row, which begins where the row before it ends.
        let mut end = 0;
        for start in &mut model.row_starts {
            end = end.max(*start);
            *start = end;
        }
        model.distinct_tokens = model.token_counts.iter().filter(|count| **count > 0).count() as u64;
        model
    }

    /// Pairs that were counted.
    pub fn pairs(&self) -> u64 {
        self.pairs
    }

    /// Distinct pairs that were counted: what the model holds in memory, 8 bytes each.
    pub fn distinct_pairs(&self) -> u64 {
        self.successors.len() as u64
    }

    /// Cross-entropy of `next` after `previous`, nats. Both must be below the vocabulary size.
    pub fn nats(&self, previous: u32, next: u32) -> f64 {
        -self.probability(previous, next).ln()
    }

    fn probability(&self, previous: u32, next: u32) -> f64 {
        let row = self.row_starts[previous as usize] as usize..self.row_starts[previous as usize + 1] as usize;
        if row.is_empty() {
            return self.token_probability(next);
        }
        let distinct = row.len() as f64;
        let found = self.successors[row.clone()].binary_search(&next);
        let count = found.map_or(0.0, |at| f64::from(self.successor_counts[row.start + at]));
        (count + distinct * self.token_probability(next)) / (self.row_counts[previous as usize] as f64 + distinct)
    }

    fn token_probability(&self, token: u32) -> f64 {
        let uniform = 1.0 / self.token_counts.len() as f64;
        if self.pairs == 0 {
            return uniform;
        }
        let (pairs, distinct) = (self.pairs as f64, self.distinct_tokens as f64);
        (self.token_counts[token as usize] as f64 + distinct * uniform) / (pairs + distinct)
    }

    /// The loss over exactly the positions that a model is validated on.
    ///
    /// # Errors
    /// A validation token that is outside the vocabulary.
    pub fn score(&self, validation: &ValidationSet) -> Result<BigramScore, TokenOutsideError> {
        let vocabulary_size = self.token_counts.len();
        let outside = validation.samples.iter().flatten().find(|token| **token as usize >= vocabulary_size);
        if let Some(token) = outside {
            return Err(TokenOutsideError { token: *token, vocabulary_size });
        }
        let sample_nats = |sample: &Vec<u32>| sample.windows(2).map(|pair| self.nats(pair[0], pair[1])).sum::<f64>();
        let nats = validation.samples.iter().map(sample_nats).sum();
        Ok(BigramScore { nats, tokens: validation.predicted_tokens(), bits_per_byte: validation.bits_per_byte(nats) })
    }
}

/// The positions to fit on: all of them, or evenly spaced blocks. A block of n pairs has n + 1 tokens.
fn training_blocks(tokens: u64) -> impl Iterator<Item = Range<u64>> {
    let pairs = tokens.saturating_sub(1);
    let whole = pairs <= BIGRAM_PAIRS_MAX;
    let blocks = if whole { 1 } else { BIGRAM_PAIRS_MAX / BLOCK_PAIRS };
    (0..blocks).map(move |block| {
        let start = (u128::from(block) * u128::from(pairs) / u128::from(blocks)) as u64;
        if whole { 0..tokens } else { start..start + BLOCK_PAIRS + 1 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::random::Random;

    fn fitted(vocabulary_size: usize, tokens: &[u32]) -> BigramModel {
        BigramModel::fit(vocabulary_size, [tokens.iter().copied()]).unwrap()
    }

    #[test]
    fn probabilities_by_hand() {
        // Pairs: 0→1 twice, 1→0, 1→2. n = 4; next tokens 1 (twice), 0, 2; three distinct of V = 4.
        let model = fitted(4, &[0, 1, 0, 1, 2]);
        let unigram = |count: f64| (count + 3.0 / 4.0) / (4.0 + 3.0);
        assert!((model.probability(0, 1) - (2.0 + unigram(2.0)) / 3.0).abs() < 1e-15);
        assert!((model.probability(1, 3) - 2.0 * unigram(0.0) / 4.0).abs() < 1e-15);
        assert!((model.probability(3, 2) - unigram(1.0)).abs() < 1e-15, "after an unseen token: the unigram");
        assert_eq!(model.nats(0, 1), -model.probability(0, 1).ln());
        assert_eq!((model.pairs(), model.distinct_pairs()), (4, 3));
    }

    #[test]
    fn probabilities_sum_to_one() {
        let mut random = Random::new(1, 1);
        let tokens: Vec<u32> = (0..2_000).map(|_| random.next_below(40).min(random.next_below(40)) as u32).collect();
        for model in [fitted(50, &tokens), fitted(50, &tokens[..1]), fitted(50, &[])] {
            for previous in 0..50 {
                let sum: f64 = (0..50).map(|next| model.probability(previous, next)).sum();
                assert!((sum - 1.0).abs() < 1e-12, "after {previous}: {sum}");
            }
        }
    }

    #[test]
    fn streams_are_not_joined_and_bad_tokens_are_refused() {
        let streams: [&[u32]; 2] = [&[0, 1], &[2, 3]];
        let model = BigramModel::fit(4, streams.map(|stream| stream.iter().copied())).unwrap();
        assert_eq!((model.pairs(), model.row_counts[1]), (2, 0));
        let error = BigramModel::fit(4, [[1, 4]]).unwrap_err();
        assert_eq!(error, TokenOutsideError { token: 4, vocabulary_size: 4 });
    }

    #[test]
    fn it_learns_a_markov_chain() {
        // After x comes x + 1 or x + 2 (mod 16), evenly: one bit a token, where the unigram needs four.
        let mut random = Random::new(2, 0);
        let mut tokens = vec![0];
        for _ in 1..20_000 {
            tokens.push((tokens[tokens.len() - 1] + 1 + random.next_below(2) as u32) % 16);
        }
        let model = fitted(16, &tokens[..19_000]);
        let validation = ValidationSet { sequence_length: 999, samples: vec![tokens[19_000..].to_vec()], bytes: 999 };
        let score = model.score(&validation).unwrap();
        assert!((score.bits_per_byte - 1.0).abs() < 0.02, "{score:?}");
        assert_eq!(score.tokens, 999);
    }

    #[test]
    fn long_training_splits_are_sampled_evenly() {
        assert!(training_blocks(1_000).eq(std::iter::once(0..1_000)));
        let tokens = 3 * BIGRAM_PAIRS_MAX + 1;
        let blocks: Vec<_> = training_blocks(tokens).collect();
        assert_eq!(blocks.iter().map(|block| block.end - block.start - 1).sum::<u64>(), BIGRAM_PAIRS_MAX);
        assert!(blocks.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(blocks.last().is_some_and(|last| last.end <= tokens && last.end > tokens - 3 * BLOCK_PAIRS));
    }
}
