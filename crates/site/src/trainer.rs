//! An engine with its data: inner steps on leased samples, deltas, the outer step, validation.
//!
//! Blocking and single-threaded from the outside: the agent gives it a thread of its own. It knows the arithmetic of
//! a round, not who takes part.

use crate::folder::{FolderError, RunFolder};
use crate::state::GlobalState;
use base::config::Strategy;
use base::{Hint, ParameterSchema, RunConfig, TokenBatch};
use data::{BigramModel, Dataset, SampleOrder, Split, TextTokenizer, ValidationSet};
use engine::{Engine, EngineError, LossSum, StepReport};
use rounds::{Assignment, Commit, RoundPlan, SampleRange};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Samples in one validation batch: bounds the memory of the logits.
const VALIDATION_BATCH_SAMPLES: usize = 8;

/// What a trainer can meet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The data holds a token outside the vocabulary.
    #[error("the data is damaged: {0}")]
    Data(String),
}

impl Hint for TrainError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Engine(error) => error.hint(),
            Self::Folder(error) => error.hint(),
            Self::Data(_) => Some("make the data again: `beringia init NEW --data FOLDER`".to_owned()),
        }
    }
}

/// Loss of the global model on the validation split.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean loss, nats a token.
    pub nats_per_token: f64,
    /// Bits a byte of text.
    pub bits_per_byte: f64,
    /// Of a bigram model of the training tokens, on the same text.
    pub bigram_bits_per_byte: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Time it took.
    pub seconds: f64,
}

/// A finished assignment.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// What the site offers to the merge: global minus local parameters, or the gradient where the strategy is `synchronous`.
    pub delta: Vec<f32>,
    /// Tokens trained on.
    pub tokens: u64,
    /// Mean loss, nats a token.
    pub loss_nats: f64,
    /// Time in inner steps, artificial delay included.
    pub compute_seconds: f64,
}

/// One inner step, for reports.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepDone {
    /// Inner steps of the run, this one included.
    pub step: u64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// What the engine says.
    pub report: StepReport,
    /// Time of the step, artificial delay included.
    pub seconds: f64,
}

/// An engine, its data and its settings.
pub struct Trainer {
    config: RunConfig,
    engine: Box<dyn Engine>,
    schema: ParameterSchema,
    train: Dataset,
    order: SampleOrder,
    validation: ValidationSet,
    tokenizer: TextTokenizer,
    bigram_bits_per_byte: Option<f64>,
    slowdown: f64,
}

impl Trainer {
    /// Joins an engine to the data of a run. `slowdown` of 2 makes every inner step take twice its time.
    ///
    /// # Errors
    /// The data is missing, damaged or of another vocabulary.
    pub fn new(
        folder: &RunFolder,
        config: &RunConfig,
        engine: Box<dyn Engine>,
        slowdown: f64,
    ) -> Result<Self, TrainError> {
        let train = folder.dataset(config, Split::Train, false)?;
        let held_out = folder.dataset(config, Split::Validation, false)?;
        let tokenizer = held_out.tokenizer(&folder.data()).map_err(FolderError::from)?;
        let (length, samples_max) = (config.data.sequence_length, config.evaluate.samples_max);
        let validation =
            ValidationSet::select(&held_out, &tokenizer, length, samples_max).map_err(FolderError::from)?;
        Ok(Self {
            schema: engine.schema().clone(),
            order: SampleOrder::new(config.run.seed, train.samples(length)),
            config: config.clone(),
            engine,
            train,
            validation,
            tokenizer,
            bigram_bits_per_byte: None,
            slowdown,
        })
    }

    /// Names and order of the parameters.
    pub fn schema(&self) -> &ParameterSchema {
        &self.schema
    }

    /// The engine.
    pub fn engine(&mut self) -> &mut dyn Engine {
        self.engine.as_mut()
    }

    /// The tokenizer of the run.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// The engine and the tokenizer, for sampling.
    pub fn engine_and_tokenizer(&mut self) -> (&mut dyn Engine, &TextTokenizer) {
        (self.engine.as_mut(), &self.tokenizer)
    }

    /// The samples at some positions of the run's order, as one batch.
    pub fn batch(&self, positions: impl IntoIterator<Item = u64>) -> TokenBatch {
        let sequence_length = self.config.data.sequence_length;
        let (mut tokens, mut samples) = (Vec::new(), 0);
        for position in positions {
            self.train.sample(sequence_length, self.order.sample_at(position), &mut tokens);
            samples += 1;
        }
        TokenBatch { samples, sequence_length, tokens }
    }

    /// One inner step on `batch` as step `step` of the run (the first is 0).
    ///
    /// # Errors
    /// The engine refused the batch or met a number that is not finite.
    pub fn step(&mut self, step: u64, batch: &TokenBatch) -> Result<StepDone, TrainError> {
        let began = Instant::now();
        let learning_rate = self.config.train.learning_rate_at(step);
        let report = self.engine.inner_step(batch, learning_rate)?;
        self.slow_down(began);
        Ok(StepDone { step: step + 1, learning_rate, report, seconds: began.elapsed().as_secs_f64() })
    }

    fn slow_down(&self, began: Instant) {
        if self.slowdown > 1.0 {
            std::thread::sleep(began.elapsed().mul_f64(self.slowdown - 1.0));
        }
    }

    /// Training tokens a second of this engine alone, at `samples_per_step` samples a step: steps for at least
    /// `seconds` after one to warm up. Parameters and optimiser are put back as they were.
    ///
    /// # Errors
    /// The engine failed.
    pub fn measure(&mut self, samples_per_step: u64, seconds: f64) -> Result<f64, TrainError> {
        let before = self.engine.save()?;
        let batch = self.batch(0..samples_per_step);
        self.engine.inner_step(&batch, 0.0)?;
        let (began, mut steps) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs_f64(seconds) || steps < 2 {
            let step_began = Instant::now();
            self.engine.inner_step(&batch, 0.0)?;
            self.slow_down(step_began);
            steps += 1;
        }
        let tokens = (steps * batch.predicted_tokens()) as f64;
        let tokens_per_second = tokens / began.elapsed().as_secs_f64();
        self.engine.restore(&before)?;
        Ok(tokens_per_second)
    }

    /// Runs an assignment from the global parameters. Gives `None` if `abandon` was set meanwhile.
    ///
    /// # Errors
    /// The engine failed.
    pub fn train(
        &mut self,
        plan: &RoundPlan,
        assignment: &Assignment,
        global: &[f32],
        abandon: &AtomicBool,
        on_step: &mut dyn FnMut(&StepDone),
    ) -> Result<Option<Trained>, TrainError> {
        self.engine.write_fragment(&self.schema.whole(), global)?;
        let mut delta = vec![0.0; self.schema.elements()];
        let mut positions = assignment.lease.iter().flat_map(|SampleRange { start, end }| *start..*end);
        let (mut sum, mut compute_seconds) = (LossSum::default(), 0.0);
        for index in 0..assignment.steps {
            if abandon.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let batch = self.batch(positions.by_ref().take(assignment.step_samples(index) as usize));
            let done = match self.config.sync.strategy {
                Strategy::DiLoCo => self.step(plan.first_step + index, &batch)?,
                Strategy::Synchronous => self.gradient(plan.first_step + index, &batch, &mut delta)?,
            };
            sum.nats += done.report.loss_nats * done.report.tokens as f64;
            sum.tokens += done.report.tokens;
            compute_seconds += done.seconds;
            on_step(&done);
        }
        if self.config.sync.strategy == Strategy::DiLoCo {
            self.engine.read_fragment(&self.schema.whole(), &mut delta)?;
            for (local, global) in delta.iter_mut().zip(global) {
                *local = global - *local;
            }
        }
        let loss_nats = sum.nats / sum.tokens.max(1) as f64;
        Ok(Some(Trained { delta, tokens: sum.tokens, loss_nats, compute_seconds }))
    }

    fn gradient(&mut self, step: u64, batch: &TokenBatch, gradient: &mut [f32]) -> Result<StepDone, TrainError> {
        let began = Instant::now();
        let report = self.engine.gradient(batch, gradient)?;
        self.slow_down(began);
        let learning_rate = self.config.train.learning_rate_at(step);
        Ok(StepDone { step: step + 1, learning_rate, report, seconds: began.elapsed().as_secs_f64() })
    }

    /// Merges the contributors' deltas (tokens and delta, ascending by site), takes the outer step and gives the engine the
    /// new global parameters.
    ///
    /// # Errors
    /// The engine failed.
    pub fn apply(
        &mut self,
        commit: &Commit,
        deltas: &[(u64, &[f32])],
        global: &mut GlobalState,
    ) -> Result<(), TrainError> {
        let mut merged = vec![0.0; self.schema.elements()];
        rounds::token_weighted_mean(deltas, &mut merged);
        global.outer.step(commit.round.0 - 1, &mut global.parameters, &mut merged);
        global.commit = commit.clone();
        self.engine.write_fragment(&self.schema.whole(), &global.parameters)?;
        Ok(())
    }

    /// Loss of the engine's parameters on the validation split, beside a bigram model's.
    ///
    /// # Errors
    /// The engine failed.
    pub fn evaluate(&mut self) -> Result<Evaluation, TrainError> {
        let bigram_bits_per_byte = match self.bigram_bits_per_byte {
            Some(known) => known,
            None => self.fit_bigram()?,
        };
        let began = Instant::now();
        let mut sum = LossSum::default();
        for batch in self.validation.batches(VALIDATION_BATCH_SAMPLES) {
            let part = self.engine.evaluate(&batch)?;
            sum.nats += part.nats;
            sum.tokens += part.tokens;
        }
        Ok(Evaluation {
            nats_per_token: sum.nats / sum.tokens as f64,
            bits_per_byte: self.validation.bits_per_byte(sum.nats),
            bigram_bits_per_byte,
            tokens: sum.tokens,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    fn fit_bigram(&mut self) -> Result<f64, TrainError> {
        let damaged = |error: &dyn std::error::Error| TrainError::Data(error.to_string());
        let model = BigramModel::fit_dataset(&self.train).map_err(|error| damaged(&error))?;
        let score = model.score(&self.validation).map_err(|error| damaged(&error))?;
        self.bigram_bits_per_byte = Some(score.bits_per_byte);
        Ok(score.bits_per_byte)
    }
}
