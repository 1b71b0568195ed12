//! Faults in the lab: processes that are killed or stopped, links that are cut, when the command line says so or at random.
//!
//! What is to happen is decided before anything is started ([`spec`] reads it, [`schedule`] orders it, both without a clock
//! or a process); `crew` makes it happen, and [`outcome`] reads from the event logs what it did to the run.

mod outcome;
mod schedule;
mod spec;

pub(super) use self::outcome::{FaultReport, Observed, median, observe};
pub(super) use self::schedule::{Action, Schedule};
pub(super) use self::spec::{Fault, What};

use self::schedule::Chaos;
use self::spec::Names;
use super::wan::COORDINATOR;
use crate::failure::Failure;
use std::time::Duration;

/// What mends a fault that makes no sense.
const HINT: &str = "try `--kill site-b@20s`, `--kill coordinator@40s`, `--stop site-b@20s..30s`, `--link 100Mbit/s,10ms --cut a-b@30s..45s`";

/// Longest pause before a process that was killed is started again.
const RESTART_SECONDS_MAX: f64 = 600.0;

/// What the command line says of faults.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct FaultArgs {
    /// Kill a process (SIGKILL) so long after the first round began, as in site-b@20s or coordinator@40s; may be repeated.
    #[arg(long = "kill", value_name = "WHO@TIME")]
    kills: Vec<String>,
    /// Stop a process (SIGSTOP) for a while, as in site-b@20s..50s; may be repeated.
    #[arg(long = "stop", value_name = "WHO@FROM..TO")]
    stops: Vec<String>,
    /// Drop what two places say to each other, as in a-b@30s..45s, or a>b@30s..45s for one way; needs --link; may be repeated.
    #[arg(long = "cut", value_name = "A-B@FROM..TO")]
    cuts: Vec<String>,
    /// Kill a process at random once in so many seconds, the coordinator as often as each site.
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["kills", "stops", "cuts"])]
    chaos: Option<f64>,
    /// Seed of --chaos; a fresh one, which is printed, unless given.
    #[arg(long, value_name = "N", requires = "chaos")]
    chaos_seed: Option<u64>,
    /// Pause before a process that was killed is started again.
    #[arg(long, value_name = "TIME", default_value = "3s")]
    restart_after: String,
}

/// The faults of a lab.
#[derive(Debug, Clone)]
pub(super) struct Faults {
    /// In the order in which they begin.
    pub(super) schedule: Schedule,
    pub(super) restart_after: Duration,
    /// Of `--chaos`, with its period in seconds.
    pub(super) chaos: Option<(u64, f64)>,
}

impl FaultArgs {
    /// The faults for a lab of these sites, or why they make no sense. `seconds` is how long the lab trains, where that is known;
    /// `fresh_seed` is used where none is given.
    pub(super) fn resolve(
        &self,
        sites: &[String],
        has_links: bool,
        seconds: Option<f64>,
        fresh_seed: u64,
    ) -> Result<Faults, Failure> {
        self.checked(sites, has_links, seconds, fresh_seed).map_err(|problem| Failure::new(problem, HINT))
    }

    fn checked(
        &self,
        sites: &[String],
        has_links: bool,
        seconds: Option<f64>,
        fresh_seed: u64,
    ) -> Result<Faults, String> {
        let names = Names::new(sites, COORDINATOR);
        let pause = spec::parse_seconds(&self.restart_after)
            .filter(|pause| (0.0..=RESTART_SECONDS_MAX).contains(pause))
            .ok_or_else(|| format!("--restart-after {}: 0s to 600s are expected", self.restart_after))?;
        if !self.cuts.is_empty() && !has_links {
            return Err("--cut needs links that can be cut: add --link".to_owned());
        }
        let in_flag = |flag: &str, text: &str, problem: String| format!("{flag} {text}: {problem}");
        let mut faults = Vec::new();
        for text in &self.kills {
            faults.push(names.kill(text, pause).map_err(|problem| in_flag("--kill", text, problem))?);
        }
        for text in &self.stops {
            faults.push(names.stop(text).map_err(|problem| in_flag("--stop", text, problem))?);
        }
        for text in &self.cuts {
            faults.push(names.cut(text).map_err(|problem| in_flag("--cut", text, problem))?);
        }
        let chaos = self.chaos.map(|period| (self.chaos_seed.unwrap_or(fresh_seed), period));
        if let Some((seed, period_seconds)) = chaos {
            let chaos = Chaos { seed, period_seconds, pause_seconds: pause, processes: sites.len() + 1 };
            faults = schedule::chaos(&chaos)?;
        } else if let Some(late) = faults.iter().find(|fault| seconds.is_some_and(|seconds| fault.from >= seconds)) {
            let text = names.describe(late);
            return Err(format!("{text}: the lab trains for {:.0} s", seconds.unwrap_or_default()));
        }
        let schedule = Schedule::new(faults, &names)?;
        Ok(Faults { schedule, restart_after: Duration::from_secs_f64(pause), chaos })
    }
}

impl Faults {
    pub(super) fn is_empty(&self) -> bool {
        self.schedule.is_empty()
    }
}

#[cfg(test)]
mod tests;
