//! [`BurnEngine`]: an inner step is forward and backward over micro-batches, the gradient's norm, one optimiser step.
//!
//! A micro-batch's loss is its summed cross-entropy over the tokens of the WHOLE batch, so that gradients of micro-batches
//! add up to the gradient of the mean loss, also when the last one is smaller. Loss and norm are known to be finite
//! before a parameter is touched, and what a step needs of memory is there: a batch that does not fit changes nothing.

use crate::device::{self, OpenDevice};
use crate::memory::MicroBatch;
use crate::model::{BlockKernels, Llama};
use crate::optimizer::{self, Optimizer};
use crate::{failure, operations, weights};
use base::config::{InnerOptimizer, TrainSection};
use base::{Fragment, ModelShape, NamedTensors, ParameterSchema, TokenBatch};
use burn::tensor::Tensor;
use engine::checks::{TextLimits, check_fragment};
use engine::numerics::Operation;
use engine::{DeviceInfo, Engine, EngineError, EngineState, LossSum, Precision, PrecisionChoice, StepReport};
use std::time::Instant;

/// Relative distance of a product of bf16 matrices from the same in f32 above which a device does not multiply bf16: operands and
/// result are each rounded to 2^-9 = 0.2 %, products of random signs average to less.
const BF16_DISTANCE_MAX: f64 = 0.01;

/// Side of the matrices that are multiplied to see it: several tiles of any matrix unit.
const BF16_TRIAL_SIDE: usize = 64;

/// The native engine.
#[derive(Debug)]
pub struct BurnEngine {
    shape: ModelShape,
    train: TrainSection,
    schema: ParameterSchema,
    model: Llama,
    opened: OpenDevice,
    /// Canonical order, without autodiff.
    parameters: Vec<Tensor<2>>,
    optimizer: Optimizer,
    decayed: Vec<bool>,
    /// Rows of the largest micro-batch that was trained on: it fits.
    rows_trained: u64,
    /// Why parameters and moments are not of one step any more, after a device failed in the middle of one.
    torn: Option<String>,
}

/// Loss, gradients in canonical order, and their global norm.
struct Backpropagated {
    loss_nats: f64,
    gradients: Vec<Tensor<2>>,
    norm: f64,
}

impl BurnEngine {
    /// An engine on `device` that starts from `initial`: `flex` (any CPU, as many threads as rayon's global pool has), or
    /// `wgpu`, `vulkan`, `metal`, `cuda`, `rocm`, each also with an index, as far as this build has them.
    ///
    /// # Errors
    /// A device that does not exist or lacks the precision, tensors that are not those of `shape` or do not fit the device.
    pub fn new(
        shape: &ModelShape,
        train: &TrainSection,
        device: &str,
        precision: PrecisionChoice,
        initial: &NamedTensors,
    ) -> Result<Self, EngineError> {
        let opened = device::open(device)?;
        let precision = opened.precision(precision)?;
        let kernels = match opened.is_flex() && precision == Precision::F32 {
            true => BlockKernels::Fused,
            false => BlockKernels::Composed,
        };
        Self::on(opened, shape, train, precision, initial, kernels)
    }

    /// As [`BurnEngine::new`] in f32, with the implementation of the blocks chosen by hand: for comparing the two.
    ///
    /// # Errors
    /// As [`BurnEngine::new`]; fused blocks on another device than `flex`.
    pub fn with_kernels(
        shape: &ModelShape,
        train: &TrainSection,
        device: &str,
        initial: &NamedTensors,
        kernels: BlockKernels,
    ) -> Result<Self, EngineError> {
        let opened = device::open(device)?;
        if kernels == BlockKernels::Fused && !opened.is_flex() {
            let reason = "fused blocks are for flex".to_owned();
            return Err(EngineError::Device { device: opened.info.engine, reason });
        }
        Self::on(opened, shape, train, Precision::F32, initial, kernels)
    }

    fn on(
        mut opened: OpenDevice,
        shape: &ModelShape,
        train: &TrainSection,
        precision: Precision,
        initial: &NamedTensors,
        kernels: BlockKernels,
    ) -> Result<Self, EngineError> {
        shape
            .validate()
            .map_err(|error| EngineError::Shape { what: "model shape".to_owned(), reason: error.to_string() })?;
        let schema = ParameterSchema::llama(shape);
        let parameters = on_device(&opened, || {
            if precision == Precision::Bf16 {
                check_bf16(&opened)?;
            }
            let parameters = weights::from_named(&schema, initial, &opened.device)?;
            sync(&opened).map(|()| parameters)
        })?;
        opened.info.precision = precision;
        Ok(Self {
            shape: shape.clone(),
            train: train.clone(),
            decayed: schema.parameters().iter().map(weights::is_decayed).collect(),
            model: Llama::new(shape.clone(), kernels, precision, opened.device.clone()),
            schema,
            opened,
            parameters,
            optimizer: Optimizer::new(kernels),
            rows_trained: 0,
            torn: None,
        })
    }

    /// Runs `call` so that failures of the device are errors, and frees what a failed call left behind.
    fn on_device<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T, EngineError>) -> Result<T, EngineError> {
        if let Some(reason) = &self.torn {
            let reason = format!("{reason}; restore a saved state to go on");
            return Err(EngineError::Device { device: self.opened.info.engine.clone(), reason });
        }
        let opened = self.opened.clone();
        let result = on_device(&opened, || call(self));
        if matches!(result, Err(EngineError::OutOfMemory { .. } | EngineError::Device { .. })) {
            let cleaned = on_device(&opened, || {
                opened.device.memory_cleanup();
                sync(&opened)
            });
            // The first failure is the one to tell; a device that stays broken says so again at the next call.
            drop(cleaned);
        }
        result
    }

    fn device_name(&self) -> &str {
        &self.opened.info.engine
    }

    fn micro_batch(&self, samples: usize, positions: usize, parameter_copies: u64) -> MicroBatch<'_> {
        let (shape, kernels, parameters) = (&self.shape, self.optimizer.kernels, self.schema.elements());
        MicroBatch { shape, kernels, samples, positions, parameter_copies, parameters }
    }

    /// Whether the micro-batches of a training step fit, and the rows of one.
    fn check_training(&self, batch: &TokenBatch) -> Result<u64, EngineError> {
        let samples = self.train.micro_batch_samples.clamp(1, batch.samples);
        let sums = u64::from(samples < batch.samples);
        let is_first = self.train.optimizer == InnerOptimizer::AdamW && self.optimizer.first_moments.is_empty();
        let moments = if is_first { 2 } else { 0 };
        let micro_batch = self.micro_batch(samples, batch.sequence_length, 1 + sums + moments);
        if micro_batch.rows() > self.rows_trained {
            micro_batch.check(&self.opened)?;
        }
        Ok(micro_batch.rows())
    }

    /// Whether a forward pass alone fits.
    fn check_forward(&self, samples: usize, positions: usize) -> Result<(), EngineError> {
        let micro_batch = self.micro_batch(samples, positions, 0);
        if micro_batch.rows() > self.rows_trained { micro_batch.check(&self.opened) } else { Ok(()) }
    }

    /// One optimiser step. A device that fails in the middle of it leaves parameters of two steps: nobody may use them.
    fn update(&mut self, gradients: Vec<Tensor<2>>, learning_rate: f64, scale: f64) -> Result<(), EngineError> {
        self.optimizer.prepare(&self.train, &self.parameters);
        if let Err(error) = sync(&self.opened) {
            self.optimizer.forget_if_unused();
            return Err(error);
        }
        self.torn = Some("the device failed in the middle of an optimiser step".to_owned());
        self.optimizer.step(&self.train, &mut self.parameters, gradients, &self.decayed, learning_rate, scale);
        // Not out of memory any more, which would mean that nothing has changed.
        sync(&self.opened).map_err(|error| EngineError::Device {
            device: self.device_name().to_owned(),
            reason: format!("it failed in the middle of an optimiser step: {error}"),
        })?;
        self.torn = None;
        Ok(())
    }

    fn limits(&self) -> TextLimits {
        TextLimits { vocabulary: Some(self.shape.vocab_size), positions: Some(self.shape.max_position_embeddings) }
    }

    fn backpropagate(&mut self, batch: &TokenBatch) -> Result<Backpropagated, EngineError> {
        let rows = self.check_training(batch)?;
        let tokens = batch.predicted_tokens() as f64;
        let mut losses: Vec<Tensor<1>> = Vec::new();
        let mut gradients: Vec<Tensor<2>> = Vec::new();
        for micro_batch in micro_batches(batch, self.train.micro_batch_samples) {
            let tracked: Vec<Tensor<2>> =
                self.parameters.iter().map(|parameter| parameter.clone().autodiff().require_grad()).collect();
            let loss_sum = self.loss_sum(&tracked, &micro_batch);
            losses.push(loss_sum.clone().inner());
            let mut found = loss_sum.div_scalar(tokens).backward();
            let of_micro_batch = tracked.iter().map(|parameter| match parameter.grad_remove(&mut found) {
                Some(gradient) => gradient,
                None => parameter.clone().inner().zeros_like(),
            });
            gradients = match gradients.is_empty() {
                true => of_micro_batch.collect(),
                false => gradients.into_iter().zip(of_micro_batch).map(|(sum, gradient)| sum + gradient).collect(),
            };
        }
        // Read only now: the device has been given all its work and does not wait for the host.
        let losses = weights::download(&Tensor::cat(losses, 0), self.device_name())?;
        let loss_nats = losses.into_iter().map(f64::from).sum::<f64>() / tokens;
        check_finite("loss", loss_nats)?;
        let norm = self.optimizer.gradient_norm(&gradients, self.device_name())?;
        check_finite("gradient norm", norm)?;
        self.rows_trained = self.rows_trained.max(rows);
        Ok(Backpropagated { loss_nats, gradients, norm })
    }

    fn loss_sum(&mut self, tensors: &[Tensor<2>], batch: &TokenBatch) -> Tensor<1> {
        let rows = || batch.tokens.chunks_exact(batch.sequence_length + 1);
        let inputs: Vec<u32> = rows().flat_map(|row| &row[..batch.sequence_length]).copied().collect();
        let targets: Vec<u32> = rows().flat_map(|row| &row[1..]).copied().collect();
        self.model.loss_sum(tensors, &inputs, &targets, batch.samples)
    }
}

impl Engine for BurnEngine {
    fn device(&self) -> DeviceInfo {
        self.opened.info.clone()
    }

    fn schema(&self) -> &ParameterSchema {
        &self.schema
    }

    fn inner_step(&mut self, batch: &TokenBatch, learning_rate: f64) -> Result<StepReport, EngineError> {
        let start = Instant::now();
        self.limits().check_batch(batch)?;
        self.on_device(|engine| {
            let Backpropagated { loss_nats, gradients, norm } = engine.backpropagate(batch)?;
            let scale = optimizer::clip_scale(engine.train.gradient_clip_norm, norm);
            engine.update(gradients, learning_rate, scale)?;
            Ok(report(batch, loss_nats, norm, start))
        })
    }

    fn gradient(&mut self, batch: &TokenBatch, gradient: &mut [f32]) -> Result<StepReport, EngineError> {
        let start = Instant::now();
        let whole = self.schema.whole();
        check_fragment(&self.schema, &whole, gradient.len())?;
        self.limits().check_batch(batch)?;
        self.on_device(|engine| {
            let Backpropagated { loss_nats, gradients, norm } = engine.backpropagate(batch)?;
            let how = (engine.optimizer.kernels, engine.device_name());
            weights::read_fragment(&engine.schema, &gradients, &whole, gradient, how)?;
            Ok(report(batch, loss_nats, norm, start))
        })
    }

    fn evaluate(&mut self, batch: &TokenBatch) -> Result<LossSum, EngineError> {
        self.limits().check_batch(batch)?;
        self.check_forward(self.train.micro_batch_samples.clamp(1, batch.samples), batch.sequence_length)?;
        self.on_device(|engine| {
            let parameters = engine.parameters.clone();
            let micro_batches = micro_batches(batch, engine.train.micro_batch_samples);
            let losses: Vec<Tensor<1>> =
                micro_batches.map(|micro_batch| engine.loss_sum(&parameters, &micro_batch)).collect();
            let losses = weights::download(&Tensor::cat(losses, 0), engine.device_name())?;
            Ok(LossSum { nats: losses.into_iter().map(f64::from).sum(), tokens: batch.predicted_tokens() })
        })
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.limits().check_sequence(tokens)?;
        self.check_forward(1, tokens.len())?;
        self.on_device(|engine| {
            let logits = engine.model.logits(&engine.parameters, tokens, 1);
            weights::download(&logits, engine.device_name())
        })
    }

    fn read_fragment(&mut self, fragment: &Fragment, values: &mut [f32]) -> Result<(), EngineError> {
        check_fragment(&self.schema, fragment, values.len())?;
        self.on_device(|engine| {
            let how = (engine.optimizer.kernels, engine.device_name());
            weights::read_fragment(&engine.schema, &engine.parameters, fragment, values, how)
        })
    }

    fn write_fragment(&mut self, fragment: &Fragment, values: &[f32]) -> Result<(), EngineError> {
        check_fragment(&self.schema, fragment, values.len())?;
        self.on_device(|engine| {
            let (schema, device) = (&engine.schema, &engine.opened.device);
            let written = weights::written(schema, &engine.parameters, fragment, values, device, engine.device_name())?;
            sync(&engine.opened)?;
            for (index, tensor) in written {
                engine.parameters[index] = tensor;
            }
            Ok(())
        })
    }

    fn add_to_fragment(&mut self, fragment: &Fragment, change: &[f32]) -> Result<(), EngineError> {
        if self.optimizer.kernels != BlockKernels::Fused {
            return engine::add_on_host(self, fragment, change);
        }
        check_fragment(&self.schema, fragment, change.len())?;
        self.on_device(|engine| {
            weights::add_to_fragment(&engine.schema, &mut engine.parameters, fragment, change);
            Ok(())
        })
    }

    fn save(&mut self) -> Result<EngineState, EngineError> {
        self.on_device(|engine| {
            let named = |tensors: &[Tensor<2>]| weights::to_named(&engine.schema, tensors, engine.device_name());
            Ok(EngineState {
                parameters: named(&engine.parameters)?,
                first_moments: named(&engine.optimizer.first_moments)?,
                second_moments: named(&engine.optimizer.second_moments)?,
                optimizer_steps: engine.optimizer.steps,
            })
        })
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        let (parameters, first_moments, second_moments) = on_device(&self.opened, || {
            let upload = |named: &NamedTensors| match named.is_empty() {
                true => Ok(Vec::new()),
                false => weights::from_named(&self.schema, named, &self.opened.device),
            };
            let parameters = weights::from_named(&self.schema, &state.parameters, &self.opened.device)?;
            let moments = (upload(&state.first_moments)?, upload(&state.second_moments)?);
            sync(&self.opened).map(|()| (parameters, moments.0, moments.1))
        })?;
        if first_moments.len() != second_moments.len() {
            let reason = "one of first and second moments is missing".to_owned();
            return Err(EngineError::Shape { what: "optimiser state".to_owned(), reason });
        }
        self.parameters = parameters;
        let Optimizer { kernels, batch_share, .. } = self.optimizer;
        self.optimizer =
            Optimizer { kernels, first_moments, second_moments, steps: state.optimizer_steps, batch_share };
        self.torn = None;
        Ok(())
    }

    fn micro_batch_samples(&self) -> usize {
        self.train.micro_batch_samples
    }

    fn set_micro_batch_samples(&mut self, samples: usize) {
        self.train.micro_batch_samples = samples.max(1);
    }

    fn set_batch_share(&mut self, share: f64) {
        self.optimizer.batch_share = engine::batch_share(share);
    }

    fn is_repeatable(&self) -> bool {
        self.opened.is_flex()
    }

    fn operation(&mut self, operation: &Operation) -> Result<Vec<f32>, EngineError> {
        self.on_device(|engine| {
            let device = engine.device_name().to_owned();
            let result = operations::compute(operation, &engine.opened.device);
            weights::download(&result.map_err(|reason| EngineError::Device { device, reason })?, engine.device_name())
        })
    }
}

/// Runs `call`; panics of accelerators become errors, those of `flex` are our own bugs.
fn on_device<T>(opened: &OpenDevice, call: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    if opened.is_flex() { call() } else { failure::guarded(&opened.info.engine, call) }
}

/// Waits for the device and asks whether all it was given succeeded.
fn sync(opened: &OpenDevice) -> Result<(), EngineError> {
    opened.device.sync().map_err(|error| failure::classify(&opened.info.engine, &error.to_string()))
}

/// Multiplies two bf16 matrices: runtimes list types that drivers then get wrong.
fn check_bf16(opened: &OpenDevice) -> Result<(), EngineError> {
    let trial = |precision| operations::trial_product(BF16_TRIAL_SIDE, precision, &opened.device);
    let found = weights::download(&trial(Precision::Bf16), &opened.info.engine)?;
    let expected = weights::download(&trial(Precision::F32), &opened.info.engine)?;
    let distance = engine::numerics::relative_distance(&found, &expected);
    if distance <= BF16_DISTANCE_MAX {
        return Ok(());
    }
    let reason = format!("a product of bf16 matrices is off by {distance:.1e}; use --precision f32");
    Err(EngineError::Device { device: opened.info.engine.clone(), reason })
}

/// `batch` in parts of at most `samples_max` samples.
fn micro_batches(batch: &TokenBatch, samples_max: usize) -> impl Iterator<Item = TokenBatch> + '_ {
    let size = samples_max.max(1);
    (0..batch.samples).step_by(size).map(move |start| batch.slice(start..batch.samples.min(start + size)))
}

fn check_finite(what: &'static str, value: f64) -> Result<(), EngineError> {
    if value.is_finite() { Ok(()) } else { Err(EngineError::NotFinite { what, value }) }
}

fn report(batch: &TokenBatch, loss_nats: f64, gradient_norm: f64, start: Instant) -> StepReport {
    let seconds = start.elapsed().as_secs_f64();
    StepReport { loss_nats, tokens: batch.predicted_tokens(), gradient_norm, seconds, joules: None }
}
