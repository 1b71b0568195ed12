//! Engine calls under watch: what an engine is doing, since when, and whether that is too long.
//!
//! A device driver or another process may never come back, and a thread that waits for it cannot say so. [`Watched`] stands
//! between a trainer and its engine and notes when each call begins and ends; whoever holds the [`EngineWatch`] sees from
//! another thread that a call is overdue. What is too long follows from what the same call has taken before
//! ([`CallTimes::bound_seconds`]), so a slow device is not taken for a dead one. It ends nothing itself.

use base::{Fragment, ParameterSchema, TokenBatch};
use engine::numerics::Operation;
use engine::{DeviceInfo, Engine, EngineError, EngineState, Interrupter, LossSum, StepReport};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// No call is taken for hung before this time: a hang is named within 60 s, and 15 s are left for the pulse of the loop and
/// for a busy machine.
pub const HANG_SECONDS_MIN: f64 = 45.0;

/// A call that takes this many times its longest predecessor is hung.
pub const HANG_FACTOR: f64 = 5.0;

/// An engine's process imports its framework anew when it is started again, which takes up to 20 s on a busy machine, and
/// then holds its model: it may take this many times the least bound.
pub const START_FACTOR: f64 = 4.0;

/// How long calls may take, whatever they have taken before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HangBounds {
    /// No call is taken for hung before this time.
    pub seconds_min: f64,
    /// The first call of each kind on so many samples may take this much longer: an engine that compiles does so for each
    /// shape, and may do so for minutes. 0 where it does not.
    pub compile_seconds_max: f64,
}

impl Default for HangBounds {
    fn default() -> Self {
        Self { seconds_min: HANG_SECONDS_MIN, compile_seconds_max: 0.0 }
    }
}

/// What an engine can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Call {
    /// [`Engine::inner_step`]
    InnerStep,
    /// [`Engine::gradient`]
    Gradient,
    /// [`Engine::evaluate`]
    Evaluate,
    /// [`Engine::logits`]
    Logits,
    /// [`Engine::read_fragment`]
    ReadFragment,
    /// [`Engine::write_fragment`]
    WriteFragment,
    /// [`Engine::save`]
    Save,
    /// [`Engine::restore`]
    Restore,
    /// [`Engine::operation`]
    Operation,
    /// Making the engine and giving it its first state.
    Start,
    /// [`Engine::recover`]
    Recover,
}

const CALLS: usize = Call::Recover as usize + 1;

impl Call {
    /// Whether an engine that compiles may do so in it; the others move bytes.
    fn compiles(self) -> bool {
        matches!(self, Self::InnerStep | Self::Gradient | Self::Evaluate | Self::Logits | Self::Operation)
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::InnerStep => "inner step",
            Self::Gradient => "gradient",
            Self::Evaluate => "evaluate",
            Self::Logits => "logits",
            Self::ReadFragment => "read parameters",
            Self::WriteFragment => "write parameters",
            Self::Save => "save",
            Self::Restore => "restore",
            Self::Operation => "operation",
            Self::Start => "start",
            Self::Recover => "start again",
        })
    }
}

/// A call that is taken for hung.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hang {
    /// Which.
    pub call: Call,
    /// Inner step of the run that was being made, or the last one that was.
    pub step: u64,
    /// Since it began.
    pub seconds: f64,
    /// What it might have taken.
    pub bound_seconds: f64,
}

/// Durations of one kind of call.
#[derive(Debug, Clone, PartialEq, Default)]
struct Durations {
    /// Numbers of samples that were met: at most those of a batch, or the tokens of a prompt.
    samples_met: BTreeSet<u64>,
    /// Most samples in a completed call; 0 before the first.
    samples_max: u64,
    /// The first call with so many samples: compiling for the new shape may be a part of it.
    first_seconds: f64,
    /// Longest call that was not the first with its number of samples.
    longest_seconds: Option<f64>,
}

impl Durations {
    fn completed(&mut self, samples: u64, seconds: f64) {
        if !self.samples_met.insert(samples) {
            self.longest_seconds = Some(self.longest_seconds.map_or(seconds, |longest| longest.max(seconds)));
        } else if samples > self.samples_max {
            (self.samples_max, self.first_seconds) = (samples, seconds);
        }
    }
}

/// How long calls take, without a clock: times are seconds from any origin.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CallTimes {
    current: Option<(Call, u64, f64)>,
    durations: [Durations; CALLS],
    step: u64,
}

impl CallTimes {
    /// A call on `samples` samples (1 where it has none) begins.
    pub fn begin(&mut self, call: Call, samples: u64, now: f64) {
        self.current = Some((call, samples, now));
    }

    /// It came back. A call that failed teaches nothing about how long such calls take.
    pub fn end(&mut self, succeeded: bool, now: f64) {
        let Some((call, samples, began)) = self.current.take() else { return };
        if !succeeded {
            return;
        }
        self.durations[call as usize].completed(samples, now - began);
        if call == Call::Recover {
            // A new process has compiled nothing.
            self.durations.iter_mut().for_each(|durations| durations.samples_met.clear());
        }
    }

    /// What a call on `samples` samples may take: [`HANG_FACTOR`] times the longest so far, in proportion where it has more
    /// samples than any before, and never less than the bounds say.
    pub fn bound_seconds(&self, call: Call, samples: u64, bounds: HangBounds) -> f64 {
        if call == Call::Recover {
            return START_FACTOR * bounds.seconds_min;
        }
        let Durations { samples_met, samples_max, first_seconds, longest_seconds } = &self.durations[call as usize];
        let growth = (samples as f64 / (*samples_max).max(1) as f64).max(1.0);
        let compiles = call.compiles();
        let compiling = if compiles && !samples_met.contains(&samples) { bounds.compile_seconds_max } else { 0.0 };
        // Of a first call, what compiling may have taken is not work that grows with the samples.
        let first_work = if compiles { (first_seconds - bounds.compile_seconds_max).max(0.0) } else { *first_seconds };
        (HANG_FACTOR * longest_seconds.unwrap_or(first_work) * growth).max(bounds.seconds_min) + compiling
    }

    /// The call that is under way, if it is hung.
    pub fn overdue(&self, bounds: HangBounds, now: f64) -> Option<Hang> {
        let (call, samples, began) = self.current?;
        let (seconds, bound_seconds) = (now - began, self.bound_seconds(call, samples, bounds));
        (seconds > bound_seconds).then_some(Hang { call, step: self.step, seconds, bound_seconds })
    }
}

/// [`CallTimes`] on the system's clock, shared between the engine's thread and who watches it.
#[derive(Debug)]
pub struct EngineWatch {
    origin: Instant,
    times: Mutex<CallTimes>,
}

impl Default for EngineWatch {
    fn default() -> Self {
        Self { origin: Instant::now(), times: Mutex::default() }
    }
}

impl EngineWatch {
    fn times(&self) -> MutexGuard<'_, CallTimes> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> f64 {
        self.origin.elapsed().as_secs_f64()
    }

    /// The inner step of the run to which the next calls belong; the first is 1.
    pub fn set_step(&self, step: u64) {
        self.times().step = step;
    }

    /// As set last; 0 before.
    pub fn step(&self) -> u64 {
        self.times().step
    }

    /// See [`CallTimes::overdue`].
    pub fn overdue(&self, bounds: HangBounds) -> Option<Hang> {
        self.times().overdue(bounds, self.now())
    }
}

/// An engine whose calls are noted. It forwards every method, those with a default included.
pub(crate) struct Watched {
    engine: Box<dyn Engine>,
    watch: Arc<EngineWatch>,
}

impl Watched {
    pub(crate) fn new(engine: Box<dyn Engine>, watch: Arc<EngineWatch>) -> Self {
        Self { engine, watch }
    }

    fn watched<T>(
        &mut self,
        call: Call,
        samples: usize,
        run: impl FnOnce(&mut dyn Engine) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        self.watch.times().begin(call, samples as u64, self.watch.now());
        let result = run(self.engine.as_mut());
        self.watch.times().end(result.is_ok(), self.watch.now());
        result
    }
}

impl Engine for Watched {
    fn device(&self) -> DeviceInfo {
        self.engine.device()
    }

    fn schema(&self) -> &ParameterSchema {
        self.engine.schema()
    }

    fn inner_step(&mut self, batch: &TokenBatch, learning_rate: f64) -> Result<StepReport, EngineError> {
        self.watched(Call::InnerStep, batch.samples, |engine| engine.inner_step(batch, learning_rate))
    }

    fn gradient(&mut self, batch: &TokenBatch, gradient: &mut [f32]) -> Result<StepReport, EngineError> {
        self.watched(Call::Gradient, batch.samples, |engine| engine.gradient(batch, gradient))
    }

    fn evaluate(&mut self, batch: &TokenBatch) -> Result<LossSum, EngineError> {
        self.watched(Call::Evaluate, batch.samples, |engine| engine.evaluate(batch))
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.watched(Call::Logits, tokens.len(), |engine| engine.logits(tokens))
    }

    fn read_fragment(&mut self, fragment: &Fragment, values: &mut [f32]) -> Result<(), EngineError> {
        self.watched(Call::ReadFragment, 1, |engine| engine.read_fragment(fragment, values))
    }

    fn write_fragment(&mut self, fragment: &Fragment, values: &[f32]) -> Result<(), EngineError> {
        self.watched(Call::WriteFragment, 1, |engine| engine.write_fragment(fragment, values))
    }

    fn add_to_fragment(&mut self, fragment: &Fragment, change: &[f32]) -> Result<(), EngineError> {
        self.watched(Call::WriteFragment, 1, |engine| engine.add_to_fragment(fragment, change))
    }

    fn save(&mut self) -> Result<EngineState, EngineError> {
        self.watched(Call::Save, 1, |engine| engine.save())
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.watched(Call::Restore, 1, |engine| engine.restore(state))
    }

    fn micro_batch_samples(&self) -> usize {
        self.engine.micro_batch_samples()
    }

    fn set_micro_batch_samples(&mut self, samples: usize) {
        self.engine.set_micro_batch_samples(samples);
    }

    fn set_batch_share(&mut self, share: f64) {
        self.engine.set_batch_share(share);
    }

    fn is_repeatable(&self) -> bool {
        self.engine.is_repeatable()
    }

    fn operation(&mut self, operation: &Operation) -> Result<Vec<f32>, EngineError> {
        self.watched(Call::Operation, 1, |engine| engine.operation(operation))
    }

    fn recover(&mut self) -> Result<(), EngineError> {
        self.watched(Call::Recover, 1, |engine| engine.recover())
    }

    fn interrupter(&self) -> Option<Interrupter> {
        self.engine.interrupter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECONDS_MIN: f64 = 45.0;
    const MIN: HangBounds = HangBounds { seconds_min: SECONDS_MIN, compile_seconds_max: 0.0 };

    fn completed(times: &mut CallTimes, call: Call, samples: u64, seconds: f64) {
        times.begin(call, samples, 100.0);
        times.end(true, 100.0 + seconds);
    }

    #[test]
    fn a_call_is_overdue_after_the_least_bound_or_five_times_its_longest() {
        let mut times = CallTimes { step: 7, ..CallTimes::default() };
        assert_eq!(times.overdue(MIN, 1e9), None, "nothing is under way");
        times.begin(Call::InnerStep, 8, 10.0);
        assert_eq!(times.overdue(MIN, 55.0), None);
        let hang = Hang { call: Call::InnerStep, step: 7, seconds: 46.0, bound_seconds: SECONDS_MIN };
        assert_eq!(times.overdue(MIN, 56.0), Some(hang));
        times.end(true, 56.0);
        completed(&mut times, Call::InnerStep, 8, 12.0);
        completed(&mut times, Call::InnerStep, 8, 10.0);
        times.begin(Call::InnerStep, 8, 1_000.0);
        assert_eq!(times.overdue(MIN, 1_060.0), None, "five times 12 s");
        assert_eq!(times.overdue(MIN, 1_061.0).map(|hang| hang.bound_seconds), Some(60.0));
        times.begin(Call::Save, 1, 1_000.0);
        assert!(times.overdue(MIN, 1_046.0).is_some(), "another kind of call learns nothing from it");
    }

    #[test]
    fn more_samples_may_take_more_time_but_compiling_is_not_taken_for_work() {
        let mut times = CallTimes::default();
        completed(&mut times, Call::InnerStep, 1, 20.0);
        assert_eq!(times.bound_seconds(Call::InnerStep, 32, MIN), 3_200.0, "nothing better is known yet");
        completed(&mut times, Call::InnerStep, 32, 30.0);
        assert_eq!(times.bound_seconds(Call::InnerStep, 32, MIN), 150.0);
        completed(&mut times, Call::InnerStep, 32, 16.0);
        assert_eq!(times.bound_seconds(Call::InnerStep, 32, MIN), 80.0);
        assert_eq!(times.bound_seconds(Call::InnerStep, 1, MIN), 80.0);
        assert_eq!(times.bound_seconds(Call::InnerStep, 64, MIN), 160.0);
    }

    #[test]
    fn an_engine_that_compiles_may_do_so_once_for_each_shape_and_again_after_a_restart() {
        let bounds = HangBounds { compile_seconds_max: 300.0, ..MIN };
        let mut times = CallTimes::default();
        for samples in [8, 7] {
            assert_eq!(times.bound_seconds(Call::InnerStep, samples, bounds), 345.0);
            completed(&mut times, Call::InnerStep, samples, 1.0);
            completed(&mut times, Call::InnerStep, samples, 1.0);
            assert_eq!(times.bound_seconds(Call::InnerStep, samples, bounds), 45.0);
        }
        completed(&mut times, Call::Recover, 1, 20.0);
        assert_eq!(times.bound_seconds(Call::InnerStep, 8, bounds), 345.0);
    }

    #[test]
    fn a_call_that_failed_teaches_nothing() {
        let mut times = CallTimes::default();
        times.begin(Call::Evaluate, 8, 0.0);
        times.end(false, 1_000.0);
        assert_eq!(times, CallTimes::default());
        assert_eq!(times.bound_seconds(Call::Recover, 1, MIN), START_FACTOR * SECONDS_MIN);
    }
}
