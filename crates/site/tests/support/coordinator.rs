//! A coordinator for sites in the same process: the decisions that ship, behind a loop without files and limits.

use super::Run;
use base::{ContentHash, SiteId};
use rounds::coordinator::Note;
use rounds::plan::LeaveReason;
use rounds::{Command, Coordinator, Event, LedgerTotals, Peer, Settings};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use wire::message::{FromCoordinator, FromSite, Greeting, Role, Welcome};
use wire::{Connection, Identity, Incoming, Invite, Listener, ListenerEvent, Secret, Traffic};

/// Between two looks at the time.
const TICK: Duration = Duration::from_millis(50);

/// What a run has come to.
#[derive(Debug)]
pub(crate) struct Coordinated {
    pub(crate) notes: Vec<Note>,
    pub(crate) ledger: LedgerTotals,
    pub(crate) rounds: u64,
    pub(crate) state_hash: Option<ContentHash>,
}

impl Coordinated {
    /// Why a site is gone.
    pub(crate) fn left(&self, site: u32) -> Option<LeaveReason> {
        self.notes.iter().find_map(|note| match note {
            Note::SiteLeft { site: left, reason } if *left == SiteId(site) => Some(*reason),
            _ => None,
        })
    }
}

/// Pulses that the coordinator has heard, to be waited for.
#[derive(Default)]
pub(crate) struct Pulses {
    heard: Mutex<u64>,
    changed: Condvar,
}

impl Pulses {
    fn hear(&self) {
        *self.heard.lock().unwrap() += 1;
        self.changed.notify_all();
    }

    /// Waits until there were so many; false where that takes longer than `patience`.
    pub(crate) fn wait_for(&self, count: u64, patience: Duration) -> bool {
        let heard = self.heard.lock().unwrap();
        !self.changed.wait_timeout_while(heard, patience, |heard| *heard < count).unwrap().1.timed_out()
    }
}

struct Shell {
    pulses: Arc<Pulses>,
    coordinator: Coordinator,
    outboxes: BTreeMap<SiteId, mpsc::UnboundedSender<FromCoordinator>>,
    notes: Vec<Note>,
    began: Instant,
    done: bool,
}

impl Shell {
    fn decide(&mut self, event: Event) {
        let now = self.began.elapsed().as_secs_f64();
        for command in self.coordinator.handle(event, now) {
            match command {
                Command::Send(site, directive) => {
                    if let Some(outbox) = self.outboxes.get(&site) {
                        let _gone = outbox.send(FromCoordinator::Directive(directive));
                    }
                }
                Command::Note(note) => self.notes.push(note),
                Command::Done => self.done = true,
                Command::Persist(_) => {}
            }
        }
        self.coordinator.ledger().audit().unwrap();
    }
}

/// What a site says, or that its connection ended.
type Told = (SiteId, Option<FromSite>);

/// Starts a coordinator; gives the invite, and what comes of it when every site has left.
pub(crate) async fn coordinate(run: &Run) -> (Invite, JoinHandle<Coordinated>) {
    coordinate_with(run, Arc::default()).await
}

/// As [`coordinate`], with an ear for pulses.
pub(crate) async fn coordinate_with(run: &Run, pulses: Arc<Pulses>) -> (Invite, JoinHandle<Coordinated>) {
    let identity = Identity::generate().unwrap();
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), &identity, &Traffic::new()).await.unwrap();
    let (address, secret) = (listener.address().to_string(), Secret::generate().unwrap());
    let invite = Invite::new(&address, &run.config.run.name, identity.fingerprint(), secret).unwrap();
    let initial = run.initial_state().global;
    let settings = Settings::new(&run.config);
    let (coordinator, _) = Coordinator::recover(settings, initial.hash(), []);
    let shell =
        Shell { pulses, coordinator, outboxes: BTreeMap::new(), notes: Vec::new(), began: Instant::now(), done: false };
    let welcome =
        Welcome { site: SiteId(0), run_toml: run.config.to_toml(), model_hash: run.config.model_hash(), files: vec![] };
    (invite, tokio::spawn(serve(shell, listener, welcome)))
}

async fn serve(mut shell: Shell, mut listener: Listener, welcome: Welcome) -> Coordinated {
    let (told_in, mut told) = mpsc::unbounded_channel::<Told>();
    let mut tick = tokio::time::interval(TICK);
    while !shell.done {
        tokio::select! {
            Some(event) = listener.next() => if let ListenerEvent::Incoming(Incoming { connection, .. }) = event {
                admit(&mut shell, connection, welcome.clone(), told_in.clone()).await;
            },
            Some((site, said)) = told.recv() => match said {
                Some(FromSite::Report(report)) => shell.decide(Event::Reported(site, report)),
                Some(FromSite::Pulse) => shell.pulses.hear(),
                Some(_) => {}
                None => shell.decide(Event::Disconnected(site, LeaveReason::ConnectionLost)),
            },
            _ = tick.tick() => shell.decide(Event::Tick),
        }
    }
    let last = shell.coordinator.last();
    let (rounds, state_hash, ledger) = (last.commit.round.0, last.state_hash, shell.coordinator.ledger().totals());
    Coordinated { notes: shell.notes, ledger, rounds, state_hash }
}

async fn admit(shell: &mut Shell, mut connection: Connection, welcome: Welcome, told: mpsc::UnboundedSender<Told>) {
    let greeting: Greeting = connection.recv().await.unwrap();
    let Role::Site(hello) = greeting.role else { panic!("only sites come here") };
    // Sites are named after their ids, so that who is first to connect does not matter.
    let site = SiteId(hello.name.parse().unwrap());
    connection.send(&FromCoordinator::Welcome(Welcome { site, ..welcome })).await.unwrap();
    let address = if hello.port == 0 { String::new() } else { format!("127.0.0.1:{}", hello.port) };
    let peer = Peer { site, name: hello.name, address, fingerprint: connection.peer() };
    let (mut sender, mut receiver) = connection.split();
    let (outbox, mut waiting) = mpsc::unbounded_channel();
    shell.outboxes.insert(site, outbox);
    tokio::spawn(async move {
        while let Some(message) = waiting.recv().await {
            if sender.send(&message).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        while let Ok(said) = receiver.recv().await {
            let _ended = told.send((site, Some(said)));
        }
        let _ended = told.send((site, None));
    });
    shell.decide(Event::Connected(peer));
}
