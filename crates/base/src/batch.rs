//! What an engine is fed.

/// Token sequences of equal length: each sample has `sequence_length + 1` tokens, the inputs and, shifted by
/// one, the targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    /// Number of samples (B).
    pub samples: usize,
    /// Predicted positions in a sample (T).
    pub sequence_length: usize,
    /// B × (T + 1) token ids, row-major.
    pub tokens: Vec<u32>,
}

impl TokenBatch {
    /// Positions that are predicted: B × T.
    pub fn predicted_tokens(&self) -> u64 {
        (self.samples * self.sequence_length) as u64
    }

    /// Samples `range` as a batch of their own: how micro-batches are cut.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        let row = self.sequence_length + 1;
        Self {
            samples: range.len(),
            sequence_length: self.sequence_length,
            tokens: self.tokens[range.start * row..range.end * row].to_vec(),
        }
    }
}
