//! A site that is asked what it holds, or that comes back to its coordinator, says so once, and of one state.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use base::{ContentHash, Round, SiteId, Term};
use rounds::plan::{Commit, Contributor, Directive, Report};
use rounds::{Member, MemberCommand, MemberEvent};

const INITIAL: ContentHash = ContentHash([7; 32]);
const AFTER: ContentHash = ContentHash([8; 32]);

struct Site(Member);

impl Site {
    /// Site 0, at round 0 and in term 1.
    fn new() -> Self {
        let mut site = Self(Member::new(SiteId(0), Round(0), INITIAL, 1.0));
        site.told(Directive::Lead { term: Term(1) });
        site
    }

    /// A site that was told of rounds 1 and 2, and has the deltas of these rounds.
    fn behind(held: &[u64]) -> Self {
        let mut site = Self::new();
        for round in 1..=2 {
            site.told(Directive::Commit(commit(round).into()));
        }
        for round in held {
            site.happens(MemberEvent::DeltaHeld { round: Round(*round), from: SiteId(1) });
        }
        site
    }

    fn happens(&mut self, event: MemberEvent) -> Vec<MemberCommand> {
        self.0.handle(event).unwrap()
    }

    fn told(&mut self, directive: Directive) -> Vec<MemberCommand> {
        self.happens(MemberEvent::Directive(directive))
    }

    fn merged(&mut self, round: u64) -> Vec<MemberCommand> {
        self.happens(MemberEvent::Merged { round: Round(round), state_hash: AFTER })
    }
}

fn commit(round: u64) -> Commit {
    let contributor =
        Contributor { site: SiteId(1), tokens: 1, delta_hash: ContentHash([round as u8; 32]), delta_bytes: 4 };
    Commit { term: Term(1), round: Round(round), contributors: vec![contributor], ..Commit::initial() }
}

fn recall(number: u32) -> Directive {
    Directive::Recall { number }
}

/// What the coordinator is told of states: round and number of the recall that is answered.
fn answers(commands: &[MemberCommand]) -> Vec<(u64, u32)> {
    let answer = |command: &MemberCommand| match command {
        MemberCommand::Report(Report::Ready { round, recall, .. }) => Some((round.0, *recall)),
        _ => None,
    };
    commands.iter().filter_map(answer).collect()
}

#[test]
fn what_cannot_be_merged_is_forgotten() {
    let mut site = Site::behind(&[]);
    let commands = site.told(recall(1));
    assert_eq!(answers(&commands), [(0, 1)]);
    assert!(commands.contains(&MemberCommand::Abandon));
    // It is told again where it can be had.
    let fetches = |command: &MemberCommand| matches!(command, MemberCommand::FetchDelta { round: Round(1), .. });
    assert!(site.told(Directive::Commit(commit(1).into())).iter().any(fetches));
}

#[test]
fn what_is_held_is_merged_first() {
    let mut site = Site::behind(&[1]);
    assert!(answers(&site.told(recall(1))).is_empty(), "round 1 is being merged");
    assert_eq!(answers(&site.merged(1)), [(1, 1)]);
    let mut site = Site::behind(&[2]);
    assert_eq!(answers(&site.told(recall(1))), [(0, 1)], "round 2 is of no use without round 1");
}

#[test]
fn the_newest_recall_is_answered_and_a_new_line_begins_anew() {
    let mut site = Site::behind(&[1]);
    assert!(answers(&site.told(recall(1))).is_empty());
    assert!(answers(&site.told(recall(2))).is_empty());
    assert_eq!(answers(&site.merged(1)), [(1, 2)]);
    assert_eq!(answers(&site.happens(MemberEvent::Reconnected)), [(1, 0)]);
}

#[test]
fn commits_that_came_before_the_line_broke_are_waited_for_until_the_coordinator_asks() {
    let mut site = Site::behind(&[]);
    assert!(answers(&site.happens(MemberEvent::Reconnected)).is_empty());
    assert_eq!(answers(&site.told(recall(1))), [(0, 1)]);
}

#[test]
fn a_state_that_is_on_its_way_is_waited_for() {
    for (event, round) in
        [(MemberEvent::StateHeld { round: Round(5), state_hash: AFTER }, 5), (MemberEvent::StateUnavailable, 0)]
    {
        let mut site = Site::new();
        let from = [SiteId(1)].into();
        site.told(Directive::FetchState { commit: commit(5).into(), state_hash: AFTER, from });
        assert!(answers(&site.happens(MemberEvent::Reconnected)).is_empty());
        assert_eq!(answers(&site.happens(event)), [(round, 0)], "once");
        assert!(answers(&site.told(Directive::Peers([].into()))).is_empty());
    }
}

#[test]
fn a_recall_that_came_before_the_engine_was_ready_is_followed() {
    let member = Member::new(SiteId(0), Round(3), INITIAL, 1.0).after_recall(2);
    assert_eq!(answers(&[member.start()]), [(3, 2)]);
}
