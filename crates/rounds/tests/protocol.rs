//! Coordinator and members together, without tensors, sockets or threads: a "state" is the hash of the commits that
//! made it. A seeded scheduler delivers messages in any order that the connections allow, takes sites away and
//! brings them back. Invariants I1, I2 and I3 are checked after every step.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use base::random::Random;
use base::{ContentHash, Round, SiteId};
use rounds::coordinator::Record;
use rounds::plan::{Contribution, Directive, LeaveReason, Peer, Report};
use rounds::{Command, Coordinator, Event, Member, MemberCommand, MemberEvent, Settings};
use std::collections::{BTreeMap, VecDeque};

const INITIAL: ContentHash = ContentHash([7; 32]);

fn settings(sites: u32, rounds: u64) -> Settings {
    Settings {
        sites,
        batch_samples: 8,
        sequence_length: 16,
        steps_per_round: 4,
        steps_total: 4 * rounds,
        shares: Vec::new(),
        deadline_seconds: 10.0,
        delta_bytes: 400,
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

struct FakeSite {
    member: Member,
    state: (Round, ContentHash),
    inbox: VecDeque<Directive>,
    /// Local work that finishes at some later time.
    work: Vec<MemberEvent>,
}

struct World {
    coordinator: Coordinator,
    sites: BTreeMap<SiteId, FakeSite>,
    records: Vec<Record>,
    agreed: BTreeMap<Round, ContentHash>,
    now: f64,
    random: Random,
    done: bool,
    commits: u64,
}

impl World {
    fn new(seed: u64, sites: u32, rounds: u64) -> Self {
        let (coordinator, record) = Coordinator::recover(settings(sites, rounds), INITIAL, []);
        let agreed = BTreeMap::from([(Round(0), INITIAL)]);
        let random = Random::new(seed, 0);
        let (records, now) = (vec![record], 0.0);
        let mut world =
            Self { coordinator, sites: BTreeMap::new(), records, agreed, now, random, done: false, commits: 0 };
        (0..sites).for_each(|site| world.join(SiteId(site), (Round(0), INITIAL)));
        world
    }

    fn join(&mut self, site: SiteId, state: (Round, ContentHash)) {
        let speed = 100.0 * f64::from(site.0 + 1);
        let member = Member::new(site, state.0, state.1, speed);
        let MemberCommand::Report(ready) = member.start() else { panic!("a site starts with a report") };
        self.sites.insert(site, FakeSite { member, state, inbox: VecDeque::new(), work: Vec::new() });
        let peer = Peer { site, name: format!("site-{site}"), address: "127.0.0.1:1".to_owned(), fingerprint: INITIAL };
        self.tell_coordinator(Event::Connected(peer));
        self.tell_coordinator(Event::Reported(site, ready));
    }

    fn tell_coordinator(&mut self, event: Event) {
        for command in self.coordinator.handle(event, self.now) {
            match command {
                Command::Persist(record) => {
                    match &record {
                        Record::Committed(_) => self.commits += 1,
                        // The commits after it are void: nobody held their states any more.
                        Record::RolledBack { to } => self.agreed.retain(|round, _| round <= to),
                        _ => {}
                    }
                    self.records.push(record);
                }
                Command::Send(site, directive) => {
                    if let Some(site) = self.sites.get_mut(&site) {
                        site.inbox.push_back(directive);
                    }
                }
                Command::Done => self.done = true,
                Command::Note(_) => {}
            }
        }
        self.coordinator.ledger().audit().unwrap();
    }

    fn tell_site(&mut self, id: SiteId, event: MemberEvent) {
        let Some(site) = self.sites.get_mut(&id) else { return };
        let commands = site.member.handle(event).unwrap();
        for command in commands {
            let Some(site) = self.sites.get_mut(&id) else { return };
            match command {
                MemberCommand::Report(report) => self.tell_coordinator(Event::Reported(id, report)),
                MemberCommand::FetchState { commit, state_hash, from } => {
                    let held = (commit.round, state_hash);
                    let found = from.iter().any(|peer| self.sites.get(peer).is_some_and(|peer| peer.state == held));
                    let site = self.sites.get_mut(&id).unwrap();
                    site.work.push(if found {
                        site.state = held;
                        MemberEvent::StateHeld { round: commit.round, state_hash }
                    } else {
                        MemberEvent::StateUnavailable
                    });
                }
                MemberCommand::Train { plan, assignment } => {
                    let tokens = assignment.samples * 16;
                    let delta_hash =
                        ContentHash::of(format!("{} {} {:?}", plan.round, id, assignment.lease).as_bytes());
                    let contribution =
                        Contribution { tokens, delta_hash, delta_bytes: 400, loss_nats: 1.0, compute_seconds: 1.0 };
                    site.work.push(MemberEvent::Trained(contribution));
                }
                MemberCommand::AbandonTraining => site.work.retain(|work| !matches!(work, MemberEvent::Trained(_))),
                MemberCommand::FetchDelta { round, contributor } => {
                    site.work.push(MemberEvent::DeltaHeld { round, from: contributor.site });
                }
                MemberCommand::Apply(commit) => {
                    let state_hash = state_after(site.state.1, &commit);
                    site.state = (commit.round, state_hash);
                    let expected = *self.agreed.entry(commit.round).or_insert(state_hash);
                    assert_eq!(state_hash, expected, "I1 and I3: round {} has two states", commit.round);
                    site.work.push(MemberEvent::Applied { round: commit.round, state_hash });
                }
                MemberCommand::Finish { state_hash, round } => assert_eq!(site.state, (round, state_hash)),
                MemberCommand::Quit(_) => {
                    self.sites.remove(&id);
                    return;
                }
                MemberCommand::Peers(_) => {}
            }
        }
    }

    /// One random thing that can happen now.
    fn step(&mut self) {
        self.now += 0.01;
        let ids: Vec<SiteId> = self.sites.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = ids[self.random.next_below(ids.len() as u64) as usize];
        let site = self.sites.get_mut(&id).unwrap();
        if !site.work.is_empty() && (site.inbox.is_empty() || self.random.next_below(2) == 0) {
            let index = self.random.next_below(site.work.len() as u64) as usize;
            let event = site.work.remove(index);
            self.tell_site(id, event);
        } else if let Some(directive) = site.inbox.pop_front() {
            self.tell_site(id, MemberEvent::Directive(directive));
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
}

#[test]
fn three_sites_finish_with_one_state() {
    for seed in 0..50 {
        let mut world = World::new(seed, 3, 6);
        world.run(20_000);
        assert!(world.done, "seed {seed}: stuck after {} commits", world.commits);
        assert_eq!(world.commits, 6, "seed {seed}");
        let totals = world.coordinator.ledger().totals();
        assert_eq!((totals.committed, totals.returned, totals.lost, totals.open), (6 * 4 * 8, 0, 0, 0), "seed {seed}");
    }
}

#[test]
fn sites_leave_and_come_back_and_nothing_is_lost() {
    for seed in 0..200 {
        let mut world = World::new(seed, 3, 8);
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
        world.run(50_000);
        assert!(world.done, "seed {seed}: stuck after {} commits", world.commits);
        let totals = world.coordinator.ledger().totals();
        assert_eq!(totals.open, 0, "seed {seed}");
        assert_eq!(world.coordinator.last().commit.round, Round(8), "seed {seed}");
    }
}

#[test]
fn a_restarted_coordinator_goes_on_where_the_log_ends() {
    for seed in 0..50 {
        let mut world = World::new(seed, 3, 6);
        let steps = 50 + world.random.next_below(150) as usize;
        world.run(steps);
        if world.done {
            continue;
        }
        let held: Vec<(SiteId, (Round, ContentHash))> =
            world.sites.iter().map(|(id, site)| (*id, site.state)).collect();
        world.sites.clear();
        let (coordinator, record) = Coordinator::recover(settings(3, 6), INITIAL, world.records.clone());
        assert!(coordinator.term() > world.coordinator.term(), "seed {seed}");
        world.coordinator = coordinator;
        world.records.push(record);
        held.into_iter().for_each(|(site, state)| world.join(site, state));
        world.run(20_000);
        assert!(world.done, "seed {seed}: stuck after {} commits", world.commits);
        assert_eq!(world.coordinator.last().commit.round, Round(6), "seed {seed}");
    }
}

#[test]
fn a_silent_site_is_dropped_after_the_deadline_and_its_lease_is_trained_by_others() {
    let mut world = World::new(1, 3, 4);
    // Site 0 never works again; its messages stay unread.
    let silent = world.sites.remove(&SiteId(0)).unwrap();
    world.run(5_000);
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
    for (tokens_factor, delta_bytes) in [(2, 400), (1, 401)] {
        let mut world = World::new(2, 2, 4);
        while !world.sites[&SiteId(0)].work.iter().any(|work| matches!(work, MemberEvent::Trained(_))) {
            world.step();
        }
        let site = world.sites.get_mut(&SiteId(0)).unwrap();
        for work in &mut site.work {
            if let MemberEvent::Trained(contribution) = work {
                contribution.tokens *= tokens_factor;
                contribution.delta_bytes = delta_bytes;
            }
        }
        world.run(20_000);
        assert!(world.done, "the other site goes on alone");
        assert!(!world.sites.contains_key(&SiteId(0)), "site 0 was dropped");
    }
}
