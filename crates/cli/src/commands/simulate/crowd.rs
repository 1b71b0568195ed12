//! `beringia simulate --crowd`: how fast the coordinator decides with so many sites, and what memory it takes.
//!
//! Every event of a round is put to it, in a mesh; a part that takes longer than [`PART_SECONDS`] is stopped, and what was measured of it is
//! told. Its shell (log, sockets, encoding) is not in it.

use crate::format::{bytes, count};
use crate::output::Output;
use serde::Serialize;
use simulator::fleet::{Crowd, CrowdPhase};
use std::time::Instant;

/// Longest measurement of one part of a round.
const PART_SECONDS: f64 = 20.0;

/// Events between two looks at the clock.
const EVENTS_AT_ONCE: u64 = 16;

#[derive(Debug, Serialize)]
struct Report {
    sites: u32,
    parts: Vec<Part>,
    /// Of a whole round, what was not measured at the measured rate.
    round_seconds: Option<f64>,
    rounds_committed: u64,
    resident_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Part {
    part: &'static str,
    events: u64,
    of: u64,
    seconds: f64,
    decisions_per_second: f64,
    commands: u64,
}

/// Runs the command.
pub(super) fn run(sites: u32, output: &Output) {
    let mut crowd = Crowd::new(sites);
    let mut parts = Vec::new();
    for phase in CrowdPhase::ALL {
        let part = measure(&mut crowd, phase, sites);
        let is_whole = part.events == part.of;
        output.line(format_args!(
            "{:<8} {} of {} events in {:.2} s: {} decisions/s, {} commands",
            part.part,
            count(part.events),
            count(part.of),
            part.seconds,
            count(part.decisions_per_second as u64),
            count(part.commands)
        ));
        parts.push(part);
        if !is_whole {
            break;
        }
    }
    let of_a_round = parts.iter().filter(|part| matches!(part.part, "compute" | "hold" | "apply"));
    let seconds: f64 = of_a_round.map(|part| part.of as f64 / part.decisions_per_second).sum();
    let (resident_bytes, rounds_committed) = (resident(), crowd.rounds());
    if let Some(resident) = resident_bytes {
        output.line(format_args!("memory   {}", bytes(resident)));
    }
    let round_seconds = (seconds > 0.0).then_some(seconds);
    if let Some(seconds) = round_seconds {
        output.line(format_args!(
            "round    {seconds:.2} s of decisions for {} sites, at these rates",
            count(u64::from(sites))
        ));
    }
    output.object(&Report { sites, parts, round_seconds, rounds_committed, resident_bytes });
}

fn measure(crowd: &mut Crowd, phase: CrowdPhase, sites: u32) -> Part {
    let (of, before) = (phase.events(u64::from(sites)), crowd.commands());
    let (began, mut events) = (Instant::now(), 0);
    while events < of && began.elapsed().as_secs_f64() < PART_SECONDS {
        let now = EVENTS_AT_ONCE.min(of - events);
        (0..now).for_each(|_| crowd.step());
        events += now;
    }
    let seconds = began.elapsed().as_secs_f64();
    let decisions_per_second = events as f64 / seconds.max(1e-9);
    Part { part: phase.name(), events, of, seconds, decisions_per_second, commands: crowd.commands() - before }
}

/// Memory of this process, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes << 10)
}
