//! `beringia measure`: the speed of one engine alone, for `lab` and for comparisons.

use crate::engines::EngineArgs;
use crate::failure::Failure;
use crate::output::Output;
use site::{RunFolder, Trainer};
use std::path::PathBuf;

/// Measure training tokens a second of this machine alone on a run
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the run.
    run: PathBuf,
    /// Samples in an inner step; the run's whole batch unless given.
    #[arg(long, value_name = "N")]
    samples: Option<u64>,
    /// How long to measure.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    seconds: f64,
    /// Make every inner step take this many times as long.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    slowdown: f64,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    if !(0.0..=600.0).contains(&args.seconds) || !(1.0..=1e4).contains(&args.slowdown) {
        return Err(Failure::new("--seconds must be 0 to 600, --slowdown 1 to 10000", "leave them out"));
    }
    let folder = RunFolder::new(&args.run);
    let (config, _) = folder.config()?;
    let (state, _) = folder.newest(&config)?;
    let engine = args.engine.create(&config, &state.inner.parameters)?;
    let mut trainer = Trainer::new(&folder, &config, engine, args.slowdown)?;
    let samples = args.samples.unwrap_or(config.train.batch_samples as u64).max(1);
    let tokens_per_second = trainer.measure(samples, args.seconds)?;
    output.object(&serde_json::json!({ "tokens_per_second": tokens_per_second, "samples": samples }));
    output.line(format_args!("{tokens_per_second:.0} tokens/s with {samples} samples a step"));
    Ok(())
}
