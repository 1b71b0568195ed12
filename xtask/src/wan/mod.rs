//! `cargo xtask bench wan`: Beringia beside what else trains over a thin link, on the same work.
//!
//! Two sites, each in a network namespace and held to one core, train the same model from the same weights on the same text over
//! the same link: Beringia with named settings, and the scripts in a folder of peers (PyTorch DDP over Gloo, torchft,
//! hivemind), which is no part of this repository. Systems alternate: every repeat and seed runs all of them once. Before and
//! after each, both cores are measured alone with the same engine; utilisation is against the mean of the two.
//!
//! Each finished measurement is a line in a file, and a bench that was stopped goes on with `--resume`. Tables and pictures
//! are made from that file alone (`--render`).
//!
//! What is not equal: the order of samples (Beringia permutes windows, the peers draw them with replacement), and weight
//! decay of norm weights (13 vectors; the peers decay them).

mod beringia;
mod figures;
mod link;
mod peers;
mod picture;
pub(crate) mod processes;
mod results;
mod series;
mod systems;
mod tables;
mod work;

use crate::runs::{Failure, Programs};
use beringia::Beringia;
use figures::{Figures, SiteSeries, figures};
use link::{Link, LinkKind, LinkMeasured, compile_tunlink};
use peers::{Peers, Pythons, Training};
use results::{Budget, Cell, Key, Outcome, PEER, Results};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use systems::{Kind, Peer, System};
use work::{BATCH_SAMPLES, SEQUENCE_LENGTH, SITES, Size, Work};

/// Tokens in one inner step of one site.
const SITE_STEP_TOKENS: f64 = (BATCH_SAMPLES as usize / SITES * SEQUENCE_LENGTH) as f64;
/// Two implementations of one model in f32 agree on a loss within this; that of other weights differs by far more.
const INITIAL_LOSS_DIFFERENCE_MAX: f64 = 1e-3;

/// Part of a link's rate that iperf3 must see: headers of Ethernet, IP and TCP take 4 %.
const LINK_RATE_LEAST: f64 = 0.9;

/// Settings of the bench.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    #[command(flatten)]
    pythons: Pythons,
    /// What is compared; `streaming-*` means all that begin so
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "synchronous,diloco,streaming-*,ddp,ddp-bf16,torchft-*,hivemind-*"
    )]
    systems: Vec<String>,
    /// A system of Beringia by its settings, as in 'mine: sync.strategy=streaming sync.codec=int8'; may be repeated
    #[arg(long, value_name = "NAME: SETTINGS")]
    define: Vec<String>,
    /// A setting of all systems of Beringia; may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Engines of Beringia's sites; each has its own table
    #[arg(long, value_name = "ENGINE", value_delimiter = ',', default_value = "flex")]
    engines: Vec<String>,
    /// Models: 5M, 20M
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "5M")]
    sizes: Vec<String>,
    /// Links: Mbit/s or `none`, and added round trip
    #[arg(
        long,
        visible_alias = "link",
        value_name = "LINK",
        value_delimiter = ',',
        default_value = "100,20,100+50ms,20+50ms"
    )]
    links: Vec<LinkKind>,
    /// Inner steps of each site
    #[arg(long, value_name = "N", default_value_t = 300)]
    steps: u64,
    /// Train for so long since the start of the sites, instead of --steps
    #[arg(long, value_name = "M", conflicts_with = "steps")]
    minutes: Option<f64>,
    /// Seeds of initial weights and data order
    #[arg(long, value_name = "SEED", value_delimiter = ',', default_value = "1")]
    seeds: Vec<u64>,
    /// Equal measurements of each
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeats: u64,
    /// The peers begin with the weights of their own initialiser, not Beringia's
    #[arg(long)]
    own_weights: bool,
    /// Time of each solo measurement
    #[arg(long, value_name = "SECONDS", default_value_t = 12.0)]
    solo_seconds: f64,
    /// Longest time of one training
    #[arg(long, value_name = "M", default_value_t = 120.0)]
    minutes_max: f64,
    /// Cut a training short after so long: its speed and bytes count, its loss does not. For DDP on a thin link, which takes hours
    #[arg(long, value_name = "M")]
    cut_minutes: Option<f64>,
    /// Where everything is made; what is there is removed, but for the results
    #[arg(long, value_name = "FOLDER", default_value = "target/bench-wan")]
    folder: PathBuf,
    /// Go on with a file of results; what it holds is not measured again
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Measure again what failed
    #[arg(long)]
    retry_failed: bool,
    /// Measure nothing: tables and pictures of the results only
    #[arg(long, requires = "resume")]
    render: bool,
    /// Where the pictures go; the folder of the bench unless given
    #[arg(long, value_name = "FOLDER")]
    pictures: Option<PathBuf>,
    /// Write the rows of all tables to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures what is not yet in the results, and prints the tables.
///
/// # Errors
/// Not root, or nothing that a system is to blame for; what a system fails at stands in the table.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let systems = systems::choose(&options.systems, &options.define)?;
    fs::create_dir_all(&options.folder)?;
    let folder = options.folder.canonicalize()?;
    let path = options.resume.clone().unwrap_or_else(|| folder.join("results.jsonl"));
    if options.resume.is_none() && path.exists() {
        fs::remove_file(&path)?;
    }
    let mut results = Results::open(&path)?;
    if !options.render {
        Bench::prepare(options, &folder)?.run(&systems, &mut results)?;
    }
    report(options, &folder, results.cells())
}

/// Prints the tables, draws the pictures, writes the rows.
fn report(options: &Options, folder: &Path, cells: &[Cell]) -> Result<(), Failure> {
    let pictures = options.pictures.as_deref().unwrap_or(folder);
    fs::create_dir_all(pictures)?;
    let mut tables = Vec::new();
    for group in tables::groups(cells) {
        println!("\n{}", tables::markdown(&group, cells));
        let picture = pictures.join(format!("{}.svg", group.slug()));
        fs::write(&picture, picture::chart(&group, cells).svg())?;
        println!("![{}]({})", group.title(), picture.display());
        tables.push(json!({ "table": group.title(), "rows": tables::rows(&group, cells) }));
    }
    if let Some(path) = &options.json {
        fs::write(path, format!("{:#}\n", Value::from(tables)))?;
    }
    Ok(())
}

/// What all measurements of one bench share.
struct Bench<'a> {
    options: &'a Options,
    binary: PathBuf,
    work: Work,
    /// Of the measurement that is being made; empty before it.
    folder: PathBuf,
    /// Beringia's initial weights for the peers, by model and seed.
    weights: PathBuf,
    tunlink: Option<PathBuf>,
    links: BTreeMap<LinkKind, LinkMeasured>,
    links_made: u64,
    /// Speed alone by engine and model, where nothing has run since it was measured.
    alone: Option<(String, &'static str, f64)>,
}

impl<'a> Bench<'a> {
    fn prepare(options: &'a Options, folder: &Path) -> Result<Self, Failure> {
        let (work_folder, cell, weights) = (folder.join("work"), folder.join("cell"), folder.join("weights"));
        for old in [&work_folder, &cell, &weights].into_iter().filter(|old| old.exists()) {
            fs::remove_dir_all(old)?;
        }
        fs::create_dir_all(&work_folder)?;
        fs::create_dir_all(&weights)?;
        let work = Work::prepare(&options.programs.texts(&work_folder)?, &work_folder)?;
        let is_delayed = options.links.iter().any(|link| link.round_trip_ms > 0);
        let tunlink = is_delayed.then(|| compile_tunlink(options.pythons.folder()?, &work_folder)).transpose()?;
        let binary = options.programs.binary()?.canonicalize()?;
        let links = BTreeMap::new();
        Ok(Self { options, binary, work, folder: cell, weights, tunlink, links, links_made: 0, alone: None })
    }

    fn run(&mut self, systems: &[System], results: &mut Results) -> Result<(), Failure> {
        for link in self.options.links.clone() {
            let measured = self.measure_link(link)?;
            for (key, system) in self.keys(link, systems) {
                let settings = self.settings(system);
                let known = results.find(&key, &settings);
                let is_failed = known.is_some_and(|cell| cell.figures().is_none());
                if known.is_some() && !(is_failed && self.options.retry_failed) {
                    eprintln!("known: {key}");
                    continue;
                }
                let outcome = match self.measure(&key, system, &settings) {
                    Ok(figures) => Outcome::Done(figures),
                    Err(error) => Outcome::Failed(error.to_string()),
                };
                eprintln!("{key}: {}", told(&outcome));
                results.add(Cell { key, settings, link_measured: measured, outcome })?;
            }
        }
        Ok(())
    }

    /// What is to be measured over a link, in order: all systems, then all again with the next repeat.
    fn keys<'s>(&self, link: LinkKind, systems: &'s [System]) -> Vec<(Key, &'s System)> {
        let options = self.options;
        let budget = options.minutes.map_or(Budget::Steps(options.steps), Budget::Minutes);
        let mut keys = Vec::new();
        for size in &options.sizes {
            for repeat in 0..options.repeats {
                for seed in &options.seeds {
                    for system in systems {
                        let engines = match system.kind {
                            Kind::Beringia(_) => options.engines.clone(),
                            Kind::Peer(_) => vec![PEER.to_owned()],
                        };
                        for engine in engines {
                            let (size, system_name) = (size.clone(), system.name.clone());
                            let key = Key { system: system_name, engine, size, link, seed: *seed, budget, repeat };
                            keys.push((key, system));
                        }
                    }
                }
            }
        }
        keys
    }

    /// The system's settings, and what is set for all.
    fn settings(&self, system: &System) -> Vec<String> {
        let mut settings = system.settings().to_vec();
        match system.kind {
            Kind::Beringia(_) => settings.extend(self.options.set.iter().cloned()),
            Kind::Peer(_) if self.options.own_weights => settings.push("own initial weights".to_owned()),
            Kind::Peer(_) => {}
        }
        settings
    }

    fn measure_link(&mut self, kind: LinkKind) -> Result<LinkMeasured, Failure> {
        if let Some(measured) = self.links.get(&kind) {
            return Ok(*measured);
        }
        let measured = self.link(kind)?.measure()?;
        eprintln!("link {kind}: {measured} by iperf3");
        let wanted = kind.mbit.map_or(0.0, |mbit| f64::from(mbit) * 1e6);
        if measured.bits_per_second.iter().any(|rate| *rate < LINK_RATE_LEAST * wanted) {
            eprintln!("warning: that is less than was asked for: something else keeps this machine busy");
        }
        self.links.insert(kind, measured);
        Ok(measured)
    }

    fn link(&mut self, kind: LinkKind) -> Result<Link, Failure> {
        self.links_made += 1;
        Link::up(kind, self.tunlink.as_deref(), self.links_made)
    }

    /// One measurement. Its folder is removed when it ended well, for models are large.
    fn measure(&mut self, key: &Key, system: &System, settings: &[String]) -> Result<Figures, Failure> {
        let size = Size::named(&key.size)?;
        if self.folder.exists() {
            fs::remove_dir_all(&self.folder)?;
        }
        fs::create_dir_all(&self.folder)?;
        let found = match &system.kind {
            Kind::Beringia(_) => self.measure_beringia(key, size, settings, system.steps_per_round),
            Kind::Peer(peer) => self.measure_peer(key, size, peer, system.steps_per_round),
        };
        if found.is_ok() {
            fs::remove_dir_all(&self.folder)?;
        } else {
            self.alone = None;
        }
        found
    }

    fn measure_beringia(
        &mut self,
        key: &Key,
        size: Size,
        settings: &[String],
        steps_per_round: u64,
    ) -> Result<Figures, Failure> {
        let run = self.folder.join("run");
        self.beringia().init(size, key.seed, key.budget, settings, &run)?;
        let before =
            self.alone(&key.engine, size, |bench, seconds| bench.beringia().alone(&run, &key.engine, seconds))?;
        let link = self.link(key.link)?;
        self.alone = None;
        let end = if let Budget::Minutes(minutes) = key.budget { 60.0 * minutes } else { self.seconds_cut() };
        let (sites, site) = self.beringia().train(&link, &run, &key.engine, (end, self.seconds_max()))?;
        drop(link);
        let is_whole = is_whole(key.budget, &sites);
        let validation_nats = is_whole.then(|| self.beringia().validate(&site)).transpose()?;
        let after =
            self.alone(&key.engine, size, |bench, seconds| bench.beringia().alone(&run, &key.engine, seconds))?;
        Ok(figures(&sites, SITE_STEP_TOKENS, steps_per_round, [before, after], validation_nats)?)
    }

    fn measure_peer(&mut self, key: &Key, size: Size, peer: &Peer, steps_per_round: u64) -> Result<Figures, Failure> {
        let weights = if self.options.own_weights { None } else { Some(self.weights(size, key.seed)?) };
        let alone = |bench: &Self, seconds| bench.peers(None).alone(size, seconds);
        let before = self.alone(PEER, size, alone)?;
        let link = self.link(key.link)?;
        self.alone = None;
        let (seed, budget, folder) = (key.seed, key.budget, self.folder.as_path());
        let (seconds_max, seconds_cut) = (self.seconds_max(), self.seconds_cut());
        let training = Training { peer, size, seed, budget, folder, seconds_max, seconds_cut };
        let trained = self.peers(weights).train(&link, &training)?;
        drop(link);
        let after = self.alone(PEER, size, alone)?;
        Ok(figures(&trained.sites, SITE_STEP_TOKENS, steps_per_round, [before, after], trained.validation_nats)?)
    }

    fn seconds_max(&self) -> f64 {
        60.0 * self.options.minutes_max
    }

    fn seconds_cut(&self) -> f64 {
        self.options.cut_minutes.map_or(f64::INFINITY, |minutes| 60.0 * minutes)
    }

    /// Speed alone, just measured.
    fn alone(
        &mut self,
        engine: &str,
        size: Size,
        measure: impl Fn(&Self, f64) -> Result<f64, Failure>,
    ) -> Result<f64, Failure> {
        if let Some((last, name, speed)) = &self.alone
            && (last.as_str(), *name) == (engine, size.name)
        {
            return Ok(*speed);
        }
        let speed = measure(self, self.options.solo_seconds)?;
        self.alone = Some((engine.to_owned(), size.name, speed));
        Ok(speed)
    }

    /// Beringia's initial weights of a model and seed, after a check that the peers' model computes the same loss with them.
    fn weights(&self, size: Size, seed: u64) -> Result<PathBuf, Failure> {
        let weights = self.weights.join(format!("{}-{seed}", size.name));
        if weights.exists() {
            return Ok(weights);
        }
        let run = self.folder.join("initial");
        self.beringia().init(size, seed, Budget::Steps(1), &[], &run)?;
        self.beringia().export(&run, &weights)?;
        let own = self.beringia().validate(&run)?;
        let (parameters, theirs) = self.peers(Some(weights.clone())).check(size)?;
        eprintln!(
            "{} seed {seed}: {parameters} parameters; initial loss {own:.6} by beringia, {theirs:.6} by the peers' model",
            size.name
        );
        if parameters != size.parameters() as u64 || (own - theirs).abs() > INITIAL_LOSS_DIFFERENCE_MAX {
            fs::remove_dir_all(&weights)?;
            return Err("the peers' model is another one than beringia's".into());
        }
        Ok(weights)
    }

    fn beringia(&self) -> Beringia<'_> {
        Beringia { programs: &self.options.programs, binary: &self.binary, work: &self.work }
    }

    fn peers(&self, weights: Option<PathBuf>) -> Peers<'_> {
        Peers { pythons: &self.options.pythons, work: &self.work, weights }
    }
}

/// Whether a run of Beringia made all of its steps; one that ends by time always did.
fn is_whole(budget: Budget, sites: &[SiteSeries]) -> bool {
    match budget {
        Budget::Minutes(_) => true,
        Budget::Steps(steps) => sites.iter().all(|site| site.steps.last().is_some_and(|last| last.step >= steps)),
    }
}

/// One line of progress.
fn told(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Failed(reason) => format!("failed: {reason}"),
        Outcome::Done(figures) => format!(
            "{:.0} tokens/s, utilisation {:.1} %, {:.1} MB sent in 1,000 steps, first step {:.1} s, stall {:.2} s, loss {}",
            figures.tokens_per_second,
            100.0 * figures.utilisation(),
            figures.sent_bytes_per_1000_steps.iter().copied().fold(0.0, f64::max) / 1e6,
            figures.first_step_seconds,
            figures.stall_seconds,
            figures.validation_nats.map_or_else(|| "not measured: cut short".to_owned(), |nats| format!("{nats:.4}")),
        ),
    }
}
