//! The seam between a site and whatever computes its inner steps.
//!
//! An engine is given batches and a learning rate and changes its own parameters; it knows nothing of rounds,
//! sites or the network. What it exchanges with the host is flat f32 in the order of its
//! [`ParameterSchema`], whatever it computes in.

pub mod conformance;
mod initial;

pub use initial::initial_parameters;

use base::{Fragment, Hint, NamedTensors, ParameterSchema, TokenBatch};

/// What one forward and backward pass over a batch gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Mean cross-entropy, nats per predicted token.
    pub loss_nats: f64,
    /// Predicted tokens.
    pub tokens: u64,
    /// Global gradient norm before clipping.
    pub gradient_norm: f64,
    /// Wall-clock time of the compute.
    pub seconds: f64,
    /// Energy, where the device reports it.
    pub joules: Option<f64>,
}

/// Sum of the loss over some tokens, to be added up over batches.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossSum {
    /// Summed cross-entropy, nats.
    pub nats: f64,
    /// Predicted tokens.
    pub tokens: u64,
}

/// The device an engine computes on.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DeviceInfo {
    /// Engine and device string, for example `flex`.
    pub engine: String,
    /// What the maker calls it.
    pub name: String,
    /// Host threads the engine uses.
    pub threads: usize,
}

/// Everything an engine needs to continue with the same bits: parameters by their Hugging Face names under
/// `parameters`, the optimiser's moments under the same names.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EngineState {
    /// Local parameters.
    pub parameters: NamedTensors,
    /// AdamW first moments; empty for SGD and before the first step.
    pub first_moments: NamedTensors,
    /// AdamW second moments.
    pub second_moments: NamedTensors,
    /// Optimiser steps taken (AdamW's bias correction).
    pub optimizer_steps: u64,
}

/// Why an engine refused or failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A batch, slice or state that does not fit the model.
    #[error("{what} does not fit the model: {reason}")]
    Shape {
        /// `batch`, `fragment`, or a parameter's name.
        what: String,
        /// Expected and found.
        reason: String,
    },
    /// The loss or gradient is not a finite number: the parameters are as they were before the step.
    #[error("the {what} of an inner step is {value}, not a finite number")]
    NotFinite {
        /// `loss` or `gradient norm`
        what: &'static str,
        /// What came out.
        value: f64,
    },
    /// The device cannot be used.
    #[error("device {device}: {reason}")]
    Device {
        /// The device string.
        device: String,
        /// What it said.
        reason: String,
    },
}

impl Hint for EngineError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Shape { .. } => "make sure that the checkpoint and run.toml belong to the same run".to_owned(),
            Self::NotFinite { .. } => {
                "lower [train] learning_rate, then run the same command again: it resumes from the last checkpoint"
                    .to_owned()
            }
            Self::Device { .. } => "use `--engine flex`, which runs on any CPU".to_owned(),
        })
    }
}

/// Computes inner steps. Calls block; a site gives its engine a thread of its own.
pub trait Engine: Send {
    /// The device and how it is used.
    fn device(&self) -> DeviceInfo;

    /// Names, shapes and canonical order of the parameters.
    fn schema(&self) -> &ParameterSchema;

    /// One optimiser step on the mean loss of `batch`, accumulated over micro-batches.
    ///
    /// # Errors
    /// A batch that does not fit, or a loss or gradient that is not finite; then nothing has changed.
    fn inner_step(&mut self, batch: &TokenBatch, learning_rate: f64) -> Result<StepReport, EngineError>;

    /// Gradient of the mean loss of `batch` into `gradient` (flat, canonical order), unclipped; parameters and
    /// optimiser stay as they are.
    ///
    /// # Errors
    /// As [`Engine::inner_step`].
    fn gradient(&mut self, batch: &TokenBatch, gradient: &mut [f32]) -> Result<StepReport, EngineError>;

    /// Summed loss of `batch`; changes nothing.
    ///
    /// # Errors
    /// A batch that does not fit.
    fn evaluate(&mut self, batch: &TokenBatch) -> Result<LossSum, EngineError>;

    /// Logits at every position of one sequence: T × V, row-major.
    ///
    /// # Errors
    /// A token outside the vocabulary or a sequence longer than the model's.
    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError>;

    /// Copies the parameters of `fragment` to the host, as f32, in the order of its ranges.
    ///
    /// # Errors
    /// `values` is not as long as the fragment.
    fn read_fragment(&mut self, fragment: &Fragment, values: &mut [f32]) -> Result<(), EngineError>;

    /// Replaces the parameters of `fragment`.
    ///
    /// # Errors
    /// `values` is not as long as the fragment.
    fn write_fragment(&mut self, fragment: &Fragment, values: &[f32]) -> Result<(), EngineError>;

    /// Everything needed to continue with the same bits.
    ///
    /// # Errors
    /// The device failed.
    fn save(&mut self) -> Result<EngineState, EngineError>;

    /// Continues from a saved state.
    ///
    /// # Errors
    /// Names or shapes that are not this model's; then nothing has changed.
    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError>;
}
