//! How a model is laid over devices: degrees of parallelism, batches, recomputation, and what the software can do.

/// What is computed again in the backward pass instead of being kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    None,
    /// The inside of attention (arXiv 2205.05198).
    Selective,
    /// Every layer from its input.
    Full,
}

/// Generation of the training software, which decides how attention is computed and how good its kernels are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stack {
    /// Megatron-LM and DeepSpeed of 2020 to 2022: attention in several kernels, libraries of that time.
    Classic,
    /// Fused (flash) attention, libraries of 2023 and later.
    Modern,
}

/// Which communication the software hides behind computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// None.
    None,
    /// Gradients and sharded parameters.
    Data,
    /// That, tensor-parallel collectives and pipeline transfers (MegaScale, arXiv 2402.15627; FLUX; NeMo's user buffers).
    Full,
}

/// Degrees of parallelism and batches of one site.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// Tensor parallelism.
    pub tp: f64,
    /// Pipeline stages.
    pub pp: f64,
    /// Data parallelism.
    pub dp: f64,
    /// Context parallelism: parts of one sequence.
    pub cp: f64,
    /// Expert parallelism, within data parallelism.
    pub ep: f64,
    /// ZeRO stage; 3 is FSDP's full sharding.
    pub zero: u8,
    /// Sequences of one micro-batch on one data-parallel rank.
    pub micro_batch: f64,
    /// Sequences of a step.
    pub global_batch: f64,
    /// Model chunks of a device in an interleaved pipeline; 1 is plain 1F1B.
    pub interleave: f64,
    /// What is recomputed.
    pub recompute: Recompute,
    /// Generation of the software.
    pub stack: Stack,
    /// What it hides.
    pub overlap: Overlap,
    /// Whether norms and residuals are split along the sequence over the tensor-parallel group (arXiv 2205.05198).
    pub sequence_parallel: bool,
    /// Whether the framework runs a layer's small operations one by one (plain PyTorch modules, as FSDP wraps them) instead of in
    /// fused kernels.
    pub eager: bool,
    /// Whether the host waits for each kernel (`CUDA_LAUNCH_BLOCKING=1`): its time then adds to the device's.
    pub launch_blocking: bool,
}

impl Layout {
    /// Devices that it takes.
    pub fn devices(&self) -> f64 {
        self.tp * self.pp * self.dp * self.cp
    }

    /// Micro-batches of one data-parallel rank in a step.
    pub fn micro_batches(&self) -> f64 {
        (self.global_batch / (self.dp * self.micro_batch)).ceil().max(1.0)
    }

    /// Tokens of one micro-batch on one device.
    pub fn tokens(&self, seq: f64) -> f64 {
        self.micro_batch * seq / self.cp
    }
}

/// Layers of each stage: as even as whole layers allow, the last stage short where they do not come out.
pub fn even_stages(layers: f64, stages: f64) -> Vec<f64> {
    let most = (layers / stages).ceil();
    let count = stages as usize;
    let last = layers - most * (stages - 1.0);
    if last >= 0.0 {
        let mut stages = vec![most; count];
        if let Some(end) = stages.last_mut() {
            *end = last;
        }
        return stages;
    }
    let least = (layers / stages).floor();
    let longer = (layers - least * stages) as usize;
    (0..count).map(|stage| if stage < longer { most } else { least }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_hold_all_layers_and_none_is_negative() {
        for (layers, stages) in [(78.0, 12.0), (96.0, 8.0), (10.0, 8.0), (105.0, 35.0), (3.0, 4.0)] {
            let split = even_stages(layers, stages);
            assert_eq!((split.len() as f64, split.iter().sum::<f64>()), (stages, layers), "{split:?}");
            assert!(split.iter().all(|layers| *layers >= 0.0));
        }
        assert_eq!(even_stages(78.0, 12.0)[10..], [7.0, 1.0]);
    }
}
