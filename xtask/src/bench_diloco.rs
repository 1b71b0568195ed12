//! `cargo xtask bench diloco`: what it costs a model to be trained by sites that meet only every H steps.
//!
//! For each seed the same run is trained twice with the released binary: by `train` alone, and by `serve` with one `join`
//! a site, as processes on this machine. Both see the same samples in the same order, as many in a step, with the same
//! learning rates. The result is the quotient of their final validation losses; the curves are drawn as a picture.

use crate::chart::{Chart, Panel, Series};
use crate::runs::{Curve, Failure, Process, Programs, json_of, mean, train_sites, wait_for};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Largest quotient of the final losses, sites over one site, with which the bench succeeds.
const RATIO_MAX: f64 = 1.02;

/// Warm-up, as a part of all steps; what `beringia init` chooses too.
const WARMUP_DIVISOR: u64 = 20;

/// Settings of a comparison.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Seeds of weights and data order; several give a mean
    #[arg(long, value_name = "SEED", value_delimiter = ',', default_value = "1")]
    seeds: Vec<u64>,
    /// Inner steps of each training
    #[arg(long, value_name = "N", default_value_t = 200)]
    steps: u64,
    /// Samples in an inner step, over all sites
    #[arg(long, value_name = "SAMPLES", default_value_t = 72)]
    batch_samples: usize,
    /// Peak of the inner learning rate
    #[arg(long, value_name = "RATE", default_value_t = 0.004)]
    learning_rate: f64,
    /// Inner steps between two merges (H)
    #[arg(long, value_name = "H", default_value_t = 20)]
    inner_steps: u64,
    /// Part of the batch that each site takes
    #[arg(long, value_name = "PARTS", value_delimiter = ',', default_value = "1,1,1")]
    shares: Vec<f64>,
    /// Another key of run.toml, for both trainings; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    settings: Vec<String>,
    /// Threads of each process
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: u16,
    /// Where the runs are made; what is there is removed
    #[arg(long, value_name = "FOLDER", default_value = "target/bench-diloco")]
    folder: PathBuf,
    /// Where the picture goes
    #[arg(long, value_name = "FILE", default_value = "docs/diloco.svg")]
    picture: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The two trainings of one seed.
#[derive(Debug)]
struct Comparison {
    seed: u64,
    one: Curve,
    sites: Curve,
}

impl Comparison {
    /// Final loss of the sites over that of one site.
    fn ratio(&self) -> f64 {
        self.sites.last_nats() / self.one.last_nats()
    }
}

/// Runs the comparison, prints it and draws it.
///
/// # Errors
/// No texts, a process that failed, or a loss more than [`RATIO_MAX`] times that of one site.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let binary = options.programs.binary()?;
    if options.folder.exists() {
        fs::remove_dir_all(&options.folder)?;
    }
    fs::create_dir_all(&options.folder)?;
    let bench = Bench { options, binary, texts: options.programs.texts(&options.folder)? };
    let compared = options.seeds.iter().map(|seed| bench.compare(*seed)).collect::<Result<Vec<_>, _>>()?;
    fs::write(&options.picture, chart(options, &compared).svg())?;
    report(options, &compared)
}

struct Bench<'a> {
    options: &'a Options,
    binary: PathBuf,
    texts: PathBuf,
}

impl Bench<'_> {
    fn compare(&self, seed: u64) -> Result<Comparison, Failure> {
        let folder = self.options.folder.join(format!("seed-{seed}"));
        fs::create_dir_all(&folder)?;
        let (one, sites) = (folder.join("one"), folder.join("sites"));
        let (first, second) = (self.init(&one, seed)?, self.init(&sites, seed)?);
        if first["state_hash"] != second["state_hash"] || first["data_hash"] != second["data_hash"] {
            return Err("the two runs do not begin with the same model and data: this is a bug".into());
        }
        let step_tokens = first["step_tokens"].as_f64().ok_or("init names no step_tokens")?;
        self.say(format_args!("seed {seed}: one site, {} steps", self.options.steps));
        self.train_alone(&one)?;
        self.say(format_args!("seed {seed}: {} sites, H {}", self.options.shares.len(), self.options.inner_steps));
        let threads = self.options.threads.to_string();
        let engines = vec![vec!["--threads".to_owned(), threads]; self.options.shares.len()];
        train_sites(&self.options.programs, &self.binary, &sites, &engines)?;
        Ok(Comparison { seed, one: Curve::of_run(&one, step_tokens)?, sites: Curve::of_run(&sites, step_tokens)? })
    }

    fn say(&self, what: std::fmt::Arguments<'_>) {
        if !self.options.json {
            println!("{what} ...");
        }
    }

    /// Makes a run and gives what `init --json` says of it.
    fn init(&self, run: &Path, seed: u64) -> Result<Value, Failure> {
        let Options { steps, batch_samples, learning_rate, inner_steps, shares, settings, .. } = self.options;
        let shares: Vec<String> = shares.iter().map(|share| format!("{share:?}")).collect();
        let fixed = [
            format!("run.seed={seed}"),
            format!("train.steps={steps}"),
            format!("train.warmup_steps={}", steps / WARMUP_DIVISOR),
            format!("train.batch_samples={batch_samples}"),
            format!("train.learning_rate={learning_rate:?}"),
            format!("sync.inner_steps={inner_steps}"),
            format!("sync.sites={}", shares.len()),
            format!("sync.shares=[{}]", shares.join(", ")),
            "evaluate.every_rounds=1".to_owned(),
            "evaluate.sample_tokens=0".to_owned(),
        ];
        let mut command = Command::new(&self.binary);
        command.args(["--json", "init"]).arg(run).arg("--data").arg(&self.texts);
        for setting in fixed.iter().chain(settings) {
            command.args(["--set", setting]);
        }
        json_of(&mut command)
    }

    fn train_alone(&self, run: &Path) -> Result<(), Failure> {
        let mut command = Command::new(&self.binary);
        command.arg("train").arg(run).args(["--threads", &self.options.threads.to_string()]).stdout(Stdio::null());
        wait_for(vec![Process::start(&mut command, run.with_extension("log"))?])
    }
}

fn report(options: &Options, compared: &[Comparison]) -> Result<(), Failure> {
    let ratio = mean(compared.iter().map(Comparison::ratio));
    if options.json {
        let curve = |curve: &Curve| {
            serde_json::json!({
                "validation_nats_per_token": curve.last_nats(),
                "validation_bits_per_byte": curve.bits_per_byte,
                "curve_tokens_nats": curve.points,
            })
        };
        let seeds = compared.iter().map(|comparison| {
            let Comparison { seed, one, sites } = comparison;
            serde_json::json!({
                "seed": seed, "ratio": comparison.ratio(), "one_site": curve(one), "sites": curve(sites),
                "bigram_bits_per_byte": one.bigram_bits_per_byte,
            })
        });
        println!(
            "{}",
            serde_json::json!({
                "ratio": ratio, "ratio_max": RATIO_MAX, "inner_steps": options.inner_steps,
                "shares": options.shares, "steps": options.steps, "batch_samples": options.batch_samples,
                "learning_rate": options.learning_rate, "seeds": seeds.collect::<Vec<_>>(),
            })
        );
    } else {
        println!("seed   one site   {} sites    ratio   (validation, nats per token)", options.shares.len());
        for comparison in compared {
            let (one, sites) = (comparison.one.last_nats(), comparison.sites.last_nats());
            println!("{:>4} {one:>10.4} {sites:>9.4} {:>8.4}", comparison.seed, comparison.ratio());
        }
        println!("ratio {ratio:.4}; curves in {}", options.picture.display());
    }
    // NaN is not within the bound either.
    if ratio <= RATIO_MAX {
        return Ok(());
    }
    Err(format!("the sites' loss is {ratio:.4} times that of one site, wanted is at most {RATIO_MAX}").into())
}

fn chart(options: &Options, compared: &[Comparison]) -> Chart {
    const ONE_COLOR: &str = "#1f5fa8";
    const SITES_COLOR: &str = "#d2691e";
    const BOUND_COLOR: &str = "#888888";
    let series = |name: &str, color, points| Series { name: name.to_owned(), color, dashed: false, points };
    let sites = format!("{} sites, diloco, H = {}", options.shares.len(), options.inner_steps);
    let (mut losses, mut ratios) = (Vec::new(), Vec::new());
    for Comparison { one, sites: several, .. } in compared {
        losses.push(series("one site", ONE_COLOR, Curve::millions(&one.points)));
        losses.push(series(&sites, SITES_COLOR, Curve::millions(&several.points)));
        let quotients = one.points.iter().zip(&several.points).map(|(one, several)| (one.0, several.1 / one.1));
        ratios.push(series("sites / one site", SITES_COLOR, Curve::millions(&quotients.collect::<Vec<_>>())));
    }
    let ends = compared.first().map(|first| first.one.points.clone()).unwrap_or_default();
    let bound = ends.first().into_iter().chain(ends.last()).map(|(tokens, _)| (*tokens, RATIO_MAX));
    let points = Curve::millions(&bound.collect::<Vec<_>>());
    ratios.push(Series { name: format!("bound, {RATIO_MAX}"), color: BOUND_COLOR, dashed: true, points });
    Chart {
        title: "DiLoCo against one site: the same model, data, batch and schedule".to_owned(),
        x_title: "tokens trained on, millions".to_owned(),
        panels: vec![
            Panel { title: "validation loss, nats per token".to_owned(), height: 260.0, series: losses },
            Panel { title: "ratio of the losses".to_owned(), height: 150.0, series: ratios },
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runs::EVENTS_OF_A_RUN;

    #[test]
    fn the_picture_holds_every_curve_and_the_bound() {
        let one = Curve::parse(EVENTS_OF_A_RUN, 2_048.0).unwrap();
        let compared = [Comparison { seed: 1, one: one.clone(), sites: one }];
        assert!((compared[0].ratio() - 1.0).abs() < 1e-12);
        let options = OptionsOnly::parse_from(["bench"]).options;
        let svg = chart(&options, &compared).svg();
        for words in ["one site", "3 sites, diloco, H = 20", "bound, 1.02", "millions"] {
            assert!(svg.contains(words), "{words}: {svg}");
        }
    }

    use clap::Parser;

    #[derive(Debug, Parser)]
    struct OptionsOnly {
        #[command(flatten)]
        options: Options,
    }
}
