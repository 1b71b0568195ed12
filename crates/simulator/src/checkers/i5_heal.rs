//! I5: after the last fault is mended, the next commit comes within two deadlines, and a run that is asked to stop then ends within two more.
//!
//! A deadline is that of the coordinator: three times the slowest site's round, and `deadline_seconds`.

use super::Checker;
use crate::scenario::Scenario;
use crate::trace::Observation;
use rounds::coordinator::Record;

/// Deadlines until the next commit.
const DEADLINES: f64 = 2.0;

/// Commits that are made before the run is asked to stop, each within the same time, and the end.
const ROUNDS_TO_THE_END: f64 = 6.0;

pub(super) struct Heal {
    bound_seconds: f64,
    /// Until when the next commit must come.
    commit_by: Option<f64>,
    end_by: Option<f64>,
    is_over: bool,
}

impl Heal {
    pub(super) fn new(scenario: &Scenario) -> Self {
        Self { bound_seconds: DEADLINES * scenario.deadline_seconds(), commit_by: None, end_by: None, is_over: false }
    }
}

impl Checker for Heal {
    fn name(&self) -> &'static str {
        "I5 heal"
    }

    fn see(&mut self, seconds: f64, observation: &Observation) -> Result<(), String> {
        match observation {
            Observation::FaultsStopped if !self.is_over => {
                self.commit_by = Some(seconds + self.bound_seconds);
                self.end_by = Some(seconds + ROUNDS_TO_THE_END * self.bound_seconds);
            }
            Observation::Logged(record) if matches!(**record, Record::Committed(_)) => self.commit_by = None,
            Observation::Done { .. } => (self.commit_by, self.end_by, self.is_over) = (None, None, true),
            _ => {}
        }
        Ok(())
    }

    fn at(&mut self, seconds: f64) -> Result<(), String> {
        if self.commit_by.is_some_and(|by| seconds > by) {
            return Err(format!("no commit within {:.1} s of the last fault", self.bound_seconds));
        }
        if self.end_by.is_some_and(|by| seconds > by) {
            return Err("the run has not ended".to_owned());
        }
        Ok(())
    }
}
