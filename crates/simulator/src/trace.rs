//! What can be seen from outside while a simulation runs. The checkers see this and nothing else.

use base::{ContentHash, Round, SiteId, Term};
use rounds::coordinator::Record;
use rounds::{Commit, SampleRange};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

/// One observation. A *machine* is a site's number in the simulation; its id is what the coordinator gave it.
#[derive(Debug, Clone)]
pub(crate) enum Observation {
    /// A coordinator has opened its log, and found these decisions in it.
    LogRead(Vec<Record>),
    /// The log has acknowledged a decision, and the disk has it.
    Logged(Box<Record>),
    /// The coordinator's sample accounting after that decision is not what it must be.
    LedgerWrong(String),
    /// The coordinator has told people that a site is gone.
    SiteLeft(SiteId, String),
    /// A round was planned, with the positions that each site is to train on.
    Planned(Round, Term, Vec<(SiteId, Vec<SampleRange>)>),
    /// A site has accepted a coordinator of this term.
    Follows(usize, Term),
    /// A site has refused a message of a coordinator.
    Refuses {
        /// Which machine.
        machine: usize,
        /// Why.
        why: String,
        /// Whether that coordinator had been replaced.
        is_replaced: bool,
    },
    /// A site has trained on these positions for a round, to its end, and offers the delta.
    Offers {
        /// Which machine.
        machine: usize,
        /// Its id.
        site: SiteId,
        /// The round.
        round: Round,
        /// The term of its plan.
        term: Term,
        /// What it was trained on.
        lease: Vec<SampleRange>,
        /// What it offers.
        delta: Arc<[u8]>,
    },
    /// A commit is part of a site's state.
    Merged {
        /// Which machine.
        machine: usize,
        /// What was merged.
        commit: Commit,
        /// Hash of the state after it, over its bytes.
        state_hash: ContentHash,
    },
    /// A site has taken over a state that it fetched; the hash is over the bytes that it now holds.
    Installed(usize, Commit, ContentHash),
    /// A site has started to train from that state.
    Started {
        /// Which machine.
        machine: usize,
        /// Its id.
        site: SiteId,
        /// The state's round.
        round: Round,
    },
    /// What a site had trained and not offered is gone.
    StartedOver(usize),
    /// A site's process ended.
    Ended(usize),
    /// A site's checkpoint is on its disk: a restart finds at least this round.
    Saved(usize, Round),
    /// The newest good checkpoint on a site's disk is of this round: the newer ones were damaged.
    Loaded(usize, Round),
    /// What a machine waits to do, or holds for others.
    Holds(usize, Load),
    /// A fetched delta or state was not what was announced, and was refused.
    Corrupt(usize),
    /// Something breaks or is mended.
    Fault(String),
    /// Nothing breaks from now on.
    FaultsStopped,
    /// A process panicked.
    Panicked(String),
    /// The coordinator is done, and says that all planned steps are.
    Done {
        /// Whether every planned step was done.
        finished: bool,
    },
}

/// Lengths of a site's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    /// Jobs of engine and host.
    pub(crate) jobs: usize,
    /// Deltas, slices and merged parts held or served.
    pub(crate) deltas: usize,
    /// Fetches under way.
    pub(crate) fetches: usize,
}

impl fmt::Display for Observation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LogRead(records) => write!(out, "coordinator: opens its log of {} decisions", records.len()),
            Self::Logged(record) => match &**record {
                Record::Committed(committed) => {
                    let Commit { term, round, contributors, .. } = &committed.commit;
                    let sites: Vec<String> = contributors.iter().map(|c| format!("{}:{}", c.site, c.tokens)).collect();
                    write!(out, "coordinator: commit of round {round}, term {term}, of {}", sites.join(" "))
                }
                other => write!(out, "coordinator: logs {other:?}"),
            },
            Self::LedgerWrong(reason) => write!(out, "coordinator: ledger: {reason}"),
            Self::SiteLeft(site, reason) => write!(out, "coordinator: site {site} left: {reason}"),
            Self::Follows(machine, term) => write!(out, "machine {machine}: follows term {term}"),
            Self::Refuses { machine, why, .. } => write!(out, "machine {machine}: refuses: {why}"),
            Self::Planned(round, term, leases) => {
                let leases: Vec<String> =
                    leases.iter().map(|(site, lease)| format!("{site}:{}", positions(lease))).collect();
                write!(out, "coordinator: plans round {round} of term {term}: {}", leases.join(" "))
            }
            Self::Offers { machine, site, round, term, lease, .. } => {
                let lease = positions(lease);
                write!(out, "machine {machine}: site {site} offers round {round} of term {term}: {lease}")
            }
            Self::Merged { machine, commit, state_hash } => {
                let (round, hash) = (commit.round, state_hash.short());
                write!(out, "machine {machine}: merged round {round} of term {}: {hash}", commit.term)
            }
            Self::Installed(machine, commit, hash) => {
                write!(out, "machine {machine}: installed the state of round {}: {}", commit.round, hash.short())
            }
            Self::Started { machine, site, round, .. } => {
                write!(out, "machine {machine}: started as site {site} at round {round}")
            }
            Self::StartedOver(machine) => write!(out, "machine {machine}: starts over"),
            Self::Ended(machine) => write!(out, "machine {machine}: process ended"),
            Self::Saved(machine, round) => write!(out, "machine {machine}: saved round {round}"),
            Self::Loaded(machine, round) => write!(out, "machine {machine}: loaded round {round}"),
            Self::Holds(machine, load) => write!(out, "machine {machine}: {load:?}"),
            Self::Corrupt(machine) => write!(out, "machine {machine}: refused corrupt bytes"),
            Self::Fault(what) => write!(out, "fault: {what}"),
            Self::FaultsStopped => write!(out, "no faults from now on"),
            Self::Panicked(what) => write!(out, "panic: {what}"),
            Self::Done { finished } => write!(out, "coordinator: done, finished: {finished}"),
        }
    }
}

/// As `0..8,24..32`.
fn positions(ranges: &[SampleRange]) -> String {
    ranges.iter().map(|range| format!("{}..{}", range.start, range.end)).collect::<Vec<_>>().join(",")
}

/// The last observations, as lines for people.
pub(crate) struct Trace {
    lines: VecDeque<(f64, Observation)>,
    lines_max: usize,
}

impl Trace {
    pub(crate) fn new(lines_max: usize) -> Self {
        Self { lines: VecDeque::new(), lines_max }
    }

    pub(crate) fn push(&mut self, seconds: f64, observation: Observation) {
        if matches!(observation, Observation::Holds(..)) || self.lines_max == 0 {
            return;
        }
        if self.lines.len() >= self.lines_max {
            self.lines.pop_front();
        }
        self.lines.push_back((seconds, observation));
    }

    pub(crate) fn into_lines(self) -> Vec<String> {
        self.lines.into_iter().map(|(seconds, observation)| format!("{seconds:10.3} s  {observation}")).collect()
    }
}
