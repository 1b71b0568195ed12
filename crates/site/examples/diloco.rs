//! `cargo run --release -p site --example diloco -- RUN`: the run's sites one after the other in one process.
//!
//! For trying `[sync]` and `[train]` settings on a machine with few cores: the numbers are those of `beringia serve` and
//! `join` with the same `run.toml`, without sockets, checkpoints or waiting. Prints a JSON line for each validation.

#![allow(clippy::print_stdout, reason = "a program for the terminal")]

use base::{RunConfig, SiteId, Term};
use engine::PrecisionChoice;
use engine_burn::BurnEngine;
use rounds::shares::portions;
use rounds::{Assignment, Commit, Contributor, FragmentPlan, Ledger, RoundPlan, schedule};
use site::{Merger, Progress, RunFolder, Trainer, TrainingState};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};

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
    let mut sites = Vec::new();
    for site in (0..config.sync.sites).map(SiteId) {
        let merger = Merger::new(site, &config, Arc::new(RwLock::new(state.global.clone())));
        sites.push(Site { trainer: trainer()?, merger });
    }
    let mut ledger = Ledger::default();
    let rounds_total = config.train.steps.div_ceil(config.steps_per_round());
    print_validation(&mut sites[0].trainer, 0)?;
    for round in 1..=rounds_total {
        let plan = plan(&config, &mut ledger, round);
        run_round(&mut sites, &plan, &mut ledger)?;
        if round.is_multiple_of(config.evaluate.every_rounds) || round == rounds_total {
            print_validation(&mut sites[0].trainer, (round * config.steps_per_round()).min(config.train.steps))?;
        }
    }
    Ok(())
}

struct Site {
    trainer: Trainer,
    merger: Merger,
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
    let fragment = FragmentPlan { index: 0, count: 1, codec: config.sync.codec, rank: 0 };
    let effects = schedule::effects(round, steps, 0);
    let (term, assignments, parts) = (Term(1), assignments.collect(), Vec::new());
    let (attempt, check) = (1, None);
    RoundPlan { term, round, attempt, first_step, steps, fragment, effects, assignments, parts, check }
}

fn run_round(sites: &mut [Site], plan: &RoundPlan, ledger: &mut Ledger) -> Result<(), Failure> {
    let never = AtomicBool::new(false);
    let (mut contributors, mut deltas) = (Vec::new(), Vec::new());
    for (Site { trainer, merger }, assignment) in sites.iter_mut().zip(&plan.assignments) {
        let (mut progress, steps) = (Progress::default(), 0..assignment.steps);
        trainer.train((plan, assignment), steps, &mut progress, &never, &mut |_| {})?;
        let whole = trainer.schema().whole();
        let local = Arc::new(trainer.snapshot(&whole, &mut progress)?);
        let delta = merger.encode(plan.round, plan.fragment, &local).map_err(|error| format!("{error:?}"))?;
        ledger.commit(plan.round, assignment.site);
        let (delta_hash, delta_bytes) = (base::ContentHash::default(), delta.len() as u64);
        let tokens = progress.loss.tokens;
        contributors.push(Contributor { site: assignment.site, tokens, delta_hash, delta_bytes });
        deltas.push(delta);
    }
    let commit = Commit {
        term: plan.term,
        round: plan.round,
        fragment: plan.fragment,
        contributors,
        cursor: ledger.cursor(),
        step: plan.first_step + plan.steps,
        samples: ledger.totals().committed,
        parts: Vec::new(),
    };
    for Site { trainer, merger } in sites {
        let merged = merger.merge(&commit, &deltas)?;
        let whole = trainer.schema().whole();
        trainer.take_over(&whole, &merged.local)?;
    }
    Ok(())
}
