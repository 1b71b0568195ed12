//! `beringia lab`: the whole system on one machine, with the production binary.
//!
//! It makes a run, measures each site alone, then starts one coordinator and N sites as processes of this very binary that
//! talk over real sockets, watches the coordinator's event log, and reports. Sites are made unequal by an artificial delay
//! (site i takes 2^i times as long for a step), so that together they ask for less than the machine has: what they lose by
//! working together then is due to Beringia, not to a lack of cores. With `--site`, each site has the engine that is named, at
//! the speed that it has. With `--link`, what the sites say to each other goes over links of a given rate and delay. With `--kill`,
//! `--stop`, `--cut` and `--chaos` things go wrong meanwhile (docs/lab.md). At the end the invariants of the run are checked.

mod audit;
mod bare;
mod crew;
mod faults;
mod process;
mod report;
mod spec;
pub(crate) mod wan;

use self::crew::{Crew, Incidents, Progress};
use self::faults::{FaultArgs, Faults};
use self::process::{CHILD_GRACE, Process};
use self::report::{FaultSection, Report, TrainingSpan};
use self::spec::SiteSpec;
use self::wan::{LinkReport, Links, Wan};
use crate::commands::init::{InitOptions, ModelSource, Size, create};
use crate::failure::Failure;
use crate::output::Output;
use crate::overrides::{self, Override};
use crate::run_file;
use crate::watch::Watch;
use base::RunConfig;
use base::layout::{EVENTS_FILE, RUN_FILE};
use data::{Corpus, TokenizerSource};
use site::RunFolder;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use telemetry::{Event, Finding, Follower, Record, RunLogs};

/// Rust sources used where no `--data` is given: 6 MB take about 3 s to tokenise and are more than the lab trains on.
const CARGO_SOURCES_BYTES: u64 = 6 << 20;

/// Inner steps in a round of the lab, as in the benchmarks: some seconds of work. With 10 the loss was worse, not better (docs/log.md).
const INNER_STEPS: u64 = 20;

/// Most sites: each is a process with a model of its own.
const SITES_MAX: u32 = 16;

/// What lay between the sites, in the run's folder: `beringia plan --check` reads it.
pub(crate) const LINKS_FILE: &str = "links.toml";

/// How often the coordinator's log is looked at: a fault comes at most this late.
const POLL: Duration = Duration::from_millis(50);

/// A run has healed when the next commit comes within so many of the coordinator's deadlines (invariant I5).
const DEADLINES_TO_HEAL: f64 = 2.0;

/// A run whose log says nothing for this long is stuck.
const SILENCE_MAX: Duration = Duration::from_secs(180);

/// Train over several sites on this machine: real processes, real sockets, real text
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of sites, all of the native CPU engine.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=i64::from(SITES_MAX)))]
    sites: u32,
    /// A site of another engine, as in `--site wgpu` or `--site torch:cpu,threads=1,cores=1`; one for each site.
    #[arg(long = "site", value_name = "ENGINE[,KEY=VALUE]", conflicts_with = "sites")]
    engines: Vec<SiteSpec>,
    /// Link between the sites, and to the coordinator: rate, round trip, jitter and loss, as in 20Mbit/s,50ms,0.1%; or a file
    /// that names pairs (docs/lab-links.md).
    #[arg(long, value_name = "LINK|FILE")]
    link: Option<String>,
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
    /// Size of the model, in parameters.
    #[arg(long, value_enum, default_value = "1m")]
    size: Size,
    /// A key of run.toml to set, as in sync.inner_steps=50; may be repeated.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<Override>,
    /// Time for measuring each site alone, before and after the run.
    #[arg(long, value_name = "SECONDS", default_value_t = 4.0, hide = true)]
    measure_seconds: f64,
    #[command(flatten)]
    faults: FaultArgs,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let lab = Lab::new(&args)?;
    if let Some((seed, period)) = lab.faults.chaos {
        output.line(format_args!(
            "chaos      one kill in {period} s from seed {seed} (--chaos-seed {seed} gives the same)"
        ));
    }
    let config = lab.make_run(&args, output)?;
    let before = lab.measure_alone(&config, output)?;
    let config = lab.plan(config, &args, &before)?;
    let wan = lab.links.as_ref().map(|links| Wan::start(links, config.run.seed)).transpose()?;
    output.line(format_args!(
        "training   {} steps of {} samples in rounds of {}, on {} sites",
        config.train.steps,
        config.train.batch_samples,
        config.sync.inner_steps,
        lab.sites.len()
    ));
    let watched = lab.train(&config, wan.as_ref(), output)?;
    let links = wan.map(|wan| wan.report()).unwrap_or_default();
    let after = lab.measure_alone(&config, output)?;
    let alone: Vec<f64> = before.iter().zip(after).map(|(before, after)| (before + after) / 2.0).collect();
    let report = lab.report(&config, &watched, &alone, links)?;
    output.object(&report);
    report.print(output);
    if report.is_good() { Ok(()) } else { Err(Failure::new(report.verdict, "keep the folder and report it as a bug")) }
}

struct Lab {
    folder: PathBuf,
    measure_seconds: f64,
    binary: PathBuf,
    sites: Vec<SiteSpec>,
    /// Of a site that does not say how many.
    threads: usize,
    /// What lies between the sites; nothing but loopback unless given.
    links: Option<Links>,
    /// What goes wrong while they train.
    faults: Faults,
}

/// What was seen while training.
struct Watched {
    follower: Follower,
    watch: Watch,
    records: Vec<Record>,
    outcomes: Vec<serde_json::Value>,
    incidents: Incidents,
}

impl Watched {
    fn new(log: &Path, config: &RunConfig, output: &Output) -> Self {
        let (follower, watch) = (Follower::new(log), Watch::new(output, config));
        Self { follower, watch, records: Vec::new(), outcomes: Vec::new(), incidents: Incidents::default() }
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

    /// When the first round began, milliseconds since 1970-01-01 UTC.
    fn training_since(&self) -> Option<u64> {
        let began = self.records.iter().find(|record| matches!(record.event, Event::RoundStarted { .. }));
        began.map(|record| record.unix_ms)
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
        let threads = (cores / 2).max(1);
        let sites = name_sites(args)?;
        let names: Vec<String> = sites.iter().map(|site| site.name.clone()).collect();
        let links = args.link.as_ref().map(|link| wan::read_links(link, &names)).transpose()?;
        let seconds = args.rounds.is_none().then_some(60.0 * args.minutes);
        let faults = args.faults.resolve(&names, links.is_some(), seconds, fresh_seed())?;
        Ok(Self { folder, measure_seconds: args.measure_seconds, binary, sites, threads, links, faults })
    }

    fn run_folder(&self) -> PathBuf {
        self.folder.join("run")
    }

    fn site_folder(&self, site: &SiteSpec) -> PathBuf {
        self.folder.join(&site.name)
    }

    fn make_run(&self, args: &Args, output: &Output) -> Result<RunConfig, Failure> {
        let corpus = match &args.data {
            Some(folder) => Corpus::folder(folder)?,
            None => Corpus::cargo_sources(CARGO_SOURCES_BYTES)?,
        };
        let (root, sites) = (corpus.root().display().to_string(), self.sites.len() as u32);
        output.line(format_args!(
            "data       {} MB in {} files of {root}",
            corpus.file_bytes() / 1_000_000,
            corpus.files().len()
        ));
        let model = ModelSource::Size(args.size);
        let vocabulary_size = vocabulary_size(args.size);
        let tokenizer = TokenizerSource::Train { vocabulary_size };
        overrides::check(&args.size.config("lab", vocabulary_size), &args.overrides)?;
        let configure = |config: &mut RunConfig| {
            configure(config, sites);
            overrides::apply(config, &args.overrides);
        };
        let options = InitOptions { corpus, tokenizer, model, configure: &configure };
        create(&self.run_folder(), options, &mut |_| {})?;
        let (config, _) = RunFolder::new(self.run_folder()).config()?;
        output.line(format_args!("run        {}", self.run_folder().display()));
        Ok(config)
    }

    fn threads(&self, site: &SiteSpec) -> usize {
        site.threads.unwrap_or(self.threads)
    }

    /// This program as a process of `site`.
    fn site_command(&self, site: &SiteSpec, words: &[&str]) -> Command {
        let mut command = site.command(&self.binary, self.threads(site));
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
            let mut command = self.site_command(site, &["--json", "measure"]);
            command.arg(self.run_folder()).args(site.engine_arguments(self.threads(site)));
            command.args(["--samples", &samples.to_string(), "--seconds", &self.measure_seconds.to_string()]);
            let object = Process::start(&format!("measure-{}", site.name), &mut command, &self.folder)?.object()?;
            let speed = object["tokens_per_second"].as_f64().unwrap_or_default();
            let SiteSpec { name, engine, slowdown, .. } = site;
            let delay = match *slowdown > 1.0 {
                true => format!(", steps take {slowdown} times as long"),
                false => String::new(),
            };
            let threads = self.threads(site);
            output.line(format_args!("alone      {name}: {speed:.0} tokens/s ({engine}, {threads} thread(s){delay})"));
            speeds.push(speed);
        }
        Ok(speeds)
    }

    /// Sets the number of steps by the time that is given, and writes it into `run.toml`.
    fn plan(&self, mut config: RunConfig, args: &Args, alone: &[f64]) -> Result<RunConfig, Failure> {
        let rounds = args.rounds.unwrap_or_else(|| {
            let step_tokens = config.train.batch_samples as u64 * config.data.sequence_length as u64;
            let round_tokens = step_tokens * config.steps_per_round();
            let tokens = args.minutes * 60.0 * alone.iter().sum::<f64>() * PLANNED_UTILISATION;
            ((tokens / round_tokens as f64) as u64).max(2)
        });
        config.train.steps = rounds * config.steps_per_round();
        config.train.warmup_steps = (config.train.steps / 20).max(1);
        config.evaluate.every_rounds = rounds.div_ceil(EVALUATIONS);
        config.checkpoint.every_rounds = rounds.div_ceil(EVALUATIONS);
        overrides::apply(&mut config, &args.overrides);
        config.validate()?;
        self.write(RUN_FILE, &run_file::render(&config))?;
        if let Some(links) = &self.links {
            self.write(LINKS_FILE, &links.to_toml())?;
        }
        Ok(config)
    }

    fn write(&self, name: &str, text: &str) -> Result<(), Failure> {
        let path = self.run_folder().join(name);
        let failed = |error| Failure::new(format!("{}: {error}", path.display()), "make room or allow writing");
        std::fs::write(&path, text).map_err(failed)
    }

    /// Starts everybody, watches until the coordinator ends, and collects what the sites say at their end.
    fn train(&self, config: &RunConfig, wan: Option<&Wan>, output: &Output) -> Result<Watched, Failure> {
        let mut crew = Crew::new(&self.folder, self.sites.len(), wan, self.faults.clone());
        let mut watched = Watched::new(&self.run_folder().join(EVENTS_FILE), config, output);
        let again = |invite: &str| self.serve_command(&listening(invite), wan.is_some());
        let invite = crew.start_coordinator(&mut self.serve_command("127.0.0.1:0", wan.is_some()), again)?;
        for (index, site) in self.sites.iter().enumerate() {
            crew.start_site(index, &site.name, self.join_command(index, &invite, wan))?;
            // One after the other: each measures its speed on a quiet machine.
            let wanted = index + 1;
            self.follow(config, &mut watched, &mut crew, |watched| watched.sites_ready() >= wanted)?;
        }
        self.follow(config, &mut watched, &mut crew, |_| false)?;
        watched.watch.finish();
        (watched.outcomes, watched.incidents) = crew.finish();
        Ok(watched)
    }

    fn serve_command(&self, listen: &str, over_links: bool) -> Command {
        let mut serve = Command::new(&self.binary);
        serve.arg("serve").arg(self.run_folder()).args(["--listen", listen]);
        if over_links {
            serve.args(["--advertise", wan::COORDINATOR]);
        }
        serve
    }

    fn join_command(&self, index: usize, invite: &str, wan: Option<&Wan>) -> Command {
        let site = &self.sites[index];
        let mut join = self.site_command(site, &["--json", "join", invite, "--name", &site.name]);
        join.arg("--folder").arg(self.site_folder(site)).args(["--listen", "127.0.0.1:0"]);
        join.args(site.engine_arguments(self.threads(site)));
        join.args(["--measure-seconds", &(self.measure_seconds / 2.0).to_string()]);
        if let Some(wan) = wan {
            // Under this name the other sites' relays know it.
            join.args(["--advertise", &site.name, "--proxy", &wan.proxy(index)]);
        }
        join
    }

    /// Follows the coordinator's log until `enough`, or until the coordinator ends; lets the faults happen meanwhile.
    fn follow(
        &self,
        config: &RunConfig,
        watched: &mut Watched,
        crew: &mut Crew,
        enough: impl Fn(&Watched) -> bool,
    ) -> Result<(), Failure> {
        let mut heard = Instant::now();
        loop {
            // Asked before the log is read, so that nothing written before the end is missed.
            let is_over = crew.is_over();
            if watched.poll()? {
                heard = Instant::now();
            }
            if is_over || enough(watched) {
                return Ok(());
            }
            match watched.training_since() {
                Some(began) => crew.training_began(began),
                None => {
                    if let Some(site) = crew.failed_site() {
                        return Err(site.failure("ended before it was ready"));
                    }
                }
            }
            let rounds_planned = config.rounds_total();
            crew.act(Progress { rounds: watched.watch.view().round.0, rounds_planned })?;
            if heard.elapsed() > if crew.is_deserted() { CHILD_GRACE } else { SILENCE_MAX } {
                let message = "the coordinator says nothing any more";
                return Err(Failure::new(message, format!("read the logs in {}", self.folder.display())));
            }
            std::thread::sleep(POLL);
        }
    }

    fn report(
        &self,
        config: &RunConfig,
        watched: &Watched,
        alone: &[f64],
        links: Vec<LinkReport>,
    ) -> Result<Report, Failure> {
        let names: Vec<&str> = self.sites.iter().map(|site| site.name.as_str()).collect();
        let logs = audit::read_logs(&self.run_folder(), &self.folder, &names)?;
        let span = TrainingSpan::of(&watched.records);
        let findings = self.audit(config, &logs, &watched.incidents, &span);
        let faults = (!self.faults.is_empty()).then(|| {
            let bytes = bare::state_bytes(config);
            let transfer_seconds = bare::transfer_seconds(bytes, &links);
            FaultSection::new(&self.faults, &watched.incidents, &logs, (bytes, transfer_seconds))
        });
        Ok(Report::new(self, watched, &span, alone, (links, faults, findings)))
    }

    fn audit(&self, config: &RunConfig, logs: &RunLogs, incidents: &Incidents, span: &TrainingSpan) -> Vec<Finding> {
        let names: Vec<&str> = self.sites.iter().map(|site| site.name.as_str()).collect();
        let deadline = rounds::coordinator::DEADLINE_FACTOR * span.round_seconds() + config.sync.deadline_seconds;
        let last = incidents.observed.iter().filter_map(|fault| fault.mended_unix_ms).max();
        let healed = last.map(|mended| (mended, DEADLINES_TO_HEAL * deadline));
        audit::check((&self.run_folder(), &self.folder), &names, logs, incidents, healed)
    }
}

/// Where the coordinator of an invite listens on this machine, whatever name the sites know it by.
fn listening(invite: &str) -> String {
    let port = invite.parse::<wire::Invite>().ok().and_then(|invite| {
        let (_, port) = invite.address().rsplit_once(':')?;
        port.parse().ok()
    });
    SocketAddr::from(([127, 0, 0, 1], port.unwrap_or_default())).to_string()
}

/// A seed that nobody has chosen.
fn fresh_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    base::random::mix64(since.as_nanos() as u64) >> 32
}

/// Tokens of the vocabulary: of the smallest model few, so that a minute of training is spent on it and not on rare tokens.
fn vocabulary_size(size: Size) -> usize {
    match size {
        Size::Million1 => 1_024,
        larger => larger.vocabulary_size(),
    }
}

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

/// The sites that are asked for, named by letters.
fn name_sites(args: &Args) -> Result<Vec<SiteSpec>, Failure> {
    let mut sites = match args.engines.is_empty() {
        // Site i takes 2^i times as long for a step.
        true => (0..args.sites).map(|index| SiteSpec::flex(f64::from(1u32 << index.min(10)))).collect(),
        false => args.engines.clone(),
    };
    if sites.len() > SITES_MAX as usize {
        return Err(Failure::new(format!("{} sites, at most {SITES_MAX} fit a lab", sites.len()), "name fewer --site"));
    }
    for (site, letter) in sites.iter_mut().zip('a'..) {
        site.name = format!("site-{letter}");
        site.check()?;
    }
    Ok(sites)
}

/// The first of `lab/001`, `lab/002`, ... that does not exist.
fn free_folder() -> PathBuf {
    let folders = (1u32..).map(|number| PathBuf::from(format!("lab/{number:03}")));
    folders.into_iter().find(|folder| !folder.exists()).unwrap_or_else(|| unreachable!("numbers do not end"))
}
