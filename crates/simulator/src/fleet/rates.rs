//! How often sites fail, slow down and leave: published rates, each with its source, and the few that nobody has published, named so.
//!
//! | what | figure | source |
//! |---|---|---|
//! | failures | 419 unexpected interruptions in 54 days on 16,384 H100: one in 50,700 device hours | Llama 3, arXiv 2407.21783, section 3.3.4 |
//! | | for comparison: 6.50 and 2.34 a thousand days of nodes of eight A100, one in 29,500 and 82,100 device hours | arXiv 2410.21680 |
//! | planned stops | 47 in the same 54 days | arXiv 2407.21783, section 3.3.4 |
//! | recovery | "less than 10 minutes" to detect and diagnose, spare nodes at hand | MegaScale, arXiv 2402.15627, section 6.3 |
//! | | for comparison: 466 stops that cost under 10 % of 54 days cost under 17 minutes each | arXiv 2407.21783 |
//! | restart of a site without the failed replica | 150 s for 4,800 devices, nearly the same for other numbers, one step lost | FlashRecovery, arXiv 2509.03047 |
//! | | for comparison: around 20 s at 1,024 GPUs | TrainMover, arXiv 2412.12636 |
//! | slow spells | 1.34 times the time; from under a minute to nearly ten hours | arXiv 2410.12588 |
//! | how often a spell | **assumed**: once a week a site | |
//! | sites leaving | **assumed**: once in 30 days a site, for four hours | |
//!
//! What a failure is depends on the site ([`super::FleetSite::replicas`]):
//! - *one failure domain* (1 replica): the device stops its whole site, because a step needs all devices. The site loses what no merge holds
//!   yet, comes back after the recovery with the checkpoint on its disk, and catches up by the protocol. It is what Beringia's own process does;
//! - *data-parallel replicas*: all stop for the restart, lose the step they were in, and go on without the replica of the failed device, which is
//!   back after the recovery; the last one that fails stops the site as above. The site's own training stack must be able to do that: its
//!   other replicas hold all of the state, and the replica that comes back is made ready beside the training.

/// Hours of Llama 3's 54 days times its devices.
const LLAMA_DEVICE_HOURS: f64 = 54.0 * 24.0 * 16_384.0;

/// Its unexpected and its planned interruptions.
const LLAMA_FAILURES: f64 = 419.0;
const LLAMA_STOPS: f64 = 47.0;

/// MegaScale's bound for detection and diagnosis, seconds.
const RECOVERY_SECONDS: f64 = 600.0;

/// FlashRecovery's time from a failure until the others train.
const RESTART_SECONDS: f64 = 150.0;

/// Factor on the time of a step in a slow spell, and between which lengths spells are drawn, seconds, evenly in their logarithm.
const SLOW_FACTOR: f64 = 1.34;
const SLOW_SECONDS: (f64, f64) = (30.0, 36_000.0);

/// Assumed: spells of a site in a week, leavings in 30 days, and how long a site then is away.
const SLOW_SPELLS_PER_WEEK: f64 = 1.0;
const LEAVINGS_PER_MONTH: f64 = 1.0;
const AWAY_SECONDS: f64 = 4.0 * 3_600.0;

/// Seconds of an hour, a week and 30 days.
const HOUR: f64 = 3_600.0;
const WEEK: f64 = 168.0 * HOUR;
const MONTH: f64 = 720.0 * HOUR;

/// What breaks, and how often.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Failures of a device in an hour.
    pub failures_per_device_hour: f64,
    /// Planned stops for each device in an hour.
    pub stops_per_device_hour: f64,
    /// From a failure or stop until the site's process runs again, or the failed replica is back, seconds.
    pub recovery_seconds: f64,
    /// From a failure until the other replicas of the site train again, seconds.
    pub restart_seconds: f64,
    /// Slow spells of a site in a second.
    pub spells_per_second: f64,
    /// Factor on the time of a step in one.
    pub slow_factor: f64,
    /// Shortest and longest spell, seconds.
    pub spell_seconds: (f64, f64),
    /// Leavings of a site in a second.
    pub leavings_per_second: f64,
    /// How long it is away, seconds.
    pub away_seconds: f64,
}

impl Rates {
    /// The table above.
    pub fn published() -> Self {
        Self {
            failures_per_device_hour: LLAMA_FAILURES / LLAMA_DEVICE_HOURS,
            stops_per_device_hour: LLAMA_STOPS / LLAMA_DEVICE_HOURS,
            recovery_seconds: RECOVERY_SECONDS,
            restart_seconds: RESTART_SECONDS,
            spells_per_second: SLOW_SPELLS_PER_WEEK / WEEK,
            slow_factor: SLOW_FACTOR,
            spell_seconds: SLOW_SECONDS,
            leavings_per_second: LEAVINGS_PER_MONTH / MONTH,
            away_seconds: AWAY_SECONDS,
        }
    }

    /// Nothing breaks.
    pub fn none() -> Self {
        Self {
            failures_per_device_hour: 0.0,
            stops_per_device_hour: 0.0,
            spells_per_second: 0.0,
            leavings_per_second: 0.0,
            ..Self::published()
        }
    }

    /// How often a fault of that kind begins at a site of so many devices, in a second.
    pub(super) fn per_second(&self, fault: Fault, devices: f64) -> f64 {
        match fault {
            Fault::Failure => self.failures_per_device_hour * devices / HOUR,
            Fault::Stop => self.stops_per_device_hour * devices / HOUR,
            Fault::Slow => self.spells_per_second,
            Fault::Leave => self.leavings_per_second,
        }
    }
}

/// What befalls a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A device fails: the process ends without a word, or the site goes on without a replica.
    Failure,
    /// Planned: the process saves and leaves.
    Stop,
    /// Its steps take longer for a while.
    Slow,
    /// The whole site leaves for hours, and joins again.
    Leave,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Failure, Self::Stop, Self::Slow, Self::Leave];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_had_an_interruption_every_three_hours() {
        let rates = Rates::published();
        let seconds = 1.0 / rates.per_second(Fault::Failure, 16_384.0);
        assert!((seconds / HOUR - 3.09).abs() < 0.01, "{seconds}");
        assert!(Fault::ALL.iter().all(|fault| Rates::none().per_second(*fault, 1e6) == 0.0));
    }
}
