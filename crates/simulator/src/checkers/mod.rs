//! The invariants of the design, one file each: each watches what can be seen from outside and says when it is violated.
//!
//! None asks a process what it meant to do. What a site's state must be, for instance, is computed anew from the deltas that were offered
//! and the commits that were logged.

mod i1_equal_state;
mod i2_ledger;
mod i3_one_commit;
mod i4_cost_of_faults;
mod i5_heal;
mod i6_bounded;
pub mod i7_resume;

use crate::scenario::Scenario;
use crate::trace::Observation;
use rounds::Commit;
use rounds::coordinator::{Committed, Record};
use std::fmt;

/// An invariant that does not hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Violation {
    /// Which.
    pub invariant: &'static str,
    /// What was seen.
    pub what: String,
    /// When, in virtual seconds.
    pub seconds: f64,
}

impl fmt::Display for Violation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} after {:.3} virtual seconds: {}", self.invariant, self.seconds, self.what)
    }
}

/// One invariant.
pub(crate) trait Checker {
    /// Its number and name.
    fn name(&self) -> &'static str;

    /// Something was seen.
    fn see(&mut self, seconds: f64, observation: &Observation) -> Result<(), String>;

    /// So late is it now.
    fn at(&mut self, _seconds: f64) -> Result<(), String> {
        Ok(())
    }
}

/// All that are checked while a run goes on.
pub(crate) struct Checkers(Vec<Box<dyn Checker>>);

impl Checkers {
    pub(crate) fn new(scenario: &Scenario) -> Self {
        Self(vec![
            Box::new(i1_equal_state::EqualState::new(scenario)),
            Box::new(i2_ledger::LedgerAddsUp::new()),
            Box::new(i3_one_commit::OneCommit::new()),
            Box::new(i4_cost_of_faults::CostOfFaults::new(scenario)),
            Box::new(i5_heal::Heal::new(scenario)),
            Box::new(i6_bounded::Bounded::new(scenario)),
        ])
    }

    pub(crate) fn see(&mut self, seconds: f64, observation: &Observation) -> Option<Violation> {
        self.first(seconds, |checker| checker.see(seconds, observation))
    }

    pub(crate) fn at(&mut self, seconds: f64) -> Option<Violation> {
        self.first(seconds, |checker| checker.at(seconds))
    }

    fn first(
        &mut self,
        seconds: f64,
        mut check: impl FnMut(&mut Box<dyn Checker>) -> Result<(), String>,
    ) -> Option<Violation> {
        self.0.iter_mut().find_map(|checker| {
            let what = check(checker).err()?;
            Some(Violation { invariant: checker.name(), what, seconds })
        })
    }
}

/// The commits of a log that count, in order: those after a roll-back are void.
fn effective(records: &[Record]) -> Vec<&Committed> {
    let mut commits: Vec<&Committed> = Vec::new();
    for record in records {
        match record {
            Record::Committed(committed) => commits.push(committed),
            Record::RolledBack { to } => commits.retain(|committed| committed.commit.round <= *to),
            _ => {}
        }
    }
    commits
}

/// A commit in words.
fn described(commit: &Commit) -> String {
    let sites: Vec<String> = commit.contributors.iter().map(|c| format!("{}:{}", c.site, c.tokens)).collect();
    format!("round {} of term {} [{}]", commit.round, commit.term, sites.join(" "))
}
