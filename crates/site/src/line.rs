//! The line to the coordinator: dialled at the start, and dialled again for as long as it takes when it breaks.
//!
//! A coordinator that is started again is the same to its sites: it has the same key and goes on from its log, and it knows
//! them by theirs, so that the secret of an invite that is no longer valid does not matter.

use crate::join::{JoinError, conversation, greet};
use base::{ContentHash, Hint};
use rounds::Directive;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use wire::message::{FromCoordinator, SiteHello, Welcome};
use wire::{ConnectError, Connection, Identity, Invite, Proxy, Receiver, Sender, Traffic};

/// The coordinator pulses every second: silence for this long means that it, or the way to it, is gone.
const COORDINATOR_SILENCE_MAX: Duration = Duration::from_secs(20);

/// Directives that may wait for the loop.
const DIRECTIVES_MAX: usize = 256;

/// Pause before the second try.
const PAUSE_MIN: Duration = Duration::from_millis(250);

/// Later pauses are a fourth of the time since the first try, up to [`PAUSE_MAX`]: waiting takes at most that much longer than it must.
const PAUSES_OF_THE_TIME: u32 = 4;

/// However long it was away, a coordinator that comes back is found within this time, and thousands of sites do not keep it from starting.
const PAUSE_MAX: Duration = Duration::from_secs(4);

/// What the receiving task hands to the loop: a directive, or once and last why there are no more.
pub(crate) type Received = Result<Directive, JoinError>;

/// Both directions of a connection that was greeted.
pub(crate) struct Line {
    pub(crate) sender: Sender,
    pub(crate) directives: mpsc::Receiver<Received>,
}

/// Whom to dial, and as whom.
#[derive(Clone)]
pub(crate) struct Dialler {
    pub(crate) identity: Identity,
    pub(crate) traffic: Traffic,
    pub(crate) invite: Invite,
    pub(crate) proxy: Option<Proxy>,
    pub(crate) hello: SiteHello,
}

impl Dialler {
    /// Dials and greets once.
    ///
    /// # Errors
    /// Nobody is there, or it refuses this site.
    pub(crate) async fn dial(&self) -> Result<(Line, Welcome), JoinError> {
        let through = (&self.invite, self.proxy.as_ref());
        let (connection, welcome) = greet(&self.identity, &self.traffic, through, self.hello.clone()).await?;
        Ok((self.line(connection), welcome))
    }

    /// Dials until somebody answers or `patience` is over. The coordinator must know this site as what it was before.
    ///
    /// # Errors
    /// Of the last try, or of the first that trying again cannot mend.
    pub(crate) async fn dial_again(&self, before: &Welcome, patience: Duration) -> Result<Line, JoinError> {
        let (began, mut pause) = (tokio::time::Instant::now(), PAUSE_MIN);
        loop {
            let error = match self.dial().await {
                Ok((line, welcome)) => return self.compare(before, &welcome).map(|()| line),
                Err(error) => error,
            };
            let pause_now = self.spread(pause);
            if !is_passing(&error) || began.elapsed() + pause_now > patience {
                return Err(error);
            }
            tokio::time::sleep(pause_now).await;
            // A coordinator that was away for long is not called often, and one that is back soon is found soon.
            pause = (began.elapsed() / PAUSES_OF_THE_TIME).clamp(PAUSE_MIN, PAUSE_MAX);
        }
    }

    fn compare(&self, before: &Welcome, now: &Welcome) -> Result<(), JoinError> {
        let same = before.site == now.site && before.model_hash == now.model_hash && before.run_toml == now.run_toml;
        let changed = "it came back with other settings, or knows this site as another one";
        if same { Ok(()) } else { Err(conversation(self.invite.address(), changed)) }
    }

    /// Between half of a pause and all of it, by this site's key: sites that lost their coordinator together do not come
    /// back together.
    fn spread(&self, pause: Duration) -> Duration {
        let ContentHash(fingerprint) = self.identity.fingerprint();
        pause.mul_f64(0.5 + f64::from(fingerprint[0]) / 512.0)
    }

    fn line(&self, connection: Connection) -> Line {
        let (sender, receiver) = connection.split();
        let (directives_in, directives) = mpsc::channel(DIRECTIVES_MAX);
        tokio::spawn(receive(receiver, self.invite.address().to_owned(), directives_in));
        Line { sender, directives }
    }
}

/// The line to the coordinator, or the calls that are to make it anew.
pub(crate) struct Coordinator {
    pub(crate) dialler: Dialler,
    pub(crate) welcome: Welcome,
    /// See [`crate::JoinOptions::coordinator_wait`].
    pub(crate) wait: Duration,
    /// None while the line is broken: what is said then is lost, as it would be on a line that breaks a little later.
    pub(crate) sender: Option<Sender>,
    pub(crate) calls: Option<(Instant, JoinHandle<Result<Line, JoinError>>)>,
}

impl Coordinator {
    /// Gives up a line that broke, and calls until somebody answers.
    pub(crate) fn call(&mut self) {
        self.sender = None;
        let (dialler, welcome, wait) = (self.dialler.clone(), self.welcome.clone(), self.wait);
        let calls = tokio::spawn(async move { dialler.dial_again(&welcome, wait).await });
        self.calls = Some((Instant::now(), calls));
    }

    /// How the calls ended, and after how long; never where none are made.
    pub(crate) async fn answered(&mut self) -> (Duration, Result<Line, JoinError>) {
        let Some((began, calls)) = &mut self.calls else { return std::future::pending().await };
        let line =
            calls.await.unwrap_or_else(|_| Err(conversation(self.dialler.invite.address(), "the call broke off")));
        let seconds = began.elapsed();
        self.calls = None;
        (seconds, line)
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        if let Some((_, calls)) = &self.calls {
            calls.abort();
        }
    }
}

/// Whether the next try may do better.
fn is_passing(error: &JoinError) -> bool {
    match error {
        JoinError::Connect(ConnectError::Fingerprint { .. } | ConnectError::Preamble { .. }) => false,
        JoinError::Connect(_) | JoinError::Conversation { .. } => true,
        _ => false,
    }
}

async fn receive(mut receiver: Receiver, address: String, directives: mpsc::Sender<Received>) {
    loop {
        let received = match receiver.recv_timeout(COORDINATOR_SILENCE_MAX).await {
            Ok(FromCoordinator::Directive(directive)) => Ok(directive),
            Ok(FromCoordinator::Pulse) => continue,
            Ok(_) => Err(conversation(&address, "it sent something that is not a directive")),
            Err(error) => Err(conversation(&address, error)),
        };
        let ended = received.is_err();
        if directives.send(received).await.is_err() || ended {
            return;
        }
    }
}

/// What people are told while the coordinator is away.
pub(crate) fn away(error: &JoinError, patience: Duration) -> (String, Option<String>) {
    let minutes = patience.as_secs_f64() / 60.0;
    let message = format!("{error}; this site keeps what it holds and calls again for {minutes:.0} min");
    (message, error.hint())
}
