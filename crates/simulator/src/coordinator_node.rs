//! A process of the coordinator: the desk that ships on the database that ships, with this simulation's connections, time and disk.

use crate::around::Around;
use crate::disk::Disk;
use crate::network::{ConnectionId, Packet, Way};
use crate::options::Sabotage;
use crate::site::GlobalState;
use crate::trace::Observation;
use base::{Round, SiteId};
use coordinator::serve::SITE_SILENCE_MAX;
use coordinator::{
    Briefing, DatabaseStore, Desk, DeskOptions, Line, LinkNumber, Moment, Outlet, Store, StoreError, Verdict, Visitor,
};
use rounds::coordinator::Record;
use rounds::{Directive, RoundPlan, SampleRange};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use telemetry::event::SampleSpan;
use telemetry::{Event, LeaseShare};
use wire::message::{FromCoordinator, Greeting, Role, SiteHello};

/// What the log is called in errors.
const LOG_NAME: &str = "coordinator.redb";

/// Port of a site's address, for the look of it.
const SITE_PORT: u16 = 7_000;

/// What happens to a process of the coordinator.
#[derive(Debug)]
pub(crate) enum CoordinatorEvent {
    Tick,
    Arrives(ConnectionId, Packet),
    Broken(ConnectionId),
    /// A site's process greets over the connection of its that many-th try.
    Greets(usize, u64, u64),
    /// Somebody asks it to finish.
    Stop,
}

/// How a process of the coordinator is after an event.
#[derive(Debug)]
pub(crate) enum Fate {
    Alive,
    Died(String),
    Done { finished: bool },
}

/// Decisions that the log has acknowledged since the last look.
type Acknowledged = Arc<Mutex<Vec<Record>>>;

/// The store that ships, watched.
struct WatchedStore {
    store: DatabaseStore,
    acknowledged: Acknowledged,
}

impl Store for WatchedStore {
    fn append(&mut self, line: &Line) -> Result<(), StoreError> {
        self.store.append(line)?;
        if let Line::Decision(record) = line {
            self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).push(record.clone());
        }
        Ok(())
    }
}

/// The bug [`Sabotage::WriteBehind`]: each line is written when the next one comes.
struct WriteBehind {
    store: WatchedStore,
    waiting: Option<Line>,
}

impl Store for WriteBehind {
    fn append(&mut self, line: &Line) -> Result<(), StoreError> {
        match self.waiting.replace(line.clone()) {
            Some(before) => self.store.append(&before),
            None => Ok(()),
        }
    }
}

/// A running process.
pub(crate) struct CoordinatorNode {
    pub(crate) process: u64,
    desk: Desk,
    ways_out: WaysOut,
    acknowledged: Acknowledged,
    connections: BTreeMap<ConnectionId, (SiteId, LinkNumber)>,
    heard: BTreeMap<ConnectionId, f64>,
    began: f64,
    /// How far its clock was set ahead.
    pub(crate) clock_ahead: f64,
}

/// What the desk needs to send.
#[derive(Default)]
struct WaysOut {
    links: BTreeMap<LinkNumber, ConnectionId>,
    /// The process is killed after so many more messages.
    sends_left: Option<u32>,
    /// Leases by round, for the bug [`Sabotage::LeaseTwice`].
    leases: BTreeMap<Round, BTreeMap<SiteId, Vec<SampleRange>>>,
}

struct Out<'a> {
    around: &'a mut Around,
    ways: &'a mut WaysOut,
}

impl Outlet for Out<'_> {
    fn send(&mut self, link: LinkNumber, message: FromCoordinator) -> bool {
        match &mut self.ways.sends_left {
            Some(0) => return true,
            Some(left) if !matches!(message, FromCoordinator::Pulse) => *left -= 1,
            _ => {}
        }
        let message = match (self.around.sabotage, message) {
            (Some(Sabotage::LeaseTwice), FromCoordinator::Directive(Directive::Begin(plan))) => {
                let plan = self.ways.with_leases_of_the_round_before(Arc::unwrap_or_clone(plan));
                FromCoordinator::Directive(Directive::Begin(Arc::new(plan)))
            }
            (_, message) => message,
        };
        let Some(connection) = self.ways.links.get(&link) else { return false };
        let Around { net, queue, now, .. } = &mut *self.around;
        net.send(*connection, Way::Down, Packet::ToSite(message), *now, queue)
    }

    fn close(&mut self, link: LinkNumber) {
        if let Some(connection) = self.ways.links.remove(&link) {
            let Around { net, queue, now, .. } = &mut *self.around;
            net.send(connection, Way::Down, Packet::End, *now, queue);
        }
    }

    fn tell(&mut self, event: Event) {
        match event {
            Event::SiteLeft { site, reason } => self.around.observe(Observation::SiteLeft(site, reason)),
            Event::RoundStarted { round, term, leases } => {
                let range = |span: &SampleSpan| SampleRange { start: span.start, end: span.end };
                let lease = |of: LeaseShare| (of.site, of.ranges.iter().map(range).collect());
                self.around.observe(Observation::Planned(round, term, leases.into_iter().map(lease).collect()));
            }
            _ => {}
        }
    }
}

impl WaysOut {
    fn with_leases_of_the_round_before(&mut self, mut plan: RoundPlan) -> RoundPlan {
        let of = |plan: &RoundPlan| plan.assignments.iter().map(|a| (a.site, a.lease.clone())).collect();
        self.leases.entry(plan.round).or_insert_with(|| of(&plan));
        let before = self.leases.get(&Round(plan.round.0.saturating_sub(1)));
        for assignment in &mut plan.assignments {
            let samples = |lease: &Vec<SampleRange>| lease.iter().map(SampleRange::samples).sum::<u64>();
            let again = before.and_then(|leases| leases.get(&assignment.site));
            if let Some(again) = again.filter(|again| samples(again) == assignment.samples) {
                assignment.lease.clone_from(again);
            }
        }
        plan
    }
}

impl CoordinatorNode {
    /// Starts a process on the log on that disk.
    pub(crate) fn start(process: u64, disk: &Disk, around: &mut Around) -> Result<Self, String> {
        let (store, lines) = DatabaseStore::on(Path::new(LOG_NAME), disk.open()).map_err(|error| error.to_string())?;
        let records = lines.iter().filter_map(|line| match line {
            Line::Decision(record) => Some(record.clone()),
            Line::Admitted { .. } | Line::Revoked { .. } => None,
        });
        around.observe(Observation::LogRead(records.collect()));
        let acknowledged = Acknowledged::default();
        let store = WatchedStore { store, acknowledged: Arc::clone(&acknowledged) };
        let store: Box<dyn Store> = match around.sabotage {
            Some(Sabotage::WriteBehind) => Box::new(WriteBehind { store, waiting: None }),
            _ => Box::new(store),
        };
        let config = &around.scenario.config;
        let briefing = Briefing {
            config: (**config).clone(),
            config_text: String::new(),
            files: Vec::new(),
            initial_hash: GlobalState::initial(config).hash(),
            parameters: config.schema().elements() as u64,
        };
        let options = DeskOptions {
            secret: around.secret.clone(),
            // Clocks jump here, and who may come in is not what is simulated.
            invite_seconds: Some(f64::INFINITY),
            rounds_max: None,
            train_seconds_max: None,
        };
        let (mut ways_out, began) = (WaysOut::default(), around.now);
        let desk = Desk::open(briefing, (store, lines), options, &mut Out { around, ways: &mut ways_out });
        let desk = desk.map_err(|error| error.to_string())?;
        let (connections, heard) = (BTreeMap::new(), BTreeMap::new());
        let mut node = Self { process, desk, ways_out, acknowledged, connections, heard, began, clock_ahead: 0.0 };
        node.see(around);
        Ok(node)
    }

    /// The process is killed after it has sent so many more messages.
    pub(crate) fn kill_after_sends(&mut self, sends: u32) {
        self.ways_out.sends_left = Some(sends);
    }

    /// Nothing breaks from now on.
    pub(crate) fn calm(&mut self) {
        self.ways_out.sends_left = self.ways_out.sends_left.filter(|left| *left == 0);
    }

    pub(crate) fn handle(&mut self, event: CoordinatorEvent, around: &mut Around) -> Fate {
        let result = match event {
            CoordinatorEvent::Tick => self.tick(around),
            CoordinatorEvent::Arrives(id, packet) => self.arrives(id, packet, around),
            CoordinatorEvent::Broken(id) => self.lost(id, around),
            CoordinatorEvent::Greets(site, process, _) => self.greeted(site, process, around),
            CoordinatorEvent::Stop => {
                let now = self.time(around);
                self.desk.stop(now, &mut Out { around, ways: &mut self.ways_out })
            }
        };
        self.see(around);
        match result {
            Err(error) => Fate::Died(error.to_string()),
            Ok(()) if self.ways_out.sends_left == Some(0) => Fate::Died("killed while it was sending".to_owned()),
            Ok(()) if self.desk.is_done() => {
                let summary = self.desk.summarise(&mut Out { around, ways: &mut self.ways_out });
                Fate::Done { finished: summary.finished }
            }
            Ok(()) => Fate::Alive,
        }
    }

    /// Its own clock.
    fn time(&self, around: &Around) -> f64 {
        around.now - self.began + self.clock_ahead
    }

    fn see(&mut self, around: &mut Around) {
        let acknowledged = std::mem::take(&mut *self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner));
        for record in acknowledged {
            around.observe(Observation::Logged(Box::new(record)));
        }
        if let Err(reason) = self.desk.ledger().audit() {
            around.observe(Observation::LedgerWrong(reason));
        }
    }

    fn tick(&mut self, around: &mut Around) -> Result<(), StoreError> {
        let silence_max = SITE_SILENCE_MAX.as_secs_f64();
        let silent: Vec<ConnectionId> =
            self.heard.iter().filter(|(_, heard)| around.now - **heard > silence_max).map(|(id, _)| *id).collect();
        for id in silent {
            self.lost(id, around)?;
        }
        let now = self.time(around);
        self.desk.tick(now, &mut Out { around, ways: &mut self.ways_out })
    }

    fn arrives(&mut self, id: ConnectionId, packet: Packet, around: &mut Around) -> Result<(), StoreError> {
        let Packet::ToCoordinator(message) = packet else { return self.lost(id, around) };
        let Some(from) = self.connections.get(&id).copied() else { return Ok(()) };
        self.heard.insert(id, around.now);
        let now = self.time(around);
        self.desk.said(from, message, now, &mut Out { around, ways: &mut self.ways_out })
    }

    fn lost(&mut self, id: ConnectionId, around: &mut Around) -> Result<(), StoreError> {
        self.heard.remove(&id);
        let Some(from) = self.connections.remove(&id) else { return Ok(()) };
        let now = self.time(around);
        self.desk.lost(from, now, &mut Out { around, ways: &mut self.ways_out })
    }

    fn greeted(&mut self, site: usize, process: u64, around: &mut Around) -> Result<(), StoreError> {
        let id = around.net.connect((site, process), self.process);
        let at = Moment { now: self.time(around), unix_seconds: 0 };
        match self.desk.greet(visitor(site, around), at)? {
            Verdict::Site(admission) => {
                self.ways_out.links.insert(admission.link, id);
                self.connections.insert(id, (admission.peer.site, admission.link));
                self.heard.insert(id, around.now);
                let now = self.time(around);
                self.desk.enter(*admission, now, &mut Out { around, ways: &mut self.ways_out })
            }
            // It is told so, and comes again.
            Verdict::Refused { .. } | Verdict::Observer => {
                let Around { net, queue, now, .. } = around;
                net.send(id, Way::Down, Packet::End, *now, queue);
                Ok(())
            }
        }
    }
}

fn visitor(site: usize, around: &Around) -> Visitor {
    let hello = SiteHello {
        name: format!("machine-{site}"),
        advertised_host: String::new(),
        port: SITE_PORT,
        engine: "simulated".to_owned(),
        threads: 1,
        slowdown: 1.0,
    };
    let (run, secret) = (around.scenario.config.run.name.clone(), Some(around.secret.clone()));
    let greeting = Greeting { run, secret, role: Role::Site(hello) };
    let address = SocketAddr::from((Ipv4Addr::new(10, 0, 0, site as u8 + 1), SITE_PORT));
    Visitor { fingerprint: crate::scenario::Scenario::fingerprint(site), address, greeting }
}
