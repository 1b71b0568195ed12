//! Links between machines, and the control connections over them, with what TCP promises and no more.
//!
//! A connection delivers what was sent in order, each message once, until it breaks; then it loses what had not arrived. A link that is
//! cut holds back what is sent over it, as a sender that sends again and again does, and delivers it once the link is mended. Whoever
//! sends to a process that is gone is told so by its machine, if that is there to tell. Everything else an end must find out by silence.

use crate::coordinator_node::CoordinatorEvent;
use crate::queue::{Happening, Queue};
use crate::site::SiteEvent;
use base::random::Random;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use wire::message::{FromCoordinator, FromSite};

/// A machine: 0 is the coordinator's, 1 that of site 0, and so on.
pub(crate) type Machine = usize;

/// The coordinator's machine.
pub(crate) const COORDINATOR: Machine = 0;

/// Messages one end may have on its way before it is told that the other does not read.
const LANE_MESSAGES_MAX: usize = coordinator::serve::OUTBOX_MAX;

/// A name for a connection that is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ConnectionId(u64);

/// What travels.
#[derive(Debug)]
pub(crate) enum Packet {
    ToCoordinator(FromSite),
    ToSite(FromCoordinator),
    /// The sender has ended its side well, or its system did it for a process that was killed.
    End,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
}

#[derive(Debug, Default)]
struct Lane {
    last_arrival: f64,
    held: VecDeque<Packet>,
    ended: bool,
}

#[derive(Debug)]
struct Connection {
    site: usize,
    site_process: u64,
    coordinator_process: u64,
    up: Lane,
    down: Lane,
    broken: bool,
}

/// All links and connections.
pub(crate) struct Network {
    latency_seconds: f64,
    cut: BTreeMap<(Machine, Machine), u32>,
    slowed: BTreeMap<(Machine, Machine), f64>,
    off: BTreeSet<Machine>,
    connections: BTreeMap<ConnectionId, Connection>,
    made: u64,
    random: Random,
}

impl Network {
    pub(crate) fn new(latency_seconds: f64, random: Random) -> Self {
        let (cut, slowed, off) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        Self { latency_seconds, cut, slowed, off, connections: BTreeMap::new(), made: 0, random }
    }

    /// Whether something sent now arrives.
    pub(crate) fn is_open(&self, from: Machine, to: Machine) -> bool {
        !self.cut.contains_key(&(from, to)) && !self.off.contains(&from) && !self.off.contains(&to)
    }

    /// How long something takes that is sent now: the link's latency, and now and then much more.
    pub(crate) fn delay(&mut self, from: Machine, to: Machine) -> f64 {
        let usual = self.latency_seconds * (0.8 + 0.4 * self.random.next_unit());
        let late = if self.random.next_below(50) == 0 { 0.2 + self.random.next_unit() } else { 0.0 };
        (usual + late) * self.slowed.get(&(from, to)).copied().unwrap_or(1.0)
    }

    pub(crate) fn cut(&mut self, from: Machine, to: Machine) {
        *self.cut.entry((from, to)).or_default() += 1;
    }

    /// Mends a link; what was held back goes on its way.
    pub(crate) fn mend(&mut self, from: Machine, to: Machine, now: f64, queue: &mut Queue) {
        if let Some(cuts) = self.cut.get_mut(&(from, to)) {
            *cuts -= 1;
            if *cuts == 0 {
                self.cut.remove(&(from, to));
            }
        }
        self.release(now, queue);
    }

    pub(crate) fn slow(&mut self, from: Machine, to: Machine, factor: f64) {
        self.slowed.insert((from, to), factor);
    }

    pub(crate) fn unslow(&mut self, from: Machine, to: Machine) {
        self.slowed.remove(&(from, to));
    }

    /// A machine without power answers nobody, and keeps no connection.
    pub(crate) fn power(&mut self, machine: Machine, is_on: bool) {
        if is_on {
            self.off.remove(&machine);
        } else {
            self.off.insert(machine);
        }
    }

    /// Sends everything that a cut held back and no longer does.
    fn release(&mut self, now: f64, queue: &mut Queue) {
        let ids: Vec<ConnectionId> = self.connections.keys().copied().collect();
        for (id, way) in ids.into_iter().flat_map(|id| [(id, Way::Up), (id, Way::Down)]) {
            let Some((from, to)) = self.ends(id, way) else { continue };
            if self.is_open(from, to) {
                let held = self.lane(id, way).map(|lane| std::mem::take(&mut lane.held)).unwrap_or_default();
                held.into_iter().for_each(|packet| self.depart(id, way, packet, now, queue));
            }
        }
    }

    /// A new connection between two processes.
    pub(crate) fn connect(&mut self, (site, site_process): (usize, u64), coordinator_process: u64) -> ConnectionId {
        self.made += 1;
        let (up, down, broken) = (Lane::default(), Lane::default(), false);
        let connection = Connection { site, site_process, coordinator_process, up, down, broken };
        self.connections.insert(ConnectionId(self.made), connection);
        ConnectionId(self.made)
    }

    fn lane(&mut self, id: ConnectionId, way: Way) -> Option<&mut Lane> {
        let connection = self.connections.get_mut(&id)?;
        Some(match way {
            Way::Up => &mut connection.up,
            Way::Down => &mut connection.down,
        })
    }

    fn ends(&self, id: ConnectionId, way: Way) -> Option<(Machine, Machine)> {
        let site = self.connections.get(&id)?.site + 1;
        Some(match way {
            Way::Up => (site, COORDINATOR),
            Way::Down => (COORDINATOR, site),
        })
    }

    /// Sends; false where the other end has not taken what was sent before for too long.
    pub(crate) fn send(&mut self, id: ConnectionId, way: Way, packet: Packet, now: f64, queue: &mut Queue) -> bool {
        let Some((from, to)) = self.ends(id, way) else { return true };
        let is_broken = self.connections.get(&id).is_none_or(|connection| connection.broken);
        if is_broken {
            self.tell_broken(id, way, now, queue);
            return true;
        }
        let is_open = self.is_open(from, to);
        let Some(lane) = self.lane(id, way) else { return true };
        if lane.ended {
            return true;
        }
        lane.ended = matches!(packet, Packet::End);
        if !is_open || !lane.held.is_empty() {
            lane.held.push_back(packet);
            return lane.held.len() <= LANE_MESSAGES_MAX;
        }
        self.depart(id, way, packet, now, queue);
        true
    }

    fn depart(&mut self, id: ConnectionId, way: Way, packet: Packet, now: f64, queue: &mut Queue) {
        let Some((from, to)) = self.ends(id, way) else { return };
        let arrival = now + self.delay(from, to);
        let Some(lane) = self.lane(id, way) else { return };
        // What was sent first arrives first.
        lane.last_arrival = lane.last_arrival.max(arrival);
        let (arrival, connection) = (lane.last_arrival, &self.connections[&id]);
        let happening = match way {
            Way::Up => Happening::Coordinator(connection.coordinator_process, CoordinatorEvent::Arrives(id, packet)),
            Way::Down => {
                Happening::Site(connection.site, connection.site_process, SiteEvent::Arrives(id, Box::new(packet)))
            }
        };
        queue.push(arrival, happening);
    }

    /// Whether what arrives over it counts: not where it broke on the way.
    pub(crate) fn delivers(&self, id: ConnectionId) -> bool {
        self.connections.get(&id).is_some_and(|connection| !connection.broken)
    }

    /// The connection is reset: what has not arrived never will. Each end is told, if it can be reached.
    pub(crate) fn reset(&mut self, id: ConnectionId, now: f64, queue: &mut Queue) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.broken = true;
        connection.up.held.clear();
        connection.down.held.clear();
        self.tell_broken(id, Way::Up, now, queue);
        self.tell_broken(id, Way::Down, now, queue);
    }

    /// Something has come for a process that is gone: its machine says so, if it has power.
    pub(crate) fn answer_for_the_dead(&mut self, id: ConnectionId, way: Way, now: f64, queue: &mut Queue) {
        self.tell_broken(id, way, now, queue);
    }

    /// A machine tells who sends to it that nobody is there.
    fn tell_broken(&mut self, id: ConnectionId, way: Way, now: f64, queue: &mut Queue) {
        let Some((from, to)) = self.ends(id, way) else { return };
        if !self.is_open(from, to) || !self.is_open(to, from) {
            return;
        }
        let Some(connection) = self.connections.get(&id) else { return };
        let happening = match way {
            Way::Up => Happening::Site(connection.site, connection.site_process, SiteEvent::Broken(id)),
            Way::Down => Happening::Coordinator(connection.coordinator_process, CoordinatorEvent::Broken(id)),
        };
        queue.push(now + self.delay(from, to), happening);
    }

    /// The coordinator's process at its end.
    pub(crate) fn coordinator_of(&self, id: ConnectionId) -> u64 {
        self.connections.get(&id).map_or(0, |connection| connection.coordinator_process)
    }

    /// The connections of a process of a machine.
    pub(crate) fn of(&self, machine: Machine) -> Vec<ConnectionId> {
        let is_end = |connection: &Connection| machine == COORDINATOR || connection.site + 1 == machine;
        self.connections.iter().filter(|(_, connection)| is_end(connection)).map(|(id, _)| *id).collect()
    }

    /// A process was killed: its system ends its side of each connection. A machine that lost power ends nothing, and forgets.
    pub(crate) fn killed(&mut self, machine: Machine, process: u64, by_power: bool, now: f64, queue: &mut Queue) {
        let way = if machine == COORDINATOR { Way::Down } else { Way::Up };
        for id in self.of(machine) {
            let connection = &self.connections[&id];
            let own = if machine == COORDINATOR { connection.coordinator_process } else { connection.site_process };
            if own != process {
                continue;
            }
            if by_power {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.broken = true;
                }
            } else {
                self.send(id, way, Packet::End, now, queue);
            }
        }
    }

    /// Ends of processes that are gone on both sides.
    pub(crate) fn forget_dead(&mut self, is_alive: impl Fn(usize, u64, u64) -> bool) {
        self.connections
            .retain(|_, connection| is_alive(connection.site, connection.site_process, connection.coordinator_process));
    }
}
