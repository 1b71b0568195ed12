//! Coordinator and members together, without tensors, sockets or threads: a "state" is the hash of the commits that
//! made it. A seeded scheduler delivers messages in any order that the connections allow, takes sites away and
//! brings them back. Invariants I1, I2 and I3 are checked after every step.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use base::config::{Exchange, Strategy, SyncSection};
use base::random::Random;
use base::{ContentHash, ParameterSchema, Round, SiteId};
use rounds::adaptive::Choice;
use rounds::coordinator::{Lateness, Note, Record};
use rounds::exchange::is_cut;
use rounds::plan::{
    Contribution, Contributor, Directive, LINK_REPORTS_MAX, LeaveReason, LinkReport, Measurement, Peer, Report,
};
use rounds::{Command, Coordinator, Event, FragmentPlan, Member, MemberCommand, MemberEvent, RoundPlan, Settings};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

const INITIAL: ContentHash = ContentHash([7; 32]);

const STEPS_PER_ROUND: u64 = 4;

/// Parameters in each of eight layers.
const LAYER_ELEMENTS: usize = 100;

/// How the rounds of a test overlap.
#[derive(Debug, Clone, Copy)]
struct Shape {
    fragments: u32,
    overlap_steps: u64,
    quorum: f64,
    exchange: Exchange,
}

impl Shape {
    const fn mesh(fragments: u32, overlap_steps: u64, quorum: f64) -> Self {
        Self { fragments, overlap_steps, quorum, exchange: Exchange::Mesh }
    }

    const fn sharded(self) -> Self {
        Self { exchange: Exchange::Sharded, ..self }
    }
}

const DILOCO: Shape = Shape::mesh(1, 0, 1.0);

const STREAMING: [Shape; 6] = [
    Shape::mesh(1, 1, 1.0),
    Shape::mesh(1, 3, 0.5),
    Shape::mesh(2, 0, 1.0),
    Shape::mesh(2, 5, 0.5),
    Shape::mesh(4, 8, 1.0),
    Shape::mesh(4, 15, 1.0),
];

fn settings(sites: u32, rounds: u64, shape: Shape) -> Settings {
    let Shape { fragments, overlap_steps, quorum, exchange } = shape;
    let strategy = if fragments == 1 && overlap_steps == 0 { Strategy::DiLoCo } else { Strategy::Streaming };
    let inner_steps = STEPS_PER_ROUND * u64::from(fragments);
    let sync = SyncSection {
        strategy,
        inner_steps,
        fragments,
        overlap_steps,
        quorum,
        exchange,
        // Reducers take turns of some tenths of a second.
        grace_seconds: match exchange {
            Exchange::Sharded if quorum == 1.0 => 5.0,
            Exchange::Sharded => 1.0,
            _ => 0.2,
        },
        deadline_seconds: 10.0,
        ..SyncSection::default()
    };
    Settings {
        sites,
        batch_samples: 8,
        sequence_length: 16,
        steps_per_round: STEPS_PER_ROUND,
        steps_total: STEPS_PER_ROUND * rounds,
        seed: 0,
        sync,
        schema: ParameterSchema::new((0..8).map(|layer| (format!("layers.{layer}.weight"), vec![LAYER_ELEMENTS]))),
    }
}

/// The hash that stands for the global state after a commit.
fn state_after(before: ContentHash, commit: &rounds::Commit) -> ContentHash {
    let mut hasher = ContentHash::hasher();
    hasher.update(&before.0);
    hasher.update(&commit.round.0.to_le_bytes());
    for contributor in &commit.contributors {
        hasher.update(&contributor.site.0.to_le_bytes());
        hasher.update(&contributor.delta_hash.0);
    }
    ContentHash::finish(&hasher)
}

/// The hash that stands for some values of a delta.
fn slice_of(delta: ContentHash, values: &Range<u64>) -> ContentHash {
    ContentHash::of(&[&delta.0[..], &values.start.to_le_bytes(), &values.end.to_le_bytes()].concat())
}

/// The hash that stands for the merge of those values.
fn merge_of(contributors: &[Contributor], values: &Range<u64>) -> ContentHash {
    let mut hasher = ContentHash::hasher();
    for contributor in contributors {
        hasher.update(&contributor.site.0.to_le_bytes());
        hasher.update(&contributor.tokens.to_le_bytes());
        hasher.update(&slice_of(contributor.delta_hash, values).0);
    }
    ContentHash::finish(&hasher)
}

/// What an engine was told, in words.
type Trace = Vec<String>;

struct FakeSite {
    member: Member,
    state: (Round, ContentHash),
    inbox: VecDeque<Directive>,
    /// What it has said and the coordinator has not heard, where that takes time.
    outbox: VecDeque<Report>,
    /// Work that is done in order, by the engine and by the host.
    engine: VecDeque<MemberCommand>,
    host: VecDeque<HostWork>,
    /// Transfers, which end in any order.
    transfers: Vec<Transfer>,
    /// What others can fetch from it.
    served: BTreeSet<ContentHash>,
    /// Slices that it holds.
    slices: BTreeMap<(Round, SiteId), ContentHash>,
    trace: Trace,
    /// Inner steps made, and the last commit that the engine has taken over.
    applied: Round,
}

enum HostWork {
    Encode(RoundPlan),
    Reduce { round: Round, values: Range<u64>, contributors: Vec<Contributor> },
    Merge(rounds::Commit),
}

/// Something that is fetched.
struct Transfer {
    event: MemberEvent,
    hash: ContentHash,
    from: Source,
}

/// Who must have it before it can come.
#[derive(Clone, Copy)]
enum Source {
    /// Nobody: a delta or state that several hold. It may be lost with all of them; then whoever lacks it is dropped and comes back, which
    /// nobody does here.
    Several,
    Anybody,
    Only(SiteId),
}

struct World {
    coordinator: Coordinator,
    sites: BTreeMap<SiteId, FakeSite>,
    records: Vec<Record>,
    /// Records when the last plan was made.
    plan_records: usize,
    agreed: BTreeMap<Round, ContentHash>,
    stragglers: Vec<(SiteId, Lateness)>,
    now: f64,
    random: Random,
    done: bool,
    commits: u64,
    shape: Shape,
    settings: Settings,
    /// The newest plan.
    plan: Option<RoundPlan>,
    /// What sites say of their links, by round.
    link_bytes_per_second: fn(Round) -> f64,
    traces: BTreeMap<SiteId, Trace>,
    /// Sites whose engine stands still.
    stuck: Vec<SiteId>,
    /// Sites whose host does nothing for others.
    idle_reducers: Vec<SiteId>,
    /// Whether rounds are sharded, as people were told.
    exchanges: Vec<(Round, bool)>,
    /// Merged parts that were fetched because of a commit.
    parts_caught_up: usize,
    /// Whether messages come late in both directions, and some of them twice.
    repeats: bool,
}

impl World {
    fn new(seed: u64, sites: u32, rounds: u64, shape: Shape) -> Self {
        Self::of(seed, settings(sites, rounds, shape), shape)
    }

    fn of(seed: u64, settings: Settings, shape: Shape) -> Self {
        let sites = settings.sites;
        let (coordinator, record) = Coordinator::recover(settings.clone(), INITIAL, []);
        let mut world = Self {
            coordinator,
            sites: BTreeMap::new(),
            records: vec![record],
            plan_records: 0,
            agreed: BTreeMap::from([(Round(0), INITIAL)]),
            stragglers: Vec::new(),
            now: 0.0,
            random: Random::new(seed, 0),
            done: false,
            commits: 0,
            shape,
            settings,
            plan: None,
            link_bytes_per_second: |_| 1.0,
            traces: BTreeMap::new(),
            stuck: Vec::new(),
            idle_reducers: Vec::new(),
            exchanges: Vec::new(),
            parts_caught_up: 0,
            repeats: false,
        };
        (0..sites).for_each(|site| world.join(SiteId(site), (Round(0), INITIAL)));
        world
    }

    fn join(&mut self, site: SiteId, state: (Round, ContentHash)) {
        let speed = 100.0 * f64::from(site.0 + 1);
        let member = Member::new(site, state.0, state.1, speed);
        let MemberCommand::Report(ready) = member.start() else { panic!("a site starts with a report") };
        let (inbox, engine, host, outbox) = Default::default();
        let (transfers, trace, applied) = (Vec::new(), Vec::new(), state.0);
        let (served, slices) = (BTreeSet::new(), BTreeMap::new());
        let fake = FakeSite { member, state, inbox, outbox, engine, host, transfers, served, slices, trace, applied };
        self.sites.insert(site, fake);
        let peer = Peer { site, name: format!("site-{site}"), address: "127.0.0.1:1".to_owned(), fingerprint: INITIAL };
        self.tell_coordinator(Event::Connected(peer));
        self.tell_coordinator(Event::Reported(site, ready));
    }

    fn tell_coordinator(&mut self, event: Event) {
        for command in self.coordinator.handle(event, self.now) {
            match command {
                Command::Persist(record) => {
                    match &record {
                        Record::Committed(committed) => {
                            self.commits += 1;
                            assert!(committed.commit.contributors.is_sorted_by_key(|contributor| contributor.site));
                        }
                        // The commits after it are void: nobody held their states any more.
                        Record::RolledBack { to } => self.agreed.retain(|round, _| round <= to),
                        _ => {}
                    }
                    self.records.push(record);
                }
                Command::Send(site, directive) => {
                    let copies = self.copies();
                    if let Some(site) = self.sites.get_mut(&site) {
                        site.inbox.extend(vec![directive; copies]);
                    }
                }
                Command::Done => self.done = true,
                Command::Note(Note::Straggler { site, reason, .. }) => self.stragglers.push((site, reason)),
                Command::Note(Note::RoundStarted(plan)) => {
                    (self.plan, self.plan_records) = (Some(Arc::unwrap_or_clone(plan)), self.records.len());
                }
                Command::Note(Note::ExchangeChosen { round, is_sharded, .. }) => {
                    self.exchanges.push((round, is_sharded))
                }
                Command::Note(_) => {}
            }
        }
        self.coordinator.ledger().audit().unwrap();
    }

    fn tell_site(&mut self, id: SiteId, event: MemberEvent) {
        let Some(site) = self.sites.get_mut(&id) else { return };
        let by_commit = matches!(event, MemberEvent::Directive(Directive::Commit(_)));
        let commands = site.member.handle(event).unwrap_or_else(|error| panic!("site {id}: {error}"));
        for command in commands {
            let Some(site) = self.sites.get_mut(&id) else { return };
            match command {
                MemberCommand::Report(report) => {
                    if let Report::Ready { round, .. } = report {
                        // The engine begins anew from that state.
                        (site.applied, site.engine) = (round, VecDeque::new());
                    }
                    self.say(id, report);
                }
                MemberCommand::FetchState { commit, state_hash, from } => {
                    let held = (commit.round, state_hash);
                    // A real site offers the state that it holds now, and one that somebody is fetching.
                    let found = from.iter().any(|peer| self.sites.get(peer).is_some_and(|peer| peer.state == held));
                    let site = self.sites.get_mut(&id).unwrap();
                    let event = if found {
                        (site.state, site.applied) = (held, held.0);
                        MemberEvent::StateHeld { round: commit.round, state_hash }
                    } else {
                        MemberEvent::StateUnavailable
                    };
                    site.transfers.push(Transfer { event, hash: state_hash, from: Source::Several });
                }
                MemberCommand::Train { .. } | MemberCommand::Snapshot { .. } | MemberCommand::Apply { .. } => {
                    site.engine.push_back(command);
                }
                MemberCommand::Abandon => {
                    site.engine.retain(|work| matches!(work, MemberCommand::Apply { .. }));
                    site.host.retain(|work| matches!(work, HostWork::Merge(_)));
                }
                MemberCommand::FetchDelta { round, contributor, .. } => {
                    let event = MemberEvent::DeltaHeld { round, from: contributor.site };
                    site.transfers.push(Transfer { event, hash: contributor.delta_hash, from: Source::Several });
                }
                MemberCommand::FetchSlice { round, from, hash, .. } => {
                    let event = MemberEvent::SliceHeld { round, from };
                    site.transfers.push(Transfer { event, hash, from: Source::Only(from) });
                }
                MemberCommand::FetchPart { round, part, .. } => {
                    let event = MemberEvent::PartHeld { round, from: part.part.site };
                    self.parts_caught_up += usize::from(by_commit);
                    let is_late = by_commit || self.shape.quorum < 1.0;
                    let from = if is_late { Source::Several } else { Source::Anybody };
                    site.transfers.push(Transfer { event, hash: part.hash, from });
                }
                MemberCommand::Reduce { round, values, contributors, .. } => {
                    site.host.push_back(HostWork::Reduce { round, values, contributors });
                }
                MemberCommand::Merge(commit) => site.host.push_back(HostWork::Merge(commit)),
                MemberCommand::Finish { state_hash, round } => {
                    assert_eq!(site.state, (round, state_hash));
                    self.traces.insert(id, site.trace.clone());
                }
                MemberCommand::Quit(_) => {
                    self.sites.remove(&id);
                    return;
                }
                MemberCommand::Peers(_) | MemberCommand::Witness { .. } => {}
            }
        }
    }

    /// How often the next message comes.
    fn copies(&mut self) -> usize {
        if self.repeats { 1 + self.random.next_below(2) as usize } else { 1 }
    }

    /// A site says something, which is heard at once or in its turn.
    fn say(&mut self, id: SiteId, report: Report) {
        if !self.repeats {
            return self.tell_coordinator(Event::Reported(id, report));
        }
        let copies = self.copies();
        self.sites.get_mut(&id).unwrap().outbox.extend(vec![report; copies]);
    }

    /// The engine of a site does the next thing that it was told.
    fn engine_step(&mut self, id: SiteId) {
        let site = self.sites.get_mut(&id).unwrap();
        match site.engine.pop_front() {
            Some(MemberCommand::Train { plan, steps, .. }) => {
                site.trace.push(format!("train {} {steps:?}", plan.round));
            }
            Some(MemberCommand::Apply { round }) => {
                assert_eq!(round, site.applied.next(), "commits take effect in order");
                assert!(round <= site.member.round(), "what is taken over has been merged");
                site.applied = round;
                site.trace.push(format!("apply {round}"));
            }
            Some(MemberCommand::Snapshot { plan }) => {
                let before = Round(plan.round.0.saturating_sub(u64::from(plan.fragment.count)));
                assert!(site.applied >= before, "a fragment is in flight twice");
                site.trace.push(format!("snapshot {}", plan.round));
                site.host.push_back(HostWork::Encode(plan));
            }
            _ => {}
        }
    }

    fn host_step(&mut self, id: SiteId) {
        let site = self.sites.get_mut(&id).unwrap();
        match site.host.pop_front() {
            Some(HostWork::Encode(plan)) => {
                let assignment = plan.assignments.iter().find(|assignment| assignment.site == id).unwrap();
                assert!(site.state.0 < plan.round, "a snapshot is encoded against the state before its round");
                let tokens = assignment.samples * 16;
                let delta_hash = ContentHash::of(format!("{} {} {:?}", plan.round, id, assignment.lease).as_bytes());
                let delta_bytes = self.settings.delta_bytes(plan.fragment);
                // Steps take as long in every round.
                let compute_seconds = plan.steps as f64 / STEPS_PER_ROUND as f64;
                let contribution = Contribution { tokens, delta_hash, delta_bytes, loss_nats: 1.0, compute_seconds };
                if self.settings.sync.adaptive {
                    let measurement = self.measurement(id, plan.round);
                    self.tell_coordinator(Event::Reported(id, Report::Measured { round: plan.round, measurement }));
                }
                let slice_hashes: Vec<ContentHash> =
                    plan.parts.iter().map(|part| slice_of(delta_hash, &part.values)).collect();
                let site = self.sites.get_mut(&id).unwrap();
                site.served.extend(slice_hashes.iter().copied().chain([delta_hash]));
                for part in plan.parts.iter().filter(|part| part.site == id) {
                    site.slices.insert((plan.round, id), slice_of(delta_hash, &part.values));
                }
                self.tell_site(id, MemberEvent::Encoded { round: plan.round, contribution, slice_hashes });
            }
            Some(HostWork::Reduce { .. }) if self.idle_reducers.contains(&id) => {}
            Some(HostWork::Reduce { round, values, contributors }) => {
                for contributor in &contributors {
                    let slice = site.slices[&(round, contributor.site)];
                    assert_eq!(slice, slice_of(contributor.delta_hash, &values), "a slice of another delta");
                }
                let hash = merge_of(&contributors, &values);
                site.served.insert(hash);
                self.tell_site(id, MemberEvent::Reduced { round, hash });
            }
            Some(HostWork::Merge(commit)) => {
                assert!(commit.parts.is_empty() || is_cut(commit.parts.iter().map(|merged| &merged.part)));
                for merged in &commit.parts {
                    assert_eq!(merged.hash, merge_of(&commit.contributors, &merged.part.values), "{}", commit.round);
                }
                let state_hash = state_after(site.state.1, &commit);
                site.state = (commit.round, state_hash);
                let expected = *self.agreed.entry(commit.round).or_insert(state_hash);
                assert_eq!(state_hash, expected, "I1 and I3: round {} has two states", commit.round);
                self.tell_site(id, MemberEvent::Merged { round: commit.round, state_hash });
            }
            None => {}
        }
    }

    fn measurement(&self, id: SiteId, round: Round) -> Measurement {
        let bytes_per_second = (self.link_bytes_per_second)(round);
        let link = |from| LinkReport { from, bytes_per_second, round_trip_seconds: 0.01, loss: 0.0 };
        let links = self.sites.keys().copied().filter(|site| *site != id).map(link).collect();
        Measurement { lost_part: 0.1, encode_seconds: 1e-4, merge_seconds: 1e-4, links }
    }

    /// The coordinator's process ends, and another one goes on with its log.
    fn restart_coordinator(&mut self) {
        let held: Vec<(SiteId, (Round, ContentHash))> = self.sites.iter().map(|(id, site)| (*id, site.state)).collect();
        self.sites.clear();
        let (coordinator, record) = Coordinator::recover(self.settings.clone(), INITIAL, self.records.clone());
        assert!(coordinator.term() > self.coordinator.term());
        self.coordinator = coordinator;
        self.records.push(record);
        held.into_iter().for_each(|(site, state)| self.join(site, state));
    }

    /// Sites that the coordinator went on without come back with nothing, as their people are told to let them.
    fn bring_back_the_dropped(&mut self, sites: u32) {
        for site in (0..sites).map(SiteId) {
            if !self.done && !self.sites.contains_key(&site) {
                self.join(site, (Round(0), INITIAL));
            }
        }
    }

    /// What the log said of changed settings when the last plan was made, in order.
    fn changes_before_plan(&self) -> Vec<(Round, Choice)> {
        Self::changes_in(&self.records[..self.plan_records])
    }

    /// What the log says of changed settings, in order.
    fn changes(&self) -> Vec<(Round, Choice)> {
        Self::changes_in(&self.records)
    }

    fn changes_in(records: &[Record]) -> Vec<(Round, Choice)> {
        let change = |record: &Record| match record {
            Record::SettingsChanged { round, choice, .. } => Some((*round, *choice)),
            _ => None,
        };
        records.iter().filter_map(change).collect()
    }

    /// A transfer ends, if somebody has what it fetches.
    fn transfer(&mut self, id: SiteId, index: usize) {
        let Transfer { hash, from, .. } = self.sites[&id].transfers[index];
        let can_come = match from {
            Source::Several => true,
            Source::Anybody => self.sites.values().any(|site| site.served.contains(&hash)),
            Source::Only(maker) => self.sites.get(&maker).is_some_and(|site| site.served.contains(&hash)),
        };
        if !can_come {
            return;
        }
        let site = self.sites.get_mut(&id).unwrap();
        let event = site.transfers.remove(index).event;
        site.served.insert(hash);
        if let MemberEvent::SliceHeld { round, from } = event {
            site.slices.insert((round, from), hash);
        }
        self.tell_site(id, event);
    }

    /// One random thing that can happen now.
    fn step(&mut self) {
        // Messages that are late are not so late that their site is given up.
        self.now += if self.repeats { 0.001 } else { 0.01 };
        let ids: Vec<SiteId> = self.sites.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = ids[self.random.next_below(ids.len() as u64) as usize];
        let choice = self.random.next_below(if self.repeats { 6 } else { 5 });
        let site = self.sites.get_mut(&id).unwrap();
        match choice {
            0 if !self.stuck.contains(&id) => self.engine_step(id),
            1 => self.host_step(id),
            2 if !site.transfers.is_empty() => {
                let index = self.random.next_below(site.transfers.len() as u64) as usize;
                self.transfer(id, index);
            }
            3 => {
                if let Some(directive) = site.inbox.pop_front() {
                    self.tell_site(id, MemberEvent::Directive(directive));
                }
            }
            4 => self.tell_coordinator(Event::Tick),
            5 => {
                if let Some(report) = site.outbox.pop_front() {
                    self.tell_coordinator(Event::Reported(id, report));
                }
            }
            _ => {}
        }
    }

    fn run(&mut self, steps_max: usize) {
        for _ in 0..steps_max {
            if self.done {
                return;
            }
            self.step();
        }
    }

    fn rounds_total(&self, rounds: u64) -> u64 {
        rounds + u64::from(self.shape.fragments) - 1
    }
}

fn shapes() -> impl Iterator<Item = Shape> {
    let mesh = || std::iter::once(DILOCO).chain(STREAMING);
    mesh().chain(mesh().map(Shape::sharded))
}

/// Commits so far, with whether they were sharded.
fn commits(world: &World) -> impl Iterator<Item = &rounds::Commit> {
    world.records.iter().filter_map(|record| match record {
        Record::Committed(committed) => Some(&committed.commit),
        _ => None,
    })
}

#[test]
fn three_sites_finish_with_one_state() {
    for (seed, shape) in (0..30).flat_map(|seed| shapes().map(move |shape| (seed, shape))) {
        let mut world = World::new(seed, 3, 6, shape);
        world.run(50_000);
        assert!(world.done, "seed {seed}, {shape:?}: stuck after {} commits", world.commits);
        assert_eq!(world.commits, world.rounds_total(6), "seed {seed}, {shape:?}");
        let totals = world.coordinator.ledger().totals();
        let sums = (totals.committed, totals.returned, totals.lost, totals.open);
        assert_eq!(sums, (6 * 4 * 8, 0, 0, 0), "seed {seed}, {shape:?}");
        let sharded = commits(&world).filter(|commit| !commit.parts.is_empty()).count() as u64;
        match shape.exchange {
            Exchange::Sharded if shape.quorum == 1.0 => assert_eq!(sharded, world.commits, "seed {seed}, {shape:?}"),
            // With a quorum some are given back to the mesh.
            Exchange::Sharded => {}
            _ => assert_eq!(sharded, 0, "seed {seed}, {shape:?}"),
        }
    }
}

/// TLS lets no record of a connection in twice or out of order, and nothing here relies on it: where a message comes again right behind
/// itself, and however late each comes, the run ends as one in which each comes once and at once.
#[test]
fn messages_that_come_twice_and_late_change_nothing() {
    for shape in shapes().filter(|shape| shape.quorum == 1.0) {
        let last_state = |seed: u64, repeats: bool| {
            let mut world = World::new(seed, 3, 6, shape);
            world.repeats = repeats;
            world.run(100_000);
            assert!(world.done && world.sites.len() == 3, "seed {seed}, {shape:?}: {} commits", world.commits);
            world.coordinator.last().state_hash.unwrap()
        };
        let clean = last_state(0, false);
        assert!((0..5).all(|seed| last_state(seed, true) == clean), "{shape:?}");
    }
}

#[test]
fn an_engine_does_the_same_in_the_same_order_whatever_arrives_when() {
    for shape in shapes().filter(|shape| shape.quorum == 1.0) {
        let mut first: Option<BTreeMap<SiteId, Trace>> = None;
        for seed in 0..20 {
            let mut world = World::new(seed, 3, 6, shape);
            world.run(50_000);
            assert!(world.done, "seed {seed}, {shape:?}");
            // What comes after the last step changes no parameters that are trained any more.
            let until_last_step = |trace: &Trace| {
                let last = trace.iter().rposition(|entry| entry.starts_with("train")).unwrap();
                trace[..=last].to_vec()
            };
            let traces: BTreeMap<SiteId, Trace> =
                world.traces.iter().map(|(site, trace)| (*site, until_last_step(trace))).collect();
            assert_eq!(traces.len(), 3);
            let expected = first.get_or_insert_with(|| traces.clone());
            assert_eq!(*expected, traces, "seed {seed}, {shape:?}");
        }
    }
}

#[test]
fn a_quorum_goes_on_without_a_site_that_is_late_and_its_work_counts_later() {
    let mesh = Shape::mesh(2, 3, 0.5);
    for (seed, shape) in (0..30).flat_map(|seed| [(seed, mesh), (seed, mesh.sharded())]) {
        let mut world = World::new(seed, 3, 12, shape);
        world.stuck.push(SiteId(2));
        while world.commits < 2 {
            world.step();
            assert!(world.now < 1e3, "seed {seed}: stuck after {} commits", world.commits);
        }
        assert!(world.stragglers.contains(&(SiteId(2), Lateness::SlowCompute)), "{:?}", world.stragglers);
        world.stuck.clear();
        world.run(100_000);
        assert!(world.done, "seed {seed}: stuck after {} commits", world.commits);
        let totals = world.coordinator.ledger().totals();
        assert_eq!((totals.committed, totals.returned, totals.open), (12 * 4 * 8, 0, 0), "seed {seed}: {totals:?}");
        // Tokens of each fragment's merges, as weights: every token that was trained counts once in every fragment.
        let mut weights = [0; 2];
        for record in &world.records {
            if let Record::Committed(committed) = record {
                let tokens: u64 = committed.commit.contributors.iter().map(|contributor| contributor.tokens).sum();
                weights[committed.commit.fragment.index as usize] += tokens;
            }
        }
        assert!(shape.exchange == Exchange::Mesh || commits(&world).any(|commit| !commit.parts.is_empty()));
        assert_eq!(weights, [12 * 4 * 8 * 16; 2], "seed {seed}");
    }
}

#[test]
fn sites_leave_and_come_back_and_nothing_is_lost() {
    let (mut sharded, mut caught_up) = (0, 0);
    for (seed, shape) in (0..100).flat_map(|seed| shapes().map(move |shape| (seed, shape))) {
        let mut world = World::new(seed, 3, 8, shape);
        for _ in 0..6 {
            let steps = world.random.next_below(60) as usize;
            world.run(steps);
            let id = SiteId(world.random.next_below(3) as u32);
            let Some(site) = world.sites.remove(&id) else { continue };
            let word = world.random.next_below(2) == 0;
            if word {
                world.tell_coordinator(Event::Reported(id, Report::Leave { reason: LeaveReason::Stopped }));
            } else {
                world.tell_coordinator(Event::Disconnected(id, LeaveReason::ConnectionLost));
            }
            let steps = world.random.next_below(60) as usize;
            world.run(steps);
            if !world.done {
                // It comes back either with what it had saved or with nothing.
                let state = if world.random.next_below(2) == 0 { site.state } else { (Round(0), INITIAL) };
                world.join(id, state);
            }
        }
        for _ in 0..40 {
            world.run(5_000);
            world.bring_back_the_dropped(3);
        }
        assert!(world.done, "seed {seed}, {shape:?}: stuck after {} commits", world.commits);
        let totals = world.coordinator.ledger().totals();
        assert_eq!(totals.open, 0, "seed {seed}, {shape:?}");
        // Rounds are shorter, and more, while a site is expected back.
        let last = &world.coordinator.last().commit;
        assert!(last.round >= Round(world.rounds_total(8)), "seed {seed}, {shape:?}");
        assert_eq!(last.step, STEPS_PER_ROUND * 8, "seed {seed}, {shape:?}");
        sharded += commits(&world).filter(|commit| !commit.parts.is_empty()).count();
        caught_up += world.parts_caught_up;
    }
    assert!(sharded > 0 && caught_up > 0, "{sharded} sharded commits, {caught_up} parts fetched for a commit");
}

/// How far a sharded round has come.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Gather,
    Reduce,
    Spread,
}

fn is_at(world: &World, stage: Stage) -> bool {
    world.sites.values().any(|site| match stage {
        Stage::Gather => !site.slices.is_empty(),
        Stage::Reduce => site.host.iter().any(|work| matches!(work, HostWork::Reduce { .. })),
        Stage::Spread => site.transfers.iter().any(|transfer| matches!(transfer.event, MemberEvent::PartHeld { .. })),
    })
}

#[test]
fn a_reducer_that_leaves_at_any_stage_gives_the_round_back_to_the_mesh() {
    let stages = [Stage::Gather, Stage::Reduce, Stage::Spread];
    let cases = (0..20).flat_map(|seed| stages.map(|stage| (seed, stage)));
    for (seed, stage) in cases {
        for shape in [DILOCO.sharded(), Shape::mesh(2, 5, 1.0).sharded()] {
            let mut world = World::new(seed, 4, 6, shape);
            while !is_at(&world, stage) {
                world.step();
                assert!(world.now < 1e3, "seed {seed}, {shape:?}: never at {stage:?}");
            }
            let leaver = SiteId(world.random.next_below(4) as u32);
            world.sites.remove(&leaver);
            world.tell_coordinator(Event::Disconnected(leaver, LeaveReason::ConnectionLost));
            world.run(50_000);
            assert!(world.done, "seed {seed}, {stage:?}, {shape:?}: stuck after {} commits", world.commits);
            let totals = world.coordinator.ledger().totals();
            assert_eq!((totals.open, totals.lost), (0, 0), "seed {seed}, {stage:?}");
            assert_eq!(totals.leased, totals.committed + totals.returned, "seed {seed}, {stage:?}");
            // The others go on sharded.
            let last = commits(&world).last().unwrap();
            assert_eq!(last.parts.len(), 3, "seed {seed}, {stage:?}, {shape:?}: {last:?}");
        }
    }
}

#[test]
fn a_reducer_that_does_not_merge_holds_up_one_round_and_the_mesh_follows() {
    for seed in 0..20 {
        let shape = DILOCO.sharded();
        let mut world = World::new(seed, 3, 6, shape);
        world.idle_reducers.push(SiteId(1));
        world.run(50_000);
        assert!(world.done, "seed {seed}: stuck after {} commits", world.commits);
        assert_eq!(world.exchanges, [(Round(1), true), (Round(1), false)], "seed {seed}");
        let totals = world.coordinator.ledger().totals();
        assert_eq!((totals.committed, totals.returned, totals.open), (6 * 4 * 8, 0, 0), "seed {seed}");
        assert_eq!(world.traces.len(), 3, "nobody was dropped");
        assert!(commits(&world).all(|commit| commit.parts.is_empty() && commit.contributors.len() == 3));
    }
}

#[test]
fn a_slice_that_never_comes_is_fetched_in_the_mesh_at_last() {
    for seed in 0..20 {
        let mut world = World::new(seed, 3, 4, DILOCO.sharded());
        // What site 2 serves of its first delta in slices is damaged; the whole is not.
        while !world.sites[&SiteId(2)].slices.contains_key(&(Round(1), SiteId(2))) {
            world.step();
        }
        world.sites.get_mut(&SiteId(2)).unwrap().served.clear();
        world.run(50_000);
        assert!(world.done, "seed {seed}: stuck after {} commits", world.commits);
        assert_eq!(world.exchanges.first_chunk(), Some(&[(Round(1), true), (Round(1), false)]), "seed {seed}");
        assert_eq!(commits(&world).map(|commit| commit.contributors.len()).collect::<Vec<_>>(), [3; 4]);
    }
}

#[test]
fn a_wrong_number_of_slices_is_refused_and_a_merge_that_was_not_asked_for_ignored() {
    let mut world = World::new(2, 2, 4, DILOCO.sharded());
    let plan = loop {
        world.step();
        if let Some(plan) = world.plan.clone() {
            break plan;
        }
    };
    assert_eq!(plan.parts.len(), 2);
    world.tell_coordinator(Event::Reported(
        SiteId(0),
        Report::Reduced { round: plan.round, attempt: plan.attempt, hash: INITIAL },
    ));
    world.tell_coordinator(Event::Reported(
        SiteId(0),
        Report::HoldsSlice { round: plan.round, attempt: plan.attempt, from: SiteId(1) },
    ));
    world.tell_coordinator(Event::Reported(
        SiteId(0),
        Report::HoldsPart { round: plan.round, attempt: plan.attempt, from: SiteId(1) },
    ));
    let contribution = Contribution {
        tokens: plan.assignments[0].samples * 16,
        delta_hash: INITIAL,
        delta_bytes: 8 * LAYER_ELEMENTS as u64 * 4,
        loss_nats: 1.0,
        compute_seconds: 1.0,
    };
    let report =
        Report::Computed { round: plan.round, attempt: plan.attempt, contribution, slice_hashes: vec![INITIAL] };
    world.tell_coordinator(Event::Reported(SiteId(0), report));
    world.run(20_000);
    assert!(world.done, "the other site goes on alone");
    assert_eq!(world.commits, 4);
    assert!(commits(&world).all(|commit| commit.contributors.len() == 1 && commit.contributors[0].site == SiteId(1)));
}

#[test]
fn a_restarted_coordinator_goes_on_where_the_log_ends() {
    for (seed, shape) in (0..30).flat_map(|seed| shapes().map(move |shape| (seed, shape))) {
        let mut world = World::new(seed, 3, 6, shape);
        let steps = 50 + world.random.next_below(150) as usize;
        world.run(steps);
        if world.done {
            continue;
        }
        world.restart_coordinator();
        world.run(50_000);
        assert!(world.done, "seed {seed}, {shape:?}: stuck after {} commits", world.commits);
        assert_eq!(world.coordinator.last().commit.round, Round(world.rounds_total(6)), "seed {seed}, {shape:?}");
    }
}

#[test]
fn a_silent_site_is_dropped_after_the_deadline_and_its_lease_is_trained_by_others() {
    let mut world = World::new(1, 3, 4, DILOCO);
    // Site 0 never works again; its messages stay unread.
    let silent = world.sites.remove(&SiteId(0)).unwrap();
    world.run(900);
    assert!(!world.done && world.commits == 0, "nobody may commit without site 0 before the deadline");
    world.now += 1e4;
    world.tell_coordinator(Event::Tick);
    world.run(20_000);
    assert!(world.done);
    let totals = world.coordinator.ledger().totals();
    assert!(totals.returned > 0 && totals.open == 0, "{totals:?}");
    // Four rounds of 4 steps of 8 samples, less what site 0 sat on in the first.
    assert_eq!(totals.committed, 4 * 4 * 8 - totals.returned);
    drop(silent);
}

#[test]
fn a_wrong_token_count_or_delta_size_is_refused() {
    for (tokens_factor, bytes_more) in [(2, 0), (1, 1)] {
        let mut world = World::new(2, 2, 4, DILOCO);
        // Site 0 has connected and been given work; what it says of it is not true.
        let plan = loop {
            world.step();
            let plan = world.sites[&SiteId(0)].engine.iter().find_map(|work| match work {
                MemberCommand::Snapshot { plan } => Some(plan.clone()),
                _ => None,
            });
            if let Some(plan) = plan {
                break plan;
            }
        };
        let contribution = Contribution {
            tokens: plan.assignments[0].samples * 16 * tokens_factor,
            delta_hash: INITIAL,
            delta_bytes: 8 * LAYER_ELEMENTS as u64 * 4 + bytes_more,
            loss_nats: 1.0,
            compute_seconds: 1.0,
        };
        let lie = Report::Computed { round: plan.round, attempt: plan.attempt, contribution, slice_hashes: Vec::new() };
        world.tell_coordinator(Event::Reported(SiteId(0), lie));
        world.run(20_000);
        assert!(world.done, "the other site goes on alone");
        assert!(!world.sites.contains_key(&SiteId(0)), "site 0 was dropped");
    }
}

const ADAPTIVE_ROUNDS: u64 = 80;

/// A delta in f32 takes 3.2 ms of the 250 that a step takes, and in other rounds two of these: links that come and go.
fn changing_link(round: Round) -> f64 {
    if (round.0 / 12).is_multiple_of(2) { 1e6 } else { 2e3 }
}

fn adaptive_world(seed: u64, shape: Shape) -> World {
    let mut settings = settings(3, ADAPTIVE_ROUNDS, shape);
    (settings.sync.strategy, settings.sync.adaptive) = (Strategy::Streaming, true);
    let side = LAYER_ELEMENTS.isqrt();
    settings.schema = ParameterSchema::new((0..8).map(|layer| (format!("layers.{layer}.weight"), vec![side, side])));
    let mut world = World::of(seed, settings, shape);
    world.link_bytes_per_second = changing_link;
    world
}

/// The plans of a run have the settings that the log had before them.
fn assert_plan_is_in_the_log(world: &World) {
    let Some(plan) = &world.plan else { return };
    let FragmentPlan { count, codec, rank, .. } = plan.fragment;
    // The newest, also where the run has gone back to a round before it.
    let before = world.changes_before_plan().pop();
    let in_log = before.map_or(Choice::of(&world.settings.sync), |(_, choice)| choice);
    assert_eq!((count, codec, rank), (in_log.fragments, in_log.codec, in_log.rank), "round {}", plan.round);
    let is_whole = plan.first_step + plan.steps < world.settings.steps_total;
    assert!(!is_whole || plan.steps == in_log.inner_steps / u64::from(count), "{plan:?}, {in_log}");
}

fn run_adaptive(world: &mut World, steps_max: usize) {
    for _ in 0..steps_max {
        if world.done {
            return;
        }
        world.step();
        assert_plan_is_in_the_log(world);
    }
}

#[test]
fn settings_that_follow_changing_links_keep_one_state_and_every_sample() {
    for (seed, shape) in (0..10).flat_map(|seed| shapes().map(move |shape| (seed, shape))) {
        let mut world = adaptive_world(seed, shape);
        run_adaptive(&mut world, 200_000);
        assert!(world.done, "seed {seed}, {shape:?}: stuck after {} commits", world.commits);
        let totals = world.coordinator.ledger().totals();
        let sums = (totals.committed, totals.returned, totals.lost, totals.open);
        assert_eq!(sums, (ADAPTIVE_ROUNDS * 4 * 8, 0, 0, 0), "seed {seed}, {shape:?}");
        let changes = world.changes();
        assert!(changes.len() >= 2, "seed {seed}, {shape:?}: {changes:?}");
        let schedules = changes.windows(2).filter(|pair| !pair[0].1.has_schedule_of(&pair[1].1)).count();
        assert!(schedules > 0, "seed {seed}, {shape:?}: {changes:?}");
        // Every fragment was merged after the last step.
        let last = changes.last().unwrap().1;
        let commits = world.records.iter().rev().filter_map(|record| match record {
            Record::Committed(committed) => Some(&committed.commit),
            _ => None,
        });
        let merged: BTreeSet<u32> = commits
            .take(last.fragments as usize)
            .filter(|commit| commit.step == world.settings.steps_total)
            .map(|commit| commit.fragment.index)
            .collect();
        assert_eq!(merged.len(), last.fragments as usize, "seed {seed}, {shape:?}");
    }
}

#[test]
fn a_coordinator_restarted_between_changes_goes_on_with_the_settings_of_its_log() {
    for (seed, shape) in (0..10).flat_map(|seed| shapes().map(move |shape| (seed, shape))) {
        let mut world = adaptive_world(seed, shape);
        for _ in 0..3 {
            let steps = 400 + world.random.next_below(600) as usize;
            run_adaptive(&mut world, steps);
            if !world.done {
                world.restart_coordinator();
            }
        }
        run_adaptive(&mut world, 200_000);
        assert!(world.done, "seed {seed}, {shape:?}: stuck after {} commits", world.commits);
        assert_eq!(world.coordinator.ledger().totals().open, 0, "seed {seed}, {shape:?}");
        assert!(!world.changes().is_empty(), "seed {seed}, {shape:?}");
    }
}

#[test]
fn sites_leave_and_come_back_while_settings_change() {
    for (seed, shape) in (0..10).flat_map(|seed| shapes().map(move |shape| (seed, shape))) {
        let mut world = adaptive_world(seed, shape);
        for _ in 0..10 {
            let steps = world.random.next_below(300) as usize;
            run_adaptive(&mut world, steps);
            let id = SiteId(world.random.next_below(3) as u32);
            let Some(site) = world.sites.remove(&id) else { continue };
            world.tell_coordinator(Event::Disconnected(id, LeaveReason::ConnectionLost));
            let steps = world.random.next_below(300) as usize;
            run_adaptive(&mut world, steps);
            if !world.done {
                let state = if world.random.next_below(2) == 0 { site.state } else { (Round(0), INITIAL) };
                world.join(id, state);
            }
        }
        for _ in 0..40 {
            run_adaptive(&mut world, 10_000);
            world.bring_back_the_dropped(3);
        }
        assert!(world.done, "seed {seed}, {shape:?}: stuck after {} commits", world.commits);
        assert_eq!(world.coordinator.last().commit.step, world.settings.steps_total, "seed {seed}, {shape:?}");
    }
}

#[test]
fn a_measurement_that_cannot_be_is_refused_and_one_of_no_plan_is_ignored() {
    let shape = STREAMING[0];
    let link = LinkReport { from: SiteId(1), bytes_per_second: 1e6, round_trip_seconds: 0.01, loss: 0.0 };
    let good = Measurement { links: vec![link], ..Measurement::default() };
    let with_link = |link| Measurement { links: vec![link], ..Measurement::default() };
    let bad = [
        Measurement { lost_part: f64::NAN, ..Measurement::default() },
        Measurement { encode_seconds: -1.0, ..Measurement::default() },
        Measurement { merge_seconds: f64::INFINITY, ..Measurement::default() },
        Measurement { links: vec![link; LINK_REPORTS_MAX + 1], ..Measurement::default() },
        with_link(LinkReport { bytes_per_second: 0.0, ..link }),
        with_link(LinkReport { round_trip_seconds: f64::NAN, ..link }),
        with_link(LinkReport { loss: 1.5, ..link }),
    ];
    for (measurement, refused) in bad.into_iter().map(|bad| (bad, true)).chain([(good, false)]) {
        let mut world = adaptive_world(1, shape);
        let report = Report::Measured { round: Round(1_000), measurement: measurement.clone() };
        world.tell_coordinator(Event::Reported(SiteId(0), report));
        let dropped = world.sites[&SiteId(0)].inbox.iter().any(|word| matches!(word, Directive::Dropped { .. }));
        assert_eq!(dropped, refused, "{measurement:?}");
    }
}
