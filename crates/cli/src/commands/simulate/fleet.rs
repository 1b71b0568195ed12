//! `beringia simulate --plan`: a month of the sites that `beringia plan` chooses, with failures at published rates.
//!
//! The plan says how fast each site is, what travels and how fast; `simulator::fleet` lets the coordinator and the members decide. What is
//! committed is laid beside what the same sites commit when nothing breaks: one day of it, for the other days are like it.

use crate::commands::plan::{BATCH_MAX, SEQUENCE_MAX, cluster, work};
use crate::commands::predict::catalogue;
use crate::failure::Failure;
use crate::format::count;
use crate::output::Output;
use base::ParameterSchema;
use base::config::{CheckpointSection, Codec, Exchange, Strategy, SyncSection};
use planner::search::between::{self, Way};
use planner::search::{Links, Plan, SitePlan, SiteSpec, Task, Wish, plans};
use planner::wan;
use rounds::Settings;
use serde::Serialize;
use simulator::fleet::{Fault, Fleet, FleetLink, FleetOutcome, FleetSite, Lost, Rates, simulate};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// More inner steps than any run makes: time ends it.
const STEPS_TOTAL: u64 = 1 << 40;

/// Seconds of a day.
const DAY: f64 = 86_400.0;

/// Restarts of a site that a round waits for: one may follow another.
const RESTARTS_AWAITED: f64 = 2.0;

/// Times what an exchange is expected to take that a round waits for it: the coordinator itself expects only the inner steps to take long.
const TRANSFERS_AWAITED: f64 = 3.0;

/// Bytes a second of a link that no link of the plan bounds: a site and itself.
const UNBOUNDED: f64 = 1e15;

/// What a failed device stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum OnFailure {
    /// Its data-parallel replica, and the others for as long as a restart takes.
    Replica,
    /// The whole site, whose process starts again from its checkpoint.
    Site,
}

// What `--plan` goes with; a doc comment would take the command's own place in its help.
#[derive(Debug, clap::Args)]
pub(super) struct FleetArgs {
    /// Simulate a month of these sites instead, as `beringia plan` would run them: the cluster file of docs/plan.md.
    #[arg(long, value_name = "CLUSTER", requires = "model", conflicts_with_all = ["seeds", "sites", "minutes", "threads", "sabotage"])]
    pub(super) plan: Option<PathBuf>,
    /// A known model (llama-3-70b, deepseek-v3-671b, ...) or a number of parameters (70B).
    #[arg(long, value_name = "MODEL", requires = "plan")]
    model: Option<String>,
    /// Sequences of an inner step of all sites together; 4,194,304 tokens unless given.
    #[arg(long, value_name = "N", requires = "plan", value_parser = clap::value_parser!(u32).range(1..=i64::from(BATCH_MAX)))]
    batch: Option<u32>,
    /// Tokens of a sequence; 4,096 unless given.
    #[arg(long, value_name = "N", requires = "plan", value_parser = clap::value_parser!(u32).range(1..=i64::from(SEQUENCE_MAX)))]
    sequence: Option<u32>,
    /// Devices of your own, as for `beringia plan`.
    #[arg(long, value_name = "FILE", requires = "plan")]
    devices: Option<PathBuf>,
    /// Length of the run; 30 unless given.
    #[arg(long, value_name = "DAYS", requires = "plan")]
    days: Option<f64>,
    /// Part of the sites whose deltas close a round after the grace window; all unless given.
    #[arg(long, value_name = "PART", requires = "plan")]
    quorum: Option<f64>,
    /// Hours of one device between two failures; 50,673 unless given (Llama 3).
    #[arg(long, value_name = "HOURS", requires = "plan")]
    device_hours: Option<f64>,
    /// What a failed device stops; a replica of the model unless given, as the site's layout has them.
    #[arg(long, value_name = "WHAT", value_enum, requires = "plan")]
    on_failure: Option<OnFailure>,
    /// Minutes from a failure until the replica, or the site's process, runs again; 10 unless given (MegaScale).
    #[arg(long, value_name = "MINUTES", requires = "plan")]
    recovery_minutes: Option<f64>,
    /// Seconds from a failure until the other replicas train again; 150 unless given (FlashRecovery).
    #[arg(long, value_name = "SECONDS", requires = "plan")]
    restart_seconds: Option<f64>,
    /// Days between two leavings of a site, for four hours each; 30 unless given (assumed).
    #[arg(long, value_name = "DAYS", requires = "plan")]
    leave_days: Option<f64>,
    /// Days between two slow spells of a site; 7 unless given (assumed).
    #[arg(long, value_name = "DAYS", requires = "plan")]
    slow_days: Option<f64>,
}

/// The command's report.
#[derive(Debug, Serialize)]
struct Report {
    seed: u64,
    model: String,
    sites: Vec<SiteReport>,
    devices: f64,
    way: String,
    quorum: f64,
    days: f64,
    rates: RatesReport,
    tokens_planned: f64,
    tokens_committed: f64,
    tokens_without_failures: f64,
    goodput: f64,
    committed_of_capacity: f64,
    lost_of_capacity: LostReport,
    rounds: u64,
    rounds_without_failures: u64,
    faults: FaultsReport,
    left: std::collections::BTreeMap<&'static str, u64>,
    rounds_abandoned: u64,
    regrouped: u64,
    stragglers: u64,
    decisions: u64,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct SiteReport {
    name: String,
    devices: f64,
    replicas: f64,
    tokens_per_second: f64,
}

#[derive(Debug, Serialize)]
struct RatesReport {
    device_hours_between_failures: f64,
    device_hours_between_planned_stops: f64,
    on_failure: OnFailure,
    restart_seconds: f64,
    recovery_seconds: f64,
    site_days_between_slow_spells: f64,
    slow_factor: f64,
    site_days_between_leavings: f64,
    away_seconds: f64,
}

#[derive(Debug, Serialize)]
struct LostReport {
    failures: f64,
    planned_stops: f64,
    leaving: f64,
    joining: f64,
    slow: f64,
    waiting: f64,
    uncommitted: f64,
}

#[derive(Debug, Serialize)]
struct FaultsReport {
    failures: u64,
    planned_stops: u64,
    slow_spells: u64,
    leavings: u64,
}

/// Runs the command.
pub(super) fn run(path: &Path, args: &FleetArgs, seed: u64, output: &Output) -> Result<(), Failure> {
    let rates = rates(args)?;
    let days = positive("--days", args.days.unwrap_or(30.0), 3_650.0)?;
    let quorum = args.quorum.unwrap_or(1.0);
    if !(quorum > 0.0 && quorum <= 1.0) {
        return Err(Failure::new(format!("--quorum {quorum} is not above 0 and at most 1"), "take --quorum 0.75"));
    }
    let (catalogue, cluster) = (catalogue(args.devices.as_deref())?, cluster(path)?);
    let model = args.model.as_deref().unwrap_or_default();
    let task = work(model, None, args.batch, args.sequence.unwrap_or(4_096))?;
    let (sites, links) = (cluster.specs(&catalogue)?, cluster.network()?);
    let best = plans(&task, &sites, &links, &Wish { count: 1, ..Wish::default() })?;
    let Some(plan) = best.first() else { return Err(Failure::new("there is no plan", "see `beringia plan`")) };
    let on_failure = args.on_failure.unwrap_or(OnFailure::Replica);
    let fleet = fleet(plan, &task, (&sites[..], &links), (quorum, on_failure), rates, days * DAY);
    let began = Instant::now();
    let with = simulate(&fleet, seed)?;
    let calm_seconds = fleet.seconds.min(DAY);
    let mut without = simulate(&Fleet { rates: Rates::none(), seconds: calm_seconds, ..fleet.clone() }, seed)?;
    without.tokens_committed *= fleet.seconds / calm_seconds;
    without.rounds = (without.rounds as f64 * fleet.seconds / calm_seconds) as u64;
    let report = report((model, seed, began.elapsed().as_secs_f64()), (plan, on_failure), &fleet, &with, &without);
    output.object(&report);
    output.text(&text(&report));
    Ok(())
}

fn positive(option: &str, value: f64, most: f64) -> Result<f64, Failure> {
    if value > 0.0 && value <= most {
        return Ok(value);
    }
    Err(Failure::new(
        format!("{option} {value} is not above 0 and at most {most}"),
        format!("leave {option} out for its default"),
    ))
}

fn rates(args: &FleetArgs) -> Result<Rates, Failure> {
    let mut rates = Rates::published();
    if let Some(hours) = args.device_hours {
        rates.failures_per_device_hour = 1.0 / positive("--device-hours", hours, 1e12)?;
    }
    if let Some(minutes) = args.recovery_minutes {
        rates.recovery_seconds = 60.0 * positive("--recovery-minutes", minutes, 1e5)?;
    }
    if let Some(seconds) = args.restart_seconds {
        rates.restart_seconds = positive("--restart-seconds", seconds, 1e6)?;
    }
    if let Some(days) = args.leave_days {
        rates.leavings_per_second = 1.0 / (DAY * positive("--leave-days", days, 1e9)?);
    }
    if let Some(days) = args.slow_days {
        rates.spells_per_second = 1.0 / (DAY * positive("--slow-days", days, 1e9)?);
    }
    Ok(rates)
}

/// The sites of a plan as the simulator takes them.
fn fleet(
    plan: &Plan,
    task: &Task,
    (specs, links): (&[SiteSpec<'_>], &Links),
    (quorum, on_failure): (f64, OnFailure),
    rates: Rates,
    seconds: f64,
) -> Fleet {
    let place = |name: &str| specs.iter().position(|site| site.name == name);
    let places: Vec<Option<usize>> = plan.sites.iter().map(|site| place(&site.name)).collect();
    let access = |place: &Option<usize>| {
        place.and_then(|place| specs[place].access).map(|rate| rate.bytes_per_second().0 * wan::CONTENT)
    };
    let sites = plan.sites.iter().zip(&places).map(|(site, place)| FleetSite {
        name: site.name.clone(),
        devices: site.devices.iter().map(|(_, number)| number).sum(),
        replicas: replicas(site, on_failure),
        tokens_per_second: site.tokens_per_second,
        access_bytes_per_second: access(place),
    });
    let link = |from: &Option<usize>, to: &Option<usize>| {
        let link = from.zip(*to).filter(|(from, to)| from != to).and_then(|(from, to)| links.between(from, to));
        link.map_or(FleetLink { bytes_per_second: UNBOUNDED, round_trip_seconds: 1e-3 }, |link| FleetLink {
            bytes_per_second: link.throughput(link.up.min(link.down)).0,
            round_trip_seconds: link.round_trip.0,
        })
    };
    let row = |from: &Option<usize>| places.iter().map(|to| link(from, to)).collect::<Vec<_>>();
    Fleet {
        sites: sites.collect(),
        links: places.iter().map(row).collect(),
        settings: settings(plan, task, quorum, &rates),
        coding_bytes_per_second: plan.way.coding().0,
        checkpoint_rounds: CheckpointSection::default().every_rounds,
        validation: None,
        seconds,
        rates,
    }
}

fn replicas(site: &SitePlan, on_failure: OnFailure) -> f64 {
    match on_failure {
        OnFailure::Replica => site.layout.dp,
        OnFailure::Site => 1.0,
    }
}

/// What `run.toml` would say. Its deadline leaves time for restarts and for what the plan expects of links: who waits for either is not to be
/// dropped.
fn settings(plan: &Plan, task: &Task, quorum: f64, rates: &Rates) -> Settings {
    let defaults = SyncSection::default();
    let Way { strategy, inner_steps, fragments, overlap_steps, bits, exchange } = plan.way;
    let sync = SyncSection {
        strategy: match strategy {
            between::Strategy::Synchronous => Strategy::Synchronous,
            between::Strategy::Diloco => Strategy::DiLoCo,
            between::Strategy::Streaming => Strategy::Streaming,
        },
        inner_steps: u64::from(inner_steps),
        fragments,
        overlap_steps: u64::from(overlap_steps),
        codec: match bits {
            32 => Codec::F32,
            16 => Codec::Bf16,
            8 => Codec::Int8,
            _ => Codec::Mxfp4,
        },
        exchange: match exchange {
            wan::Exchange::Sharded => Exchange::Sharded,
            wan::Exchange::Mesh | wan::Exchange::Ring | wan::Exchange::UploadBound => Exchange::Mesh,
        },
        sites: plan.sites.len() as u32,
        quorum,
        deadline_seconds: defaults.deadline_seconds
            + RESTARTS_AWAITED * rates.restart_seconds
            + TRANSFERS_AWAITED * plan.round.transfer.0 / f64::from(fragments),
        recompute_share: 0.0,
        ..defaults
    };
    // Fragments of equal size, as the plan takes them: only sizes travel here.
    let elements = (task.shape.parameters() / f64::from(fragments)) as usize;
    let layers = (0..fragments).map(|layer| (format!("layers.{layer}"), vec![elements]));
    Settings {
        seed: 0,
        sites: sync.sites,
        batch_samples: u64::from(task.global_batch),
        sequence_length: task.shape.seq as u64,
        steps_per_round: (sync.inner_steps / u64::from(fragments)).max(1),
        steps_total: STEPS_TOTAL,
        sync,
        schema: ParameterSchema::new(layers),
    }
}

fn report(
    (model, seed, seconds): (&str, u64, f64),
    (plan, on_failure): (&Plan, OnFailure),
    fleet: &Fleet,
    with: &FleetOutcome,
    without: &FleetOutcome,
) -> Report {
    let site = |site: &FleetSite| SiteReport {
        name: site.name.clone(),
        devices: site.devices,
        replicas: site.replicas,
        tokens_per_second: site.tokens_per_second,
    };
    let faults = |fault: Fault| with.faults.get(&fault).copied().unwrap_or(0);
    let part = |tokens: f64| tokens / with.tokens_capacity;
    let Lost { failures, stops, leaving, joining, slow, waiting, uncommitted } = with.lost;
    let rates = &fleet.rates;
    Report {
        seed,
        model: model.to_owned(),
        sites: fleet.sites.iter().map(site).collect(),
        devices: fleet.sites.iter().map(|site| site.devices).sum(),
        way: plan.way.describe(),
        quorum: fleet.settings.sync.quorum,
        days: fleet.seconds / DAY,
        rates: RatesReport {
            device_hours_between_failures: 1.0 / rates.failures_per_device_hour,
            device_hours_between_planned_stops: 1.0 / rates.stops_per_device_hour,
            on_failure,
            restart_seconds: rates.restart_seconds,
            recovery_seconds: rates.recovery_seconds,
            site_days_between_slow_spells: 1.0 / rates.spells_per_second / DAY,
            slow_factor: rates.slow_factor,
            site_days_between_leavings: 1.0 / rates.leavings_per_second / DAY,
            away_seconds: rates.away_seconds,
        },
        tokens_planned: plan.tokens_per_second * fleet.seconds,
        tokens_committed: with.tokens_committed,
        tokens_without_failures: without.tokens_committed,
        goodput: with.tokens_committed / without.tokens_committed,
        committed_of_capacity: part(with.tokens_committed),
        lost_of_capacity: LostReport {
            failures: part(failures),
            planned_stops: part(stops),
            leaving: part(leaving),
            joining: part(joining),
            slow: part(slow),
            waiting: part(waiting),
            uncommitted: part(uncommitted),
        },
        rounds: with.rounds,
        rounds_without_failures: without.rounds,
        faults: FaultsReport {
            failures: faults(Fault::Failure),
            planned_stops: faults(Fault::Stop),
            slow_spells: faults(Fault::Slow),
            leavings: faults(Fault::Leave),
        },
        left: with.left.clone(),
        rounds_abandoned: with.abandoned,
        regrouped: with.regrouped,
        stragglers: with.stragglers,
        decisions: with.decisions + without.decisions,
        seconds,
    }
}

fn text(report: &Report) -> String {
    let whole = |number: f64| count(number.round() as u64);
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = writeln!(
        text,
        "fleet   {} sites, {} devices, {}: {}; quorum {}; {} days",
        report.sites.len(),
        whole(report.devices),
        report.model,
        report.way,
        report.quorum,
        report.days
    );
    let rates = &report.rates;
    let after = match rates.on_failure {
        OnFailure::Replica => {
            let (restart, minutes) = (rates.restart_seconds, rates.recovery_seconds / 60.0);
            format!("a site restarts in {restart:.0} s, and has its replica back after {minutes:.0} minutes")
        }
        OnFailure::Site => format!("{:.0} minutes until the site is back", rates.recovery_seconds / 60.0),
    };
    let _ = writeln!(
        text,
        "rates   a failure in {} device hours, a planned stop in {}: {after}; a slow spell in {:.0} days of a site, a leaving in {:.0}",
        whole(rates.device_hours_between_failures),
        whole(rates.device_hours_between_planned_stops),
        rates.site_days_between_slow_spells,
        rates.site_days_between_leavings
    );
    let _ = writeln!(
        text,
        "goodput {:.2} % of the tokens without failures: {:.4e} of {:.4e} in {} of {} rounds ({:.1} % of the plan's {:.4e})",
        100.0 * report.goodput,
        report.tokens_committed,
        report.tokens_without_failures,
        count(report.rounds),
        count(report.rounds_without_failures),
        100.0 * report.tokens_without_failures / report.tokens_planned,
        report.tokens_planned
    );
    let faults = &report.faults;
    let _ = writeln!(
        text,
        "faults  {} failures, {} planned stops, {} slow spells, {} leavings; {} rounds begun anew, {} deltas late",
        count(faults.failures),
        count(faults.planned_stops),
        count(faults.slow_spells),
        count(faults.leavings),
        count(report.rounds_abandoned),
        count(report.stragglers)
    );
    let lost = &report.lost_of_capacity;
    let rows = [
        ("committed", report.committed_of_capacity),
        ("failed devices", lost.failures),
        ("planned stops", lost.planned_stops),
        ("sites that had left", lost.leaving),
        ("joining again", lost.joining),
        ("slow spells", lost.slow),
        ("waiting for merges and others", lost.waiting),
        ("trained and lost", lost.uncommitted),
    ];
    for (index, (what, part)) in rows.into_iter().enumerate() {
        let head = if index == 0 { "time" } else { "" };
        let _ = writeln!(text, "{head:<7} {:>6.2} % {what}", 100.0 * part);
    }
    let _ = writeln!(
        text,
        "seed    {:#x}; {} decisions of the coordinator in {:.1} s",
        report.seed,
        count(report.decisions),
        report.seconds
    );
    text
}
