//! Invariants I1 to I7 of a run that has happened, read from the event logs of its processes.
//!
//! The simulator sees every observation of every process and computes anew what must follow; here there are only lines that
//! processes wrote before they died. So a checker says what it compared and how often, and what logs cannot show
//! ([`Finding::limits`]). A line that is missing, because a process was killed before it wrote it, is never a violation: what
//! is violated here was violated.
//!
//! Times of different logs are compared where that matters ([`i4_cost_of_faults`], [`i5_heal`]), so that these two want
//! processes on one machine, or clocks that agree.

mod i1_equal_state;
mod i2_ledger;
mod i3_one_commit;
mod i4_cost_of_faults;
mod i5_heal;
mod i6_bounded;
mod i7_resume;

use crate::event::{Event, Record};
use crate::log::{LogError, read};
use base::Round;
use serde::Serialize;
use std::path::Path;

/// Violations of one invariant that are kept: the first ones say what went wrong.
const VIOLATIONS_MAX: usize = 20;

/// The log of one process, of all its lives.
#[derive(Debug, Clone, Default)]
pub struct ProcessLog {
    /// `coordinator`, or the name of a site.
    pub name: String,
    /// What it wrote.
    pub records: Vec<Record>,
    /// Lines that are no records.
    pub malformed_lines: u64,
}

/// Everything that is read of a run.
#[derive(Debug, Clone, Default)]
pub struct RunLogs {
    /// Of the coordinator.
    pub coordinator: ProcessLog,
    /// Of each site.
    pub sites: Vec<ProcessLog>,
}

/// What is known of a run beside its logs.
#[derive(Debug, Clone, Default)]
pub struct Circumstances {
    /// When the last fault was mended, milliseconds since 1970-01-01 UTC, and how long the next commit may take then.
    pub healed: Option<(u64, f64)>,
    /// Processes that ended although nobody ended them, or that panicked, in words.
    pub ended_badly: Vec<String>,
    /// Checkpoints on disk that were loaded.
    pub checkpoints_loaded: u64,
    /// Those that could not be, in words.
    pub checkpoints_unreadable: Vec<String>,
}

/// What a checker found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Number and name, as the simulator has them.
    pub invariant: &'static str,
    /// How much was compared; 0 shows nothing.
    pub checked: u64,
    /// What was compared.
    pub what: &'static str,
    /// The first violations, in words.
    pub violations: Vec<String>,
    /// What event logs cannot show of it.
    pub limits: &'static str,
}

impl Finding {
    fn new(invariant: &'static str, what: &'static str, limits: &'static str) -> Self {
        Self { invariant, checked: 0, what, violations: Vec::new(), limits }
    }

    fn violated(&mut self, text: String) {
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(text);
        }
    }

    /// Whether nothing contradicts it.
    pub fn is_held(&self) -> bool {
        self.violations.is_empty()
    }
}

impl ProcessLog {
    /// Reads the log at `path`; a process that has not written one has an empty one.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(name: &str, path: &Path) -> Result<Self, LogError> {
        let mut log = Self { name: name.to_owned(), ..Self::default() };
        if path.exists() {
            let mut records = read(path)?;
            log.records = records.by_ref().collect::<Result<_, _>>()?;
            log.malformed_lines = records.skipped().malformed;
        }
        Ok(log)
    }

    fn events(&self) -> impl Iterator<Item = &Event> {
        self.records.iter().map(|record| &record.event)
    }
}

impl RunLogs {
    /// Rollbacks that made commits of `round` void: it may have been committed once more after each.
    fn rollbacks_of(&self, round: Round) -> usize {
        let voids = |event: &&Event| matches!(event, Event::RolledBack { to, .. } if *to < round);
        self.coordinator.events().filter(voids).count()
    }
}

/// All checkers, in the order of the invariants.
pub fn audit(logs: &RunLogs, circumstances: &Circumstances) -> Vec<Finding> {
    vec![
        i1_equal_state::check(logs),
        i2_ledger::check(&logs.coordinator),
        i3_one_commit::check(logs),
        i4_cost_of_faults::check(logs),
        i5_heal::check(&logs.coordinator, circumstances.healed),
        i6_bounded::check(logs, &circumstances.ended_badly),
        i7_resume::check(logs, circumstances),
    ]
}

#[cfg(test)]
mod tests;
