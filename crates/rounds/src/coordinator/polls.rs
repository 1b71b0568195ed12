//! What sites say they hold after a commit, until all have said it.
//!
//! A commit is settled when every site that was sent it has said the hash of its state: those that took part when it was made, and those that
//! came after from an older state. Whom that waits for is kept, so that a word costs O(log n) of n sites.

use base::{ContentHash, Round, SiteId};
use std::collections::{BTreeMap, BTreeSet};

/// What is said after one commit.
#[derive(Debug, Clone, Default)]
struct Poll {
    votes: BTreeMap<SiteId, ContentHash>,
    awaited: BTreeSet<SiteId>,
}

/// Commits that are not settled.
#[derive(Debug, Clone, Default)]
pub(super) struct Polls(BTreeMap<Round, Poll>);

impl Polls {
    /// These have been sent a commit.
    pub(super) fn open(&mut self, round: Round, voters: &[SiteId]) {
        let awaited = voters.iter().copied().collect();
        self.0.insert(round, Poll { votes: BTreeMap::new(), awaited });
    }

    /// A site takes part that has been sent all commits after that round.
    pub(super) fn join(&mut self, site: SiteId, since: Round) {
        for (_, poll) in self.0.range_mut(since.next()..) {
            poll.awaited.insert(site);
        }
    }

    /// A site says what it holds. Of what is settled nobody asks any more.
    pub(super) fn vote(&mut self, site: SiteId, round: Round, hash: ContentHash) {
        if let Some(poll) = self.0.get_mut(&round) {
            poll.awaited.remove(&site);
            poll.votes.insert(site, hash);
        }
    }

    /// A site takes no part any more.
    pub(super) fn leave(&mut self, site: SiteId) {
        for poll in self.0.values_mut() {
            poll.awaited.remove(&site);
            poll.votes.remove(&site);
        }
    }

    /// Words that are waited for, or kept.
    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.0.values().map(|poll| poll.votes.len() + poll.awaited.len()).sum()
    }

    /// Nobody is asked any more.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// What was said after the oldest commit that is not settled, once all have: commits are settled in order.
    pub(super) fn take_settled(&mut self) -> Option<(Round, BTreeMap<SiteId, ContentHash>)> {
        let oldest = self.0.first_entry()?;
        let Poll { votes, awaited } = oldest.get();
        if votes.is_empty() || !awaited.is_empty() {
            return None;
        }
        let (round, poll) = oldest.remove_entry();
        Some((round, poll.votes))
    }
}

/// The hash that most sites hold; among equals that of the lowest site id.
pub(super) fn most_frequent(votes: &BTreeMap<SiteId, ContentHash>) -> ContentHash {
    let mut counts: BTreeMap<ContentHash, usize> = BTreeMap::new();
    for hash in votes.values() {
        *counts.entry(*hash).or_default() += 1;
    }
    let first = votes.values().next().copied().unwrap_or_default();
    counts.iter().fold(first, |best, (hash, count)| if *count > counts[&best] { *hash } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(of: u8) -> ContentHash {
        ContentHash([of; 32])
    }

    #[test]
    fn a_commit_is_settled_when_all_that_were_sent_it_have_said_what_they_hold() {
        let (mut polls, [a, b, c]) = (Polls::default(), [0, 1, 2].map(SiteId));
        polls.open(Round(4), &[a, b]);
        polls.open(Round(5), &[a, b]);
        // It comes from the state after round 4.
        polls.join(c, Round(4));
        for site in [a, b] {
            assert_eq!(polls.take_settled(), None);
            polls.vote(site, Round(5), hash(5));
            polls.vote(site, Round(4), hash(4));
        }
        assert_eq!(polls.take_settled(), Some((Round(4), BTreeMap::from([(a, hash(4)), (b, hash(4))]))));
        assert_eq!(polls.take_settled(), None, "the third one has not said what it holds after round 5");
        polls.vote(c, Round(4), hash(1));
        polls.leave(b);
        polls.vote(c, Round(5), hash(5));
        assert_eq!(polls.take_settled(), Some((Round(5), BTreeMap::from([(a, hash(5)), (c, hash(5))]))));
        assert!(polls.0.is_empty(), "what was said of a settled round is not kept");
    }

    #[test]
    fn nothing_is_settled_by_nobody() {
        let mut polls = Polls::default();
        polls.open(Round(1), &[SiteId(0)]);
        polls.leave(SiteId(0));
        assert_eq!(polls.take_settled(), None);
    }

    #[test]
    fn among_equally_many_the_lowest_site_is_right() {
        let votes = |hashes: &[u8]| (0..).map(SiteId).zip(hashes.iter().map(|of| hash(*of))).collect();
        assert_eq!(most_frequent(&votes(&[2, 1, 1])), hash(1));
        assert_eq!(most_frequent(&votes(&[2, 1])), hash(2));
        assert_eq!(most_frequent(&votes(&[2, 1, 1, 2])), hash(2));
    }
}
