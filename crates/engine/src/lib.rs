//! The seam between a site and whatever computes its inner steps.
//!
//! An engine is given batches and a learning rate and changes its own parameters; it knows nothing of rounds,
//! sites or the network. What it exchanges with the host is flat f32 in the order of its
//! [`ParameterSchema`], whatever it computes in.

pub mod checks;
pub mod conformance;
mod device;
mod emulated;
mod initial;
pub mod numerics;
mod repeat;

pub use device::{DeviceInfo, DeviceRates, DeviceReport, Precision, PrecisionChoice};
pub use emulated::{EMULATED, EmulatedEngine, STEP_SECONDS, emulated_seconds};
pub use initial::initial_parameters;
pub use repeat::StepBounds;

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
    /// A batch does not fit the device's memory: nothing has changed, and a smaller micro-batch may fit.
    #[error("device {device} is out of memory: {reason}")]
    OutOfMemory {
        /// The device string.
        device: String,
        /// What was asked for, and what it said.
        reason: String,
    },
    /// The engine's process ended or its connection broke; [`Engine::recover`] starts it again.
    #[error("the engine on {device} is gone: {reason}")]
    Lost {
        /// The device string.
        device: String,
        /// How it ended.
        reason: String,
    },
    /// Software that the engine needs is not installed.
    #[error("engine {engine} needs {what}: {reason}")]
    Missing {
        /// The engine that needs it.
        engine: String,
        /// A program or module, with the version that is wanted.
        what: String,
        /// What was found.
        reason: String,
        /// The command that installs it.
        install: String,
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
            Self::Device { .. } => {
                "`beringia devices` lists what this machine has; `--engine flex` runs on any CPU".to_owned()
            }
            Self::OutOfMemory { .. } => {
                "use a smaller model or sequence_length, or a device with more memory".to_owned()
            }
            Self::Lost { .. } => "run the same command again: it resumes from the last checkpoint".to_owned(),
            Self::Missing { install, .. } => format!("install it: `{install}`"),
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

    /// Adds `change` to the parameters of `fragment`, each sum rounded to f32 once.
    ///
    /// # Errors
    /// `change` is not as long as the fragment.
    fn add_to_fragment(&mut self, fragment: &Fragment, change: &[f32]) -> Result<(), EngineError> {
        add_on_host(self, fragment, change)
    }

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

    /// Samples that are computed at once; a larger batch is accumulated.
    fn micro_batch_samples(&self) -> usize;

    /// Changes [`Engine::micro_batch_samples`]: a site does so where memory is short. At least 1.
    fn set_micro_batch_samples(&mut self, samples: usize);

    /// Part of the batch of all sites that the next steps see; 1 at first, and what is no part counts as 1.
    ///
    /// The gradient of a part is noisier than that of the whole, so that AdamW's second moment is larger and its steps are shorter than
    /// those of data parallelism, and averaging parameters does not mend that. With a share s below 1 a step therefore divides by
    /// the root of
    /// ```text
    /// v' = m̂^2 + s * max(v̂ - m̂^2, 0)      rather than v̂
    /// ```
    /// where m̂ and v̂ are the corrected moments: m̂^2 stands for the signal, the rest of v̂ for noise, whose variance goes with
    /// 1 / samples. The moments themselves stay AdamW's.
    fn set_batch_share(&mut self, share: f64);

    /// Whether the same calls from the same state give the same bits, as long as the micro-batch stays.
    fn is_repeatable(&self) -> bool {
        false
    }

    /// One of [`numerics::operations`], in f32 on this engine's device.
    ///
    /// # Errors
    /// An operation that this engine does not have, or the device failed.
    fn operation(&mut self, operation: &numerics::Operation) -> Result<Vec<f32>, EngineError>;

    /// Starts an engine again that answered [`EngineError::Lost`]: parameters and optimiser are those of the last
    /// [`Engine::write_fragment`] of all parameters or [`Engine::restore`], whichever came later.
    ///
    /// # Errors
    /// It cannot be started again.
    fn recover(&mut self) -> Result<(), EngineError> {
        let reason = "it computes in this very process and cannot be started again".to_owned();
        Err(EngineError::Device { device: self.device().engine, reason })
    }

    /// Ends a call that hangs, from another thread: the call then fails with [`EngineError::Lost`]. `None` where only the
    /// end of this process can.
    fn interrupter(&self) -> Option<Interrupter> {
        None
    }
}

/// What [`Engine::set_batch_share`] makes of a number.
pub fn batch_share(share: f64) -> f64 {
    if share > 0.0 && share < 1.0 { share } else { 1.0 }
}

/// [`Engine::add_to_fragment`] for every engine: reads, adds, writes.
///
/// # Errors
/// As there.
pub fn add_on_host<E: Engine + ?Sized>(engine: &mut E, fragment: &Fragment, change: &[f32]) -> Result<(), EngineError> {
    let mut values = vec![0.0; change.len()];
    engine.read_fragment(fragment, &mut values)?;
    values.iter_mut().zip(change).for_each(|(value, change)| *value += change);
    engine.write_fragment(fragment, &values)
}

/// See [`Engine::interrupter`].
pub type Interrupter = Box<dyn Fn() + Send + Sync>;
