//! The agent: one site of a run, from the invite to the last commit.
//!
//! A loop over what can happen (a directive, a result of the engine, a fetched delta, a visitor, a signal) feeds the
//! pure [`Member`] and does what it says. Nothing in the loop waits: the engine has its own thread, transfers are tasks.

mod error;
mod recompute;
mod sharded;

use error::leave_reason;
pub use error::{AgentError, describe};

use crate::folder::RunFolder;
use crate::host::{self, HostJob};
use crate::join::{JoinError, conversation, fetch_run};
use crate::line::{Coordinator, Dialler, Line, Received, away};
use crate::merger::{Fragments, Merged, Merger};
use crate::newcomer;
use crate::shelf::Shelf;
use crate::state::{SharedState, TrainingState};
use crate::trainer::{TrainError, Trainer};
use crate::transit::{AGAIN, BULK_STREAMS, Transit, Wanted};
use crate::watchdog::{Call, EngineWatch, Hang, HangBounds};
use crate::worker::{Done, Job, Local, Worker};
use base::config::Exchange;
use base::{ContentHash, Round, RunConfig, SiteId};
use bytes::Bytes;
use engine::{DeviceInfo, Engine, Interrupter};
use objects::ObjectStore;
use rounds::plan::LINK_REPORTS_MAX;
use rounds::{
    Commit, Contributor, Directive, FragmentPlan, LeaveReason, LinkReport, Measurement, Member, MemberCommand,
    MemberEvent, Report, SampleRange, Settings, SiteDevice,
};
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use telemetry::{Event, Reporter};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use wire::message::{FromSite, SiteHello};
use wire::{
    Blob, BlobClient, BlobKey, BlobRequest, Holder, Identity, Incoming, Invite, Listener, ListenerEvent, Proxy,
    Purpose, Sender, Traffic,
};

/// A site says that it is there this often; the coordinator gives up after several are missing.
const PULSE: Duration = Duration::from_secs(2);

/// Words to the coordinator that it has not taken after this long are lost, as is the line.
const COORDINATOR_PATIENCE: Duration = Duration::from_secs(20);

/// Between two looks at what the engine is doing.
const WATCH: Duration = Duration::from_secs(1);

/// Ending an engine's process takes no longer, or fails.
const INTERRUPT_TIME_MAX: Duration = Duration::from_secs(5);

/// Loading a checkpoint, starting an engine and giving it its state: 100 GB from a disk of 200 MB/s are 500 s.
const START_TIME_MAX: Duration = Duration::from_secs(600);

/// Words to a coordinator from a site that ends with an error take no longer.
const FAREWELL_TIME_MAX: Duration = Duration::from_secs(5);

/// Connections over which others fetch from this site: the streams of 250 sites.
const VISITORS_MAX: usize = 1_000;

/// Results that may wait for the loop: the engine gives a handful for each job.
const RESULTS_MAX: usize = 256;

/// How to take part.
#[derive(Debug, Clone)]
pub struct JoinOptions {
    /// From `beringia serve`.
    pub invite: Invite,
    /// Where this site keeps the run.
    pub folder: RunFolder,
    /// For people.
    pub name: String,
    /// Where to listen for the other sites; port 0 takes any. `None` where they cannot dial this one: then they must find its deltas
    /// in an object store.
    pub listen: Option<SocketAddr>,
    /// URL of the object store that deltas are left in as well. Its credentials are in the environment.
    pub objects: Option<String>,
    /// Host under which the other sites reach this one; empty: as the coordinator sees it.
    pub advertised_host: String,
    /// What every connection to the coordinator and to other sites is dialled through.
    pub proxy: Option<Proxy>,
    /// Engine and device, for people.
    pub engine: String,
    /// Host threads of the engine.
    pub threads: usize,
    /// Artificial factor by which inner steps are slowed down; 1 is none.
    pub slowdown: f64,
    /// Time for measuring the own speed before the first round.
    pub measure_seconds: f64,
    /// How long to call a coordinator that went away before leaving.
    pub coordinator_wait: Duration,
    /// When a call of the engine is taken for hung.
    pub hang: HangBounds,
}

/// Makes the engine once settings and state are known. Its error is shown to the user as it is.
pub type EngineFactory =
    Box<dyn FnOnce(&RunConfig, &TrainingState) -> Result<Box<dyn Engine>, engine::EngineError> + Send>;

/// How a site's part ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Its id.
    pub site: SiteId,
    /// Last round that was applied.
    pub round: Round,
    /// BLAKE3 of the state after it (invariant I1).
    pub state_hash: ContentHash,
    /// Whether the run is finished, or this site was asked to stop.
    pub finished: bool,
    /// Bytes sent over the network.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
}

/// A device as the coordinator shows it.
fn describe_device(device: DeviceInfo) -> SiteDevice {
    let DeviceInfo { engine, name, maker, driver, memory_bytes, precision, .. } = device;
    let precision = precision.to_string();
    SiteDevice { engine, name, maker, driver, memory_bytes, precision }.clipped()
}

/// Takes part in a run until it finishes, `stop` completes, or something fails.
///
/// # Errors
/// See [`AgentError`]. Whatever happens, the checkpoints in the folder stay whole.
pub async fn join(
    options: JoinOptions,
    make_engine: EngineFactory,
    reporter: Reporter,
    stop: impl Future<Output = ()> + Send,
) -> Result<Outcome, AgentError> {
    let mut stop = std::pin::pin!(stop);
    // Until there is something to save, whoever is asked to stop is gone at once.
    let (agent, listener, directives) = tokio::select! {
        begun = begin(options, make_engine, reporter) => begun?,
        () = &mut stop => return Err(AgentError::Stopped),
    };
    agent.run(listener, directives, stop).await
}

/// Everything before the first job of the engine's thread, which is given here.
async fn begin(
    options: JoinOptions,
    make_engine: EngineFactory,
    reporter: Reporter,
) -> Result<(Agent, Option<Listener>, mpsc::Receiver<Received>), AgentError> {
    std::fs::create_dir_all(options.folder.root())
        .map_err(|source| JoinError::Write { path: options.folder.root().to_owned(), source })?;
    let identity = Identity::load_or_create(options.folder.root())?;
    let traffic = Traffic::new();
    let store = options.objects.as_ref().map(|url| ObjectStore::open(url, options.invite.run())).transpose()?;
    let listener = match options.listen {
        Some(address) => Some(Listener::bind(address, &identity, &traffic).await?),
        None => None,
    };
    let hello = SiteHello {
        name: options.name.clone(),
        advertised_host: options.advertised_host.clone(),
        port: listener.as_ref().map_or(0, |listener| listener.address().port()),
        engine: options.engine.clone(),
        threads: options.threads as u64,
        slowdown: options.slowdown,
    };
    let (proxy, invite) = (options.proxy.clone(), options.invite.clone());
    let dialler = Dialler { identity: identity.clone(), traffic: traffic.clone(), invite, proxy, hello };
    let (Line { mut sender, directives }, welcome) = dialler.dial().await?;
    let client = BlobClient::through(options.proxy.clone(), identity, traffic.clone());
    let coordinator =
        Holder { address: options.invite.address().to_owned(), fingerprint: options.invite.fingerprint() };
    let fetched = fetch_run(&options.folder, &welcome, &client, &coordinator, |_| {});
    let config = pulsing(&mut sender, fetched).await?;
    let reporter = Arc::new(Mutex::new(reporter));
    let folder = options.folder.clone();
    let prepared = {
        let (folder, config, reporter) = (folder.clone(), config.clone(), Arc::clone(&reporter));
        let (slowdown, site) = (options.slowdown, welcome.site);
        tokio::task::spawn_blocking(move || prepare(folder, config, make_engine, slowdown, site, reporter))
    };
    let prepared = tokio::time::timeout(START_TIME_MAX, pulsing(&mut sender, prepared)).await;
    let Ok(prepared) = prepared else {
        return Err(start_hangs(&mut sender, options.engine).await);
    };
    let (worker, host_jobs) = prepared.map_err(|_| AgentError::Internal)??;
    let first = welcome.site == SiteId(0) && worker.saved.commit.round == Round(0);
    let coordinator =
        Coordinator { dialler, welcome, wait: options.coordinator_wait, sender: Some(sender), calls: None };
    let agent = Agent::new((worker, host_jobs), config, (client, store), coordinator, traffic, reporter, &options);
    agent.job(Job::Prepare {
        samples_per_step: agent.config.train.batch_samples.div_ceil(agent.config.sync.sites as usize) as u64,
        seconds: options.measure_seconds,
        evaluate: first,
    });
    Ok((agent, listener, directives))
}

/// The engine's thread hangs before there is an engine to interrupt: it ends with this process.
async fn start_hangs(sender: &mut Sender, engine: String) -> AgentError {
    let leave = FromSite::Report(Report::Leave { reason: LeaveReason::EngineHung });
    // A coordinator that is gone need not be told.
    let _lost = sender.send_timeout(&leave, FAREWELL_TIME_MAX).await;
    let seconds = START_TIME_MAX.as_secs_f64();
    AgentError::EngineHung { engine, hang: Hang { call: Call::Start, step: 0, seconds, bound_seconds: seconds } }
}

/// Does what may take minutes (fetching data, starting an engine) without falling silent.
async fn pulsing<T>(sender: &mut Sender, work: impl Future<Output = T>) -> T {
    let (mut work, mut pulse) = (std::pin::pin!(work), tokio::time::interval(PULSE));
    loop {
        tokio::select! {
            result = &mut work => return result,
            // A coordinator that is gone is noticed by the receiving task.
            _ = pulse.tick() => { let _lost = sender.send_timeout(&FromSite::Pulse, COORDINATOR_PATIENCE).await; }
        }
    }
}

/// Everything that takes a while before the engine's thread can start.
fn prepare(
    folder: RunFolder,
    config: RunConfig,
    make_engine: EngineFactory,
    slowdown: f64,
    site: SiteId,
    reporter: Arc<Mutex<Reporter>>,
) -> Result<(Worker, HostJobs), AgentError> {
    let (state, skipped) = folder.newest(&config)?;
    for skipped in skipped {
        let path = skipped.path.display().to_string();
        let mut reporter = reporter.lock().unwrap_or_else(PoisonError::into_inner);
        reporter.emit(Event::CheckpointSkipped { path, reason: skipped.reason });
    }
    let mut engine = make_engine(&config, &state).map_err(TrainError::from)?;
    engine.restore(&state.inner).map_err(TrainError::from)?;
    let trainer = Trainer::new(&folder, &config, engine, slowdown)?;
    let saved_round = Some(state.saved.commit.round);
    let (host, host_jobs) = std::sync::mpsc::channel();
    let local = Local::new(&config);
    let worker = Worker {
        folder,
        config,
        trainer,
        site,
        state: Arc::new(RwLock::new(state.global)),
        saved: state.saved,
        reporter,
        host,
        local,
        evaluated: None,
        saved_round,
        restarts: 0,
        engine_starts: 0,
        given_up: Arc::default(),
    };
    Ok((worker, host_jobs))
}

/// What the host's thread takes its jobs from.
type HostJobs = std::sync::mpsc::Receiver<HostJob>;

/// A transfer that ended.
enum Fetched {
    Delta {
        round: Round,
        fragment: FragmentPlan,
        contributor: Contributor,
        bytes: Bytes,
        seconds: f64,
    },
    /// A slice or a merged part.
    Shard {
        round: Round,
        key: BlobKey,
        from: SiteId,
        hash: ContentHash,
        bytes: Bytes,
        seconds: f64,
    },
    State {
        commit: Commit,
        bytes: Vec<u8>,
    },
    StateFailed {
        reason: String,
    },
}

fn delta_key(round: Round, fragment: FragmentPlan, site: SiteId) -> BlobKey {
    BlobKey::Delta { round, fragment: fragment.index, site }
}

/// Who comes next to a site that can be dialled.
async fn next_visit(listener: &mut Option<Listener>) -> Option<ListenerEvent> {
    listener.as_mut()?.next().await
}

/// What the loop knows of the engine in the other thread.
struct EngineHandle {
    device: SiteDevice,
    watch: Arc<EngineWatch>,
    interrupter: Option<Interrupter>,
    given_up: Arc<AtomicBool>,
    bounds: HangBounds,
}

impl EngineHandle {
    fn new(worker: &mut Worker, bounds: HangBounds) -> Self {
        let watch = worker.trainer.watch();
        let engine = worker.trainer.engine();
        let (device, interrupter) = (describe_device(engine.device()), engine.interrupter());
        Self { device, watch, interrupter, given_up: Arc::clone(&worker.given_up), bounds }
    }

    /// Ends its process, where it has one. Whatever that does, it does not hold up the caller.
    async fn give_up(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
        if let Some(interrupter) = self.interrupter.take() {
            let interrupting = tokio::task::spawn_blocking(interrupter);
            let _ended = tokio::time::timeout(INTERRUPT_TIME_MAX, interrupting).await;
        }
    }
}

struct Agent {
    engine: EngineHandle,
    folder: RunFolder,
    config: RunConfig,
    member: Option<Member>,
    /// Number of the last recall that came before there was a member to follow it.
    recall: u32,
    site: SiteId,
    held: (Round, ContentHash),
    shelf: Arc<Shelf>,
    transit: Arc<Transit>,
    jobs: std::sync::mpsc::Sender<Job>,
    host: std::sync::mpsc::Sender<HostJob>,
    done: mpsc::Receiver<Done>,
    client: BlobClient,
    coordinator: Coordinator,
    traffic: Traffic,
    reporter: Arc<Mutex<Reporter>>,
    /// Deltas of rounds that are not merged, the own ones among them.
    deltas: BTreeMap<(Round, SiteId), Bytes>,
    /// The same of sharded rounds.
    shards: sharded::Shards,
    /// Merged rounds that the engine has not been told of.
    merged: BTreeMap<Round, Merged>,
    abandon: Arc<AtomicBool>,
    /// Samples whose gradient is wanted at the global parameters after that round.
    witness: Option<(Round, Vec<SampleRange>)>,
    transfers: JoinSet<Fetched>,
    /// What is on its way here for a round, with the hash that is wanted of it.
    fetching: BTreeMap<(Round, BlobKey), (ContentHash, AbortHandle)>,
    visitors: JoinSet<()>,
    /// What is put into the object store or removed from it.
    errands: JoinSet<()>,
    settings: Settings,
    fragments: Fragments,
    state_bytes: u64,
    /// Reports that wait for the last save, and how the loop ends then.
    ending: Option<Ending>,
}

struct Ending {
    reports: Vec<Report>,
    result: Result<bool, AgentError>,
}

impl Agent {
    fn new(
        (mut worker, host_jobs): (Worker, HostJobs),
        config: RunConfig,
        (client, store): (BlobClient, Option<ObjectStore>),
        coordinator: Coordinator,
        traffic: Traffic,
        reporter: Arc<Mutex<Reporter>>,
        options: &JoinOptions,
    ) -> Self {
        let (jobs, job_queue) = std::sync::mpsc::channel();
        let (done_in, done) = mpsc::channel(RESULTS_MAX);
        let (site, saved) = (worker.site, worker.saved.clone());
        let state: SharedState = Arc::clone(&worker.state);
        let engine = EngineHandle::new(&mut worker, options.hang);
        let state_bytes = state.read().unwrap_or_else(PoisonError::into_inner).encoded_bytes();
        let settings = Settings::new(&config);
        let fragments = Fragments::new(&config);
        let host = worker.host.clone();
        let merger = Merger::new(site, &config, Arc::clone(&state));
        let host_done = done_in.clone();
        // A thread that cannot start shows as a closed channel.
        let thread = std::thread::Builder::new().name("host".to_owned());
        let _running =
            thread.spawn(move || host::run(merger, &host_jobs, |done| host_done.blocking_send(done).is_ok()));
        let thread = std::thread::Builder::new().name(format!("engine {}", options.engine));
        let _running = thread.spawn(move || worker.run(&job_queue, |done| done_in.blocking_send(done).is_ok()));
        let shelf = Arc::new(Shelf::new(site, state));
        let transit = Transit::new(site, client.clone(), Arc::clone(&shelf), store, Arc::clone(&reporter));
        Self {
            engine,
            folder: options.folder.clone(),
            config,
            member: None,
            recall: 0,
            site,
            held: (saved.commit.round, saved.state_hash),
            shelf,
            transit: Arc::new(transit),
            jobs,
            host,
            done,
            client,
            coordinator,
            traffic,
            reporter,
            deltas: BTreeMap::new(),
            shards: sharded::Shards::default(),
            merged: BTreeMap::new(),
            abandon: Arc::default(),
            witness: None,
            transfers: JoinSet::new(),
            fetching: BTreeMap::new(),
            visitors: JoinSet::new(),
            errands: JoinSet::new(),
            settings,
            fragments,
            state_bytes,
            ending: None,
        }
    }

    fn job(&self, job: Job) {
        // A thread that is gone is noticed where its results are awaited.
        let _gone = self.jobs.send(job);
    }

    fn host_job(&self, job: HostJob) {
        // The same.
        let _gone = self.host.send(job);
    }

    fn emit(&self, event: Event) {
        self.reporter.lock().unwrap_or_else(PoisonError::into_inner).emit(event);
    }

    async fn run(
        mut self,
        mut listener: Option<Listener>,
        mut directives: mpsc::Receiver<Received>,
        mut stop: Pin<&mut (impl Future<Output = ()> + Send)>,
    ) -> Result<Outcome, AgentError> {
        let mut pulse = tokio::time::interval(PULSE);
        let mut watch = tokio::time::interval(WATCH);
        self.tell(&FromSite::Report(Report::Device(self.engine.device.clone()))).await;
        let mut stopped = false;
        loop {
            tokio::select! {
                directive = directives.recv(), if self.coordinator.sender.is_some() => match directive {
                    Some(Ok(directive)) => self.feed(MemberEvent::Directive(directive)).await?,
                    lost => self.coordinator_lost(lost.and_then(Result::err)),
                },
                (away, line) = self.coordinator.answered() => match line {
                    Ok(line) => directives = self.coordinator_back(away, line).await?,
                    Err(error) => self.end(Err(error.into())),
                },
                done = self.done.recv() => match done {
                    Some(Done::Finished) => return self.leave().await,
                    Some(done) => self.engine_did(done).await?,
                    None => return Err(AgentError::Internal),
                },
                Some(fetched) = self.transfers.join_next() => {
                    // One that is not wanted any more was aborted.
                    if let Ok(fetched) = fetched {
                        self.fetched(fetched).await?;
                    }
                }
                Some(event) = next_visit(&mut listener) => self.visited(event),
                Some(_) = self.visitors.join_next() => {}
                Some(_) = self.errands.join_next() => {}
                _ = watch.tick() => {
                    if let Some(hang) = self.engine.watch.overdue(self.engine.bounds) {
                        return Err(self.give_up(hang).await);
                    }
                }
                _ = pulse.tick() => self.tell(&FromSite::Pulse).await,
                () = &mut stop, if !stopped => {
                    stopped = true;
                    if self.member.is_none() {
                        self.end(Ok(false));
                    } else {
                        self.feed(MemberEvent::StopRequested).await?;
                    }
                }
            }
        }
    }

    /// The engine goes on with what is planned, and what is fetched and merged goes on between the sites.
    fn coordinator_lost(&mut self, error: Option<JoinError>) {
        let address = self.coordinator.dialler.invite.address();
        let error = error.unwrap_or_else(|| conversation(address, "the connection ended"));
        if self.ending.is_some() || self.coordinator.wait.is_zero() {
            self.coordinator.sender = None;
            return self.end(Err(error.into()));
        }
        let (message, hint) = away(&error, self.coordinator.wait);
        self.emit(Event::Warning { message, hint });
        self.coordinator.call();
    }

    async fn coordinator_back(
        &mut self,
        away: Duration,
        line: Line,
    ) -> Result<tokio::sync::mpsc::Receiver<Received>, AgentError> {
        let Line { sender, directives } = line;
        self.coordinator.sender = Some(sender);
        let message = format!("the coordinator is back after {:.1} s", away.as_secs_f64());
        self.emit(Event::Warning { message, hint: None });
        self.tell(&FromSite::Report(Report::Device(self.engine.device.clone()))).await;
        if self.member.is_some() {
            self.feed(MemberEvent::Reconnected).await?;
        }
        self.recall = 0;
        Ok(directives)
    }

    /// Leaves an engine that hangs behind. Its thread is not waited for: it ends with the process.
    async fn give_up(&mut self, hang: Hang) -> AgentError {
        let engine = self.engine.device.engine.clone();
        let (call, step, seconds) = (hang.call.to_string(), hang.step, hang.seconds);
        self.emit(Event::EngineHung { site: self.site, engine: engine.clone(), call, step, seconds });
        self.farewell(LeaveReason::EngineHung).await;
        self.engine.give_up().await;
        AgentError::EngineHung { engine, hang }
    }

    /// Tells the coordinator why this site is gone, so that the others need not wait for its deadline.
    async fn farewell(&mut self, reason: LeaveReason) {
        let leave = FromSite::Report(Report::Leave { reason });
        let said = async {
            self.tell(&leave).await;
            // A connection that is gone already is no loss.
            if let Some(sender) = &mut self.coordinator.sender {
                let _closed = sender.close().await;
            }
        };
        let _in_time = tokio::time::timeout(FAREWELL_TIME_MAX, said).await;
    }

    /// Saves, then ends with that result.
    fn end(&mut self, result: Result<bool, AgentError>) {
        self.abandon.store(true, Ordering::Relaxed);
        if self.ending.is_none() {
            let evaluate = matches!(result, Ok(true)) && self.shelf.is_first();
            self.ending = Some(Ending { reports: Vec::new(), result });
            self.job(Job::Finish { evaluate });
        }
    }

    async fn leave(mut self) -> Result<Outcome, AgentError> {
        let Some(Ending { reports, result }) = self.ending.take() else { return Err(AgentError::Internal) };
        let said = async {
            for report in reports {
                self.tell(&FromSite::Report(report)).await;
            }
            if let Some(sender) = &mut self.coordinator.sender {
                // The coordinator learns of the end from the report; a connection that is gone already is no loss.
                let _closed = sender.close().await;
            }
        };
        // A coordinator that does not listen does not keep a site that was asked to leave.
        let _in_time = tokio::time::timeout(FAREWELL_TIME_MAX, said).await;
        let finished = result?;
        let (round, state_hash) = self.held;
        Ok(Outcome {
            site: self.site,
            round,
            state_hash,
            finished,
            bytes_sent: self.traffic.bytes_sent(),
            bytes_received: self.traffic.bytes_received(),
        })
    }

    /// A coordinator that is gone is noticed by the receiving task.
    async fn tell(&mut self, message: &FromSite) {
        if let Some(sender) = &mut self.coordinator.sender {
            let _lost = sender.send_timeout(message, COORDINATOR_PATIENCE).await;
        }
    }

    async fn feed(&mut self, event: MemberEvent) -> Result<(), AgentError> {
        let Some(member) = &mut self.member else {
            if let MemberEvent::Directive(Directive::Peers(peers)) = event {
                self.shelf.set_peers(peers.to_vec());
            } else if let MemberEvent::Directive(Directive::Recall { number }) = event {
                self.recall = number;
            } else if let MemberEvent::Directive(Directive::Finish { .. } | Directive::Dropped { .. }) = event {
                self.end(Ok(true));
            }
            return Ok(());
        };
        let term_before = member.term();
        match member.handle(event) {
            Ok(commands) => {
                let term = member.term();
                if term > term_before {
                    // Before anything is done for that coordinator: started again, this site must refuse an older one as well.
                    self.folder.keep_term(term)?;
                }
                for command in commands {
                    self.obey(command).await;
                }
            }
            Err(error) => self.end(Err(conversation("its address", error).into())),
        }
        Ok(())
    }

    async fn obey(&mut self, command: MemberCommand) {
        match command {
            MemberCommand::Report(report) => match &mut self.ending {
                Some(ending) => ending.reports.push(report),
                None => self.tell(&FromSite::Report(report)).await,
            },
            MemberCommand::Peers(peers) => self.shelf.set_peers(peers),
            MemberCommand::FetchState { commit, state_hash, from } => self.fetch_state(commit, state_hash, &from),
            MemberCommand::Train { plan, assignment, steps } => {
                self.job(Job::Train { plan, assignment, steps, abandon: Arc::clone(&self.abandon) });
            }
            MemberCommand::Snapshot { plan } => {
                self.job(Job::Snapshot { plan, abandon: Arc::clone(&self.abandon) });
            }
            MemberCommand::Apply { round } => {
                let evaluate = self.shelf.is_first();
                // The member has been told that it is merged, and asks for it once.
                if let Some(merged) = self.merged.remove(&round) {
                    self.job(Job::Apply { merged, evaluate });
                }
                // What was merged before a line broke is part of the state that the engine began anew from.
                self.merged.retain(|later, _| *later > round);
            }
            MemberCommand::Abandon => {
                self.abandon.store(true, Ordering::Relaxed);
                self.abandon = Arc::default();
                let newest = self.member.as_ref().map_or(self.held.0, Member::newest_commit);
                self.stop_fetching(|round| round > newest);
                self.host_job(HostJob::Withdraw);
                self.job(Job::StartOver);
            }
            MemberCommand::FetchDelta { round, fragment, contributor } => {
                self.fetch_delta(round, fragment, contributor);
            }
            MemberCommand::FetchSlice { round, fragment, values, from, hash } => {
                self.fetch_slice(round, (fragment, values), (from, hash));
            }
            MemberCommand::Reduce { round, fragment, values, contributors } => {
                self.reduce(round, (fragment, values), &contributors);
            }
            MemberCommand::FetchPart { round, fragment, part } => self.fetch_part(round, fragment, &part),
            MemberCommand::Witness { round, samples } => self.witness = Some((round, samples)),
            MemberCommand::Merge(commit) => self.merge(commit),
            MemberCommand::Finish { .. } => self.end(Ok(true)),
            MemberCommand::Quit(LeaveReason::Stopped | LeaveReason::Finished) => self.end(Ok(false)),
            MemberCommand::Quit(reason) => self.end(Err(AgentError::Dropped(reason))),
        }
    }

    fn merge(&mut self, commit: Commit) {
        let delta = |contributor: &Contributor| self.deltas.get(&(commit.round, contributor.site)).cloned();
        let inputs = match commit.parts.is_empty() {
            true => commit.contributors.iter().map(delta).collect(),
            false => self.shards.of(&commit),
        };
        // The member merges only what is held.
        let Some(inputs) = inputs else { return self.end(Err(AgentError::Internal)) };
        let witness = self.witness.take_if(|(round, _)| *round <= commit.round);
        let witness = witness.filter(|(round, _)| *round == commit.round).map(|(_, samples)| samples);
        self.host_job(HostJob::Merge { commit, inputs, witness });
    }

    /// What is not wanted any more after the commit of `round`.
    fn forget_through(&mut self, round: Round, fragment: FragmentPlan) {
        self.deltas.retain(|(held, _), _| *held > round);
        self.shards.forget_through(round);
        self.stop_fetching(|fetched| fetched <= round);
        let kept = self.settings.rounds_kept(fragment, self.shelf.sites());
        let oldest = Round(round.0.saturating_sub(kept));
        self.shelf.forget_before(oldest);
        if self.transit.advance(round, oldest) {
            self.errands.spawn(Arc::clone(&self.transit).remove_before(oldest));
        }
    }

    fn stop_fetching(&mut self, is_void: impl Fn(Round) -> bool) {
        for (_, (_, transfer)) in self.fetching.extract_if(.., |(round, _), _| is_void(*round)) {
            transfer.abort();
        }
    }

    fn fetch_delta(&mut self, round: Round, fragment: FragmentPlan, contributor: Contributor) {
        let codec = self.fragments.codec(fragment);
        let wanted = Wanted { round, fragment: fragment.index, contributor, codec };
        let transit = Arc::clone(&self.transit);
        let fetch = async move {
            let began = Instant::now();
            let bytes = transit.fetch(&wanted).await;
            Fetched::Delta { round, fragment, contributor, bytes, seconds: began.elapsed().as_secs_f64() }
        };
        let transfer = self.transfers.spawn(fetch);
        self.is_fetching(round, delta_key(round, fragment, contributor.site), contributor.delta_hash, transfer);
    }

    /// Notes a transfer. One of the same thing that is still on its way was for a plan that has been withdrawn.
    fn is_fetching(&mut self, round: Round, key: BlobKey, hash: ContentHash, transfer: AbortHandle) {
        if let Some((_, withdrawn)) = self.fetching.insert((round, key), (hash, transfer)) {
            withdrawn.abort();
        }
    }

    /// Whether what has come is still wanted.
    fn has_come(&mut self, round: Round, key: &BlobKey, hash: ContentHash) -> bool {
        let wanted = (round, key.clone());
        let is_wanted = self.fetching.get(&wanted).is_some_and(|(expected, _)| *expected == hash);
        is_wanted && self.fetching.remove(&wanted).is_some()
    }

    fn fetch_state(&mut self, commit: Commit, state_hash: ContentHash, from: &[SiteId]) {
        let request = BlobRequest {
            key: BlobKey::State { round: commit.round },
            bytes: self.state_bytes,
            bytes_max: self.state_bytes,
            hash: state_hash,
            holders: self.shelf.holders(from),
            streams: BULK_STREAMS,
        };
        let (client, place) = (self.client.clone(), self.folder.fetched_state());
        self.transfers.spawn(async move {
            match newcomer::fetch_state(&client, &request, &place, AGAIN).await {
                Ok(bytes) => Fetched::State { commit, bytes },
                Err(reason) => {
                    tokio::time::sleep(AGAIN).await;
                    Fetched::StateFailed { reason }
                }
            }
        });
    }

    async fn tell_fetched(&mut self, round: Round, from: SiteId, bytes: u64, seconds: f64) {
        self.emit(Event::DeltaFetched { round, from_site: from, bytes, seconds });
        self.tell(&FromSite::Fetched { round, from, bytes, seconds }).await;
    }

    async fn fetched(&mut self, fetched: Fetched) -> Result<(), AgentError> {
        match fetched {
            Fetched::Delta { round, fragment, contributor, bytes, seconds } => {
                let (from, key) = (contributor.site, delta_key(round, fragment, contributor.site));
                if !self.has_come(round, &key, contributor.delta_hash) {
                    return Ok(());
                }
                self.tell_fetched(round, from, bytes.len() as u64, seconds).await;
                self.shelf.offer(round, key, Blob::memory(bytes.clone()));
                self.deltas.insert((round, from), bytes);
                self.feed(MemberEvent::DeltaHeld { round, from }).await
            }
            Fetched::Shard { round, key, from, hash, bytes, seconds } => match self.has_come(round, &key, hash) {
                true => self.shard_fetched((round, key, from), bytes, seconds).await,
                false => Ok(()),
            },
            Fetched::State { commit, bytes } => {
                self.host_job(HostJob::Install { commit, bytes });
                Ok(())
            }
            Fetched::StateFailed { reason } => {
                let message = format!("the state of the run could not be fetched, trying again: {reason}");
                let hint = Some("see that the sites reach each other: `beringia status`".to_owned());
                self.emit(Event::Warning { message, hint });
                self.feed(MemberEvent::StateUnavailable).await
            }
        }
    }

    async fn engine_did(&mut self, done: Done) -> Result<(), AgentError> {
        match done {
            Done::Prepared { tokens_per_second } => {
                let (round, state_hash) = self.held;
                let member = Member::new(self.site, round, state_hash, tokens_per_second);
                let member = member.after_term(self.folder.term()).after_recall(self.recall);
                let start = member.start();
                self.member = Some(member);
                self.emit(Event::SiteReady { site: self.site, tokens_per_second });
                self.obey(start).await;
                Ok(())
            }
            // The plan was withdrawn while its snapshot was being taken: another one may have begun by now.
            Done::Encoded { abandoned, .. } if abandoned.load(Ordering::Relaxed) => Ok(()),
            Done::Encoded { round, fragment, delta, slices, contribution, measurement, .. } => {
                self.tell_measurement(round, measurement).await;
                self.shelf.offer(round, delta_key(round, fragment, self.site), Blob::memory(delta.clone()));
                if slices.is_empty() {
                    self.errands.spawn(Arc::clone(&self.transit).leave(round, fragment.index, delta.clone()));
                }
                let slice_hashes = self.offer_slices(round, fragment, slices);
                self.deltas.insert((round, self.site), delta);
                self.feed(MemberEvent::Encoded { round, contribution, slice_hashes }).await
            }
            Done::Recomputed { round, attempt, verdict, abandoned } => {
                self.recomputed((round, attempt), verdict, &abandoned).await
            }
            Done::Witness(question) => {
                self.job(Job::Witness(question));
                Ok(())
            }
            Done::Witnessed { round, state_hash, digest, bounds } => {
                self.tell(&FromSite::Report(Report::Witnessed { round, state_hash, digest, bounds })).await;
                Ok(())
            }
            Done::Reduced { abandoned, .. } if abandoned.load(Ordering::Relaxed) => Ok(()),
            Done::Reduced { key, part, clipped, hash, blob, .. } => {
                clipped.iter().for_each(|clipped| self.emit(clipped.event(key.round)));
                self.reduced(key, part, (hash, blob)).await
            }
            Done::Merged(merged) => {
                let Merged { round, state_hash, fragment, .. } = merged;
                merged.clipped.iter().for_each(|clipped| self.emit(clipped.event(round)));
                self.held = (round, state_hash);
                self.merged.insert(round, merged);
                self.forget_through(round, fragment);
                self.feed(MemberEvent::Merged { round, state_hash }).await
            }
            Done::Installed { round, state_hash } => {
                self.held = (round, state_hash);
                self.merged.clear();
                self.job(Job::StartOver);
                self.feed(MemberEvent::StateHeld { round, state_hash }).await
            }
            Done::InstallFailed => self.feed(MemberEvent::StateUnavailable).await,
            Done::Evaluated { round, evaluation } => {
                let message = FromSite::Evaluated {
                    round,
                    nats_per_token: evaluation.nats_per_token,
                    bits_per_byte: evaluation.bits_per_byte,
                    bigram_bits_per_byte: evaluation.bigram_bits_per_byte,
                    tokens: evaluation.tokens,
                };
                self.tell(&message).await;
                Ok(())
            }
            Done::Failed(error) => {
                self.farewell(leave_reason(&error)).await;
                Err(error.into())
            }
            Done::Finished => Ok(()),
        }
    }

    /// What the exchange, and settings that follow the links, are decided on.
    async fn tell_measurement(&mut self, round: Round, mut measurement: Measurement) {
        let is_wanted = self.config.sync.adaptive || self.config.sync.exchange != Exchange::Mesh;
        if !is_wanted || self.ending.is_some() {
            return;
        }
        let known = self.shelf.others().into_iter().filter_map(|(from, holder)| {
            let link = self.client.link(&holder)?;
            let (round_trip_seconds, loss) = (link.round_trip_seconds.unwrap_or(0.0), link.loss.unwrap_or(0.0));
            let loss = loss.clamp(0.0, 1.0);
            Some(LinkReport { from, bytes_per_second: link.bytes_per_second?, round_trip_seconds, loss })
        });
        measurement.links = known.take(LINK_REPORTS_MAX).collect();
        // Nobody needs a measurement that makes no sense.
        if measurement.is_acceptable() {
            self.tell(&FromSite::Report(Report::Measured { round, measurement })).await;
        }
    }

    fn visited(&mut self, event: ListenerEvent) {
        match event {
            ListenerEvent::Incoming(Incoming { purpose: Purpose::Blob, connection })
                if self.visitors.len() < VISITORS_MAX && self.shelf.knows(connection.peer()) =>
            {
                let shelf = Arc::clone(&self.shelf);
                self.visitors.spawn(async move {
                    // How a visitor's connection ends is the visitor's affair: it asks again elsewhere.
                    let _ended = wire::serve_blobs(connection, shelf).await;
                });
            }
            // A stranger, or one connection too many: closed by being dropped.
            ListenerEvent::Incoming(_) => {}
            ListenerEvent::Refused(refusal) => {
                let (address, reason) = (refusal.address.to_string(), refusal.reason.to_string());
                self.emit(Event::PeerRefused { address, reason });
            }
        }
    }
}
