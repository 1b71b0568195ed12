//! I2: every sample range is committed at most once; lost ranges are listed; the ledger adds up.
//!
//! What is committed is not taken from the ledger: it is what the contributors of a commit were trained on, as they offered it, since their
//! last delta that was merged. The ledger must say the same.

use super::{Checker, effective};
use crate::trace::Observation;
use base::{Round, SiteId};
use rounds::SampleRange;
use rounds::coordinator::{Committed, Record};
use std::collections::{BTreeMap, BTreeSet};

/// What a site was trained on for a round.
struct Offer {
    /// Which life of the machine: what it had trained and not offered before is gone.
    life: u64,
    lease: Vec<SampleRange>,
}

#[derive(Default)]
pub(super) struct LedgerAddsUp {
    offers: BTreeMap<(SiteId, Round), Offer>,
    lives: BTreeMap<usize, u64>,
    committed: BTreeSet<u64>,
    /// What each commit added.
    by_round: BTreeMap<Round, Vec<u64>>,
}

impl LedgerAddsUp {
    pub(super) fn new() -> Self {
        Self::default()
    }

    fn last(&self) -> Round {
        self.by_round.keys().next_back().copied().unwrap_or(Round(0))
    }

    fn committed(&mut self, Committed { commit, ledger, .. }: &Committed) -> Result<(), String> {
        let mut added = Vec::new();
        for contributor in &commit.contributors {
            let site = contributor.site;
            let Some(life) = self.offers.get(&(site, commit.round)).map(|offer| offer.life) else {
                return Err(format!("site {site} has offered nothing for round {}", commit.round));
            };
            let keys: Vec<(SiteId, Round)> =
                self.offers.range((site, Round(0))..=(site, commit.round)).map(|(key, _)| *key).collect();
            for key in keys {
                let Some(offer) = self.offers.remove(&key).filter(|offer| offer.life == life) else { continue };
                added.extend(offer.lease.iter().flat_map(|range| range.start..range.end));
            }
        }
        for position in &added {
            if !self.committed.insert(*position) {
                return Err(format!("position {position} is committed again, in round {}", commit.round));
            }
        }
        self.by_round.insert(commit.round, added);
        self.compare(commit.round, ledger)
    }

    fn compare(&self, round: Round, ledger: &rounds::Ledger) -> Result<(), String> {
        ledger.audit()?;
        let said: u64 = ledger.committed().iter().map(SampleRange::samples).sum();
        let lost: u64 = ledger.lost().iter().map(SampleRange::samples).sum();
        let totals = ledger.totals();
        if said != totals.committed || lost != totals.lost {
            return Err(format!("the ledger's sums are not those of its ranges: {totals:?}, {said} and {lost}"));
        }
        let mut positions = ledger.committed().iter().flat_map(|range| range.start..range.end);
        match positions.find(|position| !self.committed.contains(position)) {
            Some(position) => Err(format!("after round {round} the ledger has position {position}, which nobody gave")),
            None if said != self.committed.len() as u64 => {
                let found = self.committed.len();
                Err(format!("after round {round} {found} samples were merged, the ledger has {said}"))
            }
            None => Ok(()),
        }
    }

    fn rolled_back(&mut self, to: Round) {
        for (_, added) in self.by_round.split_off(&to.next()) {
            added.iter().for_each(|position| {
                self.committed.remove(position);
            });
        }
    }

    fn begin_life(&mut self, machine: usize) {
        *self.lives.entry(machine).or_default() += 1;
    }
}

impl Checker for LedgerAddsUp {
    fn name(&self) -> &'static str {
        "I2 ledger"
    }

    fn see(&mut self, _seconds: f64, observation: &Observation) -> Result<(), String> {
        match observation {
            Observation::Offers { machine, site, round, lease, .. } => {
                let life = self.lives.get(machine).copied().unwrap_or(0);
                let offer = Offer { life, lease: lease.clone() };
                self.offers.insert((*site, *round), offer);
            }
            Observation::StartedOver(machine) | Observation::Ended(machine) => self.begin_life(*machine),
            Observation::LogRead(records) => {
                for committed in effective(records) {
                    if committed.commit.round == self.last().next() {
                        self.committed(committed)?;
                    }
                }
            }
            Observation::Logged(record) => match &**record {
                Record::Committed(committed) => self.committed(committed)?,
                Record::RolledBack { to } => self.rolled_back(*to),
                _ => {}
            },
            Observation::LedgerWrong(reason) => return Err(reason.clone()),
            _ => {}
        }
        Ok(())
    }
}
