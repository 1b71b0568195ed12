//! The side that asks. What the answers mean is decided elsewhere.

use super::answer::unix_ns;
use super::transfer::{self, Transfer, TransferError};
use super::{ProbeGreeting, ProbeKind, ProbeReply, ProbeRequest, ProbeWelcome, Reference};
use crate::connection::{ConnectError, Connection, RecvError, SendError, connect_within};
use crate::identity::Identity;
use crate::invite::Invite;
use crate::limits::{
    PROBE_ANSWER_SECONDS_MAX, PROBE_CONNECT_SECONDS_MAX, PROBE_STREAM_BYTES_MAX, PROBE_STREAMS, PROBE_VECTORS_MAX,
};
use crate::message::TEXT_BYTES_MAX;
use crate::preamble::Purpose;
use crate::traffic::Traffic;
use base::Hint;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const ANSWER: Duration = Duration::from_secs(PROBE_ANSWER_SECONDS_MAX);

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The other side does not answer this.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
        /// What mends it.
        hint: String,
    },
    /// The connection broke while asking.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The connection broke before the answer.
    #[error(transparent)]
    Recv(#[from] RecvError),
    /// A transfer was out of bounds.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// An answer to another question, or one that is out of bounds.
    #[error("the other side answered {0}")]
    Answer(String),
}

impl Hint for ProbeError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Connect(error) => return error.hint(),
            Self::Refused { hint, .. } => hint.clone(),
            Self::Send(_) | Self::Recv(_) => {
                "see that `beringia serve` still runs there and what it logged; then ask again".to_owned()
            }
            Self::Transfer(_) | Self::Answer(_) => "install the same build of beringia on both sides".to_owned(),
        })
    }
}

/// Asks the coordinator of an invite.
#[derive(Debug)]
pub struct Prober {
    identity: Identity,
    invite: Invite,
    version: String,
    traffic: Traffic,
}

/// A connection on which questions are answered.
#[derive(Debug)]
pub struct Asked {
    connection: Connection,
    welcome: ProbeWelcome,
}

/// One ping.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ping {
    /// From the question to its answer.
    pub round_trip: Duration,
    /// The other side's clock minus ours, if the answer took half the round trip; wrong by at most that half.
    pub clock_difference_seconds: f64,
}

/// Which way a transfer goes, as the side that asks sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the other side.
    Download,
    /// To the other side.
    Upload,
}

/// What the streams of a transfer carried together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bandwidth {
    /// Streams at the same time.
    pub streams: usize,
    /// Bytes in the sockets of all streams.
    pub bytes: u64,
    /// The longest span of a stream.
    pub seconds: f64,
}

impl Bandwidth {
    /// Rate over the longest span.
    pub fn bits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.seconds.max(1e-9)
    }
}

impl Prober {
    /// Asks who gave `invite`, as a machine with this key and program version.
    pub fn new(identity: Identity, invite: Invite, version: &str) -> Self {
        Self { identity, invite, version: version.to_owned(), traffic: Traffic::new() }
    }

    /// Connects and greets.
    ///
    /// # Errors
    /// The other side is not reached, is not the one, or refuses.
    pub async fn connect(&self) -> Result<Asked, ProbeError> {
        self.greet(ProbeKind::Questions).await
    }

    async fn greet(&self, kind: ProbeKind) -> Result<Asked, ProbeError> {
        let (address, fingerprint) = (self.invite.address(), self.invite.fingerprint());
        let wait = Duration::from_secs(PROBE_CONNECT_SECONDS_MAX);
        let connecting =
            connect_within(None, &self.identity, &self.traffic, address, fingerprint, Purpose::Probe, (wait, wait));
        let mut connection = connecting.await?;
        let greeting = ProbeGreeting {
            run: self.invite.run().to_owned(),
            secret: Some(self.invite.secret().clone()),
            kind,
            version: self.version.clone(),
        };
        connection.send_timeout(&greeting, ANSWER).await?;
        match connection.recv_timeout(ANSWER).await? {
            ProbeReply::Welcome(welcome) if welcome.is_acceptable() => Ok(Asked { connection, welcome }),
            other => Err(unexpected(other, "a greeting")),
        }
    }

    /// Carries bytes one way over [`PROBE_STREAMS`] streams, for at most [`crate::limits::PROBE_TRANSFER_SECONDS`] and
    /// [`crate::limits::PROBE_TRANSFER_BYTES_MAX`].
    ///
    /// # Errors
    /// A stream was not opened, or broke.
    pub async fn transfer(&self, direction: Direction) -> Result<Bandwidth, ProbeError> {
        let mut streams = Vec::with_capacity(PROBE_STREAMS);
        for _ in 0..PROBE_STREAMS {
            streams.push(self.greet(ProbeKind::Stream).await?.connection);
        }
        let mut carrying = JoinSet::new();
        for stream in streams {
            carrying.spawn(carry(stream, direction));
        }
        let mut sum = Bandwidth { streams: PROBE_STREAMS, bytes: 0, seconds: 0.0 };
        while let Some(carried) = carrying.join_next().await {
            let carried = carried.map_err(|error| ProbeError::Answer(error.to_string()))??;
            sum.bytes = sum.bytes.saturating_add(carried.bytes);
            sum.seconds = sum.seconds.max(carried.seconds);
        }
        Ok(sum)
    }
}

async fn carry(mut stream: Connection, direction: Direction) -> Result<Transfer, ProbeError> {
    let (sender, receiver) = stream.halves();
    match direction {
        Direction::Download => {
            sender.send_timeout(&ProbeRequest::Download, ANSWER).await?;
            Ok(transfer::drain(receiver, PROBE_STREAM_BYTES_MAX).await?)
        }
        Direction::Upload => {
            sender.send_timeout(&ProbeRequest::Upload, ANSWER).await?;
            let mut report = std::pin::pin!(receiver.recv_timeout(ANSWER));
            // The receiver may have seen enough before everything is sent.
            let reply = tokio::select! {
                reply = &mut report => reply?,
                poured = transfer::pour(sender) => {
                    poured?;
                    report.await?
                }
            };
            match reply {
                ProbeReply::Received(received) if received.seconds.is_finite() && received.seconds >= 0.0 => {
                    Ok(received)
                }
                other => Err(unexpected(other, "an upload")),
            }
        }
    }
}

impl Asked {
    /// What the other side said of itself.
    pub fn welcome(&self) -> &ProbeWelcome {
        &self.welcome
    }

    /// Our end of the connection.
    pub fn local_address(&self) -> SocketAddr {
        self.connection.local_address()
    }

    /// The other end of the connection.
    pub fn address(&self) -> SocketAddr {
        self.connection.address()
    }

    /// One round trip.
    ///
    /// # Errors
    /// No answer, or none to this question.
    pub async fn ping(&mut self) -> Result<Ping, ProbeError> {
        let (sent, sent_unix_ns) = (Instant::now(), unix_ns());
        self.connection.send_timeout(&ProbeRequest::Ping, ANSWER).await?;
        match self.connection.recv_timeout(ANSWER).await? {
            ProbeReply::Pong { unix_ns } => {
                let round_trip = sent.elapsed();
                let halfway_ns = sent_unix_ns as f64 + round_trip.as_nanos() as f64 / 2.0;
                Ok(Ping { round_trip, clock_difference_seconds: (unix_ns as f64 - halfway_ns) / 1e9 })
            }
            other => Err(unexpected(other, "a ping")),
        }
    }

    /// The other side's results; `expected` names them with their lengths, in order.
    ///
    /// # Errors
    /// It has none, or they are not those.
    pub async fn reference(&mut self, expected: &[(&str, usize)]) -> Result<Reference, ProbeError> {
        self.connection.send_timeout(&ProbeRequest::Reference, ANSWER).await?;
        let mut reference = match self.connection.recv_timeout(ANSWER).await? {
            ProbeReply::Reference { engine, device, precision, vectors } => {
                let fits = vectors as usize <= PROBE_VECTORS_MAX && vectors as usize == expected.len();
                if !fits {
                    let wanted = expected.len();
                    return Err(ProbeError::Answer(format!("{vectors} reference results where {wanted} were asked")));
                }
                Reference { engine, device, precision, vectors: Vec::with_capacity(expected.len()) }
            }
            other => return Err(unexpected(other, "the question for reference results")),
        };
        for (name, length) in expected {
            match self.connection.recv_timeout(ANSWER).await? {
                ProbeReply::Vector(vector) if vector.name == *name && vector.values.len() == *length => {
                    reference.vectors.push(vector);
                }
                ProbeReply::Vector(vector) => {
                    let (found, numbers) = (clip(&vector.name), vector.values.len());
                    let message = format!("{numbers} numbers of '{found}' where {length} of '{name}' were asked");
                    return Err(ProbeError::Answer(message));
                }
                other => return Err(unexpected(other, "the question for reference results")),
            }
        }
        match reference.is_acceptable() {
            true => Ok(reference),
            false => Err(ProbeError::Answer("reference results that are out of bounds".to_owned())),
        }
    }

    /// Leaves.
    ///
    /// # Errors
    /// The connection is gone already.
    pub async fn close(mut self) -> Result<(), SendError> {
        self.connection.close().await
    }
}

impl ProbeWelcome {
    fn is_acceptable(&self) -> bool {
        self.version.len() <= TEXT_BYTES_MAX && self.seen_as.len() <= TEXT_BYTES_MAX
    }
}

fn unexpected(reply: ProbeReply, question: &str) -> ProbeError {
    match reply {
        ProbeReply::Refused { reason, hint } => ProbeError::Refused { reason: clip(&reason), hint: clip(&hint) },
        _ => ProbeError::Answer(format!("{question} with something else")),
    }
}

/// Enough of a text for a message.
fn clip(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}
