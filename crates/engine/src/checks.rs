//! What every engine refuses before it computes anything: batches, sequences and fragments that do not fit the model.

use crate::EngineError;
use base::{Fragment, ParameterSchema, TokenBatch};

/// Tokens that a model knows and positions that it takes; `None` where only the model itself can judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextLimits {
    /// Ids lie below this.
    pub vocabulary: Option<usize>,
    /// Longest sequence.
    pub positions: Option<usize>,
}

impl TextLimits {
    /// Refuses a batch without anything to predict, of other lengths than it says, or outside the limits.
    ///
    /// # Errors
    /// [`EngineError::Shape`] of the `batch`.
    pub fn check_batch(&self, batch: &TokenBatch) -> Result<(), EngineError> {
        let (samples, positions) = (batch.samples, batch.sequence_length);
        if samples == 0 || positions == 0 {
            return refuse("batch", format!("{samples} samples of {positions} tokens hold nothing to predict"));
        }
        if let Some(positions_max) = self.positions.filter(|maximum| positions > *maximum) {
            return refuse("batch", format!("{positions} positions, the model has {positions_max}"));
        }
        let expected = positions.checked_add(1).and_then(|row| samples.checked_mul(row));
        if expected != Some(batch.tokens.len()) {
            return refuse("batch", format!("{} tokens for {samples} samples of {positions} + 1", batch.tokens.len()));
        }
        self.check_tokens("batch", &batch.tokens)
    }

    /// Refuses a sequence that is empty, too long, or holds an unknown token.
    ///
    /// # Errors
    /// [`EngineError::Shape`] of the `sequence`.
    pub fn check_sequence(&self, tokens: &[u32]) -> Result<(), EngineError> {
        let positions_max = self.positions.unwrap_or(usize::MAX);
        if tokens.is_empty() || tokens.len() > positions_max {
            return refuse("sequence", format!("{} tokens, the model takes 1 to {positions_max}", tokens.len()));
        }
        self.check_tokens("sequence", tokens)
    }

    fn check_tokens(&self, what: &str, tokens: &[u32]) -> Result<(), EngineError> {
        // Engines compute with ids as i32.
        let vocabulary = self.vocabulary.unwrap_or(i32::MAX as usize);
        match tokens.iter().position(|token| *token as usize >= vocabulary) {
            None => Ok(()),
            Some(index) => refuse(what, format!("token {} at {index}, the vocabulary has {vocabulary}", tokens[index])),
        }
    }
}

/// Checks that `fragment` lies within the schema and `values` is as long.
///
/// # Errors
/// [`EngineError::Shape`] of the `fragment`.
pub fn check_fragment(schema: &ParameterSchema, fragment: &Fragment, values_length: usize) -> Result<(), EngineError> {
    let mut end = 0;
    for range in &fragment.ranges {
        if range.start < end || range.end < range.start || range.end > schema.elements() {
            let elements = schema.elements();
            return refuse("fragment", format!("range {range:?} is not ascending and disjoint within 0..{elements}"));
        }
        end = range.end;
    }
    if values_length != fragment.elements() {
        return refuse("fragment", format!("{values_length} values for {} elements", fragment.elements()));
    }
    Ok(())
}

fn refuse(what: &str, reason: String) -> Result<(), EngineError> {
    Err(EngineError::Shape { what: what.to_owned(), reason })
}
