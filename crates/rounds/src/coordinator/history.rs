//! The commits of the run, as far as somebody may still need them.
//!
//! - A site that catches up is sent the commits after its state, with all that they name. It can only follow from a state that is not older
//!   than what sites keep of deltas ([`super::Settings::rounds_kept`]); so only so many commits are kept *whole*.
//! - The run goes back to an older state where no site holds a newer one. For that a commit is kept as a *landmark*: its place in the run, the
//!   hash of the state and what is accounted of samples, but nothing of each site: some 400 bytes, however many sites there are.
//! - Landmarks are kept of [`LANDMARKS_MAX`] commits, and of round 0. A site keeps a few checkpoints of the last rounds it had a part in
//!   (`checkpoint.every_rounds` times `keep`); one that holds an older state than all landmarks was away for weeks, and the run goes back for it
//!   only if everything that was learnt since is lost at every site. Then it begins anew.

use super::Committed;
use crate::ledger::Ledger;
use crate::plan::Commit;
use base::{ContentHash, Round};
use std::collections::VecDeque;

/// 45 days of rounds of a minute: 26 MB.
pub(super) const LANDMARKS_MAX: usize = 65_536;

/// Commits in their order.
#[derive(Debug, Clone)]
pub(super) struct History {
    /// Round 0.
    initial: Committed,
    /// Later ones, ascending; the oldest may be forgotten.
    commits: VecDeque<Committed>,
    /// How many of them, from the first on, are landmarks.
    landmarks: usize,
}

impl History {
    pub(super) fn new(initial_hash: ContentHash) -> Self {
        let (commit, ledger) = (Commit::initial(), Ledger::default());
        let initial = Committed { commit, ledger, state_hash: Some(initial_hash) };
        Self { initial, commits: VecDeque::new(), landmarks: 0 }
    }

    /// The newest.
    pub(super) fn last(&self) -> &Committed {
        self.commits.back().unwrap_or(&self.initial)
    }

    /// From the newest to round 0.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = &Committed> {
        self.commits.iter().rev().chain([&self.initial])
    }

    /// What is known of that round.
    pub(super) fn get(&self, round: Round) -> Option<&Committed> {
        if round == self.initial.commit.round {
            return Some(&self.initial);
        }
        self.place(round).map(|place| &self.commits[place])
    }

    fn place(&self, round: Round) -> Option<usize> {
        self.commits.binary_search_by_key(&round, |committed| committed.commit.round).ok()
    }

    /// Adds a commit, and keeps `whole` of them whole: who holds an older state cannot follow any more.
    pub(super) fn push(&mut self, committed: Committed, whole: usize) {
        self.commits.push_back(committed);
        while self.landmarks + whole < self.commits.len() {
            let Committed { commit, ledger, .. } = &mut self.commits[self.landmarks];
            (commit.contributors, commit.parts) = (Vec::new(), Vec::new());
            ledger.settle();
            self.landmarks += 1;
        }
        while self.landmarks > LANDMARKS_MAX {
            self.commits.pop_front();
            self.landmarks -= 1;
        }
    }

    /// The commits after that round, if they are all whole.
    pub(super) fn after(&self, round: Round) -> Option<impl Iterator<Item = &Committed>> {
        let first = self.commits.partition_point(|committed| committed.commit.round <= round);
        (first >= self.landmarks).then(|| self.commits.range(first..))
    }

    /// The state after a commit has become known.
    pub(super) fn settle(&mut self, round: Round, state_hash: ContentHash) {
        if let Some(place) = self.place(round) {
            self.commits[place].state_hash = Some(state_hash);
        }
    }

    /// Forgets commits that are not wanted. Round 0 stays.
    pub(super) fn retain(&mut self, is_wanted: impl Fn(&Committed) -> bool) {
        let kept = self.commits.iter().take(self.landmarks).filter(|committed| is_wanted(committed)).count();
        self.commits.retain(|committed| is_wanted(committed));
        self.landmarks = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Contributor;
    use base::SiteId;

    const SITES: u32 = 4;

    fn committed(ledger: &mut Ledger, round: u64) -> Committed {
        let contributor =
            |site| Contributor { site: SiteId(site), tokens: 1, delta_hash: ContentHash([1; 32]), delta_bytes: 1 };
        for site in 0..SITES {
            ledger.lease(Round(round), SiteId(site), 3);
            // Leases of the next round are open when a round is committed.
            ledger.commit_through(Round(round - 1), SiteId(site));
        }
        let contributors = (0..SITES).map(contributor).collect();
        let commit = Commit { round: Round(round), contributors, cursor: ledger.cursor(), ..Commit::initial() };
        Committed { commit, ledger: ledger.clone(), state_hash: Some(ContentHash([2; 32])) }
    }

    fn history(rounds: u64, whole: usize) -> History {
        let (mut history, mut ledger) = (History::new(ContentHash::default()), Ledger::default());
        for round in 1..=rounds {
            history.push(committed(&mut ledger, round), whole);
        }
        history
    }

    /// Contributors, leases and ranges that are kept of all commits.
    fn entries(history: &History) -> usize {
        let of = |committed: &Committed| 1 + committed.commit.contributors.len() + committed.ledger.entries();
        history.newest_first().map(of).sum()
    }

    #[test]
    fn very_many_rounds_take_no_more_than_many() {
        let rounds = LANDMARKS_MAX as u64 + 5_000;
        let history = history(rounds, 20);
        assert_eq!(history.newest_first().count(), 1 + 20 + LANDMARKS_MAX);
        // A landmark has what is committed and what was leased then, each as one range; a whole one four contributors and four leases.
        assert_eq!(entries(&history), 1 + 3 * LANDMARKS_MAX + 20 * (1 + 4 + 1 + 4));
        let oldest = rounds - 20 - LANDMARKS_MAX as u64;
        assert!(history.get(Round(oldest)).is_none() && history.get(Round(oldest + 1)).is_some());
        assert_eq!(history.get(Round(0)), Some(&history.initial), "the state that every run begins with");
    }

    #[test]
    fn a_landmark_is_enough_to_go_on_from() {
        let history = history(100, 10);
        for round in [1, 50, 90, 91, 100] {
            let mut ledger = Ledger::default();
            let whole = (1..=round).map(|round| committed(&mut ledger, round)).last().unwrap();
            let kept = history.get(Round(round)).unwrap();
            assert_eq!((kept.commit.round, kept.commit.cursor), (Round(round), whole.commit.cursor));
            let (mut kept, mut whole) = (kept.ledger.clone(), whole.ledger);
            kept.settle();
            whole.settle();
            assert_eq!(kept, whole);
            kept.audit().unwrap();
            assert_eq!(
                kept.lease(Round(101), SiteId(0), 12),
                [crate::SampleRange { start: 12 * (round - 1), end: 12 * round }]
            );
        }
    }

    #[test]
    fn only_whole_commits_are_sent_to_who_catches_up() {
        let history = history(100, 10);
        let after =
            |round| history.after(Round(round)).map(|after| after.map(|of| of.commit.round.0).collect::<Vec<_>>());
        assert_eq!(after(100), Some(vec![]));
        assert_eq!(after(97), Some(vec![98, 99, 100]));
        assert_eq!(after(90), Some((91..=100).collect()));
        assert_eq!(after(89), None);
        assert!(history.after(Round(90)).unwrap().all(|whole| whole.commit.contributors.len() == SITES as usize));
    }

    #[test]
    fn what_is_taken_back_is_forgotten() {
        let mut history = history(100, 10);
        history.retain(|committed| committed.commit.round <= Round(40));
        assert_eq!((history.last().commit.round, history.landmarks), (Round(40), 40));
        let mut ledger = history.last().ledger.clone();
        for round in 41..=60 {
            history.push(committed(&mut ledger, round), 10);
        }
        assert_eq!((history.last().commit.round, history.landmarks), (Round(60), 50));
        history.retain(|_| false);
        assert_eq!((history.last().commit.round, history.landmarks), (Round(0), 0));
    }
}
