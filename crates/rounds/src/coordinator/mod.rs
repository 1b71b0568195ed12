//! The coordinator's decisions as a state machine: events and the time in, commands out.
//!
//! A round goes: `Begin` to every current site; each trains on its lease, takes a snapshot of the round's fragment and reports
//! `Computed`; the others fetch its delta and report `Holds`; when that is enough ([`OpenRound`]), the commit is persisted and sent.
//! Where merges take effect later than their snapshot ([`schedule`]), the next rounds are open meanwhile, so that no site
//! ever waits for a plan. Rounds commit in order, each once.
//!
//! *Enough* is that every worker has delivered and every current site holds every delta; or, once a quorum has delivered and a grace
//! window has passed, the deltas that a quorum of sites all hold. A commit therefore never asks a site for bytes that nobody can
//! give it. A site that was late keeps its lease: its next delta that is merged holds what it had learnt, and its leases are committed
//! with that. A site that leaves gives its leases back; what it had delivered to everybody still counts.
//!
//! A round may be sharded: then sites hold slices and merged parts instead of whole deltas ([`reduction`], [`sharded`]).
//!
//! Deltas that a commit names may be lost with their last holder before all have merged them: [`regroup`] finds what can be gone on with.
//!
//! A site whose step came out otherwise when it was made again begins anew without what it had not given ([`recompute`]).
//!
//! Where settings are adaptive, rounds follow the links that sites measure on their traffic ([`tuning`]).
//!
//! It never touches a tensor: it compares hashes.
//!
//! A word of a site costs O(log n) of n sites and nothing else that grows with them, but for the messages that follow from it: what is asked after
//! every event is kept, not counted ([`sites`], [`holdings`], [`polls`]). What it remembers does not grow with the rounds ([`history`]).

mod awaited;
mod away;
mod ending;
mod grace;
mod history;
mod holdings;
mod interface;
mod newcomers;
mod open_round;
mod peers;
mod polls;
mod recompute;
mod reduction;
mod regroup;
mod sharded;
mod sites;
mod tuning;

pub use interface::{Command, Committed, Event, Lateness, Note, Record, Settings};

use crate::adaptive::Choice;
use crate::exchange::PARTS_MAX;
use crate::ledger::Ledger;
use crate::plan::{Assignment, Commit, Contribution, Directive, FragmentPlan, LeaveReason, Peer, Report, RoundPlan};
use crate::recompute::Checks;
use crate::schedule::{self, Effects, fragment_of, lookahead};
use crate::shares::{Speed, follow, portions};
use crate::witness::Answer;
use awaited::Awaited;
use away::Away;
use base::config::SyncSection;
use base::{ContentHash, Round, SiteId, Term};
use grace::Grace;
use history::History;
use open_round::{Delivery, OpenRound};
use peers::PeersTold;
use polls::{Polls, most_frequent};
use sharded::Exchanges;
use sites::{Owed, Site, Sites};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use tuning::Tuning;

/// A round may take this many times its expected compute time, and `deadline_seconds` on top, before sites that have not
/// delivered are dropped.
pub const DEADLINE_FACTOR: f64 = 3.0;

/// A shorter time says nothing of a speed.
const COMPUTE_SECONDS_MIN: f64 = 1e-6;

/// No site trains as fast: 10,000 sites of this speed still have a finite sum, by which shares are divided.
const TOKENS_PER_SECOND_MAX: f64 = 1e15;

/// Sites pulse every 2 s: after this long without a word one counts as silent.
const SILENCE_SECONDS: f64 = 6.0;

#[derive(Debug, Clone)]
enum Phase {
    Working,
    /// Sites that have been told to finish.
    Finishing(BTreeSet<SiteId>),
}

/// The coordinator of one run.
#[derive(Debug, Clone)]
pub struct Coordinator {
    settings: Settings,
    term: Term,
    history: History,
    ledger: Ledger,
    sites: Sites,
    peers_told: PeersTold,
    polls: Polls,
    /// Ascending, the next to be committed first.
    open: VecDeque<OpenRound>,
    phase: Phase,
    grace: Grace,
    exchanges: Exchanges,
    checks: Checks,
    /// Rounds at the end of the run, planned or committed, in which nobody trains.
    flushes: u32,
    started: bool,
    /// Of the plans that are made now: see [`RoundPlan::attempt`].
    attempt: u32,
    /// Sites that have left, with the last round in which a delta of theirs may still be committed.
    parted: BTreeMap<SiteId, Round>,
    /// For how many ticks no site has been able to reach the last commit.
    lost_ticks: u32,
    /// For how many ticks nobody who has the last state has been here, after the last round.
    vain_ticks: u32,
    /// The last round, once sites were told that the run is over.
    told_over: Option<Round>,
    /// For how many ticks sites have been saying what they hold, for the second time in this term or later.
    gathering_ticks: Option<u32>,
    /// The last commit before the current sites began: deltas of later ones are still held by some of them.
    started_at: Round,
    stopping: bool,
    weights: BTreeMap<SiteId, f64>,
    away: Away,
    awaited: Option<Awaited>,
    /// Where settings follow the links.
    tuning: Option<Tuning>,
    /// The first round of the schedule in use.
    schedule_from: Round,
}

impl Coordinator {
    /// Starts a new term on what earlier terms have logged, and gives the record to persist first. `initial_hash` is the
    /// hash of the state of round 0.
    pub fn recover(
        settings: Settings,
        initial_hash: ContentHash,
        records: impl IntoIterator<Item = Record>,
    ) -> (Self, Record) {
        let mut history = History::new(initial_hash);
        let (mut term, mut settings, mut schedule_from, mut told_over) = (Term(0), settings, Round(1), None);
        for record in records {
            match record {
                Record::TermStarted { term: started } => term = term.max(started),
                // In a new term nobody follows from an older state than the last.
                Record::Committed(committed) => history.push(*committed, 1),
                Record::StateHash { round, state_hash } => history.settle(round, state_hash),
                // Ignored where somebody has turned it off since.
                Record::SettingsChanged { round, choice, .. } if settings.sync.adaptive => {
                    settings = settings.with(&choice);
                    schedule_from = round;
                }
                Record::SettingsChanged { .. } => {}
                Record::RolledBack { to } => {
                    history.retain(|committed| committed.commit.round <= to);
                    told_over = None;
                }
                Record::Over { round } => told_over = Some(round),
            }
        }
        let term = Term(term.0 + 1);
        let tuning = settings.sync.adaptive.then(|| Tuning::new(&settings));
        let mut coordinator = Self {
            tuning,
            schedule_from,
            settings,
            term,
            history,
            ledger: Ledger::default(),
            sites: Sites::default(),
            peers_told: PeersTold::default(),
            polls: Polls::default(),
            open: VecDeque::new(),
            phase: Phase::Working,
            grace: Grace::default(),
            exchanges: Exchanges::default(),
            checks: Checks::default(),
            flushes: 0,
            started: false,
            attempt: 1,
            parted: BTreeMap::new(),
            lost_ticks: 0,
            vain_ticks: 0,
            told_over,
            gathering_ticks: None,
            started_at: Round(0),
            stopping: false,
            weights: BTreeMap::new(),
            away: Away::default(),
            awaited: None,
        };
        coordinator.go_on_from_last();
        (coordinator, Record::TermStarted { term })
    }

    /// Takes the ledger as it was after the last commit; who had leases then has lost them.
    fn go_on_from_last(&mut self) {
        self.ledger = self.last().ledger.clone();
        self.ledger.give_back_all();
        self.flushes = self.flushes_committed();
    }

    /// Committed rounds at the end of the history in which nobody trained.
    fn flushes_committed(&self) -> u32 {
        let steps = || self.history.newest_first().map(|committed| committed.commit.step);
        steps().zip(steps().skip(1)).take_while(|(step, before)| step == before).count() as u32
    }

    /// The current term.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The last commit and its state.
    pub fn last(&self) -> &Committed {
        self.history.last()
    }

    /// Inner steps of the run up to the end of a committed round; 0 where it is not known.
    pub fn step_of(&self, round: Round) -> u64 {
        self.history.get(round).map_or(0, |committed| committed.commit.step)
    }

    /// Sample accounting so far.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Takes one event at time `now` (seconds on any clock that does not run backwards).
    pub fn handle(&mut self, event: Event, now: f64) -> Vec<Command> {
        let mut commands = Vec::new();
        match event {
            Event::Connected(peer) => self.connected(peer, now, &mut commands),
            Event::Reported(site, report) if self.sites.contains_key(&site) => {
                self.hear(site, now);
                self.reported(site, report, &mut commands);
            }
            Event::Reported(..) => {}
            Event::Disconnected(site, reason) => self.remove(site, reason, &mut commands),
            Event::Heard(site) => {
                self.hear(site, now);
                return commands;
            }
            Event::Evaluated { site, round, nats_per_token } => self.evaluated(site, round, nats_per_token),
            Event::Tick => self.enforce_deadline(now, &mut commands),
            Event::StopRequested => self.stopping = true,
        }
        self.advance(now, &mut commands);
        commands
    }

    fn hear(&mut self, site: SiteId, now: f64) {
        if let Some(site) = self.sites.get_mut(&site) {
            site.heard = now;
        }
    }

    fn lookahead(&self) -> u64 {
        lookahead(self.settings.steps_per_round, self.settings.sync.overlap_steps)
    }

    fn connected(&mut self, peer: Peer, now: f64, commands: &mut Vec<Command>) {
        // A site that connects anew has lost what it held in memory: it starts over as a newcomer.
        self.remove(peer.site, LeaveReason::ConnectionLost, commands);
        self.sites.insert(Site::new(peer, now));
        self.tell_peers(commands);
    }

    fn reported(&mut self, site: SiteId, report: Report, commands: &mut Vec<Command>) {
        if let Some((round, attempt)) = report.answers()
            && self.is_outdated(site, round, attempt)
        {
            return commands.push(Command::Note(Note::Outdated { site, round, attempt }));
        }
        match report {
            Report::Ready { round, state_hash, tokens_per_second, recall } => {
                self.ready(site, (round, state_hash), (tokens_per_second, recall), commands);
            }
            Report::Computed { round, contribution, slice_hashes, .. } => {
                self.computed(site, round, (contribution, &slice_hashes), commands);
            }
            Report::Holds { round, from, .. } => {
                if let Some(open) = self.open.iter_mut().find(|open| open.plan.round == round) {
                    open.hold(site, from);
                }
            }
            Report::HoldsSlice { round, from, .. } => self.holds_slice(site, round, from),
            Report::Reduced { round, hash, .. } => self.reduced(site, round, hash, commands),
            Report::HoldsPart { round, from, .. } => self.holds_part(site, round, from),
            Report::Applied { round, state_hash } => self.applied(site, round, state_hash, commands),
            Report::Leave { reason } => self.remove(site, reason, commands),
            Report::Measured { round, measurement } => self.measured(site, round, &measurement, commands),
            Report::Recomputed { round, attempt, verdict } => {
                self.recomputed(site, (round, attempt), &verdict, commands);
            }
            Report::Witnessed { round, state_hash, digest, bounds } => {
                self.witnessed(site, round, Answer { state_hash, digest, bounds }, commands);
            }
            Report::Device(device) => {
                let device = device.clipped();
                if let Some(known) = self.sites.get_mut(&site) {
                    known.device.clone_from(&device);
                }
                commands.push(Command::Note(Note::SiteDevice { site, device: Box::new(device) }));
            }
        }
    }

    /// Whether a site answers a plan for that round which was withdrawn: it had not heard of the present one yet, or has no part in the run
    /// until it says what it holds.
    fn is_outdated(&self, id: SiteId, round: Round, attempt: u32) -> bool {
        let Some(site) = self.sites.get(&id).filter(|site| site.since().is_some()) else { return true };
        let open = self.open.iter().find(|open| open.plan.round == round).map(|open| open.plan.attempt);
        let owed = site.owed.get(&round).map(|owed| owed.attempt);
        open.or(owed).is_some_and(|present| present != attempt)
    }

    fn ready(
        &mut self,
        id: SiteId,
        held: (Round, ContentHash),
        (tokens_per_second, recall): (f64, u32),
        commands: &mut Vec<Command>,
    ) {
        if self.sites.get(&id).is_some_and(|site| site.recalls != recall) {
            // It has been asked again since.
            return;
        }
        if !(tokens_per_second > 0.0 && tokens_per_second <= TOKENS_PER_SECOND_MAX) {
            return self.drop_site(id, LeaveReason::Misbehaved, commands);
        }
        self.sites.hold(id, held);
        if let Some(site) = self.sites.get_mut(&id) {
            (site.is_recalled, site.is_fetching) = (false, false);
            site.speed = Speed::new(tokens_per_second);
            commands.push(Command::Send(id, Directive::Lead { term: self.term }));
            commands.push(Command::Note(Note::SiteReady { site: id, tokens_per_second }));
        }
    }

    fn applied(&mut self, id: SiteId, round: Round, state_hash: ContentHash, commands: &mut Vec<Command>) {
        let last = self.last().commit.round;
        let Some(site) = self.sites.get_mut(&id) else { return };
        let Some(since) = site.since() else { return };
        if round == site.applied {
            // Said twice: the first word counts.
            return;
        }
        if round <= since.max(site.applied) || round > last {
            return self.drop_site(id, LeaveReason::Misbehaved, commands);
        }
        site.applied = round;
        self.polls.vote(id, round, state_hash);
    }

    fn computed(
        &mut self,
        id: SiteId,
        round: Round,
        (contribution, slice_hashes): (Contribution, &[ContentHash]),
        commands: &mut Vec<Command>,
    ) {
        let Some(site) = self.sites.get_mut(&id) else { return };
        // A round that was abandoned meanwhile is owed by nobody.
        let Some(owed) = site.owed.remove(&round) else { return };
        let tokens = owed.samples * self.settings.sequence_length;
        let honest = contribution.tokens == tokens
            && contribution.loss_nats.is_finite()
            && contribution.compute_seconds.is_finite()
            && contribution.compute_seconds >= 0.0
            && slice_hashes.len() <= PARTS_MAX;
        let open = self.open.iter_mut().find(|open| open.plan.round == round);
        let fits = |open: &OpenRound| {
            // A round that has fallen back has no parts, but the site may not know that yet.
            let parts = open.reduction.as_ref().map_or(slice_hashes.len(), |reduction| reduction.parts().len());
            open.delta_bytes == contribution.delta_bytes && parts == slice_hashes.len()
        };
        if !honest || open.as_deref().is_some_and(|open| !fits(open)) {
            return self.drop_site(id, LeaveReason::Misbehaved, commands);
        }
        site.trained_tokens += tokens;
        if tokens > 0 && contribution.compute_seconds >= COMPUTE_SECONDS_MIN {
            site.speed.newest = tokens as f64 / contribution.compute_seconds;
        }
        commands.push(Command::Note(Note::Computed { site: id, round, contribution }));
        // Too late for its round: what it has learnt comes with its next delta.
        let Some(open) = open else { return };
        let merged = site.merged_tokens.get(&open.plan.fragment.index).copied().unwrap_or(0);
        let (trained_tokens, weight) = (site.trained_tokens, site.trained_tokens - merged);
        open.deliver(id, Delivery { contribution, trained_tokens, weight });
        if open.reduction.is_some() {
            return Self::tell_slices(open, id, slice_hashes, commands);
        }
        let directive = Self::delta_ready(open, id);
        tell_others(self.sites.current(), id, &directive, commands);
    }

    fn delta_ready(open: &OpenRound, site: SiteId) -> Directive {
        let contributor = open.contributor(site);
        Directive::DeltaReady { term: open.plan.term, round: open.plan.round, contributor }
    }

    fn drop_site(&mut self, site: SiteId, reason: LeaveReason, commands: &mut Vec<Command>) {
        commands.push(Command::Send(site, Directive::Dropped { reason }));
        self.remove(site, reason, commands);
    }

    fn remove(&mut self, id: SiteId, reason: LeaveReason, commands: &mut Vec<Command>) {
        if self.sites.remove(id).is_none() {
            return;
        }
        self.exchanges.links.forget(id);
        if let Some(tuning) = &mut self.tuning {
            tuning.forget(id);
        }
        self.away.left(id, reason, self.weights.get(&id).copied(), self.last().commit.round);
        commands.push(Command::Note(Note::SiteLeft { site: id, reason }));
        self.withdraw(id, matches!(reason, LeaveReason::Diverged | LeaveReason::StepsDiffer));
        self.tell_peers(commands);
    }

    /// Goes on without what a site was to do and say: it has left, or begins anew.
    fn withdraw(&mut self, id: SiteId, distrusted: bool) {
        self.polls.leave(id);
        if let Phase::Finishing(told) = &mut self.phase {
            told.remove(&id);
        }
        let mut kept = Round(0);
        for open in &mut self.open {
            if open.remove(id, self.sites.current(), distrusted) {
                kept = open.plan.round;
            }
        }
        // A delta that stays holds what was learnt in the rounds before it as well.
        for round in self.ledger.rounds_leased(id).into_iter().filter(|round| *round > kept) {
            self.ledger.give_back(round, id);
        }
        if kept > Round(0) {
            self.parted.insert(id, kept);
        }
    }

    /// Gives back what sites had trained that left before this round was committed, and whose deltas it leaves out: they may be back, and have
    /// lost it.
    fn give_back_of_the_parted(&mut self, round: Round, contributors: &[SiteId]) {
        let is_settled = |(_, kept): &(&SiteId, &Round)| **kept <= round;
        let settled: Vec<(SiteId, Round)> =
            self.parted.iter().filter(is_settled).map(|(id, kept)| (*id, *kept)).collect();
        for (id, kept) in settled {
            self.parted.remove(&id);
            if !contributors.contains(&id) {
                let leased = self.ledger.rounds_leased(id).into_iter().filter(|leased| *leased <= kept);
                leased.for_each(|leased| self.ledger.give_back(leased, id));
            }
        }
    }

    fn enforce_deadline(&mut self, now: f64, commands: &mut Vec<Command>) {
        self.tell_peers_of_the_tick(commands);
        self.drop_the_hopeless(commands);
        self.recall_the_stranded(commands);
        let Some(front) = self.open.front() else { return };
        if now <= front.deadline {
            return;
        }
        let missing = front.missing();
        for site in &missing {
            self.drop_site(*site, LeaveReason::TooSlow, commands);
        }
        if let Some(front) = self.open.front_mut()
            && front.reduction.as_ref().is_some_and(|reduction| !reduction.is_merged())
        {
            // Whoever it is that others wait for: in the mesh it is known.
            front.fall_back("it was not merged before the deadline".to_owned());
        }
        let front = self.open.front().filter(|front| front.reduction.is_none() && front.fell_back.is_none());
        for site in front.map(|front| front.held_by_nobody_else(self.sites.current())).unwrap_or_default() {
            self.drop_site(site, LeaveReason::DeltaUnwanted, commands);
        }
        for site in self.sites.current().to_vec() {
            let Some(front) = self.open.front().filter(|front| front.fell_back.is_none()) else { return };
            if !front.holds_all(site) {
                self.drop_site(site, LeaveReason::DeltasMissing, commands);
            }
        }
    }

    /// A site so far behind that nobody has the deltas any more that it lacks must fetch a state.
    fn drop_the_hopeless(&mut self, commands: &mut Vec<Command>) {
        let last = self.last().commit.round;
        let kept = self.rounds_kept();
        for site in self.sites.current().to_vec() {
            let Some(known) = self.sites.get(&site) else { continue };
            let behind = known.reached().map_or(0, |reached| last.0.saturating_sub(reached.0));
            if behind > kept {
                let slow = known.owed.keys().next().is_some_and(|round| *round <= last);
                let reason = if slow { LeaveReason::TooSlow } else { LeaveReason::DeltasMissing };
                self.drop_site(site, reason, commands);
            }
        }
    }

    fn rounds_kept(&self) -> u64 {
        self.settings.rounds_kept(self.last().commit.fragment, self.sites.current().len())
    }

    /// Takes every step that has become possible.
    fn advance(&mut self, now: f64, commands: &mut Vec<Command>) {
        self.agree(commands);
        self.tell_fallbacks(now, commands);
        self.place_newcomers(commands);
        self.drive_reductions(now, commands);
        while let Some(contributors) = self.closing(now) {
            self.commit(&contributors, now, commands);
            // A plan goes out before the next commit: where a commit takes effect must not depend on which was heard first.
            self.begin_all(now, commands);
        }
        self.abandon_without_workers(commands);
        self.begin_all(now, commands);
        self.finish(commands);
    }

    /// Settles what the state after each commit is, once every site that was sent it has said what it holds (I1).
    fn agree(&mut self, commands: &mut Vec<Command>) {
        while let Some((round, votes)) = self.polls.take_settled() {
            let state_hash = most_frequent(&votes);
            self.history.settle(round, state_hash);
            commands.push(Command::Persist(Record::StateHash { round, state_hash }));
            for (site, found) in votes.into_iter().filter(|(_, found)| *found != state_hash) {
                commands.push(Command::Note(Note::Diverged { site, round, expected: state_hash, found }));
                self.drop_site(site, LeaveReason::Diverged, commands);
            }
            commands.push(Command::Note(Note::Agreed { round, state_hash }));
        }
    }

    /// Deliveries that are enough for an open round, how long it has waited since so many came, and whether that was long enough.
    fn patience(&mut self, index: usize, now: f64) -> (usize, f64, bool) {
        let SyncSection { quorum, grace_seconds, .. } = self.settings.sync;
        let open = &mut self.open[index];
        // What misses the last round of its fragment would never be merged.
        let is_last = open.plan.first_step + open.plan.steps >= self.settings.steps_total;
        let quorum = if is_last { 1.0 } else { quorum };
        let enough = open.quorum(quorum);
        if open.deliveries.len() >= enough {
            open.quorum_since.get_or_insert(now);
        }
        let waited = open.quorum_since.map_or(0.0, |since| now - since);
        let late = open.quorum_since.is_some() && waited >= self.grace.window(open.overlap_seconds, grace_seconds);
        (enough, waited, quorum < 1.0 && late)
    }

    /// The contributors with which the oldest open round closes now, if it does.
    fn closing(&mut self, now: f64) -> Option<Vec<SiteId>> {
        if self.sites.current().is_empty() || self.open.front()?.deliveries.is_empty() {
            return None;
        }
        let (enough, waited, is_over) = self.patience(0, now);
        let window = self.grace.window(self.open[0].overlap_seconds, self.settings.sync.grace_seconds);
        let (front, current) = (self.open.front_mut()?, self.sites.current());
        if let Some(reduction) = &mut front.reduction {
            if let Some(contributors) = reduction.spread_over(current) {
                return Some(contributors.to_vec());
            }
            // Only where a quorum may close a round at all is somebody left behind who has not fetched the merge yet.
            if !is_over {
                return None;
            }
            let contributors = reduction.spread_over_some(current, enough)?.to_vec();
            let since = *reduction.spread_since.get_or_insert(now);
            return (now - since >= window).then_some(contributors);
        }
        if front.is_complete(current) {
            self.grace.observe(waited);
            return Some(front.deliveries.keys().copied().collect());
        }
        if is_over { front.common(current, enough) } else { None }
    }

    fn commit(&mut self, contributors: &[SiteId], now: f64, commands: &mut Vec<Command>) {
        let Some(open) = self.open.pop_front() else { return };
        let RoundPlan { round, first_step, steps, fragment, .. } = open.plan;
        for site in contributors {
            self.ledger.commit_through(round, *site);
            if let Some(site) = self.sites.get_mut(site) {
                site.merged_tokens.insert(fragment.index, open.deliveries[&site.peer.site].trained_tokens);
            }
        }
        self.give_back_of_the_parted(round, contributors);
        self.name_stragglers(&open, contributors, now, commands);
        self.tune(&open);
        let contributors = contributors.iter().map(|site| open.contributor(*site)).collect();
        let parts = open.reduction.as_ref().map(|reduction| reduction.merged()).unwrap_or_default();
        let (cursor, samples) = (self.ledger.cursor(), self.ledger.totals().committed);
        let step = first_step + steps;
        let commit = Commit { term: self.term, round, fragment, contributors, cursor, step, samples, parts };
        let committed = Committed { commit: commit.clone(), ledger: self.ledger.clone(), state_hash: None };
        commands.push(Command::Persist(Record::Committed(Box::new(committed.clone()))));
        // The fewer sites there are the longer they keep what was fetched: no more rounds than where there is one.
        let kept = self.settings.rounds_kept(fragment, 1);
        self.history.push(committed, kept as usize);
        self.polls.open(round, self.sites.current());
        self.ask_witnesses(&open.plan, commands);
        let commit = Arc::new(commit);
        tell(self.sites.current(), &Directive::Commit(Arc::clone(&commit)), commands);
        let (seconds, totals) = (now - open.began, self.ledger.totals());
        commands.push(Command::Note(Note::Committed { commit, seconds, totals }));
    }

    fn name_stragglers(&self, open: &OpenRound, contributors: &[SiteId], now: f64, commands: &mut Vec<Command>) {
        let waited_seconds = open.quorum_since.map_or(0.0, |since| now - since);
        // Contributors are ascending.
        for site in open.workers().filter(|site| contributors.binary_search(site).is_err()) {
            let silent = self.sites.get(&site).is_none_or(|site| now - site.heard > SILENCE_SECONDS);
            let reason = match open.deliveries.contains_key(&site) {
                true => Lateness::SlowLink,
                false if silent => Lateness::Silent,
                false => Lateness::SlowCompute,
            };
            let round = open.plan.round;
            commands.push(Command::Note(Note::Straggler { site, round, reason, waited_seconds }));
        }
    }

    /// Begins anew where nobody works any more for the round that must commit next.
    fn abandon_without_workers(&mut self, commands: &mut Vec<Command>) {
        let Some(front) = self.open.front() else { return };
        if !front.plan.assignments.is_empty() && !self.sites.current().is_empty() {
            return;
        }
        let round = front.plan.round;
        self.abandon_open();
        commands.push(Command::Note(Note::RoundAbandoned { round }));
    }

    /// Withdraws the plans of all open rounds: they will be made anew.
    fn abandon_open(&mut self) {
        for open in std::mem::take(&mut self.open) {
            let workers: Vec<SiteId> = open.workers().collect();
            for site in workers {
                self.ledger.give_back(open.plan.round, site);
            }
        }
        // Who is told of another plan for a round begins anew from the global state: nothing that it has not given to a merge is left. Nor will
        // anything be merged of those that have left.
        let parted = std::mem::take(&mut self.parted).into_keys();
        for site in self.sites.current().iter().copied().chain(parted) {
            self.ledger.rounds_leased(site).into_iter().for_each(|leased| self.ledger.give_back(leased, site));
        }
        let fragments = self.settings.sync.fragments;
        for (_, site) in self.sites.iter_mut() {
            site.owed.clear();
            site.merged_tokens = (0..fragments).map(|index| (index, site.trained_tokens)).collect();
        }
        self.flushes = self.flushes_committed();
        self.attempt += 1;
    }

    fn begin_all(&mut self, now: f64, commands: &mut Vec<Command>) {
        while matches!(self.phase, Phase::Working) && self.begin(now, commands) {}
    }

    /// Plans the next round, where one is wanted now; false where none is.
    fn begin(&mut self, now: f64, commands: &mut Vec<Command>) -> bool {
        let (last, planned_steps) = match self.open.back() {
            Some(open) => (open.plan.round, open.plan.first_step + open.plan.steps),
            None => (self.last().commit.round, self.last().commit.step),
        };
        let fragments = self.settings.sync.fragments;
        let all_planned = planned_steps >= self.settings.steps_total && self.flushes + 1 >= fragments;
        if self.stopping || (self.started && all_planned) {
            if self.open.is_empty() {
                self.phase = Phase::Finishing(BTreeSet::new());
            }
            return false;
        }
        let sites = self.sites.current().len();
        let too_few = last == Round(0) && sites < self.settings.sites as usize;
        if !self.started || sites == 0 || too_few || self.open.len() as u64 > self.lookahead() {
            return false;
        }
        if self.is_waiting() {
            return false;
        }
        let round = last.next();
        if !self.adapt(round, planned_steps, commands) {
            return false;
        }
        let (fragments, current) = (self.settings.sync.fragments, self.sites.current().to_vec());
        let steps = self.steps_of_round(round, self.settings.steps_total - planned_steps, &current);
        self.flushes = if steps == 0 { self.flushes + 1 } else { 0 };
        let fragment = FragmentPlan {
            index: fragment_of(round, fragments),
            count: fragments,
            codec: self.settings.sync.codec,
            rank: Choice::of(&self.settings.sync).rank,
        };
        let assignments = self.assign((round, planned_steps, steps), &current, commands);
        if assignments.is_empty() {
            return false;
        }
        let (term, attempt, effects) = (self.term, self.attempt, self.effects(round));
        let parts = self.parts(round, fragment, &current, commands);
        let check = self.check((term, round, attempt), &assignments);
        let first_step = planned_steps;
        let plan = RoundPlan { term, round, attempt, first_step, steps, fragment, effects, assignments, parts, check };
        self.open_round(plan, &current, now, commands);
        true
    }

    fn effects(&self, round: Round) -> Effects {
        let effects = schedule::effects(round, self.settings.steps_per_round, self.settings.sync.overlap_steps);
        effects.since(self.schedule_from.min(round))
    }

    /// Divides the samples of a round of `steps` inner steps, the first of which is number `first_step` of the run.
    fn assign(
        &mut self,
        (round, first_step, steps): (Round, u64, u64),
        current: &[SiteId],
        commands: &mut Vec<Command>,
    ) -> Vec<Assignment> {
        // A site with rounds of work before it is given no more; but in the last round of a fragment everybody delivers.
        let busy = match first_step + steps >= self.settings.steps_total {
            true => usize::MAX,
            false => self.lookahead() as usize + 1,
        };
        let is_able = |site: &SiteId| self.sites.get(site).is_some_and(|site| site.owed.len() <= busy);
        let able: Vec<SiteId> = current.iter().copied().filter(is_able).collect();
        if steps == 0 {
            let idle = |site| Assignment { site, samples: 0, steps: 0, lease: Vec::new(), share: 0.0 };
            able.iter().for_each(|site| self.owe(*site, round, 0));
            return able.into_iter().map(idle).collect();
        }
        let weights = self.weigh(&able, commands);
        let samples_total = self.settings.batch_samples * steps;
        let mut assignments = Vec::new();
        for (site, portion) in able.iter().zip(portions(self.settings.batch_samples, steps, &weights)) {
            if portion.samples > 0 {
                self.owe(*site, round, portion.samples);
                let lease = self.ledger.lease(round, *site, portion.samples);
                let share = portion.samples as f64 / samples_total as f64;
                assignments.push(Assignment {
                    site: *site,
                    samples: portion.samples,
                    steps: portion.steps,
                    lease,
                    share,
                });
            }
        }
        assignments
    }

    fn owe(&mut self, site: SiteId, round: Round, samples: u64) {
        let attempt = self.attempt;
        if let Some(site) = self.sites.get_mut(&site) {
            site.owed.insert(round, Owed { attempt, samples });
        }
    }

    fn open_round(&mut self, plan: RoundPlan, current: &[SiteId], now: f64, commands: &mut Vec<Command>) {
        let told = Arc::new(plan.clone());
        tell(current, &Directive::Begin(Arc::clone(&told)), commands);
        commands.push(Command::Note(Note::RoundStarted(told)));
        let seconds = |assignment: &Assignment| {
            let tokens = (assignment.samples * self.settings.sequence_length) as f64;
            self.sites.get(&assignment.site).map_or(0.0, |site| tokens / site.speed.newest)
        };
        let (slowest, fastest) = plan
            .assignments
            .iter()
            .map(seconds)
            .fold((0.0, f64::INFINITY), |(slowest, fastest): (f64, f64), s| (slowest.max(s), fastest.min(s)));
        let overlap = self.settings.sync.overlap_steps as f64 / plan.steps.max(1) as f64;
        // Rounds that are open before this one come first.
        let expected = slowest * (self.open.len() + 1) as f64;
        let deadline = now + DEADLINE_FACTOR * expected + self.settings.sync.deadline_seconds;
        let delta_bytes = self.settings.delta_bytes(plan.fragment);
        self.open.push_back(OpenRound::new(plan, delta_bytes, now, deadline, overlap * fastest));
    }

    /// Weight of each current site: as configured, or its measured speed, kept until the parts have moved enough.
    fn weigh(&mut self, current: &[SiteId], commands: &mut Vec<Command>) -> Vec<f64> {
        if !self.settings.sync.shares.is_empty() {
            let configured = |site: &SiteId| self.settings.sync.shares.get(site.0 as usize).copied().unwrap_or(1.0);
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
}

/// Says the same to all of these.
fn tell(sites: &[SiteId], directive: &Directive, commands: &mut Vec<Command>) {
    commands.reserve(sites.len());
    commands.extend(sites.iter().map(|site| Command::Send(*site, directive.clone())));
}

/// The same to all but one.
fn tell_others(sites: &[SiteId], but: SiteId, directive: &Directive, commands: &mut Vec<Command>) {
    commands.reserve(sites.len());
    commands.extend(sites.iter().filter(|site| **site != but).map(|site| Command::Send(*site, directive.clone())));
}

#[cfg(test)]
mod tests;
