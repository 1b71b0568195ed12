//! The loop of the coordinator's process.
//!
//! Connections are tasks that turn bytes into messages; one loop feeds them to the [`Desk`], which says what is written down, sent and
//! told. Every queue is bounded; a site that does not read its messages is dropped, not waited for.

use crate::access::{AccessError, AccessFolder, Door, Member};
use crate::desk::{Briefing, Desk, DeskOptions, LinkNumber, Moment, Outlet, Summary, Verdict, Visitor};
use crate::files::{FilesError, RunFiles, Served};
use crate::probes::{Probes, ReferenceSource};
use crate::store::{Line, Store, StoreError};
use base::{ContentHash, Hint, SiteId};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use telemetry::{Event, Reporter, RunView};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use wire::invite::RandomError;
use wire::limits::REFUSALS_REPORTED_PER_MINUTE_MAX;
use wire::message::{FromCoordinator, FromSite, Greeting};
use wire::{
    Connection, Identity, Incoming, Invite, InviteError, ListenError, Listener, ListenerEvent, Purpose, Receiver,
    RecvError, Secret, Sender, Traffic,
};

/// A site pulses every 2 s; after this long without a word it is gone.
pub const SITE_SILENCE_MAX: Duration = Duration::from_secs(20);

/// The coordinator pulses as often, so that sites notice its end.
pub const TICK: Duration = Duration::from_secs(1);

/// From an authenticated connection to its greeting.
const GREETING_SECONDS_MAX: u64 = 10;

/// Authenticated connections that have not greeted yet, and probes being answered.
const GREETINGS_MAX: usize = 256;

/// The span over which refusals are counted: see [`REFUSALS_REPORTED_PER_MINUTE_MAX`].
const REFUSALS_SPAN: Duration = Duration::from_secs(60);

/// Messages waiting for one site: two for each other site of a round of 500, and some.
pub const OUTBOX_MAX: usize = 1_024;

/// Messages from all sites waiting for the loop.
const INBOX_MAX: usize = 4_096;

/// How to coordinate.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The run's folder, where `beringia admit` and `revoke` leave word.
    pub run: PathBuf,
    /// How long the invite for all is valid, seconds; none: nobody comes in but by [`AccessFolder::admit`].
    pub invite_seconds: Option<f64>,
    /// Host in the invite; empty takes the listening address.
    pub advertised_host: String,
    /// Finish after this many rounds of the run, if that is before its end.
    pub rounds_max: Option<u64>,
    /// Finish after this time of training.
    pub train_seconds_max: Option<f64>,
    /// Numbers of an engine on this machine, for `beringia doctor` to compare with.
    pub reference: Option<ReferenceSource>,
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
    /// The files that say who may come in.
    #[error(transparent)]
    Access(#[from] AccessError),
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
            Self::Access(error) => error.hint(),
            Self::Invite(error) => error.hint(),
            Self::Random(_) => Some("see that /dev/urandom can be read".to_owned()),
        }
    }
}

/// Coordinates the run in `files` until it is finished or `stop` completes and every site has left. `on_invite` is
/// called once, with the invite for all where there is one, when sites can come.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(
    files: RunFiles,
    identity: Identity,
    (store, lines): (Box<dyn Store>, Vec<Line>),
    options: ServeOptions,
    reporter: Reporter,
    on_invite: impl FnOnce(Option<&Invite>),
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
    let (run, fingerprint) = (files.config.run.name.clone(), identity.fingerprint());
    let invite = Invite::new(&address, &run, fingerprint, secret.clone())?;
    let is_for_all = options.invite_seconds.is_some();
    let access = AccessFolder::of(&options.run);
    access.open(&Door { address, run, fingerprint })?;
    let mut shell = Shell::new(files, (store, lines), (options, access), secret, reporter)?;
    shell.heed_access()?;
    on_invite(is_for_all.then_some(&invite));
    shell.run(listener, std::pin::pin!(stop)).await
}

/// What the tasks of connections tell the loop.
enum Told {
    Greeted(Box<(Greeting, Connection)>),
    NotGreeted(SocketAddr, RecvError),
    ProbeRefused(SocketAddr, String),
    Said((SiteId, LinkNumber), FromSite),
    Lost((SiteId, LinkNumber)),
}

/// Where the desk's messages and events go.
struct Outside {
    outboxes: BTreeMap<LinkNumber, mpsc::Sender<FromCoordinator>>,
    reporter: Reporter,
    view: RunView,
}

impl Outlet for Outside {
    fn send(&mut self, link: LinkNumber, message: FromCoordinator) -> bool {
        self.outboxes.get(&link).is_some_and(|outbox| outbox.try_send(message).is_ok())
    }

    fn close(&mut self, link: LinkNumber) {
        // The writer sends what is queued and closes.
        self.outboxes.remove(&link);
    }

    fn tell(&mut self, event: Event) {
        let record = self.reporter.emit(event);
        self.view.apply(&record);
    }
}

struct Shell {
    served: Arc<Served>,
    desk: Desk,
    outside: Outside,
    may_fetch: Arc<RwLock<BTreeSet<ContentHash>>>,
    /// Digests of the invites that are valid now.
    invites: Arc<RwLock<BTreeSet<ContentHash>>>,
    access: AccessFolder,
    /// As they were written last.
    members: Option<Vec<Member>>,
    probes: Arc<Probes>,
    began: Instant,
    told: mpsc::Sender<Told>,
    inbox: mpsc::Receiver<Told>,
    tasks: JoinSet<()>,
    greetings: JoinSet<()>,
    refusals: Refusals,
}

/// How many refusals were logged since when: strangers must not be able to fill the disk.
struct Refusals {
    since: Instant,
    told: u32,
}

impl Shell {
    fn new(
        files: RunFiles,
        log: (Box<dyn Store>, Vec<Line>),
        (options, access): (ServeOptions, AccessFolder),
        secret: Secret,
        reporter: Reporter,
    ) -> Result<Self, ServeError> {
        let ServeOptions { rounds_max, train_seconds_max, reference, invite_seconds, .. } = options;
        let mut outside = Outside { outboxes: BTreeMap::new(), reporter, view: RunView::default() };
        let desk_options = DeskOptions { secret, invite_seconds, rounds_max, train_seconds_max };
        let desk = Desk::open(briefing(&files), log, desk_options, &mut outside)?;
        let may_fetch: Arc<RwLock<BTreeSet<ContentHash>>> = Arc::new(RwLock::new(desk.admitted().collect()));
        let (told, inbox) = mpsc::channel(INBOX_MAX);
        let invites = Arc::default();
        let run = files.config.run.name.clone();
        let probes = Arc::new(Probes::new(run, Arc::clone(&invites), Arc::clone(&may_fetch), reference));
        Ok(Self {
            served: Arc::new(Served::new(&files, Arc::clone(&may_fetch))),
            desk,
            outside,
            may_fetch,
            invites,
            access,
            members: None,
            probes,
            began: Instant::now(),
            told,
            inbox,
            tasks: JoinSet::new(),
            greetings: JoinSet::new(),
            refusals: Refusals { since: Instant::now(), told: 0 },
        })
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
        while !self.desk.is_done() {
            tokio::select! {
                Some(event) = listener.next() => self.visited(event),
                Some(told) = self.inbox.recv() => self.listen_to(told)?,
                Some(_) = self.tasks.join_next() => {}
                Some(_) = self.greetings.join_next() => {}
                _ = tick.tick() => {
                    let now = self.now();
                    self.desk.tick(now, &mut self.outside)?;
                    self.heed_access()?;
                }
                () = &mut stop, if !stopped => {
                    stopped = true;
                    let now = self.now();
                    self.desk.stop(now, &mut self.outside)?;
                }
            }
        }
        Ok(self.desk.summarise(&mut self.outside))
    }

    /// Does what `beringia admit` and `revoke` ask for, and says who is here.
    fn heed_access(&mut self) -> Result<(), ServeError> {
        let at = self.moment();
        match self.access.read() {
            Ok(access) => self.desk.set_access(access, at.now, &mut self.outside)?,
            // What cannot be read now can be in a second.
            Err(error) if self.members.is_none() => return Err(error.into()),
            Err(_) => return Ok(()),
        }
        if let Ok(mut may_fetch) = self.may_fetch.write() {
            may_fetch.retain(|fingerprint| self.desk.knows(fingerprint));
        }
        if let Ok(mut invites) = self.invites.write() {
            *invites = self.desk.invites(at);
        }
        let members = Some(self.desk.members());
        if self.members != members {
            self.access.write_members(members.as_deref().unwrap_or_default())?;
            self.members = members;
        }
        Ok(())
    }

    fn moment(&self) -> Moment {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Moment { now: self.now(), unix_seconds: unix.as_secs() }
    }

    fn visited(&mut self, event: ListenerEvent) {
        match event {
            ListenerEvent::Incoming(Incoming { purpose: Purpose::Blob, connection }) => {
                // Only sites fetch, and each was admitted before it knew of a file.
                if !self.desk.knows(&connection.peer()) {
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
            self.outside.tell(Event::PeerRefused { address, reason: reason.into() });
        }
    }

    fn listen_to(&mut self, told: Told) -> Result<(), ServeError> {
        let now = self.now();
        match told {
            Told::Greeted(greeted) => self.greeted(greeted.0, greeted.1)?,
            Told::NotGreeted(address, problem) => {
                self.tell_refusal(address.to_string(), format!("no greeting: {problem}"));
            }
            Told::ProbeRefused(address, reason) => self.tell_refusal(address.to_string(), reason),
            Told::Said(from, message) => self.desk.said(from, message, now, &mut self.outside)?,
            Told::Lost(from) => self.desk.lost(from, now, &mut self.outside)?,
        }
        Ok(())
    }

    fn refuse(&mut self, mut connection: Connection, reason: String, hint: &str) {
        self.tell_refusal(connection.address().to_string(), reason.clone());
        let answer = FromCoordinator::Refused { reason, hint: hint.to_owned() };
        self.tasks.spawn(async move {
            let _gone = connection.send_timeout(&answer, SITE_SILENCE_MAX).await;
            let _gone = connection.close().await;
        });
    }

    fn greeted(&mut self, greeting: Greeting, connection: Connection) -> Result<(), ServeError> {
        let (fingerprint, address) = (connection.peer(), connection.address());
        let (at, invite) = (self.moment(), greeting.secret.as_ref().map(Secret::digest));
        match self.desk.greet(Visitor { fingerprint, address, greeting }, at)? {
            Verdict::Refused { reason, hint } => self.refuse(connection, reason, hint),
            Verdict::Observer => self.answer_observer(connection),
            Verdict::Site(admission) => {
                invite.into_iter().for_each(|digest| self.access.forget_invite(digest));
                if let Ok(mut may_fetch) = self.may_fetch.write() {
                    may_fetch.insert(fingerprint);
                }
                self.connect((admission.peer.site, admission.link), connection);
                let now = self.now();
                self.desk.enter(*admission, now, &mut self.outside)?;
            }
        }
        Ok(())
    }

    fn answer_observer(&mut self, mut connection: Connection) {
        let status = FromCoordinator::Status(self.outside.view.to_json().to_string());
        self.tasks.spawn(async move {
            let _gone = connection.send_timeout(&status, SITE_SILENCE_MAX).await;
            let _gone = connection.close().await;
        });
    }

    fn connect(&mut self, from: (SiteId, LinkNumber), connection: Connection) {
        let (sender, receiver) = connection.split();
        let (outbox, waiting) = mpsc::channel(OUTBOX_MAX);
        self.outside.outboxes.insert(from.1, outbox);
        self.tasks.spawn(write(sender, waiting));
        self.tasks.spawn(read(receiver, from, self.told.clone()));
    }
}

fn briefing(files: &RunFiles) -> Briefing {
    Briefing {
        config: files.config.clone(),
        config_text: files.config_text.clone(),
        files: files.files.clone(),
        initial_hash: files.initial_hash,
        parameters: files.parameters,
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

async fn read(mut receiver: Receiver, from: (SiteId, LinkNumber), told: mpsc::Sender<Told>) {
    while let Ok(message) = receiver.recv_timeout(SITE_SILENCE_MAX).await {
        if told.send(Told::Said(from, message)).await.is_err() {
            return;
        }
    }
    // The loop is gone only when the process ends.
    let _ended = told.send(Told::Lost(from)).await;
}
