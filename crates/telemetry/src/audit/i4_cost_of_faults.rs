//! I4: a fault costs at most the failed member's current round.
//!
//! So commits are void only if no member holds their state, in its process or on its disk; and a site is never turned away for what it
//! said. What a machine has that is away is not known to anybody.

use super::{Finding, ProcessLog, RunLogs};
use crate::event::Event;
use base::{Round, SiteId};
use std::collections::BTreeSet;

const LIMITS: &str = "how much of the failed member's round was computed already: inner steps are logged, not whether a \
                      merge had them";

/// Reasons for which no honest site is dropped, as `site_left` has them.
const DISHONEST: [&str; 2] = ["misbehaved", "diverged"];

pub(super) fn check(logs: &RunLogs) -> Finding {
    let mut finding = Finding::new("I4 cost of faults", "departures and rollbacks", LIMITS);
    let mut away = BTreeSet::new();
    for record in &logs.coordinator.records {
        match &record.event {
            Event::SiteReady { site, .. } => {
                away.remove(site);
            }
            Event::SiteLeft { site, reason } => {
                finding.checked += 1;
                away.insert(*site);
                if DISHONEST.contains(&reason.as_str()) {
                    finding.violated(format!("site {site} was dropped: {reason}"));
                }
            }
            Event::RolledBack { from, to } => {
                finding.checked += 1;
                let members = logs.sites.iter().filter(|log| id_of(log).is_none_or(|id| !away.contains(&id)));
                for site in members {
                    let held = held(site, record.unix_ms);
                    if held > *to {
                        let name = &site.name;
                        finding.violated(format!(
                            "round {from} was rolled back to round {to} while {name} had round {held}"
                        ));
                    }
                }
            }
            _ => {}
        }
    }
    finding
}

/// The id that a site was given, by its own log.
fn id_of(site: &ProcessLog) -> Option<SiteId> {
    site.events().find_map(|event| match event {
        Event::SiteReady { site, .. } => Some(*site),
        _ => None,
    })
}

/// The newest round whose state a site had at that time: what it had applied in its life, or what it had saved before.
fn held(site: &ProcessLog, unix_ms: u64) -> Round {
    let (mut held, mut saved) = (Round(0), Round(0));
    for record in site.records.iter().take_while(|record| record.unix_ms <= unix_ms) {
        match &record.event {
            Event::RoundApplied { round, .. } => held = *round,
            Event::CheckpointSaved { round, .. } => saved = *round,
            Event::SiteReady { .. } => held = saved,
            _ => {}
        }
    }
    held
}
