//! Accepts peers: authenticated ones come out, all others cost bounded memory and time.
//!
//! A stranger may stay silent, send garbage, or drip bytes: after the handshake's deadline it is gone, and when
//! [`HANDSHAKES_MAX`] are waiting, a new one pushes out the oldest. Nobody is served later because of a stranger.
//! What is refused is counted; the application is told about some of it, at a bounded rate.

use crate::connection::{Connection, HandshakeProblem, welcome};
use crate::identity::Identity;
use crate::limits::{
    ACCEPT_RETRY, HANDSHAKE_SECONDS_MAX, HANDSHAKES_MAX, INCOMING_QUEUED_MAX, REFUSALS_QUEUED_MAX,
    REFUSALS_REPORTED_PER_MINUTE_MAX,
};
use crate::peers::{PeerLimits, Peers};
use crate::preamble::{PreambleError, Purpose};
use crate::traffic::Traffic;
use base::{ContentHash, Hint};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout};

/// A listening socket with the task that accepts on it; dropping it ends both.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    traffic: Traffic,
    counters: Arc<Counters>,
    peers: Peers,
    incoming: mpsc::Receiver<Incoming>,
    refusals: mpsc::Receiver<Refusal>,
    accepting: AbortHandle,
}

/// A peer that proved its key; whether it may stay is the application's decision.
#[derive(Debug)]
pub struct Incoming {
    /// What the peer connects for.
    pub purpose: Purpose,
    /// The connection; [`Connection::peer`] is the fingerprint to decide on.
    pub connection: Connection,
}

/// A connection that did not get as far.
#[derive(Debug)]
pub struct Refusal {
    /// Where it came from.
    pub address: SocketAddr,
    /// Why it was refused.
    pub reason: RefusalReason,
    /// Refusals since the last reported one that were only counted.
    pub unreported: u64,
}

/// Why a connection was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RefusalReason {
    /// Another program or another version.
    #[error(transparent)]
    Preamble(#[from] PreambleError),
    /// Silent or too slow.
    #[error("the handshake was not complete after {0:?}")]
    Timeout(Duration),
    /// Pushed out by newer connections.
    #[error("{0} newer connections were waiting for their handshake")]
    Displaced(usize),
    /// TLS failed, or the connection broke.
    #[error("the TLS handshake failed: {0}")]
    Handshake(#[source] io::Error),
    /// The peer has enough.
    #[error("the peer {} has {connections} connections already", peer.short())]
    Connections {
        /// Its fingerprint.
        peer: ContentHash,
        /// How many are open.
        connections: usize,
    },
}

impl From<HandshakeProblem> for RefusalReason {
    fn from(problem: HandshakeProblem) -> Self {
        match problem {
            HandshakeProblem::Preamble(error) => Self::Preamble(error),
            HandshakeProblem::Tls(error) => Self::Handshake(error),
        }
    }
}

/// What a listener tells.
#[derive(Debug)]
pub enum ListenerEvent {
    /// A peer.
    Incoming(Incoming),
    /// A connection that was refused; not every one is told.
    Refused(Refusal),
}

/// Totals since the listener was bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ListenerStats {
    /// Peers that were authenticated.
    pub accepted: u64,
    /// Connections that were refused.
    pub refused: u64,
    /// How often a message was waited for because its peer had said too much.
    pub throttled: u64,
}

#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    refused: AtomicU64,
}

/// What a listener allows strangers. The default is right for use; tests take less.
#[derive(Debug, Clone, Copy)]
pub struct ListenerLimits {
    /// Connections that are not yet authenticated.
    pub handshakes_max: usize,
    /// From the accepted socket to the authenticated peer.
    pub handshake: Duration,
    /// What each authenticated peer may take.
    pub peer: PeerLimits,
}

impl Default for ListenerLimits {
    fn default() -> Self {
        let handshake = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
        Self { handshakes_max: HANDSHAKES_MAX, handshake, peer: PeerLimits::default() }
    }
}

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Another program listens there.
    #[error("port {} is in use on {}", address.port(), address.ip())]
    PortInUse {
        /// Where.
        address: SocketAddr,
    },
    /// The system refused.
    #[error("cannot listen on {address}: {source}")]
    Refused {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

impl Hint for ListenError {
    fn hint(&self) -> Option<String> {
        let port_above = |port: u16| if port < u16::MAX { port + 1 } else { 7447 };
        Some(match self {
            Self::PortInUse { address } => format!(
                "take another one with `--listen {}:{}`, or see who has it: `ss -ltnp 'sport = :{}'`",
                address.ip(),
                port_above(address.port()),
                address.port()
            ),
            Self::Refused { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "ports under 1024 need privileges; take one above with `--listen 0.0.0.0:7447`".to_owned()
            }
            Self::Refused { .. } => "listen on an address of this machine; `ip address` lists them".to_owned(),
        })
    }
}

impl Listener {
    /// Listens on `address`; port 0 takes a free one. Bytes of all connections count in `traffic`. Needs a tokio runtime.
    ///
    /// # Errors
    /// The port is in use, or the system refuses.
    pub async fn bind(address: SocketAddr, identity: &Identity, traffic: &Traffic) -> Result<Self, ListenError> {
        Self::bind_with(address, identity, traffic, ListenerLimits::default()).await
    }

    /// [`Listener::bind`] with other limits.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub async fn bind_with(
        address: SocketAddr,
        identity: &Identity,
        traffic: &Traffic,
        limits: ListenerLimits,
    ) -> Result<Self, ListenError> {
        assert!(limits.handshakes_max > 0, "a listener without handshakes accepts nobody");
        let refused = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ListenError::PortInUse { address },
            _ => ListenError::Refused { address, source },
        };
        let socket = TcpListener::bind(address).await.map_err(refused)?;
        let address = socket.local_addr().map_err(refused)?;
        let (counters, peers) = (Arc::new(Counters::default()), Peers::new(limits.peer));
        let (incoming_sender, incoming) = mpsc::channel(INCOMING_QUEUED_MAX);
        let (refusal_sender, refusals) = mpsc::channel(REFUSALS_QUEUED_MAX);
        let welcomer = Welcomer {
            config: identity.server_config(),
            traffic: traffic.clone(),
            deadline: limits.handshake,
            counters: counters.clone(),
            peers: peers.clone(),
            incoming: incoming_sender,
        };
        let reporter = Reporter::new(refusal_sender, counters.clone());
        let reception = Reception { welcomer, reporter, limits, tasks: JoinSet::new(), waiting: VecDeque::new() };
        let accepting = tokio::spawn(reception.accept_all(socket)).abort_handle();
        Ok(Self { address, traffic: traffic.clone(), counters, peers, incoming, refusals, accepting })
    }

    /// Where it listens, with the port that was taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes of all its connections.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Totals since the bind.
    pub fn stats(&self) -> ListenerStats {
        ListenerStats {
            accepted: self.counters.accepted.load(Ordering::Relaxed),
            refused: self.counters.refused.load(Ordering::Relaxed),
            throttled: self.peers.throttled(),
        }
    }

    /// The next peer or refusal; peers first. Cancel-safe. `None` only if the accepting task is gone.
    pub async fn next(&mut self) -> Option<ListenerEvent> {
        tokio::select! {
            biased;
            Some(incoming) = self.incoming.recv() => Some(ListenerEvent::Incoming(incoming)),
            Some(refusal) = self.refusals.recv() => Some(ListenerEvent::Refused(refusal)),
            else => None,
        }
    }

    /// The next peer; refusals show in [`Listener::stats`] only. Cancel-safe.
    pub async fn accept(&mut self) -> Option<Incoming> {
        self.incoming.recv().await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// What every handshake needs.
#[derive(Clone)]
struct Welcomer {
    config: Arc<rustls::ServerConfig>,
    traffic: Traffic,
    deadline: Duration,
    counters: Arc<Counters>,
    peers: Peers,
    incoming: mpsc::Sender<Incoming>,
}

impl Welcomer {
    /// One handshake. An authenticated peer keeps its place until the application takes it.
    async fn run(self, socket: TcpStream) -> Result<(), RefusalReason> {
        let (purpose, mut connection) = timeout(self.deadline, welcome(self.config, &self.traffic, socket))
            .await
            .map_err(|_| RefusalReason::Timeout(self.deadline))??;
        let peer = connection.peer();
        let connections = self.peers.connections_max();
        let place = self.peers.place(peer, purpose).ok_or(RefusalReason::Connections { peer, connections })?;
        connection.take_place(place);
        self.counters.accepted.fetch_add(1, Ordering::Relaxed);
        // A closed queue means that the listener was dropped: nobody is left to be told.
        let _ = self.incoming.send(Incoming { purpose, connection }).await;
        Ok(())
    }
}

/// The accepting task: it alone starts, counts and displaces handshakes.
struct Reception {
    welcomer: Welcomer,
    reporter: Reporter,
    limits: ListenerLimits,
    tasks: JoinSet<(SocketAddr, Result<(), RefusalReason>)>,
    /// Running handshakes, oldest first.
    waiting: VecDeque<(AbortHandle, SocketAddr)>,
}

impl Reception {
    async fn accept_all(mut self, socket: TcpListener) {
        loop {
            tokio::select! {
                Some(ended) = self.tasks.join_next() => {
                    self.waiting.retain(|(handle, _)| !handle.is_finished());
                    // An error is a displaced task, reported when it was displaced.
                    if let Ok((address, Err(reason))) = ended {
                        self.reporter.refused(address, reason);
                    }
                }
                accepted = socket.accept() => match accepted {
                    Ok((stream, address)) => self.start(stream, address),
                    // No descriptors left, or the peer was gone before we came: neither ends the listener.
                    Err(_) => tokio::time::sleep(ACCEPT_RETRY).await,
                },
            }
        }
    }

    fn start(&mut self, stream: TcpStream, address: SocketAddr) {
        if self.waiting.len() >= self.limits.handshakes_max
            && let Some((oldest, displaced)) = self.waiting.pop_front()
        {
            oldest.abort();
            self.reporter.refused(displaced, RefusalReason::Displaced(self.limits.handshakes_max));
        }
        let handshake = self.welcomer.clone().run(stream);
        let handle = self.tasks.spawn(async move { (address, handshake.await) });
        self.waiting.push_back((handle, address));
    }
}

/// Counts refusals and tells some of them.
struct Reporter {
    sender: mpsc::Sender<Refusal>,
    counters: Arc<Counters>,
    minute_started: Instant,
    told_this_minute: u32,
    unreported: u64,
}

impl Reporter {
    fn new(sender: mpsc::Sender<Refusal>, counters: Arc<Counters>) -> Self {
        Self { sender, counters, minute_started: Instant::now(), told_this_minute: 0, unreported: 0 }
    }

    fn refused(&mut self, address: SocketAddr, reason: RefusalReason) {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        if self.minute_started.elapsed() >= Duration::from_secs(60) {
            (self.minute_started, self.told_this_minute) = (Instant::now(), 0);
        }
        let refusal = Refusal { address, reason, unreported: self.unreported };
        if self.told_this_minute < REFUSALS_REPORTED_PER_MINUTE_MAX && self.sender.try_send(refusal).is_ok() {
            self.told_this_minute += 1;
            self.unreported = 0;
        } else {
            self.unreported += 1;
        }
    }
}
