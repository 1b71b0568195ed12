//! The engine's thread: jobs in, results out, in order.
//!
//! The agent never waits for the engine, and the engine never waits for the network. The only thing they share is the
//! global state, which the thread changes when it applies a commit.
//!
//! An engine that is lost (its process was killed) is started again and given the global parameters, and what it had not
//! finished is done anew ([`Worker::surviving`]). Nothing of a round is sent before all of its steps are done, so that no
//! step counts twice.

use crate::alone::{evaluated_event, reduction_events, sample_event, save_checkpoint, step_event};
use crate::exchange::{SharedState, encode_delta};
use crate::folder::RunFolder;
use crate::state::{GlobalState, Mode, SavedState, TrainingState};
use crate::trainer::{Evaluation, TrainError, Trainer};
use base::{ContentHash, Round, RunConfig, SiteId};
use bytes::Bytes;
use engine::{EngineError, EngineState};
use rounds::{Assignment, Commit, Contribution, RoundPlan};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLockReadGuard};
use telemetry::{Event, Reporter};
use wire::Blob;

/// An engine that is lost more often than this after one commit is not started again: it would be lost for ever.
pub(crate) const RESTARTS_PER_ROUND_MAX: u64 = 2;

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
    Prepared {
        tokens_per_second: f64,
    },
    /// Not wanted any more where `abandoned` is set by now.
    Trained {
        round: Round,
        delta: Bytes,
        blob: Blob,
        contribution: Contribution,
        abandoned: Arc<AtomicBool>,
    },
    Applied {
        round: Round,
        state_hash: ContentHash,
    },
    Installed {
        round: Round,
        state_hash: ContentHash,
    },
    InstallFailed,
    Evaluated {
        round: Round,
        evaluation: Evaluation,
    },
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
    /// Restarts of the engine since the last commit.
    pub(crate) restarts: u64,
    /// Set when the agent has given the engine up: it is not started again.
    pub(crate) given_up: Arc<AtomicBool>,
}

/// Sends results; false when nobody listens any more.
type Answer<'a> = &'a mut dyn FnMut(Done) -> bool;

impl Worker {
    /// Does jobs until there are no more, or the engine fails.
    pub(crate) fn run(mut self, jobs: &std::sync::mpsc::Receiver<Job>, mut answer: impl FnMut(Done) -> bool) {
        while let Ok(job) = jobs.recv() {
            if let Err(error) = self.job(job, &mut answer) {
                self.keep_what_is_good(&error);
                answer(Done::Failed(error));
                return;
            }
        }
    }

    /// A number that is not finite stops this site, but changed nothing: the last commit's state is good, and saved.
    fn keep_what_is_good(&mut self, error: &TrainError) {
        let not_finite =
            matches!(error, TrainError::NotFinite { .. } | TrainError::Engine(engine::EngineError::NotFinite { .. }));
        if not_finite && let Err(unsaved) = self.put_back().and_then(|()| self.save()) {
            self.emit(Event::Warning { message: format!("the last state could not be saved: {unsaved}"), hint: None });
        }
    }

    fn job(&mut self, job: Job, answer: Answer<'_>) -> Result<(), TrainError> {
        match job {
            Job::Prepare { samples_per_step, seconds, evaluate } => {
                if evaluate {
                    self.evaluate(answer)?;
                }
                let measure = |worker: &mut Self| worker.trainer.measure(samples_per_step, seconds);
                let tokens_per_second = self.surviving(measure)?;
                answer(Done::Prepared { tokens_per_second });
            }
            Job::Train { plan, assignment, abandon } => self.train(&plan, &assignment, abandon, answer)?,
            Job::Apply { commit, deltas, evaluate } => self.apply(&commit, &deltas, evaluate, answer)?,
            Job::Install { commit, bytes } => self.install(commit, &bytes, answer)?,
            Job::Finish { evaluate } => {
                self.surviving(Self::put_back)?;
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

    /// Does `work`; where the engine is lost meanwhile, starts it again and does `work` anew, from its beginning.
    fn surviving<T>(&mut self, mut work: impl FnMut(&mut Self) -> Result<T, TrainError>) -> Result<T, TrainError> {
        loop {
            let result = work(self);
            for event in reduction_events(&mut self.trainer, self.site) {
                self.emit(event);
            }
            match result {
                Err(TrainError::Engine(lost @ EngineError::Lost { .. })) => self.restart(lost)?,
                other => return other,
            }
        }
    }

    /// Starts the engine again with the global parameters; its optimiser is as it was when it last got such.
    fn restart(&mut self, mut lost: EngineError) -> Result<(), TrainError> {
        while self.restarts < RESTARTS_PER_ROUND_MAX && !self.given_up.load(Ordering::Relaxed) {
            self.restarts += 1;
            let (site, round, attempt) = (self.site, self.saved.commit.round, self.restarts);
            self.emit(Event::EngineRestarted { site, round, attempt, reason: lost.to_string() });
            match self.trainer.recover().and_then(|()| self.put_back()) {
                Err(TrainError::Engine(again @ EngineError::Lost { .. })) => lost = again,
                other => return other,
            }
        }
        Err(lost.into())
    }

    fn global(state: &SharedState) -> RwLockReadGuard<'_, GlobalState> {
        state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn train(
        &mut self,
        plan: &RoundPlan,
        assignment: &Assignment,
        abandon: Arc<AtomicBool>,
        answer: Answer<'_>,
    ) -> Result<(), TrainError> {
        let (site, reporter) = (self.site, Arc::clone(&self.reporter));
        let mut on_step = |done: &_| {
            reporter.lock().unwrap_or_else(PoisonError::into_inner).emit(step_event(site, plan.round, done));
        };
        let trained = self.surviving(|worker| {
            // Others may read the state, and fetch it, while this site trains.
            let state = Arc::clone(&worker.state);
            let global = Self::global(&state);
            worker.trainer.train(plan, assignment, &global.parameters, &abandon, &mut on_step)
        })?;
        let Some(trained) = trained else { return Ok(()) };
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
        answer(Done::Trained { round: plan.round, delta, blob, contribution, abandoned: abandon });
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
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            self.trainer.merge(commit, &views, &mut state);
            state.hash()
        };
        let round = commit.round;
        self.note_state(commit, state_hash);
        self.saved.tokens += commit.contributors.iter().map(|contributor| contributor.tokens).sum::<u64>();
        self.surviving(Self::put_back)?;
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
        self.restarts = 0;
        self.saved.commit = commit.clone();
        self.saved.state_hash = state_hash;
        self.saved.step = (commit.round.0 * self.config.steps_per_round()).min(self.config.train.steps);
    }

    fn install(&mut self, commit: Commit, bytes: &[u8], answer: Answer<'_>) -> Result<(), TrainError> {
        let installed = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            state.decode(commit.clone(), bytes)
        };
        if !installed {
            answer(Done::InstallFailed);
            return Ok(());
        }
        let state_hash = ContentHash::of(bytes);
        self.note_state(&commit, state_hash);
        self.surviving(Self::put_back)?;
        // Tokens of earlier rounds are not in the commit; samples tell them.
        self.saved.tokens = commit.cursor * self.config.data.sequence_length as u64;
        answer(Done::Installed { round: commit.round, state_hash });
        Ok(())
    }

    /// Gives the engine the global parameters, whatever it has trained since.
    fn put_back(&mut self) -> Result<(), TrainError> {
        self.trainer.write(&Self::global(&self.state).parameters)
    }

    fn evaluate(&mut self, answer: Answer<'_>) -> Result<(), TrainError> {
        let round = self.saved.commit.round;
        if self.evaluated == Some(round) {
            return Ok(());
        }
        self.evaluated = Some(round);
        let evaluation = self.surviving(|worker| worker.trainer.evaluate())?;
        self.emit(evaluated_event(round, self.saved.step, &evaluation));
        answer(Done::Evaluated { round, evaluation });
        let sample = self.surviving(|worker| sample_event(&mut worker.trainer, &worker.config, round))?;
        sample.into_iter().for_each(|event| self.emit(event));
        Ok(())
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let round = self.saved.commit.round;
        if round == Round(0) || self.saved_round == Some(round) {
            return Ok(());
        }
        let EngineState { parameters: _, first_moments, second_moments, optimizer_steps } =
            self.surviving(|worker| Ok(worker.trainer.engine().save()?))?;
        self.saved.mode = Mode::Sites;
        self.saved.site = Some(self.site);
        self.saved.optimizer_steps = optimizer_steps;
        let inner = EngineState { first_moments, second_moments, optimizer_steps, ..EngineState::default() };
        let global = Self::global(&self.state).clone();
        let state = TrainingState { global, inner, saved: self.saved.clone() };
        let schema = self.trainer.schema().clone();
        let (is_saved, event) = save_checkpoint(&self.folder, &self.config, &state, round, &schema);
        self.emit(event);
        // What could not be saved now is tried again at the end.
        if is_saved {
            self.saved_round = Some(round);
        }
        Ok(())
    }
}
