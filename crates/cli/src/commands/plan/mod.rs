//! `beringia plan`: what a run over several sites will do, before anybody reserves a machine.
//!
//! Reads a cluster's TOML, asks `planner::search`, and prints the best few plans with their reasons. What is computed lies in `planner`.

mod check;
mod object;
mod table;

use crate::commands::predict::catalogue;
use crate::failure::Failure;
use crate::output::Output;
use crate::texts;
use planner::Catalogue;
use planner::cluster::{Cluster, ClusterError};
use planner::model::shape::Transformer;
use planner::search::between::Strategy;
use planner::search::given::Given;
use planner::search::{Caps, Objective, Plan, PlanError, Task, Wish, plans};
use planner::units::BytesPerSecond;
use planner::wan::Exchange;
use planner::what_if::Change;
use planner::{models, picture, units};
use std::path::{Path, PathBuf};

/// Longest cluster file, bytes.
const CLUSTER_BYTES_MAX: u64 = 1 << 20;

/// Tokens of a batch where none is given: what Llama 3 began with (arXiv 2407.21783, section 3.4).
const BATCH_TOKENS: f64 = 4_194_304.0;

/// Tokens for each active parameter where none are given (arXiv 2203.15556).
const TOKENS_PER_PARAMETER: f64 = 20.0;

/// Longest sequence and largest batch that can be meant.
pub(crate) const SEQUENCE_MAX: u32 = 1 << 24;
pub(crate) const BATCH_MAX: u32 = 1 << 24;

/// Heading of the options that settle what is looked for otherwise.
const SETTLED: &str = "Settled beforehand";

/// Plan a run before any machine is reserved: strategy, shares, layouts, hours, energy, cost
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The sites and the links between them: a TOML that docs/plan.md describes.
    #[arg(long, value_name = "FILE", required_unless_present = "check")]
    cluster: Option<PathBuf>,
    /// A known model (llama-3-70b, deepseek-v3-671b, ...) or a number of parameters (70B).
    #[arg(long, value_name = "MODEL", required_unless_present = "check")]
    model: Option<String>,
    /// Tokens to train on, as 1.4T; 20 for each active parameter unless given.
    #[arg(long, value_name = "N")]
    tokens: Option<String>,
    /// Sequences of an inner step of all sites together; 4,194,304 tokens unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(BATCH_MAX)))]
    batch: Option<u32>,
    /// Tokens of a sequence.
    #[arg(long, value_name = "N", default_value_t = 4_096, value_parser = clap::value_parser!(u32).range(1..=i64::from(SEQUENCE_MAX)))]
    sequence: u32,
    /// What is to be least.
    #[arg(long, value_enum, default_value_t = Least::Time)]
    objective: Least,
    /// At most so many hours.
    #[arg(long, value_name = "HOURS")]
    max_hours: Option<f64>,
    /// At most so much money, in what the cluster's prices are in.
    #[arg(long, value_name = "MONEY")]
    max_cost: Option<f64>,
    /// At most so much energy.
    #[arg(long, value_name = "KWH")]
    max_kwh: Option<f64>,
    /// At most so much carbon.
    #[arg(long, value_name = "TONNES")]
    max_carbon: Option<f64>,
    /// How the sites train together, instead of looking for the best way.
    #[arg(long, value_enum, help_heading = SETTLED)]
    strategy: Option<Kind>,
    /// Inner steps between two merges (H).
    #[arg(long, value_name = "N", help_heading = SETTLED)]
    inner_steps: Option<u32>,
    /// Fragments of a streaming round; they divide the inner steps.
    #[arg(long, value_name = "N", help_heading = SETTLED)]
    fragments: Option<u32>,
    /// Inner steps behind which a streamed fragment travels.
    #[arg(long, value_name = "N", help_heading = SETTLED)]
    overlap_steps: Option<u32>,
    /// Bits of each value that travels, its place included.
    #[arg(long, value_name = "N", help_heading = SETTLED)]
    bits: Option<u32>,
    /// Share of the values that travel, for codes that keep only the largest: 64 of 4,096 are 0.015625.
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, hide_default_value = true, help_heading = SETTLED)]
    density: f64,
    /// How deltas meet: each to each site, each site merging a slice, or over storage that all reach.
    #[arg(long, value_enum, help_heading = SETTLED)]
    exchange: Option<Meeting>,
    /// GB of f32 that a site codes and decodes in a second; 2 unless given, and codes of 16 bits or more cost nothing.
    #[arg(long, value_name = "GB_S", help_heading = SETTLED)]
    coding_gb_s: Option<f64>,
    /// Every site takes part, also where the objective would leave one out.
    #[arg(long, help_heading = SETTLED)]
    all_sites: bool,
    /// One thing otherwise: site=NAME (one more like it), link=A,B+GBIT (so many Gbit/s more), device=NAME:DEVICE. May be repeated.
    #[arg(long, value_name = "CHANGE")]
    what_if: Vec<String>,
    /// Devices of your own: [[device]] tables that add to the catalogue, or override single figures of it.
    #[arg(long, value_name = "FILE")]
    devices: Option<PathBuf>,
    /// Most plans that are shown, one for each set of sites.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    plans: u8,
    /// Draw the best plan's round, and where its time and energy go.
    #[arg(long, value_name = "FILE.svg")]
    picture: Option<PathBuf>,
    /// Lay what would have been predicted of a run beside what its events say; the links are those of --cluster.
    #[arg(long, value_name = "RUN", conflicts_with_all = ["model", "tokens", "batch", "what_if", "picture"])]
    check: Option<PathBuf>,
}

/// A strategy between sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// Gradients at every step
    Synchronous,
    /// Outer steps, nothing hidden
    Diloco,
    /// Fragments, hidden behind inner steps
    Streaming,
}

/// How deltas meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Meeting {
    /// Every delta to every site
    Mesh,
    /// Each site merges a slice, and gives the merge in f32
    Sharded,
    /// Others' rings, whose sums travel as their summands do
    Ring,
    /// Each site uploads once; fetching is not counted
    Storage,
}

/// What is to be least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Least {
    /// Time to the loss that data parallelism has after the tokens
    Time,
    /// Money
    Cost,
    /// Energy
    Energy,
    /// CO2
    Carbon,
}

impl Least {
    fn objective(self) -> Objective {
        match self {
            Self::Time => Objective::Time,
            Self::Cost => Objective::Cost,
            Self::Energy => Objective::Energy,
            Self::Carbon => Objective::Carbon,
        }
    }
}

/// The plans of a cluster, and of each change of it.
struct Planned {
    model: String,
    task: Task,
    wish: Wish,
    plans: Vec<Plan>,
    changes: Vec<(Change, Result<Plan, Failure>)>,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let cluster = args.cluster.as_deref().map(cluster).transpose()?;
    if let Some(folder) = &args.check {
        let links = cluster.as_ref().map(Cluster::network).transpose()?;
        return check::run(folder, links.as_ref(), output);
    }
    let Some(cluster) = cluster else { unreachable!("clap wants a cluster where there is no check") };
    let catalogue = catalogue(args.devices.as_deref())?;
    let (task, wish) = (task(&args)?, wish(&args)?);
    let place = args.cluster.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
    let plans = planned(&catalogue, &cluster, &task, &wish).map_err(|refusal| refusal.about(&place))?;
    let changes: Result<Vec<Change>, _> = args.what_if.iter().map(|text| Change::parse(text)).collect();
    let changes = changes?.into_iter().map(|change| {
        let best = changed(&catalogue, &cluster, &change, &task, &wish);
        (change, best)
    });
    let model = args.model.clone().unwrap_or_default();
    let planned = Planned { model, task, wish, plans, changes: changes.collect() };
    output.object(&object::of(&planned));
    output.text(&table::of(&planned));
    if let (Some(path), Some(best)) = (&args.picture, planned.plans.first()) {
        std::fs::write(path, picture::svg(best)).map_err(|error| {
            let path = path.display();
            Failure::new(format!("{path} cannot be written: {error}"), format!("see that the folder of {path} exists"))
        })?;
    }
    Ok(())
}

/// Reads a cluster's file.
///
/// # Errors
/// It cannot be read, or is no cluster.
pub(crate) fn cluster(path: &Path) -> Result<Cluster, Failure> {
    let text = texts::read(path, CLUSTER_BYTES_MAX)?;
    Cluster::parse(&text).map_err(|error| Failure::from(error).about(&path.display().to_string()))
}

/// Why there are no plans, and whether the file of the cluster has to change.
struct Refusal {
    failure: Failure,
    is_about_sites: bool,
}

impl Refusal {
    /// The failure, with the file in front where it has to change.
    fn about(self, file: &str) -> Failure {
        if self.is_about_sites { self.failure.about(file) } else { self.failure }
    }
}

impl From<ClusterError> for Refusal {
    fn from(error: ClusterError) -> Self {
        Self { failure: error.into(), is_about_sites: true }
    }
}

impl From<PlanError> for Refusal {
    fn from(error: PlanError) -> Self {
        Self { is_about_sites: error.is_about_sites(), failure: error.into() }
    }
}

fn planned(catalogue: &Catalogue, cluster: &Cluster, task: &Task, wish: &Wish) -> Result<Vec<Plan>, Refusal> {
    let (sites, links) = (cluster.specs(catalogue)?, cluster.network()?);
    Ok(plans(task, &sites, &links, wish)?)
}

fn changed(
    catalogue: &Catalogue,
    cluster: &Cluster,
    change: &Change,
    task: &Task,
    wish: &Wish,
) -> Result<Plan, Failure> {
    let plans = planned(catalogue, &change.apply(cluster)?, task, &Wish { count: 1, ..*wish });
    let plans = plans.map_err(|refusal| refusal.failure)?;
    plans.into_iter().next().ok_or_else(|| Failure::new("there is no plan", "ask without --what-if first"))
}

fn task(args: &Args) -> Result<Task, Failure> {
    work(args.model.as_deref().unwrap_or_default(), args.tokens.as_deref(), args.batch, args.sequence)
}

/// What is to be trained: a model, its tokens, and the batch; the last two have defaults.
///
/// # Errors
/// No such model, or a number that nobody can mean.
pub(crate) fn work(model: &str, tokens: Option<&str>, batch: Option<u32>, sequence: u32) -> Result<Task, Failure> {
    let shape = Transformer { seq: f64::from(sequence), ..models::parse(model)? };
    let tokens = match tokens {
        None => TOKENS_PER_PARAMETER * shape.active_parameters(),
        Some(text) => units::parse_count(text).filter(|tokens| (1e6..=1e18).contains(tokens)).ok_or_else(|| {
            Failure::new(format!("--tokens {text} is no number from 1e6 to 1e18"), "write 1.4T for 1.4e12")
        })?,
    };
    let batch = batch.unwrap_or((BATCH_TOKENS / shape.seq).round().max(1.0) as u32);
    let of_batch = f64::from(batch) * shape.seq;
    if tokens < of_batch {
        let message = format!("--tokens {tokens:e} are fewer than the {of_batch:e} of one batch");
        return Err(Failure::new(message, "raise --tokens, or take a smaller --batch"));
    }
    Ok(Task { shape, global_batch: batch, tokens })
}

fn wish(args: &Args) -> Result<Wish, Failure> {
    let caps = [
        ("--max-hours", args.max_hours),
        ("--max-cost", args.max_cost),
        ("--max-kwh", args.max_kwh),
        ("--max-carbon", args.max_carbon),
    ];
    for (option, cap) in caps {
        if cap.is_some_and(|cap| !(cap.is_finite() && cap > 0.0)) {
            let message = format!("{option} {} is no positive number", units::plain(cap.unwrap_or_default()));
            return Err(Failure::new(message, format!("give {option} a positive number, or leave it out")));
        }
    }
    Ok(Wish {
        objective: args.objective.objective(),
        caps: Caps {
            hours: args.max_hours,
            cost: args.max_cost,
            kilowatt_hours: args.max_kwh,
            carbon_tonnes: args.max_carbon,
        },
        count: usize::from(args.plans),
        given: given(args),
        all_sites: args.all_sites,
    })
}

fn given(args: &Args) -> Given {
    Given {
        strategy: args.strategy.map(|kind| match kind {
            Kind::Synchronous => Strategy::Synchronous,
            Kind::Diloco => Strategy::Diloco,
            Kind::Streaming => Strategy::Streaming,
        }),
        inner_steps: args.inner_steps,
        fragments: args.fragments,
        overlap_steps: args.overlap_steps,
        bits: args.bits,
        density: args.density,
        exchange: args.exchange.map(|meeting| match meeting {
            Meeting::Mesh => Exchange::Mesh,
            Meeting::Sharded => Exchange::Sharded,
            Meeting::Ring => Exchange::Ring,
            Meeting::Storage => Exchange::UploadBound,
        }),
        coding: args.coding_gb_s.map(BytesPerSecond::from_gigabytes),
    }
}
