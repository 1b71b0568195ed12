//! What can break, and when it does.

use crate::network::{COORDINATOR, Machine};
use base::random::Random;

/// Something that breaks; most of it is mended after a while.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// kill -9 of a site, or its machine loses power; it starts again.
    KillSite { site: usize, by_power: bool, down_seconds: f64 },
    /// The same of the coordinator.
    KillCoordinator { by_power: bool, down_seconds: f64 },
    /// The coordinator dies in one of its next writes to the disk; power is lost with it, or not.
    KillAtWrite { operations: u32, by_power: bool },
    /// The coordinator dies amid its next messages: after the log, before or amid the broadcast.
    KillAtSend { sends: u32 },
    /// A link carries nothing that way.
    Cut { from: Machine, to: Machine, seconds: f64 },
    /// Nor the other way.
    CutBoth { from: Machine, to: Machine, seconds: f64 },
    /// A site's connection to the coordinator is reset: what is on its way is lost.
    Reset { site: usize },
    /// A link takes many times its latency, both ways.
    SlowLink { from: Machine, to: Machine, factor: f64, seconds: f64 },
    /// A bit flips in so many of the next transfers to a site.
    Corrupt { site: usize, transfers: u32 },
    /// A site computes slower.
    SlowSite { site: usize, factor: f64, seconds: f64 },
    /// A process is stopped, and goes on later as if nothing had been.
    Freeze { machine: Machine, seconds: f64 },
    /// The coordinator's clock jumps.
    ClockAhead { seconds: f64 },
    /// A disk takes nothing.
    DiskFull { machine: Machine, seconds: f64 },
    /// The coordinator hangs and is replaced by another process on the same log; it comes back, and has the address for a while.
    Replace { back_seconds: f64, stays_seconds: f64 },
}

impl Fault {
    /// How long it lasts, where it is to be mended.
    pub(crate) fn seconds(&self) -> Option<f64> {
        match self {
            Self::Cut { seconds, .. }
            | Self::CutBoth { seconds, .. }
            | Self::SlowLink { seconds, .. }
            | Self::SlowSite { seconds, .. }
            | Self::DiskFull { seconds, .. } => Some(*seconds),
            _ => None,
        }
    }

    /// What breaks next, where there are so many sites.
    pub(crate) fn draw(random: &mut Random, sites: usize) -> Self {
        let site = random.next_below(sites as u64) as usize;
        let machine = random.next_below(sites as u64 + 1) as usize;
        let by_power = random.next_below(3) == 0;
        // Short ones often, long ones now and then.
        let seconds = if random.next_below(3) == 0 { 90.0 } else { 8.0 } * random.next_unit();
        let down_seconds = 0.3 + 0.3 * seconds;
        let (from, to) = link(random, sites);
        match random.next_below(20) {
            0..=2 => Self::KillSite { site, by_power, down_seconds },
            3 => Self::KillCoordinator { by_power, down_seconds: down_seconds.min(10.0) },
            4 | 5 => Self::KillAtWrite { operations: random.next_below(12) as u32, by_power },
            6 | 7 => Self::KillAtSend { sends: 1 + random.next_below(8) as u32 },
            8 => Self::Cut { from, to, seconds },
            9 => Self::CutBoth { from, to, seconds },
            10 => Self::Reset { site },
            11 => Self::SlowLink { from, to, factor: 3.0 + 40.0 * random.next_unit(), seconds },
            12 | 13 => Self::Corrupt { site, transfers: 1 + random.next_below(4) as u32 },
            14 => Self::SlowSite { site, factor: 1.5 + 10.0 * random.next_unit(), seconds },
            15 => Self::Freeze { machine, seconds },
            16 => Self::ClockAhead { seconds: 4_000.0 * random.next_unit().powi(3) },
            17 => Self::DiskFull { machine, seconds: seconds.min(10.0) },
            _ => Self::Replace { back_seconds: 2.0 + seconds, stays_seconds: 2.0 + 8.0 * random.next_unit() },
        }
    }
}

/// Two machines.
fn link(random: &mut Random, sites: usize) -> (Machine, Machine) {
    let machines = sites as u64 + 1;
    let from = random.next_below(machines);
    let to = (from + 1 + random.next_below(machines - 1)) % machines;
    // The way to the coordinator matters as often as all others.
    let ends = if random.next_below(2) == 0 { (from, to) } else { (COORDINATOR as u64, 1 + from % (machines - 1)) };
    let (from, to) = if random.next_below(2) == 0 { ends } else { (ends.1, ends.0) };
    (from as usize, to as usize)
}
