//! How much memory a micro-batch takes, before it is taken.
//!
//! A process that asks for more than the host has is ended without a word, and an array longer than a GPU holds in one piece
//! fails in the middle of a step. Both can be known beforehand: [`MicroBatch::check`] adds up what the model keeps for its
//! backward pass. The sum is an estimate (caches, alignment and other programs are not in it); what a GPU has left besides
//! is for its driver to say.

use crate::device::{OpenDevice, memory_available_bytes};
use crate::model::BlockKernels;
use base::ModelShape;
use engine::EngineError;

const FLOAT_BYTES: u64 = 4;

const MEBIBYTE: u64 = 1 << 20;

/// A micro-batch that is about to be computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MicroBatch<'a> {
    pub(crate) shape: &'a ModelShape,
    pub(crate) kernels: BlockKernels,
    pub(crate) samples: usize,
    pub(crate) positions: usize,
    /// Arrays as long as all parameters that are still to be made: gradients, moments. 0 for a forward pass alone.
    pub(crate) parameter_copies: u64,
    /// Elements of all parameters.
    pub(crate) parameters: usize,
}

impl MicroBatch<'_> {
    /// Samples times positions.
    pub(crate) fn rows(&self) -> u64 {
        (self.samples as u64).saturating_mul(self.positions as u64)
    }

    /// # Errors
    /// An array that the device cannot hold in one piece, or more in all than the host has.
    pub(crate) fn check(&self, opened: &OpenDevice) -> Result<(), EngineError> {
        let refuse = |reason: String| {
            let what = format!("{} samples of {} tokens", self.samples, self.positions);
            Err(EngineError::OutOfMemory { device: opened.info.engine.clone(), reason: format!("{what} {reason}") })
        };
        let (name, longest) = self.longest_array();
        if opened.buffer_bytes_max.is_some_and(|bytes_max| longest > bytes_max) {
            let bytes_max = opened.buffer_bytes_max.unwrap_or(0);
            return refuse(format!(
                "have {name} of {}, the device holds at most {} in one piece",
                mebibytes(longest),
                mebibytes(bytes_max)
            ));
        }
        let needed = self.bytes();
        match memory_available_bytes() {
            Some(available) if opened.is_on_host && needed > available => {
                refuse(format!("need about {}, {} are available", mebibytes(needed), mebibytes(available)))
            }
            _ => Ok(()),
        }
    }

    /// The longest array that depends on the micro-batch, and its bytes.
    fn longest_array(&self) -> (&'static str, u64) {
        let columns = [
            ("logits", self.shape.vocab_size),
            ("feed-forward activations", self.shape.intermediate_size),
            ("attention scores", self.score_columns()),
        ];
        let bytes = |columns: usize| self.rows().saturating_mul(columns as u64).saturating_mul(FLOAT_BYTES);
        let arrays = columns.map(|(name, columns)| (name, bytes(columns)));
        arrays.into_iter().max_by_key(|(_, bytes)| *bytes).unwrap_or(("nothing", 0))
    }

    /// Scores that a row keeps; the fused blocks keep none.
    fn score_columns(&self) -> usize {
        match self.kernels {
            BlockKernels::Fused => 0,
            BlockKernels::Composed => self.shape.num_attention_heads * self.positions,
        }
    }

    /// What a step, or a forward pass alone, takes in all.
    fn bytes(&self) -> u64 {
        let layers = if self.parameter_copies == 0 { 1 } else { self.shape.num_hidden_layers as u64 };
        let of_row = layers * self.kept_columns() + self.working_columns();
        let parameters = self.parameter_copies.saturating_mul(self.parameters as u64);
        self.rows().saturating_mul(of_row).saturating_add(parameters).saturating_mul(FLOAT_BYTES)
    }

    /// Floats that a block keeps of a row for the backward pass. Of the fused ones: input, queries, keys, values, mixed values,
    /// middle of the residual stream, gate, up, and three norms. Of the composed ones: what Burn's graph holds, by counting
    /// its operations.
    fn kept_columns(&self) -> u64 {
        let shape = self.shape;
        let (hidden, inner) = (shape.hidden_size as u64, shape.intermediate_size as u64);
        let shared = (2 * shape.num_key_value_heads * shape.head_size()) as u64;
        match self.kernels {
            BlockKernels::Fused => 4 * hidden + shared + 2 * inner + shape.num_attention_heads as u64 + 2,
            BlockKernels::Composed => 12 * hidden + 3 * shared + 5 * inner + 3 * self.score_columns() as u64,
        }
    }

    /// Floats of a row at the head and in the block that is being computed.
    fn working_columns(&self) -> u64 {
        let (hidden, inner) = (self.shape.hidden_size as u64, self.shape.intermediate_size as u64);
        let logits = if self.kernels == BlockKernels::Fused { 1 } else { 3 };
        6 * hidden + 2 * inner + logits * self.shape.vocab_size as u64 + 2 * self.score_columns() as u64
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(MEBIBYTE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;

    /// The model of `docs/engine.md`.
    fn measured_shape() -> ModelShape {
        ModelShape {
            vocab_size: 512,
            hidden_size: 256,
            intermediate_size: 704,
            num_hidden_layers: 6,
            num_attention_heads: 8,
            num_key_value_heads: 8,
            max_position_embeddings: 256,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
        }
    }

    fn micro_batch(shape: &ModelShape, kernels: BlockKernels) -> MicroBatch<'_> {
        MicroBatch { shape, kernels, samples: 8, positions: 256, parameter_copies: 3, parameters: 4_950_000 }
    }

    #[test]
    fn estimates_lie_near_measured_peaks() {
        let shape = measured_shape();
        // docs/engine.md: peaks of 297 and 702 MiB, of which the parameters are 19 MiB and the program some 20.
        for (kernels, measured) in [(BlockKernels::Fused, 297), (BlockKernels::Composed, 702)] {
            let estimated = micro_batch(&shape, kernels).bytes() / MEBIBYTE;
            let of_batch = measured - 40;
            assert!(estimated * 4 > of_batch * 3 && estimated * 3 < of_batch * 4, "{estimated} of {of_batch} MiB");
        }
    }

    #[test]
    fn arrays_longer_than_the_device_holds_are_refused() {
        let shape = measured_shape();
        let batch = micro_batch(&shape, BlockKernels::Composed);
        let mut opened = device::open("flex").unwrap();
        // Scores: 8 samples · 8 heads · 256² · 4 bytes = 16 MiB.
        opened.buffer_bytes_max = Some(16 * MEBIBYTE);
        batch.check(&opened).unwrap();
        opened.buffer_bytes_max = Some(16 * MEBIBYTE - 1);
        let refused = batch.check(&opened).unwrap_err().to_string();
        let expected = "device flex is out of memory: 8 samples of 256 tokens have attention scores of 16 MiB, the device \
                        holds at most 16 MiB in one piece";
        assert_eq!(refused, expected);
    }
}
