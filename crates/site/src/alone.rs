//! One site without others: `beringia train`.
//!
//! Plain training by inner steps, with the same leases, checkpoints and events as a run of several sites. A checkpoint is
//! numbered by the inner steps behind it. Stopping and resuming gives the same bits as not stopping (invariant I7), because
//! the place in the data is one integer and the optimiser is saved with its step count.

use crate::folder::RunFolder;
use crate::sampling::{SampleOptions, SamplingError, sample_text};
use crate::state::{Mode, TrainingState};
use crate::trainer::{Evaluation, StepDone, TrainError, Trainer};
use base::{Hint, Round, RunConfig, SiteId};
use rounds::{Commit, Ledger, SampleRange};
use std::sync::atomic::{AtomicBool, Ordering};
use telemetry::{Event, Reporter};

/// Samples while training are drawn a little sharper than the model's own distribution, as most tools do.
const SAMPLE_TEMPERATURE: f64 = 0.8;
const SAMPLE_TOP_K: usize = 40;

/// How a training ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Inner steps of the run so far.
    pub step: u64,
    /// Tokens of the run so far.
    pub tokens: u64,
    /// Whether it reached the planned number of steps.
    pub finished: bool,
    /// Last validation, where there was one.
    pub evaluation: Option<Evaluation>,
    /// BLAKE3 of the state.
    pub state_hash: base::ContentHash,
    /// Whether that state is in a checkpoint: a disk that is full does not stop training.
    pub saved: bool,
}

/// Trains from `state` until the configured number of steps, at most up to step `steps_max`, or until `stop` is set.
///
/// # Errors
/// The engine or the data failed; the last checkpoint is as it was.
pub fn train_alone(
    folder: &RunFolder,
    config: &RunConfig,
    trainer: &mut Trainer,
    state: TrainingState,
    steps_max: Option<u64>,
    stop: &AtomicBool,
    reporter: &mut Reporter,
) -> Result<Outcome, TrainError> {
    trainer.engine().restore(&state.inner)?;
    let mut run = Alone { folder, config, trainer, ledger: state.saved.ledger.clone().unwrap_or_default(), state };
    run.state.saved.mode = Mode::Alone;
    let mut evaluation = None;
    if run.state.saved.step == 0 {
        evaluation = Some(run.evaluate(reporter)?);
    }
    let end = steps_max.unwrap_or(u64::MAX).min(config.train.steps);
    while run.state.saved.step < end && !stop.load(Ordering::Relaxed) {
        run.step(reporter)?;
        let step = run.state.saved.step;
        let last = step == config.train.steps;
        let every = |rounds: u64| step.is_multiple_of(rounds * config.steps_per_round());
        if every(config.evaluate.every_rounds) || last {
            evaluation = Some(run.evaluate(reporter)?);
        }
        if every(config.checkpoint.every_rounds) && !last {
            run.save(reporter)?;
        }
    }
    let is_saved = run.save(reporter)?;
    let saved = &run.state.saved;
    let finished = saved.step >= config.train.steps;
    let (step, tokens, state_hash) = (saved.step, saved.tokens, saved.state_hash);
    let outcome = Outcome { step, tokens, finished, evaluation, state_hash, saved: is_saved };
    if finished {
        let verdict = format!("{} steps done", outcome.step);
        let (state_hash, rounds) = (outcome.state_hash, outcome.step / config.steps_per_round());
        reporter.emit(Event::RunFinished { verdict, state_hash, rounds, tokens: outcome.tokens });
    }
    Ok(outcome)
}

struct Alone<'a> {
    folder: &'a RunFolder,
    config: &'a RunConfig,
    trainer: &'a mut Trainer,
    state: TrainingState,
    ledger: Ledger,
}

impl Alone<'_> {
    fn round(&self) -> Round {
        Round(self.state.saved.step / self.config.steps_per_round())
    }

    fn step(&mut self, reporter: &mut Reporter) -> Result<(), TrainError> {
        let step = self.state.saved.step;
        // Alone there is nothing to agree on: each step is its own lease and commit.
        let number = Round(step + 1);
        let lease = self.ledger.lease(number, SiteId(0), self.config.train.batch_samples as u64);
        let batch = self.trainer.batch(lease.iter().flat_map(|SampleRange { start, end }| *start..*end));
        let done = self.trainer.step(step, &batch)?;
        self.ledger.commit(number, SiteId(0));
        self.state.saved.step = done.step;
        self.state.saved.tokens += done.report.tokens;
        reporter.emit(step_event(SiteId(0), self.round(), &done));
        self.reductions().for_each(|event| {
            reporter.emit(event);
        });
        Ok(())
    }

    fn reductions(&mut self) -> impl Iterator<Item = Event> + use<> {
        reduction_events(self.trainer, SiteId(0))
    }

    fn evaluate(&mut self, reporter: &mut Reporter) -> Result<Evaluation, TrainError> {
        let evaluation = self.trainer.evaluate()?;
        let round = self.round();
        reporter.emit(evaluated_event(round, self.state.saved.step, &evaluation));
        for event in sample_event(self.trainer, self.config, round)?.into_iter().chain(self.reductions()) {
            reporter.emit(event);
        }
        Ok(evaluation)
    }

    /// Saves; false where that failed and was reported.
    fn save(&mut self, reporter: &mut Reporter) -> Result<bool, TrainError> {
        let saved_before = self.state.saved.clone();
        self.state.inner = self.trainer.engine().save()?;
        let schema = self.trainer.schema().clone();
        self.trainer.engine().read_fragment(&schema.whole(), &mut self.state.global.parameters)?;
        let step = saved_before.step;
        let (cursor, samples) = (self.ledger.cursor(), self.ledger.totals().committed);
        let commit = Commit { round: Round(step), cursor, step, samples, ..Commit::initial() };
        self.state.global.commit = commit.clone();
        let saved = &mut self.state.saved;
        saved.commit = commit;
        saved.ledger = Some(self.ledger.clone());
        saved.optimizer_steps = self.state.inner.optimizer_steps;
        saved.state_hash = self.state.global.hash();
        if step == 0 {
            return Ok(true);
        }
        let (is_saved, event) = save_checkpoint(self.folder, self.config, &self.state, Round(step), &schema);
        reporter.emit(event);
        Ok(is_saved)
    }
}

/// Saves, and gives what is to be said of it: a disk that is full must not stop training, and a disk that is slow must not
/// hold up who reports. True where the checkpoint is on the disk.
pub(crate) fn save_checkpoint(
    folder: &RunFolder,
    config: &RunConfig,
    state: &TrainingState,
    number: Round,
    schema: &base::ParameterSchema,
) -> (bool, Event) {
    match state.save(&folder.checkpoints(), number, schema, config.checkpoint.keep) {
        Ok(saved) => {
            let path = saved.path.display().to_string();
            (true, Event::CheckpointSaved { round: number, path, bytes: saved.bytes, seconds: saved.seconds })
        }
        Err(error) => {
            let message = format!("no checkpoint was saved, training goes on and the one before stays: {error}");
            (false, Event::Warning { message, hint: error.hint() })
        }
    }
}

pub(crate) fn step_event(site: SiteId, round: Round, done: &StepDone) -> Event {
    Event::Step {
        site,
        round,
        step: done.step,
        loss_nats: done.report.loss_nats,
        learning_rate: done.learning_rate,
        gradient_norm: done.report.gradient_norm,
        tokens: done.report.tokens,
        seconds: done.seconds,
    }
}

pub(crate) fn evaluated_event(round: Round, step: u64, evaluation: &Evaluation) -> Event {
    Event::Evaluated {
        round,
        step,
        nats_per_token: evaluation.nats_per_token,
        bits_per_byte: evaluation.bits_per_byte,
        bigram_bits_per_byte: evaluation.bigram_bits_per_byte,
        tokens: evaluation.tokens,
    }
}

/// Some text from the model, where the run wants samples.
pub(crate) fn sample_event(
    trainer: &mut Trainer,
    config: &RunConfig,
    round: Round,
) -> Result<Option<Event>, TrainError> {
    if config.evaluate.sample_tokens == 0 {
        return Ok(None);
    }
    let (engine, tokenizer) = trainer.engine_and_tokenizer();
    let options = SampleOptions {
        tokens: config.evaluate.sample_tokens,
        temperature: SAMPLE_TEMPERATURE,
        top_k: SAMPLE_TOP_K,
        seed: config.run.seed,
    };
    let (prompt, length) = ([tokenizer.end_of_text()], config.data.sequence_length);
    match sample_text(engine, tokenizer, &prompt, &options, length) {
        Ok(text) => Ok(Some(Event::Sample { round, text })),
        Err(SamplingError::Engine(error)) => Err(error.into()),
        Err(error) => Ok(Some(Event::Warning { message: format!("no sample: {error}"), hint: None })),
    }
}

/// What became of the micro-batch since this was asked last.
pub(crate) fn reduction_events(trainer: &mut Trainer, site: SiteId) -> impl Iterator<Item = Event> + use<> {
    trainer.take_reductions().into_iter().map(move |reduced| Event::MicroBatchReduced {
        site,
        from_samples: reduced.from_samples as u64,
        to_samples: reduced.to_samples as u64,
        reason: reduced.reason,
    })
}
