//! The engine's thread: jobs in, results out, in order.
//!
//! The agent never waits for the engine, and the engine never waits for the network. The only thing they share is the
//! global state, which the thread changes when it applies a commit.

use crate::alone::{emit_sample, evaluated_event, save_checkpoint, step_event};
use crate::exchange::{SharedState, encode_delta};
use crate::folder::RunFolder;
use crate::state::{Mode, SavedState, TrainingState};
use crate::trainer::{Evaluation, TrainError, Trainer};
use base::{ContentHash, Round, RunConfig, SiteId};
use bytes::Bytes;
use engine::EngineState;
use rounds::{Assignment, Commit, Contribution, RoundPlan};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use telemetry::{Event, Reporter};
use wire::Blob;

/// What the engine's thread is asked to do.
pub(crate) enum Job {
    /// Measure the speed of this engine alone, and the initial loss where `evaluate` says so.
    Prepare { samples_per_step: u64, seconds: f64, evaluate: bool },
    /// Run an assignment.
    Train { plan: RoundPlan, assignment: Assignment, abandon: Arc<AtomicBool> },
    /// Merge, take the outer step; then validate and save where the cadence says so.
    Apply { commit: Commit, deltas: Vec<(u64, Vec<f32>)>, evaluate: bool },
    /// Take over a state that was fetched.
    Install { commit: Commit, bytes: Vec<u8> },
    /// Save, and validate where asked, because the run or this site's part in it ends.
    Finish { evaluate: bool },
}

/// What the engine's thread has done.
pub(crate) enum Done {
    Prepared { tokens_per_second: f64 },
    Trained { round: Round, delta: Bytes, blob: Blob, contribution: Contribution },
    Applied { round: Round, state_hash: ContentHash },
    Installed { round: Round, state_hash: ContentHash },
    InstallFailed,
    Evaluated { round: Round, evaluation: Evaluation },
    Finished,
    Failed(TrainError),
}

/// All that the engine's thread owns.
pub(crate) struct Worker {
    pub(crate) folder: RunFolder,
    pub(crate) config: RunConfig,
    pub(crate) trainer: Trainer,
    pub(crate) site: SiteId,
    pub(crate) state: SharedState,
    pub(crate) saved: SavedState,
    pub(crate) reporter: Arc<Mutex<Reporter>>,
    pub(crate) evaluated: Option<Round>,
    pub(crate) saved_round: Option<Round>,
}

/// Sends results; false when nobody listens any more.
type Answer<'a> = &'a mut dyn FnMut(Done) -> bool;

impl Worker {
    /// Does jobs until there are no more, or the engine fails.
    pub(crate) fn run(mut self, jobs: &std::sync::mpsc::Receiver<Job>, mut answer: impl FnMut(Done) -> bool) {
        while let Ok(job) = jobs.recv() {
            if let Err(error) = self.job(job, &mut answer) {
                answer(Done::Failed(error));
                return;
            }
        }
    }

    fn job(&mut self, job: Job, answer: Answer<'_>) -> Result<(), TrainError> {
        match job {
            Job::Prepare { samples_per_step, seconds, evaluate } => {
                if evaluate {
                    self.evaluate(answer)?;
                }
                let tokens_per_second = self.trainer.measure(samples_per_step, seconds)?;
                answer(Done::Prepared { tokens_per_second });
            }
            Job::Train { plan, assignment, abandon } => self.train(&plan, &assignment, &abandon, answer)?,
            Job::Apply { commit, deltas, evaluate } => self.apply(&commit, &deltas, evaluate, answer)?,
            Job::Install { commit, bytes } => self.install(commit, &bytes, answer)?,
            Job::Finish { evaluate } => {
                self.put_back()?;
                if evaluate {
                    self.evaluate(answer)?;
                }
                self.save()?;
                answer(Done::Finished);
            }
        }
        Ok(())
    }

    fn emit(&self, event: Event) {
        self.reporter.lock().unwrap_or_else(PoisonError::into_inner).emit(event);
    }

    fn train(
        &mut self,
        plan: &RoundPlan,
        assignment: &Assignment,
        abandon: &AtomicBool,
        answer: Answer<'_>,
    ) -> Result<(), TrainError> {
        // A copy, so that a newcomer can fetch the state while this site trains.
        let global = self.state.lock().unwrap_or_else(PoisonError::into_inner).parameters.clone();
        let (site, reporter) = (self.site, Arc::clone(&self.reporter));
        let mut on_step = |done: &_| {
            reporter.lock().unwrap_or_else(PoisonError::into_inner).emit(step_event(site, plan.round, done));
        };
        let Some(trained) = self.trainer.train(plan, assignment, &global, abandon, &mut on_step)? else {
            return Ok(());
        };
        if let Some(value) = trained.delta.iter().find(|value| !value.is_finite()) {
            let value = f64::from(*value);
            return Err(engine::EngineError::NotFinite { what: "delta", value }.into());
        }
        let delta = encode_delta(&trained.delta);
        let blob = Blob::memory(delta.clone());
        let delta_hash = ContentHash::of(&delta);
        let contribution = Contribution {
            tokens: trained.tokens,
            delta_hash,
            delta_bytes: delta.len() as u64,
            loss_nats: trained.loss_nats,
            compute_seconds: trained.compute_seconds,
        };
        answer(Done::Trained { round: plan.round, delta, blob, contribution });
        Ok(())
    }

    fn apply(
        &mut self,
        commit: &Commit,
        deltas: &[(u64, Vec<f32>)],
        evaluate: bool,
        answer: Answer<'_>,
    ) -> Result<(), TrainError> {
        let views: Vec<(u64, &[f32])> = deltas.iter().map(|(tokens, delta)| (*tokens, delta.as_slice())).collect();
        let state_hash = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            self.trainer.apply(commit, &views, &mut state)?;
            state.hash()
        };
        let round = commit.round;
        self.note_state(commit, state_hash);
        self.saved.tokens += commit.contributors.iter().map(|contributor| contributor.tokens).sum::<u64>();
        self.emit(Event::RoundApplied { round, site: self.site, state_hash });
        answer(Done::Applied { round, state_hash });
        if evaluate && round.0.is_multiple_of(self.config.evaluate.every_rounds) {
            self.evaluate(answer)?;
        }
        if round.0.is_multiple_of(self.config.checkpoint.every_rounds) {
            self.save()?;
        }
        Ok(())
    }

    fn note_state(&mut self, commit: &Commit, state_hash: ContentHash) {
        self.saved.commit = commit.clone();
        self.saved.state_hash = state_hash;
        self.saved.step = (commit.round.0 * self.config.steps_per_round()).min(self.config.train.steps);
    }

    fn install(&mut self, commit: Commit, bytes: &[u8], answer: Answer<'_>) -> Result<(), TrainError> {
        let installed = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.decode(commit.clone(), bytes)
        };
        if !installed {
            answer(Done::InstallFailed);
            return Ok(());
        }
        self.put_back()?;
        let state_hash = ContentHash::of(bytes);
        self.note_state(&commit, state_hash);
        // Tokens of earlier rounds are not in the commit; samples tell them.
        self.saved.tokens = commit.cursor * self.config.data.sequence_length as u64;
        answer(Done::Installed { round: commit.round, state_hash });
        Ok(())
    }

    /// Gives the engine the global parameters, whatever it has trained since.
    fn put_back(&mut self) -> Result<(), TrainError> {
        let schema = self.trainer.schema().clone();
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.trainer.engine().write_fragment(&schema.whole(), &state.parameters)?;
        Ok(())
    }

    fn evaluate(&mut self, answer: Answer<'_>) -> Result<(), TrainError> {
        let round = self.saved.commit.round;
        if self.evaluated == Some(round) {
            return Ok(());
        }
        self.evaluated = Some(round);
        let evaluation = self.trainer.evaluate()?;
        self.emit(evaluated_event(round, self.saved.step, &evaluation));
        answer(Done::Evaluated { round, evaluation });
        let reporter = Arc::clone(&self.reporter);
        let mut reporter = reporter.lock().unwrap_or_else(PoisonError::into_inner);
        emit_sample(&mut self.trainer, &self.config, round, &mut reporter)
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let round = self.saved.commit.round;
        if round == Round(0) || self.saved_round == Some(round) {
            return Ok(());
        }
        let EngineState { parameters: _, first_moments, second_moments, optimizer_steps } =
            self.trainer.engine().save()?;
        self.saved.mode = Mode::Sites;
        self.saved.site = Some(self.site);
        self.saved.optimizer_steps = optimizer_steps;
        let inner = EngineState { first_moments, second_moments, optimizer_steps, ..EngineState::default() };
        let global = self.state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let state = TrainingState { global, inner, saved: self.saved.clone() };
        let schema = self.trainer.schema().clone();
        let mut reporter = self.reporter.lock().unwrap_or_else(PoisonError::into_inner);
        // What could not be saved now is tried again at the end.
        if save_checkpoint(&self.folder, &self.config, &state, round, &schema, &mut reporter) {
            self.saved_round = Some(round);
        }
        Ok(())
    }
}
