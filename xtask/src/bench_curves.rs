//! `cargo xtask bench curves`: what mixing engines costs in loss.
//!
//! The same run (weights, data order, shares, so the same tokens on the same site) is trained by all-native, all-PyTorch and
//! mixed sites, for several seeds, as processes of the released binary. All that differs is the arithmetic of the engines.
//! The result is the largest relative difference of the mixed runs' final validation loss from the homogeneous ones' of the
//! same seed, and a picture of all curves.

use crate::chart::{Chart, Panel, Series};
use crate::runs::{Curve, Failure, Programs, json_of, train_sites};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Largest relative difference of the final losses with which the bench succeeds.
const DIFFERENCE_MAX: f64 = 0.003;

/// Warm-up, as a part of all steps.
const WARMUP_DIVISOR: u64 = 20;

/// Colours of the kinds of runs, in order.
const COLORS: [&str; 5] = ["#1f5fa8", "#d2691e", "#2e8b57", "#8b3a8b", "#555555"];

/// Settings of the bench.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Engines of the sites of one kind of run; may be repeated, all with as many sites. Mixed are those whose engines differ
    #[arg(long = "run", value_name = "ENGINE,ENGINE", default_values = ["flex,flex", "torch:cpu,torch:cpu", "flex,torch:cpu"])]
    runs: Vec<String>,
    /// Seeds of weights and data order
    #[arg(long, value_name = "SEED", value_delimiter = ',', default_value = "1,2,3")]
    seeds: Vec<u64>,
    /// Inner steps of each training
    #[arg(long, value_name = "N", default_value_t = 200)]
    steps: u64,
    /// Samples in an inner step, over all sites
    #[arg(long, value_name = "SAMPLES", default_value_t = 8)]
    batch_samples: usize,
    /// Inner steps between two merges (H)
    #[arg(long, value_name = "H", default_value_t = 20)]
    inner_steps: u64,
    /// Part of the batch that each site takes
    #[arg(long, value_name = "PARTS", value_delimiter = ',', default_value = "1,1")]
    shares: Vec<f64>,
    /// Where the runs are made; what is there is removed
    #[arg(long, value_name = "FOLDER", default_value = "target/bench-curves")]
    folder: PathBuf,
    /// Where the picture goes
    #[arg(long, value_name = "FILE", default_value = "docs/mixed.svg")]
    picture: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One training.
struct Trained {
    engines: String,
    seed: u64,
    curve: Curve,
}

impl Trained {
    fn is_mixed(&self) -> bool {
        let mut engines = self.engines.split(',');
        let first = engines.next();
        engines.any(|engine| Some(engine) != first)
    }
}

/// Trains everything, prints the final losses and draws the curves.
///
/// # Errors
/// A process that failed, or a mixed run further than [`DIFFERENCE_MAX`] from a homogeneous one.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    if options.runs.iter().any(|run| run.split(',').count() != options.shares.len()) {
        return Err("every --run needs as many engines as there are --shares".into());
    }
    let binary = options.programs.binary()?;
    if options.folder.exists() {
        fs::remove_dir_all(&options.folder)?;
    }
    fs::create_dir_all(&options.folder)?;
    let texts = options.programs.texts(&options.folder)?;
    let mut trained = Vec::new();
    for seed in &options.seeds {
        for (number, engines) in options.runs.iter().enumerate() {
            let run = options.folder.join(format!("seed-{seed}-{number}"));
            let curve = train(options, &binary, &texts, engines, *seed, &run)?;
            if !options.json {
                println!("seed {seed}, {engines}: {:.5} nats per token", curve.last_nats());
            }
            trained.push(Trained { engines: engines.clone(), seed: *seed, curve });
        }
    }
    fs::write(&options.picture, chart(options, &trained).svg())?;
    report(options, &trained)
}

fn train(
    options: &Options,
    binary: &Path,
    texts: &Path,
    engines: &str,
    seed: u64,
    run: &Path,
) -> Result<Curve, Failure> {
    let Options { steps, batch_samples, inner_steps, shares, .. } = options;
    let shares: Vec<String> = shares.iter().map(|share| format!("{share:?}")).collect();
    let mut command = options.programs.command(binary);
    command.args(["--json", "init"]).arg(run).arg("--data").arg(texts);
    for setting in [
        format!("run.seed={seed}"),
        format!("train.steps={steps}"),
        format!("train.warmup_steps={}", steps / WARMUP_DIVISOR),
        format!("train.batch_samples={batch_samples}"),
        format!("sync.inner_steps={inner_steps}"),
        format!("sync.sites={}", shares.len()),
        format!("sync.shares=[{}]", shares.join(", ")),
        "evaluate.every_rounds=1".to_owned(),
        "evaluate.sample_tokens=0".to_owned(),
        "checkpoint.every_rounds=1000".to_owned(),
        // Losses are compared, not times: nobody is dropped for being slow on a busy machine.
        "sync.deadline_seconds=3600.0".to_owned(),
    ] {
        command.args(["--set", &setting]);
    }
    let made = json_of(&mut command)?;
    let step_tokens = made["step_tokens"].as_f64().ok_or("init names no step_tokens")?;
    let arguments = |engine: &str| ["--engine", engine, "--threads", "1"].map(str::to_owned).to_vec();
    let sites: Vec<Vec<String>> = engines.split(',').map(arguments).collect();
    train_sites(&options.programs, binary, run, &sites)?;
    Curve::of_run(run, step_tokens)
}

/// Relative difference of a mixed run from each homogeneous one of its seed.
fn differences(trained: &[Trained]) -> Vec<(u64, String, f64)> {
    let mut found = Vec::new();
    for mixed in trained.iter().filter(|run| run.is_mixed()) {
        for other in trained.iter().filter(|run| !run.is_mixed() && run.seed == mixed.seed) {
            let difference = mixed.curve.last_nats() / other.curve.last_nats() - 1.0;
            found.push((mixed.seed, format!("{} against {}", mixed.engines, other.engines), difference));
        }
    }
    found
}

fn report(options: &Options, trained: &[Trained]) -> Result<(), Failure> {
    let found = differences(trained);
    let largest = found.iter().map(|(_, _, difference)| difference.abs()).fold(f64::NAN, f64::max);
    if options.json {
        let runs = trained.iter().map(|run| {
            json!({ "seed": run.seed, "engines": run.engines, "nats_per_token": run.curve.last_nats(),
                    "curve_tokens_nats": run.curve.points })
        });
        let differences: Vec<Value> = found
            .iter()
            .map(|(seed, what, difference)| json!({ "seed": seed, "what": what, "difference": difference }))
            .collect();
        let runs: Vec<Value> = runs.collect();
        println!(
            "{}",
            json!({ "largest": largest, "wanted": DIFFERENCE_MAX, "differences": differences, "runs": runs })
        );
    } else {
        for (seed, what, difference) in &found {
            println!("seed {seed}: {what}: {:+.4} %", 100.0 * difference);
        }
        println!("largest {:.4} %; curves in {}", 100.0 * largest, options.picture.display());
    }
    // NaN is not within the bound either.
    if largest <= DIFFERENCE_MAX {
        return Ok(());
    }
    Err(format!("mixed runs differ by up to {largest:.5}, wanted is at most {DIFFERENCE_MAX}").into())
}

fn chart(options: &Options, trained: &[Trained]) -> Chart {
    let color = |engines: &str| {
        let number = options.runs.iter().position(|run| run == engines).unwrap_or_default();
        COLORS[number % COLORS.len()]
    };
    let series = |name: &str, color, points| Series { name: name.to_owned(), color, dashed: false, points };
    let losses = trained
        .iter()
        .map(|run| series(&run.engines.replace(',', " + "), color(&run.engines), Curve::millions(&run.curve.points)));
    let mut ratios = Vec::new();
    let mut ends = Vec::new();
    for seed in &options.seeds {
        let mut of_seed = trained.iter().filter(|run| run.seed == *seed);
        let Some(base) = of_seed.next() else { continue };
        ends =
            [base.curve.points.first(), base.curve.points.last()].into_iter().flatten().map(|point| point.0).collect();
        for run in of_seed {
            let quotients: Vec<(f64, f64)> =
                run.curve.points.iter().zip(&base.curve.points).map(|(a, b)| (a.0, a.1 / b.1)).collect();
            ratios.push(series(&run.engines.replace(',', " + "), color(&run.engines), Curve::millions(&quotients)));
        }
    }
    for bound in [1.0 + DIFFERENCE_MAX, 1.0 - DIFFERENCE_MAX] {
        let points: Vec<(f64, f64)> = ends.iter().map(|tokens| (*tokens, bound)).collect();
        let name = format!("bound, {:.1} %", 100.0 * DIFFERENCE_MAX);
        ratios.push(Series { name, color: "#888888", dashed: true, points: Curve::millions(&points) });
    }
    let base = options.runs.first().map_or_else(String::new, |run| run.replace(',', " + "));
    Chart {
        title: format!("Mixed engines: the same run, {} seeds", options.seeds.len()),
        x_title: "tokens trained on, millions".to_owned(),
        panels: vec![
            Panel { title: "validation loss, nats per token".to_owned(), height: 260.0, series: losses.collect() },
            Panel { title: format!("loss over that of {base}, same seed"), height: 150.0, series: ratios },
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_runs_are_compared_with_homogeneous_ones_of_their_seed() {
        let trained = |engines: &str, seed, nats| Trained {
            engines: engines.to_owned(),
            seed,
            curve: Curve { points: vec![(1.0, nats)], bigram_bits_per_byte: 1.0, bits_per_byte: 1.0 },
        };
        let all = [
            trained("flex,flex", 1, 4.0),
            trained("torch:cpu,torch:cpu", 1, 5.0),
            trained("flex,torch:cpu", 1, 4.4),
            trained("flex,flex", 2, 2.0),
        ];
        let found = differences(&all);
        assert_eq!(found.len(), 2);
        assert!((found[0].2 - 0.1).abs() < 1e-12 && (found[1].2 + 0.12).abs() < 1e-12);
    }
}
