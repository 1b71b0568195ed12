//! A round between its plan and its commit: who has delivered, who holds what, and when that is enough.

use super::holdings::Holdings;
use super::reduction::Reduction;
use crate::plan::{Contribution, Contributor, RoundPlan};
use base::SiteId;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// What a site has delivered for a round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Delivery {
    pub(super) contribution: Contribution,
    /// Tokens that the site had trained on since it joined, when it took the snapshot; 0 where it has left since.
    pub(super) trained_tokens: u64,
    /// Those of them that no merged delta of this fragment holds yet.
    pub(super) weight: u64,
}

/// A round that is not committed yet.
#[derive(Debug, Clone)]
pub(super) struct OpenRound {
    pub(super) plan: RoundPlan,
    /// Size of each delta.
    pub(super) delta_bytes: u64,
    pub(super) began: f64,
    /// Sites that have not delivered by then are dropped.
    pub(super) deadline: f64,
    /// Time from the fastest site's snapshot until it needs the merge.
    pub(super) overlap_seconds: f64,
    /// Since when a quorum has delivered.
    pub(super) quorum_since: Option<f64>,
    pub(super) deliveries: BTreeMap<SiteId, Delivery>,
    /// Of the deltas.
    holdings: Holdings,
    /// Where the round is sharded.
    pub(super) reduction: Option<Reduction>,
    /// Why it is not any more, until sites are told.
    pub(super) fell_back: Option<String>,
}

impl OpenRound {
    pub(super) fn new(plan: RoundPlan, delta_bytes: u64, began: f64, deadline: f64, overlap_seconds: f64) -> Self {
        Self {
            reduction: Reduction::new(&plan.parts),
            plan,
            delta_bytes,
            began,
            deadline,
            overlap_seconds,
            quorum_since: None,
            deliveries: BTreeMap::new(),
            holdings: Holdings::default(),
            fell_back: None,
        }
    }

    /// What a commit says of a site that has delivered.
    pub(super) fn contributor(&self, site: SiteId) -> Contributor {
        let Delivery { contribution, weight, .. } = self.deliveries[&site];
        let Contribution { delta_hash, delta_bytes, .. } = contribution;
        Contributor { site, tokens: weight, delta_hash, delta_bytes }
    }

    /// Sites that work in this round.
    pub(super) fn workers(&self) -> impl Iterator<Item = SiteId> + '_ {
        self.plan.assignments.iter().map(|assignment| assignment.site)
    }

    /// Those of them that have not delivered.
    pub(super) fn missing(&self) -> Vec<SiteId> {
        self.workers().filter(|site| !self.deliveries.contains_key(site)).collect()
    }

    /// Whether every worker has delivered: nobody else can, and whose work is withdrawn is in neither list.
    pub(super) fn is_delivered(&self) -> bool {
        self.deliveries.len() == self.plan.assignments.len()
    }

    /// Sites that are enough for a commit.
    pub(super) fn quorum(&self, part: f64) -> usize {
        let workers = self.plan.assignments.len();
        ((workers as f64 * part).ceil() as usize).clamp(1, workers.max(1))
    }

    pub(super) fn deliver(&mut self, site: SiteId, delivery: Delivery) {
        self.deliveries.insert(site, delivery);
        self.holdings.announce(site);
        self.holdings.hold(site, site);
        if let Some(reduction) = &mut self.reduction {
            reduction.deliver(site);
        }
    }

    /// `site` holds the delta of `from`.
    pub(super) fn hold(&mut self, site: SiteId, from: SiteId) {
        self.holdings.hold(site, from);
    }

    /// Whether `site` holds what is to be merged: every delta that was delivered, or every merged part.
    pub(super) fn holds_all(&self, site: SiteId) -> bool {
        match &self.reduction {
            Some(reduction) => reduction.holds_all(site),
            None => self.holdings.holds_all(site),
        }
    }

    /// Sites whose delta no other current site holds, of at least two: it cannot be fetched, or is none. Of two sites nobody can say which
    /// one errs.
    pub(super) fn held_by_nobody_else(&self, current: &[SiteId]) -> Vec<SiteId> {
        if current.len() < 3 {
            return Vec::new();
        }
        let is_current = |from: &SiteId| current.binary_search(from).is_ok();
        let by_itself = |from: &SiteId| current.iter().all(|site| site == from || !self.holdings.holds(*site, *from));
        self.holdings.held_once(current).into_iter().filter(|from| is_current(from) && by_itself(from)).collect()
    }

    /// Every worker has delivered, and every current site holds every delta.
    pub(super) fn is_complete(&self, current: &[SiteId]) -> bool {
        self.is_delivered() && self.holdings.all_hold_all(current)
    }

    /// Forgets a site that left. Its delta stays where every other current site holds it, or a merge of it, unless `distrusted`. True
    /// where it stays.
    pub(super) fn remove(&mut self, site: SiteId, others: &[SiteId], distrusted: bool) -> bool {
        let is_merged = self.leave_reduction(site, others, distrusted);
        let is_held = !distrusted
            && self.deliveries.contains_key(&site)
            && !others.is_empty()
            && others.iter().all(|other| self.holdings.holds(*other, site));
        let stays = is_merged || is_held;
        if !stays {
            self.deliveries.remove(&site);
            self.plan.assignments.retain(|assignment| assignment.site != site);
            self.holdings.withdraw(site);
        }
        if let Some(delivery) = self.deliveries.get_mut(&site) {
            // Should it come back, it begins to count anew.
            delivery.trained_tokens = 0;
        }
        self.holdings.forget(site);
        stays
    }

    /// The deltas that a commit may name although not all sites hold all: the most that at least `quorum` current sites all
    /// hold, so that whoever lacks one can fetch it from any of these. Among sites that hold equally many, lower ids first.
    /// `None` where no such set holds as many deltas as the quorum.
    pub(super) fn common(&self, current: &[SiteId], quorum: usize) -> Option<Vec<SiteId>> {
        let mut holders: Vec<SiteId> = current.to_vec();
        holders.sort_by_key(|site| (Reverse(self.holdings.count(*site)), *site));
        // What more of them all hold can only be less.
        holders.truncate(quorum.max(1));
        let set = self.holdings.held_by_all(&holders);
        (!holders.is_empty() && set.len() >= quorum).then_some(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Assignment, FragmentPlan};
    use crate::schedule::effects;
    use base::config::Codec;
    use base::{ContentHash, Round, Term};

    fn round(sites: u32) -> OpenRound {
        let fragment = FragmentPlan { index: 0, count: 1, codec: Codec::F32, rank: 0 };
        let assign = |site| Assignment { site: SiteId(site), samples: 4, steps: 2, lease: Vec::new(), share: 0.5 };
        let assignments = (0..sites).map(assign).collect();
        let effects = effects(Round(1), 2, 0);
        let (term, round, parts) = (Term(1), Round(1), Vec::new());
        let (attempt, first_step, steps, check) = (1, 0, 2, None);
        let plan = RoundPlan { term, round, attempt, first_step, steps, fragment, effects, assignments, parts, check };
        OpenRound::new(plan, 4, 0.0, 10.0, 0.0)
    }

    fn deliver(round: &mut OpenRound, site: u32) {
        let contribution = Contribution {
            tokens: 1,
            delta_hash: ContentHash::default(),
            delta_bytes: 4,
            loss_nats: 1.0,
            compute_seconds: 1.0,
        };
        round.deliver(SiteId(site), Delivery { contribution, trained_tokens: 1, weight: 1 });
    }

    fn ids(sites: &[u32]) -> Vec<SiteId> {
        sites.iter().map(|site| SiteId(*site)).collect()
    }

    #[test]
    fn a_quorum_is_a_part_of_the_workers_and_at_least_one() {
        let round = round(3);
        assert_eq!((round.quorum(0.0), round.quorum(0.5), round.quorum(0.67), round.quorum(1.0)), (1, 2, 3, 3));
    }

    #[test]
    fn what_one_slow_link_keeps_from_one_site_is_left_out() {
        let mut round = round(3);
        (0..3).for_each(|site| deliver(&mut round, site));
        assert_eq!(round.common(&ids(&[0, 1, 2]), 2), None, "nobody holds two deltas yet");
        for (site, from) in [(0, 1), (1, 0), (2, 0), (2, 1)] {
            round.hold(SiteId(site), SiteId(from));
        }
        // 0, 1 and 2 hold the deltas of 0 and 1; that of 2 is still with 2 alone.
        assert_eq!(round.common(&ids(&[0, 1, 2]), 2), Some(ids(&[0, 1])));
        assert!(!round.is_complete(&ids(&[0, 1, 2])));
    }

    #[test]
    fn of_two_sites_that_cannot_reach_each_other_the_first_goes_on() {
        let mut round = round(2);
        (0..2).for_each(|site| deliver(&mut round, site));
        assert_eq!(round.common(&ids(&[0, 1]), 1), Some(ids(&[0])));
    }

    #[test]
    fn a_delta_that_no_other_site_holds_is_its_makers_fault_where_there_are_two_others() {
        let mut round = round(3);
        (0..3).for_each(|site| deliver(&mut round, site));
        for (site, from) in [(0, 1), (1, 0), (2, 0), (2, 1)] {
            round.hold(SiteId(site), SiteId(from));
        }
        assert_eq!(round.held_by_nobody_else(&ids(&[0, 1, 2])), ids(&[2]));
        assert_eq!(round.held_by_nobody_else(&ids(&[0, 2])), [], "of two nobody can say who errs");
        round.hold(SiteId(1), SiteId(2));
        assert_eq!(round.held_by_nobody_else(&ids(&[0, 1, 2])), []);
    }

    #[test]
    fn a_delta_stays_when_its_site_leaves_only_if_all_others_hold_it() {
        let mut held = round(3);
        (0..3).for_each(|site| deliver(&mut held, site));
        held.hold(SiteId(0), SiteId(2));
        let mut lost = held.clone();
        held.hold(SiteId(1), SiteId(2));
        assert!(held.remove(SiteId(2), &ids(&[0, 1]), false));
        assert!(held.deliveries.contains_key(&SiteId(2)));
        assert!(!lost.remove(SiteId(2), &ids(&[0, 1]), false));
        assert!(!lost.deliveries.contains_key(&SiteId(2)) && lost.plan.assignments.len() == 2);
    }
}
