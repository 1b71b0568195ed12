//! `beringia simulate`: whole runs in virtual time, with faults drawn from a seed, until an invariant does not hold.
//!
//! With `--plan`, a month of the sites of a plan ([`fleet`]); with `--crowd`, the coordinator's decisions alone ([`crowd`]).

mod crowd;
mod fleet;

use crate::failure::Failure;
use crate::output::Output;
use serde::Serialize;
use simulator::{Options, Outcome, Progress, Sabotage, run_many};
use std::num::ParseIntError;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Some seconds' work.
const SEEDS_DEFAULT: u64 = 100;

/// What this binary was built from, where the build says so.
const COMMIT: Option<&str> = option_env!("BERINGIA_COMMIT");

/// Simulate runs with faults and check the invariants: crashes, partitions, torn writes, corruption
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seeds to simulate, one after the other; 100 unless given, or 1 where --seed is.
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// The first seed, decimal or 0x and hexadecimal; a fresh one unless given.
    #[arg(long, value_name = "S", value_parser = parse_seed)]
    seed: Option<u64>,
    /// Sites; 2 to 5, by the seed, unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    sites: Option<u32>,
    /// Virtual minutes of the phase with faults; 1 to 4, by the seed, unless given.
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,
    /// Threads; one a processor unless given.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Put a known bug in, to see it caught.
    #[arg(long, value_name = "BUG", hide = true)]
    sabotage: Option<Sabotage>,
    #[command(flatten)]
    fleet: fleet::FleetArgs,
    /// Time the decisions of a coordinator of so many sites, and tell its memory.
    #[arg(long, value_name = "SITES", conflicts_with_all = ["plan", "seeds", "seed", "sites", "minutes", "sabotage"], value_parser = clap::value_parser!(u32).range(2..=100_000))]
    crowd: Option<u32>,
}

/// The command's report.
#[derive(Debug, Serialize)]
struct Report {
    first_seed: u64,
    seeds: u64,
    commits: u64,
    faults: u64,
    virtual_hours: f64,
    seconds: f64,
    seeds_per_minute: f64,
    virtual_hours_per_minute: f64,
    violation: Option<Violated>,
}

#[derive(Debug, Serialize)]
struct Violated {
    seed: u64,
    invariant: &'static str,
    what: String,
    virtual_seconds: f64,
    replay: String,
    trace: Vec<String>,
}

fn parse_seed(text: &str) -> Result<u64, ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(&digits.replace('_', ""), 16),
        None => text.parse(),
    }
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    if let Some(sites) = args.crowd {
        crowd::run(sites, output);
        return Ok(());
    }
    if let Some(plan) = &args.fleet.plan {
        return fleet::run(plan, &args.fleet, args.seed.unwrap_or_else(fresh_seed), output);
    }
    if args.minutes.is_some_and(|minutes| !(minutes > 0.0 && minutes <= 10_000.0)) {
        return Err(Failure::new("--minutes must be above 0 and at most 10000", "beringia simulate --minutes 3"));
    }
    let options = Options { sites: args.sites, minutes: args.minutes, sabotage: args.sabotage, ..Options::default() };
    let first = args.seed.unwrap_or_else(fresh_seed);
    let seeds = args.seeds.unwrap_or(if args.seed.is_some() { 1 } else { SEEDS_DEFAULT });
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let (began, told) = (Instant::now(), Mutex::new(Instant::now()));
    let on_progress = |progress: &Progress| {
        if let Ok(mut told) = told.lock()
            && told.elapsed() >= PROGRESS_EVERY
        {
            *told = Instant::now();
            output.notice(in_words(progress, began.elapsed().as_secs_f64()));
        }
    };
    let (progress, violated) = run_many(first, seeds, threads, &options, on_progress);
    let seconds = began.elapsed().as_secs_f64();
    output.object(&report(first, &progress, seconds, violated.as_ref(), &options));
    output.line(in_words(&progress, seconds));
    match violated {
        None => {
            output.line(format_args!("no invariant was violated; the first seed was {first:#x}"));
            Ok(())
        }
        Some(outcome) => Err(failure(&outcome, &options, output)),
    }
}

fn fresh_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    base::random::mix64(since.as_nanos() as u64 ^ u64::from(std::process::id()))
}

fn per_minute(amount: f64, seconds: f64) -> f64 {
    amount / seconds.max(1e-9) * 60.0
}

fn in_words(progress: &Progress, seconds: f64) -> String {
    let hours = progress.virtual_seconds / 3_600.0;
    format!(
        "{} seeds, {:.1} virtual hours, {} commits, {} faults; {:.0} seeds and {:.1} virtual hours a minute",
        progress.seeds,
        hours,
        progress.commits,
        progress.faults,
        per_minute(progress.seeds as f64, seconds),
        per_minute(hours, seconds)
    )
}

/// The command that gives the same run again.
fn replay(outcome: &Outcome, options: &Options) -> String {
    let mut command = format!("beringia simulate --seed {:#x}", outcome.seed);
    if let Some(sites) = options.sites {
        command += &format!(" --sites {sites}");
    }
    if let Some(minutes) = options.minutes {
        command += &format!(" --minutes {minutes}");
    }
    if let Some(sabotage) = options.sabotage {
        command += &format!(" --sabotage {sabotage}");
    }
    command
}

fn report(first: u64, progress: &Progress, seconds: f64, violated: Option<&Outcome>, options: &Options) -> Report {
    let virtual_hours = progress.virtual_seconds / 3_600.0;
    let violation = violated.and_then(|outcome| {
        let violation = outcome.violation.as_ref()?;
        Some(Violated {
            seed: outcome.seed,
            invariant: violation.invariant,
            what: violation.what.clone(),
            virtual_seconds: violation.seconds,
            replay: replay(outcome, options),
            trace: outcome.trace.clone(),
        })
    });
    Report {
        first_seed: first,
        seeds: progress.seeds,
        commits: progress.commits,
        faults: progress.faults,
        virtual_hours,
        seconds,
        seeds_per_minute: per_minute(progress.seeds as f64, seconds),
        virtual_hours_per_minute: per_minute(virtual_hours, seconds),
        violation,
    }
}

fn failure(outcome: &Outcome, options: &Options, output: &Output) -> Failure {
    outcome.trace.iter().for_each(|line| output.line(line));
    let built =
        COMMIT.map_or_else(|| format!("version {}", env!("CARGO_PKG_VERSION")), |commit| format!("commit {commit}"));
    let what = outcome.violation.as_ref().map(ToString::to_string).unwrap_or_default();
    Failure::new(
        format!("seed {:#x}, {built}: {what}", outcome.seed),
        format!("see it again: `{}`", replay(outcome, options)),
    )
}
