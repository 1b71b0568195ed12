//! [`BurnEngine`]: an inner step is forward and backward over micro-batches, the gradient's norm, one optimiser step.
//!
//! A micro-batch's loss is its summed cross-entropy over the tokens of the WHOLE batch, so that gradients of micro-batches
//! add up to the gradient of the mean loss, also when the last one is smaller. Loss and norm are known to be finite
//! before a parameter is touched.

use crate::model::{BlockKernels, Llama};
use crate::optimizer::{self, Optimizer};
use crate::weights;
use base::config::TrainSection;
use base::{Fragment, ModelShape, NamedTensors, ParameterSchema, TokenBatch};
use burn::tensor::{Device, Tensor};
use engine::numerics::Operation;
use engine::{DeviceInfo, Engine, EngineError, EngineState, LossSum, Precision, StepReport};
use std::time::Instant;

/// The native engine.
#[derive(Debug)]
pub struct BurnEngine {
    shape: ModelShape,
    train: TrainSection,
    schema: ParameterSchema,
    model: Llama,
    device: Device,
    device_name: String,
    /// Canonical order, without autodiff.
    parameters: Vec<Tensor<2>>,
    optimizer: Optimizer,
    decayed: Vec<bool>,
}

/// Loss, gradients in canonical order, and their global norm.
struct Backpropagated {
    loss_nats: f64,
    gradients: Vec<Tensor<2>>,
    norm: f64,
}

impl BurnEngine {
    /// An engine on `device` (`flex`: any CPU, as many threads as rayon's global pool has) that starts from `initial`.
    ///
    /// # Errors
    /// A device that does not exist, or tensors that are not those of `shape`.
    pub fn new(
        shape: &ModelShape,
        train: &TrainSection,
        device: &str,
        initial: &NamedTensors,
    ) -> Result<Self, EngineError> {
        Self::with_kernels(shape, train, device, initial, BlockKernels::Fused)
    }

    /// As [`BurnEngine::new`], with the implementation of the blocks chosen by hand: for comparing the two.
    ///
    /// # Errors
    /// As [`BurnEngine::new`].
    pub fn with_kernels(
        shape: &ModelShape,
        train: &TrainSection,
        device: &str,
        initial: &NamedTensors,
        kernels: BlockKernels,
    ) -> Result<Self, EngineError> {
        let burn_device = open_device(device)?;
        shape
            .validate()
            .map_err(|error| EngineError::Shape { what: "model shape".to_owned(), reason: error.to_string() })?;
        let schema = ParameterSchema::llama(shape);
        let parameters = weights::from_named(&schema, initial, &burn_device)?;
        Ok(Self {
            shape: shape.clone(),
            train: train.clone(),
            decayed: schema.parameters().iter().map(weights::is_decayed).collect(),
            model: Llama::new(shape.clone(), kernels, burn_device.clone()),
            schema,
            device: burn_device,
            device_name: device.to_owned(),
            parameters,
            optimizer: Optimizer::new(kernels),
        })
    }

    fn check_batch(&self, batch: &TokenBatch) -> Result<(), EngineError> {
        let refuse = |reason: String| Err(EngineError::Shape { what: "batch".to_owned(), reason });
        let (samples, positions) = (batch.samples, batch.sequence_length);
        if samples == 0 || positions == 0 {
            return refuse(format!("{samples} samples of {positions} tokens hold nothing to predict"));
        }
        if positions > self.shape.max_position_embeddings {
            return refuse(format!("{positions} positions, the model has {}", self.shape.max_position_embeddings));
        }
        let expected = samples.checked_mul(positions + 1);
        if expected != Some(batch.tokens.len()) {
            return refuse(format!("{} tokens for {samples} samples of {positions} + 1", batch.tokens.len()));
        }
        self.check_tokens("batch", &batch.tokens)
    }

    fn check_tokens(&self, what: &str, tokens: &[u32]) -> Result<(), EngineError> {
        match tokens.iter().position(|token| *token as usize >= self.shape.vocab_size) {
            None => Ok(()),
            Some(index) => Err(EngineError::Shape {
                what: what.to_owned(),
                reason: format!("token {} at {index}, the vocabulary has {}", tokens[index], self.shape.vocab_size),
            }),
        }
    }

    fn backpropagate(&mut self, batch: &TokenBatch) -> Result<Backpropagated, EngineError> {
        let tokens = batch.predicted_tokens() as f64;
        let mut loss_nats = 0.0;
        let mut gradients: Vec<Tensor<2>> = Vec::new();
        for micro_batch in micro_batches(batch, self.train.micro_batch_samples) {
            let tracked: Vec<Tensor<2>> =
                self.parameters.iter().map(|parameter| parameter.clone().autodiff().require_grad()).collect();
            let loss_sum = self.loss_sum(&tracked, &micro_batch);
            let nats = scalar(loss_sum.clone().inner(), &self.device_name)?;
            check_finite("loss", nats)?;
            loss_nats += nats / tokens;
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
        let norm = self.optimizer.gradient_norm(&gradients);
        check_finite("gradient norm", norm)?;
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
        DeviceInfo {
            engine: self.device_name.clone(),
            name: processor_name(),
            maker: String::new(),
            driver: String::new(),
            memory_bytes: None,
            threads: rayon::current_num_threads(),
            precision: Precision::F32,
        }
    }

    fn schema(&self) -> &ParameterSchema {
        &self.schema
    }

    fn inner_step(&mut self, batch: &TokenBatch, learning_rate: f64) -> Result<StepReport, EngineError> {
        let start = Instant::now();
        self.check_batch(batch)?;
        let Backpropagated { loss_nats, gradients, norm } = self.backpropagate(batch)?;
        let scale = optimizer::clip_scale(self.train.gradient_clip_norm, norm);
        self.optimizer.step(&self.train, &mut self.parameters, gradients, &self.decayed, learning_rate, scale);
        Ok(report(batch, loss_nats, norm, start))
    }

    fn gradient(&mut self, batch: &TokenBatch, gradient: &mut [f32]) -> Result<StepReport, EngineError> {
        let start = Instant::now();
        let whole = self.schema.whole();
        weights::check_fragment(&self.schema, &whole, gradient.len())?;
        self.check_batch(batch)?;
        let Backpropagated { loss_nats, gradients, norm } = self.backpropagate(batch)?;
        weights::read_fragment(&self.schema, &gradients, &whole, gradient, &self.device_name)?;
        Ok(report(batch, loss_nats, norm, start))
    }

    fn evaluate(&mut self, batch: &TokenBatch) -> Result<LossSum, EngineError> {
        self.check_batch(batch)?;
        let mut sum = LossSum::default();
        let parameters = self.parameters.clone();
        for micro_batch in micro_batches(batch, self.train.micro_batch_samples) {
            sum.nats += scalar(self.loss_sum(&parameters, &micro_batch), &self.device_name)?;
            sum.tokens += micro_batch.predicted_tokens();
        }
        Ok(sum)
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let positions_max = self.shape.max_position_embeddings;
        if tokens.is_empty() || tokens.len() > positions_max {
            let reason = format!("{} tokens, the model takes 1 to {positions_max}", tokens.len());
            return Err(EngineError::Shape { what: "sequence".to_owned(), reason });
        }
        self.check_tokens("sequence", tokens)?;
        let logits = self.model.logits(&self.parameters, tokens, 1);
        weights::download(&logits, &self.device_name)
    }

    fn read_fragment(&mut self, fragment: &Fragment, values: &mut [f32]) -> Result<(), EngineError> {
        weights::check_fragment(&self.schema, fragment, values.len())?;
        weights::read_fragment(&self.schema, &self.parameters, fragment, values, &self.device_name)
    }

    fn write_fragment(&mut self, fragment: &Fragment, values: &[f32]) -> Result<(), EngineError> {
        weights::check_fragment(&self.schema, fragment, values.len())?;
        let (schema, parameters) = (&self.schema, &mut self.parameters);
        weights::write_fragment(schema, parameters, fragment, values, &self.device, &self.device_name)
    }

    fn save(&mut self) -> Result<EngineState, EngineError> {
        let named = |tensors: &[Tensor<2>]| weights::to_named(&self.schema, tensors, &self.device_name);
        Ok(EngineState {
            parameters: named(&self.parameters)?,
            first_moments: named(&self.optimizer.first_moments)?,
            second_moments: named(&self.optimizer.second_moments)?,
            optimizer_steps: self.optimizer.steps,
        })
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        let upload = |named: &NamedTensors| match named.is_empty() {
            true => Ok(Vec::new()),
            false => weights::from_named(&self.schema, named, &self.device),
        };
        let parameters = weights::from_named(&self.schema, &state.parameters, &self.device)?;
        let (first_moments, second_moments) = (upload(&state.first_moments)?, upload(&state.second_moments)?);
        if first_moments.len() != second_moments.len() {
            let reason = "one of first and second moments is missing".to_owned();
            return Err(EngineError::Shape { what: "optimiser state".to_owned(), reason });
        }
        self.parameters = parameters;
        let kernels = self.optimizer.kernels;
        self.optimizer = Optimizer { kernels, first_moments, second_moments, steps: state.optimizer_steps };
        Ok(())
    }

    fn micro_batch_samples(&self) -> usize {
        self.train.micro_batch_samples
    }

    fn set_micro_batch_samples(&mut self, samples: usize) {
        self.train.micro_batch_samples = samples.max(1);
    }

    fn operation(&mut self, operation: &Operation) -> Result<Vec<f32>, EngineError> {
        let reason = format!("operation {} is not built", operation.name);
        Err(EngineError::Device { device: self.device_name.clone(), reason })
    }
}

fn open_device(name: &str) -> Result<Device, EngineError> {
    match name {
        "flex" => Ok(Device::flex()),
        _ => Err(EngineError::Device {
            device: name.to_owned(),
            reason: "is not a device of this build, which has: flex".to_owned(),
        }),
    }
}

/// `batch` in parts of at most `samples_max` samples.
fn micro_batches(batch: &TokenBatch, samples_max: usize) -> impl Iterator<Item = TokenBatch> + '_ {
    let size = samples_max.max(1);
    (0..batch.samples).step_by(size).map(move |start| batch.slice(start..batch.samples.min(start + size)))
}

fn check_finite(what: &'static str, value: f64) -> Result<(), EngineError> {
    if value.is_finite() { Ok(()) } else { Err(EngineError::NotFinite { what, value }) }
}

/// The one element of a tensor.
fn scalar(tensor: Tensor<1>, device_name: &str) -> Result<f64, EngineError> {
    Ok(f64::from(weights::download(&tensor.unsqueeze(), device_name)?[0]))
}

fn report(batch: &TokenBatch, loss_nats: f64, gradient_norm: f64, start: Instant) -> StepReport {
    let seconds = start.elapsed().as_secs_f64();
    StepReport { loss_nats, tokens: batch.predicted_tokens(), gradient_norm, seconds, joules: None }
}

/// What the maker calls the processor, where the system tells; otherwise its architecture.
fn processor_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}
