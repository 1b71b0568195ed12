//! A simulated site: the member that ships, with a shell that does what `site::agent` does, in virtual time.
//!
//! The shell is written anew, because the agent's is woven into its sockets and threads; what it does in which order is the agent's. What
//! a restart finds is on the [`SiteDisk`]: the last checkpoints, and the newest term that this site has followed.

mod engine;
mod fetch;
mod host;
mod line;
mod recompute;
mod sharded;
mod state;

use fetch::delta_key;
pub(crate) use fetch::{Key, Try, asker_fingerprint};
pub(crate) use state::GlobalState;

use crate::around::Around;
use crate::network::{ConnectionId, Packet, Way};
use crate::options::Sabotage;
use crate::queue::Happening;
use crate::scenario::NO_TERM;
use crate::trace::{Load, Observation};
use base::{ContentHash, Round, RunConfig, SiteId, Term};
use engine::{Engine, Job};
use fetch::Fetches;
use host::{Host, HostJob, Merged, Progress};
use line::Line;
use rounds::plan::LeaveReason;
use rounds::{
    Commit, Contribution, Contributor, FragmentPlan, Member, MemberCommand, MemberEvent, Peer, Report, SampleRange,
    Settings,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use wire::BlobKey;
use wire::message::FromSite;

/// As `site::agent` has it: a site says so often that it is there.
const PULSE_SECONDS: f64 = 2.0;

/// Starting an engine and measuring its speed.
const PREPARE_SECONDS: f64 = 1.0;

/// Anything that an engine or a host does with a small model, beside training.
const SMALL_JOB_SECONDS: f64 = 0.004;

/// Writing a checkpoint.
const SAVE_SECONDS: f64 = 0.05;

/// A checkpoint that was written so recently may be torn when the power goes.
const TORN_SECONDS: f64 = 0.5;

/// What happens to a site's process.
#[derive(Debug)]
pub(crate) enum SiteEvent {
    Arrives(ConnectionId, Box<Packet>),
    Broken(ConnectionId),
    /// Nobody answered that try in time.
    NotWelcome(u64),
    /// It is time to call again.
    Calls,
    Pulse,
    EngineDone,
    HostDone,
    /// It is time for another try.
    Fetch(u64),
    /// A holder has answered that try, or did not in time.
    Answered(Try, Option<Arc<[u8]>>),
}

/// A checkpoint.
struct Saved {
    state: GlobalState,
    /// What the state's hash was; a torn one has another.
    state_hash: ContentHash,
    seconds: f64,
}

/// What outlives a site's process.
pub(crate) struct SiteDisk {
    saved: Vec<Saved>,
    term: Term,
    pub(crate) is_full: bool,
}

impl SiteDisk {
    pub(crate) fn new(config: &RunConfig) -> Self {
        let state = GlobalState::initial(config);
        let saved = Saved { state_hash: state.hash(), state, seconds: 0.0 };
        Self { saved: vec![saved], term: NO_TERM, is_full: false }
    }

    /// The power goes: what was being written may be torn.
    pub(crate) fn lose_power(&mut self, now: f64, is_torn: bool) {
        let has_other = self.saved.len() > 1;
        if let Some(last) =
            self.saved.last_mut().filter(|last| has_other && is_torn && now - last.seconds < TORN_SECONDS)
        {
            last.state.parameters.iter_mut().skip(1).step_by(2).for_each(|value| *value = 0.0);
        }
    }

    /// The newest checkpoint whose hash is right.
    fn newest(&mut self) -> GlobalState {
        while self.saved.len() > 1 && self.saved.last().is_some_and(|saved| saved.state.hash() != saved.state_hash) {
            self.saved.pop();
        }
        self.saved.last().map(|saved| saved.state.clone()).unwrap_or_else(|| unreachable!("the initial one stays"))
    }

    fn save(&mut self, state: &GlobalState, keep: usize, seconds: f64) {
        let saved = Saved { state_hash: state.hash(), state: state.clone(), seconds };
        // A run that was rolled back writes older rounds anew.
        self.saved.retain(|other| other.state.commit.round < saved.state.commit.round);
        self.saved.push(saved);
        // The initial one stays.
        while self.saved.len() > keep + 1 {
            self.saved.remove(1);
        }
    }

    /// The state of the newest checkpoint, for those who look at the end of a run.
    pub(crate) fn last(&self) -> Option<&GlobalState> {
        self.saved.last().map(|saved| &saved.state)
    }
}

/// How a process is after an event.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SiteFate {
    Alive,
    /// Its supervisor starts it again.
    Failed,
    /// Its part is over.
    Over,
}

/// Reports that wait for the last save, and how the process ends then.
struct Ending {
    reports: Vec<Report>,
    fate: SiteFate,
}

/// A running process.
pub(crate) struct SiteProcess {
    machine: usize,
    pub(crate) process: u64,
    config: Arc<RunConfig>,
    settings: Settings,
    line: Line,
    site: Option<SiteId>,
    member: Option<Member>,
    /// As `site::agent` has it: the number of the last recall that came before there was a member.
    recall: u32,
    pub(crate) state: GlobalState,
    held: (Round, ContentHash),
    saved_round: Round,
    engine: Engine,
    host: Host,
    /// Changes when plans are withdrawn.
    generation: u64,
    peers: BTreeMap<SiteId, Peer>,
    shelf: BTreeMap<(Round, BlobKey), Arc<[u8]>>,
    shelf_state: Option<(Round, Arc<[u8]>)>,
    deltas: BTreeMap<(Round, SiteId), Arc<[u8]>>,
    /// For this site to merge, by maker.
    slices: BTreeMap<(Round, SiteId), Arc<[u8]>>,
    /// By who has merged them.
    parts: BTreeMap<(Round, SiteId), Arc<[u8]>>,
    merged: BTreeMap<Round, Merged>,
    fetches: Fetches,
    /// Samples whose gradient is wanted at the global parameters after that round.
    witness: Option<(Round, Vec<SampleRange>)>,
    ending: Option<Ending>,
    fate: SiteFate,
}

impl SiteProcess {
    /// Starts a process with what is on the disk, and dials.
    pub(crate) fn start(machine: usize, process: u64, disk: &mut SiteDisk, around: &mut Around) -> Self {
        let config = Arc::clone(&around.scenario.config);
        let state = disk.newest();
        let held = (state.commit.round, state.hash());
        around.observe(Observation::Loaded(machine, held.0));
        let mut started = Self {
            machine,
            process,
            settings: Settings::new(&config),
            line: Line::default(),
            site: None,
            member: None,
            recall: 0,
            engine: Engine::new(state.parameters.clone(), held.0),
            host: Host::new(SiteId(0), Arc::clone(&config), around.sabotage),
            saved_round: held.0,
            state,
            held,
            config,
            generation: 0,
            peers: BTreeMap::new(),
            shelf: BTreeMap::new(),
            shelf_state: None,
            deltas: BTreeMap::new(),
            slices: BTreeMap::new(),
            parts: BTreeMap::new(),
            merged: BTreeMap::new(),
            fetches: Fetches::default(),
            witness: None,
            ending: None,
            fate: SiteFate::Alive,
        };
        started.dial(around);
        started
    }

    pub(crate) fn handle(&mut self, event: SiteEvent, disk: &mut SiteDisk, around: &mut Around) -> SiteFate {
        match event {
            SiteEvent::Arrives(id, packet) => self.arrives(id, *packet, disk, around),
            SiteEvent::Broken(id) if self.line.is_over(id) => self.lose_coordinator(around),
            SiteEvent::Broken(_) => {}
            SiteEvent::NotWelcome(number) => self.not_welcome(number, around),
            SiteEvent::Calls => self.dial(around),
            SiteEvent::Pulse => self.pulse(around),
            SiteEvent::EngineDone => self.engine_done(disk, around),
            SiteEvent::HostDone => self.host_done(disk, around),
            SiteEvent::Fetch(id) if self.state_given_up(id) => self.feed(MemberEvent::StateUnavailable, disk, around),
            SiteEvent::Fetch(id) => self.try_fetch(id, around),
            SiteEvent::Answered(tried, answer) => self.answered(tried, answer, disk, around),
        }
        self.start_jobs(around);
        std::mem::replace(&mut self.fate, SiteFate::Alive)
    }

    fn at(&self, around: &mut Around, seconds: f64, event: SiteEvent) {
        around.queue.push(around.now + seconds, Happening::Site(self.machine, self.process, event));
    }

    fn pulse(&mut self, around: &mut Around) {
        let jobs = self.engine.queue.len() + self.host.queue.len();
        let deltas = self.shelf.len() + self.deltas.len() + self.slices.len() + self.parts.len();
        around.observe(Observation::Holds(self.machine, Load { jobs, deltas, fetches: self.fetches.len() }));
        self.tell(FromSite::Pulse, around);
        if self.line.is_silent(around.now) {
            self.lose_coordinator(around);
        }
        self.at(around, PULSE_SECONDS, SiteEvent::Pulse);
    }

    fn tell(&mut self, message: FromSite, around: &mut Around) {
        let Some(connection) = self.line.connection() else { return };
        let Around { net, queue, now, .. } = around;
        // A queue that is full is noticed by silence.
        net.send(connection, Way::Up, Packet::ToCoordinator(message), *now, queue);
    }

    /// Saves, then ends like that.
    fn end(&mut self, fate: SiteFate, _around: &mut Around) {
        self.generation += 1;
        if self.ending.is_none() {
            self.ending = Some(Ending { reports: Vec::new(), fate });
            self.engine.queue.push_back(Job::Finish);
        }
    }

    fn leave(&mut self, around: &mut Around) {
        let Some(Ending { reports, fate }) = self.ending.take() else { return };
        for report in reports {
            self.tell(FromSite::Report(report), around);
        }
        self.close(fate, around);
    }

    fn close(&mut self, fate: SiteFate, around: &mut Around) {
        self.hang_up(around);
        self.fate = fate;
    }

    /// The engine failed: the others need not wait for a deadline.
    fn fail(&mut self, around: &mut Around) {
        self.tell(FromSite::Report(Report::Leave { reason: LeaveReason::EngineFailed }), around);
        self.close(SiteFate::Failed, around);
    }

    fn feed(&mut self, event: MemberEvent, disk: &mut SiteDisk, around: &mut Around) {
        let Some(member) = &mut self.member else {
            return self.heard_early(event, around);
        };
        let before = member.term();
        let handled = member.handle(event);
        if member.term() != before {
            // On the disk before anything is done for that coordinator.
            disk.term = member.term();
            around.observe(Observation::Follows(self.machine, disk.term));
        }
        match handled {
            Ok(commands) => commands.into_iter().for_each(|command| self.obey(command, around)),
            Err(error) => {
                let is_replaced =
                    self.line.connection().is_some_and(|id| around.replaced.contains(&around.net.coordinator_of(id)));
                around.observe(Observation::Refuses { machine: self.machine, why: error.to_string(), is_replaced });
                self.end(SiteFate::Failed, around);
            }
        }
    }

    fn set_peers(&mut self, peers: Vec<Peer>) {
        self.peers = peers.into_iter().map(|peer| (peer.site, peer)).collect();
    }

    fn obey(&mut self, command: MemberCommand, around: &mut Around) {
        let generation = self.generation;
        match command {
            MemberCommand::Report(report) => match &mut self.ending {
                Some(ending) => ending.reports.push(report),
                None => self.tell(FromSite::Report(report), around),
            },
            MemberCommand::Peers(peers) => self.set_peers(peers),
            MemberCommand::FetchState { commit, state_hash, from } => {
                self.fetch_state(commit, state_hash, from, around)
            }
            MemberCommand::Train { plan, assignment, steps } => {
                self.engine.queue.push_back(Job::Train { plan, assignment, steps, generation });
            }
            MemberCommand::Snapshot { plan } => self.engine.queue.push_back(Job::Snapshot { plan, generation }),
            MemberCommand::Apply { round } => {
                if let Some(merged) = self.merged.remove(&round) {
                    self.engine.queue.push_back(Job::Apply(merged));
                }
                // What was merged before a line broke is part of the state that the engine began anew from.
                self.merged.retain(|later, _| *later > round);
            }
            MemberCommand::Abandon => {
                self.generation += 1;
                let newest = self.member.as_ref().map_or(self.held.0, Member::newest_commit);
                self.fetches.stop(|round| round > newest);
                self.host.queue.push_back(HostJob::Withdraw);
                self.engine.queue.push_back(Job::StartOver);
            }
            MemberCommand::FetchDelta { round, fragment, contributor } => {
                self.fetch_of_round(Key::Delta { round, fragment, contributor }, around);
            }
            MemberCommand::FetchSlice { round, fragment, values, from, hash } => {
                self.fetch_slice(round, (fragment, values), (from, hash), around);
            }
            MemberCommand::Reduce { round, fragment, values, contributors } => {
                self.reduce(round, (fragment, values), &contributors, around);
            }
            MemberCommand::FetchPart { round, fragment, part } => {
                self.fetch_of_round(Key::Part { round, fragment, part }, around);
            }
            MemberCommand::Witness { round, samples } => self.witness = Some((round, samples)),
            MemberCommand::Merge(commit) => self.merge(commit, around),
            MemberCommand::Finish { .. } => self.end(SiteFate::Over, around),
            MemberCommand::Quit(LeaveReason::Stopped | LeaveReason::Finished) => self.end(SiteFate::Over, around),
            MemberCommand::Quit(_) => self.end(SiteFate::Failed, around),
        }
    }

    fn merge(&mut self, commit: Commit, around: &mut Around) {
        let delta = |contributor: &Contributor| self.deltas.get(&(commit.round, contributor.site)).cloned();
        let inputs: Option<Vec<Arc<[u8]>>> = match commit.parts.is_empty() {
            true => commit.contributors.iter().map(delta).collect(),
            false => self.merged_parts(&commit),
        };
        // The member merges only what is held.
        let Some(inputs) = inputs else { return self.fail(around) };
        self.host.queue.push_back(HostJob::Merge { commit, inputs });
    }

    /// What is not wanted any more after the commit of `round`.
    fn forget_through(&mut self, round: Round, fragment: FragmentPlan) {
        for held in [&mut self.deltas, &mut self.slices, &mut self.parts] {
            held.retain(|(held, _), _| *held > round);
        }
        self.fetches.stop(|fetched| fetched <= round);
        let kept = self.settings.rounds_kept(fragment, self.peers.len());
        let oldest = Round(round.0.saturating_sub(kept));
        self.shelf.retain(|(offered, _), _| *offered >= oldest);
    }

    /// What this site gives to others.
    pub(crate) fn serve(&mut self, asker: ContentHash, key: &Key) -> Option<Arc<[u8]>> {
        if !self.peers.values().any(|peer| peer.fingerprint == asker) {
            return None;
        }
        match key {
            Key::Delta { round, .. } | Key::Slice { round, .. } | Key::Part { round, .. } => {
                self.shelf.get(&(*round, key.blob())).cloned()
            }
            Key::State { commit, .. } => {
                if let Some((round, bytes)) = &self.shelf_state
                    && *round == commit.round
                {
                    return Some(Arc::clone(bytes));
                }
                if self.state.commit.round != commit.round {
                    return None;
                }
                let bytes: Arc<[u8]> = self.state.encode().into();
                self.shelf_state = Some((commit.round, Arc::clone(&bytes)));
                Some(bytes)
            }
        }
    }

    /// Gives engine and host their next jobs, if they have none.
    fn start_jobs(&mut self, around: &mut Around) {
        if self.engine.busy.is_none()
            && let Some(job) = self.engine.next()
        {
            let seconds = self.engine_seconds(&job, around);
            self.engine.busy = Some((job, seconds));
            self.at(around, seconds, SiteEvent::EngineDone);
        }
        if self.host.busy.is_none()
            && let Some(job) = self.host.queue.pop_front()
        {
            self.host.busy = Some(job);
            self.at(around, SMALL_JOB_SECONDS, SiteEvent::HostDone);
        }
    }

    fn train_seconds(&self, samples: u64, around: &Around) -> f64 {
        let tokens = samples * self.settings.sequence_length;
        tokens as f64 / around.scenario.speeds[self.machine] * around.slowness(self.machine)
    }

    fn engine_seconds(&self, job: &Job, around: &Around) -> f64 {
        match job {
            Job::Prepare => PREPARE_SECONDS,
            Job::Train { assignment, steps, generation, .. } if *generation == self.generation => {
                let samples = steps.clone().map(|index| assignment.step_samples(index)).sum();
                self.train_seconds(samples, around)
            }
            Job::Finish => SAVE_SECONDS,
            Job::Apply(merged) if self.is_save_due(merged.round) => SAVE_SECONDS,
            _ => SMALL_JOB_SECONDS,
        }
    }

    fn is_save_due(&self, round: Round) -> bool {
        round.0.is_multiple_of(self.config.checkpoint.every_rounds)
    }

    fn engine_done(&mut self, disk: &mut SiteDisk, around: &mut Around) {
        let Some((job, seconds)) = self.engine.busy.take() else { return };
        match job {
            Job::Prepare => self.prepared(disk, around),
            Job::Train { plan, assignment, steps, generation } => {
                if generation == self.generation {
                    let samples: u64 = steps.clone().map(|index| assignment.step_samples(index)).sum();
                    let tokens = samples * self.settings.sequence_length;
                    let verdict = self.verdict(&plan, &assignment, &steps, around);
                    if verdict.is_none_or(|verdict| verdict.mismatch.is_none()) {
                        self.engine.train(&plan, &assignment, steps, Progress { tokens, compute_seconds: seconds });
                    }
                    if let Some(verdict) = verdict {
                        self.recomputed(&plan, verdict, disk, around);
                    }
                }
            }
            Job::Snapshot { plan, generation } => {
                if generation == self.generation {
                    let fragment = host::fragment_of(&self.config, plan.fragment);
                    let (values, progress) = self.engine.snapshot(&plan, &fragment);
                    self.host.queue.push_back(HostJob::Encode { plan, values, progress, generation });
                }
            }
            Job::Apply(merged) => {
                let fragment = host::fragment_of(&self.config, merged.fragment);
                let global = (&self.state.parameters[..], self.state.commit.round);
                self.engine.apply(&merged, &fragment, global);
                if self.is_save_due(merged.round) && !self.save(disk, around) {
                    self.fail(around);
                }
            }
            Job::StartOver => self.start_over(around),
            Job::Finish => {
                self.start_over(around);
                if self.save(disk, around) { self.leave(around) } else { self.fail(around) }
            }
        }
    }

    fn prepared(&mut self, disk: &mut SiteDisk, around: &mut Around) {
        let (Some(site), (round, state_hash)) = (self.site, self.held) else { return };
        // A site that has forgotten which terms it has seen follows any coordinator.
        let term = if around.sabotage == Some(Sabotage::ForgottenFencing) { NO_TERM } else { disk.term };
        let member = Member::new(site, round, state_hash, around.scenario.speeds[self.machine]);
        let member = member.after_term(term).after_recall(self.recall);
        let start = member.start();
        self.member = Some(member);
        around.observe(Observation::Started { machine: self.machine, site, round });
        self.obey(start, around);
    }

    fn start_over(&mut self, around: &mut Around) {
        self.engine.put_back((&self.state.parameters, self.state.commit.round));
        around.observe(Observation::StartedOver(self.machine));
    }

    /// Writes a checkpoint, unless there is one of that round; false where it cannot.
    fn save(&mut self, disk: &mut SiteDisk, around: &mut Around) -> bool {
        let round = self.state.commit.round;
        if round == self.saved_round {
            return true;
        }
        if disk.is_full {
            return false;
        }
        disk.save(&self.state, self.config.checkpoint.keep, around.now);
        self.saved_round = round;
        around.observe(Observation::Saved(self.machine, round));
        true
    }

    fn host_done(&mut self, disk: &mut SiteDisk, around: &mut Around) {
        let Some(job) = self.host.busy.take() else { return };
        match job {
            HostJob::Encode { plan, values, progress, generation } => {
                if generation == self.generation {
                    self.encode(plan, &values, progress, disk, around);
                }
            }
            HostJob::Reduce { round, fragment, values, slices, generation } => {
                if generation == self.generation {
                    self.reduced(round, fragment, (&values, &slices), disk, around);
                }
            }
            HostJob::Merge { commit, inputs } => {
                let Some(merged) = self.host.merge(&commit, &inputs, &mut self.state) else { return self.fail(around) };
                let (round, state_hash, fragment) = (merged.round, merged.state_hash, merged.fragment);
                self.held = (round, state_hash);
                self.merged.insert(round, merged);
                self.forget_through(round, fragment);
                around.observe(Observation::Merged { machine: self.machine, commit, state_hash });
                self.witness(around);
                self.feed(MemberEvent::Merged { round, state_hash }, disk, around);
            }
            HostJob::Install { commit, bytes } => self.install(commit, &bytes, disk, around),
            HostJob::Withdraw => self.host.withdraw(),
        }
    }

    fn install(&mut self, commit: Commit, bytes: &[u8], disk: &mut SiteDisk, around: &mut Around) {
        if !self.host.install(&commit, bytes, &mut self.state) {
            return self.feed(MemberEvent::StateUnavailable, disk, around);
        }
        let (round, state_hash) = (commit.round, ContentHash::of(bytes));
        self.held = (round, state_hash);
        self.merged.clear();
        self.engine.queue.push_back(Job::StartOver);
        around.observe(Observation::Installed(self.machine, commit, self.state.hash()));
        self.feed(MemberEvent::StateHeld { round, state_hash }, disk, around);
    }

    fn encode(
        &mut self,
        plan: rounds::RoundPlan,
        values: &[f32],
        progress: Progress,
        disk: &mut SiteDisk,
        around: &mut Around,
    ) {
        let (Some(site), round) = (self.site, plan.round) else { return };
        let delta = self.host.encode(&plan, values, &self.state);
        let contribution = Contribution {
            tokens: progress.tokens,
            delta_hash: ContentHash::of(&delta),
            delta_bytes: delta.len() as u64,
            loss_nats: 1.0,
            compute_seconds: progress.compute_seconds,
        };
        let slice_hashes = self.offer_slices(&plan, &delta);
        self.shelf.insert((round, delta_key(round, plan.fragment, site)), Arc::clone(&delta));
        self.deltas.insert((round, site), Arc::clone(&delta));
        let own = plan.assignments.iter().find(|assignment| assignment.site == site);
        let lease = own.map(|assignment| assignment.lease.clone()).unwrap_or_default();
        around.observe(Observation::Offers { machine: self.machine, site, round, term: plan.term, lease, delta });
        self.feed(MemberEvent::Encoded { round, contribution, slice_hashes }, disk, around);
    }
}
