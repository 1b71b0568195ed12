//! One authenticated connection: typed messages each way over TLS 1.3.
//!
//! Receiving is cancel-safe: what has arrived of a message stays in the receiver, so that `recv` can stand in a
//! `select!`. A `send` that is dropped half-way leaves the rest of its frame queued; the next `send` or `flush`
//! continues it, so that the stream of frames never tears.

use crate::frame::{self, FrameDecoder, FrameError};
use crate::identity::Identity;
use crate::limits::{
    CONNECT_SECONDS_MAX, HANDSHAKE_SECONDS_MAX, PROTOCOL_VERSION, SOCKET_READ_BYTES, SOCKET_WRITE_BYTES,
};
use crate::link::LinkPath;
use crate::peers::Place;
use crate::preamble::{self, PREAMBLE_BYTES, PreambleError, Purpose};
use crate::proxy::{DialError, Proxy, dial};
use crate::socket::{Socket as SystemSocket, TcpInfo};
use crate::tls::{self, FingerprintMismatch};
use crate::traffic::{Counted, Traffic};
use base::{ContentHash, Hint};
use bytes::{Buf, Bytes, BytesMut};
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

type Socket = BufReader<Counted<TcpStream>>;
type Stream = TlsStream<Socket>;

/// An authenticated connection; its two directions can be split.
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    receiver: Receiver,
}

/// The sending half of a [`Connection`].
#[derive(Debug)]
pub struct Sender {
    stream: WriteHalf<Stream>,
    /// What TLS has not taken yet: at most one frame, or one header with its content.
    pending: BytesMut,
    peer: Arc<Peer>,
}

/// The receiving half of a [`Connection`].
#[derive(Debug)]
pub struct Receiver {
    stream: ReadHalf<Stream>,
    decoder: FrameDecoder,
    peer: Arc<Peer>,
}

#[derive(Debug)]
struct Peer {
    fingerprint: ContentHash,
    address: SocketAddr,
    local_address: SocketAddr,
    /// Open for as long as either half: nobody but the halves holds a `Peer`.
    socket: SystemSocket,
    traffic: Traffic,
    /// Of a peer that came to a listener of ours: what it may take.
    place: OnceLock<Place>,
}

/// Why a message was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The message is too long for a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The connection is gone.
    #[error("connection lost while sending: {0}")]
    Lost(#[source] io::Error),
    /// The peer does not take what is sent.
    #[error("the peer took nothing for {0:?}")]
    Timeout(Duration),
}

/// Why no message came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// The peer closed the connection between two messages, as it should.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection broke between two messages.
    #[error("connection lost: {0}")]
    Lost(#[source] io::Error),
    /// The connection ended inside a message.
    #[error("the connection ended inside a frame, after {received} of {expected} bytes")]
    Truncated {
        /// Bytes that arrived.
        received: usize,
        /// Bytes of the frame, header included.
        expected: usize,
    },
    /// What arrived is no message.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Nothing came in time.
    #[error("the peer sent nothing for {0:?}")]
    Timeout(Duration),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No TCP connection.
    #[error("cannot reach {address}: {source}")]
    Unreachable {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// No TCP connection to the proxy that was to connect us.
    #[error("cannot reach the proxy {proxy}: {source}")]
    ProxyUnreachable {
        /// Which.
        proxy: Proxy,
        /// What the system said.
        source: io::Error,
    },
    /// The proxy answers and does not connect us.
    #[error("the proxy {proxy} does not connect to {address}: {source}")]
    ProxyRefused {
        /// Which.
        proxy: Proxy,
        /// Where to.
        address: String,
        /// What it said, or what is wrong with what it said.
        source: io::Error,
    },
    /// Nobody answered in time.
    #[error("{address} did not answer within {waited:?} ({step})")]
    Timeout {
        /// Where.
        address: String,
        /// How long we waited.
        waited: Duration,
        /// What we waited for.
        step: &'static str,
    },
    /// Somebody else answers there.
    #[error("{address} is not who it should be: expected fingerprint {expected}, found {found}")]
    Fingerprint {
        /// Where.
        address: String,
        /// The pinned fingerprint.
        expected: ContentHash,
        /// The fingerprint of the certificate shown.
        found: ContentHash,
    },
    /// Another program or version.
    #[error("{address}: {source}")]
    Preamble {
        /// Where.
        address: String,
        /// What is different.
        source: PreambleError,
    },
    /// The handshake failed or was refused.
    #[error("{address}: the TLS handshake failed: {source}")]
    Handshake {
        /// Where.
        address: String,
        /// What TLS or the system said.
        source: io::Error,
    },
}

impl Hint for ConnectError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { address, .. } | Self::Timeout { address, .. } => Some(format!(
                "see that `beringia serve` or the site runs there and that no firewall is between: `nc -vz {}`",
                address.rsplit_once(':').map_or(address.clone(), |(host, port)| format!("{host} {port}"))
            )),
            Self::ProxyUnreachable { .. } => {
                Some("see that the proxy runs, or name another one: `--proxy socks5://HOST:PORT`".into())
            }
            Self::ProxyRefused { address, .. } => Some(format!(
                "see that it is a SOCKS5 proxy without a password that may connect to {address}, and that somebody \
                 listens there"
            )),
            Self::Fingerprint { .. } => Some(
                "its key has changed, or another machine answers: ask for a new invite from `beringia serve`".into(),
            ),
            Self::Preamble { source, .. } => source.hint(),
            Self::Handshake { .. } => Some("look into the log of the other side: it names the reason".into()),
        }
    }
}

/// Connects to `address` (host:port), accepting only the peer with that fingerprint. Bytes count in a child of `traffic`.
///
/// # Errors
/// See [`ConnectError`]; after [`CONNECT_SECONDS_MAX`] + [`HANDSHAKE_SECONDS_MAX`] at the latest.
pub async fn connect(
    identity: &Identity,
    traffic: &Traffic,
    address: &str,
    fingerprint: ContentHash,
    purpose: Purpose,
) -> Result<Connection, ConnectError> {
    connect_through(None, identity, traffic, address, fingerprint, purpose).await
}

/// [`connect`] through a proxy, if there is one. [`Connection::address`] is then the proxy's.
///
/// # Errors
/// As [`connect`].
pub async fn connect_through(
    proxy: Option<&Proxy>,
    identity: &Identity,
    traffic: &Traffic,
    address: &str,
    fingerprint: ContentHash,
    purpose: Purpose,
) -> Result<Connection, ConnectError> {
    let waits = (Duration::from_secs(CONNECT_SECONDS_MAX), Duration::from_secs(HANDSHAKE_SECONDS_MAX));
    connect_within(proxy, identity, traffic, address, fingerprint, purpose, waits).await
}

/// [`connect_through`] with other times for the TCP connect and for the handshake.
pub(crate) async fn connect_within(
    proxy: Option<&Proxy>,
    identity: &Identity,
    traffic: &Traffic,
    address: &str,
    fingerprint: ContentHash,
    purpose: Purpose,
    (connect_max, handshake_max): (Duration, Duration),
) -> Result<Connection, ConnectError> {
    let late = |step, waited| ConnectError::Timeout { address: address.to_owned(), waited, step };
    let socket = timeout(connect_max, dial(proxy, address))
        .await
        .map_err(|_| late("TCP connect", connect_max))?
        .map_err(|error| error.into_connect_error(proxy, address))?;
    let greeting = preamble::encode(PROTOCOL_VERSION, purpose as u8);
    timeout(handshake_max, greet(identity, traffic, socket, fingerprint, greeting))
        .await
        .map_err(|_| late("handshake", handshake_max))?
        .map_err(|problem| problem.into_connect_error(address))
}

impl DialError {
    fn into_connect_error(self, proxy: Option<&Proxy>, address: &str) -> ConnectError {
        let address = address.to_owned();
        match (self, proxy.cloned()) {
            (Self::ProxyUnreachable(source), Some(proxy)) => ConnectError::ProxyUnreachable { proxy, source },
            (Self::ProxyRefused(source), Some(proxy)) => ConnectError::ProxyRefused { proxy, address, source },
            (Self::Unreachable(source) | Self::ProxyUnreachable(source) | Self::ProxyRefused(source), _) => {
                ConnectError::Unreachable { address, source }
            }
        }
    }
}

/// What can go wrong between an open socket and an authenticated peer.
#[derive(Debug)]
pub(crate) enum HandshakeProblem {
    Preamble(PreambleError),
    Tls(io::Error),
}

impl From<io::Error> for HandshakeProblem {
    /// Bytes that are no TLS at all come from another program.
    fn from(error: io::Error) -> Self {
        match tls_error(&error) {
            Some(rustls::Error::InvalidMessage(_)) => Self::Preamble(PreambleError::NotBeringia),
            _ => Self::Tls(error),
        }
    }
}

impl From<PreambleError> for HandshakeProblem {
    fn from(error: PreambleError) -> Self {
        Self::Preamble(error)
    }
}

impl HandshakeProblem {
    fn into_connect_error(self, address: &str) -> ConnectError {
        let address = address.to_owned();
        match self {
            Self::Preamble(source) => ConnectError::Preamble { address, source },
            Self::Tls(source) => match fingerprint_mismatch(&source) {
                Some(FingerprintMismatch { expected, found }) => ConnectError::Fingerprint { address, expected, found },
                None => ConnectError::Handshake { address, source },
            },
        }
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn fingerprint_mismatch(error: &io::Error) -> Option<FingerprintMismatch> {
    match tls_error(error)? {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => other.0.downcast_ref().cloned(),
        _ => None,
    }
}

/// The client's part after the TCP connect: TLS, our preamble, the server's.
pub(crate) async fn greet(
    identity: &Identity,
    traffic: &Traffic,
    socket: TcpStream,
    fingerprint: ContentHash,
    greeting: [u8; PREAMBLE_BYTES],
) -> Result<Connection, HandshakeProblem> {
    let (local_address, system) = (socket.local_addr()?, SystemSocket::of(&socket));
    let (socket, address, traffic) = prepare(socket, traffic)?;
    let name = ServerName::try_from(tls::SERVER_NAME).map_err(io::Error::other)?;
    let connector = TlsConnector::from(identity.client_config(fingerprint));
    let mut stream =
        connector.connect_with(name, socket, |session| session.set_buffer_limit(Some(SOCKET_WRITE_BYTES))).await?;
    stream.write_all(&greeting).await?;
    stream.flush().await?;
    let mut answer = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut answer).await?;
    preamble::decode(&answer)?;
    Ok(Connection::new(stream.into(), Peer::new(fingerprint, (address, local_address), system, traffic)))
}

/// The server's part after the TCP accept: TLS, the client's preamble, our answer.
pub(crate) async fn welcome(
    config: Arc<rustls::ServerConfig>,
    traffic: &Traffic,
    socket: TcpStream,
) -> Result<(Purpose, Connection), HandshakeProblem> {
    let (local_address, system) = (socket.local_addr()?, SystemSocket::of(&socket));
    let (socket, address, traffic) = prepare(socket, traffic)?;
    let mut stream = TlsAcceptor::from(config)
        .accept_with(socket, |session| session.set_buffer_limit(Some(SOCKET_WRITE_BYTES)))
        .await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let fingerprint = ContentHash::of(certificate.ok_or_else(|| io::Error::other("no client certificate"))?);
    let mut greeting = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut greeting).await?;
    let purpose = preamble::decode(&greeting);
    let answer = preamble::encode(PROTOCOL_VERSION, purpose.as_ref().map_or(0, |purpose| *purpose as u8));
    stream.write_all(&answer).await?;
    stream.flush().await?;
    let purpose = match purpose {
        Ok(purpose) => purpose,
        Err(error) => {
            // So that the answer arrives before the connection ends; the caller's deadline bounds it.
            stream.shutdown().await?;
            return Err(error.into());
        }
    };
    Ok((purpose, Connection::new(stream.into(), Peer::new(fingerprint, (address, local_address), system, traffic))))
}

fn prepare(socket: TcpStream, traffic: &Traffic) -> io::Result<(Socket, SocketAddr, Traffic)> {
    // Frames are written whole: waiting for more bytes would only delay them.
    socket.set_nodelay(true)?;
    SystemSocket::of(&socket).tune();
    let address = socket.peer_addr()?;
    let traffic = traffic.child();
    Ok((BufReader::with_capacity(SOCKET_READ_BYTES, Counted::new(socket, traffic.clone())), address, traffic))
}

impl Peer {
    fn new(
        fingerprint: ContentHash,
        (address, local_address): (SocketAddr, SocketAddr),
        socket: SystemSocket,
        traffic: Traffic,
    ) -> Self {
        Self { fingerprint, address, local_address, socket, traffic, place: OnceLock::new() }
    }
}

impl Connection {
    /// From now on the peer is held to what its place allows.
    pub(crate) fn take_place(&mut self, place: Place) {
        self.receiver.decoder.set_bytes_max(place.frame_bytes_max(true));
        // A connection has one place, and gets it once.
        let _ = self.sender.peer.place.set(place);
    }

    fn new(stream: Stream, peer: Peer) -> Self {
        let (read, write) = tokio::io::split(stream);
        let peer = Arc::new(peer);
        Self {
            sender: Sender { stream: write, pending: BytesMut::new(), peer: Arc::clone(&peer) },
            receiver: Receiver { stream: read, decoder: FrameDecoder::new(), peer },
        }
    }

    /// Sends one message. See [`Sender::send`].
    ///
    /// # Errors
    /// The message is too long, or the connection is gone.
    pub async fn send<T: Serialize + ?Sized>(&mut self, message: &T) -> Result<(), SendError> {
        self.sender.send(message).await
    }

    /// Sends one message, waiting at most that long for the peer to take it. See [`Sender::send_timeout`].
    ///
    /// # Errors
    /// As [`Connection::send`], or the time is over.
    pub async fn send_timeout<T: Serialize + ?Sized>(&mut self, message: &T, wait: Duration) -> Result<(), SendError> {
        self.sender.send_timeout(message, wait).await
    }

    /// Receives one message. Cancel-safe. See [`Receiver::recv`].
    ///
    /// # Errors
    /// The connection ended, or what came is no such message.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<T, RecvError> {
        self.receiver.recv().await
    }

    /// Receives one message, waiting at most that long. Cancel-safe.
    ///
    /// # Errors
    /// As [`Connection::recv`], or the time is over.
    pub async fn recv_timeout<T: DeserializeOwned>(&mut self, wait: Duration) -> Result<T, RecvError> {
        self.receiver.recv_timeout(wait).await
    }

    /// The two directions, to be used by different tasks.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    /// Both directions at once, without giving up the connection.
    pub fn halves(&mut self) -> (&mut Sender, &mut Receiver) {
        (&mut self.sender, &mut self.receiver)
    }

    /// The peer's fingerprint, proven in the handshake.
    pub fn peer(&self) -> ContentHash {
        self.sender.peer.fingerprint
    }

    /// The peer's socket address; the proxy's, if one connected us.
    pub fn address(&self) -> SocketAddr {
        self.sender.peer.address
    }

    /// The socket address of this side: which network card the connection goes through.
    pub fn local_address(&self) -> SocketAddr {
        self.sender.peer.local_address
    }

    /// Bytes of this connection.
    pub fn traffic(&self) -> &Traffic {
        &self.sender.peer.traffic
    }

    /// Which way the connection takes: addresses, network card, congestion control. Asks the system.
    pub fn path(&self) -> LinkPath {
        LinkPath::new(self.local_address(), self.address(), self.sender.peer.socket.congestion_control())
    }

    /// What TCP has counted and measured; `None` where the system does not tell.
    pub fn tcp_info(&self) -> Option<TcpInfo> {
        self.sender.peer.socket.info()
    }

    /// Bounds the rate at which this side sends, bytes a second: the kernel then spreads packets evenly below it.
    ///
    /// # Errors
    /// The system cannot: only Linux can.
    pub fn set_pacing_rate(&self, bytes_per_second: u64) -> io::Result<()> {
        self.sender.peer.socket.set_pacing_rate(bytes_per_second)
    }

    /// Tells the peer that nothing follows.
    ///
    /// # Errors
    /// The connection is gone already.
    pub async fn close(&mut self) -> Result<(), SendError> {
        self.sender.close().await
    }

    /// Whether nothing has arrived and the peer has not gone, as far as can be known without waiting.
    pub(crate) fn is_idle(&mut self) -> bool {
        let mut byte = [0];
        let read = pin!(self.receiver.stream.read(&mut byte));
        let pending = matches!(read.poll(&mut Context::from_waker(Waker::noop())), Poll::Pending);
        pending && self.receiver.decoder.unfinished().is_none() && self.sender.pending.is_empty()
    }
}

impl Sender {
    /// Sends one message. Dropped before it is ready, it leaves the message either unsent as a whole or queued as
    /// a whole, to be completed by the next `send` or `flush`.
    ///
    /// # Errors
    /// The message is too long, or the connection is gone.
    pub async fn send<T: Serialize + ?Sized>(&mut self, message: &T) -> Result<(), SendError> {
        self.queue(message).await?;
        self.flush().await
    }

    /// Sends one message, waiting at most that long for the peer to take it. After a timeout, see [`Sender::send`].
    ///
    /// # Errors
    /// As [`Sender::send`], or the time is over.
    pub async fn send_timeout<T: Serialize + ?Sized>(&mut self, message: &T, wait: Duration) -> Result<(), SendError> {
        timeout(wait, self.send(message)).await.map_err(|_| SendError::Timeout(wait))?
    }

    /// Puts one message into the queue, after what is in it has gone.
    pub(crate) async fn queue<T: Serialize + ?Sized>(&mut self, message: &T) -> Result<(), SendError> {
        let frame = frame::encode(message)?;
        self.drain().await?;
        self.pending.extend_from_slice(&frame);
        Ok(())
    }

    /// Sends bytes that no frame holds, after what is queued. Not cancel-safe: the peer counts on all of them.
    pub(crate) async fn send_raw(&mut self, mut content: Bytes) -> Result<(), SendError> {
        self.drain().await?;
        while content.has_remaining() {
            self.stream.write_buf(&mut content).await.map_err(SendError::Lost)?;
        }
        self.flush().await
    }

    /// Completes what a dropped `send` has left. Cancel-safe.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn flush(&mut self) -> Result<(), SendError> {
        self.drain().await?;
        self.stream.flush().await.map_err(SendError::Lost)
    }

    async fn drain(&mut self) -> Result<(), SendError> {
        while self.pending.has_remaining() {
            let written = self.stream.write_buf(&mut self.pending).await.map_err(SendError::Lost)?;
            if written == 0 {
                return Err(SendError::Lost(io::ErrorKind::WriteZero.into()));
            }
        }
        Ok(())
    }

    /// Tells the peer that nothing follows.
    ///
    /// # Errors
    /// The connection is gone already.
    pub async fn close(&mut self) -> Result<(), SendError> {
        self.flush().await?;
        self.stream.shutdown().await.map_err(SendError::Lost)
    }

    /// The peer's fingerprint, proven in the handshake.
    pub fn peer(&self) -> ContentHash {
        self.peer.fingerprint
    }
}

impl Receiver {
    /// Receives one message; of a peer that has said too much, after a pause. Cancel-safe: dropped before it is ready, it loses nothing.
    ///
    /// # Errors
    /// The connection ended, or what came is no such message. Only after a malformed or overlong body of a
    /// well-formed frame does the stream still have a meaning; callers should close it all the same.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<T, RecvError> {
        while let Some(wait) = self.peer.place.get().and_then(Place::wait) {
            sleep(wait).await;
        }
        loop {
            if let Some(body) = self.decoder.next_body()? {
                if let Some(place) = self.peer.place.get() {
                    place.said(body.len());
                    self.decoder.set_bytes_max(place.frame_bytes_max(false));
                }
                return Ok(frame::decode(&body)?);
            }
            match self.stream.read_buf(self.decoder.space()).await {
                Ok(0) => return Err(self.ended(None)),
                Ok(_) => {}
                Err(error) => return Err(self.ended(Some(error))),
            }
        }
    }

    /// Receives one message, waiting at most that long. Cancel-safe.
    ///
    /// # Errors
    /// As [`Receiver::recv`], or the time is over.
    pub async fn recv_timeout<T: DeserializeOwned>(&mut self, wait: Duration) -> Result<T, RecvError> {
        timeout(wait, self.recv()).await.map_err(|_| RecvError::Timeout(wait))?
    }

    /// Receives exactly `bytes` bytes that no frame holds. The caller has checked `bytes` against a bound. Not
    /// cancel-safe.
    pub(crate) async fn recv_raw(&mut self, bytes: usize) -> Result<Vec<u8>, RecvError> {
        let mut content = vec![0; bytes];
        let mut received = 0;
        while received < bytes {
            match self.recv_some(&mut content[received..]).await? {
                0 => return Err(RecvError::Truncated { received, expected: bytes }),
                count => received += count,
            }
        }
        Ok(content)
    }

    /// Receives some of the bytes that no frame holds: at most `buffer`'s length, 0 at the end of the connection.
    /// Cancel-safe: what it has not returned is still to come.
    pub(crate) async fn recv_some(&mut self, buffer: &mut [u8]) -> Result<usize, RecvError> {
        let early = self.decoder.take_raw(buffer.len());
        if !early.is_empty() {
            buffer[..early.len()].copy_from_slice(&early);
            return Ok(early.len());
        }
        match self.stream.read(buffer).await {
            Ok(count) => Ok(count),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            Err(error) => Err(RecvError::Lost(error)),
        }
    }

    /// What TCP has counted and measured; `None` where the system does not tell.
    pub(crate) fn tcp_info(&self) -> Option<TcpInfo> {
        self.peer.socket.info()
    }

    fn ended(&self, error: Option<io::Error>) -> RecvError {
        match (self.decoder.unfinished(), error) {
            (Some((received, expected)), _) => RecvError::Truncated { received, expected },
            (None, None) => RecvError::Closed,
            (None, Some(error)) => RecvError::Lost(error),
        }
    }

    /// The peer's fingerprint, proven in the handshake.
    pub fn peer(&self) -> ContentHash {
        self.peer.fingerprint
    }

    /// The peer's socket address.
    pub fn address(&self) -> SocketAddr {
        self.peer.address
    }

    /// Bytes of this connection, in both directions.
    pub fn traffic(&self) -> &Traffic {
        &self.peer.traffic
    }
}
