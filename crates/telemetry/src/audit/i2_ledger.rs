//! I2: every sample range is committed at most once; lost ranges are listed; the ledger adds up.
//!
//! What a commit makes part of the model is taken from the plan: the lease of each contributor, and those leases of a straggler that its
//! next merged delta brings. Leases that might have been returned meanwhile are left out, so that what is counted was committed.

use super::{Finding, ProcessLog};
use crate::event::{Contributor, Event, LeaseShare, LedgerCounts, SampleSpan};
use base::{Round, SiteId};
use std::collections::{BTreeMap, BTreeSet};

const LIMITS: &str = "commits whose line was not written because the coordinator was killed in that moment; \
                      what an engine really trained on";

/// Of a weight, which is a quotient of two whole numbers.
const WEIGHT_TOLERANCE: f64 = 1e-9;

#[derive(Default)]
struct Ranges {
    /// Start, with the end and the round that committed it.
    committed: BTreeMap<u64, (u64, Round)>,
    plans: BTreeMap<Round, Vec<LeaseShare>>,
    /// Leases of rounds that closed without their site.
    pending: BTreeMap<SiteId, Vec<SampleSpan>>,
    /// Who has reported which rounds to this process of the coordinator.
    computed: BTreeSet<(Round, SiteId)>,
}

pub(super) fn check(coordinator: &ProcessLog) -> Finding {
    let mut finding = Finding::new("I2 ledger", "samples committed, each once", LIMITS);
    let mut ranges = Ranges::default();
    for event in coordinator.events() {
        ranges.see(event, &mut finding);
    }
    finding.checked = ranges.samples();
    finding
}

impl Ranges {
    fn samples(&self) -> u64 {
        self.committed.iter().map(|(start, (end, _))| end - start).sum()
    }

    fn see(&mut self, event: &Event, finding: &mut Finding) {
        match event {
            Event::RunStarted { .. } => {
                // All leases were given back.
                self.pending.clear();
                self.computed.clear();
            }
            Event::RoundStarted { round, leases, .. } => {
                self.plans.insert(*round, leases.clone());
            }
            Event::RoundComputed { round, site, .. } => {
                self.computed.insert((*round, *site));
            }
            Event::Straggler { round, site, .. } => {
                let lease = self.lease(*round, *site).unwrap_or_default();
                self.pending.entry(*site).or_default().extend(lease);
            }
            Event::SiteLeft { site, .. } => {
                self.pending.remove(site);
            }
            Event::RoundAbandoned { .. } => self.pending.clear(),
            Event::RolledBack { to, .. } => {
                self.pending.clear();
                self.committed.retain(|_, (_, round)| *round <= *to);
            }
            Event::RoundClosed { round, contributors, .. } => self.closed(*round, contributors, finding),
            Event::Ledger { leased, committed, returned, lost } => {
                let counts = LedgerCounts { leased: *leased, committed: *committed, returned: *returned, lost: *lost };
                self.compare(counts, finding);
            }
            _ => {}
        }
    }

    fn lease(&self, round: Round, site: SiteId) -> Option<Vec<SampleSpan>> {
        let lease = self.plans.get(&round)?.iter().find(|lease| lease.site == site)?;
        Some(lease.ranges.clone())
    }

    fn closed(&mut self, round: Round, contributors: &[Contributor], finding: &mut Finding) {
        let tokens: u64 = contributors.iter().map(|contributor| contributor.tokens).sum();
        for Contributor { site, tokens: own, weight } in contributors {
            let Some(mut ranges) = self.lease(round, *site) else {
                finding.violated(format!("site {site} had no part in round {round}, and was merged in it"));
                continue;
            };
            if !self.computed.contains(&(round, *site)) {
                finding.violated(format!("site {site} had not reported round {round}, and was merged in it"));
            }
            if (weight - *own as f64 / tokens.max(1) as f64).abs() > WEIGHT_TOLERANCE {
                finding.violated(format!("round {round}: weight {weight} of site {site} for {own} of {tokens} tokens"));
            }
            ranges.extend(self.pending.remove(site).unwrap_or_default());
            for range in ranges.into_iter().filter(|range| range.start < range.end) {
                self.commit(range, round, finding);
            }
        }
        // Older plans are not merged any more.
        self.plans = self.plans.split_off(&round.next());
        self.computed = self.computed.split_off(&(round.next(), SiteId(0)));
    }

    fn commit(&mut self, SampleSpan { start, end }: SampleSpan, round: Round, finding: &mut Finding) {
        // Ranges here do not overlap, so that only the last one that begins before `end` can reach into this one.
        let other = self.committed.range(..end).next_back().filter(|(_, (there, _))| *there > start);
        if let Some((from, (to, earlier))) = other {
            let (from, to) = (*from.max(&start), *to.min(&end));
            return finding
                .violated(format!("samples {from}..{to} of round {round} were committed in round {earlier}"));
        }
        self.committed.insert(start, (end, round));
    }

    fn compare(&self, counts: LedgerCounts, finding: &mut Finding) {
        let LedgerCounts { leased, committed, returned, lost } = counts;
        if committed + returned + lost > leased {
            finding.violated(format!("the ledger does not add up: {counts:?}"));
        }
        let seen = self.samples();
        if seen > committed {
            finding.violated(format!("{seen} samples were merged, the ledger has {committed}"));
        }
    }
}
