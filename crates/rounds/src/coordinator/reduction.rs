//! A sharded round between its plan and its commit, in three stages:
//!
//! 1. *gather*: each reducer fetches its slice of every delta;
//! 2. *reduce*: it is told whose count, merges them, and says the hash;
//! 3. *spread*: every site fetches the merged parts.
//!
//! The first two need every reducer. One that leaves, or is late, gives the round back to the mesh: makers keep their whole deltas until
//! then. Late is who takes more than twice as long for a stage as half of the reducers did, and longer than the grace window.

use super::holdings::Holdings;
use super::open_round::OpenRound;
use crate::exchange::{MergedPart, Part};
use base::{ContentHash, SiteId};
use std::collections::{BTreeMap, BTreeSet};

/// What has been said in a sharded round.
#[derive(Debug, Clone)]
pub(super) struct Reduction {
    parts: Vec<Part>,
    /// Who merges them.
    reducers: BTreeSet<SiteId>,
    /// Of each reducer: whose slices it has.
    slices: Holdings,
    /// Once reducers were told.
    contributors: Option<Vec<SiteId>>,
    /// By reducer.
    merged: BTreeMap<SiteId, ContentHash>,
    /// Of each site: whose merged parts it has.
    holdings: Holdings,
    /// When this stage began, if it has: when everybody had delivered, and when the reducers were told.
    stage_since: Option<f64>,
    /// Since when half of the reducers are through with it.
    half_since: Option<f64>,
    /// Since when a quorum of sites holds the whole merge.
    pub(super) spread_since: Option<f64>,
}

/// What a sharded round needs now.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Next {
    Wait,
    /// Reducers are to merge the deltas of these sites.
    Reduce(Vec<SiteId>),
    /// These reducers hold it up.
    Late(Vec<SiteId>),
}

/// How long a round waits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Deliveries that are enough for a commit, once the grace window has passed.
    pub(super) enough: usize,
    /// It has passed.
    pub(super) is_over: bool,
    /// Seconds for which a reducer may be later than half of them in any case.
    pub(super) reducer_seconds: f64,
}

impl Reduction {
    /// For the parts of a plan; `None` where it has none.
    pub(super) fn new(parts: &[Part]) -> Option<Self> {
        (!parts.is_empty()).then(|| Self {
            parts: parts.to_vec(),
            reducers: parts.iter().map(|part| part.site).collect(),
            slices: Holdings::default(),
            contributors: None,
            merged: BTreeMap::new(),
            holdings: Holdings::default(),
            stage_since: None,
            half_since: None,
            spread_since: None,
        })
    }

    pub(super) fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub(super) fn is_reducer(&self, site: SiteId) -> bool {
        self.reducers.contains(&site)
    }

    /// The slices of a delta can be fetched. A reducer has its own.
    pub(super) fn deliver(&mut self, site: SiteId) {
        self.slices.announce(site);
        self.hold_slice(site, site);
    }

    /// A reducer holds the slice of a delta that was delivered.
    pub(super) fn hold_slice(&mut self, reducer: SiteId, from: SiteId) {
        if self.is_reducer(reducer) {
            self.slices.hold(reducer, from);
        }
    }

    /// Notes what a reducer has merged, the first time that it says so after it was told. Gives that.
    pub(super) fn merge(&mut self, reducer: SiteId, hash: ContentHash) -> Option<MergedPart> {
        let part = self.parts.iter().find(|part| part.site == reducer)?.clone();
        if self.contributors.is_none() || self.merged.contains_key(&reducer) {
            return None;
        }
        self.merged.insert(reducer, hash);
        self.holdings.announce(reducer);
        self.hold_part(reducer, reducer);
        Some(MergedPart { part, hash })
    }

    /// `site` holds what `reducer` has merged.
    pub(super) fn hold_part(&mut self, site: SiteId, reducer: SiteId) {
        self.holdings.hold(site, reducer);
    }

    /// What has been merged so far.
    pub(super) fn merged(&self) -> Vec<MergedPart> {
        let hash = |part: &Part| self.merged.get(&part.site).copied();
        self.parts.iter().filter_map(|part| Some(MergedPart { part: part.clone(), hash: hash(part)? })).collect()
    }

    pub(super) fn is_merged(&self) -> bool {
        self.merged.len() == self.parts.len()
    }

    /// Whether everything is merged and `site` holds it.
    pub(super) fn holds_all(&self, site: SiteId) -> bool {
        self.is_merged() && self.holdings.holds_all(site)
    }

    /// Whose deltas are in the merge, if all of these hold it.
    pub(super) fn spread_over(&self, sites: &[SiteId]) -> Option<&[SiteId]> {
        let is_spread = !sites.is_empty() && self.is_merged() && self.holdings.all_hold_all(sites);
        self.contributors.as_deref().filter(|_| is_spread)
    }

    /// Whose deltas are in the merge that at least `enough` of these hold.
    pub(super) fn spread_over_some(&self, sites: &[SiteId], enough: usize) -> Option<&[SiteId]> {
        let are_enough = |holders: usize| holders >= enough.max(1);
        // Of others than these there may be some as well.
        let may_be = self.is_merged() && are_enough(self.holdings.complete());
        let is_spread = may_be && are_enough(sites.iter().filter(|site| self.holds_all(**site)).count());
        self.contributors.as_deref().filter(|_| is_spread)
    }

    pub(super) fn forget(&mut self, site: SiteId) {
        self.holdings.forget(site);
    }

    /// Reducers are told to merge the deltas of these.
    pub(super) fn tell(&mut self, contributors: Vec<SiteId>, now: f64) {
        self.contributors = Some(contributors);
        (self.stage_since, self.half_since) = (Some(now), None);
    }

    /// Whether reducers that are not through with a stage are late, where so many are.
    fn is_late(&mut self, through: usize, now: f64, reducer_seconds: f64) -> bool {
        let began = *self.stage_since.get_or_insert(now);
        if 2 * through < self.parts.len() {
            return false;
        }
        let since = *self.half_since.get_or_insert(now);
        now - since > reducer_seconds.max(since - began)
    }

    /// Reducers, ascending, that lack slices.
    fn without_slices(&self) -> Vec<SiteId> {
        self.reducers.iter().copied().filter(|reducer| !self.slices.holds_all(*reducer)).collect()
    }

    /// Reducers, ascending, that have not merged.
    fn without_merge(&self) -> Vec<SiteId> {
        self.reducers.iter().copied().filter(|reducer| !self.merged.contains_key(reducer)).collect()
    }

    /// What is needed now, where all have delivered, or not all.
    fn next(&mut self, are_all: bool, now: f64, patience: Patience) -> Next {
        let Patience { enough, is_over, reducer_seconds } = patience;
        if self.is_merged() {
            return Next::Wait;
        }
        if self.contributors.is_some() {
            return match self.is_late(self.merged.len(), now, reducer_seconds) {
                true => Next::Late(self.without_merge()),
                false => Next::Wait,
            };
        }
        // Each slice that a reducer has is one of those that were delivered.
        let through = self.slices.complete();
        if are_all && through == self.parts.len() {
            return Next::Reduce(self.slices.makers().collect());
        }
        if is_over {
            let reducers: Vec<SiteId> = self.reducers.iter().copied().collect();
            let common = self.slices.held_by_all(&reducers);
            if common.len() >= enough {
                return Next::Reduce(common);
            }
        }
        // Where most reducers lack slices the links are what is slow, and a mesh would take them longer still.
        match (are_all || is_over) && self.is_late(through, now, reducer_seconds) {
            true => Next::Late(self.without_slices()),
            false => Next::Wait,
        }
    }
}

impl OpenRound {
    /// What the reducers are to do now, if the round is sharded.
    pub(super) fn next_of_reduction(&mut self, now: f64, patience: Patience) -> Next {
        let are_all = self.is_delivered();
        match &mut self.reduction {
            Some(reduction) if !self.deliveries.is_empty() => reduction.next(are_all, now, patience),
            _ => Next::Wait,
        }
    }

    /// Gives the round back to the mesh.
    pub(super) fn fall_back(&mut self, reason: String) {
        if self.reduction.take().is_some() {
            self.plan.parts.clear();
            self.fell_back = Some(reason);
        }
    }

    /// A site leaves a sharded round. True where its delta stays, because it is in a merge that every other site holds. Otherwise a site
    /// that has a part in the round gives it back to the mesh.
    pub(super) fn leave_reduction(&mut self, site: SiteId, others: &[SiteId], distrusted: bool) -> bool {
        let works = self.workers().any(|worker| worker == site);
        let Some(reduction) = &mut self.reduction else { return false };
        reduction.forget(site);
        if let Some(contributors) = reduction.spread_over(others).filter(|_| !distrusted) {
            return contributors.contains(&site);
        }
        if works || reduction.is_reducer(site) {
            self.fall_back(format!("site {site} left"));
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience { enough: 3, is_over: false, reducer_seconds: 2.0 };

    fn ids(sites: &[u32]) -> Vec<SiteId> {
        sites.iter().map(|site| SiteId(*site)).collect()
    }

    fn reduction() -> Reduction {
        let part = |site: u32| Part { site: SiteId(site), values: u64::from(site) * 10..u64::from(site + 1) * 10 };
        let mut reduction = Reduction::new(&[part(0), part(1), part(2)]).unwrap();
        ids(&[0, 1, 2]).into_iter().for_each(|site| reduction.deliver(site));
        reduction
    }

    fn hold(reduction: &mut Reduction, slices: &[(u32, u32)]) {
        slices.iter().for_each(|(reducer, from)| reduction.hold_slice(SiteId(*reducer), SiteId(*from)));
    }

    #[test]
    fn reducers_are_told_when_each_holds_all_its_slices() {
        let (mut reduction, all) = (reduction(), ids(&[0, 1, 2]));
        hold(&mut reduction, &[(0, 1), (0, 2), (1, 0), (1, 2), (2, 0)]);
        assert_eq!(reduction.next(true, 0.0, PATIENCE), Next::Wait);
        hold(&mut reduction, &[(2, 1)]);
        assert_eq!(reduction.next(false, 0.0, PATIENCE), Next::Wait, "a worker has not delivered");
        assert_eq!(reduction.next(true, 0.0, PATIENCE), Next::Reduce(all));
    }

    #[test]
    fn after_the_grace_what_all_reducers_hold_is_merged() {
        let mut reduction = reduction();
        hold(&mut reduction, &[(0, 1), (1, 0), (2, 0), (2, 1)]);
        let patience = Patience { enough: 2, is_over: true, ..PATIENCE };
        assert_eq!(reduction.next(true, 0.0, patience), Next::Reduce(ids(&[0, 1])));
        let patience = Patience { enough: 3, ..patience };
        assert_eq!(reduction.next(true, 0.0, patience), Next::Wait, "two of three lack slices: so slow are the links");
        hold(&mut reduction, &[(0, 2)]);
        assert_eq!(reduction.next(true, 10.0, patience), Next::Wait);
        assert_eq!(reduction.next(true, 21.0, patience), Next::Late(ids(&[1])));
    }

    #[test]
    fn a_reducer_is_late_that_takes_twice_as_long_as_half_of_them() {
        let (mut reduction, all) = (reduction(), ids(&[0, 1, 2]));
        reduction.tell(all.clone(), 0.0);
        assert!(reduction.merge(SiteId(0), ContentHash::default()).is_some());
        assert_eq!(reduction.next(true, 50.0, PATIENCE), Next::Wait, "one of three is no half");
        assert!(reduction.merge(SiteId(1), ContentHash::default()).is_some());
        assert_eq!(reduction.next(true, 51.0, PATIENCE), Next::Wait);
        assert_eq!(reduction.next(true, 101.0, PATIENCE), Next::Wait, "not yet twice as long as half of them");
        assert_eq!(reduction.next(true, 103.0, PATIENCE), Next::Late(ids(&[2])));
        assert!(reduction.merge(SiteId(2), ContentHash::default()).is_some());
        assert_eq!(reduction.next(true, 999.0, PATIENCE), Next::Wait, "others give a part on");
    }

    #[test]
    fn a_merge_counts_once_and_only_when_it_was_asked_for() {
        let mut reduction = reduction();
        assert_eq!(reduction.merge(SiteId(0), ContentHash([1; 32])), None);
        reduction.tell(ids(&[0, 1]), 0.0);
        assert_eq!(reduction.merge(SiteId(7), ContentHash([1; 32])), None);
        let merged = reduction.merge(SiteId(0), ContentHash([1; 32])).unwrap();
        assert_eq!((merged.part.values, merged.hash), (0..10, ContentHash([1; 32])));
        assert_eq!(reduction.merge(SiteId(0), ContentHash([2; 32])), None);
        reduction.hold_part(SiteId(1), SiteId(2));
        assert!(!reduction.holds_all(SiteId(1)), "what is not merged is held by nobody");
    }

    #[test]
    fn a_quorum_of_holders_is_enough_for_a_late_commit() {
        let mut reduction = reduction();
        reduction.tell(ids(&[0, 2]), 0.0);
        for reducer in ids(&[0, 1, 2]) {
            reduction.merge(reducer, ContentHash::default());
            ids(&[0, 1]).into_iter().for_each(|site| reduction.hold_part(site, reducer));
        }
        assert_eq!(reduction.spread_over(&ids(&[0, 1, 2])), None);
        assert_eq!(reduction.spread_over(&ids(&[0, 1])), Some(&ids(&[0, 2])[..]));
        assert_eq!(reduction.spread_over_some(&ids(&[0, 1, 2]), 2), Some(&ids(&[0, 2])[..]));
        assert_eq!(reduction.spread_over_some(&ids(&[0, 1, 2]), 3), None);
    }
}
