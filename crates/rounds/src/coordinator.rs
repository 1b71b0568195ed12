//! The coordinator's decisions as a state machine: events and the time in, commands out.
//!
//! A round goes: `Begin` to every current site; each trains on its lease and reports `Computed`; the others fetch its
//! delta and report `Holds`; when every working site has computed and every current site holds every delta, the commit
//! is persisted, sent, and the next round begins in the same breath. A commit therefore never asks a site for bytes that
//! it does not have. A site that leaves gives its lease back; what it had delivered to everybody still counts.
//!
//! It never touches a tensor: it compares hashes.

use crate::ledger::{Ledger, LedgerTotals};
use crate::plan::{
    Assignment, Commit, Contribution, Contributor, Directive, LeaveReason, Peer, Report, RoundPlan, SiteDevice,
};
use crate::shares::{Speed, follow, portions};
use base::{ContentHash, Round, RunConfig, SiteId, Term};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A round may take this many times its expected compute time, and `deadline_seconds` on top, before sites that have not
/// delivered are dropped.
pub const DEADLINE_FACTOR: f64 = 3.0;

/// A shorter time says nothing of a speed.
const COMPUTE_SECONDS_MIN: f64 = 1e-6;

/// What the decisions depend on.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Sites to wait for before the first round of a term.
    pub sites: u32,
    /// Samples in an inner step, over all sites.
    pub batch_samples: u64,
    /// Tokens predicted in one sample.
    pub sequence_length: u64,
    /// Inner steps in a round (H).
    pub steps_per_round: u64,
    /// Inner steps of the run.
    pub steps_total: u64,
    /// Fixed weights by site id; empty means by measured speed.
    pub shares: Vec<f64>,
    /// See [`DEADLINE_FACTOR`].
    pub deadline_seconds: f64,
    /// Size of an encoded delta, known from the schema.
    pub delta_bytes: u64,
}

impl Settings {
    /// The settings of a run whose encoded deltas have `delta_bytes`.
    pub fn new(config: &RunConfig, delta_bytes: u64) -> Self {
        Self {
            sites: config.sync.sites,
            batch_samples: config.train.batch_samples as u64,
            sequence_length: config.data.sequence_length as u64,
            steps_per_round: config.steps_per_round(),
            steps_total: config.train.steps,
            shares: config.sync.shares.clone(),
            deadline_seconds: config.sync.deadline_seconds,
            delta_bytes,
        }
    }

    /// Rounds after which the run is finished.
    pub fn rounds_total(&self) -> u64 {
        self.steps_total.div_ceil(self.steps_per_round)
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A site was admitted and its connection is up.
    Connected(Peer),
    /// A site said something.
    Reported(SiteId, Report),
    /// A site's connection ended, or it broke the protocol.
    Disconnected(SiteId, LeaveReason),
    /// Time passed.
    Tick,
    /// Finish after the round in progress.
    StopRequested,
}

/// What the shell must do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Write to the durable log and sync before any later command.
    Persist(Record),
    /// Send to one site.
    Send(SiteId, Directive),
    /// Tell people.
    Note(Note),
    /// The run is over and every site has left.
    Done,
}

/// A line of the coordinator's durable log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// A new coordinator process took over.
    TermStarted {
        /// Its fencing number.
        term: Term,
    },
    /// A round closed.
    Committed(Box<Committed>),
    /// All sites agreed on the state after it.
    StateHash {
        /// The round.
        round: Round,
        /// The hash.
        state_hash: ContentHash,
    },
    /// No site holds a later round any more: its commits are void and their samples will be leased again.
    RolledBack {
        /// The round that counts as the last.
        to: Round,
    },
}

/// A commit, and the ledger right after it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// The commit.
    pub commit: Commit,
    /// No lease is open in it.
    pub ledger: Ledger,
    /// Agreed by all sites; not known before they have applied the commit.
    pub state_hash: Option<ContentHash>,
}

/// A decision, and why, for people.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Note {
    /// A site can train.
    SiteReady {
        /// Who.
        site: SiteId,
        /// Measured at join.
        tokens_per_second: f64,
    },
    /// What a site computes on.
    SiteDevice {
        /// Who.
        site: SiteId,
        /// On what.
        device: SiteDevice,
    },
    /// A site is gone.
    SiteLeft {
        /// Who.
        site: SiteId,
        /// Why.
        reason: LeaveReason,
    },
    /// Work was handed out.
    RoundStarted(RoundPlan),
    /// A site finished its inner steps.
    Computed {
        /// Who.
        site: SiteId,
        /// Which round.
        round: Round,
        /// With what.
        contribution: Contribution,
    },
    /// A round closed.
    Committed {
        /// With what.
        commit: Commit,
        /// Since it began.
        seconds: f64,
        /// Sums after it.
        totals: LedgerTotals,
    },
    /// All sites hold the same state.
    Agreed {
        /// After this round.
        round: Round,
        /// The state.
        state_hash: ContentHash,
    },
    /// A site holds another state than the majority.
    Diverged {
        /// Who.
        site: SiteId,
        /// After which round.
        round: Round,
        /// The majority's.
        expected: ContentHash,
        /// The site's.
        found: ContentHash,
    },
    /// The division of the batch changed.
    SharesMoved {
        /// Weight of each current site.
        weights: Vec<(SiteId, f64)>,
    },
    /// See [`Record::RolledBack`].
    RolledBack {
        /// The last commit in the log.
        from: Round,
        /// The newest round that a site still holds.
        to: Round,
    },
    /// Every working site left: the round will begin anew.
    RoundAbandoned {
        /// Which.
        round: Round,
    },
}

#[derive(Debug, Clone)]
struct Site {
    peer: Peer,
    /// The state it says it holds; `None` before it is ready.
    held: Option<(Round, ContentHash)>,
    /// Whether it takes part in rounds: it holds the state of the last commit, or has been sent that commit.
    current: bool,
    /// Tokens a second.
    speed: Speed,
}

#[derive(Debug, Clone)]
struct Collecting {
    plan: RoundPlan,
    began: f64,
    deadline: f64,
    contributions: BTreeMap<SiteId, Contribution>,
    holds: BTreeMap<SiteId, BTreeSet<SiteId>>,
}

#[derive(Debug, Clone)]
enum Phase {
    Gathering,
    Collecting(Collecting),
    /// Sites that have been told to finish.
    Finishing(BTreeSet<SiteId>),
}

/// The coordinator of one run.
#[derive(Debug, Clone)]
pub struct Coordinator {
    settings: Settings,
    term: Term,
    history: Vec<Committed>,
    ledger: Ledger,
    sites: BTreeMap<SiteId, Site>,
    applied: BTreeMap<SiteId, ContentHash>,
    phase: Phase,
    started: bool,
    stopping: bool,
    weights: BTreeMap<SiteId, f64>,
}

impl Coordinator {
    /// Starts a new term on what earlier terms have logged, and gives the record to persist first. `initial_hash` is the
    /// hash of the state of round 0.
    pub fn recover(
        settings: Settings,
        initial_hash: ContentHash,
        records: impl IntoIterator<Item = Record>,
    ) -> (Self, Record) {
        let initial = Commit { term: Term(0), round: Round(0), contributors: Vec::new(), cursor: 0 };
        let mut history =
            vec![Committed { commit: initial, ledger: Ledger::default(), state_hash: Some(initial_hash) }];
        let mut term = Term(0);
        for record in records {
            match record {
                Record::TermStarted { term: started } => term = term.max(started),
                Record::Committed(committed) => history.push(*committed),
                Record::StateHash { round, state_hash } => {
                    for committed in history.iter_mut().filter(|committed| committed.commit.round == round) {
                        committed.state_hash = Some(state_hash);
                    }
                }
                Record::RolledBack { to } => history.retain(|committed| committed.commit.round <= to),
            }
        }
        let term = Term(term.0 + 1);
        let ledger = history.last().map(|committed| committed.ledger.clone()).unwrap_or_default();
        let coordinator = Self {
            settings,
            term,
            history,
            ledger,
            sites: BTreeMap::new(),
            applied: BTreeMap::new(),
            phase: Phase::Gathering,
            started: false,
            stopping: false,
            weights: BTreeMap::new(),
        };
        (coordinator, Record::TermStarted { term })
    }

    /// The current term.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The last commit and its state.
    pub fn last(&self) -> &Committed {
        self.history.last().unwrap_or_else(|| unreachable!("round 0 is always there"))
    }

    /// Sample accounting so far.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Takes one event at time `now` (seconds on any clock that does not run backwards).
    pub fn handle(&mut self, event: Event, now: f64) -> Vec<Command> {
        let mut commands = Vec::new();
        match event {
            Event::Connected(peer) => self.connected(peer, &mut commands),
            Event::Reported(site, report) if self.sites.contains_key(&site) => {
                self.reported(site, report, &mut commands);
            }
            Event::Reported(..) => {}
            Event::Disconnected(site, reason) => self.remove(site, reason, &mut commands),
            Event::Tick => self.enforce_deadline(now, &mut commands),
            Event::StopRequested => self.stopping = true,
        }
        self.advance(now, &mut commands);
        commands
    }

    fn connected(&mut self, peer: Peer, commands: &mut Vec<Command>) {
        // A site that connects anew has lost what it held in memory: it starts over as a newcomer.
        self.remove(peer.site, LeaveReason::ConnectionLost, commands);
        let site = peer.site;
        self.sites.insert(site, Site { peer, held: None, current: false, speed: Speed::new(1.0) });
        self.tell_peers(commands);
    }

    fn tell_peers(&self, commands: &mut Vec<Command>) {
        let peers: Vec<Peer> = self.sites.values().map(|site| site.peer.clone()).collect();
        commands.extend(self.sites.keys().map(|site| Command::Send(*site, Directive::Peers(peers.clone()))));
    }

    fn reported(&mut self, site: SiteId, report: Report, commands: &mut Vec<Command>) {
        match report {
            Report::Ready { round, state_hash, tokens_per_second } => {
                self.ready(site, (round, state_hash), tokens_per_second, commands);
            }
            Report::Computed { round, contribution } => self.computed(site, round, contribution, commands),
            Report::Holds { round, from } => {
                if let Phase::Collecting(collecting) = &mut self.phase
                    && collecting.plan.round == round
                    && collecting.contributions.contains_key(&from)
                {
                    collecting.holds.entry(site).or_default().insert(from);
                }
            }
            Report::Applied { round, state_hash } => {
                if round == self.last().commit.round {
                    self.applied.insert(site, state_hash);
                }
            }
            Report::Leave { reason } => self.remove(site, reason, commands),
            Report::Device(device) => commands.push(Command::Note(Note::SiteDevice { site, device: device.clipped() })),
        }
    }

    fn ready(&mut self, id: SiteId, held: (Round, ContentHash), tokens_per_second: f64, commands: &mut Vec<Command>) {
        if !(tokens_per_second.is_finite() && tokens_per_second > 0.0) {
            return self.drop_site(id, LeaveReason::Misbehaved, commands);
        }
        if let Some(site) = self.sites.get_mut(&id) {
            site.held = Some(held);
            site.speed = Speed::new(tokens_per_second);
            commands.push(Command::Note(Note::SiteReady { site: id, tokens_per_second }));
        }
    }

    fn computed(&mut self, site: SiteId, round: Round, contribution: Contribution, commands: &mut Vec<Command>) {
        let Phase::Collecting(collecting) = &mut self.phase else { return };
        if collecting.plan.round != round || collecting.contributions.contains_key(&site) {
            return;
        }
        let Some(assignment) = collecting.plan.assignments.iter().find(|assignment| assignment.site == site) else {
            return self.drop_site(site, LeaveReason::Misbehaved, commands);
        };
        let tokens = assignment.samples * self.settings.sequence_length;
        let honest = contribution.tokens == tokens
            && contribution.delta_bytes == self.settings.delta_bytes
            && contribution.loss_nats.is_finite()
            && contribution.compute_seconds.is_finite()
            && contribution.compute_seconds >= 0.0;
        if !honest {
            return self.drop_site(site, LeaveReason::Misbehaved, commands);
        }
        collecting.contributions.insert(site, contribution);
        collecting.holds.entry(site).or_default().insert(site);
        commands.push(Command::Note(Note::Computed { site, round, contribution }));
        let directive = Self::delta_ready(&collecting.plan, site, contribution);
        let others = self.sites.iter().filter(|(id, other)| **id != site && other.current);
        commands.extend(others.map(|(id, _)| Command::Send(*id, directive.clone())));
        if let Some(site) = self.sites.get_mut(&site)
            && contribution.compute_seconds >= COMPUTE_SECONDS_MIN
        {
            site.speed.newest = tokens as f64 / contribution.compute_seconds;
        }
    }

    fn delta_ready(plan: &RoundPlan, site: SiteId, contribution: Contribution) -> Directive {
        let Contribution { tokens, delta_hash, delta_bytes, .. } = contribution;
        let contributor = Contributor { site, tokens, delta_hash, delta_bytes };
        Directive::DeltaReady { term: plan.term, round: plan.round, contributor }
    }

    fn drop_site(&mut self, site: SiteId, reason: LeaveReason, commands: &mut Vec<Command>) {
        commands.push(Command::Send(site, Directive::Dropped { reason }));
        self.remove(site, reason, commands);
    }

    fn remove(&mut self, id: SiteId, reason: LeaveReason, commands: &mut Vec<Command>) {
        if self.sites.remove(&id).is_none() {
            return;
        }
        self.applied.remove(&id);
        commands.push(Command::Note(Note::SiteLeft { site: id, reason }));
        if let Phase::Collecting(collecting) = &mut self.phase {
            let everybody_holds = self
                .sites
                .iter()
                .filter(|(_, site)| site.current)
                .all(|(other, _)| collecting.holds.get(other).is_some_and(|held| held.contains(&id)));
            let delivered = collecting.contributions.contains_key(&id) && everybody_holds && !self.sites.is_empty();
            if !delivered || reason == LeaveReason::Diverged {
                collecting.contributions.remove(&id);
                collecting.plan.assignments.retain(|assignment| assignment.site != id);
                self.ledger.give_back(collecting.plan.round, id);
            }
            collecting.holds.remove(&id);
        }
        self.tell_peers(commands);
    }

    fn enforce_deadline(&mut self, now: f64, commands: &mut Vec<Command>) {
        let Phase::Collecting(collecting) = &self.phase else { return };
        if now <= collecting.deadline {
            return;
        }
        let slow = |site: &SiteId| {
            let works = collecting.plan.assignments.iter().any(|assignment| assignment.site == *site);
            works && !collecting.contributions.contains_key(site)
        };
        let all: Vec<SiteId> = self.sites.iter().filter(|(_, site)| site.current).map(|(id, _)| *id).collect();
        let (slow, delivered): (Vec<SiteId>, Vec<SiteId>) = all.into_iter().partition(slow);
        for site in slow {
            self.drop_site(site, LeaveReason::TooSlow, commands);
        }
        for site in delivered {
            let Phase::Collecting(collecting) = &self.phase else { return };
            if !Self::holds_all(collecting, site) {
                self.drop_site(site, LeaveReason::DeltasMissing, commands);
            }
        }
    }

    fn holds_all(collecting: &Collecting, site: SiteId) -> bool {
        let held = collecting.holds.get(&site);
        collecting.contributions.keys().all(|from| held.is_some_and(|held| held.contains(from)))
    }

    /// Takes every step that has become possible.
    fn advance(&mut self, now: f64, commands: &mut Vec<Command>) {
        self.agree(commands);
        self.place_newcomers(commands);
        if self.round_is_complete() {
            self.commit(now, commands);
        }
        if matches!(self.phase, Phase::Gathering) {
            self.begin(now, commands);
        }
        self.finish(commands);
    }

    /// Settles what the state after the last commit is, once every current site has said what it holds (I1).
    fn agree(&mut self, commands: &mut Vec<Command>) {
        let current: Vec<SiteId> = self.sites.iter().filter(|(_, site)| site.current).map(|(id, _)| *id).collect();
        let all_said = !current.is_empty() && current.iter().all(|site| self.applied.contains_key(site));
        let round = self.last().commit.round;
        if self.last().state_hash.is_some() || !all_said {
            return;
        }
        let mut votes: BTreeMap<ContentHash, usize> = BTreeMap::new();
        for hash in self.applied.values() {
            *votes.entry(*hash).or_default() += 1;
        }
        let first = self.applied.values().next().copied().unwrap_or_default();
        // The most frequent hash; among equals that of the lowest site id.
        let expected = votes.iter().fold(first, |best, (hash, count)| if *count > votes[&best] { *hash } else { best });
        if let Some(last) = self.history.last_mut() {
            last.state_hash = Some(expected);
        }
        commands.push(Command::Persist(Record::StateHash { round, state_hash: expected }));
        for (site, found) in self.applied.clone() {
            if found == expected {
                if let Some(site) = self.sites.get_mut(&site) {
                    site.held = Some((round, found));
                }
            } else {
                commands.push(Command::Note(Note::Diverged { site, round, expected, found }));
                self.drop_site(site, LeaveReason::Diverged, commands);
            }
        }
        commands.push(Command::Note(Note::Agreed { round, state_hash: expected }));
    }

    /// Makes sites current that hold the last state, and sends the others to fetch it.
    fn place_newcomers(&mut self, commands: &mut Vec<Command>) {
        if self.started && matches!(self.phase, Phase::Gathering) && self.sites.values().all(|site| !site.current) {
            self.started = false;
        }
        if !self.started {
            let ready = self.sites.values().filter(|site| site.held.is_some()).count();
            if ready < self.settings.sites as usize {
                return;
            }
            self.started = true;
            self.roll_back_to_what_is_held(commands);
        }
        let last = self.last().clone();
        let Some(state_hash) = last.state_hash else { return };
        let wanted = (last.commit.round, state_hash);
        // What a site delivered before it left still counts; back again, it cannot fetch that delta from itself, so it
        // waits for the commit and takes the state.
        let delivered: BTreeSet<SiteId> = match &self.phase {
            Phase::Collecting(collecting) => collecting.contributions.keys().copied().collect(),
            _ => BTreeSet::new(),
        };
        let newcomers = self
            .sites
            .iter_mut()
            .filter(|(id, site)| !site.current && site.held == Some(wanted) && !delivered.contains(id));
        let fresh: Vec<SiteId> = newcomers
            .map(|(id, site)| {
                site.current = true;
                *id
            })
            .collect();
        for site in fresh {
            self.brief(site, commands);
        }
        let from: Vec<SiteId> = self.sites.iter().filter(|(_, site)| site.current).map(|(id, _)| *id).collect();
        if from.is_empty() {
            return;
        }
        let waiting = |id: &SiteId, site: &Site| !site.current && site.held != Some(wanted) && !delivered.contains(id);
        for (id, site) in self.sites.iter_mut().filter(|(id, site)| waiting(id, site)) {
            // Asked once; it reports `Ready` again when it has the state, or when it could not get it.
            if site.held.take().is_some() {
                let directive = Directive::FetchState { commit: last.commit.clone(), state_hash, from: from.clone() };
                commands.push(Command::Send(*id, directive));
            }
        }
    }

    /// Tells a site that became current in mid-round what it must follow.
    fn brief(&self, site: SiteId, commands: &mut Vec<Command>) {
        if let Phase::Collecting(collecting) = &self.phase {
            commands.push(Command::Send(site, Directive::Begin(collecting.plan.clone())));
            for (from, contribution) in &collecting.contributions {
                let directive = Self::delta_ready(&collecting.plan, *from, *contribution);
                commands.push(Command::Send(site, directive));
            }
        }
    }

    fn roll_back_to_what_is_held(&mut self, commands: &mut Vec<Command>) {
        let from = self.last().commit.round;
        let is_held = |committed: &&Committed| {
            self.sites.values().filter_map(|site| site.held).any(|(round, hash)| {
                // A commit whose state nobody had confirmed when the coordinator stopped is settled by who holds it.
                committed.commit.round == round && committed.state_hash.is_none_or(|known| known == hash)
            })
        };
        let newest = self.history.iter().rev().find(is_held);
        let to = newest.map_or(Round(0), |committed| committed.commit.round);
        if to < from {
            self.history.retain(|committed| committed.commit.round <= to);
            self.ledger = self.last().ledger.clone();
            // Rounds will be committed again under the same numbers: the new term tells them apart.
            self.term = Term(self.term.0 + 1);
            commands.push(Command::Persist(Record::RolledBack { to }));
            commands.push(Command::Persist(Record::TermStarted { term: self.term }));
            commands.push(Command::Note(Note::RolledBack { from, to }));
        }
        if self.last().state_hash.is_none() {
            let held: Vec<_> = self.sites.values().filter_map(|site| site.held).collect();
            if let Some((round, state_hash)) = held.into_iter().find(|(round, _)| *round == to) {
                if let Some(last) = self.history.last_mut() {
                    last.state_hash = Some(state_hash);
                }
                commands.push(Command::Persist(Record::StateHash { round, state_hash }));
            }
        }
    }

    fn round_is_complete(&self) -> bool {
        let Phase::Collecting(collecting) = &self.phase else { return false };
        let all_computed = collecting
            .plan
            .assignments
            .iter()
            .all(|assignment| collecting.contributions.contains_key(&assignment.site));
        let current = self.sites.iter().filter(|(_, site)| site.current);
        all_computed && current.into_iter().all(|(id, _)| Self::holds_all(collecting, *id))
    }

    fn commit(&mut self, now: f64, commands: &mut Vec<Command>) {
        let Phase::Collecting(collecting) = std::mem::replace(&mut self.phase, Phase::Gathering) else { return };
        let round = collecting.plan.round;
        if collecting.contributions.is_empty() || self.sites.values().all(|site| !site.current) {
            for site in collecting.contributions.keys() {
                self.ledger.give_back(round, *site);
            }
            commands.push(Command::Note(Note::RoundAbandoned { round }));
            return;
        }
        let contributors: Vec<Contributor> = collecting
            .contributions
            .iter()
            .map(|(site, c)| Contributor {
                site: *site,
                tokens: c.tokens,
                delta_hash: c.delta_hash,
                delta_bytes: c.delta_bytes,
            })
            .collect();
        for contributor in &contributors {
            self.ledger.commit(round, contributor.site);
        }
        let commit = Commit { term: self.term, round, contributors, cursor: self.ledger.cursor() };
        let committed = Committed { commit: commit.clone(), ledger: self.ledger.clone(), state_hash: None };
        commands.push(Command::Persist(Record::Committed(Box::new(committed.clone()))));
        self.history.push(committed);
        self.applied.clear();
        for (id, site) in self.sites.iter_mut().filter(|(_, site)| site.current) {
            site.held = None;
            commands.push(Command::Send(*id, Directive::Commit(commit.clone())));
        }
        let (seconds, totals) = (now - collecting.began, self.ledger.totals());
        commands.push(Command::Note(Note::Committed { commit, seconds, totals }));
    }

    fn begin(&mut self, now: f64, commands: &mut Vec<Command>) {
        let last_round = self.last().commit.round;
        if self.stopping || (self.started && last_round.0 >= self.settings.rounds_total()) {
            self.phase = Phase::Finishing(BTreeSet::new());
            return;
        }
        let current: Vec<SiteId> = self.sites.iter().filter(|(_, site)| site.current).map(|(id, _)| *id).collect();
        if !self.started
            || current.is_empty()
            || (last_round == Round(0) && current.len() < self.settings.sites as usize)
        {
            return;
        }
        let weights = self.weigh(&current, commands);
        let round = last_round.next();
        let first_step = last_round.0 * self.settings.steps_per_round;
        let steps = self.settings.steps_per_round.min(self.settings.steps_total - first_step);
        let portions = portions(self.settings.batch_samples, steps, &weights);
        let samples_total = self.settings.batch_samples * steps;
        let mut assignments = Vec::new();
        let mut expected_seconds: f64 = 0.0;
        for (site, portion) in current.iter().zip(portions) {
            let samples = portion.samples;
            if samples == 0 {
                continue;
            }
            let tokens = (samples * self.settings.sequence_length) as f64;
            expected_seconds = expected_seconds.max(tokens / self.sites[site].speed.newest);
            assignments.push(Assignment {
                site: *site,
                samples,
                steps: portion.steps,
                lease: self.ledger.lease(round, *site, samples),
                share: samples as f64 / samples_total as f64,
            });
        }
        let plan = RoundPlan { term: self.term, round, first_step, assignments };
        commands.extend(current.iter().map(|site| Command::Send(*site, Directive::Begin(plan.clone()))));
        commands.push(Command::Note(Note::RoundStarted(plan.clone())));
        let deadline = now + DEADLINE_FACTOR * expected_seconds + self.settings.deadline_seconds;
        let (contributions, holds) = (BTreeMap::new(), BTreeMap::new());
        self.phase = Phase::Collecting(Collecting { plan, began: now, deadline, contributions, holds });
    }

    /// Weight of each current site: as configured, or its measured speed, kept until the parts have moved enough.
    fn weigh(&mut self, current: &[SiteId], commands: &mut Vec<Command>) -> Vec<f64> {
        if !self.settings.shares.is_empty() {
            let configured = |site: &SiteId| self.settings.shares.get(site.0 as usize).copied().unwrap_or(1.0);
            return current.iter().map(configured).collect();
        }
        let mut speeds: Vec<Speed> = current.iter().map(|site| self.sites[site].speed).collect();
        let in_use: Vec<f64> = current.iter().filter_map(|site| self.weights.get(site).copied()).collect();
        let moved = follow(&mut speeds, &in_use);
        for (site, speed) in current.iter().zip(&speeds) {
            if let Some(site) = self.sites.get_mut(site) {
                site.speed = *speed;
            }
        }
        let measured: Vec<f64> = speeds.iter().map(|speed| speed.believed).collect();
        if in_use.len() == self.weights.len() && !moved {
            return in_use;
        }
        self.weights = current.iter().copied().zip(measured.iter().copied()).collect();
        let weights = current.iter().copied().zip(measured.iter().copied()).collect();
        commands.push(Command::Note(Note::SharesMoved { weights }));
        measured
    }

    fn finish(&mut self, commands: &mut Vec<Command>) {
        let (round, state_hash) = (self.last().commit.round, self.last().state_hash);
        let Phase::Finishing(told) = &mut self.phase else { return };
        if self.sites.is_empty() {
            commands.push(Command::Done);
            return;
        }
        let Some(state_hash) = state_hash else { return };
        let current = |sites: &BTreeMap<SiteId, Site>, wanted: bool| -> Vec<SiteId> {
            sites.iter().filter(|(_, site)| site.current == wanted).map(|(id, _)| *id).collect()
        };
        let holders = current(&self.sites, true);
        if holders.is_empty() {
            // Nobody is left to give the final state to those who were still on their way.
            for site in current(&self.sites, false) {
                self.drop_site(site, LeaveReason::Finished, commands);
            }
            commands.push(Command::Done);
            return;
        }
        let untold = holders.into_iter().filter(|site| told.insert(*site));
        commands.extend(untold.map(|site| Command::Send(site, Directive::Finish { round, state_hash })));
    }
}
