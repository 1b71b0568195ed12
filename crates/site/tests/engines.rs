//! Engines in trouble, through the agent: too little memory, numbers that are not finite, calls that do not come back,
//! processes that are killed. Whatever happens to one site's engine, its checkpoints stay whole and the others go on.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

#[path = "engines/recompute.rs"]
mod recompute;
mod support;

use base::{Hint, Round, RunConfig};
use rounds::coordinator::Note;
use rounds::plan::LeaveReason;
use site::agent::Outcome;
use site::{AgentError, HangBounds, JoinOptions, RunFolder, TrainError, Trainer};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{Coordinated, Fault, Method, Pulses, Run, TestEngine, Trouble, coordinate, coordinate_with};
use telemetry::{Event, EventLog, Reporter};

/// No test takes longer: a busy machine may need many times what an idle one does.
const PATIENCE: Duration = Duration::from_secs(120);

/// A hang is waited for that long here; every other call of the test engine takes microseconds.
const SHORT: HangBounds = HangBounds { seconds_min: 2.0, compile_seconds_max: 0.0 };

/// A site's part in a run.
struct Joined {
    result: Result<Outcome, AgentError>,
    events: Vec<Event>,
    folder: RunFolder,
}

impl Joined {
    fn error(&self) -> String {
        self.result.as_ref().unwrap_err().to_string()
    }

    fn train_error(&self) -> &TrainError {
        match &self.result {
            Err(AgentError::Train(error)) => error,
            other => panic!("{other:?}"),
        }
    }
}

fn options(name: usize, invite: wire::Invite, folder: RunFolder, hang: HangBounds) -> JoinOptions {
    JoinOptions {
        invite,
        folder,
        name: name.to_string(),
        listen: Some("127.0.0.1:0".parse().unwrap()),
        objects: None,
        advertised_host: String::new(),
        proxy: None,
        engine: "test".to_owned(),
        threads: 1,
        slowdown: 1.0,
        measure_seconds: 0.0,
        coordinator_wait: std::time::Duration::ZERO,
        hang,
    }
}

async fn join(options: JoinOptions, engine: TestEngine) -> Joined {
    join_after(options, engine, || {}).await
}

/// Joins with an engine that takes as long to make as `delay`.
async fn join_after(options: JoinOptions, engine: TestEngine, delay: impl FnOnce() + Send + 'static) -> Joined {
    let folder = options.folder.clone();
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&events);
    let log = EventLog::open(&folder.events(), &options.name, Box::new(|| 0)).unwrap();
    let watcher = move |record: &telemetry::Record| seen.lock().unwrap().push(record.event.clone());
    let make = Box::new(move |_: &RunConfig, _: &site::TrainingState| {
        delay();
        Ok(Box::new(engine) as Box<dyn engine::Engine>)
    });
    let result = site::join(options, make, Reporter::new(log, Box::new(watcher)), std::future::pending()).await;
    let events = std::mem::take(&mut *events.lock().unwrap());
    Joined { result, events, folder }
}

/// A run of two sites, the second of them on this engine, to its end.
fn run_of_two(run: &Run, second: TestEngine, hang: HangBounds) -> (Coordinated, Joined, Joined) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let ended = runtime.block_on(in_time(async {
        let (invite, coordinated) = coordinate(run).await;
        let first = options(0, invite.clone(), run.site_folder("0"), HangBounds::default());
        let first = join(first, TestEngine::new(&run.config, &[]));
        let second = join(options(1, invite, run.site_folder("1"), hang), second);
        let (first, second) = tokio::join!(first, second);
        (coordinated.await.unwrap(), first, second)
    }));
    runtime.shutdown_background();
    ended
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap()
}

fn with_faults(run: &Run, faults: &[Fault]) -> TestEngine {
    TestEngine::new(&run.config, faults)
}

fn fault(method: Method, call: u64, trouble: Trouble) -> Fault {
    Fault { method, call, trouble }
}

/// Inner steps before the first round: two to warm up and two to measure.
const MEASURED: u64 = 4;

/// The first site has finished the run without the second, which has left for `reason` and holds the state of
/// `rounds` rounds.
fn assert_dropped(run: &Run, ended: &(Coordinated, Joined, Joined), reason: LeaveReason, rounds: u64) {
    let (coordinated, first, second) = ended;
    assert_eq!(coordinated.left(1), Some(reason));
    assert_eq!(coordinated.rounds, 3);
    let outcome = first.result.as_ref().unwrap();
    assert!(outcome.finished);
    assert_eq!(Some(outcome.state_hash), coordinated.state_hash);
    assert_eq!(coordinated.ledger.leased, coordinated.ledger.committed + coordinated.ledger.returned);
    let (state, skipped) = second.folder.newest(&run.config).unwrap();
    assert!(skipped.is_empty(), "{skipped:?}");
    assert_eq!(state.saved.commit.round, Round(rounds));
    assert!(state.global.parameters.iter().all(|value| value.is_finite()));
}

fn trainer(run: &Run, engine: TestEngine) -> Trainer {
    let mut engine: Box<dyn engine::Engine> = Box::new(engine);
    engine.restore(&run.initial_state().inner).unwrap();
    Trainer::new(&run.folder, &run.config, engine, 1.0).unwrap()
}

#[test]
fn too_little_memory_halves_the_micro_batch_until_it_fits_and_changes_no_number() {
    let run = Run::new(|_| {});
    let mut trainers = [TestEngine::new(&run.config, &[]), TestEngine::new(&run.config, &[]).with_memory(3)]
        .map(|engine| trainer(&run, engine));
    for trainer in &mut trainers {
        assert!(trainer.measure(8, 0.0).unwrap() > 0.0);
        let batch = trainer.batch(0..8);
        trainer.step(0, &batch).unwrap();
        trainer.evaluate().unwrap();
    }
    let [whole, cut] = &mut trainers;
    assert_eq!(whole.take_reductions(), []);
    let reductions = cut.take_reductions();
    let sizes: Vec<_> = reductions.iter().map(|reduced| (reduced.from_samples, reduced.to_samples)).collect();
    assert_eq!(sizes, [(8, 4), (4, 2)]);
    assert_eq!(reductions[1].reason, "4 samples wanted, 3 fit");
    assert_eq!(cut.engine().micro_batch_samples(), 2);
    assert_eq!(cut.engine().save().unwrap(), whole.engine().save().unwrap());
}

#[test]
fn a_validation_batch_shrinks_like_any_other() {
    let run = Run::new(|config| config.train.micro_batch_samples = 1);
    let mut small = trainer(&run, TestEngine::new(&run.config, &[]).with_memory(1));
    let mut large = trainer(&run, TestEngine::new(&run.config, &[]));
    let (small, large) = (small.evaluate(), large.evaluate().unwrap());
    // An engine whose micro-batch is 1 already, and which evaluates more at once, has nothing to reduce but the batch.
    assert_eq!(small.unwrap().nats_per_token, large.nats_per_token);
}

#[test]
fn a_device_that_does_not_hold_one_sample_is_named_with_what_to_do() {
    let run = Run::new(|_| {});
    for engine in
        [TestEngine::new(&run.config, &[]).with_memory(0), TestEngine::new(&run.config, &[]).with_memory(0).stubborn()]
    {
        let error = trainer(&run, engine).measure(8, 0.0).unwrap_err();
        let expected = "test (Test Device 1) is out of memory with one sample of 16 tokens";
        assert!(error.to_string().starts_with(expected), "{error}");
        assert!(error.hint().unwrap().contains("--set data.sequence_length=8"), "{:?}", error.hint());
    }
}

#[test]
fn a_run_goes_on_with_a_smaller_micro_batch_and_tells_it() {
    let run = Run::new(|_| {});
    let (coordinated, first, second) = run_of_two(&run, with_faults(&run, &[]).with_memory(2), HangBounds::default());
    assert_eq!(coordinated.state_hash, Some(first.result.unwrap().state_hash));
    assert_eq!(coordinated.state_hash, Some(second.result.unwrap().state_hash));
    let reduced = second.events.iter().filter_map(|event| match event {
        Event::MicroBatchReduced { from_samples, to_samples, .. } => Some((*from_samples, *to_samples)),
        _ => None,
    });
    // Its part of a step is 4 samples.
    assert_eq!(reduced.collect::<Vec<_>>(), [(4, 2)]);
    let device = coordinated.notes.iter().find_map(|note| match note {
        Note::SiteDevice { device, .. } => Some((device.name.as_str(), device.precision.as_str())),
        _ => None,
    });
    assert_eq!(device, Some(("Test Device 1", "f32")));
}

#[test]
fn a_number_that_is_not_finite_is_named_with_its_step_and_never_sent() {
    // The second step of round 2: step 6 of the run. A delta is looked at after the last step.
    for (trouble, step, what) in [
        (Trouble::NotFiniteNoticed, 6, "the loss is NaN"),
        (Trouble::NotFiniteLoss, 6, "the loss is NaN"),
        (Trouble::NotFiniteParameters, 8, "the delta of model.embed_tokens.weight is "),
    ] {
        let run = Run::new(|_| {});
        let engine = with_faults(&run, &[fault(Method::InnerStep, MEASURED + 6, trouble)]);
        let ended = run_of_two(&run, engine, HangBounds::default());
        assert_dropped(&run, &ended, LeaveReason::EngineNotFinite, 1);
        let (coordinated, _, second) = &ended;
        assert!(matches!(second.train_error(), TrainError::NotFinite { step: found, .. } if *found == step));
        let text = second.error();
        assert!(text.contains(&format!("inner step {step} of the run: {what}")), "{text}");
        let sent = coordinated.notes.iter().filter(|note| match note {
            Note::Computed { site, round, .. } => site.0 == 1 && *round > Round(1),
            _ => false,
        });
        assert_eq!(sent.count(), 0, "{trouble:?}");
    }
}

#[test]
fn an_engine_that_hangs_is_named_and_dropped() {
    let run = Run::new(|_| {});
    let engine = with_faults(&run, &[fault(Method::InnerStep, MEASURED + 6, Trouble::Hang)]);
    let interruptions = Arc::clone(&engine.interruptions);
    let recoveries = Arc::clone(&engine.recoveries);
    let ended = run_of_two(&run, engine, SHORT);
    assert_dropped(&run, &ended, LeaveReason::EngineHung, 1);
    let second = &ended.2;
    let text = second.error();
    assert!(text.starts_with("engine test hangs: 'inner step' at inner step 6 of the run has not come back"), "{text}");
    assert_eq!(interruptions.load(Ordering::Relaxed), 1);
    assert_eq!(recoveries.load(Ordering::Relaxed), 0, "an engine that was given up is not started again");
    let hung = second.events.iter().any(|event| matches!(event, Event::EngineHung { step: 6, .. }));
    assert!(hung, "{:?}", second.events);
}

#[test]
fn an_engine_that_hangs_before_its_first_round_or_cannot_be_interrupted_is_left_behind() {
    let run = Run::new(|config| config.sync.sites = 1);
    for (method, call) in [(Method::InnerStep, 1), (Method::Save, 1)] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let engine = with_faults(&run, &[fault(method, call, Trouble::Hang)]).uninterruptible();
        let folder = run.site_folder(&format!("{method:?}"));
        let joined = runtime.block_on(in_time(async {
            let (invite, coordinated) = coordinate(&run).await;
            let joined = join(options(0, invite, folder, SHORT), engine).await;
            coordinated.abort();
            joined
        }));
        // The thread of the engine is still there: only the end of the process ends it.
        runtime.shutdown_background();
        assert!(matches!(joined.result, Err(AgentError::EngineHung { .. })));
    }
}

#[test]
fn a_site_whose_engine_takes_long_to_start_does_not_fall_silent() {
    let run = Run::new(|config| config.sync.sites = 1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (pulses, folder) = (Arc::new(Pulses::default()), run.site_folder("0"));
    let heard = Arc::clone(&pulses);
    // The first comes at once, the second after the interval that the coordinator relies on.
    let delay = move || assert!(heard.wait_for(2, PATIENCE), "it fell silent");
    let (coordinated, joined) = runtime.block_on(in_time(async {
        let (invite, coordinated) = coordinate_with(&run, pulses).await;
        let options = options(0, invite, folder, HangBounds::default());
        let joined = join_after(options, with_faults(&run, &[]), delay).await;
        (coordinated.await.unwrap(), joined)
    }));
    assert_eq!(coordinated.state_hash, Some(joined.result.unwrap().state_hash));
}

#[test]
fn an_engine_that_is_killed_does_its_round_anew_with_the_same_bits() {
    let run = Run::new(|_| {});
    let (undisturbed, ..) = run_of_two(&run, with_faults(&run, &[]), HangBounds::default());
    assert_eq!((undisturbed.rounds, undisturbed.ledger.committed), (3, 96));
    let lost = |method, call| fault(method, call, Trouble::Lost);
    for (faults, recoveries) in [
        // While the speed is measured.
        (vec![lost(Method::InnerStep, 2)], 1),
        // In the second step of round 2, and again in the last one of the second attempt.
        (vec![lost(Method::InnerStep, MEASURED + 6)], 1),
        (vec![lost(Method::InnerStep, MEASURED + 6), lost(Method::InnerStep, MEASURED + 10)], 2),
        // When the delta of round 2 is read, and when the checkpoint of round 1 is saved (the first save is that of the
        // measurement).
        (vec![lost(Method::Read, 2)], 1),
        (vec![lost(Method::Save, 2)], 1),
    ] {
        let engine = with_faults(&run, &faults);
        let counted = Arc::clone(&engine.recoveries);
        let again = Run::new(|_| {});
        let (coordinated, first, second) = run_of_two(&again, engine, HangBounds::default());
        assert_eq!(counted.load(Ordering::Relaxed), recoveries, "{faults:?}");
        assert_eq!(coordinated.state_hash, undisturbed.state_hash, "{faults:?}");
        assert_eq!(coordinated.state_hash, Some(first.result.unwrap().state_hash));
        assert_eq!(coordinated.state_hash, Some(second.result.unwrap().state_hash));
        assert_eq!(coordinated.ledger, undisturbed.ledger, "nothing counts twice: {faults:?}");
        let restarts = second.events.iter().filter(|event| matches!(event, Event::EngineRestarted { .. })).count();
        assert_eq!(restarts, recoveries);
    }
}

#[test]
fn an_engine_that_is_killed_while_it_takes_a_commit_goes_on_with_the_new_parameters() {
    let run = Run::new(|_| {});
    // The first write begins round 1, the second takes its commit.
    let engine = with_faults(&run, &[fault(Method::Write, 2, Trouble::Lost)]);
    let (coordinated, first, second) = run_of_two(&run, engine, HangBounds::default());
    assert_eq!((coordinated.rounds, coordinated.ledger.committed), (3, 96));
    assert_eq!(coordinated.state_hash, Some(first.result.unwrap().state_hash));
    assert_eq!(coordinated.state_hash, Some(second.result.unwrap().state_hash));
}

#[test]
fn an_engine_that_is_killed_again_and_again_leaves_and_the_others_go_on() {
    let run = Run::new(|_| {});
    let faults: Vec<Fault> =
        (0..3).map(|attempt| fault(Method::InnerStep, MEASURED + 6 + attempt, Trouble::Lost)).collect();
    let engine = with_faults(&run, &faults);
    let recoveries = Arc::clone(&engine.recoveries);
    let ended = run_of_two(&run, engine, HangBounds::default());
    assert_dropped(&run, &ended, LeaveReason::EngineFailed, 1);
    assert_eq!(recoveries.load(Ordering::Relaxed), 2);
    assert_eq!(ended.2.error(), "the engine on test is gone: signal 9");
}
