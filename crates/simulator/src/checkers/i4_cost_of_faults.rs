//! I4: a fault costs at most the failed member's current round.
//!
//! So a commit is void only if no machine has its state any more, on its disk or in a process that lives; and an honest site is never
//! turned away for what it said, nor turns away the coordinator that leads.

use super::Checker;
use crate::scenario::Scenario;
use crate::trace::Observation;
use base::Round;
use rounds::coordinator::Record;

pub(super) struct CostOfFaults {
    /// The newest state that each machine holds, in a process or on its disk.
    held: Vec<Round>,
    /// No machine computes anything wrong.
    are_sound: bool,
}

impl CostOfFaults {
    pub(super) fn new(scenario: &Scenario) -> Self {
        Self { held: vec![Round(0); scenario.speeds.len()], are_sound: scenario.miscomputes == 0.0 }
    }

    fn rolled_back(&self, to: Round) -> Result<(), String> {
        match self.held.iter().enumerate().find(|(_, round)| **round > to) {
            Some((machine, round)) => {
                Err(format!("rolled back to round {to} while machine {machine} holds round {round}"))
            }
            None => Ok(()),
        }
    }
}

impl Checker for CostOfFaults {
    fn name(&self) -> &'static str {
        "I4 cost of faults"
    }

    fn see(&mut self, _seconds: f64, observation: &Observation) -> Result<(), String> {
        match observation {
            Observation::Merged { machine, commit, .. } | Observation::Installed(machine, commit, _) => {
                self.held[*machine] = commit.round;
            }
            // All that a new process has. What one that ended had not saved is known to be gone when the next one has loaded.
            Observation::Loaded(machine, round) => self.held[*machine] = *round,
            Observation::Logged(record) => {
                if let Record::RolledBack { to } = **record {
                    return self.rolled_back(to);
                }
            }
            Observation::SiteLeft(site, reason) if reason == "misbehaved" => {
                return Err(format!("honest site {site} was dropped because it misbehaved"));
            }
            Observation::SiteLeft(site, reason) if reason == "steps_differ" && self.are_sound => {
                return Err(format!("site {site} was dropped for its steps, and its machine is sound"));
            }
            Observation::Refuses { machine, why, is_replaced: false } => {
                return Err(format!("machine {machine} refuses the coordinator that leads: {why}"));
            }
            _ => {}
        }
        Ok(())
    }
}
