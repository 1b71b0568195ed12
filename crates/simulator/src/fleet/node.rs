//! One site: its engine, its host and what it holds, as lengths of time.
//!
//! The engine does its work in order, as the member's commands come: inner steps at the site's speed, then a snapshot. The host encodes and
//! merges, one thing after the other. A process that ends loses all of it but the checkpoint.

use super::clock::{Clock, Doing, Lost, Pace};
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

/// A state that is being fetched, piece by piece from all its holders.
#[derive(Debug, Clone)]
pub(super) struct StateFetch {
    pub(super) state: (Round, ContentHash),
    /// Place and process of each holder.
    pub(super) holders: Vec<(usize, u64)>,
    /// Pieces that nobody was asked for yet, and those that were.
    pub(super) pieces_left: u64,
    pub(super) pieces_coming: u64,
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
    /// The state that is being fetched, and how many were before it.
    pub(super) fetching: Option<StateFetch>,
    pub(super) fetches: u64,
    /// Replicas, how many of them are missing, and what the others have of their speed.
    replicas: f64,
    missing: f64,
    slow: f64,
    /// Restarts that it is in the midst of, and what it did before.
    restarts: u32,
    interrupted: Doing,
    full_tokens_per_second: f64,
    engine: VecDeque<Work>,
    training: Option<Training>,
    trainings: u64,
    compute_seconds: f64,
    host_free: f64,
}

impl Node {
    pub(super) fn new(site: SiteId, (replicas, tokens_per_second): (f64, f64), initial: ContentHash) -> Self {
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
            fetching: None,
            fetches: 0,
            replicas,
            missing: 0.0,
            slow: 1.0,
            restarts: 0,
            interrupted: Doing::Joining,
            full_tokens_per_second: tokens_per_second,
            engine: VecDeque::new(),
            training: None,
            trainings: 0,
            compute_seconds: 0.0,
            host_free: 0.0,
        }
    }

    pub(super) fn pace(&self) -> Pace {
        Pace { there: 1.0 - self.missing / self.replicas, slow: self.slow }
    }

    fn turn(&mut self, doing: Doing, now: f64) {
        self.clock.turn(doing, self.pace(), now);
    }

    /// Its time up to now, in tokens.
    pub(super) fn tokens(&mut self, now: f64) -> (f64, Lost) {
        self.turn(self.clock.doing(), now);
        self.clock.tokens(self.full_tokens_per_second)
    }

    /// A process starts on the checkpoint.
    pub(super) fn start(&mut self, now: f64) {
        self.turn(Doing::Joining, now);
        self.held = self.saved;
        let tokens_per_second = self.full_tokens_per_second * self.pace().speed();
        let member = Member::new(self.site, self.held.0, self.held.1, tokens_per_second);
        self.member = Some(member.after_term(self.term));
    }

    /// The process ends, for that reason. The next one has all replicas.
    pub(super) fn end(&mut self, doing: Doing, now: f64) {
        self.turn(doing, now);
        (self.missing, self.restarts, self.fetching) = (0.0, 0, None);
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
        if self.training.is_some() || self.restarts > 0 {
            return None;
        }
        Some(match self.engine.pop_front() {
            Some(Work::Train(tokens_left)) => {
                self.turn(Doing::Training, now);
                self.train(Training { tokens_left, since: now, is_validation: false })
            }
            Some(Work::Evaluate(tokens_left)) => {
                self.turn(Doing::Waiting, now);
                self.train(Training { tokens_left, since: now, is_validation: true })
            }
            Some(Work::Snapshot(plan)) => {
                Next::Taken { plan, compute_seconds: std::mem::take(&mut self.compute_seconds) }
            }
            None => {
                if self.clock.doing() == Doing::Training {
                    self.turn(Doing::Waiting, now);
                }
                Next::Idle
            }
        })
    }

    fn train(&mut self, training: Training) -> Next {
        self.training = Some(training);
        self.trainings += 1;
        let seconds = training.tokens_left / (self.full_tokens_per_second * self.pace().speed());
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

    pub(super) fn is_slow(&self) -> bool {
        self.slow < 1.0
    }

    /// What its replicas have of their speed changes.
    pub(super) fn set_slow(&mut self, slow: f64, now: f64) -> Option<Next> {
        self.settle(now);
        self.slow = slow;
        self.train_on(now)
    }

    /// A replica fails while others are there: they stop to restart. False where it was the last one.
    pub(super) fn lose_replica(&mut self, now: f64) -> bool {
        if self.missing + 1.0 >= self.replicas {
            return false;
        }
        self.settle(now);
        if self.restarts == 0 {
            self.interrupted = self.clock.doing();
            self.turn(Doing::Failed, now);
        }
        (self.missing, self.restarts) = (self.missing + 1.0, self.restarts + 1);
        true
    }

    /// A restart is over.
    pub(super) fn restarted(&mut self, now: f64) -> Option<Next> {
        self.restarts -= 1;
        if self.restarts > 0 {
            return None;
        }
        self.turn(self.interrupted, now);
        if let Some(training) = &mut self.training {
            training.since = now;
        }
        self.train_on(now)
    }

    /// A replica is back.
    pub(super) fn replica_back(&mut self, now: f64) -> Option<Next> {
        self.settle(now);
        self.missing -= 1.0;
        self.train_on(now)
    }

    /// Counts what it has trained up to now at the pace until now; an end of it that is expected does not count any more.
    fn settle(&mut self, now: f64) {
        if self.restarts > 0 {
            return;
        }
        self.turn(self.clock.doing(), now);
        let tokens_per_second = self.full_tokens_per_second * self.pace().speed();
        if let Some(Training { tokens_left, since, is_validation }) = &mut self.training {
            self.compute_seconds += if *is_validation { 0.0 } else { now - *since };
            *tokens_left = (*tokens_left - (now - *since) * tokens_per_second).max(0.0);
            *since = now;
            self.trainings += 1;
        }
    }

    fn train_on(&mut self, now: f64) -> Option<Next> {
        let training = self.training.filter(|_| self.restarts == 0)?;
        Some(self.train(Training { since: now, ..training }))
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
