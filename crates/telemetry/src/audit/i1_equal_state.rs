//! I1: after each commit, the hash of (parameters, outer momentum, term, round, cursor) is equal on all live sites.
//!
//! A round has one hash in all logs together, or one more for each rollback that made it void. That the common state is the right
//! one cannot be seen: deltas are not in the logs.

use super::{Finding, RunLogs};
use crate::event::Event;
use base::{ContentHash, Round};
use std::collections::BTreeMap;

const LIMITS: &str = "that all are right, and not wrong in the same way: deltas are not in the logs";

pub(super) fn check(logs: &RunLogs) -> Finding {
    let mut finding = Finding::new("I1 equal state", "states compared with those of other processes", LIMITS);
    // By round, each hash with the process that said it first.
    let mut said: BTreeMap<Round, Vec<(ContentHash, &str)>> = BTreeMap::new();
    for log in std::iter::once(&logs.coordinator).chain(&logs.sites) {
        for event in log.events() {
            if let Event::Diverged { round, site, hash_expected, hash_found } = event {
                let (expected, found) = (hash_expected.short(), hash_found.short());
                finding.violated(format!("site {site} held {found} after round {round}, the others {expected}"));
            }
            let (Event::RoundCommitted { round, state_hash, .. } | Event::RoundApplied { round, state_hash, .. }) =
                event
            else {
                continue;
            };
            let hashes = said.entry(*round).or_default();
            finding.checked += u64::from(!hashes.is_empty());
            if hashes.iter().all(|(hash, _)| hash != state_hash) {
                hashes.push((*state_hash, &log.name));
            }
        }
    }
    for (round, hashes) in said {
        if hashes.len() > 1 + logs.rollbacks_of(round) {
            let all: Vec<String> = hashes.iter().map(|(hash, who)| format!("{who} {}", hash.short())).collect();
            finding.violated(format!("after round {round}: {}", all.join(", ")));
        }
    }
    finding
}
