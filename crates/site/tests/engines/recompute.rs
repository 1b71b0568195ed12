//! Devices that now and then compute something wrong, and say nothing of it.

use super::{Joined, MEASURED, fault, in_time, join, options, run_of_two, trainer, with_faults};
use crate::support::{Coordinated, Fault, Method, Run, TestEngine, Trouble, coordinate};
use base::config::Codec;
use base::{Hint, Round, SiteId, Term};
use rounds::coordinator::Note;
use rounds::plan::LeaveReason;
use rounds::recompute::choose;
use rounds::{
    Assignment, FragmentPlan, RoundPlan, SampleRange, StepCheck, StepMismatch, StepQuantity, StepVerdict, schedule,
};
use site::{AgentError, HangBounds, Progress};
use std::sync::atomic::AtomicBool;
use telemetry::Event;

const STEPS: u64 = 4;

fn assignment(site: u32) -> Assignment {
    let lease = vec![SampleRange { start: 16 * u64::from(site), end: 16 * u64::from(site) + 16 }];
    Assignment { site: SiteId(site), samples: 16, steps: STEPS, lease, share: 0.5 }
}

/// Round 1 of the run, which makes this step of site 0 twice.
fn plan(step: Option<u64>) -> RoundPlan {
    RoundPlan {
        term: Term(1),
        round: Round(1),
        attempt: 1,
        first_step: 0,
        steps: STEPS,
        fragment: FragmentPlan { index: 0, count: 1, codec: Codec::F32, rank: 0 },
        effects: schedule::effects(Round(1), STEPS, 0),
        assignments: vec![assignment(0)],
        parts: Vec::new(),
        check: step.map(|step| StepCheck { site: SiteId(0), step }),
    }
}

/// Trains that round; gives whether all steps were made, what the check has shown, and the engine's state.
fn trained(run: &Run, faults: &[Fault], check: Option<u64>) -> (bool, Option<StepVerdict>, engine::EngineState) {
    let mut trainer = trainer(run, TestEngine::new(&run.config, faults));
    let (plan, abandon, mut progress, mut steps) = (plan(check), AtomicBool::new(false), Progress::default(), 0);
    let done = trainer.train((&plan, &assignment(0)), 0..STEPS, &mut progress, &abandon, &mut |_| steps += 1).unwrap();
    assert_eq!(done, steps == STEPS);
    (done, progress.verdict(), trainer.engine().save().unwrap())
}

#[test]
fn a_step_that_is_made_twice_counts_once_and_changes_no_bit() {
    for strategy in [base::config::Strategy::DiLoCo, base::config::Strategy::Synchronous] {
        let run = Run::new(|config| {
            config.sync.strategy = strategy;
            config.sync.inner_steps = if strategy == base::config::Strategy::DiLoCo { STEPS } else { 1 };
        });
        let (_, none, state) = trained(&run, &[], None);
        assert_eq!(none, None);
        for step in 0..STEPS {
            let (done, verdict, checked) = trained(&run, &[], Some(step));
            let verdict = verdict.unwrap();
            assert!(done && verdict.mismatch.is_none() && verdict.is_acceptable(), "{verdict:?}");
            assert_eq!(verdict.step, step + 1);
            assert_eq!(checked, state);
        }
    }
}

#[test]
fn one_bit_that_flips_in_either_of_two_computations_is_found_and_the_step_undone() {
    let run = Run::new(|_| {});
    // Step 2 is made by the calls 3 and 4; what is wrong elsewhere is not looked for.
    for (call, is_found) in [(2, false), (3, true), (4, true), (5, false)] {
        let (done, verdict, state) = trained(&run, &[fault(Method::InnerStep, call, Trouble::FlippedBit)], Some(2));
        let verdict = verdict.unwrap();
        assert_eq!((done, verdict.mismatch.is_some()), (!is_found, is_found), "call {call}");
        if let Some(StepMismatch { quantity, difference, bound }) = verdict.mismatch {
            assert_eq!((quantity, bound), (StepQuantity::Movement, 0.0));
            assert!(difference > 0.0 && verdict.is_acceptable());
            assert_eq!(state.optimizer_steps, 2, "nobody knows which of the two was right");
        }
    }
}

#[test]
fn a_device_that_is_wrong_the_same_way_each_time_is_not_found_by_itself() {
    let run = Run::new(|_| {});
    let always: Vec<Fault> = (1..=5).map(|call| fault(Method::InnerStep, call, Trouble::FlippedBit)).collect();
    let (done, verdict, _) = trained(&run, &always, Some(2));
    assert!(done && verdict.unwrap().mismatch.is_none());
}

/// A run of two sites in which each round makes a step twice; in round 1 it is this step of site 1.
fn run_with_checks(rounds: u64) -> (Run, u64) {
    let assignments = [assignment(0), assignment(1)];
    let drawn = |seed| choose(seed, 1.0, (Term(1), Round(1), 1), &assignments);
    let seed = (0..).find(|seed| drawn(*seed).is_some_and(|check| check.site == SiteId(1))).unwrap();
    let run = Run::new(|config| {
        config.run.seed = seed;
        config.sync.recompute_share = 1.0;
        config.train.steps = STEPS * rounds;
    });
    (run, drawn(seed).unwrap().step)
}

fn mismatches(notes: &[Note]) -> Vec<(u32, Round, u64)> {
    let found = notes.iter().filter_map(|note| match note {
        Note::StepRecomputed { site, round, verdict, .. } if verdict.mismatch.is_some() => {
            Some((site.0, *round, verdict.step))
        }
        _ => None,
    });
    found.collect()
}

#[test]
fn a_site_with_a_wrong_step_is_named_and_its_delta_left_out() {
    let (run, step) = run_with_checks(6);
    // The second of the two computations of that step.
    let wrong = fault(Method::InnerStep, MEASURED + step + 2, Trouble::FlippedBit);
    let (coordinated, first, second) = run_of_two(&run, with_faults(&run, &[wrong]), HangBounds::default());
    assert_eq!(mismatches(&coordinated.notes), [(1, Round(1), step + 1)]);
    let contributors = coordinated.notes.iter().find_map(|note| match note {
        Note::Committed { commit, .. } if commit.round == Round(1) => Some(commit.contributors.clone()),
        _ => None,
    });
    assert_eq!(contributors.unwrap().iter().map(|one| one.site).collect::<Vec<_>>(), [SiteId(0)]);
    // Its samples of round 1 came back, and it went on with the others.
    assert!(coordinated.ledger.returned >= 16, "{:?}", coordinated.ledger);
    assert_eq!((coordinated.ledger.lost, coordinated.ledger.open, coordinated.rounds), (0, 0, 6));
    assert_eq!(coordinated.state_hash, Some(first.result.unwrap().state_hash));
    assert_eq!(coordinated.state_hash, Some(second.result.unwrap().state_hash));
    let told = second.events.iter().any(|event| matches!(event, Event::StepMismatch { site: SiteId(1), .. }));
    assert!(told, "{:?}", second.events);
    // All others agree, and are told of.
    let passed = coordinated.notes.iter().filter(|note| match note {
        Note::StepRecomputed { engine, verdict, .. } => engine == "test" && verdict.mismatch.is_none(),
        _ => false,
    });
    assert!(passed.count() >= 4, "{:?}", coordinated.notes);
}

#[test]
fn a_site_whose_steps_are_wrong_again_and_again_is_out() {
    let (run, _) = run_with_checks(40);
    // Of two computations one after the other one is wrong.
    let wrong: Vec<Fault> =
        (2..400).step_by(2).map(|call| fault(Method::InnerStep, call, Trouble::FlippedBit)).collect();
    let (coordinated, first, second) = run_of_two(&run, with_faults(&run, &wrong), HangBounds::default());
    assert_eq!(coordinated.left(1), Some(LeaveReason::StepsDiffer));
    assert_eq!(mismatches(&coordinated.notes).iter().map(|(site, ..)| *site).collect::<Vec<_>>(), [1, 1]);
    assert!(first.result.unwrap().finished);
    let error = second.result.unwrap_err();
    assert!(matches!(error, AgentError::Dropped(LeaveReason::StepsDiffer)), "{error}");
    assert!(error.hint().unwrap().contains("beringia doctor"), "{error}");
}

/// A run of three sites, in which after each round others recompute a step; the last site has such an engine.
fn run_of_three(bias: f32) -> (Coordinated, [Joined; 3]) {
    let run = Run::new(|config| {
        (config.sync.recompute_share, config.sync.witness_share) = (1.0, 1.0);
        config.sync.sites = 3;
        config.sync.shares = vec![1.0; 3];
        config.train.steps = STEPS * 8;
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let ended = runtime.block_on(in_time(async {
        let (invite, coordinated) = coordinate(&run).await;
        let site = |site: usize, bias| {
            let options = options(site, invite.clone(), run.site_folder(&site.to_string()), HangBounds::default());
            join(options, TestEngine::new(&run.config, &[]).biased(bias))
        };
        let (first, second, third) = tokio::join!(site(0, 1.0), site(1, 1.0), site(2, bias));
        (coordinated.await.unwrap(), [first, second, third])
    }));
    runtime.shutdown_background();
    ended
}

fn witnessed(notes: &[Note]) -> Vec<(u32, bool)> {
    let seen = notes.iter().filter_map(|note| match note {
        Note::StepRecomputed { site, by: Some(_), verdict, .. } => Some((site.0, verdict.mismatch.is_none())),
        _ => None,
    });
    seen.collect()
}

#[test]
fn a_device_that_is_wrong_the_same_way_each_time_is_found_by_two_others() {
    let (coordinated, [first, second, third]) = run_of_three(1.01);
    let wrong: Vec<u32> =
        witnessed(&coordinated.notes).iter().filter(|(_, is_right)| !is_right).map(|(site, _)| *site).collect();
    assert_eq!(wrong, [2, 2], "{:?}", coordinated.notes);
    assert_eq!(coordinated.left(2), Some(LeaveReason::StepsDiffer));
    assert!(matches!(third.result, Err(AgentError::Dropped(LeaveReason::StepsDiffer))));
    assert_eq!(coordinated.state_hash, Some(first.result.unwrap().state_hash));
    assert!(second.result.unwrap().finished);
    assert_eq!((coordinated.rounds, coordinated.ledger.open), (8, 0));
}

#[test]
fn sound_devices_find_nothing_in_one_another_and_end_with_the_same_bits() {
    let (coordinated, joined) = run_of_three(1.0);
    let seen = witnessed(&coordinated.notes);
    assert!(seen.len() >= 4 && seen.iter().all(|(_, is_right)| *is_right), "{seen:?}");
    assert!(mismatches(&coordinated.notes).is_empty());
    for site in joined {
        assert_eq!(coordinated.state_hash, Some(site.result.unwrap().state_hash));
    }
}
