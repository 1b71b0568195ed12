//! An engine with its data: inner steps on leased samples, deltas, the outer step, validation.
//!
//! Blocking and single-threaded from the outside: the agent gives it a thread of its own. It knows the arithmetic of
//! a round, not who takes part.

mod recompute;

use crate::folder::{FolderError, RunFolder};
use crate::merger::LocalChange;
use crate::watchdog::{EngineWatch, Watched};
use base::config::Strategy;
use base::{Fragment, Hint, ParameterSchema, RunConfig, TokenBatch};
use data::{BigramModel, Dataset, SampleOrder, Split, TextTokenizer, ValidationSet};
use engine::{Engine, EngineError, LossSum, StepReport};
use rounds::{Assignment, RoundPlan, SampleRange, StepVerdict};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Samples in one validation batch: bounds the memory of the logits.
const VALIDATION_BATCH_SAMPLES: usize = 8;

/// Timed steps of a measurement, however long they take.
const MEASURED_STEPS_MIN: u64 = 2;

/// What a trainer can meet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// An inner step gave a number that is not finite: nothing of it is sent, and the checkpoints are as they were.
    #[error(
        "inner step {step} of the run: the {what} is {value}, not a finite number; nothing of it was sent or saved"
    )]
    NotFinite {
        /// Inner step of the run, from 1.
        step: u64,
        /// `loss`, `gradient norm`, or the parameter whose delta it is.
        what: String,
        /// What came out.
        value: f64,
    },
    /// Not even a single sample fits the device's memory.
    #[error("{device} ({name}) is out of memory with one sample of {sequence_length} tokens: {reason}")]
    OutOfMemory {
        /// The device string.
        device: String,
        /// What the maker calls the device.
        name: String,
        /// Tokens in a sample.
        sequence_length: usize,
        /// What the device said.
        reason: String,
    },
    /// The folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// A delta that was right when it was fetched is not any more.
    #[error("a delta cannot be merged any more: {0}")]
    Merge(formats::DecodeError),
    /// The data holds a token outside the vocabulary.
    #[error("the data is damaged: {0}")]
    Data(String),
}

impl Hint for TrainError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Engine(error) => error.hint(),
            Self::NotFinite { .. } => Some(
                "lower [train] learning_rate, then run the same command again: it resumes from the last checkpoint"
                    .to_owned(),
            ),
            Self::OutOfMemory { sequence_length, .. } => Some(format!(
                "use a device with more memory (`beringia devices`), or make a run with shorter samples: \
                 `beringia init NEW --data FOLDER --set data.sequence_length={}`",
                (sequence_length / 2).max(1)
            )),
            Self::Folder(error) => error.hint(),
            Self::Merge(_) => Some("test this machine's memory, then run the same `beringia join` again".to_owned()),
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

/// What has been trained of a round so far.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Progress {
    /// Loss over all its tokens.
    pub loss: LossSum,
    /// Time in inner steps, artificial delay included.
    pub compute_seconds: f64,
    /// What came of a step that was made twice.
    pub(crate) verdict: Option<StepVerdict>,
    /// The gradient, where the strategy is `synchronous`.
    gradient: Vec<f32>,
}

impl Progress {
    /// What came of a step that was made twice.
    pub fn verdict(&self) -> Option<StepVerdict> {
        self.verdict
    }

    /// Mean loss, nats a token; 0 where nothing was trained.
    pub fn loss_nats(&self) -> f64 {
        self.loss.nats / self.loss.tokens.max(1) as f64
    }
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

/// Samples computed at once were reduced, because the device's memory was too small.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatchReduced {
    /// Before.
    pub from_samples: usize,
    /// From now on.
    pub to_samples: usize,
    /// What the device said.
    pub reason: String,
}

/// An engine, its data and its settings.
pub struct Trainer {
    config: RunConfig,
    engine: Watched,
    watch: Arc<EngineWatch>,
    /// Most samples to be computed at once, as far as the device's memory has shown.
    micro_batch_samples_max: usize,
    reductions: Vec<MicroBatchReduced>,
    schema: ParameterSchema,
    train: Dataset,
    order: SampleOrder,
    validation: ValidationSet,
    tokenizer: TextTokenizer,
    bigram_bits_per_byte: Option<f64>,
    slowdown: f64,
    /// Least time of an inner step on so many samples: what a slowed site takes a multiple of. Of what it waits for a processor that
    /// other sites of a lab have just then, it takes none.
    fastest: BTreeMap<usize, Duration>,
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
        let watch = Arc::new(EngineWatch::default());
        Ok(Self {
            schema: engine.schema().clone(),
            order: SampleOrder::new(config.run.seed, train.samples(length)),
            config: config.clone(),
            engine: Watched::new(engine, Arc::clone(&watch)),
            watch,
            micro_batch_samples_max: usize::MAX,
            reductions: Vec::new(),
            train,
            validation,
            tokenizer,
            bigram_bits_per_byte: None,
            slowdown,
            fastest: BTreeMap::new(),
        })
    }

    /// Names and order of the parameters.
    pub fn schema(&self) -> &ParameterSchema {
        &self.schema
    }

    /// By which factor every inner step takes longer than it must.
    pub fn slowdown(&self) -> f64 {
        self.slowdown
    }

    /// The engine.
    pub fn engine(&mut self) -> &mut dyn Engine {
        &mut self.engine
    }

    /// What the engine is doing, for other threads.
    pub fn watch(&self) -> Arc<EngineWatch> {
        Arc::clone(&self.watch)
    }

    /// Takes the reductions of the micro-batch since the last time: they are to be reported.
    pub fn take_reductions(&mut self) -> Vec<MicroBatchReduced> {
        std::mem::take(&mut self.reductions)
    }

    /// Starts an engine again that was lost, see [`Engine::recover`].
    ///
    /// # Errors
    /// It cannot be started again.
    pub fn recover(&mut self) -> Result<(), TrainError> {
        let micro_batch_samples = self.engine.micro_batch_samples();
        self.engine.recover()?;
        self.engine.set_micro_batch_samples(micro_batch_samples);
        Ok(())
    }

    /// The tokenizer of the run.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// The engine and the tokenizer, for sampling.
    pub fn engine_and_tokenizer(&mut self) -> (&mut dyn Engine, &TextTokenizer) {
        (&mut self.engine, &self.tokenizer)
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
        let learning_rate = self.config.train.learning_rate_at(step);
        self.done(step, batch, |engine| engine.inner_step(batch, learning_rate))
    }

    fn gradient(&mut self, step: u64, batch: &TokenBatch, gradient: &mut [f32]) -> Result<StepDone, TrainError> {
        self.done(step, batch, |engine| engine.gradient(batch, gradient))
    }

    /// Makes step `step` of the run with `call`, and looks at what came out.
    fn done(
        &mut self,
        step: u64,
        batch: &TokenBatch,
        call: impl FnMut(&mut dyn Engine) -> Result<StepReport, EngineError>,
    ) -> Result<StepDone, TrainError> {
        let (number, learning_rate) = (step + 1, self.config.train.learning_rate_at(step));
        self.watch.set_step(number);
        let not_finite = |what: &str, value| TrainError::NotFinite { step: number, what: what.to_owned(), value };
        let (report, seconds) = self.timed(batch.samples, call).map_err(|error| match error {
            TrainError::Engine(EngineError::NotFinite { what, value }) => not_finite(what, value),
            other => other,
        })?;
        // An engine is trusted to refuse such a step itself, and not believed.
        for (what, value) in [("loss", report.loss_nats), ("gradient norm", report.gradient_norm)] {
            if !value.is_finite() {
                return Err(not_finite(what, value));
            }
        }
        Ok(StepDone { step: number, learning_rate, report, seconds })
    }

    /// The result of a call and its time, artificial delay included, tries that did not fit the memory excluded.
    fn timed<T>(
        &mut self,
        samples: usize,
        mut call: impl FnMut(&mut dyn Engine) -> Result<T, EngineError>,
    ) -> Result<(T, f64), TrainError> {
        let mut began = Instant::now();
        let result = self.within_memory(samples, |engine| {
            began = Instant::now();
            call(engine)
        })?;
        if self.slowdown > 1.0 {
            let elapsed = began.elapsed();
            let fastest =
                self.fastest.entry(samples).and_modify(|known| *known = elapsed.min(*known)).or_insert(elapsed);
            std::thread::sleep(fastest.mul_f64(self.slowdown).saturating_sub(elapsed));
        }
        Ok((result, began.elapsed().as_secs_f64()))
    }

    /// Makes a call on `samples` samples, with smaller and smaller micro-batches as long as it does not fit the memory.
    fn within_memory<T>(
        &mut self,
        samples: usize,
        mut call: impl FnMut(&mut dyn Engine) -> Result<T, EngineError>,
    ) -> Result<T, TrainError> {
        loop {
            match call(&mut self.engine) {
                Err(EngineError::OutOfMemory { device, reason }) => {
                    let at_once = self.engine.micro_batch_samples().min(samples).min(self.micro_batch_samples_max);
                    self.halve(at_once, device, reason)?;
                }
                other => return Ok(other?),
            }
        }
    }

    /// `from_samples` at once were too many. An engine that does not obey comes to an end all the same.
    fn halve(&mut self, from_samples: usize, device: String, reason: String) -> Result<(), TrainError> {
        let to_samples = from_samples / 2;
        if to_samples == 0 {
            let (name, sequence_length) = (self.engine.device().name, self.config.data.sequence_length);
            return Err(TrainError::OutOfMemory { device, name, sequence_length, reason });
        }
        self.micro_batch_samples_max = to_samples;
        self.engine.set_micro_batch_samples(to_samples.min(self.engine.micro_batch_samples()));
        self.reductions.push(MicroBatchReduced { from_samples, to_samples, reason });
        Ok(())
    }

    /// Training tokens a second of this engine alone, at `samples_per_step` samples a step: steps for at least
    /// `seconds`, after one of a single sample and one of all to warm up. Parameters and optimiser are put back as they were.
    ///
    /// The single sample comes first so that a slow device shows how slow it is before it is given much; where the memory
    /// does not hold all samples at once, this is where it is found out.
    ///
    /// # Errors
    /// The engine failed.
    pub fn measure(&mut self, samples_per_step: u64, seconds: f64) -> Result<f64, TrainError> {
        let before = self.engine.save()?;
        for samples in [1, samples_per_step] {
            let batch = self.batch(0..samples);
            self.timed(batch.samples, |engine| engine.inner_step(&batch, 0.0))?;
        }
        let batch = self.batch(0..samples_per_step);
        let (mut measured, mut steps) = (0.0, 0);
        while measured < seconds || steps < MEASURED_STEPS_MIN {
            measured += self.timed(batch.samples, |engine| engine.inner_step(&batch, 0.0))?.1;
            steps += 1;
        }
        self.engine.restore(&before)?;
        Ok((steps * batch.predicted_tokens()) as f64 / measured)
    }

    /// Makes some inner steps of an assignment, from the engine's own parameters, and adds them to `progress`. Gives false if
    /// `abandon` was set meanwhile, or a step came out otherwise when it was made again: then the engine is where it was before it.
    ///
    /// # Errors
    /// The engine failed.
    pub fn train(
        &mut self,
        (plan, assignment): (&RoundPlan, &Assignment),
        steps: Range<u64>,
        progress: &mut Progress,
        abandon: &AtomicBool,
        on_step: &mut dyn FnMut(&StepDone),
    ) -> Result<bool, TrainError> {
        self.engine.set_batch_share(if self.config.sync.joint_second_moment { assignment.share } else { 1.0 });
        let before: u64 = (0..steps.start).map(|index| assignment.step_samples(index)).sum();
        let positions = assignment.lease.iter().flat_map(|SampleRange { start, end }| *start..*end);
        let mut positions = positions.skip(before as usize);
        for index in steps {
            if abandon.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let batch = self.batch(positions.by_ref().take(assignment.step_samples(index) as usize));
            let done = self.make_step((plan, assignment), index, &batch, progress)?;
            if progress.verdict.is_some_and(|verdict| verdict.mismatch.is_some()) {
                return Ok(false);
            }
            progress.loss.nats += done.report.loss_nats * done.report.tokens as f64;
            progress.loss.tokens += done.report.tokens;
            progress.compute_seconds += done.seconds;
            on_step(&done);
        }
        Ok(true)
    }

    /// Makes one inner step of an assignment, or the one gradient where the strategy is `synchronous`; twice where the plan says so.
    fn make_step(
        &mut self,
        (plan, assignment): (&RoundPlan, &Assignment),
        index: u64,
        batch: &TokenBatch,
        progress: &mut Progress,
    ) -> Result<StepDone, TrainError> {
        let step = plan.first_step + index;
        let is_checked = recompute::is_checked(plan, assignment, index);
        let is_synchronous = self.config.sync.strategy == Strategy::Synchronous;
        if is_synchronous {
            progress.gradient.resize(self.schema.elements(), 0.0);
        }
        let (done, verdict) = match (is_synchronous, is_checked) {
            (false, false) => (self.step(step, batch)?, None),
            (true, false) => (self.gradient(step, batch, &mut progress.gradient)?, None),
            (false, true) => self.step_twice(step, batch)?,
            (true, true) => self.gradient_twice(step, batch, &mut progress.gradient)?,
        };
        progress.verdict = verdict.or(progress.verdict);
        Ok(done)
    }

    /// What a round has to give for a fragment: the engine's parameters, or their gradient where the strategy is `synchronous`.
    ///
    /// # Errors
    /// The engine failed.
    pub fn snapshot(&mut self, fragment: &Fragment, progress: &mut Progress) -> Result<Vec<f32>, TrainError> {
        if self.config.sync.strategy == Strategy::Synchronous {
            progress.gradient.resize(self.schema.elements(), 0.0);
            return Ok(std::mem::take(&mut progress.gradient));
        }
        let mut values = vec![0.0; fragment.elements()];
        self.engine.read_fragment(fragment, &mut values)?;
        Ok(values)
    }

    /// Takes over what was merged of a fragment. Where local parameters become global ones, `streaming` mixes the two: with the
    /// setting `mixing`, alpha,
    /// ```text
    /// L = (1 - alpha) * L + alpha * G
    /// ```
    ///
    /// # Errors
    /// The engine failed.
    pub fn take_over(&mut self, fragment: &Fragment, local: &LocalChange) -> Result<(), TrainError> {
        let alpha = self.config.sync.mixing as f32;
        match local {
            LocalChange::Add { change, .. } => self.engine.add_to_fragment(fragment, change)?,
            LocalChange::Become(global) if self.config.sync.strategy == Strategy::Streaming && alpha != 1.0 => {
                let mut local = vec![0.0; fragment.elements()];
                self.engine.read_fragment(fragment, &mut local)?;
                local.iter_mut().zip(global).for_each(|(local, global)| *local += alpha * (global - *local));
                self.engine.write_fragment(fragment, &local)?;
            }
            LocalChange::Become(global) => self.engine.write_fragment(fragment, global)?,
        }
        Ok(())
    }

    /// Gives the engine these parameters, flat in canonical order.
    ///
    /// # Errors
    /// The engine failed.
    pub fn write(&mut self, parameters: &[f32]) -> Result<(), TrainError> {
        Ok(self.engine.write_fragment(&self.schema.whole(), parameters)?)
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
        let sum = self.validation_loss()?;
        if !sum.nats.is_finite() {
            let (step, what) = (self.watch.step(), "validation loss".to_owned());
            return Err(TrainError::NotFinite { step, what, value: sum.nats });
        }
        Ok(Evaluation {
            nats_per_token: sum.nats / sum.tokens as f64,
            bits_per_byte: self.validation.bits_per_byte(sum.nats),
            bigram_bits_per_byte,
            tokens: sum.tokens,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    fn validation_loss(&mut self) -> Result<LossSum, TrainError> {
        loop {
            let samples = VALIDATION_BATCH_SAMPLES.min(self.micro_batch_samples_max);
            let batches: Vec<TokenBatch> = self.validation.batches(samples).collect();
            match self.sum_of_losses(&batches) {
                // An engine may not cut what it evaluates into micro-batches: then the batch itself must shrink.
                Err(TrainError::Engine(EngineError::OutOfMemory { device, reason })) => {
                    self.halve(samples, device, reason)?;
                }
                other => return other,
            }
        }
    }

    fn sum_of_losses(&mut self, batches: &[TokenBatch]) -> Result<LossSum, TrainError> {
        let mut sum = LossSum::default();
        for batch in batches {
            let part = self.engine.evaluate(batch)?;
            sum.nats += part.nats;
            sum.tokens += part.tokens;
        }
        Ok(sum)
    }

    fn fit_bigram(&mut self) -> Result<f64, TrainError> {
        let damaged = |error: &dyn std::error::Error| TrainError::Data(error.to_string());
        let model = BigramModel::fit_dataset(&self.train).map_err(|error| damaged(&error))?;
        let score = model.score(&self.validation).map_err(|error| damaged(&error))?;
        self.bigram_bits_per_byte = Some(score.bits_per_byte);
        Ok(score.bits_per_byte)
    }
}
