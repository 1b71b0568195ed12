//! The held-out samples that every figure is measured on.
//!
//! A model's loss and the bigram baseline are comparable only over the same predicted positions and the same
//! bytes; both take them from here. Bits per byte is the figure that does not depend on the tokenizer:
//! summed nats / (ln 2 × UTF-8 bytes of the predicted tokens).

use crate::dataset::{Dataset, DatasetError};
use crate::tokenizer::TextTokenizer;
use base::TokenBatch;

/// Evenly spaced validation samples; the same data set and bound give the same samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidationSet {
    /// Predicted positions in a sample (T).
    pub sequence_length: usize,
    /// T + 1 tokens each; the first is only context.
    pub samples: Vec<Vec<u32>>,
    /// UTF-8 bytes of all predicted tokens; end-of-text tokens are predicted but have none.
    pub bytes: u64,
}

impl ValidationSet {
    /// At most `samples_max` samples, spread over the whole split.
    ///
    /// # Errors
    /// The split has not one sample of that length.
    pub fn select(
        dataset: &Dataset,
        tokenizer: &TextTokenizer,
        sequence_length: usize,
        samples_max: usize,
    ) -> Result<Self, DatasetError> {
        let available = dataset.require_samples(sequence_length)?;
        let count = (samples_max.max(1) as u64).min(available);
        let index = |position: u64| (u128::from(position) * u128::from(available) / u128::from(count)) as u64;
        let sample = |position| {
            let mut tokens = Vec::with_capacity(sequence_length + 1);
            dataset.sample(sequence_length, index(position), &mut tokens);
            tokens
        };
        let samples: Vec<Vec<u32>> = (0..count).map(sample).collect();
        let predicted = samples.iter().flat_map(|sample| &sample[1..]);
        let bytes = predicted.map(|token| tokenizer.token_bytes(*token) as u64).sum();
        Ok(Self { sequence_length, samples, bytes })
    }

    /// Predicted positions of all samples.
    pub fn predicted_tokens(&self) -> u64 {
        (self.samples.len() * self.sequence_length) as u64
    }

    /// The samples as batches of at most `samples_max`, for `Engine::evaluate`.
    pub fn batches(&self, samples_max: usize) -> impl Iterator<Item = TokenBatch> {
        self.samples.chunks(samples_max.max(1)).map(|samples| TokenBatch {
            samples: samples.len(),
            sequence_length: self.sequence_length,
            tokens: samples.concat(),
        })
    }

    /// Bits per byte of a summed loss over exactly these samples.
    pub fn bits_per_byte(&self, nats: f64) -> f64 {
        bits_per_byte(nats, self.bytes)
    }
}

/// Summed cross-entropy in nats over text of `bytes` UTF-8 bytes, in bits per byte. NaN where there are no bytes.
pub fn bits_per_byte(nats: f64, bytes: u64) -> f64 {
    nats / std::f64::consts::LN_2 / bytes as f64
}
