//! The processes of a lab at work, and what happens to them: the edge at which scheduled faults become signals.
//!
//! Whoever is killed is started again with the same command. A process that ends by itself although the run goes on is named in
//! the report, and started again as well, as a machine's supervisor would.

use super::faults::{Action, Faults, Observed, What};
use super::process::Process;
use super::wan::Wan;
use crate::failure::Failure;
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use telemetry::log::system_unix_ms;

/// A process that ends by itself more often is not started again: it would end for ever.
const RESTARTS_MAX: u32 = 10;

/// A fault is left out that begins so late that not all may be back before the run is over: so long after it is mended. A site calls a
/// coordinator that is away at least once in 4 s.
const QUIET_SECONDS: f64 = 5.0;

/// And so many rounds: the one it comes back in, one with it, and as many to spare.
const QUIET_ROUNDS: f64 = 4.0;

/// One process, by its place: the sites in their order, then the coordinator.
struct Hand {
    name: String,
    command: Command,
    process: Option<Process>,
    /// When it is started again that ended by itself.
    again_at: Option<Instant>,
    restarts: u32,
}

/// All of them.
pub(super) struct Crew<'a> {
    folder: PathBuf,
    hands: BTreeMap<usize, Hand>,
    coordinator: usize,
    wan: Option<&'a Wan>,
    faults: Faults,
    /// When the first round began.
    training_since: Option<Instant>,
    /// By the fault's number.
    observed: BTreeMap<usize, Observed>,
    left_out: BTreeSet<usize>,
    ended_badly: Vec<String>,
}

/// What happened to the processes.
#[derive(Debug, Default)]
pub(super) struct Incidents {
    pub(super) observed: Vec<Observed>,
    /// Faults that were left out because the run was about to end.
    pub(super) left_out: Vec<String>,
    /// Processes that ended although nobody ended them.
    pub(super) ended_badly: Vec<String>,
}

/// How far the run is, for faults that come too late.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    pub(super) rounds: u64,
    pub(super) rounds_planned: u64,
}

impl<'a> Crew<'a> {
    pub(super) fn new(folder: &Path, sites: usize, wan: Option<&'a Wan>, faults: Faults) -> Self {
        Self {
            folder: folder.to_owned(),
            hands: BTreeMap::new(),
            coordinator: sites,
            wan,
            faults,
            training_since: None,
            observed: BTreeMap::new(),
            left_out: BTreeSet::new(),
            ended_badly: Vec::new(),
        }
    }

    /// Starts the coordinator. `again` is what starts it once more, where it listens as before.
    pub(super) fn start_coordinator(
        &mut self,
        first: &mut Command,
        again: impl FnOnce(&str) -> Command,
    ) -> Result<String, Failure> {
        let mut process = Process::start("coordinator", first, &self.folder)?;
        let invite = invite(&mut process)?;
        self.insert(self.coordinator, "coordinator", again(&invite), process);
        Ok(invite)
    }

    pub(super) fn start_site(&mut self, place: usize, name: &str, mut command: Command) -> Result<(), Failure> {
        let process = Process::start(name, &mut command, &self.folder)?;
        self.insert(place, name, command, process);
        Ok(())
    }

    fn insert(&mut self, place: usize, name: &str, command: Command, process: Process) {
        let hand = Hand { name: name.to_owned(), command, process: Some(process), again_at: None, restarts: 0 };
        self.hands.insert(place, hand);
    }

    /// Whether the coordinator has ended because the run, or its part in it, is over.
    pub(super) fn is_over(&mut self) -> bool {
        let supervised = !self.faults.is_empty();
        let coordinator = self.hands.get_mut(&self.coordinator).and_then(|hand| hand.process.as_mut());
        let status = coordinator.and_then(Process::ended);
        status.is_some_and(|status| status.success() || !supervised)
    }

    /// A site that failed.
    pub(super) fn failed_site(&mut self) -> Option<&Process> {
        let coordinator = self.coordinator;
        let sites = self.hands.iter_mut().filter(|(place, _)| **place != coordinator);
        let mut processes = sites.filter_map(|(_, hand)| hand.process.as_mut());
        processes.find_map(|process| process.ended().is_some_and(|status| !status.success()).then_some(&*process))
    }

    /// Whether no site is there any more, and none is to come back.
    pub(super) fn is_deserted(&mut self) -> bool {
        let coordinator = self.coordinator;
        let mut sites = self.hands.iter_mut().filter(|(place, _)| **place != coordinator);
        self.faults.is_empty() && sites.all(|(_, hand)| hand.process.as_mut().is_none_or(|site| site.ended().is_some()))
    }

    /// The first round begins, so many seconds ago: times of faults count from then.
    pub(super) fn training_began(&mut self, unix_ms: u64) {
        let ago = std::time::Duration::from_millis(system_unix_ms().saturating_sub(unix_ms));
        self.training_since = self.training_since.or_else(|| Instant::now().checked_sub(ago));
    }

    /// Does what is due.
    pub(super) fn act(&mut self, progress: Progress) -> Result<(), Failure> {
        let Some(since) = self.training_since.filter(|_| !self.faults.is_empty()) else { return Ok(()) };
        let seconds = since.elapsed().as_secs_f64();
        while let Some(action) = self.faults.schedule.next(seconds) {
            match action {
                Action::Begin(index) => self.begin(index, seconds, progress),
                Action::Mend(index) => self.mend(index)?,
            }
        }
        self.supervise()
    }

    fn begin(&mut self, index: usize, seconds: f64, Progress { rounds, rounds_planned }: Progress) {
        let fault = self.faults.schedule.fault(index);
        let left = rounds_planned.saturating_sub(rounds) as f64;
        // Before the first commit nothing is known, and much is left.
        let round_seconds = if rounds == 0 { f64::INFINITY } else { seconds / rounds as f64 };
        if (left - QUIET_ROUNDS) * round_seconds < fault.to - fault.from + QUIET_SECONDS {
            self.left_out.insert(index);
            return;
        }
        let (text, began_unix_ms) = (self.faults.schedule.text(index).to_owned(), system_unix_ms());
        self.observed.insert(index, Observed { fault, text, began_unix_ms, mended_unix_ms: None });
        match fault.what {
            What::Kill(place) => {
                if let Some(mut process) = self.hands.get_mut(&place).and_then(|hand| hand.process.take()) {
                    process.kill();
                }
            }
            What::Stop(place) => self.signal(place, Signal::STOP),
            What::Cut { from, to, both } => self.set_cut((from, to, both), true),
        }
    }

    fn mend(&mut self, index: usize) -> Result<(), Failure> {
        let Some(observed) = self.observed.get_mut(&index) else { return Ok(()) };
        observed.mended_unix_ms = Some(system_unix_ms());
        match observed.fault.what {
            What::Kill(place) => self.start_again(place)?,
            What::Stop(place) => self.signal(place, Signal::CONT),
            What::Cut { from, to, both } => self.set_cut((from, to, both), false),
        }
        Ok(())
    }

    fn signal(&mut self, place: usize, signal: Signal) {
        if let Some(process) = self.hands.get_mut(&place).and_then(|hand| hand.process.as_mut()) {
            process.signal(signal);
        }
    }

    fn set_cut(&self, (from, to, both): (usize, usize, bool), is_cut: bool) {
        let Some(wan) = self.wan else { return };
        wan.set_cut(from, to, is_cut);
        if both {
            wan.set_cut(to, from, is_cut);
        }
    }

    fn start_again(&mut self, place: usize) -> Result<(), Failure> {
        let Some(hand) = self.hands.get_mut(&place).filter(|hand| hand.process.is_none()) else { return Ok(()) };
        hand.process = Some(Process::start(&hand.name, &mut hand.command, &self.folder)?);
        hand.again_at = None;
        Ok(())
    }

    /// Starts again what ended by itself.
    fn supervise(&mut self) -> Result<(), Failure> {
        let mut due = Vec::new();
        for (place, hand) in &mut self.hands {
            let ended = hand.process.as_mut().and_then(Process::ended).filter(|status| !status.success());
            if let Some(status) = ended
                && hand.restarts < RESTARTS_MAX
            {
                self.ended_badly.push(format!("{} ended by itself ({status})", hand.name));
                hand.process = None;
                hand.restarts += 1;
                hand.again_at = Some(Instant::now() + self.faults.restart_after);
            }
            if hand.again_at.is_some_and(|at| at <= Instant::now()) {
                due.push(*place);
            }
        }
        due.into_iter().try_for_each(|place| self.start_again(place))
    }

    /// Waits for the sites' ends after the coordinator's, and gives what each said; null of one that failed or was not there.
    pub(super) fn finish(mut self) -> (Vec<serde_json::Value>, Incidents) {
        let unmended: Vec<usize> =
            self.observed.iter().filter(|(_, fault)| fault.mended_unix_ms.is_none()).map(|(index, _)| *index).collect();
        for index in unmended {
            match self.observed[&index].fault.what {
                What::Kill(_) => {}
                What::Stop(place) => self.signal(place, Signal::CONT),
                What::Cut { from, to, both } => self.set_cut((from, to, both), false),
            }
        }
        let mut outcomes = Vec::new();
        for place in 0..self.coordinator {
            let process = self.hands.get_mut(&place).and_then(|hand| hand.process.take());
            // A site that failed is part of the report: it has no hash.
            let outcome = process.and_then(|mut process| {
                if !process.ends_within(super::process::CHILD_GRACE) {
                    process.end();
                }
                process.object().ok()
            });
            outcomes.push(outcome.unwrap_or(serde_json::Value::Null));
        }
        let left_out = self.left_out.iter().map(|index| self.faults.schedule.text(*index).to_owned()).collect();
        let observed = self.observed.into_values().collect();
        (outcomes, Incidents { observed, left_out, ended_badly: self.ended_badly })
    }
}

/// The invite in the coordinator's first lines.
fn invite(coordinator: &mut Process) -> Result<String, Failure> {
    loop {
        // Asked before what it said is read, so that nothing said before the end is missed.
        let ended = coordinator.ended().is_some();
        let said = coordinator.said();
        let whole = said.rfind('\n').map_or("", |end| &said[..end]);
        if let Some(invite) = whole.lines().find_map(|line| line.trim().strip_prefix("beringia join ")) {
            return Ok(invite.to_owned());
        }
        if ended {
            return Err(coordinator.failure("ended at once"));
        }
        std::thread::sleep(super::POLL);
    }
}
