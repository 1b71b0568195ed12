//! What the simulator has found, step by step: sites that come with what nobody has, and sites whose holders leave.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use base::config::SyncSection;
use base::{ContentHash, ParameterSchema, Round, SiteId};
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
            Command::Send(_, Directive::Begin(plan)) => Some(plan.clone()),
            _ => None,
        });
        (run, plan.unwrap())
    }

    fn tell(&mut self, event: Event) -> Vec<Command> {
        self.coordinator.handle(event, self.now)
    }

    fn join(&mut self, site: u32, round: u64, state_hash: ContentHash) -> Vec<Command> {
        let site = SiteId(site);
        let peer = Peer { site, name: format!("site-{site}"), address: "host:1".to_owned(), fingerprint: INITIAL };
        self.tell(Event::Connected(peer));
        let ready = Report::Ready { round: Round(round), state_hash, tokens_per_second: 100.0 };
        self.tell(Event::Reported(site, ready))
    }

    fn leave(&mut self, site: u32) -> Vec<Command> {
        self.tell(Event::Disconnected(SiteId(site), LeaveReason::ConnectionLost))
    }

    /// The site delivers what that plan asks of it.
    fn compute(&mut self, site: u32, plan: &RoundPlan) -> Vec<Command> {
        let site = SiteId(site);
        let samples = plan.assignments.iter().find(|assignment| assignment.site == site).unwrap().samples;
        let contribution = Contribution {
            tokens: samples * self.settings.sequence_length,
            delta_hash: INITIAL,
            delta_bytes: self.settings.delta_bytes(plan.fragment),
            loss_nats: 1.0,
            compute_seconds: 1.0,
        };
        self.tell(Event::Reported(site, Report::Computed { round: plan.round, contribution, slice_hashes: Vec::new() }))
    }
}

fn is_dropped(commands: &[Command], site: u32, why: LeaveReason) -> bool {
    commands.contains(&Command::Send(SiteId(site), Directive::Dropped { reason: why }))
}

#[test]
fn a_site_with_a_round_that_the_log_has_not_got_is_sent_to_fetch_a_state() {
    let (mut run, _) = Run::begun();
    run.leave(1);
    let commands = run.join(1, 9, AFTER_ONE);
    let fetches = |command: &Command| matches!(command, Command::Send(SiteId(1), Directive::FetchState { .. }));
    assert!(commands.iter().any(fetches), "{commands:?}");
}

#[test]
fn a_site_whose_deltas_left_with_their_last_holder_does_not_wait_for_them() {
    let (mut run, plan) = Run::begun();
    run.leave(0);
    run.compute(1, &plan);
    let applied = Report::Applied { round: Round(1), state_hash: AFTER_ONE };
    run.tell(Event::Reported(SiteId(1), applied));
    assert_eq!(run.coordinator.last().commit.round, Round(1));
    // It can follow from round 0: site 1 has what it lacks.
    let commands = run.join(0, 0, INITIAL);
    let catches_up = |command: &Command| matches!(command, Command::Send(SiteId(0), Directive::Commit(_)));
    assert!(commands.iter().any(catches_up), "{commands:?}");
    assert!(!is_dropped(&run.tell(Event::Tick), 0, LeaveReason::DeltasMissing));
    run.leave(1);
    // It may have fetched all of it just before.
    assert!(!is_dropped(&run.tell(Event::Tick), 0, LeaveReason::DeltasMissing));
    run.now += 7.0;
    assert!(is_dropped(&run.tell(Event::Tick), 0, LeaveReason::DeltasMissing));
    // Both come with round 0, and the run goes back to it.
    run.join(0, 0, INITIAL);
    run.join(1, 0, INITIAL);
    assert_eq!(run.coordinator.last().commit.round, Round(0));
    run.coordinator.ledger().audit().unwrap();
}
