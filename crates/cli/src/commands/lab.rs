//! `beringia lab`: the whole system on one machine, with the production binary.
//!
//! It makes a run, measures each site alone, then starts one coordinator and N sites as processes of this very binary that
//! talk over real sockets, watches the coordinator's event log, and reports. Sites are made unequal by an artificial delay
//! (site i takes 2^i times as long for a step), so that together they ask for less than the machine has: what they lose by
//! working together then is due to Beringia, not to a lack of cores.

use crate::commands::init::{InitOptions, Size, create};
use crate::failure::Failure;
use crate::output::Output;
use crate::run_file;
use crate::watch::Watch;
use base::layout::{EVENTS_FILE, RUN_FILE};
use base::{ContentHash, RunConfig};
use data::{Corpus, TokenizerSource};
use serde::Serialize;
use site::RunFolder;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use telemetry::{Event, Follower, Record};

/// Rust sources used where no `--data` is given: 6 MB take about 3 s to tokenise and are more than the lab trains on.
const CARGO_SOURCES_BYTES: u64 = 6 << 20;

/// Inner steps in a round of the lab, as in the benchmarks: some seconds of work. With 10 the loss was worse, not better (docs/log.md).
const INNER_STEPS: u64 = 20;

/// Most sites: each is a process with a model of its own.
const SITES_MAX: u32 = 16;

/// A child that has been told to stop has this long.
const CHILD_GRACE: Duration = Duration::from_secs(30);

/// How often the coordinator's log is looked at.
const POLL: Duration = Duration::from_millis(200);

/// A run whose log says nothing for this long is stuck.
const SILENCE_MAX: Duration = Duration::from_secs(180);

/// Train over several sites on this machine: real processes, real sockets, real text
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of sites.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=i64::from(SITES_MAX)))]
    sites: u32,
    /// Training time.
    #[arg(long, value_name = "M", default_value_t = 2.5)]
    minutes: f64,
    /// Rounds, instead of a time.
    #[arg(long, value_name = "R", conflicts_with = "minutes")]
    rounds: Option<u64>,
    /// Text to train on; the Rust sources that cargo has unpacked unless given.
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Where to keep everything; a new folder in `lab/` unless given.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Time for measuring each site alone, before and after the run.
    #[arg(long, value_name = "SECONDS", default_value_t = 4.0, hide = true)]
    measure_seconds: f64,
}

/// One site of the report.
#[derive(Debug, Clone, Serialize)]
struct SiteReport {
    name: String,
    engine: String,
    threads: u64,
    slowdown: f64,
    /// Tokens committed over the time of training.
    tokens_per_second: f64,
    /// The same site alone.
    tokens_per_second_alone: f64,
    /// Part of all committed tokens.
    share: f64,
    bytes_sent: u64,
    /// Tokens a second together over alone.
    utilisation: f64,
    hash: Option<ContentHash>,
}

/// The report; `--json` prints it as it is.
#[derive(Debug, Clone, Serialize)]
struct Report {
    sites: Vec<SiteReport>,
    rounds: u64,
    tokens: u64,
    seconds: f64,
    tokens_per_second: f64,
    utilisation: f64,
    identical: bool,
    state_hash: Option<ContentHash>,
    validation_bits_per_byte_start: Option<f64>,
    validation_bits_per_byte_end: Option<f64>,
    bigram_bits_per_byte: Option<f64>,
    ledger: telemetry::LedgerCounts,
    folder: PathBuf,
    verdict: String,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let lab = Lab::new(&args)?;
    let config = lab.make_run(&args, output)?;
    let before = lab.measure_alone(&config, output)?;
    let config = lab.plan(config, &args, &before)?;
    output.line(format_args!(
        "training   {} steps of {} samples in rounds of {}, on {} sites",
        config.train.steps, config.train.batch_samples, config.sync.inner_steps, args.sites
    ));
    let watched = lab.train(&config, output)?;
    let after = lab.measure_alone(&config, output)?;
    let alone: Vec<f64> = before.iter().zip(after).map(|(before, after)| (before + after) / 2.0).collect();
    let report = lab.report(&watched, &alone);
    output.object(&report);
    print(&report, output);
    if report.identical { Ok(()) } else { Err(Failure::new(report.verdict, "keep the folder and report it as a bug")) }
}

struct Lab {
    folder: PathBuf,
    measure_seconds: f64,
    binary: PathBuf,
    sites: Vec<SiteSpec>,
}

struct SiteSpec {
    name: String,
    threads: usize,
    slowdown: f64,
}

/// What was seen while training.
struct Watched {
    follower: Follower,
    watch: Watch,
    records: Vec<Record>,
    outcomes: Vec<serde_json::Value>,
}

impl Watched {
    fn new(log: &Path, config: &RunConfig, output: &Output) -> Self {
        let (follower, watch) = (Follower::new(log), Watch::new(output, config));
        Self { follower, watch, records: Vec::new(), outcomes: Vec::new() }
    }

    /// Takes what is new in the log; tells whether there was anything.
    fn poll(&mut self) -> Result<bool, Failure> {
        let before = self.records.len();
        for record in self.follower.poll()? {
            self.watch.see(&record);
            self.records.push(record);
        }
        Ok(self.records.len() > before)
    }

    fn sites_ready(&self) -> usize {
        self.records.iter().filter(|record| matches!(record.event, Event::SiteReady { .. })).count()
    }
}

/// A child process that does not outlive the lab.
struct Process {
    name: String,
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::new(
                format!("{name} could not be started: {error}"),
                "see that the machine has memory left: `free -h`",
            )
        };
        let stderr = std::fs::File::create(log).map_err(failed)?;
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn().map_err(failed)?;
        let Some(stdout) = child.stdout.take() else { unreachable!("stdout was asked to be piped") };
        Ok(Self { name: name.to_owned(), child, stdout: BufReader::new(stdout) })
    }

    /// Waits for the end and gives the last line of standard output as JSON.
    fn object(mut self, log: &Path) -> Result<serde_json::Value, Failure> {
        let mut text = String::new();
        // What cannot be read shows as a missing object below.
        let _unreadable = self.stdout.read_to_string(&mut text);
        let status = self.child.wait();
        let object = text.lines().last().and_then(|line| serde_json::from_str(line).ok());
        match (status, object) {
            (Ok(status), Some(object)) if status.success() => Ok(object),
            (status, _) => {
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                Err(Failure::new(format!("{} failed ({status})", self.name), format!("read {}", log.display())))
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Only a process that is still there is ended; one that was waited for is not.
        if let Ok(None) = self.child.try_wait() {
            let _gone = self.child.kill();
            let _gone = self.child.wait();
        }
    }
}

impl Lab {
    fn new(args: &Args) -> Result<Self, Failure> {
        if !(0.05..=24.0 * 60.0).contains(&args.minutes) || args.rounds == Some(0) {
            return Err(Failure::new("--minutes must be 0.05 to 1440 and --rounds at least 1", "try `--minutes 1`"));
        }
        let binary = std::env::current_exe()
            .map_err(|error| Failure::new(format!("this program's own path: {error}"), "start it by its full path"))?;
        let folder = match &args.folder {
            Some(folder) => folder.clone(),
            None => free_folder(),
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let sites = (0..args.sites).map(|index| SiteSpec {
            name: format!("site-{}", char::from(b'a' + index as u8)),
            threads: (cores / 2).max(1),
            slowdown: f64::from(1u32 << index.min(10)),
        });
        Ok(Self { folder, measure_seconds: args.measure_seconds, binary, sites: sites.collect() })
    }

    fn run_folder(&self) -> PathBuf {
        self.folder.join("run")
    }

    fn site_folder(&self, site: &SiteSpec) -> PathBuf {
        self.folder.join(&site.name)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    fn make_run(&self, args: &Args, output: &Output) -> Result<RunConfig, Failure> {
        let corpus = match &args.data {
            Some(folder) => Corpus::folder(folder)?,
            None => Corpus::cargo_sources(CARGO_SOURCES_BYTES)?,
        };
        let (root, sites) = (corpus.root().display().to_string(), args.sites);
        output.line(format_args!(
            "data       {} MB in {} files of {root}",
            corpus.file_bytes() / 1_000_000,
            corpus.files().len()
        ));
        let size = Size::Million1;
        let tokenizer = TokenizerSource::Train { vocabulary_size: LAB_VOCABULARY };
        let configure = move |config: &mut RunConfig| configure(config, sites);
        let options = InitOptions { corpus, tokenizer, size, configure: &configure };
        create(&self.run_folder(), options, &mut |_| {})?;
        let (config, _) = RunFolder::new(self.run_folder()).config()?;
        output.line(format_args!("run        {}", self.run_folder().display()));
        Ok(config)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(words);
        command
    }

    /// Tokens a second of each site alone on the machine, one after the other.
    fn measure_alone(&self, config: &RunConfig, output: &Output) -> Result<Vec<f64>, Failure> {
        let mut speeds = Vec::new();
        let weights: Vec<f64> = self.sites.iter().map(|site| 1.0 / site.slowdown).collect();
        let total: f64 = weights.iter().sum();
        for (site, weight) in self.sites.iter().zip(&weights) {
            let samples = (config.train.batch_samples as f64 * weight / total).round().max(1.0);
            let mut command = self.command(&["--json", "measure"]);
            command.arg(self.run_folder()).args(["--threads", &site.threads.to_string()]);
            command.args(["--samples", &samples.to_string(), "--seconds", &self.measure_seconds.to_string()]);
            command.args(["--slowdown", &site.slowdown.to_string()]);
            let (name, log) = (format!("measure-{}", site.name), self.log(&format!("measure-{}", site.name)));
            let object = Process::start(&name, &mut command, &log)?.object(&log)?;
            let speed = object["tokens_per_second"].as_f64().unwrap_or_default();
            let SiteSpec { name, threads, slowdown } = site;
            output.line(format_args!(
                "alone      {name}: {speed:.0} tokens/s (flex, {threads} thread(s), steps take {slowdown} times as long)"
            ));
            speeds.push(speed);
        }
        Ok(speeds)
    }

    /// Sets the number of steps by the time that is given, and writes it into `run.toml`.
    fn plan(&self, mut config: RunConfig, args: &Args, alone: &[f64]) -> Result<RunConfig, Failure> {
        let rounds = args.rounds.unwrap_or_else(|| {
            let round_tokens = config.train.batch_samples as u64 * config.data.sequence_length as u64 * INNER_STEPS;
            let tokens = args.minutes * 60.0 * alone.iter().sum::<f64>() * PLANNED_UTILISATION;
            ((tokens / round_tokens as f64) as u64).max(2)
        });
        config.train.steps = rounds * INNER_STEPS;
        config.train.warmup_steps = (config.train.steps / 20).max(1);
        config.evaluate.every_rounds = rounds.div_ceil(EVALUATIONS);
        config.checkpoint.every_rounds = rounds.div_ceil(EVALUATIONS);
        config.validate()?;
        let path = self.run_folder().join(RUN_FILE);
        std::fs::write(&path, run_file::render(&config))
            .map_err(|error| Failure::new(format!("{}: {error}", path.display()), "make room or allow writing"))?;
        Ok(config)
    }

    /// Starts everybody, watches until the coordinator ends, and collects what the sites say at their end.
    fn train(&self, config: &RunConfig, output: &Output) -> Result<Watched, Failure> {
        let mut serve = self.command(&["serve"]);
        serve.arg(self.run_folder()).args(["--listen", "127.0.0.1:0"]);
        let log = self.log("coordinator");
        let mut coordinator = Process::start("the coordinator", &mut serve, &log)?;
        let invite = read_invite(&mut coordinator, &log)?;
        let mut watched = Watched::new(&self.run_folder().join(EVENTS_FILE), config, output);
        let mut sites = Vec::new();
        for site in &self.sites {
            let mut join = self.command(&["--json", "join", &invite, "--name", &site.name]);
            join.arg("--folder").arg(self.site_folder(site)).args(["--listen", "127.0.0.1:0"]);
            join.args(["--threads", &site.threads.to_string(), "--slowdown", &site.slowdown.to_string()]);
            join.args(["--measure-seconds", &(self.measure_seconds / 2.0).to_string()]);
            sites.push(Process::start(&site.name, &mut join, &self.log(&site.name))?);
            // One after the other: each measures its speed on a quiet machine.
            let wanted = sites.len();
            self.follow(&mut watched, &mut coordinator, &mut sites, |watched| watched.sites_ready() >= wanted)?;
        }
        self.follow(&mut watched, &mut coordinator, &mut sites, |_| false)?;
        watched.watch.finish();
        for (process, site) in sites.into_iter().zip(&self.sites) {
            // A site that failed is part of the report: it has no hash.
            let outcome = process.object(&self.log(&site.name));
            watched.outcomes.push(outcome.unwrap_or(serde_json::Value::Null));
        }
        Ok(watched)
    }

    /// Follows the coordinator's log until `enough`, or until the coordinator ends.
    fn follow(
        &self,
        watched: &mut Watched,
        coordinator: &mut Process,
        sites: &mut [Process],
        enough: impl Fn(&Watched) -> bool,
    ) -> Result<(), Failure> {
        let mut heard = Instant::now();
        loop {
            // Asked before the log is read, so that nothing written before the end is missed.
            let ended = matches!(coordinator.child.try_wait(), Ok(Some(_)));
            if watched.poll()? {
                heard = Instant::now();
            }
            if ended || enough(watched) {
                return Ok(());
            }
            let all_gone = sites.iter_mut().all(|site| matches!(site.child.try_wait(), Ok(Some(_))));
            if heard.elapsed() > if all_gone { CHILD_GRACE } else { SILENCE_MAX } {
                let message = "the coordinator says nothing any more";
                return Err(Failure::new(message, format!("read the logs in {}", self.folder.display())));
            }
            std::thread::sleep(POLL);
        }
    }

    fn report(&self, watched: &Watched, alone: &[f64]) -> Report {
        let view = watched.watch.view();
        let span = TrainingSpan::of(&watched.records);
        let tokens: u64 = span.tokens.iter().sum();
        let seconds = span.seconds.max(1e-9);
        let mut sites = Vec::new();
        for (index, (site, outcome)) in self.sites.iter().zip(&watched.outcomes).enumerate() {
            let id = outcome["site"].as_u64().unwrap_or(index as u64) as usize;
            let site_tokens = span.tokens.get(id).copied().unwrap_or_default();
            let tokens_per_second = site_tokens as f64 / seconds;
            sites.push(SiteReport {
                name: site.name.clone(),
                engine: "flex".to_owned(),
                threads: site.threads as u64,
                slowdown: site.slowdown,
                tokens_per_second,
                tokens_per_second_alone: alone[index],
                share: site_tokens as f64 / tokens.max(1) as f64,
                bytes_sent: outcome["bytes_sent"].as_u64().unwrap_or_default(),
                utilisation: tokens_per_second / alone[index],
                hash: outcome["state_hash"].as_str().and_then(|text| text.parse().ok()),
            });
        }
        let first = sites.first().and_then(|site| site.hash);
        let identical = first.is_some() && sites.iter().all(|site| site.hash == first);
        let validation = view.validation.as_ref();
        let tokens_per_second = tokens as f64 / seconds;
        let mut report = Report {
            sites,
            rounds: view.round.0,
            tokens,
            seconds: span.seconds,
            tokens_per_second,
            utilisation: tokens_per_second / alone.iter().sum::<f64>(),
            identical,
            state_hash: view.state_hash,
            validation_bits_per_byte_start: validation.map(|validation| validation.bits_per_byte_start),
            validation_bits_per_byte_end: validation.map(|validation| validation.bits_per_byte),
            bigram_bits_per_byte: validation.map(|validation| validation.bigram_bits_per_byte),
            ledger: view.ledger,
            folder: self.folder.clone(),
            verdict: String::new(),
        };
        report.verdict = verdict(&report);
        report
    }
}

/// Tokens of the lab's vocabulary: small, so that a minute of training is spent on the model and not on rare tokens.
const LAB_VOCABULARY: usize = 1_024;

/// What the plan counts on, so that the time given is kept with validations and saves in it.
const PLANNED_UTILISATION: f64 = 0.85;

/// Validations and saves in a lab.
const EVALUATIONS: u64 = 5;

/// Settings that suit some minutes on a laptop.
fn configure(config: &mut RunConfig, sites: u32) {
    config.run.name = "lab".to_owned();
    config.sync.sites = sites;
    config.sync.inner_steps = INNER_STEPS;
    config.train.batch_samples = 14;
    config.train.micro_batch_samples = 14;
    config.evaluate.samples_max = 64;
    config.evaluate.sample_tokens = 40;
}

/// The first of `lab/001`, `lab/002`, ... that does not exist.
fn free_folder() -> PathBuf {
    let folders = (1u32..).map(|number| PathBuf::from(format!("lab/{number:03}")));
    folders.into_iter().find(|folder| !folder.exists()).unwrap_or_else(|| unreachable!("numbers do not end"))
}

/// The invite in the coordinator's first lines.
fn read_invite(coordinator: &mut Process, log: &Path) -> Result<String, Failure> {
    let mut line = String::new();
    loop {
        line.clear();
        match coordinator.stdout.read_line(&mut line) {
            Ok(read) if read > 0 => {}
            _ => return Err(Failure::new("the coordinator ended at once", format!("read {}", log.display()))),
        }
        if let Some(invite) = line.trim().strip_prefix("beringia join ") {
            return Ok(invite.to_owned());
        }
    }
}

/// The time from the first lease to the last commit, and each site's committed tokens in it.
struct TrainingSpan {
    seconds: f64,
    tokens: Vec<u64>,
}

impl TrainingSpan {
    fn of(records: &[Record]) -> Self {
        let mut span = Self { seconds: 0.0, tokens: Vec::new() };
        let mut began = None;
        for record in records {
            match &record.event {
                Event::RoundStarted { .. } => {
                    began.get_or_insert(record.unix_ms);
                }
                Event::RoundCommitted { contributors, .. } => {
                    span.seconds = began.map_or(0.0, |began| record.unix_ms.saturating_sub(began) as f64 / 1e3);
                    for contributor in contributors {
                        let index = contributor.site.0 as usize;
                        span.tokens.resize(span.tokens.len().max(index + 1), 0);
                        span.tokens[index] += contributor.tokens;
                    }
                }
                _ => {}
            }
        }
        span
    }
}

/// The result in words.
fn verdict(report: &Report) -> String {
    let sites = report.sites.len();
    if !report.identical {
        return format!("NOT IDENTICAL: the {sites} sites do not end with the same model");
    }
    let learned = match (report.validation_bits_per_byte_end, report.bigram_bits_per_byte) {
        (Some(model), Some(bigram)) if model < bigram => {
            format!("{:.1} % under a bigram model", 100.0 * (1.0 - model / bigram))
        }
        (Some(_), Some(_)) => "not yet better than a bigram model: give it more --minutes".to_owned(),
        _ => "not validated".to_owned(),
    };
    format!(
        "one model, bit for bit the same on {sites} site(s) after {} rounds; {learned}; {:.0} % of what the sites do alone",
        report.rounds,
        100.0 * report.utilisation
    )
}

fn print(report: &Report, output: &Output) {
    output.line("");
    output.line("site     tokens/s   alone  share  of alone     sent  state");
    for site in &report.sites {
        output.line(format_args!(
            "{:<8} {:>8.0} {:>7.0} {:>5.1}% {:>8.1}% {:>6.1}MB  {}",
            site.name,
            site.tokens_per_second,
            site.tokens_per_second_alone,
            100.0 * site.share,
            100.0 * site.utilisation,
            site.bytes_sent as f64 / 1e6,
            site.hash.map_or_else(|| "-".to_owned(), |hash| hash.short())
        ));
    }
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
    output.line(format_args!(
        "validation {} bits/byte at the start, {} at the end, a bigram model has {}",
        number(report.validation_bits_per_byte_start),
        number(report.validation_bits_per_byte_end),
        number(report.bigram_bits_per_byte)
    ));
    let telemetry::LedgerCounts { leased, committed, returned, lost } = report.ledger;
    output.line(format_args!("samples    leased {leased}, committed {committed}, returned {returned}, lost {lost}"));
    output.line(format_args!("try        beringia sample {}/site-a \"fn main\"", report.folder.display()));
    output.line(&report.verdict);
}
