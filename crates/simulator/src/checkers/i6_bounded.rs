//! I6: bad input gives an error; never a panic, never unbounded memory.
//!
//! No process panics, and no queue of a site is longer than the rounds that may be open, with what is kept for others.

use super::Checker;
use crate::scenario::Scenario;
use crate::trace::{Load, Observation};
use rounds::Settings;
use rounds::plan::FragmentPlan;
use rounds::schedule::lookahead;

/// Jobs for each open round: train before and after the merge, snapshot, encode, reduce, merge, apply, and one to spare.
const JOBS_PER_ROUND: usize = 8;

/// What of each site is held for a round: its delta, a slice of it, the part that it merged; each here for the merge and on the shelf for
/// others.
const HELD_PER_ROUND: usize = 6;

/// The same on its way.
const FETCHES_PER_ROUND: usize = 3;

pub(super) struct Bounded {
    bound: Load,
}

impl Bounded {
    pub(super) fn new(scenario: &Scenario) -> Self {
        let settings = Settings::new(&scenario.config);
        let sites = scenario.speeds.len();
        let sync = &settings.sync;
        let plan = FragmentPlan { index: 0, count: sync.fragments, codec: sync.codec, rank: 0 };
        let largest =
            (0..sync.fragments).map(|index| settings.rounds_kept(FragmentPlan { index, ..plan }, sites)).max();
        let kept = largest.unwrap_or(0) as usize;
        let open = lookahead(settings.steps_per_round, sync.overlap_steps) as usize + 1;
        // A site that lags has its commits behind it: as many as are kept, or it is dropped.
        let rounds = kept + open + 1;
        let (deltas, fetches) = (HELD_PER_ROUND * rounds * sites, FETCHES_PER_ROUND * rounds * sites + 1);
        Self { bound: Load { jobs: JOBS_PER_ROUND * rounds, deltas, fetches } }
    }
}

impl Checker for Bounded {
    fn name(&self) -> &'static str {
        "I6 bounded"
    }

    fn see(&mut self, _seconds: f64, observation: &Observation) -> Result<(), String> {
        match observation {
            Observation::Panicked(what) => Err(format!("a process panicked: {what}")),
            Observation::Holds(machine, load)
                if load.jobs > self.bound.jobs
                    || load.deltas > self.bound.deltas
                    || load.fetches > self.bound.fetches =>
            {
                Err(format!("machine {machine} holds {load:?}, the bound is {:?}", self.bound))
            }
            _ => Ok(()),
        }
    }
}
