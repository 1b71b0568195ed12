//! I3: one commit per round, also through partitions and restarts of the coordinator.
//!
//! The coordinator closes rounds one after the other, each once unless it was rolled back, in terms that never fall and that rise with
//! each of its processes; a new process goes on no earlier than where the one before it ended. A site applies rounds in ascending
//! order, and none that the coordinator never reached.

use super::{Finding, ProcessLog, RunLogs};
use crate::event::Event;
use base::{Round, Term};

const LIMITS: &str = "which commit a site applied, beyond the hash of the state after it, which I1 compares";

#[derive(Default)]
struct Order {
    last: Round,
    /// The newest round that any process had closed, rolled back or not.
    newest: Round,
    term: Term,
    /// Of the process before, where this one has planned nothing yet.
    term_before: Option<Term>,
}

pub(super) fn check(logs: &RunLogs) -> Finding {
    let mut finding = Finding::new("I3 one commit", "commits in order, of the coordinator and of sites", LIMITS);
    let mut order = Order::default();
    for event in logs.coordinator.events() {
        order.see(event, &mut finding);
    }
    let rolled_back = logs.coordinator.events().any(|event| matches!(event, Event::RolledBack { .. }));
    for site in &logs.sites {
        check_site(site, (!logs.coordinator.records.is_empty()).then_some(order.newest), rolled_back, &mut finding);
    }
    finding
}

impl Order {
    fn see(&mut self, event: &Event, finding: &mut Finding) {
        match event {
            Event::RunStarted { resumed_round, .. } => {
                let resumed = resumed_round.unwrap_or_default();
                if resumed < self.last {
                    finding.violated(format!("round {} was closed, and lost when the coordinator died", self.last));
                }
                // Later than the last line: that of a commit was not written any more.
                self.reach(resumed);
                self.term_before = Some(self.term);
            }
            Event::RolledBack { to, .. } => (self.last, self.term_before) = (*to, Some(self.term)),
            Event::RoundStarted { term, round, .. } => self.follow(*term, *round, finding),
            Event::RoundClosed { term, round, .. } => {
                finding.checked += 1;
                if *round != self.last.next() {
                    finding.violated(format!("round {round} was closed after round {}", self.last));
                }
                self.reach(*round);
                self.follow(*term, *round, finding);
            }
            _ => {}
        }
    }

    fn reach(&mut self, round: Round) {
        self.last = round;
        self.newest = self.newest.max(round);
    }

    fn follow(&mut self, term: Term, round: Round, finding: &mut Finding) {
        let is_new = self.term_before.take().is_none_or(|before| term > before);
        if term < self.term || !is_new {
            finding.violated(format!("round {round} is of term {term}, after term {}", self.term));
        }
        self.term = self.term.max(term);
    }
}

fn check_site(site: &ProcessLog, newest: Option<Round>, rolled_back: bool, finding: &mut Finding) {
    let mut last = Round(0);
    for event in site.events() {
        match event {
            // A new life begins with what was saved.
            Event::SiteReady { .. } => last = Round(0),
            Event::RoundApplied { round, .. } => {
                finding.checked += 1;
                if *round <= last && !rolled_back {
                    finding.violated(format!("{} applied round {round} after round {last}", site.name));
                }
                // One commit more than there are lines: see above.
                if newest.is_some_and(|newest| *round > newest.next()) {
                    finding.violated(format!("{} applied round {round}, which was never closed", site.name));
                }
                last = *round;
            }
            _ => {}
        }
    }
}
