//! A month of a fleet: what a plan's sites commit when devices fail, steps slow down, and sites leave and join.
//!
//! `rounds::Coordinator` and one `rounds::Member` for each site decide everything, as shipped; they exchange their messages here over a
//! queue of events in virtual time. What surrounds them has lengths of time instead of work: a step takes what the planner predicts, a
//! delta takes its bytes over the link, a state its bytes, coding its bytes over the host's rate ([`node`]). There are no tensors, disks
//! or sockets in it: invariants are checked by the simulator of whole runs, which has them.
//!
//! ```text
//! capacity = sum over sites of speed x time
//!          = committed + trained and not committed + slowed + waiting + joining + away
//! goodput  = tokens committed / tokens that the same fleet commits when nothing breaks
//! ```
//!
//! What it is not: a model of a network (links are queues, one transfer after the other), of a failing coordinator, or of repairs (spare
//! nodes are at hand, so that what failed is back after the recovery).
//!
//! [`Crowd`] is another matter: the coordinator alone, with as many sites as one likes, so that its decisions can be timed.

mod clock;
mod crowd;
mod drive;
mod node;
mod rates;

pub use clock::Lost;
pub use crowd::{Crowd, CrowdPhase};
pub use rates::{Fault, Rates};

use base::{Hint, SiteId};
use drive::Drive;
use rounds::{LeaveReason, Settings};
use std::collections::BTreeMap;

/// A site, as the planner sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct FleetSite {
    /// Its name.
    pub name: String,
    /// Its devices: how often one of them fails.
    pub devices: f64,
    /// Its data-parallel replicas, each of which can fail alone; 1 where a device that fails stops all of the site ([`Rates`]).
    pub replicas: f64,
    /// Its speed in an inner step, tokens a second.
    pub tokens_per_second: f64,
    /// What all its transfers share, bytes a second each way; none where only its links bound them.
    pub access_bytes_per_second: Option<f64>,
}

/// The way from one site to another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FleetLink {
    /// What it carries, bytes a second.
    pub bytes_per_second: f64,
    /// Seconds.
    pub round_trip_seconds: f64,
}

/// What the first site stops training for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Validation {
    /// Rounds between two of them.
    pub every_rounds: u64,
    /// Tokens that are only gone forward over.
    pub tokens: f64,
}

/// Sites, links and settings of a run.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// Whoever takes part, by site id.
    pub sites: Vec<FleetSite>,
    /// From each site (row) to each other one.
    pub links: Vec<Vec<FleetLink>>,
    /// What the coordinator's decisions depend on.
    pub settings: Settings,
    /// Encoding and merging together: bytes of f32 a second; infinite where they cost nothing.
    pub coding_bytes_per_second: f64,
    /// Rounds between two checkpoints of a site.
    pub checkpoint_rounds: u64,
    /// What the first site does beside training, where anything.
    pub validation: Option<Validation>,
    /// Length of the run, seconds; it ends before where its steps are done.
    pub seconds: f64,
    /// What breaks.
    pub rates: Rates,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FleetOutcome {
    /// Tokens whose training is part of the model.
    pub tokens_committed: f64,
    /// Tokens that all sites could have trained if they had done nothing else.
    pub tokens_capacity: f64,
    /// What became of the rest.
    pub lost: Lost,
    /// Rounds committed.
    pub rounds: u64,
    /// From the begin of the first round to the last commit.
    pub seconds: f64,
    /// Deltas, slices and merged parts as they came over the links.
    pub fetched_bytes: f64,
    /// Events that the coordinator decided on.
    pub decisions: u64,
    /// Faults by kind.
    pub faults: BTreeMap<Fault, u64>,
    /// Sites that the coordinator let go, by its reason.
    pub left: BTreeMap<&'static str, u64>,
    /// Rounds that were begun anew, because all who worked for them had left.
    pub abandoned: u64,
    /// Times that nobody could reach the last commit.
    pub regrouped: u64,
    /// Deltas that a round was closed without.
    pub stragglers: u64,
}

/// Why a run ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FleetError {
    /// There is nobody, or links are missing.
    #[error("a fleet of {sites} sites has {links} rows of links")]
    Shape {
        /// Sites.
        sites: usize,
        /// Rows.
        links: usize,
    },
    /// A site refused what the coordinator sent: a bug in one of them.
    #[error("site {site} refused after {seconds} s: {what}")]
    Refused {
        /// Who.
        site: SiteId,
        /// When, virtual seconds.
        seconds: u64,
        /// What it said.
        what: String,
    },
    /// The samples of the run no longer add up (invariant I2): a bug.
    #[error("the ledger is wrong at the end: {0}")]
    Ledger(String),
}

impl Hint for FleetError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Shape { .. } => "describe a link from each site to each other one".to_owned(),
            Self::Refused { .. } | Self::Ledger(_) => {
                "report it with the command and its seed: it is a bug of Beringia".to_owned()
            }
        })
    }
}

/// Simulates one run. The same fleet and seed give the same outcome, to the last bit.
///
/// # Errors
/// The fleet has no sites or not all links, or the decisions contradict each other: see [`FleetError`].
pub fn simulate(fleet: &Fleet, seed: u64) -> Result<FleetOutcome, FleetError> {
    let sites = fleet.sites.len();
    if sites == 0 || fleet.links.len() != sites || fleet.links.iter().any(|row| row.len() != sites) {
        return Err(FleetError::Shape { sites, links: fleet.links.len() });
    }
    Drive::new(fleet, seed).run()
}

/// Two words for why a site left.
fn word(reason: LeaveReason) -> &'static str {
    match reason {
        LeaveReason::Finished => "finished",
        LeaveReason::Stopped => "stopped",
        LeaveReason::ConnectionLost => "connection lost",
        LeaveReason::TooSlow => "too slow",
        LeaveReason::DeltasMissing => "deltas missing",
        LeaveReason::Diverged => "diverged",
        LeaveReason::Misbehaved => "misbehaved",
        _ => "other",
    }
}

#[cfg(test)]
mod tests;
