//! Which sample ranges were leased, committed, returned or lost (invariant I2).
//!
//! Positions are those of the run's one endless sample order (`data` maps a position to an epoch and a sample).
//! A range is in exactly one place: not leased yet (at or after `next`), leased, committed, waiting to be leased
//! again, or lost. It is committed at most once.

use base::{Round, SiteId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Leases of one range that may end without a commit before it is set aside as lost: a range that makes every
/// engine fail must not stop the run for ever.
pub const LEASE_ATTEMPTS_MAX: u32 = 3;

/// Positions `start..end` of the sample order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SampleRange {
    /// First position.
    pub start: u64,
    /// One past the last position.
    pub end: u64,
}

impl SampleRange {
    /// Number of samples.
    pub fn samples(&self) -> u64 {
        self.end - self.start
    }
}

/// A range, and how often it was leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct LeasedRange {
    range: SampleRange,
    attempts: u32,
}

/// Leases that are open, by site and round: one is found in O(log n) steps of n.
type Leases = BTreeMap<(SiteId, Round), Vec<LeasedRange>>;

/// Ranges that came back, by where they begin.
type Returned = BTreeMap<u64, LeasedRange>;

/// Sums over all leases so far, in samples. `leased = committed + returned + lost + open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LedgerTotals {
    /// Samples leased; a range leased twice counts twice.
    pub leased: u64,
    /// Samples whose training is part of the model.
    pub committed: u64,
    /// Samples given back uncommitted, to be leased again.
    pub returned: u64,
    /// Samples set aside after [`LEASE_ATTEMPTS_MAX`] leases without a commit.
    pub lost: u64,
    /// Samples under lease now.
    pub open: u64,
}

/// The run's sample accounting.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ledger {
    next: u64,
    #[serde(with = "listed::leases")]
    open: Leases,
    #[serde(with = "listed::returned")]
    returned: Returned,
    committed: Vec<SampleRange>,
    lost: Vec<SampleRange>,
    totals: LedgerTotals,
}

impl Ledger {
    /// One past the highest position ever leased: the run's data cursor.
    pub fn cursor(&self) -> u64 {
        self.next
    }

    /// The sums.
    pub fn totals(&self) -> LedgerTotals {
        self.totals
    }

    /// Ranges given up for good.
    pub fn lost(&self) -> &[SampleRange] {
        &self.lost
    }

    /// Committed positions as ascending ranges, adjacent ones joined.
    pub fn committed(&self) -> &[SampleRange] {
        &self.committed
    }

    /// Leases `samples` positions to `site` for `round`: returned ones first, then new ones.
    pub fn lease(&mut self, round: Round, site: SiteId, samples: u64) -> Vec<SampleRange> {
        let mut wanted = samples;
        let mut ranges = Vec::new();
        while wanted > 0
            && let Some((_, LeasedRange { range, attempts })) = self.returned.pop_first()
        {
            let taken = range.samples().min(wanted);
            let middle = range.start + taken;
            ranges.push(LeasedRange { range: SampleRange { start: range.start, end: middle }, attempts: attempts + 1 });
            if middle < range.end {
                let range = SampleRange { start: middle, end: range.end };
                self.returned.insert(middle, LeasedRange { range, attempts });
            }
            wanted -= taken;
        }
        if wanted > 0 {
            let range = SampleRange { start: self.next, end: self.next + wanted };
            ranges.push(LeasedRange { range, attempts: 1 });
            self.next += wanted;
        }
        self.totals.leased += samples;
        self.totals.open += samples;
        let lease = ranges.iter().map(|leased| leased.range).collect();
        self.open.entry((site, round)).or_default().extend(ranges);
        lease
    }

    /// Ends the lease of `site` in `round` with a commit.
    pub fn commit(&mut self, round: Round, site: SiteId) {
        for leased in self.close(round, site) {
            self.totals.committed += leased.range.samples();
            insert_joined(&mut self.committed, leased.range);
        }
    }

    /// Ends the leases of `site` in all rounds up to `round` with a commit: a delta holds what was learnt since the last one
    /// that was merged.
    pub fn commit_through(&mut self, round: Round, site: SiteId) {
        for lease in self.rounds_leased(site).into_iter().filter(|leased| *leased <= round) {
            self.commit(lease, site);
        }
    }

    /// Rounds for which `site` has an open lease, ascending.
    pub fn rounds_leased(&self, site: SiteId) -> Vec<Round> {
        let leases = self.open.range((site, Round(0))..=(site, Round(u64::MAX)));
        leases.map(|((_, round), _)| *round).collect()
    }

    /// Ends the lease of `site` in `round` without a commit: its ranges will be leased again, or are lost after
    /// too many attempts.
    pub fn give_back(&mut self, round: Round, site: SiteId) {
        for leased in self.close(round, site) {
            if leased.attempts >= LEASE_ATTEMPTS_MAX {
                self.totals.lost += leased.range.samples();
                insert_joined(&mut self.lost, leased.range);
            } else {
                self.totals.returned += leased.range.samples();
                self.returned.insert(leased.range.start, leased);
            }
        }
    }

    /// Ends every open lease without a commit, as after a coordinator's restart.
    pub fn give_back_all(&mut self) {
        let open: Vec<(SiteId, Round)> = self.open.keys().copied().collect();
        open.into_iter().for_each(|(site, round)| self.give_back(round, site));
    }

    /// The same, with neighbours joined that were leased equally often: nothing is left that grows with the number of sites.
    pub(crate) fn settle(&mut self) {
        self.give_back_all();
        let mut joined: Vec<LeasedRange> = Vec::new();
        for leased in self.returned.values() {
            match joined.last_mut() {
                Some(last) if last.range.end == leased.range.start && last.attempts == leased.attempts => {
                    last.range.end = leased.range.end;
                }
                _ => joined.push(*leased),
            }
        }
        self.returned = joined.into_iter().map(|leased| (leased.range.start, leased)).collect();
    }

    fn close(&mut self, round: Round, site: SiteId) -> Vec<LeasedRange> {
        let ranges = self.open.remove(&(site, round)).unwrap_or_default();
        self.totals.open -= ranges.iter().map(|leased| leased.range.samples()).sum::<u64>();
        ranges
    }

    /// Leases and ranges in it.
    #[cfg(test)]
    pub(crate) fn entries(&self) -> usize {
        self.open.len() + self.returned.len() + self.committed.len() + self.lost.len()
    }

    /// Checks invariant I2: every position below the cursor is in exactly one place and the sums add up. Gives
    /// the first violation in words.
    pub fn audit(&self) -> Result<(), String> {
        let totals = self.totals;
        let ended = totals.committed + totals.returned + totals.lost + totals.open;
        if totals.leased != ended {
            return Err(format!("{} samples leased, but {ended} accounted for: {totals:?}", totals.leased));
        }
        let mut places: BTreeMap<u64, (u64, &str)> = BTreeMap::new();
        let open = self.open.values().flatten().map(|leased| (leased.range, "open"));
        let returned = self.returned.values().map(|leased| (leased.range, "returned"));
        let committed = self.committed.iter().map(|range| (*range, "committed"));
        let lost = self.lost.iter().map(|range| (*range, "lost"));
        for (range, place) in open.chain(returned).chain(committed).chain(lost) {
            if let Some((_, other)) = places.insert(range.start, (range.end, place)) {
                return Err(format!("position {} is both {other} and {place}", range.start));
            }
        }
        let mut position = 0;
        for (start, (end, place)) in places {
            if start != position {
                return Err(format!("positions {position}..{start} before a {place} range are nowhere or twice"));
            }
            position = end;
        }
        if position == self.next { Ok(()) } else { Err(format!("positions {position}..{} are nowhere", self.next)) }
    }
}

/// Maps are written as lists.
mod listed {
    use super::{LeasedRange, Round, SiteId};
    use serde::{Deserialize, Serialize};

    /// One site's lease for one round.
    #[derive(Serialize, Deserialize)]
    struct Lease {
        round: Round,
        site: SiteId,
        ranges: Vec<LeasedRange>,
    }

    pub(super) mod leases {
        use super::super::Leases;
        use super::Lease;
        use serde::{Deserialize, Deserializer, Serializer};

        pub(in super::super) fn serialize<S: Serializer>(leases: &Leases, serializer: S) -> Result<S::Ok, S::Error> {
            let list = leases.iter().map(|((site, round), ranges)| Lease {
                round: *round,
                site: *site,
                ranges: ranges.clone(),
            });
            serializer.collect_seq(list)
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Leases, D::Error> {
            let mut leases = Leases::new();
            for Lease { round, site, ranges } in Vec::<Lease>::deserialize(deserializer)? {
                leases.entry((site, round)).or_default().extend(ranges);
            }
            Ok(leases)
        }
    }

    pub(super) mod returned {
        use super::super::Returned;
        use super::LeasedRange;
        use serde::{Deserialize, Deserializer, Serializer};

        pub(in super::super) fn serialize<S: Serializer>(ranges: &Returned, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_seq(ranges.values())
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Returned, D::Error> {
            let list = Vec::<LeasedRange>::deserialize(deserializer)?;
            Ok(list.into_iter().map(|leased| (leased.range.start, leased)).collect())
        }
    }
}

/// Inserts a range into an ascending list, joining it with its neighbours.
fn insert_joined(ranges: &mut Vec<SampleRange>, range: SampleRange) {
    let mut index = ranges.partition_point(|other| other.start < range.start);
    ranges.insert(index, range);
    if index > 0 && ranges[index - 1].end == range.start {
        ranges[index - 1].end = range.end;
        ranges.remove(index);
        index -= 1;
    }
    if index + 1 < ranges.len() && ranges[index].end == ranges[index + 1].start {
        ranges[index].end = ranges[index + 1].end;
        ranges.remove(index + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_returned_range_is_leased_again_before_new_ones() {
        let mut ledger = Ledger::default();
        ledger.lease(Round(1), SiteId(0), 10);
        ledger.lease(Round(1), SiteId(1), 5);
        ledger.commit(Round(1), SiteId(1));
        ledger.give_back(Round(1), SiteId(0));
        let again = ledger.lease(Round(2), SiteId(1), 12);
        assert_eq!(again, [SampleRange { start: 0, end: 10 }, SampleRange { start: 15, end: 17 }]);
        ledger.commit(Round(2), SiteId(1));
        ledger.audit().unwrap();
        assert_eq!(ledger.committed(), [SampleRange { start: 0, end: 17 }]);
        let totals = ledger.totals();
        assert_eq!((totals.leased, totals.committed, totals.returned, totals.lost), (27, 17, 10, 0));
    }

    #[test]
    fn a_range_that_never_commits_is_listed_as_lost() {
        let mut ledger = Ledger::default();
        for round in 1..=u64::from(LEASE_ATTEMPTS_MAX) {
            assert_eq!(ledger.lease(Round(round), SiteId(0), 4), [SampleRange { start: 0, end: 4 }]);
            ledger.give_back(Round(round), SiteId(0));
            ledger.audit().unwrap();
        }
        assert_eq!(ledger.lost(), [SampleRange { start: 0, end: 4 }]);
        assert_eq!(ledger.lease(Round(9), SiteId(0), 4), [SampleRange { start: 4, end: 8 }]);
    }

    #[test]
    fn ending_a_lease_twice_changes_nothing() {
        let mut ledger = Ledger::default();
        ledger.lease(Round(1), SiteId(0), 4);
        ledger.commit(Round(1), SiteId(0));
        let before = ledger.clone();
        ledger.commit(Round(1), SiteId(0));
        ledger.give_back(Round(1), SiteId(0));
        assert_eq!(ledger, before);
    }

    proptest! {
        /// Any order of leases, commits and returns keeps I2.
        #[test]
        fn the_ledger_always_adds_up(actions in prop::collection::vec((0u8..3, 0u32..4, 1u64..50), 1..200)) {
            let mut ledger = Ledger::default();
            let mut round = 0;
            let mut open: Vec<(Round, SiteId)> = Vec::new();
            for (action, site, samples) in actions {
                match action {
                    0 => {
                        round += 1;
                        ledger.lease(Round(round), SiteId(site), samples);
                        open.push((Round(round), SiteId(site)));
                    }
                    1 => if let Some((round, site)) = open.pop() { ledger.commit(round, site) },
                    _ => if let Some((round, site)) = open.pop() { ledger.give_back(round, site) },
                }
                prop_assert_eq!(ledger.audit(), Ok(()));
            }
        }
    }
}
