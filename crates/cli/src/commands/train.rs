//! `beringia train`: one site alone.

use crate::engines::EngineArgs;
use crate::failure::Failure;
use crate::models::refresh_initial_state;
use crate::output::Output;
use crate::signals::{runtime, stop_flag};
use crate::watch::Watch;
use base::Hint;
use site::{RunFolder, Trainer, train_alone};
use std::path::PathBuf;
use telemetry::log::system_unix_ms;
use telemetry::{Event, EventLog, Reporter};

/// Train a run on this machine alone; resumes where it stopped
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the run.
    run: PathBuf,
    /// Train at most up to this inner step of the run.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let folder = RunFolder::new(&args.run);
    let (config, _) = folder.config()?;
    refresh_initial_state(&folder, &config, output)?;
    let runtime = runtime()?;
    let stop = stop_flag(&runtime);
    let log = EventLog::open(&folder.events(), "train", Box::new(system_unix_ms))?;
    let mut reporter = Reporter::new(log, Watch::new(output, &config).watcher());
    if let Some((message, hint)) = args.engine.warning() {
        reporter.warn(message, Some(hint));
    }
    let (state, skipped) = folder.newest(&config)?;
    for skipped in skipped {
        let path = skipped.path.display().to_string();
        reporter.emit(Event::CheckpointSkipped { path, reason: skipped.reason });
    }
    refuse_other_mode(&state, &args)?;
    let engine = args.engine.create(&config, &state.inner.parameters)?;
    let mut trainer = Trainer::new(&folder, &config, engine, 1.0)?;
    let step = state.saved.step;
    if step > 0 {
        output.line(format_args!("resuming at step {step} of {}", config.train.steps));
    }
    reporter.emit(Event::RunStarted {
        run: config.run.name.clone(),
        strategy: "alone".to_owned(),
        sites: 1,
        parameters: config.schema().elements() as u64,
        tokens_planned: config.train.steps * (config.train.batch_samples * config.data.sequence_length) as u64,
        rounds_planned: config.train.steps.div_ceil(config.steps_per_round()),
        engine: Some(args.engine.engine.clone()),
        resumed_round: (step > 0).then_some(state.saved.commit.round),
    });
    let outcome =
        train_alone(&folder, &config, &mut trainer, state, args.steps, &stop, &mut reporter).map_err(|error| {
            let hint = error.hint().unwrap_or_default();
            Failure::new(error.to_string(), hint)
        })?;
    runtime.shutdown_background();
    if !outcome.saved {
        return Err(not_saved(&args, outcome.step));
    }
    let verdict = if outcome.finished { "finished" } else { "stopped; the same command goes on from here" };
    output.object(&serde_json::json!({
        "run": config.run.name,
        "step": outcome.step,
        "tokens": outcome.tokens,
        "finished": outcome.finished,
        "state_hash": outcome.state_hash,
        "validation_bits_per_byte": outcome.evaluation.map(|evaluation| evaluation.bits_per_byte),
        "validation_nats_per_token": outcome.evaluation.map(|evaluation| evaluation.nats_per_token),
        "bigram_bits_per_byte": outcome.evaluation.map(|evaluation| evaluation.bigram_bits_per_byte),
    }));
    if let Some(evaluation) = outcome.evaluation {
        let (model, bigram) = (evaluation.bits_per_byte, evaluation.bigram_bits_per_byte);
        output.line(format_args!("validation {model:.4} bits/byte; a bigram model has {bigram:.4}"));
    }
    output.line(format_args!("step {} of {}, {verdict}", outcome.step, config.train.steps));
    Ok(())
}

/// Training went on without room for checkpoints; at its end the work since the last one is gone, which is no success.
fn not_saved(args: &Args, step: u64) -> Failure {
    let run = args.run.display();
    let message = format!("{run}: step {step} could not be saved; the run stands at its last checkpoint");
    Failure::new(message, format!("make room (`df -h {run}`), then `beringia train {run}` goes on from there"))
}

/// A run that several sites have trained is not continued alone: its rounds are the coordinator's.
fn refuse_other_mode(state: &site::TrainingState, args: &Args) -> Result<(), Failure> {
    if state.saved.mode == site::Mode::Sites {
        let message = format!("{}: this folder belongs to a site of a larger run", args.run.display());
        return Err(Failure::new(message, "go on with `beringia join INVITE`, or `beringia export` and a new run"));
    }
    Ok(())
}
