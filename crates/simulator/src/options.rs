//! What to simulate.

use std::fmt;
use std::str::FromStr;

/// How to simulate one seed. What is not set here is drawn from the seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Sites; else 2 to 5.
    pub sites: Option<u32>,
    /// Virtual minutes of the phase with faults; else 1 to 4.
    pub minutes: Option<f64>,
    /// Whether there are faults at all.
    pub faults: bool,
    /// Whether sites call a coordinator that is away; else they end, and are started again.
    pub sites_call: Option<bool>,
    /// Whether rounds are sharded; else they are a mesh.
    pub sharded: Option<bool>,
    /// A bug to put in, which a checker must find.
    pub sabotage: Option<Sabotage>,
    /// Lines of the trace that a violation comes with.
    pub trace_lines_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        let (sites, minutes, sites_call, sharded, sabotage) = (None, None, None, None, None);
        Self { sites, minutes, faults: true, sites_call, sharded, sabotage, trace_lines_max: 60 }
    }
}

/// A bug that was real once somewhere, put back to see it caught. It is in the simulator's own shells: no shipped code has a switch for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sabotage {
    /// Sites merge by heads, not by tokens.
    EqualWeights,
    /// A site that starts again has forgotten which terms it has seen.
    ForgottenFencing,
    /// A site is given the lease of the round before once more.
    LeaseTwice,
    /// A newcomer takes the parameters without the outer momentum.
    MomentumMissing,
    /// The log returns before a line is on the disk.
    WriteBehind,
}

impl Sabotage {
    /// Every one.
    pub const ALL: [Self; 5] =
        [Self::EqualWeights, Self::ForgottenFencing, Self::LeaseTwice, Self::MomentumMissing, Self::WriteBehind];

    /// As a command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::EqualWeights => "equal-weights",
            Self::ForgottenFencing => "forgotten-fencing",
            Self::LeaseTwice => "lease-twice",
            Self::MomentumMissing => "momentum-missing",
            Self::WriteBehind => "write-behind",
        }
    }
}

impl fmt::Display for Sabotage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Sabotage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|bug| bug.name() == text).ok_or_else(|| format!("'{text}' is none of {}", names()))
    }
}
