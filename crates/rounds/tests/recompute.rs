//! A site whose step came out otherwise when it was made again: what becomes of its delta, of its samples, and of itself.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use base::config::SyncSection;
use base::{ContentHash, ParameterSchema, Round, SiteId, Term};
use rounds::coordinator::Note;
use rounds::digest::TensorDigest;
use rounds::plan::{Contribution, Directive, LeaveReason, Peer, Report, RoundPlan};
use rounds::{
    Command, Coordinator, DigestBounds, Event, GradientDigest, Member, MemberCommand, MemberEvent, SampleRange,
    Settings, SiteDevice, StepMismatch, StepQuantity, StepVerdict,
};

const HASH: ContentHash = ContentHash([7; 32]);

struct Run {
    coordinator: Coordinator,
    settings: Settings,
}

impl Run {
    /// Two sites that have begun with round 1, in which a step is made twice; gives its plan.
    fn begun() -> (Self, RoundPlan) {
        Self::begun_with(0.0)
    }

    fn begun_with(witness_share: f64) -> (Self, RoundPlan) {
        let settings = Settings {
            sites: 2,
            batch_samples: 8,
            sequence_length: 16,
            steps_per_round: 4,
            steps_total: 400,
            seed: 3,
            sync: SyncSection { inner_steps: 4, recompute_share: 1.0, witness_share, ..SyncSection::default() },
            schema: ParameterSchema::new([("weight".to_owned(), vec![4])]),
        };
        let (coordinator, _) = Coordinator::recover(settings.clone(), HASH, []);
        let mut run = Self { coordinator, settings };
        run.join(0);
        let plan = plan_for(&run.join(1), 1).unwrap();
        (run, plan)
    }

    fn tell(&mut self, site: u32, report: Report) -> Vec<Command> {
        self.coordinator.handle(Event::Reported(SiteId(site), report), 1.0)
    }

    fn join(&mut self, site: u32) -> Vec<Command> {
        let id = SiteId(site);
        let peer = Peer { site: id, name: format!("site-{site}"), address: "host:1".to_owned(), fingerprint: HASH };
        self.coordinator.handle(Event::Connected(peer), 1.0);
        let (engine, precision) = (format!("wgpu:{site}"), "f32".to_owned());
        self.tell(site, Report::Device(SiteDevice { engine, precision, ..SiteDevice::default() }));
        self.ready(site, 0)
    }

    fn ready(&mut self, site: u32, recall: u32) -> Vec<Command> {
        self.tell(site, Report::Ready { round: Round(0), state_hash: HASH, tokens_per_second: 100.0, recall })
    }

    fn compute(&mut self, site: u32, plan: &RoundPlan) -> Vec<Command> {
        let samples = plan.assignments.iter().find(|one| one.site == SiteId(site)).unwrap().samples;
        let contribution = Contribution {
            tokens: samples * self.settings.sequence_length,
            delta_hash: HASH,
            delta_bytes: self.settings.delta_bytes(plan.fragment),
            loss_nats: 1.0,
            compute_seconds: 1.0,
        };
        let (round, attempt, slice_hashes) = (plan.round, plan.attempt, Vec::new());
        self.tell(site, Report::Computed { round, attempt, contribution, slice_hashes })
    }

    /// Both deliver and hold everything; gives what is said when the round closes.
    fn close(&mut self, plan: &RoundPlan) -> Vec<Command> {
        let (round, attempt) = (plan.round, plan.attempt);
        [0, 1].into_iter().for_each(|site| drop(self.compute(site, plan)));
        self.tell(0, Report::Holds { round, attempt, from: SiteId(1) });
        self.tell(1, Report::Holds { round, attempt, from: SiteId(0) })
    }

    fn witnessed(&mut self, site: u32, round: Round, norm: f64) -> Vec<Command> {
        let tensors = vec![TensorDigest { norm, projections: [norm; 4] }];
        let digest = GradientDigest { loss_nats: 1.0, tensors };
        let bounds = DigestBounds { loss: 1e-5, gradient: 1e-4 };
        self.tell(site, Report::Witnessed { round, state_hash: HASH, digest, bounds })
    }

    fn recomputed(&mut self, site: u32, plan: &RoundPlan, mismatch: Option<StepMismatch>) -> Vec<Command> {
        let verdict = StepVerdict { step: plan.first_step + 1, seconds: 0.1, mismatch };
        self.tell(site, Report::Recomputed { round: plan.round, attempt: plan.attempt, verdict })
    }
}

fn wrong() -> Option<StepMismatch> {
    Some(StepMismatch { quantity: StepQuantity::Movement, difference: 0.5, bound: 0.0 })
}

fn plan_for(commands: &[Command], site: u32) -> Option<RoundPlan> {
    commands.iter().find_map(|command| match command {
        Command::Send(to, Directive::Begin(plan)) if *to == SiteId(site) => Some(RoundPlan::clone(plan)),
        _ => None,
    })
}

fn recall_of(commands: &[Command], site: u32) -> Option<u32> {
    commands.iter().find_map(|command| match command {
        Command::Send(to, Directive::Recall { number }) if *to == SiteId(site) => Some(*number),
        _ => None,
    })
}

fn contributors(commands: &[Command]) -> Option<Vec<u32>> {
    commands.iter().find_map(|command| match command {
        Command::Note(Note::Committed { commit, .. }) => {
            Some(commit.contributors.iter().map(|one| one.site.0).collect())
        }
        _ => None,
    })
}

/// Who makes a step of the plan twice, and who does not.
fn checked(plan: &RoundPlan) -> (u32, u32) {
    let site = plan.check.unwrap().site.0;
    (site, 1 - site)
}

#[test]
fn its_delta_is_left_out_its_samples_return_and_it_begins_anew() {
    let (mut run, plan) = Run::begun();
    let (site, other) = checked(&plan);
    let commands = run.recomputed(site, &plan, wrong());
    let told = commands.iter().any(|command| matches!(command, Command::Note(Note::StepRecomputed { .. })));
    assert!(told && recall_of(&commands, site) == Some(1), "{commands:?}");
    // What it might still say of that round does not count, and nobody waits for it.
    assert!(contributors(&run.compute(site, &plan)).is_none());
    let commands = run.compute(other, &plan);
    assert_eq!(contributors(&commands), Some(vec![other]));
    let totals = run.coordinator.ledger().totals();
    assert_eq!((totals.committed, totals.returned), (16, 16));
    // It holds a good state, and has work again as soon as that is known.
    let commands = run.ready(site, 1);
    assert!(commands.iter().any(|command| matches!(command, Command::Send(_, Directive::Commit(_)))), "{commands:?}");
    run.coordinator.ledger().audit().unwrap();
}

#[test]
fn a_delta_that_all_hold_already_is_left_out_as_well() {
    let (mut run, plan) = Run::begun();
    let (site, other) = checked(&plan);
    run.compute(site, &plan);
    let (round, attempt) = (plan.round, plan.attempt);
    run.tell(other, Report::Holds { round, attempt, from: SiteId(site) });
    run.recomputed(site, &plan, wrong());
    assert_eq!(contributors(&run.compute(other, &plan)), Some(vec![other]));
}

#[test]
fn a_step_that_agrees_changes_nothing_and_one_that_nobody_asked_for_is_ignored() {
    let (mut run, plan) = Run::begun();
    let (site, other) = checked(&plan);
    assert!(run.recomputed(other, &plan, wrong()).is_empty());
    let commands = run.recomputed(site, &plan, None);
    assert!(matches!(&commands[..], [Command::Note(Note::StepRecomputed { .. })]), "{commands:?}");
    assert!(run.recomputed(site, &plan, wrong()).is_empty(), "once");
}

#[test]
fn a_verdict_that_makes_no_sense_ends_the_part_of_who_sent_it() {
    let (mut run, plan) = Run::begun();
    let nonsense = StepMismatch { quantity: StepQuantity::Loss, difference: f64::NAN, bound: 0.0 };
    let commands = run.recomputed(checked(&plan).0, &plan, Some(nonsense));
    let dropped =
        |command: &Command| matches!(command, Command::Send(_, Directive::Dropped { reason: LeaveReason::Misbehaved }));
    assert!(commands.iter().any(dropped), "{commands:?}");
}

#[test]
fn a_member_gives_up_what_it_has_not_encoded_and_merges_what_the_others_commit() {
    let (_, plan) = Run::begun();
    let site = plan.check.unwrap().site;
    let mut member = Member::new(site, Round(0), HASH, 1.0);
    let mut happens = |event| member.handle(event).unwrap();
    happens(MemberEvent::Directive(Directive::Lead { term: Term(1) }));
    let commands = happens(MemberEvent::Directive(Directive::Begin(plan.clone().into())));
    assert!(commands.iter().any(|command| matches!(command, MemberCommand::Train { .. })));
    let verdict = StepVerdict { step: 1, seconds: 0.1, mismatch: wrong() };
    let recomputed = MemberEvent::Recomputed { round: plan.round, attempt: plan.attempt, verdict };
    let commands = happens(recomputed);
    assert!(matches!(&commands[..], [MemberCommand::Report(Report::Recomputed { .. })]), "{commands:?}");
    // The snapshot that was asked for will never come: the commit must not wait for it.
    let (term, round, fragment) = (plan.term, plan.round, plan.fragment);
    let other = rounds::Contributor { site: SiteId(1 - site.0), tokens: 1, delta_hash: HASH, delta_bytes: 16 };
    let commit = rounds::Commit { term, round, fragment, contributors: vec![other], ..rounds::Commit::initial() };
    happens(MemberEvent::Directive(Directive::Commit(commit.into())));
    let commands = happens(MemberEvent::DeltaHeld { round, from: other.site });
    assert!(commands.iter().any(|command| matches!(command, MemberCommand::Merge(_))), "{commands:?}");
}

/// Who is asked for a gradient, in which round, of which samples.
fn asked(commands: &[Command]) -> Vec<(u32, Round, Vec<SampleRange>)> {
    let asked = commands.iter().filter_map(|command| match command {
        Command::Send(site, Directive::Witness { round, samples }) => Some((site.0, *round, samples.clone())),
        _ => None,
    });
    asked.collect()
}

#[test]
fn another_site_with_the_same_engine_recomputes_the_step_after_the_commit() {
    let (mut run, plan) = Run::begun_with(1.0);
    let (site, other) = checked(&plan);
    run.recomputed(site, &plan, None);
    let commands = run.close(&plan);
    let place = |wanted: &dyn Fn(&Directive) -> bool| {
        commands.iter().position(|command| matches!(command, Command::Send(_, directive) if wanted(directive))).unwrap()
    };
    let question = place(&|directive| matches!(directive, Directive::Witness { .. }));
    assert!(question < place(&|directive| matches!(directive, Directive::Commit(_))), "asked for before it is merged");
    let asked = asked(&commands);
    assert_eq!(
        asked.iter().map(|(site, round, _)| (*site, *round)).collect::<Vec<_>>(),
        [(site, plan.round), (other, plan.round)]
    );
    let assignment = plan.assignments.iter().find(|one| one.site == SiteId(site)).unwrap();
    assert_eq!(asked[0].2, assignment.step_lease(plan.check.unwrap().step));
    assert!(run.witnessed(other, plan.round, 1.0).is_empty());
    let commands = run.witnessed(site, plan.round, 1.00001);
    let agree = |command: &Command| matches!(command, Command::Note(Note::StepRecomputed { by: Some(_), verdict, .. }) if verdict.mismatch.is_none());
    assert!(commands.iter().any(agree), "{commands:?}");
    assert!(run.witnessed(site, plan.round, 9.0).is_empty(), "nobody asks any more");
}

#[test]
fn a_site_that_a_witness_contradicts_begins_anew_and_stays() {
    let (mut run, plan) = Run::begun_with(1.0);
    let (site, other) = checked(&plan);
    run.close(&plan);
    run.witnessed(site, plan.round, 1.5);
    let commands = run.witnessed(other, plan.round, 1.0);
    let named = |command: &Command| match command {
        Command::Note(Note::StepRecomputed { site: accused, engine, by, verdict, .. }) => {
            *accused == SiteId(site)
                && *by == Some(SiteId(other))
                && *engine == format!("wgpu:{site}")
                && verdict.mismatch.is_some_and(|mismatch| mismatch.quantity == StepQuantity::Gradient)
        }
        _ => false,
    };
    assert!(commands.iter().any(named), "{commands:?}");
    assert_eq!(recall_of(&commands, site), Some(1));
    run.coordinator.ledger().audit().unwrap();
}

#[test]
fn a_gradient_of_another_model_ends_the_part_of_who_sent_it() {
    let (mut run, plan) = Run::begun_with(1.0);
    run.close(&plan);
    let bounds = DigestBounds { loss: 1e-5, gradient: 1e-4 };
    let answer = Report::Witnessed { round: plan.round, state_hash: HASH, digest: GradientDigest::default(), bounds };
    let commands = run.tell(0, answer);
    let dropped =
        |command: &Command| matches!(command, Command::Send(_, Directive::Dropped { reason: LeaveReason::Misbehaved }));
    assert!(commands.iter().any(dropped), "{commands:?}");
}

#[test]
fn the_samples_of_a_step_are_its_part_of_the_lease() {
    let range = |start, end| SampleRange { start, end };
    let lease = vec![range(3, 5), range(10, 11), range(20, 27)];
    let assignment = rounds::Assignment { site: SiteId(0), samples: 10, steps: 4, lease, share: 1.0 };
    let positions = |ranges: &[SampleRange]| ranges.iter().flat_map(|range| range.start..range.end).collect::<Vec<_>>();
    let mut all = Vec::new();
    for step in 0..4 {
        let lease = assignment.step_lease(step);
        assert_eq!(positions(&lease).len() as u64, assignment.step_samples(step));
        all.extend(positions(&lease));
    }
    assert_eq!(all, positions(&assignment.lease));
}
