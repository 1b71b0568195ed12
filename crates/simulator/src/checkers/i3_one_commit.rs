//! I3: one commit per round, also through partitions and restarts of the coordinator.
//!
//! The log has the rounds one after the other, each once unless it was rolled back; what it has acknowledged it still has when it is read
//! again; what a site merges is a commit that the log had acknowledged before. And no site follows an older coordinator after a newer one.

use super::{Checker, described, effective};
use crate::trace::Observation;
use base::{Round, Term};
use rounds::Commit;
use rounds::coordinator::Record;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct OneCommit {
    acknowledged: Vec<Record>,
    commits: BTreeMap<Round, Commit>,
    /// The newest term that each machine has followed.
    followed: BTreeMap<usize, Term>,
}

impl OneCommit {
    pub(super) fn new() -> Self {
        Self::default()
    }

    fn logged(&mut self, record: &Record) -> Result<(), String> {
        match record {
            Record::Committed(committed) => {
                let commit = &committed.commit;
                if let Some(other) = self.commits.get(&commit.round) {
                    return Err(format!("{} after {}", described(commit), described(other)));
                }
                let last = self.commits.keys().next_back().copied().unwrap_or(Round(0));
                if commit.round != last.next() {
                    return Err(format!("{} after round {last}", described(commit)));
                }
                self.commits.insert(commit.round, commit.clone());
            }
            Record::RolledBack { to } => self.commits.retain(|round, _| round <= to),
            Record::TermStarted { term } => {
                let newest = self.acknowledged.iter().rev().find_map(|record| match record {
                    Record::TermStarted { term } => Some(*term),
                    _ => None,
                });
                if newest.is_some_and(|newest| newest >= *term) {
                    return Err(format!("term {term} begins after term {newest:?}"));
                }
            }
            _ => {}
        }
        self.acknowledged.push(record.clone());
        Ok(())
    }

    /// What was acknowledged is there, and at most one record more: the one that was being written when its process died.
    fn log_read(&mut self, records: &[Record]) -> Result<(), String> {
        let known = self.acknowledged.len();
        if !records.starts_with(&self.acknowledged) {
            let missing = self.acknowledged.iter().zip(records).position(|(one, other)| one != other);
            let place = missing.unwrap_or(records.len());
            return Err(format!("the log has lost what it acknowledged: {:?}", self.acknowledged.get(place)));
        }
        for record in &records[known..] {
            self.logged(record)?;
        }
        let expected: Vec<&Commit> = effective(records).into_iter().map(|committed| &committed.commit).collect();
        if !self.commits.values().eq(expected.iter().copied()) {
            return Err("the log's commits are not those that it acknowledged".to_owned());
        }
        Ok(())
    }

    fn merged(&self, machine: usize, commit: &Commit) -> Result<(), String> {
        if self.commits.get(&commit.round) == Some(commit) {
            return Ok(());
        }
        let there = self.commits.get(&commit.round).map_or("nothing of that round".to_owned(), described);
        Err(format!("machine {machine} merged {}, the log has {there}", described(commit)))
    }
}

impl Checker for OneCommit {
    fn name(&self) -> &'static str {
        "I3 one commit"
    }

    fn see(&mut self, _seconds: f64, observation: &Observation) -> Result<(), String> {
        match observation {
            Observation::LogRead(records) => self.log_read(records),
            Observation::Logged(record) => self.logged(record),
            Observation::Merged { machine, commit, .. } => self.merged(*machine, commit),
            Observation::Follows(machine, term) => {
                let newest = self.followed.entry(*machine).or_default();
                if term < newest {
                    return Err(format!("machine {machine} follows term {term} after term {newest}"));
                }
                *newest = *term;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
