//! Shares follow the speed of the sites from one round to the next: a coordinator and sites whose speed the test sets.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use base::config::SyncSection;
use base::random::Random;
use base::{ContentHash, ParameterSchema, Round, SiteId};
use rounds::coordinator::Note;
use rounds::plan::{Contribution, Directive, Peer, Report};
use rounds::{Command, Coordinator, Event, RoundPlan, Settings};
use std::sync::Arc;

const SEQUENCE_LENGTH: u64 = 16;
const STEPS: u64 = 20;
const BATCH_SAMPLES: u64 = 8;
const STATE: ContentHash = ContentHash([7; 32]);

/// Sites in lockstep, each working at the tokens a second that the test says.
struct Lockstep {
    coordinator: Coordinator,
    sites: u32,
    plan: Option<RoundPlan>,
    moves: usize,
}

impl Lockstep {
    fn new(measured_at_join: &[f64]) -> Self {
        let settings = Settings {
            sites: measured_at_join.len() as u32,
            batch_samples: BATCH_SAMPLES,
            sequence_length: SEQUENCE_LENGTH,
            steps_per_round: STEPS,
            steps_total: STEPS * 1_000,
            seed: 0,
            sync: SyncSection { inner_steps: STEPS, ..SyncSection::default() },
            schema: ParameterSchema::new([("weight".to_owned(), vec![1])]),
        };
        let (coordinator, _) = Coordinator::recover(settings, STATE, []);
        let mut lockstep = Self { coordinator, sites: measured_at_join.len() as u32, plan: None, moves: 0 };
        for (site, tokens_per_second) in (0..).map(SiteId).zip(measured_at_join.iter().copied()) {
            let peer = Peer { site, name: site.to_string(), address: "localhost:1".to_owned(), fingerprint: STATE };
            lockstep.tell(Event::Connected(peer));
            let ready = Report::Ready { round: Round(0), state_hash: STATE, tokens_per_second, recall: 0 };
            lockstep.tell(Event::Reported(site, ready));
        }
        // The first division counts as none.
        lockstep.moves = 0;
        lockstep
    }

    fn tell(&mut self, event: Event) {
        for command in self.coordinator.handle(event, 0.0) {
            match command {
                Command::Send(_, Directive::Begin(plan)) => self.plan = Some(Arc::unwrap_or_clone(plan)),
                Command::Send(_, Directive::Dropped { reason }) => panic!("{reason:?}"),
                Command::Note(Note::SharesMoved { .. }) => self.moves += 1,
                _ => {}
            }
        }
    }

    /// One round at these tokens a second. Gives the samples that each site had in it.
    fn round(&mut self, tokens_per_second: &[f64]) -> Vec<u64> {
        let plan = self.plan.take().unwrap();
        let working: Vec<SiteId> = plan.assignments.iter().map(|assignment| assignment.site).collect();
        for assignment in &plan.assignments {
            let tokens = assignment.samples * SEQUENCE_LENGTH;
            let contribution = Contribution {
                tokens,
                delta_hash: STATE,
                delta_bytes: 4,
                loss_nats: 1.0,
                compute_seconds: tokens as f64 / tokens_per_second[assignment.site.0 as usize],
            };
            self.tell(Event::Reported(
                assignment.site,
                Report::Computed { round: plan.round, attempt: plan.attempt, contribution, slice_hashes: Vec::new() },
            ));
        }
        for site in (0..self.sites).map(SiteId) {
            for from in &working {
                self.tell(Event::Reported(
                    site,
                    Report::Holds { round: plan.round, attempt: plan.attempt, from: *from },
                ));
            }
        }
        for site in (0..self.sites).map(SiteId) {
            self.tell(Event::Reported(site, Report::Applied { round: plan.round, state_hash: STATE }));
        }
        self.samples_of(&plan)
    }

    fn samples_of(&self, plan: &RoundPlan) -> Vec<u64> {
        let of = |site| plan.assignments.iter().find(|a| a.site == site).map_or(0, |assignment| assignment.samples);
        (0..self.sites).map(|site| of(SiteId(site))).collect()
    }

    fn planned(&self) -> Vec<u64> {
        self.samples_of(self.plan.as_ref().unwrap())
    }
}

#[test]
fn a_throttled_site_has_less_work_in_the_very_next_round_and_more_again_when_it_recovers() {
    let mut sites = Lockstep::new(&[300.0, 100.0]);
    (0..5).for_each(|_| assert_eq!(sites.round(&[300.0, 100.0]), [120, 40]));
    assert_eq!(sites.round(&[150.0, 100.0]), [120, 40], "nobody knew before the round");
    assert_eq!((sites.planned(), sites.moves), (vec![96, 64], 1));
    assert_eq!(sites.round(&[150.0, 100.0]), [96, 64]);
    (0..5).for_each(|_| assert_eq!(sites.round(&[150.0, 100.0]), [96, 64]));
    sites.round(&[300.0, 100.0]);
    assert_eq!((sites.planned(), sites.moves), (vec![120, 40], 2));
}

#[test]
fn sites_of_1_to_12_are_divided_to_the_sample() {
    let mut sites = Lockstep::new(&[100.0, 1_200.0]);
    for _ in 0..10 {
        let samples = sites.round(&[100.0, 1_200.0]);
        assert_eq!(samples, [12, 148]);
        let seconds: [f64; 2] = [12.0 * 16.0 / 100.0, 148.0 * 16.0 / 1_200.0];
        let ideal = 160.0 * 16.0 / 1_300.0;
        assert!((seconds[0] - ideal).abs() < 16.0 / 100.0 && (seconds[1] - ideal).abs() < 16.0 / 1_200.0);
    }
}

#[test]
fn noise_of_5_percent_moves_nothing_in_50_rounds() {
    for seed in 0..50 {
        let mut random = Random::new(seed, 0);
        let truth = [100.0, 1_200.0, 700.0];
        let mut sites = Lockstep::new(&truth);
        let planned = sites.planned();
        for _ in 0..50 {
            let noisy = truth.map(|speed| speed * (0.95 + 0.1 * random.next_unit()));
            assert_eq!(sites.round(&noisy), planned, "seed {seed}");
        }
        assert_eq!(sites.moves, 0, "seed {seed}");
    }
}

#[test]
fn slow_drift_moves_the_shares_before_they_are_far_off() {
    let mut sites = Lockstep::new(&[100.0, 100.0]);
    // 2 % a round: within the noise each time, 33 % in all.
    for round in 0..20 {
        let speed = 100.0 * 0.98_f64.powi(round);
        sites.round(&[speed, 100.0]);
    }
    assert!(sites.moves >= 1);
    let ideal = 160.0 * 0.98_f64.powi(19) / (1.0 + 0.98_f64.powi(19));
    let found = sites.planned()[0] as f64;
    assert!((found / ideal - 1.0).abs() < 0.15, "{found} samples, not {ideal}");
}

#[test]
fn a_speed_that_is_not_a_number_is_refused() {
    let mut sites = Lockstep::new(&[100.0, 100.0]);
    let plan = sites.plan.clone().unwrap();
    let contribution = Contribution {
        tokens: plan.assignments[0].samples * SEQUENCE_LENGTH,
        delta_hash: STATE,
        delta_bytes: 4,
        loss_nats: 1.0,
        compute_seconds: f64::INFINITY,
    };
    let event = Event::Reported(
        SiteId(0),
        Report::Computed { round: plan.round, attempt: plan.attempt, contribution, slice_hashes: Vec::new() },
    );
    let commands = sites.coordinator.handle(event, 0.0);
    assert!(commands.iter().any(|command| matches!(command, Command::Send(SiteId(0), Directive::Dropped { .. }))));
}

#[test]
fn a_speed_that_no_site_has_is_refused() {
    for tokens_per_second in [f64::MAX, 1e16, 0.0, -1.0, f64::NAN, f64::INFINITY] {
        let refused = std::panic::catch_unwind(|| Lockstep::new(&[tokens_per_second, tokens_per_second]));
        let message = *refused.err().unwrap().downcast::<String>().unwrap();
        assert_eq!(message, "Misbehaved", "{tokens_per_second} tokens a second");
    }
}
