//! The queue of events between the coordinator and the members, and what each of their commands takes.

use super::clock::{Doing, Lost};
use super::node::{Next, Node, StateFetch, Work, state_after};
use super::rates::Fault;
use super::{Fleet, FleetError, FleetOutcome, word};
use base::random::Random;
use base::{ContentHash, Round, SiteId};
use coordinator::serve::SITE_SILENCE_MAX;
use rounds::coordinator::Note;
use rounds::{
    Command, Contribution, Coordinator, Directive, Event, LeaveReason, MemberCommand, MemberEvent, Peer, Report,
};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

/// Nanoseconds in a second: times are compared as whole numbers.
const NANOSECONDS: f64 = 1e9;

/// Seconds between two ticks of the coordinator, as its shell has them.
const TICK_SECONDS: f64 = 1.0;

/// After so long a site asks again for what nobody could give.
const RETRY_SECONDS: f64 = 2.0;

/// Bytes of the state for each parameter: f32 of the parameters and of the outer momentum.
const STATE_BYTES: f64 = 8.0;

/// Of an inner step, the way forward: its backward pass is twice as much work.
const FORWARD_PART: f64 = 1.0 / 3.0;

/// A state comes in so many pieces, from each holder two at a time: the next one is on its way while one arrives, holders that send faster
/// send more, and deltas go between.
const STATE_PIECES: u64 = 256;
const STATE_PIECES_AT_ONCE: usize = 2;

/// Of what coding takes, encoding is one half and merging the other.
const CODING_PART: f64 = 0.5;

/// Something that is fetched.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Fetch {
    round: Round,
    maker: SiteId,
    hash: ContentHash,
    bytes: f64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Delta,
    /// Only its maker has it.
    Slice,
    Part,
}

/// A process of a site: its place and which process.
type Process = (usize, u64);

#[derive(Debug)]
enum Happening {
    Tick,
    ToCoordinator(Process, Box<Report>),
    ToSite(Process, Box<Directive>),
    LineLost(Process),
    Trained(Process, u64),
    Encoded(Process, u64, Round, Box<(Contribution, Vec<ContentHash>)>),
    Fetched(Process, Box<Fetch>, Process),
    Retry(Process),
    Reduced(Process, u64, Round, ContentHash),
    Merged(Process, u64, Round, ContentHash),
    /// Number of the fetch, and who has sent it.
    Piece(Process, u64, Process),
    StateUnavailable(Process),
    Restarted(Process),
    ReplicaBack(Process),
    Fault(usize, Fault),
    SpellEnds(usize),
    Back(Process),
}

struct Entry {
    at: u64,
    number: u64,
    happening: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// A run.
pub(super) struct Drive<'a> {
    fleet: &'a Fleet,
    now: f64,
    queue: BinaryHeap<Reverse<Entry>>,
    entries: u64,
    coordinator: Coordinator,
    nodes: Vec<Node>,
    /// The process of each site that the coordinator has a line to.
    lines: Vec<Option<u64>>,
    /// Of each site, what nobody could give yet.
    unanswered: Vec<Vec<Fetch>>,
    /// When the way between two sites, and each site's access out and in, is free again.
    link_free: Vec<Vec<f64>>,
    access_free: [Vec<f64>; 2],
    random: BTreeMap<(usize, Fault), Random>,
    /// Size of a delta of each fragment, and its values.
    fragments: Vec<(u64, f64)>,
    rounds_kept: u64,
    /// When the first round began.
    began: Option<f64>,
    is_done: bool,
    outcome: FleetOutcome,
    error: Option<FleetError>,
}

impl<'a> Drive<'a> {
    pub(super) fn new(fleet: &'a Fleet, seed: u64) -> Self {
        let sites = fleet.sites.len();
        let initial = ContentHash::of(b"the state that every site begins with");
        let (coordinator, _) = Coordinator::recover(fleet.settings.clone(), initial, []);
        let node = |(place, site): (usize, &super::FleetSite)| {
            Node::new(SiteId(place as u32), (site.replicas, site.tokens_per_second), initial)
        };
        let count = fleet.settings.sync.fragments;
        let plan = |index| rounds::FragmentPlan {
            index,
            count,
            codec: fleet.settings.sync.codec,
            rank: fleet.settings.sync.rank,
        };
        let fragments = (0..count)
            .map(|index| (fleet.settings.delta_bytes(plan(index)), fleet.settings.elements(plan(index)) as f64));
        let faults = (0..sites).flat_map(|place| Fault::ALL.map(|fault| (place, fault)));
        Self {
            now: 0.0,
            queue: BinaryHeap::new(),
            entries: 0,
            coordinator,
            nodes: fleet.sites.iter().enumerate().map(node).collect(),
            lines: vec![None; sites],
            unanswered: vec![Vec::new(); sites],
            link_free: vec![vec![0.0; sites]; sites],
            access_free: [vec![0.0; sites], vec![0.0; sites]],
            random: faults.map(|key| (key, Random::new(seed, ((key.0 as u64) << 8) | key.1 as u64))).collect(),
            fragments: fragments.collect(),
            rounds_kept: fleet.settings.rounds_kept(plan(0), sites),
            began: None,
            is_done: false,
            outcome: FleetOutcome::default(),
            error: None,
            fleet,
        }
    }

    pub(super) fn run(mut self) -> Result<FleetOutcome, FleetError> {
        for place in 0..self.nodes.len() {
            self.start(place);
            Fault::ALL.into_iter().for_each(|fault| self.draw(place, fault));
        }
        self.after(TICK_SECONDS, Happening::Tick);
        while let Some(Reverse(entry)) = self.queue.pop() {
            let at = entry.at as f64 / NANOSECONDS;
            if at > self.fleet.seconds || self.is_done {
                break;
            }
            self.now = at;
            self.happen(entry.happening);
            if let Some(error) = self.error.take() {
                return Err(error);
            }
        }
        if !self.is_done {
            self.now = self.fleet.seconds;
        }
        self.sum_up()
    }

    fn sum_up(mut self) -> Result<FleetOutcome, FleetError> {
        self.coordinator.ledger().audit().map_err(FleetError::Ledger)?;
        let mut trained = 0.0;
        let mut lost = Lost::default();
        for (node, site) in self.nodes.iter_mut().zip(&self.fleet.sites) {
            let (tokens, of_site) = node.tokens(self.now);
            trained += tokens;
            lost += of_site;
            self.outcome.tokens_capacity += site.tokens_per_second * self.now;
        }
        let committed = self.coordinator.ledger().totals().committed * self.fleet.settings.sequence_length;
        self.outcome.tokens_committed = committed as f64;
        lost.uncommitted = trained - self.outcome.tokens_committed;
        self.outcome.lost = lost;
        self.outcome.rounds = self.coordinator.last().commit.round.0;
        Ok(self.outcome)
    }

    fn after(&mut self, seconds: f64, happening: Happening) {
        let at = ((self.now + seconds) * NANOSECONDS) as u64;
        self.entries += 1;
        self.queue.push(Reverse(Entry { at, number: self.entries, happening }));
    }

    /// The process, if it still runs.
    fn running(&mut self, (place, process): Process) -> Option<&mut Node> {
        Some(&mut self.nodes[place]).filter(|node| node.process == process && node.member.is_some())
    }

    fn process(&self, place: usize) -> Process {
        (place, self.nodes[place].process)
    }

    /// One way between a site and the coordinator, which is at the first one.
    fn delay(&self, place: usize) -> f64 {
        self.fleet.links[place][0].round_trip_seconds / 2.0
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Tick => {
                self.decide(Event::Tick);
                self.after(TICK_SECONDS, Happening::Tick);
            }
            Happening::ToCoordinator((place, process), report) => {
                if self.lines[place] == Some(process) {
                    self.decide(Event::Reported(SiteId(place as u32), *report));
                }
            }
            Happening::ToSite(process, directive) => self.tell(process, MemberEvent::Directive(*directive)),
            Happening::LineLost((place, process)) => {
                if self.lines[place] == Some(process) {
                    self.decide(Event::Disconnected(SiteId(place as u32), LeaveReason::ConnectionLost));
                }
            }
            Happening::Trained(process, number) => {
                let now = self.now;
                if self.running(process).is_some_and(|node| node.trained(number, now)) {
                    self.drive_engine(process.0);
                }
            }
            Happening::Encoded(process, abandoned, round, given) => self.encoded(process, abandoned, round, *given),
            Happening::Fetched(process, fetch, holder) => self.fetched(process, *fetch, holder),
            Happening::Retry(process) => {
                if self.running(process).is_some() {
                    let again = std::mem::take(&mut self.unanswered[process.0]);
                    again.into_iter().for_each(|fetch| self.fetch(process.0, fetch));
                }
            }
            Happening::Reduced(process, abandoned, round, hash) => {
                if let Some(node) = self.running(process).filter(|node| node.abandoned == abandoned) {
                    node.shelf.insert((round, hash));
                    self.tell(process, MemberEvent::Reduced { round, hash });
                }
            }
            Happening::Merged(process, states, round, state_hash) => self.merged(process, states, round, state_hash),
            Happening::Piece(process, fetch, holder) => self.piece_came(process, fetch, holder),
            Happening::StateUnavailable(process) => self.tell(process, MemberEvent::StateUnavailable),
            Happening::Fault(place, fault) => self.fault(place, fault),
            Happening::SpellEnds(place) => self.change(place, |node, now| node.set_slow(1.0, now)),
            Happening::Restarted(process) => {
                if self.running(process).is_some() {
                    self.change(process.0, Node::restarted);
                    self.drive_engine(process.0);
                }
            }
            Happening::ReplicaBack(process) => {
                if self.running(process).is_some() {
                    self.change(process.0, Node::replica_back);
                }
            }
            Happening::Back((place, process)) => {
                if self.nodes[place].process == process && self.nodes[place].member.is_none() {
                    self.start(place);
                }
            }
        }
    }

    // The coordinator.

    fn decide(&mut self, event: Event) {
        self.outcome.decisions += 1;
        for command in self.coordinator.handle(event, self.now) {
            match command {
                Command::Send(site, directive) => {
                    let place = site.0 as usize;
                    if let Some(process) = self.lines[place] {
                        self.after(self.delay(place), Happening::ToSite((place, process), Box::new(directive)));
                    }
                }
                Command::Note(note) => self.note(&note),
                Command::Done => self.is_done = true,
                Command::Persist(_) => {}
            }
        }
    }

    fn note(&mut self, note: &Note) {
        match note {
            Note::SiteLeft { site, reason } => {
                self.lines[site.0 as usize] = None;
                *self.outcome.left.entry(word(*reason)).or_default() += 1;
            }
            Note::RoundStarted(_) => {
                self.began.get_or_insert(self.now);
            }
            Note::Agreed { .. } => {
                self.outcome.seconds = self.began.map_or(0.0, |began| self.now - began);
            }
            Note::RoundAbandoned { .. } => self.outcome.abandoned += 1,
            Note::Regrouped { .. } => self.outcome.regrouped += 1,
            Note::Straggler { .. } => self.outcome.stragglers += 1,
            _ => {}
        }
    }

    // Sites.

    fn start(&mut self, place: usize) {
        let now = self.now;
        self.nodes[place].start(now);
        let site = SiteId(place as u32);
        let (name, address) = (self.fleet.sites[place].name.clone(), format!("site-{place}"));
        self.decide(Event::Connected(Peer { site, name, address, fingerprint: ContentHash::default() }));
        self.lines[place] = Some(self.nodes[place].process);
        let first = self.nodes[place].member.as_ref().map(rounds::Member::start);
        self.obey(place, first.into_iter().collect());
    }

    /// Tells a member, and does what it says.
    fn tell(&mut self, process: Process, event: MemberEvent) {
        let Some(node) = self.running(process) else { return };
        let (site, Some(member)) = (node.site, node.member.as_mut()) else { return };
        match member.handle(event) {
            Ok(commands) => {
                node.term = member.term();
                self.obey(process.0, commands);
            }
            Err(error) => {
                let (seconds, what) = (self.now as u64, error.to_string());
                self.error = Some(FleetError::Refused { site, seconds, what });
            }
        }
    }

    fn obey(&mut self, place: usize, commands: Vec<MemberCommand>) {
        let process = self.process(place);
        for command in commands {
            match command {
                MemberCommand::Report(report) => {
                    self.after(self.delay(place), Happening::ToCoordinator(process, Box::new(report)));
                }
                MemberCommand::Quit(_) => {
                    if self.running(process).is_some() {
                        self.end(place, Doing::Left, self.fleet.rates.recovery_seconds);
                    }
                }
                MemberCommand::Train { plan, assignment, steps } => {
                    debug_assert!(plan.steps >= assignment.steps);
                    let twice = plan.check.filter(|check| check.site == assignment.site && steps.contains(&check.step));
                    let twice = twice.map_or(0, |check| assignment.step_samples(check.step));
                    let samples = twice + steps.map(|step| assignment.step_samples(step)).sum::<u64>();
                    self.nodes[place].push(Work::Train((samples * self.fleet.settings.sequence_length) as f64));
                }
                MemberCommand::Snapshot { plan } => self.nodes[place].push(Work::Snapshot(Box::new(plan))),
                MemberCommand::Abandon => self.nodes[place].abandon(),
                MemberCommand::FetchState { commit, state_hash, from } => {
                    self.fetch_state(place, (commit.round, state_hash), &from)
                }
                MemberCommand::FetchDelta { round, contributor, .. } => {
                    let (maker, hash, bytes) =
                        (contributor.site, contributor.delta_hash, contributor.delta_bytes as f64);
                    self.fetch(place, Fetch { round, maker, hash, bytes, kind: Kind::Delta });
                }
                MemberCommand::FetchSlice { round, fragment, values, from, hash } => {
                    let (delta_bytes, elements) = self.fragments[fragment.index as usize];
                    let bytes = (values.end - values.start) as f64 * delta_bytes as f64 / elements;
                    self.fetch(place, Fetch { round, maker: from, hash, bytes, kind: Kind::Slice });
                }
                MemberCommand::FetchPart { round, part, .. } => {
                    let (maker, bytes) = (part.part.site, part.part.merged_bytes() as f64);
                    self.fetch(place, Fetch { round, maker, hash: part.hash, bytes, kind: Kind::Part });
                }
                MemberCommand::Reduce { round, values, contributors, .. } => {
                    let bytes = 4.0 * (values.end - values.start) as f64 * contributors.len() as f64;
                    let hash = state_after(ContentHash::default(), &reduction(round, contributors, values.start));
                    let abandoned = self.nodes[place].abandoned;
                    self.host(place, bytes, Happening::Reduced(process, abandoned, round, hash));
                }
                MemberCommand::Merge(commit) => {
                    let (_, elements) = self.fragments[commit.fragment.index as usize];
                    let state_hash = state_after(self.nodes[place].held.1, &commit);
                    let states = self.nodes[place].states;
                    self.host(place, 4.0 * elements, Happening::Merged(process, states, commit.round, state_hash));
                }
                // A few of the steps that are made twice are made by others as well: that is no part of the model.
                MemberCommand::Witness { .. } => {}
                MemberCommand::Apply { round } => self.validate(place, round),
                MemberCommand::Peers(_) | MemberCommand::Finish { .. } => {}
            }
        }
        if self.nodes[place].member.is_some() {
            self.drive_engine(place);
        }
    }

    /// The first site measures the loss of what it has merged.
    fn validate(&mut self, place: usize, round: Round) {
        let due = self.fleet.validation.filter(|due| place == 0 && round.0.is_multiple_of(due.every_rounds.max(1)));
        if let Some(due) = due {
            self.nodes[place].push(Work::Evaluate(due.tokens * FORWARD_PART));
        }
    }

    /// The host works through so many bytes of f32.
    fn host(&mut self, place: usize, bytes: f64, happening: Happening) {
        let seconds = CODING_PART * bytes / self.fleet.coding_bytes_per_second;
        let done = self.nodes[place].host(seconds, self.now);
        self.after(done - self.now, happening);
    }

    fn drive_engine(&mut self, place: usize) {
        let (now, process) = (self.now, self.process(place));
        while let Some(next) = self.nodes[place].go_on(now) {
            match next {
                Next::Trains { until, number } => self.after(until - now, Happening::Trained(process, number)),
                Next::Idle => return,
                Next::Taken { plan, compute_seconds } => {
                    let (delta_bytes, elements) = self.fragments[plan.fragment.index as usize];
                    let (node, sequence) = (&self.nodes[place], self.fleet.settings.sequence_length);
                    let given = Box::new(node.contribution(&plan, sequence, delta_bytes, compute_seconds));
                    let encoded = Happening::Encoded(process, node.abandoned, plan.round, given);
                    self.host(place, 4.0 * elements, encoded);
                }
            }
        }
    }

    fn encoded(&mut self, process: Process, abandoned: u64, round: Round, given: (Contribution, Vec<ContentHash>)) {
        let Some(node) = self.running(process).filter(|node| node.abandoned == abandoned) else { return };
        let (contribution, slice_hashes) = given;
        node.shelf.insert((round, contribution.delta_hash));
        node.shelf.extend(slice_hashes.iter().map(|hash| (round, *hash)));
        self.tell(process, MemberEvent::Encoded { round, contribution, slice_hashes });
    }

    fn merged(&mut self, process: Process, states: u64, round: Round, state_hash: ContentHash) {
        let (every, kept) = (self.fleet.checkpoint_rounds.max(1), self.rounds_kept);
        let Some(node) = self.running(process).filter(|node| node.states == states) else { return };
        node.held = (round, state_hash);
        if round.0.is_multiple_of(every) {
            node.saved = node.held;
        }
        node.forget_before(Round(round.0.saturating_sub(kept)));
        self.tell(process, MemberEvent::Merged { round, state_hash });
    }

    // Transfers.

    /// When so many bytes will have come from one site to another, after all that is on the way.
    fn transfer(&mut self, from: usize, to: usize, bytes: f64) -> f64 {
        let link = self.fleet.links[from][to];
        let link_free = &mut self.link_free[from][to];
        *link_free = link_free.max(self.now) + bytes / link.bytes_per_second;
        let mut done = *link_free;
        for (way, end) in [from, to].into_iter().enumerate() {
            if let Some(rate) = self.fleet.sites[end].access_bytes_per_second {
                let access_free = &mut self.access_free[way][end];
                *access_free = access_free.max(self.now) + bytes / rate;
                done = done.max(*access_free);
            }
        }
        done - self.now + link.round_trip_seconds
    }

    /// The site that has it: its maker, or else the first other one.
    fn holder(&self, place: usize, fetch: &Fetch) -> Option<usize> {
        let has = |holder: usize| {
            let node = &self.nodes[holder];
            holder != place && node.member.is_some() && node.shelf.contains(&(fetch.round, fetch.hash))
        };
        let maker = fetch.maker.0 as usize;
        match has(maker) {
            true => Some(maker),
            false if fetch.kind == Kind::Slice => None,
            false => (0..self.nodes.len()).find(|holder| has(*holder)),
        }
    }

    fn fetch(&mut self, place: usize, fetch: Fetch) {
        let process = self.process(place);
        let merged = self.nodes[place].member.as_ref().map_or(Round(0), rounds::Member::round);
        match self.holder(place, &fetch) {
            Some(holder) => {
                let seconds = self.transfer(holder, place, fetch.bytes);
                let holder = self.process(holder);
                self.after(seconds, Happening::Fetched(process, Box::new(fetch), holder));
            }
            // What a merge needs is asked for again, until it has been merged or is void.
            None if fetch.round > merged => {
                if self.unanswered[place].is_empty() {
                    self.after(RETRY_SECONDS, Happening::Retry(process));
                }
                self.unanswered[place].push(fetch);
            }
            None => {}
        }
    }

    fn fetched(&mut self, process: Process, fetch: Fetch, holder: Process) {
        let is_there = self.running(holder).is_some();
        let Some(node) = self.running(process) else { return };
        if !is_there {
            return self.fetch(process.0, fetch);
        }
        let Fetch { round, maker: from, hash, bytes, kind } = fetch;
        if kind != Kind::Slice {
            node.shelf.insert((round, hash));
        }
        self.outcome.fetched_bytes += bytes;
        self.tell(
            process,
            match kind {
                Kind::Delta => MemberEvent::DeltaHeld { round, from },
                Kind::Slice => MemberEvent::SliceHeld { round, from },
                Kind::Part => MemberEvent::PartHeld { round, from },
            },
        );
    }

    fn fetch_state(&mut self, place: usize, state: (Round, ContentHash), from: &[SiteId]) {
        let there = from.iter().map(|site| site.0 as usize).filter(|holder| *holder != place);
        let there = there.filter(|holder| self.nodes[*holder].member.is_some());
        let holders: Vec<Process> = there.map(|holder| self.process(holder)).collect();
        let (process, node) = (self.process(place), &mut self.nodes[place]);
        node.fetches += 1;
        let number = node.fetches;
        node.fetching =
            Some(StateFetch { state, holders: holders.clone(), pieces_left: STATE_PIECES, pieces_coming: 0 });
        if holders.is_empty() {
            return self.after(RETRY_SECONDS, Happening::StateUnavailable(process));
        }
        for holder in holders.iter().cycle().take(holders.len() * STATE_PIECES_AT_ONCE) {
            self.ask_for_piece(process, number, *holder);
        }
    }

    /// Asks a holder for a piece, if one is left.
    fn ask_for_piece(&mut self, process: Process, number: u64, holder: Process) {
        let Some(fetching) = &mut self.nodes[process.0].fetching else { return };
        if fetching.pieces_left > 0 {
            (fetching.pieces_left, fetching.pieces_coming) = (fetching.pieces_left - 1, fetching.pieces_coming + 1);
            let bytes = STATE_BYTES * self.fleet.settings.schema.elements() as f64 / STATE_PIECES as f64;
            let seconds = self.transfer(holder.0, process.0, bytes);
            self.after(seconds, Happening::Piece(process, number, holder));
        }
    }

    fn piece_came(&mut self, process: Process, number: u64, holder: Process) {
        let is_there = self.running(holder).is_some();
        let Some(node) = self.running(process).filter(|node| node.fetches == number) else { return };
        let Some(fetching) = &mut node.fetching else { return };
        fetching.pieces_coming -= 1;
        if !is_there {
            // What it was sending comes from another one.
            fetching.pieces_left += 1;
            fetching.holders.retain(|other| *other != holder);
        }
        let sender = if is_there { Some(holder) } else { fetching.holders.first().copied() };
        if let Some(sender) = sender.filter(|_| fetching.pieces_left > 0) {
            return self.ask_for_piece(process, number, sender);
        }
        if fetching.pieces_coming == 0 {
            let (is_whole, state) = (fetching.pieces_left == 0, fetching.state);
            node.fetching = None;
            self.state_came(process, is_whole.then_some(state));
        }
    }

    fn state_came(&mut self, process: Process, state: Option<(Round, ContentHash)>) {
        let Some((round, state_hash)) = state else { return self.tell(process, MemberEvent::StateUnavailable) };
        let Some(node) = self.running(process) else { return };
        node.states += 1;
        (node.held, node.saved) = ((round, state_hash), (round, state_hash));
        self.tell(process, MemberEvent::StateHeld { round, state_hash });
    }

    // Faults.

    /// Draws when that fault next befalls a site: times between faults are exponential.
    fn draw(&mut self, place: usize, fault: Fault) {
        let per_second = self.fleet.rates.per_second(fault, self.fleet.sites[place].devices);
        if per_second > 0.0
            && let Some(random) = self.random.get_mut(&(place, fault))
        {
            let seconds = -libm::log(1.0 - random.next_unit()) / per_second;
            self.after(seconds, Happening::Fault(place, fault));
        }
    }

    fn fault(&mut self, place: usize, fault: Fault) {
        self.draw(place, fault);
        if self.nodes[place].member.is_none() {
            return;
        }
        let rates = self.fleet.rates;
        let process = self.process(place);
        match fault {
            Fault::Failure if self.nodes[place].lose_replica(self.now) => {
                self.after(rates.restart_seconds, Happening::Restarted(process));
                self.after(rates.recovery_seconds.max(rates.restart_seconds), Happening::ReplicaBack(process));
            }
            Fault::Failure => {
                self.after(SITE_SILENCE_MAX.as_secs_f64(), Happening::LineLost(process));
                self.end(place, Doing::Failed, rates.recovery_seconds);
            }
            Fault::Stop => self.leave(place, Doing::Stopped, rates.recovery_seconds),
            Fault::Leave => self.leave(place, Doing::Left, rates.away_seconds),
            Fault::Slow if self.nodes[place].is_slow() => return,
            Fault::Slow => {
                let (least, most) = rates.spell_seconds;
                let part = self.random.get_mut(&(place, fault)).map_or(0.5, Random::next_unit);
                let seconds = least * libm::exp(part * libm::log(most / least));
                self.change(place, |node, now| node.set_slow(1.0 / rates.slow_factor, now));
                self.after(seconds, Happening::SpellEnds(place));
            }
        }
        *self.outcome.faults.entry(fault).or_default() += 1;
    }

    /// The pace of a site changes.
    fn change(&mut self, place: usize, change: impl FnOnce(&mut Node, f64) -> Option<Next>) {
        let (now, process) = (self.now, self.process(place));
        if let Some(Next::Trains { until, number }) = change(&mut self.nodes[place], now) {
            self.after(until - now, Happening::Trained(process, number));
        }
    }

    /// It is asked to stop: it saves what it holds, says that it leaves, and ends.
    fn leave(&mut self, place: usize, doing: Doing, seconds: f64) {
        let process = self.process(place);
        let asked = self.nodes[place].member.as_mut().map(|member| member.handle(MemberEvent::StopRequested));
        for command in asked.and_then(Result::ok).into_iter().flatten() {
            if let MemberCommand::Report(report) = command {
                self.after(self.delay(place), Happening::ToCoordinator(process, Box::new(report)));
            }
        }
        self.nodes[place].saved = self.nodes[place].held;
        self.end(place, doing, seconds);
    }

    fn end(&mut self, place: usize, doing: Doing, seconds: f64) {
        self.nodes[place].end(doing, self.now);
        self.unanswered[place].clear();
        self.after(seconds, Happening::Back(self.process(place)));
    }
}

/// What a merged part depends on.
fn reduction(round: Round, contributors: Vec<rounds::Contributor>, first_value: u64) -> rounds::Commit {
    rounds::Commit { round, contributors, cursor: first_value, step: first_value, ..rounds::Commit::initial() }
}
