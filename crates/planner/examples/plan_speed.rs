//! How fast plans are made: small clusters, and 100,000 devices in eight sites. `cargo run --release -p planner --example plan_speed`

#![allow(clippy::print_stdout)]

use planner::Catalogue;
use planner::cluster::Cluster;
use planner::models;
use planner::search::{Task, Wish, plans};
use std::error::Error;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Each case is repeated for so long.
const MEASURED: Duration = Duration::from_secs(3);

/// Kinds of the large cluster's sites.
const KINDS: [&str; 8] = ["A100", "H100", "Ascend 910B", "H20", "MI300X", "H800", "A800", "H200"];

fn main() -> Result<(), Box<dyn Error>> {
    measure("2 sites of 8", &cluster(&KINDS[..2], 8)?, "llama-3-8b", 256)?;
    measure("3 sites of 64", &cluster(&KINDS[..3], 64)?, "llama-3-8b", 1_024)?;
    measure("8 sites of 12,500", &cluster(&KINDS, 12_500)?, "llama-3-405b", 16_384)
}

fn cluster(kinds: &[&str], devices: u32) -> Result<Cluster, Box<dyn Error>> {
    let mut text = "[link_default]\ngbit_s = 10\nround_trip_ms = 20\n".to_owned();
    for kind in kinds {
        writeln!(text, "[[site]]\nname = \"{kind}\"\ndevice = \"{kind}\"\ndevices = {devices}")?;
    }
    Ok(Cluster::parse(&text)?)
}

fn measure(name: &str, cluster: &Cluster, model: &str, batch: u32) -> Result<(), Box<dyn Error>> {
    let catalogue = Catalogue::built_in();
    let (sites, links) = (cluster.specs(&catalogue)?, cluster.network()?);
    let task = Task { shape: models::parse(model)?, global_batch: batch, tokens: 1e12 };
    let began = Instant::now();
    let mut count = 0_u32;
    while count == 0 || began.elapsed() < MEASURED {
        plans(&task, &sites, &links, &Wish::default())?;
        count += 1;
    }
    let each = began.elapsed().as_secs_f64() / f64::from(count);
    println!(
        "{name:20} {:>10.1} ms a plan, {:>8.1} plans a second, peak memory {}",
        1e3 * each,
        1.0 / each,
        peak_memory()
    );
    Ok(())
}

/// Most memory this process ever had, where the system tells.
fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or_else(|| "unknown".to_owned(), |value| value.trim().to_owned())
}
