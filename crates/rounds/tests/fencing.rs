//! An old coordinator that comes back is refused: by the term that it says before anything else, and by that of each plan.

use base::config::Codec;
use base::{ContentHash, Round, SiteId, Term};
use rounds::plan::{Commit, Directive, FragmentPlan, RoundPlan};
use rounds::schedule::effects;
use rounds::{Member, MemberCommand, MemberEvent};

const HASH: ContentHash = ContentHash([7; 32]);

fn member() -> Member {
    Member::new(SiteId(0), Round(0), HASH, 1.0)
}

fn told(member: &mut Member, directive: Directive) -> Result<Vec<MemberCommand>, String> {
    member.handle(MemberEvent::Directive(directive)).map_err(|error| error.to_string())
}

fn lead(term: u64) -> Directive {
    Directive::Lead { term: Term(term) }
}

fn begin(term: u64) -> Directive {
    let fragment = FragmentPlan { index: 0, count: 1, codec: Codec::F32, rank: 0 };
    let effects = effects(Round(1), 1, 0);
    let assignments = Vec::new();
    let (term, round) = (Term(term), Round(1));
    let plan = RoundPlan {
        term,
        round,
        attempt: 1,
        first_step: 0,
        steps: 1,
        fragment,
        effects,
        parts: Vec::new(),
        check: None,
        assignments,
    };
    Directive::Begin(plan.into())
}

fn fetch_state() -> Directive {
    Directive::FetchState { commit: Commit::initial().into(), state_hash: HASH, from: [SiteId(1)].into() }
}

#[test]
fn an_older_coordinator_is_refused_before_it_can_ask_for_anything() {
    let mut member = member();
    told(&mut member, lead(3)).unwrap();
    assert_eq!(member.term(), Term(3));
    assert!(told(&mut member, lead(2)).unwrap_err().contains("older term 2"));
    assert!(told(&mut member, begin(2)).unwrap_err().contains("older term 2"));
    assert_eq!(member.term(), Term(3));
    told(&mut member, begin(3)).unwrap();
}

#[test]
fn a_site_that_starts_again_has_not_forgotten_the_newest_term() {
    let mut member = member().after_term(Term(3));
    assert!(told(&mut member, lead(2)).is_err());
    // What another state is held does not change that.
    told(&mut member, lead(3)).unwrap();
    told(&mut member, fetch_state()).unwrap();
    member.handle(MemberEvent::StateHeld { round: Round(0), state_hash: HASH }).unwrap();
    assert!(told(&mut member, lead(2)).is_err());
}

#[test]
fn commits_of_earlier_terms_are_caught_up_with_and_terms_do_not_go_back() {
    let commit = |term, round| {
        let (term, round) = (Term(term), Round(round));
        Directive::Commit(Commit { term, round, ..Commit::initial() }.into())
    };
    let mut member = member().after_term(Term(4));
    told(&mut member, lead(5)).unwrap();
    told(&mut member, commit(2, 1)).unwrap();
    told(&mut member, commit(4, 2)).unwrap();
    assert!(told(&mut member, commit(3, 3)).unwrap_err().contains("older term 3"));
}
