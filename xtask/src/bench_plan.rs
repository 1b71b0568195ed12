//! `cargo xtask bench plan`: how fast plans are made, on one core, and in how much memory, beside what was wanted.
//!
//! A plan is one thread's arithmetic. What counts is that thread's time on its core, where the system tells it: a busy machine makes a plan late, not dear.
//! Each plan begins with the text of its cluster file and ends with the best plans; the catalogue is read once. Small clusters are two to four
//! sites of tens to hundreds of devices, each with its own model, one after the other; the large one is 100,000 devices of eight makers' kinds
//! in eight sites.

use planner::Catalogue;
use planner::cluster::Cluster;
use planner::models;
use planner::search::{Task, Wish, plans};
use serde_json::json;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Bars: small plans a second, seconds of the large one, bytes of the whole process.
const SMALL_PER_SECOND: f64 = 100.0;
const LARGE_SECONDS: f64 = 10.0;
const MEMORY_BYTES: f64 = 500e6;

/// How long small clusters are planned.
const SMALL_MEASURED: Duration = Duration::from_secs(5);

/// Sites of a small cluster: device, number; and the model.
const SMALL: &[(&[(&str, u32)], &str)] = &[
    (&[("H100", 64), ("A100", 128)], "llama-3-8b"),
    (&[("A100", 32), ("Ascend 910B", 64), ("H20", 32)], "llama-3-8b"),
    (&[("MI300X", 16), ("H100", 16)], "llama-3.2-1b"),
    (&[("A100", 256), ("H800", 128), ("A800", 128), ("H20", 256)], "llama-3-70b"),
];

/// Kinds of the large cluster, as many devices of each.
const LARGE: &[&str] = &["A100", "H100", "Ascend 910B", "H20", "MI300X", "H800", "A800", "H200"];
const LARGE_EACH: u32 = 12_500;

/// Settings of the bench.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum PlanBenchError {
    /// A cluster of this bench is no cluster.
    #[error(transparent)]
    Cluster(#[from] planner::cluster::ClusterError),
    /// It has no plan.
    #[error(transparent)]
    Plan(#[from] planner::search::PlanError),
    /// A model of this bench is none.
    #[error(transparent)]
    Model(#[from] models::ModelNameError),
}

/// A cluster's text, with 10 Gbit/s between all.
fn cluster(sites: &[(&str, u32)]) -> String {
    let mut text = "[link_default]\ngbit_s = 10\nround_trip_ms = 20\n".to_owned();
    for (index, (device, devices)) in sites.iter().enumerate() {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "[[site]]\nname = \"s{index}\"\ndevice = \"{device}\"\ndevices = {devices}");
    }
    text
}

fn plan(catalogue: &Catalogue, text: &str, model: &str, batch: u32) -> Result<(), PlanBenchError> {
    let cluster = Cluster::parse(text)?;
    let shape = models::parse(model)?;
    let task = Task { shape, global_batch: batch, tokens: 20.0 * shape.active_parameters() };
    let found = plans(&task, &cluster.specs(catalogue)?, &cluster.network()?, &Wish::default())?;
    std::hint::black_box(found);
    Ok(())
}

/// Measures and prints.
///
/// # Errors
/// A cluster that cannot be planned.
pub(crate) fn run(options: &Options) -> Result<(), PlanBenchError> {
    let catalogue = Catalogue::built_in();
    let small: Vec<(String, &str)> = SMALL.iter().map(|(sites, model)| (cluster(sites), *model)).collect();
    let (began, core, mut made) = (Instant::now(), CoreTime::now(), 0_u32);
    while began.elapsed() < SMALL_MEASURED {
        let (text, model) = &small[made as usize % small.len()];
        plan(&catalogue, text, model, 1_024)?;
        made += 1;
    }
    let per_second = f64::from(made) / core.elapsed();
    let all: Vec<(&str, u32)> = LARGE.iter().map(|kind| (*kind, LARGE_EACH)).collect();
    let (text, core) = (cluster(&all), CoreTime::now());
    plan(&catalogue, &text, "llama-3-70b", 16_384)?;
    let seconds = core.elapsed();
    let memory = peak_memory();
    let profile = if cfg!(debug_assertions) { "development" } else { "release" };
    if options.json {
        let report = json!({
            "profile": profile, "small_plans_per_second": per_second, "small_ratio_to_bar": per_second / SMALL_PER_SECOND,
            "large_seconds": seconds, "large_ratio_to_bar": LARGE_SECONDS / seconds,
            "memory_bytes": memory, "memory_ratio_to_bar": memory.map(|memory| MEMORY_BYTES / memory),
        });
        println!("{report}");
        return Ok(());
    }
    println!("{profile} profile, one core; a ratio above 1 is better than the bar");
    println!(
        "small clusters  {per_second:.0} plans/s of {SMALL_PER_SECOND:.0}: ratio {:.2}",
        per_second / SMALL_PER_SECOND
    );
    println!("100,000 devices {seconds:.2} s of {LARGE_SECONDS:.0}: ratio {:.2}", LARGE_SECONDS / seconds);
    match memory {
        Some(memory) => println!(
            "memory at most  {:.0} MB of {:.0}: ratio {:.1}",
            memory / 1e6,
            MEMORY_BYTES / 1e6,
            MEMORY_BYTES / memory
        ),
        None => println!("memory at most  this system does not tell"),
    }
    Ok(())
}

/// Time of this process on a core, or of the clock where the system does not tell.
struct CoreTime {
    began: Instant,
    nanoseconds: Option<f64>,
}

impl CoreTime {
    fn now() -> Self {
        Self { began: Instant::now(), nanoseconds: core_nanoseconds() }
    }

    /// Seconds since then.
    fn elapsed(&self) -> f64 {
        let core = self.nanoseconds.zip(core_nanoseconds()).map(|(before, now)| (now - before) / 1e9);
        core.filter(|seconds| *seconds > 0.0).unwrap_or_else(|| self.began.elapsed().as_secs_f64())
    }
}

/// The first figure of the main thread's scheduling statistics.
fn core_nanoseconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Most memory that this process has had, bytes, where the system tells.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<f64>().ok()? * 1024.0)
}
