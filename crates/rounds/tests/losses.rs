//! What the simulator has found, step by step: sites that come with what nobody has, and sites whose holders leave.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use base::config::SyncSection;
use base::{ContentHash, ParameterSchema, Round, SiteId};
use rounds::coordinator::{Note, Record};
use rounds::plan::{Contribution, Directive, LeaveReason, Peer, Report, RoundPlan};
use rounds::{Command, Coordinator, Event, Settings};

const INITIAL: ContentHash = ContentHash([7; 32]);
const AFTER_ONE: ContentHash = ContentHash([8; 32]);

fn settings() -> Settings {
    Settings {
        sites: 2,
        batch_samples: 8,
        sequence_length: 16,
        steps_per_round: 4,
        steps_total: 400,
        seed: 0,
        sync: SyncSection { inner_steps: 4, ..SyncSection::default() },
        schema: ParameterSchema::new([("weight".to_owned(), vec![4])]),
    }
}

struct Run {
    coordinator: Coordinator,
    settings: Settings,
    now: f64,
}

impl Run {
    /// Two sites that have begun with round 1; gives its plan.
    fn begun() -> (Self, RoundPlan) {
        let settings = settings();
        let (coordinator, _) = Coordinator::recover(settings.clone(), INITIAL, []);
        let mut run = Self { coordinator, settings, now: 1.0 };
        run.join(0, 0, INITIAL);
        let commands = run.join(1, 0, INITIAL);
        let plan = commands.iter().find_map(|command| match command {
            Command::Send(_, Directive::Begin(plan)) => Some(RoundPlan::clone(plan)),
            _ => None,
        });
        (run, plan.unwrap())
    }

    fn tell(&mut self, event: Event) -> Vec<Command> {
        self.coordinator.handle(event, self.now)
    }

    fn connect(&mut self, site: u32) {
        let site = SiteId(site);
        let peer = Peer { site, name: format!("site-{site}"), address: "host:1".to_owned(), fingerprint: INITIAL };
        self.tell(Event::Connected(peer));
    }

    fn join(&mut self, site: u32, round: u64, state_hash: ContentHash) -> Vec<Command> {
        self.connect(site);
        self.ready(site, round, state_hash, 0)
    }

    fn ready(&mut self, site: u32, round: u64, state_hash: ContentHash, recall: u32) -> Vec<Command> {
        let ready = Report::Ready { round: Round(round), state_hash, tokens_per_second: 100.0, recall };
        self.tell(Event::Reported(SiteId(site), ready))
    }

    fn applied(&mut self, site: u32) {
        let applied = Report::Applied { round: Round(1), state_hash: AFTER_ONE };
        self.tell(Event::Reported(SiteId(site), applied));
    }

    /// Time passes; gives what was said meanwhile.
    fn seconds(&mut self, seconds: u32) -> Vec<Command> {
        let second = |_| {
            self.now += 1.0;
            self.tell(Event::Tick)
        };
        (0..seconds).flat_map(second).collect()
    }

    fn leave(&mut self, site: u32) -> Vec<Command> {
        self.tell(Event::Disconnected(SiteId(site), LeaveReason::ConnectionLost))
    }

    /// The site delivers what that plan asks of it.
    fn compute(&mut self, site: u32, plan: &RoundPlan) -> Vec<Command> {
        let (round, attempt, contribution) = (plan.round, plan.attempt, self.contribution(site, plan));
        self.tell(Event::Reported(
            SiteId(site),
            Report::Computed { round, attempt, contribution, slice_hashes: Vec::new() },
        ))
    }

    fn contribution(&self, site: u32, plan: &RoundPlan) -> Contribution {
        let site = SiteId(site);
        let samples = plan.assignments.iter().find(|assignment| assignment.site == site).unwrap().samples;
        Contribution {
            tokens: samples * self.settings.sequence_length,
            delta_hash: INITIAL,
            delta_bytes: self.settings.delta_bytes(plan.fragment),
            loss_nats: 1.0,
            compute_seconds: 1.0,
        }
    }
}

/// Whether a site is asked what it holds.
fn is_recalled(commands: &[Command], site: u32) -> bool {
    let asks =
        |command: &Command| matches!(command, Command::Send(to, Directive::Recall { .. }) if *to == SiteId(site));
    commands.iter().any(asks)
}

fn plan_for(commands: &[Command], site: u32) -> Option<RoundPlan> {
    commands.iter().find_map(|command| match command {
        Command::Send(to, Directive::Begin(plan)) if *to == SiteId(site) => Some(RoundPlan::clone(plan)),
        _ => None,
    })
}

#[test]
fn a_site_with_a_round_that_the_log_has_not_got_is_sent_to_fetch_a_state() {
    let (mut run, _) = Run::begun();
    run.leave(1);
    let commands = run.join(1, 9, AFTER_ONE);
    let fetches = |command: &Command| matches!(command, Command::Send(SiteId(1), Directive::FetchState { .. }));
    assert!(commands.iter().any(fetches), "{commands:?}");
}

/// Round 1 is committed and only site 1 has merged it; site 0 has come back with round 0, and fetches what it lacks.
fn behind_by_a_commit() -> Run {
    let (mut run, plan) = Run::begun();
    run.leave(0);
    run.compute(1, &plan);
    run.applied(1);
    assert_eq!(run.coordinator.last().commit.round, Round(1));
    // It can follow from round 0: site 1 has what it lacks.
    let commands = run.join(0, 0, INITIAL);
    let catches_up = |command: &Command| matches!(command, Command::Send(SiteId(0), Directive::Commit(_)));
    assert!(commands.iter().any(catches_up), "{commands:?}");
    assert!(!is_recalled(&run.seconds(20), 0), "what it lacks is to be had");
    run
}

#[test]
fn the_run_goes_back_when_nobody_has_what_its_last_commit_needs() {
    let mut run = behind_by_a_commit();
    run.leave(1);
    assert!(!is_recalled(&run.seconds(6), 0), "it may have fetched all of it just before");
    assert!(is_recalled(&run.seconds(1), 0));
    // Nobody knows yet whether site 1 comes with round 1.
    assert!(plan_for(&run.ready(0, 0, INITIAL, 1), 0).is_none());
    assert!(plan_for(&run.seconds(60), 0).is_none());
    assert_eq!(run.coordinator.last().commit.round, Round(1));
    let commands = run.join(1, 0, INITIAL);
    assert_eq!(run.coordinator.last().commit.round, Round(0));
    assert!(commands.contains(&Command::Persist(Record::RolledBack { to: Round(0) })));
    assert_eq!(plan_for(&commands, 0).map(|plan| plan.round), Some(Round(1)));
    run.coordinator.ledger().audit().unwrap();
}

#[test]
fn a_site_that_was_away_brings_the_last_state_back() {
    let mut run = behind_by_a_commit();
    run.leave(1);
    run.seconds(7);
    run.ready(0, 0, INITIAL, 1);
    let commands = run.join(1, 1, AFTER_ONE);
    assert_eq!(run.coordinator.last().commit.round, Round(1));
    let fetches = |command: &Command| matches!(command, Command::Send(SiteId(0), Directive::FetchState { .. }));
    assert!(commands.iter().any(fetches), "{commands:?}");
    assert_eq!(plan_for(&commands, 1).map(|plan| plan.round), Some(Round(2)));
}

#[test]
fn a_site_that_stays_away_is_waited_for_ten_minutes() {
    let mut run = behind_by_a_commit();
    run.leave(1);
    run.seconds(7);
    run.ready(0, 0, INITIAL, 1);
    run.seconds(600);
    assert_eq!(run.coordinator.last().commit.round, Round(1));
    run.seconds(1);
    assert_eq!(run.coordinator.last().commit.round, Round(0));
}

#[test]
fn a_clock_that_jumps_undoes_no_commit() {
    let mut run = behind_by_a_commit();
    run.leave(1);
    run.now += 4_000.0;
    assert!(!is_recalled(&run.seconds(1), 0));
}

#[test]
fn what_a_site_said_before_it_followed_a_recall_does_not_count() {
    let mut run = behind_by_a_commit();
    run.leave(1);
    run.seconds(7);
    run.ready(0, 0, INITIAL, 0);
    run.join(1, 0, INITIAL);
    assert_eq!(run.coordinator.last().commit.round, Round(1), "site 0 has not answered");
    run.ready(0, 1, AFTER_ONE, 1);
    assert_eq!(run.coordinator.last().commit.round, Round(1), "it had merged round 1 before it answered");
}

#[test]
fn a_site_that_says_nothing_after_its_line_was_broken_is_asked() {
    let (mut run, _) = Run::begun();
    run.leave(1);
    run.connect(1);
    // `deadline_seconds`: the deltas of what was committed may still be on their way to it.
    assert!(!is_recalled(&run.seconds(60), 1));
    assert!(is_recalled(&run.seconds(1), 1));
    assert!(!is_recalled(&run.seconds(200), 1), "once");
}

#[test]
fn an_answer_to_a_plan_that_was_withdrawn_is_ignored() {
    let (mut run, first) = Run::begun();
    // Two more sites follow round 1, of which they have no part; then its workers leave.
    run.join(2, 0, INITIAL);
    run.join(3, 0, INITIAL);
    run.leave(0);
    let commands = run.leave(1);
    let second = plan_for(&commands, 2).unwrap();
    assert_eq!((second.round, second.term), (first.round, first.term));
    assert!(second.attempt > first.attempt);
    // What it says of the first plan does not count, and is no reason to drop it.
    let lie = Contribution { tokens: 1, ..run.contribution(2, &second) };
    let stale =
        Report::Computed { round: first.round, attempt: first.attempt, contribution: lie, slice_hashes: vec![] };
    let commands = run.tell(Event::Reported(SiteId(2), stale));
    let ignored = Note::Outdated { site: SiteId(2), round: first.round, attempt: first.attempt };
    assert_eq!(commands, [Command::Note(ignored)]);
    let computed = |command: &Command| matches!(command, Command::Note(Note::Computed { site: SiteId(2), .. }));
    assert!(run.compute(2, &second).iter().any(computed), "what it says of the present one does");
}

#[test]
fn a_coordinator_started_again_after_the_last_round_waits_for_nobody() {
    let settings = Settings { steps_total: 0, ..settings() };
    let (coordinator, _) = Coordinator::recover(settings.clone(), INITIAL, []);
    let mut run = Run { coordinator, settings, now: 1.0 };
    assert!(!run.seconds(60).contains(&Command::Done), "a site that has not been told so may call");
    assert!(run.seconds(1).contains(&Command::Done));
}

#[test]
fn who_missed_the_end_is_told_when_those_with_the_last_state_were_told_before() {
    let settings = Settings { steps_total: 4, ..settings() };
    let (coordinator, _) = Coordinator::recover(settings.clone(), INITIAL, []);
    let mut run = Run { coordinator, settings: settings.clone(), now: 1.0 };
    run.join(0, 0, INITIAL);
    let plan = plan_for(&run.join(1, 0, INITIAL), 1).unwrap();
    run.leave(0);
    let mut commands = run.compute(1, &plan);
    let applied = Report::Applied { round: Round(1), state_hash: AFTER_ONE };
    commands.extend(run.tell(Event::Reported(SiteId(1), applied)));
    let persisted = |command: &Command| match command {
        Command::Persist(record) => Some(record.clone()),
        _ => None,
    };
    let records: Vec<Record> = commands.iter().filter_map(persisted).collect();
    assert_eq!(records.last(), Some(&Record::Over { round: Round(1) }));
    let place = |wanted: fn(&Command) -> bool| commands.iter().position(wanted).unwrap();
    let logged = place(|command| matches!(command, Command::Persist(Record::Over { .. })));
    assert!(logged < place(|command| matches!(command, Command::Send(_, Directive::Finish { .. }))), "first the log");

    let again = |records: &[Record]| {
        let (coordinator, _) = Coordinator::recover(settings.clone(), INITIAL, records.iter().cloned());
        let mut run = Run { coordinator, settings: settings.clone(), now: 1.0 };
        run.join(0, 0, INITIAL);
        run
    };
    let mut told = again(&records);
    assert!(!told.seconds(60).contains(&Command::Done), "who has the last state may call");
    let end = told.seconds(1);
    let finished = Directive::Dropped { reason: LeaveReason::Finished };
    assert!(end.contains(&Command::Send(SiteId(0), finished)) && end.contains(&Command::Done), "{end:?}");
    assert_eq!(told.coordinator.last().commit.round, Round(1), "what the others have saved stays the end");
    let mut untold = again(&records[..records.len() - 1]);
    assert!(!untold.seconds(300).contains(&Command::Done), "the last state may be with a machine that starts again");
}

/// The hash of the state after a round.
fn state_after(round: Round) -> ContentHash {
    ContentHash::of(&round.0.to_le_bytes())
}

/// Site 1 alone does rounds from `plan` on until that one is committed; gives all that was said.
fn alone_through(run: &mut Run, plan: &mut Option<RoundPlan>, round: u64) -> Vec<Command> {
    let mut said = Vec::new();
    while let Some(planned) = plan.take_if(|plan| plan.round <= Round(round)) {
        let mut commands = run.compute(1, &planned);
        let applied = Report::Applied { round: planned.round, state_hash: state_after(planned.round) };
        commands.extend(run.tell(Event::Reported(SiteId(1), applied)));
        *plan = plan_for(&commands, 1);
        said.extend(commands);
    }
    assert_eq!(run.coordinator.last().commit.round, Round(round));
    said
}

fn fetched_by(commands: &[Command], site: u32) -> Option<Round> {
    commands.iter().find_map(|command| match command {
        Command::Send(to, Directive::FetchState { commit, .. }) if *to == SiteId(site) => Some(commit.round),
        _ => None,
    })
}

/// Site 0 has fetched the state after round 3 when the log is at round 9; round 10 is open, and site 1 works at it.
fn with_a_fetch_in_vain() -> (Run, Option<RoundPlan>) {
    let (mut run, first) = Run::begun();
    run.leave(0);
    let mut plan = Some(first);
    alone_through(&mut run, &mut plan, 3);
    assert_eq!(fetched_by(&run.join(0, 0, INITIAL), 0), Some(Round(3)));
    run.seconds(5);
    alone_through(&mut run, &mut plan, 9);
    assert!(plan.is_some(), "nobody waits for a site that fetches for the first time");
    let commands = run.ready(0, 3, state_after(Round(3)), 0);
    assert_eq!(fetched_by(&commands, 0), None, "a state that will not be the last for long is not fetched");
    (run, plan)
}

#[test]
fn a_newcomer_that_has_fetched_a_state_in_vain_is_waited_for() {
    let (mut run, mut plan) = with_a_fetch_in_vain();
    let said = alone_through(&mut run, &mut plan, 10);
    assert_eq!((fetched_by(&said, 0), plan), (Some(Round(10)), None), "the last state, and no round is planned");
    run.seconds(14);
    let commands = run.ready(0, 10, state_after(Round(10)), 0);
    assert!(plan_for(&commands, 0).is_some_and(|plan| plan.round == Round(11)), "it has a part in the next round");
}

#[test]
fn nobody_waits_for_a_newcomer_that_has_left_or_takes_twice_as_long_as_before() {
    let (mut run, mut plan) = with_a_fetch_in_vain();
    alone_through(&mut run, &mut plan, 10);
    let commands = run.leave(0);
    assert!(plan_for(&commands, 1).is_some(), "it has left");

    let (mut run, mut plan) = with_a_fetch_in_vain();
    alone_through(&mut run, &mut plan, 10);
    // 2 x 5 s, and 6 s for words.
    assert_eq!(plan_for(&run.seconds(15), 1), None);
    assert!(plan_for(&run.seconds(1), 1).is_some(), "it takes too long");
}
