//! `beringia simulate --crowd`: how fast the coordinator decides with so many sites, and what memory it takes.
//!
//! Every event of a round is put to it: where deltas travel as a plan would have it for so many sites, and in a mesh. A part that takes longer
//! than [`PART_SECONDS`] is stopped, and what was measured of it is told. Its shell (log, sockets, encoding) is not in it.

use crate::format::{bytes, count};
use crate::output::Output;
use base::config::Exchange;
use serde::Serialize;
use simulator::fleet::{Crowd, CrowdPhase};
use std::time::Instant;

/// Longest measurement of one part of a round.
const PART_SECONDS: f64 = 20.0;

/// Events between two looks at the clock.
const EVENTS_AT_ONCE: u64 = 16;

/// Seconds of the coordinator's clock that are timed after a round.
const TICKS: u32 = 8;

#[derive(Debug, Serialize)]
struct Report {
    sites: u32,
    #[serde(flatten)]
    mesh: Measured,
    /// Where rounds of so many sites are sharded unless they are told not to be.
    sharded: Option<Measured>,
}

#[derive(Debug, Serialize)]
struct Measured {
    parts: Vec<Part>,
    /// Of a whole round, what was not measured at the measured rate.
    round_seconds: Option<f64>,
    /// Of what the coordinator does once a second besides.
    tick_seconds: f64,
    rounds_committed: u64,
    /// The most that this process has held meanwhile.
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
    let (measured, is_sharded) = measure(sites, Exchange::Auto, output);
    let (mesh, sharded) = match is_sharded {
        true => (measure(sites, Exchange::Mesh, output).0, Some(measured)),
        false => (measured, None),
    };
    output.object(&Report { sites, mesh, sharded });
}

/// The parts of one round, and whether it is sharded.
fn measure(sites: u32, exchange: Exchange, output: &Output) -> (Measured, bool) {
    forget_peak();
    let mut crowd = Crowd::exchanging(sites, exchange);
    let (mut parts, mut seconds) = (Vec::new(), 0.0);
    while crowd.rounds() == 0 || crowd.phase() == CrowdPhase::Apply {
        let phase = crowd.phase();
        let part = time(&mut crowd);
        let is_whole = part.events == part.of;
        if phase.repeats() {
            seconds += part.of as f64 / part.decisions_per_second;
        }
        if phase == CrowdPhase::Compute {
            let name = if crowd.is_sharded() == Some(true) { "sharded" } else { "mesh" };
            output.line(format_args!("{name}, {} sites:", count(u64::from(sites))));
        }
        tell(&part, output);
        parts.push(part);
        if !is_whole {
            break;
        }
    }
    let began = Instant::now();
    (0..TICKS).for_each(|_| crowd.tick());
    let tick_seconds = began.elapsed().as_secs_f64() / f64::from(TICKS);
    let (resident_bytes, rounds_committed) = (resident(), crowd.rounds());
    let round_seconds = (seconds > 0.0).then_some(seconds);
    output.line(format_args!("tick     {:.3} ms a second", 1e3 * tick_seconds));
    if let Some(resident) = resident_bytes {
        output.line(format_args!("memory   {}", bytes(resident)));
    }
    if let Some(seconds) = round_seconds {
        output.line(format_args!("round    {seconds:.2} s of decisions, at these rates\n"));
    }
    let is_sharded = crowd.is_sharded() == Some(true);
    (Measured { parts, round_seconds, tick_seconds, rounds_committed, resident_bytes }, is_sharded)
}

fn tell(part: &Part, output: &Output) {
    output.line(format_args!(
        "{:<8} {} of {} events in {:.2} s: {} decisions/s, {} commands",
        part.part,
        count(part.events),
        count(part.of),
        part.seconds,
        count(part.decisions_per_second as u64),
        count(part.commands)
    ));
}

/// Times the present phase.
fn time(crowd: &mut Crowd) -> Part {
    let (phase, of, before) = (crowd.phase(), crowd.events(), crowd.commands());
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

/// Lets the peak of [`resident`] begin anew, where the system can.
fn forget_peak() {
    // Else the peak is of everything so far.
    let _cannot = std::fs::write("/proc/self/clear_refs", "5");
}

/// The most memory of this process, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes << 10)
}
