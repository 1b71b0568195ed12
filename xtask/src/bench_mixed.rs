//! `cargo xtask bench mixed`: what mixing engines costs in speed.
//!
//! For each pair of engines `beringia lab` is run several times with the two sites held to one processor each. Every lab
//! measures each site alone, trains both together over real sockets, and measures each alone again, so that solo and mixed
//! alternate within one run. The figure is that of HETHUB (arXiv 2405.16256): committed tokens a second of the mixed run over
//! the sum of the sites' tokens a second alone. What is missing is told apart: waiting (the part of the rounds in which a
//! site did not compute, weighted by its speed), and computing more slowly beside another site than alone.

use crate::runs::{Failure, Programs, json_of, median};
use serde::Serialize;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// HETHUB's figure for AMD accelerators with others.
const EFFICIENCY_WANTED: f64 = 0.9749;

/// Settings of the bench.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Engines of the two sites of a lab; may be repeated
    #[arg(long = "pair", value_name = "ENGINE,ENGINE", default_values = ["flex,torch:cpu", "flex,wgpu"])]
    pairs: Vec<String>,
    /// Labs of each pair
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeats: usize,
    /// Rounds of each lab
    #[arg(long, value_name = "R", default_value_t = 3)]
    rounds: u64,
    /// Inner steps in a round (H); published runs have 30 to 500
    #[arg(long, value_name = "H", default_value_t = 100)]
    inner_steps: u64,
    /// Samples in an inner step, over both sites
    #[arg(long, value_name = "SAMPLES", default_value_t = 16)]
    batch_samples: usize,
    /// Time for measuring each site alone, before and after each lab
    #[arg(long, value_name = "SECONDS", default_value_t = 8.0)]
    measure_seconds: f64,
    /// Where the labs are; what is there is removed
    #[arg(long, value_name = "FOLDER", default_value = "target/bench-mixed")]
    folder: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What one lab says.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Measured {
    /// Mixed tokens a second over the sum of those alone.
    efficiency: f64,
    /// Part of the solo speed that is lost by waiting.
    waiting: f64,
    /// Faster site alone over the slower one alone.
    speed_ratio: f64,
    /// Tokens a second alone, by site.
    alone: Vec<f64>,
    /// Tokens a second in the mixed run, by site.
    mixed: Vec<f64>,
    /// Part of the tokens, by site.
    shares: Vec<f64>,
}

/// Runs all labs and prints the figures.
///
/// # Errors
/// A lab that failed, sites that do not agree, or a median under [`EFFICIENCY_WANTED`].
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let binary = options.programs.binary()?;
    if options.folder.exists() {
        fs::remove_dir_all(&options.folder)?;
    }
    fs::create_dir_all(&options.folder)?;
    let texts = options.programs.texts(&options.folder)?;
    let mut results = Vec::new();
    for (number, pair) in options.pairs.iter().enumerate() {
        let mut measured = Vec::new();
        for repeat in 0..options.repeats {
            let folder = options.folder.join(format!("{number}-{repeat}"));
            let found = lab(options, &binary, &texts, pair, &folder)?;
            if !options.json {
                println!("{pair} {}: {}", repeat + 1, line(&found));
            }
            measured.push(found);
        }
        results.push((pair.clone(), measured));
    }
    report(options, &results)
}

fn lab(options: &Options, binary: &Path, texts: &Path, pair: &str, folder: &Path) -> Result<Measured, Failure> {
    let (first, second) = pair.split_once(',').ok_or("a pair is two engines, as in flex,torch:cpu")?;
    let mut command = options.programs.command(binary);
    command.args(["--json", "lab", "--data"]).arg(texts).arg("--folder").arg(folder);
    for (core, engine) in [first, second].into_iter().enumerate() {
        command.args(["--site", &format!("{engine},threads=1,cores={core}")]);
    }
    command.args(["--rounds", &options.rounds.to_string()]);
    command.args(["--measure-seconds", &options.measure_seconds.to_string()]);
    // Validations and saves at the beginning and the end only: they belong to no site's training.
    let rarely = options.rounds + 1;
    for setting in [
        format!("sync.inner_steps={}", options.inner_steps),
        format!("train.batch_samples={}", options.batch_samples),
        format!("train.micro_batch_samples={}", options.batch_samples),
        format!("evaluate.every_rounds={rarely}"),
        format!("checkpoint.every_rounds={rarely}"),
        "evaluate.sample_tokens=0".to_owned(),
        "evaluate.samples_max=8".to_owned(),
    ] {
        command.args(["--set", &setting]);
    }
    let report = json_of(&mut command)?;
    if report["identical"] != Value::Bool(true) {
        return Err(format!("{pair}: the sites do not hold the same model: {}", folder.display()).into());
    }
    measure(&report).ok_or_else(|| format!("{pair}: the lab's report lacks a figure: {report}").into())
}

fn measure(report: &Value) -> Option<Measured> {
    let sites = report["sites"].as_array()?;
    let figures = |key: &str| sites.iter().map(|site| site[key].as_f64()).collect::<Option<Vec<f64>>>();
    let (alone, mixed, shares) =
        (figures("tokens_per_second_alone")?, figures("tokens_per_second")?, figures("share")?);
    let (compute, idle) = (figures("compute_seconds")?, figures("idle_seconds")?);
    let total: f64 = alone.iter().sum();
    let waits = compute.iter().zip(&idle).map(|(compute, idle)| idle / (compute + idle));
    let waiting = waits.zip(&alone).map(|(part, speed)| part * speed).sum::<f64>() / total;
    let fastest = alone.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let slowest = alone.iter().copied().fold(f64::INFINITY, f64::min);
    let efficiency = mixed.iter().sum::<f64>() / total;
    Some(Measured { efficiency, waiting, speed_ratio: fastest / slowest, alone, mixed, shares })
}

fn line(measured: &Measured) -> String {
    let list = |values: &[f64]| values.iter().map(|value| format!("{value:.0}")).collect::<Vec<_>>().join(" + ");
    format!(
        "efficiency {:.4}, waiting {:.4}, alone {} tokens/s, mixed {} tokens/s, speeds 1:{:.1}",
        measured.efficiency,
        measured.waiting,
        list(&measured.alone),
        list(&measured.mixed),
        measured.speed_ratio
    )
}

fn report(options: &Options, results: &[(String, Vec<Measured>)]) -> Result<(), Failure> {
    let medians =
        |of: fn(&Measured) -> f64, measured: &[Measured]| median(&measured.iter().map(of).collect::<Vec<f64>>());
    let mut short = Vec::new();
    let mut objects = Vec::new();
    for (pair, measured) in results {
        let efficiency = medians(|found| found.efficiency, measured);
        let waiting = medians(|found| found.waiting, measured);
        let speed_ratio = medians(|found| found.speed_ratio, measured);
        let lowest = measured.iter().map(|found| found.efficiency).fold(f64::INFINITY, f64::min);
        let highest = measured.iter().map(|found| found.efficiency).fold(f64::NEG_INFINITY, f64::max);
        if efficiency.is_nan() || efficiency < EFFICIENCY_WANTED {
            short.push(format!("{pair} {efficiency:.4}"));
        }
        if !options.json {
            println!(
                "{pair}: median {efficiency:.4} ({lowest:.4} to {highest:.4}) of the sum alone, speeds 1:{speed_ratio:.1}; \
                 {waiting:.4} waiting, {:.4} slower side by side",
                1.0 - efficiency - waiting
            );
        }
        objects.push(json!({
            "pair": pair, "efficiency": efficiency, "efficiency_min": lowest, "efficiency_max": highest,
            "waiting": waiting, "slower_side_by_side": 1.0 - efficiency - waiting, "speed_ratio": speed_ratio,
            "labs": measured,
        }));
    }
    if options.json {
        println!("{}", json!({ "wanted": EFFICIENCY_WANTED, "inner_steps": options.inner_steps, "pairs": objects }));
    }
    match short.is_empty() {
        true => Ok(()),
        false => Err(format!("under {EFFICIENCY_WANTED}: {}", short.join(", ")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_apart() {
        let site = |alone: f64, mixed: f64, compute: f64, idle: f64| {
            json!({
                "tokens_per_second_alone": alone, "tokens_per_second": mixed, "share": 0.5,
                "compute_seconds": compute, "idle_seconds": idle,
            })
        };
        let report = json!({ "sites": [site(300.0, 270.0, 95.0, 5.0), site(100.0, 90.0, 90.0, 10.0)] });
        let found = measure(&report).unwrap();
        assert!((found.efficiency - 0.9).abs() < 1e-12);
        // 5 % of three quarters and 10 % of one quarter of the speed.
        assert!((found.waiting - 0.0625).abs() < 1e-12);
        assert_eq!(found.speed_ratio, 3.0);
        assert_eq!(measure(&json!({ "sites": [{}] })), None);
    }
}
