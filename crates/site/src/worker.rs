//! The engine's thread: jobs in, results out, in order.
//!
//! The agent never waits for the engine, and the engine never waits for the network. What it has trained goes to the host's thread
//! (`host`) as a snapshot, and comes back merged; the global state is only read here.
//!
//! An engine that is lost (its process was killed) is started again and given the global parameters, and what it had not
//! finished is done anew ([`Worker::surviving`]). What is sent of a round is sent after all of its steps, so that no
//! step counts twice; where merges overlap with training, steps since the last merge that are lost with the engine are lost.

use crate::alone::{evaluated_event, reduction_events, sample_event, save_checkpoint, step_event};
use crate::folder::RunFolder;
use crate::host::{HostJob, PartKey, Question, Slice};
use crate::known_speed::KnownSpeed;
use crate::merger::{Clipped, Fragments, LocalChange, Merged};
use crate::state::{GlobalState, Mode, SavedState, SharedState, TrainingState};
use crate::trainer::{Evaluation, Progress, TrainError, Trainer};
use base::config::Strategy;
use base::{ContentHash, Round, RunConfig, SiteId};
use bytes::Bytes;
use engine::{EngineError, EngineState};
use rounds::{
    Assignment, Commit, Contribution, DigestBounds, FragmentPlan, GradientDigest, Measurement, RoundPlan, StepVerdict,
};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use telemetry::{Event, Reporter};
use wire::Blob;

/// An engine that is lost more often than this after one commit is not started again: it would be lost for ever.
pub(crate) const RESTARTS_PER_ROUND_MAX: u64 = 2;

/// What the engine's thread is asked to do.
pub(crate) enum Job {
    /// Measure the speed of this engine alone, and the initial loss where `evaluate` says so.
    Prepare { samples_per_step: u64, seconds: f64, evaluate: bool },
    /// Make some steps of an assignment.
    Train { plan: RoundPlan, assignment: Assignment, steps: Range<u64>, abandon: Arc<AtomicBool> },
    /// Hand the plan's fragment to the host's thread.
    Snapshot { plan: RoundPlan, abandon: Arc<AtomicBool> },
    /// Take over what was merged; then validate and save where the cadence says so.
    Apply { merged: Merged, evaluate: bool },
    /// Compute a gradient that this site is asked for.
    Witness(Question),
    /// Begin anew from the global state.
    StartOver,
    /// Save, and validate where asked, because the run or this site's part in it ends.
    Finish { evaluate: bool },
}

/// What the two threads have done.
pub(crate) enum Done {
    Prepared {
        tokens_per_second: f64,
    },
    /// Not wanted any more where `abandoned` is set by now.
    Encoded {
        round: Round,
        fragment: FragmentPlan,
        delta: Bytes,
        /// For the reducers of a sharded round.
        slices: Vec<Slice>,
        contribution: Contribution,
        /// What the host knows of it.
        measurement: Measurement,
        abandoned: Arc<AtomicBool>,
    },
    /// A step was made twice. Where the results differ, the engine has begun anew and `abandoned` is set.
    Recomputed {
        round: Round,
        attempt: u32,
        verdict: StepVerdict,
        abandoned: Arc<AtomicBool>,
    },
    /// This site's part of a sharded round is merged. Not wanted any more where `abandoned` is set by now.
    Reduced {
        key: PartKey,
        part: Bytes,
        /// Slices that counted for less than their tokens say.
        clipped: Vec<Clipped>,
        hash: ContentHash,
        blob: Blob,
        abandoned: Arc<AtomicBool>,
    },
    Merged(Merged),
    /// Said before the merge that it needs: the engine has to answer it.
    Witness(Question),
    Witnessed {
        round: Round,
        state_hash: ContentHash,
        digest: GradientDigest,
        bounds: DigestBounds,
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
    /// Where snapshots go.
    pub(crate) host: std::sync::mpsc::Sender<HostJob>,
    pub(crate) local: Local,
    pub(crate) evaluated: Option<Round>,
    pub(crate) saved_round: Option<Round>,
    /// Restarts of the engine since the last commit.
    pub(crate) restarts: u64,
    /// Restarts of the engine in all: what it was trained before the last one is gone.
    pub(crate) engine_starts: u64,
    /// Set when the agent has given the engine up: it is not started again.
    pub(crate) given_up: Arc<AtomicBool>,
}

/// How this site's parameters differ from the global ones.
pub(crate) struct Local {
    fragments: Fragments,
    /// The round that is being trained.
    work: Work,
    /// Rounds whose snapshots are on their way and are still what the engine's parameters are counted from.
    in_flight: BTreeSet<Round>,
    /// The engine was given the global parameters as they were after this round.
    given: Round,
    /// The engine holds the global parameters, as they are or were.
    is_global: bool,
}

/// What has been trained of a round.
#[derive(Clone, Default)]
struct Work {
    round: Round,
    /// Known once there are steps in it.
    assignment: Option<Assignment>,
    progress: Progress,
    /// Which start of the engine holds it: see [`Worker::engine_starts`].
    engine_start: u64,
}

impl Local {
    pub(crate) fn new(config: &RunConfig) -> Self {
        let work = Work::default();
        let (fragments, in_flight) = (Fragments::new(config), BTreeSet::new());
        Self { fragments, work, in_flight, given: Round(0), is_global: true }
    }
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
                let tokens_per_second = self.speed(samples_per_step, seconds)?;
                answer(Done::Prepared { tokens_per_second });
            }
            Job::Train { plan, assignment, steps, abandon } => {
                self.train((&plan, &assignment), steps, &abandon, answer)?;
            }
            Job::Snapshot { plan, abandon } => self.snapshot(plan, abandon, answer)?,
            Job::Apply { merged, evaluate } => self.apply(&merged, evaluate, answer)?,
            Job::Witness(question) => self.witness(&question, answer)?,
            Job::StartOver => self.start_over()?,
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

    /// Training tokens a second: what was measured here before, or a new measurement.
    fn speed(&mut self, samples_per_step: u64, seconds: f64) -> Result<f64, TrainError> {
        let slowdown = self.trainer.slowdown();
        let of = |worker: &mut Self, speed| {
            KnownSpeed::new(&worker.trainer.engine().device(), slowdown, samples_per_step, speed)
        };
        if let Some(known) = of(self, 0.0).read(&self.folder) {
            return Ok(known);
        }
        let measured = self.surviving(|worker| worker.trainer.measure(samples_per_step, seconds))?;
        of(self, measured).keep(&self.folder);
        Ok(measured)
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
            let (site, round, attempt) = (self.site, self.last_round(), self.restarts);
            self.emit(Event::EngineRestarted { site, round, attempt, reason: lost.to_string() });
            self.engine_starts += 1;
            match self.trainer.recover().and_then(|()| self.put_back()) {
                Err(TrainError::Engine(again @ EngineError::Lost { .. })) => lost = again,
                other => return other,
            }
        }
        Err(lost.into())
    }

    /// The global state as it is now.
    fn global(&self) -> GlobalState {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The last round that is part of it.
    fn last_round(&self) -> Round {
        self.state.read().unwrap_or_else(PoisonError::into_inner).commit.round
    }

    fn train(
        &mut self,
        (plan, assignment): (&RoundPlan, &Assignment),
        steps: Range<u64>,
        abandon: &Arc<AtomicBool>,
        answer: Answer<'_>,
    ) -> Result<(), TrainError> {
        if abandon.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.begin_round(plan.round);
        self.local.work.assignment = Some(assignment.clone());
        self.surviving(|worker| worker.train_through(plan, steps.clone(), abandon))?;
        let verdict = self.local.work.progress.verdict.take();
        self.tell_check(plan, verdict, abandon, answer).map(|_is_wrong| ())
    }

    /// Tells what a step that was made twice has shown. Where the results differ, nobody knows what else is wrong of what was learnt since the
    /// last merge: it is given up, with the jobs that build on it. Gives whether that is so.
    fn tell_check(
        &mut self,
        plan: &RoundPlan,
        verdict: Option<StepVerdict>,
        abandon: &Arc<AtomicBool>,
        answer: Answer<'_>,
    ) -> Result<bool, TrainError> {
        let Some(verdict) = verdict else { return Ok(false) };
        let is_wrong = verdict.mismatch.is_some();
        if is_wrong {
            abandon.store(true, Ordering::Relaxed);
            self.start_over()?;
        }
        let abandoned = Arc::clone(abandon);
        answer(Done::Recomputed { round: plan.round, attempt: plan.attempt, verdict, abandoned });
        Ok(is_wrong)
    }

    fn begin_round(&mut self, round: Round) {
        if self.local.work.round != round {
            self.local.work = Work { round, engine_start: self.engine_starts, ..Work::default() };
        }
    }

    /// Makes those steps; after all before them where the engine has lost what it had trained of the round.
    fn train_through(&mut self, plan: &RoundPlan, steps: Range<u64>, abandon: &AtomicBool) -> Result<(), TrainError> {
        let is_lost = self.local.work.engine_start != self.engine_starts;
        if steps.is_empty() && !is_lost {
            return Ok(());
        }
        let work = &mut self.local.work;
        let Some(assignment) = &work.assignment else { return Ok(()) };
        // Where these steps fail the engine is lost, and with it what they add to.
        let mut progress = std::mem::take(&mut work.progress);
        let mut start = steps.start;
        if is_lost {
            (progress, start) = (Progress::default(), 0);
        }
        self.local.is_global = false;
        let (site, reporter) = (self.site, Arc::clone(&self.reporter));
        let mut on_step = |done: &_| {
            reporter.lock().unwrap_or_else(PoisonError::into_inner).emit(step_event(site, plan.round, done));
        };
        self.trainer.train((plan, assignment), start..steps.end, &mut progress, abandon, &mut on_step)?;
        (work.progress, work.engine_start) = (progress, self.engine_starts);
        Ok(())
    }

    fn snapshot(&mut self, plan: RoundPlan, abandon: Arc<AtomicBool>, answer: Answer<'_>) -> Result<(), TrainError> {
        if abandon.load(Ordering::Relaxed) {
            return Ok(());
        }
        let fragment = self.local.fragments.of(plan.fragment);
        self.begin_round(plan.round);
        let steps = self.local.work.assignment.as_ref().map_or(0, |assignment| assignment.steps);
        let (values, mut progress) = self.surviving(|worker| {
            // None, unless the engine has lost them.
            worker.train_through(&plan, steps..steps, &abandon)?;
            let mut progress = std::mem::take(&mut worker.local.work.progress);
            Ok((worker.trainer.snapshot(&fragment, &mut progress)?, progress))
        })?;
        // Again, where the engine was lost after it and made its steps anew.
        if self.tell_check(&plan, progress.verdict.take(), &abandon, answer)? {
            return Ok(());
        }
        let values = Arc::new(values);
        self.local.in_flight.insert(plan.round);
        // A thread that is gone is noticed where its results are awaited.
        let _gone = self.host.send(HostJob::Encode { plan, values, progress, abandon });
        Ok(())
    }

    fn apply(&mut self, merged: &Merged, evaluate: bool, answer: Answer<'_>) -> Result<(), TrainError> {
        self.restarts = 0;
        let round = merged.round;
        let fragment = self.local.fragments.of(merged.fragment);
        self.surviving(|worker| {
            if round <= worker.local.given {
                return Ok(());
            }
            let is_in_flight = worker.local.in_flight.contains(&round);
            match &merged.local {
                // The engine was lost since that snapshot, and with it what the change counts from.
                LocalChange::Add { counts_from_snapshot: true, .. } if !is_in_flight => worker.put_back(),
                change => worker.trainer.take_over(&fragment, change),
            }
        })?;
        self.local.in_flight.remove(&round);
        self.local.is_global |= self.config.sync.strategy != Strategy::Streaming;
        self.emit(Event::RoundApplied { round, site: self.site, state_hash: merged.state_hash });
        if evaluate && round.0.is_multiple_of(self.config.evaluate.every_rounds) {
            self.evaluate(answer)?;
        }
        if round.0.is_multiple_of(self.config.checkpoint.every_rounds) {
            self.save()?;
        }
        Ok(())
    }

    /// Forgets what was trained and not merged.
    fn start_over(&mut self) -> Result<(), TrainError> {
        self.local.work = Work::default();
        self.surviving(Self::put_back)
    }

    /// Gives the engine the global parameters, whatever it has trained since. What it learns from now on is counted from these.
    fn put_back(&mut self) -> Result<(), TrainError> {
        let state = self.global();
        self.trainer.write(&state.parameters)?;
        self.local.in_flight.clear();
        self.local.given = state.commit.round;
        self.local.is_global = true;
        Ok(())
    }

    /// Computes a gradient at other parameters than the engine's own, which come back as they were, and so does its optimiser.
    fn witness(&mut self, question: &Question, answer: Answer<'_>) -> Result<(), TrainError> {
        let Question { round, state_hash, parameters, samples } = question;
        let whole = self.trainer.schema().whole();
        let (digest, bounds) = self.surviving(|worker| {
            let mut own = vec![0.0; whole.elements()];
            worker.trainer.engine().read_fragment(&whole, &mut own)?;
            worker.trainer.write(parameters)?;
            let result = worker.trainer.gradient_digest(samples, round.0)?;
            worker.trainer.write(&own)?;
            Ok(result)
        })?;
        answer(Done::Witnessed { round: *round, state_hash: *state_hash, digest, bounds });
        Ok(())
    }

    /// Does `work` with the global parameters in the engine, and puts its own back.
    fn with_global<T>(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<T, TrainError>,
    ) -> Result<(T, GlobalState), TrainError> {
        let state = self.global();
        if self.local.is_global {
            return Ok((work(self)?, state));
        }
        let whole = self.trainer.schema().whole();
        let mut own = vec![0.0; whole.elements()];
        self.trainer.engine().read_fragment(&whole, &mut own)?;
        self.trainer.write(&state.parameters)?;
        let result = work(self)?;
        self.trainer.write(&own)?;
        Ok((result, state))
    }

    fn evaluate(&mut self, answer: Answer<'_>) -> Result<(), TrainError> {
        if self.evaluated == Some(self.last_round()) {
            return Ok(());
        }
        let ((evaluation, sample), state) = self.surviving(|worker| {
            worker.with_global(|worker| {
                let evaluation = worker.trainer.evaluate()?;
                let round = worker.last_round();
                Ok((evaluation, sample_event(&mut worker.trainer, &worker.config, round)?))
            })
        })?;
        let Commit { round, step, .. } = state.commit;
        self.evaluated = Some(round);
        self.emit(evaluated_event(round, step, &evaluation));
        answer(Done::Evaluated { round, evaluation });
        sample.into_iter().for_each(|event| self.emit(event));
        Ok(())
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let last = self.last_round();
        if last == Round(0) || self.saved_round == Some(last) {
            return Ok(());
        }
        let global = self.global();
        let round = global.commit.round;
        let EngineState { parameters: _, first_moments, second_moments, optimizer_steps } =
            self.surviving(|worker| Ok(worker.trainer.engine().save()?))?;
        let commit = global.commit.clone();
        self.saved.mode = Mode::Sites;
        self.saved.site = Some(self.site);
        self.saved.optimizer_steps = optimizer_steps;
        self.saved.state_hash = global.hash();
        self.saved.step = commit.step;
        self.saved.tokens = commit.samples * self.config.data.sequence_length as u64;
        self.saved.commit = commit;
        let inner = EngineState { first_moments, second_moments, optimizer_steps, ..EngineState::default() };
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
