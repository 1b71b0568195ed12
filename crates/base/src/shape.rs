//! Shape of a Llama-family model, with Hugging Face's configuration names.

use serde::{Deserialize, Serialize};

/// The numbers that fix every tensor's shape and the arithmetic between them. Names are those of
/// `transformers.LlamaConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// Number of tokens the model knows. 0 in a `run.toml` stands for the tokenizer's own size.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the SwiGLU feed-forward.
    pub intermediate_size: usize,
    /// Number of transformer blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Longest sequence the rotary table covers.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square before the root in RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether the output projection is the embedding, transposed.
    pub tie_word_embeddings: bool,
}

/// A shape that no Llama can have.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("[model] {field}: {reason}")]
pub struct ShapeError {
    /// The configuration key at fault.
    pub field: &'static str,
    /// What is wrong with its value.
    pub reason: String,
}

impl ModelShape {
    /// Width of one attention head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Checks what has to do with text, whatever the model: tokens and positions.
    pub fn validate_text_sizes(&self) -> Result<(), ShapeError> {
        check_bounds(&[
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 24),
        ])
    }

    /// Checks what the arithmetic of the model takes for granted. Bounds keep a hostile configuration from
    /// asking for more memory than any machine has (2^40 parameters).
    pub fn validate(&self) -> Result<(), ShapeError> {
        self.validate_text_sizes()?;
        let fail = |field, reason: String| Err(ShapeError { field, reason });
        let bounded = [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 12),
            ("num_attention_heads", self.num_attention_heads, 1 << 14),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 14),
        ];
        check_bounds(&bounded)?;
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let reason = format!("{} heads do not divide hidden_size {}", self.num_attention_heads, self.hidden_size);
            return fail("num_attention_heads", reason);
        }
        if !self.head_size().is_multiple_of(2) {
            return fail(
                "hidden_size",
                format!("the head size {} must be even for rotary embedding", self.head_size()),
            );
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let reason =
                format!("{} does not divide {} query heads", self.num_key_value_heads, self.num_attention_heads);
            return fail("num_key_value_heads", reason);
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return fail("rope_theta", format!("{} must be positive", self.rope_theta));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return fail("rms_norm_eps", format!("{} must be between 0 and 1", self.rms_norm_eps));
        }
        Ok(())
    }
}

/// Each value must be 1 to its maximum.
fn check_bounds(bounded: &[(&'static str, usize, usize)]) -> Result<(), ShapeError> {
    match bounded.iter().find(|(_, value, maximum)| !(1..=*maximum).contains(value)) {
        None => Ok(()),
        Some((field, value, maximum)) => Err(ShapeError { field, reason: format!("{value} is outside 1..={maximum}") }),
    }
}
