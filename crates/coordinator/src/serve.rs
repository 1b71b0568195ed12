//! The loop of the coordinator's process.
//!
//! Connections are tasks that turn bytes into messages; one loop feeds them to the state machine and does what it says:
//! persist, send, tell. Every queue is bounded; a site that does not read its messages is dropped, not waited for.

use crate::files::{FilesError, RunFiles, Served};
use crate::probes::{Probes, ReferenceSource};
use crate::store::{Line, Store, StoreError};
use base::{ContentHash, Hint, Round, SiteId};
use rounds::adaptive::Choice;
use rounds::coordinator::{Lateness, Note};
use rounds::{
    Command, Commit, Coordinator, Directive, Event as Input, LeaveReason, LedgerTotals, Peer, Settings, SiteDevice,
};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use telemetry::event::{Contributor, SiteShare};
use telemetry::{Event, LeaseShare, Reporter, RunView};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use wire::invite::RandomError;
use wire::limits::REFUSALS_REPORTED_PER_MINUTE_MAX;
use wire::message::{FromCoordinator, FromSite, Greeting, Role, SiteHello, Welcome};
use wire::{
    Connection, Identity, Incoming, Invite, InviteError, ListenError, Listener, ListenerEvent, Purpose, Receiver,
    RecvError, Secret, Sender, Traffic,
};

/// A site pulses every 2 s; after this long without a word it is gone.
const SITE_SILENCE_MAX: Duration = Duration::from_secs(20);

/// The coordinator pulses as often, so that sites notice its end.
const TICK: Duration = Duration::from_secs(1);

/// From an authenticated connection to its greeting.
const GREETING_SECONDS_MAX: u64 = 10;

/// Authenticated connections that have not greeted yet, and probes being answered.
const GREETINGS_MAX: usize = 256;

/// The span over which refusals are counted: see [`REFUSALS_REPORTED_PER_MINUTE_MAX`].
const REFUSALS_SPAN: Duration = Duration::from_secs(60);

/// Messages waiting for one site: two for each other site of a round of 500, and some.
const OUTBOX_MAX: usize = 1_024;

/// Messages from all sites waiting for the loop.
const INBOX_MAX: usize = 4_096;

/// Machines one invite can admit: a run with more sites than that wants more than one coordinator.
pub const ADMISSIONS_MAX: usize = 10_000;

/// How to coordinate.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Host in the invite; empty takes the listening address.
    pub advertised_host: String,
    /// Finish after this many rounds of the run, if that is before its end.
    pub rounds_max: Option<u64>,
    /// Finish after this time of training.
    pub train_seconds_max: Option<f64>,
    /// Numbers of an engine on this machine, for `beringia doctor` to compare with.
    pub reference: Option<ReferenceSource>,
}

/// How the run, or this coordinator's part in it, ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Rounds committed.
    pub rounds: Round,
    /// BLAKE3 of the state that every site holds; `None` where not all could say so.
    pub state_hash: Option<ContentHash>,
    /// Tokens committed.
    pub tokens: u64,
    /// Sample accounting.
    pub ledger: LedgerTotals,
    /// Whether every planned step was done.
    pub finished: bool,
}

/// Why the coordinator stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The folder is no run.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The key of this machine.
    #[error(transparent)]
    Identity(#[from] wire::IdentityError),
    /// The port.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The durable log: without it no decision may be taken.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The advertised host makes no invite.
    #[error(transparent)]
    Invite(#[from] InviteError),
    /// No secret could be made.
    #[error(transparent)]
    Random(#[from] RandomError),
}

impl Hint for ServeError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Files(error) => error.hint(),
            Self::Identity(error) => error.hint(),
            Self::Listen(error) => error.hint(),
            Self::Store(error) => error.hint(),
            Self::Invite(error) => error.hint(),
            Self::Random(_) => Some("see that /dev/urandom can be read".to_owned()),
        }
    }
}

/// Coordinates the run in `files` until it is finished or `stop` completes and every site has left. `on_invite` is
/// called once, with the invite, when sites can come.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(
    files: RunFiles,
    identity: Identity,
    (store, lines): (Box<dyn Store>, Vec<Line>),
    options: ServeOptions,
    reporter: Reporter,
    on_invite: impl FnOnce(&Invite),
    stop: impl Future<Output = ()> + Send,
) -> Result<Summary, ServeError> {
    let traffic = Traffic::new();
    let listener = Listener::bind(options.listen, &identity, &traffic).await?;
    let host = match options.advertised_host.as_str() {
        "" if listener.address().ip().is_unspecified() => "127.0.0.1".to_owned(),
        "" => listener.address().ip().to_string(),
        host => host.to_owned(),
    };
    let address = match host.contains(':') {
        true => format!("[{host}]:{}", listener.address().port()),
        false => format!("{host}:{}", listener.address().port()),
    };
    let secret = Secret::generate()?;
    let invite = Invite::new(&address, &files.config.run.name, identity.fingerprint(), secret.clone())?;
    let mut shell = Shell::new(files, store, lines, options, secret, reporter)?;
    on_invite(&invite);
    shell.run(listener, std::pin::pin!(stop)).await
}

/// What the tasks of connections tell the loop.
enum Told {
    Greeted(Box<(Greeting, Connection)>),
    NotGreeted(SocketAddr, RecvError),
    ProbeRefused(SocketAddr, String),
    Said(SiteId, u64, FromSite),
    Lost(SiteId, u64),
}

struct Link {
    /// Which of the site's connections this is: words of an older one are ignored.
    number: u64,
    outbox: mpsc::Sender<FromCoordinator>,
}

struct Shell {
    files: Arc<RunFiles>,
    served: Arc<Served>,
    store: Box<dyn Store>,
    coordinator: Coordinator,
    options: ServeOptions,
    secret: Secret,
    reporter: Reporter,
    view: RunView,
    admitted: BTreeMap<ContentHash, SiteId>,
    may_fetch: Arc<RwLock<BTreeSet<ContentHash>>>,
    probes: Arc<Probes>,
    links: BTreeMap<SiteId, Link>,
    links_made: u64,
    began: Instant,
    training_since: Option<Instant>,
    /// Commits that not all sites have confirmed, with the seconds that their rounds took.
    unsettled: BTreeMap<Round, (Commit, f64)>,
    told: mpsc::Sender<Told>,
    inbox: mpsc::Receiver<Told>,
    tasks: JoinSet<()>,
    greetings: JoinSet<()>,
    refusals: Refusals,
    done: bool,
}

/// How many refusals were logged since when: strangers must not be able to fill the disk.
struct Refusals {
    since: Instant,
    told: u32,
}

impl Shell {
    fn new(
        files: RunFiles,
        mut store: Box<dyn Store>,
        lines: Vec<Line>,
        options: ServeOptions,
        secret: Secret,
        reporter: Reporter,
    ) -> Result<Self, ServeError> {
        let mut settings = Settings::new(&files.config);
        if let Some(rounds) = options.rounds_max {
            settings.steps_total = settings.steps_total.min(rounds * settings.steps_per_round);
        }
        let (mut admitted, mut records) = (BTreeMap::new(), Vec::new());
        for line in lines {
            match line {
                Line::Admitted { admitted: site, fingerprint, .. } => {
                    admitted.insert(fingerprint, site);
                }
                Line::Decision(record) => records.push(record),
            }
        }
        let (coordinator, record) = Coordinator::recover(settings, files.initial_hash, records);
        store.append(&Line::Decision(record))?;
        let may_fetch: Arc<RwLock<BTreeSet<ContentHash>>> = Arc::new(RwLock::new(admitted.keys().copied().collect()));
        let (told, inbox) = mpsc::channel(INBOX_MAX);
        let (run, reference) = (files.config.run.name.clone(), options.reference.clone());
        let probes = Arc::new(Probes::new(run, secret.clone(), Arc::clone(&may_fetch), reference));
        let mut shell = Self {
            served: Arc::new(Served::new(&files, Arc::clone(&may_fetch))),
            files: Arc::new(files),
            store,
            coordinator,
            options,
            secret,
            reporter,
            view: RunView::default(),
            admitted,
            may_fetch,
            probes,
            links: BTreeMap::new(),
            links_made: 0,
            began: Instant::now(),
            training_since: None,
            unsettled: BTreeMap::new(),
            told,
            inbox,
            tasks: JoinSet::new(),
            greetings: JoinSet::new(),
            refusals: Refusals { since: Instant::now(), told: 0 },
            done: false,
        };
        shell.announce();
        Ok(shell)
    }

    fn announce(&mut self) {
        let config = &self.files.config;
        let strategy = config.sync.strategy.name();
        let step_tokens = (config.train.batch_samples * config.data.sequence_length) as u64;
        let resumed = self.coordinator.last().commit.round;
        self.emit(Event::RunStarted {
            run: config.run.name.clone(),
            strategy: strategy.to_owned(),
            sites: config.sync.sites,
            parameters: self.files.parameters,
            tokens_planned: config.train.steps * step_tokens,
            rounds_planned: config.rounds_total(),
            engine: None,
            resumed_round: (resumed > Round(0)).then_some(resumed),
        });
    }

    fn emit(&mut self, event: Event) {
        let record = self.reporter.emit(event);
        self.view.apply(&record);
    }

    fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    async fn run(
        &mut self,
        mut listener: Listener,
        mut stop: Pin<&mut (impl Future<Output = ()> + Send)>,
    ) -> Result<Summary, ServeError> {
        let mut tick = tokio::time::interval(TICK);
        let mut stopped = false;
        while !self.done {
            tokio::select! {
                Some(event) = listener.next() => self.visited(event),
                Some(told) = self.inbox.recv() => self.listen_to(told)?,
                Some(_) = self.tasks.join_next() => {}
                Some(_) = self.greetings.join_next() => {}
                _ = tick.tick() => {
                    self.tick()?;
                }
                () = &mut stop, if !stopped => {
                    stopped = true;
                    self.decide(Input::StopRequested)?;
                }
            }
        }
        Ok(self.summarise())
    }

    fn tick(&mut self) -> Result<(), ServeError> {
        for link in self.links.values() {
            // A full outbox is dealt with where a directive does not fit.
            let _full = link.outbox.try_send(FromCoordinator::Pulse);
        }
        let trained = self.training_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let time_is_up = self.options.train_seconds_max.is_some_and(|max| trained >= max);
        if time_is_up {
            self.options.train_seconds_max = None;
            self.decide(Input::StopRequested)?;
        }
        self.decide(Input::Tick)
    }

    fn visited(&mut self, event: ListenerEvent) {
        match event {
            ListenerEvent::Incoming(Incoming { purpose: Purpose::Blob, connection }) => {
                // Only sites fetch, and each was admitted before it knew of a file.
                if !self.admitted.contains_key(&connection.peer()) {
                    return self.tell_refusal(connection.address().to_string(), "it was not admitted to this run");
                }
                let served = Arc::clone(&self.served);
                self.tasks.spawn(async move {
                    // The visitor asks again if its connection ends too early.
                    let _ended = wire::serve_blobs(connection, served).await;
                });
            }
            ListenerEvent::Incoming(Incoming { purpose: Purpose::Probe, connection })
                if self.greetings.len() < GREETINGS_MAX =>
            {
                self.greetings.spawn(answer_probe(Arc::clone(&self.probes), connection, self.told.clone()));
            }
            ListenerEvent::Incoming(Incoming { connection, .. }) if self.greetings.len() < GREETINGS_MAX => {
                self.greetings.spawn(hear_greeting(connection, self.told.clone()));
            }
            ListenerEvent::Incoming(Incoming { connection, .. }) => {
                let reason = format!("{GREETINGS_MAX} connections are already waiting");
                self.tell_refusal(connection.address().to_string(), reason);
            }
            ListenerEvent::Refused(refusal) => {
                self.tell_refusal(refusal.address.to_string(), refusal.reason.to_string());
            }
        }
    }

    fn tell_refusal(&mut self, address: String, reason: impl Into<String>) {
        if self.refusals.since.elapsed() >= REFUSALS_SPAN {
            self.refusals = Refusals { since: Instant::now(), told: 0 };
        }
        self.refusals.told = self.refusals.told.saturating_add(1);
        if self.refusals.told <= REFUSALS_REPORTED_PER_MINUTE_MAX {
            self.emit(Event::PeerRefused { address, reason: reason.into() });
        }
    }

    fn listen_to(&mut self, told: Told) -> Result<(), ServeError> {
        match told {
            Told::Greeted(greeted) => self.greeted(greeted.0, greeted.1),
            Told::NotGreeted(address, problem) => {
                self.tell_refusal(address.to_string(), format!("no greeting: {problem}"));
                Ok(())
            }
            Told::ProbeRefused(address, reason) => {
                self.tell_refusal(address.to_string(), reason);
                Ok(())
            }
            Told::Said(site, number, message) if self.is_current(site, number) => self.said(site, message),
            Told::Lost(site, number) if self.is_current(site, number) => {
                self.links.remove(&site);
                self.decide(Input::Disconnected(site, LeaveReason::ConnectionLost))
            }
            Told::Said(..) | Told::Lost(..) => Ok(()),
        }
    }

    fn is_current(&self, site: SiteId, number: u64) -> bool {
        self.links.get(&site).is_some_and(|link| link.number == number)
    }

    fn refuse(&mut self, mut connection: Connection, reason: &str, hint: &str) {
        self.tell_refusal(connection.address().to_string(), reason);
        let answer = FromCoordinator::Refused { reason: reason.to_owned(), hint: hint.to_owned() };
        self.tasks.spawn(async move {
            let _gone = connection.send_timeout(&answer, SITE_SILENCE_MAX).await;
            let _gone = connection.close().await;
        });
    }

    fn greeted(&mut self, greeting: Greeting, connection: Connection) -> Result<(), ServeError> {
        let again = "ask for the invite that `beringia serve` prints now";
        if !greeting.is_acceptable() {
            self.refuse(connection, "its greeting is out of bounds", "use the same version of beringia on both sides");
            return Ok(());
        }
        if greeting.run != self.files.config.run.name {
            let reason = format!("this is run '{}', not '{}'", self.files.config.run.name, greeting.run);
            self.refuse(connection, &reason, again);
            return Ok(());
        }
        let known = self.admitted.get(&connection.peer()).copied();
        let invited = greeting.secret.as_ref().is_some_and(|secret| *secret == self.secret);
        if known.is_none() && !invited {
            self.refuse(connection, "the invite is not valid any more", again);
            return Ok(());
        }
        match greeting.role {
            Role::Observer => {
                self.answer_observer(connection);
                Ok(())
            }
            Role::Site(hello) => self.admit(known, hello, connection),
        }
    }

    fn answer_observer(&mut self, mut connection: Connection) {
        let status = FromCoordinator::Status(self.view.to_json().to_string());
        self.tasks.spawn(async move {
            let _gone = connection.send_timeout(&status, SITE_SILENCE_MAX).await;
            let _gone = connection.close().await;
        });
    }

    fn admit(&mut self, known: Option<SiteId>, hello: SiteHello, connection: Connection) -> Result<(), ServeError> {
        let fingerprint = connection.peer();
        let site = match known {
            Some(site) => site,
            None if self.admitted.len() >= ADMISSIONS_MAX => {
                let reason = format!("this run has admitted {ADMISSIONS_MAX} machines already");
                self.refuse(connection, &reason, "start a second run");
                return Ok(());
            }
            None => {
                let site = SiteId(self.admitted.len() as u32);
                self.store.append(&Line::Admitted { admitted: site, name: hello.name.clone(), fingerprint })?;
                self.admitted.insert(fingerprint, site);
                if let Ok(mut may_fetch) = self.may_fetch.write() {
                    may_fetch.insert(fingerprint);
                }
                site
            }
        };
        let address = site_address(&hello, connection.address());
        let peer = Peer { site, name: hello.name, address, fingerprint };
        self.connect(&peer, connection);
        self.emit(Event::SiteJoined {
            site,
            name: peer.name.clone(),
            address: peer.address.clone(),
            engine: hello.engine,
            threads: hello.threads,
            slowdown: hello.slowdown,
        });
        self.decide(Input::Connected(peer))
    }

    fn connect(&mut self, peer: &Peer, connection: Connection) {
        self.links_made += 1;
        let (number, site) = (self.links_made, peer.site);
        let (sender, receiver) = connection.split();
        let (outbox, waiting) = mpsc::channel(OUTBOX_MAX);
        let welcome = FromCoordinator::Welcome(Welcome {
            site,
            run_toml: self.files.config_text.clone(),
            model_hash: self.files.config.model_hash(),
            files: self.files.files.clone(),
        });
        // An empty queue takes one message.
        let _fits = outbox.try_send(welcome);
        self.links.insert(site, Link { number, outbox });
        self.tasks.spawn(write(sender, waiting));
        self.tasks.spawn(read(receiver, site, number, self.told.clone()));
    }

    fn said(&mut self, site: SiteId, message: FromSite) -> Result<(), ServeError> {
        match message {
            FromSite::Report(report) => self.decide(Input::Reported(site, report)),
            FromSite::Evaluated { round, nats_per_token, bits_per_byte, bigram_bits_per_byte, tokens } => {
                let step = self.coordinator.step_of(round);
                let numbers = [nats_per_token, bits_per_byte, bigram_bits_per_byte];
                if !numbers.iter().all(|number| number.is_finite()) {
                    return Ok(());
                }
                self.emit(Event::Evaluated {
                    round,
                    step,
                    nats_per_token,
                    bits_per_byte,
                    bigram_bits_per_byte,
                    tokens,
                });
                self.decide(Input::Evaluated { site, round, nats_per_token })
            }
            FromSite::Fetched { round, from, bytes, seconds } => {
                self.emit(Event::DeltaFetched { round, from_site: from, bytes, seconds });
                Ok(())
            }
            FromSite::Pulse => self.decide(Input::Heard(site)),
        }
    }

    fn decide(&mut self, input: Input) -> Result<(), ServeError> {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            let now = self.now();
            for command in self.coordinator.handle(input, now) {
                match command {
                    Command::Persist(record) => self.store.append(&Line::Decision(record))?,
                    Command::Send(site, directive) => {
                        if !self.send(site, directive) {
                            self.links.remove(&site);
                            inputs.push(Input::Disconnected(site, LeaveReason::ConnectionLost));
                        }
                    }
                    Command::Note(note) => self.note(note),
                    Command::Done => self.done = true,
                }
            }
        }
        Ok(())
    }

    /// Queues a directive; false where the site does not take its messages.
    fn send(&mut self, site: SiteId, directive: Directive) -> bool {
        let last = matches!(directive, Directive::Dropped { .. });
        let sent = match self.links.get(&site) {
            Some(link) => link.outbox.try_send(FromCoordinator::Directive(directive)).is_ok(),
            None => true,
        };
        if last {
            // The writer sends what is queued and closes.
            self.links.remove(&site);
        }
        sent
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::SiteReady { site, tokens_per_second } => self.emit(Event::SiteReady { site, tokens_per_second }),
            Note::SiteDevice { site, device } => {
                let SiteDevice { engine, name, maker, driver, memory_bytes, precision } = device;
                self.emit(Event::SiteDevice { site, engine, name, maker, driver, memory_bytes, precision });
            }
            Note::SiteLeft { site, reason } => {
                let reason = serde_json::to_value(reason).ok().and_then(|v| v.as_str().map(str::to_owned));
                self.emit(Event::SiteLeft { site, reason: reason.unwrap_or_default() });
            }
            Note::RoundStarted(plan) => {
                self.training_since.get_or_insert_with(Instant::now);
                let leases = plan.assignments.iter().map(|assignment| LeaseShare {
                    site: assignment.site,
                    start: assignment.lease.first().map_or(0, |range| range.start),
                    end: assignment.lease.last().map_or(0, |range| range.end),
                    steps: assignment.steps,
                    samples_per_step: assignment.samples.div_ceil(assignment.steps.max(1)),
                    samples: assignment.samples,
                    share: assignment.share,
                });
                let leases = leases.collect();
                self.emit(Event::RoundStarted { round: plan.round, term: plan.term, leases });
            }
            Note::Computed { site, round, contribution } => self.emit(Event::RoundComputed {
                round,
                site,
                tokens: contribution.tokens,
                compute_seconds: contribution.compute_seconds,
                loss_nats: contribution.loss_nats,
            }),
            Note::Committed { commit, seconds, totals } => {
                self.unsettled.insert(commit.round, (commit, seconds));
                let LedgerTotals { leased, committed, returned, lost, .. } = totals;
                self.emit(Event::Ledger { leased, committed, returned, lost });
            }
            Note::Agreed { round, state_hash } => self.agreed(round, state_hash),
            Note::Straggler { site, round, reason, waited_seconds } => {
                let reason = describe_lateness(reason).to_owned();
                self.emit(Event::Straggler { round, site, reason, waited_seconds });
            }
            Note::Diverged { site, round, expected, found } => {
                self.emit(Event::Diverged { round, site, hash_expected: expected, hash_found: found });
            }
            Note::SharesMoved { weights } => {
                let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
                let share = |(site, weight): (SiteId, f64)| SiteShare { site, share: weight / total };
                let shares = weights.into_iter().map(share).collect();
                self.emit(Event::SharesChanged { reason: "measured speeds moved".to_owned(), shares });
            }
            Note::SettingsChanged { round, change } => {
                let Choice { inner_steps, fragments, overlap_steps, codec, rank } = change.to;
                let (codec, reason) = (codec.name().to_owned(), change.reason);
                self.emit(Event::SettingsChanged { round, inner_steps, fragments, overlap_steps, codec, rank, reason });
            }
            Note::ExchangeChosen { round, is_sharded, reason } => {
                let exchange = if is_sharded { "sharded" } else { "mesh" }.to_owned();
                self.emit(Event::ExchangeChosen { round, exchange, reason });
            }
            Note::RolledBack { from, to } => {
                let message = format!("no site holds round {from} any more: the run goes back to round {to}");
                let hint = Some("save more often: lower [checkpoint] every_rounds".to_owned());
                self.emit(Event::Warning { message, hint });
            }
            Note::RoundAbandoned { round } => {
                let message = format!("every working site left during round {round}; its samples will be leased again");
                let hint = Some("run the same `beringia join` again on the sites".to_owned());
                self.emit(Event::Warning { message, hint });
            }
            _ => {}
        }
    }

    /// A commit is told to people once all sites hold the same state.
    fn agreed(&mut self, round: Round, state_hash: ContentHash) {
        let Some((commit, seconds)) = self.unsettled.remove(&round) else { return };
        let tokens: u64 = commit.contributors.iter().map(|contributor| contributor.tokens).sum();
        let weigh = |contributor: &rounds::Contributor| Contributor {
            site: contributor.site,
            tokens: contributor.tokens,
            weight: contributor.tokens as f64 / tokens.max(1) as f64,
        };
        self.emit(Event::RoundCommitted {
            round: commit.round,
            term: commit.term,
            contributors: commit.contributors.iter().map(weigh).collect(),
            cursor: commit.cursor,
            state_hash,
            seconds,
            tokens_total: self.tokens_committed(),
        });
    }

    fn tokens_committed(&self) -> u64 {
        self.coordinator.ledger().totals().committed * self.files.config.data.sequence_length as u64
    }

    fn summarise(&mut self) -> Summary {
        let last = self.coordinator.last();
        let (rounds, state_hash) = (last.commit.round, last.state_hash);
        let steps = last.commit.step;
        let summary = Summary {
            rounds,
            state_hash,
            tokens: self.tokens_committed(),
            ledger: self.coordinator.ledger().totals(),
            finished: steps >= self.files.config.train.steps,
        };
        let verdict = match (summary.finished, state_hash) {
            (true, Some(_)) => "every planned step is done and all sites hold one state",
            (false, Some(_)) => "stopped; all sites hold one state and the run can go on",
            (_, None) => "stopped before the sites could agree on the last round",
        };
        self.emit(Event::RunFinished {
            verdict: verdict.to_owned(),
            state_hash: state_hash.unwrap_or_default(),
            rounds: rounds.0,
            tokens: summary.tokens,
        });
        summary
    }
}

/// Where others dial a site that came from `seen`; empty where they cannot.
fn site_address(hello: &SiteHello, seen: SocketAddr) -> String {
    let host = match hello.advertised_host.as_str() {
        _ if hello.port == 0 => return String::new(),
        "" => seen.ip().to_string(),
        host => host.to_owned(),
    };
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host };
    format!("{bracketed}:{}", hello.port)
}

fn describe_lateness(reason: Lateness) -> &'static str {
    match reason {
        Lateness::SlowCompute => "slow compute",
        Lateness::SlowLink => "slow link",
        Lateness::Silent => "silent",
    }
}

async fn hear_greeting(mut connection: Connection, told: mpsc::Sender<Told>) {
    let heard = match connection.recv_timeout(Duration::from_secs(GREETING_SECONDS_MAX)).await {
        Ok(greeting) => Told::Greeted(Box::new((greeting, connection))),
        Err(problem) => Told::NotGreeted(connection.address(), problem),
    };
    // The loop is gone only when the process ends.
    let _ended = told.send(heard).await;
}

async fn answer_probe(probes: Arc<Probes>, connection: Connection, told: mpsc::Sender<Told>) {
    let address = connection.address();
    if let Some(reason) = probes.answer(connection, Duration::from_secs(GREETING_SECONDS_MAX)).await {
        // The loop is gone only when the process ends.
        let _ended = told.send(Told::ProbeRefused(address, reason)).await;
    }
}

async fn write(mut sender: Sender, mut waiting: mpsc::Receiver<FromCoordinator>) {
    while let Some(message) = waiting.recv().await {
        if sender.send_timeout(&message, SITE_SILENCE_MAX).await.is_err() {
            return;
        }
    }
    let _gone = sender.close().await;
}

async fn read(mut receiver: Receiver, site: SiteId, number: u64, told: mpsc::Sender<Told>) {
    while let Ok(message) = receiver.recv_timeout(SITE_SILENCE_MAX).await {
        if told.send(Told::Said(site, number, message)).await.is_err() {
            return;
        }
    }
    // The loop is gone only when the process ends.
    let _ended = told.send(Told::Lost(site, number)).await;
}
