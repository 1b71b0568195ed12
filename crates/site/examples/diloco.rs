//! `cargo run --release -p site --example diloco -- RUN`: the run's sites one after the other in one process.
//!
//! For trying `[sync]` and `[train]` settings on a machine with few cores: the numbers are those of `beringia serve` and
//! `join` with the same `run.toml`, without sockets, checkpoints or waiting. Prints a JSON line for each validation.

#![allow(clippy::print_stdout, reason = "a program for the terminal")]

use base::{RunConfig, SiteId, Term};
use engine::PrecisionChoice;
use engine_burn::BurnEngine;
use rounds::shares::portions;
use rounds::{Assignment, Commit, Contributor, Ledger, RoundPlan};
use site::{GlobalState, RunFolder, Trainer, TrainingState};
use std::sync::atomic::AtomicBool;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let folder = std::env::args().nth(1).ok_or("usage: diloco RUN, a folder that `beringia init` has made")?;
    let folder = RunFolder::new(folder);
    let (config, _) = folder.config()?;
    let state = TrainingState::initial(&config, &engine::initial_parameters(&config.model, config.run.seed))?;
    let trainer = || -> Result<Trainer, Failure> {
        let engine =
            BurnEngine::new(&config.model, &config.train, "flex", PrecisionChoice::Auto, &state.inner.parameters)?;
        Ok(Trainer::new(&folder, &config, Box::new(engine), 1.0)?)
    };
    let mut trainers = (0..config.sync.sites).map(|_| trainer()).collect::<Result<Vec<_>, _>>()?;
    let (mut global, mut ledger) = (state.global, Ledger::default());
    let rounds_total = config.train.steps.div_ceil(config.steps_per_round());
    print_validation(&mut trainers[0], 0)?;
    for round in 1..=rounds_total {
        let plan = plan(&config, &mut ledger, round);
        run_round(&mut trainers, &plan, &mut ledger, &mut global)?;
        if round.is_multiple_of(config.evaluate.every_rounds) || round == rounds_total {
            print_validation(&mut trainers[0], (round * config.steps_per_round()).min(config.train.steps))?;
        }
    }
    Ok(())
}

fn print_validation(trainer: &mut Trainer, step: u64) -> Result<(), Failure> {
    let evaluation = trainer.evaluate()?;
    let (nats, bits) = (evaluation.nats_per_token, evaluation.bits_per_byte);
    println!("{{\"step\":{step},\"nats_per_token\":{nats:.5},\"bits_per_byte\":{bits:.5}}}");
    Ok(())
}

fn plan(config: &RunConfig, ledger: &mut Ledger, round: u64) -> RoundPlan {
    let first_step = (round - 1) * config.steps_per_round();
    let steps = config.steps_per_round().min(config.train.steps - first_step);
    let share = |site| config.sync.shares.get(site as usize).copied().unwrap_or(1.0);
    let weights: Vec<f64> = (0..config.sync.sites).map(share).collect();
    let portions = portions(config.train.batch_samples as u64, steps, &weights);
    let round = base::Round(round);
    let assignments = (0..).map(SiteId).zip(portions).zip(weights).map(|((site, portion), share)| Assignment {
        site,
        samples: portion.samples,
        steps: portion.steps,
        lease: ledger.lease(round, site, portion.samples),
        share,
    });
    RoundPlan { term: Term(1), round, first_step, assignments: assignments.collect() }
}

fn run_round(
    trainers: &mut [Trainer],
    plan: &RoundPlan,
    ledger: &mut Ledger,
    global: &mut GlobalState,
) -> Result<(), Failure> {
    let never = AtomicBool::new(false);
    let (mut contributors, mut deltas) = (Vec::new(), Vec::new());
    for (trainer, assignment) in trainers.iter_mut().zip(&plan.assignments) {
        let trained = trainer
            .train(plan, assignment, &global.parameters, &never, &mut |_| {})?
            .ok_or("nobody abandons a round")?;
        ledger.commit(plan.round, assignment.site);
        let (delta_hash, delta_bytes) = (base::ContentHash::default(), 0);
        contributors.push(Contributor { site: assignment.site, tokens: trained.tokens, delta_hash, delta_bytes });
        deltas.push((trained.tokens, trained.delta));
    }
    let commit = Commit { term: plan.term, round: plan.round, contributors, cursor: ledger.cursor() };
    let deltas: Vec<(u64, &[f32])> = deltas.iter().map(|(tokens, delta)| (*tokens, delta.as_slice())).collect();
    let before = global.clone();
    for trainer in trainers {
        *global = before.clone();
        trainer.apply(&commit, &deltas, global)?;
    }
    Ok(())
}
