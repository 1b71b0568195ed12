//! What a member, or whoever got in as one, can do to the coordinator with messages that are well formed; what a coordinator can do to a
//! site; and the coordinator's own files.
//!
//! An input is a [`Room`]'s kind, and then what happens in it: a byte for what and to whom, a length (u16, little-endian), and that
//! many bytes, a message's body among them.

use crate::memory::Bound;
use crate::place::Place;
use base::config::{Exchange, Strategy};
use base::{ContentHash, Round, RunConfig, SiteId};
use coordinator::{
    AccessFolder, Briefing, DatabaseStore, Desk, DeskOptions, Door, FileStore, Line, LinkNumber, Moment, Outlet, Store,
    StoreError, Verdict, Visitor,
};
use redb::StorageBackend;
use redb::backends::InMemoryBackend;
use rounds::{Contribution, Directive, Measurement, Member, MemberCommand, MemberEvent, Report, RoundPlan, Settings};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::LazyLock;
use telemetry::Event;
use wire::message::{FromCoordinator, FromSite, Greeting, Role, SiteHello};
use wire::{Secret, frame};

/// A desk keeps every commit, lease and hash that an input makes it decide on.
const DECISIONS: Bound = Bound { base_bytes: 16 << 20, per_byte: 1_024 };

/// Sites that an input can name.
const SITES: u32 = 3;

/// Things that happen in one input.
const HAPPENINGS_MAX: usize = 4_096;

const INITIAL: ContentHash = ContentHash([7; 32]);

/// What can happen: the lowest bits of a happening's first byte; the next two are the site.
const ENTER: u8 = 0;
const LOSE: u8 = 1;
const TICK: u8 = 2;
const SAY: u8 = 3;
const KINDS: u8 = 4;

/// Settings of each kind of room.
fn config(kind: u8) -> RunConfig {
    let mut config = RunConfig::new("run", crate::codecs::shape());
    config.data.sequence_length = 16;
    config.train.batch_samples = 8;
    (config.train.steps, config.sync.inner_steps, config.sync.sites) = (12, 4, 2);
    config.sync.deadline_seconds = 10.0;
    config.sync.grace_seconds = 0.2;
    match kind % 4 {
        0 => {}
        1 => (config.sync.exchange, config.sync.grace_seconds) = (Exchange::Sharded, 5.0),
        2 => {
            (config.sync.strategy, config.sync.fragments, config.sync.overlap_steps) = (Strategy::Streaming, 2, 1);
            config.sync.quorum = 0.5;
        }
        _ => (config.sync.strategy, config.sync.adaptive) = (Strategy::Streaming, true),
    }
    config.validate().expect("the settings of the rooms are sound");
    config
}

/// A log in memory.
struct MemoryStore;

impl Store for MemoryStore {
    fn append(&mut self, line: &Line) -> Result<(), StoreError> {
        // As a real one writes and reads it.
        let json = serde_json::to_vec(line).expect("a line is JSON");
        assert_eq!(serde_json::from_slice::<Line>(&json).expect("a line is read again"), *line);
        Ok(())
    }
}

/// Messages on their way to sites, and what people were told.
#[derive(Default)]
struct Post {
    waiting: BTreeMap<LinkNumber, VecDeque<FromCoordinator>>,
    told: Vec<Event>,
}

impl Outlet for Post {
    fn send(&mut self, link: LinkNumber, message: FromCoordinator) -> bool {
        self.waiting.entry(link).or_default().push_back(message);
        true
    }

    fn close(&mut self, _link: LinkNumber) {}

    fn tell(&mut self, event: Event) {
        // A number that JSON cannot write would be lost from the log.
        let json = serde_json::to_string(&event).expect("an event is JSON");
        serde_json::from_str::<Event>(&json).unwrap_or_else(|error| panic!("{json}: {error}"));
        self.told.push(event);
    }
}

/// A coordinator's desk and the connections of its sites.
struct Room {
    desk: Desk,
    post: Post,
    links: BTreeMap<u32, LinkNumber>,
    now: f64,
}

impl Room {
    fn new(kind: u8) -> Self {
        let config = config(kind);
        let briefing =
            Briefing { config_text: config.to_toml(), config, files: Vec::new(), initial_hash: INITIAL, parameters: 1 };
        let options =
            DeskOptions { secret: secret(), invite_seconds: Some(1e9), rounds_max: None, train_seconds_max: None };
        let mut post = Post::default();
        let desk = Desk::open(briefing, (Box::new(MemoryStore), Vec::new()), options, &mut post);
        Self { desk: desk.expect("memory takes every line"), post, links: BTreeMap::new(), now: 0.0 }
    }

    fn happens(&mut self, first: u8, body: &[u8]) {
        let site = u32::from(first >> 2) % SITES;
        let link = self.links.get(&site).copied();
        match (first % KINDS, link) {
            (ENTER, _) => self.enter(site),
            (LOSE, Some(link)) => self.desk.lost((SiteId(site), link), self.now, &mut self.post).expect("in memory"),
            (TICK, _) => {
                self.now += f64::from(body.first().copied().unwrap_or(1)) / 4.0;
                self.desk.tick(self.now, &mut self.post).expect("in memory");
            }
            (SAY, Some(link)) => {
                if let Ok(message) = frame::decode::<FromSite>(body) {
                    let from = (SiteId(site), link);
                    self.desk.said(from, message, self.now, &mut self.post).expect("in memory");
                }
            }
            _ => {}
        }
        self.desk.ledger().audit().expect("every sample is in one place");
    }

    /// Sites come in the order of their numbers, which are then their ids.
    fn enter(&mut self, site: u32) {
        for missing in self.links.len() as u32..=site {
            self.enter_one(missing);
        }
        if self.links.contains_key(&site) {
            self.enter_one(site);
        }
    }

    fn enter_one(&mut self, site: u32) {
        let hello = SiteHello {
            name: format!("site-{site}"),
            advertised_host: String::new(),
            port: 1,
            engine: "flex".to_owned(),
            threads: 1,
            slowdown: 1.0,
        };
        let greeting = Greeting { run: "run".to_owned(), secret: Some(secret()), role: Role::Site(hello) };
        let fingerprint = ContentHash::of(&site.to_le_bytes());
        let address = ([10, 0, 0, 1], 7_447).into();
        let at = Moment { now: self.now, unix_seconds: 0 };
        let verdict = self.desk.greet(Visitor { fingerprint, address, greeting }, at);
        let Verdict::Site(admission) = verdict.expect("in memory") else { panic!("a site with an invite comes in") };
        assert_eq!(admission.peer.site, SiteId(site));
        self.links.insert(site, admission.link);
        self.desk.enter(*admission, self.now, &mut self.post).expect("in memory");
    }

    /// What has been sent to a site since it was asked last.
    fn directives(&mut self, site: u32) -> Vec<Directive> {
        let waiting = self.links.get(&site).and_then(|link| self.post.waiting.get_mut(link)).map(std::mem::take);
        let directive = |message| match message {
            FromCoordinator::Directive(directive) => Some(directive),
            _ => None,
        };
        waiting.unwrap_or_default().into_iter().filter_map(directive).collect()
    }
}

fn secret() -> Secret {
    frame::decode(&[7; 16]).expect("a secret is 16 bytes")
}

/// The next thing that happens in an input.
fn next<'a>(input: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (&[first, low, high], rest) = input.split_first_chunk()?;
    let (body, rest) = rest.split_at(usize::from(u16::from_le_bytes([low, high])).min(rest.len()));
    *input = rest;
    Some((first, body))
}

/// Adds a happening to an input.
fn note(input: &mut Vec<u8>, first: u8, body: &[u8]) {
    input.push(first);
    input.extend_from_slice(&(body.len() as u16).to_le_bytes());
    input.extend_from_slice(body);
}

fn body_of(message: &impl serde::Serialize) -> Vec<u8> {
    frame::encode(message).expect("the messages of a small run fit")[size_of::<u32>()..].to_vec()
}

/// Whatever members say, in whatever order, and whenever they come and go: the coordinator's process goes on, every sample stays
/// in one place, and every decision and event can be written down and read again.
pub fn coordinator_hears(bytes: &[u8]) {
    let Some((kind, mut input)) = bytes.split_first() else { return };
    let mut room = Room::new(*kind);
    DECISIONS.check(bytes.len(), || {
        for _ in 0..HAPPENINGS_MAX {
            let Some((first, body)) = next(&mut input) else { break };
            room.happens(first, body);
        }
    });
}

/// Whatever a coordinator says: a site follows it or leaves, and never holds more than it was told.
pub fn site_hears(bytes: &[u8]) {
    let Some((kind, mut input)) = bytes.split_first() else { return };
    let settings = Settings::new(&config(*kind));
    let mut player = Player::new(0);
    DECISIONS.check(bytes.len(), || {
        for _ in 0..HAPPENINGS_MAX {
            let Some((_, body)) = next(&mut input) else { break };
            let Ok(FromCoordinator::Directive(directive)) = frame::decode(body) else { continue };
            if player.follows(directive, &settings).is_err() {
                break;
            }
        }
    });
}

/// A site without tensors: it does at once what it is told, as an honest one would.
struct Player {
    site: SiteId,
    member: Member,
    state: (Round, ContentHash),
}

impl Player {
    fn new(site: u32) -> Self {
        let member = Member::new(SiteId(site), Round(0), INITIAL, 100.0 * f64::from(site + 1));
        Self { site: SiteId(site), member, state: (Round(0), INITIAL) }
    }

    /// Does what a directive asks for; what it then says.
    fn follows(&mut self, directive: Directive, settings: &Settings) -> Result<Vec<Report>, String> {
        let (mut events, mut said) = (VecDeque::from([MemberEvent::Directive(directive)]), Vec::new());
        for _ in 0..HAPPENINGS_MAX {
            let Some(event) = events.pop_front() else { break };
            for command in self.member.handle(event).map_err(|error| error.to_string())? {
                match command {
                    MemberCommand::Report(report) => said.push(report),
                    command => events.extend(self.does(command, settings, &mut said)),
                }
            }
        }
        Ok(said)
    }

    fn does(&mut self, command: MemberCommand, settings: &Settings, said: &mut Vec<Report>) -> Option<MemberEvent> {
        let hash = |what: String| ContentHash::of(what.as_bytes());
        match command {
            MemberCommand::FetchState { commit, state_hash, .. } => {
                self.state = (commit.round, state_hash);
                Some(MemberEvent::StateHeld { round: commit.round, state_hash })
            }
            MemberCommand::Snapshot { plan } => self.encodes(&plan, settings, said),
            MemberCommand::FetchDelta { round, contributor, .. } => {
                Some(MemberEvent::DeltaHeld { round, from: contributor.site })
            }
            MemberCommand::FetchSlice { round, from, .. } => Some(MemberEvent::SliceHeld { round, from }),
            MemberCommand::FetchPart { round, part, .. } => Some(MemberEvent::PartHeld { round, from: part.part.site }),
            MemberCommand::Reduce { round, values, .. } => {
                Some(MemberEvent::Reduced { round, hash: hash(format!("merged {round} {values:?}")) })
            }
            MemberCommand::Merge(commit) => {
                self.state = (commit.round, hash(format!("{:?} {:?}", self.state.1, commit.contributors)));
                Some(MemberEvent::Merged { round: commit.round, state_hash: self.state.1 })
            }
            _ => None,
        }
    }

    fn encodes(&self, plan: &RoundPlan, settings: &Settings, said: &mut Vec<Report>) -> Option<MemberEvent> {
        let hash = |what: String| ContentHash::of(what.as_bytes());
        let assignment = plan.assignments.iter().find(|assignment| assignment.site == self.site);
        let tokens = assignment.map_or(0, |assignment| assignment.samples.wrapping_mul(settings.sequence_length));
        let delta_hash = hash(format!("{} {}", plan.round, self.site));
        let delta_bytes = settings.delta_bytes(plan.fragment);
        let contribution = Contribution { tokens, delta_hash, delta_bytes, loss_nats: 1.0, compute_seconds: 1.0 };
        if settings.sync.adaptive {
            let measurement = Measurement { lost_part: 0.1, encode_seconds: 1e-4, merge_seconds: 1e-4, links: vec![] };
            said.push(Report::Measured { round: plan.round, measurement });
        }
        let slice = |part: &rounds::Part| hash(format!("{delta_hash} {:?}", part.values));
        let slice_hashes = plan.parts.iter().map(slice).collect();
        Some(MemberEvent::Encoded { round: plan.round, contribution, slice_hashes })
    }
}

/// An input in which two sites come, say these things by turns, and time passes.
pub(crate) fn said_to_coordinator(kind: u8, words: &[FromSite]) -> Vec<u8> {
    let mut input = vec![kind];
    (0..2).for_each(|site: u8| note(&mut input, ENTER | site << 2, &[]));
    for (word, site) in words.iter().zip([0_u8, 1].into_iter().cycle()) {
        note(&mut input, SAY | site << 2, &body_of(word));
    }
    note(&mut input, TICK, &[4]);
    input
}

/// An input in which the coordinator says these things to a site.
pub(crate) fn said_to_site(kind: u8, words: &[Directive]) -> Vec<u8> {
    let mut input = vec![kind];
    words.iter().for_each(|word| note(&mut input, SAY, &body_of(&FromCoordinator::Directive(word.clone()))));
    input
}

/// A whole run of two honest sites.
pub(crate) struct HonestRun {
    /// As an input of [`coordinator_hears`].
    pub(crate) heard: Vec<u8>,
    /// What its first site was told, as an input of [`site_hears`].
    pub(crate) told: Vec<u8>,
    /// What people were told.
    pub(crate) events: Vec<Event>,
}

/// Such a run, in a room of that kind.
pub(crate) fn honest_run(kind: u8) -> HonestRun {
    let settings = Settings::new(&config(kind));
    let (mut room, mut heard, mut told) = (Room::new(kind), vec![kind], vec![kind]);
    let mut players: Vec<Player> = (0..2).map(Player::new).collect();
    let mut waiting = VecDeque::new();
    for player in &players {
        happens(&mut room, &mut heard, player.site, ENTER, &[]);
        if let MemberCommand::Report(ready) = player.member.start() {
            waiting.push_back((player.site, ready));
        }
    }
    while !room.desk.is_done() && heard.len() < 40_000 {
        while let Some((site, report)) = waiting.pop_front() {
            happens(&mut room, &mut heard, site, SAY, &body_of(&FromSite::Report(report)));
        }
        for player in &mut players {
            for directive in room.directives(player.site.0) {
                if player.site == SiteId(0) {
                    note(&mut told, SAY, &body_of(&FromCoordinator::Directive(directive.clone())));
                }
                let said = player.follows(directive, &settings).expect("an honest coordinator is followed");
                waiting.extend(said.into_iter().map(|report| (player.site, report)));
            }
        }
        if waiting.is_empty() {
            happens(&mut room, &mut heard, SiteId(0), TICK, &[4]);
        }
    }
    HonestRun { heard, told, events: room.post.told }
}

fn happens(room: &mut Room, heard: &mut Vec<u8>, site: SiteId, what: u8, body: &[u8]) {
    let first = what | (site.0 as u8) << 2;
    note(heard, first, body);
    room.happens(first, body);
}

/// A log of JSON lines, as people could have edited it: what is taken over is the same when it is written and read again, and a
/// coordinator goes on with it.
pub fn log_lines(bytes: &[u8]) {
    thread_local! {
        static PLACE: Place = Place::new();
    }
    PLACE.with(|place| {
        place.write("log", bytes);
        let bound = Bound { base_bytes: 1 << 20, per_byte: 128 };
        let opened = bound.check(bytes.len(), || FileStore::open(&place.path().join("log")));
        let Ok((store, lines)) = opened else { return };
        drop(store);
        place.write("again", b"");
        let again = place.path().join("again");
        let (mut store, nothing) = FileStore::open(&again).expect("an empty log");
        assert!(nothing.is_empty());
        lines.iter().for_each(|line| store.append(line).expect("temporary files can be written"));
        drop(store);
        assert_eq!(FileStore::open(&again).expect("it was written").1, lines);
        goes_on_with(lines);
    });
}

fn goes_on_with(lines: Vec<Line>) {
    let config = config(0);
    let briefing =
        Briefing { config_text: String::new(), config, files: Vec::new(), initial_hash: INITIAL, parameters: 1 };
    let options = DeskOptions { secret: secret(), invite_seconds: None, rounds_max: None, train_seconds_max: None };
    let desk = Desk::open(briefing, (Box::new(MemoryStore), lines), options, &mut Post::default());
    desk.expect("in memory").tick(1.0, &mut Post::default()).expect("in memory");
}

/// The lines of [`log_database`]'s log.
pub(crate) static LINES: LazyLock<Vec<Line>> = LazyLock::new(|| {
    let admitted = |site: u32| Line::Admitted {
        admitted: SiteId(site),
        name: format!("site-{site}"),
        fingerprint: ContentHash::of(&site.to_le_bytes()),
        invite: (site == 1).then(|| secret().digest()),
    };
    let term = |term| Line::Decision(rounds::coordinator::Record::TermStarted { term: base::Term(term) });
    let rolled_back = Line::Decision(rounds::coordinator::Record::RolledBack { to: Round(0) });
    let state_hash = rounds::coordinator::Record::StateHash { round: Round(0), state_hash: INITIAL };
    let revoked = Line::Revoked { revoked: ContentHash::of(b"stranger") };
    vec![term(1), admitted(0), admitted(1), Line::Decision(state_hash), term(2), rolled_back, revoked]
});

/// The coordinator's database, damaged in any way: what is read are the lines that were written, or a beginning of them.
///
/// An input is the length that is left of the file (u32, little-endian), and changes of it: a place (u32, little-endian) and what it is
/// combined with by exclusive or. So inputs are short, though the file is not. One that begins with four bytes 0xff is followed by a
/// whole file.
pub fn log_database(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let file = match u32::from_le_bytes(*length) {
        u32::MAX => rest.to_vec(),
        length => damaged(&DATABASE, length as usize, rest),
    };
    let storage = InMemoryBackend::new();
    storage.set_len(file.len() as u64).expect("memory has room");
    storage.write(0, &file).expect("memory can be written");
    // Its cache of 4 MiB, and what it allocates in memory instead of on a disk when it mends the file.
    let bound = Bound { base_bytes: 32 << 20, per_byte: 64 };
    let opened = bound.check(file.len(), || DatabaseStore::on(Path::new("log"), storage));
    if let Ok((_, lines)) = opened {
        assert!(LINES.starts_with(&lines), "lines were read that nobody wrote: {lines:?}");
    }
}

fn damaged(whole: &[u8], length: usize, changes: &[u8]) -> Vec<u8> {
    let mut file = whole[..length.min(whole.len())].to_vec();
    for &[a, b, c, d, with] in changes.as_chunks::<5>().0 {
        if let Some(byte) = file.get_mut(u32::from_le_bytes([a, b, c, d]) as usize % whole.len()) {
            *byte ^= with;
        }
    }
    file
}

/// The file of a log of [`LINES`].
pub(crate) static DATABASE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let place = Place::new();
    let path = place.path().join("log");
    DatabaseStore::create(&path, &LINES).expect("a temporary file can be written");
    std::fs::read(path).expect("it was written")
});

/// The files in which `beringia admit` and `revoke` leave word.
pub fn access_files(bytes: &[u8]) {
    thread_local! {
        static PLACE: Place = Place::new();
    }
    PLACE.with(|place| {
        let digest = secret().digest();
        let folder = AccessFolder::of(place.path());
        for name in ["door.json", "members.json", &format!("invites/{digest}.json"), "revoked/nobody"] {
            place.write(&format!("access/{name}"), bytes);
        }
        let bound = Bound { base_bytes: 1 << 20, per_byte: 64 };
        let read = || (folder.read().expect("the folder is there"), folder.door(), folder.members());
        let (access, door, members) = bound.check(bytes.len(), read);
        assert!(access.revoked.is_empty() && access.invites.keys().all(|invite| *invite == digest));
        if let Ok(members) = members {
            folder.write_members(&members).expect("temporary files can be written");
            assert_eq!(folder.members().expect("it was written"), members);
        }
        if let Ok(Door { address, run, fingerprint }) = door {
            // An invite is only made of an address and a name that it can hold.
            let _ = wire::Invite::new(&address, &run, fingerprint, secret());
        }
    });
}
