//! The loop: takes what happens next, gives it to whom it happens, and shows the checkers what there is to see.

use crate::around::Around;
use crate::checkers::{Checkers, Violation};
use crate::coordinator_node::{CoordinatorEvent, CoordinatorNode, Fate};
use crate::disk::Disk;
use crate::faults::Fault;
use crate::network::{COORDINATOR, Machine, Network, Packet, Way};
use crate::options::Options;
use crate::queue::{Happening, Queue, Sleeper};
use crate::scenario::Scenario;
use crate::site::{GlobalState, Key, SiteDisk, SiteEvent, SiteFate, SiteProcess, Try, asker_fingerprint};
use crate::trace::{Observation, Trace};
use base::random::Random;
use coordinator::serve::TICK;
use rounds::coordinator::Record;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use wire::Secret;

/// Streams of random numbers: links, the rest of the world, faults.
const LINK_STREAM: u64 = 2;
const WORLD_STREAM: u64 = 3;
const FAULT_STREAM: u64 = 4;

/// A supervisor starts a process again after so long, and up to as much more.
const RESTART_SECONDS: f64 = 0.5;

/// Sites do not all come up at the same instant.
const FIRST_START_SECONDS: f64 = 2.0;

/// Commits after the last fault before the run is asked to stop.
const COMMITS_TO_HEAL: u64 = 3;

/// A tick that was waiting while its process was stopped comes after the messages that were.
const TICK_AFTER_FREEZE_SECONDS: f64 = 0.01;

/// Times are whole nanoseconds: what differs by less is the same.
const INSTANT_SECONDS: f64 = 1e-6;

/// More waiting events than this are a leak: each site has some dozens.
const EVENTS_MAX: usize = 100_000;

/// A run of some minutes has 10^5 events; one that never ends has more than this.
const STEPS_MAX: u64 = 5_000_000;

struct SiteNode {
    disk: SiteDisk,
    process: Option<SiteProcess>,
    made: u64,
    /// Its part is over: no supervisor starts it again.
    is_over: bool,
    is_starting: bool,
}

/// What came of one seed.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) violation: Option<Violation>,
    pub(crate) virtual_seconds: f64,
    pub(crate) commits: u64,
    pub(crate) faults: u64,
    /// Values of the last state of each site.
    pub(crate) values: Vec<Vec<u8>>,
    pub(crate) trace: Vec<String>,
}

/// All processes, disks and links of one simulation.
pub(crate) struct World {
    around: Around,
    checkers: Checkers,
    trace: Trace,
    coordinators: BTreeMap<u64, CoordinatorNode>,
    processes_made: u64,
    /// The process that has the log.
    leader: Option<u64>,
    /// A replaced process that is stopped, or has the address.
    hanging: Option<u64>,
    /// The same, once it has the address.
    usurper: Option<u64>,
    is_starting: bool,
    disk: Disk,
    sites: Vec<SiteNode>,
    /// Processes that are stopped, until when, and what waits for them.
    frozen: BTreeMap<Sleeper, (f64, Vec<Happening>)>,
    fault_random: Random,
    faults: u64,
    open_faults: Vec<Fault>,
    /// Whether the coordinator's machine loses power when its process dies in mid-write.
    dies_by_power: bool,
    may_break: bool,
    commits: u64,
    /// Rollbacks in the log that the checkers know of.
    times_gone_back: usize,
    commits_healed: Option<u64>,
    is_done: bool,
    /// Asks the coordinator to stop after that many commits, if ever.
    stop_after: Option<u64>,
}

impl World {
    pub(crate) fn new(seed: u64, options: &Options) -> Option<Self> {
        Self::of(seed, Scenario::draw(seed, options), options)
    }

    /// One whose result does not depend on measured speeds.
    pub(crate) fn repeatable(seed: u64, options: &Options) -> Option<Self> {
        Self::of(seed, Scenario::draw(seed, options).repeatable(), options)
    }

    fn of(seed: u64, scenario: Scenario, options: &Options) -> Option<Self> {
        let scenario = Arc::new(scenario);
        let secret = Secret::generate().ok()?;
        let sites = scenario.speeds.len();
        let net = Network::new(scenario.latency_seconds, Random::new(seed, LINK_STREAM));
        let around = Around {
            now: 0.0,
            queue: Queue::default(),
            net,
            random: Random::new(seed, WORLD_STREAM),
            sabotage: options.sabotage,
            observed: Vec::new(),
            replaced: BTreeSet::new(),
            corrupt: BTreeMap::new(),
            slowed: BTreeMap::new(),
            machines: (0..sites).map(|site| (Scenario::fingerprint(site), site)).collect(),
            secret,
            scenario: Arc::clone(&scenario),
        };
        let site = |_| SiteNode {
            disk: SiteDisk::new(&scenario.config),
            process: None,
            made: 0,
            is_over: false,
            is_starting: false,
        };
        let mut world = Self {
            checkers: Checkers::new(&scenario),
            trace: Trace::new(options.trace_lines_max),
            coordinators: BTreeMap::new(),
            processes_made: 0,
            leader: None,
            hanging: None,
            usurper: None,
            is_starting: false,
            disk: Disk::default(),
            sites: (0..sites).map(site).collect(),
            frozen: BTreeMap::new(),
            fault_random: Random::new(seed, FAULT_STREAM),
            faults: 0,
            open_faults: Vec::new(),
            dies_by_power: false,
            may_break: options.faults,
            commits: 0,
            times_gone_back: 0,
            commits_healed: None,
            is_done: false,
            stop_after: None,
            around,
        };
        world.start_coordinator_in(0.0);
        (0..sites).for_each(|site| {
            let seconds = FIRST_START_SECONDS * world.around.random.next_unit();
            world.start_site_in(site, seconds);
        });
        if options.faults {
            world.plan_fault();
            world.around.queue.push(scenario.fault_seconds, Happening::FaultsStop);
        }
        Some(world)
    }

    /// The same with the states that sites have on their disks, and the coordinator's log, after what the checkers have seen of it.
    pub(crate) fn with_disks_of(mut self, other: Self) -> Self {
        (self.disk, self.checkers) = (other.disk, other.checkers);
        for (site, before) in self.sites.iter_mut().zip(other.sites) {
            site.disk = before.disk;
        }
        self
    }

    /// Stops the run well after so many commits.
    pub(crate) fn stop_after(&mut self, commits: u64) {
        self.stop_after = Some(commits);
    }

    /// Runs until the coordinator is done and all sites have ended, or an invariant is violated.
    pub(crate) fn run(&mut self) -> Option<Violation> {
        for _ in 0..STEPS_MAX {
            let Some((seconds, happening)) = self.around.queue.pop() else {
                return Some(self.violated("I5 heal", "nothing more happens, and the run is not over".to_owned()));
            };
            self.around.now = seconds;
            let caught = catch_unwind(AssertUnwindSafe(|| self.happen(happening)));
            if let Err(panic) = caught {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                self.around.observe(Observation::Panicked(text.unwrap_or_default()));
            }
            if let Some(violation) = self.look() {
                return Some(violation);
            }
            // Whoever had no line when the run ended calls somebody who will not answer, until its patience is over.
            if self.is_done && self.sites.iter().all(|site| site.process.as_ref().is_none_or(SiteProcess::is_calling)) {
                return None;
            }
        }
        Some(self.violated("I5 heal", format!("the run is not over after {STEPS_MAX} events")))
    }

    pub(crate) fn into_end(self, violation: Option<Violation>) -> Ended {
        let values = self.sites.iter().filter_map(|site| site.disk.last()).map(GlobalState::values).collect();
        Ended {
            violation,
            virtual_seconds: self.around.now,
            commits: self.commits,
            faults: self.faults,
            values,
            trace: self.trace.into_lines(),
        }
    }

    fn violated(&self, invariant: &'static str, what: String) -> Violation {
        Violation { invariant, what, seconds: self.around.now }
    }

    /// Shows the checkers what was seen.
    fn look(&mut self) -> Option<Violation> {
        let now = self.around.now;
        let observed = std::mem::take(&mut self.around.observed);
        for observation in
            observed.into_iter().flat_map(|observation| self.with_untold(observation)).collect::<Vec<_>>()
        {
            if let Observation::Logged(record) = &observation
                && matches!(**record, Record::Committed(_))
            {
                self.committed();
            }
            let found = self.checkers.see(now, &observation);
            self.trace.push(now, observation);
            if found.is_some() {
                return found;
            }
        }
        if self.around.queue.len() > EVENTS_MAX {
            return Some(self.violated("I6 bounded", format!("{} events wait", self.around.queue.len())));
        }
        self.checkers.at(now)
    }

    /// A process that died while it wrote that the run goes back may have written it all the same: the log tells of it before anybody
    /// has.
    fn with_untold(&mut self, observation: Observation) -> Vec<Observation> {
        let goes_back = |record: &&Record| matches!(record, Record::RolledBack { .. });
        let mut untold = Vec::new();
        match &observation {
            Observation::Logged(record) => self.times_gone_back += usize::from(goes_back(&&**record)),
            Observation::LogRead(records) => {
                let unseen = records.iter().filter(goes_back).skip(self.times_gone_back);
                untold.extend(unseen.map(|record| Observation::Logged(Box::new(record.clone()))));
                self.times_gone_back += untold.len();
            }
            _ => {}
        }
        untold.push(observation);
        untold
    }

    fn committed(&mut self) {
        self.commits += 1;
        let mut stops = self.stop_after == Some(self.commits);
        if let Some(healed) = &mut self.commits_healed {
            *healed += 1;
            stops |= self.stop_after.is_none() && *healed == COMMITS_TO_HEAL;
        }
        if let Some(leader) = self.leader.filter(|_| stops) {
            let now = self.around.now;
            self.around.queue.push(now, Happening::Coordinator(leader, CoordinatorEvent::Stop));
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Coordinator(process, event) => self.at_coordinator(process, event),
            Happening::Site(site, process, event) => self.at_site(site, process, event),
            Happening::Dials(site, process, number) => self.dials(site, process, number),
            Happening::Asked { holder, asker, tried, key } => self.asked(holder, asker, tried, &key),
            Happening::StartCoordinator => self.start_coordinator(),
            Happening::StartSite(site) => self.start_site(site),
            Happening::Fault(fault) => self.break_something(fault),
            Happening::Mended(fault) => self.mend(&fault),
            Happening::FaultsStop => self.stop_faults(),
            Happening::Wakes(sleeper) => {
                // It may have been stopped again meanwhile, for longer.
                let now = self.around.now + INSTANT_SECONDS;
                if self.frozen.get(&sleeper).is_some_and(|(until, _)| *until <= now) {
                    self.wake(sleeper);
                }
            }
        }
    }

    fn at_coordinator(&mut self, process: u64, event: CoordinatorEvent) {
        let now = self.around.now;
        if let Some((_, waiting)) = self.frozen.get_mut(&Sleeper::Coordinator(process)) {
            return waiting.push(Happening::Coordinator(process, event));
        }
        let Some(node) = self.coordinators.get_mut(&process) else {
            if let CoordinatorEvent::Arrives(id, _) = event {
                self.around.net.answer_for_the_dead(id, Way::Up, now, &mut self.around.queue);
            }
            return;
        };
        match &event {
            CoordinatorEvent::Tick => {
                let next = now + TICK.as_secs_f64();
                self.around.queue.push(next, Happening::Coordinator(process, CoordinatorEvent::Tick));
            }
            CoordinatorEvent::Arrives(id, _) if !self.around.net.delivers(*id) => return,
            // Who has given up has closed its end.
            CoordinatorEvent::Greets(site, site_process, number)
                if self.sites[*site].process.as_ref().is_none_or(|running| !running.dials(*site_process, *number)) =>
            {
                return;
            }
            _ => {}
        }
        match node.handle(event, &mut self.around) {
            Fate::Alive => {}
            Fate::Died(why) => {
                self.around.observe(Observation::Fault(format!("the coordinator's process {process} ended: {why}")));
                let by_power = self.disk.has_failed() && self.dies_by_power;
                self.end_coordinator(process, by_power);
                self.start_coordinator_in(RESTART_SECONDS);
            }
            Fate::Done { finished } => {
                self.around.observe(Observation::Done { finished });
                self.end_coordinator(process, false);
                self.is_done = true;
            }
        }
    }

    /// The process is gone. Its system closes its connections, unless the machine has no power.
    fn end_coordinator(&mut self, process: u64, by_power: bool) {
        if !self.coordinators.contains_key(&process) {
            return;
        }
        let is_leader = self.leader == Some(process);
        if is_leader {
            // What the database does when it is dropped must not reach the disk: a killed process does nothing.
            self.disk.fence();
            self.leader = None;
        }
        if by_power && is_leader {
            self.disk.lose_power(&mut self.fault_random);
            self.around.net.power(COORDINATOR, false);
        }
        self.coordinators.remove(&process);
        self.wake(Sleeper::Coordinator(process));
        if self.hanging == Some(process) {
            self.hanging = None;
        }
        if self.usurper == Some(process) {
            self.usurper = None;
        }
        let Around { net, queue, now, .. } = &mut self.around;
        net.killed(COORDINATOR, process, by_power, *now, queue);
    }

    fn start_coordinator_in(&mut self, seconds: f64) {
        if !self.is_starting && !self.is_done {
            self.is_starting = true;
            self.around.queue.push(self.around.now + seconds, Happening::StartCoordinator);
        }
    }

    fn start_coordinator(&mut self) {
        self.is_starting = false;
        if self.leader.is_some() || self.is_done {
            return;
        }
        self.around.net.power(COORDINATOR, true);
        self.processes_made += 1;
        let process = self.processes_made;
        match CoordinatorNode::start(process, &self.disk, &mut self.around) {
            Ok(node) => {
                self.leader = Some(process);
                self.coordinators.insert(process, node);
                self.around.queue.push(self.around.now, Happening::Coordinator(process, CoordinatorEvent::Tick));
            }
            Err(why) => {
                self.around.observe(Observation::Fault(format!("the coordinator does not start: {why}")));
                self.start_coordinator_in(1.0);
            }
        }
    }

    fn at_site(&mut self, site: usize, process: u64, event: SiteEvent) {
        let now = self.around.now;
        if let Some((_, waiting)) = self.frozen.get_mut(&Sleeper::Site(site)) {
            return waiting.push(Happening::Site(site, process, event));
        }
        let node = &mut self.sites[site];
        let Some(running) = node.process.as_mut().filter(|running| running.process == process) else {
            if let SiteEvent::Arrives(id, packet) = event
                && !matches!(*packet, Packet::End)
            {
                self.around.net.answer_for_the_dead(id, Way::Down, now, &mut self.around.queue);
            }
            return;
        };
        if let SiteEvent::Arrives(id, _) = &event
            && !self.around.net.delivers(*id)
        {
            return;
        }
        match running.handle(event, &mut node.disk, &mut self.around) {
            SiteFate::Alive => {}
            fate => {
                node.process = None;
                node.is_over = fate == SiteFate::Over;
                self.around.observe(Observation::Ended(site));
                self.forget_dead_connections();
                let seconds = RESTART_SECONDS * (1.0 + self.around.random.next_unit());
                self.start_site_in(site, seconds);
            }
        }
    }

    fn forget_dead_connections(&mut self) {
        let is_site =
            |site: usize, process| self.sites[site].process.as_ref().is_some_and(|running| running.process == process);
        self.around.net.forget_dead(|site, site_process, process| {
            is_site(site, site_process) || self.coordinators.contains_key(&process)
        });
    }

    fn start_site_in(&mut self, site: usize, seconds: f64) {
        let node = &mut self.sites[site];
        if !node.is_starting && !node.is_over && !self.is_done {
            node.is_starting = true;
            self.around.queue.push(self.around.now + seconds, Happening::StartSite(site));
        }
    }

    fn start_site(&mut self, site: usize) {
        let node = &mut self.sites[site];
        node.is_starting = false;
        if node.process.is_some() || self.is_done {
            return;
        }
        self.around.net.power(site + 1, true);
        node.made += 1;
        node.process = Some(SiteProcess::start(site, node.made, &mut node.disk, &mut self.around));
    }

    /// A site's process dials the address of the coordinator.
    fn dials(&mut self, site: usize, process: u64, number: u64) {
        let Some(serving) = self.usurper.or(self.leader) else {
            // Refused at once.
            let refused = Happening::Site(site, process, SiteEvent::NotWelcome(number));
            return self.around.queue.push(self.around.now + self.around.scenario.latency_seconds, refused);
        };
        let net = &self.around.net;
        if net.is_open(site + 1, COORDINATOR) && net.is_open(COORDINATOR, site + 1) {
            let greets = CoordinatorEvent::Greets(site, process, number);
            self.around.queue.push(self.around.now, Happening::Coordinator(serving, greets));
        }
    }

    /// A request has come to a holder.
    fn asked(&mut self, holder: usize, asker: (usize, u64), tried: Try, key: &Key) {
        let now = self.around.now;
        if let Some((_, waiting)) = self.frozen.get_mut(&Sleeper::Site(holder)) {
            return waiting.push(Happening::Asked { holder, asker, tried, key: key.clone() });
        }
        let net = &mut self.around.net;
        if !net.is_open(asker.0 + 1, holder + 1) || !net.is_open(holder + 1, asker.0 + 1) {
            // The asker will have waited for long enough.
            return;
        }
        let running = self.sites[holder].process.as_mut();
        let answer = running.and_then(|running| running.serve(asker_fingerprint(asker.0), key));
        let transfer = answer.as_ref().map_or(0.0, |bytes| bytes.len() as f64 / self.around.scenario.bytes_per_second);
        let arrives = now + net.delay(holder + 1, asker.0 + 1) + transfer;
        let answered = SiteEvent::Answered(tried, answer);
        self.around.queue.push(arrives, Happening::Site(asker.0, asker.1, answered));
    }

    fn plan_fault(&mut self) {
        // Exponential: so many a minute on average, and never at even times.
        let wait = -self.around.scenario.fault_every_seconds * libm::log(1.0 - self.fault_random.next_unit());
        let fault = Fault::draw(&mut self.fault_random, self.sites.len());
        self.around.queue.push(self.around.now + wait, Happening::Fault(fault));
    }

    fn break_something(&mut self, fault: Fault) {
        if !self.may_break || self.is_done {
            return;
        }
        self.faults += 1;
        self.plan_fault();
        self.around.observe(Observation::Fault(format!("{fault:?}")));
        if let Some(seconds) = fault.seconds() {
            self.open_faults.push(fault.clone());
            self.around.queue.push(self.around.now + seconds, Happening::Mended(fault.clone()));
        }
        match fault {
            Fault::KillSite { site, by_power, down_seconds } => self.kill_site(site, by_power, down_seconds),
            Fault::KillCoordinator { by_power, down_seconds } => {
                if let Some(leader) = self.leader {
                    self.end_coordinator(leader, by_power);
                    self.start_coordinator_in(down_seconds);
                }
            }
            Fault::KillAtWrite { operations, by_power } => {
                self.disk.fail_after(operations);
                self.dies_by_power = by_power;
            }
            Fault::KillAtSend { sends } => {
                if let Some(node) = self.leader.and_then(|leader| self.coordinators.get_mut(&leader)) {
                    node.kill_after_sends(sends);
                }
            }
            Fault::Cut { from, to, .. } => self.around.net.cut(from, to),
            Fault::CutBoth { from, to, .. } => {
                self.around.net.cut(from, to);
                self.around.net.cut(to, from);
            }
            Fault::Reset { site } => self.reset(site + 1, None),
            Fault::SlowLink { from, to, factor, .. } => {
                self.around.net.slow(from, to, factor);
                self.around.net.slow(to, from, factor);
            }
            Fault::Corrupt { site, transfers } => *self.around.corrupt.entry(site).or_default() += transfers,
            Fault::SlowSite { site, factor, .. } => {
                self.around.slowed.insert(site, factor);
            }
            Fault::Freeze { machine: COORDINATOR, seconds } => {
                if let Some(leader) = self.leader {
                    self.freeze(Sleeper::Coordinator(leader), seconds);
                }
            }
            Fault::Freeze { machine, seconds } => {
                self.freeze(Sleeper::Site(machine - 1), seconds);
            }
            Fault::ClockAhead { seconds } => {
                if let Some(node) = self.leader.and_then(|leader| self.coordinators.get_mut(&leader)) {
                    node.clock_ahead += seconds;
                }
            }
            Fault::DiskFull { machine, .. } => self.fill_disk(machine, true),
            Fault::Replace { back_seconds, stays_seconds } => self.replace(back_seconds, stays_seconds),
        }
    }

    /// Stops a process; what comes for it waits.
    fn freeze(&mut self, sleeper: Sleeper, seconds: f64) {
        let until = self.around.now + seconds;
        self.frozen.entry(sleeper).or_default().0 = until;
        self.around.queue.push(until, Happening::Wakes(sleeper));
    }

    /// Lets a process go on, with all that has come for it, in that order.
    fn wake(&mut self, sleeper: Sleeper) {
        let now = self.around.now;
        for happening in self.frozen.remove(&sleeper).map(|(_, waiting)| waiting).unwrap_or_default() {
            let is_timer = matches!(
                happening,
                Happening::Coordinator(_, CoordinatorEvent::Tick) | Happening::Site(_, _, SiteEvent::Pulse)
            );
            let late = if is_timer { TICK_AFTER_FREEZE_SECONDS } else { 0.0 };
            self.around.queue.push(now + late, happening);
        }
    }

    fn fill_disk(&mut self, machine: Machine, is_full: bool) {
        match machine {
            COORDINATOR => self.disk.set_full(is_full),
            site => self.sites[site - 1].disk.is_full = is_full,
        }
    }

    fn kill_site(&mut self, site: usize, by_power: bool, down_seconds: f64) {
        let now = self.around.now;
        let is_torn = self.fault_random.next_below(2) == 0;
        self.wake(Sleeper::Site(site));
        let node = &mut self.sites[site];
        let Some(running) = node.process.take() else { return };
        if by_power {
            node.disk.lose_power(now, is_torn);
            self.around.net.power(site + 1, false);
        }
        self.around.observe(Observation::Ended(site));
        let Around { net, queue, .. } = &mut self.around;
        net.killed(site + 1, running.process, by_power, now, queue);
        self.start_site_in(site, down_seconds);
    }

    /// Breaks the connections of a machine, or those to a process of the coordinator.
    fn reset(&mut self, machine: Machine, process: Option<u64>) {
        let Around { net, queue, now, .. } = &mut self.around;
        for id in net.of(machine) {
            if process.is_none_or(|process| net.coordinator_of(id) == process) {
                net.reset(id, *now, queue);
            }
        }
    }

    /// The leader hangs; another process takes over log and address; later the old one has the address for a while.
    fn replace(&mut self, back_seconds: f64, stays_seconds: f64) {
        let Some(old) = self.leader.filter(|_| self.hanging.is_none()) else { return };
        let back = self.around.now + back_seconds;
        self.leader = None;
        self.around.replaced.insert(old);
        self.hanging = Some(old);
        self.freeze(Sleeper::Coordinator(old), back_seconds);
        self.reset(COORDINATOR, Some(old));
        self.start_coordinator_in(RESTART_SECONDS);
        let stays = Fault::Replace { back_seconds: 0.0, stays_seconds };
        self.around.queue.push(back, Happening::Mended(stays.clone()));
        self.around.queue.push(back + stays_seconds, Happening::Mended(stays));
    }

    /// A replaced process comes back, or goes for good.
    fn usurp(&mut self) {
        let Some(old) = self.hanging else { return };
        if self.usurper == Some(old) || !self.may_break {
            return self.end_coordinator(old, false);
        }
        self.usurper = Some(old);
        // Whoever was connected to the leader finds somebody else at its address.
        if let Some(leader) = self.leader {
            self.reset(COORDINATOR, Some(leader));
        }
    }

    fn mend(&mut self, fault: &Fault) {
        if matches!(fault, Fault::Replace { .. }) {
            return self.usurp();
        }
        let Some(index) = self.open_faults.iter().position(|open| open == fault) else { return };
        self.open_faults.swap_remove(index);
        self.around.observe(Observation::Fault(format!("mended: {fault:?}")));
        let Around { net, queue, now, .. } = &mut self.around;
        match fault {
            Fault::Cut { from, to, .. } => net.mend(*from, *to, *now, queue),
            Fault::CutBoth { from, to, .. } => {
                net.mend(*from, *to, *now, queue);
                net.mend(*to, *from, *now, queue);
            }
            Fault::SlowLink { from, to, .. } => {
                net.unslow(*from, *to);
                net.unslow(*to, *from);
            }
            Fault::SlowSite { site, .. } => {
                self.around.slowed.remove(site);
            }
            Fault::DiskFull { machine, .. } => self.fill_disk(*machine, false),
            _ => {}
        }
    }

    fn stop_faults(&mut self) {
        (self.may_break, self.commits_healed) = (false, Some(0));
        for fault in self.open_faults.clone() {
            self.mend(&fault);
        }
        if let Some(old) = self.hanging {
            self.end_coordinator(old, false);
        }
        let frozen: Vec<Sleeper> = self.frozen.keys().copied().collect();
        frozen.into_iter().for_each(|sleeper| self.wake(sleeper));
        self.around.corrupt.clear();
        self.disk.calm();
        for node in self.coordinators.values_mut() {
            node.calm();
        }
        self.around.observe(Observation::FaultsStopped);
        self.start_coordinator_in(RESTART_SECONDS);
        (0..self.sites.len()).for_each(|site| {
            if self.sites[site].process.is_none() {
                self.start_site_in(site, RESTART_SECONDS);
            }
        });
    }
}
