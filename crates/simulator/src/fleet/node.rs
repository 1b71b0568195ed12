//! One site: its engine, its host and what it holds, as lengths of time.
//!
//! The engine does its work in order, as the member's commands come: inner steps at the site's speed, then a snapshot. The host encodes and
//! merges, one thing after the other. A process that ends loses all of it but the checkpoint.

use super::clock::{Clock, Doing};
use base::random::mix64;
use base::{ContentHash, Round, SiteId, Term};
use rounds::{Commit, Contribution, Member, RoundPlan};
use std::collections::{BTreeSet, VecDeque};

/// Work of the engine.
#[derive(Debug, Clone)]
pub(super) enum Work {
    /// Inner steps on so many tokens.
    Train(f64),
    /// A validation, which takes as long as inner steps on so many tokens.
    Evaluate(f64),
    /// A snapshot of that plan's fragment.
    Snapshot(Box<RoundPlan>),
}

/// Inner steps that are being made, or a validation.
#[derive(Debug, Clone, Copy)]
struct Training {
    tokens_left: f64,
    since: f64,
    is_validation: bool,
}

/// What the engine has come to.
#[derive(Debug)]
pub(super) enum Next {
    /// It trains until then; which training that is.
    Trains { until: f64, number: u64 },
    /// A snapshot was taken after so many seconds of inner steps.
    Taken { plan: Box<RoundPlan>, compute_seconds: f64 },
    /// Nothing is left to do.
    Idle,
}

/// A site.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) site: SiteId,
    /// How many processes it has had: what was meant for an earlier one is lost.
    pub(super) process: u64,
    /// None while no process runs.
    pub(super) member: Option<Member>,
    /// The newest coordinator's term that is on its disk.
    pub(super) term: Term,
    /// The state in memory, and the one in the newest checkpoint.
    pub(super) held: (Round, ContentHash),
    pub(super) saved: (Round, ContentHash),
    /// Deltas, slices and parts that others can fetch.
    pub(super) shelf: BTreeSet<(Round, ContentHash)>,
    pub(super) clock: Clock,
    /// Snapshots before that many abandonings are void, and merges before that many states fetched.
    pub(super) abandoned: u64,
    pub(super) states: u64,
    /// Part of its full speed that it has.
    pub(super) speed: f64,
    full_tokens_per_second: f64,
    engine: VecDeque<Work>,
    training: Option<Training>,
    trainings: u64,
    compute_seconds: f64,
    host_free: f64,
}

impl Node {
    pub(super) fn new(site: SiteId, tokens_per_second: f64, initial: ContentHash) -> Self {
        let state = (Round(0), initial);
        Self {
            site,
            process: 0,
            member: None,
            term: Term(0),
            held: state,
            saved: state,
            shelf: BTreeSet::new(),
            clock: Clock::new(),
            abandoned: 0,
            states: 0,
            speed: 1.0,
            full_tokens_per_second: tokens_per_second,
            engine: VecDeque::new(),
            training: None,
            trainings: 0,
            compute_seconds: 0.0,
            host_free: 0.0,
        }
    }

    /// A process starts on the checkpoint.
    pub(super) fn start(&mut self, now: f64) {
        self.clock.turn(Doing::Joining, self.speed, now);
        self.held = self.saved;
        let tokens_per_second = self.full_tokens_per_second * self.speed;
        let member = Member::new(self.site, self.held.0, self.held.1, tokens_per_second);
        self.member = Some(member.after_term(self.term));
    }

    /// The process ends, for that reason.
    pub(super) fn end(&mut self, doing: Doing, now: f64) {
        self.clock.turn(doing, self.speed, now);
        self.member = None;
        self.process += 1;
        self.abandon();
        self.shelf.clear();
        self.host_free = now;
    }

    /// The engine forgets what it has not done.
    pub(super) fn abandon(&mut self) {
        self.engine.clear();
        (self.training, self.compute_seconds) = (None, 0.0);
        (self.abandoned, self.trainings) = (self.abandoned + 1, self.trainings + 1);
    }

    pub(super) fn push(&mut self, work: Work) {
        self.engine.push_back(work);
    }

    /// The engine goes on, unless it is in the midst of something.
    pub(super) fn go_on(&mut self, now: f64) -> Option<Next> {
        if self.training.is_some() {
            return None;
        }
        Some(match self.engine.pop_front() {
            Some(Work::Train(tokens_left)) => {
                self.clock.turn(Doing::Training, self.speed, now);
                self.train(Training { tokens_left, since: now, is_validation: false })
            }
            Some(Work::Evaluate(tokens_left)) => {
                self.clock.turn(Doing::Waiting, self.speed, now);
                self.train(Training { tokens_left, since: now, is_validation: true })
            }
            Some(Work::Snapshot(plan)) => {
                Next::Taken { plan, compute_seconds: std::mem::take(&mut self.compute_seconds) }
            }
            None => {
                if self.clock.doing() == Doing::Training {
                    self.clock.turn(Doing::Waiting, self.speed, now);
                }
                Next::Idle
            }
        })
    }

    fn train(&mut self, training: Training) -> Next {
        self.training = Some(training);
        self.trainings += 1;
        let seconds = training.tokens_left / (self.full_tokens_per_second * self.speed);
        Next::Trains { until: training.since + seconds, number: self.trainings }
    }

    /// The end of a training has come; false where it does not count any more.
    pub(super) fn trained(&mut self, number: u64, now: f64) -> bool {
        if number != self.trainings {
            return false;
        }
        if let Some(training) = self.training.take().filter(|training| !training.is_validation) {
            self.compute_seconds += now - training.since;
        }
        true
    }

    /// Its speed changes.
    pub(super) fn set_speed(&mut self, speed: f64, now: f64) -> Option<Next> {
        let doing = self.clock.doing();
        self.clock.turn(doing, self.speed, now);
        let before = std::mem::replace(&mut self.speed, speed);
        let training = self.training.take()?;
        let seconds = now - training.since;
        self.compute_seconds += if training.is_validation { 0.0 } else { seconds };
        let tokens_left = (training.tokens_left - seconds * self.full_tokens_per_second * before).max(0.0);
        Some(self.train(Training { tokens_left, since: now, ..training }))
    }

    /// The host does something that takes so long, after all that it has to do before; when it is done.
    pub(super) fn host(&mut self, seconds: f64, now: f64) -> f64 {
        self.host_free = self.host_free.max(now) + seconds;
        self.host_free
    }

    /// What this site gives for a round, and the hashes of its slices.
    pub(super) fn contribution(
        &self,
        plan: &RoundPlan,
        sequence_length: u64,
        delta_bytes: u64,
        compute_seconds: f64,
    ) -> (Contribution, Vec<ContentHash>) {
        let assigned = plan.assignments.iter().find(|assignment| assignment.site == self.site);
        let tokens = assigned.map_or(0, |assignment| assignment.samples * sequence_length);
        let delta_hash = self.hash(plan, 0);
        let slices = (1..=plan.parts.len() as u64).map(|index| self.hash(plan, index)).collect();
        (Contribution { tokens, delta_hash, delta_bytes, loss_nats: 1.0, compute_seconds }, slices)
    }

    /// Stands for the hash of what this process makes for a plan: number 0 is its delta, others are slices and its merged part.
    pub(super) fn hash(&self, plan: &RoundPlan, number: u64) -> ContentHash {
        let words = [plan.round.0, u64::from(plan.attempt) << 32 | u64::from(self.site.0), self.process, number];
        let mut bytes = [0; 32];
        let mut mixed = 0;
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            mixed = mix64(mixed ^ mix64(word));
            place.copy_from_slice(&mixed.to_le_bytes());
        }
        ContentHash(bytes)
    }

    /// Forgets what nobody can ask for any more.
    pub(super) fn forget_before(&mut self, round: Round) {
        self.shelf = self.shelf.split_off(&(round, ContentHash([0; 32])));
    }
}

/// Stands for the hash of the state after a commit: it depends on the state before and on what was merged.
pub(super) fn state_after(before: ContentHash, commit: &Commit) -> ContentHash {
    let mut hasher = ContentHash::hasher();
    hasher.update(&before.0);
    hasher.update(&commit.term.0.to_le_bytes());
    hasher.update(&commit.round.0.to_le_bytes());
    for contributor in &commit.contributors {
        hasher.update(&contributor.delta_hash.0);
        hasher.update(&contributor.tokens.to_le_bytes());
    }
    ContentHash::finish(&hasher)
}
