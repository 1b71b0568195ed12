//! The transformer as a performance model sees it: sizes, parameters, useful floating-point operations.

use crate::units::Flop;

/// Sizes of a decoder-only transformer, dense or mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transformer {
    /// Blocks.
    pub layers: f64,
    /// Width of the residual stream.
    pub hidden: f64,
    /// Width inside the feed-forward (of one expert, where there are experts).
    pub ffn: f64,
    /// Query heads.
    pub heads: f64,
    /// Key and value heads.
    pub kv_heads: f64,
    /// Tokens of the vocabulary.
    pub vocab: f64,
    /// Tokens of a sequence.
    pub seq: f64,
    /// Experts of a layer; 1 is dense.
    pub experts: f64,
    /// Experts that compute each token.
    pub experts_per_token: f64,
    /// Whether the feed-forward has a gate (SwiGLU): three matrices instead of two.
    pub gated: bool,
}

impl Transformer {
    /// Width of keys, and of values.
    pub fn kv_width(&self) -> f64 {
        self.hidden * self.kv_heads / self.heads
    }

    /// Width of one head.
    pub fn head_size(&self) -> f64 {
        self.hidden / self.heads
    }

    /// Matrices of one feed-forward.
    pub fn ffn_matrices(&self) -> f64 {
        if self.gated { 3.0 } else { 2.0 }
    }

    /// Parameters of the attention of one layer: query, key, value, output.
    pub fn attention_parameters(&self) -> f64 {
        2.0 * self.hidden * self.hidden + 2.0 * self.hidden * self.kv_width()
    }

    /// Parameters of one feed-forward, or of one expert.
    pub fn ffn_parameters(&self) -> f64 {
        self.ffn_matrices() * self.hidden * self.ffn
    }

    /// Parameters of one layer that every token meets: attention, router, the two norms, biases (13 h, GPT's; a Llama has 2 h).
    pub fn shared_layer_parameters(&self) -> f64 {
        let router = if self.experts > 1.0 { self.hidden * self.experts } else { 0.0 };
        self.attention_parameters() + router + if self.gated { 2.0 } else { 13.0 } * self.hidden
    }

    /// All parameters of one layer.
    pub fn layer_parameters(&self) -> f64 {
        self.shared_layer_parameters() + self.experts * self.ffn_parameters()
    }

    /// Parameters of the embedding, which the output projection shares.
    pub fn embedding_parameters(&self) -> f64 {
        self.vocab * self.hidden
    }

    /// All parameters, embedding counted once.
    pub fn parameters(&self) -> f64 {
        self.layers * self.layer_parameters() + self.embedding_parameters()
    }

    /// Parameters that multiply each token: those of idle experts do not.
    pub fn active_parameters(&self) -> f64 {
        let layer = self.shared_layer_parameters() + self.experts_per_token.min(self.experts) * self.ffn_parameters();
        self.layers * layer + self.embedding_parameters()
    }

    /// Useful work of training on so many tokens: 6 N for the weights and 12 L h T for attention, causal mask not deducted
    /// (PaLM, arXiv 2204.02311, appendix B). Recomputation is no useful work.
    pub fn training_flop(&self, tokens: f64) -> Flop {
        Flop(tokens * (6.0 * self.active_parameters() + 12.0 * self.layers * self.hidden * self.seq))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama3_8b() -> Transformer {
        Transformer {
            layers: 32.0,
            hidden: 4096.0,
            ffn: 14336.0,
            heads: 32.0,
            kv_heads: 8.0,
            vocab: 128_256.0,
            seq: 8192.0,
            experts: 1.0,
            experts_per_token: 1.0,
            gated: true,
        }
    }

    #[test]
    fn parameters_are_those_of_published_models() {
        // 8,030,261,248 with an output projection of its own and the last norm, which are not counted here.
        let llama = llama3_8b().parameters() + 128_256.0 * 4096.0 + 4096.0;
        assert_eq!(llama, 8_030_261_248.0);
        let mixtral = Transformer { vocab: 32_000.0, experts: 8.0, experts_per_token: 2.0, ..llama3_8b() };
        assert!((mixtral.parameters() / 46.57e9 - 1.0).abs() < 0.01, "{}", mixtral.parameters());
        assert!((mixtral.active_parameters() / 12.75e9 - 1.0).abs() < 0.02, "{}", mixtral.active_parameters());
    }

    #[test]
    fn six_flop_for_each_weight_and_token() {
        let short = Transformer { seq: 0.0, ..llama3_8b() };
        assert_eq!(short.training_flop(2.0).0, 12.0 * short.parameters());
    }
}
